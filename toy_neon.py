"""Toy experiment of Adaptive NEON: repair a small diffusion model that was trained on itself.

    theta = theta_r - w_layer * (theta_s - theta_r)    w > 0: away from collapse, w = -1: theta_s

theta_r: six layers trained on 1000 points of a 2-D Gaussian; theta_s: the same network after
training on its own samples (arXiv 2510.03597; Adaptive NEON, section 4.1). DDIM is a deterministic
map, so the Fréchet distance (FD) is an integral over its starting noise, computed with Sobol
points. Beside it stands the sliced 2-Wasserstein distance (SW2), which no search sees unless it
says so.

    python toy_neon.py --delta 1.72                  one layer-wise grid of 729 configurations
    python toy_neon.py --delta all --seeds 5 --search gradient --alignment    the recorded study

Exit codes: 0 done, 2 bad input or a file that cannot be read or written, 130 Ctrl-C, 143 SIGTERM.
"""

# ruff: noqa: E402  imports follow the signal handler on purpose
import os
import signal


def leave_quietly(number, frame):
    os._exit(128 + number)


# The imports take seconds: a Ctrl-C in them is no fault of ours to be traced.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, leave_quietly)

import argparse
import functools
import itertools
import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.optimize
import torch
from scipy.special import ndtri
from scipy.stats import qmc
from torch.nn.functional import linear
from tqdm import tqdm

from adaptive_neon import files
from adaptive_neon.command import Parser, run_command
from adaptive_neon.extension import neon_ext
from adaptive_neon.files import write_atomically
from adaptive_neon.page import Page, Panel, Part, Table, write_page
from adaptive_neon.parts import finished
from adaptive_neon.plots import INK, drawn, new_figure
from adaptive_neon.processes import threads
from adaptive_neon.report import markdown, strict, terminal_text, write_texts

# ---------------------------------------------------------------- the setting
# A constant that reaches a number belongs into constants() below, which is part of every key.
VERSION = 5  # raise it with every change of code that changes numbers: older results are then void
TARGET_MEAN = (0.0, 0.0)
TARGET_COV = ((2.0, 1.0), (1.0, 2.0))
LAYERS = ("input", "block 0", "block 1", "block 2", "block 3", "output")
SHAPES = ((32, 3), (32, 32), (32, 32), (32, 32), (32, 32), (2, 32))  # outputs, inputs by layer
NOISE_LEVELS = 1000  # of the schedule in training
SAMPLE_STEPS = 20  # of the schedule in sampling
SCHEDULE_OFFSET = 0.008
SW2_DIRECTIONS = 32

SIZES = tuple(n_out * (n_in + 1) for n_out, n_in in SHAPES)  # parameters of each layer, 4418 in all
OFFSETS = [0, *itertools.accumulate(SIZES)]
DESCENTS = (("fd", "global"), ("fd", "zero"), ("sw2", "global"), ("sw2", "zero"))  # score, start
GLOBAL_W = tuple(np.linspace(-2, 2, 101).round(4).tolist())

# What the paper reports, for the table and the pictures.
DELTAS = (0.05, 0.1, 0.2, 0.4, 0.6, 1.0, 1.5, 1.72)
PAPER_FD = (0.033162, 0.033426, 0.031258, 0.025099, 0.020841, 0.015483, 0.011345, 0.009516)
PAPER_ROWS = {"base": 0.1626, "global": 0.03554}
PAPER_OPTIMA = {  # of the self-training settings: best global w and its FD
    "zeta 1.1, 50 epochs": (1.20, 0.0268),
    "zeta 1.1, 250 epochs": (0.28, 0.0355),
    "zeta 0.9, 50 epochs": (-1.04, 0.0521),
    "zeta 0.9, 250 epochs": (-0.28, 0.0527),
}
MAIN = "zeta 1.1, 250 epochs"  # the setting that the layers are studied in
PAPER_ALIGNMENT = ((0.9, 1.1), (0.127, -0.175))

# A bar on a terminal, nothing in a log.
progress = functools.partial(tqdm, leave=False, mininterval=1, disable=None)


@dataclass(frozen=True)
class Training:
    """What determines theta_r and theta_s: the paper's values."""

    seed: int = 42
    real_points: int = 1000
    # Base model: full-batch Adam on the real points.
    base_steps: int = 10_000
    base_lr: float = 1e-4
    # Self-training: the same on as many samples of the base, drawn with the score scaled by zeta.
    zetas: tuple[float, ...] = (1.1, 0.9)
    self_epochs: tuple[int, ...] = (50, 250)
    self_lr: float = 1e-5

    @property
    def settings(self) -> list[str]:
        """Names of the self-training runs."""
        pairs = itertools.product(self.zetas, self.self_epochs)
        return [f"zeta {zeta}, {epochs} epochs" for zeta, epochs in pairs]


@dataclass(frozen=True)
class Scoring:
    """What determines the score of a network."""

    protocol: str = "exact"  # Sobol points, or "paper": the authors' random draws
    points: int = 2**15  # the most that one score takes
    device: str = "cpu"
    seed: int = 42  # of the random draws
    # Ranking: a round scores with points / divisor and keeps this many, the last the winner.
    rounds: tuple[tuple[int, int], ...] = ((64, 64), (8, 4), (1, 1))
    # The winner's score: points that no search has used.
    fresh_sets: int = 8
    sw2_points: int = 2**15

    @property
    def exact(self) -> bool:
        return self.protocol == "exact"


