// Block-wise extrapolation: checks shared with CUDA, and the CPU kernels.
// One pass over memory per call; float32 arithmetic (float64 for float64 tensors), one rounding to the output dtype.
#include "neon_ext.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>

namespace neon {
namespace {

bool supported_float(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kHalf || t == at::kBFloat16;
}

void check_pair(size_t i, const at::Tensor& r, const at::Tensor& s, const at::Tensor& out) {
  TORCH_CHECK_VALUE(r.sizes() == s.sizes(), "extrapolate: theta_s[", i, "] has shape ", s.sizes(), ", theta_r[", i,
                    "] has ", r.sizes(), "; both must come from the same architecture");
  TORCH_CHECK_VALUE(r.scalar_type() == s.scalar_type(), "extrapolate: theta_s[", i, "] is ", s.scalar_type(),
                    ", theta_r[", i, "] is ", r.scalar_type(), "; cast one of them first");
  TORCH_CHECK_VALUE(r.device() == s.device() && r.device() == out.device(), "extrapolate: tensors at index ", i,
                    " are on different devices: theta_r ", r.device(), ", theta_s ", s.device(), ", out ",
                    out.device());
  TORCH_CHECK_VALUE(r.layout() == at::kStrided && s.layout() == at::kStrided && out.layout() == at::kStrided,
                    "extrapolate: index ", i, ": only dense (strided) tensors are supported");
  TORCH_CHECK_VALUE(out.sizes() == r.sizes(), "extrapolate: out[", i, "] has shape ", out.sizes(), ", theta_r[", i,
                    "] has ", r.sizes());
  if (at::isIntegralType(r.scalar_type(), true)) {
    TORCH_CHECK_VALUE(out.scalar_type() == r.scalar_type(), "extrapolate: out[", i, "] is ", out.scalar_type(),
                      ", but the ", r.scalar_type(), " buffer theta_r[", i, "] is copied and keeps its dtype");
    return;
  }
  TORCH_CHECK_VALUE(supported_float(r.scalar_type()), "extrapolate: theta_r[", i, "] is ", r.scalar_type(),
                    "; supported are float32, float64, bfloat16, float16, integers and bool");
  TORCH_CHECK_VALUE(supported_float(out.scalar_type()), "extrapolate: out[", i, "] is ", out.scalar_type(),
                    "; supported are float32, float64, bfloat16 and float16");
}

#if defined(__FLT16_MANT_DIG__)
using half_t = _Float16;  // converted by hardware inside NEON_TARGET functions, unlike c10::Half
#else
using half_t = c10::Half;
#endif

template <typename In, typename Out>
NEON_INLINE void run_body(const In* __restrict__ r, const In* __restrict__ s, Out* out, int64_t n, double w) {
  using acc_t = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const acc_t step = static_cast<acc_t>(w);
  if (step == 0) {  // 0 * inf is NaN: w = 0 must not read theta_s
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Out>(static_cast<acc_t>(r[i]));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const acc_t a = static_cast<acc_t>(r[i]);
    const acc_t b = static_cast<acc_t>(s[i]);
    const acc_t moved = a - step * (b - a);
    out[i] = static_cast<Out>(b == a ? a : moved);  // equal stays bit-equal: -0 and infinities too
  }
}

template <typename In, typename Out>
void run_default(const In* r, const In* s, Out* out, int64_t n, double w) {
  run_body(r, s, out, n, w);
}
#if NEON_X86
template <typename In, typename Out>
NEON_TARGET("avx2,fma,f16c") void run_avx2(const In* r, const In* s, Out* out, int64_t n, double w) {
  run_body(r, s, out, n, w);
}
#endif

template <typename In, typename Out>
void run_cpu(const Run& run, int64_t begin, int64_t end) {
  const In* r = static_cast<const In*>(run.r) + begin;
  const In* s = static_cast<const In*>(run.s) + begin;
  Out* out = static_cast<Out*>(run.out) + begin;
#if NEON_X86
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) return run_avx2(r, s, out, end - begin, run.w);
#endif
  run_default(r, s, out, end - begin, run.w);
}

template <typename In>
void run_cpu_in(const Run& run, int64_t begin, int64_t end) {
  switch (run.out_type) {
    case at::kFloat: return run_cpu<In, float>(run, begin, end);
    case at::kDouble: return run_cpu<In, double>(run, begin, end);
    case at::kHalf: return run_cpu<In, half_t>(run, begin, end);
    default: return run_cpu<In, c10::BFloat16>(run, begin, end);
  }
}

void run_cpu_any(const Run& run, int64_t begin, int64_t end) {
  if (run.w == 0 && run.in_type == run.out_type) {
    const size_t size = at::elementSize(run.in_type);
    std::memmove(static_cast<char*>(run.out) + begin * size, static_cast<const char*>(run.r) + begin * size,
                 (end - begin) * size);
    return;
  }
  switch (run.in_type) {
    case at::kFloat: return run_cpu_in<float>(run, begin, end);
    case at::kDouble: return run_cpu_in<double>(run, begin, end);
    case at::kHalf: return run_cpu_in<half_t>(run, begin, end);
    default: return run_cpu_in<c10::BFloat16>(run, begin, end);
  }
}

// All tensors are laid end to end and cut into equal chunks, so that cores share one large tensor or many small ones.
void extrapolate_out_cpu(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block, at::ArrayRef<double> w,
                         at::TensorList out) {
  Plan plan = plan_extrapolate(theta_r, theta_s, block, w, out);
  std::vector<int64_t> start{0};
  for (const Run& run : plan.runs) start.push_back(start.back() + run.numel);
  at::parallel_for(0, start.back(), 1 << 16, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, start[i + 1]);
      if (stop > begin) run_cpu_any(plan.runs[i], begin - start[i], stop - start[i]);
      begin = std::max(begin, stop);
    }
  });
  for (auto& [from, to] : plan.write_back) to.copy_(from);
}

