"""What adaptive_neon/judges.py promises."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from edm_helpers import parse, preset_of, score_of

import adaptive_neon as neon
import edm_neon as edm
import neon_ext

CIFAR = edm.PRESETS["cifar10"]
CPU = neon.processes.Processes("cpu")
FOLDS = neon.stats.FOLDS
SELECTION = neon.seeds.SeedSet("selection", 10_000, 100)
SEARCH = neon.seeds.SeedSet("search", 10_000_000, 100)
FINAL = neon.seeds.SeedSet("final 1", 50_000, 100)


def random_images(n, seed=0, least=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(least, 256, (n, 1, 4, 4), generator=generator).to(torch.uint8)


class Flat:
    """Features: the first pixels themselves."""

    dim, name, kind, score, identity = 4, "flat", "flat", "FD (flat)", "flat"

    def __call__(self, images):
        return images.flatten(1)[:, :4].float()

    def to(self, device):
        return self


@pytest.fixture
def real():
    """Three parts of unequal size and distribution."""
    parts = []
    for seed, (count, least) in enumerate(((300, 0), (170, 40), (110, 90))):
        parts.append(
            neon.images.RealImages(random_images(count, seed, least), None, f"part {seed}")
        )
    return neon.images.RealData(*parts, origin="of the test")


def moments(images):
    """Mean and covariance of the features of images, from their definition."""
    x = images.flatten(1)[:, :4].double().numpy()
    mean = x.sum(0) / len(x)
    cov = sum(np.outer(row - mean, row - mean) for row in x) / (len(x) - 1)
    return mean, cov


def distance(one, other):
    """Squared Fréchet distance of two (mean, covariance)."""
    (mean, cov), (mean2, cov2) = one, other
    root = scipy.linalg.sqrtm(cov @ cov2).real
    return float(((mean - mean2) ** 2).sum() + np.trace(cov) + np.trace(cov2) - 2 * np.trace(root))


def distance_to(reference, images):
    mean, cov = (torch.from_numpy(part) for part in moments(images))
    return float(reference.prepared.distance(mean, cov))


# -------------------- the references of a judge


def test_weights_are_selected_against_one_part_and_judged_against_another(real):
    judge = neon.Judge(Flat(), real)
    assert judge.reference(SELECTION) is judge.reference(SEARCH) is judge.selection
    assert judge.reference(FINAL) is judge.final
    assert torch.equal(judge.selection.real, Flat()(real.selection.images))
    assert torch.equal(judge.final.real, Flat()(real.final.images))


@pytest.mark.parametrize("part", ["selection", "final"])
def test_reference_is_that_of_its_images(real, part):
    judge, images = neon.Judge(Flat(), real), random_images(90, 7)
    want = distance(moments(images), moments(getattr(real, part).images))
    assert distance_to(getattr(judge, part), images) == pytest.approx(want, rel=1e-6)


def test_facts_of_a_judge_are_those_of_both_parts(real):
    features = Flat()
    features.facts = {"accuracy": 0.5}
    part = {"features": "flat", "origin": "of the test"}
    assert neon.Judge(features, real).facts == {
        **part,
        **{"source": "part 2", "images": 110, "accuracy": 0.5},
        "selection": {**part, "source": "part 1", "images": 170},
    }


def test_floor_is_the_final_score_of_the_selections_images(real):
    bare = dataclasses.replace(real.selection, labels=None)
    real = dataclasses.replace(real, selection=bare)
    want = distance(moments(real.selection.images[:50]), moments(real.final.images))
    assert neon.Judge(Flat(), real).floor(50) == {"images": 50, "fd": pytest.approx(want, rel=1e-6)}


@pytest.mark.parametrize(
    "labels, order",
    [
        ([2, 2, 0, 2, 1, 0, 0], [0, 2, 4, 1, 5, 3, 6]),
        (None, [0, 1, 2, 3, 4, 5, 6]),
    ],
    ids=["classes", "none"],
)
def test_floor_takes_one_image_of_every_class_in_turn(labels, order):
    labels = None if labels is None else torch.tensor(labels)
    assert neon.judges.first_of_every_class(labels, 7).tolist() == order


def test_identity_of_a_judge_is_its_features_and_the_images_of_the_purpose(real):
    judge = neon.Judge(Flat(), real)
    assert judge.identity(SELECTION) == neon.Judge(Flat(), real).identity(SELECTION)
    assert judge.identity(SELECTION) != judge.identity(FINAL)

    other = Flat()
    other.identity = "other"
    renamed = neon.Judge(other, real)
    assert renamed.identity(SELECTION) != judge.identity(SELECTION)
    assert renamed.identity(FINAL) != judge.identity(FINAL)

    real.selection.images[17] = 255 - real.selection.images[17]
    changed = neon.Judge(Flat(), real)
    assert changed.identity(SELECTION) != judge.identity(SELECTION)
    assert changed.identity(FINAL) == judge.identity(FINAL)


def test_features_go_to_the_device_of_the_judge(real):
    class Moved(Flat):
        def to(self, device):
            self.device = device
            return self

    assert neon.Judge(Moved(), real, "cpu").features.device == "cpu"


# -------------------- statistics of a file


@pytest.fixture
def npz(tmp_path):
    """Writes one; None leaves a part out."""

    def write(**changes):
        content = {"mu": np.arange(4.0), "sigma": np.eye(4) * 3, "features": "flat", "images": 900}
        content = {key: value for key, value in (content | changes).items() if value is not None}
        np.savez(tmp_path / "ref.npz", **content)
        return tmp_path / "ref.npz"

    return write


def test_statistics_of_a_file_serve_both_purposes(npz):
    judge = neon.Judge.of_statistics(Flat(), npz(), "by hand")
    images = random_images(90, 7)
    want = distance(moments(images), (np.arange(4.0), np.eye(4) * 3))
    assert judge.selection is judge.final and judge.final.real is None
    assert distance_to(judge.final, images) == pytest.approx(want, rel=1e-6)
    source = str(npz())
    assert judge.facts == dict(features="flat", source=source, images=900, origin="by hand")


def test_images_beside_a_file_serve_precision_and_recall(npz, real):
    judge = neon.Judge.of_statistics(Flat(), npz(), "by hand", real=real)
    images = random_images(90, 7)
    want = distance(moments(images), (np.arange(4.0), np.eye(4) * 3))
    for reference, part in ((judge.selection, real.selection), (judge.final, real.final)):
        assert torch.equal(reference.real, Flat()(part.images))
        assert distance_to(reference, images) == pytest.approx(want, rel=1e-6)
    assert judge.identity(SELECTION) != judge.identity(FINAL)


def test_images_beside_a_file_are_not_those_of_its_statistics(npz, real):
    """Without a fold of them the file's statistics would be the same."""
    judge = neon.Judge.of_statistics(Flat(), npz(), real=real)
    for reference in (judge.selection, judge.final):
        assert neon.judges.distances_without_real(reference, torch.randn(90, 4)) is None


