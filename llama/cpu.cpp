// What takes the time of a step of decoding, for CPUs that multiply bytes four at a time and add them up (AVX-512 VNNI):
// products y = x wᵀ of a few rows of x, as fast as memory gives w, and attention. cpp.py says what each takes.
//
// A float w lies row by row. An int8 w has, for every 64 outputs and every 4 columns, 256 bytes: 4 of each output. An int4
// w has, for every 16 outputs and every group of columns, group / 8 vectors of 64 bytes: byte 4 n + j of vector t holds,
// for output n, column 4 t + j of the group in its low half and column group / 2 + 4 t + j in its high half.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

using at::Tensor;

// Has memory send what will be needed soon, as far as the second cache. Without it half of the time is spent waiting.
static void fetch(const void *from) { _mm_prefetch((const char *)from, _MM_HINT_T1); }

static __mmask16 first(int64_t n) { return n < 16 ? (1 << n) - 1 : -1; }

static __m512 load(const float *from) { return _mm512_loadu_ps(from); }
static __m512 load(const at::Half *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
static __m512 load(const at::BFloat16 *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

// Calls `work(begin, end)` for all parts of [0, whole), some at a time: a core that is slowed down gets fewer.
template <typename Work>
static void share(int64_t whole, int64_t some, const Work &work) {
#pragma omp parallel for schedule(dynamic) num_threads(at::get_num_threads())
    for (int64_t begin = 0; begin < whole; begin += some) work(begin, std::min(whole, begin + some));
}

// Calls `work` with a number of the type.
template <typename Work>
static void by_type(at::ScalarType type, const Work &work) {
    if (type == at::kFloat) work(0.0f);
    if (type == at::kHalf) work(at::Half());
    if (type == at::kBFloat16) work(at::BFloat16());
}

// O outputs of R rows.
template <int O, int R, typename T>
static void float_part(const T *w, const T *x, T *y, int64_t out, int64_t in) {
    __m512 total[R][O] = {};
    for (int64_t k = 0; k < in; k += 16) {
        __m512 some[O];
        for (int o = 0; o < O; o++) {
            fetch(w + (O + o) * in + k);  // the next outputs
            some[o] = load(w + o * in + k);
        }
        for (int r = 0; r < R; r++) {
            const __m512 row = load(x + r * in + k);
            for (int o = 0; o < O; o++) total[r][o] = _mm512_fmadd_ps(some[o], row, total[r][o]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) y[r * out + o] = _mm512_reduce_add_ps(total[r][o]);
}

static Tensor float_product(const Tensor &x, const Tensor &w) {
    const int64_t rows = x.size(0), out = w.size(0), in = w.size(1);
    Tensor y = x.new_empty({rows, out});
    by_type(w.scalar_type(), [&](auto number) {
        using T = decltype(number);
        const T *weight = w.const_data_ptr<T>(), *from = x.const_data_ptr<T>();
        T *to = y.mutable_data_ptr<T>();
        share(out, 96, [&](int64_t n, int64_t end) {
            for (int64_t N; n < end; n += N) {
                int64_t r = 0;
                const auto by = [&](int64_t R, int64_t O, auto part) {
                    for (; r + R <= rows; r += R)
                        for (int64_t o = n; o < n + N; o += O)
                            part(weight + o * in, from + r * in, to + r * out + o, out, in);
                };
                N = n + 12 <= end ? 12 : 1;
                if (N == 12)
                    by(8, 3, float_part<3, 8, T>), by(4, 4, float_part<4, 4, T>), by(2, 4, float_part<4, 2, T>),
                        by(1, 4, float_part<4, 1, T>);
                else
                    by(1, 1, float_part<1, 1, T>);
            }
        });
    });
    return y;
}

struct Row {       // of x, rounded: x = scale q, with a scale for each group of columns
    int8_t *q;     // from -127 to 127
    float *scale;  // NaN where x is not finite
    float *sum;    // of a group of q
};

struct Rows {  // of x
    std::vector<int8_t> q;
    std::vector<float> scale, sum;
    std::vector<Row> row;

    Rows(const Tensor &x, int64_t group) {
        const int64_t rows = x.size(0), in = x.size(1), groups = in / group;
        q.resize(rows * in), scale.resize(rows * groups), sum.resize(rows * groups);
        for (int64_t r = 0; r < rows; r++) row.push_back({&q[r * in], &scale[r * groups], &sum[r * groups]});
        at::parallel_for(0, rows, 8, [&](int64_t r, int64_t end) {  // with 8 or fewer, in place
            for (; r < end; r++) round(x.const_data_ptr<float>() + r * in, row[r], in, group);
        });
    }

    static void round(const float *x, Row to, int64_t in, int64_t group) {
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
            to.sum[g] = _mm512_reduce_add_epi32(sum);
        }
    }
};

// 64 outputs of R rows: scale_w scale_x (q_w + 128 - 128) · q_x, as bytes of w are taken to be from 0 to 255.
template <int R>
static void int8_part(const int8_t *w, const float *scale, const Row *x, float *y, int64_t out, int64_t in) {
    __m512i dots[R][4];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 4; v++) dots[r][v] = _mm512_set1_epi32(-128 * (int32_t)x[r].sum[0]);
    for (int64_t k = 0; k < in; k += 4, w += 256) {
        __m512i some[4];
        for (int v = 0; v < 4; v++) {
            fetch(w + 64 * v + 8192);
            some[v] = _mm512_xor_si512(_mm512_loadu_si512(w + 64 * v), _mm512_set1_epi8(-128));
        }
        for (int r = 0; r < R; r++) {
            const __m512i four = _mm512_set1_epi32(*(const int32_t *)(x[r].q + k));
            for (int v = 0; v < 4; v++) dots[r][v] = _mm512_dpbusd_epi32(dots[r][v], some[v], four);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 4; v++) {
            const __m512 s = _mm512_mul_ps(_mm512_loadu_ps(scale + 16 * v), _mm512_set1_ps(x[r].scale[0]));
            _mm512_storeu_ps(y + r * out + 16 * v, _mm512_mul_ps(_mm512_cvtepi32_ps(dots[r][v]), s));
        }
}

// w as above; scale (out,).
static Tensor int8_few(const Tensor &x, const Tensor &w, const Tensor &scale) {
    const int64_t rows = x.size(0), out = scale.size(0), in = x.size(1);
    const Rows few(x, in);
    Tensor y = x.new_empty({rows, out});
    const int8_t *weight = w.const_data_ptr<int8_t>();
    const float *scales = scale.const_data_ptr<float>();
    float *to = y.mutable_data_ptr<float>();
    share(out / 64, 2, [&](int64_t tile, int64_t end) {
        for (int64_t n = tile * 64; n < end * 64; n += 64) {
            int64_t r = 0;
            const auto by = [&](int64_t R, auto part) {
                for (; r + R <= rows; r += R) part(weight + n * in, scales + n, &few.row[r], to + r * out + n, out, in);
            };
            by(4, int8_part<4>), by(2, int8_part<2>), by(1, int8_part<1>);
        }
    });
    return y;
}

// 16 outputs of R rows. Of every group: the sum of scale_w (q_w - zero) x = scale_w scale_x (q_w · q_x - zero sum_x).
template <int R>
static void int4_part(const uint8_t *w, const at::BFloat16 *scale, const uint8_t *zero, const Row *x, float *y,
                      int64_t out, int64_t in, int64_t group) {
    const __m512i half = _mm512_set1_epi8(15);
    __m512 total[R] = {};
    for (int64_t g = 0; g < in / group; g++) {
        __m512i dots[R] = {}, others[R] = {};  // of the low and of the high halves
        for (int64_t t = 0; t < group / 8; t++, w += 64) {
            fetch(w + 8192);
            const __m512i both = _mm512_loadu_si512(w);
            const __m512i low = _mm512_and_si512(both, half), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), half);
            for (int r = 0; r < R; r++) {
                const int32_t *fours = (const int32_t *)(x[r].q + g * group) + t;
                dots[r] = _mm512_dpbusd_epi32(dots[r], low, _mm512_set1_epi32(fours[0]));
                others[r] = _mm512_dpbusd_epi32(others[r], high, _mm512_set1_epi32(fours[group / 8]));
            }
        }
        const __m512 s = load(scale + 16 * g);
        const __m512 z = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(zero + 16 * g))));
        for (int r = 0; r < R; r++) {
            const __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(dots[r], others[r]));
            const __m512 part = _mm512_fnmadd_ps(z, _mm512_set1_ps(x[r].sum[g]), dot);
            total[r] = _mm512_fmadd_ps(_mm512_mul_ps(s, _mm512_set1_ps(x[r].scale[g])), part, total[r]);
        }
    }
    for (int r = 0; r < R; r++) _mm512_storeu_ps(y + r * out, total[r]);
}

