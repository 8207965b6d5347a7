"""edm_neon.py: glyphs, real images in three parts, judges that no selection saw, training seeds."""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import scipy.stats
import torch
from edm_helpers import parse, replace

import adaptive_neon as neon
import edm_neon as edm
import neon_ext

CIFAR = edm.PRESETS["cifar10"]
CPU = neon.processes.Processes("cpu")
EXAMPLES = Path(edm.__file__).parent / "examples"


def hashes(images):
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images.numpy()]


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


# ---------------------------------------------------------------- glyphs
def test_glyph_of_an_index_does_not_depend_on_how_many_are_drawn():
    many, labels = neon.glyphs.draw_glyphs(2100, 1)  # more than one part of the rendering
    few, few_labels = neon.glyphs.draw_glyphs(9, 1)
    assert torch.equal(few, many[:9]) and torch.equal(few_labels, labels[:9])


def test_glyph_streams_share_no_image():
    streams = edm.Glyphs.streams
    assert len(set(streams.values())) == len(streams)
    drawn = [hashes(neon.glyphs.draw_glyphs(500, stream)[0]) for stream in streams.values()]
    together = sum(drawn, [])
    assert len(set(together)) == len(together)


def test_glyphs_are_bright_strokes_on_black_and_every_digit_occurs():
    images, labels = neon.glyphs.draw_glyphs(1000, 0)
    assert images.shape == (1000, 1, 12, 12) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(10))
    assert (images.amax((1, 2, 3)) > 80).all()
    assert images[:, :, 0, 0].float().mean() < 5


def test_every_font_is_used():
    atlas = neon.glyphs.glyph_atlas()
    assert atlas.shape[:2] == (len(neon.glyphs.GLYPH_FONTS), 10)
    assert (atlas.amax((2, 3)) > 0.99).all()
    assert len({row.numpy().tobytes() for row in atlas}) == len(neon.glyphs.GLYPH_FONTS)


def test_missing_font_is_one_line(monkeypatch):
    replace(monkeypatch, "GLYPH_FONTS", ("NoSuchFont.ttf",))
    with pytest.raises(neon.files.UserError, match="NoSuchFont.ttf is missing or damaged"):
        neon.glyphs.glyph_atlas.__wrapped__()


def classifier(folder, body=neon.glyphs.glyphs_cnn, **changes):
    options = {"seed": 0, "stream": 3, "images": 300, "epochs": 1} | changes
    folder.mkdir(exist_ok=True)
    return neon.glyphs.GlyphsClassifier(
        folder, "x", body, streams={"classifier test": 4}, **options
    )


def test_classifier_reads_fresh_glyphs_and_is_the_same_every_time(tmp_path):
    state = torch.random.get_rng_state()
    first, again = (classifier(tmp_path / name, images=2000, epochs=4) for name in ("a", "b"))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.identity == again.identity
    assert first.facts["accuracy"] > 0.8 and first.facts["accuracy_images"] == 2000


@pytest.mark.parametrize("body", [neon.glyphs.glyphs_cnn, neon.glyphs.glyphs_mlp])
def test_features_of_classifiers_are_in_front_of_the_last_layer(tmp_path, body):
    network, images = classifier(tmp_path, body), neon.glyphs.draw_glyphs(5, 0)[0]
    assert network(images).shape == (5, 64) and network.head.in_features == 64
    assert torch.equal(network(images), network.body(images.float() / 127.5 - 1))


def test_finished_classifier_is_read_back(tmp_path, monkeypatch):
    first = classifier(tmp_path)
    monkeypatch.setattr(neon.glyphs.GlyphsClassifier, "fit", pytest.fail)
    assert classifier(tmp_path).identity == first.identity


@pytest.mark.parametrize(
    "change",
    [{"body": neon.glyphs.glyphs_mlp}, {"seed": 1}, {"stream": 5}, {"images": 200}, {"epochs": 2}],
    ids=lambda change: next(iter(change)),
)
def test_another_classifier_has_another_file(tmp_path, change):
    first = classifier(tmp_path)
    other = classifier(tmp_path, **change)
    assert other.identity != first.identity and len([*tmp_path.glob("x-*.pt")]) == 2


def test_identity_of_a_classifier_holds_its_design(tmp_path, monkeypatch):
    """The same weights with another activation are other features."""

    def bounded():
        return neon.glyphs.glyphs_cnn()[:-1].append(torch.nn.Tanh())

    monkeypatch.setattr(neon.glyphs.GlyphsClassifier, "fit", lambda *args: None)
    assert classifier(tmp_path, bounded).identity != classifier(tmp_path).identity


def test_identity_of_random_convolutions_holds_their_design(monkeypatch):
    before = neon.features.RandomConvFeatures(3).identity
    assert (
        neon.features.RandomConvFeatures(3).identity
        == before
        != neon.features.RandomConvFeatures(1).identity
    )
    monkeypatch.setattr(torch.nn, "ReLU", torch.nn.Tanh)
    assert neon.features.RandomConvFeatures(3).identity != before


