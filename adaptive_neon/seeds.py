"""Seeds: who may see which. Synthetic set, selection, final comparison and search never share
one."""

import dataclasses
import itertools

import numpy as np

from .files import UserError

# The first seeds of each purpose.
SELECT_SEED, FINAL_SEED, SEARCH_SEED = 10_000, 50_000, 10_000_000
MOST_SEEDS = 2**32  # then they repeat


@dataclasses.dataclass(frozen=True)
class SeedSet:
    """Consecutive seeds and what they are for."""

    purpose: str
    first: int
    count: int

    @property
    def seeds(self) -> np.ndarray:
        return np.arange(self.first, self.first + self.count)

    @property
    def last(self) -> int:
        return self.first + self.count - 1

    @property
    def is_final(self) -> bool:
        return self.purpose.startswith("final")

    def start(self, count: int) -> "SeedSet":
        """Its first seeds."""
        return dataclasses.replace(self, count=count)


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The seeds of one study."""

    selection: SeedSet
    finals: tuple[SeedSet, ...]
    search: SeedSet  # of the gradient search: no score uses them


def seed_ledger(
    select_images: int = 10_000,
    final_images: int = 50_000,
    final_repeats: int = 1,
    synthetic: int = 0,
    searched: bool = True,
    paper: bool = False,
    final_seed: int = FINAL_SEED,
) -> Ledger:
    """Disjoint seeds for every purpose. paper: the selection begins at seed 0, with the synthetic
    set, as the paper's does. UserError where two sets overlap, or where seeds would repeat."""
    selection = SeedSet("selection", 0 if paper else SELECT_SEED, select_images)
    finals = []
    for repeat in range(final_repeats):
        first = final_seed + repeat * final_images
        finals.append(SeedSet(f"final {repeat + 1}", first, final_images))
    search = SeedSet("search", SEARCH_SEED, select_images)

    sets = [SeedSet("synthetic", 0, synthetic), selection, *finals]
    if searched:
        sets.append(search)
    for one, other in itertools.combinations(sets, 2):
        announced = paper and (one.purpose, other.purpose) == ("synthetic", "selection")
        if one.first <= other.last and other.first <= one.last and not announced:
            raise UserError(
                f"seeds of the {one.purpose} set ({one.first}-{one.last}) and the {other.purpose} "
                f"set ({other.first}-{other.last}) overlap: fewer --synthetic, --select-images, "
                "--final-images or --final-repeats"
            )
    if max(seeds.last for seeds in sets) >= MOST_SEEDS:
        raise UserError("the run needs more than 2^32 seeds, which repeat: fewer images")
    return Ledger(selection, tuple(finals), search)
