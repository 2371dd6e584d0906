// Causal attention of a flattened batch over the paged KV cache; `paged_attention.py` has the definition.
//
// Keys are cut at multiples of SPLIT of their position. Of a split a head of a token has one partial result (weighted sum of
// values, sum of weights, largest score), and those of several splits come together in order. No bit of it depends on
// which tokens are computed together, nor on whether their splits are.
#pragma once
#include "threads.h"
#include "types.h"

constexpr int64_t SPLIT = 256;  // keys

// Row r has the tokens offset[r] .. offset[r + 1] - 1 of the batch, at positions start[r], start[r] + 1, ...
struct AttentionRows {
  const int32_t* slot;  // [rows], the row of the table; null: r
  const int32_t *start, *offset;
  const int32_t* tables;  // [slots, columns], the blocks of every slot
  int64_t rows, columns;
};

struct AttentionShape {
  int64_t heads, kv_heads, key_size, value_size, block_size;
  int64_t window;  // how many keys a token sees, its own included; 0: all
  int32_t threads;
  int32_t unused;
};

// A few neighbouring tokens of a row, and all splits that they see, or one of them.
struct AttentionTask {
  int32_t row, token, tokens;  // the first of them, counted through the batch
  int32_t low, high;           // splits
  int32_t unused;
  int64_t part;  // where its partial results are; -1: none, the task is all there is to these tokens
};

// Tokens whose splits are tasks of their own.
struct AttentionMerge {
  int32_t row, token, tokens;
  int32_t low, high;
  int32_t unused;
  int64_t part;
};

// What a step's attention is cut into, for all layers with one window.
struct AttentionPlan {
  AttentionShape shape;
  AttentionRows rows;
  AttentionTask* tasks;    // longest first; each of them once per KV head
  AttentionMerge* merges;  // likewise, when all tasks are done
  float* parts;
  char* scratch;  // `thread_bytes` for every thread
  int64_t count, merge_count, thread_bytes;
  int64_t tile;   // the most rows of a tile: a row is a token and a query head
  int64_t width;  // floats of a partial result
};

// Of one layer. What is void* is of the layer's dtype; strides count its values.
struct AttentionLayer {
  const void* q;  // [tokens, heads, key_size], the last dimension dense
  void* out;      // [tokens, heads * value_size]
  const void *k, *v;
  const float* sinks;  // [heads] or null
  int64_t q_stride, q_head_stride, out_stride;
  float scale, softcap;  // softcap 0: none
};

// Cuts a step: fills `plan`, whose lists and scratch lie in `memory`, 64-byte aligned, or (null) counts only the bytes for it.
int64_t plan_attention(const AttentionShape& shape, const AttentionRows& rows, AttentionPlan& plan, void* memory);

struct AttentionKernels {
  void (*attention)(const AttentionPlan& plan, const AttentionLayer& layer, int32_t dtype, int threads);
};
