"""A pipeline of Hugging Face diffusers, behind the names that a model file has.

`DiffusersPipeline(folder)` reads a pipeline folder (one with `model_index.json`) and offers SHAPE,
CLASSES, load, sample, loss, encode, block, layer and save, so that a study treats it like any other
model:

    DDPMPipeline, DDIMPipeline    UNet2DModel on pixels
    LDMPipeline                   UNet2DModel on the latents of a VQModel or AutoencoderKL
    DiTPipeline                   DiTTransformer2DModel on the latents of an AutoencoderKL

Only the denoiser moves. Images are sampled with DDIM at eta = 0 over the time steps of the folder's
scheduler. That is what the pipeline itself makes of the same noise, where its DDIMScheduler.step
goes from each time to the next: it supposes equal distances, which the spacing "linspace" has only
with all times, and "trailing" only where the number of steps divides the number of times.

Only the classes above are built: code that comes with a folder is never run, and pickles are read
as weights only. Whatever is wrong with a folder is one ValueError of one line.
"""

import contextlib
import copy
import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from .files import UserError, printable
from .keys import key_of
from .modelfile import FileModel

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

# The autoencoder sees at most this many pixels at once: 256 images of 32x32, 4 of 256x256.
PIXELS = 2**18

# DiT's own training: this part of the labels is replaced by the null class that guidance needs.
LABEL_DROP = 0.1


