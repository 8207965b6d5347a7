"""The configuration: every field is an option."""

import abc
import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .features import INCEPTION
from .files import reason_of
from .images import RealData
from .sampling import Model
from .search import BOUNDS
from .seeds import FINAL_SEED
from .stats import FOLDS


class Preset(abc.ABC):
    """Data, features and defaults that belong together."""

    name = ""
    defaults: dict = {}  # of options
    threads = 0  # CPU threads of one batch; 0: all
    small = False  # networks that a CPU's caches hold
    streams: dict[str, int] = {}  # of real images that are drawn here; the numbers that seed them
    bases: dict[str, str] = {}  # {name of --base: address}
    statistics = ""  # address of the real data's, without --data and --ref
    origin = ""  # of these statistics, in words

    @abc.abstractmethod
    def model(self, c: "Config") -> Model:
        """The built-in model."""

    @abc.abstractmethod
    def untrained(self) -> nn.Module:
        """A network of the size that --base names, before it is downloaded."""

    @abc.abstractmethod
    def real_images(self, c: "Config") -> RealData | None:
        """In three parts; None without --data."""

    @abc.abstractmethod
    def features(self, c: "Config"):
        """The feature network that decides."""

    def judges(self, c: "Config") -> dict[str, Callable]:
        """{name: function that gives the features} of the judges that only this preset has."""
        return {}


# -------------------- kinds of options
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
PARTITIONS = "paper, structural, layers"
CONTROLS = ("steps", "guided", "own")
MOST_VALUES = 10_000  # of a sweep


def numbers(text, kind=float):
    """Different numbers in increasing order, from text separated by commas."""
    try:
        values = tuple(sorted({kind(part) for part in text.split(",")}))
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"give numbers separated by commas, not {text!r}")
    return values


def integers(text):
    return numbers(text, int)


def sweep_values(text):
    """start:stop:step -> the values, both ends included."""
    try:
        start, stop, step = (float(part) for part in text.split(":"))
        points = (stop - start) / step if step > 0 else math.inf
    except ValueError:
        points = math.inf
    if not 0 <= points < MOST_VALUES:
        raise argparse.ArgumentTypeError(f"give start:stop:step with a positive step, not {text!r}")
    return tuple(np.arange(start, stop + step / 2, step).round(6).tolist())


def read_partition(text):
    """The name of a partition, or the content of a JSON file {glob: block}, both strings."""
    if text in ("paper", "structural", "layers"):
        return text
    message = f"{text} is not paper, structural, layers or a JSON file {{glob: block}}"
    try:
        table = json.loads(Path(text).read_bytes())
    except OSError:
        raise argparse.ArgumentTypeError(message) from None
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{message} ({reason_of(error)})") from None
    if not isinstance(table, dict) or not all(isinstance(block, str) for block in table.values()):
        raise argparse.ArgumentTypeError(f"{message}: its blocks must be strings")
    return table


def controls(text):
    """Different names of controls, by commas."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if names == ("none",):
        return ()
    for name in names:
        if name not in CONTROLS:
            known = ", ".join(CONTROLS)
            raise argparse.ArgumentTypeError(f"{name!r} is no control: {known}, or none")
    return names


def grid_values(text):
    """One --grid: weights for every block, or block=weights for one -> {block or "": weights}."""
    block, _, values = text.rpartition("=")
    return {block.strip(): numbers(values)}


# -------------------- fields: a default, what it is, and the values that are allowed
def option(default, text, kind=None, choices=None, low=-math.inf, high=math.inf, **parsing):
    """Of Config. default: a value, or a function that gives it; kind: from the option's text to its
    value; low, high: allowed range of each number; parsing: more of argparse's options."""
    metadata = {
        "help": text,
        "kind": kind or type(default),
        "choices": choices,
        "low": low,
        "high": high,
        "parsing": parsing,
    }
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def count(default, text, low=1, high=10**8):
    return option(default, text, int, low=low, high=high)


def amount(default, text, high=1e9):
    return option(default, text, float, low=0, high=high)


def weights(default, text, kind=numbers, **parsing):
    return option(default, text, kind, low=-1e6, high=1e6, **parsing)


# The GPU is asked when a run begins, not when this is imported.
def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_precision():
    return "tf32" if torch.cuda.is_available() else "fp32"


