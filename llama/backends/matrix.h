// The formats of matrices, and parallel_for over their outputs.
//
// Weights (out, in) are float32, float16 or bfloat16 in row-major order, or quantized: w = scale q + min, with q of 8 or 4
// bits, and scale and min in float16 for each group of columns. Quantized weights are packed into tiles of TILE_N outputs,
// so that a register holds the same columns of several outputs:
//
//   int8     for every 4 columns, 4 bytes of each output
//   int4     for every block of 32 columns (16 where groups have 16), 4 bytes of each output for every 8 columns: columns
//            4 t .. 4 t + 3 of the block in the low nibbles, columns block / 2 + 4 t .. in the high nibbles
//   scale    for each group, one float16 of each output; min likewise
#pragma once

#include "threads.h"

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

constexpr int TILE_N = TILE_V * L;  // outputs of a tile of quantized weights
// Columns of activations that share a scale. For int4 weights, also the columns of a block.
static int64_t chunk_columns(const Matrix &m) { return std::min<int64_t>(m.kind == INT8 ? 128 : 32, m.group & -m.group); }

constexpr int64_t MOST_OUTPUTS = 768;  // weights that are read again for every block of rows stay in a cache
// Calls work(matrix, y, begin, end) for ranges of tiles, of `unit` outputs, of matrices whose outputs are concatenated.
// This is one job, as threads wait for each other at the end of every job. A range has at most MOST_OUTPUTS.
template <typename Work>
static void for_each_tile(const Matrix *m, int count, float *y, int64_t unit, const Work &work) {
    const auto tiles = [&](int i) { return (m[i].out + unit - 1) / unit; };
    int64_t all = 0;
    for (int i = 0; i < count; i++) all += tiles(i);
    parallel_for(all, [&](int64_t begin, int64_t end) {
        float *to = y;
        for (int i = 0; i < count; to += m[i].out, begin -= tiles(i), end -= tiles(i), i++)
            for (int64_t t = std::max<int64_t>(begin, 0), last = std::min(end, tiles(i)), stop; t < last; t = stop)
                work(m[i], to, t, stop = std::min(last, t + MOST_OUTPUTS / unit));
    });
}
