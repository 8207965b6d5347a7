"""Square roots, Fréchet distances and moments against SciPy, closed forms and exact properties."""

import math
import subprocess
import sys

import numpy as np
import pytest
import reference
import scipy.linalg
import torch
from torch.library import opcheck

import neon_ext

# Above 128 other algorithms are used.
SIZES = [1, 2, 33, 129, pytest.param(512, marks=pytest.mark.slow)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def rotation(d, seed):
    return torch.linalg.qr(torch.randn(d, d, generator=seeded(seed), dtype=torch.float64))[0]


def covariance(d, n=None, seed=0, device="cpu"):
    """Unbiased covariance of n features (default 4 d + 8), a spectrum that falls by 1e4."""
    g = seeded(seed)
    n = n or 4 * d + 8
    mixing = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    scale = torch.logspace(0, -2, d, dtype=torch.float64)
    f = torch.randn(n, d, generator=g, dtype=torch.float64) * scale @ mixing
    f = f - f.mean(0)
    return (f.T @ f / (n - 1)).to(device)


def statistics(d, n=None, seed=0, device="cpu"):
    mu = torch.randn(d, generator=seeded(seed + 1000), dtype=torch.float64)
    return mu.to(device), covariance(d, n, seed, device)


def pairs(d, device="cpu", seed=1):
    """mu1, cov1, mu2, cov2."""
    return *statistics(d, seed=seed, device=device), *statistics(d, seed=seed + 1, device=device)


def distance(*args):
    return float(neon_ext.frechet_distance(*args))


# ---------------------------------------------------------------- square root
@pytest.mark.parametrize("d", SIZES)
def test_sqrtm_against_scipy(device, d):
    A = covariance(d, device=device)
    root = neon_ext.sqrtm(A)
    assert torch.equal(root, root.mT)
    scale = float(A.abs().max())
    torch.testing.assert_close(root @ root, A, rtol=0, atol=1e-13 * d * scale)
    # SciPy's residual is 1e-12 at these sizes; the condition of the root (100) amplifies it.
    want = scipy.linalg.sqrtm(A.cpu().numpy()).real
    np.testing.assert_allclose(root.cpu(), want, atol=1e-9 * scale**0.5)


def test_sqrtm_closed_forms(device):
    eye = torch.eye(5, dtype=torch.float64, device=device)
    torch.testing.assert_close(neon_ext.sqrtm(9 * eye), 3 * eye, rtol=0, atol=1e-15)
    assert torch.equal(neon_ext.sqrtm(0 * eye), 0 * eye)
    A = torch.tensor([[2.0, 1.0], [1.0, 2.0]], device=device)  # eigenvalues 1 and 3
    a, b = (1 + 3**0.5) / 2, (3**0.5 - 1) / 2
    want = torch.tensor([[a, b], [b, a]], dtype=torch.float64, device=device)
    torch.testing.assert_close(neon_ext.sqrtm(A), want, rtol=1e-15, atol=0)


def test_sqrtm_batches_singular_and_empty(device):
    batch = torch.stack([covariance(6, seed=s) for s in range(4)]).view(2, 2, 6, 6).to(device)
    batch[0, 1] = covariance(6, n=3)  # rank 2
    roots = neon_ext.sqrtm(batch)
    torch.testing.assert_close(roots @ roots, batch, rtol=0, atol=1e-14)
    torch.testing.assert_close(roots[1, 0], neon_ext.sqrtm(batch[1, 0]), rtol=0, atol=1e-14)
    assert int(torch.linalg.matrix_rank(roots[0, 1], hermitian=True, rtol=1e-6)) == 2
    assert neon_ext.sqrtm(torch.zeros(0, 3, 3, device=device)).shape == (0, 3, 3)


# ---------------------------------------------------------------- Fréchet distance: values
@pytest.mark.parametrize("d", SIZES)
def test_distance_against_scipy(device, d):
    args = pairs(d, device)
    got = neon_ext.frechet_distance(*args)
    assert got.shape == () and got.dtype == torch.float64
    want = reference.frechet_distance_scipy(*(t.cpu() for t in args))
    assert float(got) == pytest.approx(want, rel=1e-9)  # SciPy's error
    assert float(got) == pytest.approx(float(reference.frechet_distance(*args)), rel=1e-12)


@pytest.mark.parametrize("d", [1, 7, 150])
def test_exact_properties(device, d):
    mu1, c1, mu2, c2 = pairs(d, device)
    # Equal covariances: the traces cancel to rounding, a few eps of the trace.
    assert distance(mu1, c1, mu1, c1) <= 1e-14 * d * float(c1.trace())
    means = float((mu1 - mu2).square().sum())
    assert distance(mu1, c1, mu2, c1) == pytest.approx(means, rel=1e-12)

    forward = distance(mu1, c1, mu2, c2)
    assert distance(mu2, c2, mu1, c1) == pytest.approx(forward, rel=1e-12)
    q = rotation(d, 5).to(device)
    rotated = distance(mu1 @ q.T, q @ c1 @ q.T, mu2 @ q.T, q @ c2 @ q.T)
    assert rotated == pytest.approx(forward, rel=1e-11)
    assert distance(3 * mu1, 9 * c1, 3 * mu2, 9 * c2) == pytest.approx(9 * forward, rel=1e-12)


@pytest.mark.parametrize("d", [1, 5, 200])
def test_commuting_covariances(device, d):
    a, b = torch.linspace(0.1, 2, d).double(), torch.linspace(3, 0.5, d).double()
    zero = torch.zeros(d, device=device)
    got = distance(zero, a.diag().to(device), zero, b.diag().to(device))
    assert got == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_two_dimensions_closed_form(device, seed):
    """tr (C1 C2)^(1/2) of 2 x 2 matrices is sqrt(tr C1 C2 + 2 sqrt(det C1 det C2))."""
    mu1, c1, mu2, c2 = args = pairs(2, seed=seed)
    root = math.sqrt(float((c1 @ c2).trace()) + 2 * math.sqrt(float(c1.det() * c2.det())))
    want = float((mu1 - mu2).square().sum() + c1.trace() + c2.trace()) - 2 * root
    assert distance(*(t.to(device) for t in args)) == pytest.approx(want, rel=1e-11)


def test_zero_covariances(device):
    zero, eye = torch.zeros(160, 160, device=device), torch.eye(160, device=device)
    mu = torch.zeros(160, device=device)
    assert distance(mu, zero, mu, zero) == 0
    assert distance(mu, zero, mu + 1, eye) == 320  # |1|^2 + tr I


def test_batches_broadcast(device):
    each = [statistics(5, seed=s, device=device) for s in range(6)]
    mu, cov = (torch.stack(t).view(2, 3, *t[0].shape) for t in zip(*each))
    one = statistics(5, seed=9, device=device)
    got = neon_ext.frechet_distance(mu, cov, *one)
    assert got.shape == (2, 3)
    for i, (m, c) in enumerate(each):
        assert float(got.flatten()[i]) == pytest.approx(distance(m, c, *one), rel=1e-12)
    assert neon_ext.frechet_distance(mu[:0], cov[:0], *one).shape == (0, 3)


@pytest.mark.parametrize(("d", "n"), [(64, 2), (64, 50), (200, 50), (200, 199)])
def test_singular_covariances(device, d, n):
    """N <= D, against singular values of the product of the centred features: no D x D root."""
    g = seeded(n)
    f1, f2 = (torch.randn(n, d, generator=g, dtype=torch.float64) * s + s for s in (1.0, 1.3))
    c1, c2 = ((f - f.mean(0)) / (n - 1) ** 0.5 for f in (f1, f2))
    root = torch.linalg.svdvals(c1 @ c2.T)[: n - 1].sum()
    means = (f1.mean(0) - f2.mean(0)).square().sum()
    want = float(means + c1.square().sum() + c2.square().sum() - 2 * root)

    real, fake = (tuple(reference.feature_moments(f.to(device))) for f in (f1, f2))
    assert distance(*real, *fake) == pytest.approx(want, rel=1e-9)
    prepared = neon_ext.FrechetReference(*real)
    assert float(prepared.distance(*fake)) == pytest.approx(want, rel=1e-9)
    assert float(prepared.distance_from_features(f2.to(device))) == pytest.approx(want, rel=1e-9)


def test_spectrum_over_twelve_orders(device):
    spectrum = torch.logspace(0, -6, 256, dtype=torch.float64)  # eigenvalues 1 to 1e-12
    root1, root2 = (rotation(256, seed) * spectrum for seed in (1, 2))
    want = float(torch.linalg.svdvals(root1.T @ root2).sum())
    c1, c2 = ((r @ r.T).to(device) for r in (root1, root2))
    zero = torch.zeros(256, device=device)
    trace = (float(c1.trace() + c2.trace()) - distance(zero, c1, zero, c2)) / 2
    assert trace == pytest.approx(want, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1000, 2500])
