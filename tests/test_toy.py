"""toy_neon.py: exact protocol against independent integrals, training, caches, bad input, one small run."""
import csv
import dataclasses
import json
import shutil
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
CONFIG = toy_neon.Config(base_steps=300)


def parameters(seed=0):
    g = torch.Generator().manual_seed(seed)
    layers = zip(toy_neon.SIZES, toy_neon.FAN_IN)
    return torch.cat([(torch.rand(n, generator=g) * 2 - 1) * k ** -0.5 for n, k in layers])


def frechet(scores, W, n, seed=0):
    return toy_neon.frechet_to_target(*scores.moments(W, n, seed))


@pytest.fixture
def scores():
    theta_r = parameters()
    return toy_neon.Scores(theta_r, theta_r + 0.05 * parameters(1), CONFIG)


# ---------------------------------------------------------------- pieces
def test_schedule_values():
    abar = toy_neon.cosine_schedule(20)
    assert abar[0] == 1 and (abar.diff() < 0).all() and abar[-1] > 0
    s, half_pi = 0.008, np.pi / 2
    want = np.cos((10 / 20 + s) / (1 + s) * half_pi) ** 2 / np.cos(s / (1 + s) * half_pi) ** 2
    assert float(abar[10]) == pytest.approx(want, rel=1e-14)


def test_parameter_layout():
    assert toy_neon.OFFSETS == [0, 128, 1184, 2240, 3296, 4352, 4418]
    theta = parameters()
    net = toy_neon.network(theta)
    assert torch.equal(torch.nn.utils.parameters_to_vector(net.parameters()), theta)
    linear = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
    for ours, (weight, bias) in zip(linear, reference.unpack(theta)):
        assert torch.equal(ours.weight, weight) and torch.equal(ours.bias, bias)
    with torch.no_grad():
        net[0].weight.zero_()
    assert torch.equal(theta, parameters())  # a network holds a copy


def test_plain_sampler_equals_the_fused_one(scores):
    z, abar = toy_neon.sobol_normal(256, 1), toy_neon.cosine_schedule(20)
    with torch.no_grad():
        plain = toy_neon.ddim_plain(toy_neon.network(scores.theta_r), z, abar)
    fused = toy_neon.neon_ext.mlp_ddim(scores.theta_r[None], z, abar)[0]
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-4)  # float32 rounding through 20 steps


def test_training_learns_and_repeats():
    first, second = (toy_neon.train_models(CONFIG) for _ in range(2))
    assert torch.equal(first["theta_r"], second["theta_r"])
    assert all(torch.equal(theta, second["theta_s"][name]) for name, theta in first["theta_s"].items())
    assert list(first["theta_s"]) == [f"zeta {z}, {e} epochs" for z in (1.1, 0.9) for e in (50, 250)]
    abar, losses = toy_neon.cosine_schedule(1000).float(), []
    for theta in (parameters(), first["theta_r"]):
        torch.manual_seed(1)
        data = first["data"].repeat(20, 1)
        losses.append(toy_neon.denoising_loss(toy_neon.network(theta), data, abar).item())
    assert losses[1] < 0.9 * losses[0]


def test_sobol_points_are_standard_normal():
    z = toy_neon.sobol_normal(2**14, 3).double()
    assert z.isfinite().all() and not torch.equal(z, toy_neon.sobol_normal(2**14, 4).double())
    # Monte Carlo would give 8e-3
    torch.testing.assert_close(z.mean(0), torch.zeros(2).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(2).double(), rtol=0, atol=1e-3)


def test_sliced_w2_of_known_distributions():
    """The target scores near zero; a shift by m the mean over directions of (m . u)^2, |m|^2 / 2."""
    x = toy_neon.sobol_normal(2**15, 5).double() @ torch.linalg.cholesky(toy_neon.TARGET_COV).T
    assert float(toy_neon.sliced_w2(x)) < 1e-4
    shifted = x + torch.tensor([0.6, -0.8], dtype=torch.float64)
    assert float(toy_neon.sliced_w2(shifted)) == pytest.approx(0.5, abs=0.005)
    two_points = toy_neon.TARGET_ROOT.T.double() @ torch.tensor([[1.0, -1.0], [1.0, -1.0]]).double()
    assert float(toy_neon.sliced_w2(two_points.T.repeat(2**13, 1))) > 0.05  # same scale, wrong distribution


# ---------------------------------------------------------------- exact protocol
def test_exact_protocol_equals_gauss_hermite(scores):
    """A tensor Gauss-Hermite rule of 200 x 200 nodes in float64: an independent quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    weights = torch.from_numpy(weights / weights.sum())
    grid = torch.cartesian_prod(*[torch.from_numpy(nodes)] * 2)
    product = torch.outer(weights, weights).flatten()
    w = [0.5, -0.3, 0.8, 0.0, 1.0, -1.0]
    x = reference.mlp_ddim(scores.theta([w]), grid, toy_neon.cosine_schedule(20))[0]
    mean = product @ x
    cov = (x - mean).T @ (product[:, None] * (x - mean))
    want = float(reference.frechet_distance(mean, cov, toy_neon.TARGET_MEAN, toy_neon.TARGET_COV))
    got = scores.verified(w)
    # kinks of ReLU limit both rules
    assert got["fd"] == pytest.approx(want, abs=max(1e-4, 5 * got["fd_error"]))


def test_verified_error_is_honest(scores):
    """Reported errors cover the difference to a much finer estimate, in most of ten configurations."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(10):
        w = rng.uniform(-1, 1, 6)
        fine = float(frechet(scores, [w], 2**19, seed=77)[0])
        score = scores.verified(w)
        covered += abs(score["fd"] - fine) <= 3 * score["fd_error"] + 1e-7
    assert covered >= 8


