"""Adaptive NEON: repair a generative model that was trained on its own samples, block by block.

    theta = theta_r - w_block * (theta_s - theta_r)     w > 0 away from collapse, w < 0 towards it

theta_r: the base network; theta_s: its weight average after training on its own samples (NEON,
arXiv 2510.03597); blocks: encoder, middle, decoder of the network, its layers, or any partition
(Adaptive NEON, section 4.2). All weights are scored on the same starting noise and labels; the
search and the final comparison use disjoint seeds. The pipeline knows no network: EDM's (arXiv
2206.00364) are built in, and --model FILE.py puts one of your own in their place.

    python edm_neon.py --preset glyphs                             a laptop, nothing to download
    python edm_neon.py --snapshot 1551 --grid 0.75,1.0,1.25        CIFAR-10, a GPU, a connection
    torchrun --nproc_per_node=8 edm_neon.py --snapshot 1551 --grid 0.75,1.0,1.25
    python edm_neon.py --model mine.py --base mine.pt --data images.zip --snapshot 100

Recorded figures and their commands: results/edm and the README. CIFAR-10 has not been run on a GPU
yet."""

# ruff: noqa: E402  imports follow the signal handler on purpose
import os
import signal


def leave_quietly(number, frame):
    os._exit(128 + number)


# The imports take seconds: a Ctrl-C in them is no fault of ours to be traced.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, leave_quietly)

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from adaptive_neon import cli
from adaptive_neon.config import Preset
from adaptive_neon.features import inception
from adaptive_neon.files import (
    Refused,
    UserError,
    fetch,
    is_safetensors,
    kind_of,
    load_state,
    printable,
    reading,
    reason_of,
    save_state,
)
from adaptive_neon.glyphs import (
    GLYPH_SIZE,
    GlyphsClassifier,
    draw_glyphs,
    glyphs_cnn,
    glyphs_mlp,
)
from adaptive_neon.images import RealData, RealImages, read_dataset, split
from adaptive_neon.networks import PRECONDS, Precond, denoiser
from adaptive_neon.pickles import Inert, inert_tensors, read_pickle
from adaptive_neon.sampling import Model

# ==================== presets
EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm"
NEON_URL = "https://huggingface.co/sinaalemohammad/Neon/resolve/main"


class EdmPreset(Preset):
    """What EDM published of one data set: networks, and statistics of what they were trained on."""

    network: dict = {}  # options of a network that is trained here, or of the size of the base

    def model(self, c):
        return EdmModel(self, c)

    def untrained(self):
        return denoiser(**self.network).eval()

    def real_images(self, c):
        """RealData of --data; None without it."""
        if not c.data:
            return None
        origin = "a part of --data that nothing else has used"
        if c.base or not c.train_base:
            origin += " here; whether the base was trained on it is unknown"
        return split(*read_dataset(c.data), c.data, origin)

    def features(self, c):
        return inception(c.detector)


class Cifar10(EdmPreset):
    """FID of EDM: 1.79 conditional, 1.97 not; NEON brings 1.78 and 1.98 to 1.38. The paper: best
    global 1.43 to 1.74, block-wise 1.43 to 1.71."""

    name = "cifar10"
    network = {
        "img_resolution": 32,
        "img_channels": 3,
        "label_dim": 10,
        "augment_dim": 9,
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
        "num_blocks": 4,
        "attn_resolutions": [16],
    }
    bases = {
        "cond": f"{EDM_URL}/pretrained/edm-cifar10-32x32-cond-vp.pkl",
        "uncond": f"{EDM_URL}/pretrained/edm-cifar10-32x32-uncond-vp.pkl",
        "cond-ve": f"{EDM_URL}/pretrained/edm-cifar10-32x32-cond-ve.pkl",
        "uncond-ve": f"{EDM_URL}/pretrained/edm-cifar10-32x32-uncond-ve.pkl",
        "neon-cond": f"{NEON_URL}/Neon_EDM_conditional_CIFAR10.pkl",  # repaired already
        "neon-uncond": f"{NEON_URL}/Neon_EDM_unconditional_CIFAR10.pkl",
    }
    statistics = f"{EDM_URL}/fid-refs/cifar10-32x32.npz"
    origin = "CIFAR-10's 50,000 training images, which EDM's networks were trained on"


