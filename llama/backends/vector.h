// Vectors as wide as this CPU's registers, written once with the vector types of GCC and Clang. What differs between
// instruction sets is the dot product of 8-bit integers: AVX-512 VNNI, AVX-VNNI, AVX2, NEON and plain C++ have their own;
// and that of two bfloat16, which AVX-512 and NEON may have.
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

// A kernel keeps R rows x V vectors of sums in registers, of which there are 32, or 16 with AVX2 and SSE.
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr int BYTES = 64, FLOAT_ROWS = 12, FLOAT_V = 2, DOT_ROWS = 8, INT_V = 2;
constexpr int INT8_ROWS[] = {8, 4}, INT4_ROWS[] = {6, 4};  // where a pass has few rows, and many
#ifdef __AMX_INT8__
constexpr int TILE_V = 4;  // as oneDNN packs
#else
constexpr int TILE_V = INT_V;  // so that any number of rows reads a tile in one stream
#endif
#elif defined(__AVX2__)
constexpr int BYTES = 32, FLOAT_ROWS = 6, FLOAT_V = 2, DOT_ROWS = 4, INT_V = 2, TILE_V = 2;
constexpr int INT8_ROWS[] = {6, 6}, INT4_ROWS[] = {4, 4};
#else
constexpr int BYTES = 16, FLOAT_ROWS = 6, FLOAT_V = 4, DOT_ROWS = 4, INT_V = 4, TILE_V = 4;
constexpr int INT8_ROWS[] = {6, 6}, INT4_ROWS[] = {4, 4};
#endif
constexpr int L = BYTES / 4;  // floats of a vector

template <typename T, int bytes = BYTES>
struct Vector {
    typedef T type __attribute__((vector_size(bytes)));
};
using F = Vector<float>::type;
using I = Vector<int32_t>::type;
using U = Vector<uint32_t>::type;
using I16 = Vector<int16_t>::type;
using B = Vector<uint8_t>::type;  // also where bytes have a sign

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};
struct Pair {  // neighbours, in a lane of a vector
    BFloat16 first, second;
};
template <typename T>
constexpr int PER_LANE = std::is_same_v<T, Pair> ? 2 : 1;  // numbers

template <typename T>
INLINE T get(const void *from) {
    T x;
    memcpy(&x, from, sizeof x);
    return x;
}
template <typename T>
INLINE void put(void *to, T x) {
    memcpy(to, &x, sizeof x);
}

INLINE F splat(float x) { return x - (F){}; }
INLINE I splat(int32_t x) { return x - (I){}; }
// n floats, repeated to fill a vector.
template <int n>
INLINE F broadcast(const float *from) {
    if constexpr (n == 2) return (F)(get<int64_t>(from) - (Vector<int64_t>::type){});
    else return (F)splat(get<int32_t>(from));
}
// Keeps x in a register: GCC would reload it at each use, and loads limit some loops.
INLINE F in_register(F x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}
INLINE void prefetch(const void *from) { __builtin_prefetch(from, 0, 2); }  // into the L2 cache

// --- floats of 32 and 16 bits in memory

INLINE U wide(const void *from) {  // the builtin compiles to four conversions with GCC
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    return (U)_mm512_cvtepu16_epi32(get<__m256i>(from));
#elif defined(__AVX2__)
    return (U)_mm256_cvtepu16_epi32(get<__m128i>(from));
#else
    return __builtin_convertvector(get<Vector<uint16_t, BYTES / 2>::type>(from), U);
#endif
}
INLINE void narrow(void *to, U x) { put(to, __builtin_convertvector(x, Vector<uint16_t, BYTES / 2>::type)); }

