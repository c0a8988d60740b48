// The pooling path of the fused layer, backward: from the gradients of the pooled rows to those of
// x', of the score weight and of the score bias; token by token or, where pixels are contiguous,
// with tokens on the vector lanes.
#pragma once

#include <type_traits>

#include "attention_pool.h"
#include "kernels.h"
#include "products.h"
#include "scratch.h"
#include "simd.h"
#include "tokens.h"
#include "workers.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

// target[d] = a[d] scale_a + b[d] scale_b, added to what is there when `add`.
template <typename T>
SEP_ATTN_INLINE void combine_scaled(const T* a, T scale_a, const T* b, T scale_b, int64_t count,
                                    bool add, T* target) {
  for (int64_t d = 0; d < count; d += kLanes<T>) {
    const int64_t own = smaller(kLanes<T>, count - d);
    if (own == kLanes<T>) {
      const Vec<T> sum = load(a + d) * scale_a + load(b + d) * scale_b;
      store(target + d, add ? load(target + d) + sum : sum);
    } else {
      const Vec<T> sum = load_first(a + d, own) * scale_a + load_first(b + d, own) * scale_b;
      store_first(target + d, add ? load_first(target + d, own) + sum : sum, own);
    }
  }
}

// In self-attention grad_x holds the terms of both paths.
inline bool is_self_attention(const AttentionBackward& op) {
  return op.x == op.x_prev && op.grad_x_prev == nullptr;
}

// What the value path leaves to the pooling path. Rows are padded with zeros up to `stride`.
template <typename T>
struct PoolBackwardOperands {
  int64_t stride;
  const T* score_weight;  // [stride]: w_I
  const T* pooled;        // [S, stride]: xbar
  const T* grad_pooled;   // [S, stride]: dxbar
  T* slice_sums;          // [S, 2]: b_K . dc, and room for sum_n p dp
  T* delayed_grad_x;      // [tokens, D]: the value path's share of grad_x; null: it is in grad_x
};

template <typename S>
class PoolBackwardPass {
  using T = Accumulate<S>;

 public:
  PoolBackwardPass(const AttentionBackward& op, const PoolBackwardOperands<T>& operands,
                   int64_t workers)
      : op_(op),
        operands_(operands),
        self_(is_self_attention(op)),
        channels_(op.grid.channels),
        slices_(op.prev_grid.slices()),
        tokens_(op.prev_grid.batch * op.prev_grid.height * op.prev_grid.width),
        padded_(operands.stride),
        tile_stride_(padded_ + kLanes<T>),
        pools_strips_(pool_strips()),
        parts_(pools_strips_ ? strips() * strip_segments() : parts_in(tokens_, 64, workers)),
        sums_(parts_ * (padded_ + kLanes<T>)) {}

  bool wanted() const {
    return grad_x() != nullptr || op_.grad_qkv_weight != nullptr || op_.grad_qkv_bias != nullptr;
  }

  // `scratch` is the worker's own: room for two tiles of kTileRows tokens and for
  // [channels, 6, lanes].
  void run(Worker& worker, T* scratch) const {
    worker.share_out(slices_, [&](int64_t slice) { sum_score_gradient(slice); });
    worker.wait();
    // The last tokens of the value path are in cache.
    worker.share_out(
        parts_,
        [&](int64_t part) {
          if (pools_strips_) {
            pool_strip_part(part, scratch);
          } else {
            pool_part(part, scratch);
          }
        },
        Order::kBackward);
    worker.wait();
    worker.share_out(1, [&](int64_t) { finish_scores(); });
  }

 private:
  // ---- Where things are ----

  const T* pooled(int64_t slice) const { return operands_.pooled + slice * padded_; }
  const T* grad_pooled(int64_t slice) const { return operands_.grad_pooled + slice * padded_; }
  T key_bias_product(int64_t slice) const { return operands_.slice_sums[2 * slice]; }
  T& score_sum(int64_t slice) const { return operands_.slice_sums[2 * slice + 1]; }
  T weight_sum(int64_t slice) const {
    return static_cast<const T*>(op_.statistics)[(slice + 1) * (2 * channels_ + 1) - 1];
  }

  // Of a part, the gradients of w_I and b_I.
  T* score_weight_sum(int64_t part) const { return sums_.get() + part * (padded_ + kLanes<T>); }
  T& score_bias_sum(int64_t part) const { return score_weight_sum(part)[padded_]; }