class DiffusersPipeline:
    """A pipeline folder of Hugging Face diffusers behind the names of a model file.

    SHAPE is (channels, height, width) of the denoiser's input, CLASSES its number of labels (0:
    none). `differentiable` is False where no gradient can pass from images to noise; `why_not` then
    says so in one line. Every method may be called from several threads; none but `to` changes the
    object.
    """

    def __init__(self, folder, guidance=1.0):
        """Reads everything but the denoiser's weights. guidance: classifier-free, 1 is none.

        ValueError: diffusers is missing, or the folder or the guidance cannot be used.
        """
        self.folder = Path(folder)
        self.guidance = float(guidance)
        diffusers = import_diffusers()

        # The parts: one denoiser, one scheduler, and an autoencoder if it is a latent model.
        parts = read_index(self.folder)
        self.denoiser = next(name for name in DENOISERS if name in parts)
        self.network_class = getattr(diffusers, parts[self.denoiser])
        self.scheduler = read_scheduler(self.folder, parts["scheduler"])
        self.decoder = next((name for name in DECODERS if name in parts), None)
        self.vae = None
        if self.decoder is not None:
            vae_home = home(self.folder, self.decoder)
            self.vae = read_network(getattr(diffusers, parts[self.decoder]), vae_home)
            self.vae.requires_grad_(False)
            self.scaling_factor = read_scaling_factor(self.vae, vae_home)

        # The denoiser's configuration says what noise and labels it takes; its weights are
        # load()'s.
        denoiser_home = home(self.folder, self.denoiser)
        find_weights(denoiser_home)
        with refuse(f"{denoiser_home}/config.json"):
            config = self.network_class.load_config(denoiser_home, local_files_only=True)
            with torch.device("meta"):
                skeleton = self.network_class.from_config(config)
        self.config = options(skeleton)
        self.skeleton = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
        self.SHAPE = input_shape(self.config, denoiser_home)
        self.CLASSES = label_count(self.config, self.denoiser, denoiser_home)
        self._check_sizes()

        # Guidance compares with a null class, which is the last row of DiT's label tables and which
        # U-Nets lack.
        if not 1 <= self.guidance < float("inf"):
            raise ValueError(f"guidance is {guidance}: 1 (none) or more is needed")
        if self.guidance > 1 and self.denoiser == "unet":
            raise ValueError(
                f"guidance {guidance} needs a null class, which UNet2DModel has not: leave it at 1"
            )

        # Quantisation is constant between its jumps, and what autograd reports there (straight
        # through) is no slope.
        self.differentiable = self.vae is None or parts[self.decoder] != "VQModel"
        self.why_not = ""
        if not self.differentiable:
            self.why_not = "a VQModel quantises its latents, so that images have no gradient"
        self._identity = self._hash_surroundings()

    def _check_sizes(self):
        """What the parts expect of each other, and the shape of an image, [C, H, W]."""
        channels = self.SHAPE[0]
        if self.config["out_channels"] not in (None, channels, 2 * channels):
            raise ValueError(
                f"{self.folder}: {self.denoiser} turns {channels} channels into "
                f"{self.config['out_channels']}: conditional on images, not supported"
            )
        if self.config.get("time_embedding_type") == "fourier":
            raise ValueError(
                f"{self.folder}: time_embedding_type fourier (continuous noise) is not supported"
            )
        self.image_shape = self.SHAPE
        if self.vae is None:
            return

        c = self.vae.config
        latent = c.get("vq_embed_dim") or c.latent_channels
        if latent != channels:
            raise ValueError(
                f"{self.folder}: {self.denoiser} takes {channels} channels, "
                f"{self.decoder} makes latents of {latent}"
            )
        factor = 2 ** (len(c.block_out_channels) - 1)
        self.image_shape = (c.in_channels, self.SHAPE[1] * factor, self.SHAPE[2] * factor)

    # ------------------------------------------------------------ the denoiser's weights

    def load(self, path):
        """The denoiser of a pipeline folder, of a folder such as unet_ema, or of a .safetensors.

        Returns it in eval mode, float32, on the CPU; parameters that its class freezes stay frozen.
        ValueError: unreadable, incomplete, not finite, or not of this pipeline's architecture.
        """
        path = Path(path)
        if path.suffix == ".safetensors" and path.is_file():
            net = self._load_tensors(path)
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
                module.dropout_prob = 0.0
        return net

    def _denoiser_home(self, path):
        """The folder with the denoiser's config.json, of a pipeline of the same kind as this."""
        if (path / "model_index.json").is_file():
            if self.denoiser not in read_index(path):
                raise ValueError(f"{path}: has no {self.denoiser}, {self.folder} has")
            return home(path, self.denoiser)
        if (path / "config.json").is_file():
            return path
        raise ValueError(
            f"{path}: no pipeline folder (model_index.json), no {self.denoiser} folder "
            "(config.json), no .safetensors"
        )

    def _check_same_surroundings(self, path):
        """Networks for other noise levels, another target or other latents cannot be merged."""
        parts = read_index(path)
        scheduler = read_scheduler(path, parts["scheduler"])
        theirs, ours = scheduler.config.prediction_type, self.scheduler.config.prediction_type
        if theirs != ours:
            raise ValueError(f"{path}: its network predicts {theirs}, that of {self.folder} {ours}")
        if not torch.equal(scheduler.alphas_cumprod, self.scheduler.alphas_cumprod):
            raise ValueError(f"{path}: its noise levels (betas) are not those of {self.folder}")

        decoder = next((name for name in DECODERS if name in parts), "autoencoder")
        if (decoder in parts) != (self.vae is not None):
            raise ValueError(f"{path}: only one of it and {self.folder} has an autoencoder")
        if self.vae is not None and not self._same_autoencoder(home(path, decoder)):
            raise ValueError(f"{path}: its {decoder} is not that of {self.folder}")

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
                raise ValueError(
                    f"{path}: does not fit {self.folder}: {key} is {theirs.get(key)}, not {value}"
                )

    def _load_tensors(self, path):
        """The denoiser from one file with exactly its tensors."""
        with refuse(path):
            tensors = safetensors.torch.load_file(path)
        missing = sorted(self.skeleton.keys() - tensors.keys())
        unknown = sorted(tensors.keys() - self.skeleton.keys())
        if missing:
            raise ValueError(f"{path}: does not fit {self.folder}: {some(missing)} missing")
        if unknown:
            raise ValueError(f"{path}: does not fit {self.folder}: {some(unknown)} unknown")
        for name, shape in self.skeleton.items():
            if tuple(tensors[name].shape) != shape:
                sizes = f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
                raise ValueError(f"{path}: does not fit {self.folder}: {sizes}")
        check_finite(tensors, path)

        # Building it draws first weights, which must not shift the random numbers of the run.
        with torch.random.fork_rng(devices=[]):
            net = self.network_class.from_config(self.config)
        net.load_state_dict(tensors)
        return net.float().eval()

    # ------------------------------------------------------------ sampling

    def sample(self, net, noise, labels, steps):
        """Images [N, C, H, W] float in [-1, 1] of noise [N, *SHAPE] and labels int64 [N] or None.

        DDIM at eta = 0. Differentiable; a function of its arguments, sample by sample. ValueError:
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
            raise ValueError(f"{steps} sampling steps: {self.folder} allows 1 to {len(alphas)}")

        # On a copy, since set_timesteps writes and another thread may sample too.
        scheduler = copy.copy(self.scheduler)
        scheduler.set_timesteps(steps)

        # For some numbers of steps (61 or 201 of 1000), rounding makes "trailing" end with a time
        # of -1.
        times = [t for t in scheduler.timesteps.tolist() if t >= 0]
        if times[0] >= len(alphas):
            raise ValueError(
                f"{steps} sampling steps: with steps_offset they begin after the last time, "
                f"{len(alphas) - 1}: take fewer"
            )
        if self.scheduler.config.prediction_type == "epsilon" and alphas[times[0]] == 0:
            raise ValueError(
                f"{self.folder}: sampling begins at pure noise (rescale_betas_zero_snr), where a "
                "prediction of the noise (epsilon) says nothing about the image"
            )
        return times

    def _guided(self, net, x, times, labels):
        """The network's output with classifier-free guidance, like x [N, *SHAPE]."""
        if self.guidance == 1:
            return self._predict(net, x, times, labels)
        null = torch.full_like(labels, self.CLASSES)
        both = torch.cat([labels, null])
        output = self._predict(net, torch.cat([x, x]), torch.cat([times, times]), both)
        given, free = output.chunk(2)
        return free + self.guidance * (given - free)

    def _predict(self, net, x, times, labels):
        """The network's output, like x [N, *SHAPE], at times int64 [N].

        A learned variance is the second half of the channels; DDIM at eta = 0 has no use for it.
        """
        output = net(x, times, labels, return_dict=False)[0]
        return output[:, : self.SHAPE[0]].to(x.dtype)

    def _decode(self, x):
        """Images [N, C, H, W] of latents [N, *SHAPE]; pixels are returned as they are."""
        if self.vae is None:
            return x
        parts = (x / self.scaling_factor).split(self._batch())
        with torch.autocast(x.device.type, enabled=False):  # decoders overflow in half precision
            return torch.cat([self.vae.decode(part).sample for part in parts])

    def _batch(self):
        """The number of images that the autoencoder sees at once."""
        _, height, width = self.image_shape
        return max(1, PIXELS // (height * width))

    # ------------------------------------------------------------ training

    def encode(self, images):
        """uint8 [N, C, H, W] -> float32 [N, *SHAPE] that loss() trains on, on the images' device.

        Pixels in [-1, 1], or latents: the mode of the autoencoder times its scaling factor, some
        images at a time. ValueError: images of another shape.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            sizes = ["x".join(map(str, shape)) for shape in (images.shape[1:], self.image_shape)]
            raise ValueError(
                f"images are {sizes[0]}, those of {self.folder} {sizes[1]}: bring them to that size"
            )
        if self.vae is None:
            return images.float() / 127.5 - 1

        device = next(self.vae.parameters()).device
        latents = torch.empty(len(images), *self.SHAPE, device=images.device)
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
        """Training loss [N] of x [N, *SHAPE] and labels int64 [N] or None.

        Uniform times, mean squared error of what the network predicts; randomness from the global
        generator of torch. In train mode a DiT loses some of its labels.
        """
        kind = self.scheduler.config.prediction_type
        alphas = self.scheduler.alphas_cumprod.to(x.device)
        times = torch.randint(len(alphas), (len(x),), device=x.device)
        noise = torch.randn_like(x)
        if self.denoiser == "transformer" and net.training:
            dropped = torch.rand(len(x), device=x.device) < LABEL_DROP
            labels = labels.masked_fill(dropped, self.CLASSES)

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

    def block(self, name):
        """enc, mid or dec for the name of a parameter.

        U-Net: the way down, the middle with the embeddings, the way up. DiT: thirds of its
        transformer blocks.
        """
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
        raise ValueError(f"{name} is no parameter of a {self.network_class.__name__}")

    def layer(self, name):
        """One layer for each block of the network: conv_in, down_blocks.0, mid_block, ..."""
        self.block(name)  # refuses names that are not the network's
        head, _, rest = name.partition(".")
        if head in ("down_blocks", "up_blocks", "transformer_blocks"):
            return f"{head}.{rest.split('.')[0]}"
        return head

    # ------------------------------------------------------------ files

    def save(self, net, path, recipe):
        """The whole pipeline again at path, with the weights of net and the recipe as JSON.

        path: a folder that does not exist yet, or one that save made. `from_pretrained` reads the
        result. ValueError: path is the base, holds it, or is something else that save did not make.
        """
        path = Path(path)
        base, target = self.folder.resolve(), path.resolve()
        if base == target or target in base.parents:
            raise ValueError(f"{path}: would replace the base {self.folder}: choose another folder")
        if path.exists() and not (path / RECIPE).is_file():
            raise ValueError(
                f"{path}: exists and was not written by this program: choose another folder"
            )

        # Beside the target first, so that a stop in the middle leaves no half of a pipeline under
        # its name.
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as part:
            new = Path(part) / "new"
            self._copy_surroundings(new)
            self._write(net, new, self.denoiser)
            (new / RECIPE).write_text(json.dumps(recipe, indent=2, default=str) + "\n")
            if path.exists():
                os.rename(path, Path(part) / "old")
            os.rename(new, path)

    def _copy_surroundings(self, new):
        """Copies the parts and the notes beside them, without the denoiser's weights."""
        new.mkdir()
        names = [".", self.denoiser, "scheduler", self.decoder]
        for name in names:
            if name is None or not (self.folder / name).is_dir():
                continue
            (new / name).mkdir(exist_ok=True)
            for file in sorted((self.folder / name).iterdir()):
                weights = file.name.endswith(WEIGHT_SUFFIXES) or ".index." in file.name
                old = weights and name != self.decoder
                if file.is_file() and not old:
                    shutil.copyfile(file, new / name / file.name)

        # from_pretrained wants all parts with the same suffix: where the autoencoder has only
        # .fp16 files, it gets a plain one beside them.
        if self.vae is not None:
            variant, _ = find_weights(home(self.folder, self.decoder))
            if variant is not None:
                self._write(self.vae, new, self.decoder)

    def _write(self, net, new, name):
        """Writes a network's tensors, each with storage of its own, into its part of new."""
        tensors = {}
        for key, tensor in net.state_dict().items():
            copied = torch.empty(tensor.shape, dtype=torch.float32)
            tensors[key] = copied.copy_(tensor.detach())
        file = home(new, name) / f"{WEIGHTS}.safetensors"
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})

    def to(self, device):
        """Moves the autoencoder, the only network that is kept here."""
        if self.vae is not None:
            self.vae.to(device)

    # ------------------------------------------------------------ keys of cached results

    def identity(self):
        """Hash of all that decides the images and the loss, except the denoiser's weights."""
        return self._identity

    def _hash_surroundings(self):
        content = {
            "version": VERSION,
            "network": self.network_class.__name__,
            "config": self.config,
            "scheduler": public(self.scheduler.config),
            "guidance": self.guidance,
        }
        if self.vae is not None:
            _, files = find_weights(home(self.folder, self.decoder))
            content["autoencoder"] = type(self.vae).__name__
            content["autoencoder_config"] = options(self.vae)
            content["autoencoder_weights"] = hash_files(files)
            content["scaling_factor"] = self.scaling_factor
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def network_hash(self, path):
        """Hash of the weight files that load(path) reads."""
        path = Path(path)
        if path.suffix == ".safetensors" and path.is_file():
            return hash_files([path])
        _, files = find_weights(self._denoiser_home(path))
        return hash_files(files)


