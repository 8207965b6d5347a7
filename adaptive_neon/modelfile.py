"""A model of one's own: --model FILE.py, and what it must promise."""

import concurrent.futures
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from .blocks import copied, layer_of, movable_parameters
from .features import FileFeatures
from .files import (
    UserError,
    fetch,
    is_safetensors,
    printable,
    reading,
    write_atomically,
)
from .keys import content_hash, key_of, weights_hash
from .processes import Processes
from .sampling import Model, draw_noise, network_calls, to_pixels
from .userfile import JudgeFile, UserFile, where_in

__all__ = ["FileModel", "JudgeFile", "UserModel"]


class UserModel(Model):
    """What models of users have in common: sound networks, snapshots in .safetensors, and a start
    check."""

    path: Path  # that messages name
    has_save = True
    why_not = ""  # there is no gradient for --search gradient
    example: torch.Tensor  # four images, uint8 [4, C, H, W], once the start check has made them

    def read(self, path: Path) -> nn.Module:
        """A network in the form that the model's users know."""
        raise NotImplementedError

    def load(self, path: Path) -> nn.Module:
        return self.read(path)

    def image_shape(self, net: nn.Module) -> tuple[int, ...]:
        return tuple(self.example.shape[1:])

    def checked_network(self, net: Any, function: str) -> nn.Module:
        """A network that can be copied, moved and extrapolated, in eval mode on the CPU."""
        net = getattr(net, "_orig_mod", net)  # of torch.compile, which renames all parameters
        fault = network_fault(net)
        if fault:
            expected, got = fault
            raise UserError(f"{self.path}: {function}() must give {expected}, got {got}")
        try:
            copied(net)
        except Exception as error:
            raise UserError(
                f"{self.path}: {function}() must give a network that can be copied, "
                f"got {where_in(self.path, error)}"
            ) from error

        # The same gradients, but as tensors that every optimiser and sum takes.
        for module in net.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                module.sparse = False
        return net.cpu().eval()

    def load_like(self, base: nn.Module, path: Path) -> nn.Module:
        """A relative of the base: a snapshot of this program, or whatever read() takes."""
        path = Path(path)
        with reading(f"network {path} is refused"):
            tensors = own_snapshot(path)
        if tensors is None:
            return self.read(path)

        net = copied(base).cpu()
        state = state_of(net)
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

    def save(self, net: nn.Module, path: Path, recipe: dict):
        """A snapshot that load_like() reads back."""
        tensors = {}
        for name, tensor in state_of(net).items():
            # A copy: safetensors writes no tensors that share memory.
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        content = safetensors.torch.save(tensors, {"config": json.dumps({"recipe": recipe})})

        def write(part):
            part.write_bytes(content)

        write_atomically(path, write)

    def layer(self, name: str) -> str:
        return layer_of(name)

    def no_blocks(self, partition: str, advice: str = "") -> UserError:
        if partition == "structural":
            advice = "is for EDM's networks: "
        return UserError(
            f"--partition {partition} needs block() in {self.path}: {advice}"
            "use --partition layers or a JSON file {glob: block}"
        )

    def start_check(self, base: nn.Module, c, trained: bool):
        """What the pipeline relies on, tried on four images before anything long begins."""
        with torch.random.fork_rng():
            self.example = StartCheck(self, base, c, trained).run()


