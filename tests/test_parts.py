"""adaptive_neon.parts: never a stale number."""

import dataclasses

import pytest
import torch

from adaptive_neon.files import UserError
from adaptive_neon.parts import finished


@dataclasses.dataclass
class Curve:
    points: torch.Tensor
    values: list
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Training:
    seed: int = 42
    rate: float = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    theta: torch.Tensor
    training: Training


@pytest.fixture
def part(tmp_path):
    """finished() with a part that says how often it was made."""
    made = []

    def make(*inputs):
        made.append(inputs)
        return Curve(torch.zeros(2), [len(made)])

    def call(*inputs, name="a part", **constants):
        return finished(tmp_path, constants, name, Curve, make, *inputs).values[0]

    return call


def test_equal_inputs_are_not_computed_again(part):
    theta = torch.arange(3.0)
    assert part(Training(), theta, 0.5) == part(Training(), theta.clone(), 0.5) == 1
    assert part(Scorer(theta, Training())) == part(Scorer(theta.clone(), Training())) == 2


@pytest.mark.parametrize(
    "changed",
    [
        (Training(seed=43), torch.arange(3.0), 0.5),
        (Training(rate=2e-4), torch.arange(3.0), 0.5),
        (Scorer(torch.arange(3.0), Training()), torch.arange(3.0), 0.5),
        (Training(), torch.tensor([0.0, 1.0, 2.0000002]), 0.5),
        (Training(), torch.arange(3.0).double(), 0.5),
        (Training(), torch.arange(3.0)[None], 0.5),
        (Training(), torch.arange(3.0), 0.5000000001),
        (Training(), torch.arange(3.0), None),
    ],
    ids=["seed", "rate", "kind", "upstream part", "type", "shape", "number", "none"],
)
def test_a_changed_input_is_computed_again(part, changed):
    part(Training(), torch.arange(3.0), 0.5)
    assert part(*changed) == 2


def test_a_dataclass_is_known_by_what_it_holds(part):
    part(Scorer(torch.arange(3.0), Training()))
    assert part(Scorer(torch.arange(3.0) + 1, Training())) == 2
    assert part(Scorer(torch.arange(3.0), Training(seed=1))) == 3


def test_name_and_constants_are_part_of_the_key(part):
    assert part(0, code=1) == part(0, code=1) == 1
    assert part(0, code=2) == 2
    assert part(0, code=1, name="another") == 3


def test_what_has_no_content_is_refused(part):
    with pytest.raises(TypeError):
        part([object()])


@pytest.mark.parametrize("note", [None, "ü"])
def test_a_part_comes_back_as_it_was(tmp_path, note):
    """Every number to the last bit, of the same type: also those that JSON holds."""
    points = torch.rand(3, 6, dtype=torch.float64)
    made = Curve(points, [1 / 3, float("inf"), 2e-300, 0.1 + 0.2, 8], note)
    for make in (lambda: made, None):  # the second comes from the file
        got = finished(tmp_path / "new", {}, "a part", Curve, make)
        assert torch.equal(got.points, points) and got.points.dtype == points.dtype
        assert (got.values, got.note) == (made.values, made.note)


def test_a_file_of_another_part_is_refused(tmp_path, part):
    part(1)
    part(2)
    one, other = sorted(tmp_path.iterdir())
    one.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="delete it and run again.*not what its name says"):
        part(1), part(2)
