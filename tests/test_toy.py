"""toy_neon.py: what each step promises, from the authors' draws to the pictures."""

import csv
import dataclasses
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import toy_neon as toy

SCRIPT = Path(toy.__file__)
# The operations are small, and the machine may be busy.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with toy.threads(1):
        yield


def parameters(seed=0):
    """A random network [4418] float32, as large as an initialised one."""
    torch.manual_seed(seed)
    return toy.initial_weights().float()


@pytest.fixture
def scorer():
    theta_r = parameters()
    return toy.Scorer(theta_r, theta_r + 0.05 * parameters(1), toy.Scoring())


def with_scoring(scorer, **changes):
    return dataclasses.replace(scorer, scoring=dataclasses.replace(scorer.scoring, **changes))


def frechet(scorer, W, n, seed=0):
    return toy.frechet_to_target(*scorer.moments(W, n, seed))


# ---------------------------------------------------------------- data and network
def test_real_data_are_the_authors():
    """NumPy's legacy generator, seeded as the authors seed it, and the first point."""
    np.random.seed(42)
    authors = np.random.multivariate_normal([0, 0], [[2, 1], [1, 2]], 1000)
    data = toy.real_data(1000, 42)
    assert data.dtype == torch.float32 and np.array_equal(data.numpy(), authors.astype(np.float32))
    assert data[0].tolist() == pytest.approx([-0.5106, -0.7061], abs=5e-5)
    assert float(data.double().sum()) == pytest.approx(-81.2891203824654, abs=1e-5)
    assert not torch.equal(data, toy.real_data(1000, 43))


def test_initial_weights_are_torchs_default():
    torch.manual_seed(42)
    layers = [torch.nn.Linear(n_in, n_out) for n_out, n_in in toy.SHAPES]
    default = torch.cat([p.detach().flatten() for layer in layers for p in layer.parameters()])
    torch.manual_seed(42)
    ours = toy.initial_weights()
    assert ours.dtype == torch.float64 and torch.equal(ours, ours.float().double())
    # nn.Linear rounds its last bit as the processor does: half a unit in the last place of 0.6.
    torch.testing.assert_close(ours.float(), default, rtol=0, atol=6e-8)
    # the sum on a processor with fused multiplication, as the authors' had
    assert float(ours.sum()) == pytest.approx(-8.084847199582782, abs=1e-12)


def test_network_against_modules():
    """Order of the parameters, ReLU after the blocks alone, time as the third input."""
    theta = parameters().double()
    hidden = [layer for _ in range(4) for layer in (torch.nn.Linear(32, 32), torch.nn.ReLU())]
    net = torch.nn.Sequential(torch.nn.Linear(3, 32), *hidden, torch.nn.Linear(32, 2)).double()
    torch.nn.utils.vector_to_parameters(theta, net.parameters())
    x, t = torch.randn(7, 2).double(), torch.rand(7, 1).double()
    ours = toy.predict_noise(theta, x, t)
    torch.testing.assert_close(ours, net(torch.cat([x, t], 1)), rtol=0, atol=1e-13)


def test_parameter_layout():
    assert toy.SIZES == (128, 1056, 1056, 1056, 1056, 66)
    assert toy.OFFSETS == [0, 128, 1184, 2240, 3296, 4352, 4418]


def test_schedule_values():
    abar = toy.cosine_schedule(20)
    assert abar[0] == 1 and (abar.diff() < 0).all() and abar[-1] > 0
    s, half_pi = 0.008, np.pi / 2
    want = np.cos((10 / 20 + s) / (1 + s) * half_pi) ** 2 / np.cos(s / (1 + s) * half_pi) ** 2
    assert float(abar[10]) == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("zeta", [1.0, 1.1])
def test_sampler_in_float64_and_fused(zeta):
    theta, abar = parameters(), toy.cosine_schedule(20)
    z = toy.sobol_normal(256, 1)
    ours = toy.ddim(theta.double(), z, zeta)
    want = reference.mlp_ddim(theta[None], z, abar, zeta)[0]
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-11)
    fused = toy.neon_ext.mlp_ddim(theta[None], z.float(), abar, zeta)[0]
    torch.testing.assert_close(fused.double(), ours, rtol=0, atol=1e-4)  # 20 steps in float32


# ---------------------------------------------------------------- training
def test_loss_is_the_error_of_the_noise(monkeypatch):
    """The network sees sqrt(abar) x + sqrt(1 - abar) noise at t / (T - 1), and predicts noise."""
    seen = {}

    def network(theta, x, t):
        seen.update(x=x, t=t)
        return torch.full_like(x, 3.0)

    monkeypatch.setattr(toy, "predict_noise", network)
    abar, data = toy.cosine_schedule(1000), torch.full((20_000, 2), 5.0).double()
    torch.manual_seed(0)
    loss = toy.denoising_loss(None, data, abar)
    level = seen["t"] * 999
    torch.testing.assert_close(level, level.round(), rtol=0, atol=1e-9)
    assert level.min() == 0 and level.max() == 999 and len(level.unique()) > 990
    a = abar[level.round().long()]
    noise = (seen["x"] - a.sqrt() * 5)[a[:, 0] < 1] / (1 - a[a[:, 0] < 1]).sqrt()
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02  # 4 sigma of 40,000 numbers
    # E (3 - noise)^2 = 10, not 13 (another noise than the input's) and not the error of the data
    assert float(loss) == pytest.approx(10, abs=0.15)
    rest = (3 - noise).square().mean()  # without the few points of level 0
    assert float(loss) == pytest.approx(float(rest), abs=0.05)


def test_first_step_is_adams_and_epochs_are_saved_when_they_end():
    theta, data = parameters().double(), toy.real_data(100, 0).double()
    torch.manual_seed(0)
    saved = toy.train(theta, data, 1e-3, (1, 3, 5))
    assert list(saved) == [1, 3, 5] and all(t.dtype == torch.float64 for t in saved.values())
    step = (saved[1] - theta).abs()
    # Adam's first step is the learning rate wherever the gradient is far above its epsilon.
    assert step.max() <= 1e-3 * (1 + 1e-6) and step.median() > 0.999e-3
    for last in (1, 3):
        torch.manual_seed(0)
        assert torch.equal(toy.train(theta, data, 1e-3, (last,))[last], saved[last])
    assert torch.equal(theta, parameters().double())  # the start is left alone


@pytest.fixture(scope="module")
def recorded_training():
    """train_models, with the inputs of every training and every sampling."""
    calls = {"train": [], "ddim": []}
    train, ddim = toy.train, toy.ddim

    def recording_train(theta, data, lr, epochs):
        saved = train(theta, data, lr, epochs)
        state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        calls["train"].append((theta, data, lr, tuple(epochs), saved, state))
        return saved

    def recording_ddim(theta, z, zeta):
        x = ddim(theta, z, zeta)
        calls["ddim"].append((theta, z, zeta, x))
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "train", recording_train)
        patch.setattr(toy, "ddim", recording_ddim)
        return toy.train_models(toy.Training(base_steps=200)), calls


