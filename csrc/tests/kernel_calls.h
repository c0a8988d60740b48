// The one place where the tests call the kernels: from tensors to the structs of kernels.h.
#pragma once

#include <optional>

#include "../dispatch.h"
#include "oracle.h"
#include "tensor.h"
#include "threads.h"

namespace sep_attn::tests {

using MaybeTensor = std::optional<Tensor>;

// Tensors of tokens are [batch, height, width, channels], of one value a token without the last.
struct GateTensors {
  Shape shape;
  Activation activation;
  Tensor v, context, grad_y;       // inputs
  Tensor y, grad_v, grad_context;  // results
};

struct PoolTensors {
  Shape shape;
  Tensor x, scores;
  MaybeTensor mask, dropout_scale;
  Tensor pooled, weight_sum, weights;  // results
  // Backward. What forward saved comes from the oracle.
  Tensor grad_pooled;
  MaybeTensor grad_weight_sum, grad_weights;
  Tensor saved_pooled, saved_weight_sum, saved_weights;
  Tensor grad_x, grad_scores;  // results
};

struct LayerTensors {
  Shape shape, prev_shape;
  Activation activation;
  Tensor x;
  MaybeTensor x_prev;
  Tensor qkv_weight;
  MaybeTensor qkv_bias;
  Tensor out_weight;
  MaybeTensor out_bias, mask, dropout_scale;
  Tensor out;                       // results
  MaybeTensor weights, statistics;  // absent: not wanted
  MaybeTensor values;               // absent: not kept; the backward pass takes what is in it
  // Memory for packed weights, zero at first; empty: not lent.
  std::vector<unsigned char>* packed_weights;
  // Backward. What forward saved comes from the oracle; a result that is absent is not wanted.
  Tensor grad_out;
  MaybeTensor grad_weights;
  Tensor saved_weights, saved_statistics;
  MaybeTensor grad_x, grad_x_prev, grad_qkv_weight, grad_qkv_bias, grad_out_weight, grad_out_bias;
};

inline TokenGrid token_grid(const Shape& shape, const Tensor& tensor) {
  return {shape.batch,      shape.height,     shape.width,      shape.channels, tensor.stride(0),
          tensor.stride(1), tensor.stride(2), tensor.stride(3), shape.patch_h,  shape.patch_w};
}

template <typename Data>
TokenValues<Data> token_values(const MaybeTensor& tensor) {
  if (!tensor) return {nullptr, 0, 0, 0};
  return {static_cast<Data*>(tensor->data()), tensor->stride(0), tensor->stride(1),
          tensor->stride(2)};
}

inline Matrix matrix(const Tensor& tensor) {
  return {tensor.data(), tensor.stride(0), tensor.stride(1)};
}

inline Vector vector(const MaybeTensor& tensor) {
  if (!tensor) return {nullptr, 0};
  return {tensor->data(), tensor->stride(0)};
}

inline void* wanted(const MaybeTensor& tensor) { return tensor ? tensor->data() : nullptr; }

inline int64_t kept_values(const Shape& shape) {
  const int64_t panels = (shape.tokens() + kValuesWidth - 1) / kValuesWidth;
  return panels * kValuesWidth * shape.channels;
}

inline void call_gate(const GateTensors& t, Threads threads) {
  GateForward arguments = {};
  arguments.dtype = kernel_type(t.v.type());
  arguments.v_grid = token_grid(t.shape, t.v);
  arguments.y_grid = token_grid(t.shape, t.y);
  arguments.v = t.v.data();
  arguments.y = t.y.data();
  arguments.context_dtype = kernel_type(t.context.type());
  arguments.context = matrix(t.context);
  arguments.activation = t.activation;
  gate_forward(arguments, parallel_for(threads));
}

inline void call_gate_backward(const GateTensors& t, Threads threads) {
  GateBackward arguments = {};
  arguments.dtype = kernel_type(t.v.type());
  arguments.grad_y_grid = token_grid(t.shape, t.grad_y);
  arguments.v_grid = token_grid(t.shape, t.v);
  arguments.grad_v_grid = token_grid(t.shape, t.grad_v);
  arguments.grad_y = t.grad_y.data();
  arguments.v = t.v.data();
  arguments.grad_v = t.grad_v.data();
  arguments.context_dtype = kernel_type(t.context.type());
  arguments.context = matrix(t.context);
  arguments.grad_context = t.grad_context.data();
  arguments.activation = t.activation;
  gate_backward(arguments, parallel_for(threads));
}

inline void call_pool(const PoolTensors& t, Threads threads) {
  ContextPoolForward arguments = {};
  arguments.dtype = kernel_type(t.x.type());
  arguments.grid = token_grid(t.shape, t.x);
  arguments.x = t.x.data();
  arguments.scores_dtype = kernel_type(t.scores.type());
  arguments.scores = {t.scores.data(), t.scores.stride(0), t.scores.stride(1), t.scores.stride(2)};
  arguments.key_padding_mask = token_values<const bool>(t.mask);
  arguments.dropout_scale = token_values<const void>(t.dropout_scale);
  arguments.pooled = t.pooled.data();
  arguments.weight_sum = t.weight_sum.data();
  arguments.weights = t.weights.data();
  context_pool_forward(arguments, parallel_for(threads));
}

inline void call_pool_backward(const PoolTensors& t, Threads threads) {
  ContextPoolBackward arguments = {};
  arguments.dtype = kernel_type(t.x.type());
  arguments.grid = token_grid(t.shape, t.x);
  arguments.grad_grid = token_grid(t.shape, t.grad_x);
  arguments.x = t.x.data();
  arguments.grad_x = t.grad_x.data();
  arguments.grad_pooled = matrix(t.grad_pooled);
  arguments.grad_weight_sum = vector(t.grad_weight_sum);
  arguments.grad_weights = token_values<const void>(t.grad_weights);
  arguments.dropout_scale = token_values<const void>(t.dropout_scale);
  arguments.pooled = t.saved_pooled.data();
  arguments.weight_sum = t.saved_weight_sum.data();
  arguments.weights = t.saved_weights.data();
  arguments.grad_scores = t.grad_scores.data();
  context_pool_backward(arguments, parallel_for(threads));
}

inline void call_layer(const LayerTensors& t, Threads threads) {
  const Tensor& source = t.x_prev ? *t.x_prev : t.x;
  AttentionForward arguments = {};
  arguments.dtype = kernel_type(t.x.type());
  arguments.grid = token_grid(t.shape, t.x);
  arguments.prev_grid = token_grid(t.prev_shape, source);
  arguments.out_grid = token_grid(t.shape, t.out);
  arguments.x = t.x.data();
  arguments.x_prev = source.data();
  arguments.out = t.out.data();
  arguments.qkv_weight = matrix(t.qkv_weight);
  arguments.qkv_bias = vector(t.qkv_bias);
  arguments.out_weight = matrix(t.out_weight);
  arguments.out_bias = vector(t.out_bias);
  arguments.key_padding_mask = token_values<const bool>(t.mask);
  arguments.dropout_scale = token_values<const void>(t.dropout_scale);
  arguments.activation = t.activation;
  arguments.weights = wanted(t.weights);
  arguments.statistics = wanted(t.statistics);
  arguments.values = wanted(t.values);
  arguments.packed_weights = t.packed_weights->empty() ? nullptr : t.packed_weights->data();
  arguments.packed_weights_bytes = static_cast<int64_t>(t.packed_weights->size());
  separable_attention_forward(arguments, parallel_for(threads));
}

inline void call_layer_backward(const LayerTensors& t, Threads threads) {
  const Tensor& source = t.x_prev ? *t.x_prev : t.x;
  AttentionBackward arguments = {};
  arguments.dtype = kernel_type(t.x.type());
  arguments.grad_out_grid = token_grid(t.shape, t.grad_out);
  arguments.grid = token_grid(t.shape, t.x);
  arguments.prev_grid = token_grid(t.prev_shape, source);
  arguments.grad_x_grid = token_grid(t.shape, t.grad_x ? *t.grad_x : t.x);
  arguments.grad_prev_grid = token_grid(t.prev_shape, t.grad_x_prev ? *t.grad_x_prev : source);
  arguments.grad_out = t.grad_out.data();
  arguments.x = t.x.data();
  arguments.x_prev = source.data();
  arguments.qkv_weight = matrix(t.qkv_weight);
  arguments.qkv_bias = vector(t.qkv_bias);
  arguments.out_weight = matrix(t.out_weight);
  arguments.grad_weights = token_values<const void>(t.grad_weights);
  arguments.dropout_scale = token_values<const void>(t.dropout_scale);
  arguments.weights = t.saved_weights.data();
  arguments.statistics = t.saved_statistics.data();
  arguments.values = wanted(t.values);
  arguments.values_on_lanes = values_on_lanes(arguments.grid);
  arguments.activation = t.activation;
  arguments.grad_x = wanted(t.grad_x);
  arguments.grad_x_prev = wanted(t.grad_x_prev);
  arguments.grad_qkv_weight = wanted(t.grad_qkv_weight);
  arguments.grad_qkv_bias = wanted(t.grad_qkv_bias);
  arguments.grad_out_weight = wanted(t.grad_out_weight);
  arguments.grad_out_bias = wanted(t.grad_out_bias);
  separable_attention_backward(arguments, parallel_for(threads));
}

}  // namespace sep_attn::tests
