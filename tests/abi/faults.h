#ifndef TENON_TESTS_ABI_FAULTS_H_
#define TENON_TESTS_ABI_FAULTS_H_

#include <cstdint>

// Makes what the library asks of the system fail. Linking this in replaces
// operator new and delete, pthread_create, and the functions of faults.bzl.

namespace tenon::testing {

enum class FaultKind {
  kMemory,  // operator new, posix_memalign
  kSystem,  // files, mappings, threads
  kCuda,    // the CUDA runtime
};

enum class FaultMode {
  kNone,  // calls are only counted
  kOnce,  // one call fails
  kOn,    // that one and all later ones
};

// While one of these lives, calls of a kind are counted from 0, and number
// `first` fails. One at a time, but for all threads.
class Faults {
 public:
  Faults(FaultKind kind, FaultMode mode, int64_t first = 0);
  ~Faults();
  Faults(const Faults&) = delete;
  Faults& operator=(const Faults&) = delete;

  // Calls so far.
  int64_t calls() const;
};

// What has been taken and not given back: allocations; files and mappings;
// memory and streams of CUDA devices.
int64_t NumHeld(FaultKind kind);

// For the replacements: whether this call is to fail, and what was taken (1) or
// given back (-1).
bool FaultStrikes(FaultKind kind);
void CountHeld(FaultKind kind, int64_t change);

}  // namespace tenon::testing

#endif  // TENON_TESTS_ABI_FAULTS_H_
