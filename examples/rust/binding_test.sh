#!/usr/bin/env bash
# The binding's tests, and that the measurement runs.
set -e
export LD_LIBRARY_PATH=$PWD/abi MODEL_DIR=$PWD/examples/models/austen
examples/rust/binding_test_bin
examples/rust/overhead
