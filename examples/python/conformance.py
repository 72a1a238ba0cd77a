#!/usr/bin/env python3
"""Runs Tenon's conformance vectors through tenon.py, then writes a text.

python3 conformance.py VECTORS MODEL_DIR [LIBTENON]
"""

import dataclasses
import itertools
import math
import os
import sys

import numpy

if len(sys.argv) > 3:
    os.environ["TENON_LIBRARY"] = os.path.abspath(sys.argv[3])

import tenon  # noqa: E402 (opens the library)

BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
}


class Mismatch(Exception):
    pass


@dataclasses.dataclass
class Tensor:
    """A tensor of a case: the memory that the call sees, and how it lies there."""

    dtype: str
    shape: list[int]
    strides: list[int] | None
    offset: int
    memory: bytearray
    expected: bytes
    ulps: int = 0

    def view(self) -> tenon.TensorLike:
        """An array of NumPy's, or where NumPy lacks the dtype a plain buffer."""
        if self.dtype in ("bfloat16", "float8_e4m3fn"):
            return tenon.Tensor.from_buffer(
                self.memory, self.dtype, self.shape, self.strides, self.offset
            )
        strides = self.strides and [s * BYTES[self.dtype] for s in self.strides]
        return numpy.ndarray(self.shape, self.dtype, self.memory, self.offset, strides)

    def compact_strides(self) -> list[int]:
        return [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]

    def check(self, name: str) -> None:
        """The whole memory is as expected, elements to within `ulps`."""
        actual = bytearray(self.memory)
        size = BYTES[self.dtype]
        strides = self.strides or self.compact_strides()
        if self.ulps:
            for index in itertools.product(*map(range, self.shape)):
                at = self.offset + size * sum(i * s for i, s in zip(index, strides))
                wanted, got = self.expected[at : at + size], actual[at : at + size]
                if abs(ordered(wanted) - ordered(got)) > self.ulps:
                    raise Mismatch(
                        f"{name}{list(index)} is {got[::-1].hex()}, expected"
                        f" {wanted[::-1].hex()} to within {self.ulps}"
                    )
                actual[at : at + size] = wanted
        for at, (wanted, got) in enumerate(zip(self.expected, actual)):
            if wanted != got:
                raise Mismatch(f"{name}: byte {at} is {got:02x}, expected {wanted:02x}")


def ordered(element: bytes) -> int:
    """A float's place among the representable values of its dtype."""
    value = int.from_bytes(element, "little", signed=True)
    return value if value >= 0 else -(value & ((1 << (8 * len(element) - 1)) - 1))


@dataclasses.dataclass
class Case:
    name: str
    op: str
    args: dict[str, float] = dataclasses.field(default_factory=dict)
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    reject: tuple[int, str] | None = None

    def add(self, statement: str, *words: str) -> None:
        if statement == "arg":
            field, value = words
            is_integer = value.lstrip("-").isdigit()
            self.args[field] = int(value) if is_integer else float(value)
        elif statement == "tensor":
            field, dtype, shape, strides, offset, data = words
            self.tensors[field] = Tensor(
                dtype,
                [int(n) for n in shape.split(",")],
                None if strides == "-" else [int(n) for n in strides.split(",")],
                int(offset),
                bytearray.fromhex(data),
                bytes.fromhex(data),
            )
        elif statement == "expect":
            field, ulps, data = words
            self.tensors[field].ulps = int(ulps)
            self.tensors[field].expected = bytes.fromhex(data)
        elif statement == "reject":
            self.reject = int(words[0]), words[1]
        else:
            raise ValueError(f"unknown statement {statement}")

    def run(self, context: tenon.Context) -> None:
        views = {name: tensor.view() for name, tensor in self.tensors.items()}
        outcome = None
        try:
            tenon.call(self.op, context=context, **self.fields(views))
        except tenon.TenonError as error:
            outcome = error
        self.check_outcome(outcome)
        for name, tensor in self.tensors.items():
            tensor.check(name)

    def fields(self, views: dict[str, tenon.Tensor]) -> dict[str, object]:
        """Those of the op; the ones of moe's router in a dict of their own."""
        fields = {**self.args, **views}
        router = {f: fields.pop(f) for f in list(fields) if f.startswith("router.")}
        if router:
            router = {f.removeprefix("router."): value for f, value in router.items()}
            router.update({f: views[f] for f in ("topk_weights", "topk_ids")})
            fields["router"] = router
        return fields

    def check_outcome(self, error: tenon.TenonError | None) -> None:
        if self.reject is None:
            if error is not None:
                raise Mismatch(str(error))
            return
        code, word = self.reject
        if error is None:
            raise Mismatch(f"succeeded, expected code {code}")
        if error.code != code or word not in error.message:
            raise Mismatch(f"failed with {error}, expected {code} and '{word}'")

    def generate(self, model: tenon.Model) -> str:
        """The engine continues the prompt; every token must be the expected one."""
        prompt = numpy.frombuffer(self.tensors["prompt"].expected, "<i4").tolist()
        expected = numpy.frombuffer(self.tensors["tokens"].expected, "<i4").tolist()
        sampling = tenon.SamplingParams.greedy()
        for field, value in self.args.items():
            setattr(sampling, field, value)
        with model.session(max_sequences=1) as session:
            tokens = list(session.generate(prompt, len(expected), sampling, stop=()))
            pipelined = generate_pipelined(session, prompt, len(expected), sampling)
        if tokens != expected:
            raise Mismatch(f"tokens are {tokens}, expected {expected}")
        if pipelined != expected:
            raise Mismatch(f"two steps in flight give {pipelined}, expected {expected}")
        return bytes(prompt + tokens).decode("ascii")


def generate_pipelined(
    session: tenon.Session, prompt: list[int], count: int, sampling: tenon.SamplingParams
) -> list[int]:
    """With two steps in flight: tokens go from step to step without us."""
    tokens: list[int] = []
    with session.sequence() as sequence:
        session.enqueue([tenon.StepRow(sequence, prompt, sampling)])
        while len(tokens) < count:
            if len(tokens) + 1 < count:
                session.enqueue([tenon.StepRow(sequence, None, sampling)])
            tokens += session.wait().tokens
    return tokens


def read_cases(path: str) -> list[Case]:
    cases: list[Case] = []
    with open(path, encoding="ascii") as lines:
        for line in lines:
            words = line.split()
            if not words or words[0].startswith("#") or words[0] == "end":
                continue
            if words[0] == "case":
                cases.append(Case(words[1], words[2]))
            else:
                cases[-1].add(*words)
    return cases


def main() -> int:
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    cases = read_cases(sys.argv[1])
    print(f"libtenon {tenon.version()}")
    with tenon.Context("cpu") as context, tenon.Model.load(sys.argv[2]) as model:
        for op, group in itertools.groupby(cases, lambda case: case.op):
            passed = 0
            for case in group:
                try:
                    if op == "generate":
                        print(f"{case.name}: {case.generate(model)}")
                    else:
                        case.run(context)
                except Mismatch as error:
                    print(f"{case.name}: {error}")
                    return 1
                passed += 1
            print(f"{op}: {passed} cases")
    print(f"{len(cases)} cases passed")
    return 0 if cases else 1


if __name__ == "__main__":
    sys.exit(main())
