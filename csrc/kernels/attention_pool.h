// The context of a slice: scores, softmax with a running maximum, weighted sum, projection.
#pragma once

#include "kernels.h"
#include "products.h"
#include "scratch.h"
#include "simd.h"
#include "tokens.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

// sum_d a[d] b[d]
template <typename S, typename T>
SEP_ATTN_INLINE T dot(const S* a, const T* b, int64_t count) {
  constexpr int64_t n = kLanes<T>;
  Vec<T> sum = zero<T>();
  int64_t d = 0;
  for (; d + n <= count; d += n) sum += load(a + d) * load(b + d);
  if (d < count) sum += load_first(a + d, count - d) * load_first(b + d, count - d);
  return reduce_sum<T>(sum);
}

// scores[i] = sum_d rows[i][d] weight[d] for i < count; rows and scores hold whole vectors, the
// rows past the last one may be any readable row.
template <typename T>
SEP_ATTN_INLINE void dot_rows(const T* const* rows, int64_t count, const T* weight,
                              int64_t channels, int64_t ahead, T* scores) {
  constexpr int kGroup = kLanes<T> < 8 ? kLanes<T> : 8;
  for (int64_t first = 0; first < count; first += kLanes<T>) {
    Vec<T> sums[kLanes<T>];
    SEP_ATTN_UNROLL
    for (int group = 0; group < kLanes<T>; group += kGroup) {
      const T* const* own = rows + first + group;
      Vec<T> own_sums[kGroup];
      SEP_ATTN_UNROLL
      for (int i = 0; i < kGroup; ++i) own_sums[i] = zero<T>();
      int64_t d = 0;
      for (; d + kLanes<T> <= channels; d += kLanes<T>) {
        const Vec<T> w = load(weight + d);
        SEP_ATTN_UNROLL
        for (int i = 0; i < kGroup; ++i) {
          own_sums[i] += w * load(own[i] + d);
          if (kVectorBytes == 64) __builtin_prefetch(own[i] + d + ahead, 0, 2);
        }
      }
      if (d < channels) {
        const Vec<T> w = load_first(weight + d, channels - d);
        SEP_ATTN_UNROLL
        for (int i = 0; i < kGroup; ++i) own_sums[i] += w * load_first(own[i] + d, channels - d);
      }
      SEP_ATTN_UNROLL
      for (int i = 0; i < kGroup; ++i) sums[group + i] = own_sums[i];
    }
    store(scores + first, reduce_sums<T>(sums));
  }
}

// target[d] = scale * target[d] + sum_i weights[i] rows[i][d] over kVectors vectors of channels
template <int kVectors, typename T>
SEP_ATTN_INLINE void add_weighted_rows(const T* const* rows, const T* weights, int64_t count,
                                       int64_t first, T scale, T* target) {
  constexpr int64_t n = kLanes<T>;
  constexpr int kChains = 8 / kVectors;  // independent sums: the additions overlap
  Vec<T> sums[kChains][kVectors];
  SEP_ATTN_UNROLL
  for (int v = 0; v < kVectors; ++v) sums[0][v] = load(target + first + v * n) * scale;
  SEP_ATTN_UNROLL
  for (int j = 1; j < kChains; ++j) {
    SEP_ATTN_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[j][v] = zero<T>();
  }
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    SEP_ATTN_UNROLL
    for (int j = 0; j < kChains; ++j) {
      const Vec<T> w = broadcast<T>(weights[i + j]);
      SEP_ATTN_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[j][v] += w * load(rows[i + j] + first + v * n);
    }
  }
  for (; i < count; ++i) {
    const Vec<T> w = broadcast<T>(weights[i]);
    SEP_ATTN_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[0][v] += w * load(rows[i] + first + v * n);
  }
  SEP_ATTN_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    SEP_ATTN_UNROLL
    for (int j = 1; j < kChains; ++j) sums[0][v] += sums[j][v];
    store(target + first + v * n, sums[0][v]);
  }
}

// target[d] += scale * a[d]
template <typename S, typename T>
SEP_ATTN_INLINE void add_scaled(const S* a, T scale, int64_t count, T* target) {
  constexpr int64_t n = kLanes<T>;
  int64_t d = 0;
  for (; d + n <= count; d += n) store(target + d, load(target + d) + load(a + d) * scale);
  if (d < count) {
    const Vec<T> sum = load_first(target + d, count - d) + load_first(a + d, count - d) * scale;
    store_first(target + d, sum, count - d);
  }
}

