"""The whole method on CIFAR-10 in five minutes of one GPU, by the clock.

    python tests/gpu_study.py cifar10-train-jpeg.zip [--seconds 300] [--out runs/cifar10-jpeg]

An EDM dataset zip of CIFAR-10's 50,000 training images. Stored as JPEG they are not the published
ones, and what scores is a small classifier that is trained here: no number of this is an FID.

A DDPM++ of 64 channels is trained on half of the images for three tenths of the time, then on its
own samples for a sixteenth and an eighth of that; how many images that is follows from the measured
speed of training, the images of a score from that of sampling. Everything else is edm_neon.py,
which takes any further option: --steps 18, --evaluations 8. Networks are not compiled: in five
minutes that costs more than it gains.
"""

import argparse
import dataclasses
import sys
import time
from functools import partial
from pathlib import Path

BEGIN = time.perf_counter()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import edm_neon as edm  # noqa: E402
from adaptive_neon import cli, keys, sampling, stages, train  # noqa: E402
from adaptive_neon.processes import start_processes  # noqa: E402

TRAINING_SHARE = 0.3  # of the time, for the base
LENGTHS = (1 / 16, 1 / 8)  # of the self-training, in those of the base
RESERVE = 0.1  # of the time, for reading, references and the report
SAMPLING = 0.8  # of what is left: scores need features and distances too
MOST = 10_000  # images of a score of the selection
FINAL = 4  # images of a final score, in those of the selection


# -------------------- what judges
class Classifier(nn.Module):
    """Small classifier of the training part, trained here in seconds: uint8 [N, C, H, W] -> the 128
    means in front of its last layer."""

    dim = 128

    def __init__(self, name: str, kernel: int, seed: int, real, device: str, epochs: int = 8):
        super().__init__()
        self.name = self.kind = name
        self.score = f"FD ({name}, trained on CIFAR-10 as JPEG, {self.dim}-d)"
        classes = int(real.training.labels.max()) + 1
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            widths = (real.training.images.shape[1], 64, 128, self.dim)
            for c_in, c_out in zip(widths, widths[1:]):
                layers += [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)]
                layers += [nn.BatchNorm2d(c_out), nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)]
            self.body = nn.Sequential(*layers)
            self.head = nn.Linear(self.dim, classes)
            self.to(device).fit(real.training, device, epochs)
        self.eval().requires_grad_(False)
        self.identity = keys.design_key(design=str(self.body), weights=keys.weights_hash(self))

        unseen = real.final.images[:2000].to(device)
        right = self.head(self(unseen)).argmax(1).cpu() == real.final.labels[:2000]
        self.facts = {"accuracy": float(right.double().mean()), "accuracy_images": len(right)}

    def fit(self, real, device: str, epochs: int) -> None:
        images, labels = real.images.to(device), real.labels.to(device)
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        for _ in range(epochs):
            for index in torch.randperm(len(images), device=device).split(256):
                x = images[index]
                flip = torch.rand(len(x), 1, 1, 1, device=device) < 0.5
                found = self.head(self(torch.where(flip, x.flip(3), x)))
                optimizer.zero_grad()
                F.cross_entropy(found, labels[index]).backward()
                optimizer.step()

    def forward(self, images):
        return self.body(images.float() / 127.5 - 1).mean((2, 3))


