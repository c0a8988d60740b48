// The fused layer, backward: the value path a tile at a time, with values kept by the forward pass
// or computed again, tokens as rows or on the vector lanes as the values are; then the pooling
// path.
#pragma once

#include <type_traits>

#include "attention_pool.h"
#include "attention_pool_backward.h"
#include "gate_tile.h"
#include "kernels.h"
#include "lanes.h"
#include "micro_kernel.h"
#include "products.h"
#include "scratch.h"
#include "simd.h"
#include "tokens.h"
#include "workers.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

template <typename S, Activation kActivation>
class AttentionBackwardPass {
  using T = Accumulate<S>;
  static constexpr int64_t kWidth = kPanelWidth<T>;
  static constexpr int64_t kLaneUnit = 16;      // whole vectors of every instruction set
  static constexpr int64_t kMostInPlace = 256;  // channels of weights that are not packed
  static constexpr bool kHalf = !std::is_same<S, T>::value;

 public:
  AttentionBackwardPass(const AttentionBackward& op, const ParallelFor& parallel)
      : op_(op),
        parallel_(parallel),
        channels_(op.grid.channels),
        slices_(op.grid.slices()),
        image_tokens_(op.grid.height * op.grid.width),
        image_slices_(op.grid.patch_h * op.grid.patch_w),
        tokens_(op.grid.batch * image_tokens_),
        padded_(round_up(channels_, kWidth)),
        tile_stride_(padded_ + kLanes<T>),
        lane_stride_(kLaneTile + kLanes<T>),
        tile_size_(larger(kTileRows * tile_stride_,
                          larger(kLaneTile * tile_stride_, channels_ * lane_stride_))),
        panels_(panels_in<T>(channels_)),
        panel_size_(channels_ * kWidth),
        workers_(workers_for(tokens_, 8 * channels_ * channels_, parallel.threads)),
        on_lanes_(op.values != nullptr && op.values_on_lanes),
        unit_(on_lanes_ ? kLaneUnit : 1),
        units_((tokens_ + unit_ - 1) / unit_),
        by_rows_(on_lanes_ && tokens_ <= channels_),
        whole_(!on_lanes_ && (op.grad_qkv_weight || op.grad_out_weight) && tokens_ <= channels_ &&
               (workers_ > 1 || tokens_ > kTileRows)),
        parts_(by_rows_ ? 1
                        : larger(1, smaller(units_, parts_in(tokens_,
                                                             whole_ ? 2 * kBlockRows
                                                                    : 4 * larger(64, channels_),
                                                             workers_)))),
        in_place_weights_(!kHalf && channels_ % kLanes<T> == 0 && channels_ <= kMostInPlace),
        qkv_weight_(op.qkv_weight, 1 + 2 * channels_, channels_),
        out_weight_(op.out_weight, channels_, channels_),
        vectors_(4 * padded_),
        packed_(packed_before(kWeights) * panels_ * panel_size_),
        first_sum_in_place_(!kHalf && channels_ == padded_),
        weight_sums_((op.grad_qkv_weight || op.grad_out_weight) && !by_rows_ && !whole_
                         ? (parts_ - first_sum_in_place_) * 2 * channels_ * padded_
                         : 0),
        whole_lane_stride_(round_up(tokens_, kLanes<T>) + kLanes<T>),
        whole_size_(larger(tokens_ * tile_stride_, channels_ * whole_lane_stride_)),
        whole_operands_(by_rows_ || whole_ ? kOperands * whole_size_ : 0),
        bias_sums_(parts_ * 2 * padded_),
        context_sums_(parts_),
        context_sums_data_(touched_images() * image_slices_ * padded_),
        tiles_(workers_ * 6 * tile_size_),
        delayed_grad_x_(delayed() ? tokens_ * channels_ : 0),
        slice_values_(slices_ * 3 * padded_),
        slice_sums_(slices_ * 2),
        pool_(op,
              {padded_, score_weight(), pooled(), grad_pooled(), slice_sums_.get(),
               delayed_grad_x_.get()},
              workers_) {
    read_vector<S>({qkv_weight_.row(0), 1}, 0, channels_, padded_, score_weight());
    read_vector<S>(op.qkv_bias, 1, channels_, padded_, key_bias());
    read_vector<S>(op.qkv_bias, 1 + channels_, channels_, padded_, value_bias());
    read_vector<S>({nullptr, 0}, 0, 0, padded_, zeros());
    T* sums = context_sums_data_.get();
    for (int64_t part = 0; part < parts_; ++part) {
      context_sums_[part] = sums;
      sums += images_of(part).count() * image_slices_ * padded_;
    }
  }