def test_full_size(device, n):
    """D = 2048: the trace term to 1e-8 of singular values of the centred features' product."""
    g, scale = seeded(n), torch.logspace(0, -2, 2048)
    f1, f2 = (
        (torch.randn(n, 2048, generator=g) * scale).abs().double().to(device) for _ in range(2)
    )
    c1, c2 = ((f - f.mean(0)) / (n - 1) ** 0.5 for f in (f1, f2))
    root = float(torch.linalg.svdvals(c1 @ c2.T).sum())
    means = float((f1.mean(0) - f2.mean(0)).square().sum())
    traces = float(c1.square().sum() + c2.square().sum())
    prepared = neon_ext.FrechetReference(f1.mean(0), c1.T @ c1)
    by_moments = float(prepared.distance(*neon_ext.feature_moments(f2)))
    by_features = float(prepared.distance_from_features(f2))
    for d in (by_moments, by_features, prepared.fold_distances(f2, 2)[0]):
        assert (means + traces - d) / 2 == pytest.approx(root, rel=1e-8)


@pytest.mark.parametrize(("method", "floor"), [("auto", 1e-10), ("gram", 1e-7), ("polar", 1e-10)])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 5), (200, 150), (150, 200)])
def test_sums_of_singular_values(device, method, floor, shape, generator):
    """polar is what CUDA computes; on a CPU it runs here only."""
    B = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    want = float(torch.linalg.svdvals(B).sum())
    assert neon_ext._trace_norm(B, method) == pytest.approx(want, rel=1e-13)
    B[:, 0] = B[:, -1]  # singular: gram loses what is below 1e-8 of the largest
    want = float(torch.linalg.svdvals(B).sum())
    assert neon_ext._trace_norm(B, method) == pytest.approx(want, rel=floor)
    assert neon_ext._trace_norm(0 * B, method) == 0


