// Vectors of one instruction set, through the compiler's vector extensions: one source for float
// and double, and for every instruction set. The few intrinsics (masked and half-precision memory
// access) are all here, each beside its portable form.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef SEP_ATTN_CAPABILITY
#error "SEP_ATTN_CAPABILITY must name the instruction set (see CMakeLists.txt)"
#endif

#define SEP_ATTN_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define SEP_ATTN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SEP_ATTN_UNROLL _Pragma("GCC unroll 64")
#endif

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Storage types of half-precision operands; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
struct VectorTypes;

#define SEP_ATTN_VECTOR_TYPES(T, I)                                                                \
  template <>                                                                                      \
  struct VectorTypes<T> {                                                                          \
    typedef T Sum;                                                                                 \
    typedef T Vector __attribute__((vector_size(kVectorBytes)));                                   \
    typedef I Integer __attribute__((vector_size(kVectorBytes)));                                  \
    typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias)); \
    typedef I Lane;                                                                                \
  };
SEP_ATTN_VECTOR_TYPES(float, int32_t)
SEP_ATTN_VECTOR_TYPES(double, int64_t)
#undef SEP_ATTN_VECTOR_TYPES

template <typename T>
using Vec = typename VectorTypes<T>::Vector;
template <typename T>
using IntVec = typename VectorTypes<T>::Integer;  // as wide a lane as T; the type of a comparison
template <typename T>
using SumVec = Vec<typename VectorTypes<T>::Sum>;  // in which products of Vec<T> are summed
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// The type in which an operand stored as S is computed and accumulated.
template <typename S>
struct AccumulateType {
  using Type = float;
};
template <>
struct AccumulateType<double> {
  using Type = double;
};
template <typename S>
using Accumulate = typename AccumulateType<S>::Type;

// What the operands of a matrix product are made of where tokens and weights are stored as S:
// values of type Element, kElements of them in one Type, which is what a lane holds.
template <typename S>
struct OperandTypes {
  using Type = Accumulate<S>;
  using Element = Accumulate<S>;
  static constexpr int64_t kElements = 1;
};

// ---- Lanes ----

template <typename T>
SEP_ATTN_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // keeps -0
}

template <typename T>
SEP_ATTN_INLINE Vec<T> zero() {
  return Vec<T>{};
}

template <typename V>
SEP_ATTN_INLINE void add_product(V& sum, V a, V b) {
  sum += a * b;
}

// The larger of each lane; the second operand where one of them is NaN.
template <typename V>
SEP_ATTN_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

template <typename V, int... Index>
SEP_ATTN_INLINE V shuffle(V a, V b, std::integer_sequence<int, Index...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Index...);
#else
  using I = decltype(a > b);
  return __builtin_shuffle(a, b, I{Index...});
#endif
}

template <int kDistance, typename V, int... Lane>
SEP_ATTN_INLINE V rotate(V a, std::integer_sequence<int, Lane...>) {
  constexpr int n = sizeof...(Lane);
  return shuffle(a, a, std::integer_sequence<int, (Lane + kDistance) % n...>{});
}

template <typename T, int kDistance = kLanes<T> / 2>
SEP_ATTN_INLINE T reduce_sum(Vec<T> a) {
  a += rotate<kDistance>(a, std::make_integer_sequence<int, kLanes<T>>{});
  if constexpr (kDistance > 1) {
    return reduce_sum<T, kDistance / 2>(a);
  } else {
    return a[0];
  }
}

template <typename T, int kDistance = kLanes<T> / 2>
SEP_ATTN_INLINE T reduce_maximum(Vec<T> a) {
  a = maximum(a, rotate<kDistance>(a, std::make_integer_sequence<int, kLanes<T>>{}));
  if constexpr (kDistance > 1) {
    return reduce_maximum<T, kDistance / 2>(a);
  } else {
    return a[0];
  }
}

