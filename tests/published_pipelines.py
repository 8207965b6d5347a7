"""Folders as Stable Diffusion 1.5 and 2.1 (v), SDXL base and SD3 medium are published: the same
files with the same keys, around tiny networks."""

import json

import diffusers
import safetensors.torch
import torch
import transformers
from text_pipelines import LENGTH, away, vocabulary

OLD = {"_diffusers_version": "0.10.0.dev0"}  # below 0.9 its pipeline takes small sizes for errors
XL = {"_diffusers_version": "0.19.0.dev0"}
THREE = {"_diffusers_version": "0.29.0.dev0"}
TRANSFORMERS = {"transformers_version": "4.22.0.dev0", "torch_dtype": "float32"}


def parts(library="transformers", **classes):
    return {name: [library, kind] for name, kind in classes.items()}


# -------------------- what the files say
INDEX = {
    "sd15": {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.6.0",
        **parts(feature_extractor="CLIPImageProcessor", text_encoder="CLIPTextModel"),
        **parts("stable_diffusion", safety_checker="StableDiffusionSafetyChecker"),
        **parts(tokenizer="CLIPTokenizer"),
        **parts(
            "diffusers",
            scheduler="PNDMScheduler",
            unet="UNet2DConditionModel",
            vae="AutoencoderKL",
        ),
    },
    "sd21": {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.8.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        **parts(text_encoder="CLIPTextModel", tokenizer="CLIPTokenizer"),
        **parts(
            "diffusers",
            scheduler="DDIMScheduler",
            unet="UNet2DConditionModel",
            vae="AutoencoderKL",
        ),
    },
    "sdxl": {
        "_class_name": "StableDiffusionXLPipeline",
        **XL,
        "add_watermarker": None,
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": True,
        "image_encoder": [None, None],
        **parts(text_encoder="CLIPTextModel", text_encoder_2="CLIPTextModelWithProjection"),
        **parts(tokenizer="CLIPTokenizer", tokenizer_2="CLIPTokenizer"),
        **parts(
            "diffusers",
            scheduler="EulerDiscreteScheduler",
            unet="UNet2DConditionModel",
            vae="AutoencoderKL",
        ),
    },
    "sd3": {
        "_class_name": "StableDiffusion3Pipeline",
        **THREE,
        **parts(
            text_encoder="CLIPTextModelWithProjection",
            text_encoder_2="CLIPTextModelWithProjection",
            text_encoder_3="T5EncoderModel",
            tokenizer="CLIPTokenizer",
            tokenizer_2="CLIPTokenizer",
            tokenizer_3="T5TokenizerFast",
        ),
        **parts(
            "diffusers",
            scheduler="FlowMatchEulerDiscreteScheduler",
            transformer="SD3Transformer2DModel",
            vae="AutoencoderKL",
        ),
    },
}

BETAS = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SCHEDULER = {
    "sd15": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **BETAS},
    "sd21": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        **BETAS,
        "prediction_type": "v_prediction",
    },
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        **XL,
        **BETAS,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
    "sd3": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        **THREE,
        "num_train_timesteps": 1000,
        "shift": 3.0,
    },
}

FIRST_UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 2,
    "block_out_channels": [8, 16],
    "center_input_sample": False,
    "cross_attention_dim": 16,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 4,
    "out_channels": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
DENOISER = {
    "sd15": {**FIRST_UNET, **OLD},
    "sd21": {
        **FIRST_UNET,
        **OLD,
        "attention_head_dim": [2, 4],
        "dual_cross_attention": False,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "sdxl": {
        **FIRST_UNET,
        **XL,
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 4,
        "attention_head_dim": [1, 2, 2],
        "block_out_channels": [8, 16, 16],
        "class_embed_type": None,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_dim": 32,
        "cross_attention_norm": None,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "projection_class_embeddings_input_dim": 16 + 6 * 4,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "transformer_layers_per_block": [1, 1, 2],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "upcast_attention": None,
        "use_linear_projection": True,
    },
    "sd3": {
        "_class_name": "SD3Transformer2DModel",
        **THREE,
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "in_channels": 4,
        "joint_attention_dim": 32,
        "num_attention_heads": 2,
        "num_layers": 3,
        "out_channels": 4,
        "patch_size": 2,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 8,
        "sample_size": 8,
    },
}

FIRST_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 16,
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
}
VAE = {
    "sd15": {**FIRST_VAE, "_diffusers_version": "0.6.0"},
    "sd21": {**FIRST_VAE, "_diffusers_version": "0.8.0", "_name_or_path": "hf-models/vae-768k"},
    "sdxl": {
        **FIRST_VAE,
        **XL,
        "_name_or_path": "../sdxl-vae/",
        "force_upcast": True,
        "latents_mean": None,
        "latents_std": None,
        "scaling_factor": 0.13025,
    },
    "sd3": {
        **FIRST_VAE,
        **THREE,
        "force_upcast": True,
        "latents_mean": None,
        "latents_std": None,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
}


def clip(kind, **changes):
    return {
        "architectures": [kind],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 32,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": LENGTH,
        "model_type": "clip_text_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "pad_token_id": 1,
        "projection_dim": 16,
        "vocab_size": len(vocabulary()[0]),
        **TRANSFORMERS,
        **changes,
    }


T5 = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 32,
    "d_kv": 8,
    "d_model": 32,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": 64,
}
ENCODERS = {
    "sd15": {"text_encoder": clip("CLIPTextModel", _name_or_path="openai/clip-vit-large-patch14")},
    "sd21": {"text_encoder": clip("CLIPTextModel", hidden_act="gelu")},
    "sdxl": {
        "text_encoder": clip("CLIPTextModel"),
        "text_encoder_2": clip("CLIPTextModelWithProjection", hidden_act="gelu"),
    },
    "sd3": {
        "text_encoder": clip("CLIPTextModelWithProjection"),
        "text_encoder_2": clip("CLIPTextModelWithProjection", hidden_act="gelu"),
        "text_encoder_3": T5,
    },
}


