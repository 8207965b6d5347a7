"""edm_neon.py: partitions, merging, seeds, stages, the study of a snapshot, and its report."""

import argparse
import itertools

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
