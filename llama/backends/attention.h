// Attention of the sequences of a batch to the cache of keys and values.
#pragma once

#include "matmul.h"

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

// Q queries (Q, D) attend to keys and values (S, D): y (Q, D). Values are fetched while keys are read, and the keys at
// `next` while values are, as a core reads memory faster when it is always reading.
template <int Q, typename T>
static void attend(const float *q, const T *k, const T *v, float *y, int64_t S, int64_t D, const T *next) {
    const int64_t whole = (S + L - 1) / L * L;
    float *scores = (float *)scratch<SCORES>(Q * whole * sizeof(float)), total[Q];
    for (int64_t s = 0; s < S; s += L) {
        F dots[Q][L] = {};
        for (int64_t j = 0; j < std::min<int64_t>(L, S - s); j++) {
            F part[Q] = {};
            for (int64_t d = 0; d < D; d += L) {
                if (d * sizeof(T) % 64 == 0) prefetch(v + (s + j) * D + d);
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
                const int64_t at = s * D + (first + p) * L;
                if (at * sizeof(T) % 64 == 0) prefetch(next + at);
                const F value = load(v + at);
                for (int i = 0; i < Q; i++) sum[i][p] += scores[i * whole + s] * value;
            }
        for (int i = 0; i < Q; i++)
            for (int p = 0; p < V; p++) store(y + i * D + (first + p) * L, sum[i][p] * total[i]);
    });
}

constexpr int64_t MANY = 16;  // tokens of a sequence that attend by matmuls

struct Heads {
    int64_t H, K, D, max_seq_len;  // query heads, key-value heads, their size
    int64_t width() const { return (H + 2 * K) * D; }
};

// Values v (S, D) as outer_rows reads them: in float32, or of Pairs the neighbours s and s + 1 in a lane, (S / 2, D).
template <typename T>
static void pack_values(const T *v, int64_t S, int64_t D, float *to) {
    if constexpr (PER_LANE<T> == 1) {
        for (int64_t d = 0; d < S * D; d += L) store(to + d, load(v + d));
    } else {
        for (int64_t s = 0; s < S; s += 2)
            for (int64_t d = 0; d < D / 2; d += L, to += 2 * L) {
                const U a = (U)load(v + s * D / 2 + d), b = s + 1 < S ? (U)load(v + (s + 1) * D / 2 + d) : U{};
                const F even = (F)((a & 0xFFFF) | b << 16), odd = (F)(a >> 16 | (b & 0xFFFF0000));
                store(to, interleave_low(even, odd)), store(to + L, interleave_high(even, odd));
            }
    }
}

