"""adaptive_neon.diffusers against each pipeline's own call, on tiny pipelines of every kind.

The truth is what diffusers itself computes from the same folder and the same noise.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

import adaptive_neon.diffusers as adapter  # noqa: E402
from adaptive_neon import UserError  # noqa: E402
from adaptive_neon.config import Config  # noqa: E402

torch.set_num_threads(1)  # tiny networks: a second thread only waits
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

KINDS = ["ddpm", "ddim", "ldm-vq", "ldm-kl", "dit"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


# --------------------- tiny pipelines


def DiffusersPipeline(folder, guidance=1.0):
    c = Config(base=str(folder), guidance=guidance, device="cpu", out=Path("."))
    return adapter.DiffusersModel(c)


def perturbed(net, seed=0):
    """The network with every parameter away from the zeros and ones that it is born with."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def unet(channels=3, size=8, **changes):
    options = dict(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    torch.manual_seed(0)
    return perturbed(diffusers.UNet2DModel(**{**options, **changes}))


def dit(**changes):
    options = dict(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=4,
        num_embeds_ada_norm=10,
    )
    torch.manual_seed(0)
    return perturbed(diffusers.DiTTransformer2DModel(**{**options, **changes}))


def autoencoder(kind="AutoencoderKL", **changes):
    options = dict(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=8,
        latent_channels=4,
        scaling_factor=0.7,
    )
    if kind == "VQModel":
        options["num_vq_embeddings"] = 32
    torch.manual_seed(1)
    net = perturbed(getattr(diffusers, kind)(**{**options, **changes}), seed=1)
    if kind == "VQModel":  # the codebook is born far smaller than the latents
        net.quantize.embedding.weight.data.normal_()
    return net


def ddim(**changes):
    return diffusers.DDIMScheduler(**{"num_train_timesteps": 100, **changes})


def make(folder, kind, scheduler=None, net=None, vae=None, **saving):
    """Writes a tiny pipeline of a kind and returns its folder."""
    if kind in ("ddpm", "ddim"):
        pipeline_class = diffusers.DDPMPipeline if kind == "ddpm" else diffusers.DDIMPipeline
        pipeline = pipeline_class(unet=net or unet(), scheduler=scheduler or ddim())
    elif kind == "dit":
        pipeline = diffusers.DiTPipeline(
            net or dit(), vae or autoencoder(), scheduler or ddim(clip_sample=False)
        )
    else:
        vae = vae or autoencoder("VQModel" if kind == "ldm-vq" else "AutoencoderKL")
        pipeline = diffusers.LDMPipeline(
            vae, net or unet(channels=4, size=4), scheduler or ddim(clip_sample=False)
        )
    pipeline.save_pretrained(folder, **saving)
    return Path(folder)


def pipeline_of(folder):
    """The pipeline as diffusers reads it, silent."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(model, count=3, seed=5):
    """The noise that a pipeline draws for itself from a generator with this seed."""
    return torch.randn(count, *model.shape, generator=torch.Generator().manual_seed(seed))


def own_call(folder, count=3, steps=5, labels=None, guidance=1.0, seed=5):
    """What the folder's pipeline makes of that noise at eta = 0, [N, C, H, W] in [0, 1]."""
    pipeline = pipeline_of(folder)
    generator = torch.Generator().manual_seed(seed)
    settings = dict(generator=generator, num_inference_steps=steps)
    if isinstance(pipeline, diffusers.DiTPipeline):
        labels = labels.tolist()
        return pipeline(labels, guidance_scale=guidance, output_type="pt", **settings).images
    if isinstance(pipeline, diffusers.DDPMPipeline):
        pipeline = diffusers.DDIMPipeline(pipeline.unet, pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=count, eta=0.0, output_type="np", **settings).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def labels_of(model, count=3):
    return torch.arange(count) % model.number_of_classes if model.number_of_classes else None


def images_of(model, net, count=3, steps=5):
    with torch.no_grad():
        return model.sample(net, noise_of(model, count), labels_of(model, count), steps)


def edit(file, **changes):
    """Changes values of a JSON file; None removes a key."""
    content = json.loads(file.read_text())
    content.update(changes)
    kept = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(kept))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One pipeline of every kind, not to be written to."""
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: make(root / kind, kind) for kind in KINDS}


@pytest.fixture
def copied(folders, tmp_path):
    """A pipeline of a kind that a test may spoil."""

    def copy(kind, name="pipeline"):
        return Path(shutil.copytree(folders[kind], tmp_path / name))

    return copy


# --------------------- sampling is the own call


@pytest.mark.parametrize(
    "spacing, prediction, clip, zero_snr",
    [
        ("leading", "epsilon", False, False),
        ("leading", "epsilon", True, True),
        ("leading", "sample", False, True),
        ("trailing", "v_prediction", True, True),
        ("trailing", "sample", True, False),
        ("trailing", "epsilon", False, True),
    ],
)
def test_pixels_are_bit_equal(tmp_path, spacing, prediction, clip, zero_snr):
    settings = dict(timestep_spacing=spacing, prediction_type=prediction, clip_sample=clip)
    scheduler = ddim(**settings, rescale_betas_zero_snr=zero_snr, clip_sample_range=0.8)
    model = DiffusersPipeline(make(tmp_path / "p", "ddim", scheduler))
    net = model.load(tmp_path / "p")
    if zero_snr and prediction == "epsilon" and spacing == "trailing":
        with pytest.raises(UserError, match="pure noise"):
            images_of(model, net)
        return
    images = images_of(model, net)
    assert torch.equal(images / 2 + 0.5, own_call(tmp_path / "p"))


@pytest.mark.parametrize(
    "spacing, steps, prediction, to_one",
    [
        ("linspace", 6, "epsilon", True),
        ("trailing", 7, "v_prediction", False),
        ("leading", 7, "sample", True),
        ("leading", 7, "epsilon", False),
    ],
)
def test_any_spacing_is_euler_in_sigma(tmp_path, spacing, steps, prediction, to_one):
    """DDIM is Euler's method for d(x / sqrt(a)) = noise * d(sigma), sigma = sqrt(1 / a - 1)."""
    scheduler = ddim(
        timestep_spacing=spacing,
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=to_one,
    )
    folder = make(tmp_path / "p", "ddim", scheduler, net=unet().double())
    model = DiffusersPipeline(folder)
    net = model.load(folder).double()
    noise = noise_of(model).double()

    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    alphas = scheduler.alphas_cumprod.double()
    end = 1.0 if to_one else alphas[0].item()
    levels = [alphas[t].item() for t in times] + [end]
    x = noise / levels[0] ** 0.5
    for t, a, b in zip(times, levels, levels[1:]):
        with torch.no_grad():
            out = net(x * a**0.5, t).sample
        if prediction == "sample":
            out = (x - out) / (1 / a - 1) ** 0.5
        elif prediction == "v_prediction":
            out = a**0.5 * out + (1 - a) ** 0.5 * x * a**0.5
        x = x + out * ((1 / b - 1) ** 0.5 - (1 / a - 1) ** 0.5)
    expected = (x * end**0.5).clamp(-1, 1)

    with torch.no_grad():
        images = model.sample(net, noise, None, steps)
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-6)  # float32 noise levels


