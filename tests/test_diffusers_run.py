"""edm_neon.py with pipelines of diffusers as --base: whole runs on tiny ones, and what is refused.

The truth of an exported pipeline is the formula on the files, and what diffusers makes of it.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from edm_helpers import TORCHRUN, launch, lines, replace

diffusers = pytest.importorskip("diffusers")

from test_diffusers import autoencoder, dit, edit, make, own_call, unet  # noqa: E402

import adaptive_neon as neon  # noqa: E402
import edm_neon as edm  # noqa: E402

WEIGHTS = "diffusion_pytorch_model.safetensors"
DIT_WEIGHTS = f"transformer/{WEIGHTS}"
SMALL = (
    *("--preset", "glyphs", "--judge", "none", "--snapshot", "1", "--lr", "1e-2", "--steps", "5"),
    *("--grid", "0.5,1.0", "--synthetic", "100", "--select-images", "80", "--final-images", "80"),
)
LATENT = dict(in_channels=2, out_channels=4, sample_size=6)
IMAGES = edm.Glyphs.images
SEARCHED = ("--partition", "layers", "--grid", "0.5", "--search", "gradient", "--evaluations", "2")


# -------------------- tiny pipelines of glyphs, and runs of them in this process
@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """{kind: folder} that make images of 12 x 12, none of them trained."""
    root = tmp_path_factory.mktemp("pipelines")
    grey = dict(in_channels=1, out_channels=1, latent_channels=2, sample_size=12)
    latent_unet = dict(channels=2, size=6)
    make(root / "ddpm", "ddpm", net=unet(channels=1, size=12))
    make(root / "ldm-vq", "ldm-vq", net=unet(**latent_unet), vae=autoencoder("VQModel", **grey))
    transformer = dit(**LATENT)
    make(root / "dit", "dit", net=transformer, vae=autoencoder(**grey))
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """An untrained feature network: what it sees in glyphs does not matter here."""
    folder = tmp_path_factory.mktemp("classifier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neon.glyphs.GlyphsClassifier, "fit", lambda *args: None)
        preset = edm.Glyphs()
        preset.features(neon.config.Config(preset="glyphs", out=folder))
    (path,) = folder.glob("glyphs-cnn-64-*.safetensors")
    return path


@pytest.fixture(scope="module")
def study(classifier):
    """study(out, *options) -> the first snapshot's entry in summary.json."""

    def run(out, *options):
        out.mkdir(exist_ok=True)
        shutil.copy(classifier, out)
        edm.main([*map(str, (*SMALL, *options)), "--out", str(out)])
        return json.loads((out / "summary.json").read_text())["snapshots"][0]

    return run


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Few real images and no figures, which take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        counts = {"training": 100, "selection": 400, "final": 400}
        patch.setattr(edm.Glyphs, "images", counts)
        replace(patch, "drawn", lambda *args: None)
        yield


