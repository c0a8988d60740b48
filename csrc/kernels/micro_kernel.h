// The matrix product of all fused kernels: a block of rows by a panel of columns, held in
// registers.
#pragma once

#include "simd.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

#if defined(__AVX512F__)
// 28 sums, 2 panel vectors and a broadcast in 32 registers
constexpr int kBlockRows = 14, kPanelVectors = 2;
#elif defined(__aarch64__)
// 24 sums, 3 panel vectors and scalars in 32 registers. One side is read by element, so 24
// multiplications take 11 loads; 14 rows of 2 vectors would take 16 for 28.
constexpr int kBlockRows = 8, kPanelVectors = 3;
#else
// 12 sums, 2 panel vectors and a broadcast in 16 registers
constexpr int kBlockRows = 6, kPanelVectors = 2;
#endif
constexpr int kRowsAhead = 12;  // of both operands, asked for while a block is computed
template <typename T>
constexpr int64_t kPanelWidth = kPanelVectors * kLanes<T>;

// The right-hand operand, by panels of kPanelWidth columns: element (k, c) lies at
// data[c / kPanelWidth * panel_stride + k * row_stride + c % kPanelWidth].
template <typename T>
struct Panels {
  const T* data;
  int64_t panel_stride, row_stride;
};

enum class LeftOperand { kRows, kColumns };

// place = result.place(row, column) says where a block begins; place.finish(r, v, sum) receives
// place.start(r, v) + sum_k A[row + r, k] B[k, column + v * lanes] for kRows x kVectors vectors.
// Where T is a pair of values, so is every element: `depth` counts pairs, a product is of two.
// A[r, k] is a[r * stride + k] for kRows and a[k * stride + r] for kColumns.
template <typename T, LeftOperand kLeft, int kRows, int kVectors, typename Result>
SEP_ATTN_INLINE void multiply_block(int64_t depth, const T* a, int64_t stride, const T* b,
                                    int64_t row_stride, int64_t row, int64_t column,
                                    const Result& result) {
  const auto place = result.place(row, column);
  SumVec<T> sums[kRows][kVectors];
  SEP_ATTN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    SEP_ATTN_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[r][v] = place.start(r, v);
  }
  // A row's address is one of three bases plus 0 to 4 strides: few registers, nothing spilled.
  constexpr int kGroup = 5;
  constexpr int kBases = kLeft == LeftOperand::kRows ? (kRows + kGroup - 1) / kGroup : 1;
  const T* bases[kBases];
  SEP_ATTN_UNROLL
  for (int i = 0; i < kBases; ++i) bases[i] = a + i * kGroup * stride;
  for (int64_t k = 0; k < depth; ++k) {
    SEP_ATTN_UNROLL
    for (int i = 0; i < kBases; ++i) asm("" : "+r"(bases[i]));
    Vec<T> panel[kVectors];
    SEP_ATTN_UNROLL
    for (int v = 0; v < kVectors; ++v) panel[v] = load(b + v * kLanes<T>);
    // A panel of many channels does not stay in the first cache.
    SEP_ATTN_UNROLL
    for (int line = 0; line < kVectors * kVectorBytes; line += 64) {
      __builtin_prefetch(b + kRowsAhead * row_stride + line / static_cast<int>(sizeof(T)));
    }
    if (kLeft == LeftOperand::kColumns) __builtin_prefetch(bases[0] + kRowsAhead * stride);
    SEP_ATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> left = broadcast<T>(
          kLeft == LeftOperand::kRows ? bases[r / kGroup][r % kGroup * stride] : bases[0][r]);
      SEP_ATTN_UNROLL
      for (int v = 0; v < kVectors; ++v) add_product(sums[r][v], left, panel[v]);
    }
    SEP_ATTN_UNROLL
    for (int i = 0; i < kBases; ++i) bases[i] += kLeft == LeftOperand::kRows ? 1 : stride;
    b += row_stride;
  }
  SEP_ATTN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    SEP_ATTN_UNROLL
    for (int v = 0; v < kVectors; ++v) place.finish(r, v, sums[r][v]);
  }
}

template <typename T, LeftOperand kLeft, int kVectors, typename Result, int kRows = kBlockRows>
SEP_ATTN_INLINE void multiply_rows(int64_t rows, int64_t depth, const T* a, int64_t stride,
                                   const T* b, int64_t row_stride, int64_t row, int64_t column,
                                   const Result& result) {
  if (rows == kRows) {
    multiply_block<T, kLeft, kRows, kVectors>(depth, a, stride, b, row_stride, row, column, result);
  } else if constexpr (kRows > 1) {
    multiply_rows<T, kLeft, kVectors, Result, kRows - 1>(rows, depth, a, stride, b, row_stride, row,
                                                         column, result);
  }
}

template <typename T, LeftOperand kLeft, typename Result>
SEP_ATTN_INLINE void multiply_panel(int64_t rows, int64_t columns, int64_t depth, const T* a,
                                    int64_t stride, Panels<T> b, int64_t row, int64_t column,
                                    const Result& result) {
  const T* first = a + row * (kLeft == LeftOperand::kRows ? stride : 1);
  const T* panel = b.data + column / kPanelWidth<T> * b.panel_stride;
  if (columns - column <= kLanes<T>) {
    multiply_rows<T, kLeft, 1>(rows, depth, first, stride, panel, b.row_stride, row, column,
                               result);
  } else if (kPanelVectors > 2 && columns - column <= 2 * kLanes<T>) {
    multiply_rows<T, kLeft, 2>(rows, depth, first, stride, panel, b.row_stride, row, column,
                               result);
  } else {
    multiply_rows<T, kLeft, kPanelVectors>(rows, depth, first, stride, panel, b.row_stride, row,
                                           column, result);
  }
}

// Computes every row in [0, rows) and every vector of columns that begins before `columns`. Rows
// are cut into blocks of nearly equal height; the larger operand is gone through once.
template <typename T, LeftOperand kLeft, typename Result>
__attribute__((noinline)) void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a,
                                        int64_t stride, Panels<T> b, const Result& result) {
  constexpr int64_t width = kPanelWidth<T>;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t panels = (columns + width - 1) / width;
  const bool rows_outside = rows > columns;
  for (int64_t i = 0; i < blocks * panels; ++i) {
    const int64_t block = rows_outside ? i / panels : i % blocks;
    const int64_t panel = rows_outside ? i % panels : i / blocks;
    const int64_t row = rows * block / blocks;
    multiply_panel<T, kLeft>(rows * (block + 1) / blocks - row, columns, depth, a, stride, b, row,
                             panel * width, result);
  }
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