def split(kind, output, x, alpha):
    """The clean sample and the noise that an output stands for at level alpha, both like x."""
    if kind == "epsilon":
        return (x - (1 - alpha).sqrt() * output) / alpha.sqrt(), output
    if kind == "sample":
        return output, (x - alpha.sqrt() * output) / (1 - alpha).sqrt()
    clean = alpha.sqrt() * x - (1 - alpha).sqrt() * output
    return clean, alpha.sqrt() * output + (1 - alpha).sqrt() * x


# ---------------------------------------------------------------- reading a folder


def resolve(source):
    """The local folder of a pipeline: a path as it is, or a hub id (google/ddpm-cifar10-32).

    ValueError: neither, or the hub cannot be reached and has not been before.
    """
    path = Path(source)
    if path.exists():
        return path

    # owner/name is also how a folder is written: where the owner is a folder here, the name was
    # mistyped.
    hub_id = str(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id) or path.parent.exists():
        raise ValueError(f"{source}: no such file or folder")
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
        raise ValueError(
            "a diffusers pipeline needs the package diffusers: pip install diffusers"
        ) from None
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


@contextlib.contextmanager
def refuse(what):
    """Makes one line, about `what`, of anything that a library raises about a user's file.

    Only calls into libraries stand inside, so that our own faults are not taken for the user's.
    """
    try:
        yield
    except Exception as error:
        # torch names the tensors in the lines below its first; some errors have no text at all.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{what}: {reason}") from error


