"""What a study begins with, and its training stages: what is finished is read back."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from .config import Config, Preset
from .files import UserError, remove_orphans
from .folders import is_pipeline
from .images import RealData, read_dataset, refuse_empty_classes, write_dataset
from .keys import base_key, self_training_key, synthetic_key, weights_hash
from .modelfile import FileModel
from .processes import Processes
from .sampling import Model, Sampler
from .seeds import Ledger, seed_ledger
from .text import open_pipeline
from .train import SHARE, Recipe, train


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a study begins with."""

    c: Config
    preset: Preset
    model: Model
    processes: Processes
    real: RealData | None
    seeds: Ledger

    def first_seeds(self) -> dict:
        """For the report: of the noise, and of real images that are drawn here."""
        firsts: dict = {
            "selection": self.seeds.selection.first,
            "final": [seeds.first for seeds in self.seeds.finals],
        }
        if self.preset.streams:
            firsts["real_streams"] = self.preset.streams
        return firsts


# -------------------- what a study begins with
def prepare(c: Config, preset: Preset, processes: Processes) -> Setup:
    """Model, real images and seeds; nothing long."""
    paper = c.protocol == "paper"
    seeds = seed_ledger(
        c.select_images,
        c.final_images,
        c.final_repeats,
        c.synthetic,
        searched=c.search == "gradient",
        paper=paper,
        final_seed=c.final_seed,
    )
    if paper and processes.rank == 0:
        print(
            f"--protocol paper: the first {min(c.select_images, c.synthetic)} selection seeds are "
            "also those of the synthetic training set"
        )
    model = open_model(c, preset, processes)
    real = processes.one_by_one(partial(preset.real_images, c))
    if c.continue_on_data and real is None:
        raise UserError("--continue-on-data trains on real images: give --data")
    setup = Setup(c, preset, model, processes, real, seeds)
    if c.aux:
        given_snapshots(setup)  # a wrong --aux shows now
    return setup


def open_model(c: Config, preset: Preset, processes: Processes) -> Model:
    """--model FILE.py, a pipeline of diffusers as --base, or the preset's own networks."""
    if c.model:
        return processes.one_by_one(partial(FileModel, c.model))
    if is_pipeline(c.base):
        return processes.one_by_one(partial(open_pipeline, c))
    if c.base and Path(c.base).is_dir():
        raise UserError(
            f"--base {c.base} is a folder without model_index.json, so no pipeline of diffusers; "
            "EDM's networks are files, and other folders need --model"
        )
    return preset.model(c)


def first_network(setup: Setup) -> nn.Module:
    """The base, given or downloaded; with --train-base an untrained network. Both are checked."""
    c, model, real = setup.c, setup.model, setup.real
    if not c.train_base:
        if c.model and not c.base:
            raise UserError(
                f"--model {c.model} needs --base FILE for its load(), or --train-base KIMG"
            )
        path = setup.processes.one_by_one(partial(model.fetch, c.base, "the base network"))
        net = model.load(path)
    else:
        if real is None:
            raise UserError("--train-base needs --data ZIP or folder of images")
        torch.manual_seed(c.seed)
        net = model.create(real.training.images, real.training.labels, c)
        refuse_empty_classes(real.training, model.classes(net))
    check_model(setup, net, trained=not c.train_base)
    return net


def check_model(setup: Setup, net: nn.Module, trained: bool) -> None:
    """The model keeps the seam's promises and makes images like the real ones."""
    setup.model.start_check(net, setup.c, trained)
    if setup.real is None:
        return
    shape = tuple(setup.model.image_shape(net))
    theirs = tuple(setup.real.training.images.shape[1:])
    if shape != theirs:
        raise UserError(
            f"the base makes images of shape {shape} (channels, height, width), the real ones of "
            f"{setup.real.training.source} are {theirs}: choose other --data, or another --preset "
            f"than {setup.c.preset}"
        )


# -------------------- training stages
def trained_base(setup: Setup, net: nn.Module) -> nn.Module:
    """The base: as it was given, or trained from `net` on the training part of the real images."""
    if not setup.c.train_base:
        return net
    path = base_path(setup, net)
    train_on_data(setup, net, path, setup.c.train_base, base_recipe(setup.c))
    base = setup.model.load_like(net, path)
    try:
        check_model(setup, base, trained=True)
    except UserError as error:
        raise UserError(f"{error} (the trained base is kept: {path})") from error
    return base


def continued_base(setup: Setup, base: nn.Module, kimg: float) -> nn.Module:
    """The base after so many thousand real images more, by the recipe of the self-training."""
    recipe = dataclasses.replace(self_recipe(setup.c), name="training on")
    path = setup.c.out / f"continued-{data_key(setup, base, kimg, recipe)}.safetensors"
    train_on_data(setup, setup.model.trainable(base, setup.c), path, kimg, recipe)
    return setup.model.load_like(base, path)


def train_on_data(setup: Setup, net: nn.Module, path: Path, kimg: float, recipe: Recipe) -> None:
    """Leaves in `path` the network after so many thousand images of the training part."""
    real = setup.real
    assert real is not None  # see prepare() and first_network()

    def images():
        return real.training.images, real.training.labels

    state = path.with_name(f"training-state-{path.stem}.safetensors")
    train_once(setup, net, images, recipe, {kimg: path}, state, {})
    if setup.processes.rank == 0:
        state.unlink(missing_ok=True)


