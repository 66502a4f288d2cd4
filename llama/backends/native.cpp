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
// A token's activations are rounded to 8 bits, with one scale for each group: x = scale q. So
// w x = sum of scale_w scale_x (q_w q_x) + min scale_x (sum of q_x), where q_w q_x is a dot product of bytes.

#include "threads.h"
#include "vector.h"

constexpr int N = INT_V * L, FLOAT_N = FLOAT_V * L;  // outputs of a tile
constexpr int64_t ROW_BLOCK = 96;                    // rows of x that pass a tile while they stay in the L2 cache

enum Kind : int64_t { FLOAT32, FLOAT16, BFLOAT16, INT8, INT4 };

struct Matrix {
    int64_t kind, out, in, group, zero;  // zero: what 4 bits have more than q
    const void *weight;
    const Half *scale, *min;  // min may be missing
};

// Calls work(integral_constant<R>, r) for rows from r on, up to `most` at a time.
template <int most, typename Work>
INLINE void in_steps(int64_t r, int64_t rows, const Work &work) {
    for (; r + most <= rows; r += most) work(std::integral_constant<int, most>(), r);
    if constexpr (most > 1) in_steps<(most > 8 ? 8 : most > 4 ? 4 : most / 2)>(r, rows, work);
}

// --------------------------------------------------------------------------------------------------------------------
// Matmuls of floats

// O outputs of R rows by dot products: reads weights once, as fast as memory gives them.
template <int R, int O, typename T>
static void dot_rows(const T *w, const float *x, float *y, int64_t stride, int64_t in) {
    F total[R][O] = {};
    for (int64_t k = 0; k < in; k += L) {
        F weights[O];
        for (int o = 0; o < O; o++) {
            if (k * sizeof(T) % 64 == 0) prefetch(w + (O + o) * in + k);  // the next outputs
            weights[o] = load(w + o * in + k);
        }
        for (int r = 0; r < R; r++) {
            const F row = load(x + r * in + k);
            for (int o = 0; o < O; o++) total[r][o] += weights[o] * row;
        }
    }
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) y[r * stride + o] = sum(total[r][o]);
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
                in_steps<4>(0, rows, [&](auto R, int64_t r) {
                    constexpr int O = R == 1 ? 2 : 3;
                    for (int64_t o = n; o < n + 12; o += O)
                        dot_rows<R, O>(w + o * in, x + r * in, y + r * stride + o, stride, in);
                });
            for (; n < end; n++)
                in_steps<4>(0, rows, [&](auto R, int64_t r) {
                    dot_rows<R, 1>(w + n * in, x + r * in, y + r * stride + n, stride, in);
                });
        });
    // Blocks of the weights are transposed, so that no sum needs to be taken across a vector.
    constexpr int64_t deep = 256, block = 4 * FLOAT_N;
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

struct Row {       // of x, rounded
    const void *q;  // Int8 or, for weights of 4 bits, int8_t
    const float *scale;  // of each group; NaN where x is not finite
    const int32_t *sum;  // of a group of q
};

template <typename T>
static void round_row(const float *x, T *q, float *scale, int32_t *sums, int64_t in, int64_t group) {
    for (int64_t g = 0; g < in / group; g++, x += group, q += group) {
        F most = splat(1e-30f), zero = {};
        for (int64_t k = 0; k < group; k += L) {
            most = larger(most, magnitude(load(x + k)));
            zero += load(x + k) * 0.0f;
        }
        const float s = largest(most) / 127;
        I total = {};
        for (int64_t k = 0; k < group; k += L) {
            const I n = nearest(load(x + k) * (1 / s));
            total += n;
            if (sizeof(T) == 2) {
                auto pairs = __builtin_convertvector(n, Vector<int16_t, BYTES / 2>::type);
                for (int i = 0; i < L; i += 4) std::swap(pairs[i + 1], pairs[i + 2]);
                put(q + k, pairs);
            } else {
                put(q + k, __builtin_convertvector(n, Vector<int8_t, BYTES / 4>::type));
            }
        }
        scale[g] = s + sum(zero), sums[g] = sum(total);
    }
}

