"""What `pip install .` gives: imports that are quick, and both scripts outside the clone.

The wheel is built from the sdist, so that the sdist proves complete, and installed into a virtual
environment that sees the packages of this one behind its own.
"""

import json
import os
import shutil
import site
import subprocess
import sys
import types
from pathlib import Path

import pytest

import adaptive_neon
import edm_neon
import toy_neon
from adaptive_neon import __version__, extension
from adaptive_neon.files import UserError

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


# ---------------------------------------------------------------- import
IMPORT = """
import sys, time, torch

def asked(*args):
    raise AssertionError("the GPU was asked at import")

torch.cuda.is_available = torch.cuda.device_count = torch._C._cuda_getDeviceCount = asked
sys.modules["neon_ext"] = None  # as if it were not built

begin = time.process_time()
import adaptive_neon
print(time.process_time() - begin)
import edm_neon, toy_neon
print(*sys.modules)
"""


@pytest.fixture(scope="module")
def imported():
    """Seconds of processor time beyond torch's own, and all modules once the scripts are there."""
    command = [sys.executable, "-c", IMPORT]
    said = subprocess.check_output(command, cwd=ROOT, text=True, timeout=300)
    seconds, *modules = said.split()
    return float(seconds), modules


@pytest.mark.parametrize("name", ["matplotlib", "diffusers", "transformers"])
def test_import_leaves_out_what_takes_long(imported, name):
    assert name not in imported[1]


def test_import_takes_less_than_a_second(imported):
    assert imported[0] < 1


# ---------------------------------------------------------------- the extension
def installed(monkeypatch, **attributes):
    """extension.load() where neon_ext has these attributes; None: it is not there."""
    module = types.ModuleType("neon_ext")
    module.__file__ = "neon_ext.so"
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, "neon_ext", module if attributes else None)
    return extension.load()


def test_the_extension_of_this_version_is_taken(monkeypatch):
    assert installed(monkeypatch, __version__=__version__).__file__ == "neon_ext.so"


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [({}, "neon_ext is not built"), ({"__version__": "0.0.9"}, "neon_ext 0.0.9 .* is not of")],
)
def test_another_extension_or_none_is_one_line_on_use(monkeypatch, attributes, reason):
    missing = installed(monkeypatch, **attributes)
    with pytest.raises(UserError, match=f"{reason}.*pip install --no-build-isolation ."):
        missing.extrapolate([], [], [], [])


def test_python_may_look_at_a_missing_extension(monkeypatch):
    missing = installed(monkeypatch)
    assert not hasattr(missing, "__wrapped__") and repr(missing)


@pytest.mark.parametrize(("script", "user"), [(edm_neon, adaptive_neon.cli), (toy_neon, toy_neon)])
def test_scripts_without_the_extension_end_in_one_line(script, user, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(user, "neon_ext", installed(monkeypatch))
    try:
        code = script.main(["--out", str(tmp_path)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{script.__name__}: neon_ext is not built") and "pip install" in line


# ---------------------------------------------------------------- outside the clone
@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Folder of a virtual environment that has the wheel."""
    folder = tmp_path_factory.mktemp("install")
    quiet = {"check": True, "cwd": ROOT, "stdout": subprocess.DEVNULL, "timeout": 1800}
    base = ["egg_info", "--egg-base", str(folder), "sdist", "--dist-dir", str(folder)]
    subprocess.run([sys.executable, "setup.py", "-q", *base], **quiet)
    (archive,) = folder.glob("*.tar.gz")

    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    wheel = ["wheel", "--no-build-isolation", *offline, "--wheel-dir", str(folder), str(archive)]
    subprocess.run([*pip, *wheel], **quiet)
    (wheel,) = folder.glob("*.whl")

    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], **quiet)
    interpreter = str(venv / "bin" / "python")
    subprocess.run([*pip, "--python", interpreter, "install", *offline, str(wheel)], **quiet)

    # Only now: pip must not see what this environment has. A .pth file's paths come last.
    (packages,) = (venv / "lib").glob("python*/site-packages")
    (packages / "behind.pth").write_text("\n".join(site.getsitepackages()))
    return venv


@pytest.fixture(scope="module")
def execute(environment, tmp_path_factory):
    """execute(command, *arguments) of the environment in an empty folder -> what it printed."""
    folder = tmp_path_factory.mktemp("outside")

    def run(command, *arguments):
        command = [str(environment / "bin" / command), *map(str, arguments)]
        ended = subprocess.run(
            command, cwd=folder, env=OUTSIDE, capture_output=True, text=True, timeout=900
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    run.folder = folder
    return run


TINY = (
    *("--preset", "glyphs", "--snapshot", "1", "--grid", "0.5,1.0", "--steps", "5"),
    *("--synthetic", "100", "--select-images", "80", "--final-images", "80", "--judge", "none"),
)


@pytest.fixture(scope="module")
def glyphs(execute):
    """Folder of a tiny run of edm-neon."""
    execute("edm-neon", *TINY, "--train-base", 2, "--out", "glyphs")
    return execute.folder / "glyphs"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["adaptive_neon", "edm_neon", "toy_neon", "neon_ext"])
def test_modules_come_from_the_installed_wheel(environment, execute, module):
    found = execute("python", "-c", f"import torch, {module}; print({module}.__file__)")
    assert Path(found.strip()).is_relative_to(environment)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "option"), [("edm-neon", "--preset"), ("toy-neon", "--delta")])
def test_help(execute, script, option):
    assert option in execute(script, "--help")


@pytest.mark.slow
def test_toy_neon_runs(execute):
    execute("toy-neon", "--base-steps", 50, "--points", 512, "--delta", 1, "--out", "toy")
    summary = json.loads((execute.folder / "toy" / "summary.json").read_text())
    assert len(summary["layerwise"][0]["w"]) == 6


@pytest.mark.slow
def test_edm_neon_runs(glyphs):
    assert "| global" in (glyphs / "table.md").read_text()
    assert list(glyphs.glob("adaptive-neon-*.safetensors"))
    assert "<svg" in (glyphs / "report.html").read_text()  # the template is installed, too


@pytest.mark.slow
def test_a_pipeline_of_diffusers_as_base(execute, glyphs):
    pytest.importorskip("diffusers")
    from test_diffusers import make, unet

    make(execute.folder / "pipeline", "ddpm", net=unet(channels=1, size=12))
    out = execute.folder / "repaired"
    out.mkdir()
    for network in glyphs.glob("glyphs-*"):  # the trained classifier
        shutil.copy(network, out)
    execute("edm-neon", *TINY, "--base", "pipeline", "--out", "repaired")
    assert (out / "table.md").exists()
    assert list(out.glob("**/model_index.json"))
