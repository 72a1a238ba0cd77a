// tenon_load: what the service costs, and what it does under load.
//
//   tenon_load --target unix:/tmp/tenon-0.sock overhead
//     One client on one stream. A step's time at the client less the engine's
//     own time, beside a server that answers messages of the same sizes and
//     does nothing ("null echo"), or writes memory for as long as the engine
//     worked ("late null echo"), in turn: what remains is what the service
//     adds. Every call follows one of the other server, so that neither finds
//     the caches warmer.
//
//   tenon_load --target ... open --rate 500 --sessions 16 --rows 4
//     Steps sent at a fixed rate, whatever has been answered. Latencies count
//     from the moment at which a step was due, so that a slow server cannot
//     hide its delays by slowing the client down.
//
// Prints one JSON object.

#include <grpcpp/grpcpp.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "service/proto/decode.grpc.pb.h"

namespace tenon::service {
namespace {

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
using Json = nlohmann::ordered_json;

struct Flags {
  std::string target;
  std::string mode;
  std::string token;       // bearer
  std::string serve_null;  // internal: the address of the null server
  double rate = 100.0;     // steps a second
  double seconds = 5.0;
  int sessions = 8;
  int rows = 1;     // of a step
  int steps = 300;  // of each size, in overhead
  int prompt = 4;
  std::vector<int> sizes = {1, 16, 64, 256};
};

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "tenon_load: %s\n", what.c_str());
  std::exit(2);
}

void Require(const grpc::Status& status, const char* what) {
  if (!status.ok()) Die(std::string(what) + ": " + status.error_message());
}

double Microseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::micro>(duration).count();
}

double Quantile(const std::vector<double>& sorted, double q) {
  if (sorted.empty()) return 0.0;
  return sorted[std::min(
      sorted.size() - 1,
      static_cast<size_t>(q * static_cast<double>(sorted.size())))];
}

Json Summary(std::vector<double> us) {
  std::sort(us.begin(), us.end());
  Json json;
  json["count"] = us.size();
  for (const auto& [name, q] : {std::pair<const char*, double>{"p50_us", 0.5},
                                {"p90_us", 0.9},
                                {"p99_us", 0.99},
                                {"p999_us", 0.999},
                                {"max_us", 1.0}}) {
    json[name] = std::round(10.0 * Quantile(us, q)) / 10.0;
  }
  return json;
}

// As hard on the caches as an engine on the CPU.
void WorkFor(Clock::duration duration) {
  static std::vector<char> memory(32 << 20);
  static size_t at = 0;
  const Time end = Clock::now() + duration;
  while (Clock::now() < end) {
    for (int i = 0; i < 16; ++i) ++memory[(at += 64) % memory.size()];
  }
}

// A reply as large as a real one, at once; or after the nanoseconds that the
// request's overrides.seed asks for, in which the client sleeps as long, and
// gets up as slowly, as it does while an engine works. One client at a time.
class NullStream final
    : public grpc::ServerBidiReactor<v1::StepRequest, v1::StepResponse> {
 public:
  NullStream() { StartRead(&request_); }
  void OnReadDone(bool ok) override {
    if (!ok) return Finish(grpc::Status::OK);
    const Time begin = Clock::now();
    WorkFor(std::chrono::nanoseconds(request_.overrides().seed()));
    const Clock::duration worked = Clock::now() - begin;
    response_.Clear();
    response_.set_step_id(request_.step_id());
    response_.set_server_epoch(~uint64_t{0});
    for (int i = 0; i < request_.seq_size(); ++i) {
      response_.add_token(100);
      response_.add_row_status(v1::ROW_STATUS_OK);
    }
    v1::Timing* timing = response_.mutable_timing();
    timing->set_queue_ns(10000);
    timing->set_step_ns(
        static_cast<uint64_t>(std::chrono::nanoseconds(worked).count()));
    timing->set_total_ns(1000000);
    response_.mutable_load()->set_free_pages(10000);
    StartWrite(&response_);
  }
  void OnWriteDone(bool) override { StartRead(&request_); }
  void OnDone() override { delete this; }

 private:
  v1::StepRequest request_;
  v1::StepResponse response_;
};

