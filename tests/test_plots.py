"""What adaptive_neon/plots.py promises: labels, ticks and data of the axes, read back; figures and
samples as the page takes them."""

import base64
import io
import math
import re
import xml.etree.ElementTree

import matplotlib
import numpy as np
import PIL.Image
import pytest
import torch
from made import SCORE, entry_of, finals_of, score, summary_of

import adaptive_neon as neon
import adaptive_neon.glyphs  # noqa: F401

BLOCKS = ("enc", "mid", "dec")


def axes_of(plot, *data):
    with matplotlib.rc_context(neon.plots.RC):
        return plot(*data)[0].axes


def ticks(axis):
    return [label.get_text() for label in axis.get_xticklabels()]


def names(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


def points_of(container, upright=True):
    """x, value, low and high of every point of an errorbar(), which is drawn as it should be where
    it is horizontal."""
    _, _, (lines,) = container.lines
    rows = []
    for segment in lines.get_segments():
        along, across = (
            (segment[:, 1], segment[0, 0]) if upright else (segment[:, 0], segment[0, 1])
        )
        rows.append((across, *along))
    return np.array(rows, float)


def legend_of(owner):
    legend = owner.get_legend() if hasattr(owner, "get_legend") else owner.legends[0]
    return [text.get_text() for text in legend.get_texts()]


def diverging(*names, kimg=5):
    """A snapshot in which the samplers of these models diverge in every judge."""
    finals = finals_of(kimg)
    for scores in finals.values():
        for name in names:
            scores[name] = [score(math.inf), score(math.inf)]
    entry = neon.report.strict(entry_of(kimg, finals=finals))
    entry["grid"][3]["fd"] = entry["sweep"][0]["fd"] = None
    return entry


# -------------------- samples


def digits_of(seed, count=64):
    return neon.glyphs.draw_glyphs(count, seed)[0]


def opened(address):
    kind, _, text = address.partition(";base64,")
    return kind, np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(text))))


def test_sample_panel_has_whole_pixels_and_transparent_gaps():
    images = digits_of(0, 100)
    panel = neon.plots.sample_panel(images)
    assert panel.shape == (8 * 13 - 1, 8 * 13 - 1, 4)
    tile = panel[2 * 13 : 2 * 13 + 12, 13 : 13 + 12]  # third row, second column: image 17
    assert np.array_equal(tile[..., 0], images[17, 0].numpy()) and (tile[..., 3] == 255).all()
    assert (panel[12] == 0).all() and (panel[:, 25, 3] == 0).all()


def test_colours_of_a_sample_panel():
    images = torch.arange(4 * 3 * 2 * 2, dtype=torch.uint8).reshape(4, 3, 2, 2)
    panel = neon.plots.sample_panel(images)
    assert panel[3:, :2, :3].tolist() == images[2].permute(1, 2, 0).tolist()


def test_sample_pictures_are_exact_to_the_pixel():
    samples = {"global": digits_of(0), "base": digits_of(1)}
    pictures = neon.plots.sample_pictures(samples, 1_000_000)
    assert [*pictures] == ["global", "base"]
    for name, (width, address) in pictures.items():
        kind, found = opened(address)
        assert kind == "data:image/png" and width == found.shape[1] == 103
        assert np.array_equal(found, neon.plots.sample_panel(samples[name]))


@pytest.mark.parametrize(
    "side, kind, most",
    [(16, "png", 8), (32, "png", 6), (64, "png", 3), (160, "jpeg", 2), (300, "jpeg", 1)],
)
def test_large_samples_are_fewer_and_fit(side, kind, most):
    """Noise, which nothing compresses."""
    noise = torch.randint(0, 256, (64, 3, side, side), dtype=torch.uint8)
    pictures = neon.plots.sample_pictures({"base": noise, "global": noise}, 500_000)
    assert sum(len(address) for _, address in pictures.values()) <= 500_000
    for width, address in pictures.values():
        assert address.startswith(f"data:image/{kind};base64,")
        assert width == most * (side + 1) - 1


def test_samples_that_fit_in_no_way_are_not_shown():
    noise = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert neon.plots.sample_pictures({"base": noise}, 1000) == {}


