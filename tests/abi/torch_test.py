#!/usr/bin/env python3
"""libtenon.so from Python on torch tensors, against torch's own float64, at the
shapes of Qwen3-30B-A3B on one GPU. Run by hand on a host that has torch, from
the bundle or the repository's root:

    python3 tests/abi/torch_test.py [--device cpu] [--library LIBTENON]

On the CPU the shapes are smaller. Prints a line for each check and "N checks
passed".

Bounds are derived, not tuned: u is the unit roundoff of the dtype, and a result
may be off by u times the magnitude of each value that the contract rounds (see
tenon.h), plus float32's error of the sums. Where torch computes the same in the
dtype itself, Tenon's mean error must not be larger than torch's.
"""

import ctypes
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback

from torch_cases import (  # first: it names the library
    ARGS,
    Attention,
    BINDING,
    CUDA,
    CheckFailed,
    DEVICE,
    DTYPES,
    EPSILON,
    HEAD_DIM,
    HIDDEN,
    Layer,
    Moe,
    NUM_EXPERTS,
    NUM_KV_HEADS,
    NUM_Q_HEADS,
    QkNorm,
    TOKENS,
    TOP_K,
    U32,
    VOCAB,
    filtered,
    name_of,
    no_worse,
    normal,
    packed,
    require,
    same_bits,
    unit,
    within,
)

import tenon
import torch

# ------------------------------------------------------------------ Checks

CHECKS = []  # (name, function)


def check(function=None, **parameters):
    """Adds a check; with parameters=values, one for each combination."""

    def add(function):
        name = function.__name__.removeprefix("check_")
        combinations = [{}]
        for key, values in parameters.items():
            combinations = [{**c, key: v} for c in combinations for v in values]
        for chosen in combinations:
            words = [
                name_of(v) if isinstance(v, torch.dtype) else str(v)
                for v in chosen.values()
            ]
            CHECKS.append((" ".join([name, *words]), lambda c=chosen: function(**c)))
        return function

    return add if function is None else add(function)


@check
def check_zero_copy():
    """Torch's own memory, strides and dtypes; nothing is imported, nothing copied."""
    base = normal(6, 8, 10)
    slot = tenon._DLTensor()
    for x in (base, base[1:, ::2], base.transpose(0, 2), base[..., 3], base[:0]):
        for convert in ("exchange", "capsule"):
            keep = []
            if convert == "exchange":
                address = tenon._address("x", x, True, ctypes.addressof(slot), keep)
            else:
                converter = tenon._Converter(torch.Tensor)
                address = converter.convert("x", x, True, ctypes.addressof(slot), keep)
            seen = tenon._DLTensor.from_address(address)
            pointer = (seen.data or 0) + seen.byte_offset
            require(x.numel() == 0 or pointer == x.data_ptr(), "another address")
            for field, wanted in (("shape", x.shape), ("strides", x.stride())):
                got = list(
                    (ctypes.c_int64 * seen.ndim).from_address(getattr(seen, field))
                )
                if field == "shape" or (x.numel() and 1 not in x.shape):
                    require(got == list(wanted), f"{convert}: {field} {got}")
            require(seen.device_type == (2 if CUDA else 1), "device")
    for dtype, code in ((torch.bfloat16, (4, 16)), (torch.float8_e4m3fn, (10, 8))):
        tensor = tenon.Tensor(torch.zeros(4, device=DEVICE).to(dtype))
        require((tensor._dl.dtype_code, tensor._dl.dtype_bits) == code, f"{dtype}")
    return "addresses, shapes, strides and dtypes are torch's"