template <typename T>
void add_weighted_rows(const T* const* rows, const T* weights, int64_t count, int64_t channels,
                       T scale, T* target) {
  constexpr int64_t n = kLanes<T>;
  int64_t d = 0;
  for (; d + 8 * n <= channels; d += 8 * n) {
    add_weighted_rows<8>(rows, weights, count, d, scale, target);
  }
  for (; d + 4 * n <= channels; d += 4 * n) {
    add_weighted_rows<4>(rows, weights, count, d, scale, target);
  }
  for (; d + n <= channels; d += n) {
    add_weighted_rows<1>(rows, weights, count, d, scale, target);
  }
  if (d < channels) {
    Vec<T> sum = load_first(target + d, channels - d) * scale;
    for (int64_t i = 0; i < count; ++i) {
      sum += broadcast<T>(weights[i]) * load_first(rows[i] + d, channels - d);
    }
    store_first(target + d, sum, channels - d);
  }
}

// Softmax partials of a segment of a slice; `pooled` is relative to exp(-maximum).
template <typename T>
struct Partial {
  T maximum;       // of the scores
  T sum;           // of exp(score - maximum)
  T weighted;      // the same with dropout
  int64_t tokens;  // not left out
};

constexpr int64_t kChunkTokens = 64;

// Segments of a slice, by its size alone: results do not depend on the number of threads.
constexpr int64_t segments_in(int64_t tokens, int64_t channels) {
  return smaller(smaller(64, tokens), larger(1, tokens * channels / 16384));
}

template <typename S>
struct PoolOperands {
  using T = Accumulate<S>;
  TokenGrid grid;
  const S* x;
  const T* score_weight;  // [D]
  T score_bias;
  TokenValues<const bool> key_padding_mask;
  TokenValues<const void> dropout_scale;
  T* weights;  // receives the scores
};

// Takes a chunk's scores, in whole vectors and -inf where there is no token, into the running
// softmax: turns them into weights relative to the new maximum, with dropout (null: none), and
// returns the factor for what was summed before.
template <typename T>
SEP_ATTN_INLINE T update_softmax(T* scores, int64_t lane_count, const T* dropout,
                                 Partial<T>& partial) {
  const T lowest = -static_cast<T>(__builtin_huge_val());
  Vec<T> lane_highest = broadcast<T>(partial.maximum);
  for (int64_t i = 0; i < lane_count; i += kLanes<T>) {
    lane_highest = maximum(lane_highest, load(scores + i));
  }
  const T highest = reduce_maximum<T>(lane_highest);
  const T shift = highest == lowest ? T{0} : highest;  // exp(-inf) is 0, exp(-inf + inf) is NaN
  const T scale = exponential_one<T>(partial.maximum - shift);
  Vec<T> sum = zero<T>(), weighted = zero<T>();
  for (int64_t i = 0; i < lane_count; i += kLanes<T>) {
    Vec<T> weight = exponential<T>(load(scores + i) - shift);
    sum += weight;
    if (dropout != nullptr) weight *= load(dropout + i);
    weighted += weight;
    store(scores + i, weight);
  }
  partial.sum = partial.sum * scale + reduce_sum<T>(sum);
  partial.weighted = partial.weighted * scale + reduce_sum<T>(weighted);
  partial.maximum = highest;
  return scale;
}

