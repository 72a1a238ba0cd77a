#!/usr/bin/env bash
# Runs a program of this folder with Debian's Python, which has NumPy:
#   python_test.sh conformance | tests
set -euo pipefail
root=$PWD
export TENON_LIBRARY=$root/abi/libtenon.so.1
export TENON_LAYOUT=$root/abi/layout.json
export TENON_MODEL=$root/examples/models/austen
export PYTHONDONTWRITEBYTECODE=1
cd examples/python
case $1 in
  conformance)
    text=$(/usr/bin/python3 conformance.py \
      "$root/tests/abi/conformance/vectors.txt" "$TENON_MODEL" "$TENON_LIBRARY")
    echo "$text"
    [[ $(tail -n 1 <<<"$text") =~ ^[1-9][0-9]*\ cases\ passed$ ]]
    # A wrong byte must be noticed.
    sed '0,/^expect out 0 ../s/^expect out 0 ../expect out 0 fe/' \
      "$root/tests/abi/conformance/vectors.txt" >"$TEST_TMPDIR/wrong.txt"
    ! /usr/bin/python3 conformance.py "$TEST_TMPDIR/wrong.txt" "$TENON_MODEL"
    ;;
  tests)
    PYTHONPATH=. /usr/bin/python3 -m unittest discover -s tests -v
    ;;
esac