def triangular(d, condition, seed):
    """Cholesky factor of a covariance with eigenvalues from 1 down to 1 / condition."""
    power = -math.log10(condition) / 2
    root = rotation(d, seed) * torch.logspace(0, power, d, dtype=torch.float64)
    return torch.linalg.cholesky(root @ root.T)


@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e8, 1e12])
def test_polar_entered_at_a_lower_bound(device, condition):
    """What CUDA computes; the larger the smallest singular value, the fewer steps are taken."""
    l1, l2 = (triangular(192, condition, seed).to(device) for seed in (1, 2))
    want = float(torch.linalg.svdvals(l1.T @ l2).sum())
    assert neon_ext._polar_root(l1, l2) == pytest.approx(want, rel=1e-13)
    assert neon_ext._polar_root(1e-40 * l1, 1e30 * l2) == pytest.approx(1e-10 * want, rel=1e-13)


def test_ill_conditioned_distance_equals_the_plain_one(device):
    """Spectra over 1e-12, where the Gram method is not even tried."""
    c1, c2 = (root @ root.T for root in (triangular(200, 1e12, s).to(device) for s in (1, 2)))
    zero = torch.zeros(200, device=device)
    want = float(reference.frechet_distance(zero, c1, zero, c2))
    assert distance(zero, c1, zero, c2) == pytest.approx(want, rel=1e-9)


# ---------------------------------------------------------------- magnitudes, batches, kinds
@pytest.mark.parametrize("scale", [1e-300, 1e-100, 1e300])
@pytest.mark.parametrize("d", [4, 200])
def test_distance_at_any_magnitude(device, scale, d):
    zero, eye = torch.zeros(d, device=device), torch.eye(d, dtype=torch.float64, device=device)
    got = distance(zero, scale * eye, zero, 4 * scale * eye)
    assert got == pytest.approx(d * scale, rel=1e-12)  # (2 - 1)^2 in each direction
    one, other = covariance(d, seed=1, device=device), covariance(d, seed=2, device=device)
    want = scale * distance(zero, one, zero, other)
    assert distance(zero, scale * one, zero, scale * other) == pytest.approx(want, rel=1e-9)
    root = neon_ext.sqrtm(scale * one)
    torch.testing.assert_close(root / scale**0.5, neon_ext.sqrtm(one), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("a", "b"), [(1e-100, 1e200), (1e-250, 1e-50)])
