// Block-wise extrapolation: checks shared with CUDA, the CPU kernel, and the grid over one small
// network. One pass over memory; float32 arithmetic (float64 for float64 tensors), one rounding to
// the output dtype (from float64 to the 16-bit types through float32, as torch rounds).
#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>

#include "neon_ext.h"

#if ADAPTIVE_X86
#include <immintrin.h>
#endif

namespace neon {
namespace {

// ---------------------------------------------------------------- any CPU

template <typename Out, typename T>
ADAPTIVE_INLINE Out rounded(T value) {
  if constexpr (std::is_same_v<Out, c10::BFloat16>) {  // c10's branch stops vectorisation
    const auto bits = c10::bit_cast<uint32_t>(static_cast<float>(value));
    const uint32_t nearest_even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const bool number = (bits & 0x7fffffff) <= 0x7f800000;
    return {static_cast<uint16_t>(number ? nearest_even : 0x7fc0), c10::BFloat16::from_bits()};
  } else if constexpr (std::is_same_v<Out, c10::Half>) {
    return static_cast<float>(value);
  } else {
    return static_cast<Out>(value);
  }
}

// Equal stays bit-equal, -0 and infinities too. The result is selected by its bits: a conditional
// on floating point, which may trap, would keep the loop scalar.
template <typename In, typename Out>
ADAPTIVE_INLINE void run_body(const In* r, const In* s, Out* out,  // [n] each
                              int64_t n, double w) {
  using acc_t = std::conditional_t<std::is_same_v<In, double>, double, float>;
  using bits_t = std::conditional_t<std::is_same_v<In, double>, uint64_t, uint32_t>;
  const acc_t step = static_cast<acc_t>(w);
#pragma GCC ivdep  // out is theta_r or theta_s itself, or disjoint from both
  for (int64_t i = 0; i < n; ++i) {
    const acc_t a = static_cast<acc_t>(r[i]), b = static_cast<acc_t>(s[i]);
    const acc_t moved = a - step * (b - a);
    const bits_t same = -static_cast<bits_t>(a == b);
    const bits_t bits = (c10::bit_cast<bits_t>(a) & same) | (c10::bit_cast<bits_t>(moved) & ~same);
    out[i] = rounded<Out>(c10::bit_cast<acc_t>(bits));
  }
}

template <typename In, typename Out>
void run_baseline(const In* r, const In* s, Out* out, int64_t n, double w, bool) {
  run_body(r, s, out, n, w);
}

// ---------------------------------------------------------------- AVX2

#if ADAPTIVE_X86
#define ADAPTIVE_AVX2 ADAPTIVE_TARGET("avx2,fma,f16c") inline

ADAPTIVE_AVX2 __m256 load8(const float* p) {
  return _mm256_loadu_ps(p);
}
ADAPTIVE_AVX2 __m256 load8(const c10::Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
ADAPTIVE_AVX2 __m256 load8(const c10::BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// kStream: past the caches, where nobody would find the output in them anyway: the line is not read
// before it is written. The address is then a multiple of 32.
template <bool kStream>
ADAPTIVE_AVX2 void store(void* p, __m256i v) {
  if constexpr (kStream) {
    _mm256_stream_si256(static_cast<__m256i*>(p), v);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  }
}
template <bool kStream, bool>
ADAPTIVE_AVX2 void store16(float* p, __m256 low, __m256 high) {
  store<kStream>(p, _mm256_castps_si256(low));
  store<kStream>(p + 8, _mm256_castps_si256(high));
}
template <bool kStream, bool>
ADAPTIVE_AVX2 void store16(double* p, __m256 low, __m256 high) {
  const __m128 quarters[4] = {_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1),
                              _mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1)};
  for (int k = 0; k < 4; ++k) {
    store<kStream>(p + 4 * k, _mm256_castpd_si256(_mm256_cvtps_pd(quarters[k])));
  }
}
template <bool kStream, bool>
ADAPTIVE_AVX2 void store16(c10::Half* p, __m256 low, __m256 high) {
  const __m128i half_low = _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT);
  const __m128i half_high = _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT);
  store<kStream>(p, _mm256_set_m128i(half_high, half_low));
}
// The upper 16 bits of each float32 after rounding to nearest even; NaN becomes 0x7fc0, as rounding
// could turn its bits into -0. What comes of bfloat16 inputs cannot: the lower bits are zero.
template <bool kFromBfloat16>
ADAPTIVE_AVX2 __m256i nearest_bfloat16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  if constexpr (!kFromBfloat16) {
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), is_nan);
  }
  return _mm256_srli_epi32(up, 16);
}
template <bool kStream, bool kFromBfloat16>
ADAPTIVE_AVX2 void store16(c10::BFloat16* p, __m256 low, __m256 high) {
  // packus works on 128-bit halves: its 64-bit quarters come out as 0, 2, 1, 3.
  const __m256i mixed = _mm256_packus_epi32(nearest_bfloat16<kFromBfloat16>(low),
                                            nearest_bfloat16<kFromBfloat16>(high));
  store<kStream>(p, _mm256_permute4x64_epi64(mixed, 0b11011000));
}

