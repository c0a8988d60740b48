// The element-wise gate act(v) * context, every token's values times the context of its slice, and
// its backward.
#include "kernels.h"
#include "scratch.h"
#include "segments.h"
#include "simd.h"
#include "tokens.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {
namespace {

constexpr int64_t kGathered = 16;  // tokens gathered at once where no stride is 1

// NaN stays NaN, as in torch.relu.
template <bool kRelu, typename V>
SEP_ATTN_INLINE V activate(V value) {
  if constexpr (kRelu) return value < V{} ? V{} : value;
  return value;
}

template <bool kRelu, typename V>
SEP_ATTN_INLINE V activation_gradient(V value, V gradient) {
  if constexpr (kRelu) return value <= V{} ? V{} : gradient;
  return gradient;
}

template <typename T>
void load_context(DType dtype, const Matrix& context, int64_t slice, int64_t channels, T* row) {
  with_storage_type(
      dtype, [&](auto stored) { copy_row<T, decltype(stored)>(context, slice, channels, row); });
}

// ---- Forward ----

// y[t, d] = act(v[t, d]) * context[d] for a run of tokens held one a row.
template <bool kRelu, typename S>
void gate_rows(const S* v, int64_t v_stride, S* y, int64_t y_stride, int64_t count,
               const Accumulate<S>* context, int64_t channels) {
  using T = Accumulate<S>;
  for (int64_t t = 0; t < count; ++t) {
    for_each_vector<T>(channels, [&](int64_t d, int64_t lanes) {
      const Vec<T> value = activate<kRelu>(load_lanes(v + t * v_stride + d, lanes));
      store_lanes(y + t * y_stride + d, value * load_lanes(context + d, lanes), lanes);
    });
  }
}

// The same for tokens on the vector lanes.
template <bool kRelu, typename S>
void gate_columns(const S* v, int64_t v_stride, S* y, int64_t y_stride, int64_t count,
                  const Accumulate<S>* context, int64_t channels) {
  using T = Accumulate<S>;
  for (int64_t d = 0; d < channels; ++d) {
    const Vec<T> c = broadcast<T>(context[d]);
    for_each_vector<T>(count, [&](int64_t t, int64_t lanes) {
      const Vec<T> value = activate<kRelu>(load_lanes(v + d * v_stride + t, lanes));
      store_lanes(y + d * y_stride + t, value * c, lanes);
    });
  }
}

template <bool kRelu, typename S>
void gate_segment(const GateForward& a, int64_t slice, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  const int64_t channels = a.v_grid.channels;
  const SliceOperand<const S> v(a.v_grid, a.v, slice);
  const SliceOperand<S> y(a.y_grid, a.y, slice);
  const bool rows = v.rows() && y.rows(), columns = v.columns() && y.columns();
  const Buffer<T> context_buffer(channels);
  const Buffer<T> tile_buffer(rows || columns ? 0 : kGathered * channels);
  T* const context = context_buffer.get();
  T* const tile = tile_buffer.get();
  load_context<T>(a.context_dtype, a.context, slice, channels, context);

  const auto run = [&](int64_t first, int64_t count) {
    if (rows) {
      gate_rows<kRelu>(v.at(first), v.grid.stride_width, y.at(first), y.grid.stride_width, count,
                       context, channels);
    } else if (columns) {
      gate_columns<kRelu>(v.at(first), v.grid.stride_channel, y.at(first), y.grid.stride_channel,
                          count, context, channels);
    } else {
      for (int64_t t = first; t < first + count; t += kGathered) {
        const int64_t block = smaller(first + count - t, kGathered);
        copy_matrix(v.at(t), v.grid.stride_width, v.grid.stride_channel, block, channels, tile,
                    channels, int64_t{1});
        gate_rows<kRelu, T>(tile, channels, tile, channels, block, context, channels);
        copy_matrix(static_cast<const T*>(tile), channels, int64_t{1}, block, channels, y.at(t),
                    y.grid.stride_width, y.grid.stride_channel);
      }
    }
  };
  for_each_even_run(begin, end, run, v.grid, y.grid);
}

template <bool kRelu, typename S>
void gate_tokens(const GateForward& a, const ParallelFor& parallel_for) {
  const int64_t slices = a.v_grid.slices();
  const Segments segments(a.v_grid.slice_tokens(), a.v_grid.channels);
  run_tasks(threads_for(slices * segments.tokens * a.v_grid.channels, parallel_for),
            slices * segments.count, [&](int64_t task) {
              const int64_t segment = task % segments.count;
              gate_segment<kRelu, S>(a, task / segments.count, segments.begin(segment),
                                     segments.end(segment));
            });
}

// ---- Backward ----

// grad_v = grad_y * context * act'(v); sum[d] += grad_y * act(v), for kRows tokens held one a row.
template <bool kRelu, int kRows, typename S>
SEP_ATTN_INLINE void gate_rows_backward(const S* grad_y, int64_t grad_y_stride, const S* v,
                                        int64_t v_stride, S* grad_v, int64_t grad_v_stride,
                                        const Accumulate<S>* context, int64_t channels,
                                        Accumulate<S>* sum) {
  using T = Accumulate<S>;
  for_each_vector<T>(channels, [&](int64_t d, int64_t lanes) {
    const Vec<T> c = load_lanes(context + d, lanes);
    Vec<T> total = load_lanes(sum + d, lanes);
    SEP_ATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> g = load_lanes(grad_y + r * grad_y_stride + d, lanes);
      const Vec<T> value = load_lanes(v + r * v_stride + d, lanes);
      total += g * activate<kRelu>(value);
      store_lanes(grad_v + r * grad_v_stride + d, activation_gradient<kRelu>(value, g * c), lanes);
    }
    store_lanes(sum + d, total, lanes);
  });
}

