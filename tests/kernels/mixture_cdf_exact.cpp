// phi of csrc/mixture_cdf.h, which divides in double precision, against divisions of 64-bit integers: every
// num within 9 standard deviations of every scale, and powers of two beyond.
#include <cstdio>

#include "mixture_cdf.h"

using namespace vlkern::mixture;

static int32_t by_definition(int32_t num, int32_t den) {
  int64_t t = int64_t(num) * kSteps, q = t / den, r = t % den;
  if (r < 0) q -= 1, r += den;
  constexpr int kLast = kSteps * kReach;
  if (q < -kLast) return 0;
  if (q >= kLast) return kOne;
  q += kLast;
  return int32_t(kPhi[q] + int64_t(kPhi[q + 1] - kPhi[q]) * r / den);
}

static bool same(int32_t num, int32_t den) {
  return phi(num, den, 1.0 / den) == by_definition(num, den);
}

int main() {
  long tried = 0;
  for (int32_t den : kSigma) {
    for (int32_t num = -9 * den; num <= 9 * den; ++num, ++tried)
      if (!same(num, den)) return std::printf("num %d den %d\n", num, den), 1;
    for (int bit = 0; bit < 30; ++bit)
      for (int32_t off = -1; off <= 1; ++off)
        for (int32_t sign = -1; sign <= 1; sign += 2, ++tried)
          if (!same(sign * ((1 << bit) + off), den)) return std::printf("2^%d den %d\n", bit, den), 1;
  }
  std::printf("%ld\n", tried);
}
