"""Figures and sample panels of a report: SVG and PNG text, from plain data."""

import base64
import dataclasses
import io
import math
import re
import warnings
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from .files import printable
from .verdicts import number, range_text

# Markers repeat what colours say. The page sets each colour for light and for dark; these are the
# ones of a figure that is saved.
STYLES = {
    "base": {"color": "#6a6a6a", "marker": "s"},
    "collapsed": {"color": "#9d9d9d", "marker": "x"},
    "global": {"color": "#1f5fa8", "marker": "o"},
    "blockwise": {"color": "#c46200", "marker": "^"},
    "searched": {"color": "#7d3c98", "marker": "D"},
    "random": {"color": "#8b8b8b", "marker": "v"},
    "other": {"color": "#2b7a58", "marker": "P"},
}
INK = "#0b0c0d"  # becomes the colour of the page's text

# Text stays text, so that it is read aloud, found, and in the page's font; dollars are no formulas.
RC: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


def style_of(name) -> dict:
    return STYLES.get(re.split("[ ,]", name)[0], STYLES["other"])


def label(name) -> str:
    """A name in a figure: one line, cut off."""
    return printable(name, 36)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing for the page."""

    title: str
    svg: str
    width: int  # pixels at which its text has the page's size


def drawn(title, plot, *data) -> Figure:
    """plot(*data) -> a figure of matplotlib and what it shows, for those who do not see it."""
    import matplotlib

    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|.*missing from font")  # the browser has it
        figure, shown = plot(*data)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    width = round(figure.get_size_inches()[0] * 96)
    return Figure(title, inline(file.getvalue(), shown), width)


def inline(svg: str, shown: str) -> str:
    """An SVG file as a part of a page: no prolog, no metadata, no identifiers that another figure
    has too, colours that the page decides."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace(INK, "currentColor")
    for name, style in STYLES.items():
        svg = svg.replace(style["color"], f"var(--{name}, {style['color']})")
    text = printable(shown, 2000).replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{text}" ', 1)


def new_figure(width, height):
    """A figure of so many inches. matplotlib.pyplot would keep it, and ask for a display."""
    from matplotlib.figure import Figure as Canvas

    return Canvas((width, height), layout="constrained")


def error_bars(rows):
    """Values and the lengths of their intervals below and above, as errorbar() takes them; where a
    sampler diverged (None) there is nothing to draw."""
    table = np.array([[row["fd"], row["low"], row["high"]] for row in rows], float)
    values, low, high = table.reshape(-1, 3).T
    return values, np.stack([values - low, high - values]).clip(0)


# -------------------- weights


def plot_weights(entry):
    """The chosen weights of every block, one row of axes a partition; dashed: the global one."""
    groups: dict[tuple, list] = {}
    for name in ("blockwise", "searched"):
        if name in entry["final"]:
            w = entry["final"][name]["w"]
            groups.setdefault(tuple(w), []).append(name)
    everywhere = next(iter(entry["final"]["global"]["w"].values()))
    if not groups:
        groups[tuple(entry["final"]["global"]["w"])] = ["global"]

    heights = [0.3 + 0.22 * len(blocks) * len(names) for blocks, names in groups.items()]
    longest = max(len(label(block)) for blocks in groups for block in blocks)
    figure = new_figure(2.4 + 0.07 * longest, 1.2 + sum(heights))
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    parts = [f"global weight {everywhere:g}"]
    for axis, (blocks, names) in zip(axes, groups.items(), strict=True):
        for k, name in enumerate(names):
            values = [entry["final"][name]["w"][block] for block in blocks]
            y = np.arange(len(blocks)) + 0.8 * ((k + 0.5) / len(names) - 0.5)
            axis.barh(y, values, 0.7 / len(names), color=style_of(name)["color"], label=name)
            told = (f"{label(b)} {value:.3g}" for b, value in zip(blocks, values, strict=True))
            parts.append(f"{name}: {', '.join(told)}")
        axis.set_yticks(range(len(blocks)), [label(block) for block in blocks])
        axis.invert_yaxis()
        axis.axvline(0, color=INK, linewidth=0.8)
        colour = style_of("global")["color"]
        axis.axvline(everywhere, color=colour, linestyle="--", label=f"global, {everywhere:g}")
    handles = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2)
    axes[-1].set(xlabel="w")
    return figure, f"Weights by block; {'; '.join(parts)}"


