"""Prints a C++ program that compares kFirstSize of abi/call.h with the size that
each struct had in the first version with it.

Usage: first_sizes.py LAYOUT.json..., in the order of their versions
"""

import json
import sys


def main():
    first = {}
    for path in sys.argv[1:]:
        with open(path) as file:
            for struct in json.load(file)["structs"]:
                if struct["fields"][0]["name"] == "struct_size":
                    first.setdefault(struct["name"], struct["size"])
    print('#include "abi/call.h"\n\nusing tenon::abi::kFirstSize;\n')
    for name, size in first.items():
        print(f"static_assert(kFirstSize<{name}> == {size});")
    print("\nint main() {}")


if __name__ == "__main__":
    main()
