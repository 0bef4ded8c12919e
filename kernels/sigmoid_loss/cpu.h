// What the CPU paths of the sigmoid loss share: the problem, and the arithmetic between the matmuls.
#pragma once

#include <algorithm>

#include "simd.h"

namespace vlkern::sigmoid_loss {

// u = -z s:  softplus(u) = max(u, 0) + log(1 + e),  sigmoid(u) = {u >= 0: 1, else e} / (1 + e),  e =
// exp(-|u|) <= 1.
VLKERN_INLINE void softplus_and_sigmoid(float u, float& softplus, float& sigmoid) {
  float e = exp_nonpositive(u < 0 ? u : -u);
  softplus = (u < 0 ? 0.0f : u) + log1p_unit(e);
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

struct Problem {
  int64_t m, n, d;            // images, texts, channels
  float scale, bias, weight;  // loss = weight * sum softplus(-z (scale <x, y> + bias))
  const bool *image_valid, *text_valid;
  bool diagonal, grad;  // are the positives in this block; are gradients wanted

  // Fills sign and keep of the block of pairs (i..i+rows, j..j+columns), row stride `columns`; rows and
  // columns beyond the problem count nothing. Returns false, and fills nothing, when every pair is an
  // ordinary negative one.
  bool labels(int64_t i, int64_t rows, int64_t j, int64_t columns, float* sign, float* keep) const {
    bool has_diagonal = diagonal && i < j + columns && j < i + rows;
    bool has_edge = i + rows > m || j + columns > n;
    if (!has_diagonal && !has_edge && !image_valid && !text_valid) return false;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) {
        bool valid = i + r < m && j + c < n && (!image_valid || image_valid[i + r]) &&
                     (!text_valid || text_valid[j + c]);
        keep[r * columns + c] = valid;
        sign[r * columns + c] = diagonal && i + r == j + c ? -1.0f : 1.0f;
      }
    return true;
  }
};

// pairs[0..n): <x, y> in, g = dL/ds = -z sigmoid(-z s) out. All labels are z = -1 unless `sign` (+1 for z =
// -1, -1 for z = +1) is given; a pair whose `keep` is 0 counts nothing. At most 2^11 pairs, so that float
// sums stay exact enough.
template <bool kLabels>
VLKERN_INLINE Sums all_pairs(float* pairs, const float* sign, const float* keep, int64_t n, float scale,
                             float bias) {
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
