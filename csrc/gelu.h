// GELU's tanh form: z sigmoid(t), t = sqrt(8 / pi) (z + 0.044715 z^3).
#pragma once

#include "simd.h"

namespace vlkern {

constexpr float kGeluLinear = 1.59576912f, kGeluCubic = 0.0713548163f;

struct Sigmoid {
  float s, slope;  // s = 1 / (1 + e^-t), s (1 - s)
};

VLKERN_INLINE Sigmoid sigmoid(float t) {
  float e = exp_nonpositive(t < 0 ? t : -t);
  e = t < -87.0f ? 0.0f : e;  // exp_nonpositive stops at e^-87, and z may be large
  float r = reciprocal_unit(1.0f + e);
  return {t < 0 ? e * r : r, e * r * r};  // 1 - s would cancel
}

VLKERN_INLINE float gelu_tanh(float z) {
  return z * sigmoid(z * (kGeluLinear + kGeluCubic * z * z)).s;
}

struct Gelu {
  float value, slope;
};

// gelu(z) and gelu'(z) = s + z s (1 - s) dt/dz
VLKERN_INLINE Gelu gelu_and_slope(float z) {
  // The slope is 0 or 1 beyond 16; z^2 must not overflow.
  float near = z < -16.0f ? -16.0f : z > 16.0f ? 16.0f : z, square = near * near;
  Sigmoid at = sigmoid(near * (kGeluLinear + kGeluCubic * square));
  return {z * at.s, at.s + near * at.slope * (kGeluLinear + 3.0f * kGeluCubic * square)};
}

}  // namespace vlkern
