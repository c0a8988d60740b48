#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace sep_attn::tests {

#ifdef SEP_ATTN_SANITIZED

GuardedMemory::GuardedMemory(std::size_t bytes, std::size_t element_size, Edge edge)
    : bytes_(bytes), mapped_(0) {
  const std::size_t shift = edge == Edge::kAfter ? element_size : 0;
  base_ = std::malloc(bytes + shift);
  data_ = static_cast<unsigned char*>(base_) + shift;
}

GuardedMemory::~GuardedMemory() { std::free(base_); }

void GuardedMemory::forbid_writing() {}

#else

namespace {

[[noreturn]] void stop(const char* call) {
  std::perror(call);
  std::exit(2);
}

}  // namespace

GuardedMemory::GuardedMemory(std::size_t bytes, std::size_t, Edge edge) : bytes_(bytes) {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t used = (bytes + page - 1) / page * page;
  mapped_ = used + 2 * page;
  base_ = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base_ == MAP_FAILED) stop("mmap");
  unsigned char* first = static_cast<unsigned char*>(base_) + page;
  if (used > 0 && mprotect(first, used, PROT_READ | PROT_WRITE) != 0) stop("mprotect");
  data_ = edge == Edge::kBefore ? first : first + used - bytes;
}

GuardedMemory::~GuardedMemory() { munmap(base_, mapped_); }

void GuardedMemory::forbid_writing() {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  if (mapped_ == 2 * page) return;
  if (mprotect(static_cast<unsigned char*>(base_) + page, mapped_ - 2 * page, PROT_READ) != 0) {
    stop("mprotect");
  }
}

#endif

}  // namespace sep_attn::tests
