package tenon

// #include <stdlib.h>
// #include <tenon/tenon.h>
// int32_t tenonGoProgress(void* handle, int64_t done, int64_t total);
import "C"

import (
	"runtime/cgo"
	"sync"
	"unsafe"
)

// LoadOptions say where and how a model is loaded. Zero is the CPU.
type LoadOptions struct {
	Device      DeviceType
	DeviceIndex int
	Rank        int // of a tensor-parallel group
	WorldSize   int
	FP8Weights  bool // weights that are not fp8 are quantised while they are loaded

	// Progress, if given, is told the bytes done now and then; false stops the
	// load, which then fails with Cancelled.
	Progress func(done, total int64) bool
}

// A Model is the weights of a model, on a device.
type Model struct {
	handle C.tenon_model
}

// Load reads a checkpoint: a directory of config.json and safetensors.
func Load(directory string, options LoadOptions) (*Model, error) {
	path := C.CString(directory)
	defer C.free(unsafe.Pointer(path))
	args := C.tenon_model_load_args{
		struct_size:  C.sizeof_tenon_model_load_args,
		device_type:  deviceOrCPU(options.Device),
		device_index: C.int32_t(options.DeviceIndex),
		rank:         C.int32_t(options.Rank),
		world_size:   C.int32_t(options.WorldSize),
		directory:    path,
	}
	if options.FP8Weights {
		args.weights = C.TENON_WEIGHTS_FP8
	}
	if options.Progress != nil {
		// C is given C memory that holds a number for the function.
		handle := cgo.NewHandle(options.Progress)
		defer handle.Delete()
		cell := allocate(uint64(unsafe.Sizeof(handle)))
		defer C.free(cell)
		*(*cgo.Handle)(cell) = handle
		args.progress = C.tenon_progress_fn(C.tenonGoProgress)
		args.progress_user_data = cell
	}
	m := new(Model)
	err := check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_model_load(&args, &m.handle, e)
	})
	if err != nil {
		return nil, err
	}
	return m, nil
}

//export tenonGoProgress
func tenonGoProgress(cell unsafe.Pointer, done, total C.int64_t) C.int32_t {
	progress := (*(*cgo.Handle)(cell)).Value().(func(done, total int64) bool)
	if progress(int64(done), int64(total)) {
		return 0
	}
	return 1
}

// ModelInfo describes a model.
type ModelInfo struct {
	VocabSize             int
	HiddenSize            int
	NumLayers             int
	NumHeads              int
	NumKVHeads            int
	HeadDim               int
	MaxPositionEmbeddings int
	NumExperts            int // 0: a dense model
	NumExpertsPerTok      int
	BOSTokenID            int // -1: none
	EOSTokenIDs           []int32
	WeightBytes           int64
}

// Info describes the model.
func (m *Model) Info() (ModelInfo, error) {
	info := C.tenon_model_info{struct_size: C.sizeof_tenon_model_info}
	err := check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_model_query(m.handle, &info, e)
	})
	if err != nil {
		return ModelInfo{}, err
	}
	result := ModelInfo{
		VocabSize:             int(info.vocab_size),
		HiddenSize:            int(info.hidden_size),
		NumLayers:             int(info.num_layers),
		NumHeads:              int(info.num_heads),
		NumKVHeads:            int(info.num_kv_heads),
		HeadDim:               int(info.head_dim),
		MaxPositionEmbeddings: int(info.max_position_embeddings),
		NumExperts:            int(info.num_experts),
		NumExpertsPerTok:      int(info.num_experts_per_tok),
		BOSTokenID:            int(info.bos_token_id),
		WeightBytes:           int64(info.weight_bytes),
	}
	for i := 0; i < int(info.num_eos_token_ids) && i < len(info.eos_token_ids); i++ {
		result.EOSTokenIDs = append(result.EOSTokenIDs, int32(info.eos_token_ids[i]))
	}
	return result, nil
}

// Close ends the model. Sessions keep what they need of it.
func (m *Model) Close() error {
	handle := m.handle
	m.handle = 0
	return check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_model_destroy(handle, e)
	})
}

// SessionOptions are tenon_session_options; zeros are its defaults.
type SessionOptions struct {
	BatchInvariant bool
	MaxSequences   int
	MaxTokens      int
	MaxContext     int
	PageSize       int
	NumPages       int64
	MaxLogitRows   int
	NumThreads     int
	KvCacheBytes   int64
	MoEKernelsJSON string // see Context.SetMoEKernels; "": those built in

	// What rows may have.
	MaxLogitEdits  int // of all rows of a step
	LogitBitmasks  bool
	MaxTopLogprobs int // of a row, see SamplingParams.NumTopLogprobs
}

// A Session runs a model. Any number of goroutines may use one; their calls
// take turns.
type Session struct {
	handle    C.tenon_session
	vocabSize int
	mutex     sync.Mutex // of inFlight
	inFlight  []*step    // the oldest first
}

// NewSession creates a session, until Close.
func (m *Model) NewSession(options SessionOptions) (*Session, error) {
	info, err := m.Info()
	if err != nil {
		return nil, err
	}
	raw := C.tenon_session_options{
		struct_size:    C.sizeof_tenon_session_options,
		max_sequences:  C.int32_t(options.MaxSequences),
		max_tokens:     C.int32_t(options.MaxTokens),
		max_context:    C.int32_t(options.MaxContext),
		page_size:      C.int32_t(options.PageSize),
		num_pages:      C.int64_t(options.NumPages),
		max_logit_rows: C.int32_t(options.MaxLogitRows),
		num_threads:    C.int32_t(options.NumThreads),
		kv_cache_bytes: C.int64_t(options.KvCacheBytes),

		max_logit_edits:  C.int32_t(options.MaxLogitEdits),
		max_top_logprobs: C.int32_t(options.MaxTopLogprobs),
	}
	if options.MoEKernelsJSON != "" {
		raw.moe_kernels_json = C.CString(options.MoEKernelsJSON)
		defer C.free(unsafe.Pointer(raw.moe_kernels_json))
	}
	if options.BatchInvariant {
		raw.flags |= C.TENON_SESSION_BATCH_INVARIANT
	}
	if options.LogitBitmasks {
		raw.flags |= C.TENON_SESSION_LOGIT_BITMASKS
	}
	s := &Session{vocabSize: info.VocabSize}
	err = check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_session_create(m.handle, &raw, &s.handle, e)
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Close ends the session and its sequences.
func (s *Session) Close() error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	handle := s.handle
	s.handle = 0
	err := check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_session_destroy(handle, e)
	})
	for _, step := range s.inFlight { // nothing writes there any more
		step.arena.free()
	}
	s.inFlight = nil
	return err
}
