"""edm_neon.py: partitions, merging, seeds, stages, the study of a snapshot, and its report."""

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import scipy
import torch
from edm_helpers import (
    BEST,
    KINDS,
    PRESET,
    ToyModel,
    ToyNet,
    blend,
    config,
    edm_model,
    network,
    pair,
    parse,
    real_toys,
    replace,
    score_of,
    toy_distance,
    toy_pair,
    toy_scorer,
    weights,
)
from torch import nn

import adaptive_neon as neon
import edm_neon as edm

BLOCKS = ("enc", "mid", "dec")
CPU = neon.processes.Processes("cpu")


# -------------------- partitions
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("partition", ["paper", "structural", "layers"])
def test_every_parameter_has_one_block(kind, partition):
    net = network(kind)
    owners = neon.blocks.partition_owners(edm_model(), net, partition)
    assert [*owners] == [name for name, _ in net.named_parameters()]


@pytest.mark.parametrize(
    "name, paper, structural, layer",
    [
        ("map_layer0.weight", "mid", "mid", "map"),
        ("map_augment.weight", "mid", "mid", "map"),
        ("enc.16x16_conv.weight", "enc", "enc", "enc.16x16_conv"),
        ("enc.8x8_block0.qkv.weight", "enc", "enc", "enc.8x8_block0"),
        ("enc.4x4_down.conv0.weight", "mid", "mid", "enc.4x4_down"),
        ("enc.4x4_block0.conv0.bias", "mid", "mid", "enc.4x4_block0"),
        ("dec.4x4_in0.qkv.weight", "mid", "mid", "dec.4x4_in0"),
        ("dec.4x4_block1.conv0.weight", "mid", "dec", "dec.4x4_block1"),
        ("dec.8x8_up.skip.weight", "dec", "dec", "dec.8x8_up"),
        ("dec.16x16_aux_conv.bias", "dec", "dec", "dec.16x16_aux_conv"),
    ],
)
def test_block_of_a_parameter(name, paper, structural, layer):
    model, net = edm_model(), network()
    for partition, want in (("paper", paper), ("structural", structural), ("layers", layer)):
        assert neon.blocks.partition_owners(model, net, partition)[f"model.{name}"] == want


def test_paper_partition_of_the_cifar10_network():
    with torch.device("meta"):
        net = edm.EDMPrecond(**edm.PRESETS["cifar10"].network)
    owners = neon.blocks.partition_owners(edm_model(), net, "paper")
    sizes = dict.fromkeys(BLOCKS, 0)
    for name, p in net.named_parameters():
        sizes[owners[name]] += p.numel()
    assert sizes == {"enc": 12_674_560, "mid": 20_019_200, "dec": 23_041_539}


@pytest.mark.parametrize(
    "blocks, order",
    [
        (["mid", "dec", "enc"], ["enc", "mid", "dec"]),
        (["mid", "enc"], ["enc", "mid"]),
        (["b", "a", "b"], ["b", "a"]),
        (["mid", "enc", "x"], ["mid", "enc", "x"]),
    ],
    ids=str,
)
def test_order_of_blocks(blocks, order):
    assert neon.blocks.block_order(dict(enumerate(blocks))) == order


def custom(table):
    return neon.blocks.partition_owners(ToyModel(), ToyNet(), table)


def test_first_pattern_that_fits_owns_a_parameter():
    owners = custom({"enc.0.*": "first", "enc.*": "second", "*": "rest"})
    assert owners["enc.0.bias"] == "first" and owners["enc.1.bias"] == "second"
    assert owners["mid_unused"] == "rest"


def test_pattern_that_owns_nothing_is_refused():
    with pytest.raises(neon.files.UserError, match="enc.7.* matches no parameter"):
        custom({"enc.7.*": "a", "*": "rest"})


def test_pattern_behind_a_wider_one_is_refused():
    with pytest.raises(
        neon.files.UserError, match="enc.0.* matches no parameter that earlier patterns"
    ):
        custom({"enc.*": "a", "enc.0.*": "b", "*": "rest"})


def test_last_resort_may_be_idle():
    assert set(custom({"[a-z]*": "a", "*": "rest"}).values()) == {"a"}


def test_parameter_that_no_pattern_owns_is_refused():
    with pytest.raises(neon.files.UserError, match="no pattern owns mid_unused"):
        custom({"*.*": "a"})


def test_patterns_tell_upper_and_lower_case_apart():
    with pytest.raises(neon.files.UserError, match="matches no parameter"):
        custom({"ENC*": "a", "*": "rest"})


@pytest.mark.parametrize(
    "text", ['{"*": 3}', '{"*": null}', '["*"]', "{", '{"*": ["a"]}', "[" * 100_000], ids=range(6)
)
def test_partition_file_must_name_blocks(tmp_path, text):
    path = tmp_path / "blocks.json"
    path.write_text(text)
    with pytest.raises(argparse.ArgumentTypeError, match="JSON file"):
        neon.config.read_partition(str(path))


def test_partition_file(tmp_path):
    path = tmp_path / "blocks.json"
    path.write_text('{"enc*": "a", "*": "b"}')
    assert neon.config.read_partition(str(path)) == {"enc*": "a", "*": "b"}
    assert neon.config.read_partition("layers") == "layers"


# -------------------- merging
def merger_of(base, aux, owners, model=None):
    model = model or ToyModel()
    return neon.blocks.Merger(base, aux, owners, neon.sampling.Sampler(model, base, CPU, 2, 16))


def edm_merger(kind, partition="paper"):
    base, aux = pair(kind)
    model = edm_model()
    owners = neon.blocks.partition_owners(model, base, partition)
    return base, aux, owners, merger_of(base, aux, owners, model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "w", [weights(1.25, 0.5, -0.7), weights(0, 2, 0), weights(3, -1, 1)], ids=str
)
def test_merge_is_the_formula(kind, w):
    base, aux, owners, merger = edm_merger(kind)
    want = blend(base, aux, w, owners.get).state_dict()
    for name, tensor in merger.set(w).state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value, side", [(0, 0), (-1, 1)], ids=["base", "self-trained"])
def test_ends_of_the_line(value, side):
    base, aux, _, merger = edm_merger("cifar")
    wanted = dict((base, aux)[side].named_parameters())
    for name, p in merger.set(weights(value, value, value)).named_parameters():
        torch.testing.assert_close(p, wanted[name], rtol=0, atol=0 if value == 0 else 1e-6)


def test_merge_does_not_depend_on_the_one_before():
    _, _, _, merger = edm_merger("cifar")
    first = {n: t.clone() for n, t in merger.set(BEST).state_dict().items()}
    merger.set(weights(9, 9, 9))
    assert all(torch.equal(t, first[n]) for n, t in merger.set(BEST).state_dict().items())


def test_networks_that_were_merged_stay():
    base, aux = toy_pair()
    before = [neon.keys.weights_hash(net) for net in (base, aux)]
    merger_of(base, aux, neon.blocks.partition_owners(ToyModel(), base, "paper")).set(BEST)
    assert [neon.keys.weights_hash(net) for net in (base, aux)] == before


class Mixed(nn.Module):
    """A buffer, a frozen parameter and two tied ones."""

    def __init__(self, value):
        super().__init__()
        self.free = nn.Parameter(torch.full((3,), value))
        self.frozen = nn.Parameter(torch.full((2,), value), requires_grad=False)
        self.tied = nn.Linear(2, 2, bias=False)
        self.again = nn.Linear(2, 2, bias=False)
        self.again.weight = self.tied.weight
        nn.init.constant_(self.tied.weight, value)
        self.register_buffer("variance", torch.full((2,), value))


@pytest.fixture
def mixed():
    base, aux = Mixed(1.0), Mixed(3.0)
    owners = {name: "all" for name in neon.blocks.movable_parameters(base)}
    net = merger_of(base, aux, owners).set({"all": 0.5})
    return owners, net


