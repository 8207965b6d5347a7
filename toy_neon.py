"""Toy experiment of Adaptive NEON: repair a small diffusion model, layer by layer, after it trained on its own samples.

    theta = theta_r - w_layer * (theta_s - theta_r)      w > 0 away from collapse, w < 0 towards it, w = -1 is theta_s

theta_r: a 6-layer network trained on 1000 points of a 2-D Gaussian; theta_s: the same after 50 or 250 epochs on its own
samples (NEON, arXiv 2510.03597; Adaptive NEON, section 4.1). A 20-step DDIM is a deterministic map of its starting
noise, so the Fréchet distance of a configuration is an integral over the plane: `--protocol exact` computes it with
Sobol points instead of drawing it, and every reported configuration also carries the sliced 2-Wasserstein distance
(SW2), which no search has seen unless it says so.

    python toy_neon.py --delta 1.72                  one layer-wise grid of 729 configurations
    python toy_neon.py --delta all --seeds 5         the recorded run: every delta of the paper, five seeds
    python toy_neon.py --delta 1.72 --search gradient --alignment

Recorded figures and their commands: results/toy and the README.
"""
import argparse
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from scipy.special import ndtri
from scipy.stats import qmc
from tqdm import tqdm

try:
    import neon_ext
except ImportError:  # reported in main(), in one line
    neon_ext = None

LAYERS = ("input", "block 0", "block 1", "block 2", "block 3", "output")
SHAPES = [(32, 3)] + [(32, 32)] * 4 + [(2, 32)]
OFFSETS = [0, *np.cumsum([out * (into + 1) for out, into in SHAPES]).tolist()]  # first parameter of each layer
TARGET_MEAN, TARGET_COV = torch.zeros(2, dtype=torch.float64), torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
DELTAS = (0.05, 0.1, 0.2, 0.4, 0.6, 1.0, 1.5, 1.72)
PAPER = {"base": 0.1626, "global": 0.03554, "w": 0.28}
PAPER_FD = dict(zip(DELTAS, (0.033162, 0.033426, 0.031258, 0.025099, 0.020841, 0.015483, 0.011345, 0.009516)))


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


@dataclass(frozen=True)
class Training:
    """What determines the models; the cache key is its hash. Paper defaults."""
    seed: int = 42
    points: int = 1000
    base_steps: int = 10_000
    base_lr: float = 1e-4
    self_lr: float = 1e-5
    self_epochs: tuple = (50, 250)
    train_noise_levels: int = 1000
    sample_steps: int = 20


@dataclass(frozen=True)
class Protocol:
    """Points per evaluation. `refine`: (points, survivors) stages of the 729; `verify`: independent sets of points."""
    name: str
    sweep: int
    search: int
    refine: tuple
    verify: tuple  # (sets, points in each)


PROTOCOLS = {"exact": Protocol("exact", 2**12, 2**13, ((2**9, 64), (2**12, 4), (2**15, 1)), (8, 2**15)),
             "paper": Protocol("paper", 1_000_000, 2**13, ((10_000, 1),), (1, 1_000_000)),
             "tiny": Protocol("tiny", 2**9, 2**9, ((2**7, 8), (2**9, 1)), (2, 2**9))}  # for tests


# ---------------------------------------------------------------- model and training
def cosine_schedule(n: int, s: float = 0.008) -> torch.Tensor:
    """Cumulative noise schedule abar [n] float64 (arXiv 2102.09672), abar[0] = 1."""
    t = torch.arange(n, dtype=torch.float64) / n
    abar = torch.cos((t + s) / (1 + s) * torch.pi / 2) ** 2
    return abar / abar[0]


def unpack(theta):
    """theta [4418] -> weights and biases of the six layers, as views."""
    tensors = []
    for (out, into), begin in zip(SHAPES, OFFSETS):
        tensors += [theta[begin:begin + out * into].view(out, into), theta[begin + out * into:begin + out * (into + 1)]]
    return tensors


