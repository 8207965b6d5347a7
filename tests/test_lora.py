"""LoRA: trained, merged, read and written. The truth is what diffusers makes of the same file."""

import contextlib
import copy
import json

import pytest
import safetensors.torch
import torch

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

import text_pipelines as tiny  # noqa: E402
from test_text import PROMPTS, images_of, model_of, noise_of, text_folders  # noqa: E402, F401

import adaptive_neon as neon  # noqa: E402
from adaptive_neon import lora  # noqa: E402
from adaptive_neon.files import UserError  # noqa: E402
from adaptive_neon.text import open_pipeline  # noqa: E402
from adaptive_neon.train import Recipe, Training  # noqa: E402

KINDS = [*tiny.MAKERS]


def trained(model, base, seed=3, size=0.2):
    """A network whose LoRA is far from zero, as after a training."""
    net = model.trainable(base)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        if ".lora_" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return net


def outputs(model, net):
    """What a network says about two noises and prompts."""
    with torch.no_grad():
        times = torch.full((2,), 500.0 if model.flows() else 500)
        return model._predict(net.eval(), noise_of(model, 2), times, torch.tensor([0, 1]))


@pytest.fixture(scope="module")
def pair(text_folders, tmp_path_factory):  # noqa: F811
    """pair(kind, **options): the model, its base, and the snapshot of a LoRA; none of them to be
    changed."""
    made = {}

    def build(kind, rank=3, targets="attention", **options):
        key = (kind, rank, targets, *options)
        if key not in made:
            root = tmp_path_factory.mktemp("pair")
            (root / "prompts.txt").write_text("\n".join(PROMPTS))
            fields = dict(base=str(text_folders[kind]), prompts=str(root / "prompts.txt"))
            fields |= dict(lora_rank=rank, lora_targets=targets, device="cpu", out=root)
            model = open_pipeline(neon.config.Config(**fields, **options))
            base = model.load(text_folders[kind])
            path = root / "network-snapshot-000001.safetensors"
            model.save(trained(model, base), path, {"kimg": 1})
            made[key] = model, base, path
        return made[key]

    return build


# -------------------- training
@pytest.mark.parametrize("kind, targets, count", [("sd", "attention", 32), ("sd", "all", 79)])
def test_targets(text_folders, model_of, kind, targets, count):  # noqa: F811
    model = model_of(text_folders[kind], lora_rank=2, lora_targets=targets)
    assert len(model.targets) == count
    attention = [name for name in model.targets if ".attn" in name]
    assert len(attention) == 32 and any("to_out.0" in name for name in attention)
    convolutions = [name for name in model.targets if name.endswith("conv1")]
    assert bool(convolutions) == (targets == "all")


def test_the_last_norm_of_sd3_is_no_target(text_folders, model_of):  # noqa: F811
    """Scale and shift, which others keep as shift and scale: ComfyUI would add one to the other."""
    targets = model_of(text_folders["sd3"], lora_rank=2, lora_targets="all").targets
    norms = [name for name in targets if "norm1_context" in name]
    assert norms == [f"transformer_blocks.{i}.norm1_context.linear" for i in (0, 1)]
    assert "transformer_blocks.2.norm1.linear" in targets


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_alone_learns_and_begins_at_the_base(text_folders, model_of, kind):  # noqa: F811
    model = model_of(text_folders[kind], lora_rank=2, seed=5)
    base = model.load(text_folders[kind])
    net = model.trainable(base)
    learning = [name for name, p in net.named_parameters() if p.requires_grad]
    assert learning and all(".lora_" in name for name in learning)
    torch.testing.assert_close(outputs(model, net), outputs(model, base), rtol=0, atol=1e-6)
    moving = {name for name, p in base.named_parameters() if p.requires_grad}
    assert moving == {f"{name}.weight" for name in model.targets}

    # Its first factors follow from the training's seed, not from what was drawn before.
    torch.rand(7)
    again = dict(model.trainable(base).named_parameters())
    other = model_of(text_folders[kind], lora_rank=2, seed=6).trainable(base)
    name = next(name for name in learning if "lora_A" in name)
    assert torch.equal(net.get_parameter(name), again[name])
    assert not torch.equal(net.get_parameter(name), other.get_parameter(name))


