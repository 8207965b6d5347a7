// Block-wise extrapolation: checks shared with CUDA, the CPU kernel, and the grid over one small network.
// One pass over memory per call; float32 arithmetic (float64 for float64 tensors), one rounding to the output
// dtype.
#include "neon_ext.h"

#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include <cstring>

namespace neon {
namespace {

using OptionalDtype = std::optional<at::ScalarType>;

// ---------------------------------------------------------------- CPU kernel

#if defined(__FLT16_MANT_DIG__)
using half_t = _Float16;  // converted by hardware inside NEON_TARGET functions, unlike c10::Half
#else
using half_t = c10::Half;
#endif
template <typename T>
using fast_t = std::conditional_t<std::is_same_v<T, c10::Half>, half_t, T>;

template <typename Out, typename T>
NEON_INLINE Out rounded(T value) {
  if constexpr (std::is_same_v<Out,
                               c10::BFloat16>) {  // c10's conversion has a branch, which stops vectorisation
    const auto bits = c10::bit_cast<uint32_t>(static_cast<float>(value));
    const uint32_t nearest_even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {static_cast<uint16_t>(value == value ? nearest_even : 0x7fc0), c10::BFloat16::from_bits()};
  } else {
    return static_cast<Out>(value);
  }
}

template <typename In, typename Out>
NEON_INLINE void run_body(const In* r, const In* s, Out* out, int64_t n, double w) {
  using acc_t = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const acc_t step = static_cast<acc_t>(w);
#pragma GCC ivdep  // out is theta_r or theta_s itself, or disjoint from both
  for (int64_t i = 0; i < n; ++i) {
    const acc_t a = static_cast<acc_t>(r[i]), b = static_cast<acc_t>(s[i]);
    const acc_t moved = a - step * (b - a);
    out[i] = rounded<Out>(b == a ? a : moved);  // equal stays bit-equal: -0 and infinities too
  }
}

template <typename In, typename Out>
void run_default(const In* r, const In* s, Out* out, int64_t n, double w) {
  run_body(r, s, out, n, w);
}
#if NEON_X86
template <typename In, typename Out>
NEON_TARGET("avx2,fma,f16c")
void run_avx2(const In* r, const In* s, Out* out, int64_t n, double w) {
  run_body(r, s, out, n, w);
}
#endif

template <typename In, typename Out>
void run_typed(const Run& run, int64_t begin, int64_t end) {
  const In* r = static_cast<const In*>(run.r) + begin;
  const In* s =
      run.w == 0 ? r : static_cast<const In*>(run.s) + begin;  // 0 * inf is NaN: w = 0 must not read it
  Out* out = static_cast<Out*>(run.out) + begin;
#if NEON_X86
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) return run_avx2(r, s, out, end - begin, run.w);
#endif
  run_default(r, s, out, end - begin, run.w);
}

void run_cpu(const Run& run, int64_t begin, int64_t end) {
  if (run.w == 0 && run.in_type == run.out_type) {
    const size_t size = at::elementSize(run.in_type);
    std::memmove(static_cast<char*>(run.out) + begin * size, static_cast<const char*>(run.r) + begin * size,
                 (end - begin) * size);
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, run.in_type, "extrapolate", [&] {
    using in_t = fast_t<scalar_t>;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, run.out_type, "extrapolate",
                                    [&] { run_typed<in_t, fast_t<scalar_t>>(run, begin, end); });
  });
}

// All tensors are laid end to end and cut into equal chunks, so that cores share one large tensor or many
// small ones.
void extrapolate_out_cpu(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block,
                         at::ArrayRef<double> w, at::TensorList out) {
  Plan plan = plan_extrapolate(theta_r, theta_s, block, w, out);
  std::vector<int64_t> start{0};
  for (const Run& run : plan.runs) start.push_back(start.back() + run.numel);
  parallel(start.back(), 1 << 16, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; begin < end; begin = start[++i])
      run_cpu(plan.runs[i], begin - start[i], std::min(end, start[i + 1]) - start[i]);
  });
  for (auto& [from, to] : plan.write_back) to.copy_(from);
}

std::vector<at::Tensor> extrapolate_cpu(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block,
                                        at::ArrayRef<double> w, OptionalDtype dtype) {
  auto out = extrapolate_outputs(theta_r, dtype);
  extrapolate_out_cpu(theta_r, theta_s, block, w, out);
  return out;
}

std::vector<at::Tensor> extrapolate_meta(at::TensorList theta_r, at::TensorList, at::IntArrayRef,
                                         at::ArrayRef<double>, OptionalDtype dtype) {
  return extrapolate_outputs(theta_r, dtype);
}
void extrapolate_out_meta(at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>,
                          at::TensorList) {}

// ---------------------------------------------------------------- grid over one small network

