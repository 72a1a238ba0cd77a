//! The ops: a struct of arguments and methods of [`Context`] for each. The
//! comments at the structs of abi/tenon.h say what they compute and expect.
//!
//! Written by tools/bindings/rust.py from abi/layout.json: do not edit.

use crate::{sys, Context, Result, Tensor, TensorMut, Workspace};

/// Arguments of [`Context::embedding`].
#[derive(Clone, Copy, Default)]
pub struct Embedding<'a> {
    pub ids: Option<&'a Tensor<'a>>,
    pub table: Option<&'a Tensor<'a>>,
    pub out: Option<&'a TensorMut<'a>>,
}

impl Embedding<'_> {
    fn raw(&self) -> sys::tenon_embedding_args {
        sys::tenon_embedding_args {
            ids: Tensor::pointer(self.ids),
            table: Tensor::pointer(self.table),
            out: TensorMut::pointer(self.out),
            ..Default::default()
        }
    }
}

impl Context {
    pub fn embedding(&self, args: &Embedding) -> Result<()> {
        self.launch(self.library.api.tenon_embedding, &args.raw())
    }
}

/// Arguments of [`Context::rms_norm`].
#[derive(Clone, Copy, Default)]
pub struct RmsNorm<'a> {
    pub rounding: i32,
    pub x: Option<&'a Tensor<'a>>,
    pub residual: Option<&'a TensorMut<'a>>,
    pub weight: Option<&'a Tensor<'a>>,
    pub out: Option<&'a TensorMut<'a>>,
    pub epsilon: f32,
}

impl RmsNorm<'_> {
    fn raw(&self) -> sys::tenon_rms_norm_args {
        sys::tenon_rms_norm_args {
            rounding: self.rounding,
            x: Tensor::pointer(self.x),
            residual: TensorMut::pointer(self.residual),
            weight: Tensor::pointer(self.weight),
            out: TensorMut::pointer(self.out),
            epsilon: self.epsilon,
            ..Default::default()
        }
    }
}

impl Context {
    pub fn rms_norm(&self, args: &RmsNorm) -> Result<()> {
        self.launch(self.library.api.tenon_rms_norm, &args.raw())
    }
}

/// Arguments of [`Context::linear`].
#[derive(Clone, Copy, Default)]
pub struct Linear<'a> {
    pub flags: u32,
    pub x: Option<&'a Tensor<'a>>,
    pub weight: Option<&'a Tensor<'a>>,
    pub bias: Option<&'a Tensor<'a>>,
    pub out: Option<&'a TensorMut<'a>>,
    pub weight_scales: Option<&'a Tensor<'a>>,
}

impl Linear<'_> {
    fn raw(&self) -> sys::tenon_linear_args {
        sys::tenon_linear_args {
            flags: self.flags,
            x: Tensor::pointer(self.x),
            weight: Tensor::pointer(self.weight),
            bias: Tensor::pointer(self.bias),
            out: TensorMut::pointer(self.out),
            weight_scales: Tensor::pointer(self.weight_scales),
            ..Default::default()
        }
    }
}

impl Context {
    /// The bytes of workspace that [`Context::linear`] needs.
    pub fn linear_workspace_size(&self, args: &Linear) -> Result<u64> {
        self.workspace_size(self.library.api.tenon_linear_workspace_size, &args.raw())
    }

    pub fn linear(&self, args: &Linear, workspace: &mut Workspace) -> Result<()> {
        let mut raw = args.raw();
        raw.workspace = workspace.data();
        raw.workspace_size = workspace.size();
        self.launch(self.library.api.tenon_linear, &raw)
    }
}

/// Arguments of [`Context::quantize_fp8`].
#[derive(Clone, Copy, Default)]
pub struct QuantizeFp8<'a> {
    pub block_rows: i32,
    pub block_cols: i32,
    pub x: Option<&'a Tensor<'a>>,
    pub out: Option<&'a TensorMut<'a>>,
    pub scales: Option<&'a TensorMut<'a>>,
}

