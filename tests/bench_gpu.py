"""Short benchmarks of a GPU, by CUDA events, about 0.1 s each: rows of one table.

    python tests/bench_gpu.py PART [--device cuda] [--size full] [--precision tf32 ...] [--edm PATH]

PART: device (copy and matrix product, the measures of the others), extrapolation, statistics, toy,
sampling, training, or compile (what sampling compiles, for the cache of a later call). Peers run in
the same process on the same data: torch's own calls, plain torch, eigenvalues as in torchmetrics,
and EDM's own generator if PATH is a checkout of github.com/NVlabs/edm. Times are medians.
--device cpu --size tiny tries the calls without a GPU.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench_edm  # noqa: E402
import bench_extrapolate  # noqa: E402
import bench_frechet  # noqa: E402
import reference  # noqa: E402

import adaptive_neon as neon  # noqa: E402
import edm_neon as edm  # noqa: E402
import neon_ext  # noqa: E402
import toy_neon as toy  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Size:
    elements: int  # of one tensor
    shapes: list  # of a network's tensors
    matrix: int  # side of the matrices whose product is the measure of arithmetic
    dim: int  # of features
    features: int  # images of moments
    configurations: int
    points: int  # of each configuration of the toy
    preset: str
    batch: int  # of sampling
    steps: int
    training: tuple[int, ...]  # batches


SIZES = {
    "full": Size(
        elements=1 << 27,
        shapes=bench_extrapolate.CASES["network"],
        matrix=8192,
        dim=2048,
        features=50_000,
        configurations=729,
        points=1_000_000,
        preset="cifar10",
        batch=256,
        steps=18,
        training=(64, 512),
    ),
    "tiny": Size(
        elements=1 << 10,
        shapes=[(4, 4, 3, 3), (4,), (5, 3)],
        matrix=32,
        dim=24,
        features=100,
        configurations=9,
        points=200,
        preset="glyphs",
        batch=2,
        steps=3,
        training=(2, 4),
    ),
}


# -------------------- time
def times_of(call, device: str, count: int) -> list[float]:
    """Seconds of each of `count` calls, one behind the other."""
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(count):
            call()
            marks.append(time.perf_counter())
        return [end - begin for begin, end in zip(marks, marks[1:])]

    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in zip(events, events[1:])]


def seconds_of(call, device: str, budget: float = 0.1, warm=None) -> float:
    """Median seconds of one call, of as many as the budget holds (1 to 1000), after a warm-up:
    `warm`, or the call itself."""
    times_of(warm or call, device, 1)
    first = times_of(call, device, 1)
    more = min(999, int(budget / max(first[0], 1e-9)))
    return statistics.median(first + times_of(call, device, more))


def row(what: str, ours: float, peers: dict[str, float] | None = None, notes: str = "") -> None:
    """A row of the table, against the fastest of the peers {name: seconds}."""
    peer = ratio = ""
    if peers:
        name = min(peers, key=peers.__getitem__)
        peer, ratio = f"{name}: {peers[name] * 1e3:.3f} ms", f"{peers[name] / ours:.2f}"
    print(f"| {what} | {ours * 1e3:.3f} ms | {peer} | {ratio} | {notes} |", flush=True)


# -------------------- the measures
def copy_speed(size: Size, device: str) -> float:
    """Bytes a second that a copy of a large tensor reads and writes."""
    source = torch.randn(size.elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def matrix_speed(size: Size, device: str, precision: str) -> float:
    """Operations a second of torch's product of two large matrices."""
    neon.sampling.allow_tf32(precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(size.matrix, size.matrix, device=device).to(dtype) for _ in range(2))
    return 2 * size.matrix**3 / seconds_of(lambda: a @ b, device)


