#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "table.h"

namespace {

#if PF_HAS_AVX512_BF16
// Compilers that know the instructions may not know their name as a feature of CPUs.
bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

const Kernels* best() {
  const char* asked = std::getenv("PAGEFORK_NATIVE");
  const Kernels* found[4];
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if PF_HAS_AVX512_BF16
  if (avx512 && has_avx512_bf16()) found[count++] = &avx512_bf16_kernels;
#endif
  if (avx512) found[count++] = &avx512_kernels;
  if (avx2) found[count++] = &avx2_kernels;
#elif defined(__aarch64__)
  found[count++] = &neon_kernels;
#endif
  found[count++] = &scalar_kernels;
  for (int i = 0; asked && i < count; i++)
    if (!std::strcmp(asked, found[i]->name)) return found[i];
  return found[0];
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = best();
  return *chosen;
}

extern "C" const char* pagefork_isa() { return kernels().name; }
