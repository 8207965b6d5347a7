"""toy_neon.py: what each step promises, from the authors' draws to the pictures."""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import reference
import torch
from scipy.stats import norm
from torch._subclasses.fake_tensor import FakeTensorMode

import toy_neon as toy
from adaptive_neon.extension import Missing

matplotlib.use("Agg")
SCRIPT = Path(toy.__file__)
# The operations are small, and the machine may be busy.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SETTINGS = (
    "zeta 1.1, 50 epochs",
    "zeta 1.1, 250 epochs",
    "zeta 0.9, 50 epochs",
    "zeta 0.9, 250 epochs",
)
MAIN = SETTINGS[1]


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


def test_layout_of_parameters_and_weights():
    assert toy.SIZES == (128, 1056, 1056, 1056, 1056, 66)
    assert toy.OFFSETS == [0, 128, 1184, 2240, 3296, 4352, 4418]
    assert toy.GLOBAL_W == pytest.approx(np.linspace(-2, 2, 101).tolist()) and 0.28 in toy.GLOBAL_W


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
    assert level.min() == 0 and level.max() == 999
    a = abar[level.round().long()]
    noise = (seen["x"] - a.sqrt() * 5)[a[:, 0] < 1] / (1 - a[a[:, 0] < 1]).sqrt()
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02  # 4 sigma of 40,000 numbers
    # 10; 13 of another noise than the input's. Without the few points of level 0.
    assert float(loss) == pytest.approx(float((3 - noise).square().mean()), abs=0.05)


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


def test_base_starts_from_the_authors_draws(small_run):
    theta, data, lr, epochs, saved, noise, _ = small_run.calls["train"][0]
    assert torch.equal(theta, parameters(42).double())
    assert torch.equal(data, toy.real_data(POINTS, 42).double())
    assert (lr, epochs) == (1e-4, (STEPS,))
    torch.manual_seed(42)  # the noise begins where the weights did, as in the recorded study
    assert torch.equal(noise, torch.get_rng_state())

    theta_r, _, data = models_in(small_run.out, 42)
    assert torch.equal(theta_r, saved[STEPS].float())
    assert torch.equal(data, toy.real_data(POINTS, 42))


@pytest.mark.parametrize("place, seed", [(0, 42), (1, 43)])
def test_self_training_starts_from_the_base_on_its_own_samples(small_run, place, seed):
    base, *runs = small_run.calls["train"][3 * place : 3 * place + 3]
    draws = small_run.calls["ddim"][2 * place : 2 * place + 2]
    theta_r = base[4][STEPS]
    _, theta_s, _ = models_in(small_run.out, seed)
    for run, draw, zeta in zip(runs, draws, (1.1, 0.9), strict=True):
        theta, data, lr, epochs, saved, _, _ = run
        assert draw[2] == zeta
        assert torch.equal(draw[0], theta_r) and torch.equal(theta, theta_r)  # not rounded between
        assert torch.equal(data, draw[3]) and data.dtype == torch.float64
        assert (lr, epochs) == (1e-5, (50, 250))
        for epoch in epochs:
            stored = theta_s[f"zeta {zeta}, {epoch} epochs"]
            assert stored.dtype == torch.float32 and torch.equal(stored, saved[epoch].float())


def test_both_self_trainings_see_the_same_noise(small_run):
    """Neither the points' nor the base's: of their samples, then of the training to its end."""
    _, first, second = small_run.calls["train"][:3]
    torch.manual_seed(42 + 2**20)
    z = torch.randn(POINTS, 2, dtype=torch.float64)
    assert all(torch.equal(draw[1], z) for draw in small_run.calls["ddim"][:2])
    assert torch.equal(first[5], torch.get_rng_state()) and torch.equal(second[5], first[5])
    assert first[6] == second[6]
    assert toy.Training().settings == list(SETTINGS)


TRAIN_AND_HASH = """
import hashlib, sys, torch, toy_neon
torch.set_num_threads(1)
models = toy_neon.train_models(toy_neon.Training(base_steps=200))
print(torch.backends.cpu.get_cpu_capability())
for theta in [models.data, models.theta_r, *models.theta_s]:
    print(hashlib.sha256(theta.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
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


def test_sliced_w2_of_a_few_points():
    """Quantiles and directions, which many points or a symmetric cloud would not tell apart."""
    x = torch.tensor([[1.0, 2.0], [-1.5, 0.5], [0.2, -3.0], [4.0, 1.0], [0.0, 0.3]]).double()
    assert float(toy.sliced_w2(x)) == pytest.approx(sw2_again(x), rel=1e-9)


def test_scores_follow_the_target(monkeypatch):
    monkeypatch.setattr(toy, "TARGET_MEAN", (3.0, 0.0))
    monkeypatch.setattr(toy, "TARGET_COV", ((4.0, 0.0), (0.0, 1.0)))
    x = toy.sobol_normal(2**15, 5) @ torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double()
    x = x + torch.tensor([3.0, 0.0]).double()
    assert float(toy.sliced_w2(x)) < 1e-4
    assert abs(float(toy.frechet_to_target(x.mean(0), torch.cov(x.T)))) < 1e-5
    assert toy.real_data(4000, 1).mean(0).tolist() == pytest.approx([3, 0], abs=0.15)


def test_exact_protocol_equals_gauss_hermite(scorer):
    """A tensor Gauss-Hermite rule of 120 x 120 nodes in float64: an independent quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
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