@pytest.mark.parametrize("small", [0, 1])
def test_gradient_at_any_magnitude(device, a, b, small):
    """d/d(a C1) of the trace term grows with (b / a)^(1/2), beside which the identity vanishes."""
    zero = torch.zeros(6, dtype=torch.float64, device=device)
    identity = torch.eye(6, dtype=torch.float64, device=device)
    plain = [covariance(6, seed=s, device=device).requires_grad_() for s in (1, 2)]
    neon_ext.frechet_distance(zero, plain[0], zero, plain[1]).backward()

    factors = (a, b) if small == 0 else (b, a)
    scaled = [(f * c.detach()).requires_grad_() for f, c in zip(factors, plain)]
    neon_ext.frechet_distance(zero, scaled[0], zero, scaled[1]).backward()
    got = scaled[small].grad / (b / a) ** 0.5
    torch.testing.assert_close(got, plain[small].grad - identity, rtol=1e-9, atol=1e-12)


def test_distance_of_disjoint_supports(device):
    """The product of the roots is the zero matrix."""
    half = torch.cat([torch.ones(150), torch.zeros(150)]).double().to(device)
    zero = torch.zeros(300, device=device)
    assert distance(zero, half.diag(), zero, (1 - half).diag()) == 300


def test_distance_beyond_float64_is_refused(device):
    eye = 1e308 * torch.eye(100, dtype=torch.float64, device=device)
    zero = torch.zeros(100, device=device)
    with pytest.raises(ValueError, match="beyond the range"):
        neon_ext.frechet_distance(zero, eye, zero, 0.5 * eye)


def test_each_matrix_of_a_batch_is_judged_by_its_own():
    skewed = torch.tensor([[1.0, 0.5], [0.4, 1.0]], dtype=torch.float64)
    batch = torch.stack([1e9 * torch.eye(2, dtype=torch.float64), skewed])
    zero = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="cov2, matrix 1 of the batch, is not symmetric"):
        neon_ext.frechet_distance(zero, torch.eye(2), zero, batch)
    tiny = torch.stack([torch.eye(2), 1e-310 * torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double()])
    with pytest.raises(ValueError, match="not positive semi-definite"):
        neon_ext.sqrtm(tiny)


def test_batches_that_do_not_broadcast():
    with pytest.raises(ValueError, match="do not broadcast"):
        neon_ext.frechet_distance(
            torch.zeros(3, 2), torch.eye(2), torch.zeros(2), torch.eye(2).expand(4, 2, 2)
        )


@pytest.mark.parametrize("which", range(4))
def test_one_meta_tensor_is_refused(which):
    args = [torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(2)]
    args[which] = args[which].to("meta")
    with pytest.raises(ValueError, match="device"):
        neon_ext.frechet_distance(*args)


@pytest.mark.parametrize("kind", ["sparse", "quantised"])
def test_sparse_and_quantised_are_refused(kind):
    if kind == "sparse":
        t = torch.eye(3, dtype=torch.float64).to_sparse()
    else:
        t = torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)
    prepared = neon_ext.FrechetReference(torch.zeros(3), torch.eye(3))
    for call in (
        neon_ext.sqrtm,
        neon_ext.feature_moments,
        lambda c: prepared.distance(torch.zeros(3), c),
        lambda c: prepared.fold_distances(c, 2),
    ):
        with pytest.raises(ValueError, match="float"):
            call(t)


# ---------------------------------------------------------------- scores with folds
FOLDS = [(40, 64, 2), (63, 64, 20), (64, 64, 7), (65, 64, 7), (200, 64, 20), (5, 64, 8)]