@dataclass(frozen=True)
class Search:
    """Search of the six weights by exact gradients."""

    points: int = 2**13  # at most a quarter of a score's
    evaluations: int = 60
    tolerance: float = 1e-9  # below the integral's own error
    bound: float = 20.0  # of each weight


@dataclass(frozen=True)
class Alignment:
    """Comparison of the gradients on real and on synthetic data: the authors' values."""

    seed: int = 42
    points: int = 100_000
    passes: int = 16
    batch: int = 2048
    decay: float = 0.999
    epsilon: float = 1e-8
    zetas: tuple[float, ...] = tuple(np.linspace(0.8, 1.2, 46).tolist())


def constants() -> dict:
    """What every number depends on and no argument says."""
    return {
        "code": VERSION,
        "target": (TARGET_MEAN, TARGET_COV),
        "network": SHAPES,
        "schedule": (NOISE_LEVELS, SAMPLE_STEPS, SCHEDULE_OFFSET),
        "directions": SW2_DIRECTIONS,
        "versions": (str(torch.__version__), np.__version__, scipy.__version__),
    }


# ---------------------------------------------------------------- results
@dataclass
class Models:
    data: torch.Tensor  # [N, 2] float32
    theta_r: torch.Tensor  # [4418] float32
    theta_s: torch.Tensor  # [settings, 4418] float32, in the order of Training.settings


@dataclass
class Found:
    """The configurations W that a search has tried, and the one that won."""

    w: list[float]  # [6]
    W: torch.Tensor  # [G, 6] float64
    fd: list[float]  # [G], of each one's last score
    points: list[int]  # [G], that this score took
    evaluations: int
    seconds: float


@dataclass
class Score:
    """One configuration's score on points that no search has used."""

    w: list[float]  # [6]
    fd: float
    fd_error: float | None  # standard error of the integral; one random draw has none
    sw2: float


@dataclass
class Curve:
    zeta: list[float]
    cosine: list[float]


@dataclass
class Run:
    """All results of one seed."""

    training: Training
    scorer: "Scorer"  # of the main setting
    scores: dict[str, Score]  # of the winners: in each setting, base, global, delta 1.72, ...
    found: dict[str, Found]  # by what each search the winners come from
    deltas: tuple[float, ...]
    alignment: Curve | None


# ---------------------------------------------------------------- the experiment
def experiment(
    training: Training,
    scoring: Scoring,
    deltas: tuple[float, ...],
    search: Search | None,
    alignment: Alignment | None,
    out: Path,
) -> Run:
    """Everything for one seed; each part is kept in the seed's folder as soon as it is finished.

    deltas: spacings of the layer-wise grids. A search or alignment of None is left out.
    """
    part = functools.partial(finished, out / f"seed_{training.seed}", constants())
    found: dict[str, Found] = {}
    scores: dict[str, Score] = {}

    def study(name, scorer, how, *inputs):
        """What a search finds between two networks, and its score on other points."""
        found[name] = part(f"search, {name}", Found, how, scorer, *inputs)
        scores[name] = part(name, Score, fresh_score, scorer, found[name].w)

    # Train on the data, then on samples: operations that are too small for a second thread.
    with threads(1):
        models = part("models", Models, train_models, training)

    # One weight for all layers, in each of the four settings.
    scorers = {}
    pairs = zip(training.settings, models.theta_s, strict=True)
    for setting, theta_s in progress(list(pairs), "global sweeps"):
        scorers[setting] = Scorer(models.theta_r, theta_s, scoring)
        study(setting, scorers[setting], global_sweep, GLOBAL_W)

    # The layers are studied in the paper's setting: mode-seeking samples, the longer training.
    scorer, w_star = scorers[MAIN], scores[MAIN].w[0]
    for name, w in {"base": 0.0, "collapsed": -1.0}.items():
        scores[name] = part(name, Score, fresh_score, scorer, [w] * 6)
    scores["global"] = scores[MAIN]

    # A weight for each layer: grids around the best global weight.
    for delta in progress(deltas, "layer-wise grids"):
        study(row_of(delta), scorer, layer_grid, w_star, delta)

    # The same weights by descent.
    if search:
        starts = {"global": w_star, "zero": 0.0}
        for objective, start in progress(DESCENTS, "gradient searches"):
            with threads(1):
                name = f"gradient on {objective} from {start}"
                study(name, scorer, descend, search, objective, starts[start])

    # Why a step away from the samples helps: their gradient pulls against the data's.
    curve = None
    if alignment:
        with threads(1):
            curve = part("alignment", Curve, gradient_alignment, models.theta_r, alignment)
    return Run(training, scorer, scores, found, deltas, curve)


# ---------------------------------------------------------------- data and network
def target() -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [2] and covariance [2, 2] of the target, float64."""
    return torch.tensor(TARGET_MEAN).double(), torch.tensor(TARGET_COV).double()


def real_data(n: int, seed: int) -> torch.Tensor:
    """n points of the target [n, 2] float32: at seed 42 the authors' own."""
    points = np.random.RandomState(seed).multivariate_normal(TARGET_MEAN, TARGET_COV, n)
    return torch.from_numpy(points).float()


