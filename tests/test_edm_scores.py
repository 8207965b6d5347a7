"""edm_neon.py: features and reference, scores and their log, paired comparisons."""

import copy
import dataclasses
import fcntl
import json
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from edm_helpers import (
    BEST,
    ToyFeatures,
    gaussian_score,
    preset_of,
    replace,
    score_of,
    standard_reference,
    toy_distance,
    toy_images,
    toy_judge,
    toy_scorer,
    weights,
)

import adaptive_neon as neon
import edm_neon as edm
import neon_ext

SELECTION = neon.scores.SeedSet("selection", 10_000, 100)
FINAL = neon.scores.SeedSet("final 1", 50_000, 100)
BASE = weights(0, 0, 0)


# -------------------- a score
@pytest.mark.parametrize("w", [BASE, BEST, weights(-1, -1, -1), weights(0.3, 2, -0.5)], ids=str)
def test_score_is_the_distance_of_images_at_its_seeds(tmp_path, w):
    scorer = toy_scorer(tmp_path)
    want = toy_distance(scorer, w, range(10_000, 10_100))
    assert scorer.score(w, SELECTION).fd == pytest.approx(want, rel=1e-6)


def test_score_does_not_depend_on_the_batch(tmp_path):
    one = toy_scorer(tmp_path / "one", sample_batch=7).score(BEST, SELECTION)
    other = toy_scorer(tmp_path / "other", sample_batch=100).score(BEST, SELECTION)
    assert one.fd == pytest.approx(other.fd, rel=1e-6)
    assert one.folds == pytest.approx(other.folds, rel=1e-6)


