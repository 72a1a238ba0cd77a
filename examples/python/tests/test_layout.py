"""tenon.py's structs and constants are those of the manifest abi/layout.json,
which is made from the header: python3 -m unittest, with TENON_LAYOUT set."""

import ctypes
import json
import os
import re
import unittest

import tenon

KINDS = {
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "char": ctypes.c_char,
}


def c_name(name: str) -> str:
    """tenon_rms_norm_args for RmsNormArgs."""
    return "tenon" + re.sub("([A-Z])", r"_\1", name.lstrip("_")).lower()


class LayoutTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with open(os.environ["TENON_LAYOUT"], encoding="utf-8") as file:
            cls.layout = json.load(file)
        cls.layout_structs = {s["name"]: s for s in cls.layout["structs"]}
        cls.types = {t["name"]: t["type"] for t in cls.layout["types"]}
        cls.structs = {
            c_name(name): value
            for name, value in vars(tenon).items()
            if isinstance(value, type)
            and issubclass(value, tenon._Struct)
            and value is not tenon._Struct
        }

    def test_every_struct_is_there(self):
        names = {n for n in self.layout_structs if n.startswith("tenon_")}
        self.assertEqual(set(self.structs), names)

    def test_every_field_is_where_the_header_has_it(self):
        for name, struct in self.structs.items():
            wanted = self.layout_structs[name]
            fields = [
                (f.lstrip("_"), getattr(struct, f).offset, getattr(struct, f).size)
                for f, _ in struct._fields_
            ]
            with self.subTest(name):
                self.assertEqual(ctypes.sizeof(struct), wanted["size"])
                self.assertEqual(ctypes.alignment(struct), wanted["alignment"])
                self.assertEqual(
                    fields,
                    [(f["name"], f["offset"], f["size"]) for f in wanted["fields"]],
                )

    def test_numbers_have_the_headers_types(self):
        for name, struct in self.structs.items():
            for (field, kind), wanted in zip(
                struct._fields_, self.layout_structs[name]["fields"]
            ):
                c_type = self.types.get(wanted["type"], wanted["type"])
                if c_type in KINDS:
                    if "count" in wanted:
                        kind = kind._type_
                    with self.subTest(f"{name}.{field}"):
                        self.assertIs(kind, KINDS[c_type])
                else:
                    with self.subTest(f"{name}.{field}"):
                        self.assertIn(kind, (ctypes.c_void_p, ctypes.c_char_p))

    def test_dl_tensor(self):
        wanted = self.layout_structs["DLTensor"]
        struct = tenon._DLTensor
        self.assertEqual(ctypes.sizeof(struct), wanted["size"])
        offsets = {f["name"]: f["offset"] for f in wanted["fields"]}
        for name in ("data", "ndim", "shape", "strides", "byte_offset"):
            self.assertEqual(getattr(struct, name).offset, offsets[name])
        self.assertEqual(struct.device_type.offset, offsets["device"])
        self.assertEqual(struct.device_id.offset, offsets["device"] + 4)
        self.assertEqual(struct.dtype_code.offset, offsets["dtype"])
        self.assertEqual(struct.dtype_bits.offset, offsets["dtype"] + 1)
        self.assertEqual(struct.dtype_lanes.offset, offsets["dtype"] + 2)

    def test_constants(self):
        for constant in self.layout["constants"]:
            name = constant["name"].removeprefix("TENON_")
            if name.startswith("DL_"):
                continue
            with self.subTest(name):
                self.assertEqual(getattr(tenon, name), constant["value"])

    def test_dtype_codes(self):
        codes = {c["name"]: c["value"] for c in self.layout["constants"]}
        for dtype, (code, _) in tenon._CODES.items():
            family = re.sub(r"\d+$", "", dtype)
            name = {"bfloat": "BFLOAT", "float8_e4m3fn": "FLOAT8_E4M3FN"}.get(
                family, family.upper()
            )
            self.assertEqual(code, codes[f"TENON_DL_{name}"], dtype)

    def test_the_library_is_of_this_version(self):
        version = self.layout["abi_version"]
        self.assertEqual(
            (tenon.ABI_MAJOR, tenon.ABI_MINOR), (version["major"], version["minor"])
        )
        self.assertEqual(tenon.abi_version(), (version["major"], version["minor"]))


if __name__ == "__main__":
    unittest.main()
