// Matmuls: y (rows, out) = x (rows, in) times the transpose of a matrix (out, in).
//
// Activations are float32, rounded to bfloat16 where the CPU multiplies bfloat16 weights in pairs. Matrices have their
// weights (out, in) in float32, float16 or bfloat16 as they lie in memory, or quantized: w = scale q + min, q of 8 or 4
// bits, scale and min in float16 for each group of columns. Quantized weights are packed in tiles of TILE_N outputs, so
// that a register holds the same columns of several outputs:
//
//   8 bits   for every 4 columns, 4 bytes of each output
//   4 bits   for every block of 32 columns (16 where groups are as small), 4 bytes of each output for every 8 columns:
//            columns 4 t .. in the low halves of the bytes, columns block / 2 + 4 t .. in the high halves
//   scale    for each group, one number of each output; min the same
//
// A token's activations are rounded to 8 bits as well, x = scale q, with a scale for each 32 columns, or 16; where these
// have outliers, to 16 bits. So w x is the sum of scale_w scale_x (q_w q_x) + min_w x, where q_w q_x is a dot product of
// bytes.
#pragma once

#include "float_matmul.h"

constexpr int64_t ROW_BLOCK = 96;  // rows of x that pass a tile while they stay in the L2 cache

enum Kind : int64_t { FLOAT32, FLOAT16, BFLOAT16, INT8, INT4 };

struct Matrix {
    int64_t kind, out, in, group, zero;  // weights of 4 bits are stored as q + zero
    const void *weight;
    const Half *scale, *min;  // min may be missing
};

// Calls work with a pointer to numbers of a kind.
template <typename Work>
static void by_kind(int64_t kind, void *numbers, const Work &work) {
    if (kind == FLOAT32) work((float *)numbers);
    else if (kind == FLOAT16) work((Half *)numbers);
    else work((BFloat16 *)numbers);
}

// --------------------------------------------------------------------------------------------------------------------
// Matmuls of integers

constexpr int TILE_N = TILE_V * L;  // outputs of a tile

// A row of x in 8 bits. Its groups are 32 columns, or 16, whatever the groups of the weights: a large activation takes
// precision only from those in its own group, and few are large.
struct Numbers {
    void *q;         // Int8 or, for weights of 4 bits, int8_t
    float *scale;    // of each group; NaN where x is not finite
    int32_t *start;  // of each group: -zero times the sum of q, with which the dot products of stored weights begin
};
// Groups with outliers have a large scale. What rounding leaves of them is rounded too, to 254ths of the scale: without
// this, they cause most of a model's error.
struct Row : Numbers {
    float *total;    // of each group of the weights: the sum of scale q
    Numbers rest;    // of some groups
    int32_t *which;  // these groups
    int64_t count;   // their number
};
constexpr float OUTLIER = 1.75f;  // a group's scale by the mean of the row's

static int64_t group_of_x(const Matrix &m) { return m.group % 32 ? 16 : 32; }

INLINE void put_numbers(int8_t *q, I n) { put(q, __builtin_convertvector(n, Vector<int8_t, BYTES / 4>::type)); }
INLINE void put_numbers(int16_t *q, I n) {
    auto pairs = __builtin_convertvector(n, Vector<int16_t, BYTES / 2>::type);
    for (int i = 0; i < L; i += 4) {
        const int16_t second = pairs[i + 1];
        pairs[i + 1] = pairs[i + 2], pairs[i + 2] = second;
    }
    put(q, pairs);
}

