"""The command line: options, plan, estimate, run."""

import argparse
import dataclasses
import os
import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from .blocks import Merger
from .command import Parser, run_command
from .config import Config, Preset, grid_values
from .controls import GUIDED, TWICE
from .extension import neon_ext
from .files import UserError, reading
from .folders import is_pipeline
from .judges import check_judges
from .page import write_report, write_seeds
from .processes import start_processes
from .report import summarise
from .sampling import Sampler
from .stages import Setup, base_path, first_network, given_snapshots, prepare, self_training
from .study import (
    block_names,
    blocks_of,
    check_grid,
    check_primary,
    experiment,
    global_weights,
    grid_points,
    models_of,
)
from .text import asked_of_text
from .train import SHARE, time_training
from .verdicts import summarise_seeds

MAX_HOURS = 2.0  # on a CPU, without --yes


# -------------------- a run
def run(argv: list[str], presets: Mapping[str, Preset], doc: str) -> None:
    """One study, or one for every training seed."""
    begin = time.perf_counter()
    c = parse(argv, presets, doc)
    preset = presets[c.preset]
    processes = start_processes(c.device, c.threads or preset.threads, preset.small)
    with processes.alone_in(c.out, c.plan):
        if c.training_seeds == 1:
            study_one(c, preset, argv, processes, begin)
        else:
            study_seeds(c, preset, argv, processes, begin)


def study_one(c, preset, argv, processes, begin) -> dict | None:
    """One training seed, from the base to the report -> what summary.json holds, on the first
    rank."""
    setup = prepare(c, preset, processes)
    check_judges(c, preset, setup.real)
    if c.base in preset.bases.values():
        refuse_download(setup)
    net = first_network(setup)
    sampler = Sampler(setup.model, net, c.steps, c.sample_batch, c.labels, processes)
    cost = Cost.of(setup, net, sampler)
    remark = check_grid(c, cost.blocks)
    check_primary(c, cost.models)
    if remark and processes.rank == 0:
        print(remark)
    if c.plan:
        print_plan(setup, net, sampler, cost)
        return None
    refuse_hours(c, cost)

    results = experiment(setup, net, sampler)
    if processes.rank > 0:
        return None
    summary = summarise(c, argv, results, setup, cost.seconds_per_image, processes, begin)
    write_report(summary, results.samples, c.out)
    return summary


def study_seeds(c, preset, argv, processes, begin) -> None:
    """The whole study for every training seed, each in a folder of its own; then what holds over
    the seeds."""
    if c.aux:
        raise UserError("--training-seeds repeats the self-training, and --aux is trained already")
    summaries = []
    for k in range(1 if c.plan else c.training_seeds):
        # The base takes this seed, the self-training the next one.
        one = dataclasses.replace(c, seed=c.seed + 2 * k, out=c.out / f"seed-{k}")
        if not c.plan:
            one.out.mkdir(exist_ok=True)
        with processes.alone_in(one.out, c.plan):
            summaries.append(study_one(one, preset, argv, processes, time.perf_counter()))
    if c.plan and processes.rank == 0:
        print(f"and this {c.training_seeds} times, once for every training seed")
    elif processes.rank == 0:
        summary = summarise_seeds(c, argv, summaries, begin)
        write_seeds(summary, c.out)


# -------------------- what it will cost
@dataclasses.dataclass(frozen=True)
class Cost:
    """What one training seed will take; features are not counted."""

    blocks: list[str]
    models: list[str]  # of the final comparison
    seconds_per_image: float
    compilation: float  # seconds
    scores: int  # of one snapshot, on the selection seeds
    finals: int  # of one snapshot, on the final seeds
    sampling_hours: float  # of all snapshots and the synthetic set

    @classmethod
    def of(cls, setup: Setup, net: nn.Module, sampler: Sampler) -> "Cost":
        c = setup.c
        seconds, compilation = sampler.seconds_per_image(c.precision)
        blocks = block_names(c.partition, setup.model, net)
        weights = len(global_weights(c, blocks))
        own = setup.model.controls.values() if "own" in c.controls else []
        scores = weights + sum(len(tried) for tried in own)
        scores += 2 * (weights - 2) * ("guided" in c.controls)  # two network calls each
        scores += grid_points(c, blocks) * (1 + c.placebo)
        if c.search:
            # A gradient costs about as much as five scores, and its point is scored too.
            scores += c.evaluations * {"cobyqa": 1, "gradient": 6}[c.search]
        models = models_of(c, blocks, setup.model)
        finals = (len(models) + (TWICE in models) + (GUIDED in models)) * c.final_repeats
        images = (scores * c.select_images + finals * c.final_images) * len(c.snapshot)
        hours = (images + c.synthetic) * seconds / 3600 / setup.processes.world
        return cls(blocks, models, seconds, compilation, scores, finals, hours + compilation / 3600)


