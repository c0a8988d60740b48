// The softmax of the scores over a slice's tokens, and the tokens' sum weighted by it: one pass
// over the tokens with a running maximum, and its backward.
#include "kernels.h"
#include "scratch.h"
#include "segments.h"
#include "simd.h"
#include "tokens.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {
namespace {

constexpr int64_t kTile = 128;     // tokens scored at once
constexpr int64_t kGathered = 16;  // tokens gathered at once where no stride is 1

template <typename T>
constexpr T kNegativeInfinity = -static_cast<T>(__builtin_inff());

// ---- Scores ----

// One slice's scores, mask and dropout scale, read in the accumulation type.
template <typename T>
struct SliceScores {
  DType dtype;
  TokenGrid grid;
  Slice slice;
  TokenValues<const void> scores;
  SliceValues<const bool> masked;
  SliceValues<const T> scale;

  SliceScores(const ContextPoolForward& a, int64_t slice_index)
      : dtype(a.scores_dtype),
        grid(a.grid),
        slice(make_slice(a.grid, slice_index)),
        scores(a.scores),
        masked(slice_values<const bool>(a.grid, slice, a.key_padding_mask)),
        scale(slice_values<const T>(a.grid, slice, a.dropout_scale)) {}

  // Masked tokens and the lanes after the last token score -inf. Returns how many are not masked.
  int64_t load_tile(int64_t first, int64_t count, T* tile) const {
    with_storage_type(dtype, [&](auto stored) {
      load_values(slice_values<const decltype(stored)>(grid, slice, scores), first, count, tile);
    });
    for (int64_t i = count; i % kLanes<T> != 0; ++i) tile[i] = kNegativeInfinity<T>;
    return count - fill_masked(first, count, kNegativeInfinity<T>, tile);
  }

  int64_t fill_masked(int64_t first, int64_t count, T value, T* tile) const {
    int64_t filled = 0;
    if (masked.data == nullptr) return filled;
    for (int64_t i = 0; i < count; ++i) {
      if (!masked[first + i]) continue;
      tile[i] = value;
      ++filled;
    }
    return filled;
  }
};

template <typename T>
T tile_maximum(const T* tile, int64_t count) {
  Vec<T> largest = load(tile);
  for (int64_t i = kLanes<T>; i < count; i += kLanes<T>) largest = maximum(largest, load(tile + i));
  return reduce_maximum<T>(largest);
}

// What exp() is taken relative to: the maximum, but nothing where every score is -inf.
template <typename T>
T reference_point(T maximum) {
  return maximum == kNegativeInfinity<T> ? T{0} : maximum;
}

// ---- Weighted sums of a run of tokens ----

// sum[d] += weight[i] * rows[index[i] * stride + d] for kRows tokens; index null: 0, 1, ...
template <int kRows, typename S>
SEP_ATTN_INLINE void add_rows(const S* rows, int64_t stride, const int32_t* index,
                              const Accumulate<S>* weight, int64_t channels, Accumulate<S>* sum) {
  using T = Accumulate<S>;
  const S* row[kRows];
  Vec<T> w[kRows];
  SEP_ATTN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    row[r] = rows + (index != nullptr ? index[r] : r) * stride;
    w[r] = broadcast<T>(weight[r]);
  }
  for_each_vector<T>(channels, [&](int64_t d, int64_t lanes) {
    Vec<T> total = load_lanes(sum + d, lanes);
    SEP_ATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kRows > 2) __builtin_prefetch(row[r] + kRows * stride + d);  // the next tokens
      total += w[r] * load_lanes(row[r] + d, lanes);
    }
    store_lanes(sum + d, total, lanes);
  });
}

