"""What adaptive_neon/scores.py promises."""

import dataclasses
import itertools
import json
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edm_helpers import (
    BEST,
    ToyFeatures,
    ToyModel,
    config,
    network_distance,
    real_toys,
    replace,
    score_of,
    scorer_of,
    toy_distance,
    toy_judge,
    toy_pair,
    toy_scorer,
    weights,
)

import adaptive_neon as neon
from adaptive_neon.files import UserError
from adaptive_neon.processes import Processes
from adaptive_neon.scores import Score, ScoreLog, Scorer
from adaptive_neon.seeds import SeedSet

# Those of toy_scorer() are as many and begin there too.
SELECTION = SeedSet("selection", 10_000, 100)
FINAL = SeedSet("final 1", 50_000, 120)
BASE = weights(0, 0, 0)
MIXED = weights(-1, 2, 0.25)


@pytest.fixture
def scorer(tmp_path):
    return toy_scorer(tmp_path)


def sampled(scorer, monkeypatch):
    """The seeds that the scorer samples from now on."""
    seen = []
    real = scorer.sampler.batch_images

    def watched(seeds, batch=None):
        seen.extend(int(seed) for seed in seeds)
        return real(seeds, batch)

    monkeypatch.setattr(scorer.sampler, "batch_images", watched)
    return seen


# -------------------- a score


@pytest.mark.parametrize("seeds", [SELECTION, FINAL], ids=["selection", "final"])
@pytest.mark.parametrize("w", [BASE, BEST, MIXED], ids=["base", "best", "mixed"])
def test_score_is_the_distance_of_images_at_its_seeds(scorer, w, seeds):
    """To the real images of the selection, or of the final comparison."""
    want = toy_distance(scorer, w, seeds.seeds)
    assert scorer.score(w, seeds).fd == pytest.approx(want, rel=1e-6)


def test_score_at_minus_one_is_the_self_trained_networks(scorer):
    want = network_distance(toy_pair()[1], SELECTION.seeds, scorer.judge.selection)
    assert scorer.score(-1).fd == pytest.approx(want, rel=1e-6)


def test_one_number_is_the_weight_of_all_blocks(scorer):
    assert scorer.score(0.5) == scorer.score(weights(0.5, 0.5, 0.5))


def test_score_is_taken_on_the_selections_seeds(scorer):
    score = scorer.score(BEST)
    assert (score.first_seed, score.images) == (10_000, 100)


def test_score_does_not_depend_on_the_batch(tmp_path):
    one = toy_scorer(tmp_path / "one", sample_batch=7).score(BEST)
    other = toy_scorer(tmp_path / "other", sample_batch=100).score(BEST)
    assert one.fd == pytest.approx(other.fd, rel=1e-6)
    assert one.folds == pytest.approx(other.folds, rel=1e-6)


