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
import stat
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

PROGRAM = ("adaptive_neon", "neon_ext", "edm_neon", "toy_neon", "__main__")
PACKAGE = Path(__file__).resolve().parent

LOCK = threading.RLock()  # held while sys.modules and sys.path change hands
shown: "Scope | None" = None  # the scope whose modules stand in sys.modules
# In this thread: the scope whose code runs, and whether what it reads matters to no key.
active: contextvars.ContextVar = contextvars.ContextVar("active", default=None)
quiet: contextvars.ContextVar = contextvars.ContextVar("quiet", default=False)


@functools.cache
def environment() -> tuple[str, ...]:
    """Folders of Python and of its installed packages."""
    paths = sysconfig.get_paths()
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple(os.path.realpath(paths[name]) + os.sep for name in names)


def is_installed(path: str | Path) -> bool:
    """Whether a file belongs to Python, to an installed package or to this program."""
    path = Path(os.path.realpath(path))
    if PACKAGE in path.parents or (path.parent == PACKAGE.parent and path.stem in PROGRAM):
        return True
    folders = {"site-packages", "dist-packages"}
    return str(path).startswith(environment()) or not folders.isdisjoint(path.parts)


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
        self.modules: dict[str, ModuleType] = {}
        self.owned: dict[str, bool] = {}  # whether the user means a module of the own by a name
        self.before = [str(self.folder)]  # the entries of sys.path
        self.behind: list[str] = []  # and after them
        self.inside = 0  # calls that run now
        self.grown = False  # modules have come since it was shown
        self.replaced: dict[str, ModuleType] = {}  # of sys.modules, while it is shown
        self.path: list[str] = []  # sys.path before it was shown

        self.records: dict[str, str] = {}  # {module or file: hash of its content}
        self.sources: set[Path] = set()  # files of the modules
        self.roots = {self.folder}  # what is read below these is recorded,
        self.apart: set[Path] = set()  # but networks: their weights have keys of their own
        self.hashes: dict[Path, tuple] = {}
        self.sealed = False  # keys have been made of the records
        self.late = ""  # what has been read since
        watch()

    # -------------------- imports

    def load(self) -> ModuleType:
        """The user's file itself, as a module."""
        loader = Loader(self, self.name, str(self.file))
        spec = ModuleSpec(self.name, loader, origin=str(self.file))
        spec.has_location = True
        module = importlib.util.module_from_spec(spec)
        with LOCK, self.entered():
            self.owned[self.name] = True
            self.replace([self.name])
            # Dataclasses and pickle look it up.
            self.modules[self.name] = sys.modules[self.name] = module
            loader.exec_module(module)
        return module

    def import_(self, name, globals=None, locals=None, fromlist=(), level=0):
        """What `import` does in the user's code."""
        absolute = name if level == 0 else (globals or {}).get("__package__") or ""
        top = absolute.partition(".")[0]
        if not self.owns(top):
            return builtins.__import__(name, globals, locals, fromlist, level)
        with LOCK, self.entered():
            return builtins.__import__(name, globals, locals, fromlist, level)

    def owns(self, top: str) -> bool:
        """Whether the user's code means a module of its own by this name."""
        if top in PROGRAM or not top:
            return False
        if top not in self.owned:
            with LOCK, self.entered():
                spec = self.find(top)
                if spec is None:
                    return False  # not yet: sys.path may still grow
                self.owned[top] = is_own(spec)
                self.replace([top])
        return self.owned[top]

    def find(self, name: str, path=None) -> ModuleSpec | None:
        """The spec of a module, as Python finds it with the scope's sys.path."""
        for finder in sys.meta_path:
            spec = None if finder is Finder else finder.find_spec(name, path)
            if spec is not None:
                return spec
        return None

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
        self.grown = False
        self.replace([top for top, own in self.owned.items() if own])
        sys.modules.update(self.modules)
        compiler = sys.modules.get("torch._dynamo.symbolic_convert")
        kept = getattr(compiler, "_import_module", None)
        if hasattr(kept, "cache_clear"):  # torch.compile keeps modules by their names
            kept.cache_clear()
        self.path = list(sys.path)
        sys.path[:] = [*self.before, *self.path, *self.behind]

    def replace(self, tops: list[str]):
        """Others' modules of these names, and those in them, are not what is meant here."""
        if any(top in sys.modules and self.owned[top] for top in tops):
            for name in list(sys.modules):
                if name.partition(".")[0] in tops:
                    self.replaced[name] = sys.modules.pop(name)

    def hide(self):
        """Takes them out again, with those that have come in the meantime."""
        global shown
        if self.grown:
            for name in list(sys.modules):
                if self.owned.get(name.partition(".")[0]):
                    self.modules[name] = sys.modules[name]
        for name in self.modules:
            sys.modules.pop(name, None)
        sys.modules.update(self.replaced)
        self.replaced = {}

        # Entries of sys.path that the user's code has added stay its own.
        known = [*self.before, *self.path, *self.behind]
        front = True
        added: dict[bool, list[str]] = {True: [], False: []}
        for place in dict.fromkeys(sys.path):
            if place in known:
                front = False
            else:
                added[front].append(place)
        self.before = added[True] + self.before
        self.behind = self.behind + added[False]
        sys.path[:] = self.path
        shown = None

    # -------------------- the record

    def record(self, name: str, content: str):
        if self.sealed and quiet.get():
            return
        if self.records.get(name) != content:
            self.records[name] = content
            if self.sealed:
                self.late = name

    def opened(self, file: Any, mode: str | None, flags: int):
        """Records a file that the user's code opens for reading."""
        if mode is None:
            reads = not flags & (os.O_WRONLY | os.O_RDWR)
        else:
            reads = not set("wax+") & set(mode)
        if not isinstance(file, (str, bytes, os.PathLike)):
            return
        path = Path(os.path.abspath(os.fsdecode(file)))
        if not self.below(path):
            path = Path(os.path.realpath(path))
        if path.parent.name == "__pycache__" and path.suffix == ".pyc":
            path = Path(importlib.util.source_from_cache(path))
        if not reads:
            self.apart.add(path)  # what it writes itself is no input
        elif self.decides(path) and stat.S_ISREG(os.stat(path).st_mode):
            self.record(os.path.relpath(path, self.folder), self.hash_of(path))

    def below(self, path: Path) -> Path | None:
        """The recorded folder in which a file lies."""
        return next((root for root in self.roots if root in path.parents), None)

    def decides(self, path: Path) -> bool:
        """Whether the content of a file belongs into the keys."""
        apart = path in self.apart or not self.apart.isdisjoint(path.parents)
        if apart or path in self.sources or is_installed(path):
            return False
        if path.suffix == ".py" and opened_by("linecache"):  # for a line in a warning
            return False
        root = self.below(path)
        if root is None:  # a module by its place
            return path.suffix == ".py" and opened_by("importlib")
        folders = path.relative_to(root).parts[:-1]
        return not any(folder.startswith((".", "torchinductor_")) for folder in folders)  # caches

    def hash_of(self, path: Path) -> str:
        """Hash of a file, which large files need once while they stay as they are."""
        facts = os.stat(path)
        state = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        if self.hashes.get(path, ("",))[1:] != state:
            self.hashes[path] = (file_hash(path), *state)
        return self.hashes[path][0]

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


