"""Square roots, Fréchet distance and moments against SciPy, closed forms and exact properties."""

import concurrent.futures
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

SIZES = [1, 2, 3, 8, 33, 64, 129, 192, 512]  # above 128 other algorithms are used


def covariance(d, n=None, seed=0, device="cpu"):
    """Unbiased covariance of n features (default 4 d + 8) with a spectrum that falls by a factor of
    1e4.
    """
    g = torch.Generator().manual_seed(seed)
    n = n or 4 * d + 8
    mixing = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    f = (
        torch.randn(n, d, generator=g, dtype=torch.float64)
        * torch.logspace(0, -2, d, dtype=torch.float64)
        @ mixing
    )
    f = f - f.mean(0)
    return (f.T @ f / (n - 1)).to(device)


def statistics(d, n=None, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(d, generator=g, dtype=torch.float64).to(device), covariance(
        d, n, seed, device
    )


# ---------------------------------------------------------------- square root
@pytest.mark.parametrize("d", SIZES)
def test_sqrtm_against_scipy(device, d):
    A = covariance(d, device=device)
    root = neon_ext.sqrtm(A)
    assert torch.equal(root, root.mT)
    scale = float(A.abs().max())
    torch.testing.assert_close(root @ root, A, rtol=0, atol=1e-13 * d * scale)
    # scipy's own residual is 1e-12 at these sizes; small eigenvalues amplify it by the condition of
    # the root (100).
    np.testing.assert_allclose(
        root.cpu(), scipy.linalg.sqrtm(A.cpu().numpy()).real, atol=1e-9 * scale**0.5
    )


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
    a, b = statistics(d, seed=1, device=device), statistics(d, seed=2, device=device)
    got = neon_ext.frechet_distance(*a, *b)
    assert got.shape == () and got.dtype == torch.float64
    want = reference.frechet_distance_scipy(*(t.cpu() for t in (*a, *b)))
    assert float(got) == pytest.approx(
        want, rel=1e-9
    )  # scipy's error; ours is compared more sharply below
    assert float(got) == pytest.approx(float(reference.frechet_distance(*a, *b)), rel=1e-12)


@pytest.mark.parametrize("d", [1, 7, 150])
def test_exact_properties(device, d):
    (mu1, c1), (mu2, c2) = (
        statistics(d, seed=3, device=device),
        statistics(d, seed=4, device=device),
    )
    # Equal covariances: the traces cancel to rounding, a few eps of the trace.
    assert float(neon_ext.frechet_distance(mu1, c1, mu1, c1)) <= 1e-14 * d * float(c1.trace())
    moved = float(neon_ext.frechet_distance(mu1, c1, mu2, c1))
    assert moved == pytest.approx(float((mu1 - mu2).square().sum()), rel=1e-12)
    forward, backward = (
        neon_ext.frechet_distance(mu1, c1, mu2, c2),
        neon_ext.frechet_distance(mu2, c2, mu1, c1),
    )
    assert float(forward) == pytest.approx(float(backward), rel=1e-12)
    q = torch.linalg.qr(
        torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    )[0].to(device)
    rotated = neon_ext.frechet_distance(mu1 @ q.T, q @ c1 @ q.T, mu2 @ q.T, q @ c2 @ q.T)
    assert float(rotated) == pytest.approx(float(forward), rel=1e-11)
    scaled = neon_ext.frechet_distance(3 * mu1, 9 * c1, 3 * mu2, 9 * c2)
    assert float(scaled) == pytest.approx(9 * float(forward), rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 5, 200])
def test_commuting_covariances(device, d):
    a, b = (
        torch.linspace(0.1, 2, d, dtype=torch.float64),
        torch.linspace(3, 0.5, d, dtype=torch.float64),
    )
    zero = torch.zeros(d, device=device)
    got = neon_ext.frechet_distance(zero, a.diag().to(device), zero, b.diag().to(device))
    assert float(got) == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-12)


def test_two_dimensions_closed_form(device, generator):
    # tr (C1 C2)^(1/2) of 2 x 2 matrices is sqrt(tr C1 C2 + 2 sqrt(det C1 det C2)).
    for seed in range(20):
        (mu1, c1), (mu2, c2) = statistics(2, seed=seed), statistics(2, seed=seed + 50)
        root = math.sqrt(float((c1 @ c2).trace()) + 2 * math.sqrt(float(c1.det() * c2.det())))
        want = float((mu1 - mu2).square().sum() + c1.trace() + c2.trace()) - 2 * root
        got = neon_ext.frechet_distance(*(t.to(device) for t in (mu1, c1, mu2, c2)))
        assert float(got) == pytest.approx(want, rel=1e-11)


def test_zero_covariances(device):
    zero, eye = torch.zeros(160, 160, device=device), torch.eye(160, device=device)
    mu = torch.zeros(160, device=device)
    assert float(neon_ext.frechet_distance(mu, zero, mu, zero)) == 0
    assert float(neon_ext.frechet_distance(mu, zero, mu + 1, eye)) == 320  # |1|^2 + tr I


