"""What adaptive_neon/judges.py promises."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edm_helpers import (
    ToyFeatures,
    judge_of,
    preset_of,
    toy_images,
    toy_judge,
    toy_scorer,
)

import adaptive_neon as neon
import edm_neon as edm
import neon_ext

SELECTION = neon.seeds.SeedSet("selection", 10_000, 100)


FINAL = neon.seeds.SeedSet("final 1", 50_000, 100)


# -------------------- keys hold the content


def key(scorer, seeds=SELECTION):
    return scorer.key(seeds)


@pytest.fixture
def scorer(tmp_path):
    return toy_scorer(tmp_path)


# -------------------- reference


def reference(tmp_path, images, labels=None):
    real = neon.images.RealImages(images, labels, "images.zip")
    return neon.judges.reference_of_images(real, ToyFeatures(), "cpu", "")


def test_reference_of_images(tmp_path):
    images, labels = toy_images(count=300)
    found = reference(tmp_path, images)
    features = ToyFeatures()(images)
    assert torch.equal(found.real, features)
    assert found.facts == {"features": "toy-6", "source": "images.zip", "images": 300}
    want = neon_ext.FrechetReference(*neon_ext.feature_moments(features))
    other = ToyFeatures()(toy_images(first=5, count=100)[0])
    moments = neon_ext.feature_moments(other)
    distances = [float(r.distance(*moments)) for r in (found.prepared, want)]
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
    features = judge_of(other, judge.selection, judge.final)
    selection = judge_of(judge.features, judge.final)
    for seeds, changed in ((SELECTION, True), (FINAL, False)):
        assert features.identity(seeds) != judge.identity(seeds)
        assert (selection.identity(seeds) != judge.identity(seeds)) == changed


def npz(tmp_path, **changes):
    content = {"mu": np.zeros(6), "sigma": np.eye(6), "features": "toy-6", "images": 900}
    content = {key: value for key, value in (content | changes).items() if value is not None}
    np.savez(tmp_path / "ref.npz", **content)
    return neon.judges.reference_of_file(tmp_path / "ref.npz", ToyFeatures(), "cpu", "")


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
    found = neon.judges.reference_of_file(tmp_path / "ref.npz", features, "cpu", "")
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
    moments = neon_ext.feature_moments(judge.selection.real[:150])
    want = float(judge.final.prepared.distance(*moments))
    assert judge.floor(150) == {"images": 150, "fd": pytest.approx(want, rel=1e-6)}


@pytest.mark.parametrize(
    "options, source",
    [
        ({"base": edm.BASES["cond"]}, edm.CIFAR10_STATISTICS),
        ({"base": edm.BASES["uncond"]}, edm.CIFAR10_STATISTICS),
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
        assert neon.judges.reference_source(c, preset_of(c))[0] == source
    else:
        with pytest.raises(neon.files.UserError, match="--ref cifar10"):
            neon.judges.reference_source(c, preset_of(c))


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


def test_selection_and_final_scores_have_their_own_reference(real, tmp_path):
    judge = neon.judges.Judge(Flat(), real)
    selection, final = (
        neon.seeds.SeedSet("selection", 0, 40),
        neon.seeds.SeedSet("final 1", 50, 40),
    )
    fresh = neon.seeds.SeedSet("search", 10_000_000, 40)
    assert judge.reference(selection) is judge.selection is judge.reference(fresh)
    assert judge.reference(final) is judge.final
    assert torch.equal(judge.selection.real, Flat()(real.selection.images))
    assert torch.equal(judge.final.real, Flat()(real.final.images))
    assert judge.identity(selection) != judge.identity(final)


def test_floor_is_the_final_score_of_real_images(real):
    judge = neon.judges.Judge(Flat(), real)
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
    judge = neon.judges.Judge.of_statistics(Flat(), path)
    assert judge.selection is judge.final and judge.final.real is None
    assert "unknown origin" in judge.facts["origin"] and "selection" not in judge.facts


def test_file_gives_the_distance_and_data_the_images(real, tmp_path):
    images = random_images(300, 5)
    path = statistics_file(tmp_path, images)
    judge = neon.judges.Judge.of_statistics(Flat(), path, real=real)
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


# -------------------- kernel distance


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
