#include "sampling.h"

#include "table.h"

extern "C" {

int64_t pagefork_sampling_scratch(int64_t vocab) { return kernels().sampling.scratch(vocab); }

void pagefork_read_rows(const Entry* entries, int64_t count, int64_t vocab, int32_t kind, int64_t n, const Found* found,
                        void* scratch, int32_t threads) {
  kernels().sampling.read_rows(entries, count, vocab, kind, n, *found, scratch, threads);
}

void pagefork_merge_rows(const Entry* entries, int64_t count, int64_t vocab, int32_t kind, const Merges* merges, void* scratch,
                         int32_t threads) {
  kernels().sampling.merge_rows(entries, count, vocab, kind, *merges, scratch, threads);
}

void pagefork_log_probs(const Entry* entries, int64_t count, int64_t vocab, int32_t kind, float* out, void* scratch,
                        int32_t threads) {
  kernels().sampling.log_probs(entries, count, vocab, kind, out, scratch, threads);
}
}
