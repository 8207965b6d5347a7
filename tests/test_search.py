"""What adaptive_neon/search.py promises: grid, race, searches over the block weights, and the
gradient of the distance."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edm_helpers import (
    BEST,
    ToyModel,
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
from adaptive_neon.files import UserError
from adaptive_neon.search import choose, cobyqa, descend, distance_and_gradient, grid, race, sweep
from adaptive_neon.seeds import SeedSet

SELECTION = SeedSet("selection", 10_000, 100)  # as toy_scorer() has it
BLOCKS = ("enc", "mid", "dec")


@pytest.fixture
def scorer(tmp_path):
    return toy_scorer(tmp_path)


# -------------------- the winner


@pytest.mark.parametrize(
    "distances, winner",
    [
        ([2.0, math.inf, 1.0, 1.5], 2),
        ([2.0, 1.0, 3.0, 1.0], 1),
        ([math.inf, 5.0], 1),
        ([math.inf, math.inf], 0),
        ([-1e-4, 0.0], 0),
        ([3.0], 0),
    ],
    ids=["least", "first of equals", "finite", "nothing finite", "rounded below zero", "alone"],
)
def test_winner_is_the_first_of_the_least_distance(distances, winner):
    scores = [score_of(fd) for fd in distances]
    assert choose(scores) is scores[winner]


def test_winner_is_chosen_by_the_distance_alone():
    """Not by folds, precision or the kernel distance."""
    one = score_of(1.0, folds=[3.0] * 20, precision=0.1, recall=0.1, kernel=9.0)
    other = score_of(1.1, folds=[0.5] * 20, precision=0.9, recall=0.9, kernel=0.1)
    assert choose(score for score in (other, one)) is one


# -------------------- sweep and grid


def test_sweep_is_of_one_weight_for_all_blocks_in_increasing_order(scorer):
    scores = sweep(scorer, [1.5, -1, 0.0, 1.5])
    assert [score.w for score in scores] == [weights(w, w, w) for w in (-1, 0, 1.5)]
    assert {(score.first_seed, score.images) for score in scores} == {(10_000, 100)}


def test_sweep_has_precision_and_recall(scorer):
    (score,) = sweep(scorer, [0.5])
    assert score.precision is not None and score.recall is not None


class Answers:
    """A scorer that answers by a function of the weights at once; keeps what it was asked."""

    def __init__(self, distance=lambda w: sum(w.values()), blocks=BLOCKS, count=1000):
        self.distance = distance
        self.merger = SimpleNamespace(blocks=list(blocks))
        self.seeds = neon.seeds.seed_ledger(select_images=count)
        self.asked = []

    def score_all(self, weights, desc, shares=False, seeds=None):
        self.asked.append((desc, shares, seeds))
        return [score_of(self.distance(w), w=w) for w in weights]


def weights_of(scores):
    return [score.w for score in scores]


def test_grid_is_every_product():
    want = [weights(*values) for values in itertools.product((0.5, 1.0), repeat=3)]
    assert weights_of(grid(Answers(), (0.5, 1.0))) == want


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_has_its_own_values(block):
    found = weights_of(grid(Answers(), (0.5, 1.0), {block: (2.0, 3.0, 4.0)}))
    values = {name: {w[name] for w in found} for name in BLOCKS}
    assert values == dict.fromkeys(BLOCKS, {0.5, 1.0}) | {block: {2.0, 3.0, 4.0}}
    assert len(found) == 12


@pytest.mark.parametrize(
    "blocks, own, points",
    [
        (BLOCKS, None, 8),
        (BLOCKS, {"mid": (1.0, 2.0, 3.0)}, 12),
        (("a", "b"), {}, 4),
        (("a",), {"a": (1.0,)}, 1),
    ],
    ids=["three", "own", "two", "one"],
)
def test_size_of_a_grid_is_the_number_of_its_points(blocks, own, points):
    assert neon.search.grid_size(list(blocks), (0.5, 1.0), own) == points
    assert len(grid(Answers(blocks=blocks), (0.5, 1.0), own)) == points


def test_grid_is_scored_on_the_selections_seeds_without_precision(scorer):
    scores = grid(scorer, (0.0, 1.0))
    assert {(score.first_seed, score.images) for score in scores} == {(10_000, 100)}
    assert {score.precision for score in scores} == {None}
    assert scores[5].fd == scorer.score(weights(1, 0, 1)).fd


def test_grid_is_named_by_its_caller():
    answers = Answers()
    grid(answers, (0.0, 1.0), desc="random blocks 1")
    assert answers.asked == [("random blocks 1", False, None)]


# -------------------- race


class Candidates(Answers):
    """A scorer of scores made by hand: {weight: (distance, standard error of the difference)}."""

    def __init__(self, rows, count=1000):
        super().__init__(blocks=("a",), count=count)
        self.rows = dict(rows)

    def score_all(self, weights, desc, shares=False, seeds=None):
        self.asked.append((desc, shares, seeds))
        # The jackknife's standard error of these folds is the one that was asked for.
        wave = np.tile([1.0, -1.0], neon.stats.FOLDS // 2) / 19**0.5
        scores = []
        for w in weights:
            fd, error = self.rows[w["a"]]
            scores.append(score_of(fd, fd + error * wave, w))
        return scores


def survivors(*rows, count=1000, **options):
    """Weights that the race leaves of candidates 1, 2, ... at (distance, error)."""
    scorer = Candidates(enumerate(rows, 1), count)
    left = race(scorer, [{"a": w} for w in scorer.rows], **options)
    return [w["a"] for w in left], scorer.asked


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


@pytest.mark.parametrize("level, left", [(0.05, [1, 2]), (0.5, [1])])
def test_level_of_the_race_is_the_callers(level, left):
    """t at 1 - level / 4: 2.43 and 1.19."""
    assert survivors((1.0, 0.0), (1.2, 0.1), level=level)[0] == left


def test_race_keeps_the_leader():
    left, _ = survivors((2.0, 0.0), (1.0, 0.5), (3.0, 0.0))
    assert 2 in left


def test_race_keeps_equals_in_their_order():
    assert survivors((2.0, 0.0), (1.0, 0.0), (1.0, 0.0))[0] == [2, 3]


def test_race_drops_what_diverges():
    assert survivors((math.inf, 0.0), (1.0, 0.1), (math.inf, 0.0))[0] == [2]


@pytest.mark.parametrize("count, few", [(1000, 200), (100, 40), (40, 40), (30, 30), (205, 41)])
def test_race_uses_the_first_fifth_of_the_selections_seeds(count, few):
    _, ((_, shares, seeds),) = survivors((1.0, 0.0), (2.0, 0.0), count=count)
    assert (seeds.first, seeds.count, seeds.purpose) == (10_000, few, "selection")
    assert not shares


class Gaussians(Answers):
    """Candidates whose features are Gaussian, on common noise; w is the scale."""

    def __init__(self, seed):
        super().__init__(blocks=("a",), count=2000)
        self.rng = np.random.default_rng(seed)

    def score_all(self, weights, desc, shares=False, seeds=None):
        noise = torch.from_numpy(self.rng.normal(size=(seeds.count, 3)))
        return [gaussian_score(standard_reference(), noise * w["a"], w=w) for w in weights]


@pytest.mark.slow
def test_race_keeps_the_best_and_drops_the_bad():
    """The true best is dropped in at most about 5 % of races; 40 races leave room to 5."""
    candidates = [{"a": a} for a in (1.0, 1.04, 1.08, 1.15, 1.3, 1.6)]
    left = [race(Gaussians(seed), candidates) for seed in range(40)]
    assert sum(candidates[0] not in w for w in left) <= 5
    assert not any({"a": 1.6} in w or {"a": 1.3} in w for w in left)


def test_grid_after_a_race_holds_what_it_left_on_all_seeds(scorer, monkeypatch):
    left = [weights(0, 1, 1), weights(0, 0, 0)]
    replace(monkeypatch, "race", lambda scorer, candidates: left)
    scores = grid(scorer, (0.0, 1.0), racing=True)
    assert weights_of(scores) == left and {score.images for score in scores} == {100}


@pytest.mark.parametrize(
    "values, racing", [((0.0, 1.0), False), ((1.0,), True)], ids=["not asked for", "one point"]
)
def test_without_a_race_nothing_is_dropped(monkeypatch, values, racing):
    replace(monkeypatch, "race", pytest.fail)
    assert len(grid(Answers(), values, racing=racing)) == len(values) ** 3


# -------------------- COBYQA


@pytest.fixture(scope="module")
def by_cobyqa(tmp_path_factory):
    scorer = toy_scorer(tmp_path_factory.mktemp("cobyqa"))
    scorer.score(BEST)  # the log holds a better score than the bounds allow
    return scorer, cobyqa(scorer, 2.0, 25, (-0.5, 1.2))


def test_cobyqa_starts_at_its_start_within_the_bounds(by_cobyqa):
    assert by_cobyqa[1][0].w == weights(1.2, 1.2, 1.2)


def test_cobyqa_starts_at_a_weight_for_each_block(scorer):
    start = weights(0.5, -9, 2)
    assert cobyqa(scorer, start, 3, (-1.0, 1.5))[0].w == weights(0.5, -1, 1.5)


def test_cobyqa_stays_within_its_bounds_and_evaluations(by_cobyqa):
    values = np.array([numbers_of(score.w) for score in by_cobyqa[1]])
    assert values.min() >= -0.5 and values.max() <= 1.2 and 10 < len(values) <= 25


def test_cobyqa_goes_on_after_a_divergence(scorer, monkeypatch):
    real = scorer.features
    monkeypatch.setattr(scorer, "features", lambda w, *a: None if w["enc"] > 1 else real(w, *a))
    infinite = [score.fd == math.inf for score in cobyqa(scorer, 1.0, 12)]
    assert any(infinite) and not all(infinite) and len(infinite) > 5


def test_searches_by_name():
    assert neon.search.SEARCHES == {"cobyqa": cobyqa, "gradient": descend}


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


def gradient_search(
    out,
    monkeypatch,
    landscape=bowl,
    start=0.5,
    distance=None,
    evaluations=30,
    bounds=(-1.0, 4.0),
    precision="fp32",
    patience=6,
    log=True,
):
    """A search over a prescribed landscape -> scores, [(w, seeds, precision)] it was asked at.
    distance: of the selection seeds, by default the landscape's."""
    scorer = toy_scorer(out, precision=precision)
    scorer.final_precision = "bf16"
    if not log:
        scorer.log = neon.scores.ScoreLog()
    asked = []

    def prescribed(scorer, w, seeds, precision):
        asked.append((w, seeds, precision))
        value, gradient = landscape(w)
        return value, dict(zip(BLOCKS, gradient, strict=True))

    def score(w, seeds=None, shares=False):
        assert seeds in (None, SELECTION) and not shares
        return score_of(landscape(w)[0] if distance is None else distance(w), w=w)

    replace(monkeypatch, "distance_and_gradient", prescribed)
    monkeypatch.setattr(scorer, "score", score)
    return descend(scorer, start, evaluations, bounds, patience), asked