def initial_weights() -> torch.Tensor:
    """nn.Linear's default initialisation of all layers [4418] float64, from torch's own generator.

    nn.Linear itself rounds differently from processor to processor.
    """
    parts = []
    for n_out, n_in in SHAPES:
        bound = torch.tensor(n_in**-0.5).double()  # a float32 number
        for n in (n_out * n_in, n_out):  # weight, then bias
            parts.append((torch.rand(n).double() * (2 * bound) - bound).float())
    return torch.cat(parts).double()


def predict_noise(theta, x, time):
    """The noise in x [N, 2] at time [N, 1] from 0, clean, to 1 -> [N, 2]; theta [4418]."""
    h = torch.cat([x, time], 1)
    for layer, (part, shape) in enumerate(zip(theta.split(SIZES), SHAPES, strict=True)):
        weight, bias = part.split([shape[0] * shape[1], shape[0]])
        h = linear(h, weight.view(shape), bias)
        if 0 < layer < len(SHAPES) - 1:
            h = h.relu()
    return h


def cosine_schedule(n: int) -> torch.Tensor:
    """Cumulative noise schedule abar [n] float64 (arXiv 2102.09672), abar[0] = 1."""
    t = torch.arange(n).double() / n
    abar = torch.cos((t + SCHEDULE_OFFSET) / (1 + SCHEDULE_OFFSET) * torch.pi / 2) ** 2
    return abar / abar[0]


def ddim(theta, z, zeta=1.0):
    """Starting noise z [N, 2] -> samples [N, 2]: neon_ext.mlp_ddim, differentiable."""
    abar = [1.0, *cosine_schedule(SAMPLE_STEPS).tolist()]
    x = z
    for t in range(SAMPLE_STEPS, 0, -1):
        time = torch.full_like(x[:, :1], (t - 1) / (SAMPLE_STEPS - 1))
        eps = predict_noise(theta, x, time)
        x0 = (x - (1 - abar[t]) ** 0.5 * zeta * eps) / abar[t] ** 0.5
        x = abar[t - 1] ** 0.5 * x0 + (1 - abar[t - 1]) ** 0.5 * eps
    return x


# ---------------------------------------------------------------- training
# In float64: 10,000 steps amplify float32's last bit, which differs between processors, to a tenth
# of theta_r.
def denoising_loss(theta, data, abar):
    """Mean squared error of the noise at a random time per point; data [N, 2], abar [T] float64."""
    t = torch.randint(len(abar), (len(data), 1))
    eps = torch.randn_like(data)
    noisy = abar[t].sqrt() * data + (1 - abar[t]).sqrt() * eps
    predicted = predict_noise(theta, noisy, t.double() / (len(abar) - 1))
    return (predicted - eps).square().mean()


def train(theta, data, lr, epochs) -> dict[int, torch.Tensor]:
    """Full-batch Adam from theta [4418] on data [N, 2], float64 -> theta after these epochs."""
    torch.empty(2**22)  # freeing 16 MB raises glibc's mmap threshold: no page faults in every step
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=lr, fused=True)
    abar = cosine_schedule(NOISE_LEVELS)

    saved = {}
    for epoch in progress(range(1, max(epochs) + 1), "training"):
        optimizer.zero_grad()
        denoising_loss(theta, data, abar).backward()
        optimizer.step()
        if epoch in epochs:
            saved[epoch] = theta.detach().clone()
    return saved


def train_models(training: Training) -> Models:
    """theta_r on real data, theta_s on samples of theta_r in every setting; rounded at the end."""
    data = real_data(training.real_points, training.seed)

    # The initial weights are the authors'. The noise is a stream of our own: theirs was a GPU's.
    torch.manual_seed(training.seed)
    start = initial_weights()
    torch.manual_seed(training.seed)
    steps = training.base_steps
    theta_r = train(start, data.double(), training.base_lr, [steps])[steps]

    theta_s: list[torch.Tensor] = []
    for zeta in training.zetas:
        torch.manual_seed(training.seed + 2**20)  # noise of its own, the same for every zeta
        z = torch.randn(training.real_points, 2, dtype=torch.float64)
        with torch.no_grad():
            synthetic = ddim(theta_r, z, zeta)
        saved = train(theta_r, synthetic, training.self_lr, training.self_epochs)
        theta_s.extend(saved[epochs] for epochs in training.self_epochs)
    return Models(data, theta_r.float(), torch.stack(theta_s).float())


# ---------------------------------------------------------------- scores
@functools.lru_cache(maxsize=16)
def sobol_normal(n: int, seed: int) -> torch.Tensor:
    """n = 2^k scrambled Sobol points of N(0, I): [n, 2] float64."""
    u = qmc.Sobol(2, scramble=True, seed=seed).random_base2(n.bit_length() - 1)
    return torch.from_numpy(ndtri(np.clip(u, 2.0**-33, 1 - 2.0**-33)))


