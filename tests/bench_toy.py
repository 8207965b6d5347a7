"""The toy's 729-configuration grid: ours against a per-configuration loop in plain PyTorch (10,000 random points each).

    python tests/bench_toy.py [--configurations 729] [--device cuda] [--large]

Both sides run on the same models in this process. The error of a score is its distance to 2^19 Sobol points.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import neon_ext  # noqa: E402
import toy_neon as toy  # noqa: E402


def plain_loop(scores, W):
    """As the paper's notebook: build the network, draw, sample, numpy moments; one configuration after the other."""
    fd, device = [], scores.device
    for w in W:
        steps = torch.tensor(w, dtype=torch.float32).repeat_interleave(torch.tensor(np.diff(toy.OFFSETS)))
        theta = scores.theta_r - steps * (scores.theta_s - scores.theta_r)
        with torch.no_grad():
            x = toy.ddim_plain(theta.to(device), torch.randn(10_000, 2, device=device), scores.abar).double().cpu()
        fd.append(float(neon_ext.frechet_distance(x.mean(0), torch.cov(x.T), toy.TARGET_MEAN, toy.TARGET_COV)))
    return np.array(fd)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--configurations", type=int, default=729, help="how many the plain loop runs (then scaled)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", action="store_true", help="also all 729 x 1,000,000 points (for a GPU)")
    args = parser.parse_args()
    config = toy.Training()
    torch.manual_seed(0)
    theta_r = toy.train_base(config)["base"]
    theta_s = toy.self_train(config, theta_r, 1.1)["epoch250"]
    scores = toy.Scores(theta_r, theta_s, config, toy.PROTOCOLS["exact"], args.device)
    w_star, wait = toy.global_sweep(scores)["best"], torch.cuda.synchronize if args.device == "cuda" else lambda: None

    times = []
    for _ in range(3):
        begin = time.perf_counter()
        W, fd, used, best = toy.layer_grid(scores, w_star, 1.72)
        wait()
        times.append(time.perf_counter() - begin)
    ours = min(times)
    chosen = np.random.default_rng(0).permutation(729)[:args.configurations]
    begin = time.perf_counter()
    drawn = plain_loop(scores, W[chosen])
    wait()
    plain = (time.perf_counter() - begin) * 729 / len(chosen)

    truth = scores.fd(W[[best]], 2**19, seed=99)[0]
    verified = scores.verified(W[best])
    repeats = plain_loop(scores, W[[best]].repeat(8, 0))
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, seed 42, w* = {w_star:g}, delta 1.72")
    print(f"plain loop, 729 x 10,000 random points     {plain:8.2f} s   error of a score {np.abs(repeats - truth).mean():.1e}")
    print(f"ours, 729 with successive refinement       {ours:8.2f} s   error of the verified score "
          f"{abs(verified['fd'] - truth):.1e} (reported {verified['fd_error']:.1e})")
    print(f"ratio                                      {plain / ours:8.1f}")
    print(f"winner of the grid {truth:.6f}; of the loop's {len(chosen)}: it claims {drawn.min():.6f}, "
          f"truth {scores.fd(W[chosen][[drawn.argmin()]], 2**19, seed=99)[0]:.6f}")
    if args.large:
        z = torch.randn(1_000_000, 2, device=args.device)
        theta = scores.theta(W)
        neon_ext.mlp_ddim_moments(theta[:2], z, scores.abar)
        wait()
        begin = time.perf_counter()
        neon_ext.mlp_ddim_moments(theta, z, scores.abar, correction=1)
        wait()
        print(f"ours, all 729 x 1,000,000 points           {time.perf_counter() - begin:8.2f} s")


if __name__ == "__main__":
    main()
