"""A user's Python file: what it imports is its own, and all that it reads is in its identity."""

import json
import os
import py_compile
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

import adaptive_neon as neon
from adaptive_neon.files import UserError
from adaptive_neon.userfile import UserFile

ROOT = Path(neon.__file__).parents[1]
HEAD = "import importlib, json, sys\nfrom pathlib import Path\nHERE = Path(__file__).parent\n"


def json_at(file):
    return f"json.loads((HERE / {file!r}).read_text())"


def tensors_in(path, value):
    safetensors.torch.save_file({"a": torch.full((2,), float(value))}, path)


def script_with(path, value):
    net = torch.nn.Module()
    net.a = torch.nn.Buffer(torch.full((2,), float(value)))
    torch.jit.script(net).save(path)


# What decides the answer: body of the user's file, and the one file that changes, with its writer.
INPUTS = {
    "the file": ("A = 1", None),
    "a module beside it": ("from helper import A", "helper.py"),
    "a module of a module": ("import first\nA = first.A", "second.py"),
    "a package beside it": ("from package.inner import A", "package/deep.py"),
    "a folder without __init__": ("from bare import part\nA = part.A", "bare/part.py"),
    "a package in the parent folder": (
        "sys.path.insert(0, str(HERE.parent))\nimport above\nA = above.A",
        "../above/__init__.py",
    ),
    "a module appended to the path, late": (
        "def answer():\n    sys.path.append(str(HERE.parent / 'lib'))\n"
        "    import far\n    return far.A",
        "../lib/far.py",
    ),
    "importlib in a function": (
        "def answer():\n    return importlib.import_module('helper').A",
        "helper.py",
    ),
    "importlib by its place": (
        "import importlib.util\n"
        "s = importlib.util.spec_from_file_location('x', HERE.parent / 'lib' / 'far.py')\n"
        "m = importlib.util.module_from_spec(s)\ns.loader.exec_module(m)\nA = m.A",
        "../lib/far.py",
    ),
    "code that is run": ("exec((HERE / 'helper.py').read_text())", "helper.py"),
    "JSON in a function": (f"def answer():\n    return {json_at('cfg.json')}", "cfg.json"),
    "JSON of a module": ("from reader import A", "cfg.json"),
    "JSON of a package above": (
        "sys.path.insert(0, str(HERE.parent))\nfrom above.reader import A",
        "../above/cfg.json",
    ),
    "JSON that a link in the folder leads to": (
        f"def answer():\n    return {json_at('linked.json')}",
        "../lib/linked.json",
    ),
    "JSON of the folder through a link to it": (
        f"def answer():\n    return {json_at('../link/cfg.json')}",
        "cfg.json",
    ),
    "safetensors": (
        "from safetensors.torch import load_file\n"
        "def answer():\n    return load_file(HERE / 'a.safetensors')['a'].tolist()",
        "a.safetensors",
    ),
    "weights": (
        "import torch\ndef answer():\n    return torch.load(HERE / 'a.pt').tolist()",
        "a.pt",
    ),
    "TorchScript": (
        "import torch\nNET = torch.jit.load(HERE / 'a.ts')\n"
        "def answer():\n    return NET.a.tolist()",
        "a.ts",
    ),
}
WRITERS = {
    ".safetensors": tensors_in,
    ".ts": script_with,
    ".pt": lambda path, value: torch.save(torch.full((2,), value), path),
    ".json": lambda path, value: path.write_text(json.dumps(value)),
    ".py": lambda path, value: path.write_text(f"A = {value}\n"),
}


