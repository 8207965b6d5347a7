"""Scores of networks on seed sets, and their log."""

import copy
import dataclasses
import json
import math
import time

import numpy as np
import torch
from tqdm import tqdm

from .files import UserError, lock, printable
from .judges import kernel_distance, precision_recall
from .keys import SAMPLING_VERSION, SCORING_VERSION, key_of
from .processes import Diverged
from .sampling import network_calls
from .stats import FOLDS

SELECT_SEED, FINAL_SEED, SEARCH_SEED = 10_000, 50_000, 10_000_000  # the first seeds of each


@dataclasses.dataclass(frozen=True)
class SeedSet:
    """Consecutive seeds and what they are for."""

    purpose: str
    first: int
    count: int

    @property
    def seeds(self):
        return np.arange(self.first, self.first + self.count)

    @property
    def last(self):
        return self.first + self.count - 1

    @property
    def is_final(self):
        return self.purpose.startswith("final")

    def start(self, count):
        """Its first seeds."""
        return dataclasses.replace(self, count=count)


@dataclasses.dataclass(frozen=True)
class Score:
    """One network's distance to the real data, on one set of seeds."""

    snapshot: float  # kimg
    w: dict  # {block: weight}
    images: int
    first_seed: int
    fd: float  # inf where the sampler diverged
    folds: list  # the distance without each of FOLDS seed folds
    precision: float | None
    recall: float | None
    arithmetic: str  # of the sampling network: fp32, tf32, bf16, fp16
    seconds: float
    key: str  # hash of all that decides the score
    judge: str = ""  # name of the features
    kernel: float | None = None  # unbiased kernel distance, on final seeds
    kernel_folds: list | None = None

    def as_line(self):
        """One line of JSON, which knows no infinity."""
        row = dataclasses.asdict(self)
        if not math.isfinite(self.fd):
            row |= {"fd": None, "folds": None}
        return json.dumps(row, allow_nan=False)

    @classmethod
    def from_line(cls, line):
        """The score of a line of our own; ValueError says what is wrong with it."""
        row = json.loads(line)
        fields = dataclasses.fields(cls)
        needed = {field.name for field in fields if field.default is dataclasses.MISSING}
        if not isinstance(row, dict) or not needed <= set(row) <= {f.name for f in fields}:
            raise ValueError("it has other entries than a score")
        if row["fd"] is None:
            row |= {"fd": math.inf, "folds": [math.inf] * FOLDS}
        numbers = [row["fd"], row["seconds"], *row["folds"], *row["w"].values()]
        if row["precision"] is not None:
            numbers += [row["precision"], row["recall"]]
        if row.get("kernel") is not None:
            numbers += [row["kernel"], *row["kernel_folds"]]
        if not all(isinstance(number, (int, float)) and number == number for number in numbers):
            raise ValueError("it has entries that are no numbers")
        if len(row["folds"]) != FOLDS or row["fd"] < -1e-6 * abs(row["fd"]) - 1e-3:
            raise ValueError("its distance or folds are impossible")
        return cls(**row)

    @property
    def name(self):
        """What is scored with the same key only once."""
        return json.dumps([self.w, self.images, self.first_seed], sort_keys=True)


class ScoreLog:
    """Finished scores: grid.jsonl (selection seeds) and final.jsonl (final seeds), a line each."""

    def __init__(self, folder):
        self.folder = folder
        self.scores = {}
        for path in (folder / "grid.jsonl", folder / "final.jsonl"):
            if path.exists():
                self.read(path)

    def read(self, path):
        # What follows the last line break was cut off by a kill; add() takes it away.
        *lines, _ = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                self.keep(Score.from_line(line.decode("utf-8")))
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number}, is damaged ({printable(error)}): "
                    "delete the line, or the file"
                ) from error

    def keep(self, score):
        self.scores[score.key, score.name] = score

    def find(self, key, w, seeds):
        name = json.dumps([w, seeds.count, int(seeds.first)], sort_keys=True)
        return self.scores.get((key, name))

    def add(self, score, seeds):
        """Append to the file of these seeds; the lock keeps lines of several processes apart."""
        self.keep(score)
        path = self.folder / ("final.jsonl" if seeds.is_final else "grid.jsonl")
        with open(path, "a+b") as file:
            lock(file)
            file.seek(0)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
            file.write(score.as_line().encode() + b"\n")


