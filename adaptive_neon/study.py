"""The method: from a base network to a verdict. experiment() tells it on one page."""

import contextlib
import dataclasses
import math
import time
from functools import partial

import torch
from torch import nn

from .blocks import Blocks, Merger, block_order, partition, placebo_partitions
from .config import Config
from .controls import (
    EQUAL,
    GUIDANCE,
    GUIDED,
    TRAINED_ON,
    TWICE,
    equal_adherence,
    guided,
    with_settings,
    with_steps,
)
from .files import UserError, write_atomically
from .judges import Judge, build_judges
from .processes import Diverged
from .sampling import Model, Sampler, network_calls
from .scores import Score, ScoreLog, Scorer
from .search import SEARCHES, choose, grid, grid_size, sweep
from .stages import Setup, continued_base, self_trained, trained_base
from .stats import compare, fd_interval
from .verdicts import (
    claims_of,
    final_comparison,
    headline,
    pairs_of,
    primary_pair,
    primary_warnings,
    strongest_control,
    warnings_of,
)

MAX_POINTS = 10_000  # of a grid, without --yes
MAX_POINTS_BESIDE_SEARCH = 100  # of a grid that runs in addition to a search
SHOWN = 64  # images of every model in the pictures


# -------------------- the method
def experiment(setup: Setup, net: nn.Module, sampler: Sampler) -> "Results":
    """Train the base on its own samples, step the other way, block by block, and ask on fresh noise
    and fresh real images whether it is better.

    net: the base, or the untrained network that becomes it. sampler: holds the one network that
    samples.
    """
    c, model, clock = setup.c, setup.model, Clock()

    # What judges is complete before anything long begins.
    example = getattr(model, "example", None)
    judges = build_judges(c, setup.preset, model, setup.real, setup.processes, example)
    log = ScoreLog(c.out)
    clock.ends("judges")

    # theta_r, and theta_s: the same network after training on samples of theta_r.
    base = trained_base(setup, net)
    sampler.write(base)
    clock.ends("base")
    snapshots = self_trained(setup, base, sampler)
    clock.ends("synthetic set and self-training")

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
        clock.ends("global weights")

        # One weight a block, from a grid; and from a search, perhaps over other blocks.
        gridded, found = [], []
        if grid_points(c, scorer.merger.blocks):
            gridded = grid(scorer, c.grid, c.block_grid, c.race)
            models["blockwise"] = Candidate.of(choose(gridded), scorer)
            clock.ends("grid")
        if c.search:
            searcher = scorer
            if c.search_partition:
                searcher = scorer.with_blocks(blocks_of(c.search_partition, model, base))
            found = SEARCHES[c.search](searcher, single_weight(best), c.evaluations, c.bounds)
            models["searched"] = Candidate.of(choose(found), searcher)
            clock.ends("search")

        # The same grid over random blocks: what any further freedom would gain.
        placebos = {}
        for k, owners in enumerate(placebo_partitions(merger, model.layer, c.placebo), 1):
            name = f"random blocks {k}"
            dealt = scorer.with_blocks(owners.__getitem__)
            winner = choose(grid(dealt, c.grid, c.block_grid, c.race, name))
            placebos[name] = Candidate.of(winner, dealt)

        # What a critic asks for first: more steps, more training, guidance instead of new weights.
        controls = controls_of(setup, scorer, values)
        controls |= control_of_equal_adherence(setup, controls, choose(models.values()))
        clock.ends("random blocks and controls")

        # The winners once more, on noise and real images that no selection has seen.
        finals: dict[str, dict] = {judge.name: {} for judge in judges}
        for name, candidate in (models | controls | placebos).items():
            for judge, scores in candidate.scorer.finals(candidate.w, name).items():
                finals[judge][name] = scores
        tried = {"sweep": swept, "grid": gridded, "search": found}
        entries.append(Entry.of(c, scorer, tried, models, controls, placebos, finals))
        clock.ends("final comparison")
        show_and_export(setup, entries[-1])
        clock.ends("pictures and the repaired network")
    return Results(judges, entries, clock.seconds)