def test_tied_parameters_are_owned_once(mixed):
    assert [*mixed[0]] == ["free", "tied.weight"]


def test_tied_parameters_move_once_and_stay_tied(mixed):
    net = mixed[1]
    assert net.tied.weight is net.again.weight and bool((net.tied.weight == 0).all())


@pytest.mark.parametrize("name", ["frozen", "variance"])
def test_buffers_and_frozen_parameters_are_the_bases(mixed, name):
    assert bool((getattr(mixed[1], name) == 1).all())


def test_a_network_whose_parameters_are_all_frozen_moves():
    assert len(neon.blocks.movable_parameters(ToyNet().requires_grad_(False))) == 14


def test_what_moves_is_decided_by_the_network_like_it():
    net, like = Mixed(1.0).requires_grad_(False), Mixed(1.0)
    assert [*neon.blocks.movable_parameters(net, like=like)] == ["free", "tied.weight"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_channels": 32}, "first at model"),
        ({"augment_dim": 0}, "first at model.map_augment.weight: .*absent"),
    ],
    ids=["shape", "layers"],
)
@pytest.mark.parametrize("swap", [False, True], ids=["base", "aux"])
def test_networks_that_differ_are_refused(change, message, swap):
    nets = [network(), network(**change)]
    if swap:
        nets.reverse()
    owners = neon.blocks.partition_owners(edm_model(), nets[0], "paper")
    with pytest.raises(neon.files.UserError, match=message):
        merger_of(*nets, owners, edm_model())


def test_table_of_blocks():
    base, aux, owners, merger = edm_merger("cifar")
    rows = merger.table()
    assert [*rows] == [*BLOCKS]
    theirs = dict(aux.named_parameters())
    for block in BLOCKS:
        names = [name for name in owners if owners[name] == block]
        r = torch.cat([dict(base.named_parameters())[name].flatten() for name in names]).double()
        s = torch.cat([theirs[name].flatten() for name in names]).double()
        drift = float((s - r).norm() / r.norm())
        want = {
            "tensors": len(names),
            "parameters": len(r),
            "drift": pytest.approx(drift, rel=1e-5),
        }
        assert rows[block] == want


def test_same_networks_in_other_blocks():
    scorer = toy_merger = merger_of(*toy_pair(), {n: n[:3] for n, _ in ToyNet().named_parameters()})
    other = toy_merger.with_owners({name: "one" for name in reversed(scorer.owners)})
    assert other.blocks == ["one"] and scorer.blocks == [*BLOCKS]
    want = blend(*toy_pair(), {"one": 0.5}, lambda name: "one").state_dict()
    found = other.set({"one": 0.5}).state_dict()
    assert all(torch.allclose(found[name], want[name], atol=1e-6) for name in want)


# -------------------- random blocks
@pytest.fixture(scope="module")
def partitioned():
    base = network(num_blocks=2)
    model = edm_model()
    owners = neon.blocks.partition_owners(model, base, "paper")
    merger = merger_of(base, base, owners, model)
    return merger, model


def layers_of(owners, model):
    """{block: its layers}"""
    found = {}
    for name, block in owners.items():
        found.setdefault(block, set()).add(model.layer(name))
    return found


@pytest.mark.parametrize("k", range(3))
def test_random_blocks_move_whole_layers(partitioned, k):
    merger, model = partitioned
    owners = neon.blocks.placebo_owners(merger, model, k)
    layers = [layer for block in layers_of(owners, model).values() for layer in block]
    assert [*owners] == [*merger.owners]
    # The bottleneck's layers are split between blocks in no partition.
    assert len(layers) == len(set(layers))


@pytest.mark.parametrize("k", range(3))
def test_random_blocks_keep_their_numbers_of_layers_and_nearly_their_sizes(partitioned, k):
    merger, model = partitioned
    owners = neon.blocks.placebo_owners(merger, model, k)

    def counts(found):
        return {block: len(layers) for block, layers in layers_of(found, model).items()}

    def sizes(found):
        total = dict.fromkeys(BLOCKS, 0)
        for name, block in found.items():
            total[block] += merger.theta_r[name].numel()
        return total

    assert counts(owners) == counts(merger.owners)
    for block, size in sizes(merger.owners).items():
        assert sizes(owners)[block] == pytest.approx(size, rel=0.2)


def test_random_blocks_differ_and_repeat(partitioned):
    merger, model = partitioned
    found = [neon.blocks.placebo_owners(merger, model, k) for k in range(4)]
    assert all(one != other for one, other in itertools.combinations([*found, merger.owners], 2))
    assert found[2] == neon.blocks.placebo_owners(merger, model, 2)


@pytest.mark.parametrize("k", range(5))
def test_random_blocks_of_a_small_network_are_not_its_own(k):
    """Of seven layers' permutations, many draws hit the network's own blocks, which fit best."""
    base, aux = toy_pair()
    owners = neon.blocks.partition_owners(ToyModel(), base, "paper")
    assert neon.blocks.placebo_owners(merger_of(base, aux, owners), ToyModel(), k) != owners


def test_random_blocks_of_one_block_are_refused():
    base, aux = toy_pair()
    merger = merger_of(base, aux, {name: "one" for name, _ in base.named_parameters()})
    with pytest.raises(neon.files.UserError, match="--placebo: .* no other blocks"):
        neon.blocks.placebo_owners(merger, ToyModel(), 0)


# -------------------- seeds
def ledger(**options):
    sizes = {"synthetic": 6000, "select_images": 1000, "final_images": 500}
    return neon.study.seed_ledger(neon.config.Config(**sizes | options))


def test_sets_of_seeds():
    found = ledger(final_repeats=3)
    selection, finals = found.selection, found.finals
    assert (selection.first, selection.count, selection.is_final) == (10_000, 1000, False)
    assert [(seeds.first, seeds.count) for seeds in finals] == [
        (50_000, 500),
        (50_500, 500),
        (51_000, 500),
    ]
    assert all(seeds.is_final for seeds in finals)
    assert found.as_json()["selection"] == 10_000
    assert found.as_json()["final"] == [50_000, 50_500, 51_000]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"final_repeats": 7, "final_images": 1234},
        {"synthetic": 10_000, "select_images": 40_000, "final_images": 100_000},
    ],
    ids=str,
)
def test_no_seed_is_in_two_sets(options):
    c = neon.config.Config(
        **{"synthetic": 6000, "select_images": 1000, "final_images": 500} | options
    )
    found = neon.study.seed_ledger(c)
    seeds = [np.arange(c.synthetic), found.selection.seeds, *(s.seeds for s in found.finals)]
    everything = np.concatenate(seeds)
    assert len(np.unique(everything)) == len(everything)


@pytest.mark.parametrize(
    "options, sets",
    [
        ({"synthetic": 10_001}, "synthetic set .* selection set"),
        ({"select_images": 40_001}, "selection set .* final 1 set"),
        ({"final_images": 9_950_001, "search": "gradient"}, "final 1 set .* search set"),
        ({"final_images": 5_000_000, "final_repeats": 2, "search": "gradient"}, "final 2 set"),
    ],
    ids=str,
)
def test_sets_that_overlap_are_refused(options, sets):
    with pytest.raises(
        neon.files.UserError, match=f"seeds of the {sets}" if "synth" in sets else sets
    ):
        ledger(**options)


def test_search_set_counts_only_for_a_search_by_gradient():
    ledger(final_images=9_950_001)
    ledger(final_images=9_950_001, search="cobyqa")


@pytest.mark.parametrize(
    "options, refused",
    [
        ({"final_images": 10**8, "final_repeats": 50}, True),
        ({"final_images": 10**8, "final_repeats": 42}, False),
    ],
    ids=str,
)
def test_more_than_2_to_the_32_seeds_are_refused(options, refused):
    if refused:
        with pytest.raises(neon.files.UserError, match="2\\^32 seeds"):
            ledger(**options)
    else:
        ledger(**options)


