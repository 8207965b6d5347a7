"""Adaptive NEON: repair a generative model that was trained on its own samples, block by block.

    theta = theta_r - w_block * (theta_s - theta_r)     w > 0 away from collapse, w < 0 towards it

theta_r: the base network; theta_s: its weight average after training on its own samples (NEON,
arXiv 2510.03597); blocks: encoder, middle, decoder of the network, its layers, or any partition
(Adaptive NEON, section 4.2). All weights are scored on the same starting noise and labels; the
search and the final comparison use disjoint seeds. The pipeline knows no network: EDM's (arXiv
2206.00364) are built in, and --model FILE.py puts one of your own in their place.

    python edm_neon.py --preset glyphs                             a laptop, nothing to download
    python edm_neon.py --snapshot 1551 --grid 0.75,1.0,1.25        CIFAR-10, a GPU, a connection
    torchrun --nproc_per_node=8 edm_neon.py --snapshot 1551 --grid 0.75,1.0,1.25
    python edm_neon.py --model mine.py --base mine.pt --data images.zip --snapshot 100

Recorded figures and their commands: results/edm and the README. CIFAR-10 has not been run on a GPU
yet."""

# ruff: noqa: E402  imports follow the signal handler on purpose
import os
import signal
import sys


def leave_quietly(number, frame):
    os._exit(128 + number)


# The imports take seconds: a Ctrl-C in them is no fault of ours to be traced.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, leave_quietly)

import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import errno
import fcntl
import fnmatch
import functools
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import pickle
import pickletools
import platform
import re
import shutil
import socket
import struct
import tempfile
import time
import traceback
import urllib.parse
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import safetensors.torch
import scipy
import scipy.optimize
import scipy.stats
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

try:
    import neon_ext
except ImportError:  # reported by check_machine(), in one line
    neon_ext = None

