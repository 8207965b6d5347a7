"""Tables and notes, from plain data: summary.json, table.md and what the terminal gets."""

import dataclasses
import json
import math
import os
import platform
import shlex
import sys
import textwrap
import time

import numpy as np
import scipy
import torch

from .extension import neon_ext
from .files import escaped, printable, write_atomically
from .judges import NEIGHBOURS
from .verdicts import cases_text, mean_and_interval, number, verdict_text

# -------------------- cells


def shares(gain) -> str:
    """A paired difference and its 95% interval in percent of the other's distance, the unit in the
    table's head; where that is zero or infinite, the difference itself."""
    keys = ("difference", "low", "high")
    if gain["relative_difference"] is None:
        value, low, high = (number(gain[key], "+") for key in keys)
        return f"{value} [{low}, {high}] (no %)"
    value, low, high = (100 * gain[f"relative_{key}"] for key in keys)
    return spread(value, low, high, "+")


def spread(value, low, high, sign="", digits=3) -> str:
    """A value and its interval, to as many decimals as give half the interval so many digits."""
    scale = (high - low) / 2 or abs(value) or 1.0
    decimals = min(max(digits - 1 - math.floor(math.log10(scale)), 0), 9)
    value, low, high = (f"{one:{sign}.{decimals}f}" for one in (value, low, high))
    return f"{value} [{low}, {high}]"


def weights_text(w) -> str:
    """One number where all blocks agree, else every block's; of many blocks only how many: the
    page draws them, summary.json has them."""
    values = set(w.values())
    if len(values) == 1:
        return f"{values.pop():g}"
    if len(w) > 4:
        return f"one for each of {len(w)} blocks"
    return ", ".join(f"{block} {value:.3g}" for block, value in w.items())


