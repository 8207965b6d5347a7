"""adaptive_neon.cli: options, plan, estimate, several training seeds, the process."""

import contextlib
import json
import re
from types import SimpleNamespace

import pytest
import torch
from edm_helpers import (
    PRESET,
    ToyModel,
    ToyNet,
    config,
    parse,
    preset,
    replace,
    toy_network_files,
    toy_preset,
    toy_setup,
)

import adaptive_neon as neon
import edm_neon as edm

BLOCKS = ("enc", "mid", "dec")

# Unequal numbers, and as little of everything as there may be.
TOY = (
    *("--preset", PRESET, "--train-base", "0.2", "--batch", "50", "--lr", "0.01"),
    *("--grid", "0.5,1.0", "--synthetic", "60", "--select-images", "50", "--final-images", "40"),
    *("--judge", "pixels", "--controls", "none", "--snapshot", "1"),
)
GIVEN = ("--train-base", "0", "--base")


@pytest.fixture(scope="module", autouse=True)
def toys():
    with toy_preset():
        yield


# -------------------- what it will cost


@pytest.fixture
def cost_of(tmp_path, monkeypatch):
    """cost(**options) of a toy study, of whose images each takes 3.6 s, after 36 s of
    compilation."""
    monkeypatch.setattr(
        neon.sampling.Sampler, "seconds_per_image", lambda sampler, precision: (3.6, 36.0)
    )

    def cost(world=1, **options):
        setup = toy_setup(tmp_path, **{"controls": ()} | options)
        setup.processes.world = world
        net = ToyNet()
        return neon.cli.Cost.of(setup, net, neon.sampling.Sampler(setup.model, net))

    return cost


@pytest.mark.parametrize(
    "options, scores, finals",
    [
        # A grid of 2^3, and base, collapsed and eight even weights, of which the base is one.
        ({}, 8 + 9, 4),
        ({"sweep": (-1.0, 0.5, 3.0)}, 8 + 11, 4),
        ({"search": "cobyqa", "evaluations": 5}, 8 + 9 + 5, 5),
        ({"search": "gradient", "evaluations": 5}, 8 + 9 + 30, 5),
        ({"placebo": 2}, 24 + 9, 6),
        ({"final_repeats": 3}, 8 + 9, 12),
        ({"controls": ("steps",)}, 8 + 9, 6),
        ({"controls": ("guided",)}, 8 + 9 + 2 * 7, 6),
        ({"continue_on_data": 1.0}, 8 + 9, 5),
        ({"search": "cobyqa", "final_repeats": 3, "placebo": 1, "evaluations": 1}, 26, 18),
    ],
    ids=str,
)
def test_number_of_scores(cost_of, options, scores, finals):
    cost = cost_of(**options)
    assert (cost.scores, cost.finals) == (scores, finals)


@pytest.mark.parametrize(
    "options, images",
    [
        ({}, 17 * 100 + 4 * 120 + 100),
        ({"snapshot": (1, 2, 5)}, 3 * (17 * 100 + 4 * 120) + 100),
        ({"synthetic": 1000, "final_images": 500}, 17 * 100 + 4 * 500 + 1000),
        ({"world": 4}, (17 * 100 + 4 * 120 + 100) / 4),
    ],
    ids=str,
)
def test_hours_of_sampling(cost_of, options, images):
    assert cost_of(**options).sampling_hours == pytest.approx(images / 1000 + 0.01)


def test_hours_grow_with_the_blocks_of_the_partition(cost_of):
    """Eight layers: 256 points, and as many global weights; base and collapsed are two."""
    cost = cost_of(partition="layers")
    assert len(cost.blocks) == 8 and cost.scores == 256 + 257


@pytest.mark.parametrize(
    "hours, options, refused",
    [
        (1.9, {}, False),
        (3.1, {}, True),
        (3.1, {"yes": True}, False),
        (3.1, {"device": "cuda"}, False),
        (1.04, {"training_seeds": 3}, True),
    ],
    ids=str,
)
def test_hours_without_a_gpu_are_refused(tmp_path, hours, options, refused):
    cost = SimpleNamespace(sampling_hours=hours)
    if refused:
        with pytest.raises(neon.files.UserError, match="about 3 hours of sampling .*--yes"):
            neon.cli.refuse_hours(config(tmp_path, **options), cost)
    else:
        neon.cli.refuse_hours(config(tmp_path, **options), cost)


def test_hours_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    replace(monkeypatch, "MAX_HOURS", 0.0)
    replace(monkeypatch, "experiment", pytest.fail)
    with pytest.raises(neon.files.UserError, match="--yes"):
        run(tmp_path)


# -------------------- options


def parsed(tmp_path, *argv):
    return parse(["--preset", PRESET, "--out", str(tmp_path), *argv])


