#include "forward.h"

#include "table.h"

extern "C" {

int64_t pagefork_forward(const DecoderModel* model, const DecoderStep* step, int32_t threads) {
  return kernels().forward.forward(*model, *step, threads);
}
}
