#!/usr/bin/env python3
"""What a call costs from Python: rms_norm of no rows, three tensors, outputs and
stream as a caller would leave them. The best of many short rounds, so that a
busy machine tells the same. Torch's tensors are measured where it is installed."""

import importlib.util
import time

import numpy

import tenon


def microseconds(function, calls=200, rounds=500):
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        for _ in range(calls):
            function()
        best = min(best, time.perf_counter_ns() - begin)
    return best / calls / 1000


def measure(name, x, weight, out):
    print(
        f"{name:16}",
        f"{microseconds(lambda: tenon.rms_norm(x, weight, out=out)):.2f} us",
    )


def main():
    shapes = (0, 2048), (2048,), (0, 2048)
    arrays = [numpy.ones(shape, numpy.float32) for shape in shapes]
    measure("NumPy", *arrays)
    measure("tenon.Tensor", *map(tenon.Tensor, arrays))
    if importlib.util.find_spec("torch"):
        import torch

        measure("torch", *(torch.ones(shape) for shape in shapes))
    op = tenon._ops["rms_norm"]
    call = op.call()
    for field, array in zip(("x", "weight", "out"), arrays):
        call.set(field, array)
    call.args.epsilon = 1e-6
    arguments = (0, call._args_address, 0, call._error_address)
    print(
        f"{'the C call alone':16}",
        f"{microseconds(lambda: op.function(*arguments)):.2f} us",
    )


if __name__ == "__main__":
    main()
