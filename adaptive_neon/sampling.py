"""From seeds to images: the seam to a model, noise, labels, batches, precision."""

import contextlib
import copy
import math
import time
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .processes import Diverged


class Model(Protocol):
    """A generative model, as the pipeline sees it: EdmModel, or FileModel around --model
    FILE.py."""

    identity: str  # hash of all but the weights that decides an image; part of every key
    training_identity: str  # the same of what decides a training
    encodes: bool  # whether encode() is worth doing once for all images, as through a VAE

    def fetch(self, source: str, what: str) -> Path:
        """A local file or folder of load()'s kind from a path or an address."""

    def load(self, path: Path) -> nn.Module:
        """The network that is moved: eval mode, float32, on the CPU."""

    def load_like(self, base: nn.Module, path: Path) -> nn.Module:
        """A self-trained relative of the base: what load() reads, or a snapshot of this program."""

    def create(self, images: torch.Tensor, labels: torch.Tensor | None, c) -> nn.Module:
        """An untrained network for these real images, for --train-base."""

    def trainable(self, base: nn.Module, c) -> nn.Module:
        """A copy of the base as it is self-trained: with dropout, for example."""

    def noise_shape(self, net: nn.Module) -> tuple[int, ...]: ...

    def image_shape(self, net: nn.Module) -> tuple[int, int, int]: ...

    def classes(self, net: nn.Module) -> int:
        """Labels are int64 in [0, classes); 0: the model takes none."""

    def sample(self, net, noise, labels, steps):
        """noise [N, *noise_shape], int64 labels [N] (or None) -> images [N, C, H, W] in [-1, 1];
        each a function of its own noise, its label and the network alone, differentiable in the
        weights."""

    def encode(self, images):
        """uint8 [N, C, H, W] -> what loss() trains on."""

    def loss(self, net, x, labels):
        """Training loss of each sample, [N] or [N, ...]; randomness from torch's global
        generator."""

    def block(self, name: str, net: nn.Module, partition: str) -> str:
        """The block of a parameter in --partition paper or structural."""

    def layer(self, name: str) -> str:
        """The layer of a parameter in --partition layers."""

    def save(self, net: nn.Module, path: Path, recipe: dict) -> None:
        """A snapshot that load_like() reads back."""

    def export(self, net: nn.Module, path: Path, recipe: dict) -> None:
        """The repaired network, in the form the model's users know; path has no suffix yet."""

    def own_features(self, example: torch.Tensor):
        """A feature network of the model's own (see Judge), or None. example: four images, uint8
        values [4, C, H, W]."""

    def start_check(self, base: nn.Module, c, trained: bool) -> None:
        """UserError for a model that breaks a promise of this protocol."""


def balanced_labels(classes, seeds, device):
    """int64 [N]: any `classes` seeds in a row, from a multiple of it on, hold each class once, in
    an order of their own. The distribution is that of random labels, but the classes' shares are no
    longer a source of noise: in a score of 1,000 images they are the largest."""
    labels = []
    for seed in seeds:
        cycle, place = divmod(int(seed) % 2**32, classes)
        generator = torch.Generator().manual_seed(cycle)
        labels.append(torch.randperm(classes, generator=generator)[place])
    return torch.stack(labels).to(device)


def draw_noise(shape, classes, seeds, device):
    """One generator per seed, as EDM: noise [N, *shape] float32, labels [N] int64 (or None)."""
    noise, labels = [], []
    for seed in seeds:
        generator = torch.Generator(device).manual_seed(int(seed) % 2**32)
        noise.append(torch.randn(shape, generator=generator, device=device))
        if classes:
            labels.append(torch.randint(classes, [], generator=generator, device=device))
    return torch.stack(noise), torch.stack(labels) if classes else None


def to_pixels(images):
    """[-1, 1] -> [0, 255], not rounded yet; EDM truncates after adding 128."""
    return (images * 127.5 + 128).clip(0, 255)


