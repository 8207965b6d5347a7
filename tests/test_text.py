"""Pipelines with prompts against their own calls, on tiny ones from nothing."""

import gc
import json
import shutil
import sys
import threading
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import text_pipelines as tiny  # noqa: E402

import adaptive_neon as neon  # noqa: E402
from adaptive_neon.config import Config  # noqa: E402
from adaptive_neon.files import UserError  # noqa: E402
from adaptive_neon.text import open_pipeline, read_prompts  # noqa: E402

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

PROMPTS = ["a bold slanted seven", "a thin zero", "a thin upright nine"]


@pytest.fixture(scope="session")
def text_folders(tmp_path_factory):
    """One pipeline of every kind, not to be written to."""
    root = tmp_path_factory.mktemp("text")
    return {kind: make(root / kind) for kind, make in tiny.MAKERS.items()}


@pytest.fixture
def model_of(tmp_path):
    """model_of(folder, **options) of the configuration; prompts and held_out: lines."""

    def build(folder, prompts=PROMPTS, held_out=(), **options):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
        if held_out:
            (tmp_path / "held_out.txt").write_text("\n".join(held_out))
            options["final_prompts"] = str(tmp_path / "held_out.txt")
        fields = dict(base=str(folder), prompts=str(tmp_path / "prompts.txt"), device="cpu")
        return open_pipeline(Config(**{**fields, "out": tmp_path, **options}))

    return build


def noise_of(model, count=3):
    return torch.randn(count, *model.shape, generator=torch.Generator().manual_seed(5))


def own_call(
    folder, model, steps, prompts=PROMPTS, guidance=None, parts=None, lora=None, **options
):
    """What the folder's pipeline makes of the same noise, [N, 3, H, W] in [-1, 1]. parts: how it is
    loaded; lora: a folder with a repair."""
    if parts is None:
        parts = dict(text_encoder_3=None, tokenizer_3=None) if model.flows() else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora, weight_name="repair.safetensors")
    if not model.flows():
        ddim = diffusers.DDIMScheduler
        pipeline.scheduler = ddim.from_config(pipeline.scheduler.config, clip_sample=False)
    if guidance is not None:
        options["guidance_scale"] = guidance
    noise = noise_of(model, len(prompts))
    settings = dict(latents=noise, num_inference_steps=steps, output_type="pt", **options)
    return pipeline(prompt=list(prompts), **settings).images * 2 - 1


def images_of(model, folder, steps, labels=(0, 1, 2)):
    with torch.no_grad():
        labels = torch.tensor(labels)
        return model.sample(model.load(folder), noise_of(model, len(labels)), labels, steps)


# -------------------- sampling is the own call
SCHEDULES = {
    "pndm": ("PNDMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "outdated": ("DDIMScheduler", {"steps_offset": 0, "clip_sample": True}),
    "v": ("DDIMScheduler", {"prediction_type": "v_prediction"}),
    "zero snr": (
        "DDIMScheduler",
        {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "steps_offset": 0,
        },
    ),
}


@pytest.mark.parametrize(
    "schedule, steps, options",
    [
        ("pndm", 7, {}),
        ("pndm", 9, {"guidance": 1.0}),
        ("ddim", 7, {"negative": "a thin one"}),
        ("ddim", 30, {}),
        ("euler", 7, {"guidance": 1.0, "negative": "a thin one"}),
        ("euler", 9, {"negative": ""}),
        ("dpm++", 7, {}),
        ("dpm++", 30, {"guidance": 1.0}),
        ("outdated", 7, {}),
        ("ddim", 7, {"rescale": 0.7}),
        ("v", 7, {}),
        ("v", 9, {"negative": "a thin one"}),
        ("zero snr", 5, {"rescale": 0.7}),
    ],
)
def test_stable_diffusion(tmp_path, model_of, schedule, steps, options):
    kind, changes = SCHEDULES[schedule]
    folder = tiny.sd(tmp_path / "p", tiny.scheduler(kind, **changes))
    edit(folder / SCHEDULER, **changes)  # what the pipeline has corrected as it was made
    model = model_of(folder, **options)
    theirs = {"negative_prompt": None if "negative" not in options else [options["negative"]] * 3}
    if "rescale" in options:
        theirs["guidance_rescale"] = options["rescale"]
    own = own_call(folder, model, steps, guidance=options.get("guidance"), **theirs)
    ours = images_of(model, folder, steps)
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)
    assert ours.std() > 0.1 and model.guidance == options.get("guidance", 7.5)


