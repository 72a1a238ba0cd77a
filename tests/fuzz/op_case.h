#ifndef TENON_TESTS_FUZZ_OP_CASE_H_
#define TENON_TESTS_FUZZ_OP_CASE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>

#include "abi/tenon.h"
#include "tests/fuzz/input.h"

// One call of an op, in memory of which every piece ends where it says: args
// struct, DLTensors, their shape and stride arrays, data, workspace.

namespace tenon::fuzz {

enum class FieldKind {
  kIn,  // tensors
  kOptionalIn,
  kOut,  // written; some are read, too
  kOptionalOut,
  kInt32,
  kInt64,
  kFlags,
  kReserved,
  kFloat,
  kWorkspace,
  kWorkspaceSize,
};

// A field of an args struct, but struct_size.
struct Field {
  bool is_tensor() const { return kind <= FieldKind::kOptionalOut; }
  bool is_out() const {
    return kind == FieldKind::kOut || kind == FieldKind::kOptionalOut;
  }

  FieldKind kind;
  const char* name;
  size_t offset;
  // Whether every element of the tensor is used. Parts that are not may overlap
  // with other tensors.
  bool is_used_whole = true;
};

class OpCase;

// What the fuzzer knows of an op.
struct Op {
  const char* name;        // of the function
  const char* query_name;  // of its workspace query, or null
  size_t args_size;
  std::vector<Field> fields;
  // Two tensors that may be the same memory; null: none.
  const char* alias_out;
  const char* alias_in;
  // Makes a valid call of a small, awkward shape.
  void (*build)(Input& in, OpCase& op_case);
  int32_t (*run)(tenon_context context, const void* args, void* stream,
                 tenon_error* error);
  int32_t (*query)(tenon_context context, const void* args, uint64_t* bytes,
                   tenon_error* error);
};

const std::vector<Op>& Ops();

// Bytes of the heap, exactly as many as asked for, aligned for any use; and
// what they were when the call began.
class Memory {
 public:
  explicit Memory(size_t size)
      : data_(static_cast<uint8_t*>(::operator new(size, kAlignment))),
        size_(size),
        before_(size + 1) {}  // never without memory
  ~Memory() { ::operator delete(data_, kAlignment); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  bool Contains(uint64_t address, uint64_t bytes) const;
  void Snapshot() { std::memcpy(before_.data(), data_, size_); }
  // Takes bytes that may have been written for unchanged.
  void Forget(size_t offset, size_t bytes) {
    std::memcpy(&before_[offset], data_ + offset, bytes);
  }
  bool IsUnchanged() const {
    return std::memcmp(before_.data(), data_, size_) == 0;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};

  uint8_t* data_;
  size_t size_;
  std::vector<uint8_t> before_;
};

// A DLTensor, and how it was when it was valid.
struct Tensor {
  std::unique_ptr<DLTensor> dl;
  std::unique_ptr<int64_t[]> shape;
  std::unique_ptr<int64_t[]> strides;
  std::vector<int64_t> valid_shape;
  DLTensor valid;  // its strides: null or not
  std::vector<int64_t> valid_strides;

  void SetShape(const std::vector<int64_t>& values);
  void SetStrides(const std::vector<int64_t>& values);
  void Restore();
};

enum class Layout { kAny, kCompact };

class OpCase {
 public:
  OpCase(const Op& op, Input& in);

  // For Op::build. Tensors start with random values; integers are in [low,
  // high].
  const DLTensor* Add(DLDataType dtype, const std::vector<int64_t>& shape,
                      Layout layout = Layout::kAny);
  const DLTensor* AddInts(DLDataType dtype, const std::vector<int64_t>& shape,
                          int64_t low, int64_t high);
  void SetInt(const DLTensor* tensor, int64_t index, int64_t value);
  template <class Args>
  void SetArgs(const Args& value) {
    args = std::make_unique<Memory>(sizeof(value));
    std::memcpy(args->data(), &value, sizeof(value));
  }

  // The args struct, of this size now.
  void ResizeArgs(size_t size);
  uint32_t struct_size() const;
  void set_struct_size(uint32_t size);
  // A field's value: as the library reads it, zero behind the end.
  template <class T>
  T Get(const Field& field) const {
    T value = {};
    const size_t end = std::min<size_t>(args->size(), struct_size());
    if (field.offset + sizeof(T) <= end) {
      std::memcpy(&value, args->data() + field.offset, sizeof(T));
    }
    return value;
  }
  template <class T>
  void Set(const Field& field, T value) {
    if (field.offset + sizeof(T) <= args->size()) {
      std::memcpy(args->data() + field.offset, &value, sizeof(T));
    }
  }
  const Field* Find(FieldKind kind) const;  // null: there is none
  // The tensors that the args point to, with the names of the fields.
  struct Given {
    const Field* field;
    Tensor* tensor;
  };
  std::vector<Given> GivenTensors();

  // Makes what the args claim of memory true, where it looks valid; see
  // op_case.cc.
  void MakeViewsTrue();
  // Gives the args a workspace of `bytes`, or none where that is too much.
  void ProvideWorkspace(uint64_t bytes);

  // Remembers all memory; compares it.
  void Snapshot();
  bool IsUnchanged() const;
  // Whether bytes outside the tensors that the op writes, and its workspace,
  // are as they were.
  bool HasNoStrayWrites();

  const Op& op;
  tenon_context context = 0;
  void* stream = nullptr;
  bool has_args = true;
  std::unique_ptr<Memory> args;
  std::vector<Tensor> tensors;
  std::vector<std::unique_ptr<Memory>> buffers;
  Memory* workspace = nullptr;  // one of `buffers`

 private:
  uint8_t* NewBuffer(size_t size, DLDataType dtype, int64_t low, int64_t high);
  const DLTensor* AddTensor(DLDataType dtype, const std::vector<int64_t>& shape,
                            Layout layout, int64_t low, int64_t high);
  void MakeTrue(Tensor* tensor, bool is_out);

  Input& in_;
};

// What a DLTensor describes, by the rules of tenon.h; written without the
// library's code.
struct Extent {
  bool is_valid = false;  // the rules for all tensors hold
  bool is_empty = false;
  bool on_cpu = false;
  uint64_t element = 0;  // bytes of one
  uint64_t begin = 0;    // address of the first element
  uint64_t bytes = 0;    // to past the last one
  int64_t elements = 0;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};
Extent Describe(const DLTensor& tensor);

inline constexpr uint64_t kMaxSmallBytes = 1 << 16;
inline constexpr int64_t kMaxSmallElements = 1 << 16;

// Whether elements can be looked at one by one: neither is there too much
// memory, nor are there too many views of the same.
inline bool IsSmall(const Extent& extent) {
  return extent.bytes <= kMaxSmallBytes && extent.elements <= kMaxSmallElements;
}

// Calls body(address) for every element of a valid tensor.
void ForEachElement(const Extent& extent,
                    const std::function<void(uint64_t)>& body);

// Whether the rules that hold for all ops say that the call must fail.
bool MustFail(OpCase& op_case, bool context_is_valid);

// A change to a call.
struct Mutation {
  bool may_fail = true;  // not where only the content of tensors changed
  // Of a number in the args.
  const Field* field = nullptr;
  int64_t value = 0;
};
Mutation Mutate(OpCase& op_case, Input& in);
// Of the workspace, once it is there.
void MutateWorkspace(OpCase& op_case, Input& in);

}  // namespace tenon::fuzz

#endif  // TENON_TESTS_FUZZ_OP_CASE_H_
