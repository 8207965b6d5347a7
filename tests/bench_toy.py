"""The toy's 729-configuration grid: ours against a per-configuration loop in plain PyTorch (10,000 points).

    python tests/bench_toy.py [--configurations 729] [--device cuda] [--large] [--out results/bench_toy.txt]

Both sides run on the same models in this process. The error of a score is its distance to 2^19 Sobol points.
"""
import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import neon_ext  # noqa: E402
import toy_neon as toy  # noqa: E402


def plain_loop(scores, W):
    """As the paper's notebook: build the network, draw, sample, moments; one after another."""
    fd, device, abar = [], scores.config.device, toy.cosine_schedule(20)
    sizes = torch.tensor(toy.SIZES)
    for w in W:
        steps = torch.tensor(w, dtype=torch.float32).repeat_interleave(sizes)
        net = toy.network(scores.theta_r - steps * (scores.theta_s - scores.theta_r)).to(device)
        with torch.no_grad():
            x = toy.ddim_plain(net, torch.randn(10_000, 2, device=device), abar).double().cpu()
        fd.append(float(toy.frechet_to_target(x.mean(0), torch.cov(x.T))))
    return np.array(fd)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--configurations", type=int, default=729, help="for the loop, then scaled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", action="store_true", help="also all 729 x 1,000,000 points (for a GPU)")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    config = toy.Config(device=args.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the script: its models to the bit
    models = toy.train_models(config)
    torch.set_num_threads(threads)
    scores = toy.Scores(models["theta_r"], models["theta_s"]["zeta 1.1, 250 epochs"], config)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    w_star = toy.ranking(scores, [[w] * 6 for w in np.linspace(-2, 2, 101).round(4)])["best"]["w"][0]

    def exact(w):
        return float(toy.frechet_to_target(*scores.moments([w], 2**19, seed=99)))

    grids = [toy.layer_grid(scores, w_star, 1.72) for _ in range(3)]
    ours = min(grid["best"]["seconds"] for grid in grids)
    W, best = np.array(grids[0]["W"]), grids[0]["best"]
    chosen = np.random.default_rng(0).permutation(729)[:args.configurations]
    begin = time.perf_counter()
    drawn = plain_loop(scores, W[chosen])
    wait()
    plain = (time.perf_counter() - begin) * 729 / len(chosen)
    truth, repeats = exact(best["w"]), plain_loop(scores, [best["w"]] * 8)
    lines = [
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, "
        f"seed 42, w* = {w_star:g}, delta 1.72",
        f"plain loop, 729 x 10,000 random points     {plain:8.2f} s   error of a score "
        f"{np.abs(repeats - truth).mean():.1e}",
        f"ours, 729 with successive refinement       {ours:8.2f} s   error of the verified score "
        f"{abs(best['fd'] - truth):.1e} (reported {best['fd_error']:.1e})",
        f"ratio                                      {plain / ours:8.1f}",
        f"winner of the grid {truth:.6f}; of the loop's {len(chosen)}: it claims {drawn.min():.6f}, "
        f"truth {exact(W[chosen[drawn.argmin()]]):.6f}"]
    if args.large:
        z, abar = torch.randn(1_000_000, 2, device=args.device), toy.cosine_schedule(config.sample_steps)
        theta = scores.theta(W)
        neon_ext.mlp_ddim_moments(theta[:2], z, abar)
        wait()
        begin = time.perf_counter()
        neon_ext.mlp_ddim_moments(theta, z, abar, correction=1)
        wait()
        lines.append(f"ours, all 729 x 1,000,000 points           {time.perf_counter() - begin:8.2f} s")
    print("\n".join(lines))
    if args.out:
        command = " ".join(["$ python", *map(os.path.relpath, sys.argv[:1]), *sys.argv[1:]])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        toy.write_atomically(args.out, lambda path: path.write_text("\n".join([command, *lines, ""])))


if __name__ == "__main__":
    main()
