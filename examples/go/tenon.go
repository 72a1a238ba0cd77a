// Package tenon is a Go interface to libtenon.so.
//
// # Memory
//
// cgo forbids passing C a pointer to Go memory that itself holds Go pointers,
// and Go 1.19 has no runtime.Pinner to allow it. Tenon's structs point to
// tensors, which point to data. So tensors and workspaces live in C memory,
// from New to Free, and Go sees their elements as slices of it (see Data):
// nothing is copied for a call, and no struct that C sees points into Go memory.
// The collector does not know of that memory: using a slice after Free is as
// wrong as in C.
//
// The inputs of Session.Step are small and are copied into C memory.
package tenon

// #cgo LDFLAGS: -ltenon
// #include <stdlib.h>
// #include <tenon/tenon.h>
import "C"

import (
	"fmt"
	"sync"
	"unsafe"
)

// A Code is a status code of the library; the values are those of gRPC.
type Code int32

const (
	OK                 Code = C.TENON_OK
	Cancelled          Code = C.TENON_CANCELLED
	Unknown            Code = C.TENON_UNKNOWN
	InvalidArgument    Code = C.TENON_INVALID_ARGUMENT
	DeadlineExceeded   Code = C.TENON_DEADLINE_EXCEEDED
	NotFound           Code = C.TENON_NOT_FOUND
	AlreadyExists      Code = C.TENON_ALREADY_EXISTS
	PermissionDenied   Code = C.TENON_PERMISSION_DENIED
	ResourceExhausted  Code = C.TENON_RESOURCE_EXHAUSTED
	FailedPrecondition Code = C.TENON_FAILED_PRECONDITION
	Aborted            Code = C.TENON_ABORTED
	OutOfRange         Code = C.TENON_OUT_OF_RANGE
	Unimplemented      Code = C.TENON_UNIMPLEMENTED
	Internal           Code = C.TENON_INTERNAL
	Unavailable        Code = C.TENON_UNAVAILABLE
	DataLoss           Code = C.TENON_DATA_LOSS
	Unauthenticated    Code = C.TENON_UNAUTHENTICATED
)

// String is the code's name, such as "INVALID_ARGUMENT".
func (c Code) String() string {
	return C.GoString(C.tenon_status_name(C.int32_t(c)))
}

// An Error is what functions of this package fail with.
type Error struct {
	Code    Code
	Message string // names function, field and value
}

func (e *Error) Error() string {
	return fmt.Sprintf("%v: %s", e.Code, e.Message)
}

func invalidArgument(format string, args ...any) error {
	return &Error{InvalidArgument, fmt.Sprintf(format, args...)}
}

// Places for errors, so that not every call allocates one.
var errorPool = sync.Pool{New: func() any {
	return &C.tenon_error{struct_size: C.sizeof_tenon_error}
}}

// check calls a function of the library with a place for its error.
func check(call func(*C.tenon_error) C.int32_t) error {
	e := errorPool.Get().(*C.tenon_error)
	defer errorPool.Put(e)
	code := call(e)
	if code == C.TENON_OK {
		return nil
	}
	return &Error{Code(code), C.GoString(&e.message[0])}
}

// Version is the library's release, such as "0.1.0".
func Version() string {
	return C.GoString(C.tenon_version_string())
}

// ABIVersion is the ABI of the library that was found at run time.
func ABIVersion() (major, minor int) {
	version := C.tenon_abi_version()
	return int(version >> 16), int(version & 0xffff)
}

// CheckVersion fails if that library is older than the header that this package
// was built with. Programs call it first.
func CheckVersion() error {
	major, minor := ABIVersion()
	if major == C.TENON_ABI_MAJOR && minor >= C.TENON_ABI_MINOR {
		return nil
	}
	return &Error{Unavailable, fmt.Sprintf(
		"libtenon.so has ABI %d.%d; this program needs %d.%d",
		major, minor, C.TENON_ABI_MAJOR, C.TENON_ABI_MINOR)}
}

// A DeviceType is a kind of device.
type DeviceType int32

const (
	CPU  DeviceType = C.TENON_DEVICE_CPU
	CUDA DeviceType = C.TENON_DEVICE_CUDA
)

// DeviceCount is the number of devices of a type that can be used.
func DeviceCount(device DeviceType) (int, error) {
	var count C.int32_t
	err := check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_device_count(C.int32_t(device), &count, e)
	})
	return int(count), err
}

// A Context is what ops run in: the threads of a CPU, or a CUDA device. Any
// number of goroutines may use one.
type Context struct {
	handle C.tenon_context
	stream unsafe.Pointer
}

// ContextOptions are tenon_context_options.
type ContextOptions struct {
	Device      DeviceType // 0: CPU
	DeviceIndex int
	NumThreads  int // CPU; 0: one for each usable CPU
}

// NewContext creates a context, until Close.
func NewContext(options ContextOptions) (*Context, error) {
	raw := C.tenon_context_options{
		struct_size:  C.sizeof_tenon_context_options,
		device_type:  deviceOrCPU(options.Device),
		device_index: C.int32_t(options.DeviceIndex),
		num_threads:  C.int32_t(options.NumThreads),
	}
	c := new(Context)
	err := check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_context_create(&raw, &c.handle, e)
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

func deviceOrCPU(device DeviceType) C.int32_t {
	if device == 0 {
		device = CPU
	}
	return C.int32_t(device)
}

// SingleThreaded is a context whose CPU ops run on the calling thread alone.
func SingleThreaded() *Context { return new(Context) }

// OnStream is the same context with ops enqueued on a cudaStream_t. Tensors and
// workspaces must then live until the stream is done with them.
func (c *Context) OnStream(stream unsafe.Pointer) *Context {
	return &Context{c.handle, stream}
}

// SetMoEKernels gives the sizes of MoE's expert kernels on this GPU: the text of
// a file of tools/tune. Once for a context.
func (c *Context) SetMoEKernels(json string) error {
	text := C.CString(json)
	defer C.free(unsafe.Pointer(text))
	return check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_context_set_moe_kernels(c.handle, text, e)
	})
}

// Close ends the context. Closing it again does nothing.
func (c *Context) Close() error {
	handle := c.handle
	c.handle = 0
	return check(func(e *C.tenon_error) C.int32_t {
		return C.tenon_context_destroy(handle, e)
	})
}
