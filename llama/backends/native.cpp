// The forward pass of a Llama on a CPU: attention and whole layers, behind a C interface for ctypes.

#include "matmul.h"

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
    const auto keys = [&](int64_t part) {
        return cache + (sequences[part / (K * splits)].slot * 2 * K + part / splits % K) * h.max_seq_len * D;
    };
    parallel_for(count * K * splits, 1, [&](int64_t part, int64_t end) {
        for (; part < end; part++) {
            const int64_t i = part / (K * splits), head = part / splits % K, first = part % splits * together;
            const Sequence sequence = sequences[i];
            if (sequence.length >= many) continue;
            int64_t n = 0;
            for (int64_t j = 0; j < i; j++) n += sequences[j].length;
            const T *k = keys(part), *v = k + K * h.max_seq_len * D, *next = keys(std::min(part + 1, end - 1));
            for (int64_t t = 0; t < sequence.length; t++)
                in_steps<together>(first, std::min(G, first + together), [&](auto Q, int64_t g) {
                    const int64_t j = head * G + g;
                    attend<Q>(qkv + (n + t) * h.width() + j * D, k, v, y + ((n + t) * H + j) * D, sequence.start + t + 1, D,
                              next);
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

// Rows x (rows, dim) of the embeddings. Returns the first invalid token, or -1.
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

// The four numbers in two bytes, one to a byte.
static uint32_t spread(const uint8_t *q) {
    const uint32_t pairs = (get<uint16_t>(q) | get<uint16_t>(q) << 8) & 0x00FF00FF;
    return (pairs | pairs << 4) & 0x0F0F0F0F;
}

// q (out, in), a byte each, or two in a byte, the even columns in the low halves -> tiles. Outputs that are missing in the
// last tile are 0.
void llama_pack(int64_t bits, const uint8_t *q, uint8_t *to, int64_t out, int64_t in, int64_t group) {
    const int64_t N = TILE_N, half = group % 32 ? 8 : 16, bytes = in * bits / 8, size = N * bytes;
    parallel_for((out + N - 1) / N, 1, [&](int64_t tile, int64_t end) {
        for (; tile < end; tile++) {
            uint8_t *at = to + tile * size;
            const uint8_t *rows = q + tile * N * bytes;
            const int64_t n = std::min<int64_t>(N, out - tile * N);
            if (n < N) memset(at, 0, size);
            for (int64_t k = 0; k < bytes; k += 4, at += N * 4) {  // of 8 bits 4 columns; of 4 bits 8, of a block's halves
                const int64_t from = bits == 8 ? k : k - k % half + k % half / 2;
                for (int64_t i = 0; i < n; i++) {
                    const uint8_t *row = rows + i * bytes + from;
                    put(at + i * 4, bits == 8 ? get<uint32_t>(row) : spread(row) | spread(row + half / 2) << 4);
                }
            }
        }
    });
    pool->rest();
}
}