INLINE F load(const float *from) { return get<F>(from); }
INLINE F load(const Pair *from) { return get<F>(from); }  // as they are
INLINE F load(const BFloat16 *from) { return (F)(wide(from) << 16); }
INLINE F load(const Half *from) {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    return (F)_mm512_cvtph_ps(get<__m256i>(from));
#elif defined(__AVX2__) && defined(__F16C__)
    return (F)_mm256_cvtph_ps(get<__m128i>(from));
#elif defined(__aarch64__)
    return (F)vcvt_f32_f16(vld1_f16((const float16_t *)from));
#else
    const U u = wide(from);  // 2^112 is what the two formats' exponents differ by
    const F x = (F)((u & 0x7FFF) << 13) * 0x1p112f, infinite = splat(INFINITY), nan = splat(NAN);
    return (F)((U)(x < 65536.0f ? x : x == 65536.0f ? infinite : nan) | (u & 0x8000) << 16);
#endif
}
INLINE void store(float *to, F x) { put(to, x); }
INLINE void store(BFloat16 *to, F x) {  // to the nearest, ties to even; NaN stays NaN
    const U u = (U)x;
    narrow(to, x == x ? (u + 0x7FFF + (u >> 16 & 1)) >> 16 : (U){} + 0x7FC0);
}
INLINE void store(Half *to, F x) {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    put(to, _mm512_cvtps_ph((__m512)x, 0));
#elif defined(__AVX2__) && defined(__F16C__)
    put(to, _mm256_cvtps_ph((__m256)x, 0));
#elif defined(__aarch64__)
    vst1_f16((float16_t *)to, vcvt_f16_f32((float32x4_t)x));
#else
    const F size = (F)((U)x & 0x7FFFFFFF);
    const U u = (U)(size * 0x1p-112f), rounded = (u + 0xFFF + (u >> 13 & 1)) >> 13;
    const U finite = size < 65520.0f ? rounded : (U){} + 0x7C00;
    narrow(to, (x == x ? finite : (U){} + 0x7E00) | ((U)x & 0x80000000) >> 16);
#endif
}

// --- arithmetic

INLINE F larger(F a, F b) { return b > a ? b : a; }  // a where a is NaN
INLINE F larger_magnitude(F a, F b) { return (I)b > (I)a ? b : a; }  // of numbers without a sign; NaN is the largest
INLINE F magnitude(F x) { return (F)((U)x & 0x7FFFFFFF); }
INLINE I nearest(F x) { return (I)(x + 12582912.0f) - 0x4B400000; }  // of numbers below 2^22: their bits behind 1.5 2^23

template <int first, int... i>
INLINE F interleave(F a, F b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * L)...);
}
constexpr auto LANES = std::make_integer_sequence<int, L>();
INLINE F interleave_low(F a, F b) { return interleave<0>(a, b, LANES); }        // a0 b0 a1 b1 ..
INLINE F interleave_high(F a, F b) { return interleave<L / 2>(a, b, LANES); }  // from the middle on

// In log2(L) rounds that interleave the first half of the vectors with the second.
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
// All numbers of each of L vectors, combined by `two`; half as many vectors after each round.
template <typename Two>
INLINE F across(F *x, const Two &two) {
    for (int n = L / 2; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] = two(interleave_low(x[i], x[i + n]), interleave_high(x[i], x[i + n]));
    return x[0];
}
INLINE F sums(F *x) {
    return across(x, [](F a, F b) { return a + b; });
}
INLINE float sum(F x) {
    float s[L];
    put(s, x);
    for (int n = L / 2; n; n /= 2)
        for (int i = 0; i < n; i++) s[i] += s[i + n];
    return s[0];
}
INLINE float largest(F x) {
    float s[L];
    put(s, x);
    for (int n = L / 2; n; n /= 2)
        for (int i = 0; i < n; i++) s[i] = std::max(s[i], s[i + n]);
    return s[0];
}

// s + w x in each lane; of pairs, the products of both neighbours, for which some CPUs have an instruction.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr bool PAIRS = true;
INLINE F add_pairs(F s, F w, F x) { return (F)_mm512_dpbf16_ps((__m512)s, (__m512bh)w, (__m512bh)x); }
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool PAIRS = true;
INLINE F add_pairs(F s, F w, F x) { return vbfdotq_f32((float32x4_t)s, (bfloat16x8_t)w, (bfloat16x8_t)x); }
#else
constexpr bool PAIRS = false;
INLINE F add_pairs(F s, F, F) { return s; }
#endif
template <typename T>
INLINE F add_product(F s, F w, F x) {
    if constexpr (std::is_same_v<T, Pair>) return add_pairs(s, w, x);
    else return s + w * x;
}

