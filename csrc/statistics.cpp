// Moments, symmetric square roots and the Fréchet distance between Gaussians, in float64 on CPU and CUDA.
//
//   d = |mu1 - mu2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2),   tr (C1 C2)^(1/2) = sum of svd(L1^T L2)
//
// for any factors C = L L^T (Dowson & Landau 1982). Factors never take the square root of a rounded
// eigenvalue: one of C1 C2 that should be 0 and comes out as 1e-16 would add 1e-8 to the trace, times the
// number of null directions. They are Cholesky's (fast), or the eigenvectors of the numerical range where a
// covariance is singular to rounding. How the singular values are summed is chosen by measurement:
//   gram   eigenvalues of B B^T, accepted only when a bound on its rounding error is below 1e-10 of the trace
//   svd    singular values of B: always accurate, 3 to 4 times slower on CPU; also for small or batched B
//   polar  CUDA: tr U^T B with U the polar factor by minimax polynomials, matrix products only
#include <torch/csrc/autograd/custom_function.h>
#include <torch/extension.h>

#include <numeric>

#include "neon_ext.h"

namespace neon {
namespace {

using torch::autograd::variable_list;
using Folds = std::optional<std::vector<int64_t>>;
using State = std::map<std::string, Tensor>;
constexpr double kEps = 2.220446049250313e-16;
constexpr int64_t kSmall = 128;        // up to here one SVD costs less than the choice between methods
constexpr int64_t kRows = 4096;        // features converted to float64 at a time: 64 MB at D = 2048
constexpr double kGramAccept = 1e-10;  // relative error of the trace at which the gram method is accepted

// ---------------------------------------------------------------- checks and factors

// Rounding leaves relative asymmetry and negative eigenvalues of about 1e-13 in float64 statistics and 1e-6
// in float32 ones; what is beyond these bounds is not rounding.
double tolerance(at::ScalarType given) {
  return given == at::kDouble ? 1e-8 : 1e-3;
}

// float64, exactly symmetric; `who` begins the messages: operator and argument.
Tensor checked(const Tensor& cov, const std::string& who) {
  TORCH_CHECK_VALUE(cov.dim() >= 2 && cov.size(-1) == cov.size(-2) && at::isFloatingType(cov.scalar_type()),
                    who, " must be [..., D, D] floating point, got ", describe(cov));
  const auto c = cov.to(at::kDouble);
  if (c.numel() == 0) return c;
  const auto facts = at::stack({c.abs().amax(), (c - c.mT()).abs().amax()}).cpu();  // one transfer on CUDA
  const double largest = facts[0].item<double>(), skew = facts[1].item<double>();
  TORCH_CHECK_VALUE(std::isfinite(largest), who, " has entries that are not finite");
  TORCH_CHECK_VALUE(skew <= tolerance(cov.scalar_type()) * largest, who,
                    " is not symmetric: max |C - C^T| = ", skew, ", largest entry ", largest);
  return skew == 0 ? c : (c + c.mT()) / 2;
}

// Values up to n * eps of the largest are the rounding of zeros: a numerical rank, not a regularisation.
Tensor rounding(const Tensor& values, int64_t n) {
  return values.abs().amax(-1, true) * (kEps * static_cast<double>(n));
}

// Eigenvalues [..., D], ascending, with 0 for what is rounding, and eigenvectors [..., D, D].
std::pair<Tensor, Tensor> eigen(const Tensor& c, double negative_tolerance, const std::string& who) {
  const auto [values, vectors] = at::linalg_eigh(c);
  if (values.numel() == 0) return {values, vectors};
  const double excess = (values / values.abs().amax(-1, true).clamp_min(1e-300)).amin().item<double>();
  TORCH_CHECK_VALUE(excess >= -negative_tolerance, who,
                    " is not positive semi-definite: smallest eigenvalue ", excess,
                    " of the largest, beyond rounding (", negative_tolerance, ")");
  return {at::where(values > rounding(values, c.size(-1)), values, 0.0), vectors};
}

// L [..., D, R] with L L^T = c; R < D for a single covariance that is singular to rounding.
Tensor factor(const Tensor& c, double negative_tolerance, const std::string& who) {
  const int64_t d = c.size(-1);
  if (c.dim() == 2 && d > kSmall) {
    const auto [lower, info] = at::linalg_cholesky_ex(c);
    const auto pivots = lower.diagonal().square() / c.diagonal();
    if (info.item<int64_t>() == 0 && pivots.amin().item<double>() > kEps * static_cast<double>(d))
      return lower;
  }
  const auto [values, vectors] = eigen(c, negative_tolerance, who);
  const auto root = vectors * values.sqrt().unsqueeze(-2);
  if (c.dim() > 2) return root;
  return root.slice(1, d - values.count_nonzero().item<int64_t>());  // ascending: the range is at the end
}

// ---------------------------------------------------------------- sum of singular values

// Sum of sqrt(eigenvalues of B B^T), and a bound on its error: an eigenvalue is off by delta = 16 eps *
// largest (measured: below 4 eps * largest), so its root by delta / (2 root), at most sqrt(delta).
std::pair<double, double> trace_norm_gram(const Tensor& b) {
  const auto gram = b.size(0) <= b.size(1) ? at::matmul(b, b.mT()) : at::matmul(b.mT(), b);
  const auto roots = at::linalg_eigvalsh(gram).clamp_min(0).sqrt().cpu();
  if (roots.numel() == 0) return {0, 0};
  const double bound = std::sqrt(16 * kEps) * roots[-1].item<double>();
  const auto errors = (bound * bound / 2 / roots).clamp_max(bound);  // infinite at a root of 0
  return {roots.sum().item<double>(), errors.nan_to_num(0).sum().item<double>()};
}

// Odd quintics x (a + b x^2 + c x^4), each minimax to 1 on the range the previous one leaves, starting from
// [1e-12, 1] (Remez; the composition is that of Amsel et al., arXiv 2505.16932). Singular values below 1e-12
// of the largest are underestimated: at most D * 1e-12 of it is lost. The last step is Newton-Schulz.
constexpr double kPolar[][3] = {
    {8.51430227381, -25.2817505047, 18.7674482309},  {4.25715113685, -3.16021881306, 0.586482757214},
    {4.2571511366, -3.16021881289, 0.586482757195},  {4.25715113555, -3.16021881216, 0.586482757112},
    {4.25715113107, -3.16021880906, 0.586482756758}, {4.25715111198, -3.16021879586, 0.586482755252},
    {4.25715103074, -3.16021873967, 0.586482748842}, {4.25715068487, -3.16021850044, 0.586482721555},
    {4.25714921244, -3.16021748203, 0.586482605387}, {4.25714294412, -3.1602131465, 0.586482110845},
    {4.25711625918, -3.16019468967, 0.586480005521}, {4.257002662, -3.16011611903, 0.586471043169},
    {4.25651914563, -3.15978168405, 0.58643289505},  {4.25446226477, -3.15835888793, 0.586270600787},
    {4.24573330545, -3.15231889442, 0.585581642583}, {4.20906503461, -3.12691147403, 0.58268364186},
    {4.06143920119, -3.02402997763, 0.570951485191}, {3.55832428364, -2.66515051805, 0.530092389039},
    {2.55470589468, -1.88882055859, 0.442839996785}, {1.93049126617, -1.31036562996, 0.381085910381},
    {1.87505493773, -1.25006104057, 0.375006104109}, {1.875, -1.25, 0.375},
};

Tensor trace_norm_polar(const Tensor& given) {
  const auto b = given.size(0) >= given.size(1) ? given : given.mT().contiguous();
  if (b.numel() == 0) return b.new_zeros({});
  // The largest singular value is at most the fourth root of the sum of squares of B^T B.
  auto gram = at::matmul(b.mT(), b);
  const auto scale = at::linalg_matrix_norm(gram, "fro").sqrt().clamp_min(1e-300);
  auto x = b / scale;
  gram.div_(scale.square());
  constexpr size_t kSteps = std::size(kPolar);
  for (size_t i = 0; i < kSteps; ++i) {
    if (i > 0) gram = at::matmul(x.mT(), x);
    // At the end of a range the polynomials amplify rounding (13-fold each): step back by 1e-6, but at last.
    const double s = i + 1 < kSteps ? 1 - 1e-6 : 1, s2 = s * s;
    auto p = at::addmm(gram, gram, gram, kPolar[i][1] * s * s2, kPolar[i][2] * s * s2 * s2);
    p.diagonal().add_(kPolar[i][0] * s);
    x = at::matmul(x, p);
  }
  return (b * x).sum();
}

Tensor trace_norm(const Tensor& b, c10::string_view method) {
  TORCH_CHECK_VALUE(b.dim() >= 2 && b.scalar_type() == at::kDouble,
                    "trace_norm: B must be [..., M, N] float64");
  const bool automatic = method == "auto", gram = method == "gram", polar = method == "polar";
  TORCH_CHECK_VALUE(automatic || gram || polar || method == "svd", "trace_norm: method ", method,
                    " is not auto, gram, svd or polar");
  TORCH_CHECK_VALUE(b.dim() == 2 || !(gram || polar), "trace_norm: method ", method,
                    " takes one matrix, not a batch");
  const bool large = automatic && b.dim() == 2 && std::min(b.size(0), b.size(1)) > kSmall;
  if (polar || (large && b.is_cuda())) return trace_norm_polar(b);
  if (gram || large) {
    const auto [sum, error] = trace_norm_gram(b);
    if (gram || error <= kGramAccept * sum) return b.new_full({}, sum);
  }
  return at::linalg_svdvals(b).sum(-1);
}

// ---------------------------------------------------------------- square root and distance

Tensor sqrtm(const Tensor& a) {
  const auto [values, vectors] = eigen(checked(a, "sqrtm: A"), tolerance(a.scalar_type()), "sqrtm: A");
  const auto half = vectors * values.sqrt().sqrt().unsqueeze(-2);
  const auto root = at::matmul(half, half.mT());
  return (root + root.mT()) / 2;
}

struct Gaussian {
  Tensor mu;      // [..., D] float64
  Tensor cov;     // [..., D, D] float64, undefined where only the factor is known
  Tensor factor;  // [..., D, R], cov = factor factor^T
  Tensor trace() const { return cov.defined() ? cov.diagonal(0, -2, -1).sum(-1) : factor.square().sum(); }
};

Gaussian gaussian(const Tensor& mu, const Tensor& cov, const std::string& op, const std::string& side) {
  const auto c = checked(cov, op + ": cov" + side);
  TORCH_CHECK_VALUE(mu.dim() >= 1 && mu.size(-1) == c.size(-1) && at::isFloatingType(mu.scalar_type()) &&
                        mu.device() == c.device(),
                    op, ": mu", side, " must be [..., ", c.size(-1), "] floating point on the device of cov",
                    side, ", got ", describe(mu));
  return {mu.to(at::kDouble), c, factor(c, tolerance(cov.scalar_type()), op + ": cov" + side)};
}

Tensor distance(const Gaussian& a, const Gaussian& b) {
  TORCH_CHECK_VALUE(a.mu.size(-1) == b.mu.size(-1) && a.mu.device() == b.mu.device(),
                    "frechet_distance: different feature dimensions or devices: ", describe(a.mu), " and ",
                    describe(b.mu));
  const auto means = (a.mu - b.mu).square().sum(-1);
  TORCH_CHECK_VALUE(at::isfinite(means).all().item<bool>(), "frechet_distance: a mean is not finite");
  const auto root = trace_norm(at::matmul(a.factor.mT(), b.factor), "auto");
  // Rounding can leave a tiny negative distance between equal statistics; it is 0.
  return (means + a.trace() + b.trace() - 2 * root).clamp_min(0);
}

Tensor frechet_distance(const Tensor& mu1, const Tensor& cov1, const Tensor& mu2, const Tensor& cov2) {
  return distance(gaussian(mu1, cov1, "frechet_distance", "1"), gaussian(mu2, cov2, "frechet_distance", "2"));
}
using Distance = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&);

// d(distance)/d(cov1), d(distance)/d(cov2), times grad. With B = L1^T L2 = U S V^T and W1 = L1 U, W2 = L2 V:
//   d/dC2 = I - W1 S^+ W1^T,  d/dC1 = I - W2 S^+ W2^T,
// the form I - R (R C R)^(-1/2) R without differences of eigenvalues, so repeated ones do no harm. On the
// numerical null space (S below D * eps of the largest) S^+ is 0: the derivative along the range.
std::tuple<Tensor, Tensor> frechet_distance_backward(const Tensor& grad, const Tensor& cov1,
                                                     const Tensor& cov2) {
  const auto l1 = factor(checked(cov1, "cov1"), 1, "cov1"), l2 = factor(checked(cov2, "cov2"), 1, "cov2");
  const auto [u, s, vh] = at::linalg_svd(at::matmul(l1.mT(), l2), false);
  const auto identity = at::eye(cov1.size(-1), l1.options());
  const auto g = grad.unsqueeze(-1).unsqueeze(-1);
  if (s.size(-1) == 0) return {g * identity, g * identity};
  const auto inverse_root = at::where(s > rounding(s, cov1.size(-1)), s.rsqrt(), 0.0).unsqueeze(-2);
  const auto w1 = at::matmul(l1, u) * inverse_root, w2 = at::matmul(l2, vh.mT()) * inverse_root;
  return {g * (identity - at::matmul(w2, w2.mT())), g * (identity - at::matmul(w1, w1.mT()))};
}

struct FrechetFunction : torch::autograd::Function<FrechetFunction> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& mu1, const Tensor& cov1,
                        const Tensor& mu2, const Tensor& cov2) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({mu1, cov1, mu2, cov2});
    return op<Distance>("neon_ext::frechet_distance").call(mu1, cov1, mu2, cov2);
  }
  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "frechet_distance is differentiable once, not twice");
    using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&);
    const auto saved = ctx->get_saved_variables();
    const auto grad_mu = 2 * grads[0].unsqueeze(-1) * (saved[0].to(at::kDouble) - saved[2].to(at::kDouble));
    variable_list all{grad_mu, {}, -grad_mu, {}};
    if (ctx->needs_input_grad(1) || ctx->needs_input_grad(3))
      std::tie(all[1], all[3]) =
          op<Signature>("neon_ext::frechet_distance_backward").call(grads[0], saved[1], saved[3]);
    for (size_t i = 0; i < 4; ++i)  // sums over what was broadcast
      if (all[i].defined()) all[i] = at::sum_to(all[i], saved[i].sym_sizes()).to(saved[i].scalar_type());
    return all;
  }
};

