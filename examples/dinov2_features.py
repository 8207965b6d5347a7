"""DINOv2 as a judge of images: features that no Inception network has shaped (Stein et al. 2023).

    pip install transformers
    python edm_neon.py --preset cifar10 --data cifar10.zip --judge examples/dinov2_features.py

Weights come from the Hugging Face hub at the first call (or from its cache), about 350 MB.
"""

import functools

import torch
import torch.nn.functional as F

NAME = "facebook/dinov2-base"
SIDE = 224  # 16 x 16 patches of 14 pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in its training


@functools.cache
def network(device):
    from transformers import Dinov2Model

    return Dinov2Model.from_pretrained(NAME).eval().requires_grad_(False).to(device)


def features(images):
    """uint8-valued [N, 1 or 3, H, W] -> class token [N, 768] float32; differentiable."""
    x = images.float().expand(-1, 3, -1, -1) / 255
    x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    x = (x.clamp(0, 1) - mean) / std
    return network(x.device)(pixel_values=x).last_hidden_state[:, 0].float()
