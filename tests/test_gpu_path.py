"""The GPU path, as far as a machine without one can tell: nothing stays behind on the CPU, and the
compiled network gives the eager one's images."""

import math

import numpy as np
import pytest
import torch
from edm_helpers import CIFAR as TINY
from edm_helpers import NCSNPP as NCSN

import adaptive_neon as neon
import edm_neon as edm
import neon_ext


def network(seed=0, **options):
    torch.manual_seed(seed)
    net = edm.EDMPrecond(**{**TINY, **options})
    for p in net.parameters():  # initial output layers are almost zero; make every parameter matter
        p.data += 0.05 * torch.randn_like(p)
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------- another device than the CPU
# "meta" stands for the GPU: its tensors have no content, and refuse to meet tensors of the CPU.
def there(*shape, dtype=torch.float32):
    return torch.empty(*shape, device="meta", dtype=dtype)


def network_there(**options):
    return edm.EDMPrecond(**{**TINY, **options}).eval().requires_grad_(False).to("meta")


@pytest.mark.parametrize(
    "options", [{}, NCSN, {"label_dim": 0}], ids=["ddpmpp", "ncsnpp", "uncond"]
)
def test_the_sampler_stays_on_its_device(options):
    net = network_there(**options)
    labels = there(2, 10) if net.label_dim else None
    images = edm.edm_sampler(net, there(2, 3, 16, 16), labels, 3)
    assert images.device.type == "meta" and images.shape == (2, 3, 16, 16)
    assert neon.sampling.to_pixels(images).to(torch.uint8).device.type == "meta"


@pytest.mark.parametrize("options", [{}, NCSN], ids=["ddpmpp", "ncsnpp"])
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


# ---------------------------------------------------------------- the compiled network, on the CPU
@pytest.fixture(scope="module")
def compiled():
    """A sampler of the padded and compiled kind, and one of the plain kind."""
    torch._dynamo.reset()
    base = network()
    model = edm.EdmModel(edm.PRESETS["cifar10"], neon.config.Config(device="cpu"))
    processes = neon.processes.Processes("cpu")
    fast = neon.sampling.Sampler(model, base, processes, 2, 4, compiled=True)
    plain = neon.sampling.Sampler(model, base, processes, 2, 4)
    fast.images(range(4))
    return fast, plain, base


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_and_eager_networks_give_the_same_images(compiled):
    fast, plain, _ = compiled
    ours, labels = fast.images(range(4))
    theirs, other_labels = plain.images(range(4))
    assert (ours.int() - theirs.int()).abs().max() <= 1  # rounding across a step of 255
    assert torch.equal(labels, other_labels)


def test_an_incomplete_batch_makes_no_new_graph(compiled):
    fast, plain, _ = compiled
    before = graphs()
    few, labels = fast.images([7, 8])
    assert graphs() == before and few.shape == (2, 3, 16, 16) and labels.shape == (2,)
    assert (few.int() - plain.images([7, 8])[0].int()).abs().max() <= 1


def test_rewritten_weights_reach_the_compiled_code_without_a_new_graph(compiled):
    fast, plain, base = compiled
    other = network(1)
    owners = neon.blocks.partition_owners(fast.model, base, "paper")
    before = graphs()
    for w in (-1.0, 0.5):
        images = []
        for sampler in (fast, plain):
            neon.blocks.Merger(base, other, owners, sampler).set(
                dict.fromkeys(("enc", "mid", "dec"), w)
            )
            images.append(sampler.images(range(4))[0].int())
        assert (images[0] - images[1]).abs().max() <= 1
    assert graphs() == before


def test_gradients_pass_the_compiled_network(compiled):
    fast, plain, base = compiled
    grads = []
    for sampler in (fast, plain):
        sampler.net.load_state_dict(base.state_dict())
        sampler.net.requires_grad_(True)
        with neon.sampling.network_calls(sampler.net, "fp32", checkpointed=True):
            images, _ = sampler.floats(range(2), 2)
        weight = sampler.net.model.map_layer0.weight
        grads.append(torch.autograd.grad(images.square().sum(), weight)[0])
        sampler.net.requires_grad_(False)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4 * float(grads[1].abs().max()))


# ---------------------------------------------------------------- memory and several processes
def test_a_gradient_halves_its_batch_where_memory_ends():
    seen = []

    def work(batch, part):
        seen.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError("no memory")
        return len(part)

    parts = neon.search.halving(work, np.arange(8), 8, neon.processes.Processes("cpu", world=1))
    assert sum(parts) == 8 and set(seen) == {8, 4, 2}


def test_one_image_that_does_not_fit_is_an_error():
    def work(batch, part):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        neon.search.halving(work, np.arange(4), 4, neon.processes.Processes("cpu"))


@pytest.mark.parametrize(
    "precision, tf32", [("tf32", True), ("fp32", False), ("bf16", False), ("fp16", False)]
)
def test_tf32_is_set_by_the_pass_not_by_history(precision, tf32):
    net = network()
    torch.backends.cuda.matmul.allow_tf32 = not tf32
    with neon.sampling.network_calls(net, precision):
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
        assert torch.backends.cudnn.allow_tf32 is tf32


def test_half_precision_is_left_behind_after_the_pass():
    net = network()
    x, sigma = torch.randn(2, 3, 16, 16), torch.ones(2)
    exact = net(x, sigma)
    with neon.sampling.network_calls(net, "bf16"):
        rough = net(x, sigma)
    assert torch.equal(net(x, sigma), exact)
    assert rough.dtype == torch.float32 and 0 < float((rough - exact).abs().max()) < 0.2
    assert math.isfinite(float(rough.sum()))
