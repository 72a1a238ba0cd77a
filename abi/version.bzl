"""Versions: of the release, and of the ABI."""

# What tenon_version_string() says; //tests/abi:dist_test compares.
TENON_VERSION = "0.1.0"

# Every released ABI version, oldest first; history/ has their headers.
ABI_VERSIONS = [
    "1_0",
    "1_3",
]
