"""edm_neon.py: grid, race, searches over the block weights, and the gradient of the distance."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edm_helpers import (
    BEST,
    KINDS,
    config,
    edm_scorer,
    gaussian_score,
    numbers_of,
    replace,
    score_of,
    standard_reference,
    toy_distance,
    toy_scorer,
    weights,
)

import adaptive_neon as neon
import neon_ext

SELECTION = neon.scores.SeedSet("selection", 10_000, 100)


BLOCKS = ("enc", "mid", "dec")


# -------------------- grid


def test_grid_is_every_product():
    c = neon.config.Config(grid=(0.5, 1.0))
    want = [weights(*values) for values in itertools.product((0.5, 1.0), repeat=3)]
    assert neon.search.grid_weights(c, BLOCKS) == want


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_has_its_own_grid(block):
    c = neon.config.Config(grid=(0.5, 1.0), **{f"grid_{block}": (2.0, 3.0, 4.0)})
    found = neon.search.grid_weights(c, BLOCKS)
    values = {name: {w[name] for w in found} for name in BLOCKS}
    assert values == dict.fromkeys(BLOCKS, {0.5, 1.0}) | {block: {2.0, 3.0, 4.0}}
    assert len(found) == 12


def test_blocks_of_another_name_have_the_common_grid():
    assert len(neon.search.grid_weights(neon.config.Config(grid=(0.5, 1.0)), ("a", "b"))) == 4


@pytest.mark.parametrize(
    "points, search, placebo, left",
    [
        (2, "", 0, 8),
        (2, "gradient", 0, 8),
        (5, "", 0, 125),
        (5, "gradient", 0, 0),
        (5, "cobyqa", 0, 0),
        (5, "gradient", 1, 125),
    ],
)
def test_large_grid_is_left_to_a_search(points, search, placebo, left):
    c = neon.config.Config(grid=tuple(range(points)), search=search, placebo=placebo)
    assert len(neon.search.grid_weights(c, BLOCKS)) == left


@pytest.mark.parametrize(
    "points, options, refused",
    [
        (21, {}, False),
        (22, {}, True),
        (22, {"yes": True}, False),
        (22, {"search": "gradient"}, False),
        (22, {"search": "gradient", "placebo": 1}, True),
    ],
)
def test_endless_grid_is_refused(points, options, refused, capsys):
    c = neon.config.Config(grid=tuple(range(points)), **options)
    if refused:
        with pytest.raises(neon.files.UserError, match="10648 points"):
            neon.search.check_grid(c, BLOCKS)
    else:
        neon.search.check_grid(c, BLOCKS)
        announced = f"{points**3} points" in capsys.readouterr().out
        assert announced == (not options.get("search"))


def test_grid_is_scored_on_the_seeds_given(tmp_path):
    scores = neon.search.score_grid(config(tmp_path), toy_scorer(tmp_path), SELECTION, "grid")
    assert [score.w for score in scores] == neon.search.grid_weights(config(tmp_path), BLOCKS)
    assert {(score.first_seed, score.images) for score in scores} == {(10_000, 100)}


def test_best_is_the_least_distance():
    scores = [score_of(2.0), score_of(math.inf), score_of(1.0), score_of(1.5)]
    assert neon.scores.best_of(scores) is scores[2]


# -------------------- race


class Candidates:
    """A scorer of scores made by hand: {weight: (distance, standard error of the difference)}."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def score_all(self, all_weights, seeds, desc):
        self.asked.append((seeds, desc))
        wave = np.tile([1.0, -1.0], neon.stats.FOLDS // 2) / 19**0.5
        # The jackknife's standard error of these folds is the one that was asked for.
        return [score_of(fd, fd + error * wave, {"a": w}) for w, (fd, error) in self.rows]


def survivors(*rows, count=1000, level=None):
    """Weights that the race leaves of candidates 1, 2, ... at (distance, error)."""
    scorer = Candidates([*enumerate(rows, 1)])
    options = {} if level is None else {"level": level}
    left = neon.search.race(
        scorer, [{"a": w} for w, _ in scorer.rows], SELECTION.start(count), **options
    )
    return [w["a"] for w in left], scorer.asked


def test_errors_of_these_candidates():
    """Half the 95 % interval is 2.093 standard errors at 19 degrees of freedom."""
    scorer = Candidates([(1, (1.0, 0.0)), (2, (2.0, 0.3))])
    one, other = scorer.score_all(None, SELECTION, "")
    found = neon.stats.compare([other], [one])
    assert found.high - found.difference == pytest.approx(2.093 * 0.3, rel=1e-3)


@pytest.mark.parametrize(
    "ratio, candidates, stays",
    [(2.0, 2, True), (2.5, 2, False), (2.5, 10, True), (3.1, 10, True), (3.3, 10, False)],
    ids=str,
)
def test_race_judges_at_the_level_over_the_candidates(ratio, candidates, stays):
    """t at 1 - 0.025 / candidates: 2.43 for 2, 3.17 for 10."""
    far = [(9.0, 0.0)] * (candidates - 2)
    left, _ = survivors((1.0, 0.0), (1.0 + 0.1 * ratio, 0.1), *far)
    assert left == ([1, 2] if stays else [1])


def test_race_keeps_the_leader():
    left, _ = survivors((2.0, 0.0), (1.0, 0.5), (3.0, 0.0))
    assert 2 in left


@pytest.mark.parametrize("count, few", [(1000, 200), (100, 40), (40, 40), (205, 41)])
def test_race_uses_the_first_fifth_of_the_seeds(count, few):
    _, ((seeds, _),) = survivors((1.0, 0.0), (2.0, 0.0), count=count)
    assert (seeds.first, seeds.count, seeds.purpose) == (10_000, few, "selection")


class Gaussians:
    """Candidates whose features are Gaussian, on common noise; w is the scale."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def score_all(self, all_weights, seeds, desc):
        noise = self.rng.normal(size=(seeds.count, 3))
        return [
            gaussian_score(standard_reference(), torch.from_numpy(noise * w["a"]), w=w)
            for w in all_weights
        ]


def test_race_keeps_the_best_and_drops_the_bad():
    """The true best is dropped in at most about 5 % of races; 40 races leave room to 5."""
    candidates = [{"a": a} for a in (1.0, 1.04, 1.08, 1.15, 1.3, 1.6)]
    seeds = SELECTION.start(2000)
    left = [neon.search.race(Gaussians(seed), candidates, seeds) for seed in range(40)]
    assert sum(candidates[0] not in w for w in left) <= 5
    assert not any({"a": 1.6} in w or {"a": 1.3} in w for w in left)


def test_grid_after_a_race_holds_what_it_left_on_all_seeds(tmp_path, monkeypatch):
    left = [weights(0, 0, 0), weights(0, 1, 1)]
    replace(monkeypatch, "race", lambda scorer, candidates, seeds: left)
    c = config(tmp_path, race=True)
    scores = neon.search.score_grid(c, toy_scorer(tmp_path), SELECTION, "grid")
    assert [score.w for score in scores] == left and {score.images for score in scores} == {100}


def test_without_race_nothing_is_dropped(tmp_path, monkeypatch):
    replace(monkeypatch, "race", pytest.fail)
    assert (
        len(neon.search.score_grid(config(tmp_path), toy_scorer(tmp_path), SELECTION, "grid")) == 8
    )


# -------------------- COBYQA


@pytest.fixture(scope="module")
def cobyqa(tmp_path_factory):
    out = tmp_path_factory.mktemp("cobyqa")
    scorer = toy_scorer(out)
    c = config(out, search="cobyqa", evaluations=25, bounds=(-0.5, 1.2))
    scorer.score(BEST, SELECTION)  # the log holds a better score than the bounds allow
    return scorer, neon.search.search_cobyqa(c, scorer, SELECTION, 2.0)


def test_cobyqa_starts_at_the_global_weight_within_the_bounds(cobyqa):
    assert cobyqa[1][0].w == weights(1.2, 1.2, 1.2)


def test_cobyqa_stays_within_its_bounds_and_evaluations(cobyqa):
    values = np.array([numbers_of(score.w) for score in cobyqa[1]])
    assert values.min() >= -0.5 and values.max() <= 1.2 and 10 < len(values) <= 25


def test_cobyqa_ends_after_its_evaluations(tmp_path):
    c = config(tmp_path, search="cobyqa", evaluations=9)
    assert len(neon.search.search_cobyqa(c, toy_scorer(tmp_path), SELECTION, 0.5)) == 9


def test_cobyqa_returns_what_it_evaluated_itself(cobyqa):
    scorer, scores = cobyqa
    known = scorer.log.find(scorer.key(SELECTION), BEST, SELECTION)
    assert known.fd < neon.scores.best_of(scores).fd and known not in scores


def test_cobyqa_scores_on_the_selection_seeds(cobyqa):
    assert {(score.first_seed, score.images) for score in cobyqa[1]} == {(10_000, 100)}


def test_cobyqa_finds_better_weights(cobyqa):
    scores = cobyqa[1]
    assert neon.scores.best_of(scores).fd < 0.8 * scores[0].fd


def test_cobyqa_goes_on_after_a_divergence(tmp_path, monkeypatch):
    scorer = toy_scorer(tmp_path)
    real = scorer.features
    monkeypatch.setattr(scorer, "features", lambda w, *a: None if w["enc"] > 1 else real(w, *a))
    c = config(tmp_path, search="cobyqa", evaluations=12)
    scores = neon.search.search_cobyqa(c, scorer, SELECTION, 1.0)
    infinite = [math.isinf(score.fd) for score in scores]
    assert any(infinite) and not all(infinite) and len(scores) > 5


def test_trials_answer_with_the_score_they_were_asked_for(tmp_path):
    scorer = toy_scorer(tmp_path)
    c = config(tmp_path, evaluations=2)
    trials = neon.search.Trials(c, scorer, SELECTION, "trials")
    answers = [trials.score(values) for values in ((0.0, 0.0, 0.0), (1.0, 0.5, 1.5))]
    assert answers == trials.scores == scorer.score_all([weights(0, 0, 0), BEST], SELECTION, "both")
    assert trials.bar.n == trials.bar.total == 2


# -------------------- coordinate search


def coordinate_search(out, monkeypatch, distance, start=1.0, **options):
    """Over prescribed distances -> the weights that were scored, as numbers."""
    scorer = toy_scorer(out)

    def score(w, seeds, desc=None):
        return score_of(distance(*w.values()), w=w, first_seed=seeds.first, images=seeds.count)

    monkeypatch.setattr(scorer, "score", score)
    c = config(out, **{"search": "coordinate", "evaluations": 100, "bounds": (-1.0, 4.0)} | options)
    scores = neon.search.search_coordinate(c, scorer, SELECTION, start)
    assert {(score.first_seed, score.images) for score in scores} == {(10_000, 100)}
    return [numbers_of(score.w) for score in scores]


def test_coordinate_search_goes_up_then_down_one_block_after_the_other(tmp_path, monkeypatch):
    """A gain stays and ends a block's turn; a round without gain halves the step."""
    found = coordinate_search(
        tmp_path, monkeypatch, lambda *w: abs(w[0] - 2) + abs(w[1]) + abs(w[2] - 1), evaluations=16
    )
    want = [
        *[(1, 1, 1), (1.5, 1, 1), (1.5, 1.5, 1), (1.5, 0.5, 1), (1.5, 0.5, 1.5), (1.5, 0.5, 0.5)],
        *[(2, 0.5, 1), (2, 1, 1), (2, 0, 1), (2, 0, 1.5), (2, 0, 0.5)],
        *[(2.5, 0, 1), (1.5, 0, 1), (2, 0.5, 1), (2, -0.5, 1), (2, 0, 1.5)],
    ]
    np.testing.assert_allclose(found, want)


def test_coordinate_search_halves_its_step_until_it_is_small(tmp_path, monkeypatch):
    found = coordinate_search(tmp_path, monkeypatch, lambda *w: sum(abs(v - 1) for v in w))
    moves = np.abs(np.array(found) - 1).max(1)
    want = [0] + [step for step in 0.5 / 2.0 ** np.arange(6) for _ in range(6)]
    np.testing.assert_allclose(moves, want, atol=1e-6)


def test_coordinate_search_stays_within_its_bounds(tmp_path, monkeypatch):
    found = coordinate_search(
        tmp_path, monkeypatch, lambda *w: -sum(w), start=9.0, bounds=(-1.0, 1.3)
    )
    assert [*found[0]] == [1.3, 1.3, 1.3] and np.max(found) <= 1.3


def test_coordinate_search_finds_the_toys_weights(tmp_path):
    c = config(tmp_path, search="coordinate", evaluations=60)
    scores = neon.search.search_coordinate(c, toy_scorer(tmp_path), SELECTION, 0.0)
    assert len(scores) <= 60 and neon.scores.best_of(scores).fd < 0.5 * scores[0].fd


def test_searches_by_name():
    found = dict(neon.search.SEARCHES)
    assert found == {
        "cobyqa": neon.search.search_cobyqa,
        "coordinate": neon.search.search_coordinate,
        "gradient": neon.search.search_gradient,
    }


# -------------------- search by gradient


LEAST = np.array([2.0, 0.0, 1.0])  # of the prescribed bowl


CURVATURE = np.array([10.0, 1.0, 0.1])


def bowl(w):
    """Distance and gradient."""
    away = numbers_of(w) - LEAST
    return 1 + float((CURVATURE * away**2).sum() / 2), CURVATURE * away


def slope(w):
    """A distance that falls for ever."""
    return -float(numbers_of(w).sum()), -np.ones(3)


def gradient_search(out, monkeypatch, landscape=bowl, start=0.5, distance=None, **options):
    """A search over a prescribed landscape -> scores, [(w, seeds, precision)] it was asked at.
    distance: of the selection seeds, by default the landscape's."""
    precision = options.pop("precision", "fp32")
    scorer = toy_scorer(out, precision=precision, confirm_precision="bf16")
    asked = []

    def prescribed(scorer, w, seeds, precision):
        asked.append((w, seeds, precision))
        value, gradient = landscape(w)
        return value, dict(zip(BLOCKS, gradient, strict=True))

    def score(w, seeds, desc=None):
        fd = landscape(w)[0] if distance is None else distance(w)
        return score_of(fd, w=w, first_seed=seeds.first, images=seeds.count)

    replace(monkeypatch, "distance_and_gradient", prescribed)
    monkeypatch.setattr(scorer, "score", score)
    c = config(out, **{"search": "gradient", "evaluations": 30, "bounds": (-1.0, 4.0)} | options)
    return neon.search.search_gradient(c, scorer, SELECTION, start), asked


def test_gradient_search_finds_the_least_point(tmp_path, monkeypatch):
    scores, _ = gradient_search(tmp_path, monkeypatch)
    np.testing.assert_allclose(numbers_of(neon.scores.best_of(scores).w), LEAST, atol=1e-3)
    assert len(scores) < 30


def test_first_step_moves_the_steepest_block_by_a_half(tmp_path, monkeypatch):
    """Against the gradient, whatever the unit of the distance."""
    scores, _ = gradient_search(tmp_path, monkeypatch)
    gradient = bowl(scores[0].w)[1]
    want = 0.5 - 0.5 * gradient / np.abs(gradient).max()
    np.testing.assert_allclose(numbers_of(scores[1].w), want, atol=1e-6)
    assert scores[0].w == weights(0.5, 0.5, 0.5)


def test_gradient_search_does_not_depend_on_the_unit_of_the_distance(tmp_path, monkeypatch):
    def thousandfold(w):
        value, gradient = bowl(w)
        return 1000 * value, 1000 * gradient

    ours, _ = gradient_search(tmp_path / "a", monkeypatch, evaluations=5)
    theirs, _ = gradient_search(tmp_path / "b", monkeypatch, thousandfold, evaluations=5)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(numbers_of(one.w), numbers_of(other.w), atol=1e-5)


@pytest.mark.parametrize("start", [0.5, 9.0])
def test_gradient_search_stays_within_its_bounds(tmp_path, monkeypatch, start):
    _, asked = gradient_search(tmp_path, monkeypatch, start=start, bounds=(0.3, 1.6))
    points = np.array([numbers_of(w) for w, _, _ in asked])
    assert points.min() >= 0.3 and points.max() <= 1.6 and len(points) > 2
    np.testing.assert_allclose(
        points[np.argmin(np.abs(points - LEAST).sum(1))], [1.6, 0.3, 1], 1e-4
    )


def test_gradients_are_of_one_set_of_fresh_seeds(tmp_path, monkeypatch):
    _, asked = gradient_search(tmp_path, monkeypatch)
    assert {(seeds.first, seeds.count, seeds.is_final) for _, seeds, _ in asked} == {
        (10_000_000, 100, False)
    }


def test_every_point_is_scored_on_the_selection_seeds(tmp_path, monkeypatch):
    scores, asked = gradient_search(tmp_path, monkeypatch)
    assert {(score.first_seed, score.images) for score in scores} == {(10_000, 100)}
    assert [score.w for score in scores] == [w for w, _, _ in asked]


def test_gradient_search_ends_after_its_evaluations(tmp_path, monkeypatch):
    scores, asked = gradient_search(tmp_path, monkeypatch, evaluations=4)
    assert len(scores) == len(asked) == 4


@pytest.mark.parametrize("gain_until, points", [(0, 7), (3, 10), (99, 12)])
def test_search_ends_after_six_points_without_gain(tmp_path, monkeypatch, gain_until, points):
    """The score of the selection seeds falls until a point and rises afterwards."""
    calls = itertools.count()

    def distance(w):
        return float(abs(next(calls) - gain_until))

    options = {"evaluations": 12, "bounds": (-1e6, 1e6)}
    scores, _ = gradient_search(tmp_path, monkeypatch, slope, distance=distance, **options)
    assert len(scores) == points


def test_a_search_without_gain_returns_its_start(tmp_path, monkeypatch):
    scores, _ = gradient_search(tmp_path, monkeypatch, distance=lambda w: abs(w["enc"] - 0.5))
    assert neon.scores.best_of(scores).w == weights(0.5, 0.5, 0.5)


def test_gradient_search_goes_on_after_a_divergence(tmp_path, monkeypatch):
    """A wall at 1.2, the least point lies behind it."""

    def walled(w):
        return (math.inf, np.zeros(3)) if w["enc"] > 1.2 else bowl(w)

    scores, _ = gradient_search(tmp_path, monkeypatch, walled, start=0.9)
    values = [score.fd for score in scores]
    assert math.inf in values and values.index(math.inf) < len(values) - 1
    assert 1.0 < neon.scores.best_of(scores).w["enc"] <= 1.2


@pytest.mark.parametrize(
    "landscape", [lambda w: (math.inf, np.ones(3)), lambda w: (1.0, np.zeros(3))], ids=["inf", "0"]
)
def test_a_start_without_a_direction_is_the_result(tmp_path, monkeypatch, landscape):
    scores, _ = gradient_search(tmp_path, monkeypatch, landscape)
    assert [score.w for score in scores] == [weights(0.5, 0.5, 0.5)]


@pytest.mark.parametrize(
    "precision, pulled", [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("tf32", "tf32")]
)
def test_precision_of_the_gradient(tmp_path, monkeypatch, precision, pulled):
    """fp16 has no exponents for small derivatives."""
    _, asked = gradient_search(tmp_path, monkeypatch, precision=precision)
    assert {how for _, _, how in asked} == {pulled}


@pytest.fixture(scope="module")
def found_by_gradient(tmp_path_factory):
    out = tmp_path_factory.mktemp("gradient")
    scorer = toy_scorer(out)
    c = config(out, search="gradient", evaluations=6)
    scorer.score(BEST, SELECTION)
    return scorer, neon.search.search_gradient(c, scorer, SELECTION, 0.0)


def test_gradient_search_finds_better_weights(found_by_gradient):
    scorer, scores = found_by_gradient
    assert neon.scores.best_of(scores).fd < 0.6 * scorer.score(weights(0, 0, 0), SELECTION).fd


def test_gradient_search_returns_what_it_evaluated_itself(found_by_gradient):
    scorer, scores = found_by_gradient
    known = scorer.log.find(scorer.key(SELECTION), BEST, SELECTION)
    assert known.fd < neon.scores.best_of(scores).fd and known not in scores and len(scores) == 6


@pytest.mark.parametrize("stops", [(1,), (2, 4)], ids=str)
def test_gradient_search_resumes_to_the_same_end(found_by_gradient, tmp_path, monkeypatch, stops):
    c = config(tmp_path, search="gradient", evaluations=6)
    real, calls = neon.search.distance_and_gradient, []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) - 1 in stops:
            raise KeyboardInterrupt
        return real(*args, **options)

    replace(monkeypatch, "distance_and_gradient", dying)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            neon.search.search_gradient(c, toy_scorer(tmp_path), SELECTION, 0.0)
    scores = neon.search.search_gradient(c, toy_scorer(tmp_path), SELECTION, 0.0)
    assert [(score.w, score.fd) for score in scores] == [
        (score.w, score.fd) for score in found_by_gradient[1]
    ]
    assert len(calls) == 6 + len(stops)


