package tenon

// #include <tenon/tenon.h>
import "C"

import "unsafe"

// A Sequence is the tokens that a session has processed for one text.
type Sequence struct {
	session *Session
	handle  C.tenon_sequence
}

// NewSequence creates an empty sequence, until Release.
func (s *Session) NewSequence() (*Sequence, error) {
	sequence := &Sequence{session: s}
	err := check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_sequence_create(s.handle, &sequence.handle, e)
	})
	if err != nil {
		return nil, err
	}
	return sequence, nil
}

// Fork is a second sequence with the same tokens so far.
func (q *Sequence) Fork() (*Sequence, error) {
	fork := &Sequence{session: q.session}
	err := check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_sequence_fork(q.session.handle, q.handle, &fork.handle, e)
	})
	if err != nil {
		return nil, err
	}
	return fork, nil
}

// Truncate forgets all tokens but the first numTokens.
func (q *Sequence) Truncate(numTokens int) error {
	return check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_sequence_truncate(q.session.handle, q.handle, C.int32_t(numTokens), e)
	})
}

// Len is the number of tokens.
func (q *Sequence) Len() (int, error) {
	var length C.int32_t
	err := check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_sequence_length(q.session.handle, q.handle, &length, e)
	})
	return int(length), err
}

// Release ends the sequence.
func (q *Sequence) Release() error {
	return check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_sequence_release(q.session.handle, q.handle, e)
	})
}

// SamplingParams are tenon_sampling_params. Zero is greedy.
type SamplingParams struct {
	Temperature float32
	TopK        int32
	TopP        float32 // 1: off
	MinP        float32
	FilterOrder int32
	Seed        uint64
	Position    uint64 // of the token in its sequence; Step sets it itself

	TypicalP          float32
	TopNSigma         float32
	XTCProbability    float32
	XTCThreshold      float32
	MirostatTau       float32
	MirostatEta       float32
	MirostatMu        float32 // with SamplingSetMirostatMu in Flags
	RepetitionPenalty float32
	FrequencyPenalty  float32
	PresencePenalty   float32
	Flags             uint32
	NumTopLogprobs    int32
}

// NewSamplingParams are those of the model's own distribution.
func NewSamplingParams() SamplingParams {
	return SamplingParams{Temperature: 1, TopP: 1}
}

// Bits of LogitEdit.State, above the count of the token in the output.
const (
	EditInPrompt = C.TENON_EDIT_IN_PROMPT
	EditAllow    = C.TENON_EDIT_ALLOW
	EditBan      = C.TENON_EDIT_BAN
)

// A LogitEdit is tenon_logit_edit: what to do with one logit.
type LogitEdit struct {
	Token  int32
	State  uint32
	Bias   float32 // added before the penalties
	Offset float32 // added after them
}

// A Row is what a step does with one sequence.
type Row struct {
	Sequence *Sequence
	Tokens   []int32 // to append

	// Continues: in place of Tokens, the token that the step before, waited for or
	// not, drew for the sequence.
	Continues bool

	// Sampling is how the next token is drawn; nil: it is not, for a chunk with
	// more of the prompt to come.
	Sampling *SamplingParams

	// Logits, if not nil, receives those of the last token (vocab_size of them)
	// or of all tokens.
	Logits []float32

	// Edits of the logits that the next token is drawn from, in any order. nil:
	// none, with which there are no penalties.
	Edits []LogitEdit

	// Bitmask, if not nil, has a bit for each token of the vocabulary, bit 0 of
	// word 0 the first: 1 where it may be drawn.
	Bitmask []uint32
}

// Sampled is the token that a step drew for a row.
type Sampled struct {
	Token   int32 // -1: none
	Logprob float32
	Status  int32 // SampleOK, SampleNoSupport or SampleNonFinite

	// Top are the best tokens, best first: SamplingParams.NumTopLogprobs of them,
	// or as many as may be drawn.
	Top []TokenLogprob

	// MirostatMu is mu after the draw; 0 without mirostat. A row that goes on
	// from here after Truncate gives it as SamplingParams.MirostatMu.
	MirostatMu float32
}

// A TokenLogprob is a token and its logprob.
type TokenLogprob struct {
	Token   int32
	Logprob float32
}

