// Prints how many operations a second this machine does when one instruction alone runs on
// registers, `fma_peak THREADS`: float32 fused multiply-adds, then, where the processor has them,
// dot products of bfloat16 pairs into float32. benchmarks/ceilings.py compiles it with
// -march=native on the machine that it measures.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kChains = 24;  // of 32 registers; latency x units is 8 to 16
#else
constexpr int kChains = 12;  // of 16 registers
#endif

typedef float Vector __attribute__((vector_size(kVectorBytes)));

constexpr int kLanes = kVectorBytes / sizeof(float);
constexpr long kSteps = 1 << 22;  // tens of milliseconds
constexpr int kRuns = 20;

float multiply_add(float factor_value, float addend_value) {
  Vector chains[kChains];
  const Vector factor = Vector{} + factor_value, addend = Vector{} + addend_value;
  for (int i = 0; i < kChains; ++i) chains[i] = Vector{} + static_cast<float>(i);
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chains[i] = chains[i] * factor + addend;
  }
  Vector sum{};
  for (int i = 0; i < kChains; ++i) sum += chains[i];
  return sum[0];
}

#if defined(__AVX512BF16__)
float dot_products(float factor_value, float addend_value) {
  __m512 chains[kChains];
  const __m512bh factor = _mm512_cvtne2ps_pbh(_mm512_set1_ps(factor_value), __m512{});
  const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_set1_ps(addend_value), __m512{});
  for (int i = 0; i < kChains; ++i) chains[i] = _mm512_set1_ps(static_cast<float>(i));
  for (long step = 0; step < kSteps / 2; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chains[i] = _mm512_dpbf16_ps(chains[i], factor, pairs);
  }
  __m512 sum{};
  for (int i = 0; i < kChains; ++i) sum += chains[i];
  return sum[0];
}
#endif

// The most of kRuns runs, in operations a second.
double peak(int threads, float (*loop)(float, float)) {
  volatile float factor = 0.999f, addend = 0.001f, sink = 0.0f;  // unknown to the compiler
  double best = 0.0;
  for (int run = 0; run < kRuns; ++run) {
    std::vector<float> results(threads);
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> workers;
    for (int i = 1; i < threads; ++i) {
      workers.emplace_back([&, i] { results[i] = loop(factor, addend); });
    }
    results[0] = loop(factor, addend);
    for (std::thread& worker : workers) worker.join();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    for (float result : results) sink = sink + result;
    best = std::max(best, 2.0 * threads * kSteps * kChains * kLanes / taken.count());
  }
  return best;
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  std::printf("%.6e\n", peak(threads, multiply_add));
#if defined(__AVX512BF16__)
  std::printf("%.6e\n", peak(threads, dot_products));
#endif
}