def test_glyphs_preset_parts_come_from_their_streams():
    real = edm.Glyphs().real_images(neon.config.Config(preset="glyphs"))
    for purpose, count in edm.Glyphs.images.items():
        part = getattr(real, purpose)
        assert len(part.images) == count
        expected, labels = neon.glyphs.draw_glyphs(3, edm.Glyphs.streams[purpose])
        assert torch.equal(part.images[:3], expected) and torch.equal(part.labels[:3], labels)


@pytest.mark.parametrize("option", ["data", "ref"])
def test_glyphs_preset_refuses_other_real_images(option):
    with pytest.raises(neon.files.UserError, match="draws its own"):
        edm.Glyphs().real_images(neon.config.Config(preset="glyphs", **{option: "x"}))


def test_streams_are_in_the_ledger():
    ledger = neon.study.seed_ledger(neon.config.Config(preset="glyphs"))
    assert ledger.as_json()["real_streams"] == edm.Glyphs.streams
    assert "real_streams" not in neon.study.seed_ledger(neon.config.Config()).as_json()


# ---------------------------------------------------------------- real images in three parts
def random_images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 1, 4, 4), generator=generator).to(torch.uint8)


def test_split_is_disjoint_and_complete_and_labels_follow():
    images, labels = random_images(800), torch.arange(800)
    real = neon.images.split_by_content(images, labels, "x.zip")
    parts = [real.training, real.selection, real.final]
    together = torch.cat([part.labels for part in parts])
    assert sorted(together.tolist()) == list(range(800))
    for part in parts:
        assert torch.equal(part.images, images[part.labels])
    sizes = [len(part.images) for part in parts]
    assert sizes[0] == pytest.approx(400, abs=60) and sizes[1] == pytest.approx(200, abs=50)


def test_split_does_not_move_when_images_come_go_or_change_places():
    images = random_images(800)
    real = neon.images.split_by_content(images, None, "x")
    order = torch.randperm(800)[:600]
    again = neon.images.split_by_content(images[order], None, "x")
    for purpose in ("training", "selection", "final"):
        before, after = (set(hashes(getattr(r, purpose).images)) for r in (real, again))
        assert after <= before


def test_copies_stay_in_one_part():
    images = random_images(600).repeat(2, 1, 1, 1)
    real = neon.images.split_by_content(images, None, "x")
    sets = [set(hashes(getattr(real, p).images)) for p in ("training", "selection", "final")]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


def test_too_few_images_are_refused():
    with pytest.raises(
        neon.files.UserError, match=r"x.zip: \d+ of its 100 images .* give more images"
    ):
        neon.images.split_by_content(random_images(100), None, "x.zip")


@pytest.mark.parametrize("base, unknown", [("", False), ("x.pkl", True)])
def test_origin_says_whether_the_base_may_have_seen_the_images(tmp_path, base, unknown):
    neon.images.write_dataset(tmp_path / "x.zip", random_images(800), None)
    config = neon.config.Config(data=str(tmp_path / "x.zip"), base=base, train_base=1.0)
    assert ("unknown" in edm.Cifar10().real_images(config).origin) == unknown


# ---------------------------------------------------------------- references
class Flat:
    """Features: the first pixels themselves."""

    dim, name, kind, score, identity = 4, "flat", "flat", "FD (flat)", "flat"

    def __call__(self, images):
        return images.flatten(1)[:, :4].float()


@pytest.fixture
def real():
    return neon.images.split_by_content(random_images(800), None, "x.zip")


def test_selection_and_final_scores_have_their_own_reference(real, tmp_path):
    judge = neon.judges.judge_of_images(Flat(), real, "cpu", tmp_path)
    selection, final = (
        neon.scores.SeedSet("selection", 0, 40),
        neon.scores.SeedSet("final 1", 50, 40),
    )
    fresh = neon.search.search_seeds(40)
    assert judge.reference(selection) is judge.selection is judge.reference(fresh)
    assert judge.reference(final) is judge.final
    assert torch.equal(judge.selection.real, Flat()(real.selection.images))
    assert torch.equal(judge.final.real, Flat()(real.final.images))
    assert judge.identity(selection) != judge.identity(final)
    with np.load(tmp_path / "reference-final.npz") as file:
        np.testing.assert_allclose(file["mu"], judge.final.real.double().mean(0))
        assert file["images"] == len(real.final.images)


def test_floor_is_the_final_score_of_real_images(real):
    judge = neon.judges.judge_of_images(Flat(), real, "cpu")
    few = judge.selection.real[:50]
    moments = (*neon_ext.feature_moments(few), *neon_ext.feature_moments(judge.final.real))
    expected = float(neon_ext.frechet_distance(*moments))
    assert judge.floor(50) == {"images": 50, "fd": pytest.approx(expected)}


def statistics_file(tmp_path, images):
    mean, cov = neon_ext.feature_moments(Flat()(images))
    np.savez(tmp_path / "ref.npz", mu=mean, sigma=cov, images=len(images), features="flat")
    return str(tmp_path / "ref.npz")


