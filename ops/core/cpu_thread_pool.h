#ifndef TENON_OPS_CORE_CPU_THREAD_POOL_H_
#define TENON_OPS_CORE_CPU_THREAD_POOL_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "ops/core/stream.h"

namespace tenon {

// Threads that share the loops of CPU ops. One loop runs at a time; concurrent
// callers take turns. Workers spin briefly after a loop, since the next op of a
// step follows at once, and then sleep.
class CpuThreadPool {
 public:
  // num_threads counts the caller of Run, so 1 makes no thread. 0: one per CPU
  // that this process may use. Where the system refuses more threads, the pool
  // works with those it got.
  explicit CpuThreadPool(int num_threads);
  ~CpuThreadPool();
  CpuThreadPool(const CpuThreadPool&) = delete;
  CpuThreadPool& operator=(const CpuThreadPool&) = delete;

  int num_threads() const;

  // Calls body(context, begin, end) for consecutive pieces of [0, count), each
  // `grain` long but the last, on all threads, and returns when all are done.
  // Which thread gets which piece is not fixed, so an op's result must not
  // depend on it: no piece may share an accumulator with another. The body must
  // not call Run of the same pool.
  void Run(int64_t count, int64_t grain,
           void (*body)(void* context, int64_t begin, int64_t end),
           void* context);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Runs body(begin, end) over pieces of [0, count) on the stream's threads, or
// on the caller alone where it has none.
template <class Body>
void ParallelFor(const Stream& stream, int64_t count, int64_t grain,
                 Body&& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (stream.cpu == nullptr || count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  using BodyType = std::remove_reference_t<Body>;
  stream.cpu->Run(
      count, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<BodyType*>(context))(begin, end);
      },
      const_cast<std::remove_const_t<BodyType>*>(&body));
}

// Threads that ParallelFor will use on this stream.
inline int NumThreads(const Stream& stream) {
  return stream.cpu == nullptr ? 1 : stream.cpu->num_threads();
}

}  // namespace tenon

#endif  // TENON_OPS_CORE_CPU_THREAD_POOL_H_
