"""Adherence to what was asked for: scored beside distances, paired, and judged the other way
round."""

import dataclasses

import numpy as np
import pytest
import torch
from edm_helpers import BEST, ToyFeatures, toy_scorer
from made import finals_of, score

import adaptive_neon as neon
from adaptive_neon.controls import crossing, equal_adherence, with_settings
from adaptive_neon.files import UserError
from adaptive_neon.stats import FOLDS, compare_alignment
from adaptive_neon.study import Candidate
from adaptive_neon.verdicts import claims_of, final_comparison


class Asking(ToyFeatures):
    """Adherence: the mean of the first pixel, in an order of its own."""

    def alignment(self, images, asked):
        return images[:, 0, 0, 0].float() / 255


@pytest.fixture
def scorer(tmp_path):
    scorer = toy_scorer(tmp_path)
    scorer.judge.features = Asking()
    return scorer


def first_pixels(scorer, w, seeds):
    scorer.merger.set(w)
    images, _ = scorer.sampler.images(seeds)
    return images[:, 0, 0, 0].double() / 255


def test_adherence_is_of_the_images_that_are_scored(scorer):
    found = scorer.score(BEST)
    values = first_pixels(scorer, BEST, range(10_000, 10_100))
    assert found.alignment == pytest.approx(float(values.mean()), abs=1e-6)
    others = torch.cat([values[:35], values[40:]])
    assert found.alignment_folds[7] == pytest.approx(float(others.mean()), abs=1e-6)
    assert len(found.alignment_folds) == FOLDS and values.std() > 0.01


def test_it_is_kept_and_read_back(scorer, tmp_path):
    found = scorer.score(BEST)
    assert neon.ScoreLog(tmp_path).scores[found.key].alignment == found.alignment


def test_scores_without_a_question_have_none(tmp_path):
    found = toy_scorer(tmp_path).score(BEST)
    assert found.alignment is None and found.alignment_folds is None


# -------------------- judged
def asked(value, spread=0.001, seed=0):
    rng = np.random.default_rng(seed)
    return score(10.0, alignment=value, alignment_folds=list(value + spread * rng.normal(size=20)))


@pytest.mark.parametrize(
    "ours, theirs, verdict",
    [(0.6, 0.5, "better"), (0.5, 0.6, "worse"), (0.5, 0.5001, "no significant difference")],
)
def test_more_is_better(ours, theirs, verdict):
    gain = compare_alignment([asked(ours)], [asked(theirs, seed=1)])
    assert gain.verdict == verdict and gain.difference == pytest.approx(ours - theirs)
    assert gain.real_noise, "it asks no real images"


def test_intervals_are_those_of_paired_folds():
    ours, theirs = asked(0.6), asked(0.5, seed=1)
    folds = np.subtract(ours.alignment_folds, theirs.alignment_folds)
    error = (19 / 20 * ((folds - folds.mean()) ** 2).sum()) ** 0.5
    gain = compare_alignment([ours], [theirs])
    assert gain.high - gain.difference == pytest.approx(2.093024 * error, rel=1e-5)


def test_nothing_is_claimed_of_what_was_not_measured():
    assert compare_alignment([asked(0.5)], [score(10.0)]) is None


def test_claims_and_table_say_both():
    """In the judge b alone: the base has the most, the searched weights the least."""
    finals = finals_of()
    for m, (name, scores) in enumerate(finals["b"].items()):
        told = asked(0.9 - 0.1 * m, seed=m)
        fields = {"alignment": told.alignment, "alignment_folds": told.alignment_folds}
        finals["b"][name] = [dataclasses.replace(one, **fields) for one in scores]
    claims = {(claim["model"], claim["against"]): claim for claim in claims_of(finals)}
    claim = claims["global", "base"]
    assert claim["judges"]["b"]["alignment"]["verdict"] == "worse"
    assert "alignment" not in claim["own"]
    assert "adherence in b -0.2, worse" in claim["sentence"]
    other = claims["collapsed", "global"]
    assert other["judges"]["b"]["alignment"]["verdict"] == "better"

    final = final_comparison(finals["b"])
    assert final["global"]["alignment"]["value"] == pytest.approx(0.7)
    entry = {"final": final_comparison(finals["own"]), "judges": {"b": {"final": final}}}
    entry |= {"claims": [], "kimg": 5}
    assert neon.report.model_row(entry, "global", "FD")["adherence (95%)"].startswith("0.700 [0.69")