def test_fresh_score_pools_its_sets(scorer, monkeypatch):
    """Mean and covariance of all points together: Sobol sets would be too equal to tell."""
    means = [0.5 * k for k in range(8)]

    def moments(self, W, n, seed):
        k = seed - 1000
        mean = torch.tensor([[means[k], 0.0]]).double()
        return mean, (1 + 0.1 * k) * torch.eye(2).double()[None]

    monkeypatch.setattr(toy.Scorer, "moments", moments)
    pooled = (1 + 0.1 * 3.5) * torch.eye(2).double()
    pooled[0, 0] += np.var(means)
    mean = torch.tensor([1.75, 0.0]).double()
    want = reference.frechet_distance(mean, pooled, *toy.target())
    small = with_scoring(scorer, sw2_points=64)
    assert toy.fresh_score(small, [0.0] * 6).fd == pytest.approx(float(want), rel=1e-9)


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
@pytest.mark.parametrize("objective", ["fd", "sw2"])
def test_search_gradient_against_central_differences(scorer, objective):
    small = with_scoring(scorer, points=2**11)
    value = toy.Objective(small, toy.Search(evaluations=99), objective)
    assert len(value.z) == 2**9  # a quarter of a score's
    w, h = np.linspace(-0.5, 1.0, 6), 1e-3
    at_w, gradient = value(w)
    mean, cov = small.moments([w.tolist()], 2**9, 7)
    theta, abar = small.theta([w.tolist()]), toy.cosine_schedule(20)
    (x,) = toy.neon_ext.mlp_ddim(theta, value.z.float(), abar)
    want = toy.frechet_to_target(mean, cov)[0] if objective == "fd" else toy.sliced_w2(x)
    assert at_w == pytest.approx(float(want), rel=1e-4)  # the scores' own formula
    for i in range(6):
        step = np.eye(6)[i] * h
        difference = (value(w + step)[0] - value(w - step)[0]) / (2 * h)
        scale = np.abs(gradient).max()
        # sorting and ReLU have kinks; the rest is O(h^2)
        assert gradient[i] == pytest.approx(difference, rel=2e-3, abs=1e-3 * scale)


def test_search_stays_within_its_bounds_and_evaluations(scorer, monkeypatch):
    """The best of two steps lies at the bound; at most a line search is for nothing."""
    found = toy.descend(with_scoring(scorer, points=512), toy.Search(bound=0.1), "fd", 0.0)
    assert found.W.abs().max() == 0.1 and found.W.min() == -0.1 and found.W[0].tolist() == [0.0] * 6
    asked, ddim = [], toy.ddim
    monkeypatch.setattr(toy, "ddim", lambda *inputs: asked.append(inputs) or ddim(*inputs))
    few = toy.descend(with_scoring(scorer, points=512), toy.Search(evaluations=3), "fd", 0.4)
    assert len(few.fd) == len(few.W) == few.evaluations == 3 and few.points == [128] * 3
    assert len(asked) < 3 + 20


@pytest.mark.parametrize("objective, best", [("fd", 0.3), ("sw2", 1.0)])
def test_search_keeps_the_best_of_its_objective(scorer, monkeypatch, objective, best):
    """Not the last, and not the best of the other score, which it also computes."""
    scores = {0.0: (3.0, 2.0), 0.3: (1.0, 4.0), 1.0: (2.0, 1.0), 0.5: (4.0, 3.0)}

    def minimize(value, x0, **_):
        for w, (value.fd, value.sw2) in scores.items():
            monkeypatch.setattr(toy, "frechet_to_target", lambda mean, _: 0 * mean.sum() + value.fd)
            monkeypatch.setattr(toy, "sliced_w2", lambda x: 0 * x.sum() + value.sw2)
            value(np.full(6, w))

    monkeypatch.setattr(toy.scipy.optimize, "minimize", minimize)
    found = toy.descend(with_scoring(scorer, points=2**9), toy.Search(), objective, 0.0)
    assert found.w == [best] * 6 and found.fd == [3.0, 1.0, 2.0, 4.0]
    assert found.W.tolist() == [[w] * 6 for w in scores]


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


def test_alignment_is_of_the_target_and_of_samples_of_the_base(monkeypatch):
    """Points and noise of either side, each zeta's samples from the same starting noise."""
    seen = []

    def recording(theta, data, alignment, seed):
        seen.append((data, seed))
        return torch.ones(2, 5, dtype=torch.float64)

    monkeypatch.setattr(toy, "batch_gradients", recording)
    toy.gradient_alignment(parameters(), dataclasses.replace(SMALL, seed=3))
    torch.manual_seed(3 + 2**21)
    z, real_z = torch.randn(2, 500, 2, dtype=torch.float64)
    want = [real_z @ torch.linalg.cholesky(toy.target()[1]).T]
    for zeta in SMALL.zetas:
        want += [reference.mlp_ddim(parameters()[None], z.float(), reference_schedule(20), zeta)[0]]
    for (data, _), points in zip(seen, want, strict=True):
        torch.testing.assert_close(data, points, rtol=0, atol=1e-3)
    assert [seed for _, seed in seen] == [3 + 2**22] + [3 + 2**23] * 3


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
@pytest.mark.parametrize(
    "name, value",
    [
        ("VERSION", 10**6),
        ("TARGET_MEAN", (0.0, 0.1)),
        ("TARGET_COV", ((2.0, 1.0), (1.0, 3.0))),
        ("SHAPES", ((32, 3), (2, 32))),
        ("NOISE_LEVELS", 500),
        ("SAMPLE_STEPS", 10),
        ("SCHEDULE_OFFSET", 0.01),
        ("SW2_DIRECTIONS", 16),
        ("torch.__version__", "0.0"),
        ("np.__version__", "0.0"),
        ("scipy.__version__", "0.0"),
    ],
)
def test_constants_hold_all_that_no_argument_says(monkeypatch, name, value):
    before = toy.constants()
    *package, last = name.split(".")
    monkeypatch.setattr(getattr(toy, package[0]) if package else toy, last, value)
    assert toy.constants() != before


def test_parts_are_known_by_the_constants(small_run, monkeypatch):
    """And kept in the seed's folder."""
    made = []

    def making(folder, constants, *_):
        made.append((folder, constants))
        raise OSError("enough")

    monkeypatch.setattr(toy, "finished", making)
    assert launch(*small_run.args, "--out", small_run.out).code == 2
    assert made == [(small_run.out / "seed_42", toy.constants())]


