"""Adaptive NEON on EDM: repair a diffusion model that was trained on its own samples, block by block.

    theta = theta_r - w_block * (theta_s - theta_r)      w > 0 away from collapse, w < 0 towards it, w = -1 is theta_s

theta_r: the base network (EDM, arXiv 2206.00364); theta_s: its EMA after self-training on its own samples (NEON, arXiv
2510.03597); blocks: encoder, middle, decoder of the U-Net (Adaptive NEON, section 4.2). All configurations of a grid see
the same starting noise and labels; selection and final comparison use disjoint seeds.

    python edm_neon.py --preset digits --snapshot 5 --grid 0.5,1.0,1.5     laptop, nothing to download, minutes
    python edm_neon.py --snapshot 1551 --grid 0.75,1.0,1.25                CIFAR-10: a GPU and a connection
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
import os
import pickle
import pickletools
import platform
import sys
import threading
import time
import urllib.request
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import safetensors.torch
import scipy.optimize
import scipy.stats
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

try:
    import neon_ext
except ImportError:  # reported in main(), in one line
    neon_ext = None

EDM = "https://nvlabs-fi-cdn.nvidia.com/edm"
BASES = {"cond": f"{EDM}/pretrained/edm-cifar10-32x32-cond-vp.pkl",
         "uncond": f"{EDM}/pretrained/edm-cifar10-32x32-uncond-vp.pkl"}
REFERENCE = f"{EDM}/fid-refs/cifar10-32x32.npz"
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")
FOLDS = 20  # of the moments: jackknife intervals need no new samples


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


@dataclass(frozen=True)
class Preset:
    """Settings of one experiment; the defaults are NEON's for CIFAR-10 at the paper's batch of 64. kimg: 1000 images."""
    name: str = "cifar10"
    model: dict = dataclasses.field(default_factory=lambda: dict(
        img_resolution=32, img_channels=3, label_dim=10, augment_dim=9, model_channels=128, channel_mult=[2, 2, 2],
        num_blocks=4, attn_resolutions=[16], dropout=0.13))
    train_kimg: float = 200_000
    base_lr: float = 1e-3
    synthetic: int = 6000
    steps: int = 18
    batch: int = 64
    self_lr: float = 1e-4
    ramp_kimg: float = 10_000      # learning rate grows linearly over this many
    ema_kimg: float = 500          # half-life
    augment: float = 0.12
    select_images: int = 10_000
    final_images: int = 50_000
    final_seed: int = 50_000
    score: str = "FID"
    sample_batch: int = 256


PRESETS = {
    "cifar10": Preset(),
    "digits": Preset(name="digits", model=dict(
        img_resolution=8, img_channels=1, label_dim=10, augment_dim=0, model_channels=16, channel_mult=[1, 2],
        num_blocks=1, attn_resolutions=[4], dropout=0.0), train_kimg=100, base_lr=3e-3, synthetic=1000, steps=18,
        self_lr=5e-4, ramp_kimg=0, ema_kimg=0.5, augment=0, select_images=1000, final_images=1500, final_seed=50_000,
        score="FD (digits CNN, 64-d)", sample_batch=250)}


# ---------------------------------------------------------------- network: EDM's DDPM++ and NCSN++, names as in EDM
class Conv(nn.Module):
    """2-D convolution with optional resampling by a small filter before it (fused: after it, NCSN++'s residual path)."""

    def __init__(self, into, out, kernel, up=False, down=False, resample_filter=(1, 1), fused=False, gain=1.0):
        super().__init__()
        self.up, self.down, self.fused, self.simple = up, down, fused, list(resample_filter) == [1, 1]
        bound = gain * (6 / ((into + out) * kernel**2)) ** 0.5  # xavier_uniform
        self.weight = nn.Parameter((torch.rand(out, into, kernel, kernel) * 2 - 1) * bound)
        self.bias = nn.Parameter(torch.zeros(out))
        f = torch.as_tensor(resample_filter, dtype=torch.float32)
        self.register_buffer("resample_filter", (f[:, None] * f / f.sum() ** 2)[None, None] if up or down else None)

    def forward(self, x):
        pad, f = self.weight.shape[-1] // 2, self.resample_filter
        if f is None:
            return F.conv2d(x, self.weight, self.bias, padding=pad)
        f_pad = (f.shape[-1] - 1) // 2
        depthwise = lambda channels: f.to(x.dtype).expand(channels, 1, -1, -1)
        if self.fused:
            x = F.conv2d(x, self.weight, padding=pad + f_pad)
            return F.conv2d(x, depthwise(x.shape[1]), self.bias, stride=2, groups=x.shape[1])
        if self.simple:
            x = F.interpolate(x, scale_factor=2) if self.up else F.avg_pool2d(x, 2)
        elif self.up:
            x = F.conv_transpose2d(x, depthwise(x.shape[1]) * 4, stride=2, padding=f_pad, groups=x.shape[1])
        else:
            x = F.conv2d(x, depthwise(x.shape[1]), stride=2, padding=f_pad, groups=x.shape[1])
        return F.conv2d(x, self.weight, self.bias, padding=pad)


def linear(into, out, bias=True):
    layer = nn.Linear(into, out, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class UNetBlock(nn.Module):
    """Residual block with noise embedding, optional resampling and single-head self-attention."""

    def __init__(self, into, out, emb, dropout, up=False, down=False, attention=False, resample_filter=(1, 1)):
        super().__init__()
        self.dropout, resample = dropout, dict(up=up, down=down, resample_filter=resample_filter)
        self.norm0, self.conv0 = group_norm(into), Conv(into, out, 3, **resample)
        self.affine, self.norm1, self.conv1 = linear(emb, out), group_norm(out), Conv(out, out, 3, gain=1e-5)
        self.skip = Conv(into, out, 1, **resample) if into != out or up or down else None
        self.norm2 = group_norm(out) if attention else None
        if attention:
            self.qkv, self.proj = Conv(out, 3 * out, 1, gain=0.2 ** 0.5), Conv(out, out, 1, gain=1e-5)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(emb)[:, :, None, None]
        h = self.conv1(F.dropout(F.silu(self.norm1(h)), self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * 0.5 ** 0.5
        if self.norm2 is not None:
            n, c, height, width = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(n, 1, c, 3, height * width)  # q, k, v interleaved along channels
            q, k, v = (t.transpose(-1, -2) for t in qkv.unbind(3))  # [N, 1, HW, C]
            a = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)
            x = (self.proj(a) + x) * 0.5 ** 0.5
        return x


class SongUNet(nn.Module):
    """DDPM++ (positional embedding, standard encoder) and NCSN++ (Fourier embedding, residual encoder)."""

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=128,
                 channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,), dropout=0.10,
                 label_dropout=0, embedding_type="positional", channel_mult_noise=1, encoder_type="standard",
                 decoder_type="standard", resample_filter=(1, 1)):
        super().__init__()
        if encoder_type not in ("standard", "residual") or decoder_type != "standard":
            raise UserError(f"encoder {encoder_type!r} with decoder {decoder_type!r} is not supported (no published network)")
        noise, emb = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        self.label_dropout, self.noise = label_dropout, noise
        if embedding_type == "fourier":
            self.map_noise = nn.Module()
            self.map_noise.register_buffer("freqs", torch.randn(noise // 2) * 16)
        else:
            self.map_noise = None
        self.map_label = linear(label_dim, noise) if label_dim else None
        self.map_augment = linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = linear(noise, emb), linear(emb, emb)
        block = lambda into, out, **kwargs: UNetBlock(into, out, emb, dropout, resample_filter=resample_filter, **kwargs)
        self.enc, self.dec, skips, c = nn.ModuleDict(), nn.ModuleDict(), [], in_channels
        for level, mult in enumerate(channel_mult):
            r = img_resolution >> level
            if level == 0:
                c = model_channels
                self.enc[f"{r}x{r}_conv"] = Conv(in_channels, c, 3)
            else:
                self.enc[f"{r}x{r}_down"] = block(c, c, down=True)
                if encoder_type == "residual":
                    aux = in_channels if level == 1 else aux_out
                    self.enc[f"{r}x{r}_aux_residual"] = Conv(aux, c, 3, down=True, resample_filter=resample_filter, fused=True)
                    aux_out = c
            skips.append(c)
            for i in range(num_blocks):
                self.enc[f"{r}x{r}_block{i}"] = block(c, model_channels * mult, attention=r in attn_resolutions)
                c = model_channels * mult
                skips.append(c)
        for level, mult in reversed(list(enumerate(channel_mult))):
            r = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{r}x{r}_in0"], self.dec[f"{r}x{r}_in1"] = block(c, c, attention=True), block(c, c)
            else:
                self.dec[f"{r}x{r}_up"] = block(c, c, up=True)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and r in attn_resolutions
                self.dec[f"{r}x{r}_block{i}"] = block(c + skips.pop(), model_channels * mult, attention=attention)
                c = model_channels * mult
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = group_norm(c)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = Conv(c, out_channels, 3, gain=1e-5)

    def embed(self, c_noise, labels, augment_labels):
        if self.map_noise is None:
            half = self.noise // 2
            frequency = (1 / 10000) ** (torch.arange(half, dtype=torch.float32, device=c_noise.device) / (half - 1))
        else:
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
    """D(x; sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4): the denoised image (EDM, table 1). x [N, C, H, W] float32."""

    def __init__(self, img_resolution, img_channels, label_dim=0, sigma_min=0, sigma_max=float("inf"), sigma_data=0.5,
                 **model):
        super().__init__()
        self.config = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, **model)
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.model = SongUNet(img_resolution, img_channels, img_channels, label_dim=label_dim, **model)
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


# ---------------------------------------------------------------- reading networks: pickles are parsed, never run
class Inert:
    """An object of the pickle as plain data: EDM's persistent objects and torch's containers."""

    def __init__(self, meta=None):
        self.class_name, self.state = (meta or {}).get("class_name"), (meta or {}).get("state", {})

    def __setstate__(self, state):
        self.state = state


class InertDtype:
    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, state):
        pass


def inert_scalar(dtype, data):
    if dtype.name not in ("f4", "f8", "i4", "i8"):
        raise pickle.UnpicklingError(f"numpy dtype {dtype.name!r}")
    return np.frombuffer(data, dtype.name)[0].item()


def inert_tensor(storage, offset, size, stride, *_):
    if min([offset, *size, *stride]) < 0 or len(size) != len(stride) or (
            0 not in size and offset + sum((n - 1) * s for n, s in zip(size, stride)) >= storage.numel()):
        raise pickle.UnpicklingError(f"a tensor {tuple(size)} outside its storage of {storage.numel()} elements")
    return storage.as_strided(tuple(size), tuple(stride), offset)


STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "DoubleStorage": torch.float64,
            "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool, "ByteStorage": torch.uint8}


def inert_storage(blob):
    """torch's legacy serialisation of one storage: five pickles, an element count, the raw elements."""
    file = io.BytesIO(blob)
    magic, protocol, _, (_, dtype, _, _, count, _), _ = (SafeUnpickler(file).load() for _ in range(5))
    rest = memoryview(blob)[file.tell() + 8:]
    if magic != 0x1950a86a20f9469cfc6c or protocol != 1001 or len(rest) != count * dtype.itemsize:
        raise pickle.UnpicklingError(f"a damaged tensor storage ({len(rest)} bytes for {count} elements)")
    return torch.frombuffer(bytearray(rest), dtype=dtype) if count else torch.empty(0, dtype=dtype)


class SafeUnpickler(pickle.Unpickler):
    ALLOWED = {("torch_utils.persistence", "_reconstruct_persistent_obj"): Inert,
               ("collections", "OrderedDict"): OrderedDict, ("dnnlib.util", "EasyDict"): OrderedDict,
               ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
               ("torch._utils", "_rebuild_tensor_v2"): inert_tensor, ("torch.storage", "_load_from_bytes"): inert_storage,
               ("numpy", "dtype"): InertDtype, ("numpy.core.multiarray", "scalar"): inert_scalar,
               ("numpy._core.multiarray", "scalar"): inert_scalar,
               **{("torch.nn.modules.container", name): Inert for name in ("ModuleDict", "ModuleList", "Sequential")},
               **{("torch", name): dtype for name, dtype in STORAGES.items()}}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
        return self.ALLOWED[module, name]

    def persistent_load(self, pid):
        if not (isinstance(pid, tuple) and len(pid) == 6 and pid[0] == "storage" and isinstance(pid[1], torch.dtype)):
            raise pickle.UnpicklingError("a persistent id that is no tensor storage")
        return pid


def read_pickle(path):
    """EDM's network-snapshot as inert data: the dict of the file, with Inert objects in place of modules."""
    data = Path(path).read_bytes()
    try:
        for opcode, arg, _ in pickletools.genops(io.BytesIO(data)):  # refuse what could allocate beyond the file's size
            if opcode.name == "BYTEARRAY8" or opcode.name.startswith("EXT") or (
                    opcode.name.endswith("PUT") and int(arg) > len(data)):
                raise pickle.UnpicklingError(f"opcode {opcode.name}")
        return SafeUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused, nothing in it was run: {error}") from None
    except Exception as error:
        raise UserError(f"{path} is not a readable network pickle ({type(error).__name__}): is it truncated?") from None


def inert_tensors(module, prefix=""):
    """(name, tensor) of an inert module tree, in state-dict order."""
    for group in ("_parameters", "_buffers"):
        for name, tensor in (module.state.get(group) or {}).items():
            if tensor is not None:
                yield prefix + name, tensor
    for name, child in (module.state.get("_modules") or {}).items():
        if child is not None:
            yield from inert_tensors(child, f"{prefix}{name}.")


def network_from_pickle(path):
    content = read_pickle(path)
    ema = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(ema, Inert) or "_init_kwargs" not in ema.state:
        raise UserError(f"{path} holds no EDM network under 'ema'")
    kwargs = dict(ema.state["_init_kwargs"])
    inner = (ema.state.get("_modules") or {}).get("model")
    if ema.class_name != "EDMPrecond" or kwargs.pop("model_type", "DhariwalUNet") != "SongUNet" or inner is None:
        raise UserError(f"{path}: {ema.class_name} around {getattr(inner, 'class_name', None)} is not supported; "
                        "EDMPrecond around SongUNet (DDPM++, NCSN++) is")
    kwargs.pop("use_fp16", None)
    try:
        net = EDMPrecond(**kwargs)
    except TypeError as error:
        raise UserError(f"{path}: unknown network option ({error})") from None
    return load_tensors(net, OrderedDict(inert_tensors(ema)), path)


def load_tensors(net, tensors, path):
    own = net.state_dict()
    for name in [*own, *tensors]:
        theirs = tuple(tensors[name].shape) if name in tensors else None
        ours = tuple(own[name].shape) if name in own else None
        if ours != theirs:
            raise UserError(f"{path}: {name} has shape {theirs}, the network expects {ours}")
        if not tensors[name].isfinite().all():
            raise UserError(f"{path}: {name} has weights that are not finite")
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


def load_network(path):
    """EDM .pkl (parsed, never run) or our .safetensors -> EDMPrecond in eval mode on the CPU, float32."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"network {path} does not exist")
    if path.suffix != ".safetensors":
        return network_from_pickle(path)
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["config"])
        tensors = safetensors.torch.load_file(path)
    except Exception as error:
        raise UserError(f"{path} is not a network of this program ({type(error).__name__}: {error})") from None
    return load_tensors(EDMPrecond(**config), tensors, path)


def save_network(net, path, recipe):
    metadata = {"config": json.dumps(net.config), "recipe": json.dumps(recipe)}
    tensors = {name: tensor.float().contiguous() for name, tensor in net.state_dict().items()}
    write_atomically(path, lambda p: safetensors.torch.save_file(tensors, p, metadata))


# ---------------------------------------------------------------- files and downloads
def write_atomically(path, write):
    """write(temporary path), then rename: an interrupted run leaves the old file or the new one."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def key_of(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:10]


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(source, what, sha256_start=""):
    """A path as it is; a URL through the cache (NEON_CACHE), resumed where it stopped and checked."""
    if not str(source).startswith(("http://", "https://")):
        if not Path(source).exists():
            raise UserError(f"{what} {source} does not exist")
        return Path(source)
    cache = Path(os.environ.get("NEON_CACHE", Path.home() / ".cache/adaptive-neon"))
    target = cache / str(source).rsplit("/", 1)[1]
    if target.exists():
        return target
    part = target.with_name(target.name + ".part")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(source, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=30) as answer, \
                open(part, "ab" if answer.status == 206 else "wb") as file:
            size = int(answer.headers.get("Content-Length", 0))
            with tqdm(total=size, unit="B", unit_scale=True, desc=target.name) as bar:
                while chunk := answer.read(1 << 20):
                    bar.update(file.write(chunk))
    except OSError as error:
        raise UserError(f"cannot download {what} from {source} ({error}): put the file at {target}; --preset digits "
                        "needs no download") from None
    if not file_hash(part).startswith(sha256_start):
        part.unlink()
        raise UserError(f"{what} from {source} is damaged (its SHA-256 does not begin with {sha256_start}): run again")
    os.replace(part, target)
    return target


# ---------------------------------------------------------------- image data
def digits_data():
    """scikit-learn's 1797 digits: uint8 [N, 1, 8, 8], int64 labels."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * 255 / 16).astype(np.uint8))[:, None]
    return images, torch.from_numpy(digits.target.astype(np.int64))


def read_dataset(path):
    """EDM dataset (zip or folder of PNGs with dataset.json) -> uint8 [N, C, H, W], int64 labels [N] or None."""
    path = Path(path)
    try:
        archive = zipfile.ZipFile(path) if path.is_file() else None
        names = archive.namelist() if archive else [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]
        read = archive.read if archive else lambda name: (path / name).read_bytes()
        names = sorted(n for n in names if n.lower().endswith((".png", ".jpg", ".jpeg")))
        arrays = [np.asarray(PIL.Image.open(io.BytesIO(read(name)))) for name in names]
        labels = json.loads(read("dataset.json"))["labels"] if archive is None and (path / "dataset.json").exists() or (
            archive and "dataset.json" in archive.namelist()) else None
        images = torch.from_numpy(np.stack([a if a.ndim == 3 else a[:, :, None] for a in arrays])).permute(0, 3, 1, 2)
        table = {name.replace("\\", "/"): label for name, label in labels or []}
        return images.contiguous(), torch.tensor([table[name] for name in names]) if labels else None
    except (OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise UserError(f"dataset {path} cannot be read ({type(error).__name__}: {error})") from None


def write_dataset(path, images, labels):
    """uint8 [N, C, H, W] and labels -> EDM dataset zip, stored uncompressed."""
    def write(temporary):
        with zipfile.ZipFile(temporary, "w") as archive:
            index = []
            for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
                buffer, name = io.BytesIO(), f"{i // 1000:05d}/img{i:08d}.png"
                PIL.Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(buffer, "png", compress_level=0)
                archive.writestr(zipfile.ZipInfo(name), buffer.getvalue())
                index.append([name, int(labels[i])])
            archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": index if len(labels) else None}))
    write_atomically(path, write)


# ---------------------------------------------------------------- sampling
def sigma_steps(net, num_steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's time steps [num_steps + 1] float64, ending in 0 (equation 5)."""
    low, high = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    steps = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([net.round_sigma(steps), torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def edm_sampler(net, latents, class_labels=None, num_steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0, S_churn=0.0,
                S_min=0.0, S_max=float("inf"), S_noise=1.0, randn=torch.randn_like):
    """Heun's second-order sampler (EDM, algorithm 2). latents [N, C, H, W] -> images in [-1, 1], float64."""
    t = sigma_steps(net, num_steps, sigma_min, sigma_max, rho).to(latents.device)
    denoise = lambda x, sigma: net(x.float(), sigma, class_labels).double()
    x = latents.double() * t[0]
    for i in range(num_steps):
        gamma = min(S_churn / num_steps, 2 ** 0.5 - 1) if S_min <= t[i] <= S_max else 0.0
        t_hat = t[i] * (1 + gamma)
        if gamma > 0:
            x = x + (t_hat**2 - t[i]**2).sqrt() * S_noise * randn(x)
        d = (x - denoise(x, t_hat)) / t_hat
        ahead = x + (t[i + 1] - t_hat) * d
        if i < num_steps - 1:
            d = (d + (ahead - denoise(ahead, t[i + 1])) / t[i + 1]) / 2
        x = x + (t[i + 1] - t_hat) * d
    return x


def draw_latents(net, seeds, device):
    """One generator per seed, as EDM: latents [N, C, H, W] float32 and one-hot labels [N, label_dim] (or None)."""
    latents, labels = [], []
    for seed in seeds:
        generator = torch.Generator(device).manual_seed(int(seed) % 2**32)
        latents.append(torch.randn(net.img_channels, net.img_resolution, net.img_resolution, generator=generator,
                                   device=device))
        if net.label_dim:
            labels.append(torch.randint(net.label_dim, [], generator=generator, device=device))
    if not net.label_dim:
        return torch.stack(latents), None
    return torch.stack(latents), F.one_hot(torch.stack(labels), net.label_dim).float()


def to_uint8(images):
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)  # truncates, as EDM


def sample_batches(net, seeds, settings, desc=None):
    """uint8 images and labels, batch by batch; this rank's share of the seeds."""
    mine = [s for s in np.array_split(np.asarray(seeds), max(1, -(-len(seeds) // settings.batch)))][settings.rank::settings.world]
    for part in tqdm(mine, desc=desc, leave=False, disable=desc is None or settings.rank > 0):
        latents, labels = draw_latents(net, part, settings.device)
        images = edm_sampler(settings.call(net), latents, labels, settings.steps)
        if not images.isfinite().all():
            raise UserError("the sampler gave images that are not finite: are the weights sound?")
        yield part, to_uint8(images), labels


# ---------------------------------------------------------------- augmentation (EDM, appendix F.2): nine labels
SYM6 = [0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
        0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
        0.0017677118642428036, -0.007800708325034148]


def matrix(rows, n, device):
    """3 x 3 matrices [N, 3, 3] from numbers and [N] tensors."""
    return torch.stack([torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device).expand(n) for v in row], -1)
                        for row in rows], -2)


def draw_affine(n, p, height, width, device):
    """Random inverse maps G [N, 3, 3] (output to input, pixels) and their seven labels [N, 7]."""
    scale2 = lambda x, y: matrix([[x, 0, 0], [0, y, 0], [0, 0, 1]], n, device)
    rotate = lambda a: matrix([[a.cos(), -a.sin(), 0], [a.sin(), a.cos(), 0], [0, 0, 1]], n, device)
    gate = lambda value, chance: torch.where(torch.rand(n, device=device) < chance, value, 0.0)
    angle = lambda: (torch.rand(n, device=device) * 2 - 1) * np.pi
    w = gate(torch.randn(n, device=device), p)
    s = torch.exp2(0.2 * w)
    G, labels = scale2(1 / s, 1 / s), [w]
    w = gate(angle(), p)
    G, labels = G @ rotate(w), labels + [w.cos() - 1, w.sin()]
    w, r = torch.randn(n, device=device), angle()
    w, r = gate(w, p), gate(r, 0.5)
    s = torch.exp2(0.2 * w)
    G, labels = G @ rotate(-r) @ scale2(1 / s, s) @ rotate(r), labels + [w * r.cos(), w * r.sin()]
    w = torch.randn(2, n, device=device)
    w = torch.where(torch.rand(1, n, device=device) < p, w, 0.0)
    G = G @ matrix([[1, 0, -w[0] * width / 8], [0, 1, -w[1] * height / 8], [0, 0, 1]], n, device)
    return G, torch.stack([*labels, w[0], w[1]], 1)


def warp(images, G):
    """images [N, C, H, W] resampled through G, band-limited by sym6 wavelet filters at twice the resolution."""
    n, c, height, width = images.shape
    device, f = images.device, torch.tensor(SYM6, device=images.device)
    shift = lambda x, y: torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=torch.float32, device=device)
    scale = lambda x, y: torch.tensor([[x, 0, 0], [0, y, 0], [0, 0, 1]], dtype=torch.float32, device=device)
    cx, cy = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor([[-cx, -cy, 1], [cx, -cy, 1], [cx, cy, 1], [-cx, cy, 1]], device=device).T
    q = (G @ corners)[:, :2]  # [N, 2, 4]
    far = torch.cat([(-q).amax((0, 2)), q.amax((0, 2))]) + torch.tensor([6 - cx, 6 - cy] * 2, device=device)
    limit = torch.tensor([width - 1, height - 1] * 2, device=device)
    x0, y0, x1, y1 = (int(v) for v in torch.minimum(far.clamp_min(0), limit).ceil())
    images = F.pad(images, [x0, x1, y0, y1], mode="reflect")
    G = shift((x0 - x1) / 2, (y0 - y1) / 2) @ G

    def filtered(x, kernel, along_x, **kwargs):
        weight = kernel.view(1, 1, 1, -1) if along_x else kernel.view(1, 1, -1, 1)
        return F.conv2d(x, weight.expand(c, 1, -1, -1), groups=c, **kwargs)

    up = images.new_zeros(n, c, images.shape[2] * 2 - 1, images.shape[3] * 2 - 1)
    up[:, :, ::2, ::2] = images
    up = filtered(filtered(up, f.flip(0), True, padding=(0, 6)), f.flip(0), False, padding=(6, 0))
    G = shift(-0.5, -0.5) @ scale(2, 2) @ G @ scale(0.5, 0.5) @ shift(0.5, 0.5)
    out_h, out_w = (height + 6) * 2, (width + 6) * 2
    G = scale(2 / up.shape[3], 2 / up.shape[2]) @ G @ scale(out_w / 2, out_h / 2)
    grid = F.affine_grid(G[:, :2], [n, c, out_h, out_w], align_corners=False)
    x = F.grid_sample(up, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    x = filtered(x, f, True, stride=(1, 2), padding=(0, 5))[:, :, :, 3:-3]
    return filtered(x, f, False, stride=(2, 1), padding=(5, 0))[:, :, 3:-3]


def augment(images, p):
    """images [N, C, H, W] in [-1, 1] -> augmented images and labels [N, 9]; flips always drawn for x, with p for y."""
    n, device, labels = len(images), images.device, []
    for axis, chance in ((3, p * 1e8), (2, p)):
        w = torch.randint(2, [n, 1, 1, 1], device=device)
        w = torch.where(torch.rand(n, 1, 1, 1, device=device) < chance, w, 0)
        images = torch.where(w == 1, images.flip(axis), images)
        labels.append(w.view(n, 1).float())
    G, rest = draw_affine(n, p, images.shape[2], images.shape[3], device)
    return warp(images, G), torch.cat([*labels, rest], 1)


# ---------------------------------------------------------------- training
def edm_loss(net, images, labels, augment_p, P_mean=-1.2, P_std=1.2):
    """EDM's loss per element [N, C, H, W]: lambda(sigma) |D(y + n; sigma) - y|^2, ln sigma ~ N(P_mean, P_std^2)."""
    sigma = (torch.randn(len(images), 1, 1, 1, device=images.device) * P_std + P_mean).exp()
    images, augment_labels = augment(images, augment_p) if augment_p else (images, None)
    noise, data = torch.randn_like(images) * sigma, 0.5
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    return weight * (net(images + noise, sigma, labels, augment_labels) - images).square()


def ema_beta(batch, half_life, seen=None, ramp_ratio=None):
    """Share the average keeps at a step of `batch` images; half_life in images, optionally at most seen * ramp_ratio."""
    if ramp_ratio is not None:
        half_life = min(half_life, seen * ramp_ratio)
    return 0.5 ** (batch / max(half_life, 1e-8))


def train(net, images, labels, plan, settings, state_path, snapshots, save):
    """Adam on EDM's loss. plan: lr, ramp_kimg, ema_kimg, augment, batch, seed, ramp_ratio. Every step draws from its own
    seed, so a resumed run repeats an uninterrupted one. save(ema, kimg) is called at each of `snapshots` (kimg)."""
    device, rank, world, batch = settings.device, settings.rank, settings.world, plan["batch"]
    net, ema = net.to(device).train().requires_grad_(True), copy.deepcopy(net).to(device).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=plan["lr"], fused=True)
    seen = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location=device)
        net.load_state_dict(state["net"]), ema.load_state_dict(state["ema"]), optimizer.load_state_dict(state["optimizer"])
        seen = state["seen"]
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    pairs = list(zip(ema.parameters(), net.parameters()))
    total, tick, last_saved = max(snapshots) * 1000, max(batch, min(50_000, int(max(snapshots) * 250))), seen
    bar = tqdm(total=total, initial=seen, unit="img", unit_scale=True, desc=plan["name"], leave=False, disable=rank > 0)
    while seen < total:
        epoch_images = torch.arange(seen, seen + batch)[rank::world]
        index = shuffled(epoch_images, len(images), plan["seed"])
        torch.manual_seed(((plan["seed"] * 2**20 + seen // batch) * 64 + rank) % 2**63)
        x = images[index].to(device).float() / 127.5 - 1
        y = None if labels is None or not net.label_dim else F.one_hot(labels[index], net.label_dim).float().to(device)
        optimizer.param_groups[0]["lr"] = plan["lr"] * min(seen / max(plan["ramp_kimg"] * 1000, 1e-8), 1)
        optimizer.zero_grad(set_to_none=True)
        (edm_loss(model, x, y, plan["augment"]).sum() * (world / batch)).backward()
        for p in net.parameters():
            p.grad.nan_to_num_(0.0, 1e5, -1e5) if p.grad is not None else None
        optimizer.step()
        beta = ema_beta(batch, plan["ema_kimg"] * 1000, seen, plan.get("ramp_ratio"))
        torch._foreach_lerp_([e for e, _ in pairs], [p.detach() for _, p in pairs], 1 - beta)
        before, seen = seen, seen + batch
        bar.update(batch)
        due = [k for k in snapshots if before < k * 1000 <= seen]
        if rank == 0 and (due or seen - last_saved >= tick or seen >= total):
            state = {"net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "seen": seen}
            for kimg in due:
                save(ema, kimg)
            write_atomically(state_path, lambda path: torch.save(state, path))
            last_saved = seen
    bar.close()


def shuffled(positions, n, seed):
    """Indices at these positions of an endless sequence of permutations of range(n)."""
    epochs = {int(e): torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + int(e)))
              for e in (positions // n).unique()}
    return torch.stack([epochs[int(p) // n][int(p) % n] for p in positions])


# ---------------------------------------------------------------- features and reference statistics
class BasicConv(nn.Module):
    def __init__(self, into, out, kernel, stride, padding):
        super().__init__()
        self.conv = nn.Conv2d(into, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def conv_of(into, text):
    """'64:3', '192:1x7', '384:3/2' -> convolution with that many outputs; stride 1 keeps the size, stride 2 is unpadded."""
    out, kernel = text.split(":")
    kernel, stride = (kernel.split("/") + ["1"])[:2]
    kernel = tuple(int(k) for k in (kernel.split("x") * 2)[:2])
    padding = 0 if stride == "2" else (kernel[0] // 2, kernel[1] // 2)
    return BasicConv(into, int(out), kernel, int(stride), padding), int(out)


class Mixed(nn.Module):
    """Inception block: chains of convolutions side by side (`a|b`: the chain ends in two), then a pooled branch."""

    def __init__(self, into, chains, pool, pool_out=0):
        super().__init__()
        self.pool, self.chains = pool, []
        for prefix, chain in chains.items():
            channels, names, parts = into, [], chain.split()
            for i, part in enumerate(parts, 1):
                ends = [("", part)] if "|" not in part else list(zip("ab", part.split("|")))
                names.append([])
                for letter, text in ends:
                    name = prefix if len(parts) == 1 else f"{prefix}_{i}{letter}"
                    module, out = conv_of(channels, text)
                    self.add_module(name, module)
                    names[-1].append(name)
                channels = out
            self.chains.append(names)
        self.branch_pool = conv_of(into, f"{pool_out}:1")[0] if pool_out else None

    def forward(self, x):
        outs = []
        for chain in self.chains:
            h = [x]
            for names in chain:
                h = [getattr(self, name)(h[0]) for name in names]
            outs += h
        pooled = {"avg": lambda: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
                  "max": lambda: F.max_pool2d(x, 3, 1, 1), "max2": lambda: F.max_pool2d(x, 3, 2)}[self.pool]()
        return torch.cat([*outs, self.branch_pool(pooled) if self.branch_pool is not None else pooled], 1)


class InceptionFeatures(nn.Module):
    """Inception-v3 of the FID graph: uint8 [N, 3, H, W] -> [N, 2048] float32 (2048-d pool). path: the public PyTorch port
    of its weights (pt_inception-2015-12-05). TF1-style resize to 299, (v - 128) / 128: comparable with EDM's FID."""
    dim = 2048

    def __init__(self, path):
        super().__init__()
        for name, into, text in (("1a_3x3", 3, "32:3/2"), ("2a_3x3", 32, "32:3"), ("2b_3x3", 32, "64:3"),
                                 ("3b_1x1", 64, "80:1"), ("4a_3x3", 80, "192:3")):
            module, _ = conv_of(into, text)
            module.conv.padding = (1, 1) if name == "2b_3x3" else (0, 0)
            self.add_module(f"Conv2d_{name}", module)
        a = {"branch1x1": "64:1", "branch5x5": "48:1 64:5", "branch3x3dbl": "64:1 96:3 96:3"}
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (Mixed(c, a, "avg", p) for c, p in ((192, 32), (256, 64), (288, 64)))
        self.Mixed_6a = Mixed(288, {"branch3x3": "384:3/2", "branch3x3dbl": "64:1 96:3 96:3/2"}, "max2")
        for letter, c in zip("bcde", (128, 160, 160, 192)):
            self.add_module(f"Mixed_6{letter}", Mixed(768, {
                "branch1x1": "192:1", "branch7x7": f"{c}:1 {c}:1x7 192:7x1",
                "branch7x7dbl": f"{c}:1 {c}:7x1 {c}:1x7 {c}:7x1 192:1x7"}, "avg", 192))
        self.Mixed_7a = Mixed(768, {"branch3x3": "192:1 320:3/2", "branch7x7x3": "192:1 192:1x7 192:7x1 192:3/2"}, "max2")
        e = {"branch1x1": "320:1", "branch3x3": "384:1 384:1x3|384:3x1", "branch3x3dbl": "448:1 384:3 384:1x3|384:3x1"}
        self.Mixed_7b, self.Mixed_7c = Mixed(1280, e, "avg", 192), Mixed(2048, e, "max", 192)
        try:
            weights = torch.load(path, weights_only=True, map_location="cpu")
            weights = {k: v for k, v in weights.items() if not k.startswith("fc.")}
            missing = [k for k in self.state_dict() if k not in weights and not k.endswith("num_batches_tracked")]
            if missing:
                raise KeyError(missing[0])
            self.load_state_dict(weights, strict=False)
        except Exception as error:
            raise UserError(f"{path} is not the PyTorch port of the FID Inception ({type(error).__name__}: {error})") from None
        self.name = f"inception-{file_hash(path)[:8]}-tf1"
        self.eval().requires_grad_(False)

    @staticmethod
    def resize(x, size=299):
        """TensorFlow 1's bilinear: source coordinate j * W / 299 without half-pixel shift; x first, then y; float32."""
        for axis in (3, 2):
            n = x.shape[axis]
            at = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
            low = at.floor().long().clamp_max(n - 1)
            part = (at - low).view([size if a == axis else 1 for a in range(4)])
            first = x.index_select(axis, low)
            x = first + (x.index_select(axis, (low + 1).clamp_max(n - 1)) - first) * part
        return x

    def forward(self, images):
        x = (self.resize(images.float()) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2))), 3, 2)
        for name, module in self.named_children():
            if name.startswith("Mixed"):
                x = module(x)
        return x.mean((2, 3))


class DigitsFeatures(nn.Module):
    """A small classifier of scikit-learn's digits, trained on the spot (seeded, seconds): uint8 [N, 1, 8, 8] -> [N, 64]."""
    dim, name = 64, "digits-cnn-64"

    def __init__(self, path, epochs=40):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1),
                                  nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
                                  nn.Linear(256, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)
        if path.exists():
            self.load_state_dict(torch.load(path, weights_only=True))
        else:
            self.fit(epochs)
            write_atomically(path, lambda p: torch.save(self.state_dict(), p))
        self.eval().requires_grad_(False)

    def fit(self, epochs):
        images, labels = digits_data()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for module in [*self.body, self.head]:
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
            for _ in range(epochs):
                for index in torch.randperm(len(images)).split(128):
                    optimizer.zero_grad()
                    F.cross_entropy(self.head(self(images[index])), labels[index]).backward()
                    optimizer.step()

    def forward(self, images):
        return self.body(images.float() / 127.5 - 1)


@torch.no_grad()
def features_of(images, features, device, batch=256):
    return torch.cat([features(part.to(device)) for part in images.split(batch)])


def load_reference(args, preset, features, device):
    """(FrechetReference, real features for precision and recall or None, facts for the report)."""
    if preset.name == "digits" or args.data:
        images = digits_data()[0] if preset.name == "digits" else read_dataset(args.data)[0]
        real = features_of(images, features, device)
        mu, cov = neon_ext.feature_moments(real)
        half = torch.randperm(len(real), generator=torch.Generator().manual_seed(0)).to(device)
        a, b = real[half[::2]], real[half[1::2]]
        floor = float(neon_ext.frechet_distance(*neon_ext.feature_moments(a), *neon_ext.feature_moments(b)))
        facts = {"features": features.name, "images": len(real), "floor": {"images": len(b), "fd": floor}}
        return neon_ext.FrechetReference(mu, cov, len(real)), real, facts
    path = fetch(args.ref, "the reference statistics")
    try:
        with np.load(path) as stored:
            mu, cov = (torch.from_numpy(np.asarray(stored[key], dtype=np.float64)).to(device) for key in ("mu", "sigma"))
            kind = str(stored["features"]) if "features" in stored else "inception"
    except Exception as error:
        raise UserError(f"reference {path} has no mu and sigma ({type(error).__name__})") from None
    if mu.shape != (features.dim,) or not features.name.startswith(kind.split("-")[0]):
        raise UserError(f"reference {path} has {tuple(mu.shape)} statistics of {kind!r}; the features are {features.name} "
                        f"({features.dim}-d): use statistics of the same features")
    return neon_ext.FrechetReference(mu, cov, 50_000), None, {"features": features.name, "file": str(args.ref)}


@torch.no_grad()
def precision_recall(real, fake, k=5, most=10_000):
    """Improved precision and recall (arXiv 1904.06991) with k nearest neighbours, on at most 10,000 of each."""
    real, fake = real[:most].double(), fake[:most].double()

    def inside(points, manifold):
        radius = torch.cat([torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(1000)])
        return float(torch.cat([(torch.cdist(part, manifold) <= radius).any(1) for part in points.split(1000)]).double().mean())
    return inside(fake, real), inside(real, fake)


# ---------------------------------------------------------------- blocks
def block_of(name, net, partition="paper"):
    """The block that owns parameter `name`: enc, mid or dec; for `layers` one per residual block; or by a JSON file's
    globs. paper: lowest resolution and mapping are mid. structural: the decoder's blocks after the bottleneck are dec."""
    low = min(int(key.split("x")[0]) for key in net.model.enc)
    parts = name.split(".")
    if isinstance(partition, dict):
        block = next((block for pattern, block in partition.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if block is None:
            raise UserError(f"--partition: no pattern owns {name}; end the file with \"*\": \"rest\"")
        return block
    if partition == "layers":
        return "map" if parts[1].startswith("map") else ".".join(parts[1:3])
    level = parts[2].startswith(f"{low}x{low}_") if len(parts) > 2 else False
    if parts[1] not in ("enc", "dec") or (level and not (
            partition == "structural" and parts[1] == "dec" and "_block" in parts[2])):
        return "mid"
    return parts[1]


class Configurations:
    """All extrapolations between two networks: one resident network whose weights are rewritten in one fused pass."""

    def __init__(self, base, aux, partition, device):
        ours, theirs = base.state_dict(), aux.state_dict()
        for name in ours:
            if name not in theirs or ours[name].shape != theirs[name].shape:
                raise UserError(f"base and self-trained network differ in architecture, first at {name}: "
                                f"{tuple(ours[name].shape)} and {tuple(theirs[name].shape) if name in theirs else 'absent'}")
        self.base, self.device, self.local = base, device, threading.local()  # one resident network per thread
        self.names = list(ours)
        self.theta_r, self.theta_s = ([t[n].float().to(device) for n in self.names] for t in (ours, theirs))
        owners = [block_of(name, base, partition) for name in self.names]
        self.blocks = [b for b in ("enc", "mid", "dec") if b in owners] or list(dict.fromkeys(owners))
        self.blocks += [b for b in dict.fromkeys(owners) if b not in self.blocks]
        self.index = [self.blocks.index(owner) for owner in owners]

    def set(self, w):
        """w: {block: weight} -> the network with those weights."""
        if not hasattr(self.local, "net"):
            self.local.net = copy.deepcopy(self.base).to(self.device).eval().requires_grad_(False)
        out = list(self.local.net.state_dict().values())
        neon_ext.extrapolate(self.theta_r, self.theta_s, self.index, [float(w[b]) for b in self.blocks], out=out)
        return self.local.net

    def table(self):
        """Per block: tensors, parameters, relative drift ||theta_s - theta_r|| / ||theta_r||."""
        rows = {}
        for i, block in enumerate(self.blocks):
            mine = [(r, s) for r, s, b in zip(self.theta_r, self.theta_s, self.index) if b == i]
            drift, size = (sum(float(t.double().square().sum()) for t in ts) ** 0.5
                           for ts in ([s - r for r, s in mine], [r for r, _ in mine]))
            rows[block] = {"tensors": len(mine), "parameters": sum(r.numel() for r, _ in mine), "drift": drift / size}
        return rows


# ---------------------------------------------------------------- scoring
@dataclass
class Settings:
    """How this process samples: device, images per batch, sampler steps, precision, its rank among `world`."""
    device: str
    batch: int
    steps: int
    precision: str = "fp32"
    rank: int = 0
    world: int = 1
    compiled: dict = dataclasses.field(default_factory=dict)

    def call(self, net):
        net.precision = self.precision
        if self.device == "cpu":
            return net
        if id(net) not in self.compiled:  # weights are rewritten in place: one compilation serves every configuration
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
            net.to(memory_format=torch.channels_last)
            self.compiled[id(net)] = torch.compile(net, mode="max-autotune-no-cudagraphs", dynamic=False)
        return self.compiled[id(net)]


class Scorer:
    """Fréchet distances of configurations on common random numbers; finished ones are read back from grid.jsonl."""

    def __init__(self, configurations, features, reference, settings, path, key, kimg):
        self.configurations, self.features, self.reference = configurations, features, reference
        self.settings, self.path, self.key, self.kimg, self.done = settings, path, key, kimg, {}
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                if row["key"] == key and row["snapshot"] == kimg:
                    self.done[self.name_of(row["w"], row["images"], row["first_seed"])] = row

    @staticmethod
    def name_of(w, images, first_seed):
        return json.dumps([{b: round(float(v), 6) for b, v in sorted(w.items())}, images, first_seed])

    @torch.no_grad()
    def moments(self, w, seeds, desc=None, keep=False):
        """Moments in FOLDS contiguous seed folds; all ranks' sums merged. keep: also return the features [N, D]."""
        settings, kept = self.settings, []
        net = self.configurations.set(w)
        total = neon_ext.Moments(self.features.dim, FOLDS, settings.device)
        for part, images, _ in sample_batches(net, seeds, settings, desc):
            found = self.features(images)
            fold = torch.as_tensor((part - seeds[0]) * FOLDS // len(seeds))
            for k in fold.unique().tolist():
                total.update(found[(fold == k).to(found.device)], k)
            kept += [found.cpu()] if keep else []
        if settings.world > 1:
            states = [None] * settings.world
            dist.all_gather_object(states, ({k: v.cpu() for k, v in total.state_dict().items()}, kept))
            total, kept = neon_ext.Moments(self.features.dim, FOLDS, settings.device), []
            for state, features in states:
                other = neon_ext.Moments(self.features.dim, FOLDS)
                other.load_state_dict(state)
                total.merge(other)
                kept += features
        return (total, torch.cat(kept)) if keep else total

    def score(self, w, seeds, desc=None):
        """{snapshot, w, images, fd, seconds}; appended to grid.jsonl in one write, never computed twice."""
        name = self.name_of(w, len(seeds), int(seeds[0]))
        if name not in self.done:
            begin = time.perf_counter()
            m = self.moments(w, seeds, desc)
            fd = float(self.reference.distance(m.mean(), m.cov()))
            row = {"snapshot": self.kimg, "w": w, "images": len(seeds), "first_seed": int(seeds[0]), "fd": fd,
                   "seconds": round(time.perf_counter() - begin, 3), "key": self.key}
            if self.settings.rank == 0:
                with open(self.path, "a") as file:
                    file.write(json.dumps(row) + "\n")
            self.done[name] = row
        return self.done[name]


def jackknife(reference, first, second):
    """Paired difference distance(first) - distance(second) with its 95% interval: delete-one-fold jackknife."""
    def distance(m, folds=None):
        return float(reference.distance(m.mean(folds), m.cov(folds)))
    used = [k for k in range(FOLDS) if first.count([k]) and second.count([k])]
    left_out = [[j for j in used if j != k] for k in used]
    d = np.array([distance(first, f) - distance(second, f) for f in left_out])
    n = len(used)
    error = ((n - 1) / n * ((d - d.mean()) ** 2).sum()) ** 0.5
    half = float(scipy.stats.t.ppf(0.975, n - 1) * error)
    full = distance(first) - distance(second)
    verdict = "no significant difference" if abs(full) <= half else "better" if full < 0 else "worse"
    return {"difference": full, "low": full - half, "high": full + half, "verdict": verdict}


def search_cobyqa(scorer, seeds, start, bounds, evaluations):
    """Derivative-free trust-region search (scipy's COBYQA) over the block weights from the best global weight."""
    blocks = scorer.configurations.blocks

    def value(x):
        return scorer.score({b: round(float(v), 6) for b, v in zip(blocks, x)}, seeds)["fd"]
    scipy.optimize.minimize(value, np.full(len(blocks), start), method="COBYQA", bounds=[bounds] * len(blocks),
                            options={"maxfev": evaluations, "initial_tr_radius": 0.5, "final_tr_radius": 0.01})


# ---------------------------------------------------------------- one snapshot: grid, final comparison
def grid_weights(args, blocks):
    lists = [args.grid_of.get(block) or args.grid for block in blocks]
    return [dict(zip(blocks, values)) for values in itertools.product(*lists)]


def side_by_side(scorer, work, items, desc):
    """[work(item)]: small networks leave cores idle, so that on a CPU each core takes configurations of its own."""
    settings = scorer.settings
    workers = max(1, os.cpu_count() // torch.get_num_threads()) if settings.device == "cpu" and settings.world == 1 else 1
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(work, items) if workers > 1 else map(work, items)
        try:
            return list(tqdm(results, total=len(items), desc=desc, disable=settings.rank > 0, leave=False))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def study(args, preset, scorer, ledger, real):
    """All scores of one snapshot -> its entry in summary.json, and the weights of the winners."""
    blocks, seeds = scorer.configurations.blocks, ledger["selection"]
    uniform = lambda v: dict.fromkeys(blocks, float(v))
    grid = grid_weights(args, blocks)
    diagonal = [uniform(v) for v in sorted({*args.grid, *args.sweep})]
    everything = [uniform(0), uniform(-1), *diagonal, *grid]
    everything = list({json.dumps(w): w for w in everything}.values())
    rows = side_by_side(scorer, lambda w: scorer.score(w, seeds), everything, f"snapshot {scorer.kimg}: grid")
    best_of = lambda candidates: min(candidates, key=lambda w: scorer.score(w, seeds)["fd"])
    winners = {"base": uniform(0), "collapsed": uniform(-1), "global": best_of([uniform(0), *diagonal]),
               "blockwise": best_of(grid)}
    if args.search:
        search_cobyqa(scorer, seeds, next(iter(winners["global"].values())), args.bounds, args.evaluations)
        winners["searched"] = min((row for row in scorer.done.values() if row["images"] == len(seeds)
                                   and row["first_seed"] == int(seeds[0])), key=lambda row: row["fd"])["w"]
    entry = {"kimg": scorer.kimg, "blocks": scorer.configurations.table(), "evaluations": len(rows),
             "base": {"fd": rows[0]["fd"]}, "collapsed": {"fd": rows[1]["fd"]},
             "global": {"w": next(iter(winners["global"].values())), "fd": scorer.score(winners["global"], seeds)["fd"]},
             "blockwise": {"w": winners["blockwise"], "fd": scorer.score(winners["blockwise"], seeds)["fd"]},
             "sweep": [{"w": next(iter(w.values())), "fd": scorer.score(w, seeds)["fd"]}
                       for w in sorted([uniform(-1), uniform(0), *diagonal], key=lambda w: next(iter(w.values())))]}
    if "searched" in winners:
        entry["searched"] = {"w": winners["searched"], "fd": scorer.score(winners["searched"], seeds)["fd"]}
    entry["final"] = final_comparison(scorer, winners, ledger["final"], real)
    entry["warnings"] = warnings_of(entry, args, scorer, len(seeds))
    return entry, winners


def final_comparison(scorer, winners, seeds, real):
    """Winners re-scored on unseen seeds with precision, recall and paired jackknife intervals against base and global."""
    results, sums = {}, {}
    found = side_by_side(scorer, lambda w: scorer.moments(w, seeds, keep=True), list(winners.values()), "final")
    for (name, w), (moments, features) in zip(winners.items(), found):
        sums[name] = moments
        fd = float(scorer.reference.distance(sums[name].mean(), sums[name].cov()))
        results[name] = {"w": w, "fd": fd, "images": len(seeds)}
        if real is not None:
            results[name]["precision"], results[name]["recall"] = precision_recall(real.cpu(), features)
    for name in winners:
        for other in ("base", "global"):
            if name != other and (name, other) != ("base", "global"):
                results[name][f"against_{other}"] = jackknife(scorer.reference, sums[name], sums[other])
    return results


def warnings_of(entry, args, scorer, images):
    """What a careful reader would want to know."""
    notes = []
    values = [v for v in entry["blockwise"]["w"].values()]
    if any(v in (min(args.grid), max(args.grid)) for v in values) and len(args.grid) > 1:
        notes.append("the block-wise optimum lies on the edge of the grid")
    if images <= scorer.features.dim:
        notes.append(f"{images} selection images for {scorer.features.dim} features: the covariance is singular")
    final = entry["final"]
    if final["blockwise"]["fd"] > final["global"]["fd"] and entry["blockwise"]["fd"] < entry["global"]["fd"]:
        notes.append("block-wise wins on the selection seeds but not on the final ones: selection noise")
    if "precision" in final["base"] and final["blockwise"]["precision"] < final["base"]["precision"] - 0.01 and (
            final["blockwise"]["fd"] < final["base"]["fd"]):
        notes.append("precision falls while the distance falls")
    return notes


# ---------------------------------------------------------------- stages: base, synthetic set, self-training
def on_rank_zero(settings, work):
    """work() on the first rank while the others wait; a failure there stops all."""
    if settings.rank == 0:
        work()
    if settings.world > 1:
        dist.barrier()


def get_base(args, preset, settings, out):
    """The base network: given, downloaded, or trained from scratch; and its hash."""
    if args.train_base is None and preset.name != "digits" or args.base:
        path = fetch(BASES.get(args.base or "cond", args.base), "the base network")
        return load_network(path), file_hash(path)[:16]
    if preset.name == "digits":
        images, labels = digits_data()
    elif not args.data:
        raise UserError("--train-base needs --data ZIP or folder of images")
    else:
        images, labels = read_dataset(args.data)
    kimg = args.train_base or preset.train_kimg
    model = dict(preset.model, img_resolution=images.shape[-1], img_channels=images.shape[1])
    if labels is None and model["label_dim"]:
        raise UserError(f"{args.data} has no labels, but the {preset.name} network is conditional: add dataset.json")
    key = key_of("base", model, kimg, preset.base_lr, args.seed, preset.batch, len(images))
    path = out / f"base-{key}.safetensors"
    plan = dict(name="base", lr=preset.base_lr, ramp_kimg=kimg / 20, ema_kimg=kimg / 20, augment=preset.augment,
                batch=preset.batch, seed=args.seed, ramp_ratio=0.05)
    if not path.exists():
        torch.manual_seed(args.seed)
        net = EDMPrecond(**model)
        train(net, images, labels, plan, settings, out / f"base-{key}.pt", [kimg],
              lambda ema, k: save_network(ema, path, {"trained": plan, "kimg": k}))
        on_rank_zero(settings, lambda: (out / f"base-{key}.pt").unlink())
    return load_network(path), file_hash(path)[:16]


def get_synthetic(args, preset, base, base_hash, settings, out):
    """|S| images of the base at seeds 0, 1, ... with their random classes, as an EDM dataset zip."""
    key = key_of("synthetic", base_hash, args.synthetic, preset.steps, settings.device != "cpu")
    path = out / f"synthetic-{key}.zip"
    if not path.exists():
        net = copy.deepcopy(base).to(settings.device)
        parts = [(part[0], images.cpu(), None if labels is None else labels.argmax(1).cpu()) for part, images, labels in
                 sample_batches(net, np.arange(args.synthetic), settings, "synthetic set")]
        if settings.world > 1:
            gathered = [None] * settings.world
            dist.all_gather_object(gathered, parts)
            parts = [part for rank in gathered for part in rank]
        parts.sort(key=lambda part: part[0])
        labels = torch.cat([p[2] for p in parts]) if base.label_dim else []
        on_rank_zero(settings, lambda: write_dataset(path, torch.cat([p[1] for p in parts]), labels))
    return path, key


def get_snapshots(args, preset, base, base_hash, settings, out):
    """{kimg: path} of self-trained networks: existing files (--aux) or trained here to every --snapshot."""
    if args.aux:
        given = Path(args.aux)
        files = sorted([*given.glob("network-snapshot-*.pkl"), *given.glob("network-snapshot-*.safetensors")]) if (
            given.is_dir()) else [fetch(args.aux, "the self-trained network")]
        numbered = {int("".join(c for c in f.stem if c.isdigit()) or 0): f for f in files}
        chosen = {k: f for k, f in numbered.items() if k in args.snapshot} if given.is_dir() else {
            args.snapshot[0]: files[0]}
        if not chosen:
            raise UserError(f"--aux {given} has snapshots {sorted(numbered)}, none of --snapshot {args.snapshot}")
        return chosen
    data, data_key = get_synthetic(args, preset, base, base_hash, settings, out)
    plan = dict(name="self-training", lr=args.lr or preset.self_lr, ramp_kimg=preset.ramp_kimg, augment=preset.augment,
                ema_kimg=preset.ema_kimg, batch=args.batch or preset.batch, seed=args.seed + 1)
    folder = out / f"self-{key_of(data_key, plan, preset.model['dropout'])}"
    paths = {k: folder / f"network-snapshot-{k:06d}.safetensors" for k in args.snapshot}
    if not all(path.exists() for path in paths.values()):
        folder.mkdir(exist_ok=True)
        net = EDMPrecond(**dict(base.config, augment_dim=base.config.get("augment_dim", 0), dropout=preset.model["dropout"]))
        net.load_state_dict(base.state_dict())
        images, labels = read_dataset(data)
        recipe = {"base_sha256": base_hash, "synthetic": data_key, "training": plan}
        train(net, images, labels, plan, settings, folder / "training-state.pt", sorted(args.snapshot),
              lambda ema, k: save_network(ema, paths[k], recipe | {"kimg": k}))
        on_rank_zero(settings, lambda: None)
        if not all(path.exists() for path in paths.values()):
            raise UserError(f"the saved training in {folder} is already past one of --snapshot {args.snapshot}: delete "
                            "its training-state.pt to train again from the base")
    return paths


def seed_ledger(args, preset, images):
    """Disjoint seeds for synthetic set, selection and final comparison; overlap is refused, the paper's is announced."""
    first = 0 if args.protocol == "paper" else 10_000
    select = 2000 if args.protocol == "paper" else images["select"]
    ledger = {"synthetic": np.arange(args.synthetic), "selection": np.arange(first, first + select),
              "final": np.arange(preset.final_seed, preset.final_seed + images["final"])}
    for a, b in itertools.combinations(ledger, 2):
        if np.intersect1d(ledger[a], ledger[b]).size and args.protocol != "paper":
            raise UserError(f"seeds of the {a} set ({ledger[a][0]}-{ledger[a][-1]}) and of the {b} set ({ledger[b][0]}-"
                            f"{ledger[b][-1]}) overlap: fewer --synthetic, --select-images or --final-images")
    if args.protocol == "paper":
        print("--protocol paper: selection seeds 0-1999 overlap the synthetic training set, and 2,000 images are fewer "
              "than 2,048 features: the covariance is singular")
    return ledger


# ---------------------------------------------------------------- report
def write_report(args, preset, summary, out):
    """summary.json, table.md, pictures; the terminal gets the table."""
    lines = [f"| snapshot (kimg) | model | w | selection {preset.score} | final {preset.score} | against base (95%) | verdict "
             "| precision | recall |", "|" + "---|" * 9]
    for entry in summary["snapshots"]:
        for name, final in entry["final"].items():
            values = final["w"].values()
            w = f"{next(iter(values)):g}" if len(set(values)) == 1 else ", ".join(f"{b} {v:g}" for b, v in final["w"].items())
            against = final.get("against_base")
            interval = f"{against['difference']:+.4f} [{against['low']:+.4f}, {against['high']:+.4f}]" if against else ""
            extra = [f"{final[k]:.3f}" if k in final else "" for k in ("precision", "recall")]
            lines.append(f"| {entry['kimg']} | {name} | {w} | {entry[name]['fd']:.4f} | {final['fd']:.4f} | {interval} | "
                         f"{against['verdict'] if against else ''} | {extra[0]} | {extra[1]} |")
        if "against_global" in entry["final"]["blockwise"]:
            d = entry["final"]["blockwise"]["against_global"]
            lines.append(f"\nSnapshot {entry['kimg']}: block-wise against global {d['difference']:+.4f} "
                         f"[{d['low']:+.4f}, {d['high']:+.4f}]: {d['verdict']}.\n")
        lines += [f"Warning, snapshot {entry['kimg']}: {note}.\n" for note in entry["warnings"]]
    if "floor" in summary["reference"]:
        floor = summary["reference"]["floor"]
        lines.append(f"Floor: two disjoint halves of the real data ({floor['images']} images) are {floor['fd']:.4f} apart.\n")
    text = "\n".join(lines)
    print("\n" + text)
    write_atomically(out / "table.md", lambda path: path.write_text(text + "\n"))
    write_atomically(out / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=1)))


def plot_report(preset, summary, samples, out):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure, name):
        figure.tight_layout()
        write_atomically(out / name, lambda path: figure.savefig(path, dpi=80, format="png"))
        plt.close(figure)

    entries = summary["snapshots"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for name in ("base", "global", "blockwise", "searched"):
        if name in entries[0]["final"]:
            axes[0].plot([e["kimg"] for e in entries], [e["final"][name]["fd"] for e in entries], "o-", label=name)
    axes[0].set(xlabel="self-training (kimg)", ylabel=f"final {preset.score}", title="score against snapshot")
    for e in entries:
        axes[1].plot([p["w"] for p in e["sweep"]], [p["fd"] for p in e["sweep"]], "o-", label=f"{e['kimg']} kimg")
    axes[1].set(xlabel="w, all blocks", ylabel=f"selection {preset.score}", title="score against global w")
    for axis in axes:
        axis.legend()
    save(figure, "scores.png")
    for e in entries:
        grid = e["grid"]
        blocks = list(grid[0]["w"])
        if len(blocks) == 3:
            values = [sorted({row["w"][b] for row in grid}) for b in blocks]
            figure, axes = plt.subplots(1, len(values[1]), figsize=(4 * len(values[1]), 3.5), squeeze=False)
            low, high = min(r["fd"] for r in grid), max(r["fd"] for r in grid)
            for axis, middle in zip(axes[0], values[1]):
                table = {(r["w"][blocks[0]], r["w"][blocks[2]]): r["fd"] for r in grid if r["w"][blocks[1]] == middle}
                image = axis.imshow([[table[a, c] for c in values[2]] for a in values[0]], vmin=low, vmax=high)
                axis.set_xticks(range(len(values[2])), values[2])
                axis.set_yticks(range(len(values[0])), values[0])
                axis.set(xlabel=f"w_{blocks[2]}", ylabel=f"w_{blocks[0]}", title=f"w_{blocks[1]} = {middle:g}")
            figure.colorbar(image, ax=axes[0].tolist())
            write_atomically(out / f"grid_{e['kimg']:06d}.png", lambda path: figure.savefig(path, dpi=80, format="png"))
            plt.close(figure)
    for kimg, pictures in samples.items():
        figure, axes = plt.subplots(1, len(pictures), figsize=(3 * len(pictures), 3.2))
        for axis, (name, images) in zip(axes, pictures.items()):
            n = int(len(images) ** 0.5)
            tiles = images[:n * n].reshape(n, n, *images.shape[1:]).permute(0, 3, 1, 4, 2)
            axis.imshow(tiles.reshape(n * images.shape[2], n * images.shape[3], -1).squeeze(-1), cmap="gray")
            axis.set_title(name)
            axis.axis("off")
        save(figure, f"samples_{kimg:06d}.png")


# ---------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def numbers(text, what, kind=float):
    try:
        values = [kind(part) for part in text.split(",")]
        if all(np.isfinite(values)):
            return values
    except ValueError:
        pass
    raise UserError(f"{what} {text!r}: give numbers separated by commas")


def parse(argv):
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="cifar10")
    add("--snapshot", default="1551", help="self-training lengths in kimg, by commas")
    add("--grid", default="0.75,1.0,1.25", help="weights of the block-wise grid")
    for block in ("enc", "mid", "dec"):
        add(f"--grid-{block}", help=f"other weights for {block}")
    add("--sweep", default="", help="also these global weights, start:stop:step")
    add("--base", help="cond, uncond, a path or URL (.pkl of EDM or .safetensors)")
    add("--aux", help="existing self-trained network, or a folder of network-snapshot-*")
    add("--data", help="real images: EDM dataset zip or folder")
    add("--train-base", type=float, metavar="KIMG", help="train the base from scratch on --data")
    add("--synthetic", type=int, help="images in the synthetic set")
    add("--lr", type=float, help="self-training learning rate")
    add("--batch", type=int, help="self-training batch")
    add("--select-images", type=int)
    add("--final-images", type=int)
    add("--partition", default="paper", help="paper, structural, layers, or a JSON file {glob: block}")
    add("--plan", action="store_true", help="print blocks, drift and a time estimate, then stop")
    add("--search", choices=["cobyqa"], help="also a derivative-free search of the block weights")
    add("--bounds", default="-1,4", help="of the search")
    add("--evaluations", type=int, default=12, help="of the search")
    add("--protocol", choices=["disjoint", "paper"], default="disjoint")
    add("--ref", default=REFERENCE, help="npz with mu and sigma of the real features")
    add("--detector", default=INCEPTION, help="Inception weights (PyTorch port)")
    add("--precision", choices=["fp32", "tf32", "bf16", "fp16"], default="fp32")
    add("--sample-batch", type=int)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="default runs/<preset>")
    add("--export-pt", action="store_true", help="also the merged weights as a plain state dict in EDM's names")
    add("--yes", action="store_true", help="run even if it takes very long")
    values = {i for i in range(1, len(argv)) if argv[i][:1] == "-" and argv[i][1:2] in "0123456789."}
    joined = [f"{argv[i]}={argv[i + 1]}" if i + 1 in values else argv[i] for i in range(len(argv)) if i not in values]
    return checked(parser.parse_args(joined))  # argparse takes the -1:2:0.25 of "--sweep -1:2:0.25" for an option


def checked(args):
    preset = PRESETS[args.preset]
    args.snapshot = sorted(set(numbers(args.snapshot, "--snapshot", int)))
    args.grid = sorted(set(numbers(args.grid, "--grid")))
    args.grid_of = {b: numbers(text, f"--grid-{b}") for b in ("enc", "mid", "dec") if (text := getattr(args, f"grid_{b}"))}
    args.bounds = tuple(numbers(args.bounds, "--bounds"))
    if args.sweep:
        parts = numbers(args.sweep.replace(":", ","), "--sweep")
        if len(parts) != 3 or parts[2] <= 0:
            raise UserError(f"--sweep {args.sweep!r}: give start:stop:step with a positive step, as -1:2:0.25")
        args.sweep = np.arange(parts[0], parts[1] + parts[2] / 2, parts[2]).round(6).tolist()
    args.sweep = args.sweep or []
    for name in ("synthetic", "select_images", "final_images", "sample_batch"):
        value = getattr(args, name)
        setattr(args, name, getattr(preset, name) if value is None else value)
    smallest = min(args.synthetic, args.select_images, args.final_images)
    if min(args.snapshot) < 1 or smallest < 2 * FOLDS or args.sample_batch < 1 or args.evaluations < 1:
        raise UserError(f"--snapshot must be at least 1 kimg, image counts at least {2 * FOLDS}")
    if len(args.bounds) != 2 or args.bounds[0] >= args.bounds[1]:
        raise UserError("--bounds: give two numbers, low,high")
    if args.partition not in ("paper", "structural", "layers"):
        try:
            args.partition = json.loads(Path(args.partition).read_text())
            assert isinstance(args.partition, dict)
        except (OSError, ValueError, AssertionError):
            raise UserError(f"--partition {args.partition}: paper, structural, layers or a JSON file of glob -> block") from None
    if neon_ext is None:
        raise UserError("the extension neon_ext is not built: run `pip install --no-build-isolation .` here first")
    if args.device not in ("cpu", "cuda") or (args.device == "cuda" and not (
            torch.cuda.is_available() and neon_ext.build_config()["cuda"])):
        raise UserError(f"--device {args.device}: no usable GPU, or neon_ext was built without CUDA; use --device cpu")
    args.out = args.out or Path("runs") / args.preset
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / ".probe").write_text("")
        (args.out / ".probe").unlink()
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written ({error.strerror}): choose another folder") from None
    return args


def make_settings(args, preset):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    return Settings(args.device, args.sample_batch, preset.steps, args.precision, rank, world)


def seconds_per_image(net, settings):
    """Sampling time of one image, from one short batch; on the CPU with the faster of one and all threads."""
    batch, repeats = (32, 3) if settings.device != "cpu" or net.img_resolution < 32 else (2, 1)
    labels = torch.zeros(batch, net.label_dim, device=settings.device) if net.label_dim else None
    x = torch.randn(batch, net.img_channels, net.img_resolution, net.img_resolution, device=settings.device)
    best = (float("inf"), 1)
    for threads in sorted({1, torch.get_num_threads()}, reverse=True) if settings.device == "cpu" else [1]:
        torch.set_num_threads(threads) if settings.device == "cpu" else None
        for _ in range(repeats):
            begin = time.perf_counter()
            with torch.no_grad():
                float(settings.call(net)(x, torch.ones(1, device=x.device), labels).sum())
            best = min(best, (time.perf_counter() - begin, threads))
    torch.set_num_threads(best[1]) if settings.device == "cpu" else None
    return best[0] / batch * (2 * settings.steps - 1)


def describe_plan(args, preset, scorer, seconds):
    print(f"{'block':<24}{'tensors':>8}{'parameters':>12}  drift ||theta_s - theta_r|| / ||theta_r||")
    for block, row in scorer.configurations.table().items():
        print(f"{block:<24}{row['tensors']:>8}{row['parameters']:>12}  {row['drift']:.5f}")
    count = len({json.dumps(w) for w in grid_weights(args, scorer.configurations.blocks)}) + 2
    images = count * args.select_images + 4 * args.final_images
    print(f"about {count} configurations of {args.select_images} images and 4 final ones of {args.final_images}: "
          f"{images * seconds / 3600:.2f} hours on this {args.device}")


def run(argv):
    begin, args = time.perf_counter(), parse(argv)
    preset, out = PRESETS[args.preset], args.out
    blocks_guess = 3 if args.partition in ("paper", "structural") else 1
    points = np.prod([len(args.grid_of.get(b, args.grid)) for b in ("enc", "mid", "dec")[:blocks_guess]])
    if points > 10_000 and not args.yes:
        raise UserError(f"the grid has {points} points: add --yes if you mean it")
    ledger = seed_ledger(args, preset, {"select": args.select_images, "final": args.final_images})
    settings = make_settings(args, preset)
    if preset.name == "digits":
        torch.set_num_threads(1)  # 8 x 8 images: one thread trains faster than two
        torch.empty(2**22)  # freeing 16 MB raises glibc's mmap threshold: no page faults for every activation
    if args.device == "cpu" and preset.name == "cifar10" and not (args.yes or args.plan):
        probe = EDMPrecond(**preset.model).eval()
        hours = seconds_per_image(probe, settings) * (29 * args.select_images + 4 * args.final_images + args.synthetic) / 3600
        raise UserError(f"without a GPU this takes about {hours:.0f} hours of sampling alone: add --yes to run it all the "
                        "same, or try --preset digits")
    base, base_hash = get_base(args, preset, settings, out)
    snapshots = get_snapshots(args, preset, base, base_hash, settings, out)
    features = (DigitsFeatures(out / "digits-cnn.pt") if preset.name == "digits" else
                InceptionFeatures(fetch(args.detector, "the Inception weights", "6726825d" if args.detector == INCEPTION
                                        else ""))).to(args.device)
    reference, real, facts = load_reference(args, preset, features, args.device)
    seconds = seconds_per_image(copy.deepcopy(base).to(args.device), settings)
    entries, samples = [], {}
    for kimg, path in sorted(snapshots.items()):
        configurations = Configurations(base, load_network(path), args.partition, args.device)
        key = key_of(base_hash, file_hash(path), args.partition, features.name, preset.steps, args.precision, args.device,
                     facts.get("images", facts.get("file")))
        scorer = Scorer(configurations, features, reference, settings, out / "grid.jsonl", key, kimg)
        if args.plan:
            describe_plan(args, preset, scorer, seconds)
            continue
        entry, winners = study(args, preset, scorer, ledger, real)
        entry["grid"] = [scorer.score(w, ledger["selection"]) for w in grid_weights(args, configurations.blocks)]
        entries.append(entry)
        samples[kimg] = {name: next(iter(sample_batches(configurations.set(w), ledger["final"][:36], dataclasses.replace(
            settings, rank=0, world=1, batch=36))))[1].cpu() for name, w in winners.items()}
        if settings.rank == 0:
            merged = configurations.set(winners["blockwise"]).cpu()
            recipe = {"w": winners["blockwise"], "base_sha256": base_hash, "aux_sha256": file_hash(path)[:16],
                      "partition": args.partition}
            save_network(merged, out / f"adaptive-neon-{kimg:06d}.safetensors", recipe)
            if args.export_pt:
                write_atomically(out / f"adaptive-neon-{kimg:06d}.pt", lambda p: torch.save(merged.state_dict(), p))
    if args.plan or settings.rank > 0:
        return
    summary = {"command": " ".join(["python edm_neon.py", *argv]), "score": preset.score, "seed": args.seed,
               "preset": dataclasses.asdict(preset), "reference": facts, "snapshots": entries, "device": args.device,
               "precision": args.precision, "threads": torch.get_num_threads(), "world": settings.world,
               "seeds": {name: [int(s[0]), int(s[-1])] for name, s in ledger.items()}, "neon_ext": neon_ext.build_config(),
               "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
               "seconds_per_image": seconds, "seconds_total": time.perf_counter() - begin}
    write_report(args, preset, summary, out)
    plot_report(preset, summary, samples, out)
    print(f"{time.perf_counter() - begin:.1f} s; summary.json, table.md, grid.jsonl, pictures and networks in {out}")


def main(argv=None):
    try:
        run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        sys.exit(print(f"edm_neon: {error}", file=sys.stderr) or 2)
    except OSError as error:
        sys.exit(print(f"edm_neon: {error}; what was finished stays", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("\nedm_neon: stopped; finished parts are kept, run the same command again", file=sys.stderr) or 130)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
