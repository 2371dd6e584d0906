#if defined(__aarch64__)
#include <atomic>
#include <cmath>
#include <cstring>

#define PF_ISA neon
#define PF_TABLE neon_kernels
#define PF_NEON 1
#define PF_BF16_DOT 0
#include "kernels.inc"
#endif
