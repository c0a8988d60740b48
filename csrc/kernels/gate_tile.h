// The gate's backward pass for one tile of tokens, as rows or on the vector lanes: reads v and dy,
// writes y = act(v) c and dv = dy c act'(v), and adds up what the gradients of the context and of
// the biases are sums of.
#pragma once

#include "kernels.h"
#include "lanes.h"
#include "products.h"
#include "simd.h"
#include "tokens.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

// ---- Tokens as rows ----

// For kVectors vectors of channels; y_tile may be v, and dv takes the place of dy.
template <typename T, Activation kActivation, int kVectors>
SEP_ATTN_INLINE void gate_backward_strip(int64_t rows, int64_t column, int64_t stride,
                                         Rows<const T> values, T* y_tile, T* dy_tile,
                                         const T* const* context, T* const* grad_context,
                                         const Rows<const T>& grad_out, T* grad_value_bias,
                                         T* grad_out_bias) {
  constexpr int64_t n = kLanes<T>;
  Vec<T> sum_dv[kVectors], sum_g[kVectors], sum_dc[kVectors];
  SEP_ATTN_UNROLL
  for (int i = 0; i < kVectors; ++i) sum_dv[i] = sum_g[i] = sum_dc[i] = zero<T>();
  for (int64_t t = 0; t < rows; ++t) {
    const T* v_row = values.data + t * values.stride + column;
    T* y_row = y_tile + t * stride + column;
    T* dy_row = dy_tile + t * stride + column;
    const T* g_row = grad_out.data + t * grad_out.stride + column;
    const T* c_row = context[t] + column;
    SEP_ATTN_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const Vec<T> v = load(v_row + i * n);
      const Vec<T> dy = load(dy_row + i * n);
      const Vec<T> c = load(c_row + i * n);
      const Vec<T> r = activate<T, kActivation>(v);
      Vec<T> dv = dy * c;
      if (kActivation == Activation::kRelu) dv = v <= zero<T>() ? zero<T>() : dv;
      store(y_row + i * n, r * c);
      store(dy_row + i * n, dv);
      sum_dc[i] += dy * r;
      sum_dv[i] += dv;
      sum_g[i] += load(g_row + i * n);
    }
    if (t + 1 == rows || grad_context[t + 1] != grad_context[t]) {
      SEP_ATTN_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        T* at = grad_context[t] + column + i * n;
        store(at, load(at) + sum_dc[i]);
        sum_dc[i] = zero<T>();
      }
    }
  }
  SEP_ATTN_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    T* at = grad_value_bias + column + i * n;
    store(at, load(at) + sum_dv[i]);
    at = grad_out_bias + column + i * n;
    store(at, load(at) + sum_g[i]);
  }
}

template <typename T, Activation kActivation>
void gate_backward_tile(int64_t rows, int64_t channels, int64_t stride, Rows<const T> values,
                        T* y_tile, T* dy_tile, const T* const* context, T* const* grad_context,
                        const Rows<const T>& grad_out, T* grad_value_bias, T* grad_out_bias) {
  constexpr int64_t n = kLanes<T>;
  int64_t column = 0;
  for (; column + 4 * n <= channels; column += 4 * n) {
    gate_backward_strip<T, kActivation, 4>(rows, column, stride, values, y_tile, dy_tile, context,
                                           grad_context, grad_out, grad_value_bias, grad_out_bias);
  }
  for (; column < channels; column += n) {
    gate_backward_strip<T, kActivation, 1>(rows, column, stride, values, y_tile, dy_tile, context,
                                           grad_context, grad_out, grad_value_bias, grad_out_bias);
  }
}

// ---- Tokens on the lanes ----

template <typename T>
constexpr int64_t kLaneTileVectors = kLaneTile / kLanes<T>;

template <typename T>
struct LaneTile {
  int64_t tokens, channels;
  KeptLanes<const T> values;
  Rows<const T> grad_out;          // [channels, tokens], zero in the lanes past the last token
  Rows<T> grad_values;             // dy, which becomes dv
  const LaneContext<T>* contexts;  // of each vector of tokens
};

// Vectors of a tile that are gated alike, and their lanes in the order of their slices.
template <typename T>
struct LaneGroup {
  LaneContext<T> context;
  int64_t count;
  int64_t vectors[kLaneTileVectors<T>];
  int64_t lanes[kLanes<T>];
};

