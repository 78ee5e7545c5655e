// Linear attention and its gradients without the N × N matrix and without copies of φ(q) and φ(k);
// the formulas are those of nefkern/reference/linear_attention.py.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nefkern::cpu {

enum class FeatureMap : int { kElu, kSoftmax };
enum class AttentionType : int { kFloat32, kFloat16, kBFloat16 };

// A [B, H, tokens, channels] array: strides in elements, channels adjacent.
struct HeadsView {
  void* data;
  int64_t batch_stride, head_stride, token_stride;
};

struct LinearAttentionArgs {
  AttentionType type;  // of q, k, v, out and their gradients; everything else is float32
  FeatureMap feature_map;
  int64_t batch, heads, queries, keys;  // B, H, N, M
  int64_t channels, value_channels;     // D, E ≥ 1
  HeadsView q, k, v;                    // [B, H, N, D], [B, H, M, D], [B, H, M, E]
  const bool* mask;                     // [B, M] contiguous, true where a key counts; null: all do
  float eps;
  float* state;   // [B, H, D, E] contiguous: φ(k)ᵀ v
  float* stats;   // [B, H, 2, D] contiguous: shift and sum of φ(k)
  HeadsView out;  // [B, H, N, E]
};

struct LinearAttentionBackwardArgs {
  LinearAttentionArgs forward;  // state and stats as the forward pass left them; out is not read
  HeadsView grad;               // [B, H, N, E]
  HeadsView dq, dk, dv;         // written, shapes of q, k, v
};

// Results do not depend on the number of threads. Throws std::bad_alloc.
NEFKERN_DECLARE(void, linear_attention, (const LinearAttentionArgs& args));
NEFKERN_DECLARE(void, linear_attention_backward, (const LinearAttentionBackwardArgs& args));

}  // namespace nefkern::cpu