@pytest.mark.parametrize(
    "change", [{"start": 0.25}, {"bounds": (-1.0, 3.0)}, {"precision": "bf16"}], ids=str
)
def test_another_search_does_not_resume(tmp_path, monkeypatch, change):
    gradient_search(tmp_path, monkeypatch, evaluations=4)
    _, asked = gradient_search(tmp_path, monkeypatch, evaluations=4, **change)
    assert len(asked) == 4


def test_longer_search_goes_on(tmp_path, monkeypatch):
    gradient_search(tmp_path, monkeypatch, evaluations=2)
    scores, asked = gradient_search(tmp_path, monkeypatch, evaluations=4)
    assert len(asked) == 2 and len(scores) == 4


def test_points_of_another_path_are_computed_again(tmp_path, monkeypatch):
    """As another scipy would take."""
    whole, _ = gradient_search(tmp_path, monkeypatch, evaluations=4)
    (path,) = tmp_path.glob("search-*.pt")
    points = torch.load(path)
    points[2] = (weights(3, 3, 3), *points[2][1:])
    torch.save(points, path)
    scores, asked = gradient_search(tmp_path, monkeypatch, evaluations=4)
    assert [score.w for score in scores] == [score.w for score in whole]
    assert [w for w, _, _ in asked] == [score.w for score in whole[2:]]