impl QuantizeFp8<'_> {
    fn raw(&self) -> sys::tenon_quantize_fp8_args {
        sys::tenon_quantize_fp8_args {
            block_rows: self.block_rows,
            block_cols: self.block_cols,
            x: Tensor::pointer(self.x),
            out: TensorMut::pointer(self.out),
            scales: TensorMut::pointer(self.scales),
            ..Default::default()
        }
    }
}

impl Context {
    pub fn quantize_fp8(&self, args: &QuantizeFp8) -> Result<()> {
        self.launch(self.library.api.tenon_quantize_fp8, &args.raw())
    }
}

/// Arguments of [`Context::qk_norm`].
#[derive(Clone, Copy, Default)]
pub struct QkNorm<'a> {
    pub rounding: i32,
    pub qkv: Option<&'a TensorMut<'a>>,
    pub q_offset: i64,
    pub k_offset: i64,
    pub v_offset: i64,
    pub num_q_heads: i32,
    pub num_kv_heads: i32,
    pub head_dim: i32,
    pub epsilon: f32,
    pub q: Option<&'a TensorMut<'a>>,
    pub k: Option<&'a TensorMut<'a>>,
    pub v: Option<&'a Tensor<'a>>,
    pub q_weight: Option<&'a Tensor<'a>>,
    pub k_weight: Option<&'a Tensor<'a>>,
    pub cos_sin: Option<&'a Tensor<'a>>,
    pub positions: Option<&'a Tensor<'a>>,
    pub k_cache: Option<&'a TensorMut<'a>>,
    pub v_cache: Option<&'a TensorMut<'a>>,
    pub slot_mapping: Option<&'a Tensor<'a>>,
    pub k_scale: f32,
    pub v_scale: f32,
    pub rotary_dim: i32,
}

impl QkNorm<'_> {
    fn raw(&self) -> sys::tenon_qk_norm_args {
        sys::tenon_qk_norm_args {
            rounding: self.rounding,
            qkv: TensorMut::pointer(self.qkv),
            q_offset: self.q_offset,
            k_offset: self.k_offset,
            v_offset: self.v_offset,
            num_q_heads: self.num_q_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            epsilon: self.epsilon,
            q: TensorMut::pointer(self.q),
            k: TensorMut::pointer(self.k),
            v: Tensor::pointer(self.v),
            q_weight: Tensor::pointer(self.q_weight),
            k_weight: Tensor::pointer(self.k_weight),
            cos_sin: Tensor::pointer(self.cos_sin),
            positions: Tensor::pointer(self.positions),
            k_cache: TensorMut::pointer(self.k_cache),
            v_cache: TensorMut::pointer(self.v_cache),
            slot_mapping: Tensor::pointer(self.slot_mapping),
            k_scale: self.k_scale,
            v_scale: self.v_scale,
            rotary_dim: self.rotary_dim,
            ..Default::default()
        }
    }
}

impl Context {
    pub fn qk_norm(&self, args: &QkNorm) -> Result<()> {
        self.launch(self.library.api.tenon_qk_norm, &args.raw())
    }
}

/// Arguments of [`Context::attention`].
#[derive(Clone, Copy, Default)]
pub struct Attention<'a> {
    pub flags: u32,
    pub q: Option<&'a Tensor<'a>>,
    pub k_cache: Option<&'a Tensor<'a>>,
    pub v_cache: Option<&'a Tensor<'a>>,
    pub block_table: Option<&'a Tensor<'a>>,
    pub query_start: Option<&'a Tensor<'a>>,
    pub kv_len: Option<&'a Tensor<'a>>,
    pub out: Option<&'a TensorMut<'a>>,
    pub scale: f32,
    pub k_scale: f32,
    pub v_scale: f32,
    pub max_kv_len: i32,
    pub max_query_len: i32,
}

