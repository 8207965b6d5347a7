"""Tiny pipelines with prompts from nothing, tokenizers included, saved as folders."""

import json
import warnings
from pathlib import Path

import diffusers
import torch

WORDS = ["a", "thin", "bold", "slanted", "upright", "zero", "one", "two", "seven", "nine"]
LENGTH = 8  # tokens of a prompt, with start and end


def vocabulary():
    """CLIP's tokens and merges, for which every word is one token; start and end are the last."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["!"]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    tokens = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return tokens, [" ".join(merge) for merge in merges]


def tokenizer(folder):
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    end = {key: "<|endoftext|>" for key in ("unk_token", "eos_token", "pad_token")}
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    made = CLIPTokenizer(*files, model_max_length=LENGTH, bos_token="<|startoftext|>", **end)
    return made, len(tokens)


def text_config(count, width=16):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=count,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=count - 2,
        eos_token_id=count - 1,
        pad_token_id=count - 1,
        projection_dim=width,
    )


def vae(**changes):
    options = dict(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return diffusers.AutoencoderKL(**{**options, **changes})


def unet(**changes):
    options = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return diffusers.UNet2DConditionModel(**{**options, **changes})


def scheduler(kind="PNDMScheduler", **changes):
    options = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    own = {
        "PNDMScheduler": dict(skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        "DDIMScheduler": dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        "EulerDiscreteScheduler": dict(timestep_spacing="leading", steps_offset=1),
        "DPMSolverMultistepScheduler": dict(timestep_spacing="leading", steps_offset=1),
    }
    return getattr(diffusers, kind)(**{**options, **own[kind], **changes})


def away(net, seed=0):
    """Every parameter away from the zeros and ones that it is born with."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def sd(folder, schedule=None, net=None, coder=None, **saving):
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    words, count = tokenizer(folder / "words")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=away(coder or vae()),
        text_encoder=away(CLIPTextModel(text_config(count))),
        tokenizer=words,
        unet=away(net or unet()),
        scheduler=schedule or scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return written(pipeline, folder, **saving)


def sdxl(folder, schedule=None, zeros=True, **saving):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    words, count = tokenizer(folder / "words")
    net = unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
        transformer_layers_per_block=2,
        use_linear_projection=True,
    )
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=away(vae()),
        text_encoder=away(CLIPTextModel(text_config(count))),
        text_encoder_2=away(CLIPTextModelWithProjection(text_config(count))),
        tokenizer=words,
        tokenizer_2=words,
        unet=away(net),
        scheduler=schedule or scheduler("EulerDiscreteScheduler"),
        force_zeros_for_empty_prompt=zeros,
    )
    return written(pipeline, folder, **saving)


def sd3(folder, schedule=None, **saving):
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    words, count = tokenizer(folder / "words")
    net = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    encoders = [away(CLIPTextModelWithProjection(text_config(count)), seed) for seed in (1, 2)]
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=away(net),
        scheduler=schedule or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=away(vae(shift_factor=0.06, scaling_factor=1.5)),
        text_encoder=encoders[0],
        tokenizer=words,
        text_encoder_2=encoders[1],
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return written(pipeline, folder, **saving)


def written(pipeline, folder, **saving):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.save_pretrained(folder, **saving)
    return Path(folder)


MAKERS = {"sd": sd, "sdxl": sdxl, "sd3": sd3}
