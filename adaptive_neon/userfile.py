"""A Python file of the user's, imported in a scope of its own, and a record of what it reads.

Two files may each have a `utils.py` beside them: their import statements, also those inside
functions, find their own. Cached results hold the content of all that a file has loaded and read by
the time it has run; what it reads later is refused.
"""

import builtins
import contextlib
import contextvars
import functools
import hashlib
import importlib.util
import os
import sys
import sysconfig
import threading
import traceback
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from .files import UserError, file_hash, printable
from .keys import key_of, weights_hash
from .processes import Diverged

PROGRAM = ("edm_neon.py", "toy_neon.py")  # beside the package
PACKAGE = Path(__file__).resolve().parent
STANDARD = os.path.realpath(sysconfig.get_path("stdlib")) + os.sep

LOCK = threading.RLock()  # held while sys.modules and sys.path change hands
shown: "Scope | None" = None  # the scope whose modules stand in sys.modules
active: contextvars.ContextVar = contextvars.ContextVar("active", default=None)  # in this thread


def is_installed(path: str | Path) -> bool:
    """Whether a file belongs to Python, to an installed package or to this program."""
    path = Path(os.path.realpath(path))
    if PACKAGE in path.parents or (path.parent == PACKAGE.parent and path.name in PROGRAM):
        return True
    packages = {"site-packages", "dist-packages"}
    return str(path).startswith(STANDARD) or not packages.isdisjoint(path.parts)


def taken(tops: set[str]) -> dict[str, ModuleType]:
    """Out of sys.modules: the modules of these names, and those in them."""
    found = {}
    for name in list(sys.modules):
        if name.partition(".")[0] in tops:
            found[name] = sys.modules.pop(name)
    return found


