"""Keys of cached results: hashes of the content that decides them."""

import dataclasses
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


def part_key(name, constants, inputs):
    """Of a part of the toy: its name, what every part depends on, and the part's own inputs, by
    content: plain data, tensors and dataclasses of these."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return tensor_hash(value)
        if dataclasses.is_dataclass(value):
            return [type(value).__name__, vars(value)]
        raise TypeError(f"no key of {type(value)}")

    content = json.dumps([name, constants, inputs], sort_keys=True, default=plain)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
