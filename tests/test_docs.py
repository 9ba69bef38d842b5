"""The pages in docs/ are true: their code runs, and nothing public is missing from them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml

import lightning_landscape
from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    Monitor,
    SharpnessEarlyStopping,
    SharpnessMonitor,
    geometry,
)
from lightning_landscape.compare.__main__ import main as compare_main
from lightning_landscape.measure.__main__ import main as measure_main
from lightning_landscape.report.__main__ import main as report_main
from tests.small import Linear, regression

pytestmark = pytest.mark.pictures  # all is done as it stands there

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text("utf-8") for path in DOCS.rglob("*.md")}
FENCED = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str = "python") -> list[re.Match[str]]:
    return [block for block in FENCED.finditer(PAGES[page]) if block[1] == language]


def run(page: str) -> dict[str, object]:
    """Run all python blocks of a page, in order; a traceback has the lines of the page."""
    names = {"model": Linear(), "train_loader": regression(), "val_loader": regression()}
    for block in blocks(page):
        before = PAGES[page].count("\n", 0, block.start(2))
        exec(compile("\n" * before + block[2], DOCS / page, "exec"), names)
    return names


OF_THEIR_OWN = {"tutorial.md", "limits.md", "extend.md", "which_ratio.md"}


@pytest.mark.parametrize("page", sorted(p for p in PAGES if blocks(p) and p not in OF_THEIR_OWN))
def test_code_of(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "from transformers import" in PAGES[page]:
        pytest.importorskip("transformers")
    run(page)


def test_tutorial(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("tutorial.md")
    assert len({row.pop("run") for row in names["rows"]}) == 1
    assert names["rows"] == names["monitor"].history
    ratios = {
        key: [row["hessian/edge_ratio"] for row in names[key].history]
        for key in ("monitor", "monitor_2", "monitor_3")
    }
    assert max(ratios["monitor"]) < 0.0025
    assert ratios["monitor_2"][0] < 0.05
    assert all(0.5 < ratio < 1.2 for ratio in ratios["monitor_2"][3:])
    assert max(ratios["monitor_3"]) > 2
    losses = {
        key: float(names[key].callback_metrics["val_loss"]) for key in ("trainer_2", "trainer_3")
    }
    assert losses["trainer_2"] == pytest.approx(0.4, abs=0.1)
    assert losses["trainer_3"] > losses["trainer_2"]
    assert names["stopper"].stopping_reason.startswith("hessian/edge_ratio = ")


def test_limits_shows_what_it_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("limits.md")
    (shown,) = blocks("limits.md", "text")
    rows = [line.rsplit(maxsplit=2) for line in shown[2].splitlines()]
    for column, measured in ((1, names["before"]), (2, names["after"])):
        found = {row[0]: float(row[column]) for row in rows}
        assert found == pytest.approx(measured, rel=1e-3, abs=1e-3)
    # The rescaled network is the same function.
    assert names["after"]["loss"] == pytest.approx(names["before"]["loss"], rel=1e-12)
    assert names["after"]["ASAM"] == pytest.approx(names["before"]["ASAM"], rel=1e-9)


def test_which_ratio(tmp_path, monkeypatch):
    """Its table, and that no ratio shows that twice the rate fails."""
    monkeypatch.chdir(tmp_path)
    results = run("which_ratio.md")["results"]
    for line in re.findall(r"^\| (0\.\d+) \| (.*) \|$", PAGES["which_ratio.md"], re.MULTILINE):
        shown = [float(number) for number in line[1].split(" | ")]
        assert results[float(line[0])] == pytest.approx(shown, rel=0.2, abs=0.02)
    slow, fast = results[0.05], results[0.1]
    assert max(slow[:2]) < 0.5
    assert max(fast[:2]) < 1
    assert fast[2] > 3 * slow[2]


# -- YAML and the command line ---------------------------------------------------------------------


OURS = (Monitor, SharpnessEarlyStopping)


class Digits(pl.LightningDataModule):
    def train_dataloader(self):
        return regression()


def fit_from(arguments, monkeypatch, tmp_path):
    """Run ``train.py`` of the page with these arguments; returns the callbacks of its Trainer."""
    fitted = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pl.Trainer, "fit", spy(pl.Trainer.fit, fitted))
    monkeypatch.setattr("sys.argv", ["train.py", *arguments, "--trainer.accelerator=cpu"])
    names = {"Classifier": Linear, "Digits": Digits}
    exec(blocks("yaml.md")[0][2], names)
    names["main"]()
    (trainer,) = fitted
    assert trainer.state.finished
    return [c for c in trainer.callbacks if isinstance(c, OURS)]


def spy(fit, fitted):
    def fit_and_note(trainer, *args, **kwargs):
        fitted.append(trainer)
        return fit(trainer, *args, **kwargs)

    return fit_and_note


@pytest.mark.parametrize("block", blocks("yaml.md", "yaml"), ids=lambda block: str(block.start()))
def test_yaml_block(block, monkeypatch, tmp_path):
    content = yaml.safe_load(block[2])
    (tmp_path / "file.yaml").write_text(block[2])
    if isinstance(content, list):
        entries = content
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("LIGHTNING_LANDSCAPE", "file.yaml")
        trainer = pl.Trainer(max_epochs=2, accelerator="cpu")
        trainer.fit(Linear(), regression())
        made = [c for c in trainer.callbacks if isinstance(c, OURS)]
    else:
        entries = content["trainer"]["callbacks"]
        (functions,) = [b[2] for b in blocks("yaml.md") if "def probe" in b[2]]
        data = "from tests.small import regression\ntrain_data = regression().dataset\n"
        (tmp_path / "my_project.py").write_text(data + functions)
        monkeypatch.syspath_prepend(tmp_path)
        length = [] if "max_epochs" in content["trainer"] else ["--trainer.max_epochs=2"]
        made = fit_from(["fit", "--config", "file.yaml", *length], monkeypatch, tmp_path)
    named = {entry["class_path"].rpartition(".")[2] for entry in entries}
    if "landscape_callbacks" in named:
        named = {"HessianMonitor", "SharpnessMonitor"}
    assert {type(callback).__name__ for callback in made} == named - {"LearningRateMonitor"}
    assert made[0].history


def test_fit_on_the_command_line(monkeypatch, tmp_path):
    texts = [b[2].replace("\\\n", " ") for b in blocks("yaml.md", "text")]
    (line,) = [text for text in texts if "callbacks+=" in text]
    _, _, *arguments = line.split()
    (monitor,) = fit_from([*arguments, "--trainer.max_epochs=2"], monkeypatch, tmp_path)
    assert (monitor.every_n_train_steps, monitor.max_overhead) == (50, None)


@pytest.mark.parametrize("main", [measure_main, compare_main, report_main])
def test_options_of_commands(main, capsys):
    """Each option that the page lists exists, and the page lists each."""
    package = main.__module__.removesuffix(".__main__")
    page = PAGES["yaml.md"]
    section = page[page.index(f"python -m {package}") :].partition("\n### ")[0]
    with pytest.raises(SystemExit):
        main(["--help"])
    offered = set(re.findall(r"(--\w[\w-]+)", capsys.readouterr().out)) - {"--help"}
    named = set(re.findall(r"(--\w[\w-]+)", section))
    assert named - offered == set()
    assert {option for option in offered if option != "--output"} <= named


def test_own_quantity(tmp_path, monkeypatch):
    """That of the page in closed form: linear regression has H = 2 X'X / N, g = H w - 2 X'y / N."""
    monkeypatch.chdir(tmp_path)
    assert blocks("extend.md")[0][2].count("\n") <= 20
    share = run("extend.md")["GradientShare"](max_overhead=None, probe=regression())
    module = Linear()
    pl.Trainer(max_steps=1, callbacks=[share], logger=False, enable_checkpointing=False).fit(
        module, regression()
    )
    x, y = (tensor.double() for tensor in regression().dataset.tensors)
    hessian = 2 * x.T @ x / len(x)
    gradient = hessian @ module.layer.weight[0].detach().double() - 2 * x.T @ y[:, 0] / len(x)
    along = torch.linalg.eigh(hessian).eigenvectors[:, -1] @ gradient
    expected = float(along**2 / gradient.square().sum())
    assert 0.1 < expected < 0.999
    (row,) = share.history
    assert row["subspace/gradient_share"] == pytest.approx(expected, rel=1e-3)


def test_gauss_newton_of_a_linear_model_is_its_hessian(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monitor = run("extend.md")["GaussNewton"](max_overhead=None, every_n_train_steps=1)
    for batches in (regression(), regression(50, 20)):  # as one batch, and of unlike sizes
        monitor = type(monitor)(max_overhead=None, every_n_train_steps=1, probe=batches)
        pl.Trainer(max_steps=2, callbacks=[monitor], logger=False, enable_checkpointing=False).fit(
            Linear(), regression()
        )
        x = batches.dataset.tensors[0].double()
        expected = float(torch.linalg.eigvalsh(2 * x.T @ x / len(x))[-1])
        values = [row["gauss_newton/top_eigenvalue"] for row in monitor.history]
        assert values == pytest.approx([expected] * 2, rel=1e-4)


def test_a_quantity_without_a_kind_is_refused():
    class Nameless(Monitor):
        tags = ("value",)

    with pytest.raises(TypeError, match="class Nameless: expected an attribute kind"):
        Nameless()


def test_everything_public_is_in_the_reference():
    described = {
        name
        for text in PAGES.values()
        for name in re.findall(
            r"^\.\. auto(?:class|function):: (\w+)(?:\(.*\))?$", text, re.MULTILINE
        )
    }
    public = {*lightning_landscape.__all__, *geometry.__all__}
    assert described == public | {"Comparison", "Measurement"}
    assert ".. automodule:: lightning_landscape.figures\n" in PAGES["reference/figures.md"]


@pytest.mark.parametrize(
    ("page", "callback"),
    [
        (
            "hessian",
            HessianMonitor(
                min_eigenvalue=True, trace_samples=2, batch_edge_ratio=True, update_curvature=True
            ),
        ),
        (
            "sharpness",
            SharpnessMonitor(worst_case=True, average=True, keskar=True, critical=True),
        ),
        ("landscape", LandscapeMonitor()),
        ("interpolation", InterpolationMonitor()),
        ("generalization", GeneralizationMonitor()),
    ],
)
def test_every_key_is_on_the_page_of_its_callback(page, callback):
    for key in callback.keys:
        assert f"`{key}`" in PAGES[f"callbacks/{page}.md"]


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {target for text in PAGES.values() for target in re.findall(r"`make (\w+)`", text)}
    uses = re.search(r"^USES = (.*)$", makefile, re.MULTILINE)[1].split()
    for target in named - set(uses):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in {p for text in PAGES.values() for p in re.findall(r"`(examples/\w+\.py)`", text)}:
        assert (ROOT / path).is_file()
