// Matmuls: y (rows, out) = x (rows, in) times the transpose of a matrix (out, in), whose format chooses the kernel.
//
// x and y are float32. Kernels round x to bfloat16 if the weights are bfloat16 and the CPU has a dot product of bfloat16,
// and to 8 bits if the weights are quantized. Where AMX dequantizes weights, x is rounded to bfloat16.
#pragma once

#include "amx.h"
#include "int_matmul.h"

// Float matrices of one kind, whose weights are read as T; a Pair holds two columns.
template <typename T>
static void float_matmul(const Matrix *m, int count, const float *x, float *y, int64_t rows, int64_t out) {
    const int64_t unit = rows > DOT_MAX_ROWS ? BLOCK_N : DOT_N, in = m->in / PER_LANE<T>;
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
            return b.kind == first.kind && b.group == first.group && b.zero == first.zero && !b.min == !first.min;
        };
        while (i + n < count && same_format(m[i + n])) n++;
        if (uses_amx(first, rows)) {
            amx_matmul(m + i, n, x, y, rows, out);
        } else if (first.kind < INT8) {
            dispatch(first.kind, (void *)first.weight, [&](auto *weight) {
                using T = std::remove_pointer_t<decltype(weight)>;
                if constexpr (HAS_DOT2 && std::is_same_v<T, BFloat16>)
                    if (first.in % (2 * L) == 0) return float_matmul<Pair>(m + i, n, x, y, rows, out);
                float_matmul<T>(m + i, n, x, y, rows, out);
            });
        } else {
            const QuantizedRow *row = quantize_rows(first, x, rows);
            const auto *matmuls = first.kind == INT8 ? INT8_MATMULS : INT4_MATMULS;
            const auto multiply = matmuls[__builtin_ctzll(chunk_columns(first) / 16)];
            for_each_tile(m + i, n, y, TILE_N, [&](const Matrix &b, float *to, int64_t begin, int64_t end) {
                multiply(b, row, to, rows, out, begin, end);
            });
        }
        for (int j = 0; j < n; j++) y += m[i + j].out;
    }
}
