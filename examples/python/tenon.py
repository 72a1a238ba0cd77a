"""Tenon from Python: every op of libtenon.so on torch, NumPy and other tensors,
and the engine. ctypes and the standard library alone; Python 3.10 or newer.

    import torch, tenon
    x = torch.randn(13, 2048, dtype=torch.bfloat16, device="cuda")
    weight = torch.ones(2048, dtype=torch.bfloat16, device="cuda")
    y = tenon.rms_norm(x, weight, epsilon=1e-6)

Tensors are anything with `__dlpack__` or `__array_interface__`; their memory is
used as it lies, with its strides, and is borrowed for the call. dtypes that a
framework lacks go through `as_bfloat16`, `as_float8_e4m3fn` and `Tensor`. What
each argument may be (shapes, dtypes, aliasing) and how results are rounded is
written at the same name in tenon.h.

Outputs and workspaces that are not given are allocated by the framework of the
first tensor (torch, NumPy, `Tensor`). Given ones make a call that allocates
nothing, as CUDA graphs and inner loops want; `<op>_workspace_size` tells how
many bytes the largest call needs.

`stream` is an int (a cudaStream_t), an object of torch.cuda.Stream or anything
with `__cuda_stream__`, or None: then tensors on a CUDA device use the current
stream of their framework (torch's, if it is loaded and the framework does not
say), and tensors on the CPU use none. Ops enqueue and return. As with every CUDA
library, work on other streams that makes the inputs must be ordered before.

`context` is a `Context`, or None: CPU ops then run on the calling thread alone,
and CUDA ops without cuBLASLt.

Errors of the library are `TenonError`, with its code and message. Objects that
are no tensors are a TypeError, read-only outputs a BufferError. All functions
may be called from any number of threads; the GIL is released while the library
works.

The library is searched in this order: the file that the environment variable
TENON_LIBRARY names, this folder, ../lib and ../../lib, the system's.
"""

import array
import collections
import contextlib
import ctypes
import dataclasses
import os
import pathlib
import sys
import threading
import weakref
from ctypes import addressof, c_char, c_int32, c_int64, c_uint64, c_void_p, sizeof
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Iterable,
    Iterator,
    NamedTuple,
    Protocol,
    Sequence as SequenceOf,
    TypeVar,
    Union,
)

# The ABI that this module was written for: a library of the same major version
# and at least this minor version will do.
ABI_MAJOR = 1
ABI_MINOR = 4

OK = 0
CANCELLED = 1
UNKNOWN = 2
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
ALREADY_EXISTS = 6
PERMISSION_DENIED = 7
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
ABORTED = 10
OUT_OF_RANGE = 11
UNIMPLEMENTED = 12
INTERNAL = 13
UNAVAILABLE = 14
DATA_LOSS = 15
UNAUTHENTICATED = 16

DEVICE_CPU = 1
DEVICE_CUDA = 2
CPU_ISA_GENERIC = 1
CPU_ISA_AVX2 = 2
CPU_ISA_AVX512 = 3
CUBLAS_LT_IF_FOUND = 0
CUBLAS_LT_OFF = 1
CUBLAS_LT_REQUIRED = 2
FLAG_BATCH_INVARIANT = 1
ROUNDING_FLOAT32_MULTIPLY = 0
ROUNDING_CAST_THEN_MULTIPLY = 1
SCORING_SOFTMAX = 0
SCORING_SIGMOID = 1
GROUP_SCORE_MAX = 0
GROUP_SCORE_TOP2_SUM = 1
SWIGLU_BLOCKED = 0
SWIGLU_INTERLEAVED = 1
FILTER_SEQUENTIAL = 0
FILTER_JOINT = 1
FILTER_LLAMA_CPP = 2
SAMPLING_USE_BITMASK = 1
SAMPLING_ONLY_ALLOWED = 2
SAMPLING_SET_MIROSTAT_MU = 4
MAX_TOP_LOGPROBS = 20
WEIGHTS_STORED = 0
WEIGHTS_FP8 = 1
SAMPLE_OK = 0
SAMPLE_NO_SUPPORT = 1
SAMPLE_NON_FINITE = 2
EDIT_IN_PROMPT = 0x20000000
EDIT_ALLOW = 0x40000000
EDIT_BAN = 0x80000000
LOGPROB_UNFILTERED = 0
LOGPROB_RAW = 1
LOGPROB_PROCESSED = 2
STREAM_TARGET = 0
STREAM_DRAFT = 1
SAMPLER_FAST = 1
DTYPE_FLOAT32 = 1
DTYPE_FLOAT16 = 2
DTYPE_BFLOAT16 = 3
SESSION_BATCH_INVARIANT = 1
SESSION_COUNT_EXPERTS = 2
SESSION_NO_CUDA_GRAPHS = 4
SESSION_LOGIT_BITMASKS = 8
KV_CACHE_MODEL_DTYPE = 0
KV_CACHE_FLOAT8_E4M3 = 1
LOGITS_NONE = 0
LOGITS_LAST = 1
LOGITS_ALL = 2

ROW_CONTINUES = 1
MAX_STEPS_IN_FLIGHT = 2


class TenonError(RuntimeError):
    """A call of the library that failed."""

    code: int  #: one of OK .. UNAUTHENTICATED
    message: str  #: names function, field and value

    def __init__(self, code: int, message: str):
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} ({_status_name(self.code)})"


class SupportsDLPack(Protocol):
    def __dlpack__(self, *, stream: Any = ...) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


class SupportsArrayInterface(Protocol):
    @property
    def __array_interface__(self) -> dict[str, Any]: ...


TensorLike = Union[SupportsDLPack, SupportsArrayInterface, "Tensor"]
T = TypeVar("T")  # outputs are of the type of the first tensor
Stream = Any  # int, torch.cuda.Stream, __cuda_stream__ or None
Device = Any  # "cpu", "cuda", "cuda:1" or a torch.device

# ------------------------------------------------------------------- Structs
#
# As tenon.h has them. In those that callers see, an annotation is the C type;
# type checkers see what reading the field gives.

if TYPE_CHECKING:
    _i32 = _u32 = _i64 = _u64 = _u8 = _u16 = int
    _f32 = float
    _ptr = Union[int, None]
    _char128 = _char512 = bytes
    _i32x8 = _u32x6 = SequenceOf[int]
else:
    _i32, _u32, _i64, _u64 = c_int32, ctypes.c_uint32, c_int64, c_uint64
    _u8, _u16 = ctypes.c_uint8, ctypes.c_uint16
    _f32, _ptr = ctypes.c_float, c_void_p
    _char128, _char512 = c_char * 128, c_char * 512
    _i32x8, _u32x6 = c_int32 * 8, ctypes.c_uint32 * 6


class _Struct(ctypes.Structure):
    def __init__(self, *args: Any, **fields: Any):
        super().__init__(*args, **fields)
        if self._fields_[0][0] == "struct_size" and not self.struct_size:
            self.struct_size = sizeof(self)

    def __repr__(self) -> str:
        hidden = ("struct_size", "reserved", "reserved0")
        names = [n.lstrip("_") for n, _ in self._fields_ if n not in hidden]
        return f"{type(self).__name__}({', '.join(f'{n}={self._value(n)!r}' for n in names)})"

    def _value(self, name: str) -> Any:
        value = getattr(self, name)
        return list(value) if isinstance(value, ctypes.Array) else value


def _struct(cls: type[T]) -> type[T]:
    cls._fields_ = list(cls.__annotations__.items())
    return cls


@_struct
class _DLTensor(ctypes.Structure):
    data: _ptr
    device_type: _i32
    device_id: _i32
    ndim: _i32
    dtype_code: _u8
    dtype_bits: _u8
    dtype_lanes: _u16
    shape: _ptr
    strides: _ptr
    byte_offset: _u64


@_struct
class Error(_Struct):
    struct_size: _u32
    code: _i32
    message: _char512


@_struct
class DeviceInfo(_Struct):
    struct_size: _u32
    device_type: _i32
    device_index: _i32
    num_cores: _i32
    compute_capability: _i32
    cpu_isa: _i32
    total_memory_bytes: _i64
    l2_bytes: _i64
    _name: _char128

    @property
    def name(self) -> str:
        return self._name.decode(errors="replace")


@_struct
class ContextInfo(_Struct):
    struct_size: _u32
    device_type: _i32
    device_index: _i32
    num_threads: _i32
    cublas_lt_version: _u64
    num_moe_kernels: _i32
    reserved: _i32


@_struct
class SamplingParams(_Struct):
    """How one row is sampled; see tenon.h. The model's own distribution unless
    told otherwise: SamplingParams(temperature=0.7, top_p=0.9, seed=1)."""

    temperature: _f32
    top_k: _i32
    top_p: _f32
    min_p: _f32
    filter_order: _i32
    reserved0: _u32
    seed: _u64
    position: _u64
    typical_p: _f32
    top_n_sigma: _f32
    xtc_probability: _f32
    xtc_threshold: _f32
    mirostat_tau: _f32
    mirostat_eta: _f32
    repetition_penalty: _f32
    frequency_penalty: _f32
    presence_penalty: _f32
    dry_multiplier: _f32
    dry_base: _f32
    dry_allowed_length: _i32
    dry_range: _i32
    flags: _u32
    num_top_logprobs: _i32
    mirostat_mu: _f32
    reserved: _u32x6

    def __init__(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, **fields: Any):
        super().__init__(temperature, top_k, top_p, **fields)

    @classmethod
    def greedy(cls) -> "SamplingParams":
        return cls(temperature=0.0)

    def validate(self) -> None:
        """Raises a TenonError that names a field that is out of range."""
        _check(_library.tenon_sampling_params_validate, addressof(self))

    @staticmethod
    def pack(rows: Iterable["SamplingParams"]) -> bytearray:
        """The rows as the sampler's `params`, 128 bytes each, for
        torch.frombuffer(..., dtype=torch.uint8).view(-1, 128).to("cuda") or
        numpy.frombuffer(..., numpy.uint8).reshape(-1, 128)."""
        return bytearray(b"".join(bytes(row) for row in rows))


@_struct
class LogitEdit(_Struct):
    """What the sampler does with one logit of a row; see tenon.h."""

    id: _i32
    state: _u32
    bias: _f32
    offset: _f32

    @staticmethod
    def pack(
        rows: Iterable[Iterable["LogitEdit"]], vocab_size: int
    ) -> tuple[bytearray, list[int]]:
        """The sampler's `edits`, 16 bytes each, and `edit_offsets`, for any order
        of the edits of a row."""
        packed, offsets = bytearray(), [0]
        for row in rows:
            row = list(row)
            array = (LogitEdit * len(row))(*row)
            count, size = c_int64(len(row)), c_int64(vocab_size)
            _check(_library.tenon_logit_edits_sort, ctypes.byref(array), count, size)
            packed += bytes(array)
            offsets.append(offsets[-1] + len(row))
        return packed, offsets


