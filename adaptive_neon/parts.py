"""Parts of an experiment: made once, then read back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .files import Refused, load_state, reading, save_state
from .keys import part_key


def finished(
    folder: Path, constants: dict, name: str, kind: type, make: Callable, *inputs: Any
) -> Any:
    """A part of an experiment: make(*inputs), or what an earlier run stored for the same inputs.

    Its key says all that determines it: the inputs by content, earlier parts among them, and the
    constants. kind: the dataclass of tensors and plain data that holds it."""
    key = part_key(name=name, constants=constants, inputs=inputs)
    path = folder / f"{name}, {key}.safetensors"
    if path.exists():
        with reading(f"{path} is damaged or foreign: delete it and run again"):
            tensors, facts = load_state(path)
            if facts.pop("key", None) != key:
                raise Refused("it is not what its name says")
            return kind(**tensors, **facts)

    part = make(*inputs)
    tensors, facts = {}, {"key": key}
    for field, value in vars(part).items():
        kept = tensors if isinstance(value, torch.Tensor) else facts
        kept[field] = value
    folder.mkdir(parents=True, exist_ok=True)
    save_state(path, tensors, facts)
    return part
