// Matmuls: y (rows, out) = x (rows, in) times the transpose of a matrix (out, in).
//
// Activations are float32; with bfloat16 weights they are rounded to bfloat16 where the CPU has a dot product of bfloat16.
// Weights (out, in) are float32, float16 or bfloat16 in row-major order, or quantized: w = scale q + min, with q of 8 or 4
// bits, and scale and min in float16 for each group of columns. Quantized weights are packed into tiles of TILE_N outputs,
// so that a register holds the same columns of several outputs:
//
//   int8     for every 4 columns, 4 bytes of each output
//   int4     for every block of 32 columns (16 where groups have 16), 4 bytes of each output for every 8 columns: columns
//            4 t .. 4 t + 3 of the block in the low nibbles, columns block / 2 + 4 t .. in the high nibbles
//   scale    for each group, one float16 of each output; min likewise
//
// Activations are quantized dynamically to 8 bits, x = scale q, with a scale for each token and group of 32 columns, or 16.
// Groups with outliers have a residual of 8 more bits. So w x is a sum over groups of
// scale_w scale_x (q_w q_x) + min_w x, where q_w q_x is a dot product of 8-bit integers.
#pragma once

#include "float_matmul.h"

constexpr int64_t BLOCK_M = 96;  // rows of x that are multiplied with a tile while they stay in the L2 cache

enum Kind : int64_t { FLOAT32, FLOAT16, BFLOAT16, INT8, INT4 };

struct Matrix {
    int64_t kind, out, in, group, zero;  // int4 weights are stored as q + zero, zero being the zero point
    const void *weight;
    const Half *scale, *min;  // min may be null
};

// Calls work with `data` as a pointer to the float type that `kind` stands for.
template <typename Work>
static void dispatch(int64_t kind, void *data, const Work &work) {
    if (kind == FLOAT32) work((float *)data);
    else if (kind == FLOAT16) work((Half *)data);
    else work((BFloat16 *)data);
}

// --------------------------------------------------------------------------------------------------------------------
// Matmuls of quantized matrices

constexpr int TILE_N = TILE_V * L;  // outputs of a tile

// Groups of a row of x, quantized to 8 bits. They have 32 columns, or 16, whatever the groups of the weights: an outlier
// costs precision only within its own group, and outliers are few.
struct QuantizedGroups {
    void *q;         // Activation8 or, for int4 weights, int8_t
    float *scale;    // of each group; NaN where x is not finite
    int32_t *init;   // of each group: the accumulators' initial value, -zero * sum(q), which compensates the zero point
};
// A row of x. Groups with outliers have a large scale. Their residual, x - scale q, is quantized too, in steps of
// scale / 254: otherwise outliers cause most of a model's error.
struct QuantizedRow : QuantizedGroups {
    float *sum;                // of each group of the weights: the sum of scale q, by which min is multiplied
    QuantizedGroups residual;  // of the groups with outliers
    int32_t *outliers;         // the indices of these groups
    int64_t n_outliers;
};
constexpr float OUTLIER = 1.75f;  // a group has outliers if its scale exceeds this multiple of the row's mean scale

static int64_t activation_group(const Matrix &m) { return m.group % 32 ? 16 : 32; }

INLINE void store_quantized(int8_t *q, I n) { store_as(q, __builtin_convertvector(n, Vector<int8_t, BYTES / 4>::type)); }
INLINE void store_quantized(int16_t *q, I n) {
    auto pairs = __builtin_convertvector(n, Vector<int16_t, BYTES / 2>::type);
    for (int i = 0; i < L; i += 4) {
        const int16_t second = pairs[i + 1];
        pairs[i + 1] = pairs[i + 2], pairs[i + 2] = second;
    }
    store_as(q, pairs);
}

