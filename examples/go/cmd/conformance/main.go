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
	"sort"
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
	passed := map[string]int{}
	var texts []string
	for _, c := range cases {
		if c.op == "generate" {
			var text string
			text, err = checkGeneration(modelDir, c)
			texts = append(texts, text)
		} else {
			err = checkOp(context, c)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		passed[c.op]++
	}
	report(passed)
	fmt.Println(strings.Join(texts, "\n"))
	fmt.Println(len(cases), "cases passed")
	return nil
}

func report(passed map[string]int) {
	var ops []string
	for op := range passed {
		ops = append(ops, op)
	}
	sort.Strings(ops)
	for _, op := range ops {
		fmt.Printf("%-20s %3d cases\n", op, passed[op])
	}
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
func checkGeneration(modelDir string, c *testCase) (string, error) {
	prompt, expected := c.tensor("prompt"), c.tensor("tokens")
	if prompt == nil || expected == nil {
		return "", errors.New("prompt or tokens are missing")
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
		return "", f.err
	}
	want := tokens(expected.expected)
	got, err := generate(modelDir, tokens(prompt.memory), &sampling, len(want))
	if err != nil {
		return "", err
	}
	var text strings.Builder
	for _, token := range got {
		text.WriteByte(byte(token))
	}
	for i := range want {
		if got[i] != want[i] {
			return "", fmt.Errorf("token %d is %d, expected %d; the text is %q",
				i, got[i], want[i], text.String())
		}
	}
	return text.String(), nil
}

// generate continues the prompt by count tokens.
func generate(modelDir string, prompt []int32, sampling *tenon.SamplingParams, count int) ([]int32, error) {
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

	var drawn []int32
	next := prompt
	for len(drawn) < count {
		sampled, err := session.Step([]tenon.Row{{Sequence: sequence, Tokens: next, Sampling: sampling}})
		if err != nil {
			return nil, err
		}
		next = []int32{sampled[0].Token}
		drawn = append(drawn, next...)
	}
	return drawn, nil
}
