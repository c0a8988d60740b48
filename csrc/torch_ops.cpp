// The operators of sep_attn on CPU tensors: reads tensors through LibTorch's stable ABI, allocates
// results, hands raw pointers and strides to dispatch. Schemas are in sep_attn/ops.py.
#include "torch_ops.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "dispatch.h"

// TORCH_BOX's own conversion of a string allocates one and never frees it.
namespace torch::stable::detail {
template <>
struct ToImpl<sep_attn::Activation> {
  static sep_attn::Activation call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    const char* name = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &name));
    const bool relu = std::strcmp(name, "relu") == 0;
    const bool known = relu || std::strcmp(name, "identity") == 0;
    const std::string given = known ? "" : name;
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    if (!known) {
      throw std::invalid_argument("activation '" + given + "' is neither 'relu' nor 'identity'");
    }
    return relu ? sep_attn::Activation::kRelu : sep_attn::Activation::kIdentity;
  }
};
}  // namespace torch::stable::detail

namespace sep_attn {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int kMaxRank = 4;

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i > 0 ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

[[noreturn]] void fail(const char* name, const std::string& given, const std::string& expected) {
  throw std::invalid_argument(std::string(name) + " is " + given + "; the native kernel expected " +
                              expected);
}

// ---- Types ----

int32_t type_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

int32_t type_code(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return aoti_torch_dtype_float32();
    case DType::kFloat64:
      return aoti_torch_dtype_float64();
    case DType::kBFloat16:
      return aoti_torch_dtype_bfloat16();
    case DType::kFloat16:
      return aoti_torch_dtype_float16();
  }
  throw std::logic_error("unknown DType");
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  throw std::logic_error("unknown DType");
}

std::string type_given(const Tensor& tensor) {
  return std::string("of type ") + toString(tensor.scalar_type());
}

DType dtype_of(const Tensor& tensor, const char* name) {
  const int32_t code = type_code(tensor);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64}) {
    if (code == type_code(dtype)) return dtype;
  }
  fail(name, type_given(tensor), "float32, float64, bfloat16 and float16");
}

