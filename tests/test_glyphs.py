"""What adaptive_neon/glyphs.py promises, and the preset that draws them."""

import hashlib
import math

import numpy as np
import pytest
import torch
from edm_helpers import replace

import adaptive_neon as neon
import edm_neon as edm


def hashes(images):
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images.numpy()]


# -------------------- glyphs


def test_glyph_of_an_index_does_not_depend_on_how_many_are_drawn():
    many, labels = neon.glyphs.draw_glyphs(2100, 1)  # more than one part of the rendering
    few, few_labels = neon.glyphs.draw_glyphs(9, 1)
    assert torch.equal(few, many[:9]) and torch.equal(few_labels, labels[:9])


def bilinear(picture, x, y):
    """The value at a place in pixels; zero outside."""
    value = 0.0
    left, top = math.floor(x), math.floor(y)
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < picture.shape[0] and 0 <= column < picture.shape[1]:
                share = (1 - abs(x - column)) * (1 - abs(y - row))
                value += share * float(picture[row, column])
    return value


@pytest.mark.parametrize("stream, index", [(0, 0), (5, 7), (2, 2001)])
def test_glyph_is_a_turned_sheared_stretched_digit(stream, index):
    """Drawn again, point by point."""
    draws = np.random.default_rng([*b"glyphs", stream]).random((index + 1, 9))[index]
    ranges = [(-0.2, 0.2), (0.6, 0.85), (-0.25, 0.25), (0.85, 1.15), (-0.08, 0.08), (-0.08, 0.08)]
    ranges.append((0.7, 1.0))
    drawn = [
        low + (high - low) * float(u) for (low, high), u in zip(ranges, draws[2:], strict=True)
    ]
    turn, zoom, shear, stretch, shift_x, shift_y, brightness = drawn
    font, label = int(draws[0] * 14), int(draws[1] * 10)
    picture = neon.glyphs.glyph_atlas()[font, label].numpy()

    want = np.zeros((12, 12))
    for row in range(36):
        for column in range(36):
            u, v = (2 * column + 1) / 36 - 1, (2 * row + 1) / 36 - 1
            x = math.cos(turn) * zoom * stretch * u + (shear - math.sin(turn)) * zoom * v + shift_x
            y = math.sin(turn) * zoom * stretch * u + math.cos(turn) * zoom / stretch * v + shift_y
            ink = bilinear(picture, (x + 1) * 32 - 0.5, (y + 1) * 32 - 0.5)
            want[row // 3, column // 3] += ink / 9 * brightness * 255

    images, labels = neon.glyphs.draw_glyphs(index + 1, stream)
    assert int(labels[index]) == label
    np.testing.assert_allclose(images[index, 0], want, atol=0.6)


def test_glyph_streams_share_no_image():
    streams = edm.Glyphs.streams
    assert len(set(streams.values())) == len(streams)
    drawn = [hashes(neon.glyphs.draw_glyphs(500, stream)[0]) for stream in streams.values()]
    together = sum(drawn, [])
    assert len(set(together)) == len(together)


def test_glyphs_are_bright_strokes_on_black_and_every_digit_occurs():
    images, labels = neon.glyphs.draw_glyphs(1000, 0)
    assert images.shape == (1000, 1, 12, 12) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(10))
    assert (images.amax((1, 2, 3)) > 80).all()
    assert images[:, :, 0, 0].float().mean() < 5


def test_every_font_is_used():
    atlas = neon.glyphs.glyph_atlas()
    assert atlas.shape[:2] == (len(neon.glyphs.GLYPH_FONTS), 10)
    assert (atlas.amax((2, 3)) > 0.99).all()
    assert len({row.numpy().tobytes() for row in atlas}) == len(neon.glyphs.GLYPH_FONTS)


def test_missing_font_is_one_line(monkeypatch):
    replace(monkeypatch, "GLYPH_FONTS", ("NoSuchFont.ttf",))
    with pytest.raises(neon.files.UserError, match="NoSuchFont.ttf is missing or damaged"):
        neon.glyphs.glyph_atlas.__wrapped__()


def classifier(folder, body=neon.glyphs.glyphs_cnn, **changes):
    options = {"seed": 0, "stream": 3, "test_stream": 4, "images": 300, "epochs": 1}
    folder.mkdir(exist_ok=True)
    return neon.glyphs.GlyphsClassifier(folder, "x", body, **options | changes)


def test_classifier_reads_fresh_glyphs(tmp_path):
    network = classifier(tmp_path, images=2000)
    images, labels = neon.glyphs.draw_glyphs(2000, 4)
    right = int((network.head(network(images)).argmax(1) == labels).sum())
    assert network.facts == {"accuracy": right / 2000, "accuracy_images": 2000}
    assert right > 2000 * 0.5  # of ten digits, after one epoch


