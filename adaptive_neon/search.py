"""Searches over block weights: global sweep, grid, race, COBYQA, gradient; and the rule for the
winner."""

import contextlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import scipy.optimize
import torch
from tqdm import tqdm

from .extension import neon_ext
from .files import reading, write_atomically
from .keys import search_key
from .processes import Diverged
from .sampling import halving, network_calls, to_pixels
from .scores import Score, Scorer
from .seeds import SeedSet
from .stats import FOLDS, LEVEL, compare

BOUNDS = (-2.0, 6.0)  # of a search, for every weight


def choose(candidates):
    """The winner: the least distance on the selection's seeds, of several equal ones the first.
    No other line chooses weights."""
    return min(candidates, key=lambda candidate: candidate.fd)


def repairs(candidates):
    """Without the collapsed network, -1 in every block, which is no candidate for a repair."""
    return [candidate for candidate in candidates if set(candidate.w.values()) != {-1.0}]


# -------------------- sweep and grid
def sweep(scorer: Scorer, values) -> list[Score]:
    """Scores of one weight for all blocks, in increasing order."""
    return scorer.score_all(
        sorted({float(value) for value in values}), "global weight", shares=True
    )


def grid_size(blocks: list[str], values, own: dict | None = None) -> int:
    """Points of a grid of these values over the blocks; own: {block: other values}."""
    return math.prod(len((own or {}).get(block, values)) for block in blocks)


def grid(
    scorer: Scorer, values, own: dict | None = None, racing: bool = False, desc: str = "grid"
) -> list[Score]:
    """Scores of all products of the values over the blocks; own: {block: other values}. racing:
    only of those that a race leaves."""
    blocks = scorer.merger.blocks
    lists = [(own or {}).get(block, values) for block in blocks]
    weights = [dict(zip(blocks, point, strict=True)) for point in itertools.product(*lists)]
    if racing and len(weights) > 1:
        weights = race(scorer, weights)
    return scorer.score_all(weights, desc)


