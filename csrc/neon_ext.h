// Shared declarations of neon_ext. theta = theta_r - w_block * (theta_s - theta_r), w > 0 away from collapse.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <future>

// GCC and clang can compile one function for several instruction sets; elsewhere (arm64) one is enough.
#if defined(__x86_64__) && defined(__GNUC__)
#define NEON_X86 1
#define NEON_TARGET(isa) __attribute__((target(isa)))
#define NEON_SUPPORTS(isa) static_cast<bool>(__builtin_cpu_supports(isa))
#else
#define NEON_X86 0
#define NEON_TARGET(isa)
#define NEON_SUPPORTS(isa) false
#endif
// Code shared with CUDA kernels. There every loop over registers is unrolled, on the CPU only the innermost
// ones.
#if defined(__CUDACC__)
#define NEON_INLINE __host__ __device__ __forceinline__
#define NEON_UNROLL _Pragma("unroll")
#define NEON_UNROLL_CUDA _Pragma("unroll")
constexpr bool kRegisters = true;  // registers cannot be indexed at run time
#else
#define NEON_INLINE inline __attribute__((always_inline))
#define NEON_UNROLL _Pragma("GCC unroll 8")
#define NEON_UNROLL_CUDA
constexpr bool kRegisters = false;
#endif

namespace neon {

using at::Tensor;

// The registered operator, so that dispatch (device, fake tensors, autograd) is that of torch.ops.neon_ext.*
template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline std::string describe(const Tensor& t) {
  return c10::str(t.scalar_type(), " ", t.sizes(), " on ", t.device());
}

// body(begin, end) over [0, n) in at most torch.get_num_threads() threads, at least `grain` items each.
// at::parallel_for would be serial here without OpenMP, and a second OpenMP runtime ignores torch's setting.
// std::async hands on exceptions, and runs a part in get() when the system has no thread left to give.
template <typename Body>
void parallel(int64_t n, int64_t grain, const Body& body) {
  const int64_t most = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t threads = std::max<int64_t>(1, std::min(most, (n + grain - 1) / grain));
  std::vector<std::future<void>> others;
  for (int64_t i = 1; i < threads; ++i)
    others.push_back(std::async(std::cref(body), n * i / threads, n * (i + 1) / threads));
  body(0, n / threads);
  for (auto& other : others) other.get();
}

// ---------------------------------------------------------------- extrapolation

// In the inputs' arithmetic: float64 for float64, else float32. Equal stays bit-equal: -0 and infinities too.
template <typename In, typename acc_t = std::conditional_t<std::is_same_v<In, double>, double, float>>
NEON_INLINE acc_t extrapolated(In r, In s, double w) {
  const acc_t a = static_cast<acc_t>(r), b = static_cast<acc_t>(s);
  const acc_t moved = a - static_cast<acc_t>(w) * (b - a);
  return b == a ? a : moved;
}

// One tensor: out = r - w * (s - r). All three are dense and in the same memory order.
struct Run {
  Tensor r, s, out;
  double w;
};
// Checks the lists, runs a device's kernel where anything is to compute, and copies what remains.
void run_extrapolate(void (*kernel)(const std::vector<Run>&), at::TensorList theta_r, at::TensorList theta_s,
                     at::IntArrayRef block, at::ArrayRef<double> w, at::TensorList out);
template <auto kernel>
void extrapolate_out(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block,
                     at::ArrayRef<double> w, at::TensorList out) {
  run_extrapolate(kernel, theta_r, theta_s, block, w, out);
}

// ---------------------------------------------------------------- toy sampler

constexpr int kWidth = 32;                         // hidden width of the toy's network
constexpr int kHidden = kWidth * kWidth + kWidth;  // parameters of one hidden block
constexpr int kFirst = 3 * kWidth + kWidth;        // parameters of the input layer, where the blocks begin
constexpr int kOuter = kFirst + 2 * kWidth + 2;    // parameters of input and output layers together
constexpr int64_t kSamples = 1024;                 // samples whose moments are summed together

// x <- a x + b eps(x, t), t = time feature in [0, 1]: DDIM (arXiv 2010.02502, eq. 12) with scaled score.
struct DdimStep {
  float a, b, t;
};

// y[o] = b[o] + sum_i w[i, o] x[i], with ReLU unless kLinear, for V values of type T (a vector of samples on
// the CPU, a float on CUDA). w: weights transposed to [In, Out], then the biases; 16-byte aligned. NaN passes
// through the ReLU.
template <typename T, int V, int In, int Out, bool kLinear>
NEON_INLINE void layer(const float* w, const T (&x)[In][V], T (&y)[Out][V]) {
  constexpr int kRows = Out < 4 ? Out : 4;  // neurons at once: kRows * V accumulators hide the FMA latency
  NEON_UNROLL_CUDA
  for (int o = 0; o < Out; o += kRows) {
    T acc[kRows][V];
    NEON_UNROLL
    for (int r = 0; r < kRows; ++r) NEON_UNROLL
    for (int v = 0; v < V; ++v) acc[r][v] = w[In * Out + o + r] - T{};
    NEON_UNROLL_CUDA
    for (int i = 0; i < In; ++i) NEON_UNROLL
    for (int r = 0; r < kRows; ++r) NEON_UNROLL
    for (int v = 0; v < V; ++v) acc[r][v] += w[i * Out + o + r] * x[i][v];
    NEON_UNROLL
    for (int r = 0; r < kRows; ++r) NEON_UNROLL
    for (int v = 0; v < V; ++v) y[o + r][v] = !kLinear && acc[r][v] < 0 ? T{} : acc[r][v];
  }
}

// x: the two coordinates and the time feature. net: the layers as above, one after the other.
template <typename T, int V>
NEON_INLINE void ddim_step(const float* net, int blocks, const DdimStep& step, T (&x)[3][V]) {
  T h[2][kWidth][V], eps[2][V] = {};
  int at = 0;
  if (step.b != 0) {  // abar = 1: the network's output has no weight
    NEON_UNROLL
    for (int v = 0; v < V; ++v) x[2][v] = step.t - T{};
    layer<T, V, 3, kWidth, true>(net, x, h[0]);
    for (int l = 0; l < blocks; ++l) {
      layer<T, V, kWidth, kWidth, false>(net + kFirst + l * kHidden, h[at], h[1 - at]);
      if constexpr (!kRegisters) at = 1 - at;
      NEON_UNROLL_CUDA
      for (int i = 0; kRegisters && i < kWidth; ++i) NEON_UNROLL
      for (int v = 0; v < V; ++v) h[0][i][v] = h[1][i][v];
    }
    layer<T, V, kWidth, 2, true>(net + kFirst + blocks * kHidden, h[at], eps);
  }
  NEON_UNROLL
  for (int c = 0; c < 2; ++c) NEON_UNROLL
  for (int v = 0; v < V; ++v) x[c][v] = step.a * x[c][v] + step.b * eps[c][v];
}

std::vector<DdimStep> ddim_steps(const Tensor& abar, double zeta);
void check_mlp_ddim(const Tensor& theta, const Tensor& z, const Tensor& abar);
// sums [G, chunks, 5] float64 (x, y, xx, xy, yy) -> mean [G, 2], cov [G, 2, 2]
std::tuple<Tensor, Tensor> finish_moments(const Tensor& sums, int64_t n, int64_t correction);

// The operators, for a device's kernel(theta, z, steps, samples [G, N, 2] float32, sums [G, chunks, 5]
// float64 zeros), where exactly one of samples and sums is not null.
template <auto kernel>
Tensor mlp_ddim(const Tensor& theta, const Tensor& z, const Tensor& abar, double zeta) {
  check_mlp_ddim(theta, z, abar);
  auto out = at::empty({theta.size(0), z.size(0), 2}, z.options());
  kernel(theta.contiguous(), z.contiguous(), ddim_steps(abar, zeta), out.mutable_data_ptr<float>(), nullptr);
  return out;
}
template <auto kernel>
std::tuple<Tensor, Tensor> mlp_ddim_moments(const Tensor& theta, const Tensor& z, const Tensor& abar,
                                            double zeta, int64_t correction) {
  check_mlp_ddim(theta, z, abar);
  const int64_t chunks = (z.size(0) + kSamples - 1) / kSamples;
  auto sums = at::zeros({theta.size(0), chunks, 5}, z.options().dtype(at::kDouble));
  kernel(theta.contiguous(), z.contiguous(), ddim_steps(abar, zeta), nullptr,
         sums.mutable_data_ptr<double>());
  return finish_moments(sums, z.size(0), correction);
}

}  // namespace neon
