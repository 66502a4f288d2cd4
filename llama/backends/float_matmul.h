// Matmuls of floats: y (rows, out) = x (rows, in) times the transpose of w (out, in), in float32, float16 or bfloat16.
// Where the CPU has a dot product of bfloat16 (HAS_DOT2), w and x consist of Pairs, and `in` counts Pairs: a lane holds two
// bfloat16 instead of a float32.
//
// For up to DOT_MAX_ROWS rows, as in decode steps, memory bandwidth is the limit, or close to it: weights are read once, in
// place, and each output is a dot product. More rows, as in prefill, are a blocked GEMM: blocks of weights are packed into
// tiles that stay in the L2 cache, and a micro-kernel accumulates outer products in registers.
#pragma once

#include "threads.h"
#include "vector.h"

constexpr int FLOAT_N = FLOAT_V * L;  // outputs of a tile of packed weights

template <int n>
constexpr std::integral_constant<int, n> constant{};

// Splits rows r .. rows - 1 into blocks of constant sizes R, the largest of `most`, and calls work(constant<R>, r). The last
// block may have up to `spare` rows too many, which stand for the last row: fewer blocks are faster.
template <int most, int spare = 0, typename Work>
INLINE void for_blocks(int64_t r, int64_t rows, const Work &work) {
    constexpr int next = most > 8 ? 8 : most > 4 ? 4 : most / 2;
    for (; r + std::max(most - spare, next + 1) <= rows; r += most) work(std::integral_constant<int, most>(), r);
    if constexpr (most > 1) for_blocks<next, spare>(r, rows, work);
}

// The micro-kernels below compute O outputs of R rows, and store output o of row r in y[o * y_stride + r]. The outputs are
// `output_stride` apart in the matrix, so that each reads a long sequential stream of weights: a core keeps more cache lines
// in flight when it reads several streams.

// Prefetches the weights of O outputs 2 KiB ahead of column k.
template <int O, typename T>
INLINE void prefetch_rows(const T *w, int64_t in, int64_t output_stride, int64_t k) {
    for (int o = 0; o < O && k * sizeof(T) % 64 == 0; o++) prefetch(w + o * output_stride * in + k + 2048 / sizeof(T));
}

// Micro-kernel of R rows x O outputs: dot products along the columns, summed across lanes at the end. x is packed by
// blocks of L columns (in / L, R, L).
template <int R, int O, typename T>
static void dot_kernel(const T *w, int64_t in, int64_t output_stride, const float *x, float *y, int64_t y_stride) {
    F total[R][O] = {};
    for (int64_t k = 0; k < in; k += L, x += R * L) {
        prefetch_rows<O>(w, in, output_stride, k);
        F weights[O];
        for (int o = 0; o < O; o++) weights[o] = in_register(load(w + o * output_stride * in + k));
        for (int r = 0; r < R; r++) {
            const F row = in_register(load(x + r * L));
            for (int o = 0; o < O; o++) total[r][o] = multiply_add<T>(total[r][o], weights[o], row);
        }
    }
#pragma GCC unroll 8
    for (int begin = 0; begin < R * O; begin += L) {
        F sums[L] = {};
#pragma GCC unroll 16
        for (int i = 0; i < L; i++)
            if (begin + i < R * O) sums[i] = total[(begin + i) % R][(begin + i) / R];
        const F result = sum_each(sums);
#pragma GCC unroll 16
        for (int i = 0; i < L; i++)
            if (begin + i < R * O) y[(begin + i) / R * y_stride + (begin + i) % R] = result[i];
    }
}

// Micro-kernel of V VECTOR_ROWS rows x O outputs. A vector of x holds ROW_LANES columns of VECTOR_ROWS rows, and weights
// are broadcast: x is packed by blocks of ROW_LANES columns (in / ROW_LANES, V VECTOR_ROWS, ROW_LANES). With float32
// weights it reads O streams as fast as for one row, while dot products would have registers for three.
constexpr int VECTOR_ROWS = std::min(L, 8), ROW_LANES = L / VECTOR_ROWS;
template <int V, int O, typename T>
static void interleaved_kernel(const T *w, int64_t in, int64_t output_stride, const float *x, float *y, int64_t y_stride) {
    F total[O][V] = {};
    for (int64_t k = 0; k < in; k += L) {
        prefetch_rows<O>(w, in, output_stride, k);
        float converted[O * L];
        for (int o = 0; o < O; o++) store(converted + o * L, load(w + o * output_stride * in + k));
        for (int i = 0; i < VECTOR_ROWS; i++, x += V * L) {
            F rows[V];
            for (int v = 0; v < V; v++) rows[v] = in_register(load(x + v * L));
            for (int o = 0; o < O; o++) {
                const F weight = broadcast<ROW_LANES>(converted + o * L + i * ROW_LANES);
                for (int v = 0; v < V; v++) total[o][v] = multiply_add<T>(total[o][v], weight, rows[v]);
            }
        }
    }
    for (int o = 0; o < O; o++)
        for (int v = 0; v < V; v++)
            for (int r = 0; r < VECTOR_ROWS; r++) {
                float sum = 0;
                for (int i = 0; i < ROW_LANES; i++) sum += total[o][v][r * ROW_LANES + i];
                y[o * y_stride + v * VECTOR_ROWS + r] = sum;
            }
}

