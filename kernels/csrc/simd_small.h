// Four floats of NEON, or of no instruction set at all. Included by simd.h, inside its namespace; simd_avx512.h says what
// the functions do.

constexpr int LANES = 4;

#if defined(PF_NEON)
using V = float32x4_t;
inline V zero() { return vdupq_n_f32(0); }
inline V splat(float x) { return vdupq_n_f32(x); }
inline V load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, V x) { vst1q_f32(p, x); }
inline V add(V a, V b) { return vaddq_f32(a, b); }
inline V sub(V a, V b) { return vsubq_f32(a, b); }
inline V mul(V a, V b) { return vmulq_f32(a, b); }
inline V div(V a, V b) { return vdivq_f32(a, b); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline V min(V a, V b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline V load(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t*)p), 16)); }
inline V even(const bf16* p) { return vreinterpretq_f32_u32(vshlq_n_u32(vld1q_u32((const uint32_t*)p), 16)); }
inline V odd(const bf16* p) {
  return vreinterpretq_f32_u32(vandq_u32(vld1q_u32((const uint32_t*)p), vdupq_n_u32(0xffff0000)));
}
inline V even(const int8_t* p) {
  return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(vmovl_s16(vld1_s16((const int16_t*)p)), 24), 24));
}
inline V odd(const int8_t* p) { return vcvtq_f32_s32(vshrq_n_s32(vmovl_s16(vld1_s16((const int16_t*)p)), 8)); }
inline float sum(V x) { return vaddvq_f32(x); }
inline float top(V x) { return vmaxvq_f32(x); }
inline V round_even(V x) { return vrndnq_f32(x); }
inline V power_of_two(V n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23)); }
#else
struct V {
  float x[LANES];
};
#define PF_EACH(expression)                            \
  V y;                                                 \
  for (int i = 0; i < LANES; i++) y.x[i] = expression; \
  return y
inline V zero() { return V{}; }
inline V splat(float x) { PF_EACH(x); }
inline V load(const float* p) { PF_EACH(p[i]); }
inline void store(float* p, V x) { std::memcpy(p, x.x, sizeof x.x); }
inline V add(V a, V b) { PF_EACH(a.x[i] + b.x[i]); }
inline V sub(V a, V b) { PF_EACH(a.x[i] - b.x[i]); }
inline V mul(V a, V b) { PF_EACH(a.x[i] * b.x[i]); }
inline V div(V a, V b) { PF_EACH(a.x[i] / b.x[i]); }
inline V fma(V a, V b, V c) { PF_EACH(a.x[i] * b.x[i] + c.x[i]); }
inline V max(V a, V b) { PF_EACH(a.x[i] > b.x[i] ? a.x[i] : b.x[i]); }
inline V min(V a, V b) { PF_EACH(a.x[i] < b.x[i] ? a.x[i] : b.x[i]); }
inline V load(const bf16* p) { PF_EACH(widen(p[i])); }
template <class T> inline V even(const T* p) { PF_EACH(widen(p[2 * i])); }
template <class T> inline V odd(const T* p) { PF_EACH(widen(p[2 * i + 1])); }
inline float sum(V x) { return (x.x[0] + x.x[2]) + (x.x[1] + x.x[3]); }
inline float top(V x) {
  float y = x.x[0];
  for (int i = 1; i < LANES; i++) y = x.x[i] > y ? x.x[i] : y;
  return y;
}
inline V round_even(V x) { PF_EACH(std::nearbyint(x.x[i])); }
inline V power_of_two(V n) { PF_EACH(std::ldexp(1.0f, int(n.x[i]))); }
#endif

inline V load(const int8_t* p) {
  float all[LANES];
  for (int i = 0; i < LANES; i++) all[i] = p[i];
  return load(all);
}
inline V broadcast(const float* p) { return splat(*p); }
inline V broadcast(const bf16* p) { return splat(widen(*p)); }
inline void store(bf16* p, V x) {
  float all[LANES];
  store(all, x);
  for (int i = 0; i < LANES; i++) p[i] = narrow_bf16(all[i]);
}
inline V load_part(const float* p, int n) {
  float all[LANES] = {};
  std::memcpy(all, p, size_t(n) * 4);
  return load(all);
}
inline void store_part(float* p, V x, int n) {
  float all[LANES];
  store(all, x);
  std::memcpy(p, all, size_t(n) * 4);
}
inline V load_part(const bf16* p, int n) {
  bf16 all[LANES] = {};
  std::memcpy(all, p, size_t(n) * 2);
  return load(all);
}
inline void store_part(bf16* p, V x, int n) {
  bf16 all[LANES];
  store(all, x);
  std::memcpy(p, all, size_t(n) * 2);
}
inline V select_first(V x, V other, int n) {
  float a[LANES], b[LANES];
  store(a, x), store(b, other);
  for (int i = n; i < LANES; i++) a[i] = b[i];
  return load(a);
}
inline V keep_from(V y, V x, float bound) {
  float a[LANES], b[LANES];
  store(a, y), store(b, x);
  for (int i = 0; i < LANES; i++) a[i] = b[i] < bound ? 0 : a[i];
  return load(a);
}

struct W {
  double x[LANES];
};
inline W no_sums() { return W{}; }
inline W add(W sums, V x) {
  float all[LANES];
  store(all, x);
  for (int i = 0; i < LANES; i++) sums.x[i] += double(all[i]);
  return sums;
}
inline double sum(W sums) { return (sums.x[0] + sums.x[2]) + (sums.x[1] + sums.x[3]); }
inline uint32_t larger(V a, V b) {
  float left[LANES], right[LANES];
  store(left, a), store(right, b);
  uint32_t bits = 0;
  for (int i = 0; i < LANES; i++) bits |= uint32_t(left[i] > right[i]) << i;
  return bits;
}
inline bool any_nan(V x) {
  float all[LANES];
  store(all, x);
  bool found = false;
  for (int i = 0; i < LANES; i++) found |= all[i] != all[i];
  return found;
}
inline V scaled(V y, V t) {
  float all[LANES], powers[LANES];
  store(all, y), store(powers, t);
  for (int i = 0; i < LANES; i++) {
    uint32_t bits, power;
    std::memcpy(&bits, all + i, 4), std::memcpy(&power, powers + i, 4);
    bits += power << 23;
    std::memcpy(all + i, &bits, 4);
  }
  return load(all);
}
