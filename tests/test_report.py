"""What adaptive_neon/report.py promises."""

import io
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from edm_helpers import config, toy_judge, weights
from made import FOLDS, JUDGES, SCORE, entry_of, finals_of, score, summary_of, tables

import adaptive_neon as neon

CPU = neon.processes.Processes("cpu")


def numbers(cell):
    """All numbers of a cell, shares too."""
    for sign in "[],%":
        cell = cell.replace(sign, " ")
    found = []
    for word in cell.split():
        try:
            found.append(float(word))
        except ValueError:
            continue
    return found


def written(summary, out):
    """table.md's tables, its text, and summary.json."""
    neon.report.write_tables(summary, out)
    text = (out / "table.md").read_text()
    return tables(text), text, json.loads((out / "summary.json").read_text())


def paired_interval(ours, theirs):
    """Mean corrected difference of two seed sets and its interval, from both kinds of folds."""
    differences, real, generated = [], [], 0.0
    for one, other in zip(ours, theirs, strict=True):
        differences.append(one.corrected - other.corrected)
        real.append(np.subtract(one.real_folds, other.real_folds))
        folds = np.subtract(one.folds, other.folds)
        generated += 19 / 20 * ((folds - folds.mean()) ** 2).sum() / len(ours) ** 2
    shared = np.mean(real, 0)
    shared = 19 / 20 * ((shared - shared.mean()) ** 2).sum()
    freedom = (generated + shared) ** 2 / (generated**2 / (19 * len(ours)) + shared**2 / 19)
    half = scipy.stats.t.ppf(0.975, freedom) * (generated + shared) ** 0.5
    middle = np.mean(differences)
    return np.array([middle, middle - half, middle + half])


def in_a_cell(verdict):
    return {"no significant difference": "not significant"}.get(verdict, verdict)


def claim_in(entry, model, against):
    (found,) = [c for c in entry["claims"] if (c["model"], c["against"]) == (model, against)]
    return found


# -------------------- numbers


@pytest.mark.parametrize(
    "value, text",
    [
        (-1.2345e-5, "-1.234e-05"),
        (0.012345, "+0.01235"),
        (704.33, "+704.3"),
        (1704.33, "+1704"),
        (57123.4, "+57123"),
        (0.0, "+0"),
        (None, "inf"),
    ],
)
def test_numbers_have_significant_digits(value, text):
    assert neon.verdicts.number(value, "+") == text


def test_a_small_difference_is_no_zero(tmp_path):
    ours, theirs = [score(1.0 - 2e-5, [1.0 - 2e-5] * FOLDS)], [score(1.0, [1.0] * FOLDS)]
    final = neon.verdicts.final_comparison({"base": theirs, "global": ours})
    entry = entry_of() | {"final": final}
    (rows, *_), _, _ = written(summary_of(snapshots=[entry]), tmp_path)
    assert rows[1]["against base, % (95%)"] == "-0.00200 [-0.00200, -0.00200]"


@pytest.mark.parametrize(
    "numbers, text",
    [
        ((-20.587, -36.58, -4.592), "-20.6 [-36.6, -4.6]"),
        ((0.0355, -45.18, 45.26), "+0.0 [-45.2, +45.3]"),
        ((5.0, 4.9968, 5.0032), "+5.00000 [+4.99680, +5.00320]"),
        ((2500.4, -1000.0, 6000.8), "+2500 [-1000, +6001]"),
        ((0.0, 0.0, 0.0), "+0.00 [+0.00, +0.00]"),
    ],
    ids=str,
)
def test_half_an_interval_has_three_digits(numbers, text):
    assert neon.report.spread(*numbers, "+") == text


def test_a_share_of_nothing_is_a_difference():
    gain = {"difference": -0.5, "low": -0.75, "high": -0.25, "relative_difference": None}
    assert neon.report.shares(gain) == "-0.5 [-0.75, -0.25] (no %)"


