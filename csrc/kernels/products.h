// The matrix products of a layer: tiles of tokens, operands, packed weights and results.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "micro_kernel.h"
#include "scratch.h"
#include "simd.h"
#include "tokens.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

constexpr int64_t kTileBlocks = kBlockRows == 14 ? 8 : 8;
constexpr int64_t kTileRows = kTileBlocks * kBlockRows;

// Workers worth starting for `tokens` of so many operations each: one for half a million.
constexpr int64_t workers_for(int64_t tokens, int64_t operations, int64_t threads) {
  return larger(1, smaller(smaller(threads, tokens), tokens * operations / (1 << 19)));
}

// Cuts a range of tokens into tiles whose heights are whole numbers of nearly equal blocks; low
// ones where there are few, so that all workers are busy to the end.
struct Tiles {
  Range tokens;
  int64_t blocks, count;

  explicit Tiles(Range range, int64_t workers = 1)
      : tokens(range),
        blocks((range.count() + kBlockRows - 1) / kBlockRows),
        count((blocks + height(blocks, workers) - 1) / height(blocks, workers)) {}
  Range operator[](int64_t tile) const { return {edge(tile), edge(tile + 1)}; }

 private:
  static constexpr int64_t height(int64_t blocks, int64_t workers) {
    return workers == 1 ? kTileBlocks : smaller(kTileBlocks, larger(2, blocks / (4 * workers)));
  }
  int64_t edge(int64_t tile) const {
    return tokens.begin + tokens.count() * (blocks * tile / count) / blocks;
  }
};

// ---- Operands ----

// A matrix of weights with contiguous rows: the given one, or a copy when its rows are not.
template <typename S>
class WeightRows {
 public:
  WeightRows(const Matrix& weight, int64_t rows, int64_t columns)
      : copy_(contiguous(weight, columns) ? 0 : rows * columns) {
    if (copy_.get() == nullptr) {
      data_ = static_cast<const S*>(weight.data);
      stride_ = weight.stride_row;
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        copy_[r * columns + c] =
            static_cast<const S*>(weight.data)[r * weight.stride_row + c * weight.stride_column];
      }
    }
    data_ = copy_.get();
    stride_ = columns;
  }
  const S* row(int64_t r) const { return data_ + r * stride_; }
  int64_t stride() const { return stride_; }

 private:
  static bool contiguous(const Matrix& weight, int64_t columns) {
    return weight.stride_column == 1 || columns == 1;
  }
  Buffer<S> copy_;
  const S* data_;
  int64_t stride_;
};

// target[i] = vector[first + i], zero where the vector is absent and from `count` up to `padded`.
template <typename S>
void read_vector(const Vector& vector, int64_t first, int64_t count, int64_t padded,
                 Accumulate<S>* target) {
  const S* data = static_cast<const S*>(vector.data);
  for (int64_t i = 0; i < padded; ++i) {
    target[i] = data != nullptr && i < count ? load_one(data + (first + i) * vector.stride) : 0;
  }
}

// Rows of values, one token a row.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

// True when the tokens can be used where they lie: computed in their own type, channels contiguous
// and all equally far apart.
template <typename S>
bool tokens_in_place(const TokenGrid& grid, int64_t first, int64_t count) {
  if (!std::is_same<S, Accumulate<S>>::value) return false;
  if (grid.stride_channel != 1 && grid.channels != 1) return false;
  int64_t runs = 0;
  for_each_run(grid, first, count, [&](int64_t, int64_t, int64_t) { ++runs; });
  return runs == 1;
}

// Tokens [first, first + count) as rows: where they lie, or gathered into the tile.
template <typename S>
Rows<const Accumulate<S>> read_rows(const TokenGrid& grid, const S* data, int64_t first,
                                    int64_t count, Accumulate<S>* tile, int64_t stride) {
  if constexpr (std::is_same<S, Accumulate<S>>::value) {
    if (tokens_in_place<S>(grid, first, count)) {
      return {data + token_offset(grid, token_position(grid, first)), grid.stride_width};
    }
  }
  gather_tokens(grid, data, first, count, tile, stride, grid.channels);
  return {tile, stride};
}

// The row itself where whole vectors can be read from it, else a copy padded with zeros.
template <typename T>
const T* padded_row(const T* row, int64_t channels, T* copy) {
  if (channels % kLanes<T> == 0) return row;
  for (int64_t d = 0; d < round_up(channels, kLanes<T>); ++d)
    copy[d] = d < channels ? row[d] : T{0};
  return copy;
}

// A panel of kPanelWidth columns of B, B[k, c] = data[k * stride_k + (first + c) * stride_c], zero
// past the last of `columns`.
template <typename S>
void pack_panel(const S* data, int64_t stride_k, int64_t stride_c, int64_t depth, int64_t columns,
                int64_t first, Accumulate<S>* panel) {
  using T = Accumulate<S>;
  constexpr int64_t width = kPanelWidth<T>;
  const int64_t count = smaller(width, columns - first);
  copy_matrix(data + first * stride_c, stride_k, stride_c, depth, count, panel, width, int64_t{1});
  for (int64_t k = 0; count < width && k < depth; ++k) {
    for (int64_t c = count; c < width; ++c) panel[k * width + c] = 0;
  }
}

