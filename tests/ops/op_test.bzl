"""op_test: one parameterised suite of an op for all devices and dtypes."""

def op_test(name, deps = None, size = "small", **kwargs):
    """Builds <name>.cc; by default it tests the op of the same stem.

    Its cases are a library, <name>_cases, so that one program can hold several
    suites.

    Args:
      name: ends in _test; also the file-name stem.
      deps: the ops under test; default //ops/<stem>.
      size: as for cc_test.
      **kwargs: passed on to cc_test.
    """
    op = name[:-len("_test")]
    native.cc_library(
        name = name + "_cases",
        testonly = True,
        srcs = [name + ".cc"],
        alwayslink = True,  # nothing calls a test case by name
        deps = (["//ops/" + op] if deps == None else deps) + [
            "//bazel:gtest",
            "//ops/core",
            "//tests/reference",
            "//tests/testing",
            "//tests/testing:shapes",
        ],
    )
    native.cc_test(
        name = name,
        size = size,
        deps = [
            ":%s_cases" % name,
            "//bazel:gtest_main",
        ],
        **kwargs
    )
