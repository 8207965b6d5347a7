"""A model of one's own: --model FILE.py, and what it must promise."""

import abc
import concurrent.futures
import json
import math
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from .blocks import check_same_tensors, copied, movable_parameters, tensors_of
from .features import FileFeatures, checked_alignment
from .files import UserError, fetch, is_safetensors, load_state, printable, reading, save_state
from .keys import content_hash, key_of, weights_hash
from .processes import Processes
from .sampling import Model, draw_noise, network_calls, to_pixels
from .userfile import UserFile, where_in


class UserModel(Model, abc.ABC):
    """What models of users have in common: sound networks, snapshots in .safetensors, and a start
    check."""

    path: Path  # that messages name
    has_save = True
    why_not = ""  # there is no gradient for --search gradient
    example: torch.Tensor  # four images, uint8 [4, C, H, W], once the start check has made them

    @abc.abstractmethod
    def read(self, path: Path) -> nn.Module:
        """A network in the form that the model's users know."""

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
        check_same_tensors(state, tensors, f"base and {path}")
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[name])
        return net.eval()

    def save(self, net: nn.Module, path: Path, recipe: dict) -> None:
        """A snapshot that load_like() reads back."""
        save_state(path, state_of(net), {"recipe": recipe})

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

    def __init__(self, path: str | Path):
        if not Path(path).is_file():
            raise UserError(f"--model {path} does not exist, or is no file")
        UserFile.__init__(self, path, "--model")
        self.check_names()
        self.shape, self.number_of_classes = tuple(self.file.SHAPE), self.file.CLASSES
        self.functions = {}
        for name in ("sample", "loss", "encode", "block", "layer"):
            self.functions[name] = partial(self.call, name) if self.has(name) else None

        self.base_content = ""
        self.controls = checked_controls(self.path, getattr(self.file, "CONTROLS", {}))
        self.encodes = self.has("encode")
        self.alignment = checked_alignment(self)
        self.has_save = self.has("save")

    def has(self, name: str) -> bool:
        return hasattr(self.file, name)

    def check_names(self):
        wrong = f"--model {self.path}"
        missing = [name for name in self.NEEDED if not self.has(name)]
        if missing:
            raise UserError(f"{wrong} lacks {', '.join(missing)}")

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
        self.scope.apart.add(Path(path).resolve())  # weights have keys of their own
        net = self.checked_network(self.call("load", path), "load")
        if sum(p.numel() for p in net.parameters()) < 2e8:
            again = self.checked_network(self.call("load", path), "load")
            if weights_hash(again) != weights_hash(net):
                raise UserError(
                    f"{self.path}: load() gives other weights every time: does {path} lack some?"
                )
        return net

    def create(self, images: torch.Tensor, labels: torch.Tensor | None, c) -> nn.Module:
        """The weights are in the key of the training: a run that goes on must make them again."""
        if not self.has("create"):
            raise UserError(
                f"--train-base needs a function create() in {self.path}, or give --base"
            )
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

    def loss(self, net: nn.Module, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        if not self.has("loss"):
            raise UserError(f"training needs a function loss() in {self.path}, or give --aux")
        return super().loss(net, x, labels if self.number_of_classes else None)

    def block(self, name: str, net: nn.Module, partition: str) -> str:
        if partition == "structural" or not self.has("block"):
            raise self.no_blocks(partition, "write one, or ")
        return self.checked_name("block", name, super().block(name, net, partition))

    def layer(self, name: str) -> str:
        return self.checked_name("layer", name, super().layer(name))

    def checked_name(self, function: str, name: str, found: Any) -> str:
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
        return FileFeatures(self, example) if self.has("features") else None

    def start_check(self, base: nn.Module, c, trained: bool):
        self.scope.sealed = False
        super().start_check(base, c, trained)
        self.scope.seal()


def checked_controls(path: Path, found: Any) -> dict[str, list[dict]]:
    """CONTROLS of a model file."""

    def fits(tried):
        return isinstance(tried, list) and tried and all(is_settings(one) for one in tried)

    def is_settings(one):
        return isinstance(one, dict) and one and all(type(v) in (int, float) for v in one.values())

    if not isinstance(found, dict) or not all(fits(tried) for tried in found.values()):
        raise UserError(
            f"--model {path}: CONTROLS must be {{name: [{{argument of sample(): number}}, ...]}}, "
            f"got {printable(repr(found))}"
        )
    return found


def network_fault(net: Any) -> tuple[str, str] | None:
    """(what is expected of a network, what this one is instead), or None."""
    if not isinstance(net, nn.Module) or isinstance(net, torch.jit.ScriptModule):
        return "a torch.nn.Module in Python", type(net).__name__

    parameters = dict(net.named_parameters())
    if not parameters:
        return "a network with parameters", f"a {type(net).__name__} without"
    moving = movable_parameters(net)
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
            return "weights", f"{name} that has none (lazy, or on the meta device)"
        if name in moving and parameter.dtype not in (torch.float32, torch.float64):
            return "float32 parameters", f"{name} of {str(parameter.dtype).removeprefix('torch.')}"
        if not parameter.isfinite().all():
            return "finite weights", f"{name} that is not"
    return None


# What the start check tries: function, and what it must give (or be, or leave).
PROMISES = {
    "images": "sample() must give floating-point images [{count}, 1 or 3, H, W]",
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
    "whole": "sample() must call net(...) for half precision, which wraps it (or use fp32 or tf32)",
    "encode": "encode() must give a tensor with one row for each image",
    "loss": "loss() must give one number a sample, [4]",
    "loss again": "loss() must give the same numbers for the same torch.manual_seed(), random ones "
    "from torch's global generator",
    "learning": "loss() must depend on the network's weights",
    "gradient": "{function} must let a gradient through, without no_grad(), detach() or .data (or "
    "use --search cobyqa)",
    "gradient finite": "loss() must give finite numbers and gradients",
    "derivative": "the gradient through sample() must be its derivative, without detach(), "
    "rounding or .data",
    "save": "save(net, path) must write something at path, or beside it",
}


FOUR, TWO = slice(0, 4), slice(0, 2)  # of the seeds


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
            images = self.sample(self.net)
            self.check_repetition(images)
            if self.trained:
                self.check_noise(images)
                self.check_range(images)
            self.check_threads(images)
        example = to_pixels(images).to(torch.uint8)

        learning = set(movable_parameters(self.base))
        if not self.c.aux:
            # A LoRA learns in factors beside the weights that it moves.
            learning = (self.check_loss(example) & learning) or learning
        self.check_weights(learning)
        self.check_controls()
        self.check_precision()
        self.model.own_features(example)
        if self.c.search == "gradient":
            self.check_gradient()
        if self.model.has_save:
            self.check_save()
        return example

    def expect(self, holds: Any, promise: str, got: object, **words):
        """One line for a promise that does not hold."""
        if not holds:
            expected = PROMISES[promise].format(**words)
            raise UserError(f"{self.model.path}: {expected}, got {printable(got, 300)}")

    def expect_close(self, images, others, most: float, promise: str, got="images", **words):
        """The largest difference, of images in [-1, 1], is at most this."""
        scale = max(1.0, float(images.abs().max()))
        apart = float((images - others).abs().max()) / scale
        self.expect(apart <= most, promise, f"{got} that differ by {apart:.2g}", **words)

    def fresh(self) -> nn.Module:
        return copied(self.base).to(self.c.device).eval().requires_grad_(False)

    def sample(self, net: nn.Module, part: slice = FOUR, turned=False) -> torch.Tensor:
        """Checked images of some of the seeds; turned: their noise in the other order."""
        noise = self.noise[part].flip(0) if turned else self.noise[part].clone()
        labels = None if self.labels is None else self.labels[part].clone()
        images = self.model.sample(net, noise, labels, self.c.steps)

        # One image for each row of noise, that a judge can look at.
        got, fits = type(images).__name__, False
        if isinstance(images, torch.Tensor):
            got, shape = f"{images.dtype} {list(images.shape)}", images.shape
            fits = len(shape) == 4 and shape[0] == len(noise) and shape[1] in (1, 3)
            fits = fits and images.is_floating_point()
        self.expect(fits, "images", got, count=len(noise))
        self.expect(images.isfinite().all(), "finite", "others: are the weights sound?")
        return images

    def check_repetition(self, images: torch.Tensor):
        """Common random numbers: a seed alone decides its image."""
        self.expect_close(images, self.sample(self.net), self.SAME, "again")
        self.expect_close(images[1:3], self.sample(self.net, slice(1, 3)), self.CLOSE, "batch")

        # It reads the network: weights that it casts or moves are no longer those of the pipeline.
        before = dict(self.base.named_parameters())
        for name, parameter in self.net.named_parameters():
            stays = parameter.data_ptr() == self.pointers[name]
            stays = stays and torch.equal(parameter.cpu(), before[name].cpu())
            self.expect(stays, "frozen", f"another one, first in {name}")

    def check_noise(self, images: torch.Tensor):
        turned = self.sample(self.net, turned=True)
        self.expect(not torch.equal(images, turned), "noise", "the same: is it used?")

    def check_range(self, images: torch.Tensor):
        """A base that was trained here only now may have outliers, which are clipped: what took
        hours is refused for nothing less than images that are mostly none."""
        got = f"images from {images.min():.3g} to {images.max():.3g}"
        limit = 10.0
        if self.c.train_base and not self.c.base:
            got += f": undertrained (--train-base {self.c.train_base:g}), or too few --steps?"
            limit = math.inf
        if images.min() >= 0:
            self.model.notes = [
                *self.model.notes,
                "four images of the base have no value below 0, the middle grey: sample() must "
                "give [-1, 1], in which black is -1",
            ]
        outside = float((images.abs() > 1.1).float().mean())
        self.expect(outside <= 0.5 and images.abs().max() <= limit, "range", got)

    def check_threads(self, images: torch.Tensor):
        """On a CPU several batches go through one network at once."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if Processes(self.c.device, 0, world).workers() == 1:
            return

        def one(i):
            with torch.no_grad():  # per thread
                return self.sample(self.net, slice(i % 4, i % 4 + 1))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            parts = torch.cat(list(pool.map(one, range(8))))
        got, cores = "mixed batches, images", os.cpu_count()
        self.expect_close(images.repeat(2, 1, 1, 1), parts, self.CLOSE, "threads", got, cores=cores)

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

        # Twice, from the same seed.
        losses = []
        for each in (copied(net), net):
            torch.manual_seed(0)
            with torch.enable_grad(), network_calls(each, c.train_precision):
                losses.append(model.loss(each, x, self.labels))
        first, loss = losses
        shape = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        self.expect(shape == [4], "loss", shape)

        grads = self.gradients(loss.sum(), movable_parameters(net), "loss()")
        for name, grad in grads.items():
            self.expect(grad.isfinite().all(), "gradient finite", f"others, first in {name}")
        apart = (first - loss).detach().abs()
        same = (apart <= 1e-3 * (1 + loss.detach().abs())).all()
        self.expect(same, "loss again", f"numbers that differ by {float(apart.max()):.2g}")
        learning = {name for name, grad in grads.items() if grad.any()}
        self.expect(learning, "learning", "no derivative by any")
        return learning

    def gradients(self, values, parameters, function, weights=None) -> dict[str, torch.Tensor]:
        """{name: derivative} of the parameters that are used."""
        grads: tuple = ()
        try:
            grads = torch.autograd.grad(
                values, list(parameters.values()), weights, allow_unused=True
            )
        except RuntimeError as error:
            got = where_in(self.model.path, error)
            self.expect(False, "gradient", got, function=function)
        found = dict(zip(parameters, grads, strict=True))
        return {name: grad for name, grad in found.items() if grad is not None}

    def moved(self, amount: float, names) -> dict[str, torch.Tensor]:
        """A small random step of these weights, the same every time: {name: step}."""
        generator = torch.Generator().manual_seed(0)
        steps = {}
        for name, parameter in movable_parameters(self.net, like=self.base).items():
            size = float(parameter.detach().square().mean().sqrt()) + 1e-3
            step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if name in names:
                steps[name] = (amount * size * step).to(parameter.device)
        return steps

    @staticmethod
    @torch.no_grad()
    def add(net: nn.Module, steps: dict[str, torch.Tensor], factor=1.0):
        parameters = dict(net.named_parameters())
        for name, step in steps.items():
            parameters[name].add_(step, alpha=factor)

    @torch.no_grad()
    def check_weights(self, learning: set[str]):
        """The images follow the weights, as they are now, of the network that is passed."""
        # The same step in a fresh copy, and in the network that has sampled before.
        steps, fresh = self.moved(0.05, learning), self.fresh()
        self.add(fresh, steps)
        expected = self.sample(fresh, TWO)
        before = self.sample(self.net, TWO)
        self.add(self.net, steps)
        found = self.sample(self.net, TWO)

        self.expect_close(expected, found, self.SAME, "memory")
        what = "the network's weights" if self.c.aux else "the weights that loss() trains"
        self.expect(not torch.equal(found, before), "weights", "the same images", trained=what)

    @torch.no_grad()
    def check_controls(self):
        """sample() takes the settings of every control."""
        for tried in self.model.controls.values():
            for self.model.settings in tried:
                self.sample(self.net, TWO)
        self.model.settings = {}

    @torch.no_grad()
    def check_precision(self):
        """Half precision wraps the network's own call, so there must be one."""
        if {self.c.precision, self.c.confirm_precision}.isdisjoint({"bf16", "fp16"}):
            return
        calls = []
        hook = self.net.register_forward_pre_hook(lambda *_: calls.append(True))
        self.sample(self.net, TWO)
        hook.remove()
        self.expect(calls, "whole", "calls of its parts alone")

    def check_gradient(self):
        """The gradient of the search is the derivative of the images: along a random step of the
        weights, differences of the images and the pulled-back derivative agree."""
        if self.model.why_not:
            raise UserError(f"--search gradient: {self.model.why_not}")
        net = self.net
        parameters = movable_parameters(net, like=self.base)
        steps = self.moved(1e-3, parameters)
        with torch.no_grad():
            self.add(net, steps)
            ahead = self.sample(net, TWO)
            self.add(net, steps, -2.0)
            behind = self.sample(net, TWO)
            self.add(net, steps)
        difference = (ahead - behind) / 2

        # The same difference, pulled back through the sampler to the weights.
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad(), network_calls(net, "fp32", checkpointed=True):
            images = self.sample(net, TWO)
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
    kept = net.state_dict()
    return {name: tensor for name, tensor in tensors_of(net).items() if name in kept}


def own_snapshot(path: Path) -> dict[str, torch.Tensor] | None:
    """{name: tensor} of a .safetensors that save() of this program has written; else None."""
    if path.is_dir() or not is_safetensors(path):
        return None
    with safetensors.safe_open(path, "pt") as file:
        facts = json.loads((file.metadata() or {}).get("config", "{}"))
    return load_state(path)[0] if "recipe" in facts else None
