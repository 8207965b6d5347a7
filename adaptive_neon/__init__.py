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

__version__ = "0.2.0"  # of the package and of neon_ext alike

from . import cli  # noqa: F401  and with it every module of the engine
from .blocks import Merger as Merger
from .features import inception as inception
from .features import pixels as pixels
from .features import random_conv as random_conv
from .files import UserError as UserError
from .images import RealData as RealData
from .images import read_dataset as read_dataset
from .images import split as split
from .judges import Judge as Judge
from .sampling import Model as Model
from .sampling import Sampler as Sampler
from .scores import ScoreLog as ScoreLog
from .scores import Scorer as Scorer
from .search import choose as choose
from .search import cobyqa as cobyqa
from .search import descend as descend
from .search import grid as grid
from .search import sweep as sweep
from .seeds import seed_ledger as seed_ledger
from .stats import compare as compare
from .train import self_train as self_train