def test_base_starts_from_the_authors_draws(recorded_training):
    models, calls = recorded_training
    theta, data, lr, epochs, saved, _ = calls["train"][0]
    assert torch.equal(theta, parameters(42).double())
    assert torch.equal(data, toy.real_data(1000, 42).double())
    assert (lr, epochs) == (1e-4, (200,))
    assert torch.equal(models.theta_r, saved[200].float())
    assert torch.equal(models.data, toy.real_data(1000, 42))


def test_self_training_starts_from_the_base_on_its_own_samples(recorded_training):
    models, calls = recorded_training
    base = calls["train"][0][4][200]
    assert [zeta for _, _, zeta, _ in calls["ddim"]] == [1.1, 0.9]
    assert len(calls["train"]) == 3
    for run, draw, zeta in zip(calls["train"][1:], calls["ddim"], (1.1, 0.9), strict=True):
        theta, data, lr, epochs, saved, _ = run
        assert torch.equal(draw[0], base) and torch.equal(theta, base)  # not rounded in between
        assert torch.equal(data, draw[3]) and data.dtype == torch.float64
        assert (lr, epochs) == (1e-5, (50, 250))
        for epoch in epochs:
            theta_s = models.theta_s[f"zeta {zeta}, {epoch} epochs"]
            assert theta_s.dtype == torch.float32 and torch.equal(theta_s, saved[epoch].float())
    assert list(models.theta_s) == list(toy.PAPER_OPTIMA)
    assert calls["train"][1][5] == calls["train"][2][5]  # both trainings see the same noise


def test_synthetic_noise_is_its_own(recorded_training):
    """Same for both zetas; neither what the real points are made of nor the training's noise."""
    _, calls = recorded_training
    z = calls["ddim"][0][1]
    assert torch.equal(z, calls["ddim"][1][1]) and z.shape == (1000, 2)
    root = torch.linalg.cholesky(toy.target()[1])
    whitened = torch.linalg.solve(root, toy.real_data(1000, 42).double().T).T
    torch.manual_seed(42)
    stream = torch.randn(1000, 2, dtype=torch.float64)
    legacy = torch.from_numpy(np.random.RandomState(42).standard_normal((1000, 2)))
    for other in (whitened, stream, legacy):
        correlation = torch.corrcoef(torch.cat([z, other], 1).T)[:2, 2:]
        assert correlation.abs().max() < 0.13  # 4 sigma


def test_training_learns():
    models = toy.train_models(toy.Training(base_steps=300))
    abar, losses = toy.cosine_schedule(1000), []
    for theta in (parameters(42), models.theta_r):
        torch.manual_seed(1)
        data = models.data.double().repeat(20, 1)
        losses.append(float(toy.denoising_loss(theta.double(), data, abar)))
    assert losses[1] < 0.9 * losses[0]


TRAIN_AND_HASH = """
import hashlib, sys, torch, toy_neon
torch.set_num_threads(1)
models = toy_neon.train_models(toy_neon.Training(base_steps=400))
print(torch.backends.cpu.get_cpu_capability())
for theta in [models.data, models.theta_r, *models.theta_s.values()]:
    print(hashlib.sha256(theta.numpy().tobytes()).hexdigest())
"""


def test_training_is_the_same_under_two_instruction_sets():
    """All 4418 weights of all five networks, to the last bit of float32."""
    outputs = []
    for extra in ({}, {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}):
        env = {k: v for k, v in ONE_THREAD.items() if k != "ATEN_CPU_CAPABILITY"} | extra
        command = [sys.executable, "-c", TRAIN_AND_HASH]
        text = subprocess.check_output(command, text=True, env=env, cwd=SCRIPT.parent, timeout=300)
        outputs.append(text.split("\n"))
    if outputs[0][0] == outputs[1][0]:
        pytest.skip(f"PyTorch has one instruction set here: {outputs[0][0]}")
    assert outputs[0][1:] == outputs[1][1:]


# ---------------------------------------------------------------- scores
def test_sobol_points_are_standard_normal():
    z = toy.sobol_normal(2**14, 3)
    assert z.dtype == torch.float64 and z.isfinite().all()
    assert not torch.equal(z, toy.sobol_normal(2**14, 4))
    # Monte Carlo would give 8e-3
    torch.testing.assert_close(z.mean(0), torch.zeros(2).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(2).double(), rtol=0, atol=1e-3)


def test_sliced_w2_of_known_distributions():
    """The target scores near zero, a shift by m the mean of (m . u)^2 over directions: m^2 / 2."""
    root = torch.linalg.cholesky(toy.target()[1])
    x = toy.sobol_normal(2**15, 5) @ root.T
    assert float(toy.sliced_w2(x)) < 1e-4
    shifted = x + torch.tensor([0.6, -0.8], dtype=torch.float64)
    assert float(toy.sliced_w2(shifted)) == pytest.approx(0.5, abs=0.005)
    two_points = root @ torch.tensor([[1.0, -1.0], [1.0, -1.0]]).double()
    # same scale, wrong distribution
    assert float(toy.sliced_w2(two_points.T.repeat(2**13, 1))) > 0.05


def test_scores_follow_the_target(monkeypatch):
    monkeypatch.setattr(toy, "TARGET_MEAN", (3.0, 0.0))
    monkeypatch.setattr(toy, "TARGET_COV", ((4.0, 0.0), (0.0, 1.0)))
    x = toy.sobol_normal(2**15, 5) @ torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double()
    x = x + torch.tensor([3.0, 0.0]).double()
    assert float(toy.sliced_w2(x)) < 1e-4
    assert abs(float(toy.frechet_to_target(x.mean(0), torch.cov(x.T)))) < 1e-5
    assert toy.real_data(4000, 1).mean(0).tolist() == pytest.approx([3, 0], abs=0.15)


def test_exact_protocol_equals_gauss_hermite(scorer):
    """A tensor Gauss-Hermite rule of 200 x 200 nodes in float64: an independent quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    weights = torch.from_numpy(weights / weights.sum())
    grid = torch.cartesian_prod(*[torch.from_numpy(nodes)] * 2)
    product = torch.outer(weights, weights).flatten()
    w = [0.5, -0.3, 0.8, 0.0, 1.0, -1.0]
    x = reference.mlp_ddim(scorer.theta([w]), grid, toy.cosine_schedule(20))[0]
    mean = product @ x
    cov = (x - mean).T @ (product[:, None] * (x - mean))
    want = float(reference.frechet_distance(mean, cov, *toy.target()))
    got = toy.fresh_score(scorer, w)
    # kinks of ReLU limit both rules
    assert got.fd == pytest.approx(want, abs=max(1e-4, 5 * got.fd_error))


def test_error_is_honest(scorer):
    """It covers the difference to a much finer estimate, in most of ten configurations."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(10):
        w = rng.uniform(-1, 1, 6)
        fine = float(frechet(scorer, [w.tolist()], 2**19, seed=77)[0])
        score = toy.fresh_score(scorer, w.tolist())
        covered += abs(score.fd - fine) <= 3 * score.fd_error + 1e-7
        assert score.fd_error < 1e-3 * score.fd
    assert covered >= 8


