"""The two prepared calls for a GPU, on the CPU: what they name exists, and they run through."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_gpu
import gpu_compare
import gpu_study
import pytest
import torch

from adaptive_neon.config import Config
from adaptive_neon.images import write_dataset

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("device", "extrapolation", "statistics", "toy", "toy_3", "sampling", "training")
STEPS = {"tests", "compile_bf16", *(f"bench_{part}" for part in PARTS)}
STEPS |= {f"{kind}_{where}" for kind in ("toy", "glyphs") for where in ("cpu", "gpu")}
STEPS |= {"same_toy", "same_glyphs"}


def shell(out, **environment):
    environment = {**os.environ, "DEVICE": "cpu", "SIZE": "tiny", "OUT": str(out), **environment}
    environment = {"PYTHON": sys.executable, "TORCHDYNAMO_DISABLE": "1", **environment}
    command = ["bash", str(ROOT / "tests/gpu.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def steps_of(out):
    """{step: result} of table.md; those that depend on the machine's tools are left out."""
    rows = re.findall(
        r"^\| (\w+) \| (.*) \| \d+ s \|$", (out / "table.md").read_text(), re.MULTILINE
    )
    return {name: result for name, result in rows if name not in ("memcheck", "racecheck")}


# -------------------- the shell script
def stand_in(folder, behaviour):
    """A Python that notes its arguments in `calls`, prints a row of a table and does no more."""
    python = folder / "python"
    lines = ["#!/bin/sh", f'echo "$*" >>"{folder}/calls"', 'echo "| a row of $2 |"', behaviour, ""]
    python.write_text("\n".join(lines))
    python.chmod(0o755)
    return str(python)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """[arguments] of every call of Python by gpu.sh at full size, and the steps' results; Python is
    a script that fails for the part `statistics`."""
    folder = tmp_path_factory.mktemp("calls")
    python = stand_in(folder, 'case "$2" in statistics) exit 3 ;; esac')
    told = shell(folder, PYTHON=python, SIZE="full", EDM="some/edm")
    calls = [line.split() for line in (folder / "calls").read_text().splitlines()]
    return SimpleNamespace(calls=calls, told=told, out=folder)


def test_every_step_is_in_the_table(recorded):
    assert set(steps_of(recorded.out)) == STEPS | {"compile_tf32", "compile_fp16"}


def test_a_step_that_fails_is_told_and_the_next_one_runs(recorded):
    results = steps_of(recorded.out)
    assert results["bench_statistics"] == "FAILED" and results["bench_toy"] == "ok"
    assert "==== bench_statistics" in recorded.told.stdout and recorded.told.returncode == 1


def test_no_step_begins_after_the_time(tmp_path):
    told = shell(tmp_path, PYTHON=stand_in(tmp_path, ""), SECONDS_IN_ALL="4")
    assert steps_of(tmp_path) == dict.fromkeys(STEPS, "not run: no time left")
    assert not (tmp_path / "calls").exists() and told.returncode == 1


@pytest.mark.slow
def test_a_step_ends_with_the_time(tmp_path):
    hanging = stand_in(tmp_path, 'case "$2" in pytest) exec sleep 600 ;; esac')
    shell(tmp_path, PYTHON=hanging, SECONDS_IN_ALL="9")
    results = steps_of(tmp_path)
    assert results["tests"] == "FAILED: passed its time limit"
    assert results["toy_cpu"] == "ok" and results["bench_device"] == "not run: no time left"


def test_rows_of_benchmarks_are_in_the_table_and_logs_beside_it(recorded):
    assert "| a row of extrapolation |" in (recorded.out / "table.md").read_text()
    assert "==== bench_extrapolation" in (recorded.out / "log.txt").read_text()


def test_gpu_sh_names_files_and_options_that_exist(recorded):
    options = {"edm_neon.py": {"--" + name.replace("_", "-") for name in vars(Config())}}
    assert len(recorded.calls) > 15
    for call in recorded.calls:
        files = [part for part in call if part.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files), call
        if "pytest" in call:
            continue
        source = (ROOT / files[0]).read_text("utf-8")
        known = options.get(files[0], set(re.findall(r'"(--[\w-]+)"', source)))
        given = {part for part in call if part.startswith("--")}
        assert given <= known, call


def test_edms_checkout_reaches_the_benchmark_of_sampling(recorded):
    (call,) = [call for call in recorded.calls if "sampling" in call]
    assert call[call.index("--edm") + 1] == "some/edm"


def test_a_network_call_of_cifar10_takes_42_4_gflop_an_image():
    assert round(bench_gpu.operations_of_call("cifar10") / 1e9, 1) == 42.4


def test_a_row_compares_with_the_fastest_peer(capsys):
    bench_gpu.row("what", 0.002, {"slow": 0.008, "fast": 0.003}, "notes")
    assert capsys.readouterr().out == "| what | 2.000 ms | fast: 3.000 ms | 1.50 | notes |\n"


# -------------------- a run on the GPU against the same on the CPU
def toy_summary(**changed):
    row = {"w": [0.0, 0.5], "fd": 0.002}
    summary = {"base": {"w": [0.0], "fd": 0.1}, "collapsed": {"w": [-1.0], "fd": 2.0}}
    return summary | {
        "global": {"w": 0.3, "fd": 0.02},
        "layerwise": [{"delta": 1.72, **row, **changed}],
    }


