#include "sgemm.h"

#include "simd.h"

// Weak: null where this build of PyTorch does not export its BLAS.
extern "C" {
__attribute__((weak)) void sgemm_(const char* transa, const char* transb, const int* m, const int* n,
                                  const int* k, const float* alpha, const float* a, const int* lda,
                                  const float* b, const int* ldb, const float* beta, float* c,
                                  const int* ldc);
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
}

namespace vlkern {
namespace {

// Row by row, i-k-j order: the inner loop is a contiguous multiply-add. For machines without a BLAS to
// borrow.
VLKERN_SIMD void loops(int64_t m, int64_t n, int64_t k, float alpha, Matrix a, Matrix b, float beta, float* c,
                       int64_t c_stride) {
  for (int64_t i = 0; i < m; ++i) {
    float* row = c + i * c_stride;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) row[j] = beta == 0 ? 0.0f : beta * row[j];
    for (int64_t p = 0; p < k; ++p) {
      float v = alpha * (a.transposed ? a.data[p * a.stride + i] : a.data[i * a.stride + p]);
      if (b.transposed) {
        for (int64_t j = 0; j < n; ++j) row[j] += v * b.data[j * b.stride + p];
      } else {
        const float* source = b.data + p * b.stride;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) row[j] += v * source[j];
      }
    }
  }
}

}  // namespace

void sgemm(int64_t m, int64_t n, int64_t k, float alpha, Matrix a, Matrix b, float beta, float* c,
           int64_t c_stride) {
  if (m == 0 || n == 0) return;
#ifndef VLKERN_PORTABLE
  if (sgemm_) {
    int before = MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0;
    // BLAS is column-major: it computes C^T = B^T A^T on the same memory.
    int mm = int(n), nn = int(m), kk = int(k), lda = int(b.stride), ldb = int(a.stride), ldc = int(c_stride);
    sgemm_(b.transposed ? "T" : "N", a.transposed ? "T" : "N", &mm, &nn, &kk, &alpha, b.data, &lda, a.data,
           &ldb, &beta, c, &ldc);
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before);
    return;
  }
#endif
  loops(m, n, k, alpha, a, b, beta, c, c_stride);
}

}  // namespace vlkern
