// Streams text from a decode service with a byte-level model, such as the
// shipped one:
//
//   ./bazelw run //service:tenon_server &
//   ./bazelw run //examples/grpc_client -- "It was a truth"
//
// The text goes to stdout, a line about progress to stderr.

#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <system_error>

#include "service/proto/decode.grpc.pb.h"

namespace {

namespace v1 = tenon::v1;

struct Flags {
  std::string target = "unix:/tmp/tenon-" + std::to_string(getuid()) + ".sock";
  std::string prompt = "It was a truth";
  std::string token;  // bearer
  std::string ca;     // PEM file: TLS
  std::string cert;   // PEM files: mutual TLS
  std::string key;
  uint32_t max_tokens = 300;
  float temperature = 0.8f;
  uint64_t seed = 0;
};

constexpr char kUsage[] =
    "grpc_client [--target ADDRESS] [--max-tokens N] [--temperature X]\n"
    "            [--seed N] [--token BEARER] [PROMPT]\n"
    "            [--ca FILE [--cert FILE --key FILE]]\n";

// The whole of `text`.
template <class T>
bool ParseNumber(const char* text, T* value) {
  const char* const end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, *value);
  return error == std::errc() && stop == end;
}

// False for what kUsage does not have.
bool ParseFlags(int argc, char** argv, Flags* flags) {
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag.rfind("--", 0) != 0) {
      flags->prompt = flag;
      continue;
    }
    if (i + 1 >= argc) return false;
    const char* value = argv[++i];
    if (flag == "--target") {
      flags->target = value;
    } else if (flag == "--token") {
      flags->token = value;
    } else if (flag == "--ca") {
      flags->ca = value;
    } else if (flag == "--cert") {
      flags->cert = value;
    } else if (flag == "--key") {
      flags->key = value;
    } else if (flag == "--max-tokens") {
      if (!ParseNumber(value, &flags->max_tokens)) return false;
    } else if (flag == "--temperature") {
      if (!ParseNumber(value, &flags->temperature)) return false;
    } else if (flag == "--seed") {
      if (!ParseNumber(value, &flags->seed)) return false;
    } else {
      return false;
    }
  }
  const bool has_own = !flags->cert.empty();
  if (has_own == flags->key.empty() || (has_own && flags->ca.empty())) {
    return false;
  }
  return !flags->prompt.empty();
}

// False, and says so, where there is none.
bool ReadFile(const std::string& path, std::string* content) {
  std::ifstream file(path);
  content->assign(std::istreambuf_iterator<char>(file), {});
  if (!content->empty()) return true;
  std::fprintf(stderr, "grpc_client: cannot read %s\n", path.c_str());
  return false;
}

// Null where a file of them cannot be read.
std::shared_ptr<grpc::ChannelCredentials> Credentials(const Flags& flags) {
  if (flags.ca.empty()) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions options;
  if (!ReadFile(flags.ca, &options.pem_root_certs)) return nullptr;
  if (!flags.cert.empty() && !(ReadFile(flags.cert, &options.pem_cert_chain) &&
                               ReadFile(flags.key, &options.pem_private_key))) {
    return nullptr;
  }
  return grpc::SslCredentials(options);
}

int Generate(const Flags& flags) {
  const auto credentials = Credentials(flags);
  if (credentials == nullptr) return 2;
  const auto channel = grpc::CreateChannel(flags.target, credentials);
  // The server may be starting still.
  if (!channel->WaitForConnected(std::chrono::system_clock::now() +
                                 std::chrono::seconds(30))) {
    std::fprintf(stderr, "grpc_client: no connection to %s\n",
                 flags.target.c_str());
    return 1;
  }
  const auto stub = v1::Decode::NewStub(channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::minutes(5));
  if (!flags.token.empty()) {
    context.AddMetadata("authorization", "Bearer " + flags.token);
  }
  v1::GenerateRequest request;
  v1::NewSequence* sequence = request.mutable_sequence();
  for (unsigned char byte : flags.prompt) sequence->add_prompt(byte);
  sequence->set_max_tokens(flags.max_tokens);
  sequence->mutable_sampling()->set_temperature(flags.temperature);
  sequence->mutable_sampling()->set_top_p(0.95f);
  sequence->mutable_sampling()->set_seed(flags.seed);

  const auto begin = std::chrono::steady_clock::now();
  const auto reader = stub->Generate(&context, request);
  std::printf("%s", flags.prompt.c_str());
  v1::GenerateResponse response;
  int tokens = 0;
  while (reader->Read(&response)) {
    for (uint32_t token : response.token()) {
      std::putchar(static_cast<int>(token));
    }
    std::fflush(stdout);
    tokens += response.token_size();
  }
  const grpc::Status status = reader->Finish();
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin)
          .count();
  std::printf("\n");
  std::fflush(stdout);
  if (!status.ok()) {
    std::fprintf(stderr, "grpc_client: %s\n", status.error_message().c_str());
    return 1;
  }
  std::fprintf(stderr, "%d tokens in %.2f s, %.0f tokens/s\n", tokens, seconds,
               tokens / seconds);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Flags flags;
  if (!ParseFlags(argc, argv, &flags)) {
    std::fprintf(stderr, "%s", kUsage);
    return 2;
  }
  return Generate(flags);
}
