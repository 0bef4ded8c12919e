// RMS normalisation on the CPU. Memory-bound: a row stays in L1 between its two passes, so each tensor
// crosses memory once.
#include "simd.h"
#include "vlkern.h"

namespace vlkern {
namespace {

// The hardware prefetcher sleeps during a row's second pass, which reads L1 only; this keeps memory busy
// meanwhile.
template <class T>
VLKERN_INLINE void prefetch_row(const T* row, int64_t n) {
  for (int64_t j = 0; j < n; j += int64_t(64 / sizeof(T))) __builtin_prefetch(row + j);
}

// y = x * rstd * (offset + w), rstd = 1 / sqrt(mean(x^2) + eps)
template <class T>
VLKERN_INLINE void forward_rows(const T* x, const float* w, T* y, float* rstd, int64_t rows, int64_t n,
                                float eps, float offset) {
  for (int64_t i = 0; i < rows; ++i, x += n, y += n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      float v = to_float(x[j]);
      sum += v * v;
    }
    float r = rstd[i] = 1.0f / __builtin_sqrtf(sum / float(n) + eps);
    if (i + 1 < rows) prefetch_row(x + n, n);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] = from_float<T>(to_float(x[j]) * r * (offset + w[j]));
  }
}

// With h = x * rstd and u = grad * (offset + w):  dx = rstd * (u - h * mean(u h)),  dw += grad * h
template <class T>
VLKERN_INLINE void backward_rows(const T* grad, const T* x, const float* w, const float* rstd, T* dx,
                                 float* dw, int64_t rows, int64_t n, float offset) {
  for (int64_t i = 0; i < rows; ++i, x += n, grad += n, dx += n) {
    float r = rstd[i], dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < n; ++j) dot += to_float(grad[j]) * (offset + w[j]) * (to_float(x[j]) * r);
    float mean = dot / float(n);
    if (i + 1 < rows) {
      prefetch_row(x + n, n);
      prefetch_row(grad + n, n);
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      float g = to_float(grad[j]), h = to_float(x[j]) * r;
      dx[j] = from_float<T>(r * (g * (offset + w[j]) - h * mean));
      dw[j] += g * h;
    }
  }
}

VLKERN_SIMD void add_rows(const float* parts, float* out, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i, parts += n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] += parts[j];
  }
}

// target_clones needs plain functions, one per dtype; the templates above are inlined into each clone.
#define VLKERN_DTYPE(T)                                                                                     \
  VLKERN_SIMD void forward(const T* x, const float* w, T* y, float* rstd, int64_t rows, int64_t n,          \
                           float eps, float offset) {                                                       \
    forward_rows(x, w, y, rstd, rows, n, eps, offset);                                                      \
  }                                                                                                         \
  VLKERN_SIMD void backward(const T* grad, const T* x, const float* w, const float* rstd, T* dx, float* dw, \
                            int64_t rows, int64_t n, float offset) {                                        \
    backward_rows(grad, x, w, rstd, dx, dw, rows, n, offset);                                               \
  }
VLKERN_DTYPE(float)
VLKERN_DTYPE(bf16)
VLKERN_DTYPE(fp16)

struct Rows {
  int64_t count, n;
};

Rows check(const Tensor& x, const Tensor& weight) {
  int64_t n = x.size(-1);
  VLKERN_CHECK(n > 0, "x must have at least one channel");
  VLKERN_CHECK(weight.scalar_type() == ScalarType::Float && weight.dim() == 1 && weight.size(0) == n,
               "weight must be float32 of shape [", n, "]");
  return {x.numel() / n, n};
}

constexpr int64_t kGrain = 16;  // rows a thread takes at a time

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_, const Tensor& weight_, double eps, double offset) {
  const Rows size = check(x_, weight_);
  const int64_t rows = size.count, n = size.n;
  Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  auto shape = shape_of(x);
  Tensor y = empty(x, shape, x.scalar_type());
  shape.pop_back();
  Tensor rstd = empty(x, shape, ScalarType::Float);
  const float* w = weight.const_data_ptr<float>();
  float* r = rstd.mutable_data_ptr<float>();
  dispatch(x.scalar_type(), [&]<class T>() {
    const T* in = x.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      forward(in + begin * n, w, out + begin * n, r + begin, end - begin, n, float(eps), float(offset));
    });
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weight_,
                                             const Tensor& rstd, double offset) {
  const Rows size = check(x_, weight_);
  const int64_t rows = size.count, n = size.n;
  Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  Tensor grad = torch::stable::contiguous(grad_);
  VLKERN_CHECK(grad.numel() == x.numel() && rstd.numel() == rows, "grad and rstd must match x");
  Tensor dx = empty(x, shape_of(x), x.scalar_type());
  Tensor dw = zeros(x, {n}, ScalarType::Float);
  // The weight gradient is summed in blocks of rows whose number depends on the shape alone: same bits for
  // any thread count.
  int64_t block = std::max<int64_t>(64, ceil_div(rows, 64)), blocks = ceil_div(rows, block);
  Tensor parts = zeros(x, {blocks, n}, ScalarType::Float);
  const float* w = weight.const_data_ptr<float>();
  const float* r = rstd.const_data_ptr<float>();
  float* part = parts.mutable_data_ptr<float>();
  dispatch(x.scalar_type(), [&]<class T>() {
    const T *g = grad.const_data_ptr<T>(), *in = x.const_data_ptr<T>();
    T* out = dx.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        int64_t first = b * block, count = std::min(block, rows - first);
        backward(g + first * n, in + first * n, w, r + first, out + first * n, part + b * n, count, n,
                 float(offset));
      }
    });
  });
  add_rows(part, dw.mutable_data_ptr<float>(), blocks, n);
  return {dx, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("rms_norm.cpu", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward.cpu", TORCH_BOX(&rms_norm_backward));
}

}  // namespace vlkern
