"""edm_neon.py's files: model files of others, images and labels, downloads. Nothing in them is"""

import fcntl
import http.server
import io
import multiprocessing
import os
import pickle
import re
import resource
import struct
import sys
import threading
import time
import types
import zipfile
import zlib
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


def network(seed=0, **changes):
    torch.manual_seed(seed)
    net = edm.EDMPrecond(**{**TINY, **changes})
    for p in net.parameters():  # initial output layers are almost zero; make every parameter matter
        p.data += 0.05 * torch.randn_like(p)
    return net.eval().requires_grad_(False)


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


# -------------------- networks that are refused


def content(case):
    """The bytes of a case; the larger ones are made when they are needed."""
    return case() if callable(case) else case


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


# -------------------- state files of torch


def training_state():
    layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    layer(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    tensors = dict(
        half=torch.ones(3).half(),
        bfloat16=torch.ones(3).bfloat16(),
        double=torch.randn(2, 0, 3).double(),
        scalar=torch.tensor(3),
        bool=torch.tensor([True, False]),
        view=torch.arange(10.0)[3:8:2],
        strided=torch.randn(3, 4).T,
        parameter=nn.Parameter(torch.ones(2)),
    )
    plain = (None, 1.5, -7, 2**40, "text", float("inf"), [], {"a": (1, [2])})
    return dict(
        net=layer.state_dict(), optimizer=optimizer.state_dict(), tensors=tensors, plain=plain
    )


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "old format"])
def test_state_files_are_read_as_torch_reads_them(tmp_path, archive):
    torch.save(training_state(), tmp_path / "s.pt", _use_new_zipfile_serialization=archive)
    ours = neon.pickles.checked_torch_load(tmp_path / "s.pt")
    assert equal(ours, torch.load(tmp_path / "s.pt", weights_only=True))


def test_tensors_of_one_storage_stay_views_of_it(tmp_path):
    x = torch.zeros(4)
    torch.save([x, x[1:]], tmp_path / "s.pt")
    whole, part = neon.pickles.checked_torch_load(tmp_path / "s.pt")
    part.fill_(1)
    assert whole.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "old format"])
def test_state_files_that_are_cut_off_are_refused(tmp_path, archive):
    path = tmp_path / "s.pt"
    torch.save(training_state(), path, _use_new_zipfile_serialization=archive)
    data = path.read_bytes()
    for end in range(0, len(data), 100):
        path.write_bytes(data[:end])
        with (
            pytest.raises(neon.files.UserError, match="cannot be read"),
            neon.files.reading("it cannot be read"),
        ):
            neon.pickles.checked_torch_load(path)


def test_a_flipped_bit_in_an_archive_is_found(tmp_path):
    path = tmp_path / "s.pt"
    state = {"a": torch.randn(5000)}
    torch.save(state, path)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for position in rng.integers(0, len(data), 300):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            with neon.files.reading("refused"):
                loaded = neon.pickles.checked_torch_load(path)
        except neon.files.UserError:
            continue
        assert equal(loaded, state), position


