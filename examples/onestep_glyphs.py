r"""A one-step generator for `edm_neon.py --model`: small grey digits, each in a single evaluation
of the network, learnt from nothing.

    python edm_neon.py --preset glyphs --model examples/onestep_glyphs.py --steps 1 \
        --train-base 100 --base-lr 1e-3 --snapshot 3 --grid 1,2 --sweep 0:3:0.25 --continue-on-data

Where flow matching predicts the velocity at a time t, this network predicts the mean velocity from
t to a later time s, as MeanFlow (arXiv 2505.13447) does: one evaluation leads from noise (t = 0) to
an image (s = 1), and --steps 2 goes by way of s = 1/2. It costs no training at all to begin with
less noise, so the base at its best scale of noise stands in the table too (CONTROLS).

Rates, lengths and weights to try were chosen at --seed 100.
"""

import safetensors.torch
import torch
from torch import nn

SIZE = 12  # pixels a side: --preset glyphs has 12 x 12 images
PATCH = 4  # every 4 x 4 pixels are a token
WIDTH, HEADS, DEPTH = 64, 4, 4
INSTANT = 0.5  # share of the training where s = t: plain flow matching
PART = 0.1  # of the way from t to s that goes by the velocity

# -------------------- needed: the noise of one sample, the number of labels (0: none)
SHAPE = (1, SIZE, SIZE)
CLASSES = 10


class Block(nn.Module):
    """Attention and MLP, both shifted and scaled by the embedding of times and label."""

    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 4 * WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x, e):
        """x [N, tokens, WIDTH], e [N, WIDTH]."""
        scale1, shift1, scale2, shift2 = self.modulation(e)[:, None].chunk(4, 2)  # [N, 1, WIDTH]
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(2, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [N, HEADS, tokens, WIDTH / HEADS] each
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Transformer(nn.Module):
    """x_t [N, 1, SIZE, SIZE], times t <= s [N] in [0, 1], labels [N] -> the mean velocity between
    them, of x_t's shape."""

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
        self.register_buffer("frequencies", torch.pi * torch.arange(1.0, 5.0))

    def forward(self, x, t, s, labels):
        angles = torch.cat([t[:, None] * self.frequencies, (s - t)[:, None] * self.frequencies], 1)
        e = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(labels)
        h = self.patch(x).flatten(2).transpose(1, 2) + self.position  # [N, tokens, WIDTH]
        for block in self.blocks:
            h = block(h, e)
        h = self.pixels(self.norm(h)).transpose(1, 2)  # [N, PATCH^2, tokens]

        # From noise to image the mean velocity is their difference: the rest need not know of the
        # noise, and is the image itself.
        return nn.functional.fold(h, SIZE, PATCH, stride=PATCH) - x


# -------------------- needed: the network of --base, and its images
def load(path):
    net = create()
    net.load_state_dict(safetensors.torch.load_file(path))
    return net


def sample(net, noise, labels, steps, scale=1.0):
    """noise [N, *SHAPE], labels [N] -> images [N, 1, SIZE, SIZE] in [-1, 1]."""
    x = scale * noise
    for i in range(steps):
        t = torch.full([len(x)], i / steps, device=x.device)
        x = x + net(x, t, t + 1 / steps, labels) / steps
    return x


# -------------------- for self-training (without --aux): the loss of every sample, [N]
def loss(net, x, labels):
    """x [N, 1, SIZE, SIZE] in [-1, 1]. Random numbers come from torch's global generator."""
    noise = torch.randn_like(x)
    velocity = x - noise

    # Instants, and ways from an early time to a late one: sampling goes the whole way.
    instant = torch.rand(len(x), 1, 1, 1, device=x.device) < INSTANT
    t, left = torch.rand(2, len(x), 1, 1, 1, device=x.device)
    t = torch.where(instant, t, t.square())
    s = torch.where(instant, t, 1 - (1 - t) * left.square())

    u = net(noise + t * velocity, t.flatten(), s.flatten(), labels)

    # The mean from t to s is that of its first part, the velocity, and of the rest, where the
    # network is its own teacher.
    ahead = t + PART * (s - t)
    with torch.no_grad():
        rest = net(noise + ahead * velocity, ahead.flatten(), s.flatten(), labels)
    target = PART * velocity + (1 - PART) * rest
    return ((u - target) / PART).square().mean((1, 2, 3))


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
    """One weight for the embeddings, one for each transformer block, one for the output."""
    part, number = name.split(".")[:2] if "." in name else (name, "")
    if part == "blocks":
        return f"block {number}"
    return "output" if part in ("norm", "pixels") else "embeddings"


# -------------------- optional: what a critic would try instead of new weights
# {row of the table: arguments of sample()}; of several, the best on the selection's seeds.
CONTROLS = {"best noise scale": [{"scale": a} for a in (0.7, 0.75, 0.8, 0.85, 0.9, 1.1)]}
