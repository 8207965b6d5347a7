"""edm_neon.py: EDM's network, its sampler, loss and augmentation, and self-training."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edm_helpers import (
    KINDS,
    SIZE,
    ToyModel,
    ToyNet,
    edm_model,
    network,
    one_hot,
    preset,
    replace,
    toy_images,
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
        return edm.EDMPrecond(**edm.PRESETS["cifar10"].network)


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
    assert net.config == preset.network | wanted


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
    assert {m.dropout for m in net.modules() if isinstance(m, edm.UNetBlock)} == {0.3}
    assert all(torch.equal(a, base.state_dict()[name]) for name, a in net.state_dict().items())


def test_images_are_encoded_to_minus_one_and_one():
    encoded = edm_model().encode(torch.tensor([0, 255, 51], dtype=torch.uint8))
    torch.testing.assert_close(encoded, torch.tensor([-1.0, 1.0, -0.6]))


# -------------------- sampler, schedule, seeds
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


def test_seeds_are_edms():
    noise, labels = neon.sampling.draw_noise((3, 32, 32), 10, [0, 1, 2, 3], "cpu")
    assert labels.tolist() == [7, 9, 4, 3]
    want = [[-1.1258398, -1.1523602], [-1.5255959, -0.7502318]]
    np.testing.assert_allclose(noise[:2].flatten(1)[:, :2], want)


def test_seeds_repeat_after_2_to_the_32():
    noise, labels = neon.sampling.draw_noise((2,), 10, [5, 2**32 + 5], "cpu")
    assert torch.equal(noise[0], noise[1]) and labels[0] == labels[1]


def test_unconditional_networks_have_no_labels():
    assert neon.sampling.draw_noise((2,), 0, [5], "cpu")[1] is None


def test_balanced_labels_hold_every_class_once_a_cycle():
    labels = neon.sampling.balanced_labels(10, range(50_000, 50_200), "cpu").view(20, 10)
    assert labels.dtype == torch.int64
    assert torch.equal(labels.sort(1).values, torch.arange(10).expand(20, 10))
    assert len({tuple(cycle) for cycle in labels.tolist()}) == 20  # each in an order of its own


def test_balanced_labels_are_functions_of_the_seed():
    whole = neon.sampling.balanced_labels(7, range(100), "cpu")
    parts = [neon.sampling.balanced_labels(7, [seed], "cpu") for seed in range(100)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(neon.sampling.balanced_labels(7, [2**32 + 5], "cpu"), whole[5:6])


def test_every_fold_of_a_score_has_the_same_classes():
    seeds = neon.scores.SeedSet("selection", 10_000, 1000).seeds
    for fold in neon.sampling.balanced_labels(10, seeds, "cpu").tensor_split(neon.stats.FOLDS):
        assert fold.bincount(minlength=10).tolist() == [5] * 10


@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_labels_of_the_sampler(labels):
    seeds = [10, 11, 12, 13]
    sampler = neon.sampling.Sampler(
        edm_model(), network(), neon.processes.Processes("cpu"), 1, 4, labels
    )
    noise, drawn = neon.sampling.draw_noise((3, 16, 16), 10, seeds, "cpu")
    want = neon.sampling.balanced_labels(10, seeds, "cpu") if labels == "balanced" else drawn
    images, found = sampler.floats(seeds)
    assert torch.equal(found, want) and not torch.equal(
        drawn, neon.sampling.balanced_labels(10, seeds, "cpu")
    )
    assert torch.equal(images, edm_model().sample(sampler.net, noise, want, 1))


def edm_sampler_of(net, batch=16):
    return neon.sampling.Sampler(edm_model(), net, neon.processes.Processes("cpu"), 3, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_depend_on_the_batch(kind):
    """Float32 rounding may move a value across a grey level."""
    net = network(kind)
    sampler = edm_sampler_of(net)
    whole, _ = sampler.images(range(6))
    parts = torch.cat([sampler.images(part)[0] for part in ([0, 1], [2], [3, 4, 5])])
    assert whole.dtype == torch.uint8 and whole.shape == (6, 3, 16, 16)
    assert (whole.int() - parts.int()).abs().max() <= 1


def test_pixels_are_truncated_as_edms():
    net = network()
    sampler = edm_sampler_of(net)
    floats, labels = sampler.floats([3, 4])
    images, same = sampler.images([3, 4])
    want = np.clip(np.floor(floats.numpy() * 127.5 + 128), 0, 255)
    assert np.array_equal(images.numpy(), want) and torch.equal(labels, same)


def test_images_that_are_not_finite_are_refused():
    net = network()
    net.model.map_layer0.bias.data[0] = math.nan
    with pytest.raises(neon.processes.Diverged, match="images that are not finite"):
        edm_sampler_of(net).images([0, 1])


def test_sampler_works_on_a_copy():
    net = network().train().requires_grad_(True)
    placed = edm_sampler_of(net).net
    assert not placed.training and not any(p.requires_grad for p in placed.parameters())
    assert placed is not net and net.training and next(net.parameters()).requires_grad


# -------------------- precision
class Dtypes(nn.Module):
    """What the network computes in."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen = []

    def forward(self, x):
        half = torch.is_autocast_enabled("cpu")
        self.seen.append(torch.get_autocast_dtype("cpu") if half else torch.float32)
        out = self.layer(x)
        return out, [out]


