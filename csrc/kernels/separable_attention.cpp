// Separable self-attention in its pooled form, fused: the context is W_K (sum p x) + (sum p) b_K,
// so keys are never formed, and values live only as long as one tile of tokens.
#include "attention_backward.h"
#include "attention_forward.h"
#include "kernels.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {
namespace {

template <typename S>
void run_backward(const AttentionBackward& op, const ParallelFor& parallel) {
  if (op.grid.batch == 0) {
    clear_weight_gradients<S>(op);
  } else if (op.activation == Activation::kRelu) {
    AttentionBackwardPass<S, Activation::kRelu>(op, parallel).run();
  } else {
    AttentionBackwardPass<S, Activation::kIdentity>(op, parallel).run();
  }
}

}  // namespace

void separable_attention_forward(const AttentionForward& op, const ParallelFor& parallel) {
  switch (op.dtype) {
    case DType::kFloat32:
      return run_forward<float>(op, parallel);
    case DType::kFloat64:
      return run_forward<double>(op, parallel);
    case DType::kBFloat16:
      return run_forward<BFloat16>(op, parallel);
    case DType::kFloat16:
      return run_forward<Float16>(op, parallel);
  }
}

void separable_attention_backward(const AttentionBackward& op, const ParallelFor& parallel) {
  switch (op.dtype) {
    case DType::kFloat32:
      return run_backward<float>(op, parallel);
    case DType::kFloat64:
      return run_backward<double>(op, parallel);
    case DType::kBFloat16:
      return run_backward<BFloat16>(op, parallel);
    case DType::kFloat16:
      return run_backward<Float16>(op, parallel);
  }
}

int64_t packed_weights_bytes(DType dtype, int64_t channels) {
  switch (dtype) {
    case DType::kFloat32:
      return PackedWeights<float>::bytes(channels);
    case DType::kFloat64:
      return PackedWeights<double>::bytes(channels);
    case DType::kBFloat16:
      return PackedWeights<BFloat16>::bytes(channels);
    case DType::kFloat16:
      return PackedWeights<Float16>::bytes(channels);
  }
  return 0;
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
