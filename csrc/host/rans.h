// Range asymmetric numeral systems (rANS): symbols with integer frequencies to words and back.
//
//   encode   x' = floor(x / f) M + (x mod f) + c        M = 2^precision, c the cumulative and f the own
//   frequency decode   slot = x mod M lies in [c, c + f);  x = f floor(x' / M) + slot - c
//
// A state x stays in [L, L b), b = 2^(bits of a word): before a symbol the encoder writes out low words while
// x >= (L b / M) f, after one the decoder reads words while x < L. What comes last comes out first, so the
// encoder walks backwards. Symbol i belongs to lane i mod N; the lanes have states of their own, which hides
// the latency of a state's chain, and share one stream of words, in the order in which a decoder asks for
// them.
//
//   stream   the states of lanes 0 ... N - 1, the words, and the escapes, which are read from the end
//   backwards;
//            all little-endian
//
// A symbol outside its table is coded as the table's last bin and follows among the escapes, zigzag, seven
// bits a byte. A decoder ends with every state at L and nothing left over; otherwise the stream is damaged.
//
// What is coded is a model: tables (rans_tables.h) or mixtures (rans_mixtures.h). It finds the ranges of
// symbols for the encoder, and for the decoder the symbol whose range holds a slot; the coder asks it for
// kBlock symbols at a time.
#pragma once

#include "rans_states.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace vlkern::rans {

// What cannot be decoded.
struct Damaged : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// How a stream is written; both sides must agree. Throws std::invalid_argument.
struct Format {
  Kind kind;
  int precision, lanes;
  void check() const;
};

constexpr int kBlock = 128;

void append_escape(std::string& out, int32_t symbol);

// Symbols first ... first + count - 1 of some, count <= kBlock: their ranges, what `inverse_of` gives for the
// widths of these, both with room for kBlock, and escapes that are appended.
class Source {
 public:
  virtual void ranges(int64_t first, int count, Range* out, uint64_t* inverse, std::string& escapes) = 0;

 protected:
  ~Source() = default;
};

// The stream of all symbols of a source.
std::string encode(Format format, int64_t count, Source& source);

// Symbols in, a stream out at the end.
class Encoder {
 public:
  explicit Encoder(Format format) : format_(format) { format.check(); }
  const Format& format() const { return format_; }
  void put(int64_t count, Source& source);
  std::string finish() const;

 private:
  Format format_;
  std::vector<Range> ranges_;
  std::string escapes_;  // in the order of the symbols
};

// A stream in, symbols out as they are asked for: as many and with the same models as they were put in. The
// stream must outlive the decoder.
class Decoder {
 public:
  Decoder(Format format, const char* stream, int64_t bytes);
  const Format& format() const { return format_; }

  // A finder has block(first, count), after which find(i, slot) is asked for symbols first + i, i < count,
  // one after the other, and holds(i, symbol) whether a symbol needs no escape. Instantiated in
  // rans_decoder.h.
  template <class Finder>
  void get(int32_t* symbols, int64_t count, Finder& finder);
  void finish() const;  // throws Damaged unless everything was used up

 private:
  template <class Coder, class Finder>
  void get_as(int32_t* symbols, int64_t count, Finder& finder);
  int32_t escaped();

  Format format_;
  std::vector<uint64_t> state_;
  int lane_ = 0;
  const char *in_, *end_;  // words are read from one side, escapes from the other
};

}  // namespace vlkern::rans
