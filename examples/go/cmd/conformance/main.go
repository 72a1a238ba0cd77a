// Command conformance holds libtenon.so to the conformance vectors:
//
//	conformance VECTORS MODEL_DIR
//
// The dynamic linker finds the library: in LD_LIBRARY_PATH, say.
package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"tenon"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: conformance VECTORS MODEL_DIR")
		os.Exit(1)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

func run(vectors, modelDir string) error {
	if err := tenon.CheckVersion(); err != nil {
		return err
	}
	major, minor := tenon.ABIVersion()
	fmt.Printf("libtenon %s, ABI %d.%d\n", tenon.Version(), major, minor)

	text, err := os.ReadFile(vectors)
	if err != nil {
		return err
	}
	cases, err := parse(string(text))
	if err != nil {
		return fmt.Errorf("%s: %w", vectors, err)
	}
	context, err := tenon.NewContext(tenon.ContextOptions{})
	if err != nil {
		return err
	}
	defer context.Close()
	numOfOp := 0
	for i, c := range cases {
		if c.op == "generate" {
			err = checkGeneration(modelDir, c)
		} else {
			err = checkOp(context, c)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		numOfOp++
		if i+1 == len(cases) || cases[i+1].op != c.op {
			fmt.Printf("%s: %d cases\n", c.op, numOfOp)
			numOfOp = 0
		}
	}
	fmt.Println(len(cases), "cases passed")
	return nil
}

// checkOp runs the case's op and compares what it returned and what it wrote.
func checkOp(context *tenon.Context, c *testCase) error {
	f := newFields(c)
	defer f.free()
	err := callOp(context, c.op, f)
	if f.err != nil {
		return f.err
	}
	if err := checkResult(err, c); err != nil {
		return err
	}
	for i, t := range c.tensors {
		if err := t.check(tenon.Data[uint8](f.memories[i])); err != nil {
			return err
		}
	}
	return nil
}

func checkResult(err error, c *testCase) error {
	if c.rejectCode == tenon.OK {
		return err
	}
	var e *tenon.Error
	if errors.As(err, &e) && e.Code == c.rejectCode && strings.Contains(e.Message, c.rejectWord) {
		return nil
	}
	return fmt.Errorf("the result is %v, expected %v naming %s", err, c.rejectCode, c.rejectWord)
}

// checkGeneration lets the model continue the case's prompt and compares every
// token.
func checkGeneration(modelDir string, c *testCase) error {
	prompt, expected := c.tensor("prompt"), c.tensor("tokens")
	if prompt == nil || expected == nil {
		return errors.New("prompt or tokens are missing")
	}
	f := newFields(c)
	defer f.free()
	sampling := tenon.SamplingParams{
		Temperature: f.float32("temperature"),
		TopK:        f.int32("top_k"),
		TopP:        f.float32("top_p"),
		MinP:        f.float32("min_p"),
		FilterOrder: f.int32("filter_order"),
		Seed:        f.uint64("seed"),
	}
	if f.err != nil {
		return f.err
	}
	start, want := tokens(prompt.memory), tokens(expected.expected)
	fmt.Printf("%s: %s%s\n", c.name, text(start), text(want))
	for _, draw := range []func(*tenon.Session, tenon.Row, int) ([]int32, error){
		stepByStep, pipelined,
	} {
		got, err := generate(modelDir, start, &sampling, len(want), draw)
		if err != nil {
			return err
		}
		for i := range want {
			if got[i] != want[i] {
				return fmt.Errorf("token %d is %d, expected %d", i, got[i], want[i])
			}
		}
	}
	return nil
}

// stepByStep draws count tokens, the first of them by the row of the prompt.
func stepByStep(session *tenon.Session, row tenon.Row, count int) ([]int32, error) {
	var drawn []int32
	for len(drawn) < count {
		sampled, err := session.Step([]tenon.Row{row})
		if err != nil {
			return nil, err
		}
		row.Tokens = []int32{sampled[0].Token}
		drawn = append(drawn, row.Tokens...)
	}
	return drawn, nil
}

// pipelined does so with two steps in flight: tokens go from step to step
// without us.
func pipelined(session *tenon.Session, row tenon.Row, count int) ([]int32, error) {
	if err := session.EnqueueStep([]tenon.Row{row}); err != nil {
		return nil, err
	}
	row.Tokens, row.Continues = nil, true
	var drawn []int32
	for len(drawn) < count {
		if len(drawn)+1 < count {
			if err := session.EnqueueStep([]tenon.Row{row}); err != nil {
				return nil, err
			}
		}
		sampled, err := session.WaitStep()
		if err != nil {
			return nil, err
		}
		drawn = append(drawn, sampled[0].Token)
	}
	return drawn, nil
}

// text has the model's tokens as what they are, bytes; 0 begins a text.
func text(tokens []int32) string {
	var builder strings.Builder
	for _, token := range tokens {
		if token != 0 {
			builder.WriteByte(byte(token))
		}
	}
	return builder.String()
}

// generate continues the prompt by count tokens.
func generate(modelDir string, prompt []int32, sampling *tenon.SamplingParams, count int,
	draw func(*tenon.Session, tenon.Row, int) ([]int32, error)) ([]int32, error) {
	model, err := tenon.Load(modelDir, tenon.LoadOptions{})
	if err != nil {
		return nil, err
	}
	defer model.Close()
	session, err := model.NewSession(tenon.SessionOptions{MaxSequences: 1})
	if err != nil {
		return nil, err
	}
	defer session.Close()
	sequence, err := session.NewSequence()
	if err != nil {
		return nil, err
	}
	defer sequence.Release()
	row := tenon.Row{Sequence: sequence, Tokens: prompt, Sampling: sampling}
	return draw(session, row, count)
}