def predict_noise(tensors, x, time_feature):
    """x [N, 2], time_feature [N, 1] in [0, 1] -> eps [N, 2]."""
    h = F.linear(torch.cat([x, time_feature], 1), tensors[0], tensors[1])  # no activation after the input layer
    for weight, bias in zip(tensors[2:-2:2], tensors[3:-2:2]):
        h = torch.relu(F.linear(h, weight, bias))
    return F.linear(h, tensors[-2], tensors[-1])


def denoising_loss(tensors, data, abar, generator):
    """Mean squared error of the predicted noise at one random time per point; data [N, 2], abar [T]."""
    t = torch.randint(len(abar), (len(data), 1), generator=generator)
    eps = torch.randn(data.shape, generator=generator)
    noisy = abar[t].sqrt() * data + (1 - abar[t]).sqrt() * eps
    return F.mse_loss(predict_noise(tensors, noisy, t.float() / (len(abar) - 1)), eps)


def train(theta, data, lr, epochs, config, generator, label):
    """Full-batch Adam; returns {epoch: theta [4418]}. On the CPU with one thread: the network is too small for more."""
    tensors = [p.clone().requires_grad_() for p in unpack(theta)]
    optimizer = torch.optim.Adam(tensors, lr=lr, fused=True)
    abar, saved = cosine_schedule(config.train_noise_levels).float(), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.empty(2**22)  # freeing 16 MB raises glibc's mmap threshold: no page faults for every 128 kB activation, 2.5x
    try:
        for epoch in tqdm(range(1, max(epochs) + 1), desc=label, leave=False, mininterval=1):
            optimizer.zero_grad(set_to_none=True)
            denoising_loss(tensors, data, abar, generator).backward()
            optimizer.step()
            if epoch in epochs:
                saved[epoch] = torch.cat([p.detach().flatten() for p in tensors])
    finally:
        torch.set_num_threads(threads)
    return saved


def real_data(config, generator=None):
    """The 1000 real points: the first draw of the seed's stream."""
    generator = generator or torch.Generator().manual_seed(config.seed)
    return torch.randn(config.points, 2, generator=generator) @ torch.linalg.cholesky(TARGET_COV).float().T


def train_base(config):
    generator = torch.Generator().manual_seed(config.seed)
    data = real_data(config, generator)
    theta = torch.cat([(torch.rand(out * (into + 1), generator=generator) * 2 - 1) * into ** -0.5
                       for out, into in SHAPES])  # torch.nn.Linear's initialisation
    return {"base": train(theta, data, config.base_lr, [config.base_steps], config, generator, "base").popitem()[1]}


def self_train(config, theta_r, zeta):
    generator = torch.Generator().manual_seed(config.seed + 2**20)  # not the real data's noise again
    z = torch.randn(config.points, 2, generator=generator)
    synthetic = neon_ext.mlp_ddim(theta_r[None], z, cosine_schedule(config.sample_steps), zeta)[0]
    saved = train(theta_r, synthetic, config.self_lr, config.self_epochs, config, generator, f"self-training at {zeta}")
    return {f"epoch{epoch}": theta for epoch, theta in saved.items()}


