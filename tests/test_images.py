"""What adaptive_neon/images.py promises."""

import dataclasses
import hashlib
import io
import json
import os
import struct
import time
import types
import unicodedata
import zipfile
import zlib

import numpy as np
import PIL.Image
import pytest
import torch

import adaptive_neon as neon
import edm_neon as edm

torch.set_num_threads(1)


def hashes(images):
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images.numpy()]


# -------------------- real images in three parts


def random_images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 1, 4, 4), generator=generator).to(torch.uint8)


def test_split_is_disjoint_and_complete_and_labels_follow():
    images, labels = random_images(800), torch.arange(800)
    real = neon.images.split(images, labels, "x.zip")
    parts = [real.training, real.selection, real.final]
    together = torch.cat([part.labels for part in parts])
    assert sorted(together.tolist()) == list(range(800))
    for part in parts:
        assert torch.equal(part.images, images[part.labels])
    sizes = [len(part.images) for part in parts]
    assert sizes[0] == pytest.approx(400, abs=60) and sizes[1] == pytest.approx(200, abs=50)


def test_split_does_not_move_when_images_come_go_or_change_places():
    images = random_images(800)
    real = neon.images.split(images, None, "x")
    order = torch.randperm(800)[:600]
    again = neon.images.split(images[order].repeat(2, 1, 1, 1), None, "x")  # and have copies
    for purpose in ("training", "selection", "final"):
        before, after = (set(hashes(getattr(r, purpose).images)) for r in (real, again))
        assert after <= before and len(after) < len(before)


def test_too_few_images_are_refused():
    with pytest.raises(
        neon.files.UserError, match=r"x.zip: \d+ of its 100 images .* give more images"
    ):
        neon.images.split(random_images(100), None, "x.zip")


@pytest.mark.parametrize("base, unknown", [("", False), ("x.pkl", True)])
def test_origin_says_whether_the_base_may_have_seen_the_images(tmp_path, base, unknown):
    neon.images.write_dataset(tmp_path / "x.zip", random_images(800), None)
    config = neon.config.Config(data=str(tmp_path / "x.zip"), base=base, train_base=1.0)
    assert ("unknown" in edm.Cifar10().real_images(config).origin) == unknown


# -------------------- images


PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def encoded(picture, kind="png", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def deep_png():
    """RGB of 16 bits a channel, which PIL reads as 8 in silence and does not write."""
    png = bytearray(encoded(PIL.Image.new("RGB", (8, 8))))
    png[24] = 16
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


RGB = PIL.Image.fromarray(PIXELS)


GREY = RGB.convert("L")


GOOD_IMAGES = {
    "rgb": (encoded(RGB), RGB),
    "grey": (encoded(GREY), GREY),
    "palette": (encoded(RGB.quantize(8)), RGB.quantize(8).convert("RGB")),
    "1 bit": (encoded(RGB.convert("1")), RGB.convert("1").convert("L")),
    "4 bits": (encoded(GREY.point(lambda v: v // 16 * 17), bits=4), None),
    "jpeg": (encoded(RGB, "jpeg"), PIL.Image.open(io.BytesIO(encoded(RGB, "jpeg")))),
    "grey jpeg": (encoded(GREY, "jpeg"), PIL.Image.open(io.BytesIO(encoded(GREY, "jpeg")))),
}


BAD_IMAGES = {
    "alpha": (encoded(RGB.convert("RGBA")), "mode RGBA; convert it to RGB"),
    "clear colour": (encoded(RGB, transparency=(1, 2, 3)), "mode RGB with transparency"),
    "16-bit grey": (encoded(PIL.Image.new("I;16", (8, 8))), "16 bits"),
    "16-bit rgb": (deep_png(), "16 bits"),
    "cmyk": (encoded(RGB.convert("CMYK"), "jpeg"), "mode CMYK"),
    "bmp": (encoded(RGB, "bmp"), "neither PNG nor JPEG"),
    "half a jpeg": (encoded(RGB, "jpeg")[:400], ""),
    "damaged": (encoded(RGB)[:60] + b"\xff\xff\xff" + encoded(RGB)[63:], ""),
    "empty": (b"", "neither PNG nor JPEG"),
    "another size": (encoded(RGB.resize((4, 4))), r"\[C, H, W\] is \(3, 4, 4\)"),
    "another mode": (encoded(GREY), r"\[C, H, W\] is \(1, 8, 8\)"),
}


def zipped(path, files, compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def in_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


MAKERS = {"zip": lambda folder, files: zipped(folder / "set.zip", files), "folder": in_folder}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_images_are_read_to_the_byte(tmp_path, name, maker):
    raw, picture = GOOD_IMAGES[name]
    picture = picture or GREY.point(lambda v: v // 16 * 17)
    images, labels = neon.images.read_dataset(MAKERS[maker](tmp_path, {"a/1.png": raw}))
    want = torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1)
    assert torch.equal(images, want[None]) and images.is_contiguous() and labels is None


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images_of_other_kinds_are_refused_by_name(tmp_path, name):
    raw, message = BAD_IMAGES[name]
    path = in_folder(tmp_path, {"a/0.png": encoded(RGB), "a/1.png": raw})
    with pytest.raises(neon.files.UserError, match=f"cannot be read: a/1.png .*{message}"):
        neon.images.read_dataset(path)


def test_content_decides_what_an_image_is_and_names_decide_the_order(tmp_path):
    files = {name: encoded(PIL.Image.new("L", (2, 2), i)) for i, name in enumerate("312")}
    images, _ = neon.images.read_dataset(zipped(tmp_path / "set.zip", {"4.txt": b"text", **files}))
    assert images[:, 0, 0, 0].tolist() == [1, 2, 0]


CLUTTER = [
    "a/.ipynb_checkpoints/1-checkpoint.png",
    "a/@eaDir/1.png",
    "$RECYCLE.BIN/1.png",
    "lost+found/1.png",
    "a/Thumbs.db",
]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", CLUTTER)
def test_hidden_and_system_files_are_skipped_aloud(tmp_path, capsys, maker, name):
    files = {"1.png": encoded(RGB), name: encoded(GREY)}
    images, _ = neon.images.read_dataset(MAKERS[maker](tmp_path, files))
    said = capsys.readouterr().err
    assert len(images) == 1 and "1 images [3, 8, 8] from 1 folder;" in said
    assert "left out: 1 hidden or system files and folders, the first is " in said


def test_one_line_says_what_was_read(tmp_path, capsys):
    files = {f"{name}/{i}.png": encoded(RGB) for name in "ab" for i in range(3)}
    files |= {
        "README.md": b"text",
        "x\x1b[31m.csv": b"text",
        ".git/config": b"",
        "a/.DS_Store": b"",
    }
    index = {"labels": [[name, 1] for name in files if name.endswith("png")] + [["c/0.png", 2]]}
    files["dataset.json"] = json.dumps(index).encode()
    path = zipped(tmp_path / "set.zip", files)
    neon.images.read_dataset(path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"{path}: 6 images [3, 8, 8] from 2 folders; left out: 2 hidden or system files and "
        "folders, the first is .git; left out: 2 files that are no images, the first is README.md; "
        "left out: 1 labels without an image, the first is c/0.png"
    )


def test_a_quiet_reading_says_nothing(tmp_path, capsys):
    neon.images.read_dataset(zipped(tmp_path / "set.zip", {"1.png": encoded(RGB)}), quiet=True)
    assert capsys.readouterr().err == ""


def tree(folder):
    """train/cats and elsewhere/dogs of two images each; beside train, a folder of others."""
    for name, images in {"train/cats": 2, "elsewhere/dogs": 2, "others": 5}.items():
        files = {f"{name}/{i}.png": encoded(RGB) for i in range(images)}
        in_folder(folder, files)
    return folder / "train"


LINKS = {
    "a class": ({"dogs": "../elsewhere/dogs"}, 4, ["cats", "dogs"]),
    "a folder of classes": ({"more": "../elsewhere"}, 4, ["cats", "more/dogs"]),
    "the same twice": ({"dogs": "../elsewhere/dogs", "hunde": "../elsewhere/dogs"}, 4, None),
    "before the folder itself": ({"animals": "cats"}, 2, ["cats"]),
    "a loop": ({"cats/loop": "../cats"}, 2, ["cats"]),
    "a loop around it": ({"loop": ".."}, 2, ["cats"]),
    "an image": ({"cats/dog.png": "../../elsewhere/dogs/0.png"}, 3, ["cats"]),
}


@pytest.mark.parametrize("name", LINKS)
def test_links_are_followed_once(tmp_path, capsys, name):
    root = tree(tmp_path)
    links, count, folders = LINKS[name]
    for link, target in links.items():
        (root / link).symlink_to(target)
    images, _ = neon.images.read_dataset(root)
    assert len(images) == count
    if folders:
        listed = neon.images.DatasetFiles(root).files
        assert sorted({name.rpartition("/")[0] for name in listed}) == folders
    back = "links that lead back" in capsys.readouterr().err
    assert back == (name not in ("a class", "a folder of classes", "an image"))


# Orientation, and what numpy does to stored pixels.
TURNS = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    6: lambda x: np.rot90(x, -1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("kind, orientation", [("png", 2), ("png", 6), ("jpeg", 3), ("jpeg", 8)])
def test_pictures_are_turned_as_their_orientation_says(tmp_path, capsys, kind, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    plain, turned = encoded(RGB, kind), encoded(RGB, kind, exif=exif)
    images, _ = neon.images.read_dataset(in_folder(tmp_path, {"0": plain, "1": turned}))
    want = TURNS[orientation](images[0].permute(1, 2, 0).numpy())
    assert np.array_equal(images[1].permute(1, 2, 0).numpy(), want)
    assert "; 1 turned as their EXIF orientation says" in capsys.readouterr().err


@pytest.mark.parametrize("orientation", [1, 9])
def test_other_orientations_turn_nothing(tmp_path, capsys, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    images, _ = neon.images.read_dataset(in_folder(tmp_path, {"1": encoded(RGB, exif=exif)}))
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), PIXELS)
    assert "turned" not in capsys.readouterr().err


def test_a_set_without_images_is_refused(tmp_path):
    with pytest.raises(neon.files.UserError, match="no PNG or JPEG images"):
        neon.images.read_dataset(zipped(tmp_path / "set.zip", {"a.txt": b"text"}))


def with_size(path, size, said):
    """The archive, whose entry of this size says another."""
    old, new = struct.pack("<I", size), struct.pack("<I", said)
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


@pytest.mark.parametrize(
    "name, most", [("a.png", 64 << 20), ("dataset.json", 512 << 20)], ids=["image", "labels"]
)
def test_entries_that_are_too_large_are_not_read(tmp_path, name, most):
    files = {"0.png": encoded(RGB), name: b"\0" * 54321}
    path = with_size(zipped(tmp_path / "set.zip", files), 54321, most + 1)
    with pytest.raises(
        neon.files.UserError, match=f"{name} has {most + 1} bytes, more than {most}"
    ):
        neon.images.read_dataset(path)


def test_an_entry_larger_than_it_says_is_refused(tmp_path):
    png = encoded(RGB, compress_level=0)
    files = {"a.png": png + b"\0" * 10**6}
    path = zipped(tmp_path / "set.zip", files, zipfile.ZIP_DEFLATED)
    with pytest.raises(neon.files.UserError, match="a.png .*CRC"):
        neon.images.read_dataset(with_size(path, len(png) + 10**6, len(png)))


def test_encrypted_entries_are_refused(tmp_path):
    path = zipped(tmp_path / "set.zip", {"1.png": encoded(RGB)})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(neon.files.UserError, match="1.png .*encrypted"):
        neon.images.read_dataset(path)


@pytest.mark.parametrize(
    "content", [None, b"", b"PK\3\4" + b"\0" * 30], ids=["none", "empty", "half"]
)
def test_what_is_no_dataset_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(neon.files.UserError, match="set.zip cannot be read"):
        neon.images.read_dataset(tmp_path / "set.zip")


def test_a_pipe_as_dataset_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "set.zip")
    with pytest.raises(neon.files.UserError, match="neither a file nor a folder"):
        neon.images.read_dataset(tmp_path / "set.zip")


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("nowhere")], ids=["pipe", "broken link"]
)
def test_a_folder_with_what_is_no_file_is_refused(tmp_path, make):
    in_folder(tmp_path, {"0.png": encoded(RGB)})
    make(tmp_path / "1.png")
    with pytest.raises(neon.files.UserError, match="1.png is no file"):
        neon.images.read_dataset(tmp_path)


# -------------------- labels


def labelled(folder, index, count=3):
    files = {f"{i}.png": encoded(RGB) for i in range(count)}
    raw = index if isinstance(index, bytes) else json.dumps(index).encode()
    return zipped(folder / "set.zip", files | {"dataset.json": raw})


def rows(*labels):
    return {"labels": [[f"{i}.png", label] for i, label in enumerate(labels)]}


@pytest.mark.parametrize(
    "index, labels",
    [
        (rows(2.0, 0.0, 99_999), [2, 0, 99_999]),
        ({"labels": [["2.png", 7], ["0.png", 5], ["1.png", 6]]}, [5, 6, 7]),
        ({"labels": None}, None),
    ],
    ids=["whole floats", "another order", "null"],
)
def test_labels_are_read(tmp_path, index, labels):
    _, found = neon.images.read_dataset(labelled(tmp_path, index))
    assert (
        found is None
        if labels is None
        else (found.dtype == torch.int64 and found.tolist() == labels)
    )


@pytest.mark.parametrize(
    "index, message",
    [
        (rows(0, True, 1), "label of 1.png is True"),
        (rows(0, -1, 1), "label of 1.png is -1"),
        (rows(0, 1.5, 1), "label of 1.png is 1.5"),
        (rows(0, float("nan"), 1), "label of 1.png is nan"),
        (rows(0, 10**6, 1), "label of 1.png is 1000000"),
        (rows(0, "c\x1bat", 1), "label of 1.png is 'c.*at', not an integer from 0 to 99999"),
        (rows(0, 1), "1 images have no label in dataset.json, the first is 2.png"),
        ({"labels": [["0.png", 1]] * 3}, "0.png has two labels"),
        ({"labels": {"0.png": 1}}, 'no list "labels"'),
        ([], 'no list "labels"'),
        ({"labels": [["0.png"]]}, r"not a list of \[image, label\]"),
        ({"labels": [[0, 1]]}, r"not a list of \[image, label\]"),
        (b"{", "JSON"),
    ],
    ids="bool negative fraction NaN large text missing repeated dictionary array short number "
    "half".split(),
)
def test_bad_labels_are_one_line(tmp_path, index, message):
    with pytest.raises(neon.files.UserError, match=f"cannot be read.*{message}") as error:
        neon.images.read_dataset(labelled(tmp_path, index))
    assert str(error.value).isprintable()


INDEX = json.dumps({"labels": [["a/1.png", 0], ["b/2.png", 1], ["é.png", 2]]})
FOREIGN = {
    "Windows": (["a\\1.png", "b\\2.png", "é.png"], INDEX),
    "Windows, labels": (["a\\1.png", "b\\2.png", "é.png"], INDEX.replace("/", "\\\\")),
    "dots": (["./a/1.png", "./b/2.png", "./é.png"], INDEX.replace('"a/', '"./a/')),
    "macOS": (["a/1.png", "b/2.png", unicodedata.normalize("NFD", "é.png")], INDEX),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_names_of_other_systems_keep_their_labels(tmp_path, name):
    names, index = FOREIGN[name]
    files = {each: encoded(PIL.Image.new("L", (2, 2), i)) for i, each in enumerate(names)}
    path = zipped(tmp_path / "set.zip", files | {"dataset.json": index.encode()})
    if name.startswith("Windows"):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("a\\", b"")  # a folder
    images, labels = neon.images.read_dataset(path)
    assert images[:, 0, 0, 0].tolist() == labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("names", [("a/1.png", "a\\1.png"), ("1.png", "./1.png")])
def test_one_name_in_two_spellings_is_refused(tmp_path, names):
    path = zipped(tmp_path / "set.zip", dict.fromkeys(names, encoded(RGB)))
    with pytest.raises(neon.files.UserError, match="1.png is in it twice"):
        neon.images.read_dataset(path)


@pytest.mark.parametrize(
    "labels, problem",
    [
        ([1, 2, 3], r"no image of 1 of 4 classes \(0\)"),
        ([0, 1, 3], r"no image of 1 of 4 classes \(2\)"),
        ([0, 40, 40], r"no image of 39 of 41 classes \(1, 2, 3, 4, 5, ...\)"),
        ([0, 1, 2, 3, 4], "the network has only 4 classes"),
    ],
    ids=["from 1", "gap", "large gap", "too large"],
)
def test_classes_without_images_are_refused(labels, problem):
    real = neon.images.RealImages(random_images(len(labels)), torch.tensor(labels), "x.zip")
    classes = 4 if "only" in problem else max(labels) + 1
    with pytest.raises(neon.files.UserError, match=f"x.zip: labels from .*{problem}: number the"):
        neon.images.refuse_empty_classes(real, classes)


def test_a_base_is_not_trained_without_a_class(tmp_path):
    images = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8)
    real = neon.images.split(images, torch.arange(400) % 4 + 1, "x.zip")
    c = neon.config.Config(train_base=1.0)
    setup = types.SimpleNamespace(c=c, real=real, model=edm.EdmModel(edm.PRESETS["glyphs"], c))
    with pytest.raises(neon.files.UserError, match=r"no image of 1 of 5 classes \(0\)"):
        neon.stages.first_network(setup)


def test_classes_with_images_are_accepted():
    real = neon.images.RealImages(random_images(5), torch.tensor([2, 0, 1, 1, 0]), "x.zip")
    neon.images.refuse_empty_classes(real, 3)
    bare = dataclasses.replace(real, labels=None)
    neon.images.refuse_empty_classes(bare, 0)
    with pytest.raises(neon.files.UserError, match="x.zip: no labels, the network takes 3 classes"):
        neon.images.refuse_empty_classes(bare, 3)


def test_labels_that_are_not_at_the_top_are_refused(tmp_path):
    path = zipped(
        tmp_path / "set.zip",
        {"a/0.png": encoded(RGB), "a/dataset.json": json.dumps(rows(1)).encode()},
    )
    with pytest.raises(
        neon.files.UserError, match="dataset.json must be at the top, not at a/dataset.json"
    ):
        neon.images.read_dataset(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_datasets_come_back_to_the_byte(tmp_path, channels):
    images = torch.randint(0, 256, (5, channels, 8, 8), dtype=torch.uint8)
    neon.images.write_dataset(tmp_path / "set.zip", images, torch.arange(5) * 3)
    found, labels = neon.images.read_dataset(tmp_path / "set.zip")
    assert torch.equal(found, images) and labels.tolist() == [0, 3, 6, 9, 12]


def test_datasets_are_the_same_bytes(tmp_path, monkeypatch):
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    for name, now in (("a.zip", 1e9), ("b.zip", 2e9)):
        monkeypatch.setattr(time, "localtime", lambda *_, now=now: time.gmtime(now))
        neon.images.write_dataset(tmp_path / name, images, torch.arange(5))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
