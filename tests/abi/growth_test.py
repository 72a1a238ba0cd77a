"""Structs that are shorter, longer or emptier than the library knows, for every
function of layout.json that takes one.

Structs lie at the end of readable memory, so that a byte read or written past
what the caller's struct_size promises ends the test.
"""

import collections
import ctypes
import json
import mmap
import os
import pathlib
import unittest

LIBRARY = os.path.abspath("abi/libtenon.so.1")
CONFIG = pathlib.Path("tests/golden/qwen3_moe_tiny/config.json").read_bytes()
LAYOUT = json.loads(pathlib.Path("abi/layout.json").read_text())
CONSTANTS = {c["name"]: c["value"] for c in LAYOUT["constants"]}
STRUCTS = {s["name"]: s for s in LAYOUT["structs"]}
FUNCTIONS = {f["name"]: f for f in LAYOUT["functions"]}

OK = CONSTANTS["TENON_OK"]
INVALID_ARGUMENT = CONSTANTS["TENON_INVALID_ARGUMENT"]
UNIMPLEMENTED = CONSTANTS["TENON_UNIMPLEMENTED"]
MAX_STRUCT_SIZE = 4096  # kMaxStructSize of abi/call.h


def first_sizes():
    """Each struct's size in the first version that had it."""
    sizes = {name: struct["size"] for name, struct in STRUCTS.items()}
    history = pathlib.Path("abi/history").glob("layout_*.json")
    for path in sorted(history, key=lambda p: int(p.stem.split("_")[2]), reverse=True):
        sizes.update((s["name"], s["size"]) for s in json.loads(path.read_text())["structs"])
    return sizes


