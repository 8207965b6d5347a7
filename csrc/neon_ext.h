// Shared declarations of neon_ext. theta = theta_r - w_block * (theta_s - theta_r), w > 0 away from
// collapse.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/FunctionRef.h>
#include <torch/library.h>

// GCC and clang can compile one function for several instruction sets; elsewhere (arm64) one is
// enough.
#if defined(__x86_64__) && defined(__GNUC__)
#define ADAPTIVE_X86 1
#define ADAPTIVE_TARGET(isa) __attribute__((target(isa)))
#else
#define ADAPTIVE_X86 0
#define ADAPTIVE_TARGET(isa)
#endif
// Code shared with CUDA kernels. There every loop over registers is unrolled, on the CPU only the
// innermost ones.
#if defined(__CUDACC__)
#define ADAPTIVE_INLINE __host__ __device__ __forceinline__
#define ADAPTIVE_UNROLL _Pragma("unroll")
#define ADAPTIVE_UNROLL_CUDA _Pragma("unroll")
constexpr bool kRegisters = true;  // registers cannot be indexed at run time
#else
#define ADAPTIVE_INLINE inline __attribute__((always_inline))
#define ADAPTIVE_UNROLL _Pragma("GCC unroll 8")
#define ADAPTIVE_UNROLL_CUDA
constexpr bool kRegisters = false;
#endif

#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
// Arrays of registers are filled by unrolled loops, which GCC's check does not follow.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace neon {

using at::Tensor;

// The registered operator, so that dispatch (device, fake tensors, autograd) is that of
// torch.ops.neon_ext.*
template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline std::string describe(const Tensor& t) {
  return c10::str(t.scalar_type(), " ", t.sizes(), " on ", t.device());
}

// The CPU kernels in use. Each level is chosen by every instruction set that its functions are
// compiled for: avx2 means avx2, fma and f16c; avx512 means avx512f too.
enum class Isa { kBaseline, kAvx2, kAvx512 };
Isa isa();

// body(begin, end) over [0, n) on torch's own threads, in at most torch.get_num_threads() parts of
// at least `grain` items each (but for rounding). Exceptions reach the caller.
void parallel(int64_t n, int64_t grain, c10::function_ref<void(int64_t, int64_t)> body);

// ---------------------------------------------------------------- extrapolation

// One tensor: out = r - w * (s - r). All three are dense and in the same memory order.
struct Run {
  Tensor r, s;  // [...] float64, float32, bfloat16 or float16, of one dtype
  Tensor out;   // [...] any of these; may be r or s itself
  double w;     // finite in the inputs' arithmetic, neither 0 nor -1
};
// Checks the lists, runs a device's kernel where anything is to compute, and copies what remains.
void run_extrapolate(void (*kernel)(const std::vector<Run>&), at::TensorList theta_r,
                     at::TensorList theta_s, at::IntArrayRef block, at::ArrayRef<double> w,
                     at::TensorList out);
template <auto kernel>
void extrapolate_out(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block,
                     at::ArrayRef<double> w, at::TensorList out) {
  run_extrapolate(kernel, theta_r, theta_s, block, w, out);
}

// ---------------------------------------------------------------- toy sampler

constexpr int kWidth = 32;                         // hidden width of the toy's network
constexpr int kHidden = kWidth * kWidth + kWidth;  // parameters of one hidden block
constexpr int kFirst = 3 * kWidth + kWidth;  // parameters of the input layer, then come the blocks
constexpr int kOuter = kFirst + 2 * kWidth + 2;  // parameters of input and output layers together
constexpr int64_t kSamples = 1024;               // samples whose moments are summed together

// x <- a x + b eps(x, t), t = time feature in [0, 1]: DDIM (arXiv 2010.02502, eq. 12) with scaled
// score.
struct DdimStep {
  float a, b, t;
};

