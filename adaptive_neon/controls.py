"""Controls: what a critic asks for first, from the same seeds and in the same table.

Twice the sampler's steps, which cost what a comparison of two networks costs; the guided network,
which extrapolates outputs instead of weights (SIMS, arXiv 2408.16333; autoguidance, arXiv
2406.02507, is its relative); the base trained on real images for as long as the self-training took;
where images are sampled with classifier-free guidance, the base with more or less of it.
"""

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import nn

from .blocks import Merger, copied
from .processes import Diverged
from .sampling import Sampler, mapped
from .scores import Score, Scorer

TWICE = "base, twice the steps"
GUIDED = "guided"
TRAINED_ON = "base, trained on"
GUIDANCE = "guidance"  # a setting of the model's own, and the name of its control
EQUAL = "base, equal adherence"


class Settings(Merger):
    """In the place of a merger: the base under settings {name: value}, which are no block weights.

    key: a setting's name in keys of scores, from its own; apply(settings) -> the network."""

    def __init__(self, merger: Merger, key: str, apply: Callable[[dict], nn.Module]):
        vars(self).update(vars(merger))
        self.key, self.apply = key, apply

    def attach(self, net):
        self.net = net

    def weights(self, w):
        return w

    def parameter_weights(self, w):
        """No parameter moves: other keys than those of merged networks."""
        return {self.key.format(name): value for name, value in w.items()}

    def set(self, w):
        return self.apply(w)


def with_steps(scorer: Scorer, steps: int) -> Scorer:
    """The same networks, sampled in so many steps."""
    sampler = copy.copy(scorer.sampler)
    sampler.steps = steps
    return scorer.of(sampler=sampler)


def with_settings(scorer: Scorer) -> Scorer:
    """Scores of the base whose sample() has other settings."""
    sampler = copy.copy(scorer.sampler)
    sampler.model = copy.copy(scorer.sampler.model)

    def apply(settings):
        sampler.model.settings = settings
        return scorer.merger.set(0.0)

    return scorer.of(Settings(scorer.merger, "sample({})", apply), sampler)


def guided(scorer: Scorer) -> Scorer | None:
    """Scores of the guided network, whose one setting says how far outputs step back; None where
    the sampler makes no network calls that could be guided."""
    plain = scorer.sampler
    if not calls_network(plain):
        return None
    sampler = Sampler(
        plain.model,
        Guided(scorer.merger.base, scorer.merger.aux),
        plain.steps,
        plain.batch,
        plain.labels,
        plain.processes,
        plain.compiled,
    )

    def apply(settings):
        sampler.net.get_buffer("w").fill_(settings[GUIDANCE])
        return sampler.net

    return scorer.of(Settings(scorer.merger, "outputs", apply), sampler)


def calls_network(sampler: Sampler) -> bool:
    """Whether the model's sampler calls the network itself, not only parts of it."""
    calls: list[bool] = []
    hook = sampler.net.register_forward_pre_hook(lambda *_: calls.append(True))
    with hook, contextlib.suppress(Diverged):
        sampler.batch_images([0])
    return bool(calls)


class Guided(nn.Module):
    """(1 + w) base(...) - w self_trained(...) in every call; everything else is asked of the
    base."""

    w: torch.Tensor

    def __init__(self, base: nn.Module, aux: nn.Module):
        super().__init__()
        self.base, self.aux = copied(base), copied(aux)
        self.register_buffer("w", torch.zeros(()))  # no number, which would be compiled in

    def forward(self, *args, **kwargs):
        return mapped(self.extrapolated, self.base(*args, **kwargs), self.aux(*args, **kwargs))

    def extrapolated(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        if not ours.is_floating_point():
            return ours
        return ours + self.w.to(ours.dtype) * (ours - theirs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


# -------------------- the base over guidance
def equal_adherence(over: Scorer, settings: list[dict], repaired) -> Score | None:
    """Of the base with the guidance at which it does as much of what was asked for as `repaired` (a
    Candidate) does: a repair can gain in distance by asking for less. over: with_settings() of the
    base; settings: the guidances that were tried. Adherence is that on the selection's seeds, in
    the first judge that knows it; None where none does, or where no guidance gives it."""
    asked = next((judge for judge in over.judges if over.alignment_of(judge)), None)
    if asked is None:
        return None
    seeds = over.seeds.selection
    curve = [over.scores(w, seeds, [asked])[0].alignment for w in settings]
    (goal,) = repaired.scorer.scores(repaired.w, seeds, [asked])
    equal = crossing([w[GUIDANCE] for w in settings], curve, goal.alignment)
    if equal is None and over.sampler.processes.rank == 0:
        print("no control of equal adherence: no guidance that was tried gives the base as much")
    return None if equal is None else over.score({GUIDANCE: equal})


def crossing(x, y, value) -> float | None:
    """Where the line through the points first has this value; None where it has not, or where a
    point is not known."""
    if value is None or None in y:
        return None
    for k in range(len(x) - 1):
        low, high = sorted(y[k : k + 2])
        if low <= value <= high:
            share = 0.5 if low == high else (value - y[k]) / (y[k + 1] - y[k])
            return round(x[k] + share * (x[k + 1] - x[k]), 4)
    return None
