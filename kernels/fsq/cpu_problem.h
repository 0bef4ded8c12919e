// One quantizer as the kernel sees it, and the room that a block takes.
#pragma once

#include <vector>

#include "vlkern.h"

namespace vlkern::fsq {

// code = (scale digit - offset) / divisor
struct Channel {
  int64_t levels, stride;   // stride of the digit in the index
  const float* thresholds;  // [levels - 1], ascending
  float scale, offset, divisor;
};

// More thresholds than this are searched, fewer are counted.
constexpr int64_t kMostCounted = 63;
// Up to this many codes an index and all its terms are exact in float.
constexpr int64_t kExact = 1 << 24;

struct Quantizer {
  std::vector<Channel> channels;
  int64_t codes;  // their product

  Quantizer(const std::vector<int64_t>& levels, const float* thresholds, bool symmetric) : codes(1) {
    for (int64_t n : levels) {
      const auto last = float(n - 1), half = float(n / 2);
      channels.push_back(
          {n, codes, thresholds, symmetric ? 2.0f : 1.0f, symmetric ? last : half, symmetric ? last : half});
      thresholds += n - 1;
      codes *= n;
    }
  }
};

}  // namespace vlkern::fsq
