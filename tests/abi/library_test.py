"""What libtenon.so shows to the dynamic linker: its exports, its needs."""

import json
import pathlib
import re
import subprocess
import unittest

LIBRARY = "abi/libtenon.so.1"

# libdl, libpthread and librt are part of libc since glibc 2.34.
SYSTEM_LIBRARIES = {
    "ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1"
}

# Ubuntu 22.04's. Raising it shuts out systems that people use.
NEWEST_GLIBC = (2, 35)


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def version(text):
    return tuple(int(part) for part in text.split("."))


class LibraryTest(unittest.TestCase):

    def test_exports_are_the_golden_ones(self):
        golden = pathlib.Path("abi/exports.txt").read_text().split()
        exported = [line.split() for line in output("nm", "-D", "--defined-only", LIBRARY).splitlines()]
        self.assertEqual(sorted(name for _, _, name in exported), golden)
        self.assertEqual({kind for _, kind, _ in exported}, {"T"}, "functions alone")

    def test_exports_are_what_the_header_declares(self):
        layout = json.loads(pathlib.Path("abi/layout.json").read_text())
        golden = pathlib.Path("abi/exports.txt").read_text().split()
        self.assertEqual(sorted(f["name"] for f in layout["functions"]), golden)

    def test_dynamic_section(self):
        entries = re.findall(r"\((\w+)\) +(.*)", output("readelf", "-dW", LIBRARY))
        values = {}
        for tag, value in entries:
            values.setdefault(tag, []).append(value)
        needed = {re.search(r"\[(.*)\]", value)[1] for value in values["NEEDED"]}
        self.assertLessEqual(needed, SYSTEM_LIBRARIES)
        major = json.loads(pathlib.Path("abi/layout.json").read_text())["abi_version"]["major"]
        self.assertEqual(values["SONAME"], [f"Library soname: [libtenon.so.{major}]"])
        self.assertIn("NODELETE", values["FLAGS_1"][0])
        self.assertIn("SYMBOLIC", values["FLAGS"][0])
        self.assertIn("BIND_NOW", values["FLAGS"][0])
        for tag in ("RPATH", "RUNPATH", "TEXTREL"):
            self.assertNotIn(tag, values)

    def test_undefined_symbols_are_of_an_old_glibc(self):
        newest = (0,)
        for line in output("nm", "-D", "--undefined-only", LIBRARY).splitlines():
            kind, symbol = line.split()
            name, _, wanted = symbol.partition("@")
            if not wanted:
                # Hooks of the toolchain that nobody has to define.
                self.assertEqual(kind, "w", symbol)
                continue
            self.assertRegex(wanted, r"^GLIBC_2\.[\d.]+$", symbol)
            newest = max(newest, version(wanted[len("GLIBC_"):]))
        self.assertLessEqual(newest, NEWEST_GLIBC)

    def test_stack_is_not_executable(self):
        stack = re.search(r"GNU_STACK.*", output("readelf", "-lW", LIBRARY))[0]
        self.assertIn(" RW ", stack)

    def test_link_name_is_the_same_library(self):
        self.assertEqual(
            pathlib.Path("abi/libtenon.so").read_bytes(),
            pathlib.Path(LIBRARY).read_bytes())


if __name__ == "__main__":
    unittest.main()
