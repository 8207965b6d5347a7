"""A judge: a feature network, and the real images seen through it."""

import dataclasses
import functools

import numpy as np
import torch

from .extension import neon_ext
from .features import (
    FileFeatures,
    InceptionFeatures,
    JointFeatures,
    PixelFeatures,
    RandomConvFeatures,
    check_differentiable,
    features_of_images,
)
from .files import UserError, fetch, reading, write_atomically
from .keys import key_of, tensor_hash
from .sampling import allow_tf32
from .stats import FOLDS


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of the real data in one feature network. prepared: neon_ext.FrechetReference;
    real: the features themselves [N, D] where they are at hand; facts: features, source, images,
    origin, for the report."""

    prepared: object
    real: torch.Tensor | None
    facts: dict
    identity: str  # hash of mean, covariance and features

    @functools.cached_property
    def radii(self):
        """Of precision_recall(), which needs them for every score."""
        return neighbour_radii(self.real)

    @functools.cached_property
    def kernel_mean(self):
        """Of kernel_distance(): the mean kernel of two different real images."""
        real = self.real[:KERNEL_IMAGES].double()
        rows, diagonal = kernel_rows(real, real), kernel_diagonal(real)
        return float(rows.sum() - diagonal.sum()) / (len(real) * (len(real) - 1))


def reference_of(statistics, features, source, device, real=None, origin=""):
    """Reference from {mu [D], sigma [D, D], images, features}, if they are of these features and
    usable."""
    kind, shape = str(statistics["features"]), np.shape(statistics["mu"])
    if shape != (features.dim,) or kind not in (features.name, features.kind):
        raise UserError(
            f"reference {source} has {shape} statistics of {kind}, the features are "
            f"{features.name}, {features.dim}-d: use statistics of the same features"
        )
    count = int(statistics["images"])
    with reading(f"reference {source} has no usable mu and sigma"):
        mu, cov = (torch.as_tensor(statistics[key]).double().to(device) for key in ("mu", "sigma"))
        prepared = neon_ext.FrechetReference(mu, cov)
    facts = {"features": features.name, "source": str(source), "images": count}
    if origin:
        facts["origin"] = origin
    identity = key_of(
        tensor_hash(mu), tensor_hash(cov), count, None if real is None else tensor_hash(real)
    )
    return Reference(prepared, real, facts, identity)


def reference_from_images(real, features, path, device, origin=""):
    """Reference of real images; path, if any, keeps its statistics."""
    found = features_of_images(real.images, features, device)
    mu, cov = (moment.cpu().numpy() for moment in neon_ext.feature_moments(found))
    statistics = {"mu": mu, "sigma": cov, "images": len(real.images), "features": features.name}

    def write(part):
        np.savez(part, **statistics)

    if path is not None:
        write_atomically(path, write)
    return reference_of(statistics, features, real.source, device, found, origin)


def reference_from_file(path, features, device, real=None, origin=""):
    """Reference of an npz with mu and sigma, as EDM's (which leaves features and images out). real:
    images for precision, recall and the kernel distance, which need more than moments."""
    with reading(f"reference {path} has no usable mu and sigma"), np.load(path) as file:
        statistics = {"features": "inception", "images": 50_000} | dict(file)
        for key in ("mu", "sigma"):
            if key not in statistics:
                raise KeyError(key)
    found = None if real is None else features_of_images(real.images, features, device)
    return reference_of(statistics, features, path, device, found, origin)


@dataclasses.dataclass(frozen=True)
class Judge:
    """A feature network and the real data seen through it: what a score is. Weights are selected
    against one part of the real images and compared against another, where there are two."""

    features: object  # callable with dim, name, kind, score, identity, perhaps facts
    selection: Reference
    final: Reference
    is_part: bool = False  # of the joint features that the selection saw

    def reference(self, seeds):
        """The one that scores of this SeedSet are distances to."""
        return self.final if seeds.is_final else self.selection

    def identity(self, seeds):
        return key_of(self.features.identity, self.reference(seeds).identity)

    @property
    def name(self):
        return self.features.name

    @property
    def facts(self):
        """For the report: features, source, images of the final reference, and what else is
        known."""
        facts = dict(self.final.facts) | getattr(self.features, "facts", {})
        if self.selection is not self.final:
            facts["selection"] = self.selection.facts
        return facts

    def floor(self, images):
        """The final score of real images, the first of the selection part: bias, and the best that
        a model can hope for."""
        moments = neon_ext.feature_moments(self.selection.real[:images])
        return {"images": images, "fd": float(self.final.prepared.distance(*moments))}


def judge_of_images(features, real, device, folder=None, is_part=False):
    """Judge of a feature network with the selection and final parts of the real images as
    references; folder, if any, keeps their statistics."""
    references = {}
    for purpose in ("selection", "final"):
        path = None if folder is None else folder / f"reference-{purpose}.npz"
        part = getattr(real, purpose)
        references[purpose] = reference_from_images(part, features, path, device, real.origin)
    return Judge(features, **references, is_part=is_part)


def judge_of_file(features, real, source, origin, c):
    """Judge of a feature network with the statistics of a file, the same for selection and final
    comparison; real images, if any, serve precision, recall and the kernel distance."""

    def check(path):
        reference_from_file(path, features, c.device, None, "")

    path = fetch(source, "the reference statistics", check=check)
    origin = origin or "of unknown origin: base and selection may have seen its images"
    if real is None:
        reference = reference_from_file(path, features, c.device, None, origin)
        return Judge(features, reference, reference)
    parts = (real.selection, real.final)
    references = [reference_from_file(path, features, c.device, r, origin) for r in parts]
    return Judge(features, *references)


def neighbour_radii(points, k=5, most=10_000):
    """Distance of each of the first `most` points [N, D] to its k-th neighbour: float64 [N]."""
    points = points[:most].double()
    # A point's own zero distance is its first neighbour, hence k + 1.
    radii = [torch.cdist(part, points).kthvalue(k + 1).values for part in points.split(1000)]
    return torch.cat(radii)


@torch.no_grad()
def precision_recall(real, fake, k=5, most=10_000, real_radii=None):
    """Improved precision and recall (arXiv 1904.06991), k nearest neighbours, at most `most` of
    each."""
    real, fake = real[:most].double(), fake[:most].double()

    def share_inside(points, manifold, radii):
        hits = [(torch.cdist(part, manifold) <= radii).any(1) for part in points.split(1000)]
        return float(torch.cat(hits).double().mean())

    if real_radii is None:
        real_radii = neighbour_radii(real, k, most)
    precision = share_inside(fake, real, real_radii)
    return precision, share_inside(real, fake, neighbour_radii(fake, k, most))


KERNEL_IMAGES = 10_000  # at most, of each side of the kernel distance


def kernel_rows(points, others):
    """Sum over `others` [M, D] of the kernel (x y / D + 1)^3 with each of the points [N, D]:
    float64 [N]."""
    sums = []
    for part in points.split(500):
        near = part @ others.T / points.shape[1] + 1
        sums.append((near * near * near).sum(1))
    return torch.cat(sums)


def kernel_diagonal(points):
    """The kernel of each point with itself: float64 [N]."""
    return ((points * points).sum(1) / points.shape[1] + 1) ** 3


@torch.no_grad()
def kernel_distance(reference, fake):
    """Kernel Inception distance (arXiv 1801.01401): the unbiased squared maximum mean discrepancy
    to the real features, and the same without each of FOLDS folds of the fake ones [N, D]."""
    real = reference.real[:KERNEL_IMAGES].double()
    parts = fake[:KERNEL_IMAGES].double().tensor_split(FOLDS)
    sizes = np.array([len(part) for part in parts])

    # Sums of kernels between folds, without those of an image with itself, and with the real ones.
    within = np.zeros((FOLDS, FOLDS))
    for k, part in enumerate(parts):
        for j, other in enumerate(parts):
            within[k, j] = float(kernel_rows(part, other).sum())
        within[k, k] -= float(kernel_diagonal(part).sum())
    across = np.array([float(kernel_rows(part, real).sum()) for part in parts])

    def distance(kept):
        n = sizes[kept].sum()
        fakes = within[np.ix_(kept, kept)].sum() / (n * (n - 1))
        return reference.kernel_mean + fakes - 2 * across[kept].sum() / (n * len(real))

    every = np.arange(FOLDS)
    return float(distance(every)), [float(distance(every[every != k])) for k in every]


def check_judges(c, preset, real):
    """Refuse a --judge or --select-with without real images, or whose file is missing or wrong,
    before anything is trained."""
    if c.select_with and c.ref:
        raise UserError(
            "--select-with needs real images, whose features are joined: leave --ref out"
        )
    for option, names in (("--judge", judge_names(c)), ("--select-with", c.select_with)):
        if names and real is None:
            raise UserError(f"{option} {names[0]} compares with real images: give --data")
        for name in names:
            if name not in ("random-conv", "pixels", *preset.judges(c)):
                open_judge_file(name, option)


def judge_names(c):
    """Judges that no selection sees."""
    return [name for name in dict.fromkeys(c.judge) if name not in ("none", *c.select_with)]


def build_judges(c, preset, model, real, processes, example=None):
    """What decides, then what only judges. The first: the features of the model's own file, or the
    preset's, or these joined with --select-with, which then follow one by one; then those of
    --judge. With their references. Needs no network that is studied; example: four images of
    it, where there are no real ones."""
    allow_tf32(c.precision)

    def build():
        shown = example if real is None else real.training.images[:4].to(c.device)
        own = (model.own_features(shown) or preset.features(c)).to(c.device)
        if c.device == "cuda" and isinstance(own, InceptionFeatures):
            own.to(memory_format=torch.channels_last)  # its convolutions follow their weights

        # The feature networks, before their references are computed.
        selecting, unseen = [own], []
        for name in dict.fromkeys(c.select_with):
            selecting.append(feature_network(name, c, preset, real, "--select-with").to(c.device))
        for name in judge_names(c):
            unseen.append(feature_network(name, c, preset, real).to(c.device))
        names = [features.name for features in selecting + unseen]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"--judge, --select-with: there are two feature networks named {name}"
                )

        # The references: of what decides, of its parts, of what only judges.
        if c.ref or real is None:
            judges = [judge_of_file(own, real, *reference_source(c, preset), c)]
        elif len(selecting) == 1:
            judges = [judge_of_images(own, real, c.device, c.out)]
        else:
            images = real.training.images
            if c.search == "gradient":
                for part in selecting:
                    few = images[:4].to(c.device)
                    check_differentiable(part, few, f"the features {part.name}")
            joint = JointFeatures(selecting, images, c.device)
            judges = [judge_of_images(joint, real, c.device, c.out)]
            judges += [judge_of_images(part, real, c.device, is_part=True) for part in selecting]
        judges += [judge_of_images(features, real, c.device) for features in unseen]
        return judges

    return processes.one_by_one(build)


def feature_network(name, c, preset, real, option="--judge"):
    """The feature network of one --judge or --select-with."""
    images = real.training.images
    own = preset.judges(c)
    if name in own:
        return own[name]()
    if name == "random-conv":
        return RandomConvFeatures(images.shape[1])
    if name == "pixels":
        return PixelFeatures(images)
    return FileFeatures(open_judge_file(name, option), images[:4].to(c.device))


def open_judge_file(path, option):
    # The module of model files stands above this one; only this class of it is needed here.
    from .modelfile import JudgeFile

    return JudgeFile(path, option)


def reference_source(c, preset):
    """--ref; CIFAR-10's own statistics only for EDM's CIFAR-10 networks, or when they are asked
    for."""
    if c.ref and c.ref != "cifar10":
        return c.ref, ""
    if not c.ref and (c.model or c.base not in preset.bases.values()):
        raise UserError(
            "a network of your own needs real images or statistics to be scored against: give "
            "--data IMAGES or --ref STATISTICS.npz (--ref cifar10 for CIFAR-10's own)"
        )
    return preset.statistics, preset.origin
