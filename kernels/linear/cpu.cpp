// The linear layer on the CPU, in fp32 through sgemm: blocks of y get bias and activation while they are in
// L2. 16-bit inputs are widened; for CPUs without instructions for them that is the fastest way to multiply.
// A few rows, as in decoding, only read the weight (few_rows.h).
#include "few_rows.h"
#include "gelu.h"
#include "sgemm.h"
#include "simd.h"
#include "vlkern.h"

namespace vlkern {
namespace {

// Rows and columns of a block of a product, at most. Larger ones leave L2 before their epilogue, smaller ones
// spend more time packing operands.
constexpr int64_t kBlock = 768;

template <class T>
VLKERN_INLINE void widen_all(const T* in, float* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = to_float(in[j]);
}

// pre = products + bias, which may be null, y = gelu(pre)
template <class T>
VLKERN_INLINE void finish_row(const float* products, const float* bias, T* pre, T* y, int64_t n, bool gelu) {
  auto sum = [=](int64_t j) VLKERN_INLINE_LAMBDA { return bias ? products[j] + bias[j] : products[j]; };
  if (!gelu) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] = from_float<T>(sum(j));
    return;
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    y[j] = from_float<T>(gelu_tanh(sum(j)));
  }
  if (!pre) return;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) pre[j] = from_float<T>(sum(j));
}

// g = grad gelu'(z), sum += g
template <class T>
VLKERN_INLINE void slope_row(const T* grad, const T* pre, T* g, float* sum, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    float v = to_float(grad[j]) * gelu_and_slope(to_float(pre[j])).slope;
    g[j] = from_float<T>(v);
    sum[j] += v;
  }
}

template <class T>
VLKERN_INLINE void narrow_all(const float* in, T* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = from_float<T>(in[j]);
}

// target_clones needs plain functions, one per dtype.
#define VLKERN_DTYPE(T)                                                                                   \
  VLKERN_SIMD void widen(const T* in, float* out, int64_t n) {                                            \
    widen_all(in, out, n);                                                                                \
  }                                                                                                       \
  VLKERN_SIMD void narrow(const float* in, T* out, int64_t n) {                                           \
    narrow_all(in, out, n);                                                                               \
  }                                                                                                       \
  VLKERN_SIMD void finish(const float* products, const float* bias, T* pre, T* y, int64_t n, bool gelu) { \
    finish_row(products, bias, pre, y, n, gelu);                                                          \
  }                                                                                                       \
  VLKERN_SIMD void slope(const T* grad, const T* pre, T* g, float* sum, int64_t n) {                      \
    slope_row(grad, pre, g, sum, n);                                                                      \
  }                                                                                                       \
  VLKERN_SIMD void streams(const T* in, float* out, int64_t n) {                                          \
    widen_streams(in, out, n);                                                                            \
  }                                                                                                       \
  VLKERN_SIMD void few(const T* w, const float* x, int64_t rows, int64_t n, int64_t k, float* out) {      \
    multiply_few(w, x, rows, n, k, out);                                                                  \
  }
VLKERN_DTYPE(float)
VLKERN_DTYPE(bf16)
VLKERN_DTYPE(fp16)

// A matrix as float32: itself, or a widened copy made by all threads.
class Wide {
 public:
  template <class T>
  static Wide of(const T* data, int64_t n) {
    Wide w;
    if constexpr (std::is_same_v<T, float>) {
      w.data_ = data;
    } else {
      w.copy_.resize(n);
      w.data_ = w.copy_.data();
      torch::stable::parallel_for(0, ceil_div(n, kPiece), 1, [&](int64_t begin, int64_t end) {
        begin *= kPiece, end = std::min(end * kPiece, n);
        widen(data + begin, w.copy_.data() + begin, end - begin);
      });
    }
    return w;
  }
  const float* data() const { return data_; }

 private:
  static constexpr int64_t kPiece = 1 << 14;
  std::vector<float> copy_;
  const float* data_ = nullptr;
};

