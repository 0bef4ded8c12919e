// rans.h for Python: one stream bit by bit, or many at once. Arrays are used where they lie.
#include "rans.h"
#include "rans_mixtures.h"
#include "rans_tables.h"
#include "threads.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

namespace py = pybind11;
namespace rans = vlkern::rans;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Ints = Array<int32_t>;
using Index = std::optional<Ints>;  // without one symbol i is coded with row i
using Cuts = std::vector<int64_t>;

rans::Format format_of(const std::string& kind, int precision, int lanes) {
  if (kind == "rans64") return {rans::Kind::k64, precision, lanes};
  if (kind == "rans_byte") return {rans::Kind::kByte, precision, lanes};
  if (kind == "rans_word") return {rans::Kind::kWord, precision, lanes};
  throw std::invalid_argument("kind must be rans64, rans_byte or rans_word");
}

// cdf [rows, width], size [rows], offset [rows], whether there are escapes
struct Tables {
  Ints cdf;
  rans::Tables tables;

  Tables(Ints cdf_, const Ints& size, const Ints& offset, bool escape, int precision)
      : cdf(std::move(cdf_)), tables(checked(cdf, size, offset, escape, precision)) {}
  Tables(const Tables&) = delete;

 private:
  static rans::Tables checked(const Ints& cdf, const Ints& size, const Ints& offset, bool escape,
                              int precision) {
    if (cdf.ndim() != 2 || size.size() != cdf.shape(0) || offset.size() != cdf.shape(0))
      throw std::invalid_argument("tables must have a size and an offset for each row");
    return {cdf.data(), cdf.shape(0), cdf.shape(1), size.data(), offset.data(), escape, precision};
  }
};

// A model is what says how probable symbols are: Ranges of source(format, symbols, start) and get(decoder,
// symbols, count, start) for the symbols from `start` on.
struct Rows {
  const rans::Tables& tables;
  const int32_t* index;

  Rows(const Tables& t, const Index& i, int64_t count) : tables(t.tables), index(i ? i->data() : nullptr) {
    if ((i ? i->size() : tables.rows()) != count)
      throw std::invalid_argument("there must be one index, or one row of the tables, for each symbol");
  }
  rans::Rows from(int64_t start) const { return {index ? index + start : nullptr, start}; }
  rans::TableSource source(const rans::Format& format, const int32_t* symbols, int64_t start) const {
    return {format, symbols, tables, from(start)};
  }
  void get(rans::Decoder& decoder, int32_t* symbols, int64_t count, int64_t start) const {
    rans::get(decoder, symbols, count, tables, from(start));
  }
};

// means, scales, weights [rows, components, channels] of symbols [rows, channels]
struct Mixtures {
  rans::Mixtures mixtures;

  Mixtures(const Ints& means, const Array<uint8_t>& scales, const Array<int16_t>& weights, int64_t count)
      : mixtures{means.data(), scales.data(), weights.data(), 0, 0} {
    if (means.ndim() != 3 || scales.size() != means.size() || weights.size() != means.size() ||
        means.shape(0) * means.shape(2) != count)
      throw std::invalid_argument("there must be a mixture for each symbol");
    mixtures.channels = means.shape(2);
    mixtures.components = int(std::min<int64_t>(means.shape(1), rans::Mixtures::kMostComponents + 1));
  }
  rans::MixtureSource source(const rans::Format& format, const int32_t* symbols, int64_t start) const {
    return {format, symbols, mixtures, start};
  }
  void get(rans::Decoder& decoder, int32_t* symbols, int64_t count, int64_t start) const {
    rans::get(decoder, symbols, count, mixtures, start);
  }
};

template <class Model>
void put(rans::Encoder& encoder, const Ints& symbols, const Model& model) {
  const int32_t* values = symbols.data();
  const int64_t count = symbols.size();
  py::gil_scoped_release release;
  auto source = model.source(encoder.format(), values, 0);
  encoder.put(count, source);
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

  template <class Model>
  Ints get(int64_t count, const Model& model) {
    Ints symbols(count);
    int32_t* values = symbols.mutable_data();
    py::gil_scoped_release release;
    model.get(decoder, values, count, 0);
    return symbols;
  }
};

// Stream s holds the symbols cu[s] ... cu[s + 1] - 1.
void check_cu(const Cuts& cu, int64_t count) {
  if (cu.empty() || cu.front() != 0 || cu.back() != count || !std::is_sorted(cu.begin(), cu.end()))
    throw std::invalid_argument("cu_seqlens must rise from 0 to the number of symbols");
}