def test_statistics_of_a_file_are_said_to_be_of_unknown_origin(npz):
    judge = neon.Judge.of_statistics(Flat(), npz())
    assert "unknown origin" in judge.facts["origin"] and "selection" not in judge.facts


@pytest.mark.parametrize(
    "change", [{"mu": np.full(4, 0.1)}, {"sigma": 2 * np.eye(4)}, {"images": 901}], ids=str
)
def test_identity_of_a_file_is_its_content(npz, change):
    before = neon.Judge.of_statistics(Flat(), npz()).identity(FINAL)
    assert neon.Judge.of_statistics(Flat(), npz(**change)).identity(FINAL) != before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"features": "other-4"}, "of other-4, the features are flat"),
        ({"features": None}, "of inception, the features are flat"),
        ({"mu": np.zeros(3)}, r"has \(3,\)"),
        ({"sigma": np.full((4, 4), np.nan)}, "no usable mu and sigma"),
        ({"mu": None}, "no usable mu and sigma"),
    ],
    ids=["features", "no features", "size", "nan", "missing"],
)
def test_statistics_that_do_not_fit_are_refused(npz, change, message):
    with pytest.raises(neon.UserError, match=message):
        neon.Judge.of_statistics(Flat(), npz(**change))


def test_features_that_are_not_finite_are_refused(real):
    class Broken(Flat):
        def __call__(self, images):
            return super().__call__(images).log()

    real.final.images[3] = 0
    with pytest.raises(neon.UserError, match="part 2"):
        neon.Judge(Broken(), real)


