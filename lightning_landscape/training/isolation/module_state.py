"""Everything that a ``training_step`` may change, and how it is restored."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_landscape.geometry.checks import few
from lightning_landscape.training.isolation.errors import TrainingChangedError
from lightning_landscape.training.isolation.graph import Graph
from lightning_landscape.training.isolation.iterators import Recordings
from lightning_landscape.training.isolation.places import UNWRITABLE, Place
from lightning_landscape.training.isolation.snapshots import (
    NoGradients,
    Snapshot,
    TensorContent,
    TensorVersion,
)
from lightning_landscape.training.isolation.stand_ins import Recorded, StandIn
from lightning_landscape.training.isolation.tensors import (
    copies_of,
    is_plain,
    same_bits,
    storage_of,
)

# Tensors above these sizes in bytes are not copied but only watched: of the Trainer's optimizers,
# callbacks and data module; in containers and objects outside of any module.
_LARGE_OF_TRAINER, _LARGE_OUTSIDE = 2**20, 2**26


@dataclass
class _Touched:
    """What the first evaluation of one kind has touched: the next ones restore only that."""

    tensors: list[tuple[Tensor, list[Place]]]
    stand_ins: list[StandIn]
    snapshots: list[Snapshot]


class ModuleState:
    """The mutable state of a module, and of all that it can reach.

    One measurement evaluates the loss many times, so state is restored at two levels:

    - :meth:`begin_evaluation` and :meth:`end_evaluation` enclose one evaluation.  It works on fresh
      copies of buffers, tensors and sets, because a retained graph may refer to them; iterators
      and files have stand-ins.  At its end everything is restored, so that all evaluations start
      from the same state: also parameters that no optimizer trains, such as those of a teacher that
      is an average of the student, and ``requires_grad`` (what a loss freezes is constant there).
    - :meth:`restore` is called once at the end: the values of parameters and buffers, gradients,
      train/eval flags, and whatever else has changed.

    The first evaluation of each kind compares all state; later ones restore what it has touched.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: Collection[int] = (),
        beside: Mapping[str, object] | None = None,
        also: Mapping[str, object] | None = None,
        recordings: Recordings | None = None,
        silent: Mapping[int, Any] | None = None,
    ) -> None:
        """
        Args:
            module: the module.
            trained: ids of the parameters that a measurement may change between evaluations.
            beside: objects of the Trainer that the module can reach through it, by name.
            also: what the loss reaches without the module, by name.
            recordings: what training has drawn from iterators; None: nothing is recorded.
            silent: what stands in for loggers, by their ids.
        """
        self._recordings = recordings
        graph = self._graph = Graph(recordings or Recordings(), silent or {})
        graph.walk({"self": module, **(also or {})})
        registered = {id(p): p for p in module.parameters()}
        parameters = registered | {i: p for i, (p, _) in graph.parameters.items()}
        tensors = dict(graph.tensors)
        # Frozen ones that the module does not know as its own, such as a teacher's in a list.
        hidden = [
            (p, found)
            for i, (p, found) in graph.parameters.items()
            if i not in registered and i not in trained and not p.requires_grad and is_plain(p)
        ]
        graph.walk(beside or {}, beside=True)

        # Those that are not registered keep their modes, as when Lightning validates.
        self._modes = [(m, m.training) for m in module.modules()]
        self._flags = [(p, p.requires_grad) for p in parameters.values()]
        plain = [p for p in parameters.values() if is_plain(p)]
        contents = [TensorContent(p) for p in plain]
        self._trained = [c for c in contents if id(c.value) in trained]
        self._snapshots: list[Snapshot] = [
            *graph.snapshots,
            *(c for c in contents if id(c.value) not in trained),
        ]
        owned = {storage_of(p) for p in plain} - {0}
        attributes = {id(d) for m in graph.modules for d in (m.__dict__, m._buffers)}
        self._tensors: list[tuple[Tensor, list[Place]]] = [*hidden]  # copied for evaluations
        for tensor, found in tensors.values():
            if storage_of(tensor) in owned:
                continue
            of_module = any(id(place.holder) in attributes for place in found)
            small = of_module or tensor.nbytes <= _LARGE_OUTSIDE
            self._snapshots.append(TensorContent(tensor) if small else TensorVersion(tensor))
            if small:
                self._tensors.append((tensor, found))
        for tensor, _ in [*graph.tensors.values(), *graph.parameters.values()]:
            known = id(tensor) in tensors or id(tensor) in parameters
            if not known and is_plain(tensor) and storage_of(tensor) not in owned:
                small = tensor.nbytes <= _LARGE_OF_TRAINER
                self._snapshots.append(TensorContent(tensor) if small else TensorVersion(tensor))

        leaves = [*parameters.values(), *(t for t, _ in self._tensors if t.requires_grad)]
        # A loss that writes to .grad does not change the gradients of the run.
        self._gradients = [(leaf, leaf.grad) for leaf in leaves if leaf.is_leaf]
        for leaf, _ in self._gradients:
            leaf.grad = None
        self._snapshots.append(NoGradients([leaf for leaf, _ in self._gradients]))
        self._touched: dict[Hashable, _Touched] = {}
        self._kind: Hashable = None
        self._replaced: list[tuple[list[Place], object, object]] = []
        self._copied: dict[int, Tensor] = {}
        self._made: list[tuple[StandIn, object]] = []

    def set_mode(self, training: bool | None) -> None:
        """Set all modules to train or eval mode; ``None``: their modes in training."""
        for module, own in self._modes:
            mode = own if training is None else training
            if module.training is not mode:
                module.training = mode

    # -- one evaluation --------------------------------------------------------------------------

    def begin_evaluation(self, index: int = 0, kind: Hashable = None) -> None:
        """Let copies and stand-ins take the places of what must not be touched.

        ``kind``: evaluations of one kind touch the same state; None: nothing is known about it.
        """
        self._kind = kind
        touched = self._touched.get(kind)
        tensors = self._tensors if touched is None else touched.tensors
        stand_ins = [*self._graph.stand_ins.values()] if touched is None else touched.stand_ins
        self._copied = copies_of(tensor for tensor, _ in tensors)
        self._made = [(stand_in, stand_in.make(index)) for stand_in in stand_ins]
        self._replaced = [(found, t, self._copied[id(t)]) for t, found in tensors]
        self._replaced += [(s.places, s.original, made) for s, made in self._made]
        made = {id(original): copy for _, original, copy in self._replaced}
        for value, found in self._graph.tuples.values():
            copy = self._graph.with_copies(value, made)
            if copy is not value:
                self._replaced.append((found, value, copy))
        for found, _, copy in self._replaced:
            for place in found:
                place.put(copy)

    def end_evaluation(self, complete: bool = True) -> None:
        """Restore the state.

        ``complete``: the evaluation did not fail, so that it touched all that its kind does.

        Raises:
            TrainingChangedError: the evaluation changed something that cannot be restored.
        """
        kind = self._kind
        touched = self._touched.get(kind)
        first = touched is None
        if touched is None:
            touched = self._find_touched()
        self._undo()
        self._restore_flags()
        snapshots = self._snapshots if first else touched.snapshots
        changed = [snapshot for snapshot in snapshots if snapshot.changed()]
        failed = [snapshot for snapshot in changed if not snapshot.restore()]
        if first and complete and kind is not None:
            touched.snapshots += changed
            self._touched[kind] = touched
        if failed:
            raise self._changed_by(failed)

    def _find_touched(self) -> _Touched:
        """What the evaluation has done to copies and stand-ins, and to where they were stored."""
        holders = {
            id(place.holder)
            for found, _, copy in self._replaced
            for place in found
            if _moved(place, copy)
        }
        tensors = [
            (t, found)
            for t, found in self._tensors
            if any(_moved(place, self._copied[id(t)]) for place in found)
            or not same_bits(t, self._copied[id(t)])
        ]
        stand_ins = [
            s
            for s, made in self._made
            if s.always or s.touched(made) or any(_moved(place, made) for place in s.places)
        ]
        rewritten = [s for s in self._snapshots if id(s.value) in holders]
        return _Touched(tensors, stand_ins, rewritten)

    def _undo(self) -> None:
        """Restore the originals of copies and stand-ins."""
        for found, original, _ in self._replaced:
            for place in found:
                place.put(original)
        self._replaced, self._copied, self._made = [], {}, []

    def _changed_by(self, failed: Sequence[Snapshot]) -> TrainingChangedError:
        paths = [self._graph.path(snapshot.value) for snapshot in failed]
        return TrainingChangedError(
            f"an evaluation of the loss changed {few(paths)}, which could not be restored, so "
            f"training goes on with the changed state. Pass loss_fn=lambda pl_module, batch: ..., "
            f"a loss that does not change it, or keep it in a buffer or an attribute of the module"
        )

    # -- the end of a measurement ----------------------------------------------------------------

    def restore(self) -> TrainingChangedError | None:
        """Restore everything, also what evaluations were not seen to touch.

        Gives an error instead of raising it if something cannot be restored.
        """
        try:
            failed = self._restore()
        except BaseException:  # e.g. Ctrl-C in the middle: restoring twice does no harm
            self._restore()
            raise
        if self._recordings is not None:
            _record(self._graph, self._recordings)
        error = self._changed_by(failed) if failed else None
        self._graph.release()
        return error

    def _restore(self) -> list[Snapshot]:
        self.set_mode(None)
        self._undo()
        every: list[Snapshot] = [*self._snapshots, *self._trained]
        changed = [snapshot for snapshot in every if snapshot.changed()]
        failed = [snapshot for snapshot in changed if not snapshot.restore()]
        self._restore_flags()
        for leaf, gradient in self._gradients:
            leaf.grad = gradient
        return failed

    def _restore_flags(self) -> None:
        for parameter, requires_grad in self._flags:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)


def _moved(place: Place, value: object) -> bool:
    """Whether another value was stored in a place of ``value``."""
    return place.kind not in UNWRITABLE and not place.holds(value)


def record_iterators(module: nn.Module, recordings: Recordings) -> None:
    """Record what training draws from the module's iterators, before the first measurement."""
    graph = Graph(recordings, {})
    graph.walk({"self": module})
    _record(graph, recordings)
    graph.release()


def _record(graph: Graph, recordings: Recordings) -> None:
    """Let recorders take the places of iterators."""
    made: dict[int, object] = {}
    for stand_in in graph.stand_ins.values():
        if isinstance(stand_in, Recorded):
            recorder = recordings.recorder(stand_in.original, stand_in.path())
            if recorder is not stand_in.original:
                made[id(stand_in.original)] = recorder
                recordings.install(stand_in.places, stand_in.original, recorder)
    for value, found in graph.tuples.values() if made else ():
        copy = graph.with_copies(value, made)
        if copy is not value:
            recordings.install(found, value, copy)