class FileModel(UserFile, UserModel):
    """The functions of a Python file behind the seam; examples/flow_glyphs.py is such a file."""

    NEEDED = ("SHAPE", "CLASSES", "load", "sample")
    FUNCTIONS = ("load", "sample", "loss", "create", "encode", "block", "layer", "save", "features")

    def __init__(self, path: str | Path):
        if not Path(path).is_file():
            raise UserError(f"--model {path} does not exist, or is no file")
        super().__init__(path, "--model")
        self.check_names()
        self.base_content = ""
        self.encodes = self.has("encode")
        self.has_features, self.has_save = self.has("features"), self.has("save")
        if getattr(self.file, "differentiable", True) is False:
            self.why_not = getattr(self.file, "why_not", "this model cannot be differentiated")

    def has(self, name: str) -> bool:
        return hasattr(self.file, name)

    def check_names(self):
        wrong = f"--model {self.path}"
        missing = [name for name in self.NEEDED if not self.has(name)]
        if missing:
            raise UserError(f"{wrong} lacks {', '.join(missing)}")
        for name in self.FUNCTIONS:
            if self.has(name) and not callable(getattr(self.file, name)):
                raise UserError(f"{wrong}: {name} must be a function")

        shape, classes = self.file.SHAPE, self.file.CLASSES
        sizes = shape if isinstance(shape, (tuple, list)) else []
        if not sizes or not all(type(n) is int and n > 0 for n in sizes):
            got = printable(repr(shape))
            raise UserError(f"{wrong}: SHAPE must be a tuple of positive integers, got {got}")
        if type(classes) is not int or classes < 0:
            got = printable(repr(classes))
            raise UserError(f"{wrong}: CLASSES must be an integer from 0, got {got}")

    @property
    def identity(self) -> str:  # type: ignore[override]
        """Also of the whole base file or folder: a decoder may lie beside the network."""
        return key_of(self.scope.records, self.base_content)

    training_identity = identity  # type: ignore[assignment]

    def fetch(self, source: str, what: str) -> Path:
        return fetch(source, what)

    def load(self, path: Path) -> nn.Module:
        self.base_content = content_hash(Path(path))
        return self.read(path)

    def read(self, path: Path) -> nn.Module:
        """load(), twice for a network of ordinary size: ranks and later runs load it again."""
        self.scope.apart.add(Path(path).resolve())
        net = self.checked_network(self.call("load", path), "load")
        if sum(p.numel() for p in net.parameters()) < 2e8:
            again = self.checked_network(self.call("load", path), "load")
            if weights_hash(again) != weights_hash(net):
                raise UserError(
                    f"{self.path}: load() gives other weights every time: does {path} lack some?"
                )
        return net

    def create(self, images: torch.Tensor, labels: torch.Tensor | None, c) -> nn.Module:
        if not self.has("create"):
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

    def trainable(self, base: nn.Module, c=None) -> nn.Module:
        self.needs_loss("self-training")
        return copied(base)

    def needs_loss(self, what: str):
        if not self.has("loss"):
            raise UserError(f"{what} needs a function loss() in {self.path}, or give --aux")

    def noise_shape(self, net: nn.Module) -> tuple[int, ...]:
        return tuple(self.file.SHAPE)

    def classes(self, net: nn.Module) -> int:
        return self.file.CLASSES

    def sample(self, net: nn.Module, noise: torch.Tensor, labels: torch.Tensor | None, steps: int):
        return self.call("sample", net, noise, labels, steps)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        if self.encodes:
            return self.call("encode", images)
        return images.float() / 127.5 - 1

    def loss(self, net: nn.Module, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return self.call("loss", net, x, labels if self.file.CLASSES else None)

    def block(self, name: str, net: nn.Module, partition: str) -> str:
        if partition == "structural" or not self.has("block"):
            raise self.no_blocks(partition, "write one, or ")
        return self.named("block", name)

    def layer(self, name: str) -> str:
        return self.named("layer", name) if self.has("layer") else layer_of(name)

    def named(self, function: str, name: str) -> str:
        found = self.call(function, name)
        if not isinstance(found, str) or not found or not found.isprintable():
            raise UserError(
                f"{self.path}: {function}({name!r}) must give a string on one line, "
                f"got {printable(repr(found))}"
            )
        return found

    def export(self, net: nn.Module, path: Path, recipe: dict):
        """The repaired network, by the file's save() if it has one; path has no suffix yet."""
        if not self.has_save:
            self.save(net, path.with_suffix(".safetensors"), recipe)
            return
        plain = copied(net).cpu()
        if next(net.parameters()).is_cuda:
            vars(plain).pop("forward", None)  # the compiled one
        self.call("save", plain, path)

    def own_features(self, example: torch.Tensor) -> FileFeatures | None:
        return FileFeatures(self, example) if self.has_features else None

    def start_check(self, base: nn.Module, c, trained: bool):
        self.scope.sealed = False
        super().start_check(base, c, trained)
        self.scope.seal()


def network_fault(net: Any) -> tuple[str, str] | None:
    """(what is expected of a network, what this one is instead), or None."""
    kind = type(net).__name__
    if not isinstance(net, nn.Module):
        return "a torch.nn.Module", kind
    if isinstance(net, torch.jit.ScriptModule):
        return "a torch.nn.Module in Python", "a TorchScript module"

    parameters = dict(net.named_parameters())
    if not parameters:
        return "a network with parameters", f"a {kind} without"
    moving = movable_parameters(net)
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            return "a complete network", f"{name} that is lazy: call it once before"
        if parameter.is_meta:
            return "weights", f"{name} on the meta device"
        if name in moving and parameter.dtype not in (torch.float32, torch.float64):
            return "float32 parameters", f"{name} of {str(parameter.dtype).removeprefix('torch.')}"
        if name in moving and parameter.layout != torch.strided:
            return "dense parameters", f"{name} that is sparse"
        if not parameter.isfinite().all():
            return "finite weights", f"{name} that is not"
    return None


# What the start check tries: function, and what it must give (or be, or leave).
PROMISES = {
    "kind": "sample() must give a floating-point tensor",
    "shape": "sample() must give images [{count}, 1 or 3, H, W]",
    "finite": "sample() must give finite images",
    "again": "sample() must give the same images for the same noise, without hidden randomness",
    "batch": "sample() must give the same images for the same noise in another batch",
    "noise": "sample() must give other images for other noise",
    "frozen": "sample() must leave the network as it is",
    "range": "sample() must give images in [-1, 1]",
    "threads": "sample() must keep nothing in the network or in globals, since batches run at the "
    "same time (or use --threads {cores})",
    "memory": "sample() must keep nothing of earlier weights of the network",
    "weights": "sample() must depend on {trained}",
    "whole": "sample() must call net(...) for --precision {precision}, which wraps it (or use fp32 "
    "or tf32)",
    "encode": "encode() must give a tensor with one row for each image",
    "loss": "loss() must give one number a sample, [4]",
    "loss finite": "loss() must give finite numbers",
    "loss again": "loss() must give the same numbers for the same torch.manual_seed(), random ones "
    "from torch's global generator",
    "learning": "loss() must depend on the network's weights",
    "through": "{function} must let a gradient through, without torch.no_grad(), detach() or .data",
    "backward": "the gradient through {function} must exist",
    "dense": "the gradient through {function} must be dense: sparse=False",
    "gradient finite": "the gradient of loss() must be finite",
    "derivative": "the gradient through sample() must be its derivative, without detach(), "
    "rounding or .data",
    "save": "save(net, path) must write something at path, or beside it",
}


class StartCheck:
    """Tries the functions of a model on four seeds; each broken promise is one line."""

    CLOSE = 4e-3  # of images in [-1, 1]: half a grey level, more than rounding in other batches
    SAME = 1e-4  # for the same computation once more

    def __init__(self, model: UserModel, base: nn.Module, c, trained: bool):
        self.model, self.base, self.c, self.trained = model, base, c, trained
        self.net = self.fresh()
        self.pointers = {name: p.data_ptr() for name, p in self.net.named_parameters()}
        shape, classes = model.noise_shape(base), model.classes(base)
        self.noise, self.labels = draw_noise(shape, classes, range(4), c.device)

    def run(self) -> torch.Tensor:
        """-> four images, uint8 [4, C, H, W]."""
        with torch.no_grad(), network_calls(self.net, "fp32"):
            images = self.sample(slice(0, 4))
            self.check_repetition(images)
            if self.trained:
                self.check_range(images)
            self.check_threads(images)
        example = to_pixels(images).to(torch.uint8)

        learning = set(movable_parameters(self.base))
        if not self.c.aux:
            learning = self.check_loss(example)
        self.check_weights(learning)
        self.check_precision()
        self.model.own_features(example)
        if self.c.search == "gradient":
            self.check_gradient()
        if self.model.has_save and self.trained:
            self.check_save()
        return example

    def expect(self, holds: Any, promise: str, got: object, **words):
        """One line for a promise that does not hold."""
        if not holds:
            expected = PROMISES[promise].format(**words)
            raise UserError(f"{self.model.path}: {expected}, got {printable(got, 300)}")

    def fresh(self) -> nn.Module:
        return copied(self.base).to(self.c.device).eval().requires_grad_(False)

    def sample(self, part: slice, net: nn.Module | None = None, turned=False) -> torch.Tensor:
        """Checked images of some of the seeds; turned: their noise in the other order."""
        noise = self.noise[part].flip(0) if turned else self.noise[part].clone()
        labels = None if self.labels is None else self.labels[part].clone()
        images = self.model.sample(self.net if net is None else net, noise, labels, self.c.steps)

        is_tensor = isinstance(images, torch.Tensor)
        kind = images.dtype if is_tensor else type(images).__name__
        self.expect(is_tensor and images.is_floating_point(), "kind", kind)
        n, shape = len(noise), list(images.shape)
        fits = len(shape) == 4 and shape[0] == n and shape[1] in (1, 3)
        self.expect(fits, "shape", shape, count=n)
        self.expect(images.isfinite().all(), "finite", "others: are the weights sound?")
        return images

    def difference(self, images: torch.Tensor, others: torch.Tensor) -> float:
        """The largest, for images in [-1, 1]."""
        scale = max(1.0, float(images.abs().max()))
        return float((images - others).abs().max()) / scale

    def check_repetition(self, images: torch.Tensor):
        """Common random numbers: a seed alone decides its image."""
        apart = self.difference(images, self.sample(slice(0, 4)))
        self.expect(apart <= self.SAME, "again", f"images that differ by {apart:.2g}")
        apart = self.difference(images[1:3], self.sample(slice(1, 3)))
        self.expect(apart <= self.CLOSE, "batch", f"images that differ by {apart:.2g}")
        if self.trained:
            turned = self.sample(slice(0, 4), turned=True)
            self.expect(not torch.equal(images, turned), "noise", "the same: is it used?")

        # It reads the network: weights that it casts or moves are no longer those of the pipeline.
        before = dict(self.base.named_parameters())
        for name, parameter in self.net.named_parameters():
            stays = parameter.data_ptr() == self.pointers[name]
            stays = stays and torch.equal(parameter.cpu(), before[name].cpu())
            self.expect(stays, "frozen", f"another one, first in {name}")

    def check_range(self, images: torch.Tensor):
        """A base that was trained here only now may have outliers, which are clipped: what took
        hours is refused for nothing less than images that are mostly none."""
        got = f"images from {images.min():.3g} to {images.max():.3g}"
        limit = 10.0
        if self.c.train_base and not self.c.base:
            got += f": undertrained (--train-base {self.c.train_base:g}), or too few --steps?"
            limit = math.inf
        outside = float((images.abs() > 1.1).float().mean())
        self.expect(outside <= 0.5 and images.abs().max() <= limit, "range", got)

    def check_threads(self, images: torch.Tensor):
        """On a CPU several batches go through one network at once."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if Processes(self.c.device, 0, world).workers() == 1:
            return

        def one(i):
            with torch.no_grad():  # per thread
                return self.sample(slice(i % 4, i % 4 + 1))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(one, range(8)))
        apart = self.difference(images.repeat(2, 1, 1, 1), torch.cat(parts))
        got = f"mixed batches, whose images differ by {apart:.2g}"
        self.expect(apart <= self.CLOSE, "threads", got, cores=os.cpu_count())

    def check_loss(self, example: torch.Tensor) -> set[str]:
        """Shape, randomness and gradient of loss() -> names of the parameters that it trains."""
        model, c = self.model, self.c
        net = model.trainable(self.base, c).to(c.device).train()
        for parameter in movable_parameters(net).values():
            parameter.requires_grad_(True)
        with torch.no_grad():
            x = model.encode(example)
        rows = x.shape[:1] if isinstance(x, torch.Tensor) else ()
        self.expect(rows == (4,), "encode", list(rows) or type(x).__name__)

        losses = []
        for each in (copied(net), net):
            torch.manual_seed(0)
            with torch.enable_grad(), network_calls(each, c.train_precision):
                losses.append(model.loss(each, x, self.labels))
        first, loss = losses
        shape = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        self.expect(shape == [4], "loss", shape)
        self.expect(loss.isfinite().all(), "loss finite", "others")
        apart = (first - loss).detach().abs()
        same = (apart <= 1e-3 * (1 + loss.detach().abs())).all()
        self.expect(same, "loss again", f"numbers that differ by {float(apart.max()):.2g}")

        grads = self.gradients(loss.sum(), movable_parameters(net), "loss()")
        for name, grad in grads.items():
            self.expect(grad.isfinite().all(), "gradient finite", f"others, first in {name}")
        learning = {name for name, grad in grads.items() if grad.any()}
        self.expect(learning, "learning", "no derivative by any")
        return learning

    def gradients(self, values, parameters, function, weights=None) -> dict[str, torch.Tensor]:
        """{name: derivative} of the parameters that are used."""
        self.expect(values.requires_grad, "through", "none", function=function)
        try:
            grads = torch.autograd.grad(
                values, list(parameters.values()), weights, allow_unused=True
            )
        except RuntimeError as error:
            got = where_in(self.model.path, error)
            self.expect(False, "backward", got, function=function)
        found = {}
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                dense = grad.layout == torch.strided
                self.expect(dense, "dense", f"a sparse one of {name}", function=function)
                found[name] = grad
        return found

    def moved(self, amount=0.05) -> dict[str, torch.Tensor]:
        """A small random step of the network's weights, the same every time: {name: step}."""
        generator = torch.Generator().manual_seed(0)
        steps = {}
        for name, parameter in movable_parameters(self.net, like=self.base).items():
            size = float(parameter.detach().square().mean().sqrt()) + 1e-3
            step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            steps[name] = (amount * size * step).to(parameter.device)
        return steps

    @staticmethod
    def add(net: nn.Module, steps: dict[str, torch.Tensor], factor=1.0):
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name in steps:
                    parameter.add_(steps[name], alpha=factor)

    @torch.no_grad()
    def check_weights(self, learning: set[str]):
        """The images follow the weights, as they are now, of the network that is passed."""
        steps = {name: step for name, step in self.moved().items() if name in learning}
        fresh = self.fresh()
        self.add(fresh, steps)
        expected = self.sample(slice(0, 2), fresh)
        before = self.sample(slice(0, 2))
        self.add(self.net, steps)
        found = self.sample(slice(0, 2))
        self.add(self.net, steps, -1.0)

        apart = self.difference(expected, found)
        self.expect(apart <= self.SAME, "memory", f"images that differ by {apart:.2g}")
        what = "the network's weights" if self.c.aux else "the weights that loss() trains"
        self.expect(not torch.equal(found, before), "weights", "the same images", trained=what)

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
            self.expect(calls, "whole", "calls of its parts alone", precision=precision)

    def check_gradient(self):
        """The gradient of the search is the derivative of the images: along a random step of the
        weights, differences of the images and the pulled-back derivative agree."""
        if self.model.why_not:
            raise UserError(f"--search gradient: {self.model.why_not}")
        net, two = self.net, slice(0, 2)
        steps = self.moved(1e-3)
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
        along = sum(float((grad.double() * steps[name]).sum()) for name, grad in grads.items())
        size = float(difference.double().square().sum())
        share = along / max(size, 1e-300)
        self.expect(0.7 * size < along < 1.4 * size, "derivative", f"{share:.2f} of it")

    def check_save(self):
        """save() fails now, or not after hours."""
        if sum(p.numel() for p in self.base.parameters()) > 1e8:
            return
        with tempfile.TemporaryDirectory(prefix=".part-", dir=self.c.out) as folder:
            self.model.export(self.base, Path(folder) / "network", {})
            self.expect(any(Path(folder).iterdir()), "save", "nothing")


def state_of(net: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, tied ones once, and buffers that belong to the state."""
    tensors: dict[str, torch.Tensor] = dict(net.named_parameters())
    every = dict(net.named_parameters(remove_duplicate=False))
    for name, tensor in net.state_dict(keep_vars=True).items():
        if name not in every and isinstance(tensor, torch.Tensor):
            tensors[name] = tensor
    return tensors


def own_snapshot(path: Path) -> dict[str, torch.Tensor] | None:
    """{name: tensor} of a .safetensors that save() of this program has written; else None."""
    if path.is_dir() or not is_safetensors(path):
        return None
    with safetensors.safe_open(path, "pt") as file:
        if "recipe" not in json.loads((file.metadata() or {}).get("config", "{}")):
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