// Step appends each row's tokens to its sequence and draws the next ones, in one
// pass over the model. After an error every sequence is as it was.
func (s *Session) Step(rows []Row) ([]Sampled, error) {
	step := newStep(rows)
	defer step.arena.free()
	if err := step.fill(s); err != nil {
		return nil, err
	}
	for i, row := range rows {
		if row.Sampling != nil && row.Sampling.NumTopLogprobs != 0 {
			step.rawRows[i].top_tokens = &step.topTokens[i*C.TENON_MAX_TOP_LOGPROBS]
			step.rawRows[i].top_logprobs = &step.topLogprobs[i*C.TENON_MAX_TOP_LOGPROBS]
		}
	}
	args := C.tenon_step_args{
		struct_size: C.sizeof_tenon_step_args,
		num_rows:    C.int32_t(len(rows)),
		rows:        &step.rawRows[0],
		tokens:      &step.tokens[0],
		logprobs:    &step.logprobs[0],
		statuses:    &step.statuses[0],
		mirostat_mu: &step.mirostatMu[0],
	}
	err := check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_session_step(s.handle, &args, e)
	})
	if err != nil {
		return nil, err
	}
	return step.results(), nil
}

// EnqueueStep starts a step, or does nothing at all: Step in two parts, so that a
// step is on its way before the tokens of the last one are read. Two may be in
// flight; WaitStep gives the results of the first. Sequences may come and go
// meanwhile: one that has ended may be released at once though its next step is
// under way.
func (s *Session) EnqueueStep(rows []Row) error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	step := newStep(rows)
	err := step.fill(s)
	if err == nil {
		args := C.tenon_step_args{
			struct_size: C.sizeof_tenon_step_args,
			num_rows:    C.int32_t(len(rows)),
			rows:        &step.rawRows[0],
		}
		err = check(func(e *C.tenon_error) C.int32_t {
			return C.tenon_session_enqueue_step(s.handle, &args, e)
		})
	}
	if err != nil {
		step.arena.free()
		return err
	}
	s.inFlight = append(s.inFlight, step)
	return nil
}

// WaitStep waits for the step that was enqueued first. The rows' Logits are
// filled in then.
func (s *Session) WaitStep() ([]Sampled, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	results := C.tenon_step_results{struct_size: C.sizeof_tenon_step_results}
	var step *step
	if len(s.inFlight) > 0 {
		step = s.inFlight[0]
		results.num_rows = C.int32_t(len(step.rows))
		results.tokens = &step.tokens[0]
		results.logprobs = &step.logprobs[0]
		results.statuses = &step.statuses[0]
		results.mirostat_mu = &step.mirostatMu[0]
		results.top_tokens = &step.topTokens[0]
		results.top_logprobs = &step.topLogprobs[0]
		results.top_columns = C.TENON_MAX_TOP_LOGPROBS
	}
	err := check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_session_wait_step(s.handle, &results, e)
	})
	if err != nil {
		return nil, err
	}
	s.inFlight = s.inFlight[1:]
	defer step.arena.free()
	return step.results(), nil
}

// A step is the memory that a step reads and writes.
type step struct {
	arena       arena
	rows        []Row
	rawRows     []C.tenon_step_row
	logits      [][]float32
	tokens      []C.int32_t
	logprobs    []C.float
	statuses    []C.int32_t
	mirostatMu  []C.float
	topTokens   []C.int32_t // TENON_MAX_TOP_LOGPROBS of each row
	topLogprobs []C.float
}

func newStep(rows []Row) *step {
	t := &step{rows: rows, logits: make([][]float32, len(rows))}
	room := len(rows) + 1 // so that none have an address too
	t.rawRows = arenaSlice[C.tenon_step_row](&t.arena, room)
	t.tokens = arenaSlice[C.int32_t](&t.arena, room)
	t.logprobs = arenaSlice[C.float](&t.arena, room)
	t.statuses = arenaSlice[C.int32_t](&t.arena, room)
	t.mirostatMu = arenaSlice[C.float](&t.arena, room)
	t.topTokens = arenaSlice[C.int32_t](&t.arena, room*C.TENON_MAX_TOP_LOGPROBS)
	t.topLogprobs = arenaSlice[C.float](&t.arena, room*C.TENON_MAX_TOP_LOGPROBS)
	return t
}

// fill gives the raw rows all but what they list of their results.
func (t *step) fill(s *Session) error {
	if len(t.rows) == 0 {
		return invalidArgument("no rows")
	}
	for i := range t.rows {
		if err := t.fillRow(s, i); err != nil {
			return err
		}
	}
	return nil
}