def test_gradient_search_finds_the_least_point(tmp_path, monkeypatch):
    scores, _ = gradient_search(tmp_path, monkeypatch)
    np.testing.assert_allclose(numbers_of(choose(scores).w), LEAST, atol=1e-3)
    assert len(scores) < 30


def test_first_step_moves_the_steepest_block_by_a_half(tmp_path, monkeypatch):
    """Against the gradient, whatever the unit of the distance."""
    scores, _ = gradient_search(tmp_path, monkeypatch)
    gradient = bowl(scores[0].w)[1]
    want = 0.5 - 0.5 * gradient / np.abs(gradient).max()
    np.testing.assert_allclose(numbers_of(scores[1].w), want, atol=1e-6)


@pytest.mark.parametrize("start", [0.5, weights(1, 0.25, -0.5)], ids=["one", "each"])
def test_gradient_search_begins_at_its_start(tmp_path, monkeypatch, start):
    scores, _ = gradient_search(tmp_path, monkeypatch, start=start)
    assert scores[0].w == (weights(0.5, 0.5, 0.5) if start == 0.5 else start)


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
    nearest = points[np.argmin(np.abs(points - LEAST).sum(1))]
    np.testing.assert_allclose(nearest, [1.6, 0.3, 1], 1e-4)


def test_gradients_are_of_one_set_of_fresh_seeds(tmp_path, monkeypatch):
    _, asked = gradient_search(tmp_path, monkeypatch)
    assert {(seeds.first, seeds.count) for _, seeds, _ in asked} == {(10_000_000, 100)}
    assert not any(seeds.is_final for _, seeds, _ in asked)


