#!/usr/bin/env python3
"""Writes the tables of docs/performance.md anew from benchmarks' --json output.

    mkdir results
    tests/bench/moe_bench --op moe_layer --json > results/moe.json    (and so on)
    python3 tests/bench/report.py results docs/performance.md

Every *.json in the folder is read, in the order of names; a later result of the
same case replaces an earlier one. A table of the document is known by the
section of its device ("## NVIDIA H100 80GB HBM3") and by how its first line
begins. Tables of which there is no result stay as they are, and so does all
text: look through it afterwards.
"""

import argparse
import json
import pathlib
import sys

TP1 = "qwen3-30b-a3b-tp1"
MODELS = {"qwen3-30b-a3b-tp1": "Qwen3-30B-A3B", "qwen3-30b-a3b-tp4": "Qwen3-30B-A3B TP4",
          "qwen3-235b-a22b-tp4": "Qwen3-235B-A22B TP4", "glm-4.6-tp4": "GLM-4.6 TP4"}
OTHERS = list(MODELS)[1:]
BF16, FP8, F32 = "bfloat16", "float8_e4m3", "float32"
SHORT = {BF16: "bf16", FP8: "fp8", F32: "float32"}
TOKENS = (1, 8, 32, 64, 128, 256, 1024, 4096, 16384)
# The best of vLLM, SGLang and LightLLM on the same kind of card, 2026-11-21,
# microseconds at TOKENS.
BEFORE = {
    ("NVIDIA H100 80GB HBM3", BF16): (40.9, 179.8, 362.9, 419.4, 426.7, 441.5, 512.0, 976, 3046),
    ("NVIDIA H100 80GB HBM3", FP8): (33.9, 106.8, 204.4, 232.9, 240.3, 258.3, 333.5, 828, 2827),
    ("NVIDIA H200", BF16): (32.6, 131.1, 254.4, 292.4, 300.3, 309.9, 398, 910, 2902),
    ("NVIDIA H200", FP8): (30.1, 81.8, 146.6, 167, 175.5, 190, 272, 732, 2596),
}


class Results:
    """The results of one device, by (op, shape, dtype, note, tokens)."""

    def __init__(self, device):
        self.device = device
        self._cases = {}

    def add(self, report):
        for result in report["results"]:
            key = tuple(result[k] for k in ("op", "shape", "dtype", "note", "tokens"))
            self._cases[key] = dict(result, read=report["read_gb_per_s"])

    def get(self, op, shape, dtype, note, tokens):
        return self._cases.get((op, shape, dtype, note, tokens))

    def find(self, op, **fields):
        """All of an op with these fields, in the order in which they ran."""
        return [r for r in self._cases.values() if r["op"] == op
                and all(r[k] == v for k, v in fields.items())]


def read(folder):
    """{device: Results}. Lines before the JSON are skipped."""
    devices = {}
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        text = path.read_text()
        try:
            report = json.loads(text[text.index("{"):])
            device = report["device"]
            report["results"]
        except (ValueError, KeyError, TypeError):
            print(f"{path}: not a benchmark's output", file=sys.stderr)
            continue
        devices.setdefault(device, Results(device)).add(report)
    return devices


# Cells. Each takes a result or None.

def us(result, decimals=2):
    return f"{result['us']:.{decimals}f}" if result else ""


def limit(result, decimals=1):
    """Share of the limit."""
    return f"{100 * result['limit_us'] / result['us']:.{decimals}f} %" if result else ""


def us_limit(result):
    return f"{us(result, 1)} ({limit(result, 0)})" if result else ""


def us_copy(result):
    return f"{us(result)} ({result['us'] / result['copy_us']:.2f}x)" if result else ""


def us_read(result):
    if not result:
        return ""
    share = 100 * result["bytes"] / result["us"] * 1e-3 / result["read"]
    return f"{us(result)} ({share:.0f} %)"


def tflops(result):
    return f"{result['flops'] / result['us'] * 1e-6:.0f}" if result else ""


def ms(result):
    return f"{result['us'] * 1e-3:.2f} ms" if result else "not measured"


def tokens_per_s(result):
    return f"{1e6 * result['tokens'] / result['us']:,.0f}" if result else ""


# Tables: (how the first line begins, header, rows). Rows without any result
# are left out.

def decode_table(results):
    header = ["decode", "context"] + [
        cell for dtype in ("bf16", "fp8") for cell in (dtype, "tokens/s", "limit / time")]
    cases = results.find("decode")
    shapes = {r["shape"] for r in cases if r["shape"].endswith("/48L")}
    rows = []
    for shape in sorted(shapes):
        for context in (1024, 8192):
            for batch in (1, 8, 32, 64, 128):
                pair = [results.get("decode", shape, d, f"context {context}", batch)
                        for d in (BF16, FP8)]
                if any(pair):
                    rows.append([f"batch {batch}", context] + [
                        c for r in pair for c in (ms(r), tokens_per_s(r), limit(r))])
    return "| decode | context |", header, rows


