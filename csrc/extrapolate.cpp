// Block-wise extrapolation: checks shared with CUDA, the CPU kernel, and the grid over one small network. One
// pass over memory; float32 arithmetic (float64 for float64 tensors), one rounding to the output dtype.
#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>

#include "neon_ext.h"

namespace neon {
namespace {

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
  if constexpr (std::is_same_v<Out, c10::BFloat16>) {  // c10's has a branch, which stops vectorisation
    const auto bits = c10::bit_cast<uint32_t>(static_cast<float>(value));
    const uint32_t nearest_even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {static_cast<uint16_t>(value == value ? nearest_even : 0x7fc0), c10::BFloat16::from_bits()};
  } else {
    return static_cast<Out>(value);
  }
}

template <typename In, typename Out>
NEON_INLINE void run_body(const In* r, const In* s, Out* out, int64_t n, double w) {
#pragma GCC ivdep  // out is theta_r or theta_s itself, or disjoint from both
  for (int64_t i = 0; i < n; ++i) out[i] = rounded<Out>(extrapolated(r[i], s[i], w));
}

template <typename In, typename Out>
void run_default(const In* r, const In* s, Out* out, int64_t n, double w) {
  run_body(r, s, out, n, w);
}
template <typename In, typename Out>
NEON_TARGET("avx2,fma,f16c")
void run_avx2(const In* r, const In* s, Out* out, int64_t n, double w) {
  run_body(r, s, out, n, w);
}

template <typename In, typename Out>
void run_typed(const Run& run, int64_t begin, int64_t end) {
  const In* r = static_cast<const In*>(run.r.const_data_ptr()) + begin;
  const In* s = static_cast<const In*>(run.s.const_data_ptr()) + begin;
  Out* out = static_cast<Out*>(run.out.mutable_data_ptr()) + begin;
  static const bool avx2 = NEON_SUPPORTS("avx2") && NEON_SUPPORTS("fma");
  (avx2 ? run_avx2<In, Out> : run_default<In, Out>)(r, s, out, end - begin, run.w);
}

// All tensors are laid end to end and cut into equal chunks: cores share one large tensor or many small ones.
void extrapolate_cpu(const std::vector<Run>& runs) {
  std::vector<int64_t> start{0};
  for (const Run& run : runs) start.push_back(start.back() + run.r.numel());
  parallel(start.back(), 1 << 16, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; begin < end; begin = start[++i]) {
      const auto from = begin - start[i], to = std::min(end, start[i + 1]) - start[i];
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, runs[i].r.scalar_type(), "extrapolate", [&] {
        using in_t = fast_t<scalar_t>;
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, runs[i].out.scalar_type(), "extrapolate",
                                        [&] { run_typed<in_t, fast_t<scalar_t>>(runs[i], from, to); });
      });
    }
  });
}

// ---------------------------------------------------------------- the same on every device

std::vector<Tensor> extrapolate(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block,
                                at::ArrayRef<double> w, std::optional<at::ScalarType> dtype) {
  std::vector<Tensor> out;
  for (const auto& r : theta_r) {
    const bool keeps = !dtype || at::isIntegralType(r.scalar_type(), true);
    out.push_back(at::empty_like(r, r.options().dtype(keeps ? r.scalar_type() : *dtype)));
  }
  using Signature =
      void(at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>, at::TensorList);
  op<Signature>("neon_ext::extrapolate_out").call(theta_r, theta_s, block, w, out);
  return out;
}

