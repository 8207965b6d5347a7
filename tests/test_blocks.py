"""Partitions, merging, random blocks."""

import argparse
import itertools
import math

import numpy as np
import pytest
import torch
from edm_helpers import (
    BEST,
    KINDS,
    ToyModel,
    ToyNet,
    blend,
    edm_model,
    network,
    owners_of,
    pair,
    toy_pair,
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
    owners = owners_of(edm_model(), net, partition)
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
        assert owners_of(model, net, partition)[f"model.{name}"] == want


def test_paper_partition_of_the_cifar10_network():
    with torch.device("meta"):
        net = neon.networks.EDMPrecond(**edm.PRESETS["cifar10"].network)
    owners = owners_of(edm_model(), net, "paper")
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


LAYERS = {
    "gain": "gain",
    "head.bias": "head",
    "a.b.c.d.weight": "a.b.c",
    "head.parametrizations.weight.original0": "head",
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_of_a_parameter(name):
    """Three names deep, and what torch makes of one weight stays together."""
    assert neon.blocks.layer_of(name) == LAYERS[name]


def custom(table):
    return owners_of(ToyModel(), ToyNet(), table)


def test_first_pattern_that_fits_owns_a_parameter():
    owners = custom({"enc.0.*": "first", "enc.*": "second", "*": "rest"})
    assert owners["enc.0.bias"] == "first" and owners["enc.1.bias"] == "second"
    assert owners["mid_unused"] == "rest"


@pytest.mark.parametrize(
    "table, idle",
    [({"enc.7.*": "a", "*": "rest"}, "enc.7"), ({"enc.*": "a", "enc.0.*": "b", "*": "c"}, "enc.0")],
    ids=["nowhere", "behind a wider one"],
)
def test_pattern_that_owns_nothing_is_refused(table, idle):
    """But the last resort, *, may be idle."""
    with pytest.raises(neon.files.UserError, match=f"{idle}.* matches no parameter"):
        custom(table)
    assert set(custom({"[a-z]*": "a", "*": "rest"}).values()) == {"a"}


def test_parameter_that_no_pattern_owns_is_refused():
    with pytest.raises(neon.files.UserError, match="no pattern owns mid_unused"):
        custom({"*.*": "a"})


def test_patterns_tell_upper_and_lower_case_apart():
    with pytest.raises(neon.files.UserError, match="matches no parameter"):
        custom({"ENC*": "a", "*": "rest"})


@pytest.mark.parametrize("text", ['{"*": 3}', '["*"]', "{"], ids=["a number", "a list", "half"])
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


def edm_merger(kind, partition="paper"):
    base, aux = pair(kind)
    owners = owners_of(edm_model(), base, partition)
    return base, aux, owners, neon.blocks.Merger(base, aux, owners.get)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_the_formula(kind):
    w = weights(1.25, 0.5, -0.7)
    base, aux, owners, merger = edm_merger(kind)
    want = dict(blend(base, aux, w, owners.get).named_parameters())
    for name, tensor in merger.set(w).named_parameters():
        torch.testing.assert_close(tensor, want[name], rtol=1e-6, atol=1e-6)


def test_networks_that_were_merged_stay():
    base, aux = toy_pair()
    before = [neon.keys.weights_hash(net) for net in (base, aux)]
    neon.blocks.Merger(base, aux, lambda name: name[:3]).set(BEST)
    assert [neon.keys.weights_hash(net) for net in (base, aux)] == before


class Mixed(nn.Module):
    """Buffers of both kinds, a frozen parameter, two tied ones, BatchNorm and spectral
    normalisation, new and old."""

    def __init__(self, value):
        super().__init__()
        torch.manual_seed(int(10 * value))
        self.free = nn.Parameter(torch.full((3,), value))
        self.frozen = nn.Parameter(torch.full((2,), value), requires_grad=False)
        self.tied = nn.Linear(2, 2, bias=False)
        self.again = nn.Linear(2, 2, bias=False)
        self.again.weight = self.tied.weight
        nn.init.constant_(self.tied.weight, value)
        self.register_buffer("variance", torch.full((2,), value))
        self.register_buffer("hidden", torch.full((2,), value), persistent=False)
        self.norm = nn.BatchNorm1d(4)
        self.spectral = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.old = torch.nn.utils.spectral_norm(nn.Linear(4, 4))

    def forward(self, x):
        return self.old(self.spectral(self.norm(x)))


def mixed_pair():
    """Networks that were used, so that their statistics and singular vectors differ."""
    nets = []
    for value in (1.0, 3.0):
        net = Mixed(value)
        for _ in range(3 * int(value)):
            net(value * torch.randn(8, 4)).sum().backward()  # keeps a graph, as training does
        nets.append(net.eval())
    return nets


SIDES = ("free", "tied")


def side_of(name):
    """Two blocks, so that a buffer's weight is that of its own module."""
    return "a" if name.startswith(SIDES) else "b"


@pytest.fixture
def mixed():
    base, aux = mixed_pair()
    return base, aux, neon.blocks.Merger(base, aux, side_of)


def test_tied_parameters_are_owned_once(mixed):
    assert [name for name in mixed[2].owners if "tied" in name or "again" in name] == [
        "tied.weight"
    ]


def test_tied_parameters_move_once_and_stay_tied(mixed):
    net = mixed[2].set(0.5)
    assert net.tied.weight is net.again.weight and bool((net.tied.weight == 0).all())


@pytest.mark.parametrize("value, side", [(0, 0), (-1, 1)], ids=["base", "self-trained"])
@pytest.mark.parametrize("given", ["a network", "a state dict"])
def test_ends_of_the_line_are_the_networks_to_the_bit(mixed, value, side, given):
    """Buffers, whole numbers and frozen parameters, and what the networks compute."""
    base, aux, merger = mixed
    if given == "a state dict":
        base.hidden.copy_(aux.hidden)  # is in none
        merger = neon.blocks.Merger(base, aux.state_dict(), side_of)
    merger.set(0.7)
    net, want = merger.set(value), mixed[side]
    theirs = dict(want.named_buffers()) | dict(want.named_parameters())
    for name, tensor in (*net.named_buffers(), *net.named_parameters()):
        assert torch.equal(tensor, theirs[name]), name
    x = torch.randn(5, 4)
    assert torch.equal(net(x), want(x))


@pytest.mark.parametrize("w, share", [(1.5, 0.0), (-0.25, 0.25), (-2.0, 1.0)])
def test_the_rest_stays_between_the_networks(mixed, w, share):
    base, aux, merger = mixed
    nets = (base, aux, merger.set(w))
    ours, theirs, found = (dict(net.state_dict()) | dict(net.named_buffers()) for net in nets)
    for name in ("frozen", "variance", "hidden", "norm.running_mean", "norm.running_var"):
        want = ours[name] + share * (theirs[name] - ours[name])
        torch.testing.assert_close(found[name], want)


def test_whole_numbers_are_the_bases_on_the_way(mixed):
    base, _, merger = mixed
    assert merger.set(-0.5).norm.num_batches_tracked == base.norm.num_batches_tracked != 9


def test_a_buffer_follows_the_block_of_its_module(mixed):
    base, aux, merger = mixed
    net = merger.set({"a": 1.0, "b": -1.0})
    assert torch.equal(net.norm.running_var, aux.norm.running_var)
    assert torch.equal(net.variance, base.variance)


@pytest.mark.parametrize("w", [2.0, -0.4, -3.0])
def test_a_spectrally_normalised_weight_keeps_the_norm_one(mixed, w):
    net = mixed[2].set(w)
    net(torch.zeros(1, 4))  # the older form computes its weight in the call
    for weight in (net.spectral.weight, net.old.weight):
        assert float(torch.linalg.matrix_norm(weight.detach(), 2)) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    "normalised", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm]
)
def test_a_network_that_is_one_spectrally_normalised_layer(normalised):
    base, aux = (normalised(nn.Linear(4, 4)).eval() for _ in range(2))
    net = neon.blocks.Merger(base, aux, lambda name: "all").set(2.0)
    net(torch.zeros(1, 4))
    assert float(torch.linalg.matrix_norm(net.weight.detach(), 2)) == pytest.approx(1, rel=1e-4)


