// Activations of matmuls with quantized matrices, quantized dynamically: x = scale n, with a scale for each token and chunk
// of columns. n has 8 bits, but 16 for outliers: n = low + 256 high, where high is 0 in most columns.
#pragma once

#include "matrix.h"

constexpr float OUTLIER = 6;  // an outlier exceeds this multiple of the row's mean absolute value
constexpr float MAX_LOW = 127, MAX_HIGH = 256 * MAX_LOW + MAX_LOW;

// Four adjacent columns of a row of x, at least one of them an outlier.
struct Outliers {
    float scale;            // of the high bytes
    int32_t high, init;     // four high bytes, and -zero * their sum
    int32_t offset, shift;  // offset of these columns in a tile's weights, in bytes, and shift of the bits in each byte
    int32_t group;          // of the weights
};
// A row of x. Integers accumulate over chunks of columns, whose weights have one scale.
struct QuantizedRow {
    char *low;      // Activation8 or, for int4 weights, int8_t; an Activation8 of 16 bits is n itself, and has no high byte
    float *scale;   // of each chunk; NaN where x is not finite
    int32_t *init;  // of each chunk: the accumulators' initial value, -zero * sum(low), which compensates the zero point
    float *sum;     // of each chunk: the sum of scale n, by which min is multiplied; 0 without min
    Outliers *outliers;  // n_outliers of them
    int64_t n_outliers;
};

INLINE void store_quantized(int8_t *q, I n) { store_as(q, __builtin_convertvector(n, Vector<int8_t, BYTES / 4>::type)); }
// In each four elements, swaps the second and the third.
template <typename V, int... i>
INLINE V swap_middle(V x, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(x, x, ((i + 1) % 4 / 2 ? i ^ 3 : i)...);
}
INLINE void store_quantized(int16_t *q, I n) {
    store_as(q, swap_middle(__builtin_convertvector(n, Vector<int16_t, BYTES / 2>::type), LANES));
}

static float mean_abs(const float *x, int64_t columns) {
    F total[4] = {};
    for (int64_t k = 0; k < columns; k += L) total[k / L % 4] += abs(load(x + k));
    return reduce_add(total[0] + total[1] + (total[2] + total[3])) / columns;
}

template <typename T>
static void quantize_row(const float *x, const Matrix &m, QuantizedRow &to) {
    const int64_t chunk = chunk_columns(m), chunks = m.in / chunk;
    const int32_t zero = m.kind == INT8 ? BIAS : m.zero;
    const float largest = OUTLIER * mean_abs(x, m.in);
    to.n_outliers = 0;
    for (int64_t c = 0; c < chunks; c += L) {  // L chunks at a time, as a horizontal reduction of one vector is slow
        const int64_t n = std::min<int64_t>(L, chunks - c);
        F reduced[L] = {};
        for (int i = 0; i < n; i++)
            for (int64_t k = 0; k < chunk; k += L) reduced[i] = max_abs(reduced[i], abs(load(x + (c + i) * chunk + k)));
        const F most = reduce_each(reduced, max_abs);
        const F scale = max(max(min(most, splat(largest)) / MAX_LOW, most / MAX_HIGH), splat(1e-32f)) + most * 0.0f;
        memcpy(to.scale + c, &scale, n * sizeof(float));
        for (int i = 0; i < n; i++) {
            const F inverse = splat(1 / scale[i]);
            const bool outliers = sizeof(T) == 1 && most[i] > largest;
            const int64_t begin = (c + i) * chunk;
            int8_t high[128];
            I sum = {};
            for (int64_t k = 0; k < chunk; k += L) {
                I q = round_to_int(load(x + begin + k) * inverse);
                if (outliers) {
                    const I low = q << 24 >> 24;
                    store_quantized(high + k, (q - low) >> 8);
                    q = low;
                }
                store_quantized((T *)to.low + begin + k, q);
                sum += q;
            }
            reduced[i] = __builtin_convertvector(sum, F);
            to.sum[c + i] = 0;
            for (int64_t j = 0; j < chunk && outliers; j += 4)
                if (const int32_t bytes = load_as<int32_t>(high + j)) {
                    const int32_t sum_high = high[j] + high[j + 1] + high[j + 2] + high[j + 3];
                    const bool second = m.kind == INT4 && j >= chunk / 2;  // half of the chunk, in the high nibbles
                    const int64_t offset = (m.kind == INT8 ? begin + j : begin / 2 + j % (chunk / 2)) * TILE_N;
                    const float step = 256 * scale[i];
                    if (m.min) to.sum[c + i] += step * sum_high;
                    to.outliers[to.n_outliers++] = {step, bytes, -zero * sum_high, (int32_t)offset, second * 4,
                                                    int32_t(begin / m.group)};
                }
        }
        const F sum = sum_each(reduced);
        for (int i = 0; i < n; i++) {
            to.init[c + i] = -zero * (int32_t)sum[i];
            if (m.min) to.sum[c + i] += scale[i] * sum[i];
        }
    }
}

// Quantizes the rows of x for matrices of the kind and groups of m; valid until the next call. The last row is repeated
// INT_SPARE times, for for_blocks.
static const QuantizedRow *quantize_rows(const Matrix &m, const float *x, int64_t rows) {
    const int64_t chunks = m.in / chunk_columns(m), size = m.in * (m.kind == INT8 ? sizeof(Activation8) : 1);
    const int64_t bytes = (size + 3 * chunks * sizeof(float) + 63) / 64 * 64, outliers = m.in / 4;  // of a row
    const int64_t lists = rows * outliers * sizeof(Outliers), headers = (rows + INT_SPARE) * sizeof(QuantizedRow);
    char *at = (char *)scratch<QUANTIZED_X>(rows * bytes + headers + lists);
    QuantizedRow *row = (QuantizedRow *)(at + rows * bytes);
    Outliers *list = (Outliers *)(row + rows + INT_SPARE);  // behind what is read for every tile
    parallel_for_rows(rows, m.in, [&](int64_t r) {
        float *scale = (float *)(at + r * bytes + size);
        row[r] = {at + r * bytes, scale, (int32_t *)scale + chunks, scale + 2 * chunks, list + r * outliers, 0};
        if (m.kind == INT8) quantize_row<Activation8>(x + r * m.in, m, row[r]);
        else quantize_row<int8_t>(x + r * m.in, m, row[r]);
    });
    std::fill_n(row + rows, INT_SPARE, row[rows - 1]);
    return row;
}