def test_damaged_state_of_a_search_is_refused(tmp_path, monkeypatch):
    gradient_search(tmp_path, monkeypatch)
    (path,) = tmp_path.glob("search-*.pt")
    path.write_bytes(b"no")
    with pytest.raises(neon.files.UserError, match="search-.*is damaged, delete it"):
        gradient_search(tmp_path, monkeypatch)


# -------------------- the gradient


SEEDS = neon.scores.SeedSet("search", 10_000_000, 20)


@torch.no_grad()
def distance(scorer, w, seeds=SEEDS):
    """The distance without rounding, on one batch."""
    scorer.merger.set(w)
    images, _ = scorer.sampler.floats(seeds.seeds)
    features = scorer.judge.features((images * 127.5 + 128).clip(0, 255))
    moments = neon_ext.feature_moments(features)
    return float(scorer.judge.reference(seeds).prepared.distance(*moments))


def check_gradient(scorer, blocks, h=0.02, seeds=SEEDS):
    """2 % of the largest entry: some pixels are clipped, and the central difference has an
    error of h^2."""
    everything = scorer.merger.blocks
    w = dict(zip(everything, np.linspace(0.3, 1.2, len(everything)), strict=True))
    fd, gradient = neon.search.distance_and_gradient(scorer, w, seeds, "fp32", rounding=False)
    assert fd == pytest.approx(distance(scorer, w, seeds), rel=1e-4)
    largest = max(abs(value) for value in gradient.values())
    for block in blocks:
        high = distance(scorer, w | {block: w[block] + h}, seeds)
        low = distance(scorer, w | {block: w[block] - h}, seeds)
        assert gradient[block] == pytest.approx((high - low) / (2 * h), abs=0.02 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_central_difference(tmp_path, kind):
    """All kinds have augmentation labels, which sampling does not use."""
    check_gradient(edm_scorer(tmp_path, kind), BLOCKS)


def test_gradient_over_layers_is_the_central_difference(tmp_path):
    scorer = edm_scorer(tmp_path, partition="layers")
    blocks = scorer.merger.blocks
    check_gradient(scorer, [blocks[0], "enc.8x8_block0", "dec.4x4_in0", blocks[-1]])


def test_gradient_of_another_model_is_the_central_difference(tmp_path):
    check_gradient(
        toy_scorer(tmp_path), BLOCKS, seeds=neon.scores.SeedSet("search", 10_000_000, 90)
    )


@pytest.mark.parametrize("steps", [1, 5])
def test_gradient_with_other_steps(tmp_path, steps):
    check_gradient(edm_scorer(tmp_path, steps=steps), ["mid"])


def test_a_block_that_sampling_does_not_use_has_gradient_zero(tmp_path):
    scorer = edm_scorer(tmp_path)
    owners = {name: "augment" if "map_augment" in name else "rest" for name in scorer.merger.owners}
    scorer = scorer.with_owners(owners)
    _, gradient = neon.search.distance_and_gradient(
        scorer, {"augment": 1, "rest": 0.5}, SEEDS, "fp32"
    )
    assert gradient["augment"] == 0 and gradient["rest"] != 0


def test_gradient_does_not_depend_on_the_batch(tmp_path):
    found = []
    for batch in (7, 20):
        scorer = edm_scorer(tmp_path, batch=batch)
        found.append(
            neon.search.distance_and_gradient(scorer, BEST, SEEDS, "fp32", rounding=False)[1]
        )
    for block in BLOCKS:
        assert found[0][block] == pytest.approx(found[1][block], rel=1e-3)


def test_distance_of_the_gradient_is_the_score(tmp_path):
    """With rounding, which is passed straight through."""
    scorer = toy_scorer(tmp_path)
    fd, _ = neon.search.distance_and_gradient(scorer, BEST, SELECTION, "fp32")
    assert fd == pytest.approx(toy_distance(scorer, BEST, SELECTION.seeds), rel=1e-5)
    assert (
        fd != neon.search.distance_and_gradient(scorer, BEST, SELECTION, "fp32", rounding=False)[0]
    )


def test_rounding_hardly_changes_the_gradient(tmp_path):
    scorer, w = toy_scorer(tmp_path), weights(0, 0, 0)
    found = [
        numbers_of(neon.search.distance_and_gradient(scorer, w, SELECTION, "fp32", rounding)[1])
        for rounding in (True, False)
    ]
    np.testing.assert_allclose(*found, atol=0.05 * np.abs(found[1]).max())


def test_where_the_sampler_diverges_the_gradient_is_zero(tmp_path, monkeypatch):
    scorer = toy_scorer(tmp_path)
    net = scorer.merger.net
    net.offset.fill_(math.nan)
    fd, gradient = neon.search.distance_and_gradient(scorer, BEST, SEEDS, "fp32")
    assert fd == math.inf and gradient == dict.fromkeys(BLOCKS, 0.0)


def test_network_needs_no_gradients_after_a_search(tmp_path):
    scorer = toy_scorer(tmp_path)
    neon.search.distance_and_gradient(scorer, BEST, SEEDS, "fp32")
    assert not any(p.requires_grad for p in scorer.merger.net.parameters())
    assert "forward" not in vars(scorer.merger.net)


def test_activations_of_one_network_call_at_a_time(tmp_path, monkeypatch):
    """Pass one needs none; pass two wraps the network once, checkpointed."""
    asked, real = [], neon.sampling.network_calls

    def watched(net, precision, checkpointed=False):
        asked.append((precision, checkpointed))
        return real(net, precision, checkpointed)

    replace(monkeypatch, "network_calls", watched)
    neon.search.distance_and_gradient(toy_scorer(tmp_path), BEST, SEEDS, "bf16")
    assert asked == [("bf16", False), ("bf16", True)]


def test_gradient_pass_halves_its_batch_where_memory_ends(tmp_path, monkeypatch):
    sizes = []

    def work(batch, part):
        sizes.append((batch, len(part)))
        if batch > 4:
            raise torch.OutOfMemoryError
        return part.tolist()

    monkeypatch.setattr(neon.processes.Processes, "workers", lambda self: 1)
    parts = neon.search.halving(work, np.arange(10), 16, neon.processes.Processes("cpu"))
    assert [seed for part in parts for seed in part] == list(range(10))
    assert sizes[:2] == [(16, 10), (8, 5)] and all(size <= 4 for _, size in sizes[2:])


def test_gradient_pass_that_fits_with_no_batch_ends(monkeypatch):
    def work(batch, part):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(neon.processes.Processes, "workers", lambda self: 1)
    with pytest.raises(torch.OutOfMemoryError):
        neon.search.halving(work, np.arange(10), 16, neon.processes.Processes("cpu"))


# -------------------- seeds of the search


def test_search_seeds_are_those_of_nothing_else():
    assert dataclasses.astuple(neon.search.search_seeds(50)) == ("search", 10_000_000, 50)


def test_seed_set():
    seeds = neon.scores.SeedSet("selection", 5, 3)
    assert seeds.seeds.tolist() == [5, 6, 7] and seeds.last == 7 and not seeds.is_final
    assert dataclasses.astuple(seeds.start(2)) == ("selection", 5, 2)
    assert SimpleNamespace(final=neon.scores.SeedSet("final 3", 0, 1)).final.is_final
