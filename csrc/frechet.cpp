#include "neon_ext.h"

#include <torch/library.h>

namespace neon {
namespace {

at::Tensor factor(const at::Tensor& cov) {
  auto [values, vectors] = at::linalg_eigh(cov);
  return vectors * values.clamp_min(0).sqrt().unsqueeze(-2);
}
at::Tensor sqrtm_cpu(const at::Tensor& a) {
  auto [values, vectors] = at::linalg_eigh(a.to(at::kDouble));
  return at::matmul(vectors * values.clamp_min(0).sqrt().unsqueeze(-2), vectors.mT());
}
at::Tensor frechet_cpu(const at::Tensor& mu1, const at::Tensor& cov1, const at::Tensor& mu2, const at::Tensor& cov2) {
  auto b = at::matmul(factor(cov1.to(at::kDouble)).mT(), factor(cov2.to(at::kDouble)));
  auto trace = cov1.to(at::kDouble).diagonal(0, -2, -1).sum(-1) + cov2.to(at::kDouble).diagonal(0, -2, -1).sum(-1);
  return ((mu1 - mu2).to(at::kDouble).square().sum(-1) + trace - 2 * at::linalg_svdvals(b).sum(-1)).clamp_min(0);
}
TORCH_LIBRARY_IMPL(neon_ext, CPU, m) {
  m.impl("sqrtm", sqrtm_cpu);
  m.impl("frechet_distance", frechet_cpu);
}
}  // namespace
}  // namespace neon