class NullService final : public v1::Decode::CallbackService {
 public:
  grpc::ServerBidiReactor<v1::StepRequest, v1::StepResponse>* StepStream(
      grpc::CallbackServerContext*) override {
    return new NullStream;
  }
};

int ServeNull(const std::string& address) {
  prctl(PR_SET_PDEATHSIG, SIGTERM);  // also where tenon_load dies of an error
  NullService service;
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials());
  builder.RegisterService(&service);
  auto server = builder.BuildAndStart();
  if (server == nullptr) Die("cannot listen on " + address);
  server->Wait();
  return 0;
}

// A null server in a process of its own, as the real one is.
class NullProcess {
 public:
  explicit NullProcess(const std::string& like) {
    const bool is_unix = like.rfind("unix:", 0) == 0;
    const std::string number = std::to_string(getpid());
    address_ = is_unix
                   ? "unix:/tmp/tenon-null-" + number + ".sock"
                   : "127.0.0.1:" + std::to_string(30000 + getpid() % 20000);
    std::string self = "/proc/self/exe";
    std::string flag = "--serve-null";
    char* argv[] = {self.data(), flag.data(), address_.data(), nullptr};
    if (posix_spawn(&pid_, "/proc/self/exe", nullptr, nullptr, argv, environ) !=
        0) {
      Die("cannot start the null server");
    }
  }
  ~NullProcess() {
    kill(pid_, SIGTERM);
    waitpid(pid_, nullptr, 0);
    if (address_.rfind("unix:", 0) == 0) unlink(address_.c_str() + 5);
  }
  const std::string& address() const { return address_; }

 private:
  std::string address_;
  pid_t pid_ = -1;
};

std::unique_ptr<v1::Decode::Stub> Connect(const std::string& address) {
  auto channel =
      grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
  if (!channel->WaitForConnected(std::chrono::system_clock::now() +
                                 std::chrono::seconds(10))) {
    Die("no connection to " + address);
  }
  return v1::Decode::NewStub(channel);
}

class Context final : public grpc::ClientContext {
 public:
  explicit Context(const Flags& flags) {
    if (!flags.token.empty()) {
      AddMetadata("authorization", "Bearer " + flags.token);
    }
  }
};

// A session with sequences that last for `steps` steps.
struct LoadSession {
  explicit LoadSession(const Flags& own_flags) : flags(own_flags) {}

  const Flags& flags;
  v1::StepRequest request;
  int steps_left = 0;

  void Renew(v1::Decode::Stub* stub, int rows, int steps) {
    if (request.session_id() != 0) End(stub);
    v1::CreateSequencesRequest create;
    for (int i = 0; i < rows; ++i) {
      v1::NewSequence* sequence = create.add_sequences();
      for (int j = 0; j < flags.prompt; ++j) {
        sequence->add_prompt(static_cast<uint32_t>(1 + (i + j) % 100));
      }
      sequence->set_max_tokens(static_cast<uint32_t>(steps + 1));
      sequence->set_ignore_eos(true);
    }
    v1::CreateSequencesResponse created;
    Context context(flags);
    Require(stub->CreateSequences(&context, create, &created),
            "CreateSequences");
    request.Clear();
    request.set_session_id(created.session_id());
    for (uint64_t seq : created.seq()) request.add_seq(seq);
    steps_left = steps;
  }

  void End(v1::Decode::Stub* stub) {
    v1::ReleaseSequencesRequest release;
    v1::ReleaseSequencesResponse released;
    release.set_session_id(request.session_id());
    release.set_end_session(true);
    Context context(flags);
    Require(stub->ReleaseSequences(&context, release, &released),
            "ReleaseSequences");
  }
};

class TimedStream {
 public:
  TimedStream(const Flags& flags, v1::Decode::Stub* stub)
      : context_(flags), stream_(stub->StepStream(&context_)) {}

