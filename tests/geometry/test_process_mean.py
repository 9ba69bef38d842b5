"""A loss distributed over processes: one result, shared errors and engines."""

import pytest
import torch
from torch.nn import Parameter

from lightning_landscape.geometry.errors import OtherRankError
from lightning_landscape.geometry.objective import Objective
from tests.geometry.networks import mlp, without_double_backward
from tests.geometry.ranks import Ranks
from tests.oracles import F64, bits, close, flat, named, normal


@pytest.mark.parametrize("engine", ["double_backward", "finite_difference"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (F64, 1e-12)])
def test_two_processes_equal_one(engine, dtype, rtol):
    v = {n: normal(*p.shape, seed=3).to(dtype) for n, p in mlp().params.items()}

    def ask(objective):
        return {
            "loss": objective.loss(),
            "hvp": flat(objective.hvp(v)),
            "gradient": flat(objective.gradient()),
            "loss_at": objective.loss_at(v),
            "losses_at": objective.losses_at([v], [(0.1,), (0.2,)]),
            "gradient_at": flat(objective.gradient_at(v)),
        }

    def work(rank, reduce):
        problem = mlp(dtype)  # its own copy, as a process has
        objective = Objective([problem.half(rank)], problem.params, engine=engine, reduce=reduce)
        counts = (objective.forwards, objective.gradients, objective.hvps)
        return ask(objective), counts

    (first, work_first), (second, work_second) = Ranks().run(work)
    whole = mlp(dtype)
    alone = Objective(whole.loss, whole.params, engine=engine)
    expected = ask(alone)
    rounding = {"hvp": 1e-9 if dtype == F64 else 2e-3} if engine == "finite_difference" else {}
    for name, value in expected.items():
        close(first[name], value, rounding.get(name, rtol))
        assert torch.equal(first[name], second[name])
    assert work_first == work_second


CALLS = {
    "loss": lambda o, v: o.loss(),
    "gradient": lambda o, v: o.gradient(),
    "hvp": lambda o, v: o.hvp(v),
    "loss_at": lambda o, v: o.loss_at(v),
    "losses_at": lambda o, v: o.losses_at([v], [(0.1,), (0.2,)]),
    "gradient_at": lambda o, v: o.gradient_at(v),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("call", CALLS)
def test_error_in_one_process_raises_in_both(call, dtype):
    """Neither waits, or the barrier would time out.  Both can continue afterwards."""

    def work(rank, reduce):
        problem = mlp(dtype)
        size, half = problem.half(rank)
        broken = [False]

        def loss():
            if broken[0] and rank == 1:
                raise ArithmeticError("out of range")
            return half()

        objective = Objective([(size, loss)], problem.params, reduce=reduce)
        v = {name: torch.ones_like(p) for name, p in problem.params.items()}
        before = bits(problem.params)
        if call != "loss":
            objective.loss()
        broken[0] = True
        with pytest.raises(ArithmeticError if rank == 1 else OtherRankError) as caught:
            CALLS[call](objective, v)
        broken[0] = False
        assert bits(problem.params) == before
        objective.gradient()
        return str(caught.value)

    assert Ranks().run(work) == [
        "another process failed while computing its share",
        "out of range",
    ]


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_processes_change_engine_together(which):
    v = normal(83, seed=9)

    def work(rank, reduce):
        smooth, once = without_double_backward()
        problem = once if rank in which else smooth
        objective = Objective([problem.half(rank)], problem.params, reduce=reduce)
        product = objective.hvp(named(v, problem.params))
        return flat(product), objective.engine_used

    for product, engine in Ranks().run(work):
        assert engine == "finite_difference"
        close(product, mlp().hessian @ v, 1e-7)


def test_nondeterministic_loss_raises_in_both():
    """It is nondeterministic in only one of them."""

    def work(rank, reduce):
        w = Parameter(torch.ones(2))
        steps = iter(range(10))
        objective = Objective(
            lambda: w.sum() * (1.0 if rank == 0 else 1.0 + next(steps)), {"w": w}, reduce=reduce
        )
        with pytest.raises(ValueError, match="not deterministic"):
            objective.loss()
        return "refused"

    assert Ranks().run(work) == ["refused", "refused"]
