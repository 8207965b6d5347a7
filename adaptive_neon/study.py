"""The method: from a base network to a verdict. experiment() tells it on one page."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from .blocks import Blocks, Merger, block_order, partition, placebo_partitions
from .config import Config, Preset
from .controls import guided, with_steps
from .diffusers import DiffusersModel
from .files import UserError, remove_orphans, write_atomically
from .folders import is_pipeline
from .images import RealData, read_dataset, refuse_empty_classes, write_dataset
from .judges import Judge, build_judges
from .keys import base_key, self_training_key, synthetic_key, weights_hash
from .modelfile import FileModel
from .processes import Diverged, Processes
from .sampling import Model, Sampler, network_calls
from .scores import Score, ScoreLog, Scorer
from .search import SEARCHES, choose, grid, grid_size, sweep
from .seeds import Ledger, seed_ledger
from .stats import compare, fd_interval
from .train import Recipe, train
from .verdicts import claims_of, final_comparison, warnings_of

MAX_POINTS = 10_000  # of a grid, without --yes
MAX_POINTS_BESIDE_SEARCH = 100  # of a grid that runs in addition to a search
SHOWN = 64  # images of every model in the pictures


# -------------------- the method
def experiment(setup: "Setup", net: nn.Module, sampler: Sampler) -> "Results":
    """Train the base on its own samples, step the other way, block by block, and ask on fresh noise
    and fresh real images whether it is better.

    net: the base, or the untrained network that becomes it. sampler: holds the one network that
    samples.
    """
    c, model = setup.c, setup.model

    # What judges is complete before anything long begins.
    example = getattr(model, "example", None)
    judges = build_judges(c, setup.preset, model, setup.real, setup.processes, example)
    log = ScoreLog(c.out)

    # theta_r, and theta_s: the same network after training on samples of theta_r.
    base = trained_base(setup, net)
    sampler.write(base)
    snapshots = self_trained(setup, base, sampler)

    entries = []
    for kimg, path in sorted(snapshots.items()):
        merger = Merger(base, model.load_like(base, path), blocks_of(c.partition, model, base))
        scorer = Scorer(
            sampler, merger, judges, log, setup.seeds, c.precision, c.confirm_precision, kimg
        )

        # One weight for all blocks: the base is 0; the collapsed network, -1, is no candidate.
        values = global_weights(c, merger.blocks)
        swept = sweep(scorer, values)
        models = {name: Candidate.at(swept, w, scorer) for name, w in LANDMARKS.items()}
        if models["base"].fd == math.inf:
            raise UserError("the base network's images are not finite: are its weights sound?")
        best = choose(score for score in swept if single_weight(score) != -1)
        models["global"] = Candidate.at(swept, single_weight(best), scorer)

        # One weight a block, from a grid; and from a search, perhaps over other blocks.
        gridded = []
        if grid_points(c, scorer.merger.blocks):
            gridded = grid(scorer, c.grid, c.block_grid, c.race)
            models["blockwise"] = Candidate.of(choose(gridded), scorer)
        if c.search:
            searcher = scorer
            if c.search_partition:
                searcher = scorer.with_blocks(blocks_of(c.search_partition, model, base))
            found = SEARCHES[c.search](searcher, single_weight(best), c.evaluations, c.bounds)
            models["searched"] = Candidate.of(choose(found), searcher)

        # The same grid over random blocks: what any further freedom would gain.
        placebos = {}
        for k, owners in enumerate(placebo_partitions(merger, model.layer, c.placebo), 1):
            name = f"random blocks {k}"
            dealt = scorer.with_blocks(owners.__getitem__)
            winner = choose(grid(dealt, c.grid, c.block_grid, c.race, name))
            placebos[name] = Candidate.of(winner, dealt)

        # What a critic asks for first: more steps, more training, guidance instead of new weights.
        controls = controls_of(setup, scorer, values)

        # The winners once more, on noise and real images that no selection has seen.
        finals: dict[str, dict] = {judge.name: {} for judge in judges}
        for name, candidate in (models | controls | placebos).items():
            for judge, scores in candidate.scorer.finals(candidate.w, name).items():
                finals[judge][name] = scores
        entries.append(Entry.of(c, scorer, swept, gridded, models, controls, placebos, finals))
        show_and_export(setup, entries[-1])
    return Results(judges, entries)


LANDMARKS = {"base": 0.0, "collapsed": -1.0}


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
        firsts = self.seeds.first_seeds()
        if self.preset.streams:
            firsts["real_streams"] = self.preset.streams
        return firsts


@dataclasses.dataclass(frozen=True)
class Results:
    """What a study ends with."""

    judges: list[Judge]
    entries: list["Entry"]  # one a snapshot


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model of the final comparison: its weights and its distance on the selection seeds."""

    w: dict[str, float]
    fd: float | None  # None where nothing was selected
    scorer: Scorer  # of its blocks, its steps, its way of sampling
    w_global: float | None = None  # the one weight of all blocks, where there is one

    @classmethod
    def of(cls, score: Score, scorer: Scorer) -> "Candidate":
        return cls(score.w, score.fd, scorer)

    @classmethod
    def at(cls, swept: list[Score], w: float, scorer: Scorer) -> "Candidate":
        """That of one weight in a sweep."""
        for score in swept:
            if single_weight(score) == w:
                return cls(score.w, score.fd, scorer, w)
        raise KeyError(w)