def test_the_rule_is_told_where_the_networks_differ_in_it(mixed):
    assert "buffers and frozen parameters differ" in mixed[2].rule()
    base, aux = ToyNet(), ToyNet()
    assert neon.blocks.Merger(base, aux, "layers").rule() == ""


def test_a_network_whose_parameters_are_all_frozen_moves():
    assert len(neon.blocks.movable_parameters(ToyNet().requires_grad_(False))) == 14


def test_what_moves_is_decided_by_the_network_like_it():
    net, like = Mixed(1.0).requires_grad_(False), Mixed(1.0)
    assert "frozen" not in neon.blocks.movable_parameters(net, like=like)


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
    with pytest.raises(neon.files.UserError, match=message):
        neon.blocks.Merger(*nets)


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


def test_a_block_of_zeros_that_moved_drifts_without_end():
    base, aux = nn.Linear(2, 2), nn.Linear(2, 2)
    for parameter in (*base.parameters(), aux.bias):
        nn.init.zeros_(parameter)
    rows = neon.blocks.Merger(base, aux, lambda name: name).table()
    assert (rows["weight"]["drift"], rows["bias"]["drift"]) == (math.inf, 0)


def test_same_networks_in_other_blocks():
    merger = neon.blocks.Merger(*toy_pair(), lambda name: name[:3])
    merger.set(BEST)
    other = merger.with_blocks({"*": "one"})
    assert other.blocks == ["one"] and merger.blocks == [*BLOCKS] and other.net is merger.net
    want = blend(*toy_pair(), {"one": 0.5}, lambda name: "one").state_dict()
    found = other.set({"one": 0.5}).state_dict()
    assert all(torch.allclose(found[name], want[name], atol=1e-6) for name in want)


