"""Plain-PyTorch and SciPy references with the signatures of neon_ext's operations.

Clear, slow, float64 where it counts.

theta = theta_r - w_block * (theta_s - theta_r)      w > 0 away from collapse, w < 0 towards it
"""

import contextlib
import io
import os
import sys

import numpy as np
import scipy.linalg
import torch


@contextlib.contextmanager
def recorded(path, command):
    """What is printed inside also goes, as a whole or not at all, to the text file `path` (None:
    nowhere).
    """

    class Tee(io.StringIO):
        def write(self, text):
            sys.__stdout__.write(text)
            return super().write(text)

        def flush(self):
            sys.__stdout__.flush()

    with contextlib.redirect_stdout(Tee()) as text:
        print(command)
        yield
    if path:
        with open(f"{path}.tmp", "w") as file:
            file.write(text.getvalue())
        os.replace(f"{path}.tmp", path)


# ---------------------------------------------------------------- extrapolation
def extrapolate(theta_r, theta_s, block, w, out=None, dtype=None):
    """The formula in float32 (float64 for float64 tensors), one rounding to the output dtype."""
    results = []
    for i, (r, s) in enumerate(zip(theta_r, theta_s)):
        if not r.is_floating_point():
            result = r.clone()
        else:
            acc = torch.float64 if r.dtype == torch.float64 else torch.float32
            target = out[i].dtype if out is not None else dtype or r.dtype
            a, b = r.to(acc), s.to(acc)
            step = torch.tensor(w[block[i]], dtype=acc, device=r.device)
            moved = a - step * (b - a) if w[block[i]] != 0 else a
            result = torch.where(a == b, a, moved).to(target)
        results.append(result if out is None else out[i].copy_(result))
    return results


def extrapolate_grid(theta_r, theta_s, block_offsets, W):
    rows = []
    for w in W.tolist():
        row = theta_r.clone()
        for b, (begin, end) in enumerate(zip(block_offsets[:-1], block_offsets[1:])):
            row[begin:end] = extrapolate([theta_r[begin:end]], [theta_s[begin:end]], [0], [w[b]])[0]
        rows.append(row)
    return torch.stack(rows) if rows else theta_r.new_empty(0, len(theta_r))


# ---------------------------------------------------------------- the toy's sampler
def unpack(theta, width=32):
    """theta [P] -> list of (weight, bias): input 3 -> 32, hidden 32 -> 32, output 32 -> 2."""
    blocks = (len(theta) - 3 * width - width - 2 * width - 2) // (width * width + width)
    layers, at = [], 0
    for n_in, n_out in [(3, width)] + [(width, width)] * blocks + [(width, 2)]:
        weight = theta[at : at + n_in * n_out].view(n_out, n_in)
        bias = theta[at + n_in * n_out : at + n_in * n_out + n_out]
        layers.append((weight, bias))
        at += n_in * n_out + n_out
    return layers


def mlp_ddim(theta, z, abar, zeta=1.0, dtype=torch.float64):
    """theta [G, P], z [N, 2], abar [T] -> [G, N, 2]: deterministic DDIM (arXiv 2010.02502)."""
    results = []
    for row in theta.to(dtype):
        x, layers = z.to(dtype), unpack(row)
        for t in reversed(range(len(abar))):
            now, nxt = float(abar[t]), float(abar[t - 1]) if t else 1.0
            time = torch.full_like(x[:, :1], t / (len(abar) - 1) if len(abar) > 1 else 0.0)
            h = torch.nn.functional.linear(torch.cat([x, time], 1), *layers[0])
            for layer in layers[1:-1]:
                h = torch.relu(torch.nn.functional.linear(h, *layer))
            eps = torch.nn.functional.linear(h, *layers[-1])
            x0 = (x - (1 - now) ** 0.5 * zeta * eps) / now**0.5
            x = nxt**0.5 * x0 + (1 - nxt) ** 0.5 * eps
        results.append(x)
    return torch.stack(results)


def mlp_ddim_moments(theta, z, abar, zeta=1.0, correction=0):
    x = mlp_ddim(theta, z, abar, zeta)  # [G, N, 2]
    mean = x.mean(1)
    centred = x - mean[:, None]
    return mean, centred.mT @ centred / (x.shape[1] - correction)


# ---------------------------------------------------------------- matrix square root and Fréchet
# distance
def sqrtm(A):
    values, vectors = torch.linalg.eigh(A.double())
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2) @ vectors.mT


def factor(cov):
    """L [..., D, D] with L L^T = cov; eigenvalues below rounding are zero."""
    values, vectors = torch.linalg.eigh(cov.double())
    floor = values.abs().amax(-1, keepdim=True) * cov.shape[-1] * 2.3e-16
    return vectors * torch.where(values > floor, values, 0.0).sqrt().unsqueeze(-2)


def trace_norm(B, method="auto"):
    return torch.linalg.svdvals(B).sum(-1)


def frechet_distance(mu1, cov1, mu2, cov2):
    """A dozen lines of plain torch: singular values of the product of the factors (Dowson & Landau
    1982).
    """
    root = trace_norm(factor(cov1).mT @ factor(cov2))
    traces = sum(c.double().diagonal(0, -2, -1).sum(-1) for c in (cov1, cov2))
    return (mu1.double() - mu2.double()).square().sum(-1) + traces - 2 * root


def frechet_distance_scipy(mu1, cov1, mu2, cov2):
    """As pytorch-fid, clean-fid and EDM compute it: real part of scipy's root of the unsymmetric
    product.
    """
    m1, c1, m2, c2 = (np.asarray(t, dtype=np.float64) for t in (mu1, cov1, mu2, cov2))
    root = scipy.linalg.sqrtm(c1 @ c2)
    return float(((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.trace(root).real)


def feature_moments(features):
    f = features.double()
    return f.mean(0), torch.cov(f.T).reshape(f.shape[1], f.shape[1])
