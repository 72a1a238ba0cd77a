#!/usr/bin/env bash
# The binding's own tests, under the JVM's checks of JNI.
set -uo pipefail
build=examples/java/build
output=$(java -Xcheck:jni -cp $build/tenon.jar -Djava.library.path=$build \
  BindingTest examples/models/austen "$PWD/abi/libtenon.so.1" 2>&1)
code=$?
echo "$output"
[[ $code == 0 && $output != *WARNING* && $output != *FATAL* ]]