def test_statistics_of_a_file_are_said_to_be_of_unknown_origin(tmp_path):
    path = statistics_file(tmp_path, random_images(300, 5))
    judge = neon.judges.judge_of_file(Flat(), None, path, "", neon.config.Config(device="cpu"))
    assert judge.selection is judge.final and judge.final.real is None
    assert "unknown origin" in judge.facts["origin"] and "selection" not in judge.facts


def test_file_gives_the_distance_and_data_the_images(real, tmp_path):
    images = random_images(300, 5)
    path = statistics_file(tmp_path, images)
    judge = neon.judges.judge_of_file(Flat(), real, path, "", neon.config.Config(device="cpu"))
    moments = neon_ext.feature_moments(Flat()(images))
    assert float(judge.final.prepared.distance(*moments)) == pytest.approx(0, abs=1e-6)
    assert torch.equal(judge.final.real, Flat()(real.final.images))
    assert torch.equal(judge.selection.real, Flat()(real.selection.images))


def test_precision_and_recall_with_radii_of_before():
    real, fake = torch.randn(300, 3), torch.randn(200, 3) * 0.7
    radii = neon.judges.neighbour_radii(real)
    assert neon.judges.precision_recall(
        real, fake, real_radii=radii
    ) == neon.judges.precision_recall(real, fake)
    distances = torch.cdist(real.double(), real.double()).sort(1).values
    torch.testing.assert_close(radii, distances[:, 5])


# ---------------------------------------------------------------- kernel distance
def reference_with(real):
    return neon.judges.Reference(None, real, {}, "")


def naive_kernel_distance(real, fake):
    def kernel(x, y):
        return (x.double() @ y.double().T / x.shape[1] + 1) ** 3

    n, m = len(fake), len(real)
    fakes, reals = kernel(fake, fake), kernel(real, real)
    fakes = (fakes.sum() - fakes.trace()) / (n * (n - 1))
    reals = (reals.sum() - reals.trace()) / (m * (m - 1))
    return float(fakes + reals - 2 * kernel(fake, real).mean())


def test_kernel_distance_is_the_unbiased_estimate_and_its_folds_leave_one_out():
    torch.manual_seed(0)
    real, fake = torch.randn(130, 5), torch.randn(90, 5) * 1.3 + 0.2
    value, folds = neon.judges.kernel_distance(reference_with(real), fake)
    assert value == pytest.approx(naive_kernel_distance(real, fake), rel=1e-9)
    parts = fake.tensor_split(neon.stats.FOLDS)
    for k in (0, 7, neon.stats.FOLDS - 1):
        rest = torch.cat([part for j, part in enumerate(parts) if j != k])
        assert folds[k] == pytest.approx(naive_kernel_distance(real, rest), rel=1e-9)


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    torch.manual_seed(0)
    values = [
        neon.judges.kernel_distance(reference_with(torch.randn(60, 4)), torch.randn(60, 4))[0]
        for _ in range(200)
    ]
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 4 * error  # the biased estimate is 13 errors away


def test_kernel_interval_is_the_jackknife_of_its_folds():
    rng = np.random.default_rng(0)
    folds = rng.standard_normal((2, neon.stats.FOLDS))
    scores = [score(1.0, kernel=float(k), kernel_folds=list(f)) for k, f in enumerate(folds)]
    half, _ = neon.stats.jackknife(0.5, folds)
    found = neon.stats.kernel_interval(scores)
    assert found == {"value": 0.5, "low": 0.5 - half, "high": 0.5 + half} and half > 0


# ---------------------------------------------------------------- differences, corrections
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
    for claim in neon.study.claims_of(finals):
        if (claim.model, claim.against) == (model, against):
            return claim
    raise AssertionError(f"no claim {model} against {against}")


def test_claims_count_only_judges_that_no_selection_saw():
    claim = claim_of(finals_of({"own": -9, "a": -9, "b": 9, "c": 0}), "blockwise", "global")
    assert claim.better == ["a"] and claim.worse == ["b"]
    assert claim.own["verdict"] == "better" and set(claim.judges) == {"a", "b", "c"}
    assert "of 3 judges that no selection saw, better in 1 and worse in 1" in claim.sentence()


def test_claims_compare_random_blocks_on_both_sides():
    found = [(claim.model, claim.against) for claim in neon.study.claims_of(finals_of({"own": -9}))]
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


# ---------------------------------------------------------------- one sampling for all judges
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
def scorer(real, tmp_path):
    judges = [neon.judges.judge_of_images(features, real, "cpu") for features in (Flat(), Other())]
    config = neon.config.Config(device="cpu", precision="fp32")
    log = neon.scores.ScoreLog(tmp_path)
    return neon.scores.Scorer(FakeMerger(), judges, FakeSampler(), log, {}, 1, config)


FINAL = neon.scores.SeedSet("final 1", 1000, 100)