def data_key(setup: Setup, net: nn.Module, kimg: float, recipe: Recipe) -> str:
    """Of a network that is trained from `net` on the training part."""
    assert setup.real is not None
    return base_key(
        initial=weights_hash(net),
        kimg=kimg,
        images=setup.real.training.identity,
        model=setup.model.training_identity,
        recipe=dataclasses.asdict(recipe),
    )


def base_recipe(c: Config) -> Recipe:
    """Ramp and average are a twentieth of the whole, as EDM's are of its 200 million images."""
    return Recipe(
        name="base",
        batch=c.batch,
        lr=c.base_lr,
        ramp_kimg=c.train_base / SHARE,
        ema_kimg=c.train_base / SHARE,
        seed=c.seed,
        ramp_ratio=0.05,
        precision=c.train_precision,
    )


def base_path(setup: Setup, net: nn.Module) -> Path:
    """Where a base that is trained from `net` is kept."""
    key = data_key(setup, net, setup.c.train_base, base_recipe(setup.c))
    return setup.c.out / f"base-{key}.safetensors"


def self_trained(setup: Setup, base: nn.Module, sampler: Sampler) -> dict[int, Path]:
    """{kimg: file} of self-trained networks: those of --aux, or trained here on samples of the
    base."""
    c = setup.c
    if c.aux:
        return given_snapshots(setup)
    paths, synthetic, recipe = self_training(setup, base)

    def images():
        return synthetic_set(setup, sampler, c.out / f"synthetic-{synthetic}.zip")

    net = setup.model.trainable(base, c)
    state = paths[c.snapshot[0]].with_name("training-state.safetensors")
    facts = {"base_weights": weights_hash(base), "synthetic": synthetic}
    train_once(setup, net, images, recipe, paths, state, facts)
    return paths


def self_training(setup: Setup, base: nn.Module) -> tuple[dict[int, Path], str, Recipe]:
    """{kimg: file}, the key of the synthetic set, and the recipe."""
    c, model = setup.c, setup.model
    recipe = self_recipe(c)
    synthetic = synthetic_key(
        base=weights_hash(base),
        model=model.identity,
        count=c.synthetic,
        labels=c.labels,
        steps=c.steps,
        device=c.device,
        precision=c.precision,
    )
    key = self_training_key(
        synthetic=synthetic, model=model.training_identity, recipe=dataclasses.asdict(recipe)
    )
    folder = c.out / f"self-{key}"
    paths = {kimg: folder / f"network-snapshot-{kimg:06d}.safetensors" for kimg in c.snapshot}
    return paths, synthetic, recipe


def self_recipe(c: Config) -> Recipe:
    return Recipe(
        name="self-training",
        batch=c.batch,
        lr=c.lr,
        ramp_kimg=c.ramp_kimg,
        ema_kimg=c.ema_kimg,
        seed=c.seed + 1,
        precision=c.train_precision,
    )


def given_snapshots(setup: Setup) -> dict[int, Path]:
    """{kimg: path} from --aux: one network, or a folder of network-snapshot-*."""
    c, folder = setup.c, Path(setup.c.aux)
    if not folder.is_dir() or not any(folder.glob("network-snapshot-*")):
        if len(c.snapshot) > 1:
            raise UserError(
                f"--aux {c.aux} is one network, --snapshot names {len(c.snapshot)} "
                f"({', '.join(map(str, c.snapshot))}): give its own length alone, or a folder of "
                "network-snapshot-* files"
            )
        fetch = partial(setup.model.fetch, c.aux, "the self-trained network")
        return {c.snapshot[0]: setup.processes.one_by_one(fetch)}
    files = {}
    for path in sorted(folder.glob("network-snapshot-*.*")):
        files[path.stem.removeprefix("network-snapshot-")] = path
    wanted = {}
    for kimg in c.snapshot:
        if f"{kimg:06d}" not in files:
            raise UserError(f"--aux {folder} has snapshots {[*files]}, not --snapshot {kimg}")
        wanted[kimg] = files[f"{kimg:06d}"]
    return wanted


def synthetic_set(setup: Setup, sampler: Sampler, path: Path):
    """Images of the base at seeds 0, 1, ... with their classes, as an EDM dataset zip."""
    c, processes = setup.c, setup.processes
    if not processes.decide(path.exists):
        images, labels = sampler.images(range(c.synthetic), c.precision, "synthetic set")
        if processes.rank == 0:
            write_dataset(path, images, labels)
        processes.barrier()
    return read_dataset(path, quiet=True)


def train_once(
    setup: Setup,
    net: nn.Module,
    data: Callable,
    recipe: Recipe,
    paths: dict,
    state: Path,
    facts: dict,
) -> None:
    """Leaves the networks of `paths` {kimg: file}, unless they are there. data() -> images, labels;
    facts: what else a network's file says about its origin."""

    def done():
        return all(path.exists() for path in paths.values())

    def save(ema, kimg):
        told = {**facts, "training": dataclasses.asdict(recipe), "kimg": kimg}
        setup.model.save(ema, paths[kimg], told)

    if setup.processes.decide(done):
        return
    images, labels = data()
    state.parent.mkdir(exist_ok=True)
    remove_orphans(state.parent)
    try:
        train(setup.model, net, images, labels, recipe, list(paths), save, state, setup.processes)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory in training with --batch {recipe.batch}: give a smaller one"
        ) from error
    if not setup.processes.decide(done):
        raise UserError(
            f"the saved training in {state.parent} is already past one of --snapshot "
            f"{', '.join(map(str, paths))}: delete {state.name} there to train again"
        )
