#!/usr/bin/env bash
# compute-sanitizer over every CUDA C++ kernel on small shapes, about 2 minutes on an H200; exit 0 where nothing was found.
#   benchmarks/gpu/sanitize.sh [TOOL...] [KERNEL...]      memcheck, racecheck and synccheck of all kernels by default
# Torch's cache of memory is off and allocations are padded, so that a byte beyond a tensor is seen.
set -uo pipefail
cd "$(dirname "$0")"
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit" >&2; exit 2; }
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
all_tools=(memcheck racecheck synccheck)
all_kernels=(streaming_linear tall_linear streaming_experts tall_experts norm_and_route decode_attention prefill_attention
             between_attentions)
all_collectives=(all_reduce reduce_scatter all_gather)  # between ranks that are streams of one GPU, as their tests have them
tools=() kernels=() collectives=()
for name in "$@"; do
  case " ${all_tools[*]} : ${all_kernels[*]} : ${all_collectives[*]} " in
    *" $name "*:*:*) tools+=("$name") ;;
    *:*" $name "*:*) kernels+=("$name") ;;
    *:*:*" $name "*) collectives+=("$name") ;;
    *) echo "$name is none of ${all_tools[*]}, ${all_kernels[*]} and ${all_collectives[*]}" >&2; exit 2 ;;
  esac
done
[ ${#tools[@]} -gt 0 ] || tools=("${all_tools[@]}")
[ $((${#kernels[@]} + ${#collectives[@]})) -gt 0 ] || { kernels=("${all_kernels[@]}"); collectives=("${all_collectives[@]}"); }
[ ${#kernels[@]} -eq 0 ] || python3 sanitized_kernels.py "${kernels[@]}" || exit 1  # compiled, and right without it
status=0
for tool in "${tools[@]}"; do
  padding=()
  [ "$tool" != memcheck ] || padding=(--padding 256)
  for kernel in "${kernels[@]}"; do
    if [ "$tool $kernel" = "racecheck norm_and_route" ]; then  # seen with compute-sanitizer of CUDA 13.0
      echo "== $tool of $kernel left out: racecheck ends it with an Internal Sanitizer Error, memcheck and synccheck find nothing"
      continue
    fi
    echo "== $tool of $kernel"
    timeout 120 compute-sanitizer --tool "$tool" "${padding[@]}" --error-exitcode 1 --kernel-regex "kns=$kernel" \
      python3 sanitized_kernels.py "$kernel" || status=1
  done
  for kernel in "${collectives[@]}"; do
    echo "== $tool of $kernel"
    # With torch's cache: what allocates would wait for a rank that waits for this one.
    env -u PYTORCH_NO_CUDA_MEMORY_CACHING \
      timeout 120 compute-sanitizer --tool "$tool" "${padding[@]}" --error-exitcode 1 --kernel-regex "kns=$kernel" \
      python3 -m pytest -o addopts= -q -p no:cacheprovider -m gpu "../../tests/kernels/test_$kernel.py" -k "smallest or bits or 2" || status=1
  done
done
exit $status
