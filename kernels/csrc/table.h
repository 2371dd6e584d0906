// The kernels of one instruction set, and which of them this process uses.
#pragma once
#include "attention.h"
#include "forward.h"
#include "matmul.h"
#include "sampling.h"

struct Kernels {
  const char* name;
  MatmulKernels matmul;
  AttentionKernels attention;
  ForwardKernels forward;
  SamplingKernels sampling;
};

// Of this machine, or what the environment variable PAGEFORK_NATIVE names, if the machine has it.
const Kernels& kernels();

// Compilers before gcc 10 and clang 9 don't know these instructions.
#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<avx512bf16intrin.h>)
#define PF_HAS_AVX512_BF16 1
#endif
#endif

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#if PF_HAS_AVX512_BF16
extern const Kernels avx512_bf16_kernels;
#endif
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
#endif