def test_all_judges_score_the_same_images(scorer):
    scores = scorer.scores({"a": 1.0}, FINAL, scorer.judges)
    assert scorer.sampler.calls == 2  # 100 images in batches of 50, once
    assert [s.judge for s in scores] == ["flat", "other"]
    images = torch.cat(
        [scorer.sampler.images(range(start, start + 50))[0] for start in (1000, 1050)]
    )
    for judge, found in zip(scorer.judges, scores, strict=True):
        features = judge.features(images)
        moments = neon_ext.feature_moments(features)
        assert found.fd == pytest.approx(float(judge.final.prepared.distance(*moments)))
        real = judge.final.real
        assert found.kernel == pytest.approx(naive_kernel_distance(real, features), rel=1e-6)
        assert (found.precision, found.recall) == neon.judges.precision_recall(real, features)


def test_finished_judges_are_read_back_and_only_a_new_one_is_scored(scorer):
    first = scorer.score({"a": 1.0}, FINAL)
    assert scorer.sampler.calls == 2
    both = scorer.scores({"a": 1.0}, FINAL, scorer.judges)
    assert scorer.sampler.calls == 4 and both[0] == first
    log = neon.scores.ScoreLog(scorer.log.folder)
    scorer.log = log
    assert scorer.scores({"a": 1.0}, FINAL, scorer.judges) == both
    assert scorer.sampler.calls == 4
    lines = (scorer.log.folder / "final.jsonl").read_text().splitlines()
    assert [json.loads(line)["judge"] for line in lines] == ["flat", "other"]


def test_keys_tell_judges_and_references_apart(scorer):
    selection = neon.scores.SeedSet("selection", 0, 100)
    keys = {scorer.key(s, j) for s in (selection, FINAL) for j in scorer.judges}
    assert len(keys) == 4
    assert scorer.key(FINAL) == scorer.key(FINAL, scorer.judges[0])


def test_selection_scores_have_no_kernel_distance_and_one_judge(scorer):
    found = scorer.score({"a": 1.0}, neon.scores.SeedSet("selection", 0, 100))
    assert found.kernel is None and found.judge == "flat" and found.precision is not None


def test_diverging_sampler_is_infinite_in_every_judge(scorer, capsys):
    def diverge(part):
        raise neon.processes.Diverged

    scorer.sampler.images = diverge
    scores = scorer.scores({"a": 1.0}, FINAL, scorer.judges)
    assert [s.fd for s in scores] == [math.inf] * 2
    assert [s.kernel for s in scores] == [None] * 2
    assert (
        neon.scores.ScoreLog(scorer.log.folder).find(scores[1].key, {"a": 1.0}, FINAL) == scores[1]
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


# ---------------------------------------------------------------- the judges themselves
def test_random_convolutions_are_always_the_same():
    state = torch.random.get_rng_state()
    first = neon.features.RandomConvFeatures(3)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert neon.features.RandomConvFeatures(3).identity == first.identity
    found = first(torch.randint(256, (2, 3, 9, 11)).to(torch.uint8))
    assert found.shape == (2, first.dim) and found.std() > 0


def test_pixels_are_the_leading_components():
    images = neon.glyphs.draw_glyphs(500, 0)[0]
    features = neon.features.PixelFeatures(images)
    cov = np.cov(features(images).double().T)
    assert features.dim == 32 and np.allclose(cov, np.diag(np.diag(cov)), atol=1e-3)
    x = (images.flatten(1).double() / 127.5 - 1).numpy()
    largest = np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1]
    np.testing.assert_allclose(np.sort(np.diag(cov))[::-1], largest[:32], rtol=1e-3)


def test_pixels_of_small_and_large_images():
    small = torch.randint(256, (60, 1, 4, 4)).to(torch.uint8)
    assert neon.features.PixelFeatures(small).dim == 16
    large = torch.randint(256, (40, 3, 64, 48)).to(torch.uint8)
    assert neon.features.PixelFeatures(large)(large).shape == (40, 32)


def judge_file(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


def test_judge_of_a_file(real, tmp_path):
    path = judge_file(tmp_path, "def features(x):\n    return x.flatten(1)[:, :3].float()\n")
    config = neon.config.Config(device="cpu", judge=(path,))
    features = neon.study.judge_features(path, config, CIFAR, real)
    assert (features.name, features.dim) == ("mine-3", 3)
    assert features.identity == neon.files.file_hash(Path(path))
    assert torch.equal(features(real.final.images), real.final.images.flatten(1)[:, :3].float())


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "--judge .*mine.py is no file"),
        ("x = 1", "lacks features"),
        ("def features(:", "--judge .* cannot be imported: line 1"),
    ],
    ids=["missing", "no features", "syntax"],
)
def test_judge_files_are_checked_before_anything_is_trained(real, tmp_path, text, message):
    path = str(tmp_path / "mine.py") if text is None else judge_file(tmp_path, text)
    with pytest.raises(neon.files.UserError, match=message):
        neon.study.check_judges(neon.config.Config(judge=("pixels", path)), CIFAR, real)


