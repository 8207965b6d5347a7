"""edm_neon.py: glyphs, real images in three parts, judges that no selection saw, training seeds."""

import hashlib

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


def test_classifier_reads_fresh_glyphs_and_is_the_same_every_time(tmp_path):
    state = torch.random.get_rng_state()
    first, again = (classifier(tmp_path / name, images=2000, epochs=4) for name in ("a", "b"))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.identity == again.identity
    assert first.facts["accuracy"] > 0.8 and first.facts["accuracy_images"] == 2000


@pytest.mark.parametrize("body", [neon.glyphs.glyphs_cnn, neon.glyphs.glyphs_mlp])
def test_features_of_classifiers_are_in_front_of_the_last_layer(tmp_path, body):
    network, images = classifier(tmp_path, body), neon.glyphs.draw_glyphs(5, 0)[0]
    assert network(images).shape == (5, 64) and network.head.in_features == 64
    assert torch.equal(network(images), network.body(images.float() / 127.5 - 1))


def test_finished_classifier_is_read_back(tmp_path, monkeypatch):
    first = classifier(tmp_path)
    monkeypatch.setattr(neon.glyphs.GlyphsClassifier, "fit", pytest.fail)
    assert classifier(tmp_path).identity == first.identity


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


def test_identity_of_random_convolutions_holds_their_design(monkeypatch):
    before = neon.features.RandomConvFeatures(3).identity
    assert (
        neon.features.RandomConvFeatures(3).identity
        == before
        != neon.features.RandomConvFeatures(1).identity
    )
    monkeypatch.setattr(torch.nn, "ReLU", torch.nn.Tanh)
    assert neon.features.RandomConvFeatures(3).identity != before


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


# -------------------- real images in three parts


def random_images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 1, 4, 4), generator=generator).to(torch.uint8)


# -------------------- references


@pytest.fixture
def real():
    return neon.images.split_by_content(random_images(800), None, "x.zip")