template <int kHalf, typename V, int... Lane>
SEP_ATTN_INLINE void exchange(V& a, V& b, std::integer_sequence<int, Lane...>) {
  constexpr int n = sizeof...(Lane);
  const V low = shuffle(
      a, b, std::integer_sequence<int, ((Lane & kHalf) == 0 ? Lane : n + Lane - kHalf)...>{});
  b = shuffle(a, b,
              std::integer_sequence<int, ((Lane & kHalf) == 0 ? Lane + kHalf : n + Lane)...>{});
  a = low;
}

// Transposes a square of kLanes x kLanes values held one row a vector.
template <typename T, int kHalf = kLanes<T> / 2>
SEP_ATTN_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  SEP_ATTN_UNROLL
  for (int i = 0; i < kLanes<T>; ++i) {
    if ((i & kHalf) == 0) {
      exchange<kHalf>(rows[i], rows[i + kHalf], std::make_integer_sequence<int, kLanes<T>>{});
    }
  }
  if constexpr (kHalf > 1) transpose<T, kHalf / 2>(rows);
}

// Lane i of the result is the sum of the lanes of rows[i]; rows is used up.
template <typename T, int kHalf = kLanes<T> / 2>
SEP_ATTN_INLINE Vec<T> reduce_sums(Vec<T> (&rows)[kLanes<T>]) {
  SEP_ATTN_UNROLL
  for (int i = 0; i < kHalf; ++i) {
    exchange<kHalf>(rows[i], rows[i + kHalf], std::make_integer_sequence<int, kLanes<T>>{});
    rows[i] += rows[i + kHalf];
  }
  if constexpr (kHalf > 1) return reduce_sums<T, kHalf / 2>(rows);
  return rows[0];
}

// ---- Memory, in the type computed in ----

template <typename T>
SEP_ATTN_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorTypes<T>::Unaligned*>(p);
}

template <typename T>
SEP_ATTN_INLINE void store(T* p, Vec<T> value) {
  *reinterpret_cast<typename VectorTypes<T>::Unaligned*>(p) = value;
}

// The first n lanes (0 <= n <= kLanes) from memory, zero in the rest.
template <typename T>
SEP_ATTN_INLINE Vec<T> load_first(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
  }
#else
  alignas(kVectorBytes) T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

template <typename T>
SEP_ATTN_INLINE void store_first(T* p, Vec<T> value, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)value);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)value);
  }
#else
  alignas(kVectorBytes) T lanes[kLanes<T>];
  store(lanes, value);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// ---- Memory in half precision: float lanes ----

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalfBitsUnaligned
    __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));

SEP_ATTN_INLINE Vec<float> widen(HalfBits half, BFloat16) {
  return (Vec<float>)(__builtin_convertvector(half, FloatBits) << 16);
}

// Rounds to nearest even; NaN stays NaN.
SEP_ATTN_INLINE HalfBits narrow(Vec<float> value, BFloat16) {
#if defined(__AVX512BF16__)
  return (HalfBits)_mm512_cvtneps_pbh((__m512)value);  // subnormal results become zero
#else
  const FloatBits bits = (FloatBits)value;
  const FloatBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const FloatBits quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(value == value ? rounded : quiet, HalfBits);
#endif
}

SEP_ATTN_INLINE Vec<float> widen(HalfBits half, Float16) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half);
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)half);
#elif defined(__aarch64__)
  return (Vec<float>)vcvt_f32_f16((float16x4_t)half);
#else
  const FloatBits bits = __builtin_convertvector(half, FloatBits);
  const FloatBits shifted = (bits & 0x7fffu) << 13;
  const FloatBits normal = shifted + (112u << 23);
  const FloatBits special = shifted + (224u << 23);
  const FloatBits subnormal =
      (FloatBits)((Vec<float>)(shifted + (113u << 23)) - 6.103515625e-05f);  // 2^-14
  const FloatBits magnitude =
      shifted >= (0x7c00u << 13) ? special : (shifted < (0x0400u << 13) ? subnormal : normal);
  return (Vec<float>)(magnitude | ((bits & 0x8000u) << 16));
