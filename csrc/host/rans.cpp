#include "rans.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace vlkern::rans {
namespace {

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

template <class StateT, class WordT, int kLowBits>
struct Coder {
  using State = StateT;
  using Word = WordT;
  static constexpr int kLow = kLowBits, kWordBits = 8 * sizeof(Word);
  static constexpr State kLeast = State(1) << kLow;  // L
};

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

const int32_t* row_of(const Tables& t, int64_t row, int precision) {
  if (uint64_t(row) >= uint64_t(t.rows)) throw std::invalid_argument("index must name a row of the tables");
  const int32_t* cdf = t.cdf + row * t.width;
  int32_t size = t.size[row];
  if (size < 2 || size > t.width || cdf[0] != 0 || cdf[size - 1] != int32_t(1) << precision)
    throw std::invalid_argument("tables must have rows of at least 2 entries from 0 to 2^precision");
  return cdf;
}

Range range_of(const int32_t* cdf, int64_t bin) {
  int32_t start = cdf[bin], width = cdf[bin + 1] - start;
  if (width <= 0 || start < 0) throw std::invalid_argument("tables must rise strictly along a row");
  return {uint32_t(start), uint32_t(width)};
}

// How many bins of a row stand for a symbol.
int64_t plain_bins(const Tables& t, int64_t row) {
  return t.size[row] - 1 - t.escape;
}

// 0, -1, 1, -2, ... are 0, 1, 2, 3, ...; seven bits a byte, the lowest first, and a bit that says whether
// more follow.
void append_escape(std::string& out, int32_t v) {
  uint32_t rest = (uint32_t(v) << 1) ^ uint32_t(v >> 31);
  for (; rest >= 128; rest >>= 7) out.push_back(char(rest | 128));
  out.push_back(char(rest));
}

}  // namespace

void Format::check() const {
  int most = kind == Kind::k64 ? 30 : 16;
  if (precision < 1 || precision > most)
    throw std::invalid_argument("precision must be from 1 to " + std::to_string(most));
  if (lanes < 1 || lanes > 1024) throw std::invalid_argument("lanes must be from 1 to 1024");
}

void Encoder::put(const int32_t* symbols, int64_t count, const Tables& tables, Rows rows) {
  ranges_.reserve(ranges_.size() + count);
  for (int64_t i = 0; i < count; ++i) {
    int64_t row = rows[i];
    const int32_t* cdf = row_of(tables, row, format_.precision);
    int64_t bins = plain_bins(tables, row);
    uint64_t bin = uint64_t(int64_t(symbols[i]) - tables.offset[row]);
    if (bin >= uint64_t(bins)) {
      if (!tables.escape)
        throw std::invalid_argument("symbols must be in their tables, which have no escape");
      append_escape(escapes_, symbols[i]);
      bin = bins;
    }
    ranges_.push_back(range_of(cdf, int64_t(bin)));
  }
}

std::string Encoder::finish() const {
  return with_coder(format_.kind, [&]<class C>(C) {
    using State = typename C::State;
    using Word = typename C::Word;
    const int lanes = format_.lanes, precision = format_.precision;
    std::vector<State> state(lanes, C::kLeast);
    std::vector<Word> words;  // in reverse
    int lane = ranges_.empty() ? 0 : int((ranges_.size() - 1) % lanes);
    for (size_t i = ranges_.size(); i-- > 0; lane = lane ? lane - 1 : lanes - 1) {
      Range r = ranges_[i];
      // (L b / M) f may need one bit more than a state has; half of it does not.
      State x = state[lane], half = (State(1) << (C::kLow - precision + C::kWordBits - 1)) * r.width;
      while ((x >> 1) >= half) {
        words.push_back(Word(x));
        x >>= C::kWordBits;
      }
      state[lane] = (x / r.width << precision) + x % r.width + r.start;
    }
    std::string stream;
    stream.reserve(lanes * sizeof(State) + words.size() * sizeof(Word) + escapes_.size());
    for (State x : state) append(stream, x);
    for (size_t i = words.size(); i-- > 0;) append(stream, words[i]);
    stream.append(escapes_.rbegin(), escapes_.rend());
    return stream;
  });
}

Decoder::Decoder(Format format, const char* stream, int64_t bytes)
    : format_(format), in_(stream), end_(stream + bytes) {
  format.check();
  with_coder(format.kind, [&]<class C>(C) {
    using State = typename C::State;
    if (bytes < int64_t(format.lanes * sizeof(State))) throw Damaged("the stream is shorter than its states");
    for (int lane = 0; lane < format.lanes; ++lane, in_ += sizeof(State)) {
      State x = load<State>(in_);
      if (x < C::kLeast || (x >> C::kLow >> C::kWordBits) != 0) throw Damaged("a state is out of range");
      state_.push_back(x);
    }
  });
}

void Decoder::get(int32_t* symbols, int64_t count, const Tables& tables, Rows rows) {
  with_coder(format_.kind, [&]<class C>(C) { get_as<C>(symbols, count, tables, rows); });
}

template <class C>
void Decoder::get_as(int32_t* symbols, int64_t count, const Tables& tables, Rows rows) {
  using State = typename C::State;
  using Word = typename C::Word;
  const int precision = format_.precision;
  const State mask = (State(1) << precision) - 1;
  for (int64_t i = 0; i < count; ++i) {
    int64_t row = rows[i];
    const int32_t* cdf = row_of(tables, row, precision);
    State x = State(state_[lane_]);
    int32_t slot = int32_t(x & mask), bins = tables.size[row] - 1;
    int64_t bin = 0;  // the last one that starts at or before the slot
    for (int64_t left = bins; left > 1;) {
      int64_t half = left / 2;
      bin = cdf[bin + half] <= slot ? bin + half : bin;
      left -= half;
    }
    Range r = range_of(cdf, bin);
    if (uint32_t(slot) - r.start >= r.width)
      throw std::invalid_argument("tables must rise strictly along a row");
    x = State(r.width) * (x >> precision) + (State(slot) - r.start);
    while (x < C::kLeast) {
      if (end_ - in_ < ptrdiff_t(sizeof(Word))) throw Damaged("the stream ends too early");
      x = (x << C::kWordBits) | load<Word>(in_);
      in_ += sizeof(Word);
    }
    state_[lane_] = x;
    lane_ = lane_ + 1 == format_.lanes ? 0 : lane_ + 1;
    if (tables.escape && bin == bins - 1) {
      symbols[i] = escaped();
      if (uint64_t(int64_t(symbols[i]) - tables.offset[row]) < uint64_t(bins - 1))
        throw Damaged("an escaped symbol is one of its table");
    } else {
      symbols[i] = int32_t(tables.offset[row] + bin);
    }
  }
}

int32_t Decoder::escaped() {
  uint32_t value = 0;
  for (int shift = 0;; shift += 7) {
    if (in_ == end_) throw Damaged("the stream ends too early");
    uint32_t byte = uint8_t(*--end_);
    if (shift == 28 && byte > 15) throw Damaged("an escaped symbol is too large");
    value |= (byte & 127) << shift;
    if (byte < 128) return int32_t(value >> 1) ^ -int32_t(value & 1);
  }
}

void Decoder::finish() const {
  uint64_t least = with_coder(format_.kind, []<class C>(C) { return uint64_t(C::kLeast); });
  for (uint64_t x : state_)
    if (x != least) throw Damaged("the states do not end where they began");
  if (in_ != end_) throw Damaged("bytes are left over");
}

}  // namespace vlkern::rans
