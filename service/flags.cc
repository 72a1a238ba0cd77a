#include "service/flags.h"

#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <utility>

#include "engine/moe_kernel_file.h"

namespace tenon::service {
namespace {

using std::chrono::milliseconds;

Status ParseInt(const std::string& flag, const std::string& text, int64_t low,
                int64_t high, int64_t* value) {
  char* end = nullptr;
  errno = 0;
  *value = std::strtoll(text.c_str(), &end, 10);
  if (!text.empty() && *end == '\0' && errno == 0 && *value >= low &&
      *value <= high) {
    return Status();
  }
  return InvalidArgumentError(flag, ": ", text, " is not an integer from ", low,
                              " to ", high);
}

// Sets what a flag's value is for.
using Setter =
    std::function<Status(const std::string& flag, const std::string& value)>;

Setter Text(std::string* target) {
  return [target](const std::string&, const std::string& value) {
    *target = value;
    return Status();
  };
}

template <class Int>
Setter Integer(int64_t low, int64_t high, Int* target) {
  return [=](const std::string& flag, const std::string& value) {
    int64_t number = 0;
    TENON_RETURN_IF_ERROR(ParseInt(flag, value, low, high, &number));
    *target = static_cast<Int>(number);
    return Status();
  };
}

template <class Duration>
Setter Span(int64_t low, int64_t high, Duration* target) {
  return [=](const std::string& flag, const std::string& value) {
    int64_t number = 0;
    TENON_RETURN_IF_ERROR(ParseInt(flag, value, low, high, &number));
    *target = Duration(number);
    return Status();
  };
}

Setter Bool(bool* target) {
  return [=](const std::string& flag, const std::string& value) {
    if (value != "true" && value != "false") {
      return InvalidArgumentError(flag, ": ", value, " is not true or false");
    }
    *target = value == "true";
    return Status();
  };
}

Setter DeviceName(Device* target) {
  return [=](const std::string& flag, const std::string& value) {
    if (value != "cpu" && value != "cuda") {
      return InvalidArgumentError(flag, ": ", value, " is not cpu or cuda");
    }
    target->type = value == "cpu" ? DeviceType::kCpu : DeviceType::kCuda;
    return Status();
  };
}

Setter MoeKernels(std::shared_ptr<const MoeKernelFile>* target) {
  return [=](const std::string& flag, const std::string& value) {
    StatusOr<MoeKernelFile> file = ReadMoeKernelFile(value);
    if (!file.ok()) {
      return Status(file.status().code(),
                    flag + ": " + file.status().message());
    }
    *target = std::make_shared<const MoeKernelFile>(*std::move(file));
    return Status();
  };
}

Setter Append(std::vector<std::string>* target) {
  return [=](const std::string&, const std::string& value) {
    target->push_back(value);
    return Status();
  };
}

std::map<std::string, Setter> Setters(Flags* f) {
  constexpr int64_t kMany = 1 << 20;
  constexpr int64_t kDay = 24 * 3600 * 1000;
  Limits* l = &f->server.limits;
  ServerOptions* s = &f->server;
  return {
      {"--model", Text(&f->model)},
      {"--device", DeviceName(&f->device)},
      {"--listen", Append(&s->listen)},
      {"--tls-cert", Text(&s->tls_cert)},
      {"--tls-key", Text(&s->tls_key)},
      {"--tls-client-ca", Text(&s->tls_client_ca)},
      {"--tls-reload-s", Span(1, 86400, &s->tls_reload)},
      {"--decode-tokens", Text(&s->decode_tokens)},
      {"--control-tokens", Text(&s->control_tokens)},
      {"--reflection", Bool(&s->reflection)},
      {"--metrics", Text(&s->metrics_listen)},
      {"--max-context", Integer(1, 1 << 24, &f->engine.max_context)},
      {"--page-size", Integer(1, 65536, &f->engine.page_size)},
      {"--kv-cache-mib",
       Integer(1, int64_t{1} << 30, &f->engine.kv_cache_bytes)},
      {"--threads", Integer(0, 4096, &f->engine.num_threads)},
      {"--moe-kernels", MoeKernels(&f->engine.moe_kernels)},
      {"--batch-invariant", Bool(&f->engine.batch_invariant)},
      {"--inline", Bool(&f->run_inline)},
      {"--rows", Integer(1, kMaxRowsPerStep, &l->rows_per_step)},
      {"--sequences", Integer(1, kMaxSequences, &l->sequences)},
      {"--sessions", Integer(1, kMany, &l->sessions)},
      {"--prompt-tokens", Integer(1, kMany, &l->prompt_tokens)},
      {"--prefill-tokens", Integer(1, 65536, &l->prefill_tokens_per_step)},
      {"--request-bytes", Integer(1024, kMaxRequestBytes, &l->request_bytes)},
      {"--queued-requests", Integer(1, kMany, &l->queued_requests)},
      {"--queued-rows", Integer(1, kMany, &l->queued_rows)},
      {"--logit-edits", Integer(1, 1 << 24, &l->logit_edits)},
      {"--logit-rules", Integer(1, kMany, &l->logit_rules)},
      {"--lease-ms", Span(1, kDay, &l->lease)},
      {"--stream-idle-ms", Span(1, kDay, &l->stream_idle)},
      {"--default-deadline-ms", Span(1, kDay, &l->default_deadline)},
      {"--connections", Integer(1, kMany, &l->connections)},
      {"--connection-age-ms", Span(0, kDay, &s->max_connection_age)},
      {"--connection-idle-ms", Span(1, kDay, &s->max_connection_idle)},
      {"--stall-ms", Span(1, kDay, &s->stall)},
      {"--drain-grace-ms", Span(0, kDay, &s->drain_grace)},
      {"--drain-deadline-ms", Span(0, kDay, &f->drain_deadline)},
  };
}

}  // namespace

const char kUsage[] =
    R"(Serves batched decode steps of a Qwen3 or Qwen3-MoE model over gRPC (tenon.v1).

