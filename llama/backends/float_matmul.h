// Matmuls of floats: y (rows, out) = x (rows, in) times the transpose of w (out, in), in float32, float16 or bfloat16.
// Where the CPU has a dot product of two bfloat16 (PAIRS), w and x are `in` Pairs: a lane holds one instead of a float.
#pragma once

#include "threads.h"
#include "vector.h"

constexpr int FLOAT_N = FLOAT_V * L;  // outputs of a tile

template <int n>
constexpr std::integral_constant<int, n> number{};

// Calls work(integral_constant<R>, r) for rows from r on, up to `most` at a time.
template <int most, typename Work>
INLINE void in_steps(int64_t r, int64_t rows, const Work &work) {
    for (; r + most <= rows; r += most) work(std::integral_constant<int, most>(), r);
    if constexpr (most > 1) in_steps<(most > 8 ? 8 : most > 4 ? 4 : most / 2)>(r, rows, work);
}

// The same, but the last six or seven rows pass as a group of eight, which takes the last row again: that is faster.
template <int most, typename Work>
INLINE void in_groups(int64_t r, int64_t rows, const Work &work) {
    for (; r + (most == 8 ? 6 : most) <= rows; r += most) work(std::integral_constant<int, most>(), r);
    if constexpr (most > 1) in_groups<(most > 8 ? 8 : most > 4 ? 4 : most / 2)>(r, rows, work);
}

// Where a kernel stores its outputs. They are `apart`, so that each reads one long stream of weights: a core keeps more
// cache lines in flight when it reads several. Rows behind the last are the last again.
struct Outputs {
    float *y;
    int64_t stride, apart, last;
    float &at(int64_t row, int64_t output) const { return y[std::min(row, last) * stride + output * apart]; }
};

// Fetches what comes behind column k of the weights of O outputs.
template <int O, typename T>
INLINE void prefetch_rows(const T *w, int64_t in, int64_t apart, int64_t k) {
    for (int o = 0; o < O && k * sizeof(T) % 64 == 0; o++) prefetch(w + o * apart * in + k + 2048 / sizeof(T));
}

// O outputs of R rows by dot products. x comes by blocks of L columns (in / L, R, L).
template <int R, int O, typename T>
static void dot_rows(const T *w, int64_t in, const float *x, const Outputs &to) {
    F total[R][O] = {};
    for (int64_t k = 0; k < in; k += L, x += R * L) {
        prefetch_rows<O>(w, in, to.apart, k);
        F weights[O];
        for (int o = 0; o < O; o++) weights[o] = in_register(load(w + o * to.apart * in + k));
        for (int r = 0; r < R; r++) {
            const F row = in_register(load(x + r * L));
            for (int o = 0; o < O; o++) total[r][o] = add_product<T>(total[r][o], weights[o], row);
        }
    }
#pragma GCC unroll 8
    for (int begin = 0; begin < R * O; begin += L) {
        F some[L] = {};
#pragma GCC unroll 16
        for (int i = 0; i < L; i++)
            if (begin + i < R * O) some[i] = total[(begin + i) / O][(begin + i) % O];
        const F found = sums(some);
#pragma GCC unroll 16
        for (int i = 0; i < L; i++)
            if (begin + i < R * O) to.at((begin + i) / O, (begin + i) % O) = found[i];
    }
}

