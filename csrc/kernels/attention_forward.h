// The fused layer, forward. Tokens are the rows of the products and weights are packed into panels;
// or, for few tokens and for channel-major layouts, tokens lie on the vector lanes and weights stay
// where they are.
#pragma once

#include <type_traits>

#include "attention_pool.h"
#include "kernels.h"
#include "micro_kernel.h"
#include "products.h"
#include "scratch.h"
#include "simd.h"
#include "tokens.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

template <typename S, Activation kActivation>
class AttentionForwardPass {
  using T = Accumulate<S>;
  static constexpr int64_t kWidth = kPanelWidth<T>;
  static constexpr int64_t kLaneTile = round_up(64, kWidth);  // tokens of a tile of lanes

 public:
  AttentionForwardPass(const AttentionForward& op, const ParallelFor& parallel)
      : op_(op),
        parallel_(parallel),
        channels_(op.grid.channels),
        slices_(op.grid.slices()),
        tokens_(op.grid.batch * op.grid.height * op.grid.width),
        slice_tokens_(op.prev_grid.slice_tokens()),
        padded_(round_up(channels_, kWidth)),
        tile_stride_(padded_ + kLanes<T>),
        tile_size_(larger(kTileRows, kChunkTokens) * tile_stride_),
        segments_(segments_in(slice_tokens_, channels_)),
        workers_(larger(1, smaller(parallel.threads, tokens_))),
        whole_slices_(units(op.grid) % workers_ == 0),
        qkv_weight_(op.qkv_weight, 1 + 2 * channels_, channels_),
        out_weight_(op.out_weight, channels_, channels_),
        vectors_(4 * padded_),
        partials_(slices_ * segments_),
        partial_pooled_(slices_ * segments_ * padded_),
        softmax_(slices_),
        tiles_(workers_ * 3 * tile_size_) {
    T* score_weight = vectors_.get();
    read_vector<S>({qkv_weight_.row(0), 1}, 0, channels_, padded_, score_weight);
    read_vector<S>(op.qkv_bias, 1, channels_, padded_, key_bias());
    read_vector<S>(op.qkv_bias, 1 + channels_, channels_, padded_, value_bias());
    read_vector<S>(op.out_bias, 0, channels_, padded_, out_bias());
    T score_bias = 0;
    read_vector<S>(op.qkv_bias, 0, 1, 1, &score_bias);
    pool_ = {op.prev_grid,
             static_cast<const S*>(op.x_prev),
             score_weight,
             score_bias,
             op.key_padding_mask,
             op.dropout_scale,
             static_cast<T*>(op.weights)};
  }

  void run() {
    const bool channel_major = op_.grid.stride_channel != 1 && op_.grid.stride_width == 1;
    // Packing the weights costs channels^2, putting tokens on lanes tokens * channels.
    if (tokens_ <= channels_ && channels_ >= kLanes<T>) {
      run_lanes_by_rows();
    } else if (channel_major) {
      run_lanes_by_tokens();
    } else {
      run_rows();
    }
  }

 private:
  T* key_bias() const { return vectors_.get() + padded_; }
  T* value_bias() const { return vectors_.get() + 2 * padded_; }
  T* out_bias() const { return vectors_.get() + 3 * padded_; }
  T* tile(int64_t worker) const { return tiles_.get() + worker * 3 * tile_size_; }
  T* statistics(int64_t slice) const {
    return static_cast<T*>(op_.statistics) + slice * (2 * channels_ + 1);
  }
  T* context(int64_t slice) const { return statistics(slice) + channels_; }
  const S* x() const { return static_cast<const S*>(op_.x); }
  S* out() const { return static_cast<S*>(op_.out); }

  // ---- The steps ----

  void pool(int64_t worker) {
    const Range pairs = share(slices_ * segments_, worker, workers_);
    for (int64_t i = pairs.begin; i < pairs.end; ++i) {
      partials_[i] =
          pool_segment(pool_, i / segments_, share(slice_tokens_, i % segments_, segments_),
                       tile(worker), tile_stride_, partial_pooled_.get() + i * padded_);
    }
  }

