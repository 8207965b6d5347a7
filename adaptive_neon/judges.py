"""A judge: a feature network, and the real images seen through it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .extension import neon_ext
from .features import (
    FileFeatures,
    InceptionFeatures,
    JointFeatures,
    check_differentiable,
    features_of_images,
    pixels,
    random_conv,
)
from .files import UserError, fetch, read_moments, reading
from .images import RealData, RealImages
from .keys import judge_key, reference_key
from .memorisation import Memory, memory_of
from .sampling import allow_tf32
from .stats import FOLDS
from .userfile import JudgeFile

NEIGHBOURS = 5  # of precision and recall
MOST = 10_000  # images of each side for precision, recall and the kernel distance


# -------------------- real images in one feature network
@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real images in one feature network. prepared: neon_ext.FrechetReference;
    real: the features themselves [N, D], where the images are at hand; facts: features, source,
    images, origin, for the report; identity: hash of mean, covariance and features."""

    prepared: Any
    real: Any  # or None
    facts: dict
    identity: str
    has_folds: bool = True  # whether the statistics are those of `real`

    @functools.cached_property
    def radii(self) -> torch.Tensor:
        """Of precision_recall(), which needs them for every score."""
        return neighbour_radii(self.real)

    @functools.cached_property
    def kernel_unit(self) -> float:
        """What kernel_distance() divides features by: 1 for Inception, so that numbers can be
        compared with published ones; else the real features' root mean square."""
        if self.facts["features"].startswith("inception"):
            return 1.0
        return float(self.real[:MOST].double().square().mean().sqrt()) or 1.0

    @functools.cached_property
    def kernel_parts(self) -> list[torch.Tensor]:
        """FOLDS folds of the first real features, in this unit."""
        real = self.real[:MOST].double() / self.kernel_unit
        return list(real.tensor_split(FOLDS))

    @functools.cached_property
    def kernel_sums(self) -> np.ndarray:
        """Of these folds: kernel_sums()."""
        return kernel_sums(self.kernel_parts, self.kernel_parts)


def reference_of_images(images: RealImages, features, device: str, origin: str) -> Reference:
    """What real images are to a feature network."""
    found = features_of_images(images.images, features, device)
    mean, cov = neon_ext.feature_moments(found)
    return prepared_reference(mean, cov, len(found), features, images.source, origin, found)


def reference_of_file(path: Path, features, device: str, origin: str, real=None) -> Reference:
    """The same of an npz with mu and sigma, as EDM's, which leaves features and images out. real:
    RealImages for precision, recall and the kernel distance, which need more than moments."""
    mu, sigma, count, kind = read_moments(path)
    mean, cov = torch.from_numpy(mu).to(device), torch.from_numpy(sigma).to(device)
    shape = tuple(mean.shape)
    if shape != (features.dim,) or kind not in (features.name, features.kind):
        raise UserError(
            f"reference {path} has {shape} statistics of {kind}, the features are "
            f"{features.name}, {features.dim}-d: use statistics of the same features"
        )
    found = None if real is None else features_of_images(real.images, features, device)
    reference = prepared_reference(mean, cov, count, features, str(path), origin, found)
    return dataclasses.replace(reference, has_folds=False)


def prepared_reference(mean, cov, count, features, source, origin, real) -> Reference:
    """mean [D], cov [D, D], float64; real: features [N, D] or None."""
    with reading(f"reference {source} has no usable mu and sigma"):
        prepared = neon_ext.FrechetReference(mean, cov)
    facts = {"features": features.name, "source": source, "images": count}
    if origin:
        facts["origin"] = origin
    identity = reference_key(mean=mean, cov=cov, count=count, real=real)
    return Reference(prepared, real, facts, identity)


