#include "engine/weight_upload.h"

#include <algorithm>
#include <cstring>

#include "engine/file.h"
#include "ops/core/cpu_thread_pool.h"
#include "ops/core/device_info.h"

namespace tenon {
namespace {

// More threads than this do not read the page cache faster.
constexpr int kMaxThreads = 8;
// A thread's share of a chunk.
constexpr int64_t kGrainBytes = int64_t{1} << 20;

// Bytes [begin, end) of a part, rows following one another, to `to`.
void CopyPart(const WeightPart& part, int64_t begin, int64_t end, char* to) {
  const char* source = part.source.As<const char>();
  const int64_t row_bytes = part.row_bytes();
  const int64_t stride_bytes =
      part.source.stride[0] * static_cast<int64_t>(DTypeSize(part.dtype));
  if (part.is_vector || stride_bytes == row_bytes) {
    std::memcpy(to, source + begin, static_cast<size_t>(end - begin));
    return;
  }
  while (begin < end) {
    const int64_t row = begin / row_bytes;
    const int64_t in_row = begin - row * row_bytes;
    const int64_t count = std::min(row_bytes - in_row, end - begin);
    std::memcpy(to, source + row * stride_bytes + in_row,
                static_cast<size_t>(count));
    begin += count;
    to += count;
  }
}

// Calls visit(part, begin, end) for the bytes of every part that lie in
// [begin, end) of the packed memory; begin and end count from the part's start.
template <class Visit>
void ForEachPartIn(const std::vector<WeightPart>& parts, int64_t begin,
                   int64_t end, Visit&& visit) {
  auto part = std::upper_bound(
      parts.begin(), parts.end(), begin,
      [](int64_t at, const WeightPart& p) { return at < p.offset; });
  if (part != parts.begin()) --part;
  for (; part != parts.end() && part->offset < end; ++part) {
    const int64_t first = std::max(begin - part->offset, int64_t{0});
    const int64_t last = std::min(end - part->offset, part->bytes());
    if (first < last) visit(*part, first, last);
  }
}

// Makes bytes [begin, end) of the packed memory in `to`. What lies between
// parts is zeroed, so that no stale bytes of the host go to the device.
void FillChunk(const std::vector<WeightPart>& parts, int64_t begin, int64_t end,
               char* to, Stream cpu) {
  ParallelFor(cpu, end - begin, kGrainBytes, [&](int64_t first, int64_t last) {
    int64_t filled = begin + first;
    const auto zero_to = [&](int64_t at) {
      std::memset(to + (filled - begin), 0, static_cast<size_t>(at - filled));
      filled = at;
    };
    ForEachPartIn(parts, begin + first, begin + last,
                  [&](const WeightPart& part, int64_t from, int64_t until) {
                    zero_to(part.offset + from);
                    CopyPart(part, from, until, to + (filled - begin));
                    filled = part.offset + until;
                  });
    zero_to(begin + last);
  });
}

// A disk reads ahead what the next but one chunk will need.
void PrefetchChunk(const std::vector<WeightPart>& parts, int64_t begin,
                   int64_t end) {
  ForEachPartIn(
      parts, begin, end,
      [](const WeightPart& part, int64_t from, int64_t until) {
        const int64_t row_bytes = part.row_bytes();
        const int64_t stride_bytes =
            part.source.stride[0] * static_cast<int64_t>(DTypeSize(part.dtype));
        const int64_t first = from / row_bytes * stride_bytes;
        const int64_t last = (until - 1) / row_bytes * stride_bytes + row_bytes;
        Prefetch(part.source.As<char>() + first,
                 static_cast<size_t>(last - first));
      });
}

// A pinned buffer and the stream that carries it to the device.
struct Staging {
  Buffer buffer;
  OwnedStream stream;

  Status Create(Device device, int64_t bytes) {
    StatusOr<Buffer> memory = Buffer::Allocate(
        device, static_cast<size_t>(bytes), MemoryKind::kPinned);
    if (!memory.ok()) return memory.status();
    buffer = *std::move(memory);
    StatusOr<OwnedStream> owned = OwnedStream::Create(device, 1);
    if (!owned.ok()) return owned.status();
    stream = *std::move(owned);
    return Status();
  }
};

Status CopyChunks(const std::vector<WeightPart>& parts, int64_t total_bytes,
                  char* base, Device device, int64_t chunk_bytes, Stream cpu,
                  Staging (&staging)[2], const LoadProgress& progress) {
  int turn = 0;
  PrefetchChunk(parts, 0, 2 * chunk_bytes);
  for (int64_t begin = 0; begin < total_bytes; begin += chunk_bytes) {
    const int64_t end = std::min(begin + chunk_bytes, total_bytes);
    PrefetchChunk(parts, end + chunk_bytes, end + 2 * chunk_bytes);
    Staging& s = staging[turn];
    turn = 1 - turn;
    TENON_RETURN_IF_ERROR(Synchronize(device, s.stream.get()));
    char* memory = static_cast<char*>(s.buffer.data());
    FillChunk(parts, begin, end, memory, cpu);
    TENON_RETURN_IF_ERROR(CopyMemory(base + begin, device, memory, Device(),
                                     static_cast<size_t>(end - begin),
                                     s.stream.get()));
    if (end < total_bytes) {
      TENON_RETURN_IF_ERROR(ReportProgress(progress, end, total_bytes));
    }
  }
  return Status();
}

}  // namespace

Status UploadParts(const std::vector<WeightPart>& parts, int64_t total_bytes,
                   void* base, Device device, int64_t chunk_bytes,
                   const LoadProgress& progress) {
  const StatusOr<DeviceInfo> host = GetDeviceInfo(Device());
  if (!host.ok()) return host.status();
  StatusOr<OwnedStream> cpu =
      OwnedStream::Create(Device(), std::min(host->num_cores, kMaxThreads));
  if (!cpu.ok()) return cpu.status();
  Staging staging[2];
  for (Staging& s : staging) {
    TENON_RETURN_IF_ERROR(s.Create(device, std::min(chunk_bytes, total_bytes)));
  }
  Status status =
      CopyChunks(parts, total_bytes, static_cast<char*>(base), device,
                 chunk_bytes, cpu->get(), staging, progress);
  // Also after an error: pinned memory may still be on its way.
  for (Staging& s : staging) {
    const Status done = Synchronize(device, s.stream.get());
    if (status.ok()) status = done;
  }
  TENON_RETURN_IF_ERROR(status);
  return ReportProgress(progress, total_bytes, total_bytes);
}

}  // namespace tenon