FEATURES_THAT_CHANGE = {
    "fewer rows": "return x.flatten(1)[: 6 if len(x) == 7 else None, :3].float()",
    "one row squeezed": "return x.flatten(1)[:, :3].float().squeeze(0)",
    "other columns": "return x.flatten(1)[:, : 2 if len(x) == 7 else 3].float()",
    "elsewhere": "return x.flatten(1)[:, :3].float().to('meta' if len(x) == 7 else 'cpu')",
}


@pytest.mark.parametrize("text", FEATURES_THAT_CHANGE.values(), ids=FEATURES_THAT_CHANGE)
def test_features_of_a_file_keep_their_shape_and_place(real, tmp_path, text):
    path = judge_file(tmp_path, f"def features(x):\n    {text}\n")
    features = neon.study.judge_features(path, neon.config.Config(device="cpu"), CIFAR, real)
    count = 1 if "squeeze" in text else 7
    with pytest.raises(neon.files.UserError, match=rf"features\(\) of {count} images on cpu gave"):
        features(real.final.images[:count])


def test_features_of_a_file_that_are_not_finite_are_refused(real, tmp_path):
    path = judge_file(tmp_path, "def features(x):\n    return x.flatten(1)[:, :3].float().log()\n")
    real.training.images[:4] = 7
    features = neon.study.judge_features(path, neon.config.Config(device="cpu"), CIFAR, real)
    with pytest.raises(neon.files.UserError, match="not finite for some images"):
        features(torch.zeros(5, 1, 4, 4))


BROKEN_GRADIENTS = {
    "detached": "return x.detach().flatten(1)[:, :3].float()",
    "rounded": "return x.to(torch.uint8).flatten(1)[:, :3].float()",
    "flat": "return x.flatten(1)[:, :3].float().sign() + 0 * x.flatten(1)[:, :3]",
    "infinite": "return x.flatten(1)[:, :3].float() + (x - x).float().sqrt().flatten(1)[:, :3]",
}


def selecting_with(body, real, tmp_path, search):
    path = judge_file(tmp_path, f"import torch\n\n\ndef features(x):\n    {body}\n")
    config = neon.config.Config(device="cpu", out=tmp_path, select_with=(path,), search=search)
    model = SimpleNamespace(own_features=lambda base: FlatModule())
    return neon.study.get_judges(config, CIFAR, model, None, real, CPU)


@pytest.mark.parametrize("body", BROKEN_GRADIENTS.values(), ids=BROKEN_GRADIENTS)
def test_gradient_search_needs_the_gradient_of_every_joined_network(real, tmp_path, body):
    """Joined with others, a network without gradient would be left out in silence."""
    with pytest.raises(neon.files.UserError, match="no gradient comes through the features mine-3"):
        selecting_with(body, real, tmp_path, "gradient")


@pytest.mark.parametrize("body", BROKEN_GRADIENTS.values(), ids=BROKEN_GRADIENTS)
def test_other_searches_need_no_gradient(real, tmp_path, body):
    assert len(selecting_with(body, real, tmp_path, "cobyqa")) == 3


def test_gradient_search_takes_a_sound_network(real, tmp_path):
    body = "return x.flatten(1)[:, :3].float()"
    assert len(selecting_with(body, real, tmp_path, "gradient")) == 3


def test_files_to_select_with_are_checked_before_anything_is_trained(real, tmp_path):
    path = judge_file(tmp_path, "x = 1")
    with pytest.raises(neon.files.UserError, match="^--select-with .*mine.py lacks features"):
        neon.study.check_judges(neon.config.Config(select_with=("pixels", path)), CIFAR, real)


def test_selecting_with_needs_real_images(real):
    with pytest.raises(neon.files.UserError, match="--select-with pixels .* give --data"):
        neon.study.check_judges(neon.config.Config(select_with=("pixels",)), CIFAR, None)
    with pytest.raises(
        neon.files.UserError, match="--select-with needs real images.* leave --ref out"
    ):
        neon.study.check_judges(
            neon.config.Config(select_with=("pixels",), ref="x.npz"), CIFAR, real
        )
    neon.study.check_judges(neon.config.Config(ref="x.npz", judge=("pixels",)), CIFAR, real)


def test_judges_need_real_images(real):
    with pytest.raises(neon.files.UserError, match="--judge pixels .* give --data"):
        neon.study.check_judges(neon.config.Config(judge=("pixels",)), CIFAR, None)
    neon.study.check_judges(neon.config.Config(judge=("none",)), CIFAR, None)
    neon.study.check_judges(neon.config.Config(judge=()), CIFAR, None)
    with pytest.raises(neon.files.UserError, match="--judge mlp is no file"):
        neon.study.check_judges(neon.config.Config(judge=("mlp",)), CIFAR, real)


