// What a call is given, checked, for every backend.
#pragma once

#include "vlkern.h"

namespace vlkern::mixture_bits {

// Symbols [n, c] and params [n, 3, k, c] in memory without gaps.
struct Given {
  int64_t n, k, c;
  Tensor symbols, params;

  Given(const Tensor& symbols_, const Tensor& params_)
      : n(symbols_.size(0)),
        k(params_.dim() == 4 ? params_.size(2) : 0),
        c(symbols_.dim() == 2 ? symbols_.size(1) : 0),
        symbols(torch::stable::contiguous(symbols_)),
        params(torch::stable::contiguous(params_)) {
    VLKERN_CHECK(k > 0 && c > 0 && params.numel() == 3 * n * k * c && params.size(0) == n &&
                     params.size(1) == 3 && params.size(3) == c,
                 "symbols must be [N, C] and params [N, 3, K, C]");
  }

  Tensor checked(const Tensor& grad) const {
    VLKERN_CHECK(grad.numel() == n * c && grad.scalar_type() == ScalarType::Float,
                 "grad must be float32, one number for each symbol");
    return torch::stable::contiguous(grad);
  }
};

}  // namespace vlkern::mixture_bits
