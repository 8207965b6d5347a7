// Symmetric square roots and the Fréchet distance between Gaussians, in float64 on CPU and CUDA.
//
//   d = |mu1 - mu2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2),   tr (C1 C2)^(1/2) = sum of singular values of
//   L1^T L2
//
// for any factors C = L L^T (Dowson & Landau 1982). Working with factors never takes the square root of a
// rounded eigenvalue: an eigenvalue of C1 C2 that should be 0 and comes out as 1e-16 would add 1e-8 to the
// trace, times the number of null directions. The factors are Cholesky's (fast); a covariance that is
// singular to rounding gets the eigenvectors of its numerical range instead. How the singular values are
// summed is chosen by measurement:
//   gram   eigenvalues of B B^T, accepted only when a bound on its rounding error is below 1e-10 of the trace
//   svd    singular values of B: always accurate, three to four times slower on CPU; also used for small or
//   batched B polar  CUDA: tr U^T B with U the polar factor by minimax polynomials, matrix products only
#include "neon_ext.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <sstream>

namespace neon {
namespace {

using at::Tensor;
constexpr double kEps = 2.220446049250313e-16;
constexpr int64_t kSmall = 128;        // up to here one SVD costs less than the choice between methods
constexpr double kGramAccept = 1e-10;  // relative error of the trace at which the gram method is accepted

struct Eigen {
  Tensor values;   // [..., D] ascending, negative rounding clipped to 0
  Tensor vectors;  // [..., D, D]
};

// Rounding leaves relative asymmetry and negative eigenvalues of about 1e-13 in float64 statistics and 1e-6
// in float32 ones; what is beyond these bounds is not rounding.
double tolerance(at::ScalarType given) { return given == at::kDouble ? 1e-8 : 1e-3; }

Tensor checked(const Tensor& cov, const char* op, const char* name) {
  TORCH_CHECK_VALUE(cov.dim() >= 2 && cov.size(-1) == cov.size(-2), op, ": ", name,
                    " must be [..., D, D], got ", cov.sizes());
  TORCH_CHECK_VALUE(at::isFloatingType(cov.scalar_type()), op, ": ", name, " must be floating point, got ",
                    cov.scalar_type());
  const auto c = cov.to(at::kDouble);
  if (c.numel() == 0) return c;
  const auto facts = at::stack({c.abs().amax(), (c - c.mT()).abs().amax()}).cpu();  // one transfer on CUDA
  const double largest = facts[0].item<double>(), skew = facts[1].item<double>();
  TORCH_CHECK_VALUE(std::isfinite(largest), op, ": ", name, " has entries that are not finite");
  TORCH_CHECK_VALUE(skew <= tolerance(cov.scalar_type()) * largest, op, ": ", name,
                    " is not symmetric: max |", name, " - ", name, "^T| = ", skew, ", largest entry ",
                    largest);
  return skew == 0 ? c : (c + c.mT()) / 2;
}

// Eigenvalues below D * eps * largest are the rounding of zeros: a numerical rank, not a regularisation.
Eigen eigen(const Tensor& cov, double negative_tolerance, const char* op, const char* name) {
  auto [values, vectors] = at::linalg_eigh(cov);
  if (values.numel() == 0) return {values, vectors};
  const auto scale = values.abs().amax(-1, true);
  const double excess = (values / scale.clamp_min(1e-300)).amin().item<double>();
  TORCH_CHECK_VALUE(excess >= -negative_tolerance, op, ": ", name,
                    " is not positive semi-definite: smallest eigenvalue ", excess,
                    " of the largest, beyond rounding (", negative_tolerance, ")");
  const auto floor = scale * (kEps * static_cast<double>(cov.size(-1)));
  return {at::where(values > floor, values, 0.0), vectors};
}

// L [..., D, R] with L L^T = cov; R < D for a single covariance that is singular to rounding.
Tensor factor(const Tensor& cov, double negative_tolerance, const char* op, const char* name) {
  const int64_t d = cov.size(-1);
  if (cov.dim() == 2 && d > kSmall) {
    auto [lower, info] = at::linalg_cholesky_ex(cov);
    if (info.item<int64_t>() == 0) {
      const auto pivots = lower.diagonal().square() / cov.diagonal();
      if (pivots.amin().item<double>() > kEps * static_cast<double>(d)) return lower;
    }
  }
  const auto [values, vectors] = eigen(cov, negative_tolerance, op, name);
  const auto root = vectors * values.sqrt().unsqueeze(-2);
  if (cov.dim() > 2) return root;
  const int64_t rank = values.count_nonzero().item<int64_t>();  // ascending: the range is at the end
  return root.slice(1, d - rank);
}

// ---------------------------------------------------------------- sum of singular values

// Sum of sqrt(eigenvalues of B B^T), and a bound on its error: an eigenvalue is off by delta = 16 eps *
// largest (measured: below 4 eps * largest), so its root by delta / (2 root), at most sqrt(delta).
std::pair<double, double> trace_norm_gram(const Tensor& b) {
  const auto gram = b.size(0) <= b.size(1) ? at::matmul(b, b.mT()) : at::matmul(b.mT(), b);
  const auto values = at::linalg_eigvalsh(gram).cpu();
  const double* p = values.const_data_ptr<double>();
  const int64_t n = values.numel();
  const double delta = n > 0 ? 16 * kEps * std::max(p[n - 1], 0.0) : 0.0;
  double sum = 0, error = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double root = std::sqrt(std::max(p[i], 0.0));
    sum += root;
    error += root > 0 ? std::min(delta / (2 * root), std::sqrt(delta)) : std::sqrt(delta);
  }
  return {sum, error};
}

// Odd quintics x (a + b x^2 + c x^4), each minimax to 1 on the range the previous one leaves, starting from
// [1e-12, 1] (Remez; the composition is that of Amsel et al., arXiv 2505.16932). Singular values below 1e-12
// of the largest are underestimated: at most D * 1e-12 of it is lost. The last step, Newton-Schulz of order
// 5, ends at rounding.
constexpr double kPolar[][3] = {
    {8.51430227380533, -25.2817505047214, 18.7674482309076},
    {4.25715113684882, -3.16021881305947, 0.586482757214211},
    {4.25715113660147, -3.16021881288839, 0.586482757194696},
    {4.25715113554844, -3.16021881216006, 0.586482757111617},
    {4.25715113106556, -3.16021880905945, 0.586482756757938},
    {4.25715111198126, -3.16021879585967, 0.586482755252272},
    {4.2571510307365, -3.16021873966621, 0.586482748842428},
    {4.25715068486532, -3.16021850044221, 0.586482721554756},
    {4.25714921244021, -3.16021748202995, 0.586482605387067},
    {4.25714294411811, -3.1602131465038, 0.58648211084466},
    {4.25711625917936, -3.16019468967248, 0.586480005521056},
    {4.25700266199785, -3.16011611902871, 0.586471043169494},
    {4.25651914563065, -3.15978168405104, 0.586432895049901},
    {4.25446226476693, -3.15835888793411, 0.586270600787402},
    {4.24573330545229, -3.15231889441911, 0.585581642583076},
    {4.20906503460867, -3.12691147403186, 0.582683641860438},
    {4.06143920118889, -3.02402997762975, 0.570951485190772},
    {3.55832428364215, -2.66515051804549, 0.530092389039152},
    {2.55470589467721, -1.8888205585944, 0.442839996785186},
    {1.93049126616912, -1.31036562995714, 0.381085910380811},
    {1.87505493773217, -1.25006104056986, 0.375006104109445},
    {1.875, -1.25, 0.375},
};

Tensor trace_norm_polar(const Tensor& b) {
  auto x = b.size(0) >= b.size(1) ? b : b.mT().contiguous();
  if (x.numel() == 0) return b.new_zeros({});
  // The largest singular value is at most the fourth root of the sum of squares of X^T X.
  auto gram = at::matmul(x.mT(), x);
  const auto scale = at::linalg_matrix_norm(gram, "fro").sqrt().clamp_min(1e-300);
  x = x / scale;
  gram.div_(scale.square());
  constexpr size_t kSteps = std::size(kPolar);
  for (size_t i = 0; i < kSteps; ++i) {
    if (i > 0) gram = at::matmul(x.mT(), x);
    // At the end of a range the polynomials amplify rounding (13-fold each): all but the last step back by 1e-6.
    const double s = i + 1 < kSteps ? 1 - 1e-6 : 1, s2 = s * s;
    auto p = at::addmm(gram, gram, gram, kPolar[i][1] * s * s2, kPolar[i][2] * s * s2 * s2);
    p.diagonal().add_(kPolar[i][0] * s);
    x = at::matmul(x, p);
  }
  return ((b.size(0) >= b.size(1) ? b : b.mT()) * x).sum();
}

Tensor trace_norm(const Tensor& b, c10::string_view method) {
  TORCH_CHECK_VALUE(b.dim() >= 2 && b.scalar_type() == at::kDouble,
                    "trace_norm: B must be [..., M, N] float64");
  TORCH_CHECK_VALUE(method == "auto" || method == "gram" || method == "svd" || method == "polar",
                    "trace_norm: method ", method, " is not auto, gram, svd or polar");
  const bool small = b.dim() > 2 || std::min(b.size(-1), b.size(-2)) <= kSmall;
  if (method == "polar" || (method == "auto" && !small && b.is_cuda())) return trace_norm_polar(b);
  if (method == "gram" || (method == "auto" && !small)) {
    const auto [sum, error] = trace_norm_gram(b);
    if (method == "gram" || error <= kGramAccept * sum) return b.new_full({}, sum);
  }
  return at::linalg_svdvals(b).sum(-1);
}

// ---------------------------------------------------------------- operators

Tensor sqrtm(const Tensor& a) {
  const auto c = checked(a, "sqrtm", "A");
  const auto [values, vectors] = eigen(c, tolerance(a.scalar_type()), "sqrtm", "A");
  const auto half = vectors * values.sqrt().sqrt().unsqueeze(-2);
  const auto root = at::matmul(half, half.mT());
  return (root + root.mT()) / 2;
}

void check_means(const Tensor& mu1, const Tensor& cov1, const Tensor& mu2, const Tensor& cov2) {
  TORCH_CHECK_VALUE(mu1.dim() >= 1 && mu2.dim() >= 1, "frechet_distance: mu1 and mu2 must be [..., D]");
  const int64_t d = cov1.size(-1);
  TORCH_CHECK_VALUE(mu1.size(-1) == d && mu2.size(-1) == d && cov2.size(-1) == d,
                    "frechet_distance: different feature dimensions: mu1 ", mu1.size(-1), ", cov1 ", d,
                    ", mu2 ", mu2.size(-1), ", cov2 ", cov2.size(-1));
  TORCH_CHECK_VALUE(at::isFloatingType(mu1.scalar_type()) && at::isFloatingType(mu2.scalar_type()),
                    "frechet_distance: mu1 and mu2 must be floating point");
  TORCH_CHECK_VALUE(
      mu1.device() == mu2.device() && mu1.device() == cov1.device() && mu1.device() == cov2.device(),
      "frechet_distance: mu1, cov1, mu2 and cov2 must be on one device");
  TORCH_CHECK_VALUE(at::isfinite(mu1).all().item<bool>() && at::isfinite(mu2).all().item<bool>(),
                    "frechet_distance: mu1 or mu2 has entries that are not finite");
}

// Rounding can leave a tiny negative distance between equal statistics; it is 0.
Tensor assemble(const Tensor& mu1, const Tensor& trace1, const Tensor& mu2, const Tensor& trace2,
                const Tensor& root) {
  return ((mu1.to(at::kDouble) - mu2.to(at::kDouble)).square().sum(-1) + trace1 + trace2 - 2 * root)
      .clamp_min(0);
}

Tensor frechet_distance(const Tensor& mu1, const Tensor& cov1, const Tensor& mu2, const Tensor& cov2) {
  const auto c1 = checked(cov1, "frechet_distance", "cov1"), c2 = checked(cov2, "frechet_distance", "cov2");
  check_means(mu1, c1, mu2, c2);
  const auto l1 = factor(c1, tolerance(cov1.scalar_type()), "frechet_distance", "cov1");
  const auto l2 = factor(c2, tolerance(cov2.scalar_type()), "frechet_distance", "cov2");
  return assemble(mu1, trace_of(c1), mu2, trace_of(c2), trace_norm(at::matmul(l1.mT(), l2), "auto"));
}

// d(distance)/d(cov1), d(distance)/d(cov2), times grad. With B = L1^T L2 = U S V^T and W1 = L1 U, W2 = L2 V:
//   d/dC2 = I - W1 S^+ W1^T,  d/dC1 = I - W2 S^+ W2^T,
// the form I - R (R C R)^(-1/2) R without differences of eigenvalues, so repeated ones do no harm. On the
// numerical null space (S below D * eps of the largest) the pseudo-inverse S^+ gives the derivative along the
// range.
std::tuple<Tensor, Tensor> frechet_distance_backward(const Tensor& grad, const Tensor& cov1,
                                                     const Tensor& cov2) {
  const auto l1 = factor(checked(cov1, "frechet_distance", "cov1"), 1, "frechet_distance", "cov1");
  const auto l2 = factor(checked(cov2, "frechet_distance", "cov2"), 1, "frechet_distance", "cov2");
  const auto [u, s, vh] = at::linalg_svd(at::matmul(l1.mT(), l2), false);
  const auto identity = at::eye(cov1.size(-1), l1.options());
  const auto g = grad.unsqueeze(-1).unsqueeze(-1);
  if (s.size(-1) == 0) return {g * identity, g * identity};
  const auto floor = s.amax(-1, true) * (kEps * static_cast<double>(cov1.size(-1)));
  const auto inverse_root = at::where(s > floor, s.rsqrt(), 0.0).unsqueeze(-2);
  const auto w1 = at::matmul(l1, u) * inverse_root, w2 = at::matmul(l2, vh.mT()) * inverse_root;
  return {g * (identity - at::matmul(w2, w2.mT())), g * (identity - at::matmul(w1, w1.mT()))};
}

Tensor call_distance(const Tensor& mu1, const Tensor& cov1, const Tensor& mu2, const Tensor& cov2) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("neon_ext::frechet_distance", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>();
  return op.call(mu1, cov1, mu2, cov2);
}

struct FrechetFunction : torch::autograd::Function<FrechetFunction> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& mu1, const Tensor& cov1,
                        const Tensor& mu2, const Tensor& cov2) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({mu1, cov1, mu2, cov2});
    return call_distance(mu1, cov1, mu2, cov2);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "frechet_distance is differentiable once, not twice");
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("neon_ext::frechet_distance_backward", "")
            .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&)>();
    const auto saved = ctx->get_saved_variables();
    const auto grad_mu = 2 * grads[0].unsqueeze(-1) * (saved[0] - saved[2]);
    Tensor grad1, grad2;
    if (ctx->needs_input_grad(1) || ctx->needs_input_grad(3))
      std::tie(grad1, grad2) = op.call(grads[0], saved[1], saved[3]);
    return {grad_mu, grad1, -grad_mu, grad2};
  }
};