def test_zero_weights_are_the_base(scores):
    assert torch.equal(scores.theta([[0.0] * 6])[0], scores.theta_r)
    torch.testing.assert_close(scores.theta([[-1.0] * 6])[0], scores.theta_s, rtol=0, atol=1e-6)


def test_grid_refinement_finds_the_exhaustive_winner(scores):
    grid = toy_neon.layer_grid(scores, 0.3, 0.6)
    best = grid["W"].index(grid["best"]["w"])
    assert len(grid["W"]) == 729 and min(grid["points"]) == 2**9 and grid["points"][best] == 2**15
    exhaustive = frechet(scores, grid["W"], 2**12)
    assert exhaustive[best] <= exhaustive.min() + 1e-4  # the accuracy 4096 points have


def test_paper_protocol_draws_anew_for_each_configuration(scores):
    paper = toy_neon.Scores(scores.theta_r, scores.theta_s,
                            dataclasses.replace(CONFIG, protocol="paper", points=20_000))
    torch.manual_seed(0)
    same = frechet(paper, [[0.3] * 6] * 4, 2000)
    assert len(set(same.tolist())) == 4
    row = paper.verified([0.3] * 6)
    assert row["fd_error"] is None
    assert row["fd"] == pytest.approx(scores.verified([0.3] * 6)["fd"], rel=0.05)  # 7 sigma of 20,000 points


@pytest.mark.parametrize("objective", ["fd", "sw2"])
def test_search_gradient_against_central_differences(scores, objective, monkeypatch):
    captured = {}

    def fake_minimize(value, x0, **kwargs):
        captured.update(value=value)
        value(x0)
    monkeypatch.setattr(toy_neon.scipy.optimize, "minimize", fake_minimize)
    # searched on a quarter of the points
    small = toy_neon.Scores(scores.theta_r, scores.theta_s, dataclasses.replace(CONFIG, points=2**11))
    toy_neon.gradient_search(small, objective, 0.3)
    w, h = np.linspace(-0.5, 1.0, 6), 2e-2
    _, gradient = captured["value"](w)
    for i in range(6):
        step = np.eye(6)[i] * h
        difference = (captured["value"](w + step)[0] - captured["value"](w - step)[0]) / (2 * h)
        scale = np.abs(gradient).max()
        assert gradient[i] == pytest.approx(difference, rel=0.02, abs=2e-3 * scale)  # O(h^2) and rounding


@pytest.mark.parametrize("objective", ["fd", "sw2"])
def test_search_improves_its_objective_within_its_evaluations(scores, objective):
    small = toy_neon.Scores(scores.theta_r, scores.theta_s, dataclasses.replace(CONFIG, points=2**11))
    run = toy_neon.gradient_search(small, objective, 0.0, evaluations=15)
    best = run["best"]
    assert best[objective] < small.verified([0.0] * 6)[objective]
    assert best["evaluations"] == len(run["fd"]) <= 15
    assert best["objective"] == objective and best["start"] == 0.0


# ---------------------------------------------------------------- the script
def launch(*args, **kwargs):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    args = ("--delta", "0.4,1.72", "--points", 512, "--base-steps", 200, "--seeds", 2, "--search", "gradient",
            "--out", out)
    done = launch(*args)
    assert done.returncode == 0, done.stderr
    return out, args, done