# ---------------------------------------------------------------- files
def write_atomically(path: Path, write):
    """write(temporary path), then rename: an interrupted run leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cached(path: Path, key: str, make):
    """The tensors in `path` if it was written under `key`, else those of make(), stored there."""
    if path.exists():
        try:
            stored = torch.load(path, weights_only=True)
            matches = stored.pop("key") == key
        except Exception as error:
            raise UserError(f"the cache {path} is damaged ({type(error).__name__}): delete it and run again") from None
        if not matches:
            raise UserError(f"the cache {path} comes from another experiment: delete it or choose another --out")
        return stored
    tensors = make()
    write_atomically(path, lambda p: torch.save({**tensors, "key": key}, p))
    return tensors


def load_models(config, out: Path):
    """(theta_r, {(zeta, epochs): theta_s}); trained where the cache under out/models lacks them."""
    key = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()[:12]
    folder = out / "models"
    folder.mkdir(exist_ok=True)
    theta_r = cached(folder / f"base_{key}.pt", key, lambda: train_base(config))["base"]
    collapsed = {}
    for zeta in (1.1, 0.9):
        part = cached(folder / f"self_{zeta}_{key}.pt", key, lambda: self_train(config, theta_r, zeta))
        collapsed |= {(zeta, epoch): part[f"epoch{epoch}"] for epoch in config.self_epochs}
    return theta_r, collapsed


# ---------------------------------------------------------------- scores
@functools.lru_cache(maxsize=16)
def sobol_normal(n: int, seed: int) -> torch.Tensor:
    """n = 2^k scrambled Sobol points of N(0, I): [n, 2] float32."""
    u = qmc.Sobol(2, scramble=True, seed=seed).random_base2(int(np.log2(n)))
    return torch.from_numpy(ndtri(np.clip(u, 2.0**-33, 1 - 2.0**-33))).float()


class Scores:
    """Fréchet distance and SW2 to the exact target of extrapolated models; counts evaluations."""

    def __init__(self, theta_r, theta_s, config, protocol, device):
        self.theta_r, self.theta_s, self.protocol, self.device = theta_r, theta_s, protocol, device
        self.abar = cosine_schedule(config.sample_steps)
        self.draws = torch.Generator().manual_seed(config.seed + 2**21)
        self.evaluations = 0

    def points(self, n, seed):
        if self.protocol.name == "paper":  # a fresh draw every time, as the authors
            return torch.randn(n, 2, generator=self.draws)
        return sobol_normal(n, seed)

    def theta(self, W):
        """W [G, 6] -> [G, 4418] float32."""
        W = torch.as_tensor(np.asarray(W, dtype=np.float64)).to(self.device)
        return neon_ext.extrapolate_grid(self.theta_r.to(self.device), self.theta_s.to(self.device), OFFSETS, W)

    def moments(self, W, n, seed=0):
        correction = int(self.protocol.name == "paper")
        mean, cov = zip(*(neon_ext.mlp_ddim_moments(chunk, self.points(n, seed).to(self.device), self.abar,
                                                    correction=correction)
                          for chunk in self.theta(W).split(1 if correction else 729)))
        return torch.cat(mean).cpu(), torch.cat(cov).cpu()

    def fd(self, W, n, seed=0):
        """[G, 6] -> Fréchet distances [G] from n points each."""
        self.evaluations += len(W)
        return neon_ext.frechet_distance(*self.moments(W, n, seed), TARGET_MEAN, TARGET_COV).numpy()

    def samples(self, w, n=2**15, seed=1000):
        return neon_ext.mlp_ddim(self.theta([w]), sobol_normal(n, seed).to(self.device), self.abar)[0].cpu()

    def verified(self, w):
        """Score of one configuration on point sets no search uses: fd, its numerical standard error, and SW2."""
        sets, n = self.protocol.verify
        mean, cov = zip(*(self.moments([w], n, 1000 + k) for k in range(sets)))
        mean, cov = torch.cat(mean), torch.cat(cov)  # [sets, 2], [sets, 2, 2]
        spread = mean - mean.mean(0)
        pooled = cov.mean(0) + spread.T @ spread / sets
        each = neon_ext.frechet_distance(mean, cov, TARGET_MEAN, TARGET_COV)
        fd = neon_ext.frechet_distance(mean.mean(0), pooled, TARGET_MEAN, TARGET_COV)
        error = float(each.std() / sets ** 0.5) if sets > 1 else None
        return {"w": [float(v) for v in w], "fd": float(fd), "fd_error": error, "sw2": float(sliced_w2(self.samples(w)))}


def sliced_w2(x, directions=32):
    """Sliced squared 2-Wasserstein distance of samples x [N, 2] to the target, whose projections are Gaussian."""
    angle = torch.arange(directions, dtype=torch.float64) * torch.pi / directions
    direction = torch.stack([angle.cos(), angle.sin()]).to(x.dtype)  # [2, directions]
    sigma = torch.einsum("id,ij,jd->d", direction, TARGET_COV.to(x.dtype), direction).sqrt()
    quantile = torch.from_numpy(ndtri((np.arange(len(x)) + 0.5) / len(x))).to(x.dtype)
    return ((x @ direction).sort(0).values - quantile[:, None] * sigma).square().mean()


# ---------------------------------------------------------------- searches
def global_sweep(scores):
    """w in linspace(-2, 2, 101), one for all layers -> {w, fd} lists and the best w."""
    w = np.linspace(-2, 2, 101)
    parts = tqdm(np.array_split(w, 10), desc="global sweep", leave=False)
    fd = np.concatenate([scores.fd(np.repeat(part[:, None], 6, 1), scores.protocol.sweep) for part in parts])
    return {"w": w.round(4).tolist(), "fd": fd.tolist(), "best": float(w[fd.argmin()].round(4))}


def layer_grid(scores, w_star, delta):
    """{w* - delta, w*, w* + delta}^6, few points for all and many for the survivors -> W [729, 6], fd, points used."""
    W = np.array(list(itertools.product((w_star - delta, w_star, w_star + delta), repeat=6)))
    fd, used = np.full(len(W), np.inf), np.zeros(len(W), dtype=int)
    alive = np.arange(len(W))
    for n, survivors in scores.protocol.refine:
        fd[alive], used[alive] = scores.fd(W[alive], n), n
        alive = alive[np.argsort(fd[alive], kind="stable")[:survivors]]
    return W, fd, used, int(alive[0])


def ddim_plain(theta, z, abar):
    """The fused sampler's trajectory in plain PyTorch, differentiable in theta; [N, 2]."""
    tensors, x, a = unpack(theta), z, abar.tolist()
    for t in reversed(range(len(a))):
        before = a[t - 1] if t else 1.0
        eps = predict_noise(tensors, x, torch.full_like(x[:, :1], t / (len(a) - 1)))
        x0 = (x - (1 - a[t]) ** 0.5 * eps) / a[t] ** 0.5
        x = before ** 0.5 * x0 + (1 - before) ** 0.5 * eps
    return x


