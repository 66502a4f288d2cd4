// Matmuls of bfloat16 with AMX, the matrix unit of some x86 CPUs. An instruction adds to a tile C (16, 16) of float32 the
// product of a tile A (16, 32) of bfloat16 and a tile B (32, 16), which is stored as (16, 16) Pairs of rows: as much as
// 256 instructions of AVX512-BF16.
#pragma once

#include "threads.h"

#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

// Linux allows tiles to a process that has asked: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
static const bool has_amx = syscall(SYS_arch_prctl, 0x1023, 18) == 0;

// Compilers' intrinsics do not tell that tiles read and write memory.
template <int tile>
INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
INLINE void tile_load(const void *from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(from), "r"(stride) : "memory");
}
template <int tile>
INLINE void tile_store(void *to) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(to), "r"((int64_t)64) : "memory");
}
template <int c, int a, int b>
INLINE void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
INLINE F to_pairs(F first, F second) {
    I16 order;
    for (int i = 0; i < 32; i++) order[i] = i / 2 + i % 2 * 16;
    return (F)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
static void begin_tiles() {
    const struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
}
static void end_tiles() { asm volatile("tilerelease"); }
#else
constexpr bool has_amx = false;
template <int>
INLINE void tile_zero() {}
template <int>
INLINE void tile_load(const void *, int64_t) {}
template <int>
INLINE void tile_store(void *) {}
template <int, int, int>
INLINE void tile_multiply() {}
INLINE F to_pairs(F first, F) { return first; }
static void begin_tiles() {}
static void end_tiles() {}
#endif

constexpr int64_t AMX_ROWS = 256;  // rows of x that stay in the L2 cache
constexpr int64_t AMX_K = 128;     // Pairs of columns, of 32 outputs, that stay in the L1 cache

// y (rows, n) = x (rows, in) times the transpose of the weights of n outputs, at most 32, for at most AMX_ROWS rows. Weights
// and x consist of Pairs of columns, which `in` counts: weights are (in, 32), and x is (rows / 32, in / 16, 32, 16), with any
// values in the rows that are missing in the last block.
static void amx_multiply(const Pair *w, const Pair *x, int64_t in, float *y, int64_t rows, int64_t stride, int64_t n) {
    char *sums = (char *)scratch<COLUMNS>(AMX_ROWS * 32 * sizeof(float));  // of 32 rows, four tiles C
    for (int64_t k = 0; k < in; k += AMX_K)
        for (int64_t r = 0; r < rows; r += 32) {
            char *c = sums + r * 128;
            if (k) tile_load<0>(c, 64), tile_load<1>(c + 1024, 64), tile_load<2>(c + 2048, 64), tile_load<3>(c + 3072, 64);
            else tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
            for (int64_t i = k; i < std::min(k + AMX_K, in); i += 16) {
                const Pair *a = x + r * in + i * 32, *b = w + i * 32;
                tile_load<6>(b, 128), tile_load<4>(a, 64), tile_multiply<0, 4, 6>();
                tile_load<7>(b + 16, 128), tile_multiply<1, 4, 7>();
                if (rows - r > 16) tile_load<5>(a + 256, 64), tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
            }
            tile_store<0>(c), tile_store<1>(c + 1024), tile_store<2>(c + 2048), tile_store<3>(c + 3072);
        }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < 32 && o < n; o += 16) {
            const char *from = sums + (r / 16 * 2 + o / 16) * 1024 + r % 16 * 64;
            if (n - o >= 16) memcpy(y + r * stride + o, from, 64);
            else memcpy(y + r * stride + o, from, (n - o) * sizeof(float));
        }
}
