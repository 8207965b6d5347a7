"""toy_neon.py: the exact protocol against independent integrals, training pieces, caches, bad input, one small run."""
import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
import toy_neon

SCRIPT = Path(toy_neon.__file__)
CONFIG = toy_neon.Training(base_steps=300)


def network(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.cat([(torch.rand(out * (into + 1), generator=g) * 2 - 1) * into ** -0.5 for out, into in toy_neon.SHAPES])


@pytest.fixture
def scores():
    theta_r = network()
    return toy_neon.Scores(theta_r, theta_r + 0.05 * network(1), CONFIG, toy_neon.PROTOCOLS["exact"], "cpu")


# ---------------------------------------------------------------- pieces
def test_schedule_values():
    abar = toy_neon.cosine_schedule(20)
    assert abar[0] == 1 and (abar.diff() < 0).all() and abar[-1] > 0
    s, half_pi = 0.008, np.pi / 2
    want = np.cos((10 / 20 + s) / (1 + s) * half_pi) ** 2 / np.cos(s / (1 + s) * half_pi) ** 2
    assert float(abar[10]) == pytest.approx(want, rel=1e-14)


def test_parameter_layout():
    assert toy_neon.OFFSETS == [0, 128, 1184, 2240, 3296, 4352, 4418]
    theta = network()
    assert torch.equal(torch.cat([t.flatten() for t in toy_neon.unpack(theta)]), theta)
    for ours, theirs in zip(toy_neon.unpack(theta)[::2], reference.unpack(theta)):
        assert torch.equal(ours, theirs[0])


def test_plain_sampler_equals_the_fused_one(scores):
    z = toy_neon.sobol_normal(256, 1)
    plain = toy_neon.ddim_plain(scores.theta_r, z, scores.abar)
    fused = toy_neon.neon_ext.mlp_ddim(scores.theta_r[None], z, scores.abar)[0]
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-4)  # float32 rounding through 20 steps


def test_training_learns_and_repeats():
    models = [toy_neon.train_base(CONFIG)["base"] for _ in range(2)]
    assert torch.equal(*models)
    data, abar = toy_neon.real_data(CONFIG), toy_neon.cosine_schedule(1000).float()
    losses = [float(toy_neon.denoising_loss(toy_neon.unpack(theta), data.repeat(20, 1), abar,
                                            torch.Generator().manual_seed(1))) for theta in (network(), models[0])]
    assert losses[1] < 0.9 * losses[0]


def test_sobol_points_are_standard_normal():
    z = toy_neon.sobol_normal(2**14, 3).double()
    assert z.isfinite().all() and not torch.equal(z, toy_neon.sobol_normal(2**14, 4).double())
    torch.testing.assert_close(z.mean(0), torch.zeros(2).double(), rtol=0, atol=1e-4)  # Monte Carlo would give 8e-3
    torch.testing.assert_close(torch.cov(z.T), torch.eye(2).double(), rtol=0, atol=1e-3)


def test_sliced_w2_of_known_distributions():
    """The exact target scores near zero; a shift by m scores the mean over directions of (m . u)^2, |m|^2 / 2."""
    x = toy_neon.sobol_normal(2**15, 5).double() @ torch.linalg.cholesky(toy_neon.TARGET_COV).T
    assert float(toy_neon.sliced_w2(x)) < 1e-4
    shifted = x + torch.tensor([0.6, -0.8], dtype=torch.float64)
    assert float(toy_neon.sliced_w2(shifted)) == pytest.approx(0.5, abs=0.005)
    two_points = torch.linalg.cholesky(toy_neon.TARGET_COV) @ torch.tensor([[1.0, -1.0], [1.0, -1.0]]).double()
    assert float(toy_neon.sliced_w2(two_points.T.repeat(2**13, 1))) > 0.05  # same scale, wrong distribution


# ---------------------------------------------------------------- exact protocol
def test_exact_protocol_equals_gauss_hermite(scores):
    """A tensor Gauss-Hermite rule of 200 x 200 nodes in float64: an independent quadrature of the same integral."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    weights = torch.from_numpy(weights / weights.sum())
    grid = torch.cartesian_prod(*[torch.from_numpy(nodes)] * 2)
    product = torch.outer(weights, weights).flatten()
    w = [0.5, -0.3, 0.8, 0.0, 1.0, -1.0]
    x = reference.mlp_ddim(scores.theta([w]), grid, scores.abar)[0]
    mean = product @ x
    cov = (x - mean).T @ (product[:, None] * (x - mean))
    want = float(reference.frechet_distance(mean, cov, toy_neon.TARGET_MEAN, toy_neon.TARGET_COV))
    got = scores.verified(w)
    assert got["fd"] == pytest.approx(want, abs=max(1e-4, 5 * got["fd_error"]))  # kinks of ReLU limit both rules


def test_verified_error_is_honest(scores):
    """Reported errors cover the difference to a much finer estimate, in most of ten configurations."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(10):
        w = rng.uniform(-1, 1, 6)
        fine = float(scores.fd([w], 2**19, seed=77)[0])
        score = scores.verified(w)
        covered += abs(score["fd"] - fine) <= 3 * score["fd_error"] + 1e-7
    assert covered >= 8


def test_zero_weights_are_the_base(scores):
    assert torch.equal(scores.theta([[0.0] * 6])[0], scores.theta_r)
    torch.testing.assert_close(scores.theta([[-1.0] * 6])[0], scores.theta_s, rtol=0, atol=1e-6)


