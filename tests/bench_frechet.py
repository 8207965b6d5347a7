"""Fréchet distance and moments at 2048 dimensions: ours, a dozen lines of torch, and the peers.

    python tests/bench_frechet.py [--device cuda] [--dim 2048] [--out results/bench_frechet.txt]

Every side gets the same float64 statistics in this process. Peers are their algorithms in our
words, on the same device: `scipy.linalg.sqrtm` of the plain product (pytorch-fid, clean-fid, EDM;
always on the CPU) and eigenvalues of the unsymmetric product (torchmetrics, torch-fidelity). The
truth is the sum of singular values of the product of the centred features. Times are the best of
the repeats, errors are relative errors of the trace of the root, memory is the peak above what
was held before the call (process on the CPU, allocator on CUDA). The last part is a score with
its 20 leave-one-fold-out distances: by one call, and by 21 distances of moments.
"""

import argparse
import time
from pathlib import Path

import numpy
import reference
import scipy
import torch

import neon_ext


def features(n, d, seed, spectrum):
    """Non-negative, strongly correlated features with a fast decay, as a network's last layer."""
    g = torch.Generator().manual_seed(seed)
    mixing = (
        torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / d**0.5
    )
    f = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.logspace(
        0, spectrum / 2, d, dtype=torch.float64
    )
    return (f @ mixing).add_(0.1 * seed).relu_() if spectrum > -12 else f @ mixing


def peak_bytes(cuda, reset=False):
    """Highest memory so far; NaN where the system does not tell."""
    if cuda:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except OSError:
        return float("nan")


def measure(call, repeats, cuda):
    """Value, best seconds, peak bytes above those held before."""
    best, before = float("inf"), peak_bytes(cuda, reset=True)
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        value = float(call())
        best = min(best, time.perf_counter() - begin)
    return value, best, peak_bytes(cuda) - before


def eigenvalue_distance(mu1, c1, mu2, c2):
    """As torchmetrics and torch-fidelity: real parts of the roots of the product's eigenvalues."""
    root = torch.linalg.eigvals(c1 @ c2).sqrt().real.sum()
    return (mu1 - mu2).square().sum() + c1.trace() + c2.trace() - 2 * root


def plain_prepared(mu1, factor1, trace1, mu2, c2):
    """Plain torch, the reference's factor prepared: Cholesky where it works, else eigh; svdvals."""
    lower, info = torch.linalg.cholesky_ex(c2)
    factor2 = lower if int(info) == 0 else reference.factor(c2)
    root = torch.linalg.svdvals(factor1.T @ factor2).sum()
    return (mu1 - mu2).square().sum() + trace1 + c2.trace() - 2 * root


def compare(name, n, d, spectrum, device):
    cuda = device == "cuda"
    real, fake = (
        features(max(n, d + 500) if seed == 1 else n, d, seed, spectrum).to(device)
        for seed in (1, 2)
    )
    (mu1, c1), (mu2, c2) = map(reference.feature_moments, (real, fake))
    scaled = [(f - m) / (len(f) - 1) ** 0.5 for f, m in ((real, mu1), (fake, mu2))]
    small = [
        torch.linalg.qr(f, mode="r").R if len(f) > d else f for f in scaled
    ]  # the same singular values
    truth = float(torch.linalg.svdvals(small[0] @ small[1].T)[: min(n - 1, d)].sum())
    rest = float((mu1 - mu2).square().sum() + c1.trace() + c2.trace())
    prepared, factor1 = neon_ext.FrechetReference(mu1, c1), reference.factor(c1)
    host = [t.cpu() for t in (mu1, c1, mu2, c2)]
    rows = [
        ("ours, prepared reference", lambda: prepared.distance(mu2, c2), 5),
        ("ours, nothing prepared", lambda: neon_ext.frechet_distance(mu1, c1, mu2, c2), 5),
    ]
    if n <= d:
        rows.insert(0, ("ours, from features", lambda: prepared.distance_from_features(fake), 5))
    rows += [
        (
            "plain torch, prepared (the floor)",
            lambda: plain_prepared(mu1, factor1, c1.trace(), mu2, c2),
            3,
        ),
        (
            "torch.linalg.eigvals (torchmetrics, torch-fidelity)",
            lambda: eigenvalue_distance(mu1, c1, mu2, c2),
            2,
        ),
        (
            "scipy sqrtm (pytorch-fid, clean-fid, EDM), CPU",
            lambda: reference.frechet_distance_scipy(*host),
            1,
        ),
    ]
    print(f"\n{name}: N = {n}, D = {d}, distance {rest - 2 * truth:.6g}")
    print(f"{'':<54}{'seconds':>9}{'times ours':>12}{'rel. error':>12}{'peak MB':>9}")
    ours = None
    for label, call, repeats in rows:
        value, seconds, peak = measure(call, repeats, cuda)
        ours = ours or seconds
        error = abs((rest - value) / 2 / truth - 1)
        print(
            f"{label:<54}{seconds:>9.4f}{seconds / ours:>12.2f}{error:>12.1e}{peak / 1e6:>9.0f}",
            flush=True,
        )


