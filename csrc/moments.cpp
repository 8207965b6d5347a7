// Mean and covariance of features in one pass: float64 sums of (f - shift) and of its outer products, per
// fold. The shift is close to the mean, so that S - N mu mu^T does not cancel even when |mu| is far above the
// spread.
#include "neon_ext.h"

#include <c10/core/GradMode.h>

namespace neon {
namespace {
constexpr int64_t kRows = 4096;  // rows converted to float64 at a time: 64 MB at D = 2048
}

Moments::Moments(int64_t dim, int64_t folds, at::Device device)
    : dim_(dim), count_(folds > 0 ? folds : 0, 0) {
  TORCH_CHECK_VALUE(dim >= 1 && folds >= 1, "Moments: dim = ", dim, " and folds = ", folds,
                    " must be at least 1");
  const auto options = at::TensorOptions().dtype(at::kDouble).device(device);
  sum_ = at::zeros({folds, dim}, options);
  outer_ = at::zeros({folds, dim, dim}, options);
}

void Moments::check_fold(int64_t fold) const {
  TORCH_CHECK_VALUE(fold >= 0 && fold < static_cast<int64_t>(count_.size()), "Moments: fold ", fold, " of ",
                    count_.size());
}

void Moments::update(const at::Tensor& features, int64_t fold) {
  check_fold(fold);
  TORCH_CHECK_VALUE(features.dim() == 2 && features.size(1) == dim_, "Moments.update: features must be [N, ",
                    dim_, "], got ", features.sizes());
  TORCH_CHECK_VALUE(at::isFloatingType(features.scalar_type()),
                    "Moments.update: features must be floating point, got ", features.scalar_type());
  TORCH_CHECK_VALUE(features.device() == sum_.device(), "Moments.update: features are on ", features.device(),
                    ", the sums on ", sum_.device());
  const c10::AutoGradMode no_grad(false);
  // A NaN would spoil all earlier sums. On CUDA this would wait for the device: there mean() and cov() find
  // it.
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
void Moments::merge(const Moments& other) {
  TORCH_CHECK_VALUE(other.dim_ == dim_ && other.count_.size() == count_.size(),
                    "Moments.merge: this has dim ", dim_, " and ", count_.size(), " folds, the other dim ",
                    other.dim_, " and ", other.count_.size());
  if (!other.shift_.defined()) return;
  const c10::AutoGradMode no_grad(false);
  const auto device = sum_.device();
  if (!shift_.defined()) shift_ = other.shift_.to(device).clone();
  const auto d = other.shift_.to(device) - shift_;
  for (size_t k = 0; k < count_.size(); ++k) {
    const double n = static_cast<double>(other.count_[k]);
    const auto sum = other.sum_[k].to(device);
    const auto cross = at::outer(sum, d);
    outer_[k].add_(other.outer_[k].to(device)).add_(cross + cross.mT()).add_(at::outer(d, d), n);
    sum_[k].add_(sum).add_(d, n);
    count_[k] += other.count_[k];
  }
}

std::vector<int64_t> Moments::chosen(const std::optional<std::vector<int64_t>>& folds) const {
  std::vector<int64_t> all(count_.size());
  for (size_t k = 0; k < all.size(); ++k) all[k] = static_cast<int64_t>(k);
  if (!folds) return all;
  std::vector<bool> seen(count_.size(), false);
  for (int64_t k : *folds) {
    check_fold(k);
    TORCH_CHECK_VALUE(!seen[k], "Moments: fold ", k, " is named twice");
    seen[k] = true;
  }
  return *folds;
}

int64_t Moments::count(const std::optional<std::vector<int64_t>>& folds) const {
  int64_t n = 0;
  for (int64_t k : chosen(folds)) n += count_[k];
  return n;
}

at::Tensor Moments::shifted_mean(const std::optional<std::vector<int64_t>>& folds, int64_t at_least) const {
  const int64_t n = count(folds);
  TORCH_CHECK_VALUE(n >= at_least, "Moments: ", n, " features, but at least ", at_least, " are needed");
  auto total = at::zeros_like(sum_[0]);
  for (int64_t k : chosen(folds)) total.add_(sum_[k]);
  TORCH_CHECK_VALUE(at::isfinite(total).all().item<bool>(), "Moments: some features were not finite");
  return total.div_(static_cast<double>(n));
}

at::Tensor Moments::mean(const std::optional<std::vector<int64_t>>& folds) const {
  return shifted_mean(folds, 1).add_(shift_);
}

at::Tensor Moments::cov(const std::optional<std::vector<int64_t>>& folds) const {
  const auto mean = shifted_mean(folds, 2);
  const auto n = static_cast<double>(count(folds));
  auto total = at::zeros_like(outer_[0]);
  for (int64_t k : chosen(folds)) total.add_(outer_[k]);
  total.sub_(at::outer(mean, mean), n).div_(n - 1);
  return (total + total.mT()).div_(2);
}

std::map<std::string, at::Tensor> Moments::state_dict() const {
  return {{"count", at::tensor(count_, at::kLong)},
          {"sum", sum_.clone()},
          {"outer", outer_.clone()},
          {"shift", shift_.defined() ? shift_.clone() : at::empty({0}, sum_.options())}};
}

void Moments::load_state_dict(const std::map<std::string, at::Tensor>& state) {
  for (const char* key : {"count", "sum", "outer", "shift"})
    TORCH_CHECK_VALUE(state.count(key), "Moments.load_state_dict: '", key, "' is missing");
  const auto count = state.at("count").to(at::kCPU, at::kLong).contiguous();
  const auto& shift = state.at("shift");
  TORCH_CHECK_VALUE(state.at("sum").sizes() == sum_.sizes() && state.at("outer").sizes() == outer_.sizes() &&
                        count.numel() == sum_.size(0) && (shift.numel() == dim_ || shift.numel() == 0),
                    "Moments.load_state_dict: saved sums have shape ", state.at("outer").sizes(),
                    ", this has ", outer_.sizes());
  sum_.copy_(state.at("sum"));
  outer_.copy_(state.at("outer"));
  shift_ = shift.numel() ? shift.to(sum_.options()).clone() : at::Tensor();
  count_.assign(count.const_data_ptr<int64_t>(), count.const_data_ptr<int64_t>() + count.numel());
}

}  // namespace neon
