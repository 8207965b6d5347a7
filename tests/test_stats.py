"""What adaptive_neon/stats.py promises."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from edm_helpers import (
    gaussian_score,
    score_of,
    standard_reference,
)

import adaptive_neon as neon

# -------------------- precision and recall


def inside(points, manifold, k):
    """Share of points within the distance of some point's k-th neighbour, one by one."""
    points, manifold = points.double().numpy(), manifold.double().numpy()
    hits = []
    for point in points:
        hit = False
        for centre in manifold:
            others = np.sort(np.linalg.norm(manifold - centre, axis=1))[1:]  # without itself
            hit |= np.linalg.norm(point - centre) <= others[k - 1]
        hits.append(hit)
    return float(np.mean(hits))


# -------------------- comparisons


def pair_of_scores(seed, sets=1, scale=1.0):
    """Scores whose folds differ at random."""
    rng = np.random.default_rng(seed)
    ours = [score_of(3.0 + i, 3.0 + i + scale * rng.normal(size=20)) for i in range(sets)]
    theirs = [score_of(2.5 + 2 * i, 2.5 + scale * rng.normal(size=20)) for i in range(sets)]
    return ours, theirs


@pytest.mark.parametrize("sets", [1, 2, 5])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_interval_is_the_jackknifes(sets, level):
    """Deleting one fold of every set in turn; Student's t with 19 degrees of freedom a set."""
    ours, theirs = pair_of_scores(0, sets)
    variance = 0.0
    for one, other in zip(ours, theirs, strict=True):
        d = np.array(one.folds) - np.array(other.folds)
        variance += 19 / 20 * ((d - d.mean()) ** 2).sum()
    half = scipy.stats.t.ppf(1 - level / 2, 19 * sets) * variance**0.5 / sets
    middle = np.mean([one.fd - other.fd for one, other in zip(ours, theirs, strict=True)])
    found = neon.stats.compare(ours, theirs, level)
    assert found["difference"] == pytest.approx(middle)
    assert (found["low"], found["high"]) == pytest.approx((middle - half, middle + half))


def test_interval_is_of_95_percent():
    ours, theirs = pair_of_scores(0)
    assert neon.stats.compare(ours, theirs) == neon.stats.compare(ours, theirs, 0.05)


@pytest.mark.parametrize(
    "scale, flip, verdict",
    [
        (0.01, False, "worse"),
        (0.01, True, "better"),
        (1.0, False, "no significant difference"),
        (1.0, True, "no significant difference"),
    ],
)
def test_verdict(scale, flip, verdict):
    ours, theirs = pair_of_scores(0, scale=scale)
    assert neon.stats.compare(*((theirs, ours) if flip else (ours, theirs)))["verdict"] == verdict


def test_equal_scores():
    (one,), _ = pair_of_scores(0)
    assert neon.stats.compare([one], [one]) == {
        "difference": 0,
        "low": 0,
        "high": 0,
        "verdict": "no significant difference",
        "p": 1,
    }


@pytest.mark.parametrize(
    "ours, theirs, difference, verdict",
    [
        (math.inf, 1.0, math.inf, "worse"),
        (1.0, math.inf, -math.inf, "better"),
        (math.inf, math.inf, 0.0, "no significant difference"),
    ],
)
def test_comparison_with_a_model_that_diverges(ours, theirs, difference, verdict):
    found = neon.stats.compare([score_of(ours)], [score_of(theirs)])
    assert found["difference"] == found["low"] == found["high"] == difference
    assert found["verdict"] == verdict


def test_null_coverage():
    """Two equal models: zero lies inside in 90 % to 98 % of 200 repetitions."""
    rng, prepared, inside = np.random.default_rng(0), standard_reference(), 0
    for _ in range(200):
        one, other = (
            gaussian_score(prepared, torch.from_numpy(rng.normal(0.3, 1.2, (200, 3))))
            for _ in range(2)
        )
        found = neon.stats.compare([one], [other])
        inside += found["low"] <= 0 <= found["high"]
    assert 180 <= inside <= 197


def test_common_noise_narrows_the_interval():
    rng, prepared = np.random.default_rng(1), standard_reference()
    noise, others = (torch.from_numpy(rng.normal(size=(600, 3))) for _ in range(2))
    near, far, alone = (
        gaussian_score(prepared, x) for x in (noise * 1.1, noise * 1.15, others * 1.15)
    )
    paired, unpaired = neon.stats.compare([near], [far]), neon.stats.compare([near], [alone])
    assert paired["verdict"] == "better"
    assert paired["high"] - paired["low"] < 0.3 * (unpaired["high"] - unpaired["low"])


def score(fd, folds=None, w=None, **changes):
    folds = folds if folds is not None else [fd] * neon.stats.FOLDS
    fields = {
        "snapshot": 1,
        "w": w or {"a": 0.0},
        "images": 100,
        "first_seed": 0,
        "fd": fd,
        "folds": list(folds),
        "precision": None,
        "recall": None,
        "arithmetic": "fp32",
        "seconds": 0.0,
        "key": "k",
    }
    return neon.scores.Score(**{**fields, **changes})