def test_every_point_is_scored_on_the_selection_seeds(tmp_path, monkeypatch):
    scores, asked = gradient_search(tmp_path, monkeypatch)
    assert weights_of(scores) == [w for w, _, _ in asked]


@pytest.mark.parametrize("evaluations", [1, 4])
def test_gradient_search_ends_after_its_evaluations(tmp_path, monkeypatch, evaluations):
    scores, asked = gradient_search(tmp_path, monkeypatch, evaluations=evaluations)
    assert len(scores) == len(asked) == evaluations


@pytest.mark.parametrize(
    "gain_until, patience, points",
    [(0, 6, 7), (3, 6, 10), (99, 6, 12), (3, 2, 6)],
    ids=["at once", "later", "always", "less patience"],
)
def test_search_ends_after_points_without_gain(tmp_path, monkeypatch, gain_until, patience, points):
    """The score of the selection seeds falls until a point and rises afterwards."""
    calls = itertools.count()

    def distance(w):
        return float(abs(next(calls) - gain_until))

    scores, _ = gradient_search(
        tmp_path,
        monkeypatch,
        slope,
        distance=distance,
        evaluations=12,
        bounds=(-1e6, 1e6),
        patience=patience,
    )
    assert len(scores) == points


def test_a_search_without_gain_returns_its_start(tmp_path, monkeypatch):
    scores, _ = gradient_search(tmp_path, monkeypatch, distance=lambda w: abs(w["enc"] - 0.5))
    assert choose(scores).w == weights(0.5, 0.5, 0.5)