template <typename S>
void add_weighted_rows(const S* rows, int64_t stride, const Accumulate<S>* weight, int64_t count,
                       bool skip_zeros, int64_t channels, Accumulate<S>* sum) {
  using T = Accumulate<S>;
  int32_t kept[kTile];
  T kept_weight[kTile];
  if (skip_zeros) {  // a masked token may hold NaN
    int64_t kept_count = 0;
    for (int64_t t = 0; t < count; ++t) {
      if (weight[t] == 0) continue;
      kept[kept_count] = static_cast<int32_t>(t);
      kept_weight[kept_count++] = weight[t];
    }
    count = kept_count;
    weight = kept_weight;
  }
  int64_t t = 0;
  const auto index = [&]() { return skip_zeros ? kept + t : nullptr; };
  const auto first = [&]() { return skip_zeros ? rows : rows + t * stride; };
  for (; t + 8 <= count; t += 8) {
    add_rows<8>(first(), stride, index(), weight + t, channels, sum);
  }
  for (; t + 2 <= count; t += 2) {
    add_rows<2>(first(), stride, index(), weight + t, channels, sum);
  }
  if (t < count) add_rows<1>(first(), stride, index(), weight + t, channels, sum);
}

// The same for tokens on the vector lanes: columns[d * stride + t].
template <bool kSkipZeros, typename S>
void add_weighted_columns(const S* columns, int64_t stride, const Accumulate<S>* weight,
                          int64_t count, int64_t channels, Accumulate<S>* sum) {
  using T = Accumulate<S>;
  constexpr int n = kLanes<T>;
  const auto product = [](Vec<T> w, Vec<T> value) {
    if constexpr (kSkipZeros) value = w != zero<T>() ? value : zero<T>();
    return w * value;
  };
  int64_t d = 0;
  for (; d + n <= channels; d += n) {
    const S* column = columns + d * stride;
    Vec<T> total[n] = {};
    for_each_vector<T>(count, [&](int64_t t, int64_t lanes) {
      const Vec<T> w = load_lanes(weight + t, lanes);
      SEP_ATTN_UNROLL
      for (int i = 0; i < n; ++i)
        total[i] += product(w, load_lanes(column + i * stride + t, lanes));
    });
    transpose<T>(total);
    Vec<T> sums = load(sum + d);
    SEP_ATTN_UNROLL
    for (int i = 0; i < n; ++i) sums += total[i];
    store(sum + d, sums);
  }
  for (; d < channels; ++d) {
    Vec<T> total = zero<T>();
    for_each_vector<T>(count, [&](int64_t t, int64_t lanes) {
      total += product(load_lanes(weight + t, lanes), load_lanes(columns + d * stride + t, lanes));
    });
    sum[d] += reduce_sum<T>(total);
  }
}

template <typename S>
void add_weighted_tokens(const SliceOperand<const S>& x, int64_t first, int64_t count,
                         const Accumulate<S>* weight, bool skip_zeros, Accumulate<S>* gathered,
                         Accumulate<S>* sum) {
  const int64_t channels = x.grid.channels;
  const auto run = [&](int64_t begin, int64_t length) {
    const S* data = x.at(begin);
    const Accumulate<S>* w = weight + (begin - first);
    if (x.rows()) {
      add_weighted_rows(data, x.grid.stride_width, w, length, skip_zeros, channels, sum);
    } else if (x.columns() && skip_zeros) {
      add_weighted_columns<true>(data, x.grid.stride_channel, w, length, channels, sum);
    } else if (x.columns()) {
      add_weighted_columns<false>(data, x.grid.stride_channel, w, length, channels, sum);
    } else {
      for (int64_t t = 0; t < length; t += kGathered) {
        const int64_t block = smaller(length - t, kGathered);
        copy_matrix(data + t * x.grid.stride_width, x.grid.stride_width, x.grid.stride_channel,
                    block, channels, gathered, channels, int64_t{1});
        add_weighted_rows<Accumulate<S>>(gathered, channels, w + t, block, skip_zeros, channels,
                                         sum);
      }
    }
  };
  for_each_even_run(first, first + count, run, x.grid);
}

// ---- Forward ----

// The softmax statistics of some tokens; weighted sums are relative to exp(maximum).
template <typename T>
struct Softmax {
  T maximum = kNegativeInfinity<T>;
  T sum = 0;
  T weight_sum = 0;  // after dropout
  int64_t present = 0;

  // What a partial result with maximum `part` counts for in this one.
  T share(T part) const {
    return part == maximum ? T{1} : exponential_one<T>(part - reference_point(maximum));
  }
  T inverse() const { return present > 0 ? 1 / sum : T{0}; }
};

