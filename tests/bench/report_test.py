"""report.py on made-up results, and its tables' places in the document."""

import json
import pathlib
import sys
import tempfile
import unittest

HERE = pathlib.Path(__file__).absolute().parent
sys.path.insert(0, str(HERE))

import report  # noqa: E402

DEVICE = "NVIDIA H200"
DOCUMENT = HERE.parents[1] / "docs/performance.md"


def result(op="moe_layer", shape=report.TP1, tokens=8, dtype=report.BF16,
           note="uniform", us=100.0, **more):
    return dict(dict(op=op, shape=shape, tokens=tokens, dtype=dtype, note=note, us=us,
                     bytes=2e8, flops=3e10, limit_us=us / 2, experts=50.0,
                     copy_us=us * 2, launches=0), **more)


def results_of(*cases, device=DEVICE):
    results = report.Results(device)
    results.add({"read_gb_per_s": 4000.0, "results": list(cases)})
    return results


# Cases of every table, and a line that each must have.
CASES = {
    "| batch 8 | 1024 | 10.00 ms | 800 | 50.0 % | not measured |  |  |": result(
        "decode", "qwen3-30b-a3b/48L", note="context 1024", us=1e4),
    "| 512 tokens | 20.00 ms | 25,600 | 2 | 50.0 | not measured |  |  |  |": result(
        "prefill", "qwen3-30b-a3b/48L", 512, note="", us=2e4),
    "| 64 | 1.50 (0.50x) |  |  |  |": result("qk_norm", tokens=64, note="", us=1.5),
    "| GLM-4.6 TP4 |  | 1.50 (0.50x) |  |  |  |  |": result(
        "qk_norm", "glm-4.6-tp4", 1024, note="", us=1.5),
    "| 8 | 100.0 | 50.0 % | 300 | 131.1 |  |  |  | 81.8 |": result(),
    "| 8 |  |  | 100.0 (50 %) |  |": result(dtype=report.FP8, note="skewed"),
    "| 8 | bf16 | 100.0 (50 %) |  |  |": result(shape="qwen3-30b-a3b-tp4"),
    "| 64 | 5.00 |  |  |  |": result("prepare", tokens=64, note="", us=5.0),
    "| o 2048 x 4096 | 8 |  | 5.00 |  |": result(
        "linear built-in", report.TP1 + " o", note="2048 x 4096", us=5.0),
    "| qkv 5120 x 2048 | 8 |  | 6.00 |  |": result(
        "linear built-in", report.TP1 + " qkv", dtype=report.FP8, note="5120 x 2048",
        us=6.0),
    "| 4096 | 32 | 100.00 (50 %) |  |  |": result(
        "attention decode", tokens=32, note="context 4096, page 16"),
    "| 8192 (4 prompts) | 2048 | 100.0 | 300 |  |": result(
        "attention prefill", tokens=8192, note="context 2048, page 16"),
    "| 8 | float32 | 9.00 |  |  |  |  |  |": result(
        "sampler greedy", "151936 peaked", dtype=report.F32, note="", us=9.0),
    "| 64 | equal |  | 9.00 |  |  |": result(
        "sampler plain", "151936 equal", 64, report.F32, "", 9.0),
}


class ReportTest(unittest.TestCase):
    def test_every_table(self):
        lines = [line for _, header, rows in report.tables(results_of(*CASES.values()))
                 for line in report.format_table(header, rows)]
        for line in CASES:
            self.assertIn(line, lines)

    def test_tables_fit_their_beginnings(self):
        for start, header, rows in report.tables(results_of(*CASES.values())):
            lines = report.format_table(header, rows)
            self.assertTrue(lines[0].startswith(start), lines[0])
            self.assertEqual({line.count("|") for line in lines}, {len(header) + 1})

    def test_the_document_has_a_place_for_every_table(self):
        device = "NVIDIA H100 80GB HBM3"
        text, missing = report.replace(DOCUMENT.read_text(),
                                       results_of(*CASES.values(), device=device))
        self.assertEqual(missing, [])
        for start, header, rows in report.tables(
                results_of(*CASES.values(), device=device)):
            self.assertIn("\n".join(report.format_table(header, rows)) + "\n", text)

    def test_replaces_in_the_section_of_the_device_alone(self):
        table = "| M | bf16, us | old |\n|--:|--:|--:|\n| 1 | 2 | 3 |\n"
        document = f"# Results\n\n## A GPU\n\n{table}\n## {DEVICE}\n\n{table}\nText.\n"
        text, missing = report.replace(document, results_of(result()))
        self.assertEqual(missing, [])
        before, after = text.split(f"## {DEVICE}\n")
        self.assertEqual(before, document.split(f"## {DEVICE}\n")[0])
        self.assertNotIn("old", after)
        self.assertTrue(after.endswith(" 81.8 |\n\nText.\n"), after)

    def test_says_what_has_no_place(self):
        document = f"## {DEVICE}\n\nnothing\n"
        self.assertEqual(report.replace(document, results_of(result())),
                         (document, ["| M | bf16, us |"]))
        self.assertEqual(report.replace("# Results\n", results_of(result())),
                         ("# Results\n", [f"## {DEVICE}"]))

    def test_reads_a_folder(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            for name, us in (("a.json", 1.0), ("b.json", 2.0)):
                output = {"device": DEVICE, "read_gb_per_s": 1.0,
                          "results": [result(us=us)]}
                (path / name).write_text("a warning\n" + json.dumps(output))
            devices = report.read(path)
        self.assertEqual(list(devices), [DEVICE])
        case = devices[DEVICE].get("moe_layer", report.TP1, report.BF16, "uniform", 8)
        self.assertEqual(case["us"], 2.0)


if __name__ == "__main__":
    unittest.main()
