// Moments, symmetric square roots and the Fréchet distance between Gaussians, in float64 on CPU and
// CUDA.
//
//   d = |mu1 - mu2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)
//   tr (C1 C2)^(1/2) = sum of the singular values of L1^T L2
//
// for any factors C = L L^T (Dowson & Landau 1982). Factors never take the square root of a rounded
// eigenvalue: one of C1 C2 that should be 0 and comes out as 1e-16 would add 1e-8 to the trace,
// times the number of null directions. They are Cholesky's (fast), or the eigenvectors of the
// numerical range where a covariance is singular to rounding.
//
// How the singular values are summed is chosen by measurement:
//   gram    eigenvalues of B B^T, where a bound on their rounding is below 1e-10 of the trace
//   svd     singular values of B: always accurate, 3 to 4 times slower on CPU; small or batched B
//   polar   CUDA: tr U^T B with U the polar factor by minimax polynomials, matrix products only
#include <torch/csrc/autograd/custom_function.h>
#include <torch/extension.h>

#include <array>

#include "neon_ext.h"

namespace neon {
namespace {

using torch::autograd::variable_list;
using Folds = std::vector<int64_t>;  // numbers of folds
constexpr double kEps = 2.220446049250313e-16;
constexpr int64_t kSmall = 128;  // up to here one SVD costs less than the choice between methods
constexpr int64_t kRows = 4096;  // features converted to float64 at a time: 64 MB at D = 2048
constexpr double kGramAccept = 1e-10;  // relative error of the trace at which gram is accepted

// ---------------------------------------------------------------- checks and factors

// Rounding leaves relative asymmetry and negative eigenvalues of about 1e-13 in float64 statistics
// and 1e-6 in float32 ones; what is beyond these bounds is not rounding.
double tolerance(at::ScalarType given) {
  return given == at::kDouble ? 1e-8 : 1e-3;
}

bool is_dense(const Tensor& t) {
  return t.layout() == at::kStrided && !t.is_quantized() && !t.is_nested() && !t.is_meta();
}

// Largest magnitude of each matrix [..., M, N] -> [...] on the CPU; NaN where it has one.
Tensor largest_entries(const Tensor& m) {
  if (m.numel() == 0) {
    return at::zeros(m.sizes().slice(0, m.dim() - 2), at::kDouble);
  }
  const auto [low, high] = at::aminmax(m.flatten(-2), -1);
  return at::maximum(-low, high).cpu();
}

// Powers of two [...], r with r^2 near the largest entry of each matrix; undefined where all are of
// ordinary size, so that squares of products of entries neither overflow nor vanish.
Tensor root_scales(const Tensor& largest) {  // [...] float64, on the CPU
  const auto flat = largest.reshape({-1});
  auto roots = at::ones_like(flat);
  const double* entries = flat.const_data_ptr<double>();
  double* root = roots.mutable_data_ptr<double>();
  bool ordinary = true;
  for (int64_t i = 0; i < flat.numel(); ++i) {
    if (entries[i] > 0 && !(entries[i] > 1e-60 && entries[i] < 1e60)) {
      root[i] = std::ldexp(1.0, std::ilogb(entries[i]) / 2);
      ordinary = false;
    }
  }
  return ordinary ? Tensor() : roots.view(largest.sizes());
}

// m / r^2, for r [...] of root_scales().
Tensor divided(const Tensor& m, const Tensor& root) {
  if (!root.defined()) {
    return m;
  }
  const auto r = root.to(m.device()).unsqueeze(-1).unsqueeze(-1);
  return m / r / r;
}

// A checked covariance.
struct Symmetric {
  Tensor cov;     // [..., D, D] float64, exactly symmetric
  Tensor scaled;  // cov / root^2
  Tensor root;    // [...] powers of two, undefined for ones
};

// `who` begins the messages: operator and argument.
Symmetric checked(const Tensor& cov, const std::string& who) {
  TORCH_CHECK_VALUE(cov.dim() >= 2 && cov.size(-1) == cov.size(-2) &&
                        at::isFloatingType(cov.scalar_type()) && is_dense(cov),
                    who, " must be [..., D, D] floating point and dense, got ", cov.layout(), " ",
                    describe(cov));
  const auto c = cov.to(at::kDouble);
  const auto largest = largest_entries(c), skew = largest_entries(c - c.mT());
  const auto flat_largest = largest.reshape({-1}), flat_skew = skew.reshape({-1});
  bool symmetric = true;
  for (int64_t i = 0; i < flat_largest.numel(); ++i) {  // each matrix by its own
    const double most = flat_largest.const_data_ptr<double>()[i];
    const double skewness = flat_skew.const_data_ptr<double>()[i];
    const auto which = cov.dim() > 2 ? c10::str(", matrix ", i, " of the batch,") : std::string();
    TORCH_CHECK_VALUE(std::isfinite(most), who, which, " has entries that are not finite");
    TORCH_CHECK_VALUE(skewness <= tolerance(cov.scalar_type()) * most, who, which,
                      " is not symmetric: max |C - C^T| = ", skewness, ", largest entry ", most);
    symmetric = symmetric && skewness == 0;
  }
  const auto even = symmetric ? c : c / 2 + c.mT() / 2;
  const auto root = root_scales(largest);
  return {even, divided(even, root), root};
}

// Values up to n * eps of the largest are the rounding of zeros: a numerical rank, not a
// regularisation.
Tensor rounding(const Tensor& values, int64_t n) {
  return values.abs().amax(-1, true) * (kEps * static_cast<double>(n));
}

// Eigenvalues [..., D], ascending, with 0 for what is rounding, and eigenvectors [..., D, D].
std::pair<Tensor, Tensor> eigen(const Tensor& c,  // [..., D, D] float64, of ordinary magnitude
                                double negative_tolerance, const std::string& who) {
  const auto [values, vectors] = at::linalg_eigh(c);
  if (values.numel() == 0) {
    return {values, vectors};
  }
  const auto relative = values / values.abs().amax(-1, true).clamp_min(1e-300);
  const double excess = relative.amin().item<double>();
  TORCH_CHECK_VALUE(excess >= -negative_tolerance, who,
                    " is not positive semi-definite: smallest eigenvalue ", excess,
                    " of the largest, beyond rounding (", negative_tolerance, ")");
  return {at::where(values > rounding(values, c.size(-1)), values, 0.0), vectors};
}

struct Factor {
  Tensor l;                 // [..., D, R]
  double log_size = NAN;    // mean logarithm of its singular values, where that is known
  bool triangular = false;  // lower triangular
};

// L with L L^T = c; R < D for a single covariance that is singular to rounding.
Factor factor(const Tensor& c,  // [..., D, D] float64, of ordinary magnitude
              double negative_tolerance, const std::string& who) {
  const int64_t d = c.size(-1);
  if (c.dim() == 2 && d > kSmall) {
    const auto [lower, info] = at::linalg_cholesky_ex(c);
    const auto pivots = lower.diagonal().square() / c.diagonal();
    if (info.item<int64_t>() == 0 && pivots.amin().item<double>() > kEps * static_cast<double>(d)) {
      return {lower, lower.diagonal().log().mean().item<double>(), true};
    }
  }
  const auto [values, vectors] = eigen(c, negative_tolerance, who);
  const auto root = vectors * values.sqrt().unsqueeze(-2);
  if (c.dim() > 2) {
    return {root};
  }
  const int64_t first = d - values.count_nonzero().item<int64_t>();  // ascending: the range is last
  const auto range = values.slice(0, first);
  return {root.slice(1, first), range.numel() ? range.log().mean().item<double>() / 2 : NAN};
}

// ---------------------------------------------------------------- sum of singular values

// Sum of sqrt(eigenvalues of a Gram matrix), and a bound on its error: an eigenvalue is off by
// delta = 16 eps * largest (measured: below 4 eps * largest), so its root by delta / (2 root), at
// most sqrt(delta). `largest`: of the matrix that the Gram matrix was computed from, if greater.
struct GramSum {
  double sum, error, largest;
  bool accurate() const {
    return error <= kGramAccept * sum;
  }
};
GramSum gram_sum(const Tensor& gram,  // [N, N] float64
                 double largest = 0) {
  const auto values = at::linalg_eigvalsh(gram).clamp_min(0).cpu();
  if (values.numel() == 0) {
    return {0, 0, largest};
  }
  largest = std::max(largest, values[-1].item<double>());
  const auto roots = values.sqrt();
  const double bound = std::sqrt(16 * kEps * largest);
  const auto errors = (bound * bound / 2 / roots).clamp_max(bound);  // infinite at a root of 0
  return {roots.sum().item<double>(), errors.nan_to_num(0).sum().item<double>(), largest};
}
Tensor gram_of(const Tensor& b) {  // [M, N] -> the smaller of B B^T and B^T B
  return b.size(0) <= b.size(1) ? at::matmul(b, b.mT()) : at::matmul(b.mT(), b);
}

// Whether gram_sum(gram_of(b)) will be accurate: its error is about twice that of n singular values
// at their geometric mean (measured at spectra from 1e-4 to 1e-12). A wrong guess costs time, not
// accuracy.
bool gram_may_do(const Tensor& b,    // [M, N] float64
                 double log_size) {  // mean logarithm of its singular values, about; NaN: unknown
  if (std::isnan(log_size)) {
    return true;
  }
  auto v = at::ones({b.size(1)}, b.options());
  double largest = 0;  // square of the largest singular value, by power iteration
  for (int i = 0; i < 4; ++i) {
    v = at::mv(b.t(), at::mv(b, v / at::linalg_vector_norm(v)));
    largest = at::linalg_vector_norm(v).item<double>();
  }
  const auto n = static_cast<double>(std::min(b.size(0), b.size(1)));
  const double norm = at::linalg_vector_norm(b).item<double>();
  const double sum = norm * std::pow(n, 0.25);  // between norm and norm * sqrt(n)
  return n * 16 * kEps * largest / std::exp(log_size) <= kGramAccept * sum;
}

// Odd quintics x (a + b x^2 + c x^4), each minimax to 1 on the range the previous one leaves,
// starting from [1e-12, 1] (Remez; the composition is that of Amsel et al., arXiv 2505.16932).
// Singular values below 1e-12 of the largest are underestimated: at most D * 1e-12 of it is lost.
// The last step is Newton-Schulz.
constexpr double kPolar[][3] = {
    {8.51430227381, -25.2817505047, 18.7674482309},
    {4.25715113685, -3.16021881306, 0.586482757214},
    {4.2571511366, -3.16021881289, 0.586482757195},
    {4.25715113555, -3.16021881216, 0.586482757112},
    {4.25715113107, -3.16021880906, 0.586482756758},
    {4.25715111198, -3.16021879586, 0.586482755252},
    {4.25715103074, -3.16021873967, 0.586482748842},
    {4.25715068487, -3.16021850044, 0.586482721555},
    {4.25714921244, -3.16021748203, 0.586482605387},
    {4.25714294412, -3.1602131465, 0.586482110845},
    {4.25711625918, -3.16019468967, 0.586480005521},
    {4.257002662, -3.16011611903, 0.586471043169},
    {4.25651914563, -3.15978168405, 0.58643289505},
    {4.25446226477, -3.15835888793, 0.586270600787},
    {4.24573330545, -3.15231889442, 0.585581642583},
    {4.20906503461, -3.12691147403, 0.58268364186},
    {4.06143920119, -3.02402997763, 0.570951485191},
    {3.55832428364, -2.66515051805, 0.530092389039},
    {2.55470589468, -1.88882055859, 0.442839996785},
    {1.93049126617, -1.31036562996, 0.381085910381},
    {1.87505493773, -1.25006104057, 0.375006104109},
    {1.875, -1.25, 0.375},
};

// low[i]: the i-th polynomial is made for values from low[i] on, up to high = 1 for the first and
// 2 - low[i] for the others.
std::array<double, std::size(kPolar)> polar_lows() {
  std::array<double, std::size(kPolar)> low{1e-12};
  for (size_t i = 1; i < low.size(); ++i) {
    const double x = low[i - 1], x2 = x * x;
    low[i] = x * (kPolar[i - 1][0] + x2 * (kPolar[i - 1][1] + x2 * kPolar[i - 1][2]));
  }
  return low;
}

Tensor trace_norm_polar(const Tensor& given,  // [M, N] float64
                        double lower = 0) {   // of its singular values
  const auto tall = given.size(0) >= given.size(1) ? given : given.mT().contiguous();
  if (tall.numel() == 0) {
    return tall.new_zeros({});
  }
  const auto or_one = [](const Tensor& t) { return at::where(t > 0, t, 1.0); };
  const auto magnitude = or_one(tall.abs().amax());
  const auto b = tall / magnitude;
  // The largest singular value is at most the fourth root of the sum of squares of B^T B.
  auto gram = at::matmul(b.mT(), b);
  const auto scale = or_one(at::linalg_matrix_norm(gram, "fro").sqrt());

  // Enter where the known lower bound allows: the first steps only lift what is smaller.
  static const auto low = polar_lows();
  constexpr size_t kSteps = std::size(kPolar);
  size_t first = 0;
  double high = 1;
  if (lower > 0) {
    const double smallest = lower / (magnitude * scale).item<double>();
    while (first + 2 < kSteps && smallest * (2 - low[first + 1]) >= low[first + 1]) {
      ++first;
      high = 2 - low[first];
    }
  }

  auto x = b * (high / scale);
  gram.mul_((high / scale).square());
  for (size_t i = first; i < kSteps; ++i) {
    if (i > first) {
      gram = at::matmul(x.mT(), x);
    }
    // At the end of a range the polynomials amplify rounding (13-fold each): step back by 1e-6, but
    // at last.
    const double s = i + 1 < kSteps ? 1 - 1e-6 : 1, s2 = s * s;
    auto p = at::addmm(gram, gram, gram, kPolar[i][1] * s * s2, kPolar[i][2] * s * s2 * s2);
    p.diagonal().add_(kPolar[i][0] * s);
    x = at::matmul(x, p);
  }
  return (b * x).sum() * magnitude;
}

// tr of the root of L1 L1^T L2 L2^T, by matrix products only. Where both factors are triangular,
// two solves give (L1^T L2)^-1, whose norm bounds the singular values from below.
Tensor polar_root(const Factor& a, const Factor& b) {  // [D, R] and [D, S]
  double lower = 0;
  if (a.triangular && b.triangular) {
    const auto identity = at::eye(a.l.size(0), a.l.options());
    const auto half = at::linalg_solve_triangular(a.l, identity, false).mT();
    const auto inverse = at::linalg_solve_triangular(b.l, half, false);
    lower = 1 / at::linalg_matrix_norm(inverse, "fro").item<double>();
  }
  return trace_norm_polar(at::matmul(a.l.mT(), b.l), lower);
}

// By the method that is best for b.
Tensor singular_sum(const Tensor& b,  // [..., M, N] float64, of ordinary magnitude -> [...]
                    double log_size = NAN) {
  if (b.dim() == 2 && std::min(b.size(0), b.size(1)) > kSmall) {
    if (b.is_cuda()) {
      return trace_norm_polar(b);
    }
    if (gram_may_do(b, log_size)) {
      const auto found = gram_sum(gram_of(b));
      if (found.accurate()) {
        return b.new_full({}, found.sum);
      }
    }
  }
  return at::linalg_svdvals(b).sum(-1);
}

// By a method of choice, for tests: polar is what CUDA computes, on any device.
double trace_norm(const Tensor& b,  // [M, N] float64, of ordinary magnitude
                  const std::string& method) {
  TORCH_CHECK_VALUE(method == "auto" || method == "gram" || method == "polar",
                    "trace_norm: method ", method, " is not auto, gram or polar");
  if (method == "gram") {
    return gram_sum(gram_of(b)).sum;
  }
  return (method == "polar" ? trace_norm_polar(b) : singular_sum(b)).item<double>();
}

// ---------------------------------------------------------------- square root and distance

Tensor times(const Tensor& m, const Tensor& root) {  // [..., D, D], [...]
  return root.defined() ? m * root.to(m.device()).unsqueeze(-1).unsqueeze(-1) : m;
}

Tensor sqrtm(const Tensor& a) {  // [..., D, D] -> [..., D, D] float64
  const auto given = checked(a, "sqrtm: A");
  const auto [values, vectors] = eigen(given.scaled, tolerance(a.scalar_type()), "sqrtm: A");
  const auto half = vectors * values.sqrt().sqrt().unsqueeze(-2);
  const auto root = at::matmul(half, half.mT());
  return times((root + root.mT()) / 2, given.root);
}

struct Gaussian {
  Tensor mu;      // [..., D] float64
  Tensor cov;     // [..., D, D] float64, undefined where only the factor is known
  Factor factor;  // of cov / root^2
  Tensor root;    // [...] powers of two, undefined for ones
  Tensor trace() const {
    return cov.defined() ? cov.diagonal(0, -2, -1).sum(-1) : factor.l.square().sum();
  }
};

Gaussian gaussian(const Tensor& mu,   // [..., D]
                  const Tensor& cov,  // [..., D, D]
                  const std::string& op, const std::string& side) {
  const auto c = checked(cov, op + ": cov" + side);
  TORCH_CHECK_VALUE(mu.dim() >= 1 && mu.size(-1) == c.cov.size(-1) &&
                        at::isFloatingType(mu.scalar_type()) && is_dense(mu) &&
                        mu.device() == c.cov.device(),
                    op, ": mu", side, " must be [..., ", c.cov.size(-1),
                    "] floating point on the device of cov", side, ", got ", describe(mu));
  return {mu.to(at::kDouble), c.cov,
          factor(c.scaled, tolerance(cov.scalar_type()), op + ": cov" + side), c.root};
}

// ValueError unless the batch dimensions broadcast.
void check_batches(std::initializer_list<at::IntArrayRef> batches) {
  std::vector<int64_t> common;  // reversed
  for (const auto& batch : batches) {
    for (size_t d = 0; d < batch.size(); ++d) {
      const int64_t size = batch[batch.size() - 1 - d];
      if (d == common.size()) {
        common.push_back(size);
      }
      TORCH_CHECK_VALUE(size == common[d] || size == 1 || common[d] == 1,
                        "frechet_distance: the batch dimensions of mu1, cov1, mu2 and cov2 do not "
                        "broadcast: ",
                        batch, " beside others of ", common[d]);
      common[d] = common[d] == 1 ? size : common[d];
    }
  }
}

Tensor distance(const Gaussian& a, const Gaussian& b) {
  TORCH_CHECK_VALUE(a.mu.size(-1) == b.mu.size(-1) && a.mu.device() == b.mu.device(),
                    "frechet_distance: different feature dimensions or devices: ", describe(a.mu),
                    " and ", describe(b.mu));
  const auto batch = [](const Tensor& t, int64_t own) { return t.sizes().slice(0, t.dim() - own); };
  check_batches({batch(a.mu, 1), batch(a.factor.l, 2), batch(b.mu, 1), batch(b.factor.l, 2)});
  const auto finite = at::isfinite(a.mu).all().logical_and(at::isfinite(b.mu).all());
  TORCH_CHECK_VALUE(finite.item<bool>(), "frechet_distance: a mean is not finite");
  const auto means = (a.mu - b.mu).square().sum(-1);

  auto root = a.mu.is_cuda() && a.factor.triangular && b.factor.triangular
                  ? polar_root(a.factor, b.factor)
                  : singular_sum(at::matmul(a.factor.l.mT(), b.factor.l),
                                 a.factor.log_size + b.factor.log_size);
  for (const Tensor& scale : {a.root, b.root}) {
    root = scale.defined() ? root * scale.to(root.device()) : root;
  }

  const auto total = means + a.trace() + b.trace() - 2 * root;
  TORCH_CHECK_VALUE(at::isfinite(total).all().item<bool>(),
                    "frechet_distance: the result is beyond the range of float64");
  // Rounding can leave a tiny negative distance between equal statistics; it is 0.
  return total.clamp_min(0);
}

Tensor frechet_distance(const Tensor& mu1,     // [..., D]
                        const Tensor& cov1,    // [..., D, D]
                        const Tensor& mu2,     // [..., D]
                        const Tensor& cov2) {  // [..., D, D] -> [...] float64
  return distance(gaussian(mu1, cov1, "frechet_distance", "1"),
                  gaussian(mu2, cov2, "frechet_distance", "2"));
}
using Distance = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&);

// d(distance)/d(cov1), d(distance)/d(cov2), times grad. With B = L1^T L2 = U S V^T and W1 = L1 U,
// W2 = L2 V:
//   d/dC2 = I - W1 S^+ W1^T,  d/dC1 = I - W2 S^+ W2^T,
// the form I - R (R C R)^(-1/2) R without differences of eigenvalues, so repeated ones do no harm.
// On the numerical null space (S below D * eps of the largest) S^+ is 0: the derivative along the
// range.
std::tuple<Tensor, Tensor> frechet_distance_backward(const Tensor& grad,    // [...]
                                                     const Tensor& cov1,    // [..., D, D]
                                                     const Tensor& cov2) {  // [..., D, D]
  const auto c1 = checked(cov1, "cov1"), c2 = checked(cov2, "cov2");
  const auto l1 = factor(c1.scaled, 1, "cov1").l, l2 = factor(c2.scaled, 1, "cov2").l;
  const auto [u, s, vh] = at::linalg_svd(at::matmul(l1.mT(), l2), false);
  const auto identity = at::eye(cov1.size(-1), l1.options());
  const auto g = grad.unsqueeze(-1).unsqueeze(-1);
  if (s.size(-1) == 0) {
    return {g * identity, g * identity};
  }
  const auto inverse_root = at::where(s > rounding(s, cov1.size(-1)), s.rsqrt(), 0.0).unsqueeze(-2);
  const auto w1 = at::matmul(l1, u) * inverse_root, w2 = at::matmul(l2, vh.mT()) * inverse_root;
  auto product1 = at::matmul(w2, w2.mT()), product2 = at::matmul(w1, w1.mT());
  if (c1.root.defined() || c2.root.defined()) {  // homogeneous of degree 0 in both together
    const auto one = at::ones({}, at::kDouble);
    const auto ratio = (c2.root.defined() ? c2.root : one) / (c1.root.defined() ? c1.root : one);
    product1 = times(product1, ratio);
    product2 = times(product2, ratio.reciprocal());
  }
  return {g * (identity - product1), g * (identity - product2)};
}

struct FrechetFunction : torch::autograd::Function<FrechetFunction> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& mu1,
                        const Tensor& cov1, const Tensor& mu2, const Tensor& cov2) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({mu1, cov1, mu2, cov2});
    return op<Distance>("neon_ext::frechet_distance").call(mu1, cov1, mu2, cov2);
  }
  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "frechet_distance is differentiable once, not twice");
    using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&);
    const auto saved = ctx->get_saved_variables();
    const auto grad_mu =
        2 * grads[0].unsqueeze(-1) * (saved[0].to(at::kDouble) - saved[2].to(at::kDouble));
    variable_list all{grad_mu, {}, -grad_mu, {}};
    if (ctx->needs_input_grad(1) || ctx->needs_input_grad(3)) {
      std::tie(all[1], all[3]) =
          op<Signature>("neon_ext::frechet_distance_backward").call(grads[0], saved[1], saved[3]);
    }
    for (size_t i = 0; i < 4; ++i) {  // sums over what was broadcast
      if (all[i].defined()) {
        all[i] = at::sum_to(all[i], saved[i].sym_sizes()).to(saved[i].scalar_type());
      }
    }
    return all;
  }
};