template <typename T, int group>
static void round_row(const float *x, const Matrix &m, Row &to) {
    const int64_t groups = m.in / group;
    const int32_t zero = m.kind == INT8 ? BIAS : m.zero;
    for (int64_t g = 0; g < groups; g += L) {  // L at a time, as it is slow to combine the numbers of one vector
        F most[L];
        for (int i = 0; i < L; i++) {
            const float *from = x + std::min(g + i, groups - 1) * group;
            most[i] = magnitude(load(from));
            for (int k = L; k < group; k += L) most[i] = larger_magnitude(most[i], magnitude(load(from + k)));
        }
        const F found = across(most, larger_magnitude), scale = larger(found, splat(1e-30f)) / 127 + found * 0.0f;
        memcpy(to.scale + g, &scale, std::min<int64_t>(L, groups - g) * sizeof(float));
    }
    const float outlier = OUTLIER * std::accumulate(to.scale, to.scale + groups, 0.0f) / groups;
    std::fill_n(to.total, m.in / m.group, 0.0f);
    to.count = 0;
    // Rounds group g of x, less what steps of `coarse` take of it, in steps of `scale`; returns the sum of q in parts.
    const auto round = [&](auto left, int64_t g, float scale, float coarse, void *q) {
        const F inverse = splat(1 / scale), step = splat(coarse), most = splat(1 / coarse);
        I total = {};
        for (int k = 0; k < group; k += L) {
            F value = load(x + g * group + k);
            if (left) value -= step * __builtin_convertvector(nearest(value * most), F);
            const I n = nearest(value * inverse);
            total += n;
            put_numbers((T *)q + k, n);
        }
        return __builtin_convertvector(total, F);
    };
    const auto add = [&](int64_t g, float scale, float sum, int32_t &start) {
        start = -zero * (int32_t)sum;
        to.total[g * group / m.group] += scale * sum;
    };
    for (int64_t g = 0; g < groups; g += L) {
        F total[L] = {};
        const int64_t n = std::min<int64_t>(L, groups - g);
        for (int i = 0; i < n; i++) total[i] = round(number<false>, g + i, to.scale[g + i], 1, (T *)to.q + (g + i) * group);
        const F sum = sums(total);
        for (int i = 0; i < n; i++) add(g + i, to.scale[g + i], sum[i], to.start[g + i]);
    }
    for (int64_t g = 0; g < groups; g++)
        if (to.scale[g] > outlier) {
            const int64_t i = to.count++;
            const float scale = to.rest.scale[i] = to.scale[g] / 254;
            to.which[i] = g;
            add(g, scale, sum(round(number<true>, g, scale, to.scale[g], (T *)to.rest.q + i * group)), to.rest.start[i]);
        }
}

// Dot products of `group` columns of V vectors of a tile with R rows.
template <int group, typename X, int R, int V>
INLINE void int8_dots(const uint8_t *w, bool cold, const X *x, int64_t begin, I (&dots)[R][V]) {
#pragma GCC unroll 8
    for (int k = 0; k < group / 4; k++, w += TILE_N * 4) {
        for (int i = 0; cold && i < V * BYTES; i += 64) prefetch(w + i + 4096);
        for (int half = 0; half < HALVES; half++) {
            B weights[V];
            for (int v = 0; v < V; v++) weights[v] = columns(get<B>(w + v * BYTES), half);
            for (int r = 0; r < R; r++) {
                const I row = splat(get<int32_t>((const int32_t *)x[r].q + (begin / 4 + k) * HALVES + half));
                for (int v = 0; v < V; v++) dots[r][v] = dot8(dots[r][v], weights[v], row);
            }
        }
    }
}
template <int group, typename X, int R, int V>
INLINE void int4_dots(const uint8_t *w, bool cold, const X *x, int64_t begin, I (&dots)[R][V]) {
    I part[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) part[r][v] = HALVES == 2 ? I{} : dots[r][v];
#pragma GCC unroll 4
    for (int t = 0; t < group / 8; t++, w += TILE_N * 4) {
        for (int i = 0; cold && i < V * BYTES; i += 64) prefetch(w + i + 4096);
        for (int half = 0; half < 2; half++) {
            B weights[V];
            for (int v = 0; v < V; v++) {
                const B both = get<B>(w + v * BYTES);
                weights[v] = (half ? (B)((I16)both >> 4) : both) & 15;
            }
            for (int r = 0; r < R; r++) {
                const I row = splat(get<int32_t>((const int8_t *)x[r].q + begin + half * group / 2 + 4 * t));
                for (int v = 0; v < V; v++) part[r][v] = dot4(part[r][v], weights[v], row);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) dots[r][v] = HALVES == 2 ? widen(dots[r][v], part[r][v]) : part[r][v];
}

// V vectors of a tile's outputs, from output `first` of the tile on, of R rows; the first n are stored. `same`: weights
// and x have the same groups. `cold`: the weights come from memory.
template <int R, int V, int bits, int group, bool same>
__attribute__((noinline)) static void int_rows(const Matrix &m, int64_t tile, int64_t first, const Row *x, float *y,
                                               int64_t stride, int64_t n, bool cold) {
    const int64_t groups = m.in / m.group, begin = tile * groups * TILE_N + first;
    const uint8_t *w = (const uint8_t *)m.weight + tile * TILE_N * m.in * bits / 8 + first * 4;
    F total[R][V] = {};
    for (int64_t g = 0, k = 0; g < groups; g++) {
        F part[R][V] = {}, scale[V];
        for (int v = 0; v < V; v++) scale[v] = load(m.scale + begin + g * TILE_N + v * L);
        for (const int64_t end = k + (same ? group : m.group); k < end; k += group, w += TILE_N * group * bits / 8) {
            I dots[R][V];
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++) dots[r][v] = splat(x[r].start[k / group]);
            if constexpr (bits == 8) int8_dots<group>(w, cold, x, k, dots);
            else int4_dots<group>(w, cold, x, k, dots);
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++) {
                    const F dot = __builtin_convertvector(dots[r][v], F), by = splat(x[r].scale[k / group]);
                    if (same) total[r][v] += dot * (by * scale[v]);
                    else part[r][v] += dot * by;
                }
        }
        for (int v = 0; v < V && !same; v++)
            for (int r = 0; r < R; r++) total[r][v] += part[r][v] * scale[v];
        for (int v = 0; v < V && m.min; v++) {
            const F min = load(m.min + begin + g * TILE_N + v * L);
            for (int r = 0; r < R; r++) total[r][v] += min * x[r].total[g];
        }
    }
    for (int r = 0; r < R; r++)
        if (n >= V * L)
            for (int v = 0; v < V; v++) store(y + r * stride + v * L, total[r][v]);
        else if (n > 0)
            memcpy(y + r * stride, total[r], n * sizeof(float));
}

