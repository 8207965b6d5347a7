"""What setup.py refuses or falls back to in one line, and what an sdist holds; compiles nothing."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import setup

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, env=None, path=()):
    """`python setup.py *arguments` with modules of `path` first -> CompletedProcess."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **(env or {})}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def fake_torch(folder, version="2.13.0", broken=False):
    """A package `torch` that is enough for setup.py's checks, or that cannot be imported."""
    package = folder / "torch" / "utils"
    package.mkdir(parents=True)
    text = f"__version__ = {version!r}\nclass version: cuda = None\n"
    (folder / "torch" / "__init__.py").write_text("raise ImportError" if broken else text)
    (package / "__init__.py").write_text("")
    (package / "cpp_extension.py").write_text(
        "from setuptools import Extension\n"
        "from setuptools.command.build_ext import build_ext as BuildExtension\n"
        "CUDA_HOME = None\n"
        "def CppExtension(name, sources, **_): return Extension(name, sources)\n"
        "CUDAExtension = CppExtension\n"
    )
    return folder


def refusal(result):
    """The one line that a failed run says."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("command", ["dist_info", "bdist_wheel", "build_ext"])
def test_no_torch_in_the_build_environment(tmp_path, command):
    result = run(command, path=[fake_torch(tmp_path, broken=True)])
    assert "pip install --no-build-isolation ." in refusal(result)


@pytest.mark.parametrize("version", ["2.10.2", "2.16.0+cu130", "3.0.0a1"])
def test_other_releases_of_torch(tmp_path, version):
    line = refusal(run("bdist_wheel", path=[fake_torch(tmp_path, version)]))
    assert version in line and "2.11 to 2.15" in line


@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cu130", "2.15.0"])
def test_supported_releases_of_torch(tmp_path, version):
    result = run("build", "--help", path=[fake_torch(tmp_path, version)])
    assert result.returncode == 0, result.stderr
    assert "building C++ only (there is no CUDA build of torch and no CUDA toolkit" in result.stdout


def test_no_compiler(tmp_path):
    result = run("bdist_wheel", env={"CXX": "no-such-compiler"}, path=[fake_torch(tmp_path)])
    assert "no C++ compiler (no-such-compiler)" in refusal(result)


@pytest.mark.parametrize("command", [["editable_wheel"], ["develop"], ["build_ext", "--inplace"]])
def test_editable_installs(tmp_path, command):
    assert "editable" in refusal(run(*command, path=[fake_torch(tmp_path)]))


@pytest.mark.parametrize(
    ("value", "message"),
    [("1", "NEON_CUDA=1, but there is no CUDA build of torch and no CUDA toolkit"), ("x", "'x'")],
)
def test_forced_cuda(tmp_path, value, message):
    result = run("bdist_wheel", env={"NEON_CUDA": value}, path=[fake_torch(tmp_path)])
    assert message in refusal(result)


@pytest.mark.parametrize(
    ("release", "torch_cuda", "obstacle"),
    [
        ("13.0", "13.0", ""),
        ("13.1", "13.0", ""),
        ("12.8", "13.0", "is CUDA 12, torch is built with 13.0"),
        ("", "13.0", "is CUDA ?, torch is built with 13.0"),
        ("13.0", None, "there is no CUDA build of torch"),
    ],
)
def test_cuda_toolkit_of_another_major_version(tmp_path, release, torch_cuda, obstacle):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    said = setup.cuda_obstacle(torch_cuda, str(tmp_path))
    assert said.endswith(obstacle) and bool(said) == bool(obstacle)


def test_sdist_is_complete_and_needs_no_torch(tmp_path):
    result = run(
        "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path),
        path=[fake_torch(tmp_path / "fake", broken=True)],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = {"toy_neon.py", "edm_neon.py", "LICENSE", "README.md", "requirements.txt", "setup.py"}
    for folder in ("adaptive_neon", "csrc", "examples", "tests"):
        wanted |= {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.*")}
    assert not {name for name in wanted if not name.endswith(".pyc")} - names
    assert not [name for name in names if name.endswith(".so")]
