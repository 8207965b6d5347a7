"""Toy experiment of Adaptive NEON: repair a small diffusion model, layer by layer, after training on itself.

    theta = theta_r - w_layer * (theta_s - theta_r)    w > 0 away from collapse, w < 0 towards it, -1: theta_s

theta_r: six layers trained on 1000 points of a 2-D Gaussian; theta_s: the same after training on its samples
(arXiv 2510.03597; Adaptive NEON, section 4.1). DDIM is a deterministic map, so the Fréchet distance (FD) is
an integral over its noise, computed with Sobol points. Beside it the sliced 2-Wasserstein distance (SW2).

    python toy_neon.py --delta 1.72                  one layer-wise grid of 729 configurations
    python toy_neon.py --delta all --seeds 5 --search gradient --alignment       the recorded run, results/toy

FD at seed 42: base 0.105, best global w = 0.2: 0.0434, delta 1.0: 0.0062 (the best of eight), delta 1.72:
0.0079, gradient search: 0.000009 in 42 evaluations. Five seeds: README.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import scipy.optimize
import torch
from matplotlib.figure import Figure
from scipy.special import ndtri
from scipy.stats import qmc
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

try:
    import neon_ext
except ImportError:  # reported by parse(), in one line
    neon_ext = None

LAYERS = ("input", "block 0", "block 1", "block 2", "block 3", "output")
FAN_IN, SIZES = (3, 32, 32, 32, 32, 32), (128, 1056, 1056, 1056, 1056, 66)  # inputs and parameters by layer
OFFSETS = [0, *np.cumsum(SIZES).tolist()]
HIDDEN = [layer for _ in range(4) for layer in (torch.nn.Linear(32, 32), torch.nn.ReLU())]
NETWORK = torch.nn.Sequential(torch.nn.Linear(3, 32), *HIDDEN, torch.nn.Linear(32, 2))
TARGET_MEAN, TARGET_COV = torch.zeros(2).double(), torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
TARGET_ROOT = torch.linalg.cholesky(TARGET_COV).float().T  # standard normal z [N, 2] @ TARGET_ROOT: real data
THREADS = torch.get_num_threads()
GLOBAL_W = np.linspace(-2, 2, 101).round(4)
DELTAS = (0.05, 0.1, 0.2, 0.4, 0.6, 1.0, 1.5, 1.72)
PAPER_FD = dict(zip(("base", "global", *(f"delta {delta:g}" for delta in DELTAS)), (
    0.1626, 0.03554, 0.033162, 0.033426, 0.031258, 0.025099, 0.020841, 0.015483, 0.011345, 0.009516)))


@dataclasses.dataclass(frozen=True)
class Config:
    """What determines every number, beside the deltas asked for. Paper defaults but for the protocol."""
    seed: int = 42
    real_points: int = 1000
    base_steps: int = 10_000
    base_lr: float = 1e-4
    self_lr: float = 1e-5
    self_epochs: tuple = (50, 250)
    noise_levels: int = 1000
    sample_steps: int = 20
    protocol: str = "exact"  # Sobol points, or "paper": the authors' random draws
    points: int = 2**15  # the most that one score takes
    device: str = "cpu"


def fail(message, code=2):
    """Something the user can mend: one line and the exit code."""
    sys.exit(print(f"toy_neon: {message}", file=sys.stderr) or code)


# ---------------------------------------------------------------- model and training
def cosine_schedule(n: int, s: float = 0.008) -> torch.Tensor:
    """Cumulative noise schedule abar [n] float64 (arXiv 2102.09672), abar[0] = 1."""
    abar = torch.cos((torch.arange(n).double() / n + s) / (1 + s) * torch.pi / 2) ** 2
    return abar / abar[0]


def network(theta):
    """(x, y, time) [N, 3] -> noise [N, 2] with a copy of the parameters theta [4418]."""
    net = copy.deepcopy(NETWORK)
    vector_to_parameters(theta.clone(), net.parameters())
    return net


def denoising_loss(net, data, abar):
    """Mean squared error of the noise at one random time per point; data [N, 2], abar [T] float32."""
    t, eps = torch.randint(len(abar), (len(data), 1)), torch.randn_like(data)
    noisy = abar[t].sqrt() * data + (1 - abar[t]).sqrt() * eps
    return (net(torch.cat([noisy, t / (len(abar) - 1)], 1)) - eps).square().mean()


def train(theta, data, lr, epochs, config):
    """Full-batch Adam from theta [4418] on data [N, 2]; {epoch: theta}."""
    torch.empty(2**22)  # freeing 16 MB raises glibc's mmap threshold: no page faults in every step, 2.5x
    net = network(theta)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    abar, saved = cosine_schedule(config.noise_levels).float(), {}
    for epoch in tqdm(range(1, max(epochs) + 1), desc="training", leave=False, mininterval=1):
        optimizer.zero_grad()
        denoising_loss(net, data, abar).backward()
        optimizer.step()
        if epoch in epochs:
            saved[epoch] = parameters_to_vector(net.parameters()).detach()
    return saved


def train_models(config):
    """The real data [N, 2], theta_r [4418] and {setting: theta_s}, trained on samples at score scale zeta."""
    torch.manual_seed(config.seed)
    data, theta_s = torch.randn(config.real_points, 2) @ TARGET_ROOT, {}
    start = torch.cat([(torch.rand(n) * 2 - 1) * k ** -0.5 for n, k in zip(SIZES, FAN_IN)])  # as nn.Linear
    theta_r = train(start, data, config.base_lr, [config.base_steps], config)[config.base_steps]
    for zeta in (1.1, 0.9):
        torch.manual_seed(config.seed + 2**20)  # not the real data's noise again
        z = torch.randn(config.real_points, 2)
        synthetic = neon_ext.mlp_ddim(theta_r[None], z, cosine_schedule(config.sample_steps), zeta)[0]
        saved = train(theta_r, synthetic, config.self_lr, config.self_epochs, config)
        theta_s |= {f"zeta {zeta}, {epochs} epochs": theta for epochs, theta in saved.items()}
    return {"data": data, "theta_r": theta_r, "theta_s": theta_s}


# ---------------------------------------------------------------- files
def write_atomically(path: Path, write):
    """write(temporary path), then rename: an interrupted run leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finished(folder, config, name, make, *inputs):
    """A part of the experiment: make(*inputs), or what an earlier run of the same code and config stored."""
    code = Path(__file__).read_text(encoding="utf-8").split("# " + "-" * 64)[1:5]  # model to searches
    key = hashlib.sha256(repr([config, code, torch.__version__]).encode()).hexdigest()[:12]
    path = folder / f"{name}_{key}.pt"
    if not path.exists():
        # PyTorch's operations are too small for a second thread, and lose 10x waiting when a core is busy.
        torch.set_num_threads(1 if make in (train_models, gradient_search, gradient_alignment) else THREADS)
        torch.manual_seed(config.seed + 2**21)  # whatever ran before
        part = make(*inputs)
        folder.mkdir(exist_ok=True)
        write_atomically(path, lambda temporary: torch.save({"key": key, "part": part}, temporary))
        return part
    with contextlib.suppress(Exception):  # whatever a damaged file makes of torch.load
        stored = torch.load(path, weights_only=True)
        if stored["key"] == key:
            return stored["part"]
    fail(f"the cache {path} is damaged or comes from another experiment: delete it and run again")


