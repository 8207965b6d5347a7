"""What adaptive_neon/processes.py promises."""

import math
import os

import numpy as np
import pytest
import torch
from edm_helpers import replace

import adaptive_neon as neon
from adaptive_neon.files import UserError
from adaptive_neon.processes import Diverged, Processes

CPU = Processes("cpu")


# -------------------- batches of seeds


def test_batches_keep_the_order_of_the_seeds(monkeypatch):
    replace(monkeypatch, "usable_cores", lambda: 3)
    parts = CPU.map_batches(lambda part: part.tolist(), np.arange(5, 16), 4)
    assert [seed for part in parts for seed in part] == list(range(5, 16))
    assert max(len(part) for part in parts) <= 4


@pytest.mark.parametrize("count", [9, 10, 1], ids=str)
def test_every_rank_gets_all_results_in_the_order_of_the_seeds(ranks, count):
    found = ranks(lambda rank: rank.map_batches(lambda part: part.tolist(), np.arange(count), 2))
    want = [part.tolist() for part in np.array_split(np.arange(count), -(-count // 2))]
    assert found == [want, want]


def test_ranks_share_the_batches(ranks):
    worked = []

    def share(rank):
        rank.map_batches(lambda part: worked.append((int(part[0]), rank.rank)), np.arange(10), 2)

    ranks(share)
    assert sorted(worked) == [(0, 0), (2, 1), (4, 0), (6, 1), (8, 0)]


@pytest.mark.parametrize("error", [Diverged, UserError, torch.OutOfMemoryError])
@pytest.mark.parametrize("failing", [0, 1])
def test_every_rank_hears_of_an_error(ranks, failing, error):
    def share(rank):
        def work(part):
            if rank.rank == failing:
                raise error("too bad")

        rank.map_batches(work, np.arange(4), 2)

    found = ranks(share)
    assert [type(outcome) for outcome in found] == [error, error]
    assert [str(outcome) for outcome in found] == ["too bad", "too bad"]


# -------------------- decisions of the first rank


def test_first_rank_decides_for_all(ranks):
    found = ranks(lambda rank: rank.decide(lambda: f"of rank {rank.rank}"))
    assert found == ["of rank 0", "of rank 0"]


@pytest.mark.parametrize("error", [UserError("no"), FileNotFoundError("gone")], ids=str)
def test_every_rank_hears_why_the_first_failed(ranks, error):
    def work():
        raise error

    found = ranks(lambda rank: rank.decide(work))
    assert [type(outcome) for outcome in found] == [type(error)] * 2


@pytest.mark.parametrize("result", ["{}", ""], ids=["something", "nothing"])
def test_one_by_one_works_once_on_every_rank_behind_the_first(ranks, result):
    order = []

    def share(rank):
        def work():
            order.append(rank.rank)
            return result.format(rank.rank)

        return rank.one_by_one(work)

    assert ranks(share) == [result.format(0), result.format(1)]
    assert order == [0, 1]


def test_one_by_one_fails_on_every_rank_with_the_first(ranks):
    def share(rank):
        def work():
            assert rank.rank == 0
            raise UserError("no")

        return rank.one_by_one(work)

    assert [str(outcome) for outcome in ranks(share)] == ["no", "no"]


# -------------------- one run a folder


def test_second_run_in_a_folder_is_refused(tmp_path):
    with CPU.alone_in(tmp_path):
        with pytest.raises(UserError, match="another run works in"), CPU.alone_in(tmp_path):
            pass


@pytest.mark.parametrize(
    "processes, reads_only", [(CPU, True), (Processes("cpu", 1, 2), False)], ids=["reader", "rank"]
)
def test_readers_and_other_ranks_share_a_folder(tmp_path, processes, reads_only):
    with CPU.alone_in(tmp_path), processes.alone_in(tmp_path, reads_only):
        pass


def test_folder_is_free_after_a_run(tmp_path):
    with pytest.raises(KeyError), CPU.alone_in(tmp_path):
        raise KeyError
    with CPU.alone_in(tmp_path):
        pass


def test_a_run_clears_what_a_killed_one_left(tmp_path, monkeypatch):
    cleared = []
    replace(monkeypatch, "remove_orphans", cleared.append)
    with CPU.alone_in(tmp_path):
        assert cleared == [tmp_path]
    with CPU.alone_in(tmp_path, reads_only=True):
        assert cleared == [tmp_path]


# -------------------- cores


@pytest.mark.parametrize(
    "processes, workers",
    [(CPU, 3), (Processes("cpu", 0, 2), 1), (Processes("cuda"), 1)],
    ids=["alone", "two ranks", "gpu"],
)
def test_batches_at_once(monkeypatch, processes, workers):
    replace(monkeypatch, "usable_cores", lambda: 7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert processes.workers() == workers


def test_there_is_one_batch_at_once_at_least(monkeypatch):
    replace(monkeypatch, "usable_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert CPU.workers() == 1


@pytest.mark.parametrize(
    "allowed, share, usable",
    [(6, math.inf, 6), (6, 2.0, 2), (2, 4.0, 2), (6, 1.5, 2), (6, 0.1, 1)],
    ids=["affinity", "cgroup", "the less of both", "a part of a core", "less than a core"],
)
def test_usable_cores(monkeypatch, allowed, share, usable):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)), raising=False)
    replace(monkeypatch, "cgroup_share", lambda: share)
    assert neon.processes.usable_cores() == usable


@pytest.mark.parametrize("count, usable", [(6, 6), (None, 1)])
def test_usable_cores_of_a_system_without_affinity(monkeypatch, count, usable):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    replace(monkeypatch, "cgroup_share", lambda: math.inf)
    assert neon.processes.usable_cores() == usable


V1 = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")


@pytest.mark.parametrize(
    "files, share",
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({V1[0]: "-1\n", V1[1]: "100000\n"}, math.inf),
        ({V1[0]: "50000\n", V1[1]: "100000\n"}, 0.5),
        ({V1[0]: "50000\n"}, math.inf),
        ({"cpu.max": "", V1[0]: "300000\n", V1[1]: "100000\n"}, 3.0),
    ],
    ids=["none", "2, no limit", "2", "1, no limit", "1", "1, half", "2 unreadable, 1"],
)
def test_share_of_a_container(tmp_path, files, share):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    assert neon.processes.cgroup_share(tmp_path) == share


# -------------------- torchrun's variables

TORCHRUN = {
    "RANK": "2",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_rank_world_and_local_rank_of_torchrun():
    assert neon.processes.rank_and_world(TORCHRUN) == (2, 8, 1)


@pytest.mark.parametrize(
    "stray",
    [
        {},
        {"WORLD_SIZE": "4"},
        {"RANK": "3"},
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"},
        {"MASTER_ADDR": "localhost", "WORLD_SIZE": "many"},
        TORCHRUN | {"RANK": ""},
        TORCHRUN | {"MASTER_PORT": "  "},
    ],
    ids=["none", "world", "rank", "no rendezvous", "no number", "empty", "blank"],
)
def test_stray_variables_are_of_no_torchrun(stray):
    assert neon.processes.rank_and_world(stray) == (0, 1, 0)


@pytest.mark.parametrize(
    "stray, said",
    [({"WORLD_SIZE": "4"}, True), ({"WORLD_SIZE": "1"}, False), ({}, False)],
    ids=["four", "one", "none"],
)
def test_processes_that_are_not_started_are_said(capsys, stray, said):
    neon.processes.rank_and_world(stray)
    assert ("WORLD_SIZE" in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    "name, value",
    [
        ("RANK", "8"),
        ("RANK", "9"),
        ("LOCAL_RANK", "8"),
        ("RANK", "-1"),
        ("WORLD_SIZE", "0"),
        ("RANK", "two"),
        ("WORLD_SIZE", "8.0"),
        ("LOCAL_RANK", "1x"),
        ("MASTER_PORT", "http"),
    ],
)
def test_impossible_variables_are_refused_by_name(name, value):
    first = {"RANK": "0", "LOCAL_RANK": "0"}
    with pytest.raises(UserError, match=f"{name} is .?{value}"):
        neon.processes.rank_and_world({**TORCHRUN, **first, name: value})


@pytest.mark.parametrize("threads, want", [(2, 2), (0, 1)])
def test_threads_are_set_at_the_start(monkeypatch, threads, want):
    for name in neon.processes.RENDEZVOUS:
        monkeypatch.delenv(name, raising=False)
    assert torch.get_num_threads() == 1
    try:
        found = neon.processes.start_processes("cpu", threads)
        assert torch.get_num_threads() == want
    finally:
        torch.set_num_threads(1)
    assert (found.device, found.rank, found.world) == ("cpu", 0, 1)


@pytest.mark.parametrize("where, backend", [("cuda", "nccl"), ("cpu", "gloo")])
def test_a_rank_takes_the_gpu_of_its_place_on_its_machine(monkeypatch, where, backend):
    """Rank 9 of 16 is the second of the second machine; the others may wait for hours."""
    found = []
    ranks = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
    for name, value in (TORCHRUN | ranks).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda name, timeout: found.append((name, timeout.total_seconds() > 20_000)),
    )
    processes = neon.processes.start_processes(where)
    assert found == [*([1] if where == "cuda" else []), (backend, True)]
    assert (processes.device, processes.rank, processes.world) == (where, 9, 16)


def test_threads_of_a_block_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), neon.processes.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