std::vector<at::Tensor> extrapolate_cpu(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block,
                                        at::ArrayRef<double> w, std::optional<at::ScalarType> dtype) {
  auto out = extrapolate_outputs(theta_r, dtype);
  extrapolate_out_cpu(theta_r, theta_s, block, w, out);
  return out;
}

at::Tensor extrapolate_grid_cpu(const at::Tensor& theta_r, const at::Tensor& theta_s, at::IntArrayRef block_offsets,
                                const at::Tensor& w) {
  check_extrapolate_grid(theta_r, theta_s, block_offsets, w);
  const auto r = theta_r.contiguous(), s = theta_s.contiguous(), weights = w.to(at::kDouble).contiguous();
  const int64_t configurations = w.size(0), blocks = w.size(1), params = r.numel();
  auto out = at::empty({configurations, params}, r.options());
  const double* wp = weights.const_data_ptr<double>();
  at::parallel_for(0, configurations, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(params, 1)),
                   [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = block_offsets[b];
        const Run run{r.const_data_ptr<float>() + at, s.const_data_ptr<float>() + at,
                      out.mutable_data_ptr<float>() + g * params + at, block_offsets[b + 1] - at,
                      wp[g * blocks + b], at::kFloat, at::kFloat};
        run_cpu_any(run, 0, run.numel);
      }
  });
  return out;
}

std::vector<at::Tensor> extrapolate_meta(at::TensorList theta_r, at::TensorList, at::IntArrayRef, at::ArrayRef<double>,
                                         std::optional<at::ScalarType> dtype) {
  return extrapolate_outputs(theta_r, dtype);
}
void extrapolate_out_meta(at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>, at::TensorList) {}
at::Tensor extrapolate_grid_meta(const at::Tensor& theta_r, const at::Tensor&, at::IntArrayRef,
                                 const at::Tensor& w) {
  return at::empty_symint({w.sym_size(0), theta_r.sym_size(0)}, theta_r.options());
}

}  // namespace

std::vector<at::Tensor> extrapolate_outputs(at::TensorList theta_r, std::optional<at::ScalarType> dtype) {
  std::vector<at::Tensor> out;
  out.reserve(theta_r.size());
  for (const auto& r : theta_r) {
    const bool keeps = at::isIntegralType(r.scalar_type(), true) || !dtype;
    out.push_back(at::empty_like(r, r.options().dtype(keeps ? r.scalar_type() : *dtype)));
  }
  return out;
}

