"""A C++ toolchain made of the system's clang, for --config=fuzz.

Everything else uses the toolchain that Bazel finds by itself (gcc).
"""

load("@bazel_tools//tools/cpp:cc_configure.bzl", "cc_autoconf_impl")

def _clang_configure_impl(ctx):
    clang = ctx.which("clang")
    if not clang:
        fail("--config=fuzz needs clang on the PATH")
    cc_autoconf_impl(ctx, {"gcc": str(clang)})

clang_configure = repository_rule(
    implementation = _clang_configure_impl,
    environ = ["PATH"],
    configure = True,
    local = True,
)
