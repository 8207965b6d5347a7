"""Folders of Hugging Face diffusers: where they come from, read and written.

Code that comes with a folder is never run, and pickles are read as weights only. Whatever is wrong
with a folder is one line.
"""

import contextlib
import importlib
import inspect
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from .files import UserError, printable

NETWORKS = (".pkl", ".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # files, not names on a hub
WEIGHTS = "diffusion_pytorch_model"
STEMS = (WEIGHTS, "model", "pytorch_model")  # how files of weights begin, also of transformers
RECIPE = "adaptive-neon.json"
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # that classes of parts come from


# --------------------- where folders come from
def wrong(text: object) -> UserError:
    """What is wrong with a folder, on one line."""
    return UserError(printable(text, 500))


def is_pipeline(source: str) -> bool:
    """A folder of diffusers, or a name on its hub."""
    if Path(source).exists():
        return (Path(source) / "model_index.json").is_file()
    return re.fullmatch(r"[\w-]+/[\w.-]+", source) is not None and not source.endswith(NETWORKS)


def resolve(source: str | Path) -> Path:
    """The local folder of a pipeline: a path as it is, or a hub id (google/ddpm-cifar10-32).

    UserError: neither, or the hub cannot be reached and has not been before.
    """
    path = Path(source)
    if path.exists():
        return path

    # owner/name is also how a folder is written: where the owner is a folder here, the name was
    # mistyped.
    hub_id = str(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id) or path.parent.exists():
        raise wrong(f"{source}: no such file or folder")
    import_diffusers()
    import huggingface_hub

    advice = (
        f"{hub_id}: no such folder, and not to be had from the Hugging Face hub; where a "
        f"connection is, run `hf download {hub_id} --local-dir FOLDER`, and give that FOLDER"
    )
    with refuse(advice):
        # Outside the parts' folders lie checkpoints of other programs.
        patterns = ["*.json", "*/*.safetensors", "*/*.bin", "*.txt", "*.model"]
        patterns += [f"{WEIGHTS}*", "pytorch_lora_weights.safetensors", "adapter_model.safetensors"]
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))


def import_diffusers():
    return import_quiet("diffusers", "a diffusers pipeline")


def import_quiet(package: str, what: str):
    """A package, silent about what is reported here in other words."""
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise wrong(f"{what} needs the package {package}: pip install {package}") from None
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


@contextlib.contextmanager
def refuse(what: object):
    """Makes one line, about `what`, of anything that a library raises about a user's file.

    Only calls into libraries stand inside, so that our own faults are not taken for the user's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # torch names the tensors in the lines below its first; some errors have no text at all.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise wrong(f"{what}: {reason}") from error


# --------------------- reading a folder
def read_index(folder: Path, known: dict[str, dict]) -> dict[str, str]:
    """model_index.json as {part: class that reads it}; all of it is known, or refused."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise wrong(f"{folder}: no model_index.json, so no pipeline of diffusers")
    with refuse(file):
        index = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(index, dict):
        raise wrong(f"{file}: not a JSON object")
    if not isinstance(index.get("_class_name"), str):
        raise wrong(
            f"{folder}: a pipeline with code of its own, which is not run: write a model file"
        )

    parts = {}
    for name, value in index.items():
        # Only parts are [library, class]; an absent part is [null, null].
        pair = isinstance(value, list) and len(value) == 2 and value[0] is not None
        if name.startswith("_") or not pair:
            continue
        library, kind = str(value[0]), str(value[1])
        classes = known.get(name, {})
        if name == "scheduler" and library == "diffusers":
            classes = {kind: kind}  # which the process checks
        if library not in LIBRARIES or kind not in classes:
            limit = (
                f"only {' and '.join(dict.fromkeys(classes.values()))}"
                if classes
                else "no such part"
            )
            raise wrong(
                f"{folder}: {name} of class {library}.{kind} is not supported ({limit}): "
                "write a model file for it"
            )
        parts[name] = classes[kind]

    if not {"unet", "transformer"} & set(parts):
        raise wrong(f"{file}: names no unet or transformer")
    if "scheduler" not in parts:
        raise wrong(f"{file}: names no scheduler")
    for group in ({"unet", "transformer"}, {"vae", "vqvae"}):
        if len(group & set(parts)) > 1:
            raise wrong(f"{folder}: more than one of {', '.join(sorted(group))} is not supported")
    return parts


def pipeline_name(folder: Path) -> str:
    """What model_index.json calls the pipeline; empty where it says nothing that can be read."""
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    name = index.get("_class_name") if isinstance(index, dict) else None
    return name if isinstance(name, str) else ""


def one_of(names, parts) -> str:
    """The one of these parts that is there, or nothing."""
    return next((name for name in names if name in parts), "")