class Ffhq64(EdmPreset):
    """FID of EDM: 2.39 (VP), 2.53 (VE); NEON brings 2.39 to 1.12."""

    name = "ffhq64"
    defaults = {"steps": 40, "dropout": 0.05, "augment": 0.15}  # EDM's
    network = Cifar10.network | {
        "img_resolution": 64,
        "label_dim": 0,
        "channel_mult": [1, 2, 2, 2],
    }
    bases = {
        "uncond": f"{EDM_URL}/pretrained/edm-ffhq-64x64-uncond-vp.pkl",
        "uncond-ve": f"{EDM_URL}/pretrained/edm-ffhq-64x64-uncond-ve.pkl",
        "neon-uncond": f"{NEON_URL}/Neon_EDM_FFHQ.pkl",
    }
    statistics = f"{EDM_URL}/fid-refs/ffhq-64x64.npz"
    origin = "FFHQ's 70,000 images at 64 x 64, which EDM's networks were trained on"


class Afhqv2(Ffhq64):
    """FID of EDM: 1.96 (VP), 2.16 (VE); NEON reports none."""

    name = "afhqv2"
    defaults = Ffhq64.defaults | {"dropout": 0.25}
    bases = {
        "uncond": f"{EDM_URL}/pretrained/edm-afhqv2-64x64-uncond-vp.pkl",
        "uncond-ve": f"{EDM_URL}/pretrained/edm-afhqv2-64x64-uncond-ve.pkl",
    }
    statistics = f"{EDM_URL}/fid-refs/afhqv2-64x64.npz"
    origin = "AFHQv2's images at 64 x 64, which EDM's networks were trained on"


class ImageNet64(EdmPreset):
    """FID of EDM with these steps and noise: 1.36, in half precision; NEON reports none."""

    name = "imagenet64"
    defaults = {
        "steps": 256,
        "s_churn": 40.0,
        "s_min": 0.05,
        "s_max": 50.0,
        "s_noise": 1.003,
        "dropout": 0.1,
        "augment": 0.0,
    }
    network = {
        "model_type": "DhariwalUNet",
        "img_resolution": 64,
        "img_channels": 3,
        "label_dim": 1000,
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
    }
    bases = {"cond": f"{EDM_URL}/pretrained/edm-imagenet-64x64-cond-adm.pkl"}
    statistics = f"{EDM_URL}/fid-refs/imagenet-64x64.npz"
    origin = "ImageNet's training images at 64 x 64, which EDM's network was trained on"


class Glyphs(EdmPreset):
    """Digits drawn from matplotlib's fonts and a small classifier of them: minutes on a laptop,
    nothing to download, and fresh real images for every purpose."""

    name = "glyphs"
    size = GLYPH_SIZE
    small = True
    threads = 1  # 12 x 12 images: two batches at once are faster than two threads
    defaults = {
        "snapshot": (10,),
        "grid": (0.6, 1.2),
        "train_base": 30.0,
        "base_lr": 3e-3,
        "synthetic": 2000,
        "ramp_kimg": 0.0,
        "ema_kimg": 0.5,
        "dropout": 0.0,
        "augment": 0.0,
        "select_images": 400,
        "final_images": 1600,
        "sample_batch": 250,
        "judge": ("classifier-2", "mlp", "random-conv", "pixels"),
    }
    network = {
        "img_resolution": 12,
        "img_channels": 1,
        "label_dim": 10,
        "augment_dim": 0,
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [6],
    }
    images = {"training": 5_000, "selection": 20_000, "final": 20_000}
    streams = {
        "training": 0,
        "selection": 1,
        "final": 2,
        "classifier": 3,
        "classifier test": 4,
        "classifier-2": 5,
        "mlp": 6,
    }

    def real_images(self, c):
        if c.data or c.ref:
            raise UserError(
                f"--preset {self.name} draws its own real images: leave --data and --ref out"
            )
        parts = {}
        for purpose, count in self.images.items():
            stream = self.streams[purpose]
            drawn = draw_glyphs(count, stream, self.size)
            parts[purpose] = RealImages(*drawn, f"glyphs, stream {stream}")
        return RealData(**parts, origin="images that no network and no selection has seen")

    def classifier(self, c, name, body, seed, stream):
        streams = self.streams[stream], self.streams["classifier test"]
        return GlyphsClassifier(c.out, name, body, seed, *streams, size=self.size)

    def features(self, c):
        return self.classifier(c, "glyphs-cnn-64", glyphs_cnn, 0, "classifier")

    def judges(self, c):
        def another_seed():
            return self.classifier(c, "classifier-2", glyphs_cnn, 1, "classifier-2")

        def another_architecture():
            return self.classifier(c, "mlp", glyphs_mlp, 2, "mlp")

        return {"classifier-2": another_seed, "mlp": another_architecture}