# ---------------------------------------------------------------- scores
@functools.lru_cache(maxsize=16)
def sobol_normal(n: int, seed: int) -> torch.Tensor:
    """n = 2^k scrambled Sobol points of N(0, I): [n, 2] float32."""
    u = qmc.Sobol(2, scramble=True, seed=seed).random_base2(n.bit_length() - 1)
    return torch.from_numpy(ndtri(np.clip(u, 2.0**-33, 1 - 2.0**-33))).float()


def frechet_to_target(mean, cov):
    """mean [..., 2], cov [..., 2, 2] float64 -> Fréchet distances to the exact target [...]."""
    return neon_ext.frechet_distance(mean, cov, TARGET_MEAN, TARGET_COV)


def sliced_w2(x, directions=32):
    """Sliced squared 2-Wasserstein distance of x [N, 2] to the target, whose projections are Gaussian."""
    angle = torch.arange(directions).double() * torch.pi / directions
    direction = torch.stack([angle.cos(), angle.sin()])  # [2, directions]
    sigma = (direction * (TARGET_COV @ direction)).sum(0).sqrt()
    quantile = torch.from_numpy(ndtri((np.arange(len(x)) + 0.5) / len(x)))
    return ((x.double() @ direction).sort(0).values - quantile[:, None] * sigma).square().mean()


