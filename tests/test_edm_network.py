"""What edm_neon.py promises of EDM's network, its sampler, loss and augmentation."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edm_helpers import (
    KINDS,
    SIZE,
    edm_model,
    network,
    one_hot,
    owners_of,
    preset,
    replace,
)
from torch import nn

import adaptive_neon as neon
import edm_neon as edm

# -------------------- network and preconditioning


# Channels of pixel (3, 5) of two images. The network's arithmetic was compared with EDM's own
# code when these were recorded; float32 sums differ in the last digits between machines.
OUTPUTS = {
    "cifar": [-0.0115, -0.67762, 0.78117, 0.03575, 0.13518, -0.09962],
    "ncsnpp": [-0.21376, -0.62737, 0.59809, -0.21454, -0.10151, 0.08318],
    "uncond": [-0.16811, -0.55162, 0.68816, 0.10832, -0.32064, -0.33842],
    "adm": [-0.24797, -0.95139, 0.73063, 0.12389, -0.22149, 0.04185],
}


def call(net):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    labels = one_hot(net, torch.tensor([1, 7]))
    return net(x, torch.tensor([0.5, 3.0]), labels, torch.randn(2, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_outputs(kind):
    found = call(network(kind))[:, :, 3, 5].flatten()
    np.testing.assert_allclose(found, OUTPUTS[kind], atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_preconditioning_is_edms_table_1(kind):
    net, x = network(kind), torch.randn(3, 3, 16, 16)
    labels = one_hot(net, torch.arange(3))
    sigma = torch.tensor([0.5, 2.0, 30.0])
    total = (sigma**2 + 0.25).view(-1, 1, 1, 1)
    inner = net.model(x / total.sqrt(), sigma.log() / 4, labels)
    want = 0.25 / total * x + sigma.view(-1, 1, 1, 1) * 0.5 / total.sqrt() * inner
    torch.testing.assert_close(net(x, sigma, labels), want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def cifar10_network():
    with torch.device("meta"):
        return neon.networks.EDMPrecond(**edm.PRESETS["cifar10"].network)


def test_cifar10_network_has_edms_size(cifar10_network):
    assert sum(p.numel() for p in cifar10_network.parameters()) == 55_735_299
    assert len(cifar10_network.state_dict()) == 427


@pytest.mark.parametrize(
    "name",
    [
        "model.map_label.weight",
        "model.map_augment.weight",
        "model.enc.16x16_down.skip.weight",
        "model.enc.16x16_down.conv0.resample_filter",
        "model.dec.8x8_in0.qkv.weight",
        "model.dec.32x32_aux_conv.bias",
    ],
)
def test_cifar10_network_has_edms_names(cifar10_network, name):
    assert name in cifar10_network.state_dict()


def test_attention_is_where_edm_has_it():
    """At a level with attention: every block of the encoder, the last of the decoder; and at the
    bottom the first."""
    net = network(num_blocks=2)
    found = {
        name.split(".")[1] + "." + name.split(".")[2] for name in net.state_dict() if "qkv" in name
    }
    assert found == {"enc.8x8_block0", "enc.8x8_block1", "dec.8x8_block2", "dec.4x4_in0"}


def test_attention_is_softmax_over_pixels():
    block = network().model.enc["8x8_block0"]
    x = torch.randn(2, 32, 8, 8)
    qkv = block.qkv(block.norm2(x)).reshape(2, 32, 3, 64).double()
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [N, C, pixels]
    attention = torch.einsum("ncq,nck->nqk", q, k / 32**0.5).softmax(2)
    a = torch.einsum("nqk,nck->ncq", attention, v).float().reshape(x.shape)
    torch.testing.assert_close(block.attend(x), (block.proj(a) + x) / 2**0.5, rtol=1e-4, atol=1e-5)


def test_labels_are_scaled_by_the_root_of_their_number():
    net = network().model
    c_noise, labels = torch.tensor([0.2]), torch.eye(10)[[4]]
    shifted = copy.deepcopy(net)
    shifted.map_label.bias.data += 10**0.5 * net.map_label.weight[:, 4]
    torch.testing.assert_close(
        net.embed(c_noise, labels, None), shifted.embed(c_noise, 0 * labels, None)
    )


def test_missing_labels_are_zeros():
    net, x = network(), torch.randn(2, 3, 16, 16)
    assert torch.equal(net(x, torch.ones(2)), net(x, torch.ones(2), torch.zeros(1, 10)))


def test_dropout_acts_in_training_alone():
    net = network()
    assert torch.equal(call(net), call(net))
    assert not torch.equal(call(net.train()), call(net.eval()))


def test_in_place_operations_do_not_change_the_result_with_gradients():
    net = network()
    with torch.no_grad():
        without = call(net)
    with torch.enable_grad():
        torch.testing.assert_close(call(net), without)


@pytest.mark.parametrize("options", [{"encoder_type": "skip"}, {"decoder_type": "skip"}])
def test_unknown_parts_are_refused(options):
    with pytest.raises(neon.files.UserError, match="'skip'"):
        network(**options)


# -------------------- what the pipeline asks of EDM's networks


def test_model_knows_its_shapes_and_classes():
    model, net = edm_model(), network()
    assert model.noise_shape(net) == model.image_shape(net) == (3, 16, 16)
    assert model.classes(net) == 10 and model.classes(network("uncond")) == 0


def test_created_network_fits_the_images():
    model = edm_model(dropout=0.2)
    images, labels = torch.zeros(6, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 4, 1, 2, 3, 4])
    net = model.create(images, labels, neon.config.Config(dropout=0.2))
    wanted = {"img_resolution": 16, "img_channels": 3, "label_dim": 5, "dropout": 0.2}
    assert net.config == preset.network | wanted | neon.networks.EDMPrecond.attributes


@pytest.mark.parametrize(
    "shape, labels, message",
    [
        ((1, SIZE, SIZE), None, "has no labels"),
        ((1, SIZE + 1, SIZE + 1), torch.zeros(4, dtype=torch.int64), "network needs squares"),
        ((1, SIZE, 2 * SIZE), torch.zeros(4, dtype=torch.int64), "network needs squares"),
    ],
    ids=["labels", "odd", "oblong"],
)
def test_images_that_no_network_can_be_made_for(shape, labels, message):
    images = torch.zeros(4, *shape, dtype=torch.uint8)
    with pytest.raises(neon.files.UserError, match=message):
        edm_model().create(images, labels, neon.config.Config(data="images.zip"))


def test_trained_copy_has_the_dropout_asked_for():
    base = network(dropout=0.0)
    net = edm_model().trainable(base, neon.config.Config(dropout=0.3))
    assert {m.dropout for m in net.modules() if isinstance(m, neon.networks.UNetBlock)} == {0.3}
    assert all(torch.equal(a, base.state_dict()[name]) for name, a in net.state_dict().items())


def test_images_are_encoded_to_minus_one_and_one():
    encoded = edm_model().encode(torch.tensor([0, 255, 51], dtype=torch.uint8))
    torch.testing.assert_close(encoded, torch.tensor([-1.0, 1.0, -0.6]))


# -------------------- augmentation and loss


@pytest.fixture
def pictures(generator):
    return torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1


def warp_by(images, rows):
    return edm.warp(images, torch.tensor([[*rows, [0.0, 0.0, 1.0]]]).repeat(len(images), 1, 1))


def test_warp_by_the_identity(pictures):
    """The wavelet's filters reconstruct exactly."""
    torch.testing.assert_close(
        warp_by(pictures, [[1, 0, 0], [0, 1, 0]]), pictures, rtol=0, atol=1e-5
    )