@pytest.mark.parametrize("fold", [0, 7, 19])
def test_folds_leave_out_one_twentieth_of_the_seeds(scorer, fold):
    others = [seed for seed in SELECTION.seeds if (seed - 10_000) // 5 != fold]
    want = toy_distance(scorer, BEST, others)
    assert scorer.score(BEST).folds[fold] == pytest.approx(want, rel=1e-6)


def test_score_says_what_it_is_of(scorer):
    scorer.snapshot = 1551
    score = scorer.score(weights(1 / 3, 2, -1))
    assert (score.snapshot, score.arithmetic, score.judge) == (1551, "fp32", "toy-6")
    assert score.w == weights(0.333333, 2, -1)  # as a line of the log holds it
    assert len(score.folds) == neon.stats.FOLDS == 20 and score.seconds > 0


def test_scores_come_in_the_order_of_the_weights(scorer):
    scores = scorer.score_all([1.0, BASE, BEST], "some")
    assert [score.w for score in scores] == [weights(1, 1, 1), BASE, BEST]
    assert {score.images for score in scores} == {100}


@pytest.mark.parametrize("seeds, precision", [(SELECTION, "fp32"), (FINAL, "bf16")], ids=str)
def test_final_scores_are_taken_in_the_final_precision(scorer, monkeypatch, seeds, precision):
    scorer.final_precision = "bf16"
    asked, real = [], neon.sampling.network_calls

    def watched(net, precision, **options):
        asked.append(precision)
        return real(net, precision, **options)

    replace(monkeypatch, "network_calls", watched)
    assert scorer.score(BEST, seeds).arithmetic == precision and asked == [precision]


def test_without_a_final_precision_final_scores_use_the_selections(tmp_path):
    assert toy_scorer(tmp_path, precision="bf16").score(BEST, FINAL).arithmetic == "bf16"


# -------------------- precision and recall


def test_precision_and_recall_are_of_the_images_that_were_scored(scorer):
    score = scorer.score(BEST, shares=True)
    ((found, _),) = scorer.features(BEST, SELECTION, [scorer.judge])
    want = neon.judges.precision_recall(scorer.judge.selection, found)
    assert (score.precision, score.recall) == want


def test_precision_and_recall_are_taken_on_request(scorer):
    score = scorer.score(BEST)
    assert score.precision is None and score.recall is None


def test_without_real_images_there_is_no_precision(tmp_path):
    score = toy_scorer(tmp_path, real=False).score(BEST, shares=True)
    assert score.precision is None and score.recall is None


def test_a_score_without_precision_is_taken_again_with_it(tmp_path):
    before = toy_scorer(tmp_path).score(BEST)
    after = toy_scorer(tmp_path).score(BEST, shares=True)
    assert after.precision is not None and (after.fd, after.key) == (before.fd, before.key)
    assert toy_scorer(tmp_path).score(BEST) == after


def test_a_score_with_precision_serves_without_it(scorer):
    assert scorer.score(BEST, shares=True) is not None
    assert scorer.score(BEST).precision is not None


@pytest.mark.parametrize("real", [True, False], ids=["with real images", "without"])
def test_what_is_complete_is_not_taken_again(tmp_path, monkeypatch, real):
    score = toy_scorer(tmp_path, real).score(BEST, shares=True)
    again = toy_scorer(tmp_path, real)
    seen = sampled(again, monkeypatch)
    assert again.score(BEST, shares=True) == score and not seen


# -------------------- a sampler that diverges


@pytest.fixture
def diverging(scorer, monkeypatch):
    """The sampler diverges at 2, 2, 2."""
    real = scorer.merger.set

    def poisoned(w):
        net = real(w)
        if w == weights(2, 2, 2):
            net.dec[1].bias.data[0] = math.nan
        return net

    monkeypatch.setattr(scorer.merger, "set", poisoned)
    return scorer


def test_weights_that_make_the_sampler_diverge_score_infinity(diverging, capsys):
    score = diverging.score(2, FINAL, shares=True)
    assert score.fd == math.inf and score.folds == [math.inf] * neon.stats.FOLDS
    assert (score.precision, score.recall, score.kernel) == (None, None, None)
    assert capsys.readouterr().out.count("diverges") == 1


def test_scores_go_on_after_a_divergence(diverging):
    scores = diverging.score_all([2, BEST], "grid")
    want = toy_distance(diverging, BEST, SELECTION.seeds)
    assert scores[1].fd == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("shares", [False, True], ids=["distance", "shares"])
def test_a_divergence_is_read_back(diverging, tmp_path, monkeypatch, shares):
    score = diverging.score(2, shares=shares)
    (line,) = (tmp_path / "grid.jsonl").read_text().splitlines()
    assert json.loads(line)["fd"] is None
    again = toy_scorer(tmp_path)
    seen = sampled(again, monkeypatch)
    assert again.score(2, shares=shares) == score and not seen


# -------------------- several judges


class Other(ToyFeatures):
    kind = name = "other-6"
    identity = "other features"

    def __call__(self, images):
        return super().__call__(images).flip(1) ** 3


@pytest.fixture
def judged(tmp_path):
    """A scorer of two judges with two final sets."""
    c = config(tmp_path, final_repeats=2)
    judges = [toy_judge(tmp_path), neon.judges.Judge(Other(), real_toys())]
    return scorer_of(c, ToyModel(), *toy_pair(), judges)


def features_of(scorer, w, seeds, judge):
    """Of the images at these seeds."""
    scorer.merger.set(w)
    images, _ = scorer.sampler.batch_images(seeds)
    return judge.features(images)


def test_every_judge_scores_every_final_set(judged):
    found = judged.finals(BEST)
    assert [*found] == ["toy-6", "other-6"]
    for name, scores in found.items():
        assert [score.judge for score in scores] == [name] * 2
        assert [score.first_seed for score in scores] == [50_000, 50_120]


def test_final_images_are_sampled_once_for_all_judges(judged, monkeypatch):
    seen = sampled(judged, monkeypatch)
    judged.finals(BEST)
    assert sorted(seen) == list(range(50_000, 50_240))


@pytest.mark.parametrize("number", [0, 1], ids=["deciding", "unseen"])
def test_distance_of_every_judge_is_to_its_final_reference(judged, number):
    judge = judged.judges[number]
    features = features_of(judged, BEST, range(50_120, 50_240), judge)
    want = judge.final.prepared.fold_distances(features, neon.stats.FOLDS)[0]
    assert judged.finals(BEST)[judge.name][1].fd == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("number", [0, 1], ids=["deciding", "unseen"])
def test_every_judge_has_a_kernel_distance_and_a_correction(judged, number):
    judge = judged.judges[number]
    score = judged.finals(BEST)[judge.name][0]
    features = features_of(judged, BEST, range(50_000, 50_120), judge)
    kernel, folds, real_folds = neon.judges.kernel_distance(judge.final, features)
    assert score.kernel == pytest.approx(kernel, rel=1e-6)
    assert score.kernel_folds == pytest.approx(folds, rel=1e-6)
    assert score.kernel_real_folds == pytest.approx(real_folds, rel=1e-6)
    want = neon.judges.distances_without_real(judge.final, features)
    assert score.real_folds == pytest.approx(want, rel=1e-6)
    bias = 19 * (np.mean(score.folds) - score.fd) + 19 * (np.mean(score.real_folds) - score.fd)
    assert score.corrected == pytest.approx(score.fd - bias, rel=1e-6)


def test_selection_has_no_kernel_distance_and_no_correction(scorer):
    score = scorer.score(BEST, shares=True)
    assert score.kernel is None and score.corrected is None and score.real_folds is None


def test_the_deciding_judge_alone_has_precision_and_recall(judged):
    shares = {name: scores[0].precision for name, scores in judged.finals(BEST).items()}
    assert shares["toy-6"] is not None and shares["other-6"] is None


def test_selection_is_the_first_judges(judged):
    judge = judged.judges[0]
    features = features_of(judged, BEST, SELECTION.seeds, judge)
    want = judge.selection.prepared.fold_distances(features, neon.stats.FOLDS)[0]
    score = judged.score(BEST)
    assert score.judge == "toy-6" and score.fd == pytest.approx(want, rel=1e-6)


def test_finished_judges_are_read_back_and_only_a_new_one_is_scored(judged, monkeypatch):
    one = scorer_of(
        config(judged.log.folder, final_repeats=2), ToyModel(), *toy_pair(), [judged.judges[0]]
    )
    first = one.finals(BEST)["toy-6"]
    judged.log = ScoreLog(judged.log.folder)
    seen = sampled(judged, monkeypatch)
    both = judged.finals(BEST)
    assert both["toy-6"] == first and len(seen) == 240
    lines = (judged.log.folder / "final.jsonl").read_text().splitlines()
    assert [json.loads(line)["judge"] for line in lines] == ["toy-6"] * 2 + ["other-6"] * 2
    assert judged.finals(BEST) == both and len(seen) == 240


def test_a_divergence_is_infinite_in_every_judge(judged, monkeypatch, capsys):
    def diverge(part, batch=None):
        raise neon.processes.Diverged

    monkeypatch.setattr(judged.sampler, "batch_images", diverge)
    found = judged.finals(BEST)
    assert {score.fd for scores in found.values() for score in scores} == {math.inf}


@pytest.mark.parametrize("level", [0.05, 0.01])
def test_weights_are_compared_in_every_judge_on_the_final_seeds(judged, level):
    found = judged.compare(BEST, 0, level)
    ours, theirs = judged.finals(BEST), judged.finals(0)
    assert found == {
        name: neon.stats.compare(ours[name], theirs[name], level) for name in ("toy-6", "other-6")
    }
    assert found["toy-6"].verdict == "better"


# -------------------- the key holds all that decides a score


OTHER = SimpleNamespace(identity="other")


def changed_key(scorer, place, value):
    """After this value was put into that place of the scorer."""
    *owners, name = place.split(".")
    owner = scorer
    for each in owners:
        owner = getattr(owner, each)
    setattr(owner, name, value)
    return scorer.key(MIXED, SELECTION)


@pytest.mark.parametrize(
    "place, value",
    [
        ("merger.base_hash", "other"),
        ("merger.aux_hash", "other"),
        ("sampler.model.identity", "other"),
        ("sampler.steps", 19),
        ("sampler.labels", "random"),
        ("sampler.processes", Processes("cuda")),
        ("selection_precision", "bf16"),
        ("judge.features.identity", "other"),
        ("judge.selection", OTHER),
    ],
)
def test_key_depends_on_what_decides_the_score(scorer, place, value):
    before = scorer.key(MIXED, SELECTION)
    assert changed_key(scorer, place, value) != before


@pytest.mark.parametrize(
    "place, value", [("sampler.batch", 7), ("snapshot", 2), ("judge.final", OTHER)]
)
def test_key_does_not_depend_on_what_decides_nothing(scorer, place, value):
    before = scorer.key(MIXED, SELECTION)
    assert changed_key(scorer, place, value) == before


@pytest.mark.parametrize(
    "w, seeds",
    [
        (weights(-1, 2, 0.250001), SELECTION),
        (weights(2, -1, 0.25), SELECTION),
        (MIXED, SeedSet("selection", 10_001, 100)),
        (MIXED, SeedSet("selection", 10_000, 99)),
        (MIXED, FINAL),
    ],
    ids=["weight", "exchanged", "first seed", "images", "final"],
)
def test_key_depends_on_weights_and_seeds(scorer, w, seeds):
    assert scorer.key(w, seeds) != scorer.key(MIXED, SELECTION)


def test_key_depends_on_the_number_of_folds(scorer, monkeypatch):
    before = scorer.key(MIXED, SELECTION)
    replace(monkeypatch, "FOLDS", 10)
    assert scorer.key(MIXED, SELECTION) != before


def test_key_of_final_scores_depends_on_the_final_precision_alone(scorer):
    before = [scorer.key(MIXED, seeds) for seeds in (SELECTION, FINAL)]
    scorer.final_precision = "bf16"
    after = [scorer.key(MIXED, seeds) for seeds in (SELECTION, FINAL)]
    assert after[0] == before[0] and after[1] != before[1]


def test_keys_tell_judges_and_references_apart(judged):
    sets = (SELECTION, FINAL)
    keys = {judged.key(BEST, *both) for both in itertools.product(sets, judged.judges)}
    assert len(keys) == 4
    assert judged.key(BEST, FINAL) == judged.key(BEST, FINAL, judged.judges[0])


def test_networks_of_the_key_are_those_of_the_merger(scorer):
    base, aux = toy_pair()
    hashes = neon.keys.weights_hash(base), neon.keys.weights_hash(aux)
    assert (scorer.merger.base_hash, scorer.merger.aux_hash) == hashes


# -------------------- partitions of the same networks


def of_layers(scorer):
    return scorer.of(scorer.merger.with_blocks(lambda name: name.rsplit(".", 1)[0]))


def test_two_partitions_of_one_network_share_a_score(scorer, monkeypatch):
    score = scorer.score(MIXED)
    layers = of_layers(scorer)
    w = {block: MIXED[block[:3]] for block in layers.merger.blocks}
    seen = sampled(scorer, monkeypatch)
    assert layers.score(w) == dataclasses.replace(score, w=w) and not seen


def test_another_partition_scores_its_own_networks(scorer):
    layers = of_layers(scorer)
    w = dict.fromkeys(layers.merger.blocks, 0.0) | {"dec.1": 1.5}
    found = layers.score(w)
    assert found.w == w and found.fd != scorer.score(0).fd
    assert found.fd != scorer.score(weights(0, 0, 1.5)).fd


def test_scorer_of_other_blocks_leaves_the_first_alone(scorer):
    before = scorer.score(BEST)
    of_layers(scorer).score(0.25)
    assert scorer.merger.blocks == ["enc", "mid", "dec"]
    assert toy_scorer(scorer.log.folder.with_name("fresh")).score(BEST).fd == before.fd


# -------------------- the log


@pytest.mark.parametrize(
    "seeds, name",
    [
        (SELECTION, "grid.jsonl"),
        (SeedSet("search", 10_000_000, 100), "grid.jsonl"),
        (FINAL, "final.jsonl"),
        (SeedSet("final 2", 60_000, 100), "final.jsonl"),
    ],
    ids=["selection", "search", "final", "second final"],
)
def test_file_of_a_score(scorer, tmp_path, seeds, name):
    scorer.score(BASE, seeds)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == [name]


@pytest.mark.parametrize("seeds", [SELECTION, FINAL], ids=["selection", "final"])
def test_finished_score_is_read_back_and_not_taken_again(tmp_path, monkeypatch, seeds):
    score = toy_scorer(tmp_path).score(BEST, seeds)
    again = toy_scorer(tmp_path)
    seen = sampled(again, monkeypatch)
    assert again.score(dict(BEST), seeds) == score and not seen


def test_log_without_a_folder_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    disk = toy_scorer(tmp_path / "disk")
    scorer = Scorer(disk.sampler, disk.merger, disk.judges, seeds=disk.seeds)
    score = scorer.score(BEST)
    seen = sampled(scorer, monkeypatch)
    assert scorer.score(BEST) == score and not seen
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def nameless(scorer, log):
    """A scorer of a model that does not say what decides its images."""
    scorer.sampler.model.identity = ""
    return Scorer(scorer.sampler, scorer.merger, scorer.judges, log, scorer.seeds)


def test_scores_of_a_model_without_identity_are_kept_on_no_disk(scorer):
    with pytest.raises(UserError, match="identity=") as caught:
        nameless(scorer, scorer.log)
    assert "\n" not in str(caught.value)


def test_scores_of_a_model_without_identity_are_kept_in_memory(scorer):
    assert nameless(scorer, None).score(BEST).fd == scorer.score(BEST).fd


def two_lines(folder):
    log = ScoreLog(folder)
    for fd in (2.5, 1.5):
        log.add(score_of(fd, w=weights(fd, 0, 0), key=f"key {fd}"), SELECTION)
    return folder / "grid.jsonl"


def test_lines_are_strict_json_in_the_order_of_the_scores(tmp_path):
    lines = two_lines(tmp_path).read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["fd"] for row in rows] == [2.5, 1.5]
    assert set(rows[0]) == {field.name for field in dataclasses.fields(Score)}


