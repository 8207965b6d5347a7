"""CLIP as a judge: image features for the Fréchet and the kernel distance (unit vectors, as in
CMMD, Jayasumana et al. 2024), and the CLIP score as adherence to prompts.

    pip install transformers
    python edm_neon.py --base FOLDER --prompts prompts.txt --data images.zip \\
        --judge examples/clip_judge.py

Weights come from the Hugging Face hub at the first call (or from its cache), about 600 MB.
"""

import functools

import torch
import torch.nn.functional as F

NAME = "openai/clip-vit-base-patch32"
SIDE = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of its training
STD = (0.26862954, 0.26130258, 0.27577711)


@functools.cache
def network(device):
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(NAME).eval().requires_grad_(False).to(device)


@functools.cache
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(NAME)


@functools.lru_cache(maxsize=100_000)
def text_vector(prompt, device):
    """Unit vector [D] of a prompt."""
    words = tokenizer()(prompt, truncation=True, return_tensors="pt").to(device)
    net = network(device)
    with torch.no_grad():
        found = net.text_projection(net.text_model(**words).pooler_output)
    return F.normalize(found[0].float(), dim=0)


def features(images):
    """uint8-valued [N, 1 or 3, H, W] -> unit vectors [N, D] float32; differentiable."""
    x = images.float().expand(-1, 3, -1, -1) / 255
    x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    net = network(x.device)
    seen = net.vision_model(pixel_values=(x.clamp(0, 1) - mean) / std).pooler_output
    return F.normalize(net.visual_projection(seen).float(), dim=1)


def alignment(images, prompts):
    """CLIP score [N], 100 times the cosine, 0 where it is negative. prompts: N texts."""
    texts = torch.stack([text_vector(prompt, images.device) for prompt in prompts])
    return 100 * (features(images) * texts).sum(1).clamp(min=0)
