// What a warp does with one stage: the scores of its 16 keys against 8 queries, and the sum of its values
// with 8 weights each. Lane (g, t) = (lane / 4, lane % 4) holds the scores of keys key_row(g) and key_row(g)
// + 1 and queries 2t and 2t + 1, in the order (key, query), (key, query + 1), (key + 1, query), (key + 1,
// query + 1).
//
// 16-bit queries: both products on the tensor cores, keys and values as the first factor, so that 8 queries
// are no waste. A product does not care how the indices that it sums over are numbered, so that a lane takes
// 8 columns of a key in one load of shared memory, and 8 columns of each of four values. Weights are taken as
// the sum of two 16-bit numbers, which makes their rounding not worse than the output's, and bfloat16 with
// int8 values, for its range: the values' scales are in the weights.
//
// float32 queries: the same by fused multiply-adds.
#pragma once

#include "cuda/tensor_core.cuh"
#include "cuda/vector.cuh"
#include "cuda_call.cuh"

namespace vlkern::decode {

// Eight neighbouring numbers as they are stored.
template <class E>
struct Eight {
  uint32_t word[2 * sizeof(E)];
};

template <class E>
__device__ Eight<E> load_eight(const char* p) {
  if constexpr (sizeof(E) == 1)
    return std::bit_cast<Eight<E>>(*reinterpret_cast<const uint2*>(p));
  else
    return std::bit_cast<Eight<E>>(*reinterpret_cast<const uint4*>(p));
}

constexpr int kWide = 2;  // pieces of 128 columns that a value has at most

// T: of queries; E: of keys and values.
template <class T, class E>
class Tile {
  static constexpr bool kCoded = sizeof(E) == 1;
  using Weight = std::conditional_t<kCoded, cuda::BFloat16, T>;

 public:
  __device__ Tile(const Call& call, int lane, float*)
      : lane_(lane), chunks_((call.k.columns + 31) / 32), columns_(call.v.columns) {}

  // Eight columns, from 8 group on, of query n of the block, as the warps read them from shared memory.
  static __device__ void place(const Call& call, const Layout&, char* q, int n, int group, const T* from) {
    uint4 words{};
    if (from) words = *reinterpret_cast<const uint4*>(from);
    if constexpr (kCoded)  // in the order in which widen() takes them from a word
      words = {__byte_perm(words.x, words.y, 0x5410), __byte_perm(words.x, words.y, 0x7632),
               __byte_perm(words.z, words.w, 0x5410), __byte_perm(words.z, words.w, 0x7632)};
    const int chunks = (call.k.columns + 31) / 32, team = n / kQueries;
    const int lane = n % kQueries * 4 + group % 4;
    reinterpret_cast<uint4*>(q)[(team * chunks + group / 4) * 32 + lane] = words;
  }

  __device__ void scores(const char* keys, int pitch, const char* q, int, int team, float (&s)[4]) const {
    const char* row = keys + key_row(lane_ / 4) * pitch + lane_ % 4 * 8 * int(sizeof(E));
    const uint4* queries = reinterpret_cast<const uint4*>(q) + team * chunks_ * 32 + lane_;
    float more[4] = {};
#pragma unroll 4
    for (int c = 0; c < chunks_; ++c) {
      const auto x = load_eight<E>(row + c * 32 * sizeof(E)),
                 y = load_eight<E>(row + pitch + c * 32 * sizeof(E));
      const uint4 w = queries[c * 32];
      uint32_t a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if constexpr (kCoded) {
          a[half][0] = cuda::widen<T>(x.word[half]), a[half][1] = cuda::widen<T>(y.word[half]);
          a[half][2] = cuda::widen<T>(x.word[half] >> 8), a[half][3] = cuda::widen<T>(y.word[half] >> 8);
        } else {
          a[half][0] = x.word[2 * half], a[half][1] = y.word[2 * half];
          a[half][2] = x.word[2 * half + 1], a[half][3] = y.word[2 * half + 1];
        }
      cuda::multiply<T>(s, a[0], {w.x, w.y});
      cuda::multiply<T>(more, a[1], {w.z, w.w});
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] += more[i];
  }

