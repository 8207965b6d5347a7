"""Controls: twice the steps, the guided network, the base trained on."""

import dataclasses

import pytest
import torch
from edm_helpers import (
    ToyFeatures,
    ToyModel,
    config,
    edm_scorer,
    real_toys,
    toy_pair,
    toy_scorer,
    toy_setup,
)
from torch import nn

import adaptive_neon as neon
import neon_ext


def images_of(scorer, w):
    scorer.merger.set(w)
    return scorer.sampler.floats(range(5))[0]


# -------------------- the guided network
@pytest.mark.parametrize("w", [0.0, 0.7, -1.0])
def test_outputs_step_back_instead_of_weights(w):
    base, aux = toy_pair()
    net = neon.controls.Guided(base, aux)
    net.w.fill_(w)
    x, labels = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 4])
    want = (1 + w) * base(x, labels) - w * aux(x, labels)
    torch.testing.assert_close(net(x, labels), want)


@pytest.mark.parametrize("scorer", [toy_scorer, edm_scorer], ids=["toy", "edm"])
@pytest.mark.parametrize("w", [0, -1], ids=["base", "self-trained"])
def test_without_a_step_the_images_are_those_of_a_network(tmp_path, scorer, w):
    scorer = scorer(tmp_path)
    found = images_of(neon.controls.guided(scorer), {"guidance": w})
    torch.testing.assert_close(found, images_of(scorer, w), rtol=1e-4, atol=1e-5)


def test_a_step_gives_other_images_than_merged_weights(tmp_path):
    scorer = edm_scorer(tmp_path)
    found = images_of(neon.controls.guided(scorer), {"guidance": 1})
    assert not torch.allclose(found, images_of(scorer, 1), atol=1e-3)


def test_other_attributes_are_the_bases(tmp_path):
    scorer = edm_scorer(tmp_path)
    net = neon.controls.guided(scorer).sampler.net
    assert net.sigma_max == 0.7 and net.label_dim == 10
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        net.nothing_of_the_kind  # noqa: B018


PACKS = {
    tuple: lambda *parts: parts,
    list: lambda *parts: [*parts],
    dict: lambda a, b: dict(a=a, b=b),
}


@pytest.mark.parametrize("kind", PACKS)
def test_containers_of_outputs(kind):
    class Packed(nn.Linear):
        def forward(self, x):
            return PACKS[kind](super().forward(x), torch.tensor(7))

    base, aux, x = Packed(2, 3), Packed(2, 3), torch.randn(4, 2)
    net = neon.controls.Guided(base, aux)
    net.w.fill_(0.5)
    found = net(x)
    values = [*found.values()] if kind is dict else found
    want = 1.5 * nn.Linear.forward(base, x) - 0.5 * nn.Linear.forward(aux, x)
    torch.testing.assert_close(values[0], want)
    assert type(found) is kind and values[1] == 7


class Parts(ToyModel):
    """Its sampler never calls the network itself."""

    def sample(self, net, noise, labels, steps):
        return torch.tanh(net.dec(net.mid(net.enc(noise.flatten(1))))).view(-1, 1, 4, 4)


def test_a_sampler_that_calls_parts_of_the_network_has_no_guided_control(tmp_path):
    scorer = toy_scorer(tmp_path)
    scorer.sampler.model = Parts()
    assert neon.controls.guided(scorer) is None


def test_keys_of_guided_scores_are_their_own(tmp_path):
    scorer = toy_scorer(tmp_path)
    guide, seeds = neon.controls.guided(scorer), scorer.seeds.selection
    keys = {scorer.key(scorer.merger.weights(w), seeds) for w in (0.0, 1.0)}
    own = neon.controls.with_settings(scorer)  # of a model with a setting of this name
    keys |= {which.key({"guidance": w}, seeds) for which in (guide, own) for w in (0.0, 1.0)}
    assert len(keys) == 6


# -------------------- more steps, more training
class Steps(ToyModel):
    """Brighter with every step."""

    def sample(self, net, noise, labels, steps):
        return torch.tanh(net(noise, labels) + 0.1 * steps)


def test_twice_the_steps_is_another_sampler_of_the_same_networks(tmp_path):
    scorer = toy_scorer(tmp_path, steps=3)
    scorer.sampler.model = Steps()
    doubled = neon.controls.with_steps(scorer, 6)
    assert (doubled.sampler.steps, scorer.sampler.steps) == (6, 3)
    assert doubled.sampler.net is scorer.sampler.net
    shift = torch.atanh(images_of(doubled, 0)) - torch.atanh(images_of(scorer, 0))
    torch.testing.assert_close(shift, torch.full_like(shift, 0.3), rtol=1e-2, atol=1e-3)