impl Attention<'_> {
    fn raw(&self) -> sys::tenon_attention_args {
        sys::tenon_attention_args {
            flags: self.flags,
            q: Tensor::pointer(self.q),
            k_cache: Tensor::pointer(self.k_cache),
            v_cache: Tensor::pointer(self.v_cache),
            block_table: Tensor::pointer(self.block_table),
            query_start: Tensor::pointer(self.query_start),
            kv_len: Tensor::pointer(self.kv_len),
            out: TensorMut::pointer(self.out),
            scale: self.scale,
            k_scale: self.k_scale,
            v_scale: self.v_scale,
            max_kv_len: self.max_kv_len,
            max_query_len: self.max_query_len,
            ..Default::default()
        }
    }
}

impl Context {
    /// The bytes of workspace that [`Context::attention`] needs.
    pub fn attention_workspace_size(&self, args: &Attention) -> Result<u64> {
        self.workspace_size(self.library.api.tenon_attention_workspace_size, &args.raw())
    }

    pub fn attention(&self, args: &Attention, workspace: &mut Workspace) -> Result<()> {
        let mut raw = args.raw();
        raw.workspace = workspace.data();
        raw.workspace_size = workspace.size();
        self.launch(self.library.api.tenon_attention, &raw)
    }
}

/// Arguments of [`Context::moe_router`].
#[derive(Clone, Copy, Default)]
pub struct MoeRouter<'a> {
    pub top_k: i32,
    pub logits: Option<&'a Tensor<'a>>,
    pub correction_bias: Option<&'a Tensor<'a>>,
    pub topk_weights: Option<&'a TensorMut<'a>>,
    pub topk_ids: Option<&'a TensorMut<'a>>,
    pub scoring: i32,
    pub renormalize: i32,
    pub routed_scaling_factor: f32,
    pub num_expert_groups: i32,
    pub num_selected_groups: i32,
    pub group_score: i32,
    pub num_fused_shared_experts: i32,
}

impl MoeRouter<'_> {
    fn raw(&self) -> sys::tenon_moe_router_args {
        sys::tenon_moe_router_args {
            top_k: self.top_k,
            logits: Tensor::pointer(self.logits),
            correction_bias: Tensor::pointer(self.correction_bias),
            topk_weights: TensorMut::pointer(self.topk_weights),
            topk_ids: TensorMut::pointer(self.topk_ids),
            scoring: self.scoring,
            renormalize: self.renormalize,
            routed_scaling_factor: self.routed_scaling_factor,
            num_expert_groups: self.num_expert_groups,
            num_selected_groups: self.num_selected_groups,
            group_score: self.group_score,
            num_fused_shared_experts: self.num_fused_shared_experts,
            ..Default::default()
        }
    }
}

impl Context {
    pub fn moe_router(&self, args: &MoeRouter) -> Result<()> {
        self.launch(self.library.api.tenon_moe_router, &args.raw())
    }
}

/// Arguments of [`Context::moe_align`].
#[derive(Clone, Copy, Default)]
pub struct MoeAlign<'a> {
    pub num_experts: i32,
    pub topk_ids: Option<&'a Tensor<'a>>,
    pub expert_offsets: Option<&'a TensorMut<'a>>,
    pub sorted_slots: Option<&'a TensorMut<'a>>,
    pub tiles: Option<&'a TensorMut<'a>>,
    pub tile_rows: i32,
}

impl MoeAlign<'_> {
    fn raw(&self) -> sys::tenon_moe_align_args {
        sys::tenon_moe_align_args {
            num_experts: self.num_experts,
            topk_ids: Tensor::pointer(self.topk_ids),
            expert_offsets: TensorMut::pointer(self.expert_offsets),
            sorted_slots: TensorMut::pointer(self.sorted_slots),
            tiles: TensorMut::pointer(self.tiles),
            tile_rows: self.tile_rows,
            ..Default::default()
        }
    }
}