// O outputs of V SIDE rows, SIDE side by side in a vector, by blocks of WIDE columns (in / WIDE, V SIDE, WIDE). With
// float32 weights this reads O streams as fast as for one row, where dot products have registers for three.
constexpr int SIDE = std::min(L, 8), WIDE = L / SIDE;
template <int V, int O, typename T>
static void interleaved_rows(const T *w, int64_t in, const float *x, const Outputs &to) {
    F total[O][V] = {};
    for (int64_t k = 0; k < in; k += L) {
        prefetch_rows<O>(w, in, to.apart, k);
        float near[O * L];
        for (int o = 0; o < O; o++) store(near + o * L, load(w + o * to.apart * in + k));
        for (int i = 0; i < SIDE; i++, x += V * L) {
            F rows[V];
            for (int v = 0; v < V; v++) rows[v] = in_register(load(x + v * L));
            for (int o = 0; o < O; o++) {
                const F weight = broadcast<WIDE>(near + o * L + i * WIDE);
                for (int v = 0; v < V; v++) total[o][v] = add_product<T>(total[o][v], weight, rows[v]);
            }
        }
    }
    for (int o = 0; o < O; o++)
        for (int r = 0; r < V * SIDE; r++) {
            float sum = 0;
            for (int i = 0; i < WIDE; i++) sum += total[o][r / SIDE][r % SIDE * WIDE + i];
            to.at(r, o) = sum;
        }
}

// V vectors of outputs of R rows: y (+)= x w, with w (K, V L), whose rows are `width` apart.
template <int R, int V, typename T = float>
static void outer_rows(const float *w, int64_t width, const float *x, int64_t in, float *y, int64_t stride, int64_t K,
                       bool add) {
    F total[R][V];  // in registers if all loops over it are unrolled
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) total[r][v] = add ? load(y + r * stride + v * L) : F{};
    for (int64_t k = 0; k < K; k++, w += width) {
        F weights[V];
        for (int v = 0; v < V; v++) weights[v] = load(w + v * L);
        for (int r = 0; r < R; r++) {
            const F row = broadcast<1>(x + r * in + k);
            for (int v = 0; v < V; v++) total[r][v] = add_product<T>(total[r][v], weights[v], row);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) store(y + r * stride + v * L, total[r][v]);
}

// Rows w (n, K), which are `stride` apart, as columns of a tile (K, FLOAT_N); the last row again where n is smaller.
template <typename T>
static void transpose_tile(const T *w, int64_t stride, int64_t K, int64_t n, float *to) {
    for (int v = 0; v < FLOAT_V; v++)
        for (int64_t k = 0; k < K; k += L) {
            F x[L];
            for (int i = 0; i < L; i++) x[i] = load(w + std::min<int64_t>(v * L + i, n - 1) * stride + k);
            transpose(x);
            for (int i = 0; i < L; i++) store(to + (k + i) * FLOAT_N + v * L, x[i]);
        }
}

constexpr int64_t FEW = 32, DOT_N = 6;              // rows by dot products, outputs of a block of theirs
constexpr int64_t DEEP = 256, BLOCK = 4 * FLOAT_N;  // a tile (DEEP, FLOAT_N) is read from the L2 cache, x from the L1 cache
template <typename T>
constexpr bool RARE = PAIRS && std::is_same_v<T, BFloat16>;  // rows that are not whole vectors of Pairs
template <typename T>
constexpr int MOST = RARE<T> ? 1 : sizeof(T) == 4 || L > SIDE ? 2 * SIDE : DOT_ROWS;  // a few rows pass in groups of these
template <typename T, int R>
constexpr bool IS_SIDE = R == 2 * SIDE || (sizeof(T) == 4 && R == SIDE);  // such a group by interleaved_rows

// Row r of x by blocks of columns, (in / deep, rows, deep). A core reads x as one stream then; rows a power of two apart
// would share a few lines of its L1 cache.
template <int64_t deep>
INLINE void by_columns(const float *row, int64_t r, int64_t rows, int64_t in, float *to) {
    for (int64_t k = 0; k < in; k += deep) {
        const int64_t K = deep > L ? std::min(deep, in - k) : deep;
        memcpy(to + k * rows + r * K, row + k, K * sizeof(float));
    }
}