template <typename T>
int64_t group_lanes(const LaneTile<T>& tile, LaneGroup<T>* groups) {
  int64_t count = 0;
  for (int64_t i = 0; i * kLanes<T> < tile.tokens; ++i) {
    const LaneContext<T>& own = tile.contexts[i];
    int64_t found = 0;
    while (found < count && (groups[found].context.shared != own.shared ||
                             groups[found].context.lanes != own.lanes)) {
      ++found;
    }
    LaneGroup<T>& group = groups[found];
    if (found == count) {
      ++count;
      group.context = own;
      group.count = 0;
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        int64_t at = lane;
        for (; own.slices != nullptr && at > 0; --at) {
          if (own.slices[group.lanes[at - 1]] <= own.slices[lane]) break;
          group.lanes[at] = group.lanes[at - 1];
        }
        group.lanes[at] = lane;
      }
    }
    group.vectors[group.count++] = i;
  }
  return count;
}

// A vector of tokens of which `left` are there; zeros in the lanes past the last one.
template <typename T>
SEP_ATTN_INLINE Vec<T> load_tokens(const T* tokens, int64_t left) {
  return left >= kLanes<T> ? load(tokens) : load_first(tokens, left);
}
template <typename T>
SEP_ATTN_INLINE Vec<T> keep_tokens(Vec<T> tokens, int64_t left) {
  if (left >= kLanes<T>) return tokens;
  alignas(64) T lanes[kLanes<T>];
  store(lanes, tokens);
  return load_first(lanes, left);
}

// add_context(slice, row, sum) adds a vector of channels, from `row` on, to the gradient of a
// slice's context. y goes to rows of tokens, by way of `block` [lanes, grad_values.stride].
template <typename T, Activation kActivation, typename AddContext>
void gate_backward_lanes(const LaneTile<T>& tile, Rows<T> gated, T* block,
                         const AddContext& add_context, T* grad_value_bias, T* grad_out_bias) {
  constexpr int64_t n = kLanes<T>;
  LaneGroup<T> groups[kLaneTileVectors<T>];
  const int64_t group_count = group_lanes(tile, groups);
  const T* values[kLaneTileVectors<T>];
  for (int64_t i = 0; i * n < tile.tokens; ++i) values[i] = tile.values.at(0, i * n);
  for (int64_t row = 0; row < tile.channels; row += n) {
    Vec<T> sum_dv[n], sum_g[n], sum_dc[n];
    for (int64_t r = 0; r < n; ++r) sum_dv[r] = sum_g[r] = zero<T>();
    for (int64_t g = 0; g < group_count; ++g) {
      const LaneGroup<T>& group = groups[g];
      const LaneContext<T>& context = group.context;
      for (int64_t r = 0; r < n; ++r) {
        const T* g_row = tile.grad_out.data + (row + r) * tile.grad_out.stride;
        T* dy_row = tile.grad_values.data + (row + r) * tile.grad_values.stride;
        T* y_row = block + r * tile.grad_values.stride;
        const Vec<T> c = context.shared != nullptr ? broadcast<T>(context.shared[row + r])
                                                   : load(context.lanes + (row + r) * n);
        Vec<T> dc = zero<T>();
        for (int64_t i = 0; i < group.count; ++i) {
          const int64_t at = group.vectors[i] * n;
          const int64_t left = tile.tokens - at;
          const Vec<T> v = load_tokens(values[group.vectors[i]] + (row + r) * kValuesWidth, left);
          const Vec<T> dy = load_tokens(dy_row + at, left);
          const Vec<T> y = activate<T, kActivation>(v);
          Vec<T> dv = dy * c;
          if (kActivation == Activation::kRelu) dv = v <= zero<T>() ? zero<T>() : dv;
          // A context that is not finite reaches no lane without a token.
          dv = keep_tokens<T>(dv, left);
          store(y_row + at, y * c);
          store(dy_row + at, dv);
          dc += dy * y;
          sum_dv[r] += dv;
          sum_g[r] += load(g_row + at);
        }
        sum_dc[r] = dc;
      }
      if (context.shared != nullptr) {
        add_context(context.slice, row, reduce_sums<T>(sum_dc));
        continue;
      }
      transpose<T>(sum_dc);
      Vec<T> sum = zero<T>();
      for (int64_t i = 0; i < n; ++i) {
        const int64_t slice = context.slices[group.lanes[i]];
        sum += sum_dc[group.lanes[i]];
        if (i + 1 < n && context.slices[group.lanes[i + 1]] == slice) continue;
        add_context(slice, row, sum);
        sum = zero<T>();
      }
    }
    store(grad_value_bias + row, load(grad_value_bias + row) + reduce_sums<T>(sum_dv));
    store(grad_out_bias + row, load(grad_out_bias + row) + reduce_sums<T>(sum_g));
    copy_transposed(block, tile.grad_values.stride, n, tile.tokens, gated.data + row, gated.stride);
  }
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
