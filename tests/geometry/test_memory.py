"""Bounded memory of graphs: how many exist at once, handling of a full memory, and messages.

The dense Hessian of the network is known, so that wrong results under a bound are detected.
"""

import itertools
import subprocess
import sys
import textwrap
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter

from lightning_landscape.geometry import batches, memory
from lightning_landscape.geometry.errors import OtherRankError
from lightning_landscape.geometry.memory import GraphMemory, counting_saved, free_memory
from lightning_landscape.geometry.objective import Objective
from tests.geometry.networks import mlp
from tests.geometry.ranks import Ranks
from tests.oracles import F64, close, flat, named, normal

EXAMPLES = 8
FULL = torch.OutOfMemoryError("CUDA out of memory (simulated)")
FULL_CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")


class Saved:
    """What a graph saves for one tensor; alive as long as the graph."""

    def __init__(self, tensor):
        self.tensor = tensor


class Watched:
    """A network's loss in batches; counts the examples whose graphs are alive at once.

    A graph that would exceed ``room`` examples raises ``error``.
    """

    def __init__(self, sizes, room=float("inf"), error=FULL, loss=F.cross_entropy):
        self.problem = mlp()
        self.problem.x, self.problem.y = self.problem.x[:EXAMPLES], self.problem.y[:EXAMPLES]
        self.room, self.error, self.loss = room, error, loss
        self.built = Counter()  # rows of a batch -> its graphs
        self.forwards = Counter()
        self.peak = 0
        self._alive = {}
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.parts = [slice(a, a + n) for a, n in zip(starts, sizes, strict=True)]

    def alive(self):
        return sum(rows for rows, saved in self._alive.values() if len(saved))

    def term(self, part):
        rows = part.stop - part.start
        name = (part.start, part.stop)

        def loss():
            x, y = self.problem.x[part], self.problem.y[part]
            if not torch.is_grad_enabled():
                self.forwards[name] += 1
                return self.loss(self.problem.module(x), y)
            if self.alive() + rows > self.room:
                raise self.error
            self.built[name] += 1
            saved = weakref.WeakSet()
            self._alive[len(self._alive)] = rows, saved

            def pack(tensor):
                token = Saved(tensor.detach())
                saved.add(token)
                self.peak = max(self.peak, self.alive())
                return token

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda token: token.tensor):
                return self.loss(self.problem.module(x), y)

        return float(rows), loss

    def cut(self, index, most):
        start, stop = self.parts[index].start, self.parts[index].stop
        edges = [*range(start, stop, most), stop]
        return [self.term(slice(a, b)) for a, b in itertools.pairwise(edges)]

    def objective(self, limit=None, cut=False, messages=None, **options):
        messages = [] if messages is None else messages
        return Objective(
            [self.term(part) for part in self.parts],
            self.problem.params,
            check_deterministic=False,
            memory=GraphMemory(limit, tell=messages.append),
            cut=self.cut if cut else None,
            **options,
        )

    def check(self, objective, products=3):
        """Compare products, gradient and loss with the exact ones."""
        exact, whole = self.problem.hessian, self.problem
        for seed in range(products):
            v = normal(83, seed=seed)
            close(objective.hvp(self.named(v)), exact @ v, 1e-10)
        gradient = torch.autograd.grad(whole.loss(), list(whole.params.values()))
        close(objective.gradient(), torch.cat([g.reshape(-1) for g in gradient]), 1e-10)
        close(objective.loss(), whole.loss().detach(), 1e-10)

    def named(self, v):
        return named(v, self.problem.params)


@pytest.fixture
def unknown(monkeypatch):
    """The amount of free memory is unknown."""
    monkeypatch.setattr(batches, "free_memory", lambda device: None)


