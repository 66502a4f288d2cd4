// SIMD vectors of the CPU's register width, written once with the vector extensions of GCC and Clang. Only dot products
// have a version for each instruction set: of 8-bit integers for AVX-512 VNNI, AVX-VNNI, AVX2, NEON and plain C++, and of
// bfloat16 for AVX512-BF16 and NEON.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

// Register blocking: a micro-kernel accumulates R rows x V vectors of outputs in registers. There are 32 registers, or 16
// with AVX2 and SSE. FLOAT_ROWS x FLOAT_V is the largest block for floats, INT8_ROWS or INT4_ROWS x TILE_V for integers, and
// DOT_ROWS the most rows of one that computes dot products. BYTES is the vector width; a tile of packed integer weights is
// TILE_V vectors wide. The last block may have INT_SPARE or FLOAT_SPARE rows too many.
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr int BYTES = 64, FLOAT_ROWS = 12, FLOAT_V = 2, DOT_ROWS = 8, TILE_V = 2, INT_SPARE = 3;
constexpr int INT8_ROWS[] = {8, 4}, INT4_ROWS[] = {6, 4};  // for up to DOT_MAX_ROWS rows, and for more
#elif defined(__AVX2__)
constexpr int BYTES = 32, FLOAT_ROWS = 6, FLOAT_V = 2, DOT_ROWS = 4, TILE_V = 2, INT_SPARE = 1;
constexpr int INT8_ROWS[] = {8, 6}, INT4_ROWS[] = {4, 4};
#else
constexpr int BYTES = 16, FLOAT_ROWS = 6, FLOAT_V = 4, DOT_ROWS = 4, TILE_V = 4, INT_SPARE = 1;
constexpr int INT8_ROWS[] = {6, 6}, INT4_ROWS[] = {4, 4};
#endif
constexpr int FLOAT_SPARE = 2;
constexpr int L = BYTES / 4;  // lanes: 32-bit elements of a vector

template <typename T, int bytes = BYTES>
struct Vector {
    typedef T type __attribute__((vector_size(bytes)));
};
using F = Vector<float>::type;
using I = Vector<int32_t>::type;
using U = Vector<uint32_t>::type;
using I16 = Vector<int16_t>::type;
using B = Vector<uint8_t>::type;  // raw bytes, signed or unsigned

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};
struct Pair {  // two adjacent bfloat16 in one 32-bit lane
    BFloat16 first, second;
};
template <typename T>
constexpr int PER_LANE = std::is_same_v<T, Pair> ? 2 : 1;  // elements of a lane

// Unaligned loads and stores of any type.
template <typename T>
INLINE T load_as(const void *from) {
    T x;
    memcpy(&x, from, sizeof x);
    return x;
}
template <typename T>
INLINE void store_as(void *to, T x) {
    memcpy(to, &x, sizeof x);
}

INLINE F splat(float x) { return x - (F){}; }
INLINE I splat(int32_t x) { return x - (I){}; }
// Broadcasts n 32-bit elements to all lanes.
template <int n>
INLINE F broadcast(const float *from) {
    if constexpr (n == 2) return (F)(load_as<int64_t>(from) - (Vector<int64_t>::type){});
    else return (F)splat(load_as<int32_t>(from));
}
// Keeps x in a register: GCC would otherwise load it from memory at each use, and some loops are bound by loads.
INLINE F in_register(F x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}
INLINE void prefetch(const void *from) { __builtin_prefetch(from, 0, 2); }  // into the L2 cache

// --- loads and stores of float32, float16 and bfloat16

INLINE U zero_extend(const void *from) {  // where GCC compiles the builtin to four conversions
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    return (U)_mm512_cvtepu16_epi32(load_as<__m256i>(from));
#elif defined(__AVX2__)
    return (U)_mm256_cvtepu16_epi32(load_as<__m128i>(from));
#else
    return __builtin_convertvector(load_as<Vector<uint16_t, BYTES / 2>::type>(from), U);
#endif
}
INLINE void truncate(void *to, U x) { store_as(to, __builtin_convertvector(x, Vector<uint16_t, BYTES / 2>::type)); }

