"""Pipelines of diffusers that take prompts, as --base: a folder, with --prompts FILE.

    StableDiffusionPipeline      UNet2DConditionModel, one text encoder (1.x and 2.x)
    StableDiffusionXLPipeline    the same, two text encoders
    StableDiffusion3Pipeline     SD3Transformer2DModel on a rectified flow, two or three

A prompt is what a class is elsewhere: a label is its line. Text encoders are needed once, then a
table of embeddings takes their place; its last row is the negative prompt, which guidance compares
with. With --lora-rank (or a LoRA file as --aux) only the weights that it targets move.
"""

import bisect
import copy
import inspect
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .blocks import Merger, copied
from .diffusers import DiffusersModel
from .files import load_state, reading, save_state
from .folders import (
    RECIPE,
    home,
    import_diffusers,
    import_quiet,
    new_folder,
    pipeline_name,
    read_config,
    read_network,
    refuse,
    resolve,
    wrong,
)
from .keys import content_hash, text_key
from .lora import (
    Lora,
    check_written,
    is_lora,
    lora_of,
    read_lora,
    target_modules,
    with_lora,
    write_lora,
)
from .modelfile import own_snapshot
from .sampling import balanced_labels
from .seeds import SEARCH_SEED, SELECT_SEED

VERSION = 1  # raised whenever the same inputs would give other images

CLIP = {name: name for name in ("CLIPTextModel", "CLIPTextModelWithProjection")}
TOKENIZER = {
    name: name for name in ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
}
PARTS = {
    "unet": {"UNet2DConditionModel": "UNet2DConditionModel"},
    "transformer": {"SD3Transformer2DModel": "SD3Transformer2DModel"},
    "vae": {"AutoencoderKL": "AutoencoderKL"},
    "text_encoder": CLIP,
    "text_encoder_2": CLIP,
    "text_encoder_3": {"T5EncoderModel": "T5EncoderModel"},
    "tokenizer": TOKENIZER,
    "tokenizer_2": TOKENIZER,
    "tokenizer_3": TOKENIZER,
    "safety_checker": {"StableDiffusionSafetyChecker": "StableDiffusionSafetyChecker"},
    "feature_extractor": {
        "CLIPImageProcessor": "CLIPImageProcessor",
        "CLIPFeatureExtractor": "CLIPImageProcessor",
    },
}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
TEXT = ("text_encoder", "tokenizer")  # how the names of parts begin that read prompts

# Options of a U-Net that its pipeline would feed with what is not there.
ABSENT = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")

TOKENS, T5_TOKENS = 77, 256  # of a prompt

# Of the gradient search, measured with Stable Diffusion's decoder (128 channels at full size).
BYTES_PER_PIXEL = 24_000


def open_pipeline(c) -> DiffusersModel:
    """The model of a pipeline's folder."""
    name = pipeline_name(resolve(c.base))
    if name in PIPELINES:
        return TextModel(c)
    for option in asked_of_text(c):
        raise wrong(
            f"{option}: {c.base} as a {name} takes no prompts here, only these do: "
            f"{', '.join(PIPELINES)}"
        )
    return DiffusersModel(c)


def asked_of_text(c) -> list[str]:
    """The options of a configuration that only pipelines with prompts have."""
    options = ("prompts", "final_prompts", "negative", "rescale", "lora_rank", "export_merged")
    given = [name for name in options if getattr(c, name) not in ("", 0, None, False)]
    return [f"--{name.replace('_', '-')}" for name in given]


