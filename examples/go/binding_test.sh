#!/usr/bin/env bash
# The package's tests and one call of its benchmark, with cgo's own checks.
export LD_LIBRARY_PATH=$PWD/abi MODEL_DIR=$PWD/examples/models/austen
export GODEBUG=cgocheck=2
exec examples/go/binding_test_bin -test.v -test.bench . -test.benchtime 1x