// A sequence of many tokens, whose rotated queries are in `qkv`, as matmuls for a panel of queries of one head at a time.
template <typename T>
static void attend_many(const Heads &h, const float *qkv, const T *cache, const Sequence &sequence, float *y) {
    constexpr int64_t panel = 48, N = PER_LANE<T>;
    const int64_t H = h.H, K = h.K, D = h.D, width = D / N, panels = (sequence.length + panel - 1) / panel;
    const int64_t seen = sequence.start + sequence.length, S = (seen + FLOAT_N - 1) / FLOAT_N * FLOAT_N;
    float *keys = (float *)scratch<KEYS>(2 * K * S * width * sizeof(float)), *values = keys + K * S * width;
    parallel_for(K, 1, [&](int64_t head, int64_t end) {
        for (; head < end; head++) {
            const T *k = cache + (sequence.slot * 2 * K + head) * h.max_seq_len * width, *v = k + K * h.max_seq_len * width;
            for (int64_t s = 0; s < seen; s += FLOAT_N)
                transpose_tile(k + s * width, width, width, seen - s, keys + (head * S + s) * width);
            pack_values(v, seen, D, values + head * S * width);
        }
    });
    parallel_for(H * panels, 1, [&](int64_t i, int64_t stop) {
        float *scores = (float *)scratch<SCORES>(panel * (S + 1 + D) * sizeof(float)), *total = scores + panel * S;
        for (; i < stop; i++) {
            const int64_t head = i % H, from = (panels - 1 - i / H) * panel;  // long ones first
            const int64_t rows = std::min(panel, sequence.length - from), end = sequence.start + from + rows;
            const int64_t whole = (end + L - 1) / L * L;
            const float *k = keys + head / (H / K) * S * width, *v = values + head / (H / K) * S * width;
            const float *q = qkv + from * h.width() + head * D;
            int64_t apart = h.width();
            if constexpr (N == 2) {
                for (int64_t r = 0; r < rows; r++) copy(q + r * apart, (BFloat16 *)(total + panel + r * width), D);
                q = total + panel, apart = width;
            }
            float *to = y + (from * H + head) * D;
            for (int64_t s = 0; s < end; s += FLOAT_N)
                in_steps<FLOAT_ROWS>(0, rows, [&](auto R, int64_t r) {
                    float *score = scores + r * S + s;
                    outer_rows<R, FLOAT_V, T>(k + s * width, FLOAT_N, q + r * apart, apart, score, S, width, false);
                });
            for (int64_t r = 0; r < rows; r++) {
                const int64_t visible = end - rows + r + 1;
                float *row = scores + r * S;
                total[r] = 1 / softmax(row, visible);
                std::fill(row + visible, row + whole, 0);
                if (N == 2) copy(row, (BFloat16 *)row, whole);
            }
            in_steps<FLOAT_V>(0, D / L, [&](auto V, int64_t d) {
                in_steps<FLOAT_ROWS>(0, rows, [&](auto R, int64_t r) {
                    float *out = to + r * H * D + d * L;
                    outer_rows<R, V, T>(v + d * L, D, scores + r * S, S, out, H * D, (end + N - 1) / N, false);
                });
            });
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < D; j++) to[r * H * D + j] *= total[r];
        }
    }, 1000);
}

// Sequences of a few tokens, whose rotated queries are in `qkv`, each query by itself.
template <typename T>
static void attend_few(const Heads &h, const float *qkv, const T *cache, const Sequence *sequences, int64_t count,
                       float *y) {
    constexpr int64_t together = 4;  // queries of one key-value head that read keys at once
    const int64_t H = h.H, K = h.K, D = h.D, G = H / K, splits = (G + together - 1) / together;
    const int64_t size = h.max_seq_len * D;
    const auto keys = [&](int64_t part) {
        return cache + (sequences[part / (K * splits)].slot * 2 * K + part / splits % K) * size;
    };
    parallel_for(count * K * splits, 1, [&](int64_t part, int64_t end) {
        for (; part < end; part++) {
            const int64_t i = part / (K * splits), head = part / splits % K, first = part % splits * together;
            const Sequence sequence = sequences[i];
            if (sequence.length >= MANY) continue;
            int64_t n = 0;
            for (int64_t j = 0; j < i; j++) n += sequences[j].length;
            const T *k = keys(part), *v = k + K * size, *next = keys(std::min(part + 1, end - 1));
            for (int64_t t = 0; t < sequence.length; t++)
                in_steps<together>(first, std::min(G, first + together), [&](auto Q, int64_t g) {
                    const int64_t j = head * G + g;
                    attend<Q>(qkv + (n + t) * h.width() + j * D, k, v, y + ((n + t) * H + j) * D, sequence.start + t + 1, D,
                              next);
                });
        }
    });
}

// qkv (n, (H + 2 K) D) of the tokens of all sequences -> y (n, H D). Keys and values are stored in the cache (slots, 2 K,
// max_seq_len, D), and each query attends to its sequence's up to its own position.
template <typename T>
static void attention(const Heads &h, float *qkv, const float *cos_sin, T *cache, const Sequence *sequences, int64_t count,
                      float *y) {
    const int64_t H = h.H, K = h.K, D = h.D;
    const auto by = [&](auto *many) {  // the cache as a sequence of many tokens reads it
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
            if (sequence.length >= MANY) attend_many(h, begin, many, sequence, y + n * H * D);
        }
        attend_few<T>(h, qkv, cache, sequences, count, y);
    };
    if constexpr (PAIRS && std::is_same_v<T, BFloat16>)
        if (D % (2 * L) == 0) return by((const Pair *)cache);
    by((const T *)cache);
}
