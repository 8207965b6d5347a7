"""Keys of cached results: hashes of all that decides a result, by content.

One function a key, with every input in its signature; a score's also holds torch's version. A
version is raised with every change of code that changes the numbers; older results are then made
again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .files import file_hash

TRAINING_VERSION = "train 1"
SAMPLING_VERSION = "sample 1"
SCORING_VERSION = "score 3"
SEARCH_VERSION = "search 4"


# -------------------- what is hashed
def key_of(*parts, default: Callable | None = None) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of plain data; default: what to take for
    anything else, which is an error without it."""
    content = json.dumps(parts, sort_keys=True, default=default)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def tensor_hash(tensor: torch.Tensor) -> str:
    """Of type, shape and content."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_hash(net: nn.Module) -> str:
    """Of the names and the content of a network's parameters and buffers, and of its options if it
    has a dictionary `config` of them: EDM's preconditioning is no tensor."""
    digest = hashlib.sha256()
    config = getattr(net, "config", None)
    if type(config) is dict:  # not the one of diffusers, which holds paths and versions
        digest.update(key_of(config, default=str).encode())  # users' may hold anything
    for name, tensor in net.state_dict().items():
        if isinstance(tensor, torch.Tensor):  # a module may keep other things beside them
            digest.update(f"{name} {tensor_hash(tensor)}\n".encode())
    return digest.hexdigest()[:16]


def content_hash(path: Path) -> str:
    """Of a file, or of all files of a folder and their names in it."""
    if not path.is_dir():
        return file_hash(path)
    files = sorted(part for part in path.rglob("*") if part.is_file())
    return key_of([(str(part.relative_to(path)), file_hash(part)) for part in files])


# -------------------- keys
def pipeline_key(
    *, version: int, network: list, scheduler: dict, guidance: float, autoencoder: list | None
) -> str:
    """A pipeline of diffusers without its denoiser's weights. network: class and options;
    autoencoder: class, options, weights_hash() and the scale of its latents."""
    return key_of(version, network, scheduler, guidance, autoencoder)


def text_key(*, pipeline: str, prompts: list, settings: list) -> str:
    """A pipeline with prompts. pipeline: pipeline_key(); prompts: as they are written; settings:
    what else decides an image, or a training."""
    return key_of(pipeline, prompts, settings)


def base_key(*, initial: str, kimg: float, images: str, model: str, recipe: dict) -> str:
    """A base that is trained from scratch. initial: weights_hash(); images: of the training part;
    model: its training_identity."""
    inputs = {"initial": initial, "kimg": kimg, "data": images, "model": model}
    return key_of(TRAINING_VERSION, inputs, recipe)


def synthetic_key(
    *, base: str, model: str, count: int, labels: str, steps: int, device: str, precision: str
) -> str:
    """Images of the base at seeds 0 to count - 1. base: weights_hash(); model: its identity."""
    return key_of(SAMPLING_VERSION, base, model, count, labels, steps, device, precision)


def self_training_key(*, synthetic: str, model: str, recipe: dict) -> str:
    """A base that goes on training on its own samples. synthetic: synthetic_key()."""
    return key_of(TRAINING_VERSION, synthetic, model, recipe)


def score_key(
    *,
    networks: tuple[str, str],
    weights: dict[str, float],
    model: str,
    judge: str,
    seeds: tuple[int, int],
    steps: int,
    labels: str,
    precision: str,
    device: str,
    folds: int,
) -> str:
    """A merged network's distance to the real data. networks: weights_hash() of base and
    self-trained; weights: {parameter: weight}, so that two partitions of one network share it;
    judge: identity of features and reference; seeds: first and number."""
    return key_of(
        SCORING_VERSION,
        SAMPLING_VERSION,
        torch.__version__,
        networks,
        weights,
        model,
        judge,
        seeds,
        steps,
        labels,
        precision,
        device,
        folds,
    )


def search_key(
    *,
    start: str,
    blocks: dict[str, str],
    fresh: tuple[int, int],
    bounds: tuple[float, float],
    precision: str,
) -> str:
    """The points of a gradient search. start: score_key() of its start on the selection seeds,
    which holds networks, judge and sampling; blocks: {parameter: block}; fresh: its own seeds."""
    return key_of(SEARCH_VERSION, start, blocks, fresh, bounds, precision)


def design_key(*, design: str, weights: str) -> str:
    """A feature network. design: its layers, printed; weights: weights_hash()."""
    return key_of(design, weights)


def joint_key(*, parts: list[str], images: torch.Tensor) -> str:
    """Feature networks side by side. parts: their identities in order; images: uint8 [N, C, H, W],
    whose variance scales them."""
    return key_of(parts, tensor_hash(images))


def classifier_key(*, design: str, seed: int, stream: int, images: int, epochs: int) -> str:
    """A classifier of glyphs, trained on the first images of a stream."""
    return key_of(TRAINING_VERSION, design, seed, stream, images, epochs)


def reference_key(
    *, mean: torch.Tensor, cov: torch.Tensor, count: int, real: torch.Tensor | None
) -> str:
    """Real images in one feature network. mean [D], cov [D, D]: their moments; count: of how many
    images; real: features [N, D] of the images at hand."""
    features = None if real is None else tensor_hash(real)
    return key_of(tensor_hash(mean), tensor_hash(cov), count, features)


def judge_key(*, features: str, reference: str, memory: str = "") -> str:
    """A feature network and the real images seen through it, by their identities. memory: of the
    images whose memorisation is measured, if any."""
    return key_of(features, reference, *filter(None, [memory]))


def memory_key(*, trained: torch.Tensor, unseen: torch.Tensor) -> str:
    """Features [N, D] of images that the base was trained on, and of others."""
    return key_of(tensor_hash(trained), tensor_hash(unseen))


def part_key(*, name: str, constants: dict, inputs: tuple) -> str:
    """A part of the toy. constants: what every part depends on; inputs: the part's own, as they
    are: plain data, tensors, and dataclasses of these."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return tensor_hash(value)
        if dataclasses.is_dataclass(value):
            return [type(value).__name__, vars(value)]
        raise TypeError(f"no key of {type(value)}")

    content = json.dumps([name, constants, inputs], sort_keys=True, default=plain)
    return key_of(content)