def markdown(rows) -> str:
    """A table of rows {column: cell}; what a row has no cell for stays empty."""
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    lines = [[*columns], ["---"] * len(columns)]
    for row in rows:
        lines.append([row.get(column, "") for column in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -------------------- one training seed


def verdict_of(claims, model, against, judge=None) -> str:
    """The claims' verdict in a cell, of the selection's features or a judge; empty where nothing is
    claimed.
    Tables and sentences have one criterion."""
    for claim in claims:
        if (claim["model"], claim["against"]) == (model, against):
            text = verdict_text(claim["own"] if judge is None else claim["judges"][judge])
            return text.replace("no significant difference", "not significant")
    return ""


def model_row(entry, name, score) -> dict:
    """The cells of one model of one snapshot. score: what the distance is called."""
    kind = score.split(" (")[0]
    final, selected = entry["final"][name], entry.get(name, {})
    spread = "" if final["std"] is None else f" +- {number(final['std'])}"
    row = {
        "snapshot (kimg)": f"{entry['kimg']:g}",
        "model": name,
        "w": weights_text(final["w"]),
        f"selection {kind}": number(selected["fd"]) if "fd" in selected else "",
        f"final {kind}": number(final["fd"]) + spread,
        "corrected": number(final["corrected"]) if "corrected" in final else "",
        "against base, % (95%)": "",
        "verdict": verdict_of(entry["claims"], name, "base"),
        "kernel distance (95%)": "",
        "precision": "",
        "recall": "",
    }
    if "against_base" in final:
        row["against base, % (95%)"] = shares(final["against_base"])
    if "kernel" in final:
        row["kernel distance (95%)"] = kernel_text(final["kernel"])
    if "precision" in final:
        row["precision"] = f"{final['precision']:.3f}"
        row["recall"] = f"{final['recall']:.3f}"
    if final.get("memorisation") is not None:
        row["memorised, %"] = f"{100 * final['memorisation']:.1f}"
    asked = [adherence(entry, name, judge) for judge in (None, *entry["judges"])]
    if any(asked):
        row["adherence (95%)"] = next(filter(None, asked))
    return row


def kernel_text(kernel) -> str:
    value, low, high = (kernel[key] for key in ("value", "low", "high"))
    return "inf" if None in (value, low, high) else spread(value, low, high, digits=2)


def model_rows(entry, score) -> list[dict]:
    return [model_row(entry, name, score) for name in entry["final"]]


def adherence(entry, name, judge=None) -> str:
    """To what was asked for, and its interval, in the selection's features or a judge; empty where
    it was not measured."""
    final = (entry if judge is None else entry["judges"][judge])["final"][name]
    if "alignment" not in final:
        return ""
    value, low, high = (final["alignment"][key] for key in ("value", "low", "high"))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def judge_row(judge, name, claims) -> dict:
    """The cells of one feature network: distances, paired differences as shares. claims: none of
    what the selection has seen itself."""
    final = judge["final"]
    row = {"judge": judge["score"]}
    for model in final:
        if not model.startswith("random blocks"):  # summary.json has them
            row[model] = number(final[model]["fd"])
    for model, against in (("global", "base"), ("blockwise", "global"), ("searched", "global")):
        if model in final:
            text = shares(final[model][f"against_{against}"])
            verdict = verdict_of(claims, model, against, name)
            row[f"{model} against {against}, % (95%)"] = f"{text} {verdict}".strip()
    return row


def judge_tables(entry) -> list[tuple[str, list[dict]]]:
    """(title, rows) of the feature networks beside the one that selected."""
    found = []
    for title, judges, claims in (
        ("Parts of the selection's features", entry["parts"], []),
        ("Judges that no selection saw", entry["judges"], entry["claims"]),
    ):
        if judges:
            rows = [judge_row(judge, name, claims) for name, judge in judges.items()]
            found.append((title, rows))
    return found


def claims_in_order(entry) -> list[dict]:
    """The primary claim first; how bad the collapsed network is, is none."""
    claims = [claim for claim in entry["claims"] if claim["model"] != "collapsed"]
    return sorted(claims, key=lambda claim: not claim["primary"])


def entry_notes(entry) -> list[str]:
    """Paired comparisons of the models, in all judges, and warnings."""
    kimg = f"{entry['kimg']:g}"
    notes = []
    for claim in claims_in_order(entry):
        notes.append(f"Snapshot {kimg}: {claim['sentence']}.")
    for note in entry["warnings"]:
        notes.append(f"Warning, snapshot {kimg}: {note}.")
    return notes


def reference_notes(summary) -> list[str]:
    """What the final comparison compares with, and what only it does."""
    reference = summary["reference"]
    notes = [f"Distance: {summary['score']}, lower is better."]
    if "origin" in reference:
        once = "" if "selection" in reference else ", the same for selection and final comparison"
        notes.append(f"Reference: {reference['origin']}{once} ({reference['images']} images).")
        if once:
            notes.append(
                "The winner was chosen by the noise of the same reference, too: of 27 equal "
                "candidates one is called better in a third of such runs. --data keeps them apart."
            )
    if "accuracy" in reference:
        notes.append(
            f"The features' own classifier reads {reference['accuracy']:.1%} of "
            f"{reference['accuracy_images']} fresh images."
        )
    if len(summary["judges"]) == 1:
        notes.append(
            "Every verdict is in the features that the weights were selected with: --judge adds "
            "others."
        )
    if summary["config"].get("data") and not any("dinov2" in name for name in summary["judges"]):
        notes.append(
            "A judge that knows natural images: --judge examples/dinov2_features.py (DINOv2, whose "
            "weights are downloaded once)."
        )
    if "memorisation_fresh" in reference:
        notes.append(
            "Memorisation: share of samples whose nearest real image is one that the base was "
            "trained on, of as many of either kind; of real images that nothing was trained on "
            f"{reference['memorisation_fresh']:.3f}."
        )
    if any("precision" in f for entry in summary["snapshots"] for f in entry["final"].values()):
        notes.append(
            f"Precision and recall: by {NEIGHBOURS} nearest neighbours (their paper takes 3)."
        )
    for floor in summary["floors"]:
        notes.append(
            f"Floor: {floor['images']} real images, of the selection part and of all classes in "
            f"equal shares, score {number(floor['fd'])} against the final one."
        )
    return notes


def write_tables(summary, out) -> str:
    """summary.json and table.md -> what the terminal gets."""
    plain = strict(summary)
    models, judged, notes = [], [], []
    for entry in plain["snapshots"]:
        models += model_rows(entry, plain["score"])
        for title, rows in judge_tables(entry):
            judged += [f"{title}, snapshot {entry['kimg']:g}:", markdown(rows)]
        notes += entry_notes(entry)
    write_texts([markdown(models), *judged, *notes, *reference_notes(plain)], plain, out)

    several = len(plain["snapshots"]) > 1
    final = f"final {plain['score'].split(' (')[0]}"
    columns = ["model", "w", final, "against base, % (95%)", "verdict"]
    headlines, warnings = [], []
    for entry in plain["snapshots"]:
        headlines.append(f"{entry['kimg']:g} kimg: " * several + entry["headline"])
        warnings += entry["warnings"]
    title = f"{plain['score']}, {final_images(plain)}; lower is better"
    rows = []
    for row in models:
        w = "of every block" if len(row["w"]) > 60 else row["w"].replace(",", "")
        rows.append(row | {"w": w})
    text = terminal_text(title, rows, ["snapshot (kimg)"] * several + columns, headlines)
    if len(warnings) == 1:
        return text + "\n\n" + textwrap.fill(f"Warning: {warnings[0]}", WIDTH)
    return text + f"\n\n{len(warnings)} warnings: see the report." * bool(warnings)


def final_images(summary) -> str:
    final = summary["snapshots"][0]["final"]["base"]
    repeats = len(final["all"])
    return f"{final['images']} final images" + (f", {repeats} times" if repeats > 1 else "")


# -------------------- several training seeds


def seed_rows(summary) -> list[dict]:
    """Every model of every snapshot and training seed."""
    rows = []
    for k, seed in enumerate(summary["seeds"]):
        for place, kimg in enumerate(summary["kimg"]):
            claims = summary["claims"][k][place]
            for name, result in summary["final"][k][place].items():
                row = {
                    "snapshot (kimg)": f"{kimg:g}",
                    "training seed": str(seed["seed"]),
                    "model": name,
                    f"final {summary['score']}": number(result["fd"]),
                }
                for other in ("base", "global"):
                    row[f"against {other}, % (95%)"] = ""
                    if f"against_{other}" in result:
                        verdict = verdict_of(claims, name, other)
                        text = f"{shares(result[f'against_{other}'])} {verdict}"
                        row[f"against {other}, % (95%)"] = text.strip()
                rows.append(row)
    return rows


def claim_row(claim) -> dict:
    """One claim over all training seeds."""
    verdicts = claim["own_verdicts"]
    return {
        "snapshot (kimg)": f"{claim['kimg']:g}",
        "model": claim["model"],
        "against": claim["against"],
        "own features: better in": f"{verdicts.count('better')} of {len(verdicts)}",
        "own features: difference": mean_and_interval(claim["own_relative"]),
        "unseen judges: better in": f"{claim['better']} of {cases_text(claim)}",
        "unseen judges: worse in": str(claim["worse"]),
        "unseen judges: difference": mean_and_interval(claim["relative"]),
    }


STUDENT = (
    "Differences are shares of the other's distance: mean over the training seeds and its 95% "
    "interval (Student's t). Judges of one seed see the same networks: they are no independent "
    "cases."
)


def write_seeds_tables(summary, out) -> str:
    """The same over the training seeds."""
    plain = strict(summary)
    claims = [claim_row(claim) for claim in plain["over_seeds"]]
    headlines = seeds_headlines(plain)
    write_texts([markdown(seed_rows(plain)), markdown(claims), *headlines, STUDENT], plain, out)

    columns = ["model", "against", "own features: difference", "unseen judges: difference"]
    if len(plain["kimg"]) > 1:
        columns.insert(0, "snapshot (kimg)")
    title = f"{len(plain['seeds'])} training seeds, differences of {plain['score']}"
    return terminal_text(title, claims, columns, headlines)


def seeds_headlines(summary) -> list[str]:
    """What every snapshot comes to."""
    if len(summary["kimg"]) == 1:
        return summary["headlines"]
    told = zip(summary["kimg"], summary["headlines"], strict=True)
    return [f"{kimg:g} kimg: {headline}" for kimg, headline in told]


# -------------------- files, then the terminal


def strict(value):
    """The same data in strict JSON: infinities are null, other objects text."""
    if isinstance(value, dict):
        return {str(key): strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def write_texts(texts, plain, out) -> None:
    text = "\n\n".join(filter(None, texts))
    write_atomically(out / "table.md", text + "\n")
    write_atomically(out / "summary.json", json.dumps(plain, indent=1, allow_nan=False))


WIDTH = 100  # of a terminal
MOST_ROWS = 9  # of a table there
MOST_SENTENCES, MOST_LINES = 2, 3  # there, of a sentence


def terminal_text(title, rows, columns, sentences, most=MOST_ROWS) -> str:
    """A table and sentences, within 100 columns and a few lines; table.md has the whole."""
    lines = [printable(title, WIDTH), *plain_table(rows[:most], columns)]
    if len(rows) > most:
        lines.append(f"... and {len(rows) - most} rows more in table.md")
    for sentence in sentences[:MOST_SENTENCES]:
        wrapped = textwrap.wrap(escaped(sentence), WIDTH)
        if len(wrapped) > MOST_LINES:
            last = textwrap.shorten(wrapped[MOST_LINES - 1], WIDTH - 4, placeholder="")
            wrapped = [*wrapped[: MOST_LINES - 1], f"{last} ..."]
        lines += ["", *wrapped]
    return "\n".join(lines)


def plain_table(rows, columns) -> list[str]:
    """Lines of at most 100 columns: the widest column is cut until all fit."""
    table = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for cells in table:
        cut = [printable(cell, width) for cell, width in zip(cells, widths, strict=True)]
        padded = [cell.ljust(width) for cell, width in zip(cut, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return lines


def summarise(c, argv, results, setup, seconds, processes, begin):
    """What summary.json holds."""
    judges = results.judges
    judge = judges[0]
    apart = judge.selection is not judge.final and judge.selection.real is not None
    most = len(judge.selection.real) if apart else 0
    counts = sorted({min(c.select_images, most), min(c.final_images, most)} - {0})
    machine = torch.cuda.get_device_name() if c.device == "cuda" else f"{os.cpu_count()} cores"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }
    if "diffusers" in sys.modules:
        versions["diffusers"] = getattr(sys.modules["diffusers"], "__version__", "unknown")
    return {
        "command": shlex.join(["python", "edm_neon.py", *argv]),
        "config": dataclasses.asdict(c),
        "score": judge.features.score,
        "judges": [judge.name for judge in judges if not judge.is_part],
        "reference": judge.facts,
        "snapshots": results.entries,
        "floors": [judge.floor(count) for count in counts],
        "seconds_per_image": seconds,
        "first_seeds": setup.first_seeds(),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "world": processes.world,
        "neon_ext": neon_ext.build_config(),
        "versions": versions,
        "seconds": results.seconds,
        "seconds_total": time.perf_counter() - begin,
    }