def test_classifier_is_the_same_every_time(tmp_path):
    state = torch.random.get_rng_state()
    first, again = (classifier(tmp_path / name) for name in ("a", "b"))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.identity == again.identity


@pytest.mark.parametrize("body", [neon.glyphs.glyphs_cnn, neon.glyphs.glyphs_mlp])
def test_features_of_classifiers_are_in_front_of_the_last_layer(tmp_path, body):
    network, images = classifier(tmp_path, body), neon.glyphs.draw_glyphs(5, 0)[0]
    assert network(images).shape == (5, 64) and network.head.in_features == 64
    assert torch.equal(network(images), network.body(images.float() / 127.5 - 1))


def test_finished_classifier_is_read_back(tmp_path, monkeypatch):
    first = classifier(tmp_path)
    monkeypatch.setattr(neon.glyphs.GlyphsClassifier, "fit", pytest.fail)
    assert classifier(tmp_path).identity == first.identity


def test_damaged_classifier_is_refused(tmp_path):
    classifier(tmp_path)
    (path,) = tmp_path.glob("x-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(neon.UserError, match="is damaged, delete it"):
        classifier(tmp_path)


def test_another_version_of_training_trains_again(tmp_path, monkeypatch):
    classifier(tmp_path)
    replace(monkeypatch, "TRAINING_VERSION", "train of later")
    classifier(tmp_path)
    assert len([*tmp_path.glob("x-*.safetensors")]) == 2


@pytest.mark.parametrize(
    "change",
    [{"body": neon.glyphs.glyphs_mlp}, {"seed": 1}, {"stream": 5}, {"images": 200}, {"epochs": 2}],
    ids=lambda change: next(iter(change)),
)
def test_another_classifier_has_another_file(tmp_path, change):
    first = classifier(tmp_path)
    other = classifier(tmp_path, **change)
    assert other.identity != first.identity and len([*tmp_path.glob("x-*.safetensors")]) == 2


def test_identity_of_a_classifier_holds_its_design(tmp_path, monkeypatch):
    """The same weights with another activation are other features."""

    def bounded():
        return neon.glyphs.glyphs_cnn()[:-1].append(torch.nn.Tanh())

    monkeypatch.setattr(neon.glyphs.GlyphsClassifier, "fit", lambda *args: None)
    assert classifier(tmp_path, bounded).identity != classifier(tmp_path).identity


def test_glyphs_preset_parts_come_from_their_streams():
    real = edm.Glyphs().real_images(neon.config.Config(preset="glyphs"))
    for purpose, count in edm.Glyphs.images.items():
        part = getattr(real, purpose)
        assert len(part.images) == count
        expected, labels = neon.glyphs.draw_glyphs(3, edm.Glyphs.streams[purpose])
        assert torch.equal(part.images[:3], expected) and torch.equal(part.labels[:3], labels)


@pytest.mark.parametrize("option", ["data", "ref"])
def test_glyphs_preset_refuses_other_real_images(option):
    with pytest.raises(neon.files.UserError, match="draws its own"):
        edm.Glyphs().real_images(neon.config.Config(preset="glyphs", **{option: "x"}))


# -------------------- the preset's classifiers


@pytest.fixture
def made(monkeypatch):
    """{name: (body, seed, stream, test stream)} of all classifiers of the preset."""
    found = {}

    def record(folder, name, body, seed, stream, test_stream, size):
        found[name] = (body, seed, stream, test_stream)

    replace(monkeypatch, "GlyphsClassifier", record)
    preset, c = edm.Glyphs(), neon.config.Config(preset="glyphs")
    preset.features(c)
    for make in preset.judges(c).values():
        make()
    return found


def test_unseen_classifiers_share_no_seed_and_no_stream_with_the_selecting_one(made):
    assert set(made) == {"glyphs-cnn-64", "classifier-2", "mlp"}
    assert len({seed for _, seed, _, _ in made.values()}) == 3
    assert len({stream for _, _, stream, _ in made.values()}) == 3


def test_classifiers_train_on_streams_of_their_own(made):
    streams = edm.Glyphs.streams
    others = {streams[purpose] for purpose in edm.Glyphs.images}
    for _, _, stream, test_stream in made.values():
        assert test_stream == streams["classifier test"] != stream
        assert not {stream, test_stream} & others


def test_one_unseen_classifier_is_another_training_and_one_another_design(made):
    assert made["classifier-2"][0] is made["glyphs-cnn-64"][0] is neon.glyphs.glyphs_cnn
    assert made["mlp"][0] is neon.glyphs.glyphs_mlp
