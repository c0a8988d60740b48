// Tokens on the vector lanes: the contexts that gate them, and products that end in an operand of
// any layout.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "micro_kernel.h"
#include "products.h"
#include "scratch.h"
#include "simd.h"
#include "tokens.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

constexpr int64_t kLaneTile = 128;  // tokens of a tile, at most

// The slices of a vector's tokens.
template <typename T>
struct LaneSlices {
  int64_t of[kLanes<T>];
};

// The contexts of vectors of tokens. Those of a vector with tokens of several slices are mixed, a
// vector of lanes a row; few patterns of slices recur, so mixed ones are kept from vector to vector
// and from tile to tile.
template <typename T>
class LaneContexts {
 public:
  // contexts + slice * stride is a slice's context. There is room for `most` patterns, more than
  // the vectors of any tile: `slices` [most], and `mixed` [most, rows, lanes].
  LaneContexts(const TokenGrid& grid, const T* contexts, int64_t stride, int64_t most,
               LaneSlices<T>* slices, T* mixed)
      : grid_(grid),
        contexts_(contexts),
        stride_(stride),
        most_(most),
        slices_(slices),
        mixed_(mixed) {}

  // The context of every vector of a tile's tokens, rows [rows) only. What was found before for
  // other rows has to be forgotten first.
  void find(Range tokens, Range rows, LaneContext<T>* found) {
    const int64_t vectors = (tokens.count() + kLanes<T> - 1) / kLanes<T>;
    if (count_ + vectors > most_) forget();
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t first = i * kLanes<T>;
      const int64_t count = smaller(kLanes<T>, tokens.count() - first);
      TokenWalk walk(grid_, tokens.begin + first);
      if (walk.run() >= count) {
        const int64_t slice = walk.slice();
        found[i] = {contexts_ + slice * stride_ + rows.begin, nullptr, slice, nullptr};
        continue;
      }
      LaneSlices<T>& wanted = slices_[count_];
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        wanted.of[lane] = lane < count ? walk.slice() : wanted.of[0];
        if (lane < count) walk.next();
      }
      constexpr int64_t kLookBack = 8;
      int64_t pattern = larger(0, count_ - kLookBack);
      while (std::memcmp(&slices_[pattern], &wanted, sizeof(wanted)) != 0) ++pattern;
      T* lanes = mixed_ + pattern * rows.count() * kLanes<T>;
      if (pattern == count_) mix(slices_[count_++], rows, lanes);
      found[i] = {nullptr, lanes, -1, slices_[pattern].of};
    }
  }

  void forget() { count_ = 0; }

 private:
  void mix(const LaneSlices<T>& slices, Range rows, T* lanes) const {
    const T* pieces[kLanes<T>];
    IntVec<T> masks[kLanes<T>];
    int64_t piece_slices[kLanes<T>];
    int64_t used = 0;
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      int64_t piece = 0;
      while (piece < used && piece_slices[piece] != slices.of[i]) ++piece;
      if (piece == used) {
        piece_slices[used] = slices.of[i];
        pieces[used] = contexts_ + slices.of[i] * stride_;
        masks[used++] = IntVec<T>{};
      }
      masks[piece][i] = -1;
    }
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      Vec<T> value = broadcast<T>(pieces[0][row]);
      for (int64_t piece = 1; piece < used; ++piece) {
        value = masks[piece] ? broadcast<T>(pieces[piece][row]) : value;
      }
      store(lanes + (row - rows.begin) * kLanes<T>, value);
    }
  }

  const TokenGrid& grid_;
  const T* contexts_;
  const int64_t stride_, most_;
  LaneSlices<T>* slices_;
  T* mixed_;
  int64_t count_ = 0;
};

// From here on, no cache holds a tensor for long.
constexpr int64_t kFarBytes = 8 << 20;

// target[t, row] = bias[row] + sum_k A[row, k] B[k, t]: `rows` channels, from that of `target` on,
// of an operand's tokens [tokens). A as in multiply_block; `tile` has room for
// [panels of tokens, rows, kPanelWidth].
template <LeftOperand kLeft, typename S, typename P, typename T>
void multiply_into_tokens(const TokenGrid& grid, S* target, Range tokens, int64_t rows,
                          int64_t depth, const P* a, int64_t stride, Panels<P> b, const T* bias,
                          T* tile) {
  constexpr int64_t width = kPanelWidth<T>;
  if constexpr (std::is_same<S, T>::value) {
    int64_t runs = 0;
    for_each_run(grid, tokens.begin, tokens.count(), [&](int64_t, int64_t, int64_t) { ++runs; });
    if (grid.stride_width == 1 && runs == 1) {
      const int64_t bytes = grid.batch * grid.height * grid.width * grid.channels * sizeof(S);
      multiply<P, kLeft>(
          rows, tokens.count(), depth, a, stride, b,
          StoreTokens<T>{target + token_offset(grid, token_position(grid, tokens.begin)),
                         grid.stride_channel, tokens.count(), bias, bytes >= kFarBytes});
      return;
    }
  }
  const int64_t panel_size = rows * width;
  multiply<P, kLeft>(rows, tokens.count(), depth, a, stride, b,
                     StoreLanes<T>{{tile, panel_size}, bias});
  TokenGrid own_channels = grid;
  own_channels.channels = rows;
  for (int64_t first = 0; first < tokens.count(); first += width) {
    scatter_channels(own_channels, target, tokens.begin + first,
                     smaller(width, tokens.count() - first), tile + first / width * panel_size,
                     width);
  }
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
