"""What adaptive_neon/files.py promises: messages, whole files, our own states, downloads."""

import argparse
import errno
import fcntl
import io
import multiprocessing
import os
import pwd
import re
import sys
import tempfile
import zipfile
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from edm_helpers import replace, sends
from edm_pickles import Evil, network

import adaptive_neon as neon
import edm_neon as edm

torch.set_num_threads(1)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


# -------------------- JSON


def test_partitions_are_read_in_the_encoding_of_their_mark(tmp_path):
    path = tmp_path / "blocks.json"
    path.write_text('{"*": "a"}', "utf-16")
    assert neon.config.read_partition(str(path)) == {"*": "a"}
    path.write_text('{"*": "a",}')
    with pytest.raises(argparse.ArgumentTypeError, match="line 1 column 11"):
        neon.config.read_partition(str(path))


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
        (lambda data: (1 << 25).to_bytes(8, "little") + data[8:], "header has more than"),
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


# -------------------- state dicts of others


STATES = {
    "a list": ([torch.ones(2)], "it holds a list, not a dictionary of weights"),
    "nested": ({"state_dict": {"a": torch.ones(2)}}, "its entry .state_dict. is a dict"),
    "a number as name": ({3: torch.ones(2)}, "its entry 3 is a Tensor"),
    "not finite": (
        {"a": torch.ones(1), "b\n": torch.tensor([1.0, torch.nan])},
        "b.n is not finite",
    ),
    "a name to call": ({"a": Evil(os.system, "true")}, "it wants to call posix.system"),
}


@pytest.mark.parametrize("name", STATES)
def test_what_is_no_state_dict_is_one_line(tmp_path, name):
    content, message = STATES[name]
    torch.save(content, tmp_path / "w.pt")
    with (
        pytest.raises(neon.files.UserError, match=f"bad .*{message}") as error,
        neon.files.reading("bad"),
    ):
        neon.files.load_weights(tmp_path / "w.pt")
    assert str(error.value).isprintable() and "only if you" not in str(error.value)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "old format"])
def test_state_dicts_are_read_whole_or_not(tmp_path, archive):
    path, weights = tmp_path / "w.pt", {"a": torch.randn(30, 3), "b": torch.ones(2).half()}
    torch.save(weights, path, _use_new_zipfile_serialization=archive)
    assert equal(neon.files.load_weights(path), weights)
    data = path.read_bytes()
    for end in range(0, len(data), 150):
        path.write_bytes(data[:end])
        with pytest.raises(neon.files.UserError, match="^bad "), neon.files.reading("bad"):
            neon.files.load_weights(path)


# -------------------- statistics of others


def header(text):
    """A file of numpy whose header is this text."""
    text = text.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


MU, SIGMA = np.zeros(3), np.eye(3)
NUMBERS = "no real numbers|not within 1e.100"
BAD_STATISTICS = {
    "images NaN": ({"images": np.nan}, NUMBERS),
    "images as array": ({"images": np.arange(3)}, "no number of images"),
    "half an image": ({"images": 1.5}, "no number of images"),
    "a huge mean": ({"mu": MU + 1e300}, NUMBERS),
    "a complex mean": ({"mu": MU + 1j}, NUMBERS),
    "an object": ({"mu": np.array([None])}, "allow_pickle"),
    "a deep header": ({"sigma": header("-" * 9000 + "1")}, ""),
    "a huge shape": (
        {"mu": header("{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,)}")},
        "",
    ),
    "a page": (b"<html>", "no npz, but an HTML page"),
}


@pytest.mark.parametrize("name", BAD_STATISTICS)
def test_bad_statistics_are_one_line(tmp_path, name):
    change, message = BAD_STATISTICS[name]
    path = tmp_path / "ref.npz"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        arrays = {"mu": MU, "sigma": SIGMA, "images": 7, "features": "x", **change}
        with zipfile.ZipFile(path, "w") as archive:
            for key, value in arrays.items():
                buffer = io.BytesIO()
                np.save(buffer, value)
                raw = value if isinstance(value, bytes) else buffer.getvalue()
                archive.writestr(f"{key}.npy", raw)
    with pytest.raises(neon.files.UserError, match=f"no usable mu and sigma .*{message}"):
        neon.files.read_moments(path)


