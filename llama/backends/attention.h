// RoPE, the KV cache and attention, for the sequences of a packed batch.
#pragma once

#include <vector>

#include "matmul.h"

struct Sequence {  // consecutive tokens of one sequence
    int64_t slot, start, length;  // of the cache; the first position; the number of tokens
    int64_t outputs;  // the number of last tokens whose attention output is computed
};

// Applies RoPE to adjacent pairs of x (D,), with cos and sin interleaved in cos_sin (D,), and multiplies by `scale`.
static void rope(float *x, const float *cos_sin, int64_t D, float scale) {
    for (int64_t d = 0; d < D; d += L) store(x + d, complex_multiply(load(x + d), load(cos_sin + d) * scale));
}
template <typename T>
static void convert(const float *x, T *to, int64_t n) {
    for (int64_t i = 0; i < n; i += L) store(to + i, load(x + i));
}

// Softmax without the division: scores (n,) become exp(score - max), and their sum is returned. `scores` is padded to whole
// vectors, with 0 after n.
static float exp_scores(float *scores, int64_t n) {
    const int64_t padded = (n + L - 1) / L * L;
    std::fill(scores + n, scores + padded, -INFINITY);
    F largest = load(scores), total = {};
    for (int64_t s = L; s < padded; s += L) largest = max(largest, load(scores + s));
    const float m = reduce_max(largest);
    for (int64_t s = 0; s < padded; s += L) {
        const F e = exp(load(scores + s) - m);
        store(scores + s, e), total += e;
    }
    const float padding = padded > n ? scores[padded - 1] * (padded - n) : 0;  // as exp clamps, exp(-inf) is not 0
    std::fill(scores + n, scores + padded, 0);
    return reduce_add(total) - padding;
}

// Q queries (Q, D) attend to S keys and values (S, D): y (Q, D). Values are prefetched while keys are read, and `next_keys`
// while values are read, so that the core's memory reads never pause.
template <int Q, typename T>
static void attend(const float *q, const T *k, const T *v, float *y, int64_t S, int64_t D, const T *next_keys) {
    const int64_t padded = (S + L - 1) / L * L;
    float *scores = (float *)scratch<SCORES>(Q * padded * sizeof(float)), inverse_sum[Q];
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
        for (int i = 0; i < Q; i++) store(scores + i * padded + s, sum_each(dots[i]));
    }
    for (int i = 0; i < Q; i++) inverse_sum[i] = 1 / exp_scores(scores + i * padded, S);
    for_blocks<Q == 1 ? 8 : Q == 2 ? 4 : 2>(0, D / L, [&](auto V, int64_t first) {
        F sum[Q][V] = {};
        for (int64_t s = 0; s < S; s++)
            for (int p = 0; p < V; p++) {
                const int64_t at = s * D + (first + p) * L;
                if (at * sizeof(T) % 64 == 0) prefetch(next_keys + at);
                const F value = load(v + at);
                for (int i = 0; i < Q; i++) sum[i][p] += scores[i * padded + s] * value;
            }
        for (int i = 0; i < Q; i++)
            for (int p = 0; p < V; p++) store(y + i * D + (first + p) * L, sum[i][p] * inverse_sum[i]);
    });
}

constexpr int64_t MIN_PREFILL = 16;  // tokens of a sequence from which attention is computed by matmuls

struct Heads {
    int64_t H, K, D, max_seq_len;  // query heads, key-value heads, head size
    int64_t width() const { return (H + 2 * K) * D; }  // of a row of qkv
};

// Packs values v (S, D) for outer_product_kernel: float32 (S, D) or, as Pairs, positions s and s + 1 in a lane (S / 2, D).
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