# -------------------- judges


def plot_judges(entry, score, against):
    """Forest plot: differences against one model in shares of its distance, a row for each judge,
    the selection's own features first; filled where the verdict holds."""
    claims = []
    for claim in entry["claims"]:
        if claim["against"] == against and claim["model"] != "collapsed":
            claims.append(claim)
    judges = list(claims[0]["judges"])
    own = label(score.removeprefix("FD (").split(",")[0])
    names = [f"{own}\n(selected with)", *map(label, judges)]

    figure = new_figure(5.6, 1.0 + len(names) * (0.28 + 0.15 * len(claims)))
    axis = figure.subplots()
    shown = []
    for place, claim in enumerate(claims):
        gains = [claim["own"], *(claim["judges"][judge] for judge in judges)]
        rows = []
        for gain in gains:
            keys = {"fd": "difference", "low": "low", "high": "high"}
            rows.append({key: gain[f"relative_{of}"] for key, of in keys.items()})
        values, errors = error_bars(rows)
        y = np.arange(len(names)) + 0.75 * ((place + 0.5) / len(claims) - 0.5)
        style = style_of(claim["model"])
        axis.errorbar(
            100 * values,
            y,
            xerr=100 * errors,
            fmt="none",
            ecolor=style["color"],
            elinewidth=1.5,
        )
        held = np.array([gain["verdict"] in ("better", "worse") for gain in gains])
        for which, filled in ((held, True), (~held, False)):
            axis.plot(
                100 * values[which],
                y[which],
                style["marker"],
                color=style["color"],
                markerfacecolor=style["color"] if filled else "none",
            )
        axis.plot([], [], style["marker"], color=style["color"], label=label(claim["model"]))
        told = (f"{n} {range_text(g)}" for n, g in zip(["own features", *judges], gains))
        shown.append(f"{claim['model']}: {', '.join(told)}")
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.axhline(0.5, color=INK, alpha=0.4, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set(xlabel=f"difference from {label(against)}, % of its distance")
    figure.legend(loc="outside lower center", ncols=3)
    return figure, f"Differences from {against} in every judge. {'; '.join(shown)}"


# -------------------- selection


def plot_sweep(entry, score):
    """Distance and its interval against the global weight; below, precision and recall, where there
    are any."""
    rows = [row for row in entry["sweep"] if row["fd"] is not None]
    shared = [row for row in entry["sweep"] if "precision" in row]
    chosen = next(iter(entry["final"]["global"]["w"].values()))
    colour = style_of("global")["color"]
    figure = new_figure(5.2, 5.6 if shared else 3.4)
    axes = figure.subplots(2 if shared else 1, 1, sharex=True, squeeze=False)[:, 0]
    for axis in axes:
        axis.axvline(0, color=INK, alpha=0.4, linewidth=0.8, linestyle=":")
        axis.axvline(chosen, color=colour, linestyle="--", label="chosen")

    values, errors = error_bars(rows)
    x = [row["w_global"] for row in rows]
    axes[0].errorbar(x, values, errors, color=colour, marker="o", capsize=3)
    axes[0].set(ylabel=label(score))
    if shared:
        x = [row["w_global"] for row in shared]
        for key, line, name in (("precision", "-", "global"), ("recall", "--", "blockwise")):
            style = style_of(name)
            y = [row[key] for row in shared]
            axes[1].plot(x, y, line, color=style["color"], marker=style["marker"], label=key)
        axes[1].set(ylabel="share of samples, of real images")
    axes[-1].set(xlabel="w, the same for all blocks")
    axes[-1].legend()

    told = []
    for row in entry["sweep"]:
        told.append(f"{row['w_global']:g}: {number(row['fd'])}")
        if "precision" in row:
            told.append(f"precision {row['precision']:.3f}, recall {row['recall']:.3f}")
    return figure, f"{score} against the global weight, chosen {chosen:g}. {', '.join(told)}"


MOST_CELLS = 200  # of a grid, with a number in each


def plot_grid(rows, score):
    """Heat maps over the first and last block, one for each weight of the middle one: values in the
    cells, the least framed, equal weights outlined."""
    first, middle, last = rows[0]["w"]
    ys, ms, xs = (sorted({row["w"][block] for row in rows}) for block in (first, middle, last))
    finite = [row for row in rows if row["fd"] is not None]
    values = [row["fd"] for row in finite]
    low, high = min(values, default=0), max(values, default=1)
    least = min(finite, key=lambda row: row["fd"], default=None)

    width = 0.9 + max(1.6, 0.62 * len(xs))
    height = 1.0 + max(1.3, 0.46 * len(ys))
    figure = new_figure(width * len(ms) + 0.8, height)
    axes = figure.subplots(1, len(ms), squeeze=False)[0]
    for axis, m in zip(axes, ms, strict=True):
        cells = np.full((len(ys), len(xs)), np.nan)
        for row in finite:
            y, at, x = row["w"].values()
            if at != m:
                continue
            i, j = ys.index(y), xs.index(x)
            cells[i, j] = row["fd"]
            ink = "white" if row["fd"] < (low + high) / 2 else "black"
            if len(finite) <= MOST_CELLS:
                text = f"{row['fd']:.4g}"
                axis.text(j, i, text, ha="center", va="center", color=ink, fontsize=8)
            if x == y == m:
                frame_cell(axis, i, j, edgecolor=ink, linestyle="--", linewidth=1.2)
            if row is least:
                frame_cell(axis, i, j, edgecolor=ink, linewidth=3)
        image = axis.imshow(cells, vmin=low, vmax=high, cmap="cividis", aspect="auto")
        axis.set(xlabel=f"w of {label(last)}", ylabel=f"w of {label(first)}")
        axis.set(title=f"w of {label(middle)} = {m:g}")
        axis.set_xticks(range(len(xs)), [f"{value:g}" for value in xs])
        axis.set_yticks(range(len(ys)), [f"{value:g}" for value in ys])
    figure.colorbar(image, ax=list(axes), label=label(score))
    best = "none finite"
    if least is not None:
        places = (f"{block} {value:g}" for block, value in least["w"].items())
        best = f"{number(least['fd'])} at {', '.join(places)}"
    return figure, f"{score} of {len(rows)} points of the grid; the least: {best}"


def frame_cell(axis, i, j, **how):
    from matplotlib.patches import Rectangle

    inset = 0.06
    corner = (j - 0.5 + inset, i - 0.5 + inset)
    side = 1 - 2 * inset
    axis.add_patch(Rectangle(corner, side, side, fill=False, **how))


def plot_search(entry, score):
    """Every score of the search in its order, and the least so far."""
    values = np.array([row["fd"] for row in entry["search"]], float)
    least = np.fmin.accumulate(values)
    figure = new_figure(5.2, 3.4)
    axis = figure.subplots()
    style = style_of("searched")
    x = np.arange(1, len(values) + 1)
    axis.plot(x, values, style["marker"], color=style["color"], alpha=0.6, label="scored")
    axis.step(x, least, where="post", color=INK, label="least so far")
    axis.set(xlabel="evaluations", ylabel=label(score))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    return figure, (
        f"{score} of {len(values)} evaluations of the search: from {number(values[0])} to "
        f"{number(least[-1])}"
    )


def plot_snapshots(entries, score):
    """Final distances with their intervals against the length of the self-training."""
    x = [entry["kimg"] for entry in entries]
    figure = new_figure(5.6, 3.4)
    axis = figure.subplots()
    shown = []
    for name in entries[0]["final"]:
        if name == "collapsed":
            continue  # so far above that the others would be one line
        values, errors = error_bars([entry["final"][name] for entry in entries])
        style = style_of(name)
        axis.errorbar(
            x, values, errors, color=style["color"], marker=style["marker"], label=label(name)
        )
        told = (number(entry["final"][name]["fd"]) for entry in entries)
        shown.append(f"{name}: {', '.join(told)}")
    axis.set(xlabel="self-training (kimg)", ylabel=label(score))
    figure.legend(loc="outside lower center", ncols=3)
    return figure, f"Final {score} at {x} kimg of self-training. {'; '.join(shown)}"


# -------------------- training seeds


def plot_seeds(rows):
    """Relative gains of every training seed, in the selection's features and in the mean of the
    judges that no selection saw."""
    rows = [row for row in rows if row["model"] != "collapsed"]
    figure = new_figure(5.6, 1.2 + 0.42 * len(rows))
    axis = figure.subplots()
    shown = []
    sides = (("own_relative", "own features", "global", -0.14),)
    sides += (("relative", "mean of the other judges", "blockwise", 0.14),)
    for key, name, style, shift in sides:
        style = STYLES[style]
        for i, row in enumerate(rows):
            x = 100 * np.array(row[key], float)
            y = np.full(len(x), i + shift)
            axis.plot(x, y, style["marker"], color=style["color"], alpha=0.6)
            if len(x):
                mean = np.mean(x[np.isfinite(x)])
                axis.plot(mean, i + shift, "|", color=INK, markersize=14)
        axis.plot([], [], style["marker"], color=style["color"], label=name)
    for row in rows:
        told = ", ".join(f"{100 * (share or 0):+.3g}%" for share in row["own_relative"])
        shown.append(f"{row['model']} against {row['against']}: {told}")
    axis.axvline(0, color=INK, linewidth=0.8)
    names = []
    for row in rows:
        names.append(label(f"{row['model']} against {row['against']}"))
        if row["kimg"] != rows[0]["kimg"] or row["kimg"] != rows[-1]["kimg"]:
            names[-1] += f", {row['kimg']:g} kimg"
    axis.set_yticks(range(len(rows)), names)
    axis.invert_yaxis()
    axis.set(xlabel="difference of the distance (%)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure, f"Differences at every training seed, own features. {'; '.join(shown)}"


# -------------------- samples


def sample_panel(images, most=8):
    """uint8 [N, C, H, W] -> uint8 [height, width, 4]: at most `most` x `most` of them, transparent
    gaps."""
    columns = min(most, math.isqrt(len(images)))
    images = images[: columns * columns].expand(-1, 3, -1, -1)
    opaque = torch.full_like(images[:, :1], 255)
    framed = F.pad(torch.cat([images, opaque], 1), [0, 1, 0, 1])
    rows = [torch.cat(list(row), 2) for row in framed.split(columns)]
    return torch.cat(rows, 1)[:, :-1, :-1].permute(1, 2, 0).contiguous().numpy()


def encoded(panel, format="PNG") -> str:
    """uint8 [H, W, 4] -> the picture as an address."""
    picture, file = PIL.Image.fromarray(panel), io.BytesIO()
    if format == "JPEG":
        white = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(white, picture).convert("RGB")
    picture.save(file, format, optimize=True, quality=90)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


WIDEST = 800  # pixels of several samples in a row


def sample_pictures(samples, budget):
    """{model: images} -> {model: (width, address)}: whole pixels as long as all addresses have at
    most `budget` characters, else fewer images, then compressed, at last none."""
    attempts = (("PNG", 8), ("PNG", 6), ("PNG", 4), ("PNG", 3), ("JPEG", 3), ("JPEG", 2))
    side = max(images.shape[3] for images in samples.values())
    for format, most in (*attempts, ("JPEG", 1)):
        if most > 1 and most * side > WIDEST:
            continue
        pictures = {}
        for name, images in samples.items():
            panel = sample_panel(images, most)
            pictures[name] = panel.shape[1], encoded(panel, format)
        if sum(len(address) for _, address in pictures.values()) <= budget:
            return pictures
    return {}