# ---------------------------------------------------------------- a study
POINTS, STEPS, EVALUATIONS = 250, 150, 8
QUICK = ("--base-steps", STEPS, "--points", 512)
DELTAS = (0.1234567, 0.4, 1.72)  # with all their digits
ROWS = [
    *("base", "collapsed", "global", "delta 0.1234567", "delta 0.4", "delta 1.72"),
    *(f"gradient on {objective} from {start}" for objective, start in toy.DESCENTS),
]
PAPER = {"base": "0.1626", "global": "0.03554", "delta 0.4": "0.025099", "delta 1.72": "0.009516"}


@dataclasses.dataclass(frozen=True)
class FewReal(toy.Training):
    real_points: int = POINTS


@dataclasses.dataclass(frozen=True)
class FewPoints(toy.Scoring):
    sw2_points: int = 2**11


def smaller(patch):
    """Fewer points and evaluations than the options allow."""
    patch.setattr(toy, "Training", FewReal)
    patch.setattr(toy, "Scoring", FewPoints)
    patch.setattr(toy, "Search", partial(toy.Search, evaluations=EVALUATIONS))


@dataclasses.dataclass
class Done:
    code: int
    stdout: str
    stderr: str


def launch(*args) -> Done:
    """The command in this process."""
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                toy.main([str(arg) for arg in args])
            except SystemExit as stop:
                code = stop.code
    return Done(code, out.getvalue(), err.getvalue())


def one_line(done, *words):
    """Exit code 2 and a single line that has all these words."""
    assert done.code == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("toy_neon: ") and all(word in done.stderr for word in words)


@dataclasses.dataclass
class Study:
    """A run, where it lies, and the inputs and results of its trainings and samplings."""

    out: Path
    args: tuple
    done: Done
    calls: dict


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Two seeds, three deltas out of order, all searches."""
    out = tmp_path_factory.mktemp("toy")
    args = ("--delta", "1.72,0.1234567,0.4", *QUICK, "--seeds", 2, "--search", "gradient")
    calls, train, ddim = {"train": [], "ddim": []}, toy.train, toy.ddim

    def recording_train(theta, data, lr, epochs):
        noise = torch.get_rng_state()
        saved = train(theta, data, lr, epochs)
        end = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        calls["train"].append((theta, data, lr, tuple(epochs), saved, noise, end))
        return saved

    def recording_ddim(theta, z, *zeta):
        x = ddim(theta, z, *zeta)
        if zeta:  # not those of a search
            calls["ddim"].append((theta, z, *zeta, x))
        return x

    with pytest.MonkeyPatch.context() as patch:
        smaller(patch)
        patch.setattr(toy, "train", recording_train)
        patch.setattr(toy, "ddim", recording_ddim)
        done = launch(*args, "--out", out)
    assert done.code == 0, done.stderr
    assert done.stderr == ""  # no bars in a log
    return Study(out, args, done, calls)


@pytest.fixture
def quick(monkeypatch):
    """Later runs of the small study: as small, and without figures."""
    smaller(monkeypatch)
    monkeypatch.setattr(toy, "drawn", lambda *figure: None)


@pytest.fixture(scope="module")
def paper_run(tmp_path_factory):
    """Two seeds with the authors' draws, one delta, and the alignment of few points."""
    out = tmp_path_factory.mktemp("paper")
    few = partial(toy.Alignment, points=200, passes=2, batch=90, zetas=(0.9, 1.1))
    args = ("--protocol", "paper", "--points", 700, "--base-steps", 60, "--delta", 0.6)
    args += ("--seed", 7, "--seeds", 2, "--alignment")
    with pytest.MonkeyPatch.context() as patch:
        smaller(patch)
        patch.setattr(toy, "Alignment", few)
        patch.setattr(toy, "GLOBAL_W", tuple(np.linspace(-2, 2, 11).round(4).tolist()))
        calls = {}
        patch.setattr(toy, "drawn", lambda title, plot, *data: calls.update({plot: data}))
        done = launch(*args, "--out", out)
    assert done.code == 0, done.stderr
    return Study(out, args, done, calls)


def summary_in(folder):
    return json.loads((folder / "summary.json").read_text())


def models_in(folder, seed):
    """What the study has stored: theta_r, and theta_s by setting."""
    (path,) = (folder / f"seed_{seed}").glob("models, *")
    tensors, _ = toy.files.load_state(path)
    return tensors["theta_r"], dict(zip(SETTINGS, tensors["theta_s"], strict=True)), tensors["data"]


def again(theta_r, theta_s, W, z):
    """Samples [G, N, 2] of configurations W [G][6] in plain float64."""
    steps = torch.tensor(W).double().repeat_interleave(torch.tensor(toy.SIZES), 1)
    theta = theta_r.double() - steps * (theta_s.double() - theta_r.double())
    return reference.mlp_ddim(theta, z.float(), reference_schedule(20))


def reference_schedule(n):
    t = np.arange(n) / n
    abar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return abar / abar[0]


def fd_again(x, correction=0):
    """x [N, 2] -> distance to the target."""
    cov = torch.cov(x.T, correction=correction)
    want = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    return float(reference.frechet_distance(x.mean(0), cov, torch.zeros(2), want))


def sw2_again(x):
    total, cov = 0.0, np.array([[2.0, 1.0], [1.0, 2.0]])
    for k in range(32):
        u = np.array([np.cos(np.pi * k / 32), np.sin(np.pi * k / 32)])
        at = norm.ppf((np.arange(len(x)) + 0.5) / len(x)) * (u @ cov @ u) ** 0.5
        total += np.mean((np.sort(x.numpy() @ u) - at) ** 2)
    return total / 32


