"""Pickles of networks are parsed, never run."""

import dataclasses
import io
import itertools
import math
import pickletools
import sys
import zipfile

import numpy as np
import torch

from .files import Refused, file_bytes, printable

# A pickle is a program for Python's unpickler. None runs here: SafeUnpickler walks over its opcodes
# and builds plain data. Safe by construction, whatever the file says:
#   opcodes   those of EDM's and torch's own files (protocols 2 to 5); any other is refused
#   names     those in the tables below; each stands for a function here, nothing is imported
#   time      opcodes are counted; a step costs no more than its operands or bytes of the file
#   memory    storages and text are hardly larger than the file, tensors not larger than it
#   nesting   nothing follows the data's own nesting: no recursion, hash or repr of a container
MOST_OPCODES = 500_000  # EDM's CIFAR-10 network has 72,163 (75,815 in protocol 2)


SPARE_BYTES = 300 << 20  # beyond a file's own size


MOST_NAMES = 20_000  # of tensors and modules; 427 tensors there


MOST_DIMENSION = 1 << 40  # of a tensor, and of its strides and offset


TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save's old format begins with it and its version


TORCH_VERSION = 1001


class Limits:
    """What a file of `size` bytes may still use: opcodes, bytes of text and storages, tensors."""

    def __init__(self, size):
        self.left = {"opcodes": MOST_OPCODES, "memory": size + SPARE_BYTES, "tensors": size}

    def spend(self, what, amount):
        self.left[what] -= amount
        if self.left[what] < 0:
            raise Refused(f"it needs more {what} than a network of its size")


@dataclasses.dataclass(eq=False)
class Inert:
    """An object that a pickle names, as data: EDM's modules, torch's containers, numpy numbers."""

    name: str = ""
    state: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Storage:
    """The elements [count] that tensors are views of; in torch's old format they come last."""

    elements: torch.Tensor

    def fill(self, raw):
        target = self.elements.view(torch.uint8).numpy()
        if len(raw) != len(target):
            raise Refused(
                f"a storage of {len(target)} bytes has {len(raw)}, the file is cut off or damaged"
            )
        if len(target):
            target[:] = np.frombuffer(raw, np.uint8)


STORAGE_TYPES = {
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
}


# The opcodes of EDM's and torch's own files, protocols 2 to 5, by what they need.
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


CONTAINERS = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": Inert}


NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}


TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}


BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}


MEMO = {"MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}


ITEMS = {"MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS"}


CALLS = {"GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"}


ADMITTED = {*CONSTANTS, *CONTAINERS, *NUMBERS, *TEXTS, *BYTES, *MEMO, *ITEMS, *CALLS}


ADMITTED |= {"PROTO", "FRAME", "STOP"}


OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes if opcode.name in ADMITTED}


CUT_OFF = "it ends in the middle, the file is cut off"