def test_papers_protocol_selects_on_seeds_that_were_trained_on(capsys):
    found = ledger(protocol="paper", select_images=2000)
    assert (found.selection.first, found.selection.count) == (0, 2000)
    assert found.finals[0].first == 50_000 and "overlap" in capsys.readouterr().out


def test_disjoint_protocol_announces_nothing(capsys):
    ledger()
    assert capsys.readouterr().out == ""


# -------------------- stages
class Counting(ToyModel):
    """Counts training steps and sampled batches."""

    def __init__(self):
        self.steps = self.batches = 0

    def loss(self, *args):
        self.steps += 1
        return super().loss(*args)

    def sample(self, *args):
        self.batches += 1
        return super().sample(*args)


def base_of(out, model=None, real=None, **options):
    model = model or Counting()
    out.mkdir(exist_ok=True)
    c = config(out, **{"train_base": 0.4} | options)
    return neon.study.get_base(c, model, real or real_toys(), CPU), model


def test_base_is_trained_once(tmp_path):
    first, model = base_of(tmp_path)
    again, idle = base_of(tmp_path)
    assert model.steps == 20 and idle.steps == 0
    assert neon.keys.weights_hash(first) == neon.keys.weights_hash(again)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]  # the state is gone


def test_recipe_of_a_base(tmp_path, monkeypatch):
    """Ramp and half-life are a twentieth of the training."""
    seen = []
    replace(monkeypatch, "train", lambda *args: seen.append(args) or args[-1](args[1], 0.4))
    c = {"base_lr": 0.02, "batch": 10, "seed": 7, "train_precision": "bf16"}
    base_of(tmp_path, ToyModel(), **c)
    (args,) = seen
    want = neon.train.Recipe("base", 10, 0.02, 0.02, 0.02, 7, ramp_ratio=0.05, precision="bf16")
    assert args[4] == want and args[7] == [0.4]
    assert torch.equal(args[2], real_toys().training.images)
    assert torch.equal(args[3], real_toys().training.labels)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"base_lr": 0.5},
        {"batch": 10},
        {"train_base": 0.5},
        {"train_precision": "bf16"},
    ],
    ids=str,
)
def test_another_recipe_trains_another_base(tmp_path, options):
    base_of(tmp_path)
    assert base_of(tmp_path, **options)[1].steps > 0


def test_other_images_train_another_base(tmp_path):
    base_of(tmp_path)
    assert base_of(tmp_path, real=real_toys(5))[1].steps > 0


@pytest.mark.parametrize("pick", ["labels", "images"])
def test_real_images_are_their_content(pick):
    real = real_toys().training
    changed = dataclasses.replace(real, **{pick: getattr(real, pick).flip(0)})
    assert changed.identity != real.identity
    assert dataclasses.replace(real, source="elsewhere").identity == real.identity


def test_another_model_trains_another_base(tmp_path):
    base_of(tmp_path)
    other = Counting()
    other.training_identity = "other"
    base_of(tmp_path, other)
    assert other.steps > 0


@pytest.mark.parametrize("options", [{"steps": 3}, {"lr": 0.5}, {"grid": (1.0,)}], ids=str)
def test_base_does_not_depend_on(tmp_path, options):
    base_of(tmp_path)
    assert base_of(tmp_path, **options)[1].steps == 0


def test_base_depends_on_its_seed(tmp_path):
    first, _ = base_of(tmp_path / "a")
    torch.manual_seed(99)
    again, _ = base_of(tmp_path / "b")
    other, _ = base_of(tmp_path / "c", seed=1)
    assert (
        neon.keys.weights_hash(first)
        == neon.keys.weights_hash(again)
        != neon.keys.weights_hash(other)
    )


def test_plan_trains_no_base(tmp_path):
    assert base_of(tmp_path, plan=True)[1].steps == 0 and not [*tmp_path.iterdir()]


def test_plan_of_a_trained_base_uses_it(tmp_path):
    trained, _ = base_of(tmp_path)
    planned, model = base_of(tmp_path, plan=True)
    assert neon.keys.weights_hash(planned) == neon.keys.weights_hash(trained) and model.steps == 0


def test_base_of_a_file(tmp_path):
    base, _ = toy_pair()
    ToyModel().save(base, tmp_path / "base.safetensors", {})
    found, _ = base_of(tmp_path, base=str(tmp_path / "base.safetensors"))
    assert neon.keys.weights_hash(found) == neon.keys.weights_hash(base)


@pytest.mark.parametrize("given", [True, False], ids=["given", "trained here"])
def test_model_is_checked_before_anything_is_trained(tmp_path, given, monkeypatch):
    ToyModel().save(toy_pair()[0], tmp_path / "base.safetensors", {})
    options = {"base": str(tmp_path / "base.safetensors")} if given else {}
    monkeypatch.setattr(
        Counting, "start_check", lambda self, base, c, trained: checks.append((trained, self.steps))
    )
    checks = []
    base_of(tmp_path, **options)
    assert checks[0] == (given, 0)


def test_training_a_base_needs_images(tmp_path):
    with pytest.raises(neon.files.UserError, match="--train-base needs --data"):
        neon.study.get_base(config(tmp_path, train_base=1.0), ToyModel(), None, CPU)


def test_base_that_does_not_fit_the_images_is_refused():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    real = neon.images.RealData(*[neon.images.RealImages(images, None, "images.zip")] * 3, "")
    with pytest.raises(neon.files.UserError, match=r"\(1, 4, 4\).*images.zip are \(3, 4, 4\)"):
        neon.study.check_model(config(Path(".")), ToyModel(), ToyNet(), real)
    neon.study.check_model(config(Path(".")), ToyModel(), ToyNet(), real_toys())
    neon.study.check_model(config(Path(".")), ToyModel(), ToyNet(), None)


def snapshots_of(out, model=None, base=None, **options):
    out.mkdir(exist_ok=True)
    c = config(out, **{"lr": 1e-3, "ramp_kimg": 0.0, "ema_kimg": 0.1} | options)
    model = model or Counting()
    base = base or toy_pair()[0]
    sampler = neon.sampling.Sampler(model, base, CPU, c.steps, c.sample_batch, c.labels)
    return neon.study.get_snapshots(c, model, base, sampler), model


def test_synthetic_set_is_the_bases_at_seeds_from_zero(tmp_path):
    base, model = toy_pair()[0], ToyModel()
    sampler = neon.sampling.Sampler(model, base, CPU, 2, 32)
    images, labels = neon.study.get_synthetic(config(tmp_path), base, tmp_path / "s.zip", sampler)
    want, want_labels = neon.sampling.Sampler(model, base, CPU, 2, 100).images(range(100))
    assert (images.int() - want.int()).abs().max() <= 1 and images.dtype == torch.uint8
    assert torch.equal(labels, want_labels)


def test_unconditional_synthetic_set_has_no_labels(tmp_path):
    base, model = network("uncond"), edm_model()
    sampler = neon.sampling.Sampler(model, base, CPU, 1, 32)
    c = config(tmp_path, synthetic=40)
    images, labels = neon.study.get_synthetic(c, base, tmp_path / "s.zip", sampler)
    assert labels is None and images.shape == (40, 3, 16, 16)


def test_self_training_gives_every_snapshot(tmp_path):
    found, model = snapshots_of(tmp_path, snapshot=(1, 2))
    assert [*found] == [1, 2] and model.steps == 100
    names = [path.name for path in found.values()]
    assert names == ["network-snapshot-000001.safetensors", "network-snapshot-000002.safetensors"]
    ones, twos = (safetensors.torch.load_file(path) for path in found.values())
    base = toy_pair()[0].state_dict()
    drift = [float((s["enc.0.weight"] - base["enc.0.weight"]).norm()) for s in (ones, twos)]
    assert 0 < drift[0] < drift[1]


