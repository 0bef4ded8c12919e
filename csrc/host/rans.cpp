#include "rans.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

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

// How many bins of a row stand for a symbol.
int64_t plain_bins(const Tables& t, int64_t row) {
  return t.size[row] - 1 - t.escape;
}

// An escaped symbol: 0, -1, 1, -2, ... are 0, 1, 2, 3, ...
uint32_t zigzag(int32_t v) {
  return (uint32_t(v) << 1) ^ uint32_t(v >> 31);
}
int32_t unzigzag(uint32_t v) {
  return int32_t(v >> 1) ^ -int32_t(v & 1);
}

struct Bin {
  uint32_t start, width;
};

const int32_t* row_of(const Tables& t, int64_t row, int precision) {
  if (uint64_t(row) >= uint64_t(t.rows)) throw std::invalid_argument("index must name a row of the tables");
  const int32_t* cdf = t.cdf + row * t.width;
  int32_t size = t.size[row];
  if (size < 2 || size > t.width || cdf[0] != 0 || cdf[size - 1] != int32_t(1) << precision)
    throw std::invalid_argument("tables must have rows of at least 2 entries from 0 to 2^precision");
  return cdf;
}

Bin bin_of(const int32_t* cdf, int64_t bin) {
  int32_t start = cdf[bin], width = cdf[bin + 1] - start;
  if (width <= 0 || start < 0) throw std::invalid_argument("tables must rise strictly along a row");
  return {uint32_t(start), uint32_t(width)};
}

template <class State, class Word, int kLow>  // L = 2^kLow
struct Coder {
  static constexpr int kWordBits = 8 * sizeof(Word);
  static constexpr State kLeast = State(1) << kLow;

  static std::string encode(int precision, int lanes, const Tables& tables, const Symbols& symbols) {
    std::vector<State> state(lanes, kLeast);
    std::vector<Word> words;  // in reverse
    words.reserve(size_t(symbols.count) * precision / kWordBits / 4 + 16);
    std::string escapes;
    for (int64_t i = 0; i < symbols.count; ++i) {  // forwards, because escapes are read forwards
      int64_t row = symbols.row(i);
      row_of(tables, row, precision);
      uint64_t bin = uint64_t(int64_t(symbols.value[i]) - tables.offset[row]);
      if (bin < uint64_t(plain_bins(tables, row))) continue;
      if (!tables.escape)
        throw std::invalid_argument("symbols must be in their tables, which have no escape");
      uint32_t rest = zigzag(symbols.value[i]);
      for (; rest >= 128; rest >>= 7) escapes.push_back(char(rest | 128));
      escapes.push_back(char(rest));
    }
    int lane = symbols.count ? int((symbols.count - 1) % lanes) : 0;
    for (int64_t i = symbols.count; i-- > 0; lane = lane ? lane - 1 : lanes - 1) {
      int64_t row = symbols.row(i);
      uint64_t bin = uint64_t(int64_t(symbols.value[i]) - tables.offset[row]);
      bin = std::min(bin, uint64_t(plain_bins(tables, row)));
      Bin b = bin_of(tables.cdf + row * tables.width, int64_t(bin));
      State x = state[lane], most = (State(1) << (kLow - precision + kWordBits - 1)) * b.width;
      // (twice `most` may not fit)
      while ((x >> 1) >= most) {
        words.push_back(Word(x));
        x >>= kWordBits;
      }
      state[lane] = (x / b.width << precision) + x % b.width + b.start;
    }
    std::string stream(lanes * sizeof(State) + words.size() * sizeof(Word) + escapes.size(), '\0');
    char* out = stream.data();
    for (State x : state) {
      x = little(x);
      std::memcpy(out, &x, sizeof x);
      out += sizeof x;
    }
    for (size_t i = words.size(); i-- > 0; out += sizeof(Word)) {
      Word word = little(words[i]);
      std::memcpy(out, &word, sizeof word);
    }
    std::memcpy(out, escapes.data(), escapes.size());
    return stream;
  }

