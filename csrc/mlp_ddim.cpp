// The toy's network (input 3 -> 32, hidden blocks 32 -> 32 with ReLU, output 32 -> 2) through a whole DDIM
// trajectory, for G sets of weights and N starting points in one call. CPU kernel and the checks shared with
// CUDA.
//
// Samples fill the vector lanes, so a weight is one broadcast for 16 * V samples and activations never leave
// L1. Float32 arithmetic; the moments are summed in float64 over fixed chunks, so they do not depend on the
// thread count.
#include "neon_ext.h"

#include <torch/library.h>

#include <cstring>

namespace neon {
namespace {

typedef float vf
    __attribute__((vector_size(64)));  // 16 samples: one AVX-512, two AVX2 or four NEON registers
constexpr int kLanes = 16;
constexpr int kRows = 4;      // output neurons computed at once: kRows * V accumulators hide the FMA latency
constexpr int kChunk = 1024;  // samples per task

// One network, transposed so that the weights of kRows neighbouring neurons lie side by side.
struct Network {
  float w_in[3 * kWidth], b_in[kWidth];
  std::vector<float> w_hidden, b_hidden;  // [blocks, in, out], [blocks, out]
  float w_out[kWidth * 2], b_out[2];
  int64_t blocks;

  Network(const float* p, int64_t n_blocks)
      : w_hidden(n_blocks * kWidth * kWidth), b_hidden(n_blocks * kWidth), blocks(n_blocks) {
    p = take(p, w_in, b_in, 3, kWidth);
    for (int64_t l = 0; l < blocks; ++l)
      p = take(p, &w_hidden[l * kWidth * kWidth], &b_hidden[l * kWidth], kWidth, kWidth);
    take(p, w_out, b_out, kWidth, 2);
  }
  static const float* take(const float* p, float* w, float* b, int in, int out) {
    for (int o = 0; o < out; ++o)
      for (int i = 0; i < in; ++i) w[i * out + o] = p[o * in + i];
    std::memcpy(b, p + in * out, out * sizeof(float));
    return p + in * out + out;
  }
};

// out[o] = b[o] + sum_i w[i, o] in[i], with ReLU; NaN passes through (a < 0 is false for it).
template <int V>
NEON_INLINE void hidden_layer(const float* w, const float* b, const vf in[kWidth][V], vf out[kWidth][V]) {
  for (int o = 0; o < kWidth; o += kRows) {
    vf acc[kRows][V];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = b[o + r] - vf{};
    for (int i = 0; i < kWidth; ++i)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const float weight = w[i * kWidth + o + r];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] += weight * in[i][v];
      }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) out[o + r][v] = acc[r][v] < 0 ? vf{} : acc[r][v];
  }
}

template <int V>
NEON_INLINE void ddim_step(const Network& net, const DdimStep& step, vf x[2][V]) {
  vf h[2][kWidth][V];
  for (int o = 0; o < kWidth; ++o) {
    const float bias = net.b_in[o] + net.w_in[2 * kWidth + o] * step.t;
    for (int v = 0; v < V; ++v) h[0][o][v] = bias + net.w_in[o] * x[0][v] + net.w_in[kWidth + o] * x[1][v];
  }
  int at = 0;
  for (int64_t l = 0; l < net.blocks; ++l, at ^= 1)
    hidden_layer<V>(&net.w_hidden[l * kWidth * kWidth], &net.b_hidden[l * kWidth], h[at], h[at ^ 1]);
  vf eps[2][V];
  for (int c = 0; c < 2; ++c)
    for (int v = 0; v < V; ++v) eps[c][v] = net.b_out[c] - vf{};
  for (int i = 0; i < kWidth; ++i)
    for (int c = 0; c < 2; ++c)
      for (int v = 0; v < V; ++v) eps[c][v] += net.w_out[2 * i + c] * h[at][i][v];
  for (int c = 0; c < 2; ++c)
    for (int v = 0; v < V; ++v) x[c][v] = step.a * x[c][v] + step.b * eps[c][v];
}

