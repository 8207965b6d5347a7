"""Build neon_ext from csrc/: C++ always, CUDA when both a toolkit and a CUDA build of torch are present.

    pip install --no-build-isolation .
    NEON_CUDA=0|1             force the CUDA part off or on (on: fail rather than fall back to C++ only)
    TORCH_CUDA_ARCH_LIST=9.0  GPU architectures; without it, those of the GPUs in this machine, or a common set
"""
import os

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

SOURCES = ["csrc/neon_ext.cpp", "csrc/extrapolate.cpp", "csrc/mlp_ddim.cpp", "csrc/statistics.cpp"]
CUDA_SOURCES = ["csrc/extrapolate_cuda.cu", "csrc/mlp_ddim_cuda.cu"]
COMMON_ARCHES = "8.0;8.6;8.9;9.0+PTX"  # A100, RTX 30, RTX 40 / L4, H100; newer ones through PTX


def wants_cuda() -> bool:
    forced = os.environ.get("NEON_CUDA", "")
    if forced not in ("", "0", "1"):
        raise SystemExit(f"setup.py: NEON_CUDA={forced!r} must be 0 or 1 (or unset, to decide by what is installed)")
    missing = [what for what, there in (("a CUDA build of torch", torch.version.cuda),
                                        ("the CUDA toolkit (set CUDA_HOME)", CUDA_HOME)) if not there]
    if forced == "1" and missing:
        raise SystemExit(f"setup.py: NEON_CUDA=1, but there is no {' and no '.join(missing)}")
    cuda = forced != "0" and not missing
    reason = f"no {' and no '.join(missing)}" if missing else f"torch {torch.__version__}, {CUDA_HOME}"
    print(f"neon_ext: building {'C++ and CUDA' if cuda else 'C++ only'} "
          f"({'NEON_CUDA=' + forced if forced else reason})", flush=True)
    return cuda


def extension(cuda: bool):
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
    if not cuda:
        return CppExtension("neon_ext", SOURCES, extra_compile_args={"cxx": flags})
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = COMMON_ARCHES
    arches = os.environ.get("TORCH_CUDA_ARCH_LIST", "this machine's GPUs")
    print(f"neon_ext: CUDA {torch.version.cuda}, architectures: {arches}", flush=True)
    return CUDAExtension("neon_ext", SOURCES + CUDA_SOURCES,
                         extra_compile_args={"cxx": [*flags, "-DADAPTIVE_CUDA=1"],
                                             "nvcc": ["-O3", "-lineinfo", "-DADAPTIVE_CUDA=1"]})


setup(ext_modules=[extension(wants_cuda())], py_modules=[],
      cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})
