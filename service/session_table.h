#ifndef TENON_SERVICE_SESSION_TABLE_H_
#define TENON_SERVICE_SESSION_TABLE_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "service/failure.h"
#include "service/proto/decode.pb.h"
#include "service/sequence_table.h"

namespace tenon::service {

// What a client's steps count: each takes effect exactly once.
struct ClientSession {
  struct Reply {
    uint64_t step_id = 0;
    uint64_t digest = 0;
    v1::StepResponse response;
  };

  uint64_t id = 0;
  uint64_t last_step = 0;
  std::deque<Reply> replies;  // of the last steps, the newest at the end
  std::vector<Sequence*> sequences;
  std::chrono::milliseconds lease{0};  // of an empty session
  Time lease_end;
  uint64_t batch = 0;  // the last batch with a step of this session

  // What to do with a step: run it (OK, null), repeat a reply (OK), or refuse
  // it.
  Failure Look(uint64_t step_id, uint64_t digest,
               const v1::StepResponse** reply) const;
  void Remember(uint64_t step_id, uint64_t digest,
                const v1::StepResponse& response, int32_t capacity);
};

// Of everything in the request that changes what it does.
uint64_t Digest(const v1::StepRequest& request);

class SessionTable {
 public:
  SessionTable(uint64_t epoch, int32_t capacity)
      : epoch_(epoch), capacity_(capacity) {}

  // Null when there is no room.
  ClientSession* Add();
  ClientSession* Find(uint64_t id);
  void Remove(uint64_t id) { sessions_.erase(id); }
  int32_t size() const { return static_cast<int32_t>(sessions_.size()); }
  std::vector<uint64_t> Ids() const;

 private:
  uint64_t epoch_;
  int32_t capacity_;
  std::unordered_map<uint64_t, std::unique_ptr<ClientSession>> sessions_;
};

}  // namespace tenon::service

#endif  // TENON_SERVICE_SESSION_TABLE_H_