  void combine(int64_t slice) {
    softmax_[slice] = combine_partials(
        partials_.get() + slice * segments_, partial_pooled_.get() + slice * segments_ * padded_,
        padded_, segments_, channels_, statistics(slice), statistics(slice) + 2 * channels_);
  }

  void project(Range slices, Range rows) {
    project_context(qkv_weight_, key_bias(), channels_, slices, rows,
                    static_cast<T*>(op_.statistics));
  }

  void normalise(int64_t worker) {
    const Range pairs = share(slices_ * segments_, worker, workers_);
    for (int64_t i = pairs.begin; i < pairs.end; ++i) {
      normalise_weights(pool_, i / segments_, share(slice_tokens_, i % segments_, segments_),
                        softmax_[i / segments_]);
    }
  }

  // Groups of consecutive tokens that hold whole slices.
  static int64_t units(const TokenGrid& grid) {
    return grid.patch_w == 1 && grid.height == grid.patch_h ? grid.slices() : grid.batch;
  }

  void make_own_contexts(int64_t worker) {
    const Range own = share(slices_, worker, workers_);
    for (int64_t slice = own.begin; slice < own.end; ++slice) combine(slice);
    project(own, {0, channels_});
  }

  // Every slice's context, in parallel where there is enough of it.
  void make_contexts() {
    const int64_t parts = smaller(workers_, larger(1, slices_ * channels_ * channels_ / 32768));
    if (slices_ >= parts) {
      run_tasks(parallel_, parts, [&](int64_t part) {
        const Range own = share(slices_, part, parts);
        for (int64_t slice = own.begin; slice < own.end; ++slice) combine(slice);
        project(own, {0, channels_});
      });
    } else {
      for (int64_t slice = 0; slice < slices_; ++slice) combine(slice);
      run_tasks(parallel_, parts,
                [&](int64_t part) { project({0, slices_}, share(channels_, part, parts)); });
    }
  }

  // ---- Tokens as rows, weights packed into panels ----

  void run_rows() {
    const int64_t panels = panels_in<T>(channels_);
    const int64_t panel_size = channels_ * kWidth;
    const Buffer<T> packed(2 * panels * panel_size);
    run_tasks(parallel_, workers_, [&](int64_t worker) {
      pool(worker);
      const Range packs = share(2 * panels, worker, workers_);
      for (int64_t i = packs.begin; i < packs.end; ++i) {
        const bool value = i < panels;
        const int64_t panel = value ? i : i - panels;
        pack_panel(value ? qkv_weight_.row(1 + channels_) : out_weight_.row(0), int64_t{1},
                   value ? qkv_weight_.stride() : out_weight_.stride(), channels_, channels_,
                   panel * kWidth, packed.get() + i * panel_size);
      }
    });
    if (!whole_slices_) make_contexts();
    run_tasks(parallel_, workers_, [&](int64_t worker) {
      if (whole_slices_) make_own_contexts(worker);
      normalise(worker);
      const Tiles own(share(tokens_, worker, workers_));
      for (int64_t i = own.count - 1; i >= 0; --i) {  // the last tokens pooled are in cache
        run_row_tile(own[i], {packed.get(), panel_size, kWidth},
                     {packed.get() + panels * panel_size, panel_size, kWidth}, tile(worker));
      }
    });
  }