# -------------------- precision and recall


def with_features(real, name="flat"):
    return neon.judges.Reference(None, real, {"features": name}, "")


def shares(real, fake):
    """Precision and recall."""
    return neon.judges.precision_recall(with_features(real), fake)


@pytest.fixture
def clouds(generator):
    """Unequal in number and spread: every order of the two gives other shares."""
    real = torch.randn(60, 4, generator=generator)
    return real, 1.3 * torch.randn(45, 4, generator=generator) + 0.4


def inside(points, manifold, k):
    """Share of points within the distance of some point's k-th neighbour, one by one."""
    points, manifold = points.double().numpy(), manifold.double().numpy()
    hits = 0
    for point in points:
        for centre in manifold:
            others = sorted(np.linalg.norm(other - centre) for other in manifold)
            if np.linalg.norm(point - centre) <= others[k]:  # others[0] is itself
                hits += 1
                break
    return hits / len(points)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_use_the_kth_other_neighbour(clouds, monkeypatch, k):
    real, fake = clouds
    if k != 5:  # what is published
        monkeypatch.setattr(neon.judges, "NEIGHBOURS", k)
    found = shares(real, fake)
    assert found == (inside(fake, real, k), inside(real, fake, k)) and found[0] != found[1]


def test_precision_and_recall_take_at_most_so_many_images(clouds, monkeypatch):
    real, fake = clouds
    want = shares(real[:30], fake[:30])
    monkeypatch.setattr(neon.judges, "MOST", 30)
    assert shares(real, fake) == want


# -------------------- kernel distance


def naive_kernel_distance(real, fake, unit=None):
    """Pair by pair; features in units of the real ones' root mean square."""
    unit = unit or real.double().square().mean().sqrt()
    real, fake = (side.double().numpy() / float(unit) for side in (real, fake))

    def kernel(x, y):
        return (float(np.dot(x, y)) / len(x) + 1) ** 3

    n, m = len(fake), len(real)
    fakes = sum(kernel(fake[i], fake[j]) for i in range(n) for j in range(n) if i != j)
    reals = sum(kernel(real[i], real[j]) for i in range(m) for j in range(m) if i != j)
    between = sum(kernel(x, y) for x in fake for y in real)
    return fakes / (n * (n - 1)) + reals / (m * (m - 1)) - 2 * between / (n * m)


def test_kernel_distance_is_the_unbiased_estimate_and_its_folds_leave_one_out():
    """47 images: folds of three and of two."""
    torch.manual_seed(0)
    real, fake = torch.randn(31, 5), torch.randn(47, 5) * 1.3 + 0.2
    reference = with_features(real)
    value, folds, real_folds = neon.judges.kernel_distance(reference, fake)
    unit = real.double().square().mean().sqrt()
    assert value == pytest.approx(naive_kernel_distance(real, fake, unit), rel=1e-9)
    assert len(folds) == len(real_folds) == FOLDS
    for found, kept, other in ((folds, fake, real), (real_folds, real, fake)):
        parts = kept.tensor_split(FOLDS)
        assert len({len(part) for part in parts}) == 2  # unequal folds
        for k in (0, 7, FOLDS - 1):
            rest = torch.cat([part for j, part in enumerate(parts) if j != k])
            pair = (other, rest) if kept is fake else (rest, other)
            assert found[k] == pytest.approx(naive_kernel_distance(*pair, unit), rel=1e-9)


