// The arithmetic of csrc/cuda/pairs.cuh, callable from Python.
#include "cuda/pairs.cuh"

using namespace vlkern::cuda;

// Replaces the eight dot products by g; sums [3].
extern "C" void sigmoid_pairs_(float* pairs, float scale, float bias, unsigned keep, unsigned positive,
                               float* sums) {
  PairSums total;
  auto& eight = *reinterpret_cast<float (*)[kPairs]>(pairs);
  if (keep == 0xffu && positive == 0)
    sigmoid_pairs<true, false>(eight, scale, bias, keep, positive, total);
  else
    sigmoid_pairs<true, true>(eight, scale, bias, keep, positive, total);
  sums[0] = total.loss, sums[1] = total.scale, sums[2] = total.bias;
}
