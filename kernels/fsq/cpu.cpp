// Finite scalar quantization on the CPU: checks and threads. The arithmetic is in cpu_kernel.inc, compiled
// for each instruction set.
#include <bit>
#include <cmath>
#include <type_traits>

#include "checks.h"
#include "cpu_problem.h"
#include "simd.h"

#define VLKERN_ROOM fsq
#define VLKERN_ARITHMETIC "../kernels/fsq/cpu_kernel.inc"
// after the two names
#include "levels.inc"

namespace vlkern {
namespace {

using namespace fsq;

constexpr int64_t kPiece =
    1 << 15;  // elements a thread takes at a time, 20 us: it lays out the constants first

template <class F>
void for_each_piece(int64_t rows, int64_t d, F f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kPiece / d), f);
}

std::tuple<Tensor, Tensor> fsq_quantize(const Tensor& z_, const Tensor& thresholds_,
                                        std::vector<int64_t> levels, bool symmetric) {
  check_quantize(z_, thresholds_, levels);
  const int64_t d = z_.size(-1);
  Tensor z = torch::stable::contiguous(z_), thresholds = torch::stable::contiguous(thresholds_);
  auto shape = shape_of(z);
  Tensor codes = empty(z, shape, z.scalar_type());
  shape.pop_back();
  Tensor index = empty(z, shape, ScalarType::Long);
  const Quantizer q(levels, thresholds.const_data_ptr<float>(), symmetric);
  dispatch(z.scalar_type(), [&]<class T>() {
    const T* in = z.const_data_ptr<T>();
    T* out = codes.mutable_data_ptr<T>();
    auto* at = index.mutable_data_ptr<int64_t>();
    with_kernels([&]<class Kernels>() {
      for_each_piece(index.numel(), d, [&](int64_t begin, int64_t end) {
        typename Kernels::Forward(q).rows(in + begin * d, out + begin * d, at + begin, end - begin);
      });
    });
  });
  return {codes, index};
}

Tensor fsq_quantize_backward(const Tensor& grad_, const Tensor& z_, const Tensor& slopes_) {
  check_backward(grad_, z_, slopes_);
  const int64_t d = z_.size(-1);
  Tensor grad = torch::stable::contiguous(grad_), z = torch::stable::contiguous(z_),
         slopes = torch::stable::contiguous(slopes_);
  Tensor dz = empty(z, shape_of(z), z.scalar_type());
  const float* shift = slopes.const_data_ptr<float>();
  dispatch(z.scalar_type(), [&]<class T>() {
    const T *g = grad.const_data_ptr<T>(), *in = z.const_data_ptr<T>();
    T* out = dz.mutable_data_ptr<T>();
    with_kernels([&]<class Kernels>() {
      for_each_piece(z.numel() / d, d, [&](int64_t begin, int64_t end) {
        typename Kernels::Backward(shift, shift + d, d)
            .rows(g + begin * d, in + begin * d, out + begin * d, end - begin);
      });
    });
  });
  return dz;
}

Tensor fsq_dequantize(const Tensor& codes_, const Tensor& indices_, std::vector<int64_t> levels) {
  check_dequantize(codes_, indices_, levels);
  const auto d = int64_t(levels.size());
  Tensor codes = torch::stable::contiguous(codes_), indices = torch::stable::contiguous(indices_);
  auto shape = shape_of(indices);
  shape.push_back(d);
  Tensor out = empty(codes, shape, codes.scalar_type());
  dispatch(codes.scalar_type(), [&]<class T>() {
    std::vector<const T*> of_channel;
    const T* table = codes.const_data_ptr<T>();
    for (int64_t n : levels) of_channel.push_back(table), table += n;
    const auto* index = indices.const_data_ptr<int64_t>();
    T* to = out.mutable_data_ptr<T>();
    with_kernels([&]<class Kernels>() {
      for_each_piece(indices.numel(), d, [&](int64_t begin, int64_t end) {
        Kernels::template decode<T>(of_channel.data(), levels.data(), d, from_float<T>(NAN), index + begin,
                                    to + begin * d, end - begin);
      });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("fsq_quantize.cpu", TORCH_BOX(&fsq_quantize));
  m.impl("fsq_quantize_backward.cpu", TORCH_BOX(&fsq_quantize_backward));
  m.impl("fsq_dequantize.cpu", TORCH_BOX(&fsq_dequantize));
}

}  // namespace vlkern