#endif
}

SEP_ATTN_INLINE HalfBits narrow(Vec<float> value, Float16) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (HalfBits)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (HalfBits)vcvt_f16_f32((float32x4_t)value);
#else
  const FloatBits bits = (FloatBits)value;
  const FloatBits sign = bits & 0x80000000u;
  const FloatBits magnitude = bits ^ sign;
  const uint32_t magic = 126u << 23;  // adding it leaves a subnormal's bits in place, rounded
  const FloatBits subnormal =
      (FloatBits)((Vec<float>)magnitude + (Vec<float>)(FloatBits{} + magic)) - magic;
  const FloatBits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const FloatBits special =
      magnitude > (255u << 23) ? FloatBits{} + 0x7e00u : FloatBits{} + 0x7c00u;
  const FloatBits result =
      magnitude >= (143u << 23) ? special : (magnitude < (113u << 23) ? subnormal : normal);
  return __builtin_convertvector(result | (sign >> 16), HalfBits);
#endif
}

SEP_ATTN_INLINE HalfBits load_half_first(const void* p, int64_t n) {
  alignas(kVectorBytes) uint16_t lanes[kLanes<float>] = {};
  __builtin_memcpy(lanes, p, static_cast<std::size_t>(n) * 2);
  return *reinterpret_cast<const HalfBitsUnaligned*>(lanes);
}

SEP_ATTN_INLINE Vec<float> load(const BFloat16* p) {
  return widen(*reinterpret_cast<const HalfBitsUnaligned*>(p), BFloat16{});
}
SEP_ATTN_INLINE Vec<float> load(const Float16* p) {
  return widen(*reinterpret_cast<const HalfBitsUnaligned*>(p), Float16{});
}
SEP_ATTN_INLINE void store(BFloat16* p, Vec<float> value) {
  *reinterpret_cast<HalfBitsUnaligned*>(p) = narrow(value, BFloat16{});
}
SEP_ATTN_INLINE void store(Float16* p, Vec<float> value) {
  *reinterpret_cast<HalfBitsUnaligned*>(p) = narrow(value, Float16{});
}
SEP_ATTN_INLINE Vec<float> load_first(const BFloat16* p, int64_t n) {
  return widen(load_half_first(p, n), BFloat16{});
}
SEP_ATTN_INLINE Vec<float> load_first(const Float16* p, int64_t n) {
  return widen(load_half_first(p, n), Float16{});
}
SEP_ATTN_INLINE void store_first(BFloat16* p, Vec<float> value, int64_t n) {
  const HalfBits half = narrow(value, BFloat16{});
  __builtin_memcpy(p, &half, static_cast<std::size_t>(n) * 2);
}
SEP_ATTN_INLINE void store_first(Float16* p, Vec<float> value, int64_t n) {
  const HalfBits half = narrow(value, Float16{});
  __builtin_memcpy(p, &half, static_cast<std::size_t>(n) * 2);
}

// One value.
SEP_ATTN_INLINE float load_one(const float* p) { return *p; }
SEP_ATTN_INLINE double load_one(const double* p) { return *p; }
SEP_ATTN_INLINE float load_one(const BFloat16* p) { return load_first(p, 1)[0]; }
SEP_ATTN_INLINE float load_one(const Float16* p) { return load_first(p, 1)[0]; }
SEP_ATTN_INLINE void store_one(float* p, float value) { *p = value; }
SEP_ATTN_INLINE void store_one(double* p, double value) { *p = value; }
SEP_ATTN_INLINE void store_one(BFloat16* p, float value) { store_first(p, broadcast(value), 1); }
SEP_ATTN_INLINE void store_one(Float16* p, float value) { store_first(p, broadcast(value), 1); }

// ---- Pairs of bfloat16 values, one pair a lane ----

#if defined(__AVX512BF16__)

