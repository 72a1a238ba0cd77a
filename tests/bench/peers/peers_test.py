"""What compare.py does without a GPU: arguments, commands, tables, inputs."""

import contextlib
import io
import json
import pathlib
import re
import sys
import tempfile
import unittest
import unittest.mock

HERE = pathlib.Path(__file__).absolute().parent
sys.path.insert(0, str(HERE))

import compare  # noqa: E402
import inputs  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402


def tenon_output(*results):
    return json.dumps({"bench": "moe_bench", "device": "a GPU",
                       "read_gb_per_s": 3000.0, "results": list(results)})


def tenon(tokens, us, **more):
    return dict(dict(op="moe_layer", shape="s", tokens=tokens, dtype="bfloat16",
                     us=us, limit_us=us / 2, experts=8.0, note="uniform"), **more)


def peer(who, tokens, us):
    return dict(op="moe_layer", shape="s", tokens=tokens, dtype="bfloat16",
                note="uniform", who=who, us=us)


class ArgumentsTest(unittest.TestCase):
    def test_defaults(self):
        args = compare.parse_arguments([])
        self.assertEqual(args.op, ["moe", "qk_norm", "decode"])
        self.assertEqual(compare.tokens_of(args, "moe"), shapes.TOKENS)
        self.assertEqual(compare.tokens_of(args, "decode"), [1, 8, 32])
        self.assertEqual(args.routing, ["uniform"])
        self.assertEqual(args.dtype, ["bf16", "fp8"])

    def test_lists(self):
        args = compare.parse_arguments(
            ["--tokens", "1,64", "--routing", "skewed,all-to-one", "--dtype", "fp8"])
        self.assertEqual(compare.tokens_of(args, "moe"), [1, 64])
        self.assertEqual(args.routing, ["skewed", "all-to-one"])
        self.assertEqual(args.dtype, ["fp8"])

    def test_rejects(self):
        for argv in (["--dtype", "fp4"], ["--routing", "random"], ["--tokens", "0"],
                     ["--tokens", "1,,2"], ["--shape", "gpt"], ["--op", "moe,sampler"]):
            with self.assertRaises(SystemExit), contextlib.redirect_stderr(
                    io.StringIO()):
                compare.parse_arguments(argv)

    def test_commands(self):
        folder = pathlib.Path("/b")
        args = compare.parse_arguments(
            ["--shape", "tp4", "--routing", "uniform,skewed", "--tokens", "8"])
        commands = compare.bench_commands(args, "moe", folder)
        self.assertEqual(len(commands), 2)
        self.assertEqual(commands[1], [
            "/b/moe_bench", "--op", "moe_layer", "--routing", "skewed", "--dtype",
            "bf16,fp8", "--json", "--device", "cuda", "--shape", "tp4", "--tokens",
            "8"])
        args = compare.parse_arguments(["--op", "qk_norm", "--tokens", "1,64"])
        self.assertEqual(compare.bench_commands(args, "qk_norm", folder), [[
            "/b/qk_norm_bench", "--op", "qk_norm", "--json", "--device", "cuda",
            "--shape", "30b-a3b-tp1", "--tokens", "1,64"]])
        args = compare.parse_arguments(["--op", "decode", "--dtype", "bf16"])
        self.assertEqual(compare.bench_commands(args, "decode", folder), [[
            "/b/decode_bench", "--json", "--device", "cuda", "--prefill", "0",
            "--batch", "1,8,32", "--context", "1024", "--dtype", "bf16"]])

    def test_dry_run_tells_what_would_run(self):
        text = self.printed("--dry-run", "--op", "moe,decode", "--dtype", "fp8",
                            "--tokens", "1,8")
        self.assertEqual(text.splitlines(), [
            "$ tests/bench/moe_bench --op moe_layer --routing uniform --dtype fp8 "
            "--json --device cuda --shape 30b-a3b-tp1 --tokens 1,8",
            "moe, triton and torch, fp8, qwen3-30b-a3b-tp1, uniform: 1,8 tokens",
            "$ tests/bench/decode_bench --json --device cuda --prefill 0 --batch 1,8 "
            "--context 1024 --dtype fp8",
            "decode, transformers, bf16, context 1024: batch 1,8"])
        text = self.printed("--dry-run", "--op", "qk_norm", "--only", "peers",
                            "--tokens", "64")
        self.assertEqual(
            text, "qk_norm, torch, bf16, qwen3-30b-a3b-tp1: 64 tokens\n")

    def printed(self, *argv):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            compare.main(argv)
        return out.getvalue()


