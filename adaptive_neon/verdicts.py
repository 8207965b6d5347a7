"""Verdicts: the final comparison, its claims and warnings, and all of it over training seeds."""

import dataclasses
import math
import re
import shlex
import time

import numpy as np
import scipy.stats

from .stats import (
    LEVEL,
    Comparison,
    compare,
    compare_alignment,
    compare_kernels,
    fd_interval,
    holm,
    interval_of,
    verdict_of,
)


def number(value, sign="") -> str:
    """Four significant digits, of small numbers too; None is infinite, as in summary.json."""
    if value is None:
        return "inf"
    if 1000 <= abs(value) < 1e6:
        return f"{value:{sign}.0f}"
    return f"{value:{sign}.4g}"


def percent(share) -> str:
    """Three significant digits; n/a of a distance that is zero or infinite."""
    return "n/a" if share is None or not math.isfinite(share) else f"{100 * share:+.3g}%"


def range_text(gain) -> str:
    """A paired difference and its interval, in shares of the other's distance."""
    low, high = percent(gain["relative_low"]), percent(gain["relative_high"])
    return f"{percent(gain['relative_difference'])} [{low}, {high}]"


# -------------------- one judge
def final_comparison(finals) -> dict:
    """{model: [Score] of every final seed set} -> {model: mean, all values, spread, paired
    differences}, plain data. Verdicts are the claims' business: one criterion for all."""
    results = {}
    for name, scores in finals.items():
        values = [score.fd for score in scores]
        result = {"w": scores[0].w, "images": scores[0].images, "all": values}
        result["fd"] = float(np.mean(values))
        result |= fd_interval(scores)
        for key in ("corrected", "precision", "recall", "memorisation"):
            measured = [getattr(score, key) for score in scores]
            if None not in measured:
                result[key] = float(np.mean(measured))
        for key in ("kernel", "alignment"):
            if all(getattr(score, key) is not None for score in scores):
                result[key] = interval_of(scores, key)
        result["std"] = None
        if len(values) > 1 and math.isfinite(result["fd"]):
            result["std"] = float(np.std(values, ddof=1))
        for other in ("base", "global"):
            if name not in ("base", other) and other in finals:
                gain = compare(scores, finals[other]).as_json()
                del gain["verdict"]
                result[f"against_{other}"] = gain
        results[name] = result
    return results


# -------------------- claims
DISAGREE = "distances disagree"
UNKNOWN = "noise of the real images unknown"


def verdict_text(gain) -> str:
    """The verdict of a gain (see claims_of()), with what it does not know."""
    if gain["real_noise"] or gain["verdict"] == "no significant difference":
        return gain["verdict"]
    return f"{gain['verdict']} ({UNKNOWN})"


CLAIMS = (
    ("collapsed", "base"),
    ("global", "base"),
    ("blockwise", "base"),
    ("searched", "base"),
    ("collapsed", "global"),
    ("blockwise", "global"),
    ("searched", "global"),
    ("searched", "blockwise"),
)
STUDIED = ("base", "collapsed", "global", "blockwise", "searched")


def pairs_of(models) -> list[tuple[str, str]]:
    """Which models are compared: what was studied; random blocks with the global weight and the
    blocks; every control with the base, and what was repaired with the control."""
    pairs = [pair for pair in CLAIMS if pair[0] in models and pair[1] in models]
    for name in models:
        if name.startswith("random blocks"):
            pairs.append((name, "global"))
            if "blockwise" in models:
                pairs.append(("blockwise", name))
        elif name not in STUDIED:
            pairs.append((name, "base"))
            for repaired in ("global", "blockwise", "searched"):
                if repaired in models:
                    pairs.append((repaired, name))
    return pairs


def primary_pair(models, primary="") -> tuple[str, str]:
    """The claim that is named before the run: "MODEL" or "MODEL against OTHER"; by default what was
    searched, else block-wise weights, against the best global one."""
    model, _, against = primary.partition(" against ")
    if not model:
        model = next(name for name in ("searched", "blockwise", "global") if name in models)
    return model, against or ("base" if model == "global" else "global")


