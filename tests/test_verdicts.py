"""What adaptive_neon/verdicts.py promises."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
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
                gain = neon.stats.compare(scores[name], scores[other]).as_json()
                del gain["verdict"]  # the claims' business
                assert found[name][key] == gain


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
        if (claim["model"], claim["against"]) == (model, against):
            return claim
    raise AssertionError(f"no claim {model} against {against}")


def test_claims_count_only_judges_that_no_selection_saw():
    claim = claim_of(gains({"own": -9, "a": -9, "b": 9, "c": 0}), "blockwise", "global")
    assert claim["better"] == ["a"] and claim["worse"] == ["b"]
    assert claim["own"]["verdict"] == "better" and set(claim["judges"]) == {"a", "b", "c"}
    assert "of 3 judges that no selection saw, better in 1 and worse in 1" in claim["sentence"]


def test_claims_are_of_their_models_and_judges():
    """No two of these distances are equal."""
    finals = finals_of()
    for claim in neon.verdicts.claims_of(finals):
        for judge, gain in {"own": claim["own"], **claim["judges"]}.items():
            sides = finals[judge][claim["model"]], finals[judge][claim["against"]]
            distance = neon.stats.compare(*sides).as_json()
            kernel = neon.stats.compare_kernels(*sides).as_json()
            assert gain == distance | {"verdict": gain["verdict"], "kernel": kernel}


def pairs(finals):
    return [(claim["model"], claim["against"]) for claim in neon.verdicts.claims_of(finals)]


def test_claims_compare_random_blocks_on_both_sides():
    found = pairs(gains({"own": -9}))
    assert ("random blocks 1", "global") in found and ("blockwise", "random blocks 1") in found
    assert ("searched", "global") not in found


def test_a_control_is_compared_with_the_base_and_what_was_repaired_with_it():
    finals = gains({"own": -9})
    finals["own"]["base, 36 steps"] = [noisy(25, 50)]
    found = [pair for pair in pairs(finals) if "base, 36 steps" in pair]
    assert found == [
        ("base, 36 steps", "base"),
        ("global", "base, 36 steps"),
        ("blockwise", "base, 36 steps"),
    ]


# -------------------- one criterion for all


def doubtful(ratio, seed, **kernels):
    """Finals of a gain that is `ratio` half intervals of its own."""
    folds = np.random.default_rng(seed).standard_normal(FOLDS)
    half, _ = neon.stats.jackknife(0, [folds])
    return {
        "base": [score(20.0)],
        "global": [score(20.0, 20 + folds)],
        "blockwise": [score(20 - ratio * half)],
    }


@pytest.mark.parametrize("judges, holds", [(0, True), (4, True)])
def test_the_primary_claim_is_one_question(judges, holds):
    """Just significant, whatever else is asked."""
    finals = {"own": doubtful(1.05, 3)}
    for i in range(judges):
        finals[f"j{i}"] = doubtful(0.0, i)
    claim = claim_of(finals, "blockwise", "global")
    assert claim["primary"] and (claim["own"]["verdict"] == "better") == holds
    assert claim["sentence"].startswith("primary claim, named before the run: blockwise against")


@pytest.mark.parametrize("ratio, verdict", [(1.05, "no significant difference"), (2.5, "better")])
def test_all_other_claims_are_one_family(ratio, verdict):
    """Five questions beside the primary one, in every judge: its own features are no exception."""
    finals = {"own": doubtful(ratio, 3), "a": doubtful(ratio, 4)}
    for claim in neon.verdicts.claims_of(finals, primary="global"):
        if (claim["model"], claim["against"]) == ("blockwise", "global"):
            assert claim["own"]["verdict"] == claim["judges"]["a"]["verdict"] == verdict


def test_holm_counts_claims_and_judges():
    claims = neon.verdicts.claims_of(finals_of(spread=1.0))
    p_values, verdicts, plain = [], [], []
    for claim in claims:
        for judge, gain in {"own": claim["own"], **claim["judges"]}.items():
            if claim["primary"] and judge == "own":
                continue
            p_values.append(gain["p"])
            half = gain["high"] - gain["difference"]
            plain.append(neon.stats.verdict_of(gain["difference"], half))
            verdicts.append(gain["verdict"])
    held = neon.stats.holm(p_values)
    assert not all(held) and any(held)
    for holds, verdict, own in zip(held, verdicts, plain, strict=True):
        assert verdict in ((own if holds else "no significant difference"), "distances disagree")


@pytest.mark.parametrize(
    "models, primary, pair",
    [
        (("base", "global", "blockwise", "searched"), "", ("searched", "global")),
        (("base", "global", "blockwise"), "", ("blockwise", "global")),
        (("base", "global", "blockwise", "searched"), "blockwise", ("blockwise", "global")),
        (("base", "global"), "global", ("global", "base")),
        (("base", "global"), "searched against blockwise", ("searched", "blockwise")),
    ],
)
def test_which_claim_is_the_primary_one(models, primary, pair):
    assert neon.verdicts.primary_pair(models, primary) == pair


@pytest.mark.parametrize(
    "shift, kernel, verdict",
    [
        (-9, 0.5, "better"),
        (-9, 1.0, "better"),
        (-9, 1.5, "distances disagree"),
        (9, 1.5, "worse"),
        (9, 0.5, "distances disagree"),
        (0, 1.5, "no significant difference"),
    ],
    ids=["agrees", "does not know", "opposite", "both worse", "opposite of worse", "alone"],
)
def test_a_claim_holds_where_neither_distance_contradicts_it(shift, kernel, verdict):
    finals = gains({"own": shift, "a": shift})
    for found in finals.values():
        for name, (one,) in found.items():
            value = kernel if name == "blockwise" else 1.0
            folds = value + 0.001 * np.random.default_rng(1).standard_normal(FOLDS)
            real = value + 0.001 * np.random.default_rng(2).standard_normal(FOLDS)
            changed = {"kernel": value, "kernel_folds": folds, "kernel_real_folds": real}
            found[name] = [dataclasses.replace(one, **changed)]
    claim = claim_of(finals, "blockwise", "global")
    assert claim["own"]["verdict"] == claim["judges"]["a"]["verdict"] == verdict
    said = "FD and kernel distance disagree in its own features, a" in claim["sentence"]
    assert said == (verdict == "distances disagree")
    assert claim["better"] == (["a"] if verdict == "better" else [])


@pytest.mark.parametrize(
    "ratio, verdict, adherence",
    [(1.05, "better", "no significant difference"), (3.0, "distances disagree", "better")],
)
def test_kernel_distance_and_adherence_hold_among_all_questions(ratio, verdict, adherence):
    """They are higher by this many half intervals of their own: the first worse, the second
    better."""
    folds = 0.01 * np.random.default_rng(3).standard_normal(FOLDS)
    half, _ = neon.stats.jackknife(0, [folds])
    finals = gains({"own": -9, "a": -9})
    for found in finals.values():
        for name, (one,) in found.items():
            value, own = (1 + ratio * half, 0) if name == "blockwise" else (1.0, folds)
            kernel = {"kernel": value, "kernel_folds": value + own + np.zeros(FOLDS)}
            kernel["kernel_real_folds"] = np.ones(FOLDS)
            asked = {"alignment": value, "alignment_folds": kernel["kernel_folds"]}
            found[name] = [dataclasses.replace(one, **kernel, **asked)]
    for claim in neon.verdicts.claims_of(finals, primary="global"):
        if (claim["model"], claim["against"]) == ("blockwise", "global"):
            assert claim["own"]["kernel"]["verdict"] == "worse"
            for gain in (claim["own"], claim["judges"]["a"]):
                assert (gain["verdict"], gain["alignment"]["verdict"]) == (verdict, adherence)


def test_a_verdict_without_real_images_says_what_it_does_not_know():
    finals = gains({"own": -9})
    row = claim_of(finals, "blockwise", "global")
    unknown = "better (noise of the real images unknown)"
    assert neon.verdicts.verdict_text(row["own"]) == unknown and unknown in row["sentence"]
    equal = claim_of(finals, "random blocks 1", "global")["own"]
    assert neon.verdicts.verdict_text(equal) == "no significant difference"


@pytest.mark.parametrize("plain, verdict", [(20.0, "better"), (24.9, "no significant difference")])
def test_a_verdict_that_is_made_by_bias_is_named(plain, verdict):
    ours, theirs = noisy(plain, 1), noisy(25.0, 2)
    ours = dataclasses.replace(ours, corrected=30.0, real_folds=[plain] * FOLDS)
    theirs = dataclasses.replace(theirs, corrected=25.0, real_folds=[25.0] * FOLDS)
    claim = claim_of({"own": {"base": [theirs], "global": [ours]}}, "global", "base")
    assert claim["own"]["verdict"] == "worse"
    said = f"without the correction of bias the verdict changes in its own features ({verdict})"
    assert said in claim["sentence"]


def test_bias_says_nothing_of_a_sampler_that_diverges():
    finals = gains({"own": -9}) | {"a": gains({"a": -9})["a"] | {"global": [score(math.inf)]}}
    claim = claim_of(finals, "global", "base")
    assert claim["judges"]["a"]["verdict"] == "worse"
    assert "correction of bias" not in claim["sentence"]


@pytest.mark.parametrize("primary, missing", [("", False), ("global against guided", True)])
def test_a_primary_claim_that_could_not_be_asked_is_named(primary, missing):
    claims = neon.verdicts.claims_of(gains({"own": -9}), primary)
    notes = neon.verdicts.primary_warnings(claims, primary)
    assert len(notes) == missing and all(primary in note for note in notes)


# -------------------- the summing-up


def summed_up(best="blockwise", primary="", **controls):
    """The headline of a study with these controls, by their distance."""
    finals = gains({"own": -9, "a": 9})
    for judge in finals:
        for name, fd in controls.items():
            finals[judge][name] = [noisy(fd, 70)]
    claims = neon.verdicts.claims_of(finals, primary)
    text = neon.verdicts.headline(claims, neon.verdicts.final_comparison(finals["own"]), best)
    return text.replace(f" ({neon.verdicts.UNKNOWN})", "")


def test_the_headline_is_the_primary_claim_and_the_best_repair_against_the_strongest_control():
    first, second = summed_up(guided=18, more=25).split(". ")
    assert first.startswith("Blockwise against global: better, -4")
    base, control = second.split("; ")
    assert base.startswith("Blockwise against base: better, -6")
    assert control.startswith("blockwise against guided: better, -3")
    assert control.endswith(", the strongest control.")


def test_the_headline_repeats_no_claim():
    text = summed_up(best="global", primary="global against base")
    assert text.startswith("Global against base: better") and text.count("lobal") == 1


def test_the_headline_says_that_nothing_was_repaired():
    text = summed_up(best="base", guided=18)
    assert "No step back from the base was better on the selection seeds." in text
    assert "Global against base: better" in text and "global against guided: worse" in text


@pytest.mark.parametrize(
    "levels, strongest",
    [
        ({}, ""),
        ({"guided": 3.0, "more": 2.0}, "more"),
        ({"guided": 2.0, "more": 3.0}, "guided"),
    ],
)
def test_the_strongest_control_has_the_lowest_distance_without_its_bias(levels, strongest):
    final = {"base": {"fd": 9.0, "corrected": 1.0}, "global": {"fd": 1.0, "corrected": 0.5}}
    for k, (name, corrected) in enumerate(levels.items()):
        final[name] = {"fd": 5.0 + k, "corrected": corrected}
    assert neon.verdicts.strongest_control(final) == strongest


def test_the_headline_over_seeds():
    rows = []
    for model, against, share in (
        ("blockwise", "global", -0.1),
        ("global", "base", -0.2),
        ("guided", "base", -0.4),
        ("more", "base", -0.3),
        ("global", "guided", 0.3),
        ("blockwise", "more", 0.2),
        ("blockwise", "base", -0.25),
    ):
        claim = as_claim(model, against, share, [share])
        rows.append(claim | {"primary": (model, against) == ("blockwise", "global")})
    over = neon.verdicts.claims_over_seeds([summary_with(*rows)] * 2)
    later = [row | {"kimg": row["kimg"] + 1, "sentence": "another snapshot"} for row in over]
    parts = neon.verdicts.headline_over_seeds(over + later, over[0]["kimg"]).split("; ")
    assert [part.split(" in ")[0] for part in parts] == [
        "Primary claim: blockwise is better than global",
        "blockwise is better than base",
        "global is better than base",
        "global is better than guided",
    ]
    assert parts[-1].endswith(", the strongest control.") and "more" not in "".join(parts)


# -------------------- warnings


def warnings(models=None, final=None, had_grid=False, dim=6, real=(10_000, 9_000), **options):
    models = {"base": 4.0, "global": 2.0} | (models or {})
    candidates = {}
    for name, value in models.items():
        w = weights(1, 1, 1)
        if isinstance(value, dict):
            w, value = value, 2.1
        candidates[name] = SimpleNamespace(w=w, fd=value)
    rows = {name: {"fd": c.fd, "against_base": gain(-1.9)} for name, c in candidates.items()}
    rows |= final or {}
    selection, final = (SimpleNamespace(facts={"images": images}) for images in real)
    judge = SimpleNamespace(features=SimpleNamespace(dim=dim), selection=selection, final=final)
    c = config(".", **options)
    return neon.verdicts.warnings_of(c, candidates, rows, had_grid, judge)


def gain(difference, half=0.2, base=4.0):
    low, high = difference - half, difference + half
    return neon.stats.Comparison(difference, low, high, 0.0, "", base, difference).as_json()


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


@pytest.mark.parametrize(
    "w, note",
    [
        (2.0, ["global: w = 2 lies on the edge of all that were tried: widen --sweep"]),
        (-0.5, ["global: w = -0.5 lies on the edge of all that were tried: widen --sweep"]),
        (1.0, []),
        (0.0, []),
    ],
)
def test_global_weight_on_the_edge_of_what_was_tried(w, note):
    """The collapsed network is no weight that was tried, and the base is an end of its own."""
    models = {"global": SimpleNamespace(w=weights(w, w, w))}
    values = [-1.0, 0.0, w, 1.0] if w else [-1.0, 0.0, 1.0]
    values += [1.5] if w == 1 else []
    assert neon.verdicts.edge_warnings(config("."), models, values) == note


def test_searched_weights_on_the_bounds():
    models = {"global": SimpleNamespace(w=weights(1, 1, 1))}
    models["searched"] = SimpleNamespace(w={"a": 6.0, "b": 1.0, "c": -2.0, "d": 5.9})
    notes = neon.verdicts.edge_warnings(config("."), models, [-1.0, 0.0, 1.0, 2.0])
    assert notes == ["searched: 2 of 4 weights lie on --bounds"]


@pytest.mark.parametrize(
    "drifts, collapsed, notes",
    [
        ((4e-4, 1e-5), +1.0, ["hardly moved the network, no block by more than 0.0004 of its"]),
        ((1e-5, 6e-4), +1.0, []),
        ((0.1, 0.2), -1.0, ["the self-trained network is better than the base"]),
        ((0.1, 0.2), -0.1, []),  # its interval holds 0
    ],
)
def test_self_training_that_leaves_little_to_undo(drifts, collapsed, notes):
    blocks = {str(k): {"drift": drift} for k, drift in enumerate(drifts)}
    found = neon.verdicts.training_warnings(
        blocks, {"collapsed": {"against_base": gain(collapsed)}}
    )
    assert len(found) == len(notes)
    assert all(note in one for note, one in zip(notes, found, strict=True))


def test_grid_of_one_value_has_no_edge():
    assert warnings({"blockwise": weights(1, 1, 1)}, had_grid=True, grid=(1.0,)) == []


@pytest.mark.parametrize("dim, singular", [(99, False), (100, True), (2048, True)])
def test_fewer_images_than_features(dim, singular):
    assert ("the covariance is singular" in "".join(warnings(dim=dim))) == singular


@pytest.mark.parametrize("real", [(99, 50), (50, 99), (50, 60)])
def test_fewer_real_images_than_features(real):
    (note,) = warnings(dim=50, real=real, select_images=100)
    assert note == "50 real images for 50 features: the covariance is singular"


@pytest.mark.parametrize("name", ["blockwise", "searched"])
@pytest.mark.parametrize("promised, noted", [(0.50, False), (0.54, False), (0.57, True)])
def test_promise_that_the_final_seeds_do_not_keep(name, promised, noted):
    """Both gains without a correction of bias and in shares of the base: the final interval goes
    from 45 % to 55 %."""
    models = {name: 4.0 * (1 - promised)}
    corrected = gain(-4.8, 0.4, 8.0)
    final = {"base": {"fd": 8.0}, name: {"fd": 4.0, "against_base": corrected | {"plain": -4.0}}}
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


@pytest.mark.parametrize("share, noted", [(0.5, False), (0.61, False), (0.63, True), (0.4, False)])
def test_memorisation_is_watched(share, noted):
    """Three standard errors of two shares of 300 images are 0.122."""
    final = {name: {"fd": 4.0, "images": 300, "memorisation": 0.5} for name in ("base", "global")}
    final["global"] |= {"memorisation": share, "against_base": gain(0.5)}
    notes = warnings(final=final)
    assert any("training images" in note for note in notes) == noted


def test_precision_is_watched_in_every_row():
    final = {"base": {"fd": 8.0, "precision": 0.8}}
    for name in ("collapsed", "global", "base, 36 steps"):
        final[name] = {"fd": 4.0, "precision": 0.7, "against_base": gain(-4.0)}
    notes = "".join(warnings({}, final))
    for name in ("collapsed", "global", "base, 36 steps"):
        assert f"{name}: precision falls" in notes


def test_a_sampler_that_diverges_is_noted():
    assert warnings({"collapsed": math.inf}) == ["collapsed: the sampler diverges"]


# -------------------- training seeds


def as_claim(model, against, own, judges):
    """A claim as it stands in summary.json, from relative differences."""

    def gain(x):
        verdict = "better" if x < 0 else "worse"
        return {"verdict": verdict, "relative_difference": x, "real_noise": True}

    return {
        "model": model,
        "against": against,
        "primary": False,
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
    assert "1 of 2 in its own features (-5%" in found["sentence"]
    assert "4 of 6 (2 seeds x 3 judges)" in found["sentence"]


def test_every_snapshot_has_its_claims():
    found = neon.verdicts.claims_over_seeds([summary_of(seed=3), summary_of(seed=1)])
    rows = {(row["kimg"], row["model"], row["against"]) for row in found}
    assert len(rows) == len(found) == 2 * 10  # eight of the models, two of random blocks


def test_random_partitions_are_one_claim_and_no_seeds():
    """What is independent is a seed: its share is the mean over its partitions."""
    summaries = []
    for shift in (0.0, 0.1):
        rows = []
        for k, share in ((1, -0.2), (12, -0.4)):
            rows.append(as_claim("blockwise", f"random blocks {k}", share + shift, [-0.3, share]))
        summaries.append(summary_with(*rows))
    (found,) = neon.verdicts.claims_over_seeds(summaries)
    assert found["against"] == "random blocks" and found["cases"] == 8
    assert found["own_relative"] == pytest.approx([-0.3, -0.2])
    assert found["relative"] == pytest.approx([-0.3, -0.3])
    assert "8 (2 seeds x 2 judges x 2 random partitions)" in found["sentence"]


def test_interval_over_training_seeds_is_students_t():
    shares = [-0.5, -0.2, -0.35, -0.1]
    interval = scipy.stats.ttest_1samp(shares, 0).confidence_interval()
    text = (
        f"{100 * np.mean(shares):+.3g}% [{100 * interval.low:+.3g}%, {100 * interval.high:+.3g}%]"
    )
    assert neon.verdicts.mean_and_interval(shares) == text


@pytest.mark.parametrize(
    "shares, text", [([], ""), ([0.1], "+10%"), ([0.1, math.inf, None], "+10% (2 infinite)")]
)
def test_a_seed_that_diverged_is_counted_and_not_averaged(shares, text):
    assert neon.verdicts.mean_and_interval(shares) == text