@pytest.mark.parametrize("fold", [0, 7, 19])
def test_folds_leave_out_one_twentieth_of_the_seeds(tmp_path, fold):
    scorer = toy_scorer(tmp_path)
    others = [seed for seed in range(10_000, 10_100) if (seed - 10_000) // 5 != fold]
    want = toy_distance(scorer, BEST, others)
    assert scorer.score(BEST, SELECTION).folds[fold] == pytest.approx(want, rel=1e-6)


def test_score_says_what_it_is_of(tmp_path):
    score = toy_scorer(tmp_path).score(BEST, SELECTION)
    assert (score.snapshot, score.w, score.images, score.first_seed) == (1, BEST, 100, 10_000)
    assert score.arithmetic == "fp32" and len(score.folds) == neon.stats.FOLDS == 20


def test_precision_and_recall_of_a_score(tmp_path):
    scorer = toy_scorer(tmp_path)
    score = scorer.score(BEST, SELECTION)
    (found,) = scorer.features(BEST, SELECTION, [scorer.judge])
    want = neon.judges.precision_recall(scorer.judge.selection.real, found)
    assert (score.precision, score.recall) == want


def test_without_real_images_there_is_no_precision(tmp_path):
    score = toy_scorer(tmp_path, real=False).score(BEST, SELECTION)
    assert score.precision is None and score.recall is None


@pytest.mark.parametrize("seeds, precision", [(SELECTION, "fp32"), (FINAL, "bf16")], ids=str)
def test_final_scores_are_taken_in_the_confirming_precision(
    tmp_path, monkeypatch, seeds, precision
):
    scorer = toy_scorer(tmp_path, confirm_precision="bf16")
    asked, real = [], neon.sampling.network_calls

    def watched(net, precision, **options):
        asked.append(precision)
        return real(net, precision, **options)

    replace(monkeypatch, "network_calls", watched)
    assert scorer.score(BEST, seeds).arithmetic == precision and asked == [precision]


def test_without_a_confirming_precision_final_scores_use_the_selections(tmp_path):
    assert toy_scorer(tmp_path, precision="bf16").score(BEST, FINAL).arithmetic == "bf16"


def test_weights_are_rounded_to_what_a_line_of_the_log_holds(tmp_path):
    assert toy_scorer(tmp_path).weights([1 / 3, 2, -1]) == weights(0.333333, 2, -1)


# -------------------- a sampler that diverges
def diverging(tmp_path, monkeypatch):
    """A scorer whose sampler diverges at 2, 2, 2."""
    bad = weights(2, 2, 2)
    scorer = toy_scorer(tmp_path)
    real = scorer.merger.set

    def poisoned(w):
        net = real(w)
        if w == bad:
            net.dec[1].bias.data[0] = math.nan
        return net

    monkeypatch.setattr(scorer.merger, "set", poisoned)
    return scorer


def test_weights_that_make_the_sampler_diverge_score_infinity(tmp_path, monkeypatch, capsys):
    scorer = diverging(tmp_path, monkeypatch)
    score = scorer.score(weights(2, 2, 2), SELECTION)
    assert score.fd == math.inf and score.folds == [math.inf] * neon.stats.FOLDS
    assert score.precision is None and "diverges" in capsys.readouterr().out


def test_scores_go_on_after_a_divergence(tmp_path, monkeypatch):
    scorer = diverging(tmp_path, monkeypatch)
    scores = scorer.score_all([weights(2, 2, 2), BEST], SELECTION, "grid")
    assert scores[1].fd == pytest.approx(toy_distance(scorer, BEST, SELECTION.seeds), rel=1e-6)


def test_a_divergence_is_read_back(tmp_path, monkeypatch):
    score = diverging(tmp_path, monkeypatch).score(weights(2, 2, 2), SELECTION)
    (line,) = (tmp_path / "grid.jsonl").read_text().splitlines()
    assert json.loads(line)["fd"] is None
    assert neon.scores.ScoreLog(tmp_path).find(score.key, score.w, SELECTION) == score


# -------------------- keys hold the content
def key(scorer, seeds=SELECTION):
    return scorer.key(seeds)


@pytest.fixture
def scorer(tmp_path):
    return toy_scorer(tmp_path)


def with_base(scorer):
    scorer.parents = scorer.parents | {"base_weights": "other"}


def with_aux(scorer):
    scorer.parents = scorer.parents | {"aux_weights": "other"}


def with_model(scorer):
    scorer.sampler.model.identity = "other"


def with_steps(scorer):
    scorer.sampler.steps += 1


def with_labels(scorer):
    scorer.sampler.labels = "random"


def with_precision(scorer):
    scorer.selection_precision = "bf16"


def with_owners(scorer):
    scorer.merger = scorer.merger.with_owners(
        {name: "mid" if "1" in name else block for name, block in scorer.merger.owners.items()}
    )


def with_snapshot(scorer):
    scorer.kimg = 2


def with_feature_weights(scorer):
    scorer.judge.features.identity = "other"


def with_reference(scorer):
    reference = dataclasses.replace(scorer.judge.selection, identity="other")
    scorer.judge = neon.judges.Judge(scorer.judge.features, reference, scorer.judge.final)


def with_device(scorer):
    scorer.sampler.processes.device = "cuda"


CHANGES = [
    with_base,
    with_aux,
    with_model,
    with_steps,
    with_labels,
    with_precision,
    with_owners,
    with_snapshot,
    with_feature_weights,
    with_reference,
    with_device,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_key_depends_on(scorer, change):
    before = key(scorer)
    change(scorer)
    assert key(scorer) != before


def test_key_depends_on_torch(scorer, monkeypatch):
    before = key(scorer)
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert key(scorer) != before


@pytest.mark.parametrize("version", ["SAMPLING_VERSION", "SCORING_VERSION"])
def test_key_depends_on_the_version_of_the_code(scorer, monkeypatch, version):
    before = key(scorer)
    replace(monkeypatch, version, "other")
    assert key(scorer) != before


def test_key_of_final_scores_depends_on_the_confirming_precision(scorer):
    before = key(scorer, FINAL), key(scorer, SELECTION)
    scorer.final_precision = "bf16"
    assert key(scorer, FINAL) != before[0] and key(scorer, SELECTION) == before[1]


def test_key_does_not_depend_on_batch_or_folder(scorer, tmp_path):
    assert key(toy_scorer(tmp_path / "other", sample_batch=7)) == key(scorer)


def test_parents_are_hashes_of_the_weights():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert neon.keys.weights_hash(a) == neon.keys.weights_hash(b)
    b.bias.data[1] += 1e-6
    assert neon.keys.weights_hash(a) != neon.keys.weights_hash(b)


def test_hash_of_weights_includes_buffers_and_names():
    net, other = torch.nn.Module(), torch.nn.Module()
    for module, name in ((net, "a"), (other, "b")):
        module.register_buffer(name, torch.ones(2))
    assert neon.keys.weights_hash(net) != neon.keys.weights_hash(other)
    other = torch.nn.Module()
    other.register_buffer("a", torch.zeros(2))
    assert neon.keys.weights_hash(net) != neon.keys.weights_hash(other)


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(3, 2),
        torch.ones(2, 3).double(),
        torch.ones(6),
        torch.ones(2, 3).index_fill(1, torch.tensor([2]), 0),
    ],
    ids=["shape", "dtype", "flat", "content"],
)
def test_hash_of_a_tensor(other):
    assert neon.keys.tensor_hash(torch.ones(2, 3)) == neon.keys.tensor_hash(torch.ones(3, 2).T)
    assert neon.keys.tensor_hash(torch.ones(2, 3)) != neon.keys.tensor_hash(other)


