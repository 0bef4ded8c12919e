// phi of csrc/mixture_cdf.h, which divides in double precision, and of its vectors, which multiply, against
// divisions of 64-bit integers: every num within 9 standard deviations of every scale, and powers of two
// beyond.
#include <bit>
#include <cstdio>
#include <cstring>

#include "mixture_cdf.h"

#define VLKERN_INLINE inline
#define VLKERN_INLINE_LAMBDA
namespace vlkern {
#include "mixture_cdf.inc"
}

using namespace vlkern;
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
  const int32_t want = by_definition(num, den);
  if (phi(num, den, 1.0 / den) != want) return false;
  // Four mixtures with other means; k and k + 1 of some.
  Gaussian g;
  g.mean = Four{0, 1, 2, -256}, g.den = four(den), g.inverse = four(1.0 / den), g.weight = four(1);
  const Component component(g);
  const Four alone = component.part(four(num)), at = four(num);
  const Places found = component.places(at);
  const Words b = found.bytes;
  const Four first = component.weighted(found.first, rows(b[0], b[1], b[4], b[5]));
  const Four second = component.weighted(found.second, rows(b[2], b[3], b[6], b[7]));
  for (int i = 0; i < 4; ++i) {
    const int32_t here = num - int32_t(g.mean[i]);
    if (alone[i] != by_definition(here, den) || first[i] != alone[i]) return false;
    if (second[i] != by_definition(here + 256, den)) return false;
  }
  return true;
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
