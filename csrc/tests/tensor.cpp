#include "tensor.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace sep_attn::tests {
namespace {

constexpr unsigned char kUnset = 0xff;   // NaN in every floating type
constexpr unsigned char kCanary = 0xa5;  // between the elements of a result

std::size_t size_of(Type type) {
  switch (type) {
    case Type::kFloat32:
      return 4;
    case Type::kFloat64:
      return 8;
    case Type::kBFloat16:
    case Type::kFloat16:
      return 2;
    case Type::kBool:
      return 1;
  }
  return 0;
}

// A 16-bit floating type: bits of the mantissa, and the bias of the exponent.
struct Half {
  int mantissa, bias;
};
constexpr Half kBFloat16Format = {7, 127}, kFloat16Format = {10, 15};

uint16_t encode(Half format, double value) {
  const int exponent_bits = 15 - format.mantissa;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const uint16_t infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << format.mantissa);
  if (std::isnan(value)) return sign | infinity | (1 << (format.mantissa - 1));
  if (std::isinf(value)) return sign | infinity;
  if (value == 0) return sign;
  int exponent = std::ilogb(value);
  if (exponent < 1 - format.bias) exponent = 1 - format.bias;
  // Nearest, ties to even: the default rounding direction.
  const double units = std::nearbyint(std::ldexp(std::fabs(value), format.mantissa - exponent));
  // A carry out of the mantissa raises the exponent; without a leading bit it is subnormal.
  const int64_t bits = (static_cast<int64_t>(exponent + format.bias - 1) << format.mantissa) +
                       static_cast<int64_t>(units);
  return sign | (bits >= infinity ? infinity : static_cast<uint16_t>(bits));
}

double decode(Half format, uint16_t bits) {
  const int exponent_mask = (1 << (15 - format.mantissa)) - 1;
  const int exponent = (bits >> format.mantissa) & exponent_mask;
  const int mantissa = bits & ((1 << format.mantissa) - 1);
  double value;
  if (exponent == exponent_mask) {
    value = mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                          : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - format.bias - format.mantissa);
  } else {
    value = std::ldexp(mantissa + (1 << format.mantissa), exponent - format.bias - format.mantissa);
  }
  return (bits & 0x8000) != 0 ? -value : value;
}

template <typename T>
T read(const unsigned char* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

template <typename T>
void write(unsigned char* at, T value) {
  std::memcpy(at, &value, sizeof(T));
}

double read_as(Type type, const unsigned char* at) {
  switch (type) {
    case Type::kFloat32:
      return static_cast<double>(read<float>(at));
    case Type::kFloat64:
      return read<double>(at);
    case Type::kBFloat16:
      return decode(kBFloat16Format, read<uint16_t>(at));
    case Type::kFloat16:
      return decode(kFloat16Format, read<uint16_t>(at));
    case Type::kBool:
      return *at != 0 ? 1 : 0;
  }
  return 0;
}

void write_as(Type type, unsigned char* at, double value) {
  switch (type) {
    case Type::kFloat32:
      return write(at, static_cast<float>(value));
    case Type::kFloat64:
      return write(at, value);
    case Type::kBFloat16:
      return write(at, encode(kBFloat16Format, value));
    case Type::kFloat16:
      return write(at, encode(kFloat16Format, value));
    case Type::kBool:
      return write<unsigned char>(at, value != 0 ? 1 : 0);
  }
}

}  // namespace

const char* name_of(Type type) {
  const char* names[] = {"float32", "float64", "bfloat16", "float16", "bool"};
  return names[static_cast<int>(type)];
}

DType kernel_type(Type type) {
  const DType types[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  return types[static_cast<int>(type)];
}

Type accumulation(Type type) { return type == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32; }

double rounded(Type type, double value) {
  unsigned char bytes[8];
  write_as(type, bytes, value);
  return read_as(type, bytes);
}

double rounding_error(Type type) {
  switch (type) {
    case Type::kFloat32:
      return 0x1p-24;
    case Type::kFloat64:
      return 0x1p-53;
    case Type::kBFloat16:
      return 0x1p-8;
    case Type::kFloat16:
      return 0x1p-11;
    case Type::kBool:
      return 0;
  }
  return 0;
}

Layout contiguous(std::size_t rank) {
  Layout layout = {"contiguous", {}};
  for (std::size_t i = 0; i < rank; ++i) layout.order.push_back(static_cast<int>(i));
  return layout;
}

Tensor::Tensor(Type type, const Sizes& sizes, const Layout& layout, Edge edge)
    : type_(type), sizes_(sizes), strides_(sizes.size()) {
  int64_t stride = layout.step;
  for (std::size_t i = sizes.size(); i-- > 0;) {
    const int dimension = layout.order[i];
    strides_[dimension] = stride;
    stride *= sizes[dimension];
    if (i + 1 == sizes.size()) stride += layout.gap;
  }
  for (int dimension = 0; dimension < layout.expanded; ++dimension) strides_[dimension] = 0;
  int64_t elements = 1;  // from the first to the last one
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    elements = sizes[i] == 0 || elements == 0 ? 0 : elements + (sizes[i] - 1) * strides_[i];
  }
  memory_ = std::make_unique<GuardedMemory>(elements * size_of(type), size_of(type), edge);
}

Tensor Tensor::result(Type type, const Sizes& sizes, const Layout& layout, Edge edge) {
  Tensor tensor(type, sizes, layout, edge);
  std::memset(tensor.data(), kCanary, tensor.memory_->bytes());
  for (int64_t offset : tensor.offsets()) {
    std::memset(tensor.element(offset), kUnset, size_of(type));
  }
  return tensor;
}

Tensor Tensor::input(Type type, const Sizes& sizes, const Layout& layout, Edge edge,
                     const Values& values) {
  Tensor tensor(type, sizes, layout, edge);
  std::memset(tensor.data(), type == Type::kBool ? 1 : kUnset, tensor.memory_->bytes());
  std::size_t i = 0;
  for (int64_t offset : tensor.offsets()) write_as(type, tensor.element(offset), values[i++]);
  tensor.memory_->forbid_writing();
  return tensor;
}

std::vector<int64_t> Tensor::offsets() const {
  std::vector<int64_t> offsets = {0};
  for (std::size_t i = 0; i < sizes_.size(); ++i) {
    std::vector<int64_t> finer;
    finer.reserve(offsets.size() * sizes_[i]);
    for (int64_t offset : offsets) {
      for (int64_t index = 0; index < sizes_[i]; ++index) {
        finer.push_back(offset + index * strides_[i]);
      }
    }
    offsets = std::move(finer);
  }
  return offsets;
}

unsigned char* Tensor::element(int64_t offset) const {
  return memory_->data() + offset * static_cast<int64_t>(size_of(type_));
}

Values Tensor::values() const {
  Values values;
  for (int64_t offset : offsets()) values.push_back(read_as(type_, element(offset)));
  return values;
}

bool Tensor::gaps_intact() const {
  const std::size_t bytes = memory_->bytes();
  std::vector<bool> in_gap(bytes, true);
  for (int64_t offset : offsets()) {
    for (std::size_t i = 0; i < size_of(type_); ++i) in_gap[offset * size_of(type_) + i] = false;
  }
  for (std::size_t i = 0; i < bytes; ++i) {
    if (in_gap[i] && memory_->data()[i] != kCanary) return false;
  }
  return true;
}

Values Random::normals(int64_t count, double scale, Type type) {
  Values values;
  values.reserve(count);
  for (int64_t i = 0; i < count; ++i) values.push_back(rounded(type, normal() * scale));
  return values;
}

}  // namespace sep_attn::tests