class Glyphs16(Glyphs):
    """The same in 16 x 16: pipelines of diffusers want sides that can be divided by 8."""

    name = "glyphs16"
    size = 16
    network = {**Glyphs.network, "img_resolution": 16, "attn_resolutions": [8]}


PRESETS = {
    preset.name: preset
    for preset in (Cifar10(), Ffhq64(), Afhqv2(), ImageNet64(), Glyphs(), Glyphs16())
}


# ==================== EDM behind the seam
class EdmModel(Model):
    """EDM's networks behind the seam, with its sampler, loss and augmentation."""

    identity = "edm, Heun, 1"
    encodes = False

    def __init__(self, preset, c):
        self.preset = preset
        self.churn = {}
        if c.s_churn:
            self.churn = {
                "S_churn": c.s_churn,
                "S_min": c.s_min,
                "S_max": c.s_max,
                "S_noise": c.s_noise,
            }
            self.identity = f"edm, Heun, {self.churn}, 1"
        self.draws_on = bool(self.churn)
        self.set_training(c.augment, c.dropout)

    def set_training(self, augment, dropout):
        self.augment_p = augment
        self.training_identity = f"edm, augment {augment}, dropout {dropout}, 1"

    def start_check(self, base, c, trained):
        """Augmented images without labels that say so would be images that the network is to make:
        EDM trains such a network on images as they are."""
        if c.augment and base.config.get("augment_dim", 0) != AUGMENT_LABELS:
            self.set_training(0.0, c.dropout)
            self.notes = [
                f"the network does not take EDM's {AUGMENT_LABELS} augmentation labels, so that it "
                f"is trained without --augment {c.augment:g}"
            ]

    def fetch(self, source, what):
        """What an address answers with is read before it is kept."""
        return fetch(source, what, check=load_network)

    def load(self, path):
        return load_network(path)

    def load_like(self, base, path):
        return load_network(path)

    def create(self, images, labels, c):
        """The preset's network, in the size of the images."""
        options = dict(self.preset.network)
        if labels is None and options["label_dim"]:
            raise UserError(
                f"{c.data} has no labels, but the network is conditional: add dataset.json"
            )
        channels, height, width = images.shape[1:]
        halvings = len(options["channel_mult"]) - 1
        if height != width or width % 2**halvings:
            raise UserError(
                f"{c.data}: {height} x {width} images; the network needs squares that it can halve "
                f"{halvings} times"
            )
        options |= {"dropout": c.dropout, "img_resolution": width, "img_channels": channels}
        if options["label_dim"]:
            options["label_dim"] = int(labels.max()) + 1
        return denoiser(**options)

    def trainable(self, base, c):
        net = denoiser(**dict(base.config, dropout=c.dropout))
        net.load_state_dict(base.state_dict())
        return net

    def noise_shape(self, net):
        return (net.img_channels, net.img_resolution, net.img_resolution)

    def image_shape(self, net):
        return self.noise_shape(net)

    def classes(self, net):
        return net.label_dim

    def sample(self, net, noise, labels, steps, draw=None):
        return edm_sampler(net, noise, one_hot(net, labels), steps, **self.churn, draw=draw)

    def loss(self, net, x, labels):
        return edm_loss(net, x, one_hot(net, labels), self.augment_p)

    def block(self, name, net, partition):
        """paper: lowest resolution and mapping are mid, else enc or dec; structural: the decoder's
        blocks after the bottleneck are dec. ADM's last two layers, beside dec, belong to it."""
        side, layer = name.split(".")[1:3]
        if side not in ("enc", "dec"):
            return "dec" if side.startswith("out_") else "mid"
        lowest = min(int(key.split("x")[0]) for key in net.model.enc)
        if not layer.startswith(f"{lowest}x{lowest}_"):
            return side
        after_bottleneck = side == "dec" and "_block" in layer
        return "dec" if partition == "structural" and after_bottleneck else "mid"

    def layer(self, name):
        """model.enc.8x8_block0.conv0.weight -> enc.8x8_block0; all embeddings are one, map, and
        so are ADM's last two layers, out."""
        side, layer = name.split(".")[1:3]
        return side[:3] if side.startswith(("map_", "out_")) else f"{side}.{layer}"

    def save(self, net, path, recipe):
        save_network(net, path, recipe)

    def export(self, net, path, recipe):
        save_network(net, path.with_suffix(".safetensors"), recipe)