def rows_of(seed):
    """{name: (setting, row)} of one seed's part of the summary, every winner once."""
    rows = {name: (name, row) for name, row in seed["global_optima"].items()}
    rows |= {name: (MAIN, seed[name]) for name in ("base", "collapsed")}
    rows |= {f"delta {row['delta']}": (MAIN, row) for row in seed["layerwise"]}
    for row in seed["search"]:
        rows[f"gradient on {row['objective']} from {row['start']}"] = MAIN, row
    return rows


@pytest.mark.parametrize("number", [0, 1])
def test_every_winner_is_scored_in_its_own_setting(small_run, number):
    """Each row's FD and SW2 are of its weights between the base and its setting's network."""
    out = small_run.out
    seed = summary_in(out)["seeds"][number]
    theta_r, theta_s, _ = models_in(out, seed["seed"])
    rows = rows_of(seed)
    assert len(rows) == 4 + 2 + 3 + 4
    sets = [toy.sobol_normal(512, 1000 + k) for k in range(8)]
    for name, (setting, row) in rows.items():
        x = again(theta_r, theta_s[setting], [row["w"]], torch.cat(sets))[0]
        assert row["fd"] == pytest.approx(fd_again(x), rel=1e-4), name
        one_by_one = [fd_again(part) for part in x.split(512)]
        error = np.std(one_by_one, ddof=1) / 8**0.5
        assert row["fd_error"] == pytest.approx(error, rel=0.05), name
        z = toy.sobol_normal(FewPoints.sw2_points, 1000)
        unseen = sw2_again(again(theta_r, theta_s[setting], [row["w"]], z)[0])
        assert row["sw2"] == pytest.approx(unseen, rel=1e-4), name


@pytest.mark.parametrize("seed, delta", [(43, 1.72)])
def test_the_grid_is_ranked_in_the_papers_setting(small_run, seed, delta):
    """All 729 on 8 points, the survivors on 64, four on 512; the last round's best wins."""
    out = small_run.out
    theta_r, theta_s, _ = models_in(out, seed)
    found = stored_search(out, seed, f"search, delta {delta}")
    summary = {s["seed"]: s for s in summary_in(out)["seeds"]}[seed]
    steps = np.array([-delta, 0, delta]) + summary["global"]["w"]
    W = np.stack(np.meshgrid(*[steps] * 6, indexing="ij"), -1).reshape(729, 6)
    np.testing.assert_allclose(found["W"], W, atol=1e-9)
    alive, fd = np.arange(729), np.zeros(729)
    for n, survivors in ((8, 64), (64, 4), (512, 1)):
        x = again(theta_r, theta_s[MAIN], W[alive], toy.sobol_normal(n, 0))
        fd[alive] = [fd_again(cloud) for cloud in x]
        assert {i for i in range(729) if found["points"][i] >= n} == set(alive)
        alive = alive[np.argsort(fd[alive])[:survivors]]
    np.testing.assert_allclose(found["fd"], fd, rtol=1e-3)
    (row,) = (row for row in summary["layerwise"] if row["delta"] == delta)
    assert row["w"] == pytest.approx(W[alive[0]].tolist(), abs=1e-9)
    assert row["evaluations"] == 729 + 64 + 4


def stored_search(folder, seed, name):
    (path,) = (folder / f"seed_{seed}").glob(f"{name}, *")
    tensors, facts = toy.files.load_state(path)
    return tensors | facts


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_sweep_is_of_its_setting(small_run, setting):
    out = small_run.out
    theta_r, theta_s, _ = models_in(out, 43)
    found = stored_search(out, 43, f"search, {setting}")
    assert found["W"].tolist() == [[w] * 6 for w in toy.GLOBAL_W]
    for w in (-0.4, 1.0, 2.0):
        i = toy.GLOBAL_W.index(w)
        z = toy.sobol_normal(found["points"][i], 0)
        x = again(theta_r, theta_s[setting], [[w] * 6], z)[0]
        assert found["fd"][i] == pytest.approx(fd_again(x), rel=1e-3)
    last = [i for i in range(101) if found["points"][i] == 512]
    assert len(last) == 4 and found["evaluations"] == 105
    best = min(last, key=lambda i: found["fd"][i])
    optimum = summary_in(out)["seeds"][1]["global_optima"][setting]
    assert optimum["w"] == found["w"] == [toy.GLOBAL_W[best]] * 6


@pytest.mark.parametrize("objective, start", toy.DESCENTS)
def test_searches_start_where_they_say_and_keep_their_best(small_run, objective, start):
    out = small_run.out
    w_star = summary_in(out)["seeds"][1]["global"]["w"]
    theta_r, theta_s, _ = models_in(out, 43)
    found = stored_search(out, 43, f"search, gradient on {objective} from {start}")
    assert found["W"][0].tolist() == [w_star if start == "global" else 0.0] * 6
    z = toy.sobol_normal(128, 7)  # a quarter of a score's
    x = again(theta_r, theta_s[MAIN], found["W"].tolist(), z.double())
    np.testing.assert_allclose(found["fd"], [fd_again(cloud) for cloud in x], rtol=1e-4)
    values = found["fd"] if objective == "fd" else [sw2_again(cloud) for cloud in x]
    best = found["W"].tolist().index(found["w"])
    assert values[best] == pytest.approx(min(values), rel=1e-6)
    assert found["W"].abs().max() <= 20 and 1 < len(found["fd"]) <= EVALUATIONS


def test_summary(small_run):
    """What stands where; numbers are computed again elsewhere."""
    out, args = small_run.out, small_run.args
    summary = summary_in(out)
    scores, took = {"w", "fd", "fd_error", "sw2"}, {"evaluations", "seconds"}
    assert summary["command"] == " ".join(
        ["python toy_neon.py", *map(str, args), "--out", str(out)]
    )
    config = {"base_steps": STEPS, "points": 512, "device": "cpu", "seed": 42, "protocol": "exact"}
    config |= {"noise_levels": 1000, "sample_steps": 20, "real_points": POINTS, "base_lr": 1e-4}
    assert summary["config"].items() >= config.items()
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["versions"]["neon_ext"] == toy.neon_ext.build_config()
    assert [seed["seed"] for seed in summary["seeds"]] == [42, 43]
    assert {name: summary[name] for name in summary["seeds"][0]} == summary["seeds"][0]
    for seed in summary["seeds"]:
        assert seed["alignment"] is None
        assert all(set(row) == scores | took | {"delta"} for row in seed["layerwise"])
        assert all(set(row) == scores | took | {"objective", "start"} for row in seed["search"])
        assert seed["search"] == sorted(seed["search"], key=lambda row: row["fd"])
        assert 0 < seed["layerwise"][0]["seconds"] < summary["seconds_total"]