def archive_of(data, compress=zipfile.ZIP_STORED, **files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in files.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def state_in_child(path, results):
    def load(path):
        with neon.files.reading("it cannot be read"):
            neon.pickles.checked_torch_load(path)

    edm.load_network = load  # in this process only
    work_in_child(path, results)


STATES = {
    "a million nested tuples": archive_of(HOSTILE["a million nested tuples"]),
    "doubling tuples as a key": archive_of(HOSTILE["doubling tuples as a key"]),
    "a name that would be called": archive_of(pickle.dumps(Evil(os.system, "true"), 2)),
    "compressed zeros": lambda: archive_of(
        b"\x80\x02)" + b"\x85" * 10**7 + b".", zipfile.ZIP_DEFLATED
    ),
    "big-endian": archive_of(b"\x80\x02N.", byteorder=b"big"),
    "no data.pkl": archive_of(b"").replace(b"data.pkl", b"else.pkl"),
    "30,000 entries": lambda: archive_of(b"\x80\x02N.", **{f"e{i}": b"" for i in range(30_000)}),
    "a pickle of EDM": snapshot(network()),
    "text": b"no",
    "empty": b"",
}


STATE_REASONS = [
    "more opcodes",
    "key is neither short text",
    "wants to call posix.system",
    "is compressed",
    "big-endian",
    "without data.pkl",
    "too many files",
    "wants to call torch_utils",
    "opcode 'n'",
    "ends in the middle",
]


@pytest.mark.parametrize("name, reason", zip(STATES, STATE_REASONS, strict=True), ids=STATES)
def test_hostile_state_files_end_in_one_line(tmp_path, name, reason):
    (tmp_path / "s.pt").write_bytes(content(STATES[name]))
    assert re.match(f"refused.*({reason})", within_limits(tmp_path / "s.pt", state_in_child))


# -------------------- our own states


def some_state():
    """Tensors of every kind, and facts; names out of order, two tensors of one storage."""
    base = torch.arange(10.0)
    tensors = {
        "net.weight": torch.randn(3, 4).T,
        "ema.half": torch.ones(3).half(),
        "bfloat16": torch.ones(3).bfloat16(),
        "step": torch.tensor(3.0),
        "none": torch.zeros(2, 0, 3).double(),
        "whole": base,
        "part": base[3:8:2],
        "bool": torch.tensor([True, False]),
    }
    return tensors, {"seen": 12345678901, "lr": 0.1, "deep": [[1.5, None], {"a": "\u00e9"}]}


def test_states_come_back_to_the_bit(tmp_path):
    tensors, facts = some_state()
    neon.files.save_state(tmp_path / "s.safetensors", tensors, facts)
    found, found_facts = neon.files.load_state(tmp_path / "s.safetensors")
    assert equal(found, tensors) and found_facts == facts


def test_the_same_state_is_the_same_bytes(tmp_path):
    tensors, facts = some_state()
    neon.files.save_state(tmp_path / "a", tensors, facts)
    neon.files.save_state(tmp_path / "b", dict(reversed(tensors.items())), facts)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data.replace(b"12345678901", b"12345678902"), "SHA-256 does not agree"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "SHA-256 does not agree"),
        (lambda data: data[: len(data) // 2], ""),
        (lambda data: b"PK\3\4" + data, "no .safetensors"),
        (lambda data: data.replace(b"config", b"konfig"), "did not write it"),
        (lambda data: (1 << 25).to_bytes(8, "little") + data[8:], "more than 16 MB"),
    ],
    ids=["a fact", "a bit", "half", "another kind", "no facts", "a huge header"],
)
def test_a_damaged_state_is_refused(tmp_path, damage, message):
    neon.files.save_state(tmp_path / "s", *some_state())
    (tmp_path / "s").write_bytes(damage((tmp_path / "s").read_bytes()))
    with (
        pytest.raises(neon.files.UserError, match=f"state .*{message}"),
        neon.files.reading("the state is damaged"),
    ):
        neon.files.load_state(tmp_path / "s")


# -------------------- messages and writing


@pytest.mark.parametrize(
    "raw, shown",
    [
        ("plain", "plain"),
        ("a\nb\x1b[31m", r"a\nb\x1b[31m"),
        ("\u202eevil", r"\u202eevil"),
        ("\ud800", r"\ud800"),
        ("Zürich", "Zürich"),
        ("x" * 1000, "x" * 97 + "..."),
    ],
    ids=["plain", "control", "direction", "surrogate", "letters", "long"],
)
def test_text_of_others_is_printable(raw, shown):
    assert neon.files.printable(raw) == shown


@pytest.mark.parametrize(
    "error", [OSError, ValueError, KeyError, EOFError, RuntimeError, SyntaxError, zlib.error]
)
def test_faults_of_files_become_one_line(error):
    with (
        pytest.raises(neon.files.UserError, match=r"^it is bad \(") as caught,
        neon.files.reading("it is bad"),
    ):
        raise error("first\nsecond")
    assert isinstance(caught.value.__cause__, error) and str(caught.value).isprintable()


@pytest.mark.parametrize("error", [NameError, AttributeError, AssertionError, KeyboardInterrupt])
def test_faults_of_ours_stay_what_they_are(error):
    with pytest.raises(error), neon.files.reading("it is bad"):
        raise error("ours")


