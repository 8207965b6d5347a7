// Shared declarations of neon_ext. theta = theta_r - w_block * (theta_s - theta_r), w > 0 away from collapse.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

// GCC and clang can compile one function for several instruction sets; elsewhere (arm64, musl, macOS) one is enough.
#if defined(__x86_64__) && defined(__GNUC__)
#define NEON_X86 1
#define NEON_TARGET(isa) __attribute__((target(isa)))
#else
#define NEON_X86 0
#define NEON_TARGET(isa)
#endif
#define NEON_INLINE inline __attribute__((always_inline))

namespace neon {

// ---------------------------------------------------------------- extrapolation (extrapolate.cpp, extrapolate_cuda.cu)

// One flat run of elements: out[i] = r[i] - w * (s[i] - r[i]), or out[i] = r[i] when `copy` (integers, w = 0).
struct Run {
  const void* r;
  const void* s;
  void* out;
  int64_t numel;
  double w;
  at::ScalarType in_type;
  at::ScalarType out_type;
};

// Checks the lists, allocates nothing; the tensors that cannot be treated as flat memory are made contiguous into
// `keep`, and `write_back` lists the (temporary, destination) pairs to copy when the kernels are done.
struct Plan {
  std::vector<Run> runs;
  std::vector<at::Tensor> keep;
  std::vector<std::pair<at::Tensor, at::Tensor>> write_back;
};
Plan plan_extrapolate(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block, at::ArrayRef<double> w,
                      at::TensorList out);
std::vector<at::Tensor> extrapolate_outputs(at::TensorList theta_r, std::optional<at::ScalarType> dtype);
void check_extrapolate_grid(const at::Tensor& theta_r, const at::Tensor& theta_s, at::IntArrayRef block_offsets,
                            const at::Tensor& w);

// ---------------------------------------------------------------- toy sampler (mlp_ddim.cpp, mlp_ddim_cuda.cu)

constexpr int kWidth = 32;                                    // hidden width of the toy's network
constexpr int64_t kHidden = kWidth * kWidth + kWidth;         // parameters of one hidden block
constexpr int64_t kOuter = 3 * kWidth + kWidth + 2 * kWidth + 2;  // input and output layers together

// x <- a x + b eps(x, t), t = time feature in [0, 1]: one DDIM step (arXiv 2010.02502, eq. 12) with scaled score.
struct DdimStep {
  float a;
  float b;
  float t;
};
std::vector<DdimStep> ddim_steps(const at::Tensor& abar, double zeta);
// Returns the number of hidden blocks, from P.
int64_t check_mlp_ddim(const at::Tensor& theta, const at::Tensor& z, const at::Tensor& abar);
// sums [G, chunks, 5] float64 (x, y, xx, xy, yy) -> mean [G, 2], cov [G, 2, 2]
std::tuple<at::Tensor, at::Tensor> finish_moments(const at::Tensor& sums, int64_t n, int64_t correction);

}  // namespace neon