def test_self_training_is_done_once(tmp_path):
    paths, _ = snapshots_of(tmp_path)
    stamp = paths[1].stat().st_mtime_ns
    again, model = snapshots_of(tmp_path)
    assert again == paths and model.steps == model.batches == 0
    assert paths[1].stat().st_mtime_ns == stamp


def test_recipe_of_the_self_training(tmp_path, monkeypatch):
    seen = []

    def train(*args):
        seen.append(args)
        args[-1](args[1], 1)

    replace(monkeypatch, "train", train)
    options = {"batch": 10, "seed": 7, "train_precision": "bf16", "ramp_kimg": 2.0}
    snapshots_of(tmp_path, ToyModel(), **options)
    (args,) = seen
    assert args[4] == neon.train.Recipe("self-training", 10, 1e-3, 2.0, 0.1, 8, precision="bf16")
    assert neon.keys.weights_hash(args[1]) == neon.keys.weights_hash(toy_pair()[0])
    assert args[7] == (1,)
    (path,) = tmp_path.glob("synthetic-*.zip")
    images, labels = neon.images.read_dataset(path)
    assert torch.equal(args[2], images) and torch.equal(args[3], labels)


@pytest.mark.parametrize(
    "options, sets",
    [
        ({"lr": 0.5}, 1),
        ({"seed": 1}, 1),
        ({"batch": 10}, 1),
        ({"ema_kimg": 0.2}, 1),
        ({"ramp_kimg": 0.2}, 1),
        ({"train_precision": "bf16"}, 1),
        ({"synthetic": 90}, 2),
        ({"steps": 3}, 2),
        ({"labels": "random"}, 2),
        ({"precision": "bf16"}, 2),
    ],
    ids=str,
)
def test_another_recipe_trains_again(tmp_path, options, sets):
    before, _ = snapshots_of(tmp_path)
    after, model = snapshots_of(tmp_path, **options)
    assert after[1] != before[1] and model.steps > 0
    assert len([*tmp_path.glob("synthetic-*.zip")]) == sets


def test_another_base_makes_another_synthetic_set(tmp_path):
    snapshots_of(tmp_path)
    snapshots_of(tmp_path, base=toy_pair()[1])
    assert len([*tmp_path.glob("synthetic-*.zip")]) == 2


@pytest.mark.parametrize("name, sets", [("identity", 2), ("training_identity", 1)])
def test_another_model_trains_again(tmp_path, name, sets):
    snapshots_of(tmp_path)
    model = Counting()
    setattr(model, name, "other")
    snapshots_of(tmp_path, model)
    assert model.steps > 0 and len([*tmp_path.glob("synthetic-*.zip")]) == sets


@pytest.mark.parametrize("options", [{"grid": (1.0,)}, {"select_images": 50}], ids=str)
def test_self_training_does_not_depend_on(tmp_path, options):
    before, _ = snapshots_of(tmp_path)
    assert snapshots_of(tmp_path, **options)[0] == before


def test_longer_self_training_goes_on(tmp_path):
    snapshots_of(tmp_path)
    (tmp_path / "whole").mkdir()
    found, model = snapshots_of(tmp_path, snapshot=(1, 2))
    whole, _ = snapshots_of(tmp_path / "whole", snapshot=(1, 2))
    assert model.steps == 50 and model.batches == 0
    assert found[2].read_bytes() == whole[2].read_bytes()


def test_snapshot_that_was_passed_is_refused(tmp_path):
    snapshots_of(tmp_path, snapshot=(2,))
    with pytest.raises(neon.files.UserError, match="already past one of --snapshot 1, 3"):
        snapshots_of(tmp_path, snapshot=(1, 3))


def test_plan_trains_nothing(tmp_path):
    paths, model = snapshots_of(tmp_path, plan=True)
    assert model.steps == model.batches == 0 and not [*tmp_path.iterdir()] and [*paths] == [1]


def test_self_training_improves_on_no_one(tmp_path):
    """Orphans of a killed run are cleared."""
    paths, _ = snapshots_of(tmp_path)
    paths[1].unlink()
    orphan = paths[1].parent / ".part-x"
    orphan.mkdir()
    (paths[1].parent / "training-state.pt").unlink()
    snapshots_of(tmp_path)
    assert paths[1].exists() and not orphan.exists()


@pytest.mark.parametrize("snapshots", [(550,), (550, 1051)], ids=str)
def test_given_snapshots(tmp_path, snapshots):
    for kimg in (550, 1051, 1551):
        (tmp_path / f"network-snapshot-{kimg:06d}.pkl").touch()
    c = config(tmp_path, aux=str(tmp_path), snapshot=snapshots)
    want = {kimg: tmp_path / f"network-snapshot-{kimg:06d}.pkl" for kimg in snapshots}
    assert neon.study.get_snapshots(c, None, None, SimpleNamespace(processes=CPU)) == want


def test_given_network(tmp_path):
    (tmp_path / "aux.pkl").touch()
    c = config(tmp_path, aux=str(tmp_path / "aux.pkl"), snapshot=(7,))
    assert neon.study.given_snapshots(c, ToyModel(), CPU) == {7: tmp_path / "aux.pkl"}


def test_given_snapshots_that_are_not_there(tmp_path):
    (tmp_path / "network-snapshot-best.pkl").touch()
    with pytest.raises(neon.files.UserError, match=r"has snapshots \['best'\], not all of"):
        neon.study.given_snapshots(config(tmp_path, aux=str(tmp_path)), ToyModel(), CPU)


# -------------------- the study of one snapshot, on real scores
STUDY = {"grid": (0.5, 1.0), "sweep": (-1.0, 0.5, 2.0), "final_repeats": 2, "placebo": 2}


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    options = {**STUDY, "search": "cobyqa", "evaluations": 12}
    scorer = toy_scorer(out, **options)
    c = config(out, **options)
    return neon.study.study(c, scorer, scorer, ToyModel(), neon.study.seed_ledger(c)), scorer, out


def test_sweep_holds_grid_base_and_collapsed(studied):
    values = [score.w["mid"] for score in studied[0].sweep]
    assert values == [-1.0, 0.0, 0.5, 1.0, 2.0]
    assert all(len(set(score.w.values())) == 1 for score in studied[0].sweep)


def test_grid_holds_every_product(studied):
    grid = [score.w for score in studied[0].grid]
    assert grid == [weights(*v) for v in itertools.product((0.5, 1.0), repeat=3)]


@pytest.mark.parametrize("name", ["base", "collapsed", "global", "blockwise", "searched"])
def test_distances_of_the_models(studied, name):
    entry, scorer, _ = studied
    want = toy_distance(scorer, entry.models[name].w, range(10_000, 10_100))
    assert entry.models[name].fd == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", ["base", "collapsed", "global", "blockwise", "searched"])
def test_final_distances_are_on_every_final_set(studied, name):
    entry, scorer, _ = studied
    want = [
        toy_distance(scorer, entry.models[name].w, range(first, first + 120))
        for first in (50_000, 50_120)
    ]
    final = entry.final[name]
    # A batch may round a pixel to another grey level than an image alone.
    assert final["all"] == pytest.approx(want, rel=1e-3) and final["images"] == 120
    assert final["w"] == entry.models[name].w


def test_blockwise_is_the_best_of_the_grid(studied):
    entry = studied[0]
    assert entry.models["blockwise"].fd == min(score.fd for score in entry.grid)


def test_global_is_the_best_of_the_sweep(studied):
    entry = studied[0]
    candidates = [score for score in entry.sweep if score.w["enc"] != -1]
    assert entry.models["global"].fd == min(score.fd for score in candidates)
    assert entry.models["global"].w == dict.fromkeys(BLOCKS, entry.models["global"].w_global)


def test_selection_and_final_scores_are_in_their_files(studied):
    entry, _, out = studied
    firsts = {
        name: {json.loads(line)["first_seed"] for line in (out / name).read_text().splitlines()}
        for name in ("grid.jsonl", "final.jsonl")
    }
    assert firsts == {"grid.jsonl": {10_000}, "final.jsonl": {50_000, 50_120}}


