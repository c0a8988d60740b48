// The torch-free interface of the CPU kernels: raw pointers, strides in elements, and a way to run
// tasks in parallel. Every instruction set provides one KernelTable (see SEP_ATTN_CAPABILITY).
#pragma once

#include <cstdint>

namespace sep_attn {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class Activation : int { kRelu, kIdentity };

// Runs body(context, task) for every task in [0, tasks), on up to `threads` threads, and returns
// when all are done. Tasks may run in any order and at the same time.
struct ParallelFor {
  int64_t threads;
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t task), void* context);
};

// The tokens of an operand as a grid. Pixel (y, x) of image b belongs to the slice
// (b * patch_h + y % patch_h) * patch_w + x % patch_w; [B, N, D] has height 1 and patch (1, 1).
struct TokenGrid {
  int64_t batch, height, width, channels;
  int64_t stride_batch, stride_height, stride_width, stride_channel;
  int64_t patch_h, patch_w;

  int64_t slices() const { return batch * patch_h * patch_w; }
  int64_t slice_tokens() const { return (height / patch_h) * (width / patch_w); }
};

// One value a token: scores, masks, dropout scales. Null data means the option is not used.
template <typename Data>
struct TokenValues {
  Data* data;
  int64_t stride_batch, stride_height, stride_width;
};

struct Matrix {
  const void* data;
  int64_t stride_row, stride_column;
};

struct Vector {
  const void* data;  // null: absent
  int64_t stride;
};

// "acc" below is float, or double when dtype is kFloat64. `[S, D]` arrays are contiguous; `tokens`
// arrays are contiguous [batch, height, width].

struct ContextPoolForward {
  DType dtype;  // of x
  TokenGrid grid;
  const void* x;
  DType scores_dtype;
  TokenValues<const void> scores;
  TokenValues<const bool> key_padding_mask;  // true: leave out
  TokenValues<const void> dropout_scale;     // acc
  void* pooled;                              // acc [S, D]
  void* weight_sum;                          // acc [S]
  void* weights;                             // acc tokens
};

struct ContextPoolBackward {
  DType dtype;  // of x and grad_x
  TokenGrid grid, grad_grid;
  const void* x;
  void* grad_x;
  Matrix grad_pooled;                     // acc [S, D]
  Vector grad_weight_sum;                 // acc [S] or null
  TokenValues<const void> grad_weights;   // acc or null
  TokenValues<const void> dropout_scale;  // acc or null
  const void* pooled;                     // acc [S, D]
  const void* weight_sum;                 // acc [S]
  const void* weights;                    // acc tokens
  void* grad_scores;                      // acc tokens
};

struct GateForward {
  DType dtype;  // of v and y
  TokenGrid v_grid, y_grid;
  const void* v;
  void* y;
  DType context_dtype;
  Matrix context;  // [S, D]
  Activation activation;
};

struct GateBackward {
  DType dtype;  // of grad_y, v and grad_v
  TokenGrid grad_y_grid, v_grid, grad_v_grid;
  const void* grad_y;
  const void* v;
  void* grad_v;
  DType context_dtype;
  Matrix context;      // [S, D]
  void* grad_context;  // acc [S, D]
  Activation activation;
};

// A forward pass can keep the values x W_V^T + b_V, before the activation, for the backward pass;
// in float32 and float64, channels a multiple of 16. They lie as x does: as rows of channels
// [tokens, D] or, where pixels are contiguous and channels are not, on the vector lanes, by panels
// of kValuesWidth tokens [ceil(tokens / kValuesWidth), D, kValuesWidth].
constexpr int64_t kValuesWidth = 32;
inline bool values_on_lanes(const TokenGrid& x) {
  return x.stride_width == 1 && x.stride_channel != 1;
}

struct AttentionForward {
  DType dtype;  // of x, x_prev, weights, biases and out
  TokenGrid grid, prev_grid, out_grid;
  const void* x;
  const void* x_prev;  // scores and keys; in self-attention x, and prev_grid equals grid
  void* out;
  Matrix qkv_weight;  // [1 + 2D, D]: score, keys, values
  Vector qkv_bias;    // [1 + 2D] or null
  Matrix out_weight;  // [D, D]
  Vector out_bias;    // [D] or null
  TokenValues<const bool> key_padding_mask;
  TokenValues<const void> dropout_scale;  // acc
  Activation activation;
  void* weights;     // acc tokens of x_prev, or null
  void* statistics;  // acc [S, 2D + 1]: pooled | context | weight_sum; or null
  void* values;      // acc, on the lanes where values_on_lanes(grid); or null
  // Memory, zero at first, in which packed weights are kept for the next call; or null.
  void* packed_weights;
  int64_t packed_weights_bytes;
};

struct AttentionBackward {
  DType dtype;
  TokenGrid grad_out_grid, grid, prev_grid, grad_x_grid, grad_prev_grid;
  const void* grad_out;
  const void* x;
  const void* x_prev;  // equal to x in self-attention; then grad_x holds both terms
  Matrix qkv_weight;
  Vector qkv_bias;
  Matrix out_weight;
  TokenValues<const void> grad_weights;   // acc or null
  TokenValues<const void> dropout_scale;  // acc or null
  const void* weights;
  const void* statistics;
  const void* values;  // acc; null: computed again
  Activation activation;
  bool values_on_lanes;
  // Results in dtype, contiguous except grad_x and grad_x_prev; null: not wanted.
  void* grad_x;
  void* grad_x_prev;
  void* grad_qkv_weight;
  void* grad_qkv_bias;
  void* grad_out_weight;
  void* grad_out_bias;
};

// The kernels of one instruction set, which its table holds.
#define SEP_ATTN_DECLARE_KERNELS(capability)                                       \
  namespace capability {                                                           \
  void context_pool_forward(const ContextPoolForward&, const ParallelFor&);        \
  void context_pool_backward(const ContextPoolBackward&, const ParallelFor&);      \
  void gate_forward(const GateForward&, const ParallelFor&);                       \
  void gate_backward(const GateBackward&, const ParallelFor&);                     \
  void separable_attention_forward(const AttentionForward&, const ParallelFor&);   \
  void separable_attention_backward(const AttentionBackward&, const ParallelFor&); \
  int64_t packed_weights_bytes(DType dtype, int64_t channels);                     \
  }

struct KernelTable {
  const char* capability;
  void (*context_pool_forward)(const ContextPoolForward&, const ParallelFor&);
  void (*context_pool_backward)(const ContextPoolBackward&, const ParallelFor&);
  void (*gate_forward)(const GateForward&, const ParallelFor&);
  void (*gate_backward)(const GateBackward&, const ParallelFor&);
  void (*separable_attention_forward)(const AttentionForward&, const ParallelFor&);
  void (*separable_attention_backward)(const AttentionBackward&, const ParallelFor&);
  int64_t (*packed_weights_bytes)(DType dtype, int64_t channels);
};

}  // namespace sep_attn