  void run_row_tile(Range tokens, Panels<T> value_panels, Panels<T> out_panels, T* x_tile) {
    const int64_t first = tokens.begin;
    const int64_t count = tokens.count();
    T* gated_tile = x_tile + tile_size_;
    T* context_tile = gated_tile + tile_size_;
    const T* contexts[kTileRows];
    const Rows<const T> rows = read_rows(op_.grid, x(), first, count, x_tile, tile_stride_);
    for (int64_t t = 0; t < count;) {
      const TokenWalk walk(op_.grid, first + t);
      const T* row = padded_row(context(walk.slice()), channels_, context_tile + t * tile_stride_);
      const int64_t end = smaller(count, t + walk.run());
      for (; t < end; ++t) contexts[t] = row;
    }
    const bool more = rows.data != x_tile && first >= count;
    multiply<T, LeftOperand::kRows>(
        count, channels_, channels_, rows.data, rows.stride, value_panels,
        StoreGated<T, kActivation>{
            {{gated_tile, tile_stride_}, value_bias()},
            contexts,
            {more ? rows.data - count * rows.stride : rows.data, rows.stride}});
    if constexpr (std::is_same<S, T>::value) {
      if (channels_ % kLanes<T> == 0 && tokens_in_place<S>(op_.out_grid, first, count)) {
        T* target = out() + token_offset(op_.out_grid, token_position(op_.out_grid, first));
        multiply<T, LeftOperand::kRows>(
            count, channels_, channels_, gated_tile, tile_stride_, out_panels,
            StoreBiased<T>{{target, op_.out_grid.stride_width}, out_bias()});
        return;
      }
    }
    multiply<T, LeftOperand::kRows>(count, channels_, channels_, gated_tile, tile_stride_,
                                    out_panels, StoreBiased<T>{{x_tile, tile_stride_}, out_bias()});
    scatter_tokens(op_.out_grid, out(), first, count, x_tile, tile_stride_);
  }

  // ---- Tokens as lanes, weights where they lie ----

  // W_V and W_O as rows of T: where they lie, or converted by convert_weights.
  struct LaneWeights {
    const T* value;
    const T* out;
    int64_t value_stride, out_stride;
  };
  int64_t converted_size() const {
    return std::is_same<S, T>::value ? 0 : 2 * channels_ * channels_;
  }
  LaneWeights lane_weights(const Buffer<T>& converted) const {
    if constexpr (std::is_same<S, T>::value) {
      return {qkv_weight_.row(1 + channels_), out_weight_.row(0), qkv_weight_.stride(),
              out_weight_.stride()};
    }
    return {converted.get(), converted.get() + channels_ * channels_, channels_, channels_};
  }
  void convert_weights(const Buffer<T>& converted, int64_t worker) const {
    if (std::is_same<S, T>::value) return;
    const Range own = share(channels_, worker, workers_);
    copy_rows(qkv_weight_.row(1 + channels_ + own.begin), qkv_weight_.stride(), own.count(),
              channels_, converted.get() + own.begin * channels_, channels_);
    copy_rows(out_weight_.row(own.begin), out_weight_.stride(), own.count(), channels_,
              converted.get() + (channels_ + own.begin) * channels_, channels_);
  }

