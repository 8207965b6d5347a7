r"""An autoregressive model for `edm_neon.py --model`: small grey digits as 36 tokens, one after the
other. No diffusion, no sampler steps, no gradient through its samples.

    python edm_neon.py --preset glyphs --model examples/ar_glyphs.py --steps 1 \
        --train-base 60 --snapshot 20 --lr 2e-6 --grid 0.5,1 --sweep 0:2:0.25 --controls guided,own

A token is one of 128 patches of 2 x 2 pixels. A causal transformer says how probable each is; the
seam's Gaussian numbers, as uniform ones, choose. It is sampled a little colder than it was trained,
as such models are. Another temperature costs no training at all, so the base at its best one stands
in the table too (CONTROLS).
"""

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

SIZE, PATCH = 12, 2  # pixels a side, of images and of patches
TOKENS = (SIZE // PATCH) ** 2
WIDTH, HEADS, DEPTH = 64, 4, 6

# The tokenizer is frozen, as those of large models are: 128 patches of four pixels, k-means of the
# preset's training images (fit() below). It is part of this file, and so of every cached result.
CODEBOOK = torch.frombuffer(
    bytearray.fromhex(
        "00000000e081e2735c1fd8d282060c010300280217a5915fdc55d71d115f5527e3e11f17520373030881020a"
        "02241dc20272047ee5e2e2e47bde7ddbb42c0d02026e0247039307a470b5b7a855ba095b900fb3989d842450"
        "060ba0b4515e900fb660ba570137023ddb2dd668bb387cc4024006780d84a2b912dd0ed7050481814f21369d"
        "a3bd641d1002bf262a98912782b6050bd62980039addd9d77c780404040c5bb2c28b57c8cfb6c526bb103701"
        "d2d56b651ecc9dd583049103a6077001be24d4c34213a1aa854f5306736ed8d9ba6cbaa94bc0bf4ba344b115"
        "944134afc9703c0671749c5e2354d3d373410503580ac656030848755b5c5b5d9e188b480fc30596bfd428cf"
        "b010c84c46dbd8dbbb0aac05de7ddedc0004032cbd7b8c0a05ad10c80e0dd4d2c4bf177bd7df74df03033e3f"
        "57ae7573466204034602b40ba1312a5a0109066c545f0c52054f0106015b0db100020113c0ba09051ad64ade"
        "4e0406015ddc2cde0c018b0707a403661abc5da75b096e600005044a074b6ba7bdb6b1bc7c034301a7880704"
        "1004c07f998312ad9fbcbf6a70ac57b6174c9c6b579b5413010f0b973a3602020d934e7340033d02b4c21c3c"
        "2302030028bebb90032400034f7b189cb12a6a8305037b4940bd12b708015605068048ccd912d914a383798e"
        "11ba0420459f030a605398ac83c90aa68d02c70fd9dbe08a7798b61c"
    ),
    dtype=torch.uint8,
).view(-1, PATCH**2)
VOCABULARY = len(CODEBOOK)

# -------------------- needed: the noise of one sample, the number of labels (0: none)
SHAPE = (TOKENS,)
CLASSES = 10


class Block(nn.Module):
    """Causal attention and MLP."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x, past):
        """x [N, L, WIDTH]. past: {block: keys and values of earlier tokens}, which grows; None in
        training, where the whole sequence is there."""
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [N, HEADS, L, WIDTH / HEADS] each
        if past is not None:
            if self in past:
                k, v = torch.cat([past[self][0], k], 2), torch.cat([past[self][1], v], 2)
            past[self] = k, v
        a = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.proj(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Label and tokens so far [N, L], the first of them at this place -> logits of the token after
    each, [N, L, VOCABULARY]."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(VOCABULARY + CLASSES, WIDTH)  # the sequence begins with its label
        self.position = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.5)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.logits = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens, first=0, past=None):
        h = self.token(tokens) + self.position[first : first + tokens.shape[1]]
        for block in self.blocks:
            h = block(h, past)
        return self.logits(self.norm(h))


# -------------------- needed: the network of --base, and its images
def load(path):
    net = create()
    net.load_state_dict(safetensors.torch.load_file(path))
    return net


def sample(net, noise, labels, steps, temperature=0.9, top_k=VOCABULARY):
    """noise [N, TOKENS], labels [N] -> images [N, 1, SIZE, SIZE] in [-1, 1]. A uniform number
    chooses a token: the one in whose share of [0, 1] it lies."""
    uniform = torch.special.ndtr(noise.double())
    token = VOCABULARY + labels[:, None]
    tokens, past = [], {}
    for i in range(TOKENS):
        logits = net(token, i, past)[:, 0].double() / temperature
        least = logits.topk(top_k).values[:, -1:]
        shares = logits.masked_fill(logits < least, -torch.inf).softmax(1).cumsum(1)
        token = (shares < uniform[:, i, None]).sum(1, keepdim=True).clamp_max(VOCABULARY - 1)
        tokens.append(token)
    return decode(torch.cat(tokens, 1))


def decode(tokens):
    """Tokens [N, TOKENS] -> images [N, 1, SIZE, SIZE], each of whose values rounds to its pixel."""
    patches = (CODEBOOK.to(tokens.device)[tokens].float() - 127.5) / 127.5
    return F.fold(patches.transpose(1, 2), SIZE, PATCH, stride=PATCH)


# -------------------- for self-training (without --aux): what is trained on, and the loss [N]
def encode(images):
    """uint8 [N, 1, SIZE, SIZE] -> tokens [N, TOKENS], the nearest patches."""
    patches = F.unfold(images.float(), PATCH, stride=PATCH).transpose(1, 2)
    return torch.cdist(patches, CODEBOOK.to(images.device).float()).argmin(2)


def loss(net, x, labels):
    """x: tokens [N, TOKENS] -> nats a token."""
    before = torch.cat([VOCABULARY + labels[:, None], x[:, :-1]], 1)
    return F.cross_entropy(net(before).transpose(1, 2), x, reduction="none").mean(1)


# -------------------- for --train-base: an untrained network
def create():
    return Transformer()


# -------------------- optional: the blocks of --partition paper and layers, by parameter name
def block(name):
    """Input side, inner transformer blocks, output side."""
    part, number = name.split(".")[:2] if "." in name else (name, "")
    if part == "blocks":
        return "enc" if number == "0" else "dec" if number == str(DEPTH - 1) else "mid"
    return "dec" if part in ("norm", "logits") else "enc"


def layer(name):
    """One weight for the embeddings, one for each transformer block, one for the output."""
    part, number = name.split(".")[:2] if "." in name else (name, "")
    if part == "blocks":
        return f"block {number}"
    return "output" if part in ("norm", "logits") else "embeddings"


# -------------------- optional: what a critic would try instead of new weights
# {row of the table: arguments of sample()}; of several, the best on the selection's seeds.
CONTROLS = {
    "best temperature": [{"temperature": t} for t in (0.8, 0.85, 0.95, 1.0, 1.05, 1.1)],
    "best top-k": [{"temperature": 1.0, "top_k": k} for k in (10, 20, 40, 80)],
}


# -------------------- how the codebook was made
def fit():
    """k-means of the patches of the preset's training images, begun at patches far apart."""
    from adaptive_neon.glyphs import draw_glyphs

    images, _ = draw_glyphs(5_000, 0)
    patches = F.unfold(images.float(), PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    patches, counts = patches.unique(dim=0, return_counts=True)
    generator = torch.Generator().manual_seed(0)
    centres = patches[counts.argmax()][None]
    for _ in range(127):
        far = torch.cdist(patches, centres).square().amin(1) * counts
        chosen = torch.multinomial(far, 1, generator=generator)
        centres = torch.cat([centres, patches[chosen]])
    for _ in range(30):
        nearest = torch.cdist(patches, centres).argmin(1)
        total = torch.zeros_like(centres).index_add(0, nearest, patches * counts[:, None])
        weight = torch.zeros(len(centres)).index_add(0, nearest, counts.float())
        centres = torch.where(weight[:, None] > 0, total / weight[:, None], centres)
    return centres.round().to(torch.uint8)


if __name__ == "__main__":
    print(bytes(fit().flatten().tolist()).hex())