std::tuple<Tensor, Tensor> feature_moments(const Tensor& features) {
  TORCH_CHECK_VALUE(features.dim() == 2 && at::isFloatingType(features.scalar_type()) &&
                        features.layout() == at::kStrided,
                    "feature_moments: features must be [N, D] dense floating point, got ",
                    features.layout(), " ", features.sizes());
  const auto n = features.sym_size(0);
  TORCH_CHECK_VALUE(n >= 2, "feature_moments: a covariance needs at least 2 rows, got ", n);
  const auto f = features.to(at::kDouble);
  const auto mean = f.mean(0);
  const auto centred = f - mean;
  return {mean, at::matmul(centred.mT(), centred) / (n - 1)};
}

// ---------------------------------------------------------------- moments of folds

// Mean and covariance of any choice of folds after one pass over the features: float64 sums of
// (f - shift) and of its outer products, per fold. Each fold has a shift of its own, the mean of
// its first rows, so that no fold's sums cancel, whichever folds are combined and however far apart
// they lie.
class FoldMoments {
 public:
  FoldMoments(const Tensor& features,              // [N, D]
              const std::vector<int64_t>& ends) {  // [K + 1]: fold k is ends[k] : ends[k + 1]
    const int64_t dim = features.size(1), folds = static_cast<int64_t>(ends.size()) - 1;
    sum_ = at::zeros({folds, dim}, features.options().dtype(at::kDouble));
    shift_ = at::zeros_like(sum_);
    outer_ = at::zeros({folds, dim, dim}, sum_.options());
    for (int64_t k = 0; k < folds; ++k) {
      count_.push_back(ends[k + 1] - ends[k]);
      if (count_[k] > 0) {
        add(features.slice(0, ends[k], ends[k + 1]), k);
      }
    }
  }

