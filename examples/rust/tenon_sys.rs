//! Declarations of Tenon's C interface; abi/tenon.h says what they mean.
//!
//! Written by tools/bindings/rust.py from abi/layout.json: do not edit.

#![allow(non_camel_case_types)]

use std::ffi::{c_void, CStr};
use std::os::raw::{c_char, c_int};

pub const TENON_DL_CPU: i32 = 1;
pub const TENON_DL_CUDA: i32 = 2;
pub const TENON_DL_CUDA_HOST: i32 = 3;
pub const TENON_DL_INT: u8 = 0;
pub const TENON_DL_UINT: u8 = 1;
pub const TENON_DL_FLOAT: u8 = 2;
pub const TENON_DL_BFLOAT: u8 = 4;
pub const TENON_DL_FLOAT8_E4M3FN: u8 = 10;
pub const TENON_ABI_MAJOR: u32 = 1;
pub const TENON_ABI_MINOR: u32 = 4;
pub const TENON_OK: i32 = 0;
pub const TENON_CANCELLED: i32 = 1;
pub const TENON_UNKNOWN: i32 = 2;
pub const TENON_INVALID_ARGUMENT: i32 = 3;
pub const TENON_DEADLINE_EXCEEDED: i32 = 4;
pub const TENON_NOT_FOUND: i32 = 5;
pub const TENON_ALREADY_EXISTS: i32 = 6;
pub const TENON_PERMISSION_DENIED: i32 = 7;
pub const TENON_RESOURCE_EXHAUSTED: i32 = 8;
pub const TENON_FAILED_PRECONDITION: i32 = 9;
pub const TENON_ABORTED: i32 = 10;
pub const TENON_OUT_OF_RANGE: i32 = 11;
pub const TENON_UNIMPLEMENTED: i32 = 12;
pub const TENON_INTERNAL: i32 = 13;
pub const TENON_UNAVAILABLE: i32 = 14;
pub const TENON_DATA_LOSS: i32 = 15;
pub const TENON_UNAUTHENTICATED: i32 = 16;
pub const TENON_DEVICE_CPU: i32 = 1;
pub const TENON_DEVICE_CUDA: i32 = 2;
pub const TENON_CPU_ISA_GENERIC: i32 = 1;
pub const TENON_CPU_ISA_AVX2: i32 = 2;
pub const TENON_CPU_ISA_AVX512: i32 = 3;
pub const TENON_CUBLAS_LT_IF_FOUND: i32 = 0;
pub const TENON_CUBLAS_LT_OFF: i32 = 1;
pub const TENON_CUBLAS_LT_REQUIRED: i32 = 2;
pub const TENON_FLAG_BATCH_INVARIANT: u32 = 1;
pub const TENON_ROUNDING_FLOAT32_MULTIPLY: i32 = 0;
pub const TENON_ROUNDING_CAST_THEN_MULTIPLY: i32 = 1;
pub const TENON_SCORING_SOFTMAX: i32 = 0;
pub const TENON_SCORING_SIGMOID: i32 = 1;
pub const TENON_GROUP_SCORE_MAX: i32 = 0;
pub const TENON_GROUP_SCORE_TOP2_SUM: i32 = 1;
pub const TENON_SWIGLU_BLOCKED: i32 = 0;
pub const TENON_SWIGLU_INTERLEAVED: i32 = 1;
pub const TENON_FILTER_SEQUENTIAL: i32 = 0;
pub const TENON_FILTER_JOINT: i32 = 1;
pub const TENON_FILTER_LLAMA_CPP: i32 = 2;
pub const TENON_SAMPLING_USE_BITMASK: u32 = 1;
pub const TENON_SAMPLING_ONLY_ALLOWED: u32 = 2;
pub const TENON_SAMPLING_SET_MIROSTAT_MU: u32 = 4;
pub const TENON_MAX_TOP_LOGPROBS: i32 = 20;
pub const TENON_SAMPLE_OK: i32 = 0;
pub const TENON_SAMPLE_NO_SUPPORT: i32 = 1;
pub const TENON_SAMPLE_NON_FINITE: i32 = 2;
pub const TENON_EDIT_IN_PROMPT: u32 = 536870912;
pub const TENON_EDIT_ALLOW: u32 = 1073741824;
pub const TENON_EDIT_BAN: u32 = 2147483648;
pub const TENON_LOGPROB_UNFILTERED: i32 = 0;
pub const TENON_LOGPROB_RAW: i32 = 1;
pub const TENON_LOGPROB_PROCESSED: i32 = 2;
pub const TENON_STREAM_TARGET: i32 = 0;
pub const TENON_STREAM_DRAFT: i32 = 1;
pub const TENON_SAMPLER_FAST: u32 = 1;
pub const TENON_DTYPE_FLOAT32: i32 = 1;
pub const TENON_DTYPE_FLOAT16: i32 = 2;
pub const TENON_DTYPE_BFLOAT16: i32 = 3;
pub const TENON_WEIGHTS_STORED: i32 = 0;
pub const TENON_WEIGHTS_FP8: i32 = 1;
pub const TENON_SESSION_BATCH_INVARIANT: u32 = 1;
pub const TENON_SESSION_COUNT_EXPERTS: u32 = 2;
pub const TENON_SESSION_NO_CUDA_GRAPHS: u32 = 4;
pub const TENON_SESSION_LOGIT_BITMASKS: u32 = 8;
pub const TENON_KV_CACHE_MODEL_DTYPE: i32 = 0;
pub const TENON_KV_CACHE_FLOAT8_E4M3: i32 = 1;
pub const TENON_LOGITS_NONE: i32 = 0;
pub const TENON_LOGITS_LAST: i32 = 1;
pub const TENON_LOGITS_ALL: i32 = 2;
pub const TENON_ROW_CONTINUES: u32 = 1;
pub const TENON_MAX_STEPS_IN_FLIGHT: i32 = 2;