// A few MB at most: ATen's elementwise kernels do, on both devices.
Tensor extrapolate_grid(const Tensor& theta_r, const Tensor& theta_s, at::IntArrayRef block_offsets,
                        const Tensor& w) {
  TORCH_CHECK_VALUE(theta_r.dim() == 1 && theta_r.sizes() == theta_s.sizes() &&
                        theta_r.scalar_type() == at::kFloat && theta_s.scalar_type() == at::kFloat,
                    "extrapolate_grid: theta_r and theta_s must be [P] float32, got ", describe(theta_r),
                    " and ", describe(theta_s));
  const auto ends = static_cast<int64_t>(block_offsets.size());
  TORCH_CHECK_VALUE(w.dim() == 2 && w.size(1) + 1 == ends && at::isfinite(w).all().item<bool>(),
                    "extrapolate_grid: W must be [G, ", ends - 1,
                    "] for these block_offsets and finite, got ", w.sizes());
  TORCH_CHECK_VALUE(block_offsets[0] == 0 && block_offsets.back() == theta_r.numel() &&
                        std::is_sorted(block_offsets.begin(), block_offsets.end()),
                    "extrapolate_grid: block_offsets ", block_offsets, " must ascend from 0 to ",
                    theta_r.numel());
  const auto sizes = at::diff(at::tensor(block_offsets, at::kLong)).to(w.device());
  const auto step = w.to(at::kFloat).repeat_interleave(sizes, 1, theta_r.numel());  // [G, P]
  return at::where((step == 0).logical_or(theta_s == theta_r), theta_r, theta_r - step * (theta_s - theta_r));
}

}  // namespace

// ---------------------------------------------------------------- checks

void run_extrapolate(void (*kernel)(const std::vector<Run>&), at::TensorList theta_r, at::TensorList theta_s,
                     at::IntArrayRef block, at::ArrayRef<double> w, at::TensorList out) {
  const size_t n = theta_r.size();
  TORCH_CHECK_VALUE(theta_s.size() == n && block.size() == n && out.size() == n, "extrapolate: theta_r has ",
                    n, " tensors, theta_s ", theta_s.size(), ", block ", block.size(), ", out ", out.size(),
                    "; all four must have the same length");
  for (size_t b = 0; b < w.size(); ++b)
    TORCH_CHECK_VALUE(std::isfinite(w[b]), "extrapolate: w[", b, "] = ", w[b], " is not finite");
  const auto real = [](at::ScalarType t) { return at::isFloatingType(t) && at::elementSize(t) >= 2; };
  std::vector<Run> runs;
  std::vector<Tensor> from, to;  // copies to make
  for (size_t i = 0; i < n; ++i) {
    const Tensor &r = theta_r[i], &s = theta_s[i], &o = out[i];
    const auto type = r.scalar_type();
    const bool integral = at::isIntegralType(type, true);
    TORCH_CHECK_VALUE(
        (integral || real(type)) && r.layout() == at::kStrided && r.device() == theta_r[0].device(),
        "extrapolate: theta_r[", i, "] is ", describe(r),
        "; supported are dense floating point, integer "
        "and bool tensors, all on one device");
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
    if (integral || w[block[i]] == 0) {  // exactly theta_r, even where theta_s is not finite
      from.push_back(r);
      to.push_back(o);
    } else if (r.is_non_overlapping_and_dense() && r.strides() == s.strides() && r.strides() == o.strides()) {
      runs.push_back({r, s, o, w[block[i]]});
    } else {  // not the same flat memory
      from.push_back(at::empty(o.sizes(), o.options()));
      to.push_back(o);
      runs.push_back({r.contiguous(), s.contiguous(), from.back(), w[block[i]]});
    }
  }
  kernel(runs);
  if (!to.empty()) at::_foreach_copy_(to, from);
}

TORCH_LIBRARY_IMPL(neon_ext, CPU, m) {
  m.impl("extrapolate_out", extrapolate_out<extrapolate_cpu>);
}
TORCH_LIBRARY_IMPL(neon_ext, CompositeExplicitAutograd, m) {
  m.impl("extrapolate", extrapolate);
  m.impl("extrapolate_grid", extrapolate_grid);
}
TORCH_LIBRARY_IMPL(neon_ext, Meta, m) {
  m.impl("extrapolate_out",
         [](at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>, at::TensorList) {});
  m.impl("extrapolate_grid", [](const Tensor& theta_r, const Tensor&, at::IntArrayRef, const Tensor& w) {
    return at::empty_symint({w.sym_size(0), theta_r.sym_size(0)}, theta_r.options());
  });
}

}  // namespace neon