# -------------------- reference
def reference(tmp_path, images, labels=None):
    real = neon.images.RealImages(images, labels, "images.zip")
    return neon.judges.reference_from_images(real, ToyFeatures(), tmp_path / "reference.npz", "cpu")


def test_reference_of_images(tmp_path):
    images, labels = toy_images(count=300)
    found = reference(tmp_path, images)
    features = ToyFeatures()(images)
    assert torch.equal(found.real, features)
    assert found.facts == {"features": "toy-6", "source": "images.zip", "images": 300}
    want = neon_ext.FrechetReference(*neon_ext.feature_moments(features), 300)
    other = ToyFeatures()(toy_images(first=5, count=100)[0])
    distances = [float(r.distance_from_features(other)) for r in (found.prepared, want)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-9)


def test_other_images_at_the_same_path_are_another_reference(tmp_path):
    images, _ = toy_images(count=300)
    changed = images.clone()
    changed[17] = 255 - changed[17]
    assert reference(tmp_path, images).identity == reference(tmp_path, images.clone()).identity
    assert reference(tmp_path, images).identity != reference(tmp_path, changed).identity


def test_judge_is_its_features_and_its_reference(tmp_path):
    judge = toy_judge(tmp_path)
    other = ToyFeatures()
    other.identity = "other"
    features = neon.judges.Judge(other, judge.selection, judge.final)
    selection = dataclasses.replace(judge, selection=judge.final)
    for seeds, changed in ((SELECTION, True), (FINAL, False)):
        assert features.identity(seeds) != judge.identity(seeds)
        assert (selection.identity(seeds) != judge.identity(seeds)) == changed


def npz(tmp_path, **changes):
    content = {"mu": np.zeros(6), "sigma": np.eye(6), "features": "toy-6", "images": 900}
    content = {key: value for key, value in (content | changes).items() if value is not None}
    np.savez(tmp_path / "ref.npz", **content)
    return neon.judges.reference_from_file(tmp_path / "ref.npz", ToyFeatures(), "cpu")


def test_reference_of_a_file(tmp_path):
    found = npz(tmp_path)
    assert found.real is None and found.facts["images"] == 900
    assert float(found.prepared.distance(torch.ones(6).double(), torch.eye(6).double())) == (
        pytest.approx(6)
    )


@pytest.mark.parametrize(
    "change", [{"mu": np.full(6, 0.1)}, {"sigma": 2 * np.eye(6)}, {"images": 901}], ids=str
)
def test_identity_of_a_file_is_its_content(tmp_path, change):
    assert npz(tmp_path).identity != npz(tmp_path, **change).identity


def test_file_without_names_is_of_50_000_inception_features(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(4), sigma=np.eye(4))
    features = SimpleNamespace(name="inception-0-tf1", kind="inception", dim=4)
    found = neon.judges.reference_from_file(tmp_path / "ref.npz", features, "cpu")
    assert found.facts["images"] == 50_000