template <class Model>
py::list encode(const Ints& symbols, const Cuts& cu, const Model& model, const rans::Format& format,
                int threads) {
  check_cu(cu, symbols.size());
  const int32_t* values = symbols.data();
  std::vector<std::string> streams(cu.size() - 1);
  {
    py::gil_scoped_release release;
    format.check();
    vlkern::on_threads(int64_t(streams.size()), threads, [&](int64_t s) {
      auto source = model.source(format, values + cu[s], cu[s]);
      streams[s] = rans::encode(format, cu[s + 1] - cu[s], source);
    });
  }
  py::list result;
  for (const std::string& stream : streams) result.append(py::bytes(stream));
  return result;
}

template <class Model>
Ints decode(const std::vector<py::bytes>& streams, const Cuts& cu, const Model& model,
            const rans::Format& format, int threads) {
  if (cu.size() != streams.size() + 1)
    throw std::invalid_argument("cu_seqlens must have one entry more than streams");
  Ints symbols(cu.back());
  check_cu(cu, symbols.size());
  int32_t* values = symbols.mutable_data();
  std::vector<std::string_view> views(streams.begin(), streams.end());
  py::gil_scoped_release release;
  vlkern::on_threads(int64_t(views.size()), threads, [&](int64_t s) {
    rans::Decoder decoder(format, views[s].data(), int64_t(views[s].size()));
    model.get(decoder, values + cu[s], cu[s + 1] - cu[s], cu[s]);
    decoder.finish();
  });
  return symbols;
}

}  // namespace

void bind_rans(py::module_& m) {
  using Means = Ints;
  using Scales = Array<uint8_t>;
  using Weights = Array<int16_t>;
  using Streams = std::vector<py::bytes>;
  py::register_exception<rans::Damaged>(m, "Damaged", PyExc_ValueError);
  py::class_<Tables>(m, "RansTables").def(py::init<Ints, const Ints&, const Ints&, bool, int>());
  py::class_<rans::Encoder>(m, "RansEncoder")
      .def(py::init([](const std::string& kind, int precision, int lanes) {
        return rans::Encoder(format_of(kind, precision, lanes));
      }))
      .def("put", [](rans::Encoder& e, const Ints& symbols, const Tables& tables,
                     const Index& index) { put(e, symbols, Rows(tables, index, symbols.size())); })
      .def("put_mixtures",
           [](rans::Encoder& e, const Ints& symbols, const Means& means, const Scales& scales,
              const Weights& weights) { put(e, symbols, Mixtures(means, scales, weights, symbols.size())); })
      .def("finish", finished);
  py::class_<Decoder>(m, "RansDecoder")
      .def(py::init<std::string, std::string, int, int>())
      .def("get", [](Decoder& d, int64_t count, const Tables& tables,
                     const Index& index) { return d.get(count, Rows(tables, index, count)); })
      .def("get_mixtures",
           [](Decoder& d, int64_t count, const Means& means, const Scales& scales, const Weights& weights) {
             return d.get(count, Mixtures(means, scales, weights, count));
           })
      .def("finish", [](const Decoder& d) { d.decoder.finish(); });
  m.def("rans_encode", [](const Ints& symbols, const Cuts& cu, const Tables& tables, const Index& index,
                          const std::string& kind, int precision, int lanes, int threads) {
    return encode(symbols, cu, Rows(tables, index, symbols.size()), format_of(kind, precision, lanes),
                  threads);
  });
  m.def("rans_decode", [](const Streams& streams, const Cuts& cu, const Tables& tables, const Index& index,
                          const std::string& kind, int precision, int lanes, int threads) {
    return decode(streams, cu, Rows(tables, index, cu.empty() ? 0 : cu.back()),
                  format_of(kind, precision, lanes), threads);
  });
  m.def("rans_encode_mixtures",
        [](const Ints& symbols, const Cuts& cu, const Means& means, const Scales& scales,
           const Weights& weights, const std::string& kind, int lanes, int threads) {
          return encode(symbols, cu, Mixtures(means, scales, weights, symbols.size()),
                        format_of(kind, 16, lanes), threads);
        });
  m.def("rans_decode_mixtures",
        [](const Streams& streams, const Cuts& cu, const Means& means, const Scales& scales,
           const Weights& weights, const std::string& kind, int lanes, int threads) {
          return decode(streams, cu, Mixtures(means, scales, weights, cu.empty() ? 0 : cu.back()),
                        format_of(kind, 16, lanes), threads);
        });
}
