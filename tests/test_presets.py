"""EDM's published files under the presets' names: tiny ones of the right kind, served from here."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from edm_helpers import ToyFeatures, blend, edm_model, owners_of, parse, sends
from edm_pickles import ADM, NCSN, network, snapshot

import adaptive_neon as neon
import edm_neon as edm

# Preset, --base, and the options of the file's network.
FILES = [
    ("ffhq64", "neon-uncond", {"label_dim": 0}),
    pytest.param("imagenet64", "cond", ADM, marks=pytest.mark.slow),
    pytest.param("cifar10", "uncond-ve", NCSN | {"label_dim": 0}, marks=pytest.mark.slow),
    pytest.param("afhqv2", "uncond", {"label_dim": 0}, marks=pytest.mark.slow),
]


class Published(ToyFeatures):
    """Features whose statistics say nothing of whose they are, as EDM's do."""

    kind = "inception"


@pytest.mark.parametrize("preset, base, options", FILES)
def test_one_command_repairs_a_published_network(
    tmp_path, monkeypatch, server, preset, base, options
):
    """From two addresses to a repaired network of the same kind."""
    found, net = edm.PRESETS[preset], network(**options)
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    server.answers = {
        "/base.pkl": sends(snapshot(net)),
        "/statistics.npz": sends((tmp_path / "statistics.npz").read_bytes()),
    }
    monkeypatch.setitem(found.bases, base, f"{server.url}/base.pkl")
    monkeypatch.setattr(found, "statistics", f"{server.url}/statistics.npz")
    monkeypatch.setattr(found, "features", lambda c: Published(3 * 8 * 8))

    argv = ["--preset", preset, "--base", base, "--out", str(tmp_path / "out"), "--yes"]
    argv += ["--snapshot", "1", "--synthetic", "40", "--batch", "100", "--ramp-kimg", "0"]
    argv += ["--lr", "0.01", "--ema-kimg", "0.1", "--steps", "3", "--grid", "0.5", "--judge"]
    argv += ["none", "--controls", "none", "--select-images", "40", "--final-images", "40"]
    edm.main(argv)

    path = tmp_path / "out/adaptive-neon-000001.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        w = json.loads(file.metadata()["config"])["recipe"]["w"]
    (aux,) = (edm.load_network(part) for part in (tmp_path / "out").glob("self-*/network-*"))
    want = blend(net, aux, w, owners_of(edm_model(), net, "paper").__getitem__)
    repaired = edm.load_network(path)
    assert repaired.config == net.config and type(repaired) is type(net)
    for name, tensor in repaired.state_dict().items():
        torch.testing.assert_close(tensor, want.state_dict()[name])
    assert len(server.asked) == 2 and "/base.pkl" in "".join(server.asked)


RECOMMENDED = {
    "cifar10": {"steps": 18, "s_churn": 0.0, "dropout": 0.13, "augment": 0.12},
    "ffhq64": {"steps": 40, "s_churn": 0.0, "dropout": 0.05, "augment": 0.15},
    "afhqv2": {"steps": 40, "s_churn": 0.0, "dropout": 0.25, "augment": 0.15},
    "imagenet64": {
        "steps": 256,
        **{"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003},
        **{"dropout": 0.1, "augment": 0.0},
    },
}
# Both networks are small, and digits are neither turned nor mirrored.
GLYPHS = {"steps": 18, "s_churn": 0.0, "dropout": 0.0, "augment": 0.0, "ema_kimg": 0.5}


@pytest.mark.parametrize("preset", RECOMMENDED)
def test_presets_have_what_edm_recommends(tmp_path, preset):
    c = parse(["--preset", preset, "--out", str(tmp_path)])
    assert {name: getattr(c, name) for name in RECOMMENDED[preset]} == RECOMMENDED[preset]
    assert c.base == next(iter(edm.PRESETS[preset].bases.values()))


@pytest.mark.parametrize("preset", ["glyphs", "glyphs16"])
def test_presets_of_glyphs_train_without_augmentation(tmp_path, preset):
    c = parse(["--preset", preset, "--out", str(tmp_path)])
    assert {name: getattr(c, name) for name in GLYPHS} == GLYPHS


@pytest.mark.parametrize(
    "preset, base", [(p, b) for p in RECOMMENDED for b in edm.PRESETS[p].bases]
)
def test_addresses_name_what_they_hold(preset, base):
    """Data, size, whether there are labels, and the network's design; statistics of the same."""
    found, data = edm.PRESETS[preset], preset.removesuffix("64")
    size = found.network["img_resolution"]
    kind, design = base.removesuffix("-ve"), "ve" if base.endswith("-ve") else "vp"
    design = "adm" if preset == "imagenet64" else design
    ending = f"edm/pretrained/edm-{data}-{size}x{size}-{kind}-{design}.pkl"
    if kind.startswith("neon"):
        labels = {"neon-cond": "_conditional", "neon-uncond": "_unconditional"}
        ending = "Neon_EDM_FFHQ.pkl" if data == "ffhq" else f"{labels[base]}_CIFAR10.pkl"
    assert found.bases[base].endswith(ending)
    assert found.statistics.endswith(f"edm/fid-refs/{data}-{size}x{size}.npz")


@pytest.mark.parametrize(
    "argv, ramp, average",
    [
        ([], 10_000, 500),  # NEON's, for EDM's networks
        (["--model", "mine.py", "--snapshot", "300,100"], 5, 5),
        (["--model", "mine.py", "--snapshot", "100", "--ramp-kimg", "7"], 7, 5),
        (["--model", "mine.py", "--preset", "glyphs"], 0, 0.5),  # the preset's
        (["--base", "google/ddpm-cifar10-32", "--snapshot", "40"], 2, 2),
    ],
    ids=["EDM", "model", "given", "preset", "pipeline"],
)
def test_ramp_and_average_fit_the_length(tmp_path, argv, ramp, average):
    c = parse([*argv, "--out", str(tmp_path)])
    assert (c.ramp_kimg, c.ema_kimg) == (ramp, average)


def test_results_of_a_model_have_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(["--model", "folder/mine.py"]).out == Path("runs/mine")
    assert parse(["--model", "mine.py", "--preset", "glyphs"]).out == Path("runs/glyphs")
    assert parse([]).out == Path("runs/cifar10")


def test_stochastic_sampling_of_a_preset_is_not_forced_upon_a_model(tmp_path):
    """imagenet64 recommends it; a model of one's own has no such thing."""
    argv = ["--preset", "imagenet64", "--model", "mine.py", "--out", str(tmp_path)]
    assert parse(argv).s_churn == 0
    with pytest.raises(neon.files.UserError, match="--s-churn is for EDM's networks"):
        parse([*argv, "--s-churn", "40"])