@check(dtype=DTYPES, tokens=TOKENS)
def check_rms_norm(dtype, tokens):
    x, weight = normal(tokens, HIDDEN, dtype=dtype), normal(HIDDEN, dtype=dtype, seed=1)
    v = x.double()
    exact = v * (v.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight.double()
    out = tenon.rms_norm(x, weight, epsilon=EPSILON)
    return within(out, exact, (unit(dtype) * 1.001 + 4 * U32) * exact.abs())


@check(dtype=DTYPES, tokens=TOKENS)
def check_rms_norm_residual(dtype, tokens):
    # Rows of a wider tensor, as slices of a model's activations are.
    x = normal(tokens, 2 * HIDDEN, dtype=dtype)[:, :HIDDEN]
    residual, weight = normal(tokens, HIDDEN, dtype=dtype, seed=1), normal(
        HIDDEN, seed=2
    )
    total = x + residual
    v = total.double()
    exact = v * (v.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight.double()
    out = tenon.rms_norm(x, weight, residual=residual, out=x, epsilon=EPSILON)
    require(out is x, "out is another tensor")
    same_bits(residual, total, "residual")
    return within(out, exact, (unit(dtype) * 1.001 + 4 * U32) * exact.abs())


@check(dtype=DTYPES, tokens=TOKENS)
def check_linear(dtype, tokens):
    x, weight = normal(tokens, HIDDEN, dtype=dtype), normal(
        1000, HIDDEN, dtype=dtype, seed=1
    )
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    bound = unit(dtype) * 1.001 * exact.abs() + 8 * U32 * size
    with tenon.Context(DEVICE) as context:
        for c in (None, context):
            text = within(tenon.linear(x, weight, context=c), exact, bound)
    return text


@check(dtype=DTYPES, tokens=TOKENS)
def check_qk_norm(dtype, tokens):
    case, strided = QkNorm(dtype, tokens), QkNorm(dtype, tokens)
    q, k, v = (part.clone() for part in case.heads())
    case.run()
    strided.run_strided()
    same_bits(case.qkv, strided.qkv, "packed and strided")
    same_bits(case.caches, strided.caches, "caches of packed and strided")
    new_q, new_k, new_v = case.heads()
    text = within(new_q, *case.exact(q, case.q_weight))
    within(new_k, *case.exact(k, case.k_weight))
    same_bits(new_v, v, "v")
    wanted = torch.full_like(case.caches, 3.0)
    wanted[0].view(-1, NUM_KV_HEADS, HEAD_DIM)[case.slots] = new_k
    wanted[1].view(-1, NUM_KV_HEADS, HEAD_DIM)[case.slots] = v
    same_bits(case.caches, wanted, "caches")
    return text


DECODE = [(1, 700), (1, 1), (1, 16), (1, 1029)]
RAGGED = [(1, 700), (13, 13), (64, 300), (1, 1), (7, 40)]
PREFILL = [(512, 512)] if CUDA else [(64, 64)]


@check(dtype=DTYPES, lengths=[DECODE, RAGGED, PREFILL])
def check_attention(dtype, lengths):
    case = Attention(dtype, lengths)
    exact, size = case.exact()
    u = unit(dtype) * 1.01
    bound = (
        u * exact.abs() + (u if dtype != torch.float32 else 0) * size + 64 * U32 * size
    )
    outs = [
        tenon.attention(*case.arguments(), batch_invariant=i) for i in (False, True)
    ]
    within(outs[1], exact, bound)
    # The same call into views of wider rows.
    wide = torch.zeros(
        len(case.q), NUM_Q_HEADS + 3, HEAD_DIM, dtype=dtype, device=DEVICE
    )
    tenon.attention(*case.arguments(), out=wide[:, 3:])
    same_bits(wide[:, 3:], outs[0], "strided out")
    require(not wide[:, :3].any().item(), "wrote beside out")
    return within(outs[0], exact, bound)


@check(dtype=DTYPES, tokens=TOKENS)
def check_moe_router(dtype, tokens):
    logits = normal(tokens, NUM_EXPERTS, dtype=dtype, scale=3.0)
    weights, ids = tenon.moe_router(logits, TOP_K)
    scores = logits.double().softmax(-1)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :TOP_K]
    chosen = scores.gather(-1, order)
    if dtype == torch.float32:  # float32 scores may tie where these do not
        mine = scores.gather(-1, ids.long())
        within(mine, chosen, 4 * U32 * chosen + 1e-9)
    else:
        require(torch.equal(ids.long(), order), "other experts")
    exact = chosen / chosen.sum(-1, keepdim=True)
    return within(weights, exact, 32 * U32 * exact)


@check(dtype=DTYPES, tokens=TOKENS)
def check_moe(dtype, tokens):
    case = Moe(dtype, tokens)
    exact, size = case.compute(torch.float64)
    # h, the weighted rows and the sum are rounded; |rows| are within size.
    u = unit(dtype) * 1.01
    bound = 2 * u * size + u * exact.abs() + 32 * U32 * size
    out = tenon.moe(*case.arguments())
    text = within(out, exact, bound)
    within(tenon.moe(*case.arguments(), batch_invariant=True), exact, bound)
    if dtype == torch.bfloat16:
        text = no_worse(out, exact, case.compute(dtype)[0])
    return text


@check(dtype=[torch.bfloat16], tokens=TOKENS)
def check_moe_stages(dtype, tokens):
    """The layer from its parts: align, two grouped GEMMs, SwiGLU, reduction."""
    case = Moe(dtype, tokens)
    exact, size = case.compute(torch.float64)
    groups = tenon.moe_align(case.topk_ids, NUM_EXPERTS, tile_rows=64)
    counts = torch.bincount(case.topk_ids.flatten().long(), minlength=NUM_EXPERTS)
    require(torch.equal(groups.expert_offsets.diff().long(), counts), "offsets")
    csr = groups.expert_offsets, groups.sorted_slots
    gate_up = tenon.moe_grouped_matmul(case.x, case.w13, *csr, slots_per_row=TOP_K)
    h = tenon.moe_swiglu(gate_up)
    rows = tenon.moe_grouped_matmul(
        h, case.w2, *csr, slots_per_row=1, routing_weights=case.topk_weights.flatten()
    )
    out = tenon.moe_sum_reduce(rows.view(tokens, TOP_K, HIDDEN))
    # Gate, up, silu, their product and the rows are rounded.
    return within(out, exact, 6 * unit(dtype) * size)


@check(dtype=DTYPES)
def check_embedding(dtype):
    table = normal(1000, HIDDEN, dtype=dtype)
    ids = torch.tensor([0, 999, 5, -1, 1000, 5], device=DEVICE)
    wanted = table[ids.clamp(0, 999)]
    wanted[3:5] = 0
    same_bits(tenon.embedding(ids, table), wanted, "out")
    return "bit for bit"


@check(dtype=DTYPES, rows=[1, 13, 64])
def check_sampler_greedy(dtype, rows):
    logits = normal(rows, VOCAB, dtype=dtype)
    params = packed([tenon.SamplingParams.greedy()] * rows)
    samples = tenon.sampler(logits, params, logprobs=True)
    ids = torch.arange(VOCAB, device=DEVICE)
    best = logits.amax(-1, keepdim=True)
    wanted = torch.where(logits == best, ids, VOCAB).amin(-1)  # ties: the lowest id
    require(torch.equal(samples.tokens.long(), wanted), "other tokens")
    require(not samples.statuses.any().item(), "statuses")
    exact = logits.double().log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
    return within(samples.logprobs, exact, 16 * U32 * exact.abs() + 1e-5)


@check(filters=["none", "top_k", "top_p", "min_p", "all"])
def check_sampler_distribution(filters):
    """Seeded draws follow the filtered distribution: a chi-square test, which a
    fixed seed makes repeatable."""
    vocab, rows, rounds = 500, 512, 32
    logits = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(5))
    options = {
        "none": {},
        "top_k": {"top_k": 20},
        "top_p": {"top_p": 0.8},
        "min_p": {"min_p": 0.05},
        "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7},
    }[filters]
    exact = filtered((logits / options.get("temperature", 1.0)).double(), options)
    counts = torch.zeros(vocab, dtype=torch.float64)
    batch = logits.to(DEVICE).repeat(rows, 1)
    for i in range(rounds):
        params = packed(
            [tenon.SamplingParams(seed=r, position=i, **options) for r in range(rows)]
        )
        tokens = tenon.sampler(batch, params).tokens
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(i)).to(
            DEVICE
        )
        again = tenon.sampler(batch, params[order]).tokens
        require(torch.equal(again, tokens[order]), "a token depends on its row")
        counts += torch.bincount(tokens.long().cpu(), minlength=vocab)
    require(not counts[exact == 0].any(), "a token that the filters drop")
    expected = exact * rows * rounds
    common = expected >= 5
    rest = torch.tensor([counts[~common].sum(), expected[~common].sum()])
    chi = ((counts - expected).square() / expected)[common].sum()
    if rest[1] >= 5:
        chi += (rest[0] - rest[1]).square() / rest[1]
    freedom = int(common.sum())
    limit = freedom + 5 * (2 * freedom) ** 0.5
    require(chi < limit, f"chi-square {chi:.1f} with {freedom} degrees of freedom")
    return f"chi-square {chi:.0f} with {freedom} degrees of freedom"


