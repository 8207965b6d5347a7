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
from .scores import Scorer
from .search import choose

TWICE = "base, twice the steps"
GUIDED = "guided"
TRAINED_ON = "base, trained on"


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
GUIDANCES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # shares of the model's own


class OverGuidance(Merger):
    """The base alone; its one weight is the guidance that it is sampled with. model: one that this
    may write to."""

    def __init__(self, plain: Merger, model):
        vars(self).update(vars(plain))
        self.plain, self.model = plain, model
        self.use(dict.fromkeys(plain.owners, "guidance"))

    def parameter_weights(self, w: dict[str, float]) -> dict[str, float]:
        return {"guidance": w["guidance"]}

    def set(self, w: float | dict[str, float]) -> nn.Module:
        self.model.guidance = self.weights(w)["guidance"]
        return self.plain.set(0.0)


def guidance_controls(scorer: Scorer, repaired) -> dict[str, tuple]:
    """{name: (weights, distance, scorer)} of the base at its best guidance, and at the one where
    it does as much of what was asked for as `repaired` (a Candidate) does; a repair can gain in
    distance by asking for less. Empty where images are sampled without guidance."""
    own = getattr(scorer.sampler.model, "guidance", 1.0)
    if own <= 1:
        return {}
    over = copy.copy(scorer)
    over.sampler = copy.copy(scorer.sampler)
    over.sampler.model = copy.copy(scorer.sampler.model)
    over.merger = OverGuidance(scorer.merger, over.sampler.model)

    values = sorted({1.0, *(max(1.0, round(own * share, 3)) for share in GUIDANCES)})
    tried = over.score_all(values, "guidance")
    best = choose(tried)
    found = {"base, best guidance": (best.w, best.fd, over)}

    # Adherence of both, on the selection's seeds and in the first judge that knows it.
    asked = next((judge for judge in scorer.judges if scorer.alignment_of(judge)), None)
    if asked is None:
        return found
    seeds = scorer.seeds.selection
    curve = [over.scores(score.w, seeds, [asked])[0].alignment for score in tried]
    (goal,) = repaired.scorer.scores(repaired.w, seeds, [asked])
    equal = crossing(values, curve, goal.alignment)
    if equal is None:
        if scorer.sampler.processes.rank == 0:
            print(
                f"no guidance from {values[0]:g} to {values[-1]:g} gives the base equal adherence"
            )
        return found
    w = over.merger.weights(equal)
    return found | {"base, equal adherence": (w, over.score(w).fd, over)}


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