// z [n, 2] -> x [n, 2]; the last tile is padded with zeros.
template <int V>
NEON_INLINE void trajectories(const Network& net, const std::vector<DdimStep>& steps, const float* z,
                              float* x, int64_t n) {
  constexpr int kTile = V * kLanes;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, n - begin));
    alignas(64) float lanes[2][kTile] = {};
    for (int j = 0; j < count; ++j)
      for (int c = 0; c < 2; ++c) lanes[c][j] = z[2 * (begin + j) + c];
    vf state[2][V];
    std::memcpy(state, lanes, sizeof(state));
    for (const DdimStep& step : steps) {
      if (step.b == 0) {  // abar = 1: the network's output has no weight
        for (int c = 0; c < 2; ++c)
          for (int v = 0; v < V; ++v) state[c][v] *= step.a;
        continue;
      }
      ddim_step<V>(net, step, state);
    }
    std::memcpy(lanes, state, sizeof(state));
    for (int j = 0; j < count; ++j)
      for (int c = 0; c < 2; ++c) x[2 * (begin + j) + c] = lanes[c][j];
  }
}

using trajectories_fn = void (*)(const Network&, const std::vector<DdimStep>&, const float*, float*, int64_t);
void trajectories_default(const Network& net, const std::vector<DdimStep>& steps, const float* z, float* x,
                          int64_t n) {
  trajectories<1>(net, steps, z, x, n);
}
#if NEON_X86
NEON_TARGET("avx2,fma")
void trajectories_avx2(const Network& net, const std::vector<DdimStep>& steps, const float* z, float* x,
                       int64_t n) {
  trajectories<1>(net, steps, z, x, n);
}
NEON_TARGET("avx512f,fma")
void trajectories_avx512(const Network& net, const std::vector<DdimStep>& steps, const float* z, float* x,
                         int64_t n) {
  trajectories<4>(net, steps, z, x, n);
}
#endif
trajectories_fn pick_trajectories() {
#if NEON_X86
  if (__builtin_cpu_supports("avx512f")) return trajectories_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return trajectories_avx2;
#endif
  return trajectories_default;
}

void add_moments(const float* x, int64_t n, double* sum) {
  for (int64_t i = 0; i < n; ++i) {
    const double a = x[2 * i], b = x[2 * i + 1];
    sum[0] += a;
    sum[1] += b;
    sum[2] += a * a;
    sum[3] += a * b;
    sum[4] += b * b;
  }
}

// Runs every (network, chunk of samples) and hands the finished samples to `sink(g, first sample, count, x)`.
template <typename Sink>
void run_grid(const at::Tensor& theta, const at::Tensor& z, const std::vector<DdimStep>& steps,
              int64_t blocks, const Sink& sink) {
  static const trajectories_fn run = pick_trajectories();
  const auto weights = theta.contiguous(), start = z.contiguous();
  const int64_t n = z.size(0), chunks = (n + kChunk - 1) / kChunk;
  parallel(theta.size(0) * chunks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float x[2 * kChunk];
    for (int64_t task = begin; task < end;) {
      const int64_t g = task / chunks;
      const Network net(weights.const_data_ptr<float>() + g * weights.size(1), blocks);
      for (; task < end && task / chunks == g; ++task) {
        const int64_t first = task % chunks * kChunk, count = std::min<int64_t>(kChunk, n - first);
        run(net, steps, start.const_data_ptr<float>() + 2 * first, x, count);
        sink(g, first, count, x);
      }
    }
  });
}

at::Tensor mlp_ddim_cpu(const at::Tensor& theta, const at::Tensor& z, const at::Tensor& abar, double zeta) {
  const int64_t blocks = check_mlp_ddim(theta, z, abar), n = z.size(0);
  auto out = at::empty({theta.size(0), n, 2}, z.options());
  float* p = out.mutable_data_ptr<float>();
  run_grid(theta, z, ddim_steps(abar, zeta), blocks,
           [&](int64_t g, int64_t first, int64_t count, const float* x) {
             std::memcpy(p + 2 * (g * n + first), x, 2 * count * sizeof(float));
           });
  return out;
}

std::tuple<at::Tensor, at::Tensor> mlp_ddim_moments_cpu(const at::Tensor& theta, const at::Tensor& z,
                                                        const at::Tensor& abar, double zeta,
                                                        int64_t correction) {
  const int64_t blocks = check_mlp_ddim(theta, z, abar), n = z.size(0), chunks = (n + kChunk - 1) / kChunk;
  auto sums = at::zeros({theta.size(0), chunks, 5}, z.options().dtype(at::kDouble));
  double* p = sums.mutable_data_ptr<double>();
  run_grid(theta, z, ddim_steps(abar, zeta), blocks,
           [&](int64_t g, int64_t first, int64_t count, const float* x) {
             add_moments(x, count, p + 5 * (g * chunks + first / kChunk));
           });
  return finish_moments(sums, n, correction);
}

