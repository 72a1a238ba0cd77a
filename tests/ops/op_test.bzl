"""op_test: one parameterised suite of an op for all devices and dtypes."""

load("//tests:suite.bzl", "cc_suite")

def op_test(name, deps = None, **kwargs):
    """Builds <name>.cc; by default it tests the op of the same stem.

    Args:
      name: ends in _test; also the file-name stem.
      deps: the ops under test; default //ops/<stem>.
      **kwargs: passed on to cc_suite.
    """
    op = name[:-len("_test")]
    cc_suite(
        name = name,
        deps = (["//ops/" + op] if deps == None else deps) + [
            "//ops/core",
            "//tests/reference",
            "//tests/testing",
            "//tests/testing:shapes",
        ],
        **kwargs
    )
