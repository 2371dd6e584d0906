// Vectors of floats for the instruction set of this translation unit, and what it converts to and from bfloat16.
//
// PF_ISA names the namespace; PF_AVX512, PF_AVX2, PF_NEON or none of them (scalar code that a compiler may vectorise) choose
// the registers; PF_BF16_DOT says that products of bfloat16 pairs are added up by one instruction.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <cmath>

#include "types.h"

#if defined(PF_AVX512) || defined(PF_AVX2)
#include <immintrin.h>
#elif defined(PF_NEON)
#include <arm_neon.h>
#endif

namespace PF_ISA {

inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }

// Rounds to the nearest, ties to even; NaN stays NaN.
inline bf16 narrow_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16{uint16_t(bits >> 16 | 0x40)};
  return bf16{uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, bf16& y) { y = narrow_bf16(x); }

template <class T> inline float rounded(float x) {
  T y;
  narrow(x, y);
  return widen(y);
}

#if defined(PF_AVX512)
#include "simd_avx512.h"
#elif defined(PF_AVX2)
#include "simd_avx2.h"
#else
#include "simd_small.h"
#endif

// exp(x) within two units in the last place for x <= 88; 0 below -87 (also of -inf), NaN of NaN.
inline V exp(V x) {
  V bounded = max(splat(-87.0f), min(splat(88.0f), x));  // in this order NaN stays
  V n = round_even(mul(bounded, splat(1.44269504f)));
  V r = fma(n, splat(-0.693359375f), bounded);
  r = fma(n, splat(2.12194440e-4f), r);
  V y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = fma(mul(y, r), r, add(r, splat(1.0f)));
  return keep_from(mul(y, power_of_two(n)), x, -87.0f);
}

}  // namespace PF_ISA
