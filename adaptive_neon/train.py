"""Training: the base, and the base on its own samples."""

import copy
import dataclasses
import time
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

from .blocks import movable_parameters
from .files import reading, write_atomically
from .pickles import checked_torch_load
from .sampling import network_calls


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained; all of it is in the key of the result."""

    name: str
    batch: int
    lr: float
    ramp_kimg: float  # the learning rate grows linearly over this
    ema_kimg: float  # half-life of the weight average
    seed: int
    ramp_ratio: float | None = (
        None  # the half-life is at most this share of what was seen; None: no limit
    )
    precision: str = "fp32"


def ema_beta(batch, half_life, seen=None, ramp_ratio=None):
    """Share the average keeps at a step of `batch` images; half_life in images, at most seen *
    ramp_ratio."""
    if ramp_ratio is not None:
        half_life = min(half_life, seen * ramp_ratio)
    return 0.5 ** (batch / max(half_life, 1e-8))


def shuffled(positions, n, seed):
    """Indices at these positions of an endless sequence of permutations of range(n)."""
    epochs = {}
    for epoch in {int(position) // n for position in positions}:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        epochs[epoch] = torch.randperm(n, generator=generator)
    indices = [epochs[int(position) // n][int(position) % n] for position in positions]
    return torch.stack(indices) if indices else torch.zeros(0, dtype=torch.int64)


@torch.no_grad()
def encode_once(model, images, device, seed):
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
    if processes.world > 1:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat.div_(processes.world))
        for parameter, grad in zip(
            parameters, flat.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.grad = grad.view(parameter.shape)

    # As EDM: a loss that overflows now and then must not end the training.
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(0.0, 1e5, -1e5)


def train(model, net, images, labels, recipe, processes, state_path, snapshots, save):
    """Adam on the model's loss. Every step has its own seed: a resumed run repeats an uninterrupted
    one. images: uint8 [N, C, H, W]; snapshots: kimg at which save(ema, kimg) is called on the first
    rank."""
    device, rank, batch = processes.device, processes.rank, recipe.batch
    net = net.to(device).train()
    parameters = movable_parameters(net)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    parameters = list(parameters.values())
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    averages = list(movable_parameters(ema, like=net).values())
    optimizer = torch.optim.Adam(parameters, lr=recipe.lr, fused=True)
    seen = 0

    # Go on where an earlier run stopped.
    parts = {"net": net, "ema": ema, "optimizer": optimizer}
    if processes.decide(state_path.exists):
        with reading(f"{state_path} is damaged, delete it to train from the start"):
            state = checked_torch_load(state_path)
            seen = state["seen"]
            for name, part in parts.items():
                part.load_state_dict(state[name])

    x_all = encode_once(model, images, device, recipe.seed)
    total = int(max(snapshots) * 1000)
    tick = max(batch, min(50_000, total // 4))
    saved = seen
    bar = tqdm(
        total=total,
        initial=seen,
        unit="img",
        unit_scale=True,
        desc=recipe.name,
        leave=False,
        disable=rank > 0,
    )
    while seen < max(snapshots) * 1000:
        # This rank's share of the batch, and the random stream of this step.
        positions = torch.arange(seen, seen + batch)[rank :: processes.world]
        index = shuffled(positions, len(images), recipe.seed)
        torch.manual_seed(((recipe.seed * 2**20 + seen // batch) * 64 + rank) % 2**63)
        x = x_all[index].to(device)
        if not model.encodes:
            x = model.encode(x)
        y = None if labels is None else labels[index].to(device)

        # Gradient and Adam step; the learning rate starts at zero.
        with network_calls(net, recipe.precision):
            gradients_of_step(model, net, x, y, parameters, processes, batch)
        ramp = min(seen / max(recipe.ramp_kimg * 1000, 1e-8), 1)
        optimizer.param_groups[0]["lr"] = recipe.lr * ramp
        optimizer.step()

        # Weight average.
        beta = ema_beta(batch, recipe.ema_kimg * 1000, seen, recipe.ramp_ratio)
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - beta)
        for ours, theirs in zip(ema.buffers(), net.buffers(), strict=True):
            ours.copy_(theirs)  # BatchNorm's statistics are averages already

        # Snapshots, and the state to resume from.
        due = [kimg for kimg in snapshots if seen < kimg * 1000 <= seen + batch]
        seen += batch
        bar.update(batch)
        if rank == 0 and (due or seen - saved >= tick):
            for kimg in due:
                save(ema, kimg)
            saved = seen
            state = {name: part.state_dict() for name, part in parts.items()} | {"seen": seen}
            write_atomically(state_path, partial(torch.save, state))
    bar.close()
    processes.barrier()  # now the first rank's files are there


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
