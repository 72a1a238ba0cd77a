#!/usr/bin/env bash
# What tools/bindings/java.py generates is what was committed.
exec python3 tools/bindings/java.py --check
