"""Memorisation: do samples lie closer to the training images than to images nobody trained on?"""

import dataclasses

import torch

from .keys import memory_key

MOST = 10_000  # images of each kind


@dataclasses.dataclass(frozen=True)
class Memory:
    """Real images in one feature network: those that the base was trained on, and as many that it
    never saw, float [N, D] each."""

    trained: torch.Tensor
    unseen: torch.Tensor

    @property
    def identity(self) -> str:
        return memory_key(trained=self.trained, unseen=self.unseen)

    @torch.no_grad()
    def share(self, points: torch.Tensor) -> float:
        """Share of the points [M, D] whose nearest image is one that was trained on; ties count
        half. Without memorisation it is one half, since there are as many of either kind."""
        points = points[:MOST].double()
        to_trained = nearest(points, self.trained.double())
        to_unseen = nearest(points, self.unseen.double())
        closer = (to_trained < to_unseen).double() + 0.5 * (to_trained == to_unseen).double()
        return float(closer.mean())


def nearest(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Distance of each of the points [M, D] to the nearest of the others [N, D]: float64 [M]."""
    parts = [torch.cdist(part, others).min(1).values for part in points.split(1000)]
    return torch.cat(parts)


def memory_of(trained: torch.Tensor, unseen: torch.Tensor) -> Memory:
    """Of features [N, D] and [M, D], as many of either."""
    count = min(len(trained), len(unseen), MOST)
    return Memory(trained[:count], unseen[:count])