def test_statistics_come_back(tmp_path):
    np.savez(tmp_path / "a.npz", mu=MU + 2, sigma=SIGMA, images=7.0, features="a\x1b" * 99)
    mean, cov, images, features = neon.files.read_moments(tmp_path / "a.npz")
    assert np.array_equal(mean, MU + 2) and np.array_equal(cov, SIGMA) and images == 7
    assert features.startswith(r"a\x1ba") and len(features) == 100
    np.savez(tmp_path / "b.npz", mu=MU.astype(np.float32), sigma=SIGMA)
    assert neon.files.read_moments(tmp_path / "b.npz")[2:] == (50_000, "inception")


# -------------------- messages and writing


TEXTS = {
    "a\nb\x1b[31m": r"a\nb\x1b[31m",
    "\u202eevil \ud800": r"\u202eevil \ud800",
    "Zürich": "Zürich",
}


@pytest.mark.parametrize("raw, shown", TEXTS.items())
def test_text_of_others_is_printable(raw, shown):
    assert neon.files.printable(raw) == str(neon.files.UserError(raw)) == shown


def test_long_text_of_others_is_cut_off():
    assert neon.files.printable("x" * 1000) == "x" * 97 + "..."


@pytest.mark.parametrize(
    "error", [OSError, KeyError, RuntimeError, SyntaxError, zlib.error, safetensors.SafetensorError]
)
def test_faults_of_files_become_one_line(error):
    with (
        pytest.raises(neon.files.UserError, match=r"^it is bad \(") as caught,
        neon.files.reading("it is bad"),
    ):
        raise error("first\nsecond")
    assert isinstance(caught.value.__cause__, error) and str(caught.value).isprintable()


@pytest.mark.parametrize("error", [NameError, AssertionError])
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


def files_of(cache):
    return (
        sorted(path.name for path in cache.iterdir() if path.name != "lock")
        if cache.exists()
        else []
    )


def fetched(url, **how):
    return neon.files.fetch(url, "a network", **how)


def test_a_url_is_downloaded_once_and_checked_whole(server, tmp_path):
    seen = []
    server.answers["/net.pkl"] = sends(b"content" * 10**5)
    (tmp_path / "cache/.part-x").mkdir(parents=True)  # of a killed download
    for _ in range(2):
        path = fetched(f"{server.url}/net.pkl", check=lambda part: seen.append(part.read_bytes()))
    assert len(server.asked) == 1 and seen == [path.read_bytes()] == [b"content" * 10**5]
    assert files_of(tmp_path / "cache") == [path.name]


@pytest.mark.parametrize("others", ["b/net.pkl", "a/net.pkl?id=2"], ids=["place", "query"])
def test_two_addresses_are_two_files(server, others):
    for name in ("/a/net.pkl", "/b/net.pkl"):
        server.answers[name] = lambda handler: sends(handler.path.encode())(handler)
    one, other = fetched(f"{server.url}/a/net.pkl"), fetched(f"{server.url}/{others}")
    assert other.read_text() == f"/{others}" != one.read_text()
    assert other.name.endswith("-net.pkl")


@pytest.mark.parametrize("path", ["/", "/..", "/%2e%2e%2fx", "/" + "x" * 300, "/é\x1b"])
def test_names_in_the_cache_are_plain(path, tmp_path, monkeypatch):
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    found = neon.files.cache_path(f"http://host{path}")
    assert (
        found.parent == tmp_path
        and len(found.name) < 100
        and re.fullmatch(r"[0-9a-f]{12}-[\w.-]*", found.name)
    )


def no_entry(uid):
    raise KeyError(f"uid not found: {uid}")


@pytest.mark.parametrize("home", ["/proc/nowhere", None], ids=["unwritable", "none"])
def test_without_a_home_directory_downloads_go_to_temporary_files(monkeypatch, tmp_path, home):
    monkeypatch.delenv("NEON_CACHE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", no_entry)
    found = neon.files.cache_path("http://host/net.pkl")
    assert found.parent == tmp_path / f"adaptive-neon-{os.getuid()}"
    assert found.parent.stat().st_mode & 0o777 == 0o700


