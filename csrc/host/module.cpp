// vlkern._host: tensor-free C++ bound with pybind11.
#include "packing.h"
#include "rans.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

namespace py = pybind11;
using Integers = py::array_t<int64_t, py::array::c_style>;

namespace {

using Pack = vlkern::Bins (*)(const int64_t* lengths, int64_t n, int64_t capacity);

// lengths [n] -> (bin [n], offset [n], number of bins)
template <Pack pack>
py::tuple packed(const Integers& lengths, int64_t capacity) {
  vlkern::Bins bins;
  {
    const int64_t *p = lengths.data(), n = lengths.size();
    py::gil_scoped_release release;
    bins = pack(p, n, capacity);
  }
  auto array = [](const std::vector<int64_t>& v) { return Integers(py::ssize_t(v.size()), v.data()); };
  return py::make_tuple(array(bins.bin), array(bins.offset), bins.count);
}

using Ints = py::array_t<int32_t, py::array::c_style>;
namespace rans = vlkern::rans;

rans::Kind kind_of(const std::string& name) {
  if (name == "rans64") return rans::Kind::k64;
  if (name == "rans_byte") return rans::Kind::kByte;
  if (name == "rans_word") return rans::Kind::kWord;
  throw std::invalid_argument("kind must be rans64, rans_byte or rans_word");
}

// cdf [rows, width], size [rows], offset [rows]
rans::Tables tables_of(const Ints& cdf, const Ints& size, const Ints& offset, bool escape) {
  if (cdf.ndim() != 2 || size.size() != cdf.shape(0) || offset.size() != cdf.shape(0))
    throw std::invalid_argument("tables must have a size and an offset for each row");
  return {cdf.data(), cdf.shape(0), cdf.shape(1), size.data(), offset.data(), escape};
}

// Without an index symbol i is coded with row i.
rans::Symbols symbols_of(int32_t* value, int64_t count, const std::optional<Ints>& index,
                         const rans::Tables& t) {
  if ((index ? index->size() : t.rows) != count)
    throw std::invalid_argument("there must be one index, or one row of the tables, for each symbol");
  return {value, index ? index->data() : nullptr, 0, count};
}

void check_cu(const std::vector<int64_t>& cu, int64_t count) {
  if (cu.empty() || cu.front() != 0 || cu.back() != count || !std::is_sorted(cu.begin(), cu.end()))
    throw std::invalid_argument("cu_seqlens must rise from 0 to the number of symbols");
}

py::list rans_encode(const Ints& symbols, const std::vector<int64_t>& cu, const Ints& cdf, const Ints& size,
                     const Ints& offset, bool escape, const std::optional<Ints>& index,
                     const std::string& kind, int precision, int lanes, int threads) {
  rans::Tables tables = tables_of(cdf, size, offset, escape);
  // the encoder only reads
  rans::Symbols all = symbols_of(const_cast<int32_t*>(symbols.data()), symbols.size(), index, tables);
  check_cu(cu, symbols.size());
  std::vector<std::string> streams;
  {
    py::gil_scoped_release release;
    streams = rans::encode_all(kind_of(kind), precision, lanes, tables, all, cu, threads);
  }
  py::list result;
  for (const std::string& stream : streams) result.append(py::bytes(stream));
  return result;
}

Ints rans_decode(const std::vector<std::string>& streams, const std::vector<int64_t>& cu, const Ints& cdf,
                 const Ints& size, const Ints& offset, bool escape, const std::optional<Ints>& index,
                 const std::string& kind, int precision, int lanes, int threads) {
  rans::Tables tables = tables_of(cdf, size, offset, escape);
  if (cu.size() != streams.size() + 1)
    throw std::invalid_argument("cu_seqlens must have one entry more than streams");
  Ints symbols(cu.back());
  rans::Symbols all = symbols_of(symbols.mutable_data(), symbols.size(), index, tables);
  check_cu(cu, symbols.size());
  py::gil_scoped_release release;
  rans::decode_all(kind_of(kind), precision, lanes, tables, streams, all, cu, threads);
  return symbols;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Tensor-free C++ helpers of vlkern";
  m.def("first_fit_decreasing", packed<vlkern::first_fit_decreasing>, py::arg("lengths").noconvert(),
        py::arg("capacity"));
  m.def("first_fit", packed<vlkern::first_fit>, py::arg("lengths").noconvert(), py::arg("capacity"));
  m.def("in_order", packed<vlkern::in_order>, py::arg("lengths").noconvert(), py::arg("capacity"));
  py::register_exception<rans::Damaged>(m, "Damaged", PyExc_ValueError);
  m.def("rans_encode", rans_encode);
  m.def("rans_decode", rans_decode);
}
