package tenon

// #include <stdlib.h>
// #include <string.h>
// #include <tenon/tenon.h>
import "C"

import "unsafe"

// allocate returns zeroed C memory, aligned as ops want it.
func allocate(size uint64) unsafe.Pointer {
	const alignment = 64
	size = (size/alignment + 1) * alignment
	memory := C.aligned_alloc(alignment, C.size_t(size))
	if memory == nil {
		panic("tenon: out of memory")
	}
	return C.memset(memory, 0, C.size_t(size))
}

// An arena is C memory for one call.
type arena struct{ blocks []unsafe.Pointer }

func (a *arena) free() {
	for _, block := range a.blocks {
		C.free(block)
	}
}

// arenaSlice returns zeroed elements in the arena.
func arenaSlice[T any](a *arena, length int) []T {
	var element T
	block := allocate(uint64(length) * uint64(unsafe.Sizeof(element)))
	a.blocks = append(a.blocks, block)
	return unsafe.Slice((*T)(block), length)
}

// arenaCopy returns a copy in the arena.
func arenaCopy[T any](a *arena, source []T) []T {
	slice := arenaSlice[T](a, len(source))
	copy(slice, source)
	return slice
}

// A Workspace is scratch memory of ops, until Free.
type Workspace struct {
	data unsafe.Pointer
	size C.uint64_t
}

// NewWorkspace allocates a workspace on the CPU.
func NewWorkspace(size uint64) *Workspace {
	return &Workspace{allocate(size), C.uint64_t(size)}
}

// WorkspaceAt is a workspace in memory of the caller, also of a CUDA device.
// Free does not free that memory: there is no need to call it.
func WorkspaceAt(data unsafe.Pointer, size uint64) Workspace {
	return Workspace{data, C.uint64_t(size)}
}

// Free ends a workspace of NewWorkspace.
func (w *Workspace) Free() {
	C.free(w.data)
	*w = Workspace{}
}
