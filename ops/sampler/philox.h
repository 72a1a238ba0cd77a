#ifndef TENON_OPS_SAMPLER_PHILOX_H_
#define TENON_OPS_SAMPLER_PHILOX_H_

#include <cstdint>

// Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3"
// (2011): random words as a function of a key and a counter, without state.
// constexpr, so that device code may call it too.

namespace tenon {

struct PhiloxBlock {
  uint32_t word[4] = {};
};

constexpr PhiloxBlock Philox4x32(PhiloxBlock counter, uint32_t key_low,
                                 uint32_t key_high) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t odd = uint64_t{0xCD9E8D57u} * counter.word[2];
    const uint32_t c1 = counter.word[1];
    const uint32_t c3 = counter.word[3];
    counter.word[0] = static_cast<uint32_t>(odd >> 32) ^ c1 ^ key_low;
    counter.word[1] = static_cast<uint32_t>(odd);
    counter.word[2] = static_cast<uint32_t>(even >> 32) ^ c3 ^ key_high;
    counter.word[3] = static_cast<uint32_t>(even);
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return counter;
}

// The top 53 of 64 random bits, b, make u = (b + 1/2) * 2^-53, inside (0, 1).
// This is u * 2^54, an odd number: exact, where a double is for the lower half
// of the values only.
constexpr uint64_t UniformNumerator(uint64_t bits) {
  return (bits >> 11) * 2 + 1;
}

// u as a double: rounded to even in the upper half, and the one value that
// would round to 1 becomes the double before it.
constexpr double UniformFromBits(uint64_t bits) {
  const double uniform = (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53;
  return uniform < 1.0 ? uniform : 1.0 - 0x1p-53;
}

// What draws from one request's position are for: different streams are
// independent.
enum class RandomStream : uint32_t {
  kTarget = 0,    // the token
  kDraft = 1,     // the token of a draft model
  kAccept = 2,    // whether to accept a draft
  kResidual = 3,  // the token in place of a rejected draft
  kXtc = 4,       // whether XTC drops tokens
};

// Version of the mapping from (seed, position) to tokens. Any change to it
// changes what users get for a seed.
inline constexpr uint32_t kRandomVersion = 2;

constexpr uint64_t RandomBitsAt(uint64_t seed, uint64_t position,
                                RandomStream stream) {
  const PhiloxBlock counter = {{static_cast<uint32_t>(position),
                                static_cast<uint32_t>(position >> 32),
                                static_cast<uint32_t>(stream), kRandomVersion}};
  const PhiloxBlock random = Philox4x32(counter, static_cast<uint32_t>(seed),
                                        static_cast<uint32_t>(seed >> 32));
  return (uint64_t{random.word[0]} << 32) | random.word[1];
}

constexpr double UniformAt(uint64_t seed, uint64_t position,
                           RandomStream stream) {
  return UniformFromBits(RandomBitsAt(seed, position, stream));
}

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_PHILOX_H_