  // Microseconds from before the write until after the read.
  double Step(const v1::StepRequest& request, v1::StepResponse* response) {
    const Time begin = Clock::now();
    if (!stream_->Write(request) || !stream_->Read(response)) {
      Die("StepStream: " + stream_->Finish().error_message());
    }
    return Microseconds(Clock::now() - begin);
  }
  void Close() {
    stream_->WritesDone();
    Require(stream_->Finish(), "StepStream");
  }

 private:
  Context context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::StepRequest, v1::StepResponse>>
      stream_;
};

Json OverheadOf(int rows, const Flags& flags, v1::Decode::Stub* stub,
                v1::Decode::Stub* null_stub) {
  LoadSession session(flags);
  session.Renew(stub, rows, flags.steps);
  TimedStream real(flags, stub);
  TimedStream null(flags, null_stub);
  std::vector<double> total, engine, overhead, echo, late_echo, inside;
  v1::StepResponse response;
  v1::StepRequest null_request = session.request;
  const int warm_up = std::max(flags.steps / 10, 1);
  for (int i = 0; i < flags.steps; ++i) {
    const bool is_late = i % 2 == 1;
    null_request.clear_overrides();
    if (is_late) {
      null_request.mutable_overrides()->set_seed(response.timing().step_ns());
    }
    const double null_us = null.Step(null_request, &response);
    const uint64_t worked_ns = response.timing().step_ns();
    session.request.set_step_id(static_cast<uint64_t>(i) + 1);
    const double us = real.Step(session.request, &response);
    const v1::Timing timing = response.timing();
    if (i < warm_up) continue;
    (is_late ? late_echo : echo)
        .push_back(null_us - 1e-3 * static_cast<double>(worked_ns));
    total.push_back(us);
    engine.push_back(1e-3 * static_cast<double>(timing.step_ns()));
    overhead.push_back(us - engine.back());
    inside.push_back(1e-3 *
                     static_cast<double>(timing.total_ns() - timing.step_ns()));
  }
  real.Close();
  null.Close();
  session.End(stub);
  Json json;
  json["rows"] = rows;
  json["step"] = Summary(total);
  json["engine"] = Summary(engine);
  json["step_less_engine"] = Summary(overhead);
  json["null_echo"] = Summary(echo);
  json["late_null_echo"] = Summary(late_echo);
  json["inside_server_less_engine"] = Summary(inside);
  const auto above = [&json](const char* null_name, const char* quantile) {
    return json["step_less_engine"][quantile].get<double>() -
           json[null_name][quantile].get<double>();
  };
  json["above_null_p50_us"] = above("null_echo", "p50_us");
  json["above_null_p99_us"] = above("null_echo", "p99_us");
  json["above_late_null_p50_us"] = above("late_null_echo", "p50_us");
  json["above_late_null_p99_us"] = above("late_null_echo", "p99_us");
  return json;
}

Json Overhead(const Flags& flags) {
  const NullProcess null(flags.target);
  const auto stub = Connect(flags.target);
  const auto null_stub = Connect(null.address());
  Json json;
  json["mode"] = "overhead";
  json["target"] = flags.target;
  for (int rows : flags.sizes) {
    json["sizes"].push_back(
        OverheadOf(rows, flags, stub.get(), null_stub.get()));
  }
  return json;
}

// Steps that are due at fixed times, each sent by the first session that is
// free then or later. One thread sends, one receives: it shares the machine
// with the server, and every thread that waits for replies would be woken for
// those of the others. A third one makes sessions' sequences anew.
class OpenLoop {
 public:
  explicit OpenLoop(const Flags& flags)
      : flags_(flags), stub_(Connect(flags.target)) {}