# ------------------------------------------------------- Streams and graphs


@check(tokens=[1, 13, 64])
def check_cuda_graph(tokens):
    """A captured graph of the calls replays bit for bit on changed inputs. A
    synchronisation would make the capture fail."""
    if not CUDA:
        return "skipped: no CUDA device"
    layer = Layer(tokens)
    layer.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.run()
    for seed in (1, 2, 3):
        layer.randomise(seed)
        layer.run()
        eager = layer.results()
        for t in (layer.normed, layer.attended, layer.out, layer.qk.caches):
            t.zero_()
        layer.qk.caches.fill_(3.0)
        graph.replay()
        for i, (a, b) in enumerate(zip(layer.results(), eager)):
            same_bits(a, b, f"seed {seed}, result {i}")
    return "three replays"


@check
def check_no_allocation():
    """With outputs and workspace given, torch allocates nothing."""
    layer = Layer(13)
    layer.ops()
    if not CUDA:
        return "runs; torch counts allocations on CUDA alone"
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(10):
        layer.ops()
    after = torch.cuda.memory_stats()["allocation.all.allocated"]
    require(after == before, f"{after - before} allocations in 10 rounds")
    return "0 allocations in 10 rounds"


@check
def check_streams():
    """None is torch's current stream; an explicit one is used as given."""
    if not CUDA:
        return "skipped: no CUDA device"
    case = Moe(torch.bfloat16, 64)
    expected = tenon.moe(*case.arguments())
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    outs = []
    for stream in (None, side, side.cuda_stream):
        for _ in range(20):
            with torch.cuda.stream(side):
                torch.cuda._sleep(
                    2_000_000
                )  # 1 ms: work on another stream comes too early
                x = torch.zeros_like(case.x)
                torch.cuda._sleep(2_000_000)
                x.copy_(case.x)
            arguments = (x, *case.arguments()[1:])
            if stream is None:
                with torch.cuda.stream(side):
                    outs.append(tenon.moe(*arguments))
            else:
                outs.append(tenon.moe(*arguments, stream=stream))
            x.record_stream(side)
        side.synchronize()
        for out in outs:
            same_bits(out, expected, f"stream {stream}")
        outs.clear()
    return "current, torch.cuda.Stream, int"