@_struct
class ModelInfo(_Struct):
    struct_size: _u32
    device_type: _i32
    device_index: _i32
    rank: _i32
    world_size: _i32
    dtype: _i32
    vocab_size: _i32
    hidden_size: _i32
    num_layers: _i32
    num_heads: _i32
    num_kv_heads: _i32
    head_dim: _i32
    max_position_embeddings: _i32
    num_experts: _i32
    num_experts_per_tok: _i32
    bos_token_id: _i32
    num_eos_token_ids: _i32
    eos_token_ids: _i32x8
    reserved: _u32
    weight_bytes: _i64


@_struct
class SessionInfo(_Struct):
    struct_size: _u32
    flags: _u32
    max_sequences: _i32
    max_tokens: _i32
    max_context: _i32
    page_size: _i32
    num_pages: _i64
    max_logit_rows: _i32
    num_sequences: _i32
    num_free_pages: _i64
    num_steps: _u64
    num_tokens: _u64
    kv_cache_bytes: _i64
    kv_cache_dtype: _i32
    max_logit_edits: _i32
    max_top_logprobs: _i32
    num_cuda_graphs: _i32
    cuda_graph_bytes: _i64
    num_steps_in_flight: _i32
    reserved: _i32


def _fields(name: str, fields: str) -> Any:
    """A struct from "u32 struct_size; ptr x out": types, each with its fields."""
    groups = [group.split() for group in fields.split(";")]
    members = [(n, _TYPES[kind]) for kind, *names in groups for n in names]
    return type(name, (_Struct,), {"_fields_": members})


_TYPES: dict[str, Any] = {
    "i32": c_int32,
    "u32": ctypes.c_uint32,
    "i64": c_int64,
    "u64": c_uint64,
    "f32": ctypes.c_float,
    "ptr": c_void_p,
    "text": ctypes.c_char_p,
}

ContextOptions = _fields(
    "ContextOptions", "u32 struct_size; i32 device_type device_index num_threads cublas_lt reserved"
)
EmbeddingArgs = _fields("EmbeddingArgs", "u32 struct_size reserved; ptr ids table out")
RmsNormArgs = _fields(
    "RmsNormArgs",
    "u32 struct_size; i32 rounding; ptr x residual weight out; f32 epsilon; u32 " "reserved",
)
LinearArgs = _fields(
    "LinearArgs",
    "u32 struct_size flags; ptr x weight bias out workspace; u64 workspace_size; ptr "
    "weight_scales",
)
QuantizeFp8Args = _fields(
    "QuantizeFp8Args", "u32 struct_size; i32 block_rows block_cols; u32 reserved; ptr x out scales"
)
QkNormArgs = _fields(
    "QkNormArgs",
    "u32 struct_size; i32 rounding; ptr qkv; i64 q_offset k_offset v_offset; i32 "
    "num_q_heads num_kv_heads head_dim; f32 epsilon; ptr q k v q_weight k_weight "
    "cos_sin positions k_cache v_cache slot_mapping; f32 k_scale v_scale; i32 "
    "rotary_dim; u32 reserved",
)
AttentionArgs = _fields(
    "AttentionArgs",
    "u32 struct_size flags; ptr q k_cache v_cache block_table query_start kv_len out; "
    "f32 scale k_scale v_scale; i32 max_kv_len max_query_len; u32 reserved; ptr "
    "workspace; u64 workspace_size",
)
MoeRouterArgs = _fields(
    "MoeRouterArgs",
    "u32 struct_size; i32 top_k; ptr logits correction_bias topk_weights topk_ids; "
    "i32 scoring renormalize; f32 routed_scaling_factor; i32 num_expert_groups "
    "num_selected_groups group_score num_fused_shared_experts; u32 reserved",
)
MoeAlignArgs = _fields(
    "MoeAlignArgs",
    "u32 struct_size; i32 num_experts; ptr topk_ids expert_offsets sorted_slots "
    "tiles; i32 tile_rows; u32 reserved; ptr workspace; u64 workspace_size",
)
MoeGroupedMatmulArgs = _fields(
    "MoeGroupedMatmulArgs",
    "u32 struct_size flags; ptr x weights expert_offsets sorted_slots bias "
    "routing_weights out; i32 slots_per_row; u32 reserved; ptr workspace; u64 "
    "workspace_size; ptr weight_scales",
)
MoeSwigluArgs = _fields("MoeSwigluArgs", "u32 struct_size; i32 layout; ptr x out; f32 limit alpha")
MoeSumReduceArgs = _fields("MoeSumReduceArgs", "u32 struct_size reserved; ptr x out")
MoeArgs = _fields(
    "MoeArgs",
    "u32 struct_size flags; ptr x topk_weights topk_ids gate up down out workspace; "
    "u64 workspace_size; ptr gate_scales up_scales down_scales router",
)
SamplerArgs = _fields(
    "SamplerArgs",
    "u32 struct_size flags; ptr logits params tokens logprobs statuses workspace; "
    "u64 workspace_size; i64 vocab_size; ptr edits edit_offsets bitmask mirostat_mu "
    "random_bits raw_logprobs processed_logprobs top_tokens top_logprobs "
    "probabilities; i32 top_logprobs_kind random_stream",
)
SpeculativeArgs = _fields(
    "SpeculativeArgs",
    "u32 struct_size reserved; ptr draft_tokens num_drafts target_tokens "
    "target_probabilities params draft_probabilities tokens num_accepted statuses",
)
ModelLoadArgs = _fields(
    "ModelLoadArgs",
    "u32 struct_size; i32 device_type device_index rank world_size; u32 reserved; "
    "text directory; ptr progress progress_user_data; i32 weights; u32 reserved1",
)
ModelRandomArgs = _fields(
    "ModelRandomArgs",
    "u32 struct_size; i32 device_type device_index rank world_size dtype; u64 seed; "
    "text config_json",
)
SessionOptions = _fields(
    "SessionOptions",
    "u32 struct_size flags; i32 max_sequences max_tokens max_context page_size; i64 "
    "num_pages; i32 max_logit_rows num_threads; i64 kv_cache_bytes; text "
    "moe_kernels_json; i32 kv_cache_dtype; f32 kv_cache_k_scale kv_cache_v_scale; i32 "
    "max_logit_edits max_top_logprobs; u32 reserved",
)
_StepRow = _fields(
    "_StepRow",
    "u32 struct_size; i32 num_tokens; u64 sequence; ptr tokens sampling logits; i32 "
    "logits_mode; u32 flags; ptr edits bitmask top_tokens top_logprobs; i32 "
    "num_edits; u32 reserved1",
)
_StepArgs = _fields(
    "_StepArgs",
    "u32 struct_size; i32 num_rows; ptr rows tokens logprobs statuses "
    "distinct_experts microseconds mirostat_mu",
)
_StepResults = _fields(
    "_StepResults",
    "u32 struct_size; i32 num_rows; ptr tokens logprobs statuses mirostat_mu "
    "top_tokens top_logprobs distinct_experts microseconds; i32 top_columns; u32 reserved",
)

# ------------------------------------------------------------------- Library


def _load_library() -> ctypes.CDLL:
    """Opens libtenon.so and refuses one that this module cannot use."""
    named = os.environ.get("TENON_LIBRARY")
    here = pathlib.Path(__file__).resolve().parent
    folders = (here, here / "../lib", here / "../../lib")
    files = [f / n for f in folders for n in ("libtenon.so.1", "libtenon.so")]
    found = named or next((str(f) for f in files if f.exists()), "libtenon.so.1")
    try:
        library = ctypes.CDLL(found)
    except OSError as error:
        raise ImportError(f"libtenon.so: {error}; set TENON_LIBRARY to the file") from None
    library.tenon_abi_version.restype = ctypes.c_uint32
    version = library.tenon_abi_version()
    major, minor = version >> 16, version & 0xFFFF
    if major != ABI_MAJOR or minor < ABI_MINOR:
        raise ImportError(
            f"{found} has ABI {major}.{minor}; tenon.py needs"
            f" {ABI_MAJOR}.{ABI_MINOR} or a later {ABI_MAJOR}.x"
        )
    for name in ("tenon_version_string", "tenon_status_name"):
        getattr(library, name).restype = ctypes.c_char_p
    library.tenon_moe_max_tiles.restype = c_int64
    return library


_library = _load_library()


def version() -> str:
    """The library's release, such as "0.1.0"."""
    return _library.tenon_version_string().decode()


def abi_version() -> tuple[int, int]:
    """The library's ABI version: major, minor."""
    return divmod(_library.tenon_abi_version(), 1 << 16)


def _status_name(code: int) -> str:
    return _library.tenon_status_name(c_int32(code)).decode()


def _check(function: Callable[..., int], *arguments: Any) -> None:
    """Calls a function of the library; arguments are ctypes values or addresses."""
    error = Error()
    values = [c_void_p(a) if isinstance(a, int) else a for a in arguments]
    code = function(*values, ctypes.byref(error))
    if code:
        raise TenonError(code, error.message.decode(errors="replace"))


def _device(device: Device) -> tuple[int, int]:
    """(TENON_DEVICE_*, index) of "cpu", "cuda", "cuda:1", a torch.device."""
    kind, _, index = str(device).partition(":")
    types = {"cpu": DEVICE_CPU, "cuda": DEVICE_CUDA}
    if kind not in types or not (index or "0").isdecimal():
        raise ValueError(f"device is {device!r}, expected cpu, cuda or cuda:N")
    return types[kind], int(index or 0)


def device_count(device: Device = "cuda") -> int:
    """Devices of a type that the library can use; 0 for CUDA without a driver."""
    count = c_int32()
    _check(_library.tenon_device_count, c_int32(_device(device)[0]), ctypes.byref(count))
    return count.value


def device_info(device: Device = "cpu") -> DeviceInfo:
    """What a device is; TenonError UNAVAILABLE where there is none."""
    info = DeviceInfo()
    kind, index = _device(device)
    _check(_library.tenon_device_query, c_int32(kind), c_int32(index), ctypes.byref(info))
    return info


class _Object:
    """Owns a handle of the library. Used as a context manager, or closed, or
    freed with the Python object. A closed one is NOT_FOUND to the library."""

    _destroy: str

    def _own(self, handle: int) -> None:
        self._handle = handle
        destroy = getattr(_library, self._destroy)
        # Errors have nobody to go to here; NOT_FOUND: its session is gone.
        self._finalizer = weakref.finalize(self, destroy, c_uint64(handle), None)

    def close(self) -> None:
        """Frees it now; a second time does nothing."""
        self._finalizer()

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Context(_Object):
    """What ops of a device share: the CPU's threads, cuBLASLt, measured sizes of
    the expert kernels (moe_kernels: the text of a file of tools/tune)."""

    _destroy = "tenon_context_destroy"

    def __init__(
        self,
        device: Device = "cpu",
        *,
        num_threads: int = 0,
        cublas_lt: int = CUBLAS_LT_IF_FOUND,
        moe_kernels: str | None = None,
    ):
        kind, index = _device(device)
        options = ContextOptions(
            device_type=kind, device_index=index, num_threads=num_threads, cublas_lt=cublas_lt
        )
        handle = c_uint64()
        _check(_library.tenon_context_create, ctypes.byref(options), ctypes.byref(handle))
        self._own(handle.value)
        if moe_kernels is not None:
            json = ctypes.c_char_p(moe_kernels.encode())
            _check(_library.tenon_context_set_moe_kernels, c_uint64(self._handle), json)

    @property
    def info(self) -> ContextInfo:
        info = ContextInfo()
        _check(_library.tenon_context_query, c_uint64(self._handle), ctypes.byref(info))
        return info


