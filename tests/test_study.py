"""adaptive_neon.study: what a study begins with, its training stages, the experiment, and what it
ends with."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from edm_helpers import (
    BEST,
    ToyFeatures,
    ToyModel,
    ToyNet,
    blend,
    config,
    lines,
    network_distance,
    preset,
    real_toys,
    replace,
    score_of,
    toy_pair,
    toy_scorer,
    toy_setup,
    weights,
)

import adaptive_neon as neon

BLOCKS = ("enc", "mid", "dec")
MODELS = ["base", "collapsed", "global", "blockwise", "searched"]
CONTROLS = ["base, twice the steps", "guided"]
CPU = neon.processes.Processes("cpu")


class Counting(ToyModel):
    """Counts training steps and sampled batches; keeps what its files say about their origin."""

    def __init__(self):
        self.steps = self.batches = 0
        self.recipes = []

    def loss(self, *args):
        self.steps += 1
        return super().loss(*args)

    def sample(self, *args):
        self.batches += 1
        return super().sample(*args)

    def save(self, net, path, recipe):
        self.recipes.append(recipe)
        super().save(net, path, recipe)


def named(**identities):
    """A model of other identities."""
    model = Counting()
    vars(model).update(identities)
    return model


def setup_of(out, model=None, real=None, **options):
    """What a toy study with these options begins with."""
    out.mkdir(exist_ok=True)
    setup = toy_setup(out, **options)
    return dataclasses.replace(setup, model=model or Counting(), real=real or setup.real)


def sampler_of(setup, net):
    c = setup.c
    return neon.sampling.Sampler(setup.model, net, c.steps, c.sample_batch, c.labels)


# -------------------- what a study begins with


def prepared(out, monkeypatch, real=True, **options):
    replace(monkeypatch, "open_model", lambda *args: ToyModel())
    own = SimpleNamespace(real_images=lambda c: real_toys() if real else None)
    return neon.stages.prepare(config(out, **options), own, CPU)


def test_seeds_are_those_of_the_options(tmp_path, monkeypatch):
    sizes = {"select_images": 70, "final_images": 60, "final_repeats": 2, "synthetic": 50}
    seeds = prepared(tmp_path, monkeypatch, **sizes, final_seed=900_000).seeds
    assert (seeds.selection.first, seeds.selection.count) == (10_000, 70)
    assert [(s.first, s.count) for s in seeds.finals] == [(900_000, 60), (900_060, 60)]


@pytest.mark.parametrize(
    "options",
    [{"synthetic": 10_001}, {"final_images": 9_950_001, "search": "gradient"}],
    ids=str,
)
def test_seeds_that_overlap_are_refused(tmp_path, monkeypatch, options):
    with pytest.raises(neon.files.UserError, match="overlap"):
        prepared(tmp_path, monkeypatch, **options)


def test_papers_protocol_says_which_seeds_are_trained_on(tmp_path, monkeypatch, capsys):
    options = {"select_images": 90, "synthetic": 70}
    found = prepared(tmp_path, monkeypatch, protocol="paper", **options)
    assert found.seeds.selection.first == 0 and "first 70 selection" in capsys.readouterr().out


def test_wrong_aux_shows_at_once(tmp_path, monkeypatch):
    with pytest.raises(neon.files.UserError, match="does not exist"):
        prepared(tmp_path, monkeypatch, aux=str(tmp_path / "nowhere.safetensors"))


def test_training_on_needs_real_images(tmp_path, monkeypatch):
    with pytest.raises(neon.files.UserError, match="--continue-on-data .* give --data"):
        prepared(tmp_path, monkeypatch, real=False, continue_on_data=-1.0)


def test_streams_of_drawn_images_are_among_the_first_seeds(tmp_path):
    first = toy_setup(tmp_path, final_repeats=2).first_seeds()
    assert first["real_streams"] == preset.streams and first["selection"] == 10_000
    assert first["final"] == [50_000, 50_120]


def test_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(neon.files.UserError, match="model_index.json"):
        neon.stages.open_model(config(tmp_path, base=str(tmp_path)), preset, CPU)


# -------------------- the first network


def test_base_of_a_file(tmp_path):
    base, _ = toy_pair()
    ToyModel().save(base, tmp_path / "base.safetensors", {})
    net = neon.stages.first_network(setup_of(tmp_path, base=str(tmp_path / "base.safetensors")))
    assert neon.keys.weights_hash(net) == neon.keys.weights_hash(base)


@pytest.mark.parametrize("given", [True, False], ids=["given", "trained here"])
def test_model_is_checked_before_anything_is_trained(tmp_path, given):
    ToyModel().save(toy_pair()[0], tmp_path / "base.safetensors", {})
    options = {"base": str(tmp_path / "base.safetensors")} if given else {"train_base": 0.4}
    setup = setup_of(tmp_path, **options)
    neon.stages.first_network(setup)
    assert setup.model.checked == given and setup.model.steps == 0


def test_untrained_network_depends_on_the_seed_alone(tmp_path):
    hashes = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(hashes))
        net = neon.stages.first_network(setup_of(tmp_path, train_base=0.4, seed=seed))
        hashes.append(neon.keys.weights_hash(net))
    assert hashes[0] == hashes[1] != hashes[2]


def test_training_a_base_needs_images(tmp_path):
    setup = dataclasses.replace(toy_setup(tmp_path, train_base=1.0), real=None)
    with pytest.raises(neon.files.UserError, match="--train-base needs --data"):
        neon.stages.first_network(setup)


def test_model_file_needs_a_base(tmp_path):
    with pytest.raises(neon.files.UserError, match="mine.py needs --base FILE.*--train-base"):
        neon.stages.first_network(toy_setup(tmp_path, model="mine.py"))


def images_of(*shape):
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    return neon.images.RealData(*[neon.images.RealImages(images, None, "images.zip")] * 3, "")


def test_base_that_does_not_fit_the_images_is_refused(tmp_path):
    setup = setup_of(tmp_path, real=images_of(3, 4, 4))
    with pytest.raises(neon.files.UserError, match=r"\(1, 4, 4\).*images.zip are \(3, 4, 4\)"):
        neon.stages.check_model(setup, ToyNet(), True)


# -------------------- the base, where it is trained here


def base_of(out, model=None, **options):
    setup = setup_of(out, model, **{"train_base": 0.4} | options)
    net = neon.stages.first_network(setup)
    return neon.stages.trained_base(setup, net), setup.model


def test_base_is_trained_once(tmp_path):
    first, model = base_of(tmp_path)
    again, idle = base_of(tmp_path)
    assert model.steps == 20 and idle.steps == 0
    assert neon.keys.weights_hash(first) == neon.keys.weights_hash(again)
    (path,) = tmp_path.iterdir()  # and no state to go on from
    assert path.name.startswith("base-") and path.suffix == ".safetensors"


def test_trained_base_is_checked_again(tmp_path):
    setup = setup_of(tmp_path, train_base=0.4)
    neon.stages.trained_base(setup, ToyNet())
    assert setup.model.checked is True


@pytest.fixture
def trainings(monkeypatch):
    """Arguments of every training, which then leaves the network as it was."""
    seen = []

    def train(model, net, images, labels, recipe, snapshots, save, state, processes):
        seen.append(SimpleNamespace(**locals()))
        for kimg in snapshots:
            save(net, kimg)

    replace(monkeypatch, "train", train)
    return seen


def test_recipe_of_a_base(tmp_path, trainings):
    """Ramp and half-life are a twentieth of the training."""
    options = {"base_lr": 0.02, "batch": 10, "seed": 7, "train_precision": "bf16"}
    base_of(tmp_path, ToyModel(), **options)
    (training,) = trainings
    assert training.recipe == neon.train.Recipe(
        name="base",
        batch=10,
        lr=0.02,
        ramp_kimg=0.02,
        ema_kimg=0.02,
        seed=7,
        ramp_ratio=0.05,
        precision="bf16",
    )
    assert training.snapshots == [0.4]


@pytest.mark.parametrize("part", ["images", "labels"])
def test_base_is_trained_on_the_training_part(tmp_path, trainings, part):
    base_of(tmp_path, ToyModel())
    assert torch.equal(getattr(trainings[0], part), getattr(real_toys().training, part))


def base_path(out, net=None, **options):
    setup = setup_of(out, **{"train_base": 0.4} | options)
    return neon.stages.base_path(setup, net or toy_pair()[0])


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"base_lr": 0.5},
        {"batch": 10},
        {"train_base": 0.5},
        {"train_precision": "bf16"},
        {"real": real_toys(5)},
        {"net": toy_pair()[1]},
        {"model": named(training_identity="other")},
    ],
    ids=lambda options: next(iter(options)),
)
def test_another_training_is_another_base(tmp_path, options):
    assert base_path(tmp_path, **options) != base_path(tmp_path)


@pytest.mark.parametrize(
    "options", [{"steps": 3}, {"lr": 0.5}, {"grid": (1.0,)}, {"snapshot": (2,)}], ids=str
)
def test_base_does_not_depend_on(tmp_path, options):
    assert base_path(tmp_path, **options) == base_path(tmp_path)


# -------------------- synthetic set and self-training


def snapshots_of(out, model=None, base=None, **options):
    """{kimg: file} and the model, of a self-training in the folder `out`."""
    setup = setup_of(out, model, **{"lr": 1e-3, "ramp_kimg": 0.0, "ema_kimg": 0.1} | options)
    base = base or toy_pair()[0]
    return neon.stages.self_trained(setup, base, sampler_of(setup, base)), setup.model


def test_synthetic_set_is_the_bases_at_seeds_from_zero(tmp_path):
    setup, base = setup_of(tmp_path, ToyModel(), synthetic=90), toy_pair()[0]
    path = tmp_path / "s.zip"
    images, labels = neon.stages.synthetic_set(setup, sampler_of(setup, base), path)
    want, want_labels = neon.sampling.Sampler(ToyModel(), base, 2, 100).batch_images(range(90))
    assert (images.int() - want.int()).abs().max() <= 1 and images.dtype == torch.uint8
    assert torch.equal(labels, want_labels)


def test_synthetic_set_has_the_precision_of_the_selection(tmp_path, monkeypatch):
    asked = []
    replace(monkeypatch, "network_calls", lambda net, precision: asked.append(precision))
    with pytest.raises(TypeError):  # no context manager
        snapshots_of(tmp_path, precision="bf16", confirm_precision="fp16")
    assert asked == ["bf16"]


def test_self_training_gives_every_snapshot(tmp_path):
    found, model = snapshots_of(tmp_path, snapshot=(1, 2))
    assert [*found] == [1, 2] and model.steps == 100
    names = [path.name for path in found.values()]
    assert names == ["network-snapshot-000001.safetensors", "network-snapshot-000002.safetensors"]
    ones, twos = (safetensors.torch.load_file(path) for path in found.values())
    base = toy_pair()[0].state_dict()
    drift = [float((s["enc.0.weight"] - base["enc.0.weight"]).norm()) for s in (ones, twos)]
    assert 0 < drift[0] < drift[1]
    again, idle = snapshots_of(tmp_path, snapshot=(1, 2))
    assert again == found and idle.steps == idle.batches == 0  # it is done once


def test_recipe_of_the_self_training(tmp_path, trainings):
    """The seed after the base's."""
    options = {"batch": 10, "seed": 7, "train_precision": "bf16", "ramp_kimg": 2.0}
    snapshots_of(tmp_path, ToyModel(), **options)
    assert trainings[0].recipe == neon.train.Recipe(
        name="self-training",
        batch=10,
        lr=1e-3,
        ramp_kimg=2.0,
        ema_kimg=0.1,
        seed=8,
        precision="bf16",
    )


