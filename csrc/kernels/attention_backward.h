// The fused layer, backward: the value path a tile at a time, with values kept by the forward pass
// or computed again, tokens as rows or on the vector lanes as the values are; then the pooling
// path.
#pragma once

#include <type_traits>

#include "attention_pool.h"
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

// target[d] = a[d] scale_a + b[d] scale_b, added to what is there when `add`.
template <typename T>
SEP_ATTN_INLINE void combine_scaled(const T* a, T scale_a, const T* b, T scale_b, int64_t count,
                                    bool add, T* target) {
  for (int64_t d = 0; d < count; d += kLanes<T>) {
    const int64_t own = smaller(kLanes<T>, count - d);
    if (own == kLanes<T>) {
      const Vec<T> sum = load(a + d) * scale_a + load(b + d) * scale_b;
      store(target + d, add ? load(target + d) + sum : sum);
    } else {
      const Vec<T> sum = load_first(a + d, own) * scale_a + load_first(b + d, own) * scale_b;
      store_first(target + d, add ? load_first(target + d, own) + sum : sum, own);
    }
  }
}

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
        self_(op.x == op.x_prev && op.grad_x_prev == nullptr),
        channels_(op.grid.channels),
        slices_(op.grid.slices()),
        image_tokens_(op.grid.height * op.grid.width),
        image_slices_(op.grid.patch_h * op.grid.patch_w),
        tokens_(op.grid.batch * image_tokens_),
        prev_tokens_(op.prev_grid.batch * op.prev_grid.height * op.prev_grid.width),
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
        whole_((op.grad_qkv_weight || op.grad_out_weight) && tokens_ <= channels_ &&
               (workers_ > 1 || tokens_ > kTileRows)),
        parts_(larger(
            1,
            smaller(units_, parts_in(tokens_, whole_ ? 2 * kBlockRows : 4 * larger(64, channels_),
                                     workers_)))),
        pools_strips_(pool_strips()),
        pool_parts_(parts_in(prev_tokens_, 64, workers_)),
        in_place_weights_(!kHalf && channels_ % kLanes<T> == 0 && channels_ <= kMostInPlace),
        qkv_weight_(op.qkv_weight, 1 + 2 * channels_, channels_),
        out_weight_(op.out_weight, channels_, channels_),
        vectors_(4 * padded_),
        packed_((!in_place_weights_ ? 4 : (op.values == nullptr ? 1 : 0)) * panels_ * panel_size_),
        first_sum_in_place_(!kHalf && channels_ == padded_),
        weight_sums_((op.grad_qkv_weight || op.grad_out_weight) && !whole_
                         ? (parts_ - first_sum_in_place_) * 2 * channels_ * padded_
                         : 0),
        whole_lane_stride_(round_up(tokens_, kLanes<T>) + kLanes<T>),
        whole_size_(larger(tokens_ * tile_stride_, channels_ * whole_lane_stride_)),
        whole_operands_(whole_ ? kOperands * whole_size_ : 0),
        bias_sums_(parts_ * 2 * padded_),
        score_sums_(score_parts() * (padded_ + kLanes<T>)),
        context_sums_(parts_),
        context_sums_data_(touched_images() * image_slices_ * padded_),
        tiles_(workers_ * 6 * tile_size_),
        delayed_grad_x_(delayed() ? tokens_ * channels_ : 0),
        slice_values_(slices_ * 3 * padded_),
        slice_sums_(slices_ * 2) {
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
    const bool pools =
        pool_grad() != nullptr || op_.grad_qkv_weight != nullptr || op_.grad_qkv_bias != nullptr;
    run_workers(parallel_, workers_, [&](Worker& worker) {
      T* scratch = tiles_.get() + worker.index() * 6 * tile_size_;
      worker.share_out(4 * panels_, [&](int64_t i) {
        pack_weights(static_cast<Weight>(i / panels_), i % panels_);
      });
      worker.wait();
      worker.share_out(parts_, [&](int64_t part) { value_path(part, scratch); });
      worker.wait();
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
      if (!pools) return;
      worker.share_out(slices_, [&](int64_t slice) { sum_score_gradient(slice); });
      worker.wait();
      worker.share_out(score_parts(), [&](int64_t part) {
        if (pools_strips_) {
          pool_strip_path(part, scratch);
        } else {
          pool_path(part, scratch);
        }
      });
      worker.wait();
      worker.share_out(1, [&](int64_t) { finish_scores(); });
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
  enum Weight { kValueTransposed, kOut, kValue, kKey };
  bool packs(Weight weight) const {
    if (weight == kValueTransposed) return op_.values == nullptr;
    if (on_lanes_ && weight != kKey) return false;
    return !in_place_weights_ && (weight != kKey || slices_ > 8);
  }
  Panels<T> panels(Weight weight) const {
    if constexpr (!kHalf) {
      if (weight != kValueTransposed && in_place_weights_) {
        return {weight_rows(weight), kWidth, weight_stride(weight)};
      }
    }
    return {packed_.get() + weight * panels_ * panel_size_, panel_size_, kWidth};
  }
  const S* weight_rows(Weight weight) const {
    if (weight == kOut) return out_weight_.row(0);
    return qkv_weight_.row(weight == kKey ? 1 : 1 + channels_);
  }
  int64_t weight_stride(Weight weight) const {
    return weight == kOut ? out_weight_.stride() : qkv_weight_.stride();
  }

  // Tokens are cut into parts with sums of their own, which are added up in their order: a few for
  // each worker, so that a slow one takes fewer.
  static int64_t parts_in(int64_t tokens, int64_t least, int64_t workers) {
    if (workers == 1) return 1;
    return smaller(tokens, smaller(4 * workers, larger(workers, tokens / least)));
  }
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
  T* score_weight_sum(int64_t part) const {
    return score_sums_.get() + part * (padded_ + kLanes<T>);
  }
  T& score_bias_sum(int64_t part) const { return score_weight_sum(part)[padded_]; }

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
  T& key_bias_product(int64_t slice) const { return slice_sums_[2 * slice]; }  // b_K . dc
  T& score_sum(int64_t slice) const { return slice_sums_[2 * slice + 1]; }     // sum_n p dp

  // The gradient of x' receives the pooling path; in half precision the value path's share of it
  // waits in T, so that it is rounded once.
  S* pool_grad() const { return static_cast<S*>(self_ ? op_.grad_x : op_.grad_x_prev); }
  const TokenGrid& pool_grid() const { return self_ ? op_.grad_x_grid : op_.grad_prev_grid; }
  bool delayed() const { return kHalf && self_ && op_.grad_x != nullptr; }

  // ---- Weights ----

  void pack_weights(Weight weight, int64_t panel) const {
    if (!packs(weight)) return;
    const S* rows = weight_rows(weight);
    const int64_t stride = weight_stride(weight);
    const int64_t stride_k = weight == kValueTransposed ? 1 : stride;
    pack_panel(rows, stride_k, weight == kValueTransposed ? stride : int64_t{1}, channels_,
               channels_, panel * kWidth, packed_.get() + (weight * panels_ + panel) * panel_size_);
  }

  // ---- The value path, tile by tile ----

  void value_path(int64_t part, T* scratch) const {
    for (int64_t d = 0; d < 2 * padded_; ++d) value_bias_sum(part)[d] = 0;
    const int64_t own_slices = images_of(part).count() * image_slices_;
    for (int64_t i = 0; i < own_slices * padded_; ++i) context_sums_[part][i] = 0;
    const Range own = tokens_of(part);
    if (on_lanes_) {
      value_path_on_lanes(part, own, scratch);
      return;
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

  // Some rows of W_V's gradient, dv^T x, or of W_O's, g^T y.
  void multiply_whole(int64_t item) const {
    const bool of_values = item < weight_groups();
    const Range own = share(channels_, item % weight_groups(), weight_groups());
    S* target = static_cast<S*>(of_values ? op_.grad_qkv_weight : op_.grad_out_weight);
    if (target == nullptr) return;
    if (of_values) target += (1 + channels_) * channels_;
    const Rows<const T> right = of_values ? whole_rows(kX, op_.grid, op_.x)
                                          : Rows<const T>{whole_operand(kGated), tile_stride_};
    const Panels<T> operand{right.data, kWidth, right.stride};
    const StoreResult<S> result{target + own.begin * channels_, channels_, channels_};
    if (on_lanes_) {
      const T* left = whole_operand(of_values ? kGradValues : kGradOut);
      multiply<T, LeftOperand::kRows>(own.count(), channels_, tokens_,
                                      left + own.begin * whole_lane_stride_, whole_lane_stride_,
                                      operand, result);
      return;
    }
    const Rows<const T> left = of_values ? Rows<const T>{whole_operand(kGradValues), tile_stride_}
                                         : whole_rows(kGradOut, op_.grad_out_grid, op_.grad_out);
    multiply<T, LeftOperand::kColumns>(own.count(), channels_, tokens_, left.data + own.begin,
                                       left.stride, operand, result);
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

  void value_path_on_lanes(int64_t part, Range tokens, T* scratch) const {
    if constexpr (!kHalf) {
      constexpr int64_t most_patterns = kLaneTileVectors<T> + 8;
      const bool mixes = op_.grid.patch_h * op_.grid.patch_w * op_.grid.batch > 1;
      const Buffer<T> mixed(mixes ? most_patterns * channels_ * kLanes<T> : 0);
      LaneSlices<T> slices[most_patterns];
      LaneContexts<T> contexts(op_.grid, statistics(0) + channels_, 2 * channels_ + 1,
                               most_patterns, slices, mixed.get());
      for (int64_t first = tokens.begin; first < tokens.end; first += kLaneTile) {
        value_tile_on_lanes(part, {first, smaller(first + kLaneTile, tokens.end)},
                            first == tokens.begin, contexts, scratch);
      }
    }
  }

  void value_tile_on_lanes(int64_t part, Range tokens, bool is_first, LaneContexts<T>& contexts,
                           T* scratch) const {
    const int64_t first = tokens.begin;
    const int64_t count = tokens.count();
    const int64_t stride = whole_ ? whole_lane_stride_ : lane_stride_;
    const auto tile = [&](Operand operand) { return scratch + operand * tile_size_; };
    const auto rows = [&](Operand operand) {
      return whole_ ? whole_operand(operand) + first * tile_stride_ : tile(operand);
    };
    const auto lanes = [&](Operand operand) {
      return whole_ ? whole_operand(operand) + first : tile(operand);
    };
    T* g = lanes(kGradOut);
    T* dv = lanes(kGradValues);  // dy at first
    T* y = rows(kGated);
    gather_channels(op_.grad_out_grid, static_cast<const T*>(op_.grad_out), first, count, g, stride,
                    round_up(count, kLanes<T>));
    multiply<T, LeftOperand::kColumns>(channels_, count, channels_, out_weight_.row(0),
                                       out_weight_.stride(), Panels<T>{g, kWidth, stride},
                                       StoreSum<T>{dv, stride});
    LaneContext<T> own_contexts[kLaneTileVectors<T>];
    contexts.find(tokens, {0, channels_}, own_contexts);
    const LaneTile<T> lane_tile = {
        count,       channels_,    {static_cast<const T*>(op_.values), channels_, 0, first},
        {g, stride}, {dv, stride}, own_contexts};
    gate_backward_lanes<T, kActivation>(
        lane_tile, {y, tile_stride_}, tile(kOperands),
        [&](int64_t slice, int64_t row, Vec<T> sum) {
          T* own = context_sum(part, slice) + row;
          store(own, load(own) + sum);
        },
        value_bias_sum(part), out_bias_sum(part));
    if (op_.grad_qkv_weight != nullptr) {
      const Rows<const T> x = padded_rows(op_.grid, op_.x, tokens, rows(kX));
      if (!whole_) {
        add_outer_product<LeftOperand::kRows>({dv, stride}, x, count, is_first,
                                              value_weight_sum(part));
      }
    }
    if (op_.grad_out_weight != nullptr && !whole_) {
      add_outer_product<LeftOperand::kRows>({g, stride}, {y, tile_stride_}, count, is_first,
                                            out_weight_sum(part));
    }
    if (op_.grad_x != nullptr) {
      multiply_into_tokens<LeftOperand::kColumns>(
          op_.grad_x_grid, static_cast<T*>(op_.grad_x), tokens, channels_, channels_,
          qkv_weight_.row(1 + channels_), qkv_weight_.stride(), Panels<T>{dv, kWidth, stride},
          zeros(), tile(kOperands));
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
    key_bias_product(slice) = dot(sum, key_bias(), channels_);
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
    S* out_weight = static_cast<S*>(op_.grad_out_weight);
    S* out_bias = static_cast<S*>(op_.grad_out_bias);
    const auto out_sums = [&](int64_t part) { return out_weight_sum(part); };
    const auto value_sums = [&](int64_t part) { return value_weight_sum(part); };
    if (out_weight != nullptr) sum_weight_rows(own, out_sums, out_weight);
    if (qkv_weight != nullptr) {
      sum_weight_rows(own, value_sums, qkv_weight + (1 + channels_) * channels_);
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
    if (whole_ || (first_sum_in_place_ && parts_ == 1)) return;
    const StoreResult<S> result = {target, channels_, channels_};
    for (int64_t row = own.begin; row < own.end; ++row) {
      for (int64_t d = 0; d < channels_; d += kLanes<T>) {
        Vec<T> sum = load(sums(0) + row * padded_ + d);
        for (int64_t part = 1; part < parts_; ++part) sum += load(sums(part) + row * padded_ + d);
        result.place(row, d).finish(0, 0, sum);
      }
    }
  }

  // ---- The pooling path, token by token ----

  void sum_score_gradient(int64_t index) {
    T sum = dot(pooled() + index * padded_, grad_pooled() + index * padded_, channels_) +
            weight_sum(index) * key_bias_product(index);
    if (op_.grad_weights.data != nullptr) {
      const TokenGrid& grid = op_.prev_grid;
      const Slice slice = make_slice(grid, index);
      const auto p =
          slice_values<const T>(grid, slice, contiguous_values<const void>(grid, op_.weights));
      const auto grad = slice_values<const T>(grid, slice, op_.grad_weights);
      for (int64_t n = 0; n < grid.slice_tokens(); ++n) {
        if (p[n] != 0) sum += p[n] * grad[n];
      }
    }
    score_sum(index) = sum;
  }

  void pool_path(int64_t part, T* scratch) const {
    const Range range = share(prev_tokens_, part, pool_parts_);
    for (int64_t d = 0; d < padded_ + kLanes<T>; ++d) score_weight_sum(part)[d] = 0;
    for (int64_t first = range.begin; first < range.end; first += kTileRows) {
      pool_tile(part, {first, smaller(first + kTileRows, range.end)}, scratch);
    }
  }

  void pool_tile(int64_t part, Range tokens, T* x_tile) const {
    const int64_t first = tokens.begin;
    const int64_t count = tokens.count();
    const Rows<const T> x = read_rows(op_.prev_grid, static_cast<const S*>(op_.x_prev), first,
                                      count, x_tile, tile_stride_);
    bool in_place = false;
    const Rows<T> grad = pool_gradient_rows(tokens, x_tile + tile_size_, &in_place);

    const T* rows[kTileRows + kLanes<T>];
    int64_t slices[kTileRows];
    TokenWalk walk(op_.prev_grid, first);
    for (int64_t t = 0; t < count; ++t, walk.next()) {
      rows[t] = x.data + t * x.stride;
      slices[t] = walk.slice();
    }
    for (int64_t t = count; t < count + kLanes<T>; ++t) rows[t] = x.data;
    alignas(64) T products[kTileRows + 2 * kLanes<T>];  // x' . dxbar
    for (int64_t t = 0; t < count;) {
      int64_t end = t + 1;
      while (end < count && slices[end] == slices[t]) ++end;
      const T* direction = grad_pooled() + slices[t] * padded_;
      if (end - t > kLanes<T> / 4) {
        dot_rows(rows + t, end - t, direction, channels_, int64_t{0}, products + t);
      } else {
        for (int64_t i = t; i < end; ++i) products[i] = dot(rows[i], direction, channels_);
      }
      t = end;
    }

    T score_grads[kTileRows];
    int64_t kept = 0;  // tokens with a weight; whatever x' holds elsewhere stays out
    walk = TokenWalk(op_.prev_grid, first);
    for (int64_t t = 0; t < count; ++t, walk.next()) {
      const auto value_at = [&](const TokenValues<const void>& values) {
        const TokenPosition& at = walk.position();
        return static_cast<const T*>(
            values.data)[at.image * values.stride_batch + at.y * values.stride_height +
                         at.x * values.stride_width];
      };
      const T p = static_cast<const T*>(op_.weights)[first + t];
      T* grad_row = grad.data + t * grad.stride;
      if (p == 0) {
        for (int64_t d = 0; pool_grad() && !self_ && d < channels_; ++d) grad_row[d] = 0;
        continue;
      }
      const T scale = op_.dropout_scale.data != nullptr ? value_at(op_.dropout_scale) : T{1};
      T dp = scale * (products[t] + key_bias_product(slices[t]));
      if (op_.grad_weights.data != nullptr) dp += value_at(op_.grad_weights);
      const T score_grad = p * (dp - score_sum(slices[t]));
      score_bias_sum(part) += score_grad;
      rows[kept] = rows[t];
      score_grads[kept++] = score_grad;
      if (pool_grad() == nullptr) continue;
      combine_scaled(grad_pooled() + slices[t] * padded_, p * scale, score_weight(), score_grad,
                     channels_, self_, grad_row);
    }
    add_weighted_rows(rows, score_grads, kept, channels_, T{1}, score_weight_sum(part));
    if (pool_grad() != nullptr && !in_place) {
      scatter_tokens(pool_grid(), pool_grad(), first, count, grad.data, grad.stride);
    }
  }

  // The rows that receive the gradient of x': with the value path's share in self-attention.
  Rows<T> pool_gradient_rows(Range tokens, T* tile, bool* in_place) const {
    if (delayed()) {
      return {delayed_grad_x_.get() + tokens.begin * channels_, channels_};
    }
    if constexpr (!kHalf) {
      if (self_ && op_.grad_x != nullptr) {
        const TokenGrid& grid = pool_grid();
        *in_place = tokens_in_place<S>(grid, tokens.begin, tokens.count());
        if (*in_place) {
          return {pool_grad() + token_offset(grid, token_position(grid, tokens.begin)),
                  grid.stride_width};
        }
        gather_tokens(grid, pool_grad(), tokens.begin, tokens.count(), tile, tile_stride_,
                      channels_);
      }
    }
    return {tile, tile_stride_};
  }

  // ---- The same where pixels are contiguous: tokens on the lanes, vectors of a strip ----

  bool pool_strips() const {
    const auto contiguous = [](const TokenGrid& grid) {
      return grid.stride_width == 1 && grid.stride_channel != 1;
    };
    return !kHalf && contiguous(op_.prev_grid) && kLanes<T> % op_.prev_grid.patch_w == 0 &&
           (pool_grad() == nullptr || contiguous(pool_grid()));
  }
  int64_t strips() const { return op_.prev_grid.batch * op_.prev_grid.patch_h; }
  int64_t strip_segments() const {
    return segments_in(op_.prev_grid.slice_tokens() * op_.prev_grid.patch_w, channels_);
  }
  int64_t score_parts() const { return pools_strips_ ? strips() * strip_segments() : pool_parts_; }

  void pool_strip_path(int64_t part, T* scratch) const {
    const Strip strip = make_strip<T>(op_.prev_grid, part / strip_segments());
    with_strip_vectors(strip.vectors, [&](auto vectors) {
      pool_strip_path<decltype(vectors)::value>(part, strip, scratch);
    });
  }

  // kVectors at a time.
  template <int kVectors>
  void pool_strip_path(int64_t part, const Strip& strip, T* scratch) const {
    constexpr int64_t lanes = kLanes<T>;
    const TokenGrid& grid = op_.prev_grid;
    const int64_t strip_index = part / strip_segments();
    const Range range = share(strip.vectors, part % strip_segments(), strip_segments());
    const int64_t first_slice = strip_index * grid.patch_w;
    T* directions = scratch;                   // [channels, lanes]: dxbar of each lane's slice
    T* sums = directions + channels_ * lanes;  // [channels, lanes]: of dw_I
    const StripCopy<T, kVectors> copy(sums + channels_ * lanes);  // x'
    alignas(64) T biases[lanes], score_sums[lanes], values[lanes];
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t slice = first_slice + i % grid.patch_w;
      biases[i] = key_bias_product(slice);
      score_sums[i] = score_sum(slice);
    }
    for (int64_t d = 0; d < channels_; ++d) {
      store(sums + d * lanes, zero<T>());
      for (int64_t i = 0; i < lanes; ++i) {
        directions[d * lanes + i] = grad_pooled()[(first_slice + i % grid.patch_w) * padded_ + d];
      }
    }
    Vec<T> bias_sum = zero<T>();
    const auto weights = contiguous_values<const void>(grid, op_.weights);
    for (int64_t first = range.begin; first < range.end; first += kVectors) {
      Vec<T> weight[kVectors], score_grad[kVectors];
      const T* x[kVectors];
      T* grad[kVectors];
      int64_t counts[kVectors];
      bool whole = true;
      StripVector places[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const bool there = first + v < range.end;
        places[v] = strip_vector<T>(strip, there ? first + v : first);
        counts[v] = there ? places[v].count : 0;
        whole = whole && counts[v] == lanes;
        x[v] = static_cast<const T*>(op_.x_prev) + offset(grid, strip, places[v]);
        grad[v] = pool_grad() == nullptr
                      ? nullptr
                      : reinterpret_cast<T*>(pool_grad()) + offset(pool_grid(), strip, places[v]);
      }
      Vec<T> products[kVectors];
      const auto direction_of = [&](int64_t d) { return load(directions + d * lanes); };
      if (whole) {
        dot_strip<true, kVectors>(x, counts, grid.stride_channel, direction_of, channels_, copy,
                                  products);
      } else {
        dot_strip<false, kVectors>(x, counts, grid.stride_channel, direction_of, channels_, copy,
                                   products);
      }
      for (int v = 0; v < kVectors; ++v) {
        weight[v] = score_grad[v] = zero<T>();
        if (counts[v] == 0) continue;
        const Vec<T> p =
            load_first(static_cast<const T*>(weights.data) + strip.image * weights.stride_batch +
                           places[v].y * weights.stride_height + places[v].x,
                       counts[v]);
        const auto read = [&](const TokenValues<const void>& source) {
          const T* data = static_cast<const T*>(source.data);
          read_strip_values(strip, places[v], source, T{0}, values,
                            [&](int64_t at) { return data[at]; });
          return load(values);
        };
        weight[v] = p;
        Vec<T> dp = products[v] + load(biases);
        if (op_.dropout_scale.data != nullptr) {
          const Vec<T> scale = read(op_.dropout_scale);
          weight[v] *= scale;
          dp *= scale;
        }
        if (op_.grad_weights.data != nullptr) dp += read(op_.grad_weights);
        // Tokens with no weight stay out, whatever x' holds there.
        score_grad[v] = p != zero<T>() ? p * (dp - load(score_sums)) : zero<T>();
        bias_sum += score_grad[v];
        if (op_.dropout_scale.data == nullptr && whole) continue;
        weight[v] = p != zero<T>() ? weight[v] : zero<T>();
      }
      for (int64_t d = 0; d < channels_; ++d) {
        const Vec<T> direction = load(directions + d * lanes);
        const Vec<T> score_weight_lanes = broadcast<T>(score_weight()[d]);
        Vec<T> sum = zero<T>();
        SEP_ATTN_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const Vec<T> value = load(copy.vectors[v] + d * copy.stride);
          sum += score_grad[v] * (score_grad[v] != zero<T>() ? value : zero<T>());
          if (grad[v] == nullptr || counts[v] == 0) continue;
          T* at = grad[v] + d * pool_grid().stride_channel;
          Vec<T> own = direction * weight[v] + score_weight_lanes * score_grad[v];
          if (self_) own += whole ? load(at) : load_first(at, counts[v]);
          if (whole) {
            store(at, own);
          } else {
            store_first(at, own, counts[v]);
          }
        }
        store(sums + d * lanes, load(sums + d * lanes) + sum);
      }
    }
    T* result = score_weight_sum(part);
    for (int64_t d = 0; d < channels_; ++d) result[d] = reduce_sum<T>(load(sums + d * lanes));
    score_bias_sum(part) = reduce_sum<T>(bias_sum);
  }

  static int64_t offset(const TokenGrid& grid, const Strip& strip, const StripVector& at) {
    return strip.image * grid.stride_batch + at.y * grid.stride_height + at.x;
  }

  void finish_scores() const {
    if (op_.grad_qkv_bias != nullptr) {
      T sum = 0;
      for (int64_t part = 0; part < score_parts(); ++part) sum += score_bias_sum(part);
      store_one(static_cast<S*>(op_.grad_qkv_bias), sum);
    }
    for (int64_t d = 0; op_.grad_qkv_weight != nullptr && d < channels_; ++d) {
      T sum = 0;
      for (int64_t part = 0; part < score_parts(); ++part) sum += score_weight_sum(part)[d];
      store_one(static_cast<S*>(op_.grad_qkv_weight) + d, sum);
    }
  }

  const AttentionBackward& op_;
  const ParallelFor& parallel_;
  const bool self_;
  const int64_t channels_, slices_, image_tokens_, image_slices_, tokens_, prev_tokens_;
  const int64_t padded_, tile_stride_, lane_stride_, tile_size_;  // rows spread over cache sets
  const int64_t panels_, panel_size_, workers_;
  const bool on_lanes_;
  const int64_t unit_, units_;  // tokens are cut into parts at multiples of a unit
  const bool whole_;
  const int64_t parts_;
  const bool pools_strips_;
  const int64_t pool_parts_;
  const bool in_place_weights_;
  const WeightRows<S> qkv_weight_, out_weight_;
  const Buffer<T> vectors_, packed_;
  const bool first_sum_in_place_;
  const Buffer<T> weight_sums_;
  const int64_t whole_lane_stride_, whole_size_;
  const Buffer<T> whole_operands_, bias_sums_, score_sums_;
  const Buffer<T*> context_sums_;
  const Buffer<T> context_sums_data_, tiles_, delayed_grad_x_, slice_values_, slice_sums_;
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
