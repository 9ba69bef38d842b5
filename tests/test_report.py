"""The HTML report: its content, that it is self-contained, and that it escapes all input."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_landscape import HessianMonitor, LandscapeMonitor, Slice
from lightning_landscape.figures import LossLimits
from lightning_landscape.figures.labels import number
from lightning_landscape.geometry import Objective, spectral_density
from lightning_landscape.report import write_at_end, write_report
from lightning_landscape.report.charts import Curve, chart, thinned
from lightning_landscape.report.surface import surface_view
from lightning_landscape.training.closing import judgement
from tests.browser import chromium
from tests.runs import train
from tests.small import Linear, regression

NASTY = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.source = [], path.read_text(encoding="utf-8")
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag, **wanted):
        found = [attrs for name, attrs in self.tags if name == tag]
        return [a for a in found if all(a.get(key) == value for key, value in wanted.items())]

    @property
    def sections(self):
        return [attrs["id"] for attrs in self.all("section")]

    @property
    def films(self):
        return [attrs["data-kind"] for attrs in self.all("figure", **{"class": "film"})]


def slice_at(step, size=5, kind="line", **metadata):
    x = np.linspace(-1, 1, size)
    losses = x**2 if kind == "line" else x[:, None] ** 2 + x**2
    axes = (x,) if kind == "line" else (x, x)
    return Slice(axes, losses + step, float(step), {"step": step, **metadata})


def write(folder, rows=(), **pieces):
    """A log directory: rows of the history, and ``landscape_line_1_step00000003=slice``."""
    (folder / "landscape").mkdir(parents=True, exist_ok=True)
    if rows:
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / "history.jsonl").write_text("".join(lines))
    for name, piece in pieces.items():
        piece.save(folder / "landscape" / f"{name.replace('_', '-')}.npz")
    return folder


def hessian(step, value=1.0, **more):
    values = {"hessian/top_eigenvalue": value, "hessian/edge": 10.0, "hessian/edge_ratio": 0.95}
    return {"step": step, "monitor": "hessian", **values, "probe_samples": 9, **more}


def sentence(page):
    """The first paragraph after the title and the directory."""
    return html.unescape(re.findall("<p[^>]*>(.*?)</p>", page.source)[1])


def cards(page):
    """Key, value and step of each card."""
    pattern = r'<dd>([^<]*)</dd><dd class="count">([^<]*)<br>([^<]*)</dd>'
    return [(key, value, step) for value, key, step in re.findall(pattern, page.source)]


def ratios(values, first=10, every=10, **more):
    """Rows with these edge ratios."""
    return [
        hessian(first + every * index, **{"hessian/edge_ratio": value}, **more)
        for index, value in enumerate(values)
    ]


@pytest.mark.parametrize("kind", ["tensorboard", "csv", "none"])
def test_report_of_a_run(tmp_path, kind):
    logger = {
        "tensorboard": lambda: TensorBoardLogger(tmp_path),
        "csv": lambda: CSVLogger(tmp_path),
        "none": lambda: False,
    }[kind]()
    callbacks = [
        HessianMonitor(every_n_train_steps=3, max_overhead=None, density_samples=2),
        LandscapeMonitor(every_n_train_steps=3, max_overhead=None, resolution=3, name="a"),
    ]
    train(Linear, regression, callbacks, tmp_path, logger=logger, max_epochs=4)
    path = write_report(tmp_path)
    assert path.name == "report.html"
    assert (path.parent / "history.jsonl").exists()
    page = Page(path)
    assert page.sections == ["summary", "charts", "pictures", "settings"]
    assert page.films == ["hessian-density", "landscape-a-line", "landscape-a-plane"]
    for key in ("hessian/top_eigenvalue", "hessian/edge", "hessian/edge_ratio", "hessian/hvps"):
        assert key in page.text
    assert "hessian 4 times, landscape/a 4 times" in page.text
    assert "double_backward" in page.text
    ratio = callbacks[0].history[-1]["hessian/edge_ratio"]
    assert cards(page)[0] == ("hessian/edge_ratio", number(ratio, 4), "step 12")
    assert judgement([callbacks[0]])[len("hessian/edge_ratio") :] in sentence(page)
    # Every image can be opened, is not blank, and differs from the previous one.
    pictures = [attrs["src"] for attrs in page.all("img")]
    assert len(pictures) == 3 * (4 + 1)
    for source in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("L")
        assert np.asarray(image).std() > 5
    assert len(set(pictures)) == 3 * 4
    assert all("alt" in attrs for attrs in page.all("img"))


def test_without_pictures(tmp_path):
    """At the end of a fit without time for pictures."""
    write(
        tmp_path, [{"step": 3, "a/b": 1.0}], landscape_plane_step00000003=slice_at(3, kind="plane")
    )
    page = Page(write_at_end(tmp_path, pictures=False))
    assert page.films == []
    assert "there was no time for pictures" in page.text
    assert "a/b" in page.source
    assert "pictures" not in page.sections
    assert Page(write_at_end(tmp_path, pictures=True)).films == ["landscape-plane"]
    assert "there was no time" not in Page(tmp_path / "report.html").text


def test_page_loads_nothing_from_outside(tmp_path):
    page = Page(write_report(write(tmp_path, [hessian(1)], landscape_plane_step1=plane(1))))
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy["content"]
    assert "unsafe" not in policy["content"]
    addresses = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href")]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "http" not in re.sub(r"data:[^\"]*|http-equiv", "", page.source)
    assert not page.all("style")[0]  # no attributes, in particular no style= elsewhere
    assert not [attrs for _, attrs in page.tags if "style" in attrs]


def plane(step, **metadata):
    return slice_at(step, kind="plane", **metadata)


@pytest.mark.parametrize("where", ["monitor", "key", "fact", "metadata", "folder", "file"])
def test_everything_is_escaped(tmp_path, where):
    folder = tmp_path / (NASTY.replace("/", "") if where == "folder" else "run")
    name = NASTY.replace("/", "") if where == "file" else "landscape-line-1"
    row = hessian(1)
    if where == "monitor":
        row = {"step": 1, "monitor": NASTY, f"{NASTY}/x": 1.0, "fact": 2}
    elif where == "key":
        row[f"hessian/{NASTY}"], row[f"hessian/{NASTY}/edge_ratio"] = 1.0, 1.0
    elif where == "fact":
        row[NASTY], row["engine_note"], row["many"] = NASTY, NASTY, [NASTY, 3]
    known = {"directions": [NASTY], NASTY: NASTY} if where == "metadata" else {}
    write(folder, [row])
    slice_at(1, **known).save(folder / "landscape" / f"{name}-step00000001.npz")
    (folder / "landscape" / f"{name}-step00000002.npz").write_bytes(b"torn")
    (folder / "landscape" / f"{name}.npz").write_bytes(b"")
    page = Page(write_report(folder))
    assert len(page.all("script")) == 1
    assert "alert(1)" in page.text
    assert "<script>alert" not in page.source


@pytest.mark.parametrize("file", ["history.jsonl", "landscape"])
def test_partial_data(tmp_path, file):
    if file == "history.jsonl":
        page = Page(write_report(write(tmp_path, [hessian(1), hessian(2)])))
        assert page.sections == ["summary", "charts", "settings"]
    else:
        page = Page(write_report(write(tmp_path, landscape_line_1_step3=slice_at(3, seed=5))))
        assert page.sections == ["summary", "pictures", "settings"]
        assert "there is no history.jsonl" in page.text


def test_damaged_files_are_named(tmp_path):
    write(tmp_path, [hessian(1)], landscape_plane_step1=plane(1), landscape_plane_step2=plane(2))
    torn = tmp_path / "landscape" / "landscape-plane-step2.npz"
    torn.write_bytes(torn.read_bytes()[:100])
    (tmp_path / "landscape" / "landscape-plane-step3.npz").write_bytes(b"")
    np.savez(tmp_path / "landscape" / "other-step4.npz", a=np.ones(3))
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 2, "hessian')
    page = Page(write_report(tmp_path))
    for name in ("landscape-plane-step2", "landscape-plane-step3", "other-step4"):
        assert f"{name}.npz cannot be read" in page.text
    assert page.films == ["landscape-plane"]
    assert len(page.all("img")) == 2


def test_slice_that_cannot_be_drawn(tmp_path):
    backwards = Slice((np.array([1.0, 0.0]),), np.ones(2), 1.0, {"step": 1})
    page = Page(write_report(write(tmp_path, landscape_line_1_step1=backwards)))
    assert "landscape-line at step 1 could not be drawn" in page.text


def test_values_that_are_not_finite(tmp_path):
    rows = [hessian(1), hessian(2, None), hessian(3, 4.0), hessian(4, None)]
    rows[-1]["hessian/edge_ratio"] = None
    page = Page(write_report(write(tmp_path, rows)))
    assert sentence(page).startswith("The edge ratio was not finite at step 4, the last")
    assert cards(page)[0][1] == "not finite"
    assert page.text.count("hessian/top_eigenvalue, step 2: not finite") == 1
    assert "nan" not in re.sub(
        r"<style.*", "", "".join(re.findall(r"points=\"[^\"]*", page.source))
    )
    write_report(write(tmp_path, [hessian(1, None)]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.2, 0.5, 0.9, 1.05, 0.97], "The edge ratio stayed near 1 from step 30: this learning"),
        ([0.9, 2.0, 1.9, 3.0], "The edge ratio was above 1.3 from step 20: steps overshoot"),
        ([0.1, 0.6, 0.3], "The edge ratio ended at 0.3, at most 0.6 at step 20: below the edge"),
        ([0.95], "The edge ratio was 0.95 at step 10: fewer than 3 converged values"),
    ],
)
def test_first_sentence_judges_the_edge_ratio(tmp_path, values, expected):
    page = Page(write_report(write(tmp_path, ratios(values))))
    assert sentence(page).startswith(expected)


def test_first_sentence_uses_converged_values_of_the_last_series(tmp_path):
    key = "hessian/edge_ratio"
    rows = ratios([1.0] * 3) + ratios([1.0] * 3, first=40, series=2)
    rows += ratios([0.1] * 3, first=70, series=2, unconverged=[key])
    page = Page(write_report(write(tmp_path / "a", rows)))
    assert sentence(page).startswith("The edge ratio stayed near 1 from step 40")
    assert cards(page)[0] == (key, "0.1", "step 90, not converged")
    rows = ratios([1.0] * 5, unconverged=[key])
    page = Page(write_report(write(tmp_path / "b", rows)))
    assert sentence(page).startswith("The edge ratio has no converged value")


def test_each_ratio_has_a_sentence(tmp_path):
    rows = ratios([1.0] * 3)
    for one in rows:
        one["hessian/head/edge_ratio"] = 2.0
    page = Page(write_report(write(tmp_path, rows)))
    assert sentence(page).startswith("hessian/edge_ratio stayed near 1 from step 10")
    assert "hessian/head/edge_ratio was above 1.3 from step 10" in page.text


def test_first_sentence_without_a_ratio_is_about_sharpness(tmp_path):
    rows = [row(step, "sharpness", gradient_norm=9.0, sam=0.5 / step) for step in (1, 2)]
    page = Page(write_report(write(tmp_path / "a", rows)))
    assert sentence(page) == "SAM sharpness was 0.5 at step 1 and 0.25 at step 2."
    page = Page(write_report(write(tmp_path / "b", rows[:1])))
    assert sentence(page) == "SAM sharpness was 0.5 at step 1."


def test_loss_chart_shares_the_steps_of_the_first_chart(tmp_path):
    rows = ratios([0.5, 0.7, 0.9])
    rows += [{"step": s, "monitor": "landscape", "center_loss": 1 / s} for s in (20, 30)]
    page = Page(write_report(write(tmp_path / "a", rows)))
    titles = ["Ratio to the edge of stability", "Loss at the weights", "Top Hessian eigenvalue"]
    assert list(charts(page)) == titles
    # The value at step 20 is at the same place in both charts.
    assert len(set(re.findall(r'cx="([\d.]+)"[^>]*><title>[^<]* step 20:', page.source))) == 1
    rows += [row(s, "generalization", train_loss=1.0, val_loss=2.0) for s in (10, 20, 30)]
    page = Page(write_report(write(tmp_path / "b", rows)))
    assert list(charts(page))[:2] == [titles[0], "Loss on training data"]
    only = [row(s, "generalization", train_loss=1.0) for s in (10, 20)]
    page = Page(write_report(write(tmp_path / "c", only)))
    assert list(charts(page)) == ["Loss on training data"]


def test_main_values_are_cards_and_others_a_table(tmp_path):
    rows = [hessian(3, 2.5), row(3, "sharpness", sam=0.25, keskar=7.0)]
    rows.append({"step": 2, "monitor": "landscape", "center_loss": 0.125})
    page = Page(write_report(write(tmp_path, rows)))
    assert cards(page) == [
        ("hessian/edge_ratio", "0.95", "step 3"),
        ("hessian/top_eigenvalue", "2.5", "step 3"),
        ("sharpness/sam", "0.25", "step 3"),
        ("landscape/center_loss", "0.125", "step 2"),
    ]
    table = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td>', page.source)
    assert table == [("hessian/edge", "10"), ("sharpness/keskar", "7")]


def test_small_values_keep_significant_digits(tmp_path):
    rows = ratios([0.000123456, 0.000234567, 0.000345678])
    rows += [row(s, "sharpness", sam=1.5e-7) for s in (10, 20)]
    page = Page(write_report(write(tmp_path, rows)))
    assert not re.search(r"\b0\.0+\b", page.text)
    assert cards(page)[0][1] == "3.457e-4"
    assert "ended at 0.00035, at most 0.00035 at step 30" in sentence(page)
    assert cards(page)[2][1] == "1.5e-7"


def test_singular_and_plural(tmp_path):
    piece = {"landscape_line_1_step3": slice_at(3)}
    page = Page(write_report(write(tmp_path / "a", [hessian(3, converged=True)], **piece)))
    assert "Measured at step 3: hessian 1 time." in page.text
    assert "converged at 1 of 1 measurement;" in page.text
    assert "Pictures are from step 3." in page.text
    assert "1 picture." in page.text
    assert "Top Hessian eigenvalue: 2 values from 1 to 10" in page.source
    piece["landscape_line_1_step5"] = slice_at(5)
    page = Page(write_report(write(tmp_path / "b", [hessian(3), hessian(5)], **piece)))
    assert "Measured at steps 3 to 5: hessian 2 times." in page.text
    assert "Pictures are from steps 3 to 5." in page.text
    assert "Ratio to the edge of stability: 2 values, 0.95" in page.source


def test_different_probes_in_one_run_warn(tmp_path):
    rows = [hessian(1), hessian(2, probe_samples=1), hessian(4, probe_samples=1)]
    rows += [row(1, "generalization", gap=1.0) | {"probe_mode": "eval"}]
    page = Page(write_report(write(tmp_path / "a", rows)))
    warned = "hessian: measured on different probes, 9 examples (step 1), 1 example (steps 2 to 4)"
    assert f"{warned}; the values are not comparable" in page.text
    assert page.text.count("different probes") == 1
    rows = [hessian(s, probe_mode=mode) for s, mode in ((1, "train"), (2, "eval"))]
    page = Page(write_report(write(tmp_path / "b", rows)))
    assert "9 examples in train mode (step 1), 9 examples in eval mode (step 2)" in page.text
    page = Page(write_report(write(tmp_path / "c", [hessian(1), hessian(2)])))
    assert "different probes" not in page.text


def test_adaptive_optimizer(tmp_path):
    more = {"hessian/edge": 5e3, "hessian/preconditioned_eigenvalue": 90.0}
    rows = [hessian(s, **more, **{"hessian/edge_ratio": 0.018}) for s in (1, 2)]
    page = Page(write_report(write(tmp_path, rows)))
    assert list(charts(page).items()) == [
        ("Ratio to the edge of stability", ["hessian/edge_ratio"]),
        ("Top preconditioned eigenvalue", ["hessian/preconditioned_eigenvalue", "hessian/edge"]),
        ("Top Hessian eigenvalue", ["hessian/top_eigenvalue"]),
    ]
    ratio, preconditioned, raw = page.source.split('<figure class="chart">')[1:]
    assert 'class="ref"' in ratio
    assert "Dotted: 1, the edge." in ratio
    assert "Dotted" not in preconditioned + raw
    assert [">0.1<" in ratio, ">1000<" in preconditioned] == [True, True]


@pytest.mark.parametrize(
    ("lines", "heights"),
    [
        ([[1.0, 1.0], [30.0, 30.0]], "log"),  # the lines are more than a decade apart
        ([[1.0, 1.0], [9.0, 9.0]], "linear"),
        ([[1.0, 99.0]], "linear"),  # and one line over more than two
        ([[1.0, 101.0]], "log"),
        ([[0.0, 1.0], [500.0, 500.0]], "linear"),
    ],
)
def test_logarithmic_axis_for_lines_decades_apart(lines, heights):
    curves = [Curve("c", list(enumerate(line))) for line in lines]
    low, high = min(map(min, lines)), max(map(max, lines))
    middle = math.sqrt(low * high)
    curves.append(Curve("middle", [(0, middle), (1, middle)]))
    found = re.findall(r'cy="([\d.]+)"[^>]*><title>c, step \d: ([\d.]+)', chart("t", curves))
    y = {float(value): float(at) for at, value in found}
    centre = float(re.findall(r'cy="([\d.]+)"[^>]*><title>middle', chart("t", curves))[0])
    share = (y[low] - centre) / (y[low] - y[high])
    assert ("log" if abs(share - 0.5) < 0.01 else "linear") == heights


def row(step, monitor, **values):
    return {
        "step": step, "monitor": monitor, **{f"{monitor}/{k}": v for k, v in values.items()},
        "probe_samples": 9,
    }  # fmt: skip


def charts(page):
    """Title -> the names of its curves."""
    found = re.findall(
        r'<figure class="chart"><figcaption><h3>(.*?)</h3><p class="legend">(.*?)</p>', page.source
    )
    return {title: re.findall(r">([^<]+)</span>", legend) for title, legend in found}


def test_interpolation_and_generalization(tmp_path):
    steps = (1, 2)
    rows = [
        row(
            s, "interpolation", barrier=0.1 * s, distance=3.0 * s, init_loss=2.0, init_rise=1.0,
            init_barrier=0.5,
        )
        for s in steps
    ]  # fmt: skip
    rows += [
        row(s, "generalization", train_loss=0.5, val_loss=0.7, gap=0.2, gap_stderr=0.01)
        for s in steps
    ]
    pieces = {f"interpolation_line_step{s}": slice_at(s, directions=["init"]) for s in steps}
    write(tmp_path, rows, **pieces, interpolation_plane_step2=plane(2))
    page = Page(write_report(tmp_path))
    assert charts(page) == {
        "Loss barrier": ["interpolation/barrier"],
        "Distance to the reference": ["interpolation/distance"],
        "Loss on other examples (init)": ["interpolation/init_loss"],
        "Rise since the reference (init)": ["interpolation/init_rise"],
        "Loss barrier (init)": ["interpolation/init_barrier"],
        "Loss on training data": ["generalization/train_loss", "generalization/val_loss"],
        "Generalization gap": ["generalization/gap"],
        "Standard error of the gap": ["generalization/gap_stderr"],
    }
    assert page.films == ["interpolation-line", "interpolation-plane"]
    assert "on the straight line from the weights to the reference" in page.text
    assert "A plane through the weights and the references" in page.text
    assert "generalization/val_loss, step 2: 0.7" in page.text


def test_notes_on_convergence(tmp_path):
    rows = [
        hessian(1, converged=True, checked=1),
        hessian(2, converged=True, checked=1),
        hessian(3, converged=False, checked=3),
        hessian(4, converged=True, checked=4),
        hessian(5),
        {"step": 1, "monitor": "sharpness", "worst_case_settled": True, "keskar_settled": False},
        {"step": 2, "monitor": "sharpness", "worst_case_settled": False, "keskar_settled": "no"},
    ]
    page = Page(write_report(write(tmp_path, rows)))
    assert "eigenvalue converged at 3 of 4 measurements; at 2 a search outside" in page.text
    assert "The worst case was settled at 1 of 2 measurements." in page.text
    assert "The sharpness of Keskar et al. was settled at 0 of 1 measurement." in page.text
    assert (
        "eigenvalue converged" not in Page(write_report(write(tmp_path / "b", [hessian(5)]))).text
    )


def test_any_scalar_has_a_curve(tmp_path):
    rows = [
        {
            "step": step, "epoch": step, "monitor": "mine", "mine/x": step, "other/y": 0.5,
            "moves": 0.1 * step, "stays": 0.5, "center_loss": 0.25, "count": step, "flag": True,
        }
        for step in (1, 2)
    ]  # fmt: skip
    page = Page(write_report(write(tmp_path, rows)))
    assert charts(page) == {
        "mine/x": ["mine/x"],
        "other/y": ["other/y"],
        "mine/moves": ["mine/moves"],
        "Loss at the weights": ["mine/center_loss"],
    }
    settings = page.source.partition('id="settings"')[2]
    found = dict(re.findall(r"<td>mine</td><td>(\w+)</td><td>([^<]*)</td>", settings))
    assert found == {"epoch": "1 to 2", "stays": "0.5", "count": "1 to 2", "flag": "yes"}


def test_damaged_lines_are_counted(tmp_path):
    write(tmp_path, [hessian(1), {"step": "soon"}, {"monitor": "hessian"}])
    page = Page(write_report(tmp_path))
    assert "history.jsonl: 2 damaged lines left out" in page.text
    assert "Measured at step 1: hessian 1 time." in page.text


def test_directory_of_several_runs_raises(tmp_path):
    for name in ("a/version_0", "b"):
        write(tmp_path / name, [hessian(1)], landscape_line_1_step1=slice_at(1))
    with pytest.raises(ValueError, match="holds 2 runs") as raised:
        write_report(tmp_path)
    assert str(tmp_path / "a" / "version_0") in str(raised.value)
    assert write_report(tmp_path / "a") == tmp_path / "a" / "version_0" / "report.html"


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        write_report(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"no history\.jsonl"):
        write_report(tmp_path)


def test_at_most_24_frames(tmp_path):
    steps = range(0, 1000, 10)
    pieces = {f"landscape_line_1_step{step:08d}": slice_at(step) for step in steps}
    page = Page(write_report(write(tmp_path, **pieces)))
    assert len(page.all("img")) == 24 + 1
    shown = [a["aria-label"] for a in page.all("button")]
    assert [shown[0], shown[-1]] == ["Show step 0", "Show step 990"]
    assert "24 pictures of 100, evenly chosen: at most 24 are shown" in page.text


def test_lines_of_one_step_share_a_figure(tmp_path):
    pieces = {f"landscape_line_{n}_step1": slice_at(1, directions=[f"d{n}"]) for n in (1, 2)}
    page = Page(write_report(write(tmp_path, **pieces)))
    assert page.films == ["landscape-line"]
    assert len(page.all("button")) == 1


def test_all_frames_share_one_range(tmp_path, monkeypatch):
    import lightning_landscape.report.report_page as module

    seen = []
    drawn = module.plane_figure
    monkeypatch.setattr(
        module, "plane_figure", lambda s, limits: seen.append(limits) or drawn(s, limits=limits)
    )
    blown = Slice(plane(1).coordinates, np.full((5, 5), math.nan), math.nan, {"step": 1})
    steep = Slice(plane(3).coordinates, 100 * plane(3).losses, 300, {"step": 3})
    write(tmp_path, p_step1=blown, p_step2=plane(2), p_step3=steep)
    write_report(tmp_path)
    highest = float(max(plane(2).losses.max(), steep.losses.max()))
    assert len(set(seen)) == 1
    assert len(seen) == 3
    assert highest <= seen[0].high < 2.5 * highest


# -- planes as surfaces -----------------------------------------------------------------------


def surfaces(source):
    """The data of each series of planes."""
    pattern = '<script type="application/json">(.*?)</script>'
    return [json.loads(text) for text in re.findall(pattern, source)]


def decades(factor=1.0, center=0.01, **metadata):
    """A plane of three by three losses that are powers of ten."""
    x = np.array([-1.0, 0.0, 1.0])
    losses = np.array([[1.0, 0.1, 10.0], [0.1, center, 0.1], [1.0, 0.1, 1.0]])
    return Slice((x, 2 * x), factor * losses, factor * center, metadata)


def test_surface_heights_are_logarithms_of_the_loss(tmp_path):
    write(tmp_path, a_plane_step2=decades(), a_plane_step5=decades(0.1))
    page = Page(write_report(tmp_path))
    (data,) = surfaces(page.source)
    assert [frame["step"] for frame in data["frames"]] == [2, 5]
    # One range for both, from 0.001 to 10.
    for frame, factor in zip(data["frames"], (1.0, 0.1), strict=True):
        heights = (np.log10(factor * decades().losses) + 3) / 4
        assert np.abs(np.array(frame["heights"]) - heights).max() < 0.001
        assert frame["weights"] == [0, 0, round((math.log10(factor * 0.01) + 3) / 4, 3)]
        assert (frame["x"], frame["y"]) == ([-1, 0, 1], [-1, 0, 1])
        assert frame["ends"] == [["−1", "1"], ["−2", "2"]]  # noqa: RUF001
    assert data["ticks"] == [["0.01", 0.25], ["0.1", 0.5], ["1", 0.75]]
    assert data["loss"] == "loss"
    assert data["colors"][0] == [68, 1, 84]  # the ends of viridis
    assert data["colors"][-1] == [253, 231, 36]
    text = "Step 5: loss 0.001 at the weights, 0.001 to 1 in the plane"
    assert data["frames"][1]["text"] == text
    (canvas,) = page.all("canvas")
    assert (canvas["role"], canvas["tabindex"]) == ("img", "0")
    assert "aria-label" in canvas
    assert "the nearest one is shown" not in page.text


def test_surface_has_holes_where_the_loss_is_not_finite(tmp_path):
    holes = decades(center=math.nan)
    holes.losses[0] = math.inf, 1e200, 1.0
    write(tmp_path, a_plane_step1=holes, b_plane_step1=decades(math.nan))
    one, other = surfaces(Page(write_report(tmp_path)).source)
    (frame,) = one["frames"]
    assert [[h is None for h in row] for row in frame["heights"]] == [
        [True, True, False],
        [False, True, False],
        [False, False, False],
    ]
    assert frame["weights"] is None
    assert "loss not finite at the weights" in frame["text"]
    assert {h for row in other["frames"][0]["heights"] for h in row} == {None}
    assert "not finite anywhere" in other["frames"][0]["text"]


def test_few_surfaces_are_shown_of_many_planes(tmp_path):
    # The losses decrease until step 3, then stay constant.
    pieces = {f"a_plane_step{s}": decades(10.0 ** -min(s, 3)) for s in range(10)}
    page = Page(write_report(write(tmp_path, **pieces)))
    (data,) = surfaces(page.source)
    steps = [frame["step"] for frame in data["frames"]]
    assert (len(steps), steps[0], steps[-1]) == (6, 0, 9)
    assert {1, 2, 3} <= set(steps)
    assert "6 of 10 steps: the nearest one is shown" in page.text
    # Planes of different sizes have no points in common to compare.
    coarse = slice_at(1, size=3, kind="plane")
    view = surface_view({s: coarse if s == 4 else plane(s) for s in range(10)}, LossLimits(1, 20))
    assert len(surfaces(view)[0]["frames"]) == 6


def test_large_plane_is_thinned(tmp_path):
    x = np.linspace(-1, 1, 201)
    losses = np.random.default_rng(0).random((51, 201)) + 1
    large = Slice((x, x[::4]), losses, float(losses[25, 100]))
    view = surface_view({1: large}, LossLimits(0.9, 2.1))
    (frame,) = surfaces(view)[0]["frames"]
    assert (len(frame["x"]), len(frame["y"])) == (45, 45)
    assert np.shape(frame["heights"]) == (45, 45)
    assert (frame["x"][0], frame["x"][22], frame["x"][-1]) == (-1, 0, 1)
    assert frame["heights"][22][22] == frame["weights"][2]
    assert len(view) < 60_000


@pytest.mark.parametrize("end", ["</script><b>alert(1)", "<!--<script>"])
def test_name_does_not_end_the_data_of_a_surface(tmp_path, end):
    write(tmp_path, a_plane_step1=decades(directions=[end, "other"]))
    page = Page(write_report(tmp_path))
    assert surfaces(page.source)[0]["frames"][0]["names"] == [end, "other"]
    assert len(page.all("script")) == 2
    assert not page.all("b")


def test_no_surface_without_planes(tmp_path):
    x = np.linspace(-1, 1, 3)
    row_of_points = Slice((x, x[:1]), np.ones((1, 3)), 1.0)
    write(tmp_path, a_line_1_step1=slice_at(1), b_plane_step1=row_of_points)
    page = Page(write_report(tmp_path))
    assert not page.all("canvas")
    assert len(page.all("script")) == 1
    assert "getContext" not in page.source


def test_surface_of_losses_below_zero(tmp_path):
    x = np.array([-1.0, 0.0, 1.0])
    losses = np.array([[0.0, -1.0, 99.0], [-1.0, -1.0, 9.0], [0.0, -1.0, 99.0]])
    (data,) = surfaces(surface_view({1: Slice((x, x), losses, 0.0)}, LossLimits(1, 100, True)))
    assert data["loss"] == "loss above the lowest"
    assert data["frames"][0]["heights"][1] == [0, 0, 0.5]  # 0 and 10 above
    assert data["frames"][0]["weights"] == [0, 0, 0]  # 1 above
    beside = Slice((x + 2, x), losses, 0.0)  # does not contain the weights
    (data,) = surfaces(surface_view({1: beside}, LossLimits(1, 100, True)))
    assert data["frames"][0]["weights"] is None


def test_high_losses_of_a_surface_are_clipped():
    view = surface_view({1: decades()}, LossLimits(0.01, 1))
    assert "Losses above 1 are cut off at the top" in view
    assert surfaces(view)[0]["frames"][0]["heights"][0] == [1, 0.5, 1]
    assert "cut off" not in surface_view({1: decades()}, LossLimits(0.01, 10))


@pytest.mark.skipif(
    chromium.BINARY is None or chromium.DRIVER is None, reason=chromium.MISSING
)  # fmt: skip
def test_surface_in_a_browser(tmp_path):
    from tests.browser.check import browser, look_at_surface

    write(tmp_path, a_plane_step1=decades(), a_plane_step2=decades(0.1))
    page = write_report(tmp_path)
    with browser(tmp_path) as window:
        for width in (1400, 350):
            window.driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
            )
            window.driver.get(page.as_uri())
            look_at_surface(window, window.driver.find_element("class name", "film"))
            ask = window.driver.execute_script
            assert ask("return document.documentElement.scrollWidth") <= width
        assert not window.console()


def test_density_is_shown(tmp_path):
    w = torch.nn.Parameter(torch.ones(4))
    found = spectral_density(Objective(lambda: (w**4).sum(), {"w": w}), samples=2)
    page = Page(write_report(write(tmp_path, hessian_density_step7=found)))
    assert page.films == ["hessian-density"]
    assert "The share of the Hessian's eigenvalues at each value." in page.text


def test_thinning_keeps_peaks():
    points = [(step, 99.0 if step == 4321 else float(step % 7)) for step in range(10_000)]
    kept = thinned(points)
    assert len(kept) <= 300
    assert (4321, 99.0) in kept
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)


@pytest.mark.slow
def test_command(tmp_path):
    write(tmp_path, [hessian(1)])
    command = [sys.executable, "-m", "lightning_landscape.report"]
    out = tmp_path / "new" / "page.html"
    done = subprocess.run(
        [*command, tmp_path, "-o", out], capture_output=True, text=True, check=True
    )
    assert str(out) in done.stdout
    assert out.stat().st_size > 5000
    failed = subprocess.run([*command, tmp_path / "no"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr
