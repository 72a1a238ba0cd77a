"""The manifest of the C ABI, read from its headers.

  layout.py             writes layout.json and exports.txt beside this file
  layout.py --check     fails where these two are not what the headers say
  layout.py --asserts layout.json
                        prints a C program that holds the manifest's numbers
                        against the compiler's

layout.json is what tests and binding generators work from:

  abi_version  {major, minor}
  constants    [{name, value}]
  types        [{name, type}]                    handles and other aliases
  callbacks    [{name, returns, params: [{name, type}]}]
  structs      [{name, size, alignment, fields: [{name, type, offset, size}]}],
               where an array's field has a count beside its element's type
  functions    [{name, thread, returns, params: [{name, type}]}]

It reads the small part of C that the headers use and refuses everything else.
Standard library alone.
"""

import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).absolute().parent
HEADERS = ("tenon_dlpack.h", "tenon.h")

# Sizes on every 64-bit Linux; each type is aligned to its size.
SCALARS = {
    "char": 1,
    "uint8_t": 1,
    "uint16_t": 2,
    "int32_t": 4,
    "uint32_t": 4,
    "float": 4,
    "int64_t": 8,
    "uint64_t": 8,
    "size_t": 8,
    "double": 8,
}
POINTER_SIZE = 8


def clean(text):
    """Joins continued lines and drops comments."""
    text = text.replace("\\\n", " ")
    return re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)


def squeeze(text):
    """One spelling for each type: "const DLTensor*"."""
    return re.sub(r"\s*\*", "*", " ".join(text.split()))