  static void decode(int precision, int lanes, const Tables& tables, const std::string& stream,
                     Symbols symbols) {
    if (stream.size() < lanes * sizeof(State)) throw Damaged("the stream is shorter than its states");
    const char *in = stream.data(), *end = in + stream.size();
    std::vector<State> state(lanes);
    for (State& x : state) {
      std::memcpy(&x, in, sizeof x);
      in += sizeof x;
      x = little(x);
      if (x < kLeast || (x >> kLow >> kWordBits) != 0) throw Damaged("a state is out of range");
    }
    std::vector<int64_t> escaped;
    const State mask = (State(1) << precision) - 1;
    int lane = 0;
    for (int64_t i = 0; i < symbols.count; ++i, lane = lane + 1 == lanes ? 0 : lane + 1) {
      int64_t row = symbols.row(i);
      const int32_t* cdf = row_of(tables, row, precision);
      State x = state[lane];
      int32_t slot = int32_t(x & mask), bins = tables.size[row] - 1;
      // the last bin that starts at or before the slot
      int64_t bin = 0;
      for (int64_t left = bins; left > 1;) {
        int64_t half = left / 2;
        bin = cdf[bin + half] <= slot ? bin + half : bin;
        left -= half;
      }
      Bin b = bin_of(cdf, bin);
      if (uint32_t(slot) - b.start >= b.width)
        throw std::invalid_argument("tables must rise strictly along a row");
      x = State(b.width) * (x >> precision) + (State(slot) - b.start);
      while (x < kLeast) {
        if (end - in < ptrdiff_t(sizeof(Word))) throw Damaged("the stream ends too early");
        Word word;
        std::memcpy(&word, in, sizeof word);
        in += sizeof word;
        x = (x << kWordBits) | little(word);
      }
      state[lane] = x;
      symbols.value[i] = int32_t(tables.offset[row] + bin);
      if (tables.escape && bin == bins - 1) escaped.push_back(i);
    }
    for (State x : state)
      if (x != kLeast) throw Damaged("the states do not end where they began");
    for (int64_t i : escaped) {
      uint32_t value = 0;
      for (int shift = 0;; shift += 7) {
        if (in == end || shift > 28) throw Damaged("an escaped symbol is cut off or too long");
        uint32_t byte = uint8_t(*in++);
        if (shift == 28 && byte > 15) throw Damaged("an escaped symbol is too large");
        value |= (byte & 127) << shift;
        if (byte < 128) break;
      }
      symbols.value[i] = unzigzag(value);
      int64_t row = symbols.row(i);
      if (uint64_t(int64_t(symbols.value[i]) - tables.offset[row]) < uint64_t(plain_bins(tables, row)))
        throw Damaged("an escaped symbol is one of its table");
    }
    if (in != end) throw Damaged("bytes are left over");
  }
};

template <class F>
auto with_coder(Kind kind, int precision, int lanes, F f) {
  auto check = [&](int low) {
    if (precision < 1 || precision > low || precision > 30)
      throw std::invalid_argument("precision must be from 1 to " + std::to_string(std::min(low, 30)));
    if (lanes < 1 || lanes > 1024) throw std::invalid_argument("lanes must be from 1 to 1024");
  };
  switch (kind) {
    case Kind::kByte:
      check(16);
      return f(Coder<uint32_t, uint8_t, 23>());
    case Kind::kWord:
      check(16);
      return f(Coder<uint32_t, uint16_t, 16>());
    default:
      check(31);
      return f(Coder<uint64_t, uint32_t, 31>());
  }
}

// f(s) for every stream; the first exception of any thread is thrown again here.
template <class F>
void on_threads(int64_t streams, int threads, F f) {
  std::atomic<int64_t> next = 0;
  std::exception_ptr failure;
  std::mutex guard;
  auto work = [&] {
    for (int64_t s; (s = next.fetch_add(1)) < streams;) try {
        f(s);
      } catch (...) {
        std::lock_guard lock(guard);
        if (!failure) failure = std::current_exception();
        next = streams;
      }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min<int64_t>(threads, streams); ++i) others.emplace_back(work);
  work();
  for (std::thread& t : others) t.join();
  if (failure) std::rethrow_exception(failure);
}

Symbols part(const Symbols& all, const std::vector<int64_t>& cu, int64_t s) {
  return {all.value + cu[s], all.index ? all.index + cu[s] : nullptr, all.first + cu[s], cu[s + 1] - cu[s]};
}

}  // namespace

std::string encode(Kind kind, int precision, int lanes, const Tables& tables, const Symbols& symbols) {
  return with_coder(kind, precision, lanes,
                    [&](auto coder) { return coder.encode(precision, lanes, tables, symbols); });
}

void decode(Kind kind, int precision, int lanes, const Tables& tables, const std::string& stream,
            Symbols symbols) {
  with_coder(kind, precision, lanes,
             [&](auto coder) { coder.decode(precision, lanes, tables, stream, symbols); });
}

std::vector<std::string> encode_all(Kind kind, int precision, int lanes, const Tables& tables,
                                    const Symbols& symbols, const std::vector<int64_t>& cu, int threads) {
  std::vector<std::string> streams(cu.size() - 1);
  on_threads(int64_t(streams.size()), threads,
             [&](int64_t s) { streams[s] = encode(kind, precision, lanes, tables, part(symbols, cu, s)); });
  return streams;
}

void decode_all(Kind kind, int precision, int lanes, const Tables& tables,
                const std::vector<std::string>& streams, const Symbols& symbols,
                const std::vector<int64_t>& cu, int threads) {
  on_threads(int64_t(streams.size()), threads,
             [&](int64_t s) { decode(kind, precision, lanes, tables, streams[s], part(symbols, cu, s)); });
}

}  // namespace vlkern::rans