  S* grad_x() const { return static_cast<S*>(self_ ? op_.grad_x : op_.grad_x_prev); }  // of x'
  const TokenGrid& grad_grid() const { return self_ ? op_.grad_x_grid : op_.grad_prev_grid; }

  // ---- What the tokens of a slice share ----

  void sum_score_gradient(int64_t index) const {
    T sum = dot(pooled(index), grad_pooled(index), channels_) +
            weight_sum(index) * key_bias_product(index);
    if (op_.grad_weights.data != nullptr) {
      const TokenGrid& grid = op_.prev_grid;
      const Slice slice = make_slice(grid, index);
      const auto p =
          slice_values<const T>(grid, slice, contiguous_values<const void>(grid, op_.weights));
      const auto grad = slice_values<const T>(grid, slice, op_.grad_weights);
      for (int64_t n = 0; n < grid.slice_tokens(); ++n) {
        if (p[n] != 0) sum += p[n] * grad[n];
      }
    }
    score_sum(index) = sum;
  }

  // ---- Token by token ----

  void pool_part(int64_t part, T* scratch) const {
    const Range range = share(tokens_, part, parts_);
    for (int64_t d = 0; d < padded_ + kLanes<T>; ++d) score_weight_sum(part)[d] = 0;
    for (int64_t end = range.end; end > range.begin; end -= kTileRows) {
      pool_tile(part, {larger(range.begin, end - kTileRows), end}, scratch);
    }
  }

  void pool_tile(int64_t part, Range tokens, T* x_tile) const {
    const int64_t first = tokens.begin;
    const int64_t count = tokens.count();
    const Rows<const T> x = read_rows(op_.prev_grid, static_cast<const S*>(op_.x_prev), first,
                                      count, x_tile, tile_stride_);
    bool in_place = false;
    const Rows<T> grad = gradient_rows(tokens, x_tile + kTileRows * tile_stride_, &in_place);

    const T* rows[kTileRows + kLanes<T>];
    int64_t slices[kTileRows];
    TokenWalk walk(op_.prev_grid, first);
    for (int64_t t = 0; t < count; ++t, walk.next()) {
      rows[t] = x.data + t * x.stride;
      slices[t] = walk.slice();
    }
    for (int64_t t = count; t < count + kLanes<T>; ++t) rows[t] = x.data;
    alignas(64) T products[kTileRows + 2 * kLanes<T>];  // x' . dxbar
    for (int64_t t = 0; t < count;) {
      int64_t end = t + 1;
      while (end < count && slices[end] == slices[t]) ++end;
      const T* direction = grad_pooled(slices[t]);
      if (end - t > kLanes<T> / 4) {
        dot_rows(rows + t, end - t, direction, channels_, int64_t{0}, products + t);
      } else {
        for (int64_t i = t; i < end; ++i) products[i] = dot(rows[i], direction, channels_);
      }
      t = end;
    }

    T score_grads[kTileRows];
    int64_t kept = 0;  // tokens with a weight; whatever x' holds elsewhere stays out
    walk = TokenWalk(op_.prev_grid, first);
    for (int64_t t = 0; t < count; ++t, walk.next()) {
      const auto value_at = [&](const TokenValues<const void>& values) {
        const TokenPosition& at = walk.position();
        return static_cast<const T*>(
            values.data)[at.image * values.stride_batch + at.y * values.stride_height +
                         at.x * values.stride_width];
      };
      const T p = static_cast<const T*>(op_.weights)[first + t];
      T* grad_row = grad.data + t * grad.stride;
      if (p == 0) {
        for (int64_t d = 0; grad_x() && !self_ && d < channels_; ++d) grad_row[d] = 0;
        continue;
      }
      const T scale = op_.dropout_scale.data != nullptr ? value_at(op_.dropout_scale) : T{1};
      T dp = scale * (products[t] + key_bias_product(slices[t]));
      if (op_.grad_weights.data != nullptr) dp += value_at(op_.grad_weights);
      const T score_grad = p * (dp - score_sum(slices[t]));
      score_bias_sum(part) += score_grad;
      rows[kept] = rows[t];
      score_grads[kept++] = score_grad;
      if (grad_x() == nullptr) continue;
      combine_scaled(grad_pooled(slices[t]), p * scale, operands_.score_weight, score_grad,
                     channels_, self_, grad_row);
    }
    add_weighted_rows(rows, score_grads, kept, channels_, T{1}, score_weight_sum(part));
    if (grad_x() != nullptr && !in_place) {
      scatter_tokens(grad_grid(), grad_x(), first, count, grad.data, grad.stride);
    }
  }