ADAPTIVE_AVX2 __m256d extrapolated4(const double* r, const double* s, __m256d w) {
  const __m256d a = _mm256_loadu_pd(r), b = _mm256_loadu_pd(s);
  const __m256d moved = _mm256_fnmadd_pd(w, _mm256_sub_pd(b, a), a);
  return _mm256_blendv_pd(moved, a, _mm256_cmp_pd(a, b, _CMP_EQ_OQ));
}

template <typename In>
ADAPTIVE_AVX2 __m256 extrapolated8(const In* r, const In* s, double w) {
  if constexpr (std::is_same_v<In, double>) {
    const __m256d step = _mm256_set1_pd(w);
    const __m128 low = _mm256_cvtpd_ps(extrapolated4(r, s, step));
    return _mm256_set_m128(_mm256_cvtpd_ps(extrapolated4(r + 4, s + 4, step)), low);
  } else {
    const __m256 a = load8(r), b = load8(s), step = _mm256_set1_ps(static_cast<float>(w));
    const __m256 moved = _mm256_fnmadd_ps(step, _mm256_sub_ps(b, a), a);
    return _mm256_blendv_ps(moved, a, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
  }
}

// out = r - w (s - r), sixteen elements each.
template <bool kStream, typename In, typename Out>
ADAPTIVE_AVX2 void block16(const In* r, const In* s, Out* out, double w) {
  if constexpr (std::is_same_v<In, double> && std::is_same_v<Out, double>) {
    const __m256d step = _mm256_set1_pd(w);
    for (int k = 0; k < 16; k += 4) {
      store<kStream>(out + k, _mm256_castpd_si256(extrapolated4(r + k, s + k, step)));
    }
  } else {
    const __m256 low = extrapolated8(r, s, w);
    store16<kStream, std::is_same_v<In, c10::BFloat16>>(out, low, extrapolated8(r + 8, s + 8, w));
  }
}

// Fewer than sixteen elements, padded: the same instructions, so that no result depends on where a
// thread's part begins.
template <typename In, typename Out>
ADAPTIVE_AVX2 void block_of(const In* r, const In* s, Out* out, int64_t count, double w) {
  In a[16] = {}, b[16] = {};
  Out c[16];
  std::copy_n(r, count, a);
  std::copy_n(s, count, b);
  block16<false>(a, b, c, w);
  std::copy_n(c, count, out);
}

template <bool kStream, typename In, typename Out>
ADAPTIVE_AVX2 void run_blocks(const In* r, const In* s, Out* out,  // [n] each
                              int64_t n, double w) {
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + 16 <= n; i += 16) {
    block16<kStream>(r + i, s + i, out + i, w);
  }
  if (i < n) {
    block_of(r + i, s + i, out + i, n - i, w);
  }
}

