"""Networks as EDM pickles them, hostile pickles, and a process with limits to read them in."""

import multiprocessing
import pickle
import resource
import struct
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn

import adaptive_neon as neon
import edm_neon as edm

TINY = dict(
    img_resolution=8,
    img_channels=3,
    label_dim=10,
    augment_dim=9,
    model_channels=16,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[4],
    dropout=0.0,
)

NCSN = dict(
    embedding_type="fourier",
    channel_mult_noise=2,
    encoder_type="residual",
    resample_filter=[1, 3, 3, 1],
)


ADM = dict(model_type="DhariwalUNet", model_channels=32, augment_dim=0)


def network(seed=0, **changes):
    torch.manual_seed(seed)
    net = neon.networks.denoiser(**{**TINY, **changes})
    for p in net.parameters():  # initial output layers are almost zero; make every parameter matter
        p.data += 0.05 * torch.randn_like(p)
    return net.eval().requires_grad_(False)


# -------------------- writing files as EDM does


def _reconstruct_persistent_obj(meta):
    raise AssertionError("never called")


class Persistent:
    """Pickles as EDM's decorated classes do: one global, called with a dict that holds source and
    state."""

    def __init__(self, name, state):
        self.name, self.state = name, state

    def __reduce__(self):
        source = "raise SystemExit('executed')"
        meta = dict(type="class", version=6, module_src=source, class_name=self.name)
        return _reconstruct_persistent_obj, (meta | {"state": self.state},)


def persistent(module, name, **extra):
    """A module as EDM pickles it; ModuleDicts are torch's own objects."""
    children = {k: persistent(m, type(m).__name__) for k, m in module._modules.items()}
    if isinstance(module, nn.ModuleDict):
        module = nn.ModuleDict()
        module._modules.update(children)
        return module
    hooks = dict(_forward_hooks=OrderedDict(), _non_persistent_buffers_set=set())
    state = dict(
        training=False, _parameters=dict(module._parameters), _buffers=dict(module._buffers)
    )
    state |= hooks | dict(_modules=OrderedDict(children), skip_scale=np.sqrt(0.5))
    return Persistent(name, state | extra)


def snapshot(net, protocol=4, class_name="", kwargs=None, alone=False, **attributes):
    """Bytes of EDM's network-snapshot-*.pkl. kwargs: others of its options, None for one that is
    left out; alone: without all that is not the network."""
    public = ["img_resolution", "img_channels", "label_dim", *net.attributes]
    extra = {name: getattr(net, name) for name in public} | attributes
    options = dict(model_type="SongUNet", use_fp16=False) | net.options | (kwargs or {})
    options = {k: v for k, v in options.items() if k != "precond" and v is not None}
    class_name = class_name or type(net).__name__
    ema = persistent(net, class_name, **extra, _init_args=(), _init_kwargs=options)
    content = {"ema": ema}
    if not alone:
        loss = Persistent("EDMLoss", dict(P_mean=-1.2, P_std=1.2, sigma_data=0.5))
        content |= {"loss_fn": loss, "augment_pipe": None, "dataset_kwargs": {"xflip": False}}
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    _reconstruct_persistent_obj.__module__ = module.__name__
    modules = {"torch_utils": types.ModuleType("torch_utils"), module.__name__: module}
    sys.modules.update(modules)
    try:
        return pickle.dumps(content, protocol=protocol)
    finally:
        _reconstruct_persistent_obj.__module__ = __name__
        for name in modules:
            del sys.modules[name]


class Evil:
    def __init__(self, call, *args):
        self.parts = call, args

    def __reduce__(self):
        return self.parts


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def options_pickle(**changes):
    """A snapshot without weights, with these options."""
    state = {"_init_kwargs": {**TINY, "model_type": "SongUNet", **changes}, "_modules": {}}
    state |= {"_parameters": {}, "_buffers": {}}
    return pickle_of(state)


def pickle_of(state):
    parts = pickle.dumps(dict(class_name="EDMPrecond", state=state), protocol=2)[2:-1]
    return (
        b"\x80\x02}X\3\0\0\0ema"
        + b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
        + parts
        + b"\x85Rs."
    )


BLOB = torch.ones(4)._typed_storage().__reduce__()[1][0]  # a storage within a pickle


def tensor_pickle(size=b"K\1\x85", stride=b"K\1\x85", offset=b"K\0", storage=None):
    """A snapshot with one tensor, whose size, stride and offset are these opcodes."""
    if storage is None:
        storage = BLOB
    blob = (
        b"ctorch.storage\n_load_from_bytes\nB"
        + struct.pack("<I", len(storage))
        + storage
        + b"\x85R"
    )
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + blob + offset + size + stride + b"\x89}tR"
    head, tail = pickle_of({"_init_kwargs": {}, "_parameters": "HERE"}).split(b"X\4\0\0\0HEREq\x08")
    return head + b"}X\1\0\0\0a" + tensor + b"s" + tail


