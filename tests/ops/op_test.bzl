"""op_test: one parameterised suite of an op for all devices and dtypes."""

def op_test(name, deps = None, size = "small", **kwargs):
    """Builds <name>.cc; by default it tests the op of the same stem.

    Args:
      name: ends in _test; also the file-name stem.
      deps: the ops under test; default //ops/<stem>.
      size: as for cc_test.
      **kwargs: passed on to cc_test.
    """
    op = name[:-len("_test")]
    native.cc_test(
        name = name,
        size = size,
        srcs = [name + ".cc"],
        deps = (["//ops/" + op] if deps == None else deps) + [
            "//bazel:gtest_main",
            "//ops/core",
            "//tests/reference",
            "//tests/testing",
            "//tests/testing:shapes",
        ],
        visibility = ["//tools/bundle:__pkg__"],
        **kwargs
    )