// Adds to a tile's n outputs y of a row what the rest of some groups of x gives.
template <int bits, int group>
__attribute__((noinline)) static void add_rest(const Matrix &m, int64_t tile, const Row &x, float *y, int64_t n) {
    F total[TILE_V] = {};
    for (int64_t i = 0; i < x.count; i++) {
        const int64_t k = x.which[i] * group;
        const uint8_t *w = (const uint8_t *)m.weight + (tile * m.in + k) * TILE_N * bits / 8;
        const Half *scale = m.scale + (tile * (m.in / m.group) + k / m.group) * TILE_N;
        I dots[1][TILE_V];
        for (int v = 0; v < TILE_V; v++) dots[0][v] = splat(x.rest.start[i]);
        if constexpr (bits == 8) int8_dots<group>(w, false, &x.rest, i * group, dots);
        else int4_dots<group>(w, false, &x.rest, i * group, dots);
        for (int v = 0; v < TILE_V; v++)
            total[v] += __builtin_convertvector(dots[0][v], F) * (splat(x.rest.scale[i]) * load(scale + v * L));
    }
    for (int64_t j = 0; j < std::min<int64_t>(n, TILE_N); j++) y[j] += total[j / L][j % L];
}

// Rows of x as matrices like m take them, valid until the next call.
static const Row *rounded(const Matrix &m, const float *x, int64_t rows) {
    const int64_t size = m.in * (m.kind == INT8 ? sizeof(Int8) : 1), groups = m.in / group_of_x(m), own = m.in / m.group;
    const int64_t each = 5 * groups + own;  // numbers of 4 bytes
    char *memory = (char *)scratch<ROWS>(rows * (sizeof(Row) + 2 * size + each * 4) + 64);
    Row *row = (Row *)memory;
    float *numbers = (float *)(row + rows);
    char *q = (char *)(numbers + rows * each);
    each_row(rows, m.in, [&](int64_t r) {
        float *at = numbers + r * each, *rest = at + 2 * groups + own;
        row[r].q = q + 2 * r * size, row[r].scale = at, row[r].start = (int32_t *)(at + groups);
        row[r].total = at + 2 * groups, row[r].which = (int32_t *)(rest + 2 * groups);
        row[r].rest = {q + (2 * r + 1) * size, rest, (int32_t *)(rest + groups)};
        const auto by = [&](auto group) {
            if (m.kind == INT8) round_row<Int8, group>(x + r * m.in, m, row[r]);
            else round_row<int8_t, group>(x + r * m.in, m, row[r]);
        };
        group_of_x(m) == 32 ? by(number<32>) : by(number<16>);
    });
    return row;
}

