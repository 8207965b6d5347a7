"""The examples: what they share with the program, DINOv2 without its weights, tokens, one step."""

import copy
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edm_helpers import owners_of

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
    assert len(texts) == 7
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
    found[:, 0].sum().backward()  # the last layer normalises the sum of all
    assert found.shape == (2, 24) and images.grad.abs().sum() > 0


def drifted(name):
    """An example, a base whose every parameter matters, and its drifted relative."""
    example = load_adapter(name)
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(example.create().eval().requires_grad_(False))
    for p, q in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        p.lerp_(q, 0.8)
    return SimpleNamespace(example=example, base=nets[0], aux=nets[1])


# -------------------- tokens, one after the other


@pytest.fixture(scope="module")
def ar():
    return drifted("ar_glyphs")


NOISE = torch.randn(5, 36, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, 0, 9, 3, 5])


def chosen_tokens(logits_of, noise, labels, temperature=0.9, top_k=128):
    """One token after the other by the inverse distribution function, without any cache: the whole
    sequence goes through logits_of() [N, L] -> [N, L, 128] again every time."""
    sequence = 128 + labels[:, None]
    for i in range(noise.shape[1]):
        logits = logits_of(sequence)[:, -1].double().numpy() / temperature
        for row, values in enumerate(logits):
            values[np.argsort(-values)[top_k:]] = -np.inf
            logits[row] = values
        shares = np.exp(logits - logits.max(1, keepdims=True))
        upper = (shares / shares.sum(1, keepdims=True)).cumsum(1)
        uniform = [0.5 * (1 + math.erf(float(x) / 2**0.5)) for x in noise[:, i]]
        token = [int(np.searchsorted(row, u)) for row, u in zip(upper, uniform, strict=True)]
        sequence = torch.cat([sequence, torch.tensor(token)[:, None]], 1)
    return sequence[:, 1:]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.3}, {"temperature": 1.2, "top_k": 7}])
def test_ar_samples_by_the_inverse_distribution_function(ar, settings):
    images = ar.example.sample(ar.base, NOISE, LABELS, 1, **settings)
    want = chosen_tokens(ar.base, NOISE, LABELS, **settings)
    assert torch.equal(ar.example.encode(neon.sampling.to_pixels(images)), want)


def test_ar_can_be_guided(ar):
    """The keys and values of both networks are kept apart."""
    guided = neon.controls.Guided(ar.base, ar.aux)
    guided.w.fill_(0.7)
    images = ar.example.sample(guided, NOISE, LABELS, 1)

    def logits_of(sequence):
        return 1.7 * ar.base(sequence) - 0.7 * ar.aux(sequence)

    want = chosen_tokens(logits_of, NOISE, LABELS)
    assert torch.equal(ar.example.encode(neon.sampling.to_pixels(images)), want)


def test_ar_shares_are_those_of_the_network(ar):
    """20,000 first tokens against the softmax at this temperature."""
    noise = torch.randn(20_000, 36, generator=torch.Generator().manual_seed(1))
    ar.example.TOKENS, before = 1, ar.example.TOKENS
    decode, ar.example.decode = ar.example.decode, lambda tokens: tokens
    tokens = ar.example.sample(ar.base, noise, torch.full([20_000], 4), 1)
    ar.example.TOKENS, ar.example.decode = before, decode
    shares = (ar.base(torch.tensor([[132]]))[0, 0] / 0.9).softmax(0)
    found = torch.bincount(tokens[:, 0], minlength=128) / 20_000
    assert float((found - shares).abs().max()) < 4 * (float(shares.max()) / 20_000) ** 0.5


def test_ar_tokens_survive_pixels(ar):
    """What is sampled is what the self-training sees: every token, in every place."""
    tokens = torch.arange(128)[:, None].add(7 * torch.arange(36)) % 128
    pixels = neon.sampling.to_pixels(ar.example.decode(tokens)).to(torch.uint8)
    assert torch.equal(ar.example.encode(pixels), tokens)
    first = pixels[5, 0, :2, 2:4].flatten()  # the second patch of the first row
    assert torch.equal(first, ar.example.CODEBOOK[12])


