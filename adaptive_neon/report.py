"""Tables and notes: summary.json and table.md, from plain data."""

import dataclasses
import json
import math
import os
import platform
import sys
import time

import numpy as np
import scipy
import torch

from .extension import neon_ext
from .files import write_atomically
from .verdicts import mean_and_spread, number, percent

# -------------------- cells


def interval(gain) -> str:
    """A paired difference and its 95% interval."""
    low, high = number(gain["low"], "+"), number(gain["high"], "+")
    return f"{number(gain['difference'], '+')} [{low}, {high}]"


def interval_in_shares(gain) -> str:
    """The same as shares of the other's distance."""
    low, high = percent(gain["relative_low"]), percent(gain["relative_high"])
    return f"{percent(gain['relative_difference'])} [{low}, {high}]"


def weights_text(w) -> str:
    """One number where all blocks agree, else every block's."""
    values = set(w.values())
    if len(values) == 1:
        return f"{values.pop():g}"
    return ", ".join(f"{block} {value:.3g}" for block, value in w.items())


def weights_title(w) -> str:
    """The same, short enough for a picture's title."""
    text = weights_text(w)
    return text if len(w) <= 4 or "," not in text else f"one for each of {len(w)} blocks"


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


def model_row(entry, name, score) -> dict:
    """The cells of one model of one snapshot. score: what the distance is called."""
    final = entry["final"][name]
    spread = "" if final["std"] is None else f" +- {number(final['std'])}"
    row = {
        "snapshot (kimg)": f"{entry['kimg']:g}",
        "model": name,
        "w": weights_text(final["w"]),
        f"selection {score}": number(entry[name]["fd"]) if "fd" in entry[name] else "",
        "final": number(final["fd"]) + spread,
        "against base (95%)": "",
        "verdict": "",
        "precision": "",
        "recall": "",
        "kernel distance (95%)": "",
    }
    if "against_base" in final:
        row["against base (95%)"] = interval(final["against_base"])
        row["verdict"] = final["against_base"]["verdict"]
    if "precision" in final:
        row["precision"] = f"{final['precision']:.3f}"
        row["recall"] = f"{final['recall']:.3f}"
    if "kernel" in final:
        value, low, high = (number(final["kernel"][key]) for key in ("value", "low", "high"))
        row["kernel distance (95%)"] = f"{value} [{low}, {high}]"
    return row


def judge_row(judge) -> dict:
    """The cells of one feature network: distances, paired differences as shares."""
    final = judge["final"]
    row = {"judge": judge["score"]}
    for name in final:
        if not name.startswith("random blocks"):  # summary.json has them
            row[name] = number(final[name]["fd"])
    for model, against in (("global", "base"), ("blockwise", "global"), ("searched", "global")):
        if model in final:
            gain = final[model][f"against_{against}"]
            text = f"{interval_in_shares(gain)} {gain['verdict']}"
            row[f"{model} against {against} (95%)"] = text
    return row


def entry_notes(entry) -> list[str]:
    """Paired comparisons of the models, in all judges, and warnings."""
    comparisons = {}
    for name in ("searched", "blockwise"):
        if name in entry["final"]:
            comparisons[name] = entry["final"][name]["against_global"]
    for k, placebo in enumerate(entry["placebo"], 1):
        comparisons[f"random blocks {k}"] = placebo["against_global"]

    kimg = f"{entry['kimg']:g}"
    notes = []
    for name, gain in comparisons.items():
        notes.append(f"Snapshot {kimg}: {name} against global {interval(gain)}: {gain['verdict']}.")
    if entry["judges"]:
        for claim in entry["claims"]:
            notes.append(f"Snapshot {kimg}: {claim['sentence']}.")
    for note in entry["warnings"]:
        notes.append(f"Warning, snapshot {kimg}: {note}.")
    return notes


def reference_notes(summary) -> list[str]:
    """What the final comparison compares with, and what only it does."""
    reference = summary["reference"]
    notes = []
    if "origin" in reference:
        once = "" if "selection" in reference else ", the same for selection and final comparison"
        notes.append(f"Reference: {reference['origin']}{once} ({reference['images']} images).")
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
    for floor in summary["floors"]:
        notes.append(
            f"Floor: {floor['images']} real images, of the selection part, score "
            f"{number(floor['fd'])} against the final one."
        )
    return notes


