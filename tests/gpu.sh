#!/usr/bin/env bash
# Build with CUDA, run every CUDA test and print the GPU benchmark tables; about 10 minutes on one
# data-centre GPU. Needs an environment with a CUDA build of torch, pytest, scipy, pybind11 and ninja.
# PYTHON picks the interpreter; EDM is a checkout of github.com/NVlabs/edm to compare sampling with
# (optional). A step that fails is reported, and the next one runs.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=()

step() {  # name, command...
  local name=$1
  shift
  echo "== $name"
  if "$@"; then
    echo "== $name: ok"
  else
    echo "== $name: FAILED (exit $?)"
    failed+=("$name")
  fi
}

step gpu nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
step build env NEON_CUDA=1 "$python" -m pip install -q --no-build-isolation --no-deps .
step tests "$python" -m pytest -q -m "" tests/test_extrapolate.py tests/test_mlp_ddim.py \
  tests/test_frechet.py -k cuda
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    # memcheck sees nothing wrong inside a block that torch's allocator keeps: it allocates plainly
    step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 180 compute-sanitizer --tool "$tool" \
      --error-exitcode 1 "$python" -m pytest -q -x tests/test_extrapolate.py \
      tests/test_mlp_ddim.py -k "cuda and (unaligned or many_tensors or matches_float64)"
  done
else
  echo "== memcheck, racecheck: NOT run (no compute-sanitizer here)"
fi
step "extrapolation" "$python" tests/bench_extrapolate.py --device cuda
step "Fréchet distance" "$python" tests/bench_frechet.py --device cuda
for each in 2 3; do
  step "toy, $each trajectories a thread" env ADAPTIVE_DDIM_EACH=$each "$python" \
    tests/bench_toy.py --device cuda --configurations 100 --large
done
step "EDM sampling" "$python" tests/bench_edm.py --device cuda --preset cifar10 --repeats 3 \
  --precision fp32 tf32 bf16 fp16 ${EDM:+--edm "$EDM"}

if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all steps passed"