// Pools tokens [range) of a slice with a running maximum.
template <typename S>
Partial<Accumulate<S>> pool_rows(const PoolOperands<S>& op, int64_t slice_index, Range range,
                                 Accumulate<S>* tile, int64_t tile_stride, Accumulate<S>* pooled) {
  using T = Accumulate<S>;
  const int64_t channels = op.grid.channels;
  const Slice slice = make_slice(op.grid, slice_index);
  const auto mask = slice_values<const bool>(op.grid, slice, op.key_padding_mask);
  const auto dropout = slice_values<const T>(op.grid, slice, op.dropout_scale);
  const auto scores_out =
      slice_values<T>(op.grid, slice, contiguous_values<void>(op.grid, op.weights));
  const int64_t chunk = smaller(kChunkTokens, larger(8, 8192 / channels));

  const T lowest = -static_cast<T>(__builtin_huge_val());
  Partial<T> partial = {lowest, 0, 0, 0};
  for (int64_t d = 0; d < channels; ++d) pooled[d] = 0;
  const T* rows[kChunkTokens];
  int64_t tokens[kChunkTokens];
  alignas(64) T scores[kChunkTokens], scales[kChunkTokens];
  for (int64_t first = range.begin; first < range.end; first += chunk) {
    const int64_t length = smaller(chunk, range.end - first);
    const Rows<const T> source =
        read_rows(slice.grid, op.x + slice.offset, first, length, tile, tile_stride);
    int64_t count = 0;
    for (int64_t i = 0; i < length; ++i) {
      if (mask.data != nullptr && mask[first + i]) continue;
      rows[count] = source.data + i * source.stride;
      tokens[count++] = first + i;
    }
    if (count == 0) continue;
    const int64_t lane_count = round_up(count, kLanes<T>);
    for (int64_t i = count; i < lane_count; ++i) rows[i] = rows[0];
    dot_rows(rows, count, op.score_weight, channels, chunk * source.stride, scores);
    for (int64_t i = 0; i < lane_count; ++i) {
      scores[i] = i < count ? scores[i] + op.score_bias : lowest;
    }
    if (mask.data == nullptr && scores_out.uniform() && scores_out.stride_width == 1) {
      copy_rows(scores, 0, 1, count, scores_out.data + first, 0);
    } else {
      for (int64_t i = 0; i < count; ++i) scores_out[tokens[i]] = scores[i];
    }
    for (int64_t i = 0; dropout.data != nullptr && i < lane_count; ++i) {
      scales[i] = i < count ? dropout[tokens[i]] : T{0};
    }
    const T scale =
        update_softmax(scores, lane_count, dropout.data != nullptr ? scales : nullptr, partial);
    add_weighted_rows(rows, scores, count, channels, scale, pooled);
    partial.tokens += count;
  }
  return partial;
}

// scores[t] = sum_d weight[d] x[d, t] for kVectors vectors of tokens.
template <int kVectors, typename S, typename T>
SEP_ATTN_INLINE void dot_lanes(const S* x, int64_t stride, const T* weight, int64_t channels,
                               int64_t count, T* scores) {
  Vec<T> sums[kVectors];
  SEP_ATTN_UNROLL
  for (int v = 0; v < kVectors; ++v) sums[v] = zero<T>();
  for (int64_t d = 0; d < channels; ++d) {
    const Vec<T> w = broadcast<T>(weight[d]);
    SEP_ATTN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const S* at = x + d * stride + v * kLanes<T>;
      sums[v] += w * (kVectors > 1 ? load(at) : load_first(at, count));
    }
  }
  SEP_ATTN_UNROLL
  for (int v = 0; v < kVectors; ++v) store(scores + v * kLanes<T>, sums[v]);
}

