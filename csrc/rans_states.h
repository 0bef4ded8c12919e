// The states of rANS (host/rans.h has the idea) and their steps: what the coder of host/ and the decoder of
// cuda/ share.
#pragma once

#include <cstdint>

namespace vlkern::rans {

enum class Kind {
  k64,
  kByte,
  kWord
};  // a state and a word of 64 and 32, 32 and 8, 32 and 16 bits; L = 2^31, 2^23, 2^16

struct Range {
  uint32_t start, width;  // c and f
};

// A symbol that a decoder found.
struct Found {
  Range range;
  int32_t symbol;
  bool escaped;  // the symbol is among the escapes
};

template <class StateT, class WordT, int kLowBits>
struct Coder {
  using State = StateT;
  using Word = WordT;
  static constexpr int kLow = kLowBits, kWordBits = 8 * sizeof(Word);
  static constexpr State kLeast = State(1) << kLow;                                   // L
  static constexpr int kMostWords = sizeof(State) == 4 && sizeof(Word) == 1 ? 2 : 1;  // of a symbol

  // Whether x lies in [L, L b).
  static constexpr bool normal(State x) { return x >= kLeast && (x >> kLow >> kWordBits) == 0; }

  // The state after a symbol with this range, before words are read.
  static constexpr State after(State x, Range range, uint32_t slot, int precision) {
    return State(range.width) * (x >> precision) + (slot - range.start);
  }
};

enum class Escape { kWhole, kCut, kLarge };

// A symbol among the escapes, zigzag and seven bits a byte, the lowest last: read from `end` backwards, where
// `end` moves, and not beyond `begin`.
constexpr Escape read_escape(const char* begin, const char*& end, int32_t& symbol) {
  uint32_t value = 0;
  for (int shift = 0;; shift += 7) {
    if (begin == end) return Escape::kCut;
    const uint32_t byte = uint8_t(*--end);
    if (shift == 28 && byte > 15) return Escape::kLarge;
    value |= (byte & 127) << shift;
    if (byte >= 128) continue;
    symbol = int32_t(value >> 1) ^ -int32_t(value & 1);
    return Escape::kWhole;
  }
}

template <class F>
auto with_coder(Kind kind, F f) {
  switch (kind) {
    case Kind::kByte:
      return f(Coder<uint32_t, uint8_t, 23>());
    case Kind::kWord:
      return f(Coder<uint32_t, uint16_t, 16>());
    default:
      return f(Coder<uint64_t, uint32_t, 31>());
  }
}

}  // namespace vlkern::rans
