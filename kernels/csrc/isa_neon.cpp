#if defined(__aarch64__)
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#define PF_ISA neon
#define PF_TABLE neon_kernels
#define PF_NEON 1
#define PF_BF16_DOT 0
#include "kernels.inc"
#endif