  // The context each vector of tokens is gated by; tokens of several slices in one vector have
  // theirs written to `mixed`, rows [rows) only.
  void lane_contexts(Range tokens, Range rows, const T** contexts, LanePanel<T> mixed) const {
    TokenWalk walk(op_.grid, tokens.begin);
    for (int64_t first = 0; first < tokens.count(); first += kLanes<T>) {
      const int64_t count = smaller(kLanes<T>, tokens.count() - first);
      int64_t slices[kLanes<T>];
      bool same = true;
      for (int64_t i = 0; i < count; ++i, walk.next()) {
        slices[i] = walk.slice();
        same = same && slices[i] == slices[0];
      }
      contexts[first / kLanes<T>] = same ? context(slices[0]) + rows.begin : nullptr;
      if (same) continue;
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        T* lanes = mixed.at(row - rows.begin, first);
        for (int64_t i = 0; i < kLanes<T>; ++i) {
          lanes[i] = i < count ? context(slices[i])[row] : T{0};
        }
      }
    }
  }

  // Few tokens: workers share the rows of the weights, all tokens at once.
  void run_lanes_by_rows() {
    const int64_t panels = panels_in<T>(tokens_);
    const int64_t panel_size = channels_ * kWidth;
    const Buffer<T> lanes(3 * panels * panel_size);
    const Buffer<T> converted(converted_size());
    const Buffer<T> out_tiles(workers_ * panels * kTileRows * kWidth);
    const Buffer<const T*> contexts(workers_ * panels * kPanelVectors);
    const LanePanel<T> x_lanes = {lanes.get(), panel_size};
    const LanePanel<T> gated_lanes = {x_lanes.data + panels * panel_size, panel_size};
    const LanePanel<T> mixed = {gated_lanes.data + panels * panel_size, panel_size};
    const LaneWeights weights = lane_weights(converted);
    run_tasks(parallel_, workers_, [&](int64_t worker) {
      pool(worker);
      convert_weights(converted, worker);
      const Range own = share(panels, worker, workers_);
      for (int64_t panel = own.begin; panel < own.end; ++panel) {
        gather_channels(op_.grid, x(), panel * kWidth, smaller(kWidth, tokens_ - panel * kWidth),
                        x_lanes.data + panel * panel_size, kWidth, kWidth);
      }
    });
    for (int64_t slice = 0; slice < slices_; ++slice) combine(slice);
    const int64_t blocks = (channels_ + kBlockRows - 1) / kBlockRows;
    const auto own_rows = [&](int64_t worker) {
      const Range own = share(blocks, worker, workers_);
      return Range{channels_ * own.begin / blocks, channels_ * own.end / blocks};
    };
    run_tasks(parallel_, workers_, [&](int64_t worker) {
      normalise(worker);
      const Range rows = own_rows(worker);
      project({0, slices_}, rows);
      const T** own_contexts = contexts.get() + worker * panels * kPanelVectors;
      const LanePanel<T> own_mixed = {mixed.data + rows.begin * kWidth, panel_size};
      lane_contexts({0, tokens_}, rows, own_contexts, own_mixed);
      multiply<T, LeftOperand::kRows>(
          rows.count(), tokens_, channels_, weights.value + rows.begin * weights.value_stride,
          weights.value_stride, Panels<T>{x_lanes.data, panel_size, kWidth},
          StoreGatedLanes<T, kActivation>{
              {{gated_lanes.data + rows.begin * kWidth, panel_size}, value_bias() + rows.begin},
              own_contexts,
              own_mixed});
    });
    run_tasks(parallel_, workers_, [&](int64_t worker) {
      const Range rows = own_rows(worker);
      T* out_tile = out_tiles.get() + worker * panels * kTileRows * kWidth;
      for (int64_t row = rows.begin; row < rows.end;) {
        const int64_t count = smaller(kTileRows, rows.end - row);
        store_out_rows({0, tokens_}, {row, row + count}, weights,
                       Panels<T>{gated_lanes.data, panel_size, kWidth}, out_tile);
        row += count;
      }
    });
  }

  // The output product for some rows of W_O and the tokens of some panels.
  void store_out_rows(Range tokens, Range rows, const LaneWeights& weights, Panels<T> gated,
                      T* out_tile) const {
    const T* left = weights.out + rows.begin * weights.out_stride;
    const T* bias = out_bias() + rows.begin;
    const TokenGrid& grid = op_.out_grid;
    TokenGrid own_channels = grid;
    own_channels.channels = rows.count();
    S* target = out() + rows.begin * grid.stride_channel;
    int64_t runs = 0;
    for_each_run(grid, tokens.begin, tokens.count(), [&](int64_t, int64_t, int64_t) { ++runs; });
    if constexpr (std::is_same<S, T>::value) {
      if (grid.stride_width == 1 && runs == 1) {
        multiply<T, LeftOperand::kRows>(
            rows.count(), tokens.count(), channels_, left, weights.out_stride, gated,
            StoreTokens<T>{target + token_offset(grid, token_position(grid, tokens.begin)),
                           grid.stride_channel, tokens.count(), bias});
        return;
      }
    }
    const int64_t panel_size = rows.count() * kWidth;
    multiply<T, LeftOperand::kRows>(rows.count(), tokens.count(), channels_, left,
                                    weights.out_stride, gated,
                                    StoreLanes<T>{{out_tile, panel_size}, bias});
    for (int64_t first = 0; first < tokens.count(); first += kWidth) {
      scatter_channels(own_channels, target, tokens.begin + first,
                       smaller(kWidth, tokens.count() - first),
                       out_tile + first / kWidth * panel_size, kWidth);
    }
  }

  // Many tokens: each worker takes a range of them.
  void run_lanes_by_tokens() {
    constexpr int64_t panels = kLaneTile / kWidth;
    const int64_t panel_size = channels_ * kWidth;
    const Buffer<T> lanes(workers_ * 4 * panels * panel_size);
    const Buffer<T> converted(converted_size());
    const LaneWeights weights = lane_weights(converted);
    if (whole_slices_ && (workers_ == 1 || converted.get() == nullptr)) {
      run_tasks(parallel_, workers_, [&](int64_t worker) {
        pool(worker);
        convert_weights(converted, worker);
        make_own_contexts(worker);
        run_lane_tiles(worker, weights, lanes.get() + worker * 4 * panels * panel_size);
      });
      return;
    }
    run_tasks(parallel_, workers_, [&](int64_t worker) {
      pool(worker);
      convert_weights(converted, worker);
    });
    make_contexts();
    run_tasks(parallel_, workers_, [&](int64_t worker) {
      run_lane_tiles(worker, weights, lanes.get() + worker * 4 * panels * panel_size);
    });
  }

  // Where a worker's range begins: on a whole vector, or on a whole slice.
  int64_t lane_edge(int64_t worker) const {
    if (whole_slices_) return share(tokens_, worker, workers_).begin;
    const int64_t vectors = (tokens_ + kLanes<T> - 1) / kLanes<T>;
    return smaller(share(vectors, worker, workers_).begin * kLanes<T>, tokens_);
  }

  void run_lane_tiles(int64_t worker, const LaneWeights& weights, T* scratch) {
    constexpr int64_t panels = kLaneTile / kWidth;
    const int64_t panel_size = channels_ * kWidth;
    const LanePanel<T> x_lanes = {scratch, panel_size};
    const LanePanel<T> gated_lanes = {x_lanes.data + panels * panel_size, panel_size};
    const LanePanel<T> mixed = {gated_lanes.data + panels * panel_size, panel_size};
    T* out_tile = mixed.data + panels * panel_size;
    const T* contexts[panels * kPanelVectors];
    normalise(worker);
    const int64_t end = lane_edge(worker + 1);
    for (int64_t first = lane_edge(worker); first < end; first += kLaneTile) {
      const Range tokens = {first, smaller(first + kLaneTile, end)};
      for (int64_t i = 0; i < tokens.count(); i += kWidth) {
        gather_channels(op_.grid, x(), first + i, smaller(kWidth, tokens.count() - i),
                        x_lanes.at(0, i), kWidth, kWidth);
      }
      lane_contexts(tokens, {0, channels_}, contexts, mixed);
      multiply<T, LeftOperand::kRows>(
          channels_, tokens.count(), channels_, weights.value, weights.value_stride,
          Panels<T>{x_lanes.data, panel_size, kWidth},
          StoreGatedLanes<T, kActivation>{{gated_lanes, value_bias()}, contexts, mixed});
      store_out_rows(tokens, {0, channels_}, weights,
                     Panels<T>{gated_lanes.data, panel_size, kWidth}, out_tile);
    }
  }

  const AttentionForward& op_;
  const ParallelFor& parallel_;
  const int64_t channels_, slices_, tokens_, slice_tokens_;
  const int64_t padded_, tile_stride_, tile_size_;  // a tile's rows spread over cache sets
  const int64_t segments_, workers_;
  const bool whole_slices_;  // a worker's tokens are those of its slices
  const WeightRows<S> qkv_weight_, out_weight_;
  const Buffer<T> vectors_;
  const Buffer<Partial<T>> partials_;
  const Buffer<T> partial_pooled_;
  const Buffer<Softmax<T>> softmax_;
  const Buffer<T> tiles_;
  PoolOperands<S> pool_;
};

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