class TextModel(DiffusersModel):
    """A pipeline with prompts behind the seam."""

    parts_known = PARTS

    def __init__(self, c):
        self.kind = pipeline_name(resolve(c.base))
        import_quiet("transformers", "a pipeline with prompts")
        self.pipeline: Any = getattr(import_diffusers(), self.kind)
        asked = inspect.signature(self.pipeline.__call__).parameters
        self.own_guidance = asked["guidance_scale"].default
        if c.rescale and "guidance_rescale" not in asked:
            raise wrong(f"--rescale: {self.kind} has no rescaled guidance")
        self.rescale = c.rescale

        # What is asked for. Held-out prompts follow the others in the table.
        if not c.prompts:
            raise wrong(f"{c.base} takes prompts: give --prompts FILE, one prompt a line")
        if c.labels != "balanced":
            raise wrong("--prompts: only --labels balanced is supported, equal shares of every one")
        if c.continue_on_data:
            raise wrong("--continue-on-data: real images have no prompts to train on")
        self.prompts, self.held_out = read_prompts(c.prompts), []
        if c.final_prompts:
            self.held_out = read_prompts(c.final_prompts)
        else:
            self.notes = [
                "the final comparison asks for the same prompts as the selection: --final-prompts "
                "FILE holds others out"
            ]
        self.negative = c.negative

        # Where the seeds of every purpose begin: there, a round of all prompts begins.
        finals = [c.final_seed + k * c.final_images for k in range(c.final_repeats)]
        self.firsts = sorted({0, SELECT_SEED, SEARCH_SEED, *finals})
        self.finals = set(finals)

        self.lora_rank, self.seed, self.steps = c.lora_rank, c.seed, c.steps
        self.targets: list[str] = []  # modules that a LoRA is trained for
        self.device, self.merged_too = c.device, c.export_merged
        self.autoencoder_may = ("shift_factor",) if self.flows() else ()
        super().__init__(c)

    def ready(self, c) -> None:
        self._check_pipeline()
        with torch.device("meta"):
            net = self.network_class.from_config(self.config)
        self.moving = self._moving_parameters(c, net)
        self.training_identity = text_key(
            pipeline=self.identity, prompts=[], settings=[self.lora_rank, self.targets]
        )
        if c.plan and first_rank():
            print(self.memory(net))

        # Text encoders have the device for themselves.
        self.rows, self.pooled = self._embedded(c)
        super().ready(c)

    def flows(self) -> bool:
        return self.kind == "StableDiffusion3Pipeline"

    def read_process(self):
        if self.flows():
            return Flow(self.folder, self.parts["scheduler"])
        process = super().read_process()
        given = process.scheduler.config

        # This pipeline corrects what is wrong in old configurations; its offset counts here alone.
        if self.kind == "StableDiffusionPipeline":
            if given.clip_sample:
                process.scheduler.register_to_config(clip_sample=False)
            if given.timestep_spacing == "leading" and given.steps_offset != 1:
                process.scheduler.register_to_config(steps_offset=1)
        spacing = given.timestep_spacing
        rest = given.num_train_timesteps % self.steps
        if spacing == "linspace" or (spacing == "trailing" and rest):
            self.notes = [
                *self.notes,
                f"the scheduler's time steps ({spacing}) are not equally long: images differ a "
                "little from those of the pipeline's own DDIMScheduler",
            ]
        return process

    def _check_pipeline(self) -> None:
        """What else a pipeline would give its denoiser."""
        for key in ABSENT:
            if self.config.get(key) is not None:
                raise wrong(f"{self.folder}: {key} {self.config[key]} is not supported")
        added = self.config.get("addition_embed_type")
        if added != ("text_time" if self.kind == "StableDiffusionXLPipeline" else None):
            raise wrong(f"{self.folder}: addition_embed_type {added} of a {self.kind}")
        _, height, width = self.image_size
        version = read_config(self.folder / self.denoiser).get("_diffusers_version", "1.0")
        old = [int(part) for part in re.findall(r"\d+", version)[:2]] < [0, 9]
        if self.kind == "StableDiffusionPipeline" and old and self.shape[1] < 64:
            raise wrong(
                f"{self.folder}: of files before diffusers 0.9 its pipeline takes the sample_size "
                f"{self.shape[1]} for an error and 64 instead: write into unet/config.json what is "
                "meant, and a later _diffusers_version"
            )
        if height % 8 or width % 8:
            raise wrong(
                f"{self.folder}: images of {height} x {width}, but its pipeline wants sides that "
                "can be divided by 8"
            )

    def label_count(self, place: Path) -> int:
        return len(self.prompts) + len(self.held_out)

    def has_null_class(self) -> bool:
        return True

    def _key(self) -> str:
        """Prompts as they are written and files of encoders, not embeddings, whose last bits depend
        on the machine."""
        encoders = {}
        for name in self.parts:
            if not name.startswith(TEXT):
                continue
            if not (self.folder / name).is_dir():
                raise wrong(
                    f"{self.folder}: model_index.json names {name}, which is not there: get it, or "
                    "write [null, null] for it"
                )
            encoders[name] = content_hash(self.folder / name)
        prompts = [self.prompts, self.held_out, self.negative]
        settings: list[Any] = [VERSION, encoders]
        index = json.loads((self.folder / "model_index.json").read_text("utf-8"))
        if index.get("force_zeros_for_empty_prompt") is False:
            settings.append("empty prompts are embedded")
        self.embedded = text_key(pipeline=self.kind, prompts=prompts, settings=settings)
        return text_key(pipeline=super()._key(), prompts=[self.embedded], settings=[self.rescale])

    # ---------- prompts
    def balanced_labels(self, classes, seeds, device):
        """Equal shares of all prompts, from the first seed of every purpose on; on final seeds of
        those that were held out, if there are any."""
        labels = []
        for seed in map(int, seeds):
            first = self.firsts[bisect.bisect_right(self.firsts, seed) - 1]
            count, start = len(self.prompts), 0
            if first in self.finals and self.held_out:
                count, start = len(self.held_out), count
            labels.append(start + balanced_labels(count, [seed - first], device))
        return torch.cat(labels)

    def asked_for(self, labels):
        every = self.prompts + self.held_out
        return [every[label] for label in labels.tolist()]

    def _embedded(self, c) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings [P + 1, L, D] of all prompts and the negative one, and pooled ones [P + 1, D]
        where the pipeline has them; kept on disk."""
        path = c.out / f"prompts-{self.embedded}.safetensors"
        if path.exists():
            with reading(f"{path} is damaged, delete it"):
                tensors, _ = load_state(path)
        else:
            tensors = self._embed()
            if not c.plan:
                save_state(path, tensors, {"pipeline": self.kind})
        rows, pooled = tensors["rows"].to(c.device), tensors.get("pooled")
        return rows, None if pooled is None else pooled.to(c.device)

    @torch.no_grad()
    def _embed(self) -> dict[str, torch.Tensor]:
        """By the pipeline's own function; its text encoders leave the memory when this returns."""
        import transformers

        prompts = [*self.prompts, *self.held_out, self.negative or ""]
        taken = inspect.signature(self.pipeline.__init__).parameters
        read = [name for name in self.parts if name.startswith(TEXT)]
        absent = [name for name in (*PARTS, "image_encoder") if name in taken and name not in read]
        encoders = {}
        for name in read:
            if name.startswith("text_encoder"):
                network = getattr(transformers, self.parts[name])
                encoders[name] = read_network(network, self.folder / name, exactly=False)
        options: dict[str, Any] = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        if self.flows():
            options |= {"prompt_2": None, "prompt_3": None}
        with torch.random.fork_rng(devices=[]), refuse(f"{self.folder}: its text encoders"):
            pipeline = self.pipeline.from_pretrained(
                self.folder,
                local_files_only=True,
                **encoders,
                **dict.fromkeys(absent),
            ).to(self.device)
            # Without a third encoder it asks its transformer how wide zeros must be.
            if self.flows():
                pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**self.config))
            warn_of_long(prompts, pipeline.tokenizer)

            rows, pooled = [], []
            for start in range(0, len(prompts), 64):
                part = prompts[start : start + 64]
                found = pipeline.encode_prompt(prompt=part, device=self.device, **options)
                rows.append(found[0].float().cpu())
                if len(found) == 4:
                    pooled.append(found[2].float().cpu())
        tensors = {"rows": torch.cat(rows)}
        if pooled:
            tensors["pooled"] = torch.cat(pooled)

        # No negative prompt is no empty one for these.
        if self.negative is None and pipeline.config.get("force_zeros_for_empty_prompt"):
            for table in tensors.values():
                table[-1] = 0
        return tensors

    def call(self, net, x, times, labels):
        rows = self.rows[labels].to(x.dtype)
        if self.flows():
            pooled = self.pooled[labels].to(x.dtype)
            return net(x, rows, pooled, times, return_dict=False)[0]
        added = None
        if self.pooled is not None:
            _, height, width = self.image_size
            size = [height, width, 0, 0, height, width]
            added = {
                "text_embeds": self.pooled[labels].to(x.dtype),
                "time_ids": torch.tensor([size], device=x.device, dtype=x.dtype).repeat(len(x), 1),
            }
        return net(x, times, rows, added_cond_kwargs=added, return_dict=False)[0]

    # ---------- the weights that move
    def _moving_parameters(self, c, net: nn.Module) -> set[str]:
        """Their names; empty where all move."""
        if not c.aux:
            self.targets = target_modules(net, c.lora_targets) if self.lora_rank else []
            return {f"{name}.weight" for name in self.targets}
        source = self.fetch(c.aux, "the self-trained network")
        if source.is_dir() and not is_lora(source):
            source = next(iter(sorted(source.glob("network-snapshot-*.safetensors"))), source)
        if not is_lora(source):
            return set()
        lora = self._read_lora(source, net)
        self.notes = [*self.notes, *lora.notes]
        if first_rank():
            for note in lora.notes:
                print(note)
        return lora.parameters()

    def _read_lora(self, path: Path, net: nn.Module) -> Lora:
        with reading(f"{path} is refused"):
            own_snapshot(path)  # of this program, whose content has a hash
        return read_lora(path, net)

    def load(self, path: Path) -> nn.Module:
        net = self.read(path)
        if self.moving:
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(name in self.moving)
        return net

    def load_like(self, base: nn.Module, path: Path) -> nn.Module:
        """A self-trained network, or the base with a LoRA's steps."""
        path = Path(path)
        if not is_lora(path):
            return super().load_like(base, path)
        net: Any = copied(base).cpu()
        lora = self._read_lora(path, net)
        if self.moving and not lora.parameters() <= self.moving:
            raise wrong(f"{path}: this LoRA moves other modules than the first one")
        net = lora.add_to(net)
        net.lora = lora
        return net.eval()

    def trainable(self, base: nn.Module, c=None) -> nn.Module:
        net = copied(base)
        if not self.lora_rank:
            return net
        return with_lora(net.requires_grad_(True), self.targets, self.lora_rank, self.seed + 1)

    def save(self, net: nn.Module, path: Path, recipe: dict) -> None:
        lora = lora_of(net)
        if lora is None:
            super().save(net, path, recipe)
            return
        tensors: dict[str, torch.Tensor] = {}
        for module, (a, b) in lora.factors.items():
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        save_state(path, tensors, {"recipe": recipe})

    def memory(self, net: nn.Module) -> str:
        """What sampling and searching need on the device. net: on the meta device."""

        def gigabytes(count):
            return f"{4 * count / 1e9:.2g} GB"

        every = sum(parameter.numel() for parameter in net.parameters())
        moving = sum(p.numel() for name, p in net.named_parameters() if name in self.moving)
        decoder = sum(parameter.numel() for parameter in self.vae.parameters())
        width, length = self.config.get("cross_attention_dim"), TOKENS
        if self.flows():
            width, length = self.config["joint_attention_dim"], TOKENS + T5_TOKENS
        prompts = (self.number_of_classes + 1) * length * width
        _, height, across = self.image_size
        channels = self.vae.config.block_out_channels[0]
        images = self._batch()
        gradient = BYTES_PER_PIXEL * images * height * across * channels / 128 / 1e9
        return (
            f"memory on the device: text encoders {gigabytes(self._encoders())}, which leave it "
            f"once prompts are embedded; then weights {gigabytes(every + decoder)}, drift of what "
            f"moves {gigabytes(2 * (moving or every))}, prompts {gigabytes(prompts)}; a gradient "
            f"through the decoder about {gradient:.2g} GB for {images} images at once"
        )

    def _encoders(self) -> int:
        """Parameters of the text encoders."""
        import transformers

        count = 0
        for name, kind in self.parts.items():
            if name.startswith("text_encoder"):
                network = getattr(transformers, kind)
                with refuse(self.folder / name), torch.device("meta"):
                    options = network.config_class.from_pretrained(self.folder / name)
                    count += sum(p.numel() for p in network(options).parameters())
        return count

    # ---------- partitions
    def layer(self, name: str) -> str:
        """One layer for each transformer and resnet block; the rest as in other pipelines."""
        whole = super().layer(name)
        inner = re.match(
            r"((?:down_blocks|up_blocks)\.\d+|mid_block)\.(attentions|resnets|downsamplers|upsamplers)"
            r"\.\d+(\.transformer_blocks\.\d+)?",
            name,
        )
        return inner.group() if inner else whole

    # ---------- export
    def export_merged(self, merger: Merger, w: dict[str, float], path: Path, recipe: dict) -> None:
        """A LoRA as a LoRA file with the weights folded in, which is loaded again by diffusers
        before it stands under its name; on request the whole pipeline beside it."""
        lora = getattr(merger.aux, "lora", None)
        net = merger.set(w)
        if lora is None:
            self.export(net, path, recipe)
            return
        weights = merger.parameter_weights(merger.weights(w))
        minus = {module: -weights[f"{module}.weight"] for module in lora.factors}
        with new_folder(path, self.folder) as new:
            file = new / "repair.safetensors"
            write_lora(lora.weighted(minus), file, self.flows())
            check_written(file, merger.base, net, self.pipeline)
            (new / RECIPE).write_text(json.dumps(recipe, indent=2, default=str) + "\n")
        if self.merged_too:
            self.export(net, path.with_name(f"{path.name}-merged"), recipe)


