"""edm_neon.py's files: model files of others, images and labels, downloads. Nothing in them is"""

import json
import multiprocessing
import os
import pickle
import pickletools
import re
import resource
import struct
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from edm_helpers import replace
from torch import nn

import adaptive_neon as neon
import edm_neon as edm

torch.set_num_threads(1)


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


def network(seed=0, **changes):
    torch.manual_seed(seed)
    net = edm.EDMPrecond(**{**TINY, **changes})
    for p in net.parameters():  # initial output layers are almost zero; make every parameter matter
        p.data += 0.05 * torch.randn_like(p)
    return net.eval().requires_grad_(False)


def same(net, other):
    mine, theirs = net.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(
        torch.equal(mine[name], theirs[name]) for name in mine
    )


def refused(path, message="refused"):
    with pytest.raises(neon.files.UserError, match=message) as error:
        edm.load_network(path)
    text = str(error.value)
    assert text.startswith(f"network {path} is refused, nothing in it was run (")
    assert text.isprintable() and len(text) < 600
    return text


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


def snapshot(net, protocol=4, class_name="EDMPrecond", kwargs=None, **attributes):
    """Bytes of EDM's network-snapshot-*.pkl."""
    options = dict(net.config, model_type="SongUNet", use_fp16=False) | (kwargs or {})
    extra = dict(sigma_min=0, sigma_max=float("inf"), sigma_data=0.5) | attributes
    ema = persistent(net, class_name, **extra, _init_args=(), _init_kwargs=options)
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    _reconstruct_persistent_obj.__module__ = module.__name__
    modules = {"torch_utils": types.ModuleType("torch_utils"), module.__name__: module}
    sys.modules.update(modules)
    try:
        return pickle.dumps({"ema": ema, "augment_pipe": None}, protocol=protocol)
    finally:
        _reconstruct_persistent_obj.__module__ = __name__
        for name in modules:
            del sys.modules[name]


# -------------------- networks that load


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "options", [{}, NCSN, {"label_dim": 0}], ids=["ddpmpp", "ncsnpp", "uncond"]
)
def test_pickled_networks_load_to_the_bit(tmp_path, options, protocol):
    net = network(**options)
    (tmp_path / "net.pkl").write_bytes(snapshot(net, protocol))
    loaded = edm.load_network(tmp_path / "net.pkl")
    assert same(loaded, net) and loaded.config == net.config


def test_a_loaded_network_is_frozen_and_in_eval_mode(tmp_path):
    (tmp_path / "net.pkl").write_bytes(snapshot(network()))
    net = edm.load_network(tmp_path / "net.pkl")
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in net.state_dict().values())


def test_double_precision_is_rounded(tmp_path):
    (tmp_path / "net.pkl").write_bytes(snapshot(network().double()))
    assert same(edm.load_network(tmp_path / "net.pkl"), network())


def test_half_precision_is_widened(tmp_path):
    (tmp_path / "net.pkl").write_bytes(snapshot(network().half()))
    assert same(edm.load_network(tmp_path / "net.pkl"), network().half().float())


def test_strides_are_kept(tmp_path):
    (tmp_path / "net.pkl").write_bytes(snapshot(network().to(memory_format=torch.channels_last)))
    assert same(edm.load_network(tmp_path / "net.pkl"), network())


def test_shared_storages_become_separate(tmp_path):
    net = network()
    shared = torch.arange(64.0)
    net.model.map_layer0.bias.data = shared
    net.model.map_layer1.bias = net.model.map_layer0.bias  # one object in the pickle
    (tmp_path / "net.pkl").write_bytes(snapshot(net))
    loaded = edm.load_network(tmp_path / "net.pkl")
    loaded.model.map_layer0.bias.zero_()
    assert torch.equal(loaded.model.map_layer1.bias, shared)


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors", ""])
@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_content_decides_not_the_suffix(tmp_path, kind, suffix):
    path = tmp_path / f"net{suffix}"
    if kind == "pickle":
        path.write_bytes(snapshot(network()))
    else:
        edm.save_network(network(), path, {})
    assert same(edm.load_network(path), network())


