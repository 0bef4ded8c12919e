// vlkern._host: tensor-free C++ bound with pybind11.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_host, m) { m.doc() = "Tensor-free C++ helpers of vlkern"; }
