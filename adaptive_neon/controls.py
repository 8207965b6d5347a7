"""Controls: what a critic asks for first, from the same seeds and in the same table.

Twice the sampler's steps, which cost what a comparison of two networks costs; the guided network,
which extrapolates outputs instead of weights (SIMS, arXiv 2408.16333; autoguidance, arXiv
2406.02507, is its relative); the base trained on real images for as long as the self-training took;
where images are sampled with classifier-free guidance, the base with more or less of it.
"""

import contextlib
import copy

import torch
from torch import nn

from .blocks import Merger, copied
from .processes import Diverged
from .sampling import Model, Sampler
from .scores import Score, Scorer

TWICE = "base, twice the steps"
GUIDED = "guided"
TRAINED_ON = "base, trained on"
GUIDANCE = "guidance"  # a setting of the model's own, and the name of its control
EQUAL = "base, equal adherence"


def with_steps(scorer: Scorer, steps: int) -> Scorer:
    """The same networks, sampled in so many steps."""
    other = copy.copy(scorer)
    other.sampler = copy.copy(scorer.sampler)
    other.sampler.steps = steps
    return other


def with_settings(scorer: Scorer) -> Scorer:
    """Scores of the base whose sample() has other settings, which stand in the place of weights."""
    other = copy.copy(scorer)
    other.sampler = copy.copy(scorer.sampler)
    other.sampler.model = copy.copy(scorer.sampler.model)
    other.merger = Settings(scorer.merger, other.sampler.model)
    return other


class Settings(Merger):
    """The base, and settings of its sampler."""

    def __init__(self, merger: Merger, model: Model):
        vars(self).update(vars(merger))
        self.plain, self.model = merger, model

    def weights(self, w):
        return w

    def parameter_weights(self, w):
        """No parameter moves: other keys than those of merged networks."""
        return {f"sample({name})": value for name, value in w.items()}

    def set(self, w):
        self.model.settings = w
        return self.plain.set(0.0)


def guided(scorer: Scorer) -> Scorer | None:
    """Scores of the guided network, whose one weight says how far outputs step back; None where the
    sampler makes no network calls that could be guided."""
    plain, merger = scorer.sampler, scorer.merger
    net = Guided(merger.base, merger.aux)
    if not is_called(plain, net):
        return None
    sampler = Sampler(
        plain.model, net, plain.steps, plain.batch, plain.labels, plain.processes, plain.compiled
    )
    return Scorer(
        sampler,
        Guide(merger.base, merger.aux),
        scorer.judges,
        scorer.log,
        scorer.seeds,
        scorer.selection_precision,
        scorer.final_precision,
        scorer.snapshot,
    )


class Guided(nn.Module):
    """(1 + w) base(...) - w self_trained(...) in every call; everything else is asked of the
    base."""

    w: torch.Tensor

    def __init__(self, base: nn.Module, aux: nn.Module):
        super().__init__()
        self.base, self.aux = copied(base), copied(aux)
        self.register_buffer("w", torch.zeros(()))  # no number, which would be compiled in

    def forward(self, *args, **kwargs):
        return extrapolated(self.base(*args, **kwargs), self.aux(*args, **kwargs), self.w)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def extrapolated(ours, theirs, w):
    """ours + w (ours - theirs), in whatever containers of tensors the networks give."""
    if isinstance(ours, torch.Tensor):
        return ours + w.to(ours.dtype) * (ours - theirs) if ours.is_floating_point() else ours
    if isinstance(ours, dict):
        return type(ours)((key, extrapolated(ours[key], theirs[key], w)) for key in ours)
    if isinstance(ours, (tuple, list)):
        parts = [extrapolated(one, other, w) for one, other in zip(ours, theirs, strict=True)]
        return type(ours)(*parts) if hasattr(ours, "_fields") else type(ours)(parts)
    return ours


def is_called(sampler: Sampler, net: nn.Module) -> bool:
    """Whether the model's sampler calls the network itself, not only parts of it."""
    calls = []
    model, processes = sampler.model, sampler.processes
    trial = Sampler(model, net, sampler.steps, 1, sampler.labels, processes, compiled=False)
    trial.net.register_forward_pre_hook(lambda *_: calls.append(True))
    with contextlib.suppress(Diverged):
        trial.batch_images([0])
    return bool(calls)


class Guide(Merger):
    """Of the guided network: one block, whose weight is that of the outputs."""

    def __init__(self, base: nn.Module, aux: nn.Module):
        super().__init__(base, aux, lambda name: "guidance")

    def attach(self, net: nn.Module) -> None:
        self.net = net

    def parameter_weights(self, w: dict[str, float]) -> dict[str, float]:
        """No parameter moves: other keys than those of merged networks."""
        return {"outputs": w["guidance"]}

    def set(self, w: float | dict[str, float]) -> nn.Module:
        assert isinstance(self.net, Guided)
        self.net.w.fill_(self.weights(w)["guidance"])
        return self.net


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
