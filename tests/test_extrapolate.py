"""Block-wise extrapolation: exact properties, every dtype, layouts, shared memory, bad input."""

import math
import os
import subprocess
import sys

import pytest
import reference
import torch
from torch.library import opcheck

import neon_ext

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (17, 33), (2, 3, 5, 7), (70001,)]


def pair(shape, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    r = torch.randn(shape, generator=g, dtype=torch.float64)
    s = r + 0.1 * torch.randn(shape, generator=g, dtype=torch.float64)
    return r.to(dtype).to(device), s.to(dtype).to(device)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_rounds_like_reference(got, want, dtype, accumulation=None):
    # The kernel may fuse a - w (b - a) into one rounding, so it can differ from the reference by
    # the rounding of w (b - a) and of the output: two units in the last place of the largest value.
    ulp = max(torch.finfo(dtype).eps, torch.finfo(accumulation or dtype).eps)
    scale = max(1.0, float(want.double().abs().max())) if want.numel() else 1.0
    assert got.dtype == dtype and got.shape == want.shape
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=2 * ulp * scale)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_formula(device, dtype, shape):
    r, s = pair(shape, dtype, device)
    (got,) = neon_ext.extrapolate([r], [s], [0], [1.25])
    assert_rounds_like_reference(got, reference.extrapolate([r], [s], [0], [1.25])[0], dtype)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("in_dtype", FLOATS, ids=str)
