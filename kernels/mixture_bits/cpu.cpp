// The bits of symbols under mixtures on the CPU: checks and threads. The arithmetic is in cpu_kernel.inc,
// compiled for each instruction set.
#include <type_traits>

#include "checks.h"
#include "simd.h"
#include "vlkern.h"

#define VLKERN_ROOM mixture_bits
#define VLKERN_ARITHMETIC "../kernels/mixture_bits/cpu_kernel.inc"
// after the two names
#include "levels.inc"

namespace vlkern {
namespace {

constexpr int64_t kTask = 1 << 12;  // symbols that a thread takes at a time: 40 us

struct Problem : mixture_bits::Given {
  using Given::Given;

  // work(worker, first symbol, first parameter, symbols) for every piece of a row
  template <class F>
  void each_piece(F work) const {
    mixture_bits::with_kernels([&]<class Kernels>() {
      torch::stable::parallel_for(0, n, std::max<int64_t>(1, kTask / c), [&](int64_t begin, int64_t end) {
        typename Kernels::Worker worker(k);
        constexpr int64_t kPiece = Kernels::Worker::kPiece;
        for (int64_t row = begin; row < end; ++row)
          for (int64_t j = 0; j < c; j += kPiece)
            work(worker, row * c + j, row * 3 * k * c + j, std::min(kPiece, c - j));
      });
    });
  }
};

// f.operator()<S, T>() with the types of symbols and parameters.
template <class F>
void dispatch_both(const Problem& p, F f) {
  dispatch(p.symbols.scalar_type(), [&]<class S>() {
    dispatch(p.params.scalar_type(), [&]<class T>() { f.template operator()<S, T>(); });
  });
}

Tensor forward(const Tensor& symbols, const Tensor& params) {
  const Problem p(symbols, params);
  Tensor bits = empty(p.params, {p.n, p.c}, ScalarType::Float);
  float* out = bits.mutable_data_ptr<float>();
  dispatch_both(p, [&]<class S, class T>() {
    const S* y = p.symbols.const_data_ptr<S>();
    const T* all = p.params.const_data_ptr<T>();
    p.each_piece([&](auto& worker, int64_t symbol, int64_t parameter, int64_t count) {
      worker.forward(y + symbol, all + parameter, p.c, count, out + symbol);
    });
  });
  return bits;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_, const Tensor& symbols, const Tensor& params) {
  const Problem p(symbols, params);
  Tensor grad = p.checked(grad_);
  const float* g = grad.const_data_ptr<float>();
  Tensor d_symbols = empty(p.symbols, {p.n, p.c}, p.symbols.scalar_type());
  Tensor d_params = empty(p.params, {p.n, 3, p.k, p.c}, p.params.scalar_type());
  dispatch_both(p, [&]<class S, class T>() {
    const S* y = p.symbols.const_data_ptr<S>();
    const T* all = p.params.const_data_ptr<T>();
    S* d_y = d_symbols.mutable_data_ptr<S>();
    T* d_all = d_params.mutable_data_ptr<T>();
    p.each_piece([&](auto& worker, int64_t symbol, int64_t parameter, int64_t count) {
      worker.backward(g + symbol, y + symbol, all + parameter, p.c, count, d_y + symbol, d_all + parameter);
    });
  });
  return {d_symbols, d_params};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("mixture_bits.cpu", TORCH_BOX(&forward));
  m.impl("mixture_bits_backward.cpu", TORCH_BOX(&backward));
}

}  // namespace vlkern