def test_gradient_search_goes_on_after_a_divergence(tmp_path, monkeypatch):
    """A wall at 1.2, the least point lies behind it."""

    def walled(w):
        return (math.inf, np.zeros(3)) if w["enc"] > 1.2 else bowl(w)

    scores, _ = gradient_search(tmp_path, monkeypatch, walled, start=0.9)
    values = [score.fd for score in scores]
    assert math.inf in values and values.index(math.inf) < len(values) - 1
    assert 1.0 < choose(scores).w["enc"] <= 1.2


@pytest.mark.parametrize(
    "landscape", [lambda w: (math.inf, np.ones(3)), lambda w: (1.0, np.zeros(3))], ids=["inf", "0"]
)
def test_a_start_without_a_direction_is_the_result(tmp_path, monkeypatch, landscape):
    scores, _ = gradient_search(tmp_path, monkeypatch, landscape)
    assert weights_of(scores) == [weights(0.5, 0.5, 0.5)]


@pytest.mark.parametrize(
    "precision, pulled", [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("tf32", "tf32")]
)
def test_precision_of_the_gradient(tmp_path, monkeypatch, precision, pulled):
    """fp16 has no exponents for small derivatives."""
    _, asked = gradient_search(tmp_path, monkeypatch, precision=precision)
    assert {how for _, _, how in asked} == {pulled}


@pytest.fixture(scope="module")
def found_by_gradient(tmp_path_factory):
    scorer = toy_scorer(tmp_path_factory.mktemp("gradient"))
    scorer.score(BEST)
    return scorer, descend(scorer, 0.0, 6)


@pytest.fixture(params=["by_cobyqa", "found_by_gradient"])
def search(request):
    """A scorer whose log holds the best weights, and the scores of a search."""
    return request.getfixturevalue(request.param)


def test_a_search_finds_better_weights_than_its_start(search):
    _, scores = search
    assert choose(scores).fd < 0.8 * scores[0].fd


def test_a_search_returns_what_it_evaluated_itself(search):
    scorer, scores = search
    known = scorer.score(BEST)
    assert known.fd < choose(scores).fd and known not in scores


def test_a_search_scores_on_the_selections_seeds(search):
    _, scores = search
    assert {(score.first_seed, score.images) for score in scores} == {(10_000, 100)}
    assert {score.precision for score in scores} == {None}


