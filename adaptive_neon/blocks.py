"""Blocks of a network, and merging two networks block by block.

theta = theta_r - w_block * (theta_s - theta_r)     w > 0 away from collapse, w < 0 towards it
"""

import copy
import fnmatch
import math
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .extension import neon_ext
from .files import UserError, printable
from .keys import weights_hash

Blocks = str | dict[str, str] | Callable[[str], str]


# -------------------- partitions
def movable_parameters(net: nn.Module, like: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """{name: parameter} that training moves and extrapolation steps: all, or those that `like`
    (default: the network itself) lets learn, if it tells them apart. Tied parameters appear
    once."""
    learns = {name: parameter.requires_grad for name, parameter in (like or net).named_parameters()}
    frozen = any(learns.values())
    return {name: p for name, p in net.named_parameters() if learns[name] or not frozen}


def layer_of(name: str) -> str:
    """The module that holds a parameter, at most three names deep."""
    module, _, _ = name.partition(".parametrizations.")  # weight_norm's original0, original1
    parts = module.split(".") if module != name else name.split(".")[:-1]
    return ".".join(parts[:3]) or name


def partition(names: list[str], blocks: Blocks) -> dict[str, str]:
    """{parameter: block}. blocks: "layers", a function of the name, or {glob: block}, of which the
    first that fits counts. UserError for a name that no glob owns, and for a glob that owns
    none."""
    if blocks == "layers":
        return {name: layer_of(name) for name in names}
    if callable(blocks):
        return {name: blocks(name) for name in names}
    if not isinstance(blocks, dict):
        raise UserError(f'blocks are "layers", a function or {{glob: block}}, not {blocks!r}')

    owners, used = {}, set()
    for name in names:
        for pattern, block in blocks.items():
            if fnmatch.fnmatchcase(name, pattern):
                owners[name] = block
                used.add(pattern)
                break
        else:
            raise UserError(f'--partition: no pattern owns {name}; end the file with "*": "rest"')
    for pattern in blocks:
        if pattern not in used and pattern != "*":
            raise UserError(
                f"--partition: {printable(pattern)} matches no parameter that earlier patterns "
                f"leave; the names look like {names[0]}"
            )
    return owners


def block_order(owners: dict[str, str]) -> list[str]:
    """The blocks: encoder, middle, decoder in this order, others as they appear in the network."""
    blocks = list(dict.fromkeys(owners.values()))
    if set(blocks) <= {"enc", "mid", "dec"}:
        blocks.sort(key=["enc", "mid", "dec"].index)
    return blocks


def placebo_partitions(merger: "Merger", layer: Callable[[str], str], count: int) -> list[dict]:
    """Different random {parameter: block}: layers change blocks as a whole, every block keeps its
    number of layers and, the closest of many draws, nearly its size. Fewer where there are no more
    ways to deal the layers out; UserError where there is none. layer: of a parameter."""
    layer_of_name = {name: (layer(name), block) for name, block in merger.owners.items()}
    layers = list(dict.fromkeys(layer_of_name.values()))
    sizes = dict.fromkeys(layers, 0)
    for name, key in layer_of_name.items():
        sizes[key] += merger.theta_r[name].numel()
    size = np.array([sizes[key] for key in layers])
    own = np.array([block for _, block in layers])

    # The network's own blocks would fit best, and are no placebo.
    drawn = {groups(own)}
    partitions = []
    for seed in range(count):
        assigned = draw_partition(own, size, drawn, np.random.default_rng(seed))
        if assigned is None:
            break
        drawn.add(groups(assigned))
        blocks = dict(zip(layers, map(str, assigned), strict=True))
        partitions.append({name: blocks[key] for name, key in layer_of_name.items()})
    if count and not partitions:
        raise UserError("--placebo: the layers of this network allow no other blocks than its own")
    return partitions


def groups(assigned) -> frozenset:
    """Which layers go together, whatever their block is called: blocks that change names are the
    same networks again."""
    return frozenset(tuple(np.flatnonzero(assigned == block)) for block in np.unique(assigned))


def draw_partition(own, size, drawn, rng, draws: int = 200):
    """The blocks of the layers, shuffled: of `draws` that are not in `drawn` the one whose blocks'
    sizes are the closest to those of `own`; None if there is none. own, size: [layers]."""

    def log_sizes(assigned):
        return np.log([size[assigned == block].sum() for block in np.unique(own)])

    best, least = None, math.inf
    for _ in range(draws):
        assigned = rng.permutation(own)
        if groups(assigned) in drawn:
            continue
        mismatch = np.abs(log_sizes(assigned) - log_sizes(own)).max()
        if mismatch < least:
            best, least = assigned, mismatch
    return best


# -------------------- merging
class Merger:
    """All extrapolations of two networks, written into one network in a fused pass.

    base, aux: theta_r and theta_s; aux may be a state dict. blocks: see partition(). At w = 0 in
    every block the network is the base, at w = -1 the self-trained one, to the bit. Parameters that
    do not move and buffers take no step beyond either network, since an extrapolated variance could
    be negative: they go from the base's to the self-trained one's with w from 0 to -1 and stay
    there; whole numbers are the self-trained network's at w = -1 alone. Vectors of spectral
    normalisation are computed anew for the merged weight.
    """

    def __init__(self, base: nn.Module, aux: nn.Module | dict, blocks: Blocks = "layers"):
        if isinstance(aux, dict):
            state, aux = aux, copied(base)
            aux.load_state_dict(state)
        check_same_tensors(tensors_of(base), tensors_of(aux), "base and self-trained network")
        self.base, self.aux = base, aux
        self.base_hash, self.aux_hash = weights_hash(base), weights_hash(aux)
        self.net: nn.Module | None = None
        self.theta_r = {name: p.detach() for name, p in movable_parameters(base).items()}
        theirs = dict(aux.named_parameters())
        self.theta_s = {name: theirs[name].detach() for name in self.theta_r}
        self.rest = self.differing_rest()
        self.use(partition(list(self.theta_r), blocks))

    def use(self, owners: dict[str, str]) -> None:
        """owners: {parameter: block}."""
        self.owners = owners
        self.blocks = block_order(owners)
        self.index = [self.blocks.index(block) for block in owners.values()]

    def with_blocks(self, blocks: Blocks) -> "Merger":
        """The same networks, and the same resident one, cut into other blocks."""
        other = copy.copy(self)
        other.use(partition(list(self.theta_r), blocks))
        return other

    def attach(self, net: nn.Module) -> None:
        """Let set() write into this network, as that of a sampler."""
        self.net = net
        resident = dict(net.named_parameters())
        self.targets = [resident[name].detach() for name in self.owners]
        self.spectral = spectral_weights(net)

        # In the network's memory format, so that set() is one pass without copies.
        for theta in (self.theta_r, self.theta_s):
            for name in self.owners:
                theta[name] = torch.empty_like(resident[name]).copy_(theta[name])

    def weights(self, w: float | dict[str, float]) -> dict[str, float]:
        """{block: weight} of one number for all blocks, or of one for each; rounded: the same key
        after a resume."""
        if not isinstance(w, dict):
            w = dict.fromkeys(self.blocks, float(w))
        return {block: round(float(w[block]), 6) for block in self.blocks}

    def parameter_weights(self, w: dict[str, float]) -> dict[str, float]:
        """{parameter: weight}: the same for every partition that gives the same network."""
        return {name: float(w[block]) for name, block in self.owners.items()}

    @torch.no_grad()
    def set(self, w: float | dict[str, float]) -> nn.Module:
        """The resident network with the weights w: one number, or one for each block."""
        if self.net is None:
            self.attach(copied(self.base).eval().requires_grad_(False))
        assert self.net is not None
        w = self.weights(w)
        values = [w[block] for block in self.blocks]
        theta_r, theta_s = list(self.theta_r.values()), list(self.theta_s.values())
        neon_ext.extrapolate(theta_r, theta_s, self.index, values, out=self.targets)
        self.set_rest(w)
        return self.net

    # ---------- buffers, and parameters that do not move
    def differing_rest(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """{name: (base's, self-trained one's)} of all other tensors in which the networks
        differ."""
        ours, theirs = (tensors_of(net) for net in (self.base, self.aux))
        rest = {}
        for name, tensor in ours.items():
            if name not in self.theta_r and not torch.equal(tensor, theirs[name]):
                rest[name] = tensor.detach(), theirs[name].detach()
        return rest

    def set_rest(self, w: dict[str, float]) -> None:
        assert self.net is not None
        resident = tensors_of(self.net)
        for name, (ours, theirs) in self.rest.items():
            # How far it goes, by the weight of the module that it belongs to.
            share = min(max(-w[self.owner_of(name)], 0.0), 1.0)
            value = ours
            if share == 1:
                value = theirs
            elif share > 0 and ours.is_floating_point():
                value = torch.lerp(ours, theirs, share)
            resident[name].copy_(value)

        for name, module, norm, start in self.spectral:
            if w[self.owners.get(name, self.blocks[0])] not in (0, -1):
                renew_spectral_vectors(dict(self.net.named_parameters())[name], module, norm, start)

    def owner_of(self, name: str) -> str:
        """The block of a tensor without one: that of the parameter whose name agrees the
        furthest."""

        def agreement(parameter):
            return len(os.path.commonprefix([name.split("."), parameter.split(".")]))

        return self.owners[max(self.owners, key=agreement)]

    def rule(self) -> str:
        """What happens to the rest, for the report; empty where the networks agree in it."""
        if not self.rest:
            return ""
        first = next(iter(self.rest))
        return (
            f"{len(self.rest)} buffers and frozen parameters differ between base and self-trained "
            f"network ({first}, ...): they are the base's for w >= 0, the other's for w <= -1, and "
            "between them in between"
        )

    def table(self) -> dict[str, dict]:
        """{block: tensors, parameters, relative drift ||theta_s - theta_r|| / ||theta_r||}."""

        def norm(tensors):
            return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))

        rows = {}
        for block in self.blocks:
            names = [name for name, owner in self.owners.items() if owner == block]
            moved = norm([self.theta_s[name] - self.theta_r[name] for name in names])
            size = norm([self.theta_r[name] for name in names])
            drift = 0.0 if moved == 0 else math.inf
            if size > 0:
                drift = moved / size
            rows[block] = {
                "tensors": len(names),
                "parameters": sum(self.theta_r[name].numel() for name in names),
                "drift": drift,
            }
        return rows


