// Moving tokens between an operand of any layout and a tile in scratch memory.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

// ---- Strided matrices ----

// target[r * target_row + c * target_column] = source[r * source_row + c * source_column], with
// conversion, one value at a time.
template <typename S, typename D>
void copy_scattered(const S* source, int64_t source_row, int64_t source_column, int64_t rows,
                    int64_t columns, D* target, int64_t target_row, int64_t target_column) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      store_one(target + r * target_row + c * target_column,
                static_cast<Accumulate<D>>(load_one(source + r * source_row + c * source_column)));
    }
  }
}

// The same where both have contiguous rows.
template <typename S, typename D>
void copy_rows(const S* source, int64_t source_row, int64_t rows, int64_t columns, D* target,
               int64_t target_row) {
  constexpr int64_t n = kLanes<Accumulate<S>>;
  for (int64_t r = 0; r < rows; ++r) {
    const S* from = source + r * source_row;
    D* to = target + r * target_row;
    int64_t c = 0;
    for (; c + n <= columns; c += n) store(to + c, load(from + c));
    if (c < columns) store_first(to + c, load_first(from + c, columns - c), columns - c);
  }
}

// target[c * target_column + r] = source[r * source_row + c], by squares in registers.
template <typename S, typename D>
void copy_transposed(const S* source, int64_t source_row, int64_t rows, int64_t columns, D* target,
                     int64_t target_column) {
  using T = Accumulate<S>;
  constexpr int64_t n = kLanes<T>;
  for (int64_t r = 0; r < rows; r += n) {
    const int64_t square_rows = rows - r < n ? rows - r : n;
    for (int64_t c = 0; c < columns; c += n) {
      const int64_t square_columns = columns - c < n ? columns - c : n;
      const S* from = source + r * source_row + c;
      D* to = target + c * target_column + r;
      Vec<T> square[n];
      if (square_rows == n && square_columns == n) {
        SEP_ATTN_UNROLL
        for (int i = 0; i < n; ++i) square[i] = load(from + i * source_row);
        transpose<T>(square);
        SEP_ATTN_UNROLL
        for (int i = 0; i < n; ++i) store(to + i * target_column, square[i]);
      } else {
        for (int i = 0; i < n; ++i) {
          square[i] =
              i < square_rows ? load_first(from + i * source_row, square_columns) : zero<T>();
        }
        transpose<T>(square);
        for (int i = 0; i < square_columns; ++i) {
          store_first(to + i * target_column, square[i], square_rows);
        }
      }
    }
  }
}

// target[r, c] = source[r, c] for any strides; S and D are equal, or one of them is the type that
// the other accumulates in.
template <typename S, typename D>
void copy_matrix(const S* source, int64_t source_row, int64_t source_column, int64_t rows,
                 int64_t columns, D* target, int64_t target_row, int64_t target_column) {
  if (rows <= 0 || columns <= 0) return;
  if (source_column == 1 && target_column == 1) {
    copy_rows(source, source_row, rows, columns, target, target_row);
  } else if (source_row == 1 && target_row == 1) {
    copy_rows(source, source_column, columns, rows, target, target_column);
  } else if (source_column == 1 && target_row == 1) {
    copy_transposed(source, source_row, rows, columns, target, target_column);
  } else if (source_row == 1 && target_column == 1) {
    copy_transposed(source, source_column, columns, rows, target, target_row);
  } else {
    copy_scattered(source, source_row, source_column, rows, columns, target, target_row,
                   target_column);
  }
}

// ---- Tokens ----

struct TokenPosition {
  int64_t image, y, x;
};

SEP_ATTN_INLINE TokenPosition token_position(const TokenGrid& grid, int64_t token) {
  const int64_t row = token / grid.width;
  return {row / grid.height, row % grid.height, token - row * grid.width};
}

SEP_ATTN_INLINE int64_t token_slice(const TokenGrid& grid, const TokenPosition& at) {
  return (at.image * grid.patch_h + at.y % grid.patch_h) * grid.patch_w + at.x % grid.patch_w;
}

SEP_ATTN_INLINE int64_t token_offset(const TokenGrid& grid, const TokenPosition& at) {
  return at.image * grid.stride_batch + at.y * grid.stride_height + at.x * grid.stride_width;
}

// The tokens in storage order, one after the other, without a division each.
class TokenWalk {
 public:
  TokenWalk(const TokenGrid& grid, int64_t token)
      : grid_(&grid),
        at_(token_position(grid, token)),
        py_(at_.y % grid.patch_h),
        px_(at_.x % grid.patch_w) {}

  const TokenPosition& position() const { return at_; }
  int64_t slice() const { return (at_.image * grid_->patch_h + py_) * grid_->patch_w + px_; }
  // How many tokens from here on are known to belong to the same slice.
  int64_t run() const {
    if (grid_->patch_w != 1) return 1;
    const int64_t row = grid_->width - at_.x;
    return grid_->patch_h != 1 ? row : row + (grid_->height - 1 - at_.y) * grid_->width;
  }
  void next() {
    if (++px_ == grid_->patch_w) px_ = 0;
    if (++at_.x < grid_->width) return;
    at_.x = px_ = 0;
    if (++py_ == grid_->patch_h) py_ = 0;
    if (++at_.y < grid_->height) return;
    at_.y = py_ = 0;
    ++at_.image;
  }

 private:
  const TokenGrid* grid_;
  TokenPosition at_;
  int64_t py_, px_;
};