def test_batches_broadcast(device):
    pairs = [statistics(5, seed=s, device=device) for s in range(6)]
    mu, cov = (torch.stack(t).view(2, 3, *t[0].shape) for t in zip(*pairs))
    one = statistics(5, seed=9, device=device)
    got = neon_ext.frechet_distance(mu, cov, *one)
    assert got.shape == (2, 3)
    for i, (m, c) in enumerate(pairs):
        assert float(got.flatten()[i]) == pytest.approx(
            float(neon_ext.frechet_distance(m, c, *one)), rel=1e-12
        )
    assert neon_ext.frechet_distance(mu[:0], cov[:0], *one).shape == (0, 3)


@pytest.mark.parametrize("n", [2, 50, 199])
@pytest.mark.parametrize("d", [64, 200])
def test_singular_covariances(device, d, n):
    """N <= D: against singular values of the product of the centred features, which never forms a D
    x D root.
    """
    if n > d:
        pytest.skip("not singular")
    g = torch.Generator().manual_seed(n)
    f1, f2 = (torch.randn(n, d, generator=g, dtype=torch.float64) * s + s for s in (1.0, 1.3))
    centred = [(f - f.mean(0)) / (n - 1) ** 0.5 for f in (f1, f2)]
    root = torch.linalg.svdvals(centred[0] @ centred[1].T)[: n - 1].sum()
    want = float(
        (f1.mean(0) - f2.mean(0)).square().sum() + sum(c.square().sum() for c in centred) - 2 * root
    )
    stats = [
        (m.to(device), c.to(device)) for m, c in (reference.feature_moments(f) for f in (f1, f2))
    ]
    assert float(neon_ext.frechet_distance(*stats[0], *stats[1])) == pytest.approx(want, rel=1e-9)
    prepared = neon_ext.FrechetReference(*stats[0])
    assert float(prepared.distance(*stats[1])) == pytest.approx(want, rel=1e-9)
    assert float(prepared.distance_from_features(f2.to(device))) == pytest.approx(want, rel=1e-9)


def test_spectrum_over_twelve_orders(device):
    d = 256
    q1, q2 = (
        torch.linalg.qr(
            torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
        )[0]
        for s in (1, 2)
    )
    root1, root2 = (
        q * torch.logspace(0, -6, d, dtype=torch.float64) for q in (q1, q2)
    )  # eigenvalues 1 to 1e-12
    want = float(torch.linalg.svdvals(root1.T @ root2).sum())
    c1, c2 = ((r @ r.T).to(device) for r in (root1, root2))
    zero = torch.zeros(d, device=device)
    trace = (
        float(c1.trace() + c2.trace()) - float(neon_ext.frechet_distance(zero, c1, zero, c2))
    ) / 2
    assert trace == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize("n", [1000, 2500])
def test_full_size(device, n):
    """D = 2048, once per kind of covariance: trace term to 1e-8 of singular values of the centred
    features' product.
    """
    g = torch.Generator().manual_seed(n)
    scale = torch.logspace(0, -2, 2048)
    f1, f2 = (
        (torch.randn(n, 2048, generator=g) * scale).abs().double().to(device) for _ in range(2)
    )
    c1, c2 = ((f - f.mean(0)) / (n - 1) ** 0.5 for f in (f1, f2))
    root = float(torch.linalg.svdvals(c1 @ c2.T).sum())
    means = float((f1.mean(0) - f2.mean(0)).square().sum())
    traces = float(c1.square().sum() + c2.square().sum())
    moments = neon_ext.Moments(2048, device=device)
    moments.update(f2)
    prepared = neon_ext.FrechetReference(f1.mean(0), c1.T @ c1)
    distances = [prepared.distance(moments.mean(), moments.cov())]
    if n < 2048:
        distances.append(prepared.distance_from_features(f2))
    for d in distances:
        assert (means + traces - float(d)) / 2 == pytest.approx(root, rel=1e-8)


@pytest.mark.parametrize("method, floor", [("svd", 1e-14), ("gram", 1e-7), ("polar", 1e-10)])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 5), (200, 150), (150, 200)])
def test_trace_norm_methods(device, method, floor, shape, generator):
    B = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    want = float(torch.linalg.svdvals(B).sum())
    assert float(neon_ext.trace_norm(B, method)) == pytest.approx(want, rel=1e-13)
    B[:, 0] = B[:, -1]  # singular: methods lose what their docstring says
    want = float(torch.linalg.svdvals(B).sum())
    assert float(neon_ext.trace_norm(B, method)) == pytest.approx(want, rel=floor)
    assert float(neon_ext.trace_norm(B)) == pytest.approx(want, rel=1e-10)


# ---------------------------------------------------------------- magnitudes, batches, kinds
@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-100, 1e100, 1e200, 1e300])
@pytest.mark.parametrize("method", ["svd", "gram", "polar", "auto"])
@pytest.mark.parametrize("d", [5, 200])
def test_trace_norm_at_any_magnitude(device, scale, method, d):
    B = torch.eye(d, dtype=torch.float64, device=device)
    assert float(neon_ext.trace_norm(scale * B, method)) == pytest.approx(d * scale, rel=1e-12)


