#!/usr/bin/env bash
# Clients that were compiled against earlier headers run against today's
# library and get what a client of today gets.
# Usage: old_clients_test.sh LIBRARY CONFIG_JSON CLIENT_OF_TODAY OLD_CLIENT...
set -euo pipefail

library=$PWD/$1 config=$2 today=$3
shift 3
"$today" "$library" "$config" >"$TEST_TMPDIR/today"
cat "$TEST_TMPDIR/today"
for client; do
  echo "== $client"
  "$client" "$library" "$config" | diff "$TEST_TMPDIR/today" -
done
