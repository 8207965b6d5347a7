"""Adaptive NEON on EDM: repair a diffusion model that was trained on its own samples, block by block.

    theta = theta_r - w_block * (theta_s - theta_r)  w > 0 away from collapse, w < 0 towards it, -1: theta_s

theta_r: the base network (EDM, arXiv 2206.00364); theta_s: its EMA after self-training on its own samples
(NEON, arXiv 2510.03597); blocks: encoder, middle, decoder of the U-Net (Adaptive NEON, section 4.2). All
configurations see the same starting noise and labels; selection and final comparison use disjoint seeds.

    python edm_neon.py --preset digits --snapshot 5 --grid 0.5,1.0,1.5   laptop, nothing to download, minutes
    python edm_neon.py --snapshot 1551 --grid 0.75,1.0,1.25              CIFAR-10: a GPU and a connection
    torchrun --nproc_per_node=8 edm_neon.py --snapshot 1551 --grid 0.75,1.0,1.25

Recorded figures and their commands: results/edm and the README. CIFAR-10 has not been run on a GPU yet.
"""
import argparse
import copy
import dataclasses
import fnmatch
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import pickletools
import platform
import re
import sys
import tempfile
import time
import urllib.request
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import PIL.Image
import safetensors.torch
import scipy.optimize
import scipy.stats
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

try:
    import neon_ext
except ImportError:  # reported by checked(), in one line
    neon_ext = None

EDM = "https://nvlabs-fi-cdn.nvidia.com/edm"
BASES = {kind: f"{EDM}/pretrained/edm-cifar10-32x32-{kind}-vp.pkl" for kind in ("cond", "uncond")}
INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" \
            "pt_inception-2015-12-05-6726825d.pth"
FOLDS = 20  # of every score's moments: jackknife intervals need no new samples
MAX_POINTS = 10_000  # of a grid, without --yes
SELECT_SEED, FINAL_SEED, SEARCH_SEED = 10_000, 50_000, 10_000_000  # the first seeds of each


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


@contextmanager
def reading(what):
    """Whatever is wrong with a file ends in one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{what} ({type(error).__name__}: {reason})") from None


# ------------------------------------------------------------ configuration: every field is an option
def numbers(text, kind=float):
    try:
        values = tuple(sorted({kind(part) for part in text.split(",")}))
        if all(np.isfinite(values)):
            return values
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"give numbers separated by commas, not {text!r}")


def sweep_values(text):
    try:
        start, stop, step = (float(part) for part in text.split(":"))
        if step > 0 and (stop - start) / step < MAX_POINTS:
            return tuple(np.arange(start, stop + step / 2, step).round(6).tolist())
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"give start:stop:step with a positive step, not {text!r}")


def read_partition(text):
    try:
        return text if text in ("paper", "structural", "layers") else dict(json.loads(Path(text).read_text()))
    except (OSError, ValueError, TypeError):
        message = f"{text} is not paper, structural, layers or a JSON file {{glob: block}}"
        raise argparse.ArgumentTypeError(message) from None


def option(default, text, kind=None, choices=None):
    """A field of Config; kind: from the option's text to its value."""
    metadata = dict(help=text, type=kind or type(default), choices=choices)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """--select-images 2000 sets select_images. Defaults: NEON's for CIFAR-10, at the paper's batch of 64
    (snapshots 550, 1051, 1551, ... are multiples of 782 x 64 images). kimg: 1000 images."""
    preset: str = option("cifar10", "what to study", choices=("cifar10", "digits"))
    snapshot: tuple = option((1551,), "self-training lengths in kimg, by commas", partial(numbers, kind=int))
    grid: tuple = option((0.75, 1.0, 1.25), "weights of the block-wise grid, for every block", numbers)
    grid_enc: tuple = option((), "other weights for the encoder", numbers)
    grid_mid: tuple = option((), "other weights for the middle", numbers)
    grid_dec: tuple = option((), "other weights for the decoder", numbers)
    sweep: tuple = option((), "also these global weights, start:stop:step", sweep_values)
    partition: str = option("paper", "paper, structural, layers, or JSON file {glob: block}", read_partition)
    plan: bool = option(False, "print blocks, drift and a time estimate, then stop")
    race: bool = option(False, "drop grid points that are surely worse after a fifth of the seeds")
    placebo: int = option(0, "this many random partitions, their blocks as large, go through the same grid")
    search: str = option("", "after the grid; gradient scales to layers", choices=("cobyqa", "gradient"))
    evaluations: int = option(12, "of the search: scores of cobyqa, steps of gradient")
    bounds: tuple = option((-1.0, 4.0), "of the search, low,high", numbers)
    base: str = option("", "cond, uncond, a path or URL (.pkl of EDM or .safetensors of this program)")
    train_base: float = option(0.0, "train the base from scratch on --data for this many kimg")
    base_lr: float = option(1e-3, "learning rate of --train-base")
    data: str = option("", "real images: EDM dataset zip or folder")
    aux: str = option("", "existing self-trained network, or a folder of network-snapshot-*")
    synthetic: int = option(6000, "images in the synthetic set")
    batch: int = option(64, "training batch")
    lr: float = option(1e-4, "self-training learning rate")
    ramp_kimg: float = option(10_000.0, "the learning rate grows linearly over this many kimg")
    ema_kimg: float = option(500.0, "half-life of the weight average")
    dropout: float = option(0.13, "in training")
    augment: float = option(0.12, "probability of each augmentation; 0: none")
    steps: int = option(18, "sampler steps")
    select_images: int = option(10_000, "images per score of the selection")
    final_images: int = option(50_000, "images per score of the final comparison")
    final_repeats: int = option(1, "disjoint sets of final seeds")
    protocol: str = option("disjoint", "paper: 2,000 seeds, trained on", choices=("disjoint", "paper"))
    ref: str = option(f"{EDM}/fid-refs/cifar10-32x32.npz", "npz with mu and sigma of the real features")
    detector: str = option(INCEPTION, "Inception weights (PyTorch port)")
    precision: str = option("fp32", "of the network", choices=("fp32", "tf32", "bf16", "fp16"))
    sample_batch: int = option(256, "images sampled at once")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where", choices=("cuda", "cpu"))
    seed: int = option(0, "of training")
    out: Path = option(None, "folder of the results, default runs/<preset>", Path)
    export_pt: bool = option(False, "also the merged weights as a plain state dict in EDM's names")
    yes: bool = option(False, "run even if it takes very long")


MODELS = {"cifar10": dict(img_resolution=32, img_channels=3, label_dim=10, augment_dim=9, model_channels=128,
                          channel_mult=[2, 2, 2], num_blocks=4, attn_resolutions=[16]),
          "digits": dict(img_resolution=8, img_channels=1, label_dim=10, augment_dim=0, model_channels=16,
                         channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])}
PRESETS = {  # the paper's FIDs on CIFAR-10: base 1.78, best global 1.43 to 1.74, block-wise 1.43 to 1.71
    "cifar10": {},
    "digits": dict(snapshot=(5,), grid=(0.5, 1.0, 1.5), train_base=10.0, base_lr=3e-3, synthetic=1000,
                   lr=2e-4, ramp_kimg=0.0, ema_kimg=0.5, dropout=0.0, augment=0.0, select_images=1000,
                   final_images=1500, sample_batch=250)}  # FD: base 34.8, w = -1: 80.7, w = 1: 20.3


# ------------------------------------------------------------ network: DDPM++ and NCSN++, names as in EDM
class Conv(nn.Conv2d):
    """2-D convolution after resampling by a small filter (fused: before it, as NCSN++'s residual path)."""

    def __init__(self, into, out, kernel, up=False, down=False, resample_filter=(1, 1), fused=False):
        super().__init__(into, out, kernel, padding=kernel // 2)
        self.up, self.fused, self.simple = up, fused, list(resample_filter) == [1, 1]
        f = torch.as_tensor(resample_filter, dtype=torch.float32)
        outer = (f[:, None] * f / f.sum() ** 2)[None, None]
        self.register_buffer("resample_filter", outer if up or down else None)

    def forward(self, x):
        if self.resample_filter is None:
            return super().forward(x)
        if self.simple:
            return super().forward(F.interpolate(x, scale_factor=2) if self.up else F.avg_pool2d(x, 2))
        f_pad, f = (self.resample_filter.shape[-1] - 1) // 2, self.resample_filter.to(x.dtype)
        if self.fused:
            x = F.conv2d(x, self.weight, padding=self.padding[0] + f_pad)
            return F.conv2d(x, f.expand(x.shape[1], 1, -1, -1), self.bias, stride=2, groups=x.shape[1])
        resample, f = (F.conv_transpose2d, f * 4) if self.up else (F.conv2d, f)
        f = f.expand(x.shape[1], 1, -1, -1)
        return super().forward(resample(x, f, stride=2, padding=f_pad, groups=x.shape[1]))


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class UNetBlock(nn.Module):
    """Residual block with noise embedding, optional resampling and single-head self-attention."""

    def __init__(self, into, out, emb, dropout, resample_filter, up=False, down=False, attention=False):
        super().__init__()
        self.dropout, resample = dropout, dict(up=up, down=down, resample_filter=resample_filter)
        self.norm0, self.conv0 = group_norm(into), Conv(into, out, 3, **resample)
        self.affine, self.norm1, self.conv1 = nn.Linear(emb, out), group_norm(out), Conv(out, out, 3)
        self.skip = Conv(into, out, 1, **resample) if into != out or up or down else None
        self.norm2 = group_norm(out) if attention else None
        if attention:
            self.qkv, self.proj = Conv(out, 3 * out, 1), Conv(out, out, 1)

    def forward(self, x, emb):
        silu = partial(F.silu, inplace=not torch.is_grad_enabled())
        h = self.conv0(silu(self.norm0(x))).add_(self.affine(emb)[:, :, None, None])
        h = self.conv1(F.dropout(silu(self.norm1(h)), self.dropout, self.training))
        x = h.add_(x if self.skip is None else self.skip(x)).mul_(0.5 ** 0.5)
        if self.norm2 is not None:
            n, c, height, width = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(n, 1, c, 3, height * width)  # interleaved channels
            q, k, v = (t.transpose(-1, -2) for t in qkv.unbind(3))  # [N, 1, HW, C]
            a = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).contiguous().view(x.shape)
            x = self.proj(a).add_(x).mul_(0.5 ** 0.5)
        return x