@pytest.mark.parametrize(
    "name, value", [("sigma_data", 0.6), ("sigma_min", 0.01), ("sigma_max", 50.0)]
)
def test_attributes_of_the_preconditioning_are_read(tmp_path, name, value):
    (tmp_path / "net.pkl").write_bytes(snapshot(network(), **{name: value}))
    assert getattr(edm.load_network(tmp_path / "net.pkl"), name) == value


@pytest.mark.parametrize(
    "name, value", [("sigma_data", 0.6), ("sigma_min", 0.01), ("sigma_max", 50.0)]
)
def test_attributes_of_the_preconditioning_are_saved(tmp_path, name, value):
    edm.save_network(network(**{name: value}), tmp_path / "net", {})
    assert getattr(edm.load_network(tmp_path / "net"), name) == value


# -------------------- networks that are refused


def content(case):
    """The bytes of a case; the larger ones are made when they are needed."""
    return case() if callable(case) else case


class Evil:
    def __init__(self, call, *args):
        self.parts = call, args

    def __reduce__(self):
        return self.parts


EVIL = {
    "posix.system": lambda mark: Evil(os.system, f"touch {mark}"),
    "builtins.eval": lambda mark: Evil(eval, "1 + 1"),
    "builtins.getattr": lambda mark: Evil(getattr, OrderedDict, "fromkeys"),
    "builtins.exec": lambda mark: OrderedDict(a=[Evil(exec, "import os")]),
    "builtins.bytearray": lambda mark: Evil(bytearray, 10**12),
    "builtins.__import__": lambda mark: Evil(__import__, "os"),
    "torch.serialization.load": lambda mark: Evil(torch.load, str(mark)),
    "torch.storage.UntypedStorage": lambda mark: Evil(torch.UntypedStorage, 10**12),
    "pathlib": lambda mark: Evil(Path, str(mark)),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", EVIL)
def test_names_are_refused_without_effect(tmp_path, name, protocol):
    path, mark = tmp_path / "evil.pkl", tmp_path / "mark"
    path.write_bytes(pickle.dumps({"ema": EVIL[name](mark)}, protocol=protocol))
    wanted = name.replace("builtins", "(builtins|__builtin__)")
    refused(path, f"it wants to call {wanted}")
    assert not mark.exists()


ADMITTED = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
BINUNICODE
SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE EMPTY_LIST EMPTY_DICT
EMPTY_SET TUPLE
TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
BINPERSID MEMOIZE BINPUT
LONG_BINPUT BINGET LONG_BINGET""".split()


OTHERS = [op for op in pickletools.opcodes if op.name not in ADMITTED]


@pytest.mark.parametrize("opcode", OTHERS, ids=[op.name for op in OTHERS])
def test_other_opcodes_are_refused(tmp_path, opcode):
    arguments = {"STRING": b"'a'\n", "LONG": b"1L\n", "INST": b"a\nb\n"}
    lines = opcode.arg is not None and opcode.arg.n == pickletools.UP_TO_NEWLINE
    argument = arguments.get(opcode.name, b"1\n" if lines else b"\0" * 8)
    (tmp_path / "net.pkl").write_bytes(
        b"\x80\x04}})" + opcode.code.encode("latin1") + argument + b"."
    )
    refused(tmp_path / "net.pkl", f"opcode {opcode.name}")


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


HOSTILE = {
    "doubling tuples as a key": doubled(b"\x80\x04}KEYNs.", b"KEY"),
    "doubling tuples as keys": doubled(b"\x80\x04}(KEYNu.", b"KEY"),
    "doubling tuples by DUP": b"\x80\x04)" + b"2\x86" * 40 + b".",
    "doubling tuples in DICT": doubled(b"\x80\x04(KEYNd.", b"KEY"),
    "doubling tuples in ADDITEMS": doubled(b"\x80\x04\x8f(KEY\x90.", b"KEY"),
    "doubling tuples in FROZENSET": doubled(b"\x80\x04(KEY\x91.", b"KEY"),
    "doubling tuples as encoder_type": doubled(options_pickle(encoder_type="X"), b"X\1\0\0\0X"),
    "doubling tuples as an option's name": doubled(options_pickle(zz=1), b"X\2\0\0\0zz"),
    "doubling tuples as model_type": doubled(options_pickle(model_type="X"), b"X\1\0\0\0X"),
    "doubling tuples as dropout": doubled(options_pickle(dropout="X"), b"X\1\0\0\0X"),
    "doubling tuples as a list": doubled(options_pickle(channel_mult="X"), b"X\1\0\0\0X"),
    "doubling tuples as sigma_data": doubled(
        pickle_of(
            {"sigma_data": "X", "_init_kwargs": TINY | {"model_type": "SongUNet"}, "_modules": {}}
        ),
        b"X\1\0\0\0X",
    ),
    "doubling tuples as a size": doubled(tensor_pickle(size=b"SIZE"), b"SIZE"),
    "doubling tuples as a class name": doubled(pickle_of({}), b"X\n\0\0\0EDMPrecond"),
    "doubling tuples as a storage": doubled(tensor_pickle(storage=b"X"), b"B\1\0\0\0X"),
    "30,000 colliding integers": lambda: b"\x80\x04}("
    + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(30_000))
    + b"u.",
    "a million nested tuples": b"\x80\x04)" + b"\x85" * 1_000_000 + b".",
    "400,000 nested tuples": b"\x80\x04)" + b"\x85" * 400_000 + b".",
    "400,000 nested lists": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "90,000 calls": b"\x80\x04cbuiltins\nset\n\x94"
    + b"h\0" * 90_000
    + b")"
    + b"\x85R" * 90_000
    + b".",
    "names that share children": sharing(),
    "30 MB of EMPTY_SET": b"\x80\x04" + b"\x8f" * 30_000_000 + b".",
    "30 MB of MARK": b"\x80\x04" + b"(" * 30_000_000 + b".",
    "long equal keys": b"\x80\x04X"
    + struct.pack("<I", 10**6)
    + b"a" * 10**6
    + b"\x94X"
    + struct.pack("<I", 10**6)
    + b"a" * 10**6
    + b"\x94}h\0Ns"
    + b"h\1Ns" * 50_000
    + b".",
    "text of wide characters": lambda: b"\x80\x04"
    + b"X"
    + struct.pack("<I", 150_000_004)
    + b"a" * 150_000_000
    + "\U0001f600".encode()
    + b"\x94.",
    "bytes that are not there": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little"),
    "a buffer that is not there": b"\x80\x05\x96" + (2**40).to_bytes(8, "little"),
    "a huge memo index": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "a list that contains itself": b"\x80\x04]\x94h\0a.",
    "a dictionary that contains itself": b"\x80\x04}\x94" + text("ema") + b"h\0s.",
    "a huge number in a size": tensor_pickle(size=b"\x8a\xff" + b"\x7f" * 255 + b"\x85"),
    "text in a size": tensor_pickle(size=b"\x8a\5\0\0\0\0\2X\1\0\0\0a\x86"),
    "a negative size": tensor_pickle(size=b"J\xff\xff\xff\xff\x85"),
    "a negative stride": tensor_pickle(stride=b"J\xff\xff\xff\xff\x85"),
    "a negative offset": tensor_pickle(offset=b"J\xff\xff\xff\xff"),
    "a long size": tensor_pickle(
        size=b"(" + b"K\1" * 1000 + b"t", stride=b"(" + b"K\1" * 1000 + b"t"
    ),
    "a list as size": tensor_pickle(size=b"]K\1a"),
    "a tensor beyond its storage": tensor_pickle(offset=b"K\4"),
    "an expanded tensor": tensor_pickle(size=b"J\0\0\0\x7f\x85", stride=b"K\0\x85"),
    "a huge storage": tensor_pickle(storage=BLOB.replace(b"K\x04N", b"\x8a\5\0\0\0\0\2N")),
    "a storage in a zip archive": tensor_pickle(storage=b"PK\3\4" + b"\0" * 100),
    "a storage with more behind it": tensor_pickle(storage=BLOB + b"\0"),
    "a storage that is cut off": tensor_pickle(storage=BLOB[:-1]),
    "a storage with another count": tensor_pickle(storage=BLOB[:-24] + b"\5" + BLOB[-23:]),
    "a storage that never comes": tensor_pickle(
        storage=BLOB[: BLOB.rindex(b"\x80\2]")] + b"\x80\2]."
    ),
    "no dictionary": b"\x80\x04N.",
    "no ema": b"\x80\x04}.",
    "attributes of a dictionary class": b"\x80\x02ccollections\nOrderedDict\n}X\4\0\0\0workK\1sb.",
    "slots of a dictionary class": b"\x80\x02ccollections\nOrderedDict\nN}X\4\0\0\0workK\1s\x86b.",
    "only a header": b"\x80\x04",
    "a million options": lambda: b"\x80\x02"
    + b"}("
    + b"".join(b"M%sN" % struct.pack("<H", i % 65536) for i in range(10**6))
    + b"u.",
}


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


def within_limits(path, work=work_in_child):
    """How loading ends in a process of its own that may use the budget and no more."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=work, args=(path, theirs))
    child.start()
    theirs.close()
    child.join(120)
    if child.is_alive():
        child.kill()
        return "hung"
    return ours.recv() if ours.poll() else f"died with {child.exitcode}"


REASONS = {  # of those whose name is no reason; the others are the ones that follow
    "key": "key is neither short text nor a small integer",
    "option's name": "key is neither short text nor a small integer",
    "colliding": "key is neither short text nor a small integer",
    "DUP": "opcode DUP",
    "DICT": "opcode DICT",
    "ADDITEMS": "opcode ADDITEMS",
    "FROZENSET": "opcode FROZENSET",
    "encoder_type": "option encoder_type is a tuple",
    "model_type": "around something is not supported",
    "dropout": "option dropout is a tuple",
    "as a list": "option channel_mult is a tuple",
    "sigma_data": "option sigma_data is a tuple",
    "class name": "without class_name and state",
    "as a storage": "a storage that is not bytes",
    "million": "more opcodes",
    "30 MB": "more opcodes",
    "share children": "too many tensors and modules",
    "wide characters": "MemoryError|more memory",
    "bytes that are not there": "expected 1099511627776 bytes",
    "a buffer": "opcode BYTEARRAY8",
    "beyond its storage": "reaches beyond its storage",
    "expanded": "more tensors",
    "huge storage": "more memory",
    "zip archive": "zip archive",
    "more behind": "goes on behind its last storage",
    "another count": "has another size than its tensors say",
    "never comes": "its storages are not the ones that its tensors need",
    "cut off": "a storage of 16 bytes has 15",
    "dictionary class": "BUILD would change the attributes",
    "header": "ends in the middle",
    "long size": "not a short tuple",
    "list as size": "not a short tuple",
    "size": "something else than non-negative integers",
    "stride": "something else than non-negative integers",
    "offset": "something else than non-negative integers",
    "": "no network snapshot of EDM",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_in_one_line(tmp_path, name):
    (tmp_path / "net.pkl").write_bytes(content(HOSTILE[name]))
    reason = next(reason for part, reason in REASONS.items() if part in name)
    assert re.match(f"refused.*({reason})", within_limits(tmp_path / "net.pkl"))


def test_text_counts_as_the_memory_it_takes(tmp_path, monkeypatch):
    replace(monkeypatch, "SPARE_BYTES", 0)
    wide = ("a" * 1000 + "\U0001f600").encode()  # one wide character makes all of them wide
    (tmp_path / "net.pkl").write_bytes(b"\x80\4X" + struct.pack("<I", len(wide)) + wide + b".")
    refused(tmp_path / "net.pkl", "more memory")


BAD_OPTIONS = [
    *[("dropout", value) for value in (2, -0.1, float("nan"), None, "0.1", True, [0.1])],
    *[("sigma_data", value) for value in ("0.5", 0, float("nan"), None)],
    *[("num_blocks", value) for value in (10**9, 0, 1.5, "4", None, True)],
    *[("img_resolution", value) for value in (0, 10**9, "8", None, 8.0)],
    *[("channel_mult", value) for value in ([], [1] * 17, [1, "2"], [10**9], 2, None, "12", [[1]])],
    *[("encoder_type", value) for value in ("skip", None, 1, ["standard"])],
    *[("model_channels", value) for value in (0, 10**9, 5, 17, None)],
    *[
        ("resample_filter", value)
        for value in ([], [1], [1, -1], [1, "1"], [float("inf"), 1], None)
    ],
    *[("label_dim", value) for value in (-1, 10**9, 10.0, None)],
    ("decoder_type", "skip"),
    ("embedding_type", "sine"),
    ("attn_resolutions", 4),
    ("unknown\n\x1b[31m", 1),
]


@pytest.mark.parametrize(
    "name, value", BAD_OPTIONS, ids=[f"{k!a}={str(v)[:20]}" for k, v in BAD_OPTIONS]
)
@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_options_out_of_range_are_refused(tmp_path, kind, name, value):
    net = network()
    if kind == "pickle":
        how = {name: value} if name.startswith("sigma") else {"kwargs": {name: value}}
        (tmp_path / "net").write_bytes(snapshot(net, **how))
    else:
        config = json.dumps(net.config | {name: value})
        safetensors.torch.save_file(net.state_dict(), tmp_path / "net", {"config": config})
    refused(tmp_path / "net")


@pytest.mark.parametrize("name", ["img_resolution", "img_channels"])
def test_options_without_a_size_are_refused(tmp_path, name):
    net = network()
    config = {key: value for key, value in net.config.items() if key != name}
    safetensors.torch.save_file(net.state_dict(), tmp_path / "net", {"config": json.dumps(config)})
    refused(tmp_path / "net", "no img_resolution or img_channels")


def test_an_unknown_option_is_named(tmp_path):
    (tmp_path / "net.pkl").write_bytes(snapshot(network(), kwargs={"colour": 1}))
    refused(tmp_path / "net.pkl", "option colour is unknown")


def test_images_that_cannot_be_halved_are_refused(tmp_path):
    (tmp_path / "net.pkl").write_bytes(snapshot(network(), kwargs={"img_resolution": 9}))
    refused(tmp_path / "net.pkl", "9 x 9 images cannot be halved")


def test_many_blocks_without_channel_mult_build_nothing(tmp_path):
    config = {"img_resolution": 8, "img_channels": 3, "num_blocks": 64}
    safetensors.torch.save_file({}, tmp_path / "net", {"config": json.dumps(config)})
    refused(tmp_path / "net", "a larger network than its 0 tensors")


def changed(**tensors):
    state = network().state_dict()
    for name, tensor in tensors.items():
        state.pop(name.replace("__", "."))
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    return state


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            {"model__map_layer0__bias": torch.full([64], torch.nan)},
            "map_layer0.bias has weights that are not finite",
        ),
        ({"model__map_layer0__bias": torch.zeros(63)}, r"map_layer0.bias is \(63,\) in the file"),
        (
            {"model__map_layer0__bias": torch.zeros(64, dtype=torch.int32)},
            "no tensor of floating-point numbers",
        ),
        ({"model__map_layer0__bias": None}, "map_layer0.bias is not there in the file"),
        (
            {"model__enc__4x4_down__conv0__resample_filter": torch.ones(1, 1, 2, 2)},
            "not the filter",
        ),
    ],
    ids=["NaN", "shape", "integers", "missing", "filter"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, tensors, message):
    metadata = {"config": json.dumps(network().config)}
    safetensors.torch.save_file(changed(**tensors), tmp_path / "net", metadata)
    refused(tmp_path / "net", message)