  void run() {
    const int64_t channel_groups = (channels_ + kBlockRows - 1) / kBlockRows;
    run_workers(parallel_, workers_, [&](Worker& worker) {
      T* scratch = tiles_.get() + worker.index() * 6 * tile_size_;
      worker.share_out(kWeights * panels_, [&](int64_t i) {
        pack_weights(static_cast<Weight>(i / panels_), i % panels_);
      });
      worker.wait();
      if (by_rows_) {
        value_path_by_rows(worker, scratch);
      } else {
        worker.share_out(parts_, [&](int64_t part) { value_path(part, scratch); });
        worker.wait();
      }
      if (whole_) {
        worker.share_out(2 * weight_groups(), [&](int64_t item) { multiply_whole(item); });
      }
      worker.share_out(slices_, [&](int64_t slice) { sum_context_gradient(slice); });
      worker.wait();
      worker.share_out(panels_, [&](int64_t panel) { project_context_gradient(panel); });
      worker.share_out(channel_groups, [&](int64_t group) {
        finish_channels(share(channels_, group, channel_groups));
      });
      worker.wait();
      if (pool_.wanted()) pool_.run(worker, scratch);
    });
  }

 private:
  // ---- Where things are ----

  T* score_weight() const { return vectors_.get(); }
  T* key_bias() const { return vectors_.get() + padded_; }
  T* value_bias() const { return vectors_.get() + 2 * padded_; }
  T* zeros() const { return vectors_.get() + 3 * padded_; }
  const T* statistics(int64_t slice) const {
    return static_cast<const T*>(op_.statistics) + slice * (2 * channels_ + 1);
  }
  T weight_sum(int64_t slice) const { return statistics(slice)[2 * channels_]; }

  // Right-hand operands. W_V^T is packed where values are computed again; the others serve as they
  // lie while they stay in the second cache, else they are packed: W_K only for slices enough to
  // pay for it.
  enum Weight { kValueTransposed, kOut, kValue, kKey, kWeights };
  bool packs(Weight weight) const {
    if (weight == kValueTransposed) return op_.values == nullptr;
    if (on_lanes_ && weight != kKey) return false;
    return !in_place_weights_ && (weight != kKey || slices_ > 8);
  }
  int64_t packed_before(Weight weight) const {
    int64_t count = 0;
    for (int i = 0; i < weight; ++i) count += packs(static_cast<Weight>(i));
    return count;
  }
  T* packed(Weight weight) const {
    return packed_.get() + packed_before(weight) * panels_ * panel_size_;
  }
  Panels<T> panels(Weight weight) const {
    if constexpr (!kHalf) {
      if (weight != kValueTransposed && in_place_weights_) {
        return {weight_rows(weight), kWidth, weight_stride(weight)};
      }
    }
    return {packed(weight), panel_size_, kWidth};
  }
  const S* weight_rows(Weight weight) const {
    if (weight == kOut) return out_weight_.row(0);
    return qkv_weight_.row(weight == kKey ? 1 : 1 + channels_);
  }
  int64_t weight_stride(Weight weight) const {
    return weight == kOut ? out_weight_.stride() : qkv_weight_.stride();
  }