def read_index(folder):
    """model_index.json as {part: class of diffusers that reads it}; all of it is supported."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no model_index.json, so no pipeline of diffusers")
    with refuse(file):
        index = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(index, dict):
        raise ValueError(f"{file}: not a JSON object")
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(
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
            raise ValueError(
                f"{folder}: {name} of class {library}.{kind} is not supported ({limit}): "
                "write a model file for it"
            )
        parts[name] = known[name][kind]

    if not parts.keys() & DENOISERS.keys():
        raise ValueError(f"{file}: names no {' or '.join(DENOISERS)}")
    if "scheduler" not in parts:
        raise ValueError(f"{file}: names no scheduler")
    if len(parts.keys() & DENOISERS.keys()) > 1 or len(parts.keys() & DECODERS.keys()) > 1:
        raise ValueError(
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
        raise ValueError(f"{folder}: {kind} for flow matching or continuous time is not supported")
    if own.get("thresholding"):
        raise ValueError(f"{folder}: thresholding is not supported")
    if own.get("prediction_type") not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(f"{folder}: prediction_type {own.get('prediction_type')} is not supported")

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
        raise ValueError(
            f"{place}/scheduler_config.json: its betas do not make "
            f"{scheduler.config.num_train_timesteps} rising noise levels"
        )
    return scheduler


def find_weights(place):
    """(variant or None, [Path]): the weight files that are read from a network's folder.

    Those that diffusers prefers: full precision before half, safetensors before pickles.
    """
    for variant in (None, "fp16", "bf16"):
        dot = f".{variant}" if variant else ""
        index = place / f"{WEIGHTS}.safetensors.index{dot}.json"
        if index.is_file():
            with refuse(index):
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                return variant, [index, *(place / name for name in names)]
        for suffix in ("safetensors", "bin"):
            file = place / f"{WEIGHTS}{dot}.{suffix}"
            if file.is_file():
                return variant, [file]

    if list(place.glob(f"{WEIGHTS}*.bin.index*.json")):
        raise ValueError(
            f"{place}: diffusers cannot read sharded .bin files: save it again as safetensors"
        )
    raise ValueError(f"{place}: no weights ({WEIGHTS}.safetensors or .bin)")


def read_network(network_class, place):
    """A network of a folder, complete and finite, in eval mode, float32, on the CPU."""
    variant, files = find_weights(place)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{missing[0]}: missing, but listed in {files[0].name}")

    with refuse(place):
        config = network_class.load_config(place, local_files_only=True)
        quantised = config.get("quantization_config")
    if quantised:
        raise ValueError(f"{place}: quantised weights (quantization_config) are not supported")

    # The reason why a file cannot be opened is lost in what diffusers makes of it.
    what = place
    for file in files:
        if file.suffix == ".bin":
            what = f"{file}: damaged, or a pickle of more than tensors"
        if file.suffix == ".safetensors":
            with refuse(file), safetensors.safe_open(file, "pt"):
                pass
    with refuse(what):
        net, found = network_class.from_pretrained(
            place,
            variant=variant,
            torch_dtype=torch.float32,
            use_safetensors=files[0].suffix != ".bin",
            low_cpu_mem_usage=False,  # True needs the package accelerate
            local_files_only=True,
            output_loading_info=True,
        )

    # diffusers reports these and goes on, with random numbers where tensors are missing.
    for fault in ("missing", "unexpected"):
        names = found[f"{fault}_keys"]
        if names:
            raise ValueError(f"{place}: {some(names)} {fault} in {files[0].name}")
    check_finite(net.state_dict(), place)
    return net.eval()


def some(names):
    """The first of some names, and how many there are."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def check_finite(tensors, place):
    """ValueError when a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{place}: {name} has values that are not finite")


def read_scaling_factor(vae, place):
    """What latents are multiplied by; a VQModel that names no factor means 1, not the default."""
    with refuse(f"{place}/config.json"):
        given = type(vae).load_config(place, local_files_only=True)
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if vae.config.get(key) is not None:
            raise ValueError(f"{place}: {key} is not supported, as its pipeline would not apply it")
    if type(vae).__name__ == "VQModel" and "scaling_factor" not in given:
        return 1.0
    factor = vae.config.scaling_factor
    if not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
        raise ValueError(f"{place}: scaling_factor is {factor}, not a positive number")
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
        raise ValueError(
            f"{place}/config.json: sample_size is {size}, not the height and width of the noise"
        )
    return (config["in_channels"], *sides)


def label_count(config, denoiser, place):
    """The number of classes, 0 for an unconditional network."""
    if denoiser == "transformer":
        return config["num_embeds_ada_norm"]
    if config["class_embed_type"] is not None:
        raise ValueError(
            f"{place}: class_embed_type {config['class_embed_type']} is not supported, "
            "only a table of labels"
        )
    return config["num_class_embeds"] or 0


def hash_files(files):
    """SHA-256 of the files' contents, in order."""
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            content = hashlib.sha256()
            while chunk := stream.read(2**20):
                content.update(chunk)
        total.update(content.digest())
    return total.hexdigest()