# -- retained graphs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, 0), (2, 1), (4, 3), (7, 6), (8, 8), (None, 0)], ids=str
)
def test_graphs_cover_at_most_the_examples_allowed(limit, kept, unknown):
    watched = Watched([1] * EXAMPLES)
    objective = watched.objective(limit)
    watched.check(objective, products=1)
    watched.built.clear()
    watched.peak = 0
    watched.check(objective, products=3)
    assert watched.peak == max(limit or 1, 1) if kept < EXAMPLES else watched.built.total() == 0
    rebuilt = [(i, i + 1) for i in range(kept, EXAMPLES)]
    assert watched.built == Counter(3 * rebuilt)
    assert objective.gradients == (1 if kept == EXAMPLES else 4)
    objective.release()
    assert watched.alive() == 0


def test_graph_of_a_single_batch_is_retained(unknown):
    """It exists during each product anyway."""
    watched = Watched([EXAMPLES])
    watched.check(watched.objective(2))
    assert sum(watched.built.values()) <= 2  # one to count its bytes
    alone = Watched([EXAMPLES])
    alone.check(alone.objective())
    assert alone.built.total() == 1


@pytest.mark.parametrize(("spare", "kept"), [(1.01, True), (0.99, False)])
def test_more_graphs_are_retained_only_if_memory_is_known(spare, kept, monkeypatch):
    """At most half of what is free; the bytes of a graph are counted, not guessed."""
    watched = Watched([2] * 4)
    weight, fn = watched.term(watched.parts[0])
    with counting_saved(watched.problem.params.values()) as saved:
        params = list(watched.problem.params.values())
        loss = F.cross_entropy(watched.problem.module(watched.problem.x[:2]), watched.problem.y[:2])
        graph = torch.autograd.grad(loss, params, create_graph=True)
        needed = saved() / weight * EXAMPLES + 4 * 8 * 83  # four gradients at the end of graphs
    del graph, loss, fn
    monkeypatch.setattr(batches, "free_memory", lambda device: int(2 * needed * spare))
    plain = Watched([2] * 4)  # its own hooks would hide saved tensors from the count
    plain_terms = [
        (
            2.0,
            lambda p=p: F.cross_entropy(
                plain.problem.module(plain.problem.x[p]), plain.problem.y[p]
            ),
        )
        for p in plain.parts
    ]
    objective = Objective(plain_terms, plain.problem.params, memory=GraphMemory(2))
    plain.check(objective)
    assert objective.gradients == (1 if kept else 3)


@pytest.mark.parametrize(("free", "kept"), [(2**24 + 2**16, 32), (2**22 + 2**16, 7), (2**17, 0)])
def test_gradients_of_retained_graphs_are_counted(free, kept, monkeypatch):
    """With single examples they are most of it: 2^16 weights, of which a loss saves next to none.

    A quarter megabyte each: of four megabytes half may be used, by seven graphs and one in work.
    """
    monkeypatch.setattr(batches, "free_memory", lambda device: free)
    w, v = (Parameter(torch.ones(2**15)) for _ in range(2))
    built = Counter()

    def term(index):
        def loss():
            built[index] += torch.is_grad_enabled()
            return (w[:8].sum() * v[:8].sum()) ** 2

        return 1.0, loss

    terms = [term(i) for i in range(32)]
    objective = Objective(terms, {"w": w, "v": v}, check_deterministic=False, memory=GraphMemory(1))
    direction = {"w": torch.ones(2**15), "v": torch.zeros(2**15)}
    first = objective.hvp(direction)
    built.clear()
    again = objective.hvp(direction)
    assert 32 - len(built) == kept
    # (W V)^2 with W, V the sums, 8 each: along w 2 V^2 8, across 4 W V 8.
    assert torch.equal(again["w"][:9], torch.tensor([1024.0] * 8 + [0.0]))
    assert torch.equal(again["v"][:9], torch.tensor([2048.0] * 8 + [0.0]))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_bytes_of_a_graph_are_counted_once_per_run(monkeypatch):
    asked = []
    monkeypatch.setattr(batches, "free_memory", lambda device: asked.append(1) or 10**12)
    watched = Watched([2] * 4)
    shared = GraphMemory(2)
    for _ in range(3):
        objective = Objective(
            [watched.term(p) for p in watched.parts],
            watched.problem.params,
            check_deterministic=False,
            memory=shared,
        )
        objective.hvp(watched.named(normal(83)))
        del objective
    assert watched.built == {(0, 2): 4, (2, 4): 3, (4, 6): 3, (6, 8): 3}
    assert len(asked) == 3  # how much is free may have changed