template <typename S>
Softmax<Accumulate<S>> pool_segment(const ContextPoolForward& a, int64_t slice, int64_t begin,
                                    int64_t end, Accumulate<S>* pooled) {
  using T = Accumulate<S>;
  const int64_t channels = a.grid.channels;
  const SliceOperand<const S> x(a.grid, a.x, slice);
  const SliceScores<T> scores(a, slice);
  const bool skip_zeros = scores.masked.data != nullptr;
  Buffer<T> gathered(x.rows() || x.columns() ? 0 : kGathered * channels);
  Softmax<T> softmax;
  for (int64_t d = 0; d < channels; ++d) pooled[d] = 0;

  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = smaller(end - first, kTile);
    T weight[kTile];
    softmax.present += scores.load_tile(first, count, weight);
    const T previous = softmax.maximum;
    const T largest = tile_maximum(weight, count);
    softmax.maximum = largest > previous ? largest : previous;
    const T rescale = softmax.share(previous);
    if (rescale != 1) {
      softmax.sum *= rescale;
      softmax.weight_sum *= rescale;
      for (int64_t d = 0; d < channels; ++d) pooled[d] *= rescale;
    }

    const T reference = reference_point(softmax.maximum);
    Vec<T> sum = zero<T>();
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const Vec<T> e = exponential<T>(load(weight + i) - reference);
      sum += e;
      store(weight + i, e);
    }
    const T tile_sum = reduce_sum<T>(sum);
    softmax.sum += tile_sum;
    if (scores.scale.data != nullptr) {
      T scale[kTile];
      load_values(scores.scale, first, count, scale);
      for (int64_t i = 0; i < count; ++i) {
        weight[i] *= scale[i];
        softmax.weight_sum += weight[i];
      }
    } else {
      softmax.weight_sum += tile_sum;
    }
    add_weighted_tokens<S>(x, first, count, weight, skip_zeros, gathered.get(), pooled);
  }
  return softmax;
}

template <typename T>
void write_weights(const ContextPoolForward& a, int64_t slice, int64_t begin, int64_t end,
                   const Softmax<T>& softmax) {
  const SliceScores<T> scores(a, slice);
  const auto weights = slice_values<T>(a.grid, scores.slice,
                                       contiguous_values(a.grid, static_cast<void*>(a.weights)));
  const T reference = reference_point(softmax.maximum), inverse = softmax.inverse();
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = smaller(end - first, kTile);
    T tile[kTile];
    scores.load_tile(first, count, tile);
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      store(tile + i, exponential<T>(load(tile + i) - reference) * inverse);
    }
    scores.fill_masked(first, count, T{0}, tile);
    store_values(tile, first, count, weights);
  }
}

template <typename S>
void pool_forward(const ContextPoolForward& a, const ParallelFor& parallel_for) {
  using T = Accumulate<S>;
  const int64_t slices = a.grid.slices(), channels = a.grid.channels;
  const Segments segments(a.grid.slice_tokens(), channels);
  const ParallelFor parallel = threads_for(slices * segments.tokens * channels, parallel_for);
  T* const pooled = static_cast<T*>(a.pooled);
  T* const weight_sum = static_cast<T*>(a.weight_sum);
  const auto ratio = [](const Softmax<T>& softmax) {
    return softmax.present > 0 ? softmax.weight_sum / softmax.sum : T{0};
  };

  if (segments.count == 1) {
    run_tasks(parallel, slices, [&](int64_t slice) {
      T* const sum = pooled + slice * channels;
      const Softmax<T> softmax = pool_segment<S>(a, slice, 0, segments.tokens, sum);
      const T inverse = softmax.inverse();
      for (int64_t d = 0; d < channels; ++d) sum[d] *= inverse;
      weight_sum[slice] = ratio(softmax);
      write_weights<T>(a, slice, 0, segments.tokens, softmax);
    });
    return;
  }

  const int64_t tasks = slices * segments.count;
  Buffer<Softmax<T>> parts(tasks);
  Buffer<T> sums(tasks * channels);
  run_tasks(parallel, tasks, [&](int64_t task) {
    const int64_t slice = task / segments.count, segment = task % segments.count;
    parts[task] = pool_segment<S>(a, slice, segments.begin(segment), segments.end(segment),
                                  sums.get() + task * channels);
  });
  // Every task merges the statistics of its slice, then writes its share of weights and channels.
  run_tasks(parallel, tasks, [&](int64_t task) {
    const int64_t slice = task / segments.count, segment = task % segments.count;
    const Softmax<T>* const part = parts.get() + slice * segments.count;
    const T* const sum = sums.get() + slice * segments.count * channels;
    Softmax<T> softmax;
    for (int64_t i = 0; i < segments.count; ++i) {
      softmax.maximum = part[i].maximum > softmax.maximum ? part[i].maximum : softmax.maximum;
    }
    T share[Segments::kMost];
    for (int64_t i = 0; i < segments.count; ++i) {
      share[i] = softmax.share(part[i].maximum);
      softmax.sum += share[i] * part[i].sum;
      softmax.weight_sum += share[i] * part[i].weight_sum;
      softmax.present += part[i].present;
    }
    const int64_t first = segment * channels / segments.count;
    const int64_t last = (segment + 1) * channels / segments.count;
    const T inverse = softmax.inverse();
    for (int64_t d = first; d < last; ++d) {
      T total = 0;
      for (int64_t i = 0; i < segments.count; ++i) total += share[i] * sum[i * channels + d];
      pooled[slice * channels + d] = total * inverse;
    }
    if (segment == 0) weight_sum[slice] = ratio(softmax);
    write_weights<T>(a, slice, segments.begin(segment), segments.end(segment), softmax);
  });
}

