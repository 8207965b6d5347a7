"""What adaptive_neon/report.py promises."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy
import scipy.stats
import torch
from edm_helpers import (
    BEST,
    config,
    replace,
    score_of,
    toy_scorer,
    weights,
)

import adaptive_neon as neon
import edm_neon as edm

BLOCKS = ("enc", "mid", "dec")


CPU = neon.processes.Processes("cpu")


# -------------------- seeds


def ledger(**options):
    sizes = {"synthetic": 6000, "select_images": 1000, "final_images": 500}
    return neon.study.seed_ledger(neon.config.Config(**sizes | options))


# -------------------- the study of one snapshot, on scores made by hand


class Prescribed:
    """A scorer of prescribed distances: fd(w, seeds)."""

    def __init__(self, fd, blocks=BLOCKS, dim=6):
        self.fd, self.kimg, self.calls = fd, 1, []
        self.merger = SimpleNamespace(blocks=list(blocks), table=dict)
        facts = SimpleNamespace(facts={"images": 10_000})
        features = SimpleNamespace(dim=dim)
        self.judge = SimpleNamespace(name="own", features=features, selection=facts, final=facts)
        self.judges = [self.judge]

    def score(self, w, seeds, desc=None):
        self.calls.append((w, seeds))
        return score_of(self.fd(w, seeds), w=w, images=seeds.count, first_seed=seeds.first)

    def scores(self, w, seeds, judges, desc=None):
        return [self.score(w, seeds) for _ in judges]

    def score_all(self, candidates, seeds, desc):
        return [self.score(w, seeds) for w in candidates]


def study_of(fd, monkeypatch=None, found=None, blocks=BLOCKS, **options):
    """The study of these distances; found: what a search returns."""
    c = config(Path("."), **options)
    scorer = Prescribed(fd, blocks)
    if found is not None:
        monkeypatch.setitem(neon.search.SEARCHES, c.search, found)
    return neon.study.study(c, scorer, scorer, None, neon.study.seed_ledger(c)), scorer


def bowl(w, seeds=None):
    """Least at BEST."""
    return 1.0 + sum((w[block] - BEST[block]) ** 2 for block in BLOCKS)


# -------------------- warnings


def warnings(models=None, final=None, had_grid=False, dim=6, real=10_000, **options):
    models = {"base": 4.0, "global": 2.0} | (models or {})
    candidates = {
        name: value
        if isinstance(value, neon.study.Candidate)
        else neon.study.Candidate(weights(1, 1, 1), value, None)
        for name, value in models.items()
    }
    rows = {name: {"fd": c.fd, "against_base": gain(-1.9)} for name, c in candidates.items()}
    rows |= final or {}
    facts = SimpleNamespace(facts={"images": real})
    judge = SimpleNamespace(features=SimpleNamespace(dim=dim), selection=facts, final=facts)
    return neon.verdicts.warnings_of(
        config(Path("."), **options), candidates, rows, had_grid, judge
    )


def gain(difference, half=0.2):
    return {"difference": difference, "low": difference - half, "high": difference + half}


# -------------------- the report


def written(tmp_path, capsys, **changes):
    """Report of a study of prescribed scores -> entry, table.md, summary.json."""
    entry, _ = study_of(bowl, grid=(0.5, 1.0, 1.5), final_repeats=2)
    entry = dataclasses.replace(entry, **changes)
    summary = {
        "score": "FD",
        "snapshots": [entry.as_json()],
        "floors": [{"images": 50, "fd": 0.125}],
        "judges": ["own"],
        "reference": {"images": 10_000, "origin": "nowhere"},
        "config": {"out": Path("x")},
    }
    neon.report.write_report(summary, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    return entry, text, json.loads((tmp_path / "summary.json").read_text())


def cells(text, name):
    (line,) = [line for line in text.splitlines() if f"| {name} |" in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_has_a_row_for_every_model(tmp_path, capsys):
    entry, text, _ = written(tmp_path, capsys)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(entry.models)
    assert rows[0].count("|") == rows[1].count("|") == rows[-1].count("|") == 11


def test_row_of_a_model(tmp_path, capsys):
    _, text, _ = written(tmp_path, capsys)
    found = cells(text, "blockwise")
    assert found[:4] == ["1", "blockwise", "enc 1, mid 0.5, dec 1.5", "1.0000"]
    assert found[4] == "1.0000 +- 0.0000"
    assert found[5:7] == ["-3.5000 [-3.5000, -3.5000]", "better"]


def test_row_shows_selection_and_final_distances(tmp_path, capsys):
    final = {
        "base": {"w": weights(0, 0, 0), "fd": 7.5, "std": None, "precision": 0.25, "recall": 1}
    }
    models = {"base": neon.study.Candidate(weights(0, 0, 0), 6.5, None)}
    _, text, _ = written(tmp_path, capsys, final=final, models=models)
    assert cells(text, "base") == [
        "1",
        "base",
        "0",
        "6.5000",
        "7.5000",
        "",
        "",
        "0.250",
        "1.000",
        "",
    ]


def test_notes_of_the_report(tmp_path, capsys):
    placebo = [{"w": BEST, "fd": 1.0, "against_global": gain(-0.5) | {"verdict": "better"}}]
    _, text, _ = written(tmp_path, capsys, warnings=["all is well"], placebo=placebo)
    for note in (
        "Snapshot 1: blockwise against global -0.5000 [-0.5000, -0.5000]: better.",
        "Snapshot 1: random blocks 1 against global -0.5000 [-0.7000, -0.3000]: better.",
        "Warning, snapshot 1: all is well.",
        "Floor: 50 real images, of the selection part, score 0.1250 against the final one.",
        "Reference: nowhere, the same for selection and final comparison (10000 images).",
    ):
        assert note in text.split("\n\n") or note + "\n" in text


@pytest.mark.parametrize(
    "w, text",
    [
        (weights(1.5, 1.5, 1.5), "1.5"),
        (weights(-1, -1, -1), "-1"),
        (weights(0.5, 1, 1.23456), "enc 0.5, mid 1, dec 1.23"),
    ],
    ids=str,
)
def test_text_of_weights(w, text):
    assert neon.report.weights_text(w) == text


@pytest.mark.parametrize(
    "w, text",
    [
        ({"a": 0.5, "b": 1.0, "c": 0.5, "d": 0.5}, "a 0.5, b 1, c 0.5, d 0.5"),
        ({"a": 0.5, "b": 1.0, "c": 0.5, "d": 0.5, "e": 0.5}, "one for each of 5 blocks"),
        (dict.fromkeys("abcdefg", 0.55), "0.55"),
    ],
    ids=["few", "many", "equal"],
)
def test_weights_in_the_title_of_a_picture(w, text):
    assert neon.report.weights_title(w) == text


def test_keys_of_a_snapshot_in_the_summary(tmp_path, capsys):
    entry, _, summary = written(tmp_path, capsys)
    (found,) = summary["snapshots"]
    assert set(found) == {
        *("kimg", "blocks", "grid", "sweep", "base", "collapsed", "global", "blockwise"),
        *("final", "placebo", "warnings", "parts", "judges", "claims"),
    }
    assert found["global"] == {"w": weights(1, 1, 1), "fd": 1.5, "w_global": 1.0}
    assert found["blockwise"] == {"w": BEST, "fd": 1.0}
    assert len(found["grid"]) == 27 and found["grid"][0] == {
        "w": weights(0.5, 0.5, 0.5),
        "fd": 2.25,
        "seconds": 0.5,
        "low": 2.25,
        "high": 2.25,
    }
    assert [row["w_global"] for row in found["sweep"]] == [-1, 0, 0.5, 1, 1.5]
    assert summary["config"] == {"out": "x"}


def test_rows_of_the_summary_hold_precision_and_recall():
    row = score_of(2.0, precision=0.25, recall=0.5, w=BEST)
    entry = neon.study.Entry(1, {}, [], [row], {}, {}, [], [], {}, {}, [])
    assert entry.as_json()["grid"] == [
        {
            **{"w": BEST, "fd": 2.0, "seconds": 0.5, "low": 2.0, "high": 2.0},
            **{"precision": 0.25, "recall": 0.5},
        }
    ]


def test_summary_is_strict_json(tmp_path, capsys):
    def fd(w, seeds):
        return math.inf if w["enc"] == -1 else bowl(w)

    entry, _ = study_of(fd, final_repeats=2)
    neon.report.write_report(
        {
            "score": "FD",
            "snapshots": [entry.as_json()],
            "floors": [],
            "judges": ["own"],
            "reference": {},
        },
        tmp_path,
    )
    text = (tmp_path / "summary.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)["snapshots"][0]
    assert found["collapsed"]["fd"] is None and found["final"]["collapsed"]["all"] == [None, None]


@pytest.mark.parametrize(
    "value, want",
    [
        ({1: (1, 2.5)}, {"1": [1, 2.5]}),
        ([math.nan, -math.inf, True, None], [None, None, True, None]),
        (Path("a"), "a"),
    ],
    ids=str,
)
def test_strict_values(value, want):
    assert neon.report.strict(value) == want


def test_summary_of_a_run(tmp_path, capsys):
    scorer = toy_scorer(tmp_path)
    c = config(tmp_path, final_repeats=2)
    found = neon.report.summarise(
        c, ["--seed", "1"], [], scorer.judges, neon.study.seed_ledger(c), 0.5, CPU, 0.0
    )
    assert found["command"] == "python edm_neon.py --seed 1"
    assert found["first_seeds"]["selection"] == 10_000
    assert found["first_seeds"]["final"] == [50_000, 50_120]
    assert [floor["images"] for floor in found["floors"]] == [100, 120]
    assert found["reference"]["images"] == 400 and found["world"] == 1
    assert found["config"]["final_repeats"] == 2 and found["seconds_per_image"] == 0.5
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["scipy"] == scipy.__version__


def test_summary_names_the_version_of_diffusers_where_it_is_used(tmp_path, monkeypatch):
    def versions():
        ledger = neon.study.seed_ledger(c)
        return neon.report.summarise(c, [], [], scorer.judges, ledger, 0.5, CPU, 0.0)["versions"]

    scorer, c = toy_scorer(tmp_path), config(tmp_path)
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    assert "diffusers" not in versions()
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(__version__="9.9"))
    assert versions()["diffusers"] == "9.9"
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace())
    assert versions()["diffusers"] == "unknown"


def test_summary_without_real_images_has_no_floor(tmp_path):
    scorer = toy_scorer(tmp_path, real=False)
    c = config(tmp_path)
    found = neon.report.summarise(
        c, [], [], scorer.judges, neon.study.seed_ledger(c), 0.5, CPU, 0.0
    )
    assert found["floors"] == []


CIFAR = edm.PRESETS["cifar10"]


# -------------------- training seeds


def as_claim(model, against, own, judges):
    """A claim as it stands in summary.json, from relative differences."""

    def gain(x):
        verdict = "better" if x < 0 else "worse"
        return {"verdict": verdict, "relative_difference": x}

    return {
        "model": model,
        "against": against,
        "own": gain(own),
        "judges": {str(i): gain(x) for i, x in enumerate(judges)},
        "better": [str(i) for i, x in enumerate(judges) if x < -0.1],
        "worse": [str(i) for i, x in enumerate(judges) if x > 0.1],
    }


def summary_with(*claims):
    return {"snapshots": [{"kimg": 5, "claims": list(claims), "final": {}}]}


def test_claims_are_counted_over_seeds_and_judges():
    first = summary_with(as_claim("blockwise", "global", -0.2, [-0.3, 0.2, -0.01]))
    second = summary_with(as_claim("blockwise", "global", 0.1, [-0.3, -0.2, -0.2]))
    (found,) = neon.verdicts.claims_over_seeds([first, second])
    assert found.own_verdicts == ["better", "worse"] and found.own_relative == [-0.2, 0.1]
    assert (found.cases, found.better, found.worse) == (6, 4, 1)
    np.testing.assert_allclose(found.relative, [-0.11 / 3, -0.7 / 3])
    text = found.sentence()
    assert "1 of 2 in its own features (-5.0% +- 21.2%)" in text
    assert "4 of 6 cases" in text and "worse in 1" in text


def test_random_partitions_are_one_claim():
    rows = [as_claim("blockwise", f"random blocks {k}", -0.2, [-0.3]) for k in (1, 2, 12)]
    (found,) = neon.verdicts.claims_over_seeds([summary_with(*rows)])
    assert found.against == "random blocks" and found.cases == 3


def test_the_question_names_every_comparison_that_was_made():
    rows = [("blockwise", "global"), ("searched", "blockwise"), ("global", "base")]
    summary = summary_with(*(as_claim(*pair, -0.2, [-0.3]) for pair in rows))
    over = []
    for found in neon.verdicts.claims_over_seeds([summary]):
        over.append({**vars(found), "sentence": found.sentence()})
    text = neon.report.answer(over, 5, 3)
    assert text.startswith(
        "Snapshot 5, 3 training seeds: blockwise is better than global in 1 of 1"
    )
    assert "searched is better than blockwise" in text and "than base" not in text


def test_every_training_seed_has_its_seeds_and_folder(tmp_path, monkeypatch):
    runs = []

    def study(c, preset, argv, processes, begin):
        runs.append((c.seed, c.out.name, c.out.is_dir()))
        return None

    replace(monkeypatch, "study_all", study)
    replace(monkeypatch, "summarise_seeds", lambda *_: {})
    replace(monkeypatch, "write_seeds", lambda *_: None)
    replace(monkeypatch, "plot_report", lambda *_: None)
    config = neon.config.Config(out=tmp_path, seed=7, training_seeds=3)
    neon.cli.study_seeds(config, CIFAR, [], neon.processes.Processes("cpu"), 0.0)
    # Two seeds each: the base's, and the next one for self-training.
    assert runs == [(7, "seed-0", True), (9, "seed-1", True), (11, "seed-2", True)]


def test_training_seeds_need_a_training(tmp_path):
    config = neon.config.Config(out=tmp_path, aux="x.pkl", training_seeds=2)
    with pytest.raises(neon.files.UserError, match="--aux is trained already"):
        neon.cli.study_seeds(config, CIFAR, [], neon.processes.Processes("cpu"), 0.0)
