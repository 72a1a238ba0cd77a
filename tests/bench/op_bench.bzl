"""op_bench: one benchmark program of an op."""

def op_bench(name, deps, srcs = []):
    """Builds <name>.cc.

    Args:
      name: ends in _bench; also the file-name stem.
      deps: what it measures.
      srcs: extra sources.
    """
    native.cc_binary(
        name = name,
        testonly = True,
        srcs = [name + ".cc"] + srcs,
        deps = deps + [
            ":bench",
            "//ops/core",
            "//tests/testing:shapes",
        ],
        visibility = ["//tools/bundle:__pkg__"],
    )