class Scores:
    """Scores of configurations w [6] between theta_r and theta_s [4418]."""

    def __init__(self, theta_r, theta_s, config):
        self.theta_r, self.theta_s, self.config = theta_r, theta_s, config
        self.abar, self.exact = cosine_schedule(config.sample_steps), config.protocol == "exact"

    def theta(self, W):
        """W [G, 6] -> [G, 4418] float32 on the device."""
        ends = (theta.to(self.config.device) for theta in (self.theta_r, self.theta_s))
        return neon_ext.extrapolate_grid(*ends, OFFSETS, torch.tensor(np.array(W, dtype=float)))

    def samples(self, w, n):
        """w [6] -> [n, 2], from the same starting points for every w."""
        z = sobol_normal(n, 1000).to(self.config.device)
        return neon_ext.mlp_ddim(self.theta([w]), z, self.abar)[0].cpu()

    def moments(self, W, n, seed=0):
        """W [G, 6] -> means [G, 2] and covariances [G, 2, 2] of n samples each, float64 on the CPU."""
        chunks = self.theta(W).split(729 if self.exact else 1)  # the authors draw anew for each configuration
        moments = []
        for theta in tqdm(chunks, desc="configurations", leave=False, disable=len(chunks) == 1):
            z = (sobol_normal(n, seed) if self.exact else torch.randn(n, 2)).to(theta.device)
            moments.append(neon_ext.mlp_ddim_moments(theta, z, self.abar, correction=int(not self.exact)))
        return (torch.cat(parts).cpu() for parts in zip(*moments))

    def verified(self, w):
        """Score of w [6] on point sets no search uses: FD, its standard error over the sets, and SW2."""
        sets = 8 if self.exact else 1
        parts = [self.moments([w], self.config.points, 1000 + k) for k in range(sets)]
        mean, cov = map(torch.cat, zip(*parts))  # [sets, 2], [sets, 2, 2]
        spread = mean - mean.mean(0)
        fd = frechet_to_target(mean.mean(0), cov.mean(0) + spread.T @ spread / sets)
        error = float(frechet_to_target(mean, cov).std() / sets ** 0.5) if sets > 1 else None
        sw2 = float(sliced_w2(self.samples(w, 2**15)))
        return {"w": list(w), "fd": float(fd), "fd_error": error, "sw2": sw2}


