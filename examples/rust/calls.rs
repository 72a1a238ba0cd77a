//! Calls an op with the fields of a case.

use crate::vectors::{Case, TensorData};
use std::cell::Cell;
use std::str::FromStr;
use tenon::ops::*;
use tenon::{sys, Context, Tensor, TensorMut, Workspace};

/// What the op returned; the outer error is of a case that cannot be run.
pub type Outcome = Result<tenon::Result<()>, String>;

/// Calls `tenon_OP` with all fields of a case.
pub fn run(context: &Context, fields: &Fields) -> Outcome {
    let call = match fields.case.op.as_str() {
        "embedding" => embedding,
        "rms_norm" => rms_norm,
        "linear" => linear,
        "quantize_fp8" => quantize_fp8,
        "qk_norm" => qk_norm,
        "attention" => attention,
        "sampler" => sampler,
        "moe_router" => moe_router,
        "moe_align" => moe_align,
        "moe_grouped_matmul" => moe_grouped_matmul,
        "moe_swiglu" => moe_swiglu,
        "moe_sum_reduce" => moe_sum_reduce,
        "moe" => moe,
        op => return Err(format!("unknown op {}", op)),
    };
    let outcome = call(context, fields)?;
    fields.check_all_used()?;
    Ok(outcome)
}

/// A case's fields by name. Those that are not given are 0 or None.
pub struct Fields<'a> {
    case: &'a Case,
    tensors: Vec<TensorMut<'a>>,
    num_used: Cell<usize>,
}

impl<'a> Fields<'a> {
    pub fn new(case: &'a mut Case) -> Fields<'a> {
        let tensors = case.tensors.iter_mut().map(tensor).collect();
        Fields {
            case,
            tensors,
            num_used: Cell::new(0),
        }
    }

    pub fn number<T: FromStr + Default>(&self, field: &str) -> Result<T, String> {
        let value = match self.case.args.get(field) {
            None => return Ok(T::default()),
            Some(value) => value,
        };
        self.num_used.set(self.num_used.get() + 1);
        value
            .parse()
            .map_err(|_| format!("{} is {:?}", field, value))
    }

    fn write(&self, field: &str) -> Option<&TensorMut<'a>> {
        let index = self.case.tensors.iter().position(|t| t.field == field)?;
        self.num_used.set(self.num_used.get() + 1);
        Some(&self.tensors[index])
    }

    fn read(&self, field: &str) -> Option<&Tensor<'a>> {
        self.write(field).map(|tensor| &**tensor)
    }

    /// A field that this program does not know must not go unnoticed.
    fn check_all_used(&self) -> Result<(), String> {
        if self.num_used.get() == self.case.args.len() + self.tensors.len() {
            return Ok(());
        }
        Err("has a field that this program does not know".to_string())
    }
}

/// The tensor exactly as the case describes it: checks are left to the library.
fn tensor<'a>(data: &mut TensorData) -> TensorMut<'a> {
    let strides = data.strides.as_mut();
    let raw = sys::DLTensor {
        data: data.memory.pointer().cast(),
        device: sys::DLDevice {
            device_type: sys::TENON_DL_CPU,
            device_id: 0,
        },
        ndim: data.shape.len() as i32,
        dtype: data.dtype,
        shape: data.shape.as_mut_ptr(),
        strides: strides.map_or(std::ptr::null_mut(), |s| s.as_mut_ptr()),
        byte_offset: data.byte_offset,
    };
    // SAFETY: Fields borrows the case, whose memory nothing else uses.
    unsafe { TensorMut::from_raw(raw) }
}

fn embedding(context: &Context, fields: &Fields) -> Outcome {
    Ok(context.embedding(&Embedding {
        ids: fields.read("ids"),
        table: fields.read("table"),
        out: fields.write("out"),
    }))
}

fn rms_norm(context: &Context, fields: &Fields) -> Outcome {
    Ok(context.rms_norm(&RmsNorm {
        rounding: fields.number("rounding")?,
        x: fields.read("x"),
        residual: fields.write("residual"),
        weight: fields.read("weight"),
        out: fields.write("out"),
        epsilon: fields.number("epsilon")?,
    }))
}

fn linear(context: &Context, fields: &Fields) -> Outcome {
    let args = Linear {
        flags: fields.number("flags")?,
        x: fields.read("x"),
        weight: fields.read("weight"),
        bias: fields.read("bias"),
        out: fields.write("out"),
        weight_scales: fields.read("weight_scales"),
    };
    Ok(context
        .linear_workspace_size(&args)
        .and_then(|size| context.linear(&args, &mut Workspace::new(size))))
}

fn quantize_fp8(context: &Context, fields: &Fields) -> Outcome {
    Ok(context.quantize_fp8(&QuantizeFp8 {
        block_rows: fields.number("block_rows")?,
        block_cols: fields.number("block_cols")?,
        x: fields.read("x"),
        out: fields.write("out"),
        scales: fields.write("scales"),
    }))
}

fn qk_norm(context: &Context, fields: &Fields) -> Outcome {
    Ok(context.qk_norm(&QkNorm {
        rounding: fields.number("rounding")?,
        qkv: fields.write("qkv"),
        q_offset: fields.number("q_offset")?,
        k_offset: fields.number("k_offset")?,
        v_offset: fields.number("v_offset")?,
        num_q_heads: fields.number("num_q_heads")?,
        num_kv_heads: fields.number("num_kv_heads")?,
        head_dim: fields.number("head_dim")?,
        epsilon: fields.number("epsilon")?,
        q: fields.write("q"),
        k: fields.write("k"),
        v: fields.read("v"),
        q_weight: fields.read("q_weight"),
        k_weight: fields.read("k_weight"),
        cos_sin: fields.read("cos_sin"),
        positions: fields.read("positions"),
        k_cache: fields.write("k_cache"),
        v_cache: fields.write("v_cache"),
        slot_mapping: fields.read("slot_mapping"),
        k_scale: fields.number("k_scale")?,
        v_scale: fields.number("v_scale")?,
        rotary_dim: fields.number("rotary_dim")?,
    }))
}

