"""The compiled extension; where it is missing or another version, its first use says what to do.

An import of this never fails, so that `--help` works before anything is built.
"""

from typing import Any

import torch  # noqa: F401  its libraries are those that neon_ext is linked against

from . import __version__
from .files import UserError

INSTALL = "run `pip install --no-build-isolation .` in the clone of the repository"
UNVERSIONED = "0.1.0"  # releases up to this one do not say their version


class Missing:
    """Stands in for neon_ext: whatever is asked of it is answered by the reason."""

    def __init__(self, reason: str):
        self.reason = reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a question of Python's own tools, not a use
            raise AttributeError(name)
        raise UserError(self.reason)


def load() -> Any:
    """The module neon_ext, or what stands in for it."""
    try:
        import neon_ext
    except ImportError as error:
        return Missing(f"neon_ext is not built ({error}): {INSTALL}")

    version = getattr(neon_ext, "__version__", UNVERSIONED)
    if version != __version__:
        return Missing(
            f"neon_ext {version} ({neon_ext.__file__}) is not of adaptive_neon {__version__}: "
            f"{INSTALL}"
        )
    return neon_ext


neon_ext = load()
