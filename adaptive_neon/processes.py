"""Ranks and threads, and batches of seeds over both."""

import contextlib
import datetime
import os

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

    def __init__(self, device, rank=0, world=1):
        self.device, self.rank, self.world = device, rank, world

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def decide(self, work):
        """work() on the first rank alone; its result, or its error, on every rank."""
        if self.world == 1:
            return work()
        outcome = [None, None]  # result, failure
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

    def one_by_one(self, work):
        """work() on the first rank, then on the others, which find its files."""
        if self.world == 1:
            return work()
        first = None

        def on_first_rank():
            nonlocal first
            first = work()

        self.decide(on_first_rank)
        return first if self.rank == 0 else work()

    def map_batches(self, work, seeds, batch, desc=None):
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
        outcome = []
        try:
            for part in tqdm(mine, **bar):
                outcome.append(work(part))
        except (Diverged, UserError, torch.OutOfMemoryError) as error:
            outcome = type(error)(str(error))  # the others must hear of it
        gathered = [None] * self.world
        dist.all_gather_object(gathered, outcome)
        for outcome in gathered:
            if isinstance(outcome, Exception):
                raise outcome
        return [gathered[i % self.world][i // self.world] for i in range(len(parts))]

    def workers(self):
        """Batches at once."""
        if self.device != "cpu" or self.world > 1:
            return 1
        return max(1, os.cpu_count() // torch.get_num_threads())

    @contextlib.contextmanager
    def alone_in(self, folder, reads_only):
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


def start_processes(c, preset):
    """Threads, and torch.distributed under torchrun; nothing changes either of them later."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if c.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # The first rank may download or train features for long while the others wait.
        patience = datetime.timedelta(days=1)
        dist.init_process_group("nccl" if c.device == "cuda" else "gloo", timeout=patience)
    threads = c.threads or preset.threads
    if threads:
        torch.set_num_threads(threads)
    if c.device == "cuda":
        torch.backends.cudnn.benchmark = True
    if preset.small:
        torch.empty(
            2**22
        )  # freeing 16 MB raises glibc's mmap threshold: no page faults for every activation
    return Processes(c.device, rank, world)