@pytest.fixture
def smooth():
    """A wave of less than one period: the filters' phase hardly shows."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    return torch.sin(2 * x + y)[None, None]


def shifted(x):
    return x.roll((-3, 2), (2, 3))


def quarter_turn(x):
    return x.rot90(1, (2, 3))


def mirrored(x):
    return x.flip(3)


@pytest.mark.parametrize(
    "rows, moved",
    [
        ([[1, 0, -2], [0, 1, 3]], shifted),
        ([[0, -1, 0], [1, 0, 0]], quarter_turn),
        ([[-1, 0, 0], [0, 1, 0]], mirrored),
    ],
    ids=["shift", "quarter turn", "mirror"],
)
def test_warp_moves_pixels_as_its_map_says(smooth, rows, moved):
    """Output pixel p is read at input pixel G p, both from the centre; without the border, where
    the content comes from outside."""
    found, want = (x[:, :, 4:-4, 4:-4] for x in (warp_by(smooth, rows), moved(smooth)))
    torch.testing.assert_close(found, want, rtol=0, atol=0.06)
    assert (want - smooth[:, :, 4:-4, 4:-4]).abs().max() > 0.1


def test_warp_of_whole_pixels_is_exact(pictures):
    found, want = warp_by(pictures, [[1, 0, -2], [0, 1, 3]]), shifted(pictures)
    torch.testing.assert_close(found[:, :, :-3, 2:], want[:, :, :-3, 2:], rtol=0, atol=1e-4)


def test_augmentation_without_probability_changes_nothing(pictures):
    torch.manual_seed(0)
    same, labels = edm.augment(pictures, 0.0)
    assert labels.shape == (4, 9) and not labels.any()
    torch.testing.assert_close(same, pictures, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def many_labels():
    torch.manual_seed(0)
    return edm.augment(torch.zeros(3000, 1, 8, 8), 0.12)[1]


@pytest.mark.parametrize(
    "column, share",
    [(0, 0.5), (1, 0.06), (2, 0.12), (4, 0.12), (5, 0.12), (6, 0.06), (7, 0.12), (8, 0.12)],
    ids=["x-flip", "y-flip", "zoom", "rotation", "stretch", "axis", "x", "y"],
)
def test_how_often_each_augmentation_acts(many_labels, column, share):
    active = (many_labels[:, column].abs() > 1e-7).double().mean()
    assert float(active) == pytest.approx(share, abs=3.5 * (share * (1 - share) / 3000) ** 0.5)


def test_labels_of_a_rotation(many_labels):
    """cos - 1 and sin of one angle."""
    cos, sin = many_labels[:, 3] + 1, many_labels[:, 4]
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(3000), rtol=0, atol=1e-5)


@pytest.mark.parametrize("column, axis", [(0, 3), (1, 2)], ids=["x-flip", "y-flip"])
def test_flips_are_what_their_labels_say(pictures, column, axis):
    images = pictures[:1].repeat(100, 1, 1, 1)
    torch.manual_seed(3)
    found, labels = edm.augment(images, 0.12)
    alone = (labels[:, column] == 1) & (labels.abs().sum(1) == 1)
    assert alone.any()
    want = images[:1].flip(axis).expand(int(alone.sum()), -1, -1, -1)
    torch.testing.assert_close(found[alone], want, rtol=0, atol=1e-4)


def draw(column):
    """Maps and labels of draws in which only this augmentation acts."""
    torch.manual_seed(4)
    maps, labels = edm.draw_affine(2000, 0.12, 16, 16, "cpu")
    others = [c for c in range(7) if c not in column]
    alone = (labels[:, others].abs() < 1e-7).all(1) & (labels[:, column].abs() > 1e-7).any(1)
    assert alone.sum() > 20
    return maps[alone].double(), labels[alone].double()


def test_map_of_a_zoom():
    maps, labels = draw([0])
    torch.testing.assert_close(maps[:, 0, 0], 2 ** (-0.2 * labels[:, 0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(maps[:, 1, 1], maps[:, 0, 0])


def test_map_of_a_rotation():
    maps, labels = draw([1, 2])
    torch.testing.assert_close(maps[:, 0, 0], labels[:, 1] + 1, rtol=0, atol=1e-6)
    torch.testing.assert_close(maps[:, 1, 0], labels[:, 2], rtol=0, atol=1e-6)


def test_map_of_a_stretch():
    """Area is kept, and the length along the axis grows by 2^0.2t."""
    maps, labels = draw([3, 4])
    stretch = labels[:, 3:5].norm(dim=1)
    torch.testing.assert_close(
        torch.linalg.det(maps), torch.ones(len(maps)).double(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        torch.linalg.svdvals(maps[:, :2, :2])[:, 0], 2 ** (0.2 * stretch), rtol=1e-5, atol=0
    )


def test_map_of_a_shift():
    maps, labels = draw([5, 6])
    torch.testing.assert_close(maps[:, :2, 2], -labels[:, 5:] * 2, rtol=1e-5, atol=1e-6)


def test_draws_of_the_augmentation_are_edms(pictures):
    """Recorded when the order of the draws was compared with EDM's."""
    torch.manual_seed(0)
    torch.rand(4, 3, 16, 16)
    _, labels = edm.augment(pictures, 0.12)
    assert labels[:, 0].tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(labels[1, 7:], [-0.1071111, 0.4976200], rtol=1e-5)
    np.testing.assert_allclose(labels[2, 3:5], [-0.1202330, 0.4754052], rtol=1e-5)


