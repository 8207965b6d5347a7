"""Training: the base, and the base on its own samples."""

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from .blocks import movable_parameters
from .files import Refused, load_state, reading, save_state
from .processes import Processes
from .sampling import network_calls

SHARE = 20  # of a training: its ramp and the half-life of its average, where nobody says otherwise


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained; all of it is in the key of the result."""

    name: str
    batch: int
    lr: float
    ramp_kimg: float  # the learning rate grows linearly over this
    ema_kimg: float  # half-life of the weight average
    seed: int
    ramp_ratio: float | None = None  # the half-life is at most this share of what was seen
    precision: str = "fp32"


def self_train(
    model,
    net: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    kimg: float,
    lr: float = 1e-4,
    batch: int = 64,
    ema_kimg: float | None = None,
    ramp_kimg: float | None = None,
    seed: int = 0,
    state: Path | None = None,
) -> nn.Module:
    """The weight average of a copy of `net` after `kimg` thousand of its own samples, uint8
    [N, C, H, W]; `net` stays as it is.

    ramp_kimg: the learning rate grows linearly over this; ema_kimg: half-life of the average; each
    a twentieth of kimg if None (NEON's for EDM's networks: 10,000 and 500). state: a file to go on
    from after a stop."""
    ramp_kimg = kimg / SHARE if ramp_kimg is None else ramp_kimg
    ema_kimg = kimg / SHARE if ema_kimg is None else ema_kimg
    recipe = Recipe("self-training", batch, lr, ramp_kimg, ema_kimg, seed)
    path = None if state is None else Path(state)
    return train(model, copy.deepcopy(net), images, labels, recipe, [kimg], state_path=path)


def train(
    model,
    net: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    recipe: Recipe,
    snapshots: Sequence[float],
    save: Callable[[nn.Module, float], None] | None = None,
    state_path: Path | None = None,
    processes: Processes | None = None,
) -> nn.Module:
    """Adam on the model's loss -> the weight average after the last snapshot.

    images: uint8 [N, C, H, W]; snapshots: kimg at which save(average, kimg) is called on the first
    rank; state_path: a stopped run goes on from it, to the same bytes as one that never stopped."""
    processes = processes or Processes(next(net.parameters()).device.type)
    training = Training(model, net, len(images), recipe, processes)
    if state_path is not None and processes.decide(state_path.exists):
        training.resume(state_path)
    x = encode_once(model, images, processes.device, recipe.seed)

    total = max(snapshots) * 1000
    between_saves = max(recipe.batch, min(50_000, int(total) // 4))
    saved = training.seen
    bar = tqdm(
        desc=recipe.name,
        total=int(total),
        initial=training.seen,
        unit="img",
        unit_scale=True,
        leave=False,
        disable=processes.rank > 0,
    )
    while training.seen < total:
        before = training.seen
        training.step(x, labels)
        bar.update(recipe.batch)

        # Snapshots, and the state to go on from.
        due = [kimg for kimg in snapshots if before < kimg * 1000 <= training.seen]
        if processes.rank == 0 and save is not None:
            for kimg in due:
                save(training.average, kimg)
        if due or training.seen - saved >= between_saves:
            saved = training.seen
            if processes.rank == 0 and state_path is not None:
                training.save(state_path)
    bar.close()
    processes.barrier()  # now the first rank's files are there
    return training.average


class Training:
    """A network, its weight average and Adam, one step after the other. Every step has its own
    seed: what comes after it does not depend on how the run got there. count: training images;
    seen: images so far."""

    def __init__(self, model, net: nn.Module, count: int, recipe: Recipe, processes: Processes):
        self.model, self.recipe, self.processes = model, recipe, processes
        self.count, self.seen = count, 0

        self.net = net.to(processes.device).train()
        self.parameters = movable_parameters(self.net)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        # What does not learn is the same tensor in both.
        frozen = {id(p): p for p in self.net.parameters() if not p.requires_grad}
        self.average = copy.deepcopy(self.net, frozen).eval().requires_grad_(False)
        movable = movable_parameters(self.average, like=self.net).values()
        self.averages = [parameter.detach() for parameter in movable]
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=recipe.lr, fused=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """One batch of all ranks. images [N, ...]: what encode_once() gives."""
        recipe, rank, world = self.recipe, self.processes.rank, self.processes.world
        parameters = list(self.parameters.values())

        # This rank's share of the batch, and the random stream of this step.
        positions = torch.arange(self.seen, self.seen + recipe.batch)[rank::world]
        index = shuffled(positions, self.count, recipe.seed)
        torch.manual_seed(((recipe.seed * 2**20 + self.seen // recipe.batch) * 64 + rank) % 2**63)
        x = images[index].to(self.processes.device)
        if not self.model.encodes:
            x = self.model.encode(x)
        y = None if labels is None else labels[index].to(self.processes.device)

        # Gradient and Adam step; the learning rate starts at zero.
        with network_calls(self.net, recipe.precision):
            gradients_of_step(self.model, self.net, x, y, parameters, self.processes, recipe.batch)
        ramp = min(self.seen / max(recipe.ramp_kimg * 1000, 1e-8), 1)
        self.optimizer.param_groups[0]["lr"] = recipe.lr * ramp
        self.optimizer.step()

        # Weight average. BatchNorm's statistics are averages already, so buffers are copied.
        beta = ema_beta(recipe.batch, recipe.ema_kimg * 1000, self.seen, recipe.ramp_ratio)
        torch._foreach_lerp_(self.averages, [p.detach() for p in parameters], 1 - beta)
        for ours, theirs in zip(self.average.buffers(), self.net.buffers(), strict=True):
            ours.copy_(theirs)
        self.seen += recipe.batch

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a later step depends on; what Adam has not met yet has no moments, and what does
        not learn is left out."""
        tensors = {}
        frozen = {name for name, p in self.net.named_parameters() if not p.requires_grad}
        for side, net in (("net", self.net), ("average", self.average)):
            for name, tensor in net.state_dict().items():
                # A module may keep other things beside tensors.
                if isinstance(tensor, torch.Tensor) and name not in frozen:
                    tensors[f"{side} {name}"] = tensor
        for name, parameter in self.parameters.items():
            for key, tensor in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam {key} {name}"] = tensor
        return tensors

    def facts(self) -> dict:
        """What a state must agree in with the training that goes on from it."""
        return {"recipe": dataclasses.asdict(self.recipe), "images": self.count}

    def save(self, path: Path) -> None:
        save_state(path, self.tensors(), self.facts() | {"seen": self.seen})

    def resume(self, path: Path) -> None:
        """Go on where an earlier run stopped."""
        with reading(f"{path} cannot be used, delete it to train from the start"):
            tensors, facts = load_state(path)
            self.seen = facts.pop("seen")
            if facts != self.facts():
                raise Refused("it belongs to another training")

            # Places for Adam's moments, where there were any.
            for name, parameter in self.parameters.items():
                if f"adam step {name}" in tensors:
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros((), device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }

            ours = self.tensors()
            shapes = [{name: t.shape for name, t in side.items()} for side in (ours, tensors)]
            if shapes[0] != shapes[1]:
                raise Refused("it holds another network")
            with torch.no_grad():
                for name, tensor in ours.items():
                    tensor.copy_(tensors[name])