pub type DLDeviceType = i32;
pub type tenon_context = u64;
pub type tenon_model = u64;
pub type tenon_session = u64;
pub type tenon_sequence = u64;

pub type tenon_progress_fn =
    unsafe extern "C" fn(user_data: *mut c_void, bytes_done: i64, bytes_total: i64) -> i32;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct DLDevice {
    pub device_type: DLDeviceType,
    pub device_id: i32,
}

impl Default for DLDevice {
    /// All zero.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        unsafe { std::mem::zeroed() }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct DLDataType {
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

impl Default for DLDataType {
    /// All zero.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        unsafe { std::mem::zeroed() }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct DLTensor {
    pub data: *mut c_void,
    pub device: DLDevice,
    pub ndim: i32,
    pub dtype: DLDataType,
    pub shape: *mut i64,
    pub strides: *mut i64,
    pub byte_offset: u64,
}

impl Default for DLTensor {
    /// All zero.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        unsafe { std::mem::zeroed() }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_error {
    pub struct_size: u32,
    pub code: i32,
    pub message: [c_char; 512],
}

impl Default for tenon_error {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_device_info {
    pub struct_size: u32,
    pub device_type: i32,
    pub device_index: i32,
    pub num_cores: i32,
    pub compute_capability: i32,
    pub cpu_isa: i32,
    pub total_memory_bytes: i64,
    pub l2_bytes: i64,
    pub name: [c_char; 128],
}

impl Default for tenon_device_info {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_context_options {
    pub struct_size: u32,
    pub device_type: i32,
    pub device_index: i32,
    pub num_threads: i32,
    pub cublas_lt: i32,
    pub reserved: i32,
}

impl Default for tenon_context_options {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_context_info {
    pub struct_size: u32,
    pub device_type: i32,
    pub device_index: i32,
    pub num_threads: i32,
    pub cublas_lt_version: u64,
    pub num_moe_kernels: i32,
    pub reserved: i32,
}

impl Default for tenon_context_info {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_embedding_args {
    pub struct_size: u32,
    pub reserved: u32,
    pub ids: *const DLTensor,
    pub table: *const DLTensor,
    pub out: *const DLTensor,
}

impl Default for tenon_embedding_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_rms_norm_args {
    pub struct_size: u32,
    pub rounding: i32,
    pub x: *const DLTensor,
    pub residual: *const DLTensor,
    pub weight: *const DLTensor,
    pub out: *const DLTensor,
    pub epsilon: f32,
    pub reserved: u32,
}

impl Default for tenon_rms_norm_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_linear_args {
    pub struct_size: u32,
    pub flags: u32,
    pub x: *const DLTensor,
    pub weight: *const DLTensor,
    pub bias: *const DLTensor,
    pub out: *const DLTensor,
    pub workspace: *mut c_void,
    pub workspace_size: u64,
    pub weight_scales: *const DLTensor,
}

impl Default for tenon_linear_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_quantize_fp8_args {
    pub struct_size: u32,
    pub block_rows: i32,
    pub block_cols: i32,
    pub reserved: u32,
    pub x: *const DLTensor,
    pub out: *const DLTensor,
    pub scales: *const DLTensor,
}

impl Default for tenon_quantize_fp8_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_qk_norm_args {
    pub struct_size: u32,
    pub rounding: i32,
    pub qkv: *const DLTensor,
    pub q_offset: i64,
    pub k_offset: i64,
    pub v_offset: i64,
    pub num_q_heads: i32,
    pub num_kv_heads: i32,
    pub head_dim: i32,
    pub epsilon: f32,
    pub q: *const DLTensor,
    pub k: *const DLTensor,
    pub v: *const DLTensor,
    pub q_weight: *const DLTensor,
    pub k_weight: *const DLTensor,
    pub cos_sin: *const DLTensor,
    pub positions: *const DLTensor,
    pub k_cache: *const DLTensor,
    pub v_cache: *const DLTensor,
    pub slot_mapping: *const DLTensor,
    pub k_scale: f32,
    pub v_scale: f32,
    pub rotary_dim: i32,
    pub reserved: u32,
}

impl Default for tenon_qk_norm_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_attention_args {
    pub struct_size: u32,
    pub flags: u32,
    pub q: *const DLTensor,
    pub k_cache: *const DLTensor,
    pub v_cache: *const DLTensor,
    pub block_table: *const DLTensor,
    pub query_start: *const DLTensor,
    pub kv_len: *const DLTensor,
    pub out: *const DLTensor,
    pub scale: f32,
    pub k_scale: f32,
    pub v_scale: f32,
    pub max_kv_len: i32,
    pub max_query_len: i32,
    pub reserved: u32,
    pub workspace: *mut c_void,
    pub workspace_size: u64,
}

impl Default for tenon_attention_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_moe_router_args {
    pub struct_size: u32,
    pub top_k: i32,
    pub logits: *const DLTensor,
    pub correction_bias: *const DLTensor,
    pub topk_weights: *const DLTensor,
    pub topk_ids: *const DLTensor,
    pub scoring: i32,
    pub renormalize: i32,
    pub routed_scaling_factor: f32,
    pub num_expert_groups: i32,
    pub num_selected_groups: i32,
    pub group_score: i32,
    pub num_fused_shared_experts: i32,
    pub reserved: u32,
}

impl Default for tenon_moe_router_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_moe_align_args {
    pub struct_size: u32,
    pub num_experts: i32,
    pub topk_ids: *const DLTensor,
    pub expert_offsets: *const DLTensor,
    pub sorted_slots: *const DLTensor,
    pub tiles: *const DLTensor,
    pub tile_rows: i32,
    pub reserved: u32,
    pub workspace: *mut c_void,
    pub workspace_size: u64,
}

impl Default for tenon_moe_align_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_moe_grouped_matmul_args {
    pub struct_size: u32,
    pub flags: u32,
    pub x: *const DLTensor,
    pub weights: *const DLTensor,
    pub expert_offsets: *const DLTensor,
    pub sorted_slots: *const DLTensor,
    pub bias: *const DLTensor,
    pub routing_weights: *const DLTensor,
    pub out: *const DLTensor,
    pub slots_per_row: i32,
    pub reserved: u32,
    pub workspace: *mut c_void,
    pub workspace_size: u64,
    pub weight_scales: *const DLTensor,
}

impl Default for tenon_moe_grouped_matmul_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_moe_swiglu_args {
    pub struct_size: u32,
    pub layout: i32,
    pub x: *const DLTensor,
    pub out: *const DLTensor,
    pub limit: f32,
    pub alpha: f32,
}

impl Default for tenon_moe_swiglu_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_moe_sum_reduce_args {
    pub struct_size: u32,
    pub reserved: u32,
    pub x: *const DLTensor,
    pub out: *const DLTensor,
}

impl Default for tenon_moe_sum_reduce_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_moe_args {
    pub struct_size: u32,
    pub flags: u32,
    pub x: *const DLTensor,
    pub topk_weights: *const DLTensor,
    pub topk_ids: *const DLTensor,
    pub gate: *const DLTensor,
    pub up: *const DLTensor,
    pub down: *const DLTensor,
    pub out: *const DLTensor,
    pub workspace: *mut c_void,
    pub workspace_size: u64,
    pub gate_scales: *const DLTensor,
    pub up_scales: *const DLTensor,
    pub down_scales: *const DLTensor,
    pub router: *const tenon_moe_router_args,
}

impl Default for tenon_moe_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_sampling_params {
    pub temperature: f32,
    pub top_k: i32,
    pub top_p: f32,
    pub min_p: f32,
    pub filter_order: i32,
    pub reserved0: u32,
    pub seed: u64,
    pub position: u64,
    pub typical_p: f32,
    pub top_n_sigma: f32,
    pub xtc_probability: f32,
    pub xtc_threshold: f32,
    pub mirostat_tau: f32,
    pub mirostat_eta: f32,
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    pub dry_multiplier: f32,
    pub dry_base: f32,
    pub dry_allowed_length: i32,
    pub dry_range: i32,
    pub flags: u32,
    pub num_top_logprobs: i32,
    pub mirostat_mu: f32,
    pub reserved: [u32; 6],
}

impl Default for tenon_sampling_params {
    /// All zero.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        unsafe { std::mem::zeroed() }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_logit_edit {
    pub id: i32,
    pub state: u32,
    pub bias: f32,
    pub offset: f32,
}

impl Default for tenon_logit_edit {
    /// All zero.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        unsafe { std::mem::zeroed() }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_sampler_args {
    pub struct_size: u32,
    pub flags: u32,
    pub logits: *const DLTensor,
    pub params: *const DLTensor,
    pub tokens: *const DLTensor,
    pub logprobs: *const DLTensor,
    pub statuses: *const DLTensor,
    pub workspace: *mut c_void,
    pub workspace_size: u64,
    pub vocab_size: i64,
    pub edits: *const DLTensor,
    pub edit_offsets: *const DLTensor,
    pub bitmask: *const DLTensor,
    pub mirostat_mu: *const DLTensor,
    pub random_bits: *const DLTensor,
    pub raw_logprobs: *const DLTensor,
    pub processed_logprobs: *const DLTensor,
    pub top_tokens: *const DLTensor,
    pub top_logprobs: *const DLTensor,
    pub probabilities: *const DLTensor,
    pub top_logprobs_kind: i32,
    pub random_stream: i32,
}

impl Default for tenon_sampler_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_speculative_args {
    pub struct_size: u32,
    pub reserved: u32,
    pub draft_tokens: *const DLTensor,
    pub num_drafts: *const DLTensor,
    pub target_tokens: *const DLTensor,
    pub target_probabilities: *const DLTensor,
    pub params: *const DLTensor,
    pub draft_probabilities: *const DLTensor,
    pub tokens: *const DLTensor,
    pub num_accepted: *const DLTensor,
    pub statuses: *const DLTensor,
}

impl Default for tenon_speculative_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_model_load_args {
    pub struct_size: u32,
    pub device_type: i32,
    pub device_index: i32,
    pub rank: i32,
    pub world_size: i32,
    pub reserved: u32,
    pub directory: *const c_char,
    pub progress: Option<tenon_progress_fn>,
    pub progress_user_data: *mut c_void,
    pub weights: i32,
    pub reserved1: u32,
}

impl Default for tenon_model_load_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_model_random_args {
    pub struct_size: u32,
    pub device_type: i32,
    pub device_index: i32,
    pub rank: i32,
    pub world_size: i32,
    pub dtype: i32,
    pub seed: u64,
    pub config_json: *const c_char,
}

impl Default for tenon_model_random_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_model_info {
    pub struct_size: u32,
    pub device_type: i32,
    pub device_index: i32,
    pub rank: i32,
    pub world_size: i32,
    pub dtype: i32,
    pub vocab_size: i32,
    pub hidden_size: i32,
    pub num_layers: i32,
    pub num_heads: i32,
    pub num_kv_heads: i32,
    pub head_dim: i32,
    pub max_position_embeddings: i32,
    pub num_experts: i32,
    pub num_experts_per_tok: i32,
    pub bos_token_id: i32,
    pub num_eos_token_ids: i32,
    pub eos_token_ids: [i32; 8],
    pub reserved: u32,
    pub weight_bytes: i64,
}

impl Default for tenon_model_info {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_session_options {
    pub struct_size: u32,
    pub flags: u32,
    pub max_sequences: i32,
    pub max_tokens: i32,
    pub max_context: i32,
    pub page_size: i32,
    pub num_pages: i64,
    pub max_logit_rows: i32,
    pub num_threads: i32,
    pub kv_cache_bytes: i64,
    pub moe_kernels_json: *const c_char,
    pub kv_cache_dtype: i32,
    pub kv_cache_k_scale: f32,
    pub kv_cache_v_scale: f32,
    pub max_logit_edits: i32,
    pub max_top_logprobs: i32,
    pub reserved: u32,
}

impl Default for tenon_session_options {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_session_info {
    pub struct_size: u32,
    pub flags: u32,
    pub max_sequences: i32,
    pub max_tokens: i32,
    pub max_context: i32,
    pub page_size: i32,
    pub num_pages: i64,
    pub max_logit_rows: i32,
    pub num_sequences: i32,
    pub num_free_pages: i64,
    pub num_steps: u64,
    pub num_tokens: u64,
    pub kv_cache_bytes: i64,
    pub kv_cache_dtype: i32,
    pub max_logit_edits: i32,
    pub max_top_logprobs: i32,
    pub num_cuda_graphs: i32,
    pub cuda_graph_bytes: i64,
    pub num_steps_in_flight: i32,
    pub reserved: i32,
}

impl Default for tenon_session_info {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_step_row {
    pub struct_size: u32,
    pub num_tokens: i32,
    pub sequence: tenon_sequence,
    pub tokens: *const i32,
    pub sampling: *const tenon_sampling_params,
    pub logits: *mut f32,
    pub logits_mode: i32,
    pub flags: u32,
    pub edits: *const tenon_logit_edit,
    pub bitmask: *const u32,
    pub top_tokens: *mut i32,
    pub top_logprobs: *mut f32,
    pub num_edits: i32,
    pub reserved1: u32,
}

impl Default for tenon_step_row {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_step_args {
    pub struct_size: u32,
    pub num_rows: i32,
    pub rows: *const tenon_step_row,
    pub tokens: *mut i32,
    pub logprobs: *mut f32,
    pub statuses: *mut i32,
    pub distinct_experts: *mut i32,
    pub microseconds: *mut f64,
    pub mirostat_mu: *mut f32,
}

impl Default for tenon_step_args {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tenon_step_results {
    pub struct_size: u32,
    pub num_rows: i32,
    pub tokens: *mut i32,
    pub logprobs: *mut f32,
    pub statuses: *mut i32,
    pub mirostat_mu: *mut f32,
    pub top_tokens: *mut i32,
    pub top_logprobs: *mut f32,
    pub distinct_experts: *mut i32,
    pub microseconds: *mut f64,
    pub top_columns: i32,
    pub reserved: u32,
}

impl Default for tenon_step_results {
    /// All zero, but for struct_size.
    fn default() -> Self {
        // SAFETY: zero is a value of every field.
        let zero: Self = unsafe { std::mem::zeroed() };
        Self {
            struct_size: std::mem::size_of::<Self>() as u32,
            ..zero
        }
    }
}

/// The functions of a loaded library.
pub struct Api {
    pub tenon_abi_version: unsafe extern "C" fn() -> u32,
    pub tenon_version_string: unsafe extern "C" fn() -> *const c_char,
    pub tenon_status_name: unsafe extern "C" fn(code: i32) -> *const c_char,
    pub tenon_device_count:
        unsafe extern "C" fn(device_type: i32, count: *mut i32, error: *mut tenon_error) -> i32,
    pub tenon_device_query: unsafe extern "C" fn(
        device_type: i32,
        device_index: i32,
        info: *mut tenon_device_info,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_context_create: unsafe extern "C" fn(
        options: *const tenon_context_options,
        context: *mut tenon_context,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_context_query: unsafe extern "C" fn(
        context: tenon_context,
        info: *mut tenon_context_info,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_context_set_moe_kernels: unsafe extern "C" fn(
        context: tenon_context,
        json: *const c_char,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_context_destroy:
        unsafe extern "C" fn(context: tenon_context, error: *mut tenon_error) -> i32,
    pub tenon_embedding: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_embedding_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_rms_norm: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_rms_norm_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_linear_workspace_size: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_linear_args,
        bytes: *mut u64,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_linear: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_linear_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_quantize_fp8: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_quantize_fp8_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_qk_norm: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_qk_norm_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_attention_workspace_size: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_attention_args,
        bytes: *mut u64,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_attention: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_attention_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_moe_router: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_moe_router_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_moe_max_tiles:
        unsafe extern "C" fn(num_slots: i64, num_experts: i32, tile_rows: i32) -> i64,
    pub tenon_moe_align_workspace_size: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_moe_align_args,
        bytes: *mut u64,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_moe_align: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_moe_align_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_moe_grouped_matmul_workspace_size: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_moe_grouped_matmul_args,
        bytes: *mut u64,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_moe_grouped_matmul: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_moe_grouped_matmul_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_moe_swiglu: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_moe_swiglu_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_moe_sum_reduce: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_moe_sum_reduce_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_moe_workspace_size: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_moe_args,
        bytes: *mut u64,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_moe: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_moe_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_sampling_params_init: unsafe extern "C" fn(
        params: *mut tenon_sampling_params,
        size: usize,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_sampling_params_validate:
        unsafe extern "C" fn(params: *const tenon_sampling_params, error: *mut tenon_error) -> i32,
    pub tenon_logit_edits_sort: unsafe extern "C" fn(
        edits: *mut tenon_logit_edit,
        count: i64,
        vocab_size: i64,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_sampler_workspace_size: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_sampler_args,
        bytes: *mut u64,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_sampler: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_sampler_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_speculative: unsafe extern "C" fn(
        context: tenon_context,
        args: *const tenon_speculative_args,
        stream: *mut c_void,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_model_load: unsafe extern "C" fn(
        args: *const tenon_model_load_args,
        model: *mut tenon_model,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_model_create_random: unsafe extern "C" fn(
        args: *const tenon_model_random_args,
        model: *mut tenon_model,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_model_query: unsafe extern "C" fn(
        model: tenon_model,
        info: *mut tenon_model_info,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_model_destroy:
        unsafe extern "C" fn(model: tenon_model, error: *mut tenon_error) -> i32,
    pub tenon_session_create: unsafe extern "C" fn(
        model: tenon_model,
        options: *const tenon_session_options,
        session: *mut tenon_session,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_session_query: unsafe extern "C" fn(
        session: tenon_session,
        info: *mut tenon_session_info,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_session_destroy:
        unsafe extern "C" fn(session: tenon_session, error: *mut tenon_error) -> i32,
    pub tenon_sequence_create: unsafe extern "C" fn(
        session: tenon_session,
        sequence: *mut tenon_sequence,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_sequence_fork: unsafe extern "C" fn(
        session: tenon_session,
        sequence: tenon_sequence,
        fork: *mut tenon_sequence,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_sequence_truncate: unsafe extern "C" fn(
        session: tenon_session,
        sequence: tenon_sequence,
        num_tokens: i32,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_sequence_length: unsafe extern "C" fn(
        session: tenon_session,
        sequence: tenon_sequence,
        num_tokens: *mut i32,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_sequence_release: unsafe extern "C" fn(
        session: tenon_session,
        sequence: tenon_sequence,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_session_step: unsafe extern "C" fn(
        session: tenon_session,
        args: *const tenon_step_args,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_session_enqueue_step: unsafe extern "C" fn(
        session: tenon_session,
        args: *const tenon_step_args,
        error: *mut tenon_error,
    ) -> i32,
    pub tenon_session_wait_step: unsafe extern "C" fn(
        session: tenon_session,
        results: *const tenon_step_results,
        error: *mut tenon_error,
    ) -> i32,
}

extern "C" {
    fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}
const RTLD_NOW: c_int = 2;

unsafe fn last_dl_error() -> String {
    CStr::from_ptr(dlerror()).to_string_lossy().into_owned()
}

/// The function of this name as `F`, which must be its type.
unsafe fn function<F: Copy>(library: *mut c_void, name: &'static str) -> Result<F, String> {
    assert!(name.ends_with('\0'));
    let address = dlsym(library, name.as_ptr().cast());
    if address.is_null() {
        return Err(last_dl_error());
    }
    Ok(std::mem::transmute_copy(&address))
}

impl Api {
    /// Opens the library, which stays loaded, and checks that it has this ABI's
    /// major version and at least its minor version.
    ///
    /// # Safety
    /// `file` is Tenon's library: its initializers run, and the types of its
    /// functions are not checked.
    pub unsafe fn load(file: &CStr) -> Result<Api, String> {
        let library = dlopen(file.as_ptr(), RTLD_NOW);
        if library.is_null() {
            return Err(last_dl_error());
        }
        let tenon_abi_version: unsafe extern "C" fn() -> u32 =
            function(library, "tenon_abi_version\0")?;
        let version = tenon_abi_version();
        let (major, minor) = (version >> 16, version & 0xffff);
        if major != TENON_ABI_MAJOR || minor < TENON_ABI_MINOR {
            return Err(format!(
                "{} has ABI {}.{}; this program needs {}.{}",
                file.to_string_lossy(),
                major,
                minor,
                TENON_ABI_MAJOR,
                TENON_ABI_MINOR
            ));
        }
        Ok(Api {
            tenon_abi_version,
            tenon_version_string: function(library, "tenon_version_string\0")?,
            tenon_status_name: function(library, "tenon_status_name\0")?,
            tenon_device_count: function(library, "tenon_device_count\0")?,
            tenon_device_query: function(library, "tenon_device_query\0")?,
            tenon_context_create: function(library, "tenon_context_create\0")?,
            tenon_context_query: function(library, "tenon_context_query\0")?,
            tenon_context_set_moe_kernels: function(library, "tenon_context_set_moe_kernels\0")?,
            tenon_context_destroy: function(library, "tenon_context_destroy\0")?,
            tenon_embedding: function(library, "tenon_embedding\0")?,
            tenon_rms_norm: function(library, "tenon_rms_norm\0")?,
            tenon_linear_workspace_size: function(library, "tenon_linear_workspace_size\0")?,
            tenon_linear: function(library, "tenon_linear\0")?,
            tenon_quantize_fp8: function(library, "tenon_quantize_fp8\0")?,
            tenon_qk_norm: function(library, "tenon_qk_norm\0")?,
            tenon_attention_workspace_size: function(library, "tenon_attention_workspace_size\0")?,
            tenon_attention: function(library, "tenon_attention\0")?,
            tenon_moe_router: function(library, "tenon_moe_router\0")?,
            tenon_moe_max_tiles: function(library, "tenon_moe_max_tiles\0")?,
            tenon_moe_align_workspace_size: function(library, "tenon_moe_align_workspace_size\0")?,
            tenon_moe_align: function(library, "tenon_moe_align\0")?,
            tenon_moe_grouped_matmul_workspace_size: function(
                library,
                "tenon_moe_grouped_matmul_workspace_size\0",
            )?,
            tenon_moe_grouped_matmul: function(library, "tenon_moe_grouped_matmul\0")?,
            tenon_moe_swiglu: function(library, "tenon_moe_swiglu\0")?,
            tenon_moe_sum_reduce: function(library, "tenon_moe_sum_reduce\0")?,
            tenon_moe_workspace_size: function(library, "tenon_moe_workspace_size\0")?,
            tenon_moe: function(library, "tenon_moe\0")?,
            tenon_sampling_params_init: function(library, "tenon_sampling_params_init\0")?,
            tenon_sampling_params_validate: function(library, "tenon_sampling_params_validate\0")?,
            tenon_logit_edits_sort: function(library, "tenon_logit_edits_sort\0")?,
            tenon_sampler_workspace_size: function(library, "tenon_sampler_workspace_size\0")?,
            tenon_sampler: function(library, "tenon_sampler\0")?,
            tenon_speculative: function(library, "tenon_speculative\0")?,
            tenon_model_load: function(library, "tenon_model_load\0")?,
            tenon_model_create_random: function(library, "tenon_model_create_random\0")?,
            tenon_model_query: function(library, "tenon_model_query\0")?,
            tenon_model_destroy: function(library, "tenon_model_destroy\0")?,
            tenon_session_create: function(library, "tenon_session_create\0")?,
            tenon_session_query: function(library, "tenon_session_query\0")?,
            tenon_session_destroy: function(library, "tenon_session_destroy\0")?,
            tenon_sequence_create: function(library, "tenon_sequence_create\0")?,
            tenon_sequence_fork: function(library, "tenon_sequence_fork\0")?,
            tenon_sequence_truncate: function(library, "tenon_sequence_truncate\0")?,
            tenon_sequence_length: function(library, "tenon_sequence_length\0")?,
            tenon_sequence_release: function(library, "tenon_sequence_release\0")?,
            tenon_session_step: function(library, "tenon_session_step\0")?,
            tenon_session_enqueue_step: function(library, "tenon_session_enqueue_step\0")?,
            tenon_session_wait_step: function(library, "tenon_session_wait_step\0")?,
        })
    }
}

macro_rules! expect_layout {
    ($type:ident, $size:expr, $($field:ident = $offset:expr),*) => {
        let place = std::mem::MaybeUninit::<$type>::uninit();
        let start = place.as_ptr();
        expect(concat!("size of ", stringify!($type)), std::mem::size_of::<$type>(), $size)?;
        $(
            // A field's address, without reading it.
            let field = unsafe { std::ptr::addr_of!((*start).$field) } as usize;
            let name = concat!("offset of ", stringify!($type), ".", stringify!($field));
            expect(name, field - start as usize, $offset)?;
        )*
    };
}

fn expect(what: &str, actual: usize, expected: usize) -> Result<(), String> {
    if actual == expected {
        return Ok(());
    }
    Err(format!("{} is {}, expected {}", what, actual, expected))
}

/// Compares the structs above, as this compiler laid them out, with the C
/// compiler's sizes and offsets.
#[rustfmt::skip]
pub fn check_layout() -> Result<(), String> {
    expect_layout!(DLDevice, 8,
        device_type = 0,
        device_id = 4);
    expect_layout!(DLDataType, 4,
        code = 0,
        bits = 1,
        lanes = 2);
    expect_layout!(DLTensor, 48,
        data = 0,
        device = 8,
        ndim = 16,
        dtype = 20,
        shape = 24,
        strides = 32,
        byte_offset = 40);
    expect_layout!(tenon_error, 520,
        struct_size = 0,
        code = 4,
        message = 8);
    expect_layout!(tenon_device_info, 168,
        struct_size = 0,
        device_type = 4,
        device_index = 8,
        num_cores = 12,
        compute_capability = 16,
        cpu_isa = 20,
        total_memory_bytes = 24,
        l2_bytes = 32,
        name = 40);
    expect_layout!(tenon_context_options, 24,
        struct_size = 0,
        device_type = 4,
        device_index = 8,
        num_threads = 12,
        cublas_lt = 16,
        reserved = 20);
    expect_layout!(tenon_context_info, 32,
        struct_size = 0,
        device_type = 4,
        device_index = 8,
        num_threads = 12,
        cublas_lt_version = 16,
        num_moe_kernels = 24,
        reserved = 28);
    expect_layout!(tenon_embedding_args, 32,
        struct_size = 0,
        reserved = 4,
        ids = 8,
        table = 16,
        out = 24);
    expect_layout!(tenon_rms_norm_args, 48,
        struct_size = 0,
        rounding = 4,
        x = 8,
        residual = 16,
        weight = 24,
        out = 32,
        epsilon = 40,
        reserved = 44);
    expect_layout!(tenon_linear_args, 64,
        struct_size = 0,
        flags = 4,
        x = 8,
        weight = 16,
        bias = 24,
        out = 32,
        workspace = 40,
        workspace_size = 48,
        weight_scales = 56);
    expect_layout!(tenon_quantize_fp8_args, 40,
        struct_size = 0,
        block_rows = 4,
        block_cols = 8,
        reserved = 12,
        x = 16,
        out = 24,
        scales = 32);
    expect_layout!(tenon_qk_norm_args, 152,
        struct_size = 0,
        rounding = 4,
        qkv = 8,
        q_offset = 16,
        k_offset = 24,
        v_offset = 32,
        num_q_heads = 40,
        num_kv_heads = 44,
        head_dim = 48,
        epsilon = 52,
        q = 56,
        k = 64,
        v = 72,
        q_weight = 80,
        k_weight = 88,
        cos_sin = 96,
        positions = 104,
        k_cache = 112,
        v_cache = 120,
        slot_mapping = 128,
        k_scale = 136,
        v_scale = 140,
        rotary_dim = 144,
        reserved = 148);
    expect_layout!(tenon_attention_args, 104,
        struct_size = 0,
        flags = 4,
        q = 8,
        k_cache = 16,
        v_cache = 24,
        block_table = 32,
        query_start = 40,
        kv_len = 48,
        out = 56,
        scale = 64,
        k_scale = 68,
        v_scale = 72,
        max_kv_len = 76,
        max_query_len = 80,
        reserved = 84,
        workspace = 88,
        workspace_size = 96);
    expect_layout!(tenon_moe_router_args, 72,
        struct_size = 0,
        top_k = 4,
        logits = 8,
        correction_bias = 16,
        topk_weights = 24,
        topk_ids = 32,
        scoring = 40,
        renormalize = 44,
        routed_scaling_factor = 48,
        num_expert_groups = 52,
        num_selected_groups = 56,
        group_score = 60,
        num_fused_shared_experts = 64,
        reserved = 68);
    expect_layout!(tenon_moe_align_args, 64,
        struct_size = 0,
        num_experts = 4,
        topk_ids = 8,
        expert_offsets = 16,
        sorted_slots = 24,
        tiles = 32,
        tile_rows = 40,
        reserved = 44,
        workspace = 48,
        workspace_size = 56);
    expect_layout!(tenon_moe_grouped_matmul_args, 96,
        struct_size = 0,
        flags = 4,
        x = 8,
        weights = 16,
        expert_offsets = 24,
        sorted_slots = 32,
        bias = 40,
        routing_weights = 48,
        out = 56,
        slots_per_row = 64,
        reserved = 68,
        workspace = 72,
        workspace_size = 80,
        weight_scales = 88);
    expect_layout!(tenon_moe_swiglu_args, 32,
        struct_size = 0,
        layout = 4,
        x = 8,
        out = 16,
        limit = 24,
        alpha = 28);
    expect_layout!(tenon_moe_sum_reduce_args, 24,
        struct_size = 0,
        reserved = 4,
        x = 8,
        out = 16);
    expect_layout!(tenon_moe_args, 112,
        struct_size = 0,
        flags = 4,
        x = 8,
        topk_weights = 16,
        topk_ids = 24,
        gate = 32,
        up = 40,
        down = 48,
        out = 56,
        workspace = 64,
        workspace_size = 72,
        gate_scales = 80,
        up_scales = 88,
        down_scales = 96,
        router = 104);
    expect_layout!(tenon_sampling_params, 128,
        temperature = 0,
        top_k = 4,
        top_p = 8,
        min_p = 12,
        filter_order = 16,
        reserved0 = 20,
        seed = 24,
        position = 32,
        typical_p = 40,
        top_n_sigma = 44,
        xtc_probability = 48,
        xtc_threshold = 52,
        mirostat_tau = 56,
        mirostat_eta = 60,
        repetition_penalty = 64,
        frequency_penalty = 68,
        presence_penalty = 72,
        dry_multiplier = 76,
        dry_base = 80,
        dry_allowed_length = 84,
        dry_range = 88,
        flags = 92,
        num_top_logprobs = 96,
        mirostat_mu = 100,
        reserved = 104);
    expect_layout!(tenon_logit_edit, 16,
        id = 0,
        state = 4,
        bias = 8,
        offset = 12);
    expect_layout!(tenon_sampler_args, 160,
        struct_size = 0,
        flags = 4,
        logits = 8,
        params = 16,
        tokens = 24,
        logprobs = 32,
        statuses = 40,
        workspace = 48,
        workspace_size = 56,
        vocab_size = 64,
        edits = 72,
        edit_offsets = 80,
        bitmask = 88,
        mirostat_mu = 96,
        random_bits = 104,
        raw_logprobs = 112,
        processed_logprobs = 120,
        top_tokens = 128,
        top_logprobs = 136,
        probabilities = 144,
        top_logprobs_kind = 152,
        random_stream = 156);
    expect_layout!(tenon_speculative_args, 80,
        struct_size = 0,
        reserved = 4,
        draft_tokens = 8,
        num_drafts = 16,
        target_tokens = 24,
        target_probabilities = 32,
        params = 40,
        draft_probabilities = 48,
        tokens = 56,
        num_accepted = 64,
        statuses = 72);
    expect_layout!(tenon_model_load_args, 56,
        struct_size = 0,
        device_type = 4,
        device_index = 8,
        rank = 12,
        world_size = 16,
        reserved = 20,
        directory = 24,
        progress = 32,
        progress_user_data = 40,
        weights = 48,
        reserved1 = 52);
    expect_layout!(tenon_model_random_args, 40,
        struct_size = 0,
        device_type = 4,
        device_index = 8,
        rank = 12,
        world_size = 16,
        dtype = 20,
        seed = 24,
        config_json = 32);
    expect_layout!(tenon_model_info, 112,
        struct_size = 0,
        device_type = 4,
        device_index = 8,
        rank = 12,
        world_size = 16,
        dtype = 20,
        vocab_size = 24,
        hidden_size = 28,
        num_layers = 32,
        num_heads = 36,
        num_kv_heads = 40,
        head_dim = 44,
        max_position_embeddings = 48,
        num_experts = 52,
        num_experts_per_tok = 56,
        bos_token_id = 60,
        num_eos_token_ids = 64,
        eos_token_ids = 68,
        reserved = 100,
        weight_bytes = 104);
    expect_layout!(tenon_session_options, 80,
        struct_size = 0,
        flags = 4,
        max_sequences = 8,
        max_tokens = 12,
        max_context = 16,
        page_size = 20,
        num_pages = 24,
        max_logit_rows = 32,
        num_threads = 36,
        kv_cache_bytes = 40,
        moe_kernels_json = 48,
        kv_cache_dtype = 56,
        kv_cache_k_scale = 60,
        kv_cache_v_scale = 64,
        max_logit_edits = 68,
        max_top_logprobs = 72,
        reserved = 76);
    expect_layout!(tenon_session_info, 104,
        struct_size = 0,
        flags = 4,
        max_sequences = 8,
        max_tokens = 12,
        max_context = 16,
        page_size = 20,
        num_pages = 24,
        max_logit_rows = 32,
        num_sequences = 36,
        num_free_pages = 40,
        num_steps = 48,
        num_tokens = 56,
        kv_cache_bytes = 64,
        kv_cache_dtype = 72,
        max_logit_edits = 76,
        max_top_logprobs = 80,
        num_cuda_graphs = 84,
        cuda_graph_bytes = 88,
        num_steps_in_flight = 96,
        reserved = 100);
    expect_layout!(tenon_step_row, 88,
        struct_size = 0,
        num_tokens = 4,
        sequence = 8,
        tokens = 16,
        sampling = 24,
        logits = 32,
        logits_mode = 40,
        flags = 44,
        edits = 48,
        bitmask = 56,
        top_tokens = 64,
        top_logprobs = 72,
        num_edits = 80,
        reserved1 = 84);
    expect_layout!(tenon_step_args, 64,
        struct_size = 0,
        num_rows = 4,
        rows = 8,
        tokens = 16,
        logprobs = 24,
        statuses = 32,
        distinct_experts = 40,
        microseconds = 48,
        mirostat_mu = 56);
    expect_layout!(tenon_step_results, 80,
        struct_size = 0,
        num_rows = 4,
        tokens = 8,
        logprobs = 16,
        statuses = 24,
        mirostat_mu = 32,
        top_tokens = 40,
        top_logprobs = 48,
        distinct_experts = 56,
        microseconds = 64,
        top_columns = 72,
        reserved = 76);
    Ok(())
}
