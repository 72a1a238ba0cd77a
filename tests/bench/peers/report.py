"""Results of Tenon's benchmarks and of the peers, side by side. No torch here.

A result is a dict: op, shape, tokens, dtype, note (the routing), who, us; and
of Tenon's also limit_us and experts. Results of one op, shape, number of tokens,
dtype and note belong together.
"""

import json

TENON = "tenon"
# Not the same work: no ratio is taken of them.
CEILINGS = ("ceiling: ",)


def parse_bench(text, ops=None):
    """The results in a benchmark's --json output, as those of Tenon. Lines
    before the JSON are skipped."""
    begin = text.find("{")
    if begin < 0:
        raise ValueError("no JSON in the benchmark's output: " + text[:200])
    report = json.loads(text[begin:])
    results = []
    for result in report["results"]:
        if ops is None or result["op"] in ops:
            results.append(dict(result, who=TENON))
    return report, results


def key_of(result):
    return tuple(result[k] for k in ("op", "dtype", "shape", "note", "tokens"))


def is_ceiling(who):
    return who.startswith(CEILINGS)


def merge(results):
    """{key: {who: result}}; a later result of one who replaces an earlier."""
    cases = {}
    for result in results:
        cases.setdefault(key_of(result), {})[result["who"]] = result
    return cases


def best_peer(case):
    """The fastest that does the same work, or None."""
    peers = [
        r for r in case.values() if r["who"] != TENON and not is_ceiling(r["who"])
    ]
    return min(peers, key=lambda r: r["us"], default=None)


def rows_of(results):
    """(header, rows) of text. The ratio is the best peer's time over Tenon's:
    above 1, Tenon is faster."""
    cases = merge(results)
    whos = []
    for case in cases.values():
        whos += [w for w in case if w not in whos and w != TENON]
    whos.sort(key=is_ceiling)
    header = ["op", "dtype", "shape", "note", "tokens", "experts", "limit", TENON]
    header += whos + ["best peer", "ratio"]
    rows = []
    for key in sorted(cases):
        case = cases[key]
        tenon = case.get(TENON, {})
        best = best_peer(case)
        row = [str(part) for part in key]
        row += [number(tenon.get("experts"), 1), number(tenon.get("limit_us"), 1)]
        row += [number(case.get(w, {}).get("us"), 2) for w in [TENON] + whos]
        row += [best["who"] if best else "-"]
        row += [number(best["us"] / tenon["us"] if best and tenon else None, 3)]
        rows.append(row)
    return header, rows


def number(value, decimals):
    return f"{value:.{decimals}f}" if value else "-"


def format_table(header, rows, markdown=False):
    if markdown:
        lines = ["| " + " | ".join(header) + " |"]
        lines.append("|" + "|".join(["---"] * 4 + ["--:"] * (len(header) - 4)) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join(lines)
    widths = [max(len(r[i]) for r in [header] + rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < 4 else cell.rjust(w)
                  for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in [header] + rows
    )


def to_json(header_of_bench, results):
    return json.dumps(
        {"tenon": header_of_bench, "results": results}, indent=1, sort_keys=True
    )