def frechet_to_target(mean, cov):
    """mean [..., 2], cov [..., 2, 2] float64 -> Fréchet distances to the exact target [...]."""
    return neon_ext.frechet_distance(mean, cov, *target())


def sliced_w2(x):
    """Sliced squared 2-Wasserstein distance of x [N, 2] to the target.

    The target's projections are Gaussian: mean, standard deviation and quantiles are known exactly.
    """
    mean, cov = target()
    angle = torch.arange(SW2_DIRECTIONS).double() * torch.pi / SW2_DIRECTIONS
    direction = torch.stack([angle.cos(), angle.sin()])  # [2, directions]
    sigma = (direction * (cov @ direction)).sum(0).sqrt()  # [directions]

    # In one dimension the optimal map pairs the sorted points with the quantiles.
    quantile = torch.from_numpy(ndtri((np.arange(len(x)) + 0.5) / len(x)))  # [N]
    projected = (x.double() @ direction).sort(0).values  # [N, directions]
    return (projected - mean @ direction - quantile[:, None] * sigma).square().mean()


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores of configurations w [6] between theta_r and theta_s [4418] float32."""

    theta_r: torch.Tensor
    theta_s: torch.Tensor
    scoring: Scoring

    def theta(self, W):
        """W [G][6] -> [G, 4418] float32 on the device."""
        device = self.scoring.device
        W = torch.as_tensor(W, dtype=torch.float64).to(device)
        return neon_ext.extrapolate_grid(
            self.theta_r.to(device), self.theta_s.to(device), OFFSETS, W
        )

    def samples(self, w, n):
        """w [6] -> [n, 2] float32, from the same starting points for every w."""
        theta = self.theta([w])
        z = sobol_normal(n, 1000).float().to(theta.device)
        abar = cosine_schedule(SAMPLE_STEPS).to(theta.device)
        return neon_ext.mlp_ddim(theta, z, abar).cpu()[0]

    def moments(self, W, n, seed):
        """W [G][6] -> means [G, 2], covariances [G, 2, 2] of n samples each, float64 on the CPU."""
        theta = self.theta(W)
        abar = cosine_schedule(SAMPLE_STEPS).to(theta.device)
        if self.scoring.exact:
            z = sobol_normal(n, seed).float().to(theta.device)
            mean, cov = neon_ext.mlp_ddim_moments(theta, z, abar)
            return mean.cpu(), cov.cpu()

        # The authors draw anew for each configuration; in float64, the same on every processor.
        generator = torch.Generator().manual_seed(self.scoring.seed + 2**21 + seed)
        means, covs = [], []
        for one in progress(theta.split(1), "configurations"):
            z = torch.randn(n, 2, dtype=torch.float64, generator=generator).float().to(theta.device)
            mean, cov = neon_ext.mlp_ddim_moments(one, z, abar, correction=1)
            means.append(mean.cpu())
            covs.append(cov.cpu())
        return torch.cat(means), torch.cat(covs)


def fresh_score(scorer: Scorer, w) -> Score:
    """Score of w [6] on point sets that no search uses: FD, its error over the sets, and SW2."""
    sets = scorer.scoring.fresh_sets if scorer.scoring.exact else 1
    means, covs = [], []
    for k in range(sets):
        mean, cov = scorer.moments([w], scorer.scoring.points, seed=1000 + k)
        means.append(mean)
        covs.append(cov)
    mean, cov = torch.cat(means), torch.cat(covs)  # [sets, 2], [sets, 2, 2]

    # FD of all sets together: the covariance within them and between their means.
    spread = mean - mean.mean(0)
    fd = frechet_to_target(mean.mean(0), cov.mean(0) + spread.T @ spread / sets)
    error = None
    if sets > 1:
        error = float(frechet_to_target(mean, cov).std() / sets**0.5)
    sw2 = sliced_w2(scorer.samples(w, scorer.scoring.sw2_points))
    return Score(list(w), float(fd), error, float(sw2))


# ---------------------------------------------------------------- searches
def ranking(scorer: Scorer, W, rounds: Sequence[tuple[int, int]]) -> Found:
    """The best of W [G][6]: each round scores the survivors of the last, see Scoring.rounds."""
    begin = time.perf_counter()
    W = torch.as_tensor(W, dtype=torch.float64)
    fd = np.full(len(W), np.inf)
    points = np.zeros(len(W), dtype=int)
    alive = np.arange(len(W))
    evaluations = 0

    for divisor, survivors in rounds:
        n = scorer.scoring.points // divisor
        mean, cov = scorer.moments(W[alive], n, seed=0)
        fd[alive] = frechet_to_target(mean, cov)
        points[alive] = n
        evaluations += len(alive)
        alive = alive[np.argsort(fd[alive], kind="stable")[:survivors]]

    seconds = time.perf_counter() - begin
    return Found(W[alive[0]].tolist(), W, fd.tolist(), points.tolist(), evaluations, seconds)


def global_sweep(scorer: Scorer, weights) -> Found:
    """One weight for all layers; drawn as a curve, so that no round is coarse."""
    rounds = scorer.scoring.rounds[1:] if scorer.scoring.exact else [(1, 1)]
    return ranking(scorer, [[w] * 6 for w in weights], rounds)


def layer_grid(scorer: Scorer, w_star: float, delta: float) -> Found:
    """{w* - delta, w*, w* + delta}^6 around the best global weight."""
    steps = [round(w_star + k * delta, 12) for k in (-1, 0, 1)]
    rounds = scorer.scoring.rounds if scorer.scoring.exact else [(100, 1)]  # as the authors
    return ranking(scorer, list(itertools.product(steps, repeat=6)), rounds)


class Objective:
    """FD or SW2 and its gradient in the six weights; keeps what it was asked."""

    def __init__(self, scorer: Scorer, search: Search, objective: str):
        self.theta_r = scorer.theta_r.double()
        self.drift = scorer.theta_s.double() - self.theta_r
        points = min(search.points, scorer.scoring.points // 4)
        self.z = sobol_normal(2 ** (points.bit_length() - 1), 7)  # a power of two of them
        self.objective = objective
        self.asked: list[tuple[list[float], float, float]] = []  # w, FD, value

    def __call__(self, w):
        """w [6] -> value, gradient [6]."""
        # Rounded, in and out, far below what matters: the last bits, which differ between machines,
        # would grow from step to step into another path.
        w = np.round(w, 6)
        weights = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        theta = self.theta_r - weights.repeat_interleave(torch.tensor(SIZES)) * self.drift
        x = ddim(theta, self.z)
        centred = x - x.mean(0)
        fd = frechet_to_target(x.mean(0), centred.T @ centred / len(x))
        loss = fd if self.objective == "fd" else sliced_w2(x)
        (gradient,) = torch.autograd.grad(loss, weights)

        self.asked.append((w.tolist(), fd.item(), loss.item()))
        return round(loss.item(), 12), gradient.numpy().round(9)


def descend(scorer: Scorer, search: Search, objective: str, w_start: float) -> Found:
    """scipy's L-BFGS-B from w_start in all layers."""
    begin = time.perf_counter()
    value = Objective(scorer, search, objective)
    options = {"ftol": search.tolerance, "gtol": search.tolerance, "maxfun": search.evaluations}
    scipy.optimize.minimize(
        value,
        np.full(6, w_start),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-search.bound, search.bound)] * 6,
        options=options,
    )

    # scipy ends its last line search, whatever it takes.
    W, fd, values = zip(*value.asked[: search.evaluations], strict=True)
    best = W[int(np.nanargmin(values))]
    tried, n = torch.tensor(W, dtype=torch.float64), len(W)
    seconds = time.perf_counter() - begin
    return Found(best, tried, list(fd), [len(value.z)] * n, n, seconds)