def candidates(tmp_path, **options):
    setup = toy_setup(tmp_path, steps=2, **options)
    scorer = toy_scorer(tmp_path, steps=2, **options)
    return neon.study.controls_of(setup, scorer, {-1.0, 0.0, 1 / 3, 1.0}), scorer


def test_controls_of_a_study(tmp_path):
    found, _ = candidates(tmp_path, continue_on_data=0.2)
    assert [*found] == ["base, twice the steps", "guided", "base, trained on"]
    assert found["base, twice the steps"].scorer.sampler.steps == 4


def test_guided_weight_is_chosen_on_the_selection_seeds(tmp_path):
    found, scorer = candidates(tmp_path)
    guide = neon.controls.guided(scorer)
    logged = scorer.log.scores.values()
    tried = [score.w["guidance"] for score in logged if "guidance" in score.w]
    assert tried == [0.333333, 1.0]  # as a line of the log holds them
    distances = {w: guide.score({"guidance": w}).fd for w in (0.333333, 1.0)}
    best = min(distances, key=distances.get)
    assert found["guided"].w == {"guidance": best} and found["guided"].fd == distances[best]


@pytest.mark.parametrize("controls, names", [((), []), (("guided",), ["guided"])])
def test_controls_that_were_asked_for(tmp_path, controls, names):
    found, _ = candidates(tmp_path, controls=controls)
    assert [*found] == names


# -------------------- settings of the sampler
class Tuned(ToyModel):
    """A sampler with a gain; two controls, each with several settings, the best in the middle."""

    controls = {
        "best gain": [{"gain": 0.4}, {"gain": 0.1}, {"gain": -0.3}],
        "best of two": [{"gain": 0.5, "more": 2}, {"gain": 0.05, "more": 1}],
    }

    def sample(self, net, noise, labels, steps):
        settings = {"gain": 0.0, "more": 1} | self.settings
        return torch.tanh(net(noise, labels) + settings["gain"] * settings["more"])


def tuned(tmp_path, **options):
    setup, scorer = toy_setup(tmp_path, **options), toy_scorer(tmp_path, **options)
    setup = dataclasses.replace(setup, model=Tuned())
    scorer.sampler.model = setup.model
    scorer.merger.set(1.0)  # what was scored before must not matter
    return neon.study.controls_of(setup, scorer, {0.0, 0.5}), scorer


def base_with_gain(scorer, gain):
    """Distance of the base's images with a gain, from the sampler's seeds."""
    base, seeds = scorer.merger.base, scorer.seeds.selection.seeds
    noise, _ = neon.sampling.draw_noise((1, 4, 4), 5, seeds, "cpu")
    images = torch.tanh(base(noise, neon.sampling.balanced_labels(5, seeds, "cpu")) + gain)
    features = ToyFeatures()(neon.sampling.to_pixels(images).to(torch.uint8))
    return scorer.judge.selection.prepared.distance(*neon_ext.feature_moments(features))


def test_models_own_controls_are_the_base_at_the_best_settings(tmp_path):
    found, scorer = tuned(tmp_path, controls=("own",))
    assert [*found] == ["base, best gain", "base, best of two"]
    with torch.no_grad():
        distances = {gain: float(base_with_gain(scorer, gain)) for gain in (0.4, 0.1, -0.3)}
    best = min(distances, key=distances.get)
    assert found["base, best gain"].w == {"gain": best}
    assert found["base, best gain"].fd == pytest.approx(distances[best], rel=1e-5)


def test_models_own_controls_leave_the_sampler_as_it_is(tmp_path):
    found, scorer = tuned(tmp_path, controls=("own",))
    assert scorer.sampler.model.settings == {}
    assert scorer.score(0.0).fd not in {candidate.fd for candidate in found.values()}


def test_models_own_controls_have_keys_of_their_own(tmp_path):
    found, scorer = tuned(tmp_path, controls=("own",))
    seeds = scorer.seeds.selection
    keys = {scorer.key(scorer.merger.weights(0.0), seeds)}
    other = found["base, best gain"].scorer
    keys |= {other.key({"gain": gain}, seeds) for gain in (0.1, 0.4)}
    keys.add(other.key({"more": 0.1}, seeds))
    assert len(keys) == 4


FILE = """
import torch
SHAPE, CLASSES = (1, 8, 8), 0
def load(path):
    return torch.nn.Conv2d(1, 1, 3, padding=1)
def sample(net, noise, labels, steps, gain=1.0):
    return torch.tanh(gain * net(noise))
"""


@pytest.mark.parametrize(
    "controls", ["[]", "{'a': {}}", "{'a': []}", "{'a': [{'gain': '2'}]}", "{'a': [{}]}"]
)
def test_controls_of_a_model_file_that_are_none(tmp_path, controls):
    (tmp_path / "model.py").write_text(f"{FILE}\nCONTROLS = {controls}")
    with pytest.raises(neon.files.UserError, match="CONTROLS must be {name: .*, got "):
        neon.modelfile.FileModel(tmp_path / "model.py")