@pytest.mark.parametrize("zeros, negative", [(True, None), (True, ""), (False, None)])
def test_xl(tmp_path, model_of, negative, zeros):
    folder = tiny.sdxl(tmp_path / "p", zeros=zeros)
    model = model_of(folder, negative=negative)
    theirs = None if negative is None else [negative] * 3
    own = own_call(folder, model, 5, negative_prompt=theirs)
    torch.testing.assert_close(images_of(model, folder, 5), own, rtol=0, atol=1e-5)
    assert model.guidance == 5.0


def test_no_negative_prompt_of_xl_is_no_empty_one(text_folders, model_of):
    none, empty = (model_of(text_folders["sdxl"], negative=text) for text in (None, ""))
    assert none.rows[-1].abs().max() == none.pooled[-1].abs().max() == 0
    assert empty.rows[-1].abs().max() > 0.1


@pytest.mark.parametrize("guidance, shift", [(None, 3.0), (1.0, 2.0)])
def test_sd3(tmp_path, model_of, guidance, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    folder = tiny.sd3(tmp_path / "p", scheduler)
    model = model_of(folder, guidance=guidance, negative="a thin one")
    own = own_call(folder, model, 6, guidance=guidance, negative_prompt=["a thin one"] * 3)
    torch.testing.assert_close(images_of(model, folder, 6), own, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "spacing, steps, said",
    [("linspace", 10, True), ("trailing", 7, True), ("trailing", 8, False), ("leading", 7, False)],
)
def test_steps_of_unequal_length_are_said(text_folders, model_of, tmp_path, spacing, steps, said):
    folder = shutil.copytree(text_folders["sd"], tmp_path / "copy")
    edit(folder / SCHEDULER, timestep_spacing=spacing)
    notes = model_of(folder, steps=steps).notes
    assert any("not equally long" in note and spacing in note for note in notes) == said


def test_half_precision_text_encoders(text_folders, model_of, tmp_path):
    """Files of half precision are computed in float32, as the pipeline does that is loaded so; and
    lie near those of float32."""
    half = shutil.copytree(text_folders["sd"], tmp_path / "half")
    for file in half.glob("text_encoder*/model.safetensors"):
        tensors = {name: t.half() for name, t in load_file(file).items()}
        save_file(tensors, file.with_name("model.fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    ours = images_of(model_of(half), half, 7)
    own = own_call(half, model_of(half), 7, parts={"variant": "fp16", "dtype": torch.float32})
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)
    whole = text_folders["sd"]
    torch.testing.assert_close(ours, images_of(model_of(whole), whole, 7), rtol=0, atol=5e-3)
    assert model_of(half).rows.dtype == torch.float32


def test_half_precision_beside_whole_weights(text_folders, model_of, tmp_path):
    """A part with both is read whole, also where whole weights are no .safetensors; a part with
    one alone, in that."""
    folder = shutil.copytree(text_folders["sdxl"], tmp_path / "copy")
    file = folder / "text_encoder_2/model.safetensors"
    file.rename(file.with_name("model.fp16.safetensors"))
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: t.half() for name, t in tensors.items()}, file.with_suffix(".new"))
    torch.save(tensors, file.with_suffix(".bin"))
    file.with_suffix(".new").rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    file.unlink()
    expected = images_of(model_of(text_folders["sdxl"]), text_folders["sdxl"], 2)
    torch.testing.assert_close(images_of(model_of(folder), folder, 2), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_samples_are_their_own(text_folders, model_of, kind):
    """Whatever the batch or thread, and differentiable."""
    folder = text_folders[kind]
    model = model_of(folder)
    net = model.load(folder)
    together, found = images_of(model, folder, 3), [None] * 3

    def one(i):
        with torch.no_grad():
            label = torch.tensor([i])
            found[i] = model.sample(net, noise_of(model)[i : i + 1], label, 3)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat(found), together, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01


# -------------------- gradients and the decoder's memory
def test_gradient_is_that_of_differences_and_the_decoder_keeps_little(
    text_folders, model_of, monkeypatch
):
    folder = text_folders["sd"]
    model = model_of(folder, guidance=2.0)
    net = model.load(folder).double()
    model.vae.double()
    model.rows = model.rows.double()
    noise, labels = noise_of(model).double(), torch.tensor([0, 1, 2])
    monkeypatch.setattr("adaptive_neon.diffusers.PIXELS", 16 * 16)
    sizes, decode = [], model.vae.decode
    monkeypatch.setattr(model.vae, "decode", lambda x: sizes.append(len(x)) or decode(x))

    net.conv_out.bias.requires_grad_(True)
    value = model.sample(net, noise, labels, 2).pow(2).sum()
    value.backward()
    assert sizes == [1] * 6, "every image once forward and once more backward"
    slope = net.conv_out.bias.grad.clone()
    values = []
    with torch.no_grad():
        for h in (1e-5, -2e-5):
            net.conv_out.bias[1] += h
            values.append(model.sample(net, noise, labels, 2).pow(2).sum().item())
    assert slope[1].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


# -------------------- training
class Recorder(torch.nn.Module):
    """A network that answers a quarter and remembers what it was asked."""

    def forward(self, x, *args, **kwargs):
        self.x, self.args = x, args
        return (torch.full_like(x, 0.25),)


def test_loss_is_the_error_of_the_noise_and_drops_prompts(text_folders, model_of):
    model = model_of(text_folders["sd"])
    recorder, x = Recorder(), torch.randn(4000, *model.shape)
    labels = torch.arange(4000) % 3
    torch.manual_seed(0)
    loss = model.loss(recorder.train(), x, labels)
    times, rows = recorder.args
    dropped = (rows == model.rows[-1]).flatten(1).all(1)
    assert 0.08 < dropped.float().mean() < 0.12
    assert torch.equal(rows[~dropped], model.rows[labels[~dropped]])
    alpha = model.process.alphas[times].view(-1, 1, 1, 1)
    noise = (recorder.x - alpha.sqrt() * x) / (1 - alpha).sqrt()
    expected = (0.25 - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)


def test_loss_of_a_flow_is_the_error_of_the_velocity(text_folders, model_of):
    model = model_of(text_folders["sd3"])
    recorder, x = Recorder().eval(), torch.randn(64, *model.shape)
    torch.manual_seed(3)
    loss = model.loss(recorder, x, torch.zeros(64, dtype=torch.int64))
    _, _, times = recorder.args
    sigma = (times / 1000).view(-1, 1, 1, 1)
    noise = (recorder.x - (1 - sigma) * x) / sigma
    expected = (0.25 - (noise - x)).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    assert times.max() <= 1000 and times.min() > 0 and times.unique().numel() > 40


def test_encode_is_the_inverse_of_what_the_decoder_takes(text_folders, model_of):
    """Scale and shift of SD3's autoencoder, as its own image-to-image pipeline applies them."""
    model = model_of(text_folders["sd3"])
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        code = model.vae.encode(images.float() / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(model.encode(images), (code - 0.06) * 1.5, rtol=1e-5, atol=1e-5)


# -------------------- prompts
def test_prompts_are_lines(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text(" a thin zero \n\na bold seven\na thin zero\n", "utf-8")
    assert read_prompts(file) == ["a thin zero", "a bold seven", "a thin zero"]
    file.write_bytes(b"\xef\xbb\xbfa thin zero\r\na bold one\r\n")
    assert read_prompts(file) == ["a thin zero", "a bold one"]
    file.write_bytes("a thin zero".encode("utf-16"))
    with pytest.raises(UserError, match="p.txt: .*utf-8"):
        read_prompts(file)
    file.write_text(" \n")
    with pytest.raises(UserError, match="no prompts, one a line"):
        read_prompts(file)
    with pytest.raises(UserError, match="nowhere.txt"):
        read_prompts(tmp_path / "nowhere.txt")


def test_every_purpose_asks_for_equal_shares(text_folders, model_of):
    """10,000 and 50,000 are no multiples of 7: rounds begin with the first seed all the same."""
    prompts = [f"a thin {word}" for word in ("zero", "one", "two", "seven", "nine", "a", "bold")]
    model = model_of(text_folders["sd"], prompts=prompts, final_images=40, final_repeats=2)
    for first in (0, 10_000, 50_000, 50_040, 10_000_000):
        labels = model.balanced_labels(7, range(first, first + 35), "cpu")
        assert labels.bincount().tolist() == [5] * 7, first
    assert model.classes(None) == 7 and "same prompts" in model.notes[0]


def test_final_seeds_ask_for_what_was_held_out(text_folders, model_of):
    held_out = ["a bold one", "a bold two"]
    model = model_of(text_folders["sd"], held_out=held_out, final_images=40, final_repeats=2)
    for first in (50_000, 50_040):
        labels = model.balanced_labels(5, range(first, first + 40), "cpu")
        assert labels.bincount().tolist() == [0, 0, 0, 20, 20]
        assert set(model.asked_for(labels)) == set(held_out)
    assert model.balanced_labels(5, range(10_000, 10_090), "cpu").max() == 2
    assert model.classes(None) == 5 and not model.notes
    assert len(model.rows) == 6

    # And they are drawn as such: the same image as that of a model that was asked for it alone.
    folder = text_folders["sd"]
    ours = images_of(model, folder, 3, labels=(4,))
    other = model_of(folder, prompts=held_out)
    torch.testing.assert_close(ours, images_of(other, folder, 3, labels=(1,)), rtol=0, atol=1e-5)


def test_embeddings_of_empty_prompts_are_not_those_of_none(text_folders, model_of, tmp_path):
    """By the index alone, in the same --out."""
    folder = shutil.copytree(text_folders["sdxl"], tmp_path / "copy")
    zeros = model_of(folder)
    edit(folder / INDEX, force_zeros_for_empty_prompt=False)
    other = model_of(folder)
    assert zeros.rows[-1].abs().max() == 0 < other.rows[-1].abs().max()
    assert zeros.identity != other.identity


def test_half_of_a_text_encoder_is_one_line(text_folders, model_of, tmp_path):
    """Transformers would draw the rest at random."""
    folder = shutil.copytree(text_folders["sd"], tmp_path / "copy")
    file = folder / "text_encoder/model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="layers.1.mlp.fc1.weight is missing in the weights"):
        model_of(folder)


def test_embeddings_are_kept_by_content(text_folders, model_of, tmp_path, monkeypatch):
    folder = text_folders["sdxl"]
    first = model_of(folder)
    assert len([*tmp_path.glob("prompts-*.safetensors")]) == 1

    def used(self):
        raise AssertionError("text encoders are loaded again")

    monkeypatch.setattr("adaptive_neon.text.TextModel._embed", used)
    again = model_of(folder, guidance=3.0, rescale=0.5)
    assert torch.equal(again.rows, first.rows) and torch.equal(again.pooled, first.pooled)
    for options in ({"prompts": PROMPTS[:2]}, {"negative": ""}, {"held_out": ["a bold one"]}):
        with pytest.raises(AssertionError, match="loaded again"):
            model_of(folder, **options)


def test_without_transformers_one_line_says_so(text_folders, model_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        model_of(text_folders["sd"])


def test_a_plan_keeps_nothing_and_says_what_is_needed(
    text_folders, model_of, tmp_path, capsys, monkeypatch
):
    """Before anything is on the device."""
    said = []

    def embed(self):
        said.append(capsys.readouterr().out)
        assert next(self.vae.parameters()).device.type == "cpu"
        return {"rows": torch.zeros(4, 8, 32), "pooled": torch.zeros(4, 16)}

    monkeypatch.setattr("adaptive_neon.text.TextModel._embed", embed)
    folder = text_folders["sdxl"]
    model = model_of(folder, plan=True, lora_rank=2, device="meta")
    net = model.load(folder)
    assert not [*tmp_path.glob("prompts-*.safetensors")]
    assert next(model.vae.parameters()).device.type == "meta"

    def gigabytes(count):
        return f"{4 * count / 1e9:.2g} GB"

    moving = sum(p.numel() for p in net.parameters() if p.requires_grad)
    weights = sum(p.numel() for part in (net, model.vae) for p in part.parameters())
    encoders = 0
    for name in ("text_encoder", "text_encoder_2"):
        encoders += sum(t.numel() for t in load_file(folder / name / "model.safetensors").values())
    assert said[0].startswith(
        f"memory on the device: text encoders {gigabytes(encoders)}, which leave it once prompts "
        f"are embedded; then weights {gigabytes(weights)}, drift of what moves "
        f"{gigabytes(2 * moving)}, prompts {gigabytes(4 * 77 * 32)}; a gradient through "
    )
    _, height, width = model.image_size
    share = model.vae.config.block_out_channels[0] / 128
    needed = 24_000 * model._batch() * height * width * share / 1e9
    assert f"decoder about {needed:.2g} GB for {model._batch()} images at once" in said[0]
    model_of(folder)
    assert "memory" not in said[1]


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_text_encoders_leave_the_memory(text_folders, model_of, kind, monkeypatch):
    """At once, not when Python next looks for cycles."""
    seen, from_pretrained = [], diffusers.DiffusionPipeline.from_pretrained.__func__

    def watched(cls, *args, **options):
        pipeline = from_pretrained(cls, *args, **options)
        seen.append(weakref.ref(pipeline.text_encoder))
        return pipeline

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(watched))
    gc.disable()
    try:
        model = model_of(text_folders[kind])
        assert model and len(seen) == 1 and seen[0]() is None
    finally:
        gc.enable()


def test_long_prompts_are_said(text_folders, model_of, capsys):
    model_of(text_folders["sd"], prompts=["a thin zero", "a thin one two seven nine zero one two"])
    assert "1 prompts have more than 8 tokens and are cut, first: a thin one" in (
        capsys.readouterr().out
    )


# -------------------- keys
def test_identity_is_of_all_that_decides_an_image(text_folders, model_of, tmp_path):
    folder = text_folders["sd"]
    same = model_of(folder).identity
    assert model_of(folder, final_images=40, lora_rank=2).identity == same
    others = [
        model_of(folder, prompts=PROMPTS[::-1]),
        model_of(folder, held_out=["a bold one"]),
        model_of(folder, negative="a thin one"),
        model_of(folder, negative=""),
        model_of(folder, guidance=7.0),
        model_of(folder, rescale=0.5),
    ]
    for change in ("text_encoder/model.safetensors", "tokenizer/tokenizer_config.json"):
        copy = shutil.copytree(folder, tmp_path / change.replace("/", "-"))
        with open(copy / change, "r+b") as file:
            if change.endswith(".json"):
                content = json.load(file)
                file.seek(0)
                file.write(json.dumps({**content, "x": 1}).encode())
                file.truncate()
            else:
                file.seek(-2, 2)
                file.write(b"\x01")
        others.append(model_of(copy))
    assert len({same, *(other.identity for other in others)}) == 9


def test_training_has_its_own_identity(text_folders, model_of):
    folder = text_folders["sd"]
    settings = [{}, {"lora_rank": 2}, {"lora_rank": 4}, {"lora_rank": 2, "lora_targets": "all"}]
    found = {model_of(folder, **options).training_identity for options in settings}
    assert len(found) == 4


# -------------------- blocks
def test_blocks_and_layers(text_folders, model_of):
    model = model_of(text_folders["sdxl"])
    blocks = {}
    for name, _ in model.load(text_folders["sdxl"]).named_parameters():
        blocks.setdefault(model.block(name, None, "paper"), set()).add(model.layer(name))
    attention = "down_blocks.0.attentions.0"
    assert blocks["enc"] == {
        "conv_in",
        "down_blocks.0.resnets.0",
        attention,
        f"{attention}.transformer_blocks.0",
        f"{attention}.transformer_blocks.1",
        "down_blocks.0.downsamplers.0",
        "down_blocks.1.resnets.0",
    }
    assert {"time_embedding", "add_embedding", "mid_block.resnets.1"} <= blocks["mid"]
    assert {"up_blocks.1.resnets.1", "conv_out", "conv_norm_out"} <= blocks["dec"]

    model = model_of(text_folders["sd3"])
    found = {}
    for name, _ in model.load(text_folders["sd3"]).named_parameters():
        found.setdefault(model.layer(name), set()).add(model.block(name, None, "paper"))
    assert found == {
        "pos_embed": {"enc"},
        "time_text_embed": {"mid"},
        "context_embedder": {"mid"},
        "transformer_blocks.0": {"enc"},
        "transformer_blocks.1": {"mid"},
        "transformer_blocks.2": {"dec"},
        "norm_out": {"dec"},
        "proj_out": {"dec"},
    }


# -------------------- what is refused, by name
@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": ""}, "takes prompts: give --prompts FILE"),
        ({"labels": "random"}, "only --labels balanced"),
        ({"continue_on_data": 1.0}, "no prompts to train on"),
        ({"guidance": 0.5}, "guidance is 0.5"),
    ],
)
def test_options_that_do_not_fit(text_folders, tmp_path, options, message):
    (tmp_path / "p.txt").write_text("a thin zero\n")
    fields = dict(base=str(text_folders["sd"]), prompts=str(tmp_path / "p.txt"), device="cpu")
    with pytest.raises(UserError, match=message):
        open_pipeline(Config(**{**fields, "out": tmp_path, **options}))


def test_rescaling_is_not_of_sd3(text_folders, model_of):
    with pytest.raises(UserError, match="--rescale: StableDiffusion3Pipeline has no"):
        model_of(text_folders["sd3"], rescale=0.5)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


INDEX, UNET = "model_index.json", "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    "kind, file, changes, message",
    [
        ("sd", INDEX, {"unet": ["diffusers", "UNet2DModel"]}, "diffusers.UNet2DModel is not"),
        ("sd", INDEX, {"text_encoder": ["mine", "CLIPTextModel"]}, "mine.CLIPTextModel"),
        ("sd", INDEX, {"_class_name": "FluxPipeline"}, "a FluxPipeline takes no prompts"),
        ("sd", UNET, {"in_channels": 9}, "9 channels into 4"),
        ("sd", UNET, {"time_cond_proj_dim": 8}, "time_cond_proj_dim 8"),
        ("sd", UNET, {"sample_size": 6}, "divided by 8"),
        (
            "sd",
            UNET,
            {"_diffusers_version": "0.6.0"},
            "takes the sample_size 8 for an error and 64",
        ),
        (
            "sdxl",
            INDEX,
            {"_class_name": "StableDiffusionPipeline"},
            "addition_embed_type text_time",
        ),
        ("sd3", SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("sd3", SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("sd", "vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
    ],
)
def test_pipelines_that_are_not_supported(
    text_folders, model_of, tmp_path, kind, file, changes, message
):
    folder = shutil.copytree(text_folders[kind], tmp_path / "copy")
    edit(folder / file, **changes)
    with pytest.raises(UserError, match=message) as error:
        model_of(folder)
    assert "\n" not in str(error.value)


def test_other_pipelines_take_no_prompts(tmp_path):
    (tmp_path / INDEX).write_text('{"_class_name": "DDPMPipeline"}')
    for option, value in (("prompts", "p.txt"), ("lora_rank", 2), ("negative", "x")):
        with pytest.raises(UserError, match="takes no prompts"):
            open_pipeline(Config(base=str(tmp_path), **{option: value}))


@pytest.mark.parametrize(
    "option",
    [("--prompts", "p.txt"), ("--negative", "x"), ("--rescale", "0.5"), ("--guidance", "2")],
)
def test_networks_without_prompts_ignore_no_option(option, tmp_path):
    import edm_neon as edm

    with pytest.raises(UserError, match=f"{option[0]} is for pipelines of diffusers"):
        neon.cli.parse(["--preset", "glyphs", "--out", str(tmp_path), *option], edm.PRESETS, "")
