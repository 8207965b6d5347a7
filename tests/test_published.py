"""Pipelines with prompts in the files in which they are published: sampled as their own calls do,
trained, and exported for everyone's tools."""

import json
import shutil

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import published_pipelines as published  # noqa: E402
from test_lora import W, export_of, trained  # noqa: E402
from test_text import PROMPTS, images_of, model_of, noise_of, own_call  # noqa: E402, F401

from adaptive_neon.files import UserError  # noqa: E402

# How users load them.
LOADED = {
    "sd15": {"safety_checker": None},
    "sd21": {"variant": "fp16", "dtype": torch.float32},
    "sdxl": {},
    "sd3": {"dtype": torch.float32},  # its T5 is kept in half precision
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {kind: published.published(kind, root / kind) for kind in published.KINDS}


@pytest.mark.parametrize("kind", published.KINDS)
def test_images_are_those_of_the_pipeline(folders, model_of, kind):  # noqa: F811
    model = model_of(folders[kind], negative="a thin one")
    negative = ["a thin one"] * 3
    own = own_call(folders[kind], model, 4, parts=LOADED[kind], negative_prompt=negative)
    ours = images_of(model, folders[kind], 4)
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)
    assert ours.std() > 0.05 and (ours[0] - ours[1]).abs().max() > 1e-3


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd15", "sd21", "sdxl")]


@pytest.mark.parametrize("kind", [*SLOW, "sd3"])
def test_a_lora_is_trained_and_the_pipeline_loads_what_comes_out(
    folders,
    model_of,  # noqa: F811
    kind,
    tmp_path,
):
    folder = folders[kind]
    options = dict(lora_rank=2, lora_targets="all", export_merged=True)
    model = model_of(folder, **options)
    base = model.load(folder)
    net = model.trainable(base)
    x = model.encode(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8))
    model.loss(net, x[:, :, :8, :8], torch.tensor([0, 1])).sum().backward()
    learning = [name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()]
    assert len(learning) >= len(model.targets) * 0.9 and all("lora_B" in n for n in learning)

    # Every module of the file is there, and the pipeline's images are the merged network's.
    path = tmp_path / "network-snapshot-000001.safetensors"
    model.save(trained(model, base, size=0.1), path, {"kimg": 1})
    merger, out = export_of(model, base, path, W, tmp_path / "out")
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        ours = model.sample(merger.set(W), noise_of(model), labels, 3)
    own = own_call(folder, model, 3, parts=LOADED[kind], lora=out)
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-4)
    assert (ours - images_of(model, folder, 3)).abs().max() > 0.01

    # So is the whole pipeline beside it, without a variant's name.
    whole = {name: value for name, value in LOADED[kind].items() if name != "variant"}
    own = own_call(out.with_name("out-merged"), model, 3, parts=whole)
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)


def test_a_part_that_was_not_downloaded_is_one_line(folders, model_of, tmp_path):  # noqa: F811
    """SD3 without its largest text encoder: the index must say so."""
    folder = shutil.copytree(folders["sd3"], tmp_path / "copy")
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(UserError, match=r"names text_encoder_3, .* \[null, null\]"):
        model_of(folder)

    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    model = model_of(folder)
    own = own_call(folder, model, 2, parts={"text_encoder_3": None, "tokenizer_3": None})
    torch.testing.assert_close(images_of(model, folder, 2), own, rtol=0, atol=1e-5)
