"""The command line: options, plan, estimate, run."""

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from .blocks import Merger, block_order, partition_owners
from .config import Config, judge_name
from .diffusers import DiffusersModel, is_pipeline
from .extension import neon_ext
from .files import UserError, printable, reading
from .judges import build_judges, check_judges
from .keys import weights_hash
from .modelfile import FileModel
from .plots import figures_of, plot_report, plot_seeds
from .processes import Diverged, start_processes
from .report import summarise, write_report, write_seeds
from .sampling import Sampler, network_calls, time_sampling
from .scores import ScoreLog, Scorer
from .search import check_grid, grid_points
from .study import (
    get_base,
    get_snapshots,
    save_merged,
    seed_ledger,
    study,
)
from .train import time_training
from .verdicts import summarise_seeds

MAX_HOURS = 2.0  # on a CPU, without --yes


def run(argv, presets, doc):
    """Base, synthetic set, self-training; then each snapshot's grid, search and final comparison;
    report."""
    begin = time.perf_counter()
    c = parse(argv, presets, doc)
    preset = presets[c.preset]
    processes = start_processes(c, preset)
    with processes.alone_in(c.out, c.plan):
        if c.training_seeds == 1:
            study_all(c, preset, argv, processes, begin)
        else:
            study_seeds(c, preset, argv, processes, begin)


def study_all(c, preset, argv, processes, begin):
    """One training seed, from the base to the report -> what summary.json holds, on the first
    rank."""
    ledger = seed_ledger(c, preset.streams)
    model = get_model(c, preset, processes)
    real = processes.one_by_one(partial(preset.real_images, c))
    check_judges(c, preset, real)
    if c.base in preset.bases.values():
        refuse_download(c, preset, model, processes)
    # What judges is complete before anything long begins.
    judges = []
    if real is not None and not c.plan:
        judges = build_judges(c, preset, model, real, processes)
    base = get_base(c, model, real, processes)
    sampler = Sampler(model, base, processes, c.steps, c.sample_batch, c.labels)
    seconds, compilation = time_sampling(sampler, c.precision)
    owners = partition_owners(model, base, c.partition)
    blocks = block_order(owners)
    check_grid(c, blocks)
    refuse_hours(c, seconds, blocks)

    if real is None and not c.plan:
        example = getattr(model, "example", None)  # images that start_check() made
        judges = build_judges(c, preset, model, real, processes, example)
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


def study_seeds(c, preset, argv, processes, begin):
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
            summaries.append(study_all(one, preset, argv, processes, time.perf_counter()))
    if c.plan and processes.rank == 0:
        print(f"and this {c.training_seeds} times, once for every training seed")
    elif processes.rank == 0:
        summary = summarise_seeds(c, argv, summaries, begin)
        write_seeds(summary, c.out)
        plot_report({"seeds.png": (plot_seeds, summary)}, c.out)


def get_model(c, preset, processes):
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
    return preset.model(c)


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


def refuse_download(c, preset, model, processes):
    """The same before EDM's networks are downloaded, from an untrained one of their size."""
    if c.device == "cpu" and not (c.yes or c.plan):
        sampler = Sampler(model, preset.untrained(), processes, c.steps, c.sample_batch)
        seconds, _ = time_sampling(sampler, c.precision)
        refuse_hours(c, seconds, block_order(partition_owners(model, sampler.net, c.partition)))


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


def build_parser(doc, presets):
    parser = Parser(description=doc.split("\n")[0], argument_default=argparse.SUPPRESS)
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


def parse(argv, presets, doc):
    """Command line -> Config: the class's defaults, then the preset's, then what is given."""
    joined = []
    for arg in argv:  # argparse takes the -1:2:0.25 of "--sweep -1:2:0.25" for an option
        if joined and re.match(r"-[\d.]", arg):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    given = vars(build_parser(doc, presets).parse_args(joined))
    for name in ("judge", "select_with"):
        if name in given:
            given[name] = tuple(given[name])
    preset = presets[given.get("preset", "cifar10")]
    defaults = {"out": Path(f"runs/{preset.name}"), **preset.defaults}
    if given.get("protocol") == "paper":
        defaults["labels"] = "random"
        given["select_images"] = 2000
    c = Config(**{**defaults, **given})
    if not c.model and (c.base or not c.train_base):
        c = dataclasses.replace(c, base=preset.bases.get(c.base or "cond", c.base))
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
    built_with_cuda = neon_ext.build_config()["cuda"]  # or the line that says what to install
    if c.device == "cuda" and not (torch.cuda.is_available() and built_with_cuda):
        raise UserError(
            "--device cuda: no usable GPU, or neon_ext was built without CUDA; use --device cpu"
        )
    with reading(f"--out {c.out} cannot be written, choose another folder"):
        c.out.mkdir(parents=True, exist_ok=True)
        if not os.access(c.out, os.W_OK):
            raise PermissionError("no permission")


def interrupt(number, frame):
    raise KeyboardInterrupt(number)


def main(argv, presets, doc):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
            signal.signal(number, interrupt)
    message = None
    try:
        run(sys.argv[1:] if argv is None else argv, presets, doc)
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