def race(scorer: Scorer, weights: list[dict], level: float = LEVEL) -> list[dict]:
    """Candidates that a fifth of the seeds does not separate from the leader: intervals of the
    difference at level / candidates, so that the best is dropped with a probability of at most
    about `level`."""
    selection = scorer.seeds.selection
    few = selection.start(min(selection.count, max(2 * FOLDS, selection.count // 5)))
    scores = scorer.score_all(weights, "race", seeds=few)
    leader = choose(repairs(scores))
    left = []
    for score in scores:
        if compare([score], [leader], level / len(scores)).low <= 0:
            left.append(score.w)
    return left


# -------------------- search without gradients
Start = float | dict[str, float]  # of a search: one weight for all blocks, or one for each


def cobyqa(scorer: Scorer, start: Start, evaluations: int, bounds=BOUNDS) -> list[Score]:
    """Derivative-free trust-region search (scipy's COBYQA) -> its scores, the start first."""
    blocks = scorer.merger.blocks
    scores = []
    quiet = scorer.sampler.processes.rank > 0
    with tqdm(total=evaluations, desc="COBYQA", leave=False, disable=quiet) as bar:

        def distance(x):
            scores.append(scorer.score(dict(zip(blocks, x, strict=True))))
            bar.update()
            return scores[-1].fd

        options = {"initial_tr_radius": 0.5, "final_tr_radius": 0.01, "maxfev": evaluations}
        x = list(scorer.merger.weights(start).values())
        limits = [bounds] * len(blocks)
        scipy.optimize.minimize(distance, x, method="COBYQA", bounds=limits, options=options)
    return scores


# -------------------- search by gradients
class SearchEnds(Exception):
    """A search has used its evaluations, or has not gained for long."""


def descend(
    scorer: Scorer, start: Start, evaluations: int, bounds=BOUNDS, patience: int = 6
) -> list[Score]:
    """The search that scales to layers, from one weight for all blocks -> its scores, the start
    first."""
    return GradientSearch(scorer, start, evaluations, bounds, patience).run()


class GradientSearch:
    """L-BFGS-B (scipy) on all block weights. It descends the distance at one set of fresh seeds;
    each of its points is also scored on the selection seeds, which no gradient has seen, and
    `patience` points without gain there end it, against overfitting. What was computed is kept on
    disk."""

    def __init__(self, scorer: Scorer, start: Start, evaluations: int, bounds, patience: int):
        self.scorer, self.start, self.bounds = scorer, scorer.merger.weights(start), bounds
        self.evaluations, self.patience = evaluations, patience
        self.precision = scorer.selection_precision
        if self.precision == "fp16":
            # It has no exponents for small derivatives: a block's gradient would change its sign.
            self.precision = "fp32"
        self.fresh = scorer.seeds.search
        self.rank = scorer.sampler.processes.rank
        self.path = self.place()
        self.known = scorer.sampler.processes.decide(self.stored)
        self.scores: list[Score] = []  # of its points, in their order
        self.bar = tqdm(
            total=evaluations, desc="gradient search", leave=False, disable=self.rank > 0
        )

    def place(self) -> Path | None:
        """Where its points are kept; None without a folder."""
        merger, folder = self.scorer.merger, self.scorer.log.folder
        if folder is None:
            return None
        key = search_key(
            start=self.scorer.key(self.start, self.scorer.seeds.selection),
            blocks=merger.owners,
            fresh=(self.fresh.first, self.fresh.count),
            bounds=self.bounds,
            precision=self.precision,
        )
        return folder / f"search-{key}.json"

    def stored(self) -> list:
        """[w, distance or None where it is infinite, gradient] of every point of an earlier run."""
        if self.path is None or not self.path.exists():
            return []
        with reading(f"{self.path} is damaged, delete it to search from the start"):
            points = json.loads(self.path.read_text("utf-8"))
            for w, distance, gradient in points:
                if set(w) != set(self.scorer.merger.blocks) or len(gradient) != len(w):
                    raise ValueError("it has points of other blocks")
                if not np.isfinite([distance or 0, *gradient]).all():
                    raise ValueError("it has points without numbers")
            return points

    def run(self) -> list[Score]:
        """The scores of its points, the start first."""
        blocks = len(self.scorer.merger.blocks)
        with self.bar, contextlib.suppress(SearchEnds):
            scipy.optimize.minimize(
                self.scaled,
                np.array(list(self.start.values())),
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
        if steepest == 0 or first is None:
            raise SearchEnds

        # Where the sampler diverges: a wall that the line search sees.
        if distance is None:
            distance = 10 * max(point[1] for point in self.known if point[1] is not None)
        return 0.5 / steepest * distance, 0.5 / steepest * gradient

    def check_end(self) -> None:
        if len(self.scores) == self.evaluations:
            raise SearchEnds
        if self.scores:
            best = self.scores.index(choose(self.scores))
            if len(self.scores) - 1 - best >= self.patience:
                raise SearchEnds

    def point_at(self, x):
        """Distance and gradient at the next point, computed or known."""
        blocks = self.scorer.merger.blocks
        w = self.scorer.merger.weights(dict(zip(blocks, x, strict=True)))
        k = len(self.scores)
        if k < len(self.known) and self.known[k][0] != w:
            del self.known[k:]  # of another scipy
        if k == len(self.known):
            self.compute(w)
        self.scores.append(self.scorer.score(w))
        self.bar.update()
        _, distance, gradient = self.known[k]
        return distance, np.array(gradient)

    def compute(self, w: dict[str, float]) -> None:
        distance, gradient = distance_and_gradient(self.scorer, w, self.fresh, self.precision)
        slopes = [float(gradient[block]) for block in self.scorer.merger.blocks]

        def of_first_rank():
            return [w, float(distance) if math.isfinite(distance) else None, slopes]

        # The last bits may differ between ranks, and with them the end of the search.
        self.known.append(self.scorer.sampler.processes.decide(of_first_rank))
        if self.rank == 0 and self.path is not None:
            write_atomically(self.path, json.dumps(self.known, allow_nan=False))


SEARCHES = {"cobyqa": cobyqa, "gradient": descend}


def distance_and_gradient(
    scorer: Scorer, w: dict[str, float], seeds: SeedSet, precision: str, rounding: bool = True
):
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

    def features_alone(part, batch):
        with torch.no_grad():  # per thread
            found = features_of(part, batch)
        return found.cpu() if processes.world > 1 else found

    # Pass one: the moments, and the distance's derivative in them.
    try:
        with network_calls(net, precision):
            parts = sampler.in_batches(features_alone, seeds.seeds)
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

    def pull_back(part, batch):
        with torch.enable_grad():
            features = features_of(part, batch)
        pull = to_mean / n + 2 * (features.detach().double() - mean) @ to_cov / (n - 1)
        gradients = torch.autograd.grad(
            features, parameters, pull.to(features.dtype), allow_unused=True
        )
        total = dict.fromkeys(merger.blocks, 0.0)
        for name, gradient in zip(names, gradients, strict=True):
            # Sampling may not use a parameter, as EDM's augmentation labels.
            if gradient is not None:
                drift = merger.theta_r[name] - merger.theta_s[name]
                total[merger.owners[name]] += float((gradient.double() * drift).sum())
        return list(total.values())

    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with network_calls(net, precision, checkpointed=True):
            batch = max(1, sampler.batch // 2)
            totals, _ = halving(pull_back, seeds.seeds, batch, processes)
    finally:
        net.requires_grad_(False)
    return fd.item(), dict(zip(merger.blocks, np.sum(totals, axis=0), strict=True))
