// Memory whose ends are watched: by pages without access on both sides, or by AddressSanitizer.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SEP_ATTN_SANITIZED
#endif

namespace sep_attn::tests {

// Which end of the tensor touches a page without access. A sanitizer watches both at once; the two
// then differ in alignment only.
enum class Edge { kBefore, kAfter };

class GuardedMemory {
 public:
  GuardedMemory(std::size_t bytes, std::size_t element_size, Edge edge);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  unsigned char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  // Writing is a fault from now on (not under a sanitizer).
  void forbid_writing();

 private:
  std::size_t bytes_, mapped_;
  void* base_;
  unsigned char* data_;
};

}  // namespace sep_attn::tests
