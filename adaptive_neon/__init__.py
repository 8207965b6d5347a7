"""Adaptive NEON: repair a generative model that was trained on its own samples, block by block.

The engine, which knows no network. Its method on one page: study.experiment(). For a notebook:

    model = neon.Model(shape, classes, sample, loss)       what it needs of a generative model
    real = neon.split(images, labels)                      to train on, select with, judge with
    sampler = neon.Sampler(model, base)                    from seeds to images
    aux = neon.self_train(model, base, *sampler.images(range(6000)), kimg=500)
    scorer = neon.Scorer(sampler, neon.Merger(base, aux, "layers"), [neon.Judge(features, real)])
    best = neon.choose(neon.sweep(scorer, [0, 0.5, 1, 1.5]))
    found = neon.choose(neon.descend(scorer, best.w, evaluations=20))
    scorer.compare(found.w, best.w)                        on fresh noise and real images
"""

__version__ = "0.1.0"  # of the package and of neon_ext alike

from . import (
    blocks,
    cli,
    config,
    controls,
    diffusers,
    extension,
    features,
    files,
    glyphs,
    images,
    judges,
    keys,
    modelfile,
    pickles,
    plots,
    processes,
    report,
    sampling,
    scores,
    search,
    seeds,
    stats,
    study,
    train,
    verdicts,
)
from .blocks import Merger
from .features import inception, pixels, random_conv
from .files import UserError
from .images import RealData, read_dataset, write_dataset
from .judges import Judge
from .sampling import Model, Sampler
from .scores import Score, ScoreLog, Scorer
from .search import choose, cobyqa, descend, grid, race, sweep
from .seeds import Ledger, seed_ledger
from .stats import Comparison, compare
from .train import self_train

__all__ = [
    "blocks",
    "cli",
    "config",
    "controls",
    "diffusers",
    "extension",
    "features",
    "files",
    "glyphs",
    "images",
    "judges",
    "keys",
    "modelfile",
    "pickles",
    "plots",
    "processes",
    "report",
    "sampling",
    "scores",
    "seeds",
    "search",
    "stats",
    "study",
    "train",
    "verdicts",
    "Comparison",
    "Judge",
    "Ledger",
    "Merger",
    "Model",
    "RealData",
    "Sampler",
    "Score",
    "ScoreLog",
    "Scorer",
    "UserError",
    "choose",
    "cobyqa",
    "compare",
    "descend",
    "grid",
    "inception",
    "pixels",
    "race",
    "random_conv",
    "read_dataset",
    "seed_ledger",
    "self_train",
    "sweep",
    "write_dataset",
]