// [0, n) in equal blocks of at most `most`, which are multiples of 16 but for the last.
struct Blocks {
  int64_t n, size, count;
  Blocks(int64_t n, int64_t most)
      : n(n),
        size(std::max<int64_t>(16, round_up(ceil_div(n, ceil_div(std::max<int64_t>(n, 1), most)), 16))),
        count(ceil_div(n, size)) {}
  // A side of a product: small ones are cut, too, so that there is work for a few threads.
  static Blocks of_product(int64_t n) { return {n, std::clamp<int64_t>(ceil_div(n, 2), 128, kBlock)}; }
  int64_t begin(int64_t b) const { return b * size; }
  int64_t length(int64_t b) const { return std::min(size, n - b * size); }
};

struct Shape {
  int64_t m, n, k;
};

Shape check(const Tensor& x, const Tensor& weight) {
  VLKERN_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
               "x must be [M, K], weight [N, K]");
  VLKERN_CHECK(x.scalar_type() == weight.scalar_type(), "weight must have the dtype of x");
  return {x.size(0), weight.size(0), weight.size(1)};
}

// The product of `left(i)`, from row i on, and `right(j)`, from column j on, in blocks on all threads;
// row(products, i, j, n) takes n of them, those of row i from column j on, while they are in cache.
template <class Left, class Right, class Row>
void for_each_block(const Shape& s, Left left, Right right, Row row) {
  Blocks rows = Blocks::of_product(s.m), columns = Blocks::of_product(s.n);
  torch::stable::parallel_for(0, rows.count * columns.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> products(rows.size * columns.size);
    for (int64_t t = begin; t < end; ++t) {
      int64_t i = rows.begin(t / columns.count), j = columns.begin(t % columns.count);
      int64_t height = rows.length(t / columns.count), width = columns.length(t % columns.count);
      sgemm(height, width, s.k, 1.0f, left(i), right(j), 0.0f, products.data(), width);
      for (int64_t r = 0; r < height; ++r) row(products.data() + r * width, i + r, j, width);
    }
  });
}

// The output for at most kFewRows rows.
template <class T>
void forward_few(const Shape& s, const T* x, const T* weight, const float* bias, T* y, T* z, bool gelu) {
  std::vector<float> inputs(s.m * s.k);
  for (int64_t i = 0; i < s.m; ++i) streams(x + i * s.k, inputs.data() + i * s.k, s.k);
  multiply_weights<T>(
      {{weight, s.n}}, inputs.data(), s.m, s.k,
      [](const T* w, const float* x, int64_t rows, int64_t n, int64_t k, float* out) {
        few(w, x, rows, n, k, out);
      },
      [&](const float* products, int64_t j, int64_t n) {
        for (int64_t i = 0; i < s.m; ++i)
          finish(products + i * n, bias ? bias + j : nullptr, z ? z + i * s.n + j : nullptr, y + i * s.n + j,
                 n, gelu);
      });
}

// y, and z where it is given.
template <class T>
void forward(const Shape& s, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, T* y,
             T* z, bool gelu) {
  std::vector<float> wide_b(bias ? s.n : 0);
  if (bias) widen(dense(*bias).template const_data_ptr<T>(), wide_b.data(), s.n);
  const float* b = bias ? wide_b.data() : nullptr;
  if (s.m <= kFewRows)
    return forward_few(s, x.const_data_ptr<T>(), weight.const_data_ptr<T>(), b, y, z, gelu);
  Wide wide_x = Wide::of(x.const_data_ptr<T>(), s.m * s.k),
       wide_w = Wide::of(weight.const_data_ptr<T>(), s.n * s.k);
  for_each_block(
      s, [&](int64_t i) { return Matrix{wide_x.data() + i * s.k, s.k}; },
      [&](int64_t j) { return Matrix{wide_w.data() + j * s.k, s.k, true}; },
      [&](const float* products, int64_t i, int64_t j, int64_t n) {
        finish(products, b ? b + j : nullptr, z ? z + i * s.n + j : nullptr, y + i * s.n + j, n, gelu);
      });
}