# ---------------------------------------------------------------- gradient alignment
def batch_gradients(theta, data, alignment: Alignment, seed: int) -> torch.Tensor:
    """Gradients of the training loss in passes over data [N, 2], one a batch: [batches, 4418]."""
    torch.manual_seed(seed)
    abar = cosine_schedule(NOISE_LEVELS)
    gradients = []
    for _ in range(alignment.passes):
        for batch in data.split(alignment.batch):
            loss = denoising_loss(theta, batch, abar)
            gradients.append(torch.autograd.grad(loss, theta)[0])
    return torch.stack(gradients)


def preconditioner(gradients, alignment: Alignment) -> torch.Tensor:
    """Adam's after these gradients [batches, 4418] -> [4418]; the batches' noise is part of it."""
    v = torch.zeros_like(gradients[0])
    for gradient in gradients:
        v = alignment.decay * v + (1 - alignment.decay) * gradient.square()
    v = v / (1 - alignment.decay ** len(gradients))
    return 1 / (v.sqrt() + alignment.epsilon)


def gradient_alignment(theta_r, alignment: Alignment) -> Curve:
    """Cosine of the gradients on real and synthetic data for each zeta, weighted as Adam does."""
    theta = theta_r.double().requires_grad_()
    mean, cov = target()

    # Points of their own for either side: shared ones would align the gradients of their noise.
    torch.manual_seed(alignment.seed + 2**21)
    z, real_z = torch.randn(2, alignment.points, 2, dtype=torch.float64)
    real = mean + real_z @ torch.linalg.cholesky(cov).T
    gradients = batch_gradients(theta, real, alignment, alignment.seed + 2**22)
    weight, real_gradient = preconditioner(gradients, alignment), gradients.mean(0)

    def product(a, b):
        return (weight * a * b).sum()

    cosines = []
    for zeta in progress(alignment.zetas, "gradient alignment"):
        abar = cosine_schedule(SAMPLE_STEPS)
        synthetic = neon_ext.mlp_ddim(theta_r[None], z.float(), abar, zeta)[0].double()
        # The same noise for every zeta, and not the real side's.
        g = batch_gradients(theta, synthetic, alignment, alignment.seed + 2**23).mean(0)
        norms = product(g, g) * product(real_gradient, real_gradient)
        cosines.append(float(product(g, real_gradient) / norms.sqrt()))
    return Curve(list(alignment.zetas), cosines)


# ---------------------------------------------------------------- tables
def row_of(delta: float) -> str:
    """A grid's name in the table."""
    return f"delta {delta:.12g}"