NETWORKS = (".pkl", ".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # files, not names on a hub
FOLDS = 20  # of the seeds of every score: jackknife intervals need no new samples
MAX_POINTS = 10_000  # of a grid, without --yes
MAX_POINTS_BESIDE_SEARCH = 100  # of a grid that runs in addition to a search
MAX_HOURS = 2.0  # on a CPU, without --yes
SELECT_SEED, FINAL_SEED, SEARCH_SEED = 10_000, 50_000, 10_000_000  # the first seeds of each

EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm"
BASES = {
    "cond": f"{EDM_URL}/pretrained/edm-cifar10-32x32-cond-vp.pkl",
    "uncond": f"{EDM_URL}/pretrained/edm-cifar10-32x32-uncond-vp.pkl",
}
CIFAR10_STATISTICS = f"{EDM_URL}/fid-refs/cifar10-32x32.npz"
INCEPTION = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


# ==================== 1. configuration: every field is an option
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
    if not 0 <= points < MAX_POINTS:
        raise argparse.ArgumentTypeError(f"give start:stop:step with a positive step, not {text!r}")
    return tuple(np.arange(start, stop + step / 2, step).round(6).tolist())


def read_partition(text):
    """The name of a partition, or the content of a JSON file {glob: block}, both strings."""
    if text in ("paper", "structural", "layers"):
        return text
    message = f"{text} is not paper, structural, layers or a JSON file {{glob: block}}"
    try:
        table = json.loads(Path(text).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise argparse.ArgumentTypeError(message) from None
    if not isinstance(table, dict) or not all(isinstance(block, str) for block in table.values()):
        raise argparse.ArgumentTypeError(f"{message}: its blocks must be strings")
    return table


def judge_name(text):
    """One --judge or --select-with; they add up."""
    return (text,)


def option(default, text, kind=None, choices=None, low=-math.inf, high=math.inf):
    """A field of Config. kind: from the option's text to its value; low, high: allowed range of
    each number."""
    kind = kind or type(default)
    metadata = {"help": text, "kind": kind, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
GPU = torch.cuda.is_available()


@dataclasses.dataclass(frozen=True)
class Config:
    """--select-images 2000 sets select_images. Defaults: NEON's for CIFAR-10, at the paper's batch
    of 64 (snapshots 550, 1051, 1551, ... are multiples of 782 x 64 images). kimg: 1000 images."""

    # What is studied
    preset: str = option("cifar10", "data, features and defaults", choices=("cifar10", "glyphs"))
    model: str = option("", "Python file of a model of your own (see adapters/)")
    base: str = option(
        "", "cond, uncond, a path or URL (.pkl of EDM, .safetensors of this program)"
    )
    aux: str = option("", "existing self-trained network, or a folder of network-snapshot-*")
    data: str = option("", "real images: EDM dataset zip or folder")
    ref: str = option("", "npz with mu and sigma of the real features, path or URL, or cifar10")
    partition: str = option(
        "paper", "paper, structural, layers, or JSON file {glob: block}", read_partition
    )

    # Training: the base, if it is trained here, and the self-training
    snapshot: tuple = option(
        (1551,), "self-training lengths in kimg, by commas", integers, low=1, high=1e8
    )
    train_base: float = option(
        0.0, "train the base from scratch for this many kimg", low=0, high=1e8
    )
    base_lr: float = option(1e-3, "learning rate of --train-base", low=0, high=1e3)
    synthetic: int = option(6000, "images in the synthetic set", low=2 * FOLDS, high=1e8)
    batch: int = option(64, "training batch", low=1, high=1e6)
    lr: float = option(1e-4, "self-training learning rate", low=0, high=1e3)
    ramp_kimg: float = option(
        10_000.0, "the learning rate grows linearly over this", low=0, high=1e9
    )
    ema_kimg: float = option(500.0, "half-life of the weight average", low=0, high=1e9)
    dropout: float = option(0.13, "in training, of EDM's networks", low=0, high=0.99)
    augment: float = option(0.12, "probability of EDM's augmentations; 0: none", low=0, high=1)
    train_precision: str = option("fp32", "of training", choices=("fp32", "tf32", "bf16"))
    seed: int = option(0, "of training", low=0, high=2**32)
    training_seeds: int = option(
        1, "repeat base and self-training with this many seeds", low=1, high=1000
    )

    # Sampling
    steps: int = option(18, "sampler steps", low=1, high=10_000)
    labels: str = option(
        "balanced",
        "classes of the sampled images: equal shares, less noise in every score, or EDM's draws",
        choices=("balanced", "random"),
    )
    guidance: float = option(1.0, "classifier-free, of diffusers' DiT; 1: none", low=1, high=1e3)
    sample_batch: int = option(256, "images sampled at once", low=1, high=1e6)
    precision: str = option("tf32" if GPU else "fp32", "of sampling", choices=PRECISIONS)
    confirm_precision: str = option(
        "", "of the final comparison, default --precision", choices=PRECISIONS
    )
    device: str = option("cuda" if GPU else "cpu", "where", choices=("cuda", "cpu"))
    threads: int = option(
        0, "CPU threads of one batch; 0: 1 for small presets, else all", low=0, high=1024
    )

    # Scoring
    select_images: int = option(
        10_000, "images per score of the selection", low=2 * FOLDS, high=1e8
    )
    final_images: int = option(
        50_000, "images per score of the final comparison", low=2 * FOLDS, high=1e8
    )
    final_repeats: int = option(1, "disjoint sets of final seeds", low=1, high=1000)
    protocol: str = option(
        "disjoint",
        "paper: 2,000 seeds, trained on, random labels",
        choices=("disjoint", "paper"),
    )
    detector: str = option(INCEPTION, "Inception weights (PyTorch port)")
    judge: tuple = option(
        (),
        "one more feature network of the final comparison, repeatable: random-conv, pixels, "
        "FILE.py with features(images), classifier-2 and mlp of glyphs, or none",
        judge_name,
    )
    select_with: tuple = option(
        (),
        "select in the usual features joined with this network's, one of the names or files of "
        "--judge; repeatable",
        judge_name,
    )

    # Search over the block weights
    grid: tuple = option(
        (0.75, 1.0, 1.25), "weights of the grid, for every block", numbers, low=-1e6, high=1e6
    )
    grid_enc: tuple = option((), "other weights for the encoder", numbers, low=-1e6, high=1e6)
    grid_mid: tuple = option((), "other weights for the middle", numbers, low=-1e6, high=1e6)
    grid_dec: tuple = option((), "other weights for the decoder", numbers, low=-1e6, high=1e6)
    sweep: tuple = option(
        (), "also these global weights, start:stop:step", sweep_values, low=-1e6, high=1e6
    )
    race: bool = option(False, "drop grid points that are surely worse after a fifth of the seeds")
    placebo: int = option(
        0, "this many random partitions go through the same grid", low=0, high=1000
    )
    search: str = option(
        "",
        "after the grid; gradient scales to layers",
        choices=("cobyqa", "coordinate", "gradient"),
    )
    search_partition: str = option(
        "",
        "blocks of the search, default --partition: layers beside a grid over three blocks",
        read_partition,
    )
    evaluations: int = option(
        12,
        "of the search: scores, or gradients of --search gradient",
        low=1,
        high=100_000,
    )
    bounds: tuple = option((-2.0, 6.0), "of the search, low,high", numbers, low=-1e6, high=1e6)

    # The run
    out: Path = option(None, "folder of the results, default runs/<preset>", Path)
    export_pt: bool = option(False, "also the merged weights as a plain state dict")
    plan: bool = option(False, "print blocks, drift and a time estimate, then stop")
    yes: bool = option(False, "run even if it takes very long")

    def grid_of(self, block):
        """The grid's weights for one block."""
        own = {"enc": self.grid_enc, "mid": self.grid_mid, "dec": self.grid_dec}
        return own.get(block) or self.grid


class Cifar10:
    """EDM on CIFAR-10. The paper's FIDs: base 1.78, best global 1.43 to 1.74, block-wise 1.43 to
    1.71."""

    name = "cifar10"
    defaults: dict = {}
    threads = 0  # all
    network = {
        "img_resolution": 32,
        "img_channels": 3,
        "label_dim": 10,
        "augment_dim": 9,
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
        "num_blocks": 4,
        "attn_resolutions": [16],
    }

    streams: dict = {}  # of real images that are drawn here; the numbers that seed them

    def real_images(self, c):
        """RealData of --data; None without it."""
        if not c.data:
            return None
        origin = "a part of --data that nothing else has used"
        if c.base or not c.train_base:
            origin += " here; whether the base was trained on it is unknown"
        return split_by_content(*read_dataset(c.data), c.data, origin)

    def judges(self, c):
        """{name: function that gives the features} of the judges that only this preset has."""
        return {}

    def features(self, c):
        check = "6726825d" if c.detector == INCEPTION else ""
        return InceptionFeatures(fetch(c.detector, "the Inception weights", check))


class Glyphs(Cifar10):
    """Digits drawn from matplotlib's fonts and a small classifier of them: minutes on a laptop,
    nothing to download, and fresh real images for every purpose."""

    name = "glyphs"
    threads = 1  # 12 x 12 images: two batches at once are faster than two threads
    defaults = {
        "snapshot": (3,),
        "grid": (0.5, 1.0, 1.5),
        "train_base": 60.0,
        "base_lr": 3e-3,
        "synthetic": 2000,
        "steps": 10,
        "ramp_kimg": 0.0,
        "ema_kimg": 0.5,
        "dropout": 0.0,
        "augment": 0.0,
        "select_images": 1000,
        "final_images": 3000,
        "sample_batch": 250,
        "judge": ("classifier-2", "mlp", "random-conv", "pixels"),
    }
    network = {
        "img_resolution": 12,
        "img_channels": 1,
        "label_dim": 10,
        "augment_dim": 0,
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [6],
    }
    images = {"training": 5_000, "selection": 20_000, "final": 20_000}
    streams = {
        "training": 0,
        "selection": 1,
        "final": 2,
        "classifier": 3,
        "classifier test": 4,
        "classifier-2": 5,
        "mlp": 6,
    }

    def real_images(self, c):
        if c.data or c.ref:
            raise UserError("--preset glyphs draws its own real images: leave --data and --ref out")
        parts = {}
        for purpose, count in self.images.items():
            stream = self.streams[purpose]
            parts[purpose] = RealImages(*draw_glyphs(count, stream), f"glyphs, stream {stream}")
        return RealData(**parts, origin="images that no network and no selection has seen")

    def classifier(self, c, name, body, seed, stream):
        return GlyphsClassifier(c.out, name, body, seed, self.streams[stream], self.streams)

    def features(self, c):
        return self.classifier(c, "glyphs-cnn-64", glyphs_cnn, 0, "classifier")

    def judges(self, c):
        def another_seed():
            return self.classifier(c, "classifier-2", glyphs_cnn, 1, "classifier-2")

        def another_architecture():
            return self.classifier(c, "mlp", glyphs_mlp, 2, "mlp")

        return {"classifier-2": another_seed, "mlp": another_architecture}


PRESETS = {"cifar10": Cifar10(), "glyphs": Glyphs()}


# ==================== 2. the seam: what the pipeline needs of a model
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

    def create(self, images: torch.Tensor, labels: torch.Tensor | None, c: Config) -> nn.Module:
        """An untrained network for these real images, for --train-base."""

    def trainable(self, base: nn.Module, c: Config) -> nn.Module:
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

    def own_features(self, base: nn.Module):
        """A feature network of the model's own (see Judge), or None."""

    def start_check(self, base: nn.Module, c: Config, trained: bool) -> None:
        """UserError for a model that breaks a promise of this protocol."""


# ==================== 3. the run
def run(argv):
    """Base, synthetic set, self-training; then each snapshot's grid, search and final comparison;
    report."""
    begin = time.perf_counter()
    c = parse(argv)
    processes = start_processes(c)
    with processes.alone_in(c.out, c.plan):
        if c.training_seeds == 1:
            study_all(c, argv, processes, begin)
        else:
            study_seeds(c, argv, processes, begin)


def study_seeds(c, argv, processes, begin):
    """The whole study for every training seed, each in a folder of its own; then what holds over
    the seeds."""
    if c.aux:
        raise UserError("--training-seeds repeats the self-training, and --aux is trained already")
    summaries = []
    for k in range(1 if c.plan else c.training_seeds):
        # The base takes this seed, the self-training the next one.
        one = dataclasses.replace(c, seed=c.seed + 2 * k, out=c.out / f"seed-{k}")
        one.out.mkdir(exist_ok=True)
        with processes.alone_in(one.out, c.plan):
            summaries.append(study_all(one, argv, processes, time.perf_counter()))
    if c.plan and processes.rank == 0:
        print(f"and this {c.training_seeds} times, once for every training seed")
    elif processes.rank == 0:
        summary = summarise_seeds(c, argv, summaries, begin)
        write_seeds(summary, c.out)
        plot_report({"seeds.png": (plot_seeds, summary)}, c.out)


def study_all(c, argv, processes, begin):
    """One training seed, from the base to the report -> what summary.json holds, on the first
    rank."""
    ledger = seed_ledger(c)
    model = get_model(c, processes)
    real = processes.one_by_one(partial(PRESETS[c.preset].real_images, c))
    check_judges(c, real)
    base = get_base(c, model, real, processes)
    sampler = Sampler(model, base, processes, c.steps, c.sample_batch, c.labels)
    seconds, compilation = time_sampling(sampler, c.precision)
    owners = partition_owners(model, base, c.partition)
    blocks = block_order(owners)
    check_grid(c, blocks)
    refuse_hours(c, seconds, blocks)

    # What judges is complete before anything long begins.
    judges = [] if c.plan else get_judges(c, model, base, real, processes)
    snapshots = get_snapshots(c, model, base, sampler)
    if c.plan:
        print_plans(c, model, base, snapshots, owners, sampler, seconds, compilation)
        return

    log = ScoreLog(c.out)
    entries = []
    samples = {}
    for kimg, path in sorted(snapshots.items()):
        merger = Merger(base, model.load_like(base, path), owners, sampler)
        parents = {"base_weights": weights_hash(base), "aux_weights": merger.aux_hash}
        scorer = Scorer(merger, judges, sampler, log, parents, kimg, c)
        searcher = scorer
        if c.search_partition:
            searcher = scorer.with_owners(partition_owners(model, base, c.search_partition))
        entry = study(c, scorer, searcher, model, ledger)
        entries.append(entry)

        # Pictures of all models from the same noise, and the repaired network.
        samples[kimg] = {}
        shown = ledger.finals[0].seeds[: min(64, c.sample_batch)]
        for name, candidate in entry.models.items():
            with contextlib.suppress(Diverged), network_calls(merger.net, c.precision):
                candidate.merger.set(candidate.w)
                images, _ = sampler.images(shown)
                samples[kimg][name] = images.cpu()
        if processes.rank == 0:
            save_merged(c, model, entry, parents)

    if processes.rank > 0:
        return None
    summary = summarise(c, argv, entries, judges, ledger, seconds, processes, begin)
    write_report(summary, c.out)
    plot_report(figures_of(summary, samples), c.out)
    print(
        f"\n{summary['seconds_total']:.1f} s; "
        f"summary.json, table.md, grid.jsonl, pictures in {c.out}"
    )
    return summary


# -------------------- stages: base, synthetic set, self-training
@dataclasses.dataclass(frozen=True)
class RealImages:
    """images: uint8 [N, C, H, W]; labels: int64 [N] or None; source: where they come from."""

    images: torch.Tensor
    labels: torch.Tensor | None
    source: str

    @property
    def identity(self):
        labels = b"" if self.labels is None else self.labels.numpy().tobytes()
        return hashlib.sha256(self.images.numpy().tobytes() + labels).hexdigest()


@dataclasses.dataclass(frozen=True)
class RealData:
    """Real images by purpose, disjoint: a base is trained on the first part, weights are selected
    against the second and judged against the third. origin: who has seen the last, in words."""

    training: RealImages
    selection: RealImages
    final: RealImages
    origin: str


SHARES = {"training": (0, 1), "selection": (2,), "final": (3,)}  # quarters, by content
LEAST_IMAGES = 2 * FOLDS  # of a part


def split_by_content(images, labels, source, origin=""):
    """RealData: half to train on, a quarter to select with, a quarter for the final comparison. An
    image's part follows from its content alone: it never moves, and copies stay together."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images.numpy()]
    quarter = torch.tensor([digest[0] % 4 for digest in digests])
    parts = {}
    for purpose, quarters in SHARES.items():
        chosen = torch.isin(quarter, torch.tensor(quarters))
        if chosen.sum() < LEAST_IMAGES:
            raise UserError(
                f"{source}: {int(chosen.sum())} of its {len(images)} images fall into the "
                f"{purpose} part, it takes {LEAST_IMAGES}: give more images"
            )
        part_labels = None if labels is None else labels[chosen]
        parts[purpose] = RealImages(images[chosen], part_labels, f"{source}, {purpose} part")
    return RealData(**parts, origin=origin)


def get_model(c, processes):
    """--model FILE.py, a pipeline of diffusers as --base, or EDM's networks."""
    if c.model:
        return processes.one_by_one(partial(FileModel, c.model))
    if is_pipeline(c.base):
        return processes.one_by_one(partial(DiffusersModel, c))
    if c.base and Path(c.base).is_dir():
        raise UserError(
            f"--base {c.base} is a folder without model_index.json, so no pipeline of diffusers; "
            "EDM's networks are files, and other folders need --model"
        )
    return EdmModel(PRESETS[c.preset], c)


def get_base(c, model, real, processes):
    """The base network: given, downloaded, or trained from scratch (untrained for a plan)."""
    if c.base or not c.train_base:
        source = c.base if c.model else BASES.get(c.base or "cond", c.base)
        if c.model and not c.base:
            raise UserError(
                f"--model {c.model} needs --base FILE for its load(), or --train-base KIMG"
            )
        if source in BASES.values():
            refuse_download(c, model, processes)
        path = processes.one_by_one(partial(model.fetch, source, "the base network"))
        base = model.load(path)
        check_model(c, model, base, real)
        return base

    if real is None:
        raise UserError("--train-base needs --data ZIP or folder of images")
    recipe = Recipe(
        name="base",
        batch=c.batch,
        lr=c.base_lr,
        ramp_kimg=c.train_base / 20,
        ema_kimg=c.train_base / 20,
        seed=c.seed,
        ramp_ratio=0.05,
        precision=c.train_precision,
    )
    torch.manual_seed(c.seed)
    net = model.create(real.training.images, real.training.labels, c)
    check_model(c, model, net, real, trained=False)

    initial = weights_hash(net)
    inputs = {
        "initial": initial,
        "kimg": c.train_base,
        "data": real.training.identity,
        "model": model.training_identity,
    }
    key = key_of(TRAINING_VERSION, inputs, dataclasses.asdict(recipe))
    path = c.out / f"base-{key}.safetensors"
    state_path = c.out / f"base-{key}.pt"
    if c.plan and not path.exists():
        return net
    if not processes.decide(path.exists):

        def save(ema, kimg):
            model.save(ema, path, {"trained": dataclasses.asdict(recipe), "kimg": kimg})

        train(
            model,
            net,
            real.training.images,
            real.training.labels,
            recipe,
            processes,
            state_path,
            [c.train_base],
            save,
        )
    if processes.rank == 0:
        state_path.unlink(missing_ok=True)
    base = model.load_like(net, path)
    check_model(c, model, base, real)
    return base


def get_synthetic(c, base, path, sampler):
    """Images of the base at seeds 0, 1, ... with their classes, as an EDM dataset zip."""
    processes = sampler.processes
    if not processes.decide(path.exists):
        seeds = np.arange(c.synthetic)
        with network_calls(sampler.net, c.precision):  # which still is the base
            parts = processes.map_batches(sampler.images, seeds, sampler.batch, "synthetic set")
        if processes.rank == 0:
            images = torch.cat([images.cpu() for images, _ in parts])
            labels = torch.cat([labels.cpu() for _, labels in parts]) if sampler.classes else None
            write_dataset(path, images, labels)
        processes.barrier()
    return read_dataset(path)


def get_snapshots(c, model, base, sampler):
    """{kimg: path} of self-trained networks: existing (--aux) or trained here; a plan trains
    nothing."""
    if c.aux:
        return given_snapshots(c, model, sampler.processes)
    processes = sampler.processes
    recipe = Recipe(
        name="self-training",
        batch=c.batch,
        lr=c.lr,
        ramp_kimg=c.ramp_kimg,
        ema_kimg=c.ema_kimg,
        seed=c.seed + 1,
        precision=c.train_precision,
    )
    data_key = key_of(
        SAMPLING_VERSION,
        weights_hash(base),
        model.identity,
        c.synthetic,
        c.labels,
        c.steps,
        c.device,
        c.precision,
    )
    key = key_of(TRAINING_VERSION, data_key, model.training_identity, dataclasses.asdict(recipe))
    folder = c.out / f"self-{key}"
    paths = {kimg: folder / f"network-snapshot-{kimg:06d}.safetensors" for kimg in c.snapshot}
    if c.plan or processes.decide(lambda: all(path.exists() for path in paths.values())):
        return paths

    images, labels = get_synthetic(c, base, c.out / f"synthetic-{data_key}.zip", sampler)
    folder.mkdir(exist_ok=True)
    remove_orphans(folder)
    parents = {
        "base_weights": weights_hash(base),
        "synthetic": data_key,
        "training": dataclasses.asdict(recipe),
    }

    def save(ema, kimg):
        model.save(ema, paths[kimg], {**parents, "kimg": kimg})

    net = model.trainable(base, c)
    train(
        model,
        net,
        images,
        labels,
        recipe,
        processes,
        folder / "training-state.pt",
        c.snapshot,
        save,
    )
    if not processes.decide(lambda: all(path.exists() for path in paths.values())):
        raise UserError(
            f"the saved training in {folder} is already past one of --snapshot "
            f"{', '.join(map(str, c.snapshot))}: delete its training-state.pt to train again"
        )
    return paths


def given_snapshots(c, model, processes):
    """{kimg: path} from --aux: one network, or a folder of network-snapshot-*."""
    folder = Path(c.aux)
    if not folder.is_dir() or not any(folder.glob("network-snapshot-*")):
        path = processes.one_by_one(partial(model.fetch, c.aux, "the self-trained network"))
        return {c.snapshot[0]: path}
    files = {}
    for path in sorted(folder.glob("network-snapshot-*.*")):
        files[path.stem.removeprefix("network-snapshot-")] = path
    wanted = {kimg: files.get(f"{kimg:06d}") for kimg in c.snapshot}
    if None in wanted.values():
        raise UserError(
            f"--aux {folder} has snapshots {[*files]}, not all of --snapshot {c.snapshot}"
        )
    return wanted


def check_model(c, model, base, real, trained=True):
    """The model keeps the seam's promises and makes images like the real ones; before anything long
    begins."""
    model.start_check(base, c, trained)
    if real is None:
        return
    shape = tuple(model.image_shape(base))
    theirs = tuple(real.training.images.shape[1:])
    if shape != theirs:
        raise UserError(
            f"the base makes images of shape {shape} (channels, height, width), the real ones of "
            f"{real.training.source} are {theirs}: choose other --data, or another --preset than "
            f"{c.preset}"
        )


def save_merged(c, model, entry, parents):
    """The best network on the selection seeds with its recipe, and on request as a plain state
    dict."""
    name = min(entry.models, key=lambda name: entry.models[name].fd)
    best = entry.models[name]
    path = c.out / f"adaptive-neon-{entry.kimg:06d}"
    partition = c.partition
    if name == "searched" and c.search_partition:
        partition = c.search_partition
    recipe = {"model": name, "w": best.w, "partition": partition, **parents}
    model.export(best.merger.set(best.w), path, recipe)
    if c.export_pt:
        state = {name: tensor.cpu() for name, tensor in best.merger.net.state_dict().items()}
        write_atomically(path.with_suffix(".pt"), partial(torch.save, state))


# -------------------- one snapshot: grid, search, final comparison
@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model of the final comparison: its weights by block and its distance on the selection
    seeds."""

    w: dict
    fd: float
    merger: object  # the Merger that cuts the networks into these blocks
    w_global: float | None = None  # the one weight of all blocks, of "global" alone


@dataclasses.dataclass(frozen=True)
class Entry:
    """One snapshot's results."""

    kimg: int
    blocks: dict  # {block: tensors, parameters, drift}
    sweep: list  # [Score] of global weights
    grid: list  # [Score] of the block-wise grid; empty if there was none
    models: dict  # {base, collapsed, global, blockwise, searched: Candidate}
    final: dict  # {model: final_comparison()}
    placebo: list  # best of each random partition, against global
    warnings: list
    parts: dict  # {part of the selection's joint features: facts, score, final_comparison()}
    judges: dict  # {judge that no selection saw: the same}
    claims: list  # [Claim]

    def as_json(self):
        def short(score):
            row = {"w": score.w, "fd": score.fd, "seconds": score.seconds}
            row |= fd_interval([score])
            if score.precision is not None:
                row |= {"precision": score.precision, "recall": score.recall}
            return row

        sweep = [short(score) | {"w_global": next(iter(score.w.values()))} for score in self.sweep]
        models = {}
        for name, candidate in self.models.items():
            models[name] = {"w": candidate.w, "fd": candidate.fd}
            if candidate.w_global is not None:
                models[name]["w_global"] = candidate.w_global
        return {
            "kimg": self.kimg,
            "blocks": self.blocks,
            "grid": [short(score) for score in self.grid],
            "sweep": sweep,
            **models,
            "final": self.final,
            "placebo": self.placebo,
            "warnings": self.warnings,
            "parts": self.parts,
            "judges": self.judges,
            "claims": [
                dataclasses.asdict(claim) | {"sentence": claim.sentence()} for claim in self.claims
            ],
        }


def study(c, scorer, searcher, model, ledger):
    """Sweep, grid, search and placebo on the selection seeds; then the winners once more on seeds
    that no selection has seen -> Entry. searcher: a Scorer of the blocks that are searched over."""
    blocks = scorer.merger.blocks
    selection = ledger.selection

    # Global weights: the base is 0, the collapsed network -1 and no candidate.
    values = sorted({-1.0, 0.0, *c.grid, *c.sweep})
    sweep = scorer.score_all(
        [dict.fromkeys(blocks, value) for value in values], selection, "global weight"
    )
    by_value = dict(zip(values, sweep, strict=True))
    if not math.isfinite(by_value[0.0].fd):
        raise UserError("the base network's images are not finite: are its weights sound?")
    w_global = min((value for value in values if value != -1), key=lambda value: by_value[value].fd)

    merger = scorer.merger
    models = {
        "base": Candidate(by_value[0.0].w, by_value[0.0].fd, merger),
        "collapsed": Candidate(by_value[-1.0].w, by_value[-1.0].fd, merger),
        "global": Candidate(by_value[w_global].w, by_value[w_global].fd, merger, w_global),
    }

    # One weight per block: a grid, unless it is left to a search; each returns what it scored
    # itself.
    grid = score_grid(c, scorer, selection, "grid")
    if grid:
        winner = best_of(grid)
        models["blockwise"] = Candidate(winner.w, winner.fd, merger)
    if c.search:
        winner = best_of(SEARCHES[c.search](c, searcher, selection, w_global))
        models["searched"] = Candidate(winner.w, winner.fd, searcher.merger)

    # The winners on the final seeds, and the best of every random partition: all judges see the
    # same images.
    finals = {judge.name: {} for judge in scorer.judges}
    for name, candidate in models.items():
        cut = searcher if name == "searched" else scorer
        add_finals(finals, name, cut, candidate.w, ledger)
    placebo = []
    for k in range(1, c.placebo + 1):
        random_blocks = scorer.with_owners(placebo_owners(scorer.merger, model, k - 1))
        winner = best_of(score_grid(c, random_blocks, selection, f"random blocks {k}"))
        add_finals(finals, f"random blocks {k}", random_blocks, winner.w, ledger)
        own = finals[scorer.judge.name]
        gain = compare(own[f"random blocks {k}"], own["global"])
        placebo.append({"w": winner.w, "fd": winner.fd, "against_global": gain})

    own = finals[scorer.judge.name]
    final = final_comparison({name: own[name] for name in models})
    parts, judges = {}, {}
    for judge in scorer.judges[1:]:
        found = finals[judge.name]
        if judge.is_part:
            del finals[judge.name]  # no claim counts what the selection has seen
        where = parts if judge.is_part else judges
        where[judge.name] = judge.facts | {
            "score": judge.features.score,
            "final": final_comparison(found),
        }
    return Entry(
        kimg=scorer.kimg,
        blocks=scorer.merger.table(),
        sweep=sweep,
        grid=grid,
        models=models,
        final=final,
        placebo=placebo,
        warnings=warnings_of(c, models, final, bool(grid), scorer.judge),
        parts=parts,
        judges=judges,
        claims=claims_of(finals),
    )


def add_finals(finals, name, scorer, w, ledger):
    """Scores of one model on every final seed set, into {judge: {model: [Score]}}."""
    for judge in scorer.judges:
        finals[judge.name][name] = []
    for seeds in ledger.finals:
        scores = scorer.scores(w, seeds, scorer.judges, f"final: {name}")
        for judge, score in zip(scorer.judges, scores, strict=True):
            finals[judge.name][name].append(score)


def final_comparison(finals):
    """{model: [Score] of every final seed set} -> mean, all values, spread, paired differences."""
    results = {}
    for name, scores in finals.items():
        values = [score.fd for score in scores]
        result = {"w": scores[0].w, "images": scores[0].images, "all": values}
        result["fd"] = float(np.mean(values))
        result |= fd_interval(scores)
        if all(score.precision is not None for score in scores):
            result["precision"] = float(np.mean([score.precision for score in scores]))
            result["recall"] = float(np.mean([score.recall for score in scores]))
        if all(score.kernel is not None for score in scores):
            result["kernel"] = kernel_interval(scores)
        result["std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        if name != "base":
            result["against_base"] = compare(scores, finals["base"])
        if name not in ("base", "global"):
            result["against_global"] = compare(scores, finals["global"])
        results[name] = result
    return results


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one model of a snapshot is better than another: in the features it was selected with,
    and in judges that no selection saw."""

    model: str
    against: str
    own: dict  # compare(), and the difference as a share of the other's distance
    judges: dict  # {judge: the same}
    better: list  # judges in which the gain holds, corrected for their number (Holm)
    worse: list

    def sentence(self):
        text = f"{self.model} against {self.against}: {self.own['verdict']} in its own features"
        if not self.judges:
            return text
        return (
            f"{text}; of {len(self.judges)} judges that no selection saw, better in "
            f"{len(self.better)} and worse in {len(self.worse)} (95%, Holm's correction)"
        )


CLAIMS = (
    ("global", "base"),
    ("blockwise", "base"),
    ("searched", "base"),
    ("blockwise", "global"),
    ("searched", "global"),
    ("searched", "blockwise"),
)


def claims_of(finals, level=0.05):
    """{judge: {model: [Score]}}, the first judge the one that was selected with -> [Claim]."""
    own, *unseen = finals
    models = finals[own]
    pairs = [pair for pair in CLAIMS if pair[0] in models and pair[1] in models]
    for name in models:
        if name.startswith("random blocks"):
            pairs.append((name, "global"))
            if "blockwise" in models:
                pairs.append(("blockwise", name))

    claims = []
    for model, against in pairs:
        gains = {}
        for judge, scores in finals.items():
            gain = compare(scores[model], scores[against], level)
            theirs = float(np.mean([score.fd for score in scores[against]]))
            gains[judge] = gain | as_shares(gain, theirs)
        held = holm([gains[judge]["p"] for judge in unseen], level)
        holding = [judge for judge, holds in zip(unseen, held, strict=True) if holds]
        claims.append(
            Claim(
                model=model,
                against=against,
                own=gains.pop(own),
                judges=gains,
                better=[judge for judge in holding if gains[judge]["difference"] < 0],
                worse=[judge for judge in holding if gains[judge]["difference"] > 0],
            )
        )
    return claims


def warnings_of(c, models, final, had_grid, judge):
    """What a careful reader would want to know."""
    notes = []
    if had_grid:
        for block, value in models["blockwise"].w.items():
            values = c.grid_of(block)
            if len(values) > 1 and value in (values[0], values[-1]):
                notes.append(f"w_{block} = {value:g} lies on the edge of the grid")
    dim = judge.features.dim
    if c.select_images <= dim:
        notes.append(
            f"{c.select_images} selection images for {dim} features: the covariance is singular"
        )
    real = min(judge.selection.facts["images"], judge.final.facts["images"])
    if real <= dim:
        notes.append(f"{real} real images for {dim} features: the covariance is singular")

    for name in ("blockwise", "searched"):
        if name not in final:
            continue
        # Both gains in shares of the base: the seed sets differ in size, and so in bias.
        against, base = final[name]["against_base"], final["base"]["fd"]
        promised = models[name].fd / models["base"].fd - 1
        if promised < against["low"] / base:
            notes.append(
                f"{name} is {-promised:.1%} below the base on the selection seeds and "
                f"{-against['difference'] / base:.1%} on the final ones: selection noise"
            )
        loss = final["base"].get("precision", 0) - final[name].get("precision", 0)
        if loss > 0.01 and against["difference"] < 0:
            notes.append(f"{name}: precision falls while the distance falls")
    for name, candidate in models.items():
        if not math.isfinite(candidate.fd):
            notes.append(f"{name}: the sampler diverges")
    return notes


# -------------------- seeds: who may see which
@dataclasses.dataclass(frozen=True)
class SeedSet:
    """Consecutive seeds and what they are for."""

    purpose: str
    first: int
    count: int

    @property
    def seeds(self):
        return np.arange(self.first, self.first + self.count)

    @property
    def last(self):
        return self.first + self.count - 1

    @property
    def is_final(self):
        return self.purpose.startswith("final")

    def start(self, count):
        """Its first seeds."""
        return dataclasses.replace(self, count=count)


@dataclasses.dataclass(frozen=True)
class Ledger:
    selection: SeedSet
    finals: list
    streams: dict  # of generated real images, where there are any

    def as_json(self):
        firsts = {
            "selection": self.selection.first,
            "final": [seeds.first for seeds in self.finals],
        }
        return firsts | ({"real_streams": self.streams} if self.streams else {})


def search_seeds(count):
    """Seeds of the gradient search, which no score uses."""
    return SeedSet("search", SEARCH_SEED, count)


def seed_ledger(c):
    """Disjoint seeds for synthetic, selection, final and search sets; the paper's overlap is
    announced."""
    paper = c.protocol == "paper"
    synthetic = SeedSet("synthetic", 0, c.synthetic)
    selection = SeedSet("selection", 0 if paper else SELECT_SEED, c.select_images)
    finals = []
    for repeat in range(c.final_repeats):
        first = FINAL_SEED + repeat * c.final_images
        finals.append(SeedSet(f"final {repeat + 1}", first, c.final_images))
    sets = [synthetic, selection, *finals]
    if c.search == "gradient":
        sets.append(search_seeds(c.select_images))

    for one, other in itertools.combinations(sets, 2):
        announced = paper and (one.purpose, other.purpose) == ("synthetic", "selection")
        if one.first <= other.last and other.first <= one.last and not announced:
            raise UserError(
                f"seeds of the {one.purpose} set ({one.first}-{one.last}) and the {other.purpose} "
                f"set ({other.first}-{other.last}) overlap: fewer --synthetic, --select-images, "
                "--final-images or --final-repeats"
            )
    if max(seeds.last for seeds in sets) >= 2**32:
        raise UserError("the run needs more than 2^32 seeds, which repeat: fewer images")
    if paper:
        print(
            "--protocol paper: selection seeds 0-1999 overlap the synthetic training set, and "
            "2,000 images are fewer than 2,048 features: the covariance is singular"
        )
    return Ledger(selection, finals, PRESETS[c.preset].streams)


# ==================== 4. self-training
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


# ==================== 5. blocks, and merging them
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


# ==================== 6. sampling: seeds, batches, precision
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


class Diverged(Exception):
    """The sampler gave images that are not finite."""


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


# ==================== 7. features, reference, precision and recall
class InceptionFeatures(nn.Module):
    """Inception-v3 of the FID graph: uint8 [N, 3, H, W] (or float in [0, 255]) -> pool [N, 2048]
    float32. path: the public PyTorch port of its weights (pt_inception-2015-12-05). TF1-style
    resize to 299 and (v - 128) / 128: comparable with EDM's FID. Batch normalisation is folded into
    the convolutions."""

    dim = 2048
    score = "FID"
    kind = "inception"
    # Chains of convolutions side by side: name of the chain, its length; then a pooled branch.
    MIXED = {
        "5b": {"1x1": 1, "5x5": 2, "3x3dbl": 3},
        "5c": {"1x1": 1, "5x5": 2, "3x3dbl": 3},
        "5d": {"1x1": 1, "5x5": 2, "3x3dbl": 3},
        "6a": {"3x3": 1, "3x3dbl": 3},
        "6b": {"1x1": 1, "7x7": 3, "7x7dbl": 5},
        "6c": {"1x1": 1, "7x7": 3, "7x7dbl": 5},
        "6d": {"1x1": 1, "7x7": 3, "7x7dbl": 5},
        "6e": {"1x1": 1, "7x7": 3, "7x7dbl": 5},
        "7a": {"3x3": 2, "7x7x3": 4},
        "7b": {"1x1": 1, "3x3": 2, "3x3dbl": 3},
        "7c": {"1x1": 1, "3x3": 2, "3x3dbl": 3},
    }

    def __init__(self, path):
        super().__init__()
        with reading(f"{path} is not the PyTorch port of the FID Inception"):
            weights = checked_torch_load(path)
            for key in [key for key in weights if key.endswith(".conv.weight")]:
                name = key.removesuffix(".conv.weight").replace(".", "_")
                bn = key.replace("conv.weight", "bn.")
                scale = (
                    weights[f"{bn}weight"].double()
                    / (weights[f"{bn}running_var"].double() + 1e-3).sqrt()
                )
                bias = weights[f"{bn}bias"].double() - weights[f"{bn}running_mean"].double() * scale
                self.register_buffer(
                    name, (weights[key].double() * scale.view(-1, 1, 1, 1)).float()
                )
                self.register_buffer(f"{name}_bias", bias.float())
            try:
                self(torch.zeros(1, 3, 8, 8))  # every layer is there and fits
            except AttributeError as error:
                raise KeyError(str(error)) from error
        self.name = f"inception-{weights_hash(self)[:8]}-tf1"
        self.identity = weights_hash(self)

    def conv(self, x, name, stride=1, padding=None):
        """Convolution and ReLU; by default stride 1 keeps the size and stride 2 is unpadded."""
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        if padding is None:
            padding = [k // 2 for k in weight.shape[2:]] if stride == 1 else 0
        return F.relu(F.conv2d(x, weight, bias, stride, padding))

    def mixed(self, x, block):
        stride = 2 if block in ("6a", "7a") else 1
        outs = []
        for branch, length in self.MIXED[block].items():
            prefix = f"Mixed_{block}_branch{branch}"
            h = x
            for i in range(1, length):
                h = self.conv(h, f"{prefix}_{i}")
            last = f"{prefix}_{length}" if length > 1 else prefix
            # These chains end in two convolutions side by side.
            split = block in ("7b", "7c") and length > 1
            for end in ("a", "b") if split else ("",):
                outs.append(self.conv(h, last + end, stride))

        if stride == 2:
            return torch.cat([*outs, F.max_pool2d(x, 3, 2)], 1)
        if block == "7c":
            pooled = F.max_pool2d(x, 3, 1, 1)
        else:
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*outs, self.conv(pooled, f"Mixed_{block}_branch_pool")], 1)

    @staticmethod
    def resize(x, size=299):
        """TensorFlow 1's bilinear: source coordinate j * W / 299, no half-pixel shift; x, then y;
        float32."""
        for axis in (3, 2):
            n = x.shape[axis]
            at = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
            low = at.floor().long().clamp_max(n - 1)
            part = (at - low).view([size if a == axis else 1 for a in range(4)])
            first = x.index_select(axis, low)
            x = first + (x.index_select(axis, (low + 1).clamp_max(n - 1)) - first) * part
        return x

    def forward(self, images):
        x = (self.resize(images.float()) - 128).expand(-1, 3, -1, -1) / 128
        x = self.conv(x, "Conv2d_1a_3x3", 2)
        x = self.conv(x, "Conv2d_2a_3x3", padding=0)
        x = F.max_pool2d(self.conv(x, "Conv2d_2b_3x3"), 3, 2)
        x = self.conv(x, "Conv2d_3b_1x1")
        x = F.max_pool2d(self.conv(x, "Conv2d_4a_3x3", padding=0), 3, 2)
        for block in self.MIXED:
            x = self.mixed(x, block)
        return x.mean((2, 3))


# -------------------- glyphs: digits from matplotlib's fonts, as many as one likes
GLYPH_SIZE = 12
GLYPH_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
)


@functools.cache
def glyph_atlas(size=64, points=46):
    """Every digit in every font, in the middle: float32 [fonts, 10, size, size] in [0, 1]."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    atlas = torch.zeros(len(GLYPH_FONTS), 10, size, size)
    for row, name in zip(atlas, GLYPH_FONTS, strict=True):
        with reading(f"font {folder / name} is missing or damaged: install matplotlib again"):
            font = PIL.ImageFont.truetype(
                str(folder / name), points, layout_engine=PIL.ImageFont.Layout.BASIC
            )
        for digit in range(10):
            picture = PIL.Image.new("L", (size, size))
            pen = PIL.ImageDraw.Draw(picture)
            left, top, right, bottom = pen.textbbox((0, 0), str(digit), font=font)
            corner = ((size - left - right) / 2, (size - top - bottom) / 2)
            pen.text(corner, str(digit), fill=255, font=font)
            row[digit] = torch.from_numpy(np.array(picture)) / 255
    return atlas


def draw_glyphs(count, stream, size=GLYPH_SIZE, oversampling=3):
    """The first images of a stream: uint8 [count, 1, size, size], int64 labels [count]. Image i of
    a stream is always the same, however many are drawn."""
    # A row of nine numbers for every image, one after the other.
    draws = np.random.default_rng([*b"glyphs", stream]).random((count, 9))
    chosen, drawn = torch.from_numpy(draws[:, :2]), torch.from_numpy(draws[:, 2:]).float()
    low = torch.tensor([-0.2, 0.60, -0.25, 0.85, -0.08, -0.08, 0.7])
    high = torch.tensor([0.2, 0.85, 0.25, 1.15, 0.08, 0.08, 1.0])
    turn, zoom, shear, stretch, x, y, brightness = (low + (high - low) * drawn).unbind(1)
    font, label = (chosen * torch.tensor([len(GLYPH_FONTS), 10])).long().unbind(1)

    # From a place in the image to its place in the atlas, both in [-1, 1].
    across = [turn.cos() * zoom * stretch, (shear - turn.sin()) * zoom, x]
    down = [turn.sin() * zoom * stretch, turn.cos() * zoom / stretch, y]
    maps = torch.stack([torch.stack(across, 1), torch.stack(down, 1)], 1)  # [count, 2, 3]

    # Drawn larger and averaged over areas: the strokes are narrower than a pixel.
    fine = size * oversampling
    images = []
    for part in torch.arange(count).split(2000):
        grid = F.affine_grid(maps[part], [len(part), 1, fine, fine], align_corners=False)
        ink = F.grid_sample(
            glyph_atlas()[font[part], label[part]][:, None], grid, align_corners=False
        )
        grey = F.avg_pool2d(ink, oversampling) * brightness[part].view(-1, 1, 1, 1)
        images.append((grey * 255).round().to(torch.uint8))
    return torch.cat(images), label


def glyphs_cnn():
    side = -(-GLYPH_SIZE // 4)
    conv = partial(nn.Conv2d, kernel_size=3, padding=1)
    return nn.Sequential(
        conv(1, 32),
        nn.ReLU(),
        conv(32, 64, stride=2),
        nn.ReLU(),
        conv(64, 64, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * side * side, 64),
        nn.ReLU(),
    )


def glyphs_mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(GLYPH_SIZE**2, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU()
    )


class GlyphsClassifier(nn.Module):
    """Small classifier of glyphs, trained here on a stream of its own (seeded, seconds): uint8
    [N, 1, 12, 12] -> the 64 features in front of its last layer. They are not bounded on purpose:
    bounded ones are quieter, but blind to brightness, and choose weights that pixels and random
    convolutions find worse than the base (results/README.md). folder: keeps its weights."""

    dim = 64

    def __init__(self, folder, name, body, seed, stream, streams, images=10_000, epochs=4):
        super().__init__()
        self.name = self.kind = name
        self.score = "FD (glyphs CNN, 64-d)" if name == "glyphs-cnn-64" else f"FD ({name}, 64-d)"
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = body()
            self.head = nn.Linear(64, 10)
            design = str(self.body)
            key = key_of(TRAINING_VERSION, design, seed, stream, images, epochs)
            path = folder / f"{name}-{key}.pt"
            if not path.exists():
                self.fit(*draw_glyphs(images, stream), epochs)
                write_atomically(path, partial(torch.save, self.state_dict()))
        with reading(f"{path} is damaged, delete it"):
            self.load_state_dict(checked_torch_load(path))
        self.eval().requires_grad_(False)
        self.identity = key_of(design, weights_hash(self))

        fresh, labels = draw_glyphs(2000, streams["classifier test"])
        right = self.head(self(fresh)).argmax(1) == labels
        self.facts = {"accuracy": float(right.double().mean()), "accuracy_images": len(right)}

    def fit(self, images, labels, epochs):
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        for _ in range(epochs):
            for index in torch.randperm(len(images)).split(128):
                optimizer.zero_grad()
                F.cross_entropy(self.head(self(images[index])), labels[index]).backward()
                optimizer.step()

    def forward(self, images):
        return self.body(images.float() / 127.5 - 1)


# -------------------- judges that need nothing: no training, no download
class RandomConvFeatures(nn.Module):
    """Convolutions with random weights from a fixed seed: uint8 [N, C, H, W] -> [N, 64]."""

    dim = 64
    name = kind = "random-conv"
    score = "FD (random convolutions, 64-d)"

    def __init__(self, channels):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(20_06)
            layers = []
            for c_in, c_out, stride in ((channels, 32, 1), (32, 64, 2), (64, 64, 2)):
                layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.ReLU()]
                nn.init.kaiming_normal_(layers[-2].weight)
            self.body = nn.Sequential(*layers)
        self.eval().requires_grad_(False)
        self.identity = key_of(str(self.body), weights_hash(self))

    def forward(self, images):
        return self.body(images.float() / 127.5 - 1).mean((2, 3))


class PixelFeatures(nn.Module):
    """Pixels, in the leading principal components of real images: uint8 [N, C, H, W] -> [N, 32] or
    fewer. images: uint8 [N, C, H, W] that no score compares with. Sides above 16 are averaged down
    to it."""

    name = kind = "pixels"

    def __init__(self, images, most=32, side=16):
        super().__init__()
        self.side = (min(images.shape[2], side), min(images.shape[3], side))
        x = torch.cat([self.vectors(part).double() for part in images.split(1000)])  # [N, P]
        mean, cov = neon_ext.feature_moments(x)
        _, vectors = torch.linalg.eigh(cov)  # in ascending order
        self.register_buffer("mean", mean.float())
        self.register_buffer("components", vectors[:, -most:].float())
        self.dim = self.components.shape[1]
        self.score = f"FD (pixels, {self.dim} principal components)"
        self.identity = weights_hash(self)

    def vectors(self, images):
        return F.adaptive_avg_pool2d(images.float() / 127.5 - 1, self.side).flatten(1)

    def forward(self, images):
        return (self.vectors(images) - self.mean) @ self.components


class JudgeFile:
    """FILE.py of --judge or --select-with, as FileFeatures takes it."""

    def __init__(self, path, option="--judge"):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"{option} {path} is no file, and no built-in judge: random-conv, pixels; with "
                "--preset glyphs also classifier-2 and mlp"
            )
        self.file = FileModel.import_file(self.path, option)
        self.identity = file_hash(self.path)
        if not hasattr(self.file, "features"):
            raise UserError(f"{option} {path} lacks features(images)")

    def call(self, name, *args):
        return FileModel.call(self, name, *args)


# -------------------- features of a file, joint features, reference, judge
class FileFeatures:
    """features(images) of a model file: uint8-valued [N, C, H, W] -> [N, D]."""

    def __init__(self, model, example):
        found = model.call("features", example)
        if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != len(example):
            raise UserError(f"{model.path}: features() must give a tensor [{len(example)}, D]")
        if not found.is_floating_point() or not found.isfinite().all():
            raise UserError(f"{model.path}: features() must give finite floating-point numbers")
        self.model, self.dim = model, found.shape[1]
        self.kind = self.name = f"{model.path.stem}-{self.dim}"
        self.score = f"FD (features of {model.path.name}, {self.dim}-d)"
        self.identity = model.identity

    def __call__(self, images):
        # No graph of the feature network's own parameters, in worker threads neither.
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            found = self.model.call("features", images)
        if found.shape != (len(images), self.dim) or found.device != images.device:
            raise UserError(
                f"{self.model.path}: features() of {len(images)} images on {images.device} gave "
                f"{list(found.shape)} on {found.device}, not [{len(images)}, {self.dim}] there"
            )
        if not found.isfinite().all():
            raise UserError(f"{self.model.path}: features() are not finite for some images")
        return found

    def to(self, device):
        return self


class JointFeatures:
    """Several feature networks as one: their features side by side, each network's scaled to the
    same total variance over real images, so that their units do not matter; the mean variance of
    a feature is 1. images: uint8 [N, C, H, W] that no score compares with."""

    def __init__(self, parts, images, device):
        self.parts = parts
        self.dim = sum(part.dim for part in parts)
        self.scales = []
        for part in parts:
            found = features_of_images(images, part, device)
            variance = float(found.double().var(0).sum())
            if variance == 0:
                raise UserError(f"the features {part.name} are the same for all real images")
            self.scales.append((self.dim / len(parts) / variance) ** 0.5)
        self.name = self.kind = "+".join(part.name for part in parts)
        self.score = f"FD ({self.name}, {self.dim}-d)"
        self.identity = key_of([part.identity for part in parts], tensor_hash(images))

    def __call__(self, images):
        found = [part(images) * scale for part, scale in zip(self.parts, self.scales, strict=True)]
        return torch.cat(found, 1)


def check_differentiable(features, images, what):
    """Of a gradient search: joined with others, features without a gradient would be left out of
    the sum without a word. images: uint8-valued [N, C, H, W]; what: their name in the message."""
    with torch.enable_grad():
        pixels = images.detach().float().requires_grad_(True)
        size = features(pixels).double().square().sum()
        gradient = None
        try:
            if size.requires_grad:
                (gradient,) = torch.autograd.grad(size, pixels, allow_unused=True)
        except RuntimeError as error:
            raise UserError(
                f"--search gradient: the gradient through {what} fails: {reason_of(error)}"
            ) from error
    if gradient is None or not gradient.any() or not gradient.isfinite().all():
        raise UserError(
            f"--search gradient: no gradient comes through {what}, or one that is not finite"
        )


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of the real data in one feature network. prepared: neon_ext.FrechetReference;
    real: the features themselves [N, D] where they are at hand; facts: features, source, images,
    origin, for the report."""

    prepared: object
    real: torch.Tensor | None
    facts: dict
    identity: str  # hash of mean, covariance and features

    @functools.cached_property
    def radii(self):
        """Of precision_recall(), which needs them for every score."""
        return neighbour_radii(self.real)

    @functools.cached_property
    def kernel_mean(self):
        """Of kernel_distance(): the mean kernel of two different real images."""
        real = self.real[:KERNEL_IMAGES].double()
        rows, diagonal = kernel_rows(real, real), kernel_diagonal(real)
        return float(rows.sum() - diagonal.sum()) / (len(real) * (len(real) - 1))


def reference_of(statistics, features, source, device, real=None, origin=""):
    """Reference from {mu [D], sigma [D, D], images, features}, if they are of these features and
    usable."""
    kind, shape = str(statistics["features"]), np.shape(statistics["mu"])
    if shape != (features.dim,) or kind not in (features.name, features.kind):
        raise UserError(
            f"reference {source} has {shape} statistics of {kind}, the features are "
            f"{features.name}, {features.dim}-d: use statistics of the same features"
        )
    count = int(statistics["images"])
    with reading(f"reference {source} has no usable mu and sigma"):
        mu, cov = (torch.as_tensor(statistics[key]).double().to(device) for key in ("mu", "sigma"))
        prepared = neon_ext.FrechetReference(mu, cov, count)
    facts = {"features": features.name, "source": str(source), "images": count}
    if origin:
        facts["origin"] = origin
    identity = key_of(
        tensor_hash(mu), tensor_hash(cov), count, None if real is None else tensor_hash(real)
    )
    return Reference(prepared, real, facts, identity)


@torch.no_grad()
def features_of_images(images, features, device):
    """Features [N, D] of uint8 images [N, C, H, W]."""
    return torch.cat([features(part.to(device)) for part in images.split(256)])


def reference_from_images(real, features, path, device, origin=""):
    """Reference of real images; path, if any, keeps its statistics."""
    found = features_of_images(real.images, features, device)
    mu, cov = (moment.cpu().numpy() for moment in neon_ext.feature_moments(found))
    statistics = {"mu": mu, "sigma": cov, "images": len(real.images), "features": features.name}

    def write(part):
        np.savez(part, **statistics)

    if path is not None:
        write_atomically(path, write)
    return reference_of(statistics, features, real.source, device, found, origin)


def reference_from_file(path, features, device, real=None, origin=""):
    """Reference of an npz with mu and sigma, as EDM's (which leaves features and images out). real:
    images for precision, recall and the kernel distance, which need more than moments."""
    with reading(f"reference {path} has no usable mu and sigma"), np.load(path) as file:
        statistics = {"features": "inception", "images": 50_000} | dict(file)
        for key in ("mu", "sigma"):
            if key not in statistics:
                raise KeyError(key)
    found = None if real is None else features_of_images(real.images, features, device)
    return reference_of(statistics, features, path, device, found, origin)


@dataclasses.dataclass(frozen=True)
class Judge:
    """A feature network and the real data seen through it: what a score is. Weights are selected
    against one part of the real images and compared against another, where there are two."""

    features: object  # callable with dim, name, kind, score, identity, perhaps facts
    selection: Reference
    final: Reference
    is_part: bool = False  # of the joint features that the selection saw

    def reference(self, seeds):
        """The one that scores of this SeedSet are distances to."""
        return self.final if seeds.is_final else self.selection

    def identity(self, seeds):
        return key_of(self.features.identity, self.reference(seeds).identity)

    @property
    def name(self):
        return self.features.name

    @property
    def facts(self):
        """For the report: features, source, images of the final reference, and what else is
        known."""
        facts = dict(self.final.facts) | getattr(self.features, "facts", {})
        if self.selection is not self.final:
            facts["selection"] = self.selection.facts
        return facts

    def floor(self, images):
        """The final score of real images, the first of the selection part: bias, and the best that
        a model can hope for."""
        moments = neon_ext.feature_moments(self.selection.real[:images])
        return {"images": images, "fd": float(self.final.prepared.distance(*moments))}


def judge_of_images(features, real, device, folder=None, is_part=False):
    """Judge of a feature network with the selection and final parts of the real images as
    references; folder, if any, keeps their statistics."""
    references = {}
    for purpose in ("selection", "final"):
        path = None if folder is None else folder / f"reference-{purpose}.npz"
        part = getattr(real, purpose)
        references[purpose] = reference_from_images(part, features, path, device, real.origin)
    return Judge(features, **references, is_part=is_part)


def judge_of_file(features, real, source, c):
    """Judge of a feature network with the statistics of a file, the same for selection and final
    comparison; real images, if any, serve precision, recall and the kernel distance."""

    def check(path):
        reference_from_file(path, features, c.device, None, "")

    path = fetch(source, "the reference statistics", check=check)
    origin = "of unknown origin: base and selection may have seen its images"
    if source == CIFAR10_STATISTICS:
        origin = "CIFAR-10's 50,000 training images, which EDM's networks were trained on"
    if real is None:
        reference = reference_from_file(path, features, c.device, None, origin)
        return Judge(features, reference, reference)
    parts = (real.selection, real.final)
    references = [reference_from_file(path, features, c.device, r, origin) for r in parts]
    return Judge(features, *references)


def check_judges(c, real):
    """Refuse a --judge or --select-with without real images, or whose file is missing or wrong,
    before anything is trained."""
    if c.select_with and c.ref:
        raise UserError(
            "--select-with needs real images, whose features are joined: leave --ref out"
        )
    for option, names in (("--judge", judge_names(c)), ("--select-with", c.select_with)):
        if names and real is None:
            raise UserError(f"{option} {names[0]} compares with real images: give --data")
        for name in names:
            if name not in ("random-conv", "pixels", *PRESETS[c.preset].judges(c)):
                JudgeFile(name, option)


def judge_names(c):
    """Judges that no selection sees."""
    return [name for name in dict.fromkeys(c.judge) if name not in ("none", *c.select_with)]


def get_judges(c, model, base, real, processes):
    """What decides, then what only judges. The first: the features of the model's own file, or the
    preset's, or these joined with --select-with, which then follow one by one; then those of
    --judge. With their references."""
    allow_tf32(c.precision)

    def build():
        own = (model.own_features(base) or PRESETS[c.preset].features(c)).to(c.device)
        if c.device == "cuda" and isinstance(own, InceptionFeatures):
            own.to(memory_format=torch.channels_last)  # its convolutions follow their weights

        # The feature networks, before their references are computed.
        selecting, unseen = [own], []
        for name in dict.fromkeys(c.select_with):
            selecting.append(judge_features(name, c, real, "--select-with").to(c.device))
        for name in judge_names(c):
            unseen.append(judge_features(name, c, real).to(c.device))
        names = [features.name for features in selecting + unseen]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"--judge, --select-with: there are two feature networks named {name}"
                )

        # The references: of what decides, of its parts, of what only judges.
        if c.ref or real is None:
            judges = [judge_of_file(own, real, reference_source(c, model), c)]
        elif len(selecting) == 1:
            judges = [judge_of_images(own, real, c.device, c.out)]
        else:
            images = real.training.images
            if c.search == "gradient":
                for part in selecting:
                    few = images[:4].to(c.device)
                    check_differentiable(part, few, f"the features {part.name}")
            joint = JointFeatures(selecting, images, c.device)
            judges = [judge_of_images(joint, real, c.device, c.out)]
            judges += [judge_of_images(part, real, c.device, is_part=True) for part in selecting]
        judges += [judge_of_images(features, real, c.device) for features in unseen]
        return judges

    return processes.one_by_one(build)


def judge_features(name, c, real, option="--judge"):
    """The feature network of one --judge or --select-with."""
    images = real.training.images
    preset = PRESETS[c.preset].judges(c)
    if name in preset:
        return preset[name]()
    if name == "random-conv":
        return RandomConvFeatures(images.shape[1])
    if name == "pixels":
        return PixelFeatures(images)
    return FileFeatures(JudgeFile(name, option), images[:4].to(c.device))


def reference_source(c, model):
    """--ref; CIFAR-10's own statistics only for EDM's CIFAR-10 networks, or when they are asked
    for."""
    if c.ref == "cifar10":
        return CIFAR10_STATISTICS
    if c.ref:
        return c.ref
    if c.model or c.base not in ("", *BASES, *BASES.values()):
        raise UserError(
            "a network of your own needs real images or statistics to be scored against: give "
            "--data IMAGES or --ref STATISTICS.npz (--ref cifar10 for CIFAR-10's own)"
        )
    return CIFAR10_STATISTICS


def neighbour_radii(points, k=5, most=10_000):
    """Distance of each of the first `most` points [N, D] to its k-th neighbour: float64 [N]."""
    points = points[:most].double()
    # A point's own zero distance is its first neighbour, hence k + 1.
    radii = [torch.cdist(part, points).kthvalue(k + 1).values for part in points.split(1000)]
    return torch.cat(radii)


@torch.no_grad()
def precision_recall(real, fake, k=5, most=10_000, real_radii=None):
    """Improved precision and recall (arXiv 1904.06991), k nearest neighbours, at most `most` of
    each."""
    real, fake = real[:most].double(), fake[:most].double()

    def share_inside(points, manifold, radii):
        hits = [(torch.cdist(part, manifold) <= radii).any(1) for part in points.split(1000)]
        return float(torch.cat(hits).double().mean())

    if real_radii is None:
        real_radii = neighbour_radii(real, k, most)
    precision = share_inside(fake, real, real_radii)
    return precision, share_inside(real, fake, neighbour_radii(fake, k, most))


KERNEL_IMAGES = 10_000  # at most, of each side of the kernel distance


def kernel_rows(points, others):
    """Sum over `others` [M, D] of the kernel (x y / D + 1)^3 with each of the points [N, D]:
    float64 [N]."""
    sums = []
    for part in points.split(500):
        near = part @ others.T / points.shape[1] + 1
        sums.append((near * near * near).sum(1))
    return torch.cat(sums)


def kernel_diagonal(points):
    """The kernel of each point with itself: float64 [N]."""
    return ((points * points).sum(1) / points.shape[1] + 1) ** 3


@torch.no_grad()
def kernel_distance(reference, fake):
    """Kernel Inception distance (arXiv 1801.01401): the unbiased squared maximum mean discrepancy
    to the real features, and the same without each of FOLDS folds of the fake ones [N, D]."""
    real = reference.real[:KERNEL_IMAGES].double()
    parts = fake[:KERNEL_IMAGES].double().tensor_split(FOLDS)
    sizes = np.array([len(part) for part in parts])

    # Sums of kernels between folds, without those of an image with itself, and with the real ones.
    within = np.zeros((FOLDS, FOLDS))
    for k, part in enumerate(parts):
        for j, other in enumerate(parts):
            within[k, j] = float(kernel_rows(part, other).sum())
        within[k, k] -= float(kernel_diagonal(part).sum())
    across = np.array([float(kernel_rows(part, real).sum()) for part in parts])

    def distance(kept):
        n = sizes[kept].sum()
        fakes = within[np.ix_(kept, kept)].sum() / (n * (n - 1))
        return reference.kernel_mean + fakes - 2 * across[kept].sum() / (n * len(real))

    every = np.arange(FOLDS)
    return float(distance(every)), [float(distance(every[every != k])) for k in every]


# ==================== 8. scores, their log, comparisons
@dataclasses.dataclass(frozen=True)
class Score:
    """One network's distance to the real data, on one set of seeds."""

    snapshot: float  # kimg
    w: dict  # {block: weight}
    images: int
    first_seed: int
    fd: float  # inf where the sampler diverged
    folds: list  # the distance without each of FOLDS seed folds
    precision: float | None
    recall: float | None
    arithmetic: str  # of the sampling network: fp32, tf32, bf16, fp16
    seconds: float
    key: str  # hash of all that decides the score
    judge: str = ""  # name of the features
    kernel: float | None = None  # unbiased kernel distance, on final seeds
    kernel_folds: list | None = None

    def as_line(self):
        """One line of JSON, which knows no infinity."""
        row = dataclasses.asdict(self)
        if not math.isfinite(self.fd):
            row |= {"fd": None, "folds": None}
        return json.dumps(row, allow_nan=False)

    @classmethod
    def from_line(cls, line):
        """The score of a line of our own; ValueError says what is wrong with it."""
        row = json.loads(line)
        fields = dataclasses.fields(cls)
        needed = {field.name for field in fields if field.default is dataclasses.MISSING}
        if not isinstance(row, dict) or not needed <= set(row) <= {f.name for f in fields}:
            raise ValueError("it has other entries than a score")
        if row["fd"] is None:
            row |= {"fd": math.inf, "folds": [math.inf] * FOLDS}
        numbers = [row["fd"], row["seconds"], *row["folds"], *row["w"].values()]
        if row["precision"] is not None:
            numbers += [row["precision"], row["recall"]]
        if row.get("kernel") is not None:
            numbers += [row["kernel"], *row["kernel_folds"]]
        if not all(isinstance(number, (int, float)) and number == number for number in numbers):
            raise ValueError("it has entries that are no numbers")
        if len(row["folds"]) != FOLDS or row["fd"] < -1e-6 * abs(row["fd"]) - 1e-3:
            raise ValueError("its distance or folds are impossible")
        return cls(**row)

    @property
    def name(self):
        """What is scored with the same key only once."""
        return json.dumps([self.w, self.images, self.first_seed], sort_keys=True)


class ScoreLog:
    """Finished scores: grid.jsonl (selection seeds) and final.jsonl (final seeds), a line each."""

    def __init__(self, folder):
        self.folder = folder
        self.scores = {}
        for path in (folder / "grid.jsonl", folder / "final.jsonl"):
            if path.exists():
                self.read(path)

    def read(self, path):
        # What follows the last line break was cut off by a kill; add() takes it away.
        *lines, _ = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                self.keep(Score.from_line(line.decode("utf-8")))
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number}, is damaged ({printable(error)}): "
                    "delete the line, or the file"
                ) from error

    def keep(self, score):
        self.scores[score.key, score.name] = score

    def find(self, key, w, seeds):
        name = json.dumps([w, seeds.count, int(seeds.first)], sort_keys=True)
        return self.scores.get((key, name))

    def add(self, score, seeds):
        """Append to the file of these seeds; the lock keeps lines of several processes apart."""
        self.keep(score)
        path = self.folder / ("final.jsonl" if seeds.is_final else "grid.jsonl")
        with open(path, "a+b") as file:
            lock(file)
            file.seek(0)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
            file.write(score.as_line().encode() + b"\n")


class Scorer:
    """Scores of one snapshot's extrapolations; what is finished is read back from the log."""

    def __init__(self, merger, judges, sampler, log, parents, kimg, c):
        self.merger, self.sampler, self.log = merger, sampler, log
        self.judges = judges  # the first decides, the others only see the final comparison
        self.judge = judges[0]
        self.parents, self.kimg = parents, kimg
        self.selection_precision = c.precision
        self.final_precision = c.confirm_precision or c.precision

    def with_owners(self, owners):
        """The same networks cut into other blocks."""
        other = copy.copy(self)
        other.merger = self.merger.with_owners(owners)
        return other

    def weights(self, values):
        """Numbers in the order of the blocks -> {block: weight}, rounded: the same key after a
        resume."""
        return {
            block: round(float(v), 6) for block, v in zip(self.merger.blocks, values, strict=True)
        }

    def arithmetic(self, seeds):
        return self.final_precision if seeds.is_final else self.selection_precision

    def key(self, seeds, judge=None):
        sampler = self.sampler
        inputs = {
            "networks": self.parents,
            "owners": self.merger.owners,
            "model": sampler.model.identity,
            "judge": (judge or self.judge).identity(seeds),
            "steps": sampler.steps,
            "labels": sampler.labels,
            "precision": self.arithmetic(seeds),
            "device": sampler.processes.device,
            "torch": torch.__version__,
            "folds": FOLDS,
            "snapshot": self.kimg,
        }
        return key_of(SCORING_VERSION, SAMPLING_VERSION, inputs)

    def features(self, w, seeds, judges, desc=None):
        """Every judge's features [N, D] of the images at these seeds, in their order, on every
        rank; None: it diverged."""
        net = self.merger.set(w)
        processes = self.sampler.processes

        def work(part):
            images, _ = self.sampler.images(part)
            found = [judge.features(images) for judge in judges]
            return [features.cpu() for features in found] if processes.world > 1 else found

        try:
            with network_calls(net, self.arithmetic(seeds)):
                parts = processes.map_batches(work, seeds.seeds, self.sampler.batch, desc)
        except Diverged:
            return None
        return [torch.cat(side).to(processes.device) for side in zip(*parts, strict=True)]

    def score(self, w, seeds, desc=None):
        """Score of the weights w on a SeedSet, in the judge that decides."""
        return self.scores(w, seeds, [self.judge], desc)[0]

    @torch.no_grad()
    def scores(self, w, seeds, judges, desc=None):
        """One Score a judge, all of the same images; precision and recall where real images are at
        hand, on final seeds the kernel distance too."""
        begin = time.perf_counter()
        processes = self.sampler.processes
        keys = [self.key(seeds, judge) for judge in judges]
        scores = processes.decide(lambda: [self.log.find(key, w, seeds) for key in keys])
        missing = [i for i, score in enumerate(scores) if score is None]
        if not missing:
            return scores
        found = self.features(w, seeds, [judges[i] for i in missing], desc)
        if found is None and processes.rank == 0:
            print(f"{printable(json.dumps(w))}: the sampler diverges, the score is infinite")

        def assess():
            for place, i in enumerate(missing):
                features = None if found is None else found[place]
                scores[i] = self.assess(w, seeds, judges[i], features, keys[i], begin)
                self.log.add(scores[i], seeds)
            return scores

        return processes.decide(assess)

    def assess(self, w, seeds, judge, features, key, begin):
        """Score of features [N, D], None where the sampler diverged."""
        fd, folds = math.inf, [math.inf] * FOLDS
        precision = recall = kernel = kernel_folds = None
        reference = judge.reference(seeds)
        if features is not None:
            fd, folds = reference.prepared.fold_distances(features, FOLDS)
        if features is not None and reference.real is not None:
            precision, recall = precision_recall(
                reference.real, features, real_radii=reference.radii
            )
            if seeds.is_final:
                kernel, kernel_folds = kernel_distance(reference, features)
        return Score(
            snapshot=self.kimg,
            w=w,
            images=seeds.count,
            first_seed=int(seeds.first),
            fd=fd,
            folds=folds,
            precision=precision,
            recall=recall,
            arithmetic=self.arithmetic(seeds),
            seconds=round(time.perf_counter() - begin, 3),
            key=key,
            judge=judge.name,
            kernel=kernel,
            kernel_folds=kernel_folds,
        )

    def score_all(self, weights, seeds, desc):
        quiet = self.sampler.processes.rank > 0
        bar = tqdm(weights, desc=f"snapshot {self.kimg}: {desc}", leave=False, disable=quiet)
        return [self.score(w, seeds) for w in bar]


def best_of(scores):
    return min(scores, key=fd_of)


def fd_of(score):
    return score.fd


def compare(scores, others, level=0.05):
    """Paired difference of distances, mean over the seed sets of `scores` and `others`, and its
    interval: the delete-one-fold jackknife (Student's t) of the difference, as both saw the same
    noise. better: lower. p: of no difference, two-sided."""
    ours, theirs = (float(np.mean([score.fd for score in side])) for side in (scores, others))
    if not math.isfinite(ours) or not math.isfinite(theirs):
        difference = 0.0 if ours == theirs else ours - theirs
        verdict = (
            "no significant difference"
            if ours == theirs
            else "better"
            if ours < theirs
            else "worse"
        )
        p = 1.0 if ours == theirs else 0.0
        return {
            "difference": difference,
            "low": difference,
            "high": difference,
            "verdict": verdict,
            "p": p,
        }

    pairs = list(zip(scores, others, strict=True))
    full = float(np.mean([one.fd - other.fd for one, other in pairs]))
    half, p = jackknife(full, [np.subtract(one.folds, other.folds) for one, other in pairs], level)
    verdict = "no significant difference"
    if abs(full) > half:
        verdict = "better" if full < 0 else "worse"
    return {"difference": full, "low": full - half, "high": full + half, "verdict": verdict, "p": p}


def as_shares(gain, theirs):
    """What compare() found, as shares of the other's distance."""
    keys = ("difference", "low", "high")
    return {f"relative_{key}": gain[key] / theirs if theirs else 0.0 for key in keys}


def jackknife(mean, folds, level=0.05):
    """Half the interval of a mean over seed sets and the p-value of its being zero. folds
    [sets, FOLDS]: what was averaged, without each fold of the seeds."""
    folds = np.array(folds)
    variance = (FOLDS - 1) / FOLDS * ((folds - folds.mean(1, keepdims=True)) ** 2).sum()
    freedom = len(folds) * (FOLDS - 1)
    half = float(scipy.stats.t.ppf(1 - level / 2, freedom) * variance**0.5 / len(folds))
    if not half:
        return half, float(mean == 0)
    return half, float(2 * scipy.stats.t.sf(abs(mean) * len(folds) / variance**0.5, freedom))


def fd_interval(scores):
    """95% interval of the mean distance over the seed sets, over the noise alone."""
    value = float(np.mean([score.fd for score in scores]))
    if not math.isfinite(value):
        return {"low": value, "high": value}
    half, _ = jackknife(value, [score.folds for score in scores])
    return {"low": value - half, "high": value + half}


def kernel_interval(scores):
    """Mean kernel distance over the seed sets and its 95% interval, over the noise alone."""
    value = float(np.mean([score.kernel for score in scores]))
    half, _ = jackknife(value, [score.kernel_folds for score in scores])
    return {"value": value, "low": value - half, "high": value + half}


def holm(p_values, level=0.05):
    """Which hypotheses hold when all are asked at once: the chance that any is wrong stays at
    `level` (Holm 1979)."""
    held = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(p_values) - rank):
            break
        held[i] = True
    return held