# -- splitting ------------------------------------------------------------------------------------


def test_batch_that_does_not_fit_is_split(unknown):
    messages = []
    watched = Watched([EXAMPLES])
    objective = watched.objective(2, cut=True, messages=messages)
    watched.check(objective)
    assert watched.peak == 2
    assert watched.forwards[0, 8] == 2  # its loss was compared with that of the pieces, twice
    assert watched.built[0, 8] == 0
    assert "in pieces" in messages[0]
    assert len(messages) == 1


def test_batch_that_fits_is_not_split(monkeypatch):
    monkeypatch.setattr(batches, "free_memory", lambda device: 10**12)
    watched = Watched([EXAMPLES])
    watched.check(watched.objective(2, cut=True))
    assert watched.built == {(0, 2): 1, (0, 8): 1}  # the first to count its bytes


def of_the_batch(outputs, targets):
    """Like BatchNorm or a contrastive loss: not a mean over examples."""
    return F.cross_entropy(outputs - outputs.mean(0), targets)


def test_batch_is_not_split_if_its_pieces_are_another_loss(unknown):
    messages = []
    watched = Watched([EXAMPLES], loss=of_the_batch)
    objective = watched.objective(2, cut=True, messages=messages)
    for _ in range(2):
        product = objective.hvp(watched.named(normal(83)))
    whole = Watched([EXAMPLES], loss=of_the_batch)
    assert torch.equal(flat(product), flat(whole.objective().hvp(whole.named(normal(83)))))
    assert watched.built[0, 8] == 2  # again after the comparison, which changes the weights
    assert watched.forwards[0, 8] == 2
    assert len(messages) == 1
    assert "not split: the pieces give losses of" in messages[0]


def test_loss_that_does_not_accept_pieces(unknown):
    messages = []

    def picky(outputs, targets):
        if len(targets) != EXAMPLES:
            raise ValueError("expected 8 rows")
        return F.cross_entropy(outputs, targets)

    watched = Watched([EXAMPLES], loss=picky)
    watched.check(watched.objective(2, cut=True, messages=messages))
    assert [("not be measured" in text, "not split" in text) for text in messages] == [
        (True, False),
        (False, True),
    ]


def test_batches_evaluated_alone_are_the_given_ones(unknown):
    """Also if they are evaluated in pieces."""
    watched = Watched([4, 4])
    objective = watched.objective(2, cut=True)
    watched.check(objective)
    losses = []
    objective.batch_mean(lambda batch: losses.append(float(batch.loss())) or 0.0)
    assert losses == pytest.approx(
        [
            float(
                F.cross_entropy(watched.problem.module(watched.problem.x[p]), watched.problem.y[p])
            )
            for p in watched.parts
        ]
    )


# -- a full memory --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [FULL, FULL_CPU, MemoryError("no")], ids=["cuda", "cpu", "python"]
)
@pytest.mark.parametrize(
    ("sizes", "cut", "room"),
    [([1] * EXAMPLES, False, 1), ([1] * EXAMPLES, False, 5), ([8], True, 3), ([5, 3], True, 1)],
    ids=str,
)
def test_out_of_memory_reduces_the_graphs(sizes, cut, room, error, monkeypatch):
    monkeypatch.setattr(batches, "free_memory", lambda device: 10**12)  # and that was wrong
    watched = Watched(sizes, room, error)
    objective = watched.objective(max(sizes), cut)
    watched.check(objective)
    assert 0 < watched.peak <= room