fn attention(context: &Context, fields: &Fields) -> Outcome {
    let args = Attention {
        flags: fields.number("flags")?,
        q: fields.read("q"),
        k_cache: fields.read("k_cache"),
        v_cache: fields.read("v_cache"),
        block_table: fields.read("block_table"),
        query_start: fields.read("query_start"),
        kv_len: fields.read("kv_len"),
        out: fields.write("out"),
        scale: fields.number("scale")?,
        k_scale: fields.number("k_scale")?,
        v_scale: fields.number("v_scale")?,
        max_kv_len: fields.number("max_kv_len")?,
        max_query_len: fields.number("max_query_len")?,
    };
    Ok(context
        .attention_workspace_size(&args)
        .and_then(|size| context.attention(&args, &mut Workspace::new(size))))
}

fn sampler(context: &Context, fields: &Fields) -> Outcome {
    let args = Sampler {
        logits: fields.read("logits"),
        params: fields.read("params"),
        tokens: fields.write("tokens"),
        logprobs: fields.write("logprobs"),
        statuses: fields.write("statuses"),
        ..Default::default()
    };
    Ok(context
        .sampler_workspace_size(&args)
        .and_then(|size| context.sampler(&args, &mut Workspace::new(size))))
}

fn moe_router(context: &Context, fields: &Fields) -> Outcome {
    Ok(context.moe_router(&MoeRouter {
        top_k: fields.number("top_k")?,
        logits: fields.read("logits"),
        correction_bias: fields.read("correction_bias"),
        topk_weights: fields.write("topk_weights"),
        topk_ids: fields.write("topk_ids"),
        scoring: fields.number("scoring")?,
        renormalize: fields.number("renormalize")?,
        routed_scaling_factor: fields.number("routed_scaling_factor")?,
        num_expert_groups: fields.number("num_expert_groups")?,
        num_selected_groups: fields.number("num_selected_groups")?,
        group_score: fields.number("group_score")?,
        num_fused_shared_experts: fields.number("num_fused_shared_experts")?,
    }))
}

fn moe_align(context: &Context, fields: &Fields) -> Outcome {
    let args = MoeAlign {
        num_experts: fields.number("num_experts")?,
        topk_ids: fields.read("topk_ids"),
        expert_offsets: fields.write("expert_offsets"),
        sorted_slots: fields.write("sorted_slots"),
        tiles: fields.write("tiles"),
        tile_rows: fields.number("tile_rows")?,
    };
    Ok(context
        .moe_align_workspace_size(&args)
        .and_then(|size| context.moe_align(&args, &mut Workspace::new(size))))
}

fn moe_grouped_matmul(context: &Context, fields: &Fields) -> Outcome {
    let args = MoeGroupedMatmul {
        flags: fields.number("flags")?,
        x: fields.read("x"),
        weights: fields.read("weights"),
        expert_offsets: fields.read("expert_offsets"),
        sorted_slots: fields.read("sorted_slots"),
        bias: fields.read("bias"),
        routing_weights: fields.read("routing_weights"),
        out: fields.write("out"),
        slots_per_row: fields.number("slots_per_row")?,
        weight_scales: fields.read("weight_scales"),
    };
    Ok(context
        .moe_grouped_matmul_workspace_size(&args)
        .and_then(|size| context.moe_grouped_matmul(&args, &mut Workspace::new(size))))
}

fn moe_swiglu(context: &Context, fields: &Fields) -> Outcome {
    Ok(context.moe_swiglu(&MoeSwiglu {
        layout: fields.number("layout")?,
        x: fields.read("x"),
        out: fields.write("out"),
        limit: fields.number("limit")?,
        alpha: fields.number("alpha")?,
    }))
}

fn moe_sum_reduce(context: &Context, fields: &Fields) -> Outcome {
    Ok(context.moe_sum_reduce(&MoeSumReduce {
        x: fields.read("x"),
        out: fields.write("out"),
    }))
}

fn moe(context: &Context, fields: &Fields) -> Outcome {
    let mut router = MoeRouter {
        top_k: fields.number("router.top_k")?,
        renormalize: fields.number("router.renormalize")?,
        logits: fields.read("router.logits"),
        ..Default::default()
    };
    let mut args = Moe {
        flags: fields.number("flags")?,
        x: fields.read("x"),
        gate: fields.read("gate"),
        up: fields.read("up"),
        down: fields.read("down"),
        out: fields.write("out"),
        gate_scales: fields.read("gate_scales"),
        up_scales: fields.read("up_scales"),
        down_scales: fields.read("down_scales"),
        ..Default::default()
    };
    if router.logits.is_some() {
        router.topk_weights = fields.write("topk_weights");
        router.topk_ids = fields.write("topk_ids");
        args.router = Some(&router);
    } else {
        args.topk_weights = fields.read("topk_weights");
        args.topk_ids = fields.read("topk_ids");
    }
    Ok(context
        .moe_workspace_size(&args)
        .and_then(|size| context.moe(&args, &mut Workspace::new(size))))
}
