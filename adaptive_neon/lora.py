"""LoRA: low-rank steps of a denoiser's weights, trained, merged, read and written as files.

A module's step is its product B A, the scale alpha / r (or alpha / sqrt(r)) folded into B. Only
products are extrapolated: to extrapolate A and B themselves is another, wrong step.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from .blocks import copied
from .files import is_safetensors, printable
from .folders import refuse, write_tensors, wrong

ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
BLOCKS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks")

# How others name the two factors, and the networks that hold them.
DOWN = (
    *(".lora_A.default.weight", ".lora_A.weight", ".lora_down.weight"),
    *(".lora.down.weight", "_lora.down.weight"),
)
UP = (
    *(".lora_B.default.weight", ".lora_B.weight", ".lora_up.weight"),
    *(".lora.up.weight", "_lora.up.weight"),
)
PREFIXES = (
    *("base_model.model.", "unet.", "transformer.", "diffusion_model."),
    *("lora_unet_", "lora_transformer_", "lycoris_"),
)
TEXT_ENCODERS = ("text_encoder", "lora_te")
FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # peft's, diffusers'

# What has other parts than two factors: by what its names match.
OTHERS = {
    r"\.dora_scale$|\.lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.b?oft_": "OFT",
    r"\.lora_mid\.": "LoCon with a core",
    r"\.diff(_b)?$": "a LoRA with full differences",
    r"\.lora_B\.(default\.)?bias$": "a LoRA with biases",
}

# Stability's names of a U-Net's modules, outside its blocks and in resnets.
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
INSIDE = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """{module: (A [r, ...], B [out, r, ...])}, float32; the step of its weight is B A."""

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    notes: tuple[str, ...] = ()  # what of its file is left out

    def step(self, module: str, shape: torch.Size) -> torch.Tensor:
        """B A in the shape of the module's weight; of convolutions, A is the one with their
        kernel."""
        a, b = self.factors[module]
        return (b.flatten(1) @ a.flatten(1)).reshape(shape)

    @torch.no_grad()
    def add_to(self, net: nn.Module) -> nn.Module:
        """The network with these steps taken, in place."""
        for module in self.factors:
            weight: Any = net.get_submodule(module).weight
            weight.add_(self.step(module, weight.shape).to(weight.device))
        return net

    def weighted(self, weights: dict[str, float]) -> "Lora":
        """Every module's step times its own number, {module: number}."""
        factors = {}
        for module, (a, b) in self.factors.items():
            factors[module] = (a, weights[module] * b)
        return Lora(factors)

    def parameters(self) -> set[str]:
        """Names of the weights that it moves."""
        return {f"{module}.weight" for module in self.factors}


# -------------------- training
def target_modules(net: nn.Module, which: str) -> list[str]:
    """Modules that a LoRA is trained for: the projections of attention, or all linear and
    convolutional ones in the network's blocks."""
    found = []
    for name, module in net.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or not name.startswith(BLOCKS):
            continue
        # Other programs hold the rows of SD3's last one in another order.
        if type(net.get_submodule(name.rpartition(".")[0])).__name__ == "AdaLayerNormContinuous":
            continue
        if which == "all" or name.endswith(ATTENTION):
            found.append(name)
    return found


def with_lora(net: nn.Module, modules: list[str], rank: int, seed: int) -> nn.Module:
    """The network with a LoRA beside these modules, which alone learns; B is zero at first."""
    try:
        import peft
    except ImportError:
        raise wrong("--lora-rank needs the package peft: pip install peft") from None
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=modules)
    adapted: Any = net
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted.add_adapter(config)
    return net


def lora_of(net: nn.Module) -> Lora | None:
    """What with_lora() has put beside the modules; None if nothing."""
    tensors = {}
    for name, tensor in net.named_parameters():
        if ".lora_" in name:
            tensors[name] = tensor.detach().cpu().float()
    return paired_factors(tensors, {}, "the trained network") if tensors else None


# -------------------- reading
def is_lora(path: Path) -> bool:
    """Whether a file holds the factors of a LoRA (or of what is refused as none)."""
    path = lora_file(path)
    if not path.is_file() or not is_safetensors(path):
        return False
    with refuse(path), safetensors.safe_open(path, "pt") as file:
        names = list(file.keys())
    return any(name.endswith((*DOWN, *UP)) or kind_of(name) for name in names)


