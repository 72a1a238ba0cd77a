// The steps of a session.

#include <chrono>
#include <utility>

#include "engine/session_impl.h"

namespace tenon {
namespace {

double Microseconds() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

// Undoes an append that did not get to its end, and finds out whether the
// session can go on.
void Session::Impl::Recover() noexcept {
  cache.RollbackAppend();
  last_drawn.Clear();
  try {
    // Work that was enqueued may still write to the callers' logits.
    is_broken = !Synchronize(model->device, stream.get()).ok();
  } catch (...) {
    is_broken = true;  // it had no memory to say so
  }
}

// Enqueues the model and the sampler over what the buffers' arrays on the
// device will hold by then.
Status Session::Impl::EnqueueModel() {
  const StepInputs inputs = buffers.Inputs();
  StepContext context{model->config,
                      model->weights,
                      cache,
                      activations,
                      inputs,
                      cublas_lt.get(),
                      options.batch_invariant,
                      stream.get(),
                      &moe_kernels};
  context.fuse = options.fuse;
  TENON_RETURN_IF_ERROR(DecodeStep(context));
  if (buffers.shape().sampled_rows == 0) return Status();
  return Sampler(buffers.Sampling(activations), stream.get());
}

// Enqueues the step that the buffers' host side holds.
Status Session::Impl::Launch(const std::vector<StepRow>& rows,
                             bool count_experts) {
  Flight& flight = flights[1 - last_side];
  TENON_RETURN_IF_ERROR(cache.CopyPages(stream.get()));
  TENON_RETURN_IF_ERROR(buffers.Upload(stream.get()));
  const StepShape& shape = buffers.shape();
  const Graph* graph = shape.is_decode ? graphs.Find(shape.rows) : nullptr;
  TENON_RETURN_IF_ERROR(graph != nullptr ? graph->Launch(stream.get())
                                         : EnqueueModel());
  TENON_RETURN_IF_ERROR(CopyLogits(rows));
  if (count_experts) {
    TENON_RETURN_IF_ERROR(flight.experts.Enqueue(shape.tokens, stream.get()));
  }
  return buffers.Download(stream.get());
}

// Copies logits to the callers that asked.
Status Session::Impl::CopyLogits(const std::vector<StepRow>& rows) {
  const int64_t vocab = model->config.vocab_size;
  const auto copy = [&](int32_t from_row, int32_t count, float* to) {
    return CopyMemory(
        to, Device(), activations.logits.As<float>() + from_row * vocab,
        model->device, static_cast<size_t>(count * vocab) * sizeof(float),
        stream.get());
  };
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].logits_mode == LogitsMode::kNone) continue;
    const LogitPlace& place = logit_places[i];
    const int32_t others = NumLogitRows(rows[i]) - 1;
    TENON_RETURN_IF_ERROR(copy(place.others, others, rows[i].logits));
    TENON_RETURN_IF_ERROR(copy(place.last, 1, rows[i].logits + others * vocab));
  }
  return Status();
}

// Checks the rows and enqueues their step, on the side that is free. Its append
// is left open. After an error all is as it was.
Status Session::Impl::Enqueue(const std::vector<StepRow>& rows,
                              bool count_experts) {
  const int side = 1 - last_side;
  Flight& flight = flights[side];
  flight.begin = Microseconds();
  TENON_RETURN_IF_ERROR(
      CheckStepRows(rows, options, model->config.vocab_size, last_drawn));
  append.clear();
  for (const StepRow& row : rows) {
    append.push_back({row.sequence, row.num_tokens});
  }
  TENON_RETURN_IF_ERROR(cache.PlanAppend(append));
  flight.experts.Clear();
  flight.tokens = 0;
  for (const StepRow& row : rows) flight.tokens += row.num_tokens;
  Status status;
  try {
    cache.CommitAppend();
    buffers.Begin(side, ShapeOf(rows, buckets));
    FillStep(rows, cache, last_drawn, mirostat, &buffers, &logit_places);
    if (!rows.empty()) status = Launch(rows, count_experts);
    if (status.ok()) status = flight.done.Record(stream.get());
    if (!status.ok()) {
      Recover();
      return status;
    }
  } catch (...) {  // no memory for the message of an error
    Recover();
    throw;
  }
  flight.drawn.Clear();
  flight.mirostat.clear();
  for (size_t i = 0; i < rows.size(); ++i) {
    flight.drawn.sequences.push_back(rows[i].sequence);
    flight.drawn.places.push_back(rows[i].sample ? logit_places[i].last : -1);
    flight.mirostat.push_back(logit_places[i].mirostat);
  }
  last_drawn = flight.drawn;
  last_side = side;
  return Status();
}

