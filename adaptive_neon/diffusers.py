"""A pipeline of Hugging Face diffusers as --base: a folder with `model_index.json`.

    DDPMPipeline, DDIMPipeline    UNet2DModel on pixels
    LDMPipeline                   UNet2DModel on the latents of a VQModel or AutoencoderKL
    DiTPipeline                   DiTTransformer2DModel on the latents of an AutoencoderKL

Only the denoiser moves. Images are sampled with DDIM at eta = 0 over the time steps of the folder's
scheduler. That is what the pipeline itself makes of the same noise, where its DDIMScheduler.step
goes from each time to the next: it supposes equal distances, which the spacing "linspace" has only
with all times, and "trailing" only where the number of steps divides the number of times.

Only the classes above are built: code that comes with a folder is never run, and pickles are read
as weights only. Whatever is wrong with a folder is one line.
"""

import contextlib
import copy
import inspect
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from .blocks import copied
from .files import UserError, printable
from .keys import pipeline_key, weights_hash
from .modelfile import UserModel

NETWORKS = (".pkl", ".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # files, not names on a hub

# Raised whenever the same folder would give other images or another loss: cached results are then
# made again.
VERSION = 1

# What a part of model_index.json may be, and the class that reads it (DiT's first folders name a
# former class).
DENOISERS = {
    "unet": {"UNet2DModel": "UNet2DModel"},
    "transformer": {
        "DiTTransformer2DModel": "DiTTransformer2DModel",
        "Transformer2DModel": "DiTTransformer2DModel",
    },
}
DECODERS = {
    "vae": {"AutoencoderKL": "AutoencoderKL", "VQModel": "VQModel"},
    "vqvae": {"AutoencoderKL": "AutoencoderKL", "VQModel": "VQModel"},
}

# Schedulers that share DDIM's noise levels (variance preserving, discrete time), so that DDIM can
# walk their steps.
SCHEDULERS = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
)

# The same in words, for the line that refuses another class.
SUPPORTED = {
    "unet": "only UNet2DModel",
    "transformer": "only DiTTransformer2DModel",
    "vae": "only AutoencoderKL and VQModel",
    "vqvae": "only AutoencoderKL and VQModel",
    "scheduler": "only relatives of DDIM: " + ", ".join(SCHEDULERS[:5]) + ", ...",
}

WEIGHTS = "diffusion_pytorch_model"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".h5")
RECIPE = "adaptive-neon.json"

# How the first folders name the parts of attention.
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# The autoencoder sees at most this many pixels at once: 256 images of 32x32, 4 of 256x256.
PIXELS = 2**18

# DiT's own training: this part of the labels is replaced by the null class that guidance needs.
LABEL_DROP = 0.1


