"""What adaptive_neon/verdicts.py promises."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from edm_helpers import config, weights
from made import FOLDS, finals_of, score, summary_of

import adaptive_neon as neon

# -------------------- final comparison


def test_final_mean_and_spread():
    found = neon.verdicts.final_comparison({"base": [score(3.0), score(5.0)]})["base"]
    assert found["all"] == [3, 5] and found["fd"] == 4
    assert found["std"] == pytest.approx(2**0.5) and found["images"] == 100


def test_final_precision_and_recall_are_means():
    scores = [score(3.0, precision=0.5, recall=0.2), score(5.0, precision=0.6, recall=0.4)]
    found = neon.verdicts.final_comparison({"base": scores})["base"]
    assert found["precision"] == pytest.approx(0.55) and found["recall"] == pytest.approx(0.3)


def test_what_was_not_measured_is_not_there():
    found = neon.verdicts.final_comparison({"base": [score(1.0)]})["base"]
    assert "precision" not in found and "kernel" not in found and found["std"] is None


def test_final_pairs():
    """Every model against the base, and against the best global weight."""
    scores = finals_of()["own"]
    found = neon.verdicts.final_comparison(scores)
    for name in scores:
        for other in ("base", "global"):
            key = f"against_{other}"
            if name == "base" or name == other:
                assert key not in found[name]
            else:
                gain = neon.stats.compare(scores[name], scores[other])
                assert found[name][key] == gain.as_json()


# -------------------- claims


def noisy(fd, seed):
    """A score whose folds scatter, with a standard error of about 0.4."""
    folds = fd + 0.1 * np.random.default_rng(seed).standard_normal(FOLDS)
    return score(fd, folds)


def gains(shifts):
    """{judge: how far blockwise is from global} -> finals as claims_of() takes them."""
    finals = {}
    for i, (judge, shift) in enumerate(shifts.items()):
        finals[judge] = {
            "base": [noisy(30, 10 + i)],
            "global": [noisy(20, 20 + i)],
            "blockwise": [noisy(20 + shift, 30 + i)],
            "random blocks 1": [noisy(20, 40 + i)],
        }
    return finals


def claim_of(finals, model, against):
    for claim in neon.verdicts.claims_of(finals):
        if (claim.model, claim.against) == (model, against):
            return claim
    raise AssertionError(f"no claim {model} against {against}")


def test_claims_count_only_judges_that_no_selection_saw():
    claim = claim_of(gains({"own": -9, "a": -9, "b": 9, "c": 0}), "blockwise", "global")
    assert claim.better == ["a"] and claim.worse == ["b"]
    assert claim.own.verdict == "better" and set(claim.judges) == {"a", "b", "c"}
    assert "of 3 judges that no selection saw, better in 1 and worse in 1" in claim.sentence()


def test_claims_are_of_their_models_and_judges():
    """No two of these distances are equal."""
    finals = finals_of()
    for claim in neon.verdicts.claims_of(finals):
        for judge, gain in {"own": claim.own, **claim.judges}.items():
            scores = finals[judge]
            assert gain == neon.stats.compare(scores[claim.model], scores[claim.against])


def test_claims_compare_random_blocks_on_both_sides():
    found = [(claim.model, claim.against) for claim in neon.verdicts.claims_of(gains({"own": -9}))]
    assert ("random blocks 1", "global") in found and ("blockwise", "random blocks 1") in found
    assert ("searched", "global") not in found


def test_claims_are_corrected_for_the_number_of_judges():
    """A gain that one judge alone would call significant."""
    folds = np.random.default_rng(3).standard_normal(FOLDS)
    half, _ = neon.stats.jackknife(0, [folds])

    def judges(count):
        finals = {"own": gains({"own": 0})["own"]}
        finals["own"].pop("random blocks 1")
        for i in range(count):
            finals[f"j{i}"] = {
                "base": [score(30.0)],
                "global": [score(20.0, 20 + folds)],
                "blockwise": [score(20 - 1.1 * half)],
            }
        return claim_of(finals, "blockwise", "global")

    assert judges(1).better == ["j0"]
    assert judges(4).better == []
    assert judges(4).judges["j0"].verdict == "better"


def test_plain_data_of_a_claim():
    claim = claim_of(gains({"own": -5, "a": -4}), "blockwise", "global")
    row = claim.as_json()
    assert row["own"] == claim.own.as_json() and row["judges"]["a"] == claim.judges["a"].as_json()
    assert (row["model"], row["against"], row["sentence"]) == (
        "blockwise",
        "global",
        claim.sentence(),
    )


# -------------------- warnings


def warnings(models=None, final=None, had_grid=False, dim=6, real=10_000, **options):
    models = {"base": 4.0, "global": 2.0} | (models or {})
    candidates = {}
    for name, value in models.items():
        w = weights(1, 1, 1)
        if isinstance(value, dict):
            w, value = value, 2.1
        candidates[name] = SimpleNamespace(w=w, fd=value)
    rows = {name: {"fd": c.fd, "against_base": gain(-1.9)} for name, c in candidates.items()}
    rows |= final or {}
    facts = SimpleNamespace(facts={"images": real})
    judge = SimpleNamespace(features=SimpleNamespace(dim=dim), selection=facts, final=facts)
    c = config(".", **options)
    return neon.verdicts.warnings_of(c, candidates, rows, had_grid, judge)


def gain(difference, half=0.2, base=4.0):
    low, high = difference - half, difference + half
    return neon.stats.Comparison(difference, low, high, 0.0, "", base).as_json()


@pytest.mark.parametrize(
    "w, edges",
    [
        (weights(1, 1, 1), []),
        (weights(0.5, 1, 1), ["w_enc = 0.5"]),
        (weights(1, 1.5, 0.5), ["w_mid = 1.5", "w_dec = 0.5"]),
    ],
    ids=str,
)
def test_weight_on_the_edge_of_its_grid(w, edges):
    notes = warnings({"blockwise": w}, had_grid=True, grid=(0.5, 1.0, 1.5))
    assert notes == [f"{edge} lies on the edge of the grid" for edge in edges]


def test_grid_of_one_value_has_no_edge():
    assert warnings({"blockwise": weights(1, 1, 1)}, had_grid=True, grid=(1.0,)) == []


@pytest.mark.parametrize("dim, singular", [(99, False), (100, True), (2048, True)])
def test_fewer_images_than_features(dim, singular):
    assert ("the covariance is singular" in "".join(warnings(dim=dim))) == singular


@pytest.mark.parametrize("name", ["blockwise", "searched"])
@pytest.mark.parametrize("promised, noted", [(0.50, False), (0.54, False), (0.57, True)])
def test_promise_that_the_final_seeds_do_not_keep(name, promised, noted):
    """Both gains in shares of the base: the final interval goes from 45 % to 55 %."""
    models = {name: 4.0 * (1 - promised)}
    final = {"base": {"fd": 8.0}, name: {"fd": 4.0, "against_base": gain(-4.0, 0.4, 8.0)}}
    notes = [note for note in warnings(models, final) if "selection noise" in note]
    assert len(notes) == noted
    if noted:
        assert notes[0].startswith(f"{name} differs from the base by -57% on the selection")
        assert "by -50% on the final ones" in notes[0]


@pytest.mark.parametrize(
    "precision, difference, noted",
    [(0.70, -4.0, True), (0.785, -4.0, True), (0.795, -4.0, False), (0.7, 4.0, False)],
)
def test_precision_that_falls_with_the_distance(precision, difference, noted):
    final = {
        "base": {"fd": 8.0, "precision": 0.8},
        "blockwise": {"fd": 4.0, "precision": precision, "against_base": gain(difference)},
    }
    notes = warnings({"blockwise": 4.0 + difference / 2}, final)
    assert ("blockwise: precision falls while the distance falls" in notes) == noted


def test_a_sampler_that_diverges_is_noted():
    assert warnings({"collapsed": math.inf}) == ["collapsed: the sampler diverges"]


# -------------------- training seeds


def as_claim(model, against, own, judges):
    """A claim as it stands in summary.json, from relative differences."""

    def gain(x):
        return {"verdict": "better" if x < 0 else "worse", "relative_difference": x}

    return {
        "model": model,
        "against": against,
        "own": gain(own),
        "judges": {str(i): gain(x) for i, x in enumerate(judges)},
        "better": [str(i) for i, x in enumerate(judges) if x < -0.1],
        "worse": [str(i) for i, x in enumerate(judges) if x > 0.1],
    }


def summary_with(*claims):
    return {"snapshots": [{"kimg": 5, "claims": list(claims), "final": {}}]}


def test_claims_are_counted_over_seeds_and_judges():
    first = summary_with(as_claim("blockwise", "global", -0.2, [-0.3, 0.2, -0.01]))
    second = summary_with(as_claim("blockwise", "global", 0.1, [-0.3, -0.2, -0.2]))
    (found,) = neon.verdicts.claims_over_seeds([first, second])
    assert found["own_verdicts"] == ["better", "worse"] and found["own_relative"] == [-0.2, 0.1]
    assert (found["cases"], found["better"], found["worse"]) == (6, 4, 1)
    np.testing.assert_allclose(found["relative"], [-0.11 / 3, -0.7 / 3])
    assert "1 of 2 in its own features (-5% +- 21.2%)" in found["sentence"]


def test_every_snapshot_has_its_claims():
    found = neon.verdicts.claims_over_seeds([summary_of(seed=3), summary_of(seed=1)])
    pairs = {(row["kimg"], row["model"], row["against"]) for row in found}
    assert len(pairs) == len(found) == 2 * 8  # six of the models, two of random blocks


def test_random_partitions_are_one_claim():
    rows = [as_claim("blockwise", f"random blocks {k}", -0.2, [-0.3]) for k in (1, 2, 12)]
    (found,) = neon.verdicts.claims_over_seeds([summary_with(*rows)])
    assert found["against"] == "random blocks" and found["cases"] == 3


def test_a_seed_that_diverged_is_counted_and_not_averaged():
    assert neon.verdicts.mean_and_spread([0.1, math.inf, None, 0.3]) == "+20% +- 14.1% (2 infinite)"