// 2^n e^f with |f| <= ln 2 / 2, by the Taylor series of e^f: within 2e-7 of the result.
INLINE F exp(F x) {
    const F low = splat(-87.0f), high = splat(88.0f);
    x = low > x ? low : high < x ? high : x;
    const F biased = x * 1.44269504f + 12582912.0f, n = biased - 12582912.0f;  // n also in the low bits of `biased`
    const F f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const F e = (((((f / 720 + 1.0f / 120) * f + 1.0f / 24) * f + 1.0f / 6) * f + 0.5f) * f + 1) * f + 1;
    return x == x ? (F)((I)e + (((I)biased - 0x4B400000) << 23)) : x;
}

// --- dot products of bytes: to each of L sums, four products of neighbours are added

// Weights of 8 bits have a sign, as have rows x. dpbusd takes one operand without: weights get BIAS more, which is taken
// off at the end as BIAS times the sum of x. AVX2 alone has only instructions for 16 bits that cannot overflow: weights are
// split into even and odd columns, HALVES, and x comes as int16 in the order 0 2 1 3.
// Weights of 4 bits have no sign. With AVX2 32 columns are summed in 16 bits (15 * 127 * 16 < 2^15), then widened.
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr int BIAS = 128, HALVES = 1;
constexpr const char *INSTRUCTIONS = "AVX-512 VNNI";
INLINE I dot4(I s, B w, I x) { return (I)_mm512_dpbusd_epi32((__m512i)s, (__m512i)w, (__m512i)x); }
#elif defined(__AVX2__) && defined(__AVXVNNI__)
constexpr int BIAS = 128, HALVES = 1;
constexpr const char *INSTRUCTIONS = "AVX-VNNI";
INLINE I dot4(I s, B w, I x) { return (I)_mm256_dpbusd_avx_epi32((__m256i)s, (__m256i)w, (__m256i)x); }
#elif defined(__AVX2__)
constexpr int BIAS = 0, HALVES = 2;
constexpr const char *INSTRUCTIONS = "AVX2";
// The empty asm has GCC add each product at once; it would make all of them first, for which there are no registers.
template <typename S>
INLINE I now(S s) {
    asm("" : "+x"(s));
    return (I)s;
}
INLINE I dot4(I s, B w, I x) { return now((I16)s + (I16)_mm256_maddubs_epi16((__m256i)w, (__m256i)x)); }
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int BIAS = 0, HALVES = 1;
constexpr const char *INSTRUCTIONS = "NEON dotprod";
INLINE I dot4(I s, B w, I x) { return (I)vdotq_s32((int32x4_t)s, (int8x16_t)w, (int8x16_t)x); }
#else
constexpr int BIAS = 0, HALVES = 1;
constexpr const char *INSTRUCTIONS = "vectors of 16 bytes";
INLINE I dot4(I s, B w, I x) {
    typedef Vector<int8_t>::type S;
    for (int i = 0; i < BYTES; i++) s[i / 4] += ((S)w)[i] * ((S)x)[i];
    return s;
}
#endif
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !(defined(__AVX512BW__) && defined(__AVX512VNNI__))
INLINE I dot8(I s, B w, I x) { return now(s + (I)_mm256_madd_epi16((__m256i)w, (__m256i)x)); }
INLINE I widen(I s, I part) { return s + (I)_mm256_madd_epi16((__m256i)part, _mm256_set1_epi16(1)); }
#else
INLINE I dot8(I s, B w, I x) { return dot4(s, w, x); }
INLINE I widen(I s, I part) { return s + part; }
#endif
// What dot8 takes of 4 columns of weights.
INLINE B columns(B w, int half) {
    if (HALVES == 2) return (B)((half ? (I16)w : (I16)w << 8) >> 8);
    return w ^ (uint8_t)BIAS;
}
using Int8 = std::conditional_t<HALVES == 2, int16_t, int8_t>;  // x of dot8