  // -> [D], [D, D]. Scatter about the common mean: that about each fold's own mean, and that of the
  // means.
  std::pair<Tensor, Tensor> of(const Folds& chosen) const {
    Folds folds;  // that have features
    int64_t total = 0;
    for (int64_t k : chosen) {
      if (count_[k] > 0) {
        folds.push_back(k);
        total += count_[k];
      }
    }
    const auto n = static_cast<double>(total);

    // Means of the folds as differences to the first one's shift, and their shares of the features.
    const auto base = shift_[folds[0]];
    std::vector<Tensor> differences, own;
    std::vector<double> shares;
    auto scatter = at::zeros_like(outer_[0]);
    for (int64_t k : folds) {
      const auto count = static_cast<double>(count_[k]);
      differences.push_back(shift_[k] - base + sum_[k] / count);
      shares.push_back(count / n);
      own.push_back(sum_[k] / std::sqrt(count));
      scatter.add_(outer_[k]);
    }
    const auto means = at::stack(differences), shifts = at::stack(own);  // [K, D]
    const auto weights = at::tensor(shares, means.options());            // [K]
    const auto mean = at::matmul(weights, means);

    const auto spread = (means - mean) * (weights * n).sqrt().unsqueeze(1);
    scatter.addmm_(shifts.mT(), shifts, 1, -1).addmm_(spread.mT(), spread).div_(n - 1);
    TORCH_CHECK_VALUE(at::isfinite(scatter.diagonal()).all().item<bool>(),
                      "fold_distances: the covariance is beyond the range of float64");
    return {base + mean, (scatter + scatter.mT()).div_(2)};
  }

