// One pair (i, j) of the sigmoid loss, and loops over many: what every CPU path does between its matmuls.
#pragma once

#include "simd.h"

namespace vlkern::sigmoid_loss {

// u = -z s:  softplus(u) = max(u, 0) + log(1 + e),  sigmoid(u) = {u >= 0: 1, else e} / (1 + e),  e = exp(-|u|) <= 1.
VLKERN_INLINE void softplus_and_sigmoid(float u, float& softplus, float& sigmoid) {
  float e = exp_nonpositive(u < 0 ? u : -u);
  softplus = (u > 0 ? u : 0.0f) + log1p_unit(e);
  sigmoid = (u < 0 ? e : 1.0f) * reciprocal_unit(1.0f + e);
}

struct Sums {
  double loss = 0;   // sum softplus(-z s)
  double scale = 0;  // sum g <x, y>
  double bias = 0;   // sum g

  void operator+=(const Sums& other) {
    loss += other.loss;
    scale += other.scale;
    bias += other.bias;
  }
};

// pairs[0..n): <x, y> in, g = dL/ds = -z sigmoid(-z s) out. All labels are z = -1 unless `sign` (+1 for z = -1, -1 for
// z = +1) is given; a pair whose `keep` is 0 counts nothing. At most 2^11 pairs, so that float sums stay exact enough.
template <bool kLabels>
VLKERN_INLINE Sums all_pairs(float* pairs, const float* sign, const float* keep, int64_t n, float scale, float bias) {
  float loss = 0, d_scale = 0, d_bias = 0;
#pragma omp simd reduction(+ : loss, d_scale, d_bias)
  for (int64_t k = 0; k < n; ++k) {
    float dot = pairs[k], u = scale * dot + bias, softplus, g;
    if constexpr (kLabels) u *= sign[k];
    softplus_and_sigmoid(u, softplus, g);
    if constexpr (kLabels) {
      g *= sign[k] * keep[k];
      softplus *= keep[k];
    }
    loss += softplus;
    d_scale += g * dot;
    d_bias += g;
    pairs[k] = g;
  }
  return {loss, d_scale, d_bias};
}

}  // namespace vlkern::sigmoid_loss
