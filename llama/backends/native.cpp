// The forward pass of a Llama on a CPU: matmuls, attention, and whole layers, behind a C interface for ctypes.
//
// Activations are float32. Matrices have their weights (out, in) in float32, float16 or bfloat16 as they lie in memory, or
// quantized: w = scale q + min, q of 8 or 4 bits, scale and min in float16 for each group of columns. Quantized weights are
// packed in tiles of N outputs, so that a register holds the same columns of several outputs:
//
//   8 bits   for every 4 columns, 4 bytes of each output
//   4 bits   for every block of 32 columns (16 where groups are as small), 4 bytes of each output for every 8 columns:
//            columns 4 t .. in the low halves of the bytes, columns block / 2 + 4 t .. in the high halves
//   scale    for each group, one number of each output; min the same
//
// A token's activations are rounded to 8 bits as well, x = scale q, with a scale for each 32 columns, or 16. So w x is the
// sum of scale_w scale_x (q_w q_x) + min_w x, where q_w q_x is a dot product of bytes.

#include "threads.h"
#include "vector.h"

constexpr int FLOAT_N = FLOAT_V * L;                 // outputs of a tile of floats
constexpr int64_t ROW_BLOCK = 96;                    // rows of x that pass a tile while they stay in the L2 cache

enum Kind : int64_t { FLOAT32, FLOAT16, BFLOAT16, INT8, INT4 };

struct Matrix {
    int64_t kind, out, in, group, zero;  // zero: what 4 bits have more than q
    const void *weight;
    const Half *scale, *min;  // min may be missing
};

template <int n>
constexpr std::integral_constant<int, n> number{};

// Calls work(integral_constant<R>, r) for rows from r on, up to `most` at a time.
template <int most, typename Work>
INLINE void in_steps(int64_t r, int64_t rows, const Work &work) {
    for (; r + most <= rows; r += most) work(std::integral_constant<int, most>(), r);
    if constexpr (most > 1) in_steps<(most > 8 ? 8 : most > 4 ? 4 : most / 2)>(r, rows, work);
}

// Calls work with a pointer to numbers of a kind.
template <typename Work>
static void by_kind(int64_t kind, void *numbers, const Work &work) {
    if (kind == FLOAT32) work((float *)numbers);
    else if (kind == FLOAT16) work((Half *)numbers);
    else work((BFloat16 *)numbers);
}

// --------------------------------------------------------------------------------------------------------------------
// Matmuls of floats

// O outputs of R rows by dot products: reads weights once, as fast as memory gives them. A core keeps more cache lines in
// flight when it reads several streams; `ahead` is how far, in weights, it prefetches each.
template <int R, int O, typename T>
static void dot_rows(const T *w, const float *x, float *y, int64_t stride, int64_t in) {
    const int64_t ahead = std::min<int64_t>(in, 2048 / sizeof(T));
    F total[R][O] = {};
    for (int64_t k = 0; k < in; k += L) {
        F weights[O];
        for (int o = 0; o < O; o++) {
            if (k * sizeof(T) % 64 == 0) prefetch(w + o * in + k + ahead + (k + ahead < in ? 0 : (O - 1) * in));
            weights[o] = load(w + o * in + k);
        }
        for (int r = 0; r < R; r++) {
            const F row = load(x + r * in + k);
            for (int o = 0; o < O; o++) total[r][o] += weights[o] * row;
        }
    }
    constexpr int many = R * O;
    for (int begin = 0; begin < many; begin += L) {
        F some[L] = {};
        for (int i = 0; i < std::min(L, many - begin); i++) some[i] = total[(begin + i) / O][(begin + i) % O];
        const F found = sums(some);
        for (int i = 0; i < std::min(L, many - begin); i++) y[(begin + i) / O * stride + (begin + i) % O] = found[i];
    }
}