  S* grad_value_weight() const {
    S* rows = static_cast<S*>(op_.grad_qkv_weight);
    return rows == nullptr ? nullptr : rows + (1 + channels_) * channels_;
  }
  S* grad_out_weight() const { return static_cast<S*>(op_.grad_out_weight); }
  // Where it fits, the first part's sums of the weights' gradients are the gradients themselves.
  T* value_weight_sum(int64_t part) const {
    if (part < first_sum_in_place_) {
      return static_cast<T*>(op_.grad_qkv_weight) + (1 + channels_) * channels_;
    }
    return weight_sums_.get() + (part - first_sum_in_place_) * 2 * channels_ * padded_;
  }
  T* out_weight_sum(int64_t part) const {
    if (part < first_sum_in_place_) return static_cast<T*>(op_.grad_out_weight);
    return value_weight_sum(part) + channels_ * padded_;
  }
  T* value_bias_sum(int64_t part) const { return bias_sums_.get() + part * 2 * padded_; }
  T* out_bias_sum(int64_t part) const { return value_bias_sum(part) + padded_; }

  // Where tokens are few, the operands of all of them are kept, and a weight's gradient is one
  // product over all, shared out by its own rows: sums of parts would be larger than the operands.
  enum Operand { kX, kGradOut, kGated, kGradValues, kOperands };
  T* whole_operand(Operand operand) const { return whole_operands_.get() + operand * whole_size_; }
  bool in_place(const TokenGrid& grid, Range tokens) const {
    return channels_ % kLanes<T> == 0 && tokens_in_place<S>(grid, tokens.begin, tokens.count());
  }
  Rows<const T> whole_rows(Operand operand, const TokenGrid& grid, const void* data) const {
    if (!in_place(grid, {0, tokens_})) return {whole_operand(operand), tile_stride_};
    const T* first = static_cast<const T*>(data);
    return {first + token_offset(grid, token_position(grid, 0)), grid.stride_width};
  }
  int64_t weight_groups() const { return (channels_ + 2 * kBlockRows - 1) / (2 * kBlockRows); }

  // The images a part's tokens belong to, and its sum of dc over its tokens of a slice in them.
  Range tokens_of(int64_t part) const {
    const Range own = share(units_, part, parts_);
    return {own.begin * unit_, smaller(own.end * unit_, tokens_)};
  }
  Range images_of(int64_t part) const {
    const Range own = tokens_of(part);
    return {own.begin / image_tokens_, (own.end - 1) / image_tokens_ + 1};
  }
  int64_t touched_images() const {
    int64_t images = 0;
    for (int64_t part = 0; part < parts_; ++part) images += images_of(part).count();
    return images;
  }
  T* context_sum(int64_t part, int64_t slice) const {
    return context_sums_[part] + (slice - images_of(part).begin * image_slices_) * padded_;
  }

  // Rows of a slice: dc, dxbar and xbar, padded with zeros.
  T* grad_context() const { return slice_values_.get(); }
  T* grad_pooled() const { return slice_values_.get() + slices_ * padded_; }
  T* pooled() const { return slice_values_.get() + 2 * slices_ * padded_; }

  // In half precision, the share of grad_x that waits in T for the pooling path's, so that it is
  // rounded once.
  bool delayed() const { return kHalf && is_self_attention(op_) && op_.grad_x != nullptr; }

  // ---- Weights ----

  void pack_weights(Weight weight, int64_t panel) const {
    if (!packs(weight)) return;
    const S* rows = weight_rows(weight);
    const int64_t stride = weight_stride(weight);
    const int64_t stride_k = weight == kValueTransposed ? 1 : stride;
    pack_panel(rows, stride_k, weight == kValueTransposed ? stride : int64_t{1}, channels_,
               channels_, panel * kWidth, packed(weight) + panel * panel_size_);
  }

  // ---- The value path, tile by tile ----

  void clear_sums(int64_t part) const {
    for (int64_t d = 0; d < 2 * padded_; ++d) value_bias_sum(part)[d] = 0;
    const int64_t own_slices = images_of(part).count() * image_slices_;
    for (int64_t i = 0; i < own_slices * padded_; ++i) context_sums_[part][i] = 0;
  }

  void value_path(int64_t part, T* scratch) const {
    clear_sums(part);
    const Range own = tokens_of(part);
    if constexpr (!kHalf) {
      if (on_lanes_) return value_path_on_lanes(part, own, scratch);
    }
    const Tiles tiles(own);
    for (int64_t i = 0; i < tiles.count; ++i) value_tile(part, tiles[i], i == 0, scratch);
  }

