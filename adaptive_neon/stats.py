"""Intervals and verdicts: numbers in, numbers out."""

import dataclasses
import math

import numpy as np
import scipy.stats

LEVEL = 0.05  # of every interval and verdict; what tables call 95%
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
    plain: float = math.nan  # the difference before the correction of bias
    real_noise: bool = True  # whether the interval holds the noise of the real images, too

    def as_json(self) -> dict:
        """Everything as plain data, with the shares of the other's distance."""
        row = dataclasses.asdict(self)
        other = row.pop("other")
        for key in ("difference", "low", "high"):
            row[f"relative_{key}"] = row[key] / other if other > 0 else math.nan
            if row[key] == 0:
                row[f"relative_{key}"] = 0.0
        return row


def verdict_of(difference: float, half: float) -> str:
    if not abs(difference) > half:
        return "no significant difference"
    return "better" if difference < 0 else "worse"


def compare(scores, others, level=LEVEL) -> Comparison:
    """Paired difference of distances, mean over the seed sets of `scores` and `others`, and its
    interval.

    Two noises make it uncertain, the seeds' and that of the real images; pairing cancels only what
    both models share of each. Both follow from the distances without each fold, of the seeds and
    of the real images (the delete-one-fold jackknife, Student's t). On final seeds distances are
    compared without their bias, which depends on the model and can decide.
    """
    fds = [[score.fd for score in side] for side in (scores, others)]
    ours, theirs = (float(np.mean(side)) for side in fds)
    if math.isinf(ours) or math.isinf(theirs):
        # A sampler that diverged is infinitely far away, without noise.
        gap = 0.0 if ours == theirs else ours - theirs
        return Comparison(gap, gap, gap, float(gap == 0), verdict_of(gap, 0.0), theirs, gap)

    known = all(score.corrected is not None for score in [*scores, *others])
    value = "corrected" if known else "fd"
    gain = paired(scores, others, value, "folds", "real_folds", level)
    return dataclasses.replace(gain, plain=ours - theirs)


def compare_kernels(scores, others) -> Comparison | None:
    """The same of kernel distances, which have no bias; None where they were not measured."""
    if any(score.kernel is None for score in [*scores, *others]):
        return None
    return paired(scores, others, "kernel", "kernel_folds", "kernel_real_folds")


def compare_alignment(scores, others) -> Comparison | None:
    """The same of adherence, which is better where it is higher and asks no real images; None where
    it was not measured."""
    if any(score.alignment is None for score in [*scores, *others]):
        return None
    gain = paired(scores, others, "alignment", "alignment_folds", None)
    verdict = verdict_of(-gain.difference, gain.high - gain.difference)
    return dataclasses.replace(gain, verdict=verdict, real_noise=True)


def paired(scores, others, value, folds, real_folds, level=LEVEL) -> Comparison:
    """The comparison of one kind of distance, given by the names of a score's entries."""

    def differences(key):
        pairs = zip(scores, others, strict=True)
        return [np.subtract(getattr(one, key), getattr(other, key)) for one, other in pairs]

    difference = float(np.mean(differences(value)))
    real = None
    both = [*scores, *others]
    if real_folds and all(getattr(score, real_folds) is not None for score in both):
        real = np.mean(differences(real_folds), 0)  # the seed sets share the real images
    half, p = jackknife(difference, differences(folds), level, real)
    return Comparison(
        difference=difference,
        low=difference - half,
        high=difference + half,
        p=p,
        verdict=verdict_of(difference, half),
        other=float(np.mean([getattr(score, value) for score in others])),
        plain=difference,
        real_noise=real is not None,
    )


def without_bias(fd, folds, real_folds=None) -> float:
    """A distance without its bias of first order: the jackknife's estimate from the distances
    without each fold of the generated images, and of the real ones."""
    bias = (FOLDS - 1) * (np.mean(folds) - fd)
    if real_folds is not None:
        bias += (FOLDS - 1) * (np.mean(real_folds) - fd)
    return float(fd - bias)


def jackknife(mean, folds, level=LEVEL, real=None):
    """Half the interval of a mean over seed sets and the p-value of its being zero. folds
    [sets, FOLDS]: what was averaged, without each fold of the seeds; real [FOLDS]: their mean,
    without each fold of the real images."""
    variances = [fold_variance(np.array(folds)) / len(folds) ** 2]
    freedoms = [len(folds) * (FOLDS - 1)]
    if real is not None:
        variances.append(fold_variance(np.array([real])))
        freedoms.append(FOLDS - 1)

    variance = sum(variances)
    if not variance:
        return 0.0, float(mean == 0)
    # Degrees of freedom of a sum of two variances (Welch-Satterthwaite).
    shares = [v / variance for v in variances]
    freedom = 1 / sum(share**2 / f for share, f in zip(shares, freedoms, strict=True))
    half = float(scipy.stats.t.ppf(1 - level / 2, freedom) * variance**0.5)
    return half, float(2 * scipy.stats.t.sf(abs(mean) / variance**0.5, freedom))


def fold_variance(folds) -> float:
    """The jackknife's variance, summed over the rows of folds [sets, FOLDS]."""
    return (FOLDS - 1) / FOLDS * float(((folds - folds.mean(1, keepdims=True)) ** 2).sum())


def fd_interval(scores):
    """95% interval of the mean distance over the seed sets, over the seeds' noise alone."""
    value = float(np.mean([score.fd for score in scores]))
    if not math.isfinite(value):
        return {"low": value, "high": value}
    half, _ = jackknife(value, [score.folds for score in scores])
    return {"low": value - half, "high": value + half}


def interval_of(scores, key):
    """Mean kernel distance or adherence (key) over the seed sets and its 95% interval, over the
    seeds' noise alone."""
    value = float(np.mean([getattr(score, key) for score in scores]))
    half, _ = jackknife(value, [getattr(score, f"{key}_folds") for score in scores])
    return {"value": value, "low": value - half, "high": value + half}


def holm(p_values, level=LEVEL):
    """Which hypotheses hold when all are asked at once: the chance that any is wrong stays at
    `level` (Holm 1979)."""
    held = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(p_values) - rank):
            break
        held[i] = True
    return held