@pytest.mark.parametrize(("n", "d", "folds"), [*FOLDS, (170, 300, 4), (301, 300, 3)])
def test_fold_distances(device, n, d, folds, generator):
    """The plain definition: distances of the moments of what is left."""
    f = torch.randn(n, d, generator=generator, dtype=torch.float64) + torch.arange(n)[:, None] / n
    f = f.to(device)
    prepared = neon_ext.FrechetReference(*statistics(d, seed=1, device=device))
    whole, without = prepared.fold_distances(f, folds)
    assert isinstance(whole, float) and len(without) == folds
    parts = f.tensor_split(folds)
    for k, got in enumerate([*without, whole]):
        left = torch.cat([part for j, part in enumerate(parts) if j != k])
        want = prepared.distance(*reference.feature_moments(left))
        assert got == pytest.approx(float(want), rel=1e-10), k


@pytest.mark.parametrize("apart", [0.0, 1e3])
@pytest.mark.parametrize("condition", [1, 1e14])
def test_fold_distances_from_few_ill_conditioned_features(device, apart, condition, generator):
    """Where a Gram matrix would lose the small singular values, or folds lie far apart."""
    f = torch.randn(150, 160, generator=generator, dtype=torch.float64)
    f = f * torch.logspace(0, -math.log10(condition) / 2, 160, dtype=torch.float64)
    f[:50] += apart
    f = f.to(device)
    mu, cov = statistics(160, seed=1, device=device)
    whole, without = neon_ext.FrechetReference(mu, cov).fold_distances(f, 3)
    for got, left in zip([whole, *without], [f, f[50:], torch.cat([f[:50], f[100:]]), f[:100]]):
        centred = (left - left.mean(0)) / (len(left) - 1) ** 0.5
        root = torch.linalg.svdvals(centred @ reference.factor(cov))[: len(left) - 1].sum()
        means = (left.mean(0) - mu).square().sum()
        want = float(means + cov.trace() + centred.square().sum() - 2 * root)
        assert got == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("at", [0, 2])
def test_a_far_fold_does_no_harm_to_the_others(device, at, generator):
    """Sums about one common shift would cancel: 1e16 against 1 in float64."""
    far = torch.full((40, 4), 1e8, dtype=torch.float64)
    folds = [*torch.randn(3, 40, 4, generator=generator, dtype=torch.float64)]
    folds.insert(at, far)
    prepared = neon_ext.FrechetReference(*statistics(4, seed=1, device=device))
    _, without = prepared.fold_distances(torch.cat(folds).to(device), 4)
    left = torch.cat([fold for fold in folds if fold is not far]).to(device)
    want = prepared.distance(*reference.feature_moments(left))
    assert without[at] == pytest.approx(float(want), rel=1e-12)


def test_fold_distances_of_folds_in_several_parts(device, generator):
    """A fold's rows are summed 4,096 at a time about the mean of the first ones; these drift."""
    f = torch.randn(10_001, 3, generator=generator) + torch.arange(10_001)[:, None] / 1000
    f = f.to(device)
    prepared = neon_ext.FrechetReference(*statistics(3, seed=1, device=device))
    whole, without = prepared.fold_distances(f, 2)
    for got, left in zip([whole, *without], [f, f[5001:], f[:5001]]):
        want = float(prepared.distance(*reference.feature_moments(left)))
        assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("n", [150, 500])
def test_fold_distances_at_any_magnitude(device, n, generator):
    f = torch.randn(n, 160, generator=generator, dtype=torch.float64).to(device)
    mu, cov = statistics(160, seed=1, device=device)
    whole, without = neon_ext.FrechetReference(mu, cov).fold_distances(f, 3)
    large = neon_ext.FrechetReference(1e75 * mu, 1e150 * cov).fold_distances(1e75 * f, 3)
    for got, want in zip([large[0], *large[1]], [whole, *without]):
        assert got == pytest.approx(1e150 * want, rel=1e-10)


