// Block-wise extrapolation on CUDA: one launch for up to kMaxRuns tensors, 16-byte accesses, no
// temporary memory. Bytes moved: theta_r and theta_s once, out once, which is the least there is;
// the kernel is bound by them.
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <map>

#include "neon_ext.h"

namespace neon {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;    // 16-byte loads of theta_r and theta_s in flight per thread
constexpr int kChunk = 8192;  // elements per thread block
constexpr int kMaxRuns = 640;

struct Entry {
  const void *r, *s;
  void* out;
  int64_t numel;
  double w;
  int first_chunk;  // chunks of the entries before this one
};
struct Table {
  Entry entry[kMaxRuns];
  int entries;
};
static_assert(sizeof(Table) <= 32764,
              "kernel parameters hold this much from CUDA 12.1 and sm_70 on");

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  T v[N];
};

// In the inputs' arithmetic: float64 for float64, else float32. Equal stays bit-equal: -0 and
// infinities too.
template <typename Out, typename In>
__device__ __forceinline__ Out extrapolated(In r, In s, double w) {
  using acc_t = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const acc_t a = static_cast<acc_t>(r), b = static_cast<acc_t>(s);
  const acc_t moved = a - static_cast<acc_t>(w) * (b - a);
  return static_cast<Out>(b == a ? a : moved);
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads)
    extrapolate_kernel(const __grid_constant__ Table table) {
  constexpr int N = 16 / sizeof(In);
  int low = 0,
      high = table.entries - 1;  // the last entry whose first_chunk is not beyond this block
  while (low < high) {
    const int mid = (low + high + 1) / 2;
    if (table.entry[mid].first_chunk <= static_cast<int>(blockIdx.x)) {
      low = mid;
    } else {
      high = mid - 1;
    }
  }
  const Entry& e = table.entry[low];
  const int64_t begin = static_cast<int64_t>(static_cast<int>(blockIdx.x) - e.first_chunk) * kChunk;
  const int count = static_cast<int>(min(static_cast<int64_t>(kChunk), e.numel - begin));
  const In* r = static_cast<const In*>(e.r) + begin;
  const In* s = static_cast<const In*>(e.s) + begin;
  Out* out = static_cast<Out*>(e.out) + begin;

  const auto address = reinterpret_cast<uintptr_t>(r) | reinterpret_cast<uintptr_t>(s);
  const bool aligned = address % sizeof(Vec<In, N>) == 0 &&
                       reinterpret_cast<uintptr_t>(out) % alignof(Vec<Out, N>) == 0;
  const int vectors = aligned ? count / N : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads * kUnroll) {
    Vec<In, N> a[kUnroll], b[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * kThreads < vectors) {
        a[u] = reinterpret_cast<const Vec<In, N>*>(r)[i + u * kThreads];
        b[u] = reinterpret_cast<const Vec<In, N>*>(s)[i + u * kThreads];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * kThreads < vectors) {
        Vec<Out, N> c;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          c.v[j] = extrapolated<Out>(a[u].v[j], b[u].v[j], e.w);
        }
        reinterpret_cast<Vec<Out, N>*>(out)[i + u * kThreads] = c;
      }
    }
  }
  for (int i = vectors * N + threadIdx.x; i < count; i += kThreads) {
    out[i] = extrapolated<Out>(r[i], s[i], e.w);
  }
}

void launch(at::ScalarType in, at::ScalarType to, const Table& table, int64_t chunks) {
  const auto stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in, "extrapolate", [&] {
    using in_t = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, to, "extrapolate", [&] {
      extrapolate_kernel<in_t, scalar_t>
          <<<static_cast<unsigned>(chunks), kThreads, 0, stream>>>(table);
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Runs of one (input, output) dtype pair, split into launches of at most kMaxRuns tensors and 2^31
// chunks.
void launch_runs(at::ScalarType in, at::ScalarType to, const std::vector<const Run*>& runs) {
  Table table{};
  int64_t chunks = 0;
  for (const Run* run : runs) {
    const int64_t need = (run->r.numel() + kChunk - 1) / kChunk;
    if (table.entries == kMaxRuns || chunks + need > INT32_MAX) {
      launch(in, to, table, chunks);
      table.entries = 0;
      chunks = 0;
    }
    table.entry[table.entries++] = {run->r.const_data_ptr(),
                                    run->s.const_data_ptr(),
                                    run->out.mutable_data_ptr(),
                                    run->r.numel(),
                                    run->w,
                                    static_cast<int>(chunks)};
    chunks += need;
  }
  launch(in, to, table, chunks);
}

void extrapolate_cuda(const std::vector<Run>& runs) {
  if (runs.empty()) {
    return;
  }
  const c10::cuda::CUDAGuard guard(runs[0].r.device());
  std::map<std::pair<at::ScalarType, at::ScalarType>, std::vector<const Run*>> by_dtype;
  for (const Run& run : runs) {
    if (run.r.numel() > 0) {
      by_dtype[{run.r.scalar_type(), run.out.scalar_type()}].push_back(&run);
    }
  }
  for (const auto& [dtypes, same] : by_dtype) {
    launch_runs(dtypes.first, dtypes.second, same);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(neon_ext, CUDA, m) {
  m.impl("extrapolate_out", extrapolate_out<extrapolate_cuda>);
}

}  // namespace neon
