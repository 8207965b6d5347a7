"""Networks and a small study that the tests of edm_neon.py share."""

import contextlib
import dataclasses
import functools
import inspect
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import few_glyphs
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import adaptive_neon as neon
import edm_neon as edm
import neon_ext

SCRIPT = Path(few_glyphs.__file__)
torch.set_num_threads(1)  # tiny networks: a second thread only waits

# The preset that needs no download.
PRESET = "glyphs"
preset = edm.PRESETS[PRESET]
SIZE = preset.network["img_resolution"]

# Small networks with every kind of parameter that real ones have: EDM's CIFAR-10 network in small
# (three levels, attention at one that is not the lowest, augmentation labels, dropout), NCSN++
# (Fourier features, residual encoder), an unconditional one and ADM.
CIFAR = {
    "img_resolution": 16,
    "img_channels": 3,
    "label_dim": 10,
    "augment_dim": 9,
    "model_channels": 16,
    "channel_mult": [1, 2, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.13,
}
NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}
ADM = {"model_type": "DhariwalUNet", "model_channels": 32, "channel_mult": [2, 2, 4]}
KINDS = {
    "cifar": CIFAR,
    "ncsnpp": CIFAR | NCSNPP,
    "uncond": CIFAR | {"label_dim": 0},
    "adm": CIFAR | ADM,  # attention at two levels, with one head and with two
}


def network(kind="cifar", seed=0, **changes):
    """A network whose parameters all matter: initial output layers are almost zero."""
    torch.manual_seed(seed)
    net = neon.networks.denoiser(**KINDS[kind] | changes)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net.eval().requires_grad_(False)


def pair(kind="cifar", drift=0.1):
    """A base and its drifted relative."""
    base, aux = network(kind, 1), network(kind, 2)
    for p, q in zip(aux.parameters(), base.parameters(), strict=True):
        p.data.lerp_(q.data, 1 - drift)
    return base, aux


def one_hot(net, labels):
    return torch.eye(net.label_dim)[labels] if net.label_dim else None


def edm_model(**options):
    return edm.EdmModel(preset, neon.config.Config(out=Path("."), **options))


# -------------------- a model that is no U-Net and answers at once
class ToyNet(nn.Module):
    """Three blocks of two layers each, labels, a parameter that sampling does not use, a buffer."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
        self.mid = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.dec = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16))
        self.mid_labels = nn.Embedding(5, 8)
        self.mid_unused = nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.full((1,), 0.1))

    def forward(self, x, labels):
        h = torch.tanh(self.enc(x.flatten(1)))
        h = h + torch.tanh(self.mid(h)) + self.mid_labels(labels)
        return torch.tanh(self.dec(h) + self.offset).view(-1, 1, 4, 4)


class ToyModel(neon.sampling.Model):
    """ToyNet behind the seam."""

    identity = "toy"
    training_identity = "toy training"
    encodes = False

    def __init__(self):
        pass

    def load(self, path):
        return self.load_like(ToyNet(), path)

    def load_like(self, base, path):
        net = ToyNet()
        net.load_state_dict(safetensors.torch.load_file(path))
        return net.eval()

    def create(self, images, labels, c):
        return ToyNet()

    def trainable(self, base, c):
        net = ToyNet()
        net.load_state_dict(base.state_dict())
        return net

    def noise_shape(self, net):
        return (1, 4, 4)

    def image_shape(self, net):
        return (1, 4, 4)

    def classes(self, net):
        return 5

    def sample(self, net, noise, labels, steps):
        return net(noise, labels)

    def loss(self, net, x, labels):
        noisy = x + torch.randn_like(x)
        return (net(noisy, labels) - x).square().flatten(1).mean(1) + net.mid_unused.square().sum()

    def block(self, name, net, partition):
        return name[:3]

    def layer(self, name):
        return name.rsplit(".", 1)[0]

    def save(self, net, path, recipe):
        tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        neon.files.write_atomically(path, partial(safetensors.torch.save_file, tensors))

    def export(self, net, path, recipe):
        self.save(net, path.with_suffix(".safetensors"), recipe)
        self.exported = recipe

    def fetch(self, source, what):
        return neon.files.fetch(source, what)

    def start_check(self, base, c, trained):
        self.checked = trained


class ToyFeatures:
    """A fixed random projection: uint8-valued [N, C, H, W] -> [N, 6] float32."""

    dim = 6
    kind = name = "toy-6"
    score = "FD (toy, 6-d)"
    identity = "toy features"

    def __init__(self, pixels=16):
        generator = torch.Generator().manual_seed(5)
        self.matrix = torch.randn(pixels, self.dim, generator=generator) * (2 / pixels**0.5)

    def __call__(self, images):
        return torch.tanh((images.float() / 127.5 - 1).flatten(1) @ self.matrix)

    def to(self, device):
        return self


def toy_pair():
    """A base, and its relative with another buffer."""
    torch.manual_seed(1)
    base = ToyNet()
    torch.manual_seed(2)
    aux = ToyNet()
    for p, q in zip(aux.parameters(), base.parameters(), strict=True):
        p.data.lerp_(q.data, 0.8)
    aux.offset.fill_(0.7)
    return base.eval(), aux.eval()


def blend(base, aux, w, owner_of):
    """theta_r - w (theta_s - theta_r), written out; buffers are the base's."""
    net = type(base)(**base.config) if hasattr(base, "config") else type(base)()
    net.load_state_dict(base.state_dict())
    theirs = dict(aux.named_parameters())
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(p.double() - w[owner_of(name)] * (theirs[name].double() - p.double()))
    return net.eval().requires_grad_(False)


