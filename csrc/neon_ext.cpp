// Schemas and the Python module. Kernels register themselves per device in their own files.
#include "neon_ext.h"

#include <torch/extension.h>
#include <torch/library.h>

TORCH_LIBRARY(neon_ext, m) {
  m.def(
      "extrapolate(Tensor[] theta_r, Tensor[] theta_s, int[] block, float[] w, ScalarType? dtype=None) -> Tensor[]");
  m.def(
      "extrapolate_out(Tensor[] theta_r, Tensor[] theta_s, int[] block, float[] w, Tensor(a!)[] out) -> ()");
  m.def("extrapolate_grid(Tensor theta_r, Tensor theta_s, int[] block_offsets, Tensor W) -> Tensor");
  m.def("mlp_ddim(Tensor theta, Tensor z, Tensor abar, float zeta=1.0) -> Tensor");
  m.def(
      "mlp_ddim_moments(Tensor theta, Tensor z, Tensor abar, float zeta=1.0, int correction=0) -> (Tensor, Tensor)");
  m.def("sqrtm(Tensor A) -> Tensor");
  m.def("frechet_distance(Tensor mu1, Tensor cov1, Tensor mu2, Tensor cov2) -> Tensor");
  m.def("frechet_distance_backward(Tensor grad, Tensor cov1, Tensor cov2) -> (Tensor, Tensor)");
  m.def("trace_norm(Tensor B, str method='auto') -> Tensor");
  m.def("feature_moments(Tensor features) -> (Tensor, Tensor)");
}

namespace {

namespace py = pybind11;
using at::Tensor;
using TensorVector = std::vector<Tensor>;

// Calls the registered operator, so that dispatch (device, fake tensors, autograd) is the same as
// torch.ops.neon_ext.*
template <typename Signature, typename... Args>
auto call(const char* name, Args&&... args) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>().call(
      std::forward<Args>(args)...);
}

TensorVector extrapolate(const TensorVector& theta_r, const TensorVector& theta_s,
                         const std::vector<int64_t>& block, const std::vector<double>& w,
                         std::optional<TensorVector> out, std::optional<at::ScalarType> dtype) {
  at::NoGradGuard no_grad;  // repairs weights in place of training them: parameters may require grad
  if (theta_r.empty() && theta_s.empty() && block.empty()) return {};  // no tensor to dispatch on
  if (!out)
    return call<TensorVector(at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>,
                             std::optional<at::ScalarType>)>("neon_ext::extrapolate", theta_r, theta_s, block,
                                                             w, dtype);
  TORCH_CHECK_VALUE(!dtype, "extrapolate: give either out or dtype, not both");
  call<void(at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>, at::TensorList)>(
      "neon_ext::extrapolate_out", theta_r, theta_s, block, w, *out);
  for (const auto& t : *out) t.unsafeGetTensorImpl()->bump_version();
  return *out;
}

Tensor extrapolate_grid(const Tensor& theta_r, const Tensor& theta_s,
                        const std::vector<int64_t>& block_offsets, const Tensor& w) {
  at::NoGradGuard no_grad;
  return call<Tensor(const Tensor&, const Tensor&, at::IntArrayRef, const Tensor&)>(
      "neon_ext::extrapolate_grid", theta_r, theta_s, block_offsets, w);
}

Tensor mlp_ddim(const Tensor& theta, const Tensor& z, const Tensor& abar, double zeta) {
  at::NoGradGuard no_grad;
  return call<Tensor(const Tensor&, const Tensor&, const Tensor&, double)>("neon_ext::mlp_ddim", theta, z,
                                                                           abar, zeta);
}

std::tuple<Tensor, Tensor> mlp_ddim_moments(const Tensor& theta, const Tensor& z, const Tensor& abar,
                                            double zeta, int64_t correction) {
  at::NoGradGuard no_grad;
  return call<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double, int64_t)>(
      "neon_ext::mlp_ddim_moments", theta, z, abar, zeta, correction);
}

Tensor sqrtm(const Tensor& a) { return call<Tensor(const Tensor&)>("neon_ext::sqrtm", a); }

Tensor frechet_distance(const Tensor& mu1, const Tensor& cov1, const Tensor& mu2, const Tensor& cov2) {
  return call<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
      "neon_ext::frechet_distance", mu1, cov1, mu2, cov2);
}

