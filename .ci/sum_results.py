"""Sums the test cases of Bazel's test.xml files and prints one closing line.

Usage: sum_results.py DIRECTORY NUM_FAILED_STEPS

A failed step that left no failed test case (a build error, a crash, a style
error) counts as one failure, so that a red run can never look green.
"""

import pathlib
import sys
import xml.etree.ElementTree as ElementTree


def main() -> int:
    directory, failed_steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    passed = failed = skipped = 0
    for path in sorted(directory.rglob("test.xml")):
        try:
            cases = list(ElementTree.parse(path).iter("testcase"))
        except ElementTree.ParseError as error:
            print(f"unreadable {path}: {error}")
            failed += 1
            continue
        for case in cases:
            if case.find("failure") is not None or case.find("error") is not None:
                failed += 1
                print(f"FAILED {path.parent.name}: {case.get('classname')}.{case.get('name')}")
            elif case.find("skipped") is not None:
                skipped += 1
            else:
                passed += 1
    failed = max(failed, failed_steps)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