def test_weights_move_as_the_formula_says(scorer):
    assert torch.equal(scorer.theta([[0.0] * 6])[0], scorer.theta_r)
    torch.testing.assert_close(scorer.theta([[-1.0] * 6])[0], scorer.theta_s, rtol=0, atol=1e-6)
    w = [0.5, -0.3, 0.8, 0.1, 1.0, -0.7]
    steps = torch.tensor(w).repeat_interleave(torch.tensor(toy.SIZES))
    want = scorer.theta_r - steps * (scorer.theta_s - scorer.theta_r)
    torch.testing.assert_close(scorer.theta([w])[0], want, rtol=0, atol=1e-6)


def test_fresh_scores_use_points_that_no_search_uses(scorer, monkeypatch):
    seeds, moments = {"search": set(), "fresh": []}, toy.Scorer.moments
    small = with_scoring(scorer, points=2**10)

    def recording(self, W, n, seed):
        seeds["now"].append(seed)
        return moments(self, W, n, seed)

    monkeypatch.setattr(toy.Scorer, "moments", recording)
    seeds["now"] = searched = []
    toy.layer_grid(small, 0.3, 0.6)
    toy.global_sweep(small, [0.0, 0.5])
    seeds["now"] = fresh = []
    toy.fresh_score(small, [0.1] * 6)
    assert len(fresh) == len(set(fresh)) == 8  # the sets are different
    assert not set(fresh) & ({7} | set(searched))  # 7: the gradient search's


def test_fresh_score_pools_its_sets(scorer, monkeypatch):
    """Mean and covariance of all points together; the error is the mean's over eight sets."""

    def moments(self, W, n, seed):
        k = seed - 1000
        return torch.tensor([[0.5 * k, 0.0]]).double(), (1 + 0.1 * k) * torch.eye(2).double()[None]

    monkeypatch.setattr(toy.Scorer, "moments", moments)
    score = toy.fresh_score(scorer, [0.0] * 6)
    means = [0.5 * k for k in range(8)]
    pooled = (1 + 0.1 * 3.5) * torch.eye(2).double()
    pooled[0, 0] += np.var(means)
    mean = torch.tensor([1.75, 0.0]).double()
    want = reference.frechet_distance(mean, pooled, *toy.target())
    assert score.fd == pytest.approx(float(want), rel=1e-9)
    one_by_one = []
    for k in range(8):
        mean, cov = moments(scorer, None, None, 1000 + k)
        one_by_one.append(float(reference.frechet_distance(mean[0], cov[0], *toy.target())))
    assert score.fd_error == pytest.approx(np.std(one_by_one, ddof=1) / 8**0.5, rel=1e-9)
    assert score.sw2 == float(toy.sliced_w2(scorer.samples([0.0] * 6, 2**15)))


def test_paper_protocol_draws_anew_for_each_configuration(scorer):
    paper = with_scoring(scorer, protocol="paper", points=20_000)
    same = frechet(paper, [[0.3] * 6] * 4, 2000)
    assert len(set(same.tolist())) == 4
    assert torch.equal(same, frechet(paper, [[0.3] * 6] * 4, 2000))  # whatever was drawn before
    assert not torch.equal(same, frechet(with_scoring(paper, seed=43), [[0.3] * 6] * 4, 2000))
    assert not torch.equal(same, frechet(paper, [[0.3] * 6] * 4, 2000, seed=1000))
    score = toy.fresh_score(paper, [0.3] * 6)
    assert score.fd_error is None
    # 7 sigma of 20,000 points
    assert score.fd == pytest.approx(toy.fresh_score(scorer, [0.3] * 6).fd, rel=0.05)


