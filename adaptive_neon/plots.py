"""Pictures of a study."""

import math
import re
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from .files import write_atomically
from .report import strict, weights_title
from .verdicts import number

# Dark to light, so that they stay apart in grey print; markers and hatches repeat them.
STYLES = {
    "base": {"color": "#707070", "marker": "s", "hatch": ""},
    "collapsed": {"color": "#b4b4b4", "marker": "x", "hatch": "xx"},
    "global": {"color": "#1f5fa8", "marker": "o", "hatch": ""},
    "blockwise": {"color": "#e07b00", "marker": "^", "hatch": "//"},
    "searched": {"color": "#f2c94c", "marker": "D", "hatch": ".."},
    "random": {"color": "#c9c9c9", "marker": "v", "hatch": ""},
}


OTHER = {"color": "#3f8f6b", "marker": "P", "hatch": "||"}


def style_of(name):
    return STYLES.get(re.split("[ ,]", name)[0], OTHER)


def figures_of(summary, samples):
    """{file name: (function, data)} of one training seed's pictures."""
    summary = strict(summary)
    figures = {"scores.png": (plot_scores, summary)}
    for entry in summary["snapshots"]:
        kimg = entry["kimg"]
        figures[f"samples_{kimg:06d}.png"] = plot_samples, (entry, samples[kimg])
        if len(entry["blocks"]) == 3 and entry["grid"]:
            figures[f"grid_{kimg:06d}.png"] = plot_grid, (entry["grid"], summary["score"])
        if entry["judges"]:
            figures[f"judges_{kimg:06d}.png"] = plot_judges, (entry, summary["score"])
    return figures


def error_bars(rows, key="fd"):
    """Values and the lengths of their intervals below and above, as errorbar() takes them; where a
    sampler diverged (None) there is nothing to draw."""
    table = np.array([[row[key], row["low"], row["high"]] for row in rows], float)
    values, low, high = table.reshape(-1, 3).T
    return values, np.stack([values - low, high - values]).clip(0)


