"""EDM's pickled networks, read as plain data: nothing in them is imported or called.

A pickle is a program for Python's unpickler. None runs here: PickleReader walks over its opcodes.
  opcodes   those of EDM's files (protocols 2 to 5), at most MOST_OPCODES of them
  names     those in the tables below; each stands for a type or a method here
  bytes     text is hardly larger than the file; tensors are views of the file itself
  nesting   nothing follows the data's own nesting: no recursion, hash or repr of a container"""

import io
import itertools
import mmap
import pickletools
import sys
from pathlib import Path

import torch

from .files import Refused, printable

MOST_OPCODES = 500_000  # EDM's CIFAR-10 network has 72,163, that of ImageNet 92,477
SPARE_BYTES = 300 << 20  # of text, beyond the file's own size
MOST_NAMES = 20_000  # of tensors and modules; 427 tensors there
MOST_SIZE = 1 << 40  # of a tensor in one direction, and of its strides and offset


class Inert:
    """An object that a pickle names, as data: EDM's modules, torch's containers, numpy numbers."""

    def __init__(self, name="", state=None):
        self.name, self.state = name, state or {}


# Nothing is done for PROTO, FRAME, STOP and BINPERSID: storage() knows what the latter's tuple is.
ADMITTED = {
    *"""PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE EMPTY_LIST
EMPTY_DICT EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS MEMOIZE BINPUT
LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID""".split()
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": Inert}
ITEMS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}  # others: to the mark
STORAGE_NAMES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
}
NETWORK_NAMES = {
    "collections.OrderedDict": "plain_dict",
    "dnnlib.util.EasyDict": "plain_dict",
    "torch._utils._rebuild_parameter": "parameter",
    "torch._utils._rebuild_tensor_v2": "tensor",
    "torch.storage._load_from_bytes": "storage",
    "torch_utils.persistence._reconstruct_persistent_obj": "persistent_object",
    "_codecs.encode": "encoded",
}
for name in """torch.nn.modules.container.ModuleDict builtins.set __builtin__.set numpy.dtype
numpy.core.multiarray.scalar numpy._core.multiarray.scalar""".split():
    NETWORK_NAMES[name] = "other_object"


class PickleReader:
    """The pickles of a stream, one after the other, as plain data.

    stream: binary file; data: writable memoryview of the same bytes. names: what a pickle may name,
    {its name: a type, or the name of a method}. Values: None, bool, int, float, str,
    memoryview (for bytes), tuple, list, dict, torch.dtype, Tensor and Inert."""

    def __init__(self, stream, data, names, opcodes=MOST_OPCODES):
        self.stream, self.data, self.names = stream, data, names
        self.opcodes, self.text = opcodes, len(data) + SPARE_BYTES  # what is left of them

    def load(self):
        """The next pickle; the stream then stands behind it."""
        self.stack, self.marks, self.memo = [], [], {}
        name = ""
        while name != "STOP":
            self.opcodes -= 1
            if self.opcodes < 0:
                raise Refused("it needs more opcodes than a network")
            code = self.stream.read(1).decode("latin1")
            name = pickletools.code2op[code].name if code in pickletools.code2op else code
            if name not in ADMITTED:
                problem = f"opcode {printable(name)}, which EDM's files do not have"
                raise Refused(problem if code else "it ends in the middle, the file is cut off")
            operand = pickletools.code2op[code].arg
            self.step(name, operand.reader(self.stream) if operand else None)
        return self.stack.pop()

    def step(self, opcode, arg):
        stack, memo = self.stack, self.memo
        match opcode:
            # Values, and what was there before
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
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.taken(ITEMS.get(opcode))))
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS":
                items = self.taken(ITEMS.get(opcode))
                self.put_into(stack[-1], items)

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
                state = stack.pop()  # a dict's (torch's _metadata, hooks) is not needed
                if type(stack[-1]) is Inert:
                    stack[-1].state = state if type(state) is dict else {}
                elif type(stack[-1]) is not dict:
                    raise Refused("BUILD would change something that has no attributes")

    def counted(self, text):
        self.text -= sys.getsizeof(text)  # one wide character makes all of them wide
        if self.text < 0:
            raise Refused("it needs more memory for its text than a network")
        return text

    def named(self, module, name):
        name = ".".join(part for part in (module, name) if type(part) is str)
        if name not in self.names:
            raise Refused(f"it wants to call {printable(name)}")
        found = self.names[name]
        return getattr(self, found) if type(found) is str else found

    def taken(self, count):
        """The last items of the stack: so many, or all since the last mark."""
        start = len(self.stack) - count if count else self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def put_into(self, target, items):
        """Of a dict: key, value, key, value, ...; a key long or deep could be slow to hash."""
        if type(target) is list:
            target.extend(items)
            return
        if type(target) is not dict:
            raise Refused("items for something that is neither list nor dictionary")
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
        sized = type(size) is type(stride) is tuple and len(size) == len(stride)
        if not sized or type(elements) is not torch.Tensor or elements.ndim != 1:
            raise Refused("a tensor without a size or a storage")
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
        reader = PickleReader(stream, blob, STORAGE_NAMES, self.opcodes)
        magic, _, system, saved, _ = (reader.load() for _ in range(5))
        self.opcodes = reader.opcodes
        little = type(system) is dict and system.get("little_endian") is True
        if type(magic) is not int or magic != 0x1950A86A20F9469CFC6C or not little:
            raise Refused("a storage that is not in the old format of torch.save, little-endian")

        _, dtype, _, _, count, *_ = saved
        start = stream.tell() + 8
        elements = blob[start:]
        typed = type(dtype) is torch.dtype and type(count) is int
        whole = typed and len(elements) == count * dtype.itemsize > 0
        if not whole or int.from_bytes(blob[start - 8 : start], "little") != count:
            raise Refused("a storage of another size than it says, the file is cut off or damaged")
        return torch.frombuffer(elements, dtype=dtype)


def read_pickle(path: Path):
    """The pickle of an EDM network in a file, with PickleReader's values; use inside reading()."""
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
