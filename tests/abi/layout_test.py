"""The committed manifest is the header's, and only ever grew."""

import json
import pathlib
import subprocess
import sys
import unittest

ABI = pathlib.Path("abi")


def by_name(items):
    return {item["name"]: item for item in items}


def is_reserved(field):
    return field["name"].startswith("reserved")


def changes(old, new):
    """What a client of `old` would stumble over in `new`; empty if nothing."""
    found = []

    for key in ("constants", "types", "callbacks", "functions"):
        have = by_name(new[key])
        for name, item in by_name(old[key]).items():
            if name != "TENON_ABI_MINOR" and have.get(name) != item:
                found.append(f"{key}: {item} became {have.get(name)}")

    have = by_name(new["structs"])
    for name, struct in by_name(old["structs"]).items():
        if name not in have:
            found.append(f"struct {name} is gone")
            continue
        found += struct_changes(struct, have[name])
    return found


def struct_changes(old, new):
    name, found = old["name"], []
    describes_itself = old["fields"][0]["name"] == "struct_size"
    if new["size"] < old["size"] or (new["size"] > old["size"] and not describes_itself):
        found.append(f"{name} has {new['size']} bytes, had {old['size']}")
    if new["alignment"] != old["alignment"]:
        found.append(f"{name} has another alignment")
    fields = by_name(new["fields"])
    for field in old["fields"]:
        if not is_reserved(field) and fields.get(field["name"]) != field:
            found.append(f"{name}: {field} became {fields.get(field['name'])}")
    # A new field lies behind the old struct or in what was reserved: there, old
    # clients have zeros.
    zeros = [(f["offset"], f["offset"] + f["size"]) for f in old["fields"] if is_reserved(f)]
    zeros.append((old["size"], new["size"]))
    old_names = by_name(old["fields"])
    for field in new["fields"]:
        if field["name"] in old_names and not is_reserved(field):
            continue
        begin, end = field["offset"], field["offset"] + field["size"]
        if not any(low <= begin and end <= high for low, high in zeros):
            found.append(f"{name}: {field['name']} lies on bytes that had a meaning")
    return found


class LayoutTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.layout = json.loads((ABI / "layout.json").read_text())
        cls.history = {
            path.stem: json.loads(path.read_text())
            for path in sorted((ABI / "history").glob("layout_*.json"))
        }

    def copy(self):
        return json.loads(json.dumps(self.layout))

    def test_committed_files_are_current(self):
        subprocess.run([sys.executable, ABI / "layout.py", "--check"], check=True)

    def test_only_grew(self):
        self.assertIn("layout_1_0", self.history)
        for version, old in self.history.items():
            self.assertEqual(changes(old, self.layout), [], version)

    def test_a_version_is_frozen_once_it_is_in_the_history(self):
        for version, old in self.history.items():
            if old["abi_version"] == self.layout["abi_version"]:
                self.assertEqual(old, self.layout, f"raise TENON_ABI_MINOR above {version}")

    def test_every_struct_describes_itself(self):
        fixed = {"DLDevice", "DLDataType", "DLTensor", "tenon_logit_edit", "tenon_sampling_params"}
        for struct in self.layout["structs"]:
            first = struct["fields"][0]
            describes_itself = (first["name"], first["type"]) == ("struct_size", "uint32_t")
            self.assertNotEqual(describes_itself, struct["name"] in fixed, struct["name"])

    def test_every_status_returning_function_takes_an_error(self):
        others = {
            "tenon_abi_version", "tenon_version_string", "tenon_status_name", "tenon_moe_max_tiles"
        }
        for function in self.layout["functions"]:
            last = (function["params"] or [{}])[-1]
            with self.subTest(function["name"]):
                if function["name"] in others:
                    self.assertNotIn("tenon_error*", str(function["params"]))
                else:
                    self.assertEqual(function["returns"], "int32_t")
                    self.assertEqual(last, {"name": "error", "type": "tenon_error*"})

    def test_growth_is_accepted(self):
        layout = self.copy()
        struct = by_name(layout["structs"])["tenon_rms_norm_args"]
        struct["fields"].append({
            "name": "later",
            "type": "uint64_t",
            "offset": struct["size"],
            "size": 8
        })
        struct["size"] += 8
        layout["constants"].append({"name": "TENON_LATER", "value": 99})
        layout["functions"].append({"name": "tenon_later"})
        self.assertEqual(changes(self.layout, layout), [])

    def test_changes_are_noticed(self):
        def swap(layout):
            fields = by_name(layout["structs"])["tenon_moe_router_args"]["fields"]
            fields[2]["offset"], fields[3]["offset"] = fields[3]["offset"], fields[2]["offset"]

        def retype(layout):
            by_name(layout["structs"])["tenon_rms_norm_args"]["fields"][1]["type"] = "uint32_t"

        def drop_field(layout):
            by_name(layout["structs"])["tenon_moe_args"]["fields"].pop(3)

        def insert_field(layout):
            fields = by_name(layout["structs"])["tenon_moe_args"]["fields"]
            fields.append({"name": "new", "type": "uint32_t", "offset": 4, "size": 4})

        def grow_params(layout):
            by_name(layout["structs"])["tenon_sampling_params"]["size"] += 8

        def shrink(layout):
            by_name(layout["structs"])["tenon_error"]["size"] -= 4

        def renumber(layout):
            by_name(layout["constants"])["TENON_NOT_FOUND"]["value"] = 7

        def drop_function(layout):
            layout["functions"].pop(5)

        def change_signature(layout):
            layout["functions"][5]["params"].pop()

        for edit in (swap, retype, drop_field, insert_field, grow_params, shrink, renumber,
                     drop_function, change_signature):
            with self.subTest(edit.__name__):
                layout = self.copy()
                edit(layout)
                self.assertNotEqual(changes(self.layout, layout), [])


if __name__ == "__main__":
    unittest.main()
