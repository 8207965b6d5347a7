#!/usr/bin/env bash
# Build with CUDA, run every CUDA test and print the GPU benchmark tables; under 8 minutes on one data-centre GPU.
# Needs an environment with a CUDA build of torch, pytest, scipy, pybind11 and ninja. PYTHON picks the interpreter; EDM is
# a checkout of github.com/NVlabs/edm to compare sampling with (optional).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
NEON_CUDA=1 $python -m pip install -q --no-build-isolation --no-deps .
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
$python -m pytest -q tests/test_extrapolate.py tests/test_mlp_ddim.py tests/test_frechet.py -k "cuda or agree"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    timeout 120 compute-sanitizer --tool $tool --error-exitcode 1 $python -m pytest -q -x \
      tests/test_extrapolate.py tests/test_mlp_ddim.py -k "cuda and (unaligned or many_tensors or matches_float64)"
  done
fi
$python tests/bench_extrapolate.py --device cuda
$python tests/bench_frechet.py --device cuda
$python tests/bench_toy.py --device cuda --configurations 100 --large
$python tests/bench_edm.py --device cuda --preset cifar10 --repeats 3 --precision fp32 tf32 bf16 fp16 ${EDM:+--edm "$EDM"}