# -------------------- what is studied
class Cifar10Jpeg(edm.Cifar10):
    """CIFAR-10 as JPEG, a base that is trained here, and two classifiers: one selects, the other
    judges."""

    name = "cifar10-jpeg"
    bases: dict[str, str] = {}
    statistics = origin = ""
    defaults = {
        "train_base": 1.0,
        "base_lr": 1e-3,
        "batch": 512,
        "ramp_kimg": 0.0,
        "dropout": 0.0,
        "augment": 0.0,
        "steps": 10,
        "sample_batch": 250,
        "grid": (0.5, 1.5),
        "search": "gradient",
        "search_partition": "layers",
        "evaluations": 3,
        "continue_on_data": -1.0,
        "judge": ("classifier-2", "random-conv", "pixels"),
    }

    def __init__(self, channels: int):
        self.network = edm.Cifar10.network | {"model_channels": channels, "num_blocks": 2}
        self.made: dict = {}

    def once(self, name: str, make):
        """What the measurements and the study share."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def real_images(self, c):
        return self.once("real", partial(super().real_images, c))

    def classifier(self, c, name: str, kernel: int, seed: int):
        real = self.real_images(c)
        return self.once(name, lambda: Classifier(name, kernel, seed, real, c.device))

    def features(self, c):
        return self.classifier(c, "classifier", 3, 0)

    def judges(self, c):
        return {"classifier-2": partial(self.classifier, c, "classifier-2", 5, 1)}


# -------------------- by the clock
def training_speed(setup, net: nn.Module, seconds: float) -> float:
    """Images a second of training the base."""
    c, real = setup.c, setup.real.training
    recipe = stages.base_recipe(c)
    training = train.Training(setup.model, net, len(real.images), recipe, setup.processes)

    def step():
        training.step(real.images, real.labels)
        if c.device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    begin, steps = time.perf_counter(), 0
    while steps == 0 or time.perf_counter() - begin < seconds:
        step()
        steps += 1
    return steps * c.batch / (time.perf_counter() - begin)


def lengths(speed: float, seconds: float) -> dict[str, list[str]]:
    """Options: thousands of images of the base and of the self-training."""
    kimg = max(0.1, round(TRAINING_SHARE * seconds * speed / 1000, 1))
    snapshots = sorted({max(1, round(kimg * length)) for length in LENGTHS})
    if len(snapshots) == 1:
        snapshots = [snapshots[0], 2 * snapshots[0]]
    return {
        "--train-base": [f"{kimg:g}"],
        "--snapshot": [",".join(map(str, snapshots))],
        "--ema-kimg": [f"{snapshots[0] / 4:g}"],
    }


def image_counts(c, cost, seconds: float) -> dict[str, list[str]]:
    """Options: images of a score, in whole batches, that sampling makes in these seconds."""
    affordable = seconds / cost.seconds_per_image - c.synthetic
    selection = affordable / len(c.snapshot) / (cost.scores + FINAL * cost.finals)
    selection = (
        min(max(1, int(selection / c.sample_batch)), MOST // c.sample_batch) * c.sample_batch
    )
    return {"--select-images": [str(selection)], "--final-images": [str(FINAL * selection)]}


def study(args, more: list[str]) -> None:
    preset = Cifar10Jpeg(args.channels)
    presets = {preset.name: preset}
    half = ["--precision", "bf16", "--train-precision", "bf16"] if args.device == "cuda" else []
    argv = ["--preset", preset.name, "--data", args.data, "--out", args.out, "--yes"]
    argv += ["--device", args.device, *half, *more]

    # The real images and both classifiers, then the speed of training.
    c = cli.parse(argv, presets, __doc__)
    setup = stages.prepare(c, preset, start_processes(c.device))
    preset.features(c), preset.judges(c)["classifier-2"]()
    net = stages.first_network(setup)
    sampling.allow_tf32(c.train_precision)
    speed = training_speed(setup, net, args.seconds / 60)
    for option, values in lengths(speed, args.seconds).items():
        argv += [option, *values]
    c = cli.parse(argv, presets, __doc__)

    # The base, the self-training, and the control that trains on as long for either length.
    images = 1000 * (c.train_base + max(c.snapshot) + sum(c.snapshot))
    begun = time.perf_counter() - BEGIN
    left = (1 - RESERVE) * args.seconds - begun - images / speed
    net = stages.first_network(setup)
    sampler = sampling.Sampler(setup.model, net, c.steps, c.sample_batch, c.labels, setup.processes)
    cost = cli.Cost.of(dataclasses.replace(setup, c=c), net, sampler)
    for option, values in image_counts(c, cost, SAMPLING * left).items():
        argv += [option, *values]
    print(
        f"{begun:.0f} s so far; training {speed:.0f} images a second, sampling "
        f"{1 / cost.seconds_per_image:.0f} in {c.steps} steps; edm_neon.py {' '.join(argv)}",
        flush=True,
    )
    cli.run(argv, presets, __doc__)
    print(f"{time.perf_counter() - BEGIN:.0f} s in all, of {args.seconds:g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("data", help="EDM dataset zip")
    add("--out", default="runs/cifar10-jpeg", help="folder of the results")
    add("--seconds", type=float, default=300.0, help="in all")
    add("--channels", type=int, default=64, help="of the network")
    add("--device", choices=["cpu", "cuda"], default="cuda")
    torch._dynamo.config.disable = True  # compilation takes longer than it saves in five minutes
    study(*parser.parse_known_args())


if __name__ == "__main__":
    main()