def write_report(summary, out):
    """summary.json and table.md; the terminal gets the table."""
    plain = strict(summary)
    models, judged, notes = [], [], []
    for entry in plain["snapshots"]:
        for name in entry["final"]:
            models.append(model_row(entry, name, plain["score"]))
        kimg = f"{entry['kimg']:g}"
        for key, title in (
            ("parts", f"Parts of the selection's features, snapshot {kimg}:"),
            ("judges", f"Judges that no selection saw, snapshot {kimg}:"),
        ):
            if entry[key]:
                judged += [title, markdown([judge_row(judge) for judge in entry[key].values()])]
        notes += entry_notes(entry)
    publish([markdown(models), *judged, *notes, *reference_notes(plain)], plain, out)


# -------------------- several training seeds


def seed_rows(summary) -> list[dict]:
    """Every model of every snapshot and training seed."""
    rows = []
    for seed, finals in zip(summary["seeds"], summary["final"], strict=True):
        for kimg, final in zip(summary["kimg"], finals, strict=True):
            for name, result in final.items():
                row = {
                    "snapshot (kimg)": f"{kimg:g}",
                    "training seed": str(seed["seed"]),
                    "model": name,
                    f"final {summary['score']}": number(result["fd"]),
                }
                for other in ("base", "global"):
                    gain = result.get(f"against_{other}")
                    text = f"{interval(gain)} {gain['verdict']}" if gain else ""
                    row[f"against {other} (95%)"] = text
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
        "own features: difference": mean_and_spread(claim["own_relative"]),
        "unseen judges: better in": f"{claim['better']} of {claim['cases']}",
        "unseen judges: worse in": str(claim["worse"]),
        "unseen judges: difference": mean_and_spread(claim["relative"]),
    }


QUESTIONS = (
    ("blockwise", "global"),
    ("blockwise", "random blocks"),
    ("searched", "global"),
    ("searched", "blockwise"),
)


def answer(over, kimg, seeds) -> str:
    """The question of the paper in one sentence: is block-wise better than global, than random
    blocks, and what was searched (layers, say) better than both?"""
    parts = []
    for question in QUESTIONS:
        for row in over:
            if row["kimg"] == kimg and (row["model"], row["against"]) == question:
                parts.append(row["sentence"])
    return f"Snapshot {kimg:g}, {seeds} training seeds: {'; '.join(parts)}." if parts else ""


def write_seeds(summary, out):
    """summary.json and table.md over the training seeds; the terminal gets the table."""
    plain = strict(summary)
    over = plain["over_seeds"]
    texts = [markdown(seed_rows(plain)), markdown([claim_row(claim) for claim in over])]
    for kimg in plain["kimg"]:
        texts.append(answer(over, kimg, len(plain["seeds"])))
    texts.append("Differences are shares of the other's distance, mean +- std.")
    publish(texts, plain, out)


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


def publish(texts, plain, out):
    """table.md and summary.json; then, where nothing can be lost any more, the terminal."""
    text = "\n\n".join(filter(None, texts))
    write_atomically(out / "table.md", text + "\n")
    write_atomically(out / "summary.json", json.dumps(plain, indent=1, allow_nan=False))
    print("\n" + text, flush=True)


def summarise(c, argv, entries, judges, setup, seconds, processes, begin):
    """What summary.json holds."""
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
        "command": " ".join(["python edm_neon.py", *argv]),
        "config": dataclasses.asdict(c),
        "score": judge.features.score,
        "judges": [judge.name for judge in judges if not judge.is_part],
        "reference": judge.facts,
        "snapshots": [entry.as_json() for entry in entries],
        "floors": [judge.floor(count) for count in counts],
        "seconds_per_image": seconds,
        "first_seeds": setup.first_seeds(),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "world": processes.world,
        "neon_ext": neon_ext.build_config(),
        "versions": versions,
        "seconds_total": time.perf_counter() - begin,
    }
