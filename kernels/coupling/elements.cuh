// The elements of an affine coupling on a GPU, some side by side in a thread: how they are loaded, mapped and
// stored.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/vector.cuh"

namespace vlkern::coupling {

using cuda::Vector;

template <class T, bool kWide>
constexpr int kWidth = kWide ? Vector<T>::kSize : 1;

template <class T>
struct Single {
  T at[1];
};
template <class T, bool kWide>
using Held = std::conditional_t<kWide, Vector<T>, Single<T>>;

template <bool kWide, class T>
__device__ Held<T, kWide> take(const T* p) {
  if constexpr (kWide)
    return cuda::load(p);
  else
    return {*p};
}

template <bool kWide, class T>
__device__ void give(T* p, const Held<T, kWide>& v) {
  if constexpr (kWide)
    cuda::store(p, v);
  else
    *p = v.at[0];
}

template <class V>
__device__ auto rounded(const float* values) {
  V v;
#pragma unroll
  for (int w = 0; w < int(sizeof(v.at) / sizeof(v.at[0])); ++w)
    v.at[w] = std::remove_reference_t<decltype(v.at[0])>(values[w]);
  return v;
}

struct Scale {
  float s, one_minus, rest;  // s = 1 / (1 + e^-r), 1 - s, e^-|r|: log s = min(r, 0) - log(1 + rest)
};

// e^-|r| stops at e^-87, and with it s.
__device__ inline Scale scale_of(float r) {
  float size = fabsf(r), e = expf(size > 87.0f ? -87.0f : -size);
  float inverse = 1.0f / (1.0f + e), small = e * inverse;
  return {r < 0 ? small : inverse, r < 0 ? inverse : small, e};
}

// max_scale, its log, and which way.
struct Map {
  float most, log_most;
  bool inverse;

  // Replaces x by y, or y by x; returns the sum of log s. Of the factors 1 + e^-|r| one logarithm is taken,
  // of their product less 1, so that small ones keep their digits.
  template <class V>
  __device__ float operator()(V& x, const V& u, const V& r) const {
    constexpr int kCount = sizeof(x.at) / sizeof(x.at[0]);
    float out[kCount], sum = 0, product = 0;
#pragma unroll
    for (int w = 0; w < kCount; ++w) {
      float raw = float(r.at[w]), shift = float(u.at[w]), in = float(x.at[w]);
      Scale at = scale_of(raw);
      float s = most * at.s;
      out[w] = inverse ? in / s - shift : (in + shift) * s;
      sum += (raw < 0 ? raw : 0.0f) + log_most;
      product = fmaf(product, at.rest, product + at.rest);
    }
    x = rounded<V>(out);
    return sum - log1pf(product);
  }
};

// Replaces g by dx = g S s; returns dr = (g y + dl) (1 - s).
template <class V>
__device__ V gradients_of(V& g, const V& y, const V& r, float dl, float most) {
  constexpr int kCount = sizeof(g.at) / sizeof(g.at[0]);
  float dx[kCount], dr[kCount];
#pragma unroll
  for (int w = 0; w < kCount; ++w) {
    Scale at = scale_of(float(r.at[w]));
    float in = float(g.at[w]);
    dx[w] = in * (most * at.s);
    dr[w] = (in * float(y.at[w]) + dl) * at.one_minus;
  }
  g = rounded<V>(dx);
  return rounded<V>(dr);
}

}  // namespace vlkern::coupling
