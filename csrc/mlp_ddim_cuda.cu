// The toy's network through a whole DDIM trajectory on CUDA. Weights lie in shared memory and are read as
// broadcasts; each thread carries kSamples trajectories with all activations in registers, so that one
// 16-byte weight load feeds 4 * kSamples multiply-adds. Float32 arithmetic, float64 moments reduced in a
// fixed order. Work per sample and network call: 8,512 floating-point operations, no device-memory traffic.
#include "neon_ext.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

namespace neon {
namespace {

constexpr int kThreads = 128;
constexpr int kSamples = 2;      // trajectories per thread: 2 x 2 x 32 activations fit the 255 registers
constexpr int kMaxSteps = 1024;  // 12 bytes each, in the kernel's parameters
constexpr int kTile = kThreads * kSamples;

struct Steps {
  DdimStep step[kMaxSteps];
  int count;
};

// Shared-memory layout per network: for each layer the weights transposed to [in, out], then the biases.
struct Layout {
  static constexpr int kIn = 0, kInBias = 3 * kWidth, kFirst = 4 * kWidth;
  static constexpr int out(int blocks) { return kFirst + blocks * static_cast<int>(kHidden); }
  static constexpr int size(int blocks) { return out(blocks) + 2 * kWidth + 2; }
};

__device__ void load_layer(float* to, const float* from, int in, int out) {
  for (int i = threadIdx.x; i < in * out; i += kThreads) to[i % in * out + i / in] = from[i];
  for (int i = threadIdx.x; i < out; i += kThreads) to[in * out + i] = from[in * out + i];
}

// h <- max(W h + b, 0) for kSamples samples; everything is unrolled, so that h and y stay in registers.
__device__ __forceinline__ void hidden_layer(const float* w, float (&h)[kSamples][kWidth]) {
  float y[kSamples][kWidth];
  const float4* bias = reinterpret_cast<const float4*>(w + kWidth * kWidth);
#pragma unroll
  for (int o = 0; o < kWidth / 4; ++o)
#pragma unroll
    for (int n = 0; n < kSamples; ++n) {
      y[n][4 * o] = bias[o].x, y[n][4 * o + 1] = bias[o].y;
      y[n][4 * o + 2] = bias[o].z, y[n][4 * o + 3] = bias[o].w;
    }
  const float4* weight = reinterpret_cast<const float4*>(w);
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
#pragma unroll
    for (int o = 0; o < kWidth / 4; ++o) {
      const float4 v = weight[i * (kWidth / 4) + o];
#pragma unroll
      for (int n = 0; n < kSamples; ++n) {
        y[n][4 * o] = fmaf(v.x, h[n][i], y[n][4 * o]);
        y[n][4 * o + 1] = fmaf(v.y, h[n][i], y[n][4 * o + 1]);
        y[n][4 * o + 2] = fmaf(v.z, h[n][i], y[n][4 * o + 2]);
        y[n][4 * o + 3] = fmaf(v.w, h[n][i], y[n][4 * o + 3]);
      }
    }
#pragma unroll
  for (int n = 0; n < kSamples; ++n)
#pragma unroll
    for (int o = 0; o < kWidth; ++o) h[n][o] = y[n][o] < 0 ? 0.0f : y[n][o];  // NaN passes through
}

__device__ __forceinline__ void ddim_step(const float* net, int blocks, const DdimStep& step,
                                          float (&x)[kSamples][2]) {
  if (step.b == 0) {  // abar = 1: the network's output has no weight
#pragma unroll
    for (int n = 0; n < kSamples; ++n) x[n][0] *= step.a, x[n][1] *= step.a;
    return;
  }
  float h[kSamples][kWidth];
#pragma unroll
  for (int o = 0; o < kWidth; ++o) {
    const float bias = fmaf(net[Layout::kIn + 2 * kWidth + o], step.t, net[Layout::kInBias + o]);
#pragma unroll
    for (int n = 0; n < kSamples; ++n)
      h[n][o] = fmaf(net[Layout::kIn + kWidth + o], x[n][1], fmaf(net[Layout::kIn + o], x[n][0], bias));
  }
#pragma unroll 1
  for (int l = 0; l < blocks; ++l) hidden_layer(net + Layout::kFirst + l * kHidden, h);
  const float* out = net + Layout::out(blocks);
#pragma unroll
  for (int n = 0; n < kSamples; ++n) {
    float eps0 = out[2 * kWidth], eps1 = out[2 * kWidth + 1];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      eps0 = fmaf(out[2 * i], h[n][i], eps0);
      eps1 = fmaf(out[2 * i + 1], h[n][i], eps1);
    }
    x[n][0] = fmaf(step.b, eps0, step.a * x[n][0]);
    x[n][1] = fmaf(step.b, eps1, step.a * x[n][1]);
  }
}

// Sums v over the block in a fixed order; the result is valid in thread 0.
__device__ double block_sum(double v, double* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xffffffff, v, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < kThreads / 32; ++i) total += scratch[i];
  return total;
}

