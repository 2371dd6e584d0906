// The kernels of one instruction set, and which of them this process uses.
#pragma once
#include "matmul.h"

struct Kernels {
  const char* name;
  MatmulKernels matmul;
};

// Of this machine, or what the environment variable PAGEFORK_NATIVE names, if the machine has it.
const Kernels& kernels();

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
#endif