class Answers:
    """A denoiser that is a function."""

    draw_sigma = neon.networks.EDMPrecond.draw_sigma
    loss_weight = neon.networks.EDMPrecond.loss_weight

    def __init__(self, answer, sigma_data=0.5):
        self.answer, self.sigma_data = answer, sigma_data

    def __call__(self, *inputs):
        return self.answer(*inputs)


def test_loss_of_a_perfect_denoiser_is_zero():
    images = torch.randn(6, 3, 8, 8)
    net = Answers(lambda x, *_: images)
    assert float(edm.edm_loss(net, images, None, 0).abs().max()) == 0


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_weight_of_the_loss(sigma_data):
    images = torch.randn(6, 3, 8, 8)
    torch.manual_seed(1)
    loss = edm.edm_loss(Answers(lambda x, *_: images + 1, sigma_data), images, None, 0)
    torch.manual_seed(1)
    sigma = (torch.randn(6, 1, 1, 1) * 1.2 - 1.2).exp()
    expected = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    torch.testing.assert_close(loss, expected.expand_as(loss))


SIGMAS = {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 1.0}


@pytest.mark.parametrize("where", ["argument", "attribute"])
def test_a_trainable_network_keeps_the_preconditioning(where):
    base = network(**(SIGMAS if where == "argument" else {}))
    for name, value in SIGMAS.items():
        setattr(base, name, value)
    model = edm_model()
    net = model.trainable(base, neon.config.Config(dropout=0.3))
    assert {name: getattr(net, name) for name in SIGMAS} == SIGMAS
    x, sigma, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 2.0]), torch.eye(10)[:2]
    torch.testing.assert_close(net.eval()(x, sigma, labels), base(x, sigma, labels))