def gradient_search(scores, objective, start, evaluations=60, points=None):
    """scipy's L-BFGS-B over the six weights with exact gradients through the sampler."""
    begin, trace, best = time.perf_counter(), [], [np.inf, None]
    points = points or scores.protocol.search
    z = sobol_normal(points, 7)
    sizes = torch.tensor(np.diff(OFFSETS))

    def value(w):
        if len(trace) == evaluations:
            raise StopIteration
        weights = torch.tensor(w, dtype=torch.float32, requires_grad=True)
        theta = scores.theta_r - weights.repeat_interleave(sizes) * (scores.theta_s - scores.theta_r)
        x = ddim_plain(theta, z, scores.abar)
        if objective == "fd":
            mean = x.double().mean(0)
            centred = x.double() - mean
            loss = neon_ext.frechet_distance(mean, centred.T @ centred / points, TARGET_MEAN, TARGET_COV)
        else:
            loss = sliced_w2(x.double())
        gradient, = torch.autograd.grad(loss, weights)
        trace.append(float(loss.detach()))
        best[:] = min(best, [trace[-1], w.tolist()])
        return trace[-1], gradient.double().numpy()

    try:
        scipy.optimize.minimize(value, np.full(6, start), jac=True, method="L-BFGS-B", bounds=[(-20, 20)] * 6,
                                options={"ftol": 1e-14, "gtol": 1e-9})
    except StopIteration:
        pass
    seconds = time.perf_counter() - begin
    return {"objective": objective, "start": start, **scores.verified(best[1]), "evaluations": len(trace),
            "seconds": seconds, "trace": np.minimum.accumulate(trace).tolist()}


def gradient_alignment(theta_r, config, points=100_000, passes=16):
    """Cosine of population gradients on real and synthetic data, weighted by Adam's preconditioner, for 46 zetas."""
    tensors = [p.clone().requires_grad_() for p in unpack(theta_r)]
    abar = cosine_schedule(config.train_noise_levels).float()
    generator = torch.Generator().manual_seed(config.seed + 2**22)

    def gradients(data):
        for _ in range(passes):
            loss = denoising_loss(tensors, data, abar, generator)
            yield torch.cat([g.flatten() for g in torch.autograd.grad(loss, tensors)])

    z = torch.randn(points, 2, generator=generator)
    real, v, mean = z @ torch.linalg.cholesky(TARGET_COV).float().T, 0, 0
    for g in gradients(real):
        v, mean = 0.999 * v + 0.001 * g.square(), mean + g / passes
    weight = 1 / ((v / (1 - 0.999**passes)).sqrt() + 1e-8)
    curve = {"zeta": np.linspace(0.8, 1.2, 46).tolist(), "cosine": []}
    for zeta in tqdm(curve["zeta"], desc="gradient alignment", leave=False):
        synthetic = neon_ext.mlp_ddim(theta_r[None], z, cosine_schedule(config.sample_steps), zeta)[0]
        g = sum(gradients(synthetic)) / passes
        dot = lambda a, b: float((weight * a * b).sum())
        curve["cosine"].append(dot(g, mean) / (dot(g, g) * dot(mean, mean)) ** 0.5)
    return curve