def one_hot(net, labels):
    """int64 labels [N] -> float32 [N, K]; None for an unconditional network."""
    return F.one_hot(labels, net.label_dim).float() if net.label_dim else None


# ==================== sampler and loss
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # of the sampler's steps


def sigma_steps(net, num_steps=18):
    """EDM's time steps [num_steps + 1] float64, ending in 0 (equation 5)."""
    low, high = max(SIGMA_MIN, net.sigma_min), min(SIGMA_MAX, net.sigma_max)
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    first, last = high ** (1 / RHO), low ** (1 / RHO)
    steps = (first + ramp * (last - first)) ** RHO
    return F.pad(net.round_sigma(steps), (0, 1))


def edm_sampler(
    net,
    noise,
    class_labels=None,
    num_steps=18,
    S_churn=0.0,
    S_min=0.0,
    S_max=math.inf,
    S_noise=1.0,
    draw=None,
):
    """Heun's second-order method (EDM, algorithm 1; with S_churn algorithm 2, stochastic).
    noise [N, C, H, W], one-hot labels [N, K] (or None), draw(): more noise of every sample, float64
    [N, C, H, W] -> images in [-1, 1] float64."""
    t = sigma_steps(net, num_steps)
    churned = (t >= S_min) & (t <= S_max)
    gamma = torch.where(churned, min(S_churn / num_steps, 2**0.5 - 1), 0.0)
    t_hat = net.round_sigma(t + gamma * t)
    more = (t_hat**2 - t**2).clamp_min(0).sqrt() * S_noise
    t, t_hat, more = (values.to(noise.device) for values in (t, t_hat, more))

    x = noise.double() * t[0]
    for i in range(num_steps):
        # Noise is raised from t to t_hat; every step draws, as in EDM.
        if S_churn:
            x = x + more[i] * draw()

        # Euler step.
        denoised = net(x.float(), t_hat[i], class_labels).double()
        d = (x - denoised) / t_hat[i]
        x_next = x + (t[i + 1] - t_hat[i]) * d

        # Second-order correction, except at the end, where the slope is undefined.
        if i < num_steps - 1:
            denoised = net(x_next.float(), t[i + 1], class_labels).double()
            d_next = (x_next - denoised) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat[i]) * ((d + d_next) / 2)
        x = x_next
    return x


def edm_loss(net, images, labels, augment_p):
    """EDM's loss [N, C, H, W]: lambda(sigma) (D(y + n; sigma) - y)^2, with sigma and lambda of the
    network's preconditioning."""
    sigma = net.draw_sigma(len(images), images.device)
    augment_labels = None
    if augment_p:
        images, augment_labels = augment(images, augment_p)
    noise = torch.randn_like(images) * sigma
    denoised = net(images + noise, sigma, labels, augment_labels)
    return net.loss_weight(sigma) * (denoised - images).square()


# ==================== augmentation (EDM, appendix F.2): nine labels
AUGMENT_LABELS = 9
SYM6 = [  # low-pass filter of the sym6 wavelet
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
]