  // The rows that receive the gradient of x': with the value path's share in self-attention.
  Rows<T> gradient_rows(Range tokens, T* tile, bool* in_place) const {
    if (operands_.delayed_grad_x != nullptr) {
      return {operands_.delayed_grad_x + tokens.begin * channels_, channels_};
    }
    if constexpr (std::is_same<S, T>::value) {
      if (self_ && op_.grad_x != nullptr) {
        const TokenGrid& grid = grad_grid();
        *in_place = tokens_in_place<S>(grid, tokens.begin, tokens.count());
        if (*in_place) {
          return {grad_x() + token_offset(grid, token_position(grid, tokens.begin)),
                  grid.stride_width};
        }
        gather_tokens(grid, grad_x(), tokens.begin, tokens.count(), tile, tile_stride_, channels_);
      }
    }
    return {tile, tile_stride_};
  }

  // ---- The same with tokens on the lanes, vectors of a strip ----

  bool pool_strips() const {
    const auto contiguous = [](const TokenGrid& grid) {
      return grid.stride_width == 1 && grid.stride_channel != 1;
    };
    return std::is_same<S, T>::value && contiguous(op_.prev_grid) &&
           kLanes<T> % op_.prev_grid.patch_w == 0 &&
           (grad_x() == nullptr || contiguous(grad_grid()));
  }
  int64_t strips() const { return op_.prev_grid.batch * op_.prev_grid.patch_h; }
  int64_t strip_segments() const {
    return segments_in(op_.prev_grid.slice_tokens() * op_.prev_grid.patch_w, channels_);
  }

  void pool_strip_part(int64_t part, T* scratch) const {
    const Strip strip = make_strip<T>(op_.prev_grid, part / strip_segments());
    with_strip_vectors(strip.vectors, [&](auto vectors) {
      pool_strip_part<decltype(vectors)::value>(part, strip, scratch);
    });
  }

