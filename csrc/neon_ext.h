// Shared declarations of neon_ext. theta = theta_r - w_block * (theta_s - theta_r), w > 0 away from collapse.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

// GCC and clang can compile one function for several instruction sets; elsewhere (arm64, musl, macOS) one is
// enough.
#if defined(__x86_64__) && defined(__GNUC__)
#define NEON_X86 1
#define NEON_TARGET(isa) __attribute__((target(isa)))
#else
#define NEON_X86 0
#define NEON_TARGET(isa)
#endif
#define NEON_INLINE inline __attribute__((always_inline))

namespace neon {

// body(begin, end) over [0, n) in at most torch.get_num_threads() threads, at least `grain` items each; body must not
// throw. at::parallel_for would be serial here without OpenMP, and a second OpenMP runtime ignores torch's setting.
template <typename Body>
void parallel(int64_t n, int64_t grain, const Body& body) {
  const int64_t most = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t threads = std::max<int64_t>(1, std::min(most, (n + grain - 1) / grain));
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(body, n * i / threads, n * (i + 1) / threads);
  body(0, n / threads);
  for (auto& thread : others) thread.join();
}

// ---------------------------------------------------------------- extrapolation (extrapolate.cpp,
// extrapolate_cuda.cu)

// One flat run of elements: out[i] = r[i] - w * (s[i] - r[i]), or out[i] = r[i] when `copy` (integers, w =
// 0).
struct Run {
  const void* r;
  const void* s;
  void* out;
  int64_t numel;
  double w;
  at::ScalarType in_type;
  at::ScalarType out_type;
};

// Checks the lists, allocates nothing; the tensors that cannot be treated as flat memory are made contiguous
// into `keep`, and `write_back` lists the (temporary, destination) pairs to copy when the kernels are done.
struct Plan {
  std::vector<Run> runs;
  std::vector<at::Tensor> keep;
  std::vector<std::pair<at::Tensor, at::Tensor>> write_back;
};
Plan plan_extrapolate(at::TensorList theta_r, at::TensorList theta_s, at::IntArrayRef block,
                      at::ArrayRef<double> w, at::TensorList out);
std::vector<at::Tensor> extrapolate_outputs(at::TensorList theta_r, std::optional<at::ScalarType> dtype);
std::string describe(const at::Tensor& t);  // dtype, shape and device, for error messages

// ---------------------------------------------------------------- toy sampler (mlp_ddim.cpp,
// mlp_ddim_cuda.cu)

constexpr int kWidth = 32;                                        // hidden width of the toy's network
constexpr int64_t kHidden = kWidth * kWidth + kWidth;             // parameters of one hidden block
constexpr int64_t kOuter = 3 * kWidth + kWidth + 2 * kWidth + 2;  // input and output layers together

// x <- a x + b eps(x, t), t = time feature in [0, 1]: one DDIM step (arXiv 2010.02502, eq. 12) with scaled
// score.
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

// ---------------------------------------------------------------- Fréchet distance (frechet.cpp)

at::Tensor trace_of(const at::Tensor& cov);  // [..., D, D] -> [...]

// One side of many distances: its factor is computed once.
class FrechetReference {
 public:
  FrechetReference(const at::Tensor& mu, const at::Tensor& cov, std::optional<int64_t> count);
  at::Tensor distance(const at::Tensor& mu, const at::Tensor& cov) const;
  at::Tensor distance_from_features(const at::Tensor& features) const;
  std::map<std::string, double> certificate(const at::Tensor& mu, const at::Tensor& cov,
                                            std::optional<int64_t> count) const;
  at::Tensor mu_, cov_;

 private:
  at::Tensor factor_;  // [D, R], cov = factor factor^T
  std::optional<int64_t> count_;
  double negative_tolerance_;
};

// ---------------------------------------------------------------- moments (moments.cpp)

class Moments {
 public:
  using Folds = std::optional<std::vector<int64_t>>;
  Moments(int64_t dim, int64_t folds, at::Device device);
  void update(const at::Tensor& features, int64_t fold);
  void merge(const Moments& other);
  int64_t count(const Folds& folds) const;
  at::Tensor mean(const Folds& folds) const;
  at::Tensor cov(const Folds& folds) const;
  std::map<std::string, at::Tensor> state_dict() const;
  void load_state_dict(const std::map<std::string, at::Tensor>& state);

 private:
  void check_fold(int64_t fold) const;
  std::vector<int64_t> chosen(const Folds& folds) const;
  at::Tensor shifted_mean(const Folds& folds, int64_t at_least) const;

  int64_t dim_;
  std::vector<int64_t> count_;  // per fold
  at::Tensor sum_;              // [K, D] float64
  at::Tensor outer_;            // [K, D, D] float64
  at::Tensor shift_;            // [D] float64, undefined until the first features come
};

}  // namespace neon