def prefill_table(results):
    header = ["prefill"] + [c for dtype in ("bf16", "fp8")
                            for c in (dtype, "tokens/s", "TFLOP/s", "experts a layer")]
    rows = []
    for tokens in (512, 2048, 8192):
        pair = [next(iter(results.find("prefill", dtype=d, tokens=tokens)), None)
                for d in (BF16, FP8)]
        if any(pair):
            rows.append([f"{tokens} tokens"] + [
                c for r in pair for c in (ms(r), tokens_per_s(r), tflops(r),
                                          f"{r['experts']:.1f}" if r else "")])
    return "| prefill | bf16 |", header, rows


def qk_norm_table(results):
    ops = ("qk_norm", "qk_norm+rope", "qk_norm+rope+cache")
    rows = []
    for n in (1, 8, 64, 128, 1024, 2048, 4096, 8192, 16384):
        cases = [results.get(op, TP1, BF16, "", n) for op in ops]
        norm = results.get("rms_norm+residual", TP1, BF16, "", n)
        if any(cases):
            rows.append([n] + [us_copy(r) for r in cases] + [us(norm)])
    return ("| tokens | norm |", ["tokens", "norm", "norm + RoPE", "norm + RoPE + cache",
                                  "rms_norm + residual"], rows)


def head_layouts_table(results):
    counts = (1, 1024, 16384)
    rows = []
    for shape in OTHERS:
        cases = [results.get(op, shape, BF16, "", n)
                 for op in ("qk_norm", "qk_norm+rope+cache") for n in counts]
        if any(cases):
            rows.append([MODELS[shape]] + [us_copy(r) for r in cases])
    return ("| heads | norm, 1 |", ["heads", "norm, 1", "1024", "16384",
                                    "norm + RoPE + cache, 1", "1024", "16384"], rows)


def moe_table(results):
    header = ["M"] + [c for dtype in ("bf16", "fp8")
                      for c in (f"{dtype}, us", "limit / time", "TFLOP/s", "before")]
    rows = []
    for i, n in enumerate(TOKENS):
        row, found = [n], False
        for dtype in (BF16, FP8):
            r = results.get("moe_layer", TP1, dtype, "uniform", n)
            before = BEFORE.get((results.device, dtype))
            row += [us(r, 1), limit(r), tflops(r), before[i] if before else ""]
            found = found or r
        if found:
            rows.append(row)
    return "| M | bf16, us |", header, rows


def routings_table(results):
    routings = {"skewed": "skewed", "all-to-one": "all to one"}
    header = ["M"] + [f"{d}, {r}" for d in ("bf16", "fp8") for r in routings.values()]
    rows = []
    for n in TOKENS:
        cases = [results.get("moe_layer", TP1, d, r, n) for d in (BF16, FP8) for r in routings]
        if any(cases):
            rows.append([n] + [us_limit(r) for r in cases])
    return "| M | bf16, skewed |", header, rows


def shapes_table(results):
    rows = []
    for dtype in (BF16, FP8):
        for n in TOKENS:
            cases = [results.get("moe_layer", s, dtype, "uniform", n) for s in OTHERS]
            if any(cases):
                rows.append([n, SHORT[dtype]] + [us_limit(r) for r in cases])
    return "| M | dtype |", ["M", "dtype"] + [MODELS[s] for s in OTHERS], rows


def prepare_table(results):
    ops = (("prepare", BF16), ("router, align", BF16),
           ("prepare+quantize", FP8), ("router, align, quantize", FP8))
    rows = []
    for n in TOKENS:
        cases = [results.get(op, TP1, dtype, "", n) for op, dtype in ops]
        if any(cases):
            rows.append([n] + [us(r) for r in cases])
    return "| M | bf16 | separate |", ["M", "bf16", "separate", "fp8", "separate"], rows


def linear_table(results, dtype):
    modes = ("linear cublaslt", "linear built-in", "linear batch-invariant")
    rows = []
    for name in ("qkv", "o", "router", "lm_head"):
        for first in results.find(modes[1], shape=f"{TP1} {name}", dtype=dtype):
            note, n = first["note"], first["tokens"]
            rows.append([f"{name} {note}", n] + [
                us(results.get(mode, first["shape"], dtype, note, n)) for mode in modes])
    return ("| product | tokens |",
            ["product", "tokens", "with cuBLASLt", "built-in", "batch-invariant"], rows)


