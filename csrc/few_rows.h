// x W^T for a few rows of x, as in decoding: bound by reading W. Each row of W is read once, by one thread,
// and widened in registers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "simd.h"
#include "vlkern.h"

namespace vlkern {

// Up to here reading W from memory takes longer than multiplying; more rows gain from sgemm's blocks.
constexpr int64_t kFewRows = 16;

// The same lines become SSE2, AVX2 or AVX-512 (in halves) by the target of the function that they are inlined
// into.
constexpr int64_t kWidth = 8;
using Floats = float __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(32)));
using UnalignedFloats = float __attribute__((vector_size(32), aligned(4), may_alias));
using UnalignedWords = uint32_t __attribute__((vector_size(32), aligned(2), may_alias));

struct BothFloats {
  Floats a, b;
};

VLKERN_INLINE Floats load_floats(const float* p) {
  return *reinterpret_cast<const UnalignedFloats*>(p);
}

// Elements j .. j + 7 of the two streams of a row (simd.h).
VLKERN_INLINE BothFloats load_both(const float* row, int64_t half, int64_t j) {
  return {load_floats(row + j), load_floats(row + half + j)};
}
VLKERN_INLINE BothFloats load_both(const bf16* row, int64_t, int64_t j) {
  Words words = *reinterpret_cast<const UnalignedWords*>(row + 2 * j);
  return {__builtin_bit_cast(Floats, words << 16), __builtin_bit_cast(Floats, words & 0xffff0000u)};
}
VLKERN_INLINE BothFloats load_both(const fp16* row, int64_t, int64_t j) {
  Words words = *reinterpret_cast<const UnalignedWords*>(row + 2 * j);
  return {widen_halves<Floats>(words), widen_halves<Floats>(words >> 16)};
}

constexpr int kSums = 4;          // of a dot product, as one would wait for each addition before the next
constexpr int64_t kAhead = 4096;  // bytes from what is read to what is fetched

// Locality 0: a weight is not needed again before the next token, and what it would displace from the caches
// (Python, PyTorch, this code) is needed for the next call, which then takes 20 us less.
//
// out[m * n] = row m of x times a row of W, for M rows of x, which are float32 in W's streams. W is read in
// the order of memory, a row after the other: then four fifths of the read bandwidth are reached, and two
// thirds with four rows side by side. Every product is summed in the same order, so its bits do not depend on
// what stands beside it.
template <int M, class T>
VLKERN_INLINE void multiply_row(const T* w, const float* x, int64_t n, int64_t k, float* out) {
  constexpr int64_t kStep = kSums * kWidth;
  const int64_t half = k / 2;
  Floats sum[M][kSums] = {};
  int64_t j = 0;
  for (; j + kStep <= half; j += kStep) {
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < 2 * kStep * int64_t(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(w + 2 * j) + kAhead + byte, 0, 0);
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      BothFloats row = load_both(w, half, j + i * kWidth);
#pragma GCC unroll 2
      for (int m = 0; m < M; ++m) {
        sum[m][i] += row.a * load_floats(x + m * k + j + i * kWidth);
        sum[m][i] += row.b * load_floats(x + m * k + half + j + i * kWidth);
      }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < M; ++m) {
    const float* row = x + m * k;
    float total = 0;
    for (int64_t i = j; i < half; ++i) {
      Both v = load(w, half, i);
      total += v.a * row[i] + v.b * row[half + i];
    }
    if (k % 2) total += to_float(w[k - 1]) * row[k - 1];
    Floats lanes = (sum[m][0] + sum[m][1]) + (sum[m][2] + sum[m][3]);
    for (int l = 0; l < kWidth; ++l) total += lanes[l];
    out[m * n] = total;
  }
}

// x [rows, k] times n rows of W -> out [rows, n]: two rows of x at a time, for which a row of W stays in L1.
template <class T>
VLKERN_INLINE void multiply_few(const T* w, const float* x, int64_t rows, int64_t n, int64_t k, float* out) {
  for (int64_t i = 0; i < n; ++i, w += k, ++out) {
    int64_t m = 0;
    for (; m + 2 <= rows; m += 2) multiply_row<2>(w, x + m * k, n, k, out + m * n);
    if (m < rows) multiply_row<1>(w, x + m * k, n, k, out + m * n);
  }
}

// A row of x as float32 in the streams of T (simd.h).
template <class T>
VLKERN_INLINE void widen_streams(const T* in, float* out, int64_t n) {
  const int64_t half = n / 2;
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    Both v = load(in, half, j);
    out[j] = v.a;
    out[half + j] = v.b;
  }
  if (n % 2) out[n - 1] = to_float(in[n - 1]);
}

template <class T>
struct Weight {
  const T* data;  // [n, k]
  int64_t n;
};

// The products of x [rows, k], in W's streams, with the rows of all weights, as if one lay behind the other:
// each thread reads an equal share of them from end to end. `few` is multiply_few, compiled for this machine;
// sink(products [rows, n], j, n) takes those with the rows j .. j + n - 1, in parts that stay in L1.
template <class T, class Few, class Sink>
void multiply_weights(const std::vector<Weight<T>>& weights, const float* x, int64_t rows, int64_t k, Few few,
                      Sink sink) {
  constexpr int64_t kUnit = 8;                  // rows of W
  constexpr int64_t kPart = int64_t(64) << 10;  // bytes of W: for less it does not pay to wake a thread
  const int64_t units = std::max<int64_t>(1, kPart / (k * int64_t(sizeof(T))) / kUnit), part = units * kUnit;
  int64_t total = 0;
  for (const Weight<T>& w : weights) total += w.n;
  torch::stable::parallel_for(0, ceil_div(total, kUnit), units, [&](int64_t begin, int64_t end) {
    std::vector<float> products(rows * part);
    const int64_t first = begin * kUnit, last = std::min(end * kUnit, total);
    int64_t before = 0;
    for (const Weight<T>& w : weights) {
      const int64_t stop = std::min(last - before, w.n);
      for (int64_t j = std::max<int64_t>(first - before, 0); j < stop; j += part) {
        const int64_t n = std::min(part, stop - j);
        few(w.data + j * k, x, rows, n, k, products.data());
        sink(products.data(), before + j, n);
      }
      before += w.n;
    }
  });
}

}  // namespace vlkern