BEST = {"enc": 1.0, "mid": 0.5, "dec": 1.5}  # the "real" images are the toy's at these weights


def toy_images(w=BEST, first=77_000, count=400):
    """uint8 images and labels of the toy at these weights."""
    model, (base, aux) = ToyModel(), toy_pair()
    net = blend(base, aux, w, lambda name: name[:3])
    return neon.sampling.Sampler(model, net, 1).batch_images(range(first, first + count))


def config(out, **options):
    """A configuration for the toy."""
    settings = {
        "preset": PRESET,
        "device": "cpu",
        "precision": "fp32",
        "snapshot": (1,),
        "grid": (0.0, 1.0),
        "synthetic": 100,
        "sample_batch": 32,
        "select_images": 100,
        "final_images": 120,
        "batch": 20,
    }
    return neon.config.Config(**{"out": Path(out), **settings, **options})


@functools.cache
def real_toys(first=77_000):
    """Real images in three parts, the final one after the others."""
    parts = [toy_images(first=first + 1000 * k, count=400) for k in range(3)]
    return neon.images.RealData(
        *(neon.images.RealImages(*part, "toy") for part in parts), "of the toy"
    )


def judge_of(features, selection, final=None):
    """A judge of references made by hand."""
    judge = neon.judges.Judge.__new__(neon.judges.Judge)
    judge.features, judge.is_part = features, False
    judge.selection, judge.final = selection, final or selection
    return judge


def toy_judge(out, real=True):
    """Other real images for the selection than for the final comparison."""
    judge = neon.judges.Judge(ToyFeatures(), real_toys())
    if not real:
        judge.selection = dataclasses.replace(judge.selection, real=None)
        judge.final = dataclasses.replace(judge.final, real=None)
    return judge


def seeds_of(c):
    """The seeds of a study with this configuration."""
    counts = c.select_images, c.final_images, c.final_repeats, c.synthetic
    return neon.seeds.seed_ledger(*counts, searched=c.search == "gradient")


def scorer_of(c, model, base, aux, judges):
    """The scorer of a study with this configuration, whose log lies in its folder."""
    sampler = neon.sampling.Sampler(model, base, c.steps, c.sample_batch)
    merger = neon.blocks.Merger(base, aux, neon.study.blocks_of(c.partition, model, base))
    log = neon.scores.ScoreLog(c.out)
    return neon.scores.Scorer(sampler, merger, judges, log, seeds_of(c), c.precision, snapshot=1)


def toy_scorer(out, real=True, **options):
    """The scorer of a toy study in the folder `out`."""
    out.mkdir(exist_ok=True)
    return scorer_of(config(out, **options), ToyModel(), *toy_pair(), [toy_judge(out, real)])


def toy_setup(out, **options):
    """What a toy study begins with."""
    c = config(out, **options)
    return neon.stages.Setup(
        c, preset, ToyModel(), neon.processes.Processes("cpu"), real_toys(), seeds_of(c)
    )


def edm_scorer(out, kind="cifar", partition="paper", precision="fp32", batch=16, steps=2):
    """A scorer of a small EDM network; its features see all pixels."""
    base, aux = pair(kind)
    base.sigma_max = 0.7  # images within [-1, 1] after two steps: few pixels are clipped
    c = config(out, partition=partition, precision=precision, sample_batch=batch, steps=steps)
    features = ToyFeatures(3 * 16 * 16)
    generator = torch.Generator().manual_seed(9)
    images = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8, generator=generator)
    real = neon.images.RealData(*[neon.images.RealImages(images, None, "noise")] * 3, "noise")
    judge = neon.judges.Judge(features, real)
    return scorer_of(c, edm_model(), base, aux, [judge])


