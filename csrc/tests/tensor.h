// Strided tensors of any storage type in watched memory.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../kernels/kernels.h"
#include "memory.h"

namespace sep_attn::tests {

enum class Type { kFloat32, kFloat64, kBFloat16, kFloat16, kBool };

constexpr Type kFloatingTypes[] = {Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16};

const char* name_of(Type type);
DType kernel_type(Type type);
// The type of sums, softmax weights and statistics.
Type accumulation(Type type);
// The value as it can be stored.
double rounded(Type type, double value);
// The distance from 1 to the next larger value, halved: the error of one rounding.
double rounding_error(Type type);

using Sizes = std::vector<int64_t>;
using Values = std::vector<double>;  // of a tensor, the last dimension the fastest

// How a tensor lies in memory.
struct Layout {
  const char* name;
  std::vector<int> order;  // dimensions from the outermost to the innermost
  int64_t step = 1;        // of the innermost dimension
  int64_t gap = 0;         // unused elements after each run of the innermost dimension
  int expanded = 0;        // dimensions in front that have stride 0: all images are one
};

Layout contiguous(std::size_t rank);

class Tensor {
 public:
  // Results start as NaN, so that a value left unwritten shows.
  static Tensor result(Type type, const Sizes& sizes, const Layout& layout, Edge edge);
  // Inputs may not be written to; what lies between their elements is NaN.
  static Tensor input(Type type, const Sizes& sizes, const Layout& layout, Edge edge,
                      const Values& values);

  Type type() const { return type_; }
  void* data() const { return memory_->data(); }
  int64_t size(int dimension) const { return sizes_[dimension]; }
  int64_t stride(int dimension) const { return strides_[dimension]; }
  Values values() const;
  // Whether what lies between the elements is as it was.
  bool gaps_intact() const;

 private:
  Tensor(Type type, const Sizes& sizes, const Layout& layout, Edge edge);
  std::vector<int64_t> offsets() const;  // of every element, the last dimension the fastest
  unsigned char* element(int64_t offset) const;

  Type type_;
  Sizes sizes_, strides_;
  std::unique_ptr<GuardedMemory> memory_;
};

// The same numbers on every machine, which std's distributions do not promise.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t limit) {
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(limit));
  }
  bool chance(double probability) { return uniform() < probability; }
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  // Of mean 0 and variance 1.
  double normal() {
    double sum = 0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum - 6;
  }
  template <typename Item>
  const Item& pick(const std::vector<Item>& items) {
    return items[below(static_cast<int64_t>(items.size()))];
  }
  Values normals(int64_t count, double scale, Type type);

 private:
  std::mt19937_64 engine_;
};

}  // namespace sep_attn::tests
