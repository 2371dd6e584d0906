// Sixteen floats of AVX-512 (F, BW, VL, DQ). Included by simd.h, inside its namespace.

constexpr int LANES = 16;
using V = __m512;

inline V zero() { return _mm512_setzero_ps(); }
inline V splat(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline V load(const bf16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline V load(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline void store(bf16* p, V x) {
#if PF_BF16_DOT
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i round = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __m512i nan = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  __mmask16 bad = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(round, bad, nan)));
#endif
}
// The first n <= LANES, zeros behind; nothing behind them is touched.
inline V load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
inline void store_part(float* p, V x, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), x); }
inline V load_part(const bf16* p, int n) {
  __m256i part = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
}
inline void store_part(bf16* p, V x, int n) {
  bf16 all[LANES];
  store(all, x);
  std::memcpy(p, all, size_t(n) * sizeof(bf16));
}
inline float sum(V x) { return _mm512_reduce_add_ps(x); }
inline float top(V x) { return _mm512_reduce_max_ps(x); }
// x where lane < n, else other.
inline V select_first(V x, V other, int n) { return _mm512_mask_mov_ps(other, __mmask16((1u << n) - 1), x); }
inline V round_even(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^n for integers n in [-126, 127].
inline V power_of_two(V n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
// y where x is not below `bound` (NaN is not), else 0.
inline V keep_from(V y, V x, float bound) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, splat(bound), _CMP_NLT_UQ), y);
}

// Of LANES pairs of inputs, the first of each and the second of each.
inline V even(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
inline V odd(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000))));
}
inline V even(const int8_t* p) {
  __m512i pairs = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 24), 24));
}
inline V odd(const int8_t* p) {
  __m512i pairs = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(pairs, 8));
}
inline V broadcast(const float* p) { return _mm512_set1_ps(*p); }
inline V broadcast(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(short(p->bits)), 16)); }

#if PF_BF16_DOT
// Pairs of bfloat16, one per lane; `dot` adds the two products of each lane to a sum.
using Pairs = __m512bh;
inline Pairs load_pairs(const bf16* p) { return (Pairs)_mm512_loadu_si512(p); }
inline Pairs load_pairs(const int8_t* p) { return _mm512_cvtne2ps_pbh(load(p + LANES), load(p)); }
inline Pairs splat_pair(const bf16* p) {
  int pair;
  std::memcpy(&pair, p, 4);
  return (Pairs)_mm512_set1_epi32(pair);
}
inline Pairs splat_single(const bf16* p) { return (Pairs)_mm512_set1_epi32(p->bits); }  // (*p, 0)
inline V dot(V sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }
#endif

// Sums in float64 of floats, some of them in each of its numbers.
using W = __m512d;
inline W no_sums() { return _mm512_setzero_pd(); }
inline W add(W sums, V x) {
  __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  return _mm512_add_pd(sums, _mm512_add_pd(low, high));
}
inline double sum(W sums) { return _mm512_reduce_add_pd(sums); }
// A bit for every lane whose a is larger.
inline uint32_t larger(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline bool any_nan(V x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
// y 2^n of t = 1.5 * 2^23 + n, where both y and the result are normal numbers.
inline V scaled(V y, V t) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}