@pytest.mark.parametrize(
    "precision, dtype",
    [
        ("fp32", torch.float32),
        ("tf32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
    ],
)
def test_precision_of_a_pass(precision, dtype):
    net = Dtypes()
    with neon.sampling.network_calls(net, precision):
        out, (same,) = net(torch.ones(1, 2))
        flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    assert net.seen == [dtype] and out.dtype == same.dtype == torch.float32
    assert flags == (precision == "tf32",) * 2


@pytest.mark.parametrize("precision", neon.config.PRECISIONS)
def test_network_is_itself_again_after_a_pass(precision):
    net = Dtypes()
    with pytest.raises(KeyError), neon.sampling.network_calls(net, precision, checkpointed=True):
        raise KeyError
    assert "forward" not in vars(net)
    net.forward = own = net.forward
    with neon.sampling.network_calls(net, precision, checkpointed=True):
        assert net.forward is not own
    assert net.forward is own


def test_checkpointed_passes_call_the_network_again_in_the_backward_pass():
    net = Dtypes()
    with neon.sampling.network_calls(net, "fp32", checkpointed=True):
        out, _ = net(torch.ones(1, 2, requires_grad=True))
        out.sum().backward()
    assert len(net.seen) == 2


def test_flags_of_a_pass_do_not_depend_on_history():
    for precision in ("tf32", "fp32"):
        with neon.sampling.network_calls(Dtypes(), precision):
            assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")


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


def test_loss_of_a_perfect_denoiser_is_zero():
    images = torch.randn(6, 3, 8, 8)
    assert float(edm.edm_loss(lambda x, *_: images, images, None, 0).abs().max()) == 0


def test_weight_of_the_loss():
    images = torch.randn(6, 3, 8, 8)
    torch.manual_seed(1)
    loss = edm.edm_loss(lambda x, *_: images + 1, images, None, 0)
    torch.manual_seed(1)
    sigma = (torch.randn(6, 1, 1, 1) * 1.2 - 1.2).exp()
    torch.testing.assert_close(loss, ((sigma**2 + 0.25) / (sigma * 0.5) ** 2).expand_as(loss))


def test_noise_of_the_loss_has_the_level_the_network_is_told():
    seen = []

    def net(x, sigma, labels, augment_labels):
        seen.append((x, sigma, labels, augment_labels))
        return x

    labels = torch.eye(10)[:4]
    edm.edm_loss(net, torch.zeros(4, 3, 64, 64), labels, 0)
    ((x, sigma, same, augment_labels),) = seen
    torch.testing.assert_close(x.std((1, 2, 3)), sigma.flatten(), rtol=0.05, atol=0)
    assert same is labels and augment_labels is None


def test_loss_augments_and_tells_the_network_how(pictures):
    seen = []

    def net(x, sigma, labels, augment_labels):
        seen.append(augment_labels)
        return 0 * x

    edm.edm_loss(net, pictures, None, 0.9)
    assert seen[0].shape == (4, 9) and seen[0].any()


@pytest.mark.parametrize("probability", [0, 0.5])
def test_model_augments_as_it_is_told(monkeypatch, pictures, probability):
    asked = []
    replace(monkeypatch, "augment", lambda x, p: asked.append(p) or (x, torch.zeros(4, 9)))
    loss = edm_model(augment=probability).loss(network(), pictures, torch.arange(4))
    assert loss.shape == pictures.shape and asked == [0.5] * bool(probability)


# -------------------- self-training: averages, order, gradients
def test_average_keeps_half_over_its_half_life():
    assert neon.train.ema_beta(512, 500_000) == pytest.approx(0.99929047, abs=1e-8)
    assert neon.train.ema_beta(100, 100) == pytest.approx(0.5)


@pytest.mark.parametrize("seen, half_life", [(6400, 320), (10**9, 500_000)])
def test_half_life_grows_with_what_was_seen(seen, half_life):
    assert neon.train.ema_beta(64, 500_000, seen, 0.05) == pytest.approx(0.5 ** (64 / half_life))


def test_average_without_half_life_keeps_nothing():
    assert neon.train.ema_beta(64, 0) == 0 and neon.train.ema_beta(64, 500, 0, 0.05) == 0


def test_every_epoch_is_a_permutation():
    order = neon.train.shuffled(torch.arange(30), 10, 1).view(3, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in order)
    assert not torch.equal(order[0], order[1])


def test_order_depends_on_the_seed():
    positions = torch.arange(20)
    assert not torch.equal(
        neon.train.shuffled(positions, 20, 1), neon.train.shuffled(positions, 20, 2)
    )


def test_order_is_a_function_of_the_position():
    order = neon.train.shuffled(torch.arange(30), 10, 1)
    assert torch.equal(neon.train.shuffled(torch.arange(13, 17), 10, 1), order[13:17])
    assert neon.train.shuffled(torch.arange(0), 10, 1).shape == (0,)


@pytest.mark.parametrize(
    "value, cleaned", [(math.nan, 0.0), (math.inf, 1e5), (-math.inf, -1e5), (3e5, 3e5)]
)
def test_gradients_that_overflow_are_cleaned(value, cleaned):
    net = nn.Linear(2, 1, bias=False)
    factor = torch.tensor([value, 2.0])
    model = SimpleNamespace(loss=lambda net, x, labels: (net.weight * factor).sum(1))
    neon.train.gradients_of_step(
        model, net, [0], None, [net.weight], neon.processes.Processes("cpu"), 1
    )
    assert net.weight.grad.tolist() == [[cleaned, 2.0]]


def test_gradient_is_the_mean_over_the_batch():
    net = nn.Linear(3, 1, bias=False)
    model = SimpleNamespace(loss=lambda net, x, labels: net(x))
    x = torch.randn(5, 3)
    for _ in range(2):  # nothing adds up over steps
        neon.train.gradients_of_step(
            model, net, x, None, [net.weight], neon.processes.Processes("cpu"), 5
        )
    torch.testing.assert_close(net.weight.grad, x.mean(0, keepdim=True))


@pytest.mark.parametrize("shares", [(3, 2), (5, 0)], ids=["uneven", "a rank without images"])
def test_gradient_over_two_ranks_is_that_of_one(monkeypatch, shares):
    """One parameter is used by no loss: it must not shift the others."""
    net = nn.ParameterList([torch.zeros(3), torch.zeros(2), torch.zeros(4)])
    model = SimpleNamespace(loss=lambda net, x, labels: x[:, :3] @ net[0] + x[:, 3:] @ net[2])
    x = torch.randn(5, 7)
    parts = x.split(shares)
    sums = []

    def both(flat):
        sums.append(flat.clone())
        if len(sums) == 2:
            flat.copy_(sums[0] + sums[1])

    monkeypatch.setattr(torch.distributed, "all_reduce", both)
    for rank, part in enumerate(parts):
        processes = neon.processes.Processes("cpu", rank, 2)
        neon.train.gradients_of_step(model, net, part, None, list(net), processes, 5)
    found = [p.grad.clone() for p in net]
    neon.train.gradients_of_step(model, net, x, None, list(net), neon.processes.Processes("cpu"), 5)
    torch.testing.assert_close(found[0], net[0].grad)
    torch.testing.assert_close(found[2], net[2].grad)
    assert not found[1].any() and net[1].grad is None


# -------------------- self-training: the loop
class Walker(nn.Module):
    """Every step moves the parameter by the learning rate: its gradient is always one."""

    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(1))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self):
        if self.training:
            self.calls += 1
        return self.at * 1.0