def claims_of(finals, primary="") -> list[dict]:
    """{judge: {model: [Score]}}, the first judge the one that was selected with -> what is claimed,
    plain data: that one model is better than another, in the features it was selected with ("own")
    and in judges that no selection saw. Each of these is a gain: the comparison of distances with
    the verdict that holds, beside it those of kernel distance and adherence, where measured.

    One criterion: the primary claim, in the features of the selection, is one question at 5%;
    all other claims in all judges are one family (Holm's correction). The kernel distance is judged
    the same way, and a verdict holds where it does not say the opposite. So is adherence, for
    itself.
    """
    own, *unseen = finals
    pairs = pairs_of(finals[own])
    first = primary_pair(finals[own], primary)
    distances: dict[tuple, Comparison] = {}
    kernels: dict[tuple, Comparison] = {}
    adherence: dict[tuple, Comparison] = {}
    kinds = (distances, compare), (kernels, compare_kernels), (adherence, compare_alignment)
    for model, against in pairs:
        for judge, scores in finals.items():
            for found, comparison in kinds:
                gain = comparison(scores[model], scores[against])
                if gain is not None:
                    found[model, against, judge] = gain
    verdicts = adjusted(distances, (*first, own))
    opposite = adjusted(kernels, (*first, own))
    asked_for = adjusted(adherence, (*first, own))

    gains = {}
    for question, verdict in verdicts.items():
        if {verdict, opposite.get(question)} == {"better", "worse"}:
            verdict = DISAGREE
        gains[question] = distances[question].as_json() | {"verdict": verdict}
        if question in opposite:
            gains[question]["kernel"] = kernels[question].as_json()
        if question in asked_for:
            asked = adherence[question].as_json() | {"verdict": asked_for[question]}
            gains[question]["alignment"] = asked

    claims = []
    for model, against in pairs:
        judges = {judge: gains[model, against, judge] for judge in unseen}
        claim = {
            "model": model,
            "against": against,
            "primary": (model, against) == first,  # the one that was named before the run
            "own": gains[model, against, own],
            "judges": judges,
            "better": [judge for judge in unseen if judges[judge]["verdict"] == "better"],
            "worse": [judge for judge in unseen if judges[judge]["verdict"] == "worse"],
        }
        claims.append(claim | {"sentence": sentence_of(claim)})
    return claims


def adjusted(comparisons, primary) -> dict:
    """{question: verdict}: of the primary one at 5%, of all others together (Holm)."""
    family = [question for question in comparisons if question != primary]
    held = holm([comparisons[question].p for question in family])
    holds = dict(zip(family, held, strict=True))
    verdicts = {}
    for question, gain in comparisons.items():
        verdicts[question] = gain.verdict
        if not holds.get(question, True):
            verdicts[question] = "no significant difference"
    return verdicts


def sentence_of(claim) -> str:
    own = claim["own"]
    text = (
        f"{claim['model']} against {claim['against']}: {verdict_text(own)} in its own features, "
        f"{range_text(own)}"
    )
    if claim["primary"]:
        text = f"primary claim, named before the run: {text}"
    if claim["judges"]:
        text += (
            f"; of {len(claim['judges'])} judges that no selection saw, better in "
            f"{len(claim['better'])} and worse in {len(claim['worse'])} (95%, Holm's correction)"
        )

    disagree, biased, adherence = [], [], ""
    for judge, gain in {"its own features": own, **claim["judges"]}.items():
        if gain["verdict"] == DISAGREE:
            disagree.append(judge)
        half = gain["high"] - gain["difference"]
        plain = verdict_of(gain["plain"], half)
        if plain != verdict_of(gain["difference"], half):
            biased.append(f"{judge} ({plain})")
        if "alignment" in gain:
            asked = gain["alignment"]
            adherence += f"; adherence in {judge} {asked['difference']:+.3g}, {asked['verdict']}"
    if disagree:
        text += f"; FD and kernel distance disagree in {', '.join(disagree)}"
    if biased:
        text += f"; without the correction of bias the verdict changes in {', '.join(biased)}"
    return text + adherence


def primary_warnings(claims, primary: str) -> list[str]:
    """A control that was to be made can be missing in the end: the guided network, say."""
    if any(claim["primary"] for claim in claims):
        return []
    claim = f"the primary claim {primary}".strip()
    return [f"{claim} could not be asked"]


# -------------------- the summing-up
def strongest_control(final) -> str:
    """The control with the lowest distance of the final comparison; empty without controls."""
    level = {}
    for name, result in final.items():
        if name not in STUDIED:
            level[name] = result.get("corrected", result["fd"])
    return min(level, key=level.__getitem__) if level else ""


def headline(claims, final, best) -> str:
    """Two sentences: the primary claim; and what was repaired, against the base and against the
    strongest control. claims: of claims_of(); best: the model with the lowest distance on the
    selection seeds."""
    said = {(claim["model"], claim["against"]): claim for claim in claims}
    sentences = []
    for claim in claims:
        if claim["primary"]:
            sentences.append(f"{sentence_case(short_claim(claim))}.")

    repaired = best if best not in ("base", "collapsed") else "global"
    texts = []
    for other in ("base", strongest_control(final)):
        claim = said.get((repaired, other))
        if claim is not None and not claim["primary"]:
            texts.append(short_claim(claim))
    if best in ("base", "collapsed"):
        sentences.append("No step back from the base was better on the selection seeds.")
    if len(texts) > 1:
        texts[1] += ", the strongest control"
    if texts:
        sentences.append(f"{sentence_case('; '.join(texts))}.")
    return " ".join(sentences)


