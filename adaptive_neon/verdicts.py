"""Verdicts: the final comparison, its claims and warnings, and all of it over training seeds."""

import dataclasses
import math
import re
import time

import numpy as np

from .stats import Comparison, compare, fd_interval, holm, kernel_interval


def number(value, sign="") -> str:
    """Four significant digits, of small numbers too; None is infinite, as in summary.json."""
    if value is None:
        return "inf"
    if 1000 <= abs(value) < 1e6:
        return f"{value:{sign}.0f}"
    return f"{value:{sign}.4g}"


def percent(share, sign="+") -> str:
    return "inf" if share is None else f"{100 * share:{sign}.3g}%"


def mean_and_spread(shares) -> str:
    """Of those that are finite; the others are counted."""
    finite = [share for share in shares if share is not None and math.isfinite(share)]
    parts = []
    if finite:
        parts.append(percent(np.mean(finite)))
    if len(finite) > 1:
        parts.append(f"+- {percent(np.std(finite, ddof=1), '')}")
    if len(finite) < len(shares):
        parts.append(f"({len(shares) - len(finite)} infinite)")
    return " ".join(parts)


def final_comparison(finals) -> dict:
    """{model: [Score] of every final seed set} -> {model: mean, all values, spread, paired
    differences}, plain data."""
    results = {}
    for name, scores in finals.items():
        values = [score.fd for score in scores]
        result = {"w": scores[0].w, "images": scores[0].images, "all": values}
        result["fd"] = float(np.mean(values))
        result |= fd_interval(scores)
        if all(score.precision is not None for score in scores):
            result["precision"] = float(np.mean([score.precision for score in scores]))
            result["recall"] = float(np.mean([score.recall for score in scores]))
        if all(score.kernel is not None for score in scores):
            result["kernel"] = kernel_interval(scores)
        result["std"] = None
        if len(values) > 1 and math.isfinite(result["fd"]):
            result["std"] = float(np.std(values, ddof=1))
        if name != "base":
            result["against_base"] = compare(scores, finals["base"]).as_json()
        if name not in ("base", "global"):
            result["against_global"] = compare(scores, finals["global"]).as_json()
        results[name] = result
    return results


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one model of a snapshot is better than another: in the features it was selected with,
    and in judges that no selection saw."""

    model: str
    against: str
    own: Comparison
    judges: dict[str, Comparison]
    better: list[str]  # judges in which the gain holds, corrected for their number (Holm)
    worse: list[str]

    def sentence(self) -> str:
        text = f"{self.model} against {self.against}: {self.own.verdict} in its own features"
        if not self.judges:
            return text
        return (
            f"{text}; of {len(self.judges)} judges that no selection saw, better in "
            f"{len(self.better)} and worse in {len(self.worse)} (95%, Holm's correction)"
        )

    def as_json(self) -> dict:
        return {
            "model": self.model,
            "against": self.against,
            "own": self.own.as_json(),
            "judges": {judge: gain.as_json() for judge, gain in self.judges.items()},
            "better": self.better,
            "worse": self.worse,
            "sentence": self.sentence(),
        }


CLAIMS = (
    ("global", "base"),
    ("blockwise", "base"),
    ("searched", "base"),
    ("blockwise", "global"),
    ("searched", "global"),
    ("searched", "blockwise"),
)
CONTROLS = ("base, twice the steps", "guided", "base, trained on")  # see controls.py


def claims_of(finals, level=0.05) -> list[Claim]:
    """{judge: {model: [Score]}}, the first judge the one that was selected with."""
    own, *unseen = finals
    models = finals[own]
    pairs = [pair for pair in CLAIMS if pair[0] in models and pair[1] in models]
    for control in CONTROLS:
        for model in ("global", "blockwise", "searched"):
            if model in models and control in models:
                pairs.append((model, control))
    for name in models:
        if name.startswith("random blocks"):
            pairs.append((name, "global"))
            if "blockwise" in models:
                pairs.append(("blockwise", name))

    claims = []
    for model, against in pairs:
        gains = {}
        for judge, scores in finals.items():
            gains[judge] = compare(scores[model], scores[against], level)
        held = holm([gains[judge].p for judge in unseen], level)
        holding = [judge for judge, holds in zip(unseen, held, strict=True) if holds]
        claims.append(
            Claim(
                model=model,
                against=against,
                own=gains.pop(own),
                judges=gains,
                better=[judge for judge in holding if gains[judge].difference < 0],
                worse=[judge for judge in holding if gains[judge].difference > 0],
            )
        )
    return claims


def warnings_of(c, models, final, had_grid, judge) -> list[str]:
    """What a careful reader would want to know. models: {name: Candidate}; final:
    final_comparison() in the judge that decided."""
    notes = []
    if had_grid:
        for block, value in models["blockwise"].w.items():
            values = c.grid_of(block)
            if len(values) > 1 and value in (values[0], values[-1]):
                notes.append(f"w_{block} = {value:g} lies on the edge of the grid")
    dim = judge.features.dim
    if c.select_images <= dim:
        notes.append(
            f"{c.select_images} selection images for {dim} features: the covariance is singular"
        )
    real = min(judge.selection.facts["images"], judge.final.facts["images"])
    if real <= dim:
        notes.append(f"{real} real images for {dim} features: the covariance is singular")

    for name in ("blockwise", "searched"):
        if name not in final:
            continue
        # Both gains in shares of the base: the seed sets differ in size, and so in bias.
        against = final[name]["against_base"]
        promised = models[name].fd / models["base"].fd - 1
        if promised < against["relative_low"]:
            notes.append(
                f"{name} differs from the base by {percent(promised)} on the selection seeds and "
                f"by {percent(against['relative_difference'])} on the final ones: selection noise"
            )
        loss = final["base"].get("precision", 0) - final[name].get("precision", 0)
        if loss > 0.01 and against["difference"] < 0:
            notes.append(f"{name}: precision falls while the distance falls")
    for name, candidate in models.items():
        if not math.isfinite(candidate.fd):
            notes.append(f"{name}: the sampler diverges")
    return notes


def claims_over_seeds(summaries) -> list[dict]:
    """What every claim of every snapshot came to over the training seeds (and random partitions,
    which are one), plain data with its sentence."""
    groups: dict[tuple, list] = {}
    for summary in summaries:
        for entry in summary["snapshots"]:
            for claim in entry["claims"]:
                sides = (claim["model"], claim["against"])
                names = [re.sub(r"(random blocks) \d+", r"\1", name) for name in sides]
                groups.setdefault((entry["kimg"], *names), []).append(claim)
    rows = []
    for (kimg, model, against), claims in groups.items():
        rows.append(over_seeds(kimg, model, against, claims))
    return rows


def over_seeds(kimg, model, against, claims) -> dict:
    """claims: one of each seed (and partition), of the same models."""
    relative = []  # the mean over the judges that no selection saw, one a claim
    for claim in claims:
        gains = [gain["relative_difference"] for gain in claim["judges"].values()]
        if gains:
            relative.append(float(np.mean(gains)))
    row = {
        "kimg": kimg,
        "model": model,
        "against": against,
        "own_verdicts": [claim["own"]["verdict"] for claim in claims],
        "own_relative": [claim["own"]["relative_difference"] for claim in claims],
        "cases": sum(len(claim["judges"]) for claim in claims),
        "better": sum(len(claim["better"]) for claim in claims),
        "worse": sum(len(claim["worse"]) for claim in claims),
        "relative": relative,
    }

    text = (
        f"{model} is better than {against} in {row['own_verdicts'].count('better')} of "
        f"{len(claims)} in its own features ({mean_and_spread(row['own_relative'])})"
    )
    if row["cases"]:
        text += (
            f" and in {row['better']} of {row['cases']} cases of the judges that no selection "
            f"saw, worse in {row['worse']} ({mean_and_spread(relative)})"
        )
    return row | {"sentence": text}


def summarise_seeds(c, argv, summaries, begin) -> dict:
    """summary.json of several training seeds; those of each seed lie in its folder."""
    seeds = []
    for k, summary in enumerate(summaries):
        seeds.append({"folder": f"seed-{k}", "seed": summary["config"]["seed"]})
    first = summaries[0]
    same = ("score", "judges", "reference", "machine", "threads", "world", "neon_ext", "versions")
    return {
        "command": " ".join(["python edm_neon.py", *argv]),
        "config": dataclasses.asdict(c),
        **{key: first[key] for key in same},
        "kimg": [entry["kimg"] for entry in first["snapshots"]],
        "seeds": seeds,
        "final": [[entry["final"] for entry in s["snapshots"]] for s in summaries],
        "claims": [[entry["claims"] for entry in s["snapshots"]] for s in summaries],
        "over_seeds": claims_over_seeds(summaries),
        "seconds_total": time.perf_counter() - begin,
    }
