"""Train loss, validation loss and the gap between them, on two probes of equal standing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_landscape.geometry.checks import check_callable
from lightning_landscape.geometry.objective import Engine
from lightning_landscape.training.batch_mean import BatchMean, batch_mean
from lightning_landscape.training.bookkeeping import VALIDATION, usable_state
from lightning_landscape.training.data.batch import ProbeBatch, first_examples
from lightning_landscape.training.data.probe import Probe, Source, check_source, probe_of
from lightning_landscape.training.data.stored import StoredProbe, is_entry
from lightning_landscape.training.hooks import VALIDATION_BATCH_START, disable_hooks, enable_hooks
from lightning_landscape.training.losses import ProbeMode, Reduction, UserLoss
from lightning_landscape.training.monitor import Monitor
from lightning_landscape.training.output.measured import Measured
from lightning_landscape.training.round import Round

MetricFn = Callable[[Any, Any], Any]  # a mapping from name to tensor, see UserLoss


class GeneralizationMonitor(Monitor):
    r"""Log the loss on training and on validation examples, and the gap between the two.

    ``gap = L_val - L_train``.  Both are the same loss, in the same mode, on the same number of
    examples, which stay the same all through the run: unlike Lightning's own ``train_loss`` and
    ``val_loss``, of which one is taken in train mode while the weights move and the other is not.

    The loss is the mean over examples, also with ``loss_reduction="sum"``: of batches ``b`` with
    ``n_b`` examples and mean loss ``l_b``, ``L = sum_b n_b l_b / N``.  Its standard error, from the
    spread of the ``B`` batches, is ``se = sqrt(B / (B - 1) sum_b (n_b / N)^2 (l_b - L)^2)``, and
    that of the gap ``sqrt(se_train^2 + se_val^2)``: how far another draw of batches might have
    moved it, not what training on other examples would have given.

    Args:
        every_n_train_steps: steps between measurements; ``None``: epochs only.
        every_n_epochs: measure also at the last batch of every n-th epoch.
        max_overhead: the share of the training time that all these callbacks together may
            take, the smallest one given; ``None``: the exact schedule, whatever it costs.
        probe: the training examples: a ``DataLoader``, a list of batches, one batch (a tuple, a
            dict), or a shared ``Probe``; in a LightningCLI the path of a function annotated
            ``-> DataLoader`` or ``-> Probe``.  ``None``: the first training batches are kept.
        probe_samples: how many examples to keep of each kind, over all processes; fewer where
            ``max_overhead`` of the whole run does not allow more, with a warning.
        probe_mode: ``"eval"``: the module in eval mode.  ``"train"``: dropout masks fixed,
            BatchNorm on batch statistics.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar tensor`` instead of ``training_step``;
            needed with manual optimisation, and where validation batches are of another kind.
        loss_reduction: ``"sum"`` if the loss is a sum over the batch's examples, not a mean.
        parameters: not used here, no derivative is taken.
        engine: not used here either.
        name: for a second monitor; keys become ``generalization/<name>/...``.
        prog_bar: show the values in the progress bar.
        verbose: print the values of each measurement.
        validation_probe: the validation examples (the same kinds of value as ``probe``).  ``None``:
            the first batches of the first validation loader are kept as they pass by, those of the
            sanity check if it sees enough; each process keeps its share.  The first measurement is
            then: after a sanity check that saw enough, else after the first validation, at the end
            of the fit if that is later.
        metric_fn: ``metric_fn(pl_module, batch) -> {"accuracy": tensor}``: means over the batch of
            whatever else is to be compared, evaluated as the loss is.

    Of two probes of unlike size the larger one is cut to the size of the smaller.  Where its
    batches cannot be cut (graphs, packed sequences) the sizes differ, which is said once.

    Logged Metrics:
        - ``generalization/train_loss``, ``generalization/val_loss``: in units of the loss.
        - ``generalization/gap``: the second less the first.
        - ``generalization/gap_stderr``: where both probes have two batches or more.
        - ``generalization/train_<name>``, ``generalization/val_<name>``,
          ``generalization/gap_<name>``: for each value of ``metric_fn``.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: two monitors of one name; manual optimisation without a
            ``loss_fn``.

    Cost: one forward of each probe, two with ``metric_fn``.

    Example::

        trainer = Trainer(callbacks=[GeneralizationMonitor(every_n_train_steps=50)])
    """

    kind = "generalization"
    moves_weights = False

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = 100,
        every_n_epochs: int | None = None,
        max_overhead: float | None = 0.05,
        probe: Source = None,
        probe_samples: int = 512,
        probe_mode: ProbeMode = "eval",
        loss_fn: UserLoss | None = None,
        loss_reduction: Reduction = "mean",
        parameters: str | Sequence[str] | None = None,
        engine: Engine = "auto",
        name: str | None = None,
        prog_bar: bool = False,
        verbose: bool = False,
        validation_probe: Source = None,
        metric_fn: MetricFn | None = None,
    ) -> None:
        super().__init__(
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            max_overhead=max_overhead,
            probe=probe,
            probe_samples=probe_samples,
            probe_mode=probe_mode,
            loss_fn=loss_fn,
            loss_reduction=loss_reduction,
            parameters=parameters,
            engine=engine,
            name=name,
            prog_bar=prog_bar,
            verbose=verbose,
        )
        owner = "GeneralizationMonitor"
        if metric_fn is not None:
            expected = "a function (pl_module, batch) -> mapping from name to value, or None"
            check_callable(owner, "metric_fn", metric_fn, expected, arguments=2)
        check_source(owner, "validation_probe", validation_probe)
        further = probe_of(validation_probe, probe_samples)
        if further is validation_probe and further.captured:
            raise ValueError(
                f"{owner}(validation_probe=Probe()): expected one with a source, or None for the "
                f"first validation batches"
            )
        self.validation_probe = validation_probe
        self.metric_fn = metric_fn
        self._bookkeeping.probes[VALIDATION] = further
        self._bookkeeping.stored[VALIDATION] = StoredProbe("validation")
        self.tags = ("train_loss", "val_loss", "gap", "gap_stderr")
        self._share = probe_samples  # of the captured probe, for each process
        self._without_validation = False

    def owns(self, key: str) -> bool:
        """Whether this callback may log ``key``; what ``metric_fn`` names is known only later."""
        parts = tuple(self.key(part) for part in ("train_", "val_", "gap_"))
        return key in self.keys or (self.metric_fn is not None and key.startswith(parts))

    @property
    def charts(self) -> dict[str, list[Any]]:
        """Both losses on one chart, the gap on another."""
        return {
            f"{self.prefix}: loss on training and on validation examples": [
                "Multiline",
                [self.key("train_loss") + "$", self.key("val_loss") + "$"],
            ],
            f"{self.prefix}: gap (validation - training)": ["Multiline", [self.key("gap") + "$"]],
        }

    @property
    def forwards(self) -> int:
        """Forwards of the probe that one measurement costs."""
        return 2 if self.metric_fn is None else 4

    @property
    def _validation(self) -> Probe:
        return self._bookkeeping.probes[VALIDATION]

    @property
    def measures_at_end(self) -> bool:
        """The first values, in a fit that ends with its first validation."""
        return not self.measured

    # -- the validation probe ------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._share = math.ceil(self._validation.samples / trainer.world_size)
        if stage == "fit" and (self._validation.complete or not self._validation.captured):
            self._close()

    def prepare(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Say so where no validation probe will ever be had."""
        if self._without_validation:  # that was another fit
            self._bookkeeping.disabled = self._without_validation = False
        probe = self._validation
        if not probe.captured or probe.complete:
            self._close()
        elif not trainer.enable_validation:
            self._bookkeeping.disabled = self._without_validation = True
            self.warn_once(
                "nothing is measured: this fit has no validation loop to take validation examples "
                "from; pass validation_probe=... (a DataLoader, a list of batches or one batch)"
            )
        elif not probe.closed:
            enable_hooks(self, [VALIDATION_BATCH_START])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if self._captures(trainer) and not trainer.sanity_checking:
            self._validation.clear()  # the same examples come again, from the first on

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch.  Nothing is sent: processes may have different numbers of batches."""
        probe = self._validation
        if dataloader_idx > 0 or not self._captures(trainer):
            return
        try:
            probe.offer(batch, batch_idx, lambda _: 0)
        except Exception as error:  # a batch that cannot be copied
            self.warn_once(f"a validation batch could not be kept ({error})")
            self._close()
        if probe.size >= self._share:
            self._close()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._captures(trainer) and not trainer.sanity_checking:
            self._close()

    def _captures(self, trainer: Trainer) -> bool:
        probe = self._validation
        fits = trainer.state.fn == "fit"  # not validate()
        return fits and probe.captured and not probe.closed and not probe.complete

    def _close(self) -> None:
        self._validation.closed = True
        disable_hooks(self, [VALIDATION_BATCH_START], GeneralizationMonitor)

    # -- a measurement -------------------------------------------------------------------------

    def measure(self, this_round: Round) -> Measured:
        train, val = self._equal(this_round)
        values: dict[str, float] = {}
        losses = []
        for part, batches in (("train", train), ("val", val)):
            found = this_round.batch_losses(self, batches)
            losses.append(batch_mean(found, _sizes(batches), this_round.processes))
            values[self.key(f"{part}_loss")] = losses[-1].value
        values[self.key("gap")] = losses[1].value - losses[0].value
        if all(loss.batches > 1 for loss in losses):
            values[self.key("gap_stderr")] = math.hypot(*(loss.stderr for loss in losses))
        if self.metric_fn is not None:
            values |= self._metrics(this_round, train, val)
        sizes = [loss.examples for loss in losses]
        if sizes[0] != sizes[1]:
            self.warn_once(
                f"the losses are those of {sizes[0]} training and {sizes[1]} validation examples: "
                f"their batches cannot be cut to the same number"
            )
        return Measured(values, {"probe_samples": sizes[0], "validation_samples": sizes[1]})

    def _equal(self, this_round: Round) -> tuple[list[ProbeBatch], list[ProbeBatch]]:
        """This process's batches of both probes, with as many examples over all processes."""
        probes = (self.loss.probe, self._validation)
        processes = this_round.processes
        own = torch.tensor([probe.size for probe in probes], device=processes.device)
        sizes = [[int(row[which]) for row in processes.gathered(own)] for which in range(2)]
        wanted = min(map(sum, sizes))
        train, val = (
            first_examples(probe.batches, shares(of_each, wanted)[processes.rank])
            for probe, of_each in zip(probes, sizes, strict=True)
        )
        return train, val

    def _metrics(
        self, this_round: Round, train: Sequence[ProbeBatch], val: Sequence[ProbeBatch]
    ) -> dict[str, float]:
        assert self.metric_fn is not None
        parts = {"train": train, "val": val}
        found = {
            part: [_checked(row) for row in this_round.batch_values(self, batches, self.metric_fn)]
            for part, batches in parts.items()
        }
        # Every process has training batches; it may be without validation batches.
        names = list(found["train"][0])
        for row in (row for rows in found.values() for row in rows):
            if list(row) != names:
                raise ValueError(
                    f"metric_fn returned {list(row)} for one batch and {names} for another: "
                    f"expected the same names for all"
                )
        values = {}
        for name in names:
            means: dict[str, BatchMean] = {}
            for part, batches in parts.items():
                rows = [row[name] for row in found[part]]
                means[part] = batch_mean(rows, _sizes(batches), this_round.processes)
                values[self.key(f"{part}_{name}")] = means[part].value
            values[self.key(f"gap_{name}")] = means["val"].value - means["train"].value
        return values

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The common state, and the file of the validation probe."""
        stored = self._bookkeeping.stored[VALIDATION]
        return {**super().state_dict(), "validation_probe": stored.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the series, on the same examples."""
        super().load_state_dict(state_dict)
        if self._bookkeeping.resumed and usable_state(
            self.prefix, state_dict, {"validation_probe": is_entry}
        ):
            self._bookkeeping.stored[VALIDATION].entry = state_dict.get("validation_probe")


def shares(sizes: Sequence[int], wanted: int) -> list[int]:
    """How many examples each process takes of its ``sizes``, ``wanted`` in all; 1 at least.

    Example:
        >>> shares([256, 256], 390), shares([8, 5], 13), shares([0, 40], 20)
        ([195, 195], [8, 5], [1, 20])
    """
    total, before, taken = sum(sizes), 0, []
    for size in sizes:
        taken.append((before + size) * wanted // total - before * wanted // total)
        before += size
    return [max(count, 1) for count in taken]


def _sizes(batches: Sequence[ProbeBatch]) -> list[int]:
    return [batch.size for batch in batches]


def _checked(row: Any) -> dict[str, float]:
    """What ``metric_fn`` gave for one batch, as numbers."""
    if not isinstance(row, Mapping) or not row:
        raise TypeError(
            f"metric_fn returned {type(row).__name__}: expected a mapping such as "
            f"{{'accuracy': (output.argmax(1) == target).float().mean()}}"
        )
    for name, value in row.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"metric_fn returned {name!r} of shape {tuple(value.shape)}: expected the mean "
                f"over the batch, a scalar"
            )
    return {str(name): float(value) for name, value in row.items()}
