"""Every key: what decides a result is in it, by content, and nothing else is."""

import dataclasses
import hashlib
import inspect

import pytest
import torch
from torch import nn

from adaptive_neon import keys


@dataclasses.dataclass
class Plan:
    number: int


@dataclasses.dataclass
class Scheme:
    number: int


# {function: its inputs, and others of the same kind}
INPUTS: dict[str, dict[str, tuple]] = {
    "base_key": {
        "initial": ("a", "b"),
        "kimg": (60.0, 61.0),
        "images": ("a", "b"),
        "model": ("edm", "edm 2"),
        "recipe": ({"lr": 1e-3, "seed": 1}, {"lr": 1e-3, "seed": 2}),
    },
    "synthetic_key": {
        "base": ("a", "b"),
        "model": ("edm", "edm 2"),
        "count": (100, 101),
        "labels": ("balanced", "random"),
        "steps": (18, 19),
        "device": ("cpu", "cuda"),
        "precision": ("fp32", "tf32"),
    },
    "self_training_key": {
        "synthetic": ("a", "b"),
        "model": ("edm", "edm 2"),
        "recipe": ({"lr": 1e-3, "seed": 1}, {"lr": 2e-3, "seed": 1}),
    },
    "score_key": {
        "networks": (("a", "b"), ("b", "a")),
        "weights": ({"p": 1.0, "q": 0.5}, {"p": 0.5, "q": 1.0}),
        "model": ("edm", "edm 2"),
        "judge": ("a", "b"),
        "seeds": ((10_000, 100), (10_000, 101)),
        "steps": (18, 19),
        "labels": ("balanced", "random"),
        "precision": ("fp32", "tf32"),
        "device": ("cpu", "cuda"),
        "folds": (20, 10),
    },
    "search_key": {
        "start": ("a", "b"),
        "blocks": ({"p": "enc", "q": "dec"}, {"p": "dec", "q": "enc"}),
        "fresh": ((10_000_000, 100), (10_000_001, 100)),
        "bounds": ((-1.0, 2.0), (-1.0, 3.0)),
        "precision": ("fp32", "tf32"),
    },
    "design_key": {"design": ("Linear(2, 3)", "Linear(3, 2)"), "weights": ("a", "b")},
    "joint_key": {"parts": (["a", "b"], ["b", "a"]), "images": (torch.zeros(2), torch.ones(2))},
    "classifier_key": {
        "design": ("Linear(2, 3)", "Linear(3, 2)"),
        "seed": (0, 1),
        "stream": (3, 4),
        "images": (100, 200),
        "epochs": (4, 5),
    },
    "reference_key": {
        "mean": (torch.zeros(2), torch.ones(2)),
        "cov": (torch.eye(2), 2 * torch.eye(2)),
        "count": (50, 60),
        "real": (None, torch.zeros(50, 2)),
    },
    "pipeline_key": {
        "version": (1, 2),
        "network": (["A", {}], ["B", {}]),
        "scheduler": ({"beta": 1}, {"beta": 2}),
        "guidance": (1.0, 2.0),
        "autoencoder": (None, ["A"]),
    },
    "text_key": {
        "pipeline": ("a", "b"),
        "prompts": (["a", "b"], ["b", "a"]),
        "settings": ([1.0], [2.0]),
    },
    "judge_key": {"features": ("a", "b"), "reference": ("a", "b"), "memory": ("a", "b")},
    "memory_key": {
        "trained": (torch.ones(2, 1), torch.zeros(2, 1)),
        "unseen": (torch.ones(2, 1), torch.zeros(2, 1)),
    },
    "part_key": {
        "name": ("run", "score"),
        "constants": ({"dim": 2}, {"dim": 3}),
        "inputs": ((1, torch.ones(2), Plan(1)), (1, torch.zeros(2), Plan(1))),
    },
}

VERSIONS = {
    "base_key": {"TRAINING_VERSION"},
    "synthetic_key": {"SAMPLING_VERSION"},
    "self_training_key": {"TRAINING_VERSION"},
    "score_key": {"SAMPLING_VERSION", "SCORING_VERSION"},
    "search_key": {"SEARCH_VERSION"},
    "design_key": set(),
    "joint_key": set(),
    "classifier_key": {"TRAINING_VERSION"},
    "reference_key": set(),
    "pipeline_key": set(),
    "text_key": set(),
    "judge_key": set(),
    "memory_key": set(),
    "part_key": set(),
}


def key(function, /, **changes):
    inputs = {argument: value for argument, (value, _) in INPUTS[function].items()}
    return getattr(keys, function)(**inputs | changes)


@pytest.mark.parametrize("name", INPUTS)
def test_key_is_sixteen_digits_and_the_same_again(name):
    assert key(name) == key(name) and len(key(name)) == 16
    assert int(key(name), 16) >= 0


def test_every_key_is_tried_here():
    found = {name for name in vars(keys) if name.endswith("_key")}
    assert found == set(INPUTS) == set(VERSIONS)


@pytest.mark.parametrize("name", INPUTS)
def test_every_input_of_a_key_is_tried_here(name):
    assert set(inspect.signature(getattr(keys, name)).parameters) == set(INPUTS[name])