// The same as pool_rows for contiguous tokens, kept on the lanes as they lie.
template <typename S>
Partial<Accumulate<S>> pool_lanes(const PoolOperands<S>& op, int64_t slice_index, Range range,
                                  Accumulate<S>* pooled) {
  using T = Accumulate<S>;
  constexpr int64_t lanes = kLanes<T>;
  constexpr int64_t chunk = 8 * lanes;
  const int64_t channels = op.grid.channels;
  const Slice slice = make_slice(op.grid, slice_index);
  const int64_t stride = slice.grid.stride_channel;
  const auto mask = slice_values<const bool>(op.grid, slice, op.key_padding_mask);
  const auto dropout = slice_values<const T>(op.grid, slice, op.dropout_scale);
  const auto scores_out =
      slice_values<T>(op.grid, slice, contiguous_values<void>(op.grid, op.weights));
  const bool contiguous_scores = scores_out.uniform() && scores_out.stride_width == 1;

  const T lowest = -static_cast<T>(__builtin_huge_val());
  Partial<T> partial = {lowest, 0, 0, 0};
  for (int64_t d = 0; d < channels; ++d) pooled[d] = 0;
  alignas(64) T scores[chunk], scales[chunk], kept[chunk];
  for (int64_t first = range.begin; first < range.end; first += chunk) {
    const int64_t count = smaller(chunk, range.end - first);
    const int64_t lane_count = round_up(count, lanes);
    const int64_t whole = count / lanes * lanes;
    const S* x = op.x + slice.offset + first;
    if (count == chunk) {
      dot_lanes<8>(x, stride, op.score_weight, channels, count, scores);
    } else {
      int64_t t = 0;
      for (; t + 4 * lanes <= count; t += 4 * lanes) {
        dot_lanes<4>(x + t, stride, op.score_weight, channels, count, scores + t);
      }
      for (; t < count; t += lanes) {
        dot_lanes<1>(x + t, stride, op.score_weight, channels, smaller(lanes, count - t),
                     scores + t);
      }
    }
    int64_t tokens = count;
    for (int64_t i = 0; i < lane_count; ++i) {
      scores[i] = i < count ? scores[i] + op.score_bias : lowest;
    }
    for (int64_t i = 0; mask.data != nullptr && i < lane_count; ++i) {
      const bool keep = i < count && !mask[first + i];
      kept[i] = keep ? 1 : 0;
      if (keep) continue;
      scores[i] = lowest;
      if (i < count) --tokens;
    }
    if (tokens == 0) continue;
    if (contiguous_scores) {
      copy_rows(scores, 0, 1, count, scores_out.data + first, 0);
    } else {
      for (int64_t i = 0; i < count; ++i) scores_out[first + i] = scores[i];
    }
    for (int64_t i = 0; dropout.data != nullptr && i < lane_count; ++i) {
      scales[i] = i < count ? dropout[first + i] : T{0};
    }
    const T scale =
        update_softmax(scores, lane_count, dropout.data != nullptr ? scales : nullptr, partial);
    for (int64_t d = 0; d < channels; d += lanes) {
      Vec<T> sums[lanes];
      SEP_ATTN_UNROLL
      for (int i = 0; i < lanes; ++i) sums[i] = zero<T>();
      for (int64_t i = 0; i < smaller(lanes, channels - d); ++i) {
        const S* row = x + (d + i) * stride;
        Vec<T> sum = zero<T>();
        for (int64_t t = 0; t < lane_count; t += lanes) {
          Vec<T> value = t < whole ? load(row + t) : load_first(row + t, count - t);
          if (mask.data != nullptr) value = load(kept + t) != 0 ? value : zero<T>();
          sum += load(scores + t) * value;
        }
        sums[i] = sum;
      }
      const int64_t own = smaller(lanes, channels - d);
      store_first(pooled + d, load_first(pooled + d, own) * scale + reduce_sums<T>(sums), own);
    }
    partial.tokens += tokens;
  }
  return partial;
}

template <typename S>
Partial<Accumulate<S>> pool_segment(const PoolOperands<S>& op, int64_t slice, Range range,
                                    Accumulate<S>* tile, int64_t tile_stride,
                                    Accumulate<S>* pooled) {
  const TokenGrid& grid = op.grid;
  const bool contiguous_tokens =
      grid.stride_width == 1 && grid.patch_w == 1 &&
      (grid.height == grid.patch_h || grid.stride_height * grid.patch_h == grid.width);
  if (contiguous_tokens && grid.stride_channel != 1) return pool_lanes(op, slice, range, pooled);
  return pool_rows(op, slice, range, tile, tile_stride, pooled);
}

// The softmax of a slice, as needed to turn scores into weights.
template <typename T>
struct Softmax {
  T maximum;
  T inverse_sum;  // 0 when every token is left out
};

// Combines the partials of a slice in order; pooled [D] and weight_sum receive normalised values.
template <typename T>
Softmax<T> combine_partials(const Partial<T>* partials, const T* partial_pooled,
                            int64_t partial_stride, int64_t segments, int64_t channels, T* pooled,
                            T* weight_sum) {
  T highest = -__builtin_huge_val();
  int64_t tokens = 0;
  for (int64_t i = 0; i < segments; ++i) {
    tokens += partials[i].tokens;
    if (partials[i].maximum > highest) highest = partials[i].maximum;
  }
  for (int64_t d = 0; d < channels; ++d) pooled[d] = 0;
  *weight_sum = 0;
  if (tokens == 0) return {0, 0};
  T sum = 0, weighted = 0;
  for (int64_t i = 0; i < segments; ++i) {
    if (partials[i].tokens == 0) continue;
    const T scale = exponential_one<T>(partials[i].maximum - highest);
    sum += scale * partials[i].sum;
    weighted += scale * partials[i].weighted;
    const T* part = partial_pooled + i * partial_stride;
    for (int64_t d = 0; d < channels; ++d) pooled[d] += scale * part[d];
  }
  const T inverse = 1 / sum;
  for (int64_t d = 0; d < channels; ++d) pooled[d] *= inverse;
  *weight_sum = weighted / sum;
  return {highest, inverse};
}

