// The sigmoid loss of eight pairs. The same source runs on the GPU and, in tests, on the CPU.
//
//   s = scale dot + bias,   u = -z s,   loss = softplus(u) = max(u, 0) + log1p(e),  e = exp(-|u|)
//   g = dloss/ds = -z sigmoid(u),       sigmoid(u) = (u >= 0 ? 1 : e) / (1 + e)
//
// The eight logarithms become one: sum_k log1p(e_k) = log1p(p) with p = prod_k (1 + e_k) - 1, built up as
// p <- p + e + p e, so that small e keep their digits. p <= 2^8 - 1. Sums over the eight are taken before
// they are added to the running ones: a float that takes every pair by itself would lose a digit.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace vlkern::cuda {

constexpr int kPairs = 8;  // 16 bytes of G in a 2-byte dtype

struct PairSums {
  float loss = 0, scale = 0, bias = 0;  // of softplus(u), g dot, g
};

__host__ __device__ inline float reciprocal(float v) {
#ifdef __CUDA_ARCH__
  float result;  // within 1 ulp, one instruction; the exact division takes eight
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else
  return 1.0f / v;
#endif
}

// Replaces the dot products by g and adds to the sums. With kLabels, bit k of `keep` says whether pair k
// counts and bit k of `positive` whether z = +1 there; a pair that does not count gets g = 0, whatever its
// memory holds. Without, all pairs count and z = -1.
template <bool kGrad, bool kLabels>
__host__ __device__ inline void sigmoid_pairs(float (&pairs)[kPairs], float scale, float bias, unsigned keep,
                                              unsigned positive, PairSums& sums) {
  PairSums eight;
  float product = 0;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    bool counts = !kLabels || (keep >> k & 1), plus = kLabels && (positive >> k & 1);
    float dot = counts ? pairs[k] : 0.0f;
    float s = fmaf(scale, dot, bias), u = plus ? -s : s;
    float e = expf(-fabsf(u));
    if (counts) {
      eight.loss += fmaxf(u, 0.0f);
      product = fmaf(product, e, product + e);
    }
    if constexpr (kGrad) {
      float q = reciprocal(1.0f + e), sigmoid = u >= 0.0f ? q : e * q;
      float g = counts ? (plus ? -sigmoid : sigmoid) : 0.0f;
      eight.scale = fmaf(g, dot, eight.scale);
      eight.bias += g;
      pairs[k] = g;
    }
  }
  sums.loss += eight.loss + log1pf(product);
  sums.scale += eight.scale;
  sums.bias += eight.bias;
}

}  // namespace vlkern::cuda
