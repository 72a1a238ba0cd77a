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

int64_t SourceRowBytes(const WeightPart& part) {
  return part.cols.size * static_cast<int64_t>(DTypeSize(part.source.dtype));
}

// Bytes [begin, end) of the rank's row, of which `source` is the whole.
void CopyRow(const Share& cols, int64_t element, const char* source,
             int64_t begin, int64_t end, char* to) {
  const int64_t in_order = (cols.count - cols.wrapped) * element;
  const int64_t wrapped = (cols.size - cols.wrapped) * element;
  while (begin < end) {
    int64_t stop = end;
    const char* from = nullptr;
    if (begin < in_order) {
      stop = std::min(end, in_order);
      from = source + (cols.first + cols.wrapped) * element + begin;
    } else if (begin < wrapped) {
      stop = std::min(end, wrapped);
    } else {
      from = source + cols.first * element + (begin - wrapped);
    }
    const size_t count = static_cast<size_t>(stop - begin);
    if (from != nullptr) {
      std::memcpy(to, from, count);
    } else {
      std::memset(to, 0, count);
    }
    to += count;
    begin = stop;
  }
}

void CopyOnThisThread(const WeightPart& part, int64_t begin, int64_t end,
                      char* to) {
  const int64_t element = static_cast<int64_t>(DTypeSize(part.source.dtype));
  const int64_t row_bytes = SourceRowBytes(part);
  const int64_t stride_bytes = part.full_cols * element;
  const char* source = part.source.As<const char>();
  if (row_bytes == stride_bytes && part.rows.wrapped == 0) {
    std::memcpy(to, source + part.rows.first * stride_bytes + begin,
                static_cast<size_t>(end - begin));
    return;
  }
  while (begin < end) {
    const int64_t row = begin / row_bytes;
    const int64_t stop = std::min(end, (row + 1) * row_bytes);
    const int64_t whole_row = part.rows.WholeIndex(row);
    if (whole_row >= 0) {
      CopyRow(part.cols, element, source + whole_row * stride_bytes,
              begin - row * row_bytes, stop - row * row_bytes, to);
    } else {
      std::memset(to, 0, static_cast<size_t>(stop - begin));
    }
    to += stop - begin;
    begin = stop;
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
                    CopyOnThisThread(part, from, until, to + (filled - begin));
                    filled = part.offset + until;
                  });
    zero_to(begin + last);
  });
}

// A disk reads ahead what the next but one chunk will need.
void PrefetchChunk(const std::vector<WeightPart>& parts, int64_t begin,
                   int64_t end) {
  ForEachPartIn(parts, begin, end, PrefetchPart);
}

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

Status Staging::Create(Device device, int64_t bytes) {
  StatusOr<Buffer> memory =
      Buffer::Allocate(device, static_cast<size_t>(bytes), MemoryKind::kPinned);
  if (!memory.ok()) return memory.status();
  buffer = *std::move(memory);
  StatusOr<OwnedStream> owned = OwnedStream::Create(device, 1);
  if (!owned.ok()) return owned.status();
  stream = *std::move(owned);
  return Status();
}

StatusOr<OwnedStream> LoaderThreads() {
  const StatusOr<DeviceInfo> host = GetDeviceInfo(Device());
  if (!host.ok()) return host.status();
  return OwnedStream::Create(Device(), std::min(host->num_cores, kMaxThreads));
}

void CopyPart(const WeightPart& part, int64_t begin, int64_t end, char* to,
              Stream cpu) {
  ParallelFor(cpu, end - begin, kGrainBytes, [&](int64_t first, int64_t last) {
    CopyOnThisThread(part, begin + first, begin + last, to + first);
  });
}

void PrefetchPart(const WeightPart& part, int64_t begin, int64_t end) {
  const int64_t row_bytes = SourceRowBytes(part);
  const int64_t stride_bytes =
      part.full_cols * static_cast<int64_t>(DTypeSize(part.source.dtype));
  int64_t first = begin / row_bytes;
  int64_t last = (end - 1) / row_bytes;
  if (part.rows.wrapped > 0) {  // in another order: all of them
    first = 0;
    last = part.rows.count - 1;
  }
  Prefetch(part.source.As<char>() + (part.rows.first + first) * stride_bytes,
           static_cast<size_t>((last - first + 1) * stride_bytes));
}

Status UploadParts(const std::vector<WeightPart>& parts, int64_t total_bytes,
                   void* base, Device device, int64_t chunk_bytes,
                   const LoadProgress& progress) {
  StatusOr<OwnedStream> cpu = LoaderThreads();
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