// y[o] = b[o] + sum_i w[i, o] x[i], with ReLU unless kLinear, for V values of type T (a vector of
// samples on the CPU, a float on CUDA). NaN passes through the ReLU.
template <typename T, int V, int In, int Out, bool kLinear>
ADAPTIVE_INLINE void layer(const float* w,       // [In, Out] weights, [Out] biases; 16-byte aligned
                           const T (&x)[In][V],  // [In, V]
                           T (&y)[Out][V]) {     // [Out, V]
  constexpr int kRows = Out < 4 ? Out : 4;  // neurons at once: kRows * V sums hide the FMA latency
  ADAPTIVE_UNROLL_CUDA
  for (int o = 0; o < Out; o += kRows) {
    T acc[kRows][V];
    ADAPTIVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      ADAPTIVE_UNROLL
      for (int v = 0; v < V; ++v) {
        acc[r][v] = w[In * Out + o + r] - T{};
      }
    }
    ADAPTIVE_UNROLL_CUDA
    for (int i = 0; i < In; ++i) {
      ADAPTIVE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        ADAPTIVE_UNROLL
        for (int v = 0; v < V; ++v) {
          acc[r][v] += w[i * Out + o + r] * x[i][v];
        }
      }
    }
    ADAPTIVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      ADAPTIVE_UNROLL
      for (int v = 0; v < V; ++v) {
        y[o + r][v] = !kLinear && acc[r][v] < 0 ? T{} : acc[r][v];
      }
    }
  }
}

// One DDIM step of V values of type T.
template <typename T, int V>
ADAPTIVE_INLINE void ddim_step(const float* net,  // [P] the layers as above, one after the other
                               int blocks, const DdimStep& step,
                               T (&x)[3][V]) {  // [3, V] two coordinates and the time feature
  T h[2][kWidth][V], eps[2][V] = {};
  int at = 0;
  if (step.b != 0) {  // abar = 1: the network's output has no weight
    ADAPTIVE_UNROLL
    for (int v = 0; v < V; ++v) {
      x[2][v] = step.t - T{};
    }
    layer<T, V, 3, kWidth, true>(net, x, h[0]);
    for (int l = 0; l < blocks; ++l) {
      layer<T, V, kWidth, kWidth, false>(net + kFirst + l * kHidden, h[at], h[1 - at]);
      if constexpr (kRegisters) {
        ADAPTIVE_UNROLL_CUDA
        for (int i = 0; i < kWidth; ++i) {
          ADAPTIVE_UNROLL
          for (int v = 0; v < V; ++v) {
            h[0][i][v] = h[1][i][v];
          }
        }
      } else {
        at = 1 - at;
      }
    }
    layer<T, V, kWidth, 2, true>(net + kFirst + blocks * kHidden, h[at], eps);
  }
  ADAPTIVE_UNROLL
  for (int c = 0; c < 2; ++c) {
    ADAPTIVE_UNROLL
    for (int v = 0; v < V; ++v) {
      x[c][v] = step.a * x[c][v] + step.b * eps[c][v];
    }
  }
}

std::vector<DdimStep> ddim_steps(const Tensor& abar,  // [T], on any device
                                 double zeta);
void check_mlp_ddim(const Tensor& theta,  // [G, P] float32
                    const Tensor& z,      // [N, 2] float32
                    const Tensor& abar);  // [T]
// -> mean [G, 2], cov [G, 2, 2] float64
std::tuple<Tensor, Tensor> finish_moments(
    const Tensor& sums,  // [G, chunks, 5] float64: x, y, xx, xy, yy
    int64_t n, int64_t correction);

// The operators, for a device's kernel(theta, z, steps, samples [G, N, 2] float32, sums [G, chunks,
// 5] float64 zeros), where exactly one of samples and sums is not null.
template <auto kernel>
Tensor mlp_ddim(const Tensor& theta, const Tensor& z, const Tensor& abar, double zeta) {
  check_mlp_ddim(theta, z, abar);
  auto out = at::empty({theta.size(0), z.size(0), 2}, z.options());
  kernel(theta.contiguous(), z.contiguous(), ddim_steps(abar, zeta), out.mutable_data_ptr<float>(),
         nullptr);
  return out;
}
template <auto kernel>
std::tuple<Tensor, Tensor> mlp_ddim_moments(const Tensor& theta, const Tensor& z,
                                            const Tensor& abar, double zeta, int64_t correction) {
  check_mlp_ddim(theta, z, abar);
  const int64_t chunks = (z.size(0) + kSamples - 1) / kSamples;
  auto sums = at::zeros({theta.size(0), chunks, 5}, z.options().dtype(at::kDouble));
  kernel(theta.contiguous(), z.contiguous(), ddim_steps(abar, zeta), nullptr,
         sums.mutable_data_ptr<double>());
  return finish_moments(sums, z.size(0), correction);
}

}  // namespace neon