def noisy(fd, seed, spread=1.0):
    """A score whose folds scatter."""
    rng = np.random.default_rng(seed)
    return score(fd, fd + spread * rng.standard_normal(neon.stats.FOLDS) / 10)


# -------------------- differences, corrections


def test_jackknife_of_a_mean_is_students_t():
    """For a statistic that is linear in the images, folds of equal size give the t test."""
    parts = np.random.default_rng(0).standard_normal(neon.stats.FOLDS) + 0.4
    without = [np.delete(parts, k).mean() for k in range(neon.stats.FOLDS)]
    half, p = neon.stats.jackknife(parts.mean(), [without])
    expected = scipy.stats.ttest_1samp(parts, 0)
    assert p == pytest.approx(expected.pvalue, rel=1e-9)
    interval = expected.confidence_interval()
    assert half == pytest.approx((interval.high - interval.low) / 2, rel=1e-9)


@pytest.mark.parametrize("gap, verdict", [(-5, "better"), (5, "worse"), (0, "no significant")])
def test_p_value_agrees_with_the_verdict(gap, verdict):
    found = neon.stats.compare([noisy(20 + gap, 1)], [noisy(20, 2)])
    assert found["verdict"].startswith(verdict)
    assert (found["p"] < 0.05) == (gap != 0)


def test_p_values_at_the_ends():
    assert neon.stats.compare([score(1.0)], [score(1.0)])["p"] == 1
    assert neon.stats.compare([score(math.inf)], [score(1.0)])["p"] == 0
    assert neon.stats.compare([score(math.inf)], [score(math.inf)])["p"] == 1


@pytest.mark.parametrize(
    "p_values, held",
    [
        ([0.01, 0.04, 0.03, 0.005], [True, False, False, True]),
        ([0.04, 0.03], [False, False]),  # each alone would hold
        ([0.02, 0.04], [True, True]),  # Bonferroni would drop the second
        ([0.5, 0.001], [False, True]),
        ([], []),
    ],
)
def test_holm(p_values, held):
    assert neon.stats.holm(p_values) == held


def finals_of(gains):
    """{judge: gain of blockwise over global} -> finals as claims_of takes them."""
    finals = {}
    for i, (judge, gain) in enumerate(gains.items()):
        finals[judge] = {
            "base": [noisy(30, 10 + i)],
            "global": [noisy(20, 20 + i)],
            "blockwise": [noisy(20 + gain, 30 + i)],
            "random blocks 1": [noisy(20, 40 + i)],
        }
    return finals


def claim_of(finals, model, against):
    for claim in neon.verdicts.claims_of(finals):
        if (claim.model, claim.against) == (model, against):
            return claim
    raise AssertionError(f"no claim {model} against {against}")


def test_claims_count_only_judges_that_no_selection_saw():
    claim = claim_of(finals_of({"own": -9, "a": -9, "b": 9, "c": 0}), "blockwise", "global")
    assert claim.better == ["a"] and claim.worse == ["b"]
    assert claim.own["verdict"] == "better" and set(claim.judges) == {"a", "b", "c"}
    assert "of 3 judges that no selection saw, better in 1 and worse in 1" in claim.sentence()


def test_claims_compare_random_blocks_on_both_sides():
    found = [
        (claim.model, claim.against) for claim in neon.verdicts.claims_of(finals_of({"own": -9}))
    ]
    assert ("random blocks 1", "global") in found and ("blockwise", "random blocks 1") in found
    assert ("searched", "global") not in found


def test_claims_are_corrected_for_the_number_of_judges():
    """A gain that one judge alone would call significant."""

    def judges(count):
        finals = finals_of({"own": 0})
        finals["own"].pop("random blocks 1")
        folds = np.random.default_rng(3).standard_normal(neon.stats.FOLDS)
        half, _ = neon.stats.jackknife(0, [folds])
        for i in range(count):
            finals[f"j{i}"] = {
                "base": [score(30.0)],
                "global": [score(20.0, 20 + folds)],
                "blockwise": [score(20 - 1.1 * half)],
            }
        return claim_of(finals, "blockwise", "global")

    assert judges(1).better == ["j0"]
    assert judges(4).better == []
    assert judges(4).judges["j0"]["verdict"] == "better"


def test_relative_differences_are_shares_of_the_other_model():
    claim = claim_of(finals_of({"own": -5, "a": -4}), "blockwise", "global")
    assert claim.judges["a"]["relative_difference"] == pytest.approx(-0.2)
    assert claim.own["relative_difference"] == pytest.approx(-0.25)
    gain = claim.own
    assert gain["relative_high"] == pytest.approx(gain["high"] / 20)
