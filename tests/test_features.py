"""What adaptive_neon/features.py promises."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import adaptive_neon as neon
from adaptive_neon.glyphs import draw_glyphs


def random_images(n, seed=0, channels=1, height=4, width=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, height, width), generator=generator).to(torch.uint8)


class Flat:
    """Features: the first pixels themselves."""

    dim, name, kind, score, identity = 4, "flat", "flat", "FD (flat)", "flat"

    def __call__(self, images):
        return images.flatten(1)[:, :4].float()

    def to(self, device):
        return self


class Other(Flat):
    """Three others, in other units."""

    dim, name, kind, identity = 3, "other", "other", "other"

    def __call__(self, images):
        return images.flatten(1)[:, 8:11].float() / 7


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
        for end in ("_2", "dbl_3"):
            shapes[f"Mixed_{block}.branch3x3{end}a"] = (384, 384, 1, 3)
            shapes[f"Mixed_{block}.branch3x3{end}b"] = (384, 384, 3, 1)
    return shapes


@pytest.fixture(scope="module")
def inception_weights():
    """Random ones; every layer and channel has its own mean, variance, scale and bias."""
    torch.manual_seed(0)
    found = {"fc.weight": torch.randn(1008, 2048), "fc.bias": torch.randn(1008)}
    for name, shape in inception_shapes().items():
        found[f"{name}.conv.weight"] = torch.randn(*shape) * (2 / np.prod(shape[1:])) ** 0.5
        found[f"{name}.bn.weight"] = 1 + 0.2 * torch.randn(shape[0])
        found[f"{name}.bn.bias"] = 0.2 * torch.randn(shape[0])
        found[f"{name}.bn.running_mean"] = 0.2 * torch.randn(shape[0])
        found[f"{name}.bn.running_var"] = 0.6 + 0.8 * torch.rand(shape[0])
    return found


@pytest.fixture(scope="module")
def inception_path(inception_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(inception_weights, path)
    return path


@pytest.fixture(scope="module")
def inception(inception_path):
    return neon.inception(inception_path)


# -------------------- Inception: the same features, computed another way


def tf1_resize(images, size=299):
    """Bilinear as TensorFlow 1 has it: output j lies at j W / 299 of the input, without a shift by
    half a pixel; pixel by pixel, float64 [N, C, H, W]."""
    n, channels, height, width = images.shape
    source = images.double().numpy()
    found = np.empty((n, channels, size, size))
    for row in range(size):
        y = row * height / size
        above, down = int(y), y - int(y)
        below = min(above + 1, height - 1)
        for column in range(size):
            x = column * width / size
            left, right = int(x), min(int(x) + 1, width - 1)
            across = x - left
            top = source[:, :, above, left] * (1 - across) + source[:, :, above, right] * across
            low = source[:, :, below, left] * (1 - across) + source[:, :, below, right] * across
            found[:, :, row, column] = top * (1 - down) + low * down
    return torch.from_numpy(found)


def mean_of_neighbours(x):
    """3 x 3 averages at every place; at the border of the pixels that there are."""
    kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype)
    n, channels, height, width = x.shape
    sums = F.conv2d(x.reshape(n * channels, 1, height, width), kernel, padding=1)
    counts = F.conv2d(torch.ones(1, 1, height, width, dtype=x.dtype), kernel, padding=1)
    return (sums / counts).view_as(x)


BATCH_NORM = ("running_mean", "running_var", "weight", "bias")


def direct_inception(weights, images):
    """The published graph, layer by layer, convolution and batch normalisation apart."""

    def layer(x, name, stride=1, padding=(0, 0)):
        x = F.conv2d(x, weights[f"{name}.conv.weight"].double(), None, stride, padding)
        bn = [weights[f"{name}.bn.{key}"].double().view(-1, 1, 1) for key in BATCH_NORM]
        mean, variance, scale, bias = bn
        return ((x - mean) / (variance + 0.001).sqrt() * scale + bias).clamp_min(0)

    def same(x, name):
        kernel = weights[f"{name}.conv.weight"].shape[2:]
        return layer(x, name, 1, (kernel[0] // 2, kernel[1] // 2))

    # Stem.
    x = (tf1_resize(images) - 128) / 128
    x = layer(x, "Conv2d_1a_3x3", 2)
    x = layer(x, "Conv2d_2a_3x3")
    x = layer(x, "Conv2d_2b_3x3", 1, (1, 1))
    x = F.max_pool2d(x, 3, 2)
    x = layer(x, "Conv2d_3b_1x1")
    x = layer(x, "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)

    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        one = same(x, f"{b}.branch1x1")
        five = same(same(x, f"{b}.branch5x5_1"), f"{b}.branch5x5_2")
        three = same(same(x, f"{b}.branch3x3dbl_1"), f"{b}.branch3x3dbl_2")
        three = same(three, f"{b}.branch3x3dbl_3")
        pool = same(mean_of_neighbours(x), f"{b}.branch_pool")
        x = torch.cat([one, five, three, pool], 1)

    big = layer(x, "Mixed_6a.branch3x3", 2)
    double = same(same(x, "Mixed_6a.branch3x3dbl_1"), "Mixed_6a.branch3x3dbl_2")
    double = layer(double, "Mixed_6a.branch3x3dbl_3", 2)
    x = torch.cat([big, double, F.max_pool2d(x, 3, 2)], 1)

    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        one = same(x, f"{b}.branch1x1")
        seven = same(x, f"{b}.branch7x7_1")
        seven = same(same(seven, f"{b}.branch7x7_2"), f"{b}.branch7x7_3")
        double = same(x, f"{b}.branch7x7dbl_1")
        double = same(same(double, f"{b}.branch7x7dbl_2"), f"{b}.branch7x7dbl_3")
        double = same(same(double, f"{b}.branch7x7dbl_4"), f"{b}.branch7x7dbl_5")
        pool = same(mean_of_neighbours(x), f"{b}.branch_pool")
        x = torch.cat([one, seven, double, pool], 1)

    big = layer(same(x, "Mixed_7a.branch3x3_1"), "Mixed_7a.branch3x3_2", 2)
    seven = same(same(x, "Mixed_7a.branch7x7x3_1"), "Mixed_7a.branch7x7x3_2")
    seven = layer(same(seven, "Mixed_7a.branch7x7x3_3"), "Mixed_7a.branch7x7x3_4", 2)
    x = torch.cat([big, seven, F.max_pool2d(x, 3, 2)], 1)

    for b in ("Mixed_7b", "Mixed_7c"):
        one = same(x, f"{b}.branch1x1")
        three = same(x, f"{b}.branch3x3_1")
        double = same(same(x, f"{b}.branch3x3dbl_1"), f"{b}.branch3x3dbl_2")
        pool = mean_of_neighbours(x) if b == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        ends = [one]
        for side, prefix in ((three, "branch3x3_2"), (double, "branch3x3dbl_3")):
            ends += [same(side, f"{b}.{prefix}a"), same(side, f"{b}.{prefix}b")]
        x = torch.cat([*ends, same(pool, f"{b}.branch_pool")], 1)
    return x.mean((2, 3))


def test_inception_is_the_published_graph(inception, inception_weights):
    """On images that are no squares, with all values."""
    images = random_images(2, 1, channels=3, height=11, width=32)
    want = direct_inception(inception_weights, images)
    found = inception(images)
    assert found.shape == (2, 2048) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-3, atol=1e-4)


def test_grey_images_are_three_equal_channels(inception):
    grey = random_images(2, 2, height=9, width=9)
    assert torch.equal(inception(grey), inception(grey.expand(-1, 3, -1, -1)))


def test_inception_takes_the_floats_of_a_gradient_search(inception):
    images = random_images(2, 3, channels=3, height=8, width=8)
    assert torch.equal(inception(images), inception(images.float()))


def test_inception_in_channels_last_gives_the_same_features(inception):
    """As a GPU computes it."""
    images = random_images(2, 4, channels=3, height=32, width=32)
    other = copy.deepcopy(inception).to(memory_format=torch.channels_last)
    assert other.Conv2d_2a_3x3.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(other(images), inception(images), rtol=1e-4, atol=1e-5)


def test_resize_is_tensorflows():
    images = random_images(2, 5, channels=2, height=5, width=7)
    found = neon.features.InceptionFeatures.resize(images.float())
    torch.testing.assert_close(found.double(), tf1_resize(images), rtol=1e-5, atol=1e-3)


def test_other_weights_are_another_inception(inception, inception_weights, tmp_path):
    changed = dict(inception_weights)
    changed["Mixed_7c.branch_pool.bn.bias"] = changed["Mixed_7c.branch_pool.bn.bias"] + 1e-3
    torch.save(changed, tmp_path / "other.pth")
    other = neon.inception(tmp_path / "other.pth")
    assert other.identity != inception.identity and other.name != inception.name
    assert other.kind == inception.kind == "inception"


@pytest.mark.parametrize(
    "fault", ["damaged", "missing", "none", "no file", "a list", "numbers", "negative variance"]
)
def test_other_files_are_not_inception(inception_weights, tmp_path, fault):
    pool = "branch_pool.conv.weight"
    contents = {
        "damaged": {**inception_weights, f"Mixed_7c.{pool}": inception_weights[f"Mixed_7b.{pool}"]},
        "missing": {n: w for n, w in inception_weights.items() if "6c.branch7x7_2" not in n},
        "none": {},
        "a list": list(inception_weights.values()),
        "numbers": {name: 1.5 for name in inception_weights},
        "negative variance": {n: -w.abs() for n, w in inception_weights.items()},
    }
    path = tmp_path / "bad.pth"
    path.write_bytes(b"no")
    if fault in contents:
        torch.save(contents[fault], path)
    with pytest.raises(neon.files.UserError, match="not the PyTorch port"):
        neon.features.InceptionFeatures(path)


@pytest.mark.parametrize(
    "source, start",
    [(neon.features.INCEPTION, "6726825d"), ("mine.pth", "")],
    ids=["public", "own"],
)
def test_only_the_public_weights_have_a_known_hash(monkeypatch, source, start):
    fetched = []

    def fetch(*args):
        fetched.append(args)
        raise neon.files.UserError("enough")

    monkeypatch.setattr(neon.features, "fetch", fetch)
    with pytest.raises(neon.files.UserError, match="enough"):
        neon.inception(source)
    assert fetched == [(source, "the Inception weights", start)]


# -------------------- random convolutions


def test_random_convolutions_are_always_the_same():
    """To the number: what was scored in them stays comparable."""
    state = torch.random.get_rng_state()
    first = neon.random_conv(3)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert neon.random_conv(3).identity == first.identity
    ramp = torch.arange(48, dtype=torch.uint8).view(1, 1, 6, 8) * 5
    found = neon.random_conv(1)(ramp)[0, :4]
    want = torch.tensor([0.43053, 0.11905, 0.03393, 0.27716])
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)


def test_random_convolutions_are_three_and_a_mean():
    features, images = neon.random_conv(3), random_images(4, 6, channels=3, height=9, width=11)
    x = (images.double() - 127.5) / 127.5
    layers = [layer for layer in features.body if isinstance(layer, torch.nn.Conv2d)]
    for layer, stride in zip(layers, (1, 2, 2), strict=True):
        x = F.conv2d(x, layer.weight.double(), layer.bias.double(), stride, 1).clamp_min(0)
    want = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    torch.testing.assert_close(features(images).double(), want, rtol=1e-4, atol=1e-5)


def test_identity_of_random_convolutions_holds_their_design(monkeypatch):
    before = neon.random_conv(3).identity
    assert neon.random_conv(1).identity != before
    monkeypatch.setattr(torch.nn, "ReLU", torch.nn.Tanh)
    assert neon.random_conv(3).identity != before


# -------------------- pixels


def test_pixels_are_the_leading_principal_components():
    images = draw_glyphs(500, 0)[0]
    features = neon.pixels(images)
    x = (images.flatten(1).double().numpy() - 127.5) / 127.5
    centred = x - x.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / (len(x) - 1))
    order = np.argsort(values)[::-1][:32]
    want = centred @ vectors[:, order]

    found = features(images).double().numpy()[:, ::-1]  # leading first
    assert features.dim == found.shape[1] == 32 and features.score.startswith("FD (pixels, 32 ")
    np.testing.assert_allclose(np.abs(found), np.abs(want), atol=2e-3)  # up to the sign
    signs = np.sign((found * want).sum(0))
    np.testing.assert_allclose(found * signs, want, atol=2e-3)


def test_small_images_have_as_many_components_as_pixels():
    assert neon.pixels(random_images(60)).dim == 16


def test_large_images_are_averaged_down_to_16():
    large = random_images(40, 7, channels=3, height=64, width=48)
    blocks = large.double().view(40, 3, 16, 4, 16, 3).mean((3, 5)) / 127.5 - 1
    features = neon.pixels(large)
    torch.testing.assert_close(
        features.vectors(large).double(), blocks.flatten(1), atol=1e-5, rtol=0
    )
    assert features(large).shape == (40, 32)


def test_pixels_of_other_images_are_other_features():
    images = random_images(60)
    assert neon.pixels(images).identity == neon.pixels(images.clone()).identity
    assert neon.pixels(images).identity != neon.pixels(images[:-1]).identity


# -------------------- features of a file


def of_file(tmp_path, body, images=None):
    path = tmp_path / "mine.py"
    path.write_text(f"def features(x):\n    {body}\n")
    example = random_images(4) if images is None else images
    return neon.features.FileFeatures(neon.userfile.JudgeFile(path), example)


def test_features_of_a_file(tmp_path):
    features = of_file(tmp_path, "return x.flatten(1)[:, :3].float()")
    assert (features.name, features.dim) == ("mine-3", 3)
    images = random_images(9, 1)
    assert torch.equal(features(images), images.flatten(1)[:, :3].float())


@pytest.mark.parametrize(
    "body, message",
    [
        ("return 1", r"must give a tensor \[4, D\]"),
        ("return x.float()", r"must give a tensor \[4, D\]"),
        ("return x.flatten(1)[:3].float()", r"must give a tensor \[4, D\]"),
        ("return x.flatten(1)", "finite floating-point numbers"),
        ("return x.flatten(1).float() / 0", "finite floating-point numbers"),
    ],
    ids=["a number", "four dimensions", "fewer rows", "integers", "infinite"],
)
def test_features_of_a_file_are_tried_on_four_images(tmp_path, body, message):
    with pytest.raises(neon.files.UserError, match=message):
        of_file(tmp_path, body)


FEATURES_THAT_CHANGE = {
    "fewer rows": "return x.flatten(1)[: 6 if len(x) == 7 else None, :3].float()",
    "one row squeezed": "return x.flatten(1)[:, :3].float().squeeze(0)",
    "other columns": "return x.flatten(1)[:, : 2 if len(x) == 7 else 3].float()",
    "elsewhere": "return x.flatten(1)[:, :3].float().to('meta' if len(x) == 7 else 'cpu')",
}


@pytest.mark.parametrize("body", FEATURES_THAT_CHANGE.values(), ids=FEATURES_THAT_CHANGE)
def test_features_of_a_file_keep_their_shape_and_place(tmp_path, body):
    features = of_file(tmp_path, body)
    count = 1 if "squeeze" in body else 7
    with pytest.raises(neon.files.UserError, match=rf"features\(\) of {count} images on cpu gave"):
        features(random_images(count))


def test_features_of_a_file_that_are_not_finite_are_refused(tmp_path):
    body = "return x.flatten(1)[:, :3].float().log()"
    features = of_file(tmp_path, body, torch.full((4, 1, 4, 4), 7))
    with pytest.raises(neon.files.UserError, match="not finite for some images"):
        features(torch.zeros(5, 1, 4, 4))


# -------------------- gradients


BROKEN_GRADIENTS = {
    "detached": lambda x: x.detach().flatten(1),
    "rounded": lambda x: x.to(torch.uint8).flatten(1),
    "flat": lambda x: x.flatten(1).sign() + 0 * x.flatten(1),
    "infinite": lambda x: x.flatten(1) + (x - x).sqrt().flatten(1),
}


@pytest.mark.parametrize("features", BROKEN_GRADIENTS.values(), ids=BROKEN_GRADIENTS)
def test_features_without_a_gradient_are_refused(features):
    with pytest.raises(neon.files.UserError, match="no gradient comes through mine"):
        neon.features.check_differentiable(features, random_images(4), "mine")


def test_features_whose_gradient_fails_are_refused():
    def features(x):
        y = x.flatten(1) * 1
        (y * y).sum().backward()  # frees the graph, and y changes after its use
        return y.exp_() * y.add_(1)

    with pytest.raises(neon.files.UserError, match="the gradient through mine fails"):
        neon.features.check_differentiable(features, random_images(4) // 100, "mine")


def test_features_with_a_gradient_pass():
    neon.features.check_differentiable(Flat(), random_images(4), "flat")


# -------------------- several networks as one


def test_joint_features_stand_side_by_side_with_equal_variance():
    """Each has the variance of a half, whatever its units and its number of features."""
    images = random_images(300)
    joint = neon.features.JointFeatures([Flat(), Other()], images)
    found = joint(random_images(50, 1))
    want = []
    for part in (Flat(), Other()):
        fitted = part(images).double().numpy()
        total = sum(np.var(column, ddof=1) for column in fitted.T)
        want.append(part(random_images(50, 1)).double().numpy() * (7 / 2 / total) ** 0.5)
    np.testing.assert_allclose(found, np.concatenate(want, 1), rtol=1e-5)
    assert joint.dim == 7 and joint.name == "flat+other" and joint.score == "FD (flat+other, 7-d)"


def test_joint_features_have_the_gradients_of_their_parts():
    images = random_images(3, 1).float().requires_grad_()
    parts = [neon.pixels(random_images(300)), neon.random_conv(1)]
    joint = neon.features.JointFeatures(parts, random_images(300))
    (found,) = torch.autograd.grad(joint(images).sum(), images)
    expected = torch.zeros_like(images)
    for part, scale in zip(parts, joint.scales, strict=True):
        expected += scale * torch.autograd.grad(part(images).sum(), images)[0]
    assert torch.allclose(found, expected, atol=1e-7) and found.abs().sum() > 0


def test_identity_of_joint_features_holds_parts_their_order_and_the_scaling_images():
    flat, other, images = Flat(), Other(), random_images(100)
    cases = [
        ([flat, other], images),
        ([other, flat], images),
        ([flat, neon.random_conv(1)], images),
        ([flat, other], images[:-1]),
    ]
    found = [neon.features.JointFeatures(parts, some).identity for parts, some in cases]
    assert len(set(found)) == len(found)
    assert neon.features.JointFeatures([flat, other], images.clone()).identity == found[0]


def test_features_that_do_not_vary_cannot_be_joined():
    class Constant(Flat):
        name = "constant"

        def __call__(self, images):
            return torch.ones(len(images), 4)

    with pytest.raises(neon.files.UserError, match="constant are the same for all real images"):
        neon.features.JointFeatures([Flat(), Constant()], random_images(50))


def test_features_of_many_images_come_in_their_order():
    images = random_images(600)
    assert torch.equal(neon.features.features_of_images(images, Flat(), "cpu"), Flat()(images))


def test_identity_of_a_file_is_its_content(tmp_path):
    features = of_file(tmp_path, "return x.flatten(1)[:, :3].float()")
    assert features.identity == neon.userfile.JudgeFile(Path(tmp_path / "mine.py")).identity
    other = of_file(tmp_path, "return x.flatten(1)[:, 1:4].float()")
    assert other.identity != features.identity