// ---- Backward ----

// dots[t] = row t . gradient, for kRows tokens.
template <int kRows, typename S>
SEP_ATTN_INLINE void dot_rows(const S* rows, int64_t stride, const Accumulate<S>* gradient,
                              int64_t channels, Accumulate<S>* dots) {
  using T = Accumulate<S>;
  Vec<T> total[kRows] = {};
  for_each_vector<T>(channels, [&](int64_t d, int64_t lanes) {
    const Vec<T> g = load_lanes(gradient + d, lanes);
    SEP_ATTN_UNROLL
    for (int r = 0; r < kRows; ++r) total[r] += g * load_lanes(rows + r * stride + d, lanes);
  });
  SEP_ATTN_UNROLL
  for (int r = 0; r < kRows; ++r) dots[r] = reduce_sum<T>(total[r]);
}

template <typename S>
void dot_tokens_in_rows(const S* rows, int64_t stride, int64_t count, const Accumulate<S>* gradient,
                        int64_t channels, Accumulate<S>* dots) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) {
    dot_rows<4>(rows + t * stride, stride, gradient, channels, dots + t);
  }
  for (; t < count; ++t) dot_rows<1>(rows + t * stride, stride, gradient, channels, dots + t);
}

// dots[t] for tokens on the vector lanes, kVectors vectors of them.
template <int kVectors, typename S>
SEP_ATTN_INLINE void dot_columns(const S* columns, int64_t stride, int64_t last_lanes,
                                 const Accumulate<S>* gradient, int64_t channels,
                                 Accumulate<S>* dots) {
  using T = Accumulate<S>;
  constexpr int n = kLanes<T>;
  Vec<T> total[kVectors] = {};
  for (int64_t d = 0; d < channels; ++d) {
    const S* column = columns + d * stride;
    const Vec<T> g = broadcast<T>(gradient[d]);
    SEP_ATTN_UNROLL
    for (int i = 0; i + 1 < kVectors; ++i) total[i] += g * load(column + i * n);
    total[kVectors - 1] += g * load_lanes(column + (kVectors - 1) * n, last_lanes);
  }
  SEP_ATTN_UNROLL
  for (int i = 0; i + 1 < kVectors; ++i) store(dots + i * n, total[i]);
  store_lanes(dots + (kVectors - 1) * n, total[kVectors - 1], last_lanes);
}

template <typename S>
void dot_tokens_in_columns(const S* columns, int64_t stride, int64_t count,
                           const Accumulate<S>* gradient, int64_t channels, Accumulate<S>* dots) {
  constexpr int64_t n = kLanes<Accumulate<S>>;
  int64_t t = 0;
  for (; t + 4 * n <= count; t += 4 * n) {
    dot_columns<4>(columns + t, stride, n, gradient, channels, dots + t);
  }
  for (; t < count; t += n) {
    dot_columns<1>(columns + t, stride, smaller(count - t, n), gradient, channels, dots + t);
  }
}

