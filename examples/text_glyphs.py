"""A text-to-image pipeline from nothing, for a laptop: a StableDiffusionPipeline of glyphs with
captions ("a thin slanted serif seven"), in 16 x 16.

An AutoencoderKL turns glyphs into latents of 4 x 8 x 8; a U-Net and a CLIP text encoder learn
together to sample them. They see the stream of glyphs that --preset glyphs16 trains its own base
on, and none that it selects or judges with. `StableDiffusionPipeline.from_pretrained` reads the
folder; its prompts.txt holds all captions.

    python examples/text_glyphs.py runs/text/base
    python edm_neon.py --preset glyphs16 --base runs/text/base --out runs/text \\
        --prompts runs/text/base/prompts.txt --guidance 2 --steps 8 --lora-rank 8 --lr 1e-3 \\
        --lora-targets all --partition layers --search gradient --evaluations 5 \\
        --sweep -1:2:0.25 --select-images 280 --final-images 840
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from adaptive_neon.glyphs import DIGITS, GLYPH_FONTS, draw_glyphs

SIZE = 16
LATENT = (4, 8, 8)
IMAGES, STREAM = 10_000, 0  # of the training stream
KL_WEIGHT = 1e-3  # keeps the latents near a normal distribution, and the images sharp
PROMPT_DROP = 0.1  # prompts replaced by the empty one, for guidance
WIDTH = 32  # of the text encoder
LENGTH = 8  # tokens: start, five words, end

# How the fonts look, in words, one description each.
LOOKS = (
    "plain upright sans",
    "bold upright sans",
    "plain slanted sans",
    "plain upright mono",
    "bold upright mono",
    "plain upright serif",
    "bold upright serif",
    "plain slanted serif",
    "thin upright serif",
    "bold upright times",
    "thin slanted serif",
    "thin upright modern",
    "thin upright sans",
    "thin upright mono",
)
PROMPTS = [f"a {look} {digit}" for look in LOOKS for digit in DIGITS]


def glyphs(count):
    """The first images of the stream, float32 [N, 1, 16, 16] in [-1, 1], and the number of each
    one's prompt, int64 [N]."""
    images, digits = draw_glyphs(count, STREAM, SIZE)
    draws = np.random.default_rng([*b"glyphs", STREAM]).random((count, 9))
    fonts = (torch.from_numpy(draws[:, 0]) * len(GLYPH_FONTS)).long()
    return images.float() / 127.5 - 1, fonts * len(DIGITS) + digits


def write_tokenizer(folder):
    """CLIP's tokenizer with the captions' words alone, each of them one token."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = []
    for word in sorted({word for prompt in PROMPTS for word in prompt.split()}):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    tokens = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, table = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    table.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    return transformers.CLIPTokenizer(
        str(vocabulary),
        str(table),
        model_max_length=LENGTH,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def text_encoder(count):
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=count,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=count - 2,
            eos_token_id=count - 1,
            pad_token_id=count - 1,
        )
    )


def autoencoder():
    return diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        latent_channels=LATENT[0],
        sample_size=SIZE,
    )


def denoiser():
    return diffusers.UNet2DConditionModel(
        sample_size=LATENT[1],
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def scheduler():
    """v-prediction and a cosine schedule: ten steps are enough."""
    return diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def fit(nets, loss, count, epochs, lr, desc, batch=64):
    """Trains networks with loss(index [N]) -> scalar over `count` samples; the learning rate ends
    at zero, so that no weight average is needed."""
    parameters = [parameter for net in nets for parameter in net.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    steps = epochs * -(-count // batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    with tqdm(total=steps, desc=desc) as bar:
        for _ in range(epochs):
            for index in torch.randperm(count).split(batch):
                value = loss(index)
                optimizer.zero_grad()
                value.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                rate.step()
                bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
                bar.update()
    for net in nets:
        net.eval()


def fit_autoencoder(images, epochs):
    """images: float32 [N, 1, 16, 16] -> AutoencoderKL whose scaled latents have variance 1, and
    these [N, *LATENT]."""
    vae = autoencoder()

    def loss(index):
        code = vae.encode(images[index]).latent_dist
        kl = code.kl().mean() / images[0].numel()
        return F.mse_loss(vae.decode(code.sample()).sample, images[index]) + KL_WEIGHT * kl

    fit([vae], loss, len(images), epochs, lr=2e-3, desc="autoencoder")
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mode() for x in images.split(500)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae, latents / latents.std()


def fit_denoiser(latents, prompts, tokens, noise_levels, epochs):
    """latents [N, *LATENT] of variance 1; prompts: int64 [N], rows of tokens [P + 1, LENGTH], whose
    last is the empty prompt; noise_levels: alpha bar [T] -> U-Net, text encoder."""
    net, text = denoiser(), text_encoder(int(tokens.max()) + 1)

    def loss(index):
        x = latents[index]
        dropped = torch.rand(len(x)) < PROMPT_DROP
        rows = tokens[prompts[index].masked_fill(dropped, len(tokens) - 1)]
        times = torch.randint(len(noise_levels), [len(x)])
        alpha = noise_levels[times].view(-1, 1, 1, 1)
        noise = torch.randn_like(x)
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * x
        return F.mse_loss(net(noisy, times, text(rows)[0]).sample, velocity)

    fit([net, text], loss, len(latents), epochs, lr=2e-3, desc="U-Net and text encoder")
    return net, text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("folder", type=Path, help="where the pipeline is written; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=7)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists: delete it, or choose another folder")
    if min(args.vae_epochs, args.epochs) < 1:
        parser.error("at least one epoch of each training is needed")

    # Tiny networks: a second thread mostly waits, and the sums would depend on their number.
    torch.set_num_threads(1)
    images, prompts = glyphs(IMAGES)
    torch.manual_seed(args.seed)
    vae, latents = fit_autoencoder(images, args.vae_epochs)
    noise = scheduler()

    # Beside its place first, so that a stop leaves no half of a pipeline.
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=args.folder.parent) as part:
        words = write_tokenizer(Path(part))
        padded = words([*PROMPTS, ""], padding="max_length", return_tensors="pt").input_ids
        net, text = fit_denoiser(latents, prompts, padded, noise.alphas_cumprod, args.epochs)
        pipeline = diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=text,
            tokenizer=words,
            unet=net,
            scheduler=noise,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(Path(part) / "new")
        (Path(part) / "new/prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        os.rename(Path(part) / "new", args.folder)


if __name__ == "__main__":
    main()
