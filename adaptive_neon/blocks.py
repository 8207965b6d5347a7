"""Blocks of a network, and merging two networks block by block."""

import copy
import fnmatch
import math

import numpy as np
import torch

from .extension import neon_ext
from .files import UserError, printable
from .keys import weights_hash


def movable_parameters(net, like=None):
    """{name: parameter} that training moves and extrapolation steps: all, or those that `like`
    (default: the network itself) lets learn, if it tells them apart. Tied parameters appear once;
    buffers never do."""
    learns = {name: parameter.requires_grad for name, parameter in (like or net).named_parameters()}
    frozen = any(learns.values())
    return {name: p for name, p in net.named_parameters() if learns[name] or not frozen}


def glob_owner(name, table):
    """The block that the first fitting pattern of --partition FILE gives a parameter, and that
    pattern."""
    for pattern, block in table.items():
        if fnmatch.fnmatchcase(name, pattern):
            return block, pattern
    raise UserError(f'--partition: no pattern owns {name}; end the file with "*": "rest"')


def partition_owners(model, net, partition):
    """{parameter: block} for every parameter that moves."""
    names = list(movable_parameters(net))
    if isinstance(partition, dict):
        owners, used = {}, set()
        for name in names:
            owners[name], pattern = glob_owner(name, partition)
            used.add(pattern)
        for pattern in partition:
            if pattern not in used and pattern != "*":
                raise UserError(
                    f"--partition: {printable(pattern)} matches no parameter that earlier patterns "
                    f"leave; the names look like {names[0]}"
                )
        return owners
    if partition == "layers":
        return {name: model.layer(name) for name in names}
    return {name: model.block(name, net, partition) for name in names}


def block_order(owners):
    """The blocks: encoder, middle, decoder in this order, others as they appear in the network."""
    blocks = list(dict.fromkeys(owners.values()))
    if set(blocks) <= {"enc", "mid", "dec"}:
        blocks.sort(key=["enc", "mid", "dec"].index)
    return blocks


def placebo_owners(merger, model, seed, draws=200):
    """{parameter: block} at random: layers change blocks as a whole, every block keeps its number
    of layers and, the closest of many draws, nearly its size."""
    layer_of = {name: (model.layer(name), block) for name, block in merger.owners.items()}
    layers = list(dict.fromkeys(layer_of.values()))
    sizes = dict.fromkeys(layers, 0)
    for name, layer in layer_of.items():
        sizes[layer] += merger.theta_r[name].numel()
    sizes = np.array([sizes[layer] for layer in layers])
    blocks = np.array([block for _, block in layers])

    def log_sizes(assigned):
        return np.log([sizes[assigned == block].sum() for block in np.unique(blocks)])

    rng = np.random.default_rng(seed)
    best, least = None, math.inf
    for _ in range(draws):
        assigned = rng.permutation(blocks)
        if (assigned == blocks).all():  # few layers: their own blocks fit best, and are no placebo
            continue
        mismatch = np.abs(log_sizes(assigned) - log_sizes(blocks)).max()
        if mismatch < least:
            best, least = assigned, mismatch
    if best is None:
        raise UserError("--placebo: the layers of this network allow no other blocks than its own")
    return {name: str(best[layers.index(layer)]) for name, layer in layer_of.items()}


class Merger:
    """All extrapolations of two networks, written into the sampler's network in one fused pass.
    Buffers and frozen parameters stay the base's: an extrapolated variance could be negative."""

    def __init__(self, base, aux, owners, sampler):
        ours, theirs = dict(base.named_parameters()), dict(aux.named_parameters())
        for name in [*ours, *theirs]:
            r, s = (
                tuple(side[name].shape) if name in side else "absent" for side in (ours, theirs)
            )
            if r != s:
                raise UserError(
                    f"base and self-trained network differ, first at {name}: {r} and {s}"
                )
        self.aux_hash = weights_hash(aux)
        self.net = sampler.net
        self.use(owners)

        # In the network's memory format, so that set() is one pass without copies.
        resident = dict(self.net.named_parameters())
        self.targets = [resident[name].detach() for name in owners]
        self.theta_r, self.theta_s = {}, {}
        for name in owners:
            self.theta_r[name] = torch.empty_like(resident[name]).copy_(ours[name].detach())
            self.theta_s[name] = torch.empty_like(resident[name]).copy_(theirs[name].detach())

    def use(self, owners):
        """owners: {parameter: block}."""
        self.owners = owners
        self.blocks = block_order(owners)
        self.index = [self.blocks.index(block) for block in owners.values()]

    def with_owners(self, owners):
        """The same networks cut into other blocks."""
        other = copy.copy(self)
        other.use({name: owners[name] for name in self.owners})
        return other

    def set(self, w):
        """w: {block: weight} -> the resident network with those weights."""
        values = [float(w[block]) for block in self.blocks]
        theta_r, theta_s = list(self.theta_r.values()), list(self.theta_s.values())
        neon_ext.extrapolate(theta_r, theta_s, self.index, values, out=self.targets)
        return self.net

    def table(self):
        """{block: tensors, parameters, relative drift ||theta_s - theta_r|| / ||theta_r||}."""

        def norm(tensors):
            return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))

        rows = {}
        for block in self.blocks:
            names = [name for name, owner in self.owners.items() if owner == block]
            moved = norm([self.theta_s[name] - self.theta_r[name] for name in names])
            size = norm([self.theta_r[name] for name in names])
            rows[block] = {
                "tensors": len(names),
                "parameters": sum(self.theta_r[name].numel() for name in names),
                "drift": moved / size if size else 0.0 if moved == 0 else math.inf,
            }
        return rows