// V vectors of outputs of R rows: y (+)= x w, with w (K, V L), whose rows are `width` apart.
template <int R, int V>
static void outer_rows(const float *w, int64_t width, const float *x, int64_t in, float *y, int64_t stride, int64_t K,
                       bool add) {
    F total[R][V] = {};
    for (int64_t k = 0; k < K; k++, w += width) {
        F weights[V];
        for (int v = 0; v < V; v++) weights[v] = load(w + v * L);
        for (int r = 0; r < R; r++) {
            const F row = splat(x[r * in + k]);
            for (int v = 0; v < V; v++) total[r][v] += row * weights[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            float *to = y + r * stride + v * L;
            store(to, add ? load(to) + total[r][v] : total[r][v]);
        }
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

template <typename T>
static void float_matmul(const T *w, const float *x, float *y, int64_t rows, int64_t out, int64_t in, int64_t stride) {
    if (rows <= 16)
        return parallel_for(out, 12, [&](int64_t n, int64_t end) {
            for (; n + 12 <= end; n += 12)
                in_steps<DOT_ROWS>(0, rows, [&](auto R, int64_t r) {
                    constexpr int O = R == 1 ? 12 : 3;
                    for (int64_t o = n; o < n + 12; o += O)
                        dot_rows<R, O>(w + o * in, x + r * in, y + r * stride + o, stride, in);
                });
            for (; n < end; n++)
                in_steps<DOT_ROWS>(0, rows, [&](auto R, int64_t r) {
                    dot_rows<R, 1>(w + n * in, x + r * in, y + r * stride + n, stride, in);
                });
        });
    // Blocks of the weights are transposed, so that no sum needs to be taken across a vector.
    constexpr int64_t deep = 4096 / FLOAT_N, block = 4 * FLOAT_N;  // a tile is half of the L1 cache
    parallel_for(out, FLOAT_N, [&](int64_t begin, int64_t end) {
        float *tiles = (float *)scratch<TILE>(block * deep * sizeof(float)), last[FLOAT_ROWS * FLOAT_N];
        for (int64_t n = begin; n < end; n += block)
            for (int64_t k = 0; k < in; k += deep) {
                const int64_t K = std::min(deep, in - k), stop = std::min(end, n + block);
                for (int64_t m = n; m < stop; m += FLOAT_N)
                    transpose_tile(w + m * in + k, in, K, end - m, tiles + (m - n) * deep);
                for (int64_t r0 = 0; r0 < rows; r0 += ROW_BLOCK)
                    for (int64_t m = n; m < stop; m += FLOAT_N)
                        in_steps<FLOAT_ROWS>(r0, std::min(rows, r0 + ROW_BLOCK), [&](auto R, int64_t r) {
                            const float *tile = tiles + (m - n) * deep, *from = x + r * in + k;
                            float *to = y + r * stride + m;
                            if (end - m >= FLOAT_N)
                                return outer_rows<R, FLOAT_V>(tile, FLOAT_N, from, in, to, stride, K, k > 0);
                            outer_rows<R, FLOAT_V>(tile, FLOAT_N, from, in, last, FLOAT_N, K, false);
                            for (int i = 0; i < R; i++)
                                for (int64_t o = 0; o < end - m; o++)
                                    to[i * stride + o] = last[i * FLOAT_N + o] + (k ? to[i * stride + o] : 0);
                        });
            }
    });
}

// --------------------------------------------------------------------------------------------------------------------
// Matmuls of integers

constexpr int TILE_N = TILE_V * L;  // outputs of a tile

// Rows of x in 8 bits. Their groups are 32 columns, or 16, whatever the weights' are: large activations are few, and
// take precision from those in their own group alone.
struct Row {
    void *q;         // Int8 or, for weights of 4 bits, int8_t
    float *scale;    // of each group; NaN where x is not finite
    int32_t *start;  // of each group: its sum of q times what the weights' numbers have more than they stand for, negative
    float *total;    // of each group of the weights: the sum of scale q
};

static int64_t group_of_x(const Matrix &m) { return m.group % 32 ? 16 : 32; }

template <typename T>
static void round_row(const float *x, const Matrix &m, T *q, const Row &to) {
    const int64_t group = group_of_x(m);
    const int32_t zero = m.kind == INT8 ? BIAS : m.zero;
    std::fill_n(to.total, m.in / m.group, 0.0f);
    for (int64_t g = 0; g < m.in / group; g++, x += group, q += group) {
        F most = splat(1e-30f), nothing = {};
        for (int64_t k = 0; k < group; k += L) {
            most = larger(most, magnitude(load(x + k)));
            nothing += load(x + k) * 0.0f;
        }
        const float s = largest(most) / 127;
        I total = {};
        const F inverse = splat(1 / s);
        for (int64_t k = 0; k < group; k += L) {
            const I n = nearest(load(x + k) * inverse);
            total += n;
            if (sizeof(T) == 2) {
                auto pairs = __builtin_convertvector(n, Vector<int16_t, BYTES / 2>::type);
                for (int i = 0; i < L; i += 4) {
                    const int16_t second = pairs[i + 1];
                    pairs[i + 1] = pairs[i + 2], pairs[i + 2] = second;
                }
                put(q + k, pairs);
            } else {
                put(q + k, __builtin_convertvector(n, Vector<int8_t, BYTES / 4>::type));
            }
        }
        const float all = sum(__builtin_convertvector(total, F));
        to.scale[g] = s + sum(nothing), to.start[g] = -zero * (int32_t)all;
        to.total[g * group / m.group] += to.scale[g] * all;
    }
}

// Dot products of `group` columns of V vectors of a tile with R rows.
template <int group, int R, int V>
INLINE void int8_dots(const uint8_t *w, bool cold, const Row *x, int64_t begin, I (&dots)[R][V]) {
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
template <int group, int R, int V>
INLINE void int4_dots(const uint8_t *w, bool cold, const Row *x, int64_t begin, I (&dots)[R][V]) {
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

// Rows of x as matrices like m take them, valid until the next call.
static const Row *rounded(const Matrix &m, const float *x, int64_t rows) {
    const int64_t size = m.in * (m.kind == INT8 ? sizeof(Int8) : 1), groups = m.in / group_of_x(m), own = m.in / m.group;
    char *memory = (char *)scratch<ROWS>(rows * (sizeof(Row) + size + (2 * groups + own) * sizeof(float)) + 64);
    Row *row = (Row *)memory;
    float *numbers = (float *)(row + rows);
    char *q = (char *)(numbers + rows * (2 * groups + own));
    each_row(rows, m.in, [&](int64_t r) {
        float *at = numbers + r * (2 * groups + own);
        row[r] = {q + r * size, at, (int32_t *)(at + groups), at + 2 * groups};
        m.kind == INT8 ? round_row(x + r * m.in, m, (Int8 *)row[r].q, row[r]) : round_row(x + r * m.in, m, (int8_t *)row[r].q, row[r]);
    });
    return row;
}

static void int_matmul(const Matrix &m, const Row *row, float *y, int64_t rows, int64_t stride) {
    parallel_for((m.out + TILE_N - 1) / TILE_N, 1, [&](int64_t begin, int64_t end) {
        for (int64_t r0 = 0; r0 < rows; r0 += ROW_BLOCK)
            for (int64_t tile = begin; tile < end; tile++) {
                const auto by = [&](auto bits, auto group, auto same) {
                    constexpr int most = bits == 8 ? INT8_ROWS : INT4_ROWS;
                    in_steps<most>(r0, std::min(rows, r0 + ROW_BLOCK), [&](auto R, int64_t r) {
                        constexpr int V = R * TILE_V > most * INT_V ? INT_V : TILE_V;
                        for (int64_t first = 0; first < TILE_N; first += V * L) {
                            const int64_t o = tile * TILE_N + first;
                            int_rows<R, V, bits, group, same>(m, tile, first, row + r, y + r * stride + o, stride, m.out - o, r == 0);
                        }
                    });
                };
                const auto by_group = [&](auto bits) {
                    if (m.group == 32) by(bits, number<32>, number<true>);
                    else if (m.group % 32 == 0) by(bits, number<32>, number<false>);
                    else by(bits, number<16>, number<false>);
                };
                m.kind == INT8 ? by_group(number<8>) : by_group(number<4>);
            }
    });
}

// y (rows, out) = x (rows, in) times the transpose of matrices one below the other, as many as have outputs; `out` in all.
static void matmul(const Matrix *m, int count, const float *x, float *y, int64_t rows) {
    int64_t out = 0;
    for (int i = 0; i < count; i++) out += m[i].out;
    const Row *row = nullptr;
    for (int i = 0; i < count; y += m[i++].out) {
        if (!m[i].out) continue;
        if (m[i].kind < INT8) {
            by_kind(m[i].kind, (void *)m[i].weight, [&](auto *w) { float_matmul(w, x, y, rows, m[i].out, m[i].in, out); });
        } else {
            const Matrix &last = m[std::max(0, i - 1)];
            if (!row || last.kind != m[i].kind || last.group != m[i].group || last.zero != m[i].zero) row = rounded(m[i], x, rows);
            int_matmul(m[i], row, y, rows, out);
        }
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Attention

struct Sequence {  // tokens of a batch that follow each other
    int64_t slot, start, length;
};

// Rotates pairs of neighbours in x (D,) by cos_sin (D,), and scales.
static void rope(float *x, const float *cos_sin, int64_t D, float scale) {
    for (int64_t d = 0; d < D; d += 2) {
        const float a = x[d], b = x[d + 1], cos = cos_sin[d] * scale, sin = cos_sin[d + 1] * scale;
        x[d] = a * cos - b * sin, x[d + 1] = a * sin + b * cos;
    }
}
template <typename T>
static void copy(const float *x, T *to, int64_t n) {
    for (int64_t i = 0; i < n; i += L) store(to + i, load(x + i));
}

// Weights of scores (n,), which have space for whole vectors: exp of each less the largest, 0 behind n. Returns their sum.
static float softmax(float *scores, int64_t n) {
    const int64_t whole = (n + L - 1) / L * L;
    std::fill(scores + n, scores + whole, -INFINITY);
    F most = load(scores), total = {};
    for (int64_t s = L; s < whole; s += L) most = larger(most, load(scores + s));
    const float m = largest(most);
    for (int64_t s = 0; s < whole; s += L) {
        const F e = exp(load(scores + s) - m);
        store(scores + s, e), total += e;
    }
    const float rest = whole > n ? scores[whole - 1] * (whole - n) : 0;  // exp has no 0
    std::fill(scores + n, scores + whole, 0);
    return sum(total) - rest;
}

// Q queries (Q, D) attend to keys and values (S, D): y (Q, D).
template <int Q, typename T>
static void attend(const float *q, const T *k, const T *v, float *y, int64_t S, int64_t D) {
    const int64_t whole = (S + L - 1) / L * L;
    float *scores = (float *)scratch<SCORES>(Q * whole * sizeof(float)), total[Q];
    for (int64_t s = 0; s < S; s += L) {
        F dots[Q][L] = {};
        for (int64_t j = 0; j < std::min<int64_t>(L, S - s); j++) {
            F part[Q] = {};
            for (int64_t d = 0; d < D; d += L) {
                if (d * sizeof(T) % 64 == 0) prefetch(v + (s + j) * D + d);  // as a core reads two streams faster
                const F key = load(k + (s + j) * D + d);
                for (int i = 0; i < Q; i++) part[i] += load(q + i * D + d) * key;
            }
            for (int i = 0; i < Q; i++) dots[i][j] = part[i];
        }
        for (int i = 0; i < Q; i++) store(scores + i * whole + s, sums(dots[i]));
    }
    for (int i = 0; i < Q; i++) total[i] = 1 / softmax(scores + i * whole, S);
    in_steps<Q == 1 ? 8 : Q == 2 ? 4 : 2>(0, D / L, [&](auto V, int64_t first) {
        F sum[Q][V] = {};
        for (int64_t s = 0; s < S; s++)
            for (int p = 0; p < V; p++) {
                const F value = load(v + s * D + (first + p) * L);
                for (int i = 0; i < Q; i++) sum[i][p] += scores[i * whole + s] * value;
            }
        for (int i = 0; i < Q; i++)
            for (int p = 0; p < V; p++) store(y + i * D + (first + p) * L, sum[i][p] * total[i]);
    });
}

struct Heads {
    int64_t H, K, D, max_seq_len;  // query heads, key-value heads, their size
    int64_t width() const { return (H + 2 * K) * D; }
};

// A sequence of many tokens, whose rotated queries are in `qkv`, as matmuls for a panel of queries of one head at a time.
template <typename T>
static void attend_many(const Heads &h, const float *qkv, const T *cache, const Sequence &sequence, float *y) {
    const int64_t H = h.H, K = h.K, D = h.D, panel = 48, panels = (sequence.length + panel - 1) / panel;
    const int64_t seen = sequence.start + sequence.length, S = (seen + FLOAT_N - 1) / FLOAT_N * FLOAT_N;
    float *keys = (float *)scratch<KEYS>(2 * K * S * D * sizeof(float)), *values = keys + K * S * D;
    parallel_for(K, 1, [&](int64_t head, int64_t end) {
        for (; head < end; head++) {
            const T *k = cache + (sequence.slot * 2 * K + head) * h.max_seq_len * D, *v = k + K * h.max_seq_len * D;
            for (int64_t s = 0; s < seen; s += FLOAT_N)
                transpose_tile(k + s * D, D, D, seen - s, keys + (head * S + s) * D);
            for (int64_t d = 0; d < seen * D; d += L) store(values + head * S * D + d, load(v + d));
        }
    });
    parallel_for(H * panels, 1, [&](int64_t i, int64_t stop) {
        float *scores = (float *)scratch<SCORES>(panel * (S + 1) * sizeof(float)), *total = scores + panel * S;
        for (; i < stop; i++) {
            const int64_t head = i % H, first = (panels - 1 - i / H) * panel;  // long ones first
            const int64_t rows = std::min(panel, sequence.length - first), end = sequence.start + first + rows;
            const float *k = keys + head / (H / K) * S * D, *v = values + head / (H / K) * S * D;
            const float *q = qkv + first * h.width() + head * D;
            float *to = y + (first * H + head) * D;
            for (int64_t s = 0; s < end; s += FLOAT_N)
                in_steps<FLOAT_ROWS>(0, rows, [&](auto R, int64_t r) {
                    outer_rows<R, FLOAT_V>(k + s * D, FLOAT_N, q + r * h.width(), h.width(), scores + r * S + s, S, D, false);
                });
            for (int64_t r = 0; r < rows; r++) {
                const int64_t visible = end - rows + r + 1;
                total[r] = 1 / softmax(scores + r * S, visible);
                std::fill(scores + r * S + visible, scores + r * S + end, 0);
            }
            in_steps<FLOAT_V>(0, D / L, [&](auto V, int64_t d) {
                in_steps<FLOAT_ROWS>(0, rows, [&](auto R, int64_t r) {
                    outer_rows<R, V>(v + d * L, D, scores + r * S, S, to + r * H * D + d * L, H * D, end, false);
                });
            });
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < D; j++) to[r * H * D + j] *= total[r];
        }
    }, 1000);
}

// qkv (n, (H + 2 K) D) of the tokens of all sequences -> y (n, H D). Keys and values are stored in the cache (slots, 2 K,
// max_seq_len, D), and each query attends to its sequence's up to its own position.
template <typename T>
static void attention(const Heads &h, float *qkv, const float *cos_sin, T *cache, const Sequence *sequences, int64_t count,
                      float *y) {
    constexpr int64_t many = 16, together = 4;  // queries of one key-value head that read keys at once
    const int64_t H = h.H, K = h.K, D = h.D, G = H / K, splits = (G + together - 1) / together;
    for (int64_t i = 0, n = 0; i < count; n += sequences[i++].length) {
        const Sequence sequence = sequences[i];
        float *const begin = qkv + n * h.width();
        T *const slot = cache + sequence.slot * 2 * K * h.max_seq_len * D;
        each_row(sequence.length, h.width(), [&](int64_t t) {
            float *row = begin + t * h.width();
            const int64_t position = sequence.start + t;
            for (int64_t j = 0; j < H + K; j++)
                rope(row + j * D, cos_sin + position * D, D, j < H ? 1 / std::sqrt((float)D) : 1);
            for (int64_t j = 0; j < 2 * K; j++) copy(row + (H + j) * D, slot + (j * h.max_seq_len + position) * D, D);
        });
        if (sequence.length >= many) attend_many(h, begin, cache, sequence, y + n * H * D);
    }
    parallel_for(count * K * splits, 1, [&](int64_t part, int64_t end) {
        for (; part < end; part++) {
            const int64_t i = part / (K * splits), head = part / splits % K, first = part % splits * together;
            const Sequence sequence = sequences[i];
            if (sequence.length >= many) continue;
            int64_t n = 0;
            for (int64_t j = 0; j < i; j++) n += sequences[j].length;
            const T *k = cache + (sequence.slot * 2 * K + head) * h.max_seq_len * D, *v = k + K * h.max_seq_len * D;
            for (int64_t t = 0; t < sequence.length; t++)
                in_steps<together>(first, std::min(G, first + together), [&](auto Q, int64_t g) {
                    const int64_t j = head * G + g;
                    attend<Q>(qkv + (n + t) * h.width() + j * D, k, v, y + ((n + t) * H + j) * D, sequence.start + t + 1, D);
                });
        }
    });
}

// --------------------------------------------------------------------------------------------------------------------
// The model

struct Layer {
    const float *attention_norm;
    Matrix qkv[3], wo;  // several where they do not lie together in memory
    const float *ffn_norm;
    Matrix w13[2], w2;
    void *cache;
};
struct Model {
    int64_t dim, hidden, layers, vocabulary, kind, cache_kind;  // kind: of the embeddings
    Heads heads;
    double eps;
    const void *embeddings;
    const float *cos_sin, *norm;  // cos_sin (max_seq_len, D)
    Matrix output;
    const Layer *layer;
};

// x += y, if there is any; h = RMSNorm of x.
static void add_norm(float *x, const float *y, const float *weight, double eps, float *h, int64_t rows, int64_t dim) {
    each_row(rows, dim, [&](int64_t r) {
        F squares = {};
        float *row = x + r * dim;
        for (int64_t k = 0; k < dim; k += L) {
            F sum = load(row + k);
            if (y) store(row + k, sum += load(y + r * dim + k));
            squares += sum * sum;
        }
        const float scale = 1 / std::sqrt(sum(squares) / dim + (float)eps);
        for (int64_t k = 0; k < dim; k += L) store(h + r * dim + k, load(row + k) * scale * load(weight + k));
    });
}

static void attention_layer(const Model &m, const Layer &l, float *x, const float *add, float *y, const Sequence *sequences,
                            int64_t count, int64_t rows) {
    const Heads &h = m.heads;
    float *normed = (float *)scratch<PASS>(rows * (m.dim + h.width() + h.H * h.D) * sizeof(float));
    float *qkv = normed + rows * m.dim, *seen = qkv + rows * h.width();
    add_norm(x, add, l.attention_norm, m.eps, normed, rows, m.dim);
    matmul(l.qkv, 3, normed, qkv, rows);
    by_kind(m.cache_kind, l.cache, [&](auto *cache) { attention(h, qkv, m.cos_sin, cache, sequences, count, seen); });
    matmul(&l.wo, 1, seen, y, rows);
}

static void feed_forward_layer(const Model &m, const Layer &l, float *x, const float *add, float *y, int64_t rows) {
    const int64_t some = std::min<int64_t>(rows, 256);  // whose hidden units stay in the last-level cache
    float *normed = (float *)scratch<PASS>((rows * m.dim + some * 3 * m.hidden) * sizeof(float));
    float *both = normed + rows * m.dim, *gated = both + some * 2 * m.hidden;
    add_norm(x, add, l.ffn_norm, m.eps, normed, rows, m.dim);
    for (int64_t r = 0; r < rows; r += some) {
        const int64_t now = std::min(some, rows - r);
        matmul(l.w13, 2, normed + r * m.dim, both, now);
        each_row(now, m.hidden, [&](int64_t i) {
            const float *gate = both + 2 * i * m.hidden, *up = gate + m.hidden;
            for (int64_t k = 0; k < m.hidden; k += L) {
                const F g = load(gate + k);
                store(gated + i * m.hidden + k, g / (1 + exp(-g)) * load(up + k));
            }
        });
        matmul(&l.w2, 1, gated, y + r * m.dim, now);
    }
}

extern "C" {
int64_t llama_tile() { return TILE_N; }
const char *llama_instructions() { return INSTRUCTIONS; }
void llama_threads(int n) {
    if (n != pool->size()) pool->resize(n);
}

void llama_matmul(const Matrix *m, const float *x, float *y, int64_t rows) {
    matmul(m, 1, x, y, rows);
    pool->rest();
}

// Rows x (rows, dim) of the embeddings. Returns a token that there is not, or -1.
int64_t llama_embed(const Model *m, const int64_t *tokens, float *x, int64_t rows) {
    for (int64_t r = 0; r < rows; r++)
        if (tokens[r] < 0 || tokens[r] >= m->vocabulary) return tokens[r] < 0 ? m->vocabulary : tokens[r];
    by_kind(m->kind, (void *)m->embeddings, [&](auto *from) {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t k = 0; k < m->dim; k += L) store(x + r * m->dim + k, load(from + tokens[r] * m->dim + k));
    });
    return -1;
}

// One half of layer i, for ranks, which sum y in between: x += add, if there is any, and y is what the half adds to x.
void llama_attention(const Model *m, int64_t i, float *x, const float *add, float *y, const Sequence *sequences,
                     int64_t count, int64_t rows) {
    attention_layer(*m, m->layer[i], x, add, y, sequences, count, rows);
}
void llama_feed_forward(const Model *m, int64_t i, float *x, const float *add, float *y, int64_t rows) {
    feed_forward_layer(*m, m->layer[i], x, add, y, rows);
}

// All layers: embeddings x (rows, dim) become the last layer's output; y (rows, dim) is memory to compute in.
void llama_layers(const Model *m, float *x, float *y, const Sequence *sequences, int64_t count, int64_t rows) {
    for (int64_t i = 0; i < m->layers; i++) {
        attention_layer(*m, m->layer[i], x, i ? y : nullptr, y, sequences, count, rows);
        feed_forward_layer(*m, m->layer[i], x, y, y, rows);
    }
    for (int64_t k = 0; k < rows * m->dim; k++) x[k] += y[k];
    pool->rest();
}

// Logits (rows, vocabulary) of hidden states x (rows, dim).
void llama_logits(const Model *m, float *x, float *logits, int64_t rows) {
    float *normed = (float *)scratch<PASS>(rows * m->dim * sizeof(float));
    add_norm(x, nullptr, m->norm, m->eps, normed, rows, m->dim);
    matmul(&m->output, 1, normed, logits, rows);
    pool->rest();
}

// q (out, in), a byte each -> tiles. Numbers of outputs that are missing in the last tile are 0.
void llama_pack(int64_t bits, const uint8_t *q, uint8_t *to, int64_t out, int64_t in, int64_t group) {
    const int64_t N = TILE_N, block = group % 32 ? 16 : 32, size = N * in * bits / 8;
    parallel_for((out + N - 1) / N, 1, [&](int64_t tile, int64_t end) {
        for (; tile < end; tile++) {
            uint8_t *at = to + tile * size;
            memset(at, 0, size);
            for (int64_t n = 0; n < std::min<int64_t>(N, out - tile * N); n++) {
                const uint8_t *row = q + (tile * N + n) * in;
                if (bits == 8)
                    for (int64_t k = 0; k < in; k += 4) memcpy(at + k * N + n * 4, row + k, 4);
                else
                    for (int64_t k = 0; k < in; k += block)
                        for (int64_t j = 0; j < block / 2; j++)
                            at[(k / 8 + j / 4) * N * 4 + n * 4 + j % 4] = row[k + j] | row[k + block / 2 + j] << 4;
            }
        }
    });
    pool->rest();
}
}