// Micro-kernel of R rows x V vectors of outputs: K outer products, y = x w, or y += x w if `accumulate`. w (K, V L) is a
// tile of packed weights, whose rows have stride `w_stride`.
template <int R, int V, typename T = float>
static void outer_product_kernel(const float *w, int64_t w_stride, const float *x, int64_t x_stride, float *y,
                                 int64_t y_stride, int64_t K, bool accumulate) {
    F total[R][V];  // accumulators, in registers if all loops over them are unrolled
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) total[r][v] = accumulate ? load(y + r * y_stride + v * L) : F{};
    for (int64_t k = 0; k < K; k++, w += w_stride) {
        F weights[V];
        for (int v = 0; v < V; v++) weights[v] = load(w + v * L);
        for (int r = 0; r < R; r++) {
            const F row = broadcast<1>(x + r * x_stride + k);
            for (int v = 0; v < V; v++) total[r][v] = multiply_add<T>(total[r][v], weights[v], row);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) store(y + r * y_stride + v * L, total[r][v]);
}

// Packs rows w (n, K) with stride `stride`, transposed, into a tile (K, FLOAT_N); the last row repeats if n < FLOAT_N.
template <typename T>
static void pack_weight_tile(const T *w, int64_t stride, int64_t K, int64_t n, float *to) {
    for (int v = 0; v < FLOAT_V; v++)
        for (int64_t k = 0; k < K; k += L) {
            F x[L];
            for (int i = 0; i < L; i++) x[i] = load(w + std::min<int64_t>(v * L + i, n - 1) * stride + k);
            transpose(x);
            for (int i = 0; i < L; i++) store(to + (k + i) * FLOAT_N + v * L, x[i]);
        }
}

constexpr int64_t DOT_MAX_ROWS = 64;  // more rows are a blocked GEMM
constexpr int64_t DOT_N = 6;          // the most outputs of a micro-kernel of dot products
constexpr int64_t BLOCK_N = 2 * FLOAT_N;  // outputs whose packed weights stay in the L2 cache
// Columns of a blocked GEMM: as many as possible, as each block reads and writes y.
static int64_t block_columns(int64_t in) {
    constexpr int64_t most = 2048;
    const int64_t blocks = (in + most - 1) / most;
    return (in / L + blocks - 1) / blocks * L;
}
template <typename T>
constexpr bool ODD_BF16 = HAS_DOT2 && std::is_same_v<T, BFloat16>;  // columns are not whole vectors of Pairs, which is rare
template <typename T>
constexpr int GROUP_ROWS =  // the most rows of a micro-kernel, where there are up to DOT_MAX_ROWS
    ODD_BF16<T> ? 1 : sizeof(T) == 4 || L > VECTOR_ROWS ? 2 * VECTOR_ROWS : DOT_ROWS;
template <typename T, int R>
constexpr bool IS_INTERLEAVED = R == 2 * VECTOR_ROWS || (sizeof(T) == 4 && R == VECTOR_ROWS);  // by interleaved_kernel

// Packs row r of x by blocks of columns, (in / block, rows, block). x is then one sequential stream.
template <int64_t block>
INLINE void pack_row(const float *row, int64_t r, int64_t rows, int64_t in, float *to) {
    for (int64_t k = 0; k < in; k += block) memcpy(to + k * rows + r * block, row + k, block * sizeof(float));
}

// x packed for the two functions below; valid until the next call.
template <typename T>
static const float *pack_x(const float *x, int64_t rows, int64_t in) {
    if constexpr (std::is_same_v<T, Pair>) {
        Pair *pairs = (Pair *)scratch<BF16_X>(rows * in * sizeof(Pair));
        parallel_for_rows(rows, in, [&](int64_t r) {
            for (int64_t k = 0; k < 2 * in; k += L) store((BFloat16 *)(pairs + r * in) + k, load(x + 2 * r * in + k));
        });
        x = (const float *)pairs;
    }
    if (rows == 1) return x;
    const int64_t block = block_columns(in), size = (in / block + 1) * (block + L);
    float *to = (float *)scratch<PACKED_X>((rows + GROUP_ROWS<T>) * size * sizeof(float));
    if (rows > DOT_MAX_ROWS)  // padded, as rows whose stride is a power of two would map to a few sets of the L1 cache
        parallel_for_rows(rows, in, [&](int64_t r) {
            for (int64_t k = 0; k < in; k += block)
                memcpy(to + (k / block * rows + r) * (block + L), x + r * in + k, std::min(block, in - k) * sizeof(float));
        });
    else
        for_blocks<GROUP_ROWS<T>, FLOAT_SPARE>(0, rows, [&](auto R, int64_t r) {
            for (int i = 0; i < R; i++)
                pack_row<IS_INTERLEAVED<T, R> ? ROW_LANES : L>(x + std::min(r + i, rows - 1) * in, i, R, in, to + r * in);
        });
    return to;
}