@check
def check_errors():
    """The library's messages come through, nothing is launched."""
    x, weight = normal(2, 64), normal(64)
    elsewhere = torch.empty(2, 64, device="cpu" if CUDA else "meta")
    wrong = [
        (lambda: tenon.rms_norm(x, weight[:63]), tenon.TenonError, "weight"),
        (lambda: tenon.rms_norm(x, weight, epsilon=0.0), tenon.TenonError, "epsilon"),
        (lambda: tenon.rms_norm(x, weight.half()), tenon.TenonError, "weight"),
        (lambda: tenon.rms_norm(x.t(), weight[:2]), tenon.TenonError, "x"),
        (lambda: tenon.rms_norm(x.to_sparse(), weight, out=x), Exception, "x"),
        (lambda: tenon.rms_norm(x, weight, out=elsewhere), Exception, "out"),
        (lambda: tenon.rms_norm(x, None), tenon.TenonError, "weight"),
    ]
    before = x.clone()
    for i, (function, kind, word) in enumerate(wrong):
        try:
            function()
        except kind as error:
            require(word in str(error), f"error {i} says: {error}")
        else:
            raise CheckFailed(f"error {i} was not raised")
    same_bits(x, before, "x")
    parameter = torch.nn.Parameter(weight)
    same_bits(tenon.rms_norm(x, parameter), tenon.rms_norm(x, weight), "nn.Parameter")
    return f"{len(wrong)} refusals"


