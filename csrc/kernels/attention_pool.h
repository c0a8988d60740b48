// The context of a slice: scores, softmax with a running maximum, weighted sum, projection.
#pragma once

#include <type_traits>

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

// target[d] = scale * target[d] + sum_i weights[i] rows[i][d] over kVectors vectors of channels;
// the sum starts from zero: added to the target one by one, small terms would be rounded away.
template <int kVectors, typename T>
SEP_ATTN_INLINE void add_weighted_rows(const T* const* rows, const T* weights, int64_t count,
                                       int64_t first, T scale, T* target) {
  constexpr int64_t n = kLanes<T>;
  constexpr int kChains = 8 / kVectors;  // independent sums: the additions overlap
  Vec<T> sums[kChains][kVectors];
  SEP_ATTN_UNROLL
  for (int j = 0; j < kChains; ++j) {
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
    store(target + first + v * n, load(target + first + v * n) * scale + sums[0][v]);
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
    Vec<T> sum = zero<T>();
    for (int64_t i = 0; i < count; ++i) {
      sum += broadcast<T>(weights[i]) * load_first(rows[i] + d, channels - d);
    }
    store_first(target + d, load_first(target + d, channels - d) * scale + sum, channels - d);
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
  T* weights;  // receives the scores; null: not wanted
  // Receives x, tokens on the lanes, where strips are pooled and rows are whole vectors; or null.
  LanePanel<T> lanes;
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
    if (op.weights == nullptr) {
      // the scores are not wanted
    } else if (mask.data == nullptr && scores_out.uniform() && scores_out.stride_width == 1) {
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

// The pixel rows of an image that share y % patch_h. The patch_w slices of a strip lie interleaved
// in its rows; with patch_w = 1 a strip is a slice. Its tokens are gone through by vectors of
// consecutive pixels, none of which goes past the end of a row.
struct Strip {
  int64_t image, first_row, row_step, width, row_vectors, vectors;
};

template <typename T>
Strip make_strip(const TokenGrid& grid, int64_t strip) {
  const int64_t row_vectors = (grid.width + kLanes<T> - 1) / kLanes<T>;
  return {strip / grid.patch_h, strip % grid.patch_h, grid.patch_h,
          grid.width,           row_vectors,          grid.height / grid.patch_h * row_vectors};
}

// The pixels of one vector: those at x to x + count - 1 of row y.
struct StripVector {
  int64_t y, x, count;
};

template <typename T>
SEP_ATTN_INLINE StripVector strip_vector(const Strip& strip, int64_t index) {
  const int64_t row = strip.vectors == strip.row_vectors ? 0 : index / strip.row_vectors;
  const int64_t x = (index - row * strip.row_vectors) * kLanes<T>;
  return {strip.first_row + row * strip.row_step, x, smaller(kLanes<T>, strip.width - x)};
}

// lanes[i] = convert(values of pixel i), `missing` past the end of the row.
template <typename T, typename Data, typename Convert>
SEP_ATTN_INLINE void read_strip_values(const Strip& strip, const StripVector& at,
                                       const TokenValues<Data>& values, T missing, T* lanes,
                                       const Convert& convert) {
  const int64_t first = strip.image * values.stride_batch + at.y * values.stride_height;
  for (int64_t i = 0; i < kLanes<T>; ++i) {
    lanes[i] = i < at.count ? convert(first + (at.x + i) * values.stride_width) : missing;
  }
}

// body(n), n the constant 4, 2 or 1: how many vectors of a strip, `most` or fewer, are gone through
// at once.
template <typename Body>
SEP_ATTN_INLINE void with_strip_vectors(int64_t most, const Body& body) {
  if (most >= 4) {
    body(std::integral_constant<int, 4>{});
  } else if (most >= 2) {
    body(std::integral_constant<int, 2>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

// A copy of some vectors of tokens, computed in T: channel d of vector v at vectors[v] + d *
// stride.
template <typename T, int kVectors>
struct StripCopy {
  T* vectors[kVectors];
  int64_t stride;

  // In scratch memory [channels, kVectors, lanes].
  explicit StripCopy(T* scratch) : stride(kVectors * kLanes<T>) {
    for (int v = 0; v < kVectors; ++v) vectors[v] = scratch + v * kLanes<T>;
  }
};

// scores[v] = sum_d weights(d) x[d] over kVectors vectors of tokens, which are copied to `tokens`:
// where rows lie a power of two apart, a cache cannot hold them.
template <bool kWhole, int kVectors, typename S, typename T, typename Weights>
SEP_ATTN_INLINE void dot_strip(const S* const* x, const int64_t* counts, int64_t stride,
                               const Weights& weights, int64_t channels,
                               const StripCopy<T, kVectors>& tokens, Vec<T>* scores) {
  constexpr int kChains = kVectors < 4 ? 4 / kVectors : 1;  // independent sums: they overlap
  Vec<T> sums[kChains][kVectors];
  SEP_ATTN_UNROLL
  for (int i = 0; i < kChains; ++i) {
    SEP_ATTN_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[i][v] = zero<T>();
  }
  const auto add = [&](int chain, int64_t d) __attribute__((always_inline)) {
    const Vec<T> w = weights(d);
    SEP_ATTN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const S* at = x[v] + d * stride;
      const Vec<T> value = kWhole ? load(at) : load_first(at, counts[v]);
      store(tokens.vectors[v] + d * tokens.stride, value);
      sums[chain][v] += w * value;
    }
  };
  int64_t d = 0;
  for (; d + kChains <= channels; d += kChains) {
    SEP_ATTN_UNROLL
    for (int i = 0; i < kChains; ++i) add(i, d + i);
  }
  for (; d < channels; ++d) add(0, d);
  SEP_ATTN_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    SEP_ATTN_UNROLL
    for (int i = 1; i < kChains; ++i) sums[0][v] += sums[i][v];
    scores[v] = sums[0][v];
  }
}

// sums[d] = scale * sums[d] + sum_v weights[v] tokens[d][v], a vector of lanes for each d; what
// lies where `kept` is 0 stays out, whatever it is.
template <bool kMasked, int kVectors, typename T>
SEP_ATTN_INLINE void add_strip(const StripCopy<T, kVectors>& tokens, const Vec<T>* weights,
                               const Vec<T>* kept, Vec<T> scale, int64_t channels, T* sums) {
  for (int64_t d = 0; d < channels; ++d) {
    Vec<T> sum = zero<T>();
    SEP_ATTN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Vec<T> value = load(tokens.vectors[v] + d * tokens.stride);
      if (kMasked) value = kept[v] != zero<T>() ? value : zero<T>();
      sum += weights[v] * value;
    }
    store(sums + d * kLanes<T>, load(sums + d * kLanes<T>) * scale + sum);
  }
}

// Pools vectors [range) of a strip whose pixels are contiguous, every lane with a running maximum
// of its own; then the lanes of each of its slices are combined. `scratch` has room for
// [channels, kVectors + 1, lanes].
template <int kVectors, typename S>
void pool_strip(const PoolOperands<S>& op, int64_t strip_index, Range range, Accumulate<S>* scratch,
                Partial<Accumulate<S>>* partials, Accumulate<S>* pooled, int64_t pooled_stride) {
  using T = Accumulate<S>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t channels = op.grid.channels;
  const int64_t stride = op.grid.stride_channel;
  const Strip strip = make_strip<T>(op.grid, strip_index);
  const auto scores_out = contiguous_values<void>(op.grid, op.weights);
  const bool masked = op.key_padding_mask.data != nullptr;
  T* sums = scratch;
  const T lowest = -static_cast<T>(__builtin_huge_val());
  Vec<T> highest = broadcast<T>(lowest), sum = zero<T>(), weighted = zero<T>(), tokens = zero<T>();
  for (int64_t i = 0; i < channels * lanes; i += lanes) store(sums + i, zero<T>());
  alignas(64) T ramp[lanes], values[lanes];
  for (int64_t i = 0; i < lanes; ++i) ramp[i] = static_cast<T>(i);

  for (int64_t first = range.begin; first < range.end; first += kVectors) {
    const S* x[kVectors];
    int64_t counts[kVectors];
    StripVector places[kVectors];
    bool whole = true;
    StripCopy<T, kVectors> copy(scratch + channels * lanes);
    if (op.lanes.data != nullptr) copy.stride = kPanelWidth<T>;
    for (int64_t v = 0; v < kVectors; ++v) {
      const bool there = first + v < range.end;
      places[v] = strip_vector<T>(strip, there ? first + v : first);
      counts[v] = there ? places[v].count : 0;
      whole = whole && counts[v] == lanes;
      x[v] = op.x + strip.image * op.grid.stride_batch + places[v].y * op.grid.stride_height +
             places[v].x * op.grid.stride_width;
      if (op.lanes.data != nullptr && there) {
        const int64_t row = strip.image * op.grid.height + places[v].y;
        copy.vectors[v] = op.lanes.at(0, row * op.grid.width + places[v].x);
      }
    }
    Vec<T> scores[kVectors], kept[kVectors];
    const auto weights = [&](int64_t d) { return broadcast<T>(op.score_weight[d]); };
    if (whole) {
      dot_strip<true, kVectors>(x, counts, stride, weights, channels, copy, scores);
    } else {
      dot_strip<false, kVectors>(x, counts, stride, weights, channels, copy, scores);
    }
    Vec<T> new_highest = highest;
    for (int v = 0; v < kVectors; ++v) {
      scores[v] += op.score_bias;
      if (op.weights != nullptr && counts[v] > 0) {
        store_first(static_cast<T*>(scores_out.data) + strip.image * scores_out.stride_batch +
                        places[v].y * scores_out.stride_height + places[v].x,
                    scores[v], counts[v]);
      }
      kept[v] = load(ramp) < static_cast<T>(counts[v]) ? zero<T>() + 1 : zero<T>();
      if (masked && counts[v] > 0) {
        read_strip_values(strip, places[v], op.key_padding_mask, T{0}, values,
                          [&](int64_t at) { return op.key_padding_mask.data[at] ? T{0} : T{1}; });
        kept[v] *= load(values);
      }
      tokens += kept[v];
      scores[v] = kept[v] != zero<T>() ? scores[v] : broadcast<T>(lowest);
      new_highest = maximum(new_highest, scores[v]);
    }
    // exp(-inf) is 0, exp(-inf + inf) is NaN
    const Vec<T> shift = new_highest == broadcast<T>(lowest) ? zero<T>() : new_highest;
    const Vec<T> scale = exponential<T>(highest - shift);
    highest = new_highest;
    sum *= scale;
    weighted *= scale;
    for (int v = 0; v < kVectors; ++v) {
      scores[v] = exponential<T>(scores[v] - shift);
      sum += scores[v];
      if (op.dropout_scale.data != nullptr && counts[v] > 0) {
        const T* scales = static_cast<const T*>(op.dropout_scale.data);
        read_strip_values(strip, places[v], op.dropout_scale, T{0}, values,
                          [&](int64_t at) { return scales[at]; });
        scores[v] *= load(values);
      }
      weighted += scores[v];
    }
    if (masked) {
      add_strip<true, kVectors>(copy, scores, kept, scale, channels, sums);
    } else {
      add_strip<false, kVectors>(copy, scores, kept, scale, channels, sums);
    }
  }

  for (int64_t px = 0; px < op.grid.patch_w; ++px) {
    alignas(64) T own[lanes];
    for (int64_t i = 0; i < lanes; ++i) own[i] = i % op.grid.patch_w == px ? T{1} : T{0};
    const auto mine = load(own) != zero<T>();
    const T maximum_of_lanes = reduce_maximum<T>(mine ? highest : broadcast<T>(lowest));
    const Vec<T> factor =
        mine && tokens != zero<T>() ? exponential<T>(highest - maximum_of_lanes) : zero<T>();
    const auto total = [&](Vec<T> value) {
      return reduce_sum<T>(mine && tokens != zero<T>() ? value * factor : zero<T>());
    };
    partials[px] = {maximum_of_lanes, total(sum), total(weighted),
                    static_cast<int64_t>(reduce_sum<T>(mine ? tokens : zero<T>()))};
    T* target = pooled + px * pooled_stride;
    for (int64_t d = 0; d < channels; d += lanes) {
      const int64_t count = smaller(lanes, channels - d);
      Vec<T> rows[lanes];
      SEP_ATTN_UNROLL
      for (int i = 0; i < lanes; ++i) {
        const Vec<T> value = load(sums + (d + smaller(i, count - 1)) * lanes);
        rows[i] = mine && tokens != zero<T>() ? value * factor : zero<T>();
      }
      store_first(target + d, reduce_sums<T>(rows), count);
    }
  }
}

template <typename S>
void pool_strip(const PoolOperands<S>& op, int64_t strip, Range range, Accumulate<S>* scratch,
                Partial<Accumulate<S>>* partials, Accumulate<S>* pooled, int64_t pooled_stride) {
  const int64_t fit = 8192 / (op.grid.channels * kLanes<Accumulate<S>>);  // the copy stays in cache
  with_strip_vectors(smaller(range.count(), fit), [&](auto vectors) {
    pool_strip<decltype(vectors)::value>(op, strip, range, scratch, partials, pooled,
                                         pooled_stride);
  });
}

// The softmax of a slice, as needed to turn scores into weights.
template <typename T>
struct Softmax {
  T maximum;
  T inverse_sum;  // 0 when every token is left out
};

// Combines the partials of a slice in order, `step` partials apart; pooled [D] and weight_sum
// receive normalised values.
template <typename T>
Softmax<T> combine_partials(const Partial<T>* partials, const T* partial_pooled,
                            int64_t partial_stride, int64_t step, int64_t segments,
                            int64_t channels, T* pooled, T* weight_sum) {
  T highest = -__builtin_huge_val();
  int64_t tokens = 0;
  for (int64_t i = 0; i < segments; ++i) {
    tokens += partials[i * step].tokens;
    if (partials[i * step].maximum > highest) highest = partials[i * step].maximum;
  }
  for (int64_t d = 0; d < channels; ++d) pooled[d] = 0;
  *weight_sum = 0;
  if (tokens == 0) return {0, 0};
  T sum = 0, weighted = 0;
  for (int64_t i = 0; i < segments; ++i) {
    const Partial<T>& partial = partials[i * step];
    if (partial.tokens == 0) continue;
    const T scale = exponential_one<T>(partial.maximum - highest);
    sum += scale * partial.sum;
    weighted += scale * partial.weighted;
    add_scaled(partial_pooled + i * step * partial_stride, scale, channels, pooled);
  }
  const T inverse = 1 / sum;
  for (int64_t d = 0; d < channels; ++d) pooled[d] *= inverse;
  *weight_sum = weighted / sum;
  return {highest, inverse};
}

// Turns the scores of vectors [range) of a strip into softmax weights, in place; `softmax` is of
// the strip's slices.
template <typename S>
void normalise_weights(const PoolOperands<S>& op, int64_t strip_index, Range range,
                       const Softmax<Accumulate<S>>* softmax) {
  using T = Accumulate<S>;
  constexpr int64_t lanes = kLanes<T>;
  const Strip strip = make_strip<T>(op.grid, strip_index);
  const int64_t patch_w = op.grid.patch_w;
  const auto weights = contiguous_values<void>(op.grid, op.weights);
  alignas(64) T maxima[lanes], inverse_sums[lanes], kept[lanes];
  for (int64_t index = range.begin; index < range.end; ++index) {
    const StripVector at = strip_vector<T>(strip, index);
    for (int64_t i = 0; i < lanes && (index == range.begin || lanes % patch_w != 0); ++i) {
      maxima[i] = softmax[(at.x + i) % patch_w].maximum;
      inverse_sums[i] = softmax[(at.x + i) % patch_w].inverse_sum;
    }
    T* data = static_cast<T*>(weights.data) + strip.image * weights.stride_batch +
              at.y * weights.stride_height + at.x;
    const Vec<T> score = load_first(data, at.count);
    Vec<T> weight = exponential<T>(score - load(maxima)) * load(inverse_sums);
    if (op.key_padding_mask.data != nullptr) {
      read_strip_values(strip, at, op.key_padding_mask, T{0}, kept,
                        [&](int64_t i) { return op.key_padding_mask.data[i] ? T{0} : T{1}; });
      weight = load(kept) != zero<T>() ? weight : zero<T>();
    }
    store_first(data, weight, at.count);
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
