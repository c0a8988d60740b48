// AVX-512 with bfloat16 dot products: the forward pass of the fused layer in bfloat16. All else is
// the kernels of plain AVX-512.
#include "attention_forward.h"
#include "kernels.h"

namespace sep_attn {

SEP_ATTN_DECLARE_KERNELS(avx512)

namespace SEP_ATTN_CAPABILITY {
namespace {

void separable_attention_forward(const AttentionForward& op, const ParallelFor& parallel) {
  if (op.dtype != DType::kBFloat16) return avx512::separable_attention_forward(op, parallel);
  run_forward<BFloat16>(op, parallel);
}

int64_t packed_weights_bytes(DType dtype, int64_t channels) {
  if (dtype != DType::kBFloat16) return avx512::packed_weights_bytes(dtype, channels);
  return PackedWeights<BFloat16>::bytes(channels);
}

}  // namespace

extern const KernelTable kernel_table;
const KernelTable kernel_table = {"avx512_bf16",
                                  avx512::context_pool_forward,
                                  avx512::context_pool_backward,
                                  avx512::gate_forward,
                                  avx512::gate_backward,
                                  separable_attention_forward,
                                  avx512::separable_attention_backward,
                                  packed_weights_bytes};

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
