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
from .search import SEARCHES, choose, grid, grid_size, repairs, sweep
from .stages import Setup, continued_base, self_trained, trained_base
from .stats import compare, fd_interval
from .verdicts import (
    claims_of,
    edge_warnings,
    final_comparison,
    headline,
    pairs_of,
    primary_pair,
    primary_warnings,
    strongest_control,
    training_warnings,
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

    entries, samples = [], {}
    for kimg, path in sorted(snapshots.items()):
        merger = Merger(base, model.load_like(base, path), blocks_of(c.partition, model, base))
        scorer = Scorer(
            sampler, merger, judges, log, setup.seeds, c.precision, c.confirm_precision, kimg
        )

        # One weight for all blocks: the base is 0, the collapsed network -1.
        values = global_weights(c, merger.blocks)
        swept = sweep(scorer, values)
        scored = {single_weight(score.w): score for score in swept}
        best = choose(repairs(swept))
        models = {
            "base": Candidate.of(scored[0], scorer),
            "collapsed": Candidate.of(scored[-1], scorer),
            "global": Candidate.of(best, scorer),
        }
        if models["base"].fd == math.inf:
            raise UserError("the base network's images are not finite: are its weights sound?")
        clock.ends("global weights")

        # One weight a block, from a grid; and from a search, perhaps over other blocks.
        gridded, found = [], []
        if grid_points(c, merger.blocks):
            gridded = grid(scorer, c.grid, c.block_grid, c.race)
            models["blockwise"] = Candidate.of(choose(repairs(gridded)), scorer)
            clock.ends("grid")
        if c.search:
            searcher = scorer
            if c.search_partition:
                blocks = blocks_of(c.search_partition, model, base)
                searcher = scorer.of(merger.with_blocks(blocks))
            start = single_weight(best.w)
            found = SEARCHES[c.search](searcher, start, c.evaluations, c.bounds)
            models["searched"] = Candidate.of(choose(repairs(found)), searcher)
            clock.ends("search")

        # The same grid over random blocks: what any further freedom would gain.
        placebos = {}
        for k, owners in enumerate(placebo_partitions(merger, model.layer, c.placebo), 1):
            name = f"random blocks {k}"
            dealt = scorer.of(merger.with_blocks(owners.__getitem__))
            winner = choose(repairs(grid(dealt, c.grid, c.block_grid, c.race, name)))
            placebos[name] = Candidate.of(winner, dealt)

        # What a critic asks for first: more steps, more training, guidance instead of new weights.
        controls = controls_of(setup, scorer, values)
        controls |= control_of_equal_adherence(setup, controls, models[best_of(models)])
        clock.ends("random blocks and controls")

        # The winners once more, on noise and real images that no selection has seen.
        finals: dict[str, dict] = {judge.name: {} for judge in judges}
        for name, candidate in (models | controls | placebos).items():
            for judge, scores in candidate.scorer.finals(candidate.w, name).items():
                finals[judge][name] = scores
        tried = {"grid": gridded, "search": found, "sweep": swept}
        entries.append(entry_of(c, scorer, tried, models, controls, placebos, finals))
        clock.ends("final comparison")

        samples[kimg] = pictures_of(setup, models)
        if setup.processes.rank == 0:
            export_best(setup, kimg, models)
        clock.ends("pictures and the repaired network")
    return Results(judges, entries, samples, clock.seconds)


class Clock:
    """Seconds by stage, over all snapshots; what an earlier call has finished takes none."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def ends(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now


@dataclasses.dataclass(frozen=True)
class Results:
    """What a study ends with."""

    judges: list[Judge]
    entries: list[dict]  # one a snapshot: see entry_of()
    samples: dict  # {kimg: {model: uint8 [N, C, H, W]}}, from the same noise
    seconds: dict[str, float]  # by stage


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model of the final comparison: its weights and its distance on the selection seeds."""

    w: dict[str, float]
    fd: float | None  # None where nothing was selected
    scorer: Scorer  # of its blocks, its steps, its way of sampling

    @classmethod
    def of(cls, score: Score, scorer: Scorer) -> "Candidate":
        return cls(score.w, score.fd, scorer)


def single_weight(w: dict[str, float]) -> float:
    """That of all blocks."""
    return next(iter(w.values()))


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
    if all(set(c.grid_of(block)) == {-1.0} for block in blocks):
        raise UserError(
            "--grid -1 holds nothing but the collapsed network: give other weights, too"
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


def models_of(c: Config, blocks: list[str], model: Model) -> list[str]:
    """Names of all that this run compares in the end."""
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
    return models + [f"random blocks {k}" for k in range(1, c.placebo + 1)]


def check_primary(c: Config, models: list[str]) -> None:
    """Refuse a --primary that this run does not compare."""
    pairs = pairs_of(models)
    if primary_pair(models, c.primary) not in pairs:
        claims = ", ".join(f"'{model} against {other}'" for model, other in pairs)
        raise UserError(f"--primary '{c.primary}' is no claim of this run, which has {claims}")


# -------------------- controls
def controls_of(setup: Setup, scorer: Scorer, values: set[float]) -> dict[str, Candidate]:
    """The base with twice the steps, the guided network at its best weight of `values`, the base
    at the best of each of the model's own settings, and on request the base trained on real images
    for as long as the self-training."""
    c, merger = setup.c, scorer.merger
    found = {}
    if "steps" in c.controls:
        doubled = with_steps(scorer, 2 * c.steps)
        found[TWICE] = Candidate(merger.weights(0), None, doubled)

    # {control: its scores, the settings to try, what a progress bar says}
    tried: dict[str, tuple[Scorer, list[dict], str]] = {}
    if "guided" in c.controls:
        guide = guided(scorer)
        if guide is not None:
            steps = [{GUIDANCE: round(w, 6)} for w in sorted(values - {-1.0, 0.0})]
            tried[GUIDED] = guide, steps, "guided"
        elif setup.processes.rank == 0:
            print("no guided control: the sampler calls parts of the network, not the network")
    if "own" in c.controls:
        for name, settings in setup.model.controls.items():
            tried[f"base, {name}"] = with_settings(scorer), settings, name
    for name, (other, settings, desc) in tried.items():
        found[name] = Candidate.of(choose(other.score_all(settings, desc)), other)

    if c.continue_on_data:
        kimg = scorer.snapshot if c.continue_on_data < 0 else c.continue_on_data
        further = Merger(merger.base, continued_base(setup, merger.base, kimg), {"*": "all"})
        found[TRAINED_ON] = Candidate(further.weights(-1), None, scorer.of(further))
    return found


def control_of_equal_adherence(setup: Setup, controls, repaired) -> dict[str, Candidate]:
    """Where the base was tried over guidance."""
    if f"base, {GUIDANCE}" not in controls:
        return {}
    over = controls[f"base, {GUIDANCE}"].scorer
    score = equal_adherence(over, setup.model.controls[GUIDANCE], repaired)
    return {} if score is None else {EQUAL: Candidate.of(score, over)}


# -------------------- what a study ends with
def entry_of(c: Config, scorer: Scorer, tried, models, controls, placebos, finals) -> dict:
    """One snapshot's results, plain data. tried: {grid, search, sweep: [Score]}; models, controls,
    placebos: {name: Candidate}; finals: {judge: {model: [Score]}}."""
    own = finals[scorer.judge.name]
    final = final_comparison({name: own[name] for name in models | controls})
    entry: dict = {"kimg": scorer.snapshot, "blocks": scorer.merger.table()}
    for stage, scores in tried.items():
        entry[stage] = [selection_row(score, stage) for score in scores]
    for name, candidate in (models | controls).items():
        entry[name] = {"w": candidate.w}
        if candidate.fd is not None:
            entry[name]["fd"] = candidate.fd
    entry["global"]["w_global"] = single_weight(models["global"].w)

    random_blocks = []
    for name, candidate in placebos.items():
        gain = compare(own[name], own["global"]).as_json()
        random_blocks.append({"w": candidate.w, "fd": candidate.fd, "against_global": gain})

    # No claim counts a part of what the selection has seen.
    parts: dict[str, dict] = {}
    judges: dict[str, dict] = {}
    for judge in scorer.judges[1:]:
        where = parts if judge.is_part else judges
        compared = final_comparison(finals[judge.name])
        where[judge.name] = judge.facts | {"score": judge.features.score, "final": compared}
    claims = claims_of({name: finals[name] for name in finals if name not in parts}, c.primary)

    warnings = training_warnings(entry["blocks"], final)
    warnings += edge_warnings(c, models, [single_weight(score.w) for score in tried["sweep"]])
    warnings += warnings_of(c, models, final, bool(tried["grid"]), scorer.judge)
    warnings += scorer.sampler.model.notes
    if len(placebos) < c.placebo:
        allowed = f"the layers allow only {len(placebos)} other blocks"
        warnings.append(f"--placebo {c.placebo}: {allowed}")
    if scorer.merger.rule():
        warnings.append(scorer.merger.rule())
    return entry | {
        "final": final,
        "placebo": random_blocks,
        "warnings": warnings + primary_warnings(claims, c.primary),
        "parts": parts,
        "judges": judges,
        "claims": claims,
        "headline": headline(claims, final, best_of(models)),
        "strongest_control": strongest_control(final) or None,
    }


def selection_row(score: Score, stage: str) -> dict:
    """One point of a sweep, grid or search."""
    row = {"w": score.w, "fd": score.fd, "seconds": score.seconds} | fd_interval([score])
    if score.precision is not None:
        row |= {"precision": score.precision, "recall": score.recall}
    if stage == "sweep":
        row["w_global"] = single_weight(score.w)
    return row


def pictures_of(setup: Setup, models: dict[str, Candidate]) -> dict[str, torch.Tensor]:
    """{model: uint8 [N, C, H, W]}, all from the same noise; without those that diverge."""
    c, samples = setup.c, {}
    shown = setup.seeds.finals[0].seeds[: min(SHOWN, c.sample_batch)]
    for name, candidate in models.items():
        sampler = candidate.scorer.sampler
        candidate.scorer.merger.set(candidate.w)
        with contextlib.suppress(Diverged), network_calls(sampler.net, c.precision):
            samples[name] = sampler.batch_images(shown)[0].cpu()
    return samples


def best_of(models: dict[str, Candidate]) -> str:
    """The model with the lowest distance on the selection seeds, which is exported."""
    best = choose(repairs(models.values()))
    return next(name for name, candidate in models.items() if candidate is best)


def export_best(setup: Setup, kimg: int, models: dict[str, Candidate]) -> None:
    """The best network on the selection seeds with its recipe, and on request as a plain state
    dict."""
    c = setup.c
    name = best_of(models)
    best = models[name]
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
    path = c.out / f"adaptive-neon-{kimg:06d}"
    setup.model.export_merged(merger, best.w, path, recipe)
    if c.export_pt:
        net = merger.set(best.w)
        state = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
        write_atomically(path.with_suffix(".pt"), partial(torch.save, state))