def long_get(index):
    return b"j" + struct.pack("<I", index)


def long_put(index):
    return b"r" + struct.pack("<I", index)


# A tuple of two tuples of two tuples ...: 2^60 leaves in 900 bytes, put into the memo at 1060.
DOUBLING = b")" + long_put(1000)


DOUBLING += b"".join(2 * long_get(1000 + i) + b"\x86" + long_put(1001 + i) for i in range(60))


DOUBLED = long_get(1060)


def doubled(data, place):
    """A pickle with the doubled tuple in the place of some bytes."""
    assert data.count(place) == 1
    return data[:2] + DOUBLING + data[2:].replace(place, DOUBLED)


def sharing():
    """Five levels of modules with 100 names for one and the same child each."""
    kind = text("_init_kwargs") + b"}" + text("model_type") + text("SongUNet") + b"s"
    data = b"\x80\x04ctorch_utils.persistence\n_reconstruct_persistent_obj\n\x94"
    for level in range(7):
        children = b"".join(text(f"m{i}") + b"h%c" % level for i in range(100 if level else 0))
        state = b"}(" + kind + text("_modules") + b"}(" + children + b"uu"
        data += (
            b"h\0}("
            + text("class_name")
            + text("EDMPrecond")
            + text("state")
            + state
            + b"u\x85R\x94"
        )
    return data + b"}" + text("ema") + b"h\7s."


def shared_tensor():
    """A network of one tensor under fifty names."""
    net = network(model_channels=64)
    big = nn.Parameter(torch.zeros(200_000))
    for i in range(50):
        net.model.map_layer0.register_parameter(f"copy{i}", big)
    return snapshot(net)


def one_storage_many_times():
    """The slow part, its header, is read 60,000 times."""
    blob = b"B" + struct.pack("<I", len(BLOB)) + BLOB
    load = b"ctorch.storage\n_load_from_bytes\n\x94" + blob + b"\x85\x94"
    return b"\x80\x04" + load + b"h\0h\1R" * 60_000 + b"."


def wide_text():
    """One wide character makes all the others four bytes wide."""
    letters = b"a" * 120_000_000 + "\U0001f600".encode()
    return b"\x80\x04X" + struct.pack("<I", len(letters)) + letters + b"\x94."


def colliding_integers():
    rows = (b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(30_000))
    return b"\x80\x04}(" + b"".join(rows) + b"u."


def long_equal_keys():
    key = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"\x94"
    return b"\x80\x04" + key + key + b"}h\0Ns" + b"h\1Ns" * 50_000 + b"."


def many_options():
    rows = (b"M%sN" % struct.pack("<H", i % 65536) for i in range(10**6))
    return b"\x80\x02}(" + b"".join(rows) + b"u."


def deep_sigma():
    state = {"sigma_data": "X", "_init_kwargs": TINY | {"model_type": "SongUNet"}, "_modules": {}}
    return doubled(pickle_of(state), b"X\1\0\0\0X")


def deep_option(**option):
    return doubled(options_pickle(**option), b"X\1\0\0\0X")


CALLS = b"\x80\x04cbuiltins\nset\n\x94" + b"h\0" * 90_000 + b")" + b"\x85R" * 90_000 + b"."
LONG_SIZE = b"(" + b"K\1" * 1000 + b"t"
KEY = "key is not a short text"
NUMBERS = "not a few non-negative integers"
DAMAGED = "a storage of another size than it says"

