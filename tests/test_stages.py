"""edm_neon.py: whole runs in this process, of a model that answers at once, killed anywhere."""

import contextlib
import json

import pytest
import torch
from edm_helpers import PRESET, ToyModel, blend, lines, replace, toy_preset

import adaptive_neon as neon
import edm_neon as edm

TOY = (
    *("--preset", PRESET, "--train-base", "0.4", "--batch", "20", "--snapshot", "2,1"),
    *("--grid", "0.5,1.0", "--sweep", "-1:2:1", "--synthetic", "100", "--select-images", "100"),
    *("--final-images", "100", "--final-repeats", "2", "--placebo", "1", "--search", "gradient"),
    *("--evaluations", "3", "--judge", "pixels", "--export-pt", "--lr", "0.01", "--augment", "0"),
)


MODELS = ["base", "collapsed", "global", "blockwise", "searched"]


@contextlib.contextmanager
def no_pictures():
    """Figures take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        replace(patch, "drawn", lambda *args: None)
        yield


@pytest.fixture(scope="module")
def toys():
    with toy_preset():
        yield


@pytest.fixture(scope="module")
def toy_run(toys, tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    with no_pictures():
        edm.main([*TOY, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def toy_entries(toy_run):
    return json.loads((toy_run / "summary.json").read_text())["snapshots"]


@pytest.mark.parametrize(
    "options, labels",
    [((), "balanced"), (("--labels", "random"), "random"), (("--protocol", "paper"), "random")],
    ids=["default", "random", "paper"],
)
def test_labels_of_a_run(toys, tmp_path, monkeypatch, options, labels):
    def stop(setup, net, sampler):
        raise neon.files.UserError(f"labels are {sampler.labels}")

    replace(monkeypatch, "experiment", stop)
    with pytest.raises(neon.files.UserError, match=f"labels are {labels}"):
        neon.cli.run([*TOY, "--out", str(tmp_path), *options], edm.PRESETS, edm.__doc__)


@pytest.fixture(scope="module")
def joint(toys, tmp_path_factory):
    """The same run, selected in two feature networks at once, of one snapshot."""
    out = tmp_path_factory.mktemp("joint")
    with no_pictures():
        selected = ("--select-with", "pixels", "--judge", "random-conv", "--snapshot", "1")
        edm.main([*TOY, *selected, "--out", str(out)])
    return out


def test_selection_in_joint_features(joint):
    """Grid, search, placebo and final comparison see the joint features; their parts see the final
    images, but no claim counts them."""
    summary = json.loads((joint / "summary.json").read_text())
    assert summary["score"].startswith("FD (toy-6+pixels, ")
    assert summary["judges"] == ["toy-6+pixels", "random-conv"]
    for entry in summary["snapshots"]:
        assert [*entry["parts"]] == ["toy-6", "pixels"]
        assert [*entry["judges"]] == ["random-conv"]
        assert all([*claim["judges"]] == ["random-conv"] for claim in entry["claims"])
    assert {row["judge"] for row in lines(joint / "grid.jsonl")} == {"toy-6+pixels"}
    judges = {row["judge"] for row in lines(joint / "final.jsonl")}
    assert judges == {"toy-6+pixels", "toy-6", "pixels", "random-conv"}


def test_tables_of_judges_have_the_models_and_no_random_blocks(joint):
    heads = [row for row in (joint / "table.md").read_text().split("\n") if "| judge |" in row]
    models = " | ".join([*MODELS, "base, twice the steps", "guided", "global against base"])
    assert len(heads) == 2 and all(row.startswith(f"| judge | {models}") for row in heads)


def test_part_of_joint_features_is_measured_as_if_alone(joint, toy_run):
    """Base and collapsed network, which no selection chooses, are as far as in the other run."""
    found, alone = (json.loads((out / "summary.json").read_text()) for out in (joint, toy_run))
    (entry,), other = found["snapshots"], alone["snapshots"][0]
    expected = {"toy-6": other["final"], "pixels": other["judges"]["pixels"]["final"]}
    for part, final in expected.items():
        for model, key in (("base", "all"), ("collapsed", "all"), ("collapsed", "against_base")):
            assert entry["parts"][part]["final"][model][key] == final[model][key]


def test_snapshots_are_studied_in_increasing_order(toy_entries):
    assert [entry["kimg"] for entry in toy_entries] == [1, 2]


def test_every_snapshot_has_its_own_networks(toy_entries):
    first, second = toy_entries
    assert first["base"] == second["base"] and first["collapsed"]["fd"] != second["collapsed"]["fd"]
    for block in ("enc", "mid", "dec"):
        assert first["blocks"][block]["drift"] < second["blocks"][block]["drift"]


@pytest.mark.parametrize("kimg", [1, 2])
def test_repaired_network_of_a_snapshot(toy_run, toy_entries, kimg):
    """The best on the selection seeds, from the base and this snapshot."""
    entry = toy_entries[kimg - 1]
    best = min(MODELS, key=lambda name: entry[name]["fd"])
    (base,) = toy_run.glob("base-*.safetensors")
    (aux,) = toy_run.glob(f"self-*/network-snapshot-{kimg:06d}.safetensors")
    nets = [ToyModel().load(path) for path in (base, aux)]
    want = blend(*nets, entry[best]["w"], lambda name: name[:3]).state_dict()
    found = ToyModel().load(toy_run / f"adaptive-neon-{kimg:06d}.safetensors").state_dict()
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_pictures_of_every_snapshot(toy_run):
    text = (toy_run / "report.html").read_text()
    for number in ("1", "2"):
        assert text.count(f'name="view-{number}"') == 1 + len(MODELS)
    assert text.count('<img src="data:image/png;base64,') == 2 * len(MODELS)


def test_search_and_its_seconds_are_in_the_summary(toy_run, toy_entries):
    for entry in toy_entries:
        tried = [(row["w"], row["fd"]) for row in entry["search"]]
        assert tried[0][0] == dict.fromkeys(entry["blocks"], entry["global"]["w_global"])
        assert (entry["searched"]["w"], entry["searched"]["fd"]) in tried
    seconds = json.loads((toy_run / "summary.json").read_text())["seconds"]
    assert {"base", "global weights", "grid", "search", "final comparison"} <= set(seconds)


def test_toy_run_again_takes_no_score(toy_run, monkeypatch):
    monkeypatch.setattr(neon.scores.Scorer, "features", pytest.fail)
    replace(monkeypatch, "distance_and_gradient", pytest.fail)
    replace(monkeypatch, "train", pytest.fail)
    with no_pictures():
        edm.main([*TOY, "--out", str(toy_run)])


STAGES = [
    (ToyModel, "loss", 10, "training the base"),
    (None, "synthetic_set", 0, "before the synthetic set"),
    (None, "write_dataset", 0, "synthetic set"),
    (ToyModel, "loss", 60, "self-training"),
    (neon.scores.ScoreLog, "add", 3, "sweep"),
    (neon.scores.ScoreLog, "add", 8, "grid"),
    (None, "distance_and_gradient", 1, "search, gradient"),
    (neon.scores.ScoreLog, "add", 2, "search, score"),
    (neon.scores.ScoreLog, "add", 5, "final scores"),
    (None, "compare", 2, "final comparison"),
    (None, "guided", 1, "controls"),
    (None, "export_best", 1, "repaired network"),
    (None, "write_report", 0, "report"),
    (None, "drawn", 3, "figures"),
]


def used(owner, name):
    """The function of a class, or of the module of the engine that defines it."""
    if owner is not None:
        return getattr(owner, name)
    modules = [module for module in vars(neon).values() if hasattr(module, name)]
    return getattr(modules[0], name)


@pytest.fixture(scope="module")
def killed(toys, tmp_path_factory):
    """A run that is killed in every stage, and started again each time."""
    out = tmp_path_factory.mktemp("killed")
    codes = {}
    for owner, name, calls, stage in STAGES:
        real, left = used(owner, name), iter(range(calls))

        def dying(*args, real=real, left=left, **options):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*args, **options)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            if owner is None:
                replace(patch, name, dying)
            else:
                patch.setattr(owner, name, dying)
            edm.main([*TOY, "--out", str(out)])
        codes[stage] = stop.value.code
    with no_pictures():
        edm.main([*TOY, "--out", str(out)])
    return out, codes


@pytest.mark.parametrize("stage", [stage for *_, stage in STAGES])
def test_killed_run_ends_with_code_130(killed, stage):
    assert killed[1][stage] == 130


def test_killed_run_ends_with_the_same_files(killed, toy_run):
    ours, theirs = (
        {path.relative_to(out) for path in out.rglob("*.*")} for out in (killed[0], toy_run)
    )
    assert ours == theirs


def test_killed_run_ends_with_the_same_bytes(killed, toy_run):
    same = [
        path.relative_to(toy_run)
        for path in toy_run.rglob("*.*")
        if path.suffix in (".safetensors", ".zip", ".npz", ".pt", ".md")
        or path.name.startswith("search-")
    ]
    assert len(same) >= 9
    for path in same:
        assert (killed[0] / path).read_bytes() == (toy_run / path).read_bytes(), path


@pytest.mark.parametrize("name", ["grid.jsonl", "final.jsonl"])
def test_killed_run_ends_with_the_same_scores(killed, toy_run, name):
    def row_name(row):
        return json.dumps(row, sort_keys=True)

    ours, theirs = (lines(out / name) for out in (killed[0], toy_run))
    assert sorted(ours, key=row_name) == sorted(theirs, key=row_name)


# -------------------- what --base names


@pytest.mark.parametrize(
    "name, is_one",
    [
        ("google/ddpm-cifar10-32", True),
        ("runs/base.pt", False),
        ("network.pkl", False),
        ("a/folder/of/mine", False),
        ("", False),
    ],
)
def test_names_that_are_a_pipeline_on_the_hub(name, is_one):
    """None of them is on the disk."""
    assert neon.folders.is_pipeline(name) is is_one


def test_a_folder_is_a_pipeline_by_its_index(tmp_path):
    assert not neon.folders.is_pipeline(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    assert neon.folders.is_pipeline(str(tmp_path))
