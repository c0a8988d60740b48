// The kernels of one instruction set, as dispatch.cpp sees them.
#include "kernels.h"

#define SEP_ATTN_STRING_(name) #name
#define SEP_ATTN_STRING(name) SEP_ATTN_STRING_(name)

namespace sep_attn::SEP_ATTN_CAPABILITY {

void context_pool_forward(const ContextPoolForward&, const ParallelFor&);
void context_pool_backward(const ContextPoolBackward&, const ParallelFor&);
void gate_forward(const GateForward&, const ParallelFor&);
void gate_backward(const GateBackward&, const ParallelFor&);
void separable_attention_forward(const AttentionForward&, const ParallelFor&);
void separable_attention_backward(const AttentionBackward&, const ParallelFor&);
int64_t packed_weights_bytes(DType dtype, int64_t channels);

extern const KernelTable kernel_table;
const KernelTable kernel_table = {SEP_ATTN_STRING(SEP_ATTN_CAPABILITY),
                                  context_pool_forward,
                                  context_pool_backward,
                                  gate_forward,
                                  gate_backward,
                                  separable_attention_forward,
                                  separable_attention_backward,
                                  packed_weights_bytes};

}  // namespace sep_attn::SEP_ATTN_CAPABILITY