def single_weight(score: Score) -> float:
    """Of a score in a sweep: the weight of all its blocks."""
    return next(iter(score.w.values()))


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
        return processes.one_by_one(partial(DiffusersModel, c))
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


def blocks_of(named: str | dict, model: Model, net: nn.Module) -> Blocks:
    """--partition, as Merger takes it."""
    if isinstance(named, dict):
        return named
    if named == "layers":
        return model.layer
    return lambda name: model.block(name, net, named)


def block_names(named: str | dict, model: Model, net: nn.Module) -> list[str]:
    names = [name for name, parameter in net.named_parameters()]
    return block_order(partition(names, blocks_of(named, model, net)))


def global_weights(c: Config, blocks: list[str]) -> set[float]:
    """Of the sweep: base and self-trained network, the grid's values, and over their range as many
    as the grid has points and the search has evaluations, so that nothing wins by being tried more
    often."""
    tried = grid_points(c, blocks)
    if c.search:
        tried = max(tried, c.evaluations)
    even = torch.linspace(min(c.grid), max(c.grid), tried, dtype=torch.float64)
    return {-1.0, 0.0, *c.grid, *c.sweep, *(round(value, 4) for value in even.tolist())}


def grid_points(c: Config, blocks: list[str]) -> int:
    """How many points the grid has; none when a search takes the place of a large one."""
    points = grid_size(blocks, c.grid, c.block_grid)
    if c.search and points > MAX_POINTS_BESIDE_SEARCH and not c.placebo:
        return 0
    return points


def check_grid(c: Config, blocks: list[str]) -> str:
    """Refuse a grid that takes for ever or names a block that is not there; what is to be said of a
    large one."""
    for block in c.block_grid:
        if block not in blocks:
            raise UserError(
                f"--grid {block}=...: this partition has no block {block}, it has {blocks}"
            )
    points = grid_points(c, blocks)
    if points > MAX_POINTS and not c.yes:
        advice = "use --search gradient without --placebo, or add --yes"
        raise UserError(f"the grid has {points} points over {len(blocks)} blocks: {advice}")
    if points > MAX_POINTS_BESIDE_SEARCH:
        return (
            f"the grid has {points} points over {len(blocks)} blocks; --search gradient needs none"
        )
    return ""


