// AMX, the matrix unit of some x86 CPUs, and matmuls in bfloat16 with it, of bfloat16 weights and of dequantized ones.
//
// An instruction adds to a tile C (16, 16) of float32 the product of a tile A (16, 32) of bfloat16 and a tile B (32, 16), which
// is stored as (16, 16) Pairs of rows; or, in integers, of A (16, 64) and B (64, 16), stored as 16 rows of four bytes of
// each column. It does as much as 256 instructions of AVX-512.
#pragma once

#include "float_matmul.h"
#include "matrix.h"

#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

// Linux requires a process to request tiles before it uses them: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
static const bool has_amx = syscall(SYS_arch_prctl, 0x1023, 18) == 0;

// These are assembly, as GCC's intrinsics do not declare the memory that they read and write.
template <int tile>
INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
INLINE void tile_load(const void *from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(from), "r"(stride) : "memory");
}
template <int tile>
INLINE void tile_store(void *to, int64_t stride = 64) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(to), "r"(stride) : "memory");
}
template <typename T, int c, int a, int b>
INLINE void tile_multiply() {
    if constexpr (std::is_same_v<T, int8_t>) asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
    else asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
INLINE F to_pairs(F first, F second) {
    I16 order;
    for (int i = 0; i < 32; i++) order[i] = i / 2 + i % 2 * 16;
    return (F)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
// Configures the tiles: 0 to 3 as C (rows, 16), 4 and 5 as A (rows, 64 bytes), 6 and 7 as B (16, 64 bytes).
static void begin_tiles(uint8_t rows = 16) {
    const struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16];
    } config{.rows = {rows, rows, rows, rows, rows, rows, 16, 16}};
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
INLINE void tile_store(void *, int64_t = 64) {}
template <typename, int, int, int>
INLINE void tile_multiply() {}
INLINE F to_pairs(F first, F) { return first; }
static void begin_tiles(uint8_t = 16) {}
static void end_tiles() {}
#endif

constexpr int64_t AMX_ROWS = 256;  // rows of x that stay in the L2 cache
constexpr int64_t AMX_K = 128;     // Pairs of columns, of 32 outputs, that stay in the L1 cache

// y (rows, n) = x (rows, in) times the transpose of the weights of n outputs, at most 32, for at most AMX_ROWS rows. Weights
// and x consist of Pairs of columns, which `in` counts: weights are (in, 32), and x is (rows / 32, in / 16, 32, 16). The rows
// that pad the last block may have any values.
static void amx_multiply(const Pair *w, const Pair *x, int64_t in, float *y, int64_t rows, int64_t stride, int64_t n) {
    char *sums = (char *)scratch<COLUMNS>(AMX_ROWS * 32 * sizeof(float));  // of 32 rows, four tiles C
    const int64_t direct = n < 32 ? 0 : rows / 32 * 32;                    // rows whose last sums are stored in y
    for (int64_t k = 0, end; k < in; k = end) {
        end = std::min(k + AMX_K, in);
        for (int64_t r = 0; r < rows; r += 32) {
            char *c = sums + r * 128;
            if (k) tile_load<0>(c, 64), tile_load<1>(c + 1024, 64), tile_load<2>(c + 2048, 64), tile_load<3>(c + 3072, 64);
            else tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
            for (int64_t i = k; i < end; i += 16) {
                const Pair *a = x + r * in + i * 32, *b = w + i * 32;
                tile_load<6>(b, 128), tile_load<4>(a, 64), tile_multiply<BFloat16, 0, 4, 6>();
                tile_load<7>(b + 16, 128), tile_multiply<BFloat16, 1, 4, 7>();
                if (rows - r <= 16) continue;
                tile_load<5>(a + 256, 64), tile_multiply<BFloat16, 2, 5, 6>(), tile_multiply<BFloat16, 3, 5, 7>();
            }
            const bool last = end == in && r < direct;
            float *to = last ? y + r * stride : (float *)c, *below = last ? to + 16 * stride : to + 512;
            const int64_t bytes = last ? stride * sizeof(float) : 64, right = last ? 16 : 256;
            tile_store<0>(to, bytes), tile_store<1>(to + right, bytes);
            tile_store<2>(below, bytes), tile_store<3>(below + right, bytes);
        }
    }
    for (int64_t r = direct; r < rows; r++)
        for (int64_t o = 0; o < 32 && o < n; o += 16) {
            const char *from = sums + (r / 16 * 2 + o / 16) * 1024 + r % 16 * 64;
            memcpy(y + r * stride + o, from, std::min<int64_t>(n - o, 16) * sizeof(float));
        }
}

// Whether AMX computes a matmul in bfloat16. For few rows other kernels are faster, because they do not convert the weights,
// and for int8 weights in groups of 128, amx_int8_kernel is.
static bool uses_amx(const Matrix &m, int64_t rows) {
    const bool integers = m.kind == INT8 && chunk_columns(m) == 128;
    return has_amx && m.kind >= BFLOAT16 && !integers && m.in % 32 == 0 && rows >= (m.kind == BFLOAT16 ? 12 : 32);
}

// The weights of outputs n .. n + 31 as amx_multiply reads them.
static const Pair *amx_weights(const Matrix &m, int64_t n) {
    float *to = (float *)scratch<WEIGHT_TILE>(m.in / 2 * 32 * sizeof(Pair));
    if (m.kind == BFLOAT16) {
        pack_weight_tile((const Pair *)m.weight + n * m.in / 2, m.in / 2, m.in / 2, m.out - n, to);
        return (const Pair *)to;
    }
    const int64_t bits = m.kind == INT8 ? 8 : 4, half = chunk_columns(m) / 2;
    const uint8_t *w = (const uint8_t *)m.weight + n * m.in * bits / 8;
    const Half *scales = m.scale + n * (m.in / m.group), *mins = m.min ? m.min + (scales - m.scale) : nullptr;
    for (int64_t begin = 0; begin < m.in; begin += m.group, scales += TILE_N, mins += mins ? TILE_N : 0) {
        F scale[TILE_V], min[TILE_V];
        for (int v = 0; v < TILE_V; v++) {
            scale[v] = load(scales + v * L);
            min[v] = mins ? load(mins + v * L) : scale[v] * (float)-m.zero;
        }
        const auto dequantize = [&](int64_t k, int v, const auto &q) {  // columns k .. k + 3
            F x[4];
            for (int j = 0; j < 4; j++) x[j] = __builtin_convertvector(q(j), F) * scale[v] + min[v];
            for (int j = 0; j < 4; j += 2) store(to + (k + j) / 2 * TILE_N + v * L, to_pairs(x[j], x[j + 1]));
        };
        for (int64_t k = begin, end = begin + m.group; k < end; bits == 4 && (k + 4) % half == 0 ? k += 4 + half : k += 4)
            for (int v = 0; v < TILE_V; v++, w += BYTES) {
                const U q = load_as<U>(w);
                prefetch(w + 4096);
                if (bits == 8) {
                    dequantize(k, v, [&](int j) { return (I)(q << (24 - 8 * j)) >> 24; });
                } else {
                    dequantize(k, v, [&](int j) { return (I)(q >> 8 * j & 15); });
                    dequantize(k + half, v, [&](int j) { return (I)(q >> (8 * j + 4) & 15); });
                }
            }
    }
    return (const Pair *)to;
}

static void amx_matmul(const Matrix *m, int count, const float *x, float *y, int64_t rows, int64_t out) {
    const int64_t in = m->in / 2;  // in Pairs
    Pair *pairs = (Pair *)scratch<BF16_X>((rows + 31) / 32 * 32 * in * sizeof(Pair));
    parallel_for_rows(rows, m->in, [&](int64_t r) {
        Pair *row = pairs + r / 32 * 32 * in + r % 32 * 16;
        for (int64_t k = 0; k < in; k += 16)
            for (int64_t i = 0; i < 32; i += L) store((BFloat16 *)(row + k * 32) + i, load(x + (r * in + k) * 2 + i));
    });
    for_each_tile(m, count, y, 32, [&](const Matrix &b, float *to, int64_t begin, int64_t end) {
        begin_tiles();
        for (int64_t n = begin * 32; n < std::min(b.out, end * 32); n += 32) {
            const Pair *w = amx_weights(b, n);
            for (int64_t r = 0; r < rows; r += AMX_ROWS)
                amx_multiply(w, pairs + r * in, in, to + r * out + n, std::min(AMX_ROWS, rows - r), out, b.out - n);
        }
        end_tiles();
    });
}
