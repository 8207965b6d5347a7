"""What a network's file promises: EDM's pickles, our .safetensors, hostile and damaged ones."""

import json
import os
import pickle
import re
import struct
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from edm_helpers import replace
from edm_pickles import ADM, HOSTILE, NCSN, Evil, content, network, snapshot, within_limits

import adaptive_neon as neon
import edm_neon as edm

torch.set_num_threads(1)


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


# -------------------- networks that load


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "options", [{}, NCSN, {"label_dim": 0}], ids=["ddpmpp", "ncsnpp", "uncond"]
)
def test_pickled_networks_load_to_the_bit(tmp_path, options, protocol):
    net = network(**options)
    (tmp_path / "net.pkl").write_bytes(snapshot(net, protocol))
    loaded = edm.load_network(tmp_path / "net.pkl")
    assert same(loaded, net) and loaded.config == net.config


OLDER = [
    *({"precond": "VPPrecond", "beta_d": 15.0}, {"precond": "VEPrecond", **NCSN}),
    *({"precond": "iDDPMPrecond"}, {"precond": "iDDPMPrecond", **ADM}),
]


@pytest.mark.parametrize("options", [ADM, ADM | {"label_dim": 0}, *OLDER], ids=str)
@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_networks_of_every_kind_load_to_the_bit(tmp_path, options, kind):
    """Of class, options and attributes of the preconditioning nothing is lost."""
    net, path = network(**options), tmp_path / "net"
    if kind == "pickle":
        path.write_bytes(snapshot(net))
    else:
        edm.save_network(net, path, {})
    loaded = edm.load_network(path)
    assert same(loaded, net) and loaded.config == net.config
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 8.0])
    assert type(loaded) is type(net) and torch.equal(loaded(x, sigma), net(x, sigma))


@pytest.mark.parametrize(
    "class_name, model",
    [
        ("EDMPrecond", "DhariwalUNet"),
        ("iDDPMPrecond", "DhariwalUNet"),
        ("VPPrecond", "SongUNet"),
        ("VEPrecond", "SongUNet"),
    ],
)
def test_network_that_a_file_does_not_name(tmp_path, class_name, model):
    """EDM's defaults differ from class to class."""
    options = {"precond": class_name} | (ADM if model == "DhariwalUNet" else {})
    data = snapshot(network(**options), kwargs={"model_type": None})
    (tmp_path / "net.pkl").write_bytes(data)
    assert type(edm.load_network(tmp_path / "net.pkl").model).__name__ == model


def test_sizes_that_were_no_keywords_are_read(tmp_path):
    """Whoever builds a network as EDMPrecond(8, 3, 10, ...)."""
    sizes = dict.fromkeys(["img_resolution", "img_channels", "label_dim"])
    (tmp_path / "net.pkl").write_bytes(snapshot(network(), kwargs=sizes))
    assert same(edm.load_network(tmp_path / "net.pkl"), network())


def test_neons_files_are_read(tmp_path):
    """The network alone, as it was on a GPU, about to be trained further."""
    net = network().requires_grad_(True).train()
    data = snapshot(net, alone=True).replace(b"X\3\0\0\0cpu", b"X\3\0\0\0xpu")
    (tmp_path / "net.pkl").write_bytes(data)
    loaded = edm.load_network(tmp_path / "net.pkl")
    assert b"xpu" in data and same(loaded, net) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(t.is_contiguous() for t in loaded.state_dict().values())


def test_double_precision_is_rounded(tmp_path):
    (tmp_path / "net.pkl").write_bytes(snapshot(network().double()))
    assert same(edm.load_network(tmp_path / "net.pkl"), network())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_widened(tmp_path, dtype):
    (tmp_path / "net.pkl").write_bytes(snapshot(network().to(dtype)))
    assert same(edm.load_network(tmp_path / "net.pkl"), network().to(dtype).float())


def test_strides_are_kept_and_where_a_storage_begins(tmp_path):
    net = network().to(memory_format=torch.channels_last)
    storage = torch.randn(200)
    net.model.map_layer0.bias.data = storage[70:134]
    (tmp_path / "net.pkl").write_bytes(snapshot(net))
    assert same(edm.load_network(tmp_path / "net.pkl"), net)


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


@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_attributes_of_the_preconditioning_are_kept(tmp_path, kind):
    """As they are now, not as the network was built."""
    attributes, path = {"sigma_data": 0.6, "sigma_min": 0.01, "sigma_max": 50.0}, tmp_path / "net"
    if kind == "pickle":
        path.write_bytes(snapshot(network(), **attributes))
    else:
        edm.save_network(network(**attributes), path, {})
    loaded = edm.load_network(path)
    assert {name: getattr(loaded, name) for name in attributes} == attributes


# -------------------- networks that are refused