def test_final_scores_are_of_the_models_alone(studied):
    entry, _, out = studied
    rows = [json.loads(line) for line in (out / "final.jsonl").read_text().splitlines()]
    wanted = [candidate.w for candidate in entry.models.values()]
    wanted += [placebo["w"] for placebo in entry.placebo]
    assert all(row["w"] in wanted for row in rows)


def test_placebo_is_the_best_of_its_random_blocks(studied):
    entry, scorer, _ = studied
    for k, placebo in enumerate(entry.placebo):
        owners = neon.blocks.placebo_owners(scorer.merger, ToyModel(), k)
        random = scorer.with_owners(owners)
        grid = [weights(*v) for v in itertools.product((0.5, 1.0), repeat=3)]
        distances = [
            random.score(w, neon.scores.SeedSet("selection", 10_000, 100)).fd for w in grid
        ]
        assert placebo["fd"] == min(distances)
        assert placebo["w"] == grid[int(np.argmin(distances))]


def test_placebo_is_compared_with_global_on_the_final_seeds(studied):
    entry, scorer, _ = studied
    for k, placebo in enumerate(entry.placebo):
        owners = neon.blocks.placebo_owners(scorer.merger, ToyModel(), k)
        sets = [
            neon.scores.SeedSet("final 1", 50_000, 120),
            neon.scores.SeedSet("final 2", 50_120, 120),
        ]
        ours = [scorer.with_owners(owners).score(placebo["w"], seeds) for seeds in sets]
        theirs = [scorer.score(entry.models["global"].w, seeds) for seeds in sets]
        assert placebo["against_global"] == neon.stats.compare(ours, theirs)


def test_blocks_of_the_entry(studied):
    entry, scorer, _ = studied
    assert entry.blocks == scorer.merger.table() and entry.kimg == 1


# -------------------- the study of one snapshot, on scores made by hand
class Prescribed:
    """A scorer of prescribed distances: fd(w, seeds)."""

    def __init__(self, fd, blocks=BLOCKS, dim=6):
        self.fd, self.kimg, self.calls = fd, 1, []
        self.merger = SimpleNamespace(blocks=list(blocks), table=dict)
        facts = SimpleNamespace(facts={"images": 10_000})
        features = SimpleNamespace(dim=dim)
        self.judge = SimpleNamespace(name="own", features=features, selection=facts, final=facts)
        self.judges = [self.judge]

    def score(self, w, seeds, desc=None):
        self.calls.append((w, seeds))
        return score_of(self.fd(w, seeds), w=w, images=seeds.count, first_seed=seeds.first)

    def scores(self, w, seeds, judges, desc=None):
        return [self.score(w, seeds) for _ in judges]

    def score_all(self, candidates, seeds, desc):
        return [self.score(w, seeds) for w in candidates]


def study_of(fd, monkeypatch=None, found=None, blocks=BLOCKS, **options):
    """The study of these distances; found: what a search returns."""
    c = config(Path("."), **options)
    scorer = Prescribed(fd, blocks)
    if found is not None:
        monkeypatch.setitem(neon.search.SEARCHES, c.search, found)
    return neon.study.study(c, scorer, scorer, None, neon.study.seed_ledger(c)), scorer


def bowl(w, seeds=None):
    """Least at BEST."""
    return 1.0 + sum((w[block] - BEST[block]) ** 2 for block in BLOCKS)


def test_collapsed_network_is_no_candidate():
    """Not even when it is the best, and the grid and the sweep hold it."""
    entry, _ = study_of(
        lambda w, seeds: 1.0 + w["enc"], grid=(-1.0, 0.0, 1.0), sweep=(-1.0, 0.5, 2.0)
    )
    assert entry.models["global"].w_global == 0 and entry.models["collapsed"].fd == 0


def test_weights_between_base_and_collapsed_are_candidates():
    entry, _ = study_of(lambda w, seeds: 2.0 + w["enc"], grid=(0.0, 1.0), sweep=(-0.5, 0.5))
    assert entry.models["global"].w_global == -0.5


def test_base_may_be_the_best_global_weight():
    entry, _ = study_of(lambda w, seeds: 1.0 + abs(w["enc"]), grid=(0.5, 1.0))
    assert entry.models["global"].w_global == 0


def test_sweep_may_hold_the_best_global_weight():
    def fd(w, seeds):
        return 1.0 + abs(w["enc"] - 3)

    entry, scorer = study_of(fd, grid=(0.5, 1.0), sweep=(2.0, 3.0))
    assert entry.models["global"] == neon.study.Candidate(weights(3, 3, 3), 1.0, scorer.merger, 3.0)


def test_winners_are_chosen_on_the_selection_seeds():
    """The final seeds would choose otherwise."""

    def fd(w, seeds):
        return bowl(w) if not seeds.is_final else 100 - bowl(w)

    entry, _ = study_of(fd, grid=(0.5, 1.0, 1.5))
    assert entry.models["blockwise"].w == BEST
    assert entry.models["global"].w_global == 1.0
    assert entry.final["blockwise"]["fd"] == 99


def test_every_model_is_scored_on_every_final_set():
    entry, scorer = study_of(bowl, grid=(0.5, 1.0), final_repeats=3)
    firsts = [(w, seeds.first) for w, seeds in scorer.calls if seeds.is_final]
    want = [
        (candidate.w, 50_000 + 120 * repeat)
        for candidate in entry.models.values()
        for repeat in range(3)
    ]
    assert firsts == want


def test_searched_is_the_best_the_search_evaluated(monkeypatch):
    """Even if the grid knows a better one."""
    rows = [score_of(8.0, w=weights(5, 5, 5)), score_of(7.0, w=weights(6, 6, 6))]
    entry, scorer = study_of(
        bowl, monkeypatch, lambda *args: rows, search="cobyqa", grid=(0.5, 1.0)
    )
    assert entry.models["searched"] == neon.study.Candidate(weights(6, 6, 6), 7.0, scorer.merger)
    assert entry.models["blockwise"].fd < 7


@pytest.mark.parametrize("name", ["cobyqa", "coordinate", "gradient"])
def test_search_starts_at_the_best_global_weight(monkeypatch, name):
    asked = []

    def search(c, scorer, seeds, start):
        asked.append((seeds.purpose, seeds.first, seeds.count, start))
        return [score_of(7.0)]

    study_of(bowl, monkeypatch, search, search=name, grid=(0.25, 1.75, 2.5))
    assert asked == [("selection", 10_000, 100, 0.25)]


def test_what_a_search_finds_is_never_called_blockwise(monkeypatch):
    """A grid of 125 points is left to the search."""
    grid = (0.0, 0.5, 1.0, 1.5, 2.0)
    entry, _ = study_of(
        bowl, monkeypatch, lambda *args: [score_of(0.5, w=BEST)], search="gradient", grid=grid
    )
    assert [*entry.models] == ["base", "collapsed", "global", "searched"] and entry.grid == []
    assert [*entry.final] == [*entry.models]


def test_every_placebo_has_blocks_of_its_own(monkeypatch):
    """Seeds 0, 1, ...; each goes through the same grid, and its best to the final seeds."""
    drawn, random = [], []

    def with_owners(self, owners):
        random.append(Prescribed(self.fd))
        return random[-1]

    replace(monkeypatch, "placebo_owners", lambda merger, model, k: drawn.append(k))
    monkeypatch.setattr(Prescribed, "with_owners", with_owners, raising=False)
    entry, scorer = study_of(bowl, grid=(0.5, 1.75), placebo=3, final_repeats=2)
    assert drawn == [0, 1, 2] and len(entry.placebo) == 3
    best = weights(0.5, 0.5, 1.75)
    for cut in random:
        assert [seeds.first for _, seeds in cut.calls] == [10_000] * 8 + [50_000, 50_120]
        assert [w for w, _ in cut.calls[8:]] == [best] * 2
    assert {placebo["fd"] for placebo in entry.placebo} == {bowl(best)}