class WalkerModel:
    """Records what every step saw."""

    encodes = False

    def __init__(self):
        self.steps = []

    def encode(self, images):
        return images.float()

    def loss(self, net, x, labels):
        out = net()
        step = SimpleNamespace(
            images=x[:, 0, 0, 0].tolist(),
            labels=None if labels is None else labels.tolist(),
            random=float(torch.rand(1)),
            at=float(net.at.detach()),
            training=net.training,
        )
        self.steps.append(step)
        return out.expand(len(x))


def recipe(**changes):
    options = {"name": "t", "batch": 20, "lr": 0.01, "ramp_kimg": 0, "ema_kimg": 0.1, "seed": 3}
    return neon.train.Recipe(**options | changes)


def walk(tmp_path, snapshots=(1,), processes=None, model=None, net=None, labels=True, **changes):
    """Train the walker on 40 images whose pixels are their numbers -> model, saved averages."""
    model, net = model or WalkerModel(), net or Walker()
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    numbers = torch.arange(40) + 100 if labels else None
    saved = {}

    def save(ema, kimg):
        assert not ema.training
        saved[kimg] = copy.deepcopy(ema)

    neon.train.train(
        *(
            model,
            net,
            images,
            numbers,
            recipe(**changes),
            processes or neon.processes.Processes("cpu"),
        ),
        *(tmp_path / "state.pt", list(snapshots), save),
    )
    return model, saved