class DiffusersModel(FileModel):
    """A pipeline of Hugging Face diffusers as --base."""

    def __init__(self, c):
        self.path = Path(c.base)
        try:
            self.path = Path(resolve(c.base))
            self.file = DiffusersPipeline(self.path, c.guidance)
            self.file.to(c.device)
            self.content = key_of(self.file.identity())
        except (ValueError, OSError) as error:
            raise UserError(self.one_line(f"--base {printable(c.base)}", error)) from error
        self.encodes = self.file.vae is not None

    def fetch(self, source, what):
        if source != str(self.path) and not Path(source).exists():
            try:
                return Path(resolve(source))
            except (ValueError, OSError) as error:
                raise UserError(f"{what} {source}: {printable(error, 400)}") from error
        return Path(source)

    def call(self, name, *args):
        """The adapter says in words of its own what is wrong with a folder."""
        try:
            return getattr(self.file, name)(*args)
        except (ValueError, OSError) as error:
            raise UserError(self.one_line(self.path, error)) from error

    def one_line(self, place, error):
        """The adapter's text, which mostly begins with the place itself."""
        text = printable(error, 400)
        return text if str(self.path) in text else f"{place}: {text}"

    def load(self, path):
        return self.read(path)

    def read(self, path):
        return self.checked_network(self.call("load", path), "load")

    def export(self, net, path, recipe):
        plain = copy.deepcopy(net).cpu()
        vars(plain).pop("forward", None)  # the compiled one
        self.call("save", plain, path, recipe)


def is_pipeline(source):
    """A folder of diffusers, or a name on its hub."""
    if Path(source).exists():
        return (Path(source) / "model_index.json").is_file()
    return re.fullmatch(r"[\w-]+/[\w.-]+", source) is not None and not source.endswith(NETWORKS)
