package main

import (
	"errors"
	"fmt"
	"strconv"
	"unsafe"

	"tenon"
)

// fields has a case's fields by name; those that are not given are 0 or nil.
// The first that cannot be read stays in err.
type fields struct {
	testCase *testCase
	memories []*tenon.Tensor // the tensors' memory, as bytes
	tensors  []*tenon.Tensor
	numUsed  int
	err      error
}

func newFields(c *testCase) *fields {
	f := &fields{testCase: c}
	for _, t := range c.tensors {
		memory := tenon.FromSlice(t.memory, int64(len(t.memory)))
		f.memories = append(f.memories, memory)
		// Exactly as the case describes it: checks are left to the library.
		f.tensors = append(f.tensors, tenon.At(unsafe.Pointer(&tenon.Data[uint8](memory)[0]),
			tenon.CPU, 0, t.dtype, t.shape, t.strides, t.byteOffset))
	}
	return f
}

func (f *fields) free() {
	for i := range f.tensors {
		f.tensors[i].Free()
		f.memories[i].Free()
	}
}

func (f *fields) tensor(field string) *tenon.Tensor {
	for i, t := range f.testCase.tensors {
		if t.field == field {
			f.numUsed++
			return f.tensors[i]
		}
	}
	return nil
}

func (f *fields) text(field string) string {
	text, given := f.testCase.args[field]
	if !given {
		return "0"
	}
	f.numUsed++
	return text
}

func (f *fields) float32(field string) float32 {
	value, err := strconv.ParseFloat(f.text(field), 32)
	f.note(err)
	return float32(value)
}

func (f *fields) int32(field string) int32 {
	value, err := strconv.ParseInt(f.text(field), 10, 32)
	f.note(err)
	return int32(value)
}

func (f *fields) int64(field string) int64 {
	value, err := strconv.ParseInt(f.text(field), 10, 64)
	f.note(err)
	return value
}

func (f *fields) uint32(field string) uint32 {
	value, err := strconv.ParseUint(f.text(field), 10, 32)
	f.note(err)
	return uint32(value)
}

func (f *fields) uint64(field string) uint64 {
	value, err := strconv.ParseUint(f.text(field), 10, 64)
	f.note(err)
	return value
}

func (f *fields) note(err error) {
	if f.err == nil {
		f.err = err
	}
}

// callOp calls tenon_OP with all fields of a case and returns its error.
func callOp(c *tenon.Context, op string, f *fields) error {
	call, known := ops[op]
	if !known {
		f.note(fmt.Errorf("unknown op %s", op))
		return nil
	}
	err := call(c, f)
	if f.numUsed != len(f.testCase.args)+len(f.testCase.tensors) {
		f.note(errors.New("has a field that this program does not know"))
	}
	return err
}

// withWorkspace asks for the workspace of an op and calls it.
func withWorkspace[A any](query func(*A) (uint64, error),
	op func(*A, *tenon.Workspace) error, args *A) error {
	size, err := query(args)
	if err != nil {
		return err
	}
	workspace := tenon.NewWorkspace(size)
	defer workspace.Free()
	return op(args, workspace)
}

var ops = map[string]func(*tenon.Context, *fields) error{
	"embedding":          embedding,
	"rms_norm":           rmsNorm,
	"linear":             linear,
	"quantize_fp8":       quantizeFp8,
	"qk_norm":            qkNorm,
	"attention":          attention,
	"moe_router":         moeRouter,
	"moe_align":          moeAlign,
	"moe_grouped_matmul": moeGroupedMatmul,
	"moe_swiglu":         moeSwiglu,
	"moe_sum_reduce":     moeSumReduce,
	"moe":                moe,
	"sampler":            sampler,
}

func embedding(c *tenon.Context, f *fields) error {
	return c.Embedding(&tenon.Embedding{
		IDs:   f.tensor("ids"),
		Table: f.tensor("table"),
		Out:   f.tensor("out"),
	})
}

func rmsNorm(c *tenon.Context, f *fields) error {
	return c.RMSNorm(&tenon.RMSNorm{
		Rounding: f.int32("rounding"),
		X:        f.tensor("x"),
		Residual: f.tensor("residual"),
		Weight:   f.tensor("weight"),
		Out:      f.tensor("out"),
		Epsilon:  f.float32("epsilon"),
	})
}

func linear(c *tenon.Context, f *fields) error {
	args := tenon.Linear{
		Flags:        f.uint32("flags"),
		X:            f.tensor("x"),
		Weight:       f.tensor("weight"),
		Bias:         f.tensor("bias"),
		Out:          f.tensor("out"),
		WeightScales: f.tensor("weight_scales"),
	}
	return withWorkspace(c.LinearWorkspaceSize, c.Linear, &args)
}

func quantizeFp8(c *tenon.Context, f *fields) error {
	return c.QuantizeFp8(&tenon.QuantizeFp8{
		BlockRows: f.int32("block_rows"),
		BlockCols: f.int32("block_cols"),
		X:         f.tensor("x"),
		Out:       f.tensor("out"),
		Scales:    f.tensor("scales"),
	})
}