def test_failed_sizes_are_not_tried_again_in_a_run(monkeypatch):
    monkeypatch.setattr(batches, "free_memory", lambda device: 10**12)
    watched = Watched([1] * EXAMPLES, room=3)
    shared, refused = GraphMemory(), []
    for _ in range(2):
        objective = Objective(
            [watched.term(p) for p in watched.parts],
            watched.problem.params,
            check_deterministic=False,
            memory=shared,
        )
        watched.built.clear()
        objective.hvp(watched.named(normal(83)))
        refused.append(watched.built.total() - EXAMPLES)
        del objective
    assert refused[0] > 0
    assert refused[1] == 0


def test_objectives_of_a_run_share_the_limit(monkeypatch):
    """After a reduction for a single batch the whole objective tries that limit first."""
    monkeypatch.setattr(batches, "free_memory", lambda device: 10**12)
    watched = Watched([4, 4])
    objective = watched.objective(cut=True)
    watched.check(objective)
    watched.room = 1
    v = watched.named(normal(83))
    objective.batch_mean(lambda batch: float(flat(batch.hvp(v)).sum()))
    watched.built.clear()
    watched.check(objective)
    assert watched.peak == 8  # from before
    assert max(stop - start for start, stop in watched.built) == 1


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("call", ["gradient", "hvp"])
def test_error_is_raised_if_the_smallest_graph_does_not_fit(call, cut, unknown):
    watched = Watched([EXAMPLES], room=0)
    objective = watched.objective(cut=cut)
    before = flat(watched.problem.params).clone()
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="simulated"):
            objective.gradient() if call == "gradient" else objective.hvp(watched.named(normal(83)))
    assert torch.equal(before, flat(watched.problem.params))
    assert watched.alive() == 0
    assert objective.engine_used == "double_backward"
    watched.room = EXAMPLES
    watched.check(objective)


def test_graph_is_dropped_if_memory_is_needed(monkeypatch):
    """A product retains a graph; if the next evaluation does not fit, the graph is dropped."""
    watched = Watched([4, 4])
    objective = watched.objective()
    objective.hvp(watched.named(normal(83)))
    assert watched.alive() == 8
    watched.room = 4
    displaced = objective.gradient_at({})  # drops it in any case, to move the weights
    objective.hvp(watched.named(normal(83)))
    assert watched.alive() <= 4
    watched.check(objective)
    close(displaced, flat(objective.gradient()), 1e-10)


def test_processes_reduce_their_graphs_together(unknown):
    """Only one of them runs out of memory."""

    def work(rank, reduce):
        watched = Watched([4, 4], room=4 if rank == 1 else 100)
        objective = watched.objective(8, reduce=reduce)
        watched.check(objective)
        return watched.built.total(), objective.gradients

    (first, second) = Ranks().run(work)
    # One try with both graphs, one with one at a time; then two products that rebuild them.
    assert first == (2 + 3 * 2, 4)
    assert second == (1 + 3 * 2, 4)


def test_processes_raise_together(unknown):
    def work(rank, reduce):
        watched = Watched([4, 4], room=0 if rank == 1 else 100)
        objective = watched.objective(8, reduce=reduce)
        expected = torch.OutOfMemoryError if rank == 1 else OtherRankError
        with pytest.raises(expected):
            objective.hvp(watched.named(normal(83)))
        watched.room = 100
        watched.check(objective)
        return "continued"

    assert Ranks().run(work) == ["continued", "continued"]


def test_failed_graph_is_freed_before_the_next_attempt(unknown):
    """The frames of the error keep the graph that was too large alive."""
    watched = Watched([EXAMPLES])
    left = []

    def term(part):
        rows, inner = watched.term(part)

        def loss():
            if not torch.is_grad_enabled():
                left.append(watched.alive())
            value = inner()
            if torch.is_grad_enabled() and rows > 4:
                raise FULL
            return value

        return rows, loss

    objective = Objective(
        [term(slice(0, 8))],
        watched.problem.params,
        check_deterministic=False,
        memory=GraphMemory(tell=str),
        cut=lambda _, most: [term(slice(i, i + most)) for i in range(0, 8, most)],
    )
    watched.check(objective)
    assert left == [0] * 6  # the whole and two pieces, to be compared at two points