std::tuple<Tensor, Tensor> feature_moments(const Tensor& features) {
  TORCH_CHECK_VALUE(features.dim() == 2 && at::isFloatingType(features.scalar_type()),
                    "feature_moments: features must be [N, D] floating point, got ", features.sizes());
  const auto n = features.sym_size(0);
  TORCH_CHECK_VALUE(n >= 2, "feature_moments: a covariance needs at least 2 rows, got ", n);
  const auto f = features.to(at::kDouble);
  const auto mean = f.mean(0);
  const auto centred = f - mean;
  return {mean, at::matmul(centred.mT(), centred) / (n - 1)};
}

// ---------------------------------------------------------------- prepared reference

class FrechetReference {
 public:
  FrechetReference(const Tensor& mu, const Tensor& cov, std::optional<int64_t> count)
      : side_(gaussian(mu.detach(), cov.detach(), "FrechetReference", "")), count_(count) {
    TORCH_CHECK_VALUE(mu.dim() == 1 && cov.dim() == 2 && at::isfinite(mu).all().item<bool>(),
                      "FrechetReference: mu must be [D], finite, and cov [D, D], got ", mu.sizes(), " and ",
                      cov.sizes());
  }

  Tensor mu() const { return side_.mu; }
  Tensor cov() const { return side_.cov; }