class Sampler:
    """From seeds to images of one model: a seed decides its noise and label, whatever the batch or
    rank. Holds the one network of the run that samples, on the device and, on a GPU, compiled:
    every other network is written into it, so there is one graph for the base, all mergers and all
    ranks' batches, which are padded to one size."""

    def __init__(self, model, base, processes, steps, batch, labels="balanced", compiled=None):
        self.model, self.processes, self.steps, self.batch = model, processes, steps, batch
        self.labels = labels  # balanced or random
        self.shape, self.classes = tuple(model.noise_shape(base)), model.classes(base)
        self.compiled = processes.device == "cuda" if compiled is None else compiled
        self.net = copy.deepcopy(base).to(processes.device).eval().requires_grad_(False)
        if processes.device == "cuda":
            self.net.to(memory_format=torch.channels_last)
        if self.compiled:
            self.net.forward = torch.compile(self.net.forward, dynamic=False)

    def floats(self, seeds, batch=None):
        """Images [N, C, H, W] in [-1, 1] and labels [N] (or None) of one batch of seeds; `batch`:
        the size that a compiled network sees (default: that of sampling)."""
        seeds = list(seeds)
        padded = seeds
        if self.compiled:  # the surplus images are dropped
            padded = seeds + seeds[-1:] * ((batch or self.batch) - len(seeds))
        device = self.processes.device
        noise, labels = draw_noise(self.shape, self.classes, padded, device)
        if self.classes and self.labels == "balanced":
            labels = balanced_labels(self.classes, padded, device)
        images = self.model.sample(self.net, noise, labels, self.steps)[: len(seeds)]
        return images, None if labels is None else labels[: len(seeds)]

    @torch.no_grad()
    def images(self, seeds):
        """uint8 images [N, C, H, W] and labels [N] (or None) of one batch of seeds."""
        images, labels = self.floats(seeds)
        if not images.isfinite().all():
            raise Diverged("the sampler gave images that are not finite: are the weights sound?")
        return to_pixels(images).to(torch.uint8), labels


def allow_tf32(precision):
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def as_float32(out):
    """Half-precision outputs of a network, in whatever containers, as float32."""
    if isinstance(out, torch.Tensor):
        return out.float() if out.dtype in (torch.float16, torch.bfloat16) else out
    if isinstance(out, dict):
        return type(out)((key, as_float32(part)) for key, part in out.items())
    if isinstance(out, (tuple, list)):
        parts = [as_float32(part) for part in out]
        return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)
    return out


@contextlib.contextmanager
def network_calls(net, precision, checkpointed=False):
    """For a whole pass over the seeds, in all of its threads: how the network itself computes. tf32
    sets torch's flags, bf16 and fp16 put the network under autocast (the sampler around it stays as
    it is). checkpointed: a backward pass keeps the activations of one network call at a time."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    device = next(net.parameters()).device.type
    forward = net.forward
    own = "forward" in vars(net)

    def in_half_precision(*args, **kwargs):
        with torch.autocast(device, dtype):
            return as_float32(forward(*args, **kwargs))

    call = forward if dtype is None else in_half_precision
    allow_tf32(precision)
    if checkpointed:
        net.forward = partial(checkpoint, call, use_reentrant=False)
    elif dtype is not None:
        net.forward = call
    try:
        yield
    finally:
        if own:
            net.forward = forward
        else:
            vars(net).pop("forward", None)


def time_sampling(sampler, precision):
    """Seconds of sampling one image, from a few steps with one small batch; and what the first
    batch took longer (compilation)."""
    few = copy.copy(sampler)
    few.steps = min(sampler.steps, 3)
    if sampler.processes.device == "cpu":
        few.batch = min(sampler.batch, 2 if math.prod(sampler.shape) >= 3 * 32 * 32 else 32)

    times = []
    with network_calls(sampler.net, precision), torch.no_grad():
        for _ in range(3 if sampler.compiled else 2):
            begin = time.perf_counter()
            images, _ = few.floats(range(few.batch))
            float(images.sum())  # waits for the device
            times.append(time.perf_counter() - begin)
    # Heun's method calls the network twice a step, once in the last.
    steps = (2 * sampler.steps - 1) / (2 * few.steps - 1)
    per_image = min(times) / few.batch * steps / sampler.processes.workers()
    return per_image, max(0.0, times[0] - min(times))
