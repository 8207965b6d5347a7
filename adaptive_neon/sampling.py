"""From seeds to images: the seam to a model, noise, labels, batches, precision."""

import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .blocks import copied, layer_of
from .files import UserError
from .processes import Diverged, Processes


# -------------------- the seam: what the engine needs of a model
class Model:
    """A generative model, as the engine sees it. With functions of your own it serves a notebook;
    EDM's networks, FILE.py and pipelines of diffusers are subclasses, which files and the command
    line need.

    shape: of one sample's starting noise, standard normal. classes: labels are int64 in [0,
    classes); 0: it takes none. sample(net, noise, labels, steps): noise [N, *shape], labels [N] or
    None -> images [N, C, H, W] in [-1, 1], each a function of its own noise, its label and the
    network alone, differentiable in the weights. loss(net, x, labels): training loss of each
    sample, [N] or [N, ...]; randomness from torch's global generator. encode(images): uint8 [N, C,
    H, W] -> what loss() trains on; default: images / 127.5 - 1. block(name), layer(name): of a
    parameter.
    """

    identity = ""  # hash of all but the weights that decides an image; part of every key
    training_identity = ""  # the same of what decides a training
    notes: list[str] = []  # what the report should say of it
    draws_on = False  # whether sample() takes draw(): more noise of every sample, step by step
    controls: dict[str, list[dict]] = {}  # {what a critic would try: its settings of sample()}
    settings: dict = {}  # of sample(), where they are not its own; a key has them as weights

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        sample: Callable,
        loss: Callable | None = None,
        encode: Callable | None = None,
        block: Callable[[str], str] | None = None,
        layer: Callable[[str], str] | None = None,
        identity: str = "",
    ):
        self.shape, self.number_of_classes = tuple(shape), classes
        self.functions = {
            "sample": sample,
            "loss": loss,
            "encode": encode,
            "block": block,
            "layer": layer,
        }
        self.encodes = encode is not None
        self.identity = self.training_identity = identity

    # ---------- sampling and training
    def noise_shape(self, net: nn.Module) -> tuple[int, ...]:
        return self.shape

    def classes(self, net: nn.Module) -> int:
        return self.number_of_classes

    def sample(self, net, noise, labels, steps: int) -> torch.Tensor:
        return self.function("sample")(net, noise, labels, steps, **self.settings)

    def loss(self, net, x, labels) -> torch.Tensor:
        return self.function("loss")(net, x, labels)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        if self.encodes:
            return self.function("encode")(images)
        return images.float() / 127.5 - 1

    def trainable(self, base: nn.Module, c=None) -> nn.Module:
        """A copy of the base as it is self-trained: with dropout, for example."""
        return copied(base)

    def balanced_labels(self, classes: int, seeds, device) -> torch.Tensor:
        """Equal shares of every class: int64 [N]."""
        return balanced_labels(classes, seeds, device)

    def asked_for(self, labels: torch.Tensor | None):
        """What labels [N] ask for, as alignment(images, it) takes it: themselves, or prompts."""
        return labels

    def function(self, name: str) -> Callable:
        found = self.functions[name]
        if found is None:
            raise UserError(f"Model(..., {name}=...) is needed for this, and was not given")
        return found

    # ---------- blocks
    def block(self, name: str, net: nn.Module, partition: str) -> str:
        """The block of a parameter in --partition paper or structural."""
        return self.function("block")(name)

    def layer(self, name: str) -> str:
        """The layer of a parameter in --partition layers."""
        own = self.functions["layer"]
        return own(name) if own is not None else layer_of(name)

    # ---------- files and the command line
    def fetch(self, source: str, what: str) -> Path:
        """A local file or folder of load()'s kind from a path or an address."""
        raise NotImplementedError

    def load(self, path: Path) -> nn.Module:
        """The network that is moved: eval mode, float32, on the CPU."""
        raise NotImplementedError

    def load_like(self, base: nn.Module, path: Path) -> nn.Module:
        """A self-trained relative of the base: what load() reads, or a snapshot of this program."""
        raise NotImplementedError

    def create(self, images: torch.Tensor, labels: torch.Tensor | None, c) -> nn.Module:
        """An untrained network for these real images, for --train-base."""
        raise NotImplementedError

    def image_shape(self, net: nn.Module) -> tuple[int, ...]:
        """[C, H, W] of its images."""
        raise NotImplementedError

    def save(self, net: nn.Module, path: Path, recipe: dict) -> None:
        """A snapshot that load_like() reads back."""
        raise NotImplementedError

    def export(self, net: nn.Module, path: Path, recipe: dict) -> None:
        """The repaired network, in the form the model's users know; path has no suffix yet."""
        raise NotImplementedError

    def export_merged(self, merger, w: dict[str, float], path: Path, recipe: dict) -> None:
        """The same of a merger's network with the weights w."""
        self.export(merger.set(w), path, recipe)

    def own_features(self, example: torch.Tensor):
        """A feature network of the model's own (see Judge), or None. example: uint8 images."""
        return None

    def start_check(self, base: nn.Module, c, trained: bool) -> None:
        """UserError for a model that breaks a promise of this class."""


