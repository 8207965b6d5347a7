"""What adaptive_neon/memorisation.py promises."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edm_helpers import ToyFeatures, toy_setup

import adaptive_neon as neon
from adaptive_neon.memorisation import Memory, memory_of


def test_share_is_that_of_points_nearest_to_a_trained_image():
    """By Euclidean distance, over all points: the first thousand lie elsewhere than the last."""
    rng = np.random.default_rng(1)
    trained, unseen = rng.normal(size=(40, 3)), rng.normal(0.2, 1, (40, 3))
    points = rng.normal(np.linspace(-1, 1, 2500)[:, None], 1, (2500, 3))
    apart = []
    for others in (trained, unseen):
        apart.append(((points[:, None] - others) ** 2).sum(-1).min(1))
    memory = Memory(torch.tensor(trained), torch.tensor(unseen))
    assert memory.share(torch.tensor(points)) == pytest.approx(np.mean(apart[0] < apart[1]))


def test_a_tie_counts_half():
    memory = Memory(torch.tensor([[0.0]]), torch.tensor([[4.0]]))
    assert memory.share(torch.tensor([[2.0], [2.0], [3.0]])) == pytest.approx(1 / 3)


def test_copies_of_training_images_are_found_and_fresh_ones_are_not():
    generator = torch.Generator().manual_seed(5)
    real = torch.randn(900, 6, generator=generator)
    memory = memory_of(real[:300], real[300:600])
    assert memory.share(real[:300]) == 1
    assert memory.share(real[300:600]) == 0
    assert memory.share(real[600:]) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    "trained, unseen, count", [(7, 12, 7), (12, 7, 7), (10_001, 10_002, 10_000)]
)
def test_as_many_of_either_kind(trained, unseen, count):
    memory = memory_of(torch.rand(trained, 2), torch.rand(unseen, 2))
    assert len(memory.trained) == len(memory.unseen) == count


@pytest.mark.parametrize("changed", ["trained", "unseen"])
def test_identity_is_of_both_sides(changed):
    memory = Memory(torch.rand(5, 2), torch.rand(5, 2))
    other = dataclasses.replace(memory, **{changed: torch.rand(5, 2)})
    assert memory.identity != other.identity


# -------------------- in a study
def judges_of(tmp_path, **options):
    setup = toy_setup(tmp_path, **options)
    preset = SimpleNamespace(features=lambda c: ToyFeatures(), judges=lambda c: {})
    return setup, neon.judges.build_judges(
        setup.c, preset, setup.model, setup.real, setup.processes
    )


def test_every_judge_measures_it_where_the_base_is_trained_here(tmp_path):
    setup, judges = judges_of(tmp_path, judge=("pixels",), train_base=1.0)
    assert len(judges) == 2
    for judge in judges:
        count = min(len(setup.real.training.images), len(setup.real.final.images))
        want = judge.features(setup.real.training.images[:count])
        assert torch.equal(judge.memory.trained, want)
        assert torch.equal(judge.memory.unseen, judge.final.real[:count])
        fresh = judge.memory.share(judge.selection.real)
        assert judge.facts["memorisation_fresh"] == fresh


def test_nobody_knows_what_a_given_base_was_trained_on(tmp_path):
    _, judges = judges_of(tmp_path, train_base=0.0)
    assert judges[0].memory is None and "memorisation_fresh" not in judges[0].facts


def test_it_is_in_the_key_of_final_scores_alone(tmp_path):
    setup, (judge, *_) = judges_of(tmp_path, train_base=1.0)
    final, selection = setup.seeds.finals[0], setup.seeds.selection
    with_memory = judge.identity(final), judge.identity(selection)
    judge.memory = dataclasses.replace(judge.memory, trained=judge.memory.trained + 1)
    assert judge.identity(final) != with_memory[0]
    assert judge.identity(selection) == with_memory[1]
