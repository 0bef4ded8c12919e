#include "rans_tables.h"

#include "rans_coder.h"

namespace vlkern::rans {
namespace {

constexpr const char* kRise = "tables must rise strictly along a row";

uint32_t most(const Tables& tables) {
  return uint32_t(1) << tables.precision();
}

// Rows may have changed since they were checked: whatever they hold, a range lies in 1 ... M.
Range range_of(const int32_t* cdf, int64_t bin, uint32_t most) {
  const uint32_t start = uint32_t(cdf[bin]), width = uint32_t(cdf[bin + 1]) - start;
  if (width - 1 >= most || start >= most) throw std::invalid_argument(kRise);
  return {start, width};
}

Tables::Bin bin_of(const Tables::Row& row, int64_t bin, uint32_t most) {
  const Range range = range_of(row.cdf, bin, most);
  return {range, inverse_of(range.width)};
}

void check(const Format& format, const Tables& tables) {
  if (format.precision != tables.precision())
    throw std::invalid_argument("tables must have the precision of the coder");
}

[[noreturn, gnu::cold]] void no_row(int64_t row, int64_t rows) {
  throw std::invalid_argument("index must name rows from 0 to " + std::to_string(rows - 1) + ", got " +
                              std::to_string(row));
}

// The row of symbol i.
int64_t row_of(const Tables& tables, Rows rows, int64_t i) {
  const int64_t row = rows[i];
  if (uint64_t(row) >= uint64_t(tables.rows())) [[unlikely]]
    no_row(row, tables.rows());
  return row;
}

// With tables that are ready.
class Finder {
 public:
  Finder(const Tables& tables, const Tables::Ready& ready, Rows rows)
      : tables_(tables), ready_(ready), rows_(rows), shift_(tables.shift()) {}

  void block(int64_t first, int) { first_ = first; }

  Found find(int i, uint32_t slot) const {
    const Tables::Ready::Row& row = ready_.rows[row_of(tables_, rows_, first_ + i)];
    const uint16_t* const hint = row.hints + (slot >> shift_);
    int32_t bin = hint[0];  // the last one that starts at or before the slot lies in [bin, end)
    for (int32_t end = hint[1] + 1; bin + 1 < end;) {
      const int32_t middle = end - bin > 8 ? (bin + end) / 2 : bin + 1;
      if (row.bins[middle].range.start <= slot)
        bin = middle;
      else
        end = middle;
    }
    return {row.bins[bin].range, row.offset + bin, bin == row.symbols};
  }

  bool holds(int i, int32_t symbol) const {
    const Tables::Ready::Row& row = ready_.rows[rows_[first_ + i]];
    return uint64_t(int64_t(symbol) - row.offset) < uint64_t(row.symbols);
  }

 private:
  const Tables& tables_;
  const Tables::Ready& ready_;
  Rows rows_;
  int shift_;
  int64_t first_ = 0;
};

// With tables as they lie.
class Searcher {
 public:
  Searcher(const Tables& tables, Rows rows) : tables_(tables), rows_(rows), most_(most(tables)) {}

  void block(int64_t first, int) { first_ = first; }

  Found find(int i, uint32_t slot) const {
    const Tables::Row& row = tables_.row(row_of(tables_, rows_, first_ + i));
    int32_t bin = 0;
    for (int32_t end = row.bins; bin + 1 < end;) {
      const int32_t middle = (bin + end) / 2;
      (uint32_t(row.cdf[middle]) <= slot ? bin : end) = middle;
    }
    const Range range = range_of(row.cdf, bin, most_);
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
  uint32_t most_;
  int64_t first_ = 0;
};

}  // namespace

Tables::Tables(const int32_t* cdf, int64_t rows, int64_t width, const int32_t* size, const int32_t* offset,
               bool escape, int precision)
    : escape_(escape), precision_(precision) {
  if (precision < 1 || precision > 30) throw std::invalid_argument("precision must be from 1 to 30");
  row_.reserve(rows);
  for (int64_t r = 0; r < rows; ++r, cdf += width) {
    if (size[r] < 2 || size[r] > width || cdf[0] != 0 || cdf[size[r] - 1] != int32_t(1) << precision)
      throw std::invalid_argument("tables must have rows of at least 2 entries from 0 to 2^precision");
    row_.push_back({cdf, size[r] - 1, offset[r], size[r] - 1 - escape});
  }
}

const Tables::Ready* Tables::ready() const {
  std::call_once(made_, [&] {
    constexpr int64_t kMostRows = 1 << 12, kMostBins = 1 << 18;
    int64_t bins = 0, widest = 0;
    for (const Row& row : row_) bins += row.bins, widest = std::max<int64_t>(widest, row.bins);
    if (rows() > kMostRows || bins > kMostBins || widest > 65536) return;
    Ready made;
    made.bins.reserve(bins);
    made.hints.reserve(rows() * (Ready::kBuckets + 1));
    for (const Row& row : row_) {
      made.rows.push_back({made.bins.data() + made.bins.size(), made.hints.data() + made.hints.size(),
                           row.offset, row.symbols});
      if (row.cdf[0] != 0 || row.cdf[row.bins] != int32_t(most(*this))) throw std::invalid_argument(kRise);
      for (int64_t bin = 0; bin < row.bins; ++bin) made.bins.push_back(bin_of(row, bin, most(*this)));
      for (int64_t bucket = 0, bin = 0; bucket <= Ready::kBuckets; ++bucket) {
        while (bin + 1 < row.bins && row.cdf[bin + 1] <= bucket << shift()) ++bin;
        made.hints.push_back(uint16_t(bin));
      }
    }
    ready_ = std::move(made);
  });
  return ready_.rows.empty() ? nullptr : &ready_;
}

TableSource::TableSource(const Format& format, const int32_t* symbols, const Tables& tables, Rows rows)
    : symbols_(symbols), tables_(tables), rows_(rows), ready_(rows.index ? tables.ready() : nullptr) {
  check(format, tables);
}

void TableSource::ranges(int64_t first, int count, Range* out, uint64_t* inverse, std::string& escapes) {
  auto each = [&](const auto& rows, auto find) {
    for (int i = 0; i < count; ++i) {
      const auto& row = rows[row_of(tables_, rows_, first + i)];
      const int32_t symbol = symbols_[first + i];
      uint64_t bin = uint64_t(int64_t(symbol) - row.offset);
      if (bin >= uint64_t(row.symbols)) [[unlikely]] {
        if (!tables_.escape())
          throw std::invalid_argument("symbols must be in their tables, which have no escape");
        append_escape(escapes, symbol);
        bin = row.symbols;
      }
      const Tables::Bin found = find(row, int64_t(bin));
      out[i] = found.range, inverse[i] = found.inverse;
    }
  };
  if (ready_)
    each(ready_->rows, [](const Tables::Ready::Row& row, int64_t bin) { return row.bins[bin]; });
  else
    each(tables_.all(), [&](const Tables::Row& row, int64_t bin) { return bin_of(row, bin, most(tables_)); });
}

void get(Decoder& decoder, int32_t* symbols, int64_t count, const Tables& tables, Rows rows) {
  check(decoder.format(), tables);
  const Tables::Ready* const ready = rows.index ? tables.ready() : nullptr;
  if (ready) {
    Finder finder(tables, *ready, rows);
    decoder.get(symbols, count, finder);
  } else {
    Searcher searcher(tables, rows);
    decoder.get(symbols, count, searcher);
  }
}

}  // namespace vlkern::rans
