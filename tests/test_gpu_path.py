"""The GPU path, as far as a machine without one can tell: nothing stays behind on the CPU, and the
compiled network gives the eager one's images."""

import math

import pytest
import torch
from edm_helpers import CIFAR, NCSNPP, ToyModel, edm_model, network, owners_of, pair, toy_pair

import edm_neon as edm
import neon_ext
from adaptive_neon.blocks import Merger
from adaptive_neon.networks import EDMPrecond
from adaptive_neon.sampling import Sampler, network_calls, to_pixels

# -------------------- another device than the CPU
# "meta" stands for the GPU: its tensors have no content, and refuse to meet tensors of the CPU.


def there(*shape, dtype=torch.float32):
    return torch.empty(*shape, device="meta", dtype=dtype)


def network_there(**options):
    return EDMPrecond(**{**CIFAR, **options}).eval().requires_grad_(False).to("meta")


@pytest.mark.parametrize(
    "options", [{}, NCSNPP, {"label_dim": 0}], ids=["ddpmpp", "ncsnpp", "uncond"]
)
def test_the_sampler_stays_on_its_device(options):
    net = network_there(**options)
    labels = there(2, 10) if net.label_dim else None
    images = edm.edm_sampler(net, there(2, 3, 16, 16), labels, 3)
    assert images.device.type == "meta" and images.shape == (2, 3, 16, 16)
    assert to_pixels(images).to(torch.uint8).device.type == "meta"


@pytest.mark.parametrize("options", [{}, NCSNPP], ids=["ddpmpp", "ncsnpp"])
def test_loss_and_gradient_stay_on_their_device(options):
    net = network_there(**options).train().requires_grad_(True)
    loss = edm.edm_loss(net, there(2, 3, 16, 16), there(2, 10), 0)
    loss.sum().backward()
    grads = [p.grad for name, p in net.named_parameters() if "map_augment" not in name]
    assert loss.device.type == "meta" and all(grad.device.type == "meta" for grad in grads)


def test_affine_maps_stay_on_their_device():
    G, labels = edm.draw_affine(4, 0.12, 16, 16, "meta")
    assert G.device.type == labels.device.type == "meta" and labels.shape == (4, 7)


def test_extrapolation_stays_on_its_device():
    merged = neon_ext.extrapolate(
        [there(3, 3), there(5)], [there(3, 3), there(5)], [0, 1], [0.5, 1]
    )
    assert [part.device.type for part in merged] == ["meta", "meta"]


# -------------------- the compiled network, on the CPU


class Samplers:
    """A sampler of the padded and compiled kind, and one of the plain kind."""

    def __init__(self, model, base, other, blocks):
        torch._dynamo.reset()
        self.base, self.other, self.blocks = base, other, blocks
        self.fast = Sampler(model, base, 2, 4, compiled=True)
        self.plain = Sampler(model, base, 2, 4)
        self.fast.batch_images(range(4))

    def both(self):
        return self.fast, self.plain


def samplers_of(kind):
    if kind == "toy":
        return Samplers(ToyModel(), *toy_pair(), lambda name: name[:3])
    base, other = pair(kind)
    owners = owners_of(edm_model(), base, "paper")
    return Samplers(edm_model(), base, other, owners.__getitem__)


@pytest.fixture(scope="module", params=["toy", pytest.param("cifar", marks=pytest.mark.slow)])
def samplers(request):
    return samplers_of(request.param)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def close(ours, theirs):
    """Up to rounding across a grey level."""
    return (ours.int() - theirs.int()).abs().max() <= 1


def test_compiled_and_eager_networks_give_the_same_images(samplers):
    ours, labels = samplers.fast.batch_images(range(4))
    theirs, other_labels = samplers.plain.batch_images(range(4))
    assert close(ours, theirs) and torch.equal(labels, other_labels)
    assert graphs() > 0


def test_an_incomplete_batch_makes_no_new_graph(samplers):
    before = graphs()
    few, labels = samplers.fast.batch_images([7, 8])
    assert graphs() == before and len(few) == 2 and labels.shape == (2,)
    assert close(few, samplers.plain.batch_images([7, 8])[0])


@pytest.mark.parametrize("w", [-1.0, 0.5])
def test_rewritten_weights_reach_the_compiled_code_without_a_new_graph(samplers, w):
    before = graphs()
    images = []
    for sampler in samplers.both():
        merger = Merger(samplers.base, samplers.other, samplers.blocks)
        merger.attach(sampler.net)
        merger.set(w)
        images.append(sampler.batch_images(range(4))[0])
        sampler.write(samplers.base)
    assert close(*images) and graphs() == before
    assert not close(images[1], samplers.plain.batch_images(range(4))[0])


@pytest.mark.slow
def test_gradients_pass_the_compiled_network(samplers):
    grads = []
    for sampler in samplers.both():
        sampler.net.requires_grad_(True)
        with network_calls(sampler.net, "fp32", checkpointed=True):
            images, _ = sampler.floats(range(2), 2)
        total = images.square().sum()
        grads.append(torch.autograd.grad(total, [*sampler.net.parameters()], allow_unused=True))
        sampler.net.requires_grad_(False)
    assert [grad is None for grad in grads[0]] == [grad is None for grad in grads[1]]
    for ours, theirs in zip(*grads, strict=True):
        if ours is not None:
            torch.testing.assert_close(
                ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max())
            )


# -------------------- half precision


def test_half_precision_is_left_behind_after_the_pass():
    net = network()
    x, sigma = torch.randn(2, 3, 16, 16), torch.ones(2)
    exact = net(x, sigma)
    with network_calls(net, "bf16"):
        rough = net(x, sigma)
    assert torch.equal(net(x, sigma), exact)
    assert rough.dtype == torch.float32 and 0 < float((rough - exact).abs().max()) < 0.2
    assert math.isfinite(float(rough.sum()))