def project(root, body, changed=None, value=1):
    """A folder `mine` with the user's file and, beside and above it, all that it might read."""
    texts = {
        "mine/first.py": "from second import A\n",
        "mine/second.py": "A = 1\n",
        "mine/helper.py": "A = 1\n",
        "mine/package/__init__.py": "",
        "mine/package/inner.py": "from . import deep\nfrom .deep import A\n",
        "mine/package/deep.py": "A = 1\n",
        "mine/bare/part.py": "A = 1\n",
        "mine/cfg.json": "1",
        "mine/reader.py": HEAD + f"A = {json_at('cfg.json')}\n",
        "above/__init__.py": "A = 1\n",
        "above/reader.py": HEAD + f"A = {json_at('cfg.json')}\n",
        "above/cfg.json": "1",
        "lib/far.py": "A = 1\n",
        "lib/linked.json": "1",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for link, target in (("link", "mine"), ("mine/linked.json", "../lib/linked.json")):
        (root / link).unlink(missing_ok=True)
        (root / link).symlink_to(target)
    default = "" if "def answer" in body else "\ndef answer():\n    return A\n"
    (root / "mine" / "mine.py").write_text(f"{HEAD}{body}\n{default}")
    if changed is not None:
        place = root / "mine" / changed
        WRITERS[place.suffix](place, value)
    elif value != 1:
        (root / "mine" / "mine.py").write_text(f"{HEAD}A = {value}\n{default}")
    for file in root.rglob("*"):
        date = 1e9 + value * ("spec_from" in body)  # Python's own loader asks
        os.utime(file, (date, date))
    return root / "mine" / "mine.py"


def answered(path):
    """(answer, identity) of a user's file."""
    file = UserFile(path, "--model")
    return file.call("answer"), file.identity


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("body, changed", INPUTS.values(), ids=INPUTS.keys())
def test_what_decides_the_answer_is_in_the_identity(tmp_path, body, changed, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    first = answered(project(tmp_path / "a", body, changed))
    again = answered(project(tmp_path / "a", body, changed))
    moved = answered(project(tmp_path / "b", body, changed))
    assert first == again == moved, "another module of the process, another folder"

    other = answered(project(tmp_path / "a", body, changed, 2))  # as large, of the same date
    assert other[0] != first[0] and other[1] != first[1]


def test_lines_of_a_warning_are_no_input(tmp_path):
    body = (
        "import warnings\ndef answer():\n    warnings.warn_explicit('!', UserWarning, "
        "str(HERE / 'helper.py'), 1)\n"
    )
    file = UserFile(project(tmp_path, body), "--model")
    before = file.identity
    with pytest.warns(UserWarning) as caught:
        file.call("answer")
    assert caught[0].filename.endswith("helper.py")
    assert file.identity == before


@pytest.mark.slow
def test_another_process_finds_the_same_identity(tmp_path):
    body = (
        "from package.inner import A\n"
        f"def answer():\n    import reader\n    return {json_at('cfg.json')}"
    )
    path = project(tmp_path, body)
    code = f"from adaptive_neon.userfile import UserFile\nf = UserFile({str(path)!r}, '')\n"
    code += "f.call('answer')\nprint(f.identity)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == answered(path)[1]


def two_files(tmp_path, line):
    """Two files, each with a utils.py, that answer with this line."""
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "utils.py").write_text(f"from more import NAME as M\nNAME = {name!r}\n")
        (tmp_path / name / "more.py").write_text(f"NAME = {name!r}\n")
        path = tmp_path / name / "same.py"
        path.write_text(f"import importlib, sys\n{line}\n")
        paths.append(path)
    return paths


@pytest.mark.parametrize(
    "line",
    [
        "import utils\ndef answer():\n    return utils.NAME + utils.M",
        "def answer():\n    import utils\n    return utils.NAME + utils.M",
        "def answer():\n    from utils import M\n    from more import NAME\n    return M + NAME",
        "def answer():\n    m = importlib.import_module('utils')\n    return m.NAME + m.M",
        "import utils\ndef answer():\n    m = sys.modules['utils']\n    return m.NAME + m.M",
    ],
    ids=["at import", "in a function", "names", "importlib", "sys.modules"],
)
def test_each_file_has_modules_of_its_own(tmp_path, line):
    a, b = (UserFile(path, "--judge") for path in two_files(tmp_path, line))
    assert [f.call("answer") for f in (a, b, a, b)] == ["aa", "bb", "aa", "bb"]


def test_entries_of_sys_path_are_a_files_own(tmp_path):
    files = []
    for name, how in (("a", "insert(0, "), ("b", "append(")):
        (tmp_path / name / "lib").mkdir(parents=True)
        (tmp_path / name / "lib" / "shared.py").write_text(f"NAME = {name!r}\n")
        path = tmp_path / name / f"{name}.py"
        path.write_text(
            f"import sys\nsys.path.{how}{str(tmp_path / name / 'lib')!r})\n"
            "def answer():\n    import shared\n    return shared.NAME\n"
        )
        files.append(UserFile(path, "--judge"))
    assert [f.call("answer") for f in (*files, *files)] == ["a", "b", "a", "b"]


def test_two_files_at_once_in_threads(tmp_path):
    line = (
        "def answer():\n    import utils, time\n    time.sleep(0.001)\n    import more\n"
        "    return utils.NAME + more.NAME"
    )
    a, b = (UserFile(path, "--judge") for path in two_files(tmp_path, line))
    found = {"a": [], "b": []}

    def work(file, name):
        for _ in range(30):
            found[name].append(file.call("answer"))

    threads = [threading.Thread(target=work, args=pair) for pair in ((a, "a"), (b, "b"), (a, "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found["a"]) == {"aa"} and set(found["b"]) == {"bb"} and len(found["a"]) == 60


def test_the_process_keeps_its_own_modules_and_path(tmp_path, monkeypatch):
    own = type(sys)("utils")
    monkeypatch.setitem(sys.modules, "utils", own)
    path, _ = two_files(tmp_path, "import utils\ndef answer():\n    return utils.NAME")
    monkeypatch.syspath_prepend(tmp_path / "b")  # its utils is not what a file beside one means
    before = list(sys.path), list(sys.meta_path)
    assert UserFile(path, "--judge").call("answer") == "a"
    assert sys.modules["utils"] is own and (sys.path, sys.meta_path) == before
    assert "more" not in sys.modules and "neon_model_same" not in sys.modules


def test_the_program_itself_is_not_loaded_again(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import adaptive_neon.keys\ndef answer():\n    return adaptive_neon.keys\n")
    file = UserFile(path, "--model")
    assert file.call("answer") is neon.keys
    assert list(file.scope.records) == ["module "]


def test_classes_are_pickled_by_their_own_names(tmp_path):
    box = "from dataclasses import dataclass\n@dataclass\nclass Box:\n    a: 'int'\n"
    (tmp_path / "nets.py").write_text(box)
    path = tmp_path / "mine.py"
    path.write_text(
        f"import pickle\n{box}def answer():\n    import nets\n    found = []\n"
        "    for kind in (nets.Box, Box):\n        data = pickle.dumps(kind(3))\n"
        "        assert pickle.loads(data) == kind(3)\n        found.append(b'nets' in data)\n"
        "    return found\n"
    )
    assert UserFile(path, "--model").call("answer") == [True, False]


@pytest.mark.parametrize(
    "late", ["import helper", f"{json_at('cfg.json')}"], ids=["a module", "a file"]
)
def test_what_is_read_later_is_refused(tmp_path, late):
    path = project(tmp_path, f"def answer(again):\n    if again:\n        {late}\n")
    file = UserFile(path, "--judge")
    file.call("answer", False)
    file.scope.seal()
    file.call("answer", False)
    with pytest.raises(UserError, match=r"mine.py: answer\(\) reads .*(helper|cfg.json)"):
        file.call("answer", True)


def test_a_file_that_changes_during_the_run_is_refused(tmp_path):
    path = project(tmp_path, f"def answer():\n    return {json_at('cfg.json')}")
    file = UserFile(path, "--judge")
    file.call("answer")
    file.scope.seal()
    (tmp_path / "mine" / "cfg.json").write_text("2")
    with pytest.raises(UserError, match="cfg.json, which is new or has changed"):
        file.call("answer")


def test_what_it_writes_and_what_names_or_saves_is_no_input(tmp_path):
    body = (
        "def answer():\n    (HERE / 'memo').write_text('1')\n    return (HERE / 'memo').read_text()"
        f"\ndef save():\n    import helper\n    return {json_at('cfg.json')}"
    )
    file = UserFile(project(tmp_path, body), "--model")
    before = file.identity
    file.call("answer")
    assert file.identity == before
    file.scope.seal()
    file.call("save")
    assert file.identity == before


@pytest.mark.parametrize("folder", [".cache", "torchinductor_me"])
def test_caches_are_no_input(tmp_path, folder):
    path = project(tmp_path, f"def answer():\n    return (HERE / {folder!r} / 'x').read_text()")
    (tmp_path / "mine" / folder).mkdir()
    (tmp_path / "mine" / folder / "x").write_text("kept")
    file = UserFile(path, "--model")
    before = file.identity
    assert file.call("answer") == "kept" and file.identity == before


def test_a_module_without_source_is_an_input(tmp_path):
    found = []
    for value in (1, 1, 2):
        path = project(tmp_path, "from bytes_alone import A")
        (tmp_path / "code.py").write_text(f"A = {value}\n")
        py_compile.compile(tmp_path / "code.py", tmp_path / "mine" / "bytes_alone.pyc")
        found.append(answered(path))
    assert found[0] == found[1] and found[0][1] != found[2][1]


@pytest.mark.parametrize("holder", ["decoder", "mine"], ids=["a module", "the file"])
def test_networks_that_a_module_holds_are_in_the_identity(tmp_path, holder, monkeypatch):
    """Not the file's name."""
    net = "import os, torch\ntorch.manual_seed(int(os.environ['SEED']))\n"
    net += "NET = torch.nn.Linear(2, 2)\n"
    (tmp_path / "decoder.py").write_text(net)
    found = []
    for name, seed in (("mine", 0), ("renamed", 0), ("mine", 1)):
        path = tmp_path / f"{name}.py"
        path.write_text("import decoder\n" if holder == "decoder" else net)
        monkeypatch.setenv("SEED", str(seed))
        file = UserFile(path, "--model")
        file.scope.seal()
        found.append(file.identity)
    assert found[0] == found[1] != found[2]


@pytest.mark.slow
def test_a_compiled_function_sees_the_modules(tmp_path):
    """The compiler looks modules up by their names."""
    for value in (2.0, 3.0):
        (tmp_path / "helper.py").write_text(f"K = {value}\ndef f(x):\n    return x * K\n")
        path = tmp_path / "mine.py"
        path.write_text(
            "import torch, helper\ndef forward(x):\n    return helper.f(x) + 1\n"
            "compiled = torch.compile(forward, backend='eager')\n"
            "def answer():\n    return float(compiled(torch.ones(1)))\n"
        )
        assert UserFile(path, "--model").call("answer") == value + 1


@pytest.mark.slow
def test_changed_precision_is_one_line(tmp_path):
    """In a process of its own, as torch keeps it; each line starts where the last one ended."""
    lines = (
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.set_float32_matmul_precision('highest')",
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    )
    code = "from adaptive_neon import UserError\nfrom adaptive_neon.userfile import UserFile\n"
    for i, line in enumerate(lines):
        body = line if i % 2 else f"def answer():\n    {line}"
        path = tmp_path / f"mine{i}.py"
        path.write_text(f"import torch\n{body}\n")
        code += f"try:\n    UserFile({str(path)!r}, '--model').call('answer')\n"
        code += "except UserError as error:\n    print(error)\n"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(found.stdout.splitlines()) == len(lines)
    for said in found.stdout.splitlines():
        assert "changes torch's float32" in said