# ---------------------------------------------------------------- searches
def ranking(scores, W, delta=None):
    """Few points for all of W [G][6], many for the survivors; fd and points [G] are of each last round."""
    begin, n = time.perf_counter(), scores.config.points
    rounds = [(n // 64, 64), (n // 8, 4), (n, 1)] if scores.exact else [(n // 100 if delta else n, 1)]
    W, fd, points = np.array(W), np.full(len(W), np.inf), np.zeros(len(W), dtype=int)
    alive, took = np.arange(len(W)), {"evaluations": 0}
    for n, survivors in rounds:
        fd[alive], points[alive] = frechet_to_target(*scores.moments(W[alive], n)), n
        took["evaluations"] += len(alive)
        alive = alive[np.argsort(fd[alive], kind="stable")[:survivors]]
    took["seconds"] = time.perf_counter() - begin
    best = ({"delta": delta} if delta else {}) | scores.verified(W[alive[0]].tolist()) | took
    return {"best": best, "W": W.tolist(), "fd": fd.tolist(), "points": points.tolist()}


def layer_grid(scores, w_star, delta):
    """{w* - delta, w*, w* + delta}^6 around the global optimum."""
    steps = np.round(w_star + delta * np.arange(-1, 2), 9)
    return ranking(scores, list(itertools.product(steps, repeat=6)), delta)


def ddim_plain(net, z, abar):
    """The fused sampler's trajectory in plain PyTorch, differentiable; z [N, 2] -> [N, 2]."""
    x, a = z, [1.0, *abar.tolist()]
    for t in range(len(abar), 0, -1):
        eps = net(torch.cat([x, torch.full_like(x[:, :1], (t - 1) / (len(abar) - 1))], 1))
        x0 = (x - (1 - a[t]) ** 0.5 * eps) / a[t] ** 0.5
        x = a[t - 1] ** 0.5 * x0 + (1 - a[t - 1]) ** 0.5 * eps
    return x


def gradient_search(scores, objective, start, evaluations=60):
    """scipy's L-BFGS-B from start: objective (fd or sw2) and exact gradient on at most 8192 Sobol points."""
    begin, fds, best = time.perf_counter(), [], (np.inf, None)
    z = sobol_normal(2 ** min(13, scores.config.points.bit_length() - 3), 7)

    def value(w):
        nonlocal best
        if len(fds) == evaluations:
            raise StopIteration
        net = network(scores.theta([w])[0].cpu())
        x = ddim_plain(net, z, scores.abar).double()
        centred = x - x.mean(0)
        loss = {"fd": frechet_to_target(x.mean(0), centred.T @ centred / len(x)), "sw2": sliced_w2(x)}
        slope = parameters_to_vector(torch.autograd.grad(loss[objective], list(net.parameters())))
        fds.append(loss["fd"].item())
        best = min(best, (loss[objective].item(), w.tolist()))
        gradient = [float(part.sum()) for part in (slope * (scores.theta_r - scores.theta_s)).split(SIZES)]
        return loss[objective].item(), gradient

    with contextlib.suppress(StopIteration):
        scipy.optimize.minimize(value, np.full(6, start), jac=True, method="L-BFGS-B", bounds=[(-20, 20)] * 6,
                                options={"ftol": 1e-9, "gtol": 1e-9})  # below the integral's own error
    took = {"evaluations": len(fds), "seconds": time.perf_counter() - begin}
    return {"best": {"objective": objective, "start": start, **scores.verified(best[1]), **took}, "fd": fds}


def gradient_alignment(theta_r, config, points=100_000, passes=16):
    """Cosine of the gradients on real and synthetic data, weighted by Adam's preconditioner, for 46 zetas."""
    net, abar = network(theta_r), cosine_schedule(config.noise_levels).float()
    z, real_z = torch.randn(2, points, 2)  # shared points would align the gradients of their own noise

    def gradients(data, seed):  # [passes, 4418]
        torch.manual_seed(seed)
        losses = (denoising_loss(net, data, abar) for _ in range(passes))
        return torch.stack([parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))
                            for loss in losses])

    real, decay = gradients(real_z @ TARGET_ROOT, config.seed + 2**22), 0.999 ** torch.arange(passes).flip(0)
    weight, real = 1 / ((decay @ real.square() / decay.sum()).sqrt() + 1e-8), real.mean(0)
    curve = {"zeta": np.linspace(0.8, 1.2, 46).tolist(), "cosine": []}
    for zeta in tqdm(curve["zeta"], desc="gradient alignment", leave=False):
        synthetic = neon_ext.mlp_ddim(theta_r[None], z, cosine_schedule(config.sample_steps), zeta)[0]
        g = gradients(synthetic, config.seed + 2**23).mean(0)  # the same noise for every zeta
        cosine = (weight * g * real).sum() / ((weight * g * g).sum() * (weight * real * real).sum()).sqrt()
        curve["cosine"].append(float(cosine))
    return curve


def experiment(config, args):
    """Every part for one seed; each is kept in the seed's folder as soon as it is finished."""
    part = functools.partial(finished, args.out / f"seed_{config.seed}", config)
    models = part("models", train_models, config)
    scores = {name: Scores(models["theta_r"], theta_s, config) for name, theta_s in models["theta_s"].items()}
    sweeps = {name: part(f"sweep of {name}", ranking, scores[name], [[w] * 6 for w in GLOBAL_W])
              for name in tqdm(scores, desc="global sweeps", leave=False)}
    main = f"zeta 1.1, {config.self_epochs[-1]} epochs"
    scores, w_star = scores[main], sweeps[main]["best"]["w"][0]
    found = {"base": {"best": part("base", scores.verified, [0.0] * 6)},
             "collapsed": {"best": part("collapsed", scores.verified, [-1.0] * 6)}, "global": sweeps[main]}
    for delta in tqdm(args.delta, desc="layer-wise grids", leave=False):
        found[f"delta {delta:g}"] = part(f"grid {delta}", layer_grid, scores, w_star, delta)
    starts = {"global": w_star, "zero": 0.0}
    searches = list(itertools.product(("fd", "sw2"), starts)) if args.search else []
    for objective, start in tqdm(searches, desc="gradient searches", leave=False):
        name = f"gradient on {objective} from {start}"
        found[name] = part(name, gradient_search, scores, objective, starts[start])
    aligned = args.alignment and config.seed == args.seed  # one curve, from the first seed
    curve = part("alignment", gradient_alignment, models["theta_r"], config) if aligned else None
    best = {name: search["best"] for name, search in found.items()}
    summary = {"seed": config.seed, "base": best["base"], "collapsed": best["collapsed"],
               "global": best["global"] | {"w": w_star},
               "layerwise": [row for row in best.values() if "delta" in row],
               "search": sorted((row for row in best.values() if "start" in row), key=lambda row: row["fd"]),
               "global_optima": {name: sweep["best"] for name, sweep in sweeps.items()}, "alignment": curve}
    return {"data": models["data"], "scores": scores, "sweeps": sweeps, "found": found, "best": best,
            "summary": summary}