template <typename T, int group>
static void quantize_row(const float *x, const Matrix &m, QuantizedRow &to) {
    const int64_t groups = m.in / group;
    const int32_t zero = m.kind == INT8 ? BIAS : m.zero;
    for (int64_t g = 0; g < groups; g += L) {  // L groups at a time, as a horizontal reduction of one vector is slow
        F largest[L];
        for (int i = 0; i < L; i++) {
            const float *from = x + std::min(g + i, groups - 1) * group;
            largest[i] = abs(load(from));
            for (int k = L; k < group; k += L) largest[i] = max_abs(largest[i], abs(load(from + k)));
        }
        const F amax = reduce_each(largest, max_abs), scale = max(amax, splat(1e-30f)) / 127 + amax * 0.0f;
        memcpy(to.scale + g, &scale, std::min<int64_t>(L, groups - g) * sizeof(float));
    }
    const float outlier = OUTLIER * std::accumulate(to.scale, to.scale + groups, 0.0f) / groups;
    std::fill_n(to.sum, m.in / m.group, 0.0f);
    to.n_outliers = 0;
    // Quantizes group g of x, or its residual after rounding to multiples of `coarse`, to multiples of `scale`. Returns
    // partial sums of q.
    const auto quantize = [&](auto residual, int64_t g, float scale, float coarse, void *q) {
        const F inverse = splat(1 / scale), step = splat(coarse), inverse_step = splat(1 / coarse);
        I total = {};
        for (int k = 0; k < group; k += L) {
            F value = load(x + g * group + k);
            if (residual) value -= step * __builtin_convertvector(round_to_int(value * inverse_step), F);
            const I n = round_to_int(value * inverse);
            total += n;
            store_quantized((T *)q + k, n);
        }
        return __builtin_convertvector(total, F);
    };
    const auto add_sum = [&](int64_t g, float scale, float sum, int32_t &init) {
        init = -zero * (int32_t)sum;
        to.sum[g * group / m.group] += scale * sum;
    };
    for (int64_t g = 0; g < groups; g += L) {
        F total[L] = {};
        const int64_t n = std::min<int64_t>(L, groups - g);
        for (int i = 0; i < n; i++)
            total[i] = quantize(constant<false>, g + i, to.scale[g + i], 1, (T *)to.q + (g + i) * group);
        const F sum = sum_each(total);
        for (int i = 0; i < n; i++) add_sum(g + i, to.scale[g + i], sum[i], to.init[g + i]);
    }
    for (int64_t g = 0; g < groups; g++)
        if (to.scale[g] > outlier) {
            const int64_t i = to.n_outliers++;
            const float scale = to.residual.scale[i] = to.scale[g] / 254;
            to.outliers[i] = g;
            add_sum(g, scale, reduce_add(quantize(constant<true>, g, scale, to.scale[g], (T *)to.residual.q + i * group)),
                    to.residual.init[i]);
        }
}

// Dot products of one group of columns: R rows of x with V vectors of outputs of a tile. Weights are prefetched if `cold`.
template <int group, typename X, int R, int V>
INLINE void group_dots_int8(const uint8_t *w, bool cold, const X *x, int64_t begin, I (&dots)[R][V]) {
#pragma GCC unroll 8
    for (int k = 0; k < group / 4; k++, w += TILE_N * 4) {
        for (int i = 0; cold && i < V * BYTES; i += 64) prefetch(w + i + 4096);
        for (int half = 0; half < HALVES; half++) {
            B weights[V];
            for (int v = 0; v < V; v++) weights[v] = int8_operand(load_as<B>(w + v * BYTES), half);
            for (int r = 0; r < R; r++) {
                const I row = splat(load_as<int32_t>((const int32_t *)x[r].q + (begin / 4 + k) * HALVES + half));
                for (int v = 0; v < V; v++) dots[r][v] = dot_int8(dots[r][v], weights[v], row);
            }
        }
    }
}
template <int group, typename X, int R, int V>
INLINE void group_dots_int4(const uint8_t *w, bool cold, const X *x, int64_t begin, I (&dots)[R][V]) {
    I part[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) part[r][v] = HALVES == 2 ? I{} : dots[r][v];
#pragma GCC unroll 4
    for (int t = 0; t < group / 8; t++, w += TILE_N * 4) {
        for (int i = 0; cold && i < V * BYTES; i += 64) prefetch(w + i + 4096);
        for (int half = 0; half < 2; half++) {
            B weights[V];
            for (int v = 0; v < V; v++) {
                const B nibbles = load_as<B>(w + v * BYTES);
                weights[v] = (half ? (B)((I16)nibbles >> 4) : nibbles) & 15;
            }
            for (int r = 0; r < R; r++) {
                const I row = splat(load_as<int32_t>((const int8_t *)x[r].q + begin + half * group / 2 + 4 * t));
                for (int v = 0; v < V; v++) part[r][v] = dot_int4(part[r][v], weights[v], row);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) dots[r][v] = HALVES == 2 ? widen_add(dots[r][v], part[r][v]) : part[r][v];
}

// Micro-kernel: computes R rows x V vectors of outputs, beginning with output `first` of a tile, and stores the first n of
// each row. `same`: weights and x have the same groups. `cold`: the weights are not cached yet and are prefetched.
template <int R, int V, int bits, int group, bool same>
__attribute__((noinline)) static void int_kernel(const Matrix &m, int64_t tile, int64_t first, const QuantizedRow *x,
                                                 float *y, int64_t stride, int64_t n, bool cold) {
    const int64_t groups = m.in / m.group, begin = tile * groups * TILE_N + first;
    const uint8_t *w = (const uint8_t *)m.weight + tile * TILE_N * m.in * bits / 8 + first * 4;
    F total[R][V] = {};
    for (int64_t g = 0, k = 0; g < groups; g++) {
        F part[R][V] = {}, scale[V];
        for (int v = 0; v < V; v++) scale[v] = load(m.scale + begin + g * TILE_N + v * L);
        for (const int64_t end = k + (same ? group : m.group); k < end; k += group, w += TILE_N * group * bits / 8) {
            I dots[R][V];
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++) dots[r][v] = splat(x[r].init[k / group]);
            if constexpr (bits == 8) group_dots_int8<group>(w, cold, x, k, dots);
            else group_dots_int4<group>(w, cold, x, k, dots);
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++) {
                    const F dot = __builtin_convertvector(dots[r][v], F), scale_x = splat(x[r].scale[k / group]);
                    if (same) total[r][v] += dot * (scale_x * scale[v]);
                    else part[r][v] += dot * scale_x;
                }
        }
        for (int v = 0; v < V && !same; v++)
            for (int r = 0; r < R; r++) total[r][v] += part[r][v] * scale[v];
        for (int v = 0; v < V && m.min; v++) {
            const F min = load(m.min + begin + g * TILE_N + v * L);
            for (int r = 0; r < R; r++) total[r][v] += min * x[r].sum[g];
        }
    }
    for (int r = 0; r < R; r++)
        if (n >= V * L)
            for (int v = 0; v < V; v++) store(y + r * stride + v * L, total[r][v]);
        else if (n > 0)
            memcpy(y + r * stride, total[r], n * sizeof(float));
}

