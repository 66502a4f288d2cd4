// y = x wᵀ with w in 4 bits, for CPUs that multiply bytes four at a time and add them up (AVX-512 VNNI).
//
// For every 16 outputs and every group of columns, w has group / 8 vectors of 64 bytes. Byte 4 n + j of vector t holds,
// for output n, column 4 t + j of the group in its low half and column group / 2 + 4 t + j in its high half.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

struct Row {       // of x, rounded: x = scale q, with a scale for each group of columns
    int8_t *q;     // from -127 to 127
    float *scale;  // NaN where x is not finite
    float *sum;    // of a group
};

static void round_row(const float *x, Row to, int64_t in, int64_t group) {
    for (int64_t g = 0; g < in / group; g++, x += group, to.q += group) {
        __m512 largest = _mm512_set1_ps(1e-30f), zero = _mm512_setzero_ps();
        for (int64_t k = 0; k < group; k += 16) {
            const __m512 some = _mm512_loadu_ps(x + k);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(some));
            zero = _mm512_fmadd_ps(some, _mm512_setzero_ps(), zero);
        }
        const float scale = _mm512_reduce_max_ps(largest) / 127;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = 0; k < group; k += 16) {
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), _mm512_set1_ps(1 / scale)));
            _mm_storeu_si128((__m128i *)(to.q + k), _mm512_cvtepi32_epi8(q));
            sum = _mm512_add_epi32(sum, q);
        }
        to.scale[g] = scale + _mm512_reduce_add_ps(zero);
        to.sum[g] = to.scale[g] * _mm512_reduce_add_epi32(sum);
    }
}

// 16 outputs of R rows. Of every group: the sum of scale_w (q_w - zero) x = scale_w (scale_x (q_w · q_x) - zero sum_x).
template <int R>
static void product(const uint8_t *w, const uint16_t *scale, const uint8_t *zero, const Row *x, float *y, int64_t out,
                    int64_t in, int64_t group) {
    const __m512i half = _mm512_set1_epi8(15);
    __m512 total[R] = {};
    for (int64_t g = 0; g < in / group; g++) {
        __m512i dots[R] = {}, others[R] = {};  // of the low and of the high halves
        for (int64_t t = 0; t < group / 8; t++, w += 64) {
            _mm_prefetch((const char *)w + 4096, _MM_HINT_T0);  // or it would wait for memory half of the time
            const __m512i both = _mm512_loadu_si512(w);
            const __m512i low = _mm512_and_si512(both, half), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), half);
            for (int r = 0; r < R; r++) {
                const int32_t *fours = (const int32_t *)(x[r].q + g * group) + t;
                dots[r] = _mm512_dpbusd_epi32(dots[r], low, _mm512_set1_epi32(fours[0]));
                others[r] = _mm512_dpbusd_epi32(others[r], high, _mm512_set1_epi32(fours[group / 8]));
            }
        }
        const __m512i bfloat16 = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(scale + 16 * g)));
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(zero + 16 * g)));
        const __m512 s = _mm512_castsi512_ps(_mm512_slli_epi32(bfloat16, 16)), z = _mm512_cvtepi32_ps(byte);
        for (int r = 0; r < R; r++) {
            const __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(dots[r], others[r]));
            const __m512 zeros = _mm512_mul_ps(z, _mm512_set1_ps(x[r].sum[g]));
            total[r] = _mm512_fmadd_ps(s, _mm512_fmsub_ps(dot, _mm512_set1_ps(x[r].scale[g]), zeros), total[r]);
        }
    }
    for (int r = 0; r < R; r++) _mm512_storeu_ps(y + r * out, total[r]);
}

// w as above; scale (bfloat16) and zero (out / 16, in / group, 16); x (rows, in); y (rows, out).
extern "C" void int4_product(const uint8_t *w, const uint16_t *scale, const uint8_t *zero, const float *x, float *y,
                             int64_t rows, int64_t out, int64_t in, int64_t group, int64_t threads) {
    const int64_t groups = in / group;
    std::vector<int8_t> q(rows * in);
    std::vector<float> scales(rows * groups), sums(rows * groups);
    std::vector<Row> row(rows);
#pragma omp parallel for num_threads(threads) if (rows > 8)
    for (int64_t r = 0; r < rows; r++) {
        row[r] = {&q[r * in], &scales[r * groups], &sums[r * groups]};
        round_row(x + r * in, row[r], in, group);
    }
    for (int64_t begin = 0; begin < rows; begin += 128) {  // as many as a core's cache holds
        const int64_t end = std::min(rows, begin + 128);
#pragma omp parallel for num_threads(threads)
        for (int64_t n = 0; n < out; n += 16) {
            int64_t r = begin;
            const auto by = [&](int64_t R, auto product) {
                for (; r + R <= end; r += R)
                    product(w + n * in / 2, scale + n * groups, zero + n * groups, &row[r], y + r * out + n, out, in, group);
            };
            by(8, product<8>), by(4, product<4>), by(2, product<2>), by(1, product<1>);
        }
    }
}