def test_without_a_search_nothing_is_searched():
    entry, _ = study_of(bowl)
    assert [*entry.models] == ["base", "collapsed", "global", "blockwise"]


def test_base_that_diverges_ends_the_run():
    with pytest.raises(neon.files.UserError, match="base network's images are not finite"):
        study_of(lambda w, seeds: math.inf if w["enc"] == 0 else 1.0)


def test_weights_that_diverge_win_nothing():
    def fd(w, seeds):
        return math.inf if w["enc"] > 0.75 else bowl(w)

    entry, _ = study_of(fd, grid=(0.5, 1.0, 1.5))
    assert entry.models["global"].w_global == 0.5 and entry.models["blockwise"].w["enc"] == 0.5


def test_collapsed_network_that_diverges_is_noted():
    entry, _ = study_of(lambda w, seeds: math.inf if w["enc"] == -1 else bowl(w))
    assert "collapsed: the sampler diverges" in entry.warnings
    assert entry.final["collapsed"]["against_base"]["verdict"] == "worse"


def test_one_block_has_a_grid_too():
    entry, _ = study_of(lambda w, seeds: 1 + w["a"] ** 2, blocks=("a",), grid=(0.5, 1.0))
    assert entry.models["blockwise"].w == {"a": 0.5}


# -------------------- final comparison
def finals(**rows):
    """{model: scores} of two sets, with folds that differ a little."""
    found = {}
    for i, (name, values) in enumerate(rows.items()):
        wave = 0.01 * np.sin(np.arange(neon.stats.FOLDS) * (i + 1))
        found[name] = [
            score_of(fd, fd + wave, precision=0.5 + 0.1 * k, recall=0.2 + 0.2 * k + 0.01 * i)
            for k, fd in enumerate(values)
        ]
    return found


def test_final_mean_and_spread():
    found = neon.study.final_comparison(finals(base=(3.0, 5.0)))["base"]
    assert found["all"] == [3, 5] and found["fd"] == 4
    assert found["std"] == pytest.approx(2**0.5) and found["images"] == 100


def test_final_precision_and_recall_are_means():
    found = neon.study.final_comparison(finals(base=(3.0, 5.0)))["base"]
    assert found["precision"] == pytest.approx(0.55) and found["recall"] == pytest.approx(0.3)


def test_without_precision_there_is_none():
    assert "precision" not in neon.study.final_comparison({"base": [score_of(1.0)]})["base"]


def test_one_set_has_no_spread():
    assert neon.study.final_comparison(finals(base=(3.0,)))["base"]["std"] is None


def test_final_pairs():
    scores = finals(base=(3, 5), collapsed=(6, 7), **{"global": (2, 4)}, blockwise=(1, 4))
    found = neon.study.final_comparison(scores)
    for name in ("collapsed", "global", "blockwise"):
        assert found[name]["against_base"] == neon.stats.compare(scores[name], scores["base"])
    for name in ("collapsed", "blockwise"):
        assert found[name]["against_global"] == neon.stats.compare(scores[name], scores["global"])
    assert "against_base" not in found["base"] and "against_global" not in found["global"]
    assert found["blockwise"]["against_base"]["difference"] == pytest.approx(-1.5)


# -------------------- warnings
def warnings(models=None, final=None, had_grid=False, dim=6, real=10_000, **options):
    models = {"base": 4.0, "global": 2.0} | (models or {})
    candidates = {
        name: value
        if isinstance(value, neon.study.Candidate)
        else neon.study.Candidate(weights(1, 1, 1), value, None)
        for name, value in models.items()
    }
    rows = {name: {"fd": c.fd, "against_base": gain(-1.9)} for name, c in candidates.items()}
    rows |= final or {}
    facts = SimpleNamespace(facts={"images": real})
    judge = SimpleNamespace(features=SimpleNamespace(dim=dim), selection=facts, final=facts)
    return neon.study.warnings_of(config(Path("."), **options), candidates, rows, had_grid, judge)


def gain(difference, half=0.2):
    return {"difference": difference, "low": difference - half, "high": difference + half}


@pytest.mark.parametrize(
    "w, edges",
    [
        (weights(1, 1, 1), []),
        (weights(0.5, 1, 1), ["w_enc = 0.5"]),
        (weights(1, 1.5, 0.5), ["w_mid = 1.5", "w_dec = 0.5"]),
        (weights(1, 1, 2), []),
        (weights(1, 1, 3), ["w_dec = 3"]),
    ],
    ids=str,
)
def test_weight_on_the_edge_of_its_grid(w, edges):
    """The decoder's own grid reaches further."""
    options = {"grid": (0.5, 1.0, 1.5), "grid_dec": (0.5, 1.0, 2.0, 3.0)}
    notes = warnings({"blockwise": neon.study.Candidate(w, 2.1, None)}, had_grid=True, **options)
    assert notes == [f"{edge} lies on the edge of the grid" for edge in edges]


def test_grid_of_one_value_has_no_edge():
    models = {"blockwise": neon.study.Candidate(weights(1, 1, 1), 2.1, None)}
    assert warnings(models, had_grid=True, grid=(1.0,)) == []


@pytest.mark.parametrize("dim, singular", [(99, False), (100, True), (2048, True)])
def test_fewer_images_than_features(dim, singular):
    notes = warnings(dim=dim)
    want = [f"100 selection images for {dim} features: the covariance is singular"]
    assert notes == (want if singular else [])


@pytest.mark.parametrize("name", ["blockwise", "searched"])
@pytest.mark.parametrize("promised, noted", [(0.50, False), (0.54, False), (0.57, True)])
def test_promise_that_the_final_seeds_do_not_keep(name, promised, noted):
    """Both gains in shares of the base: the final interval goes from 45 % to 55 %."""
    models = {name: 4.0 * (1 - promised)}
    final = {"base": {"fd": 8.0}, name: {"fd": 4.0, "against_base": gain(-4.0, 0.4)}}
    notes = warnings(models, final)
    want = [
        f"{name} is {promised:.1%} below the base on the selection seeds and 50.0% on the final "
        "ones: selection noise"
    ]
    assert notes == (want if noted else [])


@pytest.mark.parametrize(
    "precision, difference, noted",
    [(0.70, -4.0, True), (0.785, -4.0, True), (0.795, -4.0, False), (0.7, 4.0, False)],
)
def test_precision_that_falls_with_the_distance(precision, difference, noted):
    final = {
        "base": {"fd": 8.0, "precision": 0.8},
        "blockwise": {"fd": 4.0, "precision": precision, "against_base": gain(difference)},
    }
    notes = warnings({"blockwise": 4.0 + difference / 2}, final)
    assert ("blockwise: precision falls while the distance falls" in notes) == noted