class Scope:
    """The modules that one user file imports, kept apart from those of all other files, and the
    content of all that it has loaded and read.

    The file and its modules run with an `__import__` of their own, in any thread. For what looks
    into sys.modules or sys.path itself (importlib, pickle, inspect), these hold the scope's entries
    while its code runs.
    """

    def __init__(self, path: Path):
        self.file, self.name = path.resolve(), f"neon_model_{path.stem}"
        self.folder = self.file.parent
        self.builtins = {**vars(builtins), "__import__": self.import_}
        self.own = {self.name}  # names by which the user means a module of the own
        self.modules: dict[str, ModuleType] = {}  # of these names, while others are shown,
        self.replaced: dict[str, ModuleType] = {}  # and others' modules, while these are
        self.path = [str(self.folder), *sys.path]
        self.path_outside: list[str] = []
        self.inside = 0  # calls that run now

        self.records: dict[str, str] = {}  # {module or file: hash of its content}
        self.sources: set[Path] = set()  # files of the modules
        self.roots = {self.folder}  # what is read below these is recorded,
        self.apart: set[Path] = set()  # but networks: their weights have keys of their own
        self.sealed = False  # keys have been made of the records
        self.late = ""  # what has been read since
        watch()

    # -------------------- imports

    def load(self) -> ModuleType:
        """The user's file itself, as a module."""
        loader = Loader(self, self.name, str(self.file))
        spec = importlib.util.spec_from_file_location(self.name, self.file, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        with LOCK, self.entered():
            sys.modules[self.name] = module  # dataclasses and pickle look it up
            loader.exec_module(module)
        return module

    def import_(self, name, globals=None, locals=None, fromlist=(), level=0):
        """What `import` does in the user's code."""
        absolute = name if level == 0 else (globals or {}).get("__package__") or ""
        if not self.owns(absolute):
            return builtins.__import__(name, globals, locals, fromlist, level)
        with LOCK, self.entered():
            return builtins.__import__(name, globals, locals, fromlist, level)

    def owns(self, name: str) -> bool:
        """Whether the user's code means a module of its own by this name."""
        top = name.partition(".")[0]
        if top in self.own or not top:
            return top in self.own
        with LOCK, self.entered():
            spec = self.find(top)
            if spec is None:
                return False  # not yet: sys.path may still grow

            # A namespace package has no file, only folders.
            places = [spec.origin] if spec.has_location else spec.submodule_search_locations
            if not places or is_installed(str(list(places)[0])):
                return False
            self.own.add(top)
            self.replaced |= taken({top})
        return True

    def find(self, name: str, path=None) -> ModuleSpec | None:
        """The spec of a module, as Python finds it with the scope's sys.path."""
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path)
            if spec is not None:
                return spec
        return None

    def find_spec(self, name, path=None, target=None):
        """As a finder of sys.meta_path: its own modules are loaded in this scope."""
        if active.get() is not self or not self.owns(name):
            return None  # other threads import too, and must not wait for LOCK
        spec = self.find(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(self, name, spec.origin)
        elif spec is not None and spec.has_location:
            self.record(f"module {name}", file_hash(spec.origin))
        return spec

    @contextlib.contextmanager
    def entered(self):
        """While code of this scope runs in this thread."""
        token = active.set(self)
        with LOCK:
            self.inside += 1
            self.show()
        try:
            yield
        finally:
            # The last thread to leave takes the entries out again.
            with LOCK:
                self.inside -= 1
                if shown is self and self.inside == 0:
                    self.hide()
            active.reset(token)

    def show(self):
        """Puts the scope's own entries into sys.modules and sys.path."""
        global shown
        if shown is self:
            return
        if shown is not None:
            shown.hide()
        shown = self
        self.replaced = taken(self.own)
        sys.modules.update(self.modules)
        self.path_outside, sys.path[:] = list(sys.path), self.path
        sys.meta_path.insert(0, self)

        # torch.compile keeps modules by their names.
        compiler = sys.modules.get("torch._dynamo.symbolic_convert")
        kept = getattr(compiler, "_import_module", None)
        if hasattr(kept, "cache_clear"):
            kept.cache_clear()

    def hide(self):
        """Takes them out again, with those that have come in the meantime."""
        global shown
        shown = None
        self.modules = taken(self.own)
        sys.modules.update(self.replaced)
        self.path, sys.path[:] = list(sys.path), self.path_outside
        sys.meta_path.remove(self)

    # -------------------- the record

    def record(self, name: str, content: str):
        if self.records.get(name) != content:
            self.records[name] = content
            if self.sealed:
                self.late = name

    def opened(self, file: Any, flags: int):
        """Records a file that the user's code opens for reading."""
        if not isinstance(file, (str, bytes, os.PathLike)):
            return

        # By the name in a recorded folder, if it has one: a link may lead out of it.
        path = Path(os.path.abspath(os.fsdecode(file)))
        if not self.roots.intersection(path.parents):
            path = Path(os.path.realpath(path))
        if path.suffix == ".pyc":
            path = Path(importlib.util.source_from_cache(path))
        if flags & (os.O_WRONLY | os.O_RDWR):
            self.apart.add(path)  # what it writes itself is no input
        elif self.decides(path):
            self.record(os.path.relpath(path, self.folder), hash_of(path))

    def decides(self, path: Path) -> bool:
        """Whether the content of a file belongs into the keys."""
        apart = self.apart.intersection((path, *path.parents))
        if apart or path in self.sources or is_installed(path) or not path.is_file():
            return False
        if path.suffix == ".py" and opened_by("linecache"):  # for a line in a warning
            return False
        for root in self.roots.intersection(path.parents):
            folders = path.relative_to(root).parts[:-1]
            caches = [folder for folder in folders if folder.startswith((".", "torchinductor_"))]
            return not caches
        return path.suffix == ".py" and opened_by("importlib")  # a module by its place

    def seal(self):
        """From here on keys are made of the records. They also hold the networks that the user's
        modules keep themselves, wherever their weights come from."""
        for name, module in list(self.modules.items()):
            name = name.removeprefix(self.name)  # the file may be renamed
            for key, value in list(vars(module).items()):
                if isinstance(value, nn.Module):
                    self.record(f"{key} in {name}", weights_hash(value))
        self.sealed = True


class Loader(SourceFileLoader):
    """Runs a module in a scope, from its source alone: bytecode is compared by date and size."""

    def __init__(self, scope: Scope, name: str, path: str):
        super().__init__(name, path)
        self.scope = scope
        scope.sources.add(Path(path))
        scope.roots.add(Path(path).parent)

    def get_code(self, fullname):
        source = self.get_data(self.path)
        name = fullname.removeprefix(self.scope.name)  # the user's file may be renamed
        self.scope.record(f"module {name}", hashlib.sha256(source).hexdigest()[:16])
        return self.source_to_code(source, self.path)

    def exec_module(self, module):
        vars(module)["__builtins__"] = self.scope.builtins
        super().exec_module(module)


def hash_of(path: Path) -> str:
    """Hash of a file, which large files need once while they stay as they are."""
    facts = os.stat(path)
    return hash_in_state(path, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


@functools.cache
def hash_in_state(path: Path, *state: int) -> str:
    return file_hash(path)


def opened_by(module: str) -> bool:
    """Whether a module of Python takes part in opening the file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not str(frame.f_globals.get("__name__")).startswith(module):
        frame = frame.f_back
    return frame is not None


@functools.cache
def watch():
    """Once: scopes hear of files that are opened, also in Rust and C++."""
    sys.addaudithook(hear)
    safetensors.safe_open = safetensors.torch.safe_open = announced(safetensors.safe_open)
    torch.jit.load = announced(torch.jit.load)


def hear(event: str, args: tuple):
    scope = active.get() if event == "open" else None
    if scope is None:
        return
    token = active.set(None)  # the hash opens the file too
    with contextlib.suppress(OSError, ValueError):  # which its own open() will report
        file, _, flags = args
        scope.opened(file, flags)
    active.reset(token)


def announced(read):
    """A function that reads a file, and says so as open() does."""

    @functools.wraps(read, updated=())
    def announcing(*args, **kwargs):
        file = next(iter([*args, *kwargs.values()]), None)
        sys.audit("open", file, "rb", 0)
        return read(*args, **kwargs)

    return announcing


class UserFile:
    """A Python file of the user's: its functions, and the hash of what they depend on."""

    # What these read later on decides no image, or is in the keys already: hashes of weights.
    UNRECORDED = ("load", "block", "layer", "save")

    def __init__(self, path: str | Path, option: str):
        self.path = Path(path)
        if self.path.suffix != ".py":
            raise UserError(f"{option} {path} is no Python file: its name must end in .py")
        self.scope = Scope(self.path)
        with running(self.path, f"{option} {path}", "cannot be imported"):
            self.file = self.scope.load()

    @property
    def identity(self) -> str:
        """Of the file and of what it has loaded and read up to now, whatever folder it lies in."""
        return key_of(self.scope.records)

    def call(self, name: str, *args, **settings) -> Any:
        """A function of the file; its errors name it and the line."""
        scope, records = self.scope, dict(self.scope.records)
        with running(self.path, f"{self.path}: {name}()", "failed"), scope.entered():
            result = getattr(self.file, name)(*args, **settings)

        # What decides no image is forgotten; anything else that is new now comes too late.
        if scope.sealed and name in self.UNRECORDED:
            scope.records, scope.late = records, ""
        if scope.late:
            raise UserError(
                f"{self.path}: {name}() reads {printable(scope.late)}, which is new or has changed "
                "since the start, so that no cached result would know it: read it at import"
            )
        return result


class JudgeFile(UserFile):
    """FILE.py of --judge or --select-with, as FileFeatures takes it."""

    def __init__(self, path: str | Path, option: str = "--judge"):
        if not Path(path).is_file():
            raise UserError(
                f"{option} {path} is no file, and no built-in judge: random-conv, pixels; with "
                "--preset glyphs also classifier-2 and mlp"
            )
        super().__init__(path, option)
        if not hasattr(self.file, "features"):
            raise UserError(f"{option} {path} lacks features(images)")

    def call(self, name: str, *args) -> Any:
        result = super().call(name, *args)
        if not self.scope.sealed:
            self.scope.seal()  # the first call has read all that later ones may
        return result


@contextlib.contextmanager
def running(path: Path, what: str, failed: str):
    """Code of the user's: errors are one line, and torch's settings stay as they are."""
    before = torch_settings()
    try:
        yield
    except (UserError, Diverged, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} {failed}: {where_in(path, error)}") from error

    for name, value in torch_settings().items():
        if value != before[name]:
            raise UserError(f"{what} changes torch's {name} from {before[name]} to {value}")


def torch_settings() -> dict[str, Any]:
    """Settings of torch that a user's file must leave as they are."""
    backends: Any = torch.backends
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradient mode": torch.is_grad_enabled(),
        "number of threads": torch.get_num_threads(),
        "float32 precision": backends.fp32_precision,
        "float32 matmul precision": backends.cuda.matmul.fp32_precision,
        "float32 convolution precision": backends.cudnn.conv.fp32_precision,
        "float32 precision on CPUs": backends.mkldnn.matmul.fp32_precision,
    }


def where_in(path: str | Path, error: BaseException) -> str:
    """Kind and text of an error, and the line of this file where it arose."""
    path = str(Path(path).resolve())
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    place = f"line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {printable(error)}"
