"""The trainings of the benchmarks of whole runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.turns import ByTurns, Turns


def mlp() -> tuple[Any, Any, int]:
    """Digits, 64-64-10, 32 examples a step: Lightning itself is most of a step."""
    from torch import nn

    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), _digits(), 32


def cnn() -> tuple[Any, Any, int]:
    """Digits as images, three convolutions with BatchNorm, 128 examples a step."""
    from torch import nn

    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for before, after in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 10)), _digits(), 128


def transformer() -> tuple[Any, Any, int]:
    """MNIST-1D in ten patches, two encoder layers with dropout, 64 examples a step."""
    import torch
    from torch import nn

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
            self.embed = nn.Linear(4, 64)
            self.places = nn.Parameter(0.02 * torch.randn(10, 64))
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            return self.head(self.layers(self.embed(x.unflatten(1, (10, 4))) + self.places).mean(1))

    return Encoder(), _mnist1d(), 64


def lstm() -> tuple[Any, Any, int]:
    """MNIST-1D as a sequence of 40, one layer of 64, 64 examples a step."""
    from torch import nn

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(1, 64, batch_first=True)
            self.head = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            return self.head(self.lstm(x.unsqueeze(-1))[0][:, -1])

    return Recurrent(), _mnist1d(), 64


TRAININGS: dict[str, Callable[[], tuple[Any, Any, int]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": transformer,
    "lstm": lstm,
}


def _digits() -> Any:
    import torch
    from sklearn.datasets import load_digits
    from torch.utils.data import TensorDataset

    pixels, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))


def _mnist1d() -> Any:
    import torch
    from mnist1d.data import get_dataset_args, make_dataset
    from torch.utils.data import TensorDataset

    made = make_dataset(get_dataset_args())
    return TensorDataset(torch.tensor(made["x"], dtype=torch.float32), torch.tensor(made["y"]))


def loader_of(data: Any, size: int, turns: Turns) -> Any:
    """Shuffled batches of ``size`` examples, which pass the turn on."""
    import torch
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    shuffled = RandomSampler(data, generator=torch.Generator().manual_seed(0))
    batches = BatchSampler(shuffled, size, drop_last=True)
    return DataLoader(data, batch_sampler=ByTurns(batches, turns))  # type: ignore[arg-type]
