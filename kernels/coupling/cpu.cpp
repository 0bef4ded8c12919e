// Affine couplings on the CPU: one pass over memory each way, the permutations in the loads and stores.
#include <cmath>

#include "cpu_problem.h"
#include "simd.h"

namespace vlkern {
namespace {

using coupling::for_each_piece;
using coupling::Indices;
using coupling::Piece;
using coupling::Problem;
using coupling::Side;

struct Scale {
  float s, rest;  // 1 / (1 + e^-r), and 1 less it, which does not cancel
};

// e^-r stops at e^-87 and e^87, and with it s.
VLKERN_INLINE Scale scale_of(float r) {
  float x = r < -87.0f ? 87.0f : -r;  // this way round NaN stays NaN
  x = x < -87.0f ? -87.0f : x;
  float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // as exp_nonpositive() in simd.h
  float tail = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float e = std::bit_cast<float>(std::bit_cast<uint32_t>(exp_polynomial(tail)) +
                                 (std::bit_cast<uint32_t>(shifted) << 23));
  float s = 1.0f / (1.0f + e);
  return {s, e * s};
}

// log(p), 0 < p < inf and normal: of p = m 2^k with 1 <= m < 2.
VLKERN_INLINE float log_of(float p) {
  uint32_t bits = std::bit_cast<uint32_t>(p);
  float m = std::bit_cast<float>((bits & 0x7fffffu) | 0x3f800000u);
  return float(int32_t(bits >> 23) - 127) * 0.693147181f + log1p_unit(m - 1.0f);
}

struct Log {
  float sum, product;  // sum + log(product)
};

// sum of term(j), j < n, whose products are 1/4 to 1: one logarithm for every 32 of them.
template <class F>
VLKERN_INLINE double sum_of_logs(int64_t n, F term) {
  constexpr int kLanes = 32, kFold = 32;
  double totals[kLanes] = {}, sum = 0;
  int64_t j = 0;
  while (j + kLanes <= n) {
    float sums[kLanes] = {}, products[kLanes];
    for (float& p : products) p = 1;
    for (int fold = 0; fold < kFold && j + kLanes <= n; ++fold, j += kLanes)
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        Log log = term(j + l);
        sums[l] += log.sum;
        products[l] *= log.product;
      }
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) totals[l] += sums[l] + log_of(products[l]);
  }
  for (; j < n; ++j) {
    Log log = term(j);
    sum += log.sum + log_of(log.product);
  }
  for (int l = 0; l < kLanes; ++l) sum += totals[l];
  return sum;
}

struct Mapped {
  float value;
  Log log;  // of s
};

// log s = min(r, 0) + log max(s, 1 - s)
VLKERN_INLINE Log log_of(float r, Scale at) {
  return {r < 0 ? r : 0.0f, at.s > at.rest ? at.s : at.rest};
}

// One element: y = (x + u) S s.
VLKERN_INLINE Mapped forward_one(float x, float u, float r, float most) {
  Scale at = scale_of(r);
  return {(x + u) * (most * at.s), log_of(r, at)};
}

// One element: x = y / (S s) - u.
VLKERN_INLINE Mapped inverse_one(float y, float u, float r, float most) {
  Scale at = scale_of(r);
  return {y / (most * at.s) - u, log_of(r, at)};
}

// y = one(x, u, r), returns the sum of log(s). float is read as one stream: caches like that better.
template <class T, class F>
VLKERN_INLINE double map_all(const T* x, const T* u, const T* r, T* y, int64_t n, float most, F one) {
  if constexpr (sizeof(T) == 4)
    return sum_of_logs(n, [=](int64_t j) VLKERN_INLINE_LAMBDA {
      Mapped at = one(x[j], u[j], r[j], most);
      y[j] = at.value;
      return at.log;
    });
  const int64_t half = n / 2;
  double sum = sum_of_logs(half, [=](int64_t j) VLKERN_INLINE_LAMBDA {
    Both a = load(x, half, j), b = load(u, half, j), c = load(r, half, j);
    Mapped first = one(a.a, b.a, c.a, most), second = one(a.b, b.b, c.b, most);
    store(y, half, j, first.value, second.value);
    return Log{first.log.sum + second.log.sum, first.log.product * second.log.product};
  });
  if (n % 2) {
    Mapped last = one(to_float(x[n - 1]), to_float(u[n - 1]), to_float(r[n - 1]), most);
    y[n - 1] = from_float<T>(last.value);
    sum += last.log.sum + log_of(last.log.product);
  }
  return sum;
}

