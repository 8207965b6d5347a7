// The toy's network (input 3 -> 32, hidden blocks 32 -> 32 with ReLU, output 32 -> 2) through a
// whole DDIM trajectory, for G sets of weights and N starting points in one call. CPU kernel and
// the checks shared with CUDA.
//
// Samples fill the vector lanes, so a weight is one broadcast for 16 * V samples and activations
// never leave L1. Float32 arithmetic; moments are summed in float64 over fixed chunks, so they do
// not depend on the thread count.
#include <cstring>

#include "neon_ext.h"

namespace neon {
namespace {

typedef float vf
    __attribute__((vector_size(64)));  // 16 samples: one AVX-512, two AVX2 registers, four of Arm's
constexpr int kLanes = 16;
using Steps = std::vector<DdimStep>;

// The last tile is padded with zeros.
template <int V>
ADAPTIVE_INLINE void trajectories(const float* net,  // [P], of transposed()
                                  int blocks, const Steps& steps,
                                  const float* z,  // [n, 2]
                                  float* x,        // [n, 2]
                                  int64_t n) {
  constexpr int kTile = V * kLanes;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, n - begin));
    alignas(64) float lanes[2][kTile] = {};
    for (int j = 0; j < count; ++j) {
      for (int c = 0; c < 2; ++c) {
        lanes[c][j] = z[2 * (begin + j) + c];
      }
    }
    vf state[3][V];
    std::memcpy(state, lanes, sizeof(lanes));
    for (const DdimStep& step : steps) {
      ddim_step<vf, V>(net, blocks, step, state);
    }
    std::memcpy(lanes, state, sizeof(lanes));
    for (int j = 0; j < count; ++j) {
      for (int c = 0; c < 2; ++c) {
        x[2 * (begin + j) + c] = lanes[c][j];
      }
    }
  }
}

void run_baseline(const float* net, int blocks, const Steps& steps, const float* z, float* x,
                  int64_t n) {
  trajectories<1>(net, blocks, steps, z, x, n);
}
ADAPTIVE_TARGET("avx2,fma")
void run_avx2(const float* net, int blocks, const Steps& steps, const float* z, float* x,
              int64_t n) {
  trajectories<1>(net, blocks, steps, z, x, n);
}
ADAPTIVE_TARGET("avx512f,fma")
void run_avx512(const float* net, int blocks, const Steps& steps, const float* z, float* x,
                int64_t n) {
  trajectories<4>(net, blocks, steps, z, x, n);
}

// theta [P], as torch lays it out -> each layer's weights transposed to [in, out], then its biases.
std::vector<float> transposed(const float* theta, int blocks) {
  std::vector<float> net(theta, theta + kOuter + blocks * kHidden);
  const auto transpose = [&](int64_t at, int in, int out) {
    for (int o = 0; o < out; ++o) {
      for (int i = 0; i < in; ++i) {
        net[at + i * out + o] = theta[at + o * in + i];
      }
    }
  };
  transpose(0, 3, kWidth);
  for (int l = 0; l < blocks; ++l) {
    transpose(kFirst + l * kHidden, kWidth, kWidth);
  }
  transpose(kFirst + blocks * kHidden, kWidth, 2);
  return net;
}

void add_moments(const float* x,            // [n, 2]
                 int64_t n, double* sum) {  // [5]
  for (int64_t i = 0; i < n; ++i) {
    const double a = x[2 * i], b = x[2 * i + 1], terms[] = {a, b, a * a, a * b, b * b};
    for (int m = 0; m < 5; ++m) {
      sum[m] += terms[m];
    }
  }
}

// A task is a network and a chunk of samples.
void mlp_ddim_cpu(const Tensor& theta,  // [G, P]
                  const Tensor& z,      // [N, 2]
                  const Steps& steps,
                  float* samples,  // [G, N, 2] or null
                  double* sums) {  // [G, chunks, 5] or null
  auto run = run_baseline;
  if (isa() >= Isa::kAvx2) {
    run = isa() == Isa::kAvx512 ? run_avx512 : run_avx2;
  }
  const int64_t params = theta.size(1), n = z.size(0), chunks = (n + kSamples - 1) / kSamples;
  const auto blocks = static_cast<int>((params - kOuter) / kHidden);
  const float *weights = theta.const_data_ptr<float>(), *start = z.const_data_ptr<float>();
  parallel(theta.size(0) * chunks, 1, [&](int64_t begin, int64_t end) {
    float x[2 * kSamples];
    for (int64_t task = begin; task < end;) {
      const int64_t g = task / chunks;
      const auto net = transposed(weights + g * params, blocks);
      for (; task < end && task / chunks == g; ++task) {
        const int64_t first = task % chunks * kSamples, count = std::min(kSamples, n - first);
        float* to = samples ? samples + 2 * (g * n + first) : x;
        run(net.data(), blocks, steps, start + 2 * first, to, count);
        if (sums) {
          add_moments(to, count, sums + 5 * task);
        }
      }
    }
  });
}

}  // namespace

