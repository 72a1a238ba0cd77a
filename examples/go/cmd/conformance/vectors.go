package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"tenon"
)

// A testCase is one case of the vectors;
// tests/abi/conformance/README.md has their format.
type testCase struct {
	name, op   string
	args       map[string]string
	tensors    []*tensorData
	rejectCode tenon.Code // 0: the call succeeds
	rejectWord string
}

type tensorData struct {
	field          string
	dtype          tenon.DType
	shape, strides []int64
	byteOffset     uint64
	memory         []byte
	expected       []byte // like memory, unless the case says otherwise
	ulps           uint64
}

// parse reads all cases of a file.
func parse(text string) ([]*testCase, error) {
	var cases []*testCase
	var open *testCase
	for i, line := range strings.Split(text, "\n") {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		words := strings.Split(line, " ")
		var err error
		switch {
		case words[0] == "case" && len(words) == 3 && open == nil:
			open = &testCase{name: words[1], op: words[2], args: map[string]string{}}
		case words[0] == "end" && open != nil:
			cases, open = append(cases, open), nil
		case open != nil:
			err = open.add(words[0], words[1:])
		default:
			err = fmt.Errorf("%q is not expected here", words[0])
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", i+1, err)
		}
	}
	if open != nil {
		return nil, fmt.Errorf("case %s has no end", open.name)
	}
	return cases, nil
}

func (c *testCase) add(statement string, words []string) (err error) {
	switch {
	case statement == "arg" && len(words) == 2:
		c.args[words[0]] = words[1]
	case statement == "tensor" && len(words) == 6:
		var t *tensorData
		t, err = parseTensor(words)
		c.tensors = append(c.tensors, t)
	case statement == "expect" && len(words) == 3:
		t := c.tensor(words[0])
		if t == nil {
			return fmt.Errorf("there is no tensor %s", words[0])
		}
		if t.ulps, err = strconv.ParseUint(words[1], 10, 64); err != nil {
			return err
		}
		t.expected, err = hex.DecodeString(words[2])
		if err == nil && len(t.expected) != len(t.memory) {
			err = fmt.Errorf("%s has another size", t.field)
		}
	case statement == "reject" && len(words) == 2:
		var code int
		code, err = strconv.Atoi(words[0])
		c.rejectCode, c.rejectWord = tenon.Code(code), words[1]
	default:
		err = fmt.Errorf("%q with %d words", statement, len(words))
	}
	return err
}

func (c *testCase) tensor(field string) *tensorData {
	for _, t := range c.tensors {
		if t.field == field {
			return t
		}
	}
	return nil
}

var dtypes = map[string]tenon.DType{
	"float32":       tenon.Float32Type,
	"float16":       tenon.Float16Type,
	"bfloat16":      tenon.BFloat16Type,
	"float8_e4m3fn": tenon.Float8Type,
	"int32":         tenon.Int32Type,
	"int64":         tenon.Int64Type,
	"uint8":         tenon.UInt8Type,
}

func parseTensor(words []string) (t *tensorData, err error) {
	t = &tensorData{field: words[0]}
	var known bool
	if t.dtype, known = dtypes[words[1]]; !known {
		return nil, fmt.Errorf("unknown dtype %s", words[1])
	}
	if t.shape, err = parseList(words[2]); err != nil {
		return nil, err
	}
	if words[3] != "-" {
		if t.strides, err = parseList(words[3]); err != nil {
			return nil, err
		}
	}
	if t.byteOffset, err = strconv.ParseUint(words[4], 10, 64); err != nil {
		return nil, err
	}
	t.memory, err = hex.DecodeString(words[5])
	t.expected = t.memory
	return t, err
}

func parseList(text string) ([]int64, error) {
	var list []int64
	for _, word := range strings.Split(text, ",") {
		n, err := strconv.ParseInt(word, 10, 64)
		if err != nil {
			return nil, err
		}
		list = append(list, n)
	}
	return list, nil
}

// check compares the memory after the call with what is expected.
func (t *tensorData) check(actual []byte) error {
	width := t.dtype.Size()
	actual = append([]byte(nil), actual...)
	if t.ulps > 0 {
		for _, at := range t.elementOffsets() {
			got, want := actual[at:at+width], t.expected[at:at+width]
			if distance(got, want) <= t.ulps {
				copy(got, want)
			}
		}
	}
	for i := range actual {
		if actual[i] != t.expected[i] {
			at := i / width * width
			return fmt.Errorf("%s: element %d of its memory is %x, expected %x within %d ulps",
				t.field, i/width, actual[at:at+width], t.expected[at:at+width], t.ulps)
		}
	}
	return nil
}

// elementOffsets is where in the memory each element begins.
func (t *tensorData) elementOffsets() []int {
	offsets := []int{int(t.byteOffset)}
	compact := int64(1)
	for dim := len(t.shape) - 1; dim >= 0; dim-- {
		stride := compact
		if t.strides != nil {
			stride = t.strides[dim]
		}
		var next []int
		for i := int64(0); i < t.shape[dim]; i++ {
			for _, at := range offsets {
				next = append(next, at+int(i*stride)*t.dtype.Size())
			}
		}
		offsets = next
		compact *= t.shape[dim]
	}
	return offsets
}

// distance is how many representable values two floats are apart.
func distance(a, b []byte) uint64 {
	x, y := ordinal(a), ordinal(b)
	if x < y {
		x, y = y, x
	}
	return uint64(x - y)
}

// ordinal is a float's place among all floats of its width.
func ordinal(littleEndian []byte) int64 {
	wide := make([]byte, 8)
	copy(wide[8-len(littleEndian):], littleEndian)
	shift := 64 - 8*len(littleEndian)
	value := int64(binary.LittleEndian.Uint64(wide)) // in the upper bytes
	if value < 0 {
		value = -(value & (1<<63 - 1))
	}
	return value >> shift
}

// tokens reads a compact int32 tensor.
func tokens(memory []byte) []int32 {
	list := make([]int32, len(memory)/4)
	_ = binary.Read(bytes.NewReader(memory), binary.LittleEndian, list)
	return list
}
