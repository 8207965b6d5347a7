"""EDM's networks (arXiv 2206.00364): DDPM++, NCSN++ and ADM, and what makes denoisers of them.

Names, order and values of a state dict are those of EDM's files.
"""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .files import UserError


# -------------------- layers
def filter_of(taps):
    """[1, 1, k, k]: the same taps along both axes, which add up to one."""
    f = torch.as_tensor(taps, dtype=torch.float32)
    return (f[:, None] * f / f.sum() ** 2)[None, None]


class Resample(nn.Module):
    """x [N, C, H, W] in twice or half the resolution, every channel through one small filter."""

    def __init__(self, up, taps):
        super().__init__()
        self.up, self.taps = up, list(taps)
        self.register_buffer("resample_filter", filter_of(taps))

    def forward(self, x):
        return resample(x, self)


def resample(x, layer):
    """layer: has up, taps and resample_filter [1, 1, k, k]."""
    if layer.taps == [1, 1]:
        return F.interpolate(x, scale_factor=2) if layer.up else F.avg_pool2d(x, 2)
    channels, f_pad = x.shape[1], (len(layer.taps) - 1) // 2
    f = layer.resample_filter.to(x.dtype)
    if layer.up:
        f = (f * 4).expand(channels, 1, -1, -1)
        return F.conv_transpose2d(x, f, stride=2, padding=f_pad, groups=channels)
    return F.conv2d(x, f.expand(channels, 1, -1, -1), stride=2, padding=f_pad, groups=channels)


class Conv(nn.Conv2d):
    """2-D convolution after resampling (fused: before it, as in NCSN++'s residual path)."""

    def __init__(
        self, c_in, c_out, kernel, up=False, down=False, resample_filter=(1, 1), fused=False
    ):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)
        self.up, self.fused, self.taps = up, fused, list(resample_filter)
        self.register_buffer("resample_filter", filter_of(self.taps) if up or down else None)

    def forward(self, x):
        if self.resample_filter is not None and self.fused:
            return self.fused_downsampling(x)
        if self.resample_filter is not None:
            x = resample(x, self)
        return super().forward(x)

    def fused_downsampling(self, x):
        x = F.conv2d(x, self.weight, padding=self.padding[0] + (len(self.taps) - 1) // 2)
        f = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, f, self.bias, stride=2, groups=x.shape[1])


class UNetBlock(nn.Module):
    """Residual block with noise embedding, optional resampling and self-attention."""

    eps = 1e-6
    skip_scale = 0.5**0.5
    adaptive = False  # the embedding is added; or scales and shifts what is normalised
    head_width = 0  # channels of an attention head; 0: there is one head

    def __init__(
        self, c_in, c_out, c_emb, dropout, resample_filter, up=False, down=False, attention=False
    ):
        super().__init__()
        self.dropout = dropout
        resampling = {"up": up, "down": down, "resample_filter": resample_filter}
        self.norm0 = group_norm(c_in, self.eps)
        self.conv0 = Conv(c_in, c_out, 3, **resampling)
        self.affine = nn.Linear(c_emb, 2 * c_out if self.adaptive else c_out)
        self.norm1 = group_norm(c_out, self.eps)
        self.conv1 = Conv(c_out, c_out, 3)

        # ADM resamples what it skips without weights.
        self.skip = None
        if self.adaptive and c_in == c_out and (up or down):
            self.skip = Resample(up, resample_filter)
        elif c_in != c_out or up or down:
            self.skip = Conv(c_in, c_out, 1, **resampling)

        self.heads = 0
        if attention:
            self.heads = c_out // self.head_width if self.head_width else 1
        if self.heads:
            self.norm2 = group_norm(c_out, self.eps)
            self.qkv = Conv(c_out, 3 * c_out, 1)
            self.proj = Conv(c_out, c_out, 1)

    def forward(self, x, emb):
        inplace = not torch.is_grad_enabled()
        h = self.conv0(F.silu(self.norm0(x), inplace))
        modulation = self.affine(emb)[:, :, None, None]
        if self.adaptive:
            scale, shift = modulation.chunk(2, 1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h.add_(modulation))
        h = F.dropout(F.silu(h, inplace), self.dropout, self.training)
        h = self.conv1(h)
        x = h.add_(x if self.skip is None else self.skip(x)).mul_(self.skip_scale)
        return self.attend(x) if self.heads else x

    def attend(self, x):
        n, c, height, width = x.shape
        # The channels of q, k and v are interleaved.
        qkv = self.qkv(self.norm2(x)).reshape(n, self.heads, -1, 3, height * width)
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(3))  # [N, heads, HW, C / heads]
        a = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        # Contiguous, or dropout would draw its mask in another order than EDM's.
        a = self.proj(a.contiguous().view(x.shape))
        return a.add_(x).mul_(self.skip_scale)