INLINE F load(const float *from) { return load_as<F>(from); }
INLINE F load(const Pair *from) { return load_as<F>(from); }  // without conversion
INLINE F load(const BFloat16 *from) { return (F)(zero_extend(from) << 16); }
INLINE F load(const Half *from) {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    return (F)_mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(__AVX2__) && defined(__F16C__)
    return (F)_mm256_cvtph_ps(load_as<__m128i>(from));
#elif defined(__aarch64__)
    return (F)vcvt_f32_f16(vld1_f16((const float16_t *)from));
#else
    const U u = zero_extend(from);  // 2^112: the exponent biases differ by 112
    const F x = (F)((u & 0x7FFF) << 13) * 0x1p112f, infinite = splat(INFINITY), nan = splat(NAN);
    return (F)((U)(x < 65536.0f ? x : x == 65536.0f ? infinite : nan) | (u & 0x8000) << 16);
#endif
}
INLINE void store(float *to, F x) { store_as(to, x); }
INLINE void store(BFloat16 *to, F x) {  // round to nearest, ties to even; NaN stays NaN
    const U u = (U)x;
    truncate(to, x == x ? (u + 0x7FFF + (u >> 16 & 1)) >> 16 : (U){} + 0x7FC0);
}
INLINE void store(Half *to, F x) {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    store_as(to, _mm512_cvtps_ph((__m512)x, 0));
#elif defined(__AVX2__) && defined(__F16C__)
    store_as(to, _mm256_cvtps_ph((__m256)x, 0));
#elif defined(__aarch64__)
    vst1_f16((float16_t *)to, vcvt_f16_f32((float32x4_t)x));
#else
    const F size = (F)((U)x & 0x7FFFFFFF);
    const U u = (U)(size * 0x1p-112f), rounded = (u + 0xFFF + (u >> 13 & 1)) >> 13;
    const U finite = size < 65520.0f ? rounded : (U){} + 0x7C00;
    truncate(to, (x == x ? finite : (U){} + 0x7E00) | ((U)x & 0x80000000) >> 16);
#endif
}

// --- arithmetic

INLINE F max(F a, F b) { return b > a ? b : a; }  // a where a is NaN
INLINE F min(F a, F b) { return b < a ? b : a; }
INLINE F max_abs(F a, F b) { return (F)((I)b > (I)a ? (I)b : (I)a); }  // of absolute values; NaN is the largest
INLINE F abs(F x) { return (F)((U)x & 0x7FFFFFFF); }
// |x| < 2^22: adding 1.5 * 2^23 rounds x to an integer in the low bits of the mantissa.
INLINE I round_to_int(F x) { return (I)(x + 12582912.0f) - 0x4B400000; }

template <int first, int... i>
INLINE F interleave(F a, F b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * L)...);
}
constexpr auto LANES = std::make_integer_sequence<int, L>();
INLINE F interleave_low(F a, F b) { return interleave<0>(a, b, LANES); }       // a0 b0 a1 b1 .. of the lower halves
INLINE F interleave_high(F a, F b) { return interleave<L / 2>(a, b, LANES); }  // of the upper halves

// Products of complex numbers, whose real and imaginary parts are adjacent.
template <int... i>
INLINE F complex_multiply(F x, F y, std::integer_sequence<int, i...>) {
    const F real = __builtin_shufflevector(y, y, (i & ~1)...), imaginary = __builtin_shufflevector(y, y, (i | 1)...);
    const F sign = {(i % 2 ? 1.0f : -1.0f)...};
    return x * real + __builtin_shufflevector(x, x, (i ^ 1)...) * (imaginary * sign);
}
INLINE F complex_multiply(F x, F y) { return complex_multiply(x, y, LANES); }

// Transposes L x L floats in log2(L) rounds. Each round interleaves the first half of the vectors with the second.
INLINE void transpose(F *x) {
    for (int round = 1; round < L; round *= 2) {
        F y[L];
        for (int i = 0; i < L / 2; i++) {
            y[2 * i] = interleave_low(x[i], x[i + L / 2]);
            y[2 * i + 1] = interleave_high(x[i], x[i + L / 2]);
        }
        std::copy_n(y, L, x);
    }
}
// Horizontal reduction of L vectors at once by `op`: lane i is the result of vector i. Each round halves the vectors.
template <typename Op>
INLINE F reduce_each(F *x, const Op &op) {
    for (int n = L / 2; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] = op(interleave_low(x[i], x[i + n]), interleave_high(x[i], x[i + n]));
    return x[0];
}
INLINE F sum_each(F *x) {
    return reduce_each(x, [](F a, F b) { return a + b; });
}
INLINE float reduce_add(F x) {
    float s[L];
    store_as(s, x);
    for (int n = L / 2; n; n /= 2)
        for (int i = 0; i < n; i++) s[i] += s[i + n];
    return s[0];
}
INLINE float reduce_max(F x) {
    float s[L];
    store_as(s, x);
    for (int n = L / 2; n; n /= 2)
        for (int i = 0; i < n; i++) s[i] = std::max(s[i], s[i + n]);
    return s[0];
}