# ------------------------------------------------------------------- Loading

IN_A_FRESH_PROCESS = """
import importlib.util, os, sys
def load(name, library):
    os.environ["TENON_LIBRARY"] = library
    spec = importlib.util.spec_from_file_location(name, sys.argv[1] + "/tenon.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
device, copies, modules = sys.argv[2], sys.argv[4:], []
for what in sys.argv[3].split(","):
    if what == "torch":
        import torch
        (torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).cpu()
    else:
        modules.append(load(what, copies[len(modules)]))
x = torch.randn(13, 64, device=device)
outs = [m.rms_norm(x, torch.ones(64, device=device)).cpu() for m in modules]
assert all(torch.equal(o, outs[0]) for o in outs)
if len(modules) == 2:
    one, two = modules
    context = one.Context(device)
    stranger = two.Context.__new__(two.Context)
    stranger._handle = context._handle
    try:
        two.rms_norm(x, torch.ones(64, device=device), context=stranger)
    except two.TenonError as error:
        assert error.code == two.NOT_FOUND, error
    else:
        raise AssertionError("a handle of the other copy was taken")
print("loaded")
"""


@check(
    order=[
        "torch,tenon",
        "tenon,torch",
        "torch,tenon,other",
        "tenon,torch,other",
        "tenon,other,torch",
    ]
)
def check_loading(order):
    """Beside torch, in every order, alone and with a second copy of itself."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "libother.so"
        copy.write_bytes(pathlib.Path(ARGS.library).read_bytes())
        command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(BINDING), str(DEVICE)]
        command += [order, os.path.abspath(ARGS.library), str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    require(done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}")
    require(done.stdout.strip() == "loaded", done.stdout)
    return "loads and runs"


@check
def check_no_torch_without_torch():
    script = "import sys, tenon; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    environment = dict(os.environ, PYTHONPATH=str(BINDING))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True
    )
    require(done.returncode == 0, done.stderr.decode())
    return "imports neither torch nor NumPy"


@check
def check_call_overhead():
    """Not a limit, a measurement: Python's time of one rms_norm of no rows."""
    x, weight = normal(0, HIDDEN), normal(HIDDEN)
    out = torch.empty_like(x)
    wrapped = tuple(tenon.Tensor(t) for t in (x, weight, out))
    texts = []
    for name, arguments in (("torch", (x, weight, out)), ("tenon.Tensor", wrapped)):
        a, w, o = arguments
        best = float("inf")
        for _ in range(20):
            begin = time.perf_counter()
            for _ in range(1000):
                tenon.rms_norm(a, w, out=o)
            best = min(best, (time.perf_counter() - begin) / 1000)
        texts.append(f"{name} {best * 1e6:.2f} us")
    return ", ".join(texts)


def main():
    print(
        f"torch {torch.__version__}, tenon {tenon.version()}, ABI {tenon.abi_version()}"
    )
    if CUDA:
        info = tenon.device_info(DEVICE)
        print(f"{info.name}, compute capability {info.compute_capability}")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    chosen = [(n, f) for n, f in CHECKS if ARGS.filter in n]
    failed = 0
    for name, function in chosen:
        try:
            print(f"ok    {name}: {function()}", flush=True)
        except CheckFailed as error:
            failed += 1
            print(f"FAIL  {name}: {error}", flush=True)
        except Exception:
            failed += 1
            print(f"FAIL  {name}: {traceback.format_exc()}", flush=True)
    if failed or not chosen:
        print(f"{failed} of {len(chosen)} checks failed")
        return 1
    print(f"{len(chosen)} checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
