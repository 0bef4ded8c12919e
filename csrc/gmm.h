// The likelihood of mixtures of diagonal Gaussians and its gradient: what every kernel with such a head
// shares.
//
//   s = max(squareplus(raw), min_scale),  u = (z - loc) / s,  log N = -sum_d (log s + u^2 / 2 + log(2 pi) /
//   2)
//
// with |u| bounded by 10^18. T is the dtype of the parameters; everything is computed in float. A gradient
// may be written over the parameters that it belongs to.
#pragma once

#include <cstdint>

namespace vlkern::gmm {

// Room for a target: `d` floats and zeros up to the next multiple of the widest vector.
constexpr int64_t kWidest = 16;

// out[i] = log N(z; component i), i < n; parts [n][2, d]: loc, raw. z [d], zeros up to a multiple of kWidest.
template <class T>
void log_densities(const T* parts, int64_t n, int64_t d, const float* z, float min_scale, float* out);

// out [n][2, d] = weight[i] d(-log N(z; component i)) / d(loc, raw); d_target [d] += that by z. z and
// d_target as above.
template <class T>
void gradients(const T* parts, int64_t n, int64_t d, const float* z, const float* weight, float min_scale,
               T* out, float* d_target);

// A row's largest number, the sum of exp(x - most), and its log.
struct Sum {
  float most, exps, log;
};
Sum sum_of_exps(const float* x, int64_t n);

// out[i] = factor exp(x[i]) / sum_j exp(x[j]); out may be x.
void softmax(const float* x, int64_t n, const Sum& sum, float factor, float* out);

// Mixtures of one dimension: logits, loc, raw [channels, k], z and nll [channels]. `room` holds
// channel_room(k) floats.
template <class T>
void channels_nll(const T* logits, const T* loc, const T* raw, int64_t channels, int64_t k, const float* z,
                  float min_scale, float* room, float* nll);

// Gradients of sum(grad nll), in float [channels] for the target.
template <class T>
void channels_gradients(const T* logits, const T* loc, const T* raw, int64_t channels, int64_t k,
                        const float* z, const float* grad, float min_scale, float* room, T* d_logits,
                        T* d_loc, T* d_raw, float* d_target);

inline int64_t channel_room(int64_t k) {
  return 5 * (k + 1) * kWidest;
}

}  // namespace vlkern::gmm