# ---------------------------------------------------------------- one experiment
def experiment(config, protocol, args, out):
    """Everything for one seed -> the summary without its run-wide part, and what the pictures need."""
    theta_r, collapsed = load_models(config, out)
    make = lambda theta_s: Scores(theta_r, theta_s, config, protocol, args.device)
    sweeps = {}
    for (zeta, epochs), theta_s in collapsed.items():
        sweeps[f"zeta {zeta}, {epochs} epochs"] = global_sweep(make(theta_s))
    main = f"zeta 1.1, {config.self_epochs[-1]} epochs"
    scores, w_star = make(collapsed[1.1, config.self_epochs[-1]]), sweeps[main]["best"]
    summary = {"seed": config.seed, "base": scores.verified([0.0] * 6), "collapsed": scores.verified([-1.0] * 6),
               "global": scores.verified([w_star] * 6) | {"w": w_star, "evaluations": 101}, "layerwise": [],
               "sweeps": sweeps}
    for delta in tqdm(args.delta, desc="layer-wise grids", leave=False):
        begin, scores.evaluations = time.perf_counter(), 0
        W, fd, used, best = layer_grid(scores, w_star, delta)
        seconds = time.perf_counter() - begin
        summary["layerwise"].append({"delta": delta, **scores.verified(W[best]), "evaluations": scores.evaluations,
                                     "seconds": seconds})
        write_grid(out / f"grid_{delta:g}.csv", W, fd, used)
    if args.search:
        runs = [gradient_search(scores, objective, start) for objective in ("fd", "sw2") for start in (w_star, 0.0)]
        summary["search"] = sorted(runs, key=lambda run: run["fd"])
    if args.alignment:
        summary["alignment"] = gradient_alignment(theta_r, config)
    return summary, scores


def write_grid(path, W, fd, used):
    def write(temporary):
        with open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([f"w_{layer.replace(' ', '_')}" for layer in LAYERS] + ["fd", "points"])
            writer.writerows([*(f"{v:g}" for v in w), f"{score:.7g}", n] for w, score, n in zip(W, fd, used))
    write_atomically(path, write)


# ---------------------------------------------------------------- report
def rows_of(summary):
    """(name, summary entry, the paper's Fréchet distance or None) for the table and the scatter plots."""
    rows = [("base, w = 0", summary["base"], PAPER["base"]), ("collapsed, w = -1", summary["collapsed"], None),
            (f"global, w = {summary['global']['w']:g}", summary["global"], PAPER["global"])]
    rows += [(f"layer-wise, delta {run['delta']:g}", run, PAPER_FD.get(run["delta"])) for run in summary["layerwise"]]
    return rows + [(f"gradient on {run['objective']} from {run['start']:g}", run, None)
                   for run in summary.get("search", [])]


def print_table(summary):
    print(f"\nseed {summary['seed']}                        ours FD   +- error        SW2   paper FD   weights")
    for name, run, paper in rows_of(summary):
        error = "" if run["fd_error"] is None else f"{run['fd_error']:.1e}"
        w = run["w"] if isinstance(run["w"], list) and len(set(run["w"])) > 1 else []
        print(f"{name:<28} {run['fd']:>10.7f} {error:>10} {run['sw2']:>10.5f} {paper or '':>10}   "
              + ", ".join(f"{v:.2f}" for v in w))


