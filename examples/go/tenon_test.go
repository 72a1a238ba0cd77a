package tenon

import (
	"errors"
	"math"
	"os"
	"reflect"
	"sync"
	"testing"
)

// modelDir is the folder of the example model.
func modelDir() string { return os.Getenv("MODEL_DIR") }

func model(t *testing.T) *Model {
	t.Helper()
	m, err := Load(modelDir(), LoadOptions{})
	if err != nil {
		t.Fatal("MODEL_DIR: ", err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func expectCode(t *testing.T, err error, code Code) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || e.Code != code {
		t.Errorf("the error is %v, expected %v", err, code)
	}
}

func expectPanic(t *testing.T, what string, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Errorf("%s does not panic", what)
		}
	}()
	f()
}

func TestVersion(t *testing.T) {
	if err := CheckVersion(); err != nil {
		t.Error(err)
	}
	if Version() == "" || NotFound.String() != "NOT_FOUND" {
		t.Errorf("version %q, code %v", Version(), NotFound)
	}
	if count, err := DeviceCount(CPU); count != 1 || err != nil {
		t.Errorf("%d CPUs, %v", count, err)
	}
}

func TestMoEKernelSizes(t *testing.T) {
	context, err := NewContext(ContextOptions{NumThreads: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer context.Close()
	expectCode(t, context.SetMoEKernels("{}"), InvalidArgument)
	none := `{"format": "tenon-moe-kernels-1", "device": "any", "source": "a test"}`
	if err := context.SetMoEKernels(none); err != nil {
		t.Error(err)
	}
	expectCode(t, context.SetMoEKernels(none), FailedPrecondition)
}

func TestOpInPlaceWithStrides(t *testing.T) {
	context, err := NewContext(ContextOptions{NumThreads: 2})
	if err != nil {
		t.Fatal(err)
	}
	rows := FromSlice([]float32{-1, 3, 4, -1, 3, 4}, 6)
	defer rows.Free()
	x := rows.View(1, []int64{2, 2}, []int64{3, 1})
	defer x.Free()
	weight := FromSlice([]float32{1, 2}, 2)
	defer weight.Free()
	args := RMSNorm{X: x, Weight: weight, Out: x, Epsilon: 1e-12}
	if err := context.RMSNorm(&args); err != nil {
		t.Fatal(err)
	}
	rms := math.Sqrt(12.5)
	for i, want := range []float64{-1, 3 / rms, 8 / rms, -1, 3 / rms, 8 / rms} {
		if got := float64(Data[float32](rows)[i]); math.Abs(got-want) > 1e-6 {
			t.Errorf("element %d is %v, expected %v", i, got, want)
		}
	}
	if err := context.Close(); err != nil {
		t.Error(err)
	}
	if err := context.Close(); err != nil {
		t.Error("closed twice:", err)
	}
}

func TestSampler(t *testing.T) {
	params := SamplingTensor([]SamplingParams{{}, NewSamplingParams()})
	defer params.Free()
	logits := FromSlice([]float32{0, 2, 1, -99, -99, 0}, 2, 3)
	defer logits.Free()
	tokens, statuses := New[int32](2), New[int32](2)
	defer tokens.Free()
	defer statuses.Free()
	args := Sampler{Logits: logits, Params: params, Tokens: tokens, Statuses: statuses}
	size, err := SingleThreaded().SamplerWorkspaceSize(&args)
	if err != nil {
		t.Fatal(err)
	}
	workspace := NewWorkspace(size)
	defer workspace.Free()
	if err := SingleThreaded().Sampler(&args, workspace); err != nil {
		t.Fatal(err)
	}
	if got := Data[int32](tokens); got[0] != 1 || got[1] != 2 {
		t.Errorf("tokens %v, expected [1 2]", got)
	}
}

func TestErrors(t *testing.T) {
	err := SingleThreaded().RMSNorm(&RMSNorm{})
	expectCode(t, err, InvalidArgument)
	_, err = NewContext(ContextOptions{NumThreads: -1})
	expectCode(t, err, InvalidArgument)
	_, err = Load("/nowhere", LoadOptions{})
	expectCode(t, err, NotFound)
}

func TestTensorsStayInsideTheirMemory(t *testing.T) {
	tensor := New[float32](3, 4)
	defer tensor.Free()
	if len(Data[float32](tensor)) != 12 {
		t.Error("12 elements expected")
	}
	view := tensor.View(1, []int64{3, 2}, []int64{4, 1})
	if len(Data[float32](view)) != 10 {
		t.Errorf("%d elements, expected 10", len(Data[float32](view)))
	}
	view.Free()
	empty := tensor.View(12, []int64{0, 4}, []int64{4, 1})
	if len(Data[float32](empty)) != 0 {
		t.Error("no elements expected")
	}
	empty.Free()
	expectPanic(t, "a view that is too large", func() {
		tensor.View(1, []int64{3, 4}, []int64{4, 1})
	})
	expectPanic(t, "a negative stride", func() {
		tensor.View(8, []int64{3}, []int64{-4})
	})
	expectPanic(t, "a negative size", func() { New[int32](-1) })
	expectPanic(t, "a size that overflows", func() { New[int32](1<<40, 1<<40) })
	expectPanic(t, "another length", func() { FromSlice([]int32{1, 2}, 3) })
	expectPanic(t, "another dtype", func() { Data[int32](tensor) })
}

func TestProgress(t *testing.T) {
	var done, total int64
	m, err := Load(modelDir(), LoadOptions{Progress: func(d, t int64) bool {
		done, total = d, t
		return true
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if done != total || total == 0 {
		t.Errorf("ended at %d of %d bytes", done, total)
	}
	_, err = Load(modelDir(), LoadOptions{Progress: func(int64, int64) bool { return false }})
	expectCode(t, err, Cancelled)
}

func TestSequences(t *testing.T) {
	m := model(t)
	info, err := m.Info()
	if err != nil || info.VocabSize != 256 || info.NumLayers == 0 {
		t.Fatalf("%+v, %v", info, err)
	}
	session, err := m.NewSession(SessionOptions{MaxSequences: 2, MaxLogitRows: 8})
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	prompt := []int32{'S', 'h', 'e', ' ', 'w', 'a', 's'}
	first, err := session.NewSequence()
	if err != nil {
		t.Fatal(err)
	}
	all := make([]float32, len(prompt)*info.VocabSize)
	drawn, err := session.Step([]Row{{Sequence: first, Tokens: prompt, Sampling: &SamplingParams{}, Logits: all}})
	if err != nil || drawn[0].Status != SampleOK {
		t.Fatal(drawn, err)
	}
	last := all[len(all)-info.VocabSize:]
	for _, logit := range last {
		if logit > last[drawn[0].Token] {
			t.Errorf("token %d is not the best", drawn[0].Token)
		}
	}

	second, err := first.Fork()
	if err != nil {
		t.Fatal(err)
	}
	_, err = session.NewSequence()
	expectCode(t, err, ResourceExhausted)
	if err := second.Truncate(len(prompt) - 1); err != nil {
		t.Error(err)
	}
	if length, err := second.Len(); length != len(prompt)-1 || err != nil {
		t.Errorf("%d tokens, %v", length, err)
	}
	again, err := session.Step([]Row{{Sequence: second, Tokens: prompt[len(prompt)-1:], Sampling: &SamplingParams{}}})
	if err != nil || again[0].Token != drawn[0].Token {
		t.Errorf("%v, %v, expected token %d", again, err, drawn[0].Token)
	}
	_, err = session.Step([]Row{{Sequence: second, Tokens: prompt, Logits: make([]float32, 3)}})
	expectCode(t, err, InvalidArgument)
	_, err = session.Step(nil)
	expectCode(t, err, InvalidArgument)
	if err := second.Release(); err != nil {
		t.Error(err)
	}
	_, err = second.Len()
	expectCode(t, err, NotFound)
}

func TestEditsBitmasksAndTopTokens(t *testing.T) {
	session, err := model(t).NewSession(SessionOptions{
		MaxLogitEdits: 3, LogitBitmasks: true, MaxTopLogprobs: 3,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	sampling := SamplingParams{NumTopLogprobs: 3}
	// Behind a row without any of it.
	step := func(row Row) ([]Sampled, error) {
		rows := []Row{{Sampling: &SamplingParams{}}, row}
		for i := range rows {
			sequence, err := session.NewSequence()
			if err != nil {
				t.Fatal(err)
			}
			defer sequence.Release()
			rows[i].Sequence = sequence
			rows[i].Tokens = []int32{'S', 'h', 'e'}
		}
		rows[1].Sampling = &sampling
		return session.Step(rows)
	}
	plain := int32(-1)
	expect := func(row Row, top ...int32) []Sampled {
		t.Helper()
		drawn, err := step(row)
		if err != nil {
			t.Fatal(err)
		}
		if plain < 0 {
			plain = drawn[0].Token
		}
		if drawn[0].Token != plain || len(drawn[0].Top) != 0 {
			t.Errorf("the row before: %+v", drawn[0])
		}
		got := drawn[1].Top
		for i := range top {
			if len(got) != len(top) || got[i].Token != top[i] || drawn[1].Token != top[0] {
				t.Fatalf("%+v, expected %v", drawn[1], top)
			}
		}
		return drawn
	}

	drawn := expect(Row{})
	top := drawn[1].Top
	if len(top) != 3 || top[0].Token != plain || top[0].Token != drawn[1].Token {
		t.Fatalf("%+v", drawn)
	}
	if math.Abs(float64(top[0].Logprob-drawn[1].Logprob)) > 1e-4 ||
		!(top[0].Logprob >= top[1].Logprob && top[1].Logprob >= top[2].Logprob) {
		t.Errorf("logprobs of %+v", drawn[1])
	}
	first, second, third := top[0].Token, top[1].Token, top[2].Token

	bans := []LogitEdit{{Token: first, State: EditBan}, {Token: second, State: EditBan}}
	for i := 0; i < 2; i++ { // in any order
		if drawn := expect(Row{Edits: bans}); drawn[1].Token != third {
			t.Errorf("%+v, expected token %d", drawn[1], third)
		}
		bans[0], bans[1] = bans[1], bans[0]
	}
	if drawn := expect(Row{Edits: []LogitEdit{{Token: 7, Bias: 100}}}); drawn[1].Token != 7 {
		t.Errorf("%+v, expected token 7", drawn[1])
	}
	if drawn := expect(Row{Edits: []LogitEdit{{Token: 8, Offset: 100}}}); drawn[1].Token != 8 {
		t.Errorf("%+v, expected token 8", drawn[1])
	}
	bitmask := make([]uint32, 256/32)
	for _, token := range []int32{second, third} {
		bitmask[token/32] |= 1 << (token % 32)
	}
	expect(Row{Bitmask: bitmask}, second, third)
	expect(Row{Bitmask: bitmask, Edits: []LogitEdit{{Token: second, State: EditBan}}}, third)
	expect(Row{}, first, second, third)

	sampling.PresencePenalty = 1
	_, err = step(Row{})
	expectCode(t, err, InvalidArgument)
	expect(Row{Edits: []LogitEdit{}}, first, second, third)
	_, err = step(Row{Bitmask: bitmask[1:]})
	expectCode(t, err, InvalidArgument)
	_, err = step(Row{Edits: append(bans, bans...)})
	expectCode(t, err, InvalidArgument)
	_, err = step(Row{Edits: []LogitEdit{{Token: 1}, {Token: 2}, {Token: 3}, {Token: 4}}})
	expectCode(t, err, ResourceExhausted)
	for _, count := range []int32{-1, 4, 1 << 30} {
		sampling.NumTopLogprobs = count
		_, err = step(Row{Edits: bans})
		expectCode(t, err, InvalidArgument)
	}
}

func TestTwoStepsInFlight(t *testing.T) {
	m := model(t)
	info, err := m.Info()
	if err != nil {
		t.Fatal(err)
	}
	session, err := m.NewSession(SessionOptions{MaxTopLogprobs: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	prompt := []int32{'S', 'h', 'e', ' ', 'w', 'a', 's'}
	sampling := SamplingParams{Temperature: 0.9, TopP: 1, Seed: 3,
		MirostatTau: 3, MirostatEta: 0.2, NumTopLogprobs: 2}
	newRow := func() Row {
		sequence, err := session.NewSequence()
		if err != nil {
			t.Fatal(err)
		}
		return Row{Sequence: sequence, Tokens: prompt, Sampling: &sampling,
			Logits: make([]float32, info.VocabSize)}
	}
	goOn := func(row Row) Row {
		row.Tokens, row.Continues = nil, true
		row.Logits = make([]float32, info.VocabSize)
		return row
	}
	row := newRow()
	var expected []Sampled
	var logits [][]float32
	for i := 0; i < 5; i++ {
		sampled, err := session.Step([]Row{row})
		if err != nil {
			t.Fatal(err)
		}
		expected = append(expected, sampled...)
		logits = append(logits, row.Logits)
		row = goOn(row)
	}
	if expected[0].MirostatMu == expected[1].MirostatMu || len(expected[0].Top) != 2 {
		t.Errorf("got %v", expected)
	}

	other := newRow()
	rows := []Row{other}
	if err := session.EnqueueStep(rows); err != nil {
		t.Fatal(err)
	}
	var got []Sampled
	for i := 0; i < 5; i++ {
		other = goOn(other)
		rows = append(rows, other)
		if i < 4 {
			if err := session.EnqueueStep([]Row{other}); err != nil {
				t.Fatal(err)
			}
			expectCode(t, session.EnqueueStep([]Row{other}), FailedPrecondition)
		} else {
			_, err := session.Step([]Row{other})
			expectCode(t, err, FailedPrecondition)
			if err := other.Sequence.Release(); err != nil { // its last step may go on
				t.Fatal(err)
			}
		}
		sampled, err := session.WaitStep()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, sampled...)
		if !reflect.DeepEqual(rows[i].Logits, logits[i]) {
			t.Errorf("step %d has other logits", i)
		}
	}
	if !reflect.DeepEqual(got, expected) {
		t.Errorf("got %v, expected %v", got, expected)
	}
	_, err = session.WaitStep()
	expectCode(t, err, FailedPrecondition)

	// Back to where two tokens had been drawn.
	if err := row.Sequence.Truncate(len(prompt) + 1); err != nil {
		t.Fatal(err)
	}
	set := sampling
	set.Flags = SamplingSetMirostatMu
	set.MirostatMu = expected[1].MirostatMu
	again, err := session.Step([]Row{{Sequence: row.Sequence, Tokens: []int32{expected[1].Token},
		Sampling: &set}})
	if err != nil || !reflect.DeepEqual(again[0], expected[2]) {
		t.Errorf("got %v, %v, expected %v", again, err, expected[2])
	}
	if err := session.EnqueueStep([]Row{goOn(row)}); err != nil { // ends with the session
		t.Fatal(err)
	}
}

func TestGoroutinesShareASession(t *testing.T) {
	session, err := model(t).NewSession(SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	generate := func() string {
		sequence, err := session.NewSequence()
		if err != nil {
			return err.Error()
		}
		defer sequence.Release()
		text := "S"
		for i := 0; i < 5; i++ {
			next := []int32{int32(text[len(text)-1])}
			sampled, err := session.Step([]Row{{Sequence: sequence, Tokens: next, Sampling: &SamplingParams{}}})
			if err != nil {
				return err.Error()
			}
			text += string(rune(sampled[0].Token))
		}
		return text
	}
	want := generate()
	var group sync.WaitGroup
	for i := 0; i < 3; i++ {
		group.Add(1)
		go func() {
			defer group.Done()
			if got := generate(); got != want {
				t.Errorf("%q, expected %q", got, want)
			}
		}()
	}
	group.Wait()
}

// BenchmarkCall is what a call costs: RMSNorm without rows, with all its checks.
func BenchmarkCall(b *testing.B) {
	context := SingleThreaded()
	x, weight := New[float32](0, 64), New[float32](64)
	args := RMSNorm{X: x, Weight: weight, Out: x, Epsilon: 1e-6}
	b.ReportAllocs()
	for i := 0; i < b.N; i++ {
		if err := context.RMSNorm(&args); err != nil {
			b.Fatal(err)
		}
	}
}
