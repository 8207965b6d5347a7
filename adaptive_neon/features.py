"""Feature networks: what a distance between images is measured in.

All are callables from uint8-valued images [N, C, H, W] to features [N, D], with
    dim       D
    name      of the network, in results
    kind      what statistics of a file may call it
    score     what a distance in it is called
    identity  hash of all that decides a feature
    to        the network on a device
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .extension import neon_ext
from .files import Refused, UserError, fetch, load_weights, printable, reading, reason_of
from .keys import design_key, joint_key, weights_hash

INCEPTION = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d"  # its start


def inception(source: str | Path = INCEPTION) -> "InceptionFeatures":
    """FID's Inception: its public weights, or another file or address of the same form."""
    check = INCEPTION_SHA256 if source == INCEPTION else ""
    return InceptionFeatures(fetch(str(source), "the Inception weights", check))


class InceptionFeatures(nn.Module):
    """Inception-v3 of the FID graph: uint8 [N, 3, H, W] (or float in [0, 255]) -> pool [N, 2048]
    float32. path: the public PyTorch port of its weights (pt_inception-2015-12-05). TF1-style
    resize to 299 and (v - 128) / 128: comparable with EDM's FID. Batch normalisation is folded into
    the convolutions."""

    dim = 2048
    score = "FID"
    kind = "inception"
    # Chains of convolutions side by side: name of the chain, its length; then a pooled branch.
    MIXED = {
        "5b": {"1x1": 1, "5x5": 2, "3x3dbl": 3},
        "5c": {"1x1": 1, "5x5": 2, "3x3dbl": 3},
        "5d": {"1x1": 1, "5x5": 2, "3x3dbl": 3},
        "6a": {"3x3": 1, "3x3dbl": 3},
        "6b": {"1x1": 1, "7x7": 3, "7x7dbl": 5},
        "6c": {"1x1": 1, "7x7": 3, "7x7dbl": 5},
        "6d": {"1x1": 1, "7x7": 3, "7x7dbl": 5},
        "6e": {"1x1": 1, "7x7": 3, "7x7dbl": 5},
        "7a": {"3x3": 2, "7x7x3": 4},
        "7b": {"1x1": 1, "3x3": 2, "3x3dbl": 3},
        "7c": {"1x1": 1, "3x3": 2, "3x3dbl": 3},
    }

    def __init__(self, path: Path):
        super().__init__()
        with reading(f"{path} is not the PyTorch port of the FID Inception"):
            weights = load_weights(path)
            for key in weights:
                if key.endswith(".conv.weight"):
                    self.add(key.removesuffix(".conv.weight"), weights)
            try:
                found = self(torch.zeros(1, 3, 8, 8))  # every layer is there and fits
            except AttributeError as error:
                raise KeyError(str(error)) from error
            if found.shape != (1, self.dim) or not found.isfinite().all():
                raise Refused(f"its features are not {self.dim} finite numbers")
        self.identity = weights_hash(self)
        self.name = f"inception-{self.identity[:8]}-tf1"

    def add(self, name, weights):
        """One convolution, with the batch normalisation after it folded in."""
        bn = {}
        for key in ("weight", "bias", "running_mean", "running_var"):
            bn[key] = weights[f"{name}.bn.{key}"].double()
        scale = bn["weight"] / (bn["running_var"] + 1e-3).sqrt()
        weight = weights[f"{name}.conv.weight"].double() * scale.view(-1, 1, 1, 1)
        bias = bn["bias"] - bn["running_mean"] * scale
        buffer = name.replace(".", "_")
        self.register_buffer(buffer, weight.float())
        self.register_buffer(f"{buffer}_bias", bias.float())

    def conv(self, x, name, stride=1, padding=None):
        """Convolution and ReLU; by default stride 1 keeps the size and stride 2 is unpadded."""
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        if padding is None:
            padding = [k // 2 for k in weight.shape[2:]] if stride == 1 else 0
        return F.relu(F.conv2d(x, weight, bias, stride, padding))

    def mixed(self, x, block):
        stride = 2 if block in ("6a", "7a") else 1
        outs = []
        for branch, length in self.MIXED[block].items():
            prefix = f"Mixed_{block}_branch{branch}"
            h = x
            for i in range(1, length):
                h = self.conv(h, f"{prefix}_{i}")
            last = f"{prefix}_{length}" if length > 1 else prefix
            # These chains end in two convolutions side by side.
            split = block in ("7b", "7c") and length > 1
            for end in ("a", "b") if split else ("",):
                outs.append(self.conv(h, last + end, stride))

        if stride == 2:
            return torch.cat([*outs, F.max_pool2d(x, 3, 2)], 1)
        if block == "7c":
            pooled = F.max_pool2d(x, 3, 1, 1)
        else:
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*outs, self.conv(pooled, f"Mixed_{block}_branch_pool")], 1)

    @staticmethod
    def resize(x, size=299):
        """TensorFlow 1's bilinear: source coordinate j * W / 299, no half-pixel shift; x, then y;
        float32."""
        for axis in (3, 2):
            n = x.shape[axis]
            at = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
            low = at.floor().long().clamp_max(n - 1)
            part = (at - low).view([size if a == axis else 1 for a in range(4)])
            first = x.index_select(axis, low)
            x = first + (x.index_select(axis, (low + 1).clamp_max(n - 1)) - first) * part
        return x

    def forward(self, images):
        x = (self.resize(images.float()) - 128).expand(-1, 3, -1, -1) / 128
        x = self.conv(x, "Conv2d_1a_3x3", 2)
        x = self.conv(x, "Conv2d_2a_3x3", padding=0)
        x = F.max_pool2d(self.conv(x, "Conv2d_2b_3x3"), 3, 2)
        x = self.conv(x, "Conv2d_3b_1x1")
        x = F.max_pool2d(self.conv(x, "Conv2d_4a_3x3", padding=0), 3, 2)
        for block in self.MIXED:
            x = self.mixed(x, block)
        return x.mean((2, 3))