def moments(d, device):
    """Mean and covariance of float32 features; the matrix product alone takes most of it."""
    n = 50_000 if device == "cuda" else 10_000
    f = torch.randn(n, d, device=device)
    rows = f.double()
    columns = rows.T.contiguous()
    cuda = device == "cuda"
    ours = measure(lambda: neon_ext.feature_moments(f)[1][0, 0], 3, cuda)[1]
    limit = measure(lambda: (columns @ rows)[0, 0], 3, cuda)[1]
    print(
        f"\nmoments of {n} x {d}: ours {ours:.2f} s, float64 matrix product alone {limit:.2f} s, "
        f"ratio {ours / limit:.2f}"
    )


def by_moments(prepared, fake, folds):
    """The distance of all features [N, D], and those without one fold each, from moments."""
    parts = fake.tensor_split(folds)
    left = [fake]
    for k in range(folds):
        left.append(torch.cat([part for j, part in enumerate(parts) if j != k]))
    return [float(prepared.distance(*neon_ext.feature_moments(f))) for f in left]


def fold_scores(d, device):
    """A score of 21 distances at N <= D: the call for it, and moments of every choice of folds."""
    n, folds = 1000 * d // 2048, 20
    real, fake = (features(d + 500 if seed == 1 else n, d, seed, -4).to(device) for seed in (1, 2))
    prepared = neon_ext.FrechetReference(*reference.feature_moments(real))
    cuda = device == "cuda"

    found = []
    ours = measure(lambda: found.append(prepared.fold_distances(fake, folds)) or 0, 3, cuda)[1]
    begin = time.perf_counter()
    plain = by_moments(prepared, fake, folds)
    seconds = time.perf_counter() - begin
    whole, without = found[-1]
    apart = max(abs(a / b - 1) for a, b in zip([whole, *without], plain))
    print(
        f"\nscore of {n} x {d} with {folds} leave-one-fold-out distances: "
        f"fold_distances {ours:.2f} s, 21 distances of moments {seconds:.2f} s, "
        f"ratio {seconds / ours:.2f}; largest relative difference {apart:.1e}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--out", help="also write the tables to this text file")
    args = parser.parse_args()
    with reference.recorded(
        args.out, f"python tests/bench_frechet.py --device {args.device} --dim {args.dim}"
    ):
        run(args)


def run(args):
    where = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"torch {torch.__version__}, numpy {numpy.__version__}, scipy {scipy.__version__}, "
        f"{where}; seeds 0, 1, 2; {neon_ext.build_config()}"
    )
    d = args.dim
    fold_scores(d, args.device)
    for name, n, spectrum in (
        ("well sampled", 10_000 * d // 2048, -4),
        ("as many as dimensions", d, -4),
        ("singular", 1000 * d // 2048, -4),
        ("spectrum over 1e-12", 10_000 * d // 2048, -12),
    ):
        compare(name, n, d, spectrum, args.device)
    moments(d, args.device)


if __name__ == "__main__":
    main()
