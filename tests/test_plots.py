"""What adaptive_neon/plots.py promises: labels, ticks and data of the axes, read back."""

import json
import math

import matplotlib
import numpy as np
import PIL.Image
import pytest
import torch
from made import SCORE, entry_of, finals_of, score, summary_of

import adaptive_neon as neon

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def axes_of(plot, data):
    plot(plt, data)
    return plt.gcf().axes


def ticks(axis):
    return [label.get_text() for label in axis.get_xticklabels()]


def bars_of(container):
    """x, value, low and high of every point of an errorbar()."""
    line, _, (lines,) = container.lines
    rows = []
    for x, y, segment in zip(*line.get_data(), lines.get_segments(), strict=True):
        rows.append((x, y, *segment[:, 1]))
    return np.array(rows, float)


def legend_of(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


# -------------------- samples


def test_sample_panel_enlarges_whole_pixels():
    images = neon.glyphs.draw_glyphs(100, 0)[0]
    panel = neon.plots.sample_panel(images, gap=2, width=400)
    assert panel.shape == (8 * 52, 8 * 52, 3)
    tile = panel[52 + 2 : 52 + 50, 2:50, 0]  # second row, first column: image 8
    assert np.array_equal(tile, images[8, 0].numpy().repeat(4, 0).repeat(4, 1))
    assert (panel[50:54] == 255).all()


@pytest.mark.parametrize("side, columns", [(32, 8), (256, 3), (1024, 2)])
def test_sample_panels_of_larger_images(side, columns):
    images = torch.zeros(64, 3, side, side, dtype=torch.uint8)
    panel = neon.plots.sample_panel(images)
    assert panel.shape[0] == panel.shape[1]
    assert panel.shape[1] // (side + 4) == columns


def test_sample_picture_is_exact_to_the_pixel(tmp_path):
    pictures = {
        "global": neon.glyphs.draw_glyphs(64, 0)[0],
        "base": neon.glyphs.draw_glyphs(64, 1)[0],
    }
    data = (entry_of(), pictures)
    neon.plots.plot_report({"s.png": (neon.plots.plot_samples, data)}, tmp_path)
    found = np.asarray(PIL.Image.open(tmp_path / "s.png").convert("RGB"))
    for i, images in enumerate(pictures.values()):
        panel = neon.plots.sample_panel(images)
        left = 12 + i * (panel.shape[1] + 12)
        part = found[-12 - panel.shape[0] : -12, left : left + panel.shape[1]]
        assert np.array_equal(part, panel)


def test_every_sample_panel_has_its_distance_and_weights():
    entry = entry_of()
    images = neon.glyphs.draw_glyphs(16, 0)[0]
    neon.plots.plot_samples(plt, (entry, {"searched": images, "base": images}))
    texts = plt.gcf().texts
    assert texts[0].get_position()[0] < texts[1].get_position()[0]
    for name, text in zip(("searched", "base"), texts, strict=True):
        final = entry["final"][name]
        title = neon.report.weights_title(final["w"])
        assert text.get_text() == f"{name}: {final['fd']:.4g}\nw = {title}"


# -------------------- scores


def test_bars_of_the_final_comparison():
    entry = entry_of()
    axis = axes_of(neon.plots.plot_scores, summary_of(snapshots=[entry]))[0]
    names = list(entry["final"])
    assert ticks(axis) == names and axis.get_ylabel() == SCORE
    (errors,) = (
        c for c in axis.containers if isinstance(c, matplotlib.container.ErrorbarContainer)
    )
    intervals = errors.lines[2][0].get_segments()
    heights = {}
    for patch in axis.patches:
        heights[round(patch.get_x() + patch.get_width() / 2)] = patch.get_height()
    for i, name in enumerate(names):
        final = entry["final"][name]
        assert heights[i] == pytest.approx(final["fd"])
        assert intervals[i].flatten() == pytest.approx([i, final["low"], i, final["high"]])


def test_final_comparison_over_snapshots():
    summary = summary_of((7, 5))
    axis = axes_of(neon.plots.plot_scores, summary)[0]
    assert axis.get_xlabel() == "self-training (kimg)"
    names = [name for name in summary["snapshots"][0]["final"] if name != "collapsed"]
    assert legend_of(axis) == names
    for name, container in zip(names, axis.containers, strict=True):
        rows = bars_of(container)
        for row, entry in zip(rows, summary["snapshots"], strict=True):
            final = entry["final"][name]
            assert row == pytest.approx([entry["kimg"], final["fd"], final["low"], final["high"]])


def test_sweep_of_every_snapshot():
    summary = summary_of((7, 5))
    _, distance, shares = axes_of(neon.plots.plot_scores, summary)
    assert distance.get_xlabel() == shares.get_xlabel() == "w, the same for all blocks"
    assert distance.get_ylabel() == SCORE and legend_of(distance) == ["7 kimg", "5 kimg"]
    for entry, container in zip(summary["snapshots"], distance.containers, strict=True):
        for row, point in zip(entry["sweep"], bars_of(container), strict=True):
            assert point == pytest.approx([row["w_global"], row["fd"], row["low"], row["high"]])
    lines = {line.get_label(): line for line in shares.lines}
    for entry in summary["snapshots"]:
        for key in ("precision", "recall"):
            x, y = lines[f"{key}, {entry['kimg']} kimg"].get_data()
            assert list(x) == [row["w_global"] for row in entry["sweep"]]
            assert list(y) == [row[key] for row in entry["sweep"]]


# -------------------- grid


def test_cells_of_the_grid():
    """Weights 1 and 0.5, 0.25 and 1, 0.5 to 1 of three blocks: no axis is like another."""
    rows = entry_of()["grid"]
    *axes, bar = axes_of(neon.plots.plot_grid, (rows, SCORE))
    assert bar.get_ylabel() == SCORE
    assert [axis.get_title() for axis in axes] == ["w_mid = 0.25", "w_mid = 1"]
    for axis, middle in zip(axes, (0.25, 1.0), strict=True):
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("w_dec", "w_enc")
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
    axes = axes_of(neon.plots.plot_grid, (entry_of()["grid"], SCORE))[:2]
    frames = []
    for axis in axes:
        for patch in axis.patches:
            x, y = patch.get_xy()
            frames.append(
                (axis.get_title(), round(y + 0.44), round(x + 0.44), patch.get_linestyle()[:2])
            )
    assert frames == [("w_mid = 1", 0, 0, "so"), ("w_mid = 1", 1, 2, "--")]


# -------------------- judges


def test_gains_in_every_judge():
    entry = entry_of()
    axes = axes_of(neon.plots.plot_judges, (entry, SCORE))
    assert [axis.get_title() for axis in axes] == [
        "against base: lower is better",
        "against global: lower is better",
    ]
    for axis, against in zip(axes, ("base", "global"), strict=True):
        assert ticks(axis) == ["own +\ntwo (own)", "b", "a"]
        claims = [claim for claim in entry["claims"] if claim["against"] == against]
        assert legend_of(axis) == [claim["model"] for claim in claims]
        for claim, container in zip(claims, axis.containers, strict=True):
            gains = [claim["own"], claim["judges"]["b"], claim["judges"]["a"]]
            for i, (gain, row) in enumerate(zip(gains, bars_of(container), strict=True)):
                assert abs(row[0] - i) < 0.4
                shares = [gain[f"relative_{key}"] for key in ("difference", "low", "high")]
                assert row[1:] == pytest.approx(100 * np.array(shares))


# -------------------- training seeds


def test_gains_of_every_training_seed():
    summaries = [summary_of((5,), seed, shift) for seed, shift in ((11, 0.0), (3, 0.4))]
    rows = neon.verdicts.claims_over_seeds(summaries)
    (axis,) = axes_of(neon.plots.plot_seeds, {"over_seeds": rows})
    assert axis.get_xlabel() == "difference of the distance (%)"
    labels = [label.get_text() for label in axis.get_yticklabels()]
    shown = [row for row in rows if row["model"] != "collapsed"]
    assert labels == [
        f"{row['model']} against {row['against']}, {row['kimg']} kimg" for row in shown
    ]
    assert axis.yaxis_inverted() and legend_of(axis) == ["own features", "other judges"]
    drawn = {}
    for line in axis.lines:
        x, y = line.get_data()
        if len(x) and line.get_marker() in "o^":
            drawn[line.get_marker(), round(float(y[0]))] = list(x)
    rows = [row for row in rows if row["model"] != "collapsed"]
    for i, row in enumerate(rows):
        assert drawn["o", i] == pytest.approx([100 * share for share in row["own_relative"]])
        assert drawn["^", i] == pytest.approx([100 * share for share in row["relative"]])


# -------------------- all pictures of a run


@pytest.mark.parametrize(
    "diverging, kimgs", [(None, (1,)), ("collapsed", (2, 1)), ("global", (1,))], ids=str
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_pictures_of_a_run_from_what_the_summary_holds(tmp_path, diverging, kimgs):
    entries = []
    for kimg in kimgs:
        finals = finals_of(kimg)
        if diverging:
            for scores in finals.values():
                scores[diverging] = [score(math.inf), score(math.inf)]
        entries.append(entry_of(kimg, finals=finals))
        entries[-1]["grid"][3]["fd"] = math.inf
    summary = summary_of(snapshots=entries)
    neon.report.write_report(summary, tmp_path)
    images = neon.glyphs.draw_glyphs(64, 0)[0]
    samples = {kimg: {"base": images, "blockwise": images} for kimg in kimgs}
    data = json.loads((tmp_path / "summary.json").read_text())
    neon.plots.plot_report(neon.plots.figures_of(data, samples), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    for kimg in kimgs:
        for kind in ("samples", "grid", "judges"):
            assert f"{kind}_{kimg:06d}.png" in names
    with PIL.Image.open(tmp_path / "scores.png") as picture:
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)


@pytest.mark.parametrize(
    "change, missing",
    [({"grid": []}, "grid_000005.png"), ({"judges": {}}, "judges_000005.png")],
)
def test_what_was_not_measured_is_not_drawn(change, missing):
    samples = {5: {}}
    figures = neon.plots.figures_of(summary_of(snapshots=[entry_of()]), samples)
    fewer = neon.plots.figures_of(summary_of(snapshots=[entry_of() | change]), samples)
    assert set(figures) - set(fewer) == {missing}


def test_a_model_of_another_name_has_a_style_too():
    styles = {name: neon.plots.style_of(name) for name in ("base", "base, 36 steps", "guided")}
    assert styles["base"] == styles["base, 36 steps"] != styles["guided"]