def test_self_training_goes_on_from_the_base_with_its_samples(tmp_path, trainings):
    snapshots_of(tmp_path, ToyModel(), snapshot=(1, 3))
    (training,) = trainings
    (path,) = tmp_path.glob("synthetic-*.zip")
    images, labels = neon.images.read_dataset(path)
    assert torch.equal(training.images, images) and torch.equal(training.labels, labels)
    assert neon.keys.weights_hash(training.net) == neon.keys.weights_hash(toy_pair()[0])
    assert training.snapshots == [1, 3]


def test_snapshots_say_where_they_come_from(tmp_path, trainings):
    _, model = snapshots_of(tmp_path, snapshot=(1, 3))
    (path,) = tmp_path.glob("synthetic-*.zip")
    for recipe, kimg in zip(model.recipes, (1, 3), strict=True):
        assert recipe["kimg"] == kimg and recipe["training"]["seed"] == 1
        assert recipe["base_weights"] == neon.keys.weights_hash(toy_pair()[0])
        assert path.stem == f"synthetic-{recipe['synthetic']}"


def planned(out, base=None, model=None, **options):
    """Path of the snapshot and key of the synthetic set."""
    setup = setup_of(out, model, **options)
    paths, synthetic, _ = neon.stages.self_training(setup, base or toy_pair()[0])
    return paths[1], synthetic


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", 0.5),
        ("seed", 1),
        ("batch", 10),
        ("ema_kimg", 0.2),
        ("ramp_kimg", 0.2),
        ("train_precision", "bf16"),
        ("model", named(training_identity="other")),
    ],
)
def test_another_recipe_trains_again_on_the_same_set(tmp_path, name, value):
    path, synthetic = planned(tmp_path)
    other, same = planned(tmp_path, **{name: value})
    assert other != path and same == synthetic