 private:
  void add(const Tensor& features,  // [n, D]
           int64_t fold) {
    shift_[fold].copy_(features.slice(0, 0, kRows).to(at::kDouble).mean(0));
    for (int64_t begin = 0; begin < features.size(0); begin += kRows) {
      const auto rows = features.slice(0, begin, begin + kRows).to(at::kDouble) - shift_[fold];
      outer_[fold].addmm_(rows.mT(), rows);
      sum_[fold].add_(rows.sum(0));
    }
  }

  std::vector<int64_t> count_;  // [K]
  Tensor sum_, shift_;          // [K, D] float64
  Tensor outer_;                // [K, D, D] float64
};

// ---------------------------------------------------------------- prepared reference

// Rows [N, R] that are centred (sum to 0) -> [N - 1, R] with the same scatter: a Householder
// reflection turns (1, ..., 1) into the first axis, so that no exact zero has to come out of a
// rounded problem.
Tensor without_mean(const Tensor& centred) {
  const auto n = static_cast<double>(centred.size(0));
  return centred.slice(0, 1) + centred[0] / (std::sqrt(n) - 1);
}

class FrechetReference {
 public:
  FrechetReference(const Tensor& mu,   // [D]
                   const Tensor& cov)  // [D, D]
      : side_(gaussian(mu.detach().clone(), cov.detach().clone(), "FrechetReference", "")) {
    TORCH_CHECK_VALUE(mu.dim() == 1 && cov.dim() == 2 && at::isfinite(mu).all().item<bool>(),
                      "FrechetReference: mu must be [D], finite, and cov [D, D], got ", mu.sizes(),
                      " and ", cov.sizes());
  }

