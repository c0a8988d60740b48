// Scratch memory of a call, and how a number of items is shared out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "simd.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

// A stack of memory that a calling thread keeps from one call to the next: fresh pages cost more to
// fault in than a small layer takes to compute. Never larger than kKept.
class ScratchStack {
 public:
  ~ScratchStack() { release(base_); }

  // Memory on a boundary of 64 bytes, or null when it does not fit.
  void* push(std::size_t bytes) {
    wanted_ = used_ + bytes > wanted_ ? used_ + bytes : wanted_;
    if (used_ == 0 && wanted_ > size_ && wanted_ <= kKept) {
      release(base_);
      size_ = 0;
      base_ = static_cast<char*>(allocate(wanted_));
      size_ = wanted_;
    }
    used_ += bytes;
    return used_ <= size_ ? base_ + used_ - bytes : nullptr;
  }
  void pop(std::size_t bytes) { used_ -= bytes; }

  static void* allocate(std::size_t bytes) {
    return ::operator new(bytes, std::align_val_t{kAlignment});
  }
  static void release(void* memory) { ::operator delete(memory, std::align_val_t{kAlignment}); }

 private:
  static constexpr std::size_t kAlignment = 64;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr std::size_t kKept = 0;  // every array by itself, its ends watched
#else
  static constexpr std::size_t kKept = std::size_t{32} << 20;
#endif
  char* base_ = nullptr;
  std::size_t size_ = 0, used_ = 0, wanted_ = 0;
};

// Used by the thread that makes the call only, and in the order of a stack.
inline ScratchStack& scratch_stack() {
  static thread_local ScratchStack stack;
  return stack;
}

// An uninitialised array that starts on a boundary of 64 bytes.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : bytes_((static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64) {
    void* memory = bytes_ > 0 ? scratch_stack().push(bytes_) : nullptr;
    if (bytes_ > 0 && memory == nullptr) {
      try {
        memory = owned_ = ScratchStack::allocate(bytes_);
      } catch (...) {
        scratch_stack().pop(bytes_);
        throw;
      }
    }
    data_ = static_cast<T*>(memory);
  }
  ~Buffer() {
    if (owned_ != nullptr) ScratchStack::release(owned_);
    if (bytes_ > 0) scratch_stack().pop(bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  std::size_t bytes_;
  void* owned_ = nullptr;
  T* data_;
};

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The half-open share of `total` items that belongs to part `part` of `parts`.
struct Range {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};
constexpr Range share(int64_t total, int64_t part, int64_t parts) {
  return {total * part / parts, total * (part + 1) / parts};
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
