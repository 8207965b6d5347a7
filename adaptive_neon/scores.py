"""Scores of merged networks on seed sets, and their log."""

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from .blocks import Merger
from .files import UserError, lock, printable
from .judges import Judge, distances_without_real, kernel_distance, precision_recall
from .keys import score_key
from .processes import Diverged
from .sampling import Sampler, network_calls
from .seeds import Ledger, SeedSet, seed_ledger
from .stats import FOLDS, LEVEL, Comparison, compare, without_bias


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
    corrected: float | None = None  # the distance without its bias, on final seeds
    real_folds: list | None = None  # the distance without each of FOLDS folds of the real images
    kernel_real_folds: list | None = None
    memorisation: float | None = None  # share closer to a training image, on final seeds
    alignment: float | None = None  # mean adherence to what was asked for; higher is better
    alignment_folds: list | None = None

    def as_line(self) -> str:
        """One line of JSON, which knows no infinity."""
        row = dataclasses.asdict(self)
        if not math.isfinite(self.fd):
            row |= {"fd": None, "folds": None}
        return json.dumps(row, allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> "Score":
        """The score of a line of our own; whatever a damaged one raises says what is wrong."""
        row = json.loads(line)
        if "fd" in row and row["fd"] is None:
            row |= {"fd": math.inf, "folds": [math.inf] * FOLDS}
        score = cls(**row)

        numbers = [score.fd, score.seconds, *score.w.values()]
        for name in ("precision", "recall", "kernel", "corrected", "memorisation", "alignment"):
            if row.get(name) is not None:
                numbers.append(row[name])
        for name in ("folds", "kernel_folds", "real_folds", "kernel_real_folds", "alignment_folds"):
            if row.get(name) is not None:
                numbers += row[name]
                if len(row[name]) != FOLDS:
                    raise ValueError("its folds are impossible")
        if not all(isinstance(number, (int, float)) and number == number for number in numbers):
            raise ValueError("it has entries that are no numbers")
        if score.fd < -1e-6 * abs(score.fd) - 1e-3:
            raise ValueError("its distance is impossible")
        if (score.precision is None) != (score.recall is None):
            raise ValueError("it has precision without recall, or recall without precision")
        return score


class ScoreLog:
    """Finished scores: grid.jsonl (selection seeds) and final.jsonl (final seeds), a line each;
    without a folder in memory alone."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.scores: dict[str, Score] = {}
        if folder is None:
            return
        for path in (folder / "grid.jsonl", folder / "final.jsonl"):
            if path.exists():
                self.read(path)

    def read(self, path: Path) -> None:
        # What follows the last line break was cut off by a kill; add() takes it away.
        *lines, _ = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                score = Score.from_line(line.decode("utf-8"))
                self.scores[score.key] = score
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number}, is damaged ({printable(error)}): "
                    "delete the line, or the file"
                ) from error

    def find(self, key: str, w: dict[str, float]) -> Score | None:
        """The score with this key. w: how it is cut into blocks here; another partition may have
        given the same network."""
        found = self.scores.get(key)
        return None if found is None else dataclasses.replace(found, w=w)

    def add(self, score: Score, seeds: SeedSet) -> None:
        """Append to the file of these seeds; the lock keeps lines of several processes apart."""
        self.scores[score.key] = score
        if self.folder is None:
            return
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
    """Scores of one self-trained network's extrapolations; what is finished is read back from the
    log.

    judges: the first decides, the others only see the final comparison. seeds: of the selection and
    of the final comparison. precision, final_precision: of the sampling network there ("fp32",
    "tf32", "bf16", "fp16"). snapshot: kimg of the self-training, for the report.
    """

    def __init__(
        self,
        sampler: Sampler,
        merger: Merger,
        judges: list[Judge],
        log: ScoreLog | None = None,
        seeds: Ledger | None = None,
        precision: str = "fp32",
        final_precision: str = "",
        snapshot: float = 0,
    ):
        if log is not None and log.folder is not None and not sampler.model.identity:
            raise UserError("a log on disk needs Model(..., identity=...): what decides its images")
        self.sampler, self.merger = sampler, merger
        self.judges, self.judge = judges, judges[0]
        self.log = log or ScoreLog()
        self.seeds = seeds or seed_ledger()
        self.selection_precision = precision
        self.final_precision = final_precision or precision
        self.snapshot = snapshot
        self.attach()

    def attach(self) -> None:
        if self.merger.net is not self.sampler.net:
            self.merger.attach(self.sampler.net)

    def of(self, merger: Merger | None = None, sampler: Sampler | None = None) -> "Scorer":
        """The same judges, seeds and log, of other networks or blocks, or otherwise sampled."""
        other = copy.copy(self)
        other.merger, other.sampler = merger or self.merger, sampler or self.sampler
        other.attach()
        return other

    def precision(self, seeds: SeedSet) -> str:
        return self.final_precision if seeds.is_final else self.selection_precision

    def key(self, w: dict[str, float], seeds: SeedSet, judge: Judge | None = None) -> str:
        sampler, merger = self.sampler, self.merger
        return score_key(
            networks=(merger.base_hash, merger.aux_hash),
            weights=merger.parameter_weights(w),
            model=sampler.model.identity,
            judge=(judge or self.judge).identity(seeds),
            seeds=(int(seeds.first), seeds.count),
            steps=sampler.steps,
            labels=sampler.labels,
            precision=self.precision(seeds),
            device=sampler.processes.device,
            folds=FOLDS,
        )

    # ---------- selection
    def score(
        self,
        w: float | dict[str, float],
        seeds: SeedSet | None = None,
        shares: bool = False,
    ) -> Score:
        """Score of the weights w (one number, or {block: weight}), in the judge that decides; by
        default on the selection's seeds. shares: precision and recall too."""
        w = self.merger.weights(w)
        return self.scores(w, seeds or self.seeds.selection, [self.judge], shares)[0]

    def score_all(self, weights: list, desc: str, shares: bool = False, seeds=None) -> list[Score]:
        """One score after the other, with a progress bar."""
        quiet = self.sampler.processes.rank > 0
        desc = f"snapshot {self.snapshot}: {desc}"
        bar = tqdm(weights, desc=desc, leave=False, disable=quiet)
        return [self.score(w, seeds, shares) for w in bar]

    # ---------- final comparison
    def finals(self, w: float | dict[str, float], desc: str = "") -> dict[str, list[Score]]:
        """{judge: a Score for every set of final seeds}, all judges on the same images."""
        w = self.merger.weights(w)
        found: dict[str, list[Score]] = {judge.name: [] for judge in self.judges}
        for seeds in self.seeds.finals:
            scores = self.scores(w, seeds, self.judges, True, f"final: {desc}")
            for judge, score in zip(self.judges, scores, strict=True):
                found[judge.name].append(score)
        return found

    def compare(self, w, against, level: float = LEVEL) -> dict[str, Comparison]:
        """{judge: paired comparison of two weights} on the final seeds."""
        ours, theirs = self.finals(w), self.finals(against)
        return {name: compare(ours[name], theirs[name], level) for name in ours}

    # ---------- both
    @torch.no_grad()
    def scores(
        self,
        w: dict[str, float],
        seeds: SeedSet,
        judges: list[Judge],
        shares: bool = False,
        desc: str | None = None,
    ) -> list[Score]:
        """One Score a judge, all of the same images. shares: precision and recall in the judge that
        decides; on final seeds all have the kernel distance."""
        begin = time.perf_counter()
        processes = self.sampler.processes
        keys = [self.key(w, seeds, judge) for judge in judges]

        def known():
            found = []
            for judge, key in zip(judges, keys, strict=True):
                score = self.log.find(key, w)
                wanted = shares and judge is self.judge and judge.reference(seeds).real is not None
                if score is not None and wanted and score.precision is None:
                    if math.isfinite(score.fd):
                        score = None  # precision and recall are still to be taken
                found.append(score)
            return found

        scores = processes.decide(known)
        missing = [i for i, score in enumerate(scores) if score is None]
        if not missing:
            return scores
        found = self.features(w, seeds, [judges[i] for i in missing], desc)
        if found is None and processes.rank == 0:
            print(f"{printable(json.dumps(w))}: the sampler diverges, the score is infinite")

        def assess():
            for place, i in enumerate(missing):
                judge = judges[i]
                measured = {"fd": math.inf, "folds": [math.inf] * FOLDS}
                measured |= {"precision": None, "recall": None}
                if found is not None:
                    measured |= measure(judge, seeds, *found[place], shares and judge is self.judge)
                scores[i] = Score(
                    snapshot=self.snapshot,
                    w=w,
                    images=seeds.count,
                    first_seed=int(seeds.first),
                    arithmetic=self.precision(seeds),
                    seconds=round(time.perf_counter() - begin, 3),
                    key=keys[i],
                    judge=judge.name,
                    **measured,
                )
                self.log.add(scores[i], seeds)
            return scores

        return processes.decide(assess)

    def features(self, w, seeds, judges, desc=None) -> list[tuple] | None:
        """Every judge's features [N, D] and adherence [N] (or None) of the images at these seeds,
        in their order, on every rank; None: it diverged."""
        net = self.merger.set(w)
        processes = self.sampler.processes
        asked = [self.alignment_of(judge) for judge in judges]

        def work(part, batch):
            images, labels = self.sampler.batch_images(part, batch)
            found = [judge.features(images) for judge in judges]
            for alignment in filter(None, asked):
                found.append(alignment(images, self.sampler.model.asked_for(labels)))
            return [features.cpu() for features in found] if processes.world > 1 else found

        try:
            with network_calls(net, self.precision(seeds)):
                parts = self.sampler.in_batches(work, seeds.seeds, desc)
        except Diverged:
            return None
        found = [torch.cat(side).to(processes.device) for side in zip(*parts, strict=True)]
        adherence = iter(found[len(judges) :])
        return [
            (features, next(adherence) if alignment else None)
            for features, alignment in zip(found[: len(judges)], asked, strict=True)
        ]

    def alignment_of(self, judge: Judge) -> Callable | None:
        """alignment() of the judge's file; of the model's own, where it decides. Without classes
        nothing is asked for."""
        if not self.sampler.classes:
            return None
        own = getattr(judge.features, "alignment", None)
        if own is None and judge is self.judge:
            own = getattr(self.sampler.model, "alignment", None)
        return own


def measure(judge: Judge, seeds: SeedSet, features, adherence, shares: bool) -> dict:
    """What one judge says of images: entries of a Score. features [N, D]; adherence [N] or None;
    shares: precision and recall, too."""
    reference = judge.reference(seeds)
    fd, folds = reference.prepared.fold_distances(features, FOLDS)
    found = {"fd": fd, "folds": folds}
    if shares and reference.real is not None:
        found["precision"], found["recall"] = precision_recall(reference, features)
    if seeds.is_final:
        if reference.real is not None:
            kernel, without, without_real = kernel_distance(reference, features)
            found |= {"kernel": kernel, "kernel_folds": without, "kernel_real_folds": without_real}
        real_folds = distances_without_real(reference, features)
        found |= {"real_folds": real_folds, "corrected": without_bias(fd, folds, real_folds)}
        if judge.memory is not None:
            found["memorisation"] = judge.memory.share(features)

    # Mean adherence to what was asked for, and the means without each fold.
    if adherence is not None:
        parts = adherence.double().tensor_split(FOLDS)
        total, left = sum(float(part.sum()) for part in parts), []
        for part in parts:
            left.append((total - float(part.sum())) / (len(adherence) - len(part)))
        found |= {"alignment": total / len(adherence), "alignment_folds": left}
    return found
