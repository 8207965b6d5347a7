#!/usr/bin/env bash
# A GPU in five minutes: build, CUDA tests, toy and glyphs on GPU and CPU, short benchmarks.
#
#     bash tests/gpu.sh
#
# One line a step and a result in $OUT/table.md (default runs/gpu), what they printed in $OUT/log.txt.
# A step that fails or passes its time limit is reported, and the next one runs.
# PYTHON: interpreter, with a CUDA build of torch, the packages of requirements.txt and pytest-xdist.
# EDM: checkout of github.com/NVlabs/edm, to compare sampling with. SECONDS_IN_ALL: time limit.
# DEVICE=cpu SIZE=tiny: every call but the build in small, to try this script itself.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} device=${DEVICE:-cuda} size=${SIZE:-full}
out=${OUT:-runs/gpu}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$work/inductor

total=${SECONDS_IN_ALL:-300} slack=1
precisions=(tf32 bf16 fp16)
tests=(-n 8 -k cuda)
toy=(toy_neon.py)
glyphs=(edm_neon.py --select-images 400 --final-images 1000 --synthetic 1000)
if [ "$size" = tiny ]; then
  total=${SECONDS_IN_ALL:-3000} slack=10 # for a busy machine
  precisions=(bf16)
  tests=(-k "cpu and many_tensors")
  toy+=(--points 512 --base-steps 50)
  glyphs=(tests/few_glyphs.py --train-base 0.1 --snapshot 1 --synthetic 60 --steps 3
    --select-images 40 --final-images 60)
fi
toy+=(--delta 1.72)
glyphs+=(--preset glyphs --grid 0.6 --judge random-conv --controls none)

step() {  # name, time limit in seconds, command...
  local name=$1 limit=$(($2 * slack)) left=$((total - SECONDS)) begin=$SECONDS verdict=ok
  shift 2
  if ((left < 5)); then
    verdict="not run: no time left"
  else
    timeout -k 5 $((limit < left ? limit : left)) "$@" >"$work/$name.log" 2>&1
    case $? in
      0) ;;
      124 | 137) verdict="FAILED: passed its time limit" ;;
      *) verdict=FAILED ;;
    esac
  fi
  echo "| $name | $verdict | $((SECONDS - begin)) s |" >>"$work/steps"
}

report() {  # what is known so far, should the machine be taken away
  local log
  {
    printf '| step | result | took |\n|---|---|---|\n'
    cat "$work/steps"
    printf '\n| what | ours | peer | peer / ours | notes |\n|---|---|---|---|---|\n'
    grep -h '^|' "$work"/bench_*.log
  } >"$out/table.md" 2>/dev/null
  for log in "$work"/*.log; do
    printf '\n==== %s\n' "$(basename "$log" .log)"
    tr '\r' '\n' <"$log"
  done >"$out/log.txt"
}

bench() {  # name, time limit, part of bench_gpu.py, options...
  step "bench_$1" "$2" "$python" tests/bench_gpu.py "${@:3}" --device "$device" --size "$size"
  report
}

if [ "$device" = cuda ]; then
  step gpu 10 nvidia-smi
  step build 90 env NEON_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 \
    "$python" -m pip install --no-build-isolation --no-deps .
  report
fi

# Beside each other: nothing here is timed. Compiled networks are kept for the benchmark.
export OMP_NUM_THREADS=1
test_files=(tests/test_extrapolate.py tests/test_mlp_ddim.py tests/test_frechet.py)
step tests 90 "$python" -m pytest -q -m "" "${test_files[@]}" "${tests[@]}" &
step toy_cpu 90 "$python" "${toy[@]}" --device cpu --out "$work/toy_cpu" &
step toy_gpu 90 "$python" "${toy[@]}" --device "$device" --out "$work/toy_gpu" &
# The small network is faster eager than compiled once.
step glyphs_cpu 90 "$python" "${glyphs[@]}" --device cpu --out "$work/glyphs_cpu" --yes &
step glyphs_gpu 90 env TORCHDYNAMO_DISABLE=1 \
  "$python" "${glyphs[@]}" --device "$device" --out "$work/glyphs_gpu" --yes &
for precision in "${precisions[@]}"; do
  step "compile_$precision" 90 "$python" tests/bench_gpu.py compile --precision "$precision" \
    --device "$device" --size "$size" &
done
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    # memcheck sees nothing wrong inside a block that torch's allocator keeps: it allocates plainly
    step "$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 1 "$python" -m pytest -q -x tests/test_extrapolate.py \
      tests/test_mlp_ddim.py -k "cuda and (unaligned or many_tensors or matches_float64)" &
  done
fi
wait
for kind in toy glyphs; do
  step "same_$kind" 20 "$python" tests/gpu_compare.py "$kind" "$work/${kind}_cpu" "$work/${kind}_gpu" &
done
wait
unset OMP_NUM_THREADS
report

# Alone, the most wanted first.
bench device 20 device
bench extrapolation 30 extrapolation
bench statistics 30 statistics
bench toy 20 toy
ADAPTIVE_DDIM_EACH=3 bench toy_3 20 toy
bench sampling 80 sampling ${EDM:+--edm "$EDM"} --precision "${precisions[@]}"
bench training 45 training

cat "$out/table.md"
mapfile -t failed < <(grep -E 'FAILED|not run' "$work/steps" | cut -d ' ' -f 2)
for name in "${failed[@]}"; do
  printf '\n==== %s\n' "$name"
  if [ -f "$work/$name.log" ]; then tr '\r' '\n' <"$work/$name.log" | tail -n 12; fi
done
((${#failed[@]} == 0))