// Attention of a sequence of many tokens, whose queries in `qkv` have RoPE applied: matmuls for a panel of queries of one
// head at a time, with keys and values packed once. Panels before the last `outputs` tokens are skipped.
template <typename T>
static void attend_prefill(const Heads &h, const float *qkv, const T *cache, const Sequence &sequence, float *y) {
    constexpr int64_t panel = 48, N = PER_LANE<T>;
    const int64_t H = h.H, K = h.K, D = h.D, width = D / N, panels = (sequence.length + panel - 1) / panel;
    const int64_t computed = panels - (sequence.length - sequence.outputs) / panel;
    const int64_t kv_length = sequence.start + sequence.length, S = (kv_length + FLOAT_N - 1) / FLOAT_N * FLOAT_N;
    float *keys = (float *)scratch<PACKED_KV>(2 * K * S * width * sizeof(float)), *values = keys + K * S * width;
    parallel_for(K, [&](int64_t head, int64_t end) {
        for (; head < end; head++) {
            const T *k = cache + (sequence.slot * 2 * K + head) * h.max_seq_len * width, *v = k + K * h.max_seq_len * width;
            for (int64_t s = 0; s < kv_length; s += FLOAT_N)
                pack_weight_tile(k + s * width, width, width, kv_length - s, keys + (head * S + s) * width);
            pack_values(v, kv_length, D, values + head * S * width);
        }
    });
    parallel_for(H * computed, [&](int64_t i, int64_t stop) {
        float *scores = (float *)scratch<SCORES>(panel * (S + 1 + D) * sizeof(float)), *inverse_sum = scores + panel * S;
        for (; i < stop; i++) {
            const int64_t head = i / computed, from = (panels - 1 - i % computed) * panel;  // the longest first
            const int64_t rows = std::min(panel, sequence.length - from), end = sequence.start + from + rows;
            const int64_t padded = (end + L - 1) / L * L;
            const float *k = keys + head / (H / K) * S * width, *v = values + head / (H / K) * S * width;
            const float *q = qkv + from * h.width() + head * D;
            int64_t q_stride = h.width();
            if constexpr (N == 2) {
                for (int64_t r = 0; r < rows; r++)
                    convert(q + r * q_stride, (BFloat16 *)(inverse_sum + panel + r * width), D);
                q = inverse_sum + panel, q_stride = width;
            }
            float *to = y + (from * H + head) * D;
            for (int64_t s = 0; s < end; s += FLOAT_N)
                for_blocks<FLOAT_ROWS>(0, rows, [&](auto R, int64_t r) {
                    float *score = scores + r * S + s;
                    outer_product_kernel<R, FLOAT_V, T>(k + s * width, FLOAT_N, q + r * q_stride, q_stride, score, S, width,
                                                        false);
                });
            for (int64_t r = 0; r < rows; r++) {
                const int64_t visible = end - rows + r + 1;
                float *row = scores + r * S;
                inverse_sum[r] = 1 / exp_scores(row, visible);
                std::fill(row + visible, row + padded, 0);  // the causal mask
                if (N == 2) convert(row, (BFloat16 *)row, padded);
            }
            for_blocks<FLOAT_V>(0, D / L, [&](auto V, int64_t d) {
                for_blocks<FLOAT_ROWS>(0, rows, [&](auto R, int64_t r) {
                    float *out = to + r * H * D + d * L;
                    outer_product_kernel<R, V, T>(v + d * L, D, scores + r * S, S, out, H * D, (end + N - 1) / N, false);
                });
            });
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < D; j++) to[r * H * D + j] *= inverse_sum[r];
        }
    });
}

// Attention of the sequences of a few tokens, as in decode steps, one token at a time. Queries in `qkv` have RoPE applied.
template <typename T>
static void attend_decode(const Heads &h, const float *qkv, const T *cache, const Sequence *sequences, int64_t count,
                       float *y) {
    constexpr int64_t Q_HEADS = 4;  // query heads that share a read of their key-value head
    const int64_t H = h.H, K = h.K, D = h.D, G = H / K, splits = (G + Q_HEADS - 1) / Q_HEADS;
    const int64_t size = h.max_seq_len * D;
    const auto keys = [&](int64_t part) {
        return cache + (sequences[part / (K * splits)].slot * 2 * K + part / splits % K) * size;
    };
    parallel_for(count * K * splits, [&](int64_t part, int64_t end) {
        for (; part < end; part++) {
            const int64_t i = part / (K * splits), head = part / splits % K, first = part % splits * Q_HEADS;
            const Sequence sequence = sequences[i];
            if (sequence.length >= MIN_PREFILL) continue;
            int64_t n = 0;
            for (int64_t j = 0; j < i; j++) n += sequences[j].length;
            const T *k = keys(part), *v = k + K * size, *next_keys = keys(std::min(part + 1, end - 1));
            for (int64_t t = sequence.length - sequence.outputs; t < sequence.length; t++)
                for_blocks<Q_HEADS>(first, std::min(G, first + Q_HEADS), [&](auto Q, int64_t g) {
                    const int64_t j = head * G + g;
                    attend<Q>(qkv + (n + t) * h.width() + j * D, k, v, y + ((n + t) * H + j) * D, sequence.start + t + 1, D,
                              next_keys);
                });
        }
    });
}

// qkv (n, (H + 2 K) D) of the tokens of all sequences -> y (n, H D). Applies RoPE, stores keys and values in the cache
// (slots, 2 K, max_seq_len, D), and attends causally within each sequence. In y the rows of a sequence before its last
// `outputs` are unspecified.
template <typename T>
static void attention(const Heads &h, float *qkv, const float *cos_sin, T *cache, const Sequence *sequences, int64_t count,
                      float *y) {
    const int64_t H = h.H, K = h.K, D = h.D;
    std::vector<std::pair<int64_t, int64_t>> tokens;  // slot and position of each
    for (int64_t i = 0; i < count; i++)
        for (int64_t t = 0; t < sequences[i].length; t++) tokens.push_back({sequences[i].slot, sequences[i].start + t});
    parallel_for_rows(tokens.size(), h.width(), [&](int64_t n) {
        const auto [slot, position] = tokens[n];
        float *row = qkv + n * h.width();
        for (int64_t j = 0; j < H + K; j++)
            rope(row + j * D, cos_sin + position * D, D, j < H ? 1 / std::sqrt((float)D) : 1);
        for (int64_t j = 0; j < 2 * K; j++)
            convert(row + (H + j) * D, cache + ((slot * 2 * K + j) * h.max_seq_len + position) * D, D);
    });
    const auto compute = [&](auto *prefill_cache) {  // the cache with the element type that attend_prefill reads
        for (int64_t i = 0, n = 0; i < count; n += sequences[i++].length)
            if (sequences[i].length >= MIN_PREFILL && sequences[i].outputs)
                attend_prefill(h, qkv + n * h.width(), prefill_cache, sequences[i], y + n * H * D);
        attend_decode<T>(h, qkv, cache, sequences, count, y);
    };
    if constexpr (HAS_DOT2 && std::is_same_v<T, BFloat16>)
        if (D % (2 * L) == 0) return compute((const Pair *)cache);
    compute((const T *)cache);
}
