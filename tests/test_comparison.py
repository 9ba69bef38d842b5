"""Comparing runs: values computed by hand, a scale shared by all runs, a page that is escaped."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger

from lightning_landscape import HessianMonitor, LandscapeMonitor, Slice, compare
from lightning_landscape.compare.__main__ import main
from lightning_landscape.compare.table_text import second_column
from lightning_landscape.geometry import Objective
from lightning_landscape.geometry import spectral_density as density
from tests.browser import chromium
from tests.runs import train
from tests.small import Linear, regression
from tests.test_report import NASTY, Page, plane, slice_at, write

KEY = "sharpness/sam"


def history(values, key=KEY, **more):
    return [
        {"step": step, "monitor": key.split("/")[0], key: value, **more}
        for step, value in values.items()
    ]


def seeds(tmp_path):
    """Three seeds of Adam and one of SGD; the last value of one seed is not finite."""
    values = {
        "adam/seed1": {10: 1.0, 20: 4.0, 30: 2.0},
        "adam/seed2": {10: 6.0, 20: 3.0, 40: 5.0},
        "adam/seed3": {10: 2.0, 20: 9.0, 30: None},
        "sgd/seed1": {10: 7.0},
    }
    for name, own in values.items():
        write(tmp_path / name / "version_0", history(own))
    return [tmp_path / name for name in values]


# --- the table


def test_table_by_hand(tmp_path):
    table = compare(seeds(tmp_path)).table
    assert list(table) == ["adam/seed1", "adam/seed2", "adam/seed3", "sgd/seed1"]
    first, third = table["adam/seed1"][KEY], table["adam/seed3"][KEY]
    assert first.last == (2.0, 30)
    assert first.lowest == (1.0, 10)
    assert first.highest == (4.0, 20)
    assert first.mean == (pytest.approx(7 / 3), None)
    assert (first.measured, first.not_finite) == (3, 0)
    assert math.isnan(third.last.value)
    assert third.last.step == 30
    assert third.highest == (9.0, 20)
    assert third.mean.value == 5.5
    assert (third.measured, third.not_finite) == (3, 1)


def test_groups_by_hand(tmp_path):
    found = compare(seeds(tmp_path), group_by="/")
    assert found.groups["adam/seed2"] == "adam"
    adam, sgd = found.group_table["adam"][KEY], found.group_table["sgd"][KEY]
    # From 2, 5 and a value that is not finite.
    assert adam.last == (3.5, 2.0, 5.0, 2, 1, 30, 40)
    assert adam.highest == (6.0, 4.0, 9.0, 3, 0, 10, 20)
    assert adam.lowest[:3] == (2.0, 1.0, 3.0)
    assert adam.mean[:3] == (pytest.approx(14 / 3), pytest.approx(7 / 3), 5.5)
    assert (adam.seeds, adam.of) == (3, 3)
    assert sgd.last[:4] == (7.0, 7.0, 7.0, 1)
    text = str(found)
    assert "3.5 (2 to 5), 3 seeds, 1 not finite, steps 30 to 40" in text
    assert "not finite, step 30" in text
    assert "9, step 20, 1 of 3 not finite" in text
    given = compare(seeds(tmp_path), groups={name: name[:4] for name in found.runs})
    assert list(given.group_table) == ["adam", "sgd/"]


def test_run_without_a_key_has_an_empty_cell_and_a_note(tmp_path):
    write(tmp_path / "a", history({1: 1.0}) + history({1: 2.0}, key="hessian/trace"))
    write(tmp_path / "b", history({1: 3.0}))
    found = compare([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    assert "hessian/trace" not in found.table["b"]
    assert "not measured in b: hessian/trace" in found.notes
    lines = str(found).splitlines()
    block = lines[lines.index("hessian/trace") :]
    assert block[2].split() == ["a", "2,", "step", "1", "2,", "step", "1"]
    assert block[3].split() == ["b", "-", "-"]
    page = Page(found.path)
    assert page.source.count("<td></td><td></td>") == 1
    assert "not measured in b: hessian/trace" in page.text
    grouped = compare(found.runs, groups={"a": "g", "b": "g"})
    assert grouped.group_table["g"]["hessian/trace"].seeds == 1
    assert "2, 1 of 2 seeds, step 1" in str(grouped)


def test_runs_on_different_probes_warn(tmp_path, monkeypatch, capsys):
    probe = {"probe_samples": 512, "probe_mode": "train"}
    write(tmp_path / "a", history({1: 1.0}, **probe) + history({1: 1.0}, "hessian/trace", **probe))
    write(tmp_path / "b", history({1: 1.0}, **probe) + history({1: 1.0}, "hessian/trace", **probe))
    write(tmp_path / "c", history({1: 3.0}, probe_samples=1, probe_mode="train"))
    write(tmp_path / "d", history({1: 3.0}, probe_samples=512, probe_mode="eval"))
    folders = {name: tmp_path / name for name in "abcd"}

    def warned(names):
        found = compare([folders[name] for name in names])
        return [note for note in found.notes if "different probes" in note]

    assert warned("ab") == []
    assert warned("abc") == [
        "sharpness: measured on different probes, 512 examples in train mode (a, b), "
        "1 example in train mode (c); the values are not comparable"
    ]
    assert warned("ad") == [
        "sharpness: measured on different probes, 512 examples in train mode (a), "
        "512 examples in eval mode (d); the values are not comparable"
    ]
    # As text in the terminal, and on the page.
    monkeypatch.chdir(tmp_path)
    assert main(["a", "c"]) == 0
    assert "\n- sharpness: measured on different probes, 512" in capsys.readouterr().out
    assert "sharpness: measured on different probes, 512" in Page(tmp_path / "comparison.html").text


def test_callbacks_with_the_same_probes_share_a_warning(tmp_path):
    for name, samples in {"a": 8, "b": 9}.items():
        keys = (KEY, "hessian/trace")
        rows = [row for key in keys for row in history({1: 1.0}, key, probe_samples=samples)]
        write(tmp_path / name, rows)
    notes = compare([tmp_path / "a", tmp_path / "b"]).notes
    assert notes == [
        "sharpness, hessian: measured on different probes, 8 examples (a), 9 examples (b); "
        "the values are not comparable"
    ]


def test_run_on_different_probes_warns(tmp_path):
    rows = history({1: 1.0}, probe_samples=8) + history({2: 1.0, 3: 1.0}, probe_samples=9)
    for name in "ab":
        write(tmp_path / name, rows)
    warned = (
        "sharpness: measured on different probes, 8 examples (step 1), 9 examples (steps 2 to 3)"
    )
    notes = compare([tmp_path / "a", tmp_path / "b"]).notes
    assert notes == [f"{name}: {warned}; the values are not comparable" for name in "ab"]


def test_small_values_keep_significant_digits(tmp_path):
    for name, value in {"a/1": 1.25e-4, "a/2": 1.25e-4, "b/1": 3e-7}.items():
        write(tmp_path / name, history({1: value}))
    found = compare([tmp_path / "a/1", tmp_path / "a/2", tmp_path / "b/1"], group_by="/")
    text = str(found)
    assert "0.000" not in text
    assert "1.25e-4, 2 seeds, step 1" in text  # and not "1.25e-4 (1.25e-4 to 1.25e-4)"
    assert "3e-7, 1 seed, step 1" in text


def test_order_of_keys(tmp_path):
    keys = ("hessian/edge", "hessian/top_eigenvalue", "hessian/preconditioned_eigenvalue")
    keys += ("hessian/edge_ratio", "sharpness/sam")
    rows = [{"step": step, "monitor": "x", **dict.fromkeys(keys, 1.0)} for step in (1, 2)]
    found = compare([write(tmp_path / "a", rows)], tmp_path / "page.html")
    assert found.keys == [keys[3], keys[2], keys[1], keys[4], keys[0]]
    assert Page(found.path).text.startswith("\nComparison of 1 run:root")


def test_rows_convert_to_pandas(tmp_path):
    rows = compare(seeds(tmp_path), group_by="/").rows()
    assert rows[0] == {
        "run": "adam/seed1", "group": "adam", "key": KEY, "last": 2.0, "last_step": 30,
        "lowest": 1.0, "lowest_step": 10, "highest": 4.0, "highest_step": 20,
        "mean": pytest.approx(7 / 3), "measured": 3, "not_finite": 0,
    }  # fmt: skip
    assert len(rows) == 4


def test_runs_without_finite_values(tmp_path):
    write(tmp_path / "a", history({1: None, 2: None}))
    write(tmp_path / "b", history({1: 3.0, 2: 10**400}))
    found = compare([tmp_path / "a", tmp_path / "b"], tmp_path / "p.html", group_by="/")
    assert found.table["a"][KEY].highest == (pytest.approx(math.nan, nan_ok=True), None)
    assert found.table["b"][KEY].not_finite == 1
    assert "not finite, 2 of 2 not finite" in str(found)
    assert str(found).count("not finite, step 2") == 2
    assert math.isnan(found.group_table["a"][KEY].last.median)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("hessian/top_eigenvalue", "highest"),
        ("hessian/min_eigenvalue", "lowest"),
        ("generalization/val_loss", "lowest"),
        ("interpolation/init_barrier", "highest"),
        ("hessian/hvps", "mean"),
        ("generalization/gap_stderr", "mean"),
    ],
)
def test_second_column(key, what):
    assert second_column(key) == what


def test_keys_are_chosen_by_name_or_pattern(tmp_path):
    keys = ("hessian/trace", "sharpness/sam", "sharpness/keskar")
    write(tmp_path / "a", [row for key in keys for row in history({1: 1.0}, key=key)])
    choose = [tmp_path / "a"]
    assert compare(choose).keys == ["sharpness/sam", "hessian/trace", "sharpness/keskar"]
    assert compare(choose, keys="sharpness/*").keys == ["sharpness/sam", "sharpness/keskar"]
    found = compare(choose, keys=["sharpness/sam", "hessian/trace"])
    assert found.keys == list(found.figures) == ["sharpness/sam", "hessian/trace"]


# --- which runs


def test_run_names_are_short_and_distinct(tmp_path):
    for name in ("x/adam/version_0", "x/sgd/version_0", "y/adam/version_1"):
        write(tmp_path / name, history({1: 1.0}))
    two = [tmp_path / "x" / name for name in ("adam", "sgd")]
    assert list(compare(two).runs) == ["adam", "sgd"]
    assert compare(two).runs["adam"] == tmp_path / "x" / "adam" / "version_0"
    others = [tmp_path / "x" / "adam", tmp_path / "y" / "adam"]
    assert list(compare(others).runs) == ["x/adam/version_0", "y/adam/version_1"]
    assert list(compare(others[:1]).runs) == ["adam/version_0"]
    assert list(compare({"b": two[1], "a": two[0]}).runs) == ["b", "a"]


def test_runs_that_cannot_be_compared_raise(tmp_path):
    for name in ("a/version_0", "a/version_1", "b"):
        write(tmp_path / name, history({1: 1.0}))
    (tmp_path / "empty").mkdir()
    good = tmp_path / "b"

    def fails(error, match, *args, **kwargs):
        with pytest.raises(error, match=match):
            compare(*args, **kwargs)

    fails(FileNotFoundError, r"empty: no history\.jsonl.*trainer\.log_dir", [tmp_path / "empty"])
    fails(FileNotFoundError, "nowhere: there is no such directory", [tmp_path / "nowhere"])
    fails(ValueError, r"holds 2 runs; choose one(.|\n)*version_0(.|\n)*version_1", [tmp_path / "a"])
    fails(ValueError, "b is given 2 times; pass each run once", [good, tmp_path / "a" / ".." / "b"])
    fails(TypeError, "expected several log directories", str(good))
    fails(ValueError, "at least one log directory", [])
    fails(ValueError, "no run has 'no/x'; there are 'sharpness/sam'", [good], keys=["no/x"])
    fails(ValueError, "no run has 'x/y'", [good], points=[(KEY, "x/y")])
    both = {"x": good, "y": tmp_path / "a" / "version_0"}
    fails(ValueError, "lacks the run 'y'", both, groups={"x": "g"})
    fails(ValueError, "no run 'z'; the runs are 'x', 'y'", both, groups=dict.fromkeys("xyz", "g"))
    fails(ValueError, "one of the two", both, groups={}, group_by="/")
    fails(ValueError, r"group_by=''", both, group_by="")


def test_damaged_rows_are_counted_and_skipped(tmp_path):
    write(tmp_path / "a", history({1: 1.0}))
    with (tmp_path / "a" / "history.jsonl").open("a") as file:
        file.write('{"step": "soon", "sharpness/sam": 9.0}\n{"step": null, "sharpness/sam": 9.0}\n')
        file.write('[1]\n{"step": 2, "monitor": ["odd"], "sharpness/sam": 5.0}\n{"step": 3, "sha')
    write(tmp_path / "b", history({1: "text", 2: 3.0, 3: True}))
    torn = tmp_path / "b" / "landscape" / "landscape-plane-step00000001.npz"
    torn.write_bytes(b"torn")
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert found.table["a"][KEY].last == (5.0, 2)
    assert found.table["b"][KEY].measured == 1
    assert "a: history.jsonl: 4 damaged lines left out" in found.notes
    assert any(note.startswith("b: landscape-plane-step00000001.npz") for note in found.notes)


# --- pictures


def curve(figure, label):
    (found,) = [line for line in figure.axes[0].lines if line.get_label() == label]
    return np.asarray(found.get_xdata()).tolist(), np.asarray(found.get_ydata()).tolist()


def test_curves_show_each_run_and_its_edge(tmp_path):
    key = "hessian/top_eigenvalue"
    write(tmp_path / "a", history({1: 5.0, 3: 6.0}, key=key, **{"hessian/edge": 8.0}))
    write(tmp_path / "b", history({2: 4.0}, key=key))
    figure = compare([tmp_path / "a", tmp_path / "b"]).figures[key]
    assert curve(figure, "a") == ([1.0, 3.0], [5.0, 6.0])
    assert curve(figure, "b") == ([2.0], [4.0])
    (edge,) = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert np.asarray(edge.get_ydata()).tolist() == [8.0, 8.0]


def maps_of(axes):
    """The filled contours."""
    return next(c for c in axes.collections if getattr(c, "filled", False))


def test_last_planes_share_a_colour_scale(tmp_path):
    steep = Slice(plane(1).coordinates, 50 * plane(0).losses, 0.0, {"step": 7})
    write(tmp_path / "a", landscape_plane_step1=plane(1), landscape_plane_step5=plane(5, seed=1))
    write(tmp_path / "b", landscape_plane_step7=steep)
    write(tmp_path / "c", landscape_plane_step3=slice_at(3, size=9, kind="plane"))
    found = compare([tmp_path / name for name in "abc"])
    figure = found.figures["landscape-plane"]
    maps = [maps_of(axes) for axes in figure.axes[:3]]
    # The lowest loss is 0, the steepest reaches 100.
    assert {one.norm.limits.high for one in maps} == {100.0}
    assert len({one.norm.limits.low for one in maps}) == 1
    assert figure.axes[3].get_ylabel() == "loss above the lowest"
    texts = [text.get_text() for text in figure.texts]
    assert [text for text in texts if text.startswith(("a\n", "b\n", "c\n"))] == [
        "a\nloss 5", "b\nloss 0", "c\nloss 3",
    ]  # fmt: skip
    assert "steps 3 to 7" in found.captions["landscape-plane"]


def test_blown_up_plane_leaves_the_colour_range(tmp_path):
    blown = Slice(plane(1).coordinates, 1e20 * plane(0).losses, 0.0, {"step": 1})
    nothing = Slice(plane(1).coordinates, np.full((5, 5), math.nan), math.nan, {"step": 1})
    for name, piece in {"a": plane(1), "b": plane(1), "c": blown, "d": nothing}.items():
        write(tmp_path / name, landscape_plane_step1=piece)
    figure = compare([tmp_path / name for name in "abcd"]).figures["landscape-plane"]
    assert maps_of(figure.axes[0]).norm.limits.high <= 1e4


def test_lines_of_all_runs_share_a_chart(tmp_path):
    for name, factor in {"a": 1.0, "b": 3.0}.items():
        piece = slice_at(4, size=5, directions=["random"])
        steep = Slice(piece.coordinates, factor * piece.losses, 4 * factor, piece.metadata)
        write(tmp_path / name, landscape_line_1_step4=steep, landscape_line_2_step4=piece)
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert list(found.figures) == ["landscape-line-1", "landscape-line-2"]
    figure = found.figures["landscape-line-1"]
    x = np.linspace(-1, 1, 5)
    assert curve(figure, "a") == (x.tolist(), (4 + x**2).tolist())
    np.testing.assert_allclose(curve(figure, "b")[1], 3 * (4 + x**2))


def test_caption_notes_different_directions(tmp_path):
    for name in "ab":
        write(tmp_path / name, landscape_line_step1=slice_at(1, directions=[name]))
    found = compare([tmp_path / name for name in "ab"])
    assert "different directions" in found.captions["landscape-line"]


def test_last_readable_slice_is_used(tmp_path):
    write(tmp_path / "a", landscape_line_step1=slice_at(1), landscape_line_step2=slice_at(2))
    (tmp_path / "a" / "landscape" / "landscape-line-step3.npz").write_bytes(b"")
    backwards = Slice((np.array([1.0, 0.0]),), np.ones(2), 1.0, {"step": 1})
    write(tmp_path / "b", landscape_line_step9=backwards)
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert "step 2," in found.captions["landscape-line"]
    assert any("landscape-line-step3.npz cannot be read" in note for note in found.notes)
    assert any("landscape-line of b: got coordinates" in note for note in found.notes)


def test_densities_are_not_compared(tmp_path):
    w = torch.nn.Parameter(torch.ones(4))
    found = density(Objective(lambda: (w**4).sum(), {"w": w}), samples=2)
    write(tmp_path / "a", history({1: 1.0}), hessian_density_step7=found)
    assert list(compare([tmp_path / "a"]).figures) == [KEY]


def test_scatter_plot_shows_the_last_values(tmp_path):
    gap = "generalization/gap"
    for name, value in {"a": 1.0, "b": 2.0}.items():
        write(
            tmp_path / name,
            history({1: 9.0, 2: value}) + history({1: 8.0, 3: 3 * value}, key=gap),
        )
    found = compare([tmp_path / "a", tmp_path / "b"], points=[(KEY, gap)])
    figure = found.figures[f"{gap} against {KEY}"]
    places = {
        line.get_label(): (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in figure.axes[0].lines
    }
    assert places == {"a": (1.0, 3.0), "b": (2.0, 6.0)}


def test_hundreds_of_runs(tmp_path):
    for index in range(120):
        write(tmp_path / f"run{index:03d}", history({1: float(index)}))
    for index in range(12):
        write(tmp_path / f"run{index:03d}", landscape_line_step1=slice_at(1))
    found = compare(sorted(tmp_path.iterdir()), tmp_path / "page.html")
    assert len(found.table) == 120
    assert len(found.figures[KEY].legends[0].get_texts()) == 10
    assert "10 of 12 runs are shown" in found.captions["landscape-line"]
    page = Page(found.path)
    assert len(page.all("th", scope="row")) == 120
    assert found.path.stat().st_size < 500_000


# --- the page


@pytest.mark.parametrize("where", ["name", "group", "key", "monitor", "folder", "metadata", "file"])
def test_everything_is_escaped(tmp_path, where):
    safe = NASTY.replace("/", "")
    row = {"step": 1, "monitor": "x", "x/y": 1.0}
    if where == "key":
        row[f"x/{NASTY}"] = 2.0
    if where == "monitor":
        row = {"step": 1, "monitor": NASTY, f"{NASTY}/y": 1.0, "center_loss": 2.0}
    known = {"directions": [NASTY], "normalization": NASTY} if where == "metadata" else {}
    folder = write(
        tmp_path / (safe if where == "folder" else "run"),
        [row],
        landscape_line_step1=slice_at(1, **known),
    )
    if where == "file":
        (folder / "landscape" / f"{safe}-step3.npz").write_bytes(b"torn")
    other = write(tmp_path / "other", [{"step": 1, "monitor": "x", "x/z": 1.0}])
    names = (NASTY if where == "name" else "a", "b")
    groups = dict.fromkeys(names, NASTY) if where == "group" else None
    found = compare(
        dict(zip(names, (folder, other), strict=True)), tmp_path / "page.html", groups=groups
    )
    page = Page(found.path)
    assert not page.all("script")
    assert "<script" not in page.source
    if where != "metadata":  # those are in the pictures alone
        assert "alert(1)" in page.text
    for source in page.all("img"):
        assert set(source) == {"src", "alt"}


def test_page_loads_nothing_from_outside(tmp_path):
    write(tmp_path / "a", history({1: 1.0}), landscape_plane_step1=plane(1))
    page = Page(compare([tmp_path / "a"], tmp_path / "new" / "page.html").path)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "script-src" not in policy["content"]
    assert "unsafe" not in policy["content"]
    addresses = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href")]
    assert len(addresses) == 3
    assert all(address.startswith("data:") for address in addresses)
    assert page.sections == ["table", "curves", "pictures", "runs"]
    assert not [attrs for _, attrs in page.tags if "style" in attrs]


def test_run_with_slices_only(tmp_path):
    write(tmp_path / "a", landscape_plane_step1=plane(1))
    page = Page(compare({"name": tmp_path / "a"}, tmp_path / "page.html").path)
    assert "No numbers were found" in page.text
    assert "name: there is no history.jsonl" in page.text


def test_two_real_runs(tmp_path):
    monitors = {}
    for name, rate in {"slow": 0.005, "fast": 0.02}.items():
        monitors[name] = [
            HessianMonitor(every_n_train_steps=2, max_overhead=None),
            LandscapeMonitor(every_n_train_steps=4, max_overhead=None, resolution=5),
        ]
        logger = CSVLogger(tmp_path, name=name)
        train(lambda rate=rate: Linear(rate), regression, monitors[name], tmp_path, logger=logger)
    page = tmp_path / "comparison.html"
    found = compare([tmp_path / "slow", tmp_path / "fast"], page)
    assert found.path == page
    for name, (hessian, _) in monitors.items():
        cell = found.table[name]["hessian/top_eigenvalue"]
        rows = hessian.history
        assert cell.last == (rows[-1]["hessian/top_eigenvalue"], rows[-1]["step"])
        assert cell.highest.value == max(row["hessian/top_eigenvalue"] for row in rows)
        steps, values = curve(found.figures["hessian/top_eigenvalue"], name)
        assert steps == [row["step"] for row in rows]
        assert values == [row["hessian/top_eigenvalue"] for row in rows]
    # The curvature of linear regression is the same whatever the weights; the edge is 2 / lr.
    assert found.table["slow"]["hessian/edge"].last.value == pytest.approx(400)
    assert found.table["fast"]["hessian/edge"].last.value == pytest.approx(100)
    planes = found.figures["landscape-plane"]
    limits = [maps_of(axes).norm.limits for axes in planes.axes[:2]]
    assert limits[0] == limits[1]
    for run in found.runs.values():
        last = Slice.load(sorted((run / "landscape").glob("landscape-plane-*.npz"))[-1])
        assert last.losses.max() <= limits[0].high
        assert limits[0].low <= last.losses.min() or limits[0].excess
    assert not found.notes


# --- the command


def test_command(tmp_path, monkeypatch, capsys):
    folders = [str(folder) for folder in seeds(tmp_path)]
    monkeypatch.chdir(tmp_path)
    options = ["--group-by", "/", "--keys", "sharpness/*", "--points", KEY, KEY]
    assert main([*folders, *options]) == 0
    printed = capsys.readouterr().out
    assert "3.5 (2 to 5), 3 seeds, 1 not finite, steps 30 to 40" in printed
    assert "Wrote comparison.html" in printed
    assert f"{KEY} against {KEY}" in Page(tmp_path / "comparison.html").text
    out = tmp_path / "new" / "page.html"
    assert main([*folders[:2], "--names", "one", "two", "--out", str(out)]) == 0
    assert "\n  one  " in capsys.readouterr().out
    assert out.exists()
    for arguments, message in (
        ([*folders, "--names", "one"], "got 1 name for 4 runs; pass one a run"),
        ([*folders[:2], "--names", "x", "x"], "got 'x' 2 times; pass another name"),
        ([str(tmp_path / "no")], "there is no such directory"),
    ):
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert message in printed


@pytest.mark.slow
def test_command_in_a_subprocess(tmp_path):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "lightning_landscape.compare"]
    out = tmp_path / "page.html"
    done = subprocess.run(
        [*command, *seeds(tmp_path), "--out", out], capture_output=True, text=True, check=True
    )
    assert f"Wrote {out}" in done.stdout
    failed = subprocess.run([*command, tmp_path / "no"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


@pytest.mark.skipif(
    chromium.BINARY is None or chromium.DRIVER is None, reason=chromium.MISSING
)  # fmt: skip
def test_page_in_a_browser(tmp_path):
    from tests.browser.check import browser

    for name in ("a" * 60, "b"):
        write(
            tmp_path / name,
            [{"step": 1, "monitor": "x", **{f"x/key{i}": 1e-9 * i for i in range(30)}}],
            landscape_plane_step1=plane(1),
        )
    page = compare(
        [tmp_path / ("a" * 60), tmp_path / "b"], tmp_path / "page.html", keys="x/key?"
    ).path
    with browser(tmp_path) as window:
        for width in (1400, 390):
            window.driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
            )
            window.driver.get(page.as_uri())
            ask = window.driver.execute_script
            assert ask("return document.documentElement.scrollWidth") <= width
            assert ask("return [...document.images].every(i => i.naturalWidth == 560)")
            # The row headers stay visible when the table is scrolled.
            ask("document.querySelector('.scroll').scrollLeft = 10000")
            assert ask("return document.querySelector('.scroll').scrollLeft") > 100
            assert ask(
                "const box = document.querySelector('.scroll').getBoundingClientRect();"
                "return [...document.querySelectorAll('tbody th')].every(th => {"
                "const own = th.getBoundingClientRect();"
                "return Math.abs(own.left - box.left) < 2 && own.width < 0.75 * box.width; })"
            )
        assert not window.console()
        asked = [u for u in window.requests() if not u.startswith(("file:", "data:", "about:"))]
        assert not asked


def test_infinity_in_a_history_is_not_finite(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "history.jsonl").write_text(json.dumps({"step": 1, "x/y": math.inf}) + "\n")
    assert compare({"a": folder}).table["a"]["x/y"].not_finite == 1
