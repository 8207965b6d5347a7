"""edm_neon.py as a script: whole runs of the small preset, kills, ranks, bad input."""

import json
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from edm_helpers import (
    PRESET,
    SCRIPT,
    SIZE,
    SMALL,
    TORCHRUN,
    launch,
    lines,
    network,
    preset,
    replace,
)

import adaptive_neon as neon
import edm_neon as edm

SEARCHED = (
    *(*SMALL, "--sweep", "-1:1:1", "--search", "cobyqa", "--evaluations", "5", "--export-pt"),
    *("--final-repeats", "2", "--controls", "none"),
)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("edm")
    done = launch(*SEARCHED, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def summary(small_run):
    return json.loads((small_run[0] / "summary.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture
def prepared(small_run, tmp_path):
    """A folder that holds the trained feature network, and options that name base and aux."""
    for path in small_run[0].glob("glyphs-cnn-*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (base,) = small_run[0].glob("base-*.safetensors")
    (aux,) = small_run[0].glob("self-*/network-snapshot-*.safetensors")
    return tmp_path, ("--preset", PRESET, "--base", base, "--aux", aux, "--snapshot", "1")


# -------------------- a whole run


def test_table_is_printed_with_the_presets_score(small_run, summary):
    out, printed = small_run
    assert f"Report: {out / 'report.html'}" in printed
    assert summary["score"] in printed and "FID" not in printed


def test_summary_tells_how_to_repeat_the_run(small_run, summary):
    assert summary["command"] == " ".join(
        ["python edm_neon.py", *SEARCHED, "--out", str(small_run[0])]
    )
    assert summary["config"]["preset"] == PRESET and summary["threads"] == preset.threads


# -------------------- again


@pytest.mark.slow
def test_plan_of_a_finished_run(small_run):
    before = sorted(small_run[0].rglob("*"))
    done = launch(*SEARCHED, "--plan", "--out", small_run[0])
    assert done.returncode == 0 and "hours" in done.stdout and "not trained" not in done.stdout
    assert sorted(small_run[0].rglob("*")) == before


# -------------------- signals, a full disk


def heed_signals():
    """In the child: the background jobs of a shell inherit an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(out, *args):
    command = [sys.executable, str(SCRIPT), *SMALL, *args, "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=heed_signals)


def wait_for(path, process):
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    pytest.fail(f"{path} did not appear")


@pytest.mark.parametrize(
    "number, code",
    [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)],
    ids=["TERM", "INT"],
)
def test_signal_ends_a_run_in_one_line(tmp_path, number, code):
    process = start(tmp_path, "--train-base", "2000")
    wait_for(tmp_path / ".lock", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "the same command goes on" in errors
    assert "Traceback" not in errors and not [*tmp_path.glob(".part-*")]


@pytest.mark.slow
@pytest.mark.parametrize("pipe", ["| head -1", "2>&1 | head -1", "| true", ">&-"])
def test_a_reader_that_leaves_costs_nothing(tmp_path, pipe):
    """Neither the exit code nor the last lines of what is left of stderr."""
    command = f"{sys.executable} {SCRIPT} --preset {PRESET} --plan --out {tmp_path} {pipe}"
    shell = ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Error" not in done.stderr


@pytest.mark.slow
def test_full_disk(tmp_path):
    """A limit on the size of files fails in the middle of a write, as a full disk does."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = launch(*SMALL, "--out", tmp_path, preexec_fn=limit)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "cannot be written, is the disk full?" in last
    assert str(tmp_path) in last and "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


# -------------------- two ranks


@pytest.mark.slow
def test_two_ranks_score_as_one_process(prepared, tmp_path):
    """Grid, search by gradient and final comparison."""
    out, options = prepared
    sizes = ("--grid", "0.5", "--synthetic", "100", "--select-images", "80", "--final-images", "80")
    search = ("--search", "gradient", "--evaluations", "3", "--sample-batch", "20")
    search += ("--steps", "4", "--judge", "none", "--controls", "none")
    found = []
    for program in ((sys.executable,), TORCHRUN):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        for path in out.glob("glyphs-cnn-*"):
            (folder / path.name).write_bytes(path.read_bytes())
        done = launch(*options, *sizes, *search, "--out", folder, program=program)
        assert done.returncode == 0, done.stderr[-2000:]
        (entry,) = json.loads((folder / "summary.json").read_text())["snapshots"]
        found.append([row["fd"] for row in entry["sweep"]])
        found[-1] += [entry["searched"]["fd"], entry["final"]["blockwise"]["fd"]]
        found[-1] += [*entry["searched"]["w"].values()]
        # base, collapsed, the grid's point, and what the search adds to its start
        assert len(lines(folder / "grid.jsonl")) == 3 + 2
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_train_a_network_with_parameters_no_loss_uses(prepared):
    """--augment 0 with augmentation labels, and a batch of one: a rank without images."""
    out, options = prepared
    shape = (preset.network["img_channels"], SIZE, SIZE)
    changes = {"img_channels": shape[0], "img_resolution": SIZE, "attn_resolutions": [SIZE // 2]}
    edm.save_network(network(**changes), out / "base.safetensors", {})
    done = launch(
        *("--preset", PRESET, "--base", out / "base.safetensors", "--snapshot", "1"),
        *("--augment", "0", "--batch", "1", "--synthetic", "40", "--grid", "0.5", "--steps", "2"),
        *("--select-images", "40", "--final-images", "40", "--out", out, "--ema-kimg", "0.01"),
        *("--judge", "none", "--controls", "none"),
        program=TORCHRUN,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (aux,) = out.glob("self-*/network-*.safetensors")
    trained, base = edm.load_network(aux), edm.load_network(out / "base.safetensors")
    moved = {
        name: not torch.equal(p, base.state_dict()[name]) for name, p in trained.named_parameters()
    }
    assert moved["model.map_layer0.weight"] and not moved["model.map_augment.weight"]


# -------------------- bad input is one line


@pytest.mark.parametrize(
    "args, message",
    [
        (("--snapshot", "x"), "--snapshot: give numbers"),
        (("--snapshot", "0"), "out of range"),
        (("--grid", ""), "--grid: give numbers"),
        (("--grid", "a,b"), "not 'a,b'"),
        (("--grid", "nan"), "not 'nan'"),
        (("--grid", ",".join(map(str, range(30)))), "27000 points"),
        (("--base", "/nowhere/net.pkl"), "/nowhere/net.pkl does not exist"),
        (("--partition", "thirds"), "thirds is not"),
        (("--sweep", "1:2"), "--sweep: give start:stop:step"),
        (("--sweep", "2:1:0.5"), "--sweep: give start:stop:step"),
        (("--synthetic", "20000"), "overlap"),
        (("--preset", "imagenet"), "--preset"),
        (("--device", "tpu"), "--device"),
        (("--out", "/proc/no"), "--out /proc/no"),
        (("--final-images", "3"), "out of range, it goes from 40"),
        (("--batch", "0"), "out of range"),
        (("--augment", "1.5"), "out of range"),
        (("--placebo", "2", "--partition", "layers"), "--placebo"),
        (("--bounds", "1"), "--bounds"),
        (("--search", "newton"), "--search"),
        (("--no-such-option",), "--no-such-option"),
        pytest.param(("--preset", "cifar10", "--device", "cpu"), "--yes", marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(args, message, tmp_path, capsys):
    out = () if "--out" in args else ("--out", str(tmp_path / "out"))
    with pytest.raises(SystemExit) as stop:
        edm.main(["--preset", PRESET, *args, *out])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith("edm_neon: ") and message in line


def test_bad_input_of_the_script_itself(tmp_path):
    done = launch("--preset", PRESET, "--grid", "a", "--out", tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_our_own_errors_are_traced_back(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise NameError("a fault of ours")

    replace(monkeypatch, "seed_ledger", broken)
    with pytest.raises(NameError):
        edm.main(["--preset", PRESET, "--out", str(tmp_path)])


@pytest.fixture
def misfits(tmp_path):
    """Images and networks that do not fit."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(400) % 10
    neon.images.write_dataset(tmp_path / "plain.zip", images, None)
    neon.images.write_dataset(tmp_path / "odd.zip", images[:, :, :30, :30], labels)
    neon.images.write_dataset(tmp_path / "small.zip", images[:, :, :20, :20], labels)
    neon.images.write_dataset(tmp_path / "few.zip", images[:50], labels[:50])
    edm.save_network(network(), tmp_path / "base.safetensors", {})
    return tmp_path


@pytest.mark.parametrize(
    "args, message",
    [
        (("--train-base", "1", "--data", "plain.zip"), "has no labels"),
        (("--train-base", "1", "--data", "none.zip"), "none.zip cannot be read"),
        (("--train-base", "1", "--data", "."), "cannot be read"),
        (("--train-base", "1", "--data", "odd.zip"), "30 x 30 images"),
        (("--train-base", "1", "--data", "few.zip"), "give more images"),
        (("--train-base", "1"), "--train-base needs --data"),
        (("--base", "base.safetensors", "--preset", PRESET), "the base makes images of shape"),
        (("--base", "base.safetensors", "--data", "small.zip"), "(3, 16, 16)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_data_and_networks_that_do_not_fit(misfits, args, message, capsys, monkeypatch):
    monkeypatch.chdir(misfits)
    with pytest.raises(SystemExit) as stop:
        edm.main(["--yes", "--device", "cpu", "--out", "out", *args])
    *_, line = capsys.readouterr().err.strip().splitlines()  # after what was read of --data
    assert stop.value.code == 2 and message in line