def test_rows_of_the_study_belong_together(small_run):
    """Base and collapsed at 0 and -1, the global row that of the paper's setting."""
    for seed in summary_in(small_run.out)["seeds"]:
        assert seed["base"]["w"] == [0.0] * 6 and seed["collapsed"]["w"] == [-1.0] * 6
        main = seed["global_optima"][MAIN]
        assert seed["global"] == main | {"w": main["w"][0]}
        assert list(seed["global_optima"]) == list(SETTINGS)
        assert len({row["fd"] for row in seed["global_optima"].values()}) == 4
        assert [row["delta"] for row in seed["layerwise"]] == list(DELTAS)


def test_grids_are_written(small_run):
    """Of the first seed, one line a configuration, in the grid's order."""
    out = small_run.out
    names = {p.name for p in out.glob("grid_*.csv")}
    assert names == {f"grid_{delta}.csv" for delta in DELTAS}
    for delta in DELTAS:
        header, *lines = csv.reader((out / f"grid_{delta}.csv").open())
        layers = ["input", "block_0", "block_1", "block_2", "block_3", "output"]
        assert header == [*(f"w_{layer}" for layer in layers), "fd", "points"]
        found = stored_search(out, 42, f"search, delta {delta}")
        table = np.array(lines, dtype=float)
        np.testing.assert_array_equal(table[:, :6], found["W"])
        np.testing.assert_allclose(table[:, 6], found["fd"], rtol=1e-6)
        np.testing.assert_array_equal(table[:, 7], found["points"])


def cells_of(text):
    """{first cell: [other cells]} of a Markdown table, and its header."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in rows]
    return rows[0], {name: cells for name, *cells in rows if not name.startswith(("---", "seeds:"))}


def test_table_of_several_seeds(small_run):
    """Mean, standard deviation and wins of every row, from the seeds' own numbers."""
    header, table = cells_of((small_run.out / "table.md").read_text())
    assert header == ["seeds: 2", "FD", "SW2", "paper FD", "seeds better than global: FD, SW2"]
    assert list(table) == ROWS
    seeds = []
    for seed in summary_in(small_run.out)["seeds"]:
        seeds.append({name: row for name, (_, row) in rows_of(seed).items()})
        seeds[-1]["global"] = seeds[-1][MAIN]
    for name, row in table.items():
        wins = []
        for column, score in enumerate(("fd", "sw2")):
            a, b = (seed[name][score] for seed in seeds)
            assert row[column] == f"{(a + b) / 2:.5f} +- {abs(a - b) / 2**0.5:.5f}"
            wins.append(str(sum(seed[name][score] < seed["global"][score] for seed in seeds)))
        assert row[2:] == [PAPER.get(name, ""), ", ".join(wins)]


def test_table_is_printed_within_a_terminal(small_run):
    *lines, last = small_run.done.stdout.splitlines()
    assert len(lines) < 25 and max(map(len, lines)) <= 100
    _, table = cells_of((small_run.out / "table.md").read_text())
    for (name, cells), line in zip(table.items(), lines[3:], strict=False):
        assert line.split("  ")[0] == name.removeprefix("gradient on ")
        assert all(cell in line for cell in cells)
    assert last.endswith(f"Report: {small_run.out / 'report.html'}") and float(last.split()[0]) > 0


def test_table_of_one_seed(run):
    """Its numerical error in the place of the spread, its weights in the last column."""
    header, table = cells_of(toy.markdown(toy.table([run])))
    assert header == ["seeds: 1", "FD", "SW2", "paper FD", "weights: input, blocks 0 to 3, output"]
    base = ["0.20000 +- 1.0e-04", "0.10000", "0.1626", "0.00, 0.00, 0.00, 0.00, 0.00, 0.00"]
    assert table["base"] == base
    weights = "0.25, 0.50, -0.75, 1.00, 1.25, -1.50"
    assert table["delta 0.5"] == ["0.03000 +- 1.0e-05", "0.02000", "", weights]
    assert table["global"][2] == "0.03554"


# ---------------------------------------------------------------- the authors' draws
def test_several_seeds_with_the_authors_draws(paper_run):
    """Every winner of both seeds on its own 700 points, with the covariance divided by n - 1."""
    out = paper_run.out
    summary = summary_in(out)
    assert [seed["seed"] for seed in summary["seeds"]] == [7, 8]
    rows = cells_of((out / "table.md").read_text())[1]
    assert list(rows) == ["base", "collapsed", "global", "delta 0.6"]
    for seed in summary["seeds"]:
        theta_r, theta_s, data = models_in(out, seed["seed"])
        assert torch.equal(data, toy.real_data(POINTS, seed["seed"]))
        generator = torch.Generator().manual_seed(seed["seed"] + 2**21 + 1000)
        z = torch.randn(700, 2, dtype=torch.float64, generator=generator)
        for name, (setting, row) in rows_of(seed).items():
            x = again(theta_r, theta_s[setting], [row["w"]], z)[0]
            assert row["fd"] == pytest.approx(fd_again(x, correction=1), rel=1e-4), name
            assert row["fd_error"] is None


