// Portable vectorised arithmetic: plain loops that the compiler turns into AVX-512, AVX2 or NEON.
//
// A hot loop is one function marked VLKERN_SIMD: it is compiled for each instruction set and the best version is picked
// when the library loads. Everything it calls must be VLKERN_INLINE, so that it is compiled along.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cstdint>

#define VLKERN_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VLKERN_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VLKERN_SIMD
#endif

namespace vlkern {

using bf16 = torch::headeronly::BFloat16;
using fp16 = torch::headeronly::Half;

// Conversions without branches or lookup, so that loops over them vectorise. Rounding is to nearest even.
VLKERN_INLINE float to_float(float v) { return v; }

VLKERN_INLINE float to_float(bf16 v) { return std::bit_cast<float>(uint32_t(v.x) << 16); }

VLKERN_INLINE float to_float(fp16 v) {
  uint32_t magnitude = uint32_t(v.x & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals; inf and NaN need exponent 255.
  float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  uint32_t bits = std::bit_cast<uint32_t>(scaled) | (magnitude >= 0x0f800000u ? 0x7f800000u : 0u);
  return std::bit_cast<float>(bits | uint32_t(v.x & 0x8000) << 16);
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
  // Normal range: round the 13 dropped bits, then rebias. Below 2^-14: adding 0.5 lets the FPU align and round.
  uint32_t normal = (magnitude + 0x0fffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // rounds to inf
  result = magnitude > 0x7f800000u ? 0x7e00u : result;   // NaN
  return fp16(uint16_t(result | sign), fp16::from_bits());
}

// exp(x) for x <= 0, within 2 ulp: x = n ln2 + r, |r| <= ln2 / 2, a degree-6 polynomial for e^r, 2^n by exponent bits.
VLKERN_INLINE float exp_nonpositive(float x) {
  x = x > -87.0f ? x : -87.0f;
  float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // round to nearest integer
  float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;    // ln2 in two parts
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * std::bit_cast<float>(uint32_t(int32_t(n) + 127) << 23);
}

// log(1 + u) for 0 <= u <= 1: 2 atanh(s), s = u / (2 + u) <= 1/3, by its series; relative error under 1e-6.
VLKERN_INLINE float log1p_unit(float u) {
  float s = u / (2.0f + u), z = s * s;
  float p = 2.0f / 13;
  p = p * z + 2.0f / 11;
  p = p * z + 2.0f / 9;
  p = p * z + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  p = p * z + 2.0f;
  return p * s;
}

}  // namespace vlkern