def attention_decode_table(results):
    def get(dtype, batch, context, page):
        return results.get("attention decode", TP1, dtype,
                           f"context {context}, page {page}", batch)

    rows = []
    for context in (1024, 4096, 8192, 32768):
        for batch in (1, 8, 32, 64):
            cases = [get(BF16, batch, context, 16), get(FP8, batch, context, 16),
                     get(BF16, batch, context, 64)]
            if any(cases):
                rows.append([context, batch] + [us_read(r) for r in cases])
    return ("| context | batch |",
            ["context", "batch", "bf16 cache", "fp8 cache", "bf16, page 64"], rows)


def attention_prefill_table(results):
    rows = []
    for n, context in ((512, 512), (2048, 2048), (8192, 8192), (512, 8192), (8192, 2048)):
        note = f"context {context}, page 16"
        plain = results.get("attention prefill", TP1, BF16, note, n)
        other = results.get("attention prefill b-inv", TP1, BF16, note, n)
        if plain or other:
            prompts = f" ({n // context} prompts)" if n > context else ""
            rows.append([f"{n}{prompts}", context, us(plain, 1), tflops(plain), us(other, 0)])
    return ("| tokens | of context |",
            ["tokens", "of context", "us", "TFLOP/s", "batch-invariant, us"], rows)


SAMPLER = {"greedy": "greedy", "plain": "plain", "plain fast": "plain, `fast`",
           "k50 p0.9 m0.05": "top-k 50, top-p 0.9, min-p 0.05", "top-p": "top-p 0.9",
           "every feature": "every feature"}


def sampler_table(results):
    rows = []
    for dtype in (F32, BF16):
        for n in (1, 8, 64, 256):
            cases = [results.get(f"sampler {op}", "151936 peaked", dtype, "", n)
                     for op in SAMPLER]
            if any(cases):
                rows.append([n, dtype] + [us(r) for r in cases])
    return ("| rows | logits | greedy | plain | plain, `fast` |",
            ["rows", "logits"] + list(SAMPLER.values()), rows)


def hard_rows_table(results):
    ops = ("greedy", "plain", "k50 p0.9 m0.05", "top-p")
    rows = []
    for n in (1, 64, 256):
        for kind in ("flat", "sorted", "spike", "equal", "masked"):
            cases = [results.get(f"sampler {op}", f"151936 {kind}", F32, "", n) for op in ops]
            if any(cases):
                rows.append([n, kind] + [us(r) for r in cases])
    return ("| rows | logits | greedy | plain | top-k 50",
            ["rows", "logits"] + [SAMPLER[op] for op in ops], rows)


def tables(results):
    return [decode_table(results), prefill_table(results), qk_norm_table(results),
            head_layouts_table(results), moe_table(results), routings_table(results),
            shapes_table(results), prepare_table(results), linear_table(results, BF16),
            linear_table(results, FP8), attention_decode_table(results),
            attention_prefill_table(results), sampler_table(results),
            hard_rows_table(results)]


TEXT_COLUMNS = {"decode", "prefill", "heads", "dtype", "product", "logits"}


def format_table(header, rows):
    def line(cells):
        return "| " + " | ".join(str(c) for c in cells) + " |"

    rule = "|".join("---" if h in TEXT_COLUMNS else "--:" for h in header)
    return [line(header), f"|{rule}|"] + [line(row) for row in rows]


def replace(document, results):
    """The document with the tables of the device's section replaced, and the
    beginnings of those for which it has no place."""
    lines = document.split("\n")
    heading = f"## {results.device}"
    if heading not in lines:
        return document, [heading]
    begin = lines.index(heading) + 1
    missing, seen = [], {}
    for start, header, rows in tables(results):
        skip = seen[start] = seen.get(start, -1) + 1
        if not rows:
            continue
        end = next((i for i in range(begin, len(lines)) if lines[i].startswith("## ")),
                   len(lines))
        places = [i for i in range(begin, end) if lines[i].startswith(start)]
        if len(places) <= skip:
            missing.append(start)
            continue
        first = places[skip]
        last = next((i for i in range(first, end) if not lines[i].startswith("|")), end)
        lines[first:last] = format_table(header, rows)
    return "\n".join(lines), missing


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("document", type=pathlib.Path, nargs="?",
                        help="rewritten in place; without it the tables are printed")
    args = parser.parse_args(argv)
    for results in read(args.folder).values():
        if args.document is None:
            print(f"## {results.device}")
            for _, header, rows in tables(results):
                if rows:
                    print("\n".join([""] + format_table(header, rows)))
            continue
        text, missing = replace(args.document.read_text(), results)
        args.document.write_text(text)
        for start, header, rows in tables(results):
            if rows and (start in missing or f"## {results.device}" in missing):
                print(f"{results.device}: {args.document} has no place for")
                print("\n".join(format_table(header, rows)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