def device_part(args, size: Size) -> None:
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(f"{where}; {versions}; python {platform.python_version()}; {neon_ext.build_config()}")
    copied, moved = copy_speed(size, args.device), 8 * size.elements
    notes = f"{copied / 1e9:.0f} GB/s; {where}; {versions}"
    row(f"copy of {size.elements} float32", moved / copied, None, notes)
    for precision in neon.config.PRECISIONS:
        speed = matrix_speed(size, args.device, precision)
        operations = 2 * size.matrix**3
        notes = f"{speed / 1e12:.1f} TFLOP/s"
        row(f"matrix product {size.matrix}, {precision}", operations / speed, None, notes)


# -------------------- extrapolation
def extrapolation_part(args, size: Size) -> None:
    copied = copy_speed(size, args.device)
    for what, shapes in (("one", [(size.elements,)]), ("all", size.shapes)):
        for in_dtype in bench_extrapolate.INPUTS:
            theta_r, theta_s = (
                bench_extrapolate.tensors(shapes, in_dtype, args.device, seed) for seed in (0, 1)
            )
            outputs = [in_dtype]
            if what == "one":
                outputs += [dtype for dtype in bench_extrapolate.OUTPUTS if dtype != in_dtype]
            for out_dtype in outputs:
                extrapolate(theta_r, theta_s, out_dtype, args.device, copied)


def extrapolate(theta_r, theta_s, out_dtype, device: str, copied: float) -> None:
    """One row. copied: bytes a second of the measured copy."""
    out = [torch.empty_like(tensor, dtype=out_dtype) for tensor in theta_r]
    blocks, w = [0] * len(theta_r), bench_extrapolate.W
    ours = seconds_of(lambda: neon_ext.extrapolate(theta_r, theta_s, blocks, [w], out=out), device)
    peers = {}
    for name, call in bench_extrapolate.peers(theta_r, theta_s, out, w).items():
        peers[name] = seconds_of(call, device)

    elements = sum(tensor.numel() for tensor in theta_r)
    moved = elements * (2 * theta_r[0].element_size() + out[0].element_size())
    dtypes = " to ".join(str(t).removeprefix("torch.") for t in (theta_r[0].dtype, out_dtype))
    what = f"extrapolation, {len(theta_r)} tensors, {elements} elements, {dtypes}"
    share = moved / ours / copied
    row(what, ours, peers, f"{moved / ours / 1e9:.0f} GB/s, {share:.2f} of the copy's")


# -------------------- statistics
def statistics_part(args, size: Size) -> None:
    moments(args.device, size.features, size.dim)
    frechet(args.device, size.dim)


def moments(device: str, count: int, dim: int) -> None:
    images = torch.randn(count, dim, device=device)
    rows = images.double()
    columns = rows.T.contiguous()
    ours = seconds_of(lambda: neon_ext.feature_moments(images), device)
    peers = {
        "float64 product alone": seconds_of(lambda: columns @ rows, device),
        "torch.cov": seconds_of(lambda: reference.feature_moments(images), device),
    }
    row(f"moments of {count} x {dim}", ours, peers)