class RunTest(unittest.TestCase):
    """compare.py with programs and peers that only pretend."""

    def run_with(self, peers):
        """The exit code, the lines printed and the results of a run."""
        with tempfile.TemporaryDirectory() as folder:
            for name, op, note in (("moe_bench", "moe_layer", "uniform"),
                                   ("decode_bench", "decode", "context 1024")):
                program = pathlib.Path(folder) / name
                result = tenon(8, 100.0, op=op, note=note)
                program.write_text(
                    f"#!/bin/sh\necho '{tenon_output(result)}'\n")
                program.chmod(0o755)
            out, json_file = io.StringIO(), pathlib.Path(folder) / "all.json"
            with unittest.mock.patch.object(compare, "run_peers", peers), \
                    contextlib.redirect_stdout(out), \
                    contextlib.redirect_stderr(io.StringIO()):
                code = compare.main(["--op", "moe,decode", "--bench", folder,
                                     "--json", str(json_file)])
            return (code, out.getvalue().splitlines(),
                    json.loads(json_file.read_text())["results"])

    def test_both_sides_in_one_table(self):
        code, lines, results = self.run_with(lambda args, op: [dict(
            peer("a peer", 8, 150.0), op=compare.OPS[op][0],
            note="uniform" if op == "moe" else "context 1024")])
        self.assertEqual(code, 0)
        self.assertEqual(sum("a peer" in l and l.endswith("1.500") for l in lines), 2)
        self.assertEqual(len(results), 4)

    def test_a_peer_that_fails_leaves_our_numbers(self):
        def peers(args, op):
            raise ImportError("no torch here")

        code, lines, results = self.run_with(peers)
        self.assertEqual(code, 1)
        self.assertEqual(sum("100.00" in line for line in lines), 2)
        self.assertEqual(len(results), 2)


class ReportTest(unittest.TestCase):
    def results(self):
        _, results = report.parse_bench(tenon_output(tenon(1, 30.0), tenon(8, 160.0)))
        return results + [
            peer("a", 1, 45.0), peer("b", 1, 36.0), peer("ceiling: c", 1, 10.0),
            peer("a", 8, 150.0)]

    def test_parses_output_of_a_benchmark(self):
        head, results = report.parse_bench(
            "a warning\n" + tenon_output(tenon(1, 30.0), tenon(1, 2.0, op="moe")),
            {"moe_layer"})
        self.assertEqual(head["read_gb_per_s"], 3000.0)
        self.assertEqual([(r["who"], r["us"]) for r in results], [("tenon", 30.0)])
        with self.assertRaises(ValueError):
            report.parse_bench("Moe: no CUDA device")

    def test_ratio_is_of_the_best_peer_and_of_no_ceiling(self):
        header, rows = report.rows_of(self.results())
        self.assertEqual(header, [
            "op", "dtype", "shape", "note", "tokens", "experts", "limit", "tenon",
            "a", "b", "ceiling: c", "best peer", "ratio"])
        self.assertEqual(rows[0], [
            "moe_layer", "bfloat16", "s", "uniform", "1", "8.0", "15.0", "30.00",
            "45.00", "36.00", "10.00", "b", "1.200"])
        self.assertEqual(rows[1][7:], ["160.00", "150.00", "-", "-", "a", "0.938"])

    def test_one_side_alone(self):
        _, rows = report.rows_of([peer("a", 1, 45.0)])
        self.assertEqual(rows[0][5:], ["-", "-", "-", "45.00", "a", "-"])
        _, rows = report.rows_of(report.parse_bench(tenon_output(tenon(1, 30.0)))[1])
        self.assertEqual(rows[0][5:], ["8.0", "15.0", "30.00", "-", "-"])

    def test_token_counts_sort_as_numbers(self):
        _, rows = report.rows_of([peer("a", n, 1.0) for n in (1024, 8, 16384)])
        self.assertEqual([row[4] for row in rows], ["8", "1024", "16384"])

    def test_tables(self):
        header, rows = report.rows_of(self.results())
        lines = report.format_table(header, rows).splitlines()
        self.assertEqual(len(lines), 3)
        self.assertTrue(lines[1].endswith("1.200"))
        lines = report.format_table(header, rows, markdown=True).splitlines()
        self.assertEqual({line.count("|") for line in lines}, {len(header) + 1})

    def test_json_holds_everything(self):
        text = report.to_json({"device": "a GPU"}, self.results())
        self.assertEqual(len(json.loads(text)["results"]), 6)


class InputsTest(unittest.TestCase):
    def test_shapes_are_those_of_the_header(self):
        text = (HERE.parents[1] / "testing/shapes.h").read_text()
        rows = re.findall(r'\{"([^"]+)", ([\d, ]+)\}', text)
        self.assertEqual(len(rows), len(shapes.SHAPES))
        for (name, numbers), shape in zip(rows, shapes.SHAPES):
            n = [int(v) for v in numbers.split(",")]
            # hidden, heads, kv heads, head_dim, rotary, experts, top_k,
            # intermediate, vocab
            self.assertEqual(tuple(shape), (name, *n[:4], *n[5:8]))

    def test_logits_are_those_of_moe_bench(self):
        # From RouterLogits(200, 160, routing, 3) of router_logits.h.
        expected = {
            "uniform": ([1.189201, 1.186351, -1.105610, 1.799445],
                        [129, 35, 48, 24, 147, 4, 14, 71]),
            "skewed": ([-3.241616, -3.220368, -5.512329, -2.936754],
                       [129, 35, 31, 38, 80, 59, 48, 147]),
            "all-to-one": ([-4.15, -4.05, -4.05, -5.65],
                           [59, 80, 38, 94, 31, 39, 125, 67])}
        for routing, (values, best) in expected.items():
            rows = inputs.logit_rows(200, 160, routing, 3)
            flat = [v for row in rows for v in row]
            for i, value in zip((0, 1, 161, 31999), values):
                self.assertAlmostEqual(flat[i], value, places=5)
            order = sorted(range(160), key=lambda e: -rows[199][e])
            self.assertEqual(order[:8], best)


if __name__ == "__main__":
    unittest.main()