def test_judge_option_adds_up(tmp_path):
    out = ["--out", str(tmp_path)]
    assert parse(["--judge", "pixels", "--judge", "random-conv", *out]).judge == (
        "pixels",
        "random-conv",
    )
    assert parse(out).judge == ()
    assert parse(["--preset", "glyphs", *out]).judge == (
        "classifier-2",
        "mlp",
        "random-conv",
        "pixels",
    )
    assert neon.study.judge_names(parse(["--preset", "glyphs", "--judge", "none", *out])) == []


def test_pixels_are_fitted_on_the_training_part(real):
    found = neon.study.judge_features("pixels", neon.config.Config(), CIFAR, real)
    assert found.identity == neon.features.PixelFeatures(real.training.images).identity


def test_all_judges_in_order_with_their_references(real, tmp_path):
    config = neon.config.Config(
        device="cpu", out=tmp_path, judge=("random-conv", "pixels", "random-conv")
    )
    model = SimpleNamespace(own_features=lambda base: FlatModule())
    judges = neon.study.get_judges(config, CIFAR, model, None, real, CPU)
    assert [judge.name for judge in judges] == ["flat", "random-conv", "pixels"]
    assert all(len(judge.final.real) == len(real.final.images) for judge in judges)


def test_selection_with_more_features_joins_them_and_leaves_the_other_judges_unseen(real, tmp_path):
    config = neon.config.Config(
        device="cpu",
        out=tmp_path,
        judge=("pixels", "random-conv"),
        select_with=("pixels", "pixels"),
    )
    model = SimpleNamespace(own_features=lambda base: FlatModule())
    judges = neon.study.get_judges(config, CIFAR, model, None, real, CPU)
    assert [judge.name for judge in judges] == ["flat+pixels", "flat", "pixels", "random-conv"]
    assert [judge.is_part for judge in judges] == [False, True, True, False]
    images = real.final.images
    expected = neon.features.JointFeatures(
        [FlatModule(), neon.features.PixelFeatures(real.training.images)],
        real.training.images,
        "cpu",
    )(images)
    assert torch.equal(judges[0].final.real, expected)
    assert torch.equal(judges[0].selection.real, judges[0].features(real.selection.images))
    with np.load(tmp_path / "reference-final.npz") as file:
        assert str(file["features"]) == "flat+pixels"


def test_two_feature_networks_of_one_name_are_refused(real, tmp_path):
    model = SimpleNamespace(
        own_features=lambda base: neon.features.PixelFeatures(real.training.images)
    )
    for options in ({"judge": ("pixels",)}, {"select_with": ("pixels",)}):
        config = neon.config.Config(device="cpu", out=tmp_path, **options)
        with pytest.raises(neon.files.UserError, match="two feature networks named pixels"):
            neon.study.get_judges(config, CIFAR, model, None, real, CPU)
    assert not [*tmp_path.iterdir()]


def test_joint_features_stand_side_by_side_with_equal_variance(real):
    parts = [Flat(), neon.features.RandomConvFeatures(1)]
    images = real.training.images
    joint = neon.features.JointFeatures(parts, images, "cpu")
    found = joint(images)
    assert found.shape == (len(images), 68) and joint.dim == 68
    for part, side in zip(parts, found.split([4, 64], 1), strict=True):
        assert float(side.double().var(0).sum()) == pytest.approx(68 / 2)
        alone = part(images)
        assert torch.allclose(
            side / alone.norm(), alone / alone.norm() / alone.norm() * side.norm()
        )
    assert joint.name == "flat+random-conv" and joint.score == "FD (flat+random-conv, 68-d)"


def test_joint_features_have_the_gradients_of_their_parts(real):
    images = real.final.images[:3].float().requires_grad_()
    parts = [neon.features.PixelFeatures(real.training.images), neon.features.RandomConvFeatures(1)]
    joint = neon.features.JointFeatures(parts, real.training.images, "cpu")
    (found,) = torch.autograd.grad(joint(images).sum(), images)
    expected = 0
    for part, scale in zip(parts, joint.scales, strict=True):
        expected = expected + scale * torch.autograd.grad(part(images).sum(), images)[0]
    assert torch.allclose(found, expected, atol=1e-7) and found.abs().sum() > 0


def test_identity_of_joint_features_holds_parts_their_order_and_the_scaling_images(real):
    flat, other = Flat(), Other()
    images = real.training.images
    cases = [
        ([flat, other], images),
        ([other, flat], images),
        ([flat, neon.features.RandomConvFeatures(1)], images),
        ([flat, other], images[:-1]),
    ]
    found = [neon.features.JointFeatures(parts, some, "cpu").identity for parts, some in cases]
    assert len(set(found)) == len(found)
    assert neon.features.JointFeatures([flat, other], images.clone(), "cpu").identity == found[0]


def test_features_that_do_not_vary_cannot_be_joined():
    class Constant(Flat):
        name = "constant"

        def __call__(self, images):
            return torch.ones(len(images), 4)

    with pytest.raises(neon.files.UserError, match="constant are the same for all real images"):
        neon.features.JointFeatures([Flat(), Constant()], random_images(50), "cpu")


class FlatModule(Flat):
    def to(self, device):
        return self