@pytest.fixture
def refused(classifier, tmp_path, capsys):
    """refused(*options) -> the one line that ends a run with these options."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(classifier, out)

    def run(*options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            edm.main([*map(str, (*SMALL, *options)), "--out", str(out)])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and line.startswith("edm_neon: ")
        return line

    return run


@pytest.fixture(scope="module")
def whole(pipelines, study, tmp_path_factory):
    """A run of the latent transformer: self-training, grid, placebo."""
    out = tmp_path_factory.mktemp("whole") / "run"
    before = contents(pipelines["dit"])
    entry = study(out, "--base", pipelines["dit"], "--placebo", 1, "--race")
    assert contents(pipelines["dit"]) == before, "the base has changed"
    return out, entry


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def snapshot_of(out):
    (path,) = out.glob("self-*/network-snapshot-000001.safetensors")
    return path


# -------------------- whole runs
def test_models_and_blocks_of_a_run(whole):
    _, entry = whole
    assert set(entry["blocks"]) == {"enc", "mid", "dec"} and len(entry["placebo"]) == 1
    assert all(0 < row["drift"] < 1 for row in entry["blocks"].values())
    assert {"base", "collapsed", "global", "blockwise"} <= set(entry["final"])
    assert entry["base"]["fd"] != entry["collapsed"]["fd"] != entry["global"]["fd"]


def test_exported_weights_are_the_formula_and_the_rest_is_the_base(whole, pipelines):
    out, _ = whole
    export, base = out / "adaptive-neon-000001", pipelines["dit"]
    recipe = json.loads((export / "adaptive-neon.json").read_text())
    model = neon.diffusers.DiffusersModel(neon.config.Config(base=str(base), out=out))

    theta_r, merged = (safetensors.torch.load_file(f / DIT_WEIGHTS) for f in (base, export))
    theta_s = safetensors.torch.load_file(snapshot_of(out))
    assert merged.keys() == theta_r.keys()
    for name, r in theta_r.items():
        w = recipe["w"][model.block(name, None, "paper")]
        expected = r.double() - w * (theta_s[name].double() - r.double())
        torch.testing.assert_close(merged[name], expected.float(), atol=1e-6, rtol=1e-5)

    ours, theirs = contents(export), contents(base)
    assert ours.keys() - theirs.keys() == {"adaptive-neon.json"} and theirs.keys() <= ours.keys()
    changed = [name for name in theirs if theirs[name] != ours[name]]
    assert [name for name in changed if not name.endswith(".json")] == [DIT_WEIGHTS]


def test_exported_pipeline_makes_the_images_that_were_scored(whole):
    out, _ = whole
    export = out / "adaptive-neon-000001"
    model = neon.diffusers.DiffusersModel(neon.config.Config(base=str(export), out=out))
    noise = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([0, 4, 9])
    with torch.no_grad():
        ours = model.sample(model.load(export), noise, labels, 5)
    theirs = own_call(export, labels=labels)
    torch.testing.assert_close(ours / 2 + 0.5, theirs, atol=2e-6, rtol=0)


def test_run_again_skips_what_is_there(whole, pipelines, study):
    out, _ = whole
    kept = [*out.glob("synthetic-*"), *out.glob("self-*/*"), *out.glob("*.jsonl")]
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in kept}
    study(out, "--base", pipelines["dit"], "--placebo", 1, "--race")
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in kept}
    assert len(before) >= 4 and after == before
    assert not [*out.glob(".adaptive*")], "a part of an export was left"


@pytest.mark.slow
def test_gradient_over_layers_goes_through_the_autoencoder(whole, pipelines, study, tmp_path):
    out, _ = whole
    options = ("--base", pipelines["dit"], "--aux", snapshot_of(out))
    entry = study(tmp_path / "run", *options, *SEARCHED)
    blocks = [f"transformer_blocks.{i}" for i in range(4)]
    assert set(entry["searched"]["w"]) == {"pos_embed", *blocks, "proj_out_1", "proj_out_2"}
    assert entry["searched"]["fd"] <= entry["global"]["fd"]
    assert len(set(entry["searched"]["w"].values())) > 1, "the search has not left the start"


@pytest.mark.slow
def test_a_model_without_classes(pipelines, study, tmp_path):
    out = tmp_path / "run"
    entry = study(out, "--base", pipelines["ldm-vq"], "--grid", "0.5")
    assert entry["base"]["fd"] != entry["collapsed"]["fd"]
    own_call(out / "adaptive-neon-000001")  # diffusers reads it


@pytest.mark.slow
def test_a_longer_training_goes_on_where_the_shorter_ended(whole, pipelines, study, tmp_path):
    """Two kimg at once, and one more after the first, give the same network."""
    at_once, resumed = tmp_path / "at_once", tmp_path / "resumed"
    shutil.copytree(whole[0], resumed)
    longer = ("--base", pipelines["dit"], "--grid", "0.5", "--snapshot", "2")
    files = []
    for out in (at_once, resumed):
        study(out, *longer)
        (path,) = out.glob("self-*/network-snapshot-000002.safetensors")
        files.append(safetensors.torch.load_file(path))
    for name, tensor in files[0].items():
        assert torch.equal(tensor, files[1][name]), name


@pytest.mark.slow
def test_every_form_of_the_self_trained_network_scores_the_same(whole, pipelines, study, tmp_path):
    """A snapshot of ours, a folder of them, a pipeline, its denoiser's folder."""
    out, entry = whole
    pipeline = tmp_path / "self-trained"
    shutil.copytree(pipelines["dit"], pipeline)
    tensors = safetensors.torch.load_file(snapshot_of(out))
    safetensors.torch.save_file(tensors, pipeline / DIT_WEIGHTS, {"format": "pt"})

    forms = (snapshot_of(out), snapshot_of(out).parent, pipeline, pipeline / "transformer")
    for number, aux in enumerate(forms):
        options = ("--base", pipelines["dit"], "--aux", aux, "--grid", "0.5")
        found = study(tmp_path / str(number), *options)
        assert found["collapsed"]["fd"] == entry["collapsed"]["fd"], aux


@pytest.mark.slow
def test_guidance_is_another_model(whole, pipelines, study, tmp_path):
    """In the same folder, nothing of the run without guidance is taken for one with it."""
    out, entry = tmp_path / "run", whole[1]
    shutil.copytree(whole[0], out)
    guided = study(out, "--base", pipelines["dit"], "--guidance", 3, "--grid", "0.5")
    assert len([*out.glob("self-*")]) == 2 and len([*out.glob("synthetic-*")]) == 2
    assert guided["base"]["fd"] != entry["base"]["fd"]


