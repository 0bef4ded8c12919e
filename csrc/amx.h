// AMX-BF16 tiles: C [16 x 16] fp32 += A [16 x 32] * B [32 x 16], 8192 multiply-adds in 16 cycles.
//
// Matrices are packed into 1 KiB tiles, the order in which a kernel reads them:
//   A  tile(i, k): 16 rows of 32 consecutive bf16
//   B  tile(j, k): 16 rows p of 16 pairs (B[2p][j], B[2p + 1][j])       ("VNNI" order)
// Both are [panels][K / 32][tile], so a panel of 16 rows (or columns) streams through memory once per
// product.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#define VLKERN_AMX 1

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "simd.h"

#ifndef VLKERN_AMX_TARGET  // empty where the instructions are emulated
#define VLKERN_AMX_TARGET \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#endif

namespace vlkern::amx {

constexpr int kTile = 512;  // elements of a bf16 tile: 16 x 32
constexpr int kBlock = 32;  // a kernel computes 32 x 32 outputs in four accumulators

// True when the chip has AMX-BF16 and AVX512-BF16, and the kernel lets this process use the tile registers.
inline bool available() {
  static const bool yes = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    unsigned a, b, c, features = 0;  // __builtin_cpu_supports does not know AMX in every compiler
    __get_cpuid_count(7, 0, &a, &b, &c, &features);
    constexpr unsigned kAmx = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
    return __builtin_cpu_supports("avx512bf16") && (features & kAmx) == kAmx &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return yes;
}

// Configures all eight tile registers as 16 rows of 64 bytes, for the lifetime of the object.
class Tiles {
 public:
  VLKERN_AMX_TARGET Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.bytes[t] = 64, config.rows[t] = 16;
    _tile_loadconfig(&config);
  }
  VLKERN_AMX_TARGET ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Registers 0..3 hold C[0:16, 0:16], C[0:16, 16:32], C[16:32, 0:16], C[16:32, 16:32] of a 32 x 32 block; a
// block that is not tall lacks the last 16 rows, one that is not wide the last 16 columns.
template <bool Tall = true, bool Wide = true>
VLKERN_AMX_TARGET inline void zero_block() {
  _tile_zero(0);
  if constexpr (Wide) _tile_zero(1);
  if constexpr (Tall) _tile_zero(2);
  if constexpr (Tall && Wide) _tile_zero(3);
}

template <bool Tall = true, bool Wide = true>
VLKERN_AMX_TARGET inline void load_block(const float* c, int64_t stride) {
  _tile_loadd(0, c, stride * 4);
  if constexpr (Wide) _tile_loadd(1, c + 16, stride * 4);
  if constexpr (Tall) _tile_loadd(2, c + 16 * stride, stride * 4);
  if constexpr (Tall && Wide) _tile_loadd(3, c + 16 * stride + 16, stride * 4);
}

template <bool Tall = true, bool Wide = true>
VLKERN_AMX_TARGET inline void store_block(float* c, int64_t stride) {
  _tile_stored(0, c, stride * 4);
  if constexpr (Wide) _tile_stored(1, c + 16, stride * 4);
  if constexpr (Tall) _tile_stored(2, c + 16 * stride, stride * 4);
  if constexpr (Tall && Wide) _tile_stored(3, c + 16 * stride + 16, stride * 4);
}

// C += A B over `k_tiles` tiles; a and b point at the first of two neighbouring panels, `a_panel` and
// `b_panel` apart.
template <bool Tall = true, bool Wide = true>
VLKERN_AMX_TARGET inline void multiply_block(const bf16* a, int64_t a_panel, const bf16* b, int64_t b_panel,
                                             int64_t k_tiles) {
  for (int64_t k = 0; k < k_tiles; ++k, a += kTile, b += kTile) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Wide) {
      _tile_loadd(7, b + b_panel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Tall) {
      _tile_loadd(5, a + a_panel, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Wide) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// 16 x 16 transpose of 32-bit elements, in registers.
VLKERN_AMX_TARGET inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int half = 0; half < 16; half += 8)
    for (int i = 0; i < 4; ++i) {
      t[half + i] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0x88);
      t[half + i + 4] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Two rows of 16 bf16 -> 16 pairs (low[j], high[j]).
VLKERN_AMX_TARGET inline __m512i interleave(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// A bf16 matrix in memory, [rows, columns] with unit column stride; reads beyond its edges give zeros.
struct Source {
  const bf16* data;
  int64_t rows, columns, stride;

  VLKERN_AMX_TARGET __m256i half_row(int64_t i, int64_t j) const {  // 16 elements
    __mmask16 m = mask<__mmask16>(i, j, 16);
    return _mm256_maskz_loadu_epi16(m, data + i * stride + j);
  }
  VLKERN_AMX_TARGET __m512i row(int64_t i, int64_t j) const {  // 32 elements
    __mmask32 m = mask<__mmask32>(i, j, 32);
    return _mm512_maskz_loadu_epi16(m, data + i * stride + j);
  }

 private:
  template <class Mask>
  Mask mask(int64_t i, int64_t j, int64_t width) const {
    int64_t n = i < rows ? columns - j : 0;
    return n >= width ? Mask(-1) : n <= 0 ? Mask(0) : Mask((uint64_t(1) << n) - 1);
  }
};

// The four packings. `out` is one tile; (i, j) is the tile's first row and column in the source.
VLKERN_AMX_TARGET inline void pack_a(const Source& s, int64_t i, int64_t j,
                                     bf16* out) {  // 16 rows x 32 columns
  for (int p = 0; p < 16; ++p) _mm512_storeu_si512(out + 32 * p, s.row(i + p, j));
}
VLKERN_AMX_TARGET inline void pack_b(const Source& s, int64_t i, int64_t j,
                                     bf16* out) {  // 32 rows x 16 columns
  for (int p = 0; p < 16; ++p)
    _mm512_storeu_si512(out + 32 * p, interleave(s.half_row(i + 2 * p, j), s.half_row(i + 2 * p + 1, j)));
}
VLKERN_AMX_TARGET inline void pack_a_transposed(const Source& s, int64_t i, int64_t j,
                                                bf16* out) {  // 32 rows x 16 columns
  __m512i r[16];
  for (int p = 0; p < 16; ++p) r[p] = interleave(s.half_row(i + 2 * p, j), s.half_row(i + 2 * p + 1, j));
  transpose(r);
  for (int p = 0; p < 16; ++p) _mm512_storeu_si512(out + 32 * p, r[p]);
}
VLKERN_AMX_TARGET inline void pack_b_transposed(const Source& s, int64_t i, int64_t j,
                                                bf16* out) {  // 16 rows x 32 columns
  __m512i r[16];
  for (int p = 0; p < 16; ++p) r[p] = s.row(i + p, j);
  transpose(r);
  for (int p = 0; p < 16; ++p) _mm512_storeu_si512(out + 32 * p, r[p]);
}

// A 32 x 32 fp32 block (row stride 32) rounded to bf16: as two A tiles [16 x 32], and as two B tiles [32 x
// 16].
VLKERN_AMX_TARGET inline void round_block(const float* c, bf16* a0, bf16* a1, bf16* b0, bf16* b1) {
  for (int i = 0; i < 32; i += 2) {
    bf16* a = (i < 16 ? a0 : a1) + 32 * (i % 16);
    __m256i half[2][2];
    for (int r = 0; r < 2; ++r)
      for (int h = 0; h < 2; ++h) {
        half[r][h] = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(c + 32 * (i + r) + 16 * h));
        _mm256_storeu_si256((__m256i*)(a + 32 * r + 16 * h), half[r][h]);
      }
    _mm512_storeu_si512(b0 + 16 * i, interleave(half[0][0], half[1][0]));
    _mm512_storeu_si512(b1 + 16 * i, interleave(half[0][1], half[1][1]));
  }
}

// The same, in one of the two orders.
VLKERN_AMX_TARGET inline void round_block_a(const float* c, bf16* a0, bf16* a1) {
  for (int i = 0; i < 32; ++i)
    _mm512_storeu_si512(
        (i < 16 ? a0 : a1) + 32 * (i % 16),
        (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(c + 32 * i + 16), _mm512_loadu_ps(c + 32 * i)));
}
VLKERN_AMX_TARGET inline void round_block_b(const float* c, bf16* b0, bf16* b1) {
  for (int i = 0; i < 16; ++i)
    for (int h = 0; h < 2; ++h) {
      const float* pair = c + 64 * i + 16 * h;
      _mm512_storeu_si512((h ? b1 : b0) + 32 * i,
                          interleave((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(pair)),
                                     (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(pair + 32))));
    }
}

}  // namespace vlkern::amx

#endif