def test_output_dtypes(device, in_dtype, out_dtype):
    r, s = pair((1031,), in_dtype, device)
    acc = torch.float64 if in_dtype == torch.float64 else torch.float32
    (want,) = reference.extrapolate([r], [s], [0], [-0.75], dtype=out_dtype)
    assert_rounds_like_reference(
        neon_ext.extrapolate([r], [s], [0], [-0.75], dtype=out_dtype)[0], want, out_dtype, acc
    )
    out = torch.empty_like(r, dtype=out_dtype)
    assert neon_ext.extrapolate([r], [s], [0], [-0.75], out=[out])[0].data_ptr() == out.data_ptr()
    assert_rounds_like_reference(out, want, out_dtype, acc)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_nearest_even(device, out_dtype):
    # Every exponent, ties and non-finite values, as torch's own conversion rounds them; r - (0 - r)
    # is 2 r, computed and exact.
    bits = torch.arange(-(2**31), 2**31, 65521 // 3, dtype=torch.int64).to(torch.int32)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65520.0, 32760.0])
    values = torch.cat([bits.view(torch.float32), ties]).to(device)
    zero = torch.zeros_like(values)
    (got,) = neon_ext.extrapolate([values], [zero], [0], [1.0], dtype=out_dtype)
    torch.testing.assert_close(got, (2 * values).to(out_dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zero_step_and_zero_drift_are_bit_exact(device, dtype):
    r, s = pair((4099,), dtype, device)
    r[0], r[1], s[2] = -0.0, float("nan"), float("inf")
    assert same_bits(neon_ext.extrapolate([r], [s], [0], [0.0])[0], r)
    clean = r.nan_to_num(1.0)
    clean[3] = float("inf")  # inf - inf would be NaN
    assert same_bits(neon_ext.extrapolate([clean], [clean.clone()], [0], [3.7])[0], clean)


@pytest.mark.parametrize(("w", "want"), [(-1.0, [2.0, 1.0]), (1.0, [0.0, 3.0]), (0.5, [0.5, 2.5])])
def test_collapse_point_and_sign(device, w, want):
    """w = -1 is theta_s, w > 0 lies away from it."""
    r, s = torch.tensor([1.0, 2.0], device=device), torch.tensor([2.0, 1.0], device=device)
    assert neon_ext.extrapolate([r], [s], [0], [w])[0].tolist() == want


def test_many_tensors_and_blocks(device, generator):
    shapes = [(i % 5, 1 + i * 37 % 211) for i in range(600)]
    theta_r, theta_s = zip(*(pair(shape, device=device, seed=i) for i, shape in enumerate(shapes)))
    block, w = [i % 7 for i in range(600)], [0.0, 1.0, -1.0, 0.5, 2.0, -0.3, 1e-3]
    for got, want in zip(
        neon_ext.extrapolate(theta_r, theta_s, block, w),
        reference.extrapolate(theta_r, theta_s, block, w),
    ):
        assert_rounds_like_reference(got, want, torch.float32)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_views(device, offset):
    r, s = pair((1037,), torch.bfloat16, device)
    out = torch.zeros(1040, dtype=torch.float16, device=device)
    neon_ext.extrapolate([r[offset:]], [s[offset:]], [0], [1.0], out=[out[offset:1037]])
    (want,) = reference.extrapolate([r[offset:]], [s[offset:]], [0], [1.0], dtype=torch.float16)
    assert_rounds_like_reference(out[offset:1037], want, torch.float16)
    assert not out[:offset].any() and not out[1037:].any()  # only its own elements are touched


def test_memory_layouts(device):
    r, s = pair((4, 6, 5, 3), device=device)
    (want,) = reference.extrapolate([r], [s], [0], [0.8])
    layouts = {
        "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
        "contiguous": lambda t: t,
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    }
    for a in layouts.values():
        for b in layouts.values():
            out = b(torch.empty_like(r))
            assert_rounds_like_reference(
                neon_ext.extrapolate([a(r)], [b(s)], [0], [0.8])[0], want, torch.float32
            )
            neon_ext.extrapolate([a(r)], [b(s)], [0], [0.8], out=[out])
            assert_rounds_like_reference(out, want, torch.float32)


@pytest.mark.parametrize("target", [0, 1])
def test_output_may_be_an_input(device, target):
    inputs = pair((4097,), device=device)
    (want,) = reference.extrapolate([inputs[0]], [inputs[1]], [0], [1.5])
    out = inputs[target]
    neon_ext.extrapolate([inputs[0]], [inputs[1]], [0], [1.5], out=[out])
    assert_rounds_like_reference(out, want, torch.float32)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("in_dtype", FLOATS, ids=str)
def test_every_nan_stays_nan(device, in_dtype, out_dtype):
    """Rounding its bits up could turn one whose payload is all ones into -0."""
    size, mantissa = torch.finfo(in_dtype).bits, -int(math.log2(torch.finfo(in_dtype).eps))
    integer = {16: torch.int16, 32: torch.int32, 64: torch.int64}[size]
    infinity = (1 << (size - 1)) - (1 << mantissa)
    payloads = [infinity + 1, infinity + (1 << (mantissa - 1)), (1 << (size - 1)) - 1, -1]
    r = torch.tensor(payloads * 5, dtype=integer).view(in_dtype).to(device)
    assert r.isnan().all()
    s = torch.ones_like(r)
    assert neon_ext.extrapolate([r], [s], [0], [0.7], dtype=out_dtype)[0].isnan().all()
    assert neon_ext.extrapolate([s], [r], [0], [0.7], dtype=out_dtype)[0].isnan().all()


# ---------------------------------------------------------------- shared memory
def test_tied_weights_are_moved_once(device):
    r, s = pair((300,), device=device)
    (want,) = neon_ext.extrapolate([r], [s], [0], [1.5])
    tied = r.clone()
    neon_ext.extrapolate([tied, tied], [s, s], [0, 1], [1.5, 1.5], out=[tied, tied])
    assert same_bits(tied, want)
    # as a state dict that was read from a file holds them: equal values in separate memory
    tied = torch.empty_like(r)
    neon_ext.extrapolate([r, r.clone()], [s, s.clone()], [0, 0], [1.5], out=[tied, tied])
    assert same_bits(tied, want)


def shared():
    """{name: theta_r, theta_s, block, w, out}: the result would depend on the order of writing."""
    r, s, t, u = (torch.randn(64, generator=torch.Generator().manual_seed(i)) for i in range(4))
    zero, wide = torch.zeros(64), torch.randn(8, 16)
    left, right, flat = wide[:, :8], wide[:, 8:], wide.flatten()
    halves = r.view(torch.int32).view(torch.float16)[:64]
    neighbours = [torch.randn(8, 4), torch.randn(4), wide[2, :4]]
    others = [torch.randn(8, 4), torch.randn(4), torch.randn(4)]
    return {
        "out is another theta_r": ([r, s], [t, u], [0, 0], [1.0], [s, zero]),
        "out is another theta_s": ([r, s], [t, u], [0, 0], [1.0], [u, zero]),
        "copied though w is 0": ([r, s], [t, u], [0, 1], [0.0, 1.0], [s, zero]),
        "one out twice": ([r, s], [t, u], [0, 0], [1.0], [t.clone()] * 2),
        "tied, but different w": ([r, r], [s, s], [0, 1], [1.0, 0.5], [r, r]),
        "tied, but different theta_s": ([r, r], [s, t], [0, 0], [1.0], [r, r]),
        "overlapping outs": ([r, s], [t, u], [0, 0], [1.0], [flat[:64], flat[1:65]]),
        "out overlaps its own theta_r": ([r[:-1]], [s[:-1]], [0], [1.0], [r[1:]]),
        "out overlaps its own theta_s": ([r[:-1]], [s[:-1]], [0], [1.0], [s[1:]]),
        "out in another order": ([left], [right], [0], [1.0], [left.T]),
        "columns that overlap": ([wide[:, :6]], [wide[:, 6:12]], [0], [1.0], [wide[:, 2:8]]),
        "beyond a neighbour": (
            *(neighbours, others, [0, 0, 0], [1.0]),
            [wide[:, :4], wide[1, 8:12], torch.zeros(4)],
        ),
        "expanded out": ([r], [s], [0], [1.0], [torch.zeros(1).expand(64)]),
        "another dtype of the same memory": ([r], [s], [0], [1.0], [halves]),
    }


@pytest.mark.parametrize("name", shared())
def test_shared_memory_is_refused_by_index(name):
    theta_r, theta_s, block, w, out = shared()[name]
    before = [t.clone() for t in (*theta_r, *theta_s, *out)]
    with pytest.raises(ValueError, match=r"extrapolate: out\[\d\] .*memory"):
        neon_ext.extrapolate(theta_r, theta_s, block, w, out=out)
    assert all(torch.equal(a, b) for a, b in zip(before, (*theta_r, *theta_s, *out)))


def test_views_that_share_nothing_are_accepted(device):
    """Columns of one matrix lie between each other, but no element in two of them."""
    fused, other = pair((6, 12), device=device)
    want = neon_ext.extrapolate([fused], [other], [0], [1.5])[0]
    parts = [(slice(None), slice(k, k + 4)) for k in (0, 4, 8)]
    neon_ext.extrapolate(
        [fused[p] for p in parts],
        [other[p] for p in parts],
        [0] * 3,
        [1.5],
        out=[fused[p] for p in parts],
    )
    assert torch.equal(fused, want)
    rows = [fused[:3], fused[3:]]  # neighbours in memory
    want = neon_ext.extrapolate(rows, [other[:3], other[3:]], [0, 0], [0.5])
    neon_ext.extrapolate(rows, [other[:3], other[3:]], [0, 0], [0.5], out=rows)
    assert torch.equal(fused, torch.cat(want))


# ---------------------------------------------------------------- devices and kinds of tensors
@pytest.mark.parametrize("which", ["theta_r", "theta_s", "out"])
@pytest.mark.parametrize("at", [0, 1])
def test_one_meta_tensor_among_others_is_refused(which, at):
    lists = {key: [torch.ones(4), torch.ones(4)] for key in ("theta_r", "theta_s", "out")}
    lists[which][at] = torch.ones(4, device="meta")
    with pytest.raises(ValueError, match="must be on one device"):
        neon_ext.extrapolate(lists["theta_r"], lists["theta_s"], [0, 0], [1.0], out=lists["out"])
    if which != "out":
        with pytest.raises(ValueError, match="must be on one device"):
            neon_ext.extrapolate(lists["theta_r"], lists["theta_s"], [0, 0], [1.0])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_grid_with_a_meta_tensor_is_refused(which):
    args = [torch.ones(4), torch.ones(4), torch.ones(1, 1)]
    args[which] = args[which].to("meta")
    with pytest.raises(ValueError, match="one device"):
        neon_ext.extrapolate_grid(args[0], args[1], [0, 4], args[2])


@pytest.mark.parametrize("kind", ["sparse", "quantised", "float8"])
def test_unsupported_kinds_of_tensors(kind):
    t = {
        "sparse": torch.eye(4).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
        "float8": torch.eye(4).to(torch.float8_e4m3fn),
    }[kind]
    with pytest.raises(ValueError, match=r"extrapolate: theta_r\[1\] is"):
        neon_ext.extrapolate([torch.eye(4), t], [torch.eye(4), t], [0, 0], [1.0])
    if kind != "float8":
        with pytest.raises(ValueError, match="extrapolate_grid: .* dense"):
            neon_ext.extrapolate_grid(torch.ones(4), torch.ones(4), [0, 4], t)


def test_lazily_negated_tensors(device):
    """The imaginary part of a conjugate holds the opposite of what it means."""
    z = torch.randn(50, dtype=torch.complex64, device=device)
    r = torch.view_as_real(z)[:, 1]
    negated = z.conj().imag
    assert negated.is_neg()
    got = neon_ext.extrapolate([negated], [r], [0], [0.5])[0]
    assert torch.equal(got, neon_ext.extrapolate([-r], [r], [0], [0.5])[0])


# ---------------------------------------------------------------- w
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_collapse_point_is_theta_s_to_the_bit(device, dtype):
    r, s = (t.to(dtype).to(device) for t in pair((1000,), torch.float64))
    r[0], s[0] = 0.3, 1e-8 if dtype != torch.float16 else 1e-7  # r + (s - r) gives 0
    r[1], s[1] = 0.0, -0.0
    assert same_bits(neon_ext.extrapolate([r], [s], [0], [-1.0])[0], s)
    into = r.clone()
    neon_ext.extrapolate([into], [s], [0], [-1.0], out=[into])
    assert same_bits(into, s)


def test_grid_ends_are_exact(device):
    r = torch.tensor([0.3, 0.0, 1.0, float("inf")], device=device)
    s = torch.tensor([1e-8, -0.0, float("inf"), float("inf")], device=device)
    W = torch.tensor([[0.0], [-1.0], [2.0]], device=device)
    got = neon_ext.extrapolate_grid(r, s, [0, 4], W)
    assert same_bits(got[0], r) and same_bits(got[1], s)
    assert got[2, 3] == float("inf")  # equal: not inf - inf


def test_w_beyond_the_arithmetic_is_refused(device):
    r, s = pair((5,), device=device)
    with pytest.raises(ValueError, match=r"w\[1\] = 1e\+39 is beyond float32.*theta_r\[0\]"):
        neon_ext.extrapolate([r], [s], [1], [0.0, 1e39])
    got = neon_ext.extrapolate([r.double()], [s.double()], [0], [1e39])[0]
    assert got.isfinite().all() and got.abs().max() > 1e37
    with pytest.raises(ValueError, match="not finite in float32"):
        neon_ext.extrapolate_grid(
            r, s, [0, 5], torch.tensor([[1e39]], dtype=torch.float64, device=device)
        )


# ---------------------------------------------------------------- other kernels of the same CPU
ROWS = """
import torch, neon_ext
g = torch.Generator().manual_seed(0)
rows = []
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    r, s = (torch.randn(1037, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    s[::7] = r[::7]
    r[3], s[3], r[7], s[7] = float("inf"), float("inf"), float("nan"), -0.0
    for out in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        rows.append(neon_ext.extrapolate([r], [s], [0], [0.7], dtype=out)[0])
ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11] * 5)
for out in (torch.bfloat16, torch.float16):  # ties - (0 - ties), which is exact
    rows.append(neon_ext.extrapolate([ties], [0 * ties], [0], [1.0], dtype=out)[0])
"""
SAVE = "import sys; torch.save((neon_ext.build_config()['cpu_kernels'], rows), sys.argv[1])"


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [
        ("default", ("sse2", "generic")),
        pytest.param("avx2", ("avx2", "sse2", "generic"), marks=pytest.mark.slow),
    ],
)
def test_other_kernels_of_this_cpu_agree(tmp_path, capability, kernels):
    """ATEN_CPU_CAPABILITY lowers the choice as it lowers torch's own."""
    file = tmp_path / "rows.pt"
    command = [sys.executable, "-c", ROWS + SAVE, str(file)]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run(command, check=True, env=env, timeout=300)
    used, others = torch.load(file)
    assert used in kernels

    here = {}
    exec(ROWS, here)
    for i, (got, want) in enumerate(zip(others, here["rows"], strict=True)):
        computed = torch.float64 if i // 4 == 1 else torch.float32
        ulp = max(torch.finfo(got.dtype).eps, torch.finfo(computed).eps)
        torch.testing.assert_close(got, want, rtol=2 * ulp, atol=4 * ulp, equal_nan=True)
        assert torch.equal(got.isnan(), want.isnan())
        assert i < 16 or torch.equal(got, (2 * here["ties"]).to(got.dtype))


@pytest.mark.parametrize("in_dtype", FLOATS, ids=str)
def test_results_depend_neither_on_position_nor_on_threads(in_dtype):
    """Tails, unaligned heads, parts of threads and streamed stores: the same bits."""
    r, s = pair((5_000_011,), in_dtype)
    threads = torch.get_num_threads()
    try:
        for out_dtype in FLOATS[:3]:
            whole = torch.empty(len(r) + 5, dtype=out_dtype)
            torch.set_num_threads(1)
            # 20 MB in float32: streamed
            neon_ext.extrapolate([r], [s], [0], [0.7], out=[whole[5:]])
            for begin, end in ((0, 1), (1, 18), (17, 1000), (len(r) - 9, len(r))):
                ends = [r[begin:end]], [s[begin:end]]
                (part,) = neon_ext.extrapolate(*ends, [0], [0.7], dtype=out_dtype)
                assert same_bits(part, whole[5 + begin : 5 + end])
            torch.set_num_threads(3)
            (again,) = neon_ext.extrapolate([r], [s], [0], [0.7], dtype=out_dtype)
            assert same_bits(again, whole[5:])
    finally:
        torch.set_num_threads(threads)


def test_integers_and_bools_are_copied_from_theta_r(device):
    r = [torch.tensor([5, -3], device=device), torch.tensor([True, False], device=device)]
    s = [torch.tensor([9, 9], device=device), torch.tensor([False, False], device=device)]
    got = neon_ext.extrapolate(r, s, [0, 0], [2.0], dtype=torch.bfloat16)
    assert [t.tolist() for t in got] == [[5, -3], [True, False]]
    assert [t.dtype for t in got] == [t.dtype for t in r]


def test_parameters_that_require_grad():
    r, s = (t.requires_grad_() for t in pair((8,)))
    (out,) = neon_ext.extrapolate([r], [s], [0], [1.0])
    assert not out.requires_grad
    version = r._version
    neon_ext.extrapolate([r], [s], [0], [1.0], out=[r])
    assert r._version > version  # autograd must notice that a saved tensor changed
    version = r._version
    with torch.no_grad():
        torch.ops.neon_ext.extrapolate_out([r], [s], [0], [1.0], [r])
    assert r._version > version


def test_empty_list():
    assert neon_ext.extrapolate([], [], [], []) == []


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(theta_s=lambda t: t[:-1]), "theta_s 3"),
        (dict(theta_s=lambda t: t[:3] + [t[3][:-1]]), r"theta_s\[3\].*same architecture"),
        (dict(theta_s=lambda t: t[:3] + [t[3].double()]), r"theta_s\[3\] is .*Double"),
        (
            dict(theta_r=lambda t: t[:2] + [t[2].to(torch.complex64), t[3]]),
            r"theta_r\[2\] is .*ComplexFloat",
        ),
        (dict(block=lambda b: [0, 0, 0, 2]), r"block\[3\] = 2, but w has 2 entries"),
        (dict(block=lambda b: [0, -1, 0, 0]), r"block\[1\] = -1"),
        (dict(w=lambda w: [1.0, float("nan")]), r"w\[1\] = nan is not finite"),
        (dict(out=lambda o: [torch.empty(5)] * 3 + [torch.zeros(4)]), r"out\[3\] is .*Float \[4\]"),
        (dict(out=lambda o: [torch.empty(5, dtype=torch.int64)] * 4), r"out\[0\] is .*Long"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_errors_name_the_tensor_and_leave_outputs_alone(change, message):
    r, s = pair((4, 5))
    args = dict(theta_r=list(r), theta_s=list(s), block=[0, 1, 0, 1], w=[1.0, 2.0])
    before = r.clone()
    for key, edit in change.items():
        args[key] = edit(args.get(key))
    with pytest.raises(ValueError, match=message):
        neon_ext.extrapolate(**args)
    assert torch.equal(r, before)


def test_out_and_dtype_together_are_refused():
    r, s = pair((3,))
    with pytest.raises(ValueError, match="not both"):
        neon_ext.extrapolate([r], [s], [0], [1.0], out=[r.clone()], dtype=torch.float16)


# ---------------------------------------------------------------- grid over one small network
@pytest.mark.parametrize("grid", [0, 1, 729])
def test_grid_matches_formula(device, grid, generator):
    r, s = pair((101,), device=device)
    offsets = [0, 7, 7, 100, 101]  # one block is empty
    W = torch.randn(grid, 4, generator=generator, dtype=torch.float64).to(device)
    got = neon_ext.extrapolate_grid(r, s, offsets, W)
    want = reference.extrapolate_grid(r, s, offsets, W)
    # a few float32 roundings of values below 4
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    zero = neon_ext.extrapolate_grid(r, s, offsets, torch.zeros(1, 4, device=device))
    assert torch.equal(zero[0], r)


@pytest.mark.parametrize(
    "offsets, W, message",
    [
        ([0, 5], torch.zeros(2, 2), "W must be"),
        ([0, 3, 2, 10], torch.zeros(1, 3), "ascend"),
        ([0, 9], torch.zeros(1, 1), "from 0 to 10"),
        ([0, 10], torch.full((1, 1), float("inf")), "finite"),
    ],
)
def test_grid_bad_input(offsets, W, message):
    r, s = pair((10,))
    with pytest.raises(ValueError, match=message):
        neon_ext.extrapolate_grid(r, s, offsets, W)


# ---------------------------------------------------------------- operator registration
def test_opcheck(device):
    r, s = pair((3, 5), device=device)
    ops = torch.ops.neon_ext
    opcheck(
        ops.extrapolate.default,
        ([r, r[0]], [s, s[0]], [0, 1], [1.0, 0.5]),
        {"dtype": torch.bfloat16},
    )
    opcheck(ops.extrapolate_out.default, ([r], [s], [0], [1.0], [torch.empty_like(r)]))
    opcheck(ops.extrapolate_grid.default, (r[0], s[0], [0, 2, 5], torch.ones(4, 2, device=device)))


def test_build_config():
    config = neon_ext.build_config()
    assert config["torch_version"].split("+")[0] == torch.__version__.split("+")[0]
    assert isinstance(config["cuda"], bool)
    assert config["cpu_kernels"] in ("avx512", "avx2", "sse2", "generic")