@pytest.mark.parametrize("steps", [61, 201])
def test_trailing_never_takes_a_negative_time(tmp_path, steps):
    """Rounding gives set_timesteps a last time of -1 here, which would be the noisiest level."""
    scheduler = ddim(num_train_timesteps=1000, timestep_spacing="trailing")
    model = DiffusersPipeline(make(tmp_path / "p", "ddim", scheduler))
    times = model.process.times(steps)
    assert len(times) == steps and times[0] == 999 and times[-1] >= 0


@pytest.mark.parametrize(
    "kind, prediction, clip",
    [("ldm-vq", "epsilon", False), ("ldm-kl", "v_prediction", True), ("ldm-kl", "epsilon", False)],
)
def test_latents_equal_the_own_call(tmp_path, kind, prediction, clip):
    scheduler = ddim(prediction_type=prediction, clip_sample=clip, timestep_spacing="trailing")
    model = DiffusersPipeline(make(tmp_path / "p", kind, scheduler))
    images = images_of(model, model.load(tmp_path / "p"))
    expected = own_call(tmp_path / "p")
    assert images.shape == (3, 3, 8, 8) and images.std() > 0.01
    torch.testing.assert_close(images / 2 + 0.5, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "prediction, guidance, out_channels",
    [("epsilon", 4.0, 8), ("v_prediction", 1.0, 4), ("epsilon", 1.0, 8)],
)
def test_dit_equals_the_own_call(tmp_path, prediction, guidance, out_channels):
    # 1000 classes, because the pipeline's null class is the constant 1000.
    net = dit(num_embeds_ada_norm=1000, out_channels=out_channels)
    scheduler = ddim(prediction_type=prediction, clip_sample=False)
    folder = make(tmp_path / "p", "dit", scheduler, net)
    model = DiffusersPipeline(folder, guidance)
    labels = torch.tensor([3, 999, 0])
    with torch.no_grad():
        images = model.sample(model.load(folder), noise_of(model), labels, 5)
    expected = own_call(folder, labels=labels, guidance=guidance)
    torch.testing.assert_close(images / 2 + 0.5, expected, rtol=0, atol=1e-6)


def test_guidance_uses_the_last_row_as_null_class(folders):
    model = DiffusersPipeline(folders["dit"], guidance=3.0)
    plain = DiffusersPipeline(folders["dit"])
    net = model.load(folders["dit"])
    x, times = noise_of(model), torch.full((3,), 7)
    with torch.no_grad():
        given = plain._guided(net, x, times, torch.tensor([1, 2, 3]))
        null = plain._guided(net, x, times, torch.tensor([10, 10, 10]))
        guided = model._guided(net, x, times, torch.tensor([1, 2, 3]))
    torch.testing.assert_close(guided, null + 3 * (given - null), rtol=1e-5, atol=1e-5)
    assert (given - null).abs().max() > 1e-3


def test_dit_without_out_channels_and_with_its_former_class_name(tmp_path):
    folder = make(tmp_path / "p", "dit", net=dit(out_channels=None))
    model = DiffusersPipeline(folder)
    expected = images_of(model, model.load(folder))

    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit(folder / "transformer/config.json", _class_name="Transformer2DModel")
    renamed = DiffusersPipeline(folder)
    assert torch.equal(images_of(renamed, renamed.load(folder)), expected)
    assert renamed.network_class is diffusers.DiTTransformer2DModel
    alone = renamed.load(folder / "transformer" / WEIGHTS)
    assert torch.equal(images_of(renamed, alone), expected)