  Tensor distance(const Tensor& mu, const Tensor& cov) const {
    if (at::GradMode::is_enabled() && (mu.requires_grad() || cov.requires_grad()))
      return op<Distance>("neon_ext::frechet_distance").call(side_.mu, side_.cov, mu, cov);
    return neon::distance(side_, gaussian(mu, cov, "frechet_distance", ""));
  }

  // N centred rows have rank N - 1. A Householder reflection that turns (1, ..., 1) into the first axis
  // leaves N - 1 rows with the same scatter: no exact zero has to come out of a rounded problem.
  Tensor distance_from_features(const Tensor& features) const {
    TORCH_CHECK_VALUE(
        features.dim() == 2 && features.size(0) >= 2 && at::isFloatingType(features.scalar_type()),
        "distance_from_features: features must be [N, D] floating point with N >= 2, got ",
        describe(features));
    if (features.size(0) > features.size(1) || (at::GradMode::is_enabled() && features.requires_grad())) {
      const auto [mean, cov] = feature_moments(features);
      return distance(mean, cov);
    }
    const auto f = features.to(at::kDouble);
    const auto mean = f.mean(0);
    const auto centred = f - mean;
    const auto n = static_cast<double>(f.size(0));
    const auto rows =
        (centred.slice(0, 1) + centred[0] / (std::sqrt(n) - 1)) / std::sqrt(n - 1);  // [N - 1, D]
    return neon::distance(side_, {mean, {}, rows.mT()});
  }

