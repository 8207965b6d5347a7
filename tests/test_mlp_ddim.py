"""The fused sampler of the toy's networks against plain PyTorch."""

import pytest
import reference
import torch
from torch.library import opcheck

import neon_ext


def schedule(n=20, s=0.008):
    t = torch.arange(n, dtype=torch.float64) / n
    abar = torch.cos((t + s) / (1 + s) * torch.pi / 2) ** 2
    return abar / abar[0]


def networks(grid, blocks=4, seed=0):
    """Weights as torch.nn.Linear draws them: trajectories stay of order 1."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(grid):
        layers = [(32, 3), (32, 1)] + [(32, 32), (32, 1)] * blocks + [(2, 32), (2, 1)]
        fans = [3, 3] + [32, 32] * blocks + [32, 32]
        drawn = [torch.rand(shape, generator=g) * 2 - 1 for shape in layers]
        rows.append(torch.cat([(x / fan**0.5).flatten() for x, fan in zip(drawn, fans)]))
    return torch.stack(rows) if rows else torch.empty(0, 130 + 64 + 1056 * blocks)


@pytest.mark.parametrize(
    "grid, n", [(1, 1), (1, 15), (3, 16), (3, 65), (2, 1024), (2, 1025), (5, 0), (0, 9)]
)
def test_matches_float64(device, grid, n, generator):
    theta, z = networks(grid).to(device), torch.randn(n, 2, generator=generator).to(device)
    if not grid:
        theta = torch.empty(0, 4418, device=device)
        assert neon_ext.mlp_ddim(theta, z, schedule()).shape == (0, n, 2)
        return
    got = neon_ext.mlp_ddim(theta, z, schedule(), 1.1)
    want = reference.mlp_ddim(theta, z, schedule(), 1.1)
    plain = reference.mlp_ddim(theta, z, schedule(), 1.1, dtype=torch.float32)
    assert got.shape == (grid, n, 2) and got.dtype == torch.float32
    if n:
        # 20 steps amplify the network's rounding: at most 4 times that of plain float32 torch.
        rounding = (plain.double() - want).abs().max().clamp_min(1e-6)
        assert (got.double() - want).abs().max() <= 4 * rounding


@pytest.mark.parametrize("blocks", [0, 1, 2, 7])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_other_depths_and_step_counts(device, blocks, steps, generator):
    width = 3 * 32 + 32 + 2 * 32 + 2 + blocks * (32 * 32 + 32)
    theta = (torch.rand(2, width, generator=generator) * 0.3 - 0.15).to(device)
    z = torch.randn(33, 2, generator=generator).to(device)
    abar = schedule(steps) if steps > 1 else torch.tensor([0.5])
    torch.testing.assert_close(
        neon_ext.mlp_ddim(theta, z, abar).double(),
        reference.mlp_ddim(theta, z, abar),
        rtol=1e-4,
        atol=1e-4,
    )  # float32 rounding through up to 50 steps


def test_networks_and_samples_do_not_mix(device, generator):
    theta, z = networks(4).to(device), torch.randn(300, 2, generator=generator).to(device)
    together = neon_ext.mlp_ddim(theta, z, schedule())
    for g in range(4):
        assert torch.equal(together[g], neon_ext.mlp_ddim(theta[g : g + 1], z, schedule())[0])
    order = torch.randperm(300, generator=generator)
    again = neon_ext.mlp_ddim(theta, z[order].contiguous(), schedule())
    assert torch.equal(together[:, order], again)


def test_non_contiguous_input(device, generator):
    theta, z = networks(2).to(device), torch.randn(2, 70, generator=generator).to(device)
    want = neon_ext.mlp_ddim(theta, z.T.contiguous(), schedule())
    assert torch.equal(neon_ext.mlp_ddim(theta.T.contiguous().T, z.T, schedule()), want)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("n", [2, 1023, 5000])
def test_moments(device, correction, n, generator):
    theta, z = networks(3).to(device), torch.randn(n, 2, generator=generator).to(device)
    mean, cov = neon_ext.mlp_ddim_moments(theta, z, schedule(), correction=correction)
    x = neon_ext.mlp_ddim(theta, z, schedule()).double()
    centred = x - x.mean(1, keepdim=True)
    assert mean.dtype == cov.dtype == torch.float64
    # the same float32 samples, float64 sums
    torch.testing.assert_close(mean, x.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cov, centred.mT @ centred / (n - correction), rtol=1e-11, atol=1e-11)


def test_moments_do_not_depend_on_threads(generator):
    theta, z = networks(2), torch.randn(10_000, 2, generator=generator)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            mean, cov = neon_ext.mlp_ddim_moments(theta, z, schedule())
            results.append(torch.cat([mean.flatten(), cov.flatten()]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_nan_weights_give_nan_not_garbage(device, generator):
    theta = networks(2).to(device)
    theta[1, 200] = float("nan")
    out = neon_ext.mlp_ddim(theta, torch.randn(50, 2, generator=generator).to(device), schedule())
    assert out[0].isfinite().all() and out[1].isnan().all()


@pytest.mark.parametrize(
    "edit, message",
    [
        (dict(theta=torch.zeros(2, 4417)), "P = 4417"),
        (dict(theta=torch.zeros(2, 4418).double()), "theta must be"),
        (dict(z=torch.zeros(5, 3)), "z must be"),
        (dict(z=torch.zeros(5, 2).double()), "z must be"),
        (dict(abar=torch.zeros(0)), "abar must be"),
        (dict(abar=torch.tensor([1.0, 0.0])), r"abar\[1\] = 0"),
        (dict(abar=torch.tensor([1.0, 1.5])), r"abar\[1\] = 1.5"),
        (dict(zeta=float("nan")), "zeta"),
    ],
)
def test_bad_input(edit, message):
    args = dict(theta=torch.zeros(2, 4418), z=torch.zeros(5, 2), abar=schedule()) | edit
    with pytest.raises(ValueError, match=message):
        neon_ext.mlp_ddim(**args)


def test_too_few_samples_for_a_covariance():
    with pytest.raises(ValueError, match="too few"):
        neon_ext.mlp_ddim_moments(torch.zeros(1, 4418), torch.zeros(1, 2), schedule(), correction=1)


def test_opcheck(device, generator):
    theta, z = networks(2).to(device), torch.randn(9, 2, generator=generator).to(device)
    torch_ops = torch.ops.neon_ext
    opcheck(torch_ops.mlp_ddim.default, (theta, z, schedule(), 1.1))
    opcheck(torch_ops.mlp_ddim_moments.default, (theta, z, schedule(), 0.9, 1))


@pytest.mark.parametrize("which", ["theta", "z", "abar"])
@pytest.mark.parametrize("name", ["mlp_ddim", "mlp_ddim_moments"])
def test_one_meta_tensor_among_others_is_refused(name, which):
    args = {"theta": torch.zeros(2, 4418), "z": torch.zeros(5, 2), "abar": schedule()}
    args[which] = args[which].to("meta")
    with pytest.raises(ValueError, match="one device"):
        getattr(neon_ext, name)(**args)


@pytest.mark.parametrize(("last", "zeta"), [(0.5, 1e39), (1e-80, 1.0)])
def test_steps_beyond_float32_are_refused(last, zeta):
    abar = torch.tensor([1.0, last], dtype=torch.float64)
    with pytest.raises(ValueError, match="beyond float32"):
        neon_ext.mlp_ddim(torch.zeros(2, 4418), torch.zeros(5, 2), abar, zeta)


def test_sparse_weights_are_refused():
    with pytest.raises(ValueError, match="must be dense"):
        neon_ext.mlp_ddim(torch.zeros(2, 4418).to_sparse(), torch.zeros(5, 2), schedule())