class RandomConvFeatures(nn.Module):
    """Convolutions with random weights from a fixed seed: uint8 [N, C, H, W] -> [N, 64]."""

    dim = 64
    name = kind = "random-conv"
    score = "FD (random convolutions, 64-d)"

    def __init__(self, channels: int):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(20_06)
            layers: list[nn.Module] = []
            for c_in, c_out, stride in ((channels, 32, 1), (32, 64, 2), (64, 64, 2)):
                conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1)
                nn.init.kaiming_normal_(conv.weight)
                layers += [conv, nn.ReLU()]
            self.body = nn.Sequential(*layers)
        self.eval().requires_grad_(False)
        self.identity = design_key(design=str(self.body), weights=weights_hash(self))

    def forward(self, images):
        return self.body(images.float() / 127.5 - 1).mean((2, 3))


class PixelFeatures(nn.Module):
    """Pixels, in the leading principal components of real images: uint8 [N, C, H, W] -> [N, 32] or
    fewer. images: uint8 [N, C, H, W] that no score compares with. Sides above 16 are averaged down
    to it."""

    name = kind = "pixels"
    components: torch.Tensor  # [P, D]

    def __init__(self, images: torch.Tensor, most: int = 32, side: int = 16):
        super().__init__()
        self.side = (min(images.shape[2], side), min(images.shape[3], side))
        x = torch.cat([self.vectors(part).double() for part in images.split(1000)])  # [N, P]
        mean, cov = neon_ext.feature_moments(x)
        _, vectors = torch.linalg.eigh(cov)  # in ascending order
        self.register_buffer("mean", mean.float())
        self.register_buffer("components", vectors[:, -most:].float())
        self.dim = self.components.shape[1]
        self.score = f"FD (pixels, {self.dim} principal components)"
        self.identity = weights_hash(self)

    def vectors(self, images):
        return F.adaptive_avg_pool2d(images.float() / 127.5 - 1, self.side).flatten(1)

    def forward(self, images):
        return (self.vectors(images) - self.mean) @ self.components


# As functions, beside inception().
random_conv, pixels = RandomConvFeatures, PixelFeatures


