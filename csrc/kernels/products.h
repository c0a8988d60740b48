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

constexpr int64_t kTileBlocks = 8;
constexpr int64_t kTileRows = kTileBlocks * kBlockRows;

// Workers worth starting for `tokens` of so many operations each: one for every million.
constexpr int64_t workers_for(int64_t tokens, int64_t operations, int64_t threads) {
  return larger(1, smaller(smaller(threads, tokens), tokens * operations / (1 << 20)));
}

// Parts with sums of their own, which are added up in their order: a few for each worker, so that a
// slow one takes fewer.
constexpr int64_t parts_in(int64_t tokens, int64_t least, int64_t workers) {
  if (workers == 1) return 1;
  return smaller(tokens, smaller(4 * workers, larger(workers, tokens / least)));
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

// The depth of a product over so many channels.
template <typename S>
constexpr int64_t product_depth(int64_t channels) {
  constexpr int64_t elements = OperandTypes<S>::kElements;
  return (channels + elements - 1) / elements;
}

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

// True when channels are contiguous and the tokens all equally far apart.
inline bool tokens_are_rows(const TokenGrid& grid, int64_t first, int64_t count) {
  if (grid.stride_channel != 1 && grid.channels != 1) return false;
  int64_t runs = 0;
  for_each_run(grid, first, count, [&](int64_t, int64_t, int64_t) { ++runs; });
  return runs == 1;
}

// The same where the tokens are computed in their own type: they can be used where they lie.
template <typename S>
bool tokens_in_place(const TokenGrid& grid, int64_t first, int64_t count) {
  return std::is_same<S, Accumulate<S>>::value && tokens_are_rows(grid, first, count);
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

// place(row, column) is what a block of the product that begins there needs, read once: a store of
// the block may change anything else for all that the compiler knows.

template <typename T>
struct StoreSum {
  T* target;
  int64_t stride;

  struct Place {
    T* at;
    int64_t stride;

    SEP_ATTN_INLINE Vec<T> start(int, int) const { return zero<T>(); }
    SEP_ATTN_INLINE void finish(int r, int v, Vec<T> sum) const {
      store(at + r * stride + v * kLanes<T>, sum);
    }
  };
  SEP_ATTN_INLINE Place place(int64_t row, int64_t column) const {
    return {target + row * stride + column, stride};
  }
};

template <typename T>
struct StoreBiased {
  T* target;
  int64_t stride;
  const T* bias;

  struct Place : StoreSum<T>::Place {
    const T* bias;

    SEP_ATTN_INLINE Vec<T> start(int, int v) const { return load(bias + v * kLanes<T>); }
  };
  SEP_ATTN_INLINE Place place(int64_t row, int64_t column) const {
    return {{target + row * stride + column, stride}, bias + column};
  }
};

template <typename T>
struct AddSum {
  T* target;
  int64_t stride;

  struct Place : StoreSum<T>::Place {
    // The target is on its way from memory while the product is computed.
    SEP_ATTN_INLINE Vec<T> start(int r, int v) const {
      __builtin_prefetch(this->at + r * this->stride + v * kLanes<T>, 1);
      return zero<T>();
    }
    SEP_ATTN_INLINE void finish(int r, int v, Vec<T> sum) const {
      T* own = this->at + r * this->stride + v * kLanes<T>;
      store(own, load(own) + sum);
    }
  };
  SEP_ATTN_INLINE Place place(int64_t row, int64_t column) const {
    return {{target + row * stride + column, stride}};
  }
};

template <typename T, Activation kActivation>
SEP_ATTN_INLINE Vec<T> activate(Vec<T> v) {
  return kActivation == Activation::kRelu ? maximum(zero<T>(), v) : v;  // keeps NaN
}

// Stores as E, an element of the next product's operand.
template <typename T, Activation kActivation, typename E = T>
struct StoreGated {
  E* target;
  int64_t stride;
  const T* bias;
  const T* const* context;  // of each row
  Rows<const E> next;       // the tile to come
  Rows<T> values;           // receives the values before the activation, unless null

  struct Place {
    E* at;
    int64_t stride;
    const T* bias;
    const T* const* context;
    int64_t column;
    const E* next;
    int64_t next_stride;
    T* values;
    int64_t values_stride;

    SEP_ATTN_INLINE Vec<T> start(int, int v) const { return load(bias + v * kLanes<T>); }
    SEP_ATTN_INLINE void finish(int r, int v, Vec<T> value) const {
      if (values != nullptr) store(values + r * values_stride + v * kLanes<T>, value);
      __builtin_prefetch(next + r * next_stride + v * kLanes<T>, 0, 2);
      const Vec<T> c = load(context[r] + column + v * kLanes<T>);
      store(at + r * stride + v * kLanes<T>, activate<T, kActivation>(value) * c);
    }
  };
  SEP_ATTN_INLINE Place place(int64_t row, int64_t column) const {
    return {target + row * stride + column,
            stride,
            bias + column,
            context + row,
            column,
            next.data + row * next.stride + column,
            next.stride,
            values.data == nullptr ? nullptr : values.data + row * values.stride + column,
            values.stride};
  }
};

// Where the values of a block go that begins at a row of a LanePanel.
template <typename T>
struct LanePlace {
  T* at;

  SEP_ATTN_INLINE void store_row(int r, int v, Vec<T> value) const {
    store(at + r * kPanelWidth<T> + v * kLanes<T>, value);
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
  SEP_ATTN_INLINE LanePlace<T> place(int64_t row, int64_t column) const {
    return {at(row, column)};
  }
};

template <typename T>
struct StoreLanes {
  LanePanel<T> target;
  const T* bias;  // of each row

  struct Place {
    LanePlace<T> target;
    const T* bias;

    SEP_ATTN_INLINE Vec<T> start(int r, int) const { return broadcast<T>(bias[r]); }
    SEP_ATTN_INLINE void finish(int r, int v, Vec<T> sum) const { target.store_row(r, v, sum); }
  };
  SEP_ATTN_INLINE Place place(int64_t row, int64_t column) const {
    return {target.place(row, column), bias + row};
  }
};

// Stores rows of tokens where they belong, up to token `tokens`.
template <typename T>
struct StoreTokens {
  T* target;
  int64_t stride, tokens;
  const T* bias;
  bool is_far;  // in memory, not in a cache: asked for while the product is computed

  struct Place {
    T* at;
    int64_t stride, left;
    const T* bias;

    SEP_ATTN_INLINE Vec<T> start(int r, int) const { return broadcast<T>(bias[r]); }
    SEP_ATTN_INLINE void finish(int r, int v, Vec<T> sum) const {
      T* own = at + r * stride + v * kLanes<T>;
      if (left >= (v + 1) * kLanes<T>) {
        store(own, sum);
      } else {
        store_first(own, sum, left - v * kLanes<T>);
      }
    }
  };
  SEP_ATTN_INLINE Place place(int64_t row, int64_t column) const {
    for (int r = 0; is_far && r < kBlockRows; ++r) {
      for (int v = 0; v < kPanelVectors; ++v) {
        __builtin_prefetch(target + (row + r) * stride + column + v * kLanes<T>, 1);
      }
    }
    return {target + row * stride + column, stride, tokens - column, bias + row};
  }
};

// Values kept on the lanes (see kValuesWidth): channels from `row` on of tokens from `first` on.
template <typename T>
struct KeptLanes {
  T* data;
  int64_t channels, row, first;

  SEP_ATTN_INLINE T* at(int64_t r, int64_t column) const {
    const int64_t token = first + column;
    return data + (token / kValuesWidth * channels + row + r) * kValuesWidth + token % kValuesWidth;
  }
};

// The context of a vector of tokens: of one slice, a value a row; or of several, a vector a row.
template <typename T>
struct LaneContext {
  const T* shared;
  const T* lanes;
  int64_t slice;          // of all tokens
  const int64_t* slices;  // of every lane
};

template <typename T, Activation kActivation, typename P = T>
struct StoreGatedLanes {
  LanePanel<P> target;
  const T* bias;                   // of each row
  const LaneContext<T>* contexts;  // of each vector of tokens
  KeptLanes<T> values;             // receives the values before the activation, unless null

  struct Place {
    LanePlace<P> target;
    const T* bias;
    LaneContext<T> contexts[kPanelVectors];
    int64_t row;
    T* values[kPanelVectors];

    SEP_ATTN_INLINE Vec<T> start(int r, int) const { return broadcast<T>(bias[r]); }
    SEP_ATTN_INLINE void finish(int r, int v, Vec<T> value) const {
      if (values[v] != nullptr) store(values[v] + r * kValuesWidth, value);
      const LaneContext<T>& own = contexts[v];
      const Vec<T> c = own.shared != nullptr ? broadcast<T>(own.shared[row + r])
                                             : load(own.lanes + (row + r) * kLanes<T>);
      target.store_row(r, v, activate<T, kActivation>(value) * c);
    }
  };
  SEP_ATTN_INLINE Place place(int64_t row, int64_t column) const {
    const LaneContext<T>* own = contexts + column / kLanes<T>;
    Place place{target.place(row, column), bias + row, {}, row, {}};
    for (int v = 0; v < kPanelVectors; ++v) {
      place.contexts[v] = own[v];
      if (values.data != nullptr) place.values[v] = values.at(row, column + v * kLanes<T>);
    }
    return place;
  }
};

// Stores a sum as S, only up to column `columns`.
template <typename S>
struct StoreResult {
  S* target;
  int64_t stride, columns;

  struct Place {
    S* at;
    int64_t stride, left;

    SEP_ATTN_INLINE Vec<Accumulate<S>> start(int, int) const { return zero<Accumulate<S>>(); }
    SEP_ATTN_INLINE void finish(int r, int v, Vec<Accumulate<S>> sum) const {
      constexpr int64_t n = kLanes<Accumulate<S>>;
      S* own = at + r * stride + v * n;
      if (left >= (v + 1) * n) {
        store(own, sum);
      } else {
        store_first(own, sum, left - v * n);
      }
    }
  };
  SEP_ATTN_INLINE Place place(int64_t row, int64_t column) const {
    return {target + row * stride + column, stride, columns - column};
  }
};

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
