// One head of queries or keys: RMS norm, then rotation of the pairs (j, j + C / 2). What norm_rope and
// rope_append share; both are compiled for each instruction set (simd.h).
#pragma once

#include "simd.h"
#include "vlkern.h"

namespace vlkern {

// Heads [tokens, heads, width] that need not be next to each other, as a fused projection leaves them.
template <class T>
struct StridedHeads {
  const T* data;
  int64_t token, head, heads;
  explicit StridedHeads(const Tensor& x)
      : data(x.const_data_ptr<T>()), token(x.stride(0)), head(x.stride(1)), heads(x.size(1)) {}
  const T* at(int64_t i) const { return data + i / heads * token + i % heads * head; }
};

inline Tensor unit_channels(const Tensor& x) {
  return x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

// offset + w in float32, or nothing.
inline std::vector<float> shifted(const std::optional<Tensor>& weight, int64_t channels, double offset) {
  if (!weight) return {};
  VLKERN_CHECK(weight->dim() == 1 && weight->size(0) == channels, "a weight must have shape [", channels,
               "]");
  Tensor dense = torch::stable::contiguous(*weight);
  std::vector<float> out(channels);
  dispatch(dense.scalar_type(), [&]<class T>() {
    const T* w = dense.const_data_ptr<T>();
    for (int64_t j = 0; j < channels; ++j) out[j] = float(offset) + to_float(w[j]);
  });
  return out;
}

inline void check_angles(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  VLKERN_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, "heads must be [tokens, heads, even head dim]");
  for (const Tensor* t : {&cos, &sin})
    VLKERN_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->size(0) == x.size(0) &&
                     t->size(1) == x.size(2) / 2,
                 "cos and sin must be float32 [tokens, head dim / 2]");
}

struct Angles {
  Tensor cos, sin;
  const float *c, *s;
  int64_t half;
  Angles(const Tensor& cos_, const Tensor& sin_)
      : cos(torch::stable::contiguous(cos_)),
        sin(torch::stable::contiguous(sin_)),
        c(cos.const_data_ptr<float>()),
        s(sin.const_data_ptr<float>()),
        half(cos.size(1)) {}
};

// y = rotated (w r x), r = 1 / sqrt(mean(x^2) + eps), which is returned; without w: y = rotated x
template <class T, class Y>
VLKERN_INLINE float turn_head(const T* x, const float* w, const float* cos, const float* sin, Y* y,
                              int64_t half, float eps) {
  if (!w) {
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      float a = to_float(x[j]), b = to_float(x[half + j]);
      y[j] = from_float<Y>(a * cos[j] - b * sin[j]);
      y[half + j] = from_float<Y>(b * cos[j] + a * sin[j]);
    }
    return 1.0f;
  }
  float sum = sum_of(half, [&](int64_t j) VLKERN_INLINE_LAMBDA {
    float a = to_float(x[j]), b = to_float(x[half + j]);
    return a * a + b * b;
  });
  float r = 1.0f / __builtin_sqrtf(sum / float(2 * half) + eps);
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    float a = to_float(x[j]) * r * w[j], b = to_float(x[half + j]) * r * w[half + j];
    y[j] = from_float<Y>(a * cos[j] - b * sin[j]);
    y[half + j] = from_float<Y>(b * cos[j] + a * sin[j]);
  }
  return r;
}

}  // namespace vlkern