// Cast and broadcast outside the function, so that autograd sums the gradients back.
Tensor frechet_distance_autograd(const Tensor& mu1, const Tensor& cov1, const Tensor& mu2,
                                 const Tensor& cov2) {
  const auto needs =
      mu1.requires_grad() || cov1.requires_grad() || mu2.requires_grad() || cov2.requires_grad();
  if (!needs || !at::GradMode::is_enabled() || mu1.dim() < 1 || mu2.dim() < 1 || cov1.dim() < 2 ||
      cov2.dim() < 2) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_distance(mu1, cov1, mu2, cov2);
  }
  const auto batch_of = [](const Tensor& mu, const Tensor& cov) {
    return at::infer_size(mu.sizes().slice(0, mu.dim() - 1), cov.sizes().slice(0, cov.dim() - 2));
  };
  const auto batch = at::infer_size(batch_of(mu1, cov1), batch_of(mu2, cov2));
  const auto spread = [&](const Tensor& t, int64_t own) {
    auto shape = std::vector<int64_t>(batch.begin(), batch.end());
    shape.insert(shape.end(), t.sizes().end() - own, t.sizes().end());
    return t.to(at::kDouble).expand(shape);
  };
  return FrechetFunction::apply(spread(mu1, 1), spread(cov1, 2), spread(mu2, 1), spread(cov2, 2));
}

