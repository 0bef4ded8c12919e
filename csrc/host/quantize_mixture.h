// Mixtures of Gaussians in floating point to the whole numbers that mixture_cdf.h computes with.
#pragma once

#include <cstdint>

namespace vlkern {

// params [points, 3, components, channels]: logits, means, log scales -> means, scales, weights [points,
// components, channels]. False if a parameter is no finite number; what was written then means nothing.
//
// The arithmetic is that of IEEE floats without fused operations: the same bits on every machine.
bool quantize_mixture(const float* params, int64_t points, int64_t components, int64_t channels,
                      int32_t* means, uint8_t* scales, int16_t* weights, int threads);

}  // namespace vlkern
