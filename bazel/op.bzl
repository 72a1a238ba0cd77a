"""op_library: the one shape every op has."""

load("//bazel:cuda.bzl", "cuda_library", "if_cuda")

def op_library(name, srcs = [], hdrs = [], cuda_srcs = [], deps = []):
    """Builds <name>.h + <name>.cc + <name>_cpu.cc, and <name>_cuda.cu where there is CUDA.

    Args:
      name: op name; also the file-name stem.
      srcs: extra host sources, such as <name>_config.cc.
      hdrs: extra public headers.
      cuda_srcs: extra .cu files (and .cuh headers private to them).
      deps: other ops this one composes.
    """
    native.cc_library(
        name = name + "_headers",
        hdrs = [name + ".h", name + "_backend.h"] + hdrs,
        deps = ["//ops/core"] + deps,
    )
    cuda_library(
        name = name + "_cuda",
        srcs = [name + "_cuda.cu"] + [s for s in cuda_srcs if s.endswith(".cu")],
        hdrs = [s for s in cuda_srcs if not s.endswith(".cu")],
        deps = [
            ":%s_headers" % name,
            "//ops/core:core_cuda",
        ],
    )
    native.cc_library(
        name = name,
        srcs = [name + ".cc", name + "_cpu.cc"] + srcs,
        hdrs = [name + ".h"] + hdrs,
        # The CUDA archive comes after this one and calls back into extra srcs.
        alwayslink = True,
        visibility = ["//visibility:public"],
        deps = [":%s_headers" % name] + if_cuda([":%s_cuda" % name]),
    )