class Judge:
    """A feature network and the real data seen through it: what a score is. Weights are selected
    against one part of the real images and compared against another.

    features: see features.py; is_part: of the joint features that the selection saw."""

    memory: Memory | None = None  # see remember()

    def __init__(self, features, real: RealData, device: str = "cpu", is_part: bool = False):
        self.features = on_device(features, device)
        self.is_part = is_part
        self.labels = real.selection.labels
        self.selection = reference_of_images(real.selection, self.features, device, real.origin)
        self.final = reference_of_images(real.final, self.features, device, real.origin)

    @classmethod
    def of_statistics(
        cls,
        features,
        path: Path,
        origin: str = "",
        device: str = "cpu",
        real: RealData | None = None,
    ) -> "Judge":
        """A judge by the statistics of a file, the same for selection and final comparison; real
        images, if any, serve precision, recall and the kernel distance."""
        origin = origin or "of unknown origin: base and selection may have seen its images"
        judge = cls.__new__(cls)
        judge.features, judge.is_part = on_device(features, device), False
        judge.labels = None if real is None else real.selection.labels
        file = functools.partial(reference_of_file, path, judge.features, device, origin)
        judge.selection = judge.final = file(None if real is None else real.final)
        if real is not None:
            judge.selection = file(real.selection)
        return judge

    def reference(self, seeds) -> Reference:
        """The one that scores of this SeedSet are distances to."""
        return self.final if seeds.is_final else self.selection

    def remember(self, training: RealImages, device: str = "cpu") -> None:
        """Measure memorisation of these images, which the base was trained on, in the final
        comparison: against as many images of the final part."""
        trained = features_of_images(training.images[:MOST], self.features, device)
        self.memory = memory_of(trained, self.final.real)

    def identity(self, seeds) -> str:
        reference = self.reference(seeds)
        memory = self.memory.identity if self.memory is not None and seeds.is_final else ""
        return judge_key(
            features=self.features.identity, reference=reference.identity, memory=memory
        )

    @property
    def name(self) -> str:
        return self.features.name

    @property
    def facts(self) -> dict:
        """For the report: features, source, images of the final reference, and what else is
        known."""
        facts = self.final.facts | getattr(self.features, "facts", {})
        if self.selection is not self.final:
            facts["selection"] = self.selection.facts
        if self.memory is not None:
            facts["memorisation_fresh"] = self.memory.share(self.selection.real)
        return facts

    def floor(self, images: int) -> dict:
        """The final score of real images of the selection part, as many of every class as models
        make: bias, and the best that a model can hope for."""
        chosen = first_of_every_class(self.labels, len(self.selection.real))[:images]
        moments = neon_ext.feature_moments(self.selection.real[chosen])
        return {"images": images, "fd": float(self.final.prepared.distance(*moments))}


def first_of_every_class(labels: torch.Tensor | None, count: int) -> torch.Tensor:
    """Numbers 0 .. count - 1 in an order that takes one image of every class in turn, while there
    are any: int64 [count]."""
    if labels is None:
        return torch.arange(count)
    rounds = torch.zeros(count, dtype=torch.int64)
    for label in labels.unique():
        where = (labels == label).nonzero().flatten()
        rounds[where] = torch.arange(len(where))
    return torch.argsort(rounds, stable=True)


def on_device(features, device):
    features = features.to(device)
    if device == "cuda" and isinstance(features, InceptionFeatures):
        return features.to(memory_format=torch.channels_last)  # its convolutions follow its weights
    return features


# -------------------- precision and recall
def neighbour_radii(points: torch.Tensor) -> torch.Tensor:
    """Distance of each of the first MOST points [N, D] to its fifth neighbour: float64 [N]."""
    points = points[:MOST].double()
    radii = []
    for part in points.split(1000):
        # A point's own zero distance is its first neighbour, hence one more.
        radii.append(torch.cdist(part, points).kthvalue(NEIGHBOURS + 1).values)
    return torch.cat(radii)


