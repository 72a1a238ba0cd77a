"""cc_proto_files: C++ from .proto files, with the system's protoc."""

def cc_proto_files(name, srcs, deps, grpc = False):
    """Compiles .proto files of this package to a cc_library.

    Args:
      name: of the library.
      srcs: .proto files; they import each other by their path in the package.
      deps: Protocol Buffers; with grpc also the messages and gRPC.
      grpc: generate stubs and services, in place of messages.
    """
    suffix = ".grpc.pb" if grpc else ".pb"
    plugin = "--plugin=protoc-gen-grpc=$$(command -v grpc_cpp_plugin) --grpc_out" if grpc else "--cpp_out"
    stems = [s[:-len(".proto")] for s in srcs]
    root = native.package_name()
    native.genrule(
        name = name + "_gen",
        srcs = srcs,
        outs = [s + suffix + e for s in stems for e in [".h", ".cc"]],
        cmd = "protoc -I%s %s=$(RULEDIR) $(SRCS)" % (root, plugin),
        visibility = ["//visibility:private"],
    )
    native.cc_library(
        name = name,
        srcs = [s + suffix + ".cc" for s in stems],
        hdrs = [s + suffix + ".h" for s in stems],
        copts = ["-w"],
        includes = ["."],
        deps = deps,
    )