  // kVectors at a time.
  template <int kVectors>
  void pool_strip_part(int64_t part, const Strip& strip, T* scratch) const {
    constexpr int64_t lanes = kLanes<T>;
    const TokenGrid& grid = op_.prev_grid;
    const int64_t strip_index = part / strip_segments();
    const Range range = share(strip.vectors, part % strip_segments(), strip_segments());
    const int64_t first_slice = strip_index * grid.patch_w;
    const T* of_slices = grad_pooled(first_slice);  // dxbar of the strip's slices
    T* directions = scratch;                        // [channels, lanes]: that of each lane's slice
    T* sums = directions + channels_ * lanes;       // [channels, lanes]: of dw_I
    const StripCopy<T, kVectors> copy(sums + channels_ * lanes);  // x'
    alignas(64) T biases[lanes], score_sums[lanes], values[lanes];
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t slice = first_slice + i % grid.patch_w;
      biases[i] = key_bias_product(slice);
      score_sums[i] = score_sum(slice);
    }
    IntVec<T> of_column[lanes];  // the lanes of each slice
    for (int64_t px = 0; px < grid.patch_w; ++px) {
      for (int64_t i = 0; i < lanes; ++i) of_column[px][i] = i % grid.patch_w == px ? -1 : 0;
    }
    for (int64_t d = 0; d < channels_; ++d) {
      store(sums + d * lanes, zero<T>());
      Vec<T> direction = broadcast<T>(of_slices[d]);
      for (int64_t px = 1; px < grid.patch_w; ++px) {
        direction = of_column[px] ? broadcast<T>(of_slices[px * padded_ + d]) : direction;
      }
      store(directions + d * lanes, direction);
    }
    Vec<T> bias_sum = zero<T>();
    const auto weights = contiguous_values<const void>(grid, op_.weights);
    for (int64_t first = range.begin; first < range.end; first += kVectors) {
      Vec<T> weight[kVectors], score_grad[kVectors];
      const T* x[kVectors];
      T* grad[kVectors];
      int64_t counts[kVectors];
      bool whole = true;
      StripVector places[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const bool there = first + v < range.end;
        places[v] = strip_vector<T>(strip, there ? first + v : first);
        counts[v] = there ? places[v].count : 0;
        whole = whole && counts[v] == lanes;
        x[v] = static_cast<const T*>(op_.x_prev) + offset(grid, strip, places[v]);
        grad[v] = grad_x() == nullptr
                      ? nullptr
                      : reinterpret_cast<T*>(grad_x()) + offset(grad_grid(), strip, places[v]);
      }
      Vec<T> products[kVectors];
      const auto direction_of = [&](int64_t d) { return load(directions + d * lanes); };
      if (whole) {
        dot_strip<true, kVectors>(x, counts, grid.stride_channel, direction_of, channels_, copy,
                                  products);
      } else {
        dot_strip<false, kVectors>(x, counts, grid.stride_channel, direction_of, channels_, copy,
                                   products);
      }
      for (int v = 0; v < kVectors; ++v) {
        weight[v] = score_grad[v] = zero<T>();
        if (counts[v] == 0) continue;
        const Vec<T> p =
            load_first(static_cast<const T*>(weights.data) + strip.image * weights.stride_batch +
                           places[v].y * weights.stride_height + places[v].x,
                       counts[v]);
        const auto read = [&](const TokenValues<const void>& source) {
          const T* data = static_cast<const T*>(source.data);
          read_strip_values(strip, places[v], source, T{0}, values,
                            [&](int64_t at) { return data[at]; });
          return load(values);
        };
        weight[v] = p;
        Vec<T> dp = products[v] + load(biases);
        if (op_.dropout_scale.data != nullptr) {
          const Vec<T> scale = read(op_.dropout_scale);
          weight[v] *= scale;
          dp *= scale;
        }
        if (op_.grad_weights.data != nullptr) dp += read(op_.grad_weights);
        // Tokens with no weight stay out, whatever x' holds there.
        score_grad[v] = p != zero<T>() ? p * (dp - load(score_sums)) : zero<T>();
        bias_sum += score_grad[v];
        if (op_.dropout_scale.data == nullptr && whole) continue;
        weight[v] = p != zero<T>() ? weight[v] : zero<T>();
      }
      for (int64_t d = 0; d < channels_; ++d) {
        const Vec<T> direction = direction_of(d);
        const Vec<T> score_weight_lanes = broadcast<T>(operands_.score_weight[d]);
        Vec<T> sum = zero<T>();
        SEP_ATTN_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const Vec<T> value = load(copy.vectors[v] + d * copy.stride);
          sum += score_grad[v] * (score_grad[v] != zero<T>() ? value : zero<T>());
          if (grad[v] == nullptr || counts[v] == 0) continue;
          T* at = grad[v] + d * grad_grid().stride_channel;
          Vec<T> own = direction * weight[v] + score_weight_lanes * score_grad[v];
          if (self_) own += whole ? load(at) : load_first(at, counts[v]);
          if (whole) {
            store(at, own);
          } else {
            store_first(at, own, counts[v]);
          }
        }
        store(sums + d * lanes, load(sums + d * lanes) + sum);
      }
    }
    T* result = score_weight_sum(part);
    for (int64_t d = 0; d < channels_; d += lanes) {
      const int64_t count = smaller(lanes, channels_ - d);
      Vec<T> rows[lanes];
      for (int64_t i = 0; i < lanes; ++i)
        rows[i] = load(sums + (d + smaller(i, count - 1)) * lanes);
      store_first(result + d, reduce_sums<T>(rows), count);
    }
    score_bias_sum(part) = reduce_sum<T>(bias_sum);
  }

  static int64_t offset(const TokenGrid& grid, const Strip& strip, const StripVector& at) {
    return strip.image * grid.stride_batch + at.y * grid.stride_height + at.x;
  }

  // ---- Sums over the parts, in their order ----

  void finish_scores() const {
    if (op_.grad_qkv_bias != nullptr) {
      T sum = 0;
      for (int64_t part = 0; part < parts_; ++part) sum += score_bias_sum(part);
      store_one(static_cast<S*>(op_.grad_qkv_bias), sum);
    }
    for (int64_t d = 0; op_.grad_qkv_weight != nullptr && d < channels_; ++d) {
      T sum = 0;
      for (int64_t part = 0; part < parts_; ++part) sum += score_weight_sum(part)[d];
      store_one(static_cast<S*>(op_.grad_qkv_weight) + d, sum);
    }
  }

  const AttentionBackward& op_;
  const PoolBackwardOperands<T> operands_;
  const bool self_;
  const int64_t channels_, slices_, tokens_;
  const int64_t padded_, tile_stride_;  // a tile's rows spread over cache sets
  const bool pools_strips_;
  const int64_t parts_;  // of the tokens; or segments of all strips
  const Buffer<T> sums_;
};

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