  void value_tile(int64_t part, Range tokens, bool is_first, T* scratch) const {
    const int64_t first = tokens.begin;
    const int64_t count = tokens.count();
    const auto tile = [&](Operand operand) {
      return whole_ ? whole_operand(operand) + first * tile_stride_
                    : scratch + operand * tile_size_;
    };
    T* x_tile = tile(kX);
    T* g_tile = tile(kGradOut);
    T* y_tile = tile(kGated);        // v where it is computed again, then y
    T* dy_tile = tile(kGradValues);  // dy, then dv
    T* dx_tile = scratch + kOperands * tile_size_;
    T* context_tile = dx_tile + tile_size_;
    const Rows<const T> x = padded_rows(op_.grid, op_.x, tokens, x_tile);
    const Rows<const T> g = padded_rows(op_.grad_out_grid, op_.grad_out, tokens, g_tile);
    const T* contexts[kTileRows];
    T* grad_contexts[kTileRows];
    TokenWalk walk(op_.grid, first);
    for (int64_t t = 0; t < count; ++t, walk.next()) {
      const int64_t slice = walk.slice();
      contexts[t] =
          padded_row(statistics(slice) + channels_, channels_, context_tile + t * tile_stride_);
      grad_contexts[t] = context_sum(part, slice);
    }
    Rows<const T> values = {static_cast<const T*>(op_.values) + first * channels_, channels_};
    if (op_.values == nullptr) {
      values = {y_tile, tile_stride_};
      multiply<T, LeftOperand::kRows>(count, channels_, channels_, x.data, x.stride,
                                      panels(kValueTransposed),
                                      StoreBiased<T>{y_tile, tile_stride_, value_bias()});
    }
    multiply<T, LeftOperand::kRows>(count, channels_, channels_, g.data, g.stride, panels(kOut),
                                    StoreSum<T>{dy_tile, tile_stride_});
    gate_backward_tile<T, kActivation>(count, channels_, tile_stride_, values, y_tile, dy_tile,
                                       contexts, grad_contexts, g, value_bias_sum(part),
                                       out_bias_sum(part));
    if (op_.grad_qkv_weight != nullptr && !whole_) {
      add_outer_product<LeftOperand::kColumns>({dy_tile, tile_stride_}, x, count, is_first,
                                               value_weight_sum(part));
    }
    if (op_.grad_out_weight != nullptr && !whole_) {
      add_outer_product<LeftOperand::kColumns>(g, {y_tile, tile_stride_}, count, is_first,
                                               out_weight_sum(part));
    }
    if (op_.grad_x != nullptr) store_value_gradient(tokens, dy_tile, dx_tile);
  }

  // Tokens as rows of which whole vectors can be read.
  Rows<const T> padded_rows(const TokenGrid& grid, const void* data, Range tokens, T* tile) const {
    const S* source = static_cast<const S*>(data);
    if (channels_ % kLanes<T> == 0 && (!whole_ || in_place(grid, {0, tokens_}))) {
      return read_rows(grid, source, tokens.begin, tokens.count(), tile, tile_stride_);
    }
    gather_tokens(grid, source, tokens.begin, tokens.count(), tile, tile_stride_, padded_);
    return {tile, tile_stride_};
  }

  // sum[i, j] += sum_t left[t, i] right[t, j], or = for the first tile; tokens are the columns of
  // `left` for kRows, its rows for kColumns.
  template <LeftOperand kLeft>
  void add_outer_product(Rows<const T> left, Rows<const T> right, int64_t count, bool is_first,
                         T* sum) const {
    const Panels<T> operand{right.data, kWidth, right.stride};
    if (is_first) {
      multiply<T, kLeft>(channels_, channels_, count, left.data, left.stride, operand,
                         StoreSum<T>{sum, padded_});
    } else {
      multiply<T, kLeft>(channels_, channels_, count, left.data, left.stride, operand,
                         AddSum<T>{sum, padded_});
    }
  }

