"""Digits from matplotlib's fonts, as many as one likes, and small classifiers of them."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
import torch.nn.functional as F
from torch import nn

from .files import load_state, reading, save_state
from .keys import classifier_key, design_key, weights_hash

GLYPH_SIZE = 12
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GLYPH_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
)


@functools.cache
def glyph_atlas(size: int = 64, points: int = 46) -> torch.Tensor:
    """Every digit in every font, in the middle: float32 [fonts, 10, size, size] in [0, 1]."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    atlas = torch.zeros(len(GLYPH_FONTS), 10, size, size)
    for row, name in zip(atlas, GLYPH_FONTS, strict=True):
        with reading(f"font {folder / name} is missing or damaged: install matplotlib again"):
            font = PIL.ImageFont.truetype(
                str(folder / name), points, layout_engine=PIL.ImageFont.Layout.BASIC
            )
        for digit in range(10):
            picture = PIL.Image.new("L", (size, size))
            pen = PIL.ImageDraw.Draw(picture)
            left, top, right, bottom = pen.textbbox((0, 0), str(digit), font=font)
            corner = ((size - left - right) / 2, (size - top - bottom) / 2)
            pen.text(corner, str(digit), fill=255, font=font)
            row[digit] = torch.from_numpy(np.array(picture)) / 255
    return atlas


def draw_glyphs(
    count: int, stream: int, size: int = GLYPH_SIZE, oversampling: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of a stream: uint8 [count, 1, size, size], int64 labels [count]. Image i of
    a stream is always the same, however many are drawn."""
    # A row of nine numbers for every image, one after the other.
    draws = np.random.default_rng([*b"glyphs", stream]).random((count, 9))
    chosen, drawn = torch.from_numpy(draws[:, :2]), torch.from_numpy(draws[:, 2:]).float()
    low = torch.tensor([-0.2, 0.60, -0.25, 0.85, -0.08, -0.08, 0.7])
    high = torch.tensor([0.2, 0.85, 0.25, 1.15, 0.08, 0.08, 1.0])
    turn, zoom, shear, stretch, x, y, brightness = (low + (high - low) * drawn).unbind(1)
    font, label = (chosen * torch.tensor([len(GLYPH_FONTS), 10])).long().unbind(1)

    # From a place in the image to its place in the atlas, both in [-1, 1].
    across = [turn.cos() * zoom * stretch, (shear - turn.sin()) * zoom, x]
    down = [turn.sin() * zoom * stretch, turn.cos() * zoom / stretch, y]
    maps = torch.stack([torch.stack(across, 1), torch.stack(down, 1)], 1)  # [count, 2, 3]

    # Drawn larger and averaged over areas: the strokes are narrower than a pixel.
    fine = size * oversampling
    images = []
    for part in torch.arange(count).split(2000):
        grid = F.affine_grid(maps[part], [len(part), 1, fine, fine], align_corners=False)
        ink = F.grid_sample(
            glyph_atlas()[font[part], label[part]][:, None], grid, align_corners=False
        )
        grey = F.avg_pool2d(ink, oversampling) * brightness[part].view(-1, 1, 1, 1)
        images.append((grey * 255).round().to(torch.uint8))
    return torch.cat(images), label


def glyphs_cnn(size: int = GLYPH_SIZE) -> nn.Sequential:
    side = -(-size // 4)
    conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
    return nn.Sequential(
        conv(1, 32),
        nn.ReLU(),
        conv(32, 64, stride=2),
        nn.ReLU(),
        conv(64, 64, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * side * side, 64),
        nn.ReLU(),
    )


def glyphs_mlp(size: int = GLYPH_SIZE) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size**2, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU()
    )


class GlyphsClassifier(nn.Module):
    """Small classifier of glyphs, trained here on a stream of its own (seeded, seconds): uint8
    [N, 1, size, size] -> the 64 features in front of its last layer. They are not bounded on
    purpose: bounded ones are quieter, but blind to brightness, and choose weights that pixels and
    random convolutions find worse than the base (results/README.md). folder: keeps its weights."""

    dim = 64

    def __init__(
        self,
        folder: Path,
        name: str,
        body: Callable[..., nn.Module],
        seed: int,
        stream: int,
        test_stream: int,
        images: int = 10_000,
        epochs: int = 4,
        *,
        size: int = GLYPH_SIZE,
    ):
        super().__init__()
        self.name = self.kind = name
        self.score = "FD (glyphs CNN, 64-d)" if name == "glyphs-cnn-64" else f"FD ({name}, 64-d)"
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # Its key says no other size where it is the usual one.
            self.body = body() if size == GLYPH_SIZE else body(size)
            self.head = nn.Linear(64, 10)
            design = str(self.body)
            inputs = {"seed": seed, "stream": stream, "images": images, "epochs": epochs}
            path = folder / f"{name}-{classifier_key(design=design, **inputs)}.safetensors"
            if not path.exists():
                self.fit(*draw_glyphs(images, stream, size), epochs)
                save_state(path, self.state_dict(), {"classifier": name, **inputs})
        with reading(f"{path} is damaged, delete it"):
            weights, _ = load_state(path)
            self.load_state_dict(weights)
        self.eval().requires_grad_(False)
        self.identity = design_key(design=design, weights=weights_hash(self))

        fresh, labels = draw_glyphs(2000, test_stream, size)
        right = self.head(self(fresh)).argmax(1) == labels
        self.facts = {"accuracy": float(right.double().mean()), "accuracy_images": len(right)}

    def fit(self, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        for _ in range(epochs):
            for index in torch.randperm(len(images)).split(128):
                optimizer.zero_grad()
                F.cross_entropy(self.head(self(images[index])), labels[index]).backward()
                optimizer.step()

    def forward(self, images):
        return self.body(images.float() / 127.5 - 1)

    def alignment(self, images: torch.Tensor, asked) -> torch.Tensor:
        """Whether it reads the digit that was asked for, 1 or 0: float32 [N]. asked: int64 [N], or
        prompts that name a digit in words."""
        if not isinstance(asked, torch.Tensor):
            asked = torch.tensor([digit_in(prompt) for prompt in asked], device=images.device)
        return (self.head(self(images)).argmax(1) == asked).float()


def digit_in(prompt: str) -> int:
    """The digit that a prompt names; -1 where it names none."""
    return next((DIGITS.index(word) for word in prompt.split() if word in DIGITS), -1)
