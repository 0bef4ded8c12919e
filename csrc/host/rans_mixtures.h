// Symbols with mixtures of Gaussians in whole numbers (mixture_cdf.h): entries of their rows are computed one
// by one, as they are needed, and no row is ever built.
#pragma once

#include "rans.h"

namespace vlkern::rans {

// Component m of symbol i = r channels + c lies at (r components + m) channels + c: [r, components,
// channels].
struct Mixtures {
  const int32_t* means;
  const uint8_t* scales;
  const int16_t* weights;
  int64_t channels;
  int components;

  static constexpr int kMostComponents = 16;

  Mixtures from(int64_t at) const { return {means + at, scales + at, weights + at, channels, components}; }
};

// What is known of a block of symbols.
struct Sweep {
  explicit Sweep(int components) : components(components) {}

  static constexpr int kRoom = kBlock + 4;  // four symbols are written at a time
  int components;
  alignas(32) double all[3 * Mixtures::kMostComponents * kRoom];
  alignas(32) double low[kRoom], half[kRoom];  // the window, low ... low + 2 half - 1
  alignas(32) double before[kRoom];            // F(low - 1)
  alignas(32) double bin[kRoom];               // that an encoder asks for; 2 half is the escape
  bool outside;                                // whether that is so for any of them

  // What Component is made of, of component m: arrays one behind the other.
  double* start(int m) { return &all[3 * m * kRoom]; }
  double* inverse(int m) { return start(m) + kRoom; }
  double* weight(int m) { return start(m) + 2 * kRoom; }
  const double* start(int m) const { return &all[3 * m * kRoom]; }
  const double* inverse(int m) const { return start(m) + kRoom; }
  const double* weight(int m) const { return start(m) + 2 * kRoom; }

  // The first count < 4 symbols of some, the last one of them repeated.
  Mixtures padded(const Mixtures& m, int count);

 private:
  int32_t means_[Mixtures::kMostComponents * 4];
  uint8_t scales_[Mixtures::kMostComponents * 4];
  int16_t weights_[Mixtures::kMostComponents * 4];
};

// The symbols of mixtures from `start` on. Throws std::invalid_argument where there are no mixtures.
class MixtureSource final : public Source {
 public:
  MixtureSource(const Format& format, const int32_t* symbols, const Mixtures& mixtures, int64_t start);
  void ranges(int64_t first, int count, Range* out, uint64_t* inverse, std::string& escapes) override;

 private:
  const int32_t* symbols_;
  Mixtures mixtures_;
  int64_t start_;
  Sweep sweep_;
};

// The same for a decoder; `symbols` is the first of them.
void get(Decoder& decoder, int32_t* symbols, int64_t count, const Mixtures& mixtures, int64_t start);

}  // namespace vlkern::rans
