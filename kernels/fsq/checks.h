// What a call is given, checked, for every backend.
#pragma once

#include <numeric>

#include "vlkern.h"

namespace vlkern::fsq {

constexpr int64_t kMostChannels = 62;  // their product is at most 2^62

inline int64_t channels(const std::vector<int64_t>& levels) {
  for (int64_t n : levels) VLKERN_CHECK(n >= 2 && n <= INT32_MAX, "levels must be at least 2");
  VLKERN_CHECK(!levels.empty() && int64_t(levels.size()) <= kMostChannels,
               "levels must name 1 to 62 channels");
  return int64_t(levels.size());
}

inline void check_quantize(const Tensor& z, const Tensor& thresholds, const std::vector<int64_t>& levels) {
  const int64_t d = channels(levels);
  VLKERN_CHECK(z.dim() > 0 && z.size(-1) == d, "z must have one channel for each level");
  VLKERN_CHECK(thresholds.scalar_type() == ScalarType::Float &&
                   thresholds.numel() == std::accumulate(levels.begin(), levels.end(), -d),
               "thresholds must be float32, one less than levels for each channel");
}

inline void check_backward(const Tensor& grad, const Tensor& z, const Tensor& slopes) {
  VLKERN_CHECK(z.dim() > 0 && grad.numel() == z.numel() && grad.scalar_type() == z.scalar_type(),
               "grad must have the shape and dtype of z");
  VLKERN_CHECK(slopes.scalar_type() == ScalarType::Float && slopes.numel() == 2 * z.size(-1),
               "slopes must be float32 of shape [2, ", z.size(-1), "]");
}

inline void check_dequantize(const Tensor& codes, const Tensor& indices, const std::vector<int64_t>& levels) {
  channels(levels);
  VLKERN_CHECK(codes.numel() == std::accumulate(levels.begin(), levels.end(), int64_t(0)),
               "codes must have one value for each level");
  VLKERN_CHECK(indices.scalar_type() == ScalarType::Long, "indices must be int64");
}

}  // namespace vlkern::fsq