def test_paper_protocol_divides_by_n_minus_1(scorer):
    paper = with_scoring(scorer, protocol="paper")
    generator = torch.Generator().manual_seed(42 + 2**21)
    z = torch.randn(5, 2, dtype=torch.float64, generator=generator).float()
    x = toy.neon_ext.mlp_ddim(paper.theta([[0.3] * 6]), z, toy.cosine_schedule(20))[0].double()
    mean, cov = paper.moments([[0.3] * 6], 5, 0)
    torch.testing.assert_close(mean[0], x.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(cov[0], torch.cov(x.T), rtol=1e-5, atol=1e-6)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Tensors without memory that obey the rules of a GPU; moving them needs no CUDA build."""

    def to(self, device):
        return torch.ops.aten._to_copy(self, device=torch.device(device))

    with FakeTensorMode(allow_non_fake_inputs=True):
        monkeypatch.setattr(torch.Tensor, "to", to)
        monkeypatch.setattr(torch.Tensor, "cpu", lambda self: to(self, "cpu"))
        yield


@pytest.mark.parametrize("protocol", ["exact", "paper"])
def test_device_cuda_puts_everything_on_the_gpu(scorer, protocol, fake_cuda, monkeypatch):
    monkeypatch.setattr(toy, "sobol_normal", lambda n, seed: torch.zeros(n, 2).double())
    cuda = with_scoring(scorer, device="cuda", protocol=protocol)
    assert cuda.theta([[0.1] * 6] * 3).device.type == "cuda"
    mean, cov = cuda.moments([[0.1] * 6] * 3, 64, 0)
    assert mean.shape == (3, 2) and cov.shape == (3, 2, 2)
    assert mean.device.type == cov.device.type == "cpu"
    samples = cuda.samples([0.1] * 6, 64)
    assert samples.device.type == "cpu" and samples.shape == (64, 2)


# ---------------------------------------------------------------- searches
class Table:
    """A scorer whose FD is looked up: table[n][i] for configuration [i, 0, ...] on n points."""

    exact = True

    def __init__(self, table):
        self.table, self.calls = table, []

    def moments(self, W, n, seed):
        self.calls.append((len(W), n))
        return torch.tensor([self.table[n][int(w[0])] for w in W]), None


@pytest.fixture
def looked_up(monkeypatch):
    monkeypatch.setattr(toy, "frechet_to_target", lambda mean, cov: mean)


def test_rounds_keep_the_survivors_and_the_last_one_decides(looked_up):
    """Another one would win in each round; only the survivors of all earlier ones may."""
    coarse = np.arange(10.0) / 10
    middle = np.array([5.0, 3.0, 0.95, 4.0, 2.0, -9, -9, -9, -9, -9])
    fine = np.array([-9, 2.5, 3.5, -9, 2.7, -9, -9, -9, -9, -9])
    table = Table({8: coarse, 64: middle, 512: fine})
    W = [[i] + [0] * 5 for i in range(10)]
    found = toy.ranking(table, W, [(8, 5), (64, 3), (512, 1)])
    # 5 to 9 have lower scores from the first round than any survivor has in the second and third.
    assert table.calls == [(10, 8), (5, 64), (3, 512)]
    assert found.w == [1, 0, 0, 0, 0, 0]
    assert found.fd == [5.0, 2.5, 3.5, 4.0, 2.7, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert found.points == [64, 512, 512, 64, 512, 8, 8, 8, 8, 8]
    assert found.evaluations == 18


@pytest.mark.parametrize(
    "protocol, grid_rounds, sweep_rounds",
    [
        ("exact", [(512, 64), (4096, 4), (32768, 1)], [(4096, 4), (32768, 1)]),
        ("paper", [(327, 1)], [(32768, 1)]),
    ],
)
def test_what_is_ranked_and_on_how_many_points(
    scorer, monkeypatch, protocol, grid_rounds, sweep_rounds
):
    seen = []
    monkeypatch.setattr(toy, "ranking", lambda scorer, W, rounds: seen.append((W, rounds)))
    toy.layer_grid(with_scoring(scorer, protocol=protocol), 0.28, 1.72)
    W, rounds = seen.pop()
    assert rounds == grid_rounds and len(W) == len(set(W)) == 729
    assert {w for row in W for w in row} == {-1.44, 0.28, 2.0}
    toy.global_sweep(with_scoring(scorer, protocol=protocol), toy.GLOBAL_W)
    W, rounds = seen.pop()
    assert rounds == sweep_rounds and all(len(set(row)) == 1 for row in W)
    assert [row[0] for row in W] == pytest.approx(np.linspace(-2, 2, 101).tolist())


def test_grid_refinement_finds_the_exhaustive_winner(scorer):
    grid = toy.layer_grid(scorer, 0.3, 0.6)
    best = grid.W.tolist().index(grid.w)
    assert min(grid.points) == 2**9 and grid.points[best] == 2**15
    exhaustive = frechet(scorer, grid.W, 2**12)
    assert exhaustive[best] <= exhaustive.min() + 1e-4  # the accuracy 4096 points have


@pytest.mark.parametrize("objective", ["fd", "sw2"])
def test_search_gradient_against_central_differences(scorer, objective):
    small = with_scoring(scorer, points=2**11)
    value = toy.Objective(small, toy.Search(evaluations=99), objective)
    assert len(value.z) == 2**9  # a quarter of a score's
    w, h = np.linspace(-0.5, 1.0, 6), 1e-3
    at_w, gradient = value(w)
    mean, cov = small.moments([w.tolist()], 2**9, 7)
    x = toy.neon_ext.mlp_ddim(small.theta([w.tolist()]), value.z.float(), toy.cosine_schedule(20))[
        0
    ]
    want = toy.frechet_to_target(mean, cov)[0] if objective == "fd" else toy.sliced_w2(x)
    assert at_w == pytest.approx(float(want), rel=1e-4)  # the scores' own formula
    for i in range(6):
        step = np.eye(6)[i] * h
        difference = (value(w + step)[0] - value(w - step)[0]) / (2 * h)
        scale = np.abs(gradient).max()
        # sorting and ReLU have kinks; the rest is O(h^2)
        assert gradient[i] == pytest.approx(difference, rel=2e-3, abs=1e-3 * scale)


@pytest.mark.parametrize("objective, start", [("fd", 0.0), ("sw2", 0.4)])
def test_search_improves_its_objective_within_its_evaluations(scorer, objective, start):
    small = with_scoring(scorer, points=2**11)
    found = toy.descend(small, toy.Search(evaluations=15), objective, "a name", start)
    first = toy.Objective(small, toy.Search(), objective)
    at_start = first(np.full(6, start))[0]
    assert found.fd[0] == pytest.approx(first.fds[0], rel=1e-9)  # it starts there
    assert len(found.fd) <= 15 and (found.objective, found.start) == (objective, "a name")
    assert toy.Objective(small, toy.Search(), objective)(np.array(found.w))[0] < at_start


@pytest.mark.parametrize("objective", ["fd", "sw2"])
def test_search_keeps_the_best_of_its_objective(scorer, monkeypatch, objective):
    """Not the last, and not the best of the other score, which it also computes."""
    small = with_scoring(scorer, points=2**9)
    points = [np.full(6, w) for w in (0.0, 0.3, 1.0)]
    monkeypatch.setattr(toy, "frechet_to_target", lambda mean, cov: mean.sum())
    monkeypatch.setattr(toy, "sliced_w2", lambda x: -x.mean(0).sum())
    values = [toy.Objective(small, toy.Search(), objective)(point)[0] for point in points]
    best, middle, worst = np.argsort(values)

    def minimize(value, x0, **_):
        for k in (middle, best, worst):
            value(points[k])

    monkeypatch.setattr(toy.scipy.optimize, "minimize", minimize)
    found = toy.descend(small, toy.Search(), objective, "zero", 0.0)
    assert found.w == points[best].tolist() and len(found.fd) == 3


# ---------------------------------------------------------------- gradient alignment
SMALL = toy.Alignment(points=500, passes=3, batch=200, zetas=(0.9, 1.0, 1.1))


def test_alignment_passes_and_batches(monkeypatch):
    """Every pass goes over all points in batches, each with times and noise of its own."""
    theta = parameters().double().requires_grad_()
    data = toy.real_data(500, 0).double()
    gradients = toy.batch_gradients(theta, data, SMALL, 5)
    assert gradients.shape == (9, 4418) and len(gradients.unique(dim=0)) == 9
    torch.manual_seed(5)
    abar, want = toy.cosine_schedule(1000), []
    for batch in (data[:200], data[200:400], data[400:]):
        loss = toy.denoising_loss(theta, batch, abar)
        want.append(torch.autograd.grad(loss, theta)[0])
    torch.testing.assert_close(gradients[:3], torch.stack(want), rtol=0, atol=1e-12)
    authors = toy.Alignment()
    assert (authors.points, authors.passes, authors.batch) == (100_000, 16, 2048)
    assert authors.passes * -(-authors.points // authors.batch) == 784


def test_preconditioner_is_adams():
    gradients = torch.randn(30, 5, dtype=torch.float64)
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=1.0)
    for gradient in gradients:
        theta.grad = gradient.clone()
        optimizer.step()
    v = optimizer.state[theta]["exp_avg_sq"] / (1 - 0.999**30)
    weight = toy.preconditioner(gradients, toy.Alignment())
    torch.testing.assert_close(weight, 1 / (v.sqrt() + 1e-8), rtol=1e-12, atol=0)


def test_alignment_is_a_cosine_of_its_own_seed(monkeypatch):
    curve = toy.gradient_alignment(parameters(), SMALL)
    assert curve.zeta == [0.9, 1.0, 1.1] and len(set(curve.cosine)) == 3
    assert all(-1 <= cosine <= 1 for cosine in curve.cosine)
    torch.manual_seed(99)
    assert toy.gradient_alignment(parameters(), SMALL) == curve
    assert toy.gradient_alignment(parameters(), dataclasses.replace(SMALL, seed=1)) != curve


def test_alignment_of_equal_distributions_is_one_and_noise_is_not_shared(monkeypatch):
    """Samples that are target points of their own: the population gradients are the same."""
    root, seeds = torch.linalg.cholesky(toy.target()[1]).float(), []
    gradients = toy.batch_gradients

    def recording(theta, data, alignment, seed):
        seeds.append(seed)
        return gradients(theta, data, alignment, seed)

    monkeypatch.setattr(toy, "batch_gradients", recording)
    monkeypatch.setattr(
        toy.neon_ext, "mlp_ddim", lambda theta, z, abar, zeta: zeta * (z @ root.T)[None]
    )
    setup = toy.Alignment(points=20_000, passes=2, batch=5000, zetas=(1.0, 1.5))
    same, wider = toy.gradient_alignment(parameters(), setup).cosine
    assert 0.97 < same < 0.999999 and wider < same
    assert len(seeds) == 3 and seeds[1] == seeds[2] != seeds[0]


def test_alignment_weighs_by_the_preconditioner_of_the_real_side(monkeypatch):
    """Three gradients with a known answer: cosine weighted by 1 / sqrt(v)."""
    real = torch.tensor([[1.0, 4.0], [3.0, -2.0]]).double()
    fake = torch.tensor([[2.0, 1.0], [0.0, 1.0]]).double()
    sides = iter([real, fake])
    monkeypatch.setattr(toy, "batch_gradients", lambda *_: next(sides))
    setup = toy.Alignment(points=4, zetas=(1.1,))
    v = (0.999 * 0.001 * real[0] ** 2 + 0.001 * real[1] ** 2) / (1 - 0.999**2)
    weight, a, b = 1 / (v.sqrt() + 1e-8), real.mean(0), fake.mean(0)
    norms = (weight * a * a).sum() * (weight * b * b).sum()
    want = float((weight * a * b).sum() / norms.sqrt())
    assert toy.gradient_alignment(parameters(), setup).cosine == [pytest.approx(want, rel=1e-9)]


# ---------------------------------------------------------------- never a stale number
@pytest.fixture
def part(tmp_path):
    """finished() with a part that says how often it was made."""
    made = []

    def make(*inputs):
        made.append(inputs)
        return toy.Curve([1.0], [float(len(made))])

    def call(*inputs, kind=toy.Curve, name="a part"):
        return toy.finished(tmp_path, name, kind, make, *inputs).cosine[0]

    call.made = made
    return call


def test_equal_inputs_are_not_computed_again(part):
    theta = torch.arange(3.0)
    assert part(toy.Training(), theta, 0.5) == part(toy.Training(), theta.clone(), 0.5) == 1


@pytest.mark.parametrize(
    "changed",
    [
        (toy.Training(seed=43), torch.arange(3.0), 0.5),
        (dataclasses.replace(toy.Training(), base_lr=2e-4), torch.arange(3.0), 0.5),
        (toy.Training(), torch.tensor([0.0, 1.0, 2.0000002]), 0.5),
        (toy.Training(), torch.arange(3.0).double(), 0.5),
        (toy.Training(), torch.arange(3.0), 0.5000000001),
        (toy.Training(), torch.arange(3.0), None),
    ],
    ids=["seed", "rate", "upstream part", "upstream type", "delta", "none"],
)
def test_a_changed_input_is_computed_again(part, changed):
    part(toy.Training(), torch.arange(3.0), 0.5)
    assert part(*changed) == 2


@pytest.mark.parametrize(
    "name, value",
    [
        ("TARGET_MEAN", (0.0, 0.1)),
        ("TARGET_COV", ((2.0, 1.0), (1.0, 3.0))),
        ("SHAPES", ((32, 3), (2, 32))),
        ("NOISE_LEVELS", 500),
        ("SAMPLE_STEPS", 10),
        ("SCHEDULE_OFFSET", 0.01),
        ("SW2_DIRECTIONS", 16),
    ],
)
def test_a_changed_constant_is_computed_again(part, monkeypatch, name, value):
    part(0)
    monkeypatch.setattr(toy, name, value)
    assert part(0) == 2


@pytest.mark.parametrize("package", ["torch", "np", "scipy"])
def test_another_package_version_is_computed_again(part, monkeypatch, package):
    part(0)
    monkeypatch.setattr(getattr(toy, package), "__version__", "0.0")
    assert part(0) == 2


def test_another_version_of_a_part_is_computed_again(part, monkeypatch):
    part(0)
    monkeypatch.setattr(toy.Curve, "version", 2)
    assert part(0) == 2


def test_what_has_no_fingerprint_is_refused():
    with pytest.raises(TypeError):
        toy.fingerprint([object()])
    assert toy.fingerprint([1, 2]) != toy.fingerprint([12]) != toy.fingerprint(["12"])


def test_deltas_keep_all_their_digits():
    names = [toy.shortest(delta) for delta in (0.1234567, 0.1234568, 1.0, 1.72, 1e-6)]
    assert names == ["0.1234567", "0.1234568", "1", "1.72", "1e-06"]


# ---------------------------------------------------------------- the script
def allow_signals():
    """A shell's background job ignores Ctrl-C, and so would what we start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def launch(*args, script=SCRIPT, **kwargs):
    command = [sys.executable, str(script), *map(str, args)]
    options = {"capture_output": True, "text": True, "timeout": 600, "env": ONE_THREAD}
    return subprocess.run(command, **options, **kwargs)


def one_line(done, *words):
    """Exit code 2 and a single line that has all these words."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


QUICK = ("--base-steps", 200, "--points", 512)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    search = ("--seeds", 2, "--search", "gradient")
    args = ("--delta", "0.4,1.72,0.1234567,0.1234568", *QUICK, *search, "--out", out)
    done = launch(*args, umask=0o022)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars in a log
    return out, args, done


def summary_in(folder):
    return json.loads((folder / "summary.json").read_text())


def test_summary(small_run):
    out, _, done = small_run
    summary = summary_in(out)
    scores = {"w", "fd", "fd_error", "sw2"}
    took = {"evaluations", "seconds"}
    one_seed = {"seed", "base", "collapsed", "global", "layerwise", "search", "global_optima"}
    one_seed |= {"alignment"}
    study = {"command", "config", "machine", "versions", "over_seeds", "seeds", "seconds_total"}
    assert set(summary) == one_seed | study
    assert set(summary["config"]) >= {"seed", "real_points", "base_steps", "base_lr", "self_lr"}
    assert set(summary["config"]) >= {"self_epochs", "noise_levels", "sample_steps", "protocol"}
    assert (summary["config"]["base_steps"], summary["config"]["points"]) == (200, 512)
    assert [seed["seed"] for seed in summary["seeds"]] == [42, 43]
    assert (
        summary["config"]["device"] == "cpu" and summary["versions"]["torch"] == torch.__version__
    )
    for seed in summary["seeds"]:
        assert set(seed) == one_seed
        assert set(seed["base"]) == set(seed["collapsed"]) == scores
        assert set(seed["global"]) == scores | took
        assert all(set(row) == scores | took | {"delta"} for row in seed["layerwise"])
        assert all(set(row) == scores | took | {"objective", "start"} for row in seed["search"])
        assert all(set(row) == scores | took for row in seed["global_optima"].values())
        assert [row["fd"] for row in seed["search"]] == sorted(row["fd"] for row in seed["search"])
        pairs = {(row["objective"], row["start"]) for row in seed["search"]}
        assert pairs == {("fd", "global"), ("fd", "zero"), ("sw2", "global"), ("sw2", "zero")}
        assert all(0 < row["evaluations"] <= 60 for row in seed["search"])


def test_rows_of_the_study_belong_together(small_run):
    """Base and collapsed at 0 and -1, the grid around the global best of the paper's setting."""
    out, _, _ = small_run
    for seed in summary_in(out)["seeds"]:
        assert seed["base"]["w"] == [0.0] * 6 and seed["collapsed"]["w"] == [-1.0] * 6
        assert seed["base"]["fd"] > seed["global"]["fd"] > 0
        main = seed["global_optima"]["zeta 1.1, 250 epochs"]
        assert seed["global"] == main | {"w": main["w"][0]}
        optima = seed["global_optima"]
        assert (
            list(optima) == list(toy.PAPER_OPTIMA) and len({o["fd"] for o in optima.values()}) == 4
        )
        w_star = seed["global"]["w"]
        assert [row["delta"] for row in seed["layerwise"]] == [0.1234567, 0.1234568, 0.4, 1.72]
        for row in seed["layerwise"]:
            steps = {round(w_star + k * row["delta"], 12) for k in (-1, 0, 1)}
            assert set(row["w"]) <= steps and len(row["w"]) == 6
    assert summary_in(out)["seeds"][0]["base"]["fd"] != summary_in(out)["seeds"][1]["base"]["fd"]


def test_searches_start_where_they_say(small_run):
    out, _, _ = small_run
    w_star = summary_in(out)["seeds"][0]["global"]["w"]
    stored = {p.name.split(",")[1]: p for p in (out / "seed_42").glob("search, *")}
    models = torch.load(next((out / "seed_42").glob("models, *")), weights_only=True)["part"]
    theta_s = models["theta_s"]["zeta 1.1, 250 epochs"]
    scorer = toy.Scorer(models["theta_r"], theta_s, toy.Scoring(points=512))
    for objective in ("fd", "sw2"):
        for start, w in (("global", w_star), ("zero", 0.0)):
            path = stored[f" gradient on {objective} from {start}"]
            search = torch.load(path, weights_only=True)["part"]
            first = toy.Objective(scorer, toy.Search(), objective)
            first(np.full(6, w))
            assert search["fd"][0] == pytest.approx(first.fds[0], rel=1e-9)
            assert (search["objective"], search["start"]) == (objective, start)


def test_grids_are_written_and_the_winner_is_the_best_of_the_last_round(small_run):
    out, _, _ = small_run
    grids = {p.name for p in out.glob("grid_*.csv")}
    assert grids == {f"grid_{delta}.csv" for delta in ("0.4", "1.72", "0.1234567", "0.1234568")}
    for row in summary_in(out)["layerwise"]:
        header, *lines = csv.reader((out / f"grid_{row['delta']:.7g}.csv").open())
        assert header == [*("w_" + x.replace(" ", "_") for x in toy.LAYERS), "fd", "points"]
        assert len(lines) == 729 and len({tuple(line[:6]) for line in lines}) == 729
        last = [line for line in lines if line[7] == "512"]
        assert len(last) == 4
        best = min(last, key=lambda line: float(line[6]))
        assert [float(x) for x in best[:6]] == row["w"]


def test_table(small_run):
    out, _, done = small_run
    summary = summary_in(out)
    rows = {row["name"]: row for row in summary["over_seeds"]}
    assert list(rows)[:5] == ["base", "collapsed", "global", "delta 0.1234567", "delta 0.1234568"]
    assert len(rows) == 3 + 4 + 4
    delta = [
        [row for row in seed["layerwise"] if row["delta"] == 1.72][0] for seed in summary["seeds"]
    ]
    for column, score in enumerate(("fd", "sw2")):
        ours = [row[score] for row in delta]
        assert rows["delta 1.72"]["mean"][column] == pytest.approx(np.mean(ours))
        assert rows["delta 1.72"]["std"][column] == pytest.approx(np.std(ours, ddof=1))
        pairs = zip(ours, summary["seeds"], strict=True)
        wins = sum(mine < seed["global"][score] for mine, seed in pairs)
        assert rows["delta 1.72"]["better_than_global"][column] == wins
    base = rows["base"]
    lines = {re.split(r"  +", line)[0]: line for line in done.stdout.splitlines()}
    assert f"{base['mean'][0]:.5f} +- {base['std'][0]:.5f}" in lines["base"]
    assert "0.1626" in lines["base"] and "0.009516" in lines["delta 1.72"]
    assert set(rows) <= set(lines)


def test_one_seed_has_no_spread(scorer):
    rows = {
        "base": toy.Score([0.0] * 6, 0.5, 0.01, 0.3),
        "global": toy.Score([1.0] * 6, 0.2, None, 0.4),
    }
    run = toy.Run(42, None, "", rows, {}, {}, {}, {}, None)
    base, best = toy.table_over_seeds([run])
    assert base["std"] == [0.01, None] and best["std"] == [None, None]
    assert base["mean"] == [0.5, 0.3] and base["better_than_global"] == [0, 1]


def test_second_run_uses_the_cache_and_repeats_the_numbers(small_run):
    out, args, _ = small_run
    before = summary_in(out)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    # models, sweeps with their scores, base and collapsed, grids and searches with their scores
    assert len(stamps) == 2 * (1 + 4 * 2 + 2 + 4 * 2 + 4 * 2)
    assert launch(*args).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")} == stamps
    assert summary_in(out)["seeds"] == before["seeds"]


def test_files_have_the_usual_mode_and_nothing_else_is_left(small_run):
    out, _, _ = small_run
    files = [p for p in out.rglob("*") if p.is_file()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o644}
    assert {p.suffix for p in files} == {".pt", ".csv", ".png", ".json"}
    assert {p.name for p in out.rglob("*") if p.is_dir()} == {"seed_42", "seed_43"}


def numbers(folder):
    summary = summary_in(folder)
    return [
        [row["fd"], row["sw2"]]
        for row in (summary["base"], summary["global"], *summary["layerwise"])
    ]


def test_editing_the_script(tmp_path):
    """A comment changes no file; another target, another result: that of a fresh folder."""
    text = SCRIPT.read_text()
    copies = {
        "same": text,
        "comment": text.replace("\n\n\ndef ", "\n\n\n# a comment\ndef ") + "\n# more\n",
        "target": text.replace("TARGET_COV = ((2.0, 1.0)", "TARGET_COV = ((3.0, 1.0)"),
    }
    assert len(set(copies.values())) == 3
    for name, content in copies.items():
        (tmp_path / f"{name}.py").write_text(content)
    used, fresh = tmp_path / "used", tmp_path / "fresh"

    def run(name, out):
        done = launch(*QUICK, "--out", out, script=tmp_path / f"{name}.py")
        assert done.returncode == 0, done.stderr
        return {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}

    first, first_numbers = run("same", used), None
    first_numbers = numbers(used)
    assert run("comment", used) == first and numbers(used) == first_numbers
    run("target", used)
    run("target", fresh)
    assert numbers(used) == numbers(fresh) != first_numbers


def test_another_delta_or_accuracy_keeps_the_models(small_run, tmp_path):
    out, _, _ = small_run
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy/alignment.png").write_text("an earlier study's")
    args = ("--base-steps", 200, "--points", 1024, "--delta", 0.6, "--out", tmp_path / "copy")
    assert launch(*args).returncode == 0
    seed = tmp_path / "copy/seed_42"
    assert len(list(seed.glob("models, *"))) == 1 and len(list(seed.glob("base, *"))) == 2
    # no table or picture of the earlier study beside this one's summary
    assert [p.name for p in (tmp_path / "copy").glob("grid_*")] == ["grid_0.6.csv"]
    assert not (tmp_path / "copy/alignment.png").exists()
    assert numbers(tmp_path / "copy")[0] != numbers(out)[0]  # on other points


def test_resume_after_interruption_gives_the_same_result(small_run, tmp_path):
    """Without the later parts, as after an interruption: same numbers, earlier parts untouched."""
    out, args, _ = small_run
    resumed = tmp_path / "resumed"
    shutil.copytree(out / "seed_42", resumed / "seed_42")
    for lost in [*resumed.rglob("*delta 1.72*"), *resumed.rglob("*gradient*")]:
        lost.unlink()
    stamps = {p: p.stat().st_mtime_ns for p in resumed.rglob("*.pt")}
    assert launch(*args[:-1], resumed).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    a, b = summary_in(out), summary_in(resumed)
    for kind in ("layerwise", "search"):
        assert [(r["fd"], r["w"]) for r in a[kind]] == [(r["fd"], r["w"]) for r in b[kind]]


# ---------------------------------------------------------------- manners
def test_default_folder_is_not_the_recorded_one():
    args = toy.parse([])
    assert args.out == Path("runs/toy") and args.delta == [1.72] and args.points == 2**15
    assert toy.parse(["--protocol", "paper"]).points == 1_000_000
    assert toy.parse(["--delta", "all"]).delta == (0.05, 0.1, 0.2, 0.4, 0.6, 1.0, 1.5, 1.72)


@pytest.mark.parametrize(
    "args, message",
    [
        (("--delta", "abc"), "'abc'"),
        (("--delta", "-1"), "'-1'"),
        (("--delta", ""), "--delta"),
        (("--delta", "nan"), "--delta"),
        (("--delta", "1,,2"), "--delta"),
        (("--delta", "1e-12"), "--delta"),
        (("--seeds", "0"), "--seeds"),
        (("--base-steps", "0"), "--base-steps"),
        (("--protocol", "best"), "--protocol"),
        (("--points", "1000"), "--points 1000"),
        (("--points", "8"), "--points 8"),
        (("--points", "0"), "--points 0"),
        (("--device", "cuda"), "--device cuda"),
        (("--device", "tpu"), "--device"),
        (("--seed", "-1"), "--seed"),
        (("--seed", "2147483647", "--seeds", "2"), "--seed"),
        (("--out", "/proc/no"), "/proc/no"),
        (("--nonsense",), "--nonsense"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(args, message, tmp_path):
    if args[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = launch(*(args if "--out" in args else ("--out", tmp_path / "out", *args)))
    assert not list(tmp_path.iterdir())  # checked before anything is created
    one_line(done, message)


def test_extension_not_built(monkeypatch, capsys):
    monkeypatch.setattr(toy, "neon_ext", None)
    monkeypatch.setattr(toy, "import_error", "No module named 'neon_ext'", raising=False)
    with pytest.raises(SystemExit) as stop:
        toy.main([])
    assert stop.value.code == 2
    assert "pip install" in (line := capsys.readouterr().err) and "No module" in line


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    torch.save({"key": "other", "part": {"theta_r": torch.zeros(3)}}, path)


def another_kind(path):
    torch.save([1, 2, 3], path)


def text(path):
    path.write_text("hello\n")


def flip(path):
    """One bit of a number changes; the file is whole in every other way."""
    content = bytearray(path.read_bytes())
    stored = torch.load(path, weights_only=True)["part"]
    tensor = stored["theta_r"] if "theta_r" in stored else stored["W"]
    at = bytes(content).index(tensor.numpy().tobytes())
    content[at + 5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, empty, foreign, another_kind, text, flip])
@pytest.mark.parametrize("name", ["models", "grid, delta 1.72"])
def test_bad_cache_leaves_results_alone(small_run, name, damage):
    out, args, _ = small_run
    path = next((out / "seed_43").glob(f"{name}, *.pt"))
    good, before = path.read_bytes(), {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
    damage(path)
    try:
        one_line(launch(*args), "delete it", str(path))
    finally:
        path.write_bytes(good)
    assert {p: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    one_line(launch("--out", tmp_path / "out"), "--out")
    assert (tmp_path / "out").read_text() == "mine"


def test_full_disk(tmp_path):
    """Files may not grow over 16 kB: one line, and the next run leaves no trace of it."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, 16_384))

    done = launch(*QUICK, "--out", tmp_path, preexec_fn=limit)
    one_line(done, "models", "written")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert launch(*QUICK, "--out", tmp_path).returncode == 0
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    "error", [RuntimeError("PytorchStreamWriter failed"), OSError(28, "no space")]
)
def test_failed_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    toy.write_atomically(path, "old")

    def write(part):
        part.write_text("half")
        raise error

    with pytest.raises(
        OSError, match="disk full" if isinstance(error, RuntimeError) else "no space"
    ):
        toy.write_atomically(path, write)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


def test_orphans_of_a_killed_run_go(small_run, tmp_path):
    out, _, _ = small_run
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    for folder in (copy, copy / "seed_42"):
        (folder / ".part-abc").mkdir()
        (folder / ".part-abc/models.pt").write_text("half")
    assert launch(*QUICK, "--out", copy).returncode == 0
    assert not list(copy.rglob(".part-*"))


def handles_sigterm(process):
    """Whether the process has installed its handler (bit 14 of the caught signals)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def start(*args):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    options = {"stderr": subprocess.PIPE, "text": True, "env": ONE_THREAD}
    return subprocess.Popen(command, **options, preexec_fn=allow_signals)


STOPPED = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("number, code", STOPPED, ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("later", [0.0, 0.2, 0.6])
def test_stopped_while_imports_run(tmp_path, number, code, later):
    process = start("--out", tmp_path)
    while not handles_sigterm(process):
        time.sleep(0.005)
    time.sleep(later)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert len(error.strip().splitlines()) == 1 and "run the same command again" in error


@pytest.mark.parametrize("number, code", STOPPED, ids=["Ctrl-C", "SIGTERM"])
def test_stopped_in_a_long_run(tmp_path, number, code):
    """The finished parts stay whole, and nothing else does after the next run."""
    process = start("--base-steps", 1000, "--points", 512, "--seeds", 99, "--out", tmp_path)
    deadline = time.time() + 100
    while not list(tmp_path.glob("seed_42/grid*")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert len(error.strip().splitlines()) == 1 and "finished parts are kept" in error
    parts = list(tmp_path.rglob("*.pt"))
    assert parts and all(torch.load(p, weights_only=True)["key"] for p in parts)
    assert not list(tmp_path.glob("*.json"))


def test_reader_that_leaves(small_run):
    """`| head -1` is no error of ours."""
    _, args, _ = small_run
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=ONE_THREAD) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


# ---------------------------------------------------------------- pictures
def ranked(fd, w):
    W = torch.tensor([[x] * 6 for x in (-2.0, -1.0, 0.0, w, 2.0)]).double()
    return toy.Ranking([w] * 6, W, fd, [512] * 5, 5, 0.1)


@pytest.fixture
def run():
    """Results with round numbers: optimum 0.3, deltas 0.1, 0.5 and 1."""
    base, best = toy.Score([0.0] * 6, 0.2, 1e-4, 0.1), toy.Score([0.3] * 6, 0.05, 1e-5, 0.04)
    scores = {"base": base, "collapsed": toy.Score([-1.0] * 6, 1.5, 1e-4, 0.7), "global": best}
    grids = {}
    for k, delta in enumerate((0.1, 0.5, 1.0)):
        fd = [0.5, 0.4, 0.2, 0.04 - 0.01 * k, 0.3]
        grids[delta] = ranked(fd, round(0.3 + delta, 12))
        row = f"delta {toy.shortest(delta)}"
        scores[row] = toy.Score(grids[delta].w, fd[3], 1e-5, 0.03 - 0.01 * k)
    sweeps = {name: ranked([3.0, 1.5, 0.2, 0.05, 0.9], 0.3) for name in toy.PAPER_OPTIMA}
    descents = {
        "gradient on fd from zero": toy.Descent("fd", "zero", [0.0] * 6, [0.2, 0.3, 0.01], 1.0)
    }
    models = toy.Models(
        toy.real_data(50, 0), parameters(), dict.fromkeys(toy.PAPER_OPTIMA, parameters(1))
    )
    curve = toy.Curve([0.8, 1.0, 1.2], [0.1, 0.02, -0.2])
    optima = dict.fromkeys(toy.PAPER_OPTIMA, best)
    main = "zeta 1.1, 250 epochs"
    return toy.Run(42, models, main, scores, optima, sweeps, grids, descents, curve)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """draw(function, ...) -> its axes, after layout."""
    figures = []
    monkeypatch.setattr(toy, "save", lambda figure, path: figures.append(figure))

    def draw(function, *args):
        function(tmp_path / "picture.png", *args)
        figures[-1].draw_without_rendering()
        return figures[-1].axes

    return draw


def xy(line):
    return [list(map(float, data)) for data in line.get_data()]


def test_pictures_have_150_dots_an_inch(run, tmp_path):
    toy.draw_alignment(tmp_path / "a.png", run.alignment)
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1) and image.size == (750, 525)


def test_sweeps_are_cut_and_marked(run, drawn):
    (axis,) = drawn(toy.draw_sweeps, run)
    assert axis.get_ylim() == (0, 0.4) and axis.get_yscale() == "linear"  # twice the base's 0.2
    assert axis.get_xlim() == pytest.approx((0, 0.3))  # where any curve is below that
    marks = {line.get_marker(): [] for line in axis.lines}
    for line in axis.lines:
        marks[line.get_marker()].append(tuple(np.ravel(xy(line))))
    assert (
        (0.3, 0.05) in marks["o"] and (0.28, 0.0355) in marks["x"] and (1.20, 0.0268) in marks["x"]
    )


def test_weights_are_grouped_bars(run, drawn):
    bars, fd, sw2 = drawn(toy.draw_deltas, [run])
    groups = [container for container in bars.containers]
    assert [group.get_label() for group in groups] == ["delta 0.1", "delta 0.5", "delta 1"]
    assert len({group[0].get_facecolor() for group in groups}) == 3
    for group, grid in zip(groups, run.grids.values(), strict=True):
        assert [bar.get_height() for bar in group] == pytest.approx(grid.w)
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for g in groups for bar in g)
    assert all(a[1] <= b[0] + 1e-9 for a, b in zip(spans, spans[1:], strict=False))
    boxes = [label.get_window_extent() for label in bars.get_xticklabels()]
    assert [label.get_text() for label in bars.get_xticklabels()] == list(toy.LAYERS)
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))  # no name over another


def test_scores_per_delta_with_the_papers_and_the_spread(run, drawn):
    other = dataclasses.replace(run, scores=dict(run.scores))
    for row in ("delta 0.1", "delta 0.5", "delta 1"):
        old = run.scores[row]
        other.scores[row] = dataclasses.replace(old, fd=old.fd + 0.02, sw2=old.sw2 + 0.04)
    _, fd, sw2 = drawn(toy.draw_deltas, [run, other])
    lines = {line.get_label(): xy(line) for line in fd.lines}
    ours = next(label for label in lines if "mean and std of 2 seeds" in label)
    assert lines[ours] == [pytest.approx([0.1, 0.5, 1.0]), pytest.approx([0.05, 0.04, 0.03])]
    assert lines["paper, one run"] == [list(toy.DELTAS), list(toy.PAPER_FD)]
    band = fd.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(0.05 + 0.02 / 2**0.5)
    assert not any("paper" in line.get_label() for line in sw2.lines)  # it has no SW2
    assert xy(sw2.lines[0])[1] == pytest.approx([0.05, 0.04, 0.03])
    assert "one seed" not in ours and len(drawn(toy.draw_deltas, [run])[1].collections) == 0


def test_one_delta_leaves_out_what_has_nothing_to_show(run, drawn):
    one = dataclasses.replace(run, grids={1.0: run.grids[1.0]}, descents={})
    assert len(drawn(toy.draw_deltas, [one])) == 1
    assert len(drawn(toy.draw_search, one)) == 1


def test_clouds_with_two_ellipses(run, drawn):
    axes = drawn(toy.draw_samples, run)
    titles = [axis.get_title() for axis in axes]
    assert [title.split(":")[0] for title in titles] == [
        "real data",
        "base",
        "collapsed",
        "global",
        "delta 1",
    ]
    assert "0.05000" in titles[3] and "0.02000" in titles[4]
    inverse = torch.linalg.inv(toy.target()[1])
    for axis in axes:
        points, *ellipses = (torch.tensor(xy(line)).double() for line in axis.lines)
        assert points.shape[1] >= 50 and axis.get_aspect() == 1
        radii = [((inverse @ e) * e).sum(0).sqrt() for e in ellipses]
        assert [float(r.min()) for r in radii] == pytest.approx([1, 2])
        assert [float(r.max()) for r in radii] == pytest.approx([1, 2])
    # the clouds are those of the rows' weights
    scorer = toy.Scorer(run.models.theta_r, run.models.theta_s[run.main], toy.Scoring())
    want = scorer.samples([-1.0] * 6, 1024)
    assert torch.equal(torch.tensor(xy(axes[2].lines[0])), want.T)


def test_search_curves_over_linear_evaluations(run, drawn):
    grids, searches = drawn(toy.draw_search, run)
    assert grids.get_xscale() == searches.get_xscale() == "linear"
    assert searches.get_xlabel() == "evaluations" and "configurations" in grids.get_xlabel()
    assert xy(searches.lines[0]) == [[1, 2, 3], [0.2, 0.2, 0.01]]
    assert xy(grids.lines[0])[1] == pytest.approx([0.5, 0.4, 0.2, 0.04, 0.04])


def test_alignment_has_a_zero_line(run, drawn):
    (axis,) = drawn(toy.draw_alignment, run.alignment)
    zero, ours, paper = axis.lines
    assert xy(zero)[1] == [0, 0] and xy(ours) == [[0.8, 1.0, 1.2], [0.1, 0.02, -0.2]]
    assert xy(paper) == [[0.9, 1.1], [0.127, -0.175]]