@pytest.mark.parametrize("kind", ["DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_relatives_are_walked_as_ddim(tmp_path, kind):
    """Own noise levels, own time steps, own end; only what can clip clips."""
    scheduler = getattr(diffusers, kind)(num_train_timesteps=100, beta_end=0.05)
    model = DiffusersPipeline(make(tmp_path / "p", "ldm-kl", scheduler))
    ours = model.process.scheduler
    assert torch.equal(ours.alphas_cumprod, scheduler.alphas_cumprod)
    spacing = "linspace" if kind == "EulerDiscreteScheduler" else "leading"
    assert ours.config.timestep_spacing == spacing
    assert ours.config.clip_sample == (kind == "DDPMScheduler")
    assert (ours.final_alpha_cumprod == 1) == (kind != "PNDMScheduler")


def test_a_missing_scaling_factor_is_not_that_default(tmp_path):
    """diffusers fills in 0.18215 for both, yet their latents differ by that factor."""
    vae = autoencoder("VQModel", scaling_factor=0.18215)
    base = make(tmp_path / "base", "ldm-vq", vae=vae)
    other = make(tmp_path / "other", "ldm-vq", vae=vae)
    edit(other / "vqvae/config.json", scaling_factor=None)
    with pytest.raises(UserError, match="its vqvae is not that of"):
        DiffusersPipeline(base).load(other)


def test_class_conditional_unet_reads_its_labels(tmp_path):
    folder = make(tmp_path / "p", "ddim", net=unet(num_class_embeds=5))
    model = DiffusersPipeline(folder)
    assert model.number_of_classes == 5
    net, noise = model.load(folder), noise_of(model, 1).repeat(2, 1, 1, 1)
    with torch.no_grad():
        images = model.sample(net, noise, torch.tensor([0, 4]), 5)
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_a_learned_variance_of_a_unet_is_left_out(tmp_path):
    plain, wide = unet(), unet(out_channels=6)
    shared = {name: t for name, t in wide.state_dict().items() if not name.startswith("conv_out")}
    shared["conv_out.weight"] = wide.conv_out.weight[:3]
    shared["conv_out.bias"] = wide.conv_out.bias[:3]
    plain.load_state_dict(shared)
    first = DiffusersPipeline(make(tmp_path / "a", "ddpm", net=plain))
    second = DiffusersPipeline(make(tmp_path / "b", "ddpm", net=wide))
    images = images_of(second, second.load(tmp_path / "b"))
    torch.testing.assert_close(
        images, images_of(first, first.load(tmp_path / "a")), rtol=0, atol=1e-6
    )


def test_rectangles(tmp_path):
    folder = make(tmp_path / "p", "ldm-kl", net=unet(channels=4, size=(4, 8)))
    model = DiffusersPipeline(folder)
    assert model.shape == (4, 4, 8) and model.image_size == (3, 8, 16)
    assert images_of(model, model.load(folder)).shape == (3, 3, 8, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_classes_and_range(folders, kind):
    model = DiffusersPipeline(folders[kind])
    pixels = kind in ("ddpm", "ddim")
    assert model.shape == ((3, 8, 8) if pixels else (4, 4, 4))
    assert model.number_of_classes == (10 if kind == "dit" else 0)
    assert bool(model.why_not) == (kind == "ldm-vq") and "\n" not in model.why_not

    net = model.load(folders[kind])
    assert not net.training and {p.dtype for p in net.parameters()} == {torch.float32}
    with torch.no_grad():
        images = model.sample(net, 50 * noise_of(model), labels_of(model), 3)
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.float32
    assert images.abs().max() <= 1


@pytest.mark.parametrize("kind", ["ddim", "ldm-vq", "dit"])
def test_a_sample_does_not_depend_on_its_batch(folders, kind):
    model = DiffusersPipeline(folders[kind])
    net, labels = model.load(folders[kind]), labels_of(model, 5)
    together = images_of(model, net, 5)
    some = None if labels is None else labels[2:4]
    with torch.no_grad():
        part = model.sample(net, noise_of(model, 5)[2:4], some, 5)
    torch.testing.assert_close(part, together[2:4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 101])
def test_impossible_numbers_of_steps_are_one_line(folders, steps):
    model = DiffusersPipeline(folders["ddim"])
    with pytest.raises(UserError, match=r"steps: .* allows 1 to 100"):
        images_of(model, model.load(folders["ddim"]), steps=steps)


def test_an_offset_beyond_the_last_time_is_one_line(tmp_path):
    folder = make(tmp_path / "p", "ddim", ddim(steps_offset=1))
    model = DiffusersPipeline(folder)
    net = model.load(folder)
    images_of(model, net, steps=5)
    with pytest.raises(UserError, match="steps_offset"):
        images_of(model, net, steps=100)


# --------------------- threads, precision, memory


@pytest.mark.parametrize("kind", ["ldm-vq", "dit"])
def test_calls_leave_no_trace_on_the_object(folders, kind):
    """Threads would meet in whatever a call writes."""
    model = DiffusersPipeline(folders[kind])
    net = model.load(folders[kind])
    before = {**vars(model), **vars(model.process.scheduler)}
    images = images_of(model, net)
    x = model.encode(((images + 1) * 127.5).to(torch.uint8))
    model.loss(net, x, labels_of(model))
    after = {**vars(model), **vars(model.process.scheduler)}
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


@pytest.mark.parametrize("kind", ["ldm-vq", "dit"])
def test_autoencoders_work_in_float32_under_autocast(folders, kind):
    model = DiffusersPipeline(folders[kind])
    net = model.load(folders[kind])
    seen = []
    for module in (net, model.vae.decoder.conv_in, model.vae.encoder.conv_out):
        module.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        images = images_of(model, net, steps=1)
        x = model.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert seen[0][0].dtype == torch.bfloat16  # the denoiser is the pipeline's to speed up
    assert [out.dtype for out in seen[1:]] == [torch.float32] * 2
    assert images.dtype == x.dtype == torch.float32


@pytest.mark.parametrize("kind", ["ldm-vq", "ldm-kl"])
def test_encode_is_the_scaled_mode_and_bounded(folders, kind, monkeypatch):
    model = DiffusersPipeline(folders[kind])
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (7, 3, 8, 8), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        code = model.vae.encode(images.float() / 127.5 - 1)
        z = code.latents if kind == "ldm-vq" else code.latent_dist.mean
    expected = 0.7 * z

    sizes = []
    encode = model.vae.encode
    decode = model.vae.decode
    monkeypatch.setattr(adapter, "PIXELS", 3 * 64)
    monkeypatch.setattr(model.vae, "encode", lambda x: sizes.append(len(x)) or encode(x))
    monkeypatch.setattr(model.vae, "decode", lambda x: sizes.append(len(x)) or decode(x))
    x = model.encode(images)
    assert sizes == [3, 3, 1] and x.dtype == torch.float32 and not x.requires_grad
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)

    images_of(model, model.load(folders[kind]), count=7)
    assert sizes[3:] == [3, 3, 1]


@pytest.mark.parametrize("kind, shape", [("ddim", (3, 8, 4)), ("ldm-kl", (1, 8, 8))])
def test_images_of_another_size_are_one_line(folders, kind, shape):
    with pytest.raises(UserError, match=f"{'x'.join(map(str, shape))}, those of .* 3x8x8"):
        DiffusersPipeline(folders[kind]).encode(torch.zeros(2, *shape, dtype=torch.uint8))


# --------------------- gradients


@pytest.mark.parametrize("kind", ["ddim", "ldm-kl", "dit"])
def test_gradient_equals_central_differences(folders, kind):
    model = DiffusersPipeline(folders[kind], guidance=2.0 if kind == "dit" else 1.0)
    net = model.load(folders[kind]).double()
    if model.vae is not None:
        model.vae.double()
    noise, labels = noise_of(model, 2).double(), labels_of(model, 2)
    generator = torch.Generator().manual_seed(4)
    target = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64)

    def value():
        return (model.sample(net, noise, labels, 3) * target).sum()

    start = [p.detach().clone() for p in net.parameters()]
    way = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in start]
    value().backward()
    slope = sum((p.grad * d).sum().item() for p, d in zip(net.parameters(), way))

    values = []
    for h in (1e-5, -1e-5):
        with torch.no_grad():
            for p, p0, d in zip(net.parameters(), start, way):
                p.copy_(p0 + h * d)
            values.append(value().item())
    difference = (values[0] - values[1]) / 2e-5
    assert abs(slope) > 1e-3 and slope == pytest.approx(difference, rel=1e-5)
    if model.vae is not None:
        assert all(p.grad is None and not p.requires_grad for p in model.vae.parameters())