@pytest.mark.parametrize("method", ["svd", "gram", "polar", "auto"])
def test_trace_norm_of_zero_and_of_what_is_not_finite(device, method):
    B = torch.zeros(150, 140, dtype=torch.float64, device=device)
    assert float(neon_ext.trace_norm(B, method)) == 0
    for bad in (float("nan"), float("inf")):
        B[3, 4] = bad
        with pytest.raises(ValueError, match="not finite"):
            neon_ext.trace_norm(B, method)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e150, 1e300])
@pytest.mark.parametrize("d", [4, 200])
def test_distance_at_any_magnitude(device, scale, d):
    zero, eye = torch.zeros(d, device=device), torch.eye(d, dtype=torch.float64, device=device)
    got = float(neon_ext.frechet_distance(zero, scale * eye, zero, 4 * scale * eye))
    assert got == pytest.approx(d * scale, rel=1e-12)  # (2 - 1)^2 in each direction
    one, other = covariance(d, seed=1, device=device), covariance(d, seed=2, device=device)
    want = scale * float(neon_ext.frechet_distance(zero, one, zero, other))
    got = neon_ext.frechet_distance(zero, scale * one, zero, scale * other)
    assert float(got) == pytest.approx(want, rel=1e-9)
    root = neon_ext.sqrtm(scale * one)
    torch.testing.assert_close(root / scale**0.5, neon_ext.sqrtm(one), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("a", "b"), [(1e-100, 1e200), (1e-250, 1e-50)])
def test_gradient_at_any_magnitude(device, a, b):
    """d/d(a C1) of the trace term grows with (b / a)^(1/2), beside which the identity vanishes."""
    zero = torch.zeros(6, dtype=torch.float64, device=device)
    identity = torch.eye(6, dtype=torch.float64, device=device)
    c1, c2 = covariance(6, seed=1, device=device), covariance(6, seed=2, device=device)
    plain = [c.clone().requires_grad_() for c in (c1, c2)]
    neon_ext.frechet_distance(zero, plain[0], zero, plain[1]).backward()

    small, large = (a * c1).requires_grad_(), (b * c2).requires_grad_()
    neon_ext.frechet_distance(zero, small, zero, large).backward()
    got = small.grad / (b / a) ** 0.5
    torch.testing.assert_close(got, plain[0].grad - identity, rtol=1e-9, atol=1e-12)

    small, large = (a * c2).requires_grad_(), (b * c1).requires_grad_()
    neon_ext.frechet_distance(zero, large, zero, small).backward()
    got = small.grad / (b / a) ** 0.5
    torch.testing.assert_close(got, plain[1].grad - identity, rtol=1e-9, atol=1e-12)


def test_distance_of_disjoint_supports(device):
    """The product of the roots is the zero matrix."""
    d = 300
    half = torch.cat([torch.ones(150), torch.zeros(150)]).double().to(device)
    zero = torch.zeros(d, device=device)
    got = neon_ext.frechet_distance(zero, half.diag(), zero, (1 - half).diag())
    assert float(got) == d


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
    with pytest.raises(ValueError, match="A, matrix 1 of the batch, is not symmetric"):
        neon_ext.sqrtm(batch)
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


def test_sparse_and_quantised_are_refused():
    sparse = torch.eye(3, dtype=torch.float64).to_sparse()
    quantised = torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)
    prepared = neon_ext.FrechetReference(torch.zeros(3), torch.eye(3))
    for t in (sparse, quantised):
        for call in (
            neon_ext.trace_norm,
            neon_ext.sqrtm,
            neon_ext.feature_moments,
            neon_ext.Moments(3).update,
            prepared.distance_from_features,
            lambda c: prepared.distance(torch.zeros(3), c),
            lambda c: prepared.fold_distances(c, 2),
        ):
            with pytest.raises(ValueError, match="float"):
                call(t)