EVIL = {
    "posix.system": lambda mark: Evil(os.system, f"touch {mark}"),
    "builtins.exec": lambda mark: OrderedDict(a=[Evil(exec, "import os")]),
    "builtins.getattr": lambda mark: Evil(getattr, OrderedDict, "fromkeys"),
    "torch.serialization.load": lambda mark: Evil(torch.load, str(mark)),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", EVIL)
def test_names_are_refused_without_effect(tmp_path, name, protocol):
    path, mark = tmp_path / "evil.pkl", tmp_path / "mark"
    path.write_bytes(pickle.dumps({"ema": EVIL[name](mark)}, protocol=protocol))
    wanted = name.replace("builtins", "(builtins|__builtin__)")
    refused(path, f"it wants to call {wanted}")
    assert not mark.exists()


@pytest.mark.parametrize(
    "opcode, code",
    [("INST", b"ios\nsystem\n"), ("OBJ", b"o"), ("EXT1", b"\x82\1"), ("UNICODE", b"Va\n")],
)
def test_other_opcodes_are_refused(tmp_path, opcode, code):
    (tmp_path / "net.pkl").write_bytes(b"\x80\x04}})" + code + b".")
    refused(tmp_path / "net.pkl", f"opcode {opcode}, which EDM's files do not have")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_in_one_line(tmp_path, name):
    (tmp_path / "net.pkl").write_bytes(content(name))
    assert re.match(f"refused.*({HOSTILE[name][1]})", within_limits(tmp_path / "net.pkl"))


def test_text_counts_as_the_memory_it_takes(tmp_path, monkeypatch):
    replace(monkeypatch, "SPARE_BYTES", 0)
    wide = ("a" * 1000 + "\U0001f600").encode()  # one wide character makes all of them wide
    (tmp_path / "net.pkl").write_bytes(b"\x80\4X" + struct.pack("<I", len(wide)) + wide + b".")
    refused(tmp_path / "net.pkl", "more memory")


BAD_OPTIONS = [
    ("dropout", 2),
    ("dropout", float("nan")),
    ("dropout", True),
    ("sigma_data", 0),
    ("num_blocks", 10**9),
    ("num_blocks", 1.5),
    ("num_blocks", None),
    ("img_resolution", "8"),
    ("channel_mult", []),
    ("channel_mult", [1] * 17),
    ("channel_mult", [1, "2"]),
    ("channel_mult", 2),
    ("encoder_type", "skip"),
    ("encoder_type", ["standard"]),
    ("resample_filter", [float("inf"), 1]),
    ("label_dim", -1),
    ("unknown\n\x1b[31m", 1),
]


@pytest.mark.parametrize(
    "name, value", BAD_OPTIONS, ids=[f"{k!a}={str(v)[:20]}" for k, v in BAD_OPTIONS]
)
def test_options_out_of_range_are_refused(tmp_path, name, value):
    net = network()
    config = json.dumps(net.config | {name: value})
    safetensors.torch.save_file(net.state_dict(), tmp_path / "net", {"config": config})
    refused(tmp_path / "net", f"option {name[:7]}.* (cannot be|is unknown)")


@pytest.mark.parametrize("name", ["sigma_data", "num_blocks"])
def test_options_of_pickles_are_checked_as_well(tmp_path, name):
    how = {name: 10**9} if name.startswith("sigma") else {"kwargs": {name: 10**9}}
    (tmp_path / "net.pkl").write_bytes(snapshot(network(), **how))
    refused(tmp_path / "net.pkl", f"option {name} cannot be 1000000000")


@pytest.mark.parametrize(
    "options",
    [
        {"img_resolution": 9},
        {"model_channels": 5},
        {"model_channels": 17},
        {"resample_filter": [1, 2, 1]},
        {"resample_filter": [1, -1]},
    ],
    ids=str,
)
def test_options_that_do_not_fit_together_are_refused(tmp_path, options):
    net = network()
    config = json.dumps(net.config | options)
    safetensors.torch.save_file(net.state_dict(), tmp_path / "net", {"config": config})
    refused(tmp_path / "net", "do not fit together|not the filter that the options")


@pytest.mark.parametrize("name", ["img_resolution", "img_channels"])
def test_options_without_a_size_are_refused(tmp_path, name):
    net = network()
    config = {key: value for key, value in net.config.items() if key != name}
    safetensors.torch.save_file(net.state_dict(), tmp_path / "net", {"config": json.dumps(config)})
    refused(tmp_path / "net", f"missing.*{name}")


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
        (b"<!DOCTYPE html><html>Please log in</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"\x1b[31mred\n", r"begins with b'\\x1b"),
        (b"PK\3\4" + b"\0" * 60, "a zip archive"),
        (b"abc", "begins with b'abc'"),
    ],
    ids=["empty", "html", "lfs", "control", "zip", "short"],
)
def test_other_files_are_named(tmp_path, data, message):
    (tmp_path / "net").write_bytes(data)
    refused(tmp_path / "net", message)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_name": "Generator"}, "Generator is not supported, only EDMPrecond, VPPrecond"),
        ({"kwargs": {"model_type": "DiT"}}, "option model_type cannot be DiT"),
    ],
    ids=["class", "model"],
)
def test_networks_that_edm_has_not_are_named(tmp_path, arguments, message):
    (tmp_path / "net.pkl").write_bytes(snapshot(network(), **arguments))
    refused(tmp_path / "net.pkl", message)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    make(tmp_path / "net.pkl")
    with pytest.raises(neon.files.UserError, match="does not exist or is no file"):
        edm.load_network(tmp_path / "net.pkl")


def test_a_pickle_that_is_cut_off_is_refused_wherever(tmp_path):
    data = snapshot(network())
    for end in range(1, len(data), len(data) // 25):
        (tmp_path / "net.pkl").write_bytes(data[:end])
        refused(tmp_path / "net.pkl")


def test_expanded_weights_are_refused(tmp_path):
    net = network(model_channels=64)
    for p in net.parameters():
        p.data = torch.zeros(1).expand(p.shape)  # every element of the network from one in the file
    (tmp_path / "net.pkl").write_bytes(snapshot(net))
    refused(tmp_path / "net.pkl", "its tensors are larger than the file")


# -------------------- our own networks


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
    positions = [*rng.integers(0, header, 80), *rng.integers(header, len(data), 20)]
    for position in positions:
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            loaded = edm.load_network(path)
        except neon.files.UserError:
            continue
        assert same(loaded, network()) and loaded.config == network().config, position