  // Rows [own) of a weight's gradient in one product over all tokens, with the same operands.
  template <LeftOperand kLeft>
  void store_outer_product(Rows<const T> left, Rows<const T> right, Range own, S* target) const {
    if (target == nullptr) return;
    const int64_t first = own.begin * (kLeft == LeftOperand::kRows ? left.stride : 1);
    multiply<T, kLeft>(own.count(), channels_, tokens_, left.data + first, left.stride,
                       Panels<T>{right.data, kWidth, right.stride},
                       StoreResult<S>{target + own.begin * channels_, channels_, channels_});
  }

  // Some rows of W_V's gradient, dv^T x, or of W_O's, g^T y.
  void multiply_whole(int64_t item) const {
    const Range own = share(channels_, item % weight_groups(), weight_groups());
    if (item < weight_groups()) {
      store_outer_product<LeftOperand::kColumns>({whole_operand(kGradValues), tile_stride_},
                                                 whole_rows(kX, op_.grid, op_.x), own,
                                                 grad_value_weight());
    } else {
      store_outer_product<LeftOperand::kColumns>(
          whole_rows(kGradOut, op_.grad_out_grid, op_.grad_out),
          {whole_operand(kGated), tile_stride_}, own, grad_out_weight());
    }
  }

  // dx = dv W_V
  void store_value_gradient(Range tokens, const T* dv_tile, T* dx_tile) const {
    const int64_t first = tokens.begin;
    const int64_t count = tokens.count();
    const TokenGrid& grid = op_.grad_x_grid;
    S* grad_x = static_cast<S*>(op_.grad_x);
    const auto multiply_into = [&](T* target, int64_t stride) {
      multiply<T, LeftOperand::kRows>(count, channels_, channels_, dv_tile, tile_stride_,
                                      panels(kValue), StoreSum<T>{target, stride});
    };
    if constexpr (!kHalf) {
      if (in_place(grid, tokens)) {
        multiply_into(grad_x + token_offset(grid, token_position(grid, first)), grid.stride_width);
        return;
      }
    }
    multiply_into(dx_tile, tile_stride_);
    if (delayed()) {
      copy_rows(dx_tile, tile_stride_, count, channels_, delayed_grad_x_.get() + first * channels_,
                channels_);
    } else {
      scatter_tokens(grid, grad_x, first, count, dx_tile, tile_stride_);
    }
  }

  // ---- The same with tokens on the lanes; the weights' gradients take x and y as rows ----

  static constexpr int64_t kMostPatterns = kLaneTileVectors<T> + 8;

  // Calls body(contexts), with room for the contexts of `rows` rows.
  template <typename Body>
  void with_contexts(int64_t rows, const Body& body) const {
    const Buffer<T> mixed(slices_ > 1 ? kMostPatterns * rows * kLanes<T> : 0);
    LaneSlices<T> slices[kMostPatterns];
    LaneContexts<T> contexts(op_.grid, statistics(0) + channels_, 2 * channels_ + 1, kMostPatterns,
                             slices, mixed.get());
    body(contexts);
  }

  void value_path_on_lanes(int64_t part, Range tokens, T* scratch) const {
    with_contexts(channels_, [&](LaneContexts<T>& contexts) {
      for (int64_t first = tokens.begin; first < tokens.end; first += kLaneTile) {
        value_tile_on_lanes(part, {first, smaller(first + kLaneTile, tokens.end)},
                            first == tokens.begin, contexts, scratch);
      }
    });
  }

  void value_tile_on_lanes(int64_t part, Range tokens, bool is_first, LaneContexts<T>& contexts,
                           T* scratch) const {
    const int64_t count = tokens.count();
    const auto tile = [&](Operand operand) { return scratch + operand * tile_size_; };
    T* y = tile(kGated);
    const Rows<T> g = {tile(kGradOut), lane_stride_};
    const Rows<T> dv = {tile(kGradValues), lane_stride_};  // dy at first
    gather_grad_out(tokens, g);
    multiply<T, LeftOperand::kColumns>(channels_, count, channels_, out_weight_.row(0),
                                       out_weight_.stride(), Panels<T>{g.data, kWidth, g.stride},
                                       StoreSum<T>{dv.data, dv.stride});
    gate_lanes(part, tokens, {0, channels_}, contexts, g, dv, y, tile(kOperands));
    if (op_.grad_qkv_weight != nullptr) {
      const Rows<const T> x = padded_rows(op_.grid, op_.x, tokens, tile(kX));
      add_outer_product<LeftOperand::kRows>({dv.data, dv.stride}, x, count, is_first,
                                            value_weight_sum(part));
    }
    if (op_.grad_out_weight != nullptr) {
      add_outer_product<LeftOperand::kRows>({g.data, g.stride}, {y, tile_stride_}, count, is_first,
                                            out_weight_sum(part));
    }
    if (op_.grad_x != nullptr) store_lanes_gradient(tokens, {0, channels_}, dv, tile(kOperands));
  }