@pytest.mark.parametrize(
    "name, argument", [(name, argument) for name, inputs in INPUTS.items() for argument in inputs]
)
def test_every_input_changes_the_key(name, argument):
    assert key(name, **{argument: INPUTS[name][argument][1]}) != key(name)


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize(
    "version", ["TRAINING_VERSION", "SAMPLING_VERSION", "SCORING_VERSION", "SEARCH_VERSION"]
)
def test_versions_of_the_code_are_in_the_keys_of_what_it_makes(monkeypatch, name, version):
    before = key(name)
    monkeypatch.setattr(keys, version, "other")
    assert (key(name) != before) == (version in VERSIONS[name])


def test_score_is_of_one_torch(monkeypatch):
    before = key("score_key")
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert key("score_key") != before


def test_order_of_a_table_is_no_input():
    assert key("score_key", weights={"q": 0.5, "p": 1.0}) == key("score_key")


def test_key_is_of_plain_data_as_json():
    text = b'["a", {"b": 2.5, "c": 1}, null]'
    want = hashlib.sha256(text).hexdigest()[:16]
    assert keys.key_of("a", {"c": 1, "b": 2.5}, None) == want


# -------------------- what is hashed


def test_hash_of_weights_is_of_their_content():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert keys.weights_hash(one) == keys.weights_hash(other)
    other.bias.data[1] += 1e-6
    assert keys.weights_hash(one) != keys.weights_hash(other)


def with_buffer(name, value):
    net = nn.Module()
    net.register_buffer(name, torch.full((2,), value))
    return net


@pytest.mark.parametrize("name, value", [("b", 1.0), ("a", 0.0)], ids=["name", "content"])
def test_hash_of_weights_includes_buffers(name, value):
    ours, theirs = with_buffer("a", 1.0), with_buffer(name, value)
    assert keys.weights_hash(ours) != keys.weights_hash(theirs)


def test_hash_of_weights_is_of_tensors_alone():
    class Noting(nn.Linear):
        def get_extra_state(self):
            return {"note": id(self)}

    one, other = Noting(2, 2), Noting(2, 2)
    other.load_state_dict(one.state_dict(), strict=False)
    assert keys.weights_hash(one) == keys.weights_hash(other)


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(3, 2),
        torch.ones(2, 3).int(),
        torch.ones(6),
        torch.tensor([[1.0, 1, 1], [1, 1, 0]]),
    ],
    ids=["shape", "dtype", "flat", "content"],
)
def test_hash_of_a_tensor(other):
    assert keys.tensor_hash(torch.ones(2, 3)) != keys.tensor_hash(other)


def test_hash_of_a_tensor_is_not_of_its_strides():
    x = torch.arange(6.0).view(2, 3)
    assert keys.tensor_hash(x) == keys.tensor_hash(x.T.contiguous().T)


def test_hash_of_type_is_of_more_than_its_bits():
    bits = torch.ones(3).view(torch.int32)
    assert keys.tensor_hash(bits) != keys.tensor_hash(torch.ones(3))


@pytest.mark.parametrize("tensor", [torch.empty(0), torch.tensor(1.0)], ids=["empty", "number"])
def test_every_tensor_has_a_hash(tensor):
    assert len(keys.tensor_hash(tensor)) == 64


# -------------------- files and folders


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    return tmp_path


def test_hash_of_a_file_is_of_its_content(folder):
    (folder / "c.txt").write_text("a")
    same = keys.content_hash(folder / "c.txt")
    assert same == keys.content_hash(folder / "a.txt") != keys.content_hash(folder / "in/b.txt")


def test_hash_of_a_folder_is_the_same_elsewhere(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    before = keys.content_hash(folder)
    folder.rename(elsewhere)
    assert keys.content_hash(elsewhere) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "in" / "b.txt").write_text("c"),
        lambda folder: (folder / "a.txt").rename(folder / "c.txt"),
        lambda folder: (folder / "a.txt").rename(folder / "in" / "a.txt"),
        lambda folder: (folder / "in" / "new").touch(),
    ],
    ids=["content", "name", "place", "new"],
)
def test_hash_of_a_folder_is_of_names_and_content(folder, change):
    before = keys.content_hash(folder)
    change(folder)
    assert keys.content_hash(folder) != before


def test_an_object_that_json_does_not_know_has_no_key(tmp_path):
    """Its text may hold a place in memory, or leave out what tells it apart."""
    with pytest.raises(TypeError, match="PosixPath"):
        keys.key_of({"path": tmp_path})


def test_options_of_a_users_network_may_be_anything():
    one, other = with_buffer("a", 1.0), with_buffer("a", 1.0)
    one.config, other.config = {"dtype": torch.float32}, {"dtype": torch.float64}
    assert keys.weights_hash(one) == keys.weights_hash(one) != keys.weights_hash(other)


@pytest.mark.parametrize("other", [Plan(2), Scheme(1), 1], ids=["field", "class", "no dataclass"])
def test_dataclasses_of_a_part_are_hashed_by_class_and_content(other):
    assert key("part_key", inputs=(Plan(1),)) == key("part_key", inputs=(Plan(1),))
    assert key("part_key", inputs=(Plan(1),)) != key("part_key", inputs=(other,))


def test_part_of_what_has_no_content_has_no_key():
    with pytest.raises(TypeError):
        key("part_key", inputs=(object(),))


def test_hash_of_weights_includes_the_networks_options():
    one, other = with_buffer("a", 1.0), with_buffer("a", 1.0)
    one.config, other.config = {"sigma_data": 0.5, "a": 1}, {"a": 1, "sigma_data": 0.5}
    assert keys.weights_hash(one) == keys.weights_hash(other)
    other.config = {"sigma_data": 0.6, "a": 1}
    assert keys.weights_hash(one) != keys.weights_hash(other)