def refuse_hours(c: Config, cost: Cost) -> None:
    """On a CPU, long runs only on request: it says how long it would take."""
    hours = cost.sampling_hours * c.training_seeds
    if c.device == "cpu" and not c.yes and hours > MAX_HOURS:
        raise UserError(
            f"without a GPU this takes about {hours:.0f} hours of sampling alone: add --yes to run "
            "it all the same, or try --preset glyphs"
        )


def refuse_download(setup: Setup) -> None:
    """The same before a preset's own networks are downloaded, from an untrained one of their
    size."""
    c = setup.c
    if c.device == "cpu" and not (c.yes or c.plan):
        net = setup.preset.untrained()
        sampler = Sampler(setup.model, net, c.steps, c.sample_batch, c.labels, setup.processes)
        refuse_hours(c, Cost.of(setup, net, sampler))


def print_plan(setup: Setup, net: nn.Module, sampler: Sampler, cost: Cost) -> None:
    """Blocks, drift and time of every snapshot; the base stands for one that is not trained yet."""
    c, model, world = setup.c, setup.model, setup.processes.world
    base, training = net, 0.0
    if c.train_base:
        path = base_path(setup, net)
        if path.exists():
            base = model.load_like(net, path)
        else:
            training += c.train_base
    if c.aux:
        snapshots = given_snapshots(setup)
    else:
        snapshots, _, _ = self_training(setup, base)
    if setup.processes.rank > 0:
        return

    for path in snapshots.values():
        trained = path.exists()
        aux = model.load_like(base, path) if trained else base
        merger = Merger(base, aux, blocks_of(c.partition, model, base))
        head = f"{'block':<24}{'tensors':>8}{'parameters':>12}  "
        print(head + "drift ||theta_s - theta_r|| / ||theta_r||")
        for block, row in merger.table().items():
            drift = f"{row['drift']:.5f}" if trained else "not trained yet"
            print(f"{block:<24}{row['tensors']:>8}{row['parameters']:>12}  {drift}")
        if trained and merger.rule():
            print(merger.rule())
        print(
            f"about {cost.scores} scores of {c.select_images} images and {cost.finals} final ones "
            f"of {c.final_images}"
        )

    hours = cost.sampling_hours
    if not all(path.exists() for path in snapshots.values()):
        training += max(snapshots)
    if training:
        took = training * 1000 * time_training(c, model, base) / 3600 / world
        hours += took
        print(f"training on {training:g} kimg: {took:.2f} hours")
    print(
        f"synthetic set, training, scores and {cost.compilation:.0f} s of compilation: {hours:.2f} "
        f"hours on {world} x {c.device}, without the time of the features"
    )


# -------------------- options
def in_range(field, text):
    """An option's value, its numbers within the option's range."""
    how = field.metadata
    value = how["kind"](text)
    numbers = value
    if isinstance(value, dict) and how["kind"] is grid_values:
        (numbers,) = value.values()
    for number in numbers if isinstance(numbers, tuple) else (numbers,):
        if isinstance(number, (int, float)) and not how["low"] <= number <= how["high"]:
            raise argparse.ArgumentTypeError(
                f"{text} is out of range, it goes from {how['low']:g} to {how['high']:g}"
            )
    return value


