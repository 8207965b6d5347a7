"""What adaptive_neon/train.py promises."""

import copy
import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edm_helpers import (
    ToyModel,
    ToyNet,
    edm_model,
    network,
    toy_images,
)
from torch import nn

import adaptive_neon as neon

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


def test_order_of_every_epoch_is_drawn_from_seed_and_epoch():
    """Epochs of seven images, batches of four: some lie in two epochs."""
    want = []
    for epoch in range(4):
        generator = torch.Generator().manual_seed(5 * 1_000_003 + epoch)
        want += torch.randperm(7, generator=generator).tolist()
    found = []
    for first in range(0, 28, 4):
        found += neon.train.shuffled(torch.arange(first, first + 4), 7, 5).tolist()
    assert found == want


def test_a_batch_may_hold_several_epochs():
    whole = neon.train.shuffled(torch.arange(28), 7, 5)
    assert torch.equal(neon.train.shuffled(torch.arange(3, 27, 2), 7, 5), whole[3:27:2])


def test_an_epoch_is_permuted_once():
    """With a million images a permutation takes longer than a step."""
    neon.train.permutation.cache_clear()
    for first in range(0, 120, 8):
        neon.train.shuffled(torch.arange(first, first + 8), 50, 5)
    assert neon.train.permutation.cache_info().misses == 3


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
        ),
        *(list(snapshots), save, tmp_path / "state", processes),
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
    waits = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: waits.append(1))
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
    streams = [step.random for rank in steps for step in rank]
    assert len(set(streams)) == len(streams)  # nor is one rank's that of the other a step later
    assert len(files[0]) == 2 and files[1] == []  # the first rank writes, the others wait for it
    assert len(waits) == 2


def positions(steps):
    """Where the walker was before every step."""
    return np.array([step.at for step in steps])


def test_learning_rate_grows_from_zero_and_stays(tmp_path):
    moved = -np.diff(positions(walk(tmp_path, ramp_kimg=0.5)[0].steps))  # [49]
    want = 0.01 * np.minimum(np.arange(49) * 20 / 500, 1)
    np.testing.assert_allclose(moved, want, rtol=1e-3, atol=1e-7)


class Slope(WalkerModel):
    """The gradient is that of a square about a target that moves with the images."""

    def loss(self, net, x, labels):
        target = x.flatten(1).mean(1) / 40
        super().loss(net, x, labels)
        return (net.at - target) ** 2


def test_training_is_adam_with_a_ramp_and_an_average():
    """Computed again in plain numbers: moments, their corrections, learning rate, average."""
    model, net = Slope(), Walker()
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    how = recipe(batch=16, lr=0.02, ramp_kimg=0.3, ema_kimg=0.07, ramp_ratio=0.3)
    saved = []

    def save(average, kimg):
        saved.append((kimg, float(average.at)))

    average = neon.train.train(model, net, images, None, how, (0.2, 0.41), save)

    theta, mean, square, first, second = 0.0, 0.0, 0.0, 0.0, 0.0
    want = {}
    for step in range(1, 27):
        seen = 16 * (step - 1)
        batch = [image / 40 for image in model.steps[step - 1].images]
        gradient = sum(2 * (theta - target) for target in batch) / 16
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
        theta -= 0.02 * min(seen / 300, 1) * mean / (square**0.5 + 1e-8)
        half_life = min(70, 0.3 * seen)
        kept = 0.5 ** (16 / half_life) if half_life else 0.0
        want[seen + 16] = theta + kept * (want.get(seen, 0.0) - theta)
    assert len(model.steps) == 26
    assert float(net.at.detach()) == pytest.approx(theta, rel=1e-4)
    assert saved == [
        (0.2, pytest.approx(want[208], rel=1e-4)),
        (0.41, pytest.approx(want[416], rel=1e-4)),
    ]
    assert float(average.at) == saved[1][1] and not average.training


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