// Turns the scores of tokens [range) of a slice into softmax weights, in place.
template <typename S>
void normalise_weights(const PoolOperands<S>& op, int64_t slice_index, Range range,
                       Softmax<Accumulate<S>> softmax) {
  using T = Accumulate<S>;
  const Slice slice = make_slice(op.grid, slice_index);
  const auto mask = slice_values<const bool>(op.grid, slice, op.key_padding_mask);
  const auto weights =
      slice_values<T>(op.grid, slice, contiguous_values<void>(op.grid, op.weights));
  if (weights.uniform() && weights.stride_width == 1 && mask.data == nullptr) {
    T* data = weights.data;
    for (int64_t n = range.begin; n < range.end; n += kLanes<T>) {
      const int64_t count = smaller(kLanes<T>, range.end - n);
      const Vec<T> score = load_first(data + n, count);
      store_first(data + n, exponential<T>(score - softmax.maximum) * softmax.inverse_sum, count);
    }
    return;
  }
  for (int64_t n = range.begin; n < range.end; ++n) {
    const bool left_out = mask.data != nullptr && mask[n];
    weights[n] =
        left_out ? T{0} : exponential_one<T>(weights[n] - softmax.maximum) * softmax.inverse_sum;
  }
}

// contexts[s][j] = sum_d key_weight[j, d] pooled[s][d] + weight_sum[s] key_bias[j], for kLanes rows
// j of kSlices slices of `statistics` (pooled | context | weight_sum).
template <int kSlices, typename S, typename T>
SEP_ATTN_INLINE void project_rows(const WeightRows<S>& qkv_weight, const T* key_bias,
                                  int64_t channels, int64_t row, int64_t count, T* statistics) {
  constexpr int kGroup = 4;  // rows at a time: kGroup * kSlices sums stay in registers
  const int64_t stride = 2 * channels + 1;
  alignas(64) T results[kSlices][kLanes<T>];
  for (int64_t first = 0; first < count; first += kGroup) {
    const S* weights[kGroup];
    SEP_ATTN_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      weights[i] = qkv_weight.row(1 + row + smaller(first + i, count - 1));
    }
    Vec<T> sums[kSlices][kGroup];
    SEP_ATTN_UNROLL
    for (int s = 0; s < kSlices; ++s) {
      SEP_ATTN_UNROLL
      for (int i = 0; i < kGroup; ++i) sums[s][i] = zero<T>();
    }
    const auto step = [&](auto&& read, int64_t d) {
      Vec<T> w[kGroup];
      SEP_ATTN_UNROLL
      for (int i = 0; i < kGroup; ++i) w[i] = read(weights[i] + d);
      SEP_ATTN_UNROLL
      for (int s = 0; s < kSlices; ++s) {
        const Vec<T> pooled = read(statistics + s * stride + d);
        SEP_ATTN_UNROLL
        for (int i = 0; i < kGroup; ++i) sums[s][i] += w[i] * pooled;
      }
    };
    int64_t d = 0;
    for (; d + kLanes<T> <= channels; d += kLanes<T>) {
      step([](const auto* p) __attribute__((always_inline)) { return load(p); }, d);
    }
    if (d < channels) {
      step([n = channels - d](const auto* p)
               __attribute__((always_inline)) { return load_first(p, n); },
           d);
    }
    SEP_ATTN_UNROLL
    for (int s = 0; s < kSlices; ++s) {
      SEP_ATTN_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        if (first + i < kLanes<T>) results[s][first + i] = reduce_sum<T>(sums[s][i]);
      }
    }
  }
  for (int s = 0; s < kSlices; ++s) {
    T* own = statistics + s * stride;
    for (int64_t i = 0; i < count; ++i) {
      own[channels + row + i] = results[s][i] + own[2 * channels] * key_bias[row + i];
    }
  }
}

// Rows [rows) of the contexts of slices [slices).
template <typename S, typename T>
void project_context(const WeightRows<S>& qkv_weight, const T* key_bias, int64_t channels,
                     Range slices, Range rows, T* statistics) {
  const int64_t stride = 2 * channels + 1;
  for (int64_t row = rows.begin; row < rows.end; row += kLanes<T>) {
    const int64_t count = smaller(kLanes<T>, rows.end - row);
    int64_t slice = slices.begin;
    for (; slice + 4 <= slices.end; slice += 4) {
      project_rows<4>(qkv_weight, key_bias, channels, row, count, statistics + slice * stride);
    }
    for (; slice < slices.end; ++slice) {
      project_rows<1>(qkv_weight, key_bias, channels, row, count, statistics + slice * stride);
    }
  }
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
