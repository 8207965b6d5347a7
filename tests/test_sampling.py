"""What adaptive_neon/sampling.py promises."""

import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from edm_helpers import KINDS, ToyModel, edm_model, network, replace, toy_pair
from torch import nn

import adaptive_neon as neon
from adaptive_neon.files import UserError
from adaptive_neon.processes import Diverged, Processes
from adaptive_neon.sampling import Model, Sampler, balanced_labels, draw_noise, network_calls

CPU = Processes("cpu")


# -------------------- noise and labels of a seed


def test_seeds_are_edms():
    noise, labels = draw_noise((3, 32, 32), 10, [0, 1, 2, 3], "cpu")
    assert labels.tolist() == [7, 9, 4, 3]
    want = [[-1.1258398, -1.1523602], [-1.5255959, -0.7502318]]
    np.testing.assert_allclose(noise[:2].flatten(1)[:, :2], want)


def test_seeds_repeat_after_2_to_the_32():
    noise, labels = draw_noise((2,), 10, [5, 2**32 + 5], "cpu")
    assert torch.equal(noise[0], noise[1]) and labels[0] == labels[1]


def test_unconditional_networks_have_no_labels():
    assert draw_noise((2,), 0, [5], "cpu")[1] is None


def test_balanced_labels_hold_every_class_once_a_cycle():
    labels = balanced_labels(10, range(50_000, 50_200), "cpu").view(20, 10)
    assert labels.dtype == torch.int64
    assert torch.equal(labels.sort(1).values, torch.arange(10).expand(20, 10))
    assert len({tuple(cycle) for cycle in labels.tolist()}) == 20  # each in an order of its own


def test_balanced_labels_are_functions_of_the_seed():
    whole = balanced_labels(7, range(100), "cpu")
    parts = [balanced_labels(7, [seed], "cpu") for seed in range(100)]
    assert torch.equal(whole, torch.cat(parts))


def test_balanced_labels_repeat_after_2_to_the_32():
    one, other = balanced_labels(7, [5, 2**32 + 5], "cpu")
    assert one == other


def test_no_seed_repeats_before_2_to_the_32():
    ours, theirs = range(49), range(2**31, 2**31 + 49)
    assert not torch.equal(
        draw_noise((2,), 7, ours, "cpu")[0], draw_noise((2,), 7, theirs, "cpu")[0]
    )
    labels = [balanced_labels(7, seeds, "cpu") for seeds in (ours, theirs)]
    assert not torch.equal(*labels)


def test_every_fold_of_a_score_has_the_same_classes():
    seeds = neon.seeds.SeedSet("selection", 10_000, 1000).seeds
    for fold in balanced_labels(10, seeds, "cpu").tensor_split(neon.stats.FOLDS):
        assert fold.bincount(minlength=10).tolist() == [5] * 10


@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_labels_of_the_sampler(labels):
    seeds = [10, 11, 12, 13]
    sampler = Sampler(edm_model(), network(), 1, 4, labels)
    noise, drawn = draw_noise((3, 16, 16), 10, seeds, "cpu")
    balanced = balanced_labels(10, seeds, "cpu")
    want = balanced if labels == "balanced" else drawn
    images, found = sampler.floats(seeds)
    assert torch.equal(found, want) and not torch.equal(drawn, balanced)
    assert torch.equal(images, edm_model().sample(sampler.net, noise, want, 1))


# -------------------- images of seeds


def edm_sampler_of(net):
    return Sampler(edm_model(), net, 3, 16)


def toy_sampler(batch=16, processes=None, compiled=None, model=None):
    return Sampler(model or ToyModel(), toy_pair()[0], 1, batch, "balanced", processes, compiled)


@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_depend_on_the_batch(kind):
    """Float32 rounding may move a value across a grey level."""
    sampler = edm_sampler_of(network(kind))
    whole, _ = sampler.batch_images(range(6))
    parts = torch.cat([sampler.batch_images(part)[0] for part in ([0, 1], [2], [3, 4, 5])])
    assert whole.dtype == torch.uint8 and whole.shape == (6, 3, 16, 16)
    assert (whole.int() - parts.int()).abs().max() <= 1


def test_images_at_any_number_of_seeds_are_those_of_one_batch():
    seeds = [9, 4, 7, 30, 1, 2, 5]
    images, labels = toy_sampler(batch=3).images(seeds)
    want, want_labels = toy_sampler().batch_images(seeds)
    assert torch.equal(labels, want_labels)
    assert (images.int() - want.int()).abs().max() <= 1


def test_images_without_classes_have_no_labels():
    images, labels = edm_sampler_of(network("uncond")).images([0, 1, 2])
    assert len(images) == 3 and labels is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_are_taken_in_the_precision_asked_for(monkeypatch, precision):
    asked = []

    def watched(net, precision):
        asked.append(precision)
        return network_calls(net, precision)

    replace(monkeypatch, "network_calls", watched)
    toy_sampler().images([0, 1], precision)
    assert asked == [precision]