def matrix(rows, device, n=1):
    """3 x 3 matrices [N, 3, 3] from the first two rows: six numbers or [N] tensors."""
    entries = []
    for value in (*rows, 0, 0, 1):
        entries.append(torch.as_tensor(value, dtype=torch.float32, device=device).expand(n))
    return torch.stack(entries, -1).view(n, 3, 3)


def scale(x, y, device, n=1):
    return matrix([x, 0, 0, 0, y, 0], device, n)


def rotate(angle, device, n=1):
    return matrix([angle.cos(), -angle.sin(), 0, angle.sin(), angle.cos(), 0], device, n)


def shift(x, y, device, n=1):
    return matrix([1, 0, x, 0, 1, y], device, n)


def draw_affine(n, p, height, width, device):
    """Random inverse maps G [N, 3, 3] (output to input, pixels) and their seven labels [N, 7]."""

    def gate(value, chance):
        return torch.where(torch.rand(n, device=device) < chance, value, 0.0)

    def draw_angle():
        return (torch.rand(n, device=device) * 2 - 1) * np.pi

    # The order of the draws is EDM's.
    zoom = gate(torch.randn(n, device=device), p)
    turn = gate(draw_angle(), p)
    stretch = torch.randn(n, device=device)
    axis = draw_angle()
    stretch = gate(stretch, p)
    axis = gate(axis, 0.5)
    x, y = gate(torch.randn(2, n, device=device), p)

    s, t = torch.exp2(0.2 * zoom), torch.exp2(0.2 * stretch)
    G = scale(1 / s, 1 / s, device, n) @ rotate(turn, device, n)
    G = G @ rotate(-axis, device, n) @ scale(1 / t, t, device, n) @ rotate(axis, device, n)
    G = G @ shift(-x * width / 8, -y * height / 8, device, n)
    labels = [zoom, turn.cos() - 1, turn.sin(), stretch * axis.cos(), stretch * axis.sin(), x, y]
    return G, torch.stack(labels, 1)


def filtered(x, kernel, axis, **options):
    """x [N, C, H, W] correlated with one filter along an axis, channel by channel."""
    weight = kernel.view(1, 1, 1, -1) if axis == 3 else kernel.view(1, 1, -1, 1)
    channels = x.shape[1]
    return F.conv2d(x, weight.expand(channels, 1, -1, -1), groups=channels, **options)


