// quantize_mixture.h for Python. The results are written where the caller has room for them.
#include "quantize_mixture.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// params [points, 3, components, channels], the others [points, components, channels]
bool quantize(const Array<float>& params, Array<int32_t> means, Array<uint8_t> scales, Array<int16_t> weights,
              int threads) {
  if (params.ndim() != 4 || params.shape(1) != 3 || means.size() * 3 != params.size() ||
      scales.size() != means.size() || weights.size() != means.size())
    throw std::invalid_argument(
        "params must be [points, 3, components, channels], the results a third of that");
  const auto* in = params.data();
  auto* mean = means.mutable_data();
  auto* scale = scales.mutable_data();
  auto* weight = weights.mutable_data();
  const int64_t points = params.shape(0), components = params.shape(2), channels = params.shape(3);
  py::gil_scoped_release release;
  return vlkern::quantize_mixture(in, points, components, channels, mean, scale, weight, threads);
}

}  // namespace

void bind_quantize_mixture(py::module_& m) {
  m.def("quantize_mixture", quantize, py::arg("params").noconvert(), py::arg("means").noconvert(),
        py::arg("scales").noconvert(), py::arg("weights").noconvert(), py::arg("threads"));
}