def test_plan_shows_the_layers_and_writes_nothing(pipelines, tmp_path, capsys):
    options = ("--base", pipelines["dit"], "--partition", "layers", "--grid", "0.5", "--plan")
    edm.main([*map(str, (*SMALL, *options)), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "transformer_blocks.3" in printed and "not trained yet" in printed
    assert "training on 1 kimg" in printed, "the base is there already"
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_two_ranks_are_one_process(pipelines, classifier, study, tmp_path, monkeypatch):
    """Two ranks self-train, encode and search; one process scores their network the same."""
    monkeypatch.setattr(edm.Glyphs, "images", IMAGES)  # as in the processes started here
    base = ("--base", pipelines["dit"], *SEARCHED, "--sample-batch", "40")
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    shutil.copy(classifier, two)
    done = launch(*SMALL, *base, "--out", two, program=TORCHRUN)
    assert done.returncode == 0, done.stderr[-2000:]
    study(one, *base, "--aux", snapshot_of(two))

    rows = [lines(out / "grid.jsonl") for out in (one, two)]
    assert [row["fd"] for row in rows[0]] == pytest.approx([row["fd"] for row in rows[1]], rel=1e-4)
    own_call(two / "adaptive-neon-000001", labels=torch.tensor([1, 2, 3]))


# -------------------- what is refused, in one line
@pytest.fixture
def copied(pipelines, tmp_path):
    shutil.copytree(pipelines["dit"], tmp_path / "pipeline")
    return tmp_path / "pipeline"


def truncate(folder):
    file = folder / DIT_WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def not_finite(folder):
    tensors = safetensors.torch.load_file(folder / DIT_WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    safetensors.torch.save_file(tensors, folder / DIT_WEIGHTS, {"format": "pt"})


def without_weights(folder):
    (folder / DIT_WEIGHTS).unlink()


def without_autoencoder(folder):
    shutil.rmtree(folder / "vae")


def without_index(folder):
    (folder / "model_index.json").unlink()


def other_scheduler(folder):
    names = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    edit(folder / "model_index.json", scheduler=names)


def other_size(folder):
    make(folder, "dit", net=dit(in_channels=2, sample_size=8), vae=autoencoder(latent_channels=2))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (truncate, WEIGHTS),
        (not_finite, "not finite"),
        (without_weights, "no weights"),
        (without_autoencoder, "no weights"),
        (without_index, "folder without model_index.json"),
        (other_scheduler, "FlowMatchEulerDiscreteScheduler is not supported"),
        (other_size, "the base makes images of shape (3, 16, 16)"),
    ],
)
def test_a_bad_folder(copied, refused, spoil, message):
    spoil(copied)
    line = refused("--base", copied)
    assert message in line and str(copied) in line or spoil is other_size


def test_a_self_trained_folder_that_does_not_fit(pipelines, copied, tmp_path, refused):
    base = ("--base", pipelines["dit"], "--aux")
    assert "has no transformer" in refused(*base, pipelines["ddpm"])
    make(copied, "dit", net=dit(**LATENT, num_layers=2), vae=autoencoder())
    assert "num_layers is 2, not 4" in refused(*base, copied)
    assert "no such file" in refused(*base, tmp_path / "none")


def test_a_damaged_snapshot_of_ours(whole, pipelines, tmp_path, refused):
    tensors = safetensors.torch.load_file(snapshot_of(whole[0]))
    note = {"config": json.dumps({"recipe": {}})}
    options = ("--base", pipelines["dit"], "--aux")

    name = next(iter(tensors))
    lacking = {other: tensor for other, tensor in tensors.items() if other != name}
    safetensors.torch.save_file(lacking, tmp_path / "lacking.safetensors", note)
    assert name in refused(*options, tmp_path / "lacking.safetensors")


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("ldm-vq", ("--search", "gradient"), "VQModel quantises"),
        ("ddpm", ("--guidance", "2"), "needs a null class"),
        ("dit", ("--steps", "101"), "allows 1 to 100"),
        ("dit", ("--partition", "structural"), "--partition structural"),
        ("dit", ("--data", "images.zip"), "leave --data"),
    ],
)
def test_options_that_a_pipeline_cannot_follow(pipelines, refused, kind, options, message):
    line = refused("--base", pipelines[kind], *options)
    assert message in line


def test_guidance_of_another_model_is_not_ignored(refused):
    line = refused("--guidance", "2", "--plan")
    assert "--guidance" in line


def test_a_mistyped_folder_and_a_missing_package(pipelines, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    assert "runs/typo: no such file" in refused("--base", "runs/typo")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    line = refused("--base", pipelines["dit"])
    assert "pip install diffusers" in line