# -------------------- written
def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2))


def write_tokenizer(folder, pad):
    """Without the tokenizer.json that newer programs add."""
    tokens, merges = vocabulary()
    write(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    form = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {"pad_token": pad}
    for name, word in (("bos", "startoftext"), ("eos", "endoftext"), ("unk", "endoftext")):
        special[f"{name}_token"] = {"content": f"<|{word}|>", **form}
    write(folder / "special_tokens_map.json", special)
    marked = {}
    for name, token in special.items():
        marked[name] = token if name == "pad_token" else {"__type": "AddedToken", **token}
    more = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    more |= {"model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    more |= {"special_tokens_map_file": "./special_tokens_map.json", "name_or_path": "x"}
    write(folder / "tokenizer_config.json", {**more, **marked})


def write_t5_tokenizer(folder):
    import tokenizers

    words = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    pieces = [(word, -float(i > 2)) for i, word in enumerate(words)]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write(folder / "special_tokens_map.json", special)
    more = {"extra_ids": 0, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    write(folder / "tokenizer_config.json", {**more, **special})


def write_weights(place, stem, net, variant="", shards=1, half=False, names=None):
    """One file or several with an index, as they are named on the hub."""
    tensors = {}
    for name, tensor in net.state_dict().items():
        for new, old in (names or {}).items():
            name = name.replace(new, old)
        whole = not half or not tensor.is_floating_point()
        tensors[name] = tensor.clone() if whole else tensor.half()
    dot = f".{variant}" if variant else ""
    if shards == 1:
        safetensors.torch.save_file(
            tensors, place / f"{stem}{dot}.safetensors", metadata={"format": "pt"}
        )
        return
    where = {}
    for i in range(shards):
        file = f"{stem}{dot}-{i + 1:05d}-of-{shards:05d}.safetensors"
        some = dict([*tensors.items()][i::shards])
        safetensors.torch.save_file(some, place / file, metadata={"format": "pt"})
        where |= dict.fromkeys(some, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write(place / f"{stem}.safetensors.index{dot}.json", index)


class First:
    """A text encoder in the names of the first programs, with a buffer that is none any more."""

    def __init__(self, net):
        self.tensors = {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}
        for name, tensor in net.state_dict().items():
            top = name.startswith(("text_model.", "text_projection."))
            self.tensors[name if top else f"text_model.{name}"] = tensor

    def state_dict(self):
        return self.tensors


# Attention of the first autoencoders had other names, which are still in those files.
FIRST_NAMES = {
    "mid_block.attentions.0.to_q": "mid_block.attentions.0.query",
    "mid_block.attentions.0.to_k": "mid_block.attentions.0.key",
    "mid_block.attentions.0.to_v": "mid_block.attentions.0.value",
    "mid_block.attentions.0.to_out.0": "mid_block.attentions.0.proj_attn",
}


def published(kind, folder):
    """The pipeline's folder, as a download leaves it."""
    torch.manual_seed(0)
    write(folder / "model_index.json", INDEX[kind])
    write(folder / "scheduler/scheduler_config.json", SCHEDULER[kind])

    # 2.1 in half precision alone; SDXL and a part of SD3 in several files.
    how = {"variant": "fp16", "half": True} if kind == "sd21" else {}
    several = {"shards": 2} if kind == "sdxl" else {}
    denoiser = "transformer" if kind == "sd3" else "unet"
    first = {"names": FIRST_NAMES} if kind == "sd15" else {}
    for part, config, more in ((denoiser, DENOISER[kind], several), ("vae", VAE[kind], first)):
        write(folder / part / "config.json", config)
        net = away(getattr(diffusers, config["_class_name"]).from_config(config))
        write_weights(folder / part, "diffusion_pytorch_model", net, **how, **more)
    for part, config in ENCODERS[kind].items():
        write(folder / part / "config.json", config)
        network = getattr(transformers, config["architectures"][0])
        net = away(network(network.config_class.from_dict(config)), seed=len(part))
        if config is T5:
            write_weights(folder / part, "model", net, shards=2, half=True)
            write_t5_tokenizer(folder / "tokenizer_3")
            continue
        write_weights(folder / part, "model", First(net), **how)
        pad = "<|endoftext|>" if part == "text_encoder" and kind != "sd21" else "!"
        write_tokenizer(folder / part.replace("text_encoder", "tokenizer"), pad)
    beside(kind, folder)
    return folder


def beside(kind, folder):
    """What else lies there, for other programs."""
    (folder / "README.md").write_text("---\nlicense: other\n---\n")
    if kind == "sd15":
        (folder / "v1-5-pruned.ckpt").write_bytes(b"a checkpoint")
        (folder / "v1-5-pruned-emaonly.safetensors").write_bytes(b"a checkpoint")
        write(folder / "feature_extractor/preprocessor_config.json", {"crop_size": 224})
        write(folder / "safety_checker/config.json", {"architectures": ["x"]})
        (folder / "safety_checker/model.safetensors").write_bytes(b"a checker")
        (folder / "unet/diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"more")
        (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"more")
    if kind == "sdxl":
        for part in ("unet", "text_encoder", "text_encoder_2", "vae_decoder"):
            (folder / part).mkdir(exist_ok=True)
            for name in ("openvino_model.bin", "model.onnx", "flax_model.msgpack"):
                (folder / part / name).write_bytes(b"more")


KINDS = tuple(INDEX)
