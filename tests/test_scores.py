"""What adaptive_neon/scores.py promises."""

import dataclasses
import fcntl
import json
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from edm_helpers import (
    BEST,
    ToyFeatures,
    judge_of,
    replace,
    score_of,
    toy_distance,
    toy_images,
    toy_scorer,
    weights,
)

import adaptive_neon as neon
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
    scorer.judge = judge_of(scorer.judge.features, reference, scorer.judge.final)


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
    return neon.judges.reference_of_images(real, ToyFeatures(), "cpu", "")


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
    reference = neon.judges.reference_of_images(real, ToyFeatures(), "cpu", "")
    again.judge = judge_of(ToyFeatures(), reference)
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


# -------------------- real images in three parts


def random_images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 1, 4, 4), generator=generator).to(torch.uint8)


# -------------------- references


class Flat:
    """Features: the first pixels themselves."""

    dim, name, kind, score, identity = 4, "flat", "flat", "FD (flat)", "flat"

    def __call__(self, images):
        return images.flatten(1)[:, :4].float()

    def to(self, device):
        return self


@pytest.fixture
def real():
    return neon.images.split_by_content(random_images(800), None, "x.zip")


# -------------------- kernel distance


def naive_kernel_distance(real, fake):
    def kernel(x, y):
        return (x.double() @ y.double().T / x.shape[1] + 1) ** 3

    n, m = len(fake), len(real)
    fakes, reals = kernel(fake, fake), kernel(real, real)
    fakes = (fakes.sum() - fakes.trace()) / (n * (n - 1))
    reals = (reals.sum() - reals.trace()) / (m * (m - 1))
    return float(fakes + reals - 2 * kernel(fake, real).mean())


# -------------------- one sampling for all judges


class FakeSampler:
    """Images are their seeds; counts the batches it is asked for."""

    def __init__(self):
        self.steps, self.batch, self.calls = 1, 50, 0
        self.labels = "balanced"
        self.model = SimpleNamespace(identity="m")
        self.processes = neon.processes.Processes("cpu")

    def images(self, part):
        self.calls += 1
        generator = torch.Generator().manual_seed(int(part[0]))
        shape = (len(part), 1, 4, 4)
        return torch.randint(256, shape, generator=generator).to(torch.uint8), None


class FakeMerger:
    blocks, owners = ["a"], {"p": "a"}

    def set(self, w):
        return torch.nn.Linear(1, 1)


class Other(Flat):
    name = kind = "other"
    identity = "other"

    def __call__(self, images):
        return images.flatten(1)[:, 8:12].float() / 2


@pytest.fixture
def judged(real, tmp_path):
    judges = [neon.judges.Judge(features, real) for features in (Flat(), Other())]
    config = neon.config.Config(device="cpu", precision="fp32")
    log = neon.scores.ScoreLog(tmp_path)
    return neon.scores.Scorer(FakeMerger(), judges, FakeSampler(), log, {}, 1, config)


FINAL = neon.scores.SeedSet("final 1", 1000, 100)


def test_all_judges_score_the_same_images(judged):
    scores = judged.scores({"a": 1.0}, FINAL, judged.judges)
    assert judged.sampler.calls == 2  # 100 images in batches of 50, once
    assert [s.judge for s in scores] == ["flat", "other"]
    images = torch.cat(
        [judged.sampler.images(range(start, start + 50))[0] for start in (1000, 1050)]
    )
    for judge, found in zip(judged.judges, scores, strict=True):
        features = judge.features(images)
        moments = neon_ext.feature_moments(features)
        assert found.fd == pytest.approx(float(judge.final.prepared.distance(*moments)))
        real = judge.final.real
        assert found.kernel == pytest.approx(naive_kernel_distance(real, features), rel=1e-6)
        assert (found.precision, found.recall) == neon.judges.precision_recall(real, features)


def test_finished_judges_are_read_back_and_only_a_new_one_is_scored(judged):
    first = judged.score({"a": 1.0}, FINAL)
    assert judged.sampler.calls == 2
    both = judged.scores({"a": 1.0}, FINAL, judged.judges)
    assert judged.sampler.calls == 4 and both[0] == first
    log = neon.scores.ScoreLog(judged.log.folder)
    judged.log = log
    assert judged.scores({"a": 1.0}, FINAL, judged.judges) == both
    assert judged.sampler.calls == 4
    lines = (judged.log.folder / "final.jsonl").read_text().splitlines()
    assert [json.loads(line)["judge"] for line in lines] == ["flat", "other"]


def test_keys_tell_judges_and_references_apart(judged):
    selection = neon.scores.SeedSet("selection", 0, 100)
    keys = {judged.key(s, j) for s in (selection, FINAL) for j in judged.judges}
    assert len(keys) == 4
    assert judged.key(FINAL) == judged.key(FINAL, judged.judges[0])


def test_selection_scores_have_no_kernel_distance_and_one_judge(judged):
    found = judged.score({"a": 1.0}, neon.scores.SeedSet("selection", 0, 100))
    assert found.kernel is None and found.judge == "flat" and found.precision is not None


def test_diverging_sampler_is_infinite_in_every_judge(judged, capsys):
    def diverge(part):
        raise neon.processes.Diverged

    judged.sampler.images = diverge
    scores = judged.scores({"a": 1.0}, FINAL, judged.judges)
    assert [s.fd for s in scores] == [math.inf] * 2
    assert [s.kernel for s in scores] == [None] * 2
    assert (
        neon.scores.ScoreLog(judged.log.folder).find(scores[1].key, {"a": 1.0}, FINAL) == scores[1]
    )
    assert capsys.readouterr().out.count("diverges") == 1


def test_logs_from_before_the_judges_are_read():
    row = json.loads(score(1.0).as_line())
    for name in ("judge", "kernel", "kernel_folds"):
        del row[name]
    assert neon.scores.Score.from_line(json.dumps(row)).fd == 1.0


@pytest.mark.parametrize("change", [{"kernel": "x"}, {"kernel": 1.0, "kernel_folds": ["x"]}])
def test_damaged_kernel_distances_are_refused(change):
    row = json.loads(score(1.0).as_line()) | change
    with pytest.raises((ValueError, TypeError)):
        neon.scores.Score.from_line(json.dumps(row))