def test_ar_codebook_is_near_to_glyphs(ar):
    images, _ = neon.glyphs.draw_glyphs(300, 1)
    again = neon.sampling.to_pixels(ar.example.decode(ar.example.encode(images)))
    assert float((again - images.float()).square().mean().sqrt()) < 12  # of 255


def test_ar_network_sees_no_later_token(ar):
    sequence = torch.randint(128, (1, 36))
    other = sequence.clone()
    other[0, 20] += 1
    ours, theirs = ar.base(sequence)[0], ar.base(other)[0]
    assert torch.equal(ours[:20], theirs[:20]) and not torch.equal(ours[20], theirs[20])


def test_ar_loss_is_nats_a_token(ar):
    tokens = torch.randint(128, (5, 36))
    past, total = {}, torch.zeros(5)
    before = 128 + LABELS
    for i in range(36):
        shares = ar.base(before[:, None], i, past)[:, 0].log_softmax(1)
        total -= shares[torch.arange(5), tokens[:, i]]
        before = tokens[:, i]
    torch.testing.assert_close(ar.example.loss(ar.base, tokens, LABELS), total / 36)


def test_ar_has_about_300_000_parameters(ar):
    assert 250_000 < sum(p.numel() for p in ar.base.parameters()) < 350_000


def test_ar_has_no_gradient_and_says_what_to_use(tmp_path):
    model = neon.modelfile.FileModel(EXAMPLES / "ar_glyphs.py")
    c = neon.config.Config(out=tmp_path, steps=1, search="gradient", train_base=1.0, device="cpu")
    with pytest.raises(neon.files.UserError, match="a gradient through.*use --search cobyqa"):
        model.start_check(model.create(None, None, c), c, trained=False)


def test_ar_is_accepted_and_controls_itself(tmp_path):
    model = neon.modelfile.FileModel(EXAMPLES / "ar_glyphs.py")
    c = neon.config.Config(out=tmp_path, steps=1, train_base=1.0, device="cpu")
    model.start_check(model.create(None, None, c), c, trained=False)
    temperatures = [row["temperature"] for row in model.controls["best temperature"]]
    assert min(temperatures) < 0.9 and 1.0 in temperatures and max(temperatures) > 1


@pytest.mark.parametrize("partition", ["paper", "layers"])
def test_ar_blocks_follow_the_depth(ar, partition):
    model = neon.modelfile.FileModel(EXAMPLES / "ar_glyphs.py")
    owners = owners_of(model, ar.base, partition)
    names = [name for name, _ in ar.base.named_parameters()]
    for name in names:
        part, number = name.split(".")[:2] if "." in name else (name, "")
        own = f"block {number}" if part == "blocks" else "embeddings"
        paper = {"0": "enc", "5": "dec"}.get(number, "mid") if part == "blocks" else "enc"
        if part in ("norm", "logits"):
            own, paper = "output", "dec"
        assert owners[name] == (paper if partition == "paper" else own), name


# -------------------- one evaluation an image


@pytest.fixture(scope="module")
def onestep():
    return drifted("onestep_glyphs")


PIXELS = torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(2))


def mean_velocity(net, x, t, s):
    """From one time to another, the same for all samples."""
    times = torch.full([2, len(x)], t, dtype=x.dtype)
    times[1] = s
    return net(x, times[0], times[1], LABELS)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_onestep_calls_the_network_once_a_step(onestep, steps):
    calls = []
    hook = onestep.base.register_forward_pre_hook(lambda *_: calls.append(True))
    onestep.example.sample(onestep.base, PIXELS, LABELS, steps)
    hook.remove()
    assert len(calls) == steps


def test_onestep_goes_from_noise_to_image(onestep):
    found = onestep.example.sample(onestep.base, PIXELS, LABELS, 1)
    torch.testing.assert_close(found, PIXELS + mean_velocity(onestep.base, PIXELS, 0, 1))


def test_onestep_in_two_goes_by_way_of_the_middle(onestep):
    found = onestep.example.sample(onestep.base, PIXELS, LABELS, 2)
    half = PIXELS + mean_velocity(onestep.base, PIXELS, 0, 0.5) / 2
    torch.testing.assert_close(found, half + mean_velocity(onestep.base, half, 0.5, 1) / 2)