struct Gradients {
  float dx, dr;
};

// One element: dx = g S s, dr = (g y + dl) (1 - s).
VLKERN_INLINE Gradients backward_one(float g, float y, float r, float dl, float most) {
  Scale at = scale_of(r);
  return {g * (most * at.s), (g * y + dl) * at.rest};
}

template <class T>
VLKERN_INLINE void backward_all(const T* g, const T* y, const T* r, float dl, T* dx, T* dr, int64_t n,
                                float most) {
  const int64_t half = n / 2, single = sizeof(T) == 4 ? 0 : half * 2;
  if constexpr (sizeof(T) != 4)
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      Both a = load(g, half, j), b = load(y, half, j), c = load(r, half, j);
      Gradients one = backward_one(a.a, b.a, c.a, dl, most), two = backward_one(a.b, b.b, c.b, dl, most);
      store(dx, half, j, one.dx, two.dx);
      store(dr, half, j, one.dr, two.dr);
    }
#pragma omp simd
  for (int64_t j = single; j < n; ++j) {
    Gradients one = backward_one(to_float(g[j]), to_float(y[j]), to_float(r[j]), dl, most);
    dx[j] = from_float<T>(one.dx);
    dr[j] = from_float<T>(one.dr);
  }
}

// target_clones needs plain functions, one per dtype.
#define VLKERN_DTYPE(T)                                                                            \
  VLKERN_SIMD double forward(const T* x, const T* u, const T* r, T* y, int64_t n, float most) {    \
    return map_all(x, u, r, y, n, most,                                                            \
                   [](auto... all) VLKERN_INLINE_LAMBDA { return forward_one(all...); });          \
  }                                                                                                \
  VLKERN_SIMD double inverse(const T* y, const T* u, const T* r, T* x, int64_t n, float most) {    \
    return map_all(y, u, r, x, n, most,                                                            \
                   [](auto... all) VLKERN_INLINE_LAMBDA { return inverse_one(all...); });          \
  }                                                                                                \
  VLKERN_SIMD void backward(const T* g, const T* y, const T* r, float dl, T* dx, T* dr, int64_t n, \
                            float most) {                                                          \
    backward_all(g, y, r, dl, dx, dr, n, most);                                                    \
  }
VLKERN_DTYPE(float)
VLKERN_DTYPE(bf16)
VLKERN_DTYPE(fp16)

struct Outputs {
  Tensor y, logdet, y2;
};

// Both directions: f(x, u, r, y, n, S) on each piece; logdet = sign sum(log S + what it returns). y2
// only if `apart`.
template <class F>
Outputs map(const Tensor& x_, const Tensor& shift, const Tensor& raw, const Indices& tokens,
            const Indices& channels, double max_scale, bool apart, double sign, F f) {
  coupling::check_shift(shift, raw);
  Problem p(x_, raw, tokens, channels);
  VLKERN_CHECK(!apart || !p.whole(), "expected tokens or channels");
  Tensor x = torch::stable::contiguous(x_), y = empty(x, shape_of(x), x.scalar_type());
  Tensor logdet = empty(x, {p.B}, ScalarType::Float),
         y2 = apart ? empty(x, shape_of(raw), x.scalar_type()) : y;
  std::vector<double> sums(p.B * p.pieces);
  dispatch(x.scalar_type(), [&]<class T>() {
    Side u(shift, p), r(raw, p);
    const T* in = x.const_data_ptr<T>();
    T *out = y.mutable_data_ptr<T>(), *part = y2.mutable_data_ptr<T>();
    for_each_piece<T>(p, [&](Piece<T>& piece, int64_t task) {
      sums[task] = f(piece.part(in, 0), piece.rows(u, 1), piece.rows(r, 2), piece.open_part(out, 3),
                     piece.elements(), float(max_scale));
      piece.close_part(in, out, 3);
      if (apart) piece.copy_rows(part, 3);
    });
  });
  float* total = logdet.mutable_data_ptr<float>();
  for (int64_t b = 0; b < p.B; ++b) {
    double sum = double(p.n * p.k) * std::log(max_scale);
    for (int64_t i = 0; i < p.pieces; ++i) sum += sums[b * p.pieces + i];
    total[b] = float(sign * sum);
  }
  return {y, logdet, y2};
}

