// Matmuls of quantized matrices with the CPU's dot products of 8-bit integers, or AMX's.
//
// A product w x is a sum over chunks of columns: scale_w scale_x (q n) + min_w x, where q n is a dot product of integers.
// x = scale_x n is quantized first (quantized_rows.h); its outliers add the products of their high bytes.
#pragma once

#include "amx.h"
#include "quantized_rows.h"

constexpr int64_t BLOCK_M = 96;  // rows of x that are multiplied with a tile while they stay in the L2 cache
constexpr int64_t AHEAD = 6144;  // bytes to prefetch ahead: 1.5 pages are faster than whole pages
constexpr bool ALWAYS_PREFETCH = BYTES == 64;  // with AVX-512, a branch around prefetches makes reading up to 10 % slower

// Dot products of a chunk of columns: R rows of x with V vectors of outputs of a tile. Weights `ahead` bytes further are
// prefetched; 0 if the weights are cached.
template <int chunk, int R, int V>
INLINE void chunk_dots_int8(const uint8_t *w, int64_t ahead, const QuantizedRow *x, int64_t begin, I (&dots)[R][V]) {
    constexpr int unroll = BYTES == 64 && R > 1 ? 4 : 1;  // the fastest, as below for int4
    for (int first = 0; first < chunk / 4; first += unroll)
#pragma GCC unroll 4
        for (int k = first; k < first + unroll; k++, w += TILE_N * 4) {
            for (int i = 0; (ALWAYS_PREFETCH || ahead) && i < V * BYTES; i += 64) prefetch(w + i + ahead);
            for (int half = 0; half < HALVES; half++) {
                B weights[V];
                for (int v = 0; v < V; v++) weights[v] = int8_operand(load_as<B>(w + v * BYTES), half);
                for (int r = 0; r < R; r++) {
                    const I row = splat(load_as<int32_t>((const int32_t *)x[r].low + (begin / 4 + k) * HALVES + half));
                    for (int v = 0; v < V; v++) dots[r][v] = dot_int8(dots[r][v], weights[v], row);
                }
            }
        }
}
template <int chunk, int R, int V>
INLINE void chunk_dots_int4(const uint8_t *w, int64_t ahead, const QuantizedRow *x, int64_t begin, I (&dots)[R][V]) {
    I part[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) part[r][v] = HALVES == 2 ? I{} : dots[r][v];
#pragma GCC unroll BYTES == 64 ? 1 : 4
    for (int t = 0; t < chunk / 8; t++, w += TILE_N * 4) {
        for (int i = 0; (ALWAYS_PREFETCH || ahead) && i < V * BYTES; i += 64) prefetch(w + i + ahead);
        for (int half = 0; half < 2; half++) {
            B weights[V];
            for (int v = 0; v < V; v++) {
                const B nibbles = load_as<B>(w + v * BYTES);
                weights[v] = (half ? (B)((I16)nibbles >> 4) : nibbles) & 15;
            }
            for (int r = 0; r < R; r++) {
                const I row = splat(load_as<int32_t>((const int8_t *)x[r].low + begin + half * chunk / 2 + 4 * t));
                for (int v = 0; v < V; v++) part[r][v] = dot_int4(part[r][v], weights[v], row);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) dots[r][v] = HALVES == 2 ? widen_add(dots[r][v], part[r][v]) : part[r][v];
}

// Micro-kernel: computes R rows of a tile's outputs, and stores the first n of each of the first `rows` rows. `cold`: the
// weights are not cached yet and are prefetched.
template <int R, int bits, int chunk>
__attribute__((noinline)) static void int_kernel(const Matrix &m, int64_t tile, const QuantizedRow *x, int64_t rows,
                                                 float *y, int64_t stride, int64_t n, bool cold) {
    constexpr int V = TILE_V;
    const int64_t ahead = cold ? AHEAD : 0;
    const uint8_t *w = (const uint8_t *)m.weight + tile * TILE_N * m.in * bits / 8;
    const Half *mins = m.min ? m.min : m.scale;     // times 0
    int64_t at = tile * (m.in / m.group) * TILE_N;  // of the group's scales
    F total[R][V] = {};
    for (int64_t k = 0, c = 0, end = m.group; k < m.in; c++, w += TILE_N * chunk * bits / 8) {
        constexpr int W = BYTES == 32 && R * V > 12 ? 1 : V;  // vectors whose accumulators are in registers
        for (int first = 0; first < V; first += W) {
            I dots[R][W];
            for (int r = 0; r < R; r++)
                for (int v = 0; v < W; v++) dots[r][v] = splat(x[r].init[c]);
            if constexpr (bits == 8) chunk_dots_int8<chunk>(w + first * BYTES, ahead, x, k, dots);
            else chunk_dots_int4<chunk>(w, ahead, x, k, dots);
            F scale[W];
            for (int v = 0; v < W; v++) scale[v] = load(m.scale + at + (first + v) * L);
            for (int r = 0; r < R; r++)
                for (int v = 0; v < W; v++)
                    total[r][first + v] += __builtin_convertvector(dots[r][v], F) * (splat(x[r].scale[c]) * scale[v]);
        }
        if (bits == 4 || m.min)  // in int4, a branch would cost more
            for (int v = 0; v < V; v++) {
                const F min = load(mins + at + v * L);
                for (int r = 0; r < R; r++) total[r][v] += min * x[r].sum[c];
            }
        if ((k += chunk) == end) at += TILE_N, end += m.group;
    }
    for (int r = 0; r < R && r < rows; r++)
        if (n >= V * L)
            for (int v = 0; v < V; v++) store(y + r * stride + v * L, total[r][v]);
        else if (n > 0)
            memcpy(y + r * stride, total[r], n * sizeof(float));
}

// The same with AMX, for int8 weights, chunks of 128 columns and `rows` rows of x: 32, or up to 16.
template <bool is_32>
__attribute__((noinline)) static void amx_int8_kernel(const Matrix &m, int64_t tile, const QuantizedRow *x, int rows,
                                                      float *y, int64_t stride, int64_t n) {
    const int64_t x_stride = x[1].low - x[0].low;
    const uint8_t *w = (const uint8_t *)m.weight + tile * TILE_N * m.in;
    int64_t at = tile * (m.in / m.group) * TILE_N;  // of the group's scales
    F total[is_32 ? 32 : 16][2] = {};
    I dots[2][2][16];  // the tiles C: of each 16 rows, two of 16 outputs
    for (int64_t k = 0, c = 0, end = m.group; k < m.in; c++) {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        for (const char *a = x->low + k; a < x->low + k + 128; a += 64, w += 64 * TILE_N) {
            for (int i = 0; i < 64 * TILE_N; i += 64) prefetch(w + i + AHEAD);
            tile_load<6>(w, 128), tile_load<4>(a, x_stride), tile_multiply<int8_t, 0, 4, 6>();
            tile_load<7>(w + 64, 128), tile_multiply<int8_t, 1, 4, 7>();
            if (!is_32) continue;
            tile_load<5>(a + 16 * x_stride, x_stride), tile_multiply<int8_t, 2, 5, 6>(), tile_multiply<int8_t, 3, 5, 7>();
        }
        tile_store<0>(dots[0][0]), tile_store<1>(dots[0][1]);
        if (is_32) tile_store<2>(dots[1][0]), tile_store<3>(dots[1][1]);
        F scale[2], min[2] = {};
        for (int v = 0; v < 2; v++) {
            scale[v] = load(m.scale + at + v * L);
            if (m.min) min[v] = load(m.min + at + v * L);
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < 2; v++)
                total[r][v] += __builtin_convertvector(dots[r / 16][v][r % 16], F) * (splat(x[r].scale[c]) * scale[v]);
        for (int r = 0; r < rows && m.min; r++)
            for (int v = 0; v < 2; v++) total[r][v] += min[v] * x[r].sum[c];
        if ((k += 128) == end) at += TILE_N, end += m.group;
    }
    for (int r = 0; r < rows; r++)
        if (n >= TILE_N) memcpy(y + r * stride, total[r], TILE_N * sizeof(float));
        else memcpy(y + r * stride, total[r], n * sizeof(float));
}

// Adds the products of the weights and the high bytes of x to n outputs y of a tile.
template <int bits>
__attribute__((noinline)) static void add_outliers(const Matrix &m, int64_t tile, const QuantizedRow &x, float *y,
                                                   int64_t n) {
    const uint8_t *weight = (const uint8_t *)m.weight + tile * m.in * TILE_N * bits / 8;
    const Half *scales = m.scale + tile * (m.in / m.group) * TILE_N;
    F total[TILE_V] = {};
    for (const Outliers *of = x.outliers; of < x.outliers + x.n_outliers; of++)
        for (int v = 0; v < TILE_V; v++) {
            const B w = load_as<B>(weight + of->offset + v * BYTES);
            I dots = splat(of->init);
            if constexpr (bits == 8) dots = dot_int8(dots, int8_operand(w, 0), splat(of->high));
            else dots = widen_add(dots, dot_int4(I{}, (B)((I16)w >> of->shift) & 15, splat(of->high)));
            const F scale = load(scales + of->group * TILE_N + v * L);
            total[v] += __builtin_convertvector(dots, F) * (splat(of->scale) * scale);
        }
    const float *sum = (const float *)total;
    for (int64_t j = 0; j < std::min<int64_t>(n, TILE_N); j++) y[j] += sum[j];
}

// Outputs of tiles begin .. end - 1 of a quantized matrix.
template <int bits, int chunk>
static void int_matmul(const Matrix &m, const QuantizedRow *row, float *y, int64_t rows, int64_t stride, int64_t begin,
                       int64_t end) {
    constexpr auto most = bits == 8 ? INT8_ROWS : INT4_ROWS;
    const bool amx = has_amx && bits == 8 && chunk == 128 && rows > 8;
    const int64_t block = amx ? rows : BLOCK_M;
    if (amx) begin_tiles(std::min<int64_t>(rows, 16));
    for (int64_t r0 = 0; r0 < rows; r0 += block)
        for (int64_t tile = begin, last = std::min(rows, r0 + block); tile < end; tile++) {
            const int64_t left = m.out - tile * TILE_N;
            float *to = y + tile * TILE_N;
            const auto kernel = [&](auto R, int64_t r) {
                int_kernel<R, bits, chunk>(m, tile, row + r, last - r, to + r * stride, stride, left, r == 0);
            };
            if (amx)
                for (int64_t r = 0, n; r < rows; r += n) {
                    n = rows >= 32 && rows - r > 16 ? 32 : std::min<int64_t>(rows, 16);
                    const int64_t from = std::min(r, rows - n);  // the last block may repeat rows of the one before
                    const auto multiply = n == 32 ? amx_int8_kernel<true> : amx_int8_kernel<false>;
                    multiply(m, tile, row + from, n, to + from * stride, stride, left);
                }
            else if (rows > DOT_MAX_ROWS) for_blocks<most[1]>(r0, last, kernel);
            else for_blocks<most[0], INT_SPARE>(r0, last, kernel);
            for (int64_t r = r0; r < last; r++)
                if (row[r].n_outliers) add_outliers<bits>(m, tile, row[r], to + r * stride, left);
        }
    if (amx) end_tiles();
}
constexpr decltype(&int_matmul<8, 16>) INT8_MATMULS[] = {int_matmul<8, 16>, int_matmul<8, 32>, int_matmul<8, 64>,
                                                         int_matmul<8, 128>},
                                       INT4_MATMULS[] = {int_matmul<4, 16>, int_matmul<4, 32>};