// w as above; scale and zero (out / 16, in / group, 16).
static Tensor int4_product(const Tensor &x, const Tensor &w, const Tensor &scale, const Tensor &zero) {
    const int64_t rows = x.size(0), in = x.size(1), out = w.size(0) * 16, groups = w.size(1);
    const Rows all(x, in / groups);
    Tensor y = x.new_empty({rows, out});
    const uint8_t *weight = w.const_data_ptr<uint8_t>(), *zeros = zero.const_data_ptr<uint8_t>();
    const at::BFloat16 *scales = scale.const_data_ptr<at::BFloat16>();
    float *to = y.mutable_data_ptr<float>();
    for (int64_t begin = 0; begin < rows; begin += 128) {  // as many as a core's cache holds
        const int64_t stop = std::min(rows, begin + 128);
        share(out / 16, 6, [&](int64_t tile, int64_t end) {
            for (int64_t n = tile * 16; n < end * 16; n += 16) {
                int64_t r = begin;
                const auto by = [&](int64_t R, auto part) {
                    for (; r + R <= stop; r += R)
                        part(weight + n * in / 2, scales + n * groups, zeros + n * groups, &all.row[r], to + r * out + n,
                             out, in, in / groups);
                };
                by(8, int4_part<8>), by(4, int4_part<4>), by(2, int4_part<2>), by(1, int4_part<1>);
            }
        });
    }
    return y;
}

