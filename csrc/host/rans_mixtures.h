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

// What is known of a block of symbols: a field of each lies kBlock doubles behind the one before.
struct Sweep {
  explicit Sweep(int components) : components(components), all(4 * components * kBlock) {}

  int components;
  std::vector<double> all;
  double low[kBlock], half[kBlock];  // the window, low ... low + 2 half - 1
  double before[kBlock];             // F(low - 1)
  double bin[kBlock];                // that an encoder asks for; 2 half is the escape

  double* means(int m) { return &all[4 * m * kBlock]; }
  double* weights(int m) { return means(m) + kBlock; }
  double* sigma(int m) { return means(m) + 2 * kBlock; }
  double* inverse(int m) { return means(m) + 3 * kBlock; }  // 1 / sigma
  const double* means(int m) const { return &all[4 * m * kBlock]; }
  const double* weights(int m) const { return means(m) + kBlock; }
  const double* sigma(int m) const { return means(m) + 2 * kBlock; }
  const double* inverse(int m) const { return means(m) + 3 * kBlock; }
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
