"""What adaptive_neon/features.py promises."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edm_helpers import (
    parse,
    toy_scorer,
)

import adaptive_neon as neon
import edm_neon as edm

SELECTION = neon.seeds.SeedSet("selection", 10_000, 100)


# -------------------- keys hold the content


def key(scorer, seeds=SELECTION):
    return scorer.key(seeds)


@pytest.fixture
def scorer(tmp_path):
    return toy_scorer(tmp_path)


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


CIFAR = edm.PRESETS["cifar10"]


CPU = neon.processes.Processes("cpu")


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


# -------------------- one sampling for all judges


class Other(Flat):
    name = kind = "other"
    identity = "other"

    def __call__(self, images):
        return images.flatten(1)[:, 8:12].float() / 2


# -------------------- the judges themselves


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
    features = neon.judges.feature_network(path, config, CIFAR, real)
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
        neon.judges.check_judges(neon.config.Config(judge=("pixels", path)), CIFAR, real)


FEATURES_THAT_CHANGE = {
    "fewer rows": "return x.flatten(1)[: 6 if len(x) == 7 else None, :3].float()",
    "one row squeezed": "return x.flatten(1)[:, :3].float().squeeze(0)",
    "other columns": "return x.flatten(1)[:, : 2 if len(x) == 7 else 3].float()",
    "elsewhere": "return x.flatten(1)[:, :3].float().to('meta' if len(x) == 7 else 'cpu')",
}


@pytest.mark.parametrize("text", FEATURES_THAT_CHANGE.values(), ids=FEATURES_THAT_CHANGE)
def test_features_of_a_file_keep_their_shape_and_place(real, tmp_path, text):
    path = judge_file(tmp_path, f"def features(x):\n    {text}\n")
    features = neon.judges.feature_network(path, neon.config.Config(device="cpu"), CIFAR, real)
    count = 1 if "squeeze" in text else 7
    with pytest.raises(neon.files.UserError, match=rf"features\(\) of {count} images on cpu gave"):
        features(real.final.images[:count])


def test_features_of_a_file_that_are_not_finite_are_refused(real, tmp_path):
    path = judge_file(tmp_path, "def features(x):\n    return x.flatten(1)[:, :3].float().log()\n")
    real.training.images[:4] = 7
    features = neon.judges.feature_network(path, neon.config.Config(device="cpu"), CIFAR, real)
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
    model = SimpleNamespace(own_features=lambda example: Flat())
    return neon.judges.build_judges(config, CIFAR, model, real, CPU)


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
        neon.judges.check_judges(neon.config.Config(select_with=("pixels", path)), CIFAR, real)


def test_selecting_with_needs_real_images(real):
    with pytest.raises(neon.files.UserError, match="--select-with pixels .* give --data"):
        neon.judges.check_judges(neon.config.Config(select_with=("pixels",)), CIFAR, None)
    with pytest.raises(
        neon.files.UserError, match="--select-with needs real images.* leave --ref out"
    ):
        neon.judges.check_judges(
            neon.config.Config(select_with=("pixels",), ref="x.npz"), CIFAR, real
        )
    neon.judges.check_judges(neon.config.Config(ref="x.npz", judge=("pixels",)), CIFAR, real)


def test_judges_need_real_images(real):
    with pytest.raises(neon.files.UserError, match="--judge pixels .* give --data"):
        neon.judges.check_judges(neon.config.Config(judge=("pixels",)), CIFAR, None)
    neon.judges.check_judges(neon.config.Config(judge=("none",)), CIFAR, None)
    neon.judges.check_judges(neon.config.Config(judge=()), CIFAR, None)
    with pytest.raises(neon.files.UserError, match="--judge mlp is no file"):
        neon.judges.check_judges(neon.config.Config(judge=("mlp",)), CIFAR, real)


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
    assert neon.judges.judge_names(parse(["--preset", "glyphs", "--judge", "none", *out])) == []


def test_pixels_are_fitted_on_the_training_part(real):
    found = neon.judges.feature_network("pixels", neon.config.Config(), CIFAR, real)
    assert found.identity == neon.features.PixelFeatures(real.training.images).identity


def test_all_judges_in_order_with_their_references(real, tmp_path):
    config = neon.config.Config(
        device="cpu", out=tmp_path, judge=("random-conv", "pixels", "random-conv")
    )
    model = SimpleNamespace(own_features=lambda example: Flat())
    judges = neon.judges.build_judges(config, CIFAR, model, real, CPU)
    assert [judge.name for judge in judges] == ["flat", "random-conv", "pixels"]
    assert all(len(judge.final.real) == len(real.final.images) for judge in judges)


def test_selection_with_more_features_joins_them_and_leaves_the_other_judges_unseen(real, tmp_path):
    config = neon.config.Config(
        device="cpu",
        out=tmp_path,
        judge=("pixels", "random-conv"),
        select_with=("pixels", "pixels"),
    )
    model = SimpleNamespace(own_features=lambda example: Flat())
    judges = neon.judges.build_judges(config, CIFAR, model, real, CPU)
    assert [judge.name for judge in judges] == ["flat+pixels", "flat", "pixels", "random-conv"]
    assert [judge.is_part for judge in judges] == [False, True, True, False]
    images = real.final.images
    expected = neon.features.JointFeatures(
        [Flat(), neon.features.PixelFeatures(real.training.images)],
        real.training.images,
        "cpu",
    )(images)
    assert torch.equal(judges[0].final.real, expected)
    assert torch.equal(judges[0].selection.real, judges[0].features(real.selection.images))


def test_two_feature_networks_of_one_name_are_refused(real, tmp_path):
    model = SimpleNamespace(
        own_features=lambda example: neon.features.PixelFeatures(real.training.images)
    )
    for options in ({"judge": ("pixels",)}, {"select_with": ("pixels",)}):
        config = neon.config.Config(device="cpu", out=tmp_path, **options)
        with pytest.raises(neon.files.UserError, match="two feature networks named pixels"):
            neon.judges.build_judges(config, CIFAR, model, real, CPU)
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