// s + w x in each lane: a fused multiply-add or, of Pairs, the dot product of two bfloat16 where the CPU has one.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr bool HAS_DOT2 = true;
INLINE F dot2(F s, F w, F x) { return (F)_mm512_dpbf16_ps((__m512)s, (__m512bh)w, (__m512bh)x); }
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool HAS_DOT2 = true;
INLINE F dot2(F s, F w, F x) { return vbfdotq_f32((float32x4_t)s, (bfloat16x8_t)w, (bfloat16x8_t)x); }
#else
constexpr bool HAS_DOT2 = false;
INLINE F dot2(F s, F, F) { return s; }
#endif
template <typename T>
INLINE F multiply_add(F s, F w, F x) {
    if constexpr (std::is_same_v<T, Pair>) return dot2(s, w, x);
    else return s + w * x;
}

// e^x = 2^n e^f with |f| <= ln 2 / 2, e^f by its Taylor series: relative error within 2e-7.
INLINE F exp(F x) {
    const F low = splat(-87.0f), high = splat(88.0f);
    x = low > x ? low : high < x ? high : x;
    const F biased = x * 1.44269504f + 12582912.0f, n = biased - 12582912.0f;  // the low bits of `biased` hold n too
    const F f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const F e = (((((f / 720 + 1.0f / 120) * f + 1.0f / 24) * f + 1.0f / 6) * f + 0.5f) * f + 1) * f + 1;
    return x == x ? (F)((I)e + (((I)biased - 0x4B400000) << 23)) : x;
}

// --- dot products of 8-bit integers: each of L int32 lanes accumulates the products of four adjacent bytes

// dot_int8: int8 weights and activations x are signed, but the first operand of dpbusd is unsigned: BIAS is added to the
// weights, and accumulators begin at -BIAS times the sum of x to compensate. AVX2 without VNNI can only multiply int16
// without overflow: weights are split into even and odd columns (HALVES), and x is stored as int16, four columns in the
// order 0 2 1 3.
// dot_int4: int4 weights are unsigned. With AVX2, 32 columns accumulate in int16 (15 * 128 * 16 < 2^15), and widen_add adds
// these sums to int32 accumulators.
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr int BIAS = 128, HALVES = 1;
constexpr const char *INSTRUCTIONS = "AVX-512 VNNI";
INLINE I dot_int4(I s, B w, I x) { return (I)_mm512_dpbusd_epi32((__m512i)s, (__m512i)w, (__m512i)x); }
#elif defined(__AVX2__) && defined(__AVXVNNI__)
constexpr int BIAS = 128, HALVES = 1;
constexpr const char *INSTRUCTIONS = "AVX-VNNI";
INLINE I dot_int4(I s, B w, I x) { return (I)_mm256_dpbusd_avx_epi32((__m256i)s, (__m256i)w, (__m256i)x); }
#elif defined(__AVX2__)
constexpr int BIAS = 0, HALVES = 2;
constexpr const char *INSTRUCTIONS = "AVX2";
// The empty asm makes GCC accumulate each product at once: it would compute all of them first and spill registers.
template <typename S>
INLINE I add_at_once(S s) {
    asm("" : "+x"(s));
    return (I)s;
}
INLINE I dot_int4(I s, B w, I x) { return add_at_once((I16)s + (I16)_mm256_maddubs_epi16((__m256i)w, (__m256i)x)); }
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int BIAS = 0, HALVES = 1;
constexpr const char *INSTRUCTIONS = "NEON dotprod";
INLINE I dot_int4(I s, B w, I x) { return (I)vdotq_s32((int32x4_t)s, (int8x16_t)w, (int8x16_t)x); }
#else
constexpr int BIAS = 0, HALVES = 1;
constexpr const char *INSTRUCTIONS = "vectors of 16 bytes";
INLINE I dot_int4(I s, B w, I x) {
    typedef Vector<int8_t>::type S;
    for (int i = 0; i < BYTES; i++) s[i / 4] += ((S)w)[i] * ((S)x)[i];
    return s;
}
#endif
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !(defined(__AVX512BW__) && defined(__AVX512VNNI__))
INLINE I dot_int8(I s, B w, I x) { return add_at_once(s + (I)_mm256_madd_epi16((__m256i)w, (__m256i)x)); }
INLINE I widen_add(I s, I part) { return s + (I)_mm256_madd_epi16((__m256i)part, _mm256_set1_epi16(1)); }
#else
INLINE I dot_int8(I s, B w, I x) { return dot_int4(s, w, x); }
INLINE I widen_add(I s, I part) { return s + part; }
#endif
// The first operand of dot_int8, from stored int8 weights.
INLINE B int8_operand(B w, int half) {
    if (HALVES == 2) return (B)((half ? (I16)w : (I16)w << 8) >> 8);
    return w ^ (uint8_t)BIAS;
}
using Activation8 = std::conditional_t<HALVES == 2, int16_t, int8_t>;  // the activations of dot_int8
