#!/usr/bin/env bash
# build.sh INCLUDE_DIR [OUT]: makes tenon.jar and libtenon_jni.so in OUT, which is
# build/ here if not given, with a JDK 17, a C compiler and the folder of tenon.h.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
include=${1:?the folder of tenon.h}
out=${2:-$here/build}
jdk=${JAVA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v javac)")")")}

mkdir -p "$out"
classes=$(mktemp -d)
trap 'rm -rf "$classes"' EXIT
"$jdk/bin/javac" -Xlint:all -Werror -d "$classes" "$here"/*.java "$here"/tenon/*.java
"$jdk/bin/jar" --create --file "$out/tenon.jar" -C "$classes" .
"${CC:-cc}" -std=c99 -O2 -Wall -Wextra -Wpedantic -Werror -fPIC -shared \
  -I"$include" -I"$jdk/include" -I"$jdk/include/linux" \
  "$here/tenon_jni.c" -o "$out/libtenon_jni.so" -ldl