# -------------------- weights


def test_bars_of_the_chosen_weights():
    """Two models of the same blocks; another of layers has axes of its own."""
    entry = entry_of()
    layers = {"in": 0.5, "out": -1.5}
    entry["final"]["searched"] = entry["final"]["searched"] | {"w": layers}
    first, second = axes_of(neon.plots.plot_weights, entry)
    assert names(first) == [*BLOCKS] and names(second) == ["in", "out"]
    for axis, w in ((first, entry["final"]["blockwise"]["w"]), (second, layers)):
        assert [bar.get_width() for bar in axis.patches] == [*w.values()]
        middles = [bar.get_y() + bar.get_height() / 2 for bar in axis.patches]
        assert middles == pytest.approx(range(len(w))) and axis.yaxis_inverted()
        _, line = axis.lines
        assert set(line.get_xdata()) == set(entry["final"]["global"]["w"].values())


def test_two_models_of_the_same_blocks_stand_side_by_side():
    entry = entry_of()
    (axis,) = axes_of(neon.plots.plot_weights, entry)
    found = {}
    for bar in axis.patches:
        found[round(bar.get_y() + bar.get_height() / 2, 2)] = bar.get_width()
    for i, block in enumerate(BLOCKS):
        assert found[i - 0.2] == entry["final"]["blockwise"]["w"][block]
        assert found[i + 0.2] == entry["final"]["searched"]["w"][block]


def test_bars_of_a_study_of_one_weight():
    entry = entry_of()
    for name in ("blockwise", "searched"):
        del entry["final"][name]
    (axis,) = axes_of(neon.plots.plot_weights, entry)
    assert [bar.get_width() for bar in axis.patches] == [1.0] * 3


# -------------------- selection


def test_final_comparison_over_snapshots():
    entries = summary_of((7, 5))["snapshots"]
    (axis,) = axes_of(neon.plots.plot_snapshots, entries, SCORE)
    assert axis.get_xlabel() == "self-training (kimg)" and axis.get_ylabel() == SCORE
    names = [name for name in entries[0]["final"] if name != "collapsed"]
    assert legend_of(axis.figure) == names
    for name, container in zip(names, axis.containers, strict=True):
        for row, entry in zip(points_of(container), entries, strict=True):
            final = entry["final"][name]
            assert row == pytest.approx([entry["kimg"], final["low"], final["high"]])
        assert [*container.lines[0].get_ydata()] == [
            entry["final"][name]["fd"] for entry in entries
        ]


def test_sweep_with_its_intervals():
    entry = entry_of()
    axis, shares = axes_of(neon.plots.plot_sweep, entry, SCORE)
    assert shares.get_xlabel() == "w, the same for all blocks" and axis.get_ylabel() == SCORE
    (container,) = axis.containers
    for row, point in zip(entry["sweep"], points_of(container), strict=True):
        assert point == pytest.approx([row["w_global"], row["low"], row["high"]])
    assert [*container.lines[0].get_ydata()] == [row["fd"] for row in entry["sweep"]]
    for each in (axis, shares):
        (chosen,) = [line for line in each.lines if line.get_label() == "chosen"]
        assert [*chosen.get_xdata()] == [1.0, 1.0]  # what won, not the least of the sweep here
    lines = {line.get_label(): line for line in shares.lines}
    for key in ("precision", "recall"):
        x, y = lines[key].get_data()
        assert list(x) == [row["w_global"] for row in entry["sweep"]]
        assert list(y) == [row[key] for row in entry["sweep"]]


def test_sweep_without_precision():
    entry = entry_of()
    for row in entry["sweep"]:
        del row["precision"], row["recall"]
    (axis,) = axes_of(neon.plots.plot_sweep, entry, SCORE)
    assert axis.get_xlabel() == "w, the same for all blocks" and len(axis.containers) == 1


def test_search_in_its_order_and_the_least_so_far():
    entry = entry_of() | {"search": [{"fd": fd} for fd in (7.0, None, 5.0, 6.0, 4.5)]}
    (axis,) = axes_of(neon.plots.plot_search, entry, SCORE)
    scored, least = axis.lines
    assert [*scored.get_xdata()] == [*least.get_xdata()] == [1, 2, 3, 4, 5]
    assert [*scored.get_ydata()] == pytest.approx([7, math.nan, 5, 6, 4.5], nan_ok=True)
    assert [*least.get_ydata()] == [7, 7, 5, 5, 4.5]
    assert axis.get_xlabel() == "evaluations" and axis.get_ylabel() == SCORE