template <typename In, typename Out>
ADAPTIVE_TARGET("avx2,fma,f16c")
void run_avx2(const In* r, const In* s, Out* out,  // [n] each
              int64_t n, double w, bool stream) {
  const auto address = reinterpret_cast<uintptr_t>(out);
  if (!stream || address % sizeof(Out) != 0) {
    run_blocks<false>(r, s, out, n, w);
    return;
  }
  // Up to a cache line's beginning, then whole lines.
  int64_t head = std::min<int64_t>(n, (64 - address % 64) % 64 / sizeof(Out));
  run_blocks<false>(r, s, out, head, w);
  run_blocks<true>(r + head, s + head, out + head, n - head, w);
  _mm_sfence();
}
#endif

// ---------------------------------------------------------------- dispatch and threads

template <typename In, typename Out>
void run_typed(const Run& run, int64_t begin, int64_t end, bool stream) {
  const In* r = static_cast<const In*>(run.r.const_data_ptr()) + begin;
  const In* s = static_cast<const In*>(run.s.const_data_ptr()) + begin;
  Out* out = static_cast<Out*>(run.out.mutable_data_ptr()) + begin;
  auto kernel = run_baseline<In, Out>;
#if ADAPTIVE_X86
  if (isa() >= Isa::kAvx2) {
    kernel = run_avx2<In, Out>;
  }
#endif
  kernel(r, s, out, end - begin, run.w, stream);
}

void run_part(const Run& run, int64_t begin, int64_t end, bool stream) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, run.r.scalar_type(), "extrapolate", [&] {
        using in_t = scalar_t;
        AT_DISPATCH_FLOATING_TYPES_AND2(
            at::kHalf, at::kBFloat16, run.out.scalar_type(), "extrapolate",
            [&] { run_typed<in_t, scalar_t>(run, begin, end, stream); });
      });
}

constexpr int64_t kGrain = 1 << 16;      // elements that are worth a thread
constexpr int64_t kStreamed = 16 << 20;  // bytes of output that no cache would keep

// All tensors are laid end to end and cut into equal parts: threads share one large tensor or many
// small ones.
void extrapolate_cpu(const std::vector<Run>& runs) {
  std::vector<int64_t> start{0};
  int64_t bytes = 0;
  for (const Run& run : runs) {
    start.push_back(start.back() + run.r.numel());
    bytes += run.out.nbytes();
  }
  parallel(start.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; begin < end; begin = start[++i]) {
      const Run& run = runs[i];
      const void* out = run.out.const_data_ptr();
      const bool in_place = out == run.r.const_data_ptr() || out == run.s.const_data_ptr();
      run_part(run, begin - start[i], std::min(end, start[i + 1]) - start[i],
               bytes >= kStreamed && !in_place);
    }
  });
}

// ---------------------------------------------------------------- shared memory

// The bytes that a tensor's elements lie in, [begin, end).
struct Span {
  uintptr_t begin, end;
};
Span span(const Tensor& t) {
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  int64_t elements = t.numel() > 0 ? 1 : 0;
  for (int64_t d = 0; elements > 0 && d < t.dim(); ++d) {
    elements += (t.size(d) - 1) * t.stride(d);
  }
  return {begin, begin + elements * t.element_size()};
}

// The same elements in the same order.
bool same_view(const Tensor& a, const Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr() || a.scalar_type() != b.scalar_type() ||
      a.sizes() != b.sizes()) {
    return false;
  }
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) {
      return false;
    }
  }
  return true;
}

bool same_bits(const Tensor& a, const Tensor& b) {
  if (same_view(a, b)) {
    return true;
  }
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) {
    return false;
  }
  const auto bits = a.element_size() == 8   ? at::kLong
                    : a.element_size() == 4 ? at::kInt
                    : a.element_size() == 2 ? at::kShort
                                            : at::kByte;
  return at::equal(a.view(bits), b.view(bits));
}