class SafeUnpickler:
    """One pickle after the other of a stream, as plain data; the names are those of torch.save.

    stream: binary file; data: memoryview of the same bytes. Values: None, bool, int, float, str,
    memoryview (for bytes), tuple, list, dict, torch.dtype, Tensor, Inert and Storage."""

    def __init__(self, stream, data, limits):
        self.stream, self.data, self.limits = stream, data, limits
        self.storages = {}  # key -> Storage
        self.names = STORAGE_TYPES | {
            ("collections", "OrderedDict"): self.plain_dict,
            ("torch._utils", "_rebuild_parameter"): self.parameter,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
        }

    def load(self):
        """The next pickle; the stream then stands behind it."""
        self.stack, self.marks, self.memo = [], [], {}
        name = None
        while name != "STOP":
            self.limits.spend("opcodes", 1)
            code = self.stream.read(1).decode("latin1")
            if code not in OPCODES:
                name = pickletools.code2op[code].name if code in pickletools.code2op else repr(code)
                raise Refused(f"opcode {name}, which EDM's files do not have" if code else CUT_OFF)
            name, operand = OPCODES[code].name, OPCODES[code].arg
            self.step(name, operand.reader(self.stream) if operand else None)
        return self.stack.pop()

    def step(self, opcode, arg):
        stack = self.stack
        if opcode in CONSTANTS:
            stack.append(CONSTANTS[opcode])
        elif opcode in CONTAINERS:
            stack.append(CONTAINERS[opcode]())
        elif opcode in NUMBERS:
            stack.append(arg)
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            self.work(opcode, arg)

    def work(self, opcode, arg):
        stack, memo = self.stack, self.memo
        match opcode:
            # Text, bytes, and what was there before
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                self.limits.spend("memory", sys.getsizeof(arg))
                stack.append(arg)
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
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if opcode == "SETITEM" else self.since_mark()
                self.set_items(self.top(dict), items)

            # Names, and calls of the functions that they stand for
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
                self.build(stack.pop())
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))

    def named(self, module, name):
        found = self.names.get((module, name)) if type(module) is type(name) is str else None
        if found is None:
            name = ".".join(part for part in (module, name) if type(part) is str)
            raise Refused(f"it wants to call {printable(name)}")
        return found

    def since_mark(self):
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind):
        if type(self.stack[-1]) is not kind:
            raise Refused(f"items for something that is not a {kind.__name__}")
        return self.stack[-1]

    def set_items(self, target, items):
        """items: key, value, key, value, ...; a key that is long or deep could be slow to hash."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            text = type(key) is str and len(key) <= 200
            number = type(key) is int and 0 <= key < 100_000
            if not (text or number):
                raise Refused("a dictionary's key is neither short text nor a small integer")
            target[key] = value

    def build(self, state):
        """The state of an Inert; attributes of a dict (torch's _metadata, hooks) are not needed."""
        target = self.stack[-1]
        if type(target) is Inert:
            target.state = state if type(state) is dict else {}
        elif type(target) is not dict:
            raise Refused("BUILD would change the attributes of something that has none")

    # The functions that names in the pickle stand for; what they are given can be anything.
    def plain_dict(self):
        return {}

    def parameter(self, tensor, requires_grad=False, hooks=None):
        return tensor

    def tensor(self, storage, offset, size, stride, *_):
        """A view of the storage; repeated elements (stride 0) count as often as they appear."""
        for numbers in (size, stride, (offset,)):
            if type(numbers) is not tuple or len(numbers) > 8:
                raise Refused("the size of a tensor is not a short tuple")
            if not all(type(n) is int and 0 <= n < MOST_DIMENSION for n in numbers):
                raise Refused("the size of a tensor has something else than non-negative integers")
        if type(storage) is not Storage or len(size) != len(stride):
            raise Refused("a tensor without a storage of its shape")

        elements = storage.elements
        self.limits.spend("tensors", math.prod(size) * elements.itemsize)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 in size:
            return elements.new_empty(size)
        if last >= len(elements):
            raise Refused("a tensor reaches beyond its storage")
        return elements.as_strided(size, stride, offset)

    def persistent(self, value):
        """("storage", type, key, device, count, ...) of torch.save -> Storage on the CPU."""
        if (
            type(value) is not tuple
            or len(value) < 5
            or type(value[0]) is not str
            or value[0] != "storage"
        ):
            raise Refused("a persistent object that is no storage")
        _, dtype, key, _, count, *_ = value
        if type(key) is not str or len(key) > 200:
            raise Refused("a storage without a name")
        if key not in self.storages:
            self.storages[key] = self.new_storage(key, dtype, count)
        elements = self.storages[key].elements
        if elements.dtype != dtype or len(elements) != count:
            raise Refused("a storage of two types or sizes")
        return self.storages[key]

    def new_storage(self, key, dtype, count):
        if (
            type(dtype) is not torch.dtype
            or type(count) is not int
            or not 0 <= count < MOST_DIMENSION
        ):
            raise Refused("a storage without type or size")
        self.limits.spend("memory", count * dtype.itemsize)
        return Storage(torch.empty(count, dtype=dtype))


class EdmUnpickler(SafeUnpickler):
    """A network snapshot: EDM's persistent objects, and storages that are pickles in the pickle."""

    def __init__(self, stream, data, limits):
        super().__init__(stream, data, limits)
        self.names |= {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): self.persistent_object,
            ("torch.storage", "_load_from_bytes"): self.storage_of_bytes,
            ("torch.nn.modules.container", "ModuleDict"): self.object,
            ("torch.nn.modules.container", "ModuleList"): self.object,
            ("torch.nn.modules.container", "Sequential"): self.object,
            ("numpy", "dtype"): self.object,
            ("numpy.core.multiarray", "scalar"): self.object,
            ("numpy._core.multiarray", "scalar"): self.object,
            ("builtins", "set"): self.object,
            ("__builtin__", "set"): self.object,
            ("dnnlib.util", "EasyDict"): self.plain_dict,
            ("_codecs", "encode"): self.encoded,
        }

    def object(self, *_):
        return Inert()

    def persistent_object(self, meta):
        """EDM's modules carry their source, which EDM runs; here it is text that nobody reads."""
        name, state = (
            (meta.get("class_name"), meta.get("state")) if type(meta) is dict else (None, None)
        )
        if type(name) is not str or type(state) is not dict:
            raise Refused("a persistent object without class_name and state")
        return Inert(name, state)

    def storage_of_bytes(self, blob):
        if type(blob) is Inert and type(blob.state.get("latin1")) is str:
            blob = memoryview(blob.state["latin1"].encode("latin1"))
        if type(blob) is not memoryview:
            raise Refused("a storage that is not bytes")
        if bytes(blob[:2]) == b"PK":
            raise Refused("a storage in a zip archive, which could be compressed")
        return read_legacy(io.BytesIO(blob[:4096]), blob, self.limits)

    def encoded(self, text, encoding):
        """Protocol 2 has no bytes: they are text in Latin-1."""
        if type(text) is not str or type(encoding) is not str or encoding != "latin1":
            raise Refused("text in an encoding other than Latin-1")
        return Inert(state={"latin1": text})