def home(folder: Path, part: str) -> Path:
    """The part's folder; the first pipelines (google/ddpm-*) keep everything in one."""
    return folder / part if (folder / part).is_dir() else folder


def variant_of(place: Path) -> str | None:
    """None where a folder has weights without a variant's name, else the variant that is read:
    half precision, or the only one there is."""
    files = [*place.glob("*.safetensors*"), *place.glob("*.bin*")]
    found = {variant_in(path) for path in files if path.name.startswith(STEMS)}
    if not found:
        raise wrong(f"{place}: no weights ({WEIGHTS}.safetensors or .bin)")
    for variant in (None, "fp16", "bf16"):
        if variant in found and (variant is None or found <= {"fp16", "bf16"}):
            return variant
    if len(found) > 1:
        raise wrong(
            f"{place}: several variants of the weights ({', '.join(sorted(map(str, found)))}), and "
            "none without a variant's name: leave the one that is meant"
        )
    return found.pop()


def variant_in(path: Path) -> str | None:
    """In the name of a file of weights, or of the index of its shards."""
    name = re.sub(r"-?\d+-of-\d+", "", path.name)
    name = name.replace(".index", "").removesuffix(".json")
    return re.sub(r"^[^.]*\.?|\.?(safetensors|bin)\.?", "", name) or None


def read_config(place: Path) -> dict:
    """config.json of a network's folder."""
    with refuse(f"{place}/config.json"):
        config = json.loads((place / "config.json").read_text("utf-8"))
    if config.get("quantization_config"):
        raise wrong(f"{place}: quantised weights (quantization_config) are not supported")
    return config


def read_network(network_class: Any, place: Path, exactly: bool = True) -> nn.Module:
    """A network of a folder, complete and finite, in eval mode, float32, on the CPU. exactly: its
    weights are all that the files hold."""
    variant = variant_of(place)
    read_config(place)

    # Building it draws first weights, which must not shift the random numbers of the run.
    with torch.random.fork_rng(devices=[]), refuse(place):
        net, found = network_class.from_pretrained(
            place,
            variant=variant,
            use_safetensors=any(
                variant_in(path) == variant for path in place.glob("*.safetensors")
            ),
            dtype=torch.float32,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    for fault in ("missing", "unexpected") if exactly else ("missing",):
        names = sorted(found[f"{fault}_keys"])
        if names:
            more = "is" if len(names) == 1 else f"and {len(names) - 1} more are"
            raise wrong(f"{place}: {names[0]} {more} {fault} in the weights")
    check_finite(net, place)
    return net.eval()


def check_finite(net: nn.Module, place: Path) -> None:
    for name, tensor in net.state_dict().items():
        if not tensor.isfinite().all():
            raise wrong(f"{place}: {name} has values that are not finite")


def public(config) -> dict:
    """A configuration as a dict of JSON values, without the notes that diffusers keeps in it."""
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    return json.loads(json.dumps(kept, default=str))


def options(net) -> dict:
    """What a network was built with; other things in its configuration (an EMA's) are left out."""
    known = inspect.signature(type(net).__init__).parameters
    return {key: value for key, value in public(net.config).items() if key in known}


def input_shape(config: dict, place: Path) -> tuple[int, int, int]:
    """(channels, height, width) of the noise."""
    size = config["sample_size"]
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise wrong(
            f"{place}/config.json: sample_size is {size}, not the height and width of the noise"
        )
    return (config["in_channels"], *sides)


# --------------------- writing a folder
@contextlib.contextmanager
def new_folder(path: Path, base: Path):
    """A folder to write into, which takes the place of `path` once all is there: a stop in the
    middle leaves no half of it under its name."""
    origin, target = base.resolve(), path.resolve()
    if origin == target or target in origin.parents:
        raise wrong(f"{path}: would replace the base {base}: choose another folder")
    if path.exists() and not (path / RECIPE).is_file():
        raise wrong(f"{path}: exists and is not this program's work: choose another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as part:
            new = Path(part) / "new"
            new.mkdir()
            yield new
            if path.exists():
                os.rename(path, Path(part) / "old")
            os.rename(new, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise wrong(f"{path} cannot be written, is the disk full? ({error})") from error


def write_network(net: nn.Module, place: Path) -> None:
    """The weights of a network, each with storage of its own, as safetensors wants it."""
    tensors = {}
    for name, tensor in net.state_dict().items():
        empty = torch.empty(tensor.shape, dtype=torch.float32)
        tensors[name] = empty.copy_(tensor.detach())
    write_tensors(tensors, place / f"{WEIGHTS}.safetensors", {"format": "pt"})


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    # As bytes: safetensors would make a file that only its owner can read.
    path.write_bytes(safetensors.torch.save(tensors, metadata))
