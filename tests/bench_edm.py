"""Sampling speed: ours against EDM's own generator, same network, batch, threads and noise.

    python tests/bench_edm.py --edm PATH [--preset cifar10] [--device cuda] [--precision fp32 tf32]

PATH is a checkout of github.com/NVlabs/edm (CC BY-NC-SA 4.0, none of it is here): its networks and
sampler are imported at run time and run as in its generate.py: eager, NCHW, cuDNN's TF32 left on.
They need `pip install click psutil`. Both sides get the same random weights and go from
seeds to uint8 images. After a warm-up they take turns; seconds are medians, "times EDM" is EDM's
fp32 time over the row's, the differences are to EDM's fp32 images, in levels of 255.
"""

import argparse
import contextlib
import platform
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adaptive_neon as neon  # noqa: E402
import edm_neon as edm  # noqa: E402


def random_network(options, seed):
    """Weights ~ N(0, 1 / fan_in): the zero last layers of a new network would hide errors."""
    net = neon.networks.EDMPrecond(**options).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        z = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.copy_(z / p[0].numel() ** 0.5)
        else:
            p.copy_(0.1 * z + (1 if ".norm" in name and name.endswith("weight") else 0))
    return net


def edm_side(path, options, args, precision):
    """A call that samples with EDM's code; ImportError names the package it lacks."""
    sys.path.insert(0, str(path))
    import setuptools  # noqa: F401  EDM asks for distutils, which left Python with 3.12

    with contextlib.suppress(ImportError):
        import requests  # noqa: F401
    sys.modules.setdefault("requests", ModuleType("requests"))  # it is for addresses alone
    import generate
    from training import networks

    fp16 = precision == "fp16"
    net = networks.EDMPrecond(model_type="SongUNet", use_fp16=fp16, **options)
    net.load_state_dict(random_network(options, args.seed).state_dict())
    net.eval().requires_grad_(False).to(args.device)
    shape = [args.batch, net.img_channels, net.img_resolution, net.img_resolution]

    def sample():
        # As generate.py, which leaves cuDNN's TF32 on.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = False
        seeds = range(args.seed, args.seed + args.batch)
        draws = generate.StackedRandomGenerator(args.device, seeds)
        latents = draws.randn(shape, device=args.device)
        classes = draws.randint(net.label_dim, size=[args.batch], device=args.device)
        labels = torch.nn.functional.one_hot(classes, net.label_dim).float()
        images = generate.edm_sampler(
            net, latents, labels, randn_like=draws.randn_like, num_steps=args.steps
        )
        return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)

    return sample


def our_side(options, args, precision, compiled=None):
    """A call that samples as the pipeline does; on a GPU compiled, unless told otherwise."""
    net = random_network(options, args.seed)
    model = edm.EdmModel(edm.PRESETS[args.preset], neon.config.Config())
    processes = neon.processes.Processes(args.device)
    sampler = neon.Sampler(model, net, args.steps, args.batch, "random", processes, compiled)

    def sample():
        torch.backends.cudnn.benchmark = args.device == "cuda"  # as start_processes()
        sampler.steps = args.steps
        with neon.sampling.network_calls(sampler.net, precision):
            return sampler.batch_images(range(args.seed, args.seed + args.batch))[0]

    return sample


def measure(sides, repeats):
    """{name: call} -> {name: (median seconds, images)}, taking turns after a warm-up."""
    times = {name: [] for name in sides}
    images = {}
    for turn in range(repeats + 1):
        for name, call in sides.items():
            begin = time.perf_counter()
            images[name] = call().cpu().int()  # waits for the device
            if turn > 0:
                times[name].append(time.perf_counter() - begin)
    return {name: (statistics.median(times[name]), images[name]) for name in sides}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--edm", type=Path, help="checkout of NVlabs/edm")
    add("--preset", choices=list(edm.PRESETS), default="cifar10")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--precision", nargs="+", choices=neon.config.PRECISIONS, default=["fp32"])
    add("--steps", type=int, default=18)
    add("--batch", type=int, default=64)
    add("--repeats", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    if args.steps < 2 or min(args.batch, args.repeats, args.threads) < 1:
        parser.error("--steps must be at least 2, --batch, --repeats and --threads at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.edm and not (args.edm / "training/networks.py").is_file():
        parser.error(
            f"--edm {args.edm}: no training/networks.py there; give the root of a checkout"
        )
    return args


def all_sides(args, options):
    """{name: call} of EDM's code, if it is there, and ours; notes for the table."""
    sides, notes = {}, []
    if args.edm is None:
        notes.append("no --edm PATH (git clone https://github.com/NVlabs/edm): ours alone")
    else:
        try:
            for precision in ("fp32", "fp16") if args.device == "cuda" else ("fp32",):
                sides[f"EDM {precision}"] = edm_side(args.edm, options, args, precision)
        except ImportError as error:
            sides = {}
            notes.append(f"EDM's code lacks a package ({error}): ours alone")
    for precision in dict.fromkeys(args.precision):
        sides[f"ours {precision}"] = our_side(options, args, precision)
    return sides, notes


def table(results, args):
    where = f"CPU {platform.machine()}"
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    lines = [
        f"{args.preset}: batch {args.batch}, {args.steps} steps, seed {args.seed}, median of "
        f"{args.repeats}; {where}, {args.threads} threads; torch {torch.__version__}, python "
        f"{platform.python_version()}",
        f"{'':<12}{'seconds':>10}{'images/s':>10}{'times EDM':>11}"
        f"{'levels':>9}{'values differ':>15}",
    ]
    seconds, reference = results.get("EDM fp32", (None, None))
    for name, (median, images) in results.items():
        line = f"{name:<12}{median:>10.4f}{args.batch / median:>10.2f}"
        if seconds is not None:
            error = (images - reference).abs()
            share = float((error > 0).float().mean())
            line += f"{seconds / median:>11.2f}{int(error.max()):>9}{share:>15.4%}"
        lines.append(line)
    return lines


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    sides, lines = all_sides(args, edm.PRESETS[args.preset].network)
    lines += table(measure(sides, args.repeats), args)
    print("\n".join(lines))
    if args.out:
        neon.files.write_atomically(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