  std::map<std::string, double> certificate(const Tensor& mu, const Tensor& cov,
                                            std::optional<int64_t> count) const {
    const double total = distance(mu.detach(), cov.detach()).item<double>();
    const double mean_term = (side_.mu - mu.detach()).square().sum().item<double>();
    const auto d = static_cast<double>(side_.cov.size(0));
    std::map<std::string, double> out{{"distance", total}, {"mean_term", mean_term}, {"dimension", d}};
    out["cov_term"] = std::max(0.0, total - mean_term);
    const auto add_side = [&](const Tensor& c, const std::string& suffix, std::optional<int64_t> n) {
      const auto values = at::linalg_eigvalsh(c);
      out["rank" + suffix] = values.gt(rounding(values, c.size(0))).sum().item<double>();
      out["clipped" + suffix] = -values.clamp_max(0).sum().item<double>();
      if (n) out["n_over_d" + suffix] = static_cast<double>(*n) / d;
    };
    add_side(side_.cov, "_ref", count_);
    add_side(checked(cov.detach(), "certificate: cov"), "", count);
    return out;
  }

 private:
  Gaussian side_;
  std::optional<int64_t> count_;
};

// ---------------------------------------------------------------- moments

// Mean and covariance of features in one pass: float64 sums of (f - shift) and of its outer products, per
// fold. The shift is close to the mean: S - N mu mu^T does not cancel where |mu| is far above the spread.
class Moments {
 public:
  Moments(int64_t dim, int64_t folds, const std::string& device) : count_(std::max<int64_t>(folds, 0), 0) {
    TORCH_CHECK_VALUE(dim >= 1 && folds >= 1, "Moments: dim = ", dim, " and folds = ", folds,
                      " must be at least 1");
    sum_ = at::zeros({folds, dim}, at::TensorOptions().dtype(at::kDouble).device(at::Device(device)));
    outer_ = at::zeros({folds, dim, dim}, sum_.options());
  }