@pytest.mark.parametrize("error", [RuntimeError, safetensors.SafetensorError])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write(part):
        part.write_text("half")
        raise error("no space")

    with pytest.raises(OSError, match="is the disk full"):
        neon.files.write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def written(folder):
    neon.files.write_atomically(folder / "text", "text")
    edm.save_network(network(), folder / "net.safetensors", {})
    neon.images.write_dataset(folder / "set.zip", torch.zeros(2, 1, 4, 4, dtype=torch.uint8), None)
    neon.files.write_atomically(
        folder / "state.pt", lambda part: torch.save({"a": torch.ones(2)}, part)
    )
    neon.files.write_atomically(  # itself 0600
        folder / "s.safetensors",
        lambda part: safetensors.torch.save_file({"a": torch.ones(2)}, part),
    )


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600)], ids=["022", "077"])
def test_files_have_the_mode_of_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        written(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        name: mode for name in ("text", "net.safetensors", "set.zip", "state.pt", "s.safetensors")
    }


def test_orphans_of_a_kill_are_removed(tmp_path):
    (tmp_path / ".part-x").mkdir()
    (tmp_path / ".part-x/half").touch()
    (tmp_path / "kept").touch()
    neon.files.remove_orphans(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


# -------------------- downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server: answers[path] = a function of the handler; .asked: the paths of the
    requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            web.asked.append(self.path)
            web.answers[self.path.partition("?")[0]](self)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("NEON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        web.asked, web.answers, web.daemon_threads = [], {}, True
        web.url = f"http://127.0.0.1:{web.server_port}"
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield web
        web.shutdown()


def sends(body, status=200, length=None, delay=0):
    def answer(handler):
        time.sleep(delay)
        handler.send_response(status, "Bad\x1b[31m" if status != 200 else None)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def files_of(cache):
    return (
        sorted(path.name for path in cache.iterdir() if path.name != "lock")
        if cache.exists()
        else []
    )


def test_a_url_is_downloaded_once(server):
    server.answers["/net.pkl"] = sends(b"content")
    paths = [neon.files.fetch(f"{server.url}/net.pkl", "a network") for _ in range(2)]
    assert paths[0] == paths[1] and paths[0].read_bytes() == b"content" and len(server.asked) == 1


def test_two_addresses_are_two_files(server):
    for name in ("a", "b"):
        server.answers[f"/{name}/model.safetensors"] = sends(name.encode())
    a, b = (
        neon.files.fetch(f"{server.url}/{name}/model.safetensors", "a network")
        for name in ("a", "b")
    )
    assert (a.read_bytes(), b.read_bytes()) == (b"a", b"b") and a.name.endswith(
        "-model.safetensors"
    )


def test_two_queries_are_two_files(server):
    server.answers["/net"] = lambda handler: sends(handler.path.encode())(handler)
    a, b = (neon.files.fetch(f"{server.url}/net?id={i}", "a network") for i in (1, 2))
    assert a.read_bytes() != b.read_bytes()


@pytest.mark.parametrize("path", ["/", "/..", "/%2e%2e%2fx", "/a%00b", "/" + "x" * 300, "/%1b[31m"])
def test_names_in_the_cache_are_plain(path, tmp_path, monkeypatch):
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    found = neon.files.cache_path(f"http://host{path}")
    assert (
        found.parent == tmp_path
        and len(found.name) < 100
        and re.fullmatch(r"[0-9a-f]{12}-[\w.-]+", found.name)
    )


def refuse(path):
    raise neon.files.UserError("it is not what was asked for")


BAD_SERVERS = {
    "login page": (sends(b"<!DOCTYPE html><title>Log in</title>"), {}, "what came is an HTML page"),
    "nothing": (sends(b""), {}, "what came is an empty file"),
    "LFS pointer": (sends(b"version https://git-lfs.github.com/spec/v1\n"), {}, "Git LFS"),
    "another file": (sends(b"content"), {"check": refuse}, "it is not what was asked for"),
    "another hash": (sends(b"content"), {"sha256_start": "00"}, "SHA-256 does not begin with 00"),
    "half": (sends(b"\x80\x04", length=100), {"check": edm.load_network}, ""),
    "404": (sends(b"gone", 404), {}, "HTTP Error 404"),
    "503": (sends(b"busy", 503), {}, "HTTP Error 503"),
    "no length": (sends(b"x", length="abc"), {}, ""),
    "no answer": (lambda handler: handler.connection.close(), {}, ""),
    "nonsense": (lambda handler: handler.wfile.write(b"\x1b[31mhello\n\n"), {}, ""),
    "endless line": (
        lambda handler: handler.wfile.write(b"HTTP/1.0 200 OK\r\n" + b"a" * 10**6),
        {},
        "",
    ),
    "silence": (sends(b"content", delay=5), {}, "timed out"),
}


@pytest.mark.parametrize("name", BAD_SERVERS)
def test_bad_servers_are_one_line_and_leave_nothing(server, tmp_path, monkeypatch, name):
    server.answers["/net.pkl"], how, message = BAD_SERVERS[name]
    replace(monkeypatch, "SILENCE", 1)
    with pytest.raises(
        neon.files.UserError, match=f"cannot download a network from http.*{message}"
    ) as error:
        neon.files.fetch(f"{server.url}/net.pkl", "a network", **how)
    assert str(error.value).isprintable() and files_of(tmp_path / "cache") == []


def test_no_connection_names_the_place_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("NEON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(neon.files.UserError) as error:
        neon.files.fetch("http://127.0.0.1:9/net.pkl", "a network")
    place = neon.files.cache_path("http://127.0.0.1:9/net.pkl")
    assert f"put the file at {place}" in str(error.value) and "--preset glyphs" in str(error.value)


def test_a_file_put_into_the_cache_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    neon.files.cache_path("http://127.0.0.1:9/net.pkl").write_text("mine")
    assert neon.files.fetch("http://127.0.0.1:9/net.pkl", "a network").read_text() == "mine"


def test_a_complete_cache_needs_no_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    neon.files.cache_path("http://127.0.0.1:9/net.pkl").write_text("mine")
    (tmp_path / "lock").mkdir()  # cannot be opened, as in a folder without permission to write
    assert neon.files.fetch("http://127.0.0.1:9/net.pkl", "a network").read_text() == "mine"


def test_a_damaged_file_in_the_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    neon.files.cache_path("http://127.0.0.1:9/net.pkl").write_text("mine")
    with pytest.raises(neon.files.UserError, match="is damaged .*: delete it"):
        neon.files.fetch("http://127.0.0.1:9/net.pkl", "a network", sha256_start="00")


def test_the_check_sees_the_whole_file(server):
    seen = []
    server.answers["/net.pkl"] = sends(b"content" * 10**5)
    neon.files.fetch(
        f"{server.url}/net.pkl", "a network", check=lambda path: seen.append(path.stat().st_size)
    )
    assert seen == [7 * 10**5]


def test_orphans_of_a_killed_download_are_removed(server, tmp_path):
    server.answers["/net.pkl"] = sends(b"content")
    (tmp_path / "cache/.part-x").mkdir(parents=True)
    path = neon.files.fetch(f"{server.url}/net.pkl", "a network")
    assert files_of(tmp_path / "cache") == [path.name]


def fetch_in_child(url):
    neon.files.fetch(url, "a network")


def test_two_processes_download_once(server):
    server.answers["/net.pkl"] = sends(b"content" * 1000, delay=0.5)
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=fetch_in_child, args=(f"{server.url}/net.pkl",)) for _ in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0] and len(server.asked) == 1


def test_without_locks_the_download_still_works(server, monkeypatch):
    def fail(*args):
        raise OSError("no locks available")

    server.answers["/net.pkl"] = sends(b"content")
    monkeypatch.setattr(fcntl, "flock", fail)
    assert neon.files.fetch(f"{server.url}/net.pkl", "a network").read_bytes() == b"content"


def test_a_path_is_used_as_it_is(tmp_path):
    (tmp_path / "net.pkl").touch()
    assert neon.files.fetch(str(tmp_path / "net.pkl"), "a network") == tmp_path / "net.pkl"


@pytest.mark.parametrize(
    "source", ["/nowhere/net.pkl", "ftp://host/net.pkl", "x" * 5000], ids=["path", "ftp", "long"]
)
def test_a_path_that_is_not_there_is_named(source):
    with pytest.raises(neon.files.UserError, match="a network .*(does not exist|cannot be read)"):
        neon.files.fetch(source, "a network")
