#include "quantize_mixture.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "mixture_cdf.h"
#include "simd.h"
#include "threads.h"

namespace vlkern {
namespace {

constexpr int kBlock = 64;                                       // channels at a time
constexpr int64_t kTask = 1 << 15;                               // components that are worth a thread
constexpr float kLeast = -2.2072749132f, kMost = 5.5451774445f;  // log 0.11, log 256

// The channels of a block of one point: `in` and the results are those of the first of them.
struct Block {
  const float* in;
  int32_t* means;
  uint8_t* scales;
  int16_t* weights;
  int64_t components, channels;
  int count;
};

// Steps of 1/256, to nearest; and the nearest of 64 scales, by their logarithms. 0 unless all was finite.
VLKERN_SIMD int positions(const Block& b) {
  constexpr float kEnd = float(mixture::kMostMean), kPerLog = float(mixture::kScales - 1) / (kMost - kLeast);
  int bad = 0;
  for (int64_t i = 0; i < b.components; ++i) {
    const int64_t at = i * b.channels;
    const float *logit = b.in + at, *mean = logit + b.components * b.channels,
                *scale = mean + b.components * b.channels;
    for (int c = 0; c < b.count; ++c) {
      // The difference of two equal numbers is 0, of two infinities or NaN it is not.
      bad |= (logit[c] - logit[c] != 0) | (mean[c] - mean[c] != 0) | (scale[c] - scale[c] != 0);
      b.means[at + c] = int32_t(std::nearbyint(std::clamp(256.0f * mean[c], -kEnd, kEnd)));
      b.scales[at + c] = uint8_t((std::clamp(scale[c], kLeast, kMost) - kLeast) * kPerLog + 0.5f);
    }
  }
  return bad;
}

// Shares of 4096 by largest remainders; of equal ones the first. share, rest [components][kBlock]
VLKERN_SIMD void shares(const Block& b, float* share, float* rest) {
  float most[kBlock], sum[kBlock] = {};
  int left[kBlock];
  std::copy_n(b.in, b.count, most);
  for (int64_t i = 1; i < b.components; ++i)
    for (int c = 0; c < b.count; ++c) most[c] = std::max(most[c], b.in[i * b.channels + c]);
  for (int64_t i = 0; i < b.components; ++i)
    for (int c = 0; c < b.count; ++c)
      sum[c] += share[i * kBlock + c] = exp_nonpositive(b.in[i * b.channels + c] - most[c]);
  std::fill_n(left, kBlock, int(mixture::kWeights));
  for (int64_t i = 0; i < b.components; ++i)
    for (int c = 0; c < b.count; ++c) {
      const float t = share[i * kBlock + c] * (float(mixture::kWeights) / sum[c]);
      const int whole = int(t);
      left[c] -= whole;
      share[i * kBlock + c] = float(whole);
      rest[i * kBlock + c] = t - float(whole);
    }
  for (int64_t i = 0; i < b.components; ++i) {
    int before[kBlock] = {};
    for (int64_t j = 0; j < b.components; ++j)
      for (int c = 0; c < b.count; ++c) {
        const float own = rest[i * kBlock + c], other = rest[j * kBlock + c];
        before[c] += (other > own) | ((other == own) & (j < i));
      }
    for (int c = 0; c < b.count; ++c)
      b.weights[i * b.channels + c] = int16_t(int(share[i * kBlock + c]) + (before[c] < left[c]));
  }
}

}  // namespace

bool quantize_mixture(const float* params, int64_t points, int64_t components, int64_t channels,
                      int32_t* means, uint8_t* scales, int16_t* weights, int threads) {
  const int64_t point = components * channels,
                piece = std::max<int64_t>(1, kTask / std::max<int64_t>(1, point));
  std::atomic<int> bad = 0;
  on_threads((points + piece - 1) / piece, threads, [&](int64_t task) {
    std::vector<float> share(components * kBlock), rest(components * kBlock);
    for (int64_t p = task * piece; p < std::min(points, (task + 1) * piece); ++p)
      for (int64_t c = 0; c < channels; c += kBlock) {
        const int64_t at = p * point + c;
        const Block b = {params + 3 * p * point + c,
                         means + at,
                         scales + at,
                         weights + at,
                         components,
                         channels,
                         int(std::min<int64_t>(kBlock, channels - c))};
        bad |= positions(b);
        shares(b, share.data(), rest.data());
      }
  });
  return bad == 0;
}

}  // namespace vlkern
