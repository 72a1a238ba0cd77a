"""archive: a .tar.gz of files of the build, the same bytes for the same files."""

def _archive_impl(ctx):
    out = ctx.outputs.out
    lines = []
    inputs = []
    for target, folder in ctx.attr.files.items():
        for file in target.files.to_list():
            # Below the package's folder: sources keep their own folders.
            name = file.short_path
            package = target.label.package
            if package and name.startswith(package + "/"):
                name = name[len(package) + 1:]
            lines.append("file\t%s\t%s%s" % (file.path, folder, name))
            inputs.append(file)
    for link, target in ctx.attr.links.items():
        lines.append("link\t%s\t%s" % (target, link))
    manifest = ctx.actions.declare_file(ctx.label.name + ".manifest")
    ctx.actions.write(manifest, "\n".join(lines) + "\n")
    ctx.actions.run_shell(
        command = 'exec python3 "$@"',
        arguments = [ctx.file._tool.path, manifest.path, ctx.attr.root, out.path],
        inputs = inputs + [manifest, ctx.file._tool],
        outputs = [out],
        mnemonic = "Archive",
        use_default_shell_env = True,
    )
    return [DefaultInfo(
        files = depset([out]),
        runfiles = ctx.runfiles(files = [out]),
    )]

archive = rule(
    implementation = _archive_impl,
    attrs = {
        "files": attr.label_keyed_string_dict(
            allow_files = True,
            doc = "Where each target's files go: a folder, with a slash at the end.",
        ),
        "links": attr.string_dict(doc = "Symbolic links and what they point to."),
        "out": attr.output(mandatory = True),
        "root": attr.string(doc = "The one folder that holds everything."),
        "_tool": attr.label(
            default = "//tools/dist:make_archive.py",
            allow_single_file = True,
        ),
    },
)
