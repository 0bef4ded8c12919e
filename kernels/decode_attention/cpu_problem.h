// One call as the kernel sees it, and how its keys are cut into tasks.
#pragma once

#include "vlkern.h"

namespace vlkern::decode {

// Keys or values [B, S, K, width]: bytes between rows, slots and heads. The scales of int8 [B, S, K] with
// strides of their own, in floats; else null.
struct Stored {
  const char* data;
  int64_t row, slot, head, width;
  const float* scale;
  int64_t scale_row, scale_slot, scale_head;
};

struct Problem {
  Stored k, v;
  int64_t tokens, query_heads, key_heads, slots;
  int64_t window;    // 0: none
  float scale, cap;  // cap 0: no softcap
  const void* q;     // [B, L, H, C]
  void* out;         // [B, L, H, Cv]

  int64_t group() const { return tokens * (query_heads / key_heads); }  // queries that share a key head
  int64_t queries() const { return tokens * query_heads; }
};

constexpr int64_t kTile = 64;  // keys whose scores are computed before the softmax sees them

// The positions [lo, hi) that the queries of a row of the cache see, cut into tasks of `chunk` each.
struct Row {
  int64_t lo, hi, chunk, first_task, tasks;
};

// A task reads at least 128 KiB, for its fixed costs; a 64th of a long row, so that adding up the parts costs
// little; and a multiple of what it writes. Threads play no part: bits must not depend on their number.
inline Row row_of(const Problem& p, int64_t length, int64_t key_bytes, int64_t first_task) {
  const int64_t hi = std::max<int64_t>(length, 0);
  int64_t lo = std::max<int64_t>(hi - p.slots, 0);
  if (p.window) lo = std::max(lo, hi - p.tokens - p.window + 1);
  const int64_t part_bytes = p.queries() * p.v.width * int64_t(sizeof(float));
  const int64_t bytes = std::max({int64_t(128) << 10, (hi - lo) * key_bytes / 64, 4 * part_bytes});
  const int64_t chunk = round_up(ceil_div(bytes, key_bytes), kTile);
  return {lo, hi, chunk, first_task, std::max<int64_t>(1, ceil_div(hi - lo, chunk))};
}

}  // namespace vlkern::decode
