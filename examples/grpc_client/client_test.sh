#!/usr/bin/env bash
# Both clients against the real server with the shipped model.
set -euo pipefail

socket="/tmp/tenon-client-test-$$.sock"
service/tenon_server --listen "unix:$socket" --threads 1 --kv-cache-mib 16 2>/dev/null &
server=$!
trap 'kill -9 $server 2>/dev/null || true; rm -f "$socket"' EXIT
for _ in $(seq 200); do
  [[ -S $socket ]] && break
  sleep 0.05
done

prompt="It was a truth"
run() {
  examples/grpc_client/grpc_client --target "unix:$socket" --max-tokens 60 --seed 7 "$prompt"
}
first=$(run)
[[ $first == "$prompt"* && ${#first} -gt 60 ]] || { echo "too short: $first"; exit 1; }
[[ $first == "$(run)" ]] || { echo "the same seed gave another text"; exit 1; }

examples/grpc_client/client_py --target "unix:$socket" --max-tokens 30 "$prompt" >"$TEST_TMPDIR/out"
[[ $(grep -c '^--- ' "$TEST_TMPDIR/out") == 4 ]] || { cat "$TEST_TMPDIR/out"; exit 1; }
[[ $(grep -c "^$prompt" "$TEST_TMPDIR/out") == 4 ]] || { cat "$TEST_TMPDIR/out"; exit 1; }

if examples/grpc_client/grpc_client --target "unix:$socket" --max-tokens 99999 2>/dev/null; then
  echo "a bad request was accepted"
  exit 1
fi

# refuses MESSAGE COMMAND...: it ends with 2 and says so, at once.
refuses() {
  local expected=$1 result=0
  shift
  timeout 20 "$@" >/dev/null 2>"$TEST_TMPDIR/err" || result=$?
  [[ $result == 2 ]] && grep -q -- "$expected" "$TEST_TMPDIR/err" || {
    echo "$*: $result"
    cat "$TEST_TMPDIR/err"
    exit 1
  }
}
client="examples/grpc_client/grpc_client --target unix:$socket"
refuses "cannot read /nowhere.pem" $client --ca /nowhere.pem
refuses "--cert FILE --key FILE" $client --cert own.pem --key own.key
refuses "--seed N" $client --seed x
refuses "given together" examples/grpc_client/client_py --target "unix:$socket" --cert own.pem
refuses "less than --rows" service/tenon_server --queued-rows 8 --rows 16
kill -TERM $server
