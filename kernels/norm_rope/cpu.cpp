// RMS norm and RoPE of heads on the CPU. Memory-bound: a head stays in L1 between its two passes.
#include "rope.h"

namespace vlkern {
namespace {

// With u = grad rotated back, t = u w and h = r x:  dx = r (t - h mean(t h)),  dw += u h; without w: dx = u
template <class T>
VLKERN_INLINE void backward_head(const T* grad, const T* x, const float* w, const float* cos,
                                 const float* sin, float r, T* dx, float* dw, int64_t half) {
  if (!w) {
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      float a = to_float(grad[j]), b = to_float(grad[half + j]);
      dx[j] = from_float<T>(a * cos[j] + b * sin[j]);
      dx[half + j] = from_float<T>(b * cos[j] - a * sin[j]);
    }
    return;
  }
  float dot = sum_of(half, [&](int64_t j) VLKERN_INLINE_LAMBDA {
    float a = to_float(grad[j]), b = to_float(grad[half + j]);
    float ua = a * cos[j] + b * sin[j], ub = b * cos[j] - a * sin[j];
    return ua * w[j] * (to_float(x[j]) * r) + ub * w[half + j] * (to_float(x[half + j]) * r);
  });
  float mean = dot / float(2 * half);
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    float a = to_float(grad[j]), b = to_float(grad[half + j]);
    float ua = a * cos[j] + b * sin[j], ub = b * cos[j] - a * sin[j];
    float ha = to_float(x[j]) * r, hb = to_float(x[half + j]) * r;
    dx[j] = from_float<T>(r * (ua * w[j] - ha * mean));
    dx[half + j] = from_float<T>(r * (ub * w[half + j] - hb * mean));
    dw[j] += ua * ha;
    dw[half + j] += ub * hb;
  }
}

// target_clones needs plain functions, one per dtype: heads begin .. end - 1 of [tokens, heads].
#define VLKERN_DTYPE(T)                                                                                      \
  VLKERN_SIMD void forward(const StridedHeads<T>& x, const float* w, const Angles& angles, T* y, float* r,   \
                           float eps, int64_t begin, int64_t end) {                                          \
    for (int64_t i = begin; i < end; ++i) {                                                                  \
      const int64_t at = i / x.heads * angles.half;                                                          \
      float rstd =                                                                                           \
          turn_head(x.at(i), w, angles.c + at, angles.s + at, y + 2 * angles.half * i, angles.half, eps);    \
      if (w) r[i] = rstd;                                                                                    \
    }                                                                                                        \
  }                                                                                                          \
  VLKERN_SIMD void backward(const T* grad, const StridedHeads<T>& x, const float* w, const Angles& angles,   \
                            const float* r, T* dx, float* dw, int64_t begin, int64_t end) {                  \
    const int64_t c = 2 * angles.half;                                                                       \
    for (int64_t i = begin; i < end; ++i) {                                                                  \
      const int64_t at = i / x.heads * angles.half;                                                          \
      backward_head(grad + i * c, x.at(i), w, angles.c + at, angles.s + at, w ? r[i] : 1.0f, dx + i * c, dw, \
                    angles.half);                                                                            \
    }                                                                                                        \
  }
VLKERN_DTYPE(float)
VLKERN_DTYPE(bf16)
VLKERN_DTYPE(fp16)

constexpr int64_t kGrain = 64;  // heads that a thread takes at a time, at least

std::tuple<Tensor, Tensor> norm_rope(const Tensor& x_, const Tensor& cos, const Tensor& sin,
                                     const std::optional<Tensor>& weight, double eps, double offset) {
  check_angles(x_, cos, sin);
  Tensor x = unit_channels(x_);
  const std::vector<float> w = shifted(weight, x.size(2), offset);
  const Angles angles(cos, sin);
  Tensor y = empty(x, shape_of(x), x.scalar_type());
  Tensor rstd = empty(x, weight ? std::vector<int64_t>{x.size(0), x.size(1)} : std::vector<int64_t>{0},
                      ScalarType::Float);
  float* r = rstd.mutable_data_ptr<float>();
  dispatch(x.scalar_type(), [&]<class T>() {
    const StridedHeads<T> in(x);
    T* out = y.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, x.size(0) * x.size(1), kGrain, [&](int64_t begin, int64_t end) {
      forward(in, weight ? w.data() : nullptr, angles, out, r, float(eps), begin, end);
    });
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor> norm_rope_backward(const Tensor& grad_, const Tensor& x_, const Tensor& cos,
                                              const Tensor& sin, const std::optional<Tensor>& weight,
                                              const Tensor& rstd_, double offset) {
  check_angles(x_, cos, sin);
  Tensor x = unit_channels(x_), grad = torch::stable::contiguous(grad_),
         rstd = torch::stable::contiguous(rstd_);
  const int64_t heads = x.size(0) * x.size(1), c = x.size(2);
  VLKERN_CHECK(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type(), "grad must match x");
  VLKERN_CHECK(rstd.scalar_type() == ScalarType::Float && rstd.numel() == (weight ? heads : 0),
               "rstd must be float32, one number a head, none without weight");
  const std::vector<float> w = shifted(weight, c, offset);
  const Angles angles(cos, sin);
  Tensor dx = empty(x, shape_of(x), x.scalar_type()), dw = zeros(x, {weight ? c : 0}, ScalarType::Float);
  // The weight gradient is summed in blocks of heads whose number depends on the shape alone: same bits for
  // any thread count.
  const int64_t block = std::max<int64_t>(kGrain, ceil_div(heads, 64)), blocks = ceil_div(heads, block);
  std::vector<float> parts(w.size() * blocks);
  dispatch(x.scalar_type(), [&]<class T>() {
    const StridedHeads<T> in(x);
    const T* g = grad.const_data_ptr<T>();
    T* out = dx.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        backward(g, in, weight ? w.data() : nullptr, angles, rstd.const_data_ptr<float>(), out,
                 parts.data() + b * int64_t(w.size()), b * block, std::min((b + 1) * block, heads));
    });
  });
  float* sum = dw.mutable_data_ptr<float>();
  for (size_t i = 0; i < parts.size(); ++i) sum[i % w.size()] += parts[i];
  return {dx, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("norm_rope.cpu", TORCH_BOX(&norm_rope));
  m.impl("norm_rope_backward.cpu", TORCH_BOX(&norm_rope_backward));
}

}  // namespace vlkern