class AdmBlock(UNetBlock):
    """Of ADM (arXiv 2105.05233): BigGAN's resampling, adaptive group normalisation, many heads."""

    eps, skip_scale, adaptive, head_width = 1e-5, 1.0, True, 64


def group_norm(channels, eps=1e-6):
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


# -------------------- U-Nets
class UNet(nn.Module):
    """Blocks from high to low resolution (enc) and back (dec), which sees every output of enc."""

    def build(
        self, block, c_in, c_first, widths, img_resolution, num_blocks, attn_resolutions, residual
    ):
        """-> channels at the end, name of its resolution. block(c_in, c_out, ...): makes one;
        widths: channels of every level; residual(c_in, c_out): a layer beside every `down`, or
        None."""
        levels = []  # (name of the resolution, attention there, channels)
        for level, width in enumerate(widths):
            size = img_resolution >> level
            levels.append((f"{size}x{size}", size in attn_resolutions, width))

        # Encoder.
        self.enc = nn.ModuleDict()
        skips = []  # channels of every output that the decoder will see
        c_out = c_aux = c_in
        for level, (resolution, attention, width) in enumerate(levels):
            if level == 0:
                self.enc[f"{resolution}_conv"] = Conv(c_out, c_first, 3)
                c_out = c_first
            else:
                self.enc[f"{resolution}_down"] = block(c_out, c_out, down=True)
                if residual is not None:
                    self.enc[f"{resolution}_aux_residual"] = residual(c_aux, c_out)
                    c_aux = c_out
            skips.append(c_out)
            for i in range(num_blocks):
                self.enc[f"{resolution}_block{i}"] = block(c_out, width, attention=attention)
                c_out = width
                skips.append(c_out)

        # Decoder; at the bottom always with attention.
        self.dec = nn.ModuleDict()
        for level, (resolution, attention, width) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec[f"{resolution}_in0"] = block(c_out, c_out, attention=True)
                self.dec[f"{resolution}_in1"] = block(c_out, c_out)
            else:
                self.dec[f"{resolution}_up"] = block(c_out, c_out, up=True)
            for i in range(num_blocks + 1):
                attends = attention and (self.attends_everywhere or i == num_blocks)
                c_in = c_out + skips.pop()
                self.dec[f"{resolution}_block{i}"] = block(c_in, width, attention=attends)
                c_out = width
        return c_out, resolution

    def kept_labels(self, labels):
        """labels [N, K], in training without those that label dropout takes."""
        if self.training and self.label_dropout:
            kept = torch.rand(len(labels), 1, device=labels.device) >= self.label_dropout
            labels = labels * kept
        return labels

    def forward(self, x, c_noise, labels, augment_labels=None):
        emb = self.embed(c_noise, labels, augment_labels)
        aux = x
        skips = []
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) / 2**0.5
                continue
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if name.endswith("aux_norm"):
                x = F.silu(layer(x))
            elif name.endswith("aux_conv"):
                x = layer(x)
            elif "_block" in name:
                x = layer(torch.cat([x, skips.pop()], 1), emb)
            else:
                x = layer(x, emb)
        return x