def lora_file(path: Path) -> Path:
    """peft and diffusers write folders."""
    return next((path / name for name in FILES if (path / name).is_file()), path)


def kind_of(name: str) -> str:
    return next((kind for pattern, kind in OTHERS.items() if re.search(pattern, name)), "")


def read_lora(path: Path, net: nn.Module) -> Lora:
    """A LoRA file of anyone's for this network, in the names of diffusers, peft, kohya, ComfyUI or
    Stability. What changes no module of the network is left out, as everyone's tools do."""
    path = lora_file(path)
    tensors: dict[str, torch.Tensor] = {}
    with refuse(path), safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        for name in file.keys():  # noqa: SIM118
            tensors[name] = file.get_tensor(name).float()
    for name in tensors:
        if kind_of(name):
            raise wrong(f"{path} is {kind_of(name)} ({name}): only plain LoRA is supported")

    text = [name for name in tensors if name.startswith(TEXT_ENCODERS)]
    for name in text:
        del tensors[name]
    if text and not tensors:
        raise wrong(f"{path}: it changes text encoders alone, which do not move here")

    modules, factors, strange = known_names(net), {}, []
    for name, (a, b) in paired_factors(tensors, scales_of(path, metadata), path).factors.items():
        module = modules.get(name)
        if module is None:
            strange.append(name)
            continue
        weight: Any = net.get_submodule(module).weight
        if (len(b), a[0].numel()) != (len(weight), weight[0].numel()):
            raise wrong(f"{path}: {name} has other sizes than the base's module")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise wrong(f"{path}: {name} has values that are not finite")
        if module in factors:
            raise wrong(f"{path}: {module} stands there under two names")
        factors[module] = (a, b)
    if not factors:
        raise wrong(
            f"{path}: {strange[0]} is no module of the base, nor is any other: is it a LoRA for "
            "another model?"
        )

    notes = []
    if text:
        notes.append(f"{path}: what it changes in text encoders ({len(text)} tensors) is left out")
    if strange:
        notes.append(
            f"{path}: {len(strange)} of its {len(strange) + len(factors)} modules are none of the "
            f"base's and left out, first: {printable(strange[0])}"
        )
    return Lora(factors, tuple(notes))


def known_names(net: nn.Module) -> dict[str, str]:
    """{name in a file: module}, with dots and with underscores."""
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            for known in (name, stability_name(name, net)):
                found[known] = found[known.replace(".", "_")] = name
    return found


def stability_name(name: str, net: Any) -> str:
    """Stability's name of a U-Net's module. There the layers of all blocks are counted through, a
    downsampler as one more, an upsampler as the last part of its layer."""
    found = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
    if found is None:
        return OUTSIDE.get(name, name)
    way, block, part, index, inner = found.groups()
    i, j, inner = int(block or 0), int(index), INSIDE.get(inner, inner)
    place = int(part == "attentions")
    if way == "mid":
        return f"middle_block.{2 * j + place}.{inner}"

    blocks = getattr(net, f"{way}_blocks")
    layers = [len(block.resnets) for block in blocks]
    layer = sum(layers[:i]) + j
    if way == "down":
        layer += 1 + i
        if part == "downsamplers":
            layer, inner = layer + layers[i], "op"
        return f"input_blocks.{layer}.{place}.{inner}"
    if part == "upsamplers":
        layer, place = layer + layers[i] - 1, 1 + hasattr(blocks[i], "attentions")
    return f"output_blocks.{layer}.{place}.{inner}"