def test_end_to_end(small_run):
    out, _, done = small_run
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= {"base", "collapsed", "global", "layerwise", "search", "seconds_total", "config",
                            "versions", "seed", "seeds", "over_seeds", "command"}
    assert summary["config"]["base_steps"] == 200 and summary["config"]["points"] == 512
    assert [run["delta"] for run in summary["layerwise"]] == [0.4, 1.72]
    for run in summary["layerwise"]:
        assert set(run) == {"delta", "w", "fd", "fd_error", "sw2", "evaluations", "seconds"}
        assert len(run["w"]) == 6
    assert summary["base"]["fd"] > summary["global"]["fd"] > 0 and isinstance(summary["global"]["w"], float)
    for run in summary["search"]:
        assert set(run) == {"objective", "start", "w", "fd", "fd_error", "sw2", "evaluations", "seconds"}
    assert [run["fd"] for run in summary["search"]] == sorted(run["fd"] for run in summary["search"])
    assert len(summary["search"]) == 4 and len(summary["seeds"]) == 2
    fds = [seed["base"]["fd"] for seed in summary["seeds"]]
    assert summary["over_seeds"][0]["name"] == "base"
    assert summary["over_seeds"][0]["mean"][0] == pytest.approx(np.mean(fds))
    assert summary["over_seeds"][0]["std"][0] == pytest.approx(np.std(fds, ddof=1))
    rows = list(csv.reader((out / "grid_1.72.csv").open()))
    assert len(rows) == 730 and len({tuple(row[:6]) for row in rows}) == 730
    for picture in ("score_against_w", "layers_and_deltas", "samples", "search"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    for word in ("base", "collapsed", "global", "delta 1.72", "0.009516", "paper", "seeds: 2"):
        assert word in done.stdout


def test_second_run_uses_the_cache_and_repeats_the_numbers(small_run):
    out, args, _ = small_run
    before = json.loads((out / "summary.json").read_text())
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    assert len(stamps) == 2 * (1 + 4 + 2 + 2 + 4)  # models, sweeps, base and collapsed, grids, searches
    assert launch(*args).returncode == 0
    after = json.loads((out / "summary.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")} == stamps
    assert [r["fd"] for r in after["layerwise"]] == [r["fd"] for r in before["layerwise"]]


@pytest.mark.parametrize("args, message", [
    (("--delta", "abc"), "'abc'"), (("--delta", "-1"), "'-1'"), (("--delta", ""), "--delta"),
    (("--delta", "nan"), "--delta"), (("--delta", "1,,2"), "--delta"), (("--seeds", "0"), "--seeds"),
    (("--protocol", "best"), "--protocol"), (("--points", "1000"), "--points 1000"),
    (("--points", "8"), "--points 8"),
    (("--device", "cuda"), "--device cuda"), (("--device", "tpu"), "--device"), (("--seed", "-1"), "--seed"),
    (("--out", "/proc/no"), "/proc/no"), (("--nonsense",), "--nonsense")])
def test_bad_input_is_one_line(args, message, tmp_path):
    if args[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = launch(*(args if "--out" in args else ("--out", tmp_path / "out", *args)))
    assert not list(tmp_path.iterdir())  # checked before anything is created
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and message in done.stderr


def test_extension_not_built(monkeypatch, capsys):
    monkeypatch.setattr(toy_neon, "neon_ext", None)
    with pytest.raises(SystemExit) as stop:
        toy_neon.main([])
    assert stop.value.code == 2 and "pip install" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:100]),
    lambda path: torch.save({"key": "other", "part": {"theta_r": torch.zeros(3)}}, path)],
    ids=["damaged", "foreign"])
@pytest.mark.parametrize("name", ["models", "grid 1.72"])
def test_bad_cache_leaves_results_alone(small_run, name, damage):
    out, args, _ = small_run
    path = next((out / "seed_43").glob(f"{name}_*.pt"))
    good, before = path.read_bytes(), {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
    damage(path)
    done = launch(*args)
    path.write_bytes(good)
    assert done.returncode == 2 and "delete it" in done.stderr and str(path) in done.stderr
    assert len([line for line in done.stderr.replace("\r", "\n").splitlines() if "toy_neon:" in line]) == 1
    assert {p: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    done = launch("--out", tmp_path / "out")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "--out" in done.stderr
    assert (tmp_path / "out").read_text() == "mine"


def test_resume_after_interruption_gives_the_same_result(small_run, tmp_path):
    """Without the later parts, as after an interruption: same numbers, earlier parts untouched."""
    out, args, _ = small_run
    resumed = tmp_path / "resumed"
    shutil.copytree(out / "seed_42", resumed / "seed_42")
    for lost in [*resumed.rglob("grid 1.72*"), *resumed.rglob("gradient*")]:
        lost.unlink()
    stamps = {p: p.stat().st_mtime_ns for p in resumed.rglob("*.pt")}
    assert launch(*args[:-1], resumed).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (out, resumed))
    for kind in ("layerwise", "search"):
        assert [(r["fd"], r["w"]) for r in a[kind]] == [(r["fd"], r["w"]) for r in b[kind]]


def test_interrupt_leaves_nothing_half_written(tmp_path):
    """Ctrl-C in a long run: the finished parts stay, nothing else does, and it says so."""
    args = ("--base-steps", 3000, "--points", 512, "--seeds", 9, "--out", tmp_path)
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 100
    while not list(tmp_path.glob("seed_42/grid*")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "finished parts are kept" in error and "Traceback" not in error
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files and all(p.suffix == ".pt" and torch.load(p, weights_only=True)["key"] for p in files)


def test_alignment_is_a_cosine_and_repeats():
    curves = [toy_neon.gradient_alignment(parameters(), CONFIG, points=500, passes=2) for _ in range(2)]
    assert len(curves[0]["zeta"]) == len(curves[0]["cosine"]) == 46
    assert all(-1 <= c <= 1 for c in curves[0]["cosine"]) and len(set(curves[0]["cosine"])) == 46
    torch.manual_seed(0)  # the starting points come from the caller's stream, the noise from the seed
    first = toy_neon.gradient_alignment(parameters(), CONFIG, points=500, passes=2)
    torch.manual_seed(0)
    assert first == toy_neon.gradient_alignment(parameters(), CONFIG, points=500, passes=2)
