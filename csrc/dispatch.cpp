#include "dispatch.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef SEP_ATTN_X86_KERNELS
#include <cpuid.h>
#endif

namespace sep_attn {

#define SEP_ATTN_DECLARE_TABLE(capability) \
  namespace capability {                   \
  extern const KernelTable kernel_table;   \
  }
#ifdef SEP_ATTN_NEON_KERNELS
SEP_ATTN_DECLARE_TABLE(neon)
#else
SEP_ATTN_DECLARE_TABLE(baseline)
#endif
#ifdef SEP_ATTN_X86_KERNELS
SEP_ATTN_DECLARE_TABLE(avx2)
SEP_ATTN_DECLARE_TABLE(avx512)
#endif
#ifdef SEP_ATTN_AVX512_BF16_KERNELS
SEP_ATTN_DECLARE_TABLE(avx512_bf16)
#endif
#undef SEP_ATTN_DECLARE_TABLE

namespace {

bool always() { return true; }

#ifdef SEP_ATTN_X86_KERNELS
// g++ 10 and older clang do not take "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef SEP_ATTN_AVX512_BF16_KERNELS
// Not every clang that knows the flag takes "avx512bf16" in __builtin_cpu_supports.
bool has_avx512_bf16() {
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  unsigned eax, ebx, ecx, edx;
  return has_avx512() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && eax >= 1 &&
         __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvx512Bf16) != 0;
}

// A dot product of bfloat16 pairs does the work of two multiply-adds. AMD's processors start as
// many of them (Zen 4, benchmarks/fma_peak.cpp), Intel's a quarter as many (Sapphire Rapids), so
// that there avx512, which widens bfloat16 to float32, is faster.
bool has_quick_avx512_bf16() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_AMD_ebx &&
         ecx == signature_AMD_ecx && edx == signature_AMD_edx;
}
#endif

enum Kernel {
  kContextPoolForward,
  kContextPoolBackward,
  kGateForward,
  kGateBackward,
  kSeparableAttentionForward,
  kSeparableAttentionBackward,
  kKernels
};

constexpr const char* kKernelNames[kKernels] = {
    "context_pool_forward", "context_pool_backward",       "gate_forward",
    "gate_backward",        "separable_attention_forward", "separable_attention_backward"};

struct InstructionSet {
  const KernelTable& table;
  bool (*supported)();
  bool (*better)();  // than those before it: else it has to be asked for
};

constexpr InstructionSet kInstructionSets[] = {
#ifdef SEP_ATTN_NEON_KERNELS
    {neon::kernel_table, always, always},
#else
    {baseline::kernel_table, always, always},
#endif
#ifdef SEP_ATTN_X86_KERNELS
    {avx2::kernel_table, has_avx2, always},
    {avx512::kernel_table, has_avx512, always},
#endif
#ifdef SEP_ATTN_AVX512_BF16_KERNELS
    {avx512_bf16::kernel_table, has_avx512_bf16, has_quick_avx512_bf16},
#endif
};
constexpr int kInstructionSetCount = sizeof(kInstructionSets) / sizeof(kInstructionSets[0]);

int best_instruction_set() {
  int best = 0;
  for (int i = 0; i < kInstructionSetCount; ++i) {
    if (kInstructionSets[i].supported() && kInstructionSets[i].better()) best = i;
  }
  return best;
}

std::atomic<int>& active() {
  static std::atomic<int> index{best_instruction_set()};
  return index;
}

std::array<std::array<std::atomic<int64_t>, kKernels>, kInstructionSetCount> call_counts{};

const KernelTable& table_for(Kernel kernel) {
  const int index = active().load(std::memory_order_relaxed);
  call_counts[index][kernel].fetch_add(1, std::memory_order_relaxed);
  return kInstructionSets[index].table;
}

std::string join(const std::vector<std::string>& names) {
  std::string joined;
  for (const std::string& name : names) joined += (joined.empty() ? "" : ", ") + name;
  return joined;
}

void use(const std::string& name, const std::string& origin) {
  for (int i = 0; i < kInstructionSetCount; ++i) {
    if (name == kInstructionSets[i].table.capability && kInstructionSets[i].supported()) {
      active().store(i, std::memory_order_relaxed);
      return;
    }
  }
  throw std::invalid_argument(
      origin + " is '" + name + "', but the instruction sets usable on this machine are: " +
      join(capabilities()) + " (this build holds: " + join(compiled_capabilities()) + ")");
}

}  // namespace

std::vector<std::string> compiled_capabilities() {
  std::vector<std::string> names;
  for (const InstructionSet& set : kInstructionSets) names.emplace_back(set.table.capability);
  return names;
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const InstructionSet& set : kInstructionSets) {
    if (set.supported()) names.emplace_back(set.table.capability);
  }
  return names;
}

std::string capability() {
  return kInstructionSets[active().load(std::memory_order_relaxed)].table.capability;
}

void set_capability(const std::string& name) { use(name, "the capability asked for"); }

void set_capability_from_environment() {
  const char* name = std::getenv("SEP_ATTN_CPU_CAPABILITY");
  if (name != nullptr && *name != '\0') use(name, "the environment's SEP_ATTN_CPU_CAPABILITY");
}

std::vector<std::pair<std::string, int64_t>> kernel_calls() {
  std::vector<std::pair<std::string, int64_t>> calls;
  for (int i = 0; i < kInstructionSetCount; ++i) {
    for (int kernel = 0; kernel < kKernels; ++kernel) {
      calls.emplace_back(
          std::string(kKernelNames[kernel]) + "/" + kInstructionSets[i].table.capability,
          call_counts[i][kernel].load(std::memory_order_relaxed));
    }
  }
  return calls;
}

void reset_kernel_calls() {
  for (auto& counts : call_counts) {
    for (auto& count : counts) count.store(0, std::memory_order_relaxed);
  }
}

void context_pool_forward(const ContextPoolForward& arguments, const ParallelFor& parallel_for) {
  table_for(kContextPoolForward).context_pool_forward(arguments, parallel_for);
}

void context_pool_backward(const ContextPoolBackward& arguments, const ParallelFor& parallel_for) {
  table_for(kContextPoolBackward).context_pool_backward(arguments, parallel_for);
}

void gate_forward(const GateForward& arguments, const ParallelFor& parallel_for) {
  table_for(kGateForward).gate_forward(arguments, parallel_for);
}

void gate_backward(const GateBackward& arguments, const ParallelFor& parallel_for) {
  table_for(kGateBackward).gate_backward(arguments, parallel_for);
}

void separable_attention_forward(const AttentionForward& arguments,
                                 const ParallelFor& parallel_for) {
  table_for(kSeparableAttentionForward).separable_attention_forward(arguments, parallel_for);
}

void separable_attention_backward(const AttentionBackward& arguments,
                                  const ParallelFor& parallel_for) {
  table_for(kSeparableAttentionBackward).separable_attention_backward(arguments, parallel_for);
}

int64_t packed_weights_bytes(DType dtype, int64_t channels) {
  const int index = active().load(std::memory_order_relaxed);
  return kInstructionSets[index].table.packed_weights_bytes(dtype, channels);
}

}  // namespace sep_attn
