#ifndef TENON_TESTS_REFERENCE_PHILOX_REFERENCE_H_
#define TENON_TESTS_REFERENCE_PHILOX_REFERENCE_H_

#include <algorithm>
#include <cstdint>

namespace tenon::reference {

// The uniform that the sampler draws for (seed, position): the top 53 bits of
// Philox4x32-10 with this key and the counter (position, stream 0, version 2),
// words 0 and 1 of the result, as a number inside (0, 1).
inline double PhiloxUniform(uint64_t seed, uint64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position),
                   static_cast<uint32_t>(position >> 32), 0, 2};
  uint32_t key[2] = {static_cast<uint32_t>(seed),
                     static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t{c[0]} * 0xD2511F53;
    const uint64_t q = uint64_t{c[2]} * 0xCD9E8D57;
    c[0] = static_cast<uint32_t>(q >> 32) ^ c[1] ^ key[0];
    c[1] = static_cast<uint32_t>(q);
    c[2] = static_cast<uint32_t>(p >> 32) ^ c[3] ^ key[1];
    c[3] = static_cast<uint32_t>(p);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  const uint64_t bits = (uint64_t{c[0]} << 32 | c[1]) >> 11;
  const double uniform = (static_cast<double>(bits) + 0.5) * 0x1p-53;
  return std::min(uniform, 1.0 - 0x1p-53);
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_PHILOX_REFERENCE_H_