class Scorer:
    """Scores of one snapshot's extrapolations; what is finished is read back from the log."""

    def __init__(self, merger, judges, sampler, log, parents, kimg, c):
        self.merger, self.sampler, self.log = merger, sampler, log
        self.judges = judges  # the first decides, the others only see the final comparison
        self.judge = judges[0]
        self.parents, self.kimg = parents, kimg
        self.selection_precision = c.precision
        self.final_precision = c.confirm_precision or c.precision

    def with_owners(self, owners):
        """The same networks cut into other blocks."""
        other = copy.copy(self)
        other.merger = self.merger.with_owners(owners)
        return other

    def weights(self, values):
        """Numbers in the order of the blocks -> {block: weight}, rounded: the same key after a
        resume."""
        return {
            block: round(float(v), 6) for block, v in zip(self.merger.blocks, values, strict=True)
        }

    def arithmetic(self, seeds):
        return self.final_precision if seeds.is_final else self.selection_precision

    def key(self, seeds, judge=None):
        sampler = self.sampler
        inputs = {
            "networks": self.parents,
            "owners": self.merger.owners,
            "model": sampler.model.identity,
            "judge": (judge or self.judge).identity(seeds),
            "steps": sampler.steps,
            "labels": sampler.labels,
            "precision": self.arithmetic(seeds),
            "device": sampler.processes.device,
            "torch": torch.__version__,
            "folds": FOLDS,
            "snapshot": self.kimg,
        }
        return key_of(SCORING_VERSION, SAMPLING_VERSION, inputs)

    def features(self, w, seeds, judges, desc=None):
        """Every judge's features [N, D] of the images at these seeds, in their order, on every
        rank; None: it diverged."""
        net = self.merger.set(w)
        processes = self.sampler.processes

        def work(part):
            images, _ = self.sampler.images(part)
            found = [judge.features(images) for judge in judges]
            return [features.cpu() for features in found] if processes.world > 1 else found

        try:
            with network_calls(net, self.arithmetic(seeds)):
                parts = processes.map_batches(work, seeds.seeds, self.sampler.batch, desc)
        except Diverged:
            return None
        return [torch.cat(side).to(processes.device) for side in zip(*parts, strict=True)]

    def score(self, w, seeds, desc=None):
        """Score of the weights w on a SeedSet, in the judge that decides."""
        return self.scores(w, seeds, [self.judge], desc)[0]

    @torch.no_grad()
    def scores(self, w, seeds, judges, desc=None):
        """One Score a judge, all of the same images; precision and recall where real images are at
        hand, on final seeds the kernel distance too."""
        begin = time.perf_counter()
        processes = self.sampler.processes
        keys = [self.key(seeds, judge) for judge in judges]
        scores = processes.decide(lambda: [self.log.find(key, w, seeds) for key in keys])
        missing = [i for i, score in enumerate(scores) if score is None]
        if not missing:
            return scores
        found = self.features(w, seeds, [judges[i] for i in missing], desc)
        if found is None and processes.rank == 0:
            print(f"{printable(json.dumps(w))}: the sampler diverges, the score is infinite")

        def assess():
            for place, i in enumerate(missing):
                features = None if found is None else found[place]
                scores[i] = self.assess(w, seeds, judges[i], features, keys[i], begin)
                self.log.add(scores[i], seeds)
            return scores

        return processes.decide(assess)

    def assess(self, w, seeds, judge, features, key, begin):
        """Score of features [N, D], None where the sampler diverged."""
        fd, folds = math.inf, [math.inf] * FOLDS
        precision = recall = kernel = kernel_folds = None
        reference = judge.reference(seeds)
        if features is not None:
            fd, folds = reference.prepared.fold_distances(features, FOLDS)
        if features is not None and reference.real is not None:
            precision, recall = precision_recall(
                reference.real, features, real_radii=reference.radii
            )
            if seeds.is_final:
                kernel, kernel_folds = kernel_distance(reference, features)
        return Score(
            snapshot=self.kimg,
            w=w,
            images=seeds.count,
            first_seed=int(seeds.first),
            fd=fd,
            folds=folds,
            precision=precision,
            recall=recall,
            arithmetic=self.arithmetic(seeds),
            seconds=round(time.perf_counter() - begin, 3),
            key=key,
            judge=judge.name,
            kernel=kernel,
            kernel_folds=kernel_folds,
        )

    def score_all(self, weights, seeds, desc):
        quiet = self.sampler.processes.rank > 0
        bar = tqdm(weights, desc=f"snapshot {self.kimg}: {desc}", leave=False, disable=quiet)
        return [self.score(w, seeds) for w in bar]


def best_of(scores):
    return min(scores, key=fd_of)


def fd_of(score):
    return score.fd
