// fp32 matrix product on the calling thread: the BLAS inside libtorch_cpu (MKL on x86), else plain loops.
//
// Kernels call it from their own parallel loops with shapes that do not depend on the thread count, so
// results do not either; a multithreaded BLAS call gives no such promise.
#pragma once

#include <cstdint>

namespace vlkern {

struct Matrix {
  const float* data;
  int64_t stride;           // elements between rows
  bool transposed = false;  // use its transpose
};

// C [m, n] (row stride `c_stride`) = alpha * A [m, k] B [k, n] + beta * C. Row-major; beta 0 does not read C.
void sgemm(int64_t m, int64_t n, int64_t k, float alpha, Matrix a, Matrix b, float beta, float* c,
           int64_t c_stride);

}  // namespace vlkern
