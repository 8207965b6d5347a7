// Schemas, threads and the Python module. Kernels register themselves per device in their own
// files.
#include "neon_ext.h"

#include <ATen/TensorIterator.h>
#include <ATen/Version.h>
#include <torch/extension.h>

#if ADAPTIVE_X86
#include <cpuid.h>
#endif

#ifndef ADAPTIVE_CUDA
#define ADAPTIVE_CUDA 0
#endif
// setup.py gives the version as bare characters: quotes would not survive every build tool.
#ifndef ADAPTIVE_VERSION
#define ADAPTIVE_VERSION unknown
#endif
#define ADAPTIVE_TEXT_OF(x) #x
#define ADAPTIVE_TEXT(x) ADAPTIVE_TEXT_OF(x)

TORCH_LIBRARY(neon_ext, m) {
  m.def(
      "extrapolate(Tensor[] theta_r, Tensor[] theta_s, int[] block, float[] w, ScalarType? "
      "dtype=None) -> "
      "Tensor[]");
  m.def(
      "extrapolate_out(Tensor[] theta_r, Tensor[] theta_s, int[] block, float[] w, Tensor(a!)[] "
      "out) -> ()");
  m.def(
      "extrapolate_grid(Tensor theta_r, Tensor theta_s, int[] block_offsets, Tensor W) -> Tensor");
  m.def("mlp_ddim(Tensor theta, Tensor z, Tensor abar, float zeta=1.0) -> Tensor");
  m.def(
      "mlp_ddim_moments(Tensor theta, Tensor z, Tensor abar, float zeta=1.0, int correction=0) -> "
      "(Tensor, "
      "Tensor)");
  m.def("sqrtm(Tensor A) -> Tensor");
  m.def("frechet_distance(Tensor mu1, Tensor cov1, Tensor mu2, Tensor cov2) -> Tensor");
  m.def("frechet_distance_backward(Tensor grad, Tensor cov1, Tensor cov2) -> (Tensor, Tensor)");
  m.def("feature_moments(Tensor features) -> (Tensor, Tensor)");
}

namespace neon {

void bind_statistics(pybind11::module_& m);

// torch's own choice, which ATEN_CPU_CAPABILITY can lower. Its AVX2 does not include F16C, which is
// leaf 1's bit 29.
Isa isa() {
  static const Isa chosen = [] {
    Isa found = Isa::kBaseline;
#if ADAPTIVE_X86
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
    const std::string capability = at::get_cpu_capability();
    if (f16c && (capability == "AVX2" || capability.rfind("AVX512", 0) == 0)) {
      found = capability == "AVX2" ? Isa::kAvx2 : Isa::kAvx512;
    }
#endif
    return found;
  }();
  return chosen;
}

// at::parallel_for would be serial here without OpenMP, and a second OpenMP runtime ignores torch's
// setting. An iterator's loop runs inside torch's library: one over as many bytes as there are
// parts hands out their numbers.
void parallel(int64_t n, int64_t grain, c10::function_ref<void(int64_t, int64_t)> body) {
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), (n + grain - 1) / grain);
  if (parts <= 1) {
    body(0, n);
    return;
  }
  const auto numbers = at::empty({parts}, at::TensorOptions().dtype(at::kByte).device(at::kCPU));
  const char* first = static_cast<const char*>(numbers.const_data_ptr());
  auto iterator = at::TensorIterator::borrowing_nullary_op(numbers);
  const auto part = [&](char** data, const int64_t* strides, int64_t inner, int64_t outer) {
    for (int64_t k = 0; k < inner * outer; ++k) {
      const int64_t i = data[0] + k / inner * strides[1] + k % inner * strides[0] - first;
      body(n * i / parts, n * (i + 1) / parts);
    }
  };
  iterator.for_each(part, 1);
}

}  // namespace neon

namespace {

namespace py = pybind11;
using at::Tensor;
using TensorPair = std::tuple<Tensor, Tensor>;
using TensorVector = std::vector<Tensor>;
using In = const Tensor&;

// The registered operator as a Python function; without kGrad, what it returns carries no history.
template <bool kGrad, typename R, typename... Args>
auto python(const std::string& name) {
  return [handle = neon::op<R(Args...)>(("neon_ext::" + name).c_str())](Args... args) -> R {
    const c10::AutoGradMode mode(kGrad && at::GradMode::is_enabled());
    return handle.call(std::forward<Args>(args)...);
  };
}

TensorVector extrapolate(const TensorVector& theta_r, const TensorVector& theta_s,
                         const std::vector<int64_t>& block, const std::vector<double>& w,
                         std::optional<TensorVector> out, std::optional<at::ScalarType> dtype) {
  using Fresh = TensorVector(at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>,
                             std::optional<at::ScalarType>);
  using Into =
      void(at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>, at::TensorList);
  const at::NoGradGuard
      no_grad;  // repairs weights in place of training them: parameters may require grad
  if (theta_r.empty() && theta_s.empty() && block.empty()) {
    return {};  // no tensor to dispatch on
  }
  if (!out) {
    return neon::op<Fresh>("neon_ext::extrapolate").call(theta_r, theta_s, block, w, dtype);
  }
  TORCH_CHECK_VALUE(!dtype, "extrapolate: give either out or dtype, not both");
  neon::op<Into>("neon_ext::extrapolate_out").call(theta_r, theta_s, block, w, *out);
  return *out;
}

py::dict build_config() {
  const std::array<const char*, 3> names{ADAPTIVE_X86 ? "sse2" : "generic", "avx2", "avx512"};
  const char* kernels = names[static_cast<size_t>(neon::isa())];
  return py::dict(py::arg("torch_version") = TORCH_VERSION, py::arg("compiler") = __VERSION__,
                  py::arg("cuda") = static_cast<bool>(ADAPTIVE_CUDA),
                  py::arg("cpu_kernels") = kernels);
}

}  // namespace