def test_ranks_search_as_one_process_does(found_by_gradient, ranks, tmp_path):
    scorers = [toy_scorer(tmp_path / f"rank {rank}") for rank in (0, 1)]

    def share(processes):
        scorer = scorers[processes.rank]
        scorer.sampler.processes = processes
        return [(score.w, score.fd) for score in descend(scorer, 0.0, 3)]

    one, other = ranks(share)
    assert one == other and len(one) == 3
    for (w, fd), want in zip(one, found_by_gradient[1], strict=False):
        assert w == pytest.approx(want.w, abs=1e-3) and fd == pytest.approx(want.fd, rel=1e-3)
    assert len([*tmp_path.glob("rank 0/search-*.json")]) == 1
    assert not [*tmp_path.glob("rank 1/*.json*")]


# -------------------- the state of a search by gradient


@pytest.mark.parametrize("stops", [(1,), (2, 4)], ids=str)
def test_gradient_search_resumes_to_the_same_end(found_by_gradient, tmp_path, monkeypatch, stops):
    real, calls = neon.search.distance_and_gradient, []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) - 1 in stops:
            raise KeyboardInterrupt
        return real(*args, **options)

    replace(monkeypatch, "distance_and_gradient", dying)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            descend(toy_scorer(tmp_path), 0.0, 6)
    scores = descend(toy_scorer(tmp_path), 0.0, 6)
    want = [(score.w, score.fd) for score in found_by_gradient[1]]
    assert [(score.w, score.fd) for score in scores] == want
    assert len(calls) == 6 + len(stops)


@pytest.mark.parametrize(
    "change", [{"start": 0.25}, {"bounds": (-1.0, 3.0)}, {"precision": "bf16"}], ids=str
)
def test_another_search_does_not_resume(tmp_path, monkeypatch, change):
    gradient_search(tmp_path, monkeypatch, evaluations=4)
    _, asked = gradient_search(tmp_path, monkeypatch, evaluations=4, **change)
    assert len(asked) == 4


def test_search_over_other_blocks_does_not_resume(scorer):
    """Its start is the same network."""
    layers = scorer.of(scorer.merger.with_blocks(lambda name: name.rsplit(".", 1)[0]))
    descend(scorer, 0.5, 1)
    descend(layers, 0.5, 1)
    assert len([*scorer.log.folder.glob("search-*.json")]) == 2


def test_longer_search_goes_on(tmp_path, monkeypatch):
    gradient_search(tmp_path, monkeypatch, evaluations=2)
    scores, asked = gradient_search(tmp_path, monkeypatch, evaluations=4)
    assert len(asked) == 2 and len(scores) == 4


def test_search_without_a_folder_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores, asked = gradient_search(tmp_path, monkeypatch, evaluations=3, log=False)
    assert len(scores) == len(asked) == 3 and not [*tmp_path.glob("**/search-*")]


@pytest.fixture
def state(tmp_path, monkeypatch):
    """The file of a search of four points."""
    gradient_search(tmp_path, monkeypatch, evaluations=4)
    (path,) = tmp_path.glob("search-*.json")
    return path


def test_state_holds_every_points_weights_distance_and_slopes(tmp_path, state):
    points = json.loads(state.read_text())
    assert len(points) == 4
    for w, distance, slopes in points:
        want, gradient = bowl(w)
        assert list(w) == list(BLOCKS)
        assert distance == want and slopes == gradient.tolist()


def test_nan_as_distance_is_null(tmp_path, monkeypatch):
    gradient_search(tmp_path, monkeypatch, lambda w: (math.inf, np.ones(3)))
    (path,) = tmp_path.glob("search-*.json")
    assert json.loads(path.read_text()) == [[weights(0.5, 0.5, 0.5), None, [1.0, 1.0, 1.0]]]


def test_search_resumes_behind_a_divergence(tmp_path, monkeypatch):
    def walled(w):
        return (math.inf, np.zeros(3)) if w["enc"] > 0.8 else bowl(w)

    options = {"start": 0.7, "evaluations": 5}
    whole, _ = gradient_search(tmp_path, monkeypatch, walled, **options)
    again, asked = gradient_search(tmp_path, monkeypatch, walled, **options)
    assert math.inf in [score.fd for score in whole]
    assert not asked and weights_of(again) == weights_of(whole)