# -------------------- controls
def controls_of(setup: Setup, scorer: Scorer, values: set[float]) -> dict[str, Candidate]:
    """The base with twice the steps, the guided network at its best weight of `values`, and on
    request the base trained on real images for as long as the self-training."""
    c = setup.c
    found = {}
    if "steps" in c.controls:
        doubled = with_steps(scorer, 2 * c.steps)
        found["base, twice the steps"] = Candidate(scorer.merger.weights(0), None, doubled)
    if "guided" in c.controls:
        guide = guided(scorer)
        if guide is not None:
            tried = guide.score_all(sorted(values - {-1.0, 0.0}), "guided")
            found["guided"] = Candidate.of(choose(tried), guide)
        elif setup.processes.rank == 0:
            print("no guided control: the sampler calls parts of the network, not the network")
    if c.continue_on_data:
        kimg = scorer.snapshot if c.continue_on_data < 0 else c.continue_on_data
        further = trained_on(setup, scorer.merger.base, kimg)
        merger = Merger(scorer.merger.base, further, lambda name: "all")
        other = Scorer(
            scorer.sampler,
            merger,
            scorer.judges,
            scorer.log,
            setup.seeds,
            c.precision,
            c.confirm_precision,
            scorer.snapshot,
        )
        found["base, trained on"] = Candidate(merger.weights(-1), None, other)
    return found


def trained_on(setup: Setup, base: nn.Module, kimg: float) -> nn.Module:
    """The base after so many thousand real images more, by the recipe of the self-training."""
    c, model, real = setup.c, setup.model, setup.real
    assert real is not None  # see prepare()
    recipe = dataclasses.replace(self_recipe(c), name="training on")
    key = base_key(
        initial=weights_hash(base),
        kimg=kimg,
        images=real.training.identity,
        model=model.training_identity,
        recipe=dataclasses.asdict(recipe),
    )
    path = c.out / f"continued-{key}.safetensors"
    state = path.with_name(f"training-state-{path.stem}.safetensors")

    def images():
        return real.training.images, real.training.labels

    train_once(setup, model.trainable(base, c), images, recipe, {kimg: path}, state, {})
    if setup.processes.rank == 0:
        state.unlink(missing_ok=True)
    return model.load_like(base, path)


# -------------------- training stages: what is finished is read back
def trained_base(setup: Setup, net: nn.Module) -> nn.Module:
    """The base: as it was given, or trained from `net` on the training part of the real images."""
    c, model, real = setup.c, setup.model, setup.real
    if not c.train_base:
        return net
    assert real is not None
    recipe = base_recipe(c)
    path = base_path(setup, net)
    state = path.with_name(f"training-state-{path.stem}.safetensors")

    def images():
        return real.training.images, real.training.labels

    train_once(setup, net, images, recipe, {c.train_base: path}, state, {})
    if setup.processes.rank == 0:
        state.unlink(missing_ok=True)
    base = model.load_like(net, path)
    try:
        check_model(setup, base, trained=True)
    except UserError as error:
        raise UserError(f"{error} (the trained base is kept: {path})") from error
    return base


def base_recipe(c: Config) -> Recipe:
    """Ramp and average are a twentieth of the whole, as EDM's are of its 200 million images."""
    return Recipe(
        name="base",
        batch=c.batch,
        lr=c.base_lr,
        ramp_kimg=c.train_base / 20,
        ema_kimg=c.train_base / 20,
        seed=c.seed,
        ramp_ratio=0.05,
        precision=c.train_precision,
    )


def base_path(setup: Setup, net: nn.Module) -> Path:
    """Where a base that is trained from `net` is kept."""
    assert setup.real is not None
    key = base_key(
        initial=weights_hash(net),
        kimg=setup.c.train_base,
        images=setup.real.training.identity,
        model=setup.model.training_identity,
        recipe=dataclasses.asdict(base_recipe(setup.c)),
    )
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


