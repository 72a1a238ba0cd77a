#include "ops/sampler/sampler_cpu_draw.h"

#include <algorithm>
#include <cmath>

namespace tenon {
namespace {

// Calls visit(tile, weight of its maximum) for all sub-tiles.
template <class Visit>
void ForEachTile(const CpuRow& row, Visit&& visit) {
  constexpr int64_t kBatch = 64;
  float max[kBatch];
  for (int64_t begin = 0; begin < row.num_tiles(); begin += kBatch) {
    const int64_t size = std::min(kBatch, row.num_tiles() - begin);
    for (int64_t i = 0; i < size; ++i) max[i] = row.tiles[begin + i].max;
    row.kernels.weights(max, size, row.best, row.plan.scale, max);
    for (int64_t i = 0; i < size; ++i) visit(begin + i, max[i]);
  }
}

}  // namespace

float BestOf(const SubTile* tiles, int64_t count) {
  float best = -INFINITY;
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(tiles[i].max)) return NAN;
    best = std::max(best, tiles[i].max);
  }
  return best;
}

uint64_t TotalOf(const CpuRow& row) {
  uint64_t total = 0;
  ForEachTile(row, [&](int64_t tile, float weight) {
    total += TileMass(row.tiles[tile].sum, weight, kMassBits);
  });
  return total;
}

float LogitAt(const CpuRow& row, int64_t id) {
  const int32_t place = DrawOrder(static_cast<int32_t>(id), row.logits.vocab);
  float x[kSubTile];
  row.kernels.load(row.logits, place / kSubTile, x);
  return x[place % kSubTile];
}

int64_t FirstBestToken(const CpuRow& row) {
  int64_t first = row.logits.vocab;
  float x[kSubTile];
  for (int64_t tile = 0; tile < row.num_tiles(); ++tile) {
    if (row.tiles[tile].max != row.best) continue;
    row.kernels.load(row.logits, tile, x);
    const int64_t place = std::find(x, x + kSubTile, row.best) - x;
    first = std::min(first, IdOfPlace(row, tile * kSubTile + place));
  }
  return first;
}

int64_t DrawPlain(const CpuRow& row, uint64_t numerator) {
  const int bits = DrawBits(row.total);
  uint64_t total = 0;
  ForEachTile(row, [&](int64_t tile, float weight) {
    total += TileMass(row.tiles[tile].sum, weight, bits);
  });
  const uint64_t target = DrawTarget(numerator, total);
  uint64_t before = 0;
  uint64_t residual = 0;
  uint64_t mass = 0;
  int64_t drawn = -1;
  ForEachTile(row, [&](int64_t tile, float weight) {
    if (drawn >= 0) return;
    mass = TileMass(row.tiles[tile].sum, weight, bits);
    if (before + mass > target) {
      drawn = tile;
      residual = target - before;
    }
    before += mass;
  });
  float x[kSubTile];
  row.kernels.load(row.logits, drawn, x);
  row.kernels.weights(x, kSubTile, row.tiles[drawn].max, row.plan.scale, x);
  uint64_t weight = 0;
  for (float e : x) weight += FixedMass(e);
  const uint64_t target_in_tile = TargetInTile(residual, mass, weight);
  uint64_t sum = 0;
  int place = 0;
  while ((sum += FixedMass(x[place])) <= target_in_tile) ++place;
  return IdOfPlace(row, drawn * kSubTile + place);
}

int64_t DrawKept(const CpuRow& row, const Candidates& c, const KeptTokens& kept,
                 uint64_t numerator) {
  const uint64_t target = DrawTarget(numerator, kept.mass);
  uint64_t before = 0;
  for (int64_t begin = 0; begin < c.count; begin += kSubTile) {
    const int64_t size = std::min<int64_t>(kSubTile, c.count - begin);
    const uint64_t mass =
        row.kernels.mass(c.x + begin, size, kept.best, row.plan.draw_scale);
    if (before + mass <= target) {
      before += mass;
      continue;
    }
    float e[kSubTile];
    row.kernels.weights(c.x + begin, size, kept.best, row.plan.draw_scale, e);
    int64_t i = 0;
    while ((before += FixedMass(e[i])) <= target) ++i;
    return IdOfPlace(row, c.places[begin + i]);
  }
  return -1;  // kept.mass is the sum of them all
}

}  // namespace tenon