def test_points_of_another_path_are_computed_again(tmp_path, monkeypatch, state):
    """As another scipy would take."""
    whole = [w for w, _, _ in json.loads(state.read_text())]
    points = json.loads(state.read_text())
    points[2][0] = weights(3, 3, 3)
    state.write_text(json.dumps(points))
    scores, asked = gradient_search(tmp_path, monkeypatch, evaluations=4)
    assert weights_of(scores) == whole
    assert [w for w, _, _ in asked] == whole[2:]


def put(points, place, value):
    """The points with this value in place [point, entry, number]."""
    *path, last = place
    inner = points
    for index in path:
        inner = inner[index]
    inner[last] = value
    return points


@pytest.mark.parametrize(
    "change",
    [
        lambda points: put(points, [1, 0], {"enc": 1.0, "mid": 1.0}),
        lambda points: put(points, [1, 2], [1.0, 2.0]),
        lambda points: put(points, [1, 2, 0], "1.0"),
        lambda points: put(points, [1, 1], "1.0"),
        lambda points: put(points, [1, 2, 1], math.nan),
        lambda points: put(points, [0, 1], math.nan),
        lambda points: put(points, [1], points[1][:2]),
        lambda points: 3,
    ],
    ids=[
        *("other blocks", "fewer slopes", "text of a slope", "text of a distance"),
        *("NaN as slope", "NaN as distance", "no slopes", "a number"),
    ],
)
def test_state_of_another_form_is_refused(tmp_path, monkeypatch, state, change):
    state.write_text(json.dumps(change(json.loads(state.read_text()))))
    with pytest.raises(UserError, match="search-.*is damaged, delete it") as caught:
        gradient_search(tmp_path, monkeypatch)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"no", b"", b"\xff", b"[[", b"[" * 100_000], ids=len)
def test_damaged_state_is_refused(tmp_path, monkeypatch, state, content):
    state.write_bytes(content)
    with pytest.raises(UserError, match="search-.*is damaged, delete it") as caught:
        gradient_search(tmp_path, monkeypatch)
    assert "\n" not in str(caught.value)


# -------------------- the gradient


SEEDS = SeedSet("search", 10_000_000, 20)


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
    fd, gradient = distance_and_gradient(scorer, w, seeds, "fp32", rounding=False)
    assert fd == pytest.approx(distance(scorer, w, seeds), rel=1e-4)
    largest = max(abs(value) for value in gradient.values())
    for block in blocks:
        high = distance(scorer, w | {block: w[block] + h}, seeds)
        low = distance(scorer, w | {block: w[block] - h}, seeds)
        assert gradient[block] == pytest.approx((high - low) / (2 * h), abs=0.02 * largest)


@pytest.mark.parametrize(
    "kind", ["cifar", *(pytest.param(k, marks=pytest.mark.slow) for k in ("ncsnpp", "uncond"))]
)
def test_gradient_is_the_central_difference(tmp_path, kind):
    """All kinds have augmentation labels, which sampling does not use."""
    check_gradient(edm_scorer(tmp_path, kind), BLOCKS)


def test_gradient_over_layers_is_the_central_difference(tmp_path):
    scorer = edm_scorer(tmp_path, partition="layers")
    blocks = scorer.merger.blocks
    check_gradient(scorer, [blocks[0], "enc.8x8_block0", "dec.4x4_in0", blocks[-1]])


def test_gradient_of_another_model_is_the_central_difference(tmp_path):
    check_gradient(toy_scorer(tmp_path), BLOCKS, seeds=SeedSet("search", 10_000_000, 90))