# ==================== 9. grid and search over block weights
def grid_points(c, blocks):
    """How many points the grid has; none when a search takes the place of a large one."""
    points = math.prod(len(c.grid_of(block)) for block in blocks)
    if c.search and points > MAX_POINTS_BESIDE_SEARCH and not c.placebo:
        return 0
    return points


def grid_weights(c, blocks):
    """All products of the grid over the blocks."""
    if grid_points(c, blocks) == 0:
        return []
    lists = [c.grid_of(block) for block in blocks]
    return [dict(zip(blocks, values, strict=True)) for values in itertools.product(*lists)]


def check_grid(c, blocks):
    """Refuse a grid that takes for ever or names a block that is not there, announce a large
    one."""
    for block in ("enc", "mid", "dec"):
        if getattr(c, f"grid_{block}") and block not in blocks:
            raise UserError(f"--grid-{block}: this partition has no block {block}: use --grid")
    points = grid_points(c, blocks)
    if points > MAX_POINTS and not c.yes:
        advice = "use --search gradient without --placebo, or add --yes"
        raise UserError(f"the grid has {points} points over {len(blocks)} blocks: {advice}")
    if points > MAX_POINTS_BESIDE_SEARCH:
        print(
            f"the grid has {points} points over {len(blocks)} blocks; "
            "--search gradient needs no grid"
        )


