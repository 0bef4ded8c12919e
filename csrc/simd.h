// Portable vectorised arithmetic: plain loops that the compiler turns into AVX-512, AVX2 or NEON.
//
// A hot loop is one function marked VLKERN_SIMD: it is compiled for each instruction set and the best version
// is picked when the library loads. Everything it calls must be VLKERN_INLINE, so that it is compiled along.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cstdint>

#define VLKERN_INLINE inline __attribute__((always_inline))
#define VLKERN_INLINE_LAMBDA __attribute__((always_inline))
#if defined(__clang__) || !defined(__x86_64__)
#define VLKERN_SIMD
#elif __GNUC__ >= 12
#define VLKERN_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // g++ 11 cannot dispatch on the levels x86-64-v3 and v4
#define VLKERN_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

namespace vlkern {

using bf16 = torch::headeronly::BFloat16;
using fp16 = torch::headeronly::Half;

// Conversions without branches or lookup, so that loops over them vectorise. Rounding is to nearest even.
VLKERN_INLINE float to_float(float v) {
  return v;
}

VLKERN_INLINE float to_float(bf16 v) {
  return std::bit_cast<float>(uint32_t(v.x) << 16);
}

VLKERN_INLINE float to_float(fp16 v) {
  uint32_t magnitude = uint32_t(v.x & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals; inf and NaN need
  // exponent 255.
  float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  uint32_t bits = std::bit_cast<uint32_t>(scaled) | (magnitude >= 0x0f800000u ? 0x7f800000u : 0u);
  return std::bit_cast<float>(bits | uint32_t(v.x & 0x8000) << 16);
}

// The lower halves of a vector of 32-bit words, likewise.
template <class Floats, class Words>
VLKERN_INLINE Floats widen_halves(Words bits) {
  Words magnitude = (bits & 0x7fffu) << 13;
  Words scaled = __builtin_bit_cast(Words, __builtin_bit_cast(Floats, magnitude) * 0x1p112f);
  Words special = magnitude >= 0x0f800000u ? Words{} + 0x7f800000u : Words{};
  return __builtin_bit_cast(Floats, scaled | special | (bits & 0x8000u) << 16);
}

template <class T>
T from_float(float v);

template <>
VLKERN_INLINE float from_float<float>(float v) {
  return v;
}

template <>
VLKERN_INLINE bf16 from_float<bf16>(float v) {
  uint32_t bits = std::bit_cast<uint32_t>(v);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  uint32_t result = v != v ? 0x7fc0u : rounded;
  return bf16(uint16_t(result), bf16::from_bits());
}

template <>
VLKERN_INLINE fp16 from_float<fp16>(float v) {
  uint32_t bits = std::bit_cast<uint32_t>(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal range: round the 13 dropped bits, then rebias. Below 2^-14: adding 0.5 lets the FPU align and
  // round.
  uint32_t normal = (magnitude + 0x0fffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // rounds to inf
  result = magnitude > 0x7f800000u ? 0x7e00u : result;   // NaN
  return fp16(uint16_t(result | sign), fp16::from_bits());
}

// A row of n elements as two streams, a and b, of `half` = n / 2, such that no element has to cross lanes of
// a vector: of a 16-bit type the even and the odd elements, which share 32-bit words; of float the first and
// the second half. An odd row's last element belongs to neither.
struct Both {
  float a, b;
};

VLKERN_INLINE Both load(const float* row, int64_t half, int64_t j) {
  return {row[j], row[half + j]};
}

VLKERN_INLINE void store(float* row, int64_t half, int64_t j, float a, float b) {
  row[j] = a;
  row[half + j] = b;
}

using Word =
    uint32_t __attribute__((may_alias, aligned(2)));  // rows of odd length are not aligned to 4 bytes

VLKERN_INLINE Both load(const bf16* row, int64_t, int64_t j) {
  uint32_t word = reinterpret_cast<const Word*>(row)[j];
  return {std::bit_cast<float>(word << 16), std::bit_cast<float>(word & 0xffff0000u)};
}

VLKERN_INLINE Both load(const fp16* row, int64_t, int64_t j) {
  uint32_t word = reinterpret_cast<const Word*>(row)[j];
  return {to_float(fp16(uint16_t(word), fp16::from_bits())),
          to_float(fp16(uint16_t(word >> 16), fp16::from_bits()))};
}

template <class T>
VLKERN_INLINE void store(T* row, int64_t, int64_t j, float a, float b) {
  reinterpret_cast<Word*>(row)[j] = uint32_t(from_float<T>(a).x) | uint32_t(from_float<T>(b).x) << 16;
}

// Where element j of a row of n stands when stream a is laid out before stream b.
template <class T>
int64_t stream_position(int64_t j, int64_t n) {
  return sizeof(T) == 4 || j == n / 2 * 2 ? j : j / 2 + (j % 2 ? n / 2 : 0);
}

// sum of term(j), j < n, in 32 partial sums: one would wait for each addition before the next.
template <class F>
VLKERN_INLINE float sum_of(int64_t n, F term) {
  constexpr int kLanes = 32;
  float lanes[kLanes] = {}, sum = 0;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(j + l);
  for (; j < n; ++j) sum += term(j);
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// e^r for |r| <= ln2 / 2, relative error under 2e-7: a minimax polynomial, for float or a vector of them.
template <class F>
VLKERN_INLINE F exp_polynomial(F r) {
  F p = 0.00138368352f * r + 0.00837482405f;
  p = p * r + 0.0416682262f;
  p = p * r + 0.166664201f;
  p = p * r + 0.499999921f;
  p = p * r + 1.00000004f;
  return p * r + 1.0f;
}

// exp(x) for x <= 0, relative error under 2e-7: x = n ln2 + r with |r| <= ln2 / 2, e^r, and 2^n by exponent
// bits. Below -87 the result stays at e^-87 = 1.6e-38, the last one that is not subnormal.
VLKERN_INLINE float exp_nonpositive(float x) {
  x = x < -87.0f ? -87.0f : x;  // this way round NaN stays NaN
  float n = (x * 1.44269504f + 12582912.0f) -
            12582912.0f;  // to the nearest integer: 1.5 * 2^23 shifts the fraction out
  float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln2 in two parts
  return exp_polynomial(r) * std::bit_cast<float>(uint32_t(int32_t(n) + 127) << 23);
}

// log(1 + x) for 0 <= x <= 1, relative error under 2e-7: x times a minimax polynomial for log(1 + x) / x.
VLKERN_INLINE float log1p_unit(float x) {
  float p = 0.00523268789f;
  p = p * x - 0.0295052132f;
  p = p * x + 0.0782259103f;
  p = p * x - 0.136632423f;
  p = p * x + 0.191060051f;
  p = p * x - 0.248429818f;
  p = p * x + 0.333190968f;
  p = p * x - 0.499994931f;
  p = p * x + 0.99999997f;
  return p * x;
}

// 1 / x for 1 <= x <= 2, relative error 3e-9 before rounding: a line, then three Newton steps. A third of a
// division's cost.
VLKERN_INLINE float reciprocal_unit(float x) {
  float r = 1.457107f - 0.5f * x;
  r = r * (2.0f - x * r);
  r = r * (2.0f - x * r);
  return r + r * (1.0f - x * r);  // this form loses nothing to rounding
}

}  // namespace vlkern
