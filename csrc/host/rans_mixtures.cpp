#include "rans_mixtures.h"

#include "mixture_cdf.h"
#include "rans_coder.h"
#include "simd.h"

#define VLKERN_ROOM rans
#define VLKERN_ARITHMETIC "host/rans_mixtures.inc"
#include "levels.inc"

namespace vlkern::rans {
namespace {

const Mixtures& checked(const Format& format, const Mixtures& m) {
  if (format.precision != 16) throw std::invalid_argument("mixtures need a coder of precision 16");
  if (m.components < 1 || m.components > Mixtures::kMostComponents)
    throw std::invalid_argument("mixtures must have 1 to 16 components");
  return m;
}

void check(bool right) {
  if (!right)
    throw std::invalid_argument(
        "mixtures must have means of at most 2^23, scales from 0 to 63, and weights of at least 0 with a sum "
        "of 4096");
}

class Finder {
 public:
  Finder(const Mixtures& mixtures, int64_t start)
      : mixtures_(mixtures), start_(start), sweep_(mixtures.components) {
    with_kernels([&]<class K>() {
      guesses_of_ = mixtures.components == 3 ? K::template guesses<3> : K::template guesses<0>;
      find_ = mixtures.components == 3 ? K::template find<3> : K::template find<0>;
    });
  }

  void block(int64_t first, int count) {
    check(guesses_of_(mixtures_, start_ + first, count, sweep_, guesses_.data()));
    for (int i = 0; i < count; ++i) centres_[i] = int32_t(sweep_.low[i] + sweep_.half[i]);
  }

  Found find(int i, uint32_t slot) const {
    const Range guess = guesses_[i];
    if (slot - guess.start < guess.width) return {guess, centres_[i], false};
    return find_(sweep_, i, guess, slot);
  }

  bool holds(int i, int32_t symbol) const {
    return symbol >= sweep_.low[i] && symbol < sweep_.low[i] + 2 * sweep_.half[i];
  }

 private:
  const Mixtures& mixtures_;
  int64_t start_;
  Sweep sweep_;
  std::array<Range, kBlock> guesses_;    // of the symbols in the middle of their windows
  std::array<int32_t, kBlock> centres_;  // those symbols
  bool (*guesses_of_)(const Mixtures&, int64_t, int, Sweep&, Range*);
  Found (*find_)(const Sweep&, int, Range, uint32_t);
};

}  // namespace

Mixtures Sweep::padded(const Mixtures& m, int count) {
  for (int c = 0; c < m.components; ++c)
    for (int i = 0; i < 4; ++i) {
      const int64_t from = c * m.channels + std::min(i, count - 1), to = 4 * c + i;
      means_[to] = m.means[from], scales_[to] = m.scales[from], weights_[to] = m.weights[from];
    }
  return {means_, scales_, weights_, 4, m.components};
}

MixtureSource::MixtureSource(const Format& format, const int32_t* symbols, const Mixtures& mixtures,
                             int64_t start)
    : symbols_(symbols), mixtures_(checked(format, mixtures)), start_(start), sweep_(mixtures.components) {}

void MixtureSource::ranges(int64_t first, int count, Range* out, uint64_t* inverse, std::string& escapes) {
  const int32_t* symbols = symbols_ + first;
  with_kernels([&]<class K>() {
    const auto ranges = mixtures_.components == 3 ? K::template ranges<3> : K::template ranges<0>;
    check(ranges(mixtures_, symbols, start_ + first, count, sweep_, out, inverse));
  });
  for (int i = 0; sweep_.outside && i < count; ++i)
    if (sweep_.bin[i] == 2 * sweep_.half[i]) append_escape(escapes, symbols[i]);
}

void get(Decoder& decoder, int32_t* symbols, int64_t count, const Mixtures& mixtures, int64_t start) {
  Finder finder(checked(decoder.format(), mixtures), start);
  decoder.get(symbols, count, finder);
}

}  // namespace vlkern::rans
