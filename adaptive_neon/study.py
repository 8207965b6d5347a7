"""The method: from a base network to a verdict."""

import dataclasses
import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .blocks import placebo_owners
from .files import UserError, remove_orphans, write_atomically
from .images import read_dataset, write_dataset
from .keys import SAMPLING_VERSION, TRAINING_VERSION, key_of, weights_hash
from .sampling import network_calls
from .scores import FINAL_SEED, SELECT_SEED, SeedSet, best_of
from .search import SEARCHES, score_grid, search_seeds
from .stats import compare, fd_interval
from .train import Recipe, train
from .verdicts import claims_of, final_comparison, warnings_of


def get_base(c, model, real, processes):
    """The base network: given, downloaded, or trained from scratch (untrained for a plan)."""
    if c.base or not c.train_base:
        if c.model and not c.base:
            raise UserError(
                f"--model {c.model} needs --base FILE for its load(), or --train-base KIMG"
            )
        path = processes.one_by_one(partial(model.fetch, c.base, "the base network"))
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


def seed_ledger(c, streams=None):
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
    return Ledger(selection, finals, streams or {})