# -------------------- the report
def written(tmp_path, capsys, **changes):
    """Report of a study of prescribed scores -> entry, table.md, summary.json."""
    entry, _ = study_of(bowl, grid=(0.5, 1.0, 1.5), final_repeats=2)
    entry = dataclasses.replace(entry, **changes)
    summary = {
        "score": "FD",
        "snapshots": [entry.as_json()],
        "floors": [{"images": 50, "fd": 0.125}],
        "judges": ["own"],
        "reference": {"images": 10_000, "origin": "nowhere"},
        "config": {"out": Path("x")},
    }
    neon.report.write_report(summary, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    return entry, text, json.loads((tmp_path / "summary.json").read_text())


def cells(text, name):
    (line,) = [line for line in text.splitlines() if f"| {name} |" in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_has_a_row_for_every_model(tmp_path, capsys):
    entry, text, _ = written(tmp_path, capsys)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(entry.models)
    assert rows[0].count("|") == rows[1].count("|") == rows[-1].count("|") == 11


def test_row_of_a_model(tmp_path, capsys):
    _, text, _ = written(tmp_path, capsys)
    found = cells(text, "blockwise")
    assert found[:4] == ["1", "blockwise", "enc 1, mid 0.5, dec 1.5", "1.0000"]
    assert found[4] == "1.0000 +- 0.0000"
    assert found[5:7] == ["-3.5000 [-3.5000, -3.5000]", "better"]


def test_row_shows_selection_and_final_distances(tmp_path, capsys):
    final = {
        "base": {"w": weights(0, 0, 0), "fd": 7.5, "std": None, "precision": 0.25, "recall": 1}
    }
    models = {"base": neon.study.Candidate(weights(0, 0, 0), 6.5, None)}
    _, text, _ = written(tmp_path, capsys, final=final, models=models)
    assert cells(text, "base") == [
        "1",
        "base",
        "0",
        "6.5000",
        "7.5000",
        "",
        "",
        "0.250",
        "1.000",
        "",
    ]


def test_notes_of_the_report(tmp_path, capsys):
    placebo = [{"w": BEST, "fd": 1.0, "against_global": gain(-0.5) | {"verdict": "better"}}]
    _, text, _ = written(tmp_path, capsys, warnings=["all is well"], placebo=placebo)
    for note in (
        "Snapshot 1: blockwise against global -0.5000 [-0.5000, -0.5000]: better.",
        "Snapshot 1: random blocks 1 against global -0.5000 [-0.7000, -0.3000]: better.",
        "Warning, snapshot 1: all is well.",
        "Floor: 50 real images, of the selection part, score 0.1250 against the final one.",
        "Reference: nowhere, the same for selection and final comparison (10000 images).",
    ):
        assert note in text.split("\n\n") or note + "\n" in text


@pytest.mark.parametrize(
    "w, text",
    [
        (weights(1.5, 1.5, 1.5), "1.5"),
        (weights(-1, -1, -1), "-1"),
        (weights(0.5, 1, 1.23456), "enc 0.5, mid 1, dec 1.23"),
    ],
    ids=str,
)
def test_text_of_weights(w, text):
    assert neon.report.weights_text(w) == text


@pytest.mark.parametrize(
    "w, text",
    [
        ({"a": 0.5, "b": 1.0, "c": 0.5, "d": 0.5}, "a 0.5, b 1, c 0.5, d 0.5"),
        ({"a": 0.5, "b": 1.0, "c": 0.5, "d": 0.5, "e": 0.5}, "one for each of 5 blocks"),
        (dict.fromkeys("abcdefg", 0.55), "0.55"),
    ],
    ids=["few", "many", "equal"],
)
def test_weights_in_the_title_of_a_picture(w, text):
    assert neon.report.weights_title(w) == text


def test_keys_of_a_snapshot_in_the_summary(tmp_path, capsys):
    entry, _, summary = written(tmp_path, capsys)
    (found,) = summary["snapshots"]
    assert set(found) == {
        *("kimg", "blocks", "grid", "sweep", "base", "collapsed", "global", "blockwise"),
        *("final", "placebo", "warnings", "parts", "judges", "claims"),
    }
    assert found["global"] == {"w": weights(1, 1, 1), "fd": 1.5, "w_global": 1.0}
    assert found["blockwise"] == {"w": BEST, "fd": 1.0}
    assert len(found["grid"]) == 27 and found["grid"][0] == {
        "w": weights(0.5, 0.5, 0.5),
        "fd": 2.25,
        "seconds": 0.5,
        "low": 2.25,
        "high": 2.25,
    }
    assert [row["w_global"] for row in found["sweep"]] == [-1, 0, 0.5, 1, 1.5]
    assert summary["config"] == {"out": "x"}


def test_rows_of_the_summary_hold_precision_and_recall():
    row = score_of(2.0, precision=0.25, recall=0.5, w=BEST)
    entry = neon.study.Entry(1, {}, [], [row], {}, {}, [], [], {}, {}, [])
    assert entry.as_json()["grid"] == [
        {
            **{"w": BEST, "fd": 2.0, "seconds": 0.5, "low": 2.0, "high": 2.0},
            **{"precision": 0.25, "recall": 0.5},
        }
    ]


def test_summary_is_strict_json(tmp_path, capsys):
    def fd(w, seeds):
        return math.inf if w["enc"] == -1 else bowl(w)

    entry, _ = study_of(fd, final_repeats=2)
    neon.report.write_report(
        {
            "score": "FD",
            "snapshots": [entry.as_json()],
            "floors": [],
            "judges": ["own"],
            "reference": {},
        },
        tmp_path,
    )
    text = (tmp_path / "summary.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)["snapshots"][0]
    assert found["collapsed"]["fd"] is None and found["final"]["collapsed"]["all"] == [None, None]


@pytest.mark.parametrize(
    "value, want",
    [
        ({1: (1, 2.5)}, {"1": [1, 2.5]}),
        ([math.nan, -math.inf, True, None], [None, None, True, None]),
        (Path("a"), "a"),
    ],
    ids=str,
)
def test_strict_values(value, want):
    assert neon.report.strict(value) == want


def test_summary_of_a_run(tmp_path, capsys):
    scorer = toy_scorer(tmp_path)
    c = config(tmp_path, final_repeats=2)
    found = neon.study.summarise(
        c, ["--seed", "1"], [], scorer.judges, neon.study.seed_ledger(c), 0.5, CPU, 0.0
    )
    assert found["command"] == "python edm_neon.py --seed 1"
    assert found["first_seeds"]["selection"] == 10_000
    assert found["first_seeds"]["final"] == [50_000, 50_120]
    assert [floor["images"] for floor in found["floors"]] == [100, 120]
    assert found["reference"]["images"] == 400 and found["world"] == 1
    assert found["config"]["final_repeats"] == 2 and found["seconds_per_image"] == 0.5
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["scipy"] == scipy.__version__


def test_summary_names_the_version_of_diffusers_where_it_is_used(tmp_path, monkeypatch):
    def versions():
        ledger = neon.study.seed_ledger(c)
        return neon.study.summarise(c, [], [], scorer.judges, ledger, 0.5, CPU, 0.0)["versions"]

    scorer, c = toy_scorer(tmp_path), config(tmp_path)
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    assert "diffusers" not in versions()
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(__version__="9.9"))
    assert versions()["diffusers"] == "9.9"
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace())
    assert versions()["diffusers"] == "unknown"


def test_summary_without_real_images_has_no_floor(tmp_path):
    scorer = toy_scorer(tmp_path, real=False)
    c = config(tmp_path)
    found = neon.study.summarise(c, [], [], scorer.judges, neon.study.seed_ledger(c), 0.5, CPU, 0.0)
    assert found["floors"] == []


# -------------------- the repaired network
@pytest.mark.parametrize("best", ["base", "global", "blockwise", "searched"])
def test_network_that_is_saved_is_the_best_on_the_selection_seeds(tmp_path, best):
    names = ("base", "global", "blockwise", "searched")
    scorer, model = toy_scorer(tmp_path), ToyModel()
    models = {
        name: neon.study.Candidate(
            weights(i, i + 1, i), 1.0 if name == best else 2.0, scorer.merger
        )
        for i, name in enumerate(names)
    }
    entry = SimpleNamespace(kimg=7, models=models)
    c = config(tmp_path, export_pt=True)
    neon.study.save_merged(c, model, entry, scorer.parents)

    w = models[best].w
    want = blend(*toy_pair(), w, lambda name: name[:3]).state_dict()
    saved = safetensors.torch.load_file(tmp_path / "adaptive-neon-000007.safetensors")
    exported = torch.load(tmp_path / "adaptive-neon-000007.pt", weights_only=True)
    for name, tensor in want.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-6)
        assert torch.equal(exported[name], saved[name])
    recipe = {"model": best, "w": w, "partition": "paper", **scorer.parents}
    assert model.exported == recipe