  void gather_grad_out(Range tokens, Rows<T> g) const {
    gather_channels(op_.grad_out_grid, static_cast<const T*>(op_.grad_out), tokens.begin,
                    tokens.count(), g.data, g.stride, round_up(tokens.count(), kLanes<T>));
  }

  // The gate's backward pass for some channels of a tile; g, dv and y begin at its first token and
  // channel 0.
  void gate_lanes(int64_t part, Range tokens, Range rows, LaneContexts<T>& contexts, Rows<T> g,
                  Rows<T> dv, T* y, T* block) const {
    LaneContext<T> own_contexts[kLaneTileVectors<T>];
    contexts.find(tokens, rows, own_contexts);
    const LaneTile<T> tile = {
        tokens.count(),
        rows.count(),
        {static_cast<const T*>(op_.values), channels_, rows.begin, tokens.begin},
        {g.data + rows.begin * g.stride, g.stride},
        {dv.data + rows.begin * dv.stride, dv.stride},
        own_contexts};
    gate_backward_lanes<T, kActivation>(
        tile, {y + rows.begin, tile_stride_}, block,
        [&](int64_t slice, int64_t row, Vec<T> sum) {
          T* own = context_sum(part, slice) + rows.begin + row;
          store(own, load(own) + sum);
        },
        value_bias_sum(part) + rows.begin, out_bias_sum(part) + rows.begin);
  }

  // dx = dv W_V, some channels of it.
  void store_lanes_gradient(Range tokens, Range rows, Rows<T> dv, T* tile) const {
    const TokenGrid& grid = op_.grad_x_grid;
    multiply_into_tokens<LeftOperand::kColumns>(
        grid, static_cast<T*>(op_.grad_x) + rows.begin * grid.stride_channel, tokens, rows.count(),
        channels_, qkv_weight_.row(1 + channels_) + rows.begin, qkv_weight_.stride(),
        Panels<T>{dv.data, kWidth, dv.stride}, zeros(), tile);
  }

  // ---- The same for few tokens: the workers share channels, and read every weight once ----

  int64_t row_groups() const {
    return smaller(channels_ / kLaneUnit, workers_ == 1 ? 1 : 2 * workers_);
  }
  Range rows_of(int64_t group) const {
    const Range units = share(channels_ / kLaneUnit, group, row_groups());
    return {units.begin * kLaneUnit, units.end * kLaneUnit};
  }
  Rows<T> whole_lanes(Operand operand) const {
    return {whole_operand(operand), whole_lane_stride_};
  }

  void value_path_by_rows(Worker& worker, T* scratch) const {
    if constexpr (!kHalf) {
      T* tile = scratch + kOperands * tile_size_;
      worker.share_out(units_, [&](int64_t unit) { gather_unit(unit); });
      worker.share_out(1, [&](int64_t part) { clear_sums(part); });
      worker.wait();
      worker.share_out(row_groups(), [&](int64_t group) { gate_rows(group, tile); });
      worker.wait();
      worker.share_out(kRowGradients * row_groups(), [&](int64_t item) {
        multiply_rows_of(static_cast<RowGradient>(item / row_groups()), item % row_groups(), tile);
      });
    }
  }

