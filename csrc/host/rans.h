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
//   stream   the states of lanes 0 ... N - 1, then the words, then the escapes; all little-endian
//
// A symbol outside its table is coded as the table's last bin and follows among the escapes, zigzag, seven
// bits a byte. A decoder ends with every state at L and nothing left over; otherwise the stream is damaged.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace vlkern::rans {

// What cannot be decoded.
struct Damaged : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Rows of cumulative frequencies. Row r has `size[r]` entries, strictly rising from 0 to M: size[r] - 1 bins,
// of which the last one is the escape. Bin j stands for the symbol offset[r] + j.
struct Tables {
  const int32_t* cdf;
  int64_t rows, width;  // entries of a row in memory
  const int32_t *size, *offset;
  bool escape;
};

// The symbols of one stream; symbol i is coded with row index[i], or with row first + i where there is no
// index.
struct Symbols {
  int32_t* value;
  const int32_t* index;
  int64_t first, count;
  int64_t row(int64_t i) const { return index ? index[i] : first + i; }
};

enum class Kind {
  k64,
  kByte,
  kWord
};  // a state and a word of 64 and 32, 32 and 8, 32 and 16 bits; L = 2^31, 2^23, 2^16

std::string encode(Kind kind, int precision, int lanes, const Tables& tables, const Symbols& symbols);
void decode(Kind kind, int precision, int lanes, const Tables& tables, const std::string& stream,
            Symbols symbols);

// Several streams on several threads: stream s holds the symbols cu[s] ... cu[s + 1] - 1.
std::vector<std::string> encode_all(Kind kind, int precision, int lanes, const Tables& tables,
                                    const Symbols& symbols, const std::vector<int64_t>& cu, int threads);
void decode_all(Kind kind, int precision, int lanes, const Tables& tables,
                const std::vector<std::string>& streams, const Symbols& symbols,
                const std::vector<int64_t>& cu, int threads);

}  // namespace vlkern::rans
