#!/usr/bin/env bash
# Unpacks the distribution, moves it, and builds the program of docs/c_abi.md
# against it through pkg-config and through CMake.
# Usage: dist_test.sh ARCHIVE VERSION
set -euo pipefail

version=$2
tar -xzf "$1" -C "$TEST_TMPDIR"
cd "$TEST_TMPDIR"
mv "tenon-$version-linux-x86_64" "moved here"
prefix="$PWD/moved here"

fail() {
  echo "FAIL: $*"
  exit 1
}

[[ $(readlink "$prefix/lib/libtenon.so") == libtenon.so.1 ]] ||
  fail "libtenon.so is not a link to libtenon.so.1"
grep -q "Copyright 2026 The Tenon Authors" "$prefix/LICENSE" || fail "LICENSE"
for part in Highway "JSON for Modern C++" "CUDA Runtime" "GNU C++ Library"; do
  grep -q "$part" "$prefix/THIRD_PARTY_NOTICES" || fail "no notice of $part"
done
for folder in "$prefix"/examples/*; do
  [[ -s $folder/README.md ]] || fail "$folder has no README.md"
done

mkdir app
awk '/^```c$/ { inside = 1; next } /^```$/ { inside = 0 } inside' \
  "$prefix/docs/c_abi.md" >app/app.c
expected="tenon $version: 0.3651 -0.7303 1.0954 -1.4606"

export PKG_CONFIG_PATH=$prefix/lib/pkgconfig
[[ $(pkg-config --modversion tenon) == "$version" ]] || fail "version in tenon.pc"
# pkg-config quotes the space in the folder's name.
eval "gcc -std=c99 -pedantic-errors -Wall -Wextra -Werror app/app.c -o app/app \
  $(pkg-config --cflags --libs tenon)" '"-Wl,-rpath,$prefix/lib"'
[[ $(app/app) == "$expected" ]] || fail "pkg-config: $(app/app)"

cat >app/CMakeLists.txt <<END
cmake_minimum_required(VERSION 3.13)
project(app C)
find_package(Tenon $version CONFIG REQUIRED)
add_executable(app app.c)
target_link_libraries(app Tenon::tenon)
END
cmake -S app -B cmake_build "-DCMAKE_PREFIX_PATH=$prefix" >cmake.log ||
  fail "cmake: $(cat cmake.log)"
cmake --build cmake_build >cmake.log || fail "cmake: $(cat cmake.log)"
[[ $(cmake_build/app) == "$expected" ]] || fail "cmake: $(cmake_build/app)"

# A client of a newer release is told so.
sed -i "s/Tenon $version/Tenon 99.0/" app/CMakeLists.txt
if cmake -S app -B newer "-DCMAKE_PREFIX_PATH=$prefix" >cmake.log 2>&1; then
  fail "find_package accepts version 99"
fi
grep -q "version: $version" cmake.log || fail "$(cat cmake.log)"
echo PASS
