// The toy's network through a whole DDIM trajectory on CUDA. Weights lie in shared memory and are
// read as broadcasts; each thread carries kEach trajectories with all activations in registers, so
// that one 16-byte weight load feeds 4 * kEach multiply-adds. Float32 arithmetic, float64 moments
// reduced in a fixed order. Work per sample and network call: 8,512 floating-point operations, no
// device-memory traffic.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <cstdlib>
#include <string>

#include "neon_ext.h"

namespace neon {
namespace {

constexpr int kThreads = 128;
// kEach trajectories a thread: with 2 (168 registers) more threads are resident, with 3 (246, none
// spilled) each weight that is read serves more of them. Which is faster has not been timed:
// ADAPTIVE_DDIM_EACH=3 chooses.
int trajectories_per_thread() {
  static const bool three = [] {
    const char* chosen = std::getenv("ADAPTIVE_DDIM_EACH");
    return chosen && std::string(chosen) == "3";
  }();
  return three ? 3 : 2;
}

// In shared memory each layer's weights are transposed to [in, out], followed by the biases.
__device__ void load_layer(float* net, const float* theta, int at, int in, int out) {
  for (int i = threadIdx.x; i < in * out; i += kThreads) {
    net[at + i % in * out + i / in] = theta[at + i];
  }
  for (int i = in * out + threadIdx.x; i < in * out + out; i += kThreads) {
    net[at + i] = theta[at + i];
  }
}

// Sums v over the block in a fixed order; the result is valid in thread 0.
__device__ double block_sum(double v, double* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) {
    v += __shfl_down_sync(0xffffffff, v, offset);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = v;
  }
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kThreads / 32; ++i) {
      total += scratch[i];
    }
  }
  return total;
}

// blockIdx.y (and its stride) picks the network, blockIdx.x (and its stride) the chunk of samples.
template <int kEach>
__global__ void __launch_bounds__(kThreads)
    ddim_kernel(const float* theta,  // [networks, P]
                const float2* z,     // [n]
                float2* samples,     // [networks, n] or null
                double* sums,        // [networks, chunks, 5] or null
                int64_t networks, int64_t n, int64_t chunks, int blocks,
                const DdimStep* steps,  // [n_steps]
                int n_steps) {
  extern __shared__ __align__(16) float net[];
  __shared__ double scratch[kThreads / 32];
  for (int64_t g = blockIdx.y; g < networks; g += gridDim.y) {
    __syncthreads();  // the previous network is still being read
    const float* p = theta + g * (kOuter + blocks * kHidden);
    load_layer(net, p, 0, 3, kWidth);
    for (int l = 0; l < blocks; ++l) {
      load_layer(net, p, kFirst + l * kHidden, kWidth, kWidth);
    }
    load_layer(net, p, kFirst + blocks * kHidden, kWidth, 2);
    __syncthreads();
    for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
      const int64_t end = min(n, (chunk + 1) * kSamples);
      double sum[5] = {};
      for (int64_t first = chunk * kSamples; first < end; first += kThreads * kEach) {
        float x[3][kEach] = {};
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
          const int64_t j = first + k * kThreads + threadIdx.x;
          if (j < end) {
            x[0][k] = z[j].x;
            x[1][k] = z[j].y;
          }
        }
        for (int t = 0; t < n_steps; ++t) {
          ddim_step<float, kEach>(net, blocks, steps[t], x);
        }
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
          const int64_t j = first + k * kThreads + threadIdx.x;
          if (j >= end) {
            continue;
          }
          if (samples) {
            samples[g * n + j] = make_float2(x[0][k], x[1][k]);
          }
          const double a = x[0][k], b = x[1][k];
          const double terms[] = {a, b, a * a, a * b, b * b};
#pragma unroll
          for (int m = 0; m < 5; ++m) {
            sum[m] += terms[m];
          }
        }
      }
      for (int m = 0; sums && m < 5; ++m) {
        const double total = block_sum(sum[m], scratch);
        if (threadIdx.x == 0) {
          sums[(g * chunks + chunk) * 5 + m] = total;
        }
      }
    }
  }
}

void mlp_ddim_cuda(const Tensor& theta,  // [G, P]
                   const Tensor& z,      // [N, 2]
                   const std::vector<DdimStep>& steps,
                   float* samples,  // [G, N, 2] or null
                   double* sums) {  // [G, chunks, 5] or null
  if (theta.size(0) == 0 || z.size(0) == 0) {
    return;
  }
  const c10::cuda::CUDAGuard guard(theta.device());
  const auto n_steps = static_cast<int64_t>(steps.size());
  const auto options = at::TensorOptions().dtype(at::kFloat);
  const auto table =
      at::from_blob(const_cast<DdimStep*>(steps.data()), {n_steps, 3}, options).to(theta.device());
  const int64_t networks = theta.size(0), n = z.size(0), chunks = (n + kSamples - 1) / kSamples;
  const int64_t bytes = theta.size(1) * static_cast<int64_t>(sizeof(float));
  const auto limit =
      static_cast<int64_t>(at::cuda::getCurrentDeviceProperties()->sharedMemPerBlockOptin);
  TORCH_CHECK_VALUE(bytes + 64 <= limit, "mlp_ddim: ", theta.size(1), " parameters need ", bytes,
                    " bytes of shared memory, this GPU has ", limit);
  const auto shared = static_cast<int>(bytes),
             blocks = static_cast<int>((theta.size(1) - kOuter) / kHidden);
  const auto kernel = trajectories_per_thread() == 3 ? ddim_kernel<3> : ddim_kernel<2>;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  // float2 loads want 8-byte alignment, which a sliced z may lack
  const bool aligned = reinterpret_cast<uintptr_t>(z.const_data_ptr()) % sizeof(float2) == 0;
  const auto start = aligned ? z : z.clone();
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(chunks, INT32_MAX)),
                  static_cast<unsigned>(std::min<int64_t>(networks, 65535)));
  kernel<<<grid, kThreads, shared, at::cuda::getCurrentCUDAStream()>>>(
      theta.const_data_ptr<float>(), reinterpret_cast<const float2*>(start.const_data_ptr<float>()),
      reinterpret_cast<float2*>(samples), sums, networks, n, chunks, blocks,
      reinterpret_cast<const DdimStep*>(table.const_data_ptr<float>()), static_cast<int>(n_steps));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(neon_ext, CUDA, m) {
  m.impl("mlp_ddim", mlp_ddim<mlp_ddim_cuda>);
  m.impl("mlp_ddim_moments", mlp_ddim_moments<mlp_ddim_cuda>);
}

}  // namespace neon