constexpr auto kForward = [](auto... args) { return forward(args...); };
constexpr auto kInverse = [](auto... args) { return inverse(args...); };

std::tuple<Tensor, Tensor> affine_coupling(const Tensor& x, const Tensor& shift, const Tensor& raw,
                                           Indices tokens, Indices channels, double max_scale) {
  Outputs to = map(x, shift, raw, tokens, channels, max_scale, false, 1, kForward);
  return {to.y, to.logdet};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_part(const Tensor& x, const Tensor& shift,
                                                        const Tensor& raw, Indices tokens, Indices channels,
                                                        double max_scale) {
  Outputs to = map(x, shift, raw, tokens, channels, max_scale, true, 1, kForward);
  return {to.y, to.logdet, to.y2};
}

std::tuple<Tensor, Tensor> affine_coupling_inverse(const Tensor& y, const Tensor& shift, const Tensor& raw,
                                                   Indices tokens, Indices channels, double max_scale) {
  Outputs to = map(y, shift, raw, tokens, channels, max_scale, false, -1, kInverse);
  return {to.y, to.logdet};
}

// dx, dshift (dx itself where all of x changes), draw; y is the part that changed
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad_, const Tensor& grad_logdet_, const Tensor& y,
                                             const Tensor& raw, const Indices& tokens,
                                             const Indices& channels, double max_scale) {
  coupling::check_gradients(grad_, grad_logdet_, y, raw);
  Problem p(grad_, raw, tokens, channels);
  Tensor grad = torch::stable::contiguous(grad_), grad_logdet = torch::stable::contiguous(grad_logdet_);
  Tensor dx = empty(grad, shape_of(grad), grad.scalar_type()),
         draw = empty(grad, shape_of(raw), raw.scalar_type());
  Tensor dshift = p.whole() ? dx : empty(grad, shape_of(raw), raw.scalar_type());
  const float* dl = grad_logdet.const_data_ptr<float>();
  dispatch(grad.scalar_type(), [&]<class T>() {
    Side r(raw, p), of(y, p);
    const T* g = grad.const_data_ptr<T>();
    T *out = dx.mutable_data_ptr<T>(), *of_shift = dshift.mutable_data_ptr<T>(),
      *of_raw = draw.mutable_data_ptr<T>();
    for_each_piece<T>(p, [&](Piece<T>& piece, int64_t) {
      T *d = piece.open_part(out, 3), *dr = piece.open_rows(of_raw, 4);
      backward(piece.part(g, 0), piece.rows(of, 1), piece.rows(r, 2), dl[piece.b()], d, dr, piece.elements(),
               float(max_scale));
      piece.close_part(g, out, 3);
      piece.close_rows(of_raw, 4);
      if (!p.whole()) piece.copy_rows(of_shift, 3);
    });
  });
  return {dx, dshift, draw};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_part_backward(const Tensor& grad,
                                                                 const Tensor& grad_logdet, const Tensor& y2,
                                                                 const Tensor& raw, Indices tokens,
                                                                 Indices channels, double max_scale) {
  return gradients(grad, grad_logdet, y2, raw, tokens, channels, max_scale);
}

std::tuple<Tensor, Tensor> affine_coupling_backward(const Tensor& grad, const Tensor& grad_logdet,
                                                    const Tensor& y, const Tensor& raw, double max_scale) {
  auto [dx, dshift, draw] = gradients(grad, grad_logdet, y, raw, std::nullopt, std::nullopt, max_scale);
  return {dx, draw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("affine_coupling.cpu", TORCH_BOX(&affine_coupling));
  m.impl("affine_coupling_inverse.cpu", TORCH_BOX(&affine_coupling_inverse));
  m.impl("affine_coupling_backward.cpu", TORCH_BOX(&affine_coupling_backward));
  m.impl("affine_coupling_part.cpu", TORCH_BOX(&affine_coupling_part));
  m.impl("affine_coupling_part_backward.cpu", TORCH_BOX(&affine_coupling_part_backward));
}

}  // namespace vlkern