@pytest.mark.parametrize(
    "w, text",
    [
        (weights(1.5, 1.5, 1.5), "1.5"),
        (weights(-1, -1, -1), "-1"),
        (weights(0.5, 1, 1.23456), "enc 0.5, mid 1, dec 1.23"),
        ({"a": 0.5, "b": 1.0, "c": 0.5, "d": 0.5}, "a 0.5, b 1, c 0.5, d 0.5"),
        ({"a": 0.5, "b": 1.0, "c": 0.5, "d": 0.5, "e": 0.5}, "one for each of 5 blocks"),
        (dict.fromkeys("abcdefg", 0.55), "0.55"),
    ],
    ids=str,
)
def test_text_of_weights(w, text):
    assert neon.report.weights_text(w) == text


# -------------------- the table of one training seed


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of two snapshots."""
    return written(summary_of(), tmp_path_factory.mktemp("report"))


def test_every_model_of_every_snapshot_has_a_row(report):
    rows = report[0][0]
    models = [name for name in finals_of()["own"] if not name.startswith("random")]
    found = [(row["snapshot (kimg)"], row["model"]) for row in rows]
    assert found == [(kimg, name) for kimg in ("7", "5") for name in models]


@pytest.mark.parametrize("place", range(10))
def test_cells_of_a_model(report, place):
    """All of them, from the scores."""
    row = report[0][0][place]
    own = finals_of(int(row["snapshot (kimg)"]))["own"]
    scores = own[row["model"]]
    values = [one.fd for one in scores]
    assert row["w"] == neon.report.weights_text(scores[0].w)
    assert numbers(row["selection FD"]) == pytest.approx([values[0] - 2.5], rel=5e-4)
    assert numbers(row["final FD"]) == pytest.approx(
        [np.mean(values), np.std(values, ddof=1)], rel=5e-4
    )
    assert float(row["precision"]) == pytest.approx(
        np.mean([s.precision for s in scores]), abs=6e-4
    )
    assert float(row["recall"]) == pytest.approx(np.mean([s.recall for s in scores]), abs=6e-4)
    kernel, low, high = numbers(row["kernel distance (95%)"])
    assert kernel == pytest.approx(np.mean([s.kernel for s in scores]), rel=0.05)
    assert low < kernel < high
    assert numbers(row["corrected"]) == pytest.approx(
        [np.mean([s.corrected for s in scores])], rel=5e-4
    )
    if row["model"] == "base":
        assert row["against base, % (95%)"] == row["verdict"] == ""
        return
    expected = paired_interval(scores, own["base"])
    expected *= 100 / np.mean([one.corrected for one in own["base"]])
    assert numbers(row["against base, % (95%)"]) == pytest.approx(list(expected), abs=5e-3)
    assert row["verdict"] == ("worse" if row["model"] == "collapsed" else "better")


@pytest.mark.parametrize("snapshot, kimg", [(0, 7), (1, 5)])
@pytest.mark.parametrize("place, judge", [(0, "b"), (1, "a")])
def test_cells_of_a_judge(report, snapshot, kimg, place, judge):
    row = report[0][1 + snapshot][place]
    scores = finals_of(kimg)[judge]
    assert row["judge"] == f"FD ({judge})"
    for name in ("base", "collapsed", "global", "blockwise", "searched"):
        mean = np.mean([one.fd for one in scores[name]])
        assert numbers(row[name]) == pytest.approx([mean], rel=5e-4)
    for model, against in (("global", "base"), ("blockwise", "global"), ("searched", "global")):
        shares = paired_interval(scores[model], scores[against])
        shares *= 100 / np.mean([one.corrected for one in scores[against]])
        cell = row[f"{model} against {against}, % (95%)"]
        assert numbers(cell) == pytest.approx(list(shares), abs=6e-3)
        claim = claim_in(summary_of()["snapshots"][snapshot], model, against)
        assert cell.endswith(f"] {in_a_cell(claim['judges'][judge]['verdict'])}")


def test_parts_of_the_selection_are_no_judges(tmp_path):
    entry = entry_of()
    entry["parts"], entry["judges"] = {"a": entry["judges"]["a"]}, {}
    found, text, _ = written(summary_of(snapshots=[entry]), tmp_path)
    assert "Judges that no selection saw" not in text
    assert "Parts of the selection's features, snapshot 5:" in text
    (row,) = found[1]
    assert row["judge"] == "FD (a)"
    assert row["searched against global, % (95%)"].endswith("]")  # and no verdict


def test_notes_name_floor_reference_and_warnings(report):
    _, text, _ = report
    assert "Warning, snapshot 7: mind the 7." in text and "mind the 5" in text
    assert "Floor: 50 real images" in text and "score 0.01235" in text
    assert "nowhere, the same for selection and final comparison (10000 images)" in text
    assert "The winner was chosen by the noise of the same reference" in text


def test_two_references_have_no_noise_in_common(tmp_path):
    reference = {"images": 9, "origin": "nowhere", "selection": {"images": 9}}
    _, text, _ = written(summary_of(reference=reference), tmp_path)
    assert "noise of the same reference" not in text


def test_claims_are_said_and_the_primary_one_first(report):
    for entry in summary_of()["snapshots"]:
        said = [
            line for line in report[1].split("\n") if line.startswith(f"Snapshot {entry['kimg']}")
        ]
        claims = [claim for claim in entry["claims"] if claim["model"] != "collapsed"]
        wanted = {f"Snapshot {entry['kimg']}: {claim['sentence']}." for claim in claims}
        assert set(said) == wanted and len(said) == len(claims)
        assert "primary claim, named before the run: searched against global: better" in said[0]


@pytest.mark.parametrize("judges, said", [(["own"], True), (JUDGES, False)])
def test_a_report_without_judges_says_so(tmp_path, judges, said):
    _, text, _ = written(summary_of(judges=list(judges)), tmp_path)
    assert ("--judge adds others" in text) == said


# -------------------- summary.json


def test_summary_is_strict_json(tmp_path):
    finals = finals_of()
    for scores in finals.values():
        scores["collapsed"] = [score(math.inf), score(math.inf)]
    summary = summary_of(snapshots=[entry_of(finals=finals)])
    (rows, *_), _, found = written(summary, tmp_path)
    assert found["snapshots"][0]["final"]["collapsed"]["all"] == [None, None]
    assert rows[1]["final FD"].startswith("inf") and rows[1]["verdict"] == "worse"
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "value, want",
    [
        ({1: (1, 2.5)}, {"1": [1, 2.5]}),
        ([math.nan, -math.inf, True, None], [None, None, True, None]),
        (io, str(io)),
    ],
    ids=["dict", "numbers", "object"],
)
def test_strict_values(value, want):
    assert neon.report.strict(value) == want


def summarised(out, real=True, argv=(), entries=(), **options):
    """summarise() of a run with a judge of toys."""
    judges = [toy_judge(out, real)]
    setup = SimpleNamespace(first_seeds=lambda: {"final": [50_000]})
    c = config(out, **options)
    results = neon.study.Results(judges, [*entries], {}, {"grid": 2.5})
    return neon.report.summarise(c, [*argv], results, setup, 0.5, CPU, 0.0)


def test_summary_of_a_run(tmp_path):
    argv = ["--primary", "global against base"]
    found = summarised(tmp_path, argv=argv, final_repeats=2)
    assert found["command"] == "python edm_neon.py --primary 'global against base'"
    assert found["first_seeds"] == {"final": [50_000]}
    assert [floor["images"] for floor in found["floors"]] == [100, 120]
    assert found["reference"]["images"] == 400 and found["world"] == 1
    assert found["config"]["final_repeats"] == 2 and found["seconds_per_image"] == 0.5
    assert found["seconds"] == {"grid": 2.5}
    assert found["versions"]["torch"] == torch.__version__


def test_summary_names_the_version_of_diffusers_where_it_is_used(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    assert "diffusers" not in summarised(tmp_path)["versions"]
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(__version__="9.9"))
    assert summarised(tmp_path)["versions"]["diffusers"] == "9.9"


def test_summary_without_real_images_has_no_floor(tmp_path):
    assert summarised(tmp_path, real=False)["floors"] == []


# -------------------- several training seeds


@pytest.fixture(scope="module")
def over_seeds(tmp_path_factory):
    """Three seeds, not in order, that do not agree -> summaries, tables, text, summary.json."""
    out = tmp_path_factory.mktemp("seeds")
    shifts = {11: 0.0, 3: 0.4, 7: -0.1}
    summaries = [summary_of(seed=seed, shift=shift) for seed, shift in shifts.items()]
    c = neon.config.Config(out=out, seed=11)
    summary = neon.verdicts.summarise_seeds(c, ["--seed", "11"], summaries, 0.0)
    neon.report.write_seeds_tables(summary, out)
    text = (out / "table.md").read_text()
    return summaries, tables(text), text, json.loads((out / "summary.json").read_text())


def test_every_training_seed_has_its_rows(over_seeds):
    summaries, (rows, _), _, _ = over_seeds
    rows = iter(rows)
    for summary in summaries:
        for entry in summary["snapshots"]:
            for name, result in entry["final"].items():
                row = next(rows)
                assert row["training seed"] == str(summary["config"]["seed"])
                assert row["snapshot (kimg)"] == str(entry["kimg"]) and row["model"] == name
                assert numbers(row[f"final {SCORE}"]) == pytest.approx([result["fd"]], rel=5e-4)
                for other in ("base", "global"):
                    gain = result.get(f"against_{other}")
                    cell = row[f"against {other}, % (95%)"]
                    pair = (name, other)
                    if gain is None:
                        assert cell == ""
                        continue
                    keys = ("relative_difference", "relative_low", "relative_high")
                    ends = [100 * gain[key] for key in keys]
                    assert numbers(cell) == pytest.approx(ends, abs=6e-3)
                    claim = claim_in(entry, *pair)
                    assert cell.endswith(f"] {in_a_cell(claim['own']['verdict'])}")
    assert next(rows, None) is None


def test_summary_over_seeds_points_to_every_seed(over_seeds):
    summaries, _, _, found = over_seeds
    assert found["seeds"] == [
        {"folder": "seed-0", "seed": 11},
        {"folder": "seed-1", "seed": 3},
        {"folder": "seed-2", "seed": 7},
    ]
    assert found["kimg"] == [7, 5] and found["command"] == "python edm_neon.py --seed 11"
    assert [len(finals) for finals in found["final"]] == [2, 2, 2]
    assert found["claims"][1][0] == summaries[1]["snapshots"][0]["claims"]


def t_interval(values):
    interval = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    return [np.mean(values), interval.low, interval.high]


@pytest.mark.parametrize("kimg", [7, 5])
@pytest.mark.parametrize("pair", [("global", "base"), ("searched", "blockwise")], ids=str)
def test_cells_of_a_claim_over_seeds(over_seeds, kimg, pair):
    summaries, (_, rows), _, _ = over_seeds
    (row,) = [
        r for r in rows if (r["snapshot (kimg)"], r["model"], r["against"]) == (str(kimg), *pair)
    ]
    claims = []
    for summary in summaries:
        for entry in summary["snapshots"]:
            for claim in entry["claims"]:
                if entry["kimg"] == kimg and (claim["model"], claim["against"]) == pair:
                    claims.append(claim)
    better = sum(claim["own"]["verdict"] == "better" for claim in claims)
    assert row["own features: better in"] == f"{better} of 3"
    own = [100 * claim["own"]["relative_difference"] for claim in claims]
    assert numbers(row["own features: difference"]) == pytest.approx(t_interval(own), rel=5e-3)
    better = sum(len(claim["better"]) for claim in claims)
    assert row["unseen judges: better in"] == f"{better} of 6 (3 seeds x 2 judges)"
    assert row["unseen judges: worse in"] == str(sum(len(c["worse"]) for c in claims))
    others = []
    for claim in claims:
        shares = [gain["relative_difference"] for gain in claim["judges"].values()]
        others.append(100 * np.mean(shares))
    assert numbers(row["unseen judges: difference"]) == pytest.approx(t_interval(others), rel=5e-3)


def test_the_table_over_seeds_ends_with_what_every_snapshot_comes_to(over_seeds):
    _, _, text, summary = over_seeds
    for kimg, headline in zip((7, 5), summary["headlines"], strict=True):
        assert f"{kimg} kimg: {headline}" in text.split("\n")


# -------------------- the terminal


def terminal(summary, out):
    text = neon.report.write_tables(summary, out)
    lines = text.split("\n")
    assert len(lines) <= 25 - 3 and max(map(len, lines)) <= 100  # 3: of the report's place
    return lines


def test_the_terminal_gets_a_table_and_sentences(tmp_path):
    entry = entry_of()
    lines = terminal(summary_of(snapshots=[entry]), tmp_path)
    assert lines[0] == f"{SCORE}, 100 final images, 2 times; lower is better"
    (rows, *_), _, _ = written(summary_of(snapshots=[entry]), tmp_path)
    for row, line in zip(rows, lines[2:7], strict=True):
        for column in ("model", "final FD", "against base, % (95%)", "verdict"):
            assert row[column] in line
    sentence = claim_in(entry, "searched", "global")["sentence"]
    assert f"{sentence[1:]}." in " ".join(lines[7:])
    assert lines[-1] == "Warning: mind the 5"


def test_several_warnings_are_counted(tmp_path):
    entry = entry_of() | {"warnings": ["one", "two"]}
    assert terminal(summary_of(snapshots=[entry]), tmp_path)[-1] == "2 warnings: see the report."


def test_the_headline_of_a_summary_comes_first(tmp_path):
    entry = entry_of() | {"headline": "It held."}
    assert "It held." in terminal(summary_of(snapshots=[entry]), tmp_path)


HOSTILE = ("x" * 300, "\u202eolleh", "\x1b[2J", "a\nb")


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_and_many_rows_stay_within_the_terminal(tmp_path, name):
    entries = []
    for kimg in range(1, 9):
        entry = entry_of(kimg)
        for model in ("blockwise", "searched"):
            entry["final"][model]["w"] = {name: 0.5, f"{name}2": 1.0}
        entry["warnings"] = [name] * 30
        entry["headline"] = f"{name} and so on. " * 20
        entries.append(entry)
    lines = terminal(summary_of(snapshots=entries, score=f"FD ({name})"), tmp_path)
    assert all(line.isprintable() for line in lines)
    assert any("rows more in table.md" in line for line in lines)


def test_the_terminal_over_seeds(over_seeds, tmp_path):
    summaries, (_, rows), _, _ = over_seeds
    summary = neon.verdicts.summarise_seeds(
        neon.config.Config(out=tmp_path, seed=11), [], summaries, 0.0
    )
    lines = neon.report.write_seeds_tables(summary, tmp_path).split("\n")
    assert len(lines) <= 25 - 3 and max(map(len, lines)) <= 100
    for row, line in zip(rows[:3], lines[2:], strict=False):
        for column in ("model", "against", "own features: difference"):
            assert row[column] in line
    assert f"7 kimg: {summary['headlines'][0][:80]}" in " ".join(lines)


@pytest.mark.parametrize("share, cell", [(0.5123, "51.2"), (None, None)], ids=str)
def test_memorised_share_of_a_model(tmp_path, share, cell):
    entry = entry_of()
    entry["final"]["global"]["memorisation"] = share
    (rows, *_), _, _ = written(summary_of(snapshots=[entry]), tmp_path)
    assert rows[2].get("memorised, %") == cell