def test_score_is_found_by_its_key_with_the_weights_asked_for(tmp_path):
    two_lines(tmp_path)
    log = ScoreLog(tmp_path)
    assert log.find("key 2.5", {"a": 2.5}) == score_of(2.5, w={"a": 2.5}, key="key 2.5")
    assert log.find("key 3.5", {"a": 3.5}) is None


def test_last_line_of_a_key_counts(tmp_path):
    log = ScoreLog(tmp_path)
    for precision in (None, 0.5):
        log.add(score_of(1.0, precision=precision, recall=precision), SELECTION)
    assert ScoreLog(tmp_path).find("key", BASE).precision == 0.5


DAMAGES = {
    "NaN": ('"fd": 1.5', '"fd": NaN'),
    "text": ('"fd": 1.5', '"fd": "1.5"'),
    "negative": ('"fd": 1.5', '"fd": -1.5'),
    "missing": ('"fd": 1.5, ', ""),
    "more": ('"fd": 1.5', '"fd": 1.5, "more": 1'),
    "19 folds": ('"folds": [1.5, ', '"folds": ['),
    "text in folds": ('"folds": [1.5, ', '"folds": ["x", '),
    "text in w": ('"enc": 1.5', '"enc": "x"'),
    "no weights": ('"w": {', '"w": 3, "v": {'),
    "no recall": ('"precision": null', '"precision": 0.5'),
    "text in kernel": ('"kernel": null', '"kernel": "x"'),
    "a real fold": ('"real_folds": null', '"real_folds": [1.5]'),
    "no object": ("{", ""),
    "a list": (..., "[1, 2]"),
    "empty": (..., ""),
    "nested": (..., "[" * 100_000),
    "other characters": (..., "\ufffe"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_line_is_refused_by_number(tmp_path, name):
    path, (old, new) = two_lines(tmp_path), DAMAGES[name]
    first, second = path.read_text().splitlines()
    damaged = new if old is ... else second.replace(old, new, 1)
    assert damaged != second
    path.write_text(f"{first}\n{damaged}\n")
    with pytest.raises(UserError, match="grid.jsonl, line 2, is damaged") as caught:
        ScoreLog(tmp_path)
    assert "\n" not in str(caught.value)


def test_line_that_is_no_text_is_refused(tmp_path):
    path = two_lines(tmp_path)
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n")
    with pytest.raises(UserError, match="line 3, is damaged"):
        ScoreLog(tmp_path)


def test_rounding_below_zero_is_no_damage(tmp_path):
    ScoreLog(tmp_path).add(score_of(-1e-4), SELECTION)
    assert ScoreLog(tmp_path).find("key", BASE).fd == -1e-4


@pytest.mark.parametrize("length", [1, 50, None], ids=["a byte", "a part", "all but the line end"])
def test_tail_that_was_cut_off_is_scored_again(tmp_path, length):
    path = two_lines(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[0][:length])
    log = ScoreLog(tmp_path)
    assert len(log.scores) == 2
    log.add(score_of(3.5, key="key 3.5"), SELECTION)
    assert path.read_bytes().startswith(whole)
    assert [json.loads(line)["fd"] for line in path.read_text().splitlines()] == [2.5, 1.5, 3.5]


def test_two_writers_keep_their_lines_apart(tmp_path):
    def write(number):
        log = ScoreLog(tmp_path)
        for i in range(40):
            log.add(score_of(1.0 + i, key=f"{number} {i}"), FINAL)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ScoreLog(tmp_path).scores) == 120


# -------------------- two ranks


def test_ranks_score_as_one_process_does(ranks, tmp_path):
    scorers = [toy_scorer(tmp_path / f"rank {rank}") for rank in (0, 1)]

    def share(processes):
        scorer = scorers[processes.rank]
        scorer.sampler.processes = processes
        return [scorer.score(w, shares=True).fd for w in (BEST, BASE, BEST)]

    one, other = ranks(share)
    alone = toy_scorer(tmp_path / "alone")
    want = [alone.score(w).fd for w in (BEST, BASE, BEST)]
    assert one == other == pytest.approx(want, rel=1e-6)
    lines = (tmp_path / "rank 0" / "grid.jsonl").read_text().splitlines()
    assert len(lines) == 2 and not (tmp_path / "rank 1" / "grid.jsonl").exists()


def test_ranks_diverge_together(ranks, tmp_path, capsys):
    """Where one of them has no finite images."""
    scorers = [toy_scorer(tmp_path / f"rank {rank}") for rank in (0, 1)]

    def share(processes):
        scorer = scorers[processes.rank]
        scorer.sampler.processes = processes
        if processes.rank == 1:
            scorer.sampler.model.sample = lambda net, noise, *_: noise * math.nan
        return scorer.score(BEST).fd

    assert ranks(share) == [math.inf, math.inf]
    assert capsys.readouterr().out.count("diverges") == 1


# -------------------- the extrapolated network is the resident one


def test_sampler_and_merger_share_one_network(scorer):
    assert scorer.merger.net is scorer.sampler.net


def test_two_scorers_of_one_sampler_do_not_disturb_each_other(tmp_path):
    """As those of two snapshots do: the later one takes the network over."""
    first = toy_scorer(tmp_path)
    base, aux = toy_pair()
    nearer = ToyModel().trainable(base, None)
    with torch.no_grad():
        for ours, theirs in zip(nearer.parameters(), aux.parameters(), strict=True):
            ours.lerp_(theirs, 0.5)
    merger = neon.blocks.Merger(base, nearer, lambda name: name[:3])
    second = Scorer(first.sampler, merger, first.judges, first.log, first.seeds)
    found = second.score(1)
    want = toy_distance(first, weights(1, 1, 1), SELECTION.seeds)
    assert first.score(1).fd == pytest.approx(want, rel=1e-6) and found.fd != first.score(1).fd
    assert second.merger.net is first.sampler.net
