#!/usr/bin/env bash
# Copies the files named as arguments into one folder, in their places relative
# to the repository, so that everything runs from the folder's root on a host
# with a driver but without Bazel:
#   ./bazelw run //:bundle            writes ./bundle
#   cd bundle && ./run_tests.sh       runs every suite there
#   python3 tests/abi/torch_test.py   compares with torch, where it is installed
set -euo pipefail
folder=${BUILD_WORKSPACE_DIRECTORY:?run this with bazel run}/bundle
rm -rf "$folder"
mkdir -p "$folder"
for file in tools/bundle/run_tests.sh "$@"; do
  mkdir -p "$folder/$(dirname "$file")"
  cp -L "$file" "$folder/$file"
  chmod u+w "$folder/$file"
  if head -c 4 "$file" | grep -q ELF; then
    strip "$folder/$file"
  fi
done
# The benchmarks are one program, which goes by the name it is called by; under
# its own it fails with a list of those.
benches=$folder/tests/bench
for name in $({ "$benches/benches" 2>&1 || true; } | grep -o '[a-z_]*_bench'); do
  ln -s benches "$benches/$name"
done
mv "$folder/tools/bundle/run_tests.sh" "$folder/run_tests.sh"
rm -r "$folder/tools/bundle"
rmdir --ignore-fail-on-non-empty "$folder/tools"
size=$(du -sm "$folder" | cut -f1)
echo "$folder: $size MB"
if ((size >= 64)); then
  echo "too large: it must stay below 64 MB" >&2
  exit 1
fi