  Tensor distance(const Tensor& mu,           // [..., D]
                  const Tensor& cov) const {  // [..., D, D] -> [...]
    if (at::GradMode::is_enabled() && (mu.requires_grad() || cov.requires_grad())) {
      return op<Distance>("neon_ext::frechet_distance").call(side_.mu, side_.cov, mu, cov);
    }
    return neon::distance(side_, gaussian(mu, cov, "frechet_distance", ""));
  }

  Tensor distance_from_features(const Tensor& features) const {  // [N, D] -> []
    check_features(features, "distance_from_features");
    const bool differentiable = at::GradMode::is_enabled() && features.requires_grad();
    if (features.size(0) > features.size(1) || differentiable) {
      const auto [mean, cov] = feature_moments(features);
      return distance(mean, cov);
    }
    // N centred rows have rank N - 1: a problem of that size.
    const auto f = features.to(at::kDouble);
    const auto mean = f.mean(0);
    const auto rows = without_mean(f - mean) / std::sqrt(static_cast<double>(f.size(0) - 1));
    return neon::distance(side_, {mean, {}, {rows.mT()}, {}});
  }

  // Contiguous folds as torch.tensor_split makes them: the first N % K have one row more.
  std::tuple<double, std::vector<double>> fold_distances(const Tensor& features,  // [N, D]
                                                         int64_t folds) const {
    TORCH_CHECK_VALUE(folds >= 1, "fold_distances: folds = ", folds, " must be at least 1");
    check_features(features, "fold_distances");
    const at::NoGradGuard no_grad;
    const int64_t n = features.size(0);
    std::vector<int64_t> ends{0};
    for (int64_t k = 0; k < folds; ++k) {
      ends.push_back(ends.back() + n / folds + (k < n % folds ? 1 : 0));
    }
    TORCH_CHECK_VALUE(n - ends[1] >= 2, "fold_distances: of ", n, " features in ", folds,
                      " folds fewer than 2 are left without the first fold");
    return n > features.size(1) ? from_moments(features, ends) : from_rows(features, ends);
  }