# --------------------- training


@pytest.mark.parametrize(
    "kind, prediction",
    [("ddim", "sample"), ("ldm-kl", "v_prediction"), ("dit", "epsilon"), ("dit", "sample")],
)
def test_loss_is_the_mean_square_of_what_is_predicted(tmp_path, kind, prediction):
    scheduler = ddim(prediction_type=prediction, clip_sample=False)
    folder = make(tmp_path / "p", kind, scheduler)
    model = DiffusersPipeline(folder)
    net, labels = model.load(folder), labels_of(model, 6)
    x = noise_of(model, 6, seed=9)
    torch.manual_seed(11)
    loss = model.loss(net, x, labels)

    torch.manual_seed(11)
    times = torch.randint(100, (6,))
    noise = torch.randn_like(x)
    with torch.no_grad():
        out = net(scheduler.add_noise(x, noise, times), times, labels, return_dict=False)[0]
    target = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(x, noise, times),
        "sample": x,
    }[prediction]
    expected = (out[:, : model.shape[0]] - target).square().mean(dim=(1, 2, 3))
    if prediction == "sample":  # signal over noise makes it the error of the noise
        alphas = scheduler.alphas_cumprod[times]
        expected = expected * alphas / (1 - alphas)
    assert loss.shape == (6,) and loss.requires_grad
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)


class Recorder(nn.Module):
    """A network that answers zero and remembers the times and labels that it was asked about."""

    def forward(self, x, times, labels, return_dict=True):
        self.times, self.labels = times, labels
        return (torch.zeros_like(x),)


def test_train_mode_drops_labels_for_the_whole_network(folders):
    model = DiffusersPipeline(folders["dit"])
    recorder, labels = Recorder(), torch.arange(4000) % 10
    x = torch.zeros(4000, *model.shape)
    torch.manual_seed(0)
    model.loss(recorder.train(), x, labels)
    dropped = recorder.labels == 10
    assert 0.08 < dropped.float().mean() < 0.12
    assert torch.equal(recorder.labels[~dropped], labels[~dropped])
    model.loss(recorder.eval(), x, labels)
    assert torch.equal(recorder.labels, labels)

    # The network itself, whose blocks would each drop labels of their own, does not.
    net = model.load(folders["dit"]).train()
    x, times, labels = noise_of(model, 64), torch.full((64,), 7), torch.zeros(64, dtype=torch.int64)
    with torch.no_grad():
        first, second = [net(x, times, labels).sample for _ in range(2)]
    assert torch.equal(first, second)


def test_training_times_are_uniform_over_all(folders):
    model, recorder = DiffusersPipeline(folders["ddim"]), Recorder()
    torch.manual_seed(0)
    model.loss(recorder, torch.zeros(20_000, *model.shape), None)
    counts = recorder.times.bincount(minlength=100)
    assert len(counts) == 100 and counts.min() > 130 and counts.max() < 270  # 200, 5 deviations


# --------------------- blocks and layers


def test_blocks_and_layers_of_a_unet(tmp_path):
    net = unet(num_class_embeds=5, time_embedding_type="learned", num_train_timesteps=100)
    folder = make(tmp_path / "p", "ddim", net=net)
    model = DiffusersPipeline(folder)
    blocks = {}
    for name, _ in net.named_parameters():
        blocks.setdefault(model.layer(name), set()).add(model.block(name, None, "paper"))
    assert blocks == {
        "conv_in": {"enc"},
        "down_blocks.0": {"enc"},
        "down_blocks.1": {"enc"},
        "time_proj": {"mid"},
        "time_embedding": {"mid"},
        "class_embedding": {"mid"},
        "mid_block": {"mid"},
        "up_blocks.0": {"dec"},
        "up_blocks.1": {"dec"},
        "conv_norm_out": {"dec"},
        "conv_out": {"dec"},
    }


@pytest.mark.parametrize("depth, blocks", [(4, "EEMD"), (6, "EEMMDD"), (1, "E")])
def test_blocks_and_layers_of_a_dit(tmp_path, depth, blocks):
    net = dit(num_layers=depth)
    model = DiffusersPipeline(make(tmp_path / "p", "dit", net=net))
    found = {}
    for name, _ in net.named_parameters():
        found.setdefault(model.layer(name), set()).add(model.block(name, None, "paper"))
    full = {"E": "enc", "M": "mid", "D": "dec"}
    expected = {f"transformer_blocks.{i}": {full[block]} for i, block in enumerate(blocks)}
    expected |= {"pos_embed": {"enc"}, "proj_out_1": {"dec"}, "proj_out_2": {"dec"}}
    assert found == expected


def test_names_of_another_network_have_no_block(folders):
    model = DiffusersPipeline(folders["ddim"])
    with pytest.raises(UserError, match="encoder.weight is no parameter"):
        model.layer("encoder.weight")


# --------------------- loading


