#if defined(__x86_64__)
// Headers come first: what they define outside of namespaces of ours is shared, so it must run on any machine.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include <immintrin.h>

#include "table.h"
#include "threads.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2")
#endif

#define PF_ISA avx2
#define PF_TABLE avx2_kernels
#define PF_AVX2 1
#define PF_BF16_DOT 0
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