def paired_factors(tensors: dict, scales: dict, path: object) -> Lora:
    """The factors by module, scales folded into B. Every tensor is used, or refused by name."""
    downs: dict[str, torch.Tensor] = {}
    ups: dict[str, torch.Tensor] = {}
    alphas: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        for endings, place in ((DOWN, downs), (UP, ups), ((".alpha",), alphas)):
            ending = next((ending for ending in endings if name.endswith(ending)), "")
            if ending:
                place[module_name(name.removesuffix(ending))] = tensor
                break
        else:
            raise wrong(f"{path}: {printable(name)} is no part of a LoRA that is known here")
    if not downs or downs.keys() != ups.keys() or not alphas.keys() <= downs.keys():
        odd = sorted((downs.keys() ^ ups.keys()) | (alphas.keys() - downs.keys())) or ["nothing"]
        raise wrong(f"{path}: a LoRA of pairs of factors is needed, {odd[0]} is none")
    if len(downs) + len(ups) + len(alphas) < len(tensors):
        raise wrong(f"{path}: a module stands there under two names")

    factors = {}
    for module, a in downs.items():
        b, rank = ups[module], len(a) if a.ndim else 0
        # All of a kernel is in A.
        if min(a.ndim, b.ndim) < 2 or not rank or b.flatten(1).shape[1] != rank:
            raise wrong(f"{path}: the factors of {module} do not fit each other")
        scale = scale_for(module, rank, scales)
        if module in alphas:
            scale = float(alphas[module].flatten()[0]) / rank
        factors[module] = (a, scale * b)
    return Lora(factors)


def module_name(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    # Diffusers' first files name the attention's processor.
    name = re.sub(r"\.processor\.(to_[qkv])$", r".\1", name)
    return name.replace(".processor.to_out", ".to_out.0")


def scales_of(path: Path, metadata: dict[str, str]) -> dict:
    """peft's settings, from its file beside the weights or from the metadata of diffusers."""
    beside = path.parent / "adapter_config.json"
    settings = {}
    if path.name == "adapter_model.safetensors" and beside.is_file():
        with refuse(beside):
            settings = json.loads(beside.read_text("utf-8"))
    elif "lora_adapter_metadata" in metadata:
        with refuse(path):
            every = json.loads(metadata["lora_adapter_metadata"])
        for name, value in every.items():
            part, _, key = name.partition(".")
            if part in ("unet", "transformer"):
                settings[key] = value
    if settings.get("use_dora"):
        raise wrong(f"{path} is DoRA: only plain LoRA is supported")
    return settings


def scale_for(module: str, rank: int, settings: dict) -> float:
    """alpha / r; alpha is r where nobody says otherwise, as in diffusers."""
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):  # the first that fits, as in peft
            alpha = value
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


# -------------------- writing
def write_lora(lora: Lora, path: Path, transformer: bool) -> None:
    """A file that diffusers, ComfyUI and others load: kohya's names, alpha = r, all scales in the
    factors. Of transformers, the names of diffusers."""
    tensors = {}
    for module, (a, b) in lora.factors.items():
        rank = len(a)
        if transformer:
            tensors[f"transformer.{module}.lora_A.weight"] = a
            tensors[f"transformer.{module}.lora_B.weight"] = b
            continue
        # The one name of which diffusers knows Stability's alone.
        named = OUTSIDE[module] if module.startswith("add_embedding") else module
        key = f"lora_unet_{named.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = a
        tensors[f"{key}.lora_up.weight"] = b
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    write_tensors({name: t.contiguous() for name, t in tensors.items()}, path, {"format": "pt"})


def check_written(path: Path, base: nn.Module, merged: nn.Module, pipeline: Any) -> None:
    """That a LoRA file, as diffusers loads it beside the base, is the merged network: every module
    of the file comes back, and every weight is that of the merged network."""
    net: Any = copied(base).cpu()
    state, alphas = pipeline.lora_state_dict(str(path)), None
    if isinstance(state, tuple):
        state, alphas = state[:2]
    if hasattr(pipeline, "load_lora_into_unet"):
        pipeline.load_lora_into_unet(state, alphas, net)
    else:
        pipeline.load_lora_into_transformer(state, net)
    loaded = sum(name.endswith(".lora_A") for name, _ in net.named_modules())
    with safetensors.safe_open(path, "pt") as file:
        written = sum(name.endswith(UP) for name in file.keys())  # noqa: SIM118
    if loaded != written:
        raise AssertionError(f"{path}: {loaded} of {written} modules come back")

    net.fuse_lora()
    before, wanted = dict(base.named_parameters()), dict(merged.named_parameters())
    for name, parameter in net.named_parameters():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        was, goal = before[plain].detach().cpu(), wanted[plain].detach().cpu()
        apart = float((parameter.detach() - goal).abs().max())
        if apart > 1e-3 * float((goal - was).abs().max()) + 1e-6 * float(was.abs().max()):
            raise AssertionError(f"{path}: {plain} comes back {apart:.2g} away")