def test_snapshots_hold_what_learns(pair):
    model, base, path = pair("sd", rank=2)
    tensors = safetensors.torch.load_file(path)
    names = {name.rsplit(".", 2)[0] for name in tensors}
    assert names == set(model.targets) and len(tensors) == 2 * len(names)
    assert all(2 in tensor.shape[:2] for tensor in tensors.values())


@pytest.mark.parametrize("kind, targets", [("sd", "all"), ("sd3", "all")])
def test_the_self_trained_network_is_the_merged_one(pair, kind, targets):
    """As peft and diffusers compute it: with the factors beside, and fused."""
    model, base, path = pair(kind, targets=targets)
    aux = model.load_like(base, path)
    beside = trained(model, base)
    torch.testing.assert_close(outputs(model, aux), outputs(model, beside), rtol=0, atol=2e-5)
    beside.fuse_lora()
    fused = {n.replace(".base_layer", ""): p for n, p in beside.named_parameters()}
    for name, parameter in aux.named_parameters():
        torch.testing.assert_close(parameter, fused[name], rtol=0, atol=1e-6)
    assert (outputs(model, aux) - outputs(model, base)).abs().max() > 0.05


def test_a_state_holds_what_learns_and_training_goes_on(pair, tmp_path):
    model, base, _ = pair("sd", rank=2)
    recipe = Recipe("self-training", 4, 1e-2, 0.0, 0.01, 1)
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(12) % 3
    processes = neon.processes.Processes("cpu")

    def training():
        return Training(model, model.trainable(base), 12, recipe, processes)

    with torch.no_grad():
        x = model.encode(images)
    whole, first = training(), training()
    average = dict(whole.average.named_parameters())
    for name, parameter in whole.net.named_parameters():
        assert (parameter is average[name]) == (".lora_" not in name), name
    for _ in range(2):
        whole.step(x, labels)
    first.step(x, labels)
    first.save(tmp_path / "state.safetensors")
    assert all(".lora_" in name for name in first.tensors())
    second = training()
    second.resume(tmp_path / "state.safetensors")
    second.step(x, labels)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    assert any(".lora_B" in name and t.abs().max() > 0 for name, t in whole.tensors().items())


# -------------------- merging
def test_merging_is_on_the_product(pair):
    """w = 0 is the base and -1 the self-trained network; twice a step is twice the product, where
    factors moved twice as far would give four times."""
    model, base, path = pair("sd", targets="all")
    aux = model.load_like(base, path)
    merger = neon.Merger(base, aux, lambda name: model.block(name, base, "paper"))
    assert set(merger.owners) == {f"{name}.weight" for name in model.targets}
    assert merger.blocks == ["enc", "mid", "dec"]
    tensors = safetensors.torch.load_file(path)
    w = {"enc": 2.0, "mid": 0.0, "dec": -1.0}
    found = dict(merger.set(w).named_parameters())
    for name, parameter in base.named_parameters():
        module = name.removesuffix(".weight")
        expected = parameter.detach().double()
        if module in model.targets:
            a, b = (tensors[f"{module}.lora_{side}.weight"].double() for side in "AB")
            if a.ndim == 4:
                step = torch.einsum("orij,rckl->ockl", b, a)
            else:
                step = torch.einsum("or,rc->oc", b, a)
            expected = expected - w[model.block(name, base, "paper")] * step
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)


# -------------------- files of others
def written_by_diffusers(model, base, folder, net):
    """The file that diffusers' own users write."""
    state = peft.utils.get_peft_model_state_dict(net)
    layers = "transformer_lora_layers" if model.flows() else "unet_lora_layers"
    model.pipeline.save_lora_weights(folder, **{layers: state})
    return folder / "pytorch_lora_weights.safetensors"