void check_mlp_ddim(const Tensor& theta,   // [G, P] float32
                    const Tensor& z,       // [N, 2] float32
                    const Tensor& abar) {  // [T]
  for (const Tensor* t : {&theta, &z, &abar}) {
    TORCH_CHECK_VALUE(t->layout() == at::kStrided && !t->is_quantized() && !t->is_nested(),
                      "mlp_ddim: theta, z and abar must be dense, got ", t->layout(), " ",
                      describe(*t));
  }
  TORCH_CHECK_VALUE(theta.dim() == 2 && theta.scalar_type() == at::kFloat,
                    "mlp_ddim: theta must be [G, P] float32, got ", describe(theta));
  TORCH_CHECK_VALUE(z.dim() == 2 && z.size(1) == 2 && z.scalar_type() == at::kFloat &&
                        z.device() == theta.device(),
                    "mlp_ddim: z must be [N, 2] float32 on theta's device, got ", describe(z));
  TORCH_CHECK_VALUE(abar.dim() == 1 && abar.numel() > 0 && !abar.is_complex(),
                    "mlp_ddim: abar must be [T], T >= 1, got ", describe(abar));
  TORCH_CHECK_VALUE(abar.is_cpu() || abar.device() == theta.device(),
                    "mlp_ddim: abar must be on the CPU or theta's device, got ", describe(abar));
  const int64_t hidden = theta.size(1) - kOuter;
  TORCH_CHECK_VALUE(hidden >= 0 && hidden % kHidden == 0, "mlp_ddim: P = ", theta.size(1),
                    " is not ", kOuter, " + ", kHidden,
                    " * blocks (the toy has 4 blocks, P = ", kOuter + 4 * kHidden, ")");
}

std::vector<DdimStep> ddim_steps(const Tensor& abar,  // [T]
                                 double zeta) {
  TORCH_CHECK_VALUE(std::isfinite(zeta), "mlp_ddim: zeta = ", zeta, " is not finite");
  const auto host = abar.to(at::kCPU, at::kDouble).contiguous();
  const double* p = host.const_data_ptr<double>();
  const int64_t n = host.numel();
  std::vector<DdimStep> steps;
  for (int64_t t = n - 1; t >= 0; --t) {
    TORCH_CHECK_VALUE(p[t] > 0 && p[t] <= 1, "mlp_ddim: abar[", t, "] = ", p[t],
                      " is outside (0, 1]");
    const double next = t > 0 ? p[t - 1] : 1.0;
    const double a = std::sqrt(next / p[t]);
    const double b = std::sqrt(1 - next) - a * std::sqrt(1 - p[t]) * zeta;
    const double time = n > 1 ? static_cast<double>(t) / static_cast<double>(n - 1) : 0.0;
    steps.push_back({static_cast<float>(a), static_cast<float>(b), static_cast<float>(time)});
    TORCH_CHECK_VALUE(std::isfinite(steps.back().a) && std::isfinite(steps.back().b),
                      "mlp_ddim: the step from abar[", t, "] = ", p[t], " with zeta = ", zeta,
                      " is beyond float32");
  }
  return steps;
}

std::tuple<Tensor, Tensor> finish_moments(const Tensor& sums, int64_t n, int64_t correction) {
  TORCH_CHECK_VALUE(correction >= 0 && n > correction, "mlp_ddim_moments: ", n,
                    " samples are too few for a covariance with correction ", correction);
  const auto total = sums.sum(1);  // [G, 5]
  const auto mean = total.slice(1, 0, 2) / n;
  const auto second =
      total.index_select(1, at::tensor({2, 3, 3, 4}, total.options().dtype(at::kLong)));
  const auto cov = second.view({-1, 2, 2}) - n * mean.unsqueeze(2) * mean.unsqueeze(1);
  return {mean, cov / static_cast<double>(n - correction)};
}

namespace {

void check_meta(const Tensor& theta, const Tensor& z, const Tensor& abar) {
  TORCH_CHECK_VALUE(theta.is_meta() && z.is_meta() && (abar.is_meta() || abar.is_cpu()),
                    "mlp_ddim: theta is on ", theta.device(), ", z on ", z.device(),
                    " and abar on ", abar.device(), "; all must be on one device");
}

Tensor mlp_ddim_meta(const Tensor& theta, const Tensor& z, const Tensor& abar, double) {
  check_meta(theta, z, abar);
  return at::empty_symint({theta.sym_size(0), z.sym_size(0), 2}, z.options());
}

std::tuple<Tensor, Tensor> mlp_ddim_moments_meta(const Tensor& theta, const Tensor& z,
                                                 const Tensor& abar, double, int64_t) {
  check_meta(theta, z, abar);
  const auto options = z.options().dtype(at::kDouble);
  const auto grid = theta.sym_size(0);
  return {at::empty_symint({grid, 2}, options), at::empty_symint({grid, 2, 2}, options)};
}

// Reached where an argument is of a kind that has no kernel: sparse, quantised, another device.
void unsupported(const Tensor& theta, const Tensor&, const Steps&, float*, double*) {
  TORCH_CHECK_VALUE(false, "mlp_ddim: there are kernels for CPU and CUDA, not for ",
                    describe(theta));
}

}  // namespace

TORCH_LIBRARY_IMPL(neon_ext, CPU, m) {
  m.impl("mlp_ddim", mlp_ddim<mlp_ddim_cpu>);
  m.impl("mlp_ddim_moments", mlp_ddim_moments<mlp_ddim_cpu>);
}
TORCH_LIBRARY_IMPL(neon_ext, CompositeExplicitAutograd, m) {
  m.impl("mlp_ddim", mlp_ddim<unsupported>);
  m.impl("mlp_ddim_moments", mlp_ddim_moments<unsupported>);
}
TORCH_LIBRARY_IMPL(neon_ext, Meta, m) {
  m.impl("mlp_ddim", mlp_ddim_meta);
  m.impl("mlp_ddim_moments", mlp_ddim_moments_meta);
}

}  // namespace neon