# ------------------------------------------------------------------- Tensors

_CODES = {
    "float32": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "float8_e4m3fn": (10, 8),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
}
_NAMES = {code: name for name, code in _CODES.items()}
_TYPESTRS = {  # of __array_interface__, behind the byte order
    "f4": "float32",
    "f2": "float16",
    "i4": "int32",
    "i8": "int64",
    "u1": "uint8",
}
_CUDA = 2  # DLDevice.device_type
_STORAGE = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}  # what NumPy has

_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = c_void_p
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]


class _ExchangeApi:
    """DLPack 1.3's C functions of a tensor type: a DLTensor that borrows the
    object's own shape and strides, and the framework's current stream."""

    def __init__(self, capsule: Any):
        table = _get_pointer(capsule, b"dlpack_exchange_api")
        functions = (c_void_p * 7).from_address(table)  # after version and chain
        self.major = ctypes.c_uint32.from_address(table).value
        self.fill, self._stream = None, None
        if self.major != 1 or not functions[5]:
            return
        prototype = ctypes.PYFUNCTYPE(c_int32, ctypes.py_object, c_void_p)
        self.fill = prototype(functions[5])
        self._stream = ctypes.PYFUNCTYPE(c_int32, c_int32, c_int32, c_void_p)(functions[6])

    def current_stream(self, device_id: int) -> int:
        stream = c_void_p()
        self._stream(_CUDA, device_id, addressof(stream))
        return stream.value or 0


class _Converter:
    """Makes DLTensors of objects of one type, borrowed for the length of a call."""

    def __init__(self, cls: type):
        self.has_dlpack = hasattr(cls, "__dlpack__")
        self.takes_max_version = True
        self.versioned: bool | None = None  # the capsules of this type
        self.exchange = None
        capsule = getattr(cls, "__dlpack_c_exchange_api__", None)
        if capsule is not None:
            exchange = _ExchangeApi(capsule)
            self.exchange = exchange if exchange.fill else None
        self.fill = self.exchange.fill if self.exchange else None

    def convert(self, field: str, obj: Any, written: bool, slot: int, keep: list) -> int:
        """The address of a DLTensor that stays valid while `keep` does."""
        problem: Exception | None = None
        if self.has_dlpack:
            try:
                return self._from_dlpack(field, obj, written, keep)
            except (BufferError, TypeError, RuntimeError, ValueError) as error:
                # A dtype that DLPack lacks, or memory that its older versions
                # cannot call read-only: the array interface may still do.
                problem = error
        interface = getattr(obj, "__array_interface__", None)
        if interface is not None:
            return _from_interface(field, obj, interface, written, slot, keep)
        if problem is not None:
            raise type(problem)(f"{field}: {problem}") from None
        raise TypeError(f"{field} is a {type(obj).__name__}, which is no tensor")

    def _from_dlpack(self, field: str, obj: Any, written: bool, keep: list) -> int:
        # -1: no synchronisation; the op runs on the stream that the caller means.
        options = {} if obj.__dlpack_device__()[0] == 1 else {"stream": -1}
        if self.takes_max_version:
            try:
                capsule = obj.__dlpack__(max_version=(1, 1), **options)
            except TypeError:
                capsule = obj.__dlpack__(**options)
                self.takes_max_version = False
        else:
            capsule = obj.__dlpack__(**options)
        # The capsule keeps its name: it stays the owner, and its destructor
        # frees what it holds when `keep` is cleared.
        keep.append(capsule)
        if self.versioned is None:
            self.versioned = bool(_is_valid(capsule, b"dltensor_versioned"))
        if not self.versioned:
            return _get_pointer(capsule, b"dltensor")
        address = _get_pointer(capsule, b"dltensor_versioned")
        if ctypes.c_uint32.from_address(address).value != 1:
            raise BufferError("its DLPack is of another major version")
        if written and c_uint64.from_address(address + 24).value & 1:
            raise BufferError(f"{field} is read-only")
        return address + 32  # behind version, manager_ctx, deleter, flags


def _from_interface(
    field: str, obj: Any, interface: dict, written: bool, slot: int, keep: list
) -> int:
    """Fills the slot from __array_interface__."""
    typestr = interface["typestr"]
    # What NumPy does not know (ml_dtypes) is plain bytes here.
    name = str(obj.dtype) if typestr[1] == "V" else _TYPESTRS.get(typestr[1:])
    if name not in _CODES or typestr[0] == ">":
        raise TypeError(f"{field}: no such dtype: {name or typestr}")
    code = _CODES[name]
    size = code[1] // 8
    address, read_only = interface["data"]
    if read_only and written:
        raise BufferError(f"{field} is read-only")
    shape = interface["shape"]
    strides = interface.get("strides")
    if strides is not None and any(s % size for s in strides):
        raise BufferError(f"{field}: strides are no multiples of the element")
    return _fill(
        _DLTensor.from_address(slot),
        address,
        (1, 0),
        code,
        shape,
        strides and [s // size for s in strides],
        keep,
    )


def _fill(
    tensor: _DLTensor,
    data: int,
    device: tuple[int, int],
    code: tuple[int, int],
    shape: SequenceOf[int],
    strides: SequenceOf[int] | None,
    keep: list,
    byte_offset: int = 0,
) -> int:
    rank = len(shape)
    dims = (c_int64 * rank)(*shape)
    steps = None if strides is None else (c_int64 * rank)(*strides)
    keep.append((dims, steps))
    tensor.data = data
    tensor.device_type, tensor.device_id = device
    tensor.ndim = rank
    tensor.dtype_code, tensor.dtype_bits = code
    tensor.dtype_lanes = 1
    tensor.shape = addressof(dims)
    tensor.strides = None if steps is None else addressof(steps)
    tensor.byte_offset = byte_offset
    return addressof(tensor)


_converters: dict[type, _Converter] = {}


def _converter(cls: type) -> _Converter:
    converter = _Converter(cls)
    _converters[cls] = converter
    return converter


class Tensor:
    """A tensor made once and used in many calls, or one whose dtype its
    framework lacks. It keeps alive what it is made of, and sees its memory.

    Tensor(x) is x, converted once. Tensor(x, "bfloat16") takes x's elements for
    another dtype of their size.
    """

    __slots__ = (
        "base",
        "shape",
        "strides",
        "dtype",
        "device",
        "data",
        "_dl",
        "_keep",
        "_read_only",
    )

    base: Any  #: what it was made of
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  #: in elements; None: compact
    dtype: str  #: such as "float32"
    device: tuple[int, int]  #: DLPack's device type, index
    data: int  #: address of the first element

    def __init__(self, base: TensorLike, dtype: str | None = None):
        slot = _DLTensor()
        keep: list = []
        read_only = False
        try:
            address = _address("base", base, True, addressof(slot), keep)
        except BufferError:
            address = _address("base", base, False, addressof(slot), keep)
            read_only = True
        given = _DLTensor.from_address(address)
        code = (given.dtype_code, given.dtype_bits)
        if dtype is not None and _CODES[dtype][1] != code[1]:
            raise TypeError(f"{dtype} has {_CODES[dtype][1]} bits, the elements have {code[1]}")
        rank = given.ndim
        shape = (c_int64 * rank).from_address(given.shape)[:] if rank else []
        strides = (
            (c_int64 * rank).from_address(given.strides)[:] if given.strides and rank else None
        )
        self._set(
            base,
            keep,
            given.data or 0,
            (given.device_type, given.device_id),
            code if dtype is None else _CODES[dtype],
            shape,
            strides,
            given.byte_offset,
            read_only,
        )

    @classmethod
    def from_buffer(
        cls,
        buffer: Any,
        dtype: str,
        shape: SequenceOf[int],
        strides: SequenceOf[int] | None = None,
        byte_offset: int = 0,
    ) -> "Tensor":
        """CPU memory of a writable buffer: bytearray, array, ctypes, mmap."""
        memory = (c_char * memoryview(buffer).nbytes).from_buffer(buffer)
        tensor = cls.__new__(cls)
        tensor._set(
            buffer,
            [memory],
            addressof(memory),
            (1, 0),
            _CODES[dtype],
            shape,
            strides,
            byte_offset,
            False,
        )
        end = byte_offset + tensor._extent() * (_CODES[dtype][1] // 8)
        if byte_offset < 0 or end > sizeof(memory):
            raise ValueError(f"a tensor that ends at byte {end} of {sizeof(memory)}")
        return tensor

    def _set(self, base, keep, data, device, code, shape, strides, offset, read_only) -> None:
        self.base = base
        self.shape = tuple(shape)
        self.strides = None if strides is None else tuple(strides)
        self.dtype = _NAMES.get(code, f"DLPack {code}")
        self.device = device
        self.data = data + offset
        self._read_only = read_only
        self._keep = keep
        self._dl = _DLTensor()
        _fill(self._dl, data, device, code, shape, strides, keep, offset)

    def _extent(self) -> int:
        """Elements from the first to the end of the last."""
        if 0 in self.shape:
            return 0
        strides, step = self.strides, 1
        if strides is None:
            for n in self.shape:
                step *= n
            return step
        if min(strides, default=0) < 0:
            raise ValueError("strides are negative")
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, strides))

    def __repr__(self) -> str:
        return (
            f"Tensor({self.dtype}, shape={self.shape}, strides={self.strides}, data={self.data:#x})"
        )


def as_bfloat16(x: TensorLike) -> Tensor:
    """A tensor of 16-bit elements (NumPy's uint16) as bfloat16, without a copy."""
    return Tensor(x, "bfloat16")


def as_float8_e4m3fn(x: TensorLike) -> Tensor:
    """A tensor of 8-bit elements as float8_e4m3fn, without a copy."""
    return Tensor(x, "float8_e4m3fn")


def _address(field: str, obj: Any, written: bool, slot: int, keep: list) -> int:
    """The address of obj's DLTensor, which may be made in the slot."""
    cls = type(obj)
    if cls is Tensor:
        if written and obj._read_only:
            raise BufferError(f"{field} is read-only")
        return addressof(obj._dl)
    converter = _converters.get(cls) or _converter(cls)
    if converter.fill is not None:
        try:
            converter.fill(obj, slot)
            return slot
        except Exception:  # __dlpack__ says why in one line
            pass
    return converter.convert(field, obj, written, slot, keep)


