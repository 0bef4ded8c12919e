// rans.h for Python: one stream bit by bit, or many at once. Arrays are used where they lie.
#include "rans.h"
#include "threads.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

namespace py = pybind11;
namespace rans = vlkern::rans;

namespace {

using Ints = py::array_t<int32_t, py::array::c_style>;
using Index = std::optional<Ints>;  // without one symbol i is coded with row i

rans::Format format_of(const std::string& kind, int precision, int lanes) {
  if (kind == "rans64") return {rans::Kind::k64, precision, lanes};
  if (kind == "rans_byte") return {rans::Kind::kByte, precision, lanes};
  if (kind == "rans_word") return {rans::Kind::kWord, precision, lanes};
  throw std::invalid_argument("kind must be rans64, rans_byte or rans_word");
}

// cdf [rows, width], size [rows], offset [rows], whether there are escapes
struct Tables {
  Ints cdf, size, offset;
  bool escape;

  Tables(Ints cdf_, Ints size_, Ints offset_, bool escape_)
      : cdf(std::move(cdf_)), size(std::move(size_)), offset(std::move(offset_)), escape(escape_) {
    if (cdf.ndim() != 2 || size.size() != cdf.shape(0) || offset.size() != cdf.shape(0))
      throw std::invalid_argument("tables must have a size and an offset for each row");
  }

  rans::Tables view() const {
    return {cdf.data(), cdf.shape(0), cdf.shape(1), size.data(), offset.data(), escape};
  }
};

const int32_t* data_of(const Index& index, const Tables& tables, int64_t count) {
  if ((index ? index->size() : tables.cdf.shape(0)) != count)
    throw std::invalid_argument("there must be one index, or one row of the tables, for each symbol");
  return index ? index->data() : nullptr;
}

rans::Rows rows_from(const int32_t* index, int64_t first) {
  return {index ? index + first : nullptr, first};
}

void put(rans::Encoder& encoder, const Ints& symbols, const Tables& tables, const Index& index) {
  const int32_t *values = symbols.data(), *rows = data_of(index, tables, symbols.size());
  int64_t count = symbols.size();
  rans::Tables view = tables.view();
  py::gil_scoped_release release;
  encoder.put(values, count, view, rows_from(rows, 0));
}

py::bytes finished(const rans::Encoder& encoder) {
  std::string stream;
  {
    py::gil_scoped_release release;
    stream = encoder.finish();
  }
  return stream;
}

struct Decoder {
  std::string stream;
  rans::Decoder decoder;

  Decoder(std::string bytes, const std::string& kind, int precision, int lanes)
      : stream(std::move(bytes)),
        decoder(format_of(kind, precision, lanes), stream.data(), int64_t(stream.size())) {}
  Decoder(const Decoder&) = delete;

  Ints get(int64_t count, const Tables& tables, const Index& index) {
    const int32_t* rows = data_of(index, tables, count);
    Ints symbols(count);
    int32_t* values = symbols.mutable_data();
    rans::Tables view = tables.view();
    py::gil_scoped_release release;
    decoder.get(values, count, view, rows_from(rows, 0));
    return symbols;
  }
};

// Stream s holds the symbols cu[s] ... cu[s + 1] - 1.
void check_cu(const std::vector<int64_t>& cu, int64_t count) {
  if (cu.empty() || cu.front() != 0 || cu.back() != count || !std::is_sorted(cu.begin(), cu.end()))
    throw std::invalid_argument("cu_seqlens must rise from 0 to the number of symbols");
}

py::list encode(const Ints& symbols, const std::vector<int64_t>& cu, const Tables& tables, const Index& index,
                const std::string& kind, int precision, int lanes, int threads) {
  check_cu(cu, symbols.size());
  const int32_t *values = symbols.data(), *rows = data_of(index, tables, symbols.size());
  rans::Tables view = tables.view();
  std::vector<std::string> streams(cu.size() - 1);
  {
    py::gil_scoped_release release;
    rans::Format format = format_of(kind, precision, lanes);
    format.check();
    vlkern::on_threads(int64_t(streams.size()), threads, [&](int64_t s) {
      rans::Encoder encoder(format);
      encoder.put(values + cu[s], cu[s + 1] - cu[s], view, rows_from(rows, cu[s]));
      streams[s] = encoder.finish();
    });
  }
  py::list result;
  for (const std::string& stream : streams) result.append(py::bytes(stream));
  return result;
}

Ints decode(const std::vector<py::bytes>& streams, const std::vector<int64_t>& cu, const Tables& tables,
            const Index& index, const std::string& kind, int precision, int lanes, int threads) {
  if (cu.size() != streams.size() + 1)
    throw std::invalid_argument("cu_seqlens must have one entry more than streams");
  Ints symbols(cu.back());
  check_cu(cu, symbols.size());
  int32_t* values = symbols.mutable_data();
  const int32_t* rows = data_of(index, tables, symbols.size());
  rans::Tables view = tables.view();
  std::vector<std::string_view> views(streams.begin(), streams.end());
  py::gil_scoped_release release;
  rans::Format format = format_of(kind, precision, lanes);
  vlkern::on_threads(int64_t(views.size()), threads, [&](int64_t s) {
    rans::Decoder decoder(format, views[s].data(), int64_t(views[s].size()));
    decoder.get(values + cu[s], cu[s + 1] - cu[s], view, rows_from(rows, cu[s]));
    decoder.finish();
  });
  return symbols;
}

}  // namespace

void bind_rans(py::module_& m) {
  py::register_exception<rans::Damaged>(m, "Damaged", PyExc_ValueError);
  py::class_<Tables>(m, "RansTables").def(py::init<Ints, Ints, Ints, bool>());
  py::class_<rans::Encoder>(m, "RansEncoder")
      .def(py::init([](const std::string& kind, int precision, int lanes) {
        return rans::Encoder(format_of(kind, precision, lanes));
      }))
      .def("put", put)
      .def("finish", finished);
  py::class_<Decoder>(m, "RansDecoder")
      .def(py::init<std::string, std::string, int, int>())
      .def("get", &Decoder::get)
      .def("finish", [](const Decoder& d) { d.decoder.finish(); });
  m.def("rans_encode", encode);
  m.def("rans_decode", decode);
}
