// Where the part of an affine coupling lies, and its way into contiguous memory and back.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "checks.h"

namespace vlkern::coupling {

constexpr int64_t kPiece = 1 << 12;  // elements a thread takes at a time: 10 us

struct Problem : Shape {
  std::vector<int32_t> slot;          // token of x -> row of the part or -1; empty: all, in order
  const int32_t* channels = nullptr;  // channel of the part -> of x; null: all, in order
  Tensor channels_;                   // owns them
  int64_t rows, pieces;               // tokens of x in a piece, pieces of an example

  Problem(const Tensor& x, const Tensor& raw, const Indices& tokens, const Indices& channels_of_part)
      : Shape(x, raw, tokens, channels_of_part), channels_(raw) {
    if (tokens) {
      Tensor list = torch::stable::contiguous(*tokens);
      const int32_t* token = list.const_data_ptr<int32_t>();
      slot.assign(N, -1);
      for (int64_t s = 0; s < n; ++s) {
        VLKERN_CHECK(token[s] >= 0 && token[s] < N, "tokens must lie in [0, N)");
        slot[token[s]] = int32_t(s);
      }
    }
    if (channels_of_part) {
      channels_ = torch::stable::contiguous(*channels_of_part);
      channels = channels_.const_data_ptr<int32_t>();
      for (int64_t t = 0; t < k; ++t)
        VLKERN_CHECK(channels[t] >= 0 && channels[t] < K, "channels must lie in [0, K)");
    }
    rows = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, k));
    pieces = ceil_div(N, rows);
  }

  bool whole() const { return slot.empty() && !channels; }
};

// One thread's piece: tokens [first, last) of example b, and scratch for the rows of the part among them.
template <class T>
class Piece {
 public:
  explicit Piece(const Problem& p) : p_(p), at_(p.rows) {
    for (auto& buffer : scratch_) buffer.reset(new T[p.rows * p.k]);
  }

  void open(int64_t task) {
    b_ = task / p_.pieces;
    first_ = task % p_.pieces * p_.rows;
    last_ = std::min(p_.N, first_ + p_.rows);
    count_ = 0;
    for (int64_t i = first_; i < last_; ++i)
      if (p_.slot.empty() || p_.slot[i] >= 0) at_[count_++] = i;
  }

  int64_t b() const { return b_; }
  int64_t elements() const { return count_ * p_.k; }

  // The part of a tensor of x's shape, contiguous: in place or in buffer `i`.
  const T* part(const T* x, int i) {
    if (p_.whole()) return x + (b_ * p_.N + first_) * p_.K;
    T* to = scratch_[i].get();
    for (int64_t q = 0; q < count_; ++q, to += p_.k) {
      const T* from = x + (b_ * p_.N + at_[q]) * p_.K;
      if (p_.channels)
        for (int64_t t = 0; t < p_.k; ++t) to[t] = from[p_.channels[t]];
      else
        std::memcpy(to, from, p_.k * sizeof(T));
    }
    return scratch_[i].get();
  }

  // Rows of a tensor of the part's shape, likewise.
  const T* rows(const Side& side, int i) {
    const T* from = side.owner.const_data_ptr<T>() + b_ * side.example;
    if (p_.slot.empty() && side.row == p_.k) return from + first_ * p_.k;
    T* to = scratch_[i].get();
    for (int64_t q = 0; q < count_; ++q, to += p_.k)
      std::memcpy(to, from + slot(q) * side.row, p_.k * sizeof(T));
    return scratch_[i].get();
  }

  // Where to write the part of an output of x's shape; close_part() then brings it to its place in `out`.
  T* open_part(T* out, int i) { return p_.whole() ? out + (b_ * p_.N + first_) * p_.K : scratch_[i].get(); }

  void close_part(const T* x, T* out, int i) {
    if (p_.whole()) return;
    int64_t from = (b_ * p_.N + first_) * p_.K;
    std::memcpy(out + from, x + from, (last_ - first_) * p_.K * sizeof(T));
    const T* row = scratch_[i].get();
    for (int64_t q = 0; q < count_; ++q, row += p_.k) {
      T* to = out + (b_ * p_.N + at_[q]) * p_.K;
      if (p_.channels)
        for (int64_t t = 0; t < p_.k; ++t) to[p_.channels[t]] = row[t];
      else
        std::memcpy(to, row, p_.k * sizeof(T));
    }
  }

  // Where to write rows of an output of the part's shape, which is contiguous; close_rows() as close_part().
  T* open_rows(T* out, int i) {
    return p_.slot.empty() ? out + (b_ * p_.n + first_) * p_.k : scratch_[i].get();
  }

  void close_rows(T* out, int i) {
    if (!p_.slot.empty()) copy_rows(out, i);
  }

  // The rows in buffer `i` to their places in a tensor of the part's shape.
  void copy_rows(T* out, int i) {
    const T* row = scratch_[i].get();
    for (int64_t q = 0; q < count_; ++q, row += p_.k)
      std::memcpy(out + (b_ * p_.n + slot(q)) * p_.k, row, p_.k * sizeof(T));
  }

 private:
  int64_t slot(int64_t q) const { return p_.slot.empty() ? at_[q] : p_.slot[at_[q]]; }

  const Problem& p_;
  std::vector<int64_t> at_;  // tokens of the piece that change
  std::unique_ptr<T[]> scratch_[5];
  int64_t b_ = 0, first_ = 0, last_ = 0, count_ = 0;
};

// f(piece, task) for all pieces of all examples, on all threads. A thread's pieces follow one another: it
// reads and writes half a dozen streams, which hardware fetches ahead only where they go on.
template <class T, class F>
void for_each_piece(const Problem& p, F f) {
  torch::stable::parallel_for(0, p.B * p.pieces, 1, [&](int64_t begin, int64_t end) {
    Piece<T> piece(p);
    for (int64_t task = begin; task < end; ++task) {
      piece.open(task);
      f(piece, task);
    }
  });
}

}  // namespace vlkern::coupling
