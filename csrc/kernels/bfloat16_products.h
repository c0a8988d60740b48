// Operands of bfloat16 dot products (VDPBF16PS): the depth of a product goes by pairs of channels,
// and a pair lies where a product in float has one value. Rows of tokens and weights are rows of
// pairs as they lie, if they have an even number of channels; of an odd number, the last pair is
// filled up with zero on both sides, lest the zero of one meets an infinity in the other.
#pragma once

#include "kernels.h"
#include "products.h"
#include "scratch.h"
#include "simd.h"
#include "tokens.h"

#if defined(__AVX512BF16__)

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

// ---- Making pairs ----

// Pairs of channels: target[k * target_row + c] = source[2k, c] and source[2k + 1, c], where
// source[d, c] = source[d * source_row + c * source_column].
inline void pair_channels(const BFloat16* source, int64_t source_row, int64_t source_column,
                          int64_t channels, int64_t columns, BFloat16Pair* target,
                          int64_t target_row) {
  constexpr int64_t n = kLanes<BFloat16Pair>;
  if (source_row == 1 && channels % 2 == 0 && source_column % 2 == 0) {
    copy_transposed(reinterpret_cast<const BFloat16Pair*>(source), source_column / 2, columns,
                    channels / 2, target, target_row);
    return;
  }
  for (int64_t d = 0; d < channels; d += 2) {
    const BFloat16* first = source + d * source_row;
    BFloat16Pair* to = target + d / 2 * target_row;
    const bool whole = d + 1 < channels;
    int64_t c = 0;
    for (; source_column == 1 && c < columns; c += n) {
      const int64_t count = smaller(n, columns - c);
      const auto load_bits = [&](const BFloat16* p) __attribute__((always_inline)) {
        const HalfBits bits =
            count == n ? *reinterpret_cast<const HalfBitsUnaligned*>(p) : load_half_first(p, count);
        return __builtin_convertvector(bits, FloatBits);
      };
      FloatBits pairs = load_bits(first + c);
      if (whole) pairs |= load_bits(first + source_row + c) << 16;
      store_first(to + c, (Vec<BFloat16Pair>)pairs, count);
    }
    for (; c < columns; ++c) {
      const BFloat16* at = first + c * source_column;
      to[c] = {*at, whole ? at[source_row] : BFloat16{}};
    }
  }
}

// Rows of channels as rows of pairs.
inline void copy_rows(const BFloat16* source, int64_t source_row, int64_t rows, int64_t channels,
                      BFloat16Pair* target, int64_t target_row) {
  for (int64_t r = 0; r < rows; ++r) {
    BFloat16* to = reinterpret_cast<BFloat16*>(target + r * target_row);
    __builtin_memcpy(to, source + r * source_row,
                     static_cast<std::size_t>(channels) * sizeof(BFloat16));
    if (channels % 2 != 0) to[channels] = BFloat16{};
  }
}

// ---- Tokens ----

inline void gather_tokens(const TokenGrid& grid, const BFloat16* data, int64_t first, int64_t count,
                          BFloat16Pair* tile, int64_t stride, int64_t padded) {
  gather_tokens(grid, data, first, count, reinterpret_cast<BFloat16*>(tile), 2 * stride,
                2 * padded);
}

inline Rows<const BFloat16Pair> read_rows(const TokenGrid& grid, const BFloat16* data,
                                          int64_t first, int64_t count, BFloat16Pair* tile,
                                          int64_t stride) {
  if (grid.channels % 2 == 0 && grid.stride_width % 2 == 0 && tokens_are_rows(grid, first, count)) {
    return {reinterpret_cast<const BFloat16Pair*>(data +
                                                  token_offset(grid, token_position(grid, first))),
            grid.stride_width / 2};
  }
  gather_tokens(grid, data, first, count, tile, stride, product_depth<BFloat16>(grid.channels));
  return {tile, stride};
}

inline void gather_channels(const TokenGrid& grid, const BFloat16* data, int64_t first,
                            int64_t count, BFloat16Pair* panel, int64_t stride, int64_t padded) {
  for_each_run(grid, first, count, [&](int64_t token, int64_t length, int64_t offset) {
    pair_channels(data + offset, grid.stride_channel, grid.stride_width, grid.channels, length,
                  panel + token, stride);
  });
  for (int64_t k = 0; count < padded && k < product_depth<BFloat16>(grid.channels); ++k) {
    for (int64_t t = count; t < padded; ++t) panel[k * stride + t] = BFloat16Pair{};
  }
}

// ---- Panels ----

inline void pack_panel(const BFloat16* data, int64_t stride_k, int64_t stride_c, int64_t depth,
                       int64_t columns, int64_t first, BFloat16Pair* panel) {
  constexpr int64_t width = kPanelWidth<BFloat16Pair>;
  const int64_t count = smaller(width, columns - first);
  pair_channels(data + first * stride_c, stride_k, stride_c, depth, count, panel, width);
  for (int64_t k = 0; count < width && k < product_depth<BFloat16>(depth); ++k) {
    for (int64_t c = count; c < width; ++c) panel[k * width + c] = BFloat16Pair{};
  }
}

// A row of the panel holds two rows of the product.
template <>
struct LanePlace<BFloat16Pair> {
  BFloat16Pair* at;
  unsigned row;  // 0 or 1, in the pairs that the block begins with

  SEP_ATTN_INLINE void store_row(int r, int v, Vec<float> value) const {
    store_half(at + (row + r) / 2 * kPanelWidth<BFloat16Pair> + v * kLanes<BFloat16Pair>,
               (row + r) % 2, value);
  }
};

template <>
SEP_ATTN_INLINE LanePlace<BFloat16Pair> LanePanel<BFloat16Pair>::place(int64_t row,
                                                                       int64_t column) const {
  return {at(row / 2, column), static_cast<unsigned>(row % 2)};
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn

#endif