@pytest.mark.parametrize("seed", [7, 8])
@pytest.mark.parametrize("name, n", [(f"search, {SETTINGS[2]}", 700), ("search, delta 0.6", 7)])
def test_one_draw_a_configuration_in_turn(paper_run, seed, name, n):
    out = paper_run.out
    theta_r, theta_s, _ = models_in(out, seed)
    found = stored_search(out, seed, name)
    setting = MAIN if "delta" in name else SETTINGS[2]
    generator = torch.Generator().manual_seed(seed + 2**21)
    for i in range(11):
        z = torch.randn(n, 2, dtype=torch.float64, generator=generator)
        x = again(theta_r, theta_s[setting], [found["W"][i].tolist()], z)[0]
        assert found["fd"][i] == pytest.approx(fd_again(x, correction=1), rel=1e-3)
    assert found["points"] == [n] * len(found["W"])
    assert found["w"] == found["W"][int(np.argmin(found["fd"]))].tolist()


def test_alignment_is_of_the_first_seed(paper_run):
    out = paper_run.out
    first, second = summary_in(out)["seeds"]
    assert second["alignment"] is None
    few = toy.Alignment(7, points=200, passes=2, batch=90, zetas=(0.9, 1.1))
    want = toy.gradient_alignment(models_in(out, 7)[0], few)
    assert first["alignment"] == {"zeta": [0.9, 1.1], "cosine": want.cosine}
    assert paper_run.calls[toy.draw_alignment] == (toy.Curve(**first["alignment"]),)


# ---------------------------------------------------------------- a study goes on
def test_nothing_else_is_left(small_run):
    out = small_run.out
    grids = {f"grid_{delta}.csv" for delta in DELTAS}
    rest = {"summary.json", "table.md", "report.html", "seed_42", "seed_43"}
    assert {p.name for p in out.iterdir()} == rest | grids
    others = {p.name for p in out.glob("seed_*/*") if p.suffix != ".safetensors"}
    assert others == {"report.html"}


def test_another_delta_or_accuracy_keeps_the_models(small_run, tmp_path, quick):
    copy = tmp_path / "copy"
    shutil.copytree(small_run.out, copy)
    args = ("--base-steps", STEPS, "--points", 1024, "--delta", 0.6, "--out", copy)
    assert launch(*args).code == 0
    seed = copy / "seed_42"
    assert len(list(seed.glob("models, *"))) == 1 and len(list(seed.glob("base, *"))) == 2
    # no table or picture of the earlier study beside this one's summary
    assert [p.name for p in copy.glob("grid_*")] == ["grid_0.6.csv"]
    assert not [*copy.glob("seed_*/report.html")]
    assert summary_in(copy)["base"]["fd"] != summary_in(small_run.out)["base"]["fd"]  # other points


def test_resume_after_interruption_gives_the_same_result(small_run, tmp_path, quick):
    """Without the later parts, as after an interruption: same numbers, earlier parts untouched."""
    # models, sweeps with their scores, base and collapsed, grids and searches with their scores
    parts = 2 * (1 + 4 * 2 + 2 + 3 * 2 + 4 * 2)
    assert len(list(small_run.out.rglob("*.safetensors"))) == parts
    resumed = tmp_path / "resumed"
    for seed in ("seed_42", "seed_43"):
        shutil.copytree(small_run.out / seed, resumed / seed)
    for lost in [*resumed.rglob("*delta 0.4*"), *resumed.rglob("*gradient on sw2 from zero*")]:
        lost.unlink()
    for folder in (resumed, resumed / "seed_42"):  # what a killed run leaves
        (folder / ".part-abc").mkdir()
        (folder / ".part-abc/models").write_text("half")
    stamps = {p: p.stat().st_mtime_ns for p in resumed.rglob("*.safetensors")}
    done = launch(*small_run.args, "--out", resumed)
    assert done.stdout.splitlines()[:-1] == small_run.done.stdout.splitlines()[:-1]
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert not list(resumed.rglob(".part-*"))
    assert numbers_of(summary_in(resumed)) == numbers_of(summary_in(small_run.out))


def numbers_of(summary):
    found = []
    for seed in summary["seeds"]:
        for name, (_, row) in rows_of(seed).items():
            found.append((name, row["fd"], row["sw2"], row["w"]))
    return found


# ---------------------------------------------------------------- manners
def test_defaults():
    args = toy.parse([])
    assert args.out == Path("runs/toy") and args.delta == (1.72,) and args.points == 2**15
    assert (args.seed, args.seeds, args.base_steps) == (42, 1, 10_000)
    assert toy.parse(["--protocol", "paper"]).points == 1_000_000
    assert toy.parse(["--delta", "all"]).delta == (0.05, 0.1, 0.2, 0.4, 0.6, 1.0, 1.5, 1.72)


def test_help_needs_no_extension(monkeypatch, capsys):
    monkeypatch.setattr(toy, "neon_ext", Missing("neon_ext is not built"))
    with pytest.raises(SystemExit) as stop:
        toy.main(["--help"])
    assert stop.value.code == 0 and "--delta" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        (("--delta", "abc"), "'abc'"),
        (("--delta", "-1"), "'-1'"),
        (("--delta", "nan"), "--delta"),
        (("--delta", "1e-12"), "--delta"),
        (("--delta", "101"), "--delta"),
        (("--seeds", "0"), "--seeds"),
        (("--base-steps", "0"), "--base-steps"),
        (("--points", "1000"), "--points 1000"),
        (("--points", "256"), "--points 256"),
        (("--points", "33554432"), "--points 33554432"),
        (("--device", "cuda"), "--device cuda"),
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