// grad_x[t, d] = weight[t] * gradient[d]; exactly 0 where the weight is.
template <typename S>
void spread_rows(S* rows, int64_t stride, const Accumulate<S>* weight, int64_t count,
                 const Accumulate<S>* gradient, int64_t channels) {
  using T = Accumulate<S>;
  for (int64_t t = 0; t < count; ++t) {
    const bool nothing = weight[t] == 0;
    for_each_vector<T>(channels, [&](int64_t d, int64_t lanes) {
      const Vec<T> product = weight[t] * load_lanes(gradient + d, lanes);
      store_lanes(rows + t * stride + d, nothing ? zero<T>() : product, lanes);
    });
  }
}

template <typename S>
void spread_columns(S* columns, int64_t stride, const Accumulate<S>* weight, int64_t count,
                    const Accumulate<S>* gradient, int64_t channels) {
  using T = Accumulate<S>;
  for (int64_t d = 0; d < channels; ++d) {
    for_each_vector<T>(count, [&](int64_t t, int64_t lanes) {
      const Vec<T> w = load_lanes(weight + t, lanes);
      store_lanes(columns + d * stride + t, w != zero<T>() ? w * gradient[d] : zero<T>(), lanes);
    });
  }
}

// What one slice's tokens share in backward.
template <typename T>
struct SliceGradients {
  SliceValues<const T> weights, scale, grad_weights;
  SliceValues<T> grad_scores;
  T grad_weight_sum, delta;

  SliceGradients(const ContextPoolBackward& a, const T* deltas, int64_t index) {
    const Slice slice = make_slice(a.grid, index);
    weights = slice_values<const T>(a.grid, slice, contiguous_values(a.grid, a.weights));
    scale = slice_values<const T>(a.grid, slice, a.dropout_scale);
    grad_weights = slice_values<const T>(a.grid, slice, a.grad_weights);
    grad_scores = slice_values<T>(a.grid, slice, contiguous_values(a.grid, a.grad_scores));
    const T* sums = static_cast<const T*>(a.grad_weight_sum.data);
    grad_weight_sum = sums == nullptr ? T{0} : sums[index * a.grad_weight_sum.stride];
    delta = deltas[index];
  }

  // From x . grad_pooled of some tokens, the gradients of their scores, and into `kept` their
  // weights after dropout. A masked token's weight is 0; its gradient is too, though x may be NaN.
  void finish_tile(const T* dots, int64_t first, int64_t count, T* kept) const {
    T weight[kTile], factor[kTile], extra[kTile], gradient[kTile];
    load_values(weights, first, count, weight);
    if (scale.data != nullptr) load_values(scale, first, count, factor);
    if (grad_weights.data != nullptr) load_values(grad_weights, first, count, extra);
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const Vec<T> p = load(weight + i);
      Vec<T> grad_weight = load(dots + i) + grad_weight_sum;
      if (scale.data != nullptr) grad_weight *= load(factor + i);
      if (grad_weights.data != nullptr) grad_weight += load(extra + i);
      store(gradient + i, p != zero<T>() ? p * (grad_weight - delta) : zero<T>());
      store(kept + i, scale.data != nullptr ? p * load(factor + i) : p);
    }
    store_values(gradient, first, count, grad_scores);
  }
};

// sum_n p_n dp_n of a slice.
template <typename T>
T slice_delta(const ContextPoolBackward& a, int64_t index) {
  const int64_t channels = a.grid.channels;
  const T* grad_pooled =
      static_cast<const T*>(a.grad_pooled.data) + index * a.grad_pooled.stride_row;
  const T* pooled = static_cast<const T*>(a.pooled) + index * channels;
  T delta = 0;
  if (a.grad_pooled.stride_column == 1) {
    dot_rows<1>(grad_pooled, channels, pooled, channels, &delta);
  } else {
    for (int64_t d = 0; d < channels; ++d) {
      delta += pooled[d] * grad_pooled[d * a.grad_pooled.stride_column];
    }
  }
  const T* grad_weight_sum = static_cast<const T*>(a.grad_weight_sum.data);
  if (grad_weight_sum != nullptr) {
    delta += static_cast<const T*>(a.weight_sum)[index] *
             grad_weight_sum[index * a.grad_weight_sum.stride];
  }
  if (a.grad_weights.data != nullptr) {
    const Slice slice = make_slice(a.grid, index);
    const auto weights = slice_values<const T>(a.grid, slice, contiguous_values(a.grid, a.weights));
    const auto grad_weights = slice_values<const T>(a.grid, slice, a.grad_weights);
    for (int64_t t = 0; t < a.grid.slice_tokens(); ++t) {
      if (weights[t] != 0) delta += weights[t] * grad_weights[t];
    }
  }
  return delta;
}