def read_legacy(stream, data, limits):
    """torch.save's old format: magic number, version, system, value and keys, then the storages."""
    reader = SafeUnpickler(stream, data, limits)
    magic, version = reader.load(), reader.load()
    if (type(magic), magic, type(version), version) != (int, TORCH_MAGIC, int, TORCH_VERSION):
        raise Refused("neither a torch.save archive nor its old format")
    system, value, keys = reader.load(), reader.load(), reader.load()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("written on a big-endian machine")
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise Refused("its storages have no names")
    if sorted(keys) != sorted(reader.storages):
        raise Refused("its storages are not the ones that its tensors need")

    # Each storage: its element count in 8 bytes, then the elements.
    position = stream.tell()
    for key in keys:
        storage = reader.storages[key]
        start, position = position + 8, position + 8 + storage.elements.nbytes
        if int.from_bytes(data[start - 8 : start], "little") != len(storage.elements):
            raise Refused(f"storage {printable(key)} has another size than its tensors say")
        storage.fill(data[start:position])
    if position != len(data):
        raise Refused("it goes on behind its last storage")
    return value


class ZipUnpickler(SafeUnpickler):
    """data.pkl of torch.save's archive; the storages are files beside it, with checksums."""

    def __init__(self, archive, folder, limits):
        self.archive, self.folder = archive, folder
        data = self.entry("data.pkl")
        super().__init__(io.BytesIO(data), memoryview(data), limits)
        if f"{folder}byteorder" in archive.namelist() and self.entry("byteorder") != b"little":
            raise Refused("written on a big-endian machine")

    def entry(self, name):
        info = self.archive.getinfo(self.folder + name)
        if info.compress_type != zipfile.ZIP_STORED:  # it could inflate
            raise Refused(f"{printable(name)} in it is compressed, torch.save compresses nothing")
        return self.archive.read(info)

    def new_storage(self, key, dtype, count):
        storage = super().new_storage(key, dtype, count)
        storage.fill(self.entry(f"data/{key}"))
        return storage


def checked_torch_load(path):
    """What torch.save wrote, archive or old format, as plain data and CPU tensors; nothing is run.

    For state dicts, optimizer and training states: numbers, text, tuples, lists, dicts and tensors
    (an OrderedDict is a dict). Refused or another of FILE_ERRORS: use it inside reading()."""
    data = file_bytes(path)
    limits = Limits(len(data))
    if not data.startswith(b"PK"):
        return read_legacy(io.BytesIO(data), memoryview(data), limits)
    if data.count(b"PK\x01\x02") > MOST_NAMES:  # entries, before each becomes an object
        raise Refused("an archive of too many files")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        folders = [
            name.removesuffix("data.pkl")
            for name in archive.namelist()
            if name.endswith("/data.pkl")
        ]
        if len(folders) != 1:
            raise Refused("an archive without data.pkl: torch.save did not write it")
        return ZipUnpickler(archive, folders[0], limits).load()


def inert_tensors(module, prefix="", steps=None):
    """(name, tensor) of an inert module tree in state-dict order; shared ones count each time."""
    steps = steps or itertools.count()
    for kind in ("_parameters", "_buffers", "_modules"):
        entries = module.state.get(kind, {}) if type(module) is Inert else None
        if type(entries) is not dict:
            raise Refused("a module that is no module")
        for name, value in entries.items():
            if next(steps) > MOST_NAMES:
                raise Refused("it has too many tensors and modules")
            if type(name) is not str or not name or "." in name or len(prefix) > 200:
                raise Refused("names of modules that torch does not have")
            if kind == "_modules" and value is not None:
                yield from inert_tensors(value, f"{prefix}{name}.", steps)
            elif value is not None:
                yield prefix + name, value