class Flow:
    """Euler's method on a rectified flow, x = (1 - sigma) clean + sigma noise."""

    REFUSED = (
        "use_dynamic_shifting",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "invert_sigmas",
        "stochastic_sampling",
        "shift_terminal",
    )

    def __init__(self, folder: Path, kind: str):
        self.folder, self.place = folder, home(folder, "scheduler")
        if kind != "FlowMatchEulerDiscreteScheduler":
            raise wrong(
                f"{folder}: scheduler {kind} is not supported (only "
                "FlowMatchEulerDiscreteScheduler)"
            )
        with refuse(f"{self.place}/scheduler_config.json"):
            scheduler_class = import_diffusers().FlowMatchEulerDiscreteScheduler
            given = scheduler_class.load_config(self.place, local_files_only=True)
            self.scheduler = scheduler_class.from_config(given)
        for key in self.REFUSED:
            if self.scheduler.config.get(key):
                raise wrong(f"{self.place}/scheduler_config.json: {key} is not supported")
        self.sigmas, self.times = self.scheduler.sigmas, self.scheduler.timesteps  # [T], falling

    def check_same(self, other: "Flow", path: Path, base: Path) -> None:
        if not torch.equal(other.sigmas, self.sigmas):
            raise wrong(f"{path}: its noise levels (shift) are not those of {base}")

    def walk(self, predict, x, steps):
        """From noise [N, *shape] to samples; predict(x, times float32 [N]): the velocity."""
        if not 1 <= steps <= len(self.sigmas):
            raise wrong(f"{steps} sampling steps: {self.folder} allows 1 to {len(self.sigmas)}")
        scheduler = copy.copy(self.scheduler)  # set_timesteps writes
        scheduler.set_timesteps(steps)
        sigmas = scheduler.sigmas.tolist()
        for i, t in enumerate(scheduler.timesteps.tolist()):
            velocity = predict(x, torch.full((len(x),), t, device=x.device))
            x = x + (sigmas[i + 1] - sigmas[i]) * velocity
        return x

    def draw(self, x):
        """Places of the scheduler's sigmas, int64 [N], and noise like x [N, *shape]."""
        places = torch.randint(len(self.sigmas), (len(x),), device=x.device)
        return places, torch.randn_like(x)

    def error(self, predict, x, places, noise):
        """Of the velocity at x [N, *shape] with this noise at these places."""
        sigma = self.sigmas.to(x.device)[places].view(-1, 1, 1, 1)
        output = predict((1 - sigma) * x + sigma * noise, self.times.to(x.device)[places])
        return output - (noise - x)


def first_rank() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


# -------------------- prompts
def read_prompts(path: str) -> list[str]:
    """Lines of a file; a line that stands there twice is asked for twice as often."""
    with refuse(path):
        text = Path(path).read_text("utf-8-sig")  # Windows marks the beginning
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise wrong(f"{path}: no prompts, one a line is needed")
    return prompts


def warn_of_long(prompts: list[str], tokenizer) -> None:
    """Of prompts whose end the first text encoder does not see."""
    most = tokenizer.model_max_length
    long = [p for p, ids in zip(prompts, tokenizer(prompts).input_ids) if len(ids) > most]
    if long and first_rank():
        print(
            f"{len(long)} prompts have more than {most} tokens and are cut, first: {long[0][:80]}"
        )
