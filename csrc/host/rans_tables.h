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
  bool escape() const { return escape_; }
  int precision() const { return precision_; }

  // Where a search for a slot may start. hints(r)[b] is the last bin of row r that starts at or before
  // b 2^shift(). Made when first asked for; null for more rows or wider ones than that pays for.
  static constexpr int kBuckets = 256;
  const uint16_t* hints() const;
  int shift() const { return precision_ > 8 ? precision_ - 8 : 0; }

 private:
  std::vector<Row> row_;
  int64_t width_;
  bool escape_;
  int precision_;
  mutable std::once_flag made_;
  mutable std::vector<uint16_t> hints_;
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
  void ranges(int64_t first, int count, Range* out, std::string& escapes) override;

 private:
  const int32_t* symbols_;
  const Tables& tables_;
  Rows rows_;
};

void get(Decoder& decoder, int32_t* symbols, int64_t count, const Tables& tables, Rows rows);

}  // namespace vlkern::rans