def plot_scores(plt, summary):
    """Final distances; distance, precision and recall against the global weight."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    plot_final(axes[0], summary["snapshots"])
    axes[0].set(title="final comparison, 95% (not paired)", ylabel=summary["score"])
    colours = plt.get_cmap("cividis")(np.linspace(0, 0.8, len(summary["snapshots"])))
    plot_sweep(*axes[1:], summary["snapshots"], colours)
    axes[1].set(title="selection seeds, 95% (not paired)", ylabel=summary["score"])


def plot_final(axis, entries):
    """Final distances with their intervals, against the snapshot where there are several."""
    names = list(entries[0]["final"])
    if len(entries) == 1:
        values, errors = error_bars([entries[0]["final"][name] for name in names])
        for i, name in enumerate(names):
            style = style_of(name)
            axis.bar(i, values[i], color=style["color"], hatch=style["hatch"], edgecolor="white")
        axis.errorbar(range(len(names)), values, errors, fmt="none", ecolor="black", capsize=4)
        axis.set_xticks(range(len(names)), names, rotation=20)
        axis.set(ylim=(0, None))
        return

    x = [entry["kimg"] for entry in entries]
    for name in names:
        if name == "collapsed":
            continue  # so far above that the others would be one line
        values, errors = error_bars([entry["final"][name] for entry in entries])
        style = style_of(name)
        axis.errorbar(x, values, errors, color=style["color"], marker=style["marker"], label=name)
    axis.set(xlabel="self-training (kimg)")
    axis.legend()


def plot_sweep(distance, shares, entries, colours):
    """Distance with its interval, precision and recall against the global weight."""
    for entry, colour in zip(entries, colours, strict=True):
        kimg = f", {entry['kimg']:g} kimg" if len(entries) > 1 else ""
        rows = [row for row in entry["sweep"] if row["fd"] is not None]
        x = [row["w_global"] for row in rows]
        values, errors = error_bars(rows)
        distance.errorbar(x, values, errors, color=colour, marker="o", capsize=3, label=kimg[2:])
        if all("precision" in row for row in rows):
            for key, line in (("precision", "-"), ("recall", "--")):
                y = [row[key] for row in rows]
                shares.plot(x, y, line, color=colour, marker="o", label=f"{key}{kimg}")
    distance.axvline(0, color="#8c8c8c", linewidth=0.8, linestyle=":")
    distance.set(xlabel="w, the same for all blocks")
    if len(entries) > 1:
        distance.legend()
    if shares.lines:
        shares.set(xlabel="w, the same for all blocks", title="selection seeds")
        shares.legend()
    else:
        shares.set_visible(False)


def plot_grid(plt, data):
    """Heat maps over the first and last block, one for each weight of the middle one: values in the
    cells, the least framed, equal weights outlined."""
    rows, score = data
    first, middle, last = rows[0]["w"]
    columns = {block: sorted({row["w"][block] for row in rows}) for block in (first, middle, last)}
    table = {}
    for row in rows:
        if row["fd"] is not None:
            table[row["w"][first], row["w"][middle], row["w"][last]] = row["fd"]
    low, high = min(table.values(), default=0), max(table.values(), default=1)
    least = min(table, key=table.get, default=None)

    width = 0.9 + max(1.6, 0.62 * len(columns[last]))
    height = 1.0 + max(1.3, 0.46 * len(columns[first]))
    count = len(columns[middle])
    figure, axes = plt.subplots(
        1, count, figsize=(width * count + 0.8, height), squeeze=False, layout="constrained"
    )
    for axis, m in zip(axes[0], columns[middle], strict=True):
        cells = [[table.get((y, m, x), np.nan) for x in columns[last]] for y in columns[first]]
        image = axis.imshow(cells, vmin=low, vmax=high, cmap="cividis", aspect="auto")
        axis.set(xlabel=f"w_{last}", ylabel=f"w_{first}", title=f"w_{middle} = {m:g}")
        axis.set_xticks(range(len(columns[last])), [f"{value:g}" for value in columns[last]])
        axis.set_yticks(range(len(columns[first])), [f"{value:g}" for value in columns[first]])
        for i, y in enumerate(columns[first]):
            for j, x in enumerate(columns[last]):
                value = table.get((y, m, x))
                if value is None:
                    continue
                dark = value < (low + high) / 2
                ink = "white" if dark else "black"
                axis.text(j, i, f"{value:.4g}", ha="center", va="center", color=ink, fontsize=8)
                if x == y == m:
                    frame_cell(plt, axis, i, j, edgecolor=ink, linestyle="--", linewidth=1.2)
                if (y, m, x) == least:
                    frame_cell(plt, axis, i, j, edgecolor=ink, linewidth=3)
    figure.colorbar(image, ax=axes[0].tolist(), label=score)
    figure.suptitle("solid frame: the least; dashed: one weight for all blocks", fontsize=9)


def frame_cell(plt, axis, i, j, **how):
    inset = 0.06
    corner = (j - 0.5 + inset, i - 0.5 + inset)
    side = 1 - 2 * inset
    axis.add_patch(plt.Rectangle(corner, side, side, fill=False, **how))


def plot_judges(plt, data):
    """Relative gains side by side, one group of points for each judge; the selection's own features
    come first."""
    entry, score = data
    panels = {"base": [], "global": []}  # claims against each
    for claim in entry["claims"]:
        if claim["against"] in panels:
            panels[claim["against"]].append(claim)
    panels = {against: claims for against, claims in panels.items() if claims}
    own = score.removeprefix("FD (").split(",")[0].replace("+", " +\n")
    names = [f"{own} (own)", *entry["judges"]]

    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for axis, (against, claims) in zip(axes[0], panels.items(), strict=True):
        for place, claim in enumerate(claims):
            gains = [claim["own"], *(claim["judges"][judge] for judge in entry["judges"])]
            rows = []
            for gain in gains:
                keys = {"fd": "difference", "low": "low", "high": "high"}
                rows.append({key: gain[f"relative_{of}"] for key, of in keys.items()})
            values, errors = error_bars(rows)
            x = np.arange(len(names)) + 0.14 * (place - (len(claims) - 1) / 2)
            style = style_of(claim["model"])
            axis.errorbar(
                x,
                100 * values,
                100 * errors,
                fmt=style["marker"],
                color=style["color"],
                markeredgecolor="black",
                ecolor="#404040",
                capsize=3,
                label=claim["model"],
            )
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(0.5, color="#8c8c8c", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axis.set(
            ylabel="difference of the distance (%)", title=f"against {against}: lower is better"
        )
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # hides no interval


def plot_seeds(plt, summary):
    """Relative gains of every training seed, in the selection's features and in the mean of the
    judges that no selection saw."""
    rows = [row for row in summary["over_seeds"] if row["model"] != "collapsed"]
    figure, axis = plt.subplots(figsize=(7, 1 + 0.45 * len(rows)), layout="constrained")
    sides = (("own_relative", "own features", "o", -0.12), ("relative", "other judges", "^", 0.12))
    for key, label, marker, shift_y in sides:
        colour = STYLES["global" if key == "own_relative" else "blockwise"]["color"]
        for i, row in enumerate(rows):
            x = 100 * np.array(row[key], float)
            axis.plot(x, np.full(len(x), i + shift_y), marker, color=colour, alpha=0.6)
            if len(x):
                axis.plot(
                    np.mean(x[np.isfinite(x)]), i + shift_y, "|", color="black", markersize=14
                )
        axis.plot([], [], marker, color=colour, label=label)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(
        range(len(rows)),
        [f"{row['model']} against {row['against']}, {row['kimg']:g} kimg" for row in rows],
    )
    axis.invert_yaxis()
    axis.set(xlabel="difference of the distance (%)")
    figure.suptitle("one point a training seed, bar: their mean; lower is better")
    axis.legend(fontsize=8)


DPI = 150


def sample_panel(images, most=8, gap=2, width=400):
    """uint8 [N, C, H, W] -> uint8 [height, width, 3]: at most 8 x 8 of them, whole pixels enlarged,
    white gaps."""
    images = images[: most * most].expand(-1, 3, -1, -1)
    columns = min(most, max(2, 800 // images.shape[3]), math.isqrt(len(images)))
    zoom = max(1, width // (columns * images.shape[3]))
    images = images[: columns * columns].repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    framed = F.pad(images, [gap, gap, gap, gap], value=255)
    rows = [torch.cat(list(row), 2) for row in framed.split(columns)]
    return torch.cat(rows, 1).permute(1, 2, 0).numpy()


def plot_samples(plt, data, title_height=56, margin=12):
    """One image grid per model, all from the same noise, drawn pixel by pixel."""
    entry, pictures = data
    panels = {name: sample_panel(images) for name, images in pictures.items()}
    height = max(panel.shape[0] for panel in panels.values()) + title_height + margin
    width = sum(panel.shape[1] + margin for panel in panels.values()) + margin
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    x = margin
    for name, panel in panels.items():
        figure.figimage(panel, x, margin, origin="upper")
        result = entry["final"][name]
        text = f"{name}: {number(result['fd'])}\nw = {weights_title(result['w'])}"
        figure.text(x / width, 1 - 8 / height, text, fontsize=8, va="top")
        x += panel.shape[1] + margin


def plot_report(figures, out):
    """figures: {file name: (function, data)}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, (plot, data) in figures.items():
        plot(plt, data)
        write_atomically(out / name, partial(plt.savefig, dpi=DPI))
        plt.close()