def test_grid_refinement_finds_the_exhaustive_winner(scores):
    W, fd, used, best = toy_neon.layer_grid(scores, 0.3, 0.6)
    assert W.shape == (729, 6) and (used >= 2**9).all() and used[best] == 2**15
    exhaustive = scores.fd(W, 2**12)
    assert exhaustive[best] <= exhaustive.min() + 1e-4  # the accuracy 4096 points have


@pytest.mark.parametrize("objective", ["fd", "sw2"])
def test_search_gradient_against_central_differences(scores, objective, monkeypatch):
    captured = {}

    def fake_minimize(value, x0, **kwargs):
        captured.update(value=value)
        value(x0)
    monkeypatch.setattr(toy_neon.scipy.optimize, "minimize", fake_minimize)
    toy_neon.gradient_search(scores, objective, 0.3, points=2**9)
    w, h = np.linspace(-0.5, 1.0, 6), 2e-2
    _, gradient = captured["value"](w)
    for i in range(6):
        step = np.eye(6)[i] * h
        difference = (captured["value"](w + step)[0] - captured["value"](w - step)[0]) / (2 * h)
        assert gradient[i] == pytest.approx(difference, rel=0.02, abs=2e-3 * abs(gradient).max())  # O(h^2) and rounding


def test_search_only_improves(scores):
    run = toy_neon.gradient_search(scores, "fd", 0.0, evaluations=15, points=2**9)
    assert run["fd"] < scores.verified([0.0] * 6)["fd"] and run["evaluations"] <= 15
    assert run["trace"] == sorted(run["trace"], reverse=True)


# ---------------------------------------------------------------- the script
def launch(*args, **kwargs):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, timeout=120,
                          **kwargs)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    args = ("--delta", "0.4,1.72", "--protocol", "tiny", "--base-steps", 200, "--seeds", 2, "--search", "gradient",
            "--out", out)
    done = launch(*args)
    assert done.returncode == 0, done.stderr
    return out, args, done


def test_end_to_end(small_run):
    out, _, done = small_run
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= {"base", "collapsed", "global", "layerwise", "search", "seconds_total", "config", "versions",
                            "seed", "seeds", "over_seeds"}
    assert [run["delta"] for run in summary["layerwise"]] == [0.4, 1.72]
    for run in summary["layerwise"]:
        assert set(run) == {"delta", "w", "fd", "fd_error", "sw2", "evaluations", "seconds"} and len(run["w"]) == 6
    assert summary["base"]["fd"] > 0 and {"fd", "w"} <= set(summary["global"])
    assert [run["fd"] for run in summary["search"]] == sorted(run["fd"] for run in summary["search"])
    rows = list(csv.reader((out / "grid_1.72.csv").open()))
    assert len(rows) == 730 and len({tuple(row[:6]) for row in rows}) == 730
    for picture in ("score_against_w", "layers_and_deltas", "samples", "search"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    for word in ("base", "collapsed", "global", "layer-wise", "paper", "2 seeds"):
        assert word in done.stdout


def test_second_run_uses_the_cache_and_repeats_the_numbers(small_run):
    out, args, _ = small_run
    before = json.loads((out / "summary.json").read_text())
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    assert len(stamps) == 6
    assert launch(*args).returncode == 0
    after = json.loads((out / "summary.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")} == stamps
    assert [r["fd"] for r in after["layerwise"]] == [r["fd"] for r in before["layerwise"]]


@pytest.mark.parametrize("args, message", [
    (("--delta", "abc"), "--delta 'abc'"), (("--delta", "-1"), "--delta '-1'"), (("--delta", ""), "--delta ''"),
    (("--delta", "nan"), "--delta 'nan'"), (("--seeds", "0"), "--seeds"), (("--protocol", "best"), "--protocol"),
    (("--device", "cuda"), "--device cuda"), (("--device", "tpu"), "--device tpu"),
    (("--out", "/proc/no"), "--out /proc/no"), (("--nonsense",), "--nonsense")])
def test_bad_input_is_one_line(args, message, tmp_path):
    if args[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = launch(*(args if "--out" in args else (*args, "--out", tmp_path / "out")))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and message in done.stderr


def test_extension_not_built(monkeypatch, capsys):
    monkeypatch.setattr(toy_neon, "neon_ext", None)
    with pytest.raises(SystemExit) as stop:
        toy_neon.main([])
    assert stop.value.code == 2 and "pip install" in capsys.readouterr().err


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.write_bytes(path.read_bytes()[:100]), "is damaged"),
    (lambda path: torch.save({"key": "other", "base": torch.zeros(3)}, path), "another experiment")])
def test_bad_cache_leaves_results_alone(small_run, damage, message):
    out, args, _ = small_run
    path = next((out / "models").glob("base_*.pt"))
    good, before = path.read_bytes(), (out / "summary.json").read_bytes()
    damage(path)
    done = launch(*args)
    path.write_bytes(good)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert (out / "summary.json").read_bytes() == before


def test_interrupt_keeps_finished_parts(tmp_path):
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--base-steps", "1000000", "--out", str(tmp_path)],
                               stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not (tmp_path / "models").exists() and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "finished parts are kept" in error and "Traceback" not in error
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]  # nothing finished yet, and nothing half written


def test_alignment_signs():
    """Real data against itself points the same way, whatever the preconditioner."""
    curve = toy_neon.gradient_alignment(network(), CONFIG, points=500, passes=2)
    assert len(curve["zeta"]) == len(curve["cosine"]) == 46 and all(-1 <= c <= 1 for c in curve["cosine"])
