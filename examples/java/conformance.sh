#!/usr/bin/env bash
# conformance.sh VECTORS MODEL_DIR [LIBTENON], after build.sh.
build=$(dirname "${BASH_SOURCE[0]}")/build
exec java -cp "$build/tenon.jar" -Djava.library.path="$build" Conformance "$@"
