// What every native kernel includes: the stable-ABI tensor, checks that name the argument, small helpers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace vlkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Second line of defence: Python has checked already and raised ValueError or TypeError with more words.
#define VLKERN_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

// t itself where it lies densely: asking costs nothing, the dispatcher a microsecond.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

inline Tensor zeros(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, shape, dtype);
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// Calls f.operator()<T>() with the element type of a kernel dtype.
template <class F>
void dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::BFloat16:
      return f.template operator()<torch::headeronly::BFloat16>();
    case ScalarType::Half:
      return f.template operator()<torch::headeronly::Half>();
    default:
      VLKERN_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace vlkern