# -------------------- files
FILE = """
def features(images):
    return images.flatten(1)[:, :2] / 255

def alignment(images, asked):
    return {answer}
"""


def features_of(tmp_path, answer):
    (tmp_path / "asking.py").write_text(FILE.format(answer=answer))
    file = neon.userfile.JudgeFile(tmp_path / "asking.py")
    return neon.features.FileFeatures(file, torch.zeros(2, 1, 4, 4))


def test_a_judges_file_may_ask(tmp_path):
    features = features_of(tmp_path, "images[:, 0, 0, 0] + asked")
    found = features.alignment(torch.full((3, 1, 4, 4), 2), torch.tensor([5, 7, 6]))
    assert found.tolist() == [7, 9, 8] and found.dtype == torch.float32
    assert features_of(tmp_path, "asked").identity != features.identity


@pytest.mark.parametrize(
    "answer, message",
    [("images", "a tensor .3."), ("0.5", "a tensor .3."), ("asked / 0", "finite numbers")],
)
def test_what_is_no_adherence_is_one_line(tmp_path, answer, message):
    features = features_of(tmp_path, answer)
    with pytest.raises(UserError, match=f"asking.py: alignment.. must give {message}"):
        features.alignment(torch.zeros(3, 1, 4, 4), torch.tensor([5, 7, 6]))


def test_the_classifier_of_glyphs_reads_what_was_asked(tmp_path):
    classifier = neon.glyphs.GlyphsClassifier(tmp_path, "c", neon.glyphs.glyphs_cnn, 0, 3, 4, 4000)
    images, labels = neon.glyphs.draw_glyphs(300, 9)
    right = classifier.alignment(images, labels)
    assert right.mean() > 0.6 and set(right.tolist()) <= {0.0, 1.0}
    prompts = [f"a bold {neon.glyphs.DIGITS[label]} sans" for label in labels]
    assert torch.equal(classifier.alignment(images, prompts), right)
    assert classifier.alignment(images, ["nothing"] * 300).sum() == 0


# -------------------- the base over guidance
@pytest.mark.parametrize(
    "y, value, expected",
    [
        ([0.1, 0.5, 0.4], 0.3, 1.5),
        ([0.1, 0.5, 0.4], 0.45, 1.875),  # the first of two
        ([0.5, 0.4, 0.2], 0.3, 3.0),
        ([0.5, 0.4, 0.2], 0.6, None),
        ([0.5, None, 0.2], 0.3, None),
        ([0.5, 0.4, 0.2], None, None),
    ],
)
def test_where_a_curve_has_a_value(y, value, expected):
    found = crossing([1.0, 2.0, 4.0], y, value)
    assert found == (None if expected is None else pytest.approx(expected))


def test_the_base_at_equal_adherence(scorer, monkeypatch):
    """A toy whose guidance makes its images brighter: the repaired one is as bright as the base at
    a guidance between two that were tried."""
    model = scorer.sampler.model
    sample = type(model).sample

    def brighter(self, net, noise, labels, steps):
        images = sample(self, net, noise, labels, steps)
        return images if not self.settings else 0 * images + 0.1 * self.settings["guidance"] - 0.5

    monkeypatch.setattr(type(model), "sample", brighter)
    over = with_settings(scorer)
    settings = [{"guidance": value} for value in (1.0, 2.0, 6.0, 12.0)]
    repaired = Candidate(scorer.merger.weights(BEST), 1.0, scorer)
    goal = scorer.score(BEST).alignment
    found = equal_adherence(over, settings, repaired)
    assert found.alignment == pytest.approx(goal, abs=0.01)
    assert found.fd == over.score(found.w).fd and found.w["guidance"] not in (1, 2, 6, 12)
    assert equal_adherence(over, settings[:2], repaired) is None


def test_without_adherence_there_is_no_such_control(tmp_path):
    scorer = toy_scorer(tmp_path)
    repaired = Candidate(scorer.merger.weights(BEST), 1.0, scorer)
    assert equal_adherence(with_settings(scorer), [{"guidance": 2.0}], repaired) is None