// A few MB at most: ATen's elementwise kernels do, on both devices.
at::Tensor extrapolate_grid(const at::Tensor& theta_r, const at::Tensor& theta_s,
                            at::IntArrayRef block_offsets, const at::Tensor& w) {
  TORCH_CHECK_VALUE(theta_r.dim() == 1 && theta_r.sizes() == theta_s.sizes() &&
                        theta_r.scalar_type() == at::kFloat && theta_s.scalar_type() == at::kFloat,
                    "extrapolate_grid: theta_r and theta_s must be [P] float32, got ", describe(theta_r),
                    " and ", describe(theta_s));
  TORCH_CHECK_VALUE(w.dim() == 2 && w.size(1) + 1 == static_cast<int64_t>(block_offsets.size()),
                    "extrapolate_grid: W must be [G, ", static_cast<int64_t>(block_offsets.size()) - 1,
                    "] for these block_offsets, got ", w.sizes());
  TORCH_CHECK_VALUE(block_offsets[0] == 0 && block_offsets.back() == theta_r.numel() &&
                        std::is_sorted(block_offsets.begin(), block_offsets.end()),
                    "extrapolate_grid: block_offsets ", block_offsets, " must ascend from 0 to ",
                    theta_r.numel());
  TORCH_CHECK_VALUE(at::isfinite(w).all().item<bool>(),
                    "extrapolate_grid: W has entries that are not finite");
  const auto sizes = at::diff(at::tensor(block_offsets, at::kLong)).to(w.device());
  const auto step = w.to(at::kFloat).repeat_interleave(sizes, 1, theta_r.numel());  // [G, P]
  return at::where((step == 0).logical_or(theta_s == theta_r), theta_r, theta_r - step * (theta_s - theta_r));
}

at::Tensor extrapolate_grid_meta(const at::Tensor& theta_r, const at::Tensor&, at::IntArrayRef,
                                 const at::Tensor& w) {
  return at::empty_symint({w.sym_size(0), theta_r.sym_size(0)}, theta_r.options());
}

}  // namespace

// ---------------------------------------------------------------- checks

std::string describe(const at::Tensor& t) {
  std::ostringstream text;
  text << t.scalar_type() << " " << t.sizes() << " on " << t.device();
  return text.str();
}

std::vector<at::Tensor> extrapolate_outputs(at::TensorList theta_r, OptionalDtype dtype) {
  std::vector<at::Tensor> out;
  for (const auto& r : theta_r) {
    const bool keeps = at::isIntegralType(r.scalar_type(), true) || !dtype;
    out.push_back(at::empty_like(r, r.options().dtype(keeps ? r.scalar_type() : *dtype)));
  }
  return out;
}

Plan plan_extrapolate(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block,
                      at::ArrayRef<double> w, at::TensorList out) {
  const size_t n = theta_r.size();
  TORCH_CHECK_VALUE(theta_s.size() == n && block.size() == n && out.size() == n, "extrapolate: theta_r has ",
                    n, " tensors, theta_s ", theta_s.size(), ", block ", block.size(), ", out ", out.size(),
                    "; all four must have the same length");
  for (size_t b = 0; b < w.size(); ++b)
    TORCH_CHECK_VALUE(std::isfinite(w[b]), "extrapolate: w[", b, "] = ", w[b], " is not finite");
  Plan plan;
  for (size_t i = 0; i < n; ++i) {
    at::Tensor r = theta_r[i], s = theta_s[i], o = out[i];
    const auto type = r.scalar_type();
    const bool integral = at::isIntegralType(type, true);
    const auto real = [](at::ScalarType t) { return at::isFloatingType(t) && at::elementSize(t) >= 2; };
    TORCH_CHECK_VALUE((integral || real(type)) && r.layout() == at::kStrided, "extrapolate: theta_r[", i,
                      "] is ", describe(r), "; supported are dense floating point, integer and bool tensors");
    TORCH_CHECK_VALUE(r.device() == theta_r[0].device(), "extrapolate: theta_r[", i, "] is on ", r.device(),
                      ", theta_r[0] on ", theta_r[0].device());
    TORCH_CHECK_VALUE(s.sizes() == r.sizes() && s.scalar_type() == type && s.device() == r.device(),
                      "extrapolate: theta_s[", i, "] is ", describe(s), ", but theta_r[", i, "] is ",
                      describe(r),
                      "; both must come from the same architecture, in one dtype and on one device");
    TORCH_CHECK_VALUE(o.sizes() == r.sizes() && o.device() == r.device() &&
                          (integral ? o.scalar_type() == type : real(o.scalar_type())),
                      "extrapolate: out[", i, "] is ", describe(o), ", but theta_r[", i, "] is ",
                      describe(r));
    TORCH_CHECK_VALUE(block[i] >= 0 && block[i] < static_cast<int64_t>(w.size()), "extrapolate: block[", i,
                      "] = ", block[i], ", but w has ", w.size(), " entries");
    at::assert_no_internal_overlap(o);
    at::assert_no_partial_overlap(o, r);
    at::assert_no_partial_overlap(o, s);
    if (!r.is_non_overlapping_and_dense() || r.strides() != s.strides() || r.strides() != o.strides()) {
      r = r.contiguous();
      s = s.contiguous();
      o = at::empty(o.sizes(), o.options());
      plan.keep.insert(plan.keep.end(), {r, s});
      plan.write_back.emplace_back(o, out[i]);
    }
    plan.runs.push_back({r.const_data_ptr(), s.const_data_ptr(), o.mutable_data_ptr(), r.numel(),
                         integral ? 0.0 : w[block[i]], type, o.scalar_type()});
  }
  return plan;
}

TORCH_LIBRARY_IMPL(neon_ext, CPU, m) {
  m.impl("extrapolate", extrapolate_cpu);
  m.impl("extrapolate_out", extrapolate_out_cpu);
  m.impl("extrapolate_grid", extrapolate_grid);
}
TORCH_LIBRARY_IMPL(neon_ext, CUDA, m) { m.impl("extrapolate_grid", extrapolate_grid); }
TORCH_LIBRARY_IMPL(neon_ext, Meta, m) {
  m.impl("extrapolate", extrapolate_meta);
  m.impl("extrapolate_out", extrapolate_out_meta);
  m.impl("extrapolate_grid", extrapolate_grid_meta);
}

}  // namespace neon