Tensor trace_norm(const Tensor& b, const std::string& method) {
  return call<Tensor(const Tensor&, c10::string_view)>("neon_ext::trace_norm", b, method);
}

std::tuple<Tensor, Tensor> feature_moments(const Tensor& features) {
  return call<std::tuple<Tensor, Tensor>(const Tensor&)>("neon_ext::feature_moments", features);
}

py::dict build_config() {
  py::dict config;
  config["torch_version"] = TORCH_VERSION;
  config["compiler"] = __VERSION__;
#ifdef NEON_WITH_CUDA
  config["cuda"] = true;
#else
  config["cuda"] = false;
#endif
#if NEON_X86
  config["cpu_kernels"] = __builtin_cpu_supports("avx512f") ? "avx512"
                          : __builtin_cpu_supports("avx2")  ? "avx2"
                                                            : "sse2";
#else
  config["cpu_kernels"] = "generic";
#endif
  return config;
}

}  // namespace

PYBIND11_MODULE(neon_ext, m) {
  using py::arg;
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() =
      "Compiled operations of Adaptive NEON, on CPU and (where built) CUDA; `import torch` first.\n\n"
      "theta = theta_r - w_block * (theta_s - theta_r), w > 0 away from collapse, w < 0 towards it.\n"
      "The same operations are registered as torch.ops.neon_ext.* with fake kernels. Bad input raises ValueError.";
  m.def(
      "extrapolate", &extrapolate, arg("theta_r"), arg("theta_s"), arg("block"), arg("w"),
      arg("out") = py::none(), arg("dtype") = py::none(), release(),
      R"(out[i] = theta_r[i] - w[block[i]] * (theta_s[i] - theta_r[i]) for lists of tensors, in one pass over memory.

theta_r, theta_s: lists of equally shaped tensors, float32 / float64 / bfloat16 / float16; integer and bool tensors are
copied from theta_r. block: one int per tensor, an index into w. w: one float per block. out: tensors to write (fp32,
bf16 or fp16; may be theta_r or theta_s themselves), or dtype for fresh ones (default: theta_r's).
Arithmetic is float32 (float64 for float64 inputs) with one rounding to the output dtype. Where w = 0 or
theta_s == theta_r the result is theta_r bit for bit. Not differentiable. Returns the list of outputs.)");
  m.def("extrapolate_grid", &extrapolate_grid, arg("theta_r"), arg("theta_s"), arg("block_offsets"), arg("W"),
        release(),
        R"(G extrapolations of one small network: theta_r, theta_s [P] float32, W [G, B] -> [G, P] float32.

block_offsets: B + 1 ascending ints from 0 to P; block b owns the parameters block_offsets[b] : block_offsets[b + 1].)");
  m.def(
      "mlp_ddim", &mlp_ddim, arg("theta"), arg("z"), arg("abar"), arg("zeta") = 1.0, release(),
      R"(Deterministic DDIM samples (arXiv 2010.02502) of G small networks: [G, P], [N, 2] -> [G, N, 2] float32.

theta: float32 parameters in parameters_to_vector order: input layer 3 -> 32 without activation, hidden blocks 32 -> 32
each followed by ReLU, output 32 -> 2; the number of blocks follows from P (4 blocks: P = 4418). z: starting points.
abar [T]: cumulative noise schedule, abar[0] the clean end, each in (0, 1]. zeta scales the score; the time feature is
t / (T - 1). x0 = (x - sqrt(1 - abar_t) zeta eps) / sqrt(abar_t), x <- sqrt(abar_t-1) x0 + sqrt(1 - abar_t-1) eps.)");
  m.def("mlp_ddim_moments", &mlp_ddim_moments, arg("theta"), arg("z"), arg("abar"), arg("zeta") = 1.0,
        arg("correction") = 0, release(),
        R"(Mean [G, 2] and covariance [G, 2, 2], float64, of mlp_ddim's samples, which are never stored.

correction: the covariance is divided by N - correction (0 for quadrature points, 1 for the unbiased sample estimate).
float64 sums over fixed chunks: the result does not depend on the number of threads.)");
  m.def(
      "sqrtm", &sqrtm, arg("A"), release(),
      R"(Symmetric positive semi-definite square root: A [..., D, D] -> [..., D, D] float64. Singular A is fine.

Symmetric eigendecomposition, no complex numbers and no regularisation. Eigenvalues that are negative by rounding count
as zero; non-finite, asymmetric or truly indefinite input raises ValueError saying by how much.)");
  m.def(
      "frechet_distance", &frechet_distance, arg("mu1"), arg("cov1"), arg("mu2"), arg("cov2"), release(),
      R"(|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), float64, for mu [..., D] and cov [..., D, D].

Batch dimensions broadcast; returns a 0-d tensor without them. The trace of the root is the sum of singular values of
L1^T L2 for factors cov_i = L_i L_i^T: never imaginary, correct for singular covariances, nothing added to the diagonal.
Differentiable once: d/dcov2 = I - R (R cov2 R)^(-1/2) R with R = cov1^(1/2), the pseudo-inverse on the numerical null
space. Non-finite, asymmetric or indefinite input beyond rounding raises ValueError saying by how much.)");
  m.def("trace_norm", &trace_norm, arg("B"), arg("method") = "auto", release(),
        R"(Sum of singular values of B [M, N] float64 (batches: [..., M, N]) -> 0-d (or [...]) float64.

method: 'svd' (always accurate), 'gram' (eigenvalues of B B^T: fastest on CPU, loses singular values below 1e-8 of the
largest), 'polar' (matrix products only: for CUDA; loses those below 1e-12), 'auto' (what the Fréchet distance uses:
gram where a bound proves it accurate to 1e-10, else svd; polar on CUDA). Not differentiable.)");
  m.def("feature_moments", &feature_moments, arg("features"), release(),
        "Mean [D] and unbiased covariance [D, D], float64, of features [N, D] with N >= 2; differentiable.");

  using neon::FrechetReference;
  py::class_<FrechetReference>(
      m, "FrechetReference",
      "One side of many Fréchet distances: the factor of its covariance is computed once.")
      .def(py::init<const Tensor&, const Tensor&, std::optional<int64_t>>(), arg("mu"), arg("cov"),
           arg("count") = py::none(), release(),
           "mu [D], cov [D, D]; count: how many features they come from.")
      .def("distance", &FrechetReference::distance, arg("mu"), arg("cov"), release(),
           "Distance to mu [D], cov [D, D] -> 0-d float64; differentiable in both.")
      .def(
          "distance_from_features", &FrechetReference::distance_from_features, arg("features"), release(),
          "Distance to the moments of features [N, D], N >= 2. For N <= D an (N - 1)-dimensional problem is solved.")
      .def(
          "certificate", &FrechetReference::certificate, arg("mu"), arg("cov"), arg("count") = py::none(),
          release(),
          "dict: distance, mean_term, cov_term, dimension; for both sides (suffix _ref: this one) numerical rank, mass\n"
          "clipped from negative eigenvalues, and n_over_d where the count is known (below 1: the covariance is singular).")
      .def_readonly("mu", &FrechetReference::mu_)
      .def_readonly("cov", &FrechetReference::cov_);

  using neon::Moments;
  const char* folds_doc = "folds: which folds to combine (default: all), e.g. all but one for a jackknife.";
  py::class_<Moments>(
      m, "Moments",
      "Running mean and covariance of features in K folds; shifted float64 sums, one batch in memory.\n"
      "Merging and batch splits change nothing beyond rounding (1e-12 relative).")
      .def(py::init([](int64_t dim, int64_t folds, const py::object& device) {
             return Moments(dim, folds, at::Device(py::str(device).cast<std::string>()));
           }),
           arg("dim"), arg("folds") = 1, arg("device") = "cpu")
      .def("update", &Moments::update, arg("features"), arg("fold") = 0, release(),
           "Add features [N, D] (fp32, fp16, bf16 or fp64, on this device) to one fold.")
      .def("merge", &Moments::merge, arg("other"), release(),
           "Add another's sums, fold by fold (another rank or run).")
      .def("count", &Moments::count, arg("folds") = py::none(), folds_doc)
      .def("mean", &Moments::mean, arg("folds") = py::none(), release(), folds_doc)
      .def("cov", &Moments::cov, arg("folds") = py::none(), release(), folds_doc)
      .def("state_dict", &Moments::state_dict,
           "count [K], sum [K, D], outer [K, D, D], shift [D] as tensors.")
      .def("load_state_dict", &Moments::load_state_dict, arg("state"));
  m.def("build_config", &build_config,
        "How this module was built: compiler, torch, CUDA, CPU instruction set in use.");
}