// blockIdx.y (and its stride) picks the network, blockIdx.x strides over tiles of samples.
// Writes samples [G, N, 2] when out is given, else sums [G, gridDim.x, 5].
__global__ void __launch_bounds__(kThreads)
    ddim_kernel(const float* theta, const float2* z, float2* out, double* sums, int64_t networks, int64_t n,
                int64_t params, int blocks, const __grid_constant__ Steps steps) {
  extern __shared__ __align__(16) float net[];
  __shared__ double scratch[kThreads / 32];
  for (int64_t g = blockIdx.y; g < networks; g += gridDim.y) {
    __syncthreads();  // the previous network is still being read
    const float* p = theta + g * params;
    load_layer(net, p, 3, kWidth);
    for (int l = 0; l < blocks; ++l)
      load_layer(net + Layout::kFirst + l * kHidden, p + Layout::kFirst + l * kHidden, kWidth, kWidth);
    load_layer(net + Layout::out(blocks), p + Layout::out(blocks), kWidth, 2);
    __syncthreads();
    double sum[5] = {};
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTile; first < n;
         first += static_cast<int64_t>(gridDim.x) * kTile) {
      float x[kSamples][2] = {};
#pragma unroll
      for (int k = 0; k < kSamples; ++k) {
        const int64_t j = first + k * kThreads + threadIdx.x;
        if (j < n) x[k][0] = z[j].x, x[k][1] = z[j].y;
      }
      for (int t = 0; t < steps.count; ++t) ddim_step(net, blocks, steps.step[t], x);
#pragma unroll
      for (int k = 0; k < kSamples; ++k) {
        const int64_t j = first + k * kThreads + threadIdx.x;
        if (j >= n) continue;
        if (out) {
          out[g * n + j] = make_float2(x[k][0], x[k][1]);
        } else {
          const double a = x[k][0], b = x[k][1];
          sum[0] += a, sum[1] += b, sum[2] += a * a, sum[3] += a * b, sum[4] += b * b;
        }
      }
    }
    if (sums)
      for (int m = 0; m < 5; ++m) {
        const double total = block_sum(sum[m], scratch);
        if (threadIdx.x == 0) sums[(g * gridDim.x + blockIdx.x) * 5 + m] = total;
      }
  }
}

// Exactly one of out [G, N, 2] float32 and sums [G, tiles, 5] float64 is defined.
void launch(const at::Tensor& theta, const at::Tensor& z, const at::Tensor& abar, double zeta, int64_t blocks,
            const at::Tensor& out, const at::Tensor& sums, int64_t tiles) {
  const auto list = ddim_steps(abar, zeta);
  TORCH_CHECK_VALUE(list.size() <= kMaxSteps, "mlp_ddim: on CUDA at most ", kMaxSteps, " steps, got ",
                    list.size());
  auto steps = std::make_unique<Steps>();
  std::copy(list.begin(), list.end(), steps->step);
  steps->count = static_cast<int>(list.size());
  const int shared = Layout::size(static_cast<int>(blocks)) * static_cast<int>(sizeof(float));
  const int limit = at::cuda::getCurrentDeviceProperties()->sharedMemPerBlockOptin;
  TORCH_CHECK_VALUE(shared + 64 <= limit, "mlp_ddim: ", blocks, " hidden blocks need ", shared,
                    " bytes of shared memory, this GPU has ", limit);
  C10_CUDA_CHECK(cudaFuncSetAttribute(ddim_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  const auto weights = theta.contiguous();
  // float2 loads want 8-byte alignment, which a sliced z may lack
  auto start = z.contiguous();
  if (reinterpret_cast<uintptr_t>(start.const_data_ptr()) % sizeof(float2) != 0) start = start.clone();
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(std::min<int64_t>(theta.size(0), 65535)));
  ddim_kernel<<<grid, kThreads, shared, at::cuda::getCurrentCUDAStream()>>>(
      weights.const_data_ptr<float>(), reinterpret_cast<const float2*>(start.const_data_ptr<float>()),
      out.defined() ? reinterpret_cast<float2*>(out.mutable_data_ptr<float>()) : nullptr,
      sums.defined() ? sums.mutable_data_ptr<double>() : nullptr, theta.size(0), z.size(0), theta.size(1),
      static_cast<int>(blocks), *steps);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Enough tiles per network to fill the GPU when G is small, few when it is large: loading the weights has a
// cost.
int64_t tiles_for(int64_t networks, int64_t n) {
  const int64_t all = std::max<int64_t>(1, (n + kTile - 1) / kTile);
  const int64_t wanted = 16L * at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  return std::min(all, std::max<int64_t>(1, wanted / std::max<int64_t>(1, networks)) + 7);
}

at::Tensor mlp_ddim_cuda(const at::Tensor& theta, const at::Tensor& z, const at::Tensor& abar, double zeta) {
  const int64_t blocks = check_mlp_ddim(theta, z, abar);
  const c10::cuda::CUDAGuard guard(theta.device());
  auto out = at::empty({theta.size(0), z.size(0), 2}, z.options());
  if (out.numel() > 0) launch(theta, z, abar, zeta, blocks, out, {}, tiles_for(theta.size(0), z.size(0)));
  return out;
}

std::tuple<at::Tensor, at::Tensor> mlp_ddim_moments_cuda(const at::Tensor& theta, const at::Tensor& z,
                                                         const at::Tensor& abar, double zeta,
                                                         int64_t correction) {
  const int64_t blocks = check_mlp_ddim(theta, z, abar);
  const c10::cuda::CUDAGuard guard(theta.device());
  const int64_t tiles = tiles_for(theta.size(0), z.size(0));
  auto sums = at::zeros({theta.size(0), tiles, 5}, z.options().dtype(at::kDouble));
  if (theta.size(0) > 0 && z.size(0) > 0) launch(theta, z, abar, zeta, blocks, {}, sums, tiles);
  return finish_moments(sums, z.size(0), correction);
}

}  // namespace

TORCH_LIBRARY_IMPL(neon_ext, CUDA, m) {
  m.impl("mlp_ddim", mlp_ddim_cuda);
  m.impl("mlp_ddim_moments", mlp_ddim_moments_cuda);
}

}  // namespace neon
