#ifndef TENON_SERVICE_RANDOM_H_
#define TENON_SERVICE_RANDOM_H_

#include <cstdint>

namespace tenon::service {

// From the kernel: nobody can guess it. Never 0.
uint64_t RandomBits();

}  // namespace tenon::service

#endif  // TENON_SERVICE_RANDOM_H_
