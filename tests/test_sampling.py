"""edm_neon.py: EDM's network, its sampler, loss and augmentation, and self-training."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edm_helpers import (
    KINDS,
    edm_model,
    network,
)
from torch import nn

import adaptive_neon as neon
import edm_neon as edm

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