// Whether any element lies in both. Views with gaps, as the columns of one matrix, are marked on a
// map of their elements.
bool share_memory(const Tensor& a, const Tensor& b) {
  const Span p = span(a), q = span(b);
  if (p.begin >= q.end || q.begin >= p.end) {
    return false;
  }
  const auto size = static_cast<uintptr_t>(a.element_size());
  const uintptr_t first = std::min(p.begin, q.begin);
  const bool dense = a.is_non_overlapping_and_dense() && b.is_non_overlapping_and_dense();
  if (dense || b.element_size() != a.element_size() || (p.begin - q.begin) % size != 0) {
    return true;
  }
  const auto map = at::zeros({static_cast<int64_t>((std::max(p.end, q.end) - first) / size)},
                             at::TensorOptions().dtype(at::kBool).device(at::kCPU));
  map.as_strided(a.sizes(), a.strides(), (p.begin - first) / size).fill_(true);
  return map.as_strided(b.sizes(), b.strides(), (q.begin - first) / size).any().item<bool>();
}

// The outputs in the order of their addresses, to find those that a tensor may meet.
class Outputs {
 public:
  explicit Outputs(at::TensorList out) {
    for (size_t i = 0; i < out.size(); ++i) {
      const Span where = span(out[i]);
      if (where.begin < where.end) {
        sorted_.push_back({where, i, 0});
      }
    }
    std::sort(sorted_.begin(), sorted_.end(), [](const Entry& a, const Entry& b) {
      return std::tie(a.where.begin, a.index) < std::tie(b.where.begin, b.index);
    });
    uintptr_t reach = 0;
    for (Entry& entry : sorted_) {
      reach = std::max(reach, entry.where.end);
      entry.reach = reach;
    }
  }

  // meets(index) for every output whose span crosses that of t.
  template <typename Meets>
  void crossing(const Tensor& t, const Meets& meets) const {
    const Span where = span(t);
    auto after =
        std::lower_bound(sorted_.begin(), sorted_.end(), where.end,
                         [](const Entry& entry, uintptr_t end) { return entry.where.begin < end; });
    while (after != sorted_.begin() && (after - 1)->reach > where.begin) {
      --after;
      if (after->where.end > where.begin && where.begin < where.end) {
        meets(after->index);
      }
    }
  }

 private:
  struct Entry {
    Span where;
    size_t index;
    uintptr_t reach;  // the highest end of the entries up to this one
  };
  std::vector<Entry> sorted_;
};

// Which entries to compute: an output that is written twice with the same result (tied weights) is
// written once; anything else that would be read after it was written, or written twice, is
// refused.
std::vector<bool> entries_to_compute(at::TensorList theta_r, at::TensorList theta_s,
                                     at::TensorList out, const std::vector<double>& step) {
  const Outputs outputs(out);
  std::vector<bool> compute(out.size(), true);
  const auto same_result = [&](size_t i, size_t j) {
    return same_view(out[i], out[j]) && step[i] == step[j] && same_bits(theta_r[i], theta_r[j]) &&
           same_bits(theta_s[i], theta_s[j]);
  };
  for (size_t i = 0; i < out.size(); ++i) {
    TORCH_CHECK_VALUE(at::has_internal_overlap(out[i]) != at::MemOverlap::Yes, "extrapolate: out[",
                      i, "] has several elements in one place of memory (an expanded tensor)");
    outputs.crossing(out[i], [&](size_t j) {
      if (j >= i || !compute[j]) {
        return;
      }
      if (same_result(i, j)) {
        compute[i] = false;
      } else {
        TORCH_CHECK_VALUE(!share_memory(out[i], out[j]), "extrapolate: out[", i, "] and out[", j,
                          "] share memory, but not theta_r, theta_s and w: what is written would "
                          "depend on the order; give each memory of its own");
      }
    });
  }
  const auto check_input = [&](const char* list, const Tensor& t, size_t i) {
    outputs.crossing(t, [&](size_t j) {
      const bool itself = i == j && same_view(t, out[j]);
      TORCH_CHECK_VALUE(itself || !compute[j] || !share_memory(t, out[j]), "extrapolate: out[", j,
                        "] shares memory with ", list, "[", i,
                        "], which would be overwritten before or while it is read; only out[i] "
                        "being the whole theta_r[i] or theta_s[i] is possible");
    });
  };
  for (size_t i = 0; i < out.size(); ++i) {
    if (compute[i]) {
      check_input("theta_r", theta_r[i], i);
      check_input("theta_s", theta_s[i], i);
    }
  }
  return compute;
}