class Finder:
    """On sys.meta_path: modules that a scope owns are loaded in it."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        scope = active.get()
        if scope is None or not scope.owns(name.partition(".")[0]):
            return None
        spec = scope.find(name, path)
        scope.grown = True
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(scope, name, spec.origin)
        elif spec is not None and spec.has_location:
            scope.record(f"module {name}", file_hash(spec.origin))
        return spec


def opened_by(module: str) -> bool:
    """Whether a module of Python takes part in opening the file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not str(frame.f_globals.get("__name__")).startswith(module):
        frame = frame.f_back
    return frame is not None


def is_own(spec: ModuleSpec) -> bool:
    """Whether a module's file or, without one, the first of its folders is the user's."""
    places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or ())
    return bool(places) and not is_installed(str(places[0]))


@functools.cache
def watch():
    """Once: scopes hear of imports and of files that are opened."""
    sys.meta_path.insert(0, Finder)
    sys.addaudithook(hear)
    # These open files in Rust and C++, of which Python hears nothing.
    for module in (safetensors, safetensors.torch):
        announce(module, "safe_open")
    announce(torch.jit, "load")


def hear(event: str, args: tuple):
    if event != "open":
        return
    scope = active.get()
    if scope is None:
        return
    token = active.set(None)  # the hash opens the file too
    with contextlib.suppress(OSError, ValueError):  # which its own open() will report
        scope.opened(*args)
    active.reset(token)


def announce(module: ModuleType, name: str):
    """Makes a function that reads a file say so, as open() does."""
    read = getattr(module, name)

    @functools.wraps(read, updated=())
    def announced(*args, **kwargs):
        file = next(iter([*args, *kwargs.values()]), None)
        sys.audit("open", file, "rb", 0)
        return read(*args, **kwargs)

    setattr(module, name, announced)


class UserFile:
    """A Python file of the user's: its functions, and the hash of what they depend on."""

    # What these read later on decides no image, or is in the keys already: hashes of weights.
    UNRECORDED = ("load", "block", "layer", "save")

    def __init__(self, path: str | Path, option: str):
        self.path = Path(path)
        if self.path.suffix != ".py":
            raise UserError(f"{option} {path} is no Python file: its name must end in .py")
        self.scope = Scope(self.path)
        before = torch_settings()
        try:
            self.file = self.scope.load()
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{option} {path} cannot be imported: {where_in(self.path, error)}"
            ) from error
        refuse_changed_settings(before, f"{option} {path}, when it is imported,")

    @property
    def identity(self) -> str:
        """Of the file and of what it has loaded and read up to now, whatever folder it lies in."""
        return key_of(self.scope.records)

    def call(self, name: str, *args) -> Any:
        """A function of the file; its errors name it and the line."""
        before = torch_settings()
        scope = self.scope
        token = quiet.set(name in self.UNRECORDED)
        try:
            with scope.entered():
                result = getattr(self.file, name)(*args)
        except (UserError, Diverged, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{self.path}: {name}() failed: {where_in(self.path, error)}"
            ) from error
        finally:
            quiet.reset(token)
        refuse_changed_settings(before, f"{self.path}: {name}()")
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


def refuse_changed_settings(before: dict[str, Any], who: str):
    for name, value in torch_settings().items():
        if value != before[name]:
            raise UserError(f"{who} changes torch's {name} from {before[name]} to {value}")


def where_in(path: str | Path, error: BaseException) -> str:
    """Kind and text of an error, and the line of this file where it arose."""
    path = str(Path(path).resolve())
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == path:
            lines.append(frame.lineno)
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    place = f"line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {printable(error)}"