Tensor linear(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias, bool gelu) {
  Tensor x = dense(x_), weight = dense(weight_);
  const Shape s = check(x, weight);
  Tensor y = empty(x, {s.m, s.n}, x.scalar_type());
  dispatch(x.scalar_type(),
           [&]<class T>() { forward<T>(s, x, weight, bias, y.mutable_data_ptr<T>(), nullptr, gelu); });
  return y;
}

std::tuple<Tensor, Tensor> linear_training(const Tensor& x_, const Tensor& weight_,
                                           const std::optional<Tensor>& bias) {
  Tensor x = dense(x_), weight = dense(weight_);
  const Shape s = check(x, weight);
  Tensor y = empty(x, {s.m, s.n}, x.scalar_type()), z = empty(x, {s.m, s.n}, x.scalar_type());
  dispatch(x.scalar_type(), [&]<class T>() {
    forward<T>(s, x, weight, bias, y.mutable_data_ptr<T>(), z.mutable_data_ptr<T>(), true);
  });
  return {y, z};
}

// G [M, N] and its column sums, which are added up in blocks of rows whose number depends on M alone.
std::tuple<Tensor, Tensor> linear_slope(const Tensor& grad_, const Tensor& z_) {
  Tensor grad = dense(grad_), z = dense(z_);
  VLKERN_CHECK(grad.dim() == 2 && grad.numel() == z.numel() && grad.scalar_type() == z.scalar_type(),
               "grad and z must be [M, N] of one dtype");
  const int64_t m = grad.size(0), n = grad.size(1);
  Tensor g = empty(grad, {m, n}, grad.scalar_type()), db = empty(grad, {n}, grad.scalar_type());
  Blocks rows(m, 128);
  std::vector<float> parts(rows.count * n), sum(n);
  dispatch(grad.scalar_type(), [&]<class T>() {
    const T *incoming = grad.const_data_ptr<T>(), *pre = z.const_data_ptr<T>();
    T* out = g.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, rows.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t i = rows.begin(b); i < rows.begin(b) + rows.length(b); ++i)
          slope(incoming + i * n, pre + i * n, out + i * n, parts.data() + b * n, n);
    });
    for (int64_t b = 0; b < rows.count; ++b)
      for (int64_t j = 0; j < n; ++j) sum[j] += parts[b * n + j];
    narrow(sum.data(), db.mutable_data_ptr<T>(), n);
  });
  return {g, db};
}

// a b, or a^T b: [M, K] [K, N]
Tensor linear_product(const Tensor& a_, const Tensor& b_, bool transposed) {
  Tensor a = dense(a_), b = dense(b_);
  VLKERN_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(transposed ? 0 : 1) == b.size(0) &&
                   a.scalar_type() == b.scalar_type(),
               "the inner sizes and dtypes of a and b must agree");
  const Shape s{a.size(transposed ? 1 : 0), b.size(1), b.size(0)};
  Tensor out = empty(a, {s.m, s.n}, a.scalar_type());
  dispatch(a.scalar_type(), [&]<class T>() {
    Wide left = Wide::of(a.const_data_ptr<T>(), s.m * s.k),
         right = Wide::of(b.const_data_ptr<T>(), s.k * s.n);
    T* target = out.mutable_data_ptr<T>();
    for_each_block(
        s,
        [&](int64_t i) {
          return transposed ? Matrix{left.data() + i, s.m, true} : Matrix{left.data() + i * s.k, s.k};
        },
        [&](int64_t j) { return Matrix{right.data() + j, s.n}; },
        [&](const float* products, int64_t i, int64_t j, int64_t n) {
          narrow(products, target + i * s.n + j, n);
        });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("linear.cpu", TORCH_BOX(&linear));
  m.impl("linear_training.cpu", TORCH_BOX(&linear_training));
  m.impl("linear_slope.cpu", TORCH_BOX(&linear_slope));
  m.impl("linear_product.cpu", TORCH_BOX(&linear_product));
}

}  // namespace vlkern