@pytest.mark.parametrize(
    "name, value",
    [
        ("synthetic", 90),
        ("steps", 3),
        ("labels", "random"),
        ("precision", "bf16"),
        ("device", "cuda"),
        ("base", toy_pair()[1]),
        ("model", named(identity="other")),
    ],
)
def test_another_set_trains_again(tmp_path, name, value):
    path, synthetic = planned(tmp_path)
    other_path, other = planned(tmp_path, **{name: value})
    assert other != synthetic and other_path != path


def test_longer_self_training_goes_on(tmp_path):
    snapshots_of(tmp_path)
    found, model = snapshots_of(tmp_path, snapshot=(1, 2))
    whole, _ = snapshots_of(tmp_path / "whole", snapshot=(1, 2))
    assert model.steps == 50 and model.batches == 0
    assert found[2].read_bytes() == whole[2].read_bytes()


def test_snapshot_that_was_passed_is_refused(tmp_path):
    snapshots_of(tmp_path, snapshot=(2,))
    with pytest.raises(neon.files.UserError, match="already past one of --snapshot 1, 3"):
        snapshots_of(tmp_path, snapshot=(1, 3))


def test_what_a_killed_training_left_is_cleared(tmp_path, trainings):
    paths, _ = snapshots_of(tmp_path)
    paths[1].unlink()
    orphan = paths[1].parent / ".part-x"
    orphan.mkdir()
    snapshots_of(tmp_path)
    assert paths[1].exists() and not orphan.exists()