  void gather_unit(int64_t unit) const {
    const Range tokens = {unit * unit_, smaller((unit + 1) * unit_, tokens_)};
    gather_grad_out(tokens, {whole_operand(kGradOut) + tokens.begin, whole_lane_stride_});
    if (op_.grad_qkv_weight == nullptr) return;
    gather_tokens(op_.grid, static_cast<const S*>(op_.x), tokens.begin, tokens.count(),
                  whole_operand(kX) + tokens.begin * tile_stride_, tile_stride_, padded_);
  }

  void gate_rows(int64_t group, T* block) const {
    const Range rows = rows_of(group);
    const Rows<T> g = whole_lanes(kGradOut), dv = whole_lanes(kGradValues);
    multiply<T, LeftOperand::kColumns>(rows.count(), tokens_, channels_,
                                       out_weight_.row(0) + rows.begin, out_weight_.stride(),
                                       Panels<T>{g.data, kWidth, g.stride},
                                       StoreSum<T>{dv.data + rows.begin * dv.stride, dv.stride});
    with_contexts(rows.count(), [&](LaneContexts<T>& contexts) {
      for (int64_t first = 0; first < tokens_; first += kLaneTile) {
        gate_lanes(0, {first, smaller(first + kLaneTile, tokens_)}, rows, contexts,
                   {g.data + first, g.stride}, {dv.data + first, dv.stride},
                   whole_operand(kGated) + first * tile_stride_, block);
      }
    });
  }

  enum RowGradient { kGradX, kGradValueWeight, kGradOutWeight, kRowGradients };
  void multiply_rows_of(RowGradient gradient, int64_t group, T* tile) const {
    const Range rows = rows_of(group);
    if (gradient == kGradValueWeight) {
      store_outer_product<LeftOperand::kRows>({whole_operand(kGradValues), whole_lane_stride_},
                                              {whole_operand(kX), tile_stride_}, rows,
                                              grad_value_weight());
    } else if (gradient == kGradOutWeight) {
      store_outer_product<LeftOperand::kRows>({whole_operand(kGradOut), whole_lane_stride_},
                                              {whole_operand(kGated), tile_stride_}, rows,
                                              grad_out_weight());
    } else if (op_.grad_x != nullptr) {
      store_lanes_gradient({0, tokens_}, rows, whole_lanes(kGradValues), tile);
    }
  }

  // ---- Sums over the workers, in their order ----

  void sum_context_gradient(int64_t slice) {
    T* sum = grad_context() + slice * padded_;
    T* copy = pooled() + slice * padded_;
    for (int64_t d = 0; d < padded_; ++d) {
      sum[d] = 0;
      copy[d] = d < channels_ ? statistics(slice)[d] : T{0};
    }
    for (int64_t part = 0; part < parts_; ++part) {
      const Range images = images_of(part);
      const int64_t image = slice / image_slices_;
      if (image < images.begin || image >= images.end) continue;
      const T* own = context_sum(part, slice);
      for (int64_t d = 0; d < padded_; ++d) sum[d] += own[d];
    }
    slice_sums_[2 * slice] = dot(sum, key_bias(), channels_);
  }

  // dxbar = dc W_K, a panel of it for all slices.
  void project_context_gradient(int64_t panel) const {
    const int64_t first = panel * kWidth;
    const int64_t columns = smaller(first + kWidth, channels_) - first;
    if (in_place_weights_ || packs(kKey)) {
      const Panels<T> keys = panels(kKey);
      multiply<T, LeftOperand::kRows>(
          slices_, columns, channels_, grad_context(), padded_,
          Panels<T>{keys.data + panel * keys.panel_stride, keys.panel_stride, keys.row_stride},
          StoreSum<T>{grad_pooled() + first, padded_});
      return;
    }
    for (int64_t slice = 0; slice < slices_; ++slice) {
      for (int64_t d = 0; d < columns; ++d) grad_pooled()[slice * padded_ + first + d] = 0;
    }
    for (int64_t j = 0; j < channels_; ++j) {
      for (int64_t slice = 0; slice < slices_; ++slice) {
        add_scaled(qkv_weight_.row(1 + j) + first, grad_context()[slice * padded_ + j], columns,
                   grad_pooled() + slice * padded_ + first);
      }
    }
  }