def test_onestep_last_layer_gives_the_image(onestep):
    """No noise is left where it knows of none."""
    net = copy.deepcopy(onestep.base)
    net.pixels.weight.zero_()
    images = onestep.example.sample(net, PIXELS, LABELS, 1)
    want = net.pixels.bias.view(4, 4).tile(3, 3).expand(5, 1, 12, 12)
    torch.testing.assert_close(images, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("one, other", [((0, 1), (0, 0.8)), ((0, 0.8), (0.2, 1))])
def test_onestep_velocity_depends_on_both_times(onestep, one, other):
    apart = mean_velocity(onestep.base, PIXELS, *one) - mean_velocity(onestep.base, PIXELS, *other)
    assert float(apart.abs().max()) > 1e-2


def test_onestep_noise_can_be_scaled(onestep):
    found = onestep.example.sample(onestep.base, PIXELS, LABELS, 1, scale=0.8)
    want = onestep.example.sample(onestep.base, 0.8 * PIXELS, LABELS, 1)
    assert torch.equal(found, want)


def test_onestep_batches_do_not_matter(onestep):
    """A seed decides its image, whatever else is drawn beside it."""
    model = neon.Model(onestep.example.SHAPE, onestep.example.CLASSES, onestep.example.sample)
    whole, labels = neon.Sampler(model, onestep.base, steps=1, batch=7).images(range(7))
    parts, same = neon.Sampler(model, onestep.base, steps=1, batch=3).images([6, 5, 4, 3, 2, 1, 0])
    assert torch.equal(labels, same.flip(0))
    assert int((whole.int() - parts.flip(0).int()).abs().max()) <= 1  # rounding of a grey level
    assert len(whole.flatten(1).unique(dim=0)) == 7


def test_onestep_can_be_guided(onestep):
    """With one evaluation, outputs that step back are images that step back."""
    guided = neon.controls.Guided(onestep.base, onestep.aux)
    guided.w.fill_(0.7)
    found, ours, theirs = [
        onestep.example.sample(net, PIXELS, LABELS, 1)
        for net in (guided, onestep.base, onestep.aux)
    ]
    torch.testing.assert_close(found, 1.7 * ours - 0.7 * theirs, rtol=1e-4, atol=1e-4)


def drawn(seed=3):
    """What loss() draws: noise, and times t <= s [5], some of them equal."""
    torch.manual_seed(seed)
    noise = torch.randn(5, 1, 12, 12)
    instant = torch.rand(5) < 0.5
    t, left = torch.rand(2, 5)
    s = 1 - (1 - t**2) * left**2
    return noise, torch.where(instant, t, t**2), torch.where(instant, t, s)


def loss_at(example, net, x, labels, seed=3):
    torch.manual_seed(seed)
    return example.loss(net, x, labels)


def at(time, noise, x):
    """On the straight way from noise to image."""
    return noise.lerp(x, time[:, None, None, None])


def test_onestep_draws_instants_and_ways(onestep):
    _, t, s = drawn()
    assert 0 < int((s > t).sum()) < 5 and bool((s >= t).all()) and bool((s <= 1).all())


def test_onestep_loss_is_that_of_going_a_part_by_the_velocity(onestep):
    """Where the first tenth of the way leads by the image's own velocity, and the rest by the
    network, in float64; at an instant, plain flow matching."""
    found = loss_at(onestep.example, onestep.base, PIXELS, LABELS)
    noise, t, s = [part.double() for part in drawn()]
    net, x = copy.deepcopy(onestep.base).double(), PIXELS.double()

    there = t + (s - t) / 10
    end = at(there, noise, x)
    end = end + (s - there)[:, None, None, None] * net(end, there, s, LABELS)
    begin = at(t, noise, x)
    way = (end - begin) / (s - t)[:, None, None, None]
    left = 10 * (net(begin, t, s, LABELS) - way)
    plain = net(begin, t, s, LABELS) - (x - noise)
    left = torch.where((s > t)[:, None, None, None], left, plain)
    want = left.square().flatten(1).mean(1)
    torch.testing.assert_close(found.double(), want, rtol=1e-3, atol=1e-3)


def test_onestep_of_a_small_part_is_a_meanflow(onestep, monkeypatch):
    """u - (s - t) du/dt is the velocity, du/dt along the way: by differences, in float64."""
    noise, t, s = [part.double() for part in drawn()]
    net, x = copy.deepcopy(onestep.base).double(), PIXELS.double()
    change = net(at(t + 1e-5, noise, x), t + 1e-5, s, LABELS)
    change = (change - net(at(t - 1e-5, noise, x), t - 1e-5, s, LABELS)) / 2e-5
    left = net(at(t, noise, x), t, s, LABELS) - (s - t)[:, None, None, None] * change
    want = (left - (x - noise)).square().flatten(1).mean(1)

    monkeypatch.setattr(onestep.example, "PART", 1e-3)
    monkeypatch.setattr(torch, "randn_like", lambda _, draw=torch.randn_like: draw(PIXELS).double())
    found = loss_at(onestep.example, net, x, LABELS)
    torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-2)