// Adds the product of the weights and the residual of x to n outputs y of a tile.
template <int bits, int group>
__attribute__((noinline)) static void add_residual(const Matrix &m, int64_t tile, const QuantizedRow &x, float *y,
                                                   int64_t n) {
    F total[TILE_V] = {};
    for (int64_t i = 0; i < x.n_outliers; i++) {
        const int64_t k = x.outliers[i] * group;
        const uint8_t *w = (const uint8_t *)m.weight + (tile * m.in + k) * TILE_N * bits / 8;
        const Half *scale = m.scale + (tile * (m.in / m.group) + k / m.group) * TILE_N;
        I dots[1][TILE_V];
        for (int v = 0; v < TILE_V; v++) dots[0][v] = splat(x.residual.init[i]);
        if constexpr (bits == 8) group_dots_int8<group>(w, false, &x.residual, i * group, dots);
        else group_dots_int4<group>(w, false, &x.residual, i * group, dots);
        for (int v = 0; v < TILE_V; v++)
            total[v] += __builtin_convertvector(dots[0][v], F) * (splat(x.residual.scale[i]) * load(scale + v * L));
    }
    for (int64_t j = 0; j < std::min<int64_t>(n, TILE_N); j++) y[j] += total[j / L][j % L];
}

// Quantizes the rows of x for matrices of the kind and groups of m; valid until the next call.
static const QuantizedRow *quantize_rows(const Matrix &m, const float *x, int64_t rows) {
    const int64_t size = m.in * (m.kind == INT8 ? sizeof(Activation8) : 1);
    const int64_t groups = m.in / activation_group(m), w_groups = m.in / m.group;
    const int64_t each = 5 * groups + w_groups;  // 4-byte elements of a row
    char *memory = (char *)scratch<QUANTIZED_X>(rows * (sizeof(QuantizedRow) + 2 * size + each * 4) + 64);
    QuantizedRow *row = (QuantizedRow *)memory;
    float *numbers = (float *)(row + rows);
    char *q = (char *)(numbers + rows * each);
    parallel_for_rows(rows, m.in, [&](int64_t r) {
        float *at = numbers + r * each, *residual = at + 2 * groups + w_groups;
        row[r].q = q + 2 * r * size, row[r].scale = at, row[r].init = (int32_t *)(at + groups);
        row[r].sum = at + 2 * groups, row[r].outliers = (int32_t *)(residual + 2 * groups);
        row[r].residual = {q + (2 * r + 1) * size, residual, (int32_t *)(residual + groups)};
        const auto quantize = [&](auto group) {
            if (m.kind == INT8) quantize_row<Activation8, group>(x + r * m.in, m, row[r]);
            else quantize_row<int8_t, group>(x + r * m.in, m, row[r]);
        };
        activation_group(m) == 32 ? quantize(constant<32>) : quantize(constant<16>);
    });
    return row;
}