// Q sums, V vectors long, of values (S, D), of which each makes a share.
template <int Q, int V, typename T>
static void mix(const T *v, const float *shares, const float *sums, T *y, int64_t S, int64_t D) {
    __m512 total[Q][V] = {};
    for (int64_t s = 0; s < S; s++)
        for (int part = 0; part < V; part++) {
            const __m512 value = load(v + s * D + 16 * part);
            for (int i = 0; i < Q; i++)
                total[i][part] = _mm512_fmadd_ps(_mm512_set1_ps(shares[i * S + s]), value, total[i][part]);
        }
    for (int i = 0; i < Q; i++)
        for (int j = 0; j < 16 * V; j++) y[i * D + j] = total[i][j / 16][j % 16] / sums[i];
}

// Q queries (D,) look at keys and values (S, D); `shares` has room for Q S numbers.
template <int Q, typename T>
static void look(const T *q, const T *k, const T *v, float *shares, T *y, int64_t S, int64_t D) {
    const float scale = 1 / std::sqrt((float)D);
    for (int64_t s = 0; s < S; s++, k += D) {
        __m512 dots[Q] = {};
        for (int64_t d = 0; d < D; d += 16) {
            fetch(k + d + 1024), fetch(v + s * D + d);
            const __m512 key = load(k + d);
            for (int i = 0; i < Q; i++) dots[i] = _mm512_fmadd_ps(load(q + i * D + d), key, dots[i]);
        }
        for (int i = 0; i < Q; i++) shares[i * S + s] = scale * _mm512_reduce_add_ps(dots[i]);
    }
    float sums[Q];
    for (int i = 0; i < Q; i++) {
        float *share = shares + i * S;
        __m512 largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (int64_t s = 0; s < S; s += 16)
            largest = _mm512_max_ps(_mm512_mask_loadu_ps(largest, first(S - s), share + s), largest);
        largest = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
        for (int64_t s = 0; s < S; s += 16) {
            const __mmask16 some = first(S - s);
            const at::vec::Vectorized<float> under = _mm512_sub_ps(_mm512_maskz_loadu_ps(some, share + s), largest);
            const __m512 e = under.exp_u20();
            _mm512_mask_storeu_ps(share + s, some, e);
            sum = _mm512_mask_add_ps(sum, some, sum, e);
        }
        sums[i] = _mm512_reduce_add_ps(sum);
    }
    int64_t d = 0;
    for (; d + 64 <= D; d += 64) mix<Q, 4>(v + d, shares, sums, y + d, S, D);
    for (; d < D; d += 16) mix<Q, 1>(v + d, shares, sums, y + d, S, D);
}

// q (B, K, G, D), cache (B, 2K, room, D), at (B,).
static Tensor attend(const Tensor &q, const Tensor &cache, const Tensor &at) {
    const int64_t B = q.size(0), K = q.size(1), G = q.size(2), D = q.size(3), room = cache.size(2);
    const Tensor queries = q.contiguous();
    Tensor y = q.new_empty(q.sizes());
    by_type(q.scalar_type(), [&](auto number) {
        using T = decltype(number);
        const T *from = queries.const_data_ptr<T>(), *kept = cache.const_data_ptr<T>();
        T *to = y.mutable_data_ptr<T>();
        const int64_t *end = at.const_data_ptr<int64_t>();
        share(B * K, 1, [&](int64_t i, int64_t stop) {
            std::vector<float> shares;
            for (; i < stop; i++) {
                const int64_t b = i / K, S = end[b] + 1;
                const T *k = kept + (i + b * K) * room * D, *v = k + K * room * D;
                int64_t g = i * G;
                shares.resize(4 * S);
                const auto by = [&](int64_t Q, auto look) {
                    for (; g + Q <= (i + 1) * G; g += Q) look(from + g * D, k, v, shares.data(), to + g * D, S, D);
                };
                by(4, look<4, T>), by(2, look<2, T>), by(1, look<1, T>);
            }
        });
    });
    return y;
}

TORCH_LIBRARY_IMPL(llama, CPU, m) {
    m.impl("attend", attend);
    m.impl("float_product", float_product);
    m.impl("int8_few", int8_few);
    m.impl("int4_product", int4_product);
}