class FileFeatures:
    """features(images) of a model file: uint8-valued [N, C, H, W] -> [N, D]."""

    def __init__(self, model, example):
        found = model.call("features", example)
        if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != len(example):
            raise UserError(f"{model.path}: features() must give a tensor [{len(example)}, D]")
        if not found.is_floating_point() or not found.isfinite().all():
            raise UserError(f"{model.path}: features() must give finite floating-point numbers")
        self.model, self.dim = model, found.shape[1]
        self.kind = self.name = f"{printable(model.path.stem)}-{self.dim}"
        self.score = f"FD (features of {printable(model.path.name)}, {self.dim}-d)"
        self.identity = model.identity
        self.alignment = checked_alignment(model)

    def __call__(self, images):
        # No graph of the feature network's own parameters, in worker threads neither.
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            found = self.model.call("features", images)
        if found.shape != (len(images), self.dim) or found.device != images.device:
            raise UserError(
                f"{self.model.path}: features() of {len(images)} images on {images.device} gave "
                f"{list(found.shape)} on {found.device}, not [{len(images)}, {self.dim}] there"
            )
        if not found.isfinite().all():
            raise UserError(f"{self.model.path}: features() are not finite for some images")
        return found

    def to(self, device):
        return self


def checked_alignment(model):
    """alignment(images [N, C, H, W], labels [N] or N prompts) -> adherence [N], of a user's file;
    None where it has none. Higher is better."""
    if not hasattr(model.file, "alignment"):
        return None

    def alignment(images, labels):
        with torch.no_grad():
            found = model.call("alignment", images, labels)
        if not isinstance(found, torch.Tensor) or found.shape != (len(images),):
            raise UserError(f"{model.path}: alignment() must give a tensor [{len(images)}]")
        if not found.isfinite().all():
            raise UserError(f"{model.path}: alignment() must give finite numbers")
        return found.float()

    return alignment


class JointFeatures:
    """Several feature networks as one: their features side by side, each network's scaled to the
    same total variance over real images, so that their units do not matter; the mean variance of
    a feature is 1. images: uint8 [N, C, H, W] that no score compares with."""

    def __init__(self, parts, images: torch.Tensor, device: str = "cpu"):
        self.parts = [part.to(device) for part in parts]
        self.dim = sum(part.dim for part in parts)
        self.scales = []
        for part in self.parts:
            found = features_of_images(images, part, device)
            variance = float(found.double().var(0).sum())
            if variance == 0:
                raise UserError(f"the features {part.name} are the same for all real images")
            self.scales.append((self.dim / len(parts) / variance) ** 0.5)
        self.name = self.kind = "+".join(part.name for part in parts)
        self.score = f"FD ({self.name}, {self.dim}-d)"
        self.identity = joint_key(parts=[part.identity for part in parts], images=images)

    def __call__(self, images):
        found = [part(images) * scale for part, scale in zip(self.parts, self.scales, strict=True)]
        return torch.cat(found, 1)

    def to(self, device):
        self.parts = [part.to(device) for part in self.parts]
        return self


def check_differentiable(features, images: torch.Tensor, what: str) -> None:
    """Of a gradient search: joined with others, features without a gradient would be left out of
    the sum without a word. images: uint8-valued [N, C, H, W]; what: their name in the message."""
    with torch.enable_grad():
        pixels = images.detach().float().requires_grad_(True)
        size = features(pixels).double().square().sum()
        gradient = None
        try:
            if size.requires_grad:
                (gradient,) = torch.autograd.grad(size, pixels, allow_unused=True)
        except RuntimeError as error:
            raise UserError(
                f"--search gradient: the gradient through {what} fails: {reason_of(error)}"
            ) from error
    if gradient is None or not gradient.any() or not gradient.isfinite().all():
        raise UserError(
            f"--search gradient: no gradient comes through {what}, or one that is not finite"
        )


@torch.no_grad()
def features_of_images(images: torch.Tensor, features, device: str) -> torch.Tensor:
    """Features [N, D] of uint8 images [N, C, H, W]."""
    return torch.cat([features(part.to(device)) for part in images.split(256)])