@torch.no_grad()
def precision_recall(reference: Reference, fake: torch.Tensor) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of features [N, D]."""
    real, fake = reference.real[:MOST].double(), fake[:MOST].double()
    precision = share_inside(fake, real, reference.radii)
    return precision, share_inside(real, fake, neighbour_radii(fake))


def share_inside(points: torch.Tensor, manifold: torch.Tensor, radii: torch.Tensor) -> float:
    """Share of the points [N, D] within the radius [M] of some point of the manifold [M, D]."""
    hits = [(torch.cdist(part, manifold) <= radii).any(1) for part in points.split(1000)]
    return float(torch.cat(hits).double().mean())


# -------------------- distances without a fold of the real images
@torch.no_grad()
def distances_without_real(reference: Reference, fake: torch.Tensor) -> list[float] | None:
    """Fréchet distance of features [N, D] without each of FOLDS folds of the real ones; None where
    only the statistics of the real ones are known. A distance has two sides: here the generated
    images are the reference, and a part of the real ones is left out."""
    if reference.real is None or not reference.has_folds:
        return None
    side = neon_ext.FrechetReference(*neon_ext.feature_moments(fake))
    return side.fold_distances(reference.real, FOLDS)[1]


# -------------------- kernel distance
def kernel_sums(parts: list[torch.Tensor], others: list[torch.Tensor]) -> np.ndarray:
    """Sums [P, Q] of the kernel (x y / D + 1)^3 over all pairs of two folds, without those of a
    point with itself where both lists are the same."""
    sums = np.zeros((len(parts), len(others)))
    for k, part in enumerate(parts):
        for j, other in enumerate(others):
            for rows in part.split(500):
                near = rows @ other.T / rows.shape[1] + 1
                sums[k, j] += float((near * near * near).sum())
        if parts is others:
            own = (part * part).sum(1) / part.shape[1] + 1
            sums[k, k] -= float((own * own * own).sum())
    return sums


@torch.no_grad()
def kernel_distance(
    reference: Reference, fake: torch.Tensor
) -> tuple[float, list[float], list[float]]:
    """Kernel Inception distance (arXiv 1801.01401): the unbiased squared maximum mean discrepancy
    of features [N, D] to the real ones; the same without each of FOLDS folds of the former, and of
    the latter."""
    real = reference.kernel_parts
    parts = list((fake[:MOST].double() / reference.kernel_unit).tensor_split(FOLDS))
    fakes, reals = kernel_sums(parts, parts), reference.kernel_sums
    across = kernel_sums(parts, real)
    sizes = np.array([len(part) for part in parts])
    real_sizes = np.array([len(part) for part in real])

    def distance(kept, real_kept):
        n, m = sizes[kept].sum(), real_sizes[real_kept].sum()
        mean_fake = fakes[np.ix_(kept, kept)].sum() / (n * (n - 1))
        mean_real = reals[np.ix_(real_kept, real_kept)].sum() / (m * (m - 1))
        return float(mean_fake + mean_real - 2 * across[np.ix_(kept, real_kept)].sum() / (n * m))

    every = np.arange(FOLDS)
    without = [every[every != k] for k in every]
    folds = [distance(kept, every) for kept in without]
    return distance(every, every), folds, [distance(every, kept) for kept in without]


# -------------------- the judges of a study
def build_judges(c, preset, model, real: RealData | None, processes, example=None) -> list[Judge]:
    """What decides, then what only judges: the features of the model's own file, or the preset's,
    or these joined with --select-with, which then follow one by one; then those of --judge.

    Needs no network that is studied, so that what is wrong shows before one is trained. example:
    four of its images [4, C, H, W], where there are no real ones."""
    allow_tf32(c.precision)
    if real is not None:
        example = real.training.images[:4].to(c.device)

    def build():
        selecting = [model.own_features(example) or preset.features(c)]
        for name in dict.fromkeys(c.select_with):
            selecting.append(feature_network(name, c, preset, real, "--select-with"))
        unseen = [feature_network(name, c, preset, real, "--judge") for name in judge_names(c)]
        selecting = [on_device(features, c.device) for features in selecting]
        check_networks(c, selecting, unseen, example)

        if c.ref or real is None:
            judges = [judge_of_source(selecting[0], real, *reference_source(c, preset), c.device)]
        elif len(selecting) == 1:
            judges = [Judge(selecting[0], real, c.device)]
        else:
            joint = JointFeatures(selecting, real.training.images, c.device)
            judges = [Judge(joint, real, c.device)]
            judges += [Judge(part, real, c.device, is_part=True) for part in selecting]
        judges += [Judge(features, real, c.device) for features in unseen]

        # Only of a base that is trained here is it known which images it has seen.
        if real is not None and c.train_base:
            for judge in judges:
                judge.remember(real.training, c.device)
        return judges

    return processes.one_by_one(build)


def check_judges(c, preset, real: RealData | None) -> None:
    """Refuse a --judge or --select-with without real images, or whose file is missing or wrong."""
    if c.select_with and c.ref:
        raise UserError(
            "--select-with needs real images, whose features are joined: leave --ref out"
        )
    for option, names in (("--judge", judge_names(c)), ("--select-with", c.select_with)):
        if names and real is None:
            raise UserError(f"{option} {names[0]} compares with real images: give --data")
        for name in names:
            if name not in ("random-conv", "pixels", *preset.judges(c)):
                JudgeFile(name, option)


def judge_names(c) -> list[str]:
    """Judges that no selection sees."""
    return [name for name in dict.fromkeys(c.judge) if name not in ("none", *c.select_with)]


def feature_network(name: str, c, preset, real: RealData, option: str = "--judge"):
    """The feature network of one --judge or --select-with."""
    images = real.training.images
    own = preset.judges(c)
    if name in own:
        return own[name]()
    if name == "random-conv":
        return random_conv(images.shape[1])
    if name == "pixels":
        return pixels(images)
    return FileFeatures(JudgeFile(name, option), images[:4].to(c.device))


def check_networks(c, selecting, unseen, example) -> None:
    """No two of one name, and a gradient where the search needs one."""
    names = [features.name for features in selecting + unseen]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--judge, --select-with: there are two feature networks named {name}")
    if c.search == "gradient" and example is not None:
        for features in selecting:
            check_differentiable(features, example, f"the features {features.name}")


def judge_of_source(features, real, source: str, origin: str, device: str) -> Judge:
    """Judge by the statistics of a file or an address; what does not fit is not kept."""

    def check(path):
        reference_of_file(path, features, device, origin)

    path = fetch(source, "the reference statistics", check=check)
    return Judge.of_statistics(features, path, origin, device, real)


def reference_source(c, preset) -> tuple[str, str]:
    """(address or path, origin) of --ref; CIFAR-10's own statistics only for EDM's CIFAR-10
    networks, or when they are asked for."""
    if c.ref and c.ref != "cifar10":
        return c.ref, ""
    if not c.ref and (c.model or c.base not in preset.bases.values()):
        raise UserError(
            "a network of your own needs real images or statistics to be scored against: give "
            "--data IMAGES or --ref STATISTICS.npz (--ref cifar10 for CIFAR-10's own)"
        )
    return preset.statistics, preset.origin