std::tuple<Tensor, Tensor> feature_moments(const Tensor& features) {
  TORCH_CHECK_VALUE(features.dim() == 2 && at::isFloatingType(features.scalar_type()),
                    "feature_moments: features must be [N, D] floating point, got ", features.sizes());
  TORCH_CHECK_VALUE(features.sym_size(0) >= 2, "feature_moments: a covariance needs at least 2 rows, got ",
                    features.sym_size(0));
  const auto f = features.to(at::kDouble);
  const auto mean = f.mean(0);
  const auto centred = f - mean;
  return {mean, at::matmul(centred.mT(), centred) / (f.sym_size(0) - 1)};
}

Tensor sqrtm_meta(const Tensor& a) { return at::empty_like(a, a.options().dtype(at::kDouble)); }
Tensor frechet_distance_meta(const Tensor& mu1, const Tensor& cov1, const Tensor& mu2, const Tensor& cov2) {
  const auto by = [](const Tensor& mu, const Tensor& cov) {
    return mu.sum(-1) + cov.sum(c10::IntArrayRef{-2, -1});
  };
  return (by(mu1, cov1) + by(mu2, cov2)).to(at::kDouble);
}
std::tuple<Tensor, Tensor> frechet_distance_backward_meta(const Tensor&, const Tensor& cov1,
                                                          const Tensor& cov2) {
  return {at::empty_like(cov1), at::empty_like(cov2)};
}
Tensor trace_norm_meta(const Tensor& b, c10::string_view) { return b.sum(c10::IntArrayRef{-2, -1}); }

}  // namespace