@pytest.mark.parametrize("name", ["inception-12345678-tf1", "flat"])
def test_kernel_distance_has_the_unit_of_the_real_features_or_inceptions_own(name):
    """Published numbers are of Inception's features as they are."""
    torch.manual_seed(0)
    real, fake = torch.randn(41, 5), torch.randn(47, 5) + 0.3
    unit = 1.0 if name != "flat" else real.double().square().mean().sqrt()
    value, _, _ = neon.judges.kernel_distance(with_features(real, name), fake)
    assert value == pytest.approx(naive_kernel_distance(real, fake, unit), rel=1e-6)
    larger, _, _ = neon.judges.kernel_distance(with_features(real * 3, name), fake * 3)
    assert (larger == pytest.approx(value, rel=1e-6)) == (name == "flat")


def test_distances_without_each_fold_of_the_real_images(real):
    """As if these real images had never been there."""
    judge = neon.Judge(Flat(), real)
    fake = torch.randn(90, 4, dtype=torch.float64) * 60 + 90
    found = neon.judges.distances_without_real(judge.final, fake)
    parts = judge.final.real.tensor_split(FOLDS)
    assert len(found) == FOLDS and len({len(part) for part in parts}) == 2
    for k in (0, 11, FOLDS - 1):
        rest = torch.cat([part for j, part in enumerate(parts) if j != k])
        side = neon_ext.FrechetReference(*neon_ext.feature_moments(rest))
        want = float(side.distance(*neon_ext.feature_moments(fake)))
        assert found[k] == pytest.approx(want, rel=1e-8)


def test_kernel_distance_takes_at_most_so_many_images(monkeypatch):
    monkeypatch.setattr(neon.judges, "MOST", 40)
    torch.manual_seed(0)
    real, fake = torch.randn(50, 5), torch.randn(60, 5) + 1
    found = neon.judges.kernel_distance(with_features(real), fake)
    assert found == neon.judges.kernel_distance(with_features(real[:40]), fake[:40])


def test_kernel_interval_is_the_jackknife_of_its_folds():
    rng = np.random.default_rng(0)
    folds = rng.standard_normal((2, FOLDS))
    scores = [score_of(1.0, kernel=float(k), kernel_folds=list(row)) for k, row in enumerate(folds)]
    half, _ = neon.stats.jackknife(0.5, folds)
    found = neon.stats.interval_of(scores, "kernel")
    assert found == {"value": 0.5, "low": 0.5 - half, "high": 0.5 + half} and half > 0


# -------------------- the judges of a study


def config(tmp_path, **options):
    return neon.config.Config(device="cpu", out=tmp_path, **options)


def judge_file(tmp_path, body="return x.flatten(1)[:, :3].float()"):
    path = tmp_path / "mine.py"
    path.write_text(f"import torch\n\n\ndef features(x):\n    {body}\n")
    return str(path)


def model_with(features):
    return SimpleNamespace(own_features=lambda example: features)


def build(c, real, features=None, example=None):
    return neon.judges.build_judges(c, CIFAR, model_with(features or Flat()), real, CPU, example)


def test_all_judges_in_order_with_their_references(real, tmp_path):
    c = config(tmp_path, judge=("random-conv", "pixels", "random-conv"))
    judges = build(c, real)
    assert [judge.name for judge in judges] == ["flat", "random-conv", "pixels"]
    assert [judge.is_part for judge in judges] == [False] * 3
    for judge in judges:
        assert torch.equal(judge.final.real, judge.features(real.final.images))
        assert torch.equal(judge.selection.real, judge.features(real.selection.images))


