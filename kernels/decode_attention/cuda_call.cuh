// One call as the GPU sees it: where things lie in memory, and how a block's shared memory is cut up.
#pragma once

#include <cuda_runtime.h>

#include "cuda/async.cuh"
#include "cuda/ticket.cuh"

namespace vlkern::decode {

constexpr int kKeys = 16;    // of a stage: the rows of a product on the tensor cores
constexpr int kQueries = 8;  // of a warp: its columns
constexpr int kConsumers = 4;
constexpr int kThreads = 32 * (1 + kConsumers);  // the last warp copies
constexpr int kMostStages = 16;
constexpr int kLeastKeys = 64;   // of a part: a stage for each warp that computes
constexpr int kMostParts = 512;  // of a row

// Keys or values [B, S, K, columns]: bytes between rows, slots and heads. The scales of int8 [B, S, K] with
// strides of their own, in floats; else null.
struct Stored {
  const char* data;
  int64_t row, slot, head;
  const float* scale;
  int64_t scale_row, scale_slot, scale_head;
  int columns;
  int bytes;  // of a head's row
  int pitch;  // between rows in shared memory
  int piece;  // bytes of one copy, 16 or 8
};

struct Call {
  Stored k, v;
  const void* q;          // [B, L, H, C]
  void* out;              // [B, L, H, Cv]
  const int32_t* length;  // [B]
  float* sums;            // [groups, parts, block_queries, Cv], of each part
  float* stats;           // [groups, parts, block_queries, 2]: largest score and sum of weights
  cuda::Ticket* counter;  // [groups]
  cuda::Ticket number;
  int tokens, heads, key_heads, slots, window;
  int teams;   // warps that share a stage, each with queries of its own
  int blocks;  // of queries that read the same keys
  int parts;   // of a row's keys, at most
  int stages;
  float factor, cap;  // from dot products to scores in units of log2; cap 0: no softcap

  __host__ __device__ int group() const { return heads / key_heads; }
  __host__ __device__ int queries() const { return tokens * group(); }  // that read one key head
  __host__ __device__ int block_queries() const { return teams * kQueries; }
};

// Rows this far apart lie 16 bytes further around the 32 banks each: 16-byte reads of the rows that key_row()
// brings together, and of eight in a row, meet no bank twice.
__host__ __device__ constexpr int pitch_of(int bytes) {
  return (bytes + 127 - 16) / 128 * 128 + 16;
}

// Which row of a stage is row m of the products. Neighbours m, m + 1 (m even, what a quarter of a warp reads
// of the keys) are 4 rows apart modulo 8; 0, 2, 4, 6 (what it reads of the values) 2 apart. Row m + 8 is the
// one after.
__host__ __device__ constexpr int key_row(int m) {
  const int even = m & 6;
  return (m & 1 ? 8 + (even + 4) % 8 : even) + (m >> 3);
}

// Byte offsets in a block's shared memory. Once all keys are read, the warps' sums and their statistics take
// the place of the stages.
struct Layout {
  int full, empty, scales, q, q_row, scratch, ring, stage, values, all;

  // Bytes of T, and of the padded columns of q for one query.
  __host__ __device__ Layout(const Call& call, int size) {
    const int columns = (call.k.columns + 31) / 32 * 32;
    full = 0;
    empty = full + kMostStages * 8;
    scales = empty + kMostStages * 8;
    scratch = scales + kMostStages * 2 * kKeys * 4;
    q = scratch + kConsumers * (kKeys + 1) * kQueries * 4;
    q_row = pitch_of(columns * size);
    ring = q + (call.teams * kQueries * q_row + 127) / 128 * 128;
    values = kKeys * call.k.pitch;
    stage = values + kKeys * call.v.pitch;
    const int sums = kConsumers * kQueries * (call.v.columns + 2) * 4, stages = call.stages * stage;
    all = ring + (stages > sums ? stages : sums);
  }
};

// The positions [low, high) that one block reads.
struct Span {
  int length, begin, end, parts;

  __device__ Span(const Call& call, int b, int part) {
    length = call.length[b] > 0 ? call.length[b] : 0;
    int low = length - call.slots;
    low = low > 0 ? low : 0;
    const int seen = length - call.tokens - call.window + 1;
    low = low > seen ? low : seen;
    int chunk = (length - low + call.parts - 1) / call.parts;
    chunk = (chunk + kLeastKeys - 1) / kLeastKeys * kLeastKeys;
    chunk = chunk > kLeastKeys ? chunk : kLeastKeys;
    parts = (length - low + chunk - 1) / chunk;
    parts = parts > 1 ? parts : 1;
    begin = low + part * chunk;
    end = length - begin > chunk ? begin + chunk : length;
  }
};

}  // namespace vlkern::decode