def frechet(device: str, dim: int) -> None:
    """Of features as a network's last layer gives them, more of them than dimensions; and a score
    of fewer."""
    real, fake = (bench_frechet.features(5 * dim, dim, seed, -4).to(device) for seed in (1, 2))
    (mu1, cov1), (mu2, cov2) = map(reference.feature_moments, (real, fake))
    prepared = neon_ext.FrechetReference(mu1, cov1)
    factor, trace = reference.factor(cov1), cov1.trace()
    calls = {
        "plain torch": lambda: bench_frechet.plain_prepared(mu1, factor, trace, mu2, cov2),
        "eigenvalues": lambda: bench_frechet.eigenvalue_distance(mu1, cov1, mu2, cov2),
    }
    few = 2 * torch.eye(8, dtype=torch.float64, device=device)
    starts = {  # of the libraries; the calls themselves may take seconds
        "plain torch": lambda: torch.linalg.svdvals(few),
        "eigenvalues": lambda: torch.linalg.eigvals(few),
    }
    value = float(prepared.distance(mu2, cov2))
    ours, times, notes = seconds_of(lambda: prepared.distance(mu2, cov2), device), {}, []
    for name, call in calls.items():
        try:
            times[name] = seconds_of(call, device, warm=starts[name])
            apart = abs(float(call()) / value - 1)
        except RuntimeError as error:  # a build of torch without eigenvalues on the GPU
            notes.append(f"{name}: {neon.files.reason_of(error)}")
            continue
        notes.append(f"{name}: {times[name] * 1e3:.1f} ms, {apart:.1e} from ours")
    row(f"Fréchet distance at {dim}, reference prepared", ours, times, "; ".join(notes))

    # A score: the distance, and 20 without a fold each.
    few_images = fake[: dim // 2]
    ours = seconds_of(lambda: prepared.fold_distances(few_images, 20), device)
    peers = {
        "21 distances of moments": seconds_of(
            lambda: bench_frechet.by_moments(prepared, few_images, 20), device
        )
    }
    row(f"score of {len(few_images)} x {dim} in 21 distances", ours, peers)


# -------------------- the toy
def toy_part(args, size: Size) -> None:
    """All configurations of its grid on many points; time does not depend on the weights."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for n_out, n_in in toy.SHAPES:
        weight = torch.randn(n_out, n_in, generator=generator) / n_in**0.5
        layers += [weight.flatten(), 0.1 * torch.randn(n_out, generator=generator)]
    theta_r = torch.cat(layers)
    theta_s = theta_r + 0.01 * torch.randn(len(theta_r), generator=generator)
    W = torch.rand(size.configurations, len(toy.SIZES), generator=generator)
    theta = neon_ext.extrapolate_grid(theta_r, theta_s, toy.OFFSETS, W).to(args.device)
    z = torch.randn(size.points, 2, generator=generator).to(args.device)
    abar = toy.cosine_schedule(toy.SAMPLE_STEPS).to(args.device)

    def grid(few):
        return neon_ext.mlp_ddim_moments(few, z, abar, correction=1)

    ours = seconds_of(lambda: grid(theta), args.device, warm=lambda: grid(theta[:2]))
    plain = seconds_of(lambda: toy.ddim(theta[0], z), args.device) * size.configurations
    mean = toy.ddim(theta[0], z).double().mean(0)
    apart = float((grid(theta[:1])[0][0] - mean).abs().max())
    operations = 2 * len(theta_r) * toy.SAMPLE_STEPS * size.configurations * size.points
    notes = (
        f"ADAPTIVE_DDIM_EACH={os.environ.get('ADAPTIVE_DDIM_EACH', 'unset')}; "
        f"{operations / ours / 1e12:.1f} TFLOP/s; means {apart:.1e} apart"
    )
    what = f"toy, {size.configurations} x {size.points} points"
    row(what, ours, {"one by one in plain torch": plain}, notes)


# -------------------- EDM's sampling
def operations_of_call(preset: str) -> int:
    """Floating-point operations of one network call on one image."""
    with torch.device("meta"):
        net = edm.PRESETS[preset].untrained()
        image = torch.zeros(1, net.img_channels, *[net.img_resolution] * 2)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(image, torch.ones(1))
    return counter.get_total_flops()


def sampling_options(args, size: Size) -> SimpleNamespace:
    """Of the two sides of bench_edm."""
    return SimpleNamespace(
        preset=size.preset, device=args.device, batch=size.batch, steps=size.steps, seed=0
    )


def timed_sampling(side, options) -> tuple[float, torch.Tensor]:
    """Seconds of one batch, after one of two steps, and its images."""
    steps, found = options.steps, []

    def short():
        options.steps = 2
        side()
        options.steps = steps

    seconds = seconds_of(lambda: found.append(side()), options.device, warm=short)
    return seconds, found[-1].cpu().int()


def sampling_part(args, size: Size) -> None:
    options, network = sampling_options(args, size), edm.PRESETS[size.preset].network
    operations = operations_of_call(size.preset) * (2 * size.steps - 1) * size.batch
    peers: dict[str, float] = {}
    expected = None

    def tell(what, seconds, images, precision, against=None):
        nonlocal expected
        expected = images if expected is None else expected
        levels = (images - expected).abs()
        share = operations / seconds / matrix_speed(size, args.device, precision)
        notes = (
            f"{size.batch / seconds:.1f} images/s, {share:.2f} of the matrix product's speed; "
            f"{float((levels > 0).float().mean()):.2%} of the first row's values differ, by at "
            f"most {int(levels.max())}"
        )
        row(f"sampling {size.preset}, {size.steps} steps, {what}", seconds, against, notes)

    # EDM's own generator: cuDNN's TF32 is on in its fp32, as in its generate.py.
    if args.edm:
        for precision in ("fp32", "fp16") if args.device == "cuda" else ("fp32",):
            side = bench_edm.edm_side(args.edm, network, options, precision)
            seconds, images = timed_sampling(side, options)
            peers[f"EDM's own, {precision}"] = seconds
            measure = "tf32" if precision == "fp32" else precision
            tell(f"EDM's own, {precision}", seconds, images, measure)

    for compiled in (False, True):
        for precision in args.precision:
            torch._dynamo.reset()
            side = bench_edm.our_side(network, options, precision, compiled)
            how = "compiled" if compiled else "eager"
            tell(f"{precision}, {how}", *timed_sampling(side, options), precision, peers)


def compile_part(args, size: Size) -> None:
    options = sampling_options(args, size)
    options.steps = 2
    for precision in args.precision:
        bench_edm.our_side(edm.PRESETS[size.preset].network, options, precision, True)()


# -------------------- EDM's training
def training_part(args, size: Size) -> None:
    preset = edm.PRESETS[size.preset]
    model = edm.EdmModel(preset, neon.config.Config())
    operations = 3 * operations_of_call(size.preset)  # of one image, forward and backward
    torch.backends.cudnn.benchmark = True
    for batch in size.training:
        for precision in ("fp32", "tf32", "bf16"):
            what = f"training step of {size.preset}, batch {batch}, {precision}"
            try:
                seconds = seconds_of_step(model, preset, args.device, batch, precision)
            except torch.OutOfMemoryError:
                print(f"| {what} | out of memory | | | |", flush=True)
                continue
            share = batch * operations / seconds / matrix_speed(size, args.device, precision)
            notes = f"{batch / seconds:.1f} images/s, {share:.2f} of the matrix product's speed"
            row(what, seconds, None, notes)


def seconds_of_step(model, preset, device: str, batch: int, precision: str) -> float:
    options = preset.network | {"dropout": neon.config.Config.dropout}
    net = neon.networks.denoiser(**options)
    images = torch.randint(256, (2 * batch, *model.image_shape(net)), dtype=torch.uint8)
    labels = torch.randint(net.label_dim, (2 * batch,))
    recipe = neon.train.Recipe("bench", batch, 1e-4, 1.0, 1.0, 0, precision=precision)
    processes = neon.processes.Processes(device)
    training = neon.train.Training(model, net, len(images), recipe, processes)
    return seconds_of(lambda: training.step(images, labels), device)


PARTS = {
    "device": device_part,
    "extrapolation": extrapolation_part,
    "statistics": statistics_part,
    "toy": toy_part,
    "sampling": sampling_part,
    "compile": compile_part,
    "training": training_part,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--precision", nargs="+", choices=neon.config.PRECISIONS, default=["tf32"])
    parser.add_argument("--edm", type=Path, help="checkout of github.com/NVlabs/edm")
    args = parser.parse_args()
    PARTS[args.part](args, SIZES[args.size])


if __name__ == "__main__":
    main()
