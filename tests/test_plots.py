"""edm_neon.py: glyphs, real images in three parts, judges that no selection saw, training seeds."""

import dataclasses
import itertools
import json
import math

import numpy as np
import PIL.Image
import pytest
import torch

import adaptive_neon as neon


def score(fd, folds=None, w=None, **changes):
    folds = folds if folds is not None else [fd] * neon.stats.FOLDS
    fields = {
        "snapshot": 1,
        "w": w or {"a": 0.0},
        "images": 100,
        "first_seed": 0,
        "fd": fd,
        "folds": list(folds),
        "precision": None,
        "recall": None,
        "arithmetic": "fp32",
        "seconds": 0.0,
        "key": "k",
    }
    return neon.scores.Score(**{**fields, **changes})


def noisy(fd, seed, spread=1.0):
    """A score whose folds scatter."""
    rng = np.random.default_rng(seed)
    return score(fd, fd + spread * rng.standard_normal(neon.stats.FOLDS) / 10)


# -------------------- pictures


def test_sample_panel_enlarges_whole_pixels():
    images = neon.glyphs.draw_glyphs(100, 0)[0]
    panel = neon.plots.sample_panel(images, gap=2, width=400)
    assert panel.shape == (8 * 52, 8 * 52, 3)
    tile = panel[52 + 2 : 52 + 50, 2:50, 0]  # second row, first column: image 8
    assert np.array_equal(tile, images[8, 0].numpy().repeat(4, 0).repeat(4, 1))
    assert (panel[50:54] == 255).all()


@pytest.mark.parametrize("side, columns", [(32, 8), (256, 3), (1024, 2)])
def test_sample_panels_of_larger_images(side, columns):
    images = torch.zeros(64, 3, side, side, dtype=torch.uint8)
    panel = neon.plots.sample_panel(images)
    assert panel.shape[0] == panel.shape[1]
    assert panel.shape[1] // (side + 4) == columns


def test_sample_picture_is_exact_to_the_pixel(tmp_path):
    pictures = {
        "base": neon.glyphs.draw_glyphs(64, 0)[0],
        "global": neon.glyphs.draw_glyphs(64, 1)[0],
    }
    final = {name: {"fd": 1.0, "w": {"a": 0.0}} for name in pictures}
    neon.plots.plot_report(
        {"s.png": (neon.plots.plot_samples, ({"final": final}, pictures))}, tmp_path
    )
    found = np.asarray(PIL.Image.open(tmp_path / "s.png").convert("RGB"))
    for i, images in enumerate(pictures.values()):
        panel = neon.plots.sample_panel(images)
        left = 12 + i * (panel.shape[1] + 12)
        part = found[-12 - panel.shape[0] : -12, left : left + panel.shape[1]]
        assert np.array_equal(part, panel)


def summary_of(diverging, kimgs=(1,)):
    """What summary.json holds of random scores, one model's infinite."""
    blocks = ("enc", "mid", "dec")
    scores, finals = {}, {}
    for i, name in enumerate(("base", "collapsed", "global", "blockwise", "searched")):
        one = noisy(20.0 + i, i)
        scores[name] = dataclasses.replace(one, w=dict.fromkeys(blocks, float(i)))
    for judge in ("own", "a", "b"):
        finals[judge] = {name: [one] for name, one in scores.items()}
        if diverging:
            finals[judge][diverging] = [score(math.inf)]
    grid = []
    for w in itertools.product((0.5, 1.0), (0.5, 1.0), (0.5, 1.0)):
        grid.append(score(20 + sum(w), w=dict(zip(blocks, w, strict=True))))
    models = {}
    for name, one in scores.items():
        models[name] = neon.study.Candidate(one.w, finals["own"][name][0].fd, None)
    judges = {
        j: {"score": j, "final": neon.verdicts.final_comparison(finals[j])} for j in ("a", "b")
    }
    entries = []
    for kimg in kimgs:
        entry = neon.study.Entry(
            kimg=kimg,
            blocks=dict.fromkeys(blocks, {}),
            sweep=[finals["own"][name][0] for name in ("collapsed", "base", "global")],
            grid=grid,
            models=models,
            final=neon.verdicts.final_comparison(finals["own"]),
            placebo=[],
            warnings=[],
            parts={},
            judges=judges,
            claims=neon.verdicts.claims_of(finals),
        )
        entries.append(entry.as_json())
    return {"score": "FD (own, 4-d)", "snapshots": entries}


@pytest.mark.parametrize("diverging", [None, "collapsed", "global"])
@pytest.mark.parametrize("kimgs", [(1,), (1, 2)], ids=["one snapshot", "two"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_pictures_of_a_run(tmp_path, diverging, kimgs):
    summary = summary_of(diverging, kimgs)
    images = neon.glyphs.draw_glyphs(64, 0)[0]
    samples = {kimg: {"base": images, "blockwise": images} for kimg in kimgs}
    neon.plots.plot_report(neon.plots.figures_of(summary, samples), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    for kimg in kimgs:
        for kind in ("samples", "grid", "judges"):
            assert f"{kind}_{kimg:06d}.png" in names
    with PIL.Image.open(tmp_path / "scores.png") as picture:
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)


@pytest.mark.parametrize("diverging", [None, "collapsed", "global"])
def test_report_of_judges(tmp_path, capsys, diverging):
    summary = summary_of(diverging) | {"judges": ["own", "a", "b"], "floors": [], "reference": {}}
    neon.report.write_report(summary, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "Judges that no selection saw, snapshot 1:" in text
    assert "of 2 judges that no selection saw" in text
    assert "--judge adds" not in text
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)


def test_report_of_parts_gives_shares_of_the_other_model(tmp_path, capsys):
    summary = summary_of(None) | {"judges": ["own"], "floors": [], "reference": {}}
    entry = summary["snapshots"][0]
    entry["parts"], entry["judges"] = {"a": entry["judges"]["a"]}, {}
    neon.report.write_report(summary, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "Judges that no selection saw" not in text
    table = text.split("Parts of the selection's features, snapshot 1:")[1].strip().split("\n")
    assert table[0].count("against") == 3
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert cells[:6] == ["a", "20", "21", "22", "23", "24"]
    assert [cell.split()[0] for cell in cells[6:]] == ["+10.0%", "+4.5%", "+9.1%"]
    for cell in cells[6:]:
        value, low, high = (float(part.strip("[],%")) for part in cell.split()[:3])
        assert low < value < high


def test_report_without_judges_says_so(tmp_path, capsys):
    summary = summary_of(None) | {"judges": ["own"], "floors": []}
    summary["reference"] = {"origin": "of unknown origin", "images": 7}
    neon.report.write_report(summary, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "features that the weights were selected with: --judge adds others" in text
    assert "of unknown origin, the same for selection and final comparison (7 images)" in text
