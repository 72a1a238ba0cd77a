// What libstdc++ keeps of a thread's exceptions under way is thread-local. In a
// library that is opened at run time such memory comes from malloc, when a
// thread first throws, and where there is none left the C library ends the
// process. These definitions take the place of libstdc++'s in libtenon.so, with
// memory that is there as long as the thread (16 bytes of static TLS). The
// layout is the Itanium C++ ABI's, section 2.2.2.

namespace __cxxabiv1 {

struct __cxa_eh_globals {  // NOLINT: its name in that ABI
  void* caught_exceptions;
  unsigned int uncaught_exceptions;
};

namespace {
__attribute__((
    tls_model("initial-exec"))) thread_local __cxa_eh_globals globals;
}  // namespace

extern "C" __cxa_eh_globals* __cxa_get_globals() noexcept { return &globals; }
extern "C" __cxa_eh_globals* __cxa_get_globals_fast() noexcept {
  return &globals;
}

}  // namespace __cxxabiv1