def test_fold_distances_beyond_float64_are_refused():
    f = torch.tensor([[1e200], [-1e200], [0.0], [1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="beyond the range"):
        neon_ext.FrechetReference(torch.zeros(1), torch.eye(1)).fold_distances(f, 2)


@pytest.mark.parametrize(
    ("edit", "folds", "message"),
    [
        (lambda f: f, 0, "folds = 0"),
        (lambda f: f[:, :4], 2, r"must be \[N, 8\]"),
        (lambda f: f[:1], 1, "N >= 2"),
        (lambda f: f[:3], 2, "fewer than 2 are left"),
        (lambda f: f.long(), 2, "floating point"),
        (lambda f: f / 0, 2, "not finite"),
        (lambda f: f.to("meta"), 2, "dense"),
    ],
)
def test_fold_distances_bad_input(edit, folds, message):
    prepared = neon_ext.FrechetReference(torch.zeros(8), torch.eye(8))
    with pytest.raises(ValueError, match=message):
        prepared.fold_distances(edit(torch.randn(6, 8)), folds)


# ---------------------------------------------------------------- traps of other implementations
@pytest.fixture(scope="module")
def few():
    """mu1, cov1, mu2, cov2 of 60 features in 256 dimensions, and the exact trace of the root."""
    f1, f2 = (torch.randn(60, 256, dtype=torch.float64, generator=seeded(s)) for s in (1, 2))
    (m1, c1), (m2, c2) = map(reference.feature_moments, (f1, f2))
    exact = float(torch.linalg.svdvals((f1 - m1) @ (f2 - m2).T).sum()) / 59
    return m1, c1, m2, c2, exact


def trace_of_root(m1, c1, m2, c2):
    rest = float((m1 - m2).square().sum() + c1.trace() + c2.trace())
    return (rest - distance(m1, c1, m2, c2)) / 2


def test_trap_newton_schulz_on_singular_covariances(few):
    """Ours is exact at N < D, where a Newton-Schulz iteration of the usual length is not."""
    *args, exact = few
    product, eye = args[1] @ args[3], torch.eye(256, dtype=torch.float64)
    y, z = product / product.norm(), eye
    for _ in range(15):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    newton_schulz = float(y.trace() * product.norm().sqrt())
    assert abs(newton_schulz - exact) > 1e-5 * exact  # the trap is real
    assert trace_of_root(*args) == pytest.approx(exact, rel=1e-10)


def test_trap_eigenvalues_of_the_unsymmetric_product(few):
    """At N < D those eigenvalues come out negative or complex; ours stays real and exact."""
    *args, exact = few
    eigenvalues = torch.linalg.eigvals(args[1] @ args[3])
    assert float(eigenvalues.real.min()) < 0 or float(eigenvalues.imag.abs().max()) > 0
    assert trace_of_root(*args) == pytest.approx(exact, rel=1e-10)


def test_trap_float32():
    """float32 covariances are computed on in float64, so that only their own rounding remains."""
    args = [t.float() for t in pairs(512)]
    assert distance(*args) == pytest.approx(distance(*(t.double() for t in args)), rel=1e-12)


def test_trap_tf32_and_float32_precision_flags(device):
    before = torch.get_float32_matmul_precision()
    args = pairs(300, device)
    want = distance(*args)
    try:
        torch.set_float32_matmul_precision("medium")
        assert distance(*(t.float() for t in args)) == pytest.approx(want, rel=1e-5)
        assert distance(*args) == want
    finally:
        torch.set_float32_matmul_precision(before)


MEMORY = """
import torch, neon_ext
def high_water():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
g = torch.Generator().manual_seed(0)
def statistics(d, n):
    return neon_ext.feature_moments(torch.randn(n, d, generator=g) * torch.logspace(0, -2, d))
for n in (1000, 2500):  # the libraries' own buffers, so that only the distance is measured below
    neon_ext.frechet_distance(*statistics(200, n // 10), *statistics(200, n // 10))
real, fake = statistics(2048, 2500), statistics(2048, 2500)
prepared = neon_ext.FrechetReference(*real)
open("/proc/self/clear_refs", "w").write("5")
before = high_water()
prepared.distance(*fake)
print(high_water() - before)
"""


@pytest.mark.slow
def test_memory_of_a_full_size_distance():
    """On the CPU under 400 MB above the two covariances and the reference's factor."""
    command = [sys.executable, "-c", MEMORY]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if "clear_refs" in run.stderr:
        pytest.skip("this system does not tell a process its peak memory")
    assert run.returncode == 0, run.stderr
    assert 30 < float(run.stdout) < 400  # MB; one 2048 x 2048 float64 matrix is 34


# ---------------------------------------------------------------- bad input
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("cov", "message"),
    [
        ([[1.0, 0.5], [0.4, 1.0]], "cov2 is not symmetric: max .* = 0.1"),
        ([[1.0, 2.0], [2.0, 1.0]], "not positive semi-definite: smallest eigenvalue -0.33"),
        ([[NAN, 0.0], [0.0, 1.0]], "cov2 has entries that are not finite"),
        ([[INF, 0.0], [0.0, 1.0]], "cov2 has entries that are not finite"),
        (torch.ones(2, 3), r"cov2 must be \[..., D, D\]"),
        (torch.eye(3), r"mu2? must be \[..., 3\]"),
        (torch.eye(2, dtype=torch.int64), r"cov2 must be \[..., D, D\] floating point"),
    ],
)
def test_bad_covariance(cov, message):
    cov = torch.as_tensor(cov)
    with pytest.raises(ValueError, match=message):
        neon_ext.frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(2), cov)
    with pytest.raises(ValueError, match=message.replace("cov2", "cov")):
        neon_ext.FrechetReference(torch.zeros(2), torch.eye(2)).distance(torch.zeros(2), cov)


