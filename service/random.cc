#include "service/random.h"

#include <sys/random.h>

namespace tenon::service {

uint64_t RandomBits() {
  uint64_t bits = 0;
  // The kernel gives eight bytes at once or, interrupted, none.
  while (bits == 0 && getrandom(&bits, sizeof(bits), 0) != sizeof(bits)) {
    bits = 0;
  }
  return bits == 0 ? RandomBits() : bits;
}

}  // namespace tenon::service