struct BFloat16Pair {
  BFloat16 first, second;
};

template <>
struct VectorTypes<BFloat16Pair> {
  typedef float Sum;
  typedef int32_t Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integer __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Unaligned __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
};
template <>
struct AccumulateType<BFloat16Pair> {
  using Type = BFloat16Pair;  // moved about as it is
};
template <>
struct OperandTypes<BFloat16> {
  using Type = BFloat16Pair;
  using Element = BFloat16;
  static constexpr int64_t kElements = 2;
};

template <>
SEP_ATTN_INLINE Vec<BFloat16Pair> broadcast<BFloat16Pair>(BFloat16Pair value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return Vec<BFloat16Pair>{} + bits;
}

// Each lane's two products, one after the other. Subnormal values count as zero.
SEP_ATTN_INLINE void add_product(Vec<float>& sum, Vec<BFloat16Pair> a, Vec<BFloat16Pair> b) {
  sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// The first (half 0) or the second values (1) of the pairs at p, rounded; the others are left as
// they are.
SEP_ATTN_INLINE void store_half(BFloat16Pair* p, unsigned half, Vec<float> value) {
  const FloatBits bits = __builtin_convertvector(narrow(value, BFloat16{}), FloatBits);
  const __mmask32 mask = 0x55555555u << half;
  _mm512_mask_storeu_epi16(p, mask, (__m512i)(bits | bits << 16));
}

#endif

// ---- exp ----

template <typename T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kLowest = -104.0f, kHighest = 89.0f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.428606765330187e-06f;
  static constexpr int kMantissaBits = 23, kBias = 127;
  // exp(r) = 1 + r + r^2 * polynomial(r), |r| <= ln(2) / 2; highest power first
  static constexpr float kPolynomial[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                          4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

template <>
struct ExpConstants<double> {
  static constexpr double kLowest = -746.0, kHighest = 710.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
  static constexpr int kMantissaBits = 52, kBias = 1023;
  static constexpr double kPolynomial[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0,
                                           1.0 / 3628800.0,    1.0 / 362880.0,    1.0 / 40320.0,
                                           1.0 / 5040.0,       1.0 / 720.0,       1.0 / 120.0,
                                           1.0 / 24.0,         1.0 / 6.0,         0.5};
};

// Within 2 units in the last place of std::exp; -inf, inf, NaN and subnormal results as there.
template <typename T>
SEP_ATTN_INLINE Vec<T> exponential(Vec<T> x) {
  using C = ExpConstants<T>;
  using I = IntVec<T>;
  constexpr T kLog2E = static_cast<T>(1.44269504088896340736);
  x = x < C::kLowest ? broadcast<T>(C::kLowest) : x;
  x = x > C::kHighest ? broadcast<T>(C::kHighest) : x;
  const Vec<T> shifted = x * kLog2E + C::kRound;
  const Vec<T> n = shifted - C::kRound;
  const Vec<T> r = (x - n * C::kLn2High) - n * C::kLn2Low;
  Vec<T> polynomial = broadcast<T>(C::kPolynomial[0]);
  SEP_ATTN_UNROLL
  for (unsigned i = 1; i < sizeof(C::kPolynomial) / sizeof(T); ++i) {
    polynomial = polynomial * r + C::kPolynomial[i];
  }
  const Vec<T> mantissa = (polynomial * r) * r + (r + static_cast<T>(1));
  // 2^n in two factors, so that subnormal and overflowing results come out right
  const I exponent = (I)shifted - (I)broadcast<T>(C::kRound);
  const I half = exponent >> 1;
  const Vec<T> first = (Vec<T>)((half + C::kBias) << C::kMantissaBits);
  const Vec<T> second = (Vec<T>)((exponent - half + C::kBias) << C::kMantissaBits);
  return mantissa * first * second;
}

template <typename T>
SEP_ATTN_INLINE T exponential_one(T x) {
  return exponential<T>(broadcast<T>(x))[0];
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
