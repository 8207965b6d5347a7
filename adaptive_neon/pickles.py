"""EDM's pickled networks, read as plain data: nothing in them is imported or called.

A pickle is a program for Python's unpickler. Here none runs: PickleReader walks over its opcodes
and builds plain data. Safe by construction, whatever the file says:
  opcodes   those of EDM's files (protocols 2 to 5), at most MOST_OPCODES of them
  names     those in the tables below; each stands for a type or a method here
  bytes     text is hardly larger than the file; tensors are views of the file itself
  nesting   nothing follows the data's own nesting: no recursion, hash or repr of a container"""

import dataclasses
import io
import itertools
import mmap
import pickletools
import sys
from pathlib import Path

import torch

from .files import Refused, printable

MOST_OPCODES = 500_000  # EDM's CIFAR-10 network has 72,163 (75,815 in protocol 2)
SPARE_BYTES = 300 << 20  # of text, beyond the file's own size
MOST_NAMES = 20_000  # of tensors and modules; 427 tensors there
MOST_SIZE = 1 << 40  # of a tensor in one direction, and of its strides and offset
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save's old format begins with it


@dataclasses.dataclass(eq=False)
class Inert:
    """An object that a pickle names, as data: EDM's modules, torch's containers, numpy numbers."""

    name: str = ""
    state: dict = dataclasses.field(default_factory=dict)


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": Inert}

STORAGE_NAMES = {
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
}

NETWORK_NAMES = {
    ("collections", "OrderedDict"): "plain_dict",
    ("dnnlib.util", "EasyDict"): "plain_dict",
    ("torch._utils", "_rebuild_parameter"): "parameter",
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    ("torch.storage", "_load_from_bytes"): "storage",
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): "persistent_object",
    ("torch.nn.modules.container", "ModuleDict"): "other_object",
    ("numpy", "dtype"): "other_object",
    ("numpy.core.multiarray", "scalar"): "other_object",
    ("numpy._core.multiarray", "scalar"): "other_object",
    ("builtins", "set"): "other_object",
    ("__builtin__", "set"): "other_object",
    ("_codecs", "encode"): "encoded",
}


