// Cumulative probabilities of mixtures of Gaussians in whole numbers, the same on every machine: what the
// coder of host/ and the kernels of the room mixture_cdf share.
//
//   phi(x)   of x = num / den:  q, r = divmod(64 num, den),  PHI[q] + floor((PHI[q + 1] - PHI[q]) r / den),
//            0 below q = -512, 2^30 from q = 512 on
//   F(k)     floor(sum_m w_m phi((256 k + 128 - mu_m) / SIG[s_m]) / 2^12)        the mixture up to k + 1/2
//   entry j  floor((F(low + j - 1) - F(low - 1)) (65536 - (n + 1)) / 2^30) + j,  0 <= j <= n;  then 65536
//
// mu_m in 1/256, |mu_m| <= 2^23; w_m >= 0, sum 2^12. A row has n bins and an escape, and rises strictly.
// No number leaves 32 bits but the sums and products that are written with 64.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VLKERN_MIXTURE_CODE __device__ inline
#define VLKERN_MIXTURE_DATA __device__ const
#else
#define VLKERN_MIXTURE_CODE inline
#define VLKERN_MIXTURE_DATA constexpr
#endif

namespace vlkern::mixture {

constexpr int kScales = 64, kOne = 1 << 30, kTotal = 1 << 16, kWeights = 1 << 12, kMostMean = 1 << 23;
constexpr int kLeastHalf = 8, kMostHalf = 512;  // of a window, in symbols
constexpr int kSteps = 64, kReach = 8;          // of the table: steps a standard deviation, how many of them

// round(2^30 Phi(i / 64 - 8))
VLKERN_MIXTURE_DATA int32_t kPhi[2 * kSteps * kReach + 1] = {
#include "mixture_cdf_phi.inc"
};

// round(256 s), s = 0.11 ... 256 in equal steps of log s
VLKERN_MIXTURE_DATA int32_t kSigma[kScales] = {
    28,    32,    36,    41,    46,    52,    59,    67,    75,    85,    96,    109,   123,
    139,   158,   178,   202,   228,   258,   292,   330,   373,   422,   477,   540,   610,
    690,   781,   883,   999,   1130,  1277,  1445,  1634,  1848,  2090,  2363,  2673,  3023,
    3419,  3866,  4373,  4945,  5593,  6325,  7154,  8090,  9150,  10348, 11703, 13235, 14968,
    16928, 19145, 21652, 24487, 27694, 31320, 35422, 40060, 45306, 51238, 57948, 65536};

// The mixture of one symbol: component m at [m stride], so that neighbouring symbols may be neighbours.
// Whatever the bytes, no index leaves a table.
struct Mixture {
  const int32_t* means;
  const uint8_t* scales;
  const int16_t* weights;
  int count;
  int64_t stride;
};

struct Window {
  int32_t low, half;  // symbols low ... low + 2 half - 1
};

// floor(t / d) for whole numbers 0 <= t < 2^50 and 28 <= d <= 2^16, below 2^31; inverse is 1 / d, rounded.
//
// (t + 1/2) / d is at least 1 / (2 d) away from the whole numbers. What is computed differs from it by two
// roundings, less than (t + 1/2) / d times 2^-51, which is less than that. t + 1/2 is exact.
VLKERN_MIXTURE_CODE int32_t divide(double t, double inverse) {
  return int32_t((t + 0.5) * inverse);
}

// phi as above, |num| < 2^31 - 8 den; inverse is 1 / den, rounded. x is clamped to +-8, where the table ends,
// so that no dividend is negative; x = 8 is the end of the last step. The double precision holds only whole
// numbers: every instruction set has vectors of them, few have products and quotients of 64 bits.
VLKERN_MIXTURE_CODE int32_t phi(int32_t num, int32_t den, double inverse) {
  const int32_t end = kReach * den;
  num = num < -end ? -end : num;
  num = num > end ? end : num;
  const int32_t t = kSteps * (num + end);
  int32_t q = divide(t, inverse);
  q = q < 2 * kSteps * kReach ? q : 2 * kSteps * kReach - 1;
  return kPhi[q] + divide(double(kPhi[q + 1] - kPhi[q]) * double(t - q * den), inverse);
}

// F(k), |k| <= 2^16
VLKERN_MIXTURE_CODE int32_t cumulative(const Mixture& m, int32_t k) {
  double sum = 0;  // below 2^43
  for (int i = 0; i < m.count; ++i) {
    const int64_t at = i * m.stride;
    const int32_t den = kSigma[m.scales[at] % kScales];
    sum += double(m.weights[at]) * double(phi(256 * k + 128 - m.means[at], den, 1.0 / den));
  }
  return int32_t(sum * (1.0 / kWeights));
}

// The window of a mixture: centre = floor((floor(sum_m w_m mu_m / 2^12) + 128) / 256), half the smallest
// power of two from 8 to 512 with 256 half >= |mu_m - 256 centre| + 6 SIG_m for every w_m > 0, if there is
// one.
VLKERN_MIXTURE_CODE Window window(const Mixture& m) {
  int64_t sum = 0;
  for (int i = 0; i < m.count; ++i) sum += int64_t(m.weights[i * m.stride]) * m.means[i * m.stride];
  const int32_t centre = int32_t((sum + (1 << 19)) >> 20);
  int32_t half = kLeastHalf;
  for (int i = 0; i < m.count; ++i) {
    const int64_t at = i * m.stride;
    const int32_t away = m.means[at] - 256 * centre;
    const int32_t reach = (away < 0 ? -away : away) + 6 * kSigma[m.scales[at] % kScales];
    while (m.weights[at] > 0 && half < kMostHalf && 256 * half < reach) half *= 2;
  }
  return {centre - half, half};
}

// F(low - 1) of a window that `window` found. Up to half = 16 every SIG is at most 610, so that 64 num / den
// <= -384 - 64 * 128 / 610 < -397, where the table is still 0.
VLKERN_MIXTURE_CODE int32_t before(const Mixture& m, Window w) {
  return w.half <= 16 ? 0 : cumulative(m, w.low - 1);
}

// Entry j <= n of the row of a window, given cumulatives F(low - 1) and F(low + j - 1).
VLKERN_MIXTURE_CODE int32_t entry(int32_t start, int32_t at, int32_t j, int32_t n) {
  return int32_t(double(at - start) * double(kTotal - (n + 1)) * (1.0 / kOne)) + j;
}

// Entry j of the row of n bins from `low`, 0 <= j <= n + 1: what a decoder that bisects asks for.
VLKERN_MIXTURE_CODE int32_t cdf(const Mixture& m, int32_t low, int32_t n, int32_t j) {
  if (j > n) return kTotal;
  return entry(cumulative(m, low - 1), cumulative(m, low + j - 1), j, n);
}

#ifndef __CUDACC__
// floor(x) = round(x + kDown), to the nearest, of x = n / d that is 2^-18 off at most, n and d <= 2^16 whole
// numbers: kDown is in the middle of what fits x = 0 and x = 1 - 2^-16.
constexpr double kDown = 0x1p-17 - 0.5;

// What vectors (mixture_cdf.inc) read at once. With D = PHI[q + 1] - PHI[q], phi[q] is the line through steps
// q and q + 1: PHI[q] + D (z - q) + kDown = phi[q][0] + phi[q][1] (z + kDown), for every z. All are exact.
// SIG and 1 / SIG, for every byte.
struct Pairs {
  double phi[2 * kSteps * kReach + 1][2], sigma[256][2];

  constexpr Pairs() : phi(), sigma() {
    constexpr int kLast = 2 * kSteps * kReach;
    for (int q = 0; q <= kLast; ++q) {
      const double by = q < kLast ? kPhi[q + 1] - kPhi[q] : 0;
      phi[q][0] = kPhi[q] - by * q - by * kDown + kDown;
      phi[q][1] = by;
    }
    for (int s = 0; s < 256; ++s) sigma[s][0] = kSigma[s % kScales], sigma[s][1] = 1.0 / kSigma[s % kScales];
  }
};
inline constexpr Pairs kPairs;
#endif

}  // namespace vlkern::mixture
