package tenon

// #include <stdlib.h>
// #include <tenon/tenon.h>
import "C"

import (
	"fmt"
	"math"
	"unsafe"
)

// A DType is the type of a tensor's elements.
type DType struct{ code, bits uint8 }

var (
	Float32Type  = DType{C.TENON_DL_FLOAT, 32}
	Float16Type  = DType{C.TENON_DL_FLOAT, 16}
	BFloat16Type = DType{C.TENON_DL_BFLOAT, 16}
	Float8Type   = DType{C.TENON_DL_FLOAT8_E4M3FN, 8} // e4m3fn
	Int32Type    = DType{C.TENON_DL_INT, 32}
	Int64Type    = DType{C.TENON_DL_INT, 64}
	UInt8Type    = DType{C.TENON_DL_UINT, 8}
)

// Size is the bytes of an element.
func (d DType) Size() int { return int(d.bits) / 8 }

// Float16, BFloat16 and Float8 are the bits of such numbers.
type (
	Float16  uint16
	BFloat16 uint16
	Float8   uint8
)

// An Element is a type that tensors are made of.
type Element interface {
	float32 | Float16 | BFloat16 | Float8 | int32 | int64 | uint8
}

func dtypeOf[T Element]() DType {
	var element T
	switch any(element).(type) {
	case float32:
		return Float32Type
	case Float16:
		return Float16Type
	case BFloat16:
		return BFloat16Type
	case Float8:
		return Float8Type
	case int32:
		return Int32Type
	case int64:
		return Int64Type
	}
	return UInt8Type
}

// A Tensor is a DLTensor in C memory, until Free.
type Tensor struct {
	raw    *C.DLTensor // with shape and strides behind it
	memory []byte      // nil for memory of the caller
	owned  bool        // whether Free frees that memory too
}

// New allocates a compact tensor of zeros on the CPU. Like make, it panics when
// a size is negative.
func New[T Element](shape ...int64) *Tensor {
	dtype := dtypeOf[T]()
	size := int64(dtype.Size())
	for _, n := range shape {
		if n < 0 || n > 0 && size > math.MaxInt64/n {
			panic(fmt.Sprintf("tenon: a tensor of shape %v", shape))
		}
		size *= n
	}
	data := allocate(uint64(size))
	t := At(data, CPU, 0, dtype, shape, nil, 0)
	t.memory = unsafe.Slice((*byte)(data), size)
	t.owned = true
	return t
}

// FromSlice is New with a copy of data, which must have as many elements.
func FromSlice[T Element](data []T, shape ...int64) *Tensor {
	t := New[T](shape...)
	if len(Data[T](t)) != len(data) {
		panic(fmt.Sprintf("tenon: %d elements for a tensor of shape %v", len(data), shape))
	}
	copy(Data[T](t), data)
	return t
}

// Data is the memory of a tensor of New, FromSlice or View, as it is: in the
// order of the strides. It is gone after Free.
func Data[T Element](t *Tensor) []T {
	dtype := dtypeOf[T]()
	if t.raw.dtype != dtype.raw() {
		panic(fmt.Sprintf("tenon: %v is not the tensor's dtype", dtype))
	}
	return unsafe.Slice((*T)(t.raw.data), len(t.memory)/dtype.Size())
}

// View is a tensor on the memory of t from element offset on, with strides in
// elements. Like slicing, it panics where it reaches outside. It is freed by its
// own Free, before t.
func (t *Tensor) View(offset int64, shape, strides []int64) *Tensor {
	dtype := DType{uint8(t.raw.dtype.code), uint8(t.raw.dtype.bits)}
	size := int64(dtype.Size())
	extent, valid := extent(shape, strides)
	if offset < 0 || !valid || extent > int64(len(t.memory))/size-offset {
		panic(fmt.Sprintf("tenon: a view at %d of shape %v, strides %v", offset, shape, strides))
	}
	v := At(unsafe.Add(t.raw.data, offset*size), CPU, 0, dtype, shape, strides, 0)
	v.memory = t.memory[offset*size : (offset+extent)*size]
	return v
}

// extent is how many elements lie from the first to the last one.
func extent(shape, strides []int64) (count int64, valid bool) {
	if len(shape) != len(strides) {
		return 0, false
	}
	empty := false
	count = 1
	for i, n := range shape {
		stride := strides[i]
		if n < 0 || stride < 0 {
			return 0, false
		}
		empty = empty || n == 0
		if n > 1 {
			if stride > (math.MaxInt64-count)/(n-1) {
				return 0, false
			}
			count += (n - 1) * stride
		}
	}
	if empty {
		return 0, true
	}
	return count, true
}

// At is a tensor on memory of the caller that outlives it: C memory or a
// device's, never Go's. strides may be nil. Nothing is checked.
func At(data unsafe.Pointer, device DeviceType, deviceIndex int, dtype DType,
	shape, strides []int64, byteOffset uint64) *Tensor {
	const header = C.sizeof_DLTensor
	raw := (*C.DLTensor)(allocate(uint64(header + 8*(len(shape)+len(strides)))))
	dims := unsafe.Slice((*int64)(unsafe.Add(unsafe.Pointer(raw), header)), len(shape)+len(strides))
	copy(dims, shape)
	copy(dims[len(shape):], strides)
	raw.data = data
	raw.device.device_type = C.DLDeviceType(device)
	raw.device.device_id = C.int32_t(deviceIndex)
	raw.ndim = C.int32_t(len(shape))
	raw.dtype = dtype.raw()
	if len(shape) > 0 {
		raw.shape = (*C.int64_t)(&dims[0])
	}
	if len(strides) > 0 {
		raw.strides = (*C.int64_t)(&dims[len(shape)])
	}
	raw.byte_offset = C.uint64_t(byteOffset)
	return &Tensor{raw: raw}
}

// Free ends the tensor.
func (t *Tensor) Free() {
	if t.owned {
		C.free(t.raw.data)
	}
	C.free(unsafe.Pointer(t.raw))
	*t = Tensor{}
}

func (t *Tensor) pointer() *C.DLTensor {
	if t == nil {
		return nil
	}
	return t.raw
}

func (d DType) raw() C.DLDataType {
	return C.DLDataType{code: C.uint8_t(d.code), bits: C.uint8_t(d.bits), lanes: 1}
}