def test_joined_features_decide_their_parts_follow_and_the_others_are_unseen(real, tmp_path):
    options = {"judge": ("pixels", "random-conv"), "select_with": ("pixels", "pixels")}
    judges = build(config(tmp_path, **options), real)
    assert [judge.name for judge in judges] == ["flat+pixels", "flat", "pixels", "random-conv"]
    assert [judge.is_part for judge in judges] == [False, True, True, False]
    parts = [Flat(), neon.pixels(real.training.images)]
    joint = neon.features.JointFeatures(parts, real.training.images)
    assert torch.equal(judges[0].final.real, joint(real.final.images))
    assert torch.equal(judges[0].selection.real, joint(real.selection.images))


@pytest.mark.parametrize("images", ["real", "none"])
def test_own_features_of_a_model_see_four_images(real, tmp_path, npz, images):
    """Of the training part or, where nothing is real, the start check's."""
    seen, example = [], random_images(4, 9)

    def own_features(images):
        seen.append(images)
        return Flat()

    model = SimpleNamespace(own_features=own_features)
    c, real = config(tmp_path), real
    if images == "none":
        c, real = config(tmp_path, ref=str(npz())), None
    neon.judges.build_judges(c, CIFAR, model, real, CPU, example)
    assert torch.equal(seen[0], example if real is None else real.training.images[:4])


def test_preset_decides_where_the_model_has_no_features(real, tmp_path):
    class Preset(edm.Cifar10):
        def features(self, c):
            return Flat()

    model = model_with(None)
    (judge,) = neon.judges.build_judges(config(tmp_path), Preset(), model, real, CPU)
    assert judge.name == "flat"


def test_statistics_of_a_file_go_before_images(real, tmp_path, npz):
    c = config(tmp_path, ref=str(npz()), judge=("pixels",))
    judge, pixels = build(c, real)
    assert judge.facts["images"] == 900 and pixels.facts["images"] == 110
    assert torch.equal(judge.final.real, Flat()(real.final.images))


def test_statistics_that_do_not_fit_are_refused_before_they_are_kept(tmp_path, npz, monkeypatch):
    checked = []

    def fetch(source, what, check):
        checked.append(check)
        return npz()

    monkeypatch.setattr(neon.judges, "fetch", fetch)
    build(config(tmp_path, ref="https://example.org/ref.npz"), None)
    with pytest.raises(neon.UserError, match="other-4"):
        checked[0](npz(features="other-4"))


@pytest.mark.parametrize("option", ["judge", "select_with"])
def test_two_feature_networks_of_one_name_are_refused(real, tmp_path, option):
    c = config(tmp_path, **{option: ("pixels",)})
    with pytest.raises(neon.UserError, match="two feature networks named pixels"):
        build(c, real, neon.pixels(real.training.images))


def test_pixels_are_fitted_on_the_training_part_and_convolutions_take_its_channels(real, tmp_path):
    want = {"pixels": neon.pixels(real.training.images), "random-conv": neon.random_conv(1)}
    for name, features in want.items():
        found = neon.judges.feature_network(name, config(tmp_path), CIFAR, real)
        assert found.identity == features.identity


DETACHED = "return x.detach().flatten(1)[:, :3].float()"


@pytest.mark.parametrize("place", ["joined", "own"])
def test_gradient_search_needs_the_gradient_of_what_decides(real, tmp_path, place):
    """Joined with others, a network without gradient would be left out in silence."""
    path = judge_file(tmp_path, DETACHED)
    own, select_with = Flat(), (path,)
    if place == "own":
        file = neon.userfile.JudgeFile(path)
        own, select_with = neon.features.FileFeatures(file, real.training.images[:4]), ()
    c = config(tmp_path, select_with=select_with, search="gradient")
    with pytest.raises(neon.UserError, match="no gradient comes through the features mine-3"):
        build(c, real, own)