def _current_stream(obj: Any, device_id: int) -> int:
    obj = obj.base if type(obj) is Tensor else obj
    converter = _converters.get(type(obj)) or _converter(type(obj))
    if converter.exchange is not None:
        return converter.exchange.current_stream(device_id)
    torch = sys.modules.get("torch")
    return torch.cuda.current_stream(device_id).cuda_stream if torch else 0


def _stream_handle(stream: Stream) -> int:
    """The cudaStream_t of a stream object."""
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "cuda_stream"):
        return stream.cuda_stream
    if hasattr(stream, "__cuda_stream__"):
        return stream.__cuda_stream__()[1]
    raise TypeError(f"stream is a {type(stream).__name__}, expected an int or a CUDA stream")


def _allocating_on(like: Any, stream: Stream) -> contextlib.AbstractContextManager:
    """Torch frees memory in the order of the stream that it was allocated for."""
    torch = sys.modules.get("torch")
    if stream is None or torch is None or not getattr(like, "is_cuda", False):
        return contextlib.nullcontext()
    if not isinstance(stream, torch.cuda.Stream):
        stream = torch.cuda.ExternalStream(_stream_handle(stream), like.device)
    return torch.cuda.stream(stream)


def _empty(like: T, shape: SequenceOf[int], dtype: str | None = None, stream: Stream = None) -> T:
    """New memory from the framework of `like`, where it is, of its dtype or another."""
    if isinstance(like, Tensor):
        name = dtype or like.dtype
        if hasattr(like.base, "shape"):
            return Tensor(_empty(like.base, shape, _STORAGE.get(name, name), stream), name)
        size = _CODES[name][1] // 8
        for n in shape:
            size *= n
        return Tensor.from_buffer(bytearray(size), name, shape)
    if hasattr(like, "new_empty"):
        torch = sys.modules["torch"]
        with _allocating_on(like, stream):
            return like.new_empty(tuple(shape), dtype=getattr(torch, dtype) if dtype else None)
    if hasattr(like, "__array_interface__"):
        import numpy

        return numpy.empty(tuple(shape), dtype or like.dtype)
    raise TypeError(
        f"cannot allocate memory like a {type(like).__name__}: pass outputs and workspace"
    )


# --------------------------------------------------------------------- Calls


