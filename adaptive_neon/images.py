"""Real images: an EDM dataset, a zip or folder, in three disjoint parts."""

import dataclasses
import hashlib
import io
import json
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
import torch.distributed
from tqdm import tqdm

from .files import Refused, UserError, escaped, printable, reading, write_atomically
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


def split(
    images: torch.Tensor,
    labels: torch.Tensor | None = None,
    source: str = "the images",
    origin: str = "",
) -> RealData:
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


def refuse_empty_classes(real: RealImages, classes: int) -> None:
    """All classes 0, 1, ... of a network are sampled: each needs images to be trained on."""
    if not classes:
        return
    if real.labels is None:
        raise UserError(f"{real.source}: no labels, the network takes {classes} classes")
    counts = torch.bincount(real.labels, minlength=classes)
    empty = (counts == 0).nonzero().flatten().tolist()
    if len(counts) > classes or empty:
        problem = f"the network has only {classes} classes"
        if empty:
            shown = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            problem = f"no image of {len(empty)} of {classes} classes ({shown})"
        raise UserError(
            f"{real.source}: labels from {int(real.labels.min())} to {int(real.labels.max())}, "
            f"{problem}: number the classes in dataset.json 0, 1, 2, ... without gaps, and give "
            "images of each"
        )


# ---------------------------------------------------------------- files of a dataset
IMAGE_KINDS = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}  # first bytes
MOST_IMAGE_BYTES = 64 << 20  # of one file in a dataset
MOST_INDEX_BYTES = 512 << 20  # of dataset.json: ten million labels
MOST_LABEL = 99_999

# What systems and programs put beside files, and what begins with a dot, @ or $: .DS_Store, ._x,
# .ipynb_checkpoints, .Trash-1000, @eaDir, $RECYCLE.BIN.
CLUTTER = {
    "__macosx",
    "__pycache__",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "lost+found",
    "recycler",
    "#recycle",
    "#snapshot",
    "system volume information",
}


def is_clutter(name):
    return name.startswith((".", "@", "$")) or name.lower() in CLUTTER


def plain_name(name):
    """A name in a dataset as everybody else writes it: Windows has backslashes, macOS accents as
    characters of their own."""
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    return "/".join(part for part in name.split("/") if part not in ("", "."))


class DatasetFiles:
    """The files of a dataset, a zip or a folder, by name. skipped: names of clutter; again: of
    links that lead back to a folder that is read, or around it."""

    def __init__(self, path):
        self.files, self.skipped, self.again = {}, set(), []
        self.archive = None
        if path.is_dir():
            self.list_folder(path)
        elif path.is_file():
            self.archive = zipfile.ZipFile(path)
            self.list_archive()
        else:
            raise Refused("it does not exist or is neither a file nor a folder")

    def list_folder(self, root):
        """Links to folders come after all folders, so that each is read once, by its own name; a
        link to a folder around this one would read its neighbours."""
        seen = {(folder.stat().st_dev, folder.stat().st_ino) for folder in root.resolve().parents}
        folders, links = [root], []
        while folders or links:
            folder = folders.pop() if folders else links.pop(0)
            place = (folder.stat().st_dev, folder.stat().st_ino)
            if place in seen:
                self.again.append(plain_name(str(folder.relative_to(root))))
                continue
            seen.add(place)
            for path in sorted(folder.iterdir()):
                name = plain_name(str(path.relative_to(root)))
                if is_clutter(path.name):
                    self.skipped.add(name)
                elif path.is_dir():
                    (links if path.is_symlink() else folders).append(path)
                elif path.is_file():
                    self.add(name, path)
                else:
                    raise Refused(f"{printable(name)} is no file (a pipe or a broken link?)")

    def list_archive(self):
        for info in self.archive.infolist():
            name = plain_name(info.filename)
            parts = name.split("/")
            clutter = [i for i, part in enumerate(parts) if is_clutter(part)]
            if clutter:
                self.skipped.add("/".join(parts[: clutter[0] + 1]))
            elif not info.filename.endswith(("/", "\\")):
                self.add(name, info)

    def add(self, name, file):
        if name in self.files:
            raise Refused(f"{printable(name)} is in it twice")
        self.files[name] = file

    def read(self, name, most):
        """The content; what says that it is small and is not, is not read to its end."""
        file = self.files[name]
        size = file.stat().st_size if self.archive is None else file.file_size
        if size > most:
            raise Refused(f"{printable(name)} has {size} bytes, more than {most}")
        with file.open("rb") if self.archive is None else self.archive.open(file) as opened:
            return opened.read(most + 1)