def test_options_are_the_presets_unless_given(tmp_path):
    defaults = edm.PRESETS[PRESET].defaults
    c = parsed(tmp_path, "--lr", "0.5")
    for name, value in (defaults | {"lr": 0.5}).items():
        assert getattr(c, name) == value


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--grid", "1,0.5,1"], "grid", (0.5, 1.0)),
        (["--grid", "-1,0.5"], "grid", (-1.0, 0.5)),
        (["--grid", "1,2", "--grid", "0.5,0"], "grid", (0.0, 0.5)),
        (["--snapshot", "1551,550"], "snapshot", (550, 1551)),
        (["--sweep", "-1:0.5:0.5"], "sweep", (-1.0, -0.5, 0.0, 0.5)),
        (["--sweep", "0:0.3:0.1"], "sweep", (0.0, 0.1, 0.2, 0.3)),
        (["--bounds", "-2,3"], "bounds", (-2.0, 3.0)),
        (["--judge", "mlp", "--judge", "pixels"], "judge", ("mlp", "pixels")),
        (["--select-with", "pixels"], "select_with", ("pixels",)),
        (["--protocol", "paper"], "select_images", 2000),
        (["--protocol", "paper"], "labels", "random"),
        (["--protocol", "paper", "--labels", "balanced"], "labels", "balanced"),
        (["--protocol", "paper", "--select-images", "500"], "select_images", 500),
        (["--precision", "tf32", "--device", "cpu"], "precision", "fp32"),
        (["--precision", "bf16"], "precision", "bf16"),
        (["--race"], "race", True),
        (["--race"], "labels", "balanced"),
        (["--controls", "none"], "controls", ()),
        (["--controls", "guided,steps"], "controls", ("guided", "steps")),
        (["--partition", "layers"], "partition", "layers"),
        (["--search-partition", "layers"], "search_partition", "layers"),
        (["--continue-on-data"], "continue_on_data", -1.0),
        (["--continue-on-data", "3"], "continue_on_data", 3.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_of_options(tmp_path, argv, name, value):
    assert getattr(parsed(tmp_path, *argv), name) == value


@pytest.mark.parametrize("block", BLOCKS)
def test_grid_of_a_block(tmp_path, block):
    c = parsed(tmp_path, "--grid", f"{block}=3,2.5", "--grid", "1,2")
    want = dict.fromkeys(BLOCKS, (1.0, 2.0)) | {block: (2.5, 3.0)}
    assert {name: c.grid_of(name) for name in BLOCKS} == want


def test_grids_of_two_blocks(tmp_path):
    c = parsed(tmp_path, "--grid", "dec=3", "--grid", "enc=-1,0.5")
    assert c.block_grid == {"dec": (3.0,), "enc": (-1.0, 0.5)}
    assert c.grid == edm.PRESETS[PRESET].defaults["grid"]


def test_partition_of_a_file(tmp_path):
    path = tmp_path / "blocks.json"
    path.write_text('{"model.enc.*": "down", "*": "rest"}')
    assert parsed(tmp_path, "--partition", str(path)).partition == {
        "model.enc.*": "down",
        "*": "rest",
    }


def test_given_base_is_not_trained(tmp_path):
    """Though the preset trains one."""
    c = parsed(tmp_path, "--base", "net.pkl")
    assert c.train_base == 0 and c.base == "net.pkl"


def test_preset_trains_its_base(tmp_path):
    assert parsed(tmp_path).train_base == edm.PRESETS[PRESET].defaults["train_base"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--base", "net.pkl", "--train-base", "3"],
        ["--grid", "top=1"],
        ["--bounds", "1"],
        ["--placebo", "2", "--partition", "layers"],
        ["--guidance", "2"],
        ["--guidance", "2", "--model", "mine.py"],
        ["--grid", "enc=1e7"],
    ],
    ids=" ".join,
)
def test_options_that_contradict_each_other(tmp_path, argv):
    with pytest.raises(neon.files.UserError, match=argv[0].strip("-")):
        parsed(tmp_path, *argv)


@pytest.mark.parametrize("name, address", edm.PRESETS["cifar10"].bases.items())
def test_names_of_a_presets_networks(tmp_path, name, address):
    assert parse(["--base", name, "--out", str(tmp_path)]).base == address


def test_first_of_a_presets_networks_is_its_base(tmp_path):
    assert parse(["--out", str(tmp_path)]).base == [*edm.PRESETS["cifar10"].bases.values()][0]


# -------------------- a run


def run(out, *argv):
    neon.cli.run([*TOY, "--out", str(out), *map(str, argv)], edm.PRESETS, edm.__doc__)


