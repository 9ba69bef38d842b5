"""What the module's state is put back from; most of it is held by the tests of isolation."""

from __future__ import annotations

from torch import nn

from lightning_landscape.training.isolation.module_state import ModuleState


class Vocabulary(dict):
    """Notes each time it is emptied."""

    emptied = 0

    def clear(self):
        self.emptied += 1
        super().clear()


def test_a_dict_is_written_to_only_where_it_changed():
    module = nn.Linear(2, 2)
    module.words = Vocabulary(a=1, b=2)
    state = ModuleState(module)
    state.begin_evaluation()
    state.end_evaluation()
    assert module.words.emptied == 0
    state.begin_evaluation()
    module.words["a"], module.words["c"] = 5, 3
    state.end_evaluation()
    assert module.words.emptied == 1
    assert module.words == {"a": 1, "b": 2}
    state.begin_evaluation()
    del module.words["a"]
    module.words["a"] = 1  # the same content in another order
    state.end_evaluation()
    assert list(module.words) == ["a", "b"]
