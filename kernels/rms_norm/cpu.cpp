// RMS normalisation on the CPU. Memory-bound: a row stays in L1 between its two passes, so each tensor
// crosses memory once.
#include "simd.h"
#include "vlkern.h"

namespace vlkern {
namespace {

// A row's second pass goes block by block and fetches the next row meanwhile: it reads L1 only, so the
// hardware prefetcher would sleep. All of a row at once would overflow the queue of pending loads.
constexpr int64_t kBlock = 64;  // elements of each stream

template <class T>
VLKERN_INLINE void prefetch_block(const T* row, int64_t begin) {
  for (int64_t j = 0; j < 2 * kBlock; j += int64_t(64 / sizeof(T))) __builtin_prefetch(row + 2 * begin + j);
}

// y = x * rstd * w', rstd = 1 / sqrt(mean(x^2) + eps);  w' = offset + w, in streams (simd.h)
template <class T>
VLKERN_INLINE void forward_rows(const T* x, const float* w, T* y, float* rstd, int64_t rows, int64_t n,
                                float eps) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < rows; ++i, x += n, y += n) {
    float sum = sum_of(half, [&](int64_t j) VLKERN_INLINE_LAMBDA {
      Both v = load(x, half, j);
      return v.a * v.a + v.b * v.b;
    });
    if (n % 2) sum += to_float(x[n - 1]) * to_float(x[n - 1]);
    float r = rstd[i] = 1.0f / __builtin_sqrtf(sum / float(n) + eps);
    const T* next = i + 1 < rows ? x + n : x;
    for (int64_t begin = 0; begin < half; begin += kBlock) {
      prefetch_block(next, begin);
      const int64_t end = std::min(begin + kBlock, half);
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) {
        Both v = load(x, half, j);
        store(y, half, j, v.a * r * w[j], v.b * r * w[half + j]);
      }
    }
    if (n % 2) y[n - 1] = from_float<T>(to_float(x[n - 1]) * r * w[n - 1]);
  }
}

// With h = x * rstd and u = grad * w':  dx = rstd * (u - h * mean(u h)),  dw' += grad * h
template <class T>
VLKERN_INLINE void backward_rows(const T* grad, const T* x, const float* w, const float* rstd, T* dx,
                                 float* dw, int64_t rows, int64_t n) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < rows; ++i, x += n, grad += n, dx += n) {
    float r = rstd[i];
    float dot = sum_of(half, [&](int64_t j) VLKERN_INLINE_LAMBDA {
      Both g = load(grad, half, j), v = load(x, half, j);
      return g.a * w[j] * (v.a * r) + g.b * w[half + j] * (v.b * r);
    });
    if (n % 2) dot += to_float(grad[n - 1]) * w[n - 1] * (to_float(x[n - 1]) * r);
    float mean = dot / float(n);
    const T *next_x = i + 1 < rows ? x + n : x, *next_grad = i + 1 < rows ? grad + n : grad;
    for (int64_t begin = 0; begin < half; begin += kBlock) {
      prefetch_block(next_x, begin);
      prefetch_block(next_grad, begin);
      const int64_t end = std::min(begin + kBlock, half);
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) {
        Both g = load(grad, half, j), v = load(x, half, j), h = {v.a * r, v.b * r};
        store(dx, half, j, r * (g.a * w[j] - h.a * mean), r * (g.b * w[half + j] - h.b * mean));
        dw[j] += g.a * h.a;
        dw[half + j] += g.b * h.b;
      }
    }
    if (n % 2) {
      float g = to_float(grad[n - 1]), h = to_float(x[n - 1]) * r;
      dx[n - 1] = from_float<T>(r * (g * w[n - 1] - h * mean));
      dw[n - 1] += g * h;
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
                           float eps) {                                                                     \
    forward_rows(x, w, y, rstd, rows, n, eps);                                                              \
  }                                                                                                         \
  VLKERN_SIMD void backward(const T* grad, const T* x, const float* w, const float* rstd, T* dx, float* dw, \
                            int64_t rows, int64_t n) {                                                      \
    backward_rows(grad, x, w, rstd, dx, dw, rows, n);                                                       \
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

// offset + w, in the streams of T.
template <class T>
std::vector<float> shifted_weight(const Tensor& weight, float offset) {
  const int64_t n = weight.numel();
  const float* w = weight.const_data_ptr<float>();
  std::vector<float> out(n);
  for (int64_t j = 0; j < n; ++j) out[stream_position<T>(j, n)] = offset + w[j];
  return out;
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
  float* r = rstd.mutable_data_ptr<float>();
  dispatch(x.scalar_type(), [&]<class T>() {
    const T* in = x.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    const std::vector<float> w = shifted_weight<T>(weight, float(offset));
    torch::stable::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      forward(in + begin * n, w.data(), out + begin * n, r + begin, end - begin, n, float(eps));
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
  Tensor dw = empty(x, {n}, ScalarType::Float);
  // The weight gradient is summed in blocks of rows whose number depends on the shape alone: same bits for
  // any thread count.
  int64_t block = std::max<int64_t>(64, ceil_div(rows, 64)), blocks = ceil_div(rows, block);
  Tensor parts = zeros(x, {blocks, n}, ScalarType::Float);
  const float* r = rstd.const_data_ptr<float>();
  float* part = parts.mutable_data_ptr<float>();
  dispatch(x.scalar_type(), [&]<class T>() {
    const T *g = grad.const_data_ptr<T>(), *in = x.const_data_ptr<T>();
    T* out = dx.mutable_data_ptr<T>();
    const std::vector<float> w = shifted_weight<T>(weight, float(offset));
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        int64_t first = b * block, count = std::min(block, rows - first);
        backward(g + first * n, in + first * n, w.data(), r + first, out + first * n, part + b * n, count, n);
      }
    });
    std::vector<float> sums(n);
    add_rows(part, sums.data(), blocks, n);
    for (int64_t j = 0; j < n; ++j) dw.mutable_data_ptr<float>()[j] = sums[stream_position<T>(j, n)];
  });
  return {dx, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("rms_norm.cpu", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward.cpu", TORCH_BOX(&rms_norm_backward));
}

}  // namespace vlkern