template <typename S>
void pool_segment_backward(const ContextPoolBackward& a, const Accumulate<S>* deltas, int64_t slice,
                           int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const int64_t channels = a.grid.channels;
  const SliceOperand<const S> x(a.grid, a.x, slice);
  const SliceOperand<S> grad_x(a.grad_grid, a.grad_x, slice);
  const SliceGradients<T> shared(a, deltas, slice);
  const bool rows = x.rows() && grad_x.rows(), columns = x.columns() && grad_x.columns();
  const Buffer<T> gradient_buffer(channels);
  const Buffer<T> gathered_buffer(rows || columns ? 0 : kGathered * channels);
  T* const gradient = gradient_buffer.get();
  T* const gathered = gathered_buffer.get();
  copy_row<T, T>(a.grad_pooled, slice, channels, gradient);

  const auto run = [&](int64_t first, int64_t count) {
    const int64_t most = rows || columns ? kTile : kGathered;
    for (int64_t t = first; t < first + count; t += most) {
      const int64_t block = smaller(first + count - t, most);
      const S* source = x.at(t);
      S* target = grad_x.at(t);
      T dots[kTile], weight[kTile];
      if (rows) {
        dot_tokens_in_rows(source, x.grid.stride_width, block, gradient, channels, dots);
      } else if (columns) {
        dot_tokens_in_columns(source, x.grid.stride_channel, block, gradient, channels, dots);
      } else {
        copy_matrix(source, x.grid.stride_width, x.grid.stride_channel, block, channels, gathered,
                    channels, int64_t{1});
        dot_tokens_in_rows<T>(gathered, channels, block, gradient, channels, dots);
      }
      shared.finish_tile(dots, t, block, weight);
      if (rows) {
        spread_rows(target, grad_x.grid.stride_width, weight, block, gradient, channels);
      } else if (columns) {
        spread_columns(target, grad_x.grid.stride_channel, weight, block, gradient, channels);
      } else {
        spread_rows<T>(gathered, channels, weight, block, gradient, channels);
        copy_matrix(static_cast<const T*>(gathered), channels, int64_t{1}, block, channels, target,
                    grad_x.grid.stride_width, grad_x.grid.stride_channel);
      }
    }
  };
  for_each_even_run(begin, end, run, x.grid, grad_x.grid);
}

template <typename S>
void pool_backward(const ContextPoolBackward& a, const ParallelFor& parallel_for) {
  using T = Accumulate<S>;
  const int64_t slices = a.grid.slices();
  const Segments segments(a.grid.slice_tokens(), a.grid.channels);
  const ParallelFor parallel =
      threads_for(slices * segments.tokens * a.grid.channels, parallel_for);
  Buffer<T> deltas(slices);
  run_tasks(parallel, slices, [&](int64_t slice) { deltas[slice] = slice_delta<T>(a, slice); });
  run_tasks(parallel, slices * segments.count, [&](int64_t task) {
    const int64_t segment = task % segments.count;
    pool_segment_backward<S>(a, deltas.get(), task / segments.count, segments.begin(segment),
                             segments.end(segment));
  });
}

}  // namespace

void context_pool_forward(const ContextPoolForward& arguments, const ParallelFor& parallel_for) {
  with_storage_type(arguments.dtype,
                    [&](auto stored) { pool_forward<decltype(stored)>(arguments, parallel_for); });
}

void context_pool_backward(const ContextPoolBackward& arguments, const ParallelFor& parallel_for) {
  with_storage_type(arguments.dtype,
                    [&](auto stored) { pool_backward<decltype(stored)>(arguments, parallel_for); });
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
