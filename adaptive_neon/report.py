"""Tables and notes: summary.json and table.md."""

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

import neon_ext

from .files import write_atomically
from .stats import as_shares, mean_and_spread


def interval(gain):
    return f"{gain['difference']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]"


def weights_text(w):
    """One number where all blocks agree, else every block's."""
    values = set(w.values())
    if len(values) == 1:
        return f"{values.pop():g}"
    return ", ".join(f"{block} {value:.3g}" for block, value in w.items())


def weights_title(w):
    """The same, short enough for a picture's title."""
    text = weights_text(w)
    return text if len(w) <= 4 or "," not in text else f"one for each of {len(w)} blocks"


def table_row(entry, name):
    """The cells of one model of one snapshot."""
    final = entry["final"][name]
    final_text = f"{final['fd']:.4f}"
    if final["std"] is not None:
        final_text += f" +- {final['std']:.4f}"
    gain, verdict = "", ""
    if "against_base" in final:
        gain = interval(final["against_base"])
        verdict = final["against_base"]["verdict"]
    precision, recall = "", ""
    if "precision" in final:
        precision, recall = f"{final['precision']:.3f}", f"{final['recall']:.3f}"
    kernel = ""
    if "kernel" in final:
        kernel = "{value:.4g} [{low:.4g}, {high:.4g}]".format(**final["kernel"])
    selection = f"{entry[name]['fd']:.4f}"
    return [
        f"{entry['kimg']:g}",
        name,
        weights_text(final["w"]),
        selection,
        final_text,
        gain,
        verdict,
        precision,
        recall,
        kernel,
    ]


def judge_rows(entry, key):
    """A row for every feature network of an entry's judges or parts: distances, paired differences
    as shares."""
    models = list(entry["final"])
    pairs = [("global", "base")]
    for name in ("blockwise", "searched"):
        if name in models:
            pairs.append((name, "global"))
    head = ["judge", *models, *(f"{model} against {against} (95%)" for model, against in pairs)]
    rows = [head, ["---"] * len(head)]
    for result in entry[key].values():
        final = result["final"]
        row = [result["score"]]
        for name in models:
            row.append(f"{final[name]['fd']:.4g}")
        for model, against in pairs:
            gain = final[model][f"against_{against}"]
            shares = as_shares(gain, final[against]["fd"])
            text = "{relative_difference:+.1%} [{relative_low:+.1%}, {relative_high:+.1%}]"
            row.append(f"{text.format(**shares)} {gain['verdict']}")
        rows.append(row)
    return rows


def entry_notes(entry):
    """Paired comparisons of the models, in all judges, and warnings."""
    kimg = f"{entry['kimg']:g}"
    notes = []
    for name in ("searched", "blockwise"):
        if name in entry["final"]:
            gain = entry["final"][name]["against_global"]
            notes.append(
                f"Snapshot {kimg}: {name} against global {interval(gain)}: {gain['verdict']}."
            )
    for k, placebo in enumerate(entry["placebo"], 1):
        gain = placebo["against_global"]
        notes.append(
            f"Snapshot {kimg}: random blocks {k} against global {interval(gain)}: "
            f"{gain['verdict']}."
        )
    if entry["judges"]:
        for claim in entry["claims"]:
            notes.append(f"Snapshot {kimg}: {claim['sentence']}.")
    for note in entry["warnings"]:
        notes.append(f"Warning, snapshot {kimg}: {note}.")
    return notes


def reference_notes(summary):
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
            f"{floor['fd']:.4f} against the final one."
        )
    return notes


def strict(value):
    """The same data in strict JSON: infinities are null, other objects text."""
    if isinstance(value, dict):
        return {str(key): strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def markdown(rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_report(summary, out):
    """summary.json and table.md; the terminal gets the table."""
    head = [
        "snapshot (kimg)",
        "model",
        "w",
        f"selection {summary['score']}",
        "final",
        "against base (95%)",
        "verdict",
        "precision",
        "recall",
        "kernel distance (95%)",
    ]
    rows = [head, ["---"] * len(head)]
    judged, notes = [], []
    for entry in summary["snapshots"]:
        for name in entry["final"]:
            rows.append(table_row(entry, name))
        kimg = f"{entry['kimg']:g}"
        for key, title in (
            ("parts", f"Parts of the selection's features, snapshot {kimg}:"),
            ("judges", f"Judges that no selection saw, snapshot {kimg}:"),
        ):
            if entry[key]:
                judged += [title, markdown(judge_rows(entry, key))]
        notes += entry_notes(entry)
    text = "\n\n".join([markdown(rows), *judged, *notes, *reference_notes(summary)])
    print("\n" + text)
    write_atomically(out / "table.md", text + "\n")
    write_atomically(out / "summary.json", json.dumps(strict(summary), indent=1, allow_nan=False))


def write_seeds(summary, out):
    """summary.json and table.md over the training seeds; the terminal gets the table."""
    rows = [["snapshot (kimg)", "training seed", "model", f"final {summary['score']}"]]
    rows[0] += ["against base (95%)", "against global (95%)"]
    rows.append(["---"] * len(rows[0]))
    for k, finals in enumerate(summary["final"]):
        for entry, final in zip(summary["kimg"], finals, strict=True):
            for name, result in final.items():
                row = [f"{entry:g}", str(summary["seeds"][k]["seed"]), name, f"{result['fd']:.4f}"]
                for other in ("base", "global"):
                    gain = result.get(f"against_{other}")
                    row.append(f"{interval(gain)} {gain['verdict']}" if gain else "")
                rows.append(row)

    head = ["snapshot (kimg)", "model", "against", "own features: better in", "difference"]
    head += ["unseen judges: better in", "worse in", "difference"]
    over = [head, ["---"] * len(head)]
    for row in summary["over_seeds"]:
        better = row["own_verdicts"].count("better")
        cells = [f"{row['kimg']:g}", row["model"], row["against"]]
        cells += [f"{better} of {len(row['own_verdicts'])}", mean_and_spread(row["own_relative"])]
        cells += [f"{row['better']} of {row['cases']}", str(row["worse"])]
        cells.append(mean_and_spread(row["relative"]) if row["relative"] else "")
        over.append(cells)

    answers = [answer(summary["over_seeds"], k, len(summary["seeds"])) for k in summary["kimg"]]
    notes = [*filter(None, answers), "Differences are shares of the other's distance, mean +- std."]
    text = "\n\n".join([markdown(rows), markdown(over), *notes])
    print("\n" + text)
    write_atomically(out / "table.md", text + "\n")
    write_atomically(out / "summary.json", json.dumps(strict(summary), indent=1, allow_nan=False))


QUESTIONS = (
    ("blockwise", "global"),
    ("blockwise", "random blocks"),
    ("searched", "global"),
    ("searched", "blockwise"),
)


def answer(over, kimg, seeds):
    """The question of the paper in one sentence: is block-wise better than global, than random
    blocks, and what was searched (layers, say) better than both?"""
    parts = []
    for model, against in QUESTIONS:
        for row in over:
            if (row["kimg"], row["model"], row["against"]) == (kimg, model, against):
                parts.append(row["sentence"])
    return f"Snapshot {kimg:g}, {seeds} training seeds: {'; '.join(parts)}." if parts else ""


def summarise(c, argv, entries, judges, ledger, seconds, processes, begin):
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
        "first_seeds": ledger.as_json(),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "world": processes.world,
        "neon_ext": neon_ext.build_config(),
        "versions": versions,
        "seconds_total": time.perf_counter() - begin,
    }
