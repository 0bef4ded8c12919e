// The AMX tiles and the AVX-512 instructions of csrc/amx.h in plain C++, for machines without them. Stands in
// for the compiler's header of this name. Tile registers that were configured but not loaded hold NaN.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// What a process asks before it uses tiles: the chip has everything, the kernel agrees.
#define __builtin_cpu_supports(name) true
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(a) = *(b) = *(c) = 0, *(d) = ~0u)
#define syscall(number, request, feature) (void(request), void(feature), 0)
#define VLKERN_AMX_TARGET

using __m256i = int64_t __attribute__((vector_size(32)));
using __m256bh = int16_t __attribute__((vector_size(32)));
using __m512i = int64_t __attribute__((vector_size(64)));
using __m512bh = int16_t __attribute__((vector_size(64)));
using __m512 = float __attribute__((vector_size(64)));
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;

namespace emulator {

template <class T, class Vector>
std::array<T, sizeof(Vector) / sizeof(T)> elements(Vector v) {
  return std::bit_cast<std::array<T, sizeof(Vector) / sizeof(T)>>(v);
}

// The vector of f(0), f(1), ...
template <class Vector, class T, class F>
Vector vector(F f) {
  std::array<T, sizeof(Vector) / sizeof(T)> r;
  for (size_t i = 0; i < r.size(); ++i) r[i] = f(i);
  return std::bit_cast<Vector>(r);
}

template <class Vector>
Vector read(const void* p) {
  Vector r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}

// Touches no element that the mask leaves out.
template <class Vector>
Vector masked_read(uint32_t mask, const void* p) {
  return vector<Vector, uint16_t>([&](size_t i) {
    uint16_t x = 0;
    if (mask >> i & 1) std::memcpy(&x, static_cast<const char*>(p) + 2 * i, 2);
    return x;
  });
}

inline uint16_t round(float v) {
  uint32_t bits = std::bit_cast<uint32_t>(v);
  return v != v ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float widen(uint16_t v) {
  return std::bit_cast<float>(uint32_t(v) << 16);
}

struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64];
};
inline thread_local Tile tiles[8];
inline std::atomic<int64_t> products = 0;

inline Tile& tile(int t) {
  if (tiles[t].rows == 0) {
    std::fprintf(stderr, "tile register %d is not configured in this thread\n", t);
    std::abort();
  }
  return tiles[t];
}

}  // namespace emulator

inline void _tile_loadconfig(const void* config) {
  const auto* c = static_cast<const uint8_t*>(config);
  for (int t = 0; t < 8; ++t) {
    emulator::tiles[t].rows = c[48 + t], emulator::tiles[t].bytes = c[16 + 2 * t];
    std::memset(emulator::tiles[t].data, 0xff, 1024);
  }
}
inline void _tile_release() {
  for (emulator::Tile& t : emulator::tiles) t.rows = 0;
}
inline void _tile_zero(int t) {
  std::memset(emulator::tile(t).data, 0, 1024);
}
inline void _tile_loadd(int to, const void* base, int64_t stride) {
  emulator::Tile& t = emulator::tile(to);
  for (int i = 0; i < t.rows; ++i)
    std::memcpy(t.data[i], static_cast<const char*>(base) + i * stride, t.bytes);
}
inline void _tile_stored(int from, void* base, int64_t stride) {
  const emulator::Tile& t = emulator::tile(from);
  for (int i = 0; i < t.rows; ++i) std::memcpy(static_cast<char*>(base) + i * stride, t.data[i], t.bytes);
}
// c[i][j] += a[i][2 k] b[k][2 j] + a[i][2 k + 1] b[k][2 j + 1] in fp32; the hardware may sum in another
// order.
inline void _tile_dpbf16ps(int c, int a, int b) {
  using Pairs = std::array<std::array<uint16_t, 32>, 16>;
  const auto x = std::bit_cast<Pairs>(emulator::tile(a).data),
             y = std::bit_cast<Pairs>(emulator::tile(b).data);
  __m512 even[16], odd[16], sum[16];
  for (int k = 0; k < 16; ++k)
    for (int j = 0; j < 16; ++j)
      even[k][j] = emulator::widen(y[k][2 * j]), odd[k][j] = emulator::widen(y[k][2 * j + 1]);
  std::memcpy(sum, emulator::tile(c).data, 1024);
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      sum[i] += emulator::widen(x[i][2 * k]) * even[k] + emulator::widen(x[i][2 * k + 1]) * odd[k];
  std::memcpy(emulator::tile(c).data, sum, 1024);
  ++emulator::products;
}
// How often this process has called it.
extern "C" __attribute__((used, visibility("default"))) inline int64_t tile_products() {
  return emulator::products;
}

