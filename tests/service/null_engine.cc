// A Session that takes no time, linked in place of the engine's, so that what
// is measured is the service alone: as beside an engine on a GPU, which leaves
// the CPU's caches as they are. Has what the service calls; anything more is an
// error of the linker.

#include <memory>
#include <utility>
#include <vector>

#include "engine/session.h"

namespace tenon {

struct Session::Impl {
  std::shared_ptr<const Model> model;
  SessionOptions options;
  uint32_t num_made = 0;
};

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() = default;

StatusOr<std::unique_ptr<Session>> Session::Create(
    std::shared_ptr<const Model> model, const SessionOptions& options) {
  auto impl = std::make_unique<Impl>();
  impl->model = std::move(model);
  impl->options = options;
  return std::unique_ptr<Session>(new Session(std::move(impl)));
}

StatusOr<SequenceId> Session::CreateSequence() {
  return SequenceId{impl_->num_made++, 1};
}

StatusOr<SequenceId> Session::ForkSequence(SequenceId) {
  return CreateSequence();
}

Status Session::ReleaseSequence(SequenceId) { return Status(); }

Status Session::Step(const std::vector<StepRow>& rows,
                     std::vector<StepRowResult>* results, StepStats* stats) {
  const int32_t vocab = impl_->model->config.vocab_size;
  results->resize(rows.size());
  stats->rows = static_cast<int32_t>(rows.size());
  stats->tokens = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const StepRow& row = rows[i];
    stats->tokens += row.num_tokens;
    (*results)[i] = StepRowResult();
    (*results)[i].token = (row.tokens[row.num_tokens - 1] + 1) % vocab;
  }
  return Status();
}

const Model& Session::model() const { return *impl_->model; }
const SessionOptions& Session::options() const { return impl_->options; }
int64_t Session::num_free_pages() const { return impl_->options.num_pages; }
bool Session::is_broken() const { return false; }

}  // namespace tenon