# ---------------------------------------------------------------- training seeds
def as_claim(model, against, own, judges):
    """A claim as it stands in summary.json, from relative differences."""

    def gain(x):
        verdict = "better" if x < 0 else "worse"
        return {"verdict": verdict, "relative_difference": x}

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
    (found,) = neon.study.claims_over_seeds([first, second])
    assert found.own_verdicts == ["better", "worse"] and found.own_relative == [-0.2, 0.1]
    assert (found.cases, found.better, found.worse) == (6, 4, 1)
    np.testing.assert_allclose(found.relative, [-0.11 / 3, -0.7 / 3])
    text = found.sentence()
    assert "1 of 2 in its own features (-5.0% +- 21.2%)" in text
    assert "4 of 6 cases" in text and "worse in 1" in text


def test_random_partitions_are_one_claim():
    rows = [as_claim("blockwise", f"random blocks {k}", -0.2, [-0.3]) for k in (1, 2, 12)]
    (found,) = neon.study.claims_over_seeds([summary_with(*rows)])
    assert found.against == "random blocks" and found.cases == 3


def test_the_question_names_every_comparison_that_was_made():
    rows = [("blockwise", "global"), ("searched", "blockwise"), ("global", "base")]
    summary = summary_with(*(as_claim(*pair, -0.2, [-0.3]) for pair in rows))
    over = []
    for found in neon.study.claims_over_seeds([summary]):
        over.append({**vars(found), "sentence": found.sentence()})
    text = neon.report.answer(over, 5, 3)
    assert text.startswith(
        "Snapshot 5, 3 training seeds: blockwise is better than global in 1 of 1"
    )
    assert "searched is better than blockwise" in text and "than base" not in text


def test_every_training_seed_has_its_seeds_and_folder(tmp_path, monkeypatch):
    runs = []

    def study(c, argv, processes, begin):
        runs.append((c.seed, c.out.name, c.out.is_dir()))
        return None

    replace(monkeypatch, "study_all", study)
    replace(monkeypatch, "summarise_seeds", lambda *_: {})
    replace(monkeypatch, "write_seeds", lambda *_: None)
    replace(monkeypatch, "plot_report", lambda *_: None)
    config = neon.config.Config(out=tmp_path, seed=7, training_seeds=3)
    neon.cli.study_seeds(config, CIFAR, [], neon.processes.Processes("cpu"), 0.0)
    # Two seeds each: the base's, and the next one for self-training.
    assert runs == [(7, "seed-0", True), (9, "seed-1", True), (11, "seed-2", True)]


def test_training_seeds_need_a_training(tmp_path):
    config = neon.config.Config(out=tmp_path, aux="x.pkl", training_seeds=2)
    with pytest.raises(neon.files.UserError, match="--aux is trained already"):
        neon.cli.study_seeds(config, CIFAR, [], neon.processes.Processes("cpu"), 0.0)


# ---------------------------------------------------------------- pictures
def test_sample_panel_enlarges_whole_pixels():
    images = neon.glyphs.draw_glyphs(100, 0)[0]
    panel = neon.plots.sample_panel(images, gap=2, width=400)
    assert panel.shape == (8 * 52, 8 * 52, 3)
    tile = panel[52 + 2 : 52 + 50, 2:50, 0]  # second row, first column: image 8
    assert np.array_equal(tile, images[8, 0].numpy().repeat(4, 0).repeat(4, 1))
    assert (panel[50:54] == 255).all()


@pytest.mark.parametrize("side, columns", [(32, 8), (256, 3), (1024, 2)])
def test_sample_panels_of_larger_images(side, columns):
    images = torch.zeros(64, 3, side, side, dtype=torch.uint8)
    panel = neon.plots.sample_panel(images)
    assert panel.shape[0] == panel.shape[1]
    assert panel.shape[1] // (side + 4) == columns


def test_sample_picture_is_exact_to_the_pixel(tmp_path):
    pictures = {
        "base": neon.glyphs.draw_glyphs(64, 0)[0],
        "global": neon.glyphs.draw_glyphs(64, 1)[0],
    }
    final = {name: {"fd": 1.0, "w": {"a": 0.0}} for name in pictures}
    neon.plots.plot_report(
        {"s.png": (neon.plots.plot_samples, ({"final": final}, pictures))}, tmp_path
    )
    found = np.asarray(PIL.Image.open(tmp_path / "s.png").convert("RGB"))
    for i, images in enumerate(pictures.values()):
        panel = neon.plots.sample_panel(images)
        left = 12 + i * (panel.shape[1] + 12)
        part = found[-12 - panel.shape[0] : -12, left : left + panel.shape[1]]
        assert np.array_equal(part, panel)