class Clock:
    """Seconds by stage, over all snapshots; what an earlier call has finished takes none."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def ends(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now


LANDMARKS = {"base": 0.0, "collapsed": -1.0}


@dataclasses.dataclass(frozen=True)
class Results:
    """What a study ends with."""

    judges: list[Judge]
    entries: list["Entry"]  # one a snapshot
    seconds: dict[str, float]  # by stage


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


# -------------------- blocks and weights that are tried
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


def check_primary(c: Config, blocks: list[str], model: Model) -> None:
    """Refuse a --primary that this run does not compare."""
    models = ["base", "collapsed", "global"]
    if grid_points(c, blocks):
        models.append("blockwise")
    if c.search:
        models.append("searched")
    if "steps" in c.controls:
        models.append(TWICE)
    if "guided" in c.controls:
        models.append(GUIDED)
    if "own" in c.controls:
        models += [f"base, {name}" for name in model.controls]
    if "own" in c.controls and GUIDANCE in model.controls:
        models.append(EQUAL)
    if c.continue_on_data:
        models.append(TRAINED_ON)
    models += [f"random blocks {k}" for k in range(1, c.placebo + 1)]

    pairs = pairs_of(models)
    if primary_pair(models, c.primary) not in pairs:
        claims = ", ".join(f"'{model} against {other}'" for model, other in pairs)
        raise UserError(f"--primary '{c.primary}' is no claim of this run, which has {claims}")


# -------------------- controls
def controls_of(setup: Setup, scorer: Scorer, values: set[float]) -> dict[str, Candidate]:
    """The base with twice the steps, the guided network at its best weight of `values`, the base
    at the best of each of the model's own settings, and on request the base trained on real images
    for as long as the self-training."""
    c = setup.c
    found = {}
    if "steps" in c.controls:
        doubled = with_steps(scorer, 2 * c.steps)
        found[TWICE] = Candidate(scorer.merger.weights(0), None, doubled)
    if "guided" in c.controls:
        guide = guided(scorer)
        if guide is not None:
            tried = guide.score_all(sorted(values - {-1.0, 0.0}), "guided")
            found[GUIDED] = Candidate.of(choose(tried), guide)
        elif setup.processes.rank == 0:
            print("no guided control: the sampler calls parts of the network, not the network")
    if "own" in c.controls:
        for name, settings in setup.model.controls.items():
            other = with_settings(scorer)
            found[f"base, {name}"] = Candidate.of(choose(other.score_all(settings, name)), other)
    if c.continue_on_data:
        kimg = scorer.snapshot if c.continue_on_data < 0 else c.continue_on_data
        further = continued_base(setup, scorer.merger.base, kimg)
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
        found[TRAINED_ON] = Candidate(merger.weights(-1), None, other)
    return found


def control_of_equal_adherence(setup: Setup, controls, repaired) -> dict[str, Candidate]:
    """Where the base was tried over guidance."""
    if f"base, {GUIDANCE}" not in controls:
        return {}
    over = controls[f"base, {GUIDANCE}"].scorer
    score = equal_adherence(over, setup.model.controls[GUIDANCE], repaired)
    return {} if score is None else {EQUAL: Candidate.of(score, over)}


# -------------------- what a study ends with
@dataclasses.dataclass(frozen=True)
class Entry:
    """One snapshot's results."""

    kimg: int
    blocks: dict  # {block: tensors, parameters, drift}
    sweep: list[Score]  # of global weights
    grid: list[Score]  # of the block-wise grid; empty if there was none
    search: list[Score]  # in its order; empty if there was none
    models: dict[str, Candidate]  # base, collapsed, global, blockwise, searched
    controls: dict[str, Candidate]
    final: dict  # {model: final_comparison()}
    placebo: list  # best of each random partition, against global
    warnings: list[str]
    parts: dict  # {part of the selection's joint features: facts, score, final_comparison()}
    judges: dict  # {judge that no selection saw: the same}
    claims: list  # [Claim]
    headline: str  # what it all comes to
    samples: dict  # {model: uint8 [N, C, H, W]}, from the same noise

    @classmethod
    def of(cls, c, scorer, tried, models, controls, placebos, finals) -> "Entry":
        """tried: {sweep, grid, search: [Score]}; finals: {judge: {model: [Score]}}."""
        own = finals[scorer.judge.name]
        random_blocks = []
        for name, candidate in placebos.items():
            gain = compare(own[name], own["global"])
            random_blocks.append(
                {"w": candidate.w, "fd": candidate.fd, "against_global": gain.as_json()}
            )
        final = final_comparison({name: own[name] for name in models | controls})
        warnings = warnings_of(c, models, final, bool(tried["grid"]), scorer.judge)
        warnings += scorer.sampler.model.notes
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
        claims = claims_of(finals, c.primary)
        warnings += primary_warnings(claims, c.primary)
        return cls(
            kimg=scorer.snapshot,
            blocks=scorer.merger.table(),
            **tried,
            models=models,
            controls=controls,
            final=final,
            placebo=random_blocks,
            warnings=warnings,
            parts=parts,
            judges=judges,
            claims=claims,
            headline=headline(claims, final, best_of(models)),
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
            "search": [short(score) for score in self.search],
            "sweep": [short(score) | {"w_global": single_weight(score)} for score in self.sweep],
            **models,
            "final": self.final,
            "placebo": self.placebo,
            "warnings": self.warnings,
            "parts": self.parts,
            "judges": self.judges,
            "claims": [claim.as_json() for claim in self.claims],
            "headline": self.headline,
            "strongest_control": strongest_control(self.final) or None,
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


def best_of(models: dict[str, Candidate]) -> str:
    """The model with the lowest distance on the selection seeds."""
    best = choose(models.values())
    return next(name for name, candidate in models.items() if candidate is best)


def export_best(setup: Setup, entry: Entry) -> None:
    """The best network on the selection seeds with its recipe, and on request as a plain state
    dict."""
    c = setup.c
    name = best_of(entry.models)
    best = entry.models[name]
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
    setup.model.export_merged(merger, best.w, path, recipe)
    if c.export_pt:
        state = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
        write_atomically(path.with_suffix(".pt"), partial(torch.save, state))