 private:
  using Distances = std::tuple<double, std::vector<double>>;

  void check_features(const Tensor& features,          // [N, D]
                      const std::string& who) const {  // begins the messages
    TORCH_CHECK_VALUE(features.dim() == 2 && features.size(0) >= 2 && is_dense(features) &&
                          at::isFloatingType(features.scalar_type()),
                      who, ": features must be [N, D] dense floating point with N >= 2, got ",
                      features.layout(), " ", describe(features));
    TORCH_CHECK_VALUE(
        features.size(1) == side_.mu.size(0) && features.device() == side_.mu.device(), who,
        ": features must be [N, ", side_.mu.size(0), "] on ", side_.mu.device(),
        " as the reference, got ", describe(features));
    TORCH_CHECK_VALUE(at::isfinite(features.detach()).all().item<bool>(), who,
                      ": features have entries that are not finite");
  }

  // More features than dimensions: moments of all folds, and of all but one.
  Distances from_moments(const Tensor& features, const std::vector<int64_t>& ends) const {
    const auto folds = static_cast<int64_t>(ends.size()) - 1;
    const FoldMoments moments(features, ends);
    const auto without_fold = [&](int64_t left_out) {  // -1: none
      Folds chosen;
      for (int64_t k = 0; k < folds; ++k) {
        if (k != left_out) {
          chosen.push_back(k);
        }
      }
      const auto [mean, cov] = moments.of(chosen);
      return distance(mean, cov).item<double>();
    };
    const double whole = without_fold(-1);
    std::vector<double> without;
    for (int64_t k = 0; k < folds; ++k) {
      without.push_back(without_fold(k));
    }
    return {whole, without};
  }