template <typename T>
constexpr int64_t panels_in(int64_t columns) {
  return (columns + kPanelWidth<T> - 1) / kPanelWidth<T>;
}

// ---- Results of a product: what sums start from and where they go ----

template <typename T>
struct StoreSum {
  T* target;
  int64_t stride;

  SEP_ATTN_INLINE Vec<T> start(int64_t, int64_t) const { return zero<T>(); }
  SEP_ATTN_INLINE void finish(int64_t row, int64_t column, Vec<T> sum) const {
    store(target + row * stride + column, sum);
  }
};

template <typename T>
struct StoreBiased : StoreSum<T> {
  const T* bias;

  SEP_ATTN_INLINE Vec<T> start(int64_t, int64_t column) const { return load(bias + column); }
};

template <typename T>
struct AddSum : StoreSum<T> {
  // The target is on its way from memory while the product is computed.
  SEP_ATTN_INLINE Vec<T> start(int64_t row, int64_t column) const {
    __builtin_prefetch(this->target + row * this->stride + column, 1);
    return zero<T>();
  }
  SEP_ATTN_INLINE void finish(int64_t row, int64_t column, Vec<T> sum) const {
    T* at = this->target + row * this->stride + column;
    store(at, load(at) + sum);
  }
};

template <typename T, Activation kActivation>
SEP_ATTN_INLINE Vec<T> activate(Vec<T> v) {
  return kActivation == Activation::kRelu ? maximum(zero<T>(), v) : v;  // keeps NaN
}

template <typename T, Activation kActivation>
struct StoreGated : StoreBiased<T> {
  const T* const* context;  // of each row
  Rows<const T> next;       // the tile to come

  SEP_ATTN_INLINE void finish(int64_t row, int64_t column, Vec<T> v) const {
    __builtin_prefetch(next.data + row * next.stride + column, 0, 2);
    store(this->target + row * this->stride + column,
          activate<T, kActivation>(v) * load(context[row] + column));
  }
};

// Tokens on the vector lanes: columns of the product are tokens, kept in panels [channels, width].
template <typename T>
struct LanePanel {
  T* data;
  int64_t panel_stride;

  SEP_ATTN_INLINE T* at(int64_t row, int64_t column) const {
    constexpr int64_t width = kPanelWidth<T>;
    return data + column / width * panel_stride + row * width + column % width;
  }
};

template <typename T>
struct StoreLanes {
  LanePanel<T> target;
  const T* bias;  // of each row

  SEP_ATTN_INLINE Vec<T> start(int64_t row, int64_t) const { return broadcast<T>(bias[row]); }
  SEP_ATTN_INLINE void finish(int64_t row, int64_t column, Vec<T> sum) const {
    store(target.at(row, column), sum);
  }
};

// Stores rows of tokens where they belong, up to token `tokens`.
template <typename T>
struct StoreTokens {
  T* target;
  int64_t stride, tokens;
  const T* bias;

  SEP_ATTN_INLINE Vec<T> start(int64_t row, int64_t) const { return broadcast<T>(bias[row]); }
  SEP_ATTN_INLINE void finish(int64_t row, int64_t column, Vec<T> sum) const {
    T* at = target + row * stride + column;
    if (tokens - column >= kLanes<T>) {
      store(at, sum);
    } else {
      store_first(at, sum, tokens - column);
    }
  }
};

// The context of a vector of tokens: of one slice, a value a row; or of several, a vector a row.
template <typename T>
struct LaneContext {
  const T* shared;
  const T* lanes;
};

template <typename T, Activation kActivation>
struct StoreGatedLanes : StoreLanes<T> {
  const LaneContext<T>* contexts;  // of each vector of tokens

  SEP_ATTN_INLINE void finish(int64_t row, int64_t column, Vec<T> v) const {
    const LaneContext<T>& own = contexts[column / kLanes<T>];
    const Vec<T> c =
        own.shared != nullptr ? broadcast<T>(own.shared[row]) : load(own.lanes + row * kLanes<T>);
    store(this->target.at(row, column), activate<T, kActivation>(v) * c);
  }
};

// Stores a sum as S, only up to column `columns`.
template <typename S>
struct StoreResult {
  S* target;
  int64_t stride, columns;

  SEP_ATTN_INLINE Vec<Accumulate<S>> start(int64_t, int64_t) const { return zero<Accumulate<S>>(); }
  SEP_ATTN_INLINE void finish(int64_t row, int64_t column, Vec<Accumulate<S>> sum) const {
    S* at = target + row * stride + column;
    const int64_t left = columns - column;
    if (left >= kLanes<Accumulate<S>>) {
      store(at, sum);
    } else {
      store_first(at, sum, left);
    }
  }
};

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
