#include "table.h"

#if PF_HAS_AVX512_BF16
// Headers come first: what they define outside of namespaces of ours is shared, so it must run on any machine.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include <immintrin.h>

#include "threads.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,bmi2"))), apply_to = function)
#else
// gcc before 13 takes the undefined operands in its own headers for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
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
