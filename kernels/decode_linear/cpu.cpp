// Linear layers of a step of decoding on the CPU, with what stands around them: bound by reading the weights.
// The rest, a few rows, is done by the calling thread before and after them.
#include "few_rows.h"
#include "gelu.h"
#include "simd.h"
#include "vlkern.h"

namespace vlkern {
namespace {

// 1 / sqrt(mean(x^2) + eps)
template <class T>
VLKERN_INLINE float inverse_rms(const T* x, int64_t n, float eps) {
  float sum = sum_of(n, [&](int64_t j) VLKERN_INLINE_LAMBDA { return to_float(x[j]) * to_float(x[j]); });
  return 1.0f / __builtin_sqrtf(sum / float(n) + eps);
}

// Normalised, if there is a weight w, as the products want it: in the streams of T.
template <class T>
VLKERN_INLINE void enter_row(const T* x, const float* w, float* wide, float* out, int64_t k, float eps) {
  if (!w) return widen_streams(x, out, k);
  const float r = inverse_rms(x, k, eps);
#pragma omp simd
  for (int64_t j = 0; j < k; ++j) wide[j] = to_float(x[j]) * r * w[j];
  for (int64_t j = 0; j < k; ++j) out[stream_position<T>(j, k)] = wide[j];
}

// products [n] -> gelu(first half) * second half [n / 2]
VLKERN_INLINE void gate_row(float* products, int64_t n) {
  const int64_t half = n / 2;
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) products[j] = gelu_tanh(products[j]) * products[half + j];
}

// y = residual + normalised products, each as far as it is asked for
template <class T>
VLKERN_INLINE void leave_row(const float* products, const float* w, const T* residual, T* y, int64_t n,
                             float eps) {
  const float r = w ? inverse_rms(products, n, eps) : 1.0f;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    float v = w ? products[j] * r * w[j] : products[j];
    y[j] = from_float<T>(residual ? to_float(residual[j]) + v : v);
  }
}

// target_clones needs plain functions, one per dtype.
#define VLKERN_DTYPE(T)                                                                                   \
  VLKERN_SIMD void few(const T* w, const float* x, int64_t rows, int64_t n, int64_t k, float* out) {      \
    multiply_few(w, x, rows, n, k, out);                                                                  \
  }                                                                                                       \
  VLKERN_SIMD void enter(const T* x, const float* w, float* wide, float* out, int64_t k, float eps) {     \
    enter_row(x, w, wide, out, k, eps);                                                                   \
  }                                                                                                       \
  VLKERN_SIMD void leave(float* products, const float* w, const T* residual, T* y, int64_t n, bool geglu, \
                         float eps) {                                                                     \
    if (geglu) gate_row(products, n);                                                                     \
    leave_row(products, w, residual, y, geglu ? n / 2 : n, eps);                                          \
  }                                                                                                       \
  VLKERN_SIMD void shift(const T* w, float* out, int64_t n, float offset) {                               \
    _Pragma("omp simd") for (int64_t j = 0; j < n; ++j) out[j] = offset + to_float(w[j]);                 \
  }
VLKERN_DTYPE(float)
VLKERN_DTYPE(bf16)
VLKERN_DTYPE(fp16)

// offset + w in float32, or nothing.
std::vector<float> shifted(const std::optional<Tensor>& weight, int64_t n, double offset) {
  if (!weight) return {};
  VLKERN_CHECK(weight->dim() == 1 && weight->size(0) == n, "a norm's weight must have shape [", n, "]");
  Tensor w = dense(*weight);
  std::vector<float> out(n);
  dispatch(w.scalar_type(), [&]<class T>() { shift(w.const_data_ptr<T>(), out.data(), n, float(offset)); });
  return out;
}

Tensor decode_linear(const Tensor& x_, std::vector<Tensor> weights, const std::optional<Tensor>& before,
                     bool geglu, const std::optional<Tensor>& after, const std::optional<Tensor>& residual_,
                     double eps, double offset) {
  VLKERN_CHECK(x_.dim() == 2 && x_.size(0) <= kFewRows, "x must be [M, K] with at most ", kFewRows, " rows");
  Tensor x = dense(x_);
  const int64_t m = x.size(0), k = x.size(1);
  int64_t n = 0;
  for (Tensor& w : weights) {
    VLKERN_CHECK(w.dim() == 2 && w.size(1) == k && w.scalar_type() == x.scalar_type(),
                 "a weight must be [N, ", k, "] with the dtype of x");
    w = dense(w);
    n += w.size(0);
  }
  VLKERN_CHECK(!geglu || (weights.size() == 2 && weights[0].size(0) == weights[1].size(0)),
               "geglu takes two weights of one shape");
  const int64_t width = geglu ? n / 2 : n;
  const std::vector<float> w_before = shifted(before, k, offset), w_after = shifted(after, width, offset);
  std::optional<Tensor> residual;
  if (residual_) residual = dense(*residual_);
  VLKERN_CHECK(!residual || (residual->dim() == 2 && residual->size(0) == m && residual->size(1) == width &&
                             residual->scalar_type() == x.scalar_type()),
               "residual must have shape and dtype of the output");
  Tensor y = empty(x, {m, width}, x.scalar_type());
  std::vector<float> inputs(m * k), wide(k), products(m * n);
  dispatch(x.scalar_type(), [&]<class T>() {
    std::vector<Weight<T>> parts;
    for (const Tensor& w : weights) parts.push_back({w.const_data_ptr<T>(), w.size(0)});
    for (int64_t i = 0; i < m; ++i)
      enter(x.const_data_ptr<T>() + i * k, before ? w_before.data() : nullptr, wide.data(),
            inputs.data() + i * k, k, float(eps));
    multiply_weights<T>(
        parts, inputs.data(), m, k,
        [](const T* w, const float* x, int64_t rows, int64_t n, int64_t k, float* out) {
          few(w, x, rows, n, k, out);
        },
        [&](const float* from, int64_t j, int64_t count) {
          for (int64_t i = 0; i < m; ++i) std::copy_n(from + i * count, count, products.data() + i * n + j);
        });
    const T* added = residual ? residual->const_data_ptr<T>() : nullptr;
    for (int64_t i = 0; i < m; ++i)
      leave(products.data() + i * n, after ? w_after.data() : nullptr, added ? added + i * width : nullptr,
            y.mutable_data_ptr<T>() + i * width, n, geglu, float(eps));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("decode_linear.cpu", TORCH_BOX(&decode_linear));
}

}  // namespace vlkern
