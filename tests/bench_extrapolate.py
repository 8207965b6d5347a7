"""Block-wise extrapolation of 55.7M parameters in about 600 tensors: ours against a per-tensor loop, torch._foreach
and a plain copy (the memory's own speed), in one process.

    python tests/bench_extrapolate.py [--device cuda] [--out results/bench_extrapolate.txt]
"""
import argparse
import time

import torch

import neon_ext
import reference


def tensors(device, seed):
    """About the shapes of EDM's CIFAR-10 U-Net: 3 x 3 convolutions of 256 channels and many small vectors."""
    g = torch.Generator(device).manual_seed(seed)
    shapes = [(256, 256, 3, 3)] * 86 + [(512, 512)] * 19 + [(256,)] * 490 + [(3, 256, 3, 3)] * 2
    return [torch.randn(shape, generator=g, device=device) for shape in shapes]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="also write the table to this text file")
    args = parser.parse_args()
    with reference.recorded(args.out, f"python tests/bench_extrapolate.py --device {args.device}"):
        compare(args.device)


def compare(device):
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    theta_r, theta_s = tensors(device, 0), tensors(device, 1)
    block, w = [i % 3 for i in range(len(theta_r))], [1.25, 1.0, 0.75]
    steps = [w[b] for b in block]
    count = sum(t.numel() for t in theta_r)

    def best(call, repeats=20 if device == "cuda" else 7):
        times = []
        for _ in range(repeats + 1):
            wait()
            begin = time.perf_counter()
            call()
            wait()
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    flat = torch.empty(count, device=device)
    copied = torch.empty_like(flat)
    bandwidth = 8 * count / best(lambda: copied.copy_(flat))
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}; {count / 1e6:.1f}M parameters in {len(theta_r)} tensors, seeds 0 and 1; "
          f"copy bandwidth {bandwidth / 1e9:.1f} GB/s; {neon_ext.build_config()}")
    print(f"{'':<44}{'ms':>8}{'times ours':>12}{'GB/s':>8}{'of copy':>9}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = [torch.empty_like(t, dtype=dtype) for t in theta_r]

        def loop():
            for r, s, o, step in zip(theta_r, theta_s, out, steps):
                o.copy_(r - step * (s - r))

        def foreach():
            drift = torch._foreach_sub(theta_s, theta_r)
            torch._foreach_mul_(drift, steps)
            torch._foreach_copy_(out, torch._foreach_sub(theta_r, drift))

        moved = count * (8 + out[0].element_size())
        ours = best(lambda: neon_ext.extrapolate(theta_r, theta_s, block, w, out=out))
        for name, seconds in (("ours", ours), ("torch._foreach", best(foreach)), ("per-tensor loop", best(loop))):
            print(f"{name + ', to ' + str(dtype):<44}{seconds * 1e3:>8.2f}{seconds / ours:>12.2f}"
                  f"{moved / seconds / 1e9:>8.1f}{moved / seconds / bandwidth:>9.2f}")


if __name__ == "__main__":
    main()
