"""tenon_deps: the repositories that a workspace with Tenon in it needs.

Nothing is fetched. Bazel 4 would download four of them unless the workspace
names them: here they are Debian's, or small stand-ins. A host that has its own
declares it before it calls tenon_deps().
"""

load(":cuda_configure.bzl", "cuda_configure")

def _files_impl(ctx):
    for path, label in ctx.attr.links.items():
        ctx.symlink(Label(label), path)
    for path, content in ctx.attr.files.items():
        ctx.file(path, content)

_files = repository_rule(
    implementation = _files_impl,
    attrs = {
        "files": attr.string_dict(doc = "Content by path."),
        "links": attr.string_dict(doc = "Files of this workspace by path."),
    },
    local = True,
)

def tenon_deps():
    """Declares what Tenon needs and the workspace does not have yet."""
    existing = native.existing_rules()
    for name in ["java", "proto"]:
        if "rules_" + name not in existing:
            native.local_repository(
                name = "rules_" + name,
                path = "/usr/share/bazel/rules/" + name,
            )
    if "rules_cc" not in existing:
        _files(
            name = "rules_cc",
            files = {"BUILD.bazel": "", "cc/BUILD.bazel": ""},
            links = {"cc/defs.bzl": "//bazel:rules_cc_defs.bzl"},
        )
    if "remote_coverage_tools" not in existing:
        _files(
            name = "remote_coverage_tools",
            files = {"BUILD.bazel": """
filegroup(
    name = "coverage_report_generator",
    visibility = ["//visibility:public"],
)
"""},
        )
    if "local_cuda" not in existing:
        cuda_configure(name = "local_cuda")