def triangular(d, condition, seed):
    """Cholesky factor of a covariance with eigenvalues from 1 down to 1 / condition."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    power = -torch.log10(torch.tensor(float(condition)))
    root = q * torch.logspace(0, float(power) / 2, d, dtype=torch.float64)
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
    roots = [triangular(200, 1e12, seed).to(device) for seed in (1, 2)]
    c1, c2 = (root @ root.T for root in roots)
    zero = torch.zeros(200, device=device)
    got = float(neon_ext.frechet_distance(zero, c1, zero, c2))
    assert got == pytest.approx(float(reference.frechet_distance(zero, c1, zero, c2)), rel=1e-9)


# ---------------------------------------------------------------- scores with folds
@pytest.mark.parametrize(
    "n, d, folds",
    [
        (40, 64, 2),
        (63, 64, 20),
        (64, 64, 7),
        (65, 64, 7),
        (200, 64, 20),
        (170, 300, 4),
        (300, 300, 3),
        (301, 300, 3),
        (5, 64, 8),
    ],
    ids=str,
)
def test_fold_distances(device, n, d, folds, generator):
    """The plain definition: distances of the moments of what is left."""
    f = torch.randn(n, d, generator=generator, dtype=torch.float64) + torch.arange(n)[:, None] / n
    f = f.to(device)
    prepared = neon_ext.FrechetReference(*statistics(d, seed=1, device=device))
    whole, without = prepared.fold_distances(f, folds)
    assert isinstance(whole, float) and len(without) == folds
    parts = f.tensor_split(folds)
    for k in range(-1, folds):
        left = torch.cat([part for j, part in enumerate(parts) if j != k])
        want = prepared.distance(*reference.feature_moments(left))
        got = whole if k < 0 else without[k]
        assert got == pytest.approx(float(want), rel=1e-10), k


@pytest.mark.parametrize("n", [90, 200])
def test_fold_distances_equal_moments_to_the_bit(device, n, generator):
    f = torch.randn(n, 40, generator=generator).to(device)
    prepared = neon_ext.FrechetReference(*statistics(40, seed=1, device=device))
    moments = neon_ext.Moments(40, 20, device)
    for k, part in enumerate(f.tensor_split(20)):
        moments.update(part, k)
    want = [float(prepared.distance(moments.mean(), moments.cov()))]
    for k in range(20):
        others = [j for j in range(20) if j != k]
        want.append(float(prepared.distance(moments.mean(others), moments.cov(others))))
    whole, without = prepared.fold_distances(f, folds=20)
    assert [whole, *without] == want


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


def test_fold_distances_at_any_magnitude(device, generator):
    f = torch.randn(150, 160, generator=generator, dtype=torch.float64).to(device)
    mu, cov = statistics(160, seed=1, device=device)
    whole, without = neon_ext.FrechetReference(mu, cov).fold_distances(f, 3)
    large = neon_ext.FrechetReference(1e75 * mu, 1e150 * cov).fold_distances(1e75 * f, 3)
    for got, want in zip([large[0], *large[1]], [whole, *without]):
        assert got == pytest.approx(1e150 * want, rel=1e-10)


def test_fold_distances_bad_input():
    prepared = neon_ext.FrechetReference(torch.zeros(8), torch.eye(8))
    f = torch.randn(6, 8)
    for features, folds, message in [
        (f, 0, "folds = 0"),
        (f[:, :4], 2, r"must be \[N, 8\]"),
        (f[:1], 1, "N >= 2"),
        (f[:3], 2, "fewer than 2 are left"),
        (f.long(), 2, "floating point"),
        (f / 0, 2, "not finite"),
        (f.to("meta"), 2, "dense"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepared.fold_distances(features, folds)


# ---------------------------------------------------------------- known traps of other
# implementations
def test_trap_newton_schulz_on_singular_covariances():
    """Ours is exact at N < D, where a Newton-Schulz iteration of the usual length is not."""
    f1, f2 = (
        torch.randn(60, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
        for s in (1, 2)
    )
    (m1, c1), (m2, c2) = map(reference.feature_moments, (f1, f2))
    exact = float(torch.linalg.svdvals((f1 - m1) @ (f2 - m2).T).sum()) / 59
    product = c1 @ c2
    y, z, eye = (
        product / product.norm(),
        torch.eye(256, dtype=torch.float64),
        torch.eye(256, dtype=torch.float64),
    )
    for _ in range(15):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    newton_schulz = float(y.trace() * product.norm().sqrt())
    ours = (
        float(
            (m1 - m2).square().sum()
            + c1.trace()
            + c2.trace()
            - neon_ext.frechet_distance(m1, c1, m2, c2)
        )
        / 2
    )
    assert abs(newton_schulz - exact) > 1e-5 * exact  # the trap is real
    assert ours == pytest.approx(exact, rel=1e-10)


def test_trap_eigenvalues_of_the_unsymmetric_product():
    """At N < D those eigenvalues come out negative or complex; ours stays real and exact."""
    f1, f2 = (
        torch.randn(60, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
        for s in (1, 2)
    )
    (m1, c1), (m2, c2) = map(reference.feature_moments, (f1, f2))
    eigenvalues = torch.linalg.eigvals(c1 @ c2)
    assert float(eigenvalues.real.min()) < 0 or float(eigenvalues.imag.abs().max()) > 0
    assert float(neon_ext.frechet_distance(m1, c1, m2, c2)) == pytest.approx(
        float(neon_ext.FrechetReference(m1, c1).distance_from_features(f2)), rel=1e-10
    )


def test_trap_float32():
    """float32 covariances are computed on in float64, so that only their own rounding remains."""
    (m1, c1), (m2, c2) = statistics(512, seed=1), statistics(512, seed=2)
    args = [t.float() for t in (m1, c1, m2, c2)]
    exact = float(neon_ext.frechet_distance(*(t.double() for t in args)))
    assert float(neon_ext.frechet_distance(*args)) == pytest.approx(exact, rel=1e-12)


def test_trap_tf32_and_float32_precision_flags(device):
    before = torch.get_float32_matmul_precision()
    a, b = statistics(300, seed=1, device=device), statistics(300, seed=2, device=device)
    want = float(neon_ext.frechet_distance(*a, *b))
    try:
        torch.set_float32_matmul_precision("medium")
        assert float(neon_ext.frechet_distance(*(t.float() for t in (*a, *b)))) == pytest.approx(
            want, rel=1e-5
        )
        assert float(neon_ext.frechet_distance(*a, *b)) == want
    finally:
        torch.set_float32_matmul_precision(before)


MEMORY = """
import torch, neon_ext
def high_water():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
g = torch.Generator().manual_seed(0)
def statistics(d, n):
    f = torch.randn(n, d, generator=g) * torch.logspace(0, -2, d)
    moments = neon_ext.Moments(d)
    for part in f.split(250):
        moments.update(part)
    return moments.mean(), moments.cov()