def short_claim(claim) -> str:
    """A claim in the features of the selection."""
    own = claim["own"]
    sides = f"{claim['model']} against {claim['against']}"
    return f"{sides}: {verdict_text(own)}, {range_text(own)}"


def headline_over_seeds(over, kimg) -> str:
    """The same over training seeds: the primary claim, what it is about and the global weight
    against the base, and against the control that gains most on the base. over:
    claims_over_seeds()."""
    said = {(row["model"], row["against"]): row for row in over if row["kimg"] == kimg}
    gains = {}
    for (model, against), row in said.items():
        if against == "base" and model not in STUDIED and math.isfinite(mean_of(row)):
            gains[model] = mean_of(row)
    strongest = min(gains, key=gains.__getitem__) if gains else ""

    texts = []
    repaired = ["global"]
    for (model, _), row in said.items():
        if row["primary"]:
            texts.append(f"primary claim: {row['sentence']}")
            repaired.insert(0, model)
    for model in dict.fromkeys(repaired):
        for other in ("base", strongest):
            row = said.get((model, other))
            if row is not None and not row["primary"]:
                note = ", the strongest control" if other == strongest else ""
                texts.append(row["sentence"] + note)
    return f"{sentence_case('; '.join(texts))}." if texts else ""


def mean_of(row) -> float:
    """Over the training seeds, in the features of the selection; seeds that diverged count not."""
    finite = [share for share in row["own_relative"] if share is not None and math.isfinite(share)]
    return float(np.mean(finite)) if finite else math.inf


def sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


# -------------------- warnings
LITTLE = 5e-4  # of the norm of a block: what moves less, rounding and luck can hide


def training_warnings(blocks, final) -> list[str]:
    """Where a step back has little to undo. blocks: Merger.table(); final: final_comparison()."""
    notes = []
    most = max(row["drift"] for row in blocks.values())
    if most < LITTLE:
        notes.append(
            f"self-training has hardly moved the network, no block by more than {most:.1g} of its "
            "norm: try a longer --snapshot, a larger --lr, a shorter --ramp-kimg and --ema-kimg"
        )
    if final["collapsed"]["against_base"]["high"] < 0:
        notes.append(
            "the self-trained network is better than the base: self-training has done no harm that "
            "a step back could undo"
        )
    return notes


def edge_warnings(c, models, values) -> list[str]:
    """Where more extreme weights might be better still. values: the global weights tried."""
    notes = []
    tried = sorted(value for value in values if value != -1)
    (w,) = set(models["global"].w.values())
    if w and len(tried) > 1 and w in (tried[0], tried[-1]):
        notes.append(f"global: w = {w:g} lies on the edge of all that were tried: widen --sweep")
    if "searched" in models:
        found = list(models["searched"].w.values())
        outside = sum(value in c.bounds for value in found)
        if outside:
            notes.append(f"searched: {outside} of {len(found)} weights lie on --bounds")
    return notes


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

    base = final["base"]
    for name in ("blockwise", "searched"):
        if name not in final:
            continue
        # Both gains uncorrected, in shares of the base: the seed sets differ in size, and in bias.
        gain = final[name]["against_base"]
        half = gain["high"] - gain["difference"]
        promised = models[name].fd / models["base"].fd - 1
        if promised < (gain["plain"] - half) / base["fd"]:
            notes.append(
                f"{name} differs from the base by {percent(promised)} on the selection seeds and "
                f"by {percent(gain['plain'] / base['fd'])} on the final ones: selection noise"
            )
    for name, result in final.items():
        loss = base.get("precision", 0) - result.get("precision", 0)
        if name != "base" and loss > 0.01 and result["against_base"]["difference"] < 0:
            notes.append(f"{name}: precision falls while the distance falls")
    # Two shares of as many images each, three standard errors apart.
    for name, result in final.items():
        if "memorisation" in result and "memorisation" in base:
            more = result["memorisation"] - base["memorisation"]
            if more > 3 * (0.5 / result["images"]) ** 0.5:
                notes.append(f"{name}: samples lie closer to the training images than the base's")

    for name, candidate in models.items():
        if not math.isfinite(candidate.fd):
            notes.append(f"{name}: the sampler diverges")
    return notes