def network_distance(net, seeds, reference):
    """Distance of a toy network at these seeds, from first principles: one image after the
    other."""
    images = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed))
        noise = torch.randn((1, 4, 4), generator=generator)
        order = torch.Generator().manual_seed(int(seed) // 5)  # of the five classes in this cycle
        label = torch.randperm(5, generator=order)[int(seed) % 5]
        images.append(net(noise[None], label[None]))
    pixels = (torch.cat(images) * 127.5 + 128).clip(0, 255).to(torch.uint8)
    features = ToyFeatures()(pixels)
    return float(reference.prepared.distance(*neon_ext.feature_moments(features)))


def toy_distance(scorer, w, seeds):
    """The score of the toy pair at these weights and seeds."""
    net = blend(*toy_pair(), w, lambda name: name[:3])
    judge = scorer.judge
    reference = judge.final if 50_000 <= seeds[0] < 10_000_000 else judge.selection
    return network_distance(net, seeds, reference)


def score_of(fd, folds=None, w=None, precision=None, recall=None, **changes):
    """A score made by hand."""
    return neon.scores.Score(
        **{
            "snapshot": 1,
            "w": w or {"enc": 0.0, "mid": 0.0, "dec": 0.0},
            "images": 100,
            "first_seed": 10_000,
            "fd": fd,
            "folds": list(folds) if folds is not None else [fd] * neon.stats.FOLDS,
            "precision": precision,
            "recall": recall,
            "arithmetic": "fp32",
            "seconds": 0.5,
            "key": "key",
            **changes,
        }
    )


def gaussian_score(reference, features, **changes):
    """A score of features [N, D] against a reference."""
    fd, folds = reference.fold_distances(features, neon.stats.FOLDS)
    return score_of(fd, folds, **changes)


def standard_reference(dim=3):
    return neon_ext.FrechetReference(torch.zeros(dim), torch.eye(dim))


@contextlib.contextmanager
def toy_preset():
    """The preset's model, images and features are the toy's in this block."""
    real = real_toys()
    with pytest.MonkeyPatch.context() as patch:
        replace(patch, "open_model", lambda c, preset, processes: ToyModel())
        patch.setattr(preset, "real_images", lambda c: real)
        patch.setattr(preset, "features", lambda c: ToyFeatures())
        yield


def toy_network_files(folder):
    """Files of a base and of two networks that have drifted from it, the second further."""
    base, near = toy_pair()
    far = blend(base, near, weights(-2.5, -3, -2), lambda name: name[:3])
    far.offset.fill_(-0.4)
    paths = []
    for name, net in (("base", base), ("near", near), ("far", far)):
        paths.append(folder / f"{name}.safetensors")
        ToyModel().save(net, paths[-1], {})
    return paths


# -------------------- the script
SMALL = (
    *("--preset", PRESET, "--train-base", "1", "--snapshot", "1", "--grid", "0.5,1.0"),
    *("--synthetic", "100", "--select-images", "80", "--final-images", "80", "--steps", "4"),
    *("--judge", "pixels"),
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def launch(*args, program=(sys.executable,), **options):
    """The script in a process of its own."""
    command = [*program, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, **options)


def lines(path, without=("seconds",)):
    """Rows of a log, without their times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in without} for row in rows]


def weights(enc, mid, dec):
    return {"enc": float(enc), "mid": float(mid), "dec": float(dec)}


def numbers_of(w):
    return np.array(list(w.values()))


def replace(monkeypatch, name, value):
    """Put `value` in the place of a function or constant wherever it is used."""
    modules = [edm, *(module for module in vars(neon).values() if inspect.ismodule(module))]
    found = [module for module in modules if hasattr(module, name)]
    assert found, name
    for module in found:
        monkeypatch.setattr(module, name, value)


def parse(argv):
    return neon.cli.parse(argv, edm.PRESETS, edm.__doc__)


def preset_of(c):
    return edm.PRESETS[c.preset]


def owners_of(model, net, named):
    """{parameter: block} of --partition."""
    names = list(neon.blocks.movable_parameters(net))
    return neon.blocks.partition(names, neon.study.blocks_of(named, model, net))


def sends(body, status=200, length=None, delay=0):
    """An answer of the fixture `server`."""

    def answer(handler):
        time.sleep(delay)
        handler.send_response(status, "Bad\x1b[31m" if status != 200 else None)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        with contextlib.suppress(BrokenPipeError):  # who asked has gone
            handler.wfile.write(body)

    return answer
