#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#define PF_ISA scalar
#define PF_TABLE scalar_kernels
#define PF_BF16_DOT 0
#include "kernels.inc"
