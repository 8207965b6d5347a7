"""What setup.py refuses or falls back to in one line, what an sdist and a wheel hold, and that
.ci/run fails where a check does; compiles nothing."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import edm_neon
import setup
import toy_neon

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


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with an sdist, what a wheel would hold in lib/, and its facts; without torch."""
    folder = tmp_path_factory.mktemp("packed")
    result = run(
        "egg_info", "--egg-base", str(folder), "sdist", "--dist-dir", str(folder),
        "build_py", "--build-lib", str(folder / "lib"),
        path=[fake_torch(folder / "fake", broken=True)],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


def files_of(folder):
    """Of a folder in the repository: the paths of its files from there."""
    found = {path for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {str(path.relative_to(ROOT)) for path in found if path.suffix not in (".pyc", ".so")}


SCRIPTS = {"toy_neon.py", "edm_neon.py"}


def test_sdist_is_complete(packed):
    (archive,) = packed.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    wanted = SCRIPTS | {"LICENSE", "README.md", "requirements.txt", "setup.py"}
    for folder in (".ci", "adaptive_neon", "csrc", "examples", "tests"):
        wanted |= files_of(folder)
    assert not wanted - names
    assert not [name for name in names if name.endswith(".so")]


def test_wheel_holds_the_package_with_its_template_and_the_scripts(packed):
    found = {str(path.relative_to(packed / "lib")) for path in (packed / "lib").rglob("*.*")}
    assert found == files_of("adaptive_neon") | SCRIPTS


@pytest.fixture(scope="module")
def described(packed):
    """The wheel's facts."""
    (info,) = packed.glob("*.egg-info")
    return importlib.metadata.PathDistribution(info)


def test_commands_point_at_functions(described):
    commands = {entry.name: entry for entry in described.entry_points}
    assert {*commands} == {"edm-neon", "toy-neon"}
    assert commands["edm-neon"].load() is edm_neon.main
    assert commands["toy-neon"].load() is toy_neon.main


# What is imported under another name, or comes with a package that is named.
PACKAGES = {"PIL": "pillow", "jinja2": "torch", "huggingface_hub": "diffusers"}
OWN = {"adaptive_neon", "edm_neon", "toy_neon", "neon_ext"}
PROMPTS = {"adaptive_neon/text.py", "adaptive_neon/lora.py"}


def packages_of(files):
    """What they import of others, at the top or inside a function."""
    modules = set()
    for file in files:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.partition(".")[0])
    return {PACKAGES.get(module, module) for module in modules - sys.stdlib_module_names - OWN}


@pytest.mark.parametrize(("extra", "without"), [("text", set()), ("diffusers", PROMPTS)])
def test_every_package_that_is_imported_is_asked_for(described, extra, without):
    """--prompts needs the extra of its own."""
    asked = set()
    for line in described.requires:
        if "extra ==" not in line or f'"{extra}"' in line:
            asked.add(re.match(r"[\w-]+", line)[0])
    files = {name for name in files_of("adaptive_neon") if name.endswith(".py")} | SCRIPTS
    assert packages_of(files - without) == asked


# -------------------- the CI script
STUB = """#!/bin/sh
echo "$(basename "$0")" "$@" >> "$LOG"
test "$(basename "$0")" != "$FAILS" || exit 1
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && echo "deactivate() { :; }" > "$3/bin/activate" ;;
  *" --out "*) while [ $# -gt 1 ]; do shift; done; mkdir -p "$1"; echo > "$1/report.html" ;;
esac
"""
CHECKS = ["python3", "pip", "ruff", "clang-format", "mypy", "pytest", "python"]


def ci(tmp_path, fails):
    """.ci/run where one of its commands fails -> exit status, the commands it called."""
    for name in ("bash", "sh", "basename", "dirname", "mktemp", "mkdir", "rm"):
        (tmp_path / name).symlink_to(shutil.which(name))
    for name in (*CHECKS, "chromium"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    names = {"PATH": str(tmp_path), "LOG": str(log), "FAILS": fails, "NEON_SKIP_CUDA_BUILD": "1"}
    ended = subprocess.run([ROOT / ".ci" / "run"], env=names, capture_output=True, timeout=60)
    return ended.returncode, log.read_text().splitlines()


def test_ci_runs_every_check_and_the_slow_tests_too(tmp_path):
    status, called = ci(tmp_path, fails="")
    assert status == 0 and {line.split()[0] for line in called} == {*CHECKS}
    assert [line for line in called if line.startswith("pytest ") and " -m  " in line]


@pytest.mark.parametrize("name", CHECKS)
def test_ci_fails_with_every_check(tmp_path, name):
    status, called = ci(tmp_path, fails=name)
    assert status != 0 and called[-1].startswith(name)  # at once
