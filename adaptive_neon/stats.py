"""Intervals and verdicts: numbers in, numbers out."""

import math

import numpy as np
import scipy
import scipy.stats

FOLDS = 20  # of the seeds of every score: jackknife intervals need no new samples


def compare(scores, others, level=0.05):
    """Paired difference of distances, mean over the seed sets of `scores` and `others`, and its
    interval: the delete-one-fold jackknife (Student's t) of the difference, as both saw the same
    noise. better: lower. p: of no difference, two-sided."""
    ours, theirs = (float(np.mean([score.fd for score in side])) for side in (scores, others))
    if not math.isfinite(ours) or not math.isfinite(theirs):
        difference = 0.0 if ours == theirs else ours - theirs
        verdict = (
            "no significant difference"
            if ours == theirs
            else "better"
            if ours < theirs
            else "worse"
        )
        p = 1.0 if ours == theirs else 0.0
        return {
            "difference": difference,
            "low": difference,
            "high": difference,
            "verdict": verdict,
            "p": p,
        }

    pairs = list(zip(scores, others, strict=True))
    full = float(np.mean([one.fd - other.fd for one, other in pairs]))
    half, p = jackknife(full, [np.subtract(one.folds, other.folds) for one, other in pairs], level)
    verdict = "no significant difference"
    if abs(full) > half:
        verdict = "better" if full < 0 else "worse"
    return {"difference": full, "low": full - half, "high": full + half, "verdict": verdict, "p": p}


def as_shares(gain, theirs):
    """What compare() found, as shares of the other's distance."""
    keys = ("difference", "low", "high")
    return {f"relative_{key}": gain[key] / theirs if theirs else 0.0 for key in keys}


def jackknife(mean, folds, level=0.05):
    """Half the interval of a mean over seed sets and the p-value of its being zero. folds
    [sets, FOLDS]: what was averaged, without each fold of the seeds."""
    folds = np.array(folds)
    variance = (FOLDS - 1) / FOLDS * ((folds - folds.mean(1, keepdims=True)) ** 2).sum()
    freedom = len(folds) * (FOLDS - 1)
    half = float(scipy.stats.t.ppf(1 - level / 2, freedom) * variance**0.5 / len(folds))
    if not half:
        return half, float(mean == 0)
    return half, float(2 * scipy.stats.t.sf(abs(mean) * len(folds) / variance**0.5, freedom))


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


def mean_and_spread(shares):
    spread = f" +- {np.std(shares, ddof=1):.1%}" if len(shares) > 1 else ""
    return f"{np.mean(shares):+.1%}{spread}"
