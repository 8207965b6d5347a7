"""A model of one's own: --model FILE.py, and what it must promise."""

import concurrent.futures
import copy
import importlib.util
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from .blocks import movable_parameters
from .features import FileFeatures, check_differentiable
from .files import (
    UserError,
    fetch,
    file_hash,
    is_safetensors,
    printable,
    reading,
    write_atomically,
)
from .keys import content_hash, key_of, weights_hash
from .processes import Diverged, Processes
from .sampling import draw_noise, network_calls, to_pixels


class JudgeFile:
    """FILE.py of --judge or --select-with, as FileFeatures takes it."""

    def __init__(self, path, option="--judge"):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"{option} {path} is no file, and no built-in judge: random-conv, pixels; with "
                "--preset glyphs also classifier-2 and mlp"
            )
        self.file = FileModel.import_file(self.path, option)
        self.identity = file_hash(self.path)
        if not hasattr(self.file, "features"):
            raise UserError(f"{option} {path} lacks features(images)")

    def call(self, name, *args):
        return FileModel.call(self, name, *args)


class FileModel:
    """The functions of a Python file behind the seam; adapters/flow_glyphs.py is such a file."""

    NEEDED = ("SHAPE", "CLASSES", "load", "sample")
    FUNCTIONS = ("load", "sample", "loss", "create", "encode", "block", "layer", "save", "features")

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"--model {path} does not exist, or is no file")
        known = set(sys.modules)
        self.file = self.import_file(self.path)
        self.check_names()
        self.content = self.hash_content(set(sys.modules) - known)
        self.encodes = hasattr(self.file, "encode")

    @staticmethod
    def import_file(path, option="--model"):
        spec = importlib.util.spec_from_file_location(f"neon_model_{path.stem}", path.resolve())
        if spec is None:
            raise UserError(f"{option} {path} is no Python file: its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickle look their module up
        sys.path.insert(0, str(path.resolve().parent))  # for modules beside it
        before = torch_settings()
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{option} {path} cannot be imported: {where_in(path, error)}"
            ) from error
        refuse_changed_settings(before, f"{option} {path}, when it is imported,")
        return module

    def check_names(self):
        missing = [name for name in self.NEEDED if not hasattr(self.file, name)]
        if missing:
            raise UserError(f"--model {self.path} lacks {', '.join(missing)}")
        for name in self.FUNCTIONS:
            if hasattr(self.file, name) and not callable(getattr(self.file, name)):
                raise UserError(f"--model {self.path}: {name} must be a function")
        shape, classes = self.file.SHAPE, self.file.CLASSES
        if (
            not isinstance(shape, (tuple, list))
            or not shape
            or not all(type(n) is int and n > 0 for n in shape)
        ):
            raise UserError(
                f"--model {self.path}: SHAPE must be a tuple of positive integers, "
                f"not {printable(repr(shape))}"
            )
        if type(classes) is not int or classes < 0:
            raise UserError(
                f"--model {self.path}: CLASSES must be an integer from 0, "
                f"not {printable(repr(classes))}"
            )

    def hash_content(self, modules):
        """Of the file, and of the modules beside it that it imports; not of their place."""
        folder = self.path.resolve().parent
        beside = {}
        for name in modules:
            source = Path(getattr(sys.modules[name], "__file__", None) or "/")
            installed = "site-packages" in source.parts
            if source.suffix == ".py" and folder in source.resolve().parents and not installed:
                beside[name] = file_hash(source)
        beside.pop(f"neon_model_{self.path.stem}", None)
        return key_of(file_hash(self.path), beside)

    @property
    def identity(self):
        """Also of the whole base file or folder (a decoder may lie beside the network), and of the
        networks that the file holds itself."""
        return key_of(self.content, self.base_content, self.held)

    training_identity = identity
    base_content = ""
    held: dict = {}

    def call(self, name, *args):
        """A function of the file; its errors name it and the line."""
        before = torch_settings()
        try:
            result = getattr(self.file, name)(*args)
        except (UserError, Diverged, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{self.path}: {name}() failed: {where_in(self.path, error)}"
            ) from error
        refuse_changed_settings(before, f"{self.path}: {name}()")
        return result

    def fetch(self, source, what):
        return fetch(source, what)

    def load(self, path):
        self.base_content = content_hash(Path(path))
        return self.read(path)

    def read(self, path):
        """load(), twice for a network of ordinary size: ranks and later runs load it again."""
        net = self.checked_network(self.call("load", path), "load")
        if sum(p.numel() for p in net.parameters()) < 2e8:
            again = self.checked_network(self.call("load", path), "load")
            if weights_hash(again) != weights_hash(net):
                raise UserError(
                    f"{self.path}: load() gives other weights every time: does {path} lack some?"
                )
        return net

    def checked_network(self, net, function):
        """A network that can be copied, moved and extrapolated, in eval mode on the CPU."""
        net = getattr(net, "_orig_mod", net)  # of torch.compile, which renames all parameters
        says = f"{self.path}: {function}() must give"
        if not isinstance(net, nn.Module):
            raise UserError(f"{says} a torch.nn.Module, not {type(net).__name__}")
        if isinstance(net, torch.jit.ScriptModule):
            raise UserError(f"{says} a torch.nn.Module in Python, not a TorchScript module")

        parameters = dict(net.named_parameters())
        if not parameters:
            raise UserError(f"{says} a network with parameters, {type(net).__name__} has none")
        for name, parameter in parameters.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise UserError(f"{says} a complete network, {name} is lazy: call it once before")
            if parameter.is_meta:
                raise UserError(f"{says} weights, {name} is on the meta device")
            moves = name in movable_parameters(net)
            if moves and parameter.dtype not in (torch.float32, torch.float64):
                kind = str(parameter.dtype).removeprefix("torch.")
                raise UserError(f"{says} float32 parameters, {name} is {kind}")
            if moves and (parameter.is_sparse or parameter.layout != torch.strided):
                raise UserError(f"{says} dense parameters, {name} is sparse")
            if not parameter.isfinite().all():
                raise UserError(f"{says} finite weights, {name} is not")
        try:
            copy.deepcopy(net)
        except Exception as error:
            raise UserError(
                f"{says} a network that can be copied: {where_in(self.path, error)}"
            ) from error
        return net.cpu().eval()

    def load_like(self, base, path):
        path = Path(path)
        with reading(f"network {path} is refused"):
            tensors = own_snapshot(path)
        if tensors is None:
            return self.read(path)
        net = copy.deepcopy(base).cpu()
        state = self.tensors_of(net)
        for name in [*state, *tensors]:
            ours, theirs = (
                tuple(side[name].shape) if name in side else None for side in (state, tensors)
            )
            if ours != theirs:
                raise UserError(f"{path}: {name} has shape {theirs}, the base's is {ours}")
            if not tensors[name].isfinite().all():
                raise UserError(f"{path}: {name} has values that are not finite")
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[name])
        return net.eval()

    @staticmethod
    def tensors_of(net):
        """Parameters, tied ones once, and buffers that belong to the state."""
        tensors = dict(net.named_parameters())
        every = dict(net.named_parameters(remove_duplicate=False))
        for name, tensor in net.state_dict(keep_vars=True).items():
            if name not in every and isinstance(tensor, torch.Tensor):
                tensors[name] = tensor
        return tensors

    def create(self, images, labels, c):
        if not hasattr(self.file, "create"):
            raise UserError(
                f"--train-base needs a function create() in {self.path}, or give --base"
            )
        self.needs_loss("--train-base")
        classes = self.file.CLASSES
        if classes and (labels is None or int(labels.max()) >= classes):
            theirs = "has none" if labels is None else f"has labels up to {int(labels.max())}"
            raise UserError(f"{self.path}: CLASSES is {classes}, but the data {theirs}")

        # The weights are in the key of the training: a run that goes on must make them again.
        nets = []
        for _ in range(2):
            torch.manual_seed(c.seed)
            nets.append(self.checked_network(self.call("create"), "create"))
        if weights_hash(nets[0]) != weights_hash(nets[1]):
            raise UserError(
                f"{self.path}: create() gives other weights for the same torch.manual_seed(): "
                "random numbers must come from torch's global generator"
            )
        return nets[0]

    def trainable(self, base, c):
        self.needs_loss("self-training")
        return copy.deepcopy(base)

    def needs_loss(self, what):
        if not hasattr(self.file, "loss"):
            raise UserError(f"{what} needs a function loss() in {self.path}, or give --aux")

    def noise_shape(self, net):
        return tuple(self.file.SHAPE)

    def classes(self, net):
        return self.file.CLASSES

    def image_shape(self, net):
        return self.example.shape[1:]

    def sample(self, net, noise, labels, steps):
        return self.call("sample", net, noise, labels, steps)

    def encode(self, images):
        if self.encodes:
            return self.call("encode", images)
        return images.float() / 127.5 - 1

    def loss(self, net, x, labels):
        return self.call("loss", net, x, labels if self.file.CLASSES else None)

    def block(self, name, net, partition):
        if partition == "structural" or not hasattr(self.file, "block"):
            advice = "use --partition layers or a JSON file {glob: block}"
            if partition == "paper":
                advice = f"write one, or {advice}"
            else:
                advice = f"is for EDM's networks: {advice}"
            raise UserError(f"--partition {partition} needs block() in {self.path}: {advice}")
        return self.named("block", name)

    def layer(self, name):
        """layer(), or the module that holds the parameter, at most three names deep."""
        if hasattr(self.file, "layer"):
            return self.named("layer", name)
        module, _, _ = name.partition(".parametrizations.")  # weight_norm's original0, original1
        parts = module.split(".") if module != name else name.split(".")[:-1]
        return ".".join(parts[:3]) or name

    def named(self, function, name):
        found = self.call(function, name)
        if not isinstance(found, str) or not found or not found.isprintable():
            raise UserError(
                f"{self.path}: {function}({name!r}) must give a string on one line, "
                f"not {printable(repr(found))}"
            )
        return found

    def save(self, net, path, recipe):
        tensors = {}
        for name, tensor in self.tensors_of(net).items():
            # A copy: safetensors writes no tensors that share memory.
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        content = safetensors.torch.save(tensors, {"config": json.dumps({"recipe": recipe})})

        def write(part):
            part.write_bytes(content)

        write_atomically(path, write)

    def export(self, net, path, recipe):
        if not hasattr(self.file, "save"):
            self.save(net, path.with_suffix(".safetensors"), recipe)
            return
        plain = copy.deepcopy(net).cpu()
        if next(net.parameters()).is_cuda:
            vars(plain).pop("forward", None)  # the compiled one
        self.call("save", plain, path)

    def own_features(self, example):
        return FileFeatures(self, example) if hasattr(self.file, "features") else None

    def start_check(self, base, c, trained):
        """What the pipeline relies on, tried on four images before anything long begins."""
        with torch.random.fork_rng():
            self.example = StartCheck(self, base, c, trained).run()
        for name, value in vars(self.file).items():
            if isinstance(value, nn.Module):
                self.held = {**self.held, name: weights_hash(value)}


