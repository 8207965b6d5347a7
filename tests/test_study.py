"""edm_neon.py: partitions, merging, seeds, stages, the study of a snapshot, and its report."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from edm_helpers import (
    BEST,
    ToyModel,
    ToyNet,
    blend,
    config,
    edm_model,
    network,
    pair,
    real_toys,
    replace,
    score_of,
    toy_distance,
    toy_pair,
    toy_scorer,
    weights,
)

import adaptive_neon as neon
import edm_neon as edm

BLOCKS = ("enc", "mid", "dec")


CPU = neon.processes.Processes("cpu")


# -------------------- merging


def merger_of(base, aux, owners, model=None):
    model = model or ToyModel()
    return neon.blocks.Merger(base, aux, owners, neon.sampling.Sampler(model, base, CPU, 2, 16))


def edm_merger(kind, partition="paper"):
    base, aux = pair(kind)
    model = edm_model()
    owners = neon.blocks.partition_owners(model, base, partition)
    return base, aux, owners, merger_of(base, aux, owners, model)


# -------------------- seeds


def ledger(**options):
    sizes = {"synthetic": 6000, "select_images": 1000, "final_images": 500}
    return neon.study.seed_ledger(neon.config.Config(**sizes | options))


def test_sets_of_seeds():
    found = ledger(final_repeats=3)
    selection, finals = found.selection, found.finals
    assert (selection.first, selection.count, selection.is_final) == (10_000, 1000, False)
    assert [(seeds.first, seeds.count) for seeds in finals] == [
        (50_000, 500),
        (50_500, 500),
        (51_000, 500),
    ]
    assert all(seeds.is_final for seeds in finals)
    assert found.as_json()["selection"] == 10_000
    assert found.as_json()["final"] == [50_000, 50_500, 51_000]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"final_repeats": 7, "final_images": 1234},
        {"synthetic": 10_000, "select_images": 40_000, "final_images": 100_000},
    ],
    ids=str,
)
def test_no_seed_is_in_two_sets(options):
    c = neon.config.Config(
        **{"synthetic": 6000, "select_images": 1000, "final_images": 500} | options
    )
    found = neon.study.seed_ledger(c)
    seeds = [np.arange(c.synthetic), found.selection.seeds, *(s.seeds for s in found.finals)]
    everything = np.concatenate(seeds)
    assert len(np.unique(everything)) == len(everything)


@pytest.mark.parametrize(
    "options, sets",
    [
        ({"synthetic": 10_001}, "synthetic set .* selection set"),
        ({"select_images": 40_001}, "selection set .* final 1 set"),
        ({"final_images": 9_950_001, "search": "gradient"}, "final 1 set .* search set"),
        ({"final_images": 5_000_000, "final_repeats": 2, "search": "gradient"}, "final 2 set"),
    ],
    ids=str,
)
def test_sets_that_overlap_are_refused(options, sets):
    with pytest.raises(
        neon.files.UserError, match=f"seeds of the {sets}" if "synth" in sets else sets
    ):
        ledger(**options)


def test_search_set_counts_only_for_a_search_by_gradient():
    ledger(final_images=9_950_001)
    ledger(final_images=9_950_001, search="cobyqa")


@pytest.mark.parametrize(
    "options, refused",
    [
        ({"final_images": 10**8, "final_repeats": 50}, True),
        ({"final_images": 10**8, "final_repeats": 42}, False),
    ],
    ids=str,
)
def test_more_than_2_to_the_32_seeds_are_refused(options, refused):
    if refused:
        with pytest.raises(neon.files.UserError, match="2\\^32 seeds"):
            ledger(**options)
    else:
        ledger(**options)


def test_papers_protocol_selects_on_seeds_that_were_trained_on(capsys):
    found = ledger(protocol="paper", select_images=2000)
    assert (found.selection.first, found.selection.count) == (0, 2000)
    assert found.finals[0].first == 50_000 and "overlap" in capsys.readouterr().out


def test_disjoint_protocol_announces_nothing(capsys):
    ledger()
    assert capsys.readouterr().out == ""


# -------------------- stages


class Counting(ToyModel):
    """Counts training steps and sampled batches."""

    def __init__(self):
        self.steps = self.batches = 0

    def loss(self, *args):
        self.steps += 1
        return super().loss(*args)

    def sample(self, *args):
        self.batches += 1
        return super().sample(*args)


def base_of(out, model=None, real=None, **options):
    model = model or Counting()
    out.mkdir(exist_ok=True)
    c = config(out, **{"train_base": 0.4} | options)
    return neon.study.get_base(c, model, real or real_toys(), CPU), model


def test_base_is_trained_once(tmp_path):
    first, model = base_of(tmp_path)
    again, idle = base_of(tmp_path)
    assert model.steps == 20 and idle.steps == 0
    assert neon.keys.weights_hash(first) == neon.keys.weights_hash(again)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]  # the state is gone


def test_recipe_of_a_base(tmp_path, monkeypatch):
    """Ramp and half-life are a twentieth of the training."""
    seen = []
    replace(monkeypatch, "train", lambda *args: seen.append(args) or args[6](args[1], 0.4))
    c = {"base_lr": 0.02, "batch": 10, "seed": 7, "train_precision": "bf16"}
    base_of(tmp_path, ToyModel(), **c)
    (args,) = seen
    want = neon.train.Recipe("base", 10, 0.02, 0.02, 0.02, 7, ramp_ratio=0.05, precision="bf16")
    assert args[4] == want and args[5] == [0.4]
    assert torch.equal(args[2], real_toys().training.images)
    assert torch.equal(args[3], real_toys().training.labels)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"base_lr": 0.5},
        {"batch": 10},
        {"train_base": 0.5},
        {"train_precision": "bf16"},
    ],
    ids=str,
)
def test_another_recipe_trains_another_base(tmp_path, options):
    base_of(tmp_path)
    assert base_of(tmp_path, **options)[1].steps > 0


def test_other_images_train_another_base(tmp_path):
    base_of(tmp_path)
    assert base_of(tmp_path, real=real_toys(5))[1].steps > 0


@pytest.mark.parametrize("pick", ["labels", "images"])
def test_real_images_are_their_content(pick):
    real = real_toys().training
    changed = dataclasses.replace(real, **{pick: getattr(real, pick).flip(0)})
    assert changed.identity != real.identity
    assert dataclasses.replace(real, source="elsewhere").identity == real.identity


def test_another_model_trains_another_base(tmp_path):
    base_of(tmp_path)
    other = Counting()
    other.training_identity = "other"
    base_of(tmp_path, other)
    assert other.steps > 0


@pytest.mark.parametrize("options", [{"steps": 3}, {"lr": 0.5}, {"grid": (1.0,)}], ids=str)
def test_base_does_not_depend_on(tmp_path, options):
    base_of(tmp_path)
    assert base_of(tmp_path, **options)[1].steps == 0


def test_base_depends_on_its_seed(tmp_path):
    first, _ = base_of(tmp_path / "a")
    torch.manual_seed(99)
    again, _ = base_of(tmp_path / "b")
    other, _ = base_of(tmp_path / "c", seed=1)
    assert (
        neon.keys.weights_hash(first)
        == neon.keys.weights_hash(again)
        != neon.keys.weights_hash(other)
    )


def test_plan_trains_no_base(tmp_path):
    assert base_of(tmp_path, plan=True)[1].steps == 0 and not [*tmp_path.iterdir()]


def test_plan_of_a_trained_base_uses_it(tmp_path):
    trained, _ = base_of(tmp_path)
    planned, model = base_of(tmp_path, plan=True)
    assert neon.keys.weights_hash(planned) == neon.keys.weights_hash(trained) and model.steps == 0


def test_base_of_a_file(tmp_path):
    base, _ = toy_pair()
    ToyModel().save(base, tmp_path / "base.safetensors", {})
    found, _ = base_of(tmp_path, base=str(tmp_path / "base.safetensors"))
    assert neon.keys.weights_hash(found) == neon.keys.weights_hash(base)


@pytest.mark.parametrize("given", [True, False], ids=["given", "trained here"])
def test_model_is_checked_before_anything_is_trained(tmp_path, given, monkeypatch):
    ToyModel().save(toy_pair()[0], tmp_path / "base.safetensors", {})
    options = {"base": str(tmp_path / "base.safetensors")} if given else {}
    monkeypatch.setattr(
        Counting, "start_check", lambda self, base, c, trained: checks.append((trained, self.steps))
    )
    checks = []
    base_of(tmp_path, **options)
    assert checks[0] == (given, 0)


def test_training_a_base_needs_images(tmp_path):
    with pytest.raises(neon.files.UserError, match="--train-base needs --data"):
        neon.study.get_base(config(tmp_path, train_base=1.0), ToyModel(), None, CPU)


def test_base_that_does_not_fit_the_images_is_refused():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    real = neon.images.RealData(*[neon.images.RealImages(images, None, "images.zip")] * 3, "")
    with pytest.raises(neon.files.UserError, match=r"\(1, 4, 4\).*images.zip are \(3, 4, 4\)"):
        neon.study.check_model(config(Path(".")), ToyModel(), ToyNet(), real)
    neon.study.check_model(config(Path(".")), ToyModel(), ToyNet(), real_toys())
    neon.study.check_model(config(Path(".")), ToyModel(), ToyNet(), None)


def snapshots_of(out, model=None, base=None, **options):
    out.mkdir(exist_ok=True)
    c = config(out, **{"lr": 1e-3, "ramp_kimg": 0.0, "ema_kimg": 0.1} | options)
    model = model or Counting()
    base = base or toy_pair()[0]
    sampler = neon.sampling.Sampler(model, base, CPU, c.steps, c.sample_batch, c.labels)
    return neon.study.get_snapshots(c, model, base, sampler), model


def test_synthetic_set_is_the_bases_at_seeds_from_zero(tmp_path):
    base, model = toy_pair()[0], ToyModel()
    sampler = neon.sampling.Sampler(model, base, CPU, 2, 32)
    images, labels = neon.study.get_synthetic(config(tmp_path), base, tmp_path / "s.zip", sampler)
    want, want_labels = neon.sampling.Sampler(model, base, CPU, 2, 100).images(range(100))
    assert (images.int() - want.int()).abs().max() <= 1 and images.dtype == torch.uint8
    assert torch.equal(labels, want_labels)


def test_unconditional_synthetic_set_has_no_labels(tmp_path):
    base, model = network("uncond"), edm_model()
    sampler = neon.sampling.Sampler(model, base, CPU, 1, 32)
    c = config(tmp_path, synthetic=40)
    images, labels = neon.study.get_synthetic(c, base, tmp_path / "s.zip", sampler)
    assert labels is None and images.shape == (40, 3, 16, 16)


def test_self_training_gives_every_snapshot(tmp_path):
    found, model = snapshots_of(tmp_path, snapshot=(1, 2))
    assert [*found] == [1, 2] and model.steps == 100
    names = [path.name for path in found.values()]
    assert names == ["network-snapshot-000001.safetensors", "network-snapshot-000002.safetensors"]
    ones, twos = (safetensors.torch.load_file(path) for path in found.values())
    base = toy_pair()[0].state_dict()
    drift = [float((s["enc.0.weight"] - base["enc.0.weight"]).norm()) for s in (ones, twos)]
    assert 0 < drift[0] < drift[1]


def test_self_training_is_done_once(tmp_path):
    paths, _ = snapshots_of(tmp_path)
    stamp = paths[1].stat().st_mtime_ns
    again, model = snapshots_of(tmp_path)
    assert again == paths and model.steps == model.batches == 0
    assert paths[1].stat().st_mtime_ns == stamp


def test_recipe_of_the_self_training(tmp_path, monkeypatch):
    seen = []

    def train(*args):
        seen.append(args)
        args[6](args[1], 1)

    replace(monkeypatch, "train", train)
    options = {"batch": 10, "seed": 7, "train_precision": "bf16", "ramp_kimg": 2.0}
    snapshots_of(tmp_path, ToyModel(), **options)
    (args,) = seen
    assert args[4] == neon.train.Recipe("self-training", 10, 1e-3, 2.0, 0.1, 8, precision="bf16")
    assert neon.keys.weights_hash(args[1]) == neon.keys.weights_hash(toy_pair()[0])
    assert args[5] == (1,)
    (path,) = tmp_path.glob("synthetic-*.zip")
    images, labels = neon.images.read_dataset(path)
    assert torch.equal(args[2], images) and torch.equal(args[3], labels)


@pytest.mark.parametrize(
    "options, sets",
    [
        ({"lr": 0.5}, 1),
        ({"seed": 1}, 1),
        ({"batch": 10}, 1),
        ({"ema_kimg": 0.2}, 1),
        ({"ramp_kimg": 0.2}, 1),
        ({"train_precision": "bf16"}, 1),
        ({"synthetic": 90}, 2),
        ({"steps": 3}, 2),
        ({"labels": "random"}, 2),
        ({"precision": "bf16"}, 2),
    ],
    ids=str,
)
def test_another_recipe_trains_again(tmp_path, options, sets):
    before, _ = snapshots_of(tmp_path)
    after, model = snapshots_of(tmp_path, **options)
    assert after[1] != before[1] and model.steps > 0
    assert len([*tmp_path.glob("synthetic-*.zip")]) == sets


def test_another_base_makes_another_synthetic_set(tmp_path):
    snapshots_of(tmp_path)
    snapshots_of(tmp_path, base=toy_pair()[1])
    assert len([*tmp_path.glob("synthetic-*.zip")]) == 2


@pytest.mark.parametrize("name, sets", [("identity", 2), ("training_identity", 1)])
def test_another_model_trains_again(tmp_path, name, sets):
    snapshots_of(tmp_path)
    model = Counting()
    setattr(model, name, "other")
    snapshots_of(tmp_path, model)
    assert model.steps > 0 and len([*tmp_path.glob("synthetic-*.zip")]) == sets


@pytest.mark.parametrize("options", [{"grid": (1.0,)}, {"select_images": 50}], ids=str)
def test_self_training_does_not_depend_on(tmp_path, options):
    before, _ = snapshots_of(tmp_path)
    assert snapshots_of(tmp_path, **options)[0] == before


def test_longer_self_training_goes_on(tmp_path):
    snapshots_of(tmp_path)
    (tmp_path / "whole").mkdir()
    found, model = snapshots_of(tmp_path, snapshot=(1, 2))
    whole, _ = snapshots_of(tmp_path / "whole", snapshot=(1, 2))
    assert model.steps == 50 and model.batches == 0
    assert found[2].read_bytes() == whole[2].read_bytes()


def test_snapshot_that_was_passed_is_refused(tmp_path):
    snapshots_of(tmp_path, snapshot=(2,))
    with pytest.raises(neon.files.UserError, match="already past one of --snapshot 1, 3"):
        snapshots_of(tmp_path, snapshot=(1, 3))


def test_plan_trains_nothing(tmp_path):
    paths, model = snapshots_of(tmp_path, plan=True)
    assert model.steps == model.batches == 0 and not [*tmp_path.iterdir()] and [*paths] == [1]


def test_self_training_improves_on_no_one(tmp_path):
    """Orphans of a killed run are cleared."""
    paths, _ = snapshots_of(tmp_path)
    paths[1].unlink()
    orphan = paths[1].parent / ".part-x"
    orphan.mkdir()
    (paths[1].parent / "training-state.safetensors").unlink()
    snapshots_of(tmp_path)
    assert paths[1].exists() and not orphan.exists()


@pytest.mark.parametrize("snapshots", [(550,), (550, 1051)], ids=str)
def test_given_snapshots(tmp_path, snapshots):
    for kimg in (550, 1051, 1551):
        (tmp_path / f"network-snapshot-{kimg:06d}.pkl").touch()
    c = config(tmp_path, aux=str(tmp_path), snapshot=snapshots)
    want = {kimg: tmp_path / f"network-snapshot-{kimg:06d}.pkl" for kimg in snapshots}
    assert neon.study.get_snapshots(c, None, None, SimpleNamespace(processes=CPU)) == want


def test_given_network(tmp_path):
    (tmp_path / "aux.pkl").touch()
    c = config(tmp_path, aux=str(tmp_path / "aux.pkl"), snapshot=(7,))
    assert neon.study.given_snapshots(c, ToyModel(), CPU) == {7: tmp_path / "aux.pkl"}


def test_given_snapshots_that_are_not_there(tmp_path):
    (tmp_path / "network-snapshot-best.pkl").touch()
    with pytest.raises(neon.files.UserError, match=r"has snapshots \['best'\], not all of"):
        neon.study.given_snapshots(config(tmp_path, aux=str(tmp_path)), ToyModel(), CPU)


# -------------------- the study of one snapshot, on real scores


STUDY = {"grid": (0.5, 1.0), "sweep": (-1.0, 0.5, 2.0), "final_repeats": 2, "placebo": 2}


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    options = {**STUDY, "search": "cobyqa", "evaluations": 12}
    scorer = toy_scorer(out, **options)
    c = config(out, **options)
    return neon.study.study(c, scorer, scorer, ToyModel(), neon.study.seed_ledger(c)), scorer, out


def test_sweep_holds_grid_base_and_collapsed(studied):
    values = [score.w["mid"] for score in studied[0].sweep]
    assert values == [-1.0, 0.0, 0.5, 1.0, 2.0]
    assert all(len(set(score.w.values())) == 1 for score in studied[0].sweep)


def test_grid_holds_every_product(studied):
    grid = [score.w for score in studied[0].grid]
    assert grid == [weights(*v) for v in itertools.product((0.5, 1.0), repeat=3)]


@pytest.mark.parametrize("name", ["base", "collapsed", "global", "blockwise", "searched"])
def test_distances_of_the_models(studied, name):
    entry, scorer, _ = studied
    want = toy_distance(scorer, entry.models[name].w, range(10_000, 10_100))
    assert entry.models[name].fd == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", ["base", "collapsed", "global", "blockwise", "searched"])
def test_final_distances_are_on_every_final_set(studied, name):
    entry, scorer, _ = studied
    want = [
        toy_distance(scorer, entry.models[name].w, range(first, first + 120))
        for first in (50_000, 50_120)
    ]
    final = entry.final[name]
    # A batch may round a pixel to another grey level than an image alone.
    assert final["all"] == pytest.approx(want, rel=1e-3) and final["images"] == 120
    assert final["w"] == entry.models[name].w


def test_blockwise_is_the_best_of_the_grid(studied):
    entry = studied[0]
    assert entry.models["blockwise"].fd == min(score.fd for score in entry.grid)


def test_global_is_the_best_of_the_sweep(studied):
    entry = studied[0]
    candidates = [score for score in entry.sweep if score.w["enc"] != -1]
    assert entry.models["global"].fd == min(score.fd for score in candidates)
    assert entry.models["global"].w == dict.fromkeys(BLOCKS, entry.models["global"].w_global)


def test_selection_and_final_scores_are_in_their_files(studied):
    entry, _, out = studied
    firsts = {
        name: {json.loads(line)["first_seed"] for line in (out / name).read_text().splitlines()}
        for name in ("grid.jsonl", "final.jsonl")
    }
    assert firsts == {"grid.jsonl": {10_000}, "final.jsonl": {50_000, 50_120}}


def test_final_scores_are_of_the_models_alone(studied):
    entry, _, out = studied
    rows = [json.loads(line) for line in (out / "final.jsonl").read_text().splitlines()]
    wanted = [candidate.w for candidate in entry.models.values()]
    wanted += [placebo["w"] for placebo in entry.placebo]
    assert all(row["w"] in wanted for row in rows)


def test_placebo_is_the_best_of_its_random_blocks(studied):
    entry, scorer, _ = studied
    for k, placebo in enumerate(entry.placebo):
        owners = neon.blocks.placebo_owners(scorer.merger, ToyModel(), k)
        random = scorer.with_owners(owners)
        grid = [weights(*v) for v in itertools.product((0.5, 1.0), repeat=3)]
        distances = [
            random.score(w, neon.scores.SeedSet("selection", 10_000, 100)).fd for w in grid
        ]
        assert placebo["fd"] == min(distances)
        assert placebo["w"] == grid[int(np.argmin(distances))]


def test_placebo_is_compared_with_global_on_the_final_seeds(studied):
    entry, scorer, _ = studied
    for k, placebo in enumerate(entry.placebo):
        owners = neon.blocks.placebo_owners(scorer.merger, ToyModel(), k)
        sets = [
            neon.scores.SeedSet("final 1", 50_000, 120),
            neon.scores.SeedSet("final 2", 50_120, 120),
        ]
        ours = [scorer.with_owners(owners).score(placebo["w"], seeds) for seeds in sets]
        theirs = [scorer.score(entry.models["global"].w, seeds) for seeds in sets]
        assert placebo["against_global"] == neon.stats.compare(ours, theirs).as_json()


def test_blocks_of_the_entry(studied):
    entry, scorer, _ = studied
    assert entry.blocks == scorer.merger.table() and entry.kimg == 1


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


def test_collapsed_network_is_no_candidate():
    """Not even when it is the best, and the grid and the sweep hold it."""
    entry, _ = study_of(
        lambda w, seeds: 1.0 + w["enc"], grid=(-1.0, 0.0, 1.0), sweep=(-1.0, 0.5, 2.0)
    )
    assert entry.models["global"].w_global == 0 and entry.models["collapsed"].fd == 0


def test_weights_between_base_and_collapsed_are_candidates():
    entry, _ = study_of(lambda w, seeds: 2.0 + w["enc"], grid=(0.0, 1.0), sweep=(-0.5, 0.5))
    assert entry.models["global"].w_global == -0.5


def test_base_may_be_the_best_global_weight():
    entry, _ = study_of(lambda w, seeds: 1.0 + abs(w["enc"]), grid=(0.5, 1.0))
    assert entry.models["global"].w_global == 0


def test_sweep_may_hold_the_best_global_weight():
    def fd(w, seeds):
        return 1.0 + abs(w["enc"] - 3)

    entry, scorer = study_of(fd, grid=(0.5, 1.0), sweep=(2.0, 3.0))
    assert entry.models["global"] == neon.study.Candidate(weights(3, 3, 3), 1.0, scorer.merger, 3.0)


def test_winners_are_chosen_on_the_selection_seeds():
    """The final seeds would choose otherwise."""

    def fd(w, seeds):
        return bowl(w) if not seeds.is_final else 100 - bowl(w)

    entry, _ = study_of(fd, grid=(0.5, 1.0, 1.5))
    assert entry.models["blockwise"].w == BEST
    assert entry.models["global"].w_global == 1.0
    assert entry.final["blockwise"]["fd"] == 99


def test_every_model_is_scored_on_every_final_set():
    entry, scorer = study_of(bowl, grid=(0.5, 1.0), final_repeats=3)
    firsts = [(w, seeds.first) for w, seeds in scorer.calls if seeds.is_final]
    want = [
        (candidate.w, 50_000 + 120 * repeat)
        for candidate in entry.models.values()
        for repeat in range(3)
    ]
    assert firsts == want


def test_searched_is_the_best_the_search_evaluated(monkeypatch):
    """Even if the grid knows a better one."""
    rows = [score_of(8.0, w=weights(5, 5, 5)), score_of(7.0, w=weights(6, 6, 6))]
    entry, scorer = study_of(
        bowl, monkeypatch, lambda *args: rows, search="cobyqa", grid=(0.5, 1.0)
    )
    assert entry.models["searched"] == neon.study.Candidate(weights(6, 6, 6), 7.0, scorer.merger)
    assert entry.models["blockwise"].fd < 7


@pytest.mark.parametrize("name", ["cobyqa", "coordinate", "gradient"])
def test_search_starts_at_the_best_global_weight(monkeypatch, name):
    asked = []

    def search(c, scorer, seeds, start):
        asked.append((seeds.purpose, seeds.first, seeds.count, start))
        return [score_of(7.0)]

    study_of(bowl, monkeypatch, search, search=name, grid=(0.25, 1.75, 2.5))
    assert asked == [("selection", 10_000, 100, 0.25)]


def test_what_a_search_finds_is_never_called_blockwise(monkeypatch):
    """A grid of 125 points is left to the search."""
    grid = (0.0, 0.5, 1.0, 1.5, 2.0)
    entry, _ = study_of(
        bowl, monkeypatch, lambda *args: [score_of(0.5, w=BEST)], search="gradient", grid=grid
    )
    assert [*entry.models] == ["base", "collapsed", "global", "searched"] and entry.grid == []
    assert [*entry.final] == [*entry.models]


def test_every_placebo_has_blocks_of_its_own(monkeypatch):
    """Seeds 0, 1, ...; each goes through the same grid, and its best to the final seeds."""
    drawn, random = [], []

    def with_owners(self, owners):
        random.append(Prescribed(self.fd))
        return random[-1]

    replace(monkeypatch, "placebo_owners", lambda merger, model, k: drawn.append(k))
    monkeypatch.setattr(Prescribed, "with_owners", with_owners, raising=False)
    entry, scorer = study_of(bowl, grid=(0.5, 1.75), placebo=3, final_repeats=2)
    assert drawn == [0, 1, 2] and len(entry.placebo) == 3
    best = weights(0.5, 0.5, 1.75)
    for cut in random:
        assert [seeds.first for _, seeds in cut.calls] == [10_000] * 8 + [50_000, 50_120]
        assert [w for w, _ in cut.calls[8:]] == [best] * 2
    assert {placebo["fd"] for placebo in entry.placebo} == {bowl(best)}


def test_without_a_search_nothing_is_searched():
    entry, _ = study_of(bowl)
    assert [*entry.models] == ["base", "collapsed", "global", "blockwise"]


def test_base_that_diverges_ends_the_run():
    with pytest.raises(neon.files.UserError, match="base network's images are not finite"):
        study_of(lambda w, seeds: math.inf if w["enc"] == 0 else 1.0)


def test_weights_that_diverge_win_nothing():
    def fd(w, seeds):
        return math.inf if w["enc"] > 0.75 else bowl(w)

    entry, _ = study_of(fd, grid=(0.5, 1.0, 1.5))
    assert entry.models["global"].w_global == 0.5 and entry.models["blockwise"].w["enc"] == 0.5


def test_collapsed_network_that_diverges_is_noted():
    entry, _ = study_of(lambda w, seeds: math.inf if w["enc"] == -1 else bowl(w))
    assert "collapsed: the sampler diverges" in entry.warnings
    assert entry.final["collapsed"]["against_base"]["verdict"] == "worse"


def test_one_block_has_a_grid_too():
    entry, _ = study_of(lambda w, seeds: 1 + w["a"] ** 2, blocks=("a",), grid=(0.5, 1.0))
    assert entry.models["blockwise"].w == {"a": 0.5}


# -------------------- the repaired network


@pytest.mark.parametrize("best", ["base", "global", "blockwise", "searched"])
def test_network_that_is_saved_is_the_best_on_the_selection_seeds(tmp_path, best):
    names = ("base", "global", "blockwise", "searched")
    scorer, model = toy_scorer(tmp_path), ToyModel()
    models = {
        name: neon.study.Candidate(
            weights(i, i + 1, i), 1.0 if name == best else 2.0, scorer.merger
        )
        for i, name in enumerate(names)
    }
    entry = SimpleNamespace(kimg=7, models=models)
    c = config(tmp_path, export_pt=True)
    neon.study.save_merged(c, model, entry, scorer.parents)

    w = models[best].w
    want = blend(*toy_pair(), w, lambda name: name[:3]).state_dict()
    saved = safetensors.torch.load_file(tmp_path / "adaptive-neon-000007.safetensors")
    exported = torch.load(tmp_path / "adaptive-neon-000007.pt", weights_only=True)
    for name, tensor in want.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-6)
        assert torch.equal(exported[name], saved[name])
    recipe = {"model": best, "w": w, "partition": "paper", **scorer.parents}
    assert model.exported == recipe


def test_plain_weights_are_written_on_request_alone(tmp_path):
    scorer = toy_scorer(tmp_path)
    models = {"base": neon.study.Candidate(weights(0, 0, 0), 1.0, scorer.merger)}
    neon.study.save_merged(config(tmp_path), ToyModel(), SimpleNamespace(kimg=7, models=models), {})
    assert not [*tmp_path.glob("*.pt")] and len([*tmp_path.glob("*.safetensors")]) == 1


def test_saved_network_of_edm_is_read_back_with_its_recipe(tmp_path):
    base, aux, owners, merger = edm_merger("ncsnpp")
    entry = SimpleNamespace(kimg=7, models={"blockwise": neon.study.Candidate(BEST, 1.0, merger)})
    neon.study.save_merged(config(tmp_path), edm_model(), entry, {"aux_weights": "abc"})
    path = tmp_path / "adaptive-neon-000007.safetensors"
    want = blend(base, aux, BEST, owners.get).state_dict()
    for name, tensor in edm.load_network(path).state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=1e-6)
    with safetensors.safe_open(path, "pt") as file:
        recipe = json.loads(file.metadata()["config"])["recipe"]
    assert recipe == {"model": "blockwise", "w": BEST, "partition": "paper", "aux_weights": "abc"}


# -------------------- plain data of an entry


def test_keys_of_a_snapshot_in_the_summary():
    entry, _ = study_of(bowl, grid=(0.5, 1.0, 1.5), final_repeats=2)
    found = entry.as_json()
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


def test_rows_of_the_summary_hold_precision_and_recall():
    row = score_of(2.0, precision=0.25, recall=0.5, w=BEST)
    entry = neon.study.Entry(1, {}, [], [row], {}, {}, [], [], {}, {}, [])
    assert entry.as_json()["grid"] == [
        {
            **{"w": BEST, "fd": 2.0, "seconds": 0.5, "low": 2.0, "high": 2.0},
            **{"precision": 0.25, "recall": 0.5},
        }
    ]


# -------------------- training seeds


def test_every_training_seed_has_its_seeds_and_folder(tmp_path, monkeypatch):
    runs = []

    def study(c, preset, argv, processes, begin):
        runs.append((c.seed, c.out.name, c.out.is_dir()))
        return None

    replace(monkeypatch, "study_all", study)
    replace(monkeypatch, "summarise_seeds", lambda *_: {})
    replace(monkeypatch, "write_seeds", lambda *_: None)
    replace(monkeypatch, "plot_report", lambda *_: None)
    c = neon.config.Config(out=tmp_path, seed=7, training_seeds=3)
    neon.cli.study_seeds(c, edm.PRESETS["cifar10"], [], CPU, 0.0)
    # Two seeds each: the base's, and the next one for self-training.
    assert runs == [(7, "seed-0", True), (9, "seed-1", True), (11, "seed-2", True)]


def test_training_seeds_need_a_training(tmp_path):
    c = neon.config.Config(out=tmp_path, aux="x.pkl", training_seeds=2)
    with pytest.raises(neon.files.UserError, match="--aux is trained already"):
        neon.cli.study_seeds(c, edm.PRESETS["cifar10"], [], CPU, 0.0)
