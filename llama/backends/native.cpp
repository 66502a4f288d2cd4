// The forward pass of a Llama on a CPU: whole layers, behind a C interface for ctypes.

#include "attention.h"

// --------------------------------------------------------------------------------------------------------------------
// The model

struct Layer {
    const float *attention_norm;
    Matrix qkv[3], wo;  // wq, wk, wv need not be adjacent in memory
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

// x += y, unless y is null; h = RMSNorm(x).
static void add_rms_norm(float *x, const float *y, const float *weight, double eps, float *h, int64_t rows, int64_t dim) {
    parallel_for_rows(rows, dim, [&](int64_t r) {
        F squares = {};
        float *row = x + r * dim;
        for (int64_t k = 0; k < dim; k += L) {
            F sum = load(row + k);
            if (y) store(row + k, sum += load(y + r * dim + k));
            squares += sum * sum;
        }
        const float scale = 1 / std::sqrt(reduce_add(squares) / dim + (float)eps);
        for (int64_t k = 0; k < dim; k += L) store(h + r * dim + k, load(row + k) * scale * load(weight + k));
    });
}

// x += add, unless it is null. Returns the output of attention (rows, H D), before wo.
static float *attention_output(const Model &m, const Layer &l, float *x, const float *add, const Sequence *sequences,
                              int64_t count, int64_t rows) {
    const Heads &h = m.heads;
    float *normed = (float *)scratch<ACTIVATIONS>(rows * (m.dim + h.width() + h.H * h.D) * sizeof(float));
    float *qkv = normed + rows * m.dim, *attended = qkv + rows * h.width();
    add_rms_norm(x, add, l.attention_norm, m.eps, normed, rows, m.dim);
    matmul(l.qkv, 3, normed, qkv, rows);
    dispatch(m.cache_kind, l.cache, [&](auto *cache) { attention(h, qkv, m.cos_sin, cache, sequences, count, attended); });
    return attended;
}

static void feed_forward_layer(const Model &m, const Layer &l, float *x, const float *add, float *y, int64_t rows) {
    const int64_t block = std::min<int64_t>(rows, 256);  // rows whose hidden activations stay in the last-level cache
    float *normed = (float *)scratch<ACTIVATIONS>((rows * m.dim + block * 3 * m.hidden) * sizeof(float));
    float *gate_up = normed + rows * m.dim, *gated = gate_up + block * 2 * m.hidden;
    add_rms_norm(x, add, l.ffn_norm, m.eps, normed, rows, m.dim);
    for (int64_t r = 0; r < rows; r += block) {
        const int64_t n = std::min(block, rows - r);
        matmul(l.w13, 2, normed + r * m.dim, gate_up, n);
        parallel_for_rows(n, m.hidden, [&](int64_t i) {
            const float *gate = gate_up + 2 * i * m.hidden, *up = gate + m.hidden;
            for (int64_t k = 0; k < m.hidden; k += L) {
                const F g = load(gate + k);
                store(gated + i * m.hidden + k, g / (1 + exp(-g)) * load(up + k));
            }
        });
        matmul(&l.w2, 1, gated, y + r * m.dim, n);
    }
}

static void add_rows(float *x, const float *y, int64_t rows, int64_t dim) {
    for (int64_t k = 0; k < rows * dim; k++) x[k] += y[k];
}

// The last layer. Attention, wo and the feed-forward are computed only for the last `outputs` tokens of each sequence; the
// other rows of x stay the layer's input.
static void last_layer(const Model &m, const Layer &l, float *x, const float *add, float *y, const Sequence *sequences,
                       int64_t count, int64_t rows) {
    float *attended = attention_output(m, l, x, add, sequences, count, rows);
    std::vector<int64_t> needed;
    for (int64_t i = 0, end = 0; i < count; i++) {
        end += sequences[i].length;
        for (int64_t r = end - sequences[i].outputs; r < end; r++) needed.push_back(r);
    }
    const int64_t n = needed.size(), width = m.heads.H * m.heads.D;
    std::vector<float> few(n * m.dim);
    for (int64_t r = 0; r < n; r++) {
        memmove(attended + r * width, attended + needed[r] * width, width * sizeof(float));
        memcpy(&few[r * m.dim], x + needed[r] * m.dim, m.dim * sizeof(float));
    }
    if (!n) return;
    matmul(&l.wo, 1, attended, y, n);
    feed_forward_layer(m, l, few.data(), y, y, n);
    add_rows(few.data(), y, n, m.dim);
    for (int64_t r = 0; r < n; r++) memcpy(x + needed[r] * m.dim, &few[r * m.dim], m.dim * sizeof(float));
}

extern "C" {
int64_t llama_tile() { return TILE_N; }
const char *llama_instructions() { return has_amx ? "AMX and AVX-512 VNNI" : INSTRUCTIONS; }
void llama_threads(int n) {
    if (n != pool->size()) pool->resize(n);
}

void llama_matmul(const Matrix *m, const float *x, float *y, int64_t rows) {
    matmul(m, 1, x, y, rows);
    pool->set_idle();
}

// Embeddings x (rows, dim) of tokens. Returns the first invalid token id (the vocabulary's size if it is negative), or -1.
int64_t llama_embed(const Model *m, const int64_t *tokens, float *x, int64_t rows) {
    for (int64_t r = 0; r < rows; r++)
        if (tokens[r] < 0 || tokens[r] >= m->vocabulary) return tokens[r] < 0 ? m->vocabulary : tokens[r];
    dispatch(m->kind, (void *)m->embeddings, [&](auto *from) {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t k = 0; k < m->dim; k += L) store(x + r * m->dim + k, load(from + tokens[r] * m->dim + k));
    });
    return -1;
}

// One half of layer i, as tensor-parallel ranks all-reduce y after each: x += add, unless it is null, then y = half(x).
void llama_attention(const Model *m, int64_t i, float *x, const float *add, float *y, const Sequence *sequences,
                     int64_t count, int64_t rows) {
    const Layer &l = m->layer[i];
    matmul(&l.wo, 1, attention_output(*m, l, x, add, sequences, count, rows), y, rows);
}
void llama_feed_forward(const Model *m, int64_t i, float *x, const float *add, float *y, int64_t rows) {
    feed_forward_layer(*m, m->layer[i], x, add, y, rows);
}

// All layers: embeddings x (rows, dim) become the last layer's output for the last `outputs` tokens of each sequence, and
// its input for the others; y (rows, dim) is scratch.
void llama_layers(const Model *m, float *x, float *y, const Sequence *sequences, int64_t count, int64_t rows) {
    std::vector<Sequence> whole(sequences, sequences + count);
    int64_t outputs = 0;
    for (Sequence &sequence : whole) outputs += std::exchange(sequence.outputs, sequence.length);
    const int64_t last = m->layers - 1, full = outputs < rows ? last : m->layers;
    for (int64_t i = 0; i < full; i++) {
        llama_attention(m, i, x, i ? y : nullptr, y, whole.data(), count, rows);
        llama_feed_forward(m, i, x, y, y, rows);
    }
    if (full == last)
        last_layer(*m, m->layer[last], x, last ? y : nullptr, y, sequences, count, rows);
    else
        add_rows(x, y, rows, m->dim);
    pool->set_idle();
}

// Logits (rows, vocabulary) of hidden states x (rows, dim).
void llama_logits(const Model *m, float *x, float *logits, int64_t rows) {
    float *normed = (float *)scratch<ACTIVATIONS>(rows * m->dim * sizeof(float));
    add_rms_norm(x, nullptr, m->norm, m->eps, normed, rows, m->dim);
    matmul(&m->output, 1, normed, logits, rows);
    pool->set_idle();
}

// Unpacks the four nibbles of two bytes into four bytes.
static uint32_t unpack_int4(const uint8_t *q) {
    const uint32_t pairs = (load_as<uint16_t>(q) | load_as<uint16_t>(q) << 8) & 0x00FF00FF;
    return (pairs | pairs << 4) & 0x0F0F0F0F;
}

// Packs q (out, in) into tiles. int8 has one element to a byte, int4 two, with the even column in the low nibble. The last
// tile is padded with zeros.
void llama_pack(int64_t bits, const uint8_t *q, uint8_t *to, int64_t out, int64_t in, int64_t group) {
    const int64_t N = TILE_N, half = group % 32 ? 8 : 16, bytes = in * bits / 8, size = N * bytes;
    parallel_for((out + N - 1) / N, [&](int64_t tile, int64_t end) {
        for (; tile < end; tile++) {
            uint8_t *at = to + tile * size;
            const uint8_t *rows = q + tile * N * bytes;
            const int64_t n = std::min<int64_t>(N, out - tile * N);
            if (n < N) memset(at, 0, size);
            for (int64_t k = 0; k < bytes; k += 4, at += N * 4) {  // int8: 4 columns; int4: 8, 4 of each half of a block
                const int64_t from = bits == 8 ? k : k - k % half + k % half / 2;
                for (int64_t i = 0; i < n; i++) {
                    const uint8_t *row = rows + i * bytes + from;
                    store_as(at + i * 4, bits == 8 ? load_as<uint32_t>(row)
                                                   : unpack_int4(row) | unpack_int4(row + half / 2) << 4);
                }
            }
        }
    });
    pool->set_idle();
}
}
