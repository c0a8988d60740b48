// What the kernels compute, written as plainly as can be, in any floating type: equation 3 with its
// keys formed one by one, and its derivative by the chain rule. In a wider type than the kernel's
// it is the oracle; in the kernel's own it is what a plain program would be off by.
#pragma once

#include <cmath>
#include <vector>

#include "tensor.h"

namespace sep_attn::tests {

// Tokens [batch, height, width]; pixel (y, x) of image b belongs to the slice
// (b * patch_h + y % patch_h) * patch_w + x % patch_w.
struct Shape {
  int64_t batch, height, width, channels, patch_h, patch_w;

  int64_t tokens() const { return batch * height * width; }
  int64_t slices() const { return batch * patch_h * patch_w; }
  int64_t slice_of(int64_t token) const {
    const int64_t x = token % width, y = token / width % height, image = token / width / height;
    return (image * patch_h + y % patch_h) * patch_w + x % patch_w;
  }
};

template <typename R>
using Numbers = std::vector<R>;

template <typename R>
Values to_values(const Numbers<R>& numbers) {
  return Values(numbers.begin(), numbers.end());
}

// Empty values stand for an option that is not used.
inline bool given(const Values& values) { return !values.empty(); }

// ---- The gate ----

struct GateProblem {
  Shape shape;
  bool relu;
  Values v, context, grad_y;
};

template <typename R>
struct GateAnswer {
  Numbers<R> y, grad_v, grad_context;
};

template <typename R>
R activate(bool relu, R v) {
  return relu && v < 0 ? R(0) : v;
}

template <typename R>
GateAnswer<R> solve(const GateProblem& p) {
  const int64_t channels = p.shape.channels;
  GateAnswer<R> answer;
  answer.grad_context.resize(p.shape.slices() * channels);
  for (int64_t i = 0; i < p.shape.tokens() * channels; ++i) {
    const int64_t own = p.shape.slice_of(i / channels) * channels + i % channels;
    const R v = R(p.v[i]), c = R(p.context[own]), g = R(p.grad_y[i]);
    answer.y.push_back(activate(p.relu, v) * c);
    answer.grad_v.push_back(p.relu && v <= 0 ? R(0) : g * c);
    answer.grad_context[own] += g * activate(p.relu, v);
  }
  return answer;
}

// ---- Softmax and pooling ----

// Per token; 0 for a masked one.
template <typename R>
Numbers<R> softmax(const Shape& shape, const Numbers<R>& scores, const Values& mask) {
  const R lowest = -std::numeric_limits<R>::infinity();
  Numbers<R> highest(shape.slices(), lowest), sum(shape.slices()), weights(scores.size());
  const auto masked = [&](int64_t t) { return given(mask) && mask[t] != 0; };
  for (int64_t t = 0; t < shape.tokens(); ++t) {
    const int64_t slice = shape.slice_of(t);
    if (!masked(t) && scores[t] > highest[slice]) highest[slice] = scores[t];
  }
  for (int64_t t = 0; t < shape.tokens(); ++t) {
    const int64_t slice = shape.slice_of(t);
    if (masked(t)) continue;
    weights[t] = std::exp(scores[t] - highest[slice]);
    sum[slice] += weights[t];
  }
  for (int64_t t = 0; t < shape.tokens(); ++t) {
    if (!masked(t)) weights[t] /= sum[shape.slice_of(t)];
  }
  return weights;
}

// ds = p (dp - sum p dp), with dp the gradient of the weights before dropout.
template <typename R>
Numbers<R> softmax_gradient(const Shape& shape, const Numbers<R>& weights, const Numbers<R>& dp) {
  Numbers<R> sum(shape.slices()), gradient(weights.size());
  for (int64_t t = 0; t < shape.tokens(); ++t) {
    if (weights[t] != 0) sum[shape.slice_of(t)] += weights[t] * dp[t];
  }
  for (int64_t t = 0; t < shape.tokens(); ++t) {
    if (weights[t] != 0) gradient[t] = weights[t] * (dp[t] - sum[shape.slice_of(t)]);
  }
  return gradient;
}

struct PoolProblem {
  Shape shape;
  Values x, scores, mask, dropout_scale;
  Values grad_pooled, grad_weight_sum, grad_weights;
};

template <typename R>
struct PoolAnswer {
  Numbers<R> pooled, weight_sum, weights, grad_x, grad_scores;
};

template <typename R>
PoolAnswer<R> solve(const PoolProblem& p) {
  const int64_t channels = p.shape.channels, tokens = p.shape.tokens();
  PoolAnswer<R> answer;
  answer.weights = softmax<R>(p.shape, Numbers<R>(p.scores.begin(), p.scores.end()), p.mask);
  answer.pooled.resize(p.shape.slices() * channels);
  answer.weight_sum.resize(p.shape.slices());
  answer.grad_x.resize(tokens * channels);
  Numbers<R> dp(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    if (answer.weights[t] == 0) continue;
    const int64_t slice = p.shape.slice_of(t);
    const R scale = given(p.dropout_scale) ? R(p.dropout_scale[t]) : R(1);
    const R kept = answer.weights[t] * scale;
    answer.weight_sum[slice] += kept;
    R dkept = given(p.grad_weight_sum) ? R(p.grad_weight_sum[slice]) : R(0);
    for (int64_t d = 0; d < channels; ++d) {
      const R x = R(p.x[t * channels + d]), g = R(p.grad_pooled[slice * channels + d]);
      answer.pooled[slice * channels + d] += kept * x;
      answer.grad_x[t * channels + d] = kept * g;
      dkept += x * g;
    }
    dp[t] = dkept * scale + (given(p.grad_weights) ? R(p.grad_weights[t]) : R(0));
  }
  answer.grad_scores = softmax_gradient(p.shape, answer.weights, dp);
  return answer;
}

// ---- The layer ----

struct LayerProblem {
  Shape shape, prev_shape;  // equal in self-attention
  bool relu;
  Values x, x_prev;  // x_prev empty: self-attention
  Values qkv_weight, qkv_bias, out_weight, out_bias, mask, dropout_scale;
  Values grad_out, grad_weights;
};

template <typename R>
struct LayerAnswer {
  Numbers<R> out, weights, statistics;  // statistics [S, 2D + 1]: pooled | context | weight sum
  Numbers<R> grad_x, grad_x_prev, grad_qkv_weight, grad_qkv_bias, grad_out_weight, grad_out_bias;
};

template <typename R>
LayerAnswer<R> solve(const LayerProblem& p) {
  const int64_t D = p.shape.channels, slices = p.shape.slices();
  const int64_t tokens = p.shape.tokens(), prev_tokens = p.prev_shape.tokens();
  const bool self = !given(p.x_prev);
  const Numbers<R> x(p.x.begin(), p.x.end());
  const Numbers<R> x_prev = self ? x : Numbers<R>(p.x_prev.begin(), p.x_prev.end());
  const Numbers<R> w(p.qkv_weight.begin(), p.qkv_weight.end());
  const Numbers<R> w_out(p.out_weight.begin(), p.out_weight.end());
  const auto bias = [&](int64_t row) { return given(p.qkv_bias) ? R(p.qkv_bias[row]) : R(0); };
  const auto scale = [&](int64_t t) {
    return given(p.dropout_scale) ? R(p.dropout_scale[t]) : R(1);
  };
  // Row `row` of qkv_weight times a token, plus its bias.
  const auto project = [&](int64_t row, const R* token) {
    R sum = 0;
    for (int64_t d = 0; d < D; ++d) sum += w[row * D + d] * token[d];
    return sum + bias(row);
  };

  LayerAnswer<R> a;
  Numbers<R> scores(prev_tokens);
  for (int64_t t = 0; t < prev_tokens; ++t) scores[t] = project(0, &x_prev[t * D]);
  a.weights = softmax<R>(p.prev_shape, scores, p.mask);
  a.statistics.resize(slices * (2 * D + 1));
  Numbers<R> keys(prev_tokens * D);
  for (int64_t t = 0; t < prev_tokens; ++t) {
    if (a.weights[t] == 0) continue;  // x' may be NaN at a masked token
    R* own = &a.statistics[p.prev_shape.slice_of(t) * (2 * D + 1)];
    const R kept = a.weights[t] * scale(t);
    own[2 * D] += kept;
    for (int64_t d = 0; d < D; ++d) {
      keys[t * D + d] = project(1 + d, &x_prev[t * D]);
      own[d] += kept * x_prev[t * D + d];
      own[D + d] += kept * keys[t * D + d];
    }
  }
  Numbers<R> values(tokens * D), gated(tokens * D);
  a.out.resize(tokens * D);
  for (int64_t t = 0; t < tokens; ++t) {
    const R* context = &a.statistics[p.shape.slice_of(t) * (2 * D + 1) + D];
    for (int64_t d = 0; d < D; ++d) {
      values[t * D + d] = project(1 + D + d, &x[t * D]);
      gated[t * D + d] = activate(p.relu, values[t * D + d]) * context[d];
    }
    for (int64_t j = 0; j < D; ++j) {
      R sum = given(p.out_bias) ? R(p.out_bias[j]) : R(0);
      for (int64_t d = 0; d < D; ++d) sum += w_out[j * D + d] * gated[t * D + d];
      a.out[t * D + j] = sum;
    }
  }

  // The derivative, from the last line to the first.
  a.grad_x.resize(tokens * D);
  a.grad_x_prev.resize(self ? 0 : prev_tokens * D);
  a.grad_qkv_weight.resize((1 + 2 * D) * D);
  a.grad_qkv_bias.resize(1 + 2 * D);
  a.grad_out_weight.resize(D * D);
  a.grad_out_bias.resize(D);
  Numbers<R> grad_context(slices * D);
  // The gradient of row `row` of the projections of a token.
  const auto project_back = [&](int64_t row, R gradient, const R* token, R* grad_token) {
    a.grad_qkv_bias[row] += gradient;
    for (int64_t d = 0; d < D; ++d) {
      a.grad_qkv_weight[row * D + d] += gradient * token[d];
      grad_token[d] += gradient * w[row * D + d];
    }
  };
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t slice = p.shape.slice_of(t);
    const R* context = &a.statistics[slice * (2 * D + 1) + D];
    Numbers<R> grad_gated(D);
    for (int64_t j = 0; j < D; ++j) {
      const R g = R(p.grad_out[t * D + j]);
      a.grad_out_bias[j] += g;
      for (int64_t d = 0; d < D; ++d) {
        a.grad_out_weight[j * D + d] += g * gated[t * D + d];
        grad_gated[d] += g * w_out[j * D + d];
      }
    }
    for (int64_t d = 0; d < D; ++d) {
      const R v = values[t * D + d];
      grad_context[slice * D + d] += grad_gated[d] * activate(p.relu, v);
      const R grad_v = p.relu && v <= 0 ? R(0) : grad_gated[d] * context[d];
      project_back(1 + D + d, grad_v, &x[t * D], &a.grad_x[t * D]);
    }
  }
  Numbers<R>& grad_source = self ? a.grad_x : a.grad_x_prev;
  Numbers<R> dp(prev_tokens);
  for (int64_t t = 0; t < prev_tokens; ++t) {
    if (a.weights[t] == 0) continue;
    const R* own = &grad_context[p.prev_shape.slice_of(t) * D];
    R dkept = 0;
    for (int64_t d = 0; d < D; ++d) {
      dkept += own[d] * keys[t * D + d];
      project_back(1 + d, a.weights[t] * scale(t) * own[d], &x_prev[t * D], &grad_source[t * D]);
    }
    dp[t] = dkept * scale(t) + (given(p.grad_weights) ? R(p.grad_weights[t]) : R(0));
  }
  const Numbers<R> grad_scores = softmax_gradient(p.prev_shape, a.weights, dp);
  for (int64_t t = 0; t < prev_tokens; ++t) {
    if (a.weights[t] != 0) {
      project_back(0, grad_scores[t], &x_prev[t * D], &grad_source[t * D]);
    }
  }
  return a;
}

}  // namespace sep_attn::tests