def test_bad_means():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="a mean is not finite"):
        neon_ext.frechet_distance(torch.tensor([0.0, NAN]), eye, torch.zeros(2), eye)
    with pytest.raises(ValueError, match=r"mu2 must be \[..., 2\]"):
        neon_ext.frechet_distance(torch.zeros(2), eye, torch.zeros(3), eye)
    with pytest.raises(ValueError, match=r"mu must be \[D\], finite"):
        neon_ext.FrechetReference(torch.tensor([0.0, NAN]), eye)


def with_smallest_eigenvalue(c, relative):
    values, vectors = torch.linalg.eigh(c)
    values[0] = relative * values[-1]
    changed = vectors * values @ vectors.T
    return (changed + changed.T) / 2


def test_large_indefinite_matrix_is_refused_and_rounding_is_not():
    c, zero = covariance(200), torch.zeros(200)
    assert math.isfinite(distance(zero, with_smallest_eigenvalue(c, -1e-12), zero, c))
    with pytest.raises(ValueError, match="smallest eigenvalue -0.001"):
        neon_ext.frechet_distance(zero, with_smallest_eigenvalue(c, -1e-3), zero, c)


# ---------------------------------------------------------------- prepared reference
def test_prepared_reference(device):
    mu1, c1, mu2, c2 = pairs(150, device)
    prepared = neon_ext.FrechetReference(mu1, c1)
    assert float(prepared.distance(mu2, c2)) == distance(mu1, c1, mu2, c2)
    assert prepared.distance(torch.stack([mu2, mu1]), torch.stack([c2, c1])).shape == (2,)


@pytest.mark.parametrize("n", [2, 30, 31, 100])
def test_distance_from_features(device, n, generator):
    prepared = neon_ext.FrechetReference(*statistics(30, seed=1, device=device))
    f = torch.randn(n, 30, generator=generator).to(device)
    want = float(prepared.distance(*reference.feature_moments(f)))
    assert float(prepared.distance_from_features(f)) == pytest.approx(want, rel=1e-11)
    with pytest.raises(ValueError, match="distance_from_features: .* N >= 2"):
        prepared.distance_from_features(f[:1])


def test_prepared_reference_keeps_a_copy(device):
    mu1, c1, mu2, c2 = pairs(5, device)
    prepared = neon_ext.FrechetReference(mu1, c1)
    before = float(prepared.distance(mu2, c2))
    mu1.zero_()
    c1.zero_()
    assert float(prepared.distance(mu2, c2)) == before


# ---------------------------------------------------------------- gradients
def symmetric_distance(m1, c1, m2, c2):
    return neon_ext.frechet_distance(m1, (c1 + c1.mT) / 2, m2, (c2 + c2.mT) / 2)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_gradcheck(device, d):
    args = [t.requires_grad_() for t in pairs(d, device)]
    assert torch.autograd.gradcheck(symmetric_distance, args)


@pytest.mark.parametrize("diagonal", [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 3.0, 3.0]], ids=str)
def test_gradcheck_repeated_eigenvalues(device, diagonal):
    """Derivatives of eigenvectors would be infinite; ours are not used."""
    mu = torch.zeros(4, dtype=torch.float64, device=device)
    eye = torch.eye(4, dtype=torch.float64, device=device)
    c1 = torch.tensor(diagonal, dtype=torch.float64, device=device).diag()
    args = [t.clone().requires_grad_() for t in (mu, c1, mu + 1, 2 * eye)]
    assert torch.autograd.gradcheck(symmetric_distance, args)