impl Context {
    /// The bytes of workspace that [`Context::moe_align`] needs.
    pub fn moe_align_workspace_size(&self, args: &MoeAlign) -> Result<u64> {
        self.workspace_size(self.library.api.tenon_moe_align_workspace_size, &args.raw())
    }

    pub fn moe_align(&self, args: &MoeAlign, workspace: &mut Workspace) -> Result<()> {
        let mut raw = args.raw();
        raw.workspace = workspace.data();
        raw.workspace_size = workspace.size();
        self.launch(self.library.api.tenon_moe_align, &raw)
    }
}

/// Arguments of [`Context::moe_grouped_matmul`].
#[derive(Clone, Copy, Default)]
pub struct MoeGroupedMatmul<'a> {
    pub flags: u32,
    pub x: Option<&'a Tensor<'a>>,
    pub weights: Option<&'a Tensor<'a>>,
    pub expert_offsets: Option<&'a Tensor<'a>>,
    pub sorted_slots: Option<&'a Tensor<'a>>,
    pub bias: Option<&'a Tensor<'a>>,
    pub routing_weights: Option<&'a Tensor<'a>>,
    pub out: Option<&'a TensorMut<'a>>,
    pub slots_per_row: i32,
    pub weight_scales: Option<&'a Tensor<'a>>,
}

impl MoeGroupedMatmul<'_> {
    fn raw(&self) -> sys::tenon_moe_grouped_matmul_args {
        sys::tenon_moe_grouped_matmul_args {
            flags: self.flags,
            x: Tensor::pointer(self.x),
            weights: Tensor::pointer(self.weights),
            expert_offsets: Tensor::pointer(self.expert_offsets),
            sorted_slots: Tensor::pointer(self.sorted_slots),
            bias: Tensor::pointer(self.bias),
            routing_weights: Tensor::pointer(self.routing_weights),
            out: TensorMut::pointer(self.out),
            slots_per_row: self.slots_per_row,
            weight_scales: Tensor::pointer(self.weight_scales),
            ..Default::default()
        }
    }
}

impl Context {
    /// The bytes of workspace that [`Context::moe_grouped_matmul`] needs.
    pub fn moe_grouped_matmul_workspace_size(&self, args: &MoeGroupedMatmul) -> Result<u64> {
        self.workspace_size(
            self.library.api.tenon_moe_grouped_matmul_workspace_size,
            &args.raw(),
        )
    }

    pub fn moe_grouped_matmul(
        &self,
        args: &MoeGroupedMatmul,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let mut raw = args.raw();
        raw.workspace = workspace.data();
        raw.workspace_size = workspace.size();
        self.launch(self.library.api.tenon_moe_grouped_matmul, &raw)
    }
}

/// Arguments of [`Context::moe_swiglu`].
#[derive(Clone, Copy, Default)]
pub struct MoeSwiglu<'a> {
    pub layout: i32,
    pub x: Option<&'a Tensor<'a>>,
    pub out: Option<&'a TensorMut<'a>>,
    pub limit: f32,
    pub alpha: f32,
}

impl MoeSwiglu<'_> {
    fn raw(&self) -> sys::tenon_moe_swiglu_args {
        sys::tenon_moe_swiglu_args {
            layout: self.layout,
            x: Tensor::pointer(self.x),
            out: TensorMut::pointer(self.out),
            limit: self.limit,
            alpha: self.alpha,
            ..Default::default()
        }
    }
}

impl Context {
    pub fn moe_swiglu(&self, args: &MoeSwiglu) -> Result<()> {
        self.launch(self.library.api.tenon_moe_swiglu, &args.raw())
    }
}

/// Arguments of [`Context::moe_sum_reduce`].
#[derive(Clone, Copy, Default)]
pub struct MoeSumReduce<'a> {
    pub x: Option<&'a Tensor<'a>>,
    pub out: Option<&'a TensorMut<'a>>,
}