def warp(images, G):
    """images [N, C, H, W] resampled through G, band-limited by sym6 filters at twice the
    resolution."""
    n, c, height, width = images.shape
    device = images.device
    f = torch.tensor(SYM6, device=device)

    # Margins that the maps of the whole batch reach into, filled by reflection.
    cx, cy = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor([[-cx, cx, cx, -cx], [-cy, -cy, cy, cy], [1, 1, 1, 1]], device=device)
    q = (G @ corners)[:, :2]  # [N, 2, 4]
    far = torch.cat([(-q).amax((0, 2)), q.amax((0, 2))])
    far = far + torch.tensor([6 - cx, 6 - cy] * 2, device=device)
    limit = torch.tensor([width - 1, height - 1] * 2, device=device)
    x0, y0, x1, y1 = torch.minimum(far.clamp_min(0), limit).ceil().int().tolist()
    images = F.pad(images, [x0, x1, y0, y1], mode="reflect")

    # Twice the resolution.
    up = images.new_zeros(n, c, images.shape[2] * 2 - 1, images.shape[3] * 2 - 1)
    up[:, :, ::2, ::2] = images
    up = filtered(up, f.flip(0), 3, padding=(0, 6))
    up = filtered(up, f.flip(0), 2, padding=(6, 0))

    # The map in the padded, enlarged and normalised coordinates of grid_sample.
    G = (
        scale(2, 2, device)
        @ shift((x0 - x1) / 2, (y0 - y1) / 2, device)
        @ G
        @ scale(0.5, 0.5, device)
    )
    out_h, out_w = (height + 6) * 2, (width + 6) * 2
    G = scale(2 / up.shape[3], 2 / up.shape[2], device) @ shift(-0.5, -0.5, device) @ G
    G = G @ shift(0.5, 0.5, device) @ scale(out_w / 2, out_h / 2, device)
    grid = F.affine_grid(G[:, :2], [n, c, out_h, out_w], align_corners=False)
    x = F.grid_sample(up, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    # Back to the resolution of the images, without the margin.
    x = filtered(x, f, 3, stride=(1, 2), padding=(0, 5))[:, :, :, 3:-3]
    return filtered(x, f, 2, stride=(2, 1), padding=(5, 0))[:, :, 3:-3]


def augment(images, p):
    """images [N, C, H, W] in [-1, 1] -> augmented images, labels [N, 9]; flips: half
    of all in x, whatever p is, p / 2 of all in y; then what draw_affine() draws."""
    n, device = len(images), images.device
    labels = []
    for axis, chance in ((3, p * 1e8), (2, p)):
        flip = torch.randint(2, [n, 1, 1, 1], device=device)
        flip = torch.where(torch.rand(n, 1, 1, 1, device=device) < chance, flip, 0)
        images = torch.where(flip == 1, images.flip(axis), images)
        labels.append(flip.view(n, 1).float())
    G, rest = draw_affine(n, p, images.shape[2], images.shape[3], device)
    return warp(images, G), torch.cat([*labels, rest], 1)


# ==================== files
# The smallest and largest value of what EDM's networks take; whole numbers where the smallest is
# one. Generous, but no value can stop, fill or crash a machine.
NUMBERS = {
    "img_resolution": (1, 4096),
    "img_channels": (1, 64),
    "label_dim": (0, 100_000),
    "sigma_min": (0.0, 1e6),
    "sigma_max": (1e-6, math.inf),
    "sigma_data": (1e-6, 1e6),
    "beta_d": (1e-6, 1e3),
    "beta_min": (1e-6, 1e3),
    "epsilon_t": (1e-9, 1.0),
    "C_1": (1e-9, 1.0),
    "C_2": (1e-9, 1.0),
    "M": (1, 10_000),
    "augment_dim": (0, 64),
    "model_channels": (4, 4096),
    "channel_mult": (1, 64),
    "channel_mult_emb": (1, 64),
    "num_blocks": (1, 32),
    "attn_resolutions": (0, 4096),
    "dropout": (0.0, 1.0),
    "label_dropout": (0.0, 1.0),
    "channel_mult_noise": (1, 64),
    "resample_filter": (-100.0, 100.0),
}
LISTS = {"channel_mult": 1, "attn_resolutions": 0, "resample_filter": 1}  # at least so long
WORDS = {
    "precond": tuple(PRECONDS),
    "model_type": ("SongUNet", "DhariwalUNet"),
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "residual"),
    "decoder_type": ("standard",),
}


def is_option(name, value):
    """Whether EDM's networks have this option and it may have this value."""
    if name in WORDS:
        return type(value) is str and value in WORDS[name]
    if name in LISTS:
        fits = type(value) in (list, tuple) and LISTS[name] <= len(value) <= 8
        values = value if fits else [None]
    else:
        values = [value]
    low, high = NUMBERS.get(name, (0, 0))
    kinds = (int,) if type(low) is int else (int, float)
    return all(type(v) in kinds and low <= v <= high for v in values)  # neither bool nor NaN


def untrained_network(options):
    """denoiser(**options) without memory for its weights, if the options are some and fit
    together."""
    for name, value in options.items():
        if name not in NUMBERS and name not in WORDS:
            raise Refused(f"option {printable(name)} is unknown")
        if not is_option(name, value):
            shown = value if type(value) in (str, int, float) else f"a {type(value).__name__}"
            raise Refused(f"option {name} cannot be {printable(shown)}")

    # Sizes that EDM's U-Net can halve and double: one image without memory goes through it.
    try:
        with torch.device("meta"):
            net = denoiser(**options).eval()
            net(torch.zeros(1, net.img_channels, *[net.img_resolution] * 2), torch.ones(1))
    except (RuntimeError, ValueError) as error:
        raise Refused(f"its options do not fit together: {reason_of(error)}") from error
    return net