Plan plan_extrapolate(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block, at::ArrayRef<double> w,
                      at::TensorList out) {
  const size_t n = theta_r.size();
  TORCH_CHECK_VALUE(theta_s.size() == n && block.size() == n && out.size() == n, "extrapolate: theta_r has ", n,
                    " tensors, theta_s ", theta_s.size(), ", block ", block.size(), ", out ", out.size(),
                    "; all four must have the same length");
  for (size_t b = 0; b < w.size(); ++b)
    TORCH_CHECK_VALUE(std::isfinite(w[b]), "extrapolate: w[", b, "] = ", w[b], " is not finite");
  Plan plan;
  plan.runs.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    check_pair(i, theta_r[i], theta_s[i], out[i]);
    TORCH_CHECK_VALUE(theta_r[i].device() == theta_r[0].device(), "extrapolate: theta_r[", i, "] is on ",
                      theta_r[i].device(), ", theta_r[0] on ", theta_r[0].device());
    TORCH_CHECK_VALUE(block[i] >= 0 && block[i] < static_cast<int64_t>(w.size()), "extrapolate: block[", i, "] = ",
                      block[i], " but w has ", w.size(), " entries");
    at::assert_no_internal_overlap(out[i]);
    at::assert_no_partial_overlap(out[i], theta_r[i]);
    at::assert_no_partial_overlap(out[i], theta_s[i]);
    at::Tensor r = theta_r[i], s = theta_s[i], o = out[i];
    const bool flat = r.is_non_overlapping_and_dense() && r.strides() == s.strides() && r.strides() == o.strides();
    if (!flat) {
      r = r.contiguous();
      s = s.contiguous();
      o = at::empty(out[i].sizes(), out[i].options());
      plan.keep.insert(plan.keep.end(), {r, s});
      plan.write_back.emplace_back(o, out[i]);
    }
    const bool integral = at::isIntegralType(r.scalar_type(), true);
    plan.runs.push_back({r.const_data_ptr(), s.const_data_ptr(), o.mutable_data_ptr(), r.numel(),
                         integral ? 0.0 : w[block[i]], r.scalar_type(), o.scalar_type()});
  }
  return plan;
}

void check_extrapolate_grid(const at::Tensor& theta_r, const at::Tensor& theta_s, at::IntArrayRef block_offsets,
                            const at::Tensor& w) {
  TORCH_CHECK_VALUE(theta_r.dim() == 1 && theta_r.sizes() == theta_s.sizes(), "extrapolate_grid: theta_r ",
                    theta_r.sizes(), " and theta_s ", theta_s.sizes(), " must be flat and of equal length");
  TORCH_CHECK_VALUE(theta_r.scalar_type() == at::kFloat && theta_s.scalar_type() == at::kFloat,
                    "extrapolate_grid: theta_r and theta_s must be float32, got ", theta_r.scalar_type(), " and ",
                    theta_s.scalar_type());
  TORCH_CHECK_VALUE(w.dim() == 2 && w.size(1) + 1 == static_cast<int64_t>(block_offsets.size()),
                    "extrapolate_grid: W must be [G, B] with B + 1 = ", block_offsets.size(),
                    " block offsets, got shape ", w.sizes());
  TORCH_CHECK_VALUE(at::isFloatingType(w.scalar_type()), "extrapolate_grid: W must be floating point");
  TORCH_CHECK_VALUE(theta_r.device() == theta_s.device() && theta_r.device() == w.device(),
                    "extrapolate_grid: theta_r, theta_s and W must be on one device");
  TORCH_CHECK_VALUE(block_offsets.front() == 0 && block_offsets.back() == theta_r.numel() &&
                        std::is_sorted(block_offsets.begin(), block_offsets.end()),
                    "extrapolate_grid: block_offsets ", block_offsets, " must ascend from 0 to P = ",
                    theta_r.numel());
  TORCH_CHECK_VALUE(at::isfinite(w).all().item<bool>(), "extrapolate_grid: W has entries that are not finite");
}

TORCH_LIBRARY_IMPL(neon_ext, CPU, m) {
  m.impl("extrapolate", extrapolate_cpu);
  m.impl("extrapolate_out", extrapolate_out_cpu);
  m.impl("extrapolate_grid", extrapolate_grid_cpu);
}
TORCH_LIBRARY_IMPL(neon_ext, Meta, m) {
  m.impl("extrapolate", extrapolate_meta);
  m.impl("extrapolate_out", extrapolate_out_meta);
  m.impl("extrapolate_grid", extrapolate_grid_meta);
}

}  // namespace neon