@pytest.mark.parametrize(
    "change, message",
    [
        ({"features": "other-6"}, "of other-6, the features are toy-6"),
        ({"mu": np.zeros(3)}, r"has \(3,\)"),
        ({"sigma": np.full((6, 6), np.nan)}, "no usable mu and sigma"),
        ({"sigma": np.eye(3)}, "no usable mu and sigma"),
        ({"mu": None}, "no usable mu and sigma"),
    ],
    ids=["features", "size", "nan", "shape", "missing"],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(neon.files.UserError, match=message):
        npz(tmp_path, **change)


def test_floor_is_the_final_score_of_the_selections_images(tmp_path):
    judge = toy_judge(tmp_path)
    want = float(judge.final.prepared.distance_from_features(judge.selection.real[:150]))
    assert judge.floor(150) == {"images": 150, "fd": pytest.approx(want, rel=1e-6)}


@pytest.mark.parametrize(
    "options, source",
    [
        ({}, edm.CIFAR10_STATISTICS),
        ({"base": "uncond"}, edm.CIFAR10_STATISTICS),
        ({"base": "mine.pkl", "ref": "cifar10"}, edm.CIFAR10_STATISTICS),
        ({"ref": "mine.npz"}, "mine.npz"),
        ({"base": "mine.pkl"}, None),
        ({"model": "mine.py"}, None),
    ],
    ids=str,
)
def test_cifar10_statistics_are_for_cifar10_networks_or_asked_for(options, source):
    c = neon.config.Config(**options)
    if source:
        assert neon.study.reference_source(c, preset_of(c), None)[0] == source
    else:
        with pytest.raises(neon.files.UserError, match="--ref cifar10"):
            neon.study.reference_source(c, preset_of(c), None)


# -------------------- precision and recall
@pytest.fixture
def cloud(generator):
    return torch.randn(200, 4, generator=generator)


def test_precision_and_recall_of_the_same_points(cloud):
    assert neon.judges.precision_recall(cloud, cloud) == (1, 1)


def test_precision_and_recall_of_points_far_away(cloud):
    assert neon.judges.precision_recall(cloud, cloud + 100) == (0, 0)


def test_a_few_modes_have_precision_and_no_recall(cloud, generator):
    few = cloud[:20].repeat(10, 1) + 1e-4 * torch.randn(200, 4, generator=generator)
    precision, recall = neon.judges.precision_recall(cloud, few)
    assert precision == 1 and recall < 0.6


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


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_use_the_kth_other_neighbour(cloud, k, generator):
    real, fake = cloud[:40], 1.3 * torch.randn(50, 4, generator=generator) + 0.4
    found = neon.judges.precision_recall(real, fake, k)
    assert found == (inside(fake, real, k), inside(real, fake, k)) and found[0] != found[1]


def test_precision_and_recall_use_five_neighbours(cloud, generator):
    fake = 1.3 * torch.randn(200, 4, generator=generator)
    assert neon.judges.precision_recall(cloud, fake) == neon.judges.precision_recall(cloud, fake, 5)
    assert neon.judges.precision_recall(cloud, fake) != neon.judges.precision_recall(cloud, fake, 4)


# -------------------- the log
@pytest.mark.parametrize(
    "seeds, name",
    [
        (SELECTION, "grid.jsonl"),
        (neon.scores.SeedSet("search", 10_000_000, 100), "grid.jsonl"),
        (FINAL, "final.jsonl"),
        (neon.scores.SeedSet("final 2", 60_000, 100), "final.jsonl"),
    ],
    ids=["selection", "search", "final", "second final"],
)
def test_file_of_a_score(tmp_path, seeds, name):
    toy_scorer(tmp_path).score(BASE, seeds)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == [name]


@pytest.mark.parametrize("seeds", [SELECTION, FINAL], ids=["selection", "final"])
def test_finished_score_is_read_back_and_not_taken_again(tmp_path, monkeypatch, seeds):
    score = toy_scorer(tmp_path).score(BEST, seeds)
    again = toy_scorer(tmp_path)
    monkeypatch.setattr(again, "features", None)
    assert again.score(dict(BEST), seeds) == score


@pytest.mark.parametrize(
    "w, seeds",
    [
        (weights(1, 0.5, 1.4), SELECTION),
        (weights(0.5, 1, 1.5), SELECTION),
        (BEST, neon.scores.SeedSet("selection", 10_001, 100)),
        (BEST, neon.scores.SeedSet("selection", 10_000, 60)),
    ],
    ids=["weight", "blocks", "first seed", "images"],
)
def test_another_score_is_taken(tmp_path, w, seeds):
    score = toy_scorer(tmp_path).score(BEST, SELECTION)
    assert toy_scorer(tmp_path).score(w, seeds).fd != score.fd


def test_another_judge_scores_again(tmp_path):
    scorer = toy_scorer(tmp_path)
    before = scorer.score(BEST, SELECTION)
    images, labels = toy_images(BASE)
    again = toy_scorer(tmp_path)
    real = neon.images.RealImages(images, labels, "toy")  # the same source, other images
    reference = neon.judges.reference_from_images(real, ToyFeatures(), None, "cpu")
    again.judge = neon.judges.Judge(ToyFeatures(), reference, reference)
    after = again.score(BEST, SELECTION)
    assert after.fd > 2 * before.fd


def two_lines(tmp_path):
    log = neon.scores.ScoreLog(tmp_path)
    for fd in (1.5, 2.5):
        log.add(score_of(fd, w=weights(fd, 0, 0)), SELECTION)
    return tmp_path / "grid.jsonl"


def test_lines_are_strict_json_in_the_order_of_the_scores(tmp_path):
    lines = two_lines(tmp_path).read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["fd"] for row in rows] == [1.5, 2.5]
    assert set(rows[0]) == {field.name for field in dataclasses.fields(neon.scores.Score)}


