// gmm.h, compiled once for each instruction set.
#include "gmm.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"
#include "vlkern.h"

#define VLKERN_ROOM gmm
#define VLKERN_ARITHMETIC "cpu/gmm_kernel.inc"
// after the two names
#include "levels.inc"

namespace vlkern::gmm {

template <class T>
void log_densities(const T* parts, int64_t n, int64_t d, const float* z, float min_scale, float* out) {
  with_kernels([&]<class K>() { K::template densities<T>(parts, n, d, z, min_scale, out); });
}

template <class T>
void gradients(const T* parts, int64_t n, int64_t d, const float* z, const float* weight, float min_scale,
               T* out, float* d_target) {
  with_kernels([&]<class K>() { K::template of_parts<T>(parts, n, d, z, weight, min_scale, out, d_target); });
}

Sum sum_of_exps(const float* x, int64_t n) {
  Sum sum;
  with_kernels([&]<class K>() { sum = K::sum(x, n); });
  return sum;
}

void softmax(const float* x, int64_t n, const Sum& sum, float factor, float* out) {
  with_kernels([&]<class K>() { K::shares(x, n, sum, factor, out); });
}

template <class T>
void channels_nll(const T* logits, const T* loc, const T* raw, int64_t channels, int64_t k, const float* z,
                  float min_scale, float* room, float* nll) {
  with_kernels(
      [&]<class K>() { K::template of_channels<T>(logits, loc, raw, channels, k, z, min_scale, room, nll); });
}

template <class T>
void channels_gradients(const T* logits, const T* loc, const T* raw, int64_t channels, int64_t k,
                        const float* z, const float* grad, float min_scale, float* room, T* d_logits,
                        T* d_loc, T* d_raw, float* d_target) {
  with_kernels([&]<class K>() {
    K::template channel_slopes<T>(logits, loc, raw, channels, k, z, grad, min_scale, room, d_logits, d_loc,
                                  d_raw, d_target);
  });
}

#define VLKERN_INSTANTIATE(T)                                                                             \
  template void log_densities(const T*, int64_t, int64_t, const float*, float, float*);                   \
  template void gradients(const T*, int64_t, int64_t, const float*, const float*, float, T*, float*);     \
  template void channels_nll(const T*, const T*, const T*, int64_t, int64_t, const float*, float, float*, \
                             float*);                                                                     \
  template void channels_gradients(const T*, const T*, const T*, int64_t, int64_t, const float*,          \
                                   const float*, float, float*, T*, T*, T*, float*);
VLKERN_INSTANTIATE(float)
VLKERN_INSTANTIATE(bf16)
VLKERN_INSTANTIATE(fp16)

}  // namespace vlkern::gmm
