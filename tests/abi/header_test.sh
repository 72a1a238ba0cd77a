#!/usr/bin/env bash
# Compiles the public headers the way C and C++ clients would, with every
# diagnostic an error: alone, twice, and after DLPack's own header.
set -euo pipefail

work=$TEST_TMPDIR
cat >"$work/client.c" <<'END'
#include "abi/tenon.h"
#include "abi/tenon.h"
int main(void) {
#ifdef __cplusplus
  tenon_rms_norm_args args = {};
#else
  tenon_rms_norm_args args = {0};
#endif
  args.struct_size = sizeof(args);
  return (int)tenon_rms_norm(0, &args, NULL, NULL);
}
END
sed '1i #include <dlpack/dlpack.h>' "$work/client.c" >"$work/after_dlpack.c"
echo '#include "abi/tenon_dlpack.h"' >"$work/only_dlpack.c"
cp tests/abi/dlpack_layout.c "$work"

count=0
for compiler in gcc clang; do
  for language in c:c99 c:c11 c:c17 c++:c++11 c++:c++17 c++:c++20; do
    for source in "$work"/*.c; do
      # Its static assertions came with C11.
      [[ $language:$source == c:c99:*/dlpack_layout.c ]] && continue
      "$compiler" -x "${language%:*}" "-std=${language#*:}" -I. -fsyntax-only \
        -Wall -Wextra -pedantic-errors -Werror "$source"
      count=$((count + 1))
    done
  done
done
echo "$count compilations passed"