# -------------------- what a study ends with
@dataclasses.dataclass(frozen=True)
class Entry:
    """One snapshot's results."""

    kimg: int
    blocks: dict  # {block: tensors, parameters, drift}
    sweep: list[Score]  # of global weights
    grid: list[Score]  # of the block-wise grid; empty if there was none
    models: dict[str, Candidate]  # base, collapsed, global, blockwise, searched
    controls: dict[str, Candidate]
    final: dict  # {model: final_comparison()}
    placebo: list  # best of each random partition, against global
    warnings: list[str]
    parts: dict  # {part of the selection's joint features: facts, score, final_comparison()}
    judges: dict  # {judge that no selection saw: the same}
    claims: list  # [Claim]
    samples: dict  # {model: uint8 [N, C, H, W]}, from the same noise

    @classmethod
    def of(cls, c, scorer, swept, gridded, models, controls, placebos, finals) -> "Entry":
        """finals: {judge: {model: [Score]}}."""
        own = finals[scorer.judge.name]
        random_blocks = []
        for name, candidate in placebos.items():
            gain = compare(own[name], own["global"])
            random_blocks.append(
                {"w": candidate.w, "fd": candidate.fd, "against_global": gain.as_json()}
            )
        final = final_comparison({name: own[name] for name in models | controls})
        warnings = warnings_of(c, models, final, bool(gridded), scorer.judge)
        if len(placebos) < c.placebo:
            warnings.append(
                f"--placebo {c.placebo}: the layers allow only {len(placebos)} other blocks"
            )
        if scorer.merger.rule():
            warnings.append(scorer.merger.rule())

        parts: dict[str, dict] = {}
        judges: dict[str, dict] = {}
        for judge in scorer.judges[1:]:
            found = finals[judge.name]
            if judge.is_part:
                del finals[judge.name]  # no claim counts what the selection has seen
            where = parts if judge.is_part else judges
            where[judge.name] = judge.facts | {
                "score": judge.features.score,
                "final": final_comparison(found),
            }
        return cls(
            kimg=scorer.snapshot,
            blocks=scorer.merger.table(),
            sweep=swept,
            grid=gridded,
            models=models,
            controls=controls,
            final=final,
            placebo=random_blocks,
            warnings=warnings,
            parts=parts,
            judges=judges,
            claims=claims_of(finals),
            samples={},
        )

    def as_json(self) -> dict:
        def short(score):
            row = {"w": score.w, "fd": score.fd, "seconds": score.seconds}
            row |= fd_interval([score])
            if score.precision is not None:
                row |= {"precision": score.precision, "recall": score.recall}
            return row

        models: dict[str, dict] = {}
        for name, candidate in (self.models | self.controls).items():
            models[name] = {"w": candidate.w}
            if candidate.fd is not None:
                models[name]["fd"] = candidate.fd
            if name == "global":
                models[name]["w_global"] = candidate.w_global
        return {
            "kimg": self.kimg,
            "blocks": self.blocks,
            "grid": [short(score) for score in self.grid],
            "sweep": [short(score) | {"w_global": single_weight(score)} for score in self.sweep],
            **models,
            "final": self.final,
            "placebo": self.placebo,
            "warnings": self.warnings,
            "parts": self.parts,
            "judges": self.judges,
            "claims": [claim.as_json() for claim in self.claims],
        }


def show_and_export(setup: Setup, entry: Entry) -> None:
    """Pictures of all models from the same noise; and the best one as a file."""
    c = setup.c
    shown = setup.seeds.finals[0].seeds[: min(SHOWN, c.sample_batch)]
    for name, candidate in entry.models.items():
        sampler = candidate.scorer.sampler
        candidate.scorer.merger.set(candidate.w)
        with contextlib.suppress(Diverged), network_calls(sampler.net, c.precision):
            images, _ = sampler.batch_images(shown)
            entry.samples[name] = images.cpu()
    if setup.processes.rank == 0:
        export_best(setup, entry)


def export_best(setup: Setup, entry: Entry) -> None:
    """The best network on the selection seeds with its recipe, and on request as a plain state
    dict."""
    c = setup.c
    best = choose(entry.models.values())
    (name,) = [name for name, candidate in entry.models.items() if candidate is best]
    merger = best.scorer.merger
    named = c.partition
    if name == "searched" and c.search_partition:
        named = c.search_partition
    recipe = {
        "model": name,
        "w": best.w,
        "partition": named,
        "base_weights": merger.base_hash,
        "aux_weights": merger.aux_hash,
    }
    path = c.out / f"adaptive-neon-{entry.kimg:06d}"
    net = merger.set(best.w)
    setup.model.export(net, path, recipe)
    if c.export_pt:
        state = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
        write_atomically(path.with_suffix(".pt"), partial(torch.save, state))