// Dot products of a tile's group with R rows; `w` moves on to the next group.
template <int R>
INLINE void int8_dots(const uint8_t *&w, const Row *x, int64_t begin, int64_t end, I (&dots)[R][INT_V]) {
    for (int64_t k = begin / 4; k < end / 4; k++, w += INT_V * BYTES) {
        for (int i = 0; i < INT_V * BYTES; i += 64) prefetch(w + i + 4096);
        for (int half = 0; half < HALVES; half++) {
            B weights[INT_V];
            for (int v = 0; v < INT_V; v++) weights[v] = columns(get<B>(w + v * BYTES), half);
            for (int r = 0; r < R; r++) {
                const I row = splat(get<int32_t>((const int32_t *)x[r].q + k * HALVES + half));
                for (int v = 0; v < INT_V; v++) dots[r][v] = dot8(dots[r][v], weights[v], row);
            }
        }
    }
}
template <int R, int block>
INLINE void int4_dots(const uint8_t *&w, const Row *x, int64_t begin, int64_t end, I (&dots)[R][INT_V]) {
    for (int64_t k = begin; k < end; k += block) {
        I part[R][INT_V] = {};
#pragma GCC unroll 4
        for (int t = 0; t < block / 8; t++, w += INT_V * BYTES) {
            for (int i = 0; i < INT_V * BYTES; i += 64) prefetch(w + i + 4096);
            for (int half = 0; half < 2; half++) {
                B weights[INT_V];
                for (int v = 0; v < INT_V; v++) {
                    const B both = get<B>(w + v * BYTES);
                    weights[v] = (half ? (B)((I16)both >> 4) : both) & 15;
                }
                for (int r = 0; r < R; r++) {
                    const I row = splat(get<int32_t>((const int8_t *)x[r].q + k + half * block / 2 + 4 * t));
                    for (int v = 0; v < INT_V; v++) part[r][v] = dot4(part[r][v], weights[v], row);
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < INT_V; v++) dots[r][v] = widen(dots[r][v], part[r][v]);
    }
}

// N outputs of R rows, of which the first n are stored.
template <int R, int bits, int block>
__attribute__((noinline)) static void int_rows(const Matrix &m, int64_t tile, const Row *x, float *y, int64_t stride,
                                               int64_t n) {
    const int64_t groups = m.in / m.group;
    const uint8_t *w = (const uint8_t *)m.weight + tile * N * m.in * bits / 8;
    const Half *scale = m.scale + tile * groups * N, *min = m.min ? m.min + tile * groups * N : nullptr;
    const int32_t zero = bits == 8 ? BIAS : m.zero;
    F total[R][INT_V] = {};
    for (int64_t g = 0; g < groups; g++) {
        I dots[R][INT_V] = {};
        if constexpr (bits == 8) int8_dots(w, x, g * m.group, (g + 1) * m.group, dots);
        else int4_dots<R, block>(w, x, g * m.group, (g + 1) * m.group, dots);
        for (int v = 0; v < INT_V; v++) {
            const F s = load(scale + g * N + v * L);
            for (int r = 0; r < R; r++) {
                const F dot = __builtin_convertvector(dots[r][v] - zero * x[r].sum[g], F);
                total[r][v] += dot * (s * x[r].scale[g]);
            }
            if (!min) continue;
            const F m = load(min + g * N + v * L);
            for (int r = 0; r < R; r++) total[r][v] += m * (x[r].scale[g] * x[r].sum[g]);
        }
    }
    for (int r = 0; r < R; r++)
        if (n >= N)
            for (int v = 0; v < INT_V; v++) store(y + r * stride + v * L, total[r][v]);
        else
            memcpy(y + r * stride, total[r], n * sizeof(float));
}

static void int_matmul(const Matrix &m, const float *x, float *y, int64_t rows, int64_t stride) {
    const int64_t groups = m.in / m.group, size = m.in * (m.kind == INT8 ? sizeof(Int8) : 1);
    char *memory = (char *)scratch<ROWS>(rows * (size + groups * 8 + sizeof(Row)) + 64);
    Row *row = (Row *)memory;
    float *scale = (float *)(row + rows);
    int32_t *sums = (int32_t *)(scale + rows * groups);
    char *q = (char *)(sums + rows * groups);
    each_row(rows, [&](int64_t r) {
        const auto round = [&](auto *to) { round_row(x + r * m.in, to, scale + r * groups, sums + r * groups, m.in, m.group); };
        m.kind == INT8 ? round((Int8 *)(q + r * size)) : round((int8_t *)(q + r * size));
        row[r] = {q + r * size, scale + r * groups, sums + r * groups};
    });
    parallel_for((m.out + N - 1) / N, 1, [&](int64_t begin, int64_t end) {
        for (int64_t r0 = 0; r0 < rows; r0 += ROW_BLOCK)
            for (int64_t tile = begin; tile < end; tile++) {
                const int64_t stop = std::min(rows, r0 + ROW_BLOCK), n = m.out - tile * N;
                float *to = y + tile * N;
                if (m.kind == INT8)
                    in_steps<INT8_ROWS>(r0, stop, [&](auto R, int64_t r) {
                        int_rows<R, 8, 0>(m, tile, row + r, to + r * stride, stride, n);
                    });
                else
                    in_steps<INT4_ROWS>(r0, stop, [&](auto R, int64_t r) {
                        if (m.group % 32) int_rows<R, 4, 16>(m, tile, row + r, to + r * stride, stride, n);
                        else int_rows<R, 4, 32>(m, tile, row + r, to + r * stride, stride, n);
                    });
            }
    });
}

// y (rows, out) = x (rows, in) times the transpose of matrices one below the other, as many as have outputs; `out` in all.
static void matmul(const Matrix *m, int count, const float *x, float *y, int64_t rows) {
    int64_t out = 0;
    for (int i = 0; i < count; i++) out += m[i].out;
    for (int i = 0; i < count; y += m[i++].out) {
        const auto floats = [&](auto *w) { float_matmul(w, x, y, rows, m[i].out, m[i].in, out); };
        if (!m[i].out) continue;
        if (m[i].kind == FLOAT32) floats((const float *)m[i].weight);
        else if (m[i].kind == FLOAT16) floats((const Half *)m[i].weight);
        else if (m[i].kind == BFLOAT16) floats((const BFloat16 *)m[i].weight);
        else int_matmul(m[i], x, y, rows, out);
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
                const F key = load(k + (s + j) * D + d);
                for (int i = 0; i < Q; i++) part[i] += load(q + i * D + d) * key;
            }
            for (int i = 0; i < Q; i++) dots[i][j] = part[i];
        }
        for (int i = 0; i < Q; i++) store(scores + i * whole + s, sums(dots[i]));
    }
    for (int i = 0; i < Q; i++) total[i] = 1 / softmax(scores + i * whole, S);
    const auto mix = [&](auto V, int64_t d) {
        F sum[Q][V] = {};
        for (int64_t s = 0; s < S; s++)
            for (int p = 0; p < V; p++) {
                const F value = load(v + s * D + d + p * L);
                for (int i = 0; i < Q; i++) sum[i][p] += scores[i * whole + s] * value;
            }
        for (int i = 0; i < Q; i++)
            for (int p = 0; p < V; p++) store(y + i * D + d + p * L, sum[i][p] * total[i]);
    };
    int64_t d = 0;
    for (; d + 2 * L <= D; d += 2 * L) mix(std::integral_constant<int, 2>(), d);
    for (; d < D; d += L) mix(std::integral_constant<int, 1>(), d);
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
            const auto mix = [&](auto V, int64_t d) {
                in_steps<FLOAT_ROWS>(0, rows, [&](auto R, int64_t r) {
                    outer_rows<R, V>(v + d, D, scores + r * S, S, to + r * H * D + d, H * D, end, false);
                });
            };
            int64_t d = 0;
            for (; d + FLOAT_N <= D; d += FLOAT_N) mix(std::integral_constant<int, FLOAT_V>(), d);
            for (; d < D; d += L) mix(std::integral_constant<int, 1>(), d);
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
        each_row(sequence.length, [&](int64_t t) {
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
    int64_t dim, hidden, layers, cache_kind;
    Heads heads;
    double eps;
    const float *cos_sin, *norm;  // cos_sin (max_seq_len, D)
    Matrix output;
    const Layer *layer;
};

// x += y, if there is any; h = RMSNorm of x.
static void add_norm(float *x, const float *y, const float *weight, double eps, float *h, int64_t rows, int64_t dim) {
    each_row(rows, [&](int64_t r) {
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
    const auto attend = [&](auto *cache) { attention(h, qkv, m.cos_sin, cache, sequences, count, seen); };
    if (m.cache_kind == FLOAT32) attend((float *)l.cache);
    else if (m.cache_kind == FLOAT16) attend((Half *)l.cache);
    else attend((BFloat16 *)l.cache);
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
        each_row(now, [&](int64_t i) {
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
int llama_tile() { return N; }
const char *llama_instructions() { return INSTRUCTIONS; }
void llama_threads(int n) {
    if (n != pool->size()) pool->resize(n);
}

void llama_matmul(const Matrix *m, const float *x, float *y, int64_t rows) {
    matmul(m, 1, x, y, rows);
    pool->rest();
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
    const int64_t block = group % 32 ? 16 : 32, size = N * in * bits / 8;
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