// Makes what Enqueue has begun last.
void Session::Impl::Finish(const Flight& flight) {
  cache.FinishAppend();
  for (size_t i = 0; i < flight.mirostat.size(); ++i) {
    if (flight.mirostat[i] < 0) continue;
    mirostat.Moved(flight.drawn.sequences[i], flight.mirostat[i]);
  }
}

// Room for the statistics of a step: it must not be missed at its end.
void Session::Impl::Reserve(StepStats* stats) const {
  if (stats == nullptr) return;
  stats->distinct_experts.reserve(
      static_cast<size_t>(flights[0].experts.num_layers()));
}

// Of a step that is done.
void Session::Impl::TakeResults(Flight* flight,
                                std::vector<StepRowResult>* results,
                                StepStats* stats) {
  const int side = flight == &flights[0] ? 0 : 1;
  const std::vector<int32_t>& places = flight->drawn.places;
  results->assign(places.size(), StepRowResult());
  for (size_t i = 0; i < places.size(); ++i) {
    const int32_t at = places[i];
    if (at < 0) continue;
    (*results)[i] = {buffers.tokens(side)[at], buffers.logprobs(side)[at],
                     static_cast<SampleStatus>(buffers.statuses(side)[at])};
    StepRowResult& result = (*results)[i];
    if (flight->mirostat[i] >= 0) {
      result.mirostat_mu = buffers.mirostat_mu(side)[flight->mirostat[i]];
    }
    if (!buffers.has_top(side)) continue;
    const int32_t columns = limits.max_top_logprobs;
    const int32_t* top_tokens = buffers.top_tokens(side) + at * columns;
    const float* top_logprobs = buffers.top_logprobs(side) + at * columns;
    for (int32_t j = 0; j < columns && top_tokens[j] >= 0; ++j) {
      result.top_tokens[j] = top_tokens[j];
      result.top_logprobs[j] = top_logprobs[j];
      ++result.num_top;
    }
  }
  if (stats == nullptr) return;
  stats->rows = static_cast<int32_t>(places.size());
  stats->tokens = flight->tokens;
  flight->experts.Count(&stats->distinct_experts);
  stats->microseconds = Microseconds() - flight->begin;
}

Status Session::Step(const std::vector<StepRow>& rows,
                     std::vector<StepRowResult>* results, StepStats* stats) {
  Impl& s = *impl_;
  TENON_RETURN_IF_ERROR(s.CheckUsable("Step"));
  if (s.num_in_flight > 0) {
    return FailedPreconditionError("Step: there are ", s.num_in_flight,
                                   " steps that WaitStep has not given");
  }
  s.Reserve(stats);
  // Room for the results, too. A row's tokens may point into those of the last
  // step, which therefore stay where they are until this one is done.
  std::vector<StepRowResult> larger;
  if (results->capacity() < rows.size()) larger.reserve(rows.size());
  TENON_RETURN_IF_ERROR(s.Enqueue(rows, stats != nullptr));
  Impl::Flight& flight = s.flights[s.last_side];
  Status status;
  try {
    status = flight.done.Wait();
  } catch (...) {  // no memory for the message of an error
    s.Recover();
    throw;
  }
  if (!status.ok()) {
    s.Recover();
    return status;
  }
  s.Finish(flight);
  if (larger.capacity() > 0) results->swap(larger);
  s.TakeResults(&flight, results, stats);
  return Status();
}

Status Session::EnqueueStep(const std::vector<StepRow>& rows) {
  Impl& s = *impl_;
  TENON_RETURN_IF_ERROR(s.CheckUsable("EnqueueStep"));
  if (s.num_in_flight == kMaxStepsInFlight) {
    return FailedPreconditionError("EnqueueStep: there are ", s.num_in_flight,
                                   " steps that WaitStep has not given");
  }
  TENON_RETURN_IF_ERROR(s.Enqueue(rows, s.options.count_experts));
  s.Finish(s.flights[s.last_side]);
  ++s.num_in_flight;
  return Status();
}

Status Session::WaitStep(std::vector<StepRowResult>* results,
                         StepStats* stats) {
  Impl& s = *impl_;
  TENON_RETURN_IF_ERROR(s.CheckUsable("WaitStep"));
  if (s.num_in_flight == 0) {
    return FailedPreconditionError("WaitStep: no step was enqueued");
  }
  const int oldest = s.num_in_flight == 1 ? s.last_side : 1 - s.last_side;
  Impl::Flight& flight = s.flights[oldest];
  s.Reserve(stats);
  results->reserve(flight.drawn.places.size());
  s.is_broken = true;  // also where there is no memory to say so
  TENON_RETURN_IF_ERROR(flight.done.Wait());
  s.is_broken = false;
  --s.num_in_flight;
  s.TakeResults(&flight, results, stats);
  return Status();
}

int32_t Session::num_steps_in_flight() const { return impl_->num_in_flight; }

}  // namespace tenon