def over_seeds(summaries):
    """Mean and standard deviation of every row, and in how many seeds it beats the global optimum on both scores."""
    table = []
    for rows in zip(*(rows_of(s) for s in summaries)):
        fd, sw2 = (np.array([run[key] for _, run, _ in rows]) for key in ("fd", "sw2"))
        wins = [sum(run[key] < s["global"][key] for (_, run, _), s in zip(rows, summaries)) for key in ("fd", "sw2")]
        table.append({"name": rows[0][0].split(", w =")[0].split(" from 0.")[0], "fd_mean": fd.mean(),
                      "fd_std": fd.std(ddof=1), "sw2_mean": sw2.mean(), "sw2_std": sw2.std(ddof=1),
                      "beats_global_fd": wins[0], "beats_global_sw2": wins[1], "seeds": len(summaries)})
    print(f"\n{len(summaries)} seeds: mean +- std          FD                     SW2          better than global: FD, SW2")
    for row in table:
        print(f"{row['name']:<26} {row['fd_mean']:.5f} +- {row['fd_std']:.5f}   {row['sw2_mean']:.5f} +- "
              f"{row['sw2_std']:.5f}   {row['beats_global_fd']}/{row['seeds']}, {row['beats_global_sw2']}/{row['seeds']}")
    return table


def plot(summary, scores, config, out):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure, name):
        figure.tight_layout()
        write_atomically(out / name, lambda path: figure.savefig(path, dpi=80, format="png"))
        plt.close(figure)

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, zeta in zip(axes, (1.1, 0.9)):
        for name, sweep in summary["sweeps"].items():
            if name.startswith(f"zeta {zeta}"):
                axis.semilogy(sweep["w"], sweep["fd"], label=f"{name.split(', ')[1]}, best w = {sweep['best']:g}")
        axis.axvline(0, color="grey", lw=0.5)
        axis.set(title=f"self-training samples at zeta {zeta}", xlabel="w, all layers")
        axis.legend()
    axes[0].set_ylabel("Fréchet distance")
    save(figure, "score_against_w.png")

    runs = summary["layerwise"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    image = axes[0].imshow([run["w"] for run in runs], cmap="coolwarm", vmin=-2, vmax=2, aspect="auto")
    axes[0].set_xticks(range(6), LAYERS, rotation=30)
    axes[0].set_yticks(range(len(runs)), [f"{run['delta']:g}" for run in runs])
    axes[0].set(ylabel="delta", title="winning weights")
    figure.colorbar(image, ax=axes[0])
    deltas = [run["delta"] for run in runs]
    axes[1].semilogy(deltas, [run["fd"] for run in runs], "o-", label="Fréchet distance, ours")
    axes[1].semilogy(deltas, [run["sw2"] for run in runs], "s-", label="SW2, ours (not searched)")
    axes[1].semilogy(list(PAPER_FD), list(PAPER_FD.values()), "x--", color="grey", label="Fréchet distance, paper")
    axes[1].axhline(summary["global"]["fd"], color="C0", ls=":", label="global optimum, ours")
    axes[1].set(xlabel="delta", title="score of the winner")
    axes[1].legend(fontsize=8)
    save(figure, "layers_and_deltas.png")

    best = min(runs, key=lambda run: run["fd"])
    clouds = [("real data", real_data(config))]
    clouds += [(name, scores.samples([run["w"]] * 6 if np.isscalar(run["w"]) else run["w"], 2**10))
               for name, run, _ in rows_of(summary) if run is best or not name.startswith(("layer", "grad"))]
    figure, axes = plt.subplots(1, len(clouds), figsize=(3 * len(clouds), 3.2), sharex=True, sharey=True)
    circle = np.linspace(0, 2 * np.pi, 200)
    ellipse = 2 * np.linalg.cholesky(TARGET_COV.numpy()) @ [np.cos(circle), np.sin(circle)]
    for axis, (name, points) in zip(axes, clouds):
        axis.scatter(*points.T, s=2, alpha=0.5)
        axis.plot(*ellipse, color="C1", lw=1)
        axis.set(title=name, aspect="equal", xlim=(-5, 5), ylim=(-5, 5))
    save(figure, "samples.png")

    if "search" in summary:
        figure, axis = plt.subplots(figsize=(6, 4))
        for run in summary["search"]:
            axis.loglog(range(1, len(run["trace"]) + 1), run["trace"], ls="-" if run["objective"] == "fd" else "--",
                        label=f"gradient, {run['objective']}, from {run['start']:g}")
        axis.plot([run["evaluations"] for run in runs], [run["fd"] for run in runs], "k^", label="grids of 729, fd")
        axis.set(xlabel="evaluations", ylabel="best objective so far", title="search")
        axis.legend(fontsize=8)
        save(figure, "search.png")
    if "alignment" in summary:
        figure, axis = plt.subplots(figsize=(6, 4))
        axis.plot(summary["alignment"]["zeta"], summary["alignment"]["cosine"])
        axis.axhline(0, color="grey", lw=0.5)
        axis.set(xlabel="zeta of the synthetic data", ylabel="cosine with the real gradient", title="gradient alignment")
        save(figure, "alignment.png")


# ---------------------------------------------------------------- command line
def parse_deltas(text):
    if text == "all":
        return list(DELTAS)
    try:
        deltas = [float(part) for part in text.split(",")]
    except ValueError:
        deltas = []
    if not deltas or not all(0 < delta < float("inf") for delta in deltas):
        raise UserError(f"--delta {text!r}: give positive numbers such as 1.72 or 0.4,1.0, or `all`")
    return deltas


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(argv):
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--delta", default="1.72", help="spacing of the layer-wise grid; several by commas, or all")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--seeds", type=int, default=1, help="repeat for this many seeds from --seed on")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="exact")
    parser.add_argument("--search", choices=["gradient"], help="also search the six weights by exact gradients")
    parser.add_argument("--alignment", action="store_true", help="also the gradient-alignment curve")
    parser.add_argument("--base-steps", type=int, default=Training.base_steps, help="training steps of the base model")
    parser.add_argument("--device", default="cpu", help="where configurations are scored: cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("results/toy"))
    args = parser.parse_args(argv)
    args.delta = parse_deltas(args.delta)
    if args.seeds < 1 or args.base_steps < 1 or args.seed < 0:
        raise UserError("--seeds and --base-steps must be at least 1, --seed at least 0")
    if neon_ext is None:
        raise UserError("the extension neon_ext is not built: run `pip install --no-build-isolation .` here first")
    if args.device not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device}: choose cpu or cuda")
    if args.device == "cuda" and not (torch.cuda.is_available() and neon_ext.build_config()["cuda"]):
        raise UserError("--device cuda: no usable GPU, or neon_ext was built without CUDA; use --device cpu")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out / "probe", lambda path: path.write_text("")) or (args.out / "probe").unlink()
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written ({error.strerror}): choose another folder") from None
    return args