// The type of sums, softmax weights and statistics.
DType accumulation(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

void expect_dtype(const Tensor& tensor, DType dtype, const char* name) {
  if (type_code(tensor) != type_code(dtype)) fail(name, type_given(tensor), name_of(dtype));
}

// ---- Views ----

TokenGrid token_grid(const Tensor& tensor, int64_t patch_h, int64_t patch_w, const char* name) {
  const auto size = tensor.sizes();
  const auto stride = tensor.strides();
  TokenGrid grid;
  if (size.size() == 3) {
    grid = {size[0],   1,         size[1], size[2], stride[0], size[1] * stride[1],
            stride[1], stride[2], patch_h, patch_w};
  } else if (size.size() == 4) {
    grid = {size[0],   size[2],   size[3],   size[1], stride[0],
            stride[2], stride[3], stride[1], patch_h, patch_w};
  } else {
    fail(name, shape_of(tensor), "[B, N, D] or [B, D, H, W]");
  }
  if (patch_h < 1 || patch_w < 1 || grid.height % patch_h != 0 || grid.width % patch_w != 0) {
    fail(name, shape_of(tensor),
         "a height and width that are multiples of the patch (" + std::to_string(patch_h) + ", " +
             std::to_string(patch_w) + ")");
  }
  return grid;
}

// The same tokens and channels as `like`, in a tensor's own strides.
TokenGrid token_grid(const Tensor& tensor, const TokenGrid& like, const char* name) {
  const TokenGrid grid = token_grid(tensor, like.patch_h, like.patch_w, name);
  if (grid.batch != like.batch || grid.height != like.height || grid.width != like.width ||
      grid.channels != like.channels) {
    fail(name, shape_of(tensor), "the same shape as its counterpart");
  }
  return grid;
}

template <typename Data>
TokenValues<Data> token_values(const Tensor& tensor, const TokenGrid& grid, const char* name) {
  const auto size = tensor.sizes();
  const auto stride = tensor.strides();
  Data* data = static_cast<Data*>(tensor.const_data_ptr());
  if (size.size() == 2 && size[0] == grid.batch && grid.height == 1 && size[1] == grid.width) {
    return {data, stride[0], size[1] * stride[1], stride[1]};
  }
  if (size.size() == 3 && size[0] == grid.batch && size[1] == grid.height &&
      size[2] == grid.width) {
    return {data, stride[0], stride[1], stride[2]};
  }
  fail(name, shape_of(tensor),
       "one value a token: [B, N] or [B, H, W] with B, H, W = " + std::to_string(grid.batch) +
           ", " + std::to_string(grid.height) + ", " + std::to_string(grid.width));
}

TokenValues<const void> token_values(const OptionalTensor& tensor, const TokenGrid& grid,
                                     DType dtype, const char* name) {
  if (!tensor.has_value()) return {nullptr, 0, 0, 0};
  expect_dtype(*tensor, dtype, name);
  return token_values<const void>(*tensor, grid, name);
}

TokenValues<const bool> token_mask(const OptionalTensor& tensor, const TokenGrid& grid,
                                   const char* name) {
  if (!tensor.has_value()) return {nullptr, 0, 0, 0};
  if (type_code(*tensor) != aoti_torch_dtype_bool()) fail(name, type_given(*tensor), "bool");
  return token_values<const bool>(*tensor, grid, name);
}

// [rows, columns], or the weights [rows, columns, 1, 1] of a convolution.
Matrix matrix(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  const auto size = tensor.sizes();
  const bool convolution = size.size() == 4 && size[2] == 1 && size[3] == 1;
  if ((size.size() != 2 && !convolution) || size[0] != rows || size[1] != columns) {
    fail(name, shape_of(tensor), "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
  }
  const auto stride = tensor.strides();
  return {tensor.const_data_ptr(), stride[0], stride[1]};
}

Vector vector(const OptionalTensor& tensor, DType dtype, int64_t length, const char* name) {
  if (!tensor.has_value()) return {nullptr, 0};
  const auto size = tensor->sizes();
  if (size.size() != 1 || size[0] != length) {
    fail(name, shape_of(*tensor), "[" + std::to_string(length) + "]");
  }
  expect_dtype(*tensor, dtype, name);
  return {tensor->const_data_ptr(), tensor->strides()[0]};
}

// Contiguous data the package itself has saved.
const void* saved(const Tensor& tensor, DType dtype, int64_t elements, const char* name) {
  expect_dtype(tensor, dtype, name);
  if (tensor.numel() != elements || !tensor.is_contiguous()) {
    fail(name, shape_of(tensor), std::to_string(elements) + " contiguous values");
  }
  return tensor.const_data_ptr();
}

// ---- Results ----

std::atomic<bool> poisoned{false};

// From 32 MiB on, glibc maps a block anew for every result. Its pages cost more to fault in, one of
// 4 KiB after the other, than the layer takes to compute; large pages a third of that.
void ask_for_large_pages([[maybe_unused]] const Tensor& result) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::size_t kMapped = std::size_t{32} << 20, kPage = std::size_t{2} << 20;
  const std::size_t bytes = result.numel() * result.element_size();
  if (bytes < kMapped) return;
  const auto data = reinterpret_cast<std::uintptr_t>(result.const_data_ptr());
  const std::uintptr_t begin = (data + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (data + bytes) / kPage * kPage;
  // Advice only: where the system has no such pages, nothing changes.
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Allocates without the dispatcher, which costs more than a small kernel.
Tensor new_strided(const int64_t* sizes, const int64_t* strides, int64_t rank, int32_t type) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, sizes, strides, type,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor result(handle);
  ask_for_large_pages(result);
  if (poisoned.load(std::memory_order_relaxed) && result.numel() > 0) {
    std::memset(result.mutable_data_ptr(), 0xff, result.numel() * result.element_size());
  }
  return result;
}

template <size_t Rank>
Tensor new_tensor(const std::array<int64_t, Rank>& sizes, DType dtype) {
  std::array<int64_t, Rank> strides;
  int64_t stride = 1;
  for (size_t i = Rank; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return new_strided(sizes.data(), strides.data(), Rank, type_code(dtype));
}

bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto size = tensor.sizes();
  const auto stride = tensor.strides();
  std::array<int, kMaxRank> order;  // dimensions of more than one element, by stride
  int count = 0;
  for (int dim = 0; dim < static_cast<int>(size.size()); ++dim) {
    if (size[dim] < 2) continue;
    int place = count++;
    for (; place > 0 && stride[order[place - 1]] > stride[dim]; --place) {
      order[place] = order[place - 1];
    }
    order[place] = dim;
  }
  int64_t expected = 1;
  for (int i = 0; i < count; ++i) {
    if (stride[order[i]] != expected) return false;
    expected *= size[order[i]];
  }
  return true;
}

// torch.empty_like: a dense tensor's strides are kept. Rank 3 or 4.
Tensor new_like(const Tensor& tensor) {
  if (!is_dense(tensor)) return torch::stable::empty_like(tensor);  // rare: infers the strides
  return new_strided(tensor.sizes().data(), tensor.strides().data(), tensor.dim(),
                     type_code(tensor));
}

// One value a token, contiguous: [B, N] for rank 3, [B, H, W] for rank 4.
Tensor new_tokens(const Tensor& tensor, const TokenGrid& grid, DType dtype) {
  if (tensor.dim() == 3) return new_tensor<2>({grid.batch, grid.width}, dtype);
  return new_tensor<3>({grid.batch, grid.height, grid.width}, dtype);
}

Tensor absent(DType dtype) { return new_tensor<1>({0}, dtype); }

int64_t token_count(const TokenGrid& grid) { return grid.batch * grid.height * grid.width; }

// ---- Threads ----

// torch's own pool: it runs inline inside another parallel region, and carries exceptions out.
void run_tasks(int64_t tasks, void (*body)(void* context, int64_t task), void* context) {
  if (tasks == 1) return body(context, 0);
  torch::stable::parallel_for(0, tasks, 1, [body, context](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(context, task);
  });
}

void run_tasks_inline(int64_t tasks, void (*body)(void* context, int64_t task), void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}

ParallelFor parallel_for() {
  const int64_t threads = torch::stable::get_num_threads();
  return {threads, threads == 1 ? run_tasks_inline : run_tasks};
}

// ---- Operators ----

std::tuple<Tensor, Tensor, Tensor> context_pool(const Tensor& x, const Tensor& scores,
                                                const OptionalTensor& key_padding_mask,
                                                const OptionalTensor& dropout_scale,
                                                int64_t patch_h, int64_t patch_w) {
  ContextPoolForward arguments;
  const DType dtype = dtype_of(x, "x");
  const DType acc = accumulation(dtype);
  const TokenGrid grid = token_grid(x, patch_h, patch_w, "x");
  Tensor pooled = new_tensor<2>({grid.slices(), grid.channels}, acc);
  Tensor weight_sum = new_tensor<1>({grid.slices()}, acc);
  Tensor weights = new_tokens(x, grid, acc);

  arguments.dtype = dtype;
  arguments.grid = grid;
  arguments.x = x.const_data_ptr();
  arguments.scores_dtype = dtype_of(scores, "scores");
  arguments.scores = token_values<const void>(scores, grid, "scores");
  arguments.key_padding_mask = token_mask(key_padding_mask, grid, "key_padding_mask");
  arguments.dropout_scale = token_values(dropout_scale, grid, acc, "dropout_scale");
  arguments.pooled = pooled.mutable_data_ptr();
  arguments.weight_sum = weight_sum.mutable_data_ptr();
  arguments.weights = weights.mutable_data_ptr();
  context_pool_forward(arguments, parallel_for());
  return {std::move(pooled), std::move(weight_sum), std::move(weights)};
}

std::tuple<Tensor, Tensor> context_pool_grad(const Tensor& grad_pooled,
                                             const OptionalTensor& grad_weight_sum,
                                             const OptionalTensor& grad_weights, const Tensor& x,
                                             const Tensor& pooled, const Tensor& weight_sum,
                                             const Tensor& weights,
                                             const OptionalTensor& dropout_scale, int64_t patch_h,
                                             int64_t patch_w) {
  ContextPoolBackward arguments;
  const DType dtype = dtype_of(x, "x");
  const DType acc = accumulation(dtype);
  const TokenGrid grid = token_grid(x, patch_h, patch_w, "x");
  Tensor grad_x = new_like(x);
  Tensor grad_scores = new_tokens(x, grid, acc);
  expect_dtype(grad_pooled, acc, "grad_pooled");

  arguments.dtype = dtype;
  arguments.grid = grid;
  arguments.grad_grid = token_grid(grad_x, grid, "grad_x");
  arguments.x = x.const_data_ptr();
  arguments.grad_x = grad_x.mutable_data_ptr();
  arguments.grad_pooled = matrix(grad_pooled, grid.slices(), grid.channels, "grad_pooled");
  arguments.grad_weight_sum = vector(grad_weight_sum, acc, grid.slices(), "grad_weight_sum");
  arguments.grad_weights = token_values(grad_weights, grid, acc, "grad_weights");
  arguments.dropout_scale = token_values(dropout_scale, grid, acc, "dropout_scale");
  arguments.pooled = saved(pooled, acc, grid.slices() * grid.channels, "pooled");
  arguments.weight_sum = saved(weight_sum, acc, grid.slices(), "weight_sum");
  arguments.weights = saved(weights, acc, token_count(grid), "weights");
  arguments.grad_scores = grad_scores.mutable_data_ptr();
  context_pool_backward(arguments, parallel_for());
  return {std::move(grad_x), std::move(grad_scores)};
}

Tensor gate(const Tensor& v, const Tensor& context, Activation activation, int64_t patch_h,
            int64_t patch_w) {
  GateForward arguments;
  const TokenGrid grid = token_grid(v, patch_h, patch_w, "v");
  Tensor y = new_like(v);

  arguments.dtype = dtype_of(v, "v");
  arguments.v_grid = grid;
  arguments.y_grid = token_grid(y, grid, "y");
  arguments.v = v.const_data_ptr();
  arguments.y = y.mutable_data_ptr();
  arguments.context_dtype = dtype_of(context, "context");
  arguments.context = matrix(context, grid.slices(), grid.channels, "context");
  arguments.activation = activation;
  gate_forward(arguments, parallel_for());
  return y;
}

std::tuple<Tensor, Tensor> gate_grad(const Tensor& grad_y, const Tensor& v, const Tensor& context,
                                     Activation activation, int64_t patch_h, int64_t patch_w) {
  GateBackward arguments;
  const DType dtype = dtype_of(v, "v");
  const TokenGrid grid = token_grid(v, patch_h, patch_w, "v");
  Tensor grad_v = new_like(v);
  Tensor grad_context = new_tensor<2>({grid.slices(), grid.channels}, accumulation(dtype));
  expect_dtype(grad_y, dtype, "grad_y");

  arguments.dtype = dtype;
  arguments.grad_y_grid = token_grid(grad_y, grid, "grad_y");
  arguments.v_grid = grid;
  arguments.grad_v_grid = token_grid(grad_v, grid, "grad_v");
  arguments.grad_y = grad_y.const_data_ptr();
  arguments.v = v.const_data_ptr();
  arguments.grad_v = grad_v.mutable_data_ptr();
  arguments.context_dtype = dtype_of(context, "context");
  arguments.context = matrix(context, grid.slices(), grid.channels, "context");
  arguments.grad_context = grad_context.mutable_data_ptr();
  arguments.activation = activation;
  gate_backward(arguments, parallel_for());
  return {std::move(grad_v), std::move(grad_context)};
}

// Same slices and channels; the number of tokens may differ.
void expect_slices(const TokenGrid& grid, const TokenGrid& prev_grid, const Tensor& x_prev) {
  if (prev_grid.batch != grid.batch || prev_grid.channels != grid.channels) {
    fail("x_prev", shape_of(x_prev), "x's batch and channels");
  }
}

// What every form of the forward pass takes; results are left for the caller.
AttentionForward attention_arguments(const Tensor& x, const OptionalTensor& x_prev,
                                     const Tensor& qkv_weight, const OptionalTensor& qkv_bias,
                                     const Tensor& out_weight, const OptionalTensor& out_bias,
                                     const OptionalTensor& key_padding_mask,
                                     const OptionalTensor& dropout_scale, Activation activation,
                                     int64_t patch_h, int64_t patch_w) {
  AttentionForward arguments{};
  const Tensor& keys = x_prev.has_value() ? *x_prev : x;
  const DType dtype = dtype_of(x, "x");
  const TokenGrid grid = token_grid(x, patch_h, patch_w, "x");
  const TokenGrid prev_grid =
      x_prev.has_value() ? token_grid(keys, patch_h, patch_w, "x_prev") : grid;
  expect_slices(grid, prev_grid, keys);
  expect_dtype(keys, dtype, "x_prev");
  expect_dtype(qkv_weight, dtype, "qkv_weight");
  expect_dtype(out_weight, dtype, "out_weight");
  const int64_t channels = grid.channels;

  arguments.dtype = dtype;
  arguments.grid = grid;
  arguments.prev_grid = prev_grid;
  arguments.x = x.const_data_ptr();
  arguments.x_prev = keys.const_data_ptr();
  arguments.qkv_weight = matrix(qkv_weight, 1 + 2 * channels, channels, "qkv_weight");
  arguments.qkv_bias = vector(qkv_bias, dtype, 1 + 2 * channels, "qkv_bias");
  arguments.out_weight = matrix(out_weight, channels, channels, "out_weight");
  arguments.out_bias = vector(out_bias, dtype, channels, "out_bias");
  arguments.key_padding_mask = token_mask(key_padding_mask, prev_grid, "key_padding_mask");
  arguments.dropout_scale =
      token_values(dropout_scale, prev_grid, accumulation(dtype), "dropout_scale");
  arguments.activation = activation;
  return arguments;
}

Tensor run_attention(AttentionForward& arguments, const Tensor& x) {
  Tensor out = new_like(x);
  arguments.out_grid = token_grid(out, arguments.grid, "out");
  arguments.out = out.mutable_data_ptr();
  separable_attention_forward(arguments, parallel_for());
  return out;
}

// Whether the forward pass keeps the values for the backward pass, which else computes them again.
bool keeps_values(DType dtype, int64_t channels) {
  return dtype == accumulation(dtype) && channels % 16 == 0;
}

// Kept values say themselves how they lie, whatever becomes of x's strides before the backward
// pass: kValuesHeader elements, of which the first is 1 where they are on the lanes, then the
// values.
constexpr int64_t kValuesHeader = 16;

int64_t kept_rows(const TokenGrid& grid) {
  return (token_count(grid) + kValuesWidth - 1) / kValuesWidth * kValuesWidth;
}
int64_t kept_elements(const TokenGrid& grid) {
  return kValuesHeader + kept_rows(grid) * grid.channels;
}

void* after_header(void* data, DType dtype) {
  const int64_t bytes = kValuesHeader * (dtype == DType::kFloat64 ? 8 : 4);
  return static_cast<char*>(data) + bytes;
}

// Writes the header, and zeros where there is no token.
template <typename T>
void finish_values(const TokenGrid& grid, void* data) {
  T* header = static_cast<T*>(data);
  T* values = header + kValuesHeader;
  const bool on_lanes = values_on_lanes(grid);
  std::fill(header, values, T{0});
  header[0] = on_lanes ? 1 : 0;
  const int64_t tokens = token_count(grid), rows = kept_rows(grid);
  if (rows == tokens) return;
  if (!on_lanes) {
    std::fill(values + tokens * grid.channels, values + rows * grid.channels, T{0});
    return;
  }
  T* panel = values + (rows - kValuesWidth) * grid.channels;
  for (int64_t row = 0; row < grid.channels; ++row) {
    T* lanes = panel + row * kValuesWidth;
    std::fill(lanes + tokens % kValuesWidth, lanes + kValuesWidth, T{0});
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> separable_attention(
    const Tensor& x, const OptionalTensor& x_prev, const Tensor& qkv_weight,
    const OptionalTensor& qkv_bias, const Tensor& out_weight, const OptionalTensor& out_bias,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_scale,
    Activation activation, int64_t patch_h, int64_t patch_w, bool for_backward) {
  AttentionForward arguments =
      attention_arguments(x, x_prev, qkv_weight, qkv_bias, out_weight, out_bias, key_padding_mask,
                          dropout_scale, activation, patch_h, patch_w);
  const DType acc = accumulation(arguments.dtype);
  const TokenGrid& grid = arguments.grid;
  Tensor weights = new_tokens(x_prev.has_value() ? *x_prev : x, arguments.prev_grid, acc);
  Tensor statistics = new_tensor<2>({grid.slices(), 2 * grid.channels + 1}, acc);
  const bool keep = for_backward && keeps_values(arguments.dtype, grid.channels);
  Tensor values = keep ? new_tensor<1>({kept_elements(grid)}, acc) : absent(acc);
  if (keep) arguments.values = after_header(values.mutable_data_ptr(), acc);
  arguments.weights = weights.mutable_data_ptr();
  arguments.statistics = statistics.mutable_data_ptr();
  Tensor out = run_attention(arguments, x);
  if (keep && acc == DType::kFloat64) finish_values<double>(grid, values.mutable_data_ptr());
  if (keep && acc == DType::kFloat32) finish_values<float>(grid, values.mutable_data_ptr());
  return {std::move(out), std::move(weights), std::move(statistics), std::move(values)};
}

Tensor separable_attention_inference(const Tensor& x, const OptionalTensor& x_prev,
                                     const Tensor& qkv_weight, const OptionalTensor& qkv_bias,
                                     const Tensor& out_weight, const OptionalTensor& out_bias,
                                     const OptionalTensor& key_padding_mask,
                                     const OptionalTensor& dropout_scale, Activation activation,
                                     int64_t patch_h, int64_t patch_w) {
  AttentionForward arguments =
      attention_arguments(x, x_prev, qkv_weight, qkv_bias, out_weight, out_bias, key_padding_mask,
                          dropout_scale, activation, patch_h, patch_w);
  return run_attention(arguments, x);
}

// The shortest way: self-attention in a layout that needs no patch size but patch_h and patch_w (0
// where there is none), with packed weights kept in memory of the caller's.
Tensor separable_attention_packed(const Tensor& x, const Tensor& qkv_weight,
                                  const OptionalTensor& qkv_bias, const Tensor& out_weight,
                                  const OptionalTensor& out_bias, const Tensor& packed_weights,
                                  bool relu, int64_t patch_h, int64_t patch_w) {
  const Activation activation = relu ? Activation::kRelu : Activation::kIdentity;
  const bool patches = patch_h > 0;
  if (patches && x.dim() == 3) fail("x", shape_of(x), "[B, D, H, W] with patch_size");
  if (!patches) patch_h = x.dim() == 4 ? std::max<int64_t>(1, x.size(2)) : 1;
  AttentionForward arguments =
      attention_arguments(x, {}, qkv_weight, qkv_bias, out_weight, out_bias, {}, {}, activation,
                          patch_h, patches ? patch_w : 1);
  if (arguments.grid.height * arguments.grid.width == 0) fail("x", shape_of(x), "tokens");
  if (!packed_weights.is_contiguous()) fail("packed_weights", "strided", "contiguous memory");
  arguments.packed_weights = packed_weights.mutable_data_ptr();
  arguments.packed_weights_bytes = packed_weights.numel() * packed_weights.element_size();
  return run_attention(arguments, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> separable_attention_grad(
    const Tensor& grad_out, const OptionalTensor& grad_weights, const Tensor& x,
    const OptionalTensor& x_prev, const Tensor& qkv_weight, const OptionalTensor& qkv_bias,
    const Tensor& out_weight, const OptionalTensor& dropout_scale, const Tensor& weights,
    const Tensor& statistics, const Tensor& values, Activation activation, int64_t patch_h,
    int64_t patch_w, bool need_input_grad, bool need_weight_grad) {
  AttentionBackward arguments{};
  const Tensor& keys = x_prev.has_value() ? *x_prev : x;
  const DType dtype = dtype_of(x, "x");
  const DType acc = accumulation(dtype);
  const TokenGrid grid = token_grid(x, patch_h, patch_w, "x");
  const TokenGrid prev_grid =
      x_prev.has_value() ? token_grid(keys, patch_h, patch_w, "x_prev") : grid;
  expect_slices(grid, prev_grid, keys);
  expect_dtype(keys, dtype, "x_prev");
  expect_dtype(qkv_weight, dtype, "qkv_weight");
  expect_dtype(out_weight, dtype, "out_weight");
  expect_dtype(grad_out, dtype, "grad_out");
  const int64_t channels = grid.channels;
  const bool need_prev_grad = need_input_grad && x_prev.has_value();
  Tensor grad_x = need_input_grad ? new_like(x) : absent(dtype);
  Tensor grad_x_prev = need_prev_grad ? new_like(keys) : absent(dtype);
  Tensor grad_qkv_weight =
      need_weight_grad ? new_tensor<2>({1 + 2 * channels, channels}, dtype) : absent(dtype);
  Tensor grad_qkv_bias =
      need_weight_grad ? new_tensor<1>({1 + 2 * channels}, dtype) : absent(dtype);
  Tensor grad_out_weight =
      need_weight_grad ? new_tensor<2>({channels, channels}, dtype) : absent(dtype);
  Tensor grad_out_bias = need_weight_grad ? new_tensor<1>({channels}, dtype) : absent(dtype);
  const auto wanted = [](bool want, const Tensor& tensor) {
    return want ? tensor.mutable_data_ptr() : nullptr;
  };

  arguments.dtype = dtype;
  arguments.grad_out_grid = token_grid(grad_out, grid, "grad_out");
  arguments.grid = grid;
  arguments.prev_grid = prev_grid;
  arguments.grad_x_grid = need_input_grad ? token_grid(grad_x, grid, "grad_x") : grid;
  arguments.grad_prev_grid =
      need_prev_grad ? token_grid(grad_x_prev, prev_grid, "grad_x_prev") : prev_grid;
  arguments.grad_out = grad_out.const_data_ptr();
  arguments.x = x.const_data_ptr();
  arguments.x_prev = keys.const_data_ptr();
  arguments.qkv_weight = matrix(qkv_weight, 1 + 2 * channels, channels, "qkv_weight");
  arguments.qkv_bias = vector(qkv_bias, dtype, 1 + 2 * channels, "qkv_bias");
  arguments.out_weight = matrix(out_weight, channels, channels, "out_weight");
  arguments.grad_weights = token_values(grad_weights, prev_grid, acc, "grad_weights");
  arguments.dropout_scale = token_values(dropout_scale, prev_grid, acc, "dropout_scale");
  arguments.weights = saved(weights, acc, token_count(prev_grid), "weights");
  arguments.statistics = saved(statistics, acc, grid.slices() * (2 * channels + 1), "statistics");
  if (values.numel() > 0) {
    const void* kept = saved(values, acc, kept_elements(grid), "values");
    arguments.values = after_header(const_cast<void*>(kept), acc);
    arguments.values_on_lanes = acc == DType::kFloat64 ? *static_cast<const double*>(kept) != 0
                                                       : *static_cast<const float*>(kept) != 0;
  }
  arguments.activation = activation;
  arguments.grad_x = wanted(need_input_grad, grad_x);
  arguments.grad_x_prev = wanted(need_prev_grad, grad_x_prev);
  arguments.grad_qkv_weight = wanted(need_weight_grad, grad_qkv_weight);
  arguments.grad_qkv_bias = wanted(need_weight_grad, grad_qkv_bias);
  arguments.grad_out_weight = wanted(need_weight_grad, grad_out_weight);
  arguments.grad_out_bias = wanted(need_weight_grad, grad_out_bias);
  separable_attention_backward(arguments, parallel_for());
  return {std::move(grad_x),        std::move(grad_x_prev),     std::move(grad_qkv_weight),
          std::move(grad_qkv_bias), std::move(grad_out_weight), std::move(grad_out_bias)};
}

STABLE_TORCH_LIBRARY_IMPL(sep_attn, CPU, m) {
  m.impl("context_pool_native", TORCH_BOX(&context_pool));
  m.impl("context_pool_backward_native", TORCH_BOX(&context_pool_grad));
  m.impl("gate_native", TORCH_BOX(&gate));
  m.impl("gate_backward_native", TORCH_BOX(&gate_grad));
  m.impl("separable_attention_native", TORCH_BOX(&separable_attention));
  m.impl("separable_attention_inference_native", TORCH_BOX(&separable_attention_inference));
  m.impl("separable_attention_packed_native", TORCH_BOX(&separable_attention_packed));
  m.impl("separable_attention_backward_native", TORCH_BOX(&separable_attention_grad));
}

}  // namespace

DType dtype_named(const std::string& name) {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64}) {
    if (name == name_of(dtype)) return dtype;
  }
  fail("dtype", "'" + name + "'", "float32, float64, bfloat16 or float16");
}

void poison_results(bool enabled) { poisoned.store(enabled, std::memory_order_relaxed); }

}  // namespace sep_attn
