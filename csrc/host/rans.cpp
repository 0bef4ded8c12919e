#include "rans.h"

#include "rans_coder.h"

namespace vlkern::rans {
namespace {

// Ranges that were found before.
class Known : public Source {
 public:
  explicit Known(const std::vector<Range>& all) : all_(all) {}
  void ranges(int64_t first, int count, Range* out, uint64_t* inverse, std::string&) override {
    std::copy_n(all_.begin() + first, count, out);
    for (int i = 0; i < count; ++i) inverse[i] = inverse_of(out[i].width);
  }

 private:
  const std::vector<Range>& all_;
};

}  // namespace

void Format::check() const {
  int most = kind == Kind::k64 ? 30 : 16;
  if (precision < 1 || precision > most)
    throw std::invalid_argument("precision must be from 1 to " + std::to_string(most));
  if (lanes < 1 || lanes > 1024) throw std::invalid_argument("lanes must be from 1 to 1024");
}

// 0, -1, 1, -2, ... are 0, 1, 2, 3, ...; seven bits a byte, the lowest first, and a bit that says whether
// more follow.
void append_escape(std::string& out, int32_t symbol) {
  uint32_t rest = (uint32_t(symbol) << 1) ^ uint32_t(symbol >> 31);
  for (; rest >= 128; rest >>= 7) out.push_back(char(rest | 128));
  out.push_back(char(rest));
}

// x = q width + rest, for x < 2^63: q is found with inverse_of(width) and is seldom too small.
// Multiplications take half as long as a division.
struct Divided {
  uint64_t q, rest;
};
inline Divided divide(uint64_t x, uint64_t width, uint64_t inverse) {
  uint64_t q = uint64_t(static_cast<unsigned __int128>(x) * inverse >> 64), rest = x - q * width;
  if (rest >= width) [[unlikely]] {
    q += rest / width;
    rest %= width;
  }
  return {q, rest};
}

std::string encode(Format format, int64_t count, Source& source) {
  return with_coder(format.kind, [&]<class C>(C) {
    using State = typename C::State;
    using Word = typename C::Word;
    const int lanes = format.lanes, precision = format.precision;
    std::vector<State> states(lanes, C::kLeast);
    std::vector<Word> words;             // in reverse
    constexpr int kChunk = 16 * kBlock;  // memory is read forwards within it
    std::vector<Range> ranges(kChunk);
    std::vector<uint64_t> inverses(kChunk);
    std::string escapes, reversed;
    size_t used = 0;
    int lane = int(count % lanes);
    for (int64_t end = count; end > 0;) {
      const int n = int((end - 1) % kChunk + 1);
      end -= n;
      escapes.clear();
      for (int i = 0; i < n; i += kBlock)
        source.ranges(end + i, std::min(kBlock, n - i), &ranges[i], &inverses[i], escapes);
      reversed.append(escapes.rbegin(), escapes.rend());
      if (words.size() < used + C::kMostWords * n) words.resize(2 * words.size() + C::kMostWords * kChunk);
      Word* out = words.data() + used;
      auto put = [&](State& x, int i) {
        const Range r = ranges[i];
        // Words go out while x >= (L b / M) f, which may need one bit more than a state has.
        constexpr int kSpare = C::kLow + C::kWordBits == 8 * sizeof(State);
        const State most = (State(1) << (C::kLow + C::kWordBits - kSpare - precision)) * r.width;
        while ((x >> kSpare) >= most) {
          *out++ = Word(x);
          x >>= C::kWordBits;
        }
        if constexpr (sizeof(State) == 8) {
          const Divided d = divide(x, r.width, inverses[i]);
          x = (d.q << precision) + d.rest + r.start;
        } else {
          x = (x / r.width << precision) + x % r.width + r.start;
        }
      };
      int i = n;
      if (lanes == 2) {  // in registers
        State a = states[!lane], b = states[lane];
        for (; i >= 2; i -= 2) put(a, i - 1), put(b, i - 2);
        states[!lane] = a, states[lane] = b;
      }
      while (i-- > 0) {
        lane = lane ? lane - 1 : lanes - 1;
        put(states[lane], i);
      }
      used = out - words.data();
    }
    std::string stream;
    stream.reserve(lanes * sizeof(State) + used * sizeof(Word) + reversed.size());
    for (State x : states) append(stream, x);
    for (size_t i = used; i-- > 0;) append(stream, words[i]);
    return stream += reversed;
  });
}

void Encoder::put(int64_t count, Source& source) {
  const size_t ranges = ranges_.size(), escapes = escapes_.size();
  Range block[kBlock];
  uint64_t unused[kBlock];
  try {
    for (int64_t first = 0; first < count; first += kBlock) {
      const int n = int(std::min<int64_t>(kBlock, count - first));
      source.ranges(first, n, block, unused, escapes_);
      ranges_.insert(ranges_.end(), block, block + n);
    }
  } catch (...) {  // nothing of what was refused stays
    ranges_.resize(ranges);
    escapes_.resize(escapes);
    throw;
  }
}

std::string Encoder::finish() const {
  Known known(ranges_);
  std::string stream = encode(format_, int64_t(ranges_.size()), known);
  return stream.append(escapes_.rbegin(), escapes_.rend());
}

Decoder::Decoder(Format format, const char* stream, int64_t bytes)
    : format_(format), in_(stream), end_(stream + bytes) {
  format.check();
  with_coder(format.kind, [&]<class C>(C) {
    using State = typename C::State;
    if (bytes < int64_t(format.lanes * sizeof(State))) throw Damaged("the stream is shorter than its states");
    for (int lane = 0; lane < format.lanes; ++lane, in_ += sizeof(State)) {
      State x = load<State>(in_);
      if (!C::normal(x)) throw Damaged("a state is out of range");
      state_.push_back(x);
    }
  });
}

int32_t Decoder::escaped() {
  int32_t symbol = 0;
  const Escape read = read_escape(in_, end_, symbol);
  if (read == Escape::kCut) throw Damaged("the stream ends too early");
  if (read == Escape::kLarge) throw Damaged("an escaped symbol is too large");
  return symbol;
}

void Decoder::finish() const {
  uint64_t least = with_coder(format_.kind, []<class C>(C) { return uint64_t(C::kLeast); });
  for (uint64_t x : state_)
    if (x != least) throw Damaged("the states do not end where they began");
  if (in_ != end_) throw Damaged("bytes are left over");
}

}  // namespace vlkern::rans
