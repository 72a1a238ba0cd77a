"""cc_suite: a suite of tests that several programs can hold."""

def cc_suite(name, deps, size = "small", data = [], **kwargs):
    """Builds <name>.cc as a test of its own, and its cases as a library.

    Args:
      name: ends in _test; the cases are <name>_cases.
      deps: what the cases need, but for gtest's main.
      size: as for cc_test.
      data: as for cc_test.
      **kwargs: passed on to cc_test.
    """
    native.cc_library(
        name = name + "_cases",
        testonly = True,
        srcs = [name + ".cc"],
        data = data,
        alwayslink = True,  # nothing calls a test case by name
        deps = deps + ["//bazel:gtest"],
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

def cc_suites(name, suites, **kwargs):
    """One program with the cases of several suites, for the bundle: one for each would hold the same libraries again and again.

    Args:
      name: of the program.
      suites: names given to cc_suite.
      **kwargs: passed on to cc_binary.
    """
    native.cc_binary(
        name = name,
        testonly = True,
        visibility = ["//tools/bundle:__pkg__"],
        deps = [":%s_cases" % suite for suite in suites] + ["//bazel:gtest_main"],
        **kwargs
    )
