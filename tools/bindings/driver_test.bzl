"""driver_test: the conformance driver of one language, and that it can fail."""

def driver_test(name, program, data = [], **kwargs):
    """Runs a driver by driver_test.sh on the vectors and on spoiled ones.

    Args:
      name: of the test.
      program: label of the driver; arguments VECTORS MODEL_DIR [LIBTENON].
      data: what it needs besides vectors, model and library.
      **kwargs: passed on to sh_test.
    """
    native.sh_test(
        name = name,
        srcs = ["//tools/bindings:driver_test.sh"],
        args = ["$(location %s)" % program],
        data = data + [
            program,
            "//abi:tenon",
            "//examples/models:austen",
            "//tests/abi/conformance:vectors",
        ],
        **kwargs
    )
