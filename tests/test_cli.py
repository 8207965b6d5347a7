"""edm_neon.py: partitions, merging, seeds, stages, the study of a snapshot, and its report."""

from pathlib import Path

import pytest
import torch
from edm_helpers import (
    PRESET,
    config,
    edm_model,
    network,
    parse,
)

import adaptive_neon as neon
import edm_neon as edm

BLOCKS = ("enc", "mid", "dec")


CPU = neon.processes.Processes("cpu")


# -------------------- what it will cost


@pytest.mark.parametrize(
    "options, counts",
    [
        ({}, (8 + 3, 4)),
        ({"sweep": (-1.0, 0.5)}, (8 + 4, 4)),
        ({"search": "cobyqa", "evaluations": 5}, (8 + 3 + 5, 5)),
        ({"search": "coordinate", "evaluations": 5}, (8 + 3 + 5, 5)),
        ({"search": "gradient", "evaluations": 5}, (8 + 3 + 30, 5)),
        ({"placebo": 2}, (24 + 3, 6)),
        ({"final_repeats": 3}, (8 + 3, 12)),
        ({"search": "cobyqa", "final_repeats": 3, "placebo": 1, "evaluations": 1}, (20, 18)),
    ],
    ids=str,
)
def test_number_of_scores(options, counts):
    c = config(Path("."), **options)
    scores, images, final, final_images = neon.cli.count_images(c, BLOCKS)
    assert (scores, final) == counts
    assert (images, final_images) == (100 * scores, 120 * final)


@pytest.mark.parametrize(
    "seconds, options, refused",
    [
        (1.0, {}, False),
        (6.0, {}, True),
        (6.0, {"yes": True}, False),
        (6.0, {"plan": True}, False),
        (6.0, {"device": "cuda"}, False),
    ],
    ids=str,
)
def test_hours_without_a_gpu_are_refused(seconds, options, refused):
    """11 scores of 100 images, 4 of 120 and 100 synthetic ones: 1,680 images."""
    c = config(Path("."), **options)
    if refused:
        with pytest.raises(
            neon.files.UserError, match="about 3 hours of sampling alone: add --yes"
        ):
            neon.cli.refuse_hours(c, seconds, BLOCKS)
    else:
        neon.cli.refuse_hours(c, seconds, BLOCKS)


def test_hours_grow_with_the_blocks_of_the_partition():
    """Eight blocks: 256 points of 100 images instead of 8."""
    c = config(Path("."))
    neon.cli.refuse_hours(c, 1.0, BLOCKS)
    with pytest.raises(neon.files.UserError, match="about 7 hours of sampling alone"):
        neon.cli.refuse_hours(c, 1.0, tuple("abcdefgh"))


def test_measuring_time_changes_no_setting():
    base, model = network(), edm_model()
    sampler = neon.sampling.Sampler(model, base, CPU, 5, 32)
    threads = torch.get_num_threads()
    assert neon.sampling.time_sampling(sampler, "fp32")[0] > 0
    assert torch.get_num_threads() == threads and (sampler.steps, sampler.batch) == (5, 32)


# -------------------- command line


def parsed(tmp_path, *argv):
    return parse(["--preset", PRESET, "--out", str(tmp_path), *argv])


def test_options_are_the_presets_unless_given(tmp_path):
    defaults = edm.PRESETS[PRESET].defaults
    c = parsed(tmp_path, "--lr", "0.5")
    for name, value in (defaults | {"lr": 0.5}).items():
        assert getattr(c, name) == value


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--grid", "1,0.5,1"], "grid", (0.5, 1.0)),
        (["--grid", "-1,0.5"], "grid", (-1.0, 0.5)),
        (["--snapshot", "1551,550"], "snapshot", (550, 1551)),
        (["--sweep", "-1:0.5:0.5"], "sweep", (-1.0, -0.5, 0.0, 0.5)),
        (["--sweep", "0:0.3:0.1"], "sweep", (0.0, 0.1, 0.2, 0.3)),
        (["--bounds", "-2,3"], "bounds", (-2.0, 3.0)),
        (["--protocol", "paper"], "select_images", 2000),
        (["--protocol", "paper"], "labels", "random"),
        (["--protocol", "paper", "--labels", "balanced"], "labels", "balanced"),
        (["--race"], "labels", "balanced"),
        (["--precision", "tf32", "--device", "cpu"], "precision", "fp32"),
        (["--precision", "bf16"], "precision", "bf16"),
        (["--race"], "race", True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_of_options(tmp_path, argv, name, value):
    assert getattr(parsed(tmp_path, *argv), name) == value


@pytest.mark.parametrize("block", BLOCKS)
def test_grid_of_a_block(tmp_path, block):
    c = parsed(tmp_path, "--grid", "1,2", f"--grid-{block}", "3")
    assert {name: c.grid_of(name) for name in BLOCKS} == dict.fromkeys(BLOCKS, (1.0, 2.0)) | {
        block: (3.0,)
    }
