// Continues a prompt with a real model. Everything goes through
// engine::Session: chunked prefill, fork for a batch, one step per token.

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "engine/session.h"
#include "examples/generate/flags.h"

namespace tenon::examples {
namespace {

constexpr int32_t kByteVocab = 256;

double Seconds() {
  return std::chrono::duration<double>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Byte 0 begins a text, as in training; then one token per byte.
std::vector<int32_t> EncodeBytes(const std::string& text) {
  std::vector<int32_t> tokens = {0};
  for (unsigned char byte : text) tokens.push_back(byte);
  return tokens;
}

// `bazel run` starts in another folder than the caller's.
std::string CallersPath(const std::string& path, bool is_default) {
  const char* folder = std::getenv("BUILD_WORKING_DIRECTORY");
  if (is_default || folder == nullptr || path.empty() || path[0] == '/') {
    return path;
  }
  return std::string(folder) + "/" + path;
}

// Names in a broken file may hold anything; an error is one line.
std::string OneLine(std::string message) {
  for (char& c : message) {
    if (std::iscntrl(static_cast<unsigned char>(c))) c = '?';
  }
  return message;
}

Status CheckPromptIds(const std::vector<int32_t>& ids, int32_t vocab_size) {
  for (int32_t id : ids) {
    if (id < vocab_size) continue;
    return InvalidArgumentError("--prompt-ids: ", id,
                                " is no token of the model, which has 0 to ",
                                vocab_size - 1);
  }
  return Status();
}

struct Timing {
  double prefill_seconds = 0.0;
  double decode_seconds = 0.0;
  int64_t decoded_tokens = 0;
};

class Generator {
 public:
  // Writes at most max_tokens tokens per continuation.
  Generator(const Flags& flags, int64_t max_tokens, bool bytes,
            Session* session)
      : flags_(flags),
        max_tokens_(max_tokens),
        bytes_(bytes),
        session_(session) {}

  Status Run(const std::vector<int32_t>& prompt, Timing* timing) {
    double begin = Seconds();
    TENON_RETURN_IF_ERROR(Prefill(prompt));
    timing->prefill_seconds = Seconds() - begin;
    begin = Seconds();
    // On a GPU the next step is under way before the tokens of the last one are
    // here: rows go on with what was drawn for them, wherever it is.
    const bool cuda = session_->model().device.type == DeviceType::kCuda;
    const size_t depth = cuda ? kMaxStepsInFlight : 1;
    while (NumToEnqueue() > 0 || !steps_.empty()) {
      while (steps_.size() < depth && NumToEnqueue() > 0) {
        TENON_RETURN_IF_ERROR(Enqueue());
      }
      TENON_RETURN_IF_ERROR(Wait(timing));
    }
    timing->decode_seconds = Seconds() - begin;
    if (streams_.size() > 1) PrintAll();
    std::printf("\n");
    return Status();
  }

 private:
  struct Continuation {
    SequenceId sequence;
    std::vector<int32_t> tokens;
    int64_t num_enqueued = 0;  // steps
    bool done = false;
  };

  // Runs all of the prompt but its last token, which each continuation feeds in
  // its first step, so that each draws with its own seed.
  Status Prefill(const std::vector<int32_t>& prompt) {
    StatusOr<SequenceId> first = session_->CreateSequence();
    TENON_RETURN_IF_ERROR(first.status());
    const int32_t count = static_cast<int32_t>(prompt.size()) - 1;
    for (int32_t at = 0; at < count;) {
      StepRow row;
      row.sequence = *first;
      row.tokens = &prompt[at];
      row.num_tokens = std::min(session_->options().max_tokens, count - at);
      row.sample = false;
      TENON_RETURN_IF_ERROR(session_->Step({row}, &results_));
      at += row.num_tokens;
    }
    for (int32_t i = 0; i < flags_.batch; ++i) {
      StatusOr<SequenceId> sequence =
          i == 0 ? first : session_->ForkSequence(*first);
      TENON_RETURN_IF_ERROR(sequence.status());
      streams_.push_back({*sequence, {prompt.back()}, 0, false});
    }
    return Status();
  }

  static bool GoesOn(const Continuation& stream, int64_t max_tokens) {
    return !stream.done && stream.num_enqueued < max_tokens;
  }

  int64_t NumToEnqueue() const {
    return std::count_if(
        streams_.begin(), streams_.end(),
        [this](const Continuation& s) { return GoesOn(s, max_tokens_); });
  }

  // Starts a step for every continuation that goes on.
  Status Enqueue() {
    std::vector<StepRow> rows;
    std::vector<Continuation*> active;
    for (size_t i = 0; i < streams_.size(); ++i) {
      Continuation& stream = streams_[i];
      if (!GoesOn(stream, max_tokens_)) continue;
      StepRow row;
      row.sequence = stream.sequence;
      row.num_tokens = 1;
      if (stream.num_enqueued++ == 0) {
        row.tokens = &stream.tokens.back();
      } else {
        row.continues = true;
      }
      row.sampling = flags_.sampling;
      row.sampling.seed += i;
      rows.push_back(row);
      active.push_back(&stream);
    }
    TENON_RETURN_IF_ERROR(session_->EnqueueStep(rows));
    steps_.push_back(std::move(active));
    return Status();
  }

  // Takes the tokens of the step that was started first.
  Status Wait(Timing* timing) {
    TENON_RETURN_IF_ERROR(session_->WaitStep(&results_));
    for (size_t i = 0; i < results_.size(); ++i) {
      Continuation* stream = steps_.front()[i];
      if (stream->done) continue;  // it ended while this step was under way
      if (results_[i].status != SampleStatus::kOk) {
        return InternalError("the model gave no finite logits");
      }
      Append(results_[i].token, stream);
      ++timing->decoded_tokens;
    }
    steps_.pop_front();
    return Status();
  }

  void Append(int32_t token, Continuation* stream) {
    const std::vector<int32_t>& ends = session_->model().config.eos_token_ids;
    const bool ended = std::find(ends.begin(), ends.end(), token) != ends.end();
    if (!ended) {
      stream->tokens.push_back(token);
      if (streams_.size() == 1) Print(token);
    }
    stream->done =
        ended || static_cast<int64_t>(stream->tokens.size()) > max_tokens_;
  }

  void Print(int32_t token) const {
    if (bytes_) {
      std::putchar(token);
    } else {
      std::printf("%d ", token);
    }
    std::fflush(stdout);
  }

  void PrintAll() const {
    for (size_t i = 0; i < streams_.size(); ++i) {
      std::printf("\n--- %zu\n%s", i, bytes_ ? flags_.prompt.c_str() : "");
      for (size_t j = 1; j < streams_[i].tokens.size(); ++j) {
        Print(streams_[i].tokens[j]);
      }
    }
  }

  const Flags& flags_;
  int64_t max_tokens_;
  bool bytes_;
  Session* session_;
  std::vector<Continuation> streams_;
  // The continuations in the steps under way.
  std::deque<std::vector<Continuation*>> steps_;
  std::vector<StepRowResult> results_;
};

bool PrintProgress(int64_t done, int64_t total) {
  std::fprintf(stderr, "\rloading %3d%%%s",
               static_cast<int>(100 * done / std::max<int64_t>(total, 1)),
               done == total ? "\n" : "");
  return true;
}

Status RunMain(const Flags& flags) {
  LoadOptions load;
  load.quantize_fp8 = flags.fp8_weights;
  if (flags.device.type == DeviceType::kCuda) load.progress = PrintProgress;
  StatusOr<std::shared_ptr<const Model>> model =
      Model::Load(CallersPath(flags.model, flags.model == Flags().model),
                  flags.device, load);
  TENON_RETURN_IF_ERROR(model.status());
  const bool bytes = flags.prompt_ids.empty();
  if (bytes && (*model)->config.vocab_size != kByteVocab) {
    return InvalidArgumentError(
        flags.model, " has a vocabulary of ", (*model)->config.vocab_size,
        " tokens and this example has no tokenizer: give --prompt-ids");
  }
  TENON_RETURN_IF_ERROR(
      CheckPromptIds(flags.prompt_ids, (*model)->config.vocab_size));
  const std::vector<int32_t> prompt =
      bytes ? EncodeBytes(flags.prompt) : flags.prompt_ids;

  // The last token written is never read, so it needs no place.
  const int64_t context = (*model)->config.max_position_embeddings;
  const int64_t prompt_size = static_cast<int64_t>(prompt.size());
  if (prompt_size > context) {
    return InvalidArgumentError("the prompt has ", prompt_size,
                                " tokens, more than the model's context of ",
                                context);
  }
  const int64_t max_tokens =
      std::min<int64_t>(flags.max_tokens, context - prompt_size + 1);

  SessionOptions options;
  options.max_sequences = flags.batch;
  options.max_tokens = std::max(512, flags.batch);
  options.max_context = static_cast<int32_t>(prompt_size + max_tokens - 1);
  StatusOr<std::unique_ptr<Session>> session = Session::Create(*model, options);
  TENON_RETURN_IF_ERROR(session.status());

  if (bytes && flags.batch == 1) std::printf("%s", flags.prompt.c_str());
  Timing timing;
  TENON_RETURN_IF_ERROR(
      Generator(flags, max_tokens, bytes, session->get()).Run(prompt, &timing));
  std::printf(
      "\nprompt: %zu tokens in %.1f ms; generated: %lld tokens, "
      "%.1f tokens/s\n",
      prompt.size(), timing.prefill_seconds * 1e3,
      static_cast<long long>(timing.decoded_tokens),
      static_cast<double>(timing.decoded_tokens) /
          std::max(timing.decode_seconds, 1e-9));
  return Status();
}

}  // namespace
}  // namespace tenon::examples

int main(int argc, char** argv) {
  using namespace tenon;
  StatusOr<examples::Flags> flags = examples::ParseFlags(argc, argv);
  Status status = flags.status();
  if (flags.ok() && flags->help) {
    std::printf("%s", examples::kUsage);
    return 0;
  }
  if (status.ok()) status = examples::RunMain(*flags);
  if (status.ok()) return 0;
  std::fprintf(stderr, "generate: %s\n",
               examples::OneLine(status.message()).c_str());
  return 2;
}