def test_onestep_network_is_its_own_teacher(onestep):
    """Only the mean velocity learns, not what it is to be: the derivative by the last bias."""
    net = copy.deepcopy(onestep.base).requires_grad_()
    loss_at(onestep.example, net, PIXELS, LABELS).sum().backward()

    noise, t, s = drawn()
    there = t + (s - t) / 10
    rest = onestep.base(at(there, noise, PIXELS), there, s, LABELS)
    target = 0.1 * (PIXELS - noise) + 0.9 * rest
    left = onestep.base(at(t, noise, PIXELS), t, s, LABELS) - target
    patches = torch.nn.functional.unfold(left, onestep.example.PATCH, stride=onestep.example.PATCH)
    want = 2 / 0.1**2 / 144 * patches.sum((0, 2))
    torch.testing.assert_close(net.pixels.bias.grad, want, rtol=1e-3, atol=1e-3)


def test_onestep_loss_of_a_sample_is_its_own(onestep):
    other = PIXELS.clone()
    other[2] += 0.1
    plain = loss_at(onestep.example, onestep.base, PIXELS, LABELS)
    moved = loss_at(onestep.example, onestep.base, other, LABELS)
    asked = loss_at(onestep.example, onestep.base, PIXELS, LABELS.new_full([5], 3))
    assert ((plain - moved).abs() > 1e-4).tolist() == [False, False, True, False, False]
    assert ((plain - asked).abs() > 1e-4).tolist() == (LABELS != 3).tolist()


def test_onestep_has_200_000_to_500_000_parameters(onestep):
    assert 200_000 < sum(p.numel() for p in onestep.base.parameters()) < 500_000


@pytest.mark.parametrize("steps", [1, 2])
def test_onestep_is_accepted_with_its_gradient(tmp_path, steps):
    model = neon.modelfile.FileModel(EXAMPLES / "onestep_glyphs.py")
    fields = dict(out=tmp_path, steps=steps, search="gradient", train_base=1.0, device="cpu")
    c = neon.config.Config(**fields)
    model.start_check(model.create(None, None, c), c, trained=False)
    scales = [row["scale"] for row in model.controls["best noise scale"]]
    assert min(scales) < 1 < max(scales) and 1 not in scales


@pytest.mark.parametrize(
    "partition, want",
    [
        ("paper", ["enc", "enc", "mid", "mid", "dec", "dec"]),
        ("layers", ["embeddings", "block 0", "block 1", "block 2", "block 3", "output"]),
    ],
)
def test_onestep_blocks_follow_the_depth(onestep, partition, want):
    model = neon.modelfile.FileModel(EXAMPLES / "onestep_glyphs.py")
    places = {"patch": 0, "position": 0, "time": 0, "label": 0, "norm": 5, "pixels": 5}
    for name, owner in owners_of(model, onestep.base, partition).items():
        part, _, rest = name.partition(".")
        place = 1 + int(rest[0]) if part == "blocks" else places[part]
        assert owner == want[place], name


