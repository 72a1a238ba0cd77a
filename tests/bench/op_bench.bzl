"""op_bench: one benchmark program of an op."""

def op_bench(name, deps, srcs = []):
    """Builds <name>.cc, alone and as a part of the program with all of them.

    Args:
      name: ends in _bench; also the file-name stem.
      deps: what it measures.
      srcs: extra sources.
    """
    deps = deps + [
        ":bench",
        "//ops/core",
        "//tests/testing:shapes",
    ]
    native.cc_binary(
        name = name,
        testonly = True,
        srcs = [name + ".cc"] + srcs,
        deps = deps,
    )
    native.cc_library(
        name = name + "_main",
        testonly = True,
        srcs = [name + ".cc"] + srcs,
        local_defines = ["main=" + name],
        deps = deps,
    )
