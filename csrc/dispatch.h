// Picks the kernels of one instruction set at run time, and counts what ran.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

namespace sep_attn {

// Instruction sets this binary holds, and those among them this machine can run: worst first, then
// avx512_bf16, which is better than avx512 on some processors only.
std::vector<std::string> compiled_capabilities();
std::vector<std::string> capabilities();

// The instruction set in use: unless set otherwise, the last one, but avx512_bf16 only where its
// dot products are quick.
std::string capability();
// Throws std::invalid_argument when this binary or this machine lacks `name`.
void set_capability(const std::string& name);
// Obeys SEP_ATTN_CPU_CAPABILITY when it is set.
void set_capability_from_environment();

// "<kernel>/<capability>" and how often it was called since the last reset.
std::vector<std::pair<std::string, int64_t>> kernel_calls();
void reset_kernel_calls();

void context_pool_forward(const ContextPoolForward& arguments, const ParallelFor& parallel_for);
void context_pool_backward(const ContextPoolBackward& arguments, const ParallelFor& parallel_for);
void gate_forward(const GateForward& arguments, const ParallelFor& parallel_for);
void gate_backward(const GateBackward& arguments, const ParallelFor& parallel_for);
void separable_attention_forward(const AttentionForward& arguments,
                                 const ParallelFor& parallel_for);
void separable_attention_backward(const AttentionBackward& arguments,
                                  const ParallelFor& parallel_for);
// The size of AttentionForward::packed_weights in the instruction set in use.
int64_t packed_weights_bytes(DType dtype, int64_t channels);

}  // namespace sep_attn
