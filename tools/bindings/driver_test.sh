#!/usr/bin/env bash
# driver_test.sh DRIVER: a conformance driver passes, and fails where it must: on
# a wrong expectation, without the library, with a library of another ABI.
set -uo pipefail
driver=$1
vectors=tests/abi/conformance/vectors.txt
model=examples/models/austen
export LD_LIBRARY_PATH=$PWD/abi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failures=0

fail() {
  echo "FAIL: $*"
  failures=$((failures + 1))
}

output=$("$driver" "$vectors" "$model" 2>&1) || fail "exit code $?"
echo "$output"
count=$(grep -c '^case ' "$vectors")
[[ ${output##*$'\n'} == "$count cases passed" ]] || fail "not $count cases"

# One digit of one expected result of every op is changed: the sign and exponent
# of the last element, or a byte behind it.
for op in $(grep '^case ' "$vectors" | cut -d' ' -f3 | sort -u); do
  awk -v op="$op" '
    $1 == "case" { here = $3 == op; name = $2 }
    here && $1 == "expect" && !done {
      digit = length($4) - 1
      other = substr($4, digit, 1) == "4" ? "c" : "4"
      $4 = substr($4, 1, digit - 1) other substr($4, digit + 1)
      done = 1
      print name >"/dev/stderr"
    }
    { print }' "$vectors" >"$scratch/vectors" 2>"$scratch/name"
  message=$("$driver" "$scratch/vectors" "$model" 2>&1 >/dev/null) &&
    fail "a wrong expectation of $op went unnoticed"
  [[ $message == *"$(<"$scratch/name")"* ]] || fail "$op: not named: $message"
done

# A case that must be rejected and is not; one that must not be and is.
sed -E 's/^reject [0-9]+ /reject 5 /' "$vectors" >"$scratch/vectors"
"$driver" "$scratch/vectors" "$model" >/dev/null 2>&1 &&
  fail "another status code went unnoticed"
sed -E 's/^(reject [0-9]+) .*/\1 nonsense/' "$vectors" >"$scratch/vectors"
"$driver" "$scratch/vectors" "$model" >/dev/null 2>&1 &&
  fail "another message went unnoticed"
sed '/^reject /d' "$vectors" >"$scratch/vectors"
"$driver" "$scratch/vectors" "$model" >/dev/null 2>&1 &&
  fail "an error went unnoticed"

message=$(LD_LIBRARY_PATH='' "$driver" "$vectors" "$model" 2>&1) &&
  fail "no library, no error"
[[ $message == *"libtenon.so.1"* ]] || fail "no library: $message"

# A library of the next major version has the same functions, perhaps.
{
  echo 'int tenon_abi_version(void) { return 2 << 16; }'
  nm -D --defined-only abi/libtenon.so.1 |
    sed -nE 's/.* (tenon_[a-z0-9_]+)$/\1/p' | grep -v '^tenon_abi_version$' |
    sed 's/.*/int &(void) { return 0; }/'
} >"$scratch/next.c"
cc -shared -fPIC -Wl,-soname,libtenon.so.1 "$scratch/next.c" \
  -o "$scratch/libtenon.so.1" || fail "cannot build the next version"
message=$(LD_LIBRARY_PATH=$scratch "$driver" "$vectors" "$model" 2>&1) &&
  fail "another ABI, no error"
[[ $message == *"ABI 2.0"* ]] || fail "another ABI: $message"

((failures == 0)) && echo PASS
exit $((failures != 0))
