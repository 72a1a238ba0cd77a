#!/usr/bin/env python3
"""Tenon's benchmarks and the peers in one run on one GPU, in one table.

    python3 tests/bench/peers/compare.py --shape 30b-a3b-tp1 --dtype bf16,fp8

Run it on a host with torch and Triton, from the bundle or, after building
//tests/bench/..., from the repository's root. README.md says what is compared.
"""

import argparse
import pathlib
import subprocess
import sys

import inputs
import report
import shapes

ROOT = pathlib.Path(__file__).resolve().parents[3]
DTYPES = ["bf16", "fp8"]
# What the benchmark calls each op, and the token counts to compare at.
OPS = {"moe": ("moe_layer", shapes.TOKENS),
       "qk_norm": ("qk_norm", shapes.QK_NORM_TOKENS),
       "decode": ("decode", [1, 8, 32])}


def comma_list(known=None):
    def parse(text):
        items = text.split(",")
        for item in items:
            if known is not None and item not in known:
                raise argparse.ArgumentTypeError(f"{item} is not one of {known}")
        return items

    return parse


def token_list(text):
    values = [int(item) for item in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError("token counts are positive")
    return values


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=list(OPS), default="moe")
    parser.add_argument("--shape", default="30b-a3b-tp1", help="part of a name")
    parser.add_argument("--dtype", type=comma_list(DTYPES), default=DTYPES)
    parser.add_argument("--routing", type=comma_list(inputs.ROUTINGS),
                        default=["uniform"])
    parser.add_argument("--tokens", type=token_list)
    parser.add_argument("--context", type=int, default=1024,
                        help="tokens in the cache; decode")
    parser.add_argument("--tries", type=int, default=3,
                        help="Triton sizes to try for each case")
    parser.add_argument("--eager", action="store_true",
                        help="also torch's loop over experts, without a graph")
    parser.add_argument("--bench", help="folder of moe_bench and qk_norm_bench")
    parser.add_argument("--only", choices=["tenon", "peers"])
    parser.add_argument("--json", help="also write all results to this file")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(argv)
    if not shapes.select(args.shape):
        parser.error(f"no shape has {args.shape} in its name")
    if args.tokens is None:
        args.tokens = OPS[args.op][1]
    return args


def bench_folder(given):
    for folder in [given] if given else ["tests/bench", "bazel-bin/tests/bench"]:
        path = ROOT / folder
        if (path / "moe_bench").exists():
            return path
    sys.exit("no moe_bench: pass its folder as --bench")


def bench_commands(args, folder):
    tokens = ",".join(map(str, args.tokens))
    if args.op == "decode":
        return [[str(folder / "decode_bench"), "--json", "--device", "cuda",
                 "--prefill", "0", "--batch", tokens, "--context",
                 str(args.context), "--dtype", ",".join(args.dtype)]]
    common = ["--json", "--device", "cuda", "--shape", args.shape, "--tokens",
              tokens]
    if args.op == "qk_norm":
        return [[str(folder / "qk_norm_bench"), "--op", "qk_norm"] + common]
    return [
        [str(folder / "moe_bench"), "--op", "moe_layer", "--routing", routing,
         "--dtype", ",".join(args.dtype)] + common
        for routing in args.routing
    ]


def run_tenon(args):
    header, results = {}, []
    ops = {OPS[args.op][0]}
    for command in bench_commands(args, bench_folder(args.bench)):
        print("$", " ".join(command), file=sys.stderr)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"{command[0]} ended with {done.returncode}")
        text, found = report.parse_bench(done.stdout, ops)
        header = {k: v for k, v in text.items() if k != "results"}
        results += found
        # qk_norm_bench times a copy of the same bytes beside each case.
        results += [dict(r, who="ceiling: copy", us=r["copy_us"])
                    for r in found if r.get("copy_us")]
    return header, results


def run_peers(args):
    if args.op == "moe":
        import moe_peers

        return moe_peers.run(shapes.select(args.shape), args.dtype, args.routing,
                             args.tokens, args.tries, args.eager)
    if args.op == "decode":
        import decode_peers

        return decode_peers.run(args.tokens, args.context)
    import qk_norm_peers

    return qk_norm_peers.run(shapes.select(args.shape), args.tokens)


def main(argv):
    args = parse_arguments(argv)
    header, results = {}, []
    if args.only != "peers":
        header, results = run_tenon(args)
    if args.only != "tenon":
        results += run_peers(args)
    if args.json:
        pathlib.Path(args.json).write_text(report.to_json(header, results))
    for key, value in header.items():
        print(f"{key}: {value}")
    print(report.format_table(*report.rows_of(results), markdown=args.markdown))


if __name__ == "__main__":
    main(sys.argv[1:])