def copied(net: nn.Module) -> nn.Module:
    """A copy, whatever the network has computed: the older spectral normalisation keeps the weight
    of its last call, with the graph that torch refuses to copy."""
    for module in net.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                setattr(module, name, value.detach())
    return copy.deepcopy(net)


def tensors_of(net: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return dict(net.named_parameters()) | dict(net.named_buffers())


def check_same_tensors(ours: dict, theirs: dict, which: str) -> None:
    """The same names and shapes, in {name: tensor} of two networks."""
    for name in [*ours, *theirs]:
        shapes = []
        for side in (ours, theirs):
            shapes.append(tuple(side[name].shape) if name in side else "absent")
        if shapes[0] != shapes[1]:
            raise UserError(f"{which} differ, first at {name}: {shapes[0]} and {shapes[1]}")


def spectral_weights(net: nn.Module) -> list[tuple[str, nn.Module, object, str]]:
    """Of every weight under spectral normalisation: (name of its parameter, module that holds its
    singular vectors, its SpectralNorm of torch, beginning of the vectors' names)."""
    found: list[tuple[str, nn.Module, object, str]] = []
    for prefix, module in net.named_modules():
        # torch.nn.utils.parametrizations.spectral_norm
        if type(module).__name__ == "_SpectralNorm" and hasattr(module, "_u"):
            found.append((f"{prefix.rpartition('.')[0]}.original", module, module, ""))

        # torch.nn.utils.spectral_norm, the older one
        for hook in module._forward_pre_hooks.values():
            if type(hook).__name__ == "SpectralNorm":
                name = f"{prefix}.{hook.name}_orig".removeprefix(".")
                found.append((name, module, hook, hook.name))
    return found


def renew_spectral_vectors(weight: torch.Tensor, module: nn.Module, norm, start: str) -> None:
    """The leading singular vectors of the weight as it is now: with those of another weight, a
    "normalised" one may have any norm."""
    if hasattr(norm, "reshape_weight_to_matrix"):
        matrix = norm.reshape_weight_to_matrix(weight)
    else:
        matrix = norm._reshape_weight_to_matrix(weight)
    u, _, vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    getattr(module, f"{start}_u").copy_(u[:, 0])
    getattr(module, f"{start}_v").copy_(vh[0])
