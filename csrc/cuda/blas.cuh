// Matrix products of cuBLAS with float32 results for every input dtype (PyTorch's mm would round them to
// bfloat16).
//
// The handle is PyTorch's own, so its stream, workspace (hence determinism) and TF32 setting hold here as
// well. The function is looked up in the process, where PyTorch has loaded it: the machine that builds needs
// no cuBLAS.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

#include "launch.cuh"

namespace vlkern::cuda {

template <class T>
struct Matrix {
  const T* data;
  int64_t stride;           // elements between rows
  bool transposed = false;  // use its transpose
};

class Blas {
 public:
  // The current device and stream decide which handle it is.
  Blas() {
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle_));
    static const auto found = reinterpret_cast<Gemm>(dlsym(RTLD_DEFAULT, "cublasGemmEx"));
    VLKERN_CHECK(found, "cublasGemmEx is not in this process: PyTorch was built without a shared cuBLAS");
    gemm_ = found;
  }

  // C [m, n] (row stride c_stride) = A [m, k] B [k, n] + beta C. Row-major; beta 0 does not read C.
  template <class T>
  void matmul(int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, float beta, float* c,
              int64_t c_stride) const {
    // cuBLAS is column-major and sees the transpose of every row-major matrix: C^T = B^T A^T.
    float alpha = 1;
    int status = gemm_(handle_, b.transposed, a.transposed, int(n), int(m), int(k), &alpha, b.data, type<T>(),
                       int(b.stride), a.data, type<T>(), int(a.stride), &beta, c, CUDA_R_32F, int(c_stride),
                       kCompute32F, kDefaultAlgorithm);
    VLKERN_CHECK(status == 0, "cublasGemmEx failed with status ", status);
  }

 private:
  // Of cublas_api.h, which the toolkit's compiler packages do not always hold. CUBLAS_OP_N and _T are 0
  // and 1.
  using Gemm = int (*)(void* handle, int transa, int transb, int m, int n, int k, const void* alpha,
                       const void* a, cudaDataType a_type, int lda, const void* b, cudaDataType b_type,
                       int ldb, const void* beta, void* c, cudaDataType c_type, int ldc, int compute,
                       int algorithm);
  static constexpr int kCompute32F = 68, kDefaultAlgorithm = -1;

  template <class T>
  static cudaDataType type() {
    if constexpr (std::is_same_v<T, float>) return CUDA_R_32F;
    if constexpr (std::is_same_v<T, torch::headeronly::Half>) return CUDA_R_16F;
    if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) return CUDA_R_16BF;
  }

  void* handle_ = nullptr;
  Gemm gemm_ = nullptr;
};

}  // namespace vlkern::cuda