def test_bad_cache_leaves_results_alone(small_run, quick):
    out = small_run.out
    path = next((out / "seed_43").glob("search, delta 1.72, *"))
    good, before = path.read_bytes(), {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
    path.write_bytes(good[:-5])
    try:
        one_line(launch(*small_run.args, "--out", out), "delete it", str(path))
    finally:
        path.write_bytes(good)
    assert {p: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_console_command_reads_the_command_line(monkeypatch):
    """And ends as run_command() does, in the toy's name."""
    taken = []
    monkeypatch.setattr(toy, "run_command", lambda *args: taken.append(args))
    toy.main()
    toy.main(["--seed", "4"])
    assert taken == [("toy_neon", toy.study, None), ("toy_neon", toy.study, ["--seed", "4"])]


# ---------------------------------------------------------------- pictures
W_OF = {0.1: [0.4, 0.3, 0.2, 0.3, 0.4, 0.2], 0.5: [0.25, 0.5, -0.75, 1.0, 1.25, -1.5]}
W_OF[1.0] = [1.3, -0.7, 0.3, 0.3, 1.3, -0.7]


@pytest.fixture
def run():
    """Results with round numbers, no two the same: optima 0.1 to 0.4, deltas 0.1, 0.5 and 1."""
    scores, found = {}, {}
    for k, setting in enumerate(SETTINGS):
        w = [round(0.2 + 0.1 * k, 1)] * 6
        scores[setting] = toy.Score(w, 0.04 + 0.01 * k, 1e-5, 0.03 + 0.01 * k)
        W = torch.tensor([[w] * 6 for w in (-2.0, -1.0, 0.0, 0.3, 2.0)])
        fd = [3.0 + k, 1.5, 0.2, 0.04 + 0.01 * k, 0.9]
        found[setting] = toy.Found(w, W, fd, [512] * 5, 5, 0.1)

    scores["base"] = toy.Score([0.0] * 6, 0.2, 1e-4, 0.1)
    scores["collapsed"] = toy.Score([-1.0] * 6, 1.5, 1e-4, 0.7)
    scores["global"] = scores[MAIN]
    for k, (delta, w) in enumerate(W_OF.items()):
        fd = 0.02 if delta == 0.1 else 0.02 + 0.01 * k  # the smallest delta wins
        scores[toy.row_of(delta)] = toy.Score(w, fd, 1e-5, 0.03 - 0.01 * k)
        tried = torch.zeros(729, 6)
        found[toy.row_of(delta)] = toy.Found(w, tried, [fd] * 729, [512] * 729, 729, 0.1)

    name = "gradient on fd from zero"
    scores[name] = toy.Score([0.5] * 6, 0.011, 1e-5, 0.012)
    found[name] = toy.Found([0.5] * 6, torch.zeros(3, 6), [0.2, 0.3, 0.01], [9] * 3, 3, 1.0)
    scorer = toy.Scorer(parameters(), parameters(1), toy.Scoring())
    curve = toy.Curve([0.8, 1.0, 1.2], [0.1, 0.02, -0.2])
    return toy.Run(toy.Training(), scorer, scores, found, tuple(W_OF), curve)


@pytest.fixture
def drawn():
    """draw(function, what) -> its axes, after layout."""

    def draw(function, *what):
        figure, told = function(*what)
        figure.draw_without_rendering()
        assert len(told) > 20
        return figure.axes

    return draw


def xy(line):
    return [list(map(float, data)) for data in line.get_data()]


def labels(axis):
    return axis.get_xlabel(), axis.get_ylabel()


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


SUMMARY = {"command": "python toy_neon.py", "machine": "m", "config": {"seed": 42}, "versions": {}}


def test_page_has_what_was_measured(run, monkeypatch):
    """Every picture of its own data, the samples of their row's weights."""
    monkeypatch.setattr(toy, "drawn", lambda *figure: figure)
    page = toy.page_of([run], SUMMARY)
    (part,) = page.parts
    assert part.beside[1:] == (toy.draw_weights, run)
    assert [figure[1:] for figure in part.figures] == [
        (toy.draw_sweeps, run),
        (toy.draw_scores, [run]),
        (toy.draw_alignment, run.alignment),
    ]
    assert part.tables[0].rows == toy.table([run]) and page.command == "python toy_neon.py"
    assert [row["value"] for row in page.trust_tables[0].rows] == ["m", "42"]

    rows = {"base": [0.0] * 6, "collapsed": [-1.0] * 6, "global": [0.3] * 6, "delta 0.1": W_OF[0.1]}
    assert [panel.name for panel in part.panels] == list(rows)
    assert [panel.caption for panel in part.panels[:2]] == ["FD 0.20000", "FD 1.50000"]
    for panel, w in zip(part.panels, rows.values(), strict=True):
        x = again(run.scorer.theta_r, run.scorer.theta_s, [w], toy.sobol_normal(1024, 1000))[0]
        np.testing.assert_allclose(panel.figure[2], x, atol=1e-3)

    less = dataclasses.replace(run, alignment=None, deltas=(1.0,))
    assert [figure[1] for figure in toy.page_of([less], SUMMARY).parts[0].figures] == [
        toy.draw_sweeps
    ]


def test_page_says_the_papers_numbers_beside_ours(run, monkeypatch):
    monkeypatch.setattr(toy, "drawn", lambda *figure: None)
    (sentence,) = toy.page_of([run], SUMMARY).parts[0].headline
    for words in (
        "base 0.20000 +- 1.0e-04 (paper: 0.1626)",
        "one weight for all layers 0.05000 +- 1.0e-05 (paper: 0.03554)",
        "delta 0.1, 0.02000 +- 1.0e-05 (paper: 0.033426)",
    ):
        assert words in sentence


def test_best_delta_over_seeds_is_that_of_the_mean(run):
    other = dataclasses.replace(run, scores=dict(run.scores))
    for delta, fd in ((0.1, 0.9), (0.5, 0.01), (1.0, 0.03)):
        old = run.scores[toy.row_of(delta)]
        other.scores[toy.row_of(delta)] = dataclasses.replace(old, fd=fd)
    assert (toy.least([run]), toy.least([run, other])) == ("delta 0.1", "delta 0.5")


def test_pages_of_several_seeds(run, monkeypatch, tmp_path):
    """One over them, which links to each one's own; strict JSON beside them."""
    monkeypatch.setattr(toy, "drawn", lambda *figure: None)
    other = dataclasses.replace(run, training=toy.Training(43), alignment=None)
    for seed in (42, 43):
        (tmp_path / f"seed_{seed}").mkdir()
    toy.write_results(tmp_path, [run, other], SUMMARY | {"machine": float("inf")})
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY | {"machine": None}
    text = (tmp_path / "report.html").read_text()
    for seed in (42, 43):
        assert f'href="seed_{seed}/report.html"' in text
        own = (tmp_path / f"seed_{seed}" / "report.html").read_text()
        assert f"lower is better; seed {seed}<" in own and "href=" not in own


def test_sweeps_are_each_settings_own(run, drawn):
    """A curve, our optimum and the paper's; cut at twice the base's 0.2."""
    (axis,) = drawn(toy.draw_sweeps, run)
    assert labels(axis) == ("w, the same for all layers", "FD") and axis.get_ylim() == (0, 0.4)
    *lines, base = axis.lines
    assert xy(base)[1] == [0.2, 0.2] and base.get_label() == "base, w = 0"
    for k, setting in enumerate(SETTINGS):
        curve, ours, papers = lines[3 * k : 3 * k + 3]
        best = run.scores[setting]
        assert xy(curve) == [[-2.0, -1.0, 0.0, pytest.approx(0.3), 2.0], run.found[setting].fd]
        assert curve.get_label() == f"{setting}, best w = {best.w[0]:g}"
        assert xy(ours) == [[best.w[0]], [best.fd]] and ours.get_marker() == "o"
        assert xy(papers) == [[v] for v in toy.PAPER_OPTIMA[setting]] and papers.get_marker() == "x"
        assert len({line.get_color() for line in (curve, ours, papers)}) == 1
    assert toy.PAPER_OPTIMA[MAIN] == (0.28, 0.0355)


def test_weights_are_grouped_bars(run, drawn):
    (bars,) = drawn(toy.draw_weights, run)
    groups = list(bars.containers)
    assert [group.get_label() for group in groups] == ["delta 0.1", "delta 0.5", "delta 1"]
    for group, w in zip(groups, W_OF.values(), strict=True):
        assert [bar.get_height() for bar in group] == pytest.approx(w)
        # around the tick of its layer
        assert [round(bar.get_x() + bar.get_width() / 2) for bar in group] == list(range(6))
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for g in groups for bar in g)
    assert all(a[1] <= b[0] + 1e-9 for a, b in zip(spans, spans[1:], strict=False))
    assert list(bars.get_xticks()) == list(range(6)) and bars.get_ylabel() == "weight of the winner"
    assert [label.get_text() for label in bars.get_xticklabels()] == list(toy.LAYERS)
    dotted = next(line for line in bars.lines if line.get_linestyle() == ":")
    assert xy(dotted)[1] == [0.3, 0.3] and dotted.get_label() == "global, 0.3"


@pytest.mark.parametrize("shift", [(0.02, 0.04), None], ids=["two seeds", "one seed"])
def test_scores_per_delta_with_the_spread(run, drawn, shift):
    """FD and SW2 of the winners and, level, of one weight; the paper has no SW2."""
    runs = [run]
    if shift:
        other = dataclasses.replace(run, scores={})
        for row, old in run.scores.items():
            score = dataclasses.replace(old, fd=old.fd + shift[0], sw2=old.sw2 + shift[1])
            other.scores[row] = score
        runs.append(other)
    (axis,) = drawn(toy.draw_scores, runs)
    assert labels(axis) == ("delta", "distance to the target")
    assert legend_of(axis) == ["FD of the paper, one run", "FD", "SW2"]
    *levels, paper = [line for line in axis.lines if line.get_marker() != "o"]
    assert xy(paper) == [list(toy.DELTAS), list(toy.PAPER_FD)]
    bars = axis.containers
    for k, score in enumerate(("fd", "sw2")):
        middle, half = (shift[k] / 2, shift[k] / 2**0.5) if shift else (0, 0)
        line, _, (spans,) = bars[k]
        mean = [getattr(run.scores[toy.row_of(delta)], score) + middle for delta in W_OF]
        assert xy(line) == [[0.1, 0.5, 1.0], pytest.approx(mean)]
        for value, span in zip(mean, spans.get_segments(), strict=True):
            assert span[:, 1].tolist() == pytest.approx([value - half, value + half])
        one_weight = getattr(run.scores["global"], score) + middle
        assert xy(levels[k])[1] == pytest.approx([one_weight] * 2)
        assert levels[k].get_color() == line.get_color()


def test_a_cloud_and_the_ellipses_at_one_and_two_deviations(run, drawn):
    inverse = torch.linalg.inv(toy.target()[1])
    data = toy.real_data(50, 0)
    (axis,) = drawn(toy.draw_cloud, data)
    np.testing.assert_array_equal(xy(axis.lines[0]), data.T.double())
    ellipses = [torch.tensor(xy(line)).double() for line in axis.lines[1:]]
    assert axis.get_aspect() == 1 and axis.get_xlim() == axis.get_ylim() == (-5, 5)
    radii = [((inverse @ e) * e).sum(0).sqrt() for e in ellipses]
    assert [float(r.min()) for r in radii] == pytest.approx([1, 2])
    assert [float(r.max()) for r in radii] == pytest.approx([1, 2])
    # longest along x = y, as the covariance of +1 says
    assert all(float((e[0] * e[1]).mean()) > 0 for e in ellipses)


def test_alignment_has_a_zero_line(run, drawn):
    (axis,) = drawn(toy.draw_alignment, run.alignment)
    zero, ours, paper = axis.lines
    assert labels(axis) == ("zeta, score scale of the samples", "cosine with the real gradient")
    assert xy(zero)[1] == [0, 0] and xy(ours) == [[0.8, 1.0, 1.2], [0.1, 0.02, -0.2]]
    assert xy(paper) == [[0.9, 1.1], [0.127, -0.175]] and legend_of(axis) == ["ours", "paper"]
