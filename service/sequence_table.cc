#include "service/sequence_table.h"

#include <utility>

#include "service/random.h"

namespace tenon::service {
namespace {

// SplitMix64's finaliser.
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

SequenceTable::SequenceTable(uint64_t epoch, int32_t capacity)
    : epoch_(epoch), key_(RandomBits()) {
  slots_.resize(static_cast<size_t>(capacity));
  for (int32_t i = capacity; i-- > 0;) {
    free_slots_.push_back(static_cast<uint32_t>(i));
  }
}

// A Feistel network: a permutation of the generation, another one each slot.
uint32_t SequenceTable::Tag(uint32_t slot, uint32_t generation) const {
  uint32_t left = generation >> 16;
  uint32_t right = generation & 0xffff;
  for (uint64_t round = 0; round < 6; ++round) {
    const uint64_t mixed =
        Mix(Mix(key_ + round) ^ (uint64_t{slot} << 16 | right));
    left ^= static_cast<uint32_t>(mixed >> 48);
    std::swap(left, right);
  }
  return left << 16 | right;
}

Sequence* SequenceTable::Add() {
  if (free_slots_.empty()) return nullptr;
  const uint32_t index = free_slots_.back();
  free_slots_.pop_back();
  Slot& slot = slots_[index];
  ++slot.generation;
  slot.sequence = std::make_unique<Sequence>();
  slot.sequence->handle =
      WithEpoch(epoch_, uint64_t{index} << 32 | Tag(index, slot.generation));
  return slot.sequence.get();
}

void SequenceTable::Remove(Sequence* sequence) {
  const size_t index = SlotOf(sequence->handle);
  slots_[index].sequence.reset();
  free_slots_.push_back(static_cast<uint32_t>(index));
}

}  // namespace tenon::service
