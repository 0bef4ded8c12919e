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
};

// What is known of a block of symbols.
struct Sweep {
  explicit Sweep(int components) : components(components), all(3 * components * kBlock) {}

  int components;
  std::vector<double> all;
  alignas(32) double low[kBlock], half[kBlock];  // the window, low ... low + 2 half - 1
  alignas(32) double before[kBlock];             // F(low - 1)
  alignas(32) double bin[kBlock];                // that an encoder asks for; 2 half is the escape

  // What Component is made of, of component m: arrays one behind the other.
  double* start(int m) { return &all[3 * m * kBlock]; }
  double* inverse(int m) { return start(m) + kBlock; }
  double* weight(int m) { return start(m) + 2 * kBlock; }
  const double* start(int m) const { return &all[3 * m * kBlock]; }
  const double* inverse(int m) const { return start(m) + kBlock; }
  const double* weight(int m) const { return start(m) + 2 * kBlock; }

  // Parameters of a block that lie in several rows, put together; up to a multiple of 4 like the first ones.
  Mixtures pieces(const Mixtures& m, int64_t first, int count);

 private:
  int32_t means_[Mixtures::kMostComponents * kBlock];
  uint8_t scales_[Mixtures::kMostComponents * kBlock];
  int16_t weights_[Mixtures::kMostComponents * kBlock];
};

// The symbols of mixtures from `start` on. Throws std::invalid_argument where there are no mixtures.
class MixtureSource final : public Source {
 public:
  MixtureSource(const Format& format, const int32_t* symbols, const Mixtures& mixtures, int64_t start);
  void ranges(int64_t first, int count, Range* out, std::string& escapes) override;

 private:
  const int32_t* symbols_;
  Mixtures mixtures_;
  int64_t start_;
  Sweep sweep_;
};

// The same for a decoder; `symbols` is the first of them.
void get(Decoder& decoder, int32_t* symbols, int64_t count, const Mixtures& mixtures, int64_t start);

}  // namespace vlkern::rans