class StartCheck:
    """Tries the functions of a model file on four seeds; each broken promise is one line."""

    CLOSE = 4e-3  # of images in [-1, 1]: half a grey level, more than rounding in other batches
    SAME = 1e-4  # for the same computation once more

    def __init__(self, model, base, c, trained):
        self.model, self.base, self.c, self.trained = model, base, c, trained
        self.path = model.path
        self.net = copy.deepcopy(base).to(c.device).eval().requires_grad_(False)
        self.pointers = {name: p.data_ptr() for name, p in self.net.named_parameters()}
        shape, classes = model.noise_shape(base), model.classes(base)
        self.noise, self.labels = draw_noise(shape, classes, range(4), c.device)

    def run(self):
        """-> four images, uint8 [4, C, H, W]."""
        with torch.no_grad(), network_calls(self.net, "fp32"):
            images = self.sample(slice(0, 4))
            self.check_repetition(images)
            if self.trained:
                self.check_range(images)
            self.check_threads(images)
        self.example = to_pixels(images).to(torch.uint8)

        learning = set(movable_parameters(self.base))
        if not self.c.aux:
            learning = self.check_loss()
        self.check_weights(learning)
        self.check_precision()
        if hasattr(self.model.file, "features"):
            FileFeatures(self.model, self.example)
        if self.c.search == "gradient":
            self.check_gradient()
        if hasattr(self.model.file, "save") and self.trained:
            self.check_save()
        return self.example

    def wrong(self, text):
        return UserError(f"{self.path}: {text}")

    def sample(self, part, net=None, turned=False):
        """Checked images of some of the seeds; turned: their noise in the other order."""
        noise = self.noise[part].flip(0) if turned else self.noise[part].clone()
        labels = None if self.labels is None else self.labels[part].clone()
        images = self.model.sample(self.net if net is None else net, noise, labels, self.c.steps)
        if not isinstance(images, torch.Tensor) or not images.is_floating_point():
            kind = getattr(images, "dtype", type(images).__name__)
            raise self.wrong(f"sample() must give a floating-point tensor, not {kind}")
        shape = list(images.shape)
        if len(shape) != 4 or shape[0] != len(noise) or shape[1] not in (1, 3):
            raise self.wrong(f"sample() must give images [{len(noise)}, 1 or 3, H, W], not {shape}")
        if not images.isfinite().all():
            raise self.wrong("sample() gave images that are not finite: are the weights sound?")
        return images

    def differ(self, images, others, tolerance):
        scale = max(1.0, float(images.abs().max()))
        return float((images - others).abs().max()) > tolerance * scale

    def check_repetition(self, images):
        """Common random numbers: a seed alone decides its image."""
        if self.differ(images, self.sample(slice(0, 4)), self.SAME):
            raise self.wrong("sample() gave other images for the same noise: hidden randomness?")
        if self.differ(images[1:3], self.sample(slice(1, 3)), self.CLOSE):
            raise self.wrong("sample() gave other images for the same noise in another batch")
        if self.trained and torch.equal(images, self.sample(slice(0, 4), turned=True)):
            raise self.wrong("sample() gave the same images for other noise: is it used?")

        # It reads the network: weights that it casts or moves are no longer those of the pipeline.
        before = dict(self.base.named_parameters())
        for name, parameter in self.net.named_parameters():
            moved = parameter.data_ptr() != self.pointers[name]
            if moved or not torch.equal(parameter.cpu(), before[name].cpu()):
                raise self.wrong(f"sample() changes the network, first {name}")

    def check_range(self, images):
        outside = float((images.abs() > 1.1).float().mean())
        if outside > 0.5 or images.abs().max() > 10:
            raise self.wrong(
                "sample() must give images in [-1, 1], these reach from "
                f"{images.min():.3g} to {images.max():.3g}"
            )

    def check_threads(self, images):
        """On a CPU several batches go through one network at once."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if Processes(self.c.device, 0, world).workers() == 1:
            return

        def one(i):
            with torch.no_grad():  # per thread
                return self.sample(slice(i % 4, i % 4 + 1))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(one, range(8)))
        if self.differ(images.repeat(2, 1, 1, 1), torch.cat(parts), self.CLOSE):
            raise self.wrong(
                "sample() mixes batches that run at the same time: keep nothing in the network or "
                f"in globals, or use --threads {os.cpu_count()}"
            )

    def check_loss(self):
        """Shape, randomness and gradient of loss() -> names of the parameters that it trains."""
        model, c = self.model, self.c
        net = model.trainable(self.base, c).to(c.device).train()
        for parameter in movable_parameters(net).values():
            parameter.requires_grad_(True)
        with torch.no_grad():
            x = model.encode(self.example)
        if not isinstance(x, torch.Tensor) or len(x) != 4:
            raise self.wrong("encode() must give a tensor, one row for each image")

        losses = []
        for each in (copy.deepcopy(net), net):
            torch.manual_seed(0)
            with torch.enable_grad(), network_calls(each, c.train_precision):
                losses.append(model.loss(each, x, self.labels))
        first, loss = losses
        if not isinstance(loss, torch.Tensor) or loss.shape != (4,):
            shape = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise self.wrong(f"loss() must give one number a sample, [4], not {shape}")
        if not loss.isfinite().all():
            raise self.wrong("loss() gave numbers that are not finite")
        if ((first - loss).abs() > 1e-3 * (1 + loss.abs())).any():
            raise self.wrong(
                "loss() gave other numbers for the same torch.manual_seed(): random numbers must "
                "come from torch's global generator"
            )

        parameters = movable_parameters(net)
        grads = self.gradients(loss.sum(), parameters, "loss()")
        learning = set()
        for (name, _), grad in zip(parameters.items(), grads, strict=True):
            if grad is not None and not grad.isfinite().all():
                raise self.wrong(f"loss() has a gradient that is not finite, first in {name}")
            if grad is not None and grad.any():
                learning.add(name)
        if not learning:
            raise self.wrong("loss() does not depend on the network's weights")
        return learning

    def gradients(self, scalar, parameters, function, weights=None):
        """Derivatives, None for parameters that are not used."""
        if not scalar.requires_grad:
            raise self.wrong(
                f"no gradient comes through {function}: a torch.no_grad(), detach() or .data in it?"
            )
        try:
            return torch.autograd.grad(
                scalar, list(parameters.values()), weights, allow_unused=True
            )
        except RuntimeError as error:
            raise self.wrong(
                f"the gradient through {function} fails: {where_in(self.path, error)}"
            ) from error

    def moved(self, net, amount=0.05):
        """A small random step of the network's weights, the same every time -> {name: step}."""
        generator = torch.Generator().manual_seed(0)
        steps = {}
        for name, parameter in movable_parameters(net, like=self.base).items():
            size = float(parameter.detach().square().mean().sqrt()) + 1e-3
            step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            steps[name] = (amount * size * step).to(parameter.device)
        return steps

    @staticmethod
    def add(net, steps, factor=1.0):
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name in steps:
                    parameter.add_(steps[name], alpha=factor)

    @torch.no_grad()
    def check_weights(self, learning):
        """The images follow the weights, as they are now, of the network that is passed."""
        steps = {name: step for name, step in self.moved(self.net).items() if name in learning}
        fresh = copy.deepcopy(self.base).to(self.c.device).eval().requires_grad_(False)
        self.add(fresh, steps)
        expected = self.sample(slice(0, 2), fresh)
        before = self.sample(slice(0, 2))
        self.add(self.net, steps)
        found = self.sample(slice(0, 2))
        self.add(self.net, steps, -1.0)
        if self.differ(expected, found, self.SAME):
            raise self.wrong("sample() keeps something of earlier weights of the network")
        if torch.equal(found, before):
            what = "the network's weights" if self.c.aux else "the weights that loss() trains"
            raise self.wrong(f"sample() does not depend on {what}")

    @torch.no_grad()
    def check_precision(self):
        """Half precision wraps the network's own call, so there must be one."""
        calls = []
        forward = self.net.forward

        def counted(*args, **kwargs):
            calls.append(True)
            return forward(*args, **kwargs)

        for precision in {self.c.precision, self.c.confirm_precision} & {"bf16", "fp16"}:
            self.net.forward = counted
            with network_calls(self.net, precision):
                self.sample(slice(0, 2))
            self.net.forward = forward
            if not calls:
                raise self.wrong(
                    f"--precision {precision} wraps net(...), but sample() calls only parts of the "
                    "network: use fp32 or tf32"
                )

    def check_gradient(self):
        """The gradient of the search is the derivative of the images: along a random step of the
        weights, differences of the images and the pulled-back derivative agree."""
        file = self.model.file
        if getattr(file, "differentiable", True) is False:
            why_not = getattr(file, "why_not", "this model cannot be differentiated")
            raise UserError(f"--search gradient: {why_not}")
        net, two = self.net, slice(0, 2)
        amount = 1e-3
        steps = self.moved(net, amount)
        with torch.no_grad():
            self.add(net, steps)
            ahead = self.sample(two)
            self.add(net, steps, -2.0)
            behind = self.sample(two)
            self.add(net, steps)
        difference = (ahead - behind) / 2

        parameters = movable_parameters(net, like=self.base)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad(), network_calls(net, "fp32", checkpointed=True):
            images = self.sample(two)
            grads = self.gradients(images, parameters, "sample()", difference)
        net.requires_grad_(False)
        along = 0.0
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                along += float((grad.double() * steps[name]).sum())
        size = float(difference.double().square().sum())
        if not 0.7 * size < along < 1.4 * size:
            raise self.wrong(
                "the gradient through sample() is not its derivative "
                f"({along / max(size, 1e-300):.2f} of it): a detach(), rounding or .data in it?"
            )

        if hasattr(file, "features"):
            features = FileFeatures(self.model, self.example)
            check_differentiable(features, to_pixels(images), f"features() of {self.path}")

    def check_save(self):
        """save() fails now, or not after hours."""
        if sum(p.numel() for p in self.base.parameters()) > 1e8:
            return
        with tempfile.TemporaryDirectory(prefix=".part-", dir=self.c.out) as folder:
            self.model.export(self.base, Path(folder) / "network", {})
            if not any(Path(folder).iterdir()):
                raise self.wrong("save(net, path) wrote nothing at path, or beside it")


def torch_settings():
    """Settings of torch that a model file must leave as they are."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradient mode": torch.is_grad_enabled(),
        "number of threads": torch.get_num_threads(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
    }


def refuse_changed_settings(before, who):
    for name, value in torch_settings().items():
        if value != before[name]:
            raise UserError(f"{who} changes torch's {name} from {before[name]} to {value}")


def own_snapshot(path):
    """{name: tensor} of a .safetensors that save() of this program has written; else None."""
    if path.is_dir() or not is_safetensors(path):
        return None
    with safetensors.safe_open(path, "pt") as file:
        if "recipe" not in json.loads((file.metadata() or {}).get("config", "{}")):
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def where_in(path, error):
    """Kind and text of an error, and the line of this file where it arose."""
    path = str(Path(path).resolve())
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == path:
            lines.append(frame.lineno)
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    place = f"line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {printable(error)}"
