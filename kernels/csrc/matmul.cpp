#include "matmul.h"

#include "table.h"

extern "C" {

void pagefork_pack(const void* weight, int32_t given, int64_t stride, const Weight* w, int32_t threads) {
  kernels().matmul.pack(weight, given, stride, *w, threads);
}

void pagefork_linear(const Weight* w, const void* x, int64_t rows, int64_t x_stride, void* y, int64_t y_stride, int32_t dtype,
                     int32_t threads) {
  kernels().matmul.linear(*w, x, rows, x_stride, y, y_stride, dtype, threads);
}
}