def test_training_without_memory_names_its_batch(tmp_path):
    class Large(Counting):
        def loss(self, *args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    with pytest.raises(neon.files.UserError, match="out of memory .* --batch 20"):
        snapshots_of(tmp_path, Large())


# -------------------- --aux


@pytest.mark.parametrize("snapshots", [(550,), (550, 1551)], ids=str)
def test_given_snapshots(tmp_path, snapshots):
    for kimg in (1551, 550, 1051):
        (tmp_path / f"network-snapshot-{kimg:06d}.pkl").touch()
    setup = setup_of(tmp_path, aux=str(tmp_path), snapshot=snapshots)
    want = {kimg: tmp_path / f"network-snapshot-{kimg:06d}.pkl" for kimg in snapshots}
    assert neon.stages.self_trained(setup, None, None) == want


def test_given_network(tmp_path):
    (tmp_path / "aux.pkl").touch()
    setup = setup_of(tmp_path, aux=str(tmp_path / "aux.pkl"), snapshot=(7,))
    assert neon.stages.given_snapshots(setup) == {7: tmp_path / "aux.pkl"}


def test_given_snapshots_that_are_not_there(tmp_path):
    (tmp_path / "network-snapshot-best.pkl").touch()
    with pytest.raises(neon.files.UserError, match=r"has snapshots \['best'\], not --snapshot"):
        neon.stages.given_snapshots(setup_of(tmp_path, aux=str(tmp_path)))


def test_one_network_for_several_snapshots_is_refused(tmp_path):
    (tmp_path / "aux.pkl").touch()
    setup = setup_of(tmp_path, aux=str(tmp_path / "aux.pkl"), snapshot=(3, 6))
    with pytest.raises(neon.files.UserError, match=r"one network, --snapshot names 2 \(3, 6\)"):
        neon.stages.given_snapshots(setup)


# -------------------- blocks and the size of the grid


@pytest.mark.parametrize(
    "options, points",
    [
        ({}, 128),
        ({"search": "gradient"}, 0),
        ({"search": "cobyqa"}, 0),
        ({"search": "gradient", "placebo": 1}, 128),
    ],
    ids=str,
)
def test_search_takes_the_place_of_a_large_grid(tmp_path, options, points):
    c = config(tmp_path, grid=(0.5, 1.0), **options)
    assert neon.study.grid_points(c, "abcdefg") == points


@pytest.mark.parametrize(
    "side, options, refused",
    [
        (21, {}, False),
        (22, {}, True),
        (22, {"yes": True}, False),
        (22, {"search": "cobyqa"}, False),
    ],
    ids=str,
)
def test_grid_of_more_than_10_000_points_is_refused(tmp_path, side, options, refused):
    """21^3 = 9,261 and 22^3 = 10,648 points."""
    c = config(tmp_path, grid=tuple(range(side)), **options)
    if refused:
        with pytest.raises(neon.files.UserError, match="10648 points over 3 blocks"):
            neon.study.check_grid(c, BLOCKS)
    else:
        neon.study.check_grid(c, BLOCKS)


@pytest.mark.parametrize("side, said", [(4, ""), (5, "125 points over 3 blocks")])
def test_large_grid_is_remarked_upon(tmp_path, side, said):
    remark = neon.study.check_grid(config(tmp_path, grid=tuple(range(side))), BLOCKS)
    assert said in remark and bool(remark) == bool(said)


def test_grid_of_a_block_that_is_not_there_is_refused(tmp_path):
    c = config(tmp_path, block_grid={"top": (1.0,)})
    with pytest.raises(neon.files.UserError, match="no block top"):
        neon.study.check_grid(c, BLOCKS)


@pytest.mark.parametrize(
    "primary, options",
    [
        ("", {}),
        ("", {"grid": (1.0,), "search": "cobyqa"}),
        ("global against base", {}),
        ("global", {}),
        ("searched against blockwise", {"search": "cobyqa"}),
        ("global against guided", {"controls": ("guided",)}),
        ("blockwise against base, twice the steps", {"controls": ("steps",)}),
        ("global against base, trained on", {"continue_on_data": -1.0}),
        ("blockwise against random blocks 2", {"placebo": 2}),
        ("global against base, best top-k", {"controls": ("own",)}),
        ("global against base, equal adherence", {"controls": ("own",)}),
    ],
)
def test_a_primary_claim_of_this_run(tmp_path, primary, options):
    model = ToyModel()
    model.controls = {"best top-k": [{"top_k": 3}], "guidance": [{"guidance": 2.0}]}
    c = config(tmp_path, primary=primary, **options)
    neon.study.check_primary(c, neon.study.models_of(c, BLOCKS, model))


@pytest.mark.parametrize(
    "primary, options",
    [
        ("searched", {}),
        ("base against global", {}),
        ("globl", {}),
        ("global against guided", {"controls": ("steps",)}),
        ("blockwise against random blocks 2", {"placebo": 1}),
        ("global against base, best top-k", {"controls": ("own",)}),
    ],
)
def test_a_primary_claim_of_no_run_is_refused_with_those_there_are(tmp_path, primary, options):
    c = config(tmp_path, primary=primary, **{"controls": ()} | options)
    with pytest.raises(neon.UserError, match=f"'{primary}' is no claim .*blockwise against global"):
        neon.study.check_primary(c, neon.study.models_of(c, BLOCKS, ToyModel()))


@pytest.mark.parametrize(
    "named, blocks",
    [
        ("paper", ["enc", "mid", "dec"]),
        ({"dec*": "b", "*": "a"}, ["a", "b"]),
        ("layers", "enc.0 enc.1 mid.0 mid.1 dec.0 dec.1 mid_labels mid_unused".split()),
    ],
    ids=["paper", "file", "layers"],
)
def test_names_of_the_blocks(named, blocks):
    found = neon.study.block_names(named, ToyModel(), ToyNet())
    assert sorted(found) == sorted(blocks) and (named == "layers" or found == blocks)


# -------------------- the experiment, on real scores: two snapshots, final sets, placebos, judges

STUDY = {
    "snapshot": (1, 3),
    "grid": (0.5, 1.0),
    "block_grid": {"dec": (0.5, 1.0, 1.75)},
    "sweep": (2.0, -0.5, -1.0),
    "final_repeats": 2,
    "placebo": 2,
    "search": "cobyqa",
    "search_partition": "layers",
    "evaluations": 14,
    "judge": ("pixels", "random-conv"),
}
EVEN = [round(0.5 + 0.5 * k / 13, 4) for k in range(14)]  # as many as the search has evaluations
SWEEP = [-1.0, -0.5, 0.0, *EVEN, 2.0]
GRID = [weights(*v) for v in itertools.product((0.5, 1.0), (0.5, 1.0), (0.5, 1.0, 1.75))]


@pytest.fixture(scope="module", autouse=True)
def toy_features():
    """The preset's features are the toy's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preset, "features", lambda c: ToyFeatures())
        yield


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The base and {kimg: self-trained network}, and a folder of their files."""
    folder = tmp_path_factory.mktemp("networks")
    base, near = toy_pair()
    far = blend(base, near, weights(-2.5, -3, -2), lambda name: name[:3])
    far.offset.fill_(-0.4)
    for kimg, net in ((1, near), (3, far)):
        ToyModel().save(net, folder / f"network-snapshot-{kimg:06d}.safetensors", {})
    return base, {1: near, 3: far}, folder


def experiment(out, networks, **options):
    base, _, folder = networks
    out.mkdir(exist_ok=True)
    setup = toy_setup(out, **{"aux": str(folder)} | options)
    return neon.study.experiment(setup, base, sampler_of(setup, base))


@pytest.fixture(scope="module")
def studied(networks, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    results = experiment(out, networks, **STUDY)
    return {entry["kimg"]: entry for entry in results.entries}, results.judges[0], out, results


def merged(networks, kimg, w, owner_of):
    """The network of these weights, written out."""
    base, auxes, _ = networks
    if set(w.values()) == {-1.0}:
        return auxes[kimg]
    return blend(base, auxes[kimg], w, owner_of)


def owner_in(name):
    """{parameter: block} of a model, as a function."""
    return ToyModel().layer if name == "searched" else (lambda parameter: parameter[:3])


def placebos_of(networks, kimg):
    base, auxes, _ = networks
    merger = neon.blocks.Merger(base, auxes[kimg], lambda name: name[:3])
    return neon.blocks.placebo_partitions(merger, ToyModel().layer, 2)


both = pytest.mark.parametrize("kimg", [1, 3])


@both
def test_sweep_holds_grid_base_and_collapsed(studied, kimg):
    sweep = studied[0][kimg]["sweep"]
    assert [row["w"] for row in sweep] == [weights(w, w, w) for w in SWEEP]


@both
def test_grid_holds_every_product(studied, kimg):
    assert [row["w"] for row in studied[0][kimg]["grid"]] == GRID


@both
@pytest.mark.parametrize("name", MODELS)
def test_distances_of_the_models(studied, networks, name, kimg):
    entries, judge, *_ = studied
    candidate = entries[kimg][name]
    net = merged(networks, kimg, candidate["w"], owner_in(name))
    want = network_distance(net, range(10_000, 10_100), judge.selection)
    assert candidate["fd"] == pytest.approx(want, rel=1e-3)


@both
@pytest.mark.parametrize("name", MODELS)
def test_final_distances_are_on_every_final_set(studied, networks, name, kimg):
    entries, judge, *_ = studied
    entry = entries[kimg]
    net = merged(networks, kimg, entry[name]["w"], owner_in(name))
    firsts = (50_000, 50_120)
    want = [network_distance(net, range(first, first + 120), judge.final) for first in firsts]
    final = entry["final"][name]
    # A batch may round a pixel to another grey level than an image alone.
    assert final["all"] == pytest.approx(want, rel=1e-3) and final["images"] == 120
    assert final["w"] == entry[name]["w"]


@both
def test_search_moves_the_blocks_of_its_own_partition(studied, kimg):
    w = studied[0][kimg]["searched"]["w"]
    assert set(w) == set(neon.study.block_names("layers", ToyModel(), ToyNet()))
    assert len(set(w.values())) > 1


@both
def test_placebo_is_the_best_of_its_random_blocks(studied, networks, kimg):
    entries, judge, *_ = studied
    for owners, placebo in zip(placebos_of(networks, kimg), entries[kimg]["placebo"], strict=True):
        distances = []
        for w in GRID:
            net = merged(networks, kimg, w, owners.__getitem__)
            distances.append(network_distance(net, range(10_000, 10_100), judge.selection))
        assert placebo["fd"] == pytest.approx(min(distances), rel=1e-3)
        assert distances[GRID.index(placebo["w"])] == pytest.approx(min(distances), rel=1e-3)


@both
def test_placebo_is_compared_with_global_on_the_final_seeds(studied, networks, kimg):
    entries, judge, *_ = studied
    entry = entries[kimg]
    for owners, placebo in zip(placebos_of(networks, kimg), entry["placebo"], strict=True):
        net = merged(networks, kimg, placebo["w"], owners.__getitem__)
        firsts = (50_000, 50_120)
        ours = [network_distance(net, range(first, first + 120), judge.final) for first in firsts]
        want = sum(ours) / 2 - entry["final"]["global"]["fd"]
        found = placebo["against_global"]["plain"]
        assert found == pytest.approx(want, abs=1e-3 * sum(ours))


@both
def test_judges_that_no_selection_saw(studied, kimg):
    entry = studied[0][kimg]
    for judge in entry["judges"].values():
        assert [*judge["final"]] == [*MODELS, *CONTROLS, "random blocks 1", "random blocks 2"]
    distances = [judge["final"]["base"]["fd"] for judge in entry["judges"].values()]
    assert len({*distances, entry["final"]["base"]["fd"]}) == 3


@both
def test_controls_are_in_the_final_comparison(studied, networks, kimg):
    """The toy's sampler has no steps: twice as many change nothing but the key."""
    entries, judge, *_ = studied
    final = entries[kimg]["final"]
    assert [*final] == [*MODELS, *CONTROLS]
    assert final["base, twice the steps"]["all"] == final["base"]["all"]
    base, auxes, _ = networks
    net = neon.controls.Guided(base, auxes[kimg])
    net.w.fill_(final["guided"]["w"]["guidance"])
    firsts = (50_000, 50_120)
    want = [network_distance(net, range(first, first + 120), judge.final) for first in firsts]
    assert final["guided"]["all"] == pytest.approx(want, rel=1e-3)


@both
@pytest.mark.parametrize("name", MODELS)
def test_pictures_are_of_the_first_final_seeds(studied, networks, name, kimg):
    entry, samples = studied[0][kimg], studied[3].samples[kimg]
    assert [*samples] == MODELS
    net = merged(networks, kimg, entry[name]["w"], owner_in(name))
    sampler = neon.sampling.Sampler(ToyModel(), net, 1, 100)
    want, _ = sampler.batch_images(range(50_000, 50_032))
    assert (samples[name].int() - want.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "name, firsts", [("grid.jsonl", {10_000}), ("final.jsonl", {50_000, 50_120})]
)
def test_scores_are_in_their_files(studied, name, firsts):
    assert {row["first_seed"] for row in lines(studied[2] / name)} == firsts


def merged_rows(out):
    """Scores on the selection seeds, without those of the guided network."""
    return [row for row in lines(out / "grid.jsonl") if "guidance" not in row["w"]]


@both
def test_one_network_under_several_partitions_is_scored_once(studied, kimg):
    """0.5 everywhere is in the sweep, the grid and both placebos."""
    rows = [row for row in merged_rows(studied[2]) if row["snapshot"] == kimg]
    for w in SWEEP:
        assert sum(set(row["w"].values()) == {w} for row in rows) == 1


def test_only_the_sweep_has_precision_on_the_selection_seeds(studied):
    for row in merged_rows(studied[2]):
        assert (row["precision"] is not None) == (len(set(row["w"].values())) == 1)


def test_only_the_judge_that_decides_has_precision_on_the_final_seeds(studied):
    _, judge, out, _ = studied
    for row in lines(out / "final.jsonl"):
        assert (row["precision"] is not None) == (row["judge"] == judge.name)
        assert row["kernel"] is not None


def test_an_entry_is_plain_data(studied):
    for kimg, entry in studied[0].items():
        assert entry["kimg"] == kimg and json.dumps(entry)
        assert [row["w_global"] for row in entry["sweep"]] == SWEEP
        assert "fd" in entry["guided"] and "fd" not in entry["base, twice the steps"]
        primary = next(claim for claim in entry["claims"] if claim["primary"])
        assert entry["headline"].startswith(f"{primary['model'].capitalize()} against global: ")
        assert entry["strongest_control"] == neon.verdicts.strongest_control(entry["final"])


def test_again_nothing_is_scored(studied, networks, monkeypatch):
    monkeypatch.setattr(neon.scores.Scorer, "features", pytest.fail)
    again = experiment(studied[2], networks, **STUDY).entries
    assert again == [*studied[0].values()]


def test_exchanged_aux_is_scored_anew(networks, tmp_path):
    """The same path, another network: nothing but the base's score stays."""
    base, auxes, _ = networks
    path, found = tmp_path / "aux.safetensors", []
    for net in auxes.values():
        ToyModel().save(net, path, {})
        (entry,) = experiment(tmp_path, networks, aux=str(path), snapshot=(2,)).entries
        judge = network_distance(net, range(10_000, 10_100), toy_scorer(tmp_path).judge.selection)
        assert entry["collapsed"]["fd"] == pytest.approx(judge, rel=1e-3)
        found.append([*(row["fd"] for row in entry["grid"]), entry["guided"]["fd"]])
    same = [ours == theirs for ours, theirs in zip(*found, strict=True)]
    assert same == [True] + [False] * 8  # the grid's first point is the base


# -------------------- the experiment, on prescribed scores


@pytest.fixture
def prescribed(monkeypatch, tmp_path, networks):
    """study(fd, found, **options) -> entry and calls. fd(w, seeds, scorer): the distances; found:
    what a search returns."""

    def study(fd, found=None, **options):
        calls = []

        def scores(scorer, w, seeds, judges, shares=False, desc=None):
            calls.append(SimpleNamespace(w=w, seeds=seeds, owners=scorer.merger.owners))
            distance = fd(w, seeds, scorer)
            return [
                score_of(distance, w=w, images=seeds.count, first_seed=seeds.first) for _ in judges
            ]

        monkeypatch.setattr(neon.scores.Scorer, "scores", scores)
        if found is not None:
            monkeypatch.setitem(neon.search.SEARCHES, options["search"], found)
        (entry,) = experiment(tmp_path, networks, **{"controls": ()} | options).entries
        return entry, calls

    return study


def bowl(w, *_):
    """Least at BEST."""
    return 1.0 + sum((w[block] - BEST[block]) ** 2 for block in BLOCKS)


@pytest.mark.parametrize("race", [False, True])
def test_collapsed_network_is_no_candidate(prescribed, race):
    """Not even when it is the best, and the grid, the race and the sweep hold it."""

    def fd(w, *_):
        return 0.0 if set(w.values()) == {-1.0} else 1.0 + abs(w["enc"])

    entry, _ = prescribed(fd, grid=(-1.0, 0.0, 1.0), sweep=(-1.0, 0.5, 2.0), race=race, placebo=1)
    assert entry["global"]["w_global"] == 0 and entry["collapsed"]["fd"] == 0
    assert entry["blockwise"]["fd"] == 1 and entry["placebo"][0]["fd"] == 1


def test_grid_of_the_collapsed_network_alone_is_refused(tmp_path):
    c = config(tmp_path, grid=(-1.0,), block_grid={"mid": (-1.0, 0.5)})
    assert neon.study.check_grid(c, BLOCKS) == ""
    with pytest.raises(neon.files.UserError, match="holds nothing but the collapsed network"):
        neon.study.check_grid(dataclasses.replace(c, block_grid={}), BLOCKS)


def test_warnings_of_training_and_edges_stand_in_the_entry(prescribed, monkeypatch):
    monkeypatch.setattr(neon.verdicts, "LITTLE", math.inf)
    entry, _ = prescribed(lambda w, *_: 5.0 - w["enc"], sweep=(1.0, 3.0))
    said = " ".join(entry["warnings"])
    assert "hardly moved the network" in said and "w = 3 lies on the edge of all" in said


def test_weights_between_base_and_collapsed_are_candidates(prescribed):
    entry, _ = prescribed(lambda w, *_: 2.0 + w["enc"], grid=(0.0, 1.0), sweep=(-0.5, 0.5))
    assert entry["global"]["w_global"] == -0.5


def test_sweep_may_hold_the_best_global_weight(prescribed):
    entry, _ = prescribed(lambda w, *_: 1 + abs(w["enc"] - 3), grid=(0.5, 1.0), sweep=(2.0, 3.0))
    assert entry["global"] == {"w": weights(3, 3, 3), "fd": 1.0, "w_global": 3.0}


def test_winners_are_chosen_on_the_selection_seeds(prescribed):
    """The final seeds would choose otherwise."""

    def fd(w, seeds, scorer):
        return 100 - bowl(w) if seeds.is_final else bowl(w)

    entry, _ = prescribed(fd, grid=(0.5, 1.0, 1.5))
    assert entry["blockwise"]["w"] == BEST
    assert entry["global"]["w_global"] == 1.0
    assert entry["final"]["blockwise"]["fd"] == 99


def test_every_model_is_scored_on_every_final_set(prescribed):
    entry, calls = prescribed(bowl, grid=(0.5, 1.0), final_repeats=3)
    firsts = [(call.w, call.seeds.first) for call in calls if call.seeds.is_final]
    want = []
    for name in MODELS[:4]:
        want += [(entry[name]["w"], 50_000 + 120 * repeat) for repeat in range(3)]
    assert firsts == want


def test_searched_is_the_best_the_search_evaluated(prescribed):
    """Even if the grid knows a better one."""
    rows = [score_of(8.0, w=weights(5, 5, 5)), score_of(7.0, w=weights(6, 6, 6))]
    entry, _ = prescribed(bowl, lambda *args: rows, search="cobyqa", grid=(0.5, 1.0))
    assert entry["searched"] == {"w": weights(6, 6, 6), "fd": 7.0}
    assert entry["blockwise"]["fd"] < 7


@pytest.mark.parametrize("name", ["cobyqa", "gradient"])
def test_search_starts_at_the_best_global_weight(prescribed, name):
    asked = []

    def search(scorer, start, evaluations, bounds):
        asked.append((start, evaluations, bounds))
        return [score_of(7.0)]

    options = {"evaluations": 9, "bounds": (-0.5, 3.5), "grid": (0.25, 1.75, 2.5)}
    prescribed(lambda w, *_: 1 + abs(w["mid"] - 0.25), search, search=name, **options)
    assert asked == [(0.25, 9, (-0.5, 3.5))]


@pytest.mark.parametrize("own", ["", "layers"], ids=["the same blocks", "layers"])
def test_search_has_its_own_partition(prescribed, own):
    asked = []

    def search(scorer, start, evaluations, bounds):
        asked.append(scorer.merger.owners)
        return [score_of(0.1, w=scorer.merger.weights(1.5))]

    _, calls = prescribed(
        lambda w, *_: 1.0, search, search="gradient", search_partition=own, grid=(0.5, 1.0)
    )
    (owners,) = asked
    owner_of = ToyModel().layer if own else (lambda name: name[:3])
    assert owners == {name: owner_of(name) for name in owners}
    assert calls[-1].owners == owners and calls[-1].seeds.is_final


def test_what_a_search_finds_is_never_called_blockwise(prescribed):
    """A grid of 125 points is left to the search."""
    grid = (0.0, 0.5, 1.0, 1.5, 2.0)
    found = [score_of(0.5, w=BEST)]
    entry, _ = prescribed(bowl, lambda *args: found, search="gradient", grid=grid)
    assert [*entry["final"]] == ["base", "collapsed", "global", "searched"]
    assert entry["grid"] == [] and "blockwise" not in entry


def test_every_placebo_has_blocks_of_its_own(prescribed):
    """Each goes through the same grid, and its own best to the final seeds."""

    def target(scorer):
        """The least is elsewhere in every partition."""
        return {block: 0.5 + (scorer.merger.index.count(k) % 2) for k, block in enumerate(BLOCKS)}

    def fd(w, seeds, scorer):
        return 1.0 + sum((w[block] - target(scorer)[block]) ** 2 for block in BLOCKS)

    entry, calls = prescribed(fd, grid=(0.5, 1.75), placebo=3, final_repeats=2)
    by_owners = {}
    for call in calls:
        by_owners.setdefault(tuple(call.owners.values()), []).append(call)
    own, *dealt = by_owners.values()
    assert len(dealt) == len(entry["placebo"]) == 3
    for mine, placebo in zip(dealt, entry["placebo"], strict=True):
        assert [call.seeds.first for call in mine] == [10_000] * 8 + [50_000, 50_120]
        assert [call.w for call in mine[8:]] == [placebo["w"]] * 2


def test_placebos_end_where_there_are_no_more(prescribed):
    """One layer of eight is a block: seven other choices of it."""
    partition = {"enc.0.*": "one", "*": "rest"}
    entry, calls = prescribed(lambda w, *_: 1.0, partition=partition, placebo=9)
    assert len({tuple(call.owners.values()) for call in calls}) == 1 + 7
    assert len(entry["placebo"]) == 7
    assert any("allow only 7 other blocks" in note for note in entry["warnings"])


def test_base_that_diverges_ends_the_run(prescribed):
    with pytest.raises(neon.files.UserError, match="base network's images are not finite"):
        prescribed(lambda w, *_: math.inf if w["enc"] == 0 else 1.0)


def test_weights_that_diverge_win_nothing(prescribed):
    def fd(w, *_):
        return math.inf if w["enc"] > 0.75 else bowl(w)

    entry, _ = prescribed(fd, grid=(0.5, 1.0, 1.5))
    assert entry["global"]["w_global"] <= 0.75 and entry["blockwise"]["w"]["enc"] == 0.5


def test_judges_come_before_any_training(tmp_path, monkeypatch):
    def no_features(c):
        raise neon.files.UserError("the Inception weights cannot be downloaded")

    replace(monkeypatch, "train", pytest.fail)
    monkeypatch.setattr(preset, "features", no_features)
    setup = setup_of(tmp_path, train_base=0.4)
    net = neon.stages.first_network(setup)
    with pytest.raises(neon.files.UserError, match="Inception weights"):
        neon.study.experiment(setup, net, sampler_of(setup, net))


# -------------------- the repaired network


def models_of(scorer, best, **others):
    """Models of which `best` has the least distance; others: scorers of single models."""
    models = {}
    for i, name in enumerate(("base", "global", "blockwise", "searched")):
        own = others.get(name, scorer)
        w = {block: i + 0.25 * k for k, block in enumerate(own.merger.blocks)}
        models[name] = neon.study.Candidate(w, 1.0 if name == best else 2.0 + i, own)
    return models


@pytest.mark.parametrize("best", ["base", "global", "blockwise", "searched"])
def test_network_that_is_saved_is_the_best_on_the_selection_seeds(tmp_path, best):
    scorer, setup = toy_scorer(tmp_path), setup_of(tmp_path, ToyModel(), export_pt=True)
    models = models_of(scorer, best)
    neon.study.export_best(setup, 7, models)

    w = models[best].w
    want = blend(*toy_pair(), w, lambda name: name[:3]).state_dict()
    saved = safetensors.torch.load_file(tmp_path / "adaptive-neon-000007.safetensors")
    exported = torch.load(tmp_path / "adaptive-neon-000007.pt", weights_only=True)
    for name, tensor in want.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-6)
        assert torch.equal(exported[name], saved[name])
    base, aux = toy_pair()
    assert setup.model.exported == {
        "model": best,
        "w": w,
        "partition": "paper",
        "base_weights": neon.keys.weights_hash(base),
        "aux_weights": neon.keys.weights_hash(aux),
    }


@pytest.mark.parametrize("best", ["blockwise", "searched"])
def test_network_of_the_searchs_own_partition(tmp_path, best):
    scorer = toy_scorer(tmp_path)
    setup = setup_of(tmp_path, ToyModel(), search="cobyqa", search_partition="layers")
    layers = scorer.of(scorer.merger.with_blocks(ToyModel().layer))
    models = models_of(scorer, best, searched=layers)
    neon.study.export_best(setup, 7, models)

    owner_of = owner_in(best)
    want = blend(*toy_pair(), models[best].w, owner_of).state_dict()
    saved = safetensors.torch.load_file(tmp_path / "adaptive-neon-000007.safetensors")
    for name, tensor in want.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-6)
    named = "layers" if best == "searched" else "paper"
    assert setup.model.exported["partition"] == named


def test_plain_weights_are_written_on_request_alone(tmp_path):
    neon.study.export_best(
        setup_of(tmp_path, ToyModel()), 7, models_of(toy_scorer(tmp_path), "global")
    )
    assert not [*tmp_path.glob("*.pt")]
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [
        "adaptive-neon-000007.safetensors"
    ]


# -------------------- time


def test_seconds_of_a_stage_add_up_over_snapshots(monkeypatch):
    times = iter((1.0, 3.0, 3.5, 7.5))
    monkeypatch.setattr(neon.study.time, "perf_counter", lambda: next(times))
    clock = neon.study.Clock()
    for stage in ("sweep", "grid", "sweep"):
        clock.ends(stage)
    assert clock.seconds == {"sweep": 2.0 + 4.0, "grid": 0.5}
