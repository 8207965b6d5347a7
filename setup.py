"""Build neon_ext from csrc/: C++ always, CUDA where toolkit and torch fit together.

pip install --no-build-isolation .
NEON_CUDA=0|1             force the CUDA part off or on (on: fail rather than build C++ only)
TORCH_CUDA_ARCH_LIST=9.0  GPU architectures; without it this machine's GPUs, or a common set
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    # An sdist needs none; whatever compiles is refused below.
    torch = None  # type: ignore[assignment]
    BuildExtension = build_ext  # type: ignore[misc]

NAME = "neon_ext"
SOURCES = [
    "csrc/neon_ext.cpp",
    "csrc/extrapolate.cpp",
    "csrc/mlp_ddim.cpp",
    "csrc/statistics.cpp",
]
CUDA_SOURCES = ["csrc/extrapolate_cuda.cu", "csrc/mlp_ddim_cuda.cu"]
COMMON_ARCHES = "8.0;8.6;8.9;9.0+PTX"  # A100, RTX 30, RTX 40 / L4, H100; newer ones through PTX
OLDEST, NEWEST = (2, 11), (2, 15)  # releases of torch, as in pyproject.toml


def refuse(message: str) -> None:
    raise SystemExit(f"{NAME}: {message}")


# ------------------------------------------------------------ what is here


def check_environment() -> None:
    """Refuse in one line, before anything is compiled, what would end in a traceback or worse."""
    if {"editable_wheel", "develop", "--inplace"} & set(sys.argv):
        refuse(
            "an editable install would leave a library in the source tree, which hides every later "
            "one; the scripts run from the checkout as they are: pip install --no-build-isolation ."
        )
    if torch is None:
        refuse(
            "there is no torch in the build environment; the extension is built against the torch "
            "that it will run with: install the packages of requirements.txt, then run "
            "pip install --no-build-isolation ."
        )
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if not OLDEST <= release <= NEWEST:
        refuse(
            f"torch {torch.__version__} is installed, supported are {OLDEST[0]}.{OLDEST[1]} to "
            f"{NEWEST[0]}.{NEWEST[1]}: install one of these first"
        )
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        refuse(f"no C++ compiler ({compiler}): install g++ or clang, or name one by CXX")


def toolkit_major(home: str) -> str:
    """Major version of the CUDA toolkit in `home`, as its nvcc says it; empty where it does not."""
    try:
        command = [os.path.join(home, "bin", "nvcc"), "--version"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    found = re.search(r"release (\d+)\.", said)
    return found[1] if found else ""


def cuda_obstacle(torch_cuda: str | None, home: str | None) -> str:
    """Why the CUDA part cannot be built; empty where it can. torch_cuda: as torch.version.cuda."""
    missing = []
    if not torch_cuda:
        missing.append("no CUDA build of torch")
    if not home:
        missing.append("no CUDA toolkit (CUDA_HOME names one)")
    if not torch_cuda or not home:
        return "there is " + " and ".join(missing)
    major = toolkit_major(home)
    if major != torch_cuda.split(".")[0]:
        return f"the toolkit in {home} is CUDA {major or '?'}, torch is built with {torch_cuda}"
    return ""


def wants_cuda() -> bool:
    forced = os.environ.get("NEON_CUDA", "")
    if forced not in ("", "0", "1"):
        refuse(f"NEON_CUDA={forced!r} must be 0 or 1 (or unset, to decide by what is installed)")
    obstacle = cuda_obstacle(torch.version.cuda, CUDA_HOME)
    if forced == "1" and obstacle:
        refuse(f"NEON_CUDA=1, but {obstacle}")
    cuda = forced != "0" and not obstacle
    parts = "C++ and CUDA" if cuda else "C++ only"
    reason = f"NEON_CUDA={forced}" if forced else obstacle or f"torch {torch.__version__}"
    print(f"{NAME}: building {parts} ({reason})", flush=True)
    return cuda


# ------------------------------------------------------------ the extension


def version() -> str:
    """The package's, which it compares with the extension's when it is imported."""
    text = (Path(__file__).parent / "adaptive_neon" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "([\w.]+)"', text, re.MULTILINE)
    assert found, "adaptive_neon/__init__.py states no __version__"
    return found[1]


def extension() -> Extension:
    # Python's own flags ask for debug information, which is 27 of 28 MB.
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    flags.append(f"-DADAPTIVE_VERSION={version()}")
    if not wants_cuda():
        return CppExtension(NAME, SOURCES, extra_compile_args={"cxx": flags})
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = COMMON_ARCHES
    arches = os.environ.get("TORCH_CUDA_ARCH_LIST", "this machine's GPUs")
    print(f"{NAME}: CUDA {torch.version.cuda}, architectures: {arches}", flush=True)
    options = {
        "cxx": [*flags, "-DADAPTIVE_CUDA=1"],
        "nvcc": ["-O3", "-lineinfo", "-DADAPTIVE_CUDA=1"],
    }
    return CUDAExtension(NAME, SOURCES + CUDA_SOURCES, extra_compile_args=options)


def main() -> None:
    if {"sdist", "egg_info", "--version", "--name"} & set(sys.argv):
        described = Extension(NAME, SOURCES + CUDA_SOURCES)  # nothing is compiled
    else:
        check_environment()
        described = extension()
    setup(ext_modules=[described], cmdclass={"build_ext": BuildExtension})


if __name__ == "__main__":
    main()