class SongUNet(UNet):
    """DDPM++ (positional embedding, standard encoder) and NCSN++ (Fourier embedding, residual
    encoder)."""

    attends_everywhere = False  # in the decoder: after the last block of a level

    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        channel_mult_emb=4,
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.10,
        label_dropout=0,
        embedding_type="positional",
        channel_mult_noise=1,
        encoder_type="standard",
        decoder_type="standard",
        resample_filter=(1, 1),
    ):
        super().__init__()
        if encoder_type not in ("standard", "residual") or decoder_type != "standard":
            raise UserError(
                f"encoder {encoder_type!r} with decoder {decoder_type!r} is not supported"
            )
        self.label_dropout = label_dropout
        c_noise = model_channels * channel_mult_noise
        c_emb = model_channels * channel_mult_emb

        # Embeddings of noise level, label and augmentation.
        self.noise = c_noise
        self.map_noise = None
        if embedding_type == "fourier":
            self.map_noise = nn.Module()
            self.map_noise.register_buffer("freqs", torch.randn(c_noise // 2) * 16)
        self.map_label = nn.Linear(label_dim, c_noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, c_noise, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(c_noise, c_emb)
        self.map_layer1 = nn.Linear(c_emb, c_emb)

        residual = None
        if encoder_type == "residual":
            residual = partial(
                Conv, kernel=3, down=True, fused=True, resample_filter=resample_filter
            )
        c_out, resolution = self.build(
            partial(UNetBlock, c_emb=c_emb, dropout=dropout, resample_filter=resample_filter),
            in_channels,
            model_channels,
            [model_channels * multiplier for multiplier in channel_mult],
            img_resolution,
            num_blocks,
            attn_resolutions,
            residual,
        )
        self.dec[f"{resolution}_aux_norm"] = group_norm(c_out)
        self.dec[f"{resolution}_aux_conv"] = Conv(c_out, out_channels, 3)
        self.initialise()

    def initialise(self):
        """Xavier-uniform weights, zero biases, almost zero where a residual branch or the network
        ends."""
        for name, p in self.named_parameters():
            layer = name.split(".")[-2]
            if p.ndim > 1:
                gain = 1.0
                if layer in ("conv1", "proj") or layer.endswith("aux_conv"):
                    gain = 1e-5
                elif layer == "qkv":
                    gain = 0.2**0.5
                nn.init.xavier_uniform_(p, gain)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def embed(self, c_noise, labels, augment_labels):
        """The embedding [N, c_emb] that every block adds."""
        if self.map_noise is None:
            i = torch.arange(self.noise // 2, dtype=torch.float32, device=c_noise.device)
            frequency = (1 / 10000) ** (i / (self.noise // 2 - 1))
        else:
            frequency = 2 * np.pi * self.map_noise.freqs
        t = c_noise.outer(frequency.to(c_noise.dtype))
        e = torch.cat([t.sin(), t.cos()], 1).to(self.map_layer0.weight.dtype)

        if self.map_label is not None:
            e = e + self.map_label(self.kept_labels(labels) * labels.shape[1] ** 0.5)
        if self.map_augment is not None and augment_labels is not None:
            e = e + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(e))))


class DhariwalUNet(UNet):
    """ADM, EDM's network of ImageNet (Dhariwal and Nichol, arXiv 2105.05233)."""

    attends_everywhere = True

    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb=4,
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.10,
        label_dropout=0,
    ):
        super().__init__()
        self.label_dropout = label_dropout
        c_emb = model_channels * channel_mult_emb

        # Embeddings of noise level, augmentation and label; the label's comes last.
        self.noise = model_channels
        self.map_augment = None
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, model_channels, bias=False)
        self.map_layer0 = nn.Linear(model_channels, c_emb)
        self.map_layer1 = nn.Linear(c_emb, c_emb)
        self.map_label = nn.Linear(label_dim, c_emb, bias=False) if label_dim else None

        widths = [model_channels * multiplier for multiplier in channel_mult]
        c_out, _ = self.build(
            partial(AdmBlock, c_emb=c_emb, dropout=dropout, resample_filter=(1, 1)),
            in_channels,
            widths[0],
            widths,
            img_resolution,
            num_blocks,
            attn_resolutions,
            residual=None,
        )
        self.out_norm = group_norm(c_out, AdmBlock.eps)
        self.out_conv = Conv(c_out, out_channels, 3)
        self.initialise()

    def initialise(self):
        """Zero where a residual branch or the network ends; elsewhere torch's own, which is ADM's:
        uniform, with variance 1 / (3 fan_in)."""
        for name, p in self.named_parameters():
            layer = name.split(".")[-2]
            if layer in ("conv1", "proj", "out_conv", "map_augment"):
                nn.init.zeros_(p)
            elif layer == "map_label":
                nn.init.normal_(p)

    def embed(self, c_noise, labels, augment_labels):
        """The embedding [N, c_emb] that scales and shifts in every block."""
        half = self.noise // 2
        i = torch.arange(half, dtype=torch.float32, device=c_noise.device)
        t = c_noise.outer(((1 / 10000) ** (i / half)).to(c_noise.dtype))
        e = torch.cat([t.cos(), t.sin()], 1).to(self.map_layer0.weight.dtype)
        if self.map_augment is not None and augment_labels is not None:
            e = e + self.map_augment(augment_labels)
        e = self.map_layer1(F.silu(self.map_layer0(e)))
        if self.map_label is not None:
            e = e + self.map_label(self.kept_labels(labels))
        return F.silu(e)

    def forward(self, x, c_noise, labels, augment_labels=None):
        x = super().forward(x, c_noise, labels, augment_labels)
        return self.out_conv(F.silu(self.out_norm(x)))


# -------------------- denoisers: EDM's table 1
class Precond(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise): the denoised x [N, C, H, W].

    attributes: numbers of the formulas, {name: default}. EDM takes them as a file's object has
    them now, not as it was built.
    """

    attributes: dict = {}
    sigma_min: float
    sigma_max: float
    outputs = 1  # of the network, in images

    def __init__(self, img_resolution, img_channels, label_dim=0, model_type="SongUNet", **options):
        super().__init__()
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.label_dim = label_dim
        for name, default in self.attributes.items():
            setattr(self, name, options.pop(name, default))
        self.set_range()
        self.model = MODELS[model_type](
            img_resolution,
            img_channels,
            self.outputs * img_channels,
            label_dim=label_dim,
            **options,
        )
        self.options = {
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "label_dim": label_dim,
            **options,
        }
        if model_type != "SongUNet":
            self.options["model_type"] = model_type
        if type(self) is not EDMPrecond:
            self.options["precond"] = type(self).__name__

    @property
    def config(self):
        """denoiser(**config) builds this network, without its weights."""
        return self.options | {name: getattr(self, name) for name in self.attributes}

    def set_range(self):
        """sigma_min and sigma_max, where they follow from the other attributes."""

    def coefficients(self, sigma):
        """c_skip, c_out, 1 / c_in, c_noise for noise levels sigma [N, 1, 1, 1]."""
        raise NotImplementedError

    def draw_sigma(self, count, device):
        """Noise levels of training, [count, 1, 1, 1]."""
        raise NotImplementedError

    def loss_weight(self, sigma):
        return 1 / sigma**2

    def round_sigma(self, sigma):
        """The nearest noise level that the network knows."""
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        x = x.float()
        sigma = torch.as_tensor(sigma, device=x.device).float().reshape(-1, 1, 1, 1)
        labels = None
        if self.label_dim:
            if class_labels is None:
                class_labels = torch.zeros(1, self.label_dim, device=x.device)
            labels = class_labels.float().reshape(-1, self.label_dim)

        c_skip, c_out, scale, c_noise = self.coefficients(sigma)
        out = self.model(x / scale, c_noise.flatten(), labels, augment_labels)
        return c_skip * x + c_out * out[:, : self.img_channels].float()


class EDMPrecond(Precond):
    """EDM's own; ln sigma of training is normal."""

    attributes = {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5}

    def coefficients(self, sigma):
        total = sigma.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        return c_skip, sigma * self.sigma_data / total.sqrt(), total.sqrt(), sigma.log() / 4

    def draw_sigma(self, count, device, P_mean=-1.2, P_std=1.2):
        return (torch.randn(count, 1, 1, 1, device=device) * P_std + P_mean).exp()

    def loss_weight(self, sigma):
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VPPrecond(Precond):
    """Variance preserving (arXiv 2011.13456): noise grows with time t in [epsilon_t, 1]."""

    attributes = {
        "beta_d": 19.9,
        "beta_min": 0.1,
        "M": 1000,
        "epsilon_t": 1e-5,
        "sigma_min": None,
        "sigma_max": None,
    }

    def set_range(self):
        if self.sigma_min is None:
            self.sigma_min = float(self.sigma(torch.tensor(self.epsilon_t, device="cpu")))
        if self.sigma_max is None:
            self.sigma_max = float(self.sigma(torch.tensor(1.0, device="cpu")))

    def sigma(self, t):
        return ((self.beta_d * t**2 / 2 + self.beta_min * t).exp() - 1).sqrt()

    def coefficients(self, sigma):
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt()
        t = (root - self.beta_min) / self.beta_d
        return 1, -sigma, (sigma**2 + 1).sqrt(), (self.M - 1) * t

    def draw_sigma(self, count, device):
        t = 1 + torch.rand(count, 1, 1, 1, device=device) * (self.epsilon_t - 1)
        return self.sigma(t)


class VEPrecond(Precond):
    """Variance exploding (arXiv 2011.13456): ln sigma of training is uniform."""

    attributes = {"sigma_min": 0.02, "sigma_max": 100}

    def coefficients(self, sigma):
        return 1, sigma, 1, (sigma / 2).log()

    def draw_sigma(self, count, device):
        ratio = self.sigma_max / self.sigma_min
        return self.sigma_min * ratio ** torch.rand(count, 1, 1, 1, device=device)


class iDDPMPrecond(Precond):
    """Improved DDPM (arXiv 2102.09672): M noise levels, of which training draws all as often. The
    network also predicts a variance, which nothing here uses or trains."""

    attributes = {"C_1": 0.001, "C_2": 0.008, "M": 1000, "sigma_min": None, "sigma_max": None}
    outputs = 2

    def set_range(self):
        def alpha(j):
            return math.sin(math.pi / 2 * j / self.M / (1 + self.C_2)) ** 2

        u = [0.0] * (self.M + 1)
        for j in range(self.M, 0, -1):
            u[j - 1] = ((u[j] ** 2 + 1) / max(alpha(j - 1) / alpha(j), self.C_1) - 1) ** 0.5
        self.register_buffer("u", torch.tensor(u))
        if self.sigma_min is None:
            self.sigma_min = u[self.M - 1]
        if self.sigma_max is None:
            self.sigma_max = u[0]

    def coefficients(self, sigma):
        return 1, -sigma, (sigma**2 + 1).sqrt(), self.M - 1 - self.index(sigma).float()

    def index(self, sigma):
        """Of the nearest noise level."""
        sigma = torch.as_tensor(sigma)
        apart = torch.cdist(sigma.to(self.u).reshape(-1, 1), self.u[:, None])
        return apart.argmin(1).reshape(sigma.shape)

    def round_sigma(self, sigma):
        sigma = torch.as_tensor(sigma)
        return self.u[self.index(sigma)].to(sigma)

    def draw_sigma(self, count, device):
        return self.u[torch.randint(self.M, [count, 1, 1, 1], device=device)]


MODELS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
PRECONDS = {cls.__name__: cls for cls in (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)}


def denoiser(precond="EDMPrecond", **options) -> Precond:
    """A network by its config."""
    return PRECONDS[precond](**options)