def build_parser(doc: str, presets: Mapping[str, Preset]) -> Parser:
    parser = Parser(description=doc.split("\n")[0], argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Config):
        how = field.metadata
        if not how:
            continue
        name = "--" + field.name.replace("_", "-")
        text = how["help"]
        if field.default is not dataclasses.MISSING:
            text += f" (default: {field.default})"
        choices = tuple(presets) if field.name == "preset" else how["choices"]
        if how["kind"] is bool:
            parser.add_argument(name, action="store_true", help=text)
            continue
        kind = partial(in_range, field)
        vars(kind)["__name__"] = getattr(how["kind"], "__name__", "value")  # for messages
        parser.add_argument(name, type=kind, choices=choices, help=text, **how["parsing"])
    return parser


def parse(argv: list[str], presets: Mapping[str, Preset], doc: str) -> Config:
    """Command line -> Config: the class's defaults, then the preset's, then what is given."""
    joined: list[str] = []
    for arg in argv:  # argparse takes the -1:2:0.25 of "--sweep -1:2:0.25" for an option
        if joined and re.match(r"-[\d.]", arg):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    given = vars(build_parser(doc, presets).parse_args(joined))
    for name in ("judge", "select_with"):
        if name in given:
            given[name] = tuple(given[name])
    for one in given.pop("grid", []):
        ((block, values),) = one.items()
        if block:
            given.setdefault("block_grid", {})[block] = values
        else:
            given["grid"] = values

    preset = presets[given.get("preset", Config.preset)]
    name = preset.name
    if given.get("model") and "preset" not in given:
        name = Path(given["model"]).stem
    defaults = {"out": Path(f"runs/{name}"), **preset.defaults}
    if given.get("protocol") == "paper":
        defaults |= {"labels": "random", "select_images": 2000}
    c = Config(**{**defaults, **given})

    # The base is a network that is there, or one that is trained here.
    if c.base and given.get("train_base"):
        raise UserError("--base names a network and --train-base trains one: give one of them")
    if c.base:
        c = dataclasses.replace(c, train_base=0.0)
    if not c.model and not c.train_base:
        c = dataclasses.replace(
            c, base=preset.bases.get(c.base or next(iter(preset.bases)), c.base)
        )

    if c.model or is_pipeline(c.base):
        if given.get("s_churn"):
            raise UserError("--s-churn is for EDM's networks: leave it out")
        c = dataclasses.replace(c, s_churn=0.0)  # of the preset

        # NEON's are made for EDM's networks; others would hardly move in a short self-training.
        for name in {"ramp_kimg", "ema_kimg"} - {*given, *preset.defaults}:
            c = dataclasses.replace(c, **{name: min(c.snapshot) / SHARE})

    if c.device == "cpu" and c.precision == "tf32":
        c = dataclasses.replace(c, precision="fp32")
    check_combinations(c)
    check_machine(c)
    return c


def check_combinations(c: Config) -> None:
    """Options that contradict each other."""
    if len(c.bounds) != 2:
        raise UserError("--bounds: give two numbers, low,high")
    if c.placebo and c.partition == "layers":
        raise UserError("--placebo draws random blocks of several layers: use another --partition")
    if c.model or not is_pipeline(c.base):
        asked = asked_of_text(c) + ["--guidance"] * (c.guidance not in (None, 1))
        if asked:
            raise UserError(f"{asked[0]} is for pipelines of diffusers as --base: leave it out")
    if c.partition in ("paper", "structural") and not c.model:
        check_grid(c, ["enc", "mid", "dec"])


def check_machine(c: Config) -> None:
    """The extension, the device and a folder to write into."""
    built_with_cuda = neon_ext.build_config()["cuda"]  # or the line that says what to install
    if c.device == "cuda" and not (torch.cuda.is_available() and built_with_cuda):
        raise UserError(
            "--device cuda: no usable GPU, or neon_ext was built without CUDA; use --device cpu"
        )
    with reading(f"--out {c.out} cannot be written, choose another folder"):
        c.out.mkdir(parents=True, exist_ok=True)
        if not os.access(c.out, os.W_OK):
            raise PermissionError("no permission")


# -------------------- the process
def main(argv: list[str] | None, presets: Mapping[str, Preset], doc: str) -> None:
    """A whole run; what the user can mend is one line and exit code 2."""

    def work(options):
        try:
            run(options, presets, doc)
        finally:
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()

    run_command("edm_neon", work, argv)
