// W_V and W_O packed into panels, kept from one call to the next in memory that the caller lends.
// Every call compares a fingerprint of each panel's weights with that of the weights it was packed
// from, so a change of the weights, made in whatever way, is seen; reading the weights costs
// less than packing them, which transposes them.
#pragma once

#include <atomic>
#include <cstring>
#include <type_traits>

#include "bfloat16_products.h"
#include "kernels.h"
#include "products.h"
#include "scratch.h"
#include "simd.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

// Eight rows at a time, a state for each lane of a row's vectors. One changed value always changes
// its lane's state, and rotation and multiplication spread a change over all bits of what follows.
constexpr int kFingerprintRows = 8;
constexpr int64_t kFingerprintBytes = kFingerprintRows * kVectorBytes;

inline void fingerprint(const void* rows, int64_t stride_bytes, int64_t count, int64_t row_bytes,
                        void* result) {
  typedef uint32_t State __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
  State states[kFingerprintRows];
  SEP_ATTN_UNROLL
  for (int i = 0; i < kFingerprintRows; ++i) states[i] = State{} + 0x9e3779b9u * (i + 1);
  const auto mix = [](State& state, State bits) {
    state ^= bits;
    state = ((state << 15) | (state >> 17)) * 0x2c1b3c6du;
  };
  const int64_t whole = row_bytes / kVectorBytes * kVectorBytes;
  for (int64_t row = 0; row < count; row += kFingerprintRows) {
    const char* at[kFingerprintRows];
    SEP_ATTN_UNROLL
    for (int i = 0; i < kFingerprintRows; ++i) {
      at[i] = static_cast<const char*>(rows) + smaller(row + i, count - 1) * stride_bytes;
    }
    for (int64_t byte = 0; byte < whole; byte += kVectorBytes) {
      SEP_ATTN_UNROLL
      for (int i = 0; i < kFingerprintRows; ++i) {
        mix(states[i], *reinterpret_cast<const Bits*>(at[i] + byte));
      }
    }
    if (whole == row_bytes) continue;
    SEP_ATTN_UNROLL
    for (int i = 0; i < kFingerprintRows; ++i) {
      State bits{};
      std::memcpy(&bits, at[i] + whole, static_cast<std::size_t>(row_bytes - whole));
      mix(states[i], bits);
    }
  }
  std::memcpy(result, states, sizeof(states));
}

template <typename S>
class PackedWeights {
  using P = typename OperandTypes<S>::Type;

  struct Header {
    std::atomic<uint32_t> in_use;  // 0 in memory that was never used
    uint32_t layout;               // what the panels were packed for: instruction set, type,
    int64_t channels;              // and width
  };

 public:
  static constexpr int64_t kHeaderBytes = 64;
  static int64_t panel_size(int64_t channels) {
    return product_depth<S>(channels) * kPanelWidth<P>;
  }
  static int64_t bytes(int64_t channels) {
    return kHeaderBytes +
           2 * panels_in<P>(channels) *
               (kFingerprintBytes + panel_size(channels) * static_cast<int64_t>(sizeof(P)));
  }

  // `memory` (null: none) is used when it is large enough and no other call is using it.
  PackedWeights(void* memory, int64_t memory_bytes, const WeightRows<S>& qkv_weight,
                const WeightRows<S>& out_weight, int64_t channels)
      : qkv_weight_(qkv_weight),
        out_weight_(out_weight),
        channels_(channels),
        panels_(panels_in<P>(channels)),
        header_(acquire(memory, memory_bytes)),
        own_(header_ == nullptr ? 2 * panels_ * panel_size(channels) : 0) {
    if (header_ == nullptr) {
      data_ = own_.get();
      return;
    }
    fingerprints_ = reinterpret_cast<char*>(header_) + kHeaderBytes;
    data_ = reinterpret_cast<P*>(fingerprints_ + 2 * panels_ * kFingerprintBytes);
    constexpr uint32_t bfloat16 = std::is_same<S, BFloat16>::value;  // as large as Float16
    constexpr uint32_t layout = bfloat16 << 31 | OperandTypes<S>::kElements << 28 |
                                kPanelWidth<P> << 16 | kVectorBytes << 8 | sizeof(S);
    fresh_ = header_->layout != layout || header_->channels != channels_;
    header_->layout = layout;
    header_->channels = channels_;
  }
  ~PackedWeights() {
    if (header_ != nullptr) header_->in_use.store(0, std::memory_order_release);
  }
  PackedWeights(const PackedWeights&) = delete;
  PackedWeights& operator=(const PackedWeights&) = delete;

  // There are `count()` pieces of work; the panels can be used when all are done.
  int64_t count() const { return 2 * panels_; }
  void prepare(int64_t index) const {
    const int64_t first = index % panels_ * kPanelWidth<P>;
    const bool value = index < panels_;
    const S* rows = (value ? qkv_weight_.row(1 + channels_) : out_weight_.row(0));
    const int64_t stride = value ? qkv_weight_.stride() : out_weight_.stride();
    if (header_ != nullptr) {
      alignas(64) char now[kFingerprintBytes];
      fingerprint(rows + first * stride, stride * static_cast<int64_t>(sizeof(S)),
                  smaller(kPanelWidth<P>, channels_ - first),
                  channels_ * static_cast<int64_t>(sizeof(S)), now);
      char* kept = fingerprints_ + index * kFingerprintBytes;
      if (!fresh_ && std::memcmp(now, kept, kFingerprintBytes) == 0) return;
      std::memcpy(kept, now, kFingerprintBytes);
    }
    pack_panel(rows, int64_t{1}, stride, channels_, channels_, first,
               data_ + index * panel_size(channels_));
  }

  Panels<P> value() const { return {data_, panel_size(channels_), kPanelWidth<P>}; }
  Panels<P> out() const {
    return {data_ + panels_ * panel_size(channels_), panel_size(channels_), kPanelWidth<P>};
  }

 private:
  Header* acquire(void* memory, int64_t memory_bytes) const {
    if (memory == nullptr || memory_bytes < bytes(channels_)) return nullptr;
    Header* header = static_cast<Header*>(memory);
    return header->in_use.exchange(1, std::memory_order_acquire) == 0 ? header : nullptr;
  }

  const WeightRows<S>&qkv_weight_, &out_weight_;
  const int64_t channels_, panels_;
  Header* const header_;
  const Buffer<P> own_;
  char* fingerprints_ = nullptr;
  P* data_;
  bool fresh_ = false;
};

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