def test_gradcheck_batched_and_broadcast():
    mu, cov = (torch.stack(t) for t in zip(*(statistics(3, seed=s) for s in range(3))))
    args = [t.requires_grad_() for t in (mu, cov, *statistics(3, seed=9))]
    assert torch.autograd.gradcheck(symmetric_distance, args)


@pytest.mark.parametrize("n", [9, 3])  # 3: fewer than dimensions, a singular covariance
def test_gradcheck_from_features(n, generator):
    prepared = neon_ext.FrechetReference(*statistics(4, seed=1))
    f = torch.randn(n, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(neon_ext.feature_moments, [f])
    assert torch.autograd.gradcheck(prepared.distance_from_features, [f])


def test_gradient_large_against_formula(device):
    """I - R (R C R)^(-1/2) R with R = cov1^(1/2), where the factors come from Cholesky."""
    m1, c1, m2, c2 = pairs(150, device)
    c2.requires_grad_()
    neon_ext.frechet_distance(m1, c1, m2, c2).backward()
    root = reference.sqrtm(c1)
    values, vectors = torch.linalg.eigh(root @ c2.detach() @ root)
    identity = torch.eye(150, dtype=torch.float64, device=device)
    want = identity - root @ (vectors / values.sqrt() @ vectors.T) @ root
    # The condition of R C R is 1e8: 1e-16 * 1e4 and a margin.
    torch.testing.assert_close(c2.grad, want, rtol=0, atol=1e-9)


def test_gradient_on_singular_covariance_is_finite_and_descends():
    prepared = neon_ext.FrechetReference(*statistics(20, seed=1))
    f = torch.randn(8, 20, dtype=torch.float64, generator=seeded(3), requires_grad=True)
    before = prepared.distance(*neon_ext.feature_moments(f))
    before.backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() > 0
    moved = (f - 0.05 * f.grad).detach()
    assert prepared.distance(*neon_ext.feature_moments(moved)) < before.detach()


def test_twice_differentiating_is_refused():
    args = [t.requires_grad_() for t in pairs(3)]
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(neon_ext.frechet_distance(*args), args[0], create_graph=True)


# ---------------------------------------------------------------- moments
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 5), (257, 64)])
def test_moments_match_numpy(device, dtype, n, d, generator):
    f = (torch.randn(n, d, generator=generator) + 3).to(dtype).to(device)
    exact = f.double().cpu().numpy()
    mean, cov = neon_ext.feature_moments(f)
    np.testing.assert_allclose(mean.cpu(), exact.mean(0), rtol=1e-14)
    want = np.cov(exact, rowvar=False).reshape(d, d)
    np.testing.assert_allclose(cov.cpu(), want, rtol=1e-12, atol=1e-13)


def test_moments_about_a_huge_common_mean(device, generator):
    """S - N mu mu^T would cancel 1e12 against 1: an error of 1e-4."""
    noise = torch.randn(4000, 8, generator=generator, dtype=torch.float64)
    _, cov = neon_ext.feature_moments((noise + 1e6).to(device))
    # What remains is the rounding of the inputs themselves, 1e6 * eps = 1e-10.
    torch.testing.assert_close(cov.cpu(), torch.cov(noise.T), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("features", "message"),
    [(torch.zeros(1, 3), "at least 2 rows"), (torch.zeros(3), r"\[N, D\]"), ([[1], [2]], "float")],
)
def test_moments_bad_input(features, message):
    with pytest.raises(ValueError, match=message):
        neon_ext.feature_moments(torch.as_tensor(features))


# ---------------------------------------------------------------- devices and registration
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_cpu_and_cuda_agree(device):
    args = pairs(700)
    assert distance(*(t.to(device) for t in args)) == pytest.approx(distance(*args), rel=1e-11)


def test_opcheck(device, generator):
    ops = torch.ops.neon_ext
    args = pairs(4, device)
    opcheck(ops.sqrtm.default, (args[1],))
    one = torch.ones((), dtype=torch.float64, device=device)
    opcheck(ops.frechet_distance_backward.default, (one, args[1], args[3]))
    f = torch.randn(6, 3, generator=generator).to(device).requires_grad_()
    opcheck(ops.feature_moments.default, (f,))
    opcheck(ops.frechet_distance.default, tuple(t.requires_grad_() for t in args))