func (t *step) fillRow(s *Session, i int) error {
	row, raw := &t.rows[i], &t.rawRows[i]
	raw.struct_size = C.sizeof_tenon_step_row
	raw.sequence = row.Sequence.handle
	raw.num_tokens = C.int32_t(len(row.Tokens))
	if row.Continues {
		raw.flags = C.TENON_ROW_CONTINUES
		raw.num_tokens++
	}
	if len(row.Tokens) > 0 {
		raw.tokens = (*C.int32_t)(&arenaCopy(&t.arena, row.Tokens)[0])
	}
	if row.Sampling != nil {
		raw.sampling = &arenaCopy(&t.arena, []C.tenon_sampling_params{row.Sampling.raw()})[0]
	}
	if row.Logits != nil {
		switch len(row.Logits) {
		case s.vocabSize:
			raw.logits_mode = C.TENON_LOGITS_LAST
		case s.vocabSize * len(row.Tokens):
			raw.logits_mode = C.TENON_LOGITS_ALL
		default:
			return invalidArgument("row %d: room for %d logits, expected %d or %d times that",
				i, len(row.Logits), s.vocabSize, len(row.Tokens))
		}
		t.logits[i] = arenaSlice[float32](&t.arena, len(row.Logits))
		raw.logits = (*C.float)(&t.logits[i][0])
	}
	return s.setEdits(&t.arena, row, raw)
}

// results reads what has come of the step.
func (t *step) results() []Sampled {
	results := make([]Sampled, len(t.rows))
	for i, row := range t.rows {
		copy(row.Logits, t.logits[i])
		results[i] = Sampled{
			Token:      int32(t.tokens[i]),
			Logprob:    float32(t.logprobs[i]),
			Status:     int32(t.statuses[i]),
			Top:        t.top(i),
			MirostatMu: float32(t.mirostatMu[i]),
		}
	}
	return results
}

// top reads the best tokens of a row.
func (t *step) top(i int) []TokenLogprob {
	sampling := t.rawRows[i].sampling
	if sampling == nil {
		return nil
	}
	var top []TokenLogprob
	for j := i * C.TENON_MAX_TOP_LOGPROBS; len(top) < int(sampling.num_top_logprobs); j++ {
		if t.topTokens[j] < 0 {
			break
		}
		top = append(top, TokenLogprob{int32(t.topTokens[j]), float32(t.topLogprobs[j])})
	}
	return top
}

// setEdits gives the raw row what changes the logits of its token.
func (s *Session) setEdits(a *arena, row *Row, raw *C.tenon_step_row) error {
	if row.Bitmask != nil {
		if words := (s.vocabSize + 31) / 32; len(row.Bitmask) != words {
			return invalidArgument("a bitmask of %d words, expected %d", len(row.Bitmask), words)
		}
		raw.bitmask = (*C.uint32_t)(&arenaCopy(a, row.Bitmask)[0])
	}
	if row.Edits == nil {
		return nil
	}
	// One more than there are, so that none have an address too.
	edits := arenaSlice[C.tenon_logit_edit](a, len(row.Edits)+1)
	for i, edit := range row.Edits {
		edits[i] = C.tenon_logit_edit{
			id:     C.int32_t(edit.Token),
			state:  C.uint32_t(edit.State),
			bias:   C.float(edit.Bias),
			offset: C.float(edit.Offset),
		}
	}
	raw.edits = &edits[0]
	raw.num_edits = C.int32_t(len(row.Edits))
	return check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_logit_edits_sort(&edits[0], C.int64_t(len(row.Edits)),
			C.int64_t(s.vocabSize), e)
	})
}

func (p *SamplingParams) raw() C.tenon_sampling_params {
	return C.tenon_sampling_params{
		temperature:  C.float(p.Temperature),
		top_k:        C.int32_t(p.TopK),
		top_p:        C.float(p.TopP),
		min_p:        C.float(p.MinP),
		filter_order: C.int32_t(p.FilterOrder),
		seed:         C.uint64_t(p.Seed),
		position:     C.uint64_t(p.Position),

		typical_p:          C.float(p.TypicalP),
		top_n_sigma:        C.float(p.TopNSigma),
		xtc_probability:    C.float(p.XTCProbability),
		xtc_threshold:      C.float(p.XTCThreshold),
		mirostat_tau:       C.float(p.MirostatTau),
		mirostat_eta:       C.float(p.MirostatEta),
		mirostat_mu:        C.float(p.MirostatMu),
		repetition_penalty: C.float(p.RepetitionPenalty),
		frequency_penalty:  C.float(p.FrequencyPenalty),
		presence_penalty:   C.float(p.PresencePenalty),
		flags:              C.uint32_t(p.Flags),
		num_top_logprobs:   C.int32_t(p.NumTopLogprobs),
	}
}

// SamplingTensor has sampling parameters as Sampler takes them.
func SamplingTensor(params []SamplingParams) *Tensor {
	t := New[uint8](int64(len(params)), C.sizeof_tenon_sampling_params)
	raw := unsafe.Slice((*C.tenon_sampling_params)(t.raw.data), len(params))
	for i := range params {
		raw[i] = params[i].raw()
	}
	return t
}
