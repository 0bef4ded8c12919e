// Bin packing of ragged examples into sequences of a fixed number of tokens; the guarantees are in
// docs/packing.md.
#pragma once

#include <cstdint>
#include <vector>

namespace vlkern {

struct Bins {
  std::vector<int64_t> bin;     // [n] bin of each example
  std::vector<int64_t> offset;  // [n] its first token inside that bin
  int64_t count = 0;            // bins opened
};

// All throw std::invalid_argument unless 1 <= lengths[i] <= capacity for every i < n.

// Longest example first, each into the lowest-numbered bin with room. O(n log n) time, 4 n integers of
// memory.
Bins first_fit_decreasing(const int64_t* lengths, int64_t n, int64_t capacity);

// Examples in their order, each into the lowest-numbered bin with room. O(n log n), 4 n integers.
Bins first_fit(const int64_t* lengths, int64_t n, int64_t capacity);

// Examples in their order; a bin closes when the next example does not fit. O(n).
Bins in_order(const int64_t* lengths, int64_t n, int64_t capacity);

}  // namespace vlkern
