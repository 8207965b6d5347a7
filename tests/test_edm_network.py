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
def test_without_noise_the_denoiser_is_the_identity(kind):
    net, x = network(kind), torch.randn(3, 3, 16, 16)
    small = net(x, torch.tensor([1e-6]), one_hot(net, torch.arange(3)))
    torch.testing.assert_close(small, x, rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size, multipliers, blocks", [(8, [1, 2], 1), (32, [2, 2, 2], 2)])
def test_shapes(kind, size, multipliers, blocks):
    options = {"img_resolution": size, "channel_mult": multipliers, "num_blocks": blocks}
    net = network(kind, **options)
    x = torch.randn(2, 3, size, size)
    assert net(x, torch.ones(2), one_hot(net, torch.arange(2))).shape == x.shape


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


@pytest.mark.parametrize("probability", [0, 0.5])
def test_model_augments_as_it_is_told(monkeypatch, pictures, probability):
    asked = []
    replace(monkeypatch, "augment", lambda x, p: asked.append(p) or (x, torch.zeros(4, 9)))
    loss = edm_model(augment=probability).loss(network(), pictures, torch.arange(4))
    assert loss.shape == pictures.shape and asked == [0.5] * bool(probability)


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


def test_sampler_finds_the_distribution():
    images = edm.edm_sampler(Gaussian(), torch.randn(500, 1, 2, 2))
    assert float(images.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(images.std()) == pytest.approx(0.2, rel=0.1)  # 18 steps leave it 6 % too wide


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
