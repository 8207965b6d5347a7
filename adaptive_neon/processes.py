"""Ranks and threads, and batches of seeds over both."""

import contextlib
import datetime
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from .files import UserError, lock, remove_orphans


class Diverged(UserError):
    """The sampler gave images that are not finite."""


class Processes:
    """This process among `world`: its device and rank, and how the ranks share work and agree."""

    def __init__(self, device: str = "cpu", rank: int = 0, world: int = 1):
        self.device, self.rank, self.world = device, rank, world

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def decide(self, work: Callable):
        """work() on the first rank alone; its result, or its error, on every rank."""
        if self.world == 1:
            return work()
        outcome: list = [None, None]  # result, failure
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (UserError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        result, failure = outcome
        if failure is not None:
            raise failure
        return result

    def one_by_one(self, work: Callable):
        """work() on the first rank, then on the others, which find its files."""
        if self.world == 1:
            return work()
        first = None

        def on_first_rank():
            nonlocal first
            first = work()

        self.decide(on_first_rank)
        return first if self.rank == 0 else work()

    def map_batches(self, work: Callable, seeds, batch: int, desc: str | None = None) -> list:
        """[work(batch of seeds)] in the order of the seeds; every rank gets all. On a CPU, where
        small networks leave cores idle, several batches at once."""
        parts = np.array_split(np.asarray(seeds), -(-len(seeds) // batch))
        mine = parts[self.rank :: self.world]
        bar = {"desc": desc, "leave": False, "disable": desc is None or self.rank > 0}
        workers = self.workers()
        if workers > 1:
            return thread_map(work, mine, max_workers=workers, **bar)

        if self.world == 1:
            return [work(part) for part in tqdm(mine, **bar)]
        results: list = []
        failure = None
        try:
            for part in tqdm(mine, **bar):
                results.append(work(part))
        except (UserError, torch.OutOfMemoryError) as error:
            failure = type(error)(str(error))  # the others must hear of it
        gathered: list = [None] * self.world
        dist.all_gather_object(gathered, (results, failure))
        for _, failure in gathered:
            if failure is not None:
                raise failure
        return [gathered[i % self.world][0][i // self.world] for i in range(len(parts))]

    def workers(self) -> int:
        """Batches at once."""
        if self.device != "cpu" or self.world > 1:
            return 1
        return max(1, usable_cores() // torch.get_num_threads())

    @contextlib.contextmanager
    def alone_in(self, folder: Path, reads_only: bool = False) -> Iterator[None]:
        """Refuse a second run in the same folder while this one lives; clear what a killed one
        left."""
        if reads_only or self.rank > 0:
            yield
            return
        with open(folder / ".lock", "w") as file:
            try:
                lock(file, wait=False)
            except BlockingIOError:
                raise UserError(
                    f"another run works in {folder}: wait for it, or choose another --out"
                ) from None
            remove_orphans(folder)
            yield


def usable_cores() -> int:
    """Cores that this process may use: taskset and batch systems allow fewer than there are, and a
    container's share may be smaller still."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(cores, cgroup_share())))


def cgroup_share(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that the container may use, infinity without a limit: version 2 and
    1."""
    with contextlib.suppress(OSError, ValueError):
        limit, period = (root / "cpu.max").read_text().split()
        return math.inf if limit == "max" else int(limit) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota = int((root / "cpu/cpu.cfs_quota_us").read_text())
        return quota / int((root / "cpu/cpu.cfs_period_us").read_text()) if quota > 0 else math.inf
    return math.inf


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's threads inside the block: on a busy core, waiting for a second costs 10x."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # of torchrun


def rank_and_world(environment: dict) -> tuple[int, int, int]:
    """(rank, world, local rank) of torchrun's variables; (0, 1, 0) without them. Batch systems
    leave some of the same names behind: unless all are there, this is one process, and says so."""
    given = {name: environment.get(name, "").strip() for name in RENDEZVOUS}
    missing = [name for name, value in given.items() if not value]
    if missing:
        if given["WORLD_SIZE"] not in ("", "1"):
            print(
                f"WORLD_SIZE is {given['WORLD_SIZE']}, but {', '.join(missing)} not set: this runs "
                "as one process (torchrun sets them all)",
                file=sys.stderr,
            )
        return 0, 1, 0

    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not given[name].isdecimal():
            raise UserError(f"the environment variable {name} is {given[name]!r}, not a number")
        numbers[name] = int(given[name])
    rank, world, local_rank = numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"]
    for name in ("RANK", "LOCAL_RANK"):
        if numbers[name] >= world:
            raise UserError(
                f"the environment variable {name} is {numbers[name]}, and WORLD_SIZE is {world}: "
                "start with torchrun, or unset them"
            )
    return rank, world, local_rank


def start_processes(device: str, threads: int = 0, small: bool = False) -> Processes:
    """Threads of one batch (0: all), and torch.distributed under torchrun; nothing changes either
    of them later. small: networks that a CPU's caches hold."""
    rank, world, local_rank = rank_and_world(dict(os.environ))
    if world > 1:
        if device == "cuda":
            torch.cuda.set_device(local_rank)
        # The first rank may download or train features for long while the others wait.
        patience = datetime.timedelta(days=1)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=patience)
    if threads:
        torch.set_num_threads(threads)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
    if small:
        # Freeing 16 MB raises glibc's mmap threshold: no page faults for every activation.
        torch.empty(2**22)
    return Processes(device, rank, world)
