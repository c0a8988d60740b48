// The fused layer, forward. Tokens are the rows of the products and weights are packed into panels;
// or, for few tokens and for channel-major layouts, tokens lie on the vector lanes and weights stay
// where they are.
#pragma once

#include <type_traits>

#include "attention_pool.h"
#include "bfloat16_products.h"
#include "kernels.h"
#include "lanes.h"
#include "micro_kernel.h"
#include "packed_weights.h"
#include "products.h"
#include "scratch.h"
#include "simd.h"
#include "tokens.h"
#include "workers.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

// results[t] = sum_d weight[d] rows[t][d] for kTokens rows, which end in zeros: whole vectors.
template <int kTokens, typename P, typename T>
SEP_ATTN_INLINE void dot_tail(const P* weight, const P* rows, int64_t stride, int64_t depth,
                              T* results) {
  Vec<T> sums[kTokens];
  SEP_ATTN_UNROLL
  for (int t = 0; t < kTokens; ++t) sums[t] = zero<T>();
  const auto add = [&](int64_t d, Vec<P> w) __attribute__((always_inline)) {
    SEP_ATTN_UNROLL
    for (int t = 0; t < kTokens; ++t) add_product(sums[t], w, load(rows + t * stride + d));
  };
  int64_t d = 0;
  for (; d + kLanes<P> <= depth; d += kLanes<P>) add(d, load(weight + d));
  if (d < depth) add(d, load_first(weight + d, depth - d));
  SEP_ATTN_UNROLL
  for (int t = 0; t < kTokens; ++t) results[t] = reduce_sum<T>(sums[t]);
}

template <typename T, int kTokens = kLanes<T> / 2, typename P>
SEP_ATTN_INLINE void dot_tail(int64_t tokens, const P* weight, const P* rows, int64_t stride,
                              int64_t depth, T* results) {
  if (tokens == kTokens) {
    dot_tail<kTokens>(weight, rows, stride, depth, results);
  } else if constexpr (kTokens > 1) {
    dot_tail<T, kTokens - 1>(tokens, weight, rows, stride, depth, results);
  }
}

template <typename S, Activation kActivation>
class AttentionForwardPass {
  using T = Accumulate<S>;
  // Operands of the two products, which hold kElements values of type E each.
  using P = typename OperandTypes<S>::Type;
  using E = typename OperandTypes<S>::Element;
  static constexpr int64_t kElements = OperandTypes<S>::kElements;
  static constexpr int64_t kWidth = kPanelWidth<T>;
  static_assert(sizeof(P) == sizeof(T), "tiles and panels hold either");
  static_assert(kBlockRows % kElements == 0, "a part of the rows holds whole operands");
  static constexpr int64_t kLanePanels = larger(1, kLaneTile / kWidth);
  static constexpr int64_t kMostPatterns = 2 * kLanePanels * kPanelVectors;