def summary_of(diverging, kimgs=(1,)):
    """What summary.json holds of random scores, one model's infinite."""
    blocks = ("enc", "mid", "dec")
    scores, finals = {}, {}
    for i, name in enumerate(("base", "collapsed", "global", "blockwise", "searched")):
        one = noisy(20.0 + i, i)
        scores[name] = dataclasses.replace(one, w=dict.fromkeys(blocks, float(i)))
    for judge in ("own", "a", "b"):
        finals[judge] = {name: [one] for name, one in scores.items()}
        if diverging:
            finals[judge][diverging] = [score(math.inf)]
    grid = []
    for w in itertools.product((0.5, 1.0), (0.5, 1.0), (0.5, 1.0)):
        grid.append(score(20 + sum(w), w=dict(zip(blocks, w, strict=True))))
    models = {}
    for name, one in scores.items():
        models[name] = neon.study.Candidate(one.w, finals["own"][name][0].fd, None)
    judges = {j: {"score": j, "final": neon.study.final_comparison(finals[j])} for j in ("a", "b")}
    entries = []
    for kimg in kimgs:
        entry = neon.study.Entry(
            kimg=kimg,
            blocks=dict.fromkeys(blocks, {}),
            sweep=[finals["own"][name][0] for name in ("collapsed", "base", "global")],
            grid=grid,
            models=models,
            final=neon.study.final_comparison(finals["own"]),
            placebo=[],
            warnings=[],
            parts={},
            judges=judges,
            claims=neon.study.claims_of(finals),
        )
        entries.append(entry.as_json())
    return {"score": "FD (own, 4-d)", "snapshots": entries}


@pytest.mark.parametrize("diverging", [None, "collapsed", "global"])
@pytest.mark.parametrize("kimgs", [(1,), (1, 2)], ids=["one snapshot", "two"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_pictures_of_a_run(tmp_path, diverging, kimgs):
    summary = summary_of(diverging, kimgs)
    images = neon.glyphs.draw_glyphs(64, 0)[0]
    samples = {kimg: {"base": images, "blockwise": images} for kimg in kimgs}
    neon.plots.plot_report(neon.plots.figures_of(summary, samples), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    for kimg in kimgs:
        for kind in ("samples", "grid", "judges"):
            assert f"{kind}_{kimg:06d}.png" in names
    with PIL.Image.open(tmp_path / "scores.png") as picture:
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)


@pytest.mark.parametrize("diverging", [None, "collapsed", "global"])
def test_report_of_judges(tmp_path, capsys, diverging):
    summary = summary_of(diverging) | {"judges": ["own", "a", "b"], "floors": [], "reference": {}}
    neon.report.write_report(summary, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "Judges that no selection saw, snapshot 1:" in text
    assert "of 2 judges that no selection saw" in text
    assert "--judge adds" not in text
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)


def test_report_of_parts_gives_shares_of_the_other_model(tmp_path, capsys):
    summary = summary_of(None) | {"judges": ["own"], "floors": [], "reference": {}}
    entry = summary["snapshots"][0]
    entry["parts"], entry["judges"] = {"a": entry["judges"]["a"]}, {}
    neon.report.write_report(summary, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "Judges that no selection saw" not in text
    table = text.split("Parts of the selection's features, snapshot 1:")[1].strip().split("\n")
    assert table[0].count("against") == 3
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert cells[:6] == ["a", "20", "21", "22", "23", "24"]
    assert [cell.split()[0] for cell in cells[6:]] == ["+10.0%", "+4.5%", "+9.1%"]
    for cell in cells[6:]:
        value, low, high = (float(part.strip("[],%")) for part in cell.split()[:3])
        assert low < value < high


def test_report_without_judges_says_so(tmp_path, capsys):
    summary = summary_of(None) | {"judges": ["own"], "floors": []}
    summary["reference"] = {"origin": "of unknown origin", "images": 7}
    neon.report.write_report(summary, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "features that the weights were selected with: --judge adds others" in text
    assert "of unknown origin, the same for selection and final comparison (7 images)" in text


# ---------------------------------------------------------------- adapters
def load_adapter(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dinov2_features_prepare_images_as_imagenet():
    adapter = load_adapter("dinov2_features")
    seen = []

    def network(pixel_values):
        seen.append(pixel_values)
        tokens = pixel_values.mean((2, 3))[:, None].expand(-1, 5, -1)
        return SimpleNamespace(last_hidden_state=tokens)

    adapter.network = lambda device: network
    grey = torch.full((2, 1, 12, 12), 255, dtype=torch.uint8)
    found = adapter.features(grey)
    white = (1 - torch.tensor(adapter.MEAN)) / torch.tensor(adapter.STD)
    assert seen[0].shape == (2, 3, 224, 224)
    torch.testing.assert_close(found, white.expand(2, 3), rtol=1e-4, atol=1e-4)


def test_dinov2_network_with_random_weights():
    transformers = pytest.importorskip("transformers")
    adapter = load_adapter("dinov2_features")
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    net = transformers.Dinov2Model(config).eval()
    adapter.network = lambda device: net
    images = torch.rand(2, 3, 20, 20).mul(255).requires_grad_()
    found = adapter.features(images)
    found.sum().backward()
    assert found.shape == (2, 24) and images.grad.abs().sum() > 0
