// vlkern._host: tensor-free C++ bound with pybind11.
#include "packing.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

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

}  // namespace

void bind_rans(py::module_& m);              // rans_bindings.cpp
void bind_quantize_mixture(py::module_& m);  // quantize_mixture_bindings.cpp

PYBIND11_MODULE(_host, m) {
  m.doc() = "Tensor-free C++ helpers of vlkern";
  m.def("first_fit_decreasing", packed<vlkern::first_fit_decreasing>, py::arg("lengths").noconvert(),
        py::arg("capacity"));
  m.def("first_fit", packed<vlkern::first_fit>, py::arg("lengths").noconvert(), py::arg("capacity"));
  m.def("in_order", packed<vlkern::in_order>, py::arg("lengths").noconvert(), py::arg("capacity"));
  bind_rans(m);
  bind_quantize_mixture(m);
}