 public:
  AttentionForwardPass(const AttentionForward& op, const ParallelFor& parallel)
      : op_(op),
        parallel_(parallel),
        channels_(op.grid.channels),
        slices_(op.grid.slices()),
        tokens_(op.grid.batch * op.grid.height * op.grid.width),
        depth_(product_depth<S>(channels_)),
        padded_(round_up(channels_, kWidth)),
        tile_stride_(padded_ + kLanes<T>),
        tile_size_(larger(kTileRows, kChunkTokens) * tile_stride_),
        workers_(workers_for(tokens_, 4 * channels_ * channels_, parallel.threads)),
        pools_strips_(op.prev_grid.stride_width == 1 && op.prev_grid.stride_channel != 1 &&
                      kLanes<T> % op.prev_grid.patch_w == 0),
        unit_slices_(pools_strips_ ? op.prev_grid.patch_w : 1),
        units_(slices_ / unit_slices_),
        segments_(segments_in(op.prev_grid.slice_tokens() * unit_slices_, channels_)),
        qkv_weight_(op.qkv_weight, 1 + 2 * channels_, channels_),
        out_weight_(op.out_weight, channels_, channels_),
        vectors_(4 * padded_),
        statistics_(op.statistics == nullptr ? slices_ * (2 * channels_ + 1) : 0),
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
             static_cast<T*>(op.weights),
             {nullptr, channels_ * kWidth}};
  }

  void run() {
    const bool channel_major = values_on_lanes(op_.grid);
    if (channels_ >= kLanes<T> && (channel_major ? tokens_ <= channels_ : few_tokens())) {
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
  T* tile(const Worker& worker) const { return tiles_.get() + worker.index() * 3 * tile_size_; }
  T* statistics() const {
    return op_.statistics != nullptr ? static_cast<T*>(op_.statistics) : statistics_.get();
  }
  T* statistics(int64_t slice) const { return statistics() + slice * (2 * channels_ + 1); }
  T* context(int64_t slice) const { return statistics(slice) + channels_; }
  T* values() const { return static_cast<T*>(op_.values); }
  T* kept_value(int64_t token, int64_t channel) const {
    if (values_on_lanes(op_.grid)) {
      return KeptLanes<T>{values(), channels_, channel, 0}.at(0, token);
    }
    return values() + token * channels_ + channel;
  }
  LaneContexts<T> lane_contexts(int64_t most, LaneSlices<T>* slices, T* mixed) const {
    return {op_.grid, context(0), 2 * channels_ + 1, most, slices, mixed};
  }
  const S* x() const { return static_cast<const S*>(op_.x); }
  S* out() const { return static_cast<S*>(op_.out); }

  // Tokens on lanes waste the lanes that they leave empty; packed panels cost channels^2: reading
  // the weights where the panels are kept, more where the weights outgrow the cache, or packing
  // them.
  bool few_tokens() const {
    const int64_t wasted = round_up(tokens_, kLanes<T>) - tokens_;
    const bool cached = 2 * channels_ * channels_ * sizeof(S) <= 3 << 19;
    return tokens_ <= channels_ && (op_.packed_weights == nullptr || wasted <= (cached ? 8 : 16));
  }

  // The last tokens, where they are too few to fill the lanes of a vector.
  int64_t tail_tokens() const {
    const int64_t left = tokens_ % kLanes<T>;
    return tokens_ > kLanes<T> && left <= kLanes<T> / 2 ? left : 0;
  }

  // ---- The steps ----

  // Partials of every slice: those of one unit (a strip, or a slice) and segment lie together.
  void pool(Worker& worker) const {
    worker.share_out(units_ * segments_, [&](int64_t i) {
      const int64_t unit = i / segments_;
      Partial<T>* partials = partials_.get() + i * unit_slices_;
      T* pooled = partial_pooled_.get() + i * unit_slices_ * padded_;
      if (pools_strips_) {
        const Range vectors =
            share(make_strip<T>(pool_.grid, unit).vectors, i % segments_, segments_);
        pool_strip(pool_, unit, vectors, tile(worker), partials, pooled, padded_);
      } else {
        const Range tokens = share(pool_.grid.slice_tokens(), i % segments_, segments_);
        *partials = pool_rows(pool_, unit, tokens, tile(worker), tile_stride_, pooled);
      }
    });
  }

  void combine(Worker& worker) const {
    worker.share_out(slices_, [&](int64_t slice) {
      const int64_t first = slice / unit_slices_ * segments_ * unit_slices_ + slice % unit_slices_;
      softmax_[slice] = combine_partials(
          partials_.get() + first, partial_pooled_.get() + first * padded_, padded_, unit_slices_,
          segments_, channels_, statistics(slice), statistics(slice) + 2 * channels_);
    });
    worker.wait();
  }

  void project(Range slices, Range rows) const {
    project_context(qkv_weight_, key_bias(), channels_, slices, rows, statistics());
  }

  // Every slice's context; rows of W_K are read once for a group of slices.
  void make_contexts(Worker& worker) const {
    combine(worker);
    const int64_t row_parts = workers_ == 1 ? 1 : (channels_ + 31) / 32;
    const int64_t slice_parts = (slices_ + 15) / 16;
    worker.share_out(row_parts * slice_parts, [&](int64_t i) {
      project(share(slices_, i / row_parts, slice_parts),
              share(channels_, i % row_parts, row_parts));
    });
    normalise(worker);
    worker.wait();
  }

  void normalise(Worker& worker) const {
    if (op_.weights == nullptr) return;
    const int64_t strips = pool_.grid.batch * pool_.grid.patch_h;
    const int64_t parts = segments_in(pool_.grid.slice_tokens() * pool_.grid.patch_w, channels_);
    worker.share_out(strips * parts, [&](int64_t i) {
      const int64_t strip = i / parts;
      normalise_weights(pool_, strip,
                        share(make_strip<T>(pool_.grid, strip).vectors, i % parts, parts),
                        softmax_.get() + strip * pool_.grid.patch_w);
    });
  }

  // ---- Tokens as rows, weights packed into panels ----

  void run_rows() {
    const PackedWeights<S> packed(op_.packed_weights, op_.packed_weights_bytes, qkv_weight_,
                                  out_weight_, channels_);
    const Tiles tiles({0, tokens_}, workers_);
    run_workers(parallel_, workers_, [&](Worker& worker) {
      worker.share_out(packed.count(), [&](int64_t i) { packed.prepare(i); });
      pool(worker);
      worker.wait();
      make_contexts(worker);
      // The last tokens pooled are in cache.
      worker.share_out(
          tiles.count,
          [&](int64_t i) { run_row_tile(tiles[i], packed.value(), packed.out(), tile(worker)); },
          Order::kBackward);
    });
  }

  void run_row_tile(Range tokens, Panels<P> value_panels, Panels<P> out_panels, T* tiles) const {
    const int64_t first = tokens.begin;
    const int64_t count = tokens.count();
    P* x_tile = reinterpret_cast<P*>(tiles);
    P* gated_tile = x_tile + tile_size_;
    T* context_tile = tiles + 2 * tile_size_;
    const T* contexts[kTileRows];
    const Rows<const P> rows = read_rows(op_.grid, x(), first, count, x_tile, tile_stride_);
    const Rows<E> gated = elements(gated_tile, tile_stride_);
    for (int64_t t = 0; t < count;) {
      const TokenWalk walk(op_.grid, first + t);
      const T* row = padded_row(context(walk.slice()), channels_, context_tile + t * tile_stride_);
      const int64_t end = smaller(count, t + walk.run());
      for (; t < end; ++t) contexts[t] = row;
    }
    const bool more = rows.data != x_tile && first >= count;
    multiply<P, LeftOperand::kRows>(
        count, channels_, depth_, rows.data, rows.stride, value_panels,
        StoreGated<T, kActivation, E>{
            gated.data,
            gated.stride,
            value_bias(),
            contexts,
            elements(more ? rows.data - count * rows.stride : rows.data, rows.stride),
            {op_.values == nullptr ? nullptr : values() + first * channels_, channels_}});
    for (int64_t t = 0; half_pair() && t < count; ++t) {
      gated.data[t * gated.stride + channels_] = E{};
    }
    if constexpr (std::is_same<S, T>::value) {
      if (channels_ % kLanes<T> == 0 && tokens_in_place<S>(op_.out_grid, first, count)) {
        T* target = out() + token_offset(op_.out_grid, token_position(op_.out_grid, first));
        multiply<P, LeftOperand::kRows>(
            count, channels_, depth_, gated_tile, tile_stride_, out_panels,
            StoreBiased<T>{target, op_.out_grid.stride_width, out_bias()});
        return;
      }
    }
    multiply<P, LeftOperand::kRows>(count, channels_, depth_, gated_tile, tile_stride_, out_panels,
                                    StoreBiased<T>{tiles, tile_stride_, out_bias()});
    scatter_tokens(op_.out_grid, out(), first, count, tiles, tile_stride_);
  }

  // True when the last operand of a row is a pair with one channel in it.
  bool half_pair() const { return kElements * depth_ > channels_; }

  // Rows of operands as rows of what they hold.
  static Rows<E> elements(P* rows, int64_t stride) {
    return {reinterpret_cast<E*>(rows), kElements * stride};
  }
  static Rows<const E> elements(const P* rows, int64_t stride) {
    return {reinterpret_cast<const E*>(rows), kElements * stride};
  }

  // ---- Tokens as lanes, weights where they lie ----

  // W_V and W_O as rows of operands: where they lie, or converted by convert_weights.
  struct LaneWeights {
    const P* value;
    const P* out;
    int64_t value_stride, out_stride;
  };
  bool weights_in_place() const {
    return std::is_same<S, E>::value && channels_ % kElements == 0 &&
           qkv_weight_.stride() % kElements == 0 && out_weight_.stride() % kElements == 0;
  }
  int64_t converted_size() const { return weights_in_place() ? 0 : 2 * channels_ * depth_; }
  LaneWeights lane_weights(const Buffer<P>& converted) const {
    if (weights_in_place()) {
      return {reinterpret_cast<const P*>(qkv_weight_.row(1 + channels_)),
              reinterpret_cast<const P*>(out_weight_.row(0)), qkv_weight_.stride() / kElements,
              out_weight_.stride() / kElements};
    }
    return {converted.get(), converted.get() + channels_ * depth_, depth_, depth_};
  }
  void convert_weights(const Buffer<P>& converted, Worker& worker) const {
    if (weights_in_place()) return;
    const int64_t parts = (channels_ + 31) / 32;
    worker.share_out(parts, [&](int64_t part) {
      const Range own = share(channels_, part, parts);
      copy_rows(qkv_weight_.row(1 + channels_ + own.begin), qkv_weight_.stride(), own.count(),
                channels_, converted.get() + own.begin * depth_, depth_);
      copy_rows(out_weight_.row(own.begin), out_weight_.stride(), own.count(), channels_,
                converted.get() + (channels_ + own.begin) * depth_, depth_);
    });
  }

  // Few tokens: workers share the rows of the weights, all tokens at once. A tail that would leave
  // most lanes of its vector empty is kept as rows, whose channels fill the lanes instead.
  void run_lanes_by_rows() {
    const Range tail = {tokens_ - tail_tokens(), tokens_};
    const Range on_lanes = {0, tail.begin};
    const int64_t panels = panels_in<T>(on_lanes.count());
    const int64_t panel_size = depth_ * kWidth;
    const int64_t blocks = (channels_ + kBlockRows - 1) / kBlockRows;
    // As many for every worker. A tail reads the weights again: block by block, while they are in
    // cache.
    const int64_t parts =
        workers_ == 1 && tail.count() == 0 ? 1 : smaller(depth_, round_up(blocks, workers_));
    const int64_t part_rows = parts == 1 ? channels_ : kBlockRows;
    const int64_t x_vectors = panels * kPanelVectors;
    const Buffer<P> lanes(2 * panels * panel_size);
    const Buffer<P> tails(2 * tail.count() * padded_);
    const bool moves_values = op_.values != nullptr && !values_on_lanes(op_.grid);
    const Buffer<T> value_lanes(moves_values ? round_up(tokens_, kValuesWidth) * channels_ : 0);
    const Buffer<P> converted(converted_size());
    const Buffer<T> worker_tiles(workers_ * panels * part_rows * kWidth);
    const Buffer<LaneContext<T>> contexts(workers_ * x_vectors);
    const Buffer<LaneSlices<T>> slices(workers_ * x_vectors);
    const LanePanel<P> x_lanes = {lanes.get(), panel_size};
    const LanePanel<P> gated_lanes = {x_lanes.data + panels * panel_size, panel_size};
    P* x_tail = tails.get();
    P* gated_tail = x_tail + tail.count() * padded_;
    const LaneWeights weights = lane_weights(converted);
    const auto rows_of = [&](int64_t part) {  // whole operands of the second product
      const Range own = share(depth_, part, parts);
      return Range{own.begin * kElements, smaller(own.end * kElements, channels_)};
    };
    run_workers(parallel_, workers_, [&](Worker& worker) {
      LaneContext<T>* own_contexts = contexts.get() + worker.index() * x_vectors;
      T* own_tile = worker_tiles.get() + worker.index() * panels * part_rows * kWidth;
      LaneContexts<T> find_contexts =
          lane_contexts(x_vectors, slices.get() + worker.index() * x_vectors, own_tile);
      convert_weights(converted, worker);
      worker.share_out(x_vectors, [&](int64_t i) {
        const int64_t first = smaller(i * kLanes<T>, on_lanes.end);
        gather_channels(op_.grid, x(), first, smaller(kLanes<T>, on_lanes.end - first),
                        x_lanes.at(0, i * kLanes<T>), kWidth, int64_t{kLanes<T>});
        clear_last_row(gated_lanes.at(depth_ - 1, i * kLanes<T>), kLanes<T>);
      });
      worker.share_out(smaller(1, tail.count()), [&](int64_t) {
        gather_tokens(op_.grid, x(), tail.begin, tail.count(), x_tail, padded_, padded_);
        for (int64_t i = 0; i < tail.count() * padded_; ++i) gated_tail[i] = P{};
      });
      pool(worker);
      worker.wait();
      combine(worker);
      normalise(worker);
      worker.share_out(parts, [&](int64_t part) {
        const Range rows = rows_of(part);
        project({0, slices_}, rows);
        find_contexts.forget();
        find_contexts.find(on_lanes, rows, own_contexts);
        const KeptLanes<T> own_values = {
            value_lanes.get() != nullptr ? value_lanes.get() : values(), channels_, rows.begin, 0};
        multiply<P, LeftOperand::kRows>(rows.count(), on_lanes.count(), depth_,
                                        weights.value + rows.begin * weights.value_stride,
                                        weights.value_stride,
                                        Panels<P>{x_lanes.data, panel_size, kWidth},
                                        StoreGatedLanes<T, kActivation, P>{
                                            {gated_lanes.at(rows.begin / kElements, 0), panel_size},
                                            value_bias() + rows.begin,
                                            own_contexts,
                                            own_values});
        if (value_lanes.get() != nullptr) store_values(on_lanes, rows, own_values);
        gate_tail(tail, rows, weights, x_tail, gated_tail);
      });
      worker.wait();
      worker.share_out(parts, [&](int64_t part) {
        store_out_rows(on_lanes, rows_of(part), weights,
                       Panels<P>{gated_lanes.data, panel_size, kWidth}, own_tile);
        store_out_tail(tail, rows_of(part), weights, gated_tail);
      });
    });
  }

  // The last row of a panel of gated values, where the second product reads more than is stored.
  void clear_last_row(P* row, int64_t count) const {
    for (int64_t i = 0; half_pair() && i < count; ++i) row[i] = P{};
  }

  void gate_tail(Range tail, Range rows, const LaneWeights& weights, const P* x_tail,
                 P* gated_tail) const {
    if (tail.count() == 0) return;
    const T* own_contexts[kLanes<T>];
    TokenWalk walk(op_.grid, tail.begin);
    for (int64_t t = 0; t < tail.count(); ++t, walk.next()) own_contexts[t] = context(walk.slice());
    T sums[kLanes<T>] = {};
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      dot_tail<T>(tail.count(), weights.value + row * weights.value_stride, x_tail, padded_, depth_,
                  sums);
      for (int64_t t = 0; t < tail.count(); ++t) {
        const T value = sums[t] + value_bias()[row];
        if (op_.values != nullptr) *kept_value(tail.begin + t, row) = value;
        const bool off = kActivation == Activation::kRelu && value < 0;  // keeps NaN
        store_one(elements(gated_tail + t * padded_, padded_).data + row,
                  (off ? T{0} : value) * own_contexts[t][row]);
      }
    }
  }

  void store_out_tail(Range tail, Range rows, const LaneWeights& weights,
                      const P* gated_tail) const {
    if (tail.count() == 0) return;
    S* targets[kLanes<T>];
    TokenWalk walk(op_.out_grid, tail.begin);
    for (int64_t t = 0; t < tail.count(); ++t, walk.next()) {
      targets[t] = out() + token_offset(op_.out_grid, walk.position());
    }
    T sums[kLanes<T>] = {};
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      dot_tail<T>(tail.count(), weights.out + row * weights.out_stride, gated_tail, padded_, depth_,
                  sums);
      for (int64_t t = 0; t < tail.count(); ++t) {
        store_one(targets[t] + row * op_.out_grid.stride_channel, sums[t] + out_bias()[row]);
      }
    }
  }

  // Rows of the values, tokens on lanes, to rows of tokens.
  void store_values(Range tokens, Range rows, KeptLanes<T> lanes) const {
    for (int64_t first = 0; first < tokens.count(); first += kValuesWidth) {
      copy_matrix(lanes.at(0, first), kValuesWidth, int64_t{1}, rows.count(),
                  smaller(kValuesWidth, tokens.count() - first),
                  kept_value(tokens.begin + first, rows.begin), int64_t{1}, channels_);
    }
  }

  // The output product for some rows of W_O and the tokens of some panels.
  void store_out_rows(Range tokens, Range rows, const LaneWeights& weights, Panels<P> gated,
                      T* out_tile) const {
    multiply_into_tokens<LeftOperand::kRows>(
        op_.out_grid, out() + rows.begin * op_.out_grid.stride_channel, tokens, rows.count(),
        depth_, weights.out + rows.begin * weights.out_stride, weights.out_stride, gated,
        out_bias() + rows.begin, out_tile);
  }

  // True where pooling leaves x on the lanes, all of it, for the products: x is read once, which is
  // faster than copying it by tiles while it stays in the worker's own second cache.
  bool pools_into_lanes() const {
    constexpr int64_t most_bytes = 1 << 19;
    return std::is_same<P, T>::value && workers_ == 1 && pools_strips_ && op_.x == op_.x_prev &&
           same_tokens(op_.grid, op_.prev_grid) && op_.grid.width % kLanes<T> == 0 &&
           tokens_ * channels_ * static_cast<int64_t>(sizeof(T)) <= most_bytes;
  }
  // x_prev may be another view of x's memory, which begins where x does.
  static bool same_tokens(const TokenGrid& a, const TokenGrid& b) {
    return a.height == b.height && a.width == b.width && a.stride_batch == b.stride_batch &&
           a.stride_height == b.stride_height && a.stride_width == b.stride_width &&
           a.stride_channel == b.stride_channel;
  }

  // Tokens of a tile of lanes: few where the workers need many tiles; many where the tile stays in
  // the first cache, or where weights that outgrow the second one are read once a tile.
  int64_t lane_tile() const {
    constexpr int64_t bytes = sizeof(T);
    const bool tall = kLanePanels * kWidth * channels_ * bytes <= 1 << 15 ||
                      2 * channels_ * channels_ * bytes > 1 << 20;
    int64_t panels = tall ? kLanePanels : larger(1, kLanePanels / 2);
    while (workers_ > 1 && panels > 1 && tokens_ < 4 * workers_ * panels * kWidth) panels /= 2;
    return panels * kWidth;
  }

  // Many tokens: workers share tiles of them.
  void run_lanes_by_tokens() {
    const int64_t lane_tile = this->lane_tile();
    const int64_t tiles = (tokens_ + lane_tile - 1) / lane_tile;
    const int64_t panel_size = channels_ * kWidth;
    const int64_t lanes_size = 5 * kLanePanels * panel_size;
    const Buffer<T> lanes(workers_ * lanes_size);
    const Buffer<LaneSlices<T>> slices(workers_ * kMostPatterns);
    const Buffer<T> pooled_lanes(pools_into_lanes() ? panels_in<T>(tokens_) * panel_size : 0);
    const Buffer<P> converted(converted_size());
    const LaneWeights weights = lane_weights(converted);
    pool_.lanes.data = pooled_lanes.get();
    run_workers(parallel_, workers_, [&](Worker& worker) {
      T* scratch = lanes.get() + worker.index() * lanes_size;
      LaneContexts<T> contexts =
          lane_contexts(kMostPatterns, slices.get() + worker.index() * kMostPatterns,
                        scratch + 3 * kLanePanels * panel_size);
      convert_weights(converted, worker);
      pool(worker);
      worker.wait();
      make_contexts(worker);
      worker.share_out(
          tiles,
          [&](int64_t i) {
            const int64_t first = i * lane_tile;
            run_lane_tile({first, smaller(first + lane_tile, tokens_)}, weights, contexts, scratch);
          },
          Order::kBackward);
    });
  }

  void run_lane_tile(Range tokens, const LaneWeights& weights, LaneContexts<T>& find_contexts,
                     T* scratch) const {
    const int64_t room = kLanePanels * channels_ * kWidth, panel_size = depth_ * kWidth;
    LanePanel<P> x_lanes = {reinterpret_cast<P*>(scratch), panel_size};
    const LanePanel<P> gated_lanes = {reinterpret_cast<P*>(scratch + room), panel_size};
    T* out_tile = scratch + 2 * room;
    LaneContext<T> contexts[kLanePanels * kPanelVectors];
    if (pool_.lanes.data != nullptr) {
      x_lanes.data = reinterpret_cast<P*>(pool_.lanes.at(0, tokens.begin));
    } else {
      for (int64_t i = 0; i < tokens.count(); i += kWidth) {
        gather_channels(op_.grid, x(), tokens.begin + i, smaller(kWidth, tokens.count() - i),
                        x_lanes.at(0, i), kWidth, kWidth);
      }
    }
    for (int64_t i = 0; i < tokens.count(); i += kWidth) {
      clear_last_row(gated_lanes.at(depth_ - 1, i), kWidth);
    }
    find_contexts.find(tokens, {0, channels_}, contexts);
    multiply<P, LeftOperand::kRows>(
        channels_, tokens.count(), depth_, weights.value, weights.value_stride,
        Panels<P>{x_lanes.data, panel_size, kWidth},
        StoreGatedLanes<T, kActivation, P>{
            gated_lanes, value_bias(), contexts, {values(), channels_, 0, tokens.begin}});
    store_out_rows(tokens, {0, channels_}, weights, Panels<P>{gated_lanes.data, panel_size, kWidth},
                   out_tile);
  }

  const AttentionForward& op_;
  const ParallelFor& parallel_;
  const int64_t channels_, slices_, tokens_, depth_;
  const int64_t padded_, tile_stride_, tile_size_;  // a tile's rows spread over cache sets
  const int64_t workers_;
  const bool pools_strips_;
  const int64_t unit_slices_, units_, segments_;
  const WeightRows<S> qkv_weight_, out_weight_;
  const Buffer<T> vectors_, statistics_;
  const Buffer<Partial<T>> partials_;
  const Buffer<T> partial_pooled_;
  const Buffer<Softmax<T>> softmax_;
  const Buffer<T> tiles_;
  PoolOperands<S> pool_;
};

template <typename S>
void run_forward(const AttentionForward& op, const ParallelFor& parallel) {
  if (op.grid.batch == 0) return;
  if (op.activation == Activation::kRelu) {
    AttentionForwardPass<S, Activation::kRelu>(op, parallel).run();
  } else {
    AttentionForwardPass<S, Activation::kIdentity>(op, parallel).run();
  }
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