class DiffusersModel(UserModel):
    """A pipeline folder behind the seam: everything but the denoiser's weights, which load() reads.
    Its methods may be called from several threads.

    guidance: of the classifier-free kind, 1 is none.
    """

    def __init__(self, c):
        self.path = self.folder = resolve(c.base)
        self.guidance = float(c.guidance)
        diffusers = import_diffusers()

        # The parts: one denoiser, one scheduler, and an autoencoder if it is a latent model.
        parts = read_index(self.folder)
        self.denoiser = next(name for name in DENOISERS if name in parts)
        self.network_class = getattr(diffusers, parts[self.denoiser])
        self.scheduler = read_scheduler(self.folder, parts["scheduler"])
        self.decoder = next((name for name in DECODERS if name in parts), None)
        self.vae: Any = None
        if self.decoder is not None:
            place = home(self.folder, self.decoder)
            self.vae = read_network(getattr(diffusers, parts[self.decoder]), place)
            self.vae.requires_grad_(False)
            self.scaling_factor = read_scaling_factor(self.vae, place)

        # The denoiser's configuration says what noise and labels it takes.
        place = home(self.folder, self.denoiser)
        find_weights(place)
        self.config = options(
            skeleton_of(self.network_class, read_config(self.network_class, place), place)
        )
        self.shape = input_shape(self.config, place)
        self.number_of_classes = label_count(self.config, self.denoiser, place)
        self.image_size = self._check_sizes()

        # Guidance compares with a null class, which is the last row of DiT's label tables and which
        # U-Nets lack.
        if not 1 <= self.guidance < float("inf"):
            raise wrong(f"guidance is {self.guidance:g}: 1 (none) or more is needed")
        if self.guidance > 1 and self.denoiser == "unet":
            raise wrong(
                f"guidance {self.guidance:g} needs a null class, which UNet2DModel has not: leave "
                "it at 1"
            )

        # Quantisation is constant between its jumps, and what autograd reports there (straight
        # through) is no slope.
        if type(self.vae).__name__ == "VQModel":
            self.why_not = "a VQModel quantises its latents, so that images have no gradient"
        self.encodes = self.vae is not None
        self.identity = self.training_identity = self._key()
        if self.vae is not None:
            self.vae.to(c.device)

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
            autoencoder = [kind, options(self.vae), weights, self.scaling_factor]
        return pipeline_key(
            version=VERSION,
            network=[self.network_class.__name__, self.config],
            scheduler=public(self.scheduler.config),
            guidance=self.guidance,
            autoencoder=autoencoder,
        )

    def image_shape(self, net: nn.Module) -> tuple[int, ...]:
        return self.image_size

    # ------------------------------------------------------------ the denoiser's weights

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
            net = build(self.network_class, self.config, read_tensors([path]), path)
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

    def _denoiser_home(self, path: Path) -> Path:
        """The folder with the denoiser's config.json, of a pipeline of the same kind as this."""
        if (path / "model_index.json").is_file():
            if self.denoiser not in read_index(path):
                raise wrong(f"{path}: has no {self.denoiser}, {self.folder} has")
            return home(path, self.denoiser)
        if (path / "config.json").is_file():
            return path
        raise wrong(
            f"{path}: no pipeline folder (model_index.json), no {self.denoiser} folder "
            "(config.json), no .safetensors"
        )

    def _check_same_surroundings(self, path):
        """Networks for other noise levels, another target or other latents cannot be merged."""
        parts = read_index(path)
        scheduler = read_scheduler(path, parts["scheduler"])
        theirs, ours = scheduler.config.prediction_type, self.scheduler.config.prediction_type
        if theirs != ours:
            raise wrong(f"{path}: its network predicts {theirs}, that of {self.folder} {ours}")
        if not torch.equal(scheduler.alphas_cumprod, self.scheduler.alphas_cumprod):
            raise wrong(f"{path}: its noise levels (betas) are not those of {self.folder}")

        decoder = next((name for name in DECODERS if name in parts), "autoencoder")
        if (decoder in parts) != (self.vae is not None):
            raise wrong(f"{path}: only one of it and {self.folder} has an autoencoder")
        if self.vae is not None and not self._same_autoencoder(home(path, decoder)):
            raise wrong(f"{path}: its {decoder} is not that of {self.folder}")

    def _same_autoencoder(self, place):
        """Whether the autoencoder in this folder is the pipeline's own."""
        theirs = read_network(type(self.vae), place)
        if options(theirs) != options(self.vae):
            return False
        if read_scaling_factor(theirs, place) != self.scaling_factor:
            return False

        # Up to the rounding of half precision, in which one of them may have been kept.
        tensors = theirs.state_dict()
        for name, tensor in self.vae.state_dict().items():
            if not torch.allclose(tensors[name], tensor.cpu(), rtol=2e-3, atol=1e-4):
                return False
        return True

    def _check_same_network(self, path, net):
        """Sizes are not enough: with other groups or embeddings, weights mean another function."""
        theirs = options(net)
        for key, value in self.config.items():
            if key != "dropout" and theirs.get(key) != value:
                raise wrong(
                    f"{path}: does not fit {self.folder}: {key} is {theirs.get(key)}, not {value}"
                )

    # ------------------------------------------------------------ sampling

    def sample(self, net, noise, labels, steps):
        """Images [N, C, H, W] float in [-1, 1] of noise [N, *shape] and labels int64 [N] or None.

        DDIM at eta = 0. Differentiable; a function of its arguments, sample by sample. UserError:
        steps that the scheduler cannot make.
        """
        c = self.scheduler.config
        alphas = self.scheduler.alphas_cumprod  # [T] float32, on the CPU: taken one by one
        times = self._times(steps)

        x = noise
        for i, t in enumerate(times):
            # What the network says about x: its clean part and the noise in it.
            alpha = alphas[t]
            output = self._guided(net, x, torch.full((len(x),), t, device=x.device), labels)
            clean, direction = split(c.prediction_type, output, x, alpha)
            if c.clip_sample:
                clean = clean.clamp(-c.clip_sample_range, c.clip_sample_range)

            # The same two at the noise level that is next in the list, however far it is.
            last = i + 1 == len(times)
            alpha = self.scheduler.final_alpha_cumprod if last else alphas[times[i + 1]]
            x = alpha.sqrt() * clean + (1 - alpha).sqrt() * direction

        return self._decode(x).clamp(-1, 1)

    def _times(self, steps):
        """The scheduler's time steps, descending."""
        alphas = self.scheduler.alphas_cumprod
        if not 1 <= steps <= len(alphas):
            raise wrong(f"{steps} sampling steps: {self.folder} allows 1 to {len(alphas)}")

        # On a copy, since set_timesteps writes and another thread may sample too.
        scheduler = copy.copy(self.scheduler)
        scheduler.set_timesteps(steps)

        # For some numbers of steps (61 or 201 of 1000), rounding makes "trailing" end with a time
        # of -1.
        times = [t for t in scheduler.timesteps.tolist() if t >= 0]
        if times[0] >= len(alphas):
            raise wrong(
                f"{steps} sampling steps: with steps_offset they begin after the last time, "
                f"{len(alphas) - 1}: take fewer"
            )
        if self.scheduler.config.prediction_type == "epsilon" and alphas[times[0]] == 0:
            raise wrong(
                f"{self.folder}: sampling begins at pure noise (rescale_betas_zero_snr), where a "
                "prediction of the noise (epsilon) says nothing about the image"
            )
        return times

    def _guided(self, net, x, times, labels):
        """The network's output with classifier-free guidance, like x [N, *shape]."""
        if self.guidance == 1:
            return self._predict(net, x, times, labels)
        null = torch.full_like(labels, self.number_of_classes)
        both = torch.cat([labels, null])
        output = self._predict(net, torch.cat([x, x]), torch.cat([times, times]), both)
        given, free = output.chunk(2)
        return free + self.guidance * (given - free)

    def _predict(self, net, x, times, labels):
        """The network's output, like x [N, *shape], at times int64 [N].

        A learned variance is the second half of the channels; DDIM at eta = 0 has no use for it.
        """
        output = net(x, times, labels, return_dict=False)[0]
        return output[:, : self.shape[0]].to(x.dtype)

    def _decode(self, x):
        """Images [N, C, H, W] of latents [N, *shape]; pixels are returned as they are."""
        if self.vae is None:
            return x
        parts = (x / self.scaling_factor).split(self._batch())
        with torch.autocast(x.device.type, enabled=False):  # decoders overflow in half precision
            return torch.cat([self.vae.decode(part).sample for part in parts])

    def _batch(self):
        """The number of images that the autoencoder sees at once."""
        _, height, width = self.image_size
        return max(1, PIXELS // (height * width))

    # ------------------------------------------------------------ training

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
        latents = torch.empty(len(images), *self.shape, device=images.device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            start = 0
            for part in images.split(self._batch()):
                code = self.vae.encode(part.to(device).float() / 127.5 - 1)
                # A VQModel is trained on what comes before its quantisation.
                z = code.latents if "latents" in code else code.latent_dist.mode()
                latents[start : start + len(part)] = z * self.scaling_factor
                start += len(part)
        return latents

    def loss(self, net, x, labels):
        """Training loss [N] of x [N, *shape] and labels int64 [N] or None.

        Uniform times, mean squared error of what the network predicts; randomness from the global
        generator of torch. In train mode a DiT loses some of its labels.
        """
        kind = self.scheduler.config.prediction_type
        alphas = self.scheduler.alphas_cumprod.to(x.device)
        times = torch.randint(len(alphas), (len(x),), device=x.device)
        noise = torch.randn_like(x)
        if self.denoiser == "transformer" and net.training:
            dropped = torch.rand(len(x), device=x.device) < LABEL_DROP
            labels = labels.masked_fill(dropped, self.number_of_classes)

        alpha = alphas[times].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        output = self._predict(net, noisy, times, labels)

        if kind == "epsilon":
            error = output - noise
        elif kind == "v_prediction":
            error = output - (alpha.sqrt() * noise - (1 - alpha).sqrt() * x)
        else:  # the clean sample, weighed as the noise that it implies
            error = (alpha / (1 - alpha)).sqrt() * (output - x)
        return error.square().flatten(1).mean(1)

    # ------------------------------------------------------------ partitions

    def block(self, name: str, net: nn.Module, partition: str) -> str:
        """U-Net: the way down, the middle with the embeddings, the way up. DiT: thirds of its
        transformer blocks."""
        if partition == "structural":
            raise self.no_blocks(partition)
        head, _, rest = name.partition(".")
        if head == "transformer_blocks":
            index = int(rest.split(".")[0])
            return ("enc", "mid", "dec")[3 * index // self.config["num_layers"]]
        if head in ("conv_in", "down_blocks", "pos_embed"):
            return "enc"
        if head in ("mid_block", "time_proj", "time_embedding", "class_embedding"):
            return "mid"
        if head in ("up_blocks", "conv_norm_out", "conv_out", "proj_out_1", "proj_out_2"):
            return "dec"
        raise wrong(f"{name} is no parameter of a {self.network_class.__name__}")

    def layer(self, name: str) -> str:
        """One layer for each block of the network: conv_in, down_blocks.0, mid_block, ..."""
        self.block(name, nn.Identity(), "paper")  # refuses names that are not the network's
        head, _, rest = name.partition(".")
        if head in ("down_blocks", "up_blocks", "transformer_blocks"):
            return f"{head}.{rest.split('.')[0]}"
        return head

    # ------------------------------------------------------------ export

    def export(self, net: nn.Module, path: Path, recipe: dict):
        """The whole pipeline again at path, with the weights of net and the recipe as JSON.
        `from_pretrained` reads it. path: a folder that is not there yet, or that this has made."""
        path = Path(path)
        base, target = self.folder.resolve(), path.resolve()
        if base == target or target in base.parents:
            raise wrong(f"{path}: would replace the base {self.folder}: choose another folder")
        if path.exists() and not (path / RECIPE).is_file():
            raise wrong(f"{path}: exists and is not this program's work: choose another folder")

        # Beside the target first, so that a stop in the middle leaves no half of a pipeline under
        # its name.
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as part:
                new = Path(part) / "new"
                self._write_pipeline(copied(net).cpu(), new)
                (new / RECIPE).write_text(json.dumps(recipe, indent=2, default=str) + "\n")
                if path.exists():
                    os.rename(path, Path(part) / "old")
                os.rename(new, path)
        except (OSError, safetensors.SafetensorError) as error:
            raise wrong(f"{path} cannot be written, is the disk full? ({error})") from error

    def _write_pipeline(self, net: nn.Module, new: Path):
        """Copies the parts and the notes beside them, with the weights of `net`."""
        written = {self.denoiser: net}
        if self.decoder is not None:
            # from_pretrained wants all parts with the same suffix, and whole where they are .bin.
            variant, files = find_weights(home(self.folder, self.decoder))
            if variant or files[-1].suffix == ".bin":
                written[self.decoder] = self.vae

        new.mkdir()
        for name in (".", self.denoiser, "scheduler", self.decoder):
            if name is None or not (self.folder / name).is_dir():
                continue
            (new / name).mkdir(exist_ok=True)
            for file in sorted((self.folder / name).iterdir()):
                weights = file.name.endswith(WEIGHT_SUFFIXES) or ".index." in file.name
                replaced = weights and (name == "." or name in written)
                if file.is_file() and not replaced:
                    shutil.copyfile(file, new / name / file.name)

        for name, each in written.items():
            tensors = {}
            for key, tensor in each.state_dict().items():
                # With storage of its own, as safetensors wants it.
                empty = torch.empty(tensor.shape, dtype=torch.float32)
                tensors[key] = empty.copy_(tensor.detach())
            # As bytes: safetensors would make a file that only its owner can read.
            content = safetensors.torch.save(tensors, metadata={"format": "pt"})
            (home(new, name) / f"{WEIGHTS}.safetensors").write_bytes(content)


def split(kind, output, x, alpha):
    """The clean sample and the noise that an output stands for at level alpha, both like x."""
    if kind == "epsilon":
        return (x - (1 - alpha).sqrt() * output) / alpha.sqrt(), output
    if kind == "sample":
        return output, (x - alpha.sqrt() * output) / (1 - alpha).sqrt()
    clean = alpha.sqrt() * x - (1 - alpha).sqrt() * output
    return clean, alpha.sqrt() * output + (1 - alpha).sqrt() * x


# ---------------------------------------------------------------- reading a folder


def wrong(text: object) -> UserError:
    """What is wrong with a folder, on one line."""
    return UserError(printable(text, 500))


def resolve(source):
    """The local folder of a pipeline: a path as it is, or a hub id (google/ddpm-cifar10-32).

    UserError: neither, or the hub cannot be reached and has not been before.
    """
    path = Path(source)
    if path.exists():
        return path

    # owner/name is also how a folder is written: where the owner is a folder here, the name was
    # mistyped.
    hub_id = str(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id) or path.parent.exists():
        raise wrong(f"{source}: no such file or folder")
    import_diffusers()
    import huggingface_hub

    advice = (
        f"{hub_id}: no such folder, and not to be had from the Hugging Face hub; where a "
        f"connection is, run `hf download {hub_id} --local-dir FOLDER`, and give that FOLDER"
    )
    with refuse(advice):
        patterns = ["*.json", "*.safetensors", "*.bin"]
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))


def import_diffusers():
    """The package, silent about what is reported here in other words."""
    try:
        import diffusers
    except ImportError:
        raise wrong(
            "a diffusers pipeline needs the package diffusers: pip install diffusers"
        ) from None
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


@contextlib.contextmanager
def refuse(what: object):
    """Makes one line, about `what`, of anything that a library raises about a user's file.

    Only calls into libraries stand inside, so that our own faults are not taken for the user's.
    """
    try:
        yield
    except Exception as error:
        # torch names the tensors in the lines below its first; some errors have no text at all.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise wrong(f"{what}: {reason}") from error


def read_index(folder):
    """model_index.json as {part: class of diffusers that reads it}; all of it is supported."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise wrong(f"{folder}: no model_index.json, so no pipeline of diffusers")
    with refuse(file):
        index = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(index, dict):
        raise wrong(f"{file}: not a JSON object")
    if not isinstance(index.get("_class_name"), str):
        raise wrong(
            f"{folder}: a pipeline with code of its own, which is not run: write a model file"
        )

    known = {**DENOISERS, **DECODERS, "scheduler": {name: name for name in SCHEDULERS}}
    parts = {}
    for name, value in index.items():
        # Only parts are [library, class]; an absent part is [null, null].
        pair = isinstance(value, list) and len(value) == 2 and value[0] is not None
        if name.startswith("_") or not pair:
            continue
        library, kind = str(value[0]), str(value[1])
        if library != "diffusers" or kind not in known.get(name, {}):
            limit = SUPPORTED.get(name, "no such part")
            raise wrong(
                f"{folder}: {name} of class {library}.{kind} is not supported ({limit}): "
                "write a model file for it"
            )
        parts[name] = known[name][kind]

    if not parts.keys() & DENOISERS.keys():
        raise wrong(f"{file}: names no {' or '.join(DENOISERS)}")
    if "scheduler" not in parts:
        raise wrong(f"{file}: names no scheduler")
    if len(parts.keys() & DENOISERS.keys()) > 1 or len(parts.keys() & DECODERS.keys()) > 1:
        raise wrong(
            f"{folder}: more than one denoiser or autoencoder ({', '.join(parts)}) is not supported"
        )
    return parts


def home(folder, part):
    """The part's folder; the first pipelines (google/ddpm-*) keep everything in one."""
    return folder / part if (folder / part).is_dir() else folder


def read_scheduler(folder, kind):
    """A DDIMScheduler with the noise levels, time steps and clipping of the folder's scheduler."""
    diffusers = import_diffusers()
    place = home(folder, "scheduler")
    own_class = getattr(diffusers, kind)
    with refuse(f"{place}/scheduler_config.json"):
        # Through its own class first, whose defaults are not all DDIM's.
        given = own_class.load_config(place, local_files_only=True)
        own = own_class.from_config(given).config
    if own.get("use_flow_sigmas") or own.get("timestep_type", "discrete") != "discrete":
        raise wrong(f"{folder}: {kind} for flow matching or continuous time is not supported")
    if own.get("thresholding"):
        raise wrong(f"{folder}: thresholding is not supported")
    if own.get("prediction_type") not in ("epsilon", "sample", "v_prediction"):
        raise wrong(f"{folder}: prediction_type {own.get('prediction_type')} is not supported")

    # DDIM's default is to clip, right for pixels alone: a scheduler that cannot clip must not begin
    # to.
    with refuse(f"{place}/scheduler_config.json, as DDIM"):
        settings = {"clip_sample": False, **public(own)}
        scheduler = diffusers.DDIMScheduler.from_config(settings)
        scheduler.set_timesteps(1)  # refuses an unknown spacing
    alphas = scheduler.alphas_cumprod
    finite = bool(alphas.isfinite().all())
    falling = bool((alphas.diff() <= 0).all() and alphas[0] < 1 and alphas[-1] >= 0)
    if len(alphas) != scheduler.config.num_train_timesteps or not finite or not falling:
        raise wrong(
            f"{place}/scheduler_config.json: its betas do not make "
            f"{scheduler.config.num_train_timesteps} rising noise levels"
        )
    return scheduler


def find_weights(place: Path) -> tuple[str, list[Path]]:
    """(variant or "", files): the weight files that are read from a network's folder, the index of
    shards first. Those that diffusers prefers: without a variant before half precision, safetensors
    before pickles, shards before one file. Shards of a variant have had two names."""
    file_name = re.compile(rf"{WEIGHTS}(?:\.(\w+))?\.(safetensors|bin)")
    index_name = re.compile(rf"{WEIGHTS}\.(safetensors|bin)(?:\.(\w+))?\.index(?:\.(\w+))?\.json")
    found: dict[str, list] = {}
    for path in sorted(place.iterdir()) if place.is_dir() else []:
        if match := file_name.fullmatch(path.name):
            variant, suffix = match.groups()
            found.setdefault(variant or "", []).append((suffix == "bin", True, path))
        elif match := index_name.fullmatch(path.name):
            suffix, former, variant = match.groups()
            found.setdefault(former or variant or "", []).append((suffix == "bin", False, path))

    if not found:
        raise wrong(f"{place}: no weights ({WEIGHTS}.safetensors or .bin)")
    halves = [variant for variant in ("", "fp16", "bf16") if variant in found]
    if not halves and len(found) > 1 or halves and halves[0] and found.keys() - set(halves):
        raise wrong(
            f"{place}: several variants of the weights ({', '.join(found)}), and none without a "
            "variant's name: leave the one that is meant"
        )
    variant = halves[0] if halves else next(iter(found))
    _, whole, path = min(found[variant])
    if whole:
        return variant, [path]

    with refuse(path):
        names = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
        shards = [place / Path(name).name for name in names]
    return variant, [path, *shards]


def read_tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    """{name: tensor} of weight files; pickles are read as weights only."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".json":
            continue
        if not file.is_file():
            raise wrong(f"{file}: missing, but listed in {files[0].name}")
        if file.suffix == ".bin":
            with refuse(f"{file}: damaged, or a pickle of more than tensors"):
                part = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(part, dict):
                raise wrong(f"{file}: holds no tensors by their names, but {type(part).__name__}")
        else:
            with refuse(file):
                part = safetensors.torch.load_file(file)
        tensors |= part
    return tensors


def read_config(network_class, place: Path) -> dict:
    """config.json of a network's folder."""
    with refuse(f"{place}/config.json"):
        config = network_class.load_config(place, local_files_only=True)
        quantised = config.get("quantization_config")
    if quantised:
        raise wrong(f"{place}: quantised weights (quantization_config) are not supported")
    return config


def skeleton_of(network_class, config: dict, place: Path) -> nn.Module:
    """The network without weights."""
    with refuse(f"{place}/config.json"), torch.device("meta"):
        return network_class.from_config(config)


def read_network(network_class, place: Path) -> nn.Module:
    """A network of a folder, complete and finite, in eval mode, float32, on the CPU."""
    _, files = find_weights(place)
    config = read_config(network_class, place)
    return build(network_class, config, read_tensors(files), place)


def build(network_class, config: dict, tensors: dict, place: Path) -> nn.Module:
    """The network with exactly these tensors."""
    # Building it draws first weights, which must not shift the random numbers of the run.
    with torch.random.fork_rng(devices=[]), refuse(f"{place}: config.json"):
        net = network_class.from_config(config)
    state = net.state_dict()
    given = {}
    for name, tensor in tensors.items():
        parts = str(name).split(".")
        if name not in state and len(parts) > 1:
            parts[-2] = FORMER_NAMES.get(parts[-2], parts[-2])
        given[".".join(parts)] = tensor

    missing = sorted(state.keys() - given.keys())
    unexpected = sorted(given.keys() - state.keys())
    for fault, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise wrong(f"{place}: {some(names)} {fault} in the weights")
    for name, tensor in state.items():
        shape = list(getattr(given[name], "shape", ()))
        if shape != list(tensor.shape):
            raise wrong(f"{place}: {name} is {shape}, not {list(tensor.shape)}")
    with refuse(place):
        net.load_state_dict(given)
    for name, tensor in net.state_dict().items():
        if not tensor.isfinite().all():
            raise wrong(f"{place}: {name} has values that are not finite")
    return net.eval()


def some(names):
    """The first of some names, and how many there are."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def read_scaling_factor(vae, place):
    """What latents are multiplied by; a VQModel that names no factor means 1, not the default."""
    with refuse(f"{place}/config.json"):
        given = type(vae).load_config(place, local_files_only=True)
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if vae.config.get(key) is not None:
            raise wrong(f"{place}: {key} is not supported, as its pipeline would not apply it")
    if type(vae).__name__ == "VQModel" and "scaling_factor" not in given:
        return 1.0
    factor = vae.config.scaling_factor
    if not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
        raise wrong(f"{place}: scaling_factor is {factor}, not a positive number")
    return float(factor)


def public(config):
    """A configuration as a dict of JSON values, without the notes that diffusers keeps in it."""
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    return json.loads(json.dumps(kept, default=str))


def options(net):
    """What a network was built with; other things in its configuration (an EMA's) are left out."""
    known = inspect.signature(type(net).__init__).parameters
    return {key: value for key, value in public(net.config).items() if key in known}


def input_shape(config, place):
    """(channels, height, width) of the noise."""
    size = config["sample_size"]
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise wrong(
            f"{place}/config.json: sample_size is {size}, not the height and width of the noise"
        )
    return (config["in_channels"], *sides)


def label_count(config, denoiser, place):
    """The number of classes, 0 for an unconditional network."""
    if denoiser == "transformer":
        return config["num_embeds_ada_norm"]
    if config["class_embed_type"] is not None:
        raise wrong(
            f"{place}: class_embed_type {config['class_embed_type']} is not supported, "
            "only a table of labels"
        )
    return config["num_class_embeds"] or 0


def is_pipeline(source):
    """A folder of diffusers, or a name on its hub."""
    if Path(source).exists():
        return (Path(source) / "model_index.json").is_file()
    return re.fullmatch(r"[\w-]+/[\w.-]+", source) is not None and not source.endswith(NETWORKS)
