"""The loss that a callback measures: the module's own ``training_step``, or a given function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
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

# Takes a LightningModule of either package and a batch.  With "-> Tensor" a LightningCLI would
# reject functions without annotations.
UserLoss = Callable[[Any, Any], Any]
ProbeMode = Literal["train", "eval"]
LossReduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class LossSpec:
    """The loss to measure, and its parameters; callbacks with equal specs share an objective.

    Attributes:
        probe: the examples.
        mode: ``"train"`` or ``"eval"``.
        loss_fn: ``loss_fn(pl_module, batch)``; None for ``training_step``.
        reduction: ``"mean"`` or ``"sum"``, of the loss over the examples of a batch.
        engine: how Hessian-vector products are made.
        parameters: glob patterns over names; None for all that an optimizer trains.
        concat: whether the probe's batches may be evaluated as one.
    """

    probe: Probe
    mode: ProbeMode
    loss_fn: UserLoss | None = field(hash=False)  # a callable object may have no hash
    reduction: LossReduction
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
    sizes: dict[int, int] | None = None,
) -> tuple[list[Term], Cut]:
    """``(examples, loss)`` of each batch, and a function that splits one, for an ``Objective``.

    With ``reduction="sum"`` each loss is a sum over its examples, and so is that of the objective:
    it equals the loss of one batch with all ``total`` examples.  ``concat``: all batches as one.
    ``sizes`` gets the number of examples of each batch that the module passes to ``self.log``.

    Raises:
        NotConcatenable: the batches cannot be concatenated.
    """

    def term(position: int, size: int, index: int, make_batch: Callable[[], Any]) -> LossFn:
        scale = total / size if spec.reduction == "sum" else 1.0
        seed = mask_seed(trainer, position)

        def loss() -> Tensor:
            with evaluation(trainer, isolation, seed, spec.mode, _kind(spec)):
                # A new copy each time, because training_step may modify its batch in place.
                value = _loss(pl_module, spec.loss_fn, make_batch(), index)
            whole = size == batches[position].size  # not a piece of the batch
            if sizes is not None and whole and isolation.logged_size is not None:
                sizes[position] = isolation.logged_size
            return value * scale if scale != 1.0 else value

        return loss

    def term_of(position: int, batch: ProbeBatch) -> Term:
        make_batch = partial(clone_batch, batch.batch)
        return float(batch.size), term(position, batch.size, batch.index, make_batch)

    def cut(position: int, most: int) -> list[Term]:
        batch = concat_batches(batches) if concat else batches[position]
        return [term_of(position, piece) for piece in cut_batch(batch, most)]

    if concat:
        first = concat_batches(batches)  # raises now, and not during the evaluation
        loss = term(0, first.size, first.index, lambda: concat_batches(batches).batch)
        return [(float(first.size), loss)], cut
    return [term_of(position, batch) for position, batch in enumerate(batches)], cut


def mask_seed(trainer: Trainer, position: int) -> int:
    """The seed of the dropout masks of a batch: fixed, and different on each process."""
    return position * trainer.world_size + trainer.global_rank


def reestimated_term(
    trainer: Trainer,
    pl_module: LightningModule,
    isolation: Isolation,
    spec: LossSpec,
    statistics: Probe,
    total: int,
) -> list[Term]:
    """The mean loss in eval mode, with BatchNorm statistics estimated at the current weights.

    They are estimated at each evaluation, from this process's batches of ``statistics``, with each
    submodule in its mode of training: layers that are in eval mode in training keep their own.
    """
    probe, reduction = spec.probe, spec.reduction

    def value(batch: ProbeBatch) -> Tensor:
        return _loss(pl_module, spec.loss_fn, clone_batch(batch.batch), batch.index)

    def loss() -> Tensor:
        kind = _kind(spec, "reestimated")
        with evaluation(trainer, isolation, trainer.global_rank, "train", kind):
            reestimate_batch_norm(pl_module, lambda: [value(b) for b in statistics.batches])
            isolation.leave_training()
            sums = [
                checked(value(batch)).detach() * (1 if reduction == "sum" else batch.size)
                for batch in probe.batches
            ]
        # A summed loss is that of one batch with all examples, as in loss_terms.
        return torch.stack(sums).sum() * (total if reduction == "sum" else 1.0) / probe.size

    return [(float(probe.size), loss)]


@contextlib.contextmanager
def evaluation(
    trainer: Trainer,
    isolation: Isolation,
    seed: int,
    mode: ProbeMode,
    kind: Hashable = None,
) -> Iterator[None]:
    """A context for one evaluation of the module; ``seed`` is that of its random numbers.

    ``kind``: evaluations of one kind touch the same state; None: unknown.
    """
    with (
        isolation.evaluation(seed, mode=mode, kind=kind),
        trainer.precision_plugin.train_step_context(),
    ):
        yield


def _kind(spec: LossSpec, what: str = "loss") -> Hashable:
    """Evaluations of one kind touch the same state; None: unknown."""
    return (what, spec.loss_fn) if isinstance(spec.loss_fn, Hashable) else None


def _loss(pl_module: LightningModule, loss_fn: UserLoss | None, batch: Any, index: int) -> Tensor:
    if loss_fn is not None:
        loss: Tensor = loss_fn(pl_module, batch)
        return loss
    return _training_loss(pl_module, batch, index)


def takes_iterator(pl_module: LightningModule) -> bool:
    """Whether training_step fetches its batches from a ``dataloader_iter``."""
    return is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True)


def _training_loss(pl_module: LightningModule, batch: Any, index: int) -> Tensor:
    # Called directly: a call through the strategy's wrapper (DDP) would change the training.
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
            f"tensor or a dict with 'loss'; otherwise pass loss_fn=lambda pl_module, batch: ..."
        )
    return loss
