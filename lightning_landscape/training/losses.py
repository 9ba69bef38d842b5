"""The loss that a callback measures: the module's own ``training_step``, or a given function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_landscape.geometry.batch_norm import reestimate_batch_norm
from lightning_landscape.geometry.batches import Cut, LossFn, Term, checked
from lightning_landscape.geometry.objective import Engine
from lightning_landscape.training.data.batch import (
    ProbeBatch,
    clone_batch,
    concat_batches,
    cut_batch,
)
from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.isolation.isolated import Isolation

# Of a LightningModule of either package and a batch.  A LightningCLI that read "-> Tensor" would
# refuse functions without annotations.
UserLoss = Callable[[Any, Any], Any]
ProbeMode = Literal["train", "eval"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class LossSpec:
    """Which loss is measured, and over which parameters: callbacks with equal ones share it.

    Attributes:
        probe: the examples.
        mode: ``"train"`` or ``"eval"``.
        loss_fn: ``loss_fn(pl_module, batch)``; None for ``training_step``.
        reduction: ``"mean"`` or ``"sum"``, of the loss over the examples of a batch.
        engine: how Hessian-vector products are made.
        parameters: glob patterns over names; None for all that is trained.
        concat: whether the probe's batches may be evaluated as one.
    """

    probe: Probe
    mode: ProbeMode
    loss_fn: UserLoss | None = field(hash=False)  # a callable object may have no hash
    reduction: Reduction
    engine: Engine
    parameters: tuple[str, ...] | None
    concat: bool


def loss_terms(
    trainer: Trainer,
    pl_module: LightningModule,
    isolation: Isolation,
    spec: LossSpec,
    batches: Sequence[ProbeBatch],
    total: int,
    concat: bool = False,
) -> tuple[list[Term], Cut]:
    """``(examples, loss)`` for each batch, and how one is cut, for an ``Objective``.

    With ``reduction="sum"`` each loss is a sum over its examples, and so is the objective's: it
    equals what one batch with all ``total`` examples would give.  ``concat``: all batches as one.

    Raises:
        NotConcatenable: the batches cannot be concatenated.
    """

    def term(position: int, size: int, index: int, fresh: Callable[[], Any]) -> LossFn:
        scale = total / size if spec.reduction == "sum" else 1.0
        masks = masks_of(trainer, position)

        def loss() -> Tensor:
            with evaluation(trainer, isolation, masks, spec.mode):
                # Fresh, because training_step may edit its batch in place.
                value = _loss(pl_module, spec.loss_fn, fresh(), index)
            return value * scale if scale != 1.0 else value

        return loss

    def whole(position: int, held: ProbeBatch) -> Term:
        fresh = partial(clone_batch, held.batch)
        return float(held.size), term(position, held.size, held.index, fresh)

    def cut(position: int, most: int) -> list[Term]:
        held = concat_batches(batches) if concat else batches[position]
        return [whole(position, piece) for piece in cut_batch(held, most)]

    if concat:
        first = concat_batches(batches)  # raises here, and not when it is evaluated
        loss = term(0, first.size, first.index, lambda: concat_batches(batches).batch)
        return [(float(first.size), loss)], cut
    return [whole(position, held) for position, held in enumerate(batches)], cut


def masks_of(trainer: Trainer, position: int) -> int:
    """Other batches and other processes get other dropout masks, the same at each evaluation."""
    return position * trainer.world_size + trainer.global_rank


def reestimated_term(
    trainer: Trainer,
    pl_module: LightningModule,
    isolation: Isolation,
    spec: LossSpec,
    statistics: Probe,
    total: int,
) -> list[Term]:
    """The mean loss in eval mode, with BatchNorm's statistics estimated at the weights.

    At each evaluation they are estimated from the batches of ``statistics`` that this process
    holds, in the modes that the module trains in: layers that training leaves in eval mode keep
    their own.
    """
    probe, reduction = spec.probe, spec.reduction

    def value(held: ProbeBatch) -> Tensor:
        return _loss(pl_module, spec.loss_fn, clone_batch(held.batch), held.index)

    def loss() -> Tensor:
        with evaluation(trainer, isolation, trainer.global_rank, "train"):
            reestimate_batch_norm(pl_module, lambda: [value(held) for held in statistics.batches])
            isolation.leave_training()
            sums = [
                checked(value(held)).detach() * (1 if reduction == "sum" else held.size)
                for held in probe.batches
            ]
        # A sum is that of one batch with all examples, as in loss_terms.
        return torch.stack(sums).sum() * (total if reduction == "sum" else 1.0) / probe.size

    return [(float(probe.size), loss)]


@contextlib.contextmanager
def evaluation(
    trainer: Trainer, isolation: Isolation, masks: int, mode: ProbeMode
) -> Iterator[None]:
    """Around one evaluation of the module; ``masks`` seeds its random numbers."""
    with (
        isolation.evaluation(masks, mode=mode),
        trainer.precision_plugin.train_step_context(),
    ):
        yield


def _loss(pl_module: LightningModule, loss_fn: UserLoss | None, batch: Any, index: int) -> Tensor:
    if loss_fn is not None:
        loss: Tensor = loss_fn(pl_module, batch)
        return loss
    return _training_loss(pl_module, batch, index)


def takes_iterator(pl_module: LightningModule) -> bool:
    """Whether training_step fetches its batches itself, from ``dataloader_iter``."""
    return is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True)


def _training_loss(pl_module: LightningModule, batch: Any, index: int) -> Tensor:
    # Called directly: through the strategy's wrapper (DDP) training would silently diverge.
    step: Any = pl_module.training_step
    if takes_iterator(pl_module):
        output = step(iter([(batch, index, 0)]))
    elif is_param_in_hook_signature(step, "batch_idx", min_args=2):
        output = step(batch, index)
    else:
        output = step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"training_step returned {type(output).__name__} for a probe batch: expected a loss "
            f"tensor or a dict with 'loss'; pass loss_fn=lambda pl_module, batch: ... otherwise"
        )
    return loss