def loaded_by_diffusers(model, base, file):
    net = copy.deepcopy(base)
    found = model.pipeline.lora_state_dict(str(file))
    if model.flows():
        model.pipeline.load_lora_into_transformer(found, net)
    else:
        model.pipeline.load_lora_into_unet(*found, net)
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_diffusers(pair, tmp_path, kind):
    model, base, _ = pair(kind)
    net = trained(model, base)
    file = written_by_diffusers(model, base, tmp_path / "theirs", net)
    assert lora.is_lora(file) and lora.is_lora(file.parent)
    aux = model.load_like(base, file.parent)
    torch.testing.assert_close(outputs(model, aux), outputs(model, net), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "pattern, alpha", [("conv1", 10), ("down_blocks.*conv1", 10), ("onv1", 6), ("conv1|x", 10)]
)
def test_alpha_of_single_modules_is_found_as_in_peft(pattern, alpha):
    settings = {"lora_alpha": 6, "alpha_pattern": {pattern: 10, ".*": 6}}
    module = "down_blocks.1.resnets.0.conv1"
    assert lora.scale_for(module, 4, settings) == alpha / 4
    key = peft.utils.other.get_pattern_key(settings["alpha_pattern"], module)
    assert settings["alpha_pattern"][key] == alpha


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_folders_of_peft_with_another_alpha(pair, tmp_path, rslora):
    model, base, _ = pair("sd", rank=4)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["to_q", "to_v", "conv1"],
        alpha_pattern={"conv1": 10},
        init_lora_weights=False,
    )
    net = peft.get_peft_model(copy.deepcopy(base), config)
    net.save_pretrained(tmp_path / "theirs")
    assert lora.is_lora(tmp_path / "theirs")
    found = lora.read_lora(tmp_path / "theirs", base)
    aux = found.add_to(copy.deepcopy(base).requires_grad_(False))
    expected = outputs(model, net.merge_and_unload())
    torch.testing.assert_close(outputs(model, aux), expected, rtol=0, atol=2e-5)
    assert (expected - outputs(model, base)).abs().max() > 1e-2


def kohya(found, alpha, prefix="lora_unet_"):
    tensors = {}
    for module, (a, b) in found.factors.items():
        key = prefix + module.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind, alpha", [("sd", None), ("sd", 5), ("sdxl", 3)])
def test_files_of_kohya(pair, tmp_path, kind, alpha):
    """alpha is not r, or not there at all: then it is r."""
    model, base, path = pair(kind, targets="all" if kind == "sd" else "attention")
    found = model._read_lora(path, base)
    file = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(kohya(found, alpha), file)
    aux = model.load_like(base, file)
    expected = outputs(model, loaded_by_diffusers(model, base, file))
    torch.testing.assert_close(outputs(model, aux), expected, rtol=0, atol=2e-5)


# Stability's names, as ComfyUI lists them. Two layers a block: SDXL has three blocks, the first
# without attention, Stable Diffusion 1.5 four.
STABILITY = {
    "sdxl": {
        "input_blocks.0.0": "conv_in",
        "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.7.0.skip_connection": "down_blocks.2.resnets.0.conv_shortcut",
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q": (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        "input_blocks.8.1.proj_out": "down_blocks.2.attentions.1.proj_out",
        "middle_block.0.emb_layers.1": "mid_block.resnets.0.time_emb_proj",
        "middle_block.1.transformer_blocks.2.ff.net.0.proj": (
            "mid_block.attentions.0.transformer_blocks.2.ff.net.0.proj"
        ),
        "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
        "output_blocks.2.1.transformer_blocks.1.attn2.to_out.0": (
            "up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_out.0"
        ),
        "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.8.0.in_layers.2": "up_blocks.2.resnets.2.conv1",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "time_embed.2": "time_embedding.linear_2",
        "out.2": "conv_out",
    },
    "sd": {
        "input_blocks.1.1.proj_in": "down_blocks.0.attentions.0.proj_in",
        "input_blocks.10.0.in_layers.2": "down_blocks.3.resnets.0.conv1",
        "input_blocks.11.0.out_layers.3": "down_blocks.3.resnets.1.conv2",
        "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks.11.1.transformer_blocks.0.attn2.to_v": (
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v"
        ),
    },
}
ACROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
LARGE = {
    "sdxl": dict(
        block_out_channels=(8, 8, 16),
        kinds=(PLAIN, ACROSS, ACROSS),
        transformer_layers_per_block=(1, 2, 3),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
    ),
    "sd": dict(block_out_channels=(8, 8, 8, 8), kinds=(ACROSS, ACROSS, ACROSS, PLAIN)),
}


def large(kind):
    """A U-Net with the blocks of the published one."""
    options = dict(LARGE[kind])
    kinds = options.pop("kinds")
    options["down_block_types"] = tuple(name.format("Down") for name in kinds)
    options["up_block_types"] = tuple(name.format("Up") for name in kinds[::-1])
    return tiny.unet(layers_per_block=2, sample_size=16, **options)