for n in (1000, 2500):  # the libraries' own buffers, so that only the distance is measured below
    neon_ext.frechet_distance(*statistics(200, n // 10), *statistics(200, n // 10))
real, fake = statistics(2048, 2500), statistics(2048, 2500)
prepared = neon_ext.FrechetReference(*real)
open("/proc/self/clear_refs", "w").write("5")
before = high_water()
prepared.distance(*fake)
print(high_water() - before)
"""


def test_memory_of_a_full_size_distance():
    """2048 dimensions on the CPU: under 400 MB above the two covariances and the reference's
    factor.
    """
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=600
    )
    if "clear_refs" in run.stderr:
        pytest.skip("this system does not tell a process its peak memory")
    assert run.returncode == 0, run.stderr
    assert 30 < float(run.stdout) < 400  # MB; at least one 2048 x 2048 float64 matrix is 34


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "cov, message",
    [
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "cov2 is not symmetric: max .* = 0.1"),
        (
            torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
            "not positive semi-definite: smallest eigenvalue -0.33",
        ),
        (torch.tensor([[float("nan"), 0.0], [0.0, 1.0]]), "cov2 has entries that are not finite"),
        (torch.tensor([[float("inf"), 0.0], [0.0, 1.0]]), "cov2 has entries that are not finite"),
        (torch.ones(2, 3), r"cov2 must be \[..., D, D\]"),
        (torch.eye(3), r"mu2? must be \[..., 3\]"),
        (torch.eye(2, dtype=torch.int64), r"cov2 must be \[..., D, D\] floating point"),
    ],
)
def test_bad_covariance(cov, message):
    with pytest.raises(ValueError, match=message):
        neon_ext.frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(2), cov)
    with pytest.raises(ValueError, match=message.replace("cov2", "cov")):
        neon_ext.FrechetReference(torch.zeros(2), torch.eye(2)).distance(torch.zeros(2), cov)


def test_bad_means():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="a mean is not finite"):
        neon_ext.frechet_distance(torch.tensor([0.0, float("nan")]), eye, torch.zeros(2), eye)
    with pytest.raises(ValueError, match=r"mu2 must be \[..., 2\]"):
        neon_ext.frechet_distance(torch.zeros(2), eye, torch.zeros(3), eye)


def with_smallest_eigenvalue(c, relative):
    values, vectors = torch.linalg.eigh(c)
    values[0] = relative * values[-1]
    changed = vectors * values @ vectors.T
    return (changed + changed.T) / 2


def test_large_indefinite_matrix_is_refused_and_rounding_is_not():
    c, zero = covariance(200), torch.zeros(200)
    rounded = with_smallest_eigenvalue(c, -1e-12)
    assert math.isfinite(float(neon_ext.frechet_distance(zero, rounded, zero, c)))
    with pytest.raises(ValueError, match="smallest eigenvalue -0.001"):
        neon_ext.frechet_distance(zero, with_smallest_eigenvalue(c, -1e-3), zero, c)


# ---------------------------------------------------------------- prepared reference
def test_certificate(device):
    (mu1, c1), (mu2, c2) = (
        statistics(40, seed=1, device=device),
        statistics(40, n=11, seed=2, device=device),
    )
    reference_side = neon_ext.FrechetReference(mu1, c1, count=168)
    facts = reference_side.certificate(mu2, c2, count=11)
    assert facts["distance"] == pytest.approx(
        float(neon_ext.frechet_distance(mu1, c1, mu2, c2)), rel=1e-12
    )
    assert facts["mean_term"] + facts["cov_term"] == pytest.approx(facts["distance"], rel=1e-12)
    assert (facts["rank_ref"], facts["rank"], facts["dimension"]) == (40, 10, 40)
    assert facts["n_over_d_ref"] == 168 / 40 and facts["n_over_d"] == 11 / 40
    assert 0 <= facts["clipped"] < 1e-14 and 0 <= facts["clipped_ref"] < 1e-14
    assert "n_over_d" not in reference_side.certificate(mu2, c2)


@pytest.mark.parametrize("n", [2, 3, 30, 31, 100])
def test_distance_from_features(device, n, generator):
    prepared = neon_ext.FrechetReference(*statistics(30, seed=1, device=device))
    f = torch.randn(n, 30, generator=generator).to(device)
    want = float(prepared.distance(*reference.feature_moments(f)))
    assert float(prepared.distance_from_features(f)) == pytest.approx(want, rel=1e-11)
    with pytest.raises(ValueError, match="N >= 2"):
        prepared.distance_from_features(f[:1])


# ---------------------------------------------------------------- gradients
def symmetric(c):
    return (c + c.mT) / 2


@pytest.mark.parametrize("d", [1, 2, 5])
def test_gradcheck(device, d):
    args = [
        t.requires_grad_()
        for t in (*statistics(d, seed=1, device=device), *statistics(d, seed=2, device=device))
    ]
    assert torch.autograd.gradcheck(
        lambda m1, c1, m2, c2: neon_ext.frechet_distance(m1, symmetric(c1), m2, symmetric(c2)), args
    )


def test_gradcheck_repeated_eigenvalues(device):
    """The product C1 C2 has equal eigenvalues: derivatives of eigenvectors would be infinite, ours
    are not used.
    """
    mu = torch.zeros(4, dtype=torch.float64, device=device)
    eye = torch.eye(4, dtype=torch.float64, device=device)
    for c1, c2 in (
        (eye, 2 * eye),
        (covariance(4, device=device), eye.clone()),
        (
            torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64, device=device).diag(),
            eye.clone(),
        ),
    ):
        args = [t.clone().requires_grad_() for t in (mu, c1, mu + 1, c2)]
        assert torch.autograd.gradcheck(
            lambda m1, a, m2, b: neon_ext.frechet_distance(m1, symmetric(a), m2, symmetric(b)), args
        )


def test_gradcheck_batched_and_broadcast():
    mu, cov = (torch.stack(t) for t in zip(*(statistics(3, seed=s) for s in range(3))))
    args = [t.requires_grad_() for t in (mu, cov, *statistics(3, seed=9))]
    assert torch.autograd.gradcheck(
        lambda m1, c1, m2, c2: neon_ext.frechet_distance(m1, symmetric(c1), m2, symmetric(c2)), args
    )


def test_gradcheck_from_features(generator):
    prepared = neon_ext.FrechetReference(*statistics(4, seed=1))
    f = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(prepared.distance_from_features, [f])
    assert torch.autograd.gradcheck(neon_ext.feature_moments, [f])
    few = torch.randn(
        3, 4, generator=generator, dtype=torch.float64, requires_grad=True
    )  # N < D: a singular covariance
    assert torch.autograd.gradcheck(prepared.distance_from_features, [few])


def test_gradient_large_against_formula(device):
    """I - R (R C R)^(-1/2) R with R = cov1^(1/2), where the factors come from Cholesky."""
    (m1, c1), (m2, c2) = (
        statistics(150, seed=1, device=device),
        statistics(150, seed=2, device=device),
    )
    c2.requires_grad_()
    neon_ext.frechet_distance(m1, c1, m2, c2).backward()
    root = reference.sqrtm(c1)
    values, vectors = torch.linalg.eigh(root @ c2.detach() @ root)
    want = (
        torch.eye(150, dtype=torch.float64, device=device)
        - root @ (vectors / values.sqrt() @ vectors.T) @ root
    )
    torch.testing.assert_close(
        c2.grad, want, rtol=0, atol=1e-9
    )  # condition of R C R: 1e8, so 1e-16 * 1e4 and a margin


def test_gradient_on_singular_covariance_is_finite_and_descends():
    m1, c1 = statistics(20, seed=1)
    f = torch.randn(
        8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True
    )
    prepared = neon_ext.FrechetReference(m1, c1)
    before = prepared.distance_from_features(f)
    before.backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() > 0
    assert float(prepared.distance_from_features((f - 0.05 * f.grad).detach())) < float(
        before.detach()
    )


def test_twice_differentiating_is_refused():
    m1, c1, m2, c2 = (t.requires_grad_() for t in (*statistics(3, seed=1), *statistics(3, seed=2)))
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(neon_ext.frechet_distance(m1, c1, m2, c2), m1, create_graph=True)


# ---------------------------------------------------------------- moments
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("n, d", [(2, 1), (3, 5), (100, 1), (257, 64), (5000, 7)])
def test_moments_match_numpy(device, dtype, n, d, generator):
    f = (torch.randn(n, d, generator=generator) + 3).to(dtype).to(device)
    moments = neon_ext.Moments(d, device=device)
    moments.update(f)
    exact = f.double().cpu().numpy()
    assert moments.count() == n
    np.testing.assert_allclose(moments.mean().cpu(), exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(
        moments.cov().cpu(), np.cov(exact, rowvar=False).reshape(d, d), rtol=1e-12, atol=1e-13
    )


def test_batch_splits_and_order_change_nothing(device, generator):
    f = (torch.randn(10_001, 33, generator=generator) * 2 + 100).to(device)
    whole = neon_ext.Moments(33, device=device)
    whole.update(f)
    for sizes in ([1] * 1 + [10_000], [4096, 4096, 1809], [0, 5000, 0, 5001], [997] * 10 + [31]):
        split = neon_ext.Moments(33, device=device)
        for part in f.split(sizes):
            split.update(part)
        torch.testing.assert_close(split.mean(), whole.mean(), rtol=1e-12, atol=0)
        torch.testing.assert_close(split.cov(), whole.cov(), rtol=1e-12, atol=1e-12)


def test_huge_common_mean(device, generator):
    noise = torch.randn(4000, 8, generator=generator, dtype=torch.float64)
    moments = neon_ext.Moments(8, device=device)
    for part in (noise + 1e6).to(device).split(500):
        moments.update(part)
    # Without the shift S - N mu mu^T cancels 1e12 against 1: an error of 1e-4. What remains is the
    # rounding of the
    # inputs themselves, 1e6 * eps = 1e-10.
    torch.testing.assert_close(moments.cov().cpu(), torch.cov(noise.T), rtol=0, atol=1e-9)


def test_merge_is_associative_and_commutative(device, generator):
    parts = [
        torch.randn(n, 6, generator=generator).to(device) * (i + 1) + i
        for i, n in enumerate((50, 1, 200))
    ]

    def fresh(i):
        m = neon_ext.Moments(6, device=device)
        m.update(parts[i])
        return m

    left, right = fresh(0), fresh(1)
    left.merge(fresh(1))
    left.merge(fresh(2))
    right.merge(fresh(2))
    right.merge(fresh(0))
    want_mean, want_cov = reference.feature_moments(torch.cat(parts))
    for m in (left, right):
        assert m.count() == 251
        torch.testing.assert_close(m.mean(), want_mean, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(m.cov(), want_cov, rtol=1e-12, atol=1e-12)
    empty = neon_ext.Moments(6, device=device)
    empty.merge(left)  # into an empty one, and an empty one into another
    left.merge(neon_ext.Moments(6, device=device))
    assert torch.equal(empty.cov(), left.cov())


def test_folds_equal_recomputation(device, generator):
    f = (torch.randn(300, 5, generator=generator) + 10).to(device)
    moments = neon_ext.Moments(5, folds=4, device=device)
    for i, part in enumerate(f.split(25)):
        moments.update(part, fold=i % 4)
    member = torch.arange(12, device=device).repeat_interleave(25) % 4
    for folds in ([0], [1, 2, 3], [3, 0], None):
        keep = (
            torch.ones_like(member, dtype=torch.bool)
            if folds is None
            else torch.isin(member, torch.tensor(folds, device=device))
        )
        mean, cov = reference.feature_moments(f[keep])
        assert moments.count(folds) == int(keep.sum())
        torch.testing.assert_close(moments.mean(folds), mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(moments.cov(folds), cov, rtol=1e-12, atol=1e-12)


def test_state_dict_resumes_exactly(tmp_path, generator):
    f = torch.randn(100, 4, generator=generator)
    straight, first, second = (neon_ext.Moments(4, folds=2) for _ in range(3))
    second.load_state_dict(first.state_dict())  # before any feature
    for m in (straight, first):
        m.update(f[:60], fold=1)
    torch.save(first.state_dict(), tmp_path / "moments.pt")
    second.load_state_dict(torch.load(tmp_path / "moments.pt"))
    for m in (straight, second):
        m.update(f[60:], fold=0)
    assert torch.equal(straight.cov(), second.cov()) and torch.equal(straight.mean(), second.mean())


def test_moments_bad_input():
    moments = neon_ext.Moments(3, folds=2)
    moments.update(torch.zeros(1, 3))
    before = moments.state_dict()
    for call, message in [
        (lambda: moments.update(torch.zeros(4, 2)), r"must be \[N, 3\]"),
        (lambda: moments.update(torch.zeros(3)), r"must be \[N, 3\]"),
        (lambda: moments.update(torch.zeros(2, 3, dtype=torch.uint8)), "floating point"),
        (lambda: moments.update(torch.full((2, 3), float("nan"))), "not finite; nothing was added"),
        (lambda: moments.update(torch.zeros(2, 3), fold=2), "fold 2 of 2"),
        (lambda: moments.cov(), "1 features, but at least 2"),
        (lambda: moments.mean([1]), "0 features"),
        (lambda: moments.count([0, 0]), "named twice"),
        (lambda: moments.merge(neon_ext.Moments(4, folds=2)), r"the other \[2, 4\]"),
        (lambda: moments.load_state_dict({"count": torch.zeros(1)}), "'sum' is missing"),
        (
            lambda: moments.load_state_dict(before | {"count": torch.tensor([-1, 0])}),
            "'count' is negative",
        ),
        (lambda: moments.load_state_dict(before | {"shift": torch.zeros(0)}), "'shift' is"),
        (
            lambda: neon_ext.trace_norm(torch.zeros(2, 3, 3, dtype=torch.float64), "gram"),
            "not a batch",
        ),
        (lambda: neon_ext.Moments(0), "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert all(torch.equal(before[key], value) for key, value in moments.state_dict().items())


def test_a_far_first_fold_does_no_harm(device, generator):
    """Statistics without a fold that lies 1e9 away are those of the rest."""
    f = torch.randn(300, 4, generator=generator, dtype=torch.float64).to(device)
    moments = neon_ext.Moments(4, folds=4, device=device)
    moments.update(torch.full((2, 4), 1e9, device=device), 0)
    for k, part in enumerate(f.split(100)):
        moments.update(part, k + 1)
    mean, cov = reference.feature_moments(f)
    torch.testing.assert_close(moments.mean([1, 2, 3]), mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(moments.cov([3, 1, 2]), cov, rtol=0, atol=1e-13)
    other = neon_ext.Moments(4, folds=4, device=device)
    other.update(torch.full((2, 4), -1e9, device=device), 0)
    other.merge(moments)
    torch.testing.assert_close(other.cov([1, 2, 3]), cov, rtol=0, atol=1e-13)


def test_threads_may_share_moments(generator):
    f = torch.randn(1000, 20, 128, generator=generator)
    moments, other = (neon_ext.Moments(128, folds=2) for _ in range(2))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: moments.update(f[i], i % 2), range(1000)))
        list(pool.map(lambda i: (other.merge(moments), moments.cov()), range(3)))
    mean, cov = reference.feature_moments(f.flatten(0, 1))
    assert moments.count() == 20_000 and other.count() == 60_000
    torch.testing.assert_close(moments.mean(), mean, rtol=0, atol=1e-13)
    torch.testing.assert_close(moments.cov(), cov, rtol=0, atol=1e-12)
    torch.testing.assert_close(other.cov() * 59_999 / 3, cov * 19_999, rtol=0, atol=1e-8)


def test_merging_with_itself_counts_twice(generator):
    f = torch.randn(50, 3, generator=generator)
    moments = neon_ext.Moments(3)
    moments.update(f)
    moments.merge(moments)
    mean, cov = reference.feature_moments(torch.cat([f, f]))
    assert moments.count() == 100
    torch.testing.assert_close(moments.mean(), mean)
    torch.testing.assert_close(moments.cov(), cov, rtol=1e-12, atol=1e-13)


def test_states_with_one_shift_for_all_folds_are_read(generator):
    """As files before fold-wise shifts hold them."""
    f = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    moments = neon_ext.Moments(3, folds=2)
    shift = torch.ones(3, dtype=torch.float64)
    rows = [f[:20] - shift, f[20:] - shift]
    moments.load_state_dict(
        {
            "count": torch.tensor([20, 30]),
            "shift": shift,
            "sum": torch.stack([part.sum(0) for part in rows]),
            "outer": torch.stack([part.T @ part for part in rows]),
        }
    )
    mean, cov = reference.feature_moments(f)
    torch.testing.assert_close(moments.mean(), mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(moments.cov(), cov, rtol=1e-12, atol=1e-13)


def test_moments_beyond_float64_are_refused():
    moments = neon_ext.Moments(2)
    moments.update(torch.tensor([[1e200, 0.0], [-1e200, 0.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="beyond the range"):
        moments.cov()


def test_moments_need_no_gradient(generator):
    moments = neon_ext.Moments(3)
    moments.update(torch.randn(5, 3, generator=generator, requires_grad=True))
    assert not moments.cov().requires_grad


# ---------------------------------------------------------------- devices and registration
def test_cpu_and_cuda_agree(device):
    if device == "cpu":
        pytest.skip("nothing to compare with")
    a, b = statistics(700, seed=1), statistics(700, seed=2)
    on_gpu = neon_ext.frechet_distance(*(t.cuda() for t in (*a, *b)))
    assert float(on_gpu) == pytest.approx(float(neon_ext.frechet_distance(*a, *b)), rel=1e-11)


def test_opcheck(device, generator):
    ops = torch.ops.neon_ext
    mu1, c1, mu2, c2 = (
        *statistics(4, seed=1, device=device),
        *statistics(4, seed=2, device=device),
    )
    opcheck(ops.sqrtm.default, (c1,))
    opcheck(ops.frechet_distance.default, tuple(t.requires_grad_() for t in (mu1, c1, mu2, c2)))
    c1, c2 = c1.detach(), c2.detach()
    opcheck(
        ops.frechet_distance_backward.default,
        (torch.ones((), dtype=torch.float64, device=device), c1, c2),
    )
    opcheck(
        ops.trace_norm.default,
        (torch.randn(4, 3, generator=generator, dtype=torch.float64).to(device), "svd"),
    )
    opcheck(
        ops.feature_moments.default,
        (torch.randn(6, 3, generator=generator).to(device).requires_grad_(),),
    )