@pytest.mark.parametrize("name, message", [("gain", ""), ("warmth", r"sample\(\) failed.*warmth")])
def test_controls_of_a_model_file_are_tried_at_the_start(tmp_path, name, message):
    (tmp_path / "model.py").write_text(f"{FILE}\nCONTROLS = {{'best': [{{{name!r}: 2.0}}]}}")
    model = neon.modelfile.FileModel(tmp_path / "model.py")
    torch.manual_seed(0)
    net, c = torch.nn.Conv2d(1, 1, 3, padding=1).eval(), config(tmp_path, aux="other.pt")
    if message:
        with pytest.raises(neon.files.UserError, match=message):
            model.start_check(net, c, trained=True)
    else:
        model.start_check(net, c, trained=True)
        noise = torch.randn(2, 1, 8, 8)
        plain = model.sample(net, noise, None, 1)
        model.settings = {"gain": 3.0}
        assert (model.sample(net, noise, None, 1) - plain).abs().max() > 0.1


class Counting(ToyModel):
    """Counts the images that it is trained on, and keeps their mean."""

    def __init__(self):
        self.seen, self.means = 0, []

    def loss(self, net, x, labels):
        self.seen += len(x)
        self.means.append(float(x.mean()))
        return super().loss(net, x, labels)


@pytest.mark.parametrize("kimg, images", [(-1.0, 1000), (0.4, 400)], ids=["as long", "given"])
def test_the_base_is_trained_on_real_images_for_the_repairs_budget(tmp_path, kimg, images):
    fast = {"lr": 0.01, "ramp_kimg": 0.0, "ema_kimg": 0.0}
    setup = toy_setup(tmp_path, controls=(), continue_on_data=kimg, **fast)
    setup = dataclasses.replace(setup, model=Counting())
    found = neon.study.controls_of(setup, toy_scorer(tmp_path), {0.0})
    assert setup.model.seen == images
    scorer = found["base, trained on"].scorer
    base, _ = toy_pair()
    trained = dict(scorer.merger.aux.named_parameters())
    assert not all(torch.equal(p, trained[name]) for name, p in base.named_parameters())

    # At its weight, -1, the network that samples is the trained one.
    net = scorer.merger.set(found["base, trained on"].w)
    assert net is scorer.sampler.net
    assert all(torch.equal(p, trained[name]) for name, p in net.named_parameters())


def test_training_on_uses_the_training_part(tmp_path):
    setup = toy_setup(tmp_path, controls=(), continue_on_data=0.4)
    dark = torch.zeros_like(setup.real.training.images)
    real = dataclasses.replace(
        real_toys(), training=neon.images.RealImages(dark, setup.real.training.labels, "dark")
    )
    setup = dataclasses.replace(setup, model=Counting(), real=real)
    neon.study.controls_of(setup, toy_scorer(tmp_path), {0.0})
    assert set(setup.model.means) == {-1.0}


def test_a_network_with_parts_of_its_own_name_is_guided():
    """A network that has a `base` itself, and one that keeps what it computed."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.utils.spectral_norm(nn.Linear(2, 2))

        def forward(self, x):
            return self.base(x)

    one, other = Named(), Named()
    one(torch.randn(4, 2)).sum().backward()
    net = neon.controls.Guided(one.eval(), other.eval())
    net.w.fill_(1.0)
    x = torch.randn(3, 2)
    torch.testing.assert_close(net(x), 2 * one(x) - other(x))


# -------------------- like with like
@pytest.mark.parametrize(
    "options, blocks, count",
    [
        ({"grid": (0.5, 1.0, 1.5)}, 3, 27),
        ({"grid": (0.5, 1.0)}, 3, 8),
        ({"grid": (0.5, 1.0), "block_grid": {"enc": (0.0, 1.0, 2.0)}}, 3, 12),
        ({"grid": (0.5, 1.0), "search": "cobyqa", "evaluations": 30}, 3, 30),
        ({"grid": (0.5, 1.0, 1.5), "search": "gradient", "evaluations": 9}, 14, 9),
    ],
    ids=["grid", "two", "own", "search", "search alone"],
)
def test_as_many_global_weights_as_anything_else_tries(tmp_path, options, blocks, count):
    c = dataclasses.replace(toy_setup(tmp_path).c, **options)
    names = ["enc", "mid", "dec"] if blocks == 3 else [str(k) for k in range(blocks)]
    values = neon.study.global_weights(c, names)
    inside = sorted(value for value in values if min(c.grid) <= value <= max(c.grid))
    assert {-1.0, 0.0} <= values and len(inside) >= count
    assert inside[0] == min(c.grid) and inside[-1] == max(c.grid)
