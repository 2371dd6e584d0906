// y = x Wᵀ + b, with W laid out by `pack`.
#pragma once
#include "types.h"

struct MatmulKernels {
  // Lays `weight` [out, in] of the kind `given`, rows `stride` apart, out at w.data (and its scales at w.scale for INT8).
  void (*pack)(const void* weight, int32_t given, int64_t stride, const Weight& w, int threads);
  // y [rows, out] of x [rows, in], both of the kind `dtype` (FLOAT32 or BFLOAT16), rows x_stride and y_stride apart.
  void (*linear)(const Weight& w, const void* x, int64_t rows, int64_t x_stride, void* y, int64_t y_stride, int32_t dtype,
                 int threads);
};
