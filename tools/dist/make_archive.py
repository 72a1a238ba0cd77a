"""Writes a .tar.gz that is the same for the same files: names sorted, no times,
no owners.

Usage: make_archive.py MANIFEST ROOT OUT

A line of the manifest is "file", source and name in the archive, or "link",
what it points to and its name; separated by tabs.
"""

import gzip
import os
import sys
import tarfile


def main():
    manifest, root, out = sys.argv[1:]
    entries = {}
    with open(manifest, encoding="utf-8") as lines:
        for line in lines:
            kind, source, name = line.rstrip("\n").split("\t")
            if name in entries:
                sys.exit(f"make_archive.py: two files are called {name}")
            entries[name] = (kind, source)

    with open(out, "wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as zipped, \
            tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, (kind, source) in sorted(entries.items()):
            info = tarfile.TarInfo(f"{root}/{name}")
            if kind == "link":
                info.type, info.mode = tarfile.SYMTYPE, 0o777
                info.linkname = source
                archive.addfile(info)
                continue
            # Bazel marks its outputs executable; these are what one runs.
            runs = name.endswith((".sh", ".so.1"))
            info.mode = 0o755 if runs else 0o644
            info.size = os.path.getsize(source)
            with open(source, "rb") as file:
                archive.addfile(info, file)


if __name__ == "__main__":
    main()