def test_pixels_are_truncated_as_edms():
    sampler = edm_sampler_of(network())
    floats, labels = sampler.floats([3, 4])
    images, same = sampler.batch_images([3, 4])
    want = np.clip(np.floor(floats.numpy() * 127.5 + 128), 0, 255)
    assert np.array_equal(images.numpy(), want) and torch.equal(labels, same)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_that_are_not_finite_are_refused(value):
    sampler = toy_sampler()
    sampler.model.sample = lambda net, noise, labels, steps: noise.index_fill(
        0, torch.tensor([1]), value
    )
    with pytest.raises(Diverged, match="images that are not finite"):
        sampler.batch_images([0, 1])


def test_sampler_works_on_a_copy():
    net = network().train().requires_grad_(True)
    placed = edm_sampler_of(net).net
    assert not placed.training and not any(p.requires_grad for p in placed.parameters())
    assert placed is not net and net.training and next(net.parameters()).requires_grad


def test_sampler_takes_over_another_networks_weights_and_buffers():
    base, aux = toy_pair()
    sampler = toy_sampler()
    sampler.write(aux)
    assert not torch.equal(sampler.net.offset, base.offset)
    for name, tensor in sampler.net.state_dict().items():
        assert torch.equal(tensor, aux.state_dict()[name]), name


class Counting(ToyModel):
    """The toy, whose memory holds `fits` samples; keeps the sizes it was asked for."""

    def __init__(self, fits=10**9):
        self.fits, self.sizes = fits, []

    def sample(self, net, noise, labels, steps):
        self.sizes.append((len(noise), steps))
        if len(noise) > self.fits:
            raise torch.OutOfMemoryError("no memory")
        return super().sample(net, noise, labels, steps)


@pytest.fixture
def one_worker(monkeypatch):
    """One batch at a time."""
    replace(monkeypatch, "usable_cores", lambda: 1)


def test_incomplete_batches_of_a_compiled_network_are_padded(monkeypatch):
    """There is one graph; the surplus images are dropped."""
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    sampler = toy_sampler(4, compiled=True, model=Counting())
    images, labels = sampler.images(range(6))
    assert {size for size, _ in sampler.model.sizes} == {4}
    want, want_labels = toy_sampler().batch_images(range(6))
    assert torch.equal(labels, want_labels) and (images.int() - want.int()).abs().max() <= 1


def test_padding_is_to_the_batch_that_fits(monkeypatch, one_worker):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    sampler = toy_sampler(8, compiled=True, model=Counting(4))
    assert len(sampler.images(range(10))[0]) == 10
    assert [size for size, _ in sampler.model.sizes] == [8, 4, 4, 4]


def test_batches_of_an_eager_network_are_as_large_as_they_are(one_worker):
    sampler = toy_sampler(4, model=Counting())
    sampler.images(range(5))
    assert [size for size, _ in sampler.model.sizes] == [3, 2]


# -------------------- where the memory is too small


@pytest.mark.parametrize("fits, batch", [(4, 4), (3, 2), (1, 1), (16, 16)])
def test_batch_is_halved_until_it_fits_and_stays_so(one_worker, fits, batch):
    sampler = toy_sampler(16, model=Counting(fits))
    first, _ = sampler.images(range(32))
    assert sampler.batch == batch
    refused = len(sampler.model.sizes)
    again, _ = sampler.images(range(32, 64))
    assert {size for size, _ in sampler.model.sizes[refused:]} == {batch}
    want, _ = toy_sampler().batch_images(range(64))
    assert (torch.cat([first, again]).int() - want.int()).abs().max() <= 1


def test_one_image_that_does_not_fit_is_an_error(one_worker):
    with pytest.raises(torch.OutOfMemoryError):
        toy_sampler(4, model=Counting(0)).images(range(4))


def test_batches_become_smaller_until_they_fit(one_worker, capsys):
    def work(part, batch):
        if batch > 4:
            raise torch.OutOfMemoryError
        return part.tolist(), batch

    results, batch = neon.sampling.with_smaller_batches(work, np.arange(10), 16, CPU)
    assert batch == 4 and {asked for _, asked in results} == {4}
    assert [seed for part, _ in results for seed in part] == list(range(10))
    said = capsys.readouterr().err
    assert [line[-2:].strip() for line in said.splitlines() if "out of memory" in line] == [
        "8",
        "4",
    ]


# -------------------- the time it takes


@pytest.mark.parametrize("steps", [2, 18])
def test_time_of_an_image_is_that_of_few_steps(monkeypatch, steps):
    """18 steps are 35 calls, of which 5 are timed; a clock of one second a call."""
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    replace(monkeypatch, "usable_cores", lambda: 3)
    model = Counting()
    sampler = Sampler(model, toy_pair()[0], steps, 10)
    seconds, first = sampler.seconds_per_image()
    timed = min(steps, 3)
    assert seconds == pytest.approx((2 * steps - 1) / (2 * timed - 1) / 10 / 3)
    assert set(model.sizes) == {(10, timed)} and first == 0
    assert (sampler.steps, sampler.batch) == (steps, 10)


