"""Block-wise extrapolation against torch's own calls and a plain copy, in one process.

    python tests/bench_extrapolate.py [--device cuda] [--threads 1 2] [--out FILE]

Every pair of input and output dtype on one large tensor; every input dtype on a network of 597
tensors and on many small ones. Peers, all with their outputs at hand where the call can take them:
torch.lerp tensor by tensor, torch._foreach_lerp, torch._foreach arithmetic, and the plain loop.
They convert by copy_ where input and output differ. Times are the best of the repeats; GB/s counts
theta_r, theta_s and out once each.
"""

import argparse
import time

import reference
import torch

import neon_ext

INPUTS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
CASES = {
    "one": [(1 << 24,)],
    # about EDM's CIFAR-10 U-Net: 3 x 3 convolutions of 256 channels and many small vectors
    "network": [(256, 256, 3, 3)] * 86 + [(512, 512)] * 19 + [(256,)] * 490 + [(3, 256, 3, 3)] * 2,
    "small": [(256,)] * 4096,
}
W = 1.25


def tensors(shapes, dtype, device, seed):
    g = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=g, device=device).to(dtype) for shape in shapes]


def best_of(call, device, seconds=1.0):
    """Best time of one call, of at least 3 and for about `seconds` in all."""
    times = []
    call()
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def peers(theta_r, theta_s, out, step):
    """{name: call} of the same update into `out`."""
    same = theta_r[0].dtype == out[0].dtype

    def lerp():
        for r, s, o in zip(theta_r, theta_s, out):
            if same:
                torch.lerp(r, s, -step, out=o)
            else:
                o.copy_(torch.lerp(r, s, -step))

    def foreach_lerp():  # one weight for all: as in every row here
        moved = torch._foreach_lerp(theta_r, theta_s, -step)
        if not same:
            torch._foreach_copy_(out, moved)

    def foreach():
        drift = torch._foreach_sub(theta_s, theta_r)
        torch._foreach_mul_(drift, step)
        torch._foreach_copy_(out, torch._foreach_sub(theta_r, drift))

    def loop():
        for r, s, o in zip(theta_r, theta_s, out):
            o.copy_(r - step * (s - r))

    return {"lerp": lerp, "foreach_lerp": foreach_lerp, "foreach": foreach, "loop": loop}


def compare(case, in_dtype, out_dtype, device, bandwidth):
    shapes = CASES[case]
    theta_r, theta_s = (tensors(shapes, in_dtype, device, seed) for seed in (0, 1))
    out = [torch.empty_like(r, dtype=out_dtype) for r in theta_r]
    block = [0] * len(theta_r)
    ours = best_of(lambda: neon_ext.extrapolate(theta_r, theta_s, block, [W], out=out), device)
    times = {}
    for name, call in peers(theta_r, theta_s, out, W).items():
        times[name] = best_of(call, device, seconds=0.5)
    strongest = min(times, key=times.get)

    moved = sum(r.numel() for r in theta_r) * (
        2 * theta_r[0].element_size() + out[0].element_size()
    )
    speed = moved / ours
    dtypes = " to ".join(str(t).removeprefix("torch.") for t in (in_dtype, out_dtype))
    print(
        f"{case:<9}{dtypes:<22}{ours * 1e3:>9.3f}{times[strongest] * 1e3:>9.3f}  {strongest:<13}"
        f"{times[strongest] / ours:>6.2f}{speed / 1e9:>8.1f}{speed / bandwidth:>9.2f}",
        flush=True,
    )


def table(device, threads):
    torch.set_num_threads(threads)
    source = torch.randn(1 << 24, device=device)
    copied = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / best_of(lambda: copied.copy_(source), device)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} threads"
    print(
        f"\ntorch {torch.__version__}, {where}; seeds 0 and 1; copy {bandwidth / 1e9:.1f} GB/s; "
        f"{neon_ext.build_config()}"
    )
    header = f"{'':<31}{'ours ms':>9}{'peer ms':>9}  {'best peer':<13}"
    print(header + f"{'ratio':>6}{'GB/s':>8}{'of copy':>9}")
    for case in CASES:
        for in_dtype in INPUTS:
            for out_dtype in OUTPUTS:
                if (
                    case == "one"
                    or out_dtype == in_dtype
                    or (in_dtype == torch.float64 and out_dtype == torch.float32)
                ):
                    compare(case, in_dtype, out_dtype, device, bandwidth)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", help="also write the table to this text file")
    args = parser.parse_args()
    command = f"python tests/bench_extrapolate.py --device {args.device}"
    with reference.recorded(args.out, command):
        for threads in args.threads if args.device == "cpu" else [torch.get_num_threads()]:
            table(args.device, threads)


if __name__ == "__main__":
    main()