def test_training_sees_every_image_once_an_epoch(tmp_path):
    steps = walk(tmp_path)[0].steps
    assert len(steps) == 50
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert sorted(first.images + second.images) == list(range(40))


def test_order_of_the_images_is_that_of_the_seed(tmp_path):
    steps = walk(tmp_path)[0].steps
    want = neon.train.shuffled(torch.arange(1000), 40, 3)
    assert [image for step in steps for image in step.images] == want.tolist()


def test_labels_go_with_their_images(tmp_path):
    for step in walk(tmp_path)[0].steps:
        assert step.labels == [image + 100 for image in step.images]


def test_training_without_labels(tmp_path):
    assert {step.labels for step in walk(tmp_path, labels=False)[0].steps} == {None}


def test_every_step_has_its_own_random_stream(tmp_path):
    assert len({step.random for step in walk(tmp_path)[0].steps}) == 50


def test_random_stream_does_not_depend_on_history(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    streams = []
    for folder, seed in ((one, 5), (other, 6)):
        torch.manual_seed(seed)
        streams.append([step.random for step in walk(folder)[0].steps])
    assert streams[0] == streams[1]


def test_random_stream_depends_on_the_training_seed(tmp_path):
    (tmp_path / "other").mkdir()
    ours = walk(tmp_path)[0].steps
    theirs = walk(tmp_path / "other", seed=4)[0].steps
    assert not {step.random for step in ours} & {step.random for step in theirs}


def test_ranks_share_a_batch_and_have_their_own_random_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: None)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda outcome: None)
    steps, files = [], []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        model, saved = walk(
            tmp_path / str(rank), processes=neon.processes.Processes("cpu", rank, 2)
        )
        steps.append(model.steps)
        files.append([*saved, *(tmp_path / str(rank)).iterdir()])
    (tmp_path / "alone").mkdir()
    whole = walk(tmp_path / "alone")[0].steps
    for ours, theirs, both in zip(*steps, whole, strict=True):
        assert both.images[::2] == ours.images and both.images[1::2] == theirs.images
        assert ours.random != theirs.random
    assert len(files[0]) == 2 and files[1] == []  # the first rank writes