@dataclasses.dataclass(frozen=True)
class Config:
    """--select-images 2000 sets select_images. Defaults: NEON's for CIFAR-10, at the paper's batch
    of 64 (snapshots 550, 1051, 1551, ... are multiples of 782 x 64 images). kimg: 1000 images."""

    # What is studied
    preset: str = option("cifar10", "data, features and defaults")
    model: str = option("", "Python file of a model of your own (see examples/)")
    base: str = option(
        "", "cond, uncond, ..., path or URL (.pkl of EDM or NEON, .safetensors of this program)"
    )
    aux: str = option("", "self-trained network, folder of network-snapshot-*, or anyone's LoRA")
    data: str = option("", "real images: EDM dataset zip or folder")
    ref: str = option("", "npz with mu and sigma of the real features, path or URL, or cifar10")
    partition: str = option("paper", f"{PARTITIONS} or JSON file {{glob: block}}", read_partition)

    # Training: the base, if it is trained here, and the self-training
    snapshot: tuple = option((1551,), "lengths in kimg, by commas", integers, low=1, high=1e8)
    train_base: float = amount(0.0, "train the base from scratch for this many kimg")
    base_lr: float = amount(1e-3, "learning rate of --train-base")
    synthetic: int = count(6000, "images in the synthetic set", low=2 * FOLDS)
    batch: int = count(64, "training batch")
    lr: float = amount(1e-4, "self-training learning rate")
    ramp_kimg: float = amount(
        10_000.0,
        "the learning rate grows linearly over this; of other networks than EDM's: --snapshot / 20",
    )
    ema_kimg: float = amount(
        500.0, "half-life of the weight average; of other networks than EDM's: --snapshot / 20"
    )
    dropout: float = amount(0.13, "in training, of EDM's networks", high=0.99)
    augment: float = amount(
        0.12, "probability of EDM's augmentations, of networks that take their labels", high=1
    )
    lora_rank: int = count(0, "train a LoRA of this rank; 0: all weights", low=0, high=4096)
    lora_targets: str = option(
        "attention", "of the LoRA: attention's projections, or all", choices=("attention", "all")
    )
    train_precision: str = option("fp32", "of training", choices=("fp32", "tf32", "bf16"))
    seed: int = count(0, "of training", low=0, high=2**32)
    training_seeds: int = count(1, "repeat base and self-training with this many seeds", high=1000)

    # Sampling
    steps: int = count(18, "sampler steps", high=10_000)
    labels: str = option("balanced", "equal shares or EDM's draws", choices=("balanced", "random"))
    s_churn: float = amount(0.0, "noise added while sampling, of EDM's networks; 0: none")
    s_min: float = amount(0.0, "not at noise levels below")
    s_max: float = amount(80.0, "not at noise levels above; all begin at 80")
    s_noise: float = amount(1.0, "its standard deviation")
    guidance: float = option(
        None, "classifier-free, of pipelines (default: their own); 1: none", float, low=1, high=1e3
    )
    rescale: float = amount(0.0, "of guidance, against overexposure (guidance_rescale)", high=1)
    prompts: str = option("", "file of prompts, one a line, for pipelines that take them")
    final_prompts: str = option("", "other prompts for the final comparison")
    negative: str = option(None, "negative prompt", str)
    sample_batch: int = count(256, "images sampled at once")
    precision: str = option(default_precision, "of sampling; on a GPU tf32", str, PRECISIONS)
    confirm_precision: str = option("", "of the final comparison", choices=PRECISIONS)
    device: str = option(default_device, "cuda where there is a GPU", str, ("cuda", "cpu"))
    threads: int = count(0, "CPU threads of one batch; 0: as the preset needs", low=0, high=1024)

    # Scoring
    select_images: int = count(10_000, "images per score of the selection", low=2 * FOLDS)
    final_images: int = count(50_000, "images per score of the final comparison", low=2 * FOLDS)
    final_repeats: int = count(1, "disjoint sets of final seeds", high=1000)
    final_seed: int = count(FINAL_SEED, "the first final seed", low=0, high=2**32)
    protocol: str = option(
        "disjoint",
        "paper: random labels, 2,000 images at seeds that were trained on",
        choices=("disjoint", "paper"),
    )
    detector: str = option(INCEPTION, "Inception weights (PyTorch port)")
    judge: tuple = option(
        (),
        "one more feature network of the final comparison, repeatable: random-conv, pixels, "
        "FILE.py with features(images), classifier-2 and mlp of glyphs, or none",
        str,
        action="append",
    )
    select_with: tuple = option(
        (),
        "select in the usual features joined with this one's (see --judge)",
        str,
        action="append",
    )

    # Search over the block weights
    grid: tuple = weights(
        (0.75, 1.0, 1.25),
        "of every block; BLOCK=WEIGHTS for one, repeatable",
        grid_values,
        action="append",
    )
    block_grid: dict = dataclasses.field(default_factory=dict)  # of --grid BLOCK=WEIGHTS
    sweep: tuple = weights((), "also these global weights, start:stop:step", sweep_values)
    race: bool = option(False, "drop grid points that are surely worse after a fifth of the seeds")
    placebo: int = count(0, "random partitions that go through the same grid", low=0, high=1000)
    search: str = option("", "after the grid", choices=("cobyqa", "gradient"))
    search_partition: str = option("", "of the search, default --partition", read_partition)
    evaluations: int = count(12, "of the search: scores, or gradients")
    bounds: tuple = weights(BOUNDS, "of the search, low,high")
    primary: str = option(
        "",
        "claim that is asked first, MODEL or MODEL against OTHER, default what was searched, else "
        "blockwise, against global",
    )
    controls: tuple = option(
        CONTROLS,
        "by commas: steps (twice as many), guided (outputs step back), own (the model's: guidance "
        "of pipelines), none",
        controls,
    )
    continue_on_data: float = option(
        0.0,
        "control: the base trained on real images for so many kimg, default the self-training's",
        low=-1,
        high=1e8,
        nargs="?",
        const=-1.0,  # as long as the self-training
    )

    # The run
    out: Path = option(None, "folder of the results, default runs/<preset>", Path)
    export_merged: bool = option(False, "also the whole pipeline, beside the file of a LoRA")
    export_pt: bool = option(False, "also the merged weights as a plain state dict")
    plan: bool = option(False, "print blocks, drift and a time estimate, then stop")
    yes: bool = option(False, "run even if it takes very long")

    def grid_of(self, block: str) -> tuple:
        """The grid's weights for one block."""
        return self.block_grid.get(block, self.grid)