// ---------------------------------------------------------------- prepared reference

Tensor trace_of(const Tensor& cov) { return cov.diagonal(0, -2, -1).sum(-1); }

FrechetReference::FrechetReference(const Tensor& mu, const Tensor& cov, std::optional<int64_t> count)
    : mu_(mu.detach().to(at::kDouble)),
      cov_(checked(cov.detach(), "FrechetReference", "cov")),
      count_(count) {
  TORCH_CHECK_VALUE(cov_.dim() == 2 && mu_.dim() == 1 && mu_.size(0) == cov_.size(0),
                    "FrechetReference: mu must be [D] and cov [D, D], got ", mu.sizes(), " and ",
                    cov.sizes());
  TORCH_CHECK_VALUE(at::isfinite(mu_).all().item<bool>(),
                    "FrechetReference: mu has entries that are not finite");
  negative_tolerance_ = tolerance(cov.scalar_type());
  factor_ = factor(cov_, negative_tolerance_, "FrechetReference", "cov");
}

Tensor FrechetReference::distance(const Tensor& mu, const Tensor& cov) const {
  if (at::GradMode::is_enabled() && (mu.requires_grad() || cov.requires_grad()))
    return call_distance(mu_, cov_, mu, cov);
  const auto c = checked(cov, "frechet_distance", "cov");
  check_means(mu_, cov_, mu, c);
  TORCH_CHECK_VALUE(c.dim() == 2 && mu.dim() == 1,
                    "FrechetReference.distance: mu must be [D] and cov [D, D]");
  const auto l = factor(c, tolerance(cov.scalar_type()), "frechet_distance", "cov");
  return assemble(mu_, trace_of(cov_), mu, trace_of(c), trace_norm(at::matmul(factor_.mT(), l), "auto"));
}

