"""A latent diffusion model from nothing, for a laptop: a pipeline folder of Hugging Face diffusers.

An AutoencoderKL (0.2M parameters) turns glyphs of 12x12 into latents of 2x6x6, a DiT (0.4M) learns
to sample them. Both see the images that --preset glyphs trains its own base on, and none that it
selects or judges with. `diffusers.DiTPipeline.from_pretrained` reads the folder.

    python examples/latent_glyphs.py runs/latent/base
    python edm_neon.py --preset glyphs --base runs/latent/base --out runs/latent \\
        --snapshot 10 --partition layers --search gradient
"""

import argparse
import os
import tempfile
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from tqdm import tqdm

from adaptive_neon.glyphs import draw_glyphs

SIZE = 12
LATENT = (2, 6, 6)
CLASSES = 10
IMAGES, STREAM = 5_000, 0  # of the training stream, as many as the preset takes
KL_WEIGHT = 1e-3  # keeps the latents near a normal distribution, and the images sharp
LABEL_DROP = 0.1  # labels replaced by the null class, for --guidance


def autoencoder():
    return diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        latent_channels=LATENT[0],
        sample_size=SIZE,
    )


def transformer():
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        num_layers=4,
        sample_size=LATENT[1],
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )

    # diffusers would drop the labels of every block by itself; fit_transformer() drops them for the
    # whole network.
    for module in net.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return net


def scheduler():
    """v-prediction and a cosine schedule: ten steps are enough."""
    return diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def fit(net, loss, count, epochs, batch, lr, desc):
    """Trains net with loss(index [N]) -> scalar over `count` samples; the learning rate ends at
    zero, so that no weight average is needed."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
    steps = epochs * -(-count // batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    net.train()
    with tqdm(total=steps, desc=desc) as bar:
        for _ in range(epochs):
            for index in torch.randperm(count).split(batch):
                value = loss(index)
                optimizer.zero_grad()
                value.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                rate.step()
                bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
                bar.update()
    return net.eval()


def fit_autoencoder(images, epochs):
    """images: float32 [N, 1, 12, 12] in [-1, 1] -> AutoencoderKL whose scaled latents have
    variance 1."""
    vae = autoencoder()

    def loss(index):
        code = vae.encode(images[index]).latent_dist
        decoded = vae.decode(code.sample()).sample
        kl = code.kl().mean() / images[0].numel()
        return F.mse_loss(decoded, images[index]) + KL_WEIGHT * kl

    fit(vae, loss, len(images), epochs, batch=64, lr=2e-3, desc="autoencoder")
    latents = encode(vae, images)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae


@torch.no_grad()
def encode(vae, images):
    """Latents [N, *LATENT], not scaled."""
    return torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(500)])


def fit_transformer(latents, labels, noise_levels, epochs):
    """latents: float32 [N, *LATENT] of variance 1; labels: int64 [N]; noise_levels: alpha bar [T]
    -> DiT."""
    net = transformer()

    def loss(index):
        x = latents[index]
        dropped = torch.rand(len(x)) < LABEL_DROP
        times = torch.randint(len(noise_levels), [len(x)])
        alpha = noise_levels[times].view(-1, 1, 1, 1)
        noise = torch.randn_like(x)
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * x
        predicted = net(noisy, times, labels[index].masked_fill(dropped, CLASSES)).sample
        return F.mse_loss(predicted, velocity)

    return fit(net, loss, len(latents), epochs, batch=64, lr=2e-3, desc="transformer")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the pipeline is written; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-epochs", type=int, default=4)
    parser.add_argument("--dit-epochs", type=int, default=16)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists: delete it, or choose another folder")
    if min(args.vae_epochs, args.dit_epochs) < 1:
        parser.error("at least one epoch of each training is needed")

    # Tiny networks: a second thread mostly waits, and the sums would depend on their number.
    torch.set_num_threads(1)
    images, labels = draw_glyphs(IMAGES, STREAM)
    images = images.float() / 127.5 - 1
    torch.manual_seed(args.seed)
    vae = fit_autoencoder(images, args.vae_epochs)
    latents = encode(vae, images) * vae.config.scaling_factor
    noise = scheduler()
    net = fit_transformer(latents, labels, noise.alphas_cumprod, args.dit_epochs)

    # Beside its place first, so that a stop leaves no half of a pipeline.
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=args.folder.parent) as part:
        pipeline = diffusers.DiTPipeline(net, vae, noise)
        pipeline.save_pretrained(Path(part) / "new")
        os.rename(Path(part) / "new", args.folder)


if __name__ == "__main__":
    main()