@pytest.mark.parametrize(
    "changed, differences",
    [({}, 0), ({"fd": 0.0020019}, 0), ({"fd": 0.0020021}, 1), ({"w": [0.0, 0.51]}, 1)],
    ids=["same", "rounding", "distance", "weights"],
)
def test_toys_differ_by_weights_and_by_a_thousandth(changed, differences):
    assert len(gpu_compare.toy_differences(toy_summary(), toy_summary(**changed))) == differences


def glyphs_summary(base=10.0, collapsed=(1.0, 2.0), repaired=(-3.0, -1.0)):
    final = {"base": {"fd": base}}
    for name, (low, high) in {"collapsed": collapsed, "global": repaired}.items():
        final[name] = {"against_base": {"low": low, "high": high}}
    return {"snapshots": [{"final": {}}, {"final": final}]}


@pytest.mark.parametrize(
    "changed, named",
    [
        ({}, None),
        ({"base": 14.9}, None),
        ({"base": 15.1}, "base"),
        ({"base": 6.6}, "base"),
        ({"collapsed": (7.0, 8.0)}, None),
        ({"collapsed": (-0.1, 2.0)}, "collapsed"),
        ({"repaired": (-9.0, -8.0)}, None),
        ({"repaired": (-1.0, 0.1)}, None),
        ({"repaired": (0.1, 1.0)}, "global"),
    ],
)
def test_glyphs_differ_by_the_base_and_by_what_is_said_of_it(changed, named):
    found = gpu_compare.glyphs_differences(glyphs_summary(), glyphs_summary(**changed))
    assert [re.match(r"\w+", line)[0] for line in found] == ([named] if named else [])
    if named == "global":
        assert found == ["global against base: better on the CPU, worse on the GPU"]


# -------------------- the study by the clock
def test_lengths_follow_the_measured_speed():
    found = gpu_study.lengths(speed=4000, seconds=300)  # 90 s for the base
    assert found["--train-base"] == ["360"]
    assert found["--snapshot"] == ["22,45"] and found["--ema-kimg"] == ["5.5"]


def test_a_slow_machine_still_has_two_lengths():
    assert gpu_study.lengths(speed=10, seconds=300)["--snapshot"] == ["1,2"]


@pytest.mark.parametrize(
    "seconds, selection", [(95.9, 250), (96.1, 500), (0.1, 250), (1e6, 10_000)]
)
def test_image_counts_are_whole_batches_that_fit_into_the_time(seconds, selection):
    c = SimpleNamespace(snapshot=(22, 45), sample_batch=250, synthetic=6000)
    cost = SimpleNamespace(seconds_per_image=0.001, scores=50, finals=10)
    # two snapshots, 50 scores and 10 final ones of four times the images: 180 a selection image
    found = gpu_study.image_counts(c, cost, seconds)
    assert found == {"--select-images": [str(selection)], "--final-images": [str(4 * selection)]}


def test_the_classifier_learns_and_names_what_it_is_no_fid_of():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 3
    images = torch.randint(60, (96, 3, 8, 8), generator=generator) + 60 * labels.view(-1, 1, 1, 1)
    part = SimpleNamespace(images=images.to(torch.uint8), labels=labels)
    real = SimpleNamespace(training=part, final=part)
    state = torch.random.get_rng_state()
    found = gpu_study.Classifier("classifier", 3, 0, real, "cpu")
    assert found.facts["accuracy"] > 0.9 and found(part.images[:2]).shape == (2, found.dim)
    assert "JPEG" in found.score and "FID" not in found.score
    assert torch.equal(torch.random.get_rng_state(), state)


# -------------------- both in small
@pytest.mark.slow
def test_gpu_sh_in_small(tmp_path):
    told = shell(tmp_path, OMP_NUM_THREADS="1")
    assert steps_of(tmp_path) == dict.fromkeys(STEPS, "ok"), told.stdout + told.stderr
    assert told.returncode == 0
    table = (tmp_path / "table.md").read_text()
    for what in ("copy of", "extrapolation, 3 tensors", "moments", "Fréchet", "toy,", "compiled"):
        assert f"| {what}" in table or f", {what} |" in table


@pytest.mark.slow
def test_gpu_study_in_small(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(260) % 3
    images = torch.randint(60, (260, 3, 8, 8), generator=generator) + 60 * labels.view(-1, 1, 1, 1)
    write_dataset(tmp_path / "data.zip", images.to(torch.uint8), labels)
    options = "--device cpu --channels 8 --seconds 2 --batch 64 --sample-batch 40 --steps 2"
    options += " --synthetic 60 --grid 1 --evaluations 1"
    command = [sys.executable, str(ROOT / "tests/gpu_study.py"), str(tmp_path / "data.zip")]
    subprocess.run([*command, "--out", str(tmp_path / "out"), *options.split()], check=True)

    summary = json.loads((tmp_path / "out/summary.json").read_text("utf-8"))
    assert [entry["kimg"] for entry in summary["snapshots"]] == [1, 2]
    assert summary["judges"] == ["classifier", "classifier-2", "random-conv", "pixels"]
    entry = summary["snapshots"][1]
    assert {"global", "blockwise", "searched", "guided", "base, trained on"} <= set(entry["final"])
    assert (tmp_path / "out/report.html").is_file()