  void update(const Tensor& features, int64_t fold) {
    chosen(std::vector<int64_t>{fold});
    TORCH_CHECK_VALUE(features.dim() == 2 && features.size(1) == sum_.size(1) &&
                          features.device() == sum_.device() && at::isFloatingType(features.scalar_type()),
                      "Moments.update: features must be [N, ", sum_.size(1), "] floating point on ",
                      sum_.device(), ", got ", describe(features));
    const at::NoGradGuard no_grad;
    // A NaN would spoil all earlier sums. CUDA would wait for the answer: there mean() and cov() find it.
    TORCH_CHECK_VALUE(features.is_cuda() || at::isfinite(features).all().item<bool>(),
                      "Moments.update: features have entries that are not finite; nothing was added");
    if (features.size(0) == 0) return;
    if (!shift_.defined()) shift_ = features.slice(0, 0, kRows).to(at::kDouble).mean(0);
    for (int64_t begin = 0; begin < features.size(0); begin += kRows) {
      const auto rows = features.slice(0, begin, begin + kRows).to(at::kDouble) - shift_;
      sum_[fold].add_(rows.sum(0));
      outer_[fold].addmm_(rows.mT(), rows);
    }
    count_[fold] += features.size(0);
  }

  // Sums about another shift, moved by d: sum + n d and outer + sum d^T + d sum^T + n d d^T.
  void merge(const Moments& other) {
    TORCH_CHECK_VALUE(other.sum_.sizes() == sum_.sizes(),
                      "Moments.merge: this has [folds, dim] = ", sum_.sizes(), ", the other ",
                      other.sum_.sizes());
    if (!other.shift_.defined()) return;
    const at::NoGradGuard no_grad;
    const auto other_shift = other.shift_.to(sum_.device());
    if (!shift_.defined()) shift_ = other_shift;
    const auto d = other_shift - shift_;
    for (size_t k = 0; k < count_.size(); ++k) {
      const auto n = static_cast<double>(other.count_[k]);
      const auto sum = other.sum_[k].to(sum_.device());
      const auto cross = at::outer(sum, d);
      outer_[k].add_(other.outer_[k].to(sum_.device())).add_(cross + cross.mT()).add_(at::outer(d, d), n);
      sum_[k].add_(sum).add_(d, n);
      count_[k] += other.count_[k];
    }
  }