class SongUNet(nn.Module):
    """DDPM++ (positional embedding, standard encoder) and NCSN++ (Fourier embedding, residual encoder)."""

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0,
                 model_channels=128, channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4,
                 attn_resolutions=(16,), dropout=0.10, label_dropout=0, embedding_type="positional",
                 channel_mult_noise=1, encoder_type="standard", decoder_type="standard",
                 resample_filter=(1, 1)):
        super().__init__()
        if encoder_type not in ("standard", "residual") or decoder_type != "standard":
            raise UserError(f"encoder {encoder_type!r} with decoder {decoder_type!r} is not supported")
        noise, emb = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        self.label_dropout, self.noise, self.map_noise = label_dropout, noise, None
        if embedding_type == "fourier":
            self.map_noise = nn.Module()
            self.map_noise.register_buffer("freqs", torch.randn(noise // 2) * 16)
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, emb), nn.Linear(emb, emb)
        block = partial(UNetBlock, emb=emb, dropout=dropout, resample_filter=resample_filter)
        self.enc, self.dec, skips, c, aux = nn.ModuleDict(), nn.ModuleDict(), [], in_channels, in_channels
        sizes = [img_resolution >> level for level in range(len(channel_mult))]
        levels = [(f"{size}x{size}", size in attn_resolutions, model_channels * mult)
                  for size, mult in zip(sizes, channel_mult)]
        for r, attention, width in levels:
            if not skips:
                self.enc[f"{r}_conv"] = Conv(c, c := model_channels, 3)
            else:
                self.enc[f"{r}_down"] = block(c, c, down=True)
                if encoder_type == "residual":
                    residual = dict(down=True, fused=True, resample_filter=resample_filter)
                    self.enc[f"{r}_aux_residual"] = Conv(aux, aux := c, 3, **residual)
            skips.append(c)
            for i in range(num_blocks):
                self.enc[f"{r}_block{i}"] = block(c, c := width, attention=attention)
                skips.append(c)
        for r, attention, width in reversed(levels):
            if r == levels[-1][0]:
                self.dec[f"{r}_in0"], self.dec[f"{r}_in1"] = block(c, c, attention=True), block(c, c)
            else:
                self.dec[f"{r}_up"] = block(c, c, up=True)
            for i in range(num_blocks + 1):
                attend = attention and i == num_blocks
                self.dec[f"{r}_block{i}"] = block(c + skips.pop(), c := width, attention=attend)
        self.dec[f"{r}_aux_norm"], self.dec[f"{r}_aux_conv"] = group_norm(c), Conv(c, out_channels, 3)
        self.initialise()

    def initialise(self):
        """Xavier-uniform weights, zero biases, almost zero where a residual branch or the network ends."""
        for name, p in self.named_parameters():
            layer = name.split(".")[-2]
            if p.ndim > 1:
                small = layer in ("conv1", "proj") or layer.endswith("aux_conv")
                nn.init.xavier_uniform_(p, 1e-5 if small else 0.2 ** 0.5 if layer == "qkv" else 1.0)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def embed(self, c_noise, labels, augment_labels):
        i = torch.arange(self.noise // 2, dtype=torch.float32, device=c_noise.device)
        frequency = (1 / 10000) ** (i / (self.noise // 2 - 1))
        if self.map_noise is not None:
            frequency = 2 * np.pi * self.map_noise.freqs
        t = c_noise.outer(frequency.to(c_noise.dtype))
        e = torch.cat([t.sin(), t.cos()], 1).to(self.map_layer0.weight.dtype)
        if self.map_label is not None:
            if self.training and self.label_dropout:
                labels = labels * (torch.rand(len(labels), 1, device=labels.device) >= self.label_dropout)
            e = e + self.map_label(labels * labels.shape[1] ** 0.5)
        if self.map_augment is not None and augment_labels is not None:
            e = e + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(e))))

    def forward(self, x, c_noise, labels, augment_labels=None):
        emb, aux, skips = self.embed(c_noise, labels, augment_labels), x, []
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) / 2 ** 0.5
                continue
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_aux_" in name:
                x = F.silu(layer(x)) if name.endswith("norm") else layer(x)
            else:
                x = layer(torch.cat([x, skips.pop()], 1) if "_block" in name else x, emb)
        return x


class EDMPrecond(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4), the denoised x [N, C, H, W] (EDM, table 1)."""

    def __init__(self, img_resolution, img_channels, label_dim=0, sigma_min=0, sigma_max=math.inf,
                 sigma_data=0.5, **model):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.model = SongUNet(img_resolution, img_channels, img_channels, label_dim=label_dim, **model)
        sizes = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim)
        self.config = sizes | model
        self.precision = "fp32"  # fp16 and bf16: the U-Net under autocast; input and output stay float32

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        x, sigma = x.float(), torch.as_tensor(sigma, device=x.device).float().reshape(-1, 1, 1, 1)
        if self.label_dim and class_labels is None:
            class_labels = torch.zeros(1, self.label_dim, device=x.device)
        labels = class_labels.float().reshape(-1, self.label_dim) if self.label_dim else None
        total = sigma.square() + self.sigma_data**2
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision)
        with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            out = self.model(x / total.sqrt(), sigma.flatten().log() / 4, labels, augment_labels)
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * out.float()

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)


# ------------------------------------------------------------ reading networks: pickles are parsed, never run
class Inert:
    """An object of the pickle as plain data: EDM's persistent ones, torch's containers, numpy's numbers."""

    def __init__(self, meta=None, *_):
        meta = meta if isinstance(meta, dict) else {}
        name, self.state = meta.get("class_name"), meta.get("state", {})
        self.name = name[:80] if isinstance(name, str) else None

    def __setstate__(self, state):
        self.state = state


class Function(NamedTuple):
    """What a name in the pickle may compute; a tuple, as the pickle must not set its attributes."""
    work: Callable

    def __call__(self, *args):
        return self.work(*args)


class SafeUnpickler(pickle.Unpickler):
    """Admits tensors, storages and plain containers; anything else is refused by name."""

    def __init__(self, data):
        super().__init__(io.BytesIO(data))
        self.left = {"storages": len(data), "tensors": len(data)}  # bytes and elements
        inert = [("torch_utils.persistence", "_reconstruct_persistent_obj"), ("numpy", "dtype"),
                 ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
                 *(("torch.nn.modules.container", n) for n in ("ModuleDict", "ModuleList", "Sequential"))]
        self.allowed = {name: Inert for name in inert} | {
            ("collections", "OrderedDict"): Function(lambda: {}),
            ("dnnlib.util", "EasyDict"): Function(lambda: {}),
            **{(builtins, "set"): Function(lambda *_: None) for builtins in ("builtins", "__builtin__")},
            ("torch._utils", "_rebuild_parameter"): Function(lambda tensor, *_: tensor),
            ("torch._utils", "_rebuild_tensor_v2"): Function(self.tensor),
            ("torch.storage", "_load_from_bytes"): Function(self.storage)}

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it wants to call {f'{module}.{name}'[:100]!r}")
        return self.allowed[module, name]

    def spend(self, what, amount):
        self.left[what] -= amount
        if self.left[what] < 0:
            raise pickle.UnpicklingError(f"its {what} are larger than the file")

    def tensor(self, storage, offset, size, stride, *_):
        """A view of the storage: as_strided refuses what lies outside, spend repeated elements."""
        self.spend("tensors", math.prod(size))
        return storage.as_strided(size, stride, offset)

    def storage(self, blob):
        """The elements of one storage [count], by torch's own restricted reader; a zip could inflate."""
        self.spend("storages", len(blob))
        if blob[:2] == b"PK":
            raise pickle.UnpicklingError("a compressed storage")
        storage = torch.load(io.BytesIO(blob), weights_only=True, map_location="cpu")
        return torch.empty(0, dtype=storage.dtype).set_(storage)


def inert_tensors(module, prefix=""):
    """(name, tensor) of an inert module tree, in state-dict order."""
    if prefix.count(".") > 6:
        raise pickle.UnpicklingError("modules nested too deeply")
    parameters, buffers = (module.state.get(kind) or {} for kind in ("_parameters", "_buffers"))
    for name, tensor in {**parameters, **buffers}.items():
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in (module.state.get("_modules") or {}).items():
        if child is not None:
            yield from inert_tensors(child, f"{prefix}{name}.")


def pickled_network(path):
    """EDM's network-snapshot: (options, weights) as inert data."""
    data = path.read_bytes()
    for opcode, arg, _ in pickletools.genops(data):  # refuse what allocates beyond the file's size
        if opcode.name in ("BYTEARRAY8", "EXT1", "EXT2", "EXT4") or (
                opcode.name.endswith("PUT") and int(arg) > len(data)):
            raise pickle.UnpicklingError(f"opcode {opcode.name}")
    ema = SafeUnpickler(data).load()["ema"]
    kwargs, inner = dict(ema.state["_init_kwargs"]), ema.state["_modules"]["model"]
    if ema.name != "EDMPrecond" or kwargs.pop("model_type", "DhariwalUNet") != "SongUNet":
        raise UserError(f"{path}: {ema.name} around {inner.name} is not supported, only EDMPrecond around "
                        "SongUNet (DDPM++, NCSN++)")
    kwargs.pop("use_fp16", None)
    return kwargs, dict(inert_tensors(ema))


def build_network(kwargs, tensors, path):
    """EDMPrecond(**kwargs) with these weights; made without memory first: options allocate nothing."""
    if kwargs.get("num_blocks", 4) * len(kwargs.get("channel_mult", ())) > len(tensors):
        raise UserError(f"{path}: its options describe a larger network than its {len(tensors)} tensors")
    with torch.device("meta"):
        net = EDMPrecond(**kwargs)
    own = net.state_dict()
    for name in [*own, *tensors]:
        theirs, ours = (tuple(t[name].shape) if name in t else None for t in (tensors, own))
        if ours != theirs:
            raise UserError(f"{path}: {name[:100]} has shape {theirs}, the network expects {ours}")
        if not tensors[name].isfinite().all():
            raise UserError(f"{path}: {name} has weights that are not finite")
    net.load_state_dict({name: tensor.float().clone() for name, tensor in tensors.items()}, assign=True)
    return net.eval().requires_grad_(False)