// N centred rows have rank N - 1. A Householder reflection that turns (1, ..., 1) into the first axis leaves
// N - 1 rows with the same scatter, so that no exact zero has to come out of a rounded eigenvalue problem.
Tensor FrechetReference::distance_from_features(const Tensor& features) const {
  TORCH_CHECK_VALUE(features.dim() == 2 && features.size(1) == mu_.size(0) && features.size(0) >= 2,
                    "distance_from_features: features must be [N, ", mu_.size(0), "] with N >= 2, got ",
                    features.sizes());
  TORCH_CHECK_VALUE(features.device() == mu_.device(), "distance_from_features: features are on ",
                    features.device(), ", the reference on ", mu_.device());
  const int64_t n = features.size(0), d = features.size(1);
  if (n > d || (at::GradMode::is_enabled() && features.requires_grad())) {
    const auto [mean, cov] = feature_moments(features);
    return distance(mean, cov);
  }
  const auto f = features.to(at::kDouble);
  const auto mean = f.mean(0);
  TORCH_CHECK_VALUE(at::isfinite(mean).all().item<bool>(),
                    "distance_from_features: features are not all finite");
  const auto centred = f - mean;
  const auto rows = (centred.slice(0, 1) + centred[0] / (std::sqrt(static_cast<double>(n)) - 1)) /
                    std::sqrt(static_cast<double>(n - 1));  // [N - 1, D], rows^T rows = cov
  return assemble(mu_, trace_of(cov_), mean, rows.square().sum(),
                  trace_norm(at::matmul(rows, factor_), "auto"));
}