# -------------------- text
def test_text_glyphs_have_a_prompt_for_every_font_and_digit():
    """The prompt of an image names its digit, and its font's look; the stream is the one that the
    preset trains on."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    example, preset = load_adapter("text_glyphs"), edm.PRESETS["glyphs16"]
    assert (example.STREAM, example.SIZE) == (preset.streams["training"], preset.size)
    images, prompts = example.glyphs(300)
    drawn, digits = neon.glyphs.draw_glyphs(300, 0, 16)
    assert torch.equal(((images + 1) * 127.5).round().to(torch.uint8), drawn)
    assert len(set(example.PROMPTS)) == 140
    for number, digit in zip(prompts, digits, strict=True):
        assert neon.glyphs.digit_in(example.PROMPTS[number]) == digit

    # The bold fonts have the most ink.
    ink = {}
    for image, number in zip(images, prompts, strict=True):
        look = example.PROMPTS[number].split()[1]
        ink.setdefault(look, []).append(float(image.mean()))
    means = {look: np.mean(values) for look, values in ink.items()}
    assert means["bold"] > means["plain"] > means["thin"]


def test_text_glyphs_words_are_one_token_each(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    example = load_adapter("text_glyphs")
    words = example.write_tokenizer(tmp_path)
    rows = words(example.PROMPTS).input_ids
    assert {len(row) for row in rows} == {7} and len({tuple(row) for row in rows}) == 140


@pytest.fixture
def clip():
    """The judge with random weights, and a tokenizer that knows four words."""
    transformers = pytest.importorskip("transformers")
    judge = load_adapter("clip_judge")
    small = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ends = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 9, "max_position_embeddings": 8, **ends},
        vision_config={**small, "image_size": 224, "patch_size": 56},
        projection_dim=12,
    )
    net = transformers.CLIPModel(config).eval().requires_grad_(False)

    def words(prompt, **options):
        ids = torch.tensor([[0, *(2 + len(word) % 7 for word in prompt.split()), 1]])
        return transformers.BatchEncoding({"input_ids": ids})

    judge.network = lambda device: net
    judge.tokenizer = lambda: words
    return judge, net


def test_clip_judge_is_clips_own_cosine(clip):
    judge, net = clip
    images = torch.randint(256, (3, 1, 20, 20)).float()
    prompts = ["a thin one", "seven", "a thin one"]
    found = judge.alignment(images, prompts)
    x = torch.nn.functional.interpolate(
        images.expand(-1, 3, -1, -1) / 255, (224, 224), mode="bicubic", antialias=True
    ).clamp(0, 1)
    x = (x - torch.tensor(judge.MEAN).view(1, 3, 1, 1)) / torch.tensor(judge.STD).view(1, 3, 1, 1)
    for i, prompt in enumerate(prompts):
        ids = judge.tokenizer()(prompt)["input_ids"]
        logits = net(input_ids=ids, pixel_values=x[i : i + 1]).logits_per_image
        cosine = float(logits) / float(net.logit_scale.exp())
        assert float(found[i]) == pytest.approx(100 * max(cosine, 0), abs=1e-3)


def test_clip_judge_is_differentiable_and_of_unit_length(clip):
    judge, _ = clip
    images = torch.rand(2, 3, 20, 20).mul(255).requires_grad_()
    found = judge.features(images)
    found[:, 0].sum().backward()
    assert found.shape == (2, 12) and images.grad.abs().sum() > 0
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_text_glyphs_write_a_pipeline_that_is_read(tmp_path, monkeypatch):
    """Hardly trained: what its own call makes of a prompt is what the program makes of it."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    example = load_adapter("text_glyphs")
    monkeypatch.setattr(example, "IMAGES", 128)
    folder = tmp_path / "base"
    monkeypatch.setattr("sys.argv", ["x", str(folder), "--vae-epochs", "1", "--epochs", "1"])
    example.main()
    prompts = folder / "prompts.txt"
    assert prompts.read_text().splitlines() == example.PROMPTS

    fields = dict(base=str(folder), prompts=str(prompts), guidance=2.0, device="cpu", out=tmp_path)
    model = neon.text.open_pipeline(neon.config.Config(**fields))
    noise = torch.randn(2, *model.shape)
    with torch.no_grad():
        ours = model.sample(model.load(folder), noise, torch.tensor([7, 139]), 4)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    asked = [example.PROMPTS[7], example.PROMPTS[139]]
    options = dict(guidance_scale=2.0, num_inference_steps=4, output_type="pt")
    theirs = pipeline(asked, latents=noise, **options).images * 2 - 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