def test_a_tensor_too_many_is_refused(tmp_path):
    metadata = {"config": json.dumps(network().config)}
    safetensors.torch.save_file(changed() | {"extra": torch.ones(1)}, tmp_path / "net", metadata)
    refused(tmp_path / "net", r"extra is \(1,\) in the file, the network expects not there")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "an empty file"),
        (b"\0" * 100, "zeros or blanks"),
        (b"<!DOCTYPE html><html>Please log in</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"\x1b[31mred\n", r"begins with b'\\x1b"),
        (b"PK\3\4" + b"\0" * 60, "a zip archive"),
        (b"\x1f\x8b" + b"\0" * 60, "a gzip file"),
        (b'{"a": 1}', "JSON"),
        (b"abc", "begins with b'abc'"),
    ],
    ids=["empty", "zeros", "html", "lfs", "control", "zip", "gzip", "json", "short"],
)
def test_other_files_are_named(tmp_path, data, message):
    (tmp_path / "net").write_bytes(data)
    refused(tmp_path / "net", message)


@pytest.mark.parametrize(
    "arguments",
    [dict(class_name="VPPrecond"), dict(kwargs={"model_type": "DhariwalUNet"})],
    ids=["vp", "adm"],
)
def test_other_networks_of_edm_are_named(tmp_path, arguments):
    (tmp_path / "net.pkl").write_bytes(snapshot(network(), **arguments))
    refused(tmp_path / "net.pkl", "is not supported, only EDMPrecond around SongUNet")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    make(tmp_path / "net.pkl")
    with pytest.raises(neon.files.UserError, match="does not exist or is no file"):
        edm.load_network(tmp_path / "net.pkl")