@functools.lru_cache(maxsize=2)  # with many images, drawing one takes longer than a step
def permutation(count: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def shuffled(positions: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Indices at these positions of an endless sequence of permutations of range(count), one an
    epoch: int64 [N] -> int64 [N]."""
    epochs = positions // count
    indices = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        indices[here] = permutation(count, seed, epoch)[positions[here] % count]
    return indices


def ema_beta(batch: int, half_life: float, seen: int = 0, ramp_ratio: float | None = None) -> float:
    """Share the average keeps at a step of `batch` images; half_life in images, at most seen *
    ramp_ratio."""
    if ramp_ratio is not None:
        half_life = min(half_life, seen * ramp_ratio)
    return 0.5 ** (batch / max(half_life, 1e-8))


@torch.no_grad()
def encode_once(model, images: torch.Tensor, device: str, seed: int) -> torch.Tensor:
    """What loss() trains on, if making it is work (a VAE, which may draw random numbers); else the
    uint8 images, converted batch by batch."""
    if not model.encodes:
        return images
    torch.manual_seed(seed)
    parts = []
    for part in tqdm(images.split(256), desc="encode", leave=False):
        parts.append(model.encode(part.to(device)).cpu())
    return torch.cat(parts)


def gradients_of_step(model, net, x, labels, parameters, processes, batch):
    """Leaves in every parameter the gradient of the loss, summed over all ranks' images, divided by
    `batch`. A parameter that no loss uses gets zero on several ranks and none on one; Adam leaves
    it alone in both."""
    for parameter in parameters:
        parameter.grad = None
    if len(x):
        (model.loss(net, x, labels).sum() * (processes.world / batch)).backward()

    # All ranks' gradients in one message.
    if processes.world > 1:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat.div_(processes.world))
        parts = flat.split([parameter.numel() for parameter in parameters])
        for parameter, grad in zip(parameters, parts, strict=True):
            parameter.grad = grad.view(parameter.shape)

    # As EDM: a loss that overflows now and then must not end the training.
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(0.0, 1e5, -1e5)


def time_training(c, model, base):
    """Seconds of training on one image, from two small steps."""
    net = model.trainable(base, c).to(c.device).train()
    for parameter in movable_parameters(net).values():
        parameter.requires_grad_(True)
    images = torch.zeros(2, *model.image_shape(base), dtype=torch.uint8, device=c.device)
    labels = torch.zeros(2, dtype=torch.int64, device=c.device) if model.classes(base) else None
    x = model.encode(images)

    times = []
    with network_calls(net, c.train_precision):
        for _ in range(2):
            begin = time.perf_counter()
            loss = model.loss(net, x, labels).sum()
            loss.backward()
            loss.item()  # waits for the device
            times.append(time.perf_counter() - begin)
    return min(times) / len(images)