def digits(value: float) -> str:
    """As many as are the same on every machine."""
    return f"{value:.5f}" if value >= 1e-3 else f"{value:.1e}"


def over_seeds(runs: list[Run], name: str) -> np.ndarray:
    """FD and SW2 of a winner: [seeds, 2]."""
    return np.array([[run.scores[name].fd, run.scores[name].sw2] for run in runs])


def table(runs: list[Run]) -> list[dict]:
    """FD and SW2 of every winner, mean and standard deviation over the seeds; then at how many of
    them it is better than one weight, or one seed's weights."""
    paper = PAPER_ROWS | dict(zip(map(row_of, DELTAS), PAPER_FD, strict=True))
    rows = []
    for name, score in runs[0].scores.items():
        if name in PAPER_OPTIMA:
            continue  # the main setting's is the global row
        scores = over_seeds(runs, name)
        row = {f"seeds: {len(runs)}": name}
        # One seed has no spread; FD's numerical error stands in its place.
        spread = scores.std(0, ddof=1) if len(runs) > 1 else [score.fd_error, None]
        for column, mean, std in zip(("FD", "SW2"), scores.mean(0), spread, strict=True):
            row[column] = digits(mean) if std is None else f"{digits(mean)} +- {digits(std)}"
        row["paper FD"] = str(paper.get(name, ""))
        if len(runs) > 1:
            wins = (scores < over_seeds(runs, "global")).sum(0)
            row["seeds better than global: FD, SW2"] = ", ".join(map(str, wins))
        else:
            weights = ", ".join(f"{w:.2f}" for w in score.w)
            row["weights: input, blocks 0 to 3, output"] = weights
        rows.append(row)
    return rows


def least(runs: list[Run]) -> str:
    """The delta whose winner has the least mean FD."""
    rows = map(row_of, runs[0].deltas)
    return min(rows, key=lambda row: over_seeds(runs, row)[:, 0].mean())


def headline(runs: list[Run]) -> str:
    """FD of the base, of one weight and of the best winner, with the paper's."""
    best = least(runs)
    words = {"base": "base", "global": "one weight for all layers"}
    words[best] = f"a weight for every layer, {best},"
    texts = []
    for row in table(runs):
        name = row[f"seeds: {len(runs)}"]
        if name in words:
            paper = f" (paper: {row['paper FD']})" if row["paper FD"] else ""
            texts.append(f"{words[name]} {row['FD']}{paper}")
    return f"FD: {'; '.join(texts)}."


def in_short(runs: list[Run]) -> str:
    """The table for a terminal."""
    rows = table(runs)
    columns = [*rows[0]]
    for row in rows:
        row[columns[0]] = row[columns[0]].removeprefix("gradient on ")
    return terminal_text("FD, lower is better", rows, columns, [headline(runs)], most=16)


def summary_of(run: Run) -> dict:
    """One seed's results as they stand in summary.json."""

    def entry(name: str) -> dict:
        found = run.found[name]
        took = {"evaluations": found.evaluations, "seconds": found.seconds}
        return vars(run.scores[name]) | took

    searches = []
    for objective, start in DESCENTS:
        name = f"gradient on {objective} from {start}"
        if name in run.found:
            searches.append({"objective": objective, "start": start} | entry(name))
    optima = {name: entry(name) for name in run.training.settings}
    return {
        "seed": run.training.seed,
        "base": vars(run.scores["base"]),
        "collapsed": vars(run.scores["collapsed"]),
        "global": optima[MAIN] | {"w": run.scores["global"].w[0]},
        "layerwise": [{"delta": delta} | entry(row_of(delta)) for delta in run.deltas],
        "search": sorted(searches, key=lambda row: row["fd"]),
        "global_optima": optima,
        "alignment": vars(run.alignment) if run.alignment else None,
    }


def grid_csv(grid: Found) -> str:
    """All configurations of a grid, their scores and on how many points."""
    columns = [f"w_{layer.replace(' ', '_')}" for layer in LAYERS]
    lines = [",".join([*columns, "fd", "points"])]
    for w, fd, points in zip(grid.W.tolist(), grid.fd, grid.points, strict=True):
        weights = [f"{value:.12g}" for value in w]
        lines.append(",".join([*weights, f"{fd:.7g}", str(points)]))
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- page
# Each of these gives a figure of matplotlib and what it shows in words.
def draw_sweeps(run: Run):
    """FD against the weight of all layers, in the four settings."""
    figure = new_figure(5.6, 4.4)
    axis = figure.subplots()
    told = []
    for k, setting in enumerate(run.training.settings):
        sweep, best = run.found[setting], run.scores[setting]
        label = f"{setting}, best w = {best.w[0]:g}"
        axis.plot(sweep.W[:, 0], sweep.fd, color=f"C{k}", label=label)
        axis.plot(best.w[0], best.fd, "o", color=f"C{k}")
        axis.plot(*PAPER_OPTIMA[setting], "x", color=f"C{k}", markeredgewidth=2)
        told.append(f"{setting}: {digits(best.fd)} at {best.w[0]:g}")

    base = run.scores["base"].fd
    axis.axhline(base, color=INK, linestyle=":", label="base, w = 0")
    axis.set_ylim(0, 2 * base)  # a collapsed network's would flatten the rest
    axis.set(xlabel="w, the same for all layers", ylabel="FD")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure, f"FD against one weight for all layers; least {'; '.join(told)}"