  Json Run() {
    for (int i = 0; i < flags_.sessions; ++i) {
      clients_.push_back(std::make_unique<Client>(flags_));
      clients_.back()->session.Renew(stub_.get(), flags_.rows, kSteps);
      free_.push_back(clients_.back().get());
    }
    begin_ = Clock::now() + std::chrono::milliseconds(200);
    std::thread receiver(&OpenLoop::Receive, this);
    std::thread renewer(&OpenLoop::Renew, this);
    const int64_t total = static_cast<int64_t>(flags_.rate * flags_.seconds);
    for (int64_t i = 0; i < total; ++i) Send(DueAt(i));
    Stop();
    receiver.join();
    renewer.join();
    const double seconds =
        std::chrono::duration<double>(Clock::now() - begin_).count();
    for (const auto& client : clients_) client->session.End(stub_.get());
    return Report(seconds);
  }

 private:
  static constexpr int kSteps = 200;

  // A session and its step under way.
  struct Client {
    explicit Client(const Flags& flags) : session(flags) {}

    LoadSession session;
    Time due;
    Time sent;
    std::unique_ptr<Context> context;
    std::unique_ptr<grpc::ClientAsyncResponseReader<v1::StepResponse>> reader;
    v1::StepResponse response;
    grpc::Status status;
  };

  Time DueAt(int64_t index) const {
    return begin_ + std::chrono::duration_cast<Clock::duration>(
                        std::chrono::duration<double>(
                            static_cast<double>(index) / flags_.rate));
  }

  Json Report(double seconds) const {
    Json json;
    json["mode"] = "open";
    json["target"] = flags_.target;
    json["rate"] = flags_.rate;
    json["rows"] = flags_.rows;
    json["sessions"] = flags_.sessions;
    json["seconds"] = seconds;
    json["accepted_per_second"] =
        static_cast<double>(accepted_.size()) / seconds;
    json["accepted"] = Summary(accepted_);
    json["accepted_from_sending"] = Summary(accepted_service_);
    json["accepted_in_server"] = Summary(accepted_inside_);
    json["engine"] = Summary(engine_);
    json["rejected"] = Summary(rejected_);
    json["rejected_without_retry_info"] = rejected_without_retry_;
    json["failed"] = failed_;
    return json;
  }

  void Send(Time due) {
    std::this_thread::sleep_until(due);
    Client* client = nullptr;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      has_free_.wait(lock, [this] { return !free_.empty(); });
      client = free_.front();
      free_.pop_front();
    }
    client->due = due;
    client->session.request.set_step_id(
        static_cast<uint64_t>(kSteps - client->session.steps_left) + 1);
    client->context = std::make_unique<Context>(flags_);
    client->response.Clear();
    client->sent = Clock::now();
    client->reader = stub_->AsyncStep(client->context.get(),
                                      client->session.request, &queue_);
    client->reader->Finish(&client->response, &client->status, client);
  }

  void Receive() {
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
      auto* client = static_cast<Client*>(tag);
      Record(*client);
      if (client->status.ok()) --client->session.steps_left;
      std::lock_guard<std::mutex> lock(mutex_);
      if (client->session.steps_left == 0) {
        worn_out_.push_back(client);
        has_worn_out_.notify_one();
      } else {
        free_.push_back(client);
        has_free_.notify_one();
      }
    }
  }

  void Renew() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      has_worn_out_.wait(lock,
                         [this] { return stopping_ || !worn_out_.empty(); });
      if (worn_out_.empty()) return;
      Client* client = worn_out_.front();
      worn_out_.pop_front();
      lock.unlock();
      client->session.Renew(stub_.get(), flags_.rows, kSteps);
      lock.lock();
      free_.push_back(client);
      has_free_.notify_one();
    }
  }

  // Once every reply is there.
  void Stop() {
    std::unique_lock<std::mutex> lock(mutex_);
    has_free_.wait(lock, [this] { return free_.size() == clients_.size(); });
    stopping_ = true;
    has_worn_out_.notify_one();
    queue_.Shutdown();
  }

  // By the receiver alone.
  void Record(const Client& client) {
    const Time now = Clock::now();
    const v1::Timing& timing = client.response.timing();
    if (client.status.ok()) {
      accepted_.push_back(Microseconds(now - client.due));
      accepted_service_.push_back(Microseconds(now - client.sent));
      accepted_inside_.push_back(1e-3 * static_cast<double>(timing.total_ns()));
      engine_.push_back(1e-3 * static_cast<double>(timing.step_ns()));
    } else if (client.status.error_code() ==
               grpc::StatusCode::RESOURCE_EXHAUSTED) {
      rejected_.push_back(Microseconds(now - client.sent));
      rejected_without_retry_ +=
          client.status.error_details().find("google.rpc.RetryInfo") ==
          std::string::npos;
    } else {
      ++failed_;
    }
  }

  const Flags& flags_;
  std::unique_ptr<v1::Decode::Stub> stub_;
  grpc::CompletionQueue queue_;
  Time begin_;
  std::vector<std::unique_ptr<Client>> clients_;
  std::mutex mutex_;  // guards what follows, to stopping_
  std::condition_variable has_free_;
  std::condition_variable has_worn_out_;
  std::deque<Client*> free_;
  std::deque<Client*> worn_out_;
  bool stopping_ = false;
  std::vector<double> accepted_;
  std::vector<double> accepted_service_;
  std::vector<double> accepted_inside_;  // from its reading to its reply
  std::vector<double> engine_;
  std::vector<double> rejected_;
  int64_t rejected_without_retry_ = 0;
  int64_t failed_ = 0;
};