  // Rows [own) of the gradients of W_K, W_V and W_O, and the same of their biases.
  void finish_channels(Range own) {
    if (own.count() == 0) return;
    S* qkv_weight = static_cast<S*>(op_.grad_qkv_weight);
    S* qkv_bias = static_cast<S*>(op_.grad_qkv_bias);
    S* out_bias = static_cast<S*>(op_.grad_out_bias);
    const auto out_sums = [&](int64_t part) { return out_weight_sum(part); };
    const auto value_sums = [&](int64_t part) { return value_weight_sum(part); };
    if (grad_out_weight() != nullptr) sum_weight_rows(own, out_sums, grad_out_weight());
    if (qkv_weight != nullptr) {
      sum_weight_rows(own, value_sums, grad_value_weight());
      multiply<T, LeftOperand::kColumns>(
          own.count(), channels_, slices_, grad_context() + own.begin, padded_,
          Panels<T>{pooled(), kWidth, padded_},
          StoreResult<S>{qkv_weight + (1 + own.begin) * channels_, channels_, channels_});
    }
    for (int64_t d = own.begin; d < own.end; ++d) {
      T value_sum = 0, out_sum = 0, key_sum = 0;
      for (int64_t part = 0; part < parts_; ++part) {
        value_sum += value_bias_sum(part)[d];
        out_sum += out_bias_sum(part)[d];
      }
      for (int64_t slice = 0; slice < slices_; ++slice) {
        key_sum += weight_sum(slice) * grad_context()[slice * padded_ + d];
      }
      if (out_bias != nullptr) store_one(out_bias + d, out_sum);
      if (qkv_bias != nullptr) {
        store_one(qkv_bias + 1 + d, key_sum);
        store_one(qkv_bias + 1 + channels_ + d, value_sum);
      }
    }
  }

  template <typename Sums>
  void sum_weight_rows(Range own, const Sums& sums, S* target) const {
    if (by_rows_ || whole_ || (first_sum_in_place_ && parts_ == 1)) return;
    const StoreResult<S> result = {target, channels_, channels_};
    for (int64_t row = own.begin; row < own.end; ++row) {
      for (int64_t d = 0; d < channels_; d += kLanes<T>) {
        Vec<T> sum = load(sums(0) + row * padded_ + d);
        for (int64_t part = 1; part < parts_; ++part) sum += load(sums(part) + row * padded_ + d);
        result.place(row, d).finish(0, 0, sum);
      }
    }
  }

  const AttentionBackward& op_;
  const ParallelFor& parallel_;
  const int64_t channels_, slices_, image_tokens_, image_slices_, tokens_;
  const int64_t padded_, tile_stride_, lane_stride_, tile_size_;  // rows spread over cache sets
  const int64_t panels_, panel_size_, workers_;
  const bool on_lanes_;
  const int64_t unit_, units_;  // tokens are cut into parts at multiples of a unit
  const bool by_rows_, whole_;
  const int64_t parts_;
  const bool in_place_weights_;
  const WeightRows<S> qkv_weight_, out_weight_;
  const Buffer<T> vectors_, packed_;
  const bool first_sum_in_place_;
  const Buffer<T> weight_sums_;
  const int64_t whole_lane_stride_, whole_size_;
  const Buffer<T> whole_operands_, bias_sums_;
  const Buffer<T*> context_sums_;
  const Buffer<T> context_sums_data_, tiles_, delayed_grad_x_, slice_values_, slice_sums_;
  const PoolBackwardPass<S> pool_;
};

// An empty batch: every gradient of a weight or bias is zero.
template <typename S>
void clear_weight_gradients(const AttentionBackward& op) {
  const int64_t channels = op.grid.channels;
  const auto clear = [](void* gradient, int64_t count) {
    for (int64_t i = 0; gradient != nullptr && i < count; ++i) static_cast<S*>(gradient)[i] = S{};
  };
  clear(op.grad_qkv_weight, (1 + 2 * channels) * channels);
  clear(op.grad_qkv_bias, 1 + 2 * channels);
  clear(op.grad_out_weight, channels * channels);
  clear(op.grad_out_bias, channels);
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