impl MoeSumReduce<'_> {
    fn raw(&self) -> sys::tenon_moe_sum_reduce_args {
        sys::tenon_moe_sum_reduce_args {
            x: Tensor::pointer(self.x),
            out: TensorMut::pointer(self.out),
            ..Default::default()
        }
    }
}

impl Context {
    pub fn moe_sum_reduce(&self, args: &MoeSumReduce) -> Result<()> {
        self.launch(self.library.api.tenon_moe_sum_reduce, &args.raw())
    }
}

/// Arguments of [`Context::moe`].
#[derive(Clone, Copy, Default)]
pub struct Moe<'a> {
    pub flags: u32,
    pub x: Option<&'a Tensor<'a>>,
    /// That of `router`, if none is given.
    pub topk_weights: Option<&'a Tensor<'a>>,
    /// That of `router`, if none is given.
    pub topk_ids: Option<&'a Tensor<'a>>,
    pub gate: Option<&'a Tensor<'a>>,
    pub up: Option<&'a Tensor<'a>>,
    pub down: Option<&'a Tensor<'a>>,
    pub out: Option<&'a TensorMut<'a>>,
    pub gate_scales: Option<&'a Tensor<'a>>,
    pub up_scales: Option<&'a Tensor<'a>>,
    pub down_scales: Option<&'a Tensor<'a>>,
    pub router: Option<&'a MoeRouter<'a>>,
}

impl Moe<'_> {
    fn raw(&self, router: Option<&sys::tenon_moe_router_args>) -> sys::tenon_moe_args {
        sys::tenon_moe_args {
            flags: self.flags,
            x: Tensor::pointer(self.x),
            topk_weights: match router {
                Some(part) if self.topk_weights.is_none() => part.topk_weights,
                _ => Tensor::pointer(self.topk_weights),
            },
            topk_ids: match router {
                Some(part) if self.topk_ids.is_none() => part.topk_ids,
                _ => Tensor::pointer(self.topk_ids),
            },
            gate: Tensor::pointer(self.gate),
            up: Tensor::pointer(self.up),
            down: Tensor::pointer(self.down),
            out: TensorMut::pointer(self.out),
            gate_scales: Tensor::pointer(self.gate_scales),
            up_scales: Tensor::pointer(self.up_scales),
            down_scales: Tensor::pointer(self.down_scales),
            router: router.map_or(std::ptr::null(), |part| part),
            ..Default::default()
        }
    }
}

impl Context {
    /// The bytes of workspace that [`Context::moe`] needs.
    pub fn moe_workspace_size(&self, args: &Moe) -> Result<u64> {
        let router = args.router.map(MoeRouter::raw);
        self.workspace_size(
            self.library.api.tenon_moe_workspace_size,
            &args.raw(router.as_ref()),
        )
    }

    pub fn moe(&self, args: &Moe, workspace: &mut Workspace) -> Result<()> {
        let router = args.router.map(MoeRouter::raw);
        let mut raw = args.raw(router.as_ref());
        raw.workspace = workspace.data();
        raw.workspace_size = workspace.size();
        self.launch(self.library.api.tenon_moe, &raw)
    }
}

/// Arguments of [`Context::sampler`].
#[derive(Clone, Copy, Default)]
pub struct Sampler<'a> {
    pub flags: u32,
    pub logits: Option<&'a Tensor<'a>>,
    pub params: Option<&'a Tensor<'a>>,
    pub tokens: Option<&'a TensorMut<'a>>,
    pub logprobs: Option<&'a TensorMut<'a>>,
    pub statuses: Option<&'a TensorMut<'a>>,
    pub vocab_size: i64,
    pub edits: Option<&'a Tensor<'a>>,
    pub edit_offsets: Option<&'a Tensor<'a>>,
    pub bitmask: Option<&'a Tensor<'a>>,
    pub mirostat_mu: Option<&'a TensorMut<'a>>,
    pub random_bits: Option<&'a Tensor<'a>>,
    pub raw_logprobs: Option<&'a TensorMut<'a>>,
    pub processed_logprobs: Option<&'a TensorMut<'a>>,
    pub top_tokens: Option<&'a TensorMut<'a>>,
    pub top_logprobs: Option<&'a TensorMut<'a>>,
    pub probabilities: Option<&'a TensorMut<'a>>,
    pub top_logprobs_kind: i32,
    pub random_stream: i32,
}

