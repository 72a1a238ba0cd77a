#!/usr/bin/env bash
# Runs every test program of the bundle from its root, in shards side by side,
# and sums them up.
#   ./run_tests.sh [--tool "COMMAND"] [--filter GTEST_FILTER] [--jobs N]
#                  [--shards N] [--limit SECONDS] [--logs DIR]
# The GPUs of the machine share the shards: --shards of each program, and as many
# for each job of the ops'. --limit ends a shard that takes longer; it counts as
# failed.
# --tool runs each under a command. For compute-sanitizer:
#   --filter '*cuda*' --tool "compute-sanitizer --tool memcheck
#     --report-api-errors no --error-exitcode 9"
# (API errors that a test provokes, such as asking for too much memory, are
# reported by the library and are not errors of the test.) For racecheck set
# TENON_SMALL_TESTS=1 and TENON_TEST_WITHOUT_CUBLASLT=1, see CONTRIBUTING.md.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export tool="" filter="*" logs="" limit=0 num_gpus
jobs=$((($(nproc) + 1) / 2))
shards=4
num_gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU)
while (($#)); do
  case $1 in
    --tool) tool=$2 && shift 2 ;;
    --filter) filter=$2 && shift 2 ;;
    --jobs) jobs=$2 && shift 2 ;;
    --shards) shards=$2 && shift 2 ;;
    --limit) limit=$2 && shift 2 ;;
    --logs) logs=$2 && shift 2 ;;
    *) echo "unknown argument $1" >&2 && exit 2 ;;
  esac
done
[[ -n $logs ]] || logs=$(mktemp -d)
mkdir -p "$logs"

# run_shard BINARY SHARD NUM_SHARDS
run_shard() {
  local name begin result
  ((num_gpus < 2)) || export CUDA_VISIBLE_DEVICES=$(($2 % num_gpus))
  name=$(basename "$1")-$2
  begin=$(date +%s)
  # shellcheck disable=SC2086
  GTEST_TOTAL_SHARDS=$3 GTEST_SHARD_INDEX=$2 timeout "$limit" $tool "./$1" \
    --gtest_brief=1 --gtest_filter="$filter" >"$logs/$name.log" 2>&1
  case $? in
    0) result=ok ;;
    124) result="ENDED by --limit" ;;
    *) result=FAILED ;;
  esac
  [[ $result == ok ]] || touch "$logs/$name.failed"
  echo "$name: $result in $(($(date +%s) - begin)) s;" \
    "$(grep -aE 'PASSED|SKIPPED|ERROR SUMMARY|RACECHECK SUMMARY' \
      "$logs/$name.log" | tr '\n' ' ')"
}
export -f run_shard

{
  for binary in tests/{engine,abi}/*_tests; do
    for ((i = 0; i < shards; ++i)); do echo "$binary $i $shards"; done
  done
  for ((i = 0; i < shards * jobs; ++i)); do
    echo "tests/ops/op_tests $i $((shards * jobs))"
  done
} | xargs -P "$jobs" -L 1 bash -c 'run_shard "$@"' run_shard

failed=0
for mark in "$logs"/*.failed; do
  [[ -e $mark ]] || continue
  failed=$((failed + 1))
  echo "==== ${mark%.failed}"
  grep -avE '^(.*Skipped|no CUDA device)?$' "${mark%.failed}.log" | head -n 40
done
if ((failed)); then
  echo "$failed shards failed; logs are in $logs"
  exit 1
fi
echo "all tests passed"