  // No more features than dimensions: tr (C_ref C)^(1/2) is the sum of singular values of the
  // centred features times the reference's factor, divided by sqrt(n - 1). The product is computed
  // once; each fold's absence is a choice of its rows. On the CPU their Gram matrices are parts of
  // one, too.
  Distances from_rows(const Tensor& features, const std::vector<int64_t>& ends) const {
    const auto f = features.to(at::kDouble);
    const auto mean = f.mean(0), centred = f - mean;           // [D], [N, D]
    const auto product = at::matmul(centred, side_.factor.l);  // [N, R]
    const auto squares = centred.square().sum(1);              // [N]
    const bool by_gram = product.is_cpu() && f.size(0) > kSmall;
    const auto gram = by_gram ? at::matmul(product, product.mT()) : Tensor();  // [N, N]
    const auto rows = at::arange(f.size(0), f.options().dtype(at::kLong));
    double largest = 0;
    bool accurate = by_gram;

    const auto value = [&](const Tensor& kept) {  // [n] row numbers
      const auto n = static_cast<double>(kept.numel());
      const auto shift = centred.index_select(0, kept).mean(0);
      const auto means = (side_.mu - (mean + shift)).square().sum().item<double>();
      const double scatter = squares.index_select(0, kept).sum().item<double>() -
                             n * shift.square().sum().item<double>();
      double root = 0;
      if (accurate) {
        const auto found = gram_sum(centred_gram(gram, kept), largest);
        largest = found.largest;
        accurate = found.accurate();
        root = found.sum;
      }
      if (!accurate) {
        const auto chosen = product.index_select(0, kept);
        root = singular_sum(without_mean(chosen - chosen.mean(0)), by_gram ? -INFINITY : NAN)
                   .item<double>();
      }
      if (side_.root.defined()) {
        root *= side_.root.item<double>();
      }
      const double total =
          means + side_.trace().item<double>() + scatter / (n - 1) - 2 * root / std::sqrt(n - 1);
      TORCH_CHECK_VALUE(std::isfinite(total),
                        "fold_distances: the result is beyond the range of float64");
      return std::max(total, 0.0);
    };
    const double whole = value(rows);
    std::vector<double> without;
    for (size_t k = 0; k + 1 < ends.size(); ++k) {
      without.push_back(value(at::cat({rows.slice(0, 0, ends[k]), rows.slice(0, ends[k + 1])})));
    }
    return {whole, without};
  }

