#include "packing.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>

namespace vlkern {
namespace {

// Room left in each bin under a tree of maxima, so that the first bin with enough room is one descent away.
// Bins that are not open yet are bins with all their room: first fit opens them in order by itself.
class Rooms {
 public:
  Rooms(int64_t bins, int64_t capacity)
      : leaves_(int64_t(std::bit_ceil(uint64_t(bins)))), most_(2 * leaves_, capacity) {}

  int64_t first_with(int64_t length) const {
    int64_t node = 1;
    while (node < leaves_) node = 2 * node + (most_[2 * node] < length);
    return node - leaves_;
  }

  int64_t room(int64_t bin) const { return most_[leaves_ + bin]; }

  void take(int64_t bin, int64_t length) {
    int64_t node = leaves_ + bin;
    most_[node] -= length;
    while (node >>= 1) most_[node] = std::max(most_[2 * node], most_[2 * node + 1]);
  }

 private:
  int64_t leaves_;
  std::vector<int64_t> most_;  // most_[1] is the root; the children of i are 2 i and 2 i + 1
};

Bins prepare(const int64_t* lengths, int64_t n, int64_t capacity) {
  if (std::any_of(lengths, lengths + n, [=](int64_t length) { return length < 1 || length > capacity; }))
    throw std::invalid_argument("lengths must be between 1 and the capacity");
  return {std::vector<int64_t>(n), std::vector<int64_t>(n)};
}

std::vector<int64_t> in_stream_order(int64_t n) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

// Example after example, each into the lowest-numbered bin with room.
void fit(const std::vector<int64_t>& order, const int64_t* lengths, int64_t capacity, Bins& result) {
  Rooms rooms(int64_t(order.size()), capacity);
  for (int64_t example : order) {
    int64_t bin = rooms.first_with(lengths[example]);
    result.bin[example] = bin;
    result.offset[example] = capacity - rooms.room(bin);
    result.count = std::max(result.count, bin + 1);
    rooms.take(bin, lengths[example]);
  }
}

}  // namespace

Bins first_fit_decreasing(const int64_t* lengths, int64_t n, int64_t capacity) {
  Bins result = prepare(lengths, n, capacity);
  std::vector<int64_t> order = in_stream_order(n);
  std::stable_sort(order.begin(), order.end(), [=](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  fit(order, lengths, capacity, result);
  return result;
}

Bins first_fit(const int64_t* lengths, int64_t n, int64_t capacity) {
  Bins result = prepare(lengths, n, capacity);
  fit(in_stream_order(n), lengths, capacity, result);
  return result;
}

Bins in_order(const int64_t* lengths, int64_t n, int64_t capacity) {
  Bins result = prepare(lengths, n, capacity);
  int64_t room = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (lengths[i] > room) {
      room = capacity;
      ++result.count;
    }
    result.bin[i] = result.count - 1;
    result.offset[i] = capacity - room;
    room -= lengths[i];
  }
  return result;
}

}  // namespace vlkern