// ---------------------------------------------------------------- checks

void check_one_device(at::TensorList theta_r, at::TensorList theta_s, at::TensorList out) {
  const auto check = [&](const char* name, at::TensorList list) {
    for (size_t i = 0; i < list.size(); ++i) {
      const auto& first = theta_r.empty() ? list[0] : theta_r[0];
      TORCH_CHECK_VALUE(list[i].device() == first.device(), "extrapolate: ", name, "[", i, "] is ",
                        describe(list[i]), ", but the first tensor is on ", first.device(),
                        "; all tensors of a call must be on one device");
    }
  };
  check("theta_r", theta_r);
  check("theta_s", theta_s);
  check("out", out);
}

bool is_real(at::ScalarType type) {
  return at::isFloatingType(type) && at::elementSize(type) >= 2;
}

void check_tensors(const Tensor& r, const Tensor& s, const Tensor& out, size_t i) {
  const auto type = r.scalar_type();
  const bool integral = at::isIntegralType(type, true);
  TORCH_CHECK_VALUE((integral || is_real(type)) && r.layout() == at::kStrided && !r.is_nested(),
                    "extrapolate: theta_r[", i, "] is ", r.layout(), " ", describe(r),
                    "; supported are dense floating point, integer and bool tensors");
  TORCH_CHECK_VALUE(s.sizes() == r.sizes() && s.scalar_type() == type && s.layout() == r.layout(),
                    "extrapolate: theta_s[", i, "] is ", s.layout(), " ", describe(s),
                    ", but theta_r[", i, "] is ", describe(r),
                    "; both must come from the same architecture, in one dtype");
  TORCH_CHECK_VALUE(out.sizes() == r.sizes() && out.layout() == r.layout() &&
                        (integral ? out.scalar_type() == type : is_real(out.scalar_type())),
                    "extrapolate: out[", i, "] is ", out.layout(), " ", describe(out),
                    ", but theta_r[", i, "] is ", describe(r));
}

void check_lists(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block,
                 at::ArrayRef<double> w, at::TensorList out) {
  const size_t n = theta_r.size();
  TORCH_CHECK_VALUE(theta_s.size() == n && block.size() == n && out.size() == n,
                    "extrapolate: theta_r has ", n, " tensors, theta_s ", theta_s.size(),
                    ", block ", block.size(), ", out ", out.size(),
                    "; all four must have the same length");
  check_one_device(theta_r, theta_s, out);
  for (size_t b = 0; b < w.size(); ++b) {
    TORCH_CHECK_VALUE(std::isfinite(w[b]), "extrapolate: w[", b, "] = ", w[b], " is not finite");
  }
  for (size_t i = 0; i < n; ++i) {
    check_tensors(theta_r[i], theta_s[i], out[i], i);
    TORCH_CHECK_VALUE(block[i] >= 0 && block[i] < static_cast<int64_t>(w.size()),
                      "extrapolate: block[", i, "] = ", block[i], ", but w has ", w.size(),
                      " entries");
  }
}

