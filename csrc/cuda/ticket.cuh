// Which of several blocks is done last, told by a counter that need not be zero before: memory as the
// allocator gives it, so nothing is kept between calls, streams never meet, and a CUDA graph may be replayed.
//
// The counter holds the call's number in its upper 48 bits and counts arrivals in the others. Any block of
// the call opens it, which gives it the number unless it has it; the last one leaves zero, so that a replay
// with the same number finds another. Numbers come from a generator whose values do not repeat: that memory
// holds one by chance has odds of 2^-47.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace vlkern::cuda {

using Ticket = unsigned long long;
constexpr int kArrivalBits = 16;

// A number for a call, its lower 16 bits zero, itself not: splitmix64 of a count.
inline Ticket new_call() {
  static std::atomic<uint64_t> count{0};
  uint64_t x = count.fetch_add(1, std::memory_order_relaxed) * 0x9e3779b97f4a7c15u + 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return (x ^ (x >> 31)) >> kArrivalBits << kArrivalBits | Ticket(1) << kArrivalBits;
}

// By one thread of each block that will arrive, as early as possible: it waits for memory.
__device__ inline void open_counter(Ticket* counter, Ticket call) {
  Ticket seen = atomicAdd(counter, 0);
  while (seen >> kArrivalBits != call >> kArrivalBits) {
    const Ticket before = atomicCAS(counter, seen, call);
    if (before == seen) return;
    seen = before;
  }
}

// By the same thread, when the block's results are visible to the others: true for the last of `blocks`.
__device__ inline bool arrive_last(Ticket* counter, unsigned blocks) {
  const Ticket before = atomicAdd(counter, 1);
  const bool last = (before & ((Ticket(1) << kArrivalBits) - 1)) + 1 == blocks;
  if (last) *counter = 0;
  return last;
}

}  // namespace vlkern::cuda