// x as the two functions below take it, valid until the next call.
template <typename T>
static const float *pack_x(const float *x, int64_t rows, int64_t in) {
    if constexpr (std::is_same_v<T, Pair>) {
        Pair *pairs = (Pair *)scratch<NARROW>(rows * in * sizeof(Pair));
        each_row(rows, in, [&](int64_t r) {
            for (int64_t k = 0; k < 2 * in; k += L) store((BFloat16 *)(pairs + r * in) + k, load(x + 2 * r * in + k));
        });
        x = (const float *)pairs;
    }
    if (rows == 1) return x;
    float *to = (float *)scratch<COLUMNS>((rows + MOST<T>) * in * sizeof(float));
    if (rows > FEW)
        each_row(rows, in, [&](int64_t r) { by_columns<DEEP>(x + r * in, r, rows, in, to); });
    else
        in_groups<MOST<T>>(0, rows, [&](auto R, int64_t r) {
            for (int i = 0; i < R; i++)
                by_columns<IS_SIDE<T, R> ? WIDE : L>(x + std::min(r + i, rows - 1) * in, i, R, in, to + r * in);
        });
    return to;
}

// Outputs from `begin` to `end` of a few rows.
template <typename T>
static void dot_outputs(const T *w, int64_t in, const float *x, float *y, int64_t rows, int64_t stride, int64_t begin,
                        int64_t end) {
    const auto block = [&](int64_t n, int64_t outputs, int64_t apart) {  // all rows of outputs n, n + apart, ..
        in_groups<MOST<T>>(0, rows, [&](auto R, int64_t r) {
            constexpr int vectors = IS_SIDE<T, R> ? (BYTES == 64 ? 24 : 12) * SIDE : 3 * DOT_ROWS;  // of sums, in registers
            constexpr int most = std::min<int>(DOT_N, vectors / R);
            const auto some = [&](auto O, int64_t o) {
                const T *from = w + (n + o * apart) * in;
                const Outputs to{y + r * stride + n + o * apart, stride, apart, rows - 1 - r};
                if constexpr (IS_SIDE<T, R>) interleaved_rows<R / SIDE, O>(from, in, x + r * in, to);
                else dot_rows<R, O>(from, in, x + r * in, to);
            };
            int64_t o = 0;
            for (; o + most <= outputs; o += most) some(number<most>, o);
            for (; o < outputs; o++) some(number<1>, o);
        });
    };
    const int64_t apart = (end - begin) / DOT_N, last = begin + apart * DOT_N;
    for (int64_t n = begin; n < begin + apart; n++) block(n, DOT_N, apart);
    block(last, end - last, 1);
}

// Outputs from `begin` to `end` of many rows. Blocks of the weights are transposed, so that no sum needs to be taken
// across a vector.
template <typename T>
static void outer_outputs(const T *w, int64_t in, const float *x, float *y, int64_t rows, int64_t stride, int64_t begin,
                          int64_t end) {
    float *tiles = (float *)scratch<TILE>(BLOCK * DEEP * sizeof(float)), last[FLOAT_ROWS * FLOAT_N];
    for (int64_t n = begin; n < end; n += BLOCK)
        for (int64_t k = 0; k < in; k += DEEP) {
            const int64_t K = std::min(DEEP, in - k), stop = std::min(end, n + BLOCK);
            for (int64_t m = n; m < stop; m += FLOAT_N)
                transpose_tile(w + m * in + k, in, K, end - m, tiles + (m - n) * DEEP);
            in_steps<FLOAT_ROWS>(0, rows, [&](auto R, int64_t r) {
                const float *from = x + k * rows + r * K, *tile = tiles;
                float *to = y + r * stride + n;
                int64_t m = n;
                for (; m + FLOAT_N <= stop; m += FLOAT_N, tile += FLOAT_N * DEEP, to += FLOAT_N)
                    outer_rows<R, FLOAT_V, T>(tile, FLOAT_N, from, K, to, stride, K, k > 0);
                if (m == stop) return;
                outer_rows<R, FLOAT_V, T>(tile, FLOAT_N, from, K, last, FLOAT_N, K, false);
                for (int i = 0; i < R; i++)
                    for (int64_t o = 0; o < stop - m; o++)
                        to[i * stride + o] = last[i * FLOAT_N + o] + (k ? to[i * stride + o] : 0);
            });
        }
}