// Each tensor's w as its arithmetic sees it: rounded to float32 but for float64 tensors.
std::vector<double> steps(at::TensorList theta_r, at::IntArrayRef block, at::ArrayRef<double> w) {
  std::vector<double> result;
  for (size_t i = 0; i < theta_r.size(); ++i) {
    const double given = w[block[i]];
    const bool wide = theta_r[i].scalar_type() == at::kDouble;
    result.push_back(wide ? given : static_cast<double>(static_cast<float>(given)));
    TORCH_CHECK_VALUE(std::isfinite(result.back()), "extrapolate: w[", block[i], "] = ", given,
                      " is beyond float32, in which theta_r[", i, "] is computed");
  }
  return result;
}

}  // namespace

void run_extrapolate(void (*kernel)(const std::vector<Run>&), at::TensorList theta_r,
                     at::TensorList theta_s, at::IntArrayRef block, at::ArrayRef<double> w,
                     at::TensorList out) {
  check_lists(theta_r, theta_s, block, w, out);
  const auto step = steps(theta_r, block, w);
  const auto compute = entries_to_compute(theta_r, theta_s, out, step);

  std::vector<Run> runs;
  std::vector<Tensor> from, to;  // copies to make
  for (size_t i = 0; i < theta_r.size(); ++i) {
    const Tensor &r = theta_r[i], &s = theta_s[i], &o = out[i];
    if (!compute[i]) {
      continue;
    }
    if (at::isIntegralType(r.scalar_type(), true) || step[i] == 0) {
      from.push_back(r);  // to the bit, even where theta_s is not finite
      to.push_back(o);
    } else if (step[i] == -1) {
      from.push_back(s);  // to the bit, where r + (s - r) would round twice
      to.push_back(o);
    } else if (r.is_non_overlapping_and_dense() && r.strides() == s.strides() &&
               r.strides() == o.strides()) {
      runs.push_back({r, s, o, step[i]});
    } else {  // not the same flat memory
      from.push_back(at::empty(o.sizes(), o.options()));
      to.push_back(o);
      runs.push_back({r.contiguous(), s.contiguous(), from.back(), step[i]});
    }
  }
  kernel(runs);
  if (!to.empty()) {
    at::_foreach_copy_(to, from);
  }
}

// ---------------------------------------------------------------- the same on every device