  // sums = fade sums + weights values; fade of queries 2t and 2t + 1
  __device__ void add(const char* values, int pitch, const float (&p)[4], const float (&fade)[2]) {
    uint32_t high[2], low[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t word = cuda::pack<Weight>(p[2 * k], p[2 * k + 1]);
      const auto two = cuda::unpack<Weight>(word);
      high[k] = cuda::transpose(word);
      low[k] = cuda::transpose(cuda::pack<Weight>(p[2 * k] - float(two.low), p[2 * k + 1] - float(two.high)));
    }
    const char* even = values + key_row(lane_ % 4 * 2) * pitch + lane_ / 4 * 8 * int(sizeof(E));
    const char* odd = values + key_row(lane_ % 4 * 2 + 1) * pitch + lane_ / 4 * 8 * int(sizeof(E));
#pragma unroll
    for (int c = 0; c < 2 * kWide; ++c) {
      if (c * 64 >= columns_) break;
      Eight<E> row[4];  // of the product's rows 2t, 2t + 1, 2t + 8, 2t + 9
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        row[2 * k] = load_eight<E>(even + k * pitch + c * 64 * sizeof(E));
        row[2 * k + 1] = load_eight<E>(odd + k * pitch + c * 64 * sizeof(E));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t a[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // columns 2j and 2j + 1 of rows 2t and 2t + 1, then of the other two
          const Eight<E>&x = row[k / 2 * 2], &y = row[k / 2 * 2 + 1];
          if constexpr (kCoded)
            a[k] = cuda::widen<Weight>(
                __byte_perm(x.word[j / 2], y.word[j / 2], 0x0400 + 0x0101 * (j % 2 * 2 + k % 2)));
          else
            a[k] = __byte_perm(x.word[j], y.word[j], k % 2 ? 0x7632 : 0x5410);
        }
        float (&sum)[4] = sums_[c * 4 + j];
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] *= fade[i % 2];
        cuda::multiply<Weight>(sum, a, high);
        cuda::multiply<Weight>(sum, a, low);
      }
    }
  }

  // To [8 queries, columns].
  __device__ void store(float* to) const {
    const int first = lane_ / 4 * 8;
    to += lane_ % 4 * 2 * columns_ + first;
#pragma unroll
    for (int c = 0; c < 2 * kWide; ++c) {
      if (c * 64 + first >= columns_) break;
#pragma unroll
      for (int i = 0; i < 16; ++i)  // query i / 8 of the two, column i % 8
        to[i / 8 * columns_ + c * 64 + i % 8] = sums_[c * 4 + i % 8 / 2][i % 2 * 2 + i / 8];
    }
  }

 private:
  int lane_, chunks_, columns_;
  float sums_[8 * kWide][4] = {};  // [64-column chunk, j]: columns 8g + 2j, 8g + 2j + 1 of queries 2t, 2t + 1
};

__device__ inline void load_four(const char* p, float (&out)[4], float) {
  cuda::load_floats(reinterpret_cast<const float*>(p), out);
}
__device__ inline void load_four(const char* p, float (&out)[4], int8_t) {
  const auto word = *reinterpret_cast<const uint32_t*>(p);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = float(int8_t(word >> (8 * i)));
}

template <class E>
class Tile<float, E> {
 public:
  __device__ Tile(const Call& call, int lane, float* scratch)
      : lane_(lane), width_(call.k.columns), columns_(call.v.columns), scratch_(scratch) {}

  static __device__ void place(const Call&, const Layout& at, char* q, int n, int group, const float* from) {
    float x[8] = {};
    if (from) cuda::load_floats(from, x);
    cuda::store_as(reinterpret_cast<float*>(q + n * at.q_row) + 8 * group, x);
  }

  __device__ void scores(const char* keys, int pitch, const char* q, int q_row, int team,
                         float (&s)[4]) const {
    const char* row = keys + key_row(lane_ / 4) * pitch;
    const char* query = q + (team * kQueries + lane_ % 4 * 2) * q_row;
    for (int d = 0; d < width_; d += 4) {
      float x[2][4], y[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_four(row + i * pitch + d * sizeof(E), x[i], E{});
        load_four(query + i * q_row + d * sizeof(float), y[i], float{});
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) s[i] = fmaf(x[i / 2][k], y[i % 2][k], s[i]);
    }
  }

  __device__ void add(const char* values, int pitch, const float (&p)[4], const float (&fade)[2]) {
    float* mine = scratch_ + key_row(lane_ / 4) * kQueries + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) mine[i / 2 * kQueries + i % 2] = p[i];
    if (lane_ < 4)
      for (int i = 0; i < 2; ++i) scratch_[kKeys * kQueries + 2 * lane_ + i] = fade[i];
    __syncwarp();
    float weight[kQueries];
    cuda::load_floats(scratch_ + kKeys * kQueries, weight);
#pragma unroll
    for (int i = 0; i < kWide * kQueries * 4; ++i) sums_[i / 32][i / 4 % 8][i % 4] *= weight[i / 4 % 8];
#pragma unroll 2
    for (int key = 0; key < kKeys; ++key) {
      cuda::load_floats(scratch_ + key * kQueries, weight);
#pragma unroll
      for (int c = 0; c < kWide; ++c) {
        const int column = c * 128 + lane_ * 4;
        if (column >= columns_) break;
        float x[4];
        load_four(values + key * pitch + column * sizeof(E), x, E{});
#pragma unroll
        for (int i = 0; i < 32; ++i)
          sums_[c][i / 4][i % 4] = fmaf(weight[i / 4], x[i % 4], sums_[c][i / 4][i % 4]);
      }
    }
    __syncwarp();
  }

  __device__ void store(float* to) const {
#pragma unroll
    for (int c = 0; c < kWide; ++c) {
      const int column = c * 128 + lane_ * 4;
      if (column >= columns_) break;
#pragma unroll
      for (int i = 0; i < 32; ++i) to[i / 4 * columns_ + column + i % 4] = sums_[c][i / 4][i % 4];
    }
  }

 private:
  int lane_, width_, columns_;
  float* scratch_;                       // [17, 8]: weights of the keys, and how much of the sums remains
  float sums_[kWide][kQueries][4] = {};  // columns 128c + 4 lane and three more
};

}  // namespace vlkern::decode