def damage(old, new):
    def change(line):
        assert old in line
        return line.replace(old, new, 1)

    return change


@pytest.mark.parametrize(
    "change",
    [
        damage('"fd": 2.5', '"fd": NaN'),
        damage('"fd": 2.5', '"fd": "2.5"'),
        damage('"fd": 2.5', '"fd": -2.5'),
        damage('"fd": 2.5, ', ""),
        damage('"fd": 2.5', '"fd": 2.5, "more": 1'),
        damage('"folds": [2.5, ', '"folds": ['),
        damage('"folds": [2.5, ', '"folds": ["x", '),
        damage('"enc": 2.5', '"enc": "x"'),
        damage('"w": {', '"w": 3, "v": {'),
        damage("{", ""),
        lambda line: "[1, 2]",
        lambda line: "",
        lambda line: "[" * 100_000,
    ],
    ids=[
        *("nan", "text", "negative", "missing", "more", "19 folds", "text in folds", "text in w"),
        *("no weights", "no object", "list", "empty", "nested"),
    ],
)
def test_damaged_line_is_refused_by_number(tmp_path, change):
    path = two_lines(tmp_path)
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{change(second)}\n")
    with pytest.raises(neon.files.UserError, match="grid.jsonl, line 2, is damaged"):
        neon.scores.ScoreLog(tmp_path)


def test_line_that_is_no_text_is_refused(tmp_path):
    path = two_lines(tmp_path)
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n")
    with pytest.raises(neon.files.UserError, match="line 3, is damaged"):
        neon.scores.ScoreLog(tmp_path)


@pytest.mark.parametrize("length", [1, 50, None], ids=["a byte", "a part", "all but the line end"])
def test_tail_that_was_cut_off_is_scored_again(tmp_path, length):
    path = two_lines(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[0][:length])
    log = neon.scores.ScoreLog(tmp_path)
    assert len(log.scores) == 2
    log.add(score_of(3.5, w=weights(3.5, 0, 0)), SELECTION)
    assert path.read_bytes().startswith(whole)
    assert [json.loads(line)["fd"] for line in path.read_text().splitlines()] == [1.5, 2.5, 3.5]


def test_two_writers_keep_their_lines_apart(tmp_path):
    def write(number):
        log = neon.scores.ScoreLog(tmp_path)
        for i in range(40):
            log.add(score_of(1.0 + i, w=weights(number, i, 0)), FINAL)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(neon.scores.ScoreLog(tmp_path).scores) == 120


def test_writer_waits_for_the_one_before(tmp_path):
    path = two_lines(tmp_path)
    before = path.read_bytes()
    log = neon.scores.ScoreLog(tmp_path)
    thread = threading.Thread(target=log.add, args=(score_of(3.5), SELECTION))
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and path.read_bytes() == before
    thread.join()
    assert len(neon.scores.ScoreLog(tmp_path).scores) == 3


def test_line_of_another_key_is_not_found(tmp_path):
    two_lines(tmp_path)
    log = neon.scores.ScoreLog(tmp_path)
    assert log.find("key", weights(1.5, 0, 0), SELECTION).fd == 1.5
    assert log.find("other", weights(1.5, 0, 0), SELECTION) is None


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


# -------------------- Inception: names and shapes of the public port
def inception_shapes():
    """{layer: weight shape}, written out from the published graph (94 convolutions)."""
    shapes = {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3),
    }

    def chain(block, branch, channels, *layers):
        for i, (out, kernel) in enumerate(layers, 1):
            end = branch if len(layers) == 1 else f"{branch}_{i}"
            size = (kernel, kernel) if isinstance(kernel, int) else kernel
            shapes[f"Mixed_{block}.{end}"] = (out, channels, *size)
            channels = out

    for block, channels, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        chain(block, "branch1x1", channels, (64, 1))
        chain(block, "branch5x5", channels, (48, 1), (64, 5))
        chain(block, "branch3x3dbl", channels, (64, 1), (96, 3), (96, 3))
        chain(block, "branch_pool", channels, (pool, 1))
    shapes["Mixed_6a.branch3x3"] = (384, 288, 3, 3)
    chain("6a", "branch3x3dbl", 288, (64, 1), (96, 3), (96, 3))
    for block, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        chain(block, "branch1x1", 768, (192, 1))
        chain(block, "branch_pool", 768, (192, 1))
        chain(block, "branch7x7", 768, (c, 1), (c, (1, 7)), (192, (7, 1)))
        double = [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))]
        chain(block, "branch7x7dbl", 768, *double)
    chain("7a", "branch3x3", 768, (192, 1), (320, 3))
    chain("7a", "branch7x7x3", 768, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3))
    for block, channels in (("7b", 1280), ("7c", 2048)):
        chain(block, "branch1x1", channels, (320, 1))
        chain(block, "branch_pool", channels, (192, 1))
        shapes[f"Mixed_{block}.branch3x3_1"] = (384, channels, 1, 1)
        shapes[f"Mixed_{block}.branch3x3dbl_1"] = (448, channels, 1, 1)
        shapes[f"Mixed_{block}.branch3x3dbl_2"] = (384, 448, 3, 3)
        for end, kernel in (
            ("_2a", (1, 3)),
            ("_2b", (3, 1)),
            ("dbl_3a", (1, 3)),
            ("dbl_3b", (3, 1)),
        ):
            shapes[f"Mixed_{block}.branch3x3{end}"] = (384, 384, *kernel)
    return shapes