# {name: (bytes or a function that makes them, why they are refused)}
HOSTILE = {
    # Small files that would take forever where something follows their structure
    "doubling tuples as a key": (doubled(b"\x80\x04}KEYNs.", b"KEY"), KEY),
    "doubling tuples by DUP": (b"\x80\x04)" + b"2\x86" * 40 + b".", "opcode DUP"),
    "doubling tuples in FROZENSET": (doubled(b"\x80\x04(KEY\x91.", b"KEY"), "opcode FROZENSET"),
    "doubling tuples as an option's name": (doubled(options_pickle(zz=1), b"X\2\0\0\0zz"), KEY),
    "doubling tuples as model_type": (deep_option(model_type="X"), "model_type cannot be a tuple"),
    "doubling tuples as encoder_type": (
        deep_option(encoder_type="X"),
        "encoder_type cannot be a t",
    ),
    "doubling tuples as dropout": (deep_option(dropout="X"), "option dropout cannot be a tuple"),
    "doubling tuples as a list": (deep_option(channel_mult="X"), "channel_mult cannot be a tuple"),
    "doubling tuples as sigma_data": (deep_sigma(), "option sigma_data cannot be a tuple"),
    "doubling tuples as a size": (
        doubled(tensor_pickle(size=b"SIZE"), b"SIZE"),
        "without a size or a storage",
    ),
    "doubling tuples as a class name": (
        doubled(pickle_of({}), b"X\n\0\0\0EDMPrecond"),
        "without class_name",
    ),
    "doubling tuples as a storage": (
        doubled(tensor_pickle(storage=b"X"), b"B\1\0\0\0X"),
        "a storage that is not bytes",
    ),
    "colliding integers": (colliding_integers, KEY),
    "long equal keys": (long_equal_keys, KEY),
    "names that share children": (sharing(), "too many tensors and modules"),
    # Nesting and numbers of things
    "nested tuples": (b"\x80\x04)" + b"\x85" * 400_000 + b".", "no network snapshot of EDM"),
    "nested lists": (b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".", "no network snapshot"),
    "90,000 calls": (CALLS, "no network snapshot of EDM"),
    "30 MB of MARK": (b"\x80\x04" + b"(" * 30_000_000 + b".", "more opcodes"),
    "a storage read many times": (one_storage_many_times, "more opcodes"),
    "a million options": (many_options, "more opcodes"),
    "text of wide characters": (wide_text, "MemoryError|more memory"),
    # Sizes that are not there
    "bytes that are not there": (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little"), "1099511627776"),
    "a buffer that is not there": (b"\x80\x05\x96" + (2**40).to_bytes(8, "little"), ""),
    "a huge memo index": (b"\x80\x04Nr\xff\xff\xff\x7f.", "no network snapshot of EDM"),
    "a huge number in a size": (tensor_pickle(size=b"\x8a\xff" + b"\x7f" * 255 + b"\x85"), NUMBERS),
    "a negative stride": (tensor_pickle(stride=b"J\xff\xff\xff\xff\x85"), NUMBERS),
    "a negative offset": (tensor_pickle(offset=b"J\xff\xff\xff\xff"), NUMBERS),
    "a long size": (tensor_pickle(size=LONG_SIZE, stride=LONG_SIZE), NUMBERS),
    "a list as size": (tensor_pickle(size=b"]K\1a"), "without a size or a storage"),
    "a tensor beyond its storage": (tensor_pickle(offset=b"K\4"), "reaches beyond its storage"),
    "an expanded tensor": (
        tensor_pickle(size=b"J\0\0\0\x7f\x85", stride=b"K\0\x85"),
        "its tensors are larger than the file",
    ),
    "a tensor under fifty names": (shared_tensor, "its tensors are larger than the file"),
    # Storages
    "a huge storage": (
        tensor_pickle(storage=BLOB.replace(b"K\x04N", b"\x8a\5\0\0\0\0\2N")),
        DAMAGED,
    ),
    "a storage in a zip archive": (tensor_pickle(storage=b"PK\3\4" + b"\0" * 100), ""),
    "a storage of a big-endian machine": (
        tensor_pickle(storage=BLOB.replace(b"little_endianq\2\x88", b"little_endianq\2\x89")),
        "not in the old format of torch.save, little-endian",
    ),
    "a storage with more behind it": (tensor_pickle(storage=BLOB + b"\0"), DAMAGED),
    "a storage that is cut off": (tensor_pickle(storage=BLOB[:-1]), DAMAGED),
    "a storage with another count": (
        tensor_pickle(storage=BLOB[:-24] + b"\5" + BLOB[-23:]),
        DAMAGED,
    ),
    "a storage without a name": (
        tensor_pickle(storage=BLOB[: BLOB.rindex(b"\x80\2]")] + b"\x80\2]."),
        DAMAGED,
    ),
    # Other things than a network
    "a list that contains itself": (b"\x80\x04]\x94h\0a.", "no network snapshot of EDM"),
    "a dictionary that contains itself": (
        b"\x80\x04}\x94" + text("ema") + b"h\0s.",
        "no network snapshot of EDM",
    ),
    "no dictionary": (b"\x80\x04N.", "no network snapshot of EDM"),
    "no ema": (b"\x80\x04}.", "no network snapshot of EDM"),
    "slots of a dictionary": (
        b"\x80\x02ccollections\nOrderedDict\nN}X\4\0\0\0workK\1s\x86b.",
        "BUILD would change something",
    ),
    "only a header": (b"\x80\x04", "ends in the middle"),
}


def content(name):
    """The bytes of a hostile pickle; the larger ones are made when they are needed."""
    data, _ = HOSTILE[name]
    return data() if callable(data) else data


def work_in_child(path, results):
    """Loads a file with a little more memory and time than the budget; the reason comes back."""
    base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = base + 2 * path.stat().st_size + (500 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 21))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        edm.load_network(path)
        results.send("loaded")
    except neon.files.UserError as error:
        results.send(f"refused: {error}")


def within_limits(path):
    """How loading ends in a process of its own that may use the budget and no more."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=work_in_child, args=(path, theirs))
    child.start()
    theirs.close()
    child.join(120)
    if child.is_alive():
        child.kill()
        return "hung"
    return ours.recv() if ours.poll() else f"died with {child.exitcode}"