def draw_weights(run: Run):
    """The winners' weights as bars, a group a layer."""
    figure = new_figure(5.6, 3.4)
    axis = figure.subplots()
    width = 0.8 / len(run.deltas)
    told = []
    for k, delta in enumerate(run.deltas):
        w = run.scores[row_of(delta)].w
        axis.bar(np.arange(6) - 0.4 + (k + 0.5) * width, w, width, label=f"delta {delta:g}")
        told.append(f"delta {delta:g}: {', '.join(f'{value:.2f}' for value in w)}")

    w_star = run.scores["global"].w[0]
    axis.axhline(w_star, color=INK, linestyle=":", label=f"global, {w_star:g}")
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set_xticks(range(6), LAYERS)
    axis.set_ylabel("weight of the winner")
    figure.legend(loc="outside lower center", ncols=4)
    return figure, f"Weights by layer, {', '.join(LAYERS)}. {'; '.join(told)}"


def draw_scores(runs: list[Run]):
    """FD and SW2 of the winners against delta, mean and standard deviation over the seeds."""
    figure = new_figure(5.6, 4)
    axis = figure.subplots()
    deltas = runs[0].deltas
    ours = np.stack([over_seeds(runs, row_of(delta)) for delta in deltas])  # [deltas, seeds, 2]
    mean, std = ours.mean(1), ours.std(1, ddof=min(len(runs) - 1, 1))  # 0 of one seed
    told = []
    for k, score in enumerate(("FD", "SW2")):
        axis.errorbar(deltas, mean[:, k], std[:, k], marker="o", color=f"C{k}", label=score)
        axis.axhline(over_seeds(runs, "global")[:, k].mean(), color=f"C{k}", linestyle=":")
        told.append(f"{score}: {', '.join(map(digits, mean[:, k]))}")
    axis.plot(DELTAS, PAPER_FD, "x--", color="C2", label="FD of the paper, one run")
    axis.set(xlabel="delta", ylabel="distance to the target")
    axis.legend()
    return figure, f"Winners at delta {', '.join(map(str, deltas))}. {'; '.join(told)}"


def draw_cloud(points):
    """Samples [N, 2], with the target's ellipse at one and two standard deviations."""
    mean, cov = target()
    angle = torch.linspace(0, 2 * torch.pi, 200).double()
    ellipse = torch.linalg.cholesky(cov) @ torch.stack([angle.cos(), angle.sin()])  # [2, 200]
    figure = new_figure(2.2, 2.2)
    axis = figure.subplots()
    axis.plot(*points.T, ".", markersize=2)
    for deviations in (1, 2):
        axis.plot(*(mean[:, None] + deviations * ellipse), color="C3")
    axis.set(aspect="equal", xlim=(-5, 5), ylim=(-5, 5))
    spread = ", ".join(f"{value:.2f}" for value in torch.cov(points.T).flatten().tolist())
    return figure, f"{len(points)} points; their covariance {spread}, the target's 2, 1, 1, 2"


def draw_alignment(curve: Curve):
    """Cosine of the real and the synthetic gradient against zeta."""
    figure = new_figure(5, 3.5)
    axis = figure.subplots()
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.plot(curve.zeta, curve.cosine, label="ours")
    axis.plot(*PAPER_ALIGNMENT, "x", color="C1", markeredgewidth=2, label="paper")
    axis.set(xlabel="zeta, score scale of the samples", ylabel="cosine with the real gradient")
    axis.legend()
    pairs = zip(curve.zeta, curve.cosine, strict=True)
    told = ", ".join(f"{zeta:g}: {cosine:.3f}" for zeta, cosine in pairs)
    return figure, f"Cosine of real and synthetic gradient against zeta. {told}"


TRUST = (
    "FD is an integral over the sampler's starting noise; the number behind +- is its numerical "
    "error (one seed) or the standard deviation over seeds. SW2 is seen by no search but those "
    "that name it. A seed is points, initial weights and training noise; --protocol paper takes "
    "the authors' draws. The paper's numbers are of one run."
)


def page_of(runs: list[Run], summary: dict) -> Page:
    """The table over the seeds; samples and weights of the first."""
    run = runs[0]
    panels = []
    for row in ("base", "collapsed", "global", least([run])):
        figure = drawn("", draw_cloud, run.scorer.samples(run.scores[row].w, 1024))
        panels.append(Panel(row, f"FD {digits(run.scores[row].fd)}", figure=figure))

    title = "FD against one weight for all layers; dots: least, crosses: the paper's"
    figures = [drawn(title, draw_sweeps, run)]
    if len(run.deltas) > 1:
        title = "FD, which ranks, and SW2, which no grid sees; dotted: one weight for all layers"
        figures.append(drawn(title, draw_scores, runs))
    if run.alignment:
        figures.append(drawn("Gradient alignment", draw_alignment, run.alignment))

    part = Part(
        title="",
        headline=[headline(runs)],
        panels=panels,
        beside=drawn("Winners' weights by layer", draw_weights, run),
        tables=[Table("Winners", table(runs))],
        figures=figures,
    )
    seeds = [one.training.seed for one in runs]
    about = {"machine": summary["machine"]} | summary["config"] | summary["versions"]
    facts = [{"what": name, "value": str(value)} for name, value in about.items()]
    return Page(
        title="the paper's toy",
        about=f"Fréchet distance (FD), lower is better; seed {', '.join(map(str, seeds))}",
        parts=[part],
        warnings=[],
        trust={"What the numbers are": [TRUST]},
        trust_tables=[Table("Settings, machine and versions", facts)],
        command=summary["command"],
        links={f"seed {seed}": f"seed_{seed}/report.html" for seed in seeds if len(seeds) > 1},
    )