def test_the_home_directory_comes_before_temporary_files(monkeypatch, tmp_path):
    monkeypatch.delenv("NEON_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = neon.files.cache_path("http://host/net.pkl")
    assert path.parent == tmp_path / ".cache/adaptive-neon"


def refuse(path):
    raise neon.files.UserError("it is not what was asked for")


BAD_SERVERS = {
    "login page": (sends(b"<!DOCTYPE html><title>Log in</title>"), {}, "what came is an HTML page"),
    "nothing": (sends(b""), {}, "what came is an empty file"),
    "another file": (sends(b"content"), {"check": refuse}, "it is not what was asked for"),
    "another hash": (sends(b"content"), {"sha256_start": "00"}, "invalid hash value"),
    "half": (sends(b"\x80\x04", length=100), {"check": edm.load_network}, ""),
    "404": (sends(b"gone", 404), {}, "HTTP Error 404"),
    "no length": (sends(b"x", length="abc"), {}, ""),
    "no answer": (lambda handler: handler.connection.close(), {}, ""),
    "nonsense": (lambda handler: handler.wfile.write(b"\x1b[31mhello\n\n"), {}, ""),
    "silence": (sends(b"content", delay=1), {}, "timed out"),
}


@pytest.mark.parametrize("name", BAD_SERVERS)
def test_bad_servers_are_one_line_and_leave_nothing(server, tmp_path, monkeypatch, name):
    server.answers["/net.pkl"], how, message = BAD_SERVERS[name]
    replace(monkeypatch, "SILENCE", 0.3)
    with pytest.raises(
        neon.files.UserError, match=f"cannot download a network from http.*{message}"
    ) as error:
        fetched(f"{server.url}/net.pkl", **how)
    assert str(error.value).isprintable() and files_of(tmp_path / "cache") == []


def test_no_connection_names_the_place_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("NEON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(neon.files.UserError) as error:
        fetched("http://127.0.0.1:9/net.pkl")
    place = neon.files.cache_path("http://127.0.0.1:9/net.pkl")
    assert f"put the file at {place}" in str(error.value) and "--preset glyphs" in str(error.value)


def test_a_file_put_into_the_cache_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    neon.files.cache_path("http://127.0.0.1:9/net.pkl").write_text("mine")
    (tmp_path / "lock").mkdir()  # cannot be opened, as in a folder without permission to write
    assert fetched("http://127.0.0.1:9/net.pkl").read_text() == "mine"


def test_a_damaged_file_in_the_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    neon.files.cache_path("http://127.0.0.1:9/net.pkl").write_text("mine")
    with pytest.raises(neon.files.UserError, match="is damaged .*: delete it"):
        fetched("http://127.0.0.1:9/net.pkl", sha256_start="00")


def test_two_processes_download_once(server):
    server.answers["/net.pkl"] = sends(b"content" * 1000, delay=0.2)
    context = multiprocessing.get_context("fork")
    url = f"{server.url}/net.pkl"
    children = [context.Process(target=fetched, args=(url,)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0] and len(server.asked) == 1


def test_without_locks_the_download_still_works(server, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOLCK, "no locks available")

    server.answers["/net.pkl"] = sends(b"content")
    monkeypatch.setattr(fcntl, "flock", fail)
    assert fetched(f"{server.url}/net.pkl").read_bytes() == b"content"


def test_without_fcntl_one_line_says_where_this_runs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with (
        pytest.raises(neon.files.UserError, match="Linux and macOS"),
        open(tmp_path / "x", "w") as file,
    ):
        neon.files.lock(file)


@pytest.mark.parametrize("source", ["/nowhere/net.pkl", "ftp://host/net.pkl", "x" * 5000])
def test_a_path_that_is_not_there_is_named(source):
    with pytest.raises(neon.files.UserError, match="a network .*(does not exist|cannot be read)"):
        fetched(source)
