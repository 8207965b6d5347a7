"""The examples: what they share with the program, and DINOv2 as a judge without its weights."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import adaptive_neon as neon
import edm_neon as edm

EXAMPLES = Path(edm.__file__).parent / "examples"


def load_adapter(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_latent_glyphs_train_on_what_the_preset_trains_on():
    pytest.importorskip("diffusers")
    example, preset = load_adapter("latent_glyphs"), edm.PRESETS["glyphs"]
    assert (example.IMAGES, example.STREAM) == (5_000, preset.streams["training"])
    assert example.draw_glyphs is neon.glyphs.draw_glyphs


def test_examples_are_found_by_installing_not_by_their_place():
    texts = [path.read_text("utf-8") for path in EXAMPLES.glob("*.py")]
    assert len(texts) == 3
    assert not any("sys.path" in text or "adapters" in text for text in texts)


def test_dinov2_features_prepare_images_as_imagenet():
    adapter = load_adapter("dinov2_features")
    seen = []

    def network(pixel_values):
        seen.append(pixel_values)
        tokens = pixel_values.mean((2, 3))[:, None].expand(-1, 5, -1)
        return SimpleNamespace(last_hidden_state=tokens)

    adapter.network = lambda device: network
    grey = torch.full((2, 1, 12, 12), 255, dtype=torch.uint8)
    found = adapter.features(grey)
    white = (1 - torch.tensor(adapter.MEAN)) / torch.tensor(adapter.STD)
    assert seen[0].shape == (2, 3, 224, 224)
    torch.testing.assert_close(found, white.expand(2, 3), rtol=1e-4, atol=1e-4)


def test_dinov2_network_with_random_weights():
    transformers = pytest.importorskip("transformers")
    adapter = load_adapter("dinov2_features")
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    net = transformers.Dinov2Model(config).eval()
    adapter.network = lambda device: net
    images = torch.rand(2, 3, 20, 20).mul(255).requires_grad_()
    found = adapter.features(images)
    found.sum().backward()
    assert found.shape == (2, 24) and images.grad.abs().sum() > 0