def test_plain_weights_are_written_on_request_alone(tmp_path):
    scorer = toy_scorer(tmp_path)
    models = {"base": neon.study.Candidate(weights(0, 0, 0), 1.0, scorer.merger)}
    neon.study.save_merged(config(tmp_path), ToyModel(), SimpleNamespace(kimg=7, models=models), {})
    assert not [*tmp_path.glob("*.pt")] and len([*tmp_path.glob("*.safetensors")]) == 1


def test_saved_network_of_edm_is_read_back_with_its_recipe(tmp_path):
    base, aux, owners, merger = edm_merger("ncsnpp")
    entry = SimpleNamespace(kimg=7, models={"blockwise": neon.study.Candidate(BEST, 1.0, merger)})
    neon.study.save_merged(config(tmp_path), edm_model(), entry, {"aux_weights": "abc"})
    path = tmp_path / "adaptive-neon-000007.safetensors"
    want = blend(base, aux, BEST, owners.get).state_dict()
    for name, tensor in edm.load_network(path).state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=1e-6)
    with safetensors.safe_open(path, "pt") as file:
        recipe = json.loads(file.metadata()["config"])["recipe"]
    assert recipe == {"model": "blockwise", "w": BEST, "partition": "paper", "aux_weights": "abc"}


# -------------------- processes
def test_batches_keep_the_order_of_the_seeds():
    parts = CPU.map_batches(lambda part: part.tolist(), np.arange(5, 16), 4)
    assert [seed for part in parts for seed in part] == list(range(5, 16))
    assert max(len(part) for part in parts) <= 4


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_take_turns(monkeypatch, rank):
    """Every rank gets all results, in the order of the seeds."""
    mine, theirs = (
        neon.processes.Processes("cpu", rank, 2),
        neon.processes.Processes("cpu", 1 - rank, 2),
    )

    def work(part):
        return part.tolist()

    def gather(gathered, results):
        others = [part.tolist() for part in np.array_split(np.arange(10), 5)[1 - rank :: 2]]
        gathered[rank], gathered[1 - rank] = results, others

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    parts = mine.map_batches(work, np.arange(10), 2)
    assert parts == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]] and theirs.world == 2


@pytest.mark.parametrize(
    "error", [neon.processes.Diverged, neon.files.UserError, torch.OutOfMemoryError]
)
def test_other_ranks_hear_of_an_error(monkeypatch, error):
    told = []

    def gather(gathered, results):
        told.append(results)
        gathered[:] = [results, [1]]

    def work(part):
        raise error("too bad")

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(error):
        neon.processes.Processes("cpu", 0, 2).map_batches(work, np.arange(4), 2)
    assert [type(outcome) for outcome in told] == [error]


def test_divergence_on_another_rank_is_heard_of(monkeypatch):
    def gather(gathered, results):
        gathered[:] = [results, neon.processes.Diverged("not finite")]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(neon.processes.Diverged):
        neon.processes.Processes("cpu", 0, 2).map_batches(lambda part: 1, np.arange(4), 2)


@pytest.mark.parametrize(
    "processes, workers",
    [
        (neon.processes.Processes("cpu"), 6),
        (neon.processes.Processes("cpu", 0, 2), 1),
        (neon.processes.Processes("cuda"), 1),
    ],
    ids=["alone", "two ranks", "gpu"],
)
def test_batches_at_once(monkeypatch, processes, workers):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert processes.workers() == workers


# -------------------- what it will cost
@pytest.mark.parametrize(
    "options, counts",
    [
        ({}, (8 + 3, 4)),
        ({"sweep": (-1.0, 0.5)}, (8 + 4, 4)),
        ({"search": "cobyqa", "evaluations": 5}, (8 + 3 + 5, 5)),
        ({"search": "coordinate", "evaluations": 5}, (8 + 3 + 5, 5)),
        ({"search": "gradient", "evaluations": 5}, (8 + 3 + 30, 5)),
        ({"placebo": 2}, (24 + 3, 6)),
        ({"final_repeats": 3}, (8 + 3, 12)),
        ({"search": "cobyqa", "final_repeats": 3, "placebo": 1, "evaluations": 1}, (20, 18)),
    ],
    ids=str,
)
def test_number_of_scores(options, counts):
    c = config(Path("."), **options)
    scores, images, final, final_images = neon.cli.count_images(c, BLOCKS)
    assert (scores, final) == counts
    assert (images, final_images) == (100 * scores, 120 * final)


@pytest.mark.parametrize(
    "seconds, options, refused",
    [
        (1.0, {}, False),
        (6.0, {}, True),
        (6.0, {"yes": True}, False),
        (6.0, {"plan": True}, False),
        (6.0, {"device": "cuda"}, False),
    ],
    ids=str,
)
def test_hours_without_a_gpu_are_refused(seconds, options, refused):
    """11 scores of 100 images, 4 of 120 and 100 synthetic ones: 1,680 images."""
    c = config(Path("."), **options)
    if refused:
        with pytest.raises(
            neon.files.UserError, match="about 3 hours of sampling alone: add --yes"
        ):
            neon.cli.refuse_hours(c, seconds, BLOCKS)
    else:
        neon.cli.refuse_hours(c, seconds, BLOCKS)


def test_hours_grow_with_the_blocks_of_the_partition():
    """Eight blocks: 256 points of 100 images instead of 8."""
    c = config(Path("."))
    neon.cli.refuse_hours(c, 1.0, BLOCKS)
    with pytest.raises(neon.files.UserError, match="about 7 hours of sampling alone"):
        neon.cli.refuse_hours(c, 1.0, tuple("abcdefgh"))


def test_measuring_time_changes_no_setting():
    base, model = network(), edm_model()
    sampler = neon.sampling.Sampler(model, base, CPU, 5, 32)
    threads = torch.get_num_threads()
    assert neon.sampling.time_sampling(sampler, "fp32")[0] > 0
    assert torch.get_num_threads() == threads and (sampler.steps, sampler.batch) == (5, 32)


# -------------------- command line
def parsed(tmp_path, *argv):
    return parse(["--preset", PRESET, "--out", str(tmp_path), *argv])


def test_options_are_the_presets_unless_given(tmp_path):
    defaults = edm.PRESETS[PRESET].defaults
    c = parsed(tmp_path, "--lr", "0.5")
    for name, value in (defaults | {"lr": 0.5}).items():
        assert getattr(c, name) == value


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--grid", "1,0.5,1"], "grid", (0.5, 1.0)),
        (["--grid", "-1,0.5"], "grid", (-1.0, 0.5)),
        (["--snapshot", "1551,550"], "snapshot", (550, 1551)),
        (["--sweep", "-1:0.5:0.5"], "sweep", (-1.0, -0.5, 0.0, 0.5)),
        (["--sweep", "0:0.3:0.1"], "sweep", (0.0, 0.1, 0.2, 0.3)),
        (["--bounds", "-2,3"], "bounds", (-2.0, 3.0)),
        (["--protocol", "paper"], "select_images", 2000),
        (["--protocol", "paper"], "labels", "random"),
        (["--protocol", "paper", "--labels", "balanced"], "labels", "balanced"),
        (["--race"], "labels", "balanced"),
        (["--precision", "tf32", "--device", "cpu"], "precision", "fp32"),
        (["--precision", "bf16"], "precision", "bf16"),
        (["--race"], "race", True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_of_options(tmp_path, argv, name, value):
    assert getattr(parsed(tmp_path, *argv), name) == value


@pytest.mark.parametrize("block", BLOCKS)
def test_grid_of_a_block(tmp_path, block):
    c = parsed(tmp_path, "--grid", "1,2", f"--grid-{block}", "3")
    assert {name: c.grid_of(name) for name in BLOCKS} == dict.fromkeys(BLOCKS, (1.0, 2.0)) | {
        block: (3.0,)
    }