  --model DIR             Hugging Face checkpoint directory (default: the shipped model)
  --device cpu|cuda       (cpu)
  --listen ADDRESS        unix:/path or host:port, may be repeated
                          (unix:/tmp/tenon-UID.sock and 127.0.0.1:50551)
 security; beyond loopback only with TLS
  --tls-cert, --tls-key FILE   PEM, read again when they change
  --tls-client-ca FILE    clients need a certificate of it
  --tls-reload-s N        how often to look (60)
  --decode-tokens, --control-tokens FILE   bearer tokens, one a line
  --reflection true|false (false; not with tokens)
 engine
  --max-context N         tokens of a sequence (2048, or what the model has)
  --kv-cache-mib N        (256)
  --page-size N           tokens of a KV cache page (16)
  --threads N             CPU; 0: all (0)
  --moe-kernels FILE      sizes of the expert kernels on this GPU, of tools/tune
  --batch-invariant true|false   a token does not depend on the batch (false)
  --inline true|false     a call may run its step on its own thread (true)
 limits
  --rows N                of one engine step (256)
  --prefill-tokens N      prompt tokens of one engine step (512)
  --sequences N (1024)    --sessions N (64)    --prompt-tokens N (131072)
  --request-bytes N (4194304)    --queued-requests N (1024)    --queued-rows N (4096)
  --logit-edits N         room in an engine step for tokens that are counted
                          (penalties) and rules, of all rows (262144)
  --logit-rules N         tokens in a sequence's biases, bans and so on (4096)
  --lease-ms N (30000)    --stream-idle-ms N (60000)
  --default-deadline-ms N (10000)    --connections N (256)
  --connection-age-ms N (0: for ever)    --connection-idle-ms N (600000)
 operation
  --metrics HOST:PORT     Prometheus /metrics, loopback (off)
  --stall-ms N            not serving if no step ends for so long (10000)
  --drain-grace-ms N      health is NOT_SERVING so long before work is refused (2000)
  --drain-deadline-ms N   SIGTERM waits so long for sequences to end (30000)
)";

StatusOr<Flags> ParseFlags(int argc, char** argv) {
  Flags flags;
  flags.engine.kv_cache_bytes = 256;
  flags.engine.max_context = 0;
  const std::map<std::string, Setter> setters = Setters(&flags);
  for (int i = 1; i < argc; ++i) {
    std::string flag = argv[i];
    if (flag == "--help") {
      flags.help = true;
      return flags;
    }
    std::string value;
    const size_t equals = flag.find('=');
    const bool has_value = equals != std::string::npos;
    if (has_value) {
      value = flag.substr(equals + 1);
      flag.resize(equals);
    }
    const auto setter = setters.find(flag);
    if (setter == setters.end()) {
      return InvalidArgumentError("unknown option ", flag, "; see --help");
    }
    if (!has_value) {
      if (i + 1 >= argc) return InvalidArgumentError(flag, ": value missing");
      value = argv[++i];
    }
    TENON_RETURN_IF_ERROR(setter->second(flag, value));
  }
  const Limits& limits = flags.server.limits;
  if (limits.queued_rows < limits.rows_per_step) {
    return InvalidArgumentError("--queued-rows is ", limits.queued_rows,
                                ", less than --rows, ", limits.rows_per_step,
                                ": steps of so many would always be refused");
  }
  flags.engine.kv_cache_bytes <<= 20;
  if (flags.server.limits.max_lease < flags.server.limits.lease) {
    flags.server.limits.max_lease = flags.server.limits.lease;
  }
  if (flags.server.listen.empty()) {
    flags.server.listen = {
        "unix:/tmp/tenon-" + std::to_string(getuid()) + ".sock",
        "127.0.0.1:50551"};
  }
  return flags;
}

}  // namespace tenon::service
