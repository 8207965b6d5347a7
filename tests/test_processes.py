"""edm_neon.py: partitions, merging, seeds, stages, the study of a snapshot, and its report."""

import os

import numpy as np
import pytest
import torch

import adaptive_neon as neon

CPU = neon.processes.Processes("cpu")


# -------------------- processes


def test_batches_keep_the_order_of_the_seeds():
    parts = CPU.map_batches(lambda part: part.tolist(), np.arange(5, 16), 4)
    assert [seed for part in parts for seed in part] == list(range(5, 16))
    assert max(len(part) for part in parts) <= 4


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_take_turns(monkeypatch, rank):
    """Every rank gets all results, in the order of the seeds."""
    mine, theirs = (
        neon.processes.Processes("cpu", rank, 2),
        neon.processes.Processes("cpu", 1 - rank, 2),
    )

    def work(part):
        return part.tolist()

    def gather(gathered, results):
        others = [part.tolist() for part in np.array_split(np.arange(10), 5)[1 - rank :: 2]]
        gathered[rank], gathered[1 - rank] = results, others

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    parts = mine.map_batches(work, np.arange(10), 2)
    assert parts == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]] and theirs.world == 2


@pytest.mark.parametrize(
    "error", [neon.processes.Diverged, neon.files.UserError, torch.OutOfMemoryError]
)
def test_other_ranks_hear_of_an_error(monkeypatch, error):
    told = []

    def gather(gathered, results):
        told.append(results)
        gathered[:] = [results, [1]]

    def work(part):
        raise error("too bad")

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(error):
        neon.processes.Processes("cpu", 0, 2).map_batches(work, np.arange(4), 2)
    assert [type(outcome) for outcome in told] == [error]


def test_divergence_on_another_rank_is_heard_of(monkeypatch):
    def gather(gathered, results):
        gathered[:] = [results, neon.processes.Diverged("not finite")]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(neon.processes.Diverged):
        neon.processes.Processes("cpu", 0, 2).map_batches(lambda part: 1, np.arange(4), 2)


@pytest.mark.parametrize(
    "processes, workers",
    [
        (neon.processes.Processes("cpu"), 6),
        (neon.processes.Processes("cpu", 0, 2), 1),
        (neon.processes.Processes("cuda"), 1),
    ],
    ids=["alone", "two ranks", "gpu"],
)
def test_batches_at_once(monkeypatch, processes, workers):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert processes.workers() == workers
