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
    """Hash of the names and the content of a network's parameters and buffers, and of its options
    if it has a dictionary `config` of them: EDM's preconditioning is no tensor."""
    digest = hashlib.sha256()
    config = getattr(net, "config", None)
    if type(config) is dict:  # not the one of diffusers, which holds paths and versions
        digest.update(key_of(config).encode())
    for name, tensor in net.state_dict().items():
        if isinstance(tensor, torch.Tensor):  # a module may keep other things beside them
            digest.update(f"{name} {tensor_hash(tensor)}\n".encode())
    return digest.hexdigest()[:16]
