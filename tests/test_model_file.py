"""--model FILE.py: what is wrong with a file is one line; what is right goes through all stages."""

import contextlib
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import adaptive_neon as neon
import edm_neon as edm

SCRIPT = Path(edm.__file__)
ADAPTER = SCRIPT.parent / "examples" / "flow_glyphs.py"
FOLDER = tempfile.TemporaryDirectory()
REAL = Path(FOLDER.name) / "real.zip"
SIZE = 8
torch.set_num_threads(1)

GOOD = f"""
import copy
import numpy as np
import torch
from torch import nn

SHAPE = (4,)
CLASSES = 10

class Net(nn.Module):
    '''A one-step generator with an unused parameter, a frozen one, a tied one and BatchNorm.'''
    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(CLASSES, 4)
        self.body = nn.Linear(4, 16)
        self.norm = nn.BatchNorm1d(16)
        self.again = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.again.weight
        self.head = nn.Linear(16, {SIZE * SIZE})
        self.gain = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(16), requires_grad=False)
    def forward(self, z, labels):
        h = torch.relu(self.norm(self.body(z + self.label(labels)))) * self.frozen
        h = self.tied(torch.relu(self.again(h)))
        return torch.tanh(self.gain * self.head(h)).view(-1, 1, {SIZE}, {SIZE})

def create():
    return Net()
def load(path):
    net = Net()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net
def sample(net, noise, labels, steps):
    return net(noise, labels)
def loss(net, x, labels):
    z = torch.randn(len(x), 4)
    return (net(z, labels) - x).square().mean((1, 2, 3))
def features(images):
    return images.flatten(1)[:, 5:60:9] / 128 - 1
def block(name):
    return "in" if name.split(".")[0] in ("label", "body", "norm") else "out"
"""
SHORT = [
    *("--data", REAL, "--snapshot", "1", "--grid", "0.5,1.0", "--steps", "2", "--threads", "1"),
    *("--synthetic", "64", "--select-images", "40", "--final-images", "40"),
    *("--sample-batch", "20", "--precision", "fp32", "--device", "cpu"),
    *("--ramp-kimg", "0", "--ema-kimg", "0.2"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with the good file and its base; the real images beside it."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "mine.py").write_text(GOOD)
    torch.manual_seed(0)
    net = neon.modelfile.FileModel(folder / "mine.py").file.create()
    torch.save(net.state_dict(), folder / "base.pt")
    images = torch.randint(0, 255, (400, 1, SIZE, SIZE), dtype=torch.uint8)
    neon.images.write_dataset(REAL, images, torch.arange(400) % 10)
    return folder


@pytest.fixture
def out(shared, tmp_path):
    return tmp_path / "out"


def write(tmp_path, changes="", name="mine.py"):
    path = tmp_path / name
    path.write_text(GOOD + changes)
    return path


def model_and_base(path, seed=0, **options):
    """A model file and a network of it with BatchNorm statistics of its own."""
    model = neon.modelfile.FileModel(path)
    c = neon.config.Config(**{"out": path.parent, "device": "cpu", "precision": "fp32", **options})
    torch.manual_seed(seed)
    net = model.file.create()
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model, net.eval(), c


def owners_of(model, net, named):
    """{parameter: block} of --partition."""
    names = list(neon.blocks.movable_parameters(net))
    return neon.blocks.partition(names, neon.study.blocks_of(named, model, net))


def refused(capsys, *argv):
    """The one line of a run that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        edm.main([str(arg) for arg in argv])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line]
    lines = [line for line in lines if line.strip() and " from 1 folder" not in line]
    assert len(lines) == 1 and lines[0].startswith("edm_neon: "), lines
    return lines[0]


# ---------------------------------------------------------------- wrong files
def sample_is(body):
    return f"\ndef sample(net, noise, labels, steps):\n    {body}\n"


def loss_is(body):
    return f"\ndef loss(net, x, labels):\n    {body}\n"


def load_is(body):
    """What load() does to the network of the good file."""
    return f"\nread = load\ndef load(path):\n    net = read(path)\n    {body}\n    return net\n"


def returns(name, value):
    return f"\ndef {name}(*_):\n    return {value}\n"


LOSS = "l = (net(torch.randn(len(x), 4), labels) - x).square().mean((1, 2, 3))\n    return "
NET = "net(noise, labels)"
GRADIENT = ("--search", "gradient")
TRAIN = ("--train-base", "1")

# Changes of the good file, the message, and options.
WRONG = {
    "no sample": ("\ndel sample\n", "lacks sample$"),
    "no shape, no load": ("\ndel SHAPE, load\n", "lacks SHAPE, load$"),
    "syntax": ("\ndef (:\n", r"cannot be imported: line \d+: SyntaxError"),
    "exits": ("\nraise SystemExit(0)\n", "cannot be imported: line .*SystemExit"),
    "shape": ("\nSHAPE = (4.0,)\n", "SHAPE must be a tuple of positive integers, got .4.0"),
    "no sizes": ("\nSHAPE = ()\n", "SHAPE must be"),
    "classes": ("\nCLASSES = -1\n", "CLASSES must be an integer from 0, got -1"),
    "a dtype": ("\ntorch.set_default_dtype(torch.float64)\n", "mine.py changes torch's default"),
    "threads": (loss_is("torch.set_num_threads(2)\n    " + LOSS + "l"), "threads from 1 to 2"),
    # load()
    "no network": (
        returns("load", "{}"),
        r"load\(\) must give a torch.nn.Module in Python, got dict",
    ),
    "load fails": (returns("load", "open('x/y')"), r"load\(\) failed: line \d+: FileNo"),
    "load is random": (returns("load", "Net()"), r"load\(\) gives other weights"),
    "no parameters": (returns("load", "nn.Identity()"), r"load\(\) must give .* parameters"),
    "half": (load_is("net.half()"), "float32 parameters, got gain of float16"),
    "lazy": (returns("load", "nn.LazyLinear(3)"), "must give weights, got weight that has none"),
    "not finite": (load_is("net.head.bias.data[0] /= 0"), "finite weights, got head.bias"),
    "no copy": (load_is("net.drawn = (i for i in range(3))"), "a network that can be copied"),
    # sample()
    "flat": (sample_is(f"return {NET}.flatten(1)"), r"images \[4, 1 or 3, H, W\], got .*\[4, 64"),
    "four channels": (sample_is(f"return {NET}.repeat(1, 4, 1, 1)"), r"got torch.float32 \[4, 4,"),
    "one image": (sample_is(f"return {NET}[:1]"), r"\[4, 1 or 3, H, W\], got .*\[1, 1,"),
    "bytes": (sample_is(f"return {NET}.byte()"), r"sample\(\) .* floating-point .*got torch.uint8"),
    "a list": (sample_is(f"return [{NET}]"), r"sample\(\).*got list"),
    "infinite": (sample_is(f"return {NET} / 0"), r"sample\(\) must give finite images"),
    "outliers": (sample_is(f"return {NET} * 90"), r"sample\(\).*\[-1, 1\]"),
    "pixels": (sample_is(f"return {NET} * 2 + 3"), r"\[-1, 1\], got images from"),
    "other size": (sample_is(f"return {NET}.repeat(1, 3, 1, 1)"), "the base makes images of shape"),
    "batch": (sample_is(f"x = {NET}\n    return x - 0.1 * x.mean(0)"), "noise in another batch"),
    "training mode": (sample_is(f"net.train()\n    return {NET}"), r"sample\(\)"),
    "random": (sample_is(f"return {NET} + np.random.rand()"), "same noise, without hidden random"),
    "no noise": (sample_is("return net(torch.ones_like(noise), labels)"), "images for other noise"),
    "a cached weight": (
        sample_is(
            "if not hasattr(net, 'w'):\n        net.w = net.gain.detach().clone() * 2\n"
            "    return net(noise * net.w, labels)"
        ),
        r"sample\(\) must keep nothing of earlier weights",
    ),
    "changes the weights": (
        sample_is(f"net.gain.data.mul_(1.00001)\n    return {NET}"),
        r"sample\(\) must leave the network as it is.*first in gain",
    ),
    "casts the network": (
        sample_is("net.double().float()\n    return net(noise, labels)"),
        r"sample\(\) must leave the network as it is",
    ),
    "shared between threads": (
        "\nimport time\n"
        + sample_is(
            "net.z = noise\n    time.sleep(0.02)\n    return net(net.z[:len(noise)], labels)"
        ),
        r"sample\(\) must keep nothing in the network.*mixed batches",
    ),
    "sample raises": (sample_is("raise ValueError('my words')"), r"line \d+: ValueError: my words"),
    "sample is no function": ("\nsample = 3\n", r"sample\(\) failed: TypeError"),
    "parts": (
        sample_is("return Net.forward(net, noise, labels)"),
        r"must call net\(...\) for half precision",
        *("--confirm-precision", "bf16"),
    ),
    # names of blocks and layers
    "block gives none": (returns("block", "None"), r"block\('gain'\) must give a string"),
    "block gives two lines": (returns("block", "'a\\nb'"), r"block\('gain'\) must give"),
    "layer": (returns("layer", "None"), r"layer\('gain'\) must give", "--partition", "layers"),
    "no block": ("\ndel block\n", r"--partition paper needs block\(\) in .*: write one"),
    "structural": ("", "--partition structural needs block", "--partition", "structural"),
    # loss()
    "no loss": ("\ndel loss\n", r"training needs a function loss\(\) in .*, or give --aux"),
    "loss is a mean": (loss_is(LOSS + "l.mean()"), r"one number a sample, \[4\], got \[\]"),
    "loss is a number": (loss_is("return 3.0"), "one number a sample, .* got float"),
    "loss not finite": (loss_is(LOSS + "l / 0"), "finite numbers and gradients"),
    "a root": (
        loss_is(LOSS + "l + (net.unused - 1).sum().abs().sqrt() * 0"),
        r"loss\(\) must give finite numbers and gradients, .* first in unused",
    ),
    "loss is random": (
        loss_is(LOSS + "l * (1 + 1e6 * np.random.rand())"),
        "same torch.manual_seed",
    ),
    "loss is constant": (
        loss_is(LOSS.replace("net(", "net.eval()(") + "l.detach()"),
        r"loss\(\) must let a gradient through, without no_grad",
    ),
    "another network": (
        "\nOTHER = Net()\n" + loss_is(LOSS.replace("net(", "OTHER(") + "l"),
        r"loss\(\) must depend on the network's weights",
    ),
    "trains what sample leaves": (
        loss_is("return net.unused.sum() * x.mean((1, 2, 3))"),
        r"sample\(\) must depend on the weights that loss\(\) trains",
    ),
    "encode": (returns("encode", "_[0][:1] / 127.5 - 1"), r"encode\(\) must .* got \[1\]"),
    # gradients of the search, features, save(), create()
    "no_grad": (
        sample_is(f"with torch.no_grad():\n        return {NET}"),
        r"sample\(\) must let a gradient through",
        *GRADIENT,
    ),
    "detach": (
        sample_is(f"x = {NET}\n    return (x + net(noise * 0.5, labels).detach()) / 2"),
        r"the gradient through sample\(\) must be its derivative",
        *GRADIENT,
    ),
    "twice the derivative": (
        sample_is(f"x = {NET}\n    return 2 * x - x.detach()"),
        r"the gradient through sample\(\) must be its derivative.*got 2.00 of it",
        *GRADIENT,
    ),
    "written over": (
        sample_is(f"x = {NET}.exp()\n    x.mul_(x).log_()\n    return x / 2"),
        r"sample\(\) must let a gradient through.*inplace",
        *GRADIENT,
    ),
    "features": (
        "\n@torch.no_grad()\ndef features(images):\n    return images.float().flatten(1)[:, ::9]\n",
        "no gradient comes through the features mine-8",
        *GRADIENT,
    ),
    "features of four": (returns("features", "_[0]"), r"features\(\) must give a", *TRAIN),
    "save": (returns("save", "None"), r"save\(net, path\) must write something"),
    "no create": ("\ndel create\n", r"--train-base needs a function create\(\) in", *TRAIN),
    "create gives a class": (returns("create", "Net"), r"create\(\) must give a torch", *TRAIN),
    "create is random": (
        "\nnew = create\ndef create():\n    torch.seed()\n    return new()\n",
        r"create\(\) gives other weights for the same torch.manual_seed",
        *TRAIN,
    ),
}


@pytest.fixture
def settings_restored():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.set_num_threads(1)


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_one_line(
    case, shared, out, tmp_path, capsys, settings_restored, monkeypatch
):
    monkeypatch.setattr(neon.processes, "usable_cores", lambda: 2)  # batches at once, everywhere
    changes, message, *options = case
    base = () if "--train-base" in options else ("--base", shared / "base.pt")
    path = write(tmp_path, changes)
    line = refused(capsys, *SHORT, "--model", path, *base, *options, "--out", out)
    assert re.search(message, line), line


def test_a_missing_file_and_a_missing_base(tmp_path, capsys):
    line = refused(capsys, *SHORT, "--model", tmp_path / "none.py", "--out", tmp_path)
    assert "none.py does not exist" in line
    path = write(tmp_path)
    line = refused(capsys, "--model", path, "--out", tmp_path, "--device", "cpu")
    assert "needs --base FILE for its load(), or --train-base KIMG" in line


def test_a_relative_path_has_line_numbers_too(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "\n1 / 0\n")
    number = GOOD.count("\n") + 2
    assert f"line {number}: Zero" in refused(
        capsys, *SHORT, "--model", "mine.py", "--out", tmp_path
    )


def test_memory_errors_stay_what_they_are(tmp_path):
    """The gradient search halves its batch on them."""
    model = neon.modelfile.FileModel(
        write(tmp_path, sample_is("raise torch.OutOfMemoryError('full')"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        model.sample(None, None, None, 1)


# ---------------------------------------------------------------- networks of other kinds
def create_is(body):
    """What create() does to the network of the good file."""
    return f"\nmake = create\ndef create():\n    net = make()\n    {body}\n    return net\n"


OTHERS = {
    "parameters that need no gradient": create_is("net.requires_grad_(False)"),
    "three channels": sample_is(f"return {NET}.repeat(1, 3, 1, 1)")
    + loss_is(LOSS.replace("- x)", "- x.mean(1, True))") + "l"),
    "float64": create_is("net.double()")
    + sample_is("return net(noise.double(), labels)")
    + loss_is(LOSS.replace("4)", "4).double()") + "l"),
    "weight_norm": create_is("torch.nn.utils.parametrizations.weight_norm(net.head)"),
    "no labels": "\nCLASSES = 0\n"
    + "class Net(Net):\n    def __init__(self):\n        super().__init__()\n"
    "        self.label = nn.Embedding(1, 4)\n" + "    def forward(self, z, labels):\n"
    "        assert labels is None\n        return super().forward(z, torch.zeros(len(z)).long())"
    "\n",
    "latents and a decoder beside the network": (
        "\ntorch.manual_seed(5)\nDECODER = nn.Tanh()\n"
        + sample_is("return DECODER(2 * net(noise, labels))")
        + "\ndef encode(images):\n    return torch.atanh((images / 127.5 - 1) * 0.9) / 2\n"
    ),
    "noise written over": sample_is("noise.mul_(0.5)\n    return net(noise, labels)"),
    "a compiled network": create_is("net = torch.compile(net)"),
    "embeddings whose gradients are sparse": create_is("net.label.sparse = True"),
    "settings that are tried": (
        "\nCONTROLS = {'gain': [{'gain': 0.5}, {'gain': 2.0}]}\n"
        "def sample(net, noise, labels, steps, gain=1.0):\n    return gain * net(noise, labels)\n"
    ),
    "a save in half precision": (
        "\ndef save(net, path):\n    torch.save(net.half().state_dict(), path)\n"
    ),
    "a state that is no tensor": (
        "\nclass Net(Net):\n    def get_extra_state(self):\n        return {'version': 3}\n"
        "    def set_extra_state(self, state):\n        pass\n"
    ),
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS.keys())
def test_other_networks_pass_the_start_check_and_come_back(changes, tmp_path):
    model, base, c = model_and_base(write(tmp_path, changes), search="gradient")
    base = model.checked_network(base, "create")
    random, weights = torch.get_rng_state(), neon.keys.weights_hash(base)
    model.start_check(base, c, trained=True)
    assert model.example.dtype == torch.uint8 and neon.keys.weights_hash(base) == weights
    assert model.settings == {} and torch.equal(torch.get_rng_state(), random)
    model.save(base, tmp_path / "network.safetensors", {"kimg": 1})
    again = model.load_like(base, tmp_path / "network.safetensors")
    assert neon.keys.weights_hash(again) == neon.keys.weights_hash(base)
    assert not again.training
    owners = owners_of(model, base, "layers")
    assert len(owners) == len(neon.blocks.movable_parameters(base))


def test_block_is_asked(tmp_path):
    model, base, _ = model_and_base(write(tmp_path))
    owners = owners_of(model, base, "paper")
    assert set(owners.values()) == {"in", "out"}
    assert owners["body.weight"] == "in" and owners["gain"] == "out"


@pytest.mark.parametrize("code, said", [("torch.sigmoid(out)", True), ("out", False)])
def test_images_that_are_never_dark_are_noted(tmp_path, code, said):
    path = write(tmp_path, sample_is(f"out = net(noise, labels)\n    return {code}"))
    model, base, c = model_and_base(path)
    model.start_check(base, c, trained=True)
    assert ("no value below 0" in " ".join(model.notes)) == said


@pytest.mark.parametrize(
    "scale, given, trained_here",
    [("torch.tensor([50.0] + 7 * [1.0])", False, True), ("1", True, True), ("500", False, False)],
    ids=["outliers", "in range", "no images at all"],
)
def test_a_base_trained_here_may_have_outliers(tmp_path, scale, given, trained_here):
    """Hours are not lost to a few pixels, which are clipped; what is refused names the cause."""
    path = write(tmp_path, sample_is(f"return net(noise, labels) * {scale}"))
    cause = r".*undertrained \(--train-base 20\), or too few --steps"
    for options, holds, why in (
        ({"base": "base.pt"}, given, ""),
        ({"train_base": 20.0}, trained_here, cause),
    ):
        model, base, c = model_and_base(path, **options)
        base.head.weight.data *= 4
        expected = contextlib.nullcontext()
        if not holds:
            expected = pytest.raises(neon.UserError, match=rf"images in \[-1, 1\]{why}")
        with expected:
            model.start_check(base, c, trained=True)


def test_save_is_tried_before_a_base_is_trained(tmp_path):
    model, base, c = model_and_base(write(tmp_path, returns("save", "None")), train_base=20.0)
    with pytest.raises(neon.UserError, match=r"save\(net, path\) must write something"):
        model.start_check(base, c, trained=False)


# ---------------------------------------------------------------- keys
def test_the_identity_is_the_content(tmp_path):
    first = neon.modelfile.FileModel(write(tmp_path)).identity
    assert neon.modelfile.FileModel(write(tmp_path, name="renamed.py")).identity == first
    assert neon.modelfile.FileModel(write(tmp_path, "# a comment\n")).identity != first


def test_every_model_of_a_process_has_the_helpers_in_its_identity(tmp_path):
    """As --training-seeds makes one after the other."""
    found = []
    for value in (1, 1, 2):
        (tmp_path / "helper.py").write_text(f"A = {value}\n")
        helped = sample_is("import helper\n    return net(noise, labels) * helper.A / 2")
        model, base, c = model_and_base(write(tmp_path, helped))
        model.start_check(base, c, trained=True)
        found.append((model.identity, model.training_identity))
    assert found[0] == found[1] and found[0] != found[2]


def test_the_identity_has_the_base_and_networks_that_the_file_holds(shared, tmp_path):
    decoder = "\nDECODER = nn.Linear(1, 1)\n"
    model, base, c = model_and_base(write(tmp_path, decoder))
    plain = model.identity
    model.load(shared / "base.pt")
    with_base = model.identity
    model.start_check(base, c, trained=True)
    with_decoder = model.identity
    model.file.DECODER.bias.data += 1
    model.start_check(base, c, trained=True)
    assert len({plain, with_base, with_decoder, model.identity}) == 4
    assert model.training_identity == model.identity


def test_the_identity_has_not_the_place_of_the_base(shared, tmp_path):
    found = []
    for name in ("base.pt", "elsewhere/base.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(shared / "base.pt", tmp_path / name)
        model = neon.modelfile.FileModel(write(tmp_path))
        model.load(tmp_path / name)
        found.append(model.identity)
    assert found[0] == found[1]


# ---------------------------------------------------------------- training
def test_a_model_without_classes_trains_without_labels(tmp_path):
    path = write(tmp_path, "\nCLASSES = 0\n" + loss_is("assert labels is None\n    return x"))
    x = torch.ones(2)
    assert neon.modelfile.FileModel(path).loss(None, x, torch.tensor([3, 1])) is x


def test_encode_is_repeatable_and_keeps_no_graph(tmp_path):
    path = write(
        tmp_path,
        "\nW = nn.Parameter(torch.ones(1))\n"
        "def encode(images):\n"
        "    return W * images / 127.5 - 1 + torch.randn(len(images), 1, 1, 1)\n",
    )
    model = neon.modelfile.FileModel(path)
    images = torch.zeros(300, 1, SIZE, SIZE, dtype=torch.uint8)
    first, second = (neon.train.encode_once(model, images, "cpu", 3) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad and len(first) == 300
    assert not torch.equal(first, neon.train.encode_once(model, images, "cpu", 4))


# ---------------------------------------------------------------- whole runs
def run(*argv):
    edm.main([str(arg) for arg in argv])


def results(folder):
    """What a run found, without times."""
    entry = json.loads((folder / "summary.json").read_text())["snapshots"]
    text = re.sub(r'"seconds": [^,}]*', "", json.dumps(entry))
    return json.loads(re.sub(r", }", "}", re.sub(r", ,", ",", text)))


RUN = ("--train-base", "1", "--base-lr", "0.01", "--lr", "0.003")


def test_a_run_from_base_to_report(out, tmp_path):
    path = write(tmp_path, "\ndef save(net, path):\n    torch.save(net.state_dict(), path)\n")
    options = [*SHORT, *RUN, "--model", path, "--out", out, "--final-repeats", "2"]
    options += ["--grid", "1.0", "--sweep", "0:1:0.5"]
    options += ["--search", "gradient", "--evaluations", "2"]
    run(*options)
    (entry,) = results(out)
    assert set(entry["blocks"]) == {"in", "out"}
    assert {"base", "collapsed", "global", "searched", "blockwise"} <= set(entry["final"])
    assert len(entry["final"]["base"]["all"]) == 2
    score = json.loads((out / "summary.json").read_text())["score"]
    assert score == "FD (features of mine.py, 7-d)"

    # What is saved is the best network by the selection seeds, and load() reads it.
    names = ("base", "global", "blockwise", "searched")
    best = min((entry[name]["fd"], name) for name in names)[1]
    model = neon.modelfile.FileModel(path)
    repaired = model.read(out / "adaptive-neon-000001")
    (base_path,) = out.glob("base-*.safetensors")
    (aux_path,) = out.glob("self-*/network-snapshot-000001.safetensors")
    base = model.load_like(repaired, base_path)
    aux = model.load_like(repaired, aux_path)
    w = entry[best]["w"]["out"]
    expected = base.head.weight - w * (aux.head.weight - base.head.weight)
    torch.testing.assert_close(repaired.head.weight, expected)

    # The same command again computes nothing.
    lines = (out / "grid.jsonl").read_text()
    trained = os.stat(aux_path).st_mtime_ns
    run(*options)
    assert (out / "grid.jsonl").read_text() == lines
    assert os.stat(aux_path).st_mtime_ns == trained


def test_aux_of_ours_and_aux_that_load_reads_are_the_same(shared, tmp_path):
    model = neon.modelfile.FileModel(shared / "mine.py")
    base = model.load(shared / "base.pt")
    assert not base.training
    aux = copy.deepcopy(base)
    for tensor in (*neon.blocks.movable_parameters(aux).values(), aux.norm.running_mean):
        tensor.data += 0.05
    torch.save(aux.state_dict(), tmp_path / "aux.pt")
    model.save(aux, tmp_path / "aux.safetensors", {})
    for name in ("aux.pt", "aux.safetensors"):
        found = model.load_like(base, tmp_path / name)
        assert neon.keys.weights_hash(found) == neon.keys.weights_hash(aux)


def test_safetensors_of_others_go_to_load(tmp_path):
    from safetensors.torch import save_file

    save_file({"theirs": torch.ones(2)}, tmp_path / "x.safetensors")
    assert neon.modelfile.own_snapshot(tmp_path / "x.safetensors") is None
    path = write(tmp_path, "\ndef load(path):\n    raise ValueError('mine to read')\n")
    with pytest.raises(neon.files.UserError, match="mine to read"):
        neon.modelfile.FileModel(path).load_like(None, tmp_path / "x.safetensors")


def test_a_snapshot_of_another_network_is_refused(tmp_path):
    model, base, _ = model_and_base(write(tmp_path))
    base.head = torch.nn.Linear(16, 3)
    model.save(base, tmp_path / "x.safetensors", {})
    _, other, _ = model_and_base(write(tmp_path))
    with pytest.raises(neon.files.UserError, match=r"at head.weight: \(64, 16\) and \(3, 16\)"):
        model.load_like(other, tmp_path / "x.safetensors")


def test_features_keep_a_graph_only_for_images_that_need_one(tmp_path):
    net = "\nF = nn.Linear(64, 5)\ndef features(images):\n    return F(images.flatten(1) / 128)\n"
    images = torch.rand(4, 1, SIZE, SIZE) * 255
    features = neon.features.FileFeatures(neon.modelfile.FileModel(write(tmp_path, net)), images)
    assert not features(images).requires_grad
    assert features(images.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not features(images).requires_grad


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(shared, out, tmp_path):
    options = (*SHORT, "--model", shared / "mine.py", "--base", shared / "base.pt", "--grid", "1.0")
    options = (*options, "--search", "gradient", "--evaluations", "2", "--lr", "0.003")
    other = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [SCRIPT, *options, "--out", other]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)

    # The network that two ranks have trained, scored and searched by one.
    for folder in other.glob("self-*"):
        shutil.copytree(folder, out / folder.name)
    run(*options, "--out", out)
    assert len(list(out.glob("self-*"))) == 1
    (one,), (two,) = results(out), results(other)
    for name in one["final"]:
        np.testing.assert_allclose(one["final"][name]["fd"], two["final"][name]["fd"], rtol=1e-5)


# ---------------------------------------------------------------- the example
def test_the_example_names_every_layer(tmp_path):
    model, base, _ = model_and_base(ADAPTER)
    blocks = owners_of(model, base, "paper")
    layers = owners_of(model, base, "layers")
    assert set(blocks.values()) == {"enc", "mid", "dec"}
    assert set(layers.values()) == {"embeddings", *(f"block {i}" for i in range(4)), "output"}
    assert len(neon.blocks.block_order(layers)) == 6


def test_the_example_keeps_the_seams_promises(tmp_path):
    model, base, c = model_and_base(ADAPTER, search="gradient", steps=3)
    model.start_check(base, c, trained=False)
    assert tuple(model.image_shape(base)) == model.file.SHAPE
    model.save(base, tmp_path / "x.safetensors", {})
    assert neon.keys.weights_hash(model.load(tmp_path / "x.safetensors")) == neon.keys.weights_hash(
        base
    )


def test_the_example_flows_along_its_velocity(tmp_path):
    """Euler steps of a constant velocity end in noise + velocity; the loss is zero for a network
    that knows the velocity."""
    model = neon.modelfile.FileModel(ADAPTER)
    noise = torch.randn(3, *model.file.SHAPE)
    images = model.file.sample(lambda x, t, labels: torch.ones_like(x), noise, None, 5)
    torch.testing.assert_close(images, noise + 1)
    x = torch.randn(3, *model.file.SHAPE)

    def velocity(x_t, t, labels):
        # x_t = noise + t (x - noise), so x - noise = (x - x_t) / (1 - t).
        return (x - x_t) / (1 - t)[:, None, None, None]

    assert float(model.file.loss(velocity, x, None).max()) < 1e-6