inline __m512i _mm512_loadu_si512(const void* p) {
  return emulator::read<__m512i>(p);
}
inline __m512 _mm512_loadu_ps(const void* p) {
  return emulator::read<__m512>(p);
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return emulator::masked_read<__m256i>(mask, p);
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  return emulator::masked_read<__m512i>(mask, p);
}
inline void _mm512_storeu_si512(void* p, __m512i v) {
  std::memcpy(p, &v, 64);
}
inline void _mm256_storeu_si256(__m256i* p, __m256i v) {
  std::memcpy(static_cast<void*>(p), &v, 32);
}
inline void _mm256_mask_storeu_epi16(void* p, __mmask16 mask, __m256i v) {
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1)
      std::memcpy(static_cast<char*>(p) + 2 * i, reinterpret_cast<const char*>(&v) + 2 * i, 2);
}
inline void _mm_prefetch(const void*, int) {}
constexpr int _MM_HINT_T0 = 3;

inline __m512 _mm512_set1_ps(float v) {
  return __m512{} + v;
}
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
  return a * b;
}
inline __m512i _mm512_or_si512(__m512i a, __m512i b) {
  return a | b;
}
inline __m512i _mm512_slli_epi32(__m512i v, int n) {
  auto x = emulator::elements<uint32_t>(v);
  return emulator::vector<__m512i, uint32_t>([&](size_t i) { return x[i] << n; });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i v) {
  auto x = emulator::elements<uint16_t>(v);
  return emulator::vector<__m512i, uint32_t>([&](size_t i) { return x[i]; });
}
inline __m256bh _mm512_cvtneps_pbh(__m512 v) {
  auto x = emulator::elements<float>(v);
  return emulator::vector<__m256bh, uint16_t>([&](size_t i) { return emulator::round(x[i]); });
}
inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  auto x = emulator::elements<float>(low), y = emulator::elements<float>(high);
  return emulator::vector<__m512bh, uint16_t>(
      [&](size_t i) { return emulator::round(i < 16 ? x[i] : y[i - 16]); });
}

namespace emulator {

// In each quarter of the vector: the first (or second) half of a's and b's quarter, in turn.
template <class T>
__m512i unpack(__m512i a, __m512i b, size_t half) {
  constexpr size_t kQuarter = 16 / sizeof(T);
  auto x = elements<T>(a), y = elements<T>(b);
  return vector<__m512i, T>([&](size_t i) {
    size_t from = i / kQuarter * kQuarter + half * kQuarter / 2 + i % kQuarter / 2;
    return i % 2 ? y[from] : x[from];
  });
}

}  // namespace emulator

inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
  return emulator::unpack<uint32_t>(a, b, 0);
}
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
  return emulator::unpack<uint32_t>(a, b, 1);
}
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
  return emulator::unpack<uint64_t>(a, b, 0);
}
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
  return emulator::unpack<uint64_t>(a, b, 1);
}
// Two quarters of a, then two of b, chosen by two bits each.
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int choice) {
  auto x = emulator::elements<uint64_t>(a), y = emulator::elements<uint64_t>(b);
  return emulator::vector<__m512i, uint64_t>([&](size_t i) {
    size_t quarter = i / 2, from = 2 * (choice >> 2 * quarter & 3) + i % 2;
    return quarter < 2 ? x[from] : y[from];
  });
}
