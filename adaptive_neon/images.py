"""Real images: an EDM dataset, a zip or folder, in three disjoint parts."""

import dataclasses
import hashlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from .files import Refused, UserError, printable, reading, write_atomically
from .stats import FOLDS


@dataclasses.dataclass(frozen=True)
class RealImages:
    """images: uint8 [N, C, H, W]; labels: int64 [N] or None; source: where they come from."""

    images: torch.Tensor
    labels: torch.Tensor | None
    source: str

    @property
    def identity(self):
        labels = b"" if self.labels is None else self.labels.numpy().tobytes()
        return hashlib.sha256(self.images.numpy().tobytes() + labels).hexdigest()


@dataclasses.dataclass(frozen=True)
class RealData:
    """Real images by purpose, disjoint: a base is trained on the first part, weights are selected
    against the second and judged against the third. origin: who has seen the last, in words."""

    training: RealImages
    selection: RealImages
    final: RealImages
    origin: str


SHARES = {"training": (0, 1), "selection": (2,), "final": (3,)}  # quarters, by content


LEAST_IMAGES = 2 * FOLDS  # of a part


def split(images, labels=None, source="the images", origin=""):
    """RealData: half to train on, a quarter to select with, a quarter for the final comparison. An
    image's part follows from its content alone: it never moves, and copies stay together."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images.numpy()]
    quarter = torch.tensor([digest[0] % 4 for digest in digests])
    parts = {}
    for purpose, quarters in SHARES.items():
        chosen = torch.isin(quarter, torch.tensor(quarters))
        if chosen.sum() < LEAST_IMAGES:
            raise UserError(
                f"{source}: {int(chosen.sum())} of its {len(images)} images fall into the "
                f"{purpose} part, it takes {LEAST_IMAGES}: give more images"
            )
        part_labels = None if labels is None else labels[chosen]
        parts[purpose] = RealImages(images[chosen], part_labels, f"{source}, {purpose} part")
    return RealData(**parts, origin=origin)


IMAGE_KINDS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
}  # first bytes; nothing else is opened


MOST_IMAGE_BYTES = 64 << 20  # of one file in a dataset


MOST_INDEX_BYTES = 512 << 20  # of dataset.json: ten million labels


MOST_SIDE = 4096  # pixels


MOST_LABEL = 99_999


class DatasetFiles:
    """The files of a dataset, a zip or a folder: .sizes {name: bytes}, read(name) up to a limit."""

    def __init__(self, path):
        self.folder = path if path.is_dir() else None
        self.sizes = {}
        if self.folder:
            self.list_folder()
        elif path.is_file():
            self.archive = zipfile.ZipFile(path)
            self.list_archive()
        else:
            raise Refused("it does not exist or is neither a file nor a folder")

    def list_folder(self):
        def refuse(error):
            raise error

        for folder, _, names in os.walk(self.folder, onerror=refuse):
            for name in names:
                file = Path(folder) / name
                inside = file.relative_to(self.folder).as_posix()
                if not file.is_file():
                    raise Refused(f"{printable(inside)} is no file (a pipe or a broken link?)")
                self.sizes[inside] = file.stat().st_size

    def list_archive(self):
        for info in self.archive.infolist():
            if info.is_dir():
                continue
            if info.filename in self.sizes:
                raise Refused(f"{printable(info.filename)} is in it twice")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise Refused(f"{printable(info.filename)} is neither stored nor deflated")
            self.sizes[info.filename] = info.file_size

    def read(self, name, most):
        """The content; what says that it is small and is not, is not read to its end."""
        if self.sizes[name] > most:
            raise Refused(f"{printable(name)} has {self.sizes[name]} bytes, more than {most}")
        with open(self.folder / name, "rb") if self.folder else self.archive.open(name) as file:
            return file.read(most + 1)


def read_image(raw):
    """PNG or JPEG by its first bytes -> uint8 [H, W, C], C 1 or 3; another kind of file -> None."""
    kind = next((kind for first, kind in IMAGE_KINDS.items() if raw.startswith(first)), None)
    if kind is None:
        return None
    picture = PIL.Image.open(io.BytesIO(raw), formats=[kind])
    if max(picture.size) > MOST_SIDE:
        raise Refused(f"{picture.width} x {picture.height} pixels, the most is {MOST_SIDE}")
    if (
        kind == "PNG" and raw[24] == 16
    ):  # the depth in the header; PIL would round 16-bit colours in silence
        raise Refused("16 bits a channel; convert it to 8")
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        raise Refused(f"transparency (mode {picture.mode}); convert it to RGB or grey")
    if getattr(picture, "is_animated", False) and picture.format == "PNG":
        raise Refused("an animation")
    if picture.mode in ("1", "P"):
        picture = picture.convert({"1": "L", "P": "RGB"}[picture.mode])
    if picture.mode not in ("L", "RGB"):
        raise Refused(f"mode {picture.mode}; convert it to RGB or grey, 8 bits a channel")
    return np.atleast_3d(np.array(picture))


def read_labels(raw):
    """dataset.json -> {image: label} or None: {"labels": [[image, label], ...] or null}."""
    index = json.loads(raw)
    rows = index.get("labels", "none") if type(index) is dict else "none"
    if rows is None:
        return None
    if type(rows) is not list:
        raise Refused('dataset.json has no list "labels"')
    labels = {}
    for row in rows:
        if type(row) is not list or len(row) != 2 or type(row[0]) is not str:
            raise Refused('"labels" in dataset.json is not a list of [image, label]')
        name, label = row[0].replace("\\", "/"), row[1]
        if type(label) is float and label.is_integer():
            label = int(label)
        if type(label) is not int or not 0 <= label <= MOST_LABEL:
            shown = (
                printable(label)
                if type(label) in (int, float, bool, str)
                else f"a {type(label).__name__}"
            )
            raise Refused(
                f"the label of {printable(name)} is {shown}, not an integer from 0 to {MOST_LABEL}"
            )
        if name in labels:
            raise Refused(f"{printable(name)} has two labels")
        labels[name] = label
    return labels


def read_dataset(path):
    """EDM dataset (zip or folder with dataset.json) -> uint8 [N, C, H, W], int64 [N] or None.

    PNG or JPEG, 8 bits, grey or RGB, of one size, in the order of their names. An image of another
    kind is refused; files of other kinds are counted on stderr."""
    path = Path(path)
    with reading(f"dataset {path} cannot be read"):
        files = DatasetFiles(path)
        names = sorted(name for name in files.sizes if not is_clutter(name))
        labels = None
        if "dataset.json" in names:
            names.remove("dataset.json")
            labels = read_labels(files.read("dataset.json", MOST_INDEX_BYTES))
        misplaced = [name for name in names if name.endswith("/dataset.json")]
        if misplaced:
            raise Refused(f"dataset.json must be at the top, not at {printable(misplaced[0])}")

        # Image by image into one array, made when the size is known.
        images, found, others = None, [], []
        for name in tqdm(names, desc=f"reading {path.name}", leave=False, disable=None):
            with reading(f"dataset {path} cannot be read: {printable(name)}"):
                image = read_image(files.read(name, MOST_IMAGE_BYTES))
                if image is None:
                    if Path(name).suffix.lower() in PIL.Image.registered_extensions():
                        raise Refused("neither PNG nor JPEG")
                    others.append(name)
                    continue
                if images is None:
                    images = torch.empty(
                        len(names), image.shape[2], *image.shape[:2], dtype=torch.uint8
                    )
                image = torch.from_numpy(image).permute(2, 0, 1)  # [C, H, W]
                if image.shape != images.shape[1:]:
                    first, this = tuple(images.shape[1:]), tuple(image.shape)
                    raise Refused(f"[C, H, W] is {this}, that of {printable(found[0])} is {first}")
                images[len(found)] = image
                found.append(name)
        if not found:
            raise Refused("it holds no PNG or JPEG images")
        warn_of_others(path, others, labels, found)
        if labels is None:
            return images[: len(found)], None
        missing = [name for name in found if name not in labels]
        if missing:
            raise Refused(
                f"{len(missing)} images have no label in dataset.json, the first is "
                f"{printable(missing[0])}"
            )
        return images[: len(found)], torch.tensor([labels[name] for name in found])


def is_clutter(name):
    """What operating systems put beside files."""
    last = name.rpartition("/")[2]
    return (
        "__MACOSX" in name.split("/")
        or last.startswith("._")
        or last in (".DS_Store", "Thumbs.db", "desktop.ini")
    )


def warn_of_others(path, others, labels, found):
    """What lies in the dataset and is not used, by number and first name, on stderr."""
    absent = sorted(labels.keys() - set(found)) if labels is not None else []
    for names, kind in ((others, "files that are no images"), (absent, "labels without an image")):
        if names:
            first = printable(names[0])
            print(
                f"{path}: {len(names)} {kind} are left out, the first is {first}", file=sys.stderr
            )


def write_dataset(path, images, labels):
    """uint8 [N, C, H, W] and labels [N] (or None) -> EDM dataset zip, stored uncompressed."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    index = None if labels is None else list(zip(names, labels.tolist(), strict=True))

    def write(part):
        with zipfile.ZipFile(part, "w") as archive:
            for name, image in zip(names, images.permute(0, 2, 3, 1).numpy(), strict=True):
                png = io.BytesIO()
                picture = PIL.Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
                picture.save(png, format="png", compress_level=0)
                archive.writestr(zipfile.ZipInfo(name), png.getvalue())
            archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": index}))

    write_atomically(path, write)
