"""A model of your own for `edm_neon.py --model`: copy this file and replace its parts.

A flow-matching transformer of small grey digits, neither a U-Net nor EDM. The network predicts the
velocity v = image - noise at x_t = (1 - t) noise + t image; sampling integrates it from t = 0 to 1.

    python edm_neon.py --preset glyphs --model examples/flow_glyphs.py --steps 10

Seed 0, two CPU cores, torch 2.13, FD (glyphs CNN, 64-d) of 2,000 images: base 103.9, collapsed
(w = -1) 179.5, best global weight (1.5) 50.2, best of the 27 (enc 1.5, mid 0.5, dec 0.5) 43.6.
"""

import safetensors.torch
import torch
from torch import nn

SIZE = 12  # pixels a side: --preset glyphs has 12 x 12 images
PATCH = 3  # every 3 x 3 pixels are a token
WIDTH, HEADS, DEPTH = 64, 4, 4

# -------------------- needed: the noise of one sample, the number of labels (0: none)
SHAPE = (1, SIZE, SIZE)
CLASSES = 10


class Block(nn.Module):
    """Attention and MLP, both shifted and scaled by the embedding of time and label."""

    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 4 * WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x, e):
        scale1, shift1, scale2, shift2 = self.modulation(e)[:, None].chunk(4, 2)  # [N, 1, WIDTH]
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Transformer(nn.Module):
    """x [N, 1, SIZE, SIZE], times t [N] in [0, 1], labels [N] -> velocity, of x's shape."""

    def __init__(self):
        super().__init__()
        tokens = (SIZE // PATCH) ** 2
        self.patch = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.randn(tokens, WIDTH) * 0.5)
        self.time = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.pixels = nn.Linear(WIDTH, PATCH**2)
        self.register_buffer("frequencies", torch.pi * torch.arange(1.0, 9.0))

    def forward(self, x, t, labels):
        angles = t[:, None] * self.frequencies  # [N, 8]
        e = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(labels)
        h = self.patch(x).flatten(2).transpose(1, 2) + self.position  # [N, tokens, WIDTH]
        for block in self.blocks:
            h = block(h, e)
        v = self.pixels(self.norm(h)).transpose(1, 2)  # [N, PATCH^2, tokens]
        return nn.functional.fold(v, SIZE, PATCH, stride=PATCH)


# -------------------- needed: the network of --base, and its images
def load(path):
    """The network that is moved, in float32: here from the file that --train-base leaves."""
    net = create()
    net.load_state_dict(safetensors.torch.load_file(path))
    return net


def sample(net, noise, labels, steps):
    """noise [N, *SHAPE], labels [N] (None if CLASSES is 0) -> images [N, C, H, W] in [-1, 1]. No
    torch.no_grad(): the gradient search differentiates through it. It calls the network itself,
    not its parts: so half precision and the guided control can take its place."""
    x = noise
    for i in range(steps):
        t = torch.full([len(x)], i / steps, device=x.device)
        x = x + net(x, t, labels) / steps
    return x


# -------------------- for self-training (without --aux): the loss of every sample, [N]
def loss(net, x, labels):
    """x [N, C, H, W] in [-1, 1]. Random numbers come from torch's global generator."""
    noise = torch.randn_like(x)
    t = torch.rand(len(x), device=x.device)
    x_t = noise + t[:, None, None, None] * (x - noise)
    return (net(x_t, t, labels) - (x - noise)).square().mean((1, 2, 3))


# -------------------- for --train-base: an untrained network
def create():
    return Transformer()


# -------------------- optional: the blocks of --partition paper and layers, by parameter name
def block(name):
    """Input side, inner transformer blocks, output side."""
    part, number = name.split(".")[:2] if "." in name else (name, "")
    if part == "blocks":
        return "enc" if number == "0" else "dec" if number == str(DEPTH - 1) else "mid"
    return "dec" if part in ("norm", "pixels") else "enc"


def layer(name):
    """One weight for all of the embeddings, one for each transformer block, one for the output."""
    part, number = name.split(".")[:2] if "." in name else (name, "")
    if part == "blocks":
        return f"block {number}"
    return "output" if part in ("norm", "pixels") else "embeddings"


# Also optional:
#   CONTROLS          {row: settings of sample()}, what a critic would try: see ar_glyphs.py
#   encode(images)    uint8 [N, C, H, W] -> what loss() trains on, as through a VAE
#   features(images)  uint8-valued [N, C, H, W] -> [N, D], instead of the preset's feature network
#   save(net, path)   how the repaired network is written, instead of a .safetensors file
