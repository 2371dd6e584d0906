// What all translation units share: types that cross the border to Python, and the codes of what they hold.
#pragma once
#include <cstddef>
#include <cstdint>

struct bf16 {
  uint16_t bits;
};

// Of activations, and of weights that are held as they are; INT8 is for weights alone.
enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// A weight [out, in] that `pack` has laid out. PANEL outputs lie together, so that a panel is read from end to end:
// BFLOAT16 and INT8 as [in / 2][PANEL][2], FLOAT32 as [in][PANEL]; the last panel is filled up with zeros, as is an odd
// end of `in`.
constexpr int PANEL = 32;
struct Weight {
  const void* data;    // 64-byte aligned
  const float* scale;  // [out] of INT8, else null
  const float* bias;   // [out] or null
  int64_t out, in;
  int32_t kind;
  int32_t unused;
};
