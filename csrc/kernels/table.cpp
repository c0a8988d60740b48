// The kernels of one instruction set, as dispatch.cpp sees them.
#include "kernels.h"

#define SEP_ATTN_STRING_(name) #name
#define SEP_ATTN_STRING(name) SEP_ATTN_STRING_(name)

namespace sep_attn {

SEP_ATTN_DECLARE_KERNELS(SEP_ATTN_CAPABILITY)

namespace SEP_ATTN_CAPABILITY {

extern const KernelTable kernel_table;
const KernelTable kernel_table = {SEP_ATTN_STRING(SEP_ATTN_CAPABILITY),
                                  context_pool_forward,
                                  context_pool_backward,
                                  gate_forward,
                                  gate_backward,
                                  separable_attention_forward,
                                  separable_attention_backward,
                                  packed_weights_bytes};

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