@pytest.mark.parametrize("steps", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_gradient_with_other_steps(tmp_path, steps):
    check_gradient(edm_scorer(tmp_path, steps=steps), ["mid"])


def test_a_block_that_sampling_does_not_use_has_gradient_zero(tmp_path):
    scorer = edm_scorer(tmp_path)
    scorer = scorer.of(scorer.merger.with_blocks({"*map_augment*": "augment", "*": "rest"}))
    _, gradient = distance_and_gradient(scorer, {"augment": 1, "rest": 0.5}, SEEDS, "fp32")
    assert gradient["augment"] == 0 and gradient["rest"] != 0


def test_gradient_does_not_depend_on_the_batch(tmp_path):
    found = []
    for batch in (7, 20):
        scorer = toy_scorer(tmp_path, sample_batch=batch)
        found.append(distance_and_gradient(scorer, BEST, SEEDS, "fp32", rounding=False)[1])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_distance_of_the_gradient_is_the_score(tmp_path):
    """With rounding, which is passed straight through."""
    scorer = toy_scorer(tmp_path)
    fd, _ = distance_and_gradient(scorer, BEST, SELECTION, "fp32")
    assert fd == pytest.approx(toy_distance(scorer, BEST, SELECTION.seeds), rel=1e-5)
    assert fd != distance_and_gradient(scorer, BEST, SELECTION, "fp32", rounding=False)[0]


def test_rounding_hardly_changes_the_gradient(tmp_path):
    scorer, w = toy_scorer(tmp_path), weights(0, 0, 0)
    found = [
        numbers_of(distance_and_gradient(scorer, w, SELECTION, "fp32", rounding)[1])
        for rounding in (True, False)
    ]
    np.testing.assert_allclose(*found, atol=0.05 * np.abs(found[1]).max())


def test_where_the_sampler_diverges_the_gradient_is_zero(scorer):
    scorer.sampler.model.sample = lambda net, noise, *_: noise * math.nan
    fd, gradient = distance_and_gradient(scorer, BEST, SEEDS, "fp32")
    assert fd == math.inf and gradient == dict.fromkeys(BLOCKS, 0.0)


def test_network_needs_no_gradients_after_a_search(tmp_path):
    scorer = toy_scorer(tmp_path)
    distance_and_gradient(scorer, BEST, SEEDS, "fp32")
    assert not any(p.requires_grad for p in scorer.merger.net.parameters())
    assert "forward" not in vars(scorer.merger.net)


def test_activations_of_one_network_call_at_a_time(tmp_path, monkeypatch):
    """Pass one needs none; pass two wraps the network once, checkpointed."""
    asked, real = [], neon.sampling.network_calls

    def watched(net, precision, checkpointed=False):
        asked.append((precision, checkpointed))
        return real(net, precision, checkpointed)

    replace(monkeypatch, "network_calls", watched)
    distance_and_gradient(toy_scorer(tmp_path), BEST, SEEDS, "bf16")
    assert asked == [("bf16", False), ("bf16", True)]


class Scarce(ToyModel):
    """The toy, whose memory holds the graph of three samples; keeps the sizes it was asked for."""

    def __init__(self):
        self.sizes = []

    def sample(self, net, noise, labels, steps):
        if torch.is_grad_enabled():
            self.sizes.append(len(noise))
            if len(noise) > 3:
                raise torch.OutOfMemoryError("no memory")
        return super().sample(net, noise, labels, steps)


def test_gradient_pass_halves_its_batch_where_memory_ends(scorer, monkeypatch):
    replace(monkeypatch, "usable_cores", lambda: 1)
    _, want = distance_and_gradient(scorer, BEST, SEEDS, "fp32")
    scorer.sampler.model = Scarce()
    _, found = distance_and_gradient(scorer, BEST, SEEDS, "fp32")
    assert found == pytest.approx(want, rel=1e-3)
    sizes = scorer.sampler.model.sizes
    assert scorer.sampler.batch == 32  # of pass one, which fits
    assert sizes[:3] == [10, 7, 4] and max(sizes[3:]) <= 2


def test_gradient_pass_takes_half_the_batch(scorer, monkeypatch):
    """Its network calls keep activations."""
    replace(monkeypatch, "usable_cores", lambda: 1)
    scorer.sampler.batch, scorer.sampler.model = 6, Scarce()
    distance_and_gradient(scorer, BEST, SEEDS, "fp32")
    assert scorer.sampler.model.sizes == [3] * 6 + [2]


def test_ranks_have_the_gradient_of_one_process(ranks, tmp_path):
    scorers = [toy_scorer(tmp_path / f"rank {rank}", sample_batch=6) for rank in (0, 1)]

    def share(processes):
        scorer = scorers[processes.rank]
        scorer.sampler.processes = processes
        return distance_and_gradient(scorer, BEST, SEEDS, "fp32")

    (fd, one), (same, other) = ranks(share)
    want, gradient = distance_and_gradient(toy_scorer(tmp_path / "alone"), BEST, SEEDS, "fp32")
    assert fd == same == pytest.approx(want, rel=1e-6)
    assert one == other == pytest.approx(gradient, rel=1e-3)
