#!/usr/bin/env bash
# vectors.txt is what make_vectors writes.
set -euo pipefail
tests/abi/conformance/make_vectors "$TEST_TMPDIR/vectors.txt"
cmp "$TEST_TMPDIR/vectors.txt" tests/abi/conformance/vectors.txt
