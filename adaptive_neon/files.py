"""What is wrong with input, in one line; files that are whole or not there; downloads."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""

    def __str__(self):
        return escaped(super().__str__())  # names of files and features can be anything


class Refused(ValueError):
    """What is wrong with a file, in words for its owner; reading() adds which file it is."""


# What reading() passes on as it is: faults of this program stay tracebacks. Whatever else a library
# raises comes from a file that is not as it should be.
OURS = (UserError, NameError, AttributeError, AssertionError, ImportError)


def escaped(text: str) -> str:
    """The text in one line, with nothing in it that a terminal would obey or could not encode."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable(text: object, most: int = 100) -> str:
    """Text of a file or a server for a message: escaped, and cut off."""
    line = escaped(str(text)[: most + 1])
    return line if len(line) <= most else line[: most - 3] + "..."


def reason_of(error):
    """The first line of an error: our own words as they are, those of a library with its type."""
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, (Refused, UserError)):
        return printable(line, 500)
    kind = type(error).__name__
    return f"{kind}: {printable(line)}" if line else kind


class Terminal:
    """A stream whose failure costs nothing: it may be gone (`| head`) or know no accents."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # none after 2>&-
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, method, *text) -> None:
        try:
            method(*text)
        except OSError:
            # Whoever read it has left. Python would complain again when it flushes at exit.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def unfailing_terminal():
    """Prints and progress bars in this block cannot end it."""
    out, err = Terminal(sys.stdout), Terminal(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()


@contextlib.contextmanager
def reading(what):
    """Whatever is wrong with a file ends in one line that begins with `what`; the cause is kept."""
    try:
        yield
    except OURS:
        raise
    except Exception as error:
        raise UserError(f"{what} ({reason_of(error)})") from error


def write_atomically(path, write):
    """Text, or what write(temporary path) leaves, then rename: either the old or the new."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
        part = Path(folder) / path.name  # torch.save writes the name into the file
        plain = Path(folder) / "mode-of-a-plain-file"
        plain.touch()
        try:
            if isinstance(write, str):
                part.write_text(write, "utf-8")
            else:
                write(part)
        except (RuntimeError, safetensors.SafetensorError) as error:  # of a full disk
            reason = str(error).splitlines()[0]
            raise OSError(f"{path} cannot be written, is the disk full? ({reason})") from error

        # Whoever wrote it, it is as readable as the umask allows: safetensors has 0600.
        if part.is_file():
            shutil.copymode(plain, part)
        os.replace(part, path)


def remove_orphans(folder):
    """Temporary folders that a killed run has left."""
    for part in folder.glob(".part-*"):
        shutil.rmtree(part, ignore_errors=True)


def file_hash(path):
    """The first 16 hexadecimal digits of the file's SHA-256."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()[:16]


def kind_of(head):
    """What a file is that is not what it should be, from its first bytes, in words."""
    start = head[:512].lstrip(b"\xef\xbb\xbf\0 \t\r\n").lower()
    if not head:
        return "an empty file"
    if start.startswith((b"<!doctype", b"<head", b"<?xml")) or b"<html" in start:
        return "an HTML page (a login or error page?)"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS (run `git lfs pull`)"
    for first, kind in {b"PK\x03\x04": "a zip archive (torch.save?)", b"\x80": "a pickle"}.items():
        if head.startswith(first):
            return kind
    return f"a file that begins with {printable(repr(head[:16]))}"


def lock(file, wait: bool = True) -> bool:
    """Keep other processes out until the file is closed; BlockingIOError if one is in and `wait` is
    False. A file system that knows no locks goes without: False."""
    try:
        import fcntl
    except ImportError:
        raise UserError("this program runs on Linux and macOS, there are no file locks") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        return False
    return True


# ---------------------------------------------------------------- downloads
SILENCE = 30  # seconds without a byte that end a download


def cache_path(url: str) -> Path:
    """Where the file of a URL is kept: its name, after a hash of the whole address.

    In NEON_CACHE; else in the home directory; else, where there is none or nothing can be written
    into it, as in containers, among temporary files."""
    name = re.sub(r"[^\w.-]", "_", url.partition("?")[0].rpartition("/")[2], flags=re.ASCII)
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name[-80:]}"
    if os.environ.get("NEON_CACHE"):
        return Path(os.environ["NEON_CACHE"]) / name

    with contextlib.suppress(RuntimeError, OSError):
        folder = Path.home() / ".cache/adaptive-neon"
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / name).exists() or os.access(folder, os.W_OK):
            return folder / name
    folder = Path(tempfile.gettempdir()) / f"adaptive-neon-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise Refused(f"{folder} belongs to somebody else: set NEON_CACHE")
    return folder / name


def download(url, sha256_start, check, part):
    """The file at the URL into `part`, if it is what was asked for."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        torch.hub.download_url_to_file(url, str(part), sha256_start or None)
    except RuntimeError as error:  # the hash
        raise Refused(str(error)) from error
    finally:
        socket.setdefaulttimeout(timeout)

    # A login page answers 200 as the file does.
    with open(part, "rb") as file:
        came = kind_of(file.read(512))
    if came.startswith(("an HTML", "an empty", "a pointer")):
        raise Refused(f"what came is {came}")
    if check is not None:
        try:
            check(part)
        except UserError as error:
            reason = reason_of(error.__cause__ or error)  # without the name of `part`
            raise Refused(f"what came is {came}: {reason}") from error