def test_what_the_first_batch_took_longer_is_no_time_of_an_image(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 11.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    replace(monkeypatch, "usable_cores", lambda: 1)
    assert Sampler(ToyModel(), toy_pair()[0], 1, 10).seconds_per_image() == (0.1, 8.0)


# -------------------- a model of functions


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(1, 1))


def scale_model(**functions):
    def sample(net, noise, labels, steps):
        return noise.clip(-1, 1) * labels.view(-1, 1, 1, 1) / steps

    return Model((1, 2, 2), 3, sample, **functions)


def test_functions_are_enough_of_a_model():
    model = scale_model()
    images, labels = Sampler(model, Scale(), 4, 2).images(range(6, 12))
    noise, _ = draw_noise((1, 2, 2), 3, range(6, 12), "cpu")
    want = noise.clip(-1, 1) * balanced_labels(3, range(6, 12), "cpu").view(-1, 1, 1, 1) / 4
    assert torch.equal(images, (want * 127.5 + 128).clip(0, 255).to(torch.uint8))


@pytest.mark.parametrize(
    "name, ask",
    [
        ("loss", lambda model: model.loss(Scale(), None, None)),
        ("block", lambda model: model.block("head.0.bias", Scale(), "paper")),
    ],
)
def test_function_that_was_not_given_is_asked_for_by_name(name, ask):
    with pytest.raises(UserError, match=f"{name}=.* is needed"):
        ask(scale_model())


@pytest.mark.parametrize(
    "functions, want",
    [({}, [-1.0, 1.0, -0.6]), ({"encode": lambda images: images.float() + 1}, [1.0, 256.0, 52.0])],
    ids=["default", "own"],
)
def test_images_are_encoded(functions, want):
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8)
    torch.testing.assert_close(scale_model(**functions).encode(pixels), torch.tensor(want))


@pytest.mark.parametrize(
    "functions, layer",
    [({}, "head.0"), ({"layer": str.upper}, "HEAD.0.BIAS")],
    ids=["default", "own"],
)
def test_layer_of_a_parameter(functions, layer):
    assert scale_model(**functions).layer("head.0.bias") == layer


def test_what_is_trained_is_a_copy():
    base = Scale()
    net = scale_model().trainable(base)
    assert net is not base and torch.equal(net.head[0].weight, base.head[0].weight)


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
    with network_calls(net, precision):
        out, (same,) = net(torch.ones(1, 2))
    assert net.seen == [dtype] and out.dtype == same.dtype == torch.float32


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("precision", neon.config.PRECISIONS)
def test_flags_of_a_pass_do_not_depend_on_history(precision, before):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = before
    with network_calls(Dtypes(), precision):
        flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    assert flags == (precision == "tf32",) * 2


@pytest.mark.parametrize("own", [False, True], ids=["class's", "own"])
@pytest.mark.parametrize("precision", neon.config.PRECISIONS)
def test_network_is_itself_again_after_a_pass(precision, own):
    net = Dtypes()
    if own:  # as that of a compiled network
        net.forward = net.forward
    before = dict(vars(net))
    with pytest.raises(KeyError), network_calls(net, precision, checkpointed=True):
        assert net.forward is not before.get("forward")
        raise KeyError
    assert vars(net) == before


def test_checkpointed_passes_call_the_network_again_in_the_backward_pass():
    net = Dtypes()
    with network_calls(net, "fp32", checkpointed=True):
        out, _ = net(torch.ones(1, 2, requires_grad=True))
        out.sum().backward()
    assert len(net.seen) == 2


HALF = torch.ones(2, dtype=torch.float16)
Pair = namedtuple("Pair", "one other")


@pytest.mark.parametrize(
    "out, dtypes",
    [
        (HALF, torch.float32),
        (HALF.bfloat16(), torch.float32),
        (HALF.double(), torch.float64),
        (HALF.int(), torch.int32),
        ((HALF, [HALF.int()]), (torch.float32, [torch.int32])),
        (Pair(HALF, None), Pair(torch.float32, None)),
        ({"x": HALF}, {"x": torch.float32}),
    ],
    ids=["fp16", "bf16", "double", "whole numbers", "tuple", "named", "dict"],
)
def test_half_precision_outputs_are_made_float32(out, dtypes):
    def types(part):
        if isinstance(part, torch.Tensor):
            return part.dtype
        if isinstance(part, dict):
            return {key: types(value) for key, value in part.items()}
        if isinstance(part, Pair):
            return Pair(*map(types, part))
        if isinstance(part, (tuple, list)):
            return type(part)(map(types, part))
        return part

    found = types(neon.sampling.mapped(neon.sampling.as_float32, out))
    assert found == dtypes and type(found) is type(dtypes)
