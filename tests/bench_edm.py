"""Sampling speed: ours against EDM's own generator, on the same network, batch, threads and starting noise.

    python tests/bench_edm.py --edm PATH [--preset cifar10] [--device cuda] [--precision fp32 tf32 bf16 fp16]

PATH is a checkout of github.com/NVlabs/edm (CC BY-NC-SA 4.0, none of it is here): its networks and sampler
are imported at run time and run as in its generate.py: eager, NCHW, cuDNN's TF32 left on. They need `pip
install click requests psutil`. Both sides get the same random weights and go from seeds to uint8 images.
After a warm-up they take turns; seconds are medians, "times EDM" is EDM's fp32 time over the row's, the
differences are to EDM's fp32 images, in levels of 255.
"""
import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import edm_neon  # noqa: E402


def random_network(config, seed):
    """Weights ~ N(0, 1 / fan_in), norms about 1: the zero last layers of a new network would hide errors."""
    net = edm_neon.EDMPrecond(**config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        z, about_one = torch.randn(p.shape, generator=generator), ".norm" in name and name.endswith("weight")
        p.copy_(z / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1 * z + about_one)
    return net


def edm_side(path, config, args, precision):
    """A call that samples with EDM's code; ImportError names the package it lacks."""
    sys.path.insert(0, str(path))
    import generate
    from training import networks
    net = networks.EDMPrecond(model_type="SongUNet", use_fp16=precision == "fp16", **config)
    net.load_state_dict(random_network(config, args.seed).state_dict())
    net.eval().requires_grad_(False).to(args.device)
    shape = [args.batch, net.img_channels, net.img_resolution, net.img_resolution]

    def sample():
        draws = generate.StackedRandomGenerator(args.device, range(args.seed, args.seed + args.batch))
        latents = draws.randn(shape, device=args.device)
        classes = draws.randint(net.label_dim, size=[args.batch], device=args.device)
        labels = torch.nn.functional.one_hot(classes, net.label_dim).float()
        images = generate.edm_sampler(net, latents, labels, randn_like=draws.randn_like, num_steps=args.steps)
        return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)
    return sample


def our_side(config, args, precision):
    settings = edm_neon.Settings(args.device, args.batch, args.steps, precision)
    net = settings.place(random_network(config, args.seed))
    return lambda: settings.sample(net, range(args.seed, args.seed + args.batch))[0]


def measure(sides, repeats):
    """{name: (call, TF32 in matmul, TF32 in cuDNN)} -> {name: (median seconds, images)}, taking turns."""
    times, images = {name: [] for name in sides}, {}
    for turn in range(repeats + 1):
        for name, (call, matmul, convolution) in sides.items():
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution
            begin = time.perf_counter()
            images[name] = call().cpu().int()  # waits for the device
            times[name] += [time.perf_counter() - begin] if turn else []
    return {name: (statistics.median(times[name]), images[name]) for name in sides}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--edm", type=Path, help="checkout of NVlabs/edm")
    add("--preset", choices=list(edm_neon.MODELS), default="digits")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--precision", nargs="+", choices=["fp32", "tf32", "bf16", "fp16"], default=["fp32"])
    for name, value in dict(steps=18, batch=64, repeats=5, threads=torch.get_num_threads(), seed=0).items():
        add(f"--{name}", type=int, default=value)
    add("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    if args.steps < 2 or min(args.batch, args.repeats, args.threads) < 1:
        parser.error("--steps must be at least 2, --batch, --repeats and --threads at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.edm and not (args.edm / "training/networks.py").is_file():
        parser.error(f"--edm {args.edm}: no training/networks.py there; give the root of a checkout")
    return args


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    config, sides, lines = edm_neon.MODELS[args.preset], {}, []
    try:
        for name in ["fp32", "fp16"] if args.edm and args.device == "cuda" else ["fp32"] if args.edm else []:
            sides[f"EDM {name}"] = edm_side(args.edm, config, args, name), False, True
    except ImportError as error:
        lines = [f"EDM's code lacks a package ({error}): ours alone"]
    lines += [] if args.edm else ["no --edm PATH (git clone https://github.com/NVlabs/edm): ours alone"]
    for name in dict.fromkeys(args.precision):  # each on a network of its own: compiled code belongs to one
        sides[f"ours {name}"] = our_side(config, args, name), name == "tf32", name == "tf32"
    results = measure(sides, args.repeats)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {platform.machine()}"
    lines += [f"{args.preset}: batch {args.batch}, {args.steps} steps, seed {args.seed}, median of "
              f"{args.repeats}; {where}, {args.threads} threads; torch {torch.__version__}, python "
              f"{platform.python_version()}",
              f"{'':<12}{'seconds':>10}{'images/s':>10}{'times EDM':>11}{'levels':>9}{'values differ':>15}"]
    seconds, reference = results.get("EDM fp32", (None, None))
    for name, (median, images) in results.items():
        lines.append(f"{name:<12}{median:>10.4f}{args.batch / median:>10.2f}")
        if seconds:
            error = (images - reference).abs()
            share = float((error > 0).float().mean())
            lines[-1] += f"{seconds / median:>11.2f}{int(error.max()):>9}{share:>15.4%}"
    print("\n".join(lines))
    if args.out:
        edm_neon.write_atomically(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
