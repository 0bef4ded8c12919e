// What the CPU paths of the vocabulary's cross-entropy share: the problem, and the arithmetic between the
// matmuls.
#pragma once

#include <cmath>
#include <limits>

#include "simd.h"

namespace vlkern::linear_cross_entropy {

struct Problem {
  int64_t classes, channels;
  const float* bias;  // times scale already; or null
  float scale;
  float cap;  // 0 for none
  float hit, spread, z_loss;
};

// dL/dz_v = (at * exp(z_v - lse) - share * spread) * dz_v, and for the target's class - share * hit * dz_v on
// top of it.
struct Row {
  float lse, at, share;

  Row(const Problem& p, float lse, float share)
      : lse(lse), at(share * (1.0f + 2.0f * p.z_loss * lse)), share(share) {}
};

// tanh(x), relative error under 4e-7: an odd minimax polynomial near 0, where (1 - e) / (1 + e) with e =
// exp(-2 |x|) would cancel.
VLKERN_INLINE float tanh(float x) {
  float square = x * x, p = 0.0179271158f;
  p = p * square - 0.0533000417f;
  p = p * square + 0.133286059f;
  p = p * square - 0.333332151f;
  p = (p * square + 1.0f) * x;
  float size = x < 0 ? -x : x, e = exp_nonpositive(-2.0f * size);
  float far = (1.0f - e) * reciprocal_unit(1.0f + e);
  far = x < 0 ? -far : far;
  return size < 0.45f ? p : far;
}

// z = cap tanh((z + bias) / cap); a null bias and a cap of 0 stand for none.
VLKERN_INLINE void finish_logits(float* z, const float* bias, int64_t n, float cap) {
  if (bias) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) z[j] += bias[j];
  }
  if (cap != 0) {
    float inverse = 1.0f / cap;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) z[j] = cap * tanh(z[j] * inverse);
  }
}

VLKERN_INLINE float largest(const float* z, int64_t n) {
  float m = -std::numeric_limits<float>::max();
#pragma omp simd reduction(max : m)
  for (int64_t j = 0; j < n; ++j) m = z[j] > m ? z[j] : m;
  return m;
}

// Logits in, dL/dz out (times dz/d(z before the cap)), without the target's own term. exp_nonpositive stops
// at e^-87: below it is 0, so that no product of it is a subnormal number.
VLKERN_INLINE void slopes(float* z, int64_t n, const Row& row, float spread, float cap) {
  float lse = row.lse, at = row.at, even = row.share * spread;
  if (cap == 0) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      float x = z[j] - lse, e = exp_nonpositive(x);
      z[j] = at * (x < -87.0f ? 0.0f : e) - even;
    }
    return;
  }
  float inverse = 1.0f / cap;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    float x = z[j] - lse, e = exp_nonpositive(x), t = z[j] * inverse;
    z[j] = (at * (x < -87.0f ? 0.0f : e) - even) * (1.0f - t * t);
  }
}

// log sum exp, the target's logit and the sum of one token's logits, of all that it has seen.
struct Sums {
  float most = -std::numeric_limits<float>::max();
  double exps = 0, own = 0, total = 0;

  void add(float other_most, double other_exps) {
    float m = other_most > most ? other_most : most;
    exps = exps * std::exp(double(most) - m) + other_exps * std::exp(double(other_most) - m);
    most = m;
  }
  void operator+=(const Sums& other) {
    add(other.most, other.exps);
    own += other.own;
    total += other.total;
  }
  float lse() const { return float(most + std::log(exps)); }
};

}  // namespace vlkern::linear_cross_entropy