# -------------------- grid


def test_cells_of_the_grid():
    """Weights 1 and 0.5, 0.25 and 1, 0.5 to 1 of three blocks: no axis is like another."""
    rows = entry_of()["grid"]
    *axes, bar = axes_of(neon.plots.plot_grid, rows, SCORE)
    assert bar.get_ylabel() == SCORE
    assert [axis.get_title() for axis in axes] == ["w of mid = 0.25", "w of mid = 1"]
    for axis, middle in zip(axes, (0.25, 1.0), strict=True):
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("w of dec", "w of enc")
        assert ticks(axis) == ["0.5", "0.75", "1"]
        assert [label.get_text() for label in axis.get_yticklabels()] == ["0.5", "1"]
        cells = axis.images[0].get_array()
        texts = {text.get_position(): text.get_text() for text in axis.texts}
        for row in rows:
            if row["w"]["mid"] == middle:
                i, j = (0.5, 1.0).index(row["w"]["enc"]), (0.5, 0.75, 1.0).index(row["w"]["dec"])
                assert cells[i, j] == row["fd"] and texts[j, i] == f"{row['fd']:.4g}"


def test_frames_of_the_grid():
    """20 + enc - 2 mid + 3 dec is least at enc 0.5, mid 1, dec 0.5; all are 1 at one point."""
    axes = axes_of(neon.plots.plot_grid, entry_of()["grid"], SCORE)[:2]
    frames = []
    for axis in axes:
        for patch in axis.patches:
            x, y = patch.get_xy()
            frames.append(
                (axis.get_title(), round(y + 0.44), round(x + 0.44), patch.get_linestyle()[:2])
            )
    assert sorted(frames) == [("w of mid = 1", 0, 0, "so"), ("w of mid = 1", 1, 2, "--")]


# -------------------- judges


@pytest.mark.parametrize("against", ["base", "global", "blockwise"])
def test_gains_in_every_judge(against):
    entry = entry_of()
    (axis,) = axes_of(neon.plots.plot_judges, entry, SCORE, against)
    assert axis.get_xlabel() == f"difference from {against}, % of its distance"
    assert names(axis) == ["own+two\n(selected with)", "b", "a"]
    assert axis.get_ylim() == (2.5, -0.5)  # the own features on top
    claims = []
    for claim in entry["claims"]:
        if claim["against"] == against and claim["model"] != "collapsed":
            claims.append(claim)
    assert legend_of(axis.figure) == [claim["model"] for claim in claims]
    filled, hollow, _ = (axis.lines[k:-2:3] for k in range(3))
    for k, (claim, container) in enumerate(zip(claims, axis.containers, strict=True)):
        gains = [claim["own"], claim["judges"]["b"], claim["judges"]["a"]]
        for i, (gain, row) in enumerate(zip(gains, points_of(container, False), strict=True)):
            assert abs(row[0] - i) < 0.4
            shares = [gain[f"relative_{key}"] for key in ("low", "high")]
            assert row[1:] == pytest.approx(100 * np.array(shares))
        held = {True: [], False: []}
        for gain in gains:
            held[gain["verdict"] in ("better", "worse")].append(100 * gain["relative_difference"])
        assert [*filled[k].get_xdata()] == held[True] and [*hollow[k].get_xdata()] == held[False]
        assert filled[k].get_markerfacecolor() != hollow[k].get_markerfacecolor() == "none"


# -------------------- training seeds


