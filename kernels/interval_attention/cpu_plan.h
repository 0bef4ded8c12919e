// What attention is cut into: blocks of query rows for the forward, families of documents for the backward.
//
// Cuts follow the intervals, so that a packed document is cut as it would be alone: its bits do not depend on
// its neighbours.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "share.h"
#include "vlkern.h"

namespace vlkern::attention {

// The visible keys of each row, within [0, keys]; (0, 0) where there are none.
struct Bounds {
  std::vector<int32_t> start, stop;
  Bounds(const int32_t* from, const int32_t* to, int64_t rows, int64_t keys) : start(rows), stop(rows) {
    for (int64_t i = 0; i < rows; ++i) {
      int32_t a = std::clamp<int64_t>(from[i], 0, keys), b = std::clamp<int64_t>(to[i], 0, keys);
      if (a < b) start[i] = a, stop[i] = b;
    }
  }
  bool empty(int64_t i) const { return start[i] == stop[i]; }
};

// Neighbouring rows, and the hull [lo, hi) of their keys.
struct Segment {
  int64_t row, end;
  int64_t lo, hi;
};

// Cuts the rows wherever the keys of the next row are apart from all keys of the rows before: between
// documents, in a packed batch. Rows without keys end up inside a segment or in none.
inline std::vector<Segment> segments(const Bounds& b) {
  std::vector<Segment> found;
  for (int64_t i = 0; i < int64_t(b.start.size()); ++i) {
    if (b.empty(i)) continue;
    int64_t lo = b.start[i], hi = b.stop[i];
    if (found.empty() || lo >= found.back().hi || hi <= found.back().lo) {
      found.push_back({i, i + 1, lo, hi});
    } else {
      Segment& s = found.back();
      s = {s.row, i + 1, std::min(s.lo, lo), std::max(s.hi, hi)};
    }
  }
  return found;
}

inline std::vector<Segment> blocks(const std::vector<Segment>& whole, int64_t rows) {
  std::vector<Segment> parts;
  for (const Segment& s : whole)
    for (int64_t i = s.row; i < s.end; i += rows) parts.push_back({i, std::min(i + rows, s.end), s.lo, s.hi});
  return parts;
}

// Segments that share keys, and therefore their gradients; [lo, hi) is the hull.
struct Family {
  int64_t lo, hi;
  std::vector<Segment> members;
  // (row, key) pairs, about; what the largest-first order goes by.
  int64_t work() const {
    int64_t sum = 0;
    for (const Segment& s : members) sum += (s.end - s.row) * (s.hi - s.lo);
    return sum;
  }
};

inline std::vector<Family> families(std::vector<Segment> whole) {
  std::stable_sort(whole.begin(), whole.end(),
                   [](const Segment& a, const Segment& b) { return a.lo < b.lo; });
  std::vector<Family> found;
  for (const Segment& s : whole) {
    if (found.empty() || s.lo >= found.back().hi) found.push_back({s.lo, s.hi, {}});
    found.back().hi = std::max(found.back().hi, s.hi);
    found.back().members.push_back(s);
  }
  return found;
}

}  // namespace vlkern::attention
