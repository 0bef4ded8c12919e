// x W^T for a few rows of x, as in decoding: bound by reading W. Each row of W is read once, by one thread,
// and widened in registers.
#pragma once

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
  return {std::bit_cast<Floats>(words << 16), std::bit_cast<Floats>(words & 0xffff0000u)};
}
VLKERN_INLINE Floats widen_halves(Words bits) {  // as to_float(fp16)
  Words magnitude = (bits & 0x7fffu) << 13;
  Words scaled = std::bit_cast<Words>(std::bit_cast<Floats>(magnitude) * 0x1p112f);
  Words special = magnitude >= 0x0f800000u ? Words{} + 0x7f800000u : Words{};
  return std::bit_cast<Floats>(scaled | special | (bits & 0x8000u) << 16);
}
VLKERN_INLINE BothFloats load_both(const fp16* row, int64_t, int64_t j) {
  Words words = *reinterpret_cast<const UnalignedWords*>(row + 2 * j);
  return {widen_halves(words), widen_halves(words >> 16)};
}

// out[m * out_row + r] = row m of x times row r of W, for M rows of x, which are float32 in W's streams, and
// R rows of W. Every product is summed in the same order, so its bits do not depend on what stands beside it.
template <int R, int M, class T>
VLKERN_INLINE void multiply_tile(const T* w, const float* x, int64_t k, float* out, int64_t out_row) {
  const int64_t half = k / 2;
  Floats sum[R][M] = {};
  int64_t j = 0;
  for (; j + kWidth <= half; j += kWidth) {
    BothFloats row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      row[r] = load_both(w + r * k, half, j);
      __builtin_prefetch(w + (r + R) * k +
                         2 * j);  // the next tile: several rows at once escape the hardware's
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      Floats a = load_floats(x + m * k + j), b = load_floats(x + m * k + half + j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][m] += row[r].a * a;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][m] += row[r].b * b;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      float total = 0;
      const T* weights = w + r * k;
      const float* inputs = x + m * k;
      for (int64_t i = j; i < half; ++i) {
        Both v = load(weights, half, i);
        total += v.a * inputs[i] + v.b * inputs[half + i];
      }
      if (k % 2) total += to_float(weights[k - 1]) * inputs[k - 1];
      for (int l = 0; l < kWidth; ++l) total += sum[r][m][l];
      out[m * out_row + r] = total;
    }
}

// M rows of x times n rows of W, tiles of at most 8 sums: what 16 registers hold beside the operands.
template <int M, class T>
VLKERN_INLINE void multiply_rows(const T* w, const float* x, int64_t n, int64_t k, float* out) {
  constexpr int R = M > 2 ? 2 : 4;
  int64_t i = 0;
  for (; i + R <= n; i += R) multiply_tile<R, M>(w + i * k, x, k, out + i, n);
  for (; i < n; ++i) multiply_tile<1, M>(w + i * k, x, k, out + i, n);
}

// x [rows, k] times n rows of W, which stay in L2 while every four rows of x pass over them -> out [rows, n].
template <class T>
VLKERN_INLINE void multiply_few(const T* w, const float* x, int64_t rows, int64_t n, int64_t k, float* out) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) multiply_rows<4>(w, x + m * k, n, k, out + m * n);
  if (rows - m >= 2) multiply_rows<2>(w, x + m * k, n, k, out + m * n), m += 2;
  if (m < rows) multiply_rows<1>(w, x + m * k, n, k, out + m * n);
}

}  // namespace vlkern