std::map<std::string, double> FrechetReference::certificate(const Tensor& mu, const Tensor& cov,
                                                            std::optional<int64_t> count) const {
  const auto c = checked(cov.detach(), "certificate", "cov");
  const double total = distance(mu.detach(), cov.detach()).item<double>();
  const double mean_term = (mu_ - mu.detach().to(at::kDouble)).square().sum().item<double>();
  std::map<std::string, double> out{{"distance", total},
                                    {"mean_term", mean_term},
                                    {"cov_term", std::max(0.0, total - mean_term)},
                                    {"dimension", static_cast<double>(mu_.size(0))}};
  const auto spectrum = [&](const Tensor& matrix, const std::string& suffix, std::optional<int64_t> n) {
    const auto values = at::linalg_eigvalsh(matrix);
    const auto floor = values.abs().amax() * (kEps * static_cast<double>(matrix.size(0)));
    out["rank" + suffix] = values.gt(floor).sum().item<double>();
    out["clipped" + suffix] = -values.clamp_max(0).sum().item<double>();
    if (n) out["n_over_d" + suffix] = static_cast<double>(*n) / static_cast<double>(matrix.size(0));
  };
  spectrum(cov_, "_ref", count_);
  spectrum(c, "", count);
  return out;
}

TORCH_LIBRARY_IMPL(neon_ext, CPU, m) {
  m.impl("sqrtm", sqrtm);
  m.impl("frechet_distance", frechet_distance);
  m.impl("frechet_distance_backward", frechet_distance_backward);
  m.impl("trace_norm", trace_norm);
}
TORCH_LIBRARY_IMPL(neon_ext, CUDA,
                   m) {  // matrix products and factorisations of ATen: the same code on both devices
  m.impl("sqrtm", sqrtm);
  m.impl("frechet_distance", frechet_distance);
  m.impl("frechet_distance_backward", frechet_distance_backward);
  m.impl("trace_norm", trace_norm);
}
TORCH_LIBRARY_IMPL(neon_ext, Meta, m) {
  m.impl("sqrtm", sqrtm_meta);
  m.impl("frechet_distance", frechet_distance_meta);
  m.impl("frechet_distance_backward", frechet_distance_backward_meta);
  m.impl("trace_norm", trace_norm_meta);
}
TORCH_LIBRARY_IMPL(neon_ext, Autograd, m) { m.impl("frechet_distance", frechet_distance_autograd); }
TORCH_LIBRARY_IMPL(neon_ext, CompositeImplicitAutograd, m) { m.impl("feature_moments", feature_moments); }

}  // namespace neon