def load_network(path):
    """EDM .pkl (parsed, never run) or our .safetensors -> EDMPrecond in eval mode on the CPU, float32."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"network {path} does not exist")
    with reading(f"network {path} is refused, nothing in it was run"):
        if path.suffix != ".safetensors":
            return build_network(*pickled_network(path), path)
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            config = json.loads(file.metadata()["config"])
            config.pop("recipe", None)
            return build_network(config, tensors, path)


def save_network(net, path, recipe):
    """Weights in float32, options and recipe in one entry of the metadata: the order of several is random."""
    metadata = {"config": json.dumps({**net.config, "recipe": recipe})}
    tensors = {name: tensor.float().contiguous().cpu() for name, tensor in net.state_dict().items()}
    write_atomically(path, partial(safetensors.torch.save_file, tensors, metadata=metadata))


# ------------------------------------------------------------ files and images
def write_atomically(path, write):
    """Text, or what write(temporary path) leaves, then rename: the old file or the new one, never half."""
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            part = Path(folder) / path.name  # torch.save writes the name into the file
            part.write_text(write, "utf-8") if isinstance(write, str) else write(part)
            os.replace(part, path)
    except (RuntimeError, safetensors.SafetensorError) as error:  # theirs for a full disk
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} cannot be written, is the disk full? ({reason})") from None


def key_of(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:10]


def file_hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def fetch(source, what, sha256_start=""):
    """A path as it is; a URL through the cache (NEON_CACHE), resumed where it stopped and checked."""
    if not source.startswith(("http://", "https://")):
        if not Path(source).exists():
            raise UserError(f"{what} {source} does not exist")
        return Path(source)
    cache = Path(os.environ.get("NEON_CACHE", Path.home() / ".cache/adaptive-neon"))
    target = cache / source.rsplit("/", 1)[1]
    if target.exists():
        return target
    part = target.with_name(target.name + ".part")
    advice = f"put the file at {target}; --preset digits needs no download"
    with reading(f"cannot download {what} from {source}: {advice}"):
        cache.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            file.truncate(have := max(file.tell() - 1, 0))  # one byte again: servers refuse an empty rest
            request = urllib.request.Request(source, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=30) as answer:
                file.truncate(have if answer.status == 206 else 0)
                size = int(answer.headers.get("Content-Length", 0))
                with tqdm(total=size, unit="B", unit_scale=True, desc=target.name) as bar:
                    while chunk := answer.read(1 << 20):
                        bar.update(file.write(chunk))
        if bar.n < size:
            raise OSError(f"the connection broke after {bar.n} of {size} bytes, run again to go on")
    if not file_hash(part).startswith(sha256_start):
        part.unlink()
        raise UserError(f"{what} from {source} is damaged (SHA-256 is not {sha256_start}...): run again")
    os.replace(part, target)
    return target


def digits_data():
    """scikit-learn's 1797 digits: uint8 [N, 1, 8, 8], int64 labels."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * 255 / 16).astype(np.uint8))[:, None]
    return images, torch.from_numpy(digits.target.astype(np.int64))


def read_dataset(path):
    """EDM dataset (zip or folder with dataset.json) -> uint8 [N, C, H, W], int64 labels [N] or None."""
    path = Path(path)
    with reading(f"dataset {path} cannot be read"):
        archive = None if path.is_dir() else zipfile.ZipFile(path)
        names = archive.namelist() if archive else [p.relative_to(path).as_posix() for p in path.rglob("*.*")]
        read = archive.read if archive else lambda name: (path / name).read_bytes()
        table = dict(json.loads(read("dataset.json"))["labels"] or ()) if "dataset.json" in names else {}
        names = sorted(n for n in names if n.lower().endswith((".png", ".jpg", ".jpeg")))
        arrays = [np.asarray(PIL.Image.open(io.BytesIO(read(name)))) for name in names]
        images = torch.from_numpy(np.stack([np.atleast_3d(a) for a in arrays]))
        labels = torch.tensor([table[name] for name in names]) if table else None
        return images.permute(0, 3, 1, 2).contiguous(), labels


def write_dataset(path, images, labels):
    """uint8 [N, C, H, W] and labels (or None) -> EDM dataset zip, stored uncompressed."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    index = None if labels is None else list(zip(names, labels.tolist()))

    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            for name, image in zip(names, images.permute(0, 2, 3, 1).numpy()):
                png = io.BytesIO()
                picture = PIL.Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
                picture.save(png, format="png", compress_level=0)
                archive.writestr(zipfile.ZipInfo(name), png.getvalue())
            archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": index}))
    write_atomically(path, write)


# ------------------------------------------------------------ sampling
def sigma_steps(net, num_steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's time steps [num_steps + 1] float64, ending in 0 (equation 5)."""
    low, high = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    steps = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return F.pad(net.round_sigma(steps), (0, 1))


def edm_sampler(net, latents, class_labels=None, num_steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0,
                differentiable=False):
    """Heun's second-order deterministic sampler (EDM, algorithm 1): latents [N, C, H, W] -> images in [-1, 1]
    float64. differentiable: in the network's weights, with the activations of one network call at a time."""
    call = partial(checkpoint, net.forward, use_reentrant=False) if differentiable else torch.no_grad()(net)
    t = sigma_steps(net, num_steps, sigma_min, sigma_max, rho).to(latents.device)
    x = latents.double() * t[0]
    for i in range(num_steps):
        d = (x - call(x.float(), t[i], class_labels).double()) / t[i]
        ahead = x + (t[i + 1] - t[i]) * d
        if i < num_steps - 1:
            d = (d + (ahead - call(ahead.float(), t[i + 1], class_labels).double()) / t[i + 1]) / 2
        x = x + (t[i + 1] - t[i]) * d
    return x


def draw_latents(net, seeds, device):
    """One generator per seed, as EDM: latents [N, C, H, W] float32, one-hot labels [N, K] (or None)."""
    latents, labels, shape = [], [], (net.img_channels, net.img_resolution, net.img_resolution)
    for seed in seeds:
        generator = torch.Generator(device).manual_seed(int(seed) % 2**32)
        latents.append(torch.randn(shape, generator=generator, device=device))
        if net.label_dim:
            labels.append(torch.randint(net.label_dim, [], generator=generator, device=device))
    return torch.stack(latents), F.one_hot(torch.stack(labels), net.label_dim).float() if labels else None