class _Call:
    """The memory of one call of an op: args, DLTensors, error. Used by one
    thread at a time, then put back for the next call, which sets every field."""

    __slots__ = (
        "args", "_pool", "_function", "_workspace_function", "_slots", "_memory",
        "_error", "_error_address", "_args_address", "_keep", "_part", "_last",
        "_last_address",
    )  # fmt: skip

    def __init__(self, op: "_Op"):
        self.args = op.args_type()
        self._pool = op.pool
        self._function = op.function
        self._workspace_function = op.workspace_function
        self._memory = (_DLTensor * len(op.tensors))()
        self._slots = {name: addressof(self._memory[i]) for i, name in enumerate(op.tensors)}
        self._error = Error()
        self._error_address = addressof(self._error)
        self._args_address = addressof(self.args)
        self._keep: list = []
        self._part: _Call | None = None
        self._last: Any = None
        self._last_address = 0

    def set(self, field: str, obj: Any, written: bool = False) -> None:
        """Sets a tensor of the args; None: not given."""
        if obj is None:
            setattr(self.args, field, None)
            return
        slot = self._slots[field]
        converter = _converters.get(type(obj))
        if converter is not None and converter.fill is not None:
            try:
                converter.fill(obj, slot)  # the short way of _address
            except Exception:
                slot = converter.convert(field, obj, written, slot, self._keep)
        else:
            slot = _address(field, obj, written, slot, self._keep)
        setattr(self.args, field, slot)
        self._last, self._last_address = obj, slot

    def set_router(self, router: "_Call | None", *outputs: Any) -> None:
        """Makes another call, which is not run by itself, part of moe."""
        self.args.router = None if router is None else router._args_address
        if router is not None:
            self._part = router
            self._keep += outputs

    def workspace_size(self, context: Context | None) -> int:
        """Bytes that the call would need."""
        size = c_uint64()
        self.args.workspace, self.args.workspace_size = None, 0
        self._run(self._workspace_function, context, addressof(size))
        return size.value

    def set_workspace(
        self, context: Context | None, workspace: TensorLike | None, like: Any, stream: Stream
    ) -> None:
        """Gives the call the workspace, or one that the framework of `like` allocates."""
        tensor = None
        if workspace is None:
            size = self.workspace_size(context)
            if size == 0:
                return
            workspace = _empty(like, (size + 256,), "uint8", stream)
        tensor = workspace if type(workspace) is Tensor else Tensor(workspace)
        if tensor._read_only:
            raise BufferError("workspace is read-only")
        self._keep.append(tensor)
        size = tensor._extent() * (tensor._dl.dtype_bits // 8)
        padding = -tensor.data % (256 if tensor.device[0] == _CUDA else 64)
        self.args.workspace = tensor.data + padding
        self.args.workspace_size = max(size - padding, 0)

    def run(self, context: Context | None, stream: Stream) -> None:
        if stream is None:
            # DLDevice, type and index, is the second word of a DLTensor.
            device = c_int64.from_address(self._last_address + 8).value if self._last_address else 1
            stream = 0
            if device & 0xFFFFFFFF == _CUDA:
                stream = _current_stream(self._last, device >> 32)
        elif type(stream) is not int:
            stream = _stream_handle(stream)
        self._run(self._function, context, stream)
        self._recycle()

    def _recycle(self) -> None:
        self._last = None
        if self._keep:
            self._keep.clear()
        if self._part is not None:
            self._part._recycle()
            self._part = None
        self._pool.append(self)

    def _run(self, function: Any, context: Context | None, argument: int) -> None:
        handle = 0 if context is None else context._handle
        code = function(handle, self._args_address, argument, self._error_address)
        if code:
            raise TenonError(code, self._error.message.decode(errors="replace"))


class _Op:
    """An op of the library and the calls of it that wait to be used again."""

    def __init__(self, name: str, args_type: type):
        self.args_type = args_type
        others = ("workspace", "router")
        self.tensors = [n for n, t in args_type._fields_ if t is c_void_p and n not in others]
        self.function = self._bind(f"tenon_{name}")
        has_workspace = hasattr(args_type, "workspace")
        self.workspace_function = (
            self._bind(f"tenon_{name}_workspace_size") if has_workspace else None
        )
        self.pool: list[_Call] = []

    @staticmethod
    def _bind(name: str) -> Any:
        function = getattr(_library, name)
        function.restype = c_int32
        function.argtypes = [c_uint64, c_void_p, c_void_p, c_void_p]
        return function

    def call(self) -> _Call:
        try:
            return self.pool.pop()  # atomic, so threads never share one
        except IndexError:
            return _Call(self)


_ops = {
    name: _Op(name, args_type)
    for name, args_type in {
        "embedding": EmbeddingArgs,
        "rms_norm": RmsNormArgs,
        "linear": LinearArgs,
        "quantize_fp8": QuantizeFp8Args,
        "qk_norm": QkNormArgs,
        "attention": AttentionArgs,
        "moe_router": MoeRouterArgs,
        "moe_align": MoeAlignArgs,
        "moe_grouped_matmul": MoeGroupedMatmulArgs,
        "moe_swiglu": MoeSwigluArgs,
        "moe_sum_reduce": MoeSumReduceArgs,
        "moe": MoeArgs,
        "sampler": SamplerArgs,
        "speculative": SpeculativeArgs,
    }.items()
}


def _generic_call(op: str, fields: dict[str, Any]) -> tuple[_Call, Any]:
    """A call with these fields, and its first tensor."""
    call = _Call(_ops[op])
    first = None
    for name, value in fields.items():
        if name in call._slots:
            call.set(name, value)
            first = value if first is None else first
        elif name == "router" and op == "moe":
            call.set_router(_generic_call("moe_router", value)[0])
        elif hasattr(call.args, name):
            setattr(call.args, name, value)
        else:
            raise TypeError(f"tenon_{op}_args has no field {name}")
    return call, first


def call(
    op: str,
    *,
    context: Context | None = None,
    stream: Stream = None,
    workspace: TensorLike | None = None,
    **fields: Any,
) -> None:
    """Calls tenon_<op> with exactly these fields of its args, by their C names;
    the others are zero. The router of moe is a dict of its own fields. For code
    that is generic in the op."""
    call, first = _generic_call(op, fields)
    if call._workspace_function is not None:
        call.set_workspace(context, workspace, first, stream)
    call.run(context, stream)


# ----------------------------------------------------------------------- Ops


def embedding(
    ids: TensorLike,
    table: T,
    *,
    out: T | None = None,
    context: Context | None = None,
    stream: Stream = None,
) -> T:
    """out[t] = table[ids[t]]; zeros for an id outside the table.

    ids [tokens] int32 or int64; table [vocab_size, hidden]; out [tokens, hidden].
    """
    if out is None:
        out = _empty(table, (ids.shape[0], table.shape[1]), None, stream)
    call = _ops["embedding"].call()
    call.set("ids", ids)
    call.set("table", table)
    call.set("out", out, True)
    call.run(context, stream)
    return out


def rms_norm(
    x: T,
    weight: TensorLike,
    *,
    residual: T | None = None,
    out: T | None = None,
    epsilon: float = 1e-6,
    rounding: int = ROUNDING_FLOAT32_MULTIPLY,
    context: Context | None = None,
    stream: Stream = None,
) -> T:
    """out = v / sqrt(mean(v^2) + epsilon) * weight of every row v of x; with a
    residual, residual += x first, and v is the residual.

    x, residual, out [tokens, hidden]; weight [hidden], dtype of x or float32.
    out may be x.
    """
    if out is None:
        out = _empty(x, x.shape, None, stream)
    call = _ops["rms_norm"].call()
    args = call.args
    args.rounding = rounding
    args.epsilon = epsilon
    call.set("x", x)
    call.set("residual", residual, True)
    call.set("weight", weight)
    call.set("out", out, True)
    call.run(context, stream)
    return out


def _linear(
    x, weight, bias, weight_scales, out, out_dtype, batch_invariant, stream
) -> tuple[_Call, Any]:
    if out is None:
        out = _empty(x, (x.shape[0], weight.shape[0]), out_dtype, stream)
    call = _ops["linear"].call()
    call.args.flags = FLAG_BATCH_INVARIANT if batch_invariant else 0
    call.set("x", x)
    call.set("weight", weight)
    call.set("bias", bias)
    call.set("weight_scales", weight_scales)
    call.set("out", out, True)
    return call, out


def linear(
    x: T,
    weight: TensorLike,
    *,
    bias: TensorLike | None = None,
    weight_scales: TensorLike | None = None,
    out: T | None = None,
    out_dtype: str | None = None,
    batch_invariant: bool = False,
    workspace: TensorLike | None = None,
    context: Context | None = None,
    stream: Stream = None,
) -> T:
    """out = x * weight^T + bias.

    x [tokens, in_features]; weight [out_features, in_features]; bias
    [out_features]; out [tokens, out_features] of x's dtype or float32. On CUDA a
    context with cuBLASLt makes it fast. A float8_e4m3fn weight has weight_scales,
    float32 [ceil(out_features / 128), ceil(in_features / 128)] or [out_features].
    """
    call, out = _linear(x, weight, bias, weight_scales, out, out_dtype, batch_invariant, stream)
    call.set_workspace(context, workspace, x, stream)
    call.run(context, stream)
    return out


def linear_workspace_size(
    x: TensorLike,
    weight: TensorLike,
    *,
    bias: TensorLike | None = None,
    weight_scales: TensorLike | None = None,
    out: TensorLike | None = None,
    out_dtype: str | None = None,
    batch_invariant: bool = False,
    context: Context | None = None,
) -> int:
    """Bytes of `workspace` for a linear of these shapes."""
    call, _ = _linear(x, weight, bias, weight_scales, out, out_dtype, batch_invariant, None)
    return call.workspace_size(context)


def quantize_fp8(
    x: TensorLike,
    out: TensorLike,
    scales: TensorLike,
    *,
    block_rows: int = 1,
    block_cols: int = 128,
    context: Context | None = None,
    stream: Stream = None,
) -> None:
    """Quantises x [rows, cols] to float8_e4m3fn with a float32 scale for each block.

    Blocks are 1 x 128 (activations), 128 x 128 (weights; scales are [ceil(rows /
    128), ceil(cols / 128)]) or 1 x 0, a scale for each row (scales are [rows]).
    """
    call = _ops["quantize_fp8"].call()
    call.args.block_rows = block_rows
    call.args.block_cols = block_cols
    call.set("x", x)
    call.set("out", out, True)
    call.set("scales", scales, True)
    call.run(context, stream)


def qk_norm(
    q: TensorLike,
    k: TensorLike,
    q_weight: TensorLike,
    k_weight: TensorLike,
    *,
    v: TensorLike | None = None,
    epsilon: float = 1e-6,
    rounding: int = ROUNDING_FLOAT32_MULTIPLY,
    cos_sin: TensorLike | None = None,
    positions: TensorLike | None = None,
    rotary_dim: int | None = None,
    k_cache: TensorLike | None = None,
    v_cache: TensorLike | None = None,
    slot_mapping: TensorLike | None = None,
    k_scale: float = 0.0,
    v_scale: float = 0.0,
    context: Context | None = None,
    stream: Stream = None,
) -> None:
    """Attention pre-processing in place and in one launch: RMSNorm of every head
    of q and k, then (with cos_sin and positions) the rotary embedding, then
    (with k_cache, v_cache and slot_mapping) the write of K and V into the paged
    cache.

    q [tokens, num_q_heads, head_dim], k and v [tokens, num_kv_heads, head_dim],
    with free token and head strides; weights [head_dim]; cos_sin [max_positions,
    rotary_dim] float32: cosines, then sines; positions [tokens]; caches
    [num_pages, page_size, num_kv_heads, head_dim], of q's dtype or
    float8_e4m3fn with scales; slot_mapping [tokens] int64.
    """
    call = _ops["qk_norm"].call()
    args = call.args
    args.q_offset = args.k_offset = args.v_offset = 0
    args.num_q_heads = args.num_kv_heads = args.head_dim = 0
    call.set("qkv", None)
    call.set("v", v)
    call.set("k", k, True)
    call.set("q", q, True)
    _finish_qk_norm(
        call, q_weight, k_weight, epsilon, rounding, cos_sin, positions, rotary_dim, k_cache,
        v_cache, slot_mapping, k_scale, v_scale, context, stream,
    )  # fmt: skip


def qk_norm_packed(
    qkv: TensorLike,
    q_weight: TensorLike,
    k_weight: TensorLike,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_offset: int = 0,
    k_offset: int | None = None,
    v_offset: int | None = None,
    epsilon: float = 1e-6,
    rounding: int = ROUNDING_FLOAT32_MULTIPLY,
    cos_sin: TensorLike | None = None,
    positions: TensorLike | None = None,
    rotary_dim: int | None = None,
    k_cache: TensorLike | None = None,
    v_cache: TensorLike | None = None,
    slot_mapping: TensorLike | None = None,
    k_scale: float = 0.0,
    v_scale: float = 0.0,
    context: Context | None = None,
    stream: Stream = None,
) -> None:
    """`qk_norm` of the packed output qkv [tokens, row width] of a projection. Q
    begins at element q_offset of a row, K at k_offset (default: behind Q), V at
    v_offset (default: behind K). Where there is no V, leave out the cache."""
    call = _ops["qk_norm"].call()
    args = call.args
    if k_offset is None:
        k_offset = q_offset + num_q_heads * head_dim
    if v_offset is None:
        v_offset = k_offset + num_kv_heads * head_dim if k_cache is not None else 0
    args.q_offset = q_offset
    args.k_offset = k_offset
    args.v_offset = v_offset
    args.num_q_heads = num_q_heads
    args.num_kv_heads = num_kv_heads
    args.head_dim = head_dim
    call.set("q", None)
    call.set("k", None)
    call.set("v", None)
    call.set("qkv", qkv, True)
    _finish_qk_norm(
        call, q_weight, k_weight, epsilon, rounding, cos_sin, positions, rotary_dim, k_cache,
        v_cache, slot_mapping, k_scale, v_scale, context, stream,
    )  # fmt: skip


def _finish_qk_norm(
    call, q_weight, k_weight, epsilon, rounding, cos_sin, positions, rotary_dim, k_cache,
    v_cache, slot_mapping, k_scale, v_scale, context, stream,
) -> None:  # fmt: skip
    args = call.args
    args.epsilon = epsilon
    args.rounding = rounding
    args.k_scale = k_scale
    args.v_scale = v_scale
    if rotary_dim is None:
        rotary_dim = 0 if cos_sin is None else cos_sin.shape[1]
    args.rotary_dim = rotary_dim
    call.set("k_cache", k_cache, True)
    call.set("v_cache", v_cache, True)
    call.set("slot_mapping", slot_mapping)
    call.set("cos_sin", cos_sin)
    call.set("positions", positions)
    call.set("q_weight", q_weight)
    call.set("k_weight", k_weight)
    call.run(context, stream)


def _attention(
    q, k_cache, v_cache, block_table, query_start, kv_len, out, scale, k_scale, v_scale,
    max_kv_len, max_query_len, batch_invariant, stream,
) -> tuple[_Call, Any]:  # fmt: skip
    if out is None:
        out = _empty(q, q.shape, None, stream)
    call = _ops["attention"].call()
    args = call.args
    args.flags = FLAG_BATCH_INVARIANT if batch_invariant else 0
    args.scale = q.shape[-1] ** -0.5 if scale is None else scale
    args.k_scale = k_scale
    args.v_scale = v_scale
    args.max_kv_len = max_kv_len
    args.max_query_len = max_query_len
    call.set("k_cache", k_cache)
    call.set("v_cache", v_cache)
    call.set("block_table", block_table)
    call.set("query_start", query_start)
    call.set("kv_len", kv_len)
    call.set("out", out, True)
    call.set("q", q)
    return call, out


def attention(
    q: T,
    k_cache: TensorLike,
    v_cache: TensorLike,
    block_table: TensorLike,
    query_start: TensorLike,
    kv_len: TensorLike,
    *,
    out: T | None = None,
    scale: float | None = None,
    k_scale: float = 0.0,
    v_scale: float = 0.0,
    max_kv_len: int = 0,
    max_query_len: int = 0,
    batch_invariant: bool = False,
    workspace: TensorLike | None = None,
    context: Context | None = None,
    stream: Stream = None,
) -> T:
    """Causal grouped-query attention over a paged KV cache, for a ragged batch of
    decode rows and chunks of prefill.

    q, out [tokens, num_heads, head_dim]; caches [num_pages, page_size,
    num_kv_heads, head_dim]; block_table [num_seqs, max_pages] int32; query_start
    [num_seqs + 1] int32; kv_len [num_seqs] int32, the new tokens included. scale
    defaults to 1 / sqrt(head_dim). max_kv_len and max_query_len are upper bounds
    that the host knows; tight ones are faster. out may be q.
    """
    call, out = _attention(
        q, k_cache, v_cache, block_table, query_start, kv_len, out, scale, k_scale, v_scale,
        max_kv_len, max_query_len, batch_invariant, stream,
    )  # fmt: skip
    call.set_workspace(context, workspace, q, stream)
    call.run(context, stream)
    return out


def attention_workspace_size(
    q: TensorLike,
    k_cache: TensorLike,
    v_cache: TensorLike,
    block_table: TensorLike,
    query_start: TensorLike,
    kv_len: TensorLike,
    *,
    max_kv_len: int = 0,
    max_query_len: int = 0,
    batch_invariant: bool = False,
    context: Context | None = None,
) -> int:
    """Bytes of `workspace` for an attention of these shapes."""
    call, _ = _attention(
        q, k_cache, v_cache, block_table, query_start, kv_len, q, None, 1.0, 1.0,
        max_kv_len, max_query_len, batch_invariant, None,
    )  # fmt: skip
    return call.workspace_size(context)


@dataclasses.dataclass(slots=True)
class MoeRouter:
    """What moe_router does, as a part of moe."""

    logits: TensorLike
    top_k: int
    correction_bias: TensorLike | None = None
    scoring: int = SCORING_SOFTMAX
    renormalize: bool = True
    routed_scaling_factor: float = 1.0
    num_expert_groups: int = 1
    num_selected_groups: int = 1
    group_score: int = GROUP_SCORE_MAX
    num_fused_shared_experts: int = 0

    def _call(self, weights: Any, ids: Any, stream: Stream) -> tuple[_Call, Any, Any]:
        logits = self.logits
        shape = (logits.shape[0], self.top_k + self.num_fused_shared_experts)
        if weights is None:
            weights = _empty(logits, shape, "float32", stream)
        if ids is None:
            ids = _empty(logits, shape, "int32", stream)
        call = _ops["moe_router"].call()
        args = call.args
        args.top_k = self.top_k
        args.scoring = self.scoring
        args.renormalize = self.renormalize
        args.routed_scaling_factor = self.routed_scaling_factor
        args.num_expert_groups = self.num_expert_groups
        args.num_selected_groups = self.num_selected_groups
        args.group_score = self.group_score
        args.num_fused_shared_experts = self.num_fused_shared_experts
        call.set("correction_bias", self.correction_bias)
        call.set("topk_weights", weights, True)
        call.set("topk_ids", ids, True)
        call.set("logits", logits)
        return call, weights, ids


def moe_router(
    logits: T,
    top_k: int,
    *,
    correction_bias: TensorLike | None = None,
    scoring: int = SCORING_SOFTMAX,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    num_expert_groups: int = 1,
    num_selected_groups: int = 1,
    group_score: int = GROUP_SCORE_MAX,
    num_fused_shared_experts: int = 0,
    topk_weights: T | None = None,
    topk_ids: T | None = None,
    context: Context | None = None,
    stream: Stream = None,
) -> tuple[T, T]:
    """Chooses top_k experts for each token: (topk_weights, topk_ids), best first.

    logits [tokens, num_experts]; correction_bias [num_experts] float32, used for
    the choice alone; results [tokens, top_k + num_fused_shared_experts], float32
    and int32.
    """
    router = MoeRouter(
        logits,
        top_k,
        correction_bias,
        scoring,
        renormalize,
        routed_scaling_factor,
        num_expert_groups,
        num_selected_groups,
        group_score,
        num_fused_shared_experts,
    )
    call, topk_weights, topk_ids = router._call(topk_weights, topk_ids, stream)
    call.run(context, stream)
    return topk_weights, topk_ids


class MoeAlignment(NamedTuple):
    """(token, choice) pairs grouped by expert; see tenon.h."""

    expert_offsets: Any
    sorted_slots: Any
    tiles: Any  #: None without tile_rows


def moe_max_tiles(num_slots: int, num_experts: int, tile_rows: int) -> int:
    """Rows that `tiles` of moe_align must have."""
    return _library.tenon_moe_max_tiles(
        c_int64(num_slots), c_int32(num_experts), c_int32(tile_rows)
    )


def _moe_align(topk_ids, num_experts, tile_rows, offsets, slots, tiles, stream):
    num_slots = topk_ids.shape[0] * topk_ids.shape[1]
    if offsets is None:
        offsets = _empty(topk_ids, (num_experts + 1,), "int32", stream)
    if slots is None:
        slots = _empty(topk_ids, (num_slots,), "int32", stream)
    if tiles is None and tile_rows:
        rows = moe_max_tiles(num_slots, num_experts, tile_rows)
        tiles = _empty(topk_ids, (rows, 3), "int32", stream)
    call = _ops["moe_align"].call()
    call.args.num_experts = num_experts
    call.args.tile_rows = tile_rows
    call.set("expert_offsets", offsets, True)
    call.set("sorted_slots", slots, True)
    call.set("tiles", tiles, True)
    call.set("topk_ids", topk_ids)
    return call, MoeAlignment(offsets, slots, tiles)


def moe_align(
    topk_ids: TensorLike,
    num_experts: int,
    *,
    tile_rows: int = 0,
    expert_offsets: TensorLike | None = None,
    sorted_slots: TensorLike | None = None,
    tiles: TensorLike | None = None,
    workspace: TensorLike | None = None,
    context: Context | None = None,
    stream: Stream = None,
) -> MoeAlignment:
    """Groups the slots token * top_k + choice by expert, in ascending order;
    with tile_rows, also the schedule of a grouped GEMM.

    topk_ids [tokens, top_k] int32; results int32: [num_experts + 1], [tokens *
    top_k], [moe_max_tiles(...), 3].
    """
    call, result = _moe_align(
        topk_ids, num_experts, tile_rows, expert_offsets, sorted_slots, tiles, stream
    )
    call.set_workspace(context, workspace, topk_ids, stream)
    call.run(context, stream)
    return result


def moe_align_workspace_size(
    topk_ids: TensorLike, num_experts: int, *, tile_rows: int = 0, context: Context | None = None
) -> int:
    """Bytes of `workspace` for a moe_align of these shapes."""
    call, _ = _moe_align(topk_ids, num_experts, tile_rows, None, None, None, None)
    return call.workspace_size(context)


def _moe_grouped_matmul(
    x, weights, offsets, slots, slots_per_row, bias, routing_weights, weight_scales, out,
    batch_invariant, stream,
) -> tuple[_Call, Any]:
    if out is None:
        out = _empty(x, (slots.shape[0], weights.shape[1]), None, stream)
    call = _ops["moe_grouped_matmul"].call()
    call.args.flags = FLAG_BATCH_INVARIANT if batch_invariant else 0
    call.args.slots_per_row = slots_per_row
    call.set("weights", weights)
    call.set("expert_offsets", offsets)
    call.set("sorted_slots", slots)
    call.set("bias", bias)
    call.set("routing_weights", routing_weights)
    call.set("weight_scales", weight_scales)
    call.set("out", out, True)
    call.set("x", x)
    return call, out


def moe_grouped_matmul(
    x: T,
    weights: TensorLike,
    expert_offsets: TensorLike,
    sorted_slots: TensorLike,
    *,
    slots_per_row: int,
    bias: TensorLike | None = None,
    routing_weights: TensorLike | None = None,
    weight_scales: TensorLike | None = None,
    out: T | None = None,
    batch_invariant: bool = False,
    workspace: TensorLike | None = None,
    context: Context | None = None,
    stream: Stream = None,
) -> T:
    """out[s] = (x[s // slots_per_row] * weights[e]^T + bias[e]) * routing_weights[s]
    for every slot s of expert e, as moe_align grouped them.

    x [ceil(num_slots / slots_per_row), cols]; weights [num_experts, rows, cols];
    bias [num_experts, rows]; routing_weights [num_slots] float32; out
    [num_slots, rows]. slots_per_row is top_k for the up projection, 1 for the
    down projection. float8_e4m3fn weights have weight_scales, float32 [num_experts,
    ceil(rows / 128), ceil(cols / 128)] or [num_experts, rows].
    """
    call, out = _moe_grouped_matmul(
        x, weights, expert_offsets, sorted_slots, slots_per_row, bias, routing_weights,
        weight_scales, out, batch_invariant, stream,
    )  # fmt: skip
    call.set_workspace(context, workspace, x, stream)
    call.run(context, stream)
    return out


def moe_grouped_matmul_workspace_size(
    x: TensorLike,
    weights: TensorLike,
    expert_offsets: TensorLike,
    sorted_slots: TensorLike,
    *,
    slots_per_row: int,
    bias: TensorLike | None = None,
    routing_weights: TensorLike | None = None,
    weight_scales: TensorLike | None = None,
    out: TensorLike | None = None,
    batch_invariant: bool = False,
    context: Context | None = None,
) -> int:
    """Bytes of `workspace` for a moe_grouped_matmul of these shapes."""
    call, _ = _moe_grouped_matmul(
        x, weights, expert_offsets, sorted_slots, slots_per_row, bias, routing_weights,
        weight_scales, out, batch_invariant, None,
    )  # fmt: skip
    return call.workspace_size(context)


def moe_swiglu(
    x: T,
    *,
    layout: int = SWIGLU_BLOCKED,
    limit: float = 0.0,
    alpha: float = 0.0,
    out: T | None = None,
    context: Context | None = None,
    stream: Stream = None,
) -> T:
    """out = silu(gate) * up of x [rows, 2 N], gate and up in blocks or
    interleaved; out [rows, N]. With limit > 0 GPT-OSS's clamped form."""
    if out is None:
        out = _empty(x, (x.shape[0], x.shape[1] // 2), None, stream)
    call = _ops["moe_swiglu"].call()
    call.args.layout = layout
    call.args.limit = limit
    call.args.alpha = alpha
    call.set("out", out, True)
    call.set("x", x)
    call.run(context, stream)
    return out


def moe_sum_reduce(
    x: T, *, out: T | None = None, context: Context | None = None, stream: Stream = None
) -> T:
    """out[t] = x[t, 0] + x[t, 1] + ..., in this order; x [tokens, top_k, hidden],
    out [tokens, hidden]."""
    if out is None:
        out = _empty(x, (x.shape[0], x.shape[2]), None, stream)
    call = _ops["moe_sum_reduce"].call()
    call.set("out", out, True)
    call.set("x", x)
    call.run(context, stream)
    return out


def _moe(
    x, topk_weights, topk_ids, gate, up, down, router, scales, out, batch_invariant, stream
) -> tuple[_Call, Any]:
    if out is None:
        out = _empty(x, x.shape, None, stream)
    part = None
    if router is not None:
        part, topk_weights, topk_ids = router._call(topk_weights, topk_ids, stream)
    call = _ops["moe"].call()
    call.args.flags = FLAG_BATCH_INVARIANT if batch_invariant else 0
    call.set_router(part, topk_weights, topk_ids)
    call.set("topk_weights", topk_weights)
    call.set("topk_ids", topk_ids)
    call.set("gate", gate)
    call.set("up", up)
    call.set("down", down)
    for field, tensor in zip(("gate_scales", "up_scales", "down_scales"), scales or (None,) * 3):
        call.set(field, tensor)
    call.set("out", out, True)
    call.set("x", x)
    return call, out


def moe(
    x: T,
    topk_weights: TensorLike | None,
    topk_ids: TensorLike | None,
    gate: TensorLike,
    up: TensorLike,
    down: TensorLike,
    *,
    router: MoeRouter | None = None,
    scales: tuple[TensorLike, TensorLike, TensorLike] | None = None,
    out: T | None = None,
    batch_invariant: bool = False,
    workspace: TensorLike | None = None,
    context: Context | None = None,
    stream: Stream = None,
) -> T:
    """The expert part of a mixture-of-experts layer, from the router's choice to
    the summed output.

    x, out [tokens, hidden]; topk_weights float32 and topk_ids int32 [tokens,
    top_k]; gate, up [num_experts, intermediate, hidden]; down [num_experts,
    hidden, intermediate]. Experts packed as w13 [num_experts, 2 * intermediate,
    hidden] are w13[:, :intermediate] and w13[:, intermediate:]. out may be x.
    float8_e4m3fn experts have scales, float32, of gate, up and down: [num_experts,
    ceil(rows / 128), ceil(cols / 128)] or [num_experts, rows].

    With router, moe_router is part of the call: topk_weights and topk_ids are its
    results, or None.
    """
    call, out = _moe(
        x, topk_weights, topk_ids, gate, up, down, router, scales, out, batch_invariant, stream
    )
    call.set_workspace(context, workspace, x, stream)
    call.run(context, stream)
    return out


def moe_workspace_size(
    x: TensorLike,
    topk_weights: TensorLike | None,
    topk_ids: TensorLike | None,
    gate: TensorLike,
    up: TensorLike,
    down: TensorLike,
    *,
    router: MoeRouter | None = None,
    scales: tuple[TensorLike, TensorLike, TensorLike] | None = None,
    batch_invariant: bool = False,
    context: Context | None = None,
) -> int:
    """Bytes of `workspace` for a moe of these shapes."""
    call, _ = _moe(
        x, topk_weights, topk_ids, gate, up, down, router, scales, x, batch_invariant, None
    )
    return call.workspace_size(context)


class Samples(NamedTuple):
    """What the sampler drew."""

    tokens: Any  #: [rows] int32; -1 where statuses is not SAMPLE_OK
    statuses: Any  #: [rows] int32, SAMPLE_*
    logprobs: Any  #: [rows] float32, or None


def _packed_params(params: Any, keep: list) -> Any:
    """The tensor of these parameters, which may be one."""
    if hasattr(params, "shape"):
        return params
    params = list(params)
    memory = SamplingParams.pack(params)
    tensor = Tensor.from_buffer(memory or bytearray(1), "uint8", (len(params), 128))
    keep.append(tensor)
    return tensor


def _sampler(logits, params, tokens, statuses, logprobs, more, stream) -> tuple[_Call, Samples]:
    rows = (logits.shape[0],)
    if tokens is None:
        tokens = _empty(logits, rows, "int32", stream)
    if statuses is None:
        statuses = _empty(logits, rows, "int32", stream)
    if logprobs is True:
        logprobs = _empty(logits, rows, "float32", stream)
    elif logprobs is False:
        logprobs = None
    call = _ops["sampler"].call()
    call.args.vocab_size = more.get("vocab_size", 0)
    call.args.top_logprobs_kind = more.get("top_logprobs_kind", LOGPROB_UNFILTERED)
    call.args.random_stream = more.get("random_stream", STREAM_TARGET)
    call.args.flags = SAMPLER_FAST if more.get("fast", False) else 0
    call.set("params", _packed_params(params, call._keep))
    call.set("tokens", tokens, True)
    call.set("logprobs", logprobs, True)
    call.set("statuses", statuses, True)
    for field in ("edits", "edit_offsets", "bitmask", "random_bits"):
        call.set(field, more.get(field))
    for field in (
        "mirostat_mu", "raw_logprobs", "processed_logprobs", "top_tokens",
        "top_logprobs", "probabilities",
    ):  # fmt: skip
        call.set(field, more.get(field), True)
    call.set("logits", logits)
    return call, Samples(tokens, statuses, logprobs)


def sampler(
    logits: TensorLike,
    params: TensorLike | Iterable[SamplingParams],
    *,
    tokens: TensorLike | None = None,
    statuses: TensorLike | None = None,
    logprobs: TensorLike | bool | None = None,
    workspace: TensorLike | None = None,
    context: Context | None = None,
    stream: Stream = None,
    **more: Any,
) -> Samples:
    """Draws one token for each row of logits [rows, vocab_size].

    params [rows, 128] uint8 where the logits are (SamplingParams.pack), or for
    logits on the CPU simply SamplingParams, one for each row. logprobs=True
    allocates them. A token depends on logits, parameters, edits, mask, seed and
    position alone.

    More, as tenon_sampler_args has it: vocab_size without padding; edits [room,
    16] uint8 and edit_offsets [rows + 1] int32 (LogitEdit.pack); bitmask [rows,
    words] int32; mirostat_mu [rows] float32, in and out; top_tokens and
    top_logprobs [rows, n], raw_logprobs, processed_logprobs [rows], probabilities
    [rows, vocab_size], all out; top_logprobs_kind; random_stream; fast;
    random_bits.
    """
    unknown = set(more) - _SAMPLER_FIELDS
    if unknown:
        raise TypeError(f"sampler() has no argument {unknown.pop()}")
    call, samples = _sampler(logits, params, tokens, statuses, logprobs, more, stream)
    call.set_workspace(context, workspace, logits, stream)
    call.run(context, stream)
    return samples


_SAMPLER_FIELDS = {
    "vocab_size", "edits", "edit_offsets", "bitmask", "mirostat_mu", "random_bits",
    "raw_logprobs", "processed_logprobs", "top_tokens", "top_logprobs", "probabilities",
    "top_logprobs_kind", "random_stream", "fast",
}  # fmt: skip


def sampler_workspace_size(
    logits: TensorLike, params: TensorLike, *, context: Context | None = None
) -> int:
    """Bytes of `workspace` for a sampler of these shapes."""
    return _sampler(logits, params, None, None, None, {}, None)[0].workspace_size(context)


class Accepted(NamedTuple):
    """What became of drafts."""

    tokens: Any  #: [sequences, drafts + 1] int32: accepted ones, one more, -1
    num_accepted: Any  #: [sequences] int32
    statuses: Any  #: [sequences] int32, SAMPLE_*


def speculative(
    draft_tokens: TensorLike,
    *,
    target_tokens: TensorLike | None = None,
    target_probabilities: TensorLike | None = None,
    params: TensorLike | Iterable[SamplingParams] | None = None,
    draft_probabilities: TensorLike | None = None,
    num_drafts: TensorLike | None = None,
    context: Context | None = None,
    stream: Stream = None,
) -> Accepted:
    """Accepts or rejects drafts [sequences, drafts] by target_tokens [sequences,
    drafts + 1], or by target_probabilities [sequences * (drafts + 1), vocab_size]
    with params, one for each sequence."""
    sequences, drafts = draft_tokens.shape
    result = Accepted(
        _empty(draft_tokens, (sequences, drafts + 1), "int32", stream),
        _empty(draft_tokens, (sequences,), "int32", stream),
        _empty(draft_tokens, (sequences,), "int32", stream),
    )
    call = _ops["speculative"].call()
    call.set("num_drafts", num_drafts)
    call.set("target_tokens", target_tokens)
    call.set("target_probabilities", target_probabilities)
    call.set("params", None if params is None else _packed_params(params, call._keep))
    call.set("draft_probabilities", draft_probabilities)
    call.set("tokens", result.tokens, True)
    call.set("num_accepted", result.num_accepted, True)
    call.set("statuses", result.statuses, True)
    call.set("draft_tokens", draft_tokens)
    call.run(context, stream)
    return result


# -------------------------------------------------------------------- Engine

_ProgressFn = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int64, c_int64)


class Model(_Object):
    """A model's weights on a device. `Model.load` or `Model.random` make one."""

    _destroy = "tenon_model_destroy"

    info: ModelInfo

    def __init__(self, handle: int):
        self._own(handle)
        self.info = ModelInfo()
        _check(_library.tenon_model_query, c_uint64(handle), ctypes.byref(self.info))

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        device: Device = "cpu",
        *,
        rank: int = 0,
        world_size: int = 1,
        weights: int = WEIGHTS_STORED,
        progress: Callable[[int, int], Any] | None = None,
    ) -> "Model":
        """Reads a checkpoint directory of Hugging Face (config.json and
        safetensors) of Qwen3MoeForCausalLM or Qwen3ForCausalLM.

        weights=WEIGHTS_FP8 quantises attention projections, experts and dense MLPs that
        are not fp8 already, with blocks of 128 x 128.

        progress(bytes_done, bytes_total) is told now and then. If it returns
        False the load ends with TenonError CANCELLED; an exception that it
        raises ends the load too, and comes out of here.
        """
        kind, index = _device(device)
        raised: list[BaseException] = []

        @_ProgressFn
        def report(_: Any, done: int, total: int) -> int:
            try:
                return int(progress(done, total) is False)
            except BaseException as error:
                raised.append(error)
                return 1

        args = ModelLoadArgs(
            device_type=kind,
            device_index=index,
            rank=rank,
            world_size=world_size,
            directory=os.fsencode(directory),
            progress=ctypes.cast(report, c_void_p) if progress else None,
            weights=weights,
        )
        handle = c_uint64()
        try:
            _check(_library.tenon_model_load, ctypes.byref(args), ctypes.byref(handle))
        except TenonError:
            if raised:
                raise raised[0] from None
            raise
        return cls(handle.value)

    @classmethod
    def random(
        cls,
        config_json: str,
        device: Device = "cpu",
        *,
        dtype: str = "bfloat16",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> "Model":
        """A model with random weights for the text of a config.json, for
        benchmarks; the same bits on every device."""
        kind, index = _device(device)
        dtypes = {"float32": DTYPE_FLOAT32, "float16": DTYPE_FLOAT16, "bfloat16": DTYPE_BFLOAT16}
        args = ModelRandomArgs(
            device_type=kind,
            device_index=index,
            rank=rank,
            world_size=world_size,
            dtype=dtypes[dtype],
            seed=seed,
            config_json=config_json.encode(),
        )
        handle = c_uint64()
        _check(_library.tenon_model_create_random, ctypes.byref(args), ctypes.byref(handle))
        return cls(handle.value)

    def session(self, **options: Any) -> "Session":
        """Session(self, **options)."""
        return Session(self, **options)


class Sequence(_Object):
    """A sequence of tokens in a session's KV cache. Freed with its object."""

    def __init__(self, session: "Session", handle: int):
        self.session = session
        self._handle = handle
        self._finalizer = weakref.finalize(
            self, _library.tenon_sequence_release, c_uint64(session._handle), c_uint64(handle), None
        )

    def fork(self) -> "Sequence":
        """A second sequence with the same tokens; pages are shared until written."""
        handle = c_uint64()
        self._check(_library.tenon_sequence_fork, ctypes.byref(handle))
        return Sequence(self.session, handle.value)

    def truncate(self, num_tokens: int) -> None:
        """Forgets all tokens but the first num_tokens."""
        self._check(_library.tenon_sequence_truncate, c_int32(num_tokens))

    def __len__(self) -> int:
        """Tokens in the cache."""
        length = c_int32()
        self._check(_library.tenon_sequence_length, ctypes.byref(length))
        return length.value

    def __bool__(self) -> bool:
        return True

    def _check(self, function: Any, argument: Any) -> None:
        _check(function, c_uint64(self.session._handle), c_uint64(self._handle), argument)


@dataclasses.dataclass(slots=True)
class StepRow:
    """What a step does with one sequence: appends tokens and, with sampling,
    draws the next one.

    Mirostat: the session keeps mu of each sequence. After truncate(), the mu of the
    last token that is left goes into sampling.mirostat_mu, with
    SAMPLING_SET_MIROSTAT_MU in sampling.flags."""

    sequence: Sequence
    #: None: the token that the step before, waited for or not, drew for the sequence
    tokens: int | SequenceOf[int] | None
    sampling: SamplingParams | None = None  #: None: a chunk with more to come
    logits: int = LOGITS_NONE
    # For the token that is drawn.
    edits: Iterable[LogitEdit] | None = None  #: in any order; penalties need it, at least ()
    bitmask: TensorLike | None = None  #: [ceil(vocab / 32)] int32 or uint32, CPU


class StepResult(NamedTuple):
    """One entry for each row."""

    tokens: list[int]  #: -1: none was drawn
    logprobs: list[float]
    statuses: list[int]  #: SAMPLE_*
    logits: list[memoryview | None]  #: float32 [vocab], or [tokens, vocab]
    distinct_experts: list[int] | None  #: of each layer; with count_experts
    microseconds: float  #: of the whole step
    #: (token, logprob), best first, as many as num_top_logprobs of the row's
    #: sampling asks for and may be drawn
    top: list[list[tuple[int, float]]]
    mirostat_mu: list[float]  #: after the draw; 0 for rows without mirostat


class _Flight(NamedTuple):
    """What an enqueued step keeps for its results."""

    logits: list[memoryview | None]
    num_top: list[int]


class Session(_Object):
    """Runs a model: owns the paged KV cache, the activations and a stream."""

    _destroy = "tenon_session_destroy"

    def __init__(
        self,
        model: Model,
        *,
        max_sequences: int = 0,
        max_tokens: int = 0,
        max_context: int = 0,
        page_size: int = 0,
        num_pages: int = 0,
        max_logit_rows: int = 0,
        num_threads: int = 0,
        kv_cache_bytes: int = 0,
        batch_invariant: bool = False,
        count_experts: bool = False,
        moe_kernels: str | None = None,
        kv_cache_dtype: int = KV_CACHE_MODEL_DTYPE,
        kv_cache_k_scale: float = 1.0,
        kv_cache_v_scale: float = 1.0,
        cuda_graphs: bool = True,
        max_logit_edits: int = 0,
        logit_bitmasks: bool = False,
        max_top_logprobs: int = 0,
    ):
        """0 is the default of tenon_session_options; moe_kernels as in Context. All
        memory is allocated here, also that for edits (of all rows of a step),
        bitmasks and best tokens (of a row), which rows have none of by default."""
        options = SessionOptions(
            flags=SESSION_BATCH_INVARIANT * batch_invariant
            + SESSION_COUNT_EXPERTS * count_experts
            + SESSION_NO_CUDA_GRAPHS * (not cuda_graphs)
            + SESSION_LOGIT_BITMASKS * logit_bitmasks,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_k_scale=kv_cache_k_scale,
            kv_cache_v_scale=kv_cache_v_scale,
            max_sequences=max_sequences,
            max_tokens=max_tokens,
            max_context=max_context,
            page_size=page_size,
            num_pages=num_pages,
            max_logit_rows=max_logit_rows,
            num_threads=num_threads,
            kv_cache_bytes=kv_cache_bytes,
            max_logit_edits=max_logit_edits,
            max_top_logprobs=max_top_logprobs,
            moe_kernels_json=None if moe_kernels is None else moe_kernels.encode(),
        )
        handle = c_uint64()
        _check(
            _library.tenon_session_create,
            c_uint64(model._handle),
            ctypes.byref(options),
            ctypes.byref(handle),
        )
        self._own(handle.value)
        self._model_info = model.info
        self._count_experts = count_experts
        self._lock = threading.Lock()  # for the buffers; the library has its own
        self._flights: collections.deque[_Flight] = collections.deque()
        self._reserve(self.info.max_sequences)

    @property
    def info(self) -> SessionInfo:
        """Options in force, and the state: sequences, pages, steps."""
        info = SessionInfo()
        _check(_library.tenon_session_query, c_uint64(self._handle), ctypes.byref(info))
        return info

    def sequence(self) -> Sequence:
        """A new, empty sequence."""
        handle = c_uint64()
        _check(_library.tenon_sequence_create, c_uint64(self._handle), ctypes.byref(handle))
        return Sequence(self, handle.value)

    def _reserve(self, num_rows: int) -> None:
        """Buffers for the rows of a step, used by all of them."""
        self._rows = (_StepRow * num_rows)(*[_StepRow() for _ in range(num_rows)])
        self._tokens = (c_int32 * num_rows)()
        self._logprobs = (ctypes.c_float * num_rows)()
        self._statuses = (c_int32 * num_rows)()
        self._top_tokens = (c_int32 * MAX_TOP_LOGPROBS * num_rows)()
        self._top_logprobs = (ctypes.c_float * MAX_TOP_LOGPROBS * num_rows)()
        self._mirostat_mu = (ctypes.c_float * num_rows)()
        self._experts = (c_int32 * self._model_info.num_layers)()
        self._microseconds = ctypes.c_double()
        self._args = _StepArgs(
            rows=addressof(self._rows),
            tokens=addressof(self._tokens),
            logprobs=addressof(self._logprobs),
            statuses=addressof(self._statuses),
            distinct_experts=addressof(self._experts) if self._count_experts else None,
            microseconds=addressof(self._microseconds),
            mirostat_mu=addressof(self._mirostat_mu),
        )
        self._rows_alone = _StepArgs(rows=self._args.rows)
        self._results = _StepResults(
            tokens=self._args.tokens,
            logprobs=self._args.logprobs,
            statuses=self._args.statuses,
            mirostat_mu=self._args.mirostat_mu,
            top_tokens=addressof(self._top_tokens),
            top_logprobs=addressof(self._top_logprobs),
            distinct_experts=self._args.distinct_experts,
            microseconds=self._args.microseconds,
            top_columns=MAX_TOP_LOGPROBS,
        )

    def step(self, rows: SequenceOf[StepRow]) -> StepResult:
        """Runs the model over the new tokens of all rows in one pass: decode rows
        and chunks of prefill together. All or nothing: after an error every
        sequence is as it was."""
        with self._lock:
            flight, keep = self._fill(rows)
            for i, count in enumerate(flight.num_top):
                if count:
                    self._rows[i].top_tokens = addressof(self._top_tokens[i])
                    self._rows[i].top_logprobs = addressof(self._top_logprobs[i])
            self._args.num_rows = len(rows)
            self._check(_library.tenon_session_step, self._args)
            del keep  # which the library has read
            return self._result(flight)

    def enqueue(self, rows: SequenceOf[StepRow]) -> None:
        """Starts a step, or does nothing at all: step() in two parts, so that a step
        is on its way before the tokens of the last one are read. Two may be in flight;
        wait() gives the results of the first. Rows whose tokens are None go on with
        what the step before drew. Sequences may come and go meanwhile: one that has
        ended may be closed at once though its next step is under way."""
        with self._lock:
            flight, keep = self._fill(rows)
            self._rows_alone.num_rows = len(rows)
            self._check(_library.tenon_session_enqueue_step, self._rows_alone)
            del keep
            self._flights.append(flight)

    def wait(self) -> StepResult:
        """Waits for the step that was enqueued first."""
        with self._lock:
            flight = self._flights[0] if self._flights else _Flight([], [])
            self._results.num_rows = len(flight.num_top)
            self._check(_library.tenon_session_wait_step, self._results)
            self._flights.popleft()
            return self._result(flight)

    def _check(self, function: Any, args: Any) -> None:
        _check(function, c_uint64(self._handle), ctypes.byref(args))

    def _fill(self, rows: SequenceOf[StepRow]) -> tuple[_Flight, list]:
        """Fills self._rows in. What comes second the library reads in the call."""
        if len(rows) > len(self._rows):
            self._reserve(len(rows))
        tokens = array.array("i")
        counts = []
        for row in rows:
            begin = len(tokens)
            if hasattr(row.tokens, "__len__"):
                tokens.extend(row.tokens)
            elif row.tokens is not None:
                tokens.append(row.tokens)
            counts.append(1 if row.tokens is None else len(tokens) - begin)
        address = tokens.buffer_info()[0]
        flight = _Flight([], [])
        keep: list = [tokens]
        for row, out, count in zip(rows, self._rows, counts):
            continues = row.tokens is None
            out.flags = ROW_CONTINUES * continues
            out.num_tokens = count
            out.sequence = row.sequence._handle
            out.tokens = None if continues else address
            address += 0 if continues else count * tokens.itemsize
            out.sampling = None if row.sampling is None else addressof(row.sampling)
            out.logits_mode = row.logits
            out.logits = None
            logits = None
            if row.logits != LOGITS_NONE:
                logits, out.logits = self._logit_memory(row.logits, count)
            flight.logits.append(logits)
            flight.num_top.append(0 if row.sampling is None else row.sampling.num_top_logprobs)
            out.top_tokens = out.top_logprobs = None
            out.edits, out.num_edits = self._edit_memory(row.edits, keep)
            out.bitmask = self._bitmask_memory(row.bitmask, keep)
        return flight, keep

    def _result(self, flight: _Flight) -> StepResult:
        n = len(flight.num_top)
        return StepResult(
            self._tokens[:n],
            self._logprobs[:n],
            self._statuses[:n],
            flight.logits,
            self._experts[:] if self._count_experts else None,
            self._microseconds.value,
            [self._top(i, count) for i, count in enumerate(flight.num_top)],
            self._mirostat_mu[:n],
        )

    def _top(self, row: int, count: int) -> list[tuple[int, float]]:
        tokens, logprobs = self._top_tokens[row], self._top_logprobs[row]
        return [(t, p) for t, p in zip(tokens[:count], logprobs[:count]) if t >= 0]

    def _edit_memory(
        self, edits: Iterable[LogitEdit] | None, keep: list
    ) -> tuple[int | None, int]:
        """A row's edits in the library's order, aligned to 16 bytes, and their number."""
        if edits is None:
            return None, 0
        packed, (_, count) = LogitEdit.pack([edits], self._model_info.vocab_size)
        memory = (c_char * (len(packed) + 16))()
        address = addressof(memory) + -addressof(memory) % 16
        ctypes.memmove(address, bytes(packed), len(packed))
        keep.append(memory)
        return address, count

    def _bitmask_memory(self, bitmask: TensorLike | None, keep: list) -> int | None:
        """The address of a row's bitmask, which must be as the library reads it."""
        if bitmask is None:
            return None
        tensor = bitmask if type(bitmask) is Tensor else Tensor(bitmask)
        keep.append(tensor)
        shape = ((self._model_info.vocab_size + 31) // 32,)
        dtype = (tensor._dl.dtype_code, tensor._dl.dtype_bits)
        if tensor.device[0] != DEVICE_CPU or dtype not in ((0, 32), (1, 32)):
            raise TypeError(f"bitmask is {tensor}, expected int32 or uint32 on the CPU")
        if tensor.shape != shape or tensor.strides not in (None, (1,)):
            raise ValueError(f"bitmask is {tensor}, expected shape {shape}, compact")
        return tensor.data

    def _logit_memory(self, mode: int, count: int) -> tuple[memoryview, int]:
        vocab = self._model_info.vocab_size
        rows = count if mode == LOGITS_ALL else 1
        memory = (ctypes.c_float * (rows * vocab))()
        shape = [rows, vocab] if mode == LOGITS_ALL else [vocab]
        return memoryview(memory).cast("B").cast("f", shape), addressof(memory)

    def generate(
        self,
        prompt: SequenceOf[int],
        max_tokens: int,
        sampling: SamplingParams | None = None,
        *,
        stop: Iterable[int] | None = None,
    ) -> Iterator[int]:
        """Yields the tokens that continue a prompt, up to max_tokens of them or
        to the end of the context. `stop` ends them, and is not yielded; default:
        the model's end-of-text tokens. Greedy without sampling. Other sequences
        may step in between."""
        info = self._model_info
        if stop is None:
            stop = info.eos_token_ids[: min(info.num_eos_token_ids, 8)]
        stop = frozenset(stop)
        sampling = sampling or SamplingParams.greedy()
        limits = self.info
        room = limits.max_context - len(prompt) + 1
        if room > 0:  # else the step says what is wrong
            max_tokens = min(max_tokens, room)
        with self.sequence() as sequence:
            chunk = limits.max_tokens
            last = max(len(prompt) - 1, 0) // chunk * chunk
            for begin in range(0, last, chunk):
                self.step([StepRow(sequence, prompt[begin : begin + chunk])])
            tokens: int | SequenceOf[int] = prompt[last:]
            for _ in range(max_tokens):
                result = self.step([StepRow(sequence, tokens, sampling)])
                tokens = result.tokens[0]
                if tokens in stop or tokens < 0:
                    return
                yield tokens