def read_image(raw):
    """PNG or JPEG by its first bytes -> uint8 [H, W, C], C 1 or 3, and whether it was turned as its
    EXIF orientation says; another kind of file -> None."""
    kind = next((kind for first, kind in IMAGE_KINDS.items() if raw.startswith(first)), None)
    if kind is None:
        return None
    picture = PIL.Image.open(io.BytesIO(raw), formats=[kind])
    if kind == "PNG" and raw[24] == 16:  # the header's depth; PIL rounds 16-bit colours in silence
        raise Refused("16 bits a channel; convert it to 8")
    mode = {"1": "L", "P": "RGB"}.get(picture.mode, picture.mode)
    if mode not in ("L", "RGB") or "transparency" in picture.info:
        clear = " with transparency" if "transparency" in picture.info else ""
        raise Refused(f"mode {picture.mode}{clear}; convert it to RGB or grey, 8 bits a channel")

    # Cameras store the picture as it lay on the sensor.
    turned = picture.getexif().get(PIL.ExifTags.Base.Orientation, 1) in range(2, 9)
    if turned:
        picture = PIL.ImageOps.exif_transpose(picture)
    return np.atleast_3d(np.array(picture.convert(mode))), turned


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
        name, label = plain_name(row[0]), row[1]
        if type(label) is float and label.is_integer():
            label = int(label)
        if type(label) is not int or not 0 <= label <= MOST_LABEL:
            raise Refused(
                f"the label of {printable(name)} is {printable(repr(label))}, not an integer from "
                f"0 to {MOST_LABEL}"
            )
        if name in labels:
            raise Refused(f"{printable(name)} has two labels")
        labels[name] = label
    return labels


# ---------------------------------------------------------------- reading and writing
def read_dataset(path: Path | str, quiet: bool = False):
    """EDM dataset (zip or folder with dataset.json) -> uint8 [N, C, H, W], int64 [N] or None.

    PNG or JPEG, 8 bits, grey or RGB, of one size, in the order of their names; turned as their
    EXIF orientation says. An image of another kind is refused. One line on stderr says what was
    read and what was left out, unless quiet."""
    path = Path(path)
    with reading(f"dataset {path} cannot be read"):
        files = DatasetFiles(path)
        names = sorted(files.files)
        labels = None
        if "dataset.json" in names:
            names.remove("dataset.json")
            labels = read_labels(files.read("dataset.json", MOST_INDEX_BYTES))
        misplaced = [name for name in names if name.endswith("/dataset.json")]
        if misplaced:
            raise Refused(f"dataset.json must be at the top, not at {printable(misplaced[0])}")

        images, found, others, turned = read_images(path, files, names)
        if not quiet:
            absent = [] if labels is None else sorted(labels.keys() - set(found))
            report_dataset(path, files, images, found, others, turned, absent)
        if labels is None:
            return images, None
        missing = [name for name in found if name not in labels]
        if missing:
            raise Refused(
                f"{len(missing)} images have no label in dataset.json, the first is "
                f"{printable(missing[0])}"
            )
        return images, torch.tensor([labels[name] for name in found])


def read_images(path, files, names):
    """uint8 [N, C, H, W], the names of the images and of other files, how many were turned."""
    images, found, others, turned = None, [], [], 0
    for name in tqdm(names, desc=f"reading {path.name}", leave=False, disable=None):
        with reading(f"dataset {path} cannot be read: {printable(name)}"):
            picture = read_image(files.read(name, MOST_IMAGE_BYTES))
            if picture is None:
                if Path(name).suffix.lower() in PIL.Image.registered_extensions():
                    raise Refused("neither PNG nor JPEG")
                others.append(name)
                continue
            image = torch.from_numpy(picture[0]).permute(2, 0, 1)  # [C, H, W]
            if images is None:  # one array for all, made when the size is known
                images = torch.empty(len(names), *image.shape, dtype=torch.uint8)
            if image.shape != images.shape[1:]:
                first, this = tuple(images.shape[1:]), tuple(image.shape)
                raise Refused(f"[C, H, W] is {this}, that of {printable(found[0])} is {first}")
            images[len(found)] = image
            found.append(name)
            turned += picture[1]
    if not found:
        raise Refused("it holds no PNG or JPEG images")
    return images[: len(found)], found, others, turned


def report_dataset(path, files, images, found, others, turned, absent):
    """What was read from a dataset and what was not, in one line on stderr."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    folders = len({name.rpartition("/")[0] for name in found})
    channels, height, width = images.shape[1:]
    where = "1 folder" if folders == 1 else f"{folders} folders"
    parts = [f"{len(found)} images [{channels}, {height}, {width}] from {where}"]
    if turned:
        parts.append(f"{turned} turned as their EXIF orientation says")
    left_out = {
        "hidden or system files and folders": sorted(files.skipped),
        "links that lead back": files.again,
        "files that are no images": others,
        "labels without an image": absent,
    }
    for kind, names in left_out.items():
        if names:
            parts.append(f"left out: {len(names)} {kind}, the first is {printable(names[0])}")
    print(escaped(f"{path}: {'; '.join(parts)}"), file=sys.stderr)


def write_dataset(path: Path, images: torch.Tensor, labels: torch.Tensor | None) -> None:
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