@pytest.mark.parametrize("name", SIGMAS)
def test_the_preconditioning_is_in_the_hash_of_a_network(name):
    net = network()
    before = neon.keys.weights_hash(net)
    assert before == neon.keys.weights_hash(network())
    setattr(net, name, SIGMAS[name])
    assert before != neon.keys.weights_hash(net)


def test_noise_of_the_loss_has_the_level_the_network_is_told():
    seen = []

    def net(x, sigma, labels, augment_labels):
        seen.append((x, sigma, labels, augment_labels))
        return x

    labels = torch.eye(10)[:4]
    edm.edm_loss(Answers(net), torch.zeros(4, 3, 64, 64), labels, 0)
    ((x, sigma, same, augment_labels),) = seen
    torch.testing.assert_close(x.std((1, 2, 3)), sigma.flatten(), rtol=0.05, atol=0)
    assert same is labels and augment_labels is None


def test_loss_augments_and_tells_the_network_how(pictures):
    seen = []

    def net(x, sigma, labels, augment_labels):
        seen.append(augment_labels)
        return 0 * x

    edm.edm_loss(Answers(net), pictures, None, 0.9)
    assert seen[0].shape == (4, 9) and seen[0].any()


@pytest.mark.parametrize(
    "probability, dim, augmented",
    [(0.5, 9, True), (0.0, 9, False), (0.5, 0, False), (0.5, 4, False)],
    ids=["asked for", "not asked for", "no labels", "other labels"],
)
def test_networks_are_augmented_that_can_be_told_how(
    monkeypatch, pictures, probability, dim, augmented
):
    """Any other would learn to make augmented images; without, it has the key of --augment 0."""
    asked = []
    replace(monkeypatch, "augment", lambda x, p: asked.append(p) or (x, torch.zeros(4, 9)))
    model, net = edm_model(augment=probability), network(augment_dim=dim)
    model.start_check(net, neon.config.Config(augment=probability), True)
    assert model.loss(net, pictures, torch.arange(4)).shape == pictures.shape
    assert asked == [0.5] * augmented
    plain = edm_model(augment=0.0)
    assert (model.training_identity == plain.training_identity) == (not augmented)
    assert len(model.notes) == (dim != 9) and plain.notes == []


# -------------------- schedule and sampler


def test_schedule_values():
    want = [80, 57.586, 40.7856, 28.3746, 19.3525, 12.9101, 8.40094, 5.31519, 3.25682, 1.92334]
    want += [1.08817, 0.585348, 0.296442, 0.139516, 0.0599473, 0.0229345, 0.00752802, 0.002, 0]
    np.testing.assert_allclose(edm.sigma_steps(network()), want, rtol=1e-5)


def test_schedule_stays_within_the_networks_range():
    net = SimpleNamespace(sigma_min=0.1, sigma_max=10.0, round_sigma=torch.as_tensor)
    steps = edm.sigma_steps(net, 5)
    assert steps.tolist()[::4] == pytest.approx([10, 0.1]) and float(steps[-1]) == 0


class Gaussian(nn.Module):
    """The exact denoiser of N(0.3, 0.2^2) data."""

    sigma_min, sigma_max = 0, math.inf
    round_sigma = staticmethod(torch.as_tensor)

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, sigma, labels=None):
        self.seen.append((x.dtype, float(sigma)))
        return (0.04 * x.double() + sigma**2 * 0.3) / (0.04 + sigma**2)