// Calls run(token, count, offset) for the stretches of `count` consecutive tokens (storage order:
// image, y, x) that lie grid.stride_width apart, from token `first` on; `token` counts from 0.
template <typename Run>
SEP_ATTN_INLINE void for_each_run(const TokenGrid& grid, int64_t first, int64_t count, Run run) {
  const bool joined_rows = grid.height == 1 || grid.stride_height == grid.width * grid.stride_width;
  const bool joined_images =
      joined_rows && grid.stride_batch == grid.height * grid.width * grid.stride_width;
  const int64_t period =
      joined_images ? INT64_MAX : (joined_rows ? grid.height * grid.width : grid.width);
  for (int64_t done = 0; done < count;) {
    const int64_t token = first + done;
    const int64_t left = period - token % period;
    const int64_t length = left < count - done ? left : count - done;
    run(done, length, token_offset(grid, token_position(grid, token)));
    done += length;
  }
}

// tile[t * stride + d] = channel d of token first + t, for `count` tokens in storage order. Columns
// from grid.channels up to `padded` are set to zero.
template <typename S, typename D>
void gather_tokens(const TokenGrid& grid, const S* data, int64_t first, int64_t count, D* tile,
                   int64_t stride, int64_t padded) {
  for_each_run(grid, first, count, [&](int64_t token, int64_t length, int64_t offset) {
    copy_matrix(data + offset, grid.stride_width, grid.stride_channel, length, grid.channels,
                tile + token * stride, stride, int64_t{1});
  });
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t d = grid.channels; d < padded; ++d) tile[t * stride + d] = D{};
  }
}

// The inverse of gather_tokens.
template <typename S>
void scatter_tokens(const TokenGrid& grid, S* data, int64_t first, int64_t count,
                    const Accumulate<S>* tile, int64_t stride) {
  for_each_run(grid, first, count, [&](int64_t token, int64_t length, int64_t offset) {
    copy_matrix(tile + token * stride, stride, int64_t{1}, length, grid.channels, data + offset,
                grid.stride_width, grid.stride_channel);
  });
}

// panel[d * stride + t] = channel d of token first + t: tokens on the vector lanes. Lanes from
// `count` up to `padded` are set to zero.
template <typename S>
void gather_channels(const TokenGrid& grid, const S* data, int64_t first, int64_t count,
                     Accumulate<S>* panel, int64_t stride, int64_t padded) {
  for_each_run(grid, first, count, [&](int64_t token, int64_t length, int64_t offset) {
    copy_matrix(data + offset, grid.stride_width, grid.stride_channel, length, grid.channels,
                panel + token, int64_t{1}, stride);
  });
  if (count < padded) {
    for (int64_t d = 0; d < grid.channels; ++d) {
      for (int64_t t = count; t < padded; ++t) panel[d * stride + t] = 0;
    }
  }
}

// The inverse of gather_channels.
template <typename S>
void scatter_channels(const TokenGrid& grid, S* data, int64_t first, int64_t count,
                      const Accumulate<S>* panel, int64_t stride) {
  for_each_run(grid, first, count, [&](int64_t token, int64_t length, int64_t offset) {
    copy_matrix(panel + token, int64_t{1}, stride, length, grid.channels, data + offset,
                grid.stride_width, grid.stride_channel);
  });
}

// ---- Slices ----

// One slice as a grid of its own: batch 1, patch (1, 1), its tokens in storage order.
struct Slice {
  TokenGrid grid;
  int64_t offset;         // of its first token in the operand
  int64_t image, py, px;  // its place in the operand's grid
};

inline Slice make_slice(const TokenGrid& grid, int64_t slice) {
  const int64_t px = slice % grid.patch_w;
  const int64_t py = slice / grid.patch_w % grid.patch_h;
  const int64_t image = slice / (grid.patch_w * grid.patch_h);
  TokenGrid own = grid;
  own.batch = 1;
  own.height = grid.height / grid.patch_h;
  own.width = grid.width / grid.patch_w;
  own.stride_height = grid.stride_height * grid.patch_h;
  own.stride_width = grid.stride_width * grid.patch_w;
  own.patch_h = own.patch_w = 1;
  return {own, image * grid.stride_batch + py * grid.stride_height + px * grid.stride_width, image,
          py, px};
}

// A slice's share of one value a token.
template <typename S>
struct SliceValues {
  S* data;  // of the slice's first token; null where the option is not used
  int64_t stride_height, stride_width, width;

  // Every token lies stride_width after the one before.
  SEP_ATTN_INLINE bool uniform() const { return stride_height == width * stride_width; }

  SEP_ATTN_INLINE S& operator[](int64_t token) const {
    if (uniform()) return data[token * stride_width];
    return data[token / width * stride_height + token % width * stride_width];
  }
};

template <typename S, typename Data>
SEP_ATTN_INLINE SliceValues<S> slice_values(const TokenGrid& grid, const Slice& slice,
                                            const TokenValues<Data>& values) {
  S* data = static_cast<S*>(values.data);
  if (data != nullptr) {
    data += slice.image * values.stride_batch + slice.py * values.stride_height +
            slice.px * values.stride_width;
  }
  const int64_t stride_width = values.stride_width * grid.patch_w;
  const int64_t stride_height = slice.grid.height == 1 ? slice.grid.width * stride_width
                                                       : values.stride_height * grid.patch_h;
  return {data, stride_height, stride_width, slice.grid.width};
}

// Contiguous [batch, height, width] values as TokenValues.
template <typename Data>
SEP_ATTN_INLINE TokenValues<Data> contiguous_values(const TokenGrid& grid, Data* data) {
  return {data, grid.height * grid.width, grid.width, 1};
}

// ---- Tasks ----

// body(task) for every task in [0, tasks), in parallel where that can help. `body` must not throw.
template <typename Body>
SEP_ATTN_INLINE void run_tasks(const ParallelFor& parallel, int64_t tasks, const Body& body) {
  if (tasks <= 1 || parallel.threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  parallel.run(
      tasks, [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