def test_gains_of_every_training_seed():
    summaries = [summary_of((5,), seed, shift) for seed, shift in ((11, 0.0), (3, 0.4))]
    rows = neon.verdicts.claims_over_seeds(summaries)
    (axis,) = axes_of(neon.plots.plot_seeds, rows)
    assert axis.get_xlabel() == "difference of the distance (%)"
    rows = [row for row in rows if row["model"] != "collapsed"]
    assert names(axis) == [f"{row['model']} against {row['against']}" for row in rows]
    assert axis.yaxis_inverted()
    assert legend_of(axis.figure) == ["own features", "mean of the other judges"]
    drawn, means = {}, {}
    for line in axis.lines:
        x, y = line.get_data()
        if len(x) and line.get_marker() in "o^":
            drawn[line.get_marker(), round(float(y[0]))] = list(x)
        elif len(x) and line.get_marker() == "|":
            means[round(float(y[0]) + 0.14, 2)] = float(x[0])
    for i, row in enumerate(rows):
        assert drawn["o", i] == pytest.approx([100 * share for share in row["own_relative"]])
        assert drawn["^", i] == pytest.approx([100 * share for share in row["relative"]])
        assert means[i] == pytest.approx(100 * np.mean(row["own_relative"]))


def test_snapshots_of_several_lengths_are_told_apart_over_seeds():
    rows = neon.verdicts.claims_over_seeds([summary_of((7, 5))])
    (axis,) = axes_of(neon.plots.plot_seeds, rows)
    assert {"global against base, 7 kimg", "global against base, 5 kimg"} <= set(names(axis))


# -------------------- figures for the page

PLOTS = {
    "weights": lambda entry: (neon.plots.plot_weights, entry),
    "judges": lambda entry: (neon.plots.plot_judges, entry, SCORE, "base"),
    "sweep": lambda entry: (neon.plots.plot_sweep, entry, SCORE),
    "grid": lambda entry: (neon.plots.plot_grid, entry["grid"], SCORE),
    "snapshots": lambda entry: (neon.plots.plot_snapshots, [entry], SCORE),
}


@pytest.mark.parametrize("kind", PLOTS)
@pytest.mark.parametrize("diverges", [(), ("collapsed",), ("global",)], ids=str)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_figures_are_svg_of_the_page(kind, diverges):
    """Well-formed, told in words, in the page's colours, with nothing from elsewhere."""
    figure = neon.plots.drawn("title", *PLOTS[kind](diverging(*diverges)))
    tree = xml.etree.ElementTree.fromstring(figure.svg)
    assert tree.get("role") == "img" and len(tree.get("aria-label")) > 20
    assert "currentColor" in figure.svg and neon.plots.INK not in figure.svg
    assert "<metadata" not in figure.svg and "<style" not in figure.svg
    addresses = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', figure.svg)
    assert all((one or other).startswith(("#", "data:image/png")) for one, other in addresses)
    assert 100 < figure.width < 900


def test_colour_of_a_model_is_the_pages():
    svg = neon.plots.drawn("", neon.plots.plot_weights, entry_of()).svg
    for name in ("global", "blockwise", "searched"):
        assert f"var(--{name}, {neon.plots.STYLES[name]['color']})" in svg


def test_two_figures_share_no_identifier():
    figures = [neon.plots.drawn("", neon.plots.plot_sweep, entry_of(k), SCORE) for k in (5, 7)]
    one, other = (set(re.findall(r' id="([^"]*)"', figure.svg)) for figure in figures)
    assert one and not one & other


HOSTILE = [
    "<script>alert(1)</script>",
    "\"'&amp;",
    "$x^$",
    "x" * 300,
    "\u202eolleh",
    "\u0627\u0644",
    "\x00",
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_in_a_figure_stay_text(name):
    entry = entry_of()
    for model in ("blockwise", "searched", "global"):
        w = entry["final"][model]["w"]
        entry["final"][model]["w"] = {name: 0.25, **{block: w[block] for block in ("mid", "dec")}}
    svg = neon.plots.drawn("", neon.plots.plot_weights, entry).svg
    tree = xml.etree.ElementTree.fromstring(svg)
    texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    shown = neon.files.printable(name, 36)
    assert shown in texts and "<script" not in svg and len(shown) <= 36
    assert neon.files.printable(name, 36) in tree.get("aria-label")


def test_a_model_of_another_name_has_a_style_too():
    styles = {name: neon.plots.style_of(name) for name in ("base", "base, 36 steps", "guided")}
    assert styles["base"] == styles["base, 36 steps"] != styles["guided"]
