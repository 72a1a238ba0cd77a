#!/usr/bin/env bash
# Runs every test binary of the bundle from its root, and sums them up.
#   ./run_tests.sh [--tool "COMMAND"] [--filter GTEST_FILTER] [NAME...]
# --tool runs each under a command, such as
#   --tool "compute-sanitizer --tool memcheck --error-exitcode 9"
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
tool=""
filter="*"
names=()
while (($#)); do
  case $1 in
    --tool) tool=$2 && shift 2 ;;
    --filter) filter=$2 && shift 2 ;;
    *) names+=("$1") && shift ;;
  esac
done
failed=()
for binary in $(find tests -name '*_test' -type f -executable | sort); do
  name=$(basename "$binary")
  if ((${#names[@]})) && [[ ! " ${names[*]} " == *" $name "* ]]; then
    continue
  fi
  begin=$(date +%s)
  # shellcheck disable=SC2086
  if $tool "./$binary" --gtest_brief=1 --gtest_filter="$filter" \
    >"/tmp/$name.log" 2>&1; then
    result=ok
  else
    result=FAILED
    failed+=("$name")
  fi
  echo "$name: $result in $(($(date +%s) - begin)) s; $(grep -E 'PASSED|ERROR SUMMARY' "/tmp/$name.log" | tr '\n' ' ')"
done
if ((${#failed[@]})); then
  for name in "${failed[@]}"; do
    echo "==== $name"
    grep -vE '^(.*Skipped|no CUDA device)?$' "/tmp/$name.log" | head -n 60
  done
  echo "${#failed[@]} suites failed: ${failed[*]}"
  exit 1
fi
echo "all suites passed"
