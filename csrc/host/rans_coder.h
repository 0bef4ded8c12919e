// How rans.h is done: little-endian words, quotients, the loop of a decoder.
#pragma once

#include "rans.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace vlkern::rans {

template <class T>
T little(T value) {
  if constexpr (std::endian::native == std::endian::big && sizeof(T) > 1) {
    auto bytes = std::bit_cast<std::array<unsigned char, sizeof(T)>>(value);
    std::reverse(bytes.begin(), bytes.end());
    return std::bit_cast<T>(bytes);
  }
  return value;
}

template <class T>
T load(const char* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return little(value);
}

template <class T>
void append(std::string& out, T value) {
  value = little(value);
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// A little below 2^64 / width, width < 2^31: less than 2^-51 of it.
inline uint64_t inverse_of(uint32_t width) {
  return uint64_t(int64_t((0x1p62 - 0x1p10) / int32_t(width))) << 2;
}

template <class Finder>
void Decoder::get(int32_t* symbols, int64_t count, Finder& finder) {
  with_coder(format_.kind, [&]<class C>(C) { get_as<C>(symbols, count, finder); });
}

template <class C, class Finder>
void Decoder::get_as(int32_t* symbols, int64_t count, Finder& finder) {
  using State = typename C::State;
  using Word = typename C::Word;
  const int precision = format_.precision, lanes = format_.lanes;
  const State mask = (State(1) << precision) - 1;
  uint64_t* const states = state_.data();
  int lane = lane_;
  const char* in = in_;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int n = int(std::min<int64_t>(kBlock, count - first));
    finder.block(first, n);
    auto get = [&](State& x, int i) {
      const uint32_t slot = uint32_t(x & mask);
      const Found found = finder.find(i, slot);
      x = C::after(x, found.range, slot, precision);
      while (x < C::kLeast) {
        if (end_ - in < ptrdiff_t(sizeof(Word))) throw Damaged("the stream ends too early");
        x = (x << C::kWordBits) | load<Word>(in);
        in += sizeof(Word);
      }
      symbols[first + i] = found.symbol;
      if (found.escaped) [[unlikely]] {
        in_ = in;
        symbols[first + i] = escaped();
        if (finder.holds(i, symbols[first + i])) throw Damaged("an escaped symbol is one of its table");
      }
    };
    int i = 0;
    if (lanes == 2) {  // in registers
      State a = State(states[lane]), b = State(states[!lane]);
      for (; i + 2 <= n; i += 2) get(a, i), get(b, i + 1);
      states[lane] = a, states[!lane] = b;
    }
    for (; i < n; ++i) {
      State x = State(states[lane]);
      get(x, i);
      states[lane] = x;
      lane = lane + 1 == lanes ? 0 : lane + 1;
    }
  }
  lane_ = lane;
  in_ = in;
}

}  // namespace vlkern::rans
