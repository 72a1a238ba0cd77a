"""fuzz_test: a fuzzer in two forms."""

def fuzz_test(name, srcs, deps, runs, min_mutated = 0, seeds = [], regressions = [], dictionary = None, options = [], random = 1000):
    """Defines a libFuzzer binary and an ordinary test that replays inputs.

    <name> is libFuzzer's, for --config=fuzz: a test that makes a fixed number
    of runs from a fixed seed. <name>_replay runs under every configuration: the
    seeds, the inputs of past failures, and some of a fixed generator.

    Args:
      name: of the libFuzzer test.
      srcs: with LLVMFuzzerTestOneInput.
      deps: of both.
      runs: inputs that the libFuzzer test makes.
      min_mutated: mutated calls below which it fails.
      seeds: files to begin with.
      regressions: inputs that failed once.
      dictionary: of words that the inputs are made of.
      options: further flags for libFuzzer.
      random: generated inputs of the replay.
    """
    inputs = seeds + regressions
    args = ["-runs=%d" % runs, "-seed=1", "-timeout=20", "-rss_limit_mb=3000"] + options
    if inputs:
        args.append("-seed_inputs=" + ",".join(["$(rootpath %s)" % f for f in inputs]))
    data = list(inputs)
    if dictionary:
        args.append("-dict=$(rootpath %s)" % dictionary)
        data.append(dictionary)
    native.cc_library(
        name = name + "_lib",
        testonly = True,
        srcs = srcs,
        alwayslink = True,
        deps = deps + ["//tests/fuzz:check"],
    )
    native.cc_test(
        name = name,
        size = "large",
        srcs = ["//tests/fuzz:fuzzer_init.cc"],
        args = args + ["--min_mutated=%d" % min_mutated],
        data = data,
        linkopts = ["-fsanitize=fuzzer"],
        tags = ["manual"],
        deps = [":%s_lib" % name, "//tests/fuzz:check"],
    )
    native.cc_test(
        name = name + "_replay",
        size = "small",
        srcs = ["//tests/fuzz:replay_main.cc"],
        args = ["--random=%d" % random] + ["$(rootpath %s)" % f for f in inputs],
        data = inputs,
        deps = [":%s_lib" % name, "//tests/fuzz:check"],
    )