def test_graph_of_a_batch_that_cannot_be_split_is_rebuilt_per_product(unknown):
    """The last resort: a graph that is freed during the product takes less memory."""
    watched = Watched([EXAMPLES])
    objective = watched.objective()
    v, exact = watched.named(normal(83)), watched.problem.hessian @ normal(83)
    objective.hvp(v)
    assert watched.alive() == EXAMPLES
    watched.room = 0
    objective.release()
    with pytest.raises(torch.OutOfMemoryError):
        objective.hvp(v)
    watched.room = EXAMPLES
    for _ in range(2):
        close(objective.hvp(v), exact, 1e-10)
        assert watched.alive() == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory")
def test_real_out_of_memory():
    """Address space for the graph of one example, not of four: torch raises the error itself."""
    program = """
        import resource, torch
        from lightning_landscape import Objective
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.ones(300, dtype=torch.float64))
        x = torch.rand(4, 20_000, 300, dtype=torch.float64)
        def term(rows):
            return len(rows), lambda: torch.tanh(rows * w).sum((1, 2)).mean()
        def cut(index, most):
            return [term(x[i : i + most]) for i in range(0, 4, most)]
        v = {"w": torch.ones_like(w)}
        free = Objective([term(x)], {"w": w}, check_deterministic=False).hvp(v)["w"]
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 700 * 10**6,) * 2)
        try:
            Objective([term(x)], {"w": w}, check_deterministic=False).hvp(v)
        except RuntimeError as error:
            print("full:", "can't allocate memory" in str(error))
        tight = Objective([term(x)], {"w": w}, check_deterministic=False, cut=cut).hvp(v)["w"]
        print("same:", torch.allclose(free, tight, rtol=1e-10))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["full:", "True", "same:", "True"], done.stderr[-2000:]


# -- counted bytes and free memory ----------------------------------------------------------------


def test_bytes_saved_in_closed_form():
    """A storage counts once however often it is saved, and parameters do not count."""
    w = Parameter(torch.ones(1000, dtype=F64))
    c = torch.full((1000,), 2.0, dtype=F64)
    with counting_saved([w]) as saved:
        product = w * c  # saves c
        loss = product.square().sum() + (product[10:] * product[:-10]).sum()  # product, views of it
        assert saved() == 8 * (1000 + 1000)
        (w * w).sum()  # the parameter only
        assert saved() == 8 * (1000 + 1000)
    loss.backward()
    assert torch.equal(w.grad[10:-10], torch.full((980,), 16.0, dtype=F64))


def test_free_memory_of_the_host(monkeypatch, tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (groups / "slice" / "job").mkdir(parents=True)
    monkeypatch.setattr(memory, "_PROC", proc)
    monkeypatch.setattr(memory, "_CGROUPS", groups)
    cpu = torch.device("cpu")
    assert free_memory(cpu) is None
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    1000 kB\nHugePages: 0\n")
    assert free_memory(cpu) == 1000 * 1024
    (proc / "self" / "cgroup").write_text("0::/slice/job\n")
    assert free_memory(cpu) == 1000 * 1024
    own = groups / "slice" / "job"
    (own / "memory.max").write_text("max\n")
    (own / "memory.current").write_text("5\n")
    assert free_memory(cpu) == 1000 * 1024
    (groups / "slice" / "memory.max").write_text("500000\n")
    (groups / "slice" / "memory.current").write_text("200000\n")
    assert free_memory(cpu) == 300_000
    (groups / "slice" / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert free_memory(cpu) == 350_000
    (own / "memory.max").write_text("4")
    assert free_memory(cpu) == 0


def test_free_memory_of_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_memory(torch.device("cuda")) == 130
    assert free_memory(torch.device("mps")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/meminfo of Linux")
def test_free_memory_here():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples": 0}, "examples=0: expected a number > 0"),
        ({"share": 0.0}, r"share=0\.0: expected a number above 0"),
        ({"share": 1.5}, r"share=1\.5"),
    ],
)
def test_invalid_arguments_of_graph_memory(arguments, message):
    with pytest.raises(ValueError, match=message):
        GraphMemory(**arguments)