def test_large_grid_is_remarked_upon_once(tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        replace(patch, "experiment", stop)
        with pytest.raises(neon.files.UserError, match="stopped here"):
            run(tmp_path, "--grid", "0,0.5,1,1.5,2", "--yes")
    assert capsys.readouterr().out.count("the grid has 125 points") == 1


def stop(*args):
    raise neon.files.UserError("stopped here")


def test_other_ranks_remark_nothing(tmp_path, capsys, monkeypatch):
    other = neon.processes.Processes("cpu", rank=1, world=1)
    replace(monkeypatch, "start_processes", lambda *args: other)
    replace(monkeypatch, "experiment", stop)
    with pytest.raises(neon.files.UserError, match="stopped here"):
        run(tmp_path, "--grid", "0,0.5,1,1.5,2", "--yes")
    assert capsys.readouterr().out == ""


# -------------------- the plan


def test_plan_leaves_nothing(tmp_path, capsys):
    run(tmp_path, "--plan", "--snapshot", "2,1")
    text = capsys.readouterr().out
    assert [*tmp_path.iterdir()] == []
    assert text.count("not trained yet") == 2 * 3 and "hours" in text


def test_plan_of_several_training_seeds_leaves_nothing(tmp_path, capsys):
    run(tmp_path, "--plan", "--training-seeds", "3")
    text = capsys.readouterr().out
    assert [*tmp_path.iterdir()] == []
    assert "this 3 times" in text and text.count("not trained yet") == 3


def test_plan_tells_the_drift_of_what_is_there(tmp_path, capsys):
    base, near, far = toy_network_files(tmp_path)
    merger = neon.blocks.Merger(ToyModel().load(base), ToyModel().load(far), lambda name: name[:3])
    run(tmp_path / "out", *GIVEN, base, "--aux", far, "--plan")
    text = capsys.readouterr().out
    for block, row in merger.table().items():
        (line,) = [line for line in text.splitlines() if line.startswith(block)]
        assert line.split() == [
            block,
            str(row["tensors"]),
            str(row["parameters"]),
            f"{row['drift']:.5f}",
        ]


# -------------------- several training seeds

SEEDS = ("--training-seeds", "3", "--seed", "7", "--snapshot", "2,1", "--final-repeats", "2")
SEARCHED = ("--search", "gradient", "--evaluations", "2", "--search-partition", "layers")


@pytest.fixture(scope="module")
def several(toys, tmp_path_factory):
    """Three training seeds of two snapshots -> folder, summary over the seeds, one for each; no
    figure is drawn."""
    out = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        replace(patch, "drawn", lambda *args: None)
        run(out, *SEEDS, *SEARCHED, "--placebo", "1")
    folders = [out, *(out / f"seed-{k}" for k in range(3))]
    summary, *own = [json.loads((path / "summary.json").read_text()) for path in folders]
    return out, summary, own


def test_every_training_seed_has_a_folder(several):
    out, summary, own = several
    assert summary["seeds"] == [{"folder": f"seed-{k}", "seed": 7 + 2 * k} for k in range(3)]
    assert [one["config"]["seed"] for one in own] == [7, 9, 11]


@pytest.mark.parametrize("k", range(3))
def test_networks_of_a_training_seed_are_those_of_a_run_with_it(several, k):
    """Base and self-trained network."""
    out = several[0] / f"seed-{k}"
    setup = toy_setup(out)
    c = parse([*TOY, "--snapshot", "2,1", "--seed", str(7 + 2 * k), "--out", str(out)])
    setup = neon.stages.Setup(c, preset, ToyModel(), setup.processes, setup.real, setup.seeds)
    path = neon.stages.base_path(setup, neon.stages.first_network(setup))
    assert [*out.glob("base-*")] == [path]
    paths, _, _ = neon.stages.self_training(setup, ToyModel().load(path))
    assert sorted(out.glob("self-*/network-*")) == sorted(paths.values())


def test_search_over_layers_beside_a_grid_over_blocks(several):
    for one in several[2]:
        for entry in one["snapshots"]:
            assert set(entry["blockwise"]["w"]) == set(BLOCKS)
            assert len(entry["searched"]["w"]) == 8


def test_report_over_the_seeds_links_to_those_of_the_seeds(several):
    out = several[0]
    links = re.findall(r'href="([^"]*)"', (out / "report.html").read_text())
    assert links == [f"seed-{k}/report.html" for k in range(3)]
    assert all("view-2" in (out / link).read_text() for link in links)  # of both snapshots


def test_training_seeds_of_given_networks_are_refused(tmp_path):
    with pytest.raises(neon.files.UserError, match="--aux is trained already"):
        run(tmp_path, "--training-seeds", "2", "--aux", "aux.safetensors")


# -------------------- the process


def test_errors_are_one_line(monkeypatch, capsys):
    def ending(*args):
        raise neon.files.UserError("a wrong file")

    replace(monkeypatch, "run", ending)
    with pytest.raises(SystemExit) as stop:
        edm.main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "edm_neon: a wrong file\n"


@pytest.mark.parametrize("fault", [None, NameError])
def test_ranks_part_at_the_end(monkeypatch, fault):
    ended = []

    def ending(argv, presets, doc):
        assert (argv, presets, doc) == (["--plan"], edm.PRESETS, edm.__doc__)
        if fault:
            raise fault

    replace(monkeypatch, "run", ending)
    monkeypatch.setattr(neon.cli.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(neon.cli.dist, "destroy_process_group", lambda: ended.append(True))
    with contextlib.suppress(NameError):
        edm.main(["--plan"])
    assert ended == [True]


def test_measuring_time_changes_no_setting():
    sampler = neon.sampling.Sampler(ToyModel(), ToyNet(), 5, 32)
    threads = torch.get_num_threads()
    assert sampler.seconds_per_image()[0] > 0
    assert torch.get_num_threads() == threads and (sampler.steps, sampler.batch) == (5, 32)
