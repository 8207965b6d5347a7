"""Searches over block weights: grid, race, COBYQA, gradient."""

import contextlib
import itertools
import math
from functools import partial

import numpy as np
import scipy
import scipy.optimize
import torch
from tqdm import tqdm

from .extension import neon_ext
from .files import UserError, reading, write_atomically
from .keys import SEARCH_VERSION, key_of
from .pickles import checked_torch_load
from .processes import Diverged
from .sampling import network_calls, to_pixels
from .scores import SEARCH_SEED, SeedSet, best_of, fd_of
from .stats import FOLDS, compare

MAX_POINTS = 10_000  # of a grid, without --yes


MAX_POINTS_BESIDE_SEARCH = 100  # of a grid that runs in addition to a search


def search_seeds(count):
    """Seeds of the gradient search, which no score uses."""
    return SeedSet("search", SEARCH_SEED, count)


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
    return [score.w for score in scores if compare([score], [leader], level / len(scores)).low <= 0]


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
