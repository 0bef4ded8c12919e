// Symbols with rows of cumulative frequencies.
#pragma once

#include "rans.h"

#include <mutex>

namespace vlkern::rans {

// Row r of `cdf` [rows, width] has `size[r]` entries, strictly rising from 0 to M: size[r] - 1 bins, of which
// the last one is the escape, if there is one. Bin j stands for the symbol offset[r] + j. The rows stay where
// they are and must outlive this; throws std::invalid_argument if they do not begin and end so.
class Tables {
 public:
  Tables(const int32_t* cdf, int64_t rows, int64_t width, const int32_t* size, const int32_t* offset,
         bool escape, int precision);

  struct Row {
    const int32_t* cdf;
    int32_t bins, offset;
    int32_t symbols;  // bins but the escape
  };
  int64_t rows() const { return int64_t(row_.size()); }
  const Row& row(int64_t r) const { return row_[r]; }
  const std::vector<Row>& all() const { return row_; }
  bool escape() const { return escape_; }
  int precision() const { return precision_; }

  // What is looked up for every symbol, together: made when first asked for, of the rows as they are then.
  // Null for more bins than that pays for.
  struct Bin {
    Range range;
    uint64_t inverse;
  };
  struct Ready {
    // bins is that of the first symbol of a row; hints[b] is the last bin that starts at or before b
    // 2^shift().
    struct Row {
      const Bin* bins;
      const uint16_t* hints;
      int32_t offset, symbols;
    };
    static constexpr int kBuckets = 256;
    std::vector<Row> rows;
    std::vector<Bin> bins;
    std::vector<uint16_t> hints;
  };
  const Ready* ready() const;
  int shift() const { return precision_ > 8 ? precision_ - 8 : 0; }

 private:
  std::vector<Row> row_;
  bool escape_;
  int precision_;
  mutable std::once_flag made_;
  mutable Ready ready_;
};

// Symbol i is coded with row index[i], or with row first + i where there is no index.
struct Rows {
  const int32_t* index;
  int64_t first;
  int64_t operator[](int64_t i) const { return index ? index[i] : first + i; }
};

class TableSource final : public Source {
 public:
  TableSource(const Format& format, const int32_t* symbols, const Tables& tables, Rows rows);
  void ranges(int64_t first, int count, Range* out, uint64_t* inverse, std::string& escapes) override;

 private:
  const int32_t* symbols_;
  const Tables& tables_;
  Rows rows_;
  const Tables::Ready* ready_;
};

void get(Decoder& decoder, int32_t* symbols, int64_t count, const Tables& tables, Rows rows);

}  // namespace vlkern::rans