# -------------------- seeds to noise and labels
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


class Draws:
    """One generator per seed, as EDM: what a sample draws depends on nothing but its seed."""

    def __init__(self, shape, seeds, device):
        self.shape, self.device = shape, device
        self.generators = [torch.Generator(device).manual_seed(int(s) % 2**32) for s in seeds]

    def noise(self, dtype=torch.float32):
        """[N, *shape]"""
        options = {"device": self.device, "dtype": dtype}
        return torch.stack(
            [torch.randn(self.shape, generator=g, **options) for g in self.generators]
        )

    def labels(self, classes):
        """[N] int64; None where there are no classes."""
        if not classes:
            return None
        options = {"device": self.device}
        return torch.stack(
            [torch.randint(classes, [], generator=g, **options) for g in self.generators]
        )


def draw_noise(shape, classes, seeds, device):
    """Noise [N, *shape] float32, labels [N] int64 (or None)."""
    draws = Draws(shape, seeds, device)
    return draws.noise(), draws.labels(classes)


def to_pixels(images):
    """[-1, 1] -> [0, 255], not rounded yet; EDM truncates after adding 128."""
    return (images * 127.5 + 128).clip(0, 255)


# -------------------- one network, many images
class Sampler:
    """From seeds to images of one model: a seed decides its noise and label, whatever the batch or
    rank. Holds the one network of the run that samples, on the device and, on a GPU, compiled:
    every other network is written into it, so there is one graph for the base, all mergers and all
    ranks' batches, which are padded to one size. labels: "balanced" or "random"."""

    def __init__(
        self,
        model: Model,
        net: nn.Module,
        steps: int = 18,
        batch: int = 256,
        labels: str = "balanced",
        processes: Processes | None = None,
        compiled: bool | None = None,
    ):
        self.model, self.steps, self.batch, self.labels = model, steps, batch, labels
        self.processes = processes or Processes(next(net.parameters()).device.type)
        self.shape, self.classes = tuple(model.noise_shape(net)), model.classes(net)
        on_gpu = self.processes.device == "cuda"
        self.compiled = on_gpu if compiled is None else compiled
        self.net = copied(net).to(self.processes.device).eval().requires_grad_(False)
        if on_gpu:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compiled:
            self.net.forward = torch.compile(self.net.forward, dynamic=False)

    @torch.no_grad()
    def write(self, net: nn.Module) -> None:
        """The weights and buffers of another network of the same kind."""
        theirs = dict(net.named_parameters()) | dict(net.named_buffers())
        for name, tensor in (*self.net.named_parameters(), *self.net.named_buffers()):
            tensor.copy_(theirs[name])

    def floats(self, seeds, batch: int | None = None):
        """Images [N, C, H, W] in [-1, 1] and labels [N] (or None) of one batch of seeds; `batch`:
        the size that a compiled network sees (default: that of sampling)."""
        seeds = list(seeds)
        padded = seeds
        if self.compiled:  # the surplus images are dropped
            padded = seeds + seeds[-1:] * ((batch or self.batch) - len(seeds))
        device = self.processes.device
        draws = Draws(self.shape, padded, device)
        noise, labels = draws.noise(), draws.labels(self.classes)
        if self.classes and self.labels == "balanced":
            labels = self.model.balanced_labels(self.classes, padded, device)
        more = {"draw": partial(draws.noise, torch.float64)} if self.model.draws_on else {}
        images = self.model.sample(self.net, noise, labels, self.steps, **more)[: len(seeds)]
        return images, None if labels is None else labels[: len(seeds)]

    @torch.no_grad()
    def batch_images(self, seeds, batch: int | None = None):
        """uint8 images [N, C, H, W] and labels [N] (or None) of one batch of seeds."""
        images, labels = self.floats(seeds, batch)
        if not images.isfinite().all():
            raise Diverged("the sampler gave images that are not finite: are the weights sound?")
        return to_pixels(images).to(torch.uint8), labels

    def images(self, seeds: Iterable[int], precision: str = "fp32", desc: str | None = None):
        """uint8 images [N, C, H, W] and labels [N] (or None) at any number of seeds, on the CPU."""
        with network_calls(self.net, precision):
            parts = self.in_batches(self.batch_images, list(seeds), desc)
        images = torch.cat([images.cpu() for images, _ in parts])
        labels = torch.cat([labels.cpu() for _, labels in parts]) if self.classes else None
        return images, labels

    def in_batches(self, work: Callable, seeds, desc: str | None = None) -> list:
        """[work(batch of seeds, size of the batches)], with all later ones where the memory is too
        small."""
        results, self.batch = with_smaller_batches(work, seeds, self.batch, self.processes, desc)
        return results

    def seconds_per_image(self, precision: str = "fp32") -> tuple[float, float]:
        """Seconds of sampling one image, from a few steps with one small batch; and what the first
        batch took longer (compilation)."""
        few = copy.copy(self)
        few.steps = min(self.steps, 3)
        if self.processes.device == "cpu":
            few.batch = min(self.batch, 2 if math.prod(self.shape) >= 3 * 32 * 32 else 32)

        times = []
        with network_calls(self.net, precision), torch.no_grad():
            for _ in range(3 if self.compiled else 2):
                begin = time.perf_counter()
                images, _ = few.floats(range(few.batch))
                float(images.sum())  # waits for the device
                times.append(time.perf_counter() - begin)

        # Heun's method calls the network twice a step, once in the last.
        steps = (2 * self.steps - 1) / (2 * few.steps - 1)
        per_image = min(times) / few.batch * steps / self.processes.workers()
        return per_image, max(0.0, times[0] - min(times))


def with_smaller_batches(
    work: Callable, seeds, batch: int, processes: Processes, desc: str | None = None
):
    """Results of work(part, batch) over batches of seeds, on all ranks with half the batch where
    the memory is too small, and the size that fits. No result depends on it."""
    while True:
        try:
            return processes.map_batches(partial(work, batch=batch), seeds, batch, desc), batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            if processes.rank == 0:
                print(f"out of memory: going on with batches of {batch}", file=sys.stderr)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # outside the handler, whose traceback holds the tensors


# -------------------- precision, and how the network is called
def allow_tf32(precision):
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def mapped(function: Callable, *outs):
    """function(tensors) of what networks give, in whatever containers of tensors, alike in all."""
    first = outs[0]
    if isinstance(first, torch.Tensor):
        return function(*outs)
    if isinstance(first, dict):
        return type(first)((key, mapped(function, *(out[key] for out in outs))) for key in first)
    if isinstance(first, (tuple, list)):
        parts = [mapped(function, *side) for side in zip(*outs, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def as_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; all else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


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
            return mapped(as_float32, forward(*args, **kwargs))

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