# -------------------- several training seeds
def mean_and_interval(shares) -> str:
    """Mean over training seeds and its 95% interval (Student's t); those that are not finite are
    counted."""
    finite = [share for share in shares if share is not None and math.isfinite(share)]
    parts = []
    if finite:
        mean = np.mean(finite)
        parts.append(percent(mean))
    if len(finite) > 1:
        error = np.std(finite, ddof=1) / len(finite) ** 0.5
        half = scipy.stats.t.ppf(1 - LEVEL / 2, len(finite) - 1) * error
        parts.append(f"[{percent(mean - half)}, {percent(mean + half)}]")
    if len(finite) < len(shares):
        parts.append(f"({len(shares) - len(finite)} infinite)")
    return " ".join(parts)


def claims_over_seeds(summaries) -> list[dict]:
    """What every claim of every snapshot came to over the training seeds, plain data with its
    sentence. Random partitions are one."""
    groups: dict[tuple, dict[int, list]] = {}
    for seed, summary in enumerate(summaries):
        for entry in summary["snapshots"]:
            for claim in entry["claims"]:
                sides = (claim["model"], claim["against"])
                names = [re.sub(r"(random blocks) \d+", r"\1", name) for name in sides]
                seeds = groups.setdefault((entry["kimg"], *names), {})
                seeds.setdefault(seed, []).append(claim)
    rows = []
    for (kimg, model, against), seeds in groups.items():
        rows.append(over_seeds(kimg, model, against, list(seeds.values())))
    return rows


def over_seeds(kimg, model, against, seeds) -> dict:
    """seeds: of every training seed its claims of these models, one a random partition. What is
    independent is a seed: shares are means over its partitions and judges."""
    own_relative, relative = [], []
    for claims in seeds:
        own_relative.append(float(np.mean([shares_of(claim["own"]) for claim in claims])))
        others = []
        for claim in claims:
            others += [shares_of(gain) for gain in claim["judges"].values()]
        if others:
            relative.append(float(np.mean(others)))
    claims = [claim for found in seeds for claim in found]
    judges = len(claims[0]["judges"])
    row = {
        "kimg": kimg,
        "model": model,
        "against": against,
        "primary": any(claim["primary"] for claim in claims),
        "own_verdicts": [claim["own"]["verdict"] for claim in claims],
        "own_relative": own_relative,
        "seeds": len(seeds),
        "judges": judges,
        "partitions": max(len(found) for found in seeds),
        "cases": sum(len(claim["judges"]) for claim in claims),
        "better": sum(len(claim["better"]) for claim in claims),
        "worse": sum(len(claim["worse"]) for claim in claims),
        "relative": relative,
    }

    text = (
        f"{model} is better than {against} in {row['own_verdicts'].count('better')} of "
        f"{len(claims)} in its own features ({mean_and_interval(own_relative)})"
    )
    if judges:
        text += (
            f" and in {row['better']} of {cases_text(row)} of the judges that no selection saw, "
            f"worse in {row['worse']} ({mean_and_interval(relative)})"
        )
    if not all(claim["own"]["real_noise"] for claim in claims):
        text += f" ({UNKNOWN})"
    return row | {"sentence": text}


def shares_of(gain) -> float:
    share = gain["relative_difference"]
    return math.nan if share is None else share


def cases_text(row) -> str:
    """How many verdicts, and that they are not as many independent ones."""
    text = f"{row['seeds']} seeds x {row['judges']} judges"
    if row["partitions"] > 1:
        text += f" x {row['partitions']} random partitions"
    return f"{row['cases']} ({text})"


def summarise_seeds(c, argv, summaries, begin) -> dict:
    """summary.json of several training seeds; those of each seed lie in its folder."""
    seeds = []
    for k, summary in enumerate(summaries):
        seeds.append({"folder": f"seed-{k}", "seed": summary["config"]["seed"]})
    first = summaries[0]
    over = claims_over_seeds(summaries)
    same = ("score", "judges", "reference", "machine", "threads", "world", "neon_ext", "versions")
    return {
        "command": shlex.join(["python", "edm_neon.py", *argv]),
        "config": dataclasses.asdict(c),
        **{key: first[key] for key in same},
        "kimg": [entry["kimg"] for entry in first["snapshots"]],
        "seeds": seeds,
        "final": [[entry["final"] for entry in s["snapshots"]] for s in summaries],
        "claims": [[entry["claims"] for entry in s["snapshots"]] for s in summaries],
        "over_seeds": over,
        "headlines": [headline_over_seeds(over, entry["kimg"]) for entry in first["snapshots"]],
        "seconds_total": time.perf_counter() - begin,
    }