@dataclasses.dataclass
class Settings:
    """How this process samples: device, images per batch, sampler steps, precision, rank of `world`."""
    device: str
    batch: int
    steps: int
    precision: str = "fp32"
    rank: int = 0
    world: int = 1

    def place(self, net):
        """A copy of the network to sample from; compiled on a GPU: its weights are rewritten in place."""
        net = copy.deepcopy(net).to(self.device).eval().requires_grad_(False)
        net.precision = self.precision
        if self.device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
            net.to(memory_format=torch.channels_last).compile(dynamic=False)
        return net

    def sample(self, net, seeds):
        """uint8 images [N, C, H, W] and labels (or None) of one batch of seeds."""
        latents, labels = draw_latents(net, seeds, self.device)
        images = edm_sampler(net, latents, labels, self.steps)
        if not images.isfinite().all():
            raise UserError("the sampler gave images that are not finite: are the weights sound?")
        return (images * 127.5 + 128).clip(0, 255).to(torch.uint8), labels  # truncates, as EDM

    def map_batches(self, work, seeds, desc=None, batch=None):
        """[work(batch of seeds)] in the order of the seeds; every rank gets all. On a CPU, where small
        networks leave cores idle, several batches at once."""
        parts = np.array_split(np.asarray(seeds), -(-len(seeds) // (batch or self.batch)))
        mine, workers = parts[self.rank::self.world], os.cpu_count() // torch.get_num_threads()
        bar = dict(desc=desc, leave=False, disable=desc is None or self.rank > 0)
        if workers > 1 and self.device == "cpu" and self.world == 1:
            return thread_map(work, mine, max_workers=workers, **bar)
        results = [work(part) for part in tqdm(mine, **bar)]
        if self.world == 1:
            return results
        gathered = [None] * self.world
        dist.all_gather_object(gathered, results)
        return [gathered[i % self.world][i // self.world] for i in range(len(parts))]

    def one_by_one(self, work=lambda: None):
        """work() on the first rank, then on the others, which find its files."""
        if self.rank > 0:
            dist.barrier()
        result = work()
        if self.world > 1 and self.rank == 0:
            dist.barrier()
        return result


# ------------------------------------------------------------ augmentation (EDM, appendix F.2): nine labels
SYM6 = [  # low-pass filter of the sym6 wavelet
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148]


def matrix(rows, device, n=1):
    """3 x 3 matrices [N, 3, 3] from the first two rows: six numbers or [N] tensors."""
    entries = [torch.as_tensor(v, dtype=torch.float32, device=device).expand(n) for v in (*rows, 0, 0, 1)]
    return torch.stack(entries, -1).view(n, 3, 3)


def draw_affine(n, p, height, width, device):
    """Random inverse maps G [N, 3, 3] (output to input, pixels) and their seven labels [N, 7]."""
    scale = lambda x, y: matrix([x, 0, 0, 0, y, 0], device, n)
    rotate = lambda a: matrix([a.cos(), -a.sin(), 0, a.sin(), a.cos(), 0], device, n)
    gate = lambda value, chance: torch.where(torch.rand(n, device=device) < chance, value, 0.0)
    angle = lambda: (torch.rand(n, device=device) * 2 - 1) * np.pi
    zoom = gate(torch.randn(n, device=device), p)
    turn = gate(angle(), p)
    w, r = torch.randn(n, device=device), angle()
    w, r = gate(w, p), gate(r, 0.5)
    x, y = gate(torch.randn(2, n, device=device), p)
    s, t = torch.exp2(0.2 * zoom), torch.exp2(0.2 * w)
    G = scale(1 / s, 1 / s) @ rotate(turn) @ rotate(-r) @ scale(1 / t, t) @ rotate(r)
    G = G @ matrix([1, 0, -x * width / 8, 0, 1, -y * height / 8], device, n)
    return G, torch.stack([zoom, turn.cos() - 1, turn.sin(), w * r.cos(), w * r.sin(), x, y], 1)


def warp(images, G):
    """images [N, C, H, W] resampled through G, band-limited by sym6 filters at twice the resolution."""
    (n, c, height, width), device = images.shape, images.device
    f = torch.tensor(SYM6, device=device)
    shift = lambda x, y: matrix([1, 0, x, 0, 1, y], device)
    scale = lambda x, y: matrix([x, 0, 0, 0, y, 0], device)
    cx, cy = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor([[-cx, cx, cx, -cx], [-cy, -cy, cy, cy], [1, 1, 1, 1]], device=device)
    q = (G @ corners)[:, :2]  # [N, 2, 4]
    far = torch.cat([(-q).amax((0, 2)), q.amax((0, 2))]) + torch.tensor([6 - cx, 6 - cy] * 2, device=device)
    limit = torch.tensor([width - 1, height - 1] * 2, device=device)
    x0, y0, x1, y1 = torch.minimum(far.clamp_min(0), limit).ceil().int().tolist()
    images = F.pad(images, [x0, x1, y0, y1], mode="reflect")

    def filtered(x, kernel, along_x, **kwargs):
        weight = kernel.view(1, 1, 1, -1) if along_x else kernel.view(1, 1, -1, 1)
        return F.conv2d(x, weight.expand(c, 1, -1, -1), groups=c, **kwargs)

    up = images.new_zeros(n, c, images.shape[2] * 2 - 1, images.shape[3] * 2 - 1)
    up[:, :, ::2, ::2] = images
    up = filtered(filtered(up, f.flip(0), True, padding=(0, 6)), f.flip(0), False, padding=(6, 0))
    G = scale(2, 2) @ shift((x0 - x1) / 2, (y0 - y1) / 2) @ G @ scale(0.5, 0.5)
    out_h, out_w = (height + 6) * 2, (width + 6) * 2
    G = scale(2 / up.shape[3], 2 / up.shape[2]) @ shift(-0.5, -0.5) @ G
    G = G @ shift(0.5, 0.5) @ scale(out_w / 2, out_h / 2)
    grid = F.affine_grid(G[:, :2], [n, c, out_h, out_w], align_corners=False)
    x = F.grid_sample(up, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    x = filtered(x, f, True, stride=(1, 2), padding=(0, 5))[:, :, :, 3:-3]
    return filtered(x, f, False, stride=(2, 1), padding=(5, 0))[:, :, 3:-3]


def augment(images, p):
    """images [N, C, H, W] in [-1, 1] -> augmented images, labels [N, 9]; flips: x half the time, y with p."""
    n, device, labels = len(images), images.device, []
    for axis, chance in ((3, p * 1e8), (2, p)):
        w = torch.randint(2, [n, 1, 1, 1], device=device)
        w = torch.where(torch.rand(n, 1, 1, 1, device=device) < chance, w, 0)
        images = torch.where(w == 1, images.flip(axis), images)
        labels.append(w.view(n, 1).float())
    G, rest = draw_affine(n, p, images.shape[2], images.shape[3], device)
    return warp(images, G), torch.cat([*labels, rest], 1)


# ------------------------------------------------------------ training
def edm_loss(net, images, labels, augment_p, P_mean=-1.2, P_std=1.2, sigma_data=0.5):
    """EDM's loss [N, C, H, W]: lambda(sigma) (D(y + n; sigma) - y)^2, ln sigma ~ N(P_mean, P_std^2)."""
    sigma = (torch.randn(len(images), 1, 1, 1, device=images.device) * P_std + P_mean).exp()
    images, augment_labels = augment(images, augment_p) if augment_p else (images, None)
    noise = torch.randn_like(images) * sigma
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * (net(images + noise, sigma, labels, augment_labels) - images).square()


def ema_beta(batch, half_life, seen=None, ramp_ratio=None):
    """Share the average keeps at a step of `batch` images; half_life in images, at most seen * ramp_ratio."""
    if ramp_ratio is not None:
        half_life = min(half_life, seen * ramp_ratio)
    return 0.5 ** (batch / max(half_life, 1e-8))


def shuffled(positions, n, seed):
    """Indices at these positions of an endless sequence of permutations of range(n)."""
    epochs = {e: torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + e))
              for e in {int(p) // n for p in positions}}
    return torch.stack([epochs[int(p) // n][int(p) % n] for p in positions])


def train(net, images, labels, plan, settings, state_path, snapshots, save):
    """Adam on EDM's loss; plan: name, lr, ramp_kimg, ema_kimg, augment, batch, seed, ramp_ratio. Every step
    has its own seed: a resumed run repeats an uninterrupted one. save(ema, kimg) at each of `snapshots`."""
    device, rank, world, batch = settings.device, settings.rank, settings.world, plan["batch"]
    net = net.to(device).train().requires_grad_(True)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer, seen = torch.optim.Adam(net.parameters(), lr=plan["lr"], fused=True), 0
    parts = {"net": net, "ema": ema, "optimizer": optimizer}
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location=device)
        seen = state["seen"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    total, saved = max(snapshots) * 1000, seen
    tick = max(batch, min(50_000, int(max(snapshots) * 250)))
    bar = tqdm(total=total, initial=seen, unit="img", unit_scale=True, desc=plan["name"], leave=False,
               disable=rank > 0)
    while seen < total:
        index = shuffled(torch.arange(seen, seen + batch)[rank::world], len(images), plan["seed"])
        torch.manual_seed(((plan["seed"] * 2**20 + seen // batch) * 64 + rank) % 2**63)
        x = images[index].to(device).float() / 127.5 - 1
        y = F.one_hot(labels[index], net.label_dim).float().to(device) if net.label_dim else None
        optimizer.param_groups[0]["lr"] = plan["lr"] * min(seen / max(plan["ramp_kimg"] * 1000, 1e-8), 1)
        optimizer.zero_grad(set_to_none=True)
        (edm_loss(model, x, y, plan["augment"]).sum() * (world / batch)).backward()
        for grad in (p.grad for p in net.parameters() if p.grad is not None):
            grad.nan_to_num_(0.0, 1e5, -1e5)
        optimizer.step()
        beta = ema_beta(batch, plan["ema_kimg"] * 1000, seen, plan.get("ramp_ratio"))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in net.parameters()], 1 - beta)
        due = [kimg for kimg in snapshots if seen < kimg * 1000 <= seen + batch]
        seen += batch
        bar.update(batch)
        if rank == 0 and (due or seen - saved >= tick):
            for kimg in due:
                save(ema, kimg)
            state, saved = {name: part.state_dict() for name, part in parts.items()} | {"seen": seen}, seen
            write_atomically(state_path, partial(torch.save, state))
    bar.close()
    settings.one_by_one()  # now the first rank's files are there


# ------------------------------------------------------------ features, reference, precision and recall
class InceptionFeatures(nn.Module):
    """Inception-v3 of the FID graph: uint8 [N, 3, H, W] (or float in [0, 255]) -> pool [N, 2048] float32.
    path: the public PyTorch port of its weights (pt_inception-2015-12-05). TF1-style resize to 299 and
    (v - 128) / 128: comparable with EDM's FID. Batch normalisation is folded into the convolutions."""
    dim = 2048
    BLOCKS = {  # chains of convolutions side by side: name of the chain, its length; then a pooled branch
        **dict.fromkeys(("5b", "5c", "5d"), {"1x1": 1, "5x5": 2, "3x3dbl": 3}), "6a": {"3x3": 1, "3x3dbl": 3},
        **dict.fromkeys(("6b", "6c", "6d", "6e"), {"1x1": 1, "7x7": 3, "7x7dbl": 5}),
        "7a": {"3x3": 2, "7x7x3": 4},
        **dict.fromkeys(("7b", "7c"), {"1x1": 1, "3x3": 2, "3x3dbl": 3})}

    def __init__(self, path):
        super().__init__()
        with reading(f"{path} is not the PyTorch port of the FID Inception"):
            weights = torch.load(path, weights_only=True, map_location="cpu")
            for key in [key for key in weights if key.endswith(".conv.weight")]:
                name = key.removesuffix(".conv.weight").replace(".", "_")
                bn = key.replace("conv.weight", "bn.")
                scale = weights[f"{bn}weight"].double() / (weights[f"{bn}running_var"].double() + 1e-3).sqrt()
                bias = weights[f"{bn}bias"].double() - weights[f"{bn}running_mean"].double() * scale
                self.register_buffer(name, (weights[key].double() * scale.view(-1, 1, 1, 1)).float())
                self.register_buffer(f"{name}_bias", bias.float())
            self(torch.zeros(1, 3, 8, 8))  # every layer is there and fits
        self.name = f"inception-{file_hash(path)[:8]}-tf1"

    def conv(self, x, name, stride=1, padding=None):
        """Convolution and ReLU; by default stride 1 keeps the size and stride 2 is unpadded."""
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        if padding is None:
            padding = [k // 2 for k in weight.shape[2:]] if stride == 1 else 0
        return F.relu(F.conv2d(x, weight, bias, stride, padding))

    def mixed(self, x, block):
        outs, stride = [], 2 if block in ("6a", "7a") else 1
        for branch, length in self.BLOCKS[block].items():
            prefix, h = f"Mixed_{block}_branch{branch}", x
            for i in range(1, length):
                h = self.conv(h, f"{prefix}_{i}")
            last = f"{prefix}_{length}" if length > 1 else prefix
            split = block in ("7b", "7c") and length > 1  # these chains end in two convolutions side by side
            outs += [self.conv(h, last + end, stride) for end in (("a", "b") if split else ("",))]
        if stride == 2:
            return torch.cat([*outs, F.max_pool2d(x, 3, 2)], 1)
        pool = F.max_pool2d if block == "7c" else partial(F.avg_pool2d, count_include_pad=False)
        return torch.cat([*outs, self.conv(pool(x, 3, 1, 1), f"Mixed_{block}_branch_pool")], 1)

    @staticmethod
    def resize(x, size=299):
        """TensorFlow 1's bilinear: source coordinate j * W / 299, no half-pixel shift; x, then y; float32."""
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
        x = self.conv(self.conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3", padding=0)
        x = F.max_pool2d(self.conv(x, "Conv2d_2b_3x3"), 3, 2)
        x = F.max_pool2d(self.conv(self.conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", padding=0), 3, 2)
        for block in self.BLOCKS:
            x = self.mixed(x, block)
        return x.mean((2, 3))


class DigitsFeatures(nn.Module):
    """Small classifier of scikit-learn's digits, trained here (seeded, seconds): [N, 1, 8, 8] -> [N, 64]."""
    dim, name = 64, "digits-cnn-64"

    def __init__(self, path, epochs=40):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            conv = partial(nn.Conv2d, kernel_size=3, padding=1)
            self.body = nn.Sequential(
                conv(1, 32), nn.ReLU(), conv(32, 64, stride=2), nn.ReLU(), conv(64, 64, stride=2), nn.ReLU(),
                nn.Flatten(), nn.Linear(256, 64), nn.ReLU())
            self.head = nn.Linear(64, 10)
            if not path.exists():
                self.fit(epochs)
                write_atomically(path, partial(torch.save, self.state_dict()))
        self.load_state_dict(torch.load(path, weights_only=True))
        self.eval().requires_grad_(False)

    def fit(self, epochs):
        images, labels = digits_data()
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        for index in (part for _ in range(epochs) for part in torch.randperm(len(images)).split(128)):
            optimizer.zero_grad()
            F.cross_entropy(self.head(self(images[index])), labels[index]).backward()
            optimizer.step()

    def forward(self, images):
        return self.body(images.float() / 127.5 - 1)


class Reference:
    """Statistics of the real data: .prepared (neon_ext.FrechetReference), .real [N, D] or None, .facts."""

    def __init__(self, c, features):
        self.real, source = None, "digits" if c.preset == "digits" else c.data
        if source:
            images = digits_data()[0] if c.preset == "digits" else read_dataset(c.data)[0]
            with torch.no_grad():
                self.real = torch.cat([features(part.to(c.device)) for part in images.split(256)])
            mu, cov = (t.cpu().numpy() for t in neon_ext.feature_moments(self.real))
            stored = dict(mu=mu, sigma=cov, images=len(images), features=features.name)
            write_atomically(c.out / "reference.npz", lambda part: np.savez(part, **stored))
        else:
            source = fetch(c.ref, "the reference statistics")
        with reading(f"reference {source} has no usable mu and sigma"):
            if self.real is None:
                with np.load(source) as file:  # EDM's leaves features and images out
                    stored = {"features": "inception", "images": 50_000} | dict(file)
            kind, shape = str(stored["features"]), np.shape(stored["mu"])
            if shape != (features.dim,) or kind not in (features.name, features.name.split("-")[0]):
                raise UserError(f"reference {source} has {shape} statistics of {kind}, the features are "
                                f"{features.name}, {features.dim}-d: use statistics of the same features")
            mu, cov = (torch.as_tensor(stored[key]).double().to(c.device) for key in ("mu", "sigma"))
            self.prepared = neon_ext.FrechetReference(mu, cov, int(stored["images"]))
        self.facts = {"features": features.name, "source": str(source), "images": int(stored["images"])}

    def floor(self, images):
        """Distance between two disjoint samples of the real data, at most `images` each: bias alone."""
        n = min(images, len(self.real) // 2)
        order = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0))
        first, second = (self.real[part.to(self.real.device)] for part in order[:2 * n].split(n))
        moments = (*neon_ext.feature_moments(first), *neon_ext.feature_moments(second))
        return {"images": n, "fd": float(neon_ext.frechet_distance(*moments))}


def get_reference(c):
    """The feature network and the statistics of the real data in it."""
    if c.preset == "digits":
        features = DigitsFeatures(c.out / "digits-cnn.pt")
    else:
        check = "6726825d" if c.detector == INCEPTION else ""
        features = InceptionFeatures(fetch(c.detector, "the Inception weights", check))
    return features, Reference(c, features.to(c.device))


def distances(prepared, features):
    """Distance of features [N, D] to the reference, and without each of FOLDS contiguous folds."""
    moments = neon_ext.Moments(features.shape[1], FOLDS, features.device)
    for k, fold in enumerate(features.tensor_split(FOLDS)):
        moments.update(fold, k)
    chosen = [None] + [[j for j in range(FOLDS) if j != k] for k in range(FOLDS)]
    values = [float(prepared.distance(moments.mean(folds), moments.cov(folds))) for folds in chosen]
    return values[0], values[1:]


@torch.no_grad()
def precision_recall(real, fake, k=5, most=10_000):
    """Improved precision and recall (arXiv 1904.06991), k nearest neighbours, at most `most` of each."""
    real, fake = real[:most].double(), fake[:most].double()

    def inside(points, manifold):
        radii = [torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(1000)]
        hit = [(torch.cdist(part, manifold) <= torch.cat(radii)).any(1) for part in points.split(1000)]
        return float(torch.cat(hit).double().mean())
    return inside(fake, real), inside(real, fake)


# ------------------------------------------------------------ blocks
def block_of(name, net, partition="paper"):
    """The block that owns parameter `name`. paper: lowest resolution and mapping are mid, else enc or dec;
    structural: the decoder's blocks after the bottleneck are dec; layers: one each; a dict: by its globs."""
    if isinstance(partition, dict):
        for pattern, block in partition.items():
            if fnmatch.fnmatchcase(name, pattern):
                return block
        raise UserError(f"--partition: no pattern owns {name}; end the file with \"*\": \"rest\"")
    side, layer = name.split(".")[1:3]
    if partition == "layers":
        return "map" if side.startswith("map") else f"{side}.{layer}"
    low = min(int(key.split("x")[0]) for key in net.model.enc)
    after = partition == "structural" and side == "dec" and "_block" in layer
    lowest = layer.startswith(f"{low}x{low}_") and not after
    return "mid" if side not in ("enc", "dec") or lowest else side


def placebo_owners(owners, sizes, seed, draws=200):
    """{parameter: block} at random: layers change blocks as a whole, every block keeps its number of layers
    and, the closest of many draws, nearly its size. owners, sizes: {parameter: block}, {parameter: numel}."""
    layer = {name: (block_of(name, None, "layers"), block) for name, block in owners.items()}
    layers, rng = list(dict.fromkeys(layer.values())), np.random.default_rng(seed)
    weight = np.array([sum(sizes[name] for name in owners if layer[name] == one) for one in layers])
    blocks = np.array([block for _, block in layers])
    share = lambda assigned: np.log([weight[assigned == b].sum() for b in np.unique(blocks)])
    mismatch = lambda assigned: np.abs(share(assigned) - share(blocks)).max()
    best = min((rng.permutation(blocks) for _ in range(draws)), key=mismatch)
    return {name: str(best[layers.index(layer[name])]) for name in owners}


class Configurations:
    """All extrapolations of two networks: one resident network, its weights rewritten in one fused pass."""

    def __init__(self, base, aux, owners, settings):
        ours, theirs = base.state_dict(), aux.state_dict()
        for name in [*ours, *theirs]:
            r, s = (tuple(state[name].shape) if name in state else "absent" for state in (ours, theirs))
            if r != s:
                raise UserError(f"base and self-trained network differ, first at {name}: {r} and {s}")
        self.net = settings.place(base)
        like = self.net.state_dict()  # its memory format too, so that set() is one pass without copies
        self.theta_r, self.theta_s = ({name: torch.empty_like(like[name]).copy_(state[name]) for name in ours}
                                      for state in (ours, theirs))
        self.owners, self.blocks = owners, list(dict.fromkeys(owners.values()))
        if {*self.blocks} <= {"enc", "mid", "dec"}:
            self.blocks.sort(key=["enc", "mid", "dec"].index)

    def set(self, w):
        """w: {block: weight} -> the resident network with those weights."""
        index = [self.blocks.index(self.owners[name]) for name in self.theta_r]
        neon_ext.extrapolate(list(self.theta_r.values()), list(self.theta_s.values()), index,
                             [float(w[b]) for b in self.blocks], out=list(self.net.state_dict().values()))
        return self.net

    def table(self):
        """Per block: tensors, parameters, relative drift ||theta_s - theta_r|| / ||theta_r||."""
        norm = lambda tensors: sum(float(t.double().square().sum()) for t in tensors) ** 0.5
        rows = {}
        for block in self.blocks:
            names = [name for name, owner in self.owners.items() if owner == block]
            r, s = ([theta[name] for name in names] for theta in (self.theta_r, self.theta_s))
            drift = norm(a - b for a, b in zip(s, r)) / norm(r)
            rows[block] = {"tensors": len(r), "parameters": sum(t.numel() for t in r), "drift": drift}
        return rows

    def placebo(self, seed):
        """The same networks cut into random blocks."""
        other = copy.copy(self)
        sizes = {name: r.numel() for name, r in self.theta_r.items()}
        other.owners = placebo_owners(self.owners, sizes, seed)
        return other


# ------------------------------------------------------------ scoring
class Scorer:
    """Fréchet distances of configs on common random numbers; finished ones are read back from grid.jsonl
    (selection seeds) and final.jsonl (final seeds)."""

    def __init__(self, configs, features, reference, settings, out, networks, kimg):
        self.features, self.reference, self.settings, self.out = features, reference, settings, out
        self.networks, self.kimg = networks, kimg
        self.restart(configs)

    def restart(self, configs):
        """Read back what is finished of these configurations; a line that was cut off goes."""
        self.configs, self.key, self.done = configs, key_of(self.networks, configs.owners), {}
        for file in filter(Path.exists, (self.out / name for name in ("grid.jsonl", "final.jsonl"))):
            *lines, rest = file.read_text().split("\n")
            if rest:
                os.truncate(file, file.stat().st_size - len(rest.encode()))
            for row in map(json.loads, lines):
                if (row["key"], row["snapshot"]) == (self.key, self.kimg):
                    self.done[self.name_of(row["w"], row["images"], row["first_seed"])] = row
        return self

    def weights(self, values):
        return {b: round(float(v), 6) for b, v in zip(self.configs.blocks, values)}

    @staticmethod
    def name_of(w, images, first_seed):
        return json.dumps([w, images, int(first_seed)], sort_keys=True)

    @torch.no_grad()
    def score(self, w, seeds, desc=None):
        """{snapshot, w, images, fd, folds, seconds}, precision and recall where the real images are at hand.
        folds: the distance without each of FOLDS seed folds. Appended to its file, never computed twice."""
        name, begin, settings = self.name_of(w, len(seeds), seeds[0]), time.perf_counter(), self.settings
        if name in self.done:
            return self.done[name]
        net = self.configs.set(w)
        found = settings.map_batches(lambda part: self.features(settings.sample(net, part)[0]), seeds, desc)
        row = [None]
        if settings.rank == 0:
            found = torch.cat([f.to(settings.device) for f in found])  # [N, D]
            fd, folds = distances(self.reference.prepared, found)
            row[0] = {"snapshot": self.kimg, "w": w, "images": len(seeds), "first_seed": int(seeds[0]),
                      "fd": fd, "folds": folds}
            if self.reference.real is not None:
                row[0]["precision"], row[0]["recall"] = precision_recall(self.reference.real, found)
            row[0] |= {"seconds": round(time.perf_counter() - begin, 3), "key": self.key}
            with open(self.out / ("final.jsonl" if seeds[0] >= FINAL_SEED else "grid.jsonl"), "a") as file:
                file.write(json.dumps(row[0]) + "\n")
        if settings.world > 1:
            dist.broadcast_object_list(row)
        self.done[name] = row[0]
        return row[0]

    def score_all(self, weights, seeds, desc):
        bar = dict(desc=f"snapshot {self.kimg}: {desc}", leave=False, disable=self.settings.rank > 0)
        return [self.score(w, seeds) for w in tqdm(weights, **bar)]

    def distance_and_gradient(self, w, seeds, rounding=True):
        """Distance at w and its exact gradient [blocks] in the block weights. Pass one: moments; two: every
        batch again, the distance's derivative pulled back through features and sampler to the weights, one
        network call's activations at a time. Rounding to uint8 is passed straight through."""
        net, n, configs, device = self.configs.set(w), len(seeds), self.configs, self.settings.device

        def features_of(part, differentiable):
            latents, labels = draw_latents(net, part, device)
            x = edm_sampler(net, latents, labels, self.settings.steps, differentiable=differentiable)
            x = (x * 127.5 + 128).clip(0, 255)
            return self.features(x + (x.floor() - x).detach() if rounding else x)

        def pull_back(part):
            f = features_of(part, True)
            pull = to_mean / n + 2 * (f.detach().double() - mean) @ to_cov / (n - 1)
            gradients = torch.autograd.grad(f, list(parameters.values()), pull.to(f.dtype))
            total = dict.fromkeys(configs.blocks, 0.0)
            for name, g in zip(parameters, gradients):
                drift = configs.theta_r[name] - configs.theta_s[name]
                total[configs.owners[name]] += float((g.double() * drift).sum())
            return list(total.values())

        with torch.no_grad():
            found = self.settings.map_batches(lambda part: features_of(part, False), seeds)
            mean, cov = neon_ext.feature_moments(torch.cat([f.to(device) for f in found]))
        inputs = mean.clone().requires_grad_(), cov.requires_grad_()
        fd = self.reference.prepared.distance(*inputs)
        to_mean, to_cov = torch.autograd.grad(fd, inputs)
        parameters = dict(net.requires_grad_(True).named_parameters())
        try:
            batch = max(1, self.settings.batch // 2)  # takes several times the memory of sampling
            return fd.item(), np.sum(self.settings.map_batches(pull_back, seeds, batch=batch), axis=0)
        finally:
            net.requires_grad_(False)


def compare(rows, others, level=0.05):
    """Paired difference of distances, mean over the seed sets of `rows` and `others`, and its interval: the
    delete-one-fold jackknife (Student's t) of the difference, as both saw the same noise. better: lower."""
    folds = np.array([np.subtract(a["folds"], b["folds"]) for a, b in zip(rows, others)])  # [sets, FOLDS]
    full = float(np.mean([a["fd"] - b["fd"] for a, b in zip(rows, others)]))
    variance = (FOLDS - 1) / FOLDS * ((folds - folds.mean(1, keepdims=True)) ** 2).sum()
    half = float(scipy.stats.t.ppf(1 - level / 2, len(rows) * (FOLDS - 1)) * variance ** 0.5 / len(rows))
    verdict = "no significant difference" if abs(full) <= half else "better" if full < 0 else "worse"
    return {"difference": full, "low": full - half, "high": full + half, "verdict": verdict}


# ------------------------------------------------------------ search
def race(scorer, weights, seeds, level=0.05):
    """Candidates that a fifth of the seeds does not separate from the leader: intervals of the difference at
    level / candidates, so that the best is dropped with a probability of at most about `level`."""
    rows = scorer.score_all(weights, seeds[:max(2 * FOLDS, len(seeds) // 5)], "race")
    leader = min(rows, key=lambda row: row["fd"])
    return [row["w"] for row in rows if compare([row], [leader], level / len(rows))["low"] <= 0]


def best_of_grid(c, scorer, seeds, desc="grid"):
    """(rows of the grid, the best one); ([], None) if the grid is left to the search."""
    weights = grid_weights(c, scorer.configs.blocks)
    weights = race(scorer, weights, seeds) if c.race and len(weights) > 1 else weights
    rows = scorer.score_all(weights, seeds, desc)
    return rows, min(rows, key=lambda row: row["fd"], default=None)


def search_cobyqa(c, scorer, seeds, start):
    """Derivative-free trust-region search (scipy's COBYQA) from the best global weight."""
    blocks, options = len(scorer.configs.blocks), {"initial_tr_radius": 0.5, "final_tr_radius": 0.01}
    score = lambda x: scorer.score(scorer.weights(x), seeds)["fd"]
    scipy.optimize.minimize(score, np.full(blocks, start), method="COBYQA", bounds=[c.bounds] * blocks,
                            options=options | {"maxfev": c.evaluations})


def search_gradient(c, scorer, seeds, start, lr=0.15, pull=0.02, patience=6):
    """Adam on all block weights from the best global weight: fresh noise at every step and a pull towards the
    start, against overfitting. The running average of the iterates is scored on the selection seeds, which no
    gradient has seen; `patience` steps without gain end it. The state after every step is kept on disk."""
    n, blocks = len(seeds), len(scorer.configs.blocks)
    path = scorer.out / f"search-{key_of(scorer.key, start, n, c.bounds)}.pt"
    w = torch.full([blocks], float(start), dtype=torch.float64)
    optimizer, average, trace = torch.optim.Adam([w], lr=lr, betas=(0.8, 0.95)), w.clone(), []
    if path.exists():
        w[:], average, trace, adam = torch.load(path, weights_only=True)
        optimizer.load_state_dict(adam)
    for step in tqdm(range(len(trace), c.evaluations), desc="gradient search", leave=False):
        if len(trace) - np.argmin([*trace, np.inf]) > patience:
            break
        fd, gradient = scorer.distance_and_gradient(scorer.weights(w), SEARCH_SEED + step * n + np.arange(n))
        w.grad = torch.from_numpy(gradient) + pull * (w - start)
        optimizer.step()
        w.clamp_(*c.bounds)
        average = average + max(1 / (step + 2), 0.3) * (w - average)
        trace.append(scorer.score(scorer.weights(average), seeds)["fd"])
        if scorer.settings.rank == 0:
            state = (w, average, trace, optimizer.state_dict())
            write_atomically(path, partial(torch.save, state))


# ------------------------------------------------------------ one snapshot: grid, search, final comparison
def grid_weights(c, blocks):
    """All products of the grid over the blocks; none beyond MAX_POINTS when a search takes their place."""
    lists = [getattr(c, f"grid_{block}", ()) or c.grid for block in blocks]
    points = np.prod([len(values) for values in lists], dtype=float)
    if points > MAX_POINTS and c.search and not c.placebo:
        return []
    if points > MAX_POINTS and not c.yes:
        advice = "use --search gradient without --placebo, or add --yes"
        raise UserError(f"the grid has {points:.0f} points: {advice}")
    return [dict(zip(blocks, values)) for values in itertools.product(*lists)]


def study(c, scorer, ledger):
    """All scores of one snapshot -> its entry in summary.json, and the weights of the winners."""
    seeds, uniform = ledger["selection"], lambda v: dict.fromkeys(scorer.configs.blocks, float(v))
    values = sorted({-1.0, 0.0, *c.grid, *c.sweep})
    sweep = dict(zip(values, scorer.score_all([uniform(v) for v in values], seeds, "global weight")))
    w_global = min((v for v in values if v != -1), key=lambda v: sweep[v]["fd"])
    winners = {"base": uniform(0), "collapsed": uniform(-1), "global": uniform(w_global)}
    rows, best = best_of_grid(c, scorer, seeds)
    if c.search:
        {"cobyqa": search_cobyqa, "gradient": search_gradient}[c.search](c, scorer, seeds, w_global)
        seen = [r for r in scorer.done.values() if (r["images"], r["first_seed"]) == (len(seeds), seeds[0])]
        winners["searched"] = min(seen, key=lambda row: row["fd"])["w"]
    winners["blockwise"] = best["w"] if best else winners["searched"]
    finals = {}
    for name, w in winners.items():
        finals[name] = [scorer.score(w, s, f"final: {name}") for s in ledger["final"]]
    short = lambda row: {k: row[k] for k in ("w", "fd", "precision", "recall", "seconds") if k in row}
    entry = {"kimg": scorer.kimg, "blocks": scorer.configs.table(), "grid": [short(row) for row in rows],
             "sweep": [short(row) | {"w": v} for v, row in sweep.items()], "placebo": []}
    for name, w in winners.items():
        entry[name] = {"w": w_global if name == "global" else w, "fd": scorer.score(w, seeds)["fd"]}
    entry["final"] = final_comparison(finals)
    for k in range(c.placebo):
        other = copy.copy(scorer).restart(scorer.configs.placebo(k))
        _, best = best_of_grid(c, other, seeds, f"random blocks {k + 1}")
        gain = compare([other.score(best["w"], s) for s in ledger["final"]], finals["global"])
        entry["placebo"].append({"w": best["w"], "fd": best["fd"], "against_global": gain})
    entry["warnings"] = warnings_of(c, entry, scorer.features.dim)
    return entry, winners


def final_comparison(finals):
    """{model: rows of every final seed set} -> mean, all values, standard deviation, paired differences."""
    results = {}
    for name, rows in finals.items():
        values = [row["fd"] for row in rows]
        result = {"w": rows[0]["w"], "images": rows[0]["images"], "all": values}
        for key in [key for key in ("fd", "precision", "recall") if key in rows[0]]:
            result[key] = float(np.mean([row[key] for row in rows]))
        result["std"] = float(np.std(values, ddof=1)) if len(rows) > 1 else None
        for other in {"base": (), "global": ("base",)}.get(name, ("base", "global")):
            result[f"against_{other}"] = compare(rows, finals[other])
        results[name] = result
    return results


def warnings_of(c, entry, dim):
    """What a careful reader would want to know."""
    notes, final = [], entry["final"]
    for block, value in entry["blockwise"]["w"].items() if entry["grid"] else ():
        values = getattr(c, f"grid_{block}", ()) or c.grid
        if len(values) > 1 and value in (values[0], values[-1]):
            notes.append(f"w_{block} = {value:g} lies on the edge of the grid")
    if c.select_images <= dim:
        notes.append(f"{c.select_images} selection images for {dim} features: the covariance is singular")
    for name in [name for name in ("blockwise", "searched") if name in final]:
        against, base = final[name]["against_base"], final["base"]["fd"]
        promised = entry[name]["fd"] / entry["base"]["fd"] - 1  # of the base: sets differ in size, so in bias
        if promised < against["low"] / base:
            notes.append(f"{name} is {-promised:.1%} below the base on the selection seeds and "
                         f"{-against['difference'] / base:.1%} on the final ones: selection noise")
        loss = final["base"].get("precision", 0) - final[name].get("precision", 0)
        if loss > 0.01 and against["difference"] < 0:
            notes.append(f"{name}: precision falls while the distance falls")
    return notes


# ------------------------------------------------------------ stages: base, synthetic set, self-training
def get_base(c, settings):
    """The base network (given, downloaded, or trained from scratch; untrained for a plan) and its hash."""
    if c.base or not c.train_base:
        path = settings.one_by_one(lambda: fetch(BASES.get(c.base or "cond", c.base), "the base network"))
        return load_network(path), file_hash(path)
    if c.preset != "digits" and not c.data:
        raise UserError("--train-base needs --data ZIP or folder of images")
    images, labels = digits_data() if c.preset == "digits" else read_dataset(c.data)
    if labels is None:
        raise UserError(f"{c.data} has no labels, but the network is conditional: add dataset.json")
    (channels, height, width), kimg = images.shape[1:], c.train_base
    model = dict(MODELS[c.preset], dropout=c.dropout, img_resolution=width, img_channels=channels,
                 label_dim=int(labels.max()) + 1)
    if height != width or width % 2 ** (len(model["channel_mult"]) - 1):
        raise UserError(f"{c.data}: {height} x {width} images; the network needs squares it can halve twice")
    plan = dict(name="base", lr=c.base_lr, ramp_kimg=kimg / 20, ema_kimg=kimg / 20, augment=c.augment,
                batch=c.batch, seed=c.seed, ramp_ratio=0.05)
    key = key_of(model, kimg, plan, hashlib.sha256(images.numpy().tobytes()).hexdigest())
    path, state_path = c.out / f"base-{key}.safetensors", c.out / f"base-{key}.pt"
    if not path.exists():
        torch.manual_seed(c.seed)
        net = EDMPrecond(**model)
        if c.plan:
            return net, ""
        train(net, images, labels, plan, settings, state_path, [kimg],
              lambda ema, k: save_network(ema, path, {"trained": plan, "kimg": k}))
    if settings.rank == 0:
        state_path.unlink(missing_ok=True)
    return load_network(path), file_hash(path)


def get_synthetic(c, base, path, settings):
    """Images of the base at seeds 0, 1, ... with their random classes, as an EDM dataset zip."""
    if not path.exists():
        sample = partial(settings.sample, settings.place(base))
        parts = settings.map_batches(sample, np.arange(c.synthetic), "synthetic set")
        if settings.rank == 0:
            labels = torch.cat([y.cpu().argmax(1) for _, y in parts]) if base.label_dim else None
            write_dataset(path, torch.cat([x.cpu() for x, _ in parts]), labels)
        settings.one_by_one()
    return read_dataset(path)


def get_snapshots(c, base, base_hash, settings):
    """{kimg: path} of self-trained networks: existing (--aux) or trained here; a plan trains nothing."""
    if c.aux and not (given := Path(c.aux)).is_dir():
        return {c.snapshot[0]: fetch(c.aux, "the self-trained network")}
    if c.aux:
        files = {f.stem[17:]: f for f in sorted(given.glob("network-snapshot-*.*"))}
        paths = {k: files.get(f"{k:06d}") for k in c.snapshot}
        if not all(paths.values()):
            raise UserError(f"--aux {given} has snapshots {[*files]}, not all of --snapshot {c.snapshot}")
        return paths
    data_key = key_of(base_hash, c.synthetic, c.steps, c.device, c.precision)
    plan = dict(name="self-training", lr=c.lr, ramp_kimg=c.ramp_kimg, augment=c.augment,
                ema_kimg=c.ema_kimg, batch=c.batch, seed=c.seed + 1)
    folder = c.out / f"self-{key_of(data_key, plan, c.dropout)}"
    paths = {k: folder / f"network-snapshot-{k:06d}.safetensors" for k in c.snapshot}
    if not c.plan and not all(path.exists() for path in paths.values()):
        images, labels = get_synthetic(c, base, c.out / f"synthetic-{data_key}.zip", settings)
        folder.mkdir(exist_ok=True)
        net = EDMPrecond(**dict(base.config, dropout=c.dropout))
        net.load_state_dict(base.state_dict())
        recipe = {"base_sha256": base_hash, "synthetic": data_key, "training": plan}
        train(net, images, labels, plan, settings, folder / "training-state.pt", c.snapshot,
              lambda ema, k: save_network(ema, paths[k], recipe | {"kimg": k}))
        if not all(path.exists() for path in paths.values()):
            raise UserError(f"the saved training in {folder} is already past one of --snapshot {c.snapshot}: "
                            "delete its training-state.pt to train again from the base")
    return paths


def seed_ledger(c):
    """Disjoint seeds for synthetic, selection and final sets; overlap is refused, the paper's announced."""
    paper, n = c.protocol == "paper", c.final_images
    sets = {"synthetic": (0, c.synthetic), "selection": (0 if paper else SELECT_SEED, c.select_images)}
    sets |= {f"final {r + 1}": (FINAL_SEED + r * n, n) for r in range(c.final_repeats)}
    sets = {name: np.arange(first, first + count) for name, (first, count) in sets.items()}
    for (a, x), (b, y) in itertools.combinations(sets.items(), 2):
        if x[0] <= y[-1] and y[0] <= x[-1] and not (paper and (a, b) == ("synthetic", "selection")):
            raise UserError(f"seeds of the {a} set ({x[0]}-{x[-1]}) and the {b} set ({y[0]}-{y[-1]}) "
                            "overlap: fewer --synthetic or --select-images")
    if paper:
        print("--protocol paper: selection seeds 0-1999 overlap the synthetic training set, and 2,000 images "
              "are fewer than 2,048 features: the covariance is singular")
    return {"selection": sets["selection"], "final": list(sets.values())[2:]}


# ------------------------------------------------------------ report
def write_report(summary, out):
    """summary.json and table.md; the terminal gets the table."""
    interval = lambda d: f"{d['difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
    head = ["snapshot (kimg)", "model", "w", f"selection {summary['score']}", "final", "against base (95%)",
            "verdict", "precision", "recall"]
    rows, notes = [head, ["---"] * len(head)], []
    for entry in summary["snapshots"]:
        gains = {}
        for name, final in entry["final"].items():
            w, against = final["w"], final.get("against_base")
            listed = ", ".join(f"{b} {v:.3g}" for b, v in w.items())
            cells = [entry["kimg"], name, f"{w[min(w)]:g}" if len(set(w.values())) == 1 else listed,
                     f"{entry[name]['fd']:.4f}",
                     f"{final['fd']:.4f}" + ("" if final["std"] is None else f" +- {final['std']:.4f}"),
                     interval(against) if against else "", against["verdict"] if against else "",
                     *(f"{final[k]:.3f}" if k in final else "" for k in ("precision", "recall"))]
            rows.append(map(str, cells))
            if name in ("blockwise", "searched"):
                gains[name] = final["against_global"]
        gains |= {f"random blocks {k + 1}": p["against_global"] for k, p in enumerate(entry["placebo"])}
        notes += [f"Snapshot {entry['kimg']}: {name} against global {interval(d)}: {d['verdict']}."
                  for name, d in gains.items()]
        notes += [f"Warning, snapshot {entry['kimg']}: {note}." for note in entry["warnings"]]
    notes += [f"Floor at {f['images']} images: two disjoint samples of the real data are {f['fd']:.4f} apart."
              for f in summary["floors"]]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\n" + "\n\n".join(notes)
    print("\n" + text)
    write_atomically(out / "table.md", text + "\n")
    write_atomically(out / "summary.json", json.dumps(summary, indent=1, default=str))


def plot_scores(plt, summary):
    """The paper's figures 3 (score against snapshot) and 1 (score, precision and recall against global w)."""
    (scores, sweep, precisions), entries = plt.subplots(1, 3, figsize=(15, 4))[1], summary["snapshots"]
    for name in [name for name in entries[0]["final"] if name != "collapsed"]:
        points = [(e["kimg"], e["final"][name]["fd"]) for e in entries]
        scores.plot(*zip(*points), "o-", label=name)
    for e, key in itertools.product(entries, ("fd", "precision", "recall")):
        points = [(p["w"], p[key]) for p in e["sweep"] if key in p]
        axis = sweep if key == "fd" else precisions
        axis.plot(*zip(*points), "o-", label=f"{key}, {e['kimg']} kimg") if points else None
    scores.set(xlabel="self-training (kimg)", ylabel=f"final {summary['score']}")
    sweep.set(xlabel="w, all blocks", ylabel=f"selection {summary['score']}")
    precisions.set(xlabel="w, all blocks")
    for axis in (scores, sweep, precisions):
        axis.legend() if axis.lines else None


def plot_grid(plt, rows):
    """Heat maps over the first and last block, one for each weight of the middle one."""
    first, middle, last = rows[0]["w"]
    x, columns, y = (sorted({row["w"][b] for row in rows}) for b in (last, middle, first))
    table = {tuple(row["w"].values()): row["fd"] for row in rows}
    figure, axes = plt.subplots(1, len(columns), figsize=(4 * len(columns), 3.5), squeeze=False)
    limits = dict(vmin=min(table.values()), vmax=max(table.values()))
    for axis, m in zip(axes[0], columns):
        image = axis.imshow([[table.get((a, m, b), np.nan) for b in x] for a in y], **limits)
        axis.set(xlabel=f"w_{last}", ylabel=f"w_{first}", title=f"w_{middle} = {m:g}", xticks=range(len(x)),
                 xticklabels=x, yticks=range(len(y)), yticklabels=y)
    figure.colorbar(image, ax=axes[0].tolist())


def plot_samples(plt, pictures):
    """One image grid per model, all from the same noise."""
    _, axes = plt.subplots(1, len(pictures), figsize=(3 * len(pictures), 3.2))
    for axis, (name, images) in zip(axes, pictures.items()):
        rows = [torch.cat(list(row), 2) for row in images.split(6)]
        axis.imshow(torch.cat(rows, 1).permute(1, 2, 0).squeeze(2).numpy(), cmap="gray")
        axis.set(title=name, xticks=[], yticks=[])


def plot_report(summary, samples, out):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figures = {"scores.png": (plot_scores, summary)}
    for entry in summary["snapshots"]:
        figures[f"samples_{entry['kimg']:06d}.png"] = plot_samples, samples[entry["kimg"]]
        if len(entry["blocks"]) == 3 and entry["grid"]:
            figures[f"grid_{entry['kimg']:06d}.png"] = plot_grid, entry["grid"]
    for name, (plot, data) in figures.items():
        plot(plt, data)
        write_atomically(out / name, partial(plt.savefig, dpi=80, bbox_inches="tight"))
        plt.close()


# ------------------------------------------------------------ command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(argv):
    """Command line -> Config: the class's defaults, then the preset's, then what is given."""
    parser = Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        how = {key: value for key, value in f.metadata.items() if value is not None}
        how = dict(action="store_true", help=how["help"]) if how["type"] is bool else how
        how["help"] += f" (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), **how)
    joined = []
    for arg in argv:  # argparse takes the -1:2:0.25 of "--sweep -1:2:0.25" for an option
        if joined and re.match(r"-[\d.]", arg):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    given = vars(parser.parse_args(joined))
    preset = given.get("preset", "cifar10")
    paper = {"select_images": 2000} if given.get("protocol") == "paper" else {}
    return checked(Config(**{"out": Path(f"runs/{preset}"), **PRESETS[preset], **given, **paper}))


def checked(c):
    """The configuration if it can run here; creates its folder."""
    if min(c.synthetic, c.select_images, c.final_images) < 2 * FOLDS or min(
            *c.snapshot, c.sample_batch, c.batch, c.steps, c.evaluations, c.final_repeats, c.placebo + 1) < 1:
        raise UserError(f"--snapshot, batches and counts must be at least 1, images at least {2 * FOLDS}")
    if len(c.bounds) != 2:
        raise UserError("--bounds: give two numbers, low,high")
    if c.placebo and c.partition == "layers":
        raise UserError("--placebo draws random blocks of several layers: use another --partition")
    if neon_ext is None:
        raise UserError("neon_ext is not built: run `pip install --no-build-isolation .` here first")
    if c.device == "cuda" and not (torch.cuda.is_available() and neon_ext.build_config()["cuda"]):
        raise UserError("--device cuda: no usable GPU, or neon_ext was built without CUDA; use --device cpu")
    if c.partition in ("paper", "structural"):
        grid_weights(c, ("enc", "mid", "dec"))
    with reading(f"--out {c.out} cannot be written, choose another folder"):
        c.out.mkdir(parents=True, exist_ok=True)
        if not os.access(c.out, os.W_OK):
            raise PermissionError("no permission")
    return c


def make_settings(c):
    """Settings of this process; starts torch.distributed under torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if c.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if c.device == "cuda" else "gloo")
    if c.preset == "digits":
        torch.set_num_threads(1)  # 8 x 8 images: one thread trains faster than two
        torch.empty(2**22)  # freeing 16 MB raises glibc's mmap threshold: no page faults for every activation
    return Settings(c.device, c.sample_batch, c.steps, c.precision, rank, world)


def seconds_per_image(net, settings):
    """Sampling time of one image, from one short batch; on the CPU with the faster of one and all threads."""
    cpu, best = settings.device == "cpu", (math.inf, torch.get_num_threads())
    batch = 2 if cpu and net.img_resolution >= 32 else 32
    x, labels = draw_latents(net, range(batch), settings.device)
    for threads in [1, best[1]] * 2 if cpu else [1] * 3:
        torch.set_num_threads(threads) if cpu else None
        begin = time.perf_counter()
        with torch.no_grad():
            float(net(x, torch.ones(1, device=x.device), labels).sum())
        best = min(best, (time.perf_counter() - begin, threads))
    torch.set_num_threads(best[1]) if cpu else None
    return best[0] / batch * (2 * settings.steps - 1)


def print_plan(c, configs, seconds, trained):
    print(f"{'block':<24}{'tensors':>8}{'parameters':>12}  drift ||theta_s - theta_r|| / ||theta_r||")
    for block, row in configs.table().items():
        drift = f"{row['drift']:.5f}" if trained else "not trained yet"
        print(f"{block:<24}{row['tensors']:>8}{row['parameters']:>12}  {drift}")
    scores = len(grid_weights(c, configs.blocks)) * (1 + c.placebo) + len({-1.0, 0.0, *c.grid, *c.sweep})
    scores += c.evaluations * {"": 0, "cobyqa": 1, "gradient": 6}[c.search]
    finals = (4 + bool(c.search) + c.placebo) * c.final_repeats
    hours = (scores * c.select_images + finals * c.final_images) * seconds / 3600
    print(f"about {scores} scores of {c.select_images} images and {finals} final ones of {c.final_images}: "
          f"{hours:.2f} hours on this {c.device}")


def refuse_hours(c, settings):
    """CIFAR-10 without a GPU only on request: it says how long it would take."""
    if c.device == "cpu" and c.preset == "cifar10" and not (c.yes or c.plan):
        images = 30 * c.select_images + 4 * c.final_images * c.final_repeats + c.synthetic
        hours = seconds_per_image(EDMPrecond(**MODELS["cifar10"]).eval(), settings) * images / 3600
        raise UserError(f"without a GPU this takes about {hours:.0f} hours of sampling alone: add --yes "
                        "to run it all the same, or try --preset digits")


def save_merged(c, configs, w, kimg, parents):
    """The repaired network with its recipe, and on request as a plain state dict."""
    path = c.out / f"adaptive-neon-{kimg:06d}.safetensors"
    save_network(configs.set(w), path, {"w": w, "partition": c.partition, **parents})
    if c.export_pt:
        state = {name: tensor.cpu() for name, tensor in configs.net.state_dict().items()}
        write_atomically(path.with_suffix(".pt"), partial(torch.save, state))


def run(argv):
    begin, c = time.perf_counter(), parse(argv)
    settings, ledger = make_settings(c), seed_ledger(c)
    refuse_hours(c, settings)
    base, base_hash = get_base(c, settings)
    if c.preset == "digits" and (base.img_resolution, base.img_channels) != (8, 1):
        raise UserError("--preset digits needs a base of 8 x 8 grey images: use --preset cifar10 for others")
    snapshots = get_snapshots(c, base, base_hash, settings)
    seconds = seconds_per_image(settings.place(base), settings)
    owners = {name: block_of(name, base, c.partition) for name in base.state_dict()}
    if c.plan:
        for path in snapshots.values() if settings.rank == 0 else ():
            aux = load_network(path) if path.exists() else base
            print_plan(c, Configurations(base, aux, owners, settings), seconds, path.exists())
        return
    features, reference = settings.one_by_one(lambda: get_reference(c))
    entries, samples = [], {}
    for kimg, path in sorted(snapshots.items()):
        configs = Configurations(base, load_network(path), owners, settings)
        parents = {"base_sha256": base_hash, "aux_sha256": file_hash(path)}
        networks = key_of(parents, reference.facts, c.steps, c.precision, c.device)
        scorer = Scorer(configs, features, reference, settings, c.out, networks, kimg)
        entry, winners = study(c, scorer, ledger)
        entries.append(entry)
        samples[kimg] = {name: settings.sample(configs.set(w), ledger["final"][0][:36])[0].cpu()
                         for name, w in winners.items()}
        if settings.rank == 0:
            save_merged(c, configs, winners["blockwise"], kimg, parents)
    if settings.rank > 0:
        return
    most = 0 if reference.real is None else len(reference.real) // 2
    counts = sorted({min(c.select_images, most), min(c.final_images, most)} - {0})
    summary = {
        "command": " ".join(["python edm_neon.py", *argv]), "config": dataclasses.asdict(c),
        "score": "FD (digits CNN, 64-d)" if c.preset == "digits" else "FID", "reference": reference.facts,
        "snapshots": entries, "floors": [reference.floor(n) for n in counts], "seconds_per_image": seconds,
        "first_seeds": {"selection": ledger["selection"][0], "final": [s[0] for s in ledger["final"]]},
        "machine": torch.cuda.get_device_name() if c.device == "cuda" else f"{os.cpu_count()} cores",
        "threads": torch.get_num_threads(), "world": settings.world, "neon_ext": neon_ext.build_config(),
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, np)},
        "seconds_total": time.perf_counter() - begin}
    write_report(summary, c.out)
    plot_report(summary, samples, c.out)
    print(f"\n{summary['seconds_total']:.1f} s; summary.json, table.md, grid.jsonl, pictures in {c.out}")


def main(argv=None):
    message = None
    try:
        run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        message, code = error, 2
    except OSError as error:
        message, code = f"{error}; what was finished stays", 2
    except KeyboardInterrupt:
        message, code = "stopped; finished parts are kept, the same command goes on", 130
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    if message is not None:
        print(f"edm_neon: {message}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