PYBIND11_MODULE(neon_ext, m) {
  using py::arg;
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() =
      "Compiled operations of Adaptive NEON, on CPU and (where built) CUDA; `import torch` "
      "first.\n\n"
      "theta = theta_r - w_block * (theta_s - theta_r), w > 0 away from collapse, w < 0 towards "
      "it.\n"
      "The same operations are registered as torch.ops.neon_ext.* with fake kernels. Bad input "
      "raises "
      "ValueError.";
  m.def(
      "extrapolate", &extrapolate, arg("theta_r"), arg("theta_s"), arg("block"), arg("w"),
      arg("out") = py::none(), arg("dtype") = py::none(), release(),
      R"(out[i] = theta_r[i] - w[block[i]] * (theta_s[i] - theta_r[i]) for lists of tensors, in one pass over
memory.

theta_r, theta_s: lists of equally shaped tensors, float32 / float64 / bfloat16 / float16; integer and bool
tensors are copied from theta_r. block: one int per tensor, an index into w. w: one float per block. out:
tensors to write (fp32, bf16 or fp16; may be theta_r or theta_s themselves), or dtype for fresh ones
(default: theta_r's). Arithmetic is float32 (float64 for float64 inputs) with one rounding to the output
dtype. Where w = 0 or theta_s == theta_r the result is theta_r bit for bit. Not differentiable. Returns the
list of outputs.)");
  m.def(
      "extrapolate_grid", python<false, Tensor, In, In, at::IntArrayRef, In>("extrapolate_grid"),
      arg("theta_r"), arg("theta_s"), arg("block_offsets"), arg("W"), release(),
      R"(G extrapolations of one small network: theta_r, theta_s [P] float32, W [G, B] -> [G, P] float32.

block_offsets: B + 1 ascending ints from 0 to P; block b owns the parameters block_offsets[b] :
block_offsets[b + 1].)");
  m.def(
      "mlp_ddim", python<false, Tensor, In, In, In, double>("mlp_ddim"), arg("theta"), arg("z"),
      arg("abar"), arg("zeta") = 1.0, release(),
      R"(Deterministic DDIM samples (arXiv 2010.02502) of G small networks: [G, P], [N, 2] -> [G, N, 2]
float32.

theta: float32 parameters in parameters_to_vector order: input layer 3 -> 32 without activation, hidden
blocks 32 -> 32 each followed by ReLU, output 32 -> 2; the number of blocks follows from P (4 blocks: P =
4418). z: starting points. abar [T]: cumulative noise schedule, abar[0] the clean end, each in (0, 1]. zeta
scales the score; the time feature is t / (T - 1). x0 = (x - sqrt(1 - abar_t) zeta eps) / sqrt(abar_t), x
<- sqrt(abar_t-1) x0 + sqrt(1 - abar_t-1) eps.)");
  m.def(
      "mlp_ddim_moments",
      python<false, TensorPair, In, In, In, double, int64_t>("mlp_ddim_moments"), arg("theta"),
      arg("z"), arg("abar"), arg("zeta") = 1.0, arg("correction") = 0, release(),
      R"(Mean [G, 2] and covariance [G, 2, 2], float64, of mlp_ddim's samples, which are never stored.

correction: the covariance is divided by N - correction (0 for quadrature points, 1 for the unbiased sample
estimate). float64 sums over fixed chunks: the result does not depend on the number of threads.)");
  m.def(
      "sqrtm", python<false, Tensor, In>("sqrtm"), arg("A"), release(),
      R"(Symmetric positive semi-definite square root: A [..., D, D] -> [..., D, D] float64. Singular A is
fine.

Symmetric eigendecomposition, no complex numbers and no regularisation. Eigenvalues that are negative by
rounding count as zero; non-finite, asymmetric or truly indefinite input raises ValueError saying by how
much.)");
  m.def(
      "frechet_distance", python<true, Tensor, In, In, In, In>("frechet_distance"), arg("mu1"),
      arg("cov1"), arg("mu2"), arg("cov2"), release(),
      R"(|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), float64, for mu [..., D] and cov [..., D, D].

Batch dimensions broadcast; returns a 0-d tensor without them. The trace of the root is the sum of singular
values of L1^T L2 for factors cov_i = L_i L_i^T: never imaginary, correct for singular covariances, nothing
added to the diagonal. Differentiable once: d/dcov2 = I - R (R cov2 R)^(-1/2) R with R = cov1^(1/2), the
pseudo-inverse on the numerical null space. Non-finite, asymmetric or indefinite input beyond rounding
raises ValueError saying by how much.)");
  m.def("feature_moments", python<true, TensorPair, In>("feature_moments"), arg("features"),
        release(),
        "Mean [D] and unbiased covariance [D, D], float64, of features [N, D] with N >= 2; "
        "differentiable.");

  neon::bind_statistics(m);
  m.attr("__version__") = ADAPTIVE_TEXT(ADAPTIVE_VERSION);
  m.def("build_config", &build_config,
        "How this module was built: compiler, torch, CUDA, CPU instruction set in use.");
}
