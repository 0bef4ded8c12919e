#include "rans_tables.h"

#include "rans_coder.h"

namespace vlkern::rans {
namespace {

constexpr const char* kRise = "tables must rise strictly along a row";

// Rows may have changed since they were checked: whatever they hold, a range lies in 1 ... M.
Range range_of(const int32_t* cdf, int64_t bin, uint32_t most) {
  const uint32_t start = uint32_t(cdf[bin]), width = uint32_t(cdf[bin + 1]) - start;
  if (width - 1 >= most || start >= most) throw std::invalid_argument(kRise);
  return {start, width};
}

void check(const Format& format, const Tables& tables) {
  if (format.precision != tables.precision())
    throw std::invalid_argument("tables must have the precision of the coder");
}

void check(const Tables& tables, Rows rows, int64_t first, int count) {
  bool inside = true;
  for (int i = 0; i < count; ++i) inside &= uint64_t(rows[first + i]) < uint64_t(tables.rows());
  for (int i = 0; !inside; ++i)
    if (uint64_t(rows[first + i]) >= uint64_t(tables.rows()))
      throw std::invalid_argument("index must name rows from 0 to " + std::to_string(tables.rows() - 1) +
                                  ", got " + std::to_string(rows[first + i]));
}

class Finder {
 public:
  Finder(const Tables& tables, Rows rows)
      : tables_(tables),
        rows_(rows),
        hints_(rows.index ? tables.hints() : nullptr),
        shift_(tables.shift()),
        most_(uint32_t(1) << tables.precision()) {}

  void block(int64_t first, int count) {
    first_ = first;
    check(tables_, rows_, first, count);
  }

  Found find(int i, uint32_t slot) const {
    const int64_t r = rows_[first_ + i];
    const Tables::Row& row = tables_.row(r);
    const int32_t* cdf = row.cdf;
    int32_t bin = 0, end = row.bins;  // the last one that starts at or before the slot lies in [bin, end)
    if (hints_) {
      const uint16_t* hint = hints_ + r * (Tables::kBuckets + 1) + (slot >> shift_);
      bin = hint[0], end = hint[1] + 1;
    }
    while (end - bin > 8) {
      const int32_t middle = (bin + end) / 2;
      (uint32_t(cdf[middle]) <= slot ? bin : end) = middle;
    }
    while (bin + 1 < end && uint32_t(cdf[bin + 1]) <= slot) ++bin;
    const Range range = range_of(cdf, bin, most_);
    if (slot - range.start >= range.width) throw std::invalid_argument(kRise);
    return {range, row.offset + bin, bin == row.symbols};
  }

  bool holds(int i, int32_t symbol) const {
    const Tables::Row& row = tables_.row(rows_[first_ + i]);
    return uint64_t(int64_t(symbol) - row.offset) < uint64_t(row.symbols);
  }

 private:
  const Tables& tables_;
  Rows rows_;
  const uint16_t* hints_;
  int shift_;
  uint32_t most_;
  int64_t first_ = 0;
};

}  // namespace

Tables::Tables(const int32_t* cdf, int64_t rows, int64_t width, const int32_t* size, const int32_t* offset,
               bool escape, int precision)
    : width_(width), escape_(escape), precision_(precision) {
  if (precision < 1 || precision > 30) throw std::invalid_argument("precision must be from 1 to 30");
  row_.reserve(rows);
  for (int64_t r = 0; r < rows; ++r, cdf += width) {
    if (size[r] < 2 || size[r] > width || cdf[0] != 0 || cdf[size[r] - 1] != int32_t(1) << precision)
      throw std::invalid_argument("tables must have rows of at least 2 entries from 0 to 2^precision");
    row_.push_back({cdf, size[r] - 1, offset[r], size[r] - 1 - escape});
  }
}

const uint16_t* Tables::hints() const {
  std::call_once(made_, [&] {
    if (rows() > 4096 || width_ > 65536) return;
    hints_.reserve(rows() * (kBuckets + 1));
    for (const Row& row : row_)
      for (int64_t bucket = 0, bin = 0; bucket <= kBuckets; ++bucket) {
        while (bin + 1 < row.bins && row.cdf[bin + 1] <= bucket << shift()) ++bin;
        hints_.push_back(uint16_t(bin));
      }
  });
  return hints_.empty() ? nullptr : hints_.data();
}

TableSource::TableSource(const Format& format, const int32_t* symbols, const Tables& tables, Rows rows)
    : symbols_(symbols), tables_(tables), rows_(rows) {
  check(format, tables);
}

void TableSource::ranges(int64_t first, int count, Range* out, std::string& escapes) {
  check(tables_, rows_, first, count);
  const uint32_t most = uint32_t(1) << tables_.precision();
  for (int i = 0; i < count; ++i) {
    const Tables::Row& row = tables_.row(rows_[first + i]);
    const int32_t symbol = symbols_[first + i];
    uint64_t bin = uint64_t(int64_t(symbol) - row.offset);
    if (bin >= uint64_t(row.symbols)) {
      if (!tables_.escape())
        throw std::invalid_argument("symbols must be in their tables, which have no escape");
      append_escape(escapes, symbol);
      bin = row.symbols;
    }
    out[i] = range_of(row.cdf, int64_t(bin), most);
  }
}

void get(Decoder& decoder, int32_t* symbols, int64_t count, const Tables& tables, Rows rows) {
  check(decoder.format(), tables);
  Finder finder(tables, rows);
  decoder.get(symbols, count, finder);
}

}  // namespace vlkern::rans
