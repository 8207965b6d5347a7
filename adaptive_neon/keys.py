"""Keys of cached results: hashes of the content that decides them."""

import hashlib
import json

import torch

from .files import file_hash


def content_hash(path):
    """Hash of a file, or of all files of a folder and their names in it."""
    if not path.is_dir():
        return file_hash(path)
    files = sorted(part for part in path.rglob("*") if part.is_file())
    return key_of([(str(part.relative_to(path)), file_hash(part)) for part in files])


TRAINING_VERSION, SAMPLING_VERSION, SCORING_VERSION, SEARCH_VERSION = (
    "train 1",
    "sample 1",
    "score 1",
    "search 3",
)


def key_of(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tensor_hash(tensor):
    tensor = tensor.detach().cpu().contiguous()
    data = tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else b""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(data)
    return digest.hexdigest()


def weights_hash(net):
    """Hash of the names and the content of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        if isinstance(tensor, torch.Tensor):  # a module may keep other things beside them
            digest.update(f"{name} {tensor_hash(tensor)}\n".encode())
    return digest.hexdigest()[:16]


def design_key(design, weights):
    """A feature network. design: its layers, printed; weights: weights_hash()."""
    return key_of(design, weights)


def joint_key(parts, images):
    """Feature networks side by side. parts: their identities in order; images: uint8 [N, C, H, W],
    whose variance scales them."""
    return key_of(parts, tensor_hash(images))


def classifier_key(design, seed, stream, images, epochs):
    """A classifier of glyphs: images of a stream, for some epochs."""
    return key_of(TRAINING_VERSION, design, seed, stream, images, epochs)


def reference_key(mean, cov, count, real):
    """Real images in one feature network. mean [D], cov [D, D]: their moments; count: how many
    images these are of; real: features [N, D] of images at hand, or None."""
    hashes = [tensor_hash(mean), tensor_hash(cov)]
    return key_of(*hashes, count, None if real is None else tensor_hash(real))


def judge_key(features, reference):
    """A judge, by the identities of its two sides."""
    return key_of(features, reference)
