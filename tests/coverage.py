"""How often does a 95% interval hold the true difference? Measured on Gaussian features.

    python tests/coverage.py --out results/coverage.md

Two models and real images of known means and covariances, drawn again and again; the comparison is
that of the final comparison of a study. 93 to 97% is wanted.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import torch

import adaptive_neon as neon
from adaptive_neon.extension import neon_ext


@dataclasses.dataclass(frozen=True)
class Setting:
    """Features of D dimensions: of N images of each of two models, of M real ones. The real ones
    have mean 0 and standard deviations from 1 down to 10^decay; a model is shifted by so much and
    wider by a factor. correlation: of the two models' noise."""

    name: str
    dim: int
    images: int
    real: int
    correlation: float
    one: tuple[float, float]
    other: tuple[float, float]
    decay: float = -1.5

    @property
    def scales(self) -> torch.Tensor:
        return torch.logspace(0, self.decay, self.dim, dtype=torch.float64)

    @property
    def truth(self) -> float:
        """Difference of the true Fréchet distances."""
        variance = float(self.scales.square().sum())
        ours, theirs = (
            shift**2 + (width - 1) ** 2 * variance for shift, width in (self.one, self.other)
        )
        return ours - theirs


SETTINGS = (
    Setting("identical models", 64, 2_000, 20_000, 0.0, (0.3, 1.1), (0.3, 1.1)),
    Setting("one is shifted", 64, 3_000, 3_000, 0.9, (0.5, 1.0), (0.2, 1.0)),
    Setting("one is wider", 64, 3_000, 3_000, 0.0, (0.3, 1.2), (0.3, 1.0)),
    Setting("wider against shifted", 64, 8_000, 2_000, 0.9, (0.3, 1.2), (0.5, 1.0)),
    Setting("one is wider", 256, 2_000, 20_000, 0.9, (0.3, 1.2), (0.3, 1.0)),
    Setting("identical models", 256, 3_000, 3_000, 0.0, (0.3, 1.1), (0.3, 1.1)),
    Setting("one is shifted", 256, 3_000, 3_000, 0.9, (0.5, 1.0), (0.2, 1.0)),
    Setting("wider against shifted", 256, 8_000, 2_000, 0.0, (0.3, 1.2), (0.5, 1.0)),
)

# Equal true distances, few images: uncorrected, the wider model is always worse.
FLAT = Setting(
    "equal distances, flat spectrum", 256, 1_000, 20_000, 0.0, (0.0, 1.15), (1.50166, 1.0), -0.5
)


def scores_of(reference, features):
    """What a comparison needs of a Score."""
    fd, folds = reference.prepared.fold_distances(features, neon.stats.FOLDS)
    real_folds = neon.judges.distances_without_real(reference, features)
    corrected = neon.stats.without_bias(fd, folds, real_folds)
    return [SimpleNamespace(fd=fd, folds=folds, real_folds=real_folds, corrected=corrected)]


def run(setting: Setting, repeats: int, seed: int = 1) -> list:
    """[Comparison] of so many repetitions."""
    generator = torch.Generator().manual_seed(seed)

    def noise(count):
        return torch.randn(count, setting.dim, generator=generator, dtype=torch.float64)

    def model(z, shift, width):
        return z * setting.scales * width + shift / setting.dim**0.5

    found = []
    for _ in range(repeats):
        real = noise(setting.real) * setting.scales
        prepared = neon_ext.FrechetReference(*neon_ext.feature_moments(real))
        reference = neon.judges.Reference(prepared, real, {}, "")

        z = noise(setting.images)
        apart = (1 - setting.correlation**2) ** 0.5
        y = setting.correlation * z + apart * noise(setting.images)
        ours = scores_of(reference, model(z, *setting.one))
        theirs = scores_of(reference, model(y, *setting.other))
        found.append(neon.stats.compare(ours, theirs))
    return found


def row_of(setting: Setting, found: list) -> dict[str, str]:
    """The cells of one setting."""

    def missed(key, half):
        return sum(abs(getattr(gain, key) - setting.truth) > half(gain) for gain in found)

    def half(gain):
        return gain.high - gain.difference

    count = len(found)
    inside = 1 - missed("difference", half) / count
    verdicts = [gain.verdict for gain in found]
    wrong = "worse" if setting.truth < -1e-9 else "better"
    false = count - verdicts.count("no significant difference")
    if abs(setting.truth) > 1e-3:
        false = verdicts.count(wrong)
    return {
        "D": str(setting.dim),
        "N": f"{setting.images:,}",
        "M": f"{setting.real:,}",
        "N/M": f"{setting.images / setting.real:g}",
        "models": setting.name,
        "correlation": f"{setting.correlation:g}",
        "runs": str(count),
        "truth inside": f"{inside:.1%} +- {math.sqrt(inside * (1 - inside) / count):.1%}",
        "without the correction": f"{1 - missed('plain', half) / count:.1%}",
        "false verdicts": f"{false / count:.1%}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=400, help="half as many at D = 256")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of settings, from 0")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    for number, setting in enumerate((*SETTINGS, FLAT)):
        if args.only is None or number in args.only:
            repeats = args.repeats if setting.dim < 100 else args.repeats // 2
            rows.append(row_of(setting, run(setting, repeats)))
            print(" | ".join(rows[-1].values()), flush=True)
    text = (
        "# Coverage of 95% intervals\n\n"
        f"`python tests/coverage.py --repeats {args.repeats}`: {__doc__.splitlines()[0]} "
        "D features, N images of each model, M real ones; 93 to 97% is wanted. Without the "
        "correction: the same interval around the difference of the plain distances.\n\n"
        f"{neon.report.markdown(rows)}\n"
    )
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