# -------------------- random blocks


@pytest.fixture(scope="module")
def partitioned():
    base = network(num_blocks=2)
    model = edm_model()
    owners = owners_of(model, base, "paper")
    return neon.blocks.Merger(base, base, owners.get), model


def layers_of(owners, model):
    """{block: its layers}"""
    found = {}
    for name, block in owners.items():
        found.setdefault(block, set()).add(model.layer(name))
    return found


def counts_and_sizes(owners, merger, model):
    """Of every block, {block: (layers, parameters)}; no layer is in two."""
    layers = layers_of(owners, model)
    assert len(set().union(*layers.values())) == sum(map(len, layers.values()))
    sizes = dict.fromkeys(BLOCKS, 0)
    for name, block in owners.items():
        sizes[block] += merger.theta_r[name].numel()
    return {block: (len(layers[block]), sizes[block]) for block in BLOCKS}


def test_random_blocks_keep_their_numbers_of_layers_and_nearly_their_sizes(partitioned):
    """The bottleneck's layers are split between blocks in no partition."""
    merger, model = partitioned
    want = counts_and_sizes(merger.owners, merger, model)
    for owners in neon.blocks.placebo_partitions(merger, model.layer, 3):
        assert [*owners] == [*merger.owners]
        for block, (layers, size) in counts_and_sizes(owners, merger, model).items():
            assert layers == want[block][0] and size == pytest.approx(want[block][1], rel=0.2)


def test_random_blocks_differ_and_repeat(partitioned, monkeypatch):
    """Each has a random stream of its own."""
    merger, model = partitioned
    streams, generator = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda k: streams.append(k) or generator(k))
    found = neon.blocks.placebo_partitions(merger, model.layer, 4)
    assert streams == [0, 1, 2, 3]
    assert all(one != other for one, other in itertools.combinations([*found, merger.owners], 2))
    assert found[:3] == neon.blocks.placebo_partitions(merger, model.layer, 3)


def test_random_blocks_of_a_small_network_never_repeat():
    """Nor do they come again with their names exchanged, which makes the same networks."""
    merger = neon.blocks.Merger(*toy_pair(), lambda name: name[:3])
    found = neon.blocks.placebo_partitions(merger, ToyModel().layer, 30)
    dealt = set()
    for owners in [*found, merger.owners]:
        groups = {block: frozenset(n for n in owners if owners[n] == block) for block in BLOCKS}
        dealt.add(frozenset(groups.values()))
    assert len(found) == 30 and len(dealt) == 31


def test_fewer_random_blocks_where_there_are_no_more():
    """One layer of three apart: two other ways."""
    merger = neon.blocks.Merger(*toy_pair(), {"enc.*": "a", "*": "b"})
    found = neon.blocks.placebo_partitions(merger, lambda name: name[:3], 5)
    alone = [{name[:3] for name, block in owners.items() if block == "a"} for owners in found]
    assert sorted(alone, key=sorted) == [{"dec"}, {"mid"}]


def test_exchanged_names_are_no_other_blocks():
    merger = neon.blocks.Merger(*toy_pair(), {"enc.*": "a", "*": "b"})
    with pytest.raises(neon.files.UserError, match="--placebo: .* no other blocks"):
        neon.blocks.placebo_partitions(merger, lambda name: name[:3] == "enc", 1)


def test_random_blocks_of_one_block_are_refused():
    merger = neon.blocks.Merger(*toy_pair(), lambda name: "one")
    with pytest.raises(neon.files.UserError, match="--placebo: .* no other blocks"):
        neon.blocks.placebo_partitions(merger, ToyModel().layer, 1)