template <bool kRelu, typename S>
void gate_tokens_in_rows_backward(const S* grad_y, int64_t grad_y_stride, const S* v,
                                  int64_t v_stride, S* grad_v, int64_t grad_v_stride, int64_t count,
                                  const Accumulate<S>* context, int64_t channels,
                                  Accumulate<S>* sum) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) {
    gate_rows_backward<kRelu, 4>(grad_y + t * grad_y_stride, grad_y_stride, v + t * v_stride,
                                 v_stride, grad_v + t * grad_v_stride, grad_v_stride, context,
                                 channels, sum);
  }
  for (; t < count; ++t) {
    gate_rows_backward<kRelu, 1>(grad_y + t * grad_y_stride, grad_y_stride, v + t * v_stride,
                                 v_stride, grad_v + t * grad_v_stride, grad_v_stride, context,
                                 channels, sum);
  }
}

// The same for tokens on the vector lanes.
template <bool kRelu, typename S>
void gate_tokens_in_columns_backward(const S* grad_y, int64_t grad_y_stride, const S* v,
                                     int64_t v_stride, S* grad_v, int64_t grad_v_stride,
                                     int64_t count, const Accumulate<S>* context, int64_t channels,
                                     Accumulate<S>* sum) {
  using T = Accumulate<S>;
  for (int64_t d = 0; d < channels; ++d) {
    const Vec<T> c = broadcast<T>(context[d]);
    Vec<T> total = zero<T>();
    for_each_vector<T>(count, [&](int64_t t, int64_t lanes) {
      const Vec<T> g = load_lanes(grad_y + d * grad_y_stride + t, lanes);
      const Vec<T> value = load_lanes(v + d * v_stride + t, lanes);
      total += g * activate<kRelu>(value);
      store_lanes(grad_v + d * grad_v_stride + t, activation_gradient<kRelu>(value, g * c), lanes);
    });
    sum[d] += reduce_sum<T>(total);
  }
}