constexpr char kUsage[] =
    R"(tenon_load --target ADDRESS overhead [--steps N] [--size N ...] [--prompt N]
tenon_load --target ADDRESS open [--rate STEPS_PER_SECOND] [--seconds N]
           [--sessions N] [--rows N] [--prompt N]
With --token BEARER where the server wants one.
)";

Flags ParseFlags(int argc, char** argv) {
  Flags flags;
  bool own_sizes = false;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag.rfind("--", 0) != 0) {
      flags.mode = flag;
      continue;
    }
    if (flag == "--help" || i + 1 >= argc) {
      std::printf("%s", kUsage);
      std::exit(flag == "--help" ? 0 : 2);
    }
    const std::string value = argv[++i];
    if (flag == "--target") {
      flags.target = value;
    } else if (flag == "--token") {
      flags.token = value;
    } else if (flag == "--serve-null") {
      flags.serve_null = value;
    } else if (flag == "--rate") {
      flags.rate = std::atof(value.c_str());
    } else if (flag == "--seconds") {
      flags.seconds = std::atof(value.c_str());
    } else if (flag == "--sessions") {
      flags.sessions = std::atoi(value.c_str());
    } else if (flag == "--rows") {
      flags.rows = std::atoi(value.c_str());
    } else if (flag == "--steps") {
      flags.steps = std::atoi(value.c_str());
    } else if (flag == "--prompt") {
      flags.prompt = std::atoi(value.c_str());
    } else if (flag == "--size") {
      if (!own_sizes) flags.sizes.clear();
      own_sizes = true;
      flags.sizes.push_back(std::atoi(value.c_str()));
    } else {
      Die("unknown option " + flag);
    }
  }
  return flags;
}

int Main(int argc, char** argv) {
  const Flags flags = ParseFlags(argc, argv);
  if (!flags.serve_null.empty()) return ServeNull(flags.serve_null);
  if (flags.target.empty()) Die("--target is missing; see --help");
  if (!(flags.rate > 0.0) || !(flags.seconds > 0.0) || flags.sessions < 1 ||
      flags.rows < 1 || flags.steps < 2 || flags.prompt < 1) {
    Die("numbers must be positive; see --help");
  }
  if (flags.mode == "overhead") {
    std::printf("%s\n", Overhead(flags).dump(2).c_str());
  } else if (flags.mode == "open") {
    std::printf("%s\n", OpenLoop(flags).Run().dump(2).c_str());
  } else {
    Die("no such mode; see --help");
  }
  return 0;
}

}  // namespace
}  // namespace tenon::service

int main(int argc, char** argv) { return tenon::service::Main(argc, argv); }