def test_sampler_is_heuns_method():
    latents, net = torch.randn(500, 1, 2, 2), Gaussian()
    t = edm.sigma_steps(net, 18)
    x = latents.double() * t[0]
    for now, then in zip(t[:-1], t[1:], strict=True):
        d = (x - net(x.float(), now)) / now
        ahead = x + (then - now) * d
        if then == 0:
            x = ahead
        else:
            x = x + (then - now) * (d + (ahead - net(ahead.float(), then)) / then) / 2
    torch.testing.assert_close(edm.edm_sampler(net, latents), x, rtol=0, atol=1e-12)


def test_sampler_calls_the_network_twice_a_step_in_float32():
    net = Gaussian()
    edm.edm_sampler(net, torch.randn(2, 1, 2, 2), num_steps=4)
    assert len(net.seen) == 7 and {dtype for dtype, _ in net.seen} == {torch.float32}


def test_labels_reach_the_network():
    net = network()
    noise = torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1)
    one, other = edm_model().sample(net, noise, torch.tensor([1, 2]), 2)
    assert (one - other).abs().max() > 1e-3


def test_one_hot_labels():
    assert edm.one_hot(network(), torch.tensor([2, 0])).tolist() == torch.eye(10)[[2, 0]].tolist()
    assert edm.one_hot(network("uncond"), None) is None


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
def test_residual_path_of_ncsnpp_convolves_before_it_filters(taps):
    conv = neon.networks.Conv(3, 5, 3, down=True, fused=True, resample_filter=taps)
    x, f = torch.randn(2, 3, 8, 8), torch.tensor(taps) / sum(taps)
    h = nn.functional.conv2d(x, conv.weight, padding=1 + (len(taps) - 1) // 2)
    h = torch.einsum("nchijw,w->nchij", h.unfold(2, len(taps), 2).unfold(3, len(taps), 2), f) @ f
    torch.testing.assert_close(conv(x), h + conv.bias[:, None, None])


# -------------------- ADM


def adm_by_hand(state, options, x, c_noise, labels, augment_labels):
    """ADM's F(x [N, C, H, W]) in float64, from its description and a state dict alone."""

    def linear(name, x, bias=True):
        return x @ state[f"{name}.weight"].T + (state[f"{name}.bias"] if bias else 0)

    def conv(name, x):
        weight = state[f"{name}.weight"]
        return nn.functional.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[2] // 2)

    def norm(name, x):
        n, c = x.shape[:2]
        groups = x.reshape(n, min(32, c // 4), -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
        x = ((groups - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
        return x * state[f"{name}.weight"].view(-1, 1, 1) + state[f"{name}.bias"].view(-1, 1, 1)

    def silu(x):
        return x / (1 + (-x).exp())

    def resampled(x, name):
        if "_up" in name:
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if "_down" in name:
            n, c, h, w = x.shape
            return x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
        return x

    def attended(name, x):
        n, c, h, w = x.shape
        qkv = conv(f"{name}.qkv", norm(f"{name}.norm2", x)).reshape(n, c // 64, 64, 3, h * w)
        q, k, v = qkv.unbind(3)
        shares = torch.einsum("nhcq,nhck->nhqk", q, k / 8).softmax(3)
        return x + conv(f"{name}.proj", torch.einsum("nhqk,nhck->nhcq", shares, v).reshape(x.shape))

    def block(name, x):
        h = conv(f"{name}.conv0", resampled(silu(norm(f"{name}.norm0", x)), name))
        scale, shift = linear(f"{name}.affine", e)[:, :, None, None].chunk(2, 1)
        h = conv(f"{name}.conv1", silu(norm(f"{name}.norm1", h) * (1 + scale) + shift))
        x = resampled(x, name)
        x = h + (conv(f"{name}.skip", x) if f"{name}.skip.weight" in state else x)
        return attended(name, x) if f"{name}.qkv.weight" in state else x

    # Embedding: cosines first, frequencies down to just above 1 / 10000; the label's comes last.
    half = options["model_channels"] // 2
    angles = c_noise[:, None] * 10000 ** (-torch.arange(half) / half)
    e = torch.cat([angles.cos(), angles.sin()], 1)
    e = e + linear("map_augment", augment_labels, bias=False)
    e = linear("map_layer1", silu(linear("map_layer0", e)))
    e = silu(e + linear("map_label", labels, bias=False))

    blocks = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in state))
    skips = []
    for name in (name for name in blocks if name.startswith("enc")):
        x = conv(name, x) if name.endswith("_conv") else block(name, x)
        skips.append(x)
    for name in (name for name in blocks if name.startswith("dec")):
        if "_block" in name:
            x = torch.cat([x, skips.pop()], 1)
        x = block(name, x)
    return conv("out_conv", silu(norm("out_norm", x)))


def test_adm_is_what_its_description_says():
    net = network("adm").model
    x, c_noise = torch.randn(3, 3, 16, 16), torch.tensor([-0.7, 0.2, 1.0])
    labels, augment_labels = torch.eye(10)[[2, 0, 9]], torch.randn(3, 9)
    state = {name: tensor.double() for name, tensor in net.state_dict().items()}
    want = adm_by_hand(
        state, KINDS["adm"], *(t.double() for t in (x, c_noise, labels, augment_labels))
    )
    torch.testing.assert_close(net(x, c_noise, labels, augment_labels).double(), want, **CLOSE)


CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def imagenet_network():
    with torch.device("meta"):
        return edm.PRESETS["imagenet64"].untrained()


def test_imagenet_network_has_edms_size(imagenet_network):
    """Counted with EDM's own code."""
    assert sum(p.numel() for p in imagenet_network.parameters()) == 295_899_267
    assert len(imagenet_network.state_dict()) == 553


def test_adm_has_edms_names_in_edms_order():
    names = [name.removeprefix("model.") for name in network("adm").state_dict()]
    tops = list(dict.fromkeys(name.split(".")[0] for name in names))
    assert tops == [
        *("map_augment", "map_layer0", "map_layer1", "map_label"),
        *("enc", "dec", "out_norm", "out_conv"),
    ]
    down = [name for name in names if name.startswith("enc.8x8_down.")]
    assert [name.partition("down.")[2] for name in down] == [
        *("norm0.weight", "norm0.bias"),
        *("conv0.weight", "conv0.bias", "conv0.resample_filter"),
        *("affine.weight", "affine.bias", "norm1.weight", "norm1.bias"),
        *("conv1.weight", "conv1.bias", "skip.resample_filter"),
    ]


def test_adm_attends_in_every_block_of_a_level():
    names = network("adm", num_blocks=2).state_dict()
    found = {name.split(".qkv")[0].removeprefix("model.") for name in names if "qkv" in name}
    assert found == {
        *("enc.8x8_block0", "enc.8x8_block1", "dec.4x4_in0"),
        *("dec.8x8_block0", "dec.8x8_block1", "dec.8x8_block2"),
    }


def test_adm_narrower_than_a_head_has_no_attention():
    assert not any("qkv" in name for name in network("adm", channel_mult=[1, 1, 1]).state_dict())


def test_adm_begins_as_its_authors_say():
    """Residual branches and the output are zero; all else is uniform up to 1 / sqrt(inputs)."""
    torch.manual_seed(0)
    net = neon.networks.denoiser(**KINDS["adm"])
    for name, p in net.named_parameters():
        layer = name.split(".")[-2]
        if layer in ("conv1", "proj", "out_conv", "map_augment"):
            assert not p.any(), name
        elif layer == "map_label":
            assert float(p.detach().std()) == pytest.approx(1, abs=0.1)
        elif p.ndim > 1:
            bound = p[0].numel() ** -0.5
            assert float(p.detach().abs().max()) == pytest.approx(bound, rel=0.05)
            assert float(p.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)


ADM_BLOCKS = {
    "model.map_label.weight": ("mid", "mid", "map"),
    "model.map_layer1.bias": ("mid", "mid", "map"),
    "model.enc.16x16_conv.weight": ("enc", "enc", "enc.16x16_conv"),
    "model.enc.8x8_down.affine.bias": ("enc", "enc", "enc.8x8_down"),
    "model.enc.4x4_block0.conv0.weight": ("mid", "mid", "enc.4x4_block0"),
    "model.dec.4x4_in0.qkv.weight": ("mid", "mid", "dec.4x4_in0"),
    "model.dec.4x4_block1.norm0.weight": ("mid", "dec", "dec.4x4_block1"),
    "model.dec.8x8_up.conv0.weight": ("dec", "dec", "dec.8x8_up"),
    "model.out_norm.weight": ("dec", "dec", "out"),
    "model.out_conv.bias": ("dec", "dec", "out"),
}


@pytest.mark.parametrize("name", ADM_BLOCKS)
def test_blocks_and_layers_of_adm(name):
    net, found = network("adm"), []
    assert name in dict(net.named_parameters())
    for partition in ("paper", "structural", "layers"):
        found.append(owners_of(edm_model(), net, partition)[name])
    assert tuple(found) == ADM_BLOCKS[name]


@pytest.mark.parametrize("kind, eps", [("cifar", 1e-6), ("ncsnpp", 1e-6), ("adm", 1e-5)])
def test_what_a_normalisation_adds_to_the_variance(kind, eps):
    norms = [layer for layer in network(kind).modules() if isinstance(layer, nn.GroupNorm)]
    assert {norm.eps for norm in norms} == {eps}


@pytest.mark.parametrize("kind", ["cifar", "adm"])
def test_label_dropout_takes_labels_in_training_alone(kind):
    net = network(kind, label_dropout=0.2, dropout=0.0)
    labels = torch.eye(10)[:1].expand(64, -1)
    same = torch.randn(1, 3, 16, 16).expand(64, -1, -1, -1)
    rows = net.train()(same, torch.ones(64), labels)
    without = net.eval()(same[:1], torch.ones(1), 0 * labels[:1])
    dropped = (rows - without).abs().amax((1, 2, 3)) < 1e-4
    assert 3 < int(dropped.sum()) < 25
    assert (net(same, torch.ones(64), labels) - without).abs().amax((1, 2, 3)).min() > 1e-3


# -------------------- EDM's older preconditionings


SMALL = {"channel_mult": [1, 2], "num_blocks": 1, "img_resolution": 8, "attn_resolutions": []}


def older(precond, **changes):
    return network("uncond", precond=precond, **SMALL | changes)


def vp_coefficients(sigma):
    t = ((0.1**2 + 2 * 19.9 * math.log(1 + sigma**2)) ** 0.5 - 0.1) / 19.9
    return -sigma, (1 + sigma**2) ** -0.5, 999 * t


def ve_coefficients(sigma):
    return sigma, 1, math.log(sigma / 2)


def noise_levels():
    """Of improved DDPM, the largest first."""
    u = [0.0]
    for j in range(1000, 0, -1):
        alphas = [math.sin(math.pi * i / 2016) ** 2 for i in (j - 1, j)]
        u.append(((u[-1] ** 2 + 1) / max(alphas[0] / alphas[1], 0.001) - 1) ** 0.5)
    return np.array(u[::-1])


def iddpm_coefficients(sigma):
    nearest = int(np.abs(noise_levels() - sigma).argmin())
    return -sigma, (1 + sigma**2) ** -0.5, 999 - nearest


COEFFICIENTS = {
    "VPPrecond": vp_coefficients,
    "VEPrecond": ve_coefficients,
    "iDDPMPrecond": iddpm_coefficients,
}


@pytest.mark.parametrize("precond", COEFFICIENTS)
def test_older_preconditionings_are_those_of_table_1(precond):
    net, x = older(precond), torch.randn(3, 3, 8, 8)
    sigmas = [0.05, 1.3, 40.0]
    found = net(x, torch.tensor(sigmas))
    for row, image, sigma in zip(found, x, sigmas, strict=True):
        c_out, c_in, c_noise = COEFFICIENTS[precond](sigma)
        inner = net.model(c_in * image[None], torch.tensor([float(c_noise)]), None)[0, :3]
        torch.testing.assert_close(row, image + c_out * inner, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "precond, low, high",
    [("VPPrecond", 0.001, 152.167), ("VEPrecond", 0.02, 100), ("iDDPMPrecond", 0.00642, 20291)],
)
def test_range_of_older_preconditionings(precond, low, high):
    net = older(precond)
    assert net.sigma_min == pytest.approx(low, rel=0.05)  # float32 leaves VP's two digits
    assert net.sigma_max == pytest.approx(high, rel=1e-3)


def test_noise_levels_of_iddpm_are_a_table():
    net = older("iDDPMPrecond")
    np.testing.assert_allclose(net.u, noise_levels(), rtol=1e-4)
    levels = net.round_sigma(torch.tensor([0.9, 20.0], dtype=torch.float64))
    assert levels.dtype == torch.float64 and set(levels.tolist()) <= set(net.u.tolist())
    assert levels.tolist() == pytest.approx([0.9, 20.0], rel=0.01)


@pytest.mark.parametrize("precond", COEFFICIENTS)
def test_noise_levels_of_older_trainings(precond):
    """VP: t is uniform; VE: ln sigma is; improved DDPM: every level as often."""
    net = older(precond)
    torch.manual_seed(0)
    sigma = net.draw_sigma(20_000, "cpu").flatten().double()
    if precond == "VPPrecond":
        place = torch.tensor([vp_coefficients(float(s))[2] / 999 for s in sigma])
    elif precond == "VEPrecond":
        place = (sigma / 0.02).log() / math.log(5000)
    else:
        place = torch.bucketize(sigma, torch.tensor(noise_levels()[::-1].copy()) * 1.0001) / 1000
        assert float(sigma.min()) > 0
    even = torch.linspace(0, 1, 20_000).double()
    assert float((place.sort().values - even).abs().max()) < 0.02
    torch.testing.assert_close(net.loss_weight(sigma), sigma**-2)


def test_network_of_iddpm_is_trained_in_its_first_half_alone():
    net = older("iDDPMPrecond").train().requires_grad_(True)
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    edm.edm_loss(net, images, None, 0).sum().backward()
    last = net.model.dec["8x8_aux_conv"].weight.grad
    assert last[:3].any() and not last[3:].any()


@pytest.mark.parametrize("precond", COEFFICIENTS)
def test_a_trainable_copy_keeps_the_older_preconditioning(precond):
    base = older(precond, sigma_min=0.03)
    net = edm_model().trainable(base, neon.config.Config(dropout=0.3)).eval()
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    torch.testing.assert_close(net(x, sigma), base(x, sigma))
    assert type(net) is type(base) and net.sigma_min == 0.03
    assert neon.keys.weights_hash(net.model) == neon.keys.weights_hash(base.model)


# -------------------- the stochastic sampler


CHURN = {"S_churn": 9.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.1}


def draws(noise):
    """One prepared noise after the other."""
    return iter(noise).__next__


def test_stochastic_sampler_is_algorithm_2():
    net, n = Gaussian(), 8
    latents = torch.randn(40, 1, 2, 2)
    noise = torch.randn(n, 40, 1, 2, 2, dtype=torch.float64)
    t = edm.sigma_steps(net, n)
    x, churned = latents.double() * t[0], 0
    for i in range(n):
        now, then = float(t[i]), float(t[i + 1])
        gamma = min(9 / n, 2**0.5 - 1) if 0.05 <= now <= 50 else 0
        churned += gamma > 0
        hat = now * (1 + gamma)
        x = x + (hat**2 - now**2) ** 0.5 * 1.1 * noise[i]
        d = (x - net(x.float(), torch.tensor(hat))) / hat
        ahead = x + (then - hat) * d
        if then:
            slope = (ahead - net(ahead.float(), torch.tensor(then))) / then
            ahead = x + (then - hat) * (d + slope) / 2
        x = ahead
    found = edm.edm_sampler(net, latents, num_steps=n, **CHURN, draw=draws(noise))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4)
    assert 0 < churned < n


def test_little_churn_is_spread_over_the_steps():
    """gamma is S_churn / steps where that is less than sqrt(2) - 1."""
    net = Gaussian()
    edm.edm_sampler(net, torch.randn(2, 1, 2, 2), num_steps=4, S_churn=0.8, draw=lambda: 0.0)
    assert net.seen[0][1] == pytest.approx(80 * 1.2)


def churning(**options):
    options = {"s_churn": 9.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.1} | options
    return edm_model(**options)


def test_noise_of_every_step_is_the_seeds_as_edm_draws_it():
    """From one generator a seed: the latent, the label, then noise in double precision."""
    net, seeds = network("cifar"), [7, 3]
    sampler = neon.sampling.Sampler(churning(), net, 4, labels="random")
    latents, labels, noise = [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        latents.append(torch.randn(3, 16, 16, generator=generator))
        labels.append(torch.randint(10, [], generator=generator))
        kind = {"generator": generator, "dtype": torch.float64}
        noise.append(torch.stack([torch.randn(3, 16, 16, **kind) for _ in range(4)]))
    hot = torch.eye(10)[torch.stack(labels)]
    more = draws(torch.stack(noise, 1))
    want = edm.edm_sampler(net, torch.stack(latents), hot, 4, **CHURN, draw=more)
    torch.testing.assert_close(sampler.floats(seeds)[0], want)


def test_noise_of_every_step_does_not_depend_on_the_batch():
    sampler = neon.sampling.Sampler(churning(), network("uncond"), 3)
    together, _ = sampler.floats([5, 6, 7])
    torch.testing.assert_close(sampler.floats([6])[0], together[1:2], rtol=0, atol=1e-4)
    assert (together[1] - edm_sample(network("uncond"), 6, 3)).abs().max() > 0.01


def edm_sample(net, seed, steps):
    return neon.sampling.Sampler(edm_model(), net, steps).floats([seed])[0][0]


@pytest.mark.parametrize("option", ["s_churn", "s_min", "s_max", "s_noise"])
def test_the_stochastic_sampler_is_in_every_key(option):
    plain = edm_model().identity
    assert edm_model(s_min=0.05, s_max=50.0, s_noise=1.003).identity == plain == "edm, Heun, 1"
    assert len({plain, churning().identity, churning(**{option: 2.0}).identity}) == 3