template <bool kRelu, typename S>
void gate_segment_backward(const GateBackward& a, int64_t slice, int64_t begin, int64_t end,
                           Accumulate<S>* sum) {
  using T = Accumulate<S>;
  const int64_t channels = a.v_grid.channels;
  const SliceOperand<const S> grad_y(a.grad_y_grid, a.grad_y, slice);
  const SliceOperand<const S> v(a.v_grid, a.v, slice);
  const SliceOperand<S> grad_v(a.grad_v_grid, a.grad_v, slice);
  const bool rows = grad_y.rows() && v.rows() && grad_v.rows();
  const bool columns = grad_y.columns() && v.columns() && grad_v.columns();
  const int64_t tile_size = rows || columns ? 0 : kGathered * channels;
  const Buffer<T> context_buffer(channels), grad_buffer(tile_size), value_buffer(tile_size);
  T* const context = context_buffer.get();
  T* const grad_tile = grad_buffer.get();
  T* const value_tile = value_buffer.get();
  load_context<T>(a.context_dtype, a.context, slice, channels, context);
  for (int64_t d = 0; d < channels; ++d) sum[d] = 0;

  const auto run = [&](int64_t first, int64_t count) {
    if (rows) {
      gate_tokens_in_rows_backward<kRelu>(grad_y.at(first), grad_y.grid.stride_width, v.at(first),
                                          v.grid.stride_width, grad_v.at(first),
                                          grad_v.grid.stride_width, count, context, channels, sum);
    } else if (columns) {
      gate_tokens_in_columns_backward<kRelu>(
          grad_y.at(first), grad_y.grid.stride_channel, v.at(first), v.grid.stride_channel,
          grad_v.at(first), grad_v.grid.stride_channel, count, context, channels, sum);
    } else {
      for (int64_t t = first; t < first + count; t += kGathered) {
        const int64_t block = smaller(first + count - t, kGathered);
        copy_matrix(grad_y.at(t), grad_y.grid.stride_width, grad_y.grid.stride_channel, block,
                    channels, grad_tile, channels, int64_t{1});
        copy_matrix(v.at(t), v.grid.stride_width, v.grid.stride_channel, block, channels,
                    value_tile, channels, int64_t{1});
        gate_tokens_in_rows_backward<kRelu, T>(grad_tile, channels, value_tile, channels, grad_tile,
                                               channels, block, context, channels, sum);
        copy_matrix(static_cast<const T*>(grad_tile), channels, int64_t{1}, block, channels,
                    grad_v.at(t), grad_v.grid.stride_width, grad_v.grid.stride_channel);
      }
    }
  };
  for_each_even_run(begin, end, run, grad_y.grid, v.grid, grad_v.grid);
}

template <bool kRelu, typename S>
void gate_tokens_backward(const GateBackward& a, const ParallelFor& parallel_for) {
  using T = Accumulate<S>;
  const int64_t slices = a.v_grid.slices(), channels = a.v_grid.channels;
  const Segments segments(a.v_grid.slice_tokens(), channels);
  const ParallelFor parallel = threads_for(slices * segments.tokens * channels, parallel_for);
  const int64_t tasks = slices * segments.count;
  T* const grad_context = static_cast<T*>(a.grad_context);
  Buffer<T> parts(segments.count == 1 ? 0 : tasks * channels);
  T* const sums = segments.count == 1 ? grad_context : parts.get();
  run_tasks(parallel, tasks, [&](int64_t task) {
    const int64_t segment = task % segments.count;
    gate_segment_backward<kRelu, S>(a, task / segments.count, segments.begin(segment),
                                    segments.end(segment), sums + task * channels);
  });
  if (segments.count == 1) return;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const T* part = sums + slice * segments.count * channels;
    T* const total = grad_context + slice * channels;
    for (int64_t d = 0; d < channels; ++d) total[d] = part[d];
    for (int64_t i = 1; i < segments.count; ++i) {
      for (int64_t d = 0; d < channels; ++d) total[d] += part[i * channels + d];
    }
  }
}

}  // namespace

void gate_forward(const GateForward& arguments, const ParallelFor& parallel_for) {
  with_storage_type(arguments.dtype, [&](auto stored) {
    using S = decltype(stored);
    if (arguments.activation == Activation::kRelu) {
      gate_tokens<true, S>(arguments, parallel_for);
    } else {
      gate_tokens<false, S>(arguments, parallel_for);
    }
  });
}

void gate_backward(const GateBackward& arguments, const ParallelFor& parallel_for) {
  with_storage_type(arguments.dtype, [&](auto stored) {
    using S = decltype(stored);
    if (arguments.activation == Activation::kRelu) {
      gate_tokens_backward<true, S>(arguments, parallel_for);
    } else {
      gate_tokens_backward<false, S>(arguments, parallel_for);
    }
  });
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