@pytest.mark.parametrize("kind", ["ddim", "dit"])
def test_every_form_of_a_network_loads(folders, kind, tmp_path):
    folder = folders[kind]
    model = DiffusersPipeline(folder)
    part = "transformer" if kind == "dit" else "unet"
    state = safetensors.torch.load_file(folder / part / WEIGHTS)
    safetensors.torch.save_file(
        {name: t.half() for name, t in state.items()}, tmp_path / "half.safetensors"
    )
    torch.manual_seed(0)
    expected_draw = torch.rand(1)
    for path in (
        folder,
        folder / part,
        str(folder / part / WEIGHTS),
        tmp_path / "half.safetensors",
    ):
        torch.manual_seed(0)
        loaded = model.load(path)
        assert torch.equal(torch.rand(1), expected_draw)  # the run's random numbers are its own
        tolerance = 1e-3 if "half" in str(path) else 0
        assert loaded.state_dict().keys() == state.keys() and not loaded.training
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, state[name], rtol=tolerance, atol=tolerance)


def test_an_ema_folder_loads_and_is_another_network(folders, tmp_path):
    from diffusers.training_utils import EMAModel

    net = unet()
    ema = EMAModel(net.parameters(), model_cls=diffusers.UNet2DModel, model_config=net.config)
    for shadow in ema.shadow_params:
        shadow.mul_(1.5)
    ema.save_pretrained(tmp_path / "unet_ema")
    model = DiffusersPipeline(folders["ddim"])
    loaded = model.load(tmp_path / "unet_ema")
    for ours, theirs in zip(loaded.parameters(), net.parameters()):
        torch.testing.assert_close(ours, 1.5 * theirs)


def test_a_base_that_was_an_ema_accepts_plain_networks(copied):
    """The notes of an EMA in config.json are no part of the architecture."""
    folder = copied("ddim")
    edit(folder / "unet/config.json", decay=0.99, optimization_step=7)
    model = DiffusersPipeline(folder)
    other = copied("ddim", "other")
    edit(other / "unet/config.json", decay=0.99, optimization_step=8, dropout=0.2)
    model.load(other)


def test_a_root_folder_with_old_names_and_a_pickle(tmp_path):
    """google/ddpm-* keep all in one folder and name attention as diffusers did then."""
    folder = make(tmp_path / "p", "ddim")
    model = DiffusersPipeline(folder)
    expected = images_of(model, model.load(folder))

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in safetensors.torch.load_file(folder / "unet" / WEIGHTS).items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        state[name] = tensor
    assert any(".proj_attn." in name for name in state)
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    shutil.move(folder / "unet/config.json", folder / "config.json")
    shutil.move(folder / "scheduler/scheduler_config.json", folder / "scheduler_config.json")
    shutil.rmtree(folder / "unet")
    shutil.rmtree(folder / "scheduler")

    flat = DiffusersPipeline(folder)
    net = flat.load(folder)
    assert torch.equal(images_of(flat, net), expected)

    # And out again, in the same form with the weights of today.
    with torch.no_grad():
        net.conv_in.bias += 0.5
    flat.export(net, tmp_path / "out", {})
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == [
        "adaptive-neon.json",
        "config.json",
        WEIGHTS,
        "model_index.json",
        "scheduler_config.json",
    ]
    torch.testing.assert_close(
        own_call(tmp_path / "out"), images_of(flat, net) / 2 + 0.5, rtol=0, atol=1e-6
    )


def renamed(folder, rule):
    """The weights under other names, also in their index."""
    for place in (folder / "unet", folder / "vqvae"):
        for file in sorted(place.glob("diffusion_pytorch_model*")):
            if file.suffix == ".json":
                content = json.loads(file.read_text())
                names = content["weight_map"].items()
                content["weight_map"] = {tensor: rule(name) for tensor, name in names}
                file.write_text(json.dumps(content))
            file.rename(place / rule(file.name))


def former(name):
    """How shards of a variant were named."""
    name = re.sub(r"\.fp16-(\d+-of-\d+)\.", r"-\1.fp16.", name)
    return name.replace(".index.fp16.json", ".fp16.index.json")


SHARDS = {"max_shard_size": "10KB"}
PICKLES = {"safe_serialization": False}
FORMS = {
    "shards": (SHARDS, None),
    "half": ({"variant": "fp16"}, None),
    "half in shards, former names": ({"variant": "fp16", **SHARDS}, former),
    "not averaged, in shards": ({"variant": "non_ema", **SHARDS}, None),
    "pickles": (PICKLES, None),
}


@pytest.mark.parametrize("saving, rule", FORMS.values(), ids=FORMS.keys())
def test_weights_are_read_in_every_form(folders, tmp_path, saving, rule):
    whole = DiffusersPipeline(folders["ldm-kl"])
    expected = images_of(whole, whole.load(folders["ldm-kl"]))
    folder = make(tmp_path / "p", "ldm-kl", **saving)
    if rule is not None:
        renamed(folder, rule)
        assert list((folder / "unet").glob("*-of-*.fp16.safetensors"))
    model = DiffusersPipeline(folder)
    assert torch.equal(images_of(model, model.load(folder)), expected)

    # Written again, each is read without knowing how it was.
    model.export(model.load(folder), tmp_path / "out", {})
    own = own_call(tmp_path / "out")
    torch.testing.assert_close(own, expected / 2 + 0.5, rtol=0, atol=1e-6)


def test_two_variants_and_no_plain_weights_are_one_line(tmp_path):
    folder = make(tmp_path / "p", "ddim", variant="fp16")
    place = folder / "unet"
    file = place / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(file, place / "diffusion_pytorch_model.bf16.safetensors")
    assert DiffusersPipeline(folder).load(folder)  # both are the same network
    shutil.copy(file, place / "diffusion_pytorch_model.non_ema.safetensors")
    with pytest.raises(UserError, match="several variants of the weights"):
        DiffusersPipeline(folder)