def positions(steps):
    """Where the walker was before every step."""
    return np.array([step.at for step in steps])


def test_learning_rate_grows_from_zero_and_stays(tmp_path):
    moved = -np.diff(positions(walk(tmp_path, ramp_kimg=0.5)[0].steps))  # [49]
    want = 0.01 * np.minimum(np.arange(49) * 20 / 500, 1)
    np.testing.assert_allclose(moved, want, rtol=1e-3, atol=1e-7)


def test_without_a_ramp_only_the_first_step_is_idle(tmp_path):
    moved = -np.diff(positions(walk(tmp_path)[0].steps))
    np.testing.assert_allclose(moved, [0] + [0.01] * 48, rtol=1e-3, atol=1e-7)


def test_average_is_that_of_the_weights(tmp_path):
    model, saved = walk(tmp_path)
    at = positions(model.steps)
    after = np.append(at[1:], at[-1] - 0.01)  # [50] after every step
    average, beta = 0.0, 0.5 ** (20 / 100)
    for value in after:
        average = beta * average + (1 - beta) * value
    assert float(saved[1].at) == pytest.approx(average, rel=1e-4)


def test_average_of_a_base_follows_what_was_seen(tmp_path):
    model, saved = walk(tmp_path, ramp_ratio=0.05)
    at = positions(model.steps)
    average = 0.0
    for step, value in enumerate(np.append(at[1:], at[-1] - 0.01)):
        half_life = min(100, step * 20 * 0.05)
        beta = 0.5 ** (20 / half_life) if half_life else 0
        average = beta * average + (1 - beta) * value
    assert float(saved[1].at) == pytest.approx(average, rel=1e-4)


def test_buffers_of_the_average_are_the_trained_networks(tmp_path):
    net = Walker()
    _, saved = walk(tmp_path, net=net)
    assert float(net.calls) == float(saved[1].calls) == 50


def test_snapshots_are_taken_when_their_images_were_seen(tmp_path):
    model, saved = walk(tmp_path, snapshots=(1, 2, 3), batch=30)
    assert [*saved] == [1, 2, 3] and len(model.steps) == 100
    values = [float(net.at) for net in saved.values()]
    assert values[0] > values[1] > values[2]
    assert model.steps[-1].training


@pytest.mark.parametrize("snapshots", [(1,), (0.5, 1), (1, 2)])
def test_training_past_a_snapshot_does_not_change_it(tmp_path, snapshots):
    (tmp_path / "alone").mkdir()
    alone = walk(tmp_path / "alone")[1][1].at
    assert torch.equal(walk(tmp_path, snapshots=snapshots)[1][1].at, alone)


def test_frozen_parameters_stay(tmp_path):
    net = Walker()
    net.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    _, saved = walk(tmp_path, net=net)
    assert float(saved[1].frozen) == 1 and not net.frozen.requires_grad


def test_parameters_that_may_all_not_learn_are_all_trained(tmp_path):
    """A base as it is loaded."""
    _, saved = walk(tmp_path, net=Walker().requires_grad_(False))
    assert float(saved[1].at) < 0


def test_training_precision(tmp_path):
    seen = []

    class Precise(WalkerModel):
        def loss(self, net, x, labels):
            seen.append(torch.backends.cuda.matmul.allow_tf32)
            return super().loss(net, x, labels)

    walk(tmp_path, model=Precise(), precision="tf32")
    assert set(seen) == {True}


