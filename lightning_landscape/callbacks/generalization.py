"""Training loss, validation loss and the gap between them, on two fixed probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_landscape.geometry.checks import check_callable
from lightning_landscape.geometry.objective import Engine
from lightning_landscape.training.batch_mean import BatchMean, batch_mean
from lightning_landscape.training.bookkeeping import VALIDATION, usable_state
from lightning_landscape.training.data.batch import (
    ProbeBatch,
    doubtful_sizes,
    first_examples,
    split_in_proportion,
)
from lightning_landscape.training.data.probe import Probe, Source, check_source, probe_of
from lightning_landscape.training.data.stored import StoredProbe, is_entry
from lightning_landscape.training.hooks import VALIDATION_BATCH_HOOKS, disable_hooks, enable_hooks
from lightning_landscape.training.interrupts import reraise_interrupt
from lightning_landscape.training.logged_size import LoggedSize
from lightning_landscape.training.losses import LossReduction, ProbeMode, UserLoss
from lightning_landscape.training.monitor import Monitor
from lightning_landscape.training.output.measured import Measured
from lightning_landscape.training.round import Round
from lightning_landscape.training.schedule import EveryNSteps

MetricFn = Callable[[Any, Any], Any]  # returns a mapping from name to tensor; see UserLoss


class GeneralizationMonitor(Monitor):
    r"""Log the loss on training and on validation examples, and the gap between the two.

    ``gap = L_val - L_train``.  Both are the same loss, in the same mode, on the same number of
    examples, which are fixed for the whole run.  In contrast, a ``train_loss`` that is logged in
    ``training_step`` is computed in train mode while the weights change, and ``val_loss`` is not.

    The loss is the mean over examples, also with ``loss_reduction="sum"``: for batches ``b`` with
    ``n_b`` examples and mean loss ``l_b``, ``L = sum_b n_b l_b / N``.  Its standard error, from the
    spread of the ``B`` batches, is ``se = sqrt(B / (B - 1) sum_b (n_b / N)^2 (l_b - L)^2)``, and
    that of the gap ``sqrt(se_train^2 + se_val^2)``.  It covers the choice of the probes' batches,
    but not that of the training set.

    Args:
        every_n_train_steps: measure when the probe is complete, and then at multiples of this
            number of steps.  ``"auto"``: about 50 times in the run, every 100 steps if its length
            is unknown.  ``None``: epochs only.
        every_n_epochs: measure at the last batch of every n-th epoch, with ``"auto"`` only there.
        max_overhead: largest share of the training time that all these callbacks together may
            take; measurements are spread over the run accordingly.  ``None``: no limit, exactly on
            schedule.
        grace_seconds: a short run may become up to twice as long, or 10 s longer if that is more,
            but not by more than these seconds.
        probe: the training examples: a ``DataLoader``, a list of batches, one batch (a tuple, a
            dict), or a shared ``Probe``; in a LightningCLI the path of a function annotated
            ``-> DataLoader`` or ``-> Probe``.  ``None``: the first training batches are kept.
        probe_samples: number of examples to keep of each kind, over all processes.
        probe_mode: ``"eval"``: the module in eval mode.  ``"train"``: fixed dropout masks and
            BatchNorm on batch statistics.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar tensor`` instead of ``training_step``;
            required with manual optimisation, and if validation batches have another structure.
        loss_reduction: ``"sum"`` if the loss is a sum over the batch's examples, not a mean.
        parameters: not used, because there are no derivatives.
        engine: not used.
        save_probe: write the kept batches beside the logs, so that a resumed run measures the same
            ones; ``False`` if they must not be on disk.
        name: for a second monitor; keys become ``generalization/<name>/...``.
        prog_bar: show the values in the progress bar.
        verbose: print the values of each measurement.
        validation_probe: the validation examples (the same kinds of value as ``probe``).  ``None``:
            the first batches of the first validation loader are kept, of the sanity check if it has
            enough examples; each process keeps its own.  The first measurement then follows that
            sanity check, or else the first validation, which may be at the end of the fit.
        metric_fn: ``metric_fn(pl_module, batch) -> {"accuracy": tensor}``: means over the batch of
            other quantities to compare, evaluated as the loss is.

    If the probes differ in size, the larger one is cut to the size of the smaller.  If its batches
    cannot be cut (graphs, packed sequences), the sizes differ, with one warning.

    Logged Metrics:
        - ``generalization/train_loss``, ``generalization/val_loss``: in units of the loss.
        - ``generalization/gap``: validation loss minus training loss.
        - ``generalization/gap_stderr``: if both probes have at least two batches.
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
        every_n_train_steps: EveryNSteps = "auto",
        every_n_epochs: int | None = None,
        max_overhead: float | None = 0.05,
        grace_seconds: float = 30.0,
        probe: Source = None,
        probe_samples: int = 512,
        probe_mode: ProbeMode = "eval",
        loss_fn: UserLoss | None = None,
        loss_reduction: LossReduction = "mean",
        parameters: str | Sequence[str] | None = None,
        engine: Engine = "auto",
        save_probe: bool = True,
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
            grace_seconds=grace_seconds,
            probe=probe,
            probe_samples=probe_samples,
            probe_mode=probe_mode,
            loss_fn=loss_fn,
            loss_reduction=loss_reduction,
            parameters=parameters,
            engine=engine,
            save_probe=save_probe,
            name=name,
            prog_bar=prog_bar,
            verbose=verbose,
        )
        owner = "GeneralizationMonitor"
        if metric_fn is not None:
            expected = "a function (pl_module, batch) -> mapping from name to value, or None"
            check_callable(owner, "metric_fn", metric_fn, expected, arguments=2)
        check_source(owner, "validation_probe", validation_probe)
        validation = probe_of(validation_probe, probe_samples)
        if validation is validation_probe and validation.captured:
            raise ValueError(
                f"{owner}(validation_probe=Probe()): expected one with a source, or None for the "
                f"first validation batches"
            )
        self.validation_probe = validation_probe
        self.metric_fn = metric_fn
        self._bookkeeping.probes[VALIDATION] = validation
        self._bookkeeping.stored[VALIDATION] = StoredProbe("validation")
        self.tags = ("train_loss", "val_loss", "gap", "gap_stderr")
        self._process_samples = probe_samples  # validation examples per process
        self._without_validation = False
        self._logged_size = LoggedSize()
        self._copied = False  # the current validation batch
        self._doubtful = False  # the size of a captured validation batch

    def owns(self, key: str) -> bool:
        """Whether this callback may log ``key``; names of ``metric_fn`` are known only later."""
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
    def main_tags(self) -> tuple[str, ...]:
        """The scalars that the summary at the end of the fit shows."""
        return ("gap",)

    @property
    def forwards(self) -> int:
        """Approximate forwards of the probe per measurement."""
        return 2 if self.metric_fn is None else 4

    @property
    def _validation(self) -> Probe:
        return self._bookkeeping.probes[VALIDATION]

    # -- the validation probe ------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._process_samples = math.ceil(self._validation.samples / trainer.world_size)
        if stage == "fit" and (self._validation.complete or not self._validation.captured):
            self._end_capture()

    def prepare(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Start the capture of validation batches, or warn if there will be none."""
        if self._without_validation:  # by another fit
            self._bookkeeping.disabled = self._without_validation = False
        probe = self._validation
        if not probe.captured or probe.complete:
            self._end_capture()
        elif not trainer.enable_validation:
            self._bookkeeping.disabled = self._without_validation = True
            self.warn_once(
                "nothing is measured: this fit has no validation loop to take validation examples "
                "from; pass validation_probe=... (a DataLoader, a list of batches or one batch)"
            )
        elif not probe.closed:
            enable_hooks(self, VALIDATION_BATCH_HOOKS)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if self._captures(trainer) and not trainer.sanity_checking:
            self._validation.clear()  # the same examples follow again, from the first on
            self._doubtful = False

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Copy the batch.  No communication: processes may have different numbers of batches."""
        self._copied = False
        probe = self._validation
        if dataloader_idx > 0 or not self._captures(trainer):
            return
        try:
            probe.offer(batch, batch_idx, lambda _: 0)
            self._copied = True
            self._logged_size.watch(trainer, validation=True)
        except Exception as error:  # a batch that cannot be copied
            reraise_interrupt(error)
            self.warn_once(f"a validation batch could not be copied ({error})")
            self._end_capture()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count its examples as validation_step does in ``self.log``."""
        size, probe = self._logged_size.stop(), self._validation
        if not self._copied:
            return
        self._copied = False
        if size is not None:
            probe.batches[-1] = replace(probe.batches[-1], size=size)
        elif doubtful_sizes(probe.batches[-1].batch):
            self._doubtful = True
        if probe.size >= self._process_samples:
            self._end_capture()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._captures(trainer) and not trainer.sanity_checking:
            self._end_capture()

    def _captures(self, trainer: Trainer) -> bool:
        probe = self._validation
        in_fit = trainer.state.fn == "fit"  # not validate()
        return in_fit and probe.captured and not probe.closed and not probe.complete

    def _end_capture(self) -> None:
        self._validation.closed = True
        self._logged_size.stop()
        disable_hooks(self, VALIDATION_BATCH_HOOKS, GeneralizationMonitor)

    # -- a measurement -------------------------------------------------------------------------

    def measure(self, this_round: Round) -> Measured:
        self._use_logged_sizes(this_round)
        train, val = self._batches_of_equal_size(this_round)
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
            values |= self._metric_values(this_round, train, val)
        sizes = [loss.examples for loss in losses]
        if sizes[0] != sizes[1]:
            self.warn_once(
                f"the losses are those of {sizes[0]} training and {sizes[1]} validation examples: "
                f"their batches cannot be cut to the same number"
            )
        return Measured(values, {"probe_samples": sizes[0], "validation_samples": sizes[1]})

    def _use_logged_sizes(self, this_round: Round) -> None:
        """Count the examples as the module does, of a captured probe only if in doubt."""
        if not self.loss.probe.captured:
            this_round.use_logged_sizes(self, self.loss.probe)
        probe = self._validation
        if probe.captured and not probe.sized:  # on all processes or on none
            probe.sized = not this_round.processes.total(self._doubtful)
        this_round.use_logged_sizes(self, probe)

    def _batches_of_equal_size(
        self, this_round: Round
    ) -> tuple[list[ProbeBatch], list[ProbeBatch]]:
        """This process's batches of both probes, cut to the same size over all processes."""
        probes = (self.loss.probe, self._validation)
        processes = this_round.processes
        local = torch.tensor([probe.size for probe in probes], device=processes.device)
        sizes = [[int(row[which]) for row in processes.gathered(local)] for which in range(2)]
        count = min(map(sum, sizes))
        train, val = (
            first_examples(probe.batches, split_in_proportion(per_process, count)[processes.rank])
            for probe, per_process in zip(probes, sizes, strict=True)
        )
        return train, val

    def _metric_values(
        self, this_round: Round, train: Sequence[ProbeBatch], val: Sequence[ProbeBatch]
    ) -> dict[str, float]:
        assert self.metric_fn is not None
        parts = {"train": train, "val": val}
        found = {
            part: [
                _as_numbers(row) for row in this_round.batch_values(self, batches, self.metric_fn)
            ]
            for part, batches in parts.items()
        }
        # Every process has training batches, but not necessarily validation batches.
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


def _sizes(batches: Sequence[ProbeBatch]) -> list[int]:
    return [batch.size for batch in batches]


def _as_numbers(row: Any) -> dict[str, float]:
    """The return value of ``metric_fn`` for one batch, as numbers."""
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
