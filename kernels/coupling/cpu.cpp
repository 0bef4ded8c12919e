// Affine couplings on the CPU: one pass over memory each way, the permutations in the loads and stores.
#include <cmath>

#include "cpu_problem.h"
#include "simd.h"

namespace vlkern {
namespace {

using coupling::for_each_piece;
using coupling::Piece;
using coupling::Problem;
using coupling::Side;

struct Scale {
  float s, one_minus, log;  // s = 1 / (1 + e^-r), 1 - s, log s
};

// e^-|r| stops at e^-87, and with it s.
VLKERN_INLINE Scale scale_of(float r) {
  float e = exp_nonpositive(r < 0 ? r : -r), inverse = reciprocal_unit(1.0f + e), small = e * inverse;
  return {r < 0 ? small : inverse, r < 0 ? inverse : small, (r < 0 ? r : 0.0f) - log1p_unit(e)};
}

struct Bound {
  float scale, log;  // S and log S, what the scale stays below
};

// y = (x + u) S s, returns sum(log(S s))
template <class T>
VLKERN_INLINE float forward_all(const T* x, const T* u, const T* r, T* y, int64_t n, Bound most) {
  const int64_t half = n / 2;
  float sum = sum_of(half, [=](int64_t j) VLKERN_INLINE_LAMBDA {
    Both a = load(x, half, j), b = load(u, half, j), c = load(r, half, j);
    Scale one = scale_of(c.a), two = scale_of(c.b);
    store(y, half, j, (a.a + b.a) * (most.scale * one.s), (a.b + b.b) * (most.scale * two.s));
    return (one.log + most.log) + (two.log + most.log);
  });
  if (n % 2) {
    Scale last = scale_of(to_float(r[n - 1]));
    y[n - 1] = from_float<T>((to_float(x[n - 1]) + to_float(u[n - 1])) * (most.scale * last.s));
    sum += last.log + most.log;
  }
  return sum;
}

// x = y / (S s) - u, returns -sum(log(S s))
template <class T>
VLKERN_INLINE float inverse_all(const T* y, const T* u, const T* r, T* x, int64_t n, Bound most) {
  const int64_t half = n / 2;
  float sum = sum_of(half, [=](int64_t j) VLKERN_INLINE_LAMBDA {
    Both a = load(y, half, j), b = load(u, half, j), c = load(r, half, j);
    Scale one = scale_of(c.a), two = scale_of(c.b);
    store(x, half, j, a.a / (most.scale * one.s) - b.a, a.b / (most.scale * two.s) - b.b);
    return (one.log + most.log) + (two.log + most.log);
  });
  if (n % 2) {
    Scale last = scale_of(to_float(r[n - 1]));
    x[n - 1] = from_float<T>(to_float(y[n - 1]) / (most.scale * last.s) - to_float(u[n - 1]));
    sum += last.log + most.log;
  }
  return -sum;
}

// dx = g S s, dr = (g y + dl) (1 - s)
template <class T>
VLKERN_INLINE void backward_all(const T* g, const T* y, const T* r, float dl, T* dx, T* dr, int64_t n,
                                float most) {
  const int64_t half = n / 2;
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    Both a = load(g, half, j), b = load(y, half, j), c = load(r, half, j);
    Scale one = scale_of(c.a), two = scale_of(c.b);
    store(dx, half, j, a.a * (most * one.s), a.b * (most * two.s));
    store(dr, half, j, (a.a * b.a + dl) * one.one_minus, (a.b * b.b + dl) * two.one_minus);
  }
  if (n % 2) {
    float last = to_float(g[n - 1]);
    Scale at = scale_of(to_float(r[n - 1]));
    dx[n - 1] = from_float<T>(last * (most * at.s));
    dr[n - 1] = from_float<T>((last * to_float(y[n - 1]) + dl) * at.one_minus);
  }
}

// target_clones needs plain functions, one per dtype.
#define VLKERN_DTYPE(T)                                                                            \
  VLKERN_SIMD float forward(const T* x, const T* u, const T* r, T* y, int64_t n, Bound most) {     \
    return forward_all(x, u, r, y, n, most);                                                       \
  }                                                                                                \
  VLKERN_SIMD float inverse(const T* y, const T* u, const T* r, T* x, int64_t n, Bound most) {     \
    return inverse_all(y, u, r, x, n, most);                                                       \
  }                                                                                                \
  VLKERN_SIMD void backward(const T* g, const T* y, const T* r, float dl, T* dx, T* dr, int64_t n, \
                            float most) {                                                          \
    backward_all(g, y, r, dl, dx, dr, n, most);                                                    \
  }
VLKERN_DTYPE(float)
VLKERN_DTYPE(bf16)
VLKERN_DTYPE(fp16)

using Indices = std::optional<Tensor>;

struct Mapped {
  Tensor y, logdet, y2;
};

// Both directions: f(x, u, r, y, n, bound) on each piece, and the sums of what it returns. y2 only if
// `apart`.
template <class F>
Mapped map(const Tensor& x_, const Tensor& shift, const Tensor& raw, const Indices& tokens,
           const Indices& channels, double max_scale, bool apart, F f) {
  VLKERN_CHECK(shift.numel() == raw.numel() && x_.scalar_type() == raw.scalar_type() &&
                   x_.scalar_type() == shift.scalar_type(),
               "shift must have the shape of raw_scale, and both the dtype of x");
  Problem p(x_, raw, tokens, channels);
  VLKERN_CHECK(!apart || !p.whole(), "expected tokens or channels");
  Tensor x = torch::stable::contiguous(x_), y = empty(x, shape_of(x), x.scalar_type());
  Tensor logdet = empty(x, {p.B}, ScalarType::Float),
         y2 = apart ? empty(x, shape_of(raw), x.scalar_type()) : y;
  Bound most{float(max_scale), float(std::log(max_scale))};
  std::vector<float> sums(p.B * p.pieces);
  dispatch(x.scalar_type(), [&]<class T>() {
    Side<T> u(shift, p), r(raw, p);
    const T* in = x.const_data_ptr<T>();
    T *out = y.mutable_data_ptr<T>(), *part = y2.mutable_data_ptr<T>();
    for_each_piece<T>(p, [&](Piece<T>& piece, int64_t task) {
      sums[task] = f(piece.part(in, 0), piece.rows(u, 1), piece.rows(r, 2), piece.open_part(out, 3),
                     piece.elements(), most);
      piece.close_part(in, out, 3);
      if (apart) piece.copy_rows(part, 3);
    });
  });
  float* total = logdet.mutable_data_ptr<float>();
  for (int64_t b = 0; b < p.B; ++b) {
    double sum = 0;
    for (int64_t i = 0; i < p.pieces; ++i) sum += sums[b * p.pieces + i];
    total[b] = float(sum);
  }
  return {y, logdet, y2};
}

constexpr auto kForward = [](auto... args) { return forward(args...); };
constexpr auto kInverse = [](auto... args) { return inverse(args...); };

std::tuple<Tensor, Tensor> affine_coupling(const Tensor& x, const Tensor& shift, const Tensor& raw,
                                           Indices tokens, Indices channels, double max_scale) {
  Mapped to = map(x, shift, raw, tokens, channels, max_scale, false, kForward);
  return {to.y, to.logdet};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_part(const Tensor& x, const Tensor& shift,
                                                        const Tensor& raw, Indices tokens, Indices channels,
                                                        double max_scale) {
  Mapped to = map(x, shift, raw, tokens, channels, max_scale, true, kForward);
  return {to.y, to.logdet, to.y2};
}

std::tuple<Tensor, Tensor> affine_coupling_inverse(const Tensor& y, const Tensor& shift, const Tensor& raw,
                                                   Indices tokens, Indices channels, double max_scale) {
  Mapped to = map(y, shift, raw, tokens, channels, max_scale, false, kInverse);
  return {to.y, to.logdet};
}

// dx, dshift (dx itself where all of x changes), draw; y is the part that changed
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad_, const Tensor& grad_logdet_, const Tensor& y,
                                             const Tensor& raw, const Indices& tokens,
                                             const Indices& channels, double max_scale) {
  VLKERN_CHECK(grad_.scalar_type() == y.scalar_type() && y.scalar_type() == raw.scalar_type() &&
                   y.numel() == raw.numel() && grad_logdet_.scalar_type() == ScalarType::Float &&
                   grad_logdet_.numel() == grad_.size(0),
               "y must have the shape of raw_scale, and both the dtype of grad");
  Problem p(grad_, raw, tokens, channels);
  Tensor grad = torch::stable::contiguous(grad_), grad_logdet = torch::stable::contiguous(grad_logdet_);
  Tensor dx = empty(grad, shape_of(grad), grad.scalar_type()),
         draw = empty(grad, shape_of(raw), raw.scalar_type());
  Tensor dshift = p.whole() ? dx : empty(grad, shape_of(raw), raw.scalar_type());
  const float* dl = grad_logdet.const_data_ptr<float>();
  dispatch(grad.scalar_type(), [&]<class T>() {
    Side<T> r(raw, p), of(y, p);
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
