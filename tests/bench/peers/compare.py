#!/usr/bin/env python3
"""Tenon's benchmarks and the peers in one run on one GPU, in one table.

    python3 tests/bench/peers/compare.py --op moe,qk_norm,decode

Run it on a host with torch and Triton, from the bundle or, after building
//tests/bench/..., from the repository's root. README.md says what is compared,
--dry-run what a run would do.
"""

import argparse
import pathlib
import subprocess
import sys
import traceback

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
    parser.add_argument("--op", type=comma_list(list(OPS)), default=list(OPS),
                        help="default: " + ",".join(OPS))
    parser.add_argument("--shape", default="30b-a3b-tp1", help="part of a name")
    parser.add_argument("--dtype", type=comma_list(DTYPES), default=DTYPES)
    parser.add_argument("--routing", type=comma_list(inputs.ROUTINGS),
                        default=["uniform"])
    parser.add_argument("--tokens", type=token_list,
                        help="rows or batch sizes, instead of each op's own")
    parser.add_argument("--context", type=int, default=1024,
                        help="tokens in the cache; decode")
    parser.add_argument("--tries", type=int, default=3,
                        help="Triton sizes to try for each case")
    parser.add_argument("--eager", action="store_true",
                        help="also torch's loop over experts, without a graph")
    parser.add_argument("--bench", help="folder of moe_bench and qk_norm_bench")
    parser.add_argument("--only", choices=["tenon", "peers"])
    parser.add_argument("--dry-run", action="store_true",
                        help="print what would run; needs neither GPU nor torch")
    parser.add_argument("--json", help="also write all results to this file")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(argv)
    if not shapes.select(args.shape):
        parser.error(f"no shape has {args.shape} in its name")
    return args


def tokens_of(args, op):
    return args.tokens or OPS[op][1]


def bench_folder(given):
    for folder in [given] if given else ["tests/bench", "bazel-bin/tests/bench"]:
        path = ROOT / folder
        if (path / "moe_bench").exists():
            return path
    sys.exit("no moe_bench: pass its folder as --bench")


def bench_commands(args, op, folder):
    tokens = ",".join(map(str, tokens_of(args, op)))
    if op == "decode":
        return [[str(folder / "decode_bench"), "--json", "--device", "cuda",
                 "--prefill", "0", "--batch", tokens, "--context",
                 str(args.context), "--dtype", ",".join(args.dtype)]]
    common = ["--json", "--device", "cuda", "--shape", args.shape, "--tokens",
              tokens]
    if op == "qk_norm":
        return [[str(folder / "qk_norm_bench"), "--op", "qk_norm"] + common]
    return [
        [str(folder / "moe_bench"), "--op", "moe_layer", "--routing", routing,
         "--dtype", ",".join(args.dtype)] + common
        for routing in args.routing
    ]


def run_tenon(args, op):
    header, results = {}, []
    for command in bench_commands(args, op, bench_folder(args.bench)):
        print("$", " ".join(command), file=sys.stderr)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"{command[0]} ended with {done.returncode}")
        text, found = report.parse_bench(done.stdout, {OPS[op][0]})
        header = {k: v for k, v in text.items() if k != "results"}
        results += found
        # qk_norm_bench times a copy of the same bytes beside each case.
        results += [dict(r, who="ceiling: copy", us=r["copy_us"])
                    for r in found if r.get("copy_us")]
    return header, results


def run_peers(args, op):
    tokens = tokens_of(args, op)
    if op == "moe":
        import moe_peers

        return moe_peers.run(shapes.select(args.shape), args.dtype, args.routing,
                             tokens, args.tries, args.eager)
    if op == "decode":
        import decode_peers

        return decode_peers.run(tokens, args.context)
    import qk_norm_peers

    return qk_norm_peers.run(shapes.select(args.shape), tokens)


def peer_cases(args, op):
    """What run_peers would time, a line each."""
    tokens = ",".join(map(str, tokens_of(args, op)))
    if op == "decode":
        return [f"decode, transformers, bf16, context {args.context}: batch {tokens}"]
    names = [shape.name for shape in shapes.select(args.shape)]
    if op == "qk_norm":
        return [f"qk_norm, torch, bf16, {name}: {tokens} tokens" for name in names]
    return [f"moe, triton and torch, {dtype}, {name}, {routing}: {tokens} tokens"
            for name in names for dtype in args.dtype for routing in args.routing]


def print_plan(args):
    folder = pathlib.Path(args.bench or "tests/bench")
    for op in args.op:
        if args.only != "peers":
            for command in bench_commands(args, op, folder):
                print("$", " ".join(command))
        if args.only != "tenon":
            print("\n".join(peer_cases(args, op)))


def print_results(args, header, results):
    for key, value in header.items():
        print(f"{key}: {value}")
    for op in args.op:  # each with peers of its own
        rows = [r for r in results if r["op"] == OPS[op][0]]
        if rows:
            print(report.format_table(*report.rows_of(rows), markdown=args.markdown))


def main(argv):
    args = parse_arguments(argv)
    if args.dry_run:
        print_plan(args)
        return 0
    header, results, failed = {}, [], False
    for op in args.op:  # both sides of an op one right after the other
        if args.only != "peers":
            header, found = run_tenon(args, op)
            results += found
        if args.only != "tenon":
            try:
                results += run_peers(args, op)
            except Exception:  # a peer's failure must not take ours with it
                traceback.print_exc()
                failed = True
        if args.json:
            pathlib.Path(args.json).write_text(report.to_json(header, results))
    print_results(args, header, results)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