FIRST_SIZES = first_sizes()

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Memory:
    """`size` bytes whose end is the end of what can be read."""

    def __init__(self, size, fill=0):
        page = mmap.PAGESIZE
        whole = -(-max(size, 1) // page) * page
        self._map = mmap.mmap(-1, whole + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if _libc.mprotect(start + whole, page, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self._offset = whole - size
        self.address = start + self._offset
        self.size = size
        self[0:size] = bytes([fill]) * size

    def __getitem__(self, part):
        return bytes(self._map[self._offset:self._offset + self.size])[part]

    def __setitem__(self, part, value):
        begin = self._offset + (part.start or 0)
        self._map[begin:begin + len(value)] = value


class Struct(Memory):
    """A zeroed struct of the layout; `size` differs for other versions of it.
    `claimed` is what struct_size says, if that is not the truth."""

    def __init__(self, name, size=None, claimed=None, **fields):
        self.layout = STRUCTS[name]
        size = self.layout["size"] if size is None else size
        super().__init__(size)
        claimed = size if claimed is None else claimed
        self[0:4] = claimed.to_bytes(4, "little")[:size]
        for field, value in fields.items():
            self.set(field, value)

    def field(self, name):
        return next(f for f in self.layout["fields"] if f["name"] == name)

    def set(self, name, value):
        if isinstance(value, Memory):
            value = value.address
        field = self.field(name)
        self[field["offset"]:] = value.to_bytes(field["size"], "little", signed=value < 0)

    def get(self, name):
        field = self.field(name)
        return int.from_bytes(self[field["offset"]:field["offset"] + field["size"]],
                              "little", signed=not field["type"].startswith("u"))

    def message(self):
        return self[8:].split(b"\0")[0].decode()


class Result:

    def __init__(self, code, message):
        self.code = code
        self.message = message

    def __eq__(self, other):
        return (self.code, self.message) == (other.code, other.message)

    def __repr__(self):
        return f"{self.code}: {self.message}"


class Library:
    """Calls exported functions by name; pointers are Memory or None."""

    def __init__(self):
        self._library = ctypes.CDLL(LIBRARY, mode=os.RTLD_NOW | os.RTLD_LOCAL)

    def call(self, name, *args):
        error = Struct("tenon_error")
        return Result(self.call_with(name, *args, error), error.message())

    def call_with(self, name, *args):
        types, values = [], []
        for param, value in zip(FUNCTIONS[name]["params"], args):
            is_pointer = param["type"].endswith("*")
            if isinstance(value, Memory):
                value = value.address
            types.append(ctypes.c_void_p if is_pointer else scalar_type(param["type"]))
            values.append(value)
        assert len(values) == len(FUNCTIONS[name]["params"]), name
        function = self._library[name]
        function.argtypes = types
        function.restype = ctypes.c_int32
        return function(*values)

    def make(self, name, *args):
        """Calls a function whose last parameter before `error` is a handle."""
        handle = Memory(8)
        result = self.call(name, *args, handle)
        assert result.code == OK, result
        return int.from_bytes(handle[0:8], "little")


def scalar_type(name):
    aliases = {alias["name"]: alias["type"] for alias in LAYOUT["types"]}
    name = aliases.get(name, name)
    return ctypes.c_size_t if name == "size_t" else getattr(ctypes, "c_" + name.removesuffix("_t"))


def struct_of(param):
    """The self-describing struct that a parameter points to, or None."""
    name = param["type"].removeprefix("const ").removesuffix("*")
    if name == param["type"] or name not in STRUCTS:
        return None
    return name if STRUCTS[name]["fields"][0]["name"] == "struct_size" else None


# A function's parameter that points to a struct.
Case = collections.namedtuple("Case", "function index name struct is_input")


def cases():
    for function in FUNCTIONS.values():
        for index, param in enumerate(function["params"]):
            struct = struct_of(param)
            if struct and struct != "tenon_error":
                yield Case(function["name"], index, param["name"], struct,
                           param["type"].startswith("const "))


INPUTS = [case for case in cases() if case.is_input]
OUTPUTS = [case for case in cases() if not case.is_input]


class GrowthTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.library = Library()
        cpu = {"device_type": CONSTANTS["TENON_DEVICE_CPU"]}
        config = Memory(len(CONFIG) + 1)
        config[0:] = CONFIG
        cls.config = config
        context = cls.library.make("tenon_context_create",
                                   Struct("tenon_context_options", num_threads=1, **cpu))
        model = cls.library.make(
            "tenon_model_create_random",
            Struct("tenon_model_random_args", config_json=config,
                   dtype=CONSTANTS["TENON_DTYPE_FLOAT32"], **cpu))
        session = cls.library.make("tenon_session_create", model,
                                   Struct("tenon_session_options", num_threads=1))
        sequence = cls.library.make("tenon_sequence_create", session)
        cls.handles = {
            "tenon_context": context,
            "tenon_model": model,
            "tenon_session": session,
            "tenon_sequence": sequence,
        }

    def arguments(self, function):
        """Valid handles, zeroed structs, room for results; without `error`."""
        values = []
        for param in FUNCTIONS[function]["params"][:-1]:
            struct = struct_of(param)
            if struct:
                values.append(Struct(struct))
            elif param["type"] in self.handles:
                values.append(self.handles[param["type"]])
            elif param["name"] == "stream":
                values.append(None)
            elif param["type"].endswith("*"):
                values.append(Memory(8))
            else:
                values.append(CONSTANTS["TENON_DEVICE_CPU"] if param["name"] == "device_type" else 0)
        return values

    def call_with_struct(self, case, memory):
        values = self.arguments(case.function)
        values[case.index] = memory
        result = self.library.call(case.function, *values)
        if case.function == "tenon_session_enqueue_step" and result.code == OK:
            # A step without rows is under way.
            wait = self.library.call("tenon_session_wait_step", values[0],
                                     Struct("tenon_step_results"))
            self.assertEqual(wait.code, OK, wait)
        return result

    def for_each(self, chosen, check):
        for case in chosen:
            with self.subTest(function=case.function, struct=case.struct):
                check(case, STRUCTS[case.struct]["size"], FIRST_SIZES[case.struct])

    def test_every_struct_is_reached(self):
        reached = {case.struct for case in cases()}
        described = {n for n, s in STRUCTS.items() if s["fields"][0]["name"] == "struct_size"}
        # These two have tests of their own below.
        self.assertEqual(described - reached, {"tenon_error", "tenon_step_row"})

    def test_short_and_garbage_sizes_are_refused(self):

        def check(case, known, first):
            there = {0: 4, 1: 4, 3: 4, 4: 4, first - 1: first - 1}
            there |= {n: 4 for n in (MAX_STRUCT_SIZE + 1, 0x7FFFFFFF, 0xFFFFFFFF, 0xAAAAAAAA)}
            for claimed, size in there.items():
                memory = Struct(case.struct, size=size, claimed=claimed)
                before = memory[:]
                result = self.call_with_struct(case, memory)
                self.assertEqual(result.code, INVALID_ARGUMENT, result)
                self.assertTrue(result.message.startswith(case.function + ": "), result)
                self.assertIn(f"{case.name}.struct_size is {claimed}", result.message)
                self.assertEqual(memory[:], before)

        self.for_each(INPUTS + OUTPUTS, check)

    def test_the_first_version_s_size_is_accepted(self):

        def check(case, known, first):
            today = self.call_with_struct(case, Struct(case.struct))
            then = self.call_with_struct(case, Struct(case.struct, size=first))
            self.assertEqual(then, today)
            self.assertNotIn("struct_size", then.message)

        self.for_each(INPUTS + OUTPUTS, check)

    def test_a_longer_struct_with_a_zero_tail_is_accepted(self):

        def check(case, known, first):
            today = self.call_with_struct(case, Struct(case.struct))
            for size in (known + 8, known + 64, MAX_STRUCT_SIZE):
                memory = Struct(case.struct, size=size)
                before = memory[:]
                self.assertEqual(self.call_with_struct(case, memory), today)
                if case.is_input:
                    self.assertEqual(memory[:], before)

        self.for_each(INPUTS + OUTPUTS, check)

    def test_a_set_field_that_the_library_does_not_know_is_refused(self):

        def check(case, known, first):
            for size in (known + 8, known + 64, MAX_STRUCT_SIZE):
                for position in (known, known + 7, size - 1):
                    memory = Struct(case.struct, size=size)
                    memory[position:] = b"\1"
                    result = self.call_with_struct(case, memory)
                    self.assertEqual(result.code, UNIMPLEMENTED, result)
                    prefix = f"{case.function}: {case.name}: "
                    self.assertTrue(result.message.startswith(prefix), result)
                    self.assertIn(f"byte {position}", result.message)
                    self.assertIn("newer than this library", result.message)

        self.for_each(INPUTS, check)

    def test_what_the_library_does_not_know_of_a_result_becomes_zero(self):

        def check(case, known, first):
            memory = Struct(case.struct, size=known + 64)
            memory[4:] = b"\xaa" * (known + 60)
            result = self.call_with_struct(case, memory)
            self.assertEqual(result.code, OK, result)
            self.assertEqual(memory[known:], bytes(64))
            self.assertEqual(memory[0:4], (known + 64).to_bytes(4, "little"))
            # The part that a client of the first version has is the same.
            short = Struct(case.struct, size=first)
            self.assertEqual(self.call_with_struct(case, short).code, OK)
            self.assertEqual(short[4:], memory[4:first])

        self.for_each(OUTPUTS, check)

    def test_no_struct_is_refused(self):

        def check(case, known, first):
            result = self.call_with_struct(case, None)
            if case.struct == "tenon_session_options":  # optional
                self.assertEqual(result.code, OK, result)
                return
            self.assertEqual(result.code, INVALID_ARGUMENT, result)
            self.assertIn(f"{case.name} is null", result.message)

        self.for_each(INPUTS + OUTPUTS, check)

    def test_errors_of_every_size(self):
        full = 8 + 512
        for function in FUNCTIONS.values():
            if not function["params"] or function["params"][-1]["type"] != "tenon_error*":
                continue
            with self.subTest(function=function["name"]):
                # Wrong in one way or another for every function.
                values = [None if p["type"].endswith("*") else 7 for p in function["params"][:-1]]
                whole = Struct("tenon_error")
                code = self.library.call_with(function["name"], *values, whole)
                self.assertNotEqual(code, OK)
                self.assertEqual(whole.get("code"), code)
                self.assertTrue(whole.message().startswith(function["name"] + ": "))
                self.assertEqual(self.library.call_with(function["name"], *values, None), code)
                for size in (4, 7, 8, 9, 20, full, full + 8, MAX_STRUCT_SIZE):
                    error = Memory(size, fill=0xAA)
                    error[0:] = size.to_bytes(4, "little")
                    self.assertEqual(self.library.call_with(function["name"], *values, error), code)
                    self.check_error(error, size, code, whole.message())

    def check_error(self, error, size, code, message):
        if size < 8:
            self.assertEqual(error[4:], b"\xaa" * (size - 4))
            return
        self.assertEqual(error[4:8], code.to_bytes(4, "little"))
        room = min(size, 520) - 8
        if room:
            self.assertEqual(error[8:].split(b"\0")[0].decode(), message[:room - 1])
        # Whatever lies behind the error that this library knows is not its own.
        self.assertIn(error[520:], (b"\xaa" * max(size - 520, 0), bytes(max(size - 520, 0))))

    def step(self, rows, stride):
        count = rows.size // stride
        args = Struct("tenon_step_args", num_rows=count, rows=rows, tokens=Memory(4 * count))
        return self.library.call("tenon_session_step", self.handles["tenon_session"], args)

    def rows(self, sizes, stride=None):
        """An array of rows, each of one new token of a sequence of its own."""
        self.token = Memory(4)
        stride = stride or sizes[0]
        rows = Memory(stride * len(sizes))
        for index, size in enumerate(sizes):
            sequence = self.library.make("tenon_sequence_create", self.handles["tenon_session"])
            self.addCleanup(self.library.call, "tenon_sequence_release",
                            self.handles["tenon_session"], sequence)
            row = Struct("tenon_step_row", num_tokens=1, sequence=sequence, tokens=self.token)
            row[0:] = size.to_bytes(4, "little")
            rows[index * stride:] = row[:min(stride, row.size)]
        return rows

    def test_rows_of_a_step_are_as_far_apart_as_they_say(self):
        first, known = FIRST_SIZES["tenon_step_row"], STRUCTS["tenon_step_row"]["size"]
        for size in (first, known, known + 8, known + 64, MAX_STRUCT_SIZE):
            with self.subTest(size=size):
                result = self.step(self.rows([size] * 3), size)
                self.assertEqual(result.code, OK, result)

    def test_rows_of_a_step_with_bad_sizes_are_refused(self):
        known = STRUCTS["tenon_step_row"]["size"]
        for size in (0, 1, 4, FIRST_SIZES["tenon_step_row"] - 1, MAX_STRUCT_SIZE + 1, 0xFFFFFFFF):
            with self.subTest(size=size):
                result = self.step(self.rows([size], stride=known), known)
                self.assertEqual(result.code, INVALID_ARGUMENT, result)
                self.assertIn(f"struct_size is {size}", result.message)
        with self.subTest("different sizes"):
            result = self.step(self.rows([known, known + 8], stride=known), known)
            self.assertEqual(result.code, INVALID_ARGUMENT, result)
            self.assertIn("struct_size", result.message)

    def test_a_set_field_of_a_row_that_the_library_does_not_know_is_refused(self):
        known = STRUCTS["tenon_step_row"]["size"]
        stride = known + 16
        for row in range(3):
            rows = self.rows([stride] * 3)
            rows[row * stride + known + 3:] = b"\1"
            result = self.step(rows, stride)
            self.assertEqual(result.code, UNIMPLEMENTED, result)
            self.assertIn("newer than this library", result.message)

    def test_the_initialiser_keeps_to_the_caller_s_size(self):
        size = STRUCTS["tenon_sampling_params"]["size"]
        for claimed in (0, 4, 20, size - 1, size, size + 8):
            params = Memory(claimed, fill=0xAA)
            result = self.library.call("tenon_sampling_params_init", params, claimed)
            self.assertIn(result.code, (OK, INVALID_ARGUMENT), result)
            self.assertEqual(result.code == OK, params[0:1] != b"\xaa")


if __name__ == "__main__":
    unittest.main()