def test_time_of_training_on_an_image(monkeypatch):
    """The shorter of two steps of two images, in the precision of the training."""
    clock, seen = iter([0.0, 9.0, 10.0, 12.0]), []

    class Timed(ToyModel):
        def loss(self, net, x, labels):
            seen.append((len(x), torch.backends.cuda.matmul.allow_tf32))
            return super().loss(net, x, labels)

    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    c = neon.config.Config(device="cpu", precision="fp32", train_precision="tf32")
    assert neon.train.time_training(c, Timed(), ToyNet()) == 1.0
    assert seen == [(2, True)] * 2


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
        *(model, net, images, labels, how, list(snapshots)),
        lambda ema, kimg: saved.update({kimg: copy.deepcopy(ema).state_dict()}),
        folder / "state",
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
    straight = train_toy(tmp_path / "straight", edm_model(augment=0.12), snapshots=(0.1,))
    with pytest.raises(Dying):
        train_toy(tmp_path / "stopped", edm_model(augment=0.12), stop_after=2, snapshots=(0.1,))
    resumed = train_toy(tmp_path / "stopped", edm_model(augment=0.12), snapshots=(0.1,))
    assert all(torch.equal(tensor, resumed[0.1][name]) for name, tensor in straight[0.1].items())
    assert not torch.equal(
        straight[0.1]["model.map_layer0.weight"], network().model.map_layer0.weight
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


def test_a_snapshot_that_a_stop_kept_from_being_written_is_not_left_out(tmp_path):
    def stopped(average, kimg):
        raise Dying

    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    parts = WalkerModel(), Walker(), images, None, recipe(), (0.5, 1), stopped, tmp_path / "state"
    with pytest.raises(Dying):
        neon.train.train(*parts)
    model, saved = walk(tmp_path, snapshots=(0.5, 1), labels=False)
    assert [*saved] == [0.5, 1] and len(model.steps) < 50


def test_the_first_rank_decides_whether_there_is_something_to_go_on_from(tmp_path):
    """A rank that sees the file a moment earlier would be some steps ahead of the others."""
    walk(tmp_path)
    processes = neon.processes.Processes("cpu")
    processes.decide = lambda work: False
    assert len(walk(tmp_path, processes=processes)[0].steps) == 50


class Kinds(nn.Module):
    """Every kind of tensor: an average over batches and its counter, a frozen parameter, one that
    no loss uses and that Adam therefore has never met."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x):
        return self.norm(self.first(x)) * self.frozen[0]


class KindsModel:
    encodes = False

    def encode(self, images):
        return images.flatten(1).float() / 100

    def loss(self, net, x, labels):
        return (net(x) - torch.rand(len(x), 3)).square().mean(1)


def kinds(seed=0):
    torch.manual_seed(seed)
    net, images = Kinds(), torch.randint(256, (30, 1, 2, 2), dtype=torch.uint8)
    how = recipe(lr=0.05, ramp_kimg=0.1, ema_kimg=0.03, batch=8)
    return neon.train.Training(KindsModel(), net, 30, how, neon.processes.Processes()), images


def everything(training):
    """All tensors of a training, by name."""
    found = {f"net {name}": tensor for name, tensor in training.net.state_dict().items()}
    for name, tensor in training.average.state_dict().items():
        found[f"average {name}"] = tensor
    for i, moments in training.optimizer.state_dict()["state"].items():
        for name, tensor in moments.items():
            found[f"adam {i} {name}"] = tensor
    return {name: tensor.clone() for name, tensor in found.items()}


def test_state_holds_every_tensor_and_goes_on_the_same(tmp_path):
    straight, images = kinds()
    for _ in range(5):
        straight.step(images, None)
    straight.save(tmp_path / "state")
    before = everything(straight)

    resumed, _ = kinds(seed=1)
    resumed.resume(tmp_path / "state")
    after = everything(resumed)
    assert resumed.seen == straight.seen == 40 and after.keys() == before.keys()
    assert len([name for name in after if name.startswith("adam")]) == 4 * 3  # not of the unused
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())

    for training in (straight, resumed):
        training.step(images, None)
    other = everything(straight)
    assert all(torch.equal(tensor, other[name]) for name, tensor in everything(resumed).items())
    assert not torch.equal(other["net first.weight"], before["net first.weight"])


def test_average_is_of_parameters_and_buffers_are_the_last():
    training, images = kinds()
    for _ in range(3):
        training.step(images, None)
    net, average = training.net, training.average
    assert torch.equal(average.norm.running_var, net.norm.running_var)
    assert int(average.norm.num_batches_tracked) == 3
    assert not torch.equal(average.first.weight, net.first.weight)


@pytest.mark.parametrize(
    "changes, count",
    [({"lr": 0.02}, 40), ({"seed": 4}, 40), ({"batch": 10}, 40), ({}, 41)],
    ids=["lr", "seed", "batch", "images"],
)
def test_state_of_another_training_is_refused(tmp_path, changes, count):
    walk(tmp_path)
    other = neon.train.Training(
        WalkerModel(), Walker(), count, recipe(**changes), neon.processes.Processes()
    )
    with pytest.raises(neon.UserError, match="state cannot be used, delete it .*another training"):
        other.resume(tmp_path / "state")


@pytest.mark.parametrize("change", ["another name", "another shape", "one more"])
def test_state_of_another_network_is_refused(tmp_path, change):
    walk(tmp_path)
    net = Walker()
    if change == "another shape":
        net.at = nn.Parameter(torch.zeros(3))  # a tensor of one would fill it
    if change == "one more":
        net.more = nn.Parameter(torch.zeros(1))
    if change == "another name":
        net.there = net.at
        del net.at
    other = neon.train.Training(WalkerModel(), net, 40, recipe(), neon.processes.Processes())
    with pytest.raises(neon.UserError, match="state cannot be used, delete it .*another network"):
        other.resume(tmp_path / "state")


# -------------------- from a notebook


def test_self_training_leaves_the_base_as_it_is():
    base = Walker()
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    aux = neon.self_train(WalkerModel(), base, images, kimg=1, batch=20, lr=0.01, ramp_kimg=0)
    assert float(base.at) == 0 and float(aux.at) < 0 and not aux.training


def test_self_training_is_train_with_this_recipe(tmp_path):
    """With a state it goes on; that of one with another recipe is refused."""
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    options = {"kimg": 0.3, "lr": 0.01, "batch": 20, "ema_kimg": 0.1, "ramp_kimg": 0.2, "seed": 3}
    aux = neon.self_train(WalkerModel(), Walker(), images, **options, state=tmp_path / "state")
    how = neon.train.Recipe("self-training", 20, 0.01, 0.2, 0.1, 3)
    want = neon.train.train(WalkerModel(), Walker(), images, None, how, [0.3])
    assert torch.equal(aux.at, want.at)

    model = WalkerModel()
    again = neon.self_train(model, Walker(), images, **options, state=tmp_path / "state")
    assert torch.equal(again.at, aux.at) and model.steps == []
    with pytest.raises(neon.UserError, match="another training"):
        changed = {**options, "seed": 4, "state": tmp_path / "state"}
        neon.self_train(WalkerModel(), Walker(), images, **changed)


def test_self_training_has_defaults_for_its_length(monkeypatch):
    seen = []
    monkeypatch.setattr(neon.train, "train", lambda *args, **named: seen.append((args, named)))
    images = torch.zeros(40, 1, 1, 1, dtype=torch.uint8)
    neon.self_train(WalkerModel(), Walker(), images, kimg=500)
    ((args, named),) = seen
    assert args[4] == neon.train.Recipe("self-training", 64, 1e-4, 25, 25, 0)
    assert args[5] == [500] and named == {"state_path": None}


def test_training_without_a_state_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = torch.zeros(40, 1, 1, 1, dtype=torch.uint8)
    neon.train.train(WalkerModel(), Walker(), images, None, recipe(), [0.1])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["base_key", "self_training_key"])
def test_version_of_the_training_is_in_the_keys_of_networks(monkeypatch, name):
    make = getattr(neon.keys, name)
    inputs = dict.fromkeys(inspect.signature(make).parameters, "x")
    before = make(**inputs)
    monkeypatch.setattr(neon.keys, "TRAINING_VERSION", "train of later")
    assert make(**inputs) != before


def test_damaged_state_is_refused(tmp_path):
    (tmp_path / "state").write_bytes(b"no")
    with pytest.raises(neon.files.UserError, match="state cannot be used, delete it"):
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