def race(scorer, weights, seeds, level=0.05):
    """Candidates that a fifth of the seeds does not separate from the leader: intervals of the
    difference at level / candidates, so that the best is dropped with a probability of at most
    about `level`."""
    few = seeds.start(min(seeds.count, max(2 * FOLDS, seeds.count // 5)))
    scores = scorer.score_all(weights, few, "race")
    leader = best_of(scores)
    return [
        score.w for score in scores if compare([score], [leader], level / len(scores))["low"] <= 0
    ]


def score_grid(c, scorer, seeds, desc):
    """Scores of the grid (of what a race leaves of it); none if the grid is left to the search."""
    weights = grid_weights(c, scorer.merger.blocks)
    if c.race and len(weights) > 1:
        weights = race(scorer, weights, seeds)
    return scorer.score_all(weights, seeds, desc)


class Trials:
    """The scores that a search without gradients asks for, in a progress bar."""

    def __init__(self, c, scorer, seeds, desc):
        self.scorer, self.seeds = scorer, seeds
        self.scores = []
        quiet = scorer.sampler.processes.rank > 0
        self.bar = tqdm(total=c.evaluations, desc=desc, leave=False, disable=quiet)

    def score(self, values):
        """Score of one weight a block, in the order of the blocks."""
        self.scores.append(self.scorer.score(self.scorer.weights(values), self.seeds))
        self.bar.update()
        return self.scores[-1]


def search_cobyqa(c, scorer, seeds, start):
    """Derivative-free trust-region search (scipy's COBYQA) from the best global weight -> its
    scores."""
    trials = Trials(c, scorer, seeds, "COBYQA")

    def distance(x):
        return trials.score(x).fd

    blocks = len(scorer.merger.blocks)
    x = np.full(blocks, float(np.clip(start, *c.bounds)))
    options = {"initial_tr_radius": 0.5, "final_tr_radius": 0.01, "maxfev": c.evaluations}
    with trials.bar:
        scipy.optimize.minimize(
            distance, x, method="COBYQA", bounds=[c.bounds] * blocks, options=options
        )
    return trials.scores


def search_coordinate(c, scorer, seeds, start, step=0.5, least_step=0.01):
    """One block after the other a step up or, without gain, down, from the best global weight; a
    round without any gain halves the step. The plainest search that scales to layers -> its
    scores."""
    trials = Trials(c, scorer, seeds, "coordinate search")
    low, high = c.bounds
    values = [float(np.clip(start, low, high))] * len(scorer.merger.blocks)
    with trials.bar:
        best = trials.score(values)
        while step >= least_step:
            before = best
            for k in range(len(values)):
                for move in (step, -step):
                    if len(trials.scores) >= c.evaluations:
                        return trials.scores
                    moved = [*values]
                    moved[k] = float(np.clip(values[k] + move, low, high))
                    if moved[k] == values[k]:
                        continue
                    score = trials.score(moved)
                    if score.fd < best.fd:
                        best = score
                        values = moved
                        break
            if best is before:
                step /= 2
    return trials.scores


class SearchEnds(Exception):
    """A search has used its evaluations, or has not gained for long."""


class GradientSearch:
    """L-BFGS-B (scipy) on all block weights from the best global weight. It descends the distance
    at one set of fresh seeds; each of its points is also scored on the selection seeds, which no
    gradient has seen, and `patience` points without gain there end it, against overfitting. What
    was computed is kept on disk."""

    def __init__(self, c, scorer, seeds, start, patience):
        self.scorer, self.seeds, self.start = scorer, seeds, start
        self.bounds, self.evaluations, self.patience = c.bounds, c.evaluations, patience
        self.fresh = search_seeds(seeds.count)
        self.precision = gradient_precision(scorer.selection_precision)
        settings = [
            scorer.key(seeds),
            start,
            seeds.first,
            self.fresh.first,
            self.fresh.count,
            c.bounds,
            self.precision,
        ]
        self.path = scorer.log.folder / f"search-{key_of(SEARCH_VERSION, settings)}.pt"
        self.rank = scorer.sampler.processes.rank
        self.known = scorer.sampler.processes.decide(self.stored)
        self.scores = []  # of its points, in their order
        self.bar = tqdm(
            total=c.evaluations, desc="gradient search", leave=False, disable=self.rank > 0
        )

    def stored(self):
        """(w, distance, [gradient]) of every point that an earlier run has computed."""
        with reading(f"{self.path} is damaged, delete it to search from the start"):
            if not self.path.exists():
                return []
            return [tuple(point) for point in checked_torch_load(self.path)]

    def run(self):
        """The scores of its points, the start first."""
        blocks = len(self.scorer.merger.blocks)
        with self.bar, contextlib.suppress(SearchEnds):
            scipy.optimize.minimize(
                self.scaled,
                np.full(blocks, self.start),
                jac=True,
                method="L-BFGS-B",
                bounds=[self.bounds] * blocks,
                options={"maxfun": 10**6, "maxiter": 10**6},
            )
        return self.scores

    def scaled(self, x):
        """What L-BFGS-B minimises: the first step moves no weight by more than a half."""
        self.check_end()
        distance, gradient = self.point_at(x)
        _, first, slopes = self.known[0]
        steepest = np.abs(slopes).max()
        if steepest == 0 or not math.isfinite(first):
            raise SearchEnds
        if not math.isfinite(distance):  # the sampler diverges: a wall that the line search sees
            distance = 10 * max(point[1] for point in self.known if math.isfinite(point[1]))
        return 0.5 / steepest * distance, 0.5 / steepest * gradient

    def check_end(self):
        if len(self.scores) == self.evaluations:
            raise SearchEnds
        if self.scores:
            best = int(np.argmin([fd_of(score) for score in self.scores]))
            if len(self.scores) - 1 - best >= self.patience:
                raise SearchEnds

    def point_at(self, x):
        """Distance and gradient at the next point, computed or known."""
        w = self.scorer.weights(x)
        k = len(self.scores)
        if k < len(self.known) and self.known[k][0] != w:
            del self.known[k:]  # of another scipy
        if k == len(self.known):
            self.compute(w)
        self.scores.append(self.scorer.score(w, self.seeds))
        self.bar.update()
        _, distance, gradient = self.known[k]
        return distance, np.array(gradient)

    def compute(self, w):
        distance, gradient = distance_and_gradient(self.scorer, w, self.fresh, self.precision)
        slopes = [float(gradient[block]) for block in self.scorer.merger.blocks]

        def of_first_rank():
            return w, float(distance), slopes

        # The last bits may differ between ranks, and with them the end of the search.
        self.known.append(self.scorer.sampler.processes.decide(of_first_rank))
        if self.rank == 0:
            write_atomically(self.path, partial(torch.save, self.known))


def search_gradient(c, scorer, seeds, start, patience=6):
    """The search that scales to layers -> its scores."""
    return GradientSearch(c, scorer, seeds, start, patience).run()


SEARCHES = {
    "cobyqa": search_cobyqa,
    "coordinate": search_coordinate,
    "gradient": search_gradient,
}


def gradient_precision(precision):
    """fp16 has no exponents for small derivatives: a block's gradient would change its sign."""
    return "fp32" if precision == "fp16" else precision


def halving(work, seeds, batch, processes):
    """map_batches of work(batch, part); on all ranks with half the batch where the memory is too
    small for the activations of one network call and of the features."""
    while True:
        try:
            return processes.map_batches(partial(work, batch), seeds, batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2


def distance_and_gradient(scorer, w, seeds, precision, rounding=True):
    """Distance at w, and {block: its exact derivative in the block's weight}. Pass one: moments of
    the features; two: every batch again, the distance's derivative pulled back through features and
    sampler to the weights, one network call's activations at a time. Rounding to uint8 is passed
    straight through. Where the sampler diverges: infinity, and a gradient of zero."""
    merger, sampler, judge = scorer.merger, scorer.sampler, scorer.judge
    processes = sampler.processes
    net = merger.set(w)
    n = seeds.count

    def features_of(part, batch):
        images, _ = sampler.floats(part, batch)
        if not images.isfinite().all():
            raise Diverged
        x = to_pixels(images)
        return judge.features(x + (x.floor() - x).detach() if rounding else x)

    def features_alone(part):
        with torch.no_grad():  # per thread
            found = features_of(part, sampler.batch)
        return found.cpu() if processes.world > 1 else found

    # Pass one: the moments, and the distance's derivative in them.
    try:
        with network_calls(net, precision):
            parts = processes.map_batches(features_alone, seeds.seeds, sampler.batch)
    except Diverged:
        return math.inf, dict.fromkeys(merger.blocks, 0.0)
    mean, cov = neon_ext.feature_moments(torch.cat(parts).to(processes.device))
    inputs = mean.clone().requires_grad_(), cov.requires_grad_()
    fd = judge.reference(seeds).prepared.distance(*inputs)
    to_mean, to_cov = torch.autograd.grad(fd, inputs)

    # Pass two: d theta / d w_block = theta_r - theta_s.
    resident = dict(net.named_parameters())
    names = list(merger.owners)
    parameters = [resident[name] for name in names]

    def pull_back(batch, part):
        with torch.enable_grad():
            features = features_of(part, batch)
        pull = to_mean / n + 2 * (features.detach().double() - mean) @ to_cov / (n - 1)
        gradients = torch.autograd.grad(
            features, parameters, pull.to(features.dtype), allow_unused=True
        )
        total = dict.fromkeys(merger.blocks, 0.0)
        for name, gradient in zip(names, gradients, strict=True):
            if (
                gradient is not None
            ):  # sampling may not use a parameter, as EDM's augmentation labels
                drift = merger.theta_r[name] - merger.theta_s[name]
                total[merger.owners[name]] += float((gradient.double() * drift).sum())
        return list(total.values())

    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with network_calls(net, precision, checkpointed=True):
            totals = halving(pull_back, seeds.seeds, max(1, sampler.batch // 2), processes)
    finally:
        net.requires_grad_(False)
    return fd.item(), dict(zip(merger.blocks, np.sum(totals, axis=0), strict=True))


# ==================== 10. report
def summarise(c, argv, entries, judges, ledger, seconds, processes, begin):
    """What summary.json holds."""
    judge = judges[0]
    apart = judge.selection is not judge.final and judge.selection.real is not None
    most = len(judge.selection.real) if apart else 0
    counts = sorted({min(c.select_images, most), min(c.final_images, most)} - {0})
    machine = torch.cuda.get_device_name() if c.device == "cuda" else f"{os.cpu_count()} cores"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }
    if "diffusers" in sys.modules:
        versions["diffusers"] = getattr(sys.modules["diffusers"], "__version__", "unknown")
    return {
        "command": " ".join(["python edm_neon.py", *argv]),
        "config": dataclasses.asdict(c),
        "score": judge.features.score,
        "judges": [judge.name for judge in judges if not judge.is_part],
        "reference": judge.facts,
        "snapshots": [entry.as_json() for entry in entries],
        "floors": [judge.floor(count) for count in counts],
        "seconds_per_image": seconds,
        "first_seeds": ledger.as_json(),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "world": processes.world,
        "neon_ext": neon_ext.build_config(),
        "versions": versions,
        "seconds_total": time.perf_counter() - begin,
    }


def interval(gain):
    return f"{gain['difference']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]"


def weights_text(w):
    """One number where all blocks agree, else every block's."""
    values = set(w.values())
    if len(values) == 1:
        return f"{values.pop():g}"
    return ", ".join(f"{block} {value:.3g}" for block, value in w.items())


def weights_title(w):
    """The same, short enough for a picture's title."""
    text = weights_text(w)
    return text if len(w) <= 4 or "," not in text else f"one for each of {len(w)} blocks"


def table_row(entry, name):
    """The cells of one model of one snapshot."""
    final = entry["final"][name]
    final_text = f"{final['fd']:.4f}"
    if final["std"] is not None:
        final_text += f" +- {final['std']:.4f}"
    gain, verdict = "", ""
    if "against_base" in final:
        gain = interval(final["against_base"])
        verdict = final["against_base"]["verdict"]
    precision, recall = "", ""
    if "precision" in final:
        precision, recall = f"{final['precision']:.3f}", f"{final['recall']:.3f}"
    kernel = ""
    if "kernel" in final:
        kernel = "{value:.4g} [{low:.4g}, {high:.4g}]".format(**final["kernel"])
    selection = f"{entry[name]['fd']:.4f}"
    return [
        f"{entry['kimg']:g}",
        name,
        weights_text(final["w"]),
        selection,
        final_text,
        gain,
        verdict,
        precision,
        recall,
        kernel,
    ]


def judge_rows(entry, key):
    """A row for every feature network of an entry's judges or parts: distances, paired differences
    as shares."""
    models = list(entry["final"])
    pairs = [("global", "base")]
    for name in ("blockwise", "searched"):
        if name in models:
            pairs.append((name, "global"))
    head = ["judge", *models, *(f"{model} against {against} (95%)" for model, against in pairs)]
    rows = [head, ["---"] * len(head)]
    for result in entry[key].values():
        final = result["final"]
        row = [result["score"]]
        for name in models:
            row.append(f"{final[name]['fd']:.4g}")
        for model, against in pairs:
            gain = final[model][f"against_{against}"]
            shares = as_shares(gain, final[against]["fd"])
            text = "{relative_difference:+.1%} [{relative_low:+.1%}, {relative_high:+.1%}]"
            row.append(f"{text.format(**shares)} {gain['verdict']}")
        rows.append(row)
    return rows


def entry_notes(entry):
    """Paired comparisons of the models, in all judges, and warnings."""
    kimg = f"{entry['kimg']:g}"
    notes = []
    for name in ("searched", "blockwise"):
        if name in entry["final"]:
            gain = entry["final"][name]["against_global"]
            notes.append(
                f"Snapshot {kimg}: {name} against global {interval(gain)}: {gain['verdict']}."
            )
    for k, placebo in enumerate(entry["placebo"], 1):
        gain = placebo["against_global"]
        notes.append(
            f"Snapshot {kimg}: random blocks {k} against global {interval(gain)}: "
            f"{gain['verdict']}."
        )
    if entry["judges"]:
        for claim in entry["claims"]:
            notes.append(f"Snapshot {kimg}: {claim['sentence']}.")
    for note in entry["warnings"]:
        notes.append(f"Warning, snapshot {kimg}: {note}.")
    return notes


def reference_notes(summary):
    """What the final comparison compares with, and what only it does."""
    reference = summary["reference"]
    notes = []
    if "origin" in reference:
        once = "" if "selection" in reference else ", the same for selection and final comparison"
        notes.append(f"Reference: {reference['origin']}{once} ({reference['images']} images).")
    if "accuracy" in reference:
        notes.append(
            f"The features' own classifier reads {reference['accuracy']:.1%} of "
            f"{reference['accuracy_images']} fresh images."
        )
    if len(summary["judges"]) == 1:
        notes.append(
            "Every verdict is in the features that the weights were selected with: --judge adds "
            "others."
        )
    for floor in summary["floors"]:
        notes.append(
            f"Floor: {floor['images']} real images, of the selection part, score "
            f"{floor['fd']:.4f} against the final one."
        )
    return notes


def strict(value):
    """The same data in strict JSON: infinities are null, other objects text."""
    if isinstance(value, dict):
        return {str(key): strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def markdown(rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_report(summary, out):
    """summary.json and table.md; the terminal gets the table."""
    head = [
        "snapshot (kimg)",
        "model",
        "w",
        f"selection {summary['score']}",
        "final",
        "against base (95%)",
        "verdict",
        "precision",
        "recall",
        "kernel distance (95%)",
    ]
    rows = [head, ["---"] * len(head)]
    judged, notes = [], []
    for entry in summary["snapshots"]:
        for name in entry["final"]:
            rows.append(table_row(entry, name))
        kimg = f"{entry['kimg']:g}"
        for key, title in (
            ("parts", f"Parts of the selection's features, snapshot {kimg}:"),
            ("judges", f"Judges that no selection saw, snapshot {kimg}:"),
        ):
            if entry[key]:
                judged += [title, markdown(judge_rows(entry, key))]
        notes += entry_notes(entry)
    text = "\n\n".join([markdown(rows), *judged, *notes, *reference_notes(summary)])
    print("\n" + text)
    write_atomically(out / "table.md", text + "\n")
    write_atomically(out / "summary.json", json.dumps(strict(summary), indent=1, allow_nan=False))


# -------------------- report over training seeds
@dataclasses.dataclass(frozen=True)
class OverSeeds:
    """One claim over training seeds (and random partitions), in the features of the selection and
    in the judges that no selection saw."""

    kimg: float
    model: str
    against: str
    own_verdicts: list  # one a seed (and partition)
    own_relative: list  # differences as shares of the other's distance
    cases: int  # verdicts of judges that no selection saw
    better: int  # of them, corrected for the number of judges
    worse: int
    relative: list  # mean over those judges, one a seed (and partition)

    @classmethod
    def of(cls, kimg, model, against, claims):
        """claims: as_json() of this claim, one a seed (and partition)."""
        relative = []
        for claim in claims:
            gains = [gain["relative_difference"] for gain in claim["judges"].values()]
            if gains:
                relative.append(float(np.mean(gains)))
        return cls(
            kimg=kimg,
            model=model,
            against=against,
            own_verdicts=[claim["own"]["verdict"] for claim in claims],
            own_relative=[claim["own"]["relative_difference"] for claim in claims],
            cases=sum(len(claim["judges"]) for claim in claims),
            better=sum(len(claim["better"]) for claim in claims),
            worse=sum(len(claim["worse"]) for claim in claims),
            relative=relative,
        )

    def sentence(self):
        better = self.own_verdicts.count("better")
        text = (
            f"{self.model} is better than {self.against} in {better} of {len(self.own_verdicts)} "
            f"in its own features ({mean_and_spread(self.own_relative)})"
        )
        if not self.cases:
            return text
        return (
            f"{text} and in {self.better} of {self.cases} cases of the judges that no selection "
            f"saw, worse in {self.worse} ({mean_and_spread(self.relative)})"
        )


def mean_and_spread(shares):
    spread = f" +- {np.std(shares, ddof=1):.1%}" if len(shares) > 1 else ""
    return f"{np.mean(shares):+.1%}{spread}"


def claims_over_seeds(summaries):
    """[OverSeeds] of every snapshot and claim; all random partitions are one."""
    groups = {}
    for summary in summaries:
        for entry in summary["snapshots"]:
            for claim in entry["claims"]:
                sides = (claim["model"], claim["against"])
                names = [re.sub(r"(random blocks) \d+", r"\1", name) for name in sides]
                groups.setdefault((entry["kimg"], *names), []).append(claim)
    return [OverSeeds.of(*key, claims) for key, claims in groups.items()]


QUESTIONS = (
    ("blockwise", "global"),
    ("blockwise", "random blocks"),
    ("searched", "global"),
    ("searched", "blockwise"),
)


def summarise_seeds(c, argv, summaries, begin):
    """summary.json of several training seeds; those of each seed lie in its folder."""
    seeds = []
    for k, summary in enumerate(summaries):
        seeds.append({"folder": f"seed-{k}", "seed": summary["config"]["seed"]})
    first = summaries[0]
    same = ("score", "judges", "reference", "machine", "threads", "world", "neon_ext", "versions")
    over = []
    for claim in claims_over_seeds(summaries):
        over.append(dataclasses.asdict(claim) | {"sentence": claim.sentence()})
    return {
        "command": " ".join(["python edm_neon.py", *argv]),
        "config": dataclasses.asdict(c),
        **{key: first[key] for key in same},
        "kimg": [entry["kimg"] for entry in first["snapshots"]],
        "seeds": seeds,
        "final": [[e["final"] for e in summary["snapshots"]] for summary in summaries],
        "claims": [[e["claims"] for e in summary["snapshots"]] for summary in summaries],
        "over_seeds": over,
        "seconds_total": time.perf_counter() - begin,
    }


def answer(over, kimg, seeds):
    """The question of the paper in one sentence: is block-wise better than global, than random
    blocks, and what was searched (layers, say) better than both?"""
    parts = []
    for model, against in QUESTIONS:
        for row in over:
            if (row["kimg"], row["model"], row["against"]) == (kimg, model, against):
                parts.append(row["sentence"])
    return f"Snapshot {kimg:g}, {seeds} training seeds: {'; '.join(parts)}." if parts else ""


def write_seeds(summary, out):
    """summary.json and table.md over the training seeds; the terminal gets the table."""
    rows = [["snapshot (kimg)", "training seed", "model", f"final {summary['score']}"]]
    rows[0] += ["against base (95%)", "against global (95%)"]
    rows.append(["---"] * len(rows[0]))
    for k, finals in enumerate(summary["final"]):
        for entry, final in zip(summary["kimg"], finals, strict=True):
            for name, result in final.items():
                row = [f"{entry:g}", str(summary["seeds"][k]["seed"]), name, f"{result['fd']:.4f}"]
                for other in ("base", "global"):
                    gain = result.get(f"against_{other}")
                    row.append(f"{interval(gain)} {gain['verdict']}" if gain else "")
                rows.append(row)

    head = ["snapshot (kimg)", "model", "against", "own features: better in", "difference"]
    head += ["unseen judges: better in", "worse in", "difference"]
    over = [head, ["---"] * len(head)]
    for row in summary["over_seeds"]:
        better = row["own_verdicts"].count("better")
        cells = [f"{row['kimg']:g}", row["model"], row["against"]]
        cells += [f"{better} of {len(row['own_verdicts'])}", mean_and_spread(row["own_relative"])]
        cells += [f"{row['better']} of {row['cases']}", str(row["worse"])]
        cells.append(mean_and_spread(row["relative"]) if row["relative"] else "")
        over.append(cells)

    answers = [answer(summary["over_seeds"], k, len(summary["seeds"])) for k in summary["kimg"]]
    notes = [*filter(None, answers), "Differences are shares of the other's distance, mean +- std."]
    text = "\n\n".join([markdown(rows), markdown(over), *notes])
    print("\n" + text)
    write_atomically(out / "table.md", text + "\n")
    write_atomically(out / "summary.json", json.dumps(strict(summary), indent=1, allow_nan=False))


# -------------------- pictures
# Dark to light, so that they stay apart in grey print; markers and hatches repeat them.
STYLES = {
    "base": {"color": "#707070", "marker": "s", "hatch": ""},
    "collapsed": {"color": "#b4b4b4", "marker": "x", "hatch": "xx"},
    "global": {"color": "#1f5fa8", "marker": "o", "hatch": ""},
    "blockwise": {"color": "#e07b00", "marker": "^", "hatch": "//"},
    "searched": {"color": "#f2c94c", "marker": "D", "hatch": ".."},
    "random": {"color": "#c9c9c9", "marker": "v", "hatch": ""},
}


def style_of(name):
    return STYLES[name.split()[0]]


def figures_of(summary, samples):
    """{file name: (function, data)} of one training seed's pictures."""
    figures = {"scores.png": (plot_scores, summary)}
    for entry in summary["snapshots"]:
        kimg = entry["kimg"]
        figures[f"samples_{kimg:06d}.png"] = plot_samples, (entry, samples[kimg])
        if len(entry["blocks"]) == 3 and entry["grid"]:
            figures[f"grid_{kimg:06d}.png"] = plot_grid, (entry["grid"], summary["score"])
        if entry["judges"]:
            figures[f"judges_{kimg:06d}.png"] = plot_judges, (entry, summary["score"])
    return figures


def error_bars(rows, key="fd"):
    """Values and the lengths of their intervals below and above, as errorbar() takes them."""
    table = np.array([[row[key], row["low"], row["high"]] for row in rows], float)
    table[~np.isfinite(table)] = np.nan  # where a sampler diverged there is nothing to draw
    values, low, high = table.T
    return values, np.stack([values - low, high - values]).clip(0)


def plot_scores(plt, summary):
    """Final distances with their intervals, against the snapshot where there are several; distance,
    precision and recall against the global weight."""
    entries = summary["snapshots"]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    final, sweep, shares = axes
    names = list(entries[0]["final"])
    if len(entries) == 1:
        rows = [entries[0]["final"][name] for name in names]
        values, errors = error_bars(rows)
        for i, name in enumerate(names):
            style = style_of(name)
            final.bar(i, values[i], color=style["color"], hatch=style["hatch"], edgecolor="white")
        final.errorbar(range(len(names)), values, errors, fmt="none", ecolor="black", capsize=4)
        final.set_xticks(range(len(names)), names, rotation=20)
        final.set(ylim=(0, None))
    else:
        x = [entry["kimg"] for entry in entries]
        for name in names:
            if name != "collapsed":
                values, errors = error_bars([entry["final"][name] for entry in entries])
                style = style_of(name)
                final.errorbar(
                    x, values, errors, color=style["color"], marker=style["marker"], label=name
                )
        final.set(xlabel="self-training (kimg)")
        final.legend()
    final.set(title="final comparison, 95% (not paired)", ylabel=summary["score"])

    greys = plt.get_cmap("cividis")(np.linspace(0, 0.8, len(entries)))
    for entry, colour in zip(entries, greys, strict=True):
        kimg = f", {entry['kimg']:g} kimg" if len(entries) > 1 else ""
        rows = [row for row in entry["sweep"] if math.isfinite(row["fd"])]
        x = [row["w_global"] for row in rows]
        values, errors = error_bars(rows)
        sweep.errorbar(x, values, errors, color=colour, marker="o", capsize=3, label=kimg[2:])
        if all("precision" in row for row in rows):
            for key, line in (("precision", "-"), ("recall", "--")):
                y = [row[key] for row in rows]
                shares.plot(x, y, line, color=colour, marker="o", label=f"{key}{kimg}")
    sweep.axvline(0, color="#8c8c8c", linewidth=0.8, linestyle=":")
    sweep.set(xlabel="w, the same for all blocks", ylabel=summary["score"])
    sweep.set(title="selection seeds, 95% (not paired)")
    if len(entries) > 1:
        sweep.legend()
    if shares.lines:
        shares.set(xlabel="w, the same for all blocks", title="selection seeds")
        shares.legend()
    else:
        shares.set_visible(False)


def plot_grid(plt, data):
    """Heat maps over the first and last block, one for each weight of the middle one: values in the
    cells, the least framed, equal weights outlined."""
    rows, score = data
    first, middle, last = rows[0]["w"]
    columns = {block: sorted({row["w"][block] for row in rows}) for block in (first, middle, last)}
    table = {tuple(row["w"].values()): row["fd"] for row in rows}
    width = 0.9 + max(1.6, 0.62 * len(columns[last]))
    height = 1.0 + max(1.3, 0.46 * len(columns[first]))
    count = len(columns[middle])
    figure, axes = plt.subplots(
        1, count, figsize=(width * count + 0.8, height), squeeze=False, layout="constrained"
    )
    finite = [fd for fd in table.values() if math.isfinite(fd)]
    low, high = min(finite, default=0), max(finite, default=1)
    least = min(table, key=table.get)
    for axis, m in zip(axes[0], columns[middle], strict=True):
        cells = [[table.get((y, m, x), np.nan) for x in columns[last]] for y in columns[first]]
        image = axis.imshow(cells, vmin=low, vmax=high, cmap="cividis", aspect="auto")
        axis.set(xlabel=f"w_{last}", ylabel=f"w_{first}", title=f"w_{middle} = {m:g}")
        axis.set_xticks(range(len(columns[last])), [f"{value:g}" for value in columns[last]])
        axis.set_yticks(range(len(columns[first])), [f"{value:g}" for value in columns[first]])
        for i, y in enumerate(columns[first]):
            for j, x in enumerate(columns[last]):
                value = table.get((y, m, x), math.nan)
                if not math.isfinite(value):
                    continue
                dark = value < (low + high) / 2
                ink = "white" if dark else "black"
                axis.text(j, i, f"{value:.4g}", ha="center", va="center", color=ink, fontsize=8)
                if x == y == m:
                    frame_cell(plt, axis, i, j, edgecolor=ink, linestyle="--", linewidth=1.2)
                if (y, m, x) == least:
                    frame_cell(plt, axis, i, j, edgecolor=ink, linewidth=3)
    figure.colorbar(image, ax=axes[0].tolist(), label=score)
    figure.suptitle("solid frame: the least; dashed: one weight for all blocks", fontsize=9)


def frame_cell(plt, axis, i, j, **how):
    inset = 0.06
    corner = (j - 0.5 + inset, i - 0.5 + inset)
    side = 1 - 2 * inset
    axis.add_patch(plt.Rectangle(corner, side, side, fill=False, **how))


def plot_judges(plt, data):
    """Relative gains side by side, one group of points for each judge; the selection's own features
    come first."""
    entry, score = data
    claims = {(claim["model"], claim["against"]): claim for claim in entry["claims"]}
    panels = []
    for against in ("base", "global"):
        models = [model for model, other in claims if other == against]
        if models:
            panels.append((against, models))
    own = score.removeprefix("FD (").split(",")[0].replace("+", " +\n")
    names = [f"{own} (own)", *entry["judges"]]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for axis, (against, models) in zip(axes[0], panels, strict=True):
        for place, model in enumerate(models):
            claim = claims[model, against]
            gains = [claim["own"], *claim["judges"].values()]
            rows = []
            for gain in gains:
                keys = {"fd": "difference", "low": "low", "high": "high"}
                rows.append({k: 100 * gain[f"relative_{v}"] for k, v in keys.items()})
            values, errors = error_bars(rows)
            x = np.arange(len(names)) + 0.14 * (place - (len(models) - 1) / 2)
            style = style_of(model)
            axis.errorbar(
                x,
                values,
                errors,
                fmt=style["marker"],
                color=style["color"],
                markeredgecolor="black",
                ecolor="#404040",
                capsize=3,
                label=model,
            )
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(0.5, color="#8c8c8c", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axis.set(
            ylabel="difference of the distance (%)", title=f"against {against}: lower is better"
        )
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # hides no interval


def plot_seeds(plt, summary):
    """Relative gains of every training seed, in the selection's features and in the mean of the
    judges that no selection saw."""
    rows = [row for row in summary["over_seeds"] if row["model"] != "collapsed"]
    figure, axis = plt.subplots(figsize=(7, 1 + 0.45 * len(rows)), layout="constrained")
    sides = (("own_relative", "own features", "o", -0.12), ("relative", "other judges", "^", 0.12))
    for key, label, marker, shift_y in sides:
        colour = STYLES["global" if key == "own_relative" else "blockwise"]["color"]
        for i, row in enumerate(rows):
            x = 100 * np.array(row[key])
            axis.plot(x, np.full(len(x), i + shift_y), marker, color=colour, alpha=0.6)
            if len(x):
                axis.plot(x.mean(), i + shift_y, "|", color="black", markersize=14)
        axis.plot([], [], marker, color=colour, label=label)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(
        range(len(rows)),
        [f"{row['model']} against {row['against']}, {row['kimg']:g} kimg" for row in rows],
    )
    axis.invert_yaxis()
    axis.set(xlabel="difference of the distance (%)")
    figure.suptitle("one point a training seed, bar: their mean; lower is better")
    axis.legend(fontsize=8)


DPI = 150


def sample_panel(images, most=8, gap=2, width=400):
    """uint8 [N, C, H, W] -> uint8 [height, width, 3]: at most 8 x 8 of them, whole pixels enlarged,
    white gaps."""
    images = images[: most * most].expand(-1, 3, -1, -1)
    columns = min(most, max(2, 800 // images.shape[3]), math.isqrt(len(images)))
    zoom = max(1, width // (columns * images.shape[3]))
    images = images[: columns * columns].repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    framed = F.pad(images, [gap, gap, gap, gap], value=255)
    rows = [torch.cat(list(row), 2) for row in framed.split(columns)]
    return torch.cat(rows, 1).permute(1, 2, 0).numpy()


def plot_samples(plt, data, title_height=56, margin=12):
    """One image grid per model, all from the same noise, drawn pixel by pixel."""
    entry, pictures = data
    panels = {name: sample_panel(images) for name, images in pictures.items()}
    height = max(panel.shape[0] for panel in panels.values()) + title_height + margin
    width = sum(panel.shape[1] + margin for panel in panels.values()) + margin
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    x = margin
    for name, panel in panels.items():
        figure.figimage(panel, x, margin, origin="upper")
        result = entry["final"][name]
        text = f"{name}: {result['fd']:.4g}\nw = {weights_title(result['w'])}"
        figure.text(x / width, 1 - 8 / height, text, fontsize=8, va="top")
        x += panel.shape[1] + margin


def plot_report(figures, out):
    """figures: {file name: (function, data)}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, (plot, data) in figures.items():
        plot(plt, data)
        write_atomically(out / name, partial(plt.savefig, dpi=DPI))
        plt.close()


# ==================== 11. a model of one's own: --model FILE.py
class FileModel:
    """The functions of a Python file behind the seam; adapters/flow_glyphs.py is such a file."""

    NEEDED = ("SHAPE", "CLASSES", "load", "sample")
    FUNCTIONS = ("load", "sample", "loss", "create", "encode", "block", "layer", "save", "features")

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"--model {path} does not exist, or is no file")
        known = set(sys.modules)
        self.file = self.import_file(self.path)
        self.check_names()
        self.content = self.hash_content(set(sys.modules) - known)
        self.encodes = hasattr(self.file, "encode")

    @staticmethod
    def import_file(path, option="--model"):
        spec = importlib.util.spec_from_file_location(f"neon_model_{path.stem}", path.resolve())
        if spec is None:
            raise UserError(f"{option} {path} is no Python file: its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickle look their module up
        sys.path.insert(0, str(path.resolve().parent))  # for modules beside it
        before = torch_settings()
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{option} {path} cannot be imported: {where_in(path, error)}"
            ) from error
        refuse_changed_settings(before, f"{option} {path}, when it is imported,")
        return module

    def check_names(self):
        missing = [name for name in self.NEEDED if not hasattr(self.file, name)]
        if missing:
            raise UserError(f"--model {self.path} lacks {', '.join(missing)}")
        for name in self.FUNCTIONS:
            if hasattr(self.file, name) and not callable(getattr(self.file, name)):
                raise UserError(f"--model {self.path}: {name} must be a function")
        shape, classes = self.file.SHAPE, self.file.CLASSES
        if (
            not isinstance(shape, (tuple, list))
            or not shape
            or not all(type(n) is int and n > 0 for n in shape)
        ):
            raise UserError(
                f"--model {self.path}: SHAPE must be a tuple of positive integers, "
                f"not {printable(repr(shape))}"
            )
        if type(classes) is not int or classes < 0:
            raise UserError(
                f"--model {self.path}: CLASSES must be an integer from 0, "
                f"not {printable(repr(classes))}"
            )

    def hash_content(self, modules):
        """Of the file, and of the modules beside it that it imports; not of their place."""
        folder = self.path.resolve().parent
        beside = {}
        for name in modules:
            source = Path(getattr(sys.modules[name], "__file__", None) or "/")
            installed = "site-packages" in source.parts
            if source.suffix == ".py" and folder in source.resolve().parents and not installed:
                beside[name] = file_hash(source)
        beside.pop(f"neon_model_{self.path.stem}", None)
        return key_of(file_hash(self.path), beside)

    @property
    def identity(self):
        """Also of the whole base file or folder (a decoder may lie beside the network), and of the
        networks that the file holds itself."""
        return key_of(self.content, self.base_content, self.held)

    training_identity = identity
    base_content = ""
    held: dict = {}

    def call(self, name, *args):
        """A function of the file; its errors name it and the line."""
        before = torch_settings()
        try:
            result = getattr(self.file, name)(*args)
        except (UserError, Diverged, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{self.path}: {name}() failed: {where_in(self.path, error)}"
            ) from error
        refuse_changed_settings(before, f"{self.path}: {name}()")
        return result

    def fetch(self, source, what):
        return fetch(source, what)

    def load(self, path):
        self.base_content = content_hash(Path(path))
        return self.read(path)

    def read(self, path):
        """load(), twice for a network of ordinary size: ranks and later runs load it again."""
        net = self.checked_network(self.call("load", path), "load")
        if sum(p.numel() for p in net.parameters()) < 2e8:
            again = self.checked_network(self.call("load", path), "load")
            if weights_hash(again) != weights_hash(net):
                raise UserError(
                    f"{self.path}: load() gives other weights every time: does {path} lack some?"
                )
        return net

    def checked_network(self, net, function):
        """A network that can be copied, moved and extrapolated, in eval mode on the CPU."""
        net = getattr(net, "_orig_mod", net)  # of torch.compile, which renames all parameters
        says = f"{self.path}: {function}() must give"
        if not isinstance(net, nn.Module):
            raise UserError(f"{says} a torch.nn.Module, not {type(net).__name__}")
        if isinstance(net, torch.jit.ScriptModule):
            raise UserError(f"{says} a torch.nn.Module in Python, not a TorchScript module")

        parameters = dict(net.named_parameters())
        if not parameters:
            raise UserError(f"{says} a network with parameters, {type(net).__name__} has none")
        for name, parameter in parameters.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise UserError(f"{says} a complete network, {name} is lazy: call it once before")
            if parameter.is_meta:
                raise UserError(f"{says} weights, {name} is on the meta device")
            moves = name in movable_parameters(net)
            if moves and parameter.dtype not in (torch.float32, torch.float64):
                kind = str(parameter.dtype).removeprefix("torch.")
                raise UserError(f"{says} float32 parameters, {name} is {kind}")
            if moves and (parameter.is_sparse or parameter.layout != torch.strided):
                raise UserError(f"{says} dense parameters, {name} is sparse")
            if not parameter.isfinite().all():
                raise UserError(f"{says} finite weights, {name} is not")
        try:
            copy.deepcopy(net)
        except Exception as error:
            raise UserError(
                f"{says} a network that can be copied: {where_in(self.path, error)}"
            ) from error
        return net.cpu().eval()

    def load_like(self, base, path):
        path = Path(path)
        with reading(f"network {path} is refused"):
            tensors = own_snapshot(path)
        if tensors is None:
            return self.read(path)
        net = copy.deepcopy(base).cpu()
        state = self.tensors_of(net)
        for name in [*state, *tensors]:
            ours, theirs = (
                tuple(side[name].shape) if name in side else None for side in (state, tensors)
            )
            if ours != theirs:
                raise UserError(f"{path}: {name} has shape {theirs}, the base's is {ours}")
            if not tensors[name].isfinite().all():
                raise UserError(f"{path}: {name} has values that are not finite")
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[name])
        return net.eval()

    @staticmethod
    def tensors_of(net):
        """Parameters, tied ones once, and buffers that belong to the state."""
        tensors = dict(net.named_parameters())
        every = dict(net.named_parameters(remove_duplicate=False))
        for name, tensor in net.state_dict(keep_vars=True).items():
            if name not in every and isinstance(tensor, torch.Tensor):
                tensors[name] = tensor
        return tensors

    def create(self, images, labels, c):
        if not hasattr(self.file, "create"):
            raise UserError(
                f"--train-base needs a function create() in {self.path}, or give --base"
            )
        self.needs_loss("--train-base")
        classes = self.file.CLASSES
        if classes and (labels is None or int(labels.max()) >= classes):
            theirs = "has none" if labels is None else f"has labels up to {int(labels.max())}"
            raise UserError(f"{self.path}: CLASSES is {classes}, but the data {theirs}")

        # The weights are in the key of the training: a run that goes on must make them again.
        nets = []
        for _ in range(2):
            torch.manual_seed(c.seed)
            nets.append(self.checked_network(self.call("create"), "create"))
        if weights_hash(nets[0]) != weights_hash(nets[1]):
            raise UserError(
                f"{self.path}: create() gives other weights for the same torch.manual_seed(): "
                "random numbers must come from torch's global generator"
            )
        return nets[0]

    def trainable(self, base, c):
        self.needs_loss("self-training")
        return copy.deepcopy(base)

    def needs_loss(self, what):
        if not hasattr(self.file, "loss"):
            raise UserError(f"{what} needs a function loss() in {self.path}, or give --aux")

    def noise_shape(self, net):
        return tuple(self.file.SHAPE)

    def classes(self, net):
        return self.file.CLASSES

    def image_shape(self, net):
        return self.example.shape[1:]

    def sample(self, net, noise, labels, steps):
        return self.call("sample", net, noise, labels, steps)

    def encode(self, images):
        if self.encodes:
            return self.call("encode", images)
        return images.float() / 127.5 - 1

    def loss(self, net, x, labels):
        return self.call("loss", net, x, labels if self.file.CLASSES else None)

    def block(self, name, net, partition):
        if partition == "structural" or not hasattr(self.file, "block"):
            advice = "use --partition layers or a JSON file {glob: block}"
            if partition == "paper":
                advice = f"write one, or {advice}"
            else:
                advice = f"is for EDM's networks: {advice}"
            raise UserError(f"--partition {partition} needs block() in {self.path}: {advice}")
        return self.named("block", name)

    def layer(self, name):
        """layer(), or the module that holds the parameter, at most three names deep."""
        if hasattr(self.file, "layer"):
            return self.named("layer", name)
        module, _, _ = name.partition(".parametrizations.")  # weight_norm's original0, original1
        parts = module.split(".") if module != name else name.split(".")[:-1]
        return ".".join(parts[:3]) or name

    def named(self, function, name):
        found = self.call(function, name)
        if not isinstance(found, str) or not found or not found.isprintable():
            raise UserError(
                f"{self.path}: {function}({name!r}) must give a string on one line, "
                f"not {printable(repr(found))}"
            )
        return found

    def save(self, net, path, recipe):
        tensors = {}
        for name, tensor in self.tensors_of(net).items():
            # A copy: safetensors writes no tensors that share memory.
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        content = safetensors.torch.save(tensors, {"config": json.dumps({"recipe": recipe})})

        def write(part):
            part.write_bytes(content)

        write_atomically(path, write)

    def export(self, net, path, recipe):
        if not hasattr(self.file, "save"):
            self.save(net, path.with_suffix(".safetensors"), recipe)
            return
        plain = copy.deepcopy(net).cpu()
        if next(net.parameters()).is_cuda:
            vars(plain).pop("forward", None)  # the compiled one
        self.call("save", plain, path)

    def own_features(self, base):
        return FileFeatures(self, self.example) if hasattr(self.file, "features") else None

    def start_check(self, base, c, trained):
        """What the pipeline relies on, tried on four images before anything long begins."""
        with torch.random.fork_rng():
            self.example = StartCheck(self, base, c, trained).run()
        for name, value in vars(self.file).items():
            if isinstance(value, nn.Module):
                self.held = {**self.held, name: weights_hash(value)}


class DiffusersModel(FileModel):
    """A pipeline of Hugging Face diffusers as --base, through adapters/diffusers_pipeline.py."""

    def __init__(self, c):
        adapter = Path(__file__).resolve().parent / "adapters/diffusers_pipeline.py"
        if not adapter.is_file():
            raise UserError(f"--base {c.base} is a pipeline of diffusers, which needs {adapter}")
        self.adapter = self.import_file(adapter, "the adapter")
        self.path = Path(c.base)
        try:
            self.path = Path(self.adapter.resolve(c.base))
            self.file = self.adapter.DiffusersPipeline(self.path, c.guidance)
            self.file.to(c.device)
            self.content = key_of(file_hash(adapter), self.file.identity())
        except (ValueError, OSError) as error:
            raise UserError(self.one_line(f"--base {printable(c.base)}", error)) from error
        self.encodes = self.file.vae is not None

    def fetch(self, source, what):
        if source != str(self.path) and not Path(source).exists():
            try:
                return Path(self.adapter.resolve(source))
            except (ValueError, OSError) as error:
                raise UserError(f"{what} {source}: {printable(error, 400)}") from error
        return Path(source)

    def call(self, name, *args):
        """The adapter says in words of its own what is wrong with a folder."""
        try:
            return getattr(self.file, name)(*args)
        except (ValueError, OSError) as error:
            raise UserError(self.one_line(self.path, error)) from error

    def one_line(self, place, error):
        """The adapter's text, which mostly begins with the place itself."""
        text = printable(error, 400)
        return text if str(self.path) in text else f"{place}: {text}"

    def load(self, path):
        return self.read(path)

    def read(self, path):
        return self.checked_network(self.call("load", path), "load")

    def export(self, net, path, recipe):
        plain = copy.deepcopy(net).cpu()
        vars(plain).pop("forward", None)  # the compiled one
        self.call("save", plain, path, recipe)


def is_pipeline(source):
    """A folder of diffusers, or a name on its hub."""
    if Path(source).exists():
        return (Path(source) / "model_index.json").is_file()
    return re.fullmatch(r"[\w-]+/[\w.-]+", source) is not None and not source.endswith(NETWORKS)


class StartCheck:
    """Tries the functions of a model file on four seeds; each broken promise is one line."""

    CLOSE = 4e-3  # of images in [-1, 1]: half a grey level, more than rounding in other batches
    SAME = 1e-4  # for the same computation once more

    def __init__(self, model, base, c, trained):
        self.model, self.base, self.c, self.trained = model, base, c, trained
        self.path = model.path
        self.net = copy.deepcopy(base).to(c.device).eval().requires_grad_(False)
        self.pointers = {name: p.data_ptr() for name, p in self.net.named_parameters()}
        shape, classes = model.noise_shape(base), model.classes(base)
        self.noise, self.labels = draw_noise(shape, classes, range(4), c.device)

    def run(self):
        """-> four images, uint8 [4, C, H, W]."""
        with torch.no_grad(), network_calls(self.net, "fp32"):
            images = self.sample(slice(0, 4))
            self.check_repetition(images)
            if self.trained:
                self.check_range(images)
            self.check_threads(images)
        self.example = to_pixels(images).to(torch.uint8)

        learning = set(movable_parameters(self.base))
        if not self.c.aux:
            learning = self.check_loss()
        self.check_weights(learning)
        self.check_precision()
        if hasattr(self.model.file, "features"):
            FileFeatures(self.model, self.example)
        if self.c.search == "gradient":
            self.check_gradient()
        if hasattr(self.model.file, "save") and self.trained:
            self.check_save()
        return self.example

    def wrong(self, text):
        return UserError(f"{self.path}: {text}")

    def sample(self, part, net=None, turned=False):
        """Checked images of some of the seeds; turned: their noise in the other order."""
        noise = self.noise[part].flip(0) if turned else self.noise[part].clone()
        labels = None if self.labels is None else self.labels[part].clone()
        images = self.model.sample(self.net if net is None else net, noise, labels, self.c.steps)
        if not isinstance(images, torch.Tensor) or not images.is_floating_point():
            kind = getattr(images, "dtype", type(images).__name__)
            raise self.wrong(f"sample() must give a floating-point tensor, not {kind}")
        shape = list(images.shape)
        if len(shape) != 4 or shape[0] != len(noise) or shape[1] not in (1, 3):
            raise self.wrong(f"sample() must give images [{len(noise)}, 1 or 3, H, W], not {shape}")
        if not images.isfinite().all():
            raise self.wrong("sample() gave images that are not finite: are the weights sound?")
        return images

    def differ(self, images, others, tolerance):
        scale = max(1.0, float(images.abs().max()))
        return float((images - others).abs().max()) > tolerance * scale

    def check_repetition(self, images):
        """Common random numbers: a seed alone decides its image."""
        if self.differ(images, self.sample(slice(0, 4)), self.SAME):
            raise self.wrong("sample() gave other images for the same noise: hidden randomness?")
        if self.differ(images[1:3], self.sample(slice(1, 3)), self.CLOSE):
            raise self.wrong("sample() gave other images for the same noise in another batch")
        if self.trained and torch.equal(images, self.sample(slice(0, 4), turned=True)):
            raise self.wrong("sample() gave the same images for other noise: is it used?")

        # It reads the network: weights that it casts or moves are no longer those of the pipeline.
        before = dict(self.base.named_parameters())
        for name, parameter in self.net.named_parameters():
            moved = parameter.data_ptr() != self.pointers[name]
            if moved or not torch.equal(parameter.cpu(), before[name].cpu()):
                raise self.wrong(f"sample() changes the network, first {name}")

    def check_range(self, images):
        outside = float((images.abs() > 1.1).float().mean())
        if outside > 0.5 or images.abs().max() > 10:
            raise self.wrong(
                "sample() must give images in [-1, 1], these reach from "
                f"{images.min():.3g} to {images.max():.3g}"
            )

    def check_threads(self, images):
        """On a CPU several batches go through one network at once."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if Processes(self.c.device, 0, world).workers() == 1:
            return

        def one(i):
            with torch.no_grad():  # per thread
                return self.sample(slice(i % 4, i % 4 + 1))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(one, range(8)))
        if self.differ(images.repeat(2, 1, 1, 1), torch.cat(parts), self.CLOSE):
            raise self.wrong(
                "sample() mixes batches that run at the same time: keep nothing in the network or "
                f"in globals, or use --threads {os.cpu_count()}"
            )

    def check_loss(self):
        """Shape, randomness and gradient of loss() -> names of the parameters that it trains."""
        model, c = self.model, self.c
        net = model.trainable(self.base, c).to(c.device).train()
        for parameter in movable_parameters(net).values():
            parameter.requires_grad_(True)
        with torch.no_grad():
            x = model.encode(self.example)
        if not isinstance(x, torch.Tensor) or len(x) != 4:
            raise self.wrong("encode() must give a tensor, one row for each image")

        losses = []
        for each in (copy.deepcopy(net), net):
            torch.manual_seed(0)
            with torch.enable_grad(), network_calls(each, c.train_precision):
                losses.append(model.loss(each, x, self.labels))
        first, loss = losses
        if not isinstance(loss, torch.Tensor) or loss.shape != (4,):
            shape = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise self.wrong(f"loss() must give one number a sample, [4], not {shape}")
        if not loss.isfinite().all():
            raise self.wrong("loss() gave numbers that are not finite")
        if ((first - loss).abs() > 1e-3 * (1 + loss.abs())).any():
            raise self.wrong(
                "loss() gave other numbers for the same torch.manual_seed(): random numbers must "
                "come from torch's global generator"
            )

        parameters = movable_parameters(net)
        grads = self.gradients(loss.sum(), parameters, "loss()")
        learning = set()
        for (name, _), grad in zip(parameters.items(), grads, strict=True):
            if grad is not None and not grad.isfinite().all():
                raise self.wrong(f"loss() has a gradient that is not finite, first in {name}")
            if grad is not None and grad.any():
                learning.add(name)
        if not learning:
            raise self.wrong("loss() does not depend on the network's weights")
        return learning

    def gradients(self, scalar, parameters, function, weights=None):
        """Derivatives, None for parameters that are not used."""
        if not scalar.requires_grad:
            raise self.wrong(
                f"no gradient comes through {function}: a torch.no_grad(), detach() or .data in it?"
            )
        try:
            return torch.autograd.grad(
                scalar, list(parameters.values()), weights, allow_unused=True
            )
        except RuntimeError as error:
            raise self.wrong(
                f"the gradient through {function} fails: {where_in(self.path, error)}"
            ) from error

    def moved(self, net, amount=0.05):
        """A small random step of the network's weights, the same every time -> {name: step}."""
        generator = torch.Generator().manual_seed(0)
        steps = {}
        for name, parameter in movable_parameters(net, like=self.base).items():
            size = float(parameter.detach().square().mean().sqrt()) + 1e-3
            step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            steps[name] = (amount * size * step).to(parameter.device)
        return steps

    @staticmethod
    def add(net, steps, factor=1.0):
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name in steps:
                    parameter.add_(steps[name], alpha=factor)

    @torch.no_grad()
    def check_weights(self, learning):
        """The images follow the weights, as they are now, of the network that is passed."""
        steps = {name: step for name, step in self.moved(self.net).items() if name in learning}
        fresh = copy.deepcopy(self.base).to(self.c.device).eval().requires_grad_(False)
        self.add(fresh, steps)
        expected = self.sample(slice(0, 2), fresh)
        before = self.sample(slice(0, 2))
        self.add(self.net, steps)
        found = self.sample(slice(0, 2))
        self.add(self.net, steps, -1.0)
        if self.differ(expected, found, self.SAME):
            raise self.wrong("sample() keeps something of earlier weights of the network")
        if torch.equal(found, before):
            what = "the network's weights" if self.c.aux else "the weights that loss() trains"
            raise self.wrong(f"sample() does not depend on {what}")

    @torch.no_grad()
    def check_precision(self):
        """Half precision wraps the network's own call, so there must be one."""
        calls = []
        forward = self.net.forward

        def counted(*args, **kwargs):
            calls.append(True)
            return forward(*args, **kwargs)

        for precision in {self.c.precision, self.c.confirm_precision} & {"bf16", "fp16"}:
            self.net.forward = counted
            with network_calls(self.net, precision):
                self.sample(slice(0, 2))
            self.net.forward = forward
            if not calls:
                raise self.wrong(
                    f"--precision {precision} wraps net(...), but sample() calls only parts of the "
                    "network: use fp32 or tf32"
                )

    def check_gradient(self):
        """The gradient of the search is the derivative of the images: along a random step of the
        weights, differences of the images and the pulled-back derivative agree."""
        file = self.model.file
        if getattr(file, "differentiable", True) is False:
            why_not = getattr(file, "why_not", "this model cannot be differentiated")
            raise UserError(f"--search gradient: {why_not}")
        net, two = self.net, slice(0, 2)
        amount = 1e-3
        steps = self.moved(net, amount)
        with torch.no_grad():
            self.add(net, steps)
            ahead = self.sample(two)
            self.add(net, steps, -2.0)
            behind = self.sample(two)
            self.add(net, steps)
        difference = (ahead - behind) / 2

        parameters = movable_parameters(net, like=self.base)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad(), network_calls(net, "fp32", checkpointed=True):
            images = self.sample(two)
            grads = self.gradients(images, parameters, "sample()", difference)
        net.requires_grad_(False)
        along = 0.0
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                along += float((grad.double() * steps[name]).sum())
        size = float(difference.double().square().sum())
        if not 0.7 * size < along < 1.4 * size:
            raise self.wrong(
                "the gradient through sample() is not its derivative "
                f"({along / max(size, 1e-300):.2f} of it): a detach(), rounding or .data in it?"
            )

        if hasattr(file, "features"):
            features = FileFeatures(self.model, self.example)
            check_differentiable(features, to_pixels(images), f"features() of {self.path}")

    def check_save(self):
        """save() fails now, or not after hours."""
        if sum(p.numel() for p in self.base.parameters()) > 1e8:
            return
        with tempfile.TemporaryDirectory(prefix=".part-", dir=self.c.out) as folder:
            self.model.export(self.base, Path(folder) / "network", {})
            if not any(Path(folder).iterdir()):
                raise self.wrong("save(net, path) wrote nothing at path, or beside it")


def torch_settings():
    """Settings of torch that a model file must leave as they are."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradient mode": torch.is_grad_enabled(),
        "number of threads": torch.get_num_threads(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
    }


def refuse_changed_settings(before, who):
    for name, value in torch_settings().items():
        if value != before[name]:
            raise UserError(f"{who} changes torch's {name} from {before[name]} to {value}")


def content_hash(path):
    """Hash of a file, or of all files of a folder and their names in it."""
    if not path.is_dir():
        return file_hash(path)
    files = sorted(part for part in path.rglob("*") if part.is_file())
    return key_of([(str(part.relative_to(path)), file_hash(part)) for part in files])


def own_snapshot(path):
    """{name: tensor} of a .safetensors that save() of this program has written; else None."""
    if path.is_dir() or not is_safetensors(path):
        return None
    with safetensors.safe_open(path, "pt") as file:
        if "recipe" not in json.loads((file.metadata() or {}).get("config", "{}")):
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def where_in(path, error):
    """Kind and text of an error, and the line of this file where it arose."""
    path = str(Path(path).resolve())
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == path:
            lines.append(frame.lineno)
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    place = f"line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {printable(error)}"


# ==================== 12. EDM's networks: sampler, loss, U-Net, augmentation
class EdmModel:
    """EDM's networks behind the seam: EDMPrecond around DDPM++ or NCSN++, its sampler, loss and
    augmentation."""

    identity = "edm, Heun, 1"
    encodes = False

    def __init__(self, preset, c):
        self.preset, self.augment_p = preset, c.augment
        self.training_identity = f"edm, augment {c.augment}, dropout {c.dropout}, 1"

    def fetch(self, source, what):
        """What an address answers with is read before it is kept."""
        return fetch(source, what, check=load_network)

    def load(self, path):
        return load_network(path)

    def load_like(self, base, path):
        return load_network(path)

    def create(self, images, labels, c):
        """The preset's network, in the size of the images."""
        if labels is None:
            raise UserError(
                f"{c.data} has no labels, but the network is conditional: add dataset.json"
            )
        channels, height, width = images.shape[1:]
        options = dict(self.preset.network)
        if height != width or width % 2 ** (len(options["channel_mult"]) - 1):
            raise UserError(
                f"{c.data}: {height} x {width} images; the network needs squares it can halve twice"
            )
        options |= {"dropout": c.dropout, "img_resolution": width, "img_channels": channels}
        options["label_dim"] = int(labels.max()) + 1
        return EDMPrecond(**options)

    def trainable(self, base, c):
        net = EDMPrecond(**dict(base.config, dropout=c.dropout))
        net.load_state_dict(base.state_dict())
        return net

    def noise_shape(self, net):
        return (net.img_channels, net.img_resolution, net.img_resolution)

    def image_shape(self, net):
        return self.noise_shape(net)

    def classes(self, net):
        return net.label_dim

    def sample(self, net, noise, labels, steps):
        return edm_sampler(net, noise, one_hot(net, labels), steps)

    def encode(self, images):
        return images.float() / 127.5 - 1

    def loss(self, net, x, labels):
        return edm_loss(net, x, one_hot(net, labels), self.augment_p)

    def block(self, name, net, partition):
        return edm_block(name, net, partition)

    def layer(self, name):
        return edm_layer(name)

    def save(self, net, path, recipe):
        save_network(net, path, recipe)

    def export(self, net, path, recipe):
        save_network(net, path.with_suffix(".safetensors"), recipe)

    def own_features(self, base):
        return None

    def start_check(self, base, c, trained):
        """Nothing to try: the tests have."""


def one_hot(net, labels):
    """int64 labels [N] -> float32 [N, K]; None for an unconditional network."""
    return F.one_hot(labels, net.label_dim).float() if net.label_dim else None


def edm_layer(name):
    """model.enc.8x8_block0.conv0.weight -> enc.8x8_block0; all embeddings are one layer, map."""
    side, layer = name.split(".")[1:3]
    return "map" if side.startswith("map") else f"{side}.{layer}"


def edm_block(name, net, partition):
    """paper: lowest resolution and mapping are mid, else enc or dec; structural: the decoder's
    blocks after the bottleneck are dec."""
    side, layer = name.split(".")[1:3]
    if side not in ("enc", "dec"):
        return "mid"
    lowest = min(int(key.split("x")[0]) for key in net.model.enc)
    if not layer.startswith(f"{lowest}x{lowest}_"):
        return side
    after_bottleneck = side == "dec" and "_block" in layer
    return "dec" if partition == "structural" and after_bottleneck else "mid"


# -------------------- sampler and loss
def sigma_steps(net, num_steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's time steps [num_steps + 1] float64, ending in 0 (equation 5)."""
    low, high = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    steps = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return F.pad(net.round_sigma(steps), (0, 1))


def edm_sampler(
    net, noise, class_labels=None, num_steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0
):
    """Heun's second-order deterministic sampler (EDM, algorithm 1).
    noise [N, C, H, W], one-hot labels [N, K] (or None) -> images in [-1, 1] float64."""
    t = sigma_steps(net, num_steps, sigma_min, sigma_max, rho).to(noise.device)
    x = noise.double() * t[0]
    for i in range(num_steps):
        # Euler step.
        denoised = net(x.float(), t[i], class_labels).double()
        d = (x - denoised) / t[i]
        x_next = x + (t[i + 1] - t[i]) * d

        # Second-order correction, except at the end, where the slope is undefined.
        if i < num_steps - 1:
            denoised = net(x_next.float(), t[i + 1], class_labels).double()
            d_next = (x_next - denoised) / t[i + 1]
            x_next = x + (t[i + 1] - t[i]) * ((d + d_next) / 2)
        x = x_next
    return x


def edm_loss(net, images, labels, augment_p, P_mean=-1.2, P_std=1.2, sigma_data=0.5):
    """EDM's loss [N, C, H, W]: lambda(sigma) (D(y + n; sigma) - y)^2, ln sigma ~ N(P_mean,
    P_std^2)."""
    sigma = (torch.randn(len(images), 1, 1, 1, device=images.device) * P_std + P_mean).exp()
    augment_labels = None
    if augment_p:
        images, augment_labels = augment(images, augment_p)
    noise = torch.randn_like(images) * sigma
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * (net(images + noise, sigma, labels, augment_labels) - images).square()


# -------------------- network: DDPM++ and NCSN++, names as in EDM
class Conv(nn.Conv2d):
    """2-D convolution after resampling by a small filter (fused: before it, as NCSN++'s residual
    path)."""

    def __init__(
        self, c_in, c_out, kernel, up=False, down=False, resample_filter=(1, 1), fused=False
    ):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)
        self.up, self.fused = up, fused
        self.simple = list(resample_filter) == [1, 1]
        f = torch.as_tensor(resample_filter, dtype=torch.float32)
        outer = (f[:, None] * f / f.sum() ** 2)[None, None]  # [1, 1, k, k]
        self.register_buffer("resample_filter", outer if up or down else None)

    def forward(self, x):
        if self.resample_filter is None:
            return super().forward(x)
        if self.simple:
            x = F.interpolate(x, scale_factor=2) if self.up else F.avg_pool2d(x, 2)
            return super().forward(x)

        f = self.resample_filter.to(x.dtype)
        f_pad = (f.shape[-1] - 1) // 2
        if self.fused:
            x = F.conv2d(x, self.weight, padding=self.padding[0] + f_pad)
            return F.conv2d(
                x, f.expand(x.shape[1], 1, -1, -1), self.bias, stride=2, groups=x.shape[1]
            )
        if self.up:
            f = (f * 4).expand(x.shape[1], 1, -1, -1)
            x = F.conv_transpose2d(x, f, stride=2, padding=f_pad, groups=x.shape[1])
        else:
            f = f.expand(x.shape[1], 1, -1, -1)
            x = F.conv2d(x, f, stride=2, padding=f_pad, groups=x.shape[1])
        return super().forward(x)


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class UNetBlock(nn.Module):
    """Residual block with noise embedding, optional resampling and single-head self-attention."""

    def __init__(
        self, c_in, c_out, c_emb, dropout, resample_filter, up=False, down=False, attention=False
    ):
        super().__init__()
        self.dropout = dropout
        resample = {"up": up, "down": down, "resample_filter": resample_filter}
        self.norm0 = group_norm(c_in)
        self.conv0 = Conv(c_in, c_out, 3, **resample)
        self.affine = nn.Linear(c_emb, c_out)
        self.norm1 = group_norm(c_out)
        self.conv1 = Conv(c_out, c_out, 3)
        self.skip = Conv(c_in, c_out, 1, **resample) if c_in != c_out or up or down else None
        self.norm2 = group_norm(c_out) if attention else None
        if attention:
            self.qkv = Conv(c_out, 3 * c_out, 1)
            self.proj = Conv(c_out, c_out, 1)

    def forward(self, x, emb):
        inplace = not torch.is_grad_enabled()
        h = self.conv0(F.silu(self.norm0(x), inplace))
        h = h.add_(self.affine(emb)[:, :, None, None])
        h = F.dropout(F.silu(self.norm1(h), inplace), self.dropout, self.training)
        h = self.conv1(h)
        x = h.add_(x if self.skip is None else self.skip(x)).mul_(0.5**0.5)
        if self.norm2 is not None:
            x = self.attend(x)
        return x

    def attend(self, x):
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(
            n, 1, c, 3, height * width
        )  # channels are interleaved
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(3))  # [N, 1, HW, C]
        a = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        # Contiguous, or dropout would draw its mask in another order than EDM's.
        a = self.proj(a.contiguous().view(x.shape))
        return a.add_(x).mul_(0.5**0.5)


class SongUNet(nn.Module):
    """DDPM++ (positional embedding, standard encoder) and NCSN++ (Fourier embedding, residual
    encoder)."""

    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        channel_mult_emb=4,
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.10,
        label_dropout=0,
        embedding_type="positional",
        channel_mult_noise=1,
        encoder_type="standard",
        decoder_type="standard",
        resample_filter=(1, 1),
    ):
        super().__init__()
        if encoder_type not in ("standard", "residual") or decoder_type != "standard":
            raise UserError(
                f"encoder {encoder_type!r} with decoder {decoder_type!r} is not supported"
            )
        self.label_dropout = label_dropout
        c_noise = model_channels * channel_mult_noise
        c_emb = model_channels * channel_mult_emb

        # Embeddings of noise level, label and augmentation.
        self.noise = c_noise
        self.map_noise = None
        if embedding_type == "fourier":
            self.map_noise = nn.Module()
            self.map_noise.register_buffer("freqs", torch.randn(c_noise // 2) * 16)
        self.map_label = nn.Linear(label_dim, c_noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, c_noise, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(c_noise, c_emb)
        self.map_layer1 = nn.Linear(c_emb, c_emb)

        block = partial(UNetBlock, c_emb=c_emb, dropout=dropout, resample_filter=resample_filter)
        levels = []  # (name of the resolution, attention there, channels)
        for level, multiplier in enumerate(channel_mult):
            size = img_resolution >> level
            levels.append((f"{size}x{size}", size in attn_resolutions, model_channels * multiplier))

        # Encoder.
        self.enc = nn.ModuleDict()
        skips = []  # channels of every output that the decoder will see
        c_out = c_aux = in_channels
        for level, (resolution, attention, width) in enumerate(levels):
            if level == 0:
                self.enc[f"{resolution}_conv"] = Conv(c_out, model_channels, 3)
                c_out = model_channels
            else:
                self.enc[f"{resolution}_down"] = block(c_out, c_out, down=True)
                if encoder_type == "residual":
                    self.enc[f"{resolution}_aux_residual"] = Conv(
                        c_aux, c_out, 3, down=True, fused=True, resample_filter=resample_filter
                    )
                    c_aux = c_out
            skips.append(c_out)
            for i in range(num_blocks):
                self.enc[f"{resolution}_block{i}"] = block(c_out, width, attention=attention)
                c_out = width
                skips.append(c_out)

        # Decoder; attention in the last block of a level, and at the bottom always.
        self.dec = nn.ModuleDict()
        for level, (resolution, attention, width) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec[f"{resolution}_in0"] = block(c_out, c_out, attention=True)
                self.dec[f"{resolution}_in1"] = block(c_out, c_out)
            else:
                self.dec[f"{resolution}_up"] = block(c_out, c_out, up=True)
            for i in range(num_blocks + 1):
                last = i == num_blocks
                c_in = c_out + skips.pop()
                self.dec[f"{resolution}_block{i}"] = block(
                    c_in, width, attention=attention and last
                )
                c_out = width
        self.dec[f"{resolution}_aux_norm"] = group_norm(c_out)
        self.dec[f"{resolution}_aux_conv"] = Conv(c_out, out_channels, 3)
        self.initialise()

    def initialise(self):
        """Xavier-uniform weights, zero biases, almost zero where a residual branch or the network
        ends."""
        for name, p in self.named_parameters():
            layer = name.split(".")[-2]
            if p.ndim > 1:
                gain = 1.0
                if layer in ("conv1", "proj") or layer.endswith("aux_conv"):
                    gain = 1e-5
                elif layer == "qkv":
                    gain = 0.2**0.5
                nn.init.xavier_uniform_(p, gain)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def embed(self, c_noise, labels, augment_labels):
        """The embedding [N, c_emb] that every block adds."""
        if self.map_noise is None:
            i = torch.arange(self.noise // 2, dtype=torch.float32, device=c_noise.device)
            frequency = (1 / 10000) ** (i / (self.noise // 2 - 1))
        else:
            frequency = 2 * np.pi * self.map_noise.freqs
        t = c_noise.outer(frequency.to(c_noise.dtype))
        e = torch.cat([t.sin(), t.cos()], 1).to(self.map_layer0.weight.dtype)

        if self.map_label is not None:
            if self.training and self.label_dropout:
                kept = torch.rand(len(labels), 1, device=labels.device) >= self.label_dropout
                labels = labels * kept
            e = e + self.map_label(labels * labels.shape[1] ** 0.5)
        if self.map_augment is not None and augment_labels is not None:
            e = e + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(e))))

    def forward(self, x, c_noise, labels, augment_labels=None):
        emb = self.embed(c_noise, labels, augment_labels)
        aux = x
        skips = []
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) / 2**0.5
                continue
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if name.endswith("aux_norm"):
                x = F.silu(layer(x))
            elif name.endswith("aux_conv"):
                x = layer(x)
            elif "_block" in name:
                x = layer(torch.cat([x, skips.pop()], 1), emb)
            else:
                x = layer(x, emb)
        return x


class EDMPrecond(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4), the denoised x [N, C, H, W] (EDM,
    table 1)."""

    def __init__(
        self,
        img_resolution,
        img_channels,
        label_dim=0,
        sigma_min=0,
        sigma_max=math.inf,
        sigma_data=0.5,
        **model,
    ):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = (
            img_resolution,
            img_channels,
            label_dim,
        )
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.model = SongUNet(
            img_resolution, img_channels, img_channels, label_dim=label_dim, **model
        )
        sizes = {
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "label_dim": label_dim,
        }
        self.config = sizes | model

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        x = x.float()
        sigma = torch.as_tensor(sigma, device=x.device).float().reshape(-1, 1, 1, 1)
        labels = None
        if self.label_dim:
            if class_labels is None:
                class_labels = torch.zeros(1, self.label_dim, device=x.device)
            labels = class_labels.float().reshape(-1, self.label_dim)

        total = sigma.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        out = self.model(x / total.sqrt(), sigma.flatten().log() / 4, labels, augment_labels)
        return c_skip * x + c_out * out.float()

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)


# -------------------- augmentation (EDM, appendix F.2): nine labels
SYM6 = [  # low-pass filter of the sym6 wavelet
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
]


def matrix(rows, device, n=1):
    """3 x 3 matrices [N, 3, 3] from the first two rows: six numbers or [N] tensors."""
    entries = []
    for value in (*rows, 0, 0, 1):
        entries.append(torch.as_tensor(value, dtype=torch.float32, device=device).expand(n))
    return torch.stack(entries, -1).view(n, 3, 3)


def scale(x, y, device, n=1):
    return matrix([x, 0, 0, 0, y, 0], device, n)


def rotate(angle, device, n=1):
    return matrix([angle.cos(), -angle.sin(), 0, angle.sin(), angle.cos(), 0], device, n)


def shift(x, y, device, n=1):
    return matrix([1, 0, x, 0, 1, y], device, n)


def draw_affine(n, p, height, width, device):
    """Random inverse maps G [N, 3, 3] (output to input, pixels) and their seven labels [N, 7]."""

    def gate(value, chance):
        return torch.where(torch.rand(n, device=device) < chance, value, 0.0)

    def draw_angle():
        return (torch.rand(n, device=device) * 2 - 1) * np.pi

    # The order of the draws is EDM's.
    zoom = gate(torch.randn(n, device=device), p)
    turn = gate(draw_angle(), p)
    stretch = torch.randn(n, device=device)
    axis = draw_angle()
    stretch = gate(stretch, p)
    axis = gate(axis, 0.5)
    x, y = gate(torch.randn(2, n, device=device), p)

    s, t = torch.exp2(0.2 * zoom), torch.exp2(0.2 * stretch)
    G = scale(1 / s, 1 / s, device, n) @ rotate(turn, device, n)
    G = G @ rotate(-axis, device, n) @ scale(1 / t, t, device, n) @ rotate(axis, device, n)
    G = G @ shift(-x * width / 8, -y * height / 8, device, n)
    labels = [zoom, turn.cos() - 1, turn.sin(), stretch * axis.cos(), stretch * axis.sin(), x, y]
    return G, torch.stack(labels, 1)


def filtered(x, kernel, axis, **options):
    """x [N, C, H, W] correlated with one filter along an axis, channel by channel."""
    weight = kernel.view(1, 1, 1, -1) if axis == 3 else kernel.view(1, 1, -1, 1)
    channels = x.shape[1]
    return F.conv2d(x, weight.expand(channels, 1, -1, -1), groups=channels, **options)


def warp(images, G):
    """images [N, C, H, W] resampled through G, band-limited by sym6 filters at twice the
    resolution."""
    n, c, height, width = images.shape
    device = images.device
    f = torch.tensor(SYM6, device=device)

    # Margins that the maps of the whole batch reach into, filled by reflection.
    cx, cy = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor([[-cx, cx, cx, -cx], [-cy, -cy, cy, cy], [1, 1, 1, 1]], device=device)
    q = (G @ corners)[:, :2]  # [N, 2, 4]
    far = torch.cat([(-q).amax((0, 2)), q.amax((0, 2))])
    far = far + torch.tensor([6 - cx, 6 - cy] * 2, device=device)
    limit = torch.tensor([width - 1, height - 1] * 2, device=device)
    x0, y0, x1, y1 = torch.minimum(far.clamp_min(0), limit).ceil().int().tolist()
    images = F.pad(images, [x0, x1, y0, y1], mode="reflect")

    # Twice the resolution.
    up = images.new_zeros(n, c, images.shape[2] * 2 - 1, images.shape[3] * 2 - 1)
    up[:, :, ::2, ::2] = images
    up = filtered(up, f.flip(0), 3, padding=(0, 6))
    up = filtered(up, f.flip(0), 2, padding=(6, 0))

    # The map in the padded, enlarged and normalised coordinates of grid_sample.
    G = (
        scale(2, 2, device)
        @ shift((x0 - x1) / 2, (y0 - y1) / 2, device)
        @ G
        @ scale(0.5, 0.5, device)
    )
    out_h, out_w = (height + 6) * 2, (width + 6) * 2
    G = scale(2 / up.shape[3], 2 / up.shape[2], device) @ shift(-0.5, -0.5, device) @ G
    G = G @ shift(0.5, 0.5, device) @ scale(out_w / 2, out_h / 2, device)
    grid = F.affine_grid(G[:, :2], [n, c, out_h, out_w], align_corners=False)
    x = F.grid_sample(up, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    # Back to the resolution of the images, without the margin.
    x = filtered(x, f, 3, stride=(1, 2), padding=(0, 5))[:, :, :, 3:-3]
    return filtered(x, f, 2, stride=(2, 1), padding=(5, 0))[:, :, 3:-3]


def augment(images, p):
    """images [N, C, H, W] in [-1, 1] -> augmented images, labels [N, 9]; flips: x half the time, y
    with p."""
    n, device = len(images), images.device
    labels = []
    for axis, chance in ((3, p * 1e8), (2, p)):
        flip = torch.randint(2, [n, 1, 1, 1], device=device)
        flip = torch.where(torch.rand(n, 1, 1, 1, device=device) < chance, flip, 0)
        images = torch.where(flip == 1, images.flip(axis), images)
        labels.append(flip.view(n, 1).float())
    G, rest = draw_affine(n, p, images.shape[2], images.shape[3], device)
    return warp(images, G), torch.cat([*labels, rest], 1)


# ==================== 13. EDM's files: pickles are parsed, never run
# A pickle is a program for Python's unpickler. None runs here: SafeUnpickler walks over its opcodes
# and builds plain data. Safe by construction, whatever the file says:
#   opcodes   those of EDM's and torch's own files (protocols 2 to 5); any other is refused
#   names     those in the tables below; each stands for a function here, nothing is imported
#   time      opcodes are counted; a step costs no more than its operands or bytes of the file
#   memory    storages and text are hardly larger than the file, tensors not larger than it
#   nesting   nothing follows the data's own nesting: no recursion, hash or repr of a container
MOST_OPCODES = 500_000  # EDM's CIFAR-10 network has 72,163 (75,815 in protocol 2)
SPARE_BYTES = 300 << 20  # beyond a file's own size
MOST_NAMES = 20_000  # of tensors and modules; 427 tensors there
MOST_BYTES = 8 << 30  # of a file
MOST_HEADER = 16 << 20  # bytes of a .safetensors' names and options; 45 kB there
MOST_DIMENSION = 1 << 40  # of a tensor, and of its strides and offset
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save's old format begins with it and its version
TORCH_VERSION = 1001


class Refused(ValueError):
    """What is wrong with a file, in words for its owner; reading() adds which file it is."""


class Limits:
    """What a file of `size` bytes may still use: opcodes, bytes of text and storages, tensors."""

    def __init__(self, size):
        self.left = {"opcodes": MOST_OPCODES, "memory": size + SPARE_BYTES, "tensors": size}

    def spend(self, what, amount):
        self.left[what] -= amount
        if self.left[what] < 0:
            raise Refused(f"it needs more {what} than a network of its size")


@dataclasses.dataclass(eq=False)
class Inert:
    """An object that a pickle names, as data: EDM's modules, torch's containers, numpy numbers."""

    name: str = ""
    state: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Storage:
    """The elements [count] that tensors are views of; in torch's old format they come last."""

    elements: torch.Tensor

    def fill(self, raw):
        target = self.elements.view(torch.uint8).numpy()
        if len(raw) != len(target):
            raise Refused(
                f"a storage of {len(target)} bytes has {len(raw)}, the file is cut off or damaged"
            )
        if len(target):
            target[:] = np.frombuffer(raw, np.uint8)


STORAGE_TYPES = {
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
}


# The opcodes of EDM's and torch's own files, protocols 2 to 5, by what they need.
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
CONTAINERS = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": Inert}
NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
MEMO = {"MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}
ITEMS = {"MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS"}
CALLS = {"GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"}
ADMITTED = {*CONSTANTS, *CONTAINERS, *NUMBERS, *TEXTS, *BYTES, *MEMO, *ITEMS, *CALLS}
ADMITTED |= {"PROTO", "FRAME", "STOP"}
OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes if opcode.name in ADMITTED}
CUT_OFF = "it ends in the middle, the file is cut off"


class SafeUnpickler:
    """One pickle after the other of a stream, as plain data; the names are those of torch.save.

    stream: binary file; data: memoryview of the same bytes. Values: None, bool, int, float, str,
    memoryview (for bytes), tuple, list, dict, torch.dtype, Tensor, Inert and Storage."""

    def __init__(self, stream, data, limits):
        self.stream, self.data, self.limits = stream, data, limits
        self.storages = {}  # key -> Storage
        self.names = STORAGE_TYPES | {
            ("collections", "OrderedDict"): self.plain_dict,
            ("torch._utils", "_rebuild_parameter"): self.parameter,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
        }

    def load(self):
        """The next pickle; the stream then stands behind it."""
        self.stack, self.marks, self.memo = [], [], {}
        name = None
        while name != "STOP":
            self.limits.spend("opcodes", 1)
            code = self.stream.read(1).decode("latin1")
            if code not in OPCODES:
                name = pickletools.code2op[code].name if code in pickletools.code2op else repr(code)
                raise Refused(f"opcode {name}, which EDM's files do not have" if code else CUT_OFF)
            name, operand = OPCODES[code].name, OPCODES[code].arg
            self.step(name, operand.reader(self.stream) if operand else None)
        return self.stack.pop()

    def step(self, opcode, arg):
        stack = self.stack
        if opcode in CONSTANTS:
            stack.append(CONSTANTS[opcode])
        elif opcode in CONTAINERS:
            stack.append(CONTAINERS[opcode]())
        elif opcode in NUMBERS:
            stack.append(arg)
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            self.work(opcode, arg)

    def work(self, opcode, arg):
        stack, memo = self.stack, self.memo
        match opcode:
            # Text, bytes, and what was there before
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                self.limits.spend("memory", sys.getsizeof(arg))
                stack.append(arg)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                end = self.stream.tell()
                stack.append(self.data[end - len(arg) : end])
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT":
                memo[len(memo) if arg is None else arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])

            # Items of containers
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(opcode[-1]))]
                stack.append(tuple(reversed(items)))
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode == "APPEND" else self.since_mark()
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if opcode == "SETITEM" else self.since_mark()
                self.set_items(self.top(dict), items)

            # Names, and calls of the functions that they stand for
            case "GLOBAL":
                stack.append(self.named(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self.named(module, name))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                if type(args) is not tuple or not callable(function):
                    raise Refused(f"{opcode} of something that is not a call")
                stack.append(function(*args))
            case "BUILD":
                self.build(stack.pop())
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))

    def named(self, module, name):
        found = self.names.get((module, name)) if type(module) is type(name) is str else None
        if found is None:
            name = ".".join(part for part in (module, name) if type(part) is str)
            raise Refused(f"it wants to call {printable(name)}")
        return found

    def since_mark(self):
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind):
        if type(self.stack[-1]) is not kind:
            raise Refused(f"items for something that is not a {kind.__name__}")
        return self.stack[-1]

    def set_items(self, target, items):
        """items: key, value, key, value, ...; a key that is long or deep could be slow to hash."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            text = type(key) is str and len(key) <= 200
            number = type(key) is int and 0 <= key < 100_000
            if not (text or number):
                raise Refused("a dictionary's key is neither short text nor a small integer")
            target[key] = value

    def build(self, state):
        """The state of an Inert; attributes of a dict (torch's _metadata, hooks) are not needed."""
        target = self.stack[-1]
        if type(target) is Inert:
            target.state = state if type(state) is dict else {}
        elif type(target) is not dict:
            raise Refused("BUILD would change the attributes of something that has none")

    # The functions that names in the pickle stand for; what they are given can be anything.
    def plain_dict(self):
        return {}

    def parameter(self, tensor, requires_grad=False, hooks=None):
        return tensor

    def tensor(self, storage, offset, size, stride, *_):
        """A view of the storage; repeated elements (stride 0) count as often as they appear."""
        for numbers in (size, stride, (offset,)):
            if type(numbers) is not tuple or len(numbers) > 8:
                raise Refused("the size of a tensor is not a short tuple")
            if not all(type(n) is int and 0 <= n < MOST_DIMENSION for n in numbers):
                raise Refused("the size of a tensor has something else than non-negative integers")
        if type(storage) is not Storage or len(size) != len(stride):
            raise Refused("a tensor without a storage of its shape")

        elements = storage.elements
        self.limits.spend("tensors", math.prod(size) * elements.itemsize)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 in size:
            return elements.new_empty(size)
        if last >= len(elements):
            raise Refused("a tensor reaches beyond its storage")
        return elements.as_strided(size, stride, offset)

    def persistent(self, value):
        """("storage", type, key, device, count, ...) of torch.save -> Storage on the CPU."""
        if (
            type(value) is not tuple
            or len(value) < 5
            or type(value[0]) is not str
            or value[0] != "storage"
        ):
            raise Refused("a persistent object that is no storage")
        _, dtype, key, _, count, *_ = value
        if type(key) is not str or len(key) > 200:
            raise Refused("a storage without a name")
        if key not in self.storages:
            self.storages[key] = self.new_storage(key, dtype, count)
        elements = self.storages[key].elements
        if elements.dtype != dtype or len(elements) != count:
            raise Refused("a storage of two types or sizes")
        return self.storages[key]

    def new_storage(self, key, dtype, count):
        if (
            type(dtype) is not torch.dtype
            or type(count) is not int
            or not 0 <= count < MOST_DIMENSION
        ):
            raise Refused("a storage without type or size")
        self.limits.spend("memory", count * dtype.itemsize)
        return Storage(torch.empty(count, dtype=dtype))


class EdmUnpickler(SafeUnpickler):
    """A network snapshot: EDM's persistent objects, and storages that are pickles in the pickle."""

    def __init__(self, stream, data, limits):
        super().__init__(stream, data, limits)
        self.names |= {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): self.persistent_object,
            ("torch.storage", "_load_from_bytes"): self.storage_of_bytes,
            ("torch.nn.modules.container", "ModuleDict"): self.object,
            ("torch.nn.modules.container", "ModuleList"): self.object,
            ("torch.nn.modules.container", "Sequential"): self.object,
            ("numpy", "dtype"): self.object,
            ("numpy.core.multiarray", "scalar"): self.object,
            ("numpy._core.multiarray", "scalar"): self.object,
            ("builtins", "set"): self.object,
            ("__builtin__", "set"): self.object,
            ("dnnlib.util", "EasyDict"): self.plain_dict,
            ("_codecs", "encode"): self.encoded,
        }

    def object(self, *_):
        return Inert()

    def persistent_object(self, meta):
        """EDM's modules carry their source, which EDM runs; here it is text that nobody reads."""
        name, state = (
            (meta.get("class_name"), meta.get("state")) if type(meta) is dict else (None, None)
        )
        if type(name) is not str or type(state) is not dict:
            raise Refused("a persistent object without class_name and state")
        return Inert(name, state)

    def storage_of_bytes(self, blob):
        if type(blob) is Inert and type(blob.state.get("latin1")) is str:
            blob = memoryview(blob.state["latin1"].encode("latin1"))
        if type(blob) is not memoryview:
            raise Refused("a storage that is not bytes")
        if bytes(blob[:2]) == b"PK":
            raise Refused("a storage in a zip archive, which could be compressed")
        return read_legacy(io.BytesIO(blob[:4096]), blob, self.limits)

    def encoded(self, text, encoding):
        """Protocol 2 has no bytes: they are text in Latin-1."""
        if type(text) is not str or type(encoding) is not str or encoding != "latin1":
            raise Refused("text in an encoding other than Latin-1")
        return Inert(state={"latin1": text})


def read_legacy(stream, data, limits):
    """torch.save's old format: magic number, version, system, value and keys, then the storages."""
    reader = SafeUnpickler(stream, data, limits)
    magic, version = reader.load(), reader.load()
    if (type(magic), magic, type(version), version) != (int, TORCH_MAGIC, int, TORCH_VERSION):
        raise Refused("neither a torch.save archive nor its old format")
    system, value, keys = reader.load(), reader.load(), reader.load()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("written on a big-endian machine")
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise Refused("its storages have no names")
    if sorted(keys) != sorted(reader.storages):
        raise Refused("its storages are not the ones that its tensors need")

    # Each storage: its element count in 8 bytes, then the elements.
    position = stream.tell()
    for key in keys:
        storage = reader.storages[key]
        start, position = position + 8, position + 8 + storage.elements.nbytes
        if int.from_bytes(data[start - 8 : start], "little") != len(storage.elements):
            raise Refused(f"storage {printable(key)} has another size than its tensors say")
        storage.fill(data[start:position])
    if position != len(data):
        raise Refused("it goes on behind its last storage")
    return value


class ZipUnpickler(SafeUnpickler):
    """data.pkl of torch.save's archive; the storages are files beside it, with checksums."""

    def __init__(self, archive, folder, limits):
        self.archive, self.folder = archive, folder
        data = self.entry("data.pkl")
        super().__init__(io.BytesIO(data), memoryview(data), limits)
        if f"{folder}byteorder" in archive.namelist() and self.entry("byteorder") != b"little":
            raise Refused("written on a big-endian machine")

    def entry(self, name):
        info = self.archive.getinfo(self.folder + name)
        if info.compress_type != zipfile.ZIP_STORED:  # it could inflate
            raise Refused(f"{printable(name)} in it is compressed, torch.save compresses nothing")
        return self.archive.read(info)

    def new_storage(self, key, dtype, count):
        storage = super().new_storage(key, dtype, count)
        storage.fill(self.entry(f"data/{key}"))
        return storage


def checked_torch_load(path):
    """What torch.save wrote, archive or old format, as plain data and CPU tensors; nothing is run.

    For state dicts, optimizer and training states: numbers, text, tuples, lists, dicts and tensors
    (an OrderedDict is a dict). Refused or another of FILE_ERRORS: use it inside reading()."""
    data = file_bytes(path)
    limits = Limits(len(data))
    if not data.startswith(b"PK"):
        return read_legacy(io.BytesIO(data), memoryview(data), limits)
    if data.count(b"PK\x01\x02") > MOST_NAMES:  # entries, before each becomes an object
        raise Refused("an archive of too many files")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        folders = [
            name.removesuffix("data.pkl")
            for name in archive.namelist()
            if name.endswith("/data.pkl")
        ]
        if len(folders) != 1:
            raise Refused("an archive without data.pkl: torch.save did not write it")
        return ZipUnpickler(archive, folders[0], limits).load()


class Range(NamedTuple):
    """The values of an option: numbers of one type, or a list of at most sixteen of them."""

    kind: type
    low: float
    high: float
    many: bool = False

    def admits(self, value):
        if self.many:
            single = self._replace(many=False)
            return (
                type(value) in (list, tuple) and len(value) <= 16 and all(map(single.admits, value))
            )
        kinds = (int,) if self.kind is int else (int, float)
        return type(value) in kinds and self.low <= value <= self.high  # neither bool nor NaN

    def __str__(self):
        return f"{'a list of numbers' if self.many else 'a number'} from {self.low} to {self.high}"


class Words(NamedTuple):
    """The words that an option may be."""

    allowed: tuple

    def admits(self, value):
        return type(value) is str and value in self.allowed

    def __str__(self):
        return " or ".join(self.allowed)


# What EDMPrecond and SongUNet take; generous, but no value can stop, fill or crash a machine.
OPTIONS = {
    "img_resolution": Range(int, 1, 4096),
    "img_channels": Range(int, 1, 64),
    "label_dim": Range(int, 0, 100_000),
    "sigma_min": Range(float, 0, 1e6),
    "sigma_max": Range(float, 1e-6, math.inf),
    "sigma_data": Range(float, 1e-6, 1e6),
    "augment_dim": Range(int, 0, 64),
    "model_channels": Range(int, 4, 4096),
    "channel_mult": Range(int, 1, 64, many=True),
    "channel_mult_emb": Range(int, 1, 64),
    "num_blocks": Range(int, 1, 64),
    "attn_resolutions": Range(int, 0, 4096, many=True),
    "dropout": Range(float, 0, 1),
    "label_dropout": Range(float, 0, 1),
    "embedding_type": Words(("positional", "fourier")),
    "channel_mult_noise": Range(int, 1, 64),
    "encoder_type": Words(("standard", "residual")),
    "decoder_type": Words(("standard",)),
    "resample_filter": Range(float, -100, 100, many=True),
}
SIGMAS = {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5}  # EDMPrecond's defaults


def check_options(options):
    """Refuses what EDMPrecond does not take: names, types, ranges, and what must fit together."""
    for name, value in options.items():
        if name not in OPTIONS:
            raise Refused(f"option {printable(name)} is unknown")
        if not OPTIONS[name].admits(value):
            shown = (
                printable(value)
                if type(value) in (str, int, float)
                else f"a {type(value).__name__}"
            )
            raise Refused(f"option {name} is {shown}, not {OPTIONS[name]}")

    # Sizes that EDM's U-Net can halve, double and split in two.
    size = options.get("img_resolution", 0)
    levels = len(options.get("channel_mult", (1, 2, 2, 2)))
    noise = options.get("model_channels", 128) * options.get("channel_mult_noise", 1)
    taps = options.get("resample_filter", (1, 1))
    if size < 1 or "img_channels" not in options:
        raise Refused("its options have no img_resolution or img_channels")
    if not 1 <= levels <= 8 or size % 2 ** (levels - 1):
        raise Refused(f"{size} x {size} images cannot be halved for {levels} channel_mult")
    if noise % 2:
        raise Refused(f"an odd number of noise channels, {noise}")
    if len(taps) == 0 or len(taps) % 2 or abs(sum(taps)) < 1e-3:
        raise Refused("resample_filter is not an even number of taps with a sum")


def inert_tensors(module, prefix="", steps=None):
    """(name, tensor) of an inert module tree in state-dict order; shared ones count each time."""
    steps = steps or itertools.count()
    for kind in ("_parameters", "_buffers", "_modules"):
        entries = module.state.get(kind, {}) if type(module) is Inert else None
        if type(entries) is not dict:
            raise Refused("a module that is no module")
        for name, value in entries.items():
            if next(steps) > MOST_NAMES:
                raise Refused("it has too many tensors and modules")
            if type(name) is not str or not name or "." in name or len(prefix) > 200:
                raise Refused("names of modules that torch does not have")
            if kind == "_modules" and value is not None:
                yield from inert_tensors(value, f"{prefix}{name}.", steps)
            elif value is not None:
                yield prefix + name, value


def pickled_network(data):
    """EDM's network-snapshot as bytes -> (options, {name: tensor}) as inert data."""
    snapshot = EdmUnpickler(io.BytesIO(data), memoryview(data), Limits(len(data))).load()
    ema = snapshot.get("ema") if type(snapshot) is dict else None
    if type(ema) is not Inert or type(ema.state.get("_init_kwargs")) is not dict:
        raise Refused("no network snapshot of EDM: it has no ema")
    options = dict(ema.state["_init_kwargs"])
    kind = options.pop("model_type", "DhariwalUNet")
    if ema.name != "EDMPrecond" or type(kind) is not str or kind != "SongUNet":
        shown = printable(kind) if type(kind) is str else "something"
        raise Refused(
            f"{printable(ema.name)} around {shown} is not supported, only EDMPrecond around "
            "SongUNet (DDPM++, NCSN++)"
        )
    options.pop("use_fp16", None)

    # These three are attributes: EDM takes them as they are now, not as the network was built.
    for name in ("sigma_min", "sigma_max", "sigma_data"):
        value = ema.state.get(name, SIGMAS[name])
        if name in options or type(value) not in (int, float) or value != SIGMAS[name]:
            options[name] = value
    return options, dict(inert_tensors(ema))


def stored_network(path):
    """Our .safetensors -> (options, {name: tensor}); refused where its hash does not agree."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if "config" not in metadata:
            raise Refused("it has no options of an EDM network: this program did not write it")
        names = file.keys()
        if len(names) > MOST_NAMES:
            raise Refused(f"{len(names)} tensors")
        tensors = {name: file.get_tensor(name) for name in names}
    config = json.loads(metadata["config"])
    if type(config) is not dict:
        raise Refused("its options are not a dictionary")
    stored = config.pop("sha256", None)
    if stored is not None and stored != network_hash(config, tensors):
        raise Refused("its SHA-256 does not agree: the file is damaged, delete it or get it again")
    config.pop("recipe", None)
    return config, tensors


def network_hash(config, tensors):
    """SHA-256 of options, recipe and weights, whatever their order in the file."""
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def build_network(options, tensors):
    """EDMPrecond(**options) with these weights, popped from `tensors`: eval, float32, frozen."""
    check_options(options)
    blocks = len(options.get("channel_mult", (1, 2, 2, 2))) * options.get("num_blocks", 4)
    if blocks > len(tensors):
        raise Refused(f"its options describe a larger network than its {len(tensors)} tensors")
    with torch.device("meta"):  # no memory: options allocate nothing
        net = EDMPrecond(**options)

    # Every tensor of the network, of its shape, and no other.
    own = net.state_dict()
    for name in [*own, *tensors]:
        theirs = tensors.get(name)
        if theirs is not None and (
            type(theirs) is not torch.Tensor or not theirs.is_floating_point()
        ):
            raise Refused(f"{printable(name)} is no tensor of floating-point numbers")
        wanted = tuple(own[name].shape) if name in own else "not there"
        found = tuple(theirs.shape) if theirs is not None else "not there"
        if wanted != found:
            raise Refused(f"{printable(name)} is {found} in the file, the network expects {wanted}")

    # Values: finite, and filters as the options say, because the network computes with the options.
    taps = torch.tensor(options.get("resample_filter", (1, 1)), dtype=torch.float32)
    for name in own:
        tensor = tensors.pop(name)
        own[name] = torch.empty(tensor.shape).copy_(tensor)
        if not own[name].isfinite().all():
            raise Refused(f"{name} has weights that are not finite")
        if name.endswith(".resample_filter"):
            expected = taps.outer(taps) / taps.sum() ** 2
            if not torch.allclose(own[name][0, 0], expected, rtol=1e-4, atol=1e-6):
                raise Refused(f"{name} is not the filter that the options describe")
    net.load_state_dict(own, assign=True)
    return net.eval().requires_grad_(False)


def load_network(path):
    """EDM's .pkl (parsed, never run) or our .safetensors, told apart by content -> EDMPrecond.

    In eval mode on the CPU, float32, without gradients. UserError: what is wrong with the file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"network {path} does not exist or is no file")
    with reading(f"network {path} is refused, nothing in it was run"):
        with open(path, "rb") as file:
            head = file.read(512)
        header = int.from_bytes(head[:8], "little")
        if head[8:9] == b"{" and header <= min(MOST_HEADER, path.stat().st_size - 8):
            return build_network(*stored_network(path))
        if head[:1] == b"\x80":
            return build_network(*pickled_network(file_bytes(path)))
        raise Refused(f"neither a pickle of EDM nor a .safetensors, but {kind_of(head)}")


def save_network(net, path, recipe):
    """.safetensors: weights in float32; options, recipe and SHA-256 as one entry of its metadata.

    One, because several have no order: the same network is the same bytes."""
    sigmas = {
        name: getattr(net, name)
        for name, default in SIGMAS.items()
        if getattr(net, name) != default
    }
    tensors = {name: tensor.float().contiguous().cpu() for name, tensor in net.state_dict().items()}
    config = json.loads(
        json.dumps({**net.config, **sigmas, "recipe": recipe})
    )  # as it will be read
    config["sha256"] = network_hash(config, tensors)

    def write(part):
        part.write_bytes(
            safetensors.torch.save(tensors, {"config": json.dumps(config)})
        )  # save_file: mode 0600

    write_atomically(path, write)


# ==================== 14. files, images, downloads
# What libraries raise for files that are not as they should be. NameError, AttributeError and
# AssertionError are faults of this program and stay tracebacks.
FILE_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,  # torch, nesting, encrypted zip entries
    SyntaxError,  # PIL, for a broken PNG
    pickle.PickleError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    http.client.HTTPException,
    safetensors.SafetensorError,
    PIL.Image.DecompressionBombError,
)
IMAGE_KINDS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
}  # first bytes; nothing else is opened
MOST_IMAGE_BYTES = 64 << 20  # of one file in a dataset
MOST_INDEX_BYTES = 512 << 20  # of dataset.json: ten million labels
MOST_SIDE = 4096  # pixels
MOST_LABEL = 99_999
SILENCE = 30  # seconds without a byte that end a download


def printable(text, most=100):
    """Text of a file or a server for a message: one line, cut off, control characters escaped."""
    text = str(text)[: most + 1]
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return line if len(line) <= most else line[: most - 3] + "..."


def reason_of(error):
    """The first line of an error: our own words as they are, those of a library with its type."""
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, (Refused, UserError)):
        return printable(line, 500)
    return f"{type(error).__name__}: {printable(line)}"


@contextlib.contextmanager
def reading(what):
    """Whatever is wrong with a file ends in one line that begins with `what`; the cause is kept."""
    try:
        yield
    except FILE_ERRORS as error:
        raise UserError(f"{what} ({reason_of(error)})") from error


def file_bytes(path):
    """The content of a regular file that can be a network's: a pipe would never end."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file")
    if path.stat().st_size > MOST_BYTES:
        raise Refused(f"it is larger than {MOST_BYTES >> 30} GB")
    return path.read_bytes()


def write_atomically(path, write):
    """Text, or what write(temporary path) leaves, then rename: either the old or the new."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
        part = Path(folder) / path.name  # torch.save writes the name into the file
        try:
            if isinstance(write, str):
                part.write_text(write, "utf-8")
            else:
                write(part)
        except RuntimeError as error:  # torch's and safetensors' for a full disk
            reason = str(error).splitlines()[0]
            raise OSError(f"{path} cannot be written, is the disk full? ({reason})") from error
        os.replace(part, path)


def remove_orphans(folder):
    """Temporary folders that a killed run has left."""
    for part in folder.glob(".part-*"):
        shutil.rmtree(part, ignore_errors=True)


def file_hash(path):
    """The first 16 hexadecimal digits of the file's SHA-256."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()[:16]


def kind_of(head):
    """What a file is that is not what it should be, from its first bytes, in words."""
    start = head[:512].lstrip(b"\xef\xbb\xbf\0 \t\r\n").lower()
    if not head:
        return "an empty file"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")) or b"<html" in start:
        return "an HTML page (a login or error page?)"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS (run `git lfs pull`)"
    kinds = {
        b"PK\x03\x04": "a zip archive (torch.save?)",
        b"\x1f\x8b": "a gzip file",
        b"{": "JSON",
        b"\x80": "a pickle",
    }
    for first, kind in kinds.items():
        if head.startswith(first):
            return kind
    if not start:
        return "zeros or blanks"
    return f"a file that begins with {printable(repr(head[:16]))}"


@contextlib.contextmanager
def one_at_a_time(path):
    """Other processes wait here until this one is done; False: the file system has no locks."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            print(f"waiting for the download of another process ({path})", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False  # the rename is atomic: at worst both processes download
        yield locked


def cache_path(url):
    """Where the file of a URL is kept: its name, after a hash of the whole address."""
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    name = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[-80:] or "file"
    cache = Path(os.environ.get("NEON_CACHE") or Path.home() / ".cache/adaptive-neon")
    return cache / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"


def download(url, sha256_start, check, part):
    """The file at the URL into `part`, if it is what was asked for."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        torch.hub.download_url_to_file(url, str(part))
    finally:
        socket.setdefaulttimeout(timeout)

    # A login page answers 200 as the file does.
    with open(part, "rb") as file:
        came = kind_of(file.read(512))
    problem = None
    if came.startswith(("an HTML", "an empty", "a pointer")):
        problem = "it was not kept"
    elif not file_hash(part).startswith(sha256_start[:16]):
        problem = f"its SHA-256 does not begin with {sha256_start}"
    elif check is not None:
        try:
            check(part)
        except (UserError, *FILE_ERRORS) as error:
            problem = reason_of(error.__cause__ or error)
    if problem is not None:
        size = part.stat().st_size
        raise Refused(f"what came is {came}, {size} bytes: {problem}")


def fetch(
    source,
    what,
    sha256_start="",
    check=None,
    advice="check the address, or put the file at {target}; --preset glyphs needs no download",
):
    """A path as it is; a URL's file from the cache (NEON_CACHE), one download at a time.

    sha256_start: first hexadecimal digits of the file's SHA-256. check(path) raises if the file is
    not what was asked for; then it is not kept. UserError: what came instead, and the advice."""
    if not re.match("https?://", source, re.IGNORECASE):
        with reading(f"{what} {source} cannot be read"):
            if not Path(source).exists():
                raise UserError(f"{what} {source} does not exist")
        return Path(source)

    target = cache_path(source)
    shown = printable(source, 300)
    with reading(f"cannot download {what} from {shown}: {advice.format(target=target)}"):
        if not target.exists():  # a cache that is complete may be read-only
            target.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(target.parent / "lock") as locked:
                if locked:
                    remove_orphans(target.parent)
                if not target.exists():  # no other process was faster
                    write_atomically(target, partial(download, source, sha256_start, check))
    with reading(f"{what} {target} cannot be read"):
        if not file_hash(target).startswith(sha256_start[:16]):
            raise UserError(
                f"{what} {target} is damaged (SHA-256 is not {sha256_start}...): delete it"
            )
    return target


class DatasetFiles:
    """The files of a dataset, a zip or a folder: .sizes {name: bytes}, read(name) up to a limit."""

    def __init__(self, path):
        self.folder = path if path.is_dir() else None
        self.sizes = {}
        if self.folder:
            self.list_folder()
        elif path.is_file():
            self.archive = zipfile.ZipFile(path)
            self.list_archive()
        else:
            raise Refused("it does not exist or is neither a file nor a folder")

    def list_folder(self):
        def refuse(error):
            raise error

        for folder, _, names in os.walk(self.folder, onerror=refuse):
            for name in names:
                file = Path(folder) / name
                inside = file.relative_to(self.folder).as_posix()
                if not file.is_file():
                    raise Refused(f"{printable(inside)} is no file (a pipe or a broken link?)")
                self.sizes[inside] = file.stat().st_size

    def list_archive(self):
        for info in self.archive.infolist():
            if info.is_dir():
                continue
            if info.filename in self.sizes:
                raise Refused(f"{printable(info.filename)} is in it twice")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise Refused(f"{printable(info.filename)} is neither stored nor deflated")
            self.sizes[info.filename] = info.file_size

    def read(self, name, most):
        """The content; what says that it is small and is not, is not read to its end."""
        if self.sizes[name] > most:
            raise Refused(f"{printable(name)} has {self.sizes[name]} bytes, more than {most}")
        with open(self.folder / name, "rb") if self.folder else self.archive.open(name) as file:
            return file.read(most + 1)


def read_image(raw):
    """PNG or JPEG by its first bytes -> uint8 [H, W, C], C 1 or 3; another kind of file -> None."""
    kind = next((kind for first, kind in IMAGE_KINDS.items() if raw.startswith(first)), None)
    if kind is None:
        return None
    picture = PIL.Image.open(io.BytesIO(raw), formats=[kind])
    if max(picture.size) > MOST_SIDE:
        raise Refused(f"{picture.width} x {picture.height} pixels, the most is {MOST_SIDE}")
    if (
        kind == "PNG" and raw[24] == 16
    ):  # the depth in the header; PIL would round 16-bit colours in silence
        raise Refused("16 bits a channel; convert it to 8")
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        raise Refused(f"transparency (mode {picture.mode}); convert it to RGB or grey")
    if getattr(picture, "is_animated", False) and picture.format == "PNG":
        raise Refused("an animation")
    if picture.mode in ("1", "P"):
        picture = picture.convert({"1": "L", "P": "RGB"}[picture.mode])
    if picture.mode not in ("L", "RGB"):
        raise Refused(f"mode {picture.mode}; convert it to RGB or grey, 8 bits a channel")
    return np.atleast_3d(np.array(picture))


def read_labels(raw):
    """dataset.json -> {image: label} or None: {"labels": [[image, label], ...] or null}."""
    index = json.loads(raw)
    rows = index.get("labels", "none") if type(index) is dict else "none"
    if rows is None:
        return None
    if type(rows) is not list:
        raise Refused('dataset.json has no list "labels"')
    labels = {}
    for row in rows:
        if type(row) is not list or len(row) != 2 or type(row[0]) is not str:
            raise Refused('"labels" in dataset.json is not a list of [image, label]')
        name, label = row[0].replace("\\", "/"), row[1]
        if type(label) is float and label.is_integer():
            label = int(label)
        if type(label) is not int or not 0 <= label <= MOST_LABEL:
            shown = (
                printable(label)
                if type(label) in (int, float, bool, str)
                else f"a {type(label).__name__}"
            )
            raise Refused(
                f"the label of {printable(name)} is {shown}, not an integer from 0 to {MOST_LABEL}"
            )
        if name in labels:
            raise Refused(f"{printable(name)} has two labels")
        labels[name] = label
    return labels


def read_dataset(path):
    """EDM dataset (zip or folder with dataset.json) -> uint8 [N, C, H, W], int64 [N] or None.

    PNG or JPEG, 8 bits, grey or RGB, of one size, in the order of their names. An image of another
    kind is refused; files of other kinds are counted on stderr."""
    path = Path(path)
    with reading(f"dataset {path} cannot be read"):
        files = DatasetFiles(path)
        names = sorted(name for name in files.sizes if not is_clutter(name))
        labels = None
        if "dataset.json" in names:
            names.remove("dataset.json")
            labels = read_labels(files.read("dataset.json", MOST_INDEX_BYTES))
        misplaced = [name for name in names if name.endswith("/dataset.json")]
        if misplaced:
            raise Refused(f"dataset.json must be at the top, not at {printable(misplaced[0])}")

        # Image by image into one array, made when the size is known.
        images, found, others = None, [], []
        for name in tqdm(names, desc=f"reading {path.name}", leave=False, disable=None):
            with reading(f"dataset {path} cannot be read: {printable(name)}"):
                image = read_image(files.read(name, MOST_IMAGE_BYTES))
                if image is None:
                    if Path(name).suffix.lower() in PIL.Image.registered_extensions():
                        raise Refused("neither PNG nor JPEG")
                    others.append(name)
                    continue
                if images is None:
                    images = torch.empty(
                        len(names), image.shape[2], *image.shape[:2], dtype=torch.uint8
                    )
                image = torch.from_numpy(image).permute(2, 0, 1)  # [C, H, W]
                if image.shape != images.shape[1:]:
                    first, this = tuple(images.shape[1:]), tuple(image.shape)
                    raise Refused(f"[C, H, W] is {this}, that of {printable(found[0])} is {first}")
                images[len(found)] = image
                found.append(name)
        if not found:
            raise Refused("it holds no PNG or JPEG images")
        warn_of_others(path, others, labels, found)
        if labels is None:
            return images[: len(found)], None
        missing = [name for name in found if name not in labels]
        if missing:
            raise Refused(
                f"{len(missing)} images have no label in dataset.json, the first is "
                f"{printable(missing[0])}"
            )
        return images[: len(found)], torch.tensor([labels[name] for name in found])


def is_clutter(name):
    """What operating systems put beside files."""
    last = name.rpartition("/")[2]
    return (
        "__MACOSX" in name.split("/")
        or last.startswith("._")
        or last in (".DS_Store", "Thumbs.db", "desktop.ini")
    )


def warn_of_others(path, others, labels, found):
    """What lies in the dataset and is not used, by number and first name, on stderr."""
    absent = sorted(labels.keys() - set(found)) if labels is not None else []
    for names, kind in ((others, "files that are no images"), (absent, "labels without an image")):
        if names:
            first = printable(names[0])
            print(
                f"{path}: {len(names)} {kind} are left out, the first is {first}", file=sys.stderr
            )


def write_dataset(path, images, labels):
    """uint8 [N, C, H, W] and labels [N] (or None) -> EDM dataset zip, stored uncompressed."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    index = None if labels is None else list(zip(names, labels.tolist(), strict=True))

    def write(part):
        with zipfile.ZipFile(part, "w") as archive:
            for name, image in zip(names, images.permute(0, 2, 3, 1).numpy(), strict=True):
                png = io.BytesIO()
                picture = PIL.Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
                picture.save(png, format="png", compress_level=0)
                archive.writestr(zipfile.ZipInfo(name), png.getvalue())
            archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": index}))

    write_atomically(path, write)


def lock(file, wait=True):
    """Keep other processes out until the file is closed; BlockingIOError if one is in and `wait` is
    False. A file system that knows no locks goes without."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise


def is_safetensors(path):
    """Whether the file begins as .safetensors do: the length of its header, then JSON."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 10**8


# -------------------- keys: hashes of the content that decides a result
TRAINING_VERSION, SAMPLING_VERSION, SCORING_VERSION, SEARCH_VERSION = (
    "train 1",
    "sample 1",
    "score 1",
    "search 3",
)


def key_of(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tensor_hash(tensor):
    tensor = tensor.detach().cpu().contiguous()
    data = tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else b""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(data)
    return digest.hexdigest()


def weights_hash(net):
    """Hash of the names and the content of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        if isinstance(tensor, torch.Tensor):  # a module may keep other things beside them
            digest.update(f"{name} {tensor_hash(tensor)}\n".encode())
    return digest.hexdigest()[:16]


# ==================== 15. processes
class Processes:
    """This process among `world`: its device and rank, and how the ranks share work and agree."""

    def __init__(self, device, rank=0, world=1):
        self.device, self.rank, self.world = device, rank, world

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def decide(self, work):
        """work() on the first rank alone; its result, or its error, on every rank."""
        if self.world == 1:
            return work()
        outcome = [None, None]  # result, failure
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (UserError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        result, failure = outcome
        if failure is not None:
            raise failure
        return result

    def one_by_one(self, work):
        """work() on the first rank, then on the others, which find its files."""
        if self.world == 1:
            return work()
        first = None

        def on_first_rank():
            nonlocal first
            first = work()

        self.decide(on_first_rank)
        return first if self.rank == 0 else work()

    def map_batches(self, work, seeds, batch, desc=None):
        """[work(batch of seeds)] in the order of the seeds; every rank gets all. On a CPU, where
        small networks leave cores idle, several batches at once."""
        parts = np.array_split(np.asarray(seeds), -(-len(seeds) // batch))
        mine = parts[self.rank :: self.world]
        bar = {"desc": desc, "leave": False, "disable": desc is None or self.rank > 0}
        workers = self.workers()
        if workers > 1:
            return thread_map(work, mine, max_workers=workers, **bar)

        if self.world == 1:
            return [work(part) for part in tqdm(mine, **bar)]
        outcome = []
        try:
            for part in tqdm(mine, **bar):
                outcome.append(work(part))
        except (Diverged, UserError, torch.OutOfMemoryError) as error:
            outcome = type(error)(str(error))  # the others must hear of it
        gathered = [None] * self.world
        dist.all_gather_object(gathered, outcome)
        for outcome in gathered:
            if isinstance(outcome, Exception):
                raise outcome
        return [gathered[i % self.world][i // self.world] for i in range(len(parts))]

    def workers(self):
        """Batches at once."""
        if self.device != "cpu" or self.world > 1:
            return 1
        return max(1, os.cpu_count() // torch.get_num_threads())

    @contextlib.contextmanager
    def alone_in(self, folder, reads_only):
        """Refuse a second run in the same folder while this one lives; clear what a killed one
        left."""
        if reads_only or self.rank > 0:
            yield
            return
        with open(folder / ".lock", "w") as file:
            try:
                lock(file, wait=False)
            except BlockingIOError:
                raise UserError(
                    f"another run works in {folder}: wait for it, or choose another --out"
                ) from None
            remove_orphans(folder)
            yield


def start_processes(c):
    """Threads, and torch.distributed under torchrun; nothing changes either of them later."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if c.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # The first rank may download or train features for long while the others wait.
        patience = datetime.timedelta(days=1)
        dist.init_process_group("nccl" if c.device == "cuda" else "gloo", timeout=patience)
    threads = c.threads or PRESETS[c.preset].threads
    if threads:
        torch.set_num_threads(threads)
    if c.device == "cuda":
        torch.backends.cudnn.benchmark = True
    if c.preset != "cifar10":
        torch.empty(
            2**22
        )  # freeing 16 MB raises glibc's mmap threshold: no page faults for every activation
    return Processes(c.device, rank, world)


# -------------------- what it will cost
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


def count_images(c, blocks):
    """(scores, images of all scores, final scores, images of all final scores)."""
    scores = len({-1.0, 0.0, *c.grid, *c.sweep})
    scores += grid_points(c, blocks) * (1 + c.placebo)
    scores += c.evaluations * {"": 0, "cobyqa": 1, "coordinate": 1, "gradient": 6}[c.search]
    finals = (4 + bool(c.search) + c.placebo) * c.final_repeats
    return scores, scores * c.select_images, finals, finals * c.final_images


def refuse_hours(c, seconds, blocks):
    """On a CPU, long runs only on request: it says how long it would take."""
    if c.device != "cpu" or c.yes or c.plan:
        return
    _, images, _, final_images = count_images(c, blocks)
    hours = (images + final_images + c.synthetic) * seconds / 3600 * c.training_seeds
    if hours > MAX_HOURS:
        raise UserError(
            f"without a GPU this takes about {hours:.0f} hours of sampling alone: add --yes to run "
            "it all the same, or try --preset glyphs"
        )


def refuse_download(c, model, processes):
    """The same before EDM's networks are downloaded, from an untrained one of their size."""
    if c.device == "cpu" and not (c.yes or c.plan):
        net = EDMPrecond(**Cifar10.network).eval()
        sampler = Sampler(model, net, processes, c.steps, c.sample_batch)
        seconds, _ = time_sampling(sampler, c.precision)
        refuse_hours(c, seconds, block_order(partition_owners(model, net, c.partition)))


def print_plans(c, model, base, snapshots, owners, sampler, seconds, compilation):
    """Blocks, drift and time of every snapshot; the base stands for one that is not trained yet."""
    world = sampler.processes.world
    if sampler.processes.rank > 0:
        return
    hours = c.synthetic * seconds / 3600 / world + compilation / 3600
    for path in snapshots.values():
        trained = path.exists()
        aux = model.load_like(base, path) if trained else base
        merger = Merger(base, aux, owners, sampler)
        print(
            f"{'block':<24}{'tensors':>8}{'parameters':>12}  "
            "drift ||theta_s - theta_r|| / ||theta_r||"
        )
        for block, row in merger.table().items():
            drift = f"{row['drift']:.5f}" if trained else "not trained yet"
            print(f"{block:<24}{row['tensors']:>8}{row['parameters']:>12}  {drift}")
        scores, images, finals, final_images = count_images(c, merger.blocks)
        hours += (images + final_images) * seconds / 3600 / world
        print(
            f"about {scores} scores of {c.select_images} images and {finals} final ones of "
            f"{c.final_images}"
        )

    if not c.aux and not all(path.exists() for path in snapshots.values()):
        kimg = max(snapshots)
        if not c.base:
            kimg += c.train_base
        training = kimg * 1000 * time_training(c, model, base) / 3600 / world
        hours += training
        print(f"training on {kimg:g} kimg: {training:.2f} hours")
    print(
        f"synthetic set, training, scores and {compilation:.0f} s of compilation: {hours:.2f} "
        f"hours on {world} x {c.device}, without the time of the features"
    )


# ==================== 16. command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{printable(message)} (see --help)")


def in_range(field, text):
    """An option's value, its numbers within the option's range."""
    how = field.metadata
    value = how["kind"](text)
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, (int, float)) and not how["low"] <= number <= how["high"]:
            raise argparse.ArgumentTypeError(
                f"{text} is out of range, it goes from {how['low']:g} to {how['high']:g}"
            )
    return value


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Config):
        how = field.metadata
        name = "--" + field.name.replace("_", "-")
        text = f"{how['help']} (default: {field.default})"
        if how["kind"] is bool:
            parser.add_argument(name, action="store_true", help=text)
        else:
            kind = partial(in_range, field)
            kind.__name__ = getattr(how["kind"], "__name__", "value")
            # Judges are named one by one.
            action = "extend" if how["kind"] is judge_name else "store"
            parser.add_argument(name, type=kind, choices=how["choices"], help=text, action=action)
    return parser


def parse(argv):
    """Command line -> Config: the class's defaults, then the preset's, then what is given."""
    joined = []
    for arg in argv:  # argparse takes the -1:2:0.25 of "--sweep -1:2:0.25" for an option
        if joined and re.match(r"-[\d.]", arg):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    given = vars(build_parser().parse_args(joined))
    for name in ("judge", "select_with"):
        if name in given:
            given[name] = tuple(given[name])
    preset = PRESETS[given.get("preset", "cifar10")]
    defaults = {"out": Path(f"runs/{preset.name}"), **preset.defaults}
    if given.get("protocol") == "paper":
        defaults["labels"] = "random"
        given["select_images"] = 2000
    c = Config(**{**defaults, **given})
    if c.device == "cpu" and c.precision == "tf32":
        c = dataclasses.replace(c, precision="fp32")
    check_combinations(c)
    check_machine(c)
    return c


def check_combinations(c):
    """Options that contradict each other."""
    if len(c.bounds) != 2:
        raise UserError("--bounds: give two numbers, low,high")
    if c.placebo and c.partition == "layers":
        raise UserError("--placebo draws random blocks of several layers: use another --partition")
    if c.guidance > 1 and (c.model or not is_pipeline(c.base)):
        raise UserError("--guidance is for pipelines of diffusers as --base: leave it out")
    if c.partition in ("paper", "structural") and not c.model:
        check_grid(c, ("enc", "mid", "dec"))


def check_machine(c):
    """The extension, the device and a folder to write into."""
    if neon_ext is None:
        raise UserError(
            "neon_ext is not built: run `pip install --no-build-isolation .` here first"
        )
    if c.device == "cuda" and not (torch.cuda.is_available() and neon_ext.build_config()["cuda"]):
        raise UserError(
            "--device cuda: no usable GPU, or neon_ext was built without CUDA; use --device cpu"
        )
    with reading(f"--out {c.out} cannot be written, choose another folder"):
        c.out.mkdir(parents=True, exist_ok=True)
        if not os.access(c.out, os.W_OK):
            raise PermissionError("no permission")


def interrupt(number, frame):
    raise KeyboardInterrupt(number)


def main(argv=None):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
            signal.signal(number, interrupt)
    message = None
    try:
        run(sys.argv[1:] if argv is None else argv)
    except (UserError, Diverged) as error:
        message, code = error, 2
    except OSError as error:
        message, code = f"{error}; what was finished stays", 2
    except KeyboardInterrupt as stop:
        message = "stopped; finished parts are kept, the same command goes on"
        code = 128 + (stop.args[0] if stop.args else signal.SIGINT)  # as shells report a signal
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    if message is not None:
        print(f"edm_neon: {message}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
