// GeGLU on the CPU: one pass, in the streams of simd.h.
#include "gelu.h"
#include "simd.h"
#include "vlkern.h"

namespace vlkern {
namespace {

template <class T>
VLKERN_INLINE void forward_all(const T* gate, const T* up, T* y, int64_t n) {
  const int64_t half = n / 2;
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    Both z = load(gate, half, j), u = load(up, half, j);
    store(y, half, j, gelu_tanh(z.a) * u.a, gelu_tanh(z.b) * u.b);
  }
  if (n % 2) y[n - 1] = from_float<T>(gelu_tanh(to_float(gate[n - 1])) * to_float(up[n - 1]));
}

// dgate = grad up gelu'(gate), dup = grad gelu(gate)
template <class T>
VLKERN_INLINE void backward_all(const T* grad, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {
  const int64_t half = n / 2;
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    Both g = load(grad, half, j), z = load(gate, half, j), u = load(up, half, j);
    Gelu a = gelu_and_slope(z.a), b = gelu_and_slope(z.b);
    store(dgate, half, j, g.a * u.a * a.slope, g.b * u.b * b.slope);
    store(dup, half, j, g.a * a.value, g.b * b.value);
  }
  if (n % 2) {
    Gelu last = gelu_and_slope(to_float(gate[n - 1]));
    dgate[n - 1] = from_float<T>(to_float(grad[n - 1]) * to_float(up[n - 1]) * last.slope);
    dup[n - 1] = from_float<T>(to_float(grad[n - 1]) * last.value);
  }
}

// target_clones needs plain functions, one per dtype.
#define VLKERN_DTYPE(T)                                                                               \
  VLKERN_SIMD void forward(const T* gate, const T* up, T* y, int64_t n) {                             \
    forward_all(gate, up, y, n);                                                                      \
  }                                                                                                   \
  VLKERN_SIMD void backward(const T* grad, const T* gate, const T* up, T* dgate, T* dup, int64_t n) { \
    backward_all(grad, gate, up, dgate, dup, n);                                                      \
  }
VLKERN_DTYPE(float)
VLKERN_DTYPE(bf16)
VLKERN_DTYPE(fp16)

constexpr int64_t kPiece = 1 << 12;  // elements a thread takes at a time: 10 us

template <class F>
void for_each_piece(int64_t n, F f) {
  torch::stable::parallel_for(0, ceil_div(n, kPiece), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) f(p * kPiece, std::min(kPiece, n - p * kPiece));
  });
}

void check(const Tensor& gate, const Tensor& up) {
  VLKERN_CHECK(gate.numel() == up.numel() && gate.scalar_type() == up.scalar_type(),
               "up must have the shape and dtype of gate");
}

Tensor geglu(const Tensor& gate_, const Tensor& up_) {
  check(gate_, up_);
  Tensor gate = torch::stable::contiguous(gate_), up = torch::stable::contiguous(up_);
  Tensor y = empty(gate, shape_of(gate), gate.scalar_type());
  dispatch(gate.scalar_type(), [&]<class T>() {
    const T *z = gate.const_data_ptr<T>(), *u = up.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    for_each_piece(gate.numel(), [&](int64_t i, int64_t n) { forward(z + i, u + i, out + i, n); });
  });
  return y;
}

std::tuple<Tensor, Tensor> geglu_backward(const Tensor& grad_, const Tensor& gate_, const Tensor& up_) {
  check(gate_, up_);
  check(gate_, grad_);
  Tensor grad = torch::stable::contiguous(grad_), gate = torch::stable::contiguous(gate_),
         up = torch::stable::contiguous(up_);
  Tensor dgate = empty(gate, shape_of(gate), gate.scalar_type()),
         dup = empty(gate, shape_of(gate), gate.scalar_type());
  dispatch(gate.scalar_type(), [&]<class T>() {
    const T *g = grad.const_data_ptr<T>(), *z = gate.const_data_ptr<T>(), *u = up.const_data_ptr<T>();
    T *dz = dgate.mutable_data_ptr<T>(), *du = dup.mutable_data_ptr<T>();
    for_each_piece(gate.numel(),
                   [&](int64_t i, int64_t n) { backward(g + i, z + i, u + i, dz + i, du + i, n); });
  });
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("geglu.cpu", TORCH_BOX(&geglu));
  m.impl("geglu_backward.cpu", TORCH_BOX(&geglu_backward));
}

}  // namespace vlkern