// Outputs begin .. end - 1 of up to DOT_MAX_ROWS rows. They are stored as columns (outputs, rows) first, and then
// transposed: otherwise a micro-kernel would write each of its numbers to another cache line.
template <typename T>
static void dot_matmul(const T *w, int64_t in, const float *x, float *y, int64_t rows, int64_t stride, int64_t begin,
                        int64_t end) {
    const int64_t padded = rows == 1 ? 1 : rows + FLOAT_SPARE;
    float *columns = rows == 1 ? y + begin : (float *)scratch<COLUMNS>((end - begin) * padded * sizeof(float));
    const auto block = [&](int64_t n, int64_t outputs, int64_t output_stride) {  // outputs n, n + output_stride, ..
        for_blocks<GROUP_ROWS<T>, FLOAT_SPARE>(0, rows, [&](auto R, int64_t r) {
            constexpr int accumulators = IS_INTERLEAVED<T, R> ? (BYTES == 64 ? 24 : 12) * VECTOR_ROWS : 3 * DOT_ROWS;
            constexpr int most = std::min<int>(DOT_N, accumulators / R);  // outputs whose accumulators are in registers
            const auto kernel = [&](auto O, int64_t o) {
                const int64_t first = n + o * output_stride;
                const T *from = w + first * in;
                float *to = columns + (first - begin) * padded + r;
                if constexpr (IS_INTERLEAVED<T, R>)
                    interleaved_kernel<R / VECTOR_ROWS, O>(from, in, output_stride, x + r * in, to, output_stride * padded);
                else dot_kernel<R, O>(from, in, output_stride, x + r * in, to, output_stride * padded);
            };
            int64_t o = 0;
            for (; o + most <= outputs; o += most) kernel(constant<most>, o);
            for (; o < outputs; o++) kernel(constant<1>, o);
        });
    };
    const int64_t stream = (end - begin) / DOT_N, last = begin + stream * DOT_N;  // outputs of each of DOT_N streams
    for (int64_t n = begin; n < begin + stream; n++) block(n, DOT_N, stream);
    block(last, end - last, 1);
    for (int64_t r = 0; r < rows && rows > 1; r++)
        for (int64_t n = begin; n < end; n++) y[r * stride + n] = columns[(n - begin) * padded + r];
}

// Outputs begin .. end - 1 of more rows. x is (blocks, rows, block + L), with L columns of padding. Weights are packed by
// transposing, so that no sum needs to be taken across lanes.
template <typename T>
static void blocked_matmul(const T *w, int64_t in, const float *x, float *y, int64_t rows, int64_t stride, int64_t begin,
                          int64_t end) {
    const int64_t block = block_columns(in);
    float *tiles = (float *)scratch<WEIGHT_TILE>(BLOCK_N * block * sizeof(float)), last[FLOAT_ROWS * FLOAT_N];
    for (int64_t n = begin; n < end; n += BLOCK_N)
        for (int64_t k = 0; k < in; k += block) {
            const int64_t K = std::min(block, in - k), stop = std::min(end, n + BLOCK_N);
            for (int64_t m = n; m < stop; m += FLOAT_N)
                pack_weight_tile(w + m * in + k, in, K, end - m, tiles + (m - n) * block);
            for_blocks<FLOAT_ROWS>(0, rows, [&](auto R, int64_t r) {
                const float *from = x + (k / block * rows + r) * (block + L), *tile = tiles;
                float *to = y + r * stride + n;
                int64_t m = n;
                for (; m + FLOAT_N <= stop; m += FLOAT_N, tile += FLOAT_N * block, to += FLOAT_N)
                    outer_product_kernel<R, FLOAT_V, T>(tile, FLOAT_N, from, block + L, to, stride, K, k > 0);
                if (m == stop) return;
                outer_product_kernel<R, FLOAT_V, T>(tile, FLOAT_N, from, block + L, last, FLOAT_N, K, false);
                for (int i = 0; i < R; i++)
                    for (int64_t o = 0; o < stop - m; o++)
                        to[i * stride + o] = last[i * FLOAT_N + o] + (k ? to[i * stride + o] : 0);
            });
        }
}