class PickleReader:
    """The pickles of a stream, one after the other, as plain data.

    stream: binary file; data: writable memoryview of the same bytes. names: what a pickle may name,
    {(module, name): a type, or the name of a method}. Values: None, bool, int, float, str,
    memoryview (for bytes), tuple, list, dict, torch.dtype, Tensor and Inert."""

    def __init__(self, stream, data, names):
        self.stream, self.data, self.names = stream, data, names
        self.opcodes, self.text = MOST_OPCODES, len(data) + SPARE_BYTES  # what is left of them

    def load(self):
        """The next pickle; the stream then stands behind it."""
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, arg, _ in pickletools.genops(self.stream):
            self.opcodes -= 1
            if self.opcodes < 0:
                raise Refused("it needs more opcodes than a network")
            self.step(opcode.name, arg)
        return self.stack.pop()

    def step(self, opcode, arg):
        stack, memo = self.stack, self.memo
        match opcode:
            # Values, and what was there before
            case "PROTO" | "FRAME" | "STOP" | "BINPERSID":
                pass  # the last: storage() knows what its tuple means
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(CONSTANTS[opcode])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append(CONTAINERS[opcode]())
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(arg)
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                stack.append(self.counted(arg))
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                end = self.stream.tell()
                stack.append(self.data[end - len(arg) : end])
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT":
                memo[len(memo) if arg is None else arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])

            # Items of containers
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(opcode[-1]))]
                stack.append(tuple(reversed(items)))
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode == "APPEND" else self.since_mark()
                if type(stack[-1]) is not list:
                    raise Refused("items for something that is not a list")
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if opcode == "SETITEM" else self.since_mark()
                self.set_items(stack[-1], items)

            # Names, and calls of what they stand for
            case "GLOBAL":
                stack.append(self.named(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self.named(module, name))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                if type(args) is not tuple or not callable(function):
                    raise Refused(f"{opcode} of something that is not a call")
                stack.append(function(*args))
            case "BUILD":
                # Attributes of a dict (torch's _metadata, hooks) are not needed.
                state = stack.pop()
                if type(stack[-1]) is Inert:
                    stack[-1].state = state if type(state) is dict else {}
                elif type(stack[-1]) is not dict:
                    raise Refused("BUILD would change something that has no attributes")
            case _:
                raise Refused(f"opcode {opcode}, which EDM's files do not have")

    def counted(self, text):
        """One wide character makes all of a text wide."""
        self.text -= sys.getsizeof(text)
        if self.text < 0:
            raise Refused("it needs more memory for its text than a network")
        return text

    def named(self, module, name):
        found = self.names.get((module, name)) if type(module) is type(name) is str else None
        if found is None:
            name = ".".join(part for part in (module, name) if type(part) is str)
            raise Refused(f"it wants to call {printable(name)}")
        return getattr(self, found) if type(found) is str else found

    def since_mark(self):
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def set_items(self, target, items):
        """items: key, value, key, value, ...; a key that is long or deep could be slow to hash."""
        if type(target) is not dict:
            raise Refused("items for something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not (type(key) is str and len(key) <= 200):
                raise Refused("a dictionary's key is not a short text")
            target[key] = value

    # What the names in a pickle stand for; what they are given can be anything.
    def plain_dict(self):
        return {}

    def other_object(self, *_):
        return Inert()

    def persistent_object(self, meta):
        """EDM's modules carry their source, which EDM runs; here it is text that nobody reads."""
        meta = meta if type(meta) is dict else {}
        name, state = meta.get("class_name"), meta.get("state")
        if type(name) is not str or type(state) is not dict:
            raise Refused("a persistent object without class_name and state")
        return Inert(name, state)

    def encoded(self, text, encoding):
        """Protocol 2 has no bytes: they are text in Latin-1."""
        if type(text) is not str or type(encoding) is not str or encoding != "latin1":
            raise Refused("text in an encoding other than Latin-1")
        return memoryview(bytearray(self.counted(text).encode("latin1")))

    def parameter(self, tensor, requires_grad=False, hooks=None):
        return tensor

    def tensor(self, elements, offset, size, stride, *_):
        """A view of a storage's elements [count]."""
        if type(elements) is not torch.Tensor or elements.ndim != 1:
            raise Refused("a tensor without a storage")
        if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
            raise Refused("a tensor without a size")
        numbers = (*size, *stride, offset)
        if len(numbers) > 20 or not all(type(n) is int and 0 <= n < MOST_SIZE for n in numbers):
            raise Refused("the size of a tensor is not a few non-negative integers")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 in size or last >= len(elements):
            raise Refused("a tensor is empty or reaches beyond its storage")
        return elements.as_strided(size, stride, offset)

    def storage(self, blob):
        """A storage in torch.save's old format: magic number, version, system, ("storage", type,
        key, device, count, ...) and [key] as pickles; the count in 8 bytes; the elements."""
        if type(blob) is not memoryview:
            raise Refused("a storage that is not bytes")
        stream = io.BytesIO(blob[:4096])
        reader = PickleReader(stream, blob, STORAGE_NAMES)
        magic, _, system, saved, keys = (reader.load() for _ in range(5))
        if type(magic) is not int or magic != LEGACY_MAGIC or type(saved) is not tuple:
            raise Refused("a storage that is not in the old format of torch.save")
        if type(system) is not dict or system.get("little_endian") is not True:
            raise Refused("written on a big-endian machine")

        _, dtype, key, _, count, *_ = saved
        start = stream.tell() + 8
        elements = blob[start:]
        if type(dtype) is not torch.dtype or type(key) is not str or keys != [key]:
            raise Refused("a storage without type and name")
        whole = type(count) is int and len(elements) == count * dtype.itemsize > 0
        if not whole or int.from_bytes(blob[start - 8 : start], "little") != count:
            raise Refused("a storage of another size than it says, the file is cut off or damaged")
        return torch.frombuffer(elements, dtype=dtype)


def read_pickle(path: Path):
    """The pickle of an EDM network in a file, as plain data: see PickleReader for its values.

    Refused or another of FILE_ERRORS: use it inside reading()."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # tensors are views of it
    return PickleReader(mapped, memoryview(mapped), NETWORK_NAMES).load()


def inert_tensors(module, prefix="", steps=None):
    """(name, tensor) of an inert module tree in state-dict order; shared ones count each time."""
    steps = steps or itertools.count()
    for kind in ("_parameters", "_buffers", "_modules"):
        entries = module.state.get(kind, {}) if type(module) is Inert else None
        if type(entries) is not dict:
            raise Refused("a module that is no module")
        for name, value in entries.items():
            if next(steps) > MOST_NAMES or len(prefix) > 200:
                raise Refused("it has too many tensors and modules")
            if kind == "_modules" and value is not None:
                yield from inert_tensors(value, f"{prefix}{name}.", steps)
            elif value is not None:
                yield prefix + name, value
