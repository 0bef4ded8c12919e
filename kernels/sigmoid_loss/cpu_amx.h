// The bf16 sweep on AMX tiles (csrc/amx_sweep.h): X are the images, Y the texts. A 32 x 32 block of logits
// turns into its share of the loss and into G = dL/dlogits.
#pragma once

#include "amx_sweep.h"
#include "cpu.h"

#ifdef VLKERN_AMX

namespace vlkern::sigmoid_loss {

struct BlockLoss {
  using Sums = sigmoid_loss::Sums;
  const Problem& p;

  VLKERN_INLINE Sums operator()(float* block, int64_t i, int64_t j) const {
    alignas(64) float sign[1024], keep[1024];
    return p.labels(i, 32, j, 32, sign, keep)
               ? all_pairs<true>(block, sign, keep, 1024, p.scale, p.bias)
               : all_pairs<false>(block, nullptr, nullptr, 1024, p.scale, p.bias);
  }
};

}  // namespace vlkern::sigmoid_loss

#endif