def of_all(net, rank=2):
    """A LoRA of every linear and convolutional module."""
    torch.manual_seed(3)
    factors = {}
    for name, module in net.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            out, *rest = module.weight.shape
            ones = [1] * (len(rest) - 1)
            factors[name] = torch.randn(rank, *rest), torch.randn(out, rank, *ones)
    return lora.Lora(factors)


@pytest.fixture(scope="module")
def larges():
    return {kind: large(kind).requires_grad_(False) for kind in LARGE}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("form", ["kohya", "comfy"])
def test_stabilitys_names_count_layers_through(larges, tmp_path, kind, form):
    """On which kohya trains SDXL, and in which ComfyUI saves what it extracts."""
    net, found = larges[kind], of_all(larges[kind])
    tensors = {}
    for theirs, module in STABILITY[kind].items():
        a, b = found.factors[module]
        key = f"diffusion_model.{theirs}"
        if form == "kohya":
            key = f"lora_unet_{theirs.replace('.', '_')}"
            tensors[f"{key}.alpha"] = torch.tensor(5.0)
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors")
    read = lora.read_lora(tmp_path / "theirs.safetensors", net)
    assert set(read.factors) == set(STABILITY[kind].values()) and not read.notes
    scale = 2.5 if form == "kohya" else 1
    for module, (a, b) in read.factors.items():
        torch.testing.assert_close(b, found.factors[module][1] * scale)
        assert torch.equal(a, found.factors[module][0])


@pytest.mark.slow
def test_kohyas_files_of_xl_are_read_as_diffusers_reads_them(larges, tmp_path):
    """All modules inside the blocks in Stability's names."""
    net, found = larges["sdxl"], of_all(larges["sdxl"])
    names = {name: lora.stability_name(name, net) for name in found.factors}
    inside = {m: f for m, f in found.factors.items() if m.startswith(lora.BLOCKS)}
    renamed = {names[module]: pair for module, pair in inside.items()}
    assert len(renamed) == len(inside) > 200
    file = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(kohya(lora.Lora(renamed), 3), file)
    ours = lora.read_lora(file, net).add_to(copy.deepcopy(net))
    theirs = copy.deepcopy(net)
    pipeline = diffusers.StableDiffusionXLPipeline
    state, alphas = pipeline.lora_state_dict(str(file), unet_config=net.config)
    pipeline.load_lora_into_unet(state, alphas, theirs)
    theirs.fuse_lora()
    fused = {n.replace(".base_layer", ""): p for n, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, fused[name], rtol=1e-5, atol=1e-5)