def test_encoder_runs_once_for_all_images(tmp_path):
    class Encoder(WalkerModel):
        encodes = True
        calls = 0

        def encode(self, images):
            assert images.dtype == torch.uint8
            Encoder.calls += len(images)
            return images.float() + 0.5

    steps = walk(tmp_path, model=Encoder())[0].steps
    assert Encoder.calls == 40 and sorted(steps[0].images + steps[1].images)[0] == 0.5


class Dying(Exception):
    pass


def train_toy(folder, model=None, stop_after=None, snapshots=(1, 2)):
    """Self-training of a toy or an EDM network, killed after some steps -> {kimg: state}."""
    folder.mkdir(exist_ok=True)
    model = model or ToyModel()
    if isinstance(model, ToyModel):
        torch.manual_seed(1)
        net, (images, labels) = ToyNet(), toy_images(count=50)
    else:
        net = model.trainable(network(), neon.config.Config(dropout=0.13))
        images = torch.randint(
            0, 256, (50, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        labels = torch.arange(50) % 10
    calls, real, saved = [], model.loss, {}

    def loss(*args):
        calls.append(1)
        if stop_after and len(calls) > stop_after:
            raise Dying
        return real(*args)

    model.loss = loss
    how = recipe(lr=1e-3, ramp_kimg=1, batch=25)
    neon.train.train(
        *(model, net, images, labels, how, neon.processes.Processes("cpu"), folder / "state.pt"),
        *(list(snapshots), lambda ema, kimg: saved.update({kimg: copy.deepcopy(ema).state_dict()})),
    )
    return saved


@pytest.mark.parametrize("stop_after", [30, 45, 60], ids="after step {}".format)
def test_training_resumes_to_the_same_bytes(tmp_path, stop_after):
    straight = train_toy(tmp_path / "straight")
    with pytest.raises(Dying):
        train_toy(tmp_path / "stopped", stop_after=stop_after)
    resumed = train_toy(tmp_path / "stopped")
    assert all(torch.equal(tensor, resumed[2][name]) for name, tensor in straight[2].items())
    assert not torch.equal(straight[1]["enc.0.weight"], straight[2]["enc.0.weight"])


def test_training_of_edms_network_resumes_to_the_same_bytes(tmp_path):
    """Dropout, augmentation and noise draw from the stream of their step."""
    straight = train_toy(tmp_path / "straight", edm_model(augment=0.12), snapshots=(0.2,))
    with pytest.raises(Dying):
        train_toy(tmp_path / "stopped", edm_model(augment=0.12), stop_after=5, snapshots=(0.2,))
    resumed = train_toy(tmp_path / "stopped", edm_model(augment=0.12), snapshots=(0.2,))
    assert all(torch.equal(tensor, resumed[0.2][name]) for name, tensor in straight[0.2].items())
    assert not torch.equal(
        straight[0.2]["model.map_layer0.weight"], network().model.map_layer0.weight
    )


def test_resumed_training_repeats_no_step(tmp_path):
    """It goes on at the last saved state: a quarter of the way, here."""
    with pytest.raises(Dying):
        train_toy(tmp_path, stop_after=30)
    model = ToyModel()
    calls, real = [], model.loss
    model.loss = lambda *args: calls.append(1) or real(*args)
    train_toy(tmp_path, model)
    assert len(calls) == 80 - 20


def test_damaged_state_is_refused(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"no")
    with pytest.raises(neon.files.UserError, match="state.pt is damaged, delete it"):
        walk(tmp_path)


def test_training_improves_the_network(tmp_path):
    model = ToyModel()
    images, labels = toy_images(count=50)
    saved = train_toy(tmp_path)
    trained = ToyNet()
    trained.load_state_dict(saved[2])

    def loss(net):
        torch.manual_seed(0)
        return float(model.loss(net, model.encode(images), labels).detach().mean())

    torch.manual_seed(1)
    start = ToyNet()
    assert loss(trained) < loss(start)
