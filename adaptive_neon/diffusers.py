"""A pipeline of Hugging Face diffusers as --base: a folder with `model_index.json`.

    DDPMPipeline, DDIMPipeline    UNet2DModel on pixels
    LDMPipeline                   UNet2DModel on the latents of a VQModel or AutoencoderKL
    DiTPipeline                   DiTTransformer2DModel on the latents of an AutoencoderKL

(text.py: those that take prompts.) Only the denoiser moves. Images are sampled with DDIM at eta = 0
over the time steps of the folder's scheduler. That is what the pipeline itself makes of the same
noise, where its DDIMScheduler.step goes from each time to the next: it supposes equal distances,
which the spacing "linspace" has only with all times, and "trailing" only where the number of steps
divides the number of times.

Only the classes above are built: code that comes with a folder is never run, and pickles are read
as weights only. Whatever is wrong with a folder is one line.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from .blocks import copied
from .controls import GUIDANCE
from .files import UserError
from .folders import (
    RECIPE,
    check_finite,
    home,
    import_diffusers,
    input_shape,
    new_folder,
    one_of,
    options,
    public,
    read_config,
    read_index,
    read_network,
    refuse,
    resolve,
    variant_of,
    write_network,
    wrong,
)
from .keys import pipeline_key, weights_hash
from .modelfile import UserModel

# Raised whenever the same folder would give other images or another loss: cached results are then
# made again.
VERSION = 1

# What a part of model_index.json may be: {part: {class there: class that reads it}}. (DiT's first
# folders name a former class.)
DECODER = {"AutoencoderKL": "AutoencoderKL", "VQModel": "VQModel"}
PARTS = {
    "unet": {"UNet2DModel": "UNet2DModel"},
    "transformer": {
        "DiTTransformer2DModel": "DiTTransformer2DModel",
        "Transformer2DModel": "DiTTransformer2DModel",
    },
    "vae": DECODER,
    "vqvae": DECODER,
}

# Schedulers that share DDIM's noise levels (variance preserving, discrete time), so that DDIM can
# walk their steps.
SCHEDULERS = (
    *("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM", "DPMSolverMultistep"),
    *("DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "EulerDiscrete"),
    *("EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete"),
)

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".h5")

# The autoencoder sees at most this many pixels at once: 256 images of 32x32, 4 of 256x256.
PIXELS = 2**18

# Of the control that samples the base with more or less guidance: shares of the model's own.
GUIDANCES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)

# DiT's own training: this part of the labels is replaced by the null class that guidance needs.
LABEL_DROP = 0.1


class DiffusersModel(UserModel):
    """A pipeline folder behind the seam: everything but the denoiser's weights, which load() reads.
    Its methods may be called from several threads.

    guidance: of the classifier-free kind, 1 is none. The null class is the one after the last.
    """

    parts_known = PARTS
    rescale = 0.0  # how far a guided output is brought back to the spread of the given one
    own_guidance = 1.0  # where none is asked for

    def __init__(self, c):
        self.path = self.folder = resolve(c.base)
        self.guidance = self.own_guidance if c.guidance is None else float(c.guidance)
        diffusers = import_diffusers()

        # The parts: one denoiser, one scheduler, and an autoencoder if it is a latent model.
        self.parts = read_index(self.folder, self.parts_known)
        self.denoiser = one_of(("unet", "transformer"), self.parts)
        self.decoder = one_of(("vae", "vqvae"), self.parts)
        self.network_class = getattr(diffusers, self.parts[self.denoiser])
        self.process = self.read_process()
        self.vae: Any = None
        if self.decoder:
            self.vae, self.scale, self.shift = self.read_autoencoder(self.folder)

        # The denoiser's configuration says what noise and labels it takes.
        place = home(self.folder, self.denoiser)
        variant_of(place)  # there are weights
        with refuse(f"{place}/config.json"), torch.device("meta"):
            self.config = options(self.network_class.from_config(read_config(place)))
        self.shape = input_shape(self.config, place)
        self.image_size = self._check_sizes()
        self.number_of_classes = self.label_count(place)
        self._check_guidance()
        if self.guidance > 1:
            values = {1.0, *(max(1.0, round(self.guidance * share, 3)) for share in GUIDANCES)}
            self.controls = {GUIDANCE: [{GUIDANCE: value} for value in sorted(values)]}

        # Quantisation is constant between its jumps, and what autograd reports there (straight
        # through) is no slope.
        if type(self.vae).__name__ == "VQModel":
            self.why_not = "a VQModel quantises its latents, so that images have no gradient"
        self.encodes = self.vae is not None
        self.identity = self.training_identity = self._key()
        self.ready(c)

    def ready(self, c) -> None:
        """Everything is checked: what samples needs goes to the device."""
        if self.vae is not None:
            self.vae.to(c.device)

    # ---------- what the folder says
    def read_process(self) -> "Ddim":
        return Ddim(self.folder, self.parts["scheduler"])

    def read_autoencoder(self, folder: Path):
        """The decoder of a pipeline like this one, and what its latents are multiplied by and
        shifted by. A VQModel that names no factor means 1, not the default."""
        place = home(folder, self.decoder)
        vae: Any = read_network(getattr(import_diffusers(), self.parts[self.decoder]), place)
        for key in ("latents_mean", "latents_std", "shift_factor"):
            if vae.config.get(key) is not None and key not in self.autoencoder_may:
                raise wrong(f"{place}: {key} is not supported, as its pipeline would not apply it")
        factor = vae.config.scaling_factor
        if type(vae).__name__ == "VQModel" and "scaling_factor" not in read_config(place):
            factor = 1.0
        if not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
            raise wrong(f"{place}: scaling_factor is {factor}, not a positive number")
        return vae.requires_grad_(False), float(factor), float(vae.config.get("shift_factor") or 0)

    autoencoder_may: tuple[str, ...] = ()  # what its configuration may have besides

    def label_count(self, place: Path) -> int:
        """The number of classes, 0 for an unconditional network."""
        if self.denoiser == "transformer":
            return self.config["num_embeds_ada_norm"]
        kind = self.config["class_embed_type"]
        if kind is not None:
            raise wrong(
                f"{place}: class_embed_type {kind} is not supported, only a table of labels"
            )
        return self.config["num_class_embeds"] or 0

    def _check_guidance(self) -> None:
        """Guidance compares with a null class, which is the last row of DiT's label tables and
        which U-Nets lack."""
        if not 1 <= self.guidance < float("inf"):
            raise wrong(f"guidance is {self.guidance:g}: 1 (none) or more is needed")
        if self.guidance > 1 and self.network_class.__name__ == "UNet2DModel":
            raise wrong(
                f"guidance {self.guidance:g} needs a null class, which UNet2DModel has not: leave "
                "it at 1"
            )

    def _check_sizes(self) -> tuple[int, int, int]:
        """What the parts expect of each other -> the shape of an image, [C, H, W]."""
        channels, height, width = self.shape
        if self.config["out_channels"] not in (None, channels, 2 * channels):
            raise wrong(
                f"{self.folder}: {self.denoiser} turns {channels} channels into "
                f"{self.config['out_channels']}: conditional on images, not supported"
            )
        if self.config.get("time_embedding_type") == "fourier":
            raise wrong(
                f"{self.folder}: time_embedding_type fourier (continuous noise) is not supported"
            )
        if self.vae is None:
            return (channels, height, width)

        c = self.vae.config
        latent = c.get("vq_embed_dim") or c.latent_channels
        if latent != channels:
            raise wrong(
                f"{self.folder}: {self.denoiser} takes {channels} channels, "
                f"{self.decoder} makes latents of {latent}"
            )
        factor = 2 ** (len(c.block_out_channels) - 1)
        return (c.in_channels, height * factor, width * factor)

    def _key(self) -> str:
        """Of all that decides the images and the loss, except the denoiser's weights."""
        autoencoder = None
        if self.vae is not None:
            kind, weights = type(self.vae).__name__, weights_hash(self.vae)
            autoencoder = [kind, options(self.vae), weights, self.scale]
        return pipeline_key(
            version=VERSION,
            network=[self.network_class.__name__, self.config],
            scheduler=public(self.process.scheduler.config),
            guidance=self.guidance,
            autoencoder=autoencoder,
        )

    def image_shape(self, net: nn.Module) -> tuple[int, ...]:
        return self.image_size

    # ---------- the denoiser's weights
    def fetch(self, source: str, what: str) -> Path:
        if source == str(self.path) or Path(source).exists():
            return Path(source)
        try:
            return resolve(source)
        except UserError as error:
            raise UserError(f"{what} {error}") from error

    def read(self, path: Path) -> nn.Module:
        """The denoiser of a pipeline folder, of a folder such as unet_ema, or of a .safetensors."""
        path = Path(path)
        if path.suffix == ".safetensors" and path.is_file():
            net = self._read_tensors(path)
        else:
            net = read_network(self.network_class, self._denoiser_home(path))
            self._check_same_network(path, net)
            if (path / "model_index.json").is_file() and path.resolve() != self.folder.resolve():
                self._check_same_surroundings(path)

        # diffusers drops labels in every block by itself, so that the null class almost never meets
        # itself in all of them; loss() drops a sample's label once for the whole network, as DiT
        # was trained.
        for module in net.modules():
            if hasattr(module, "dropout_prob"):
                setattr(module, "dropout_prob", 0.0)  # noqa: B010  no tensor, as mypy would have it
        return self.checked_network(net, "load")

    def _read_tensors(self, path: Path) -> nn.Module:
        """The base's network with exactly the tensors of a file."""
        with torch.random.fork_rng(devices=[]):
            net = self.network_class.from_config(self.config)
        with refuse(path):
            net.load_state_dict(load_file(path))
        check_finite(net, path)
        return net.eval()

    def _denoiser_home(self, path: Path) -> Path:
        """The folder with the denoiser's config.json, of a pipeline of the same kind as this."""
        if (path / "model_index.json").is_file():
            if self.denoiser not in read_index(path, self.parts_known):
                raise wrong(f"{path}: has no {self.denoiser}, {self.folder} has")
            return home(path, self.denoiser)
        if (path / "config.json").is_file():
            return path
        raise wrong(
            f"{path}: no pipeline folder (model_index.json), no {self.denoiser} folder "
            "(config.json), no .safetensors"
        )

    def _check_same_network(self, path: Path, net: nn.Module) -> None:
        """Sizes are not enough: with other groups or embeddings, weights mean another function."""
        theirs = options(net)
        for key, value in self.config.items():
            if key != "dropout" and theirs.get(key) != value:
                raise wrong(
                    f"{path}: does not fit {self.folder}: {key} is {theirs.get(key)}, not {value}"
                )

    def _check_same_surroundings(self, path: Path) -> None:
        """Networks for other noise levels, another target or other latents cannot be merged."""
        parts = read_index(path, self.parts_known)
        self.process.check_same(type(self.process)(path, parts["scheduler"]), path, self.folder)
        if one_of(("vae", "vqvae"), parts) != self.decoder:
            raise wrong(f"{path}: only one of it and {self.folder} has an autoencoder")
        if self.vae is None:
            return
        vae, *latents = self.read_autoencoder(path)
        same = options(vae) == options(self.vae) and latents == [self.scale, self.shift]

        # Up to the rounding of half precision, in which one of them may have been kept.
        tensors = vae.state_dict()
        for name, tensor in self.vae.state_dict().items():
            same = same and torch.allclose(tensors[name], tensor.cpu(), rtol=2e-3, atol=1e-4)
        if not same:
            raise wrong(f"{path}: its {self.decoder} is not that of {self.folder}")

    # ---------- sampling
    def sample(self, net, noise, labels, steps):
        """Images [N, C, H, W] float in [-1, 1] of noise [N, *shape] and labels int64 [N] or None.

        Differentiable; a function of its arguments, sample by sample. UserError: steps that the
        scheduler cannot make.
        """

        def predict(x, times):
            return self._guided(net, x, times, labels)

        return self._decode(self.process.walk(predict, noise, steps)).clamp(-1, 1)

    def _guided(self, net, x, times, labels):
        """The network's output with classifier-free guidance, like x [N, *shape]."""
        guidance = self.settings.get(GUIDANCE, self.guidance)
        if guidance == 1:
            return self._predict(net, x, times, labels)
        null = torch.full_like(labels, self.number_of_classes)
        both = torch.cat([labels, null])
        output = self._predict(net, torch.cat([x, x]), torch.cat([times, times]), both)
        given, free = output.chunk(2)
        guided = free + guidance * (given - free)
        if not self.rescale:
            return guided
        axes = list(range(1, x.ndim))
        spread = given.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
        return guided * (1 + self.rescale * (spread - 1))

    def _predict(self, net, x, times, labels):
        """The network's output, like x [N, *shape], at times [N].

        A learned variance is the second half of the channels; DDIM at eta = 0 has no use for it.
        """
        output = self.call(net, x, times, labels)
        return output[:, : self.shape[0]].to(x.dtype)

    def call(self, net, x, times, labels):
        return net(x, times, labels, return_dict=False)[0]

    def _decode(self, x):
        """Images [N, C, H, W] of latents [N, *shape], some at a time, also in a backward pass: a
        decoder's activations take gigabytes. Pixels are returned as they are."""
        if self.vae is None:
            return x

        def decoded(part):
            return self.vae.decode(part / self.scale + self.shift).sample

        kept = torch.is_grad_enabled() and x.requires_grad
        images = []
        with torch.autocast(x.device.type, enabled=False):  # decoders overflow in half precision
            for part in x.split(self._batch()):
                images.append(
                    checkpoint(decoded, part, use_reentrant=False) if kept else decoded(part)
                )
        return torch.cat(images)

    def _batch(self) -> int:
        """The number of images that the autoencoder sees at once."""
        _, height, width = self.image_size
        return max(1, PIXELS // (height * width))

    # ---------- training
    def encode(self, images):
        """uint8 [N, C, H, W] -> float32 [N, *shape] that loss() trains on, on the images' device.

        Pixels in [-1, 1], or latents: the mode of the autoencoder times its scaling factor, some
        images at a time. UserError: images of another shape.
        """
        if tuple(images.shape[1:]) != self.image_size:
            sizes = ["x".join(map(str, shape)) for shape in (images.shape[1:], self.image_size)]
            raise wrong(
                f"images are {sizes[0]}, those of {self.folder} {sizes[1]}: bring them to that size"
            )
        if self.vae is None:
            return images.float() / 127.5 - 1

        device = next(self.vae.parameters()).device
        latents = []
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for part in images.split(self._batch()):
                code = self.vae.encode(part.to(device).float() / 127.5 - 1)
                # A VQModel is trained on what comes before its quantisation.
                z = code.latents if "latents" in code else code.latent_dist.mode()
                latents.append(((z - self.shift) * self.scale).to(images.device))
        return torch.cat(latents)

    def loss(self, net, x, labels):
        """Training loss [N] of x [N, *shape] and labels int64 [N] or None.

        Uniform times, mean squared error of what the network predicts; randomness from the global
        generator of torch. In train mode some labels become the null class.
        """
        times, noise = self.process.draw(x)
        if self.has_null_class() and net.training:
            dropped = torch.rand(len(x), device=x.device) < LABEL_DROP
            labels = labels.masked_fill(dropped, self.number_of_classes)

        def predict(noisy, times):
            return self._predict(net, noisy, times, labels)

        return self.process.error(predict, x, times, noise).square().flatten(1).mean(1)

    def has_null_class(self) -> bool:
        return self.denoiser == "transformer"

    # ---------- partitions
    def block(self, name: str, net: nn.Module, partition: str) -> str:
        """U-Net: the way down, the middle with the embeddings, the way up. Transformer: thirds of
        its blocks."""
        if partition == "structural":
            raise self.no_blocks(partition)
        head, _, rest = name.partition(".")
        if head == "transformer_blocks":
            index = int(rest.split(".")[0])
            return ("enc", "mid", "dec")[3 * index // self.config["num_layers"]]
        if head in ("conv_in", "down_blocks", "pos_embed"):
            return "enc"
        if head == "mid_block" or "time" in head or "embed" in head:
            return "mid"
        if head == "up_blocks" or head.endswith("_out") or "_out_" in head:
            return "dec"
        raise wrong(f"{name} is no parameter of a {self.network_class.__name__}")

    def layer(self, name: str) -> str:
        """One layer for each block of the network: conv_in, down_blocks.0, mid_block, ..."""
        self.block(name, nn.Identity(), "paper")  # refuses names that are not the network's
        head, _, rest = name.partition(".")
        if head in ("down_blocks", "up_blocks", "transformer_blocks"):
            return f"{head}.{rest.split('.')[0]}"
        return head

    # ---------- export
    def export(self, net: nn.Module, path: Path, recipe: dict):
        """The whole pipeline again at path, with the weights of net and the recipe as JSON.
        `from_pretrained` reads it. path: a folder that is not there yet, or that this has made."""
        with new_folder(Path(path), self.folder) as new:
            self._copy_parts(new)
            write_network(copied(net).cpu(), home(new, self.denoiser))
            (new / RECIPE).write_text(json.dumps(recipe, indent=2, default=str) + "\n")

    def _copy_parts(self, new: Path) -> None:
        """All but the denoiser's weights. What is there in half precision alone loses that name:
        from_pretrained wants all parts in the same variant."""
        for name in (".", *self.parts):
            place = self.folder / name
            if not place.is_dir():
                continue
            variant = None
            if name not in (".", self.denoiser) and any(place.glob("*.safetensors")):
                variant = variant_of(place)
            (new / name).mkdir(exist_ok=True)
            for file in sorted(place.iterdir()):
                weights = file.name.endswith(WEIGHT_SUFFIXES) or ".index." in file.name
                if not file.is_file() or (weights and name in (".", self.denoiser)):
                    continue
                target = new / name / file.name.replace(f".{variant}", "")
                shutil.copyfile(file, target)
                if variant and ".index." in file.name:
                    target.write_text(file.read_text("utf-8").replace(f".{variant}", ""), "utf-8")


# --------------------- noise levels
class Ddim:
    """DDIM at eta = 0 with the noise levels, time steps and clipping of a folder's scheduler."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.place = folder, home(folder, "scheduler")
        if kind.removesuffix("Scheduler") not in SCHEDULERS:
            named = ", ".join(SCHEDULERS[:5])
            raise wrong(
                f"{folder}: scheduler {kind} is not supported (only relatives of DDIM: {named}, "
                "...): write a model file for it"
            )
        diffusers = import_diffusers()
        own_class = getattr(diffusers, kind)
        with refuse(f"{self.place}/scheduler_config.json"):
            # Through its own class first, whose defaults are not all DDIM's.
            given = own_class.load_config(self.place, local_files_only=True)
            own = own_class.from_config(given).config
        if own.get("use_flow_sigmas") or own.get("timestep_type", "discrete") != "discrete":
            raise wrong(f"{folder}: {kind} for flow matching or continuous time is not supported")
        if own.get("thresholding"):
            raise wrong(f"{folder}: thresholding is not supported")
        self.kind = own.get("prediction_type")
        if self.kind not in ("epsilon", "sample", "v_prediction"):
            raise wrong(f"{folder}: prediction_type {self.kind} is not supported")

        # DDIM's default is to clip, right for pixels alone: a scheduler that cannot clip must not
        # begin to.
        with refuse(f"{self.place}/scheduler_config.json, as DDIM"):
            settings = {"clip_sample": False, **public(own)}
            self.scheduler = diffusers.DDIMScheduler.from_config(settings)
            self.scheduler.set_timesteps(1)  # refuses an unknown spacing
        self.alphas = self.scheduler.alphas_cumprod  # [T] float32, on the CPU: taken one by one
        self.check_levels()

    def check_levels(self) -> None:
        alphas, count = self.alphas, self.scheduler.config.num_train_timesteps
        finite = bool(alphas.isfinite().all())
        falling = bool((alphas.diff() <= 0).all() and alphas[0] < 1 and alphas[-1] >= 0)
        if len(alphas) != count or not finite or not falling:
            raise wrong(
                f"{self.place}/scheduler_config.json: its betas do not make {count} rising noise "
                "levels"
            )

    def check_same(self, other: "Ddim", path: Path, base: Path) -> None:
        if other.kind != self.kind:
            raise wrong(f"{path}: its network predicts {other.kind}, that of {base} {self.kind}")
        if not torch.equal(other.alphas, self.alphas):
            raise wrong(f"{path}: its noise levels (betas) are not those of {base}")

    def times(self, steps: int) -> list[int]:
        """The scheduler's time steps, descending."""
        if not 1 <= steps <= len(self.alphas):
            raise wrong(f"{steps} sampling steps: {self.folder} allows 1 to {len(self.alphas)}")

        # On a copy, since set_timesteps writes and another thread may sample too.
        scheduler = copy.copy(self.scheduler)
        scheduler.set_timesteps(steps)

        # For some numbers of steps (61 or 201 of 1000), rounding makes "trailing" end with a time
        # of -1.
        times = [t for t in scheduler.timesteps.tolist() if t >= 0]
        if times[0] >= len(self.alphas):
            raise wrong(
                f"{steps} sampling steps: with steps_offset they begin after the last time, "
                f"{len(self.alphas) - 1}: take fewer"
            )
        if self.kind == "epsilon" and self.alphas[times[0]] == 0:
            raise wrong(
                f"{self.folder}: sampling begins at pure noise (rescale_betas_zero_snr), where a "
                "prediction of the noise (epsilon) says nothing about the image"
            )
        return times

    def walk(self, predict: Callable, x: torch.Tensor, steps: int) -> torch.Tensor:
        """From noise [N, *shape] to samples; predict(x, times int64 [N]): the network's output."""
        c = self.scheduler.config
        times = self.times(steps)
        for i, t in enumerate(times):
            # What the network says about x: its clean part and the noise in it.
            alpha = self.alphas[t]
            output = predict(x, torch.full((len(x),), t, device=x.device))
            clean, direction = parts_of(self.kind, output, x, alpha)
            if c.clip_sample:
                clean = clean.clamp(-c.clip_sample_range, c.clip_sample_range)

            # The same two at the noise level that is next in the list, however far it is.
            last = i + 1 == len(times)
            alpha = self.scheduler.final_alpha_cumprod if last else self.alphas[times[i + 1]]
            x = alpha.sqrt() * clean + (1 - alpha).sqrt() * direction
        return x

    def draw(self, x: torch.Tensor):
        """Times int64 [N] and noise like x [N, *shape], from torch's global generator."""
        times = torch.randint(len(self.alphas), (len(x),), device=x.device)
        return times, torch.randn_like(x)

    def error(self, predict: Callable, x, times, noise) -> torch.Tensor:
        """Of the network's output for x [N, *shape] with this noise at these times."""
        alpha = self.alphas.to(x.device)[times].view(-1, 1, 1, 1)
        output = predict(alpha.sqrt() * x + (1 - alpha).sqrt() * noise, times)
        if self.kind == "epsilon":
            return output - noise
        if self.kind == "v_prediction":
            return output - (alpha.sqrt() * noise - (1 - alpha).sqrt() * x)
        # The clean sample, weighed as the noise that it implies.
        return (alpha / (1 - alpha)).sqrt() * (output - x)


def parts_of(kind, output, x, alpha):
    """The clean sample and the noise that an output stands for at level alpha, both like x."""
    if kind == "epsilon":
        return (x - (1 - alpha).sqrt() * output) / alpha.sqrt(), output
    if kind == "sample":
        return output, (x - alpha.sqrt() * output) / (1 - alpha).sqrt()
    clean = alpha.sqrt() * x - (1 - alpha).sqrt() * output
    return clean, alpha.sqrt() * output + (1 - alpha).sqrt() * x