namespace {

using Into = void(at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>,
                  at::TensorList);

std::vector<Tensor> extrapolate(at::TensorList theta_r, at::TensorList theta_s,
                                at::IntArrayRef block, at::ArrayRef<double> w,
                                std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_VALUE(!dtype || is_real(*dtype), "extrapolate: dtype ", *dtype,
                    " is not float64, float32, bfloat16 or float16");
  std::vector<Tensor> out;
  for (size_t i = 0; i < theta_r.size(); ++i) {
    const Tensor& r = theta_r[i];
    check_tensors(r, r, r, i);
    const bool keeps = !dtype || at::isIntegralType(r.scalar_type(), true);
    out.push_back(at::empty_like(r, r.options().dtype(keeps ? r.scalar_type() : *dtype)));
  }
  op<Into>("neon_ext::extrapolate_out").call(theta_r, theta_s, block, w, out);
  return out;
}

// Reached where a list holds tensors of a kind that has no kernel: sparse, quantised, other
// devices.
void extrapolate_unsupported(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block,
                             at::ArrayRef<double> w, at::TensorList out) {
  check_lists(theta_r, theta_s, block, w, out);
  TORCH_CHECK_VALUE(false, "extrapolate: there are kernels for CPU and CUDA, not for ",
                    describe(theta_r[0]));
}

// A few MB at most: ATen's elementwise kernels do, on both devices.
Tensor extrapolate_grid(const Tensor& theta_r,          // [P] float32
                        const Tensor& theta_s,          // [P] float32
                        at::IntArrayRef block_offsets,  // [B + 1]
                        const Tensor& w) {              // [G, B] -> [G, P] float32
  for (const Tensor* t : {&theta_r, &theta_s, &w}) {
    TORCH_CHECK_VALUE(t->layout() == at::kStrided && !t->is_quantized() && !t->is_meta() &&
                          t->device() == theta_r.device(),
                      "extrapolate_grid: theta_r, theta_s and W must be dense and on one device, "
                      "got ",
                      t->layout(), " ", describe(*t), " beside ", describe(theta_r));
  }
  TORCH_CHECK_VALUE(theta_r.dim() == 1 && theta_r.sizes() == theta_s.sizes() &&
                        theta_r.scalar_type() == at::kFloat && theta_s.scalar_type() == at::kFloat,
                    "extrapolate_grid: theta_r and theta_s must be [P] float32, got ",
                    describe(theta_r), " and ", describe(theta_s));
  const auto ends = static_cast<int64_t>(block_offsets.size());
  TORCH_CHECK_VALUE(w.dim() == 2 && w.size(1) + 1 == ends && !w.is_complex(),
                    "extrapolate_grid: W must be [G, ", ends - 1, "] for these block_offsets, got ",
                    describe(w));
  const auto rounded_w = w.to(at::kFloat);
  TORCH_CHECK_VALUE(at::isfinite(rounded_w).all().item<bool>(),
                    "extrapolate_grid: W has entries that are not finite in float32");
  TORCH_CHECK_VALUE(block_offsets[0] == 0 && block_offsets.back() == theta_r.numel() &&
                        std::is_sorted(block_offsets.begin(), block_offsets.end()),
                    "extrapolate_grid: block_offsets ", block_offsets, " must ascend from 0 to ",
                    theta_r.numel());
  const auto sizes = at::diff(at::tensor(block_offsets, at::kLong)).to(w.device());
  const auto step = rounded_w.repeat_interleave(sizes, 1, theta_r.numel());  // [G, P]
  auto moved = theta_r - step * (theta_s - theta_r);
  moved = at::where(theta_s == theta_r, theta_r, moved);
  moved = at::where(step == -1, theta_s, moved);
  return at::where(step == 0, theta_r, moved);
}

void extrapolate_meta(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef,
                      at::ArrayRef<double>, at::TensorList out) {
  check_one_device(theta_r, theta_s, out);
}

Tensor extrapolate_grid_meta(const Tensor& theta_r, const Tensor& theta_s, at::IntArrayRef,
                             const Tensor& w) {
  TORCH_CHECK_VALUE(theta_r.is_meta() && theta_s.is_meta() && w.is_meta(),
                    "extrapolate_grid: theta_r on ", theta_r.device(), ", theta_s on ",
                    theta_s.device(), " and W on ", w.device(), " must be on one device");
  return at::empty_symint({w.sym_size(0), theta_r.sym_size(0)}, theta_r.options());
}

// Autograd must notice that a saved tensor changed, whoever calls the operator.
void extrapolate_in_place(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block,
                          at::ArrayRef<double> w, at::TensorList out) {
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op<Into>("neon_ext::extrapolate_out").call(theta_r, theta_s, block, w, out);
  }
  for (const Tensor& t : out) {
    if (!t.is_inference()) {
      t.unsafeGetTensorImpl()->bump_version();
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(neon_ext, CPU, m) {
  m.impl("extrapolate_out", extrapolate_out<extrapolate_cpu>);
}
TORCH_LIBRARY_IMPL(neon_ext, CompositeExplicitAutograd, m) {
  m.impl("extrapolate", extrapolate);
  m.impl("extrapolate_out", extrapolate_unsupported);
  m.impl("extrapolate_grid", extrapolate_grid);
}
TORCH_LIBRARY_IMPL(neon_ext, ADInplaceOrView, m) {
  m.impl("extrapolate_out", extrapolate_in_place);
}
TORCH_LIBRARY_IMPL(neon_ext, Meta, m) {
  m.impl("extrapolate_out", extrapolate_meta);
  m.impl("extrapolate_grid", extrapolate_grid_meta);
}

}  // namespace neon