# How files of others name the same module of each denoiser, and the ends of its factors.
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
JOINT = "transformer_blocks.1.attn.add_k_proj"
OTHERS = [
    ("sd", Q, "unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    ("sd", OUT, "unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    ("sd", Q, "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    ("sd", Q, "{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    ("sd", Q, "lycoris_{_}.lora_down.weight", "lycoris_{_}.lora_up.weight"),
    ("sd3", JOINT, "transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    ("sd3", JOINT, "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    ("sd3", JOINT, "lora_transformer_{_}.lora_down.weight", "lora_transformer_{_}.lora_up.weight"),
]
# Of diffusers' first files, which name the processor of an attention.
FIRST_FILES = [
    (Q, Q.replace("to_q", "processor.to_q_lora")),
    (OUT, OUT.replace("to_out.0", "processor.to_out_lora")),
]
for module, named in FIRST_FILES:
    for prefix in ("", "unet."):
        whole = f"{prefix}{named}"
        OTHERS.append(("sd", module, f"{whole}.down.weight", f"{whole}.up.weight"))


@pytest.mark.parametrize("kind, module, down, up", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_names_and_types_of_others(pair, tmp_path, kind, module, down, up, dtype):
    model, base, path = pair(kind)
    a, b = model._read_lora(path, base).factors[module]
    ends = [end.replace("{_}", module.replace(".", "_")).format(module) for end in (down, up)]
    tensors = dict(zip(ends, (a.to(dtype), b.to(dtype)), strict=True))
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors")
    read = lora.read_lora(tmp_path / "theirs.safetensors", base)
    assert [*read.factors] == [module]
    for ours, theirs in zip(read.factors[module], (a, b), strict=True):
        assert torch.equal(ours, theirs.to(dtype).float())


@pytest.mark.parametrize("prefix", ["lora_te2", "text_encoder", "te"])
def test_what_is_left_out_is_said_once(pair, text_folders, model_of, tmp_path, capsys, prefix):  # noqa: F811
    """Text encoders' parts, or modules of another network: the rest is used, as other tools do."""
    model, base, path = pair("sd")
    tensors = kohya(model._read_lora(path, base), 3)
    module = f"{prefix}_text_model_encoder_layers_0_mlp_fc1"
    tensors[f"{module}.lora_down.weight"] = torch.ones(3, 16)
    tensors[f"{module}.lora_up.weight"] = torch.ones(32, 3)
    file = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(tensors, file)
    other = model_of(text_folders["sd"], aux=str(file))
    net = other.load_like(base, file)
    torch.testing.assert_close(outputs(model, net), outputs(model, model.load_like(base, path)))
    what = "changes in text encoders (2 tensors) is left out"
    if prefix == "te":
        what = f"1 of its 33 modules are none of the base's and left out, first: {module}"
    assert capsys.readouterr().out.count("left out") == 1
    assert what in other.notes[-1] and str(file) in other.notes[-1]


KEYS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"  # [8, 16]
INPUT = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"  # FIRST, once more
FIRST = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    "change, message",
    [
        ({f"{FIRST}.dora_scale": torch.ones(8)}, "is DoRA"),
        ({f"{FIRST}.hada_w1_a": torch.ones(8)}, "is LoHa"),
        ({f"{FIRST}.lokr_w1": torch.ones(8)}, "is LoKr"),
        ({f"{FIRST}.lora_mid.weight": torch.ones(8)}, "with a core"),
        ({f"{FIRST}.diff_b": torch.ones(8)}, "full differences"),
        ({f"{FIRST}.lora_up.weight": None}, "pairs of factors"),
        ({f"{FIRST}.lora_up.weight": torch.ones(8, 5)}, "do not fit each other"),
        ({f"{FIRST}.oft_blocks": torch.ones(8)}, "is OFT"),
        ({"base_model.model.x.oft_R.default.weight": torch.ones(8)}, "is OFT"),
        ({f"{FIRST}.lora_up.weight": torch.ones(8, 3, 2, 2)}, "do not fit each other"),
        ({f"{FIRST}.lora_up.weight": torch.tensor(1.0)}, "do not fit each other"),
        (
            {
                f"{FIRST}.lora_down.weight": torch.ones(0, 8),
                f"{FIRST}.lora_up.weight": torch.ones(8, 0),
            },
            "do not fit each other",
        ),
        ({f"{FIRST}.lora_up.weight": torch.ones(9, 3)}, "has other sizes"),
        (
            {
                f"{KEYS}.lora_down.weight": torch.ones(3, 8),
                f"{KEYS}.lora_up.weight": torch.ones(16, 3),
            },
            "has other sizes",
        ),
        (
            {
                f"{INPUT}.lora_down.weight": torch.ones(3, 8),
                f"{INPUT}.lora_up.weight": torch.ones(8, 3),
            },
            "stands there under two names",
        ),
        ({f"{FIRST}.lora_up.weight": torch.full((8, 3), float("nan"))}, "not finite"),
        ({"lora_unet_more.lora_up.weight": torch.ones(8, 3)}, "more"),
        ({"something": torch.ones(8)}, "something is no part of a LoRA"),
    ],
)
def test_what_is_refused(pair, tmp_path, change, message):
    model, base, path = pair("sd")
    tensors = kohya(model._read_lora(path, base), 3)
    for name, tensor in change.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    file = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(UserError, match=message) as error:
        model.load_like(base, file)
    assert "\n" not in str(error.value) and "theirs.safetensors" in str(error.value)


def test_a_lora_for_another_model(pair, tmp_path):
    model, base, path = pair("sd")
    tensors = kohya(model._read_lora(path, base), 3)
    file = tmp_path / "theirs.safetensors"
    other = {name.replace("attentions", "others"): t for name, t in tensors.items()}
    safetensors.torch.save_file(other, file)
    with pytest.raises(UserError, match="no module of the base, nor is any other: is it a LoRA"):
        model.load_like(base, file)

    # Nor does a snapshot of ours fit another network.
    other, net, _ = pair("sd3")
    with pytest.raises(UserError, match="no module of the base, nor is any other"):
        other.load_like(net, path)


def test_text_encoders_alone_are_no_lora_for_a_base(pair, tmp_path):
    model, base, path = pair("sd")
    named = {"lora_te_x": [*model._read_lora(path, base).factors.values()][0]}
    tensors = {n.removeprefix("lora_unet_"): t for n, t in kohya(lora.Lora(named), 3).items()}
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match="text encoders alone, which do not move here"):
        model.load_like(base, tmp_path / "theirs.safetensors")


def test_a_kernel_of_one_is_a_linear_layer(pair, tmp_path):
    """Projections of Stable Diffusion 1's transformers are convolutions, of 2's are linear; files
    of both are around for both."""
    model, base, path = pair("sd")
    module = FIRST.removeprefix("lora_unet_")
    tensors = {n: t for n, t in kohya(model._read_lora(path, base), 3).items() if module in n}
    for name, tensor in tensors.items():
        tensors[name] = tensor[..., None, None] if tensor.ndim else tensor
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors")
    found = lora.read_lora(tmp_path / "theirs.safetensors", base)
    whole = model._read_lora(path, base)
    for name in found.factors:
        shape = base.get_submodule(name).weight.shape
        torch.testing.assert_close(found.step(name, shape), whole.step(name, shape))
    assert len(found.factors) == 1


def test_a_checkpoint_is_no_lora(tmp_path):
    """Its names hold ".diffusion", which is no ".diff"."""
    name = "model.diffusion_model.input_blocks.0.0.weight"
    safetensors.torch.save_file({name: torch.ones(2)}, tmp_path / "v1-5.safetensors")
    assert not lora.is_lora(tmp_path / "v1-5.safetensors")


def test_dora_of_peft_is_refused(pair, tmp_path):
    model, base, _ = pair("sd")
    config = peft.LoraConfig(r=4, target_modules=["to_q"], use_dora=True)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="is DoRA"):
        model.load_like(base, tmp_path / "theirs")


def test_anyones_lora_alone_decides_what_moves(pair, text_folders, model_of, tmp_path):  # noqa: F811
    """--aux FILE, without --lora-rank."""
    model, base, path = pair("sd")
    found = model._read_lora(path, base)
    some = lora.Lora(dict([*found.factors.items()][:5]))
    file = tmp_path / "somebody.safetensors"
    safetensors.torch.save_file(kohya(some, 3), file)
    other = model_of(text_folders["sd"], aux=str(file))
    base = other.load(text_folders["sd"])
    merger = neon.Merger(base, other.load_like(base, file), other.layer)
    assert set(merger.owners) == {f"{name}.weight" for name in some.factors}
    assert all(row["drift"] > 0 for row in merger.table().values())

    # Whatever rank is asked for; and where a whole network is given, all weights move.
    again = model_of(text_folders["sd"], aux=str(file), lora_rank=2)
    assert again.moving == other.moving and not again.targets
    whole = model_of(text_folders["sd"], aux=str(text_folders["sd"]), lora_rank=2)
    assert not whole.moving


# -------------------- the file that comes out
def export_of(model, base, path, w, out):
    aux = model.load_like(base, path)
    merger = neon.Merger(base, aux, lambda name: model.block(name, base, "paper"))
    merger.attach(copy.deepcopy(base))
    model.export_merged(merger, w, out, {"w": w})
    return merger, out


W = {"enc": 1.5, "mid": -0.5, "dec": 0.75}


@pytest.mark.parametrize("kind, targets", [("sd", "all"), ("sdxl", "attention"), ("sd3", "all")])
def test_the_file_is_the_merged_network(text_folders, pair, tmp_path, kind, targets):  # noqa: F811
    """For the whole pipeline of a user: pipe.load_lora_weights(), and half of it at 0.5."""
    model, base, path = pair(kind, targets=targets)
    merger, out = export_of(model, base, path, W, tmp_path / "out")
    parts = dict(text_encoder_3=None, tokenizer_3=None) if kind == "sd3" else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(text_folders[kind], **parts)
    pipeline.load_lora_weights(out, weight_name="repair.safetensors")
    net = getattr(pipeline, model.denoiser)
    merged = outputs(model, merger.set(W))
    torch.testing.assert_close(outputs(model, net), merged, rtol=0, atol=5e-5)
    assert (merged - outputs(model, base)).abs().max() > 0.05
    found = [name for name, module in net.named_modules() if hasattr(module, "lora_A")]
    assert sorted(found) == sorted(model.targets)

    pipeline.set_adapters(pipeline.get_active_adapters(), [0.5])
    half = outputs(model, merger.set({block: value / 2 for block, value in W.items()}))
    torch.testing.assert_close(outputs(model, net), half, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_a_file_of_all_modules_comes_out_as_it_went_in(text_folders, model_of, tmp_path, kind):  # noqa: F811
    """Also of those outside the blocks, whose names are exceptions."""
    folder = text_folders[kind]
    part = "transformer" if kind == "sd3" else "unet"
    found = of_all(model_of(folder).load(folder))
    some = [name for name in found.factors if not name.startswith(lora.BLOCKS)]
    some += [*found.factors][::7]
    assert len(some) > 10
    tensors = {}
    for module in some:
        a, b = found.factors[module]
        tensors[f"{part}.{module}.lora_A.weight"] = 0.1 * a
        tensors[f"{part}.{module}.lora_B.weight"] = b
    file = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(tensors, file)
    model = model_of(folder, aux=str(file))
    base = model.load(folder)
    merger, out = export_of(model, base, file, W, tmp_path / "out")
    net = loaded_by_diffusers(model, base, out / "repair.safetensors")
    merged = outputs(model, merger.set(W))
    torch.testing.assert_close(outputs(model, net), merged, rtol=0, atol=1e-4)
    loaded = [name for name, module in net.named_modules() if hasattr(module, "lora_A")]
    assert set(loaded) == set(some)


def test_names_sizes_and_recipe_of_the_file(pair, tmp_path):
    model, base, path = pair("sd", rank=3)
    _, out = export_of(model, base, path, W, tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == [
        "adaptive-neon.json",
        "repair.safetensors",
    ]
    tensors = safetensors.torch.load_file(out / "repair.safetensors")
    assert len(tensors) == 3 * len(model.targets)
    assert {float(t) for name, t in tensors.items() if name.endswith(".alpha")} == {3.0}
    assert all(name.startswith("lora_unet_") for name in tensors)
    assert json.loads((out / "adaptive-neon.json").read_text())["w"] == W

    # And read back by ourselves it is the network that was meant.
    back = lora.read_lora(out / "repair.safetensors", base)
    own = outputs(model, back.add_to(copy.deepcopy(base).requires_grad_(False)))
    aux = model.load_like(base, path)
    merger = neon.Merger(base, aux, lambda name: model.block(name, base, "paper"))
    torch.testing.assert_close(own, outputs(model, merger.set(W)), rtol=0, atol=2e-5)


def test_the_whole_pipeline_on_request(pair, tmp_path):  # noqa: F811
    model, base, path = pair("sd", export_merged=True)
    merger, out = export_of(model, base, path, W, tmp_path / "out")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out.with_name("out-merged"))
    merged = outputs(model, merger.set(W))
    assert torch.equal(outputs(model, pipeline.unet), merged)


def flipped(found):
    return lora.Lora({module: (a, -b) for module, (a, b) in found.factors.items()})


def one_flipped(found):
    factors = dict(found.factors)
    module = [*factors][7]
    factors[module] = (factors[module][0], -factors[module][1])
    return lora.Lora(factors)


def one_nowhere(found):
    """A module whose weight is zero, under a name that nobody loads."""
    a, b = [*found.factors.values()][0]
    return lora.Lora({**found.factors, "down_blocks.0.nowhere": (a.clone(), 0 * b)})


def one_dropped(found):
    return lora.Lora(dict([*found.factors.items()][1:]))


@pytest.mark.parametrize(
    "kind, fault",
    [
        ("sd", one_flipped),
        ("sd", one_dropped),
        ("sd", one_nowhere),
        ("sd3", flipped),
        ("sd3", one_dropped),
    ],
)
def test_a_file_that_is_another_network_is_not_called_written(
    pair, tmp_path, monkeypatch, fault, kind
):
    model, base, path = pair(kind, targets="all")
    write = lora.write_lora
    monkeypatch.setattr(
        "adaptive_neon.text.write_lora", lambda found, *rest: write(fault(found), *rest)
    )
    with pytest.raises(AssertionError, match="repair.safetensors"):
        export_of(model, base, path, W, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_alpha_that_is_not_r_is_noticed(pair, tmp_path, monkeypatch):
    """The trap of files that state another alpha than the one that was folded in."""
    model, base, path = pair("sd")

    def other_alpha(found, path, transformer):
        safetensors.torch.save_file(kohya(found, 7), path)

    monkeypatch.setattr("adaptive_neon.text.write_lora", other_alpha)
    with pytest.raises(AssertionError, match="comes back .* away"):
        export_of(model, base, path, W, tmp_path / "out")


def test_no_step_at_all_is_a_file_too(pair, tmp_path):
    model, base, path = pair("sd")
    merger, out = export_of(model, base, path, dict.fromkeys(W, 0.0), tmp_path / "out")
    tensors = safetensors.torch.load_file(out / "repair.safetensors")
    assert all(not t.any() for name, t in tensors.items() if name.endswith("lora_up.weight"))


# -------------------- a whole run
@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A pipeline of grey glyphs, and runs of it in this process: study(out, *options) -> entry."""
    import edm_neon as edm

    root = tmp_path_factory.mktemp("studies")
    coder = tiny.vae(in_channels=1, out_channels=1)
    folder = tiny.sd(root / "base", net=tiny.unet(), coder=coder)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    small = (
        *("--preset", "glyphs16", "--base", folder, "--prompts", root / "prompts.txt"),
        *("--judge", "pixels", "--snapshot", "1", "--lr", "1e-2", "--steps", "3", "--grid", "0.5"),
        *("--synthetic", "40", "--select-images", "40", "--final-images", "40"),
        *("--guidance", "2", "--batch", "32", "--controls", "own"),
    )

    def run(out, *options):
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(edm.Glyphs, "images", dict.fromkeys(edm.Glyphs.images, 200))
            patch.setattr(neon.glyphs.GlyphsClassifier, "fit", lambda *args: None)
            edm.main([*map(str, (*small, *options)), "--out", str(out)])
        return json.loads((out / "summary.json").read_text())["snapshots"][0]

    return folder, run


@pytest.mark.slow
def test_a_study_from_prompts_to_a_file(studies, tmp_path):
    folder, study = studies
    out = tmp_path / "run"
    layers = ("--partition", "layers", "--search", "gradient", "--evaluations", "2")
    entry = study(out, "--lora-rank", 2, *layers)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert layer in entry["searched"]["w"] and layer in entry["blocks"]
    assert all(row["drift"] > 0 for row in entry["blocks"].values())
    assert "base, guidance" in entry["final"]
    assert 0 <= entry["final"]["base"]["alignment"]["value"] <= 1
    assert any("--final-prompts" in note for note in entry["warnings"])
    (file,) = out.glob("adaptive-neon-000001/repair.safetensors")
    (snapshot,) = out.glob("self-*/network-snapshot-000001.safetensors")
    assert snapshot.stat().st_size < 100_000
    (state,) = out.glob("self-*/training-state.safetensors")
    assert state.stat().st_size < 500_000


@pytest.mark.slow
def test_a_study_of_a_file_alone(studies, tmp_path):
    """The snapshot of a LoRA as --aux scores as it did where it was trained, and everything that a
    critic asks for is there."""
    folder, study = studies
    entry = study(tmp_path / "run", "--lora-rank", 2, "--controls", "steps,guided,own")
    assert {"base, guidance", "guided", "base, twice the steps"} <= set(entry["final"])
    (snapshot,) = tmp_path.glob("run/self-*/network-snapshot-000001.safetensors")
    again = study(tmp_path / "again", "--aux", snapshot)
    assert again["collapsed"]["fd"] == pytest.approx(entry["collapsed"]["fd"], rel=1e-6)


@pytest.mark.slow
def test_a_study_of_all_weights(studies, tmp_path):
    folder, study = studies
    out = tmp_path / "run"
    entry = study(out, "--controls", "none")
    assert set(entry["blocks"]) == {"enc", "mid", "dec"}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out / "adaptive-neon-000001")
    assert pipeline.text_encoder is not None