def fetch(source, what, sha256_start="", check=None):
    """A path as it is; a URL's file from the cache, one download at a time.

    sha256_start: first hexadecimal digits of the file's SHA-256. check(path) raises if the file is
    not what was asked for; then it is not kept. UserError: what came instead, and what to do."""
    if not re.match("https?://", source, re.IGNORECASE):
        with reading(f"{what} {source} cannot be read"):
            if not Path(source).exists():
                raise UserError(f"{what} {source} does not exist")
        return Path(source)

    with reading(f"there is no place to keep {what}"):
        target = cache_path(source)
    shown = printable(source, 300)
    advice = (
        f"check the address, or put the file at {target}; --preset glyphs needs no download, nor "
        "does --model FILE.py with features(images)"
    )
    with reading(f"cannot download {what} from {shown}: {advice}"):
        if not target.exists():  # a cache that is complete may be read-only
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target.parent / "lock", "a") as file:
                print(f"downloading {what} to {target.parent}, one process at a time", flush=True)
                if lock(file):
                    remove_orphans(target.parent)
                if not target.exists():  # no other process was faster
                    write_atomically(target, partial(download, source, sha256_start, check))

    if sha256_start and not file_hash(target).startswith(sha256_start[:16]):
        raise UserError(f"{what} {target} is damaged (SHA-256 is not {sha256_start}...): delete it")
    return target


# ---------------------------------------------------------------- tensors
MOST_HEADER = 16 << 20  # bytes of a .safetensors' names and facts; 45 kB in EDM's network


def is_safetensors(path):
    """Whether the file begins as .safetensors do: the length of its header, then JSON."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MOST_HEADER


def state_hash(tensors, facts):
    """SHA-256 of facts and tensors, whatever their order in the file."""
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def save_state(path: Path, tensors: dict, facts: dict) -> None:
    """{name: tensor} and plain facts as .safetensors, whole or not there.

    The facts, what JSON holds, and a SHA-256 of everything are one entry of its metadata: several
    have no order, and the same state shall be the same bytes."""
    tensors = {
        # clone: tensors of one storage are written apart.
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    facts = json.loads(json.dumps(facts))  # as they will be read
    metadata = {"config": json.dumps({**facts, "sha256": state_hash(tensors, facts)})}
    write_atomically(
        path, lambda part: safetensors.torch.save_file(tensors, part, metadata=metadata)
    )


def load_state(path: Path) -> tuple[dict, dict]:
    """({name: tensor}, facts) as save_state() wrote them; use it inside reading().

    Refused, or what a library raises: the file is not of save_state(), or damaged."""
    if not is_safetensors(path):
        raise Refused(f"it is no .safetensors, or its header has more than {MOST_HEADER} bytes")
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if "config" not in metadata:
            raise Refused("it holds no facts: this program did not write it")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(metadata["config"])
    if type(facts) is not dict:
        raise Refused("its facts are not a dictionary")
    stored = facts.pop("sha256", None)
    if stored is not None and stored != state_hash(tensors, facts):
        raise Refused("its SHA-256 does not agree: the file is damaged, delete it or get it again")
    return tensors, facts


def load_weights(path: Path) -> dict:
    """{name: tensor} of a state dict that torch.save wrote; use it inside reading()."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # any kind comes from a damaged file
        # torch advises to load it without weights_only, which runs what is in it.
        if called := re.search(r"GLOBAL (\S+)", str(error)):
            raise Refused(f"it wants to call {printable(called.group(1))}") from error
        reason = printable(str(error).partition(". ")[0])
        raise Refused(f"torch.load(weights_only=True) refuses it: {reason}") from error

    if not isinstance(weights, dict):
        raise Refused(f"it holds a {type(weights).__name__}, not a dictionary of weights")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise Refused(f"its entry {printable(repr(name))} is a {kind}, not a weight")
        if tensor.layout != torch.strided or not tensor.isfinite().all():
            raise Refused(f"its entry {printable(name)} is not finite")
    return dict(weights)


LARGEST_MOMENT = 1e100  # its square is a number as well


def read_moments(path: Path) -> tuple:
    """(mean [D], covariance [D, D], images, features) of an npz with mu and sigma, as EDM's, which
    leaves the number of images and the name of the features out. Arrays are float64."""
    with reading(f"reference {path} has no usable mu and sigma"):
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                raise Refused(f"it is no npz, but {kind_of(file.read(512))}")
        with np.load(path) as arrays:
            moments = [arrays["mu"], arrays["sigma"]]
            count = arrays["images"] if "images" in arrays else np.array(50_000)
            features = str(arrays["features"]) if "features" in arrays else "inception"
        real = all(array.dtype.kind in "fiu" for array in (*moments, count))
        if not real:
            raise Refused("mu, sigma or images are no real numbers")
        mean, cov, count = (array.astype(np.float64) for array in (*moments, count))
        for array in (mean, cov, count):
            if not (np.abs(array) <= LARGEST_MOMENT).all():
                raise Refused(f"mu, sigma or images are not within {LARGEST_MOMENT:g}")
        if count.shape != () or count < 1 or count % 1:
            raise Refused("its images are no number of images")
        return mean, cov, int(count), printable(features)