  // The Gram matrix [n - 1, n - 1] of without_mean() of the kept rows, from that of all rows.
  static Tensor centred_gram(const Tensor& gram,    // [N, N]
                             const Tensor& kept) {  // [n] row numbers
    auto g = gram.index_select(0, kept).index_select(1, kept);
    const auto row_means = g.mean(1);
    g.sub_(row_means.unsqueeze(1)).sub_(row_means).add_(row_means.mean());
    const double a = 1 / (std::sqrt(static_cast<double>(kept.numel())) - 1);
    const auto first = g[0].slice(0, 1) * a;  // [n - 1]
    return g.slice(0, 1).slice(1, 1) + first + first.unsqueeze(1) + g[0][0] * (a * a);
  }

  Gaussian side_;
};

}  // namespace

void bind_statistics(py::module_& m) {
  using py::arg;
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<FrechetReference>(
      m, "FrechetReference",
      "One side of many Fréchet distances: the factor of its covariance is computed once.")
      .def(py::init<const Tensor&, const Tensor&>(), arg("mu"), arg("cov"), release(),
           "mu [D], cov [D, D].")
      .def("distance", &FrechetReference::distance, arg("mu"), arg("cov"), release(),
           "Distance to mu [..., D], cov [..., D, D] -> [...] float64; differentiable in both.")
      .def("distance_from_features", &FrechetReference::distance_from_features, arg("features"),
           release(),
           "Distance to the moments of features [N, D], N >= 2; differentiable. For N <= D an\n"
           "(N - 1)-dimensional problem is solved.")
      .def(
          "fold_distances", &FrechetReference::fold_distances, arg("features"), arg("folds") = 20,
          release(),
          "(distance, [distance without fold k for every k]) of features [N, D], floats. Folds are "
          "contiguous,\nas torch.tensor_split(features, folds) makes them. N > D: by moments of "
          "the "
          "folds. N <= D: by N x N\nproblems, several times faster. At least 2 rows must be left; "
          "not "
          "differentiable.");

  m.def("_trace_norm", &trace_norm, arg("B"), arg("method") = "auto", release(),
        "Sum of singular values of B [M, N] float64 by 'auto', 'gram' or 'polar'; for tests.");
  m.def(
      "_polar_root",
      [](const Tensor& l1, const Tensor& l2) {
        return polar_root({l1, NAN, true}, {l2, NAN, true}).item<double>();
      },
      arg("L1"), arg("L2"), release(),
      "What CUDA computes of two lower triangular [D, D] float64, on any device; for tests.");
}

// Matrix products and factorisations of ATen: the same code on CPU and CUDA.
TORCH_LIBRARY_IMPL(neon_ext, CompositeExplicitAutograd, m) {
  m.impl("sqrtm", sqrtm);
  m.impl("frechet_distance", frechet_distance);
  m.impl("frechet_distance_backward", frechet_distance_backward);
}
TORCH_LIBRARY_IMPL(neon_ext, CompositeImplicitAutograd, m) {
  m.impl("feature_moments", feature_moments);
}
TORCH_LIBRARY_IMPL(neon_ext, Autograd, m) {
  m.impl("frechet_distance",
         [](const Tensor& mu1, const Tensor& cov1, const Tensor& mu2, const Tensor& cov2) {
           return FrechetFunction::apply(mu1, cov1, mu2, cov2);
         });
}
TORCH_LIBRARY_IMPL(neon_ext, Meta, m) {
  m.impl("sqrtm", [](const Tensor& a) { return at::empty_like(a, at::kDouble); });
  m.impl("frechet_distance",
         [](const Tensor& mu1, const Tensor& cov1, const Tensor& mu2, const Tensor& cov2) {
           for (const Tensor* t : {&mu1, &cov1, &mu2, &cov2}) {
             TORCH_CHECK_VALUE(t->is_meta(), "frechet_distance: different devices: ", t->device(),
                               " and meta");
           }
           const auto rows = mu1.unsqueeze(-2) + cov1 + mu2.unsqueeze(-2) + cov2;  // [..., D, D]
           return rows.sum(at::IntArrayRef{-2, -1}, false, at::kDouble);
         });
  m.impl("frechet_distance_backward", [](const Tensor& grad, const Tensor& cov1,
                                         const Tensor& cov2) {
    const auto like = grad.unsqueeze(-1).unsqueeze(-1) + cov1 + cov2;
    return std::make_tuple(at::empty_like(like, at::kDouble), at::empty_like(like, at::kDouble));
  });
}

}  // namespace neon