impl Sampler<'_> {
    fn raw(&self) -> sys::tenon_sampler_args {
        sys::tenon_sampler_args {
            flags: self.flags,
            logits: Tensor::pointer(self.logits),
            params: Tensor::pointer(self.params),
            tokens: TensorMut::pointer(self.tokens),
            logprobs: TensorMut::pointer(self.logprobs),
            statuses: TensorMut::pointer(self.statuses),
            vocab_size: self.vocab_size,
            edits: Tensor::pointer(self.edits),
            edit_offsets: Tensor::pointer(self.edit_offsets),
            bitmask: Tensor::pointer(self.bitmask),
            mirostat_mu: TensorMut::pointer(self.mirostat_mu),
            random_bits: Tensor::pointer(self.random_bits),
            raw_logprobs: TensorMut::pointer(self.raw_logprobs),
            processed_logprobs: TensorMut::pointer(self.processed_logprobs),
            top_tokens: TensorMut::pointer(self.top_tokens),
            top_logprobs: TensorMut::pointer(self.top_logprobs),
            probabilities: TensorMut::pointer(self.probabilities),
            top_logprobs_kind: self.top_logprobs_kind,
            random_stream: self.random_stream,
            ..Default::default()
        }
    }
}

impl Context {
    /// The bytes of workspace that [`Context::sampler`] needs.
    pub fn sampler_workspace_size(&self, args: &Sampler) -> Result<u64> {
        self.workspace_size(self.library.api.tenon_sampler_workspace_size, &args.raw())
    }

    pub fn sampler(&self, args: &Sampler, workspace: &mut Workspace) -> Result<()> {
        let mut raw = args.raw();
        raw.workspace = workspace.data();
        raw.workspace_size = workspace.size();
        self.launch(self.library.api.tenon_sampler, &raw)
    }
}

/// Arguments of [`Context::speculative`].
#[derive(Clone, Copy, Default)]
pub struct Speculative<'a> {
    pub draft_tokens: Option<&'a Tensor<'a>>,
    pub num_drafts: Option<&'a Tensor<'a>>,
    pub target_tokens: Option<&'a Tensor<'a>>,
    pub target_probabilities: Option<&'a Tensor<'a>>,
    pub params: Option<&'a Tensor<'a>>,
    pub draft_probabilities: Option<&'a Tensor<'a>>,
    pub tokens: Option<&'a TensorMut<'a>>,
    pub num_accepted: Option<&'a TensorMut<'a>>,
    pub statuses: Option<&'a TensorMut<'a>>,
}

impl Speculative<'_> {
    fn raw(&self) -> sys::tenon_speculative_args {
        sys::tenon_speculative_args {
            draft_tokens: Tensor::pointer(self.draft_tokens),
            num_drafts: Tensor::pointer(self.num_drafts),
            target_tokens: Tensor::pointer(self.target_tokens),
            target_probabilities: Tensor::pointer(self.target_probabilities),
            params: Tensor::pointer(self.params),
            draft_probabilities: Tensor::pointer(self.draft_probabilities),
            tokens: TensorMut::pointer(self.tokens),
            num_accepted: TensorMut::pointer(self.num_accepted),
            statuses: TensorMut::pointer(self.statuses),
            ..Default::default()
        }
    }
}

impl Context {
    pub fn speculative(&self, args: &Speculative) -> Result<()> {
        self.launch(self.library.api.tenon_speculative, &args.raw())
    }
}