at::Tensor mlp_ddim_meta(const at::Tensor& theta, const at::Tensor& z, const at::Tensor&, double) {
  return at::empty_symint({theta.sym_size(0), z.sym_size(0), 2}, z.options());
}
std::tuple<at::Tensor, at::Tensor> mlp_ddim_moments_meta(const at::Tensor& theta, const at::Tensor& z,
                                                         const at::Tensor&, double, int64_t) {
  const auto options = z.options().dtype(at::kDouble);
  return {at::empty_symint({theta.sym_size(0), 2}, options),
          at::empty_symint({theta.sym_size(0), 2, 2}, options)};
}

}  // namespace

int64_t check_mlp_ddim(const at::Tensor& theta, const at::Tensor& z, const at::Tensor& abar) {
  TORCH_CHECK_VALUE(theta.dim() == 2 && theta.scalar_type() == at::kFloat,
                    "mlp_ddim: theta must be [G, P] float32, got ", theta.sizes(), " ", theta.scalar_type());
  TORCH_CHECK_VALUE(z.dim() == 2 && z.size(1) == 2 && z.scalar_type() == at::kFloat,
                    "mlp_ddim: z must be [N, 2] float32, got ", z.sizes(), " ", z.scalar_type());
  TORCH_CHECK_VALUE(theta.device() == z.device(), "mlp_ddim: theta is on ", theta.device(), ", z on ",
                    z.device());
  TORCH_CHECK_VALUE(abar.dim() == 1 && abar.numel() > 0, "mlp_ddim: abar must be [T] with T >= 1, got ",
                    abar.sizes());
  const int64_t hidden = theta.size(1) - kOuter;
  TORCH_CHECK_VALUE(hidden >= 0 && hidden % kHidden == 0, "mlp_ddim: P = ", theta.size(1), " is not ", kOuter,
                    " + ", kHidden, " * blocks (the toy has 4 blocks, P = ", kOuter + 4 * kHidden, ")");
  return hidden / kHidden;
}

std::vector<DdimStep> ddim_steps(const at::Tensor& abar, double zeta) {
  TORCH_CHECK_VALUE(std::isfinite(zeta), "mlp_ddim: zeta = ", zeta, " is not finite");
  const auto host = abar.to(at::kCPU, at::kDouble).contiguous();
  const double* p = host.const_data_ptr<double>();
  const int64_t n = host.numel();
  std::vector<DdimStep> steps;
  for (int64_t t = n - 1; t >= 0; --t) {
    TORCH_CHECK_VALUE(p[t] > 0 && p[t] <= 1, "mlp_ddim: abar[", t, "] = ", p[t], " is outside (0, 1]");
    const double next = t > 0 ? p[t - 1] : 1.0;
    const double b = std::sqrt(1 - next) - std::sqrt(next / p[t]) * std::sqrt(1 - p[t]) * zeta;
    steps.push_back({static_cast<float>(std::sqrt(next / p[t])), static_cast<float>(b),
                     n > 1 ? static_cast<float>(static_cast<double>(t) / (n - 1)) : 0.0f});
  }
  return steps;
}

std::tuple<at::Tensor, at::Tensor> finish_moments(const at::Tensor& sums, int64_t n, int64_t correction) {
  TORCH_CHECK_VALUE(correction >= 0 && n > correction, "mlp_ddim_moments: ", n,
                    " samples are too few for a covariance with correction ", correction);
  const auto total = sums.sum(1);  // [G, 5]
  const auto mean = total.slice(1, 0, 2) / n;
  const auto second =
      at::stack({total.select(1, 2), total.select(1, 3), total.select(1, 3), total.select(1, 4)}, 1)
          .view({-1, 2, 2});
  return {mean, (second - n * mean.unsqueeze(2) * mean.unsqueeze(1)) / static_cast<double>(n - correction)};
}

TORCH_LIBRARY_IMPL(neon_ext, CPU, m) {
  m.impl("mlp_ddim", mlp_ddim_cpu);
  m.impl("mlp_ddim_moments", mlp_ddim_moments_cpu);
}
TORCH_LIBRARY_IMPL(neon_ext, Meta, m) {
  m.impl("mlp_ddim", mlp_ddim_meta);
  m.impl("mlp_ddim_moments", mlp_ddim_moments_meta);
}

}  // namespace neon
