// Block-wise extrapolation on CUDA: one launch for up to kMaxRuns tensors, 16-byte accesses, no temporary
// memory. Bytes moved: theta_r and theta_s once, out once, which is the least there is; the kernel is bound
// by them.
#include "neon_ext.h"

#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>

namespace neon {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;    // 16-byte loads of theta_r and theta_s in flight per thread
constexpr int kChunk = 8192;  // elements per thread block
constexpr int kMaxRuns =
    640;  // 40 bytes each: fits the 32,764 bytes of kernel parameters (CUDA 12.1, sm_70 and up)

struct Entry {
  const void* r;
  const void* s;
  void* out;
  int64_t numel;
  float w;
  int first_chunk;  // chunks of the entries before this one
};
struct Table {
  Entry entry[kMaxRuns];
  int entries;
};
static_assert(sizeof(Table) <= 32764, "kernel parameters");

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  T v[N];
};

template <typename In, typename Out>
__device__ __forceinline__ Out moved(In r, In s, float w) {
  using acc_t = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const acc_t a = static_cast<acc_t>(r), b = static_cast<acc_t>(s);
  return static_cast<Out>(b == a ? a : a - static_cast<acc_t>(w) * (b - a));  // equal stays bit-equal
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) extrapolate_kernel(const __grid_constant__ Table table) {
  constexpr int N = 16 / sizeof(In);
  int low = 0, high = table.entries - 1;  // the last entry whose first_chunk is not beyond this block
  while (low < high) {
    const int mid = (low + high + 1) / 2;
    if (table.entry[mid].first_chunk <= static_cast<int>(blockIdx.x)) low = mid;
    else high = mid - 1;
  }
  const Entry& e = table.entry[low];
  const int64_t begin = static_cast<int64_t>(static_cast<int>(blockIdx.x) - e.first_chunk) * kChunk;
  const int count = static_cast<int>(min(static_cast<int64_t>(kChunk), e.numel - begin));
  const In* r = static_cast<const In*>(e.r) + begin;
  const In* s =
      e.w == 0 ? r : static_cast<const In*>(e.s) + begin;  // w = 0 must not read theta_s: 0 * inf is NaN
  Out* out = static_cast<Out*>(e.out) + begin;

  const auto address = reinterpret_cast<uintptr_t>(r) | reinterpret_cast<uintptr_t>(s);
  const bool aligned =
      address % sizeof(Vec<In, N>) == 0 && reinterpret_cast<uintptr_t>(out) % alignof(Vec<Out, N>) == 0;
  const int vectors = aligned ? count / N : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads * kUnroll) {
    Vec<In, N> a[kUnroll], b[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (i + u * kThreads < vectors) {
        a[u] = reinterpret_cast<const Vec<In, N>*>(r)[i + u * kThreads];
        b[u] = reinterpret_cast<const Vec<In, N>*>(s)[i + u * kThreads];
      }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (i + u * kThreads < vectors) {
        Vec<Out, N> c;
#pragma unroll
        for (int j = 0; j < N; ++j) c.v[j] = moved<In, Out>(a[u].v[j], b[u].v[j], e.w);
        reinterpret_cast<Vec<Out, N>*>(out)[i + u * kThreads] = c;
      }
  }
  for (int i = vectors * N + threadIdx.x; i < count; i += kThreads) out[i] = moved<In, Out>(r[i], s[i], e.w);
}

void launch(at::ScalarType in, at::ScalarType to, const Table& table, int chunks) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in, "extrapolate", [&] {
    using in_t = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, to, "extrapolate", [&] {
      extrapolate_kernel<in_t, scalar_t><<<chunks, kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(table);
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Runs of one (input, output) dtype pair, split into launches of at most kMaxRuns tensors and 2^31 chunks.
void launch_runs(const std::vector<Run>& runs) {
  Table table{};
  int64_t chunks = 0;
  const auto flush = [&] {
    if (table.entries > 0) launch(runs[0].in_type, runs[0].out_type, table, static_cast<int>(chunks));
    table.entries = 0;
    chunks = 0;
  };
  for (const Run& run : runs) {
    const int64_t need = (run.numel + kChunk - 1) / kChunk;
    if (table.entries == kMaxRuns || chunks + need > INT32_MAX) flush();
    table.entry[table.entries++] = {
        run.r, run.s, run.out, run.numel, static_cast<float>(run.w), static_cast<int>(chunks)};
    chunks += need;
  }
  flush();
}

void extrapolate_out_cuda(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block,
                          at::ArrayRef<double> w, at::TensorList out) {
  if (theta_r.empty()) return;
  const c10::cuda::CUDAGuard guard(theta_r[0].device());
  Plan plan = plan_extrapolate(theta_r, theta_s, block, w, out);
  auto& runs = plan.runs;
  runs.erase(std::remove_if(runs.begin(), runs.end(), [](const Run& run) { return run.numel == 0; }),
             runs.end());
  while (!runs.empty()) {
    const auto in = runs[0].in_type, to = runs[0].out_type;
    const auto rest = std::stable_partition(
        runs.begin(), runs.end(), [&](const Run& run) { return run.in_type == in && run.out_type == to; });
    const std::vector<Run> same(runs.begin(), rest);
    runs.erase(runs.begin(), rest);
    if (at::isIntegralType(in, true)) {
      for (const Run& run : same)
        C10_CUDA_CHECK(cudaMemcpyAsync(run.out, run.r, run.numel * at::elementSize(in),
                                       cudaMemcpyDeviceToDevice, at::cuda::getCurrentCUDAStream()));
    } else {
      launch_runs(same);
    }
  }
  for (auto& [from, to] : plan.write_back) to.copy_(from);
}

std::vector<at::Tensor> extrapolate_cuda(at::TensorList theta_r, at::TensorList theta_s,
                                         at::IntArrayRef block, at::ArrayRef<double> w,
                                         std::optional<at::ScalarType> dtype) {
  auto out = extrapolate_outputs(theta_r, dtype);
  extrapolate_out_cuda(theta_r, theta_s, block, w, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(neon_ext, CUDA, m) {
  m.impl("extrapolate", extrapolate_cuda);
  m.impl("extrapolate_out", extrapolate_out_cuda);
}

}  // namespace neon
