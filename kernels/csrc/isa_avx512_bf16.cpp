#if defined(__x86_64__)
// Standard headers come first: what they define is for any machine.
#include <atomic>
#include <cmath>
#include <cstring>

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,bmi2")
#endif

#define PF_ISA avx512_bf16
#define PF_TABLE avx512_bf16_kernels
#define PF_AVX512 1
#define PF_BF16_DOT 1
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
