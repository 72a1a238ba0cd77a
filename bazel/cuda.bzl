"""cuda_library: compiles .cu files with nvcc and exposes them as a CcInfo."""

load("@bazel_tools//tools/cpp:toolchain_utils.bzl", "find_cpp_toolchain")
load("@local_cuda//:config.bzl", "HAVE_CUDA", "NVCC")

# Hopper with its own instructions, and one portable architecture, whose PTX
# also serves every later GPU.
_GENCODES = [
    "arch=compute_90a,code=sm_90a",
    "arch=compute_80,code=[sm_80,compute_80]",
]

# Headers of a cuda_library go to others of its kind alone, through whatever C++
# library is between. What C++ sees is the same with and without CUDA, so that
# most of it is compiled once for both.
_CudaHeaders = provider(fields = ["headers"])

def _headers_of(deps):
    return [d[_CudaHeaders].headers for d in deps if _CudaHeaders in d]

def _cuda_headers_impl(target, ctx):
    if _CudaHeaders in target:
        return []
    deps = getattr(ctx.rule.attr, "deps", [])
    return [_CudaHeaders(headers = depset(transitive = _headers_of(deps)))]

_cuda_headers = aspect(
    implementation = _cuda_headers_impl,
    attr_aspects = ["deps"],
)

def _cuda_library_impl(ctx):
    cc = find_cpp_toolchain(ctx)
    features = cc_common.configure_features(ctx = ctx, cc_toolchain = cc)
    infos = [d[CcInfo] for d in ctx.attr.deps]
    headers = depset(
        ctx.files.hdrs,
        transitive = [i.compilation_context.headers for i in infos] +
                     _headers_of(ctx.attr.deps),
    )
    objects = []
    for src in ctx.files.srcs:
        obj = ctx.actions.declare_file("_objs/%s/%s.o" % (ctx.label.name, src.basename))
        args = ctx.actions.args()
        # In a host's workspace Tenon's files lie below external/.
        root = ctx.label.workspace_root or "."
        args.add_all(["-x", "cu", "-c", src, "-o", obj, "-I", root, "-std=c++17", "-O3"])
        # The code of two architectures is large: "size" makes it a tenth, for a
        # moment of unpacking when a kernel is first used.
        args.add_all(["--expt-relaxed-constexpr", "--compress-mode=size"])
        args.add_all(["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"])
        args.add_all(_GENCODES, format_each = "-gencode=%s")
        ctx.actions.run(
            executable = ctx.attr.nvcc,
            arguments = [args],
            inputs = depset([src] + ctx.files._toolkit, transitive = [headers]),
            outputs = [obj],
            mnemonic = "CudaCompile",
            use_default_shell_env = True,
        )
        objects.append(obj)
    archive = ctx.actions.declare_file("lib%s.a" % ctx.label.name)
    ar = ctx.actions.args()
    ar.add("rcs").add(archive).add_all(objects)
    ctx.actions.run(
        executable = cc.ar_executable,
        arguments = [ar],
        inputs = objects,
        outputs = [archive],
        mnemonic = "CudaArchive",
    )
    lib = cc_common.create_library_to_link(
        actions = ctx.actions,
        feature_configuration = features,
        cc_toolchain = cc,
        pic_static_library = archive,
    )
    linker_input = cc_common.create_linker_input(
        owner = ctx.label,
        libraries = depset([lib]),
    )
    own = cc_common.create_linking_context(linker_inputs = depset([linker_input]))
    linking = cc_common.merge_cc_infos(
        direct_cc_infos = [CcInfo(linking_context = own)],
        cc_infos = [CcInfo(linking_context = i.linking_context) for i in infos],
    ).linking_context
    return [
        DefaultInfo(files = depset([archive])),
        CcInfo(linking_context = linking),
        _CudaHeaders(headers = headers),
    ]

_cuda_library = rule(
    implementation = _cuda_library_impl,
    attrs = {
        "srcs": attr.label_list(allow_files = [".cu"]),
        "hdrs": attr.label_list(allow_files = [".h", ".cuh"]),
        "deps": attr.label_list(providers = [CcInfo], aspects = [_cuda_headers]),
        "nvcc": attr.string(default = NVCC),
        # Another toolkit in the same place compiles anew.
        "_toolkit": attr.label(default = "@local_cuda//:version", allow_files = True),
        "_cc_toolchain": attr.label(default = "@bazel_tools//tools/cpp:current_cc_toolchain"),
    },
    fragments = ["cpp"],
    toolchains = ["@bazel_tools//tools/cpp:toolchain_type"],
)

def cuda_library(name, tags = [], **kwargs):
    """Manual, so that a CPU-only `bazel build //...` never needs nvcc."""
    _cuda_library(name = name, tags = tags + ["manual"], **kwargs)

def if_cuda(yes, no = []):
    """A select() over `yes` where this build has CUDA, over `no` where not."""
    if not HAVE_CUDA:
        return no
    return select({"//bazel:cuda_off": no, "//conditions:default": yes})