// Outputs of tiles begin .. end - 1 of a quantized matrix.
static void int_matmul(const Matrix &m, const QuantizedRow *row, float *y, int64_t rows, int64_t stride, int64_t begin,
                       int64_t end) {
    for (int64_t r0 = 0; r0 < rows; r0 += BLOCK_M)
        for (int64_t tile = begin; tile < end; tile++) {
            const auto compute = [&](auto bits, auto group, auto same) {
                const int64_t last = std::min(rows, r0 + BLOCK_M);
                const auto kernel = [&](auto R, int64_t r) {
                    constexpr int V = R * TILE_V > 6 * INT_V ? INT_V : TILE_V;
                    for (int64_t first = 0; first < TILE_N; first += V * L) {
                        const int64_t o = tile * TILE_N + first;
                        float *to = y + r * stride + o;
                        int_kernel<R, V, bits, group, same>(m, tile, first, row + r, to, stride, m.out - o, r == 0);
                    }
                };
                constexpr auto most = bits == 8 ? INT8_ROWS : INT4_ROWS;
                rows > DOT_MAX_ROWS ? for_blocks<most[1]>(r0, last, kernel) : for_blocks<most[0]>(r0, last, kernel);
                for (int64_t r = r0; r < last; r++)
                    if (row[r].n_outliers)
                        add_residual<bits, group>(m, tile, row[r], y + r * stride + tile * TILE_N, m.out - tile * TILE_N);
            };
            const auto dispatch_group = [&](auto bits) {
                if (m.group == 32) compute(bits, constant<32>, constant<true>);
                else if (m.group % 32 == 0) compute(bits, constant<32>, constant<false>);
                else compute(bits, constant<16>, constant<false>);
            };
            m.kind == INT8 ? dispatch_group(constant<8>) : dispatch_group(constant<4>);
        }
}

// Calls work(matrix, y, begin, end) for ranges of tiles, of `unit` outputs, of matrices whose outputs are concatenated.
// This is one job, as threads wait for each other at the end of every job.
template <typename Work>
static void for_each_tile(const Matrix *m, int count, float *y, int64_t unit, const Work &work) {
    const auto tiles = [&](int i) { return (m[i].out + unit - 1) / unit; };
    int64_t all = 0;
    for (int i = 0; i < count; i++) all += tiles(i);
    parallel_for(all, 1, [&](int64_t begin, int64_t end) {
        float *to = y;
        for (int i = 0; i < count; to += m[i].out, begin -= tiles(i), end -= tiles(i), i++)
            if (begin < tiles(i) && end > 0) work(m[i], to, std::max<int64_t>(begin, 0), std::min(end, tiles(i)));
    });
}

// Float matrices of one kind, whose weights are read as T; a Pair holds two columns.
template <typename T>
static void float_matmul(const Matrix *m, int count, const float *x, float *y, int64_t rows, int64_t out) {
    const int64_t unit = rows > DOT_MAX_ROWS ? FLOAT_N : DOT_N, in = m->in / PER_LANE<T>;
    const float *from = pack_x<T>(x, rows, in);
    for_each_tile(m, count, y, unit, [&](const Matrix &b, float *to, int64_t begin, int64_t end) {
        const auto multiply = rows > DOT_MAX_ROWS ? blocked_matmul<T> : dot_matmul<T>;
        multiply((const T *)b.weight, in, from, to, rows, out, begin * unit, std::min(b.out, end * unit));
    });
}

// y (rows, out) = x (rows, in) times the transpose of `count` matrices, whose outputs are concatenated.
static void matmul(const Matrix *m, int count, const float *x, float *y, int64_t rows) {
    int64_t out = 0;
    for (int i = 0; i < count; i++) out += m[i].out;
    for (int i = 0, n = 1; i < count; i += n, n = 1) {
        const Matrix &first = m[i];
        const auto same_format = [&](const Matrix &b) {
            return b.kind == first.kind && b.group == first.group && b.zero == first.zero;
        };
        while (i + n < count && same_format(m[i + n])) n++;
        if (first.kind < INT8) {
            dispatch(first.kind, (void *)first.weight, [&](auto *weight) {
                using T = std::remove_pointer_t<decltype(weight)>;
                if constexpr (HAS_DOT2 && std::is_same_v<T, BFloat16>)
                    if (first.in % (2 * L) == 0) return float_matmul<Pair>(m + i, n, x, y, rows, out);
                float_matmul<T>(m + i, n, x, y, rows, out);
            });
        } else {
            const QuantizedRow *row = quantize_rows(first, x, rows);
            for_each_tile(m + i, n, y, TILE_N, [&](const Matrix &b, float *to, int64_t begin, int64_t end) {
                int_matmul(b, row, to, rows, out, begin, end);
            });
        }
        for (int j = 0; j < n; j++) y += m[i + j].out;
    }
}
