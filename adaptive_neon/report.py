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
from .judges import NEIGHBOURS
from .verdicts import cases_text, mean_and_interval, number, range_text, verdict_text

# -------------------- cells


def interval(gain) -> str:
    """A paired difference and its 95% interval."""
    low, high = number(gain["low"], "+"), number(gain["high"], "+")
    return f"{number(gain['difference'], '+')} [{low}, {high}]"


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


def verdict_of(claims, model, against, judge=None) -> str:
    """The claims' verdict, in the selection's features or a judge; empty where nothing is claimed.
    Tables and sentences have one criterion."""
    for claim in claims:
        if (claim["model"], claim["against"]) == (model, against):
            return verdict_text(claim["own"] if judge is None else claim["judges"][judge])
    return ""


def model_row(entry, name, score) -> dict:
    """The cells of one model of one snapshot. score: what the distance is called."""
    final, selected = entry["final"][name], entry.get(name, {})
    spread = "" if final["std"] is None else f" +- {number(final['std'])}"
    row = {
        "snapshot (kimg)": f"{entry['kimg']:g}",
        "model": name,
        "w": weights_text(final["w"]),
        f"selection {score}": number(selected["fd"]) if "fd" in selected else "",
        "final": number(final["fd"]) + spread,
        "corrected": number(final["corrected"]) if "corrected" in final else "",
        "against base (95%)": "",
        "verdict": verdict_of(entry["claims"], name, "base"),
        "precision": "",
        "recall": "",
        "kernel distance (95%)": "",
    }
    if "against_base" in final:
        row["against base (95%)"] = interval(final["against_base"])
    if "precision" in final:
        row["precision"] = f"{final['precision']:.3f}"
        row["recall"] = f"{final['recall']:.3f}"
    if "kernel" in final:
        value, low, high = (number(final["kernel"][key]) for key in ("value", "low", "high"))
        row["kernel distance (95%)"] = f"{value} [{low}, {high}]"
    return row


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
            text = range_text(final[model][f"against_{against}"])
            if claims:
                text += f" {verdict_of(claims, model, against, name)}"
            row[f"{model} against {against} (95%)"] = text
    return row


def entry_notes(entry) -> list[str]:
    """Paired comparisons of the models, in all judges, and warnings."""
    kimg = f"{entry['kimg']:g}"
    claims = sorted(entry["claims"], key=lambda claim: not claim["primary"])
    notes = []
    for claim in claims:
        if claim["model"] != "collapsed":
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


def write_report(summary, out):
    """summary.json and table.md; the terminal gets the table."""
    plain = strict(summary)
    models, judged, notes = [], [], []
    for entry in plain["snapshots"]:
        for name in entry["final"]:
            models.append(model_row(entry, name, plain["score"]))
        kimg = f"{entry['kimg']:g}"
        for title, found, claims in (
            ("Parts of the selection's features", entry["parts"], []),
            ("Judges that no selection saw", entry["judges"], entry["claims"]),
        ):
            if found:
                rows = [judge_row(judge, name, claims) for name, judge in found.items()]
                judged += [f"{title}, snapshot {kimg}:", markdown(rows)]
        notes += entry_notes(entry)
    publish([markdown(models), *judged, *notes, *reference_notes(plain)], plain, out)


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
                    row[f"against {other} (95%)"] = ""
                    if f"against_{other}" in result:
                        verdict = verdict_of(claims, name, other)
                        text = f"{interval(result[f'against_{other}'])} {verdict}"
                        row[f"against {other} (95%)"] = text.strip()
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
    texts.append(
        "Differences are shares of the other's distance: mean over the training seeds and its 95% "
        "interval (Student's t). Judges of one seed see the same networks: they are no independent "
        "cases."
    )
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
        "command": " ".join(["python edm_neon.py", *argv]),
        "config": dataclasses.asdict(c),
        "score": judge.features.score,
        "judges": [judge.name for judge in judges if not judge.is_part],
        "reference": judge.facts,
        "snapshots": [entry.as_json() for entry in results.entries],
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