func qkNorm(c *tenon.Context, f *fields) error {
	return c.QKNorm(&tenon.QKNorm{
		Rounding:    f.int32("rounding"),
		QKV:         f.tensor("qkv"),
		QOffset:     f.int64("q_offset"),
		KOffset:     f.int64("k_offset"),
		VOffset:     f.int64("v_offset"),
		NumQHeads:   f.int32("num_q_heads"),
		NumKVHeads:  f.int32("num_kv_heads"),
		HeadDim:     f.int32("head_dim"),
		Epsilon:     f.float32("epsilon"),
		Q:           f.tensor("q"),
		K:           f.tensor("k"),
		V:           f.tensor("v"),
		QWeight:     f.tensor("q_weight"),
		KWeight:     f.tensor("k_weight"),
		CosSin:      f.tensor("cos_sin"),
		Positions:   f.tensor("positions"),
		KCache:      f.tensor("k_cache"),
		VCache:      f.tensor("v_cache"),
		SlotMapping: f.tensor("slot_mapping"),
		KScale:      f.float32("k_scale"),
		VScale:      f.float32("v_scale"),
		RotaryDim:   f.int32("rotary_dim"),
	})
}

func attention(c *tenon.Context, f *fields) error {
	args := tenon.Attention{
		Flags:       f.uint32("flags"),
		Q:           f.tensor("q"),
		KCache:      f.tensor("k_cache"),
		VCache:      f.tensor("v_cache"),
		BlockTable:  f.tensor("block_table"),
		QueryStart:  f.tensor("query_start"),
		KVLen:       f.tensor("kv_len"),
		Out:         f.tensor("out"),
		Scale:       f.float32("scale"),
		KScale:      f.float32("k_scale"),
		VScale:      f.float32("v_scale"),
		MaxKVLen:    f.int32("max_kv_len"),
		MaxQueryLen: f.int32("max_query_len"),
	}
	return withWorkspace(c.AttentionWorkspaceSize, c.Attention, &args)
}

func moeRouter(c *tenon.Context, f *fields) error {
	return c.MoERouter(&tenon.MoERouter{
		TopK:                  f.int32("top_k"),
		Logits:                f.tensor("logits"),
		CorrectionBias:        f.tensor("correction_bias"),
		TopkWeights:           f.tensor("topk_weights"),
		TopkIDs:               f.tensor("topk_ids"),
		Scoring:               f.int32("scoring"),
		Renormalize:           f.int32("renormalize"),
		RoutedScalingFactor:   f.float32("routed_scaling_factor"),
		NumExpertGroups:       f.int32("num_expert_groups"),
		NumSelectedGroups:     f.int32("num_selected_groups"),
		GroupScore:            f.int32("group_score"),
		NumFusedSharedExperts: f.int32("num_fused_shared_experts"),
	})
}

func moeAlign(c *tenon.Context, f *fields) error {
	args := tenon.MoEAlign{
		NumExperts:    f.int32("num_experts"),
		TopkIDs:       f.tensor("topk_ids"),
		ExpertOffsets: f.tensor("expert_offsets"),
		SortedSlots:   f.tensor("sorted_slots"),
		Tiles:         f.tensor("tiles"),
		TileRows:      f.int32("tile_rows"),
	}
	return withWorkspace(c.MoEAlignWorkspaceSize, c.MoEAlign, &args)
}

func moeGroupedMatmul(c *tenon.Context, f *fields) error {
	args := tenon.MoEGroupedMatmul{
		Flags:          f.uint32("flags"),
		X:              f.tensor("x"),
		Weights:        f.tensor("weights"),
		ExpertOffsets:  f.tensor("expert_offsets"),
		SortedSlots:    f.tensor("sorted_slots"),
		Bias:           f.tensor("bias"),
		RoutingWeights: f.tensor("routing_weights"),
		Out:            f.tensor("out"),
		SlotsPerRow:    f.int32("slots_per_row"),
		WeightScales:   f.tensor("weight_scales"),
	}
	return withWorkspace(c.MoEGroupedMatmulWorkspaceSize, c.MoEGroupedMatmul, &args)
}

func moeSwiglu(c *tenon.Context, f *fields) error {
	return c.MoESwiglu(&tenon.MoESwiglu{
		Layout: f.int32("layout"),
		X:      f.tensor("x"),
		Out:    f.tensor("out"),
		Limit:  f.float32("limit"),
		Alpha:  f.float32("alpha"),
	})
}

func moeSumReduce(c *tenon.Context, f *fields) error {
	return c.MoESumReduce(&tenon.MoESumReduce{
		X:   f.tensor("x"),
		Out: f.tensor("out"),
	})
}

func moe(c *tenon.Context, f *fields) error {
	args := tenon.MoE{
		Flags:       f.uint32("flags"),
		X:           f.tensor("x"),
		TopkWeights: f.tensor("topk_weights"),
		TopkIDs:     f.tensor("topk_ids"),
		Gate:        f.tensor("gate"),
		Up:          f.tensor("up"),
		Down:        f.tensor("down"),
		Out:         f.tensor("out"),
		GateScales:  f.tensor("gate_scales"),
		UpScales:    f.tensor("up_scales"),
		DownScales:  f.tensor("down_scales"),
	}
	if logits := f.tensor("router.logits"); logits != nil {
		args.Router = &tenon.MoERouter{
			TopK:        f.int32("router.top_k"),
			Renormalize: f.int32("router.renormalize"),
			Logits:      logits,
			TopkWeights: args.TopkWeights,
			TopkIDs:     args.TopkIDs,
		}
	}
	return withWorkspace(c.MoEWorkspaceSize, c.MoE, &args)
}

func sampler(c *tenon.Context, f *fields) error {
	args := tenon.Sampler{
		Logits:   f.tensor("logits"),
		Params:   f.tensor("params"),
		Tokens:   f.tensor("tokens"),
		Logprobs: f.tensor("logprobs"),
		Statuses: f.tensor("statuses"),
	}
	return withWorkspace(c.SamplerWorkspaceSize, c.Sampler, &args)
}
