// How context_pool and gate walk an operand: slice by slice, a slice in bounded segments of tokens
// (one segment a task), a segment in runs of evenly spaced tokens.
#pragma once

#include "kernels.h"
#include "scratch.h"
#include "simd.h"
#include "tokens.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kInlineElements = 1 << 15;

SEP_ATTN_INLINE ParallelFor threads_for(int64_t elements, const ParallelFor& parallel) {
  return {elements < kInlineElements ? 1 : parallel.threads, parallel.run};
}

// A fixed function of a slice's shape: results depend neither on the threads nor on the batch.
struct Segments {
  static constexpr int64_t kMost = 64;

  int64_t tokens;  // of the slice
  int64_t length;  // of every segment but the last
  int64_t count;

  Segments(int64_t slice_tokens, int64_t channels) : tokens(slice_tokens) {
    constexpr int64_t kShortest = 32, kLongest = 512, kElements = 1 << 15;
    const int64_t wanted = smaller(larger(kElements / larger(channels, 1), kShortest), kLongest);
    count = smaller(larger((tokens + wanted - 1) / wanted, 1), kMost);
    length = larger((tokens + count - 1) / count, 1);
    length = (length + kShortest / 2 - 1) / (kShortest / 2) * (kShortest / 2);
    count = larger((tokens + length - 1) / length, 1);
  }

  int64_t begin(int64_t segment) const { return segment * length; }
  int64_t end(int64_t segment) const { return smaller((segment + 1) * length, tokens); }
};

// Calls run(first, count) for stretches of tokens that are evenly spaced in every grid given.
template <typename Run, typename... Grids>
SEP_ATTN_INLINE void for_each_even_run(int64_t begin, int64_t end, Run run, const TokenGrid& grid,
                                       const Grids&... others) {
  const auto joined = [](const TokenGrid& g) {
    return g.height == 1 || g.stride_height == g.width * g.stride_width;
  };
  const bool even = (joined(grid) && ... && joined(others));
  while (begin < end) {
    const int64_t row_end = even ? end : (begin / grid.width + 1) * grid.width;
    const int64_t count = smaller(row_end, end) - begin;
    run(begin, count);
    begin += count;
  }
}

// The offset of a token of a slice's own grid.
SEP_ATTN_INLINE int64_t slice_token_offset(const TokenGrid& grid, int64_t token) {
  return token / grid.width * grid.stride_height + token % grid.width * grid.stride_width;
}

// An operand's share in one slice.
template <typename S>
struct SliceOperand {
  TokenGrid grid;
  S* data;

  template <typename Data>
  SliceOperand(const TokenGrid& whole, Data* whole_data, int64_t slice) {
    const Slice part = make_slice(whole, slice);
    grid = part.grid;
    data = static_cast<S*>(whole_data) + part.offset;
  }

  SEP_ATTN_INLINE S* at(int64_t token) const { return data + slice_token_offset(grid, token); }
  bool rows() const { return grid.stride_channel == 1; }
  bool columns() const { return grid.stride_width == 1; }
};

// target[i] = row of a matrix, in the type T.
template <typename T, typename S>
void copy_row(const Matrix& matrix, int64_t row, int64_t columns, T* target) {
  const S* source = static_cast<const S*>(matrix.data) + row * matrix.stride_row;
  if constexpr (sizeof(Accumulate<S>) == sizeof(T)) {
    copy_matrix(source, int64_t{0}, matrix.stride_column, int64_t{1}, columns, target, int64_t{0},
                int64_t{1});
  } else {
    for (int64_t i = 0; i < columns; ++i) {
      target[i] = static_cast<T>(load_one(source + i * matrix.stride_column));
    }
  }
}

// Calls run(S{}) with S the type that stores `dtype`.
template <typename Run>
SEP_ATTN_INLINE void with_storage_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat64:
      return run(double{});
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat16:
      return run(Float16{});
  }
}

// Calls run(position, lanes) over [0, count) a vector at a time; lanes < kLanes in the last one.
template <typename T, typename Run>
SEP_ATTN_INLINE void for_each_vector(int64_t count, Run run) {
  constexpr int64_t n = kLanes<T>;
  int64_t i = 0;
  for (; i + n <= count; i += n) run(i, n);
  if (i < count) run(i, count - i);
}

// A vector of up to `lanes` values: the whole of it without a mask.
template <typename S>
SEP_ATTN_INLINE Vec<Accumulate<S>> load_lanes(const S* p, int64_t lanes) {
  return lanes == kLanes<Accumulate<S>> ? load(p) : load_first(p, lanes);
}

template <typename S>
SEP_ATTN_INLINE void store_lanes(S* p, Vec<Accumulate<S>> value, int64_t lanes) {
  if (lanes == kLanes<Accumulate<S>>) {
    store(p, value);
  } else {
    store_first(p, value, lanes);
  }
}

// target[i] = the value of token first + i of a slice, in the type T. Lanes up to a whole vector
// may be written.
template <typename T, typename S>
void load_values(const SliceValues<const S>& values, int64_t first, int64_t count, T* target) {
  if constexpr (sizeof(Accumulate<S>) == sizeof(T)) {
    if (values.stride_width == 1 && values.stride_height == values.width) {
      for_each_vector<T>(count, [&](int64_t i, int64_t lanes) {
        store(target + i, load_lanes(values.data + first + i, lanes));
      });
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) target[i] = static_cast<T>(load_one(&values[first + i]));
}

template <typename T>
void store_values(const T* source, int64_t first, int64_t count, const SliceValues<T>& values) {
  if (values.stride_width == 1 && values.stride_height == values.width) {
    for_each_vector<T>(count, [&](int64_t i, int64_t lanes) {
      store_lanes(values.data + first + i, load_lanes(source + i, lanes), lanes);
    });
  } else {
    for (int64_t i = 0; i < count; ++i) values[first + i] = source[i];
  }
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