# ---------------------------------------------------------------- report
def print_table(runs):
    """Mean and standard deviation over seeds (of one: FD's numerical error), and how many beat global."""
    print(f"\n{f'seeds: {len(runs)}':<28}FD{'SW2':>21}{'paper FD':>28}   seeds beating global: FD, SW2")
    scores = {name: np.array([[run["best"][name][score] for score in ("fd", "sw2")] for run in runs])
              for name in runs[0]["best"]}  # [seeds, 2]
    table = []
    for name, ours in scores.items():
        best, mean, wins = runs[0]["best"][name], ours.mean(0), (ours < scores["global"]).sum(0).tolist()
        std = ours.std(0, ddof=1).tolist() if len(runs) > 1 else [best["fd_error"], None]
        table.append({"name": name, "mean": mean.tolist(), "std": std, "better_than_global": wins})
        spread, weights = ("" if v is None else f"+- {v:.6f}" for v in std), np.round(best["w"], 2)
        print(f"{name:<27} {mean[0]:.6f} {next(spread):<11} {mean[1]:.6f} {next(spread):<11} "
              f"{PAPER_FD.get(name, ''):>9}   {wins[0]}, {wins[1]}  {weights if len(runs) == 1 else ''}")
    return table


def draw(path, *panels, width=5, height=4):
    """One picture: panels of (curves, settings of the axis), a curve being (x, y, style, label)."""
    figure = Figure((width * len(panels), height), layout="constrained")
    for axis, (curves, settings) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for x, y, style, label in curves:
            axis.plot(x, y, style, label=label, markersize=3)
        axis.set(**settings)
        if label:
            axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=80, format="png"))


def pictures(out, run):
    best, log = run["best"], {"yscale": "log"}
    grids = {name: row for name, row in best.items() if "delta" in row}
    deltas, fds, sw2s = zip(*((row["delta"], row["fd"], row["sw2"]) for row in grids.values()))
    curves = [(GLOBAL_W, sweep["fd"], "-", f"{name}, best w = {sweep['best']['w'][0]:g}")
              for name, sweep in run["sweeps"].items()]
    draw(out / "score_against_w.png", (curves, log | {"xlabel": "w, all layers", "ylabel": "FD"}), width=7)
    weights = [(LAYERS, row["w"], "o-", name) for name, row in grids.items()]
    curves = [(deltas, fds, "o-", "FD, ours"), (deltas, sw2s, "s-", "SW2, ours, not searched"),
              (deltas, [best["global"]["fd"]] * len(grids), ":", "FD, global optimum, ours"),
              (DELTAS, list(PAPER_FD.values())[2:], "x--", "FD, paper")]
    draw(out / "layers_and_deltas.png", (weights, {"ylabel": "weight of the winner"}),
         (curves, log | {"xlabel": "delta", "ylabel": "score of the winner"}))
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 200))
    ellipse = 2 * TARGET_ROOT.T.numpy() @ [circle.real, circle.imag]
    names = ("base", "collapsed", "global", min(grids, key=lambda name: grids[name]["fd"]))
    clouds = {"real": run["data"]} | {name: run["scores"].samples(best[name]["w"], 1024) for name in names}
    axis = {"aspect": "equal", "xlim": (-5, 5), "ylim": (-5, 5)}
    draw(out / "samples.png", *(([(*points.T, ".", ""), (*ellipse, "-", "")], axis | {"title": name})
                                for name, points in clouds.items()), width=2.6, height=2.9)
    curves = [(range(1, 1 + len(search["fd"])), np.minimum.accumulate(search["fd"]),
               "-" if name in grids else "--", name)
              for name, search in run["found"].items() if "fd" in search and name != "global"]
    axis = {"xscale": "log", "yscale": "log", "xlabel": "evaluations", "ylabel": "best FD so far"}
    draw(out / "search.png", (curves, axis), width=7, height=5)
    if run["summary"]["alignment"]:
        ours, paper = run["summary"]["alignment"].values(), ((0.9, 1.1), (0.127, -0.175))
        axis = {"xlabel": "zeta of the samples", "ylabel": "cosine with the real gradient"}
        draw(out / "alignment.png", ([(*ours, "-", "ours"), (*paper, "x", "paper")], axis))