def run(argv):
    begin = time.perf_counter()
    args = parse(argv)
    protocol, summaries = PROTOCOLS[args.protocol], []
    for seed in range(args.seed, args.seed + args.seeds):
        config = Training(seed=seed, base_steps=args.base_steps)
        out = args.out if seed == args.seed else args.out / f"seed_{seed}"
        out.mkdir(exist_ok=True)
        summary, scores = experiment(config, protocol, args, out)
        print_table(summary)
        if seed == args.seed:
            plot(summary, scores, config, out)
        summaries.append(summary)
    result = summaries[0] | {
        "command": " ".join(["python toy_neon.py", *argv]), "config": dataclasses.asdict(Training(seed=args.seed)),
        "protocol": dataclasses.asdict(protocol), "device": args.device, "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "neon_ext": neon_ext.build_config(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "scipy": scipy.__version__}}
    if len(summaries) > 1:
        keep = ("seed", "base", "collapsed", "global", "layerwise", "search")
        result["seeds"] = [{key: s[key] for key in keep if key in s} for s in summaries]
        result["over_seeds"] = over_seeds(summaries)
    result["seconds_total"] = time.perf_counter() - begin
    write_atomically(args.out / "summary.json", lambda path: path.write_text(json.dumps(result, indent=1)))
    print(f"\n{result['seconds_total']:.1f} s; summary.json, grids and pictures in {args.out}")


def main(argv=None):
    try:
        run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        sys.exit(print(f"toy_neon: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("\ntoy_neon: stopped; finished parts are kept, run the same command again", file=sys.stderr) or 130)


if __name__ == "__main__":
    main()