@pytest.mark.parametrize(
    "body, options",
    [
        (DETACHED, {"search": "cobyqa", "select_with": True}),
        (DETACHED, {"search": "gradient", "judge": True}),
        ("return x.flatten(1)[:, :3].float()", {"search": "gradient", "select_with": True}),
    ],
    ids=["another search", "only judges", "sound"],
)
def test_other_networks_need_no_gradient(real, tmp_path, body, options):
    path = judge_file(tmp_path, body)
    options = {key: (path,) if value is True else value for key, value in options.items()}
    assert "mine-3" in [judge.name for judge in build(config(tmp_path, **options), real)]


# -------------------- options that cannot be


@pytest.mark.parametrize("option", ["--judge", "--select-with"])
@pytest.mark.parametrize(
    "text, message",
    [(None, "mine.py is no file"), ("x = 1", "lacks features")],
    ids=["missing", "no features"],
)
def test_files_are_checked_before_anything_is_trained(real, tmp_path, option, text, message):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    field = option.strip("-").replace("-", "_")
    c = config(tmp_path, **{field: ("pixels", str(path))})
    with pytest.raises(neon.UserError, match=f"^{option} .*{message}"):
        neon.judges.check_judges(c, CIFAR, real)


@pytest.mark.parametrize("option", ["judge", "select_with"])
def test_judges_need_real_images(tmp_path, option):
    c = config(tmp_path, **{option: ("pixels",)})
    with pytest.raises(neon.UserError, match="pixels .* give --data"):
        neon.judges.check_judges(c, CIFAR, None)


def test_selecting_with_more_needs_images_and_no_statistics(real, tmp_path):
    c = config(tmp_path, select_with=("pixels",), ref="x.npz")
    with pytest.raises(neon.UserError, match="--select-with needs real images.* leave --ref out"):
        neon.judges.check_judges(c, CIFAR, real)
    neon.judges.check_judges(config(tmp_path, ref="x.npz", judge=("pixels",)), CIFAR, real)


@pytest.mark.parametrize("judge", [("none",), ()], ids=str)
def test_no_judges_need_no_images(tmp_path, judge):
    neon.judges.check_judges(config(tmp_path, judge=judge), CIFAR, None)


def test_judges_of_one_preset_are_files_to_another(real, tmp_path):
    c = config(tmp_path, judge=("mlp",))
    with pytest.raises(neon.UserError, match="--judge mlp is no file"):
        neon.judges.check_judges(c, CIFAR, real)
    neon.judges.check_judges(c, edm.PRESETS["glyphs"], real)


@pytest.mark.parametrize(
    "options, names",
    [
        ((), ["classifier-2", "mlp", "random-conv", "pixels"]),
        (("--judge", "pixels", "--judge", "random-conv"), ["pixels", "random-conv"]),
        (("--judge", "none"), []),
        (("--select-with", "mlp"), ["classifier-2", "random-conv", "pixels"]),
    ],
    ids=str,
)
def test_judges_that_no_selection_sees(tmp_path, options, names):
    c = parse(["--preset", "glyphs", *options, "--out", str(tmp_path)])
    assert neon.judges.judge_names(c) == names


@pytest.mark.parametrize(
    "options, source",
    [
        ({"base": CIFAR.bases["cond"]}, CIFAR.statistics),
        ({"base": CIFAR.bases["uncond"]}, CIFAR.statistics),
        ({"base": "mine.pkl", "ref": "cifar10"}, CIFAR.statistics),
        ({"ref": "mine.npz"}, "mine.npz"),
        ({"base": "mine.pkl"}, None),
        ({"model": "mine.py"}, None),
    ],
    ids=str,
)
def test_cifar10_statistics_are_for_cifar10_networks_or_asked_for(options, source):
    c = neon.config.Config(**options)
    if source is None:
        with pytest.raises(neon.UserError, match="--ref cifar10"):
            neon.judges.reference_source(c, preset_of(c))
        return
    found, origin = neon.judges.reference_source(c, preset_of(c))
    assert found == source
    assert origin == (CIFAR.origin if source == CIFAR.statistics else "")