# ---------------------------------------------------------------- command line
def deltas(text):
    """"0.4,1.0" or "all" -> floats."""
    values = DELTAS if text == "all" else sorted(set(map(float, text.split(","))))
    if not all(0 < value <= 100 for value in values):
        raise ValueError
    return values


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error, add = lambda message: fail(f"{message} (see --help)"), parser.add_argument
    add("--delta", type=deltas, default=[1.72], help="spacing of the grid, 1.72; several by commas, or all")
    add("--seed", type=int, default=42)
    add("--seeds", type=int, default=1, help="repeat for this many seeds from --seed on")
    add("--protocol", choices=["exact", "paper"], default="exact", help="Sobol points or the authors' draws")
    add("--points", type=int, help="the most points one score takes: 32768, or 1000000 for --protocol paper")
    add("--search", choices=["gradient"], help="also search the six weights by exact gradients")
    add("--alignment", action="store_true", help="also the gradient-alignment curve, first seed")
    add("--base-steps", type=int, default=Config.base_steps, help="training steps of the base model")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where configurations are scored")
    add("--out", type=Path, default=Path("results/toy"))
    args = parser.parse_args(argv)
    args.points = args.points or (Config.points if args.protocol == "exact" else 1_000_000)
    if args.seeds < 1 or args.base_steps < 1 or not 0 <= args.seed < 2**31:
        fail("--seeds and --base-steps must be at least 1, --seed at least 0")
    if not 512 <= args.points <= 2**24 or args.protocol == "exact" and args.points.bit_count() > 1:
        fail(f"--points {args.points}: give a power of two from 512 to {2**24}")
    if neon_ext is None:
        fail("the extension neon_ext is not built: run `pip install --no-build-isolation .` here first")
    if args.device == "cuda" and not (torch.cuda.is_available() and neon_ext.build_config()["cuda"]):
        fail("--device cuda: no usable GPU, or neon_ext was built without CUDA; use --device cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    if not os.access(args.out, os.W_OK):
        fail(f"--out {args.out} cannot be written: choose another folder")
    return args


def main(argv):
    begin, args = time.perf_counter(), parse(argv)
    settings = {key: value for key, value in vars(args).items() if key in Config.__dataclass_fields__}
    runs = [experiment(Config(**settings | {"seed": args.seed + k}), args) for k in range(args.seeds)]
    header = ",".join([f"w_{layer.replace(' ', '_')}" for layer in LAYERS] + ["fd", "points"])
    for grid in (search for search in runs[0]["found"].values() if "delta" in search["best"]):
        table = np.column_stack([grid["W"], grid["fd"], grid["points"]])
        write_atomically(args.out / f"grid_{grid['best']['delta']:g}.csv", lambda path: np.savetxt(
            path, table, ["%g"] * 6 + ["%.7g", "%d"], ",", header=header, comments=""))
    pictures(args.out, runs[0])
    result = {
        "command": " ".join(["python toy_neon.py", *argv]), "config": dataclasses.asdict(Config(**settings)),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "scipy": scipy.__version__, "neon_ext": neon_ext.build_config()},
        **runs[0]["summary"], "over_seeds": print_table(runs), "seeds": [run["summary"] for run in runs],
        "seconds_total": time.perf_counter() - begin}
    write_atomically(args.out / "summary.json", lambda path: path.write_text(json.dumps(result, indent=1)))
    print(f"\n{result['seconds_total']:.1f} s; summary.json, grids and pictures in {args.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        fail(f"{error}: choose an --out that can be written")
    except KeyboardInterrupt:
        fail("stopped; finished parts are kept, run the same command again", 130)