  int64_t count(const Folds& folds) const {
    int64_t n = 0;
    for (int64_t k : chosen(folds)) n += count_[k];
    return n;
  }
  Tensor mean(const Folds& folds) const { return shifted_mean(folds, 1).add_(shift_); }
  Tensor cov(const Folds& folds) const {
    const auto mean = shifted_mean(folds, 2);
    const auto n = static_cast<double>(count(folds));
    const auto scatter = total(outer_, folds).sub_(at::outer(mean, mean), n).div_(n - 1);
    return (scatter + scatter.mT()).div_(2);
  }

  State state_dict() const {
    const auto shift = shift_.defined() ? shift_.clone() : at::empty({0}, sum_.options());
    return {{"count", at::tensor(count_, at::kLong)},
            {"sum", sum_.clone()},
            {"outer", outer_.clone()},
            {"shift", shift}};
  }

  void load_state_dict(const State& state) {
    for (const char* key : {"count", "sum", "outer", "shift"})
      TORCH_CHECK_VALUE(state.count(key), "Moments.load_state_dict: '", key, "' is missing");
    const auto count = state.at("count").to(at::kCPU, at::kLong).contiguous();
    const auto &sum = state.at("sum"), &outer = state.at("outer"), &shift = state.at("shift");
    TORCH_CHECK_VALUE(
        sum.sizes() == sum_.sizes() && outer.sizes() == outer_.sizes() && count.numel() == sum_.size(0) &&
            (shift.numel() == sum_.size(1) || shift.numel() == 0),
        "Moments.load_state_dict: saved sums have shape ", outer.sizes(), ", this ", outer_.sizes());
    TORCH_CHECK_VALUE(
        count.ge(0).all().item<bool>() && (shift.numel() > 0 || count.eq(0).all().item<bool>()),
        "Moments.load_state_dict: 'count' is negative, or 'shift' is empty though there are features");
    sum_.copy_(sum);
    outer_.copy_(outer);
    shift_ = shift.numel() ? shift.to(sum_.options()).reshape({-1}).clone() : Tensor();
    count_.assign(count.const_data_ptr<int64_t>(), count.const_data_ptr<int64_t>() + count.numel());
  }

 private:
  std::vector<int64_t> chosen(const Folds& folds) const {
    std::vector<int64_t> all(count_.size());
    std::iota(all.begin(), all.end(), 0);
    for (int64_t k : folds.value_or(all)) {
      TORCH_CHECK_VALUE(k >= 0 && k < sum_.size(0), "Moments: fold ", k, " of ", sum_.size(0));
      TORCH_CHECK_VALUE(!folds || std::count(folds->begin(), folds->end(), k) == 1, "Moments: fold ", k,
                        " is named twice");
    }
    return folds.value_or(all);
  }

  Tensor total(const Tensor& sums, const Folds& folds) const {
    auto result = at::zeros_like(sums[0]);
    for (int64_t k : chosen(folds)) result.add_(sums[k]);
    return result;
  }

  Tensor shifted_mean(const Folds& folds, int64_t at_least) const {
    const int64_t n = count(folds);
    TORCH_CHECK_VALUE(n >= at_least, "Moments: ", n, " features, but at least ", at_least, " are needed");
    const auto sum = total(sum_, folds);
    TORCH_CHECK_VALUE(at::isfinite(sum).all().item<bool>(), "Moments: some features were not finite");
    return sum / static_cast<double>(n);
  }

  std::vector<int64_t> count_;  // per fold
  Tensor sum_, outer_;          // [K, D] and [K, D, D] float64
  Tensor shift_;                // [D] float64, undefined until the first features come
};

}  // namespace