def test_exported_files_are_as_readable_as_others(tmp_path):
    folder = make(tmp_path / "p", "ldm-kl")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o600)
    model = DiffusersPipeline(folder)
    model.export(model.load(folder), tmp_path / "out", {})
    (tmp_path / "plain").touch()
    modes = {file.stat().st_mode for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


# --------------------- bad folders, one line each


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and 20 < len(text) < 600, text
    return text


def spoil_tensors(file, change):
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


def set_to(tensor_value):
    return lambda tensors: tensors["conv_in.weight"].view(-1)[0].fill_(tensor_value)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class Hostile:
    """A pickle that leaves a mark if it is ever executed."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def hostile_archive(folder):
    (folder / "unet" / WEIGHTS).unlink()
    state = {"conv_in.weight": Hostile(folder / "mark")}
    torch.save(state, folder / "unet/diffusion_pytorch_model.bin")


def weights_file(folder):
    return folder / "unet" / WEIGHTS


INDEX, UNET_CONFIG = "model_index.json", "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
BAD_FOLDERS = {
    "missing tensor": (
        lambda f: spoil_tensors(weights_file(f), lambda t: t.pop("conv_in.weight")),
        "conv_in.weight is missing",
    ),
    "extra tensor": (
        lambda f: spoil_tensors(weights_file(f), lambda t: t.update(more=torch.ones(1))),
        "more is unexpected",
    ),
    "nan": (lambda f: spoil_tensors(weights_file(f), set_to(float("nan"))), "conv_in.weight has"),
    "size": (
        lambda f: spoil_tensors(
            weights_file(f), lambda t: t.update({"conv_in.bias": torch.ones(9)})
        ),
        "conv_in.bias",
    ),
    "truncated": (lambda f: truncate(weights_file(f)), f"Unable to load weights .*{WEIGHTS}"),
    "hostile archive": (hostile_archive, "Unable to load weights .*bin"),
    "no weights": (lambda f: weights_file(f).unlink(), "no weights"),
    "quantised": (
        lambda f: edit(f / UNET_CONFIG, quantization_config={"quant_method": "bitsandbytes"}),
        "quantis|quantiz|bitsandbytes",
    ),
    "no index": (lambda f: (f / INDEX).unlink(), "no model_index.json"),
    "index is no JSON": (lambda f: (f / INDEX).write_text("{"), INDEX),
    "no scheduler": (lambda f: edit(f / INDEX, scheduler=None), "names no scheduler"),
    "no denoiser": (lambda f: edit(f / INDEX, unet=None), "names no unet or transformer"),
    "two denoisers": (
        lambda f: edit(f / INDEX, transformer=["diffusers", "DiTTransformer2DModel"]),
        "more than one",
    ),
    "other class": (
        lambda f: edit(f / INDEX, unet=["diffusers", "UNet2DConditionModel"]),
        "UNet2DConditionModel is not supported .only UNet2DModel.: write a model file",
    ),
    "other part": (
        lambda f: edit(f / INDEX, text_encoder=["transformers", "CLIPTextModel"]),
        "text_encoder of class transformers.CLIPTextModel",
    ),
    "custom code": (lambda f: edit(f / INDEX, unet=["my_unet", "UNet2DModel"]), "my_unet"),
    "custom pipeline": (
        lambda f: edit(f / INDEX, _class_name=["pipeline", "MyPipeline"]),
        "code of its own",
    ),
    "no relative": (
        lambda f: edit(f / INDEX, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        "FlowMatchEulerDiscreteScheduler is not supported",
    ),
    "no scheduler config": (lambda f: (f / SCHEDULER).unlink(), "scheduler_config.json"),
    "thresholding": (lambda f: edit(f / SCHEDULER, thresholding=True), "thresholding"),
    "prediction": (lambda f: edit(f / SCHEDULER, prediction_type="flow"), "prediction_type flow"),
    "spacing": (lambda f: edit(f / SCHEDULER, timestep_spacing="random"), "random"),
    "betas": (lambda f: edit(f / SCHEDULER, trained_betas=[0.1, 0.2]), "100 rising"),
    "no size": (lambda f: edit(f / UNET_CONFIG, sample_size=None), "sample_size"),
    "conditional on images": (lambda f: edit(f / UNET_CONFIG, in_channels=5), "5 channels into 3"),
    "embedding": (lambda f: edit(f / UNET_CONFIG, class_embed_type="identity"), "class_embed_type"),
    "fourier": (lambda f: edit(f / UNET_CONFIG, time_embedding_type="fourier"), "fourier"),
}


@pytest.mark.parametrize("spoil, message", BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_a_bad_folder_is_one_line(copied, spoil, message):
    folder = copied("ddim")
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        DiffusersPipeline(folder).load(folder)
    assert "pipeline" in one_line(error)  # names the folder
    assert not (folder / "mark").exists()


@pytest.mark.parametrize(
    "scheduler, changes",
    [
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
    ],
)
def test_flows_and_continuous_times_are_refused(tmp_path, scheduler, changes):
    folder = make(tmp_path / "p", "ddpm", getattr(diffusers, scheduler)(num_train_timesteps=100))
    edit(folder / SCHEDULER, **changes)
    with pytest.raises(UserError, match="not supported") as error:
        DiffusersPipeline(folder)
    one_line(error)


BAD_AUTOENCODERS = {
    "nan": (
        lambda f: spoil_tensors(
            f / "vae" / WEIGHTS, lambda t: t["decoder.conv_in.bias"].fill_(float("nan"))
        ),
        "decoder.conv_in.bias has",
    ),
    "class": (lambda f: edit(f / INDEX, vae=["diffusers", "AutoencoderTiny"]), "AutoencoderTiny"),
    "channels": (
        lambda f: edit(f / "transformer/config.json", in_channels=3, out_channels=3),
        "takes 3 channels, vae makes latents of 4",
    ),
    "shift": (lambda f: edit(f / "vae/config.json", shift_factor=0.1), "shift_factor"),
    "scale": (lambda f: edit(f / "vae/config.json", scaling_factor=-1), "scaling_factor is -1"),
    "no folder": (lambda f: shutil.rmtree(f / "vae"), "no weights"),
}


@pytest.mark.parametrize("spoil, message", BAD_AUTOENCODERS.values(), ids=BAD_AUTOENCODERS.keys())
def test_a_bad_autoencoder_is_one_line(copied, spoil, message):
    folder = copied("dit")
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        DiffusersPipeline(folder)
    one_line(error)


def other_pipeline(tmp_path, **changes):
    return make(tmp_path / "other", "ddim", **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"net": lambda: unet(block_out_channels=(8, 24))},
            "block_out_channels is .8, 24., not .8, 16",
        ),
        ({"net": lambda: unet(norm_num_groups=2)}, "norm_num_groups is 2, not 4"),
        ({"scheduler": lambda: ddim(prediction_type="sample")}, "predicts sample"),
        ({"scheduler": lambda: ddim(beta_end=0.03)}, "noise levels"),
    ],
)
def test_a_network_that_does_not_fit_the_base_is_one_line(folders, tmp_path, changes, message):
    other = other_pipeline(tmp_path, **{key: build() for key, build in changes.items()})
    model = DiffusersPipeline(folders["ddim"])
    with pytest.raises(UserError, match=message) as error:
        model.load(other)
    one_line(error)


@pytest.mark.parametrize("changes", [{"scaling_factor": 0.5}, {"block_out_channels": (8, 16)}])
def test_latents_of_another_autoencoder_are_one_line(folders, tmp_path, changes):
    other = make(tmp_path / "other", "ldm-kl", vae=autoencoder(**changes))
    model = DiffusersPipeline(folders["ldm-kl"])
    with pytest.raises(UserError, match="its vqvae is not that of") as error:
        model.load(other)
    one_line(error)
    model.load(other / "unet")  # the network alone is taken as it is


def test_the_same_autoencoder_in_half_precision_is_the_same(folders, copied):
    other = copied("ldm-kl")
    file = other / "vqvae" / WEIGHTS
    halves = {name: t.half() for name, t in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(halves, file)
    model = DiffusersPipeline(folders["ldm-kl"])
    model.load(other)
    spoil_tensors(file, lambda t: t["decoder.conv_in.bias"].add_(0.01))
    with pytest.raises(UserError, match="its vqvae is not that of"):
        model.load(other)


def test_pixels_and_latents_are_not_merged(tmp_path):
    """The same U-Net, once on pixels and once on latents with as many channels."""
    vae = autoencoder(latent_channels=3)
    pixels = make(tmp_path / "pixels", "ddpm", ddim(), unet(size=4))
    latents = make(tmp_path / "latents", "ldm-kl", ddim(), unet(size=4), vae)
    for base, other in ((pixels, latents), (latents, pixels)):
        with pytest.raises(UserError, match="only one of it and .* has an autoencoder"):
            DiffusersPipeline(base).load(other)


def test_a_network_of_another_kind_is_one_line(folders):
    model = DiffusersPipeline(folders["ddim"])
    for path in (
        folders["dit"],
        folders["dit"] / "transformer",
        folders["ldm-kl"],
        Path("nowhere"),
    ):
        with pytest.raises(UserError) as error:
            model.load(path)
        one_line(error)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("conv_in.bias"), "Missing .*conv_in.bias"),
        (set_to(float("nan")), "conv_in.weight has values"),
    ],
    ids=["missing", "nan"],
)
def test_a_bad_file_of_tensors_is_one_line(folders, tmp_path, change, message):
    file = tmp_path / "net.safetensors"
    shutil.copy(folders["ddim"] / "unet" / WEIGHTS, file)
    spoil_tensors(file, change)
    model = DiffusersPipeline(folders["ddim"])
    with pytest.raises(UserError, match=message) as error:
        model.load(file)
    assert str(file) in one_line(error)


@pytest.mark.parametrize("guidance", [0.5, float("nan"), float("inf")])
def test_impossible_guidance_is_one_line(folders, guidance):
    with pytest.raises(UserError, match="guidance is"):
        DiffusersPipeline(folders["dit"], guidance)


@pytest.mark.parametrize("kind", ["ddpm", "ldm-kl"])
def test_guidance_without_a_null_class_is_one_line(folders, kind):
    with pytest.raises(UserError, match="needs a null class"):
        DiffusersPipeline(folders[kind], 2.0)


# --------------------- export


def contents(folder, part):
    """{file: bytes} of everything but the denoiser's folder and the recipe."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    kept = [f for f in files if f.parent.name != part and f.name != "adaptive-neon.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in kept}


@pytest.mark.parametrize("kind", ["ddpm", "ldm-vq", "dit"])
def test_export_is_the_pipeline_with_new_weights(folders, kind, tmp_path):
    folder, out = folders[kind], tmp_path / "deep/out"
    model = DiffusersPipeline(folder)
    part = "transformer" if kind == "dit" else "unet"
    before = contents(folder, "")
    net = model.load(folder)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    model.export(net, out, {"w": {"enc": 0.5}, "base": Path("somewhere")})

    # Read by the pipeline itself, and by us.
    labels = labels_of(model)
    images = images_of(model, net)
    own = own_call(out, labels=labels)
    torch.testing.assert_close(own, images / 2 + 0.5, rtol=0, atol=1e-6)
    again = DiffusersPipeline(out)
    assert torch.equal(images_of(again, again.load(out)), images)
    assert not torch.equal(images, images_of(model, model.load(folder)))

    # Nothing else is new, and the base is what it was.
    assert contents(out, part) == contents(folder, part)
    assert sorted(f.name for f in (out / part).iterdir()) == ["config.json", WEIGHTS]
    assert contents(folder, "") == before and list(out.parent.iterdir()) == [out]
    assert json.loads((out / "adaptive-neon.json").read_text())["w"] == {"enc": 0.5}


def test_export_leaves_old_weights_and_training_debris_behind(copied, tmp_path):
    folder = copied("ldm-kl")
    old = folder / "unet/diffusion_pytorch_model.bin"
    old.write_bytes(b"old")
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"old")
    (folder / "unet/diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    (folder / "original.ckpt").write_bytes(b"old")
    (folder / "README.md").write_text("a model card")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500/optimizer.bin").write_bytes(b"old")
    model = DiffusersPipeline(folder)
    model.export(model.load(folder), tmp_path / "out", {})
    names = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*")}
    assert "README.md" in names and f"unet/{WEIGHTS}" in names and f"vqvae/{WEIGHTS}" in names
    assert not any("old" in name or "fp16" in name or "500" in name for name in names)
    assert not names & {"original.ckpt", "unet/diffusion_pytorch_model.bin"}


def test_export_never_overwrites_what_it_did_not_write(copied, tmp_path):
    folder = copied("ddim")
    model = DiffusersPipeline(folder)
    net = model.load(folder)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("years")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").write_text("")
    (folder / "adaptive-neon.json").write_text("{}")  # a base of our own is no less the base
    (tmp_path / "adaptive-neon.json").write_text("{}")
    before = contents(folder, "")
    for path in (folder, tmp_path / "link", tmp_path, strange, tmp_path / "file", folder / "unet"):
        with pytest.raises(UserError, match="choose another folder") as error:
            model.export(net, path, {})
        one_line(error)
    assert contents(folder, "") == before and (strange / "thesis.tex").exists()


def test_export_replaces_its_own(folders, tmp_path):
    model = DiffusersPipeline(folders["ddim"])
    net = model.load(folders["ddim"])
    model.export(net, tmp_path / "out", {"w": 1})
    (tmp_path / "out/extra").write_text("of the first")
    with torch.no_grad():
        net.conv_in.bias += 1
    model.export(net, tmp_path / "out", {"w": 2})
    assert json.loads((tmp_path / "out/adaptive-neon.json").read_text()) == {"w": 2}
    assert not (tmp_path / "out/extra").exists()
    assert torch.equal(model.load(tmp_path / "out").conv_in.bias, net.conv_in.bias)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "where, name, error",
    [
        (Path, "write_bytes", OSError("the disk is full")),
        (safetensors.torch, "save", safetensors.SafetensorError("the disk is full")),
    ],
    ids=["weights", "safetensors"],
)
def test_a_failed_export_leaves_the_former_one(folders, tmp_path, monkeypatch, where, name, error):
    model = DiffusersPipeline(folders["ddim"])
    net = model.load(folders["ddim"])
    model.export(net, tmp_path / "out", {"w": 1})

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(where, name, full)
    with pytest.raises(UserError, match="out cannot be written, .*full"):
        model.export(net, tmp_path / "out", {"w": 2})
    assert json.loads((tmp_path / "out/adaptive-neon.json").read_text()) == {"w": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_tied_and_strided_parameters_are_written(folders, tmp_path):
    """A merge may hand over parameters that share storage or are views of one vector."""
    folder = folders["ddim"]
    model = DiffusersPipeline(folder)
    net = model.load(folder)
    net.time_embedding.linear_2.bias = net.time_embedding.linear_1.bias  # tied
    net.to(memory_format=torch.channels_last)
    flat = torch.randn(sum(p.numel() for p in net.mid_block.parameters()))
    start = 0
    for parameter in net.mid_block.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    model.export(net, tmp_path / "out", {})
    written = model.load(tmp_path / "out")
    for name, tensor in net.state_dict().items():
        assert torch.equal(written.state_dict()[name], tensor)


# --------------------- keys of cached results


def test_identity_is_of_all_but_the_denoisers_weights(folders, copied, tmp_path):
    reference = DiffusersPipeline(folders["dit"]).identity
    folder = copied("dit")
    weights = folder / "transformer" / WEIGHTS
    spoil_tensors(weights, lambda t: t["proj_out_1.bias"].add_(1))
    edit(folder / "scheduler/scheduler_config.json", _diffusers_version="0.1")
    model = DiffusersPipeline(folder)
    assert model.identity == reference


@pytest.mark.parametrize(
    "change",
    [
        lambda f: spoil_tensors(f / "vae" / WEIGHTS, lambda t: t["decoder.conv_in.bias"].add_(1)),
        lambda f: edit(f / "vae/config.json", scaling_factor=0.5),
        lambda f: edit(f / "vae/config.json", norm_num_groups=2),
        lambda f: edit(f / "transformer/config.json", norm_eps=1e-3),
        lambda f: edit(f / SCHEDULER, beta_end=0.03),
        lambda f: edit(f / SCHEDULER, timestep_spacing="trailing"),
        lambda f: edit(f / SCHEDULER, clip_sample=True),
    ],
    ids=["vae", "scale", "vae config", "denoiser config", "betas", "spacing", "clip"],
)
def test_identity_changes_with_the_folder(folders, copied, change):
    folder = copied("dit")
    change(folder)
    assert DiffusersPipeline(folder).identity != DiffusersPipeline(folders["dit"]).identity


def test_identity_changes_with_guidance_and_version(folders, monkeypatch):
    reference = DiffusersPipeline(folders["dit"]).identity
    assert DiffusersPipeline(folders["dit"], 2.0).identity != reference
    assert DiffusersPipeline(folders["dit"], 1).identity == reference
    monkeypatch.setattr(adapter, "VERSION", adapter.VERSION + 1)
    assert DiffusersPipeline(folders["dit"]).identity != reference


# --------------------- where the folder comes from


def test_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert adapter.resolve("owner/name") == Path("owner/name")
    assert adapter.resolve(tmp_path) == tmp_path
    for source in ("owner/other", "nothing", "a/b/c", "/nowhere/base", "../x"):
        with pytest.raises(UserError, match="no such file or folder"):
            adapter.resolve(source)


HUB = [
    *("model_index.json", "diffusion_pytorch_model.bin", "pytorch_lora_weights.safetensors"),
    *("unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/pytorch_model.bin"),
    *("tokenizer/merges.txt", "tokenizer_3/spiece.model"),
    # Not these: whole models for other programs.
    *("v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "text_encoder/flax_model.msgpack", "x.onnx"),
]


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def download(name, allow_patterns):
        asked.extend([name, *filter_repo_objects(HUB, allow_patterns=allow_patterns)])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert adapter.resolve("google/ddpm-cifar10-32") == tmp_path
    assert asked == ["google/ddpm-cifar10-32", *HUB[:-4]]


@pytest.mark.slow
def test_a_hub_id_without_connection_says_what_to_download(tmp_path):
    """In a process of its own, as the hub's client reads its settings once."""
    code = "from adaptive_neon.diffusers import resolve; resolve('google/ddpm-cifar10-32')"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    root = Path(adapter.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=offline, capture_output=True)
    last = run.stderr.decode().strip().splitlines()[-1]
    assert "UserError: google/ddpm-cifar10-32: no such folder" in last
    assert "hf download google/ddpm-cifar10-32 --local-dir FOLDER" in last


def test_without_diffusers_one_line_says_so(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install diffusers"):
        DiffusersPipeline(folders["ddim"])
