// One step of a decoder of the Llama-shaped families: from tokens to the states after the last norm, in one call.
#pragma once
#include "attention.h"

// What is void* is of the model's dtype.
struct DecoderLayer {
  Weight qkv, out, down;
  Weight gate_up;              // [2 * wide, hidden]: GATES of the gate projection, as many of the up projection, and so on
  const void* attention_norm;  // [hidden]
  const void* qk_norm;         // [heads + kv_heads, head_dim], or null
  const void* mlp_norm;        // [hidden]
  int64_t window;              // which one of the model's
};

constexpr int GATES = PANEL / 2;  // the last ones may be filled up: wide need not be a multiple

struct DecoderModel {
  const DecoderLayer* layers;
  Weight head;            // embeddings are read from here where `embedding` is null; of FLOAT32 or BFLOAT16 then
  const void* embedding;  // [vocabulary, hidden] or null
  const void* norm;       // [hidden]
  const float* inv_freq;  // [head_dim / 2]
  const int64_t* windows;  // those of all layers, each once: how many tokens a token sees, itself included; 0: all
  int64_t num_windows, num_layers, hidden, heads, kv_heads, head_dim, wide;
  float rope_scale, eps;
  int32_t dtype;  // FLOAT32 or BFLOAT16
  int32_t unused;
};

// Row r feeds tokens[offset[r]] .. tokens[offset[r + 1] - 1] at positions start[r], start[r] + 1, ...
struct DecoderStep {
  const int32_t *slot, *start;    // [rows]
  const int32_t* offset;          // [rows + 1]
  const int32_t* tokens;          // [T]; negative: last[slot]
  const int32_t* tables;          // [slots, columns], the blocks of every slot
  const int64_t* last;            // [slots]; null where no token is negative
  int64_t* fed;                   // [T], the tokens that were fed; or null
  void *k, *v;                    // [layers, blocks, kv_heads, head_dim, block_size] and [.., block_size, head_dim]
  void* pages;                    // [blocks, block_size, hidden] takes the states, divided by their norms; or null
  void* states;                   // [T, hidden], what is computed
  void* workspace;                // 64-byte aligned
  int64_t room;                   // bytes of the workspace
  int64_t rows, columns, blocks, block_size;
};

struct ForwardKernels {
  // Returns 0, or how many bytes of workspace it takes where there is less; nothing is done then.
  int64_t (*forward)(const DecoderModel& model, const DecoderStep& step, int threads);
};
