// What a call is given, checked, for every backend.
#pragma once
#include "vlkern.h"

namespace vlkern::mixture {

// Means, scales and weights [..., K, C] in memory without gaps, and the shape of the symbols [..., C].
struct Held {
  Tensor means, scales, weights;
  std::vector<int64_t> symbols;
  int64_t channels, components;

  Held(const Tensor& means_, const Tensor& scales_, const Tensor& weights_)
      : means(torch::stable::contiguous(means_)),
        scales(torch::stable::contiguous(scales_)),
        weights(torch::stable::contiguous(weights_)),
        symbols(shape_of(means)) {
    VLKERN_CHECK(symbols.size() >= 2 && symbols[symbols.size() - 2] > 0,
                 "means must have shape [..., K, C] with at least one component");
    VLKERN_CHECK(scales.numel() == means.numel() && weights.numel() == means.numel(),
                 "scales and weights must have the shape of means");
    VLKERN_CHECK(means.scalar_type() == ScalarType::Int && scales.scalar_type() == ScalarType::Byte &&
                     weights.scalar_type() == ScalarType::Short,
                 "means must be int32, scales uint8, weights int16");
    channels = symbols.back();
    components = symbols[symbols.size() - 2];
    symbols.erase(symbols.end() - 2);
  }
};

}  // namespace vlkern::mixture
