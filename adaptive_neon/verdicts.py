"""Verdicts: the final comparison, its claims and warnings, and all of it over training seeds."""

import dataclasses
import math
import re
import time

import numpy as np

from .stats import as_shares, compare, fd_interval, holm, kernel_interval, mean_and_spread


def final_comparison(finals):
    """{model: [Score] of every final seed set} -> mean, all values, spread, paired differences."""
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
        result["std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        if name != "base":
            result["against_base"] = compare(scores, finals["base"])
        if name not in ("base", "global"):
            result["against_global"] = compare(scores, finals["global"])
        results[name] = result
    return results


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one model of a snapshot is better than another: in the features it was selected with,
    and in judges that no selection saw."""

    model: str
    against: str
    own: dict  # compare(), and the difference as a share of the other's distance
    judges: dict  # {judge: the same}
    better: list  # judges in which the gain holds, corrected for their number (Holm)
    worse: list

    def sentence(self):
        text = f"{self.model} against {self.against}: {self.own['verdict']} in its own features"
        if not self.judges:
            return text
        return (
            f"{text}; of {len(self.judges)} judges that no selection saw, better in "
            f"{len(self.better)} and worse in {len(self.worse)} (95%, Holm's correction)"
        )


CLAIMS = (
    ("global", "base"),
    ("blockwise", "base"),
    ("searched", "base"),
    ("blockwise", "global"),
    ("searched", "global"),
    ("searched", "blockwise"),
)


def claims_of(finals, level=0.05):
    """{judge: {model: [Score]}}, the first judge the one that was selected with -> [Claim]."""
    own, *unseen = finals
    models = finals[own]
    pairs = [pair for pair in CLAIMS if pair[0] in models and pair[1] in models]
    for name in models:
        if name.startswith("random blocks"):
            pairs.append((name, "global"))
            if "blockwise" in models:
                pairs.append(("blockwise", name))

    claims = []
    for model, against in pairs:
        gains = {}
        for judge, scores in finals.items():
            gain = compare(scores[model], scores[against], level)
            theirs = float(np.mean([score.fd for score in scores[against]]))
            gains[judge] = gain | as_shares(gain, theirs)
        held = holm([gains[judge]["p"] for judge in unseen], level)
        holding = [judge for judge, holds in zip(unseen, held, strict=True) if holds]
        claims.append(
            Claim(
                model=model,
                against=against,
                own=gains.pop(own),
                judges=gains,
                better=[judge for judge in holding if gains[judge]["difference"] < 0],
                worse=[judge for judge in holding if gains[judge]["difference"] > 0],
            )
        )
    return claims


def warnings_of(c, models, final, had_grid, judge):
    """What a careful reader would want to know."""
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
        against, base = final[name]["against_base"], final["base"]["fd"]
        promised = models[name].fd / models["base"].fd - 1
        if promised < against["low"] / base:
            notes.append(
                f"{name} is {-promised:.1%} below the base on the selection seeds and "
                f"{-against['difference'] / base:.1%} on the final ones: selection noise"
            )
        loss = final["base"].get("precision", 0) - final[name].get("precision", 0)
        if loss > 0.01 and against["difference"] < 0:
            notes.append(f"{name}: precision falls while the distance falls")
    for name, candidate in models.items():
        if not math.isfinite(candidate.fd):
            notes.append(f"{name}: the sampler diverges")
    return notes


@dataclasses.dataclass(frozen=True)
class OverSeeds:
    """One claim over training seeds (and random partitions), in the features of the selection and
    in the judges that no selection saw."""

    kimg: float
    model: str
    against: str
    own_verdicts: list  # one a seed (and partition)
    own_relative: list  # differences as shares of the other's distance
    cases: int  # verdicts of judges that no selection saw
    better: int  # of them, corrected for the number of judges
    worse: int
    relative: list  # mean over those judges, one a seed (and partition)

    @classmethod
    def of(cls, kimg, model, against, claims):
        """claims: as_json() of this claim, one a seed (and partition)."""
        relative = []
        for claim in claims:
            gains = [gain["relative_difference"] for gain in claim["judges"].values()]
            if gains:
                relative.append(float(np.mean(gains)))
        return cls(
            kimg=kimg,
            model=model,
            against=against,
            own_verdicts=[claim["own"]["verdict"] for claim in claims],
            own_relative=[claim["own"]["relative_difference"] for claim in claims],
            cases=sum(len(claim["judges"]) for claim in claims),
            better=sum(len(claim["better"]) for claim in claims),
            worse=sum(len(claim["worse"]) for claim in claims),
            relative=relative,
        )

    def sentence(self):
        better = self.own_verdicts.count("better")
        text = (
            f"{self.model} is better than {self.against} in {better} of {len(self.own_verdicts)} "
            f"in its own features ({mean_and_spread(self.own_relative)})"
        )
        if not self.cases:
            return text
        return (
            f"{text} and in {self.better} of {self.cases} cases of the judges that no selection "
            f"saw, worse in {self.worse} ({mean_and_spread(self.relative)})"
        )


def claims_over_seeds(summaries):
    """[OverSeeds] of every snapshot and claim; all random partitions are one."""
    groups = {}
    for summary in summaries:
        for entry in summary["snapshots"]:
            for claim in entry["claims"]:
                sides = (claim["model"], claim["against"])
                names = [re.sub(r"(random blocks) \d+", r"\1", name) for name in sides]
                groups.setdefault((entry["kimg"], *names), []).append(claim)
    return [OverSeeds.of(*key, claims) for key, claims in groups.items()]


def summarise_seeds(c, argv, summaries, begin):
    """summary.json of several training seeds; those of each seed lie in its folder."""
    seeds = []
    for k, summary in enumerate(summaries):
        seeds.append({"folder": f"seed-{k}", "seed": summary["config"]["seed"]})
    first = summaries[0]
    same = ("score", "judges", "reference", "machine", "threads", "world", "neon_ext", "versions")
    over = []
    for claim in claims_over_seeds(summaries):
        over.append(dataclasses.asdict(claim) | {"sentence": claim.sentence()})
    return {
        "command": " ".join(["python edm_neon.py", *argv]),
        "config": dataclasses.asdict(c),
        **{key: first[key] for key in same},
        "kimg": [entry["kimg"] for entry in first["snapshots"]],
        "seeds": seeds,
        "final": [[e["final"] for e in summary["snapshots"]] for summary in summaries],
        "claims": [[e["claims"] for e in summary["snapshots"]] for summary in summaries],
        "over_seeds": over,
        "seconds_total": time.perf_counter() - begin,
    }