// Tiles from `begin` to `end` of a matrix.
static void int_tiles(const Matrix &m, const Row *row, float *y, int64_t rows, int64_t stride, int64_t begin, int64_t end) {
    for (int64_t r0 = 0; r0 < rows; r0 += ROW_BLOCK)
        for (int64_t tile = begin; tile < end; tile++) {
            const auto by = [&](auto bits, auto group, auto same) {
                const int64_t last = std::min(rows, r0 + ROW_BLOCK);
                const auto some = [&](auto R, int64_t r) {
                    constexpr int V = R * TILE_V > 6 * INT_V ? INT_V : TILE_V;
                    for (int64_t first = 0; first < TILE_N; first += V * L) {
                        const int64_t o = tile * TILE_N + first;
                        float *to = y + r * stride + o;
                        int_rows<R, V, bits, group, same>(m, tile, first, row + r, to, stride, m.out - o, r == 0);
                    }
                };
                constexpr auto most = bits == 8 ? INT8_ROWS : INT4_ROWS;
                rows > FEW ? in_steps<most[1]>(r0, last, some) : in_steps<most[0]>(r0, last, some);
                for (int64_t r = r0; r < last; r++)
                    if (row[r].count)
                        add_rest<bits, group>(m, tile, row[r], y + r * stride + tile * TILE_N, m.out - tile * TILE_N);
            };
            const auto by_group = [&](auto bits) {
                if (m.group == 32) by(bits, number<32>, number<true>);
                else if (m.group % 32 == 0) by(bits, number<32>, number<false>);
                else by(bits, number<16>, number<false>);
            };
            m.kind == INT8 ? by_group(number<8>) : by_group(number<4>);
        }
}

// Calls work(matrix, y, begin, end) for parts, of `unit` outputs, of matrices one below the other: as one job, as threads
// wait for each other at the end of each.
template <typename Work>
static void each_part(const Matrix *m, int count, float *y, int64_t unit, const Work &work) {
    const auto parts = [&](int i) { return (m[i].out + unit - 1) / unit; };
    int64_t all = 0;
    for (int i = 0; i < count; i++) all += parts(i);
    parallel_for(all, 1, [&](int64_t begin, int64_t end) {
        float *to = y;
        for (int i = 0; i < count; to += m[i].out, begin -= parts(i), end -= parts(i), i++)
            if (begin < parts(i) && end > 0) work(m[i], to, std::max<int64_t>(begin, 0), std::min(end, parts(i)));
    });
}

// Matrices of floats of one kind, whose weights are read as T: Pairs hold two each.
template <typename T>
static void float_matmul(const Matrix *m, int count, const float *x, float *y, int64_t rows, int64_t out) {
    const int64_t unit = rows > FEW ? FLOAT_N : DOT_N, in = m->in / PER_LANE<T>;
    const float *from = pack_x<T>(x, rows, in);
    each_part(m, count, y, unit, [&](const Matrix &b, float *to, int64_t begin, int64_t end) {
        const auto outputs = rows > FEW ? outer_outputs<T> : dot_outputs<T>;
        outputs((const T *)b.weight, in, from, to, rows, out, begin * unit, std::min(b.out, end * unit));
    });
}

// y (rows, out) = x (rows, in) times the transpose of matrices one below the other, `out` in all.
static void matmul(const Matrix *m, int count, const float *x, float *y, int64_t rows) {
    int64_t out = 0;
    for (int i = 0; i < count; i++) out += m[i].out;
    for (int i = 0, n = 1; i < count; i += n, n = 1) {
        const Matrix &first = m[i];
        const auto like = [&](const Matrix &b) {
            return b.kind == first.kind && b.group == first.group && b.zero == first.zero;
        };
        while (i + n < count && like(m[i + n])) n++;
        if (first.kind < INT8) {
            by_kind(first.kind, (void *)first.weight, [&](auto *weight) {
                using T = std::remove_pointer_t<decltype(weight)>;
                if constexpr (PAIRS && std::is_same_v<T, BFloat16>)
                    if (first.in % (2 * L) == 0) return float_matmul<Pair>(m + i, n, x, y, rows, out);
                float_matmul<T>(m + i, n, x, y, rows, out);
            });
        } else {
            const Row *row = rounded(first, x, rows);
            each_part(m + i, n, y, TILE_N, [&](const Matrix &b, float *to, int64_t begin, int64_t end) {
                int_tiles(b, row, to, rows, out, begin, end);
            });
        }
        for (int j = 0; j < n; j++) y += m[i + j].out;
    }
}