@pytest.fixture(scope="module")
def inception_weights():
    torch.manual_seed(0)
    found = {"fc.weight": torch.randn(1008, 2048), "fc.bias": torch.randn(1008)}
    for name, shape in inception_shapes().items():
        found[f"{name}.conv.weight"] = torch.randn(*shape) * (2 / np.prod(shape[1:])) ** 0.5
        found[f"{name}.bn.weight"] = 1 + 0.1 * torch.randn(shape[0])
        found[f"{name}.bn.bias"] = 0.1 * torch.randn(shape[0])
        found[f"{name}.bn.running_mean"] = 0.1 * torch.randn(shape[0])
        found[f"{name}.bn.running_var"] = 1 + 0.1 * torch.randn(shape[0]).abs()
    return found


@pytest.fixture(scope="module")
def inception(inception_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(inception_weights, path)
    return neon.features.InceptionFeatures(path)


def test_inception_has_94_convolutions(inception):
    found = sum(name.endswith("_bias") for name in inception.state_dict())
    assert found == len(inception_shapes()) == 94


def test_inception_gives_2048_features(inception):
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    found = inception(images)
    assert found.shape == (2, 2048) and found.isfinite().all()
    assert not torch.equal(found[0], found[1])


def test_inception_in_channels_last_gives_the_same_features(inception):
    """As a GPU computes it."""
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    other = copy.deepcopy(inception).to(memory_format=torch.channels_last)
    assert other.Conv2d_2a_3x3.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(other(images), inception(images), rtol=1e-4, atol=1e-5)


def test_inceptions_batch_normalisation_is_folded(inception, inception_weights):
    layer = "Conv2d_1a_3x3"
    x = torch.randn(1, 3, 32, 32)
    want = torch.nn.functional.conv2d(x, inception_weights[f"{layer}.conv.weight"], stride=2)
    bn = [
        inception_weights[f"{layer}.bn.{key}"]
        for key in ("running_mean", "running_var", "weight", "bias")
    ]
    want = torch.nn.functional.batch_norm(want, *bn, eps=1e-3).relu()
    torch.testing.assert_close(inception.conv(x, layer, 2), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fault", ["damaged", "missing", "none", "no file"])
def test_other_files_are_not_inception(inception_weights, tmp_path, fault):
    pool = "branch_pool.conv.weight"
    contents = {
        "damaged": {**inception_weights, f"Mixed_7c.{pool}": inception_weights[f"Mixed_7b.{pool}"]},
        "missing": {n: w for n, w in inception_weights.items() if "6c.branch7x7_2" not in n},
        "none": {},
    }
    path = tmp_path / "bad.pth"
    path.write_bytes(b"no")
    if fault in contents:
        torch.save(contents[fault], path)
    with pytest.raises(neon.files.UserError, match="not the PyTorch port"):
        neon.features.InceptionFeatures(path)


def test_resize_of_the_same_size_changes_nothing():
    x = torch.rand(1, 1, 299, 299)
    torch.testing.assert_close(neon.features.InceptionFeatures.resize(x), x)


def test_resize_is_tensorflows():
    ramp = neon.features.InceptionFeatures.resize(torch.arange(32.0).expand(1, 1, 32, 32))[0, 0, 0]
    want = (torch.arange(299) * 32 / 299).clamp_max(31)
    torch.testing.assert_close(ramp, want, rtol=0, atol=1e-4)
