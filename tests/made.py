"""Studies made by hand: two seed sets, two snapshots, unequal folds, nothing in order."""

import itertools

import numpy as np

import adaptive_neon as neon
from adaptive_neon.verdicts import sentence_case

BLOCKS = ("enc", "mid", "dec")
SCORE = "FD (own+two, 4-d)"
FOLDS = neon.stats.FOLDS


def score(fd, folds=None, w=None, **changes):
    """A score made by hand; folds: 20 numbers, or how far they scatter."""
    if not np.isfinite(fd):
        folds = [fd] * FOLDS
    elif folds is None or np.isscalar(folds):
        rng = np.random.default_rng(round(abs(fd) * 1000))
        folds = fd + (folds or 0.0) * rng.standard_normal(FOLDS)
    fields = {
        "snapshot": 1,
        "w": w or dict.fromkeys(BLOCKS, 0.0),
        "images": 100,
        "first_seed": 0,
        "fd": fd,
        "folds": [float(fold) for fold in folds],
        "precision": None,
        "recall": None,
        "arithmetic": "fp32",
        "seconds": 0.5,
        "key": "k",
    }
    return neon.scores.Score(**{**fields, **changes})


# Distances of every model in the judges own, b and a (not in alphabetical order).
LEVELS = {
    "base": (30.1, 91.2, 4.13),
    "collapsed": (55.3, 140.4, 9.77),
    "global": (21.4, 95.7, 3.05),
    "blockwise": (24.8, 70.9, 3.061),
    "searched": (17.2, 88.6, 2.22),
    "random blocks 1": (23.3, 93.1, 3.4),
    "random blocks 2": (26.9, 99.9, 2.7),
}
JUDGES = ("own", "b", "a")


def finals_of(kimg=5, shift=0.0, levels=LEVELS, judges=JUDGES, spread=0.15):
    """{judge: {model: [Score of both seed sets]}}. shift: of what is not the base, in shares."""
    finals = {}
    for j, judge in enumerate(judges):
        finals[judge] = {}
        for m, (name, values) in enumerate(levels.items()):
            finals[judge][name] = []
            w = dict(zip(BLOCKS, (m - 1.0, m - 1.0 + (m > 2) / 4, m - 1.0), strict=True))
            for k in (0, 1):
                rng = np.random.default_rng([j, m, k, kimg])
                fd = values[j] * (1 + shift * (m > 0)) + 0.01 * kimg + 0.3 * k * (1 + m % 2)
                finals[judge][name].append(
                    score(
                        fd,
                        spread * values[j] / 100,
                        w,
                        precision=0.4 + 0.03 * m + 0.002 * k,
                        recall=0.9 - 0.05 * m - 0.004 * k,
                        kernel=0.01 * values[j] + 0.001 * k,
                        kernel_folds=list(0.01 * values[j] * (1 + rng.normal(size=FOLDS) / 900)),
                        kernel_real_folds=list(
                            0.01 * values[j] * (1 + rng.normal(size=FOLDS) / 800)
                        ),
                        corrected=0.95 * fd - 0.03 * values[j],
                        real_folds=list(fd + spread * values[j] / 80 * rng.normal(size=FOLDS)),
                    )
                )
    return finals


def entry_of(kimg=5, shift=0.0, finals=None):
    """One snapshot as it stands in summary.json, before that is made strict."""
    finals = finals or finals_of(kimg, shift)
    own = finals["own"]
    models = [name for name in own if not name.startswith("random")]

    def row(one, **more):
        return {"w": one.w, "fd": one.fd, **neon.stats.fd_interval([one]), **more}

    sweep = []
    for value in (0.5, -1.0, 0.0, 1.5):
        one = score(20 + kimg + value, 0.2, dict.fromkeys(BLOCKS, value))
        sweep.append(row(one, w_global=value, precision=0.5 + value / 9, recall=0.5 - value / 9))
    grid = []
    for w in itertools.product((1.0, 0.5), (0.25, 1.0), (0.5, 1.0, 0.75)):
        one = score(20 + w[0] - 2 * w[1] + 3 * w[2], 0.2, dict(zip(BLOCKS, w, strict=True)))
        grid.append(row(one))
    judges = {}
    for judge in list(finals)[1:]:
        shown = {name: finals[judge][name] for name in models}
        judges[judge] = {
            "score": f"FD ({judge})",
            "final": neon.verdicts.final_comparison(shown),
        }
    placebo = []
    for name in own:
        if name.startswith("random"):
            gain = neon.stats.compare(own[name], own["global"])
            placebo.append({"w": own[name][0].w, "fd": 1.0, "against_global": gain.as_json()})
    claims = neon.verdicts.claims_of(finals)
    selection = {name: {"w": own[name][0].w, "fd": own[name][0].fd - 2.5} for name in models}
    return {
        "kimg": kimg,
        "blocks": dict.fromkeys(BLOCKS, {}),
        "sweep": sweep,
        "grid": grid,
        "search": [],
        **selection,
        "final": neon.verdicts.final_comparison({name: own[name] for name in models}),
        "placebo": placebo,
        "warnings": [f"mind the {kimg}"],
        "parts": {},
        "judges": judges,
        "claims": claims,
        "headline": sentence_case(next(c["sentence"] for c in claims if c["primary"])) + ".",
        "strongest_control": None,
    }


def summary_of(kimgs=(7, 5), seed=3, shift=0.0, **changes):
    return {
        "score": SCORE,
        "judges": list(JUDGES),
        "reference": {"images": 10_000, "origin": "nowhere"},
        "floors": [{"images": 50, "fd": 0.012345}],
        "snapshots": [entry_of(kimg, shift) for kimg in kimgs],
        "config": {"seed": seed, "out": "x"},
        "machine": "m",
        "threads": 1,
        "world": 1,
        "neon_ext": {},
        "versions": {},
        **changes,
    }


def tables(text):
    """Every table of a Markdown text as a list of rows {column: cell}."""
    found, lines = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif lines:
            head, rule, *rows = lines
            assert set(rule) == {"---"}
            found.append([dict(zip(head, row, strict=True)) for row in rows])
            lines = []
    return found