def test_a_pickle_that_is_cut_off_is_refused_wherever(tmp_path):
    data = snapshot(network())
    for end in range(1, len(data), len(data) // 60):
        (tmp_path / "net.pkl").write_bytes(data[:end])
        refused(tmp_path / "net.pkl")


def test_expanded_weights_are_refused(tmp_path):
    net = network(model_channels=64)
    for p in net.parameters():
        p.data = torch.zeros(1).expand(p.shape)  # every element of the network from one in the file
    (tmp_path / "net.pkl").write_bytes(snapshot(net))
    refused(tmp_path / "net.pkl", "more tensors than a network of its size")


# -------------------- our own networks


def test_saved_networks_load_to_the_bit(tmp_path):
    edm.save_network(network(**NCSN), tmp_path / "net", {"w": 1})
    assert same(edm.load_network(tmp_path / "net"), network(**NCSN))


def test_saved_networks_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        edm.save_network(network(), tmp_path / name, {"w": {"enc": 1.5}, "parents": ["x"]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saved_networks_hold_their_recipe(tmp_path):
    edm.save_network(network(), tmp_path / "net", {"w": {"enc": 1.5}})
    with safetensors.safe_open(tmp_path / "net", "pt") as file:
        assert json.loads(file.metadata()["config"])["recipe"] == {"w": {"enc": 1.5}}


def test_networks_of_older_versions_have_no_hash_and_load(tmp_path):
    metadata = {"config": json.dumps({**network().config, "recipe": {}})}
    safetensors.torch.save_file(network().state_dict(), tmp_path / "net", metadata)
    assert same(edm.load_network(tmp_path / "net"), network())


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    """Header, options, recipe or weights: refused, or (in the padding of the header) the same
    network."""
    path = tmp_path / "net"
    edm.save_network(network(), path, {"w": 1.5, "note": "a recipe"})
    data, rng = path.read_bytes(), np.random.default_rng(0)
    header = int.from_bytes(data[:8], "little") + 8
    positions = [*rng.integers(0, header, 200), *rng.integers(header, len(data), 100)]
    for position in positions:
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            loaded = edm.load_network(path)
        except neon.files.UserError:
            continue
        assert same(loaded, network()) and loaded.config == network().config, position


def test_a_changed_recipe_is_found(tmp_path):
    edm.save_network(network(), tmp_path / "net", {"note": "a recipe"})
    data = (tmp_path / "net").read_bytes()
    (tmp_path / "net").write_bytes(data.replace(b"a recipe", b"a Recipe"))
    refused(tmp_path / "net", "SHA-256 does not agree")


def test_a_flipped_bit_in_the_weights_is_named(tmp_path):
    edm.save_network(network(), tmp_path / "net", {})
    data = bytearray((tmp_path / "net").read_bytes())
    data[-1000] ^= 1
    (tmp_path / "net").write_bytes(data)
    refused(tmp_path / "net", "SHA-256 does not agree: the file is damaged")