class Manifest:

    def __init__(self):
        self.constants = []
        self.types = []
        self.callbacks = []
        self.structs = []
        self.functions = []

    def size_and_alignment(self, type_name):
        if type_name.endswith("*"):
            return POINTER_SIZE, POINTER_SIZE
        if type_name in SCALARS:
            return SCALARS[type_name], SCALARS[type_name]
        for alias in self.types:
            if alias["name"] == type_name:
                return self.size_and_alignment(alias["type"])
        if any(type_name == c["name"] for c in self.callbacks):
            return POINTER_SIZE, POINTER_SIZE
        for struct in self.structs:
            if struct["name"] == type_name:
                return struct["size"], struct["alignment"]
        sys.exit(f"layout.py: a type that the ABI does not use: {type_name}")

    def read_header(self, text):
        text = clean(text)
        number = r"^#define (TENON_\w+) +(0x[0-9a-f]+|\d+)u?\s*$"
        for name, value in re.findall(number, text, re.M):
            self.constants.append({"name": name, "value": int(value, 0)})
        text = re.sub(r"^\s*#.*$", "", text, flags=re.M)
        text = text.replace('extern "C" {', "")
        while match := self.DECLARATION.match(text):
            self.read_declaration(match)
            text = text[match.end():]
        if text.strip(" \n}"):
            sys.exit(f"layout.py: not understood: {text.strip()[:80]}")

    DECLARATION = re.compile(
        r"""\s*(?:
        typedef \s+ struct \s+ (?P<struct>\w+) \s* \{ (?P<fields>[^}]*) \} \s* \w+ |
        typedef \s+ (?P<returns>[\w ]+?) \s* \( \* (?P<callback>\w+) \) \s*
            \( (?P<callback_params>[^)]*) \) |
        typedef \s+ (?P<type>\w+) \s+ (?P<alias>\w+) |
        TENON_THREAD \( (?P<thread>any|turns) \) \s* TENON_API \s+
            (?P<result>[\w *]+?) \s* \b(?P<function>tenon_\w+) \s*
            \( (?P<params>[^)]*) \)
        ) \s* ;""", re.X)

    def read_declaration(self, match):
        if match["struct"]:
            self.read_struct(match["struct"], match["fields"])
        elif match["callback"]:
            self.callbacks.append({
                "name": match["callback"],
                "returns": squeeze(match["returns"]),
                "params": read_params(match["callback_params"]),
            })
        elif match["alias"]:
            self.types.append({"name": match["alias"], "type": match["type"]})
        else:
            self.functions.append({
                "name": match["function"],
                "thread": match["thread"],
                "returns": squeeze(match["result"]),
                "params": read_params(match["params"]),
            })

    def read_struct(self, name, body):
        fields, end, struct_alignment = [], 0, 1
        for declaration in body.split(";"):
            if not declaration.strip():
                continue
            declarator = re.fullmatch(r"(.*?)(\w+)(?:\[(\d+)\])?", squeeze(declaration))
            type_name = squeeze(declarator[1])
            size, alignment = self.size_and_alignment(type_name)
            offset = -(-end // alignment) * alignment
            field = {"name": declarator[2], "type": type_name, "offset": offset, "size": size}
            if declarator[3]:
                field["count"] = int(declarator[3])
                field["size"] = size * field["count"]
            if offset != end:
                # A hole could hold garbage, and a later field could not use it.
                sys.exit(f"layout.py: {name}.{field['name']} leaves a hole before it")
            fields.append(field)
            end = offset + field["size"]
            struct_alignment = max(struct_alignment, alignment)
        if end % struct_alignment:
            sys.exit(f"layout.py: {name} needs a reserved field at its end")
        self.structs.append({
            "name": name,
            "size": end,
            "alignment": struct_alignment,
            "fields": fields
        })

    def as_dict(self):
        values = {c["name"]: c["value"] for c in self.constants}
        return {
            "abi_version": {
                "major": values["TENON_ABI_MAJOR"],
                "minor": values["TENON_ABI_MINOR"],
            },
            "constants": self.constants,
            "types": self.types,
            "callbacks": self.callbacks,
            "structs": self.structs,
            "functions": self.functions,
        }


def read_params(text):
    params = []
    for param in squeeze(text).split(","):
        if param.strip() == "void":
            continue
        match = re.fullmatch(r"(.*?)(\w+)", param.strip())
        params.append({"name": match[2], "type": squeeze(match[1])})
    return params


def read_headers(paths):
    manifest = Manifest()
    for path in paths:
        manifest.read_header(pathlib.Path(path).read_text())
    return manifest.as_dict()


def as_json(layout):
    """One line for each constant, field and parameter list: diffs stay small."""

    def item(value, indent):
        nested = [k for k, v in value.items() if k in ("fields", "params") and v]
        if nested != ["fields"]:
            return indent + json.dumps(value)
        head = json.dumps({k: v for k, v in value.items() if k != "fields"})[:-1]
        fields = ",\n".join(item(f, indent + "  ") for f in value["fields"])
        return f'{indent}{head}, "fields": [\n{fields}\n{indent}]}}'

    parts = [f'  "abi_version": {json.dumps(layout["abi_version"])}']
    for key, values in layout.items():
        if key == "abi_version":
            continue
        items = ",\n".join(item(v, "    ") for v in values)
        parts.append(f'  "{key}": [\n{items}\n  ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def as_exports(layout):
    return "".join(f"{name}\n" for name in sorted(f["name"] for f in layout["functions"]))


def as_asserts(layout):
    lines = ["#include <stddef.h>", '#include "abi/tenon.h"', ""]

    def check(condition):
        lines.append(f'_Static_assert({condition}, "{condition}");')

    for constant in layout["constants"]:
        check(f"{constant['name']} == {constant['value']}")
    for alias in layout["types"]:
        check(f"_Generic(({alias['name']})0, {alias['type']}: 1)")
    for struct in layout["structs"]:
        check(f"sizeof({struct['name']}) == {struct['size']}")
        check(f"_Alignof({struct['name']}) == {struct['alignment']}")
        for field in struct["fields"]:
            of = f"{struct['name']}, {field['name']}"
            check(f"offsetof({of}) == {field['offset']}")
            check(f"sizeof((({struct['name']}*)0)->{field['name']}) == {field['size']}")
            decayed = field["type"] + ("*" if "count" in field else "")
            check(f"_Generic((({struct['name']}*)0)->{field['name']}, {decayed}: 1)")
    for function in layout["functions"]:
        params = ", ".join(p["type"] for p in function["params"]) or "void"
        check(f"_Generic(&{function['name']}, {function['returns']} (*)({params}): 1)")
    return "\n".join(lines) + "\n\nint main(void) { return 0; }\n"


def main():
    mode = sys.argv[1:]
    if len(mode) == 2 and mode[0] == "--asserts":
        print(as_asserts(json.loads(pathlib.Path(mode[1]).read_text())), end="")
        return
    layout = read_headers(HERE / header for header in HEADERS)
    files = {"layout.json": as_json(layout), "exports.txt": as_exports(layout)}
    if mode == ["--check"]:
        stale = [n for n, text in files.items() if (HERE / n).read_text() != text]
        if stale:
            sys.exit(f"{', '.join(stale)} not up to date; run python3 abi/layout.py")
    elif not mode:
        for name, text in files.items():
            (HERE / name).write_text(text)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