void bind_statistics(py::module_& m) {
  using py::arg;
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<FrechetReference>(
      m, "FrechetReference",
      "One side of many Fréchet distances: the factor of its covariance is computed once.")
      .def(py::init<const Tensor&, const Tensor&, std::optional<int64_t>>(), arg("mu"), arg("cov"),
           arg("count") = py::none(), release(),
           "mu [D], cov [D, D]; count: how many features they come from.")
      .def("distance", &FrechetReference::distance, arg("mu"), arg("cov"), release(),
           "Distance to mu [..., D], cov [..., D, D] -> [...] float64; differentiable in both.")
      .def("distance_from_features", &FrechetReference::distance_from_features, arg("features"), release(),
           "Distance to the moments of features [N, D], N >= 2. For N <= D an (N - 1)-dimensional problem is "
           "solved.")
      .def("certificate", &FrechetReference::certificate, arg("mu"), arg("cov"), arg("count") = py::none(),
           release(),
           "dict: distance, mean_term, cov_term, dimension; for both sides (suffix _ref: this one) numerical "
           "rank, mass\n"
           "clipped from negative eigenvalues, n_over_d where the count is known (below 1: the covariance is "
           "singular).")
      .def_property_readonly("mu", &FrechetReference::mu)
      .def_property_readonly("cov", &FrechetReference::cov);

  const char* folds_doc = "folds: which folds to combine (default: all), e.g. all but one for a jackknife.";
  py::class_<Moments>(
      m, "Moments",
      "Running mean and covariance of features in K folds; shifted float64 sums, one batch in memory.\n"
      "Merging and batch splits change nothing beyond rounding (1e-12 relative).")
      .def(py::init([](int64_t dim, int64_t folds, const py::object& device) {
             return Moments(dim, folds, py::str(device));
           }),
           arg("dim"), arg("folds") = 1, arg("device") = "cpu")
      .def("update", &Moments::update, arg("features"), arg("fold") = 0, release(),
           "Add features [N, D] (fp32, fp16, bf16 or fp64, on this device) to one fold.")
      .def("merge", &Moments::merge, arg("other"), release(),
           "Add another's sums, fold by fold (other ranks, runs).")
      .def("count", &Moments::count, arg("folds") = py::none(), folds_doc)
      .def("mean", &Moments::mean, arg("folds") = py::none(), release(), folds_doc)
      .def("cov", &Moments::cov, arg("folds") = py::none(), release(), folds_doc)
      .def("state_dict", &Moments::state_dict,
           "count [K], sum [K, D], outer [K, D, D], shift [D] as tensors.")
      .def("load_state_dict", &Moments::load_state_dict, arg("state"));
}

// Matrix products and factorisations of ATen: the same code on CPU and CUDA.
TORCH_LIBRARY_IMPL(neon_ext, CompositeExplicitAutograd, m) {
  m.impl("sqrtm", sqrtm);
  m.impl("frechet_distance", frechet_distance);
  m.impl("frechet_distance_backward", frechet_distance_backward);
  m.impl("trace_norm", trace_norm);
}
TORCH_LIBRARY_IMPL(neon_ext, CompositeImplicitAutograd, m) {
  m.impl("feature_moments", feature_moments);
}
TORCH_LIBRARY_IMPL(neon_ext, Autograd, m) {
  m.impl("frechet_distance", [](const Tensor& mu1, const Tensor& cov1, const Tensor& mu2,
                                const Tensor& cov2) { return FrechetFunction::apply(mu1, cov1, mu2, cov2); });
}
TORCH_LIBRARY_IMPL(neon_ext, Meta, m) {
  m.impl("sqrtm", [](const Tensor& a) { return at::empty_like(a, at::kDouble); });
  m.impl("trace_norm", [](const Tensor& b, c10::string_view) { return b.sum(at::IntArrayRef{-2, -1}); });
  m.impl("frechet_distance",
         [](const Tensor& mu1, const Tensor& cov1, const Tensor& mu2, const Tensor& cov2) {
           const auto rows = mu1.unsqueeze(-2) + cov1 + mu2.unsqueeze(-2) + cov2;  // [..., D, D]
           return rows.sum(at::IntArrayRef{-2, -1}, false, at::kDouble);
         });
  m.impl("frechet_distance_backward", [](const Tensor& grad, const Tensor& cov1, const Tensor& cov2) {
    const auto like = grad.unsqueeze(-1).unsqueeze(-1) + cov1 + cov2;
    return std::make_tuple(at::empty_like(like, at::kDouble), at::empty_like(like, at::kDouble));
  });
}

}  // namespace neon
