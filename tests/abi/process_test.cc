#include <dirent.h>
#include <dlfcn.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <locale>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "abi/tenon.h"
#include "gtest/gtest.h"

// libtenon.so.1 as a guest: opened with RTLD_LOCAL by a C++ host that has a
// libstdc++ of its own. What the library must not do is noticed by functions
// that this program puts in front of libc's.

namespace {

std::atomic<bool> watching{false};
std::atomic<int> num_env_reads{0};
std::atomic<int> num_handlers{0};          // of signals and of exit
std::atomic<int> num_host_allocations{0};  // through this program's new
thread_local bool starved = false;         // malloc fails

void Watch() {
  num_env_reads = num_handlers = num_host_allocations = 0;
  watching = true;
}

template <class Function>
Function* Next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

#define IN_FRONT extern "C" __attribute__((visibility("default"), used))

IN_FRONT char* getenv(const char* name) noexcept {
  if (watching) ++num_env_reads;
  return Next<char*(const char*)>("getenv")(name);
}

IN_FRONT char* secure_getenv(const char* name) noexcept { return getenv(name); }

IN_FRONT int sigaction(int signal, const struct sigaction* action,
                       struct sigaction* old) noexcept {
  if (watching && action != nullptr) ++num_handlers;
  return Next<decltype(sigaction)>("sigaction")(signal, action, old);
}

IN_FRONT int __cxa_atexit(void (*function)(void*), void* argument, void* dso) {
  if (watching) ++num_handlers;
  return Next<int(void (*)(void*), void*, void*)>("__cxa_atexit")(
      function, argument, dso);
}

// Sanitizers have the allocator to themselves.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kOwnAllocator = false;
#else
constexpr bool kOwnAllocator = true;

extern "C" void* __libc_malloc(size_t size);
IN_FRONT void* malloc(size_t size) noexcept {
  return starved ? nullptr : __libc_malloc(size);
}

void* operator new(size_t size) {
  if (watching) ++num_host_allocations;
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
#endif

namespace {

constexpr char kModel[] = "examples/models/austen";
constexpr char kWeights[] = "model.safetensors";

void* Open() { return dlopen("abi/libtenon.so.1", RTLD_NOW | RTLD_LOCAL); }

template <class Function>
Function* Find(const char* name) {
  static void* const library = Open();
  return reinterpret_cast<Function*>(dlsym(library, name));
}

#define TENON(function) Find<decltype(tenon_##function)>("tenon_" #function)

template <class Struct>
Struct Sized() {
  Struct result;
  std::memset(&result, 0, sizeof(result));
  result.struct_size = sizeof(result);
  return result;
}

// A user of the library. Methods return a status code, and `error` has the
// message.
struct Client {
  int32_t CreateContext() {
    auto options = Sized<tenon_context_options>();
    options.device_type = TENON_DEVICE_CPU;
    options.num_threads = 4;
    return TENON(context_create)(&options, &context, &error);
  }

  int32_t RunOp() {
    static std::array<float, 256 * 64> data{};
    int64_t shape[] = {256, 64};
    DLTensor x = {};
    x.data = data.data();
    x.device.device_type = TENON_DL_CPU;
    x.ndim = 2;
    x.dtype = {TENON_DL_FLOAT, 32, 1};
    x.shape = shape;
    static std::array<float, 64> ones{};
    DLTensor weight = x;
    weight.data = ones.data();
    weight.ndim = 1;
    weight.shape = shape + 1;
    auto args = Sized<tenon_rms_norm_args>();
    args.x = args.out = &x;
    args.weight = &weight;
    args.epsilon = 1e-6f;
    return TENON(rms_norm)(context, &args, nullptr, &error);
  }

  int32_t LoadModel(const char* directory) {
    auto args = Sized<tenon_model_load_args>();
    args.device_type = TENON_DEVICE_CPU;
    args.directory = directory;
    return TENON(model_load)(&args, &model, &error);
  }

  int32_t CreateSession() {
    auto options = Sized<tenon_session_options>();
    options.max_sequences = 4;
    options.num_threads = 3;
    const int32_t code =
        TENON(session_create)(model, &options, &session, &error);
    if (code != TENON_OK) return code;
    return TENON(sequence_create)(session, &sequence, &error);
  }

  int32_t Step() {
    const int32_t text[] = {'S', 'h', 'e'};
    const tenon_sampling_params greedy = {};
    auto row = Sized<tenon_step_row>();
    row.sequence = sequence;
    row.tokens = text;
    row.num_tokens = 3;
    row.sampling = &greedy;
    int32_t token = -1;
    auto args = Sized<tenon_step_args>();
    args.rows = &row;
    args.num_rows = 1;
    args.tokens = &token;
    return TENON(session_step)(session, &args, &error);
  }

  // One of everything, used.
  int32_t Create() {
    int32_t code = CreateContext();
    if (code == TENON_OK) code = RunOp();
    if (code == TENON_OK) code = LoadModel(kModel);
    if (code == TENON_OK) code = CreateSession();
    if (code == TENON_OK) code = Step();
    return code;
  }

  int32_t Destroy() {
    int32_t code = TENON(session_destroy)(session, &error);
    if (code == TENON_OK) code = TENON(model_destroy)(model, &error);
    if (code == TENON_OK) code = TENON(context_destroy)(context, &error);
    return code;
  }

  tenon_error error = Sized<tenon_error>();
  tenon_context context = 0;
  tenon_model model = 0;
  tenon_session session = 0;
  tenon_sequence sequence = 0;
};

// The names in a directory, without the descriptor that reading it takes.
std::set<std::string> Entries(const char* directory) {
  std::set<std::string> entries;
  DIR* stream = opendir(directory);
  const std::string own = std::to_string(dirfd(stream));
  while (const dirent* entry = readdir(stream)) {
    if (entry->d_name != own) entries.insert(entry->d_name);
  }
  closedir(stream);
  return entries;
}

std::set<std::string> OpenFiles() { return Entries("/proc/self/fd"); }
std::set<std::string> Threads() { return Entries("/proc/self/task"); }

// A thread that was joined may be listed a moment longer.
bool ThreadsComeBackTo(const std::set<std::string>& before) {
  for (int i = 0; i < 500 && Threads() != before; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return Threads() == before;
}

bool IsMapped(const std::string& name) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find(name) != std::string::npos) return true;
  }
  return false;
}

std::vector<std::pair<void*, int>> SignalHandlers() {
  std::vector<std::pair<void*, int>> handlers;
  for (int signal = 1; signal < NSIG; ++signal) {
    struct sigaction action = {};
    sigaction(signal, nullptr, &action);
    handlers.emplace_back(reinterpret_cast<void*>(action.sa_handler),
                          action.sa_flags);
  }
  return handlers;
}

// Runs body() in a forked child for at most 30 seconds; its exit code is what
// body returns. The result is waitpid's status: 0 if all went well.
int InChild(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    _exit(body());
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

// Sends standard output and error to a pipe while it lives.
class Silence {
 public:
  Silence() {
    std::fflush(nullptr);
    EXPECT_EQ(pipe(pipe_), 0);
    for (int fd : {1, 2}) {
      saved_[fd - 1] = dup(fd);
      dup2(pipe_[1], fd);
    }
  }

  // What was written. Ends the silence.
  std::string End() {
    std::fflush(nullptr);
    for (int fd : {1, 2}) {
      dup2(saved_[fd - 1], fd);
      close(saved_[fd - 1]);
    }
    close(pipe_[1]);
    char text[4096];
    const ssize_t size = read(pipe_[0], text, sizeof(text));
    close(pipe_[0]);
    return std::string(text, std::max<ssize_t>(size, 0));
  }

 private:
  int pipe_[2];
  int saved_[2];
};

// Stands first: no other test has opened the library yet.
TEST(ProcessTest, LoadingReadsNoEnvironmentAndHandlesNoSignal) {
  const auto handlers = SignalHandlers();
  Silence silence;
  Watch();
  void* library = Open();
  watching = false;
  EXPECT_EQ(silence.End(), "");
  ASSERT_NE(library, nullptr) << dlerror();
  EXPECT_EQ(num_env_reads, 0);
  EXPECT_TRUE(SignalHandlers() == handlers);
}

TEST(ProcessTest, LeavesTheProcessAsItWas) {
  Client client;
  const auto handlers = SignalHandlers();
  const auto files = OpenFiles();
  const auto threads = Threads();
  Silence silence;
  Watch();
  const int32_t created = client.Create();
  const int32_t refused = TENON(rms_norm)(0, nullptr, nullptr, nullptr);
  watching = false;
  const bool has_threads = Threads() != threads;
  const bool was_mapped = IsMapped(kWeights);
  watching = true;
  const int32_t destroyed = client.Destroy();
  watching = false;
  EXPECT_EQ(silence.End(), "");

  ASSERT_EQ(created, TENON_OK) << client.error.message;
  EXPECT_EQ(refused, TENON_INVALID_ARGUMENT);
  EXPECT_EQ(destroyed, TENON_OK) << client.error.message;
  EXPECT_TRUE(has_threads && was_mapped);  // something to clean up

  EXPECT_EQ(num_env_reads, 0);
  EXPECT_EQ(num_handlers, 0);
  EXPECT_EQ(num_host_allocations, 0);
  EXPECT_TRUE(SignalHandlers() == handlers);
  EXPECT_TRUE(ThreadsComeBackTo(threads));
  EXPECT_EQ(OpenFiles(), files);
  EXPECT_FALSE(IsMapped(kWeights));
}

// The guards above notice what they are there for.
TEST(ProcessTest, TheGuardsNotice) {
  Silence silence;
  Watch();
  EXPECT_NE(std::getenv("PATH"), nullptr);
  struct sigaction action = {};
  sigaction(SIGUSR1, nullptr, &action);
  sigaction(SIGUSR1, &action, nullptr);
  ::operator delete(::operator new(1));
  watching = false;
  std::puts("output");
  EXPECT_EQ(silence.End(), "output\n");
  EXPECT_EQ(num_env_reads, 1);
  EXPECT_EQ(num_handlers, 1);
  EXPECT_EQ(num_host_allocations, kOwnAllocator ? 1 : 0);
}

TEST(ProcessTest, ASessionKeepsItsModelMapped) {
  Client client;
  const auto files = OpenFiles();
  ASSERT_EQ(client.Create(), TENON_OK) << client.error.message;
  ASSERT_EQ(TENON(model_destroy)(client.model, nullptr), TENON_OK);
  EXPECT_TRUE(IsMapped(kWeights));
  EXPECT_EQ(client.Step(), TENON_OK) << client.error.message;
  ASSERT_EQ(TENON(session_destroy)(client.session, nullptr), TENON_OK);
  EXPECT_FALSE(IsMapped(kWeights));
  EXPECT_EQ(OpenFiles(), files);
  EXPECT_EQ(TENON(context_destroy)(client.context, nullptr), TENON_OK);
}

TEST(ProcessTest, AFailedLoadLeavesNothingOpen) {
  Client client;
  const std::string directory = testing::TempDir() + "/half_a_model";
  ASSERT_EQ(std::system(("mkdir -p " + directory + " && cp -L " + kModel +
                         "/config.json " + directory + " && head -c 100000 " +
                         kModel + "/model.safetensors > " + directory +
                         "/model.safetensors")
                            .c_str()),
            0);
  const auto files = OpenFiles();
  const auto threads = Threads();
  EXPECT_EQ(client.LoadModel(directory.c_str()), TENON_DATA_LOSS);
  EXPECT_EQ(OpenFiles(), files);
  EXPECT_FALSE(IsMapped(kWeights));
  EXPECT_TRUE(ThreadsComeBackTo(threads));
}

// ----------------------------------------------------------------------- fork

TEST(ProcessTest, HandlesDoNotCrossAFork) {
  Client parent;
  ASSERT_EQ(parent.Create(), TENON_OK) << parent.error.message;
  const int status = InChild([&] {
    auto context_info = Sized<tenon_context_info>();
    auto model_info = Sized<tenon_model_info>();
    auto session_info = Sized<tenon_session_info>();
    const int32_t codes[] = {
        TENON(context_query)(parent.context, &context_info, nullptr),
        TENON(model_query)(parent.model, &model_info, nullptr),
        TENON(session_query)(parent.session, &session_info, nullptr),
        parent.RunOp(),
        parent.CreateSession(),
        parent.Step(),
        TENON(session_destroy)(parent.session, nullptr),
        TENON(model_destroy)(parent.model, nullptr),
        TENON(context_destroy)(parent.context, nullptr),
    };
    int failures = 0;
    for (const int32_t code : codes) {
      failures += code != TENON_FAILED_PRECONDITION;
    }
    return failures;
  });
  EXPECT_EQ(status, 0) << WEXITSTATUS(status) << " calls";
  // The parent goes on.
  EXPECT_EQ(parent.Step(), TENON_OK) << parent.error.message;
  EXPECT_EQ(parent.RunOp(), TENON_OK) << parent.error.message;
  EXPECT_EQ(parent.Destroy(), TENON_OK) << parent.error.message;
}

TEST(ProcessTest, AForkedChildCanStartAfresh) {
  Client parent;
  ASSERT_EQ(parent.Create(), TENON_OK) << parent.error.message;
  EXPECT_EQ(InChild([] {
              Client child;
              if (child.Create() != TENON_OK) return 1;
              return child.Destroy() == TENON_OK ? 0 : 2;
            }),
            0);
  EXPECT_EQ(parent.Destroy(), TENON_OK) << parent.error.message;
}

// Whatever lock another thread holds at the moment of the fork, the child does
// not wait for it.
TEST(ProcessTest, ForkingAmidCallsOfOtherThreads) {
  if (!kOwnAllocator) GTEST_SKIP() << "the sanitizer's malloc waits for ever";
  std::atomic<bool> stop{false};
  std::vector<std::thread> busy;
  for (int i = 0; i < 3; ++i) {
    busy.emplace_back([&] {
      Client client;
      while (!stop) {
        EXPECT_EQ(client.CreateContext(), TENON_OK) << client.error.message;
        EXPECT_EQ(client.RunOp(), TENON_OK) << client.error.message;
        EXPECT_EQ(TENON(context_destroy)(client.context, nullptr), TENON_OK);
      }
    });
  }
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(InChild([] {
                Client child;
                if (child.CreateContext() != TENON_OK) return 1;
                if (child.RunOp() != TENON_OK) return 2;
                return TENON(context_destroy)(child.context, nullptr);
              }),
              0);
  }
  stop = true;
  for (std::thread& thread : busy) thread.join();
}

// ------------------------------------------------------------ loading and exit

TEST(ProcessTest, ClosingTheLibraryDoesNotUnloadIt) {
  Client client;
  ASSERT_EQ(client.Create(), TENON_OK) << client.error.message;
  auto* abi_version = TENON(abi_version);
  void* library = Open();
  for (int i = 0; i < 100; ++i) dlclose(library);  // the last reference as well
  EXPECT_EQ(abi_version() >> 16, uint32_t{TENON_ABI_MAJOR});
  EXPECT_TRUE(IsMapped("libtenon.so.1"));
  EXPECT_EQ(Open(), library);
  EXPECT_EQ(client.Step(), TENON_OK) << client.error.message;
  EXPECT_EQ(client.Destroy(), TENON_OK) << client.error.message;
}

// Leaving main with everything alive, also while another thread is in a call.
TEST(ProcessTest, ExitsWithLiveObjects) {
  EXPECT_EXIT(
      {
        alarm(30);
        auto* client = new Client;
        if (client->Create() != TENON_OK) _exit(1);
        std::thread([client] {
          while (true) client->RunOp();
        }).detach();
        std::exit(0);
      },
      testing::ExitedWithCode(0), "^$");
}

// --------------------------------------------------------- a C++ host's own
// state

struct HostError : std::runtime_error {
  using std::runtime_error::runtime_error;
  std::string detail = "with a member";
};

// Host and library throw and catch at the same time, each in its own runtime:
// where there is no memory, the library throws std::bad_alloc within.
TEST(ProcessTest, ExceptionsOfHostAndLibraryDoNotMeet) {
  if (!kOwnAllocator) GTEST_SKIP() << "the sanitizer has malloc";
  std::vector<std::thread> threads;
  std::atomic<int> num_caught{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      Client client;
      for (int j = 0; j < 200; ++j) {
        try {
          starved = true;
          const int32_t code = client.CreateContext();
          starved = false;
          throw HostError(TENON(status_name)(code));
        } catch (const std::exception& e) {
          const auto* mine = dynamic_cast<const HostError*>(&e);
          if (mine != nullptr && mine->detail == "with a member" &&
              mine->what() == std::string("RESOURCE_EXHAUSTED")) {
            ++num_caught;
          }
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_caught, 4 * 200);
}

// Numbers in messages and files are the C locale's, whatever the host's is.
TEST(ProcessTest, TheHostsLocaleIsItsOwn) {
  struct Comma : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::locale before =
      std::locale::global(std::locale(std::locale(), new Comma));
  Client client;
  EXPECT_EQ(client.Create(), TENON_OK) << client.error.message;
  auto args = Sized<tenon_rms_norm_args>();
  args.struct_size = 123456789;
  EXPECT_EQ(TENON(rms_norm)(0, &args, nullptr, &client.error),
            TENON_INVALID_ARGUMENT);
  EXPECT_NE(std::strstr(client.error.message, "123456789"), nullptr)
      << client.error.message;
  EXPECT_EQ(client.Destroy(), TENON_OK);
  std::locale::global(before);
}

}  // namespace