# ---------------------------------------------------------------- command line
def delta_list(text: str) -> tuple[float, ...]:
    """ "0.4,1.0" or "all" -> floats."""
    values = DELTAS if text == "all" else tuple(sorted(set(map(float, text.split(",")))))
    if not all(1e-6 <= value <= 100 for value in values):
        raise ValueError
    return values


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--delta", type=delta_list, default=(1.72,), help="spacing of the grid: 1.72, several, all")
    add("--seed", type=int, default=42)
    add("--seeds", type=int, default=1, help="repeat for this many seeds from --seed on")
    protocol = "Sobol or the paper's draws"
    add("--protocol", choices=["exact", "paper"], default="exact", help=protocol)
    add("--points", type=int, help="most points of one score: 32768; --protocol paper: 1000000")
    add("--search", choices=["gradient"], help="also search the six weights by exact gradients")
    add("--alignment", action="store_true", help="also the gradient-alignment curve, first seed")
    add("--base-steps", type=int, default=Training.base_steps, help="training steps of the base")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where configurations are scored")
    add("--out", type=Path, default=Path("runs/toy"), help="folder of one study: runs/toy")
    args = parser.parse_args(argv)

    exact = args.protocol == "exact"
    if args.points is None:
        args.points = Scoring.points if exact else 1_000_000
    if args.seeds < 1 or args.base_steps < 1:
        parser.error("--seeds and --base-steps must be at least 1")
    if not 0 <= args.seed <= 2**31 - args.seeds:
        parser.error(f"--seed {args.seed}: seeds go from 0 to {2**31 - 1}")
    if not 512 <= args.points <= 2**24 or (exact and args.points.bit_count() > 1):
        parser.error(f"--points {args.points}: give a power of two from 512 to {2**24}")
    built_with_cuda = neon_ext.build_config()["cuda"]
    if args.device == "cuda" and not (torch.cuda.is_available() and built_with_cuda):
        parser.error("--device cuda: no usable GPU, or neon_ext was built without CUDA: use cpu")
    return args


def study(argv: list[str]) -> None:
    """One experiment a seed, then everything about them as files and the table."""
    begin = time.perf_counter()
    args = parse(argv)
    with files.reading(f"--out {args.out} cannot be written, choose another folder"):
        args.out.mkdir(parents=True, exist_ok=True)
    for folder in [args.out, *args.out.glob("seed_*")]:
        files.remove_orphans(folder)

    runs: list[Run] = []
    search = Search() if args.search else None
    for seed in range(args.seed, args.seed + args.seeds):
        training = Training(seed, base_steps=args.base_steps)
        scoring = Scoring(args.protocol, args.points, args.device, seed)
        alignment = Alignment(seed) if args.alignment and not runs else None  # one curve
        runs.append(experiment(training, scoring, args.delta, search, alignment, args.out))

    levels = {"noise_levels": NOISE_LEVELS, "sample_steps": SAMPLE_STEPS}
    threads_used = torch.get_num_threads()
    seconds = time.perf_counter() - begin
    summary = {
        "command": shlex.join(["python", "toy_neon.py", *argv]),
        "config": vars(runs[0].scorer.scoring) | vars(runs[0].training) | levels,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads_used} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "neon_ext": neon_ext.build_config(),
        },
        **summary_of(runs[0]),
        "seeds": [summary_of(run) for run in runs],
        "seconds_total": seconds,
    }
    write_results(args.out, runs, summary)
    place = args.out / "report.html"
    print(f"\n{in_short(runs)}\n\n{seconds:.1f} s. Report: {place}", flush=True)


def write_results(out: Path, runs: list[Run], summary: dict):
    """Grids, summary, table, then the page, and one of every seed; what another study has left of
    them in this folder goes."""
    for old in [*out.glob("grid_*.csv"), *out.glob("seed_*/report.html")]:
        old.unlink()
    for delta in runs[0].deltas:
        path = out / f"grid_{delta:.12g}.csv"
        write_atomically(path, grid_csv(runs[0].found[row_of(delta)]))
    plain = strict(summary)
    write_texts([markdown(table(runs))], plain, out)
    write_page(page_of(runs, plain), out / "report.html")
    if len(runs) > 1:
        for run in runs:
            write_page(page_of([run], plain), out / f"seed_{run.training.seed}" / "report.html")


def main(argv: list[str] | None = None) -> None:
    """The command; argv: options from Python, None: those of the command line."""
    run_command("toy_neon", study, argv)


if __name__ == "__main__":
    main()
