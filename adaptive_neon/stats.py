"""Intervals and verdicts: numbers in, numbers out."""

import dataclasses
import math

import numpy as np
import scipy.special

FOLDS = 20  # of the seeds of every score: jackknife intervals need no new samples


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of two models' distances, paired: better is lower."""

    difference: float
    low: float  # of its interval
    high: float
    p: float  # of no difference, two-sided
    verdict: str  # better, worse, no significant difference
    other: float = math.nan  # the other's distance, that relative differences are shares of

    def as_json(self) -> dict:
        """Everything as plain data, with the shares of the other's distance."""
        row = dataclasses.asdict(self)
        other = row.pop("other")
        for key in ("difference", "low", "high"):
            row[f"relative_{key}"] = row[key] / other if other else 0.0
        return row


def compare(scores, others, level=0.05) -> Comparison:
    """Paired difference of distances, mean over the seed sets of `scores` and `others`, and its
    interval: the delete-one-fold jackknife (Student's t) of the difference, as both saw the same
    noise."""
    ours, theirs = (float(np.mean([score.fd for score in side])) for side in (scores, others))
    if math.isfinite(ours) and math.isfinite(theirs):
        pairs = list(zip(scores, others, strict=True))
        difference = float(np.mean([one.fd - other.fd for one, other in pairs]))
        folds = [np.subtract(one.folds, other.folds) for one, other in pairs]
        half, p = jackknife(difference, folds, level)
    else:
        # A sampler that diverged is infinitely far away, without noise.
        difference = 0.0 if ours == theirs else ours - theirs
        half, p = 0.0, float(ours == theirs)

    verdict = "no significant difference"
    if abs(difference) > half:
        verdict = "better" if difference < 0 else "worse"
    return Comparison(difference, difference - half, difference + half, p, verdict, theirs)


def jackknife(mean, folds, level=0.05):
    """Half the interval of a mean over seed sets and the p-value of its being zero. folds
    [sets, FOLDS]: what was averaged, without each fold of the seeds."""
    folds = np.array(folds)
    variance = (FOLDS - 1) / FOLDS * ((folds - folds.mean(1, keepdims=True)) ** 2).sum()
    freedom = len(folds) * (FOLDS - 1)
    half = float(scipy.special.stdtrit(freedom, 1 - level / 2) * variance**0.5 / len(folds))
    if not half:
        return half, float(mean == 0)
    return half, float(2 * scipy.special.stdtr(freedom, -abs(mean) * len(folds) / variance**0.5))


def fd_interval(scores):
    """95% interval of the mean distance over the seed sets, over the noise alone."""
    value = float(np.mean([score.fd for score in scores]))
    if not math.isfinite(value):
        return {"low": value, "high": value}
    half, _ = jackknife(value, [score.folds for score in scores])
    return {"low": value - half, "high": value + half}


def kernel_interval(scores):
    """Mean kernel distance over the seed sets and its 95% interval, over the noise alone."""
    value = float(np.mean([score.kernel for score in scores]))
    half, _ = jackknife(value, [score.kernel_folds for score in scores])
    return {"value": value, "low": value - half, "high": value + half}


def holm(p_values, level=0.05):
    """Which hypotheses hold when all are asked at once: the chance that any is wrong stays at
    `level` (Holm 1979)."""
    held = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(p_values) - rank):
            break
        held[i] = True
    return held