def pickled_network(path):
    """EDM's network-snapshot -> (options, {name: tensor}) as inert data."""
    snapshot = read_pickle(path)
    ema = snapshot.get("ema") if type(snapshot) is dict else None
    if type(ema) is not Inert or type(ema.state.get("_init_kwargs")) is not dict:
        raise Refused("no network snapshot of EDM: it has no ema")
    if ema.name not in PRECONDS:
        raise Refused(f"{printable(ema.name)} is not supported, only {', '.join(PRECONDS)}")
    options = {**ema.state["_init_kwargs"], "precond": ema.name}
    options.pop("use_fp16", None)
    song = ema.name in ("VPPrecond", "VEPrecond")
    options.setdefault("model_type", "SongUNet" if song else "DhariwalUNet")  # EDM's defaults

    # What is an attribute, EDM takes as it is now, not as the network was built.
    for name in ("img_resolution", "img_channels", "label_dim", *PRECONDS[ema.name].attributes):
        if name in ema.state:
            options[name] = ema.state[name]

    # Weights that share elements are apart in our network; then a small file could fill a machine.
    tensors = dict(inert_tensors(ema))
    if sum(getattr(tensor, "nbytes", 0) for tensor in tensors.values()) > path.stat().st_size:
        raise Refused("its tensors are larger than the file")
    return options, tensors


def stored_network(path):
    """Our .safetensors -> (options, {name: tensor}); refused where its hash does not agree."""
    tensors, config = load_state(path)
    config.pop("recipe", None)
    return config, tensors


def build_network(options, tensors):
    """denoiser(**options) with these weights, popped from `tensors`: eval, float32, frozen."""
    net = untrained_network(options)

    # Every tensor of the network, of its shape, and no other.
    own = net.state_dict()
    for name in [*own, *tensors]:
        theirs = tensors.get(name)
        if theirs is not None and (
            type(theirs) is not torch.Tensor or not theirs.is_floating_point()
        ):
            raise Refused(f"{printable(name)} is no tensor of floating-point numbers")
        wanted = tuple(own[name].shape) if name in own else "not there"
        found = tuple(theirs.shape) if theirs is not None else "not there"
        if wanted != found:
            raise Refused(f"{printable(name)} is {found} in the file, the network expects {wanted}")

    # Values: finite, and filters as the options say, because the network computes with the options.
    taps = torch.tensor(options.get("resample_filter", (1, 1)), dtype=torch.float32)
    for name in own:
        tensor = tensors.pop(name)
        own[name] = torch.empty(tensor.shape).copy_(tensor)
        if not own[name].isfinite().all():
            raise Refused(f"{name} has weights that are not finite")
        if name.endswith(".resample_filter"):
            expected = taps.outer(taps) / taps.sum() ** 2
            if not torch.allclose(own[name][0, 0], expected, rtol=1e-4, atol=1e-6):
                raise Refused(f"{name} is not the filter that the options describe")
    net.load_state_dict(own, assign=True)
    return net.eval().requires_grad_(False)


def load_network(path: str | Path) -> Precond:
    """EDM's .pkl (parsed, never run) or our .safetensors, told apart by content.

    In eval mode on the CPU, float32, without gradients. UserError: what is wrong with the file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"network {path} does not exist or is no file")
    with reading(f"network {path} is refused, nothing in it was run"):
        with open(path, "rb") as file:
            head = file.read(512)
        if is_safetensors(path):
            return build_network(*stored_network(path))
        if head[:1] == b"\x80":
            return build_network(*pickled_network(path))
        raise Refused(f"neither a pickle of EDM nor a .safetensors, but {kind_of(head)}")


def save_network(net: Precond, path: Path, recipe: dict) -> None:
    """.safetensors: weights in float32; options, recipe and SHA-256 in its metadata."""
    config = {}
    for name, value in net.config.items():
        if value != net.attributes.get(name, ""):  # infinity is no number of JSON
            config[name] = value
    tensors = {name: tensor.float() for name, tensor in net.state_dict().items()}
    save_state(path, tensors, {**config, "recipe": recipe})


def main(argv: list[str] | None = None) -> None:
    cli.main(argv, PRESETS, __doc__)


if __name__ == "__main__":
    main()
