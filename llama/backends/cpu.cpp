// For CPUs that multiply bytes four at a time and add them up (AVX-512 VNNI): products y = x wᵀ of a few rows of x, as
// fast as memory gives w, and of many, as fast as they can be computed; attention; and all layers of a model, for the
// tokens of prompts or one more for each row. cpu.py says what each takes.
//
// Activations are float32. A matrix w is several tensors. Of float numbers each has some of its rows. Of int8 the first
// has, for every 64 outputs and every 4 columns, 256 bytes: 4 of each output; then scales, and sums of the outputs'
// numbers. Of int4 it has, for every 16 outputs and every group of columns, group / 8 vectors of 64 bytes: byte 4 n + j
// of vector t holds, for output n, column 4 t + j of the group in its low half and column group / 2 + 4 t + j in its
// high half; then scales and zeros.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

using at::Tensor;
using Matrix = std::vector<Tensor>;

// Has memory send what will be needed soon, as far as the second cache. Without it half of the time is spent waiting.
static void fetch(const void *from) { _mm_prefetch((const char *)from, _MM_HINT_T1); }

static __mmask16 first(int64_t n) { return n < 16 ? (1 << n) - 1 : -1; }

static __m512 load(const float *from) { return _mm512_loadu_ps(from); }
static __m512 load(const at::Half *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
static __m512 load(const at::BFloat16 *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

// A buffer aligned to whole vectors: unaligned ones take up to twice as long to read. Large ones use huge
// pages, as fresh memory is fetched a page at a time.
struct Floats {
    std::unique_ptr<float, decltype(&std::free)> memory{nullptr, std::free};
    int64_t size;

    explicit Floats(int64_t n) : size(n) {
        const size_t large = 1 << 21, unit = n * sizeof(float) < large ? sizeof(__m512) : large;
        const size_t bytes = (n * sizeof(float) + unit - 1) / unit * unit;
        memory.reset((float *)std::aligned_alloc(unit, bytes));
        TORCH_CHECK(memory || !n, "no memory for ", bytes, " bytes");
#ifdef MADV_HUGEPAGE
        if (unit == large) madvise(memory.get(), bytes, MADV_HUGEPAGE);
#endif
    }
    operator float *() const { return memory.get(); }
};

// A scratch buffer of n numbers, valid until the next call; it is kept, so that its page faults happen once.
static float *scratch(int64_t n) {
    static thread_local Floats kept(0);
    if (n > kept.size) kept = Floats(n);
    return kept;
}

// One allocation with n numbers for each thread, instead of one for each part of a thread's work.
struct ThreadScratch {
    int64_t size;
    Floats all;

    explicit ThreadScratch(int64_t n) : size((n + 15) / 16 * 16), all(size * at::get_num_threads()) {}
    float *mine() const { return all + size * omp_get_thread_num(); }
};

static void store(float *to, __m512 x) { _mm512_storeu_ps(to, x); }
template <typename T>
static void store(T *to, __m512 x) {
    for (int i = 0; i < 16; i++) to[i] = x[i];
}

// Calls `work(begin, end)` for all parts of [0, whole). A part has whole units, and at most `largest` numbers. There are
// about four parts for each core, so that a slow core takes fewer; longer parts read memory faster. The last parts are
// quarters, so that no core waits long for another.
template <typename Work>
static void parallel_parts(int64_t whole, int64_t unit, const Work &work, int64_t largest = INT64_MAX) {
    const int cores = at::get_num_threads();
    const int64_t some = std::clamp<int64_t>(whole / unit / (4 * cores), 1, largest / unit) * unit;
    const int64_t few = std::max<int64_t>(1, some / unit / 4) * unit, many = std::max<int64_t>(0, whole / some - cores);
    const int64_t parts = many + (whole - many * some + few - 1) / few;
#pragma omp parallel for schedule(dynamic) num_threads(cores)
    for (int64_t i = 0; i < parts; i++) {
        const int64_t begin = i < many ? i * some : many * some + (i - many) * few;
        work(begin, std::min(whole, begin + (i < many ? some : few)));
    }
}

// Calls `work(row)` for n rows, without the thread pool where they are few.
template <typename Work>
static void each(int64_t rows, const Work &work) {
    at::parallel_for(0, rows, 8, [&](int64_t r, int64_t end) {
        for (; r < end; r++) work(r);
    });
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
static void float_part(const T *w, const float *x, float *y, int64_t out, int64_t in) {
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

// C neighbours, as often as fit in a vector.
template <int C>
static __m512 spread(const float *from) {
    return C == 2 ? (__m512)_mm512_broadcastsd_pd(_mm_load_sd((const double *)from)) : _mm512_set1_ps(*from);
}

// Many rows at a time: O outputs of those of V vectors, each of which has C columns of 16 / C rows. In each row of y
// (O, width) are outputs of all rows of x, to which those of other columns may be added.
template <int C, int V, int O>
static void wide_part(const float *w, const float *x, float *y, int64_t in, int64_t columns, int64_t width, bool more,
                      bool fresh) {
    __m512 total[O][V] = {};
    for (int64_t k = 0; k < columns; k += C, x += 16 * V) {
        if (fresh && k % 16 == 0)
            for (int o = 0; o < O; o++) fetch(w + (O + o) * in + k);  // the next outputs
        __m512 rows[V];
        for (int v = 0; v < V; v++) rows[v] = load(x + 16 * v);
        for (int o = 0; o < O; o++) {
            const __m512 weight = spread<C>(w + o * in + k);
            for (int v = 0; v < V; v++) total[o][v] = _mm512_fmadd_ps(weight, rows[v], total[o][v]);
        }
    }
    for (int o = 0; o < O; o++)
        for (int v = 0; v < V; v++) {
            float *to = y + o * width + 16 * v;
            __m512 sum = total[o][v];
            if (C == 2) sum = _mm512_maskz_compress_ps(0x5555, sum + _mm512_permute_ps(sum, 0xB1));
            store(to, more ? load(to) + sum : sum);
        }
}

// The same for N outputs.
static void wide_block(const float *w, const float *x, float *y, int64_t N, int64_t in, int64_t columns, int64_t C,
                       int64_t V, int64_t width, bool more, bool fresh) {
    using Part = decltype(&wide_part<1, 1, 8>);
    static const Part eights[] = {wide_part<2, 1, 8>, wide_part<1, 1, 8>, wide_part<1, 2, 8>, wide_part<1, 3, 8>};
    static const Part ones[] = {wide_part<2, 1, 1>, wide_part<1, 1, 1>, wide_part<1, 2, 1>, wide_part<1, 3, 1>};
    const int64_t which = C == 2 ? 0 : V;
    int64_t o = 0;
    for (; o + 8 <= N; o += 8) eights[which](w + o * in, x, y + o * width, in, columns, width, more, fresh);
    for (; o < N; o++) ones[which](w + o * in, x, y + o * width, in, columns, width, more, fresh);
}

// Rows of x, 48 or fewer at a time, are laid side by side, and w is read as it lies. A block of w and of y stays in the
// second cache of a core, while x passes by from the third.
static void wide_product(const float *w, int64_t some, const float *x, float *y, int64_t rows, int64_t out, int64_t in) {
    const int64_t C = rows > 8 ? 1 : 2, width = (rows + 15) / 16 * 16, block = 64, deep = 1024;
    const auto panel = [&](int64_t r) { return std::min<int64_t>(48, width - r); };
    float *beside = scratch(width * in);
    parallel_parts(width, 48, [&](int64_t r, int64_t end) {
        for (; r < end; r += 48) {
            const int64_t here = std::min(panel(r), rows - r);
            if (here % 16) std::fill_n(beside + r * in, panel(r) * in, 0);
            if (C == 1)
                at::vec::transpose_mxn<float>(x + r * in, in, beside + r * in, panel(r), here, in);
            else
                for (int64_t k = 0; k < in; k += 2)
                    for (int64_t row = 0; row < rows; row++) std::copy_n(x + row * in + k, 2, beside + 8 * k + 2 * row);
        }
    });
    const ThreadScratch parts(block * width);
    const auto work = [&](int64_t n, int64_t end) {
        float *part = parts.mine();
        for (; n < end; n += block) {
            const int64_t N = std::min(block, end - n);
            for (int64_t k = 0; k < in; k += deep)
                for (int64_t r = 0; r < width; r += 48)
                    wide_block(w + n * in + k, beside + r * in + k * panel(r) / C, part + r, N, in,
                               std::min(deep, in - k), C, panel(r) / 16, width, k > 0, r == 0);
            at::vec::transpose_mxn<float>(part, width, y + n, out, N, rows);
        }
    };
    parallel_parts(some, 16, work, rows > 16 ? block : INT64_MAX);
}

template <typename T>
static void float_product(const T *w, int64_t some, const float *x, float *y, int64_t rows, int64_t out, int64_t in) {
    if constexpr (std::is_same_v<T, float>)
        if (rows > 4) {
            const int64_t most = 528;  // that the last cache holds, whatever the prompts
            for (int64_t r = 0; r < rows; r += most)
                wide_product(w, some, x + r * in, y + r * out, std::min(most, rows - r), out, in);
            return;
        }
    parallel_parts(some, 12, [&](int64_t n, int64_t end) {
        for (int64_t N; n < end; n += N) {
            int64_t r = 0;
            const auto by = [&](int64_t R, int64_t O, auto part) {
                for (; r + R <= rows; r += R)
                    for (int64_t o = n; o < n + N; o += O) part(w + o * in, x + r * in, y + r * out + o, out, in);
            };
            N = n + 12 <= end ? 12 : 1;
            if (N == 12)
                by(8, 3, float_part<3, 8, T>), by(4, 4, float_part<4, 4, T>), by(2, 2, float_part<2, 2, T>),
                    by(1, 1, float_part<1, 1, T>);
            else
                by(1, 1, float_part<1, 1, T>);
        }
    });
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

    // With `more` added to each of q, as a byte.
    Rows(const float *x, int64_t rows, int64_t in, int64_t group, int8_t more = 0) {
        const int64_t groups = in / group;
        q.resize(rows * in), scale.resize(rows * groups), sum.resize(rows * groups);
        for (int64_t r = 0; r < rows; r++) row.push_back({&q[r * in], &scale[r * groups], &sum[r * groups]});
        at::parallel_for(0, rows, 8, [&](int64_t r, int64_t end) {  // with 8 or fewer, in place
            for (; r < end; r++) round(x + r * in, row[r], in, group, more);
        });
    }

    static void round(const float *x, Row to, int64_t in, int64_t group, int8_t more) {
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
                _mm_storeu_si128((__m128i *)(to.q + k), _mm_add_epi8(_mm512_cvtepi32_epi8(q), _mm_set1_epi8(more)));
                sum = _mm512_add_epi32(sum, q);
            }
            to.scale[g] = scale + _mm512_reduce_add_ps(zero);
            to.sum[g] = _mm512_reduce_add_epi32(sum);
        }
    }
};

// Sums of products of four bytes each, those of u from 0 to 255. gcc keeps an array of these in registers, but not one of
// __m512i, which takes twice as long.
using Ints = int __attribute__((vector_size(64)));
static Ints dot(Ints sum, __m512i u, __m512i s) { return (Ints)_mm512_dpbusd_epi32((__m512i)sum, u, s); }

// x in a register, where gcc would read it again for each use.
static __m512i in_register(__m512i x) {
    asm("" : "+v"(x));
    return x;
}

// 64 outputs of R rows: scale_w scale_x q_w · (q_x + 128 - 128), as bytes of x are taken to be from 0 to 255.
template <int R>
static void int8_part(const int8_t *w, const float *scale, const int32_t *sum, const Row *x, float *y, int64_t out,
                      int64_t in, bool fresh) {
    Ints dots[R][4];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 4; v++) dots[r][v] = (Ints)_mm512_loadu_si512(sum + 16 * v) * -128;
    for (int64_t k = 0; k < in; k += 4, w += 256) {
        if (fresh)
            for (int v = 0; v < 4; v++) fetch(w + 64 * v + 8192);
        __m512i some[4];
        for (int v = 0; v < 4; v++) some[v] = in_register(_mm512_loadu_si512(w + 64 * v));
        for (int r = 0; r < R; r++) {
            const __m512i four = _mm512_set1_epi32(*(const int32_t *)(x[r].q + k));
            for (int v = 0; v < 4; v++) dots[r][v] = dot(dots[r][v], four, some[v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 4; v++) {
            const __m512 s = _mm512_mul_ps(load(scale + 16 * v), _mm512_set1_ps(x[r].scale[0]));
            store(y + r * out + 16 * v, _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)dots[r][v]), s));
        }
}

static void int8_product(const Matrix &w, const float *x, float *y, int64_t rows, int64_t out, int64_t in) {
    const Rows all(x, rows, in, in, -128);
    const int8_t *weight = w[0].const_data_ptr<int8_t>();
    const float *scale = w[1].const_data_ptr<float>();
    const int32_t *sum = w[2].const_data_ptr<int32_t>();
    parallel_parts(out / 64, 1, [&](int64_t tile, int64_t end) {
        for (int64_t n = tile * 64; n < end * 64; n += 64) {
            int64_t r = 0;
            const auto by = [&](int64_t R, auto part) {
                for (; r + R <= rows; r += R)
                    part(weight + n * in, scale + n, sum + n, &all.row[r], y + r * out + n, out, in, r == 0);
            };
            by(6, int8_part<6>), by(4, int8_part<4>), by(2, int8_part<2>), by(1, int8_part<1>);
        }
    });
}

// 16 outputs of R rows. Of every group: the sum of scale_w (q_w - zero) x = scale_w scale_x (q_w · q_x - zero sum_x).
template <int R>
static void int4_part(const uint8_t *w, const at::BFloat16 *scale, const uint8_t *zero, const Row *x, float *y,
                      int64_t out, int64_t in, int64_t group) {
    const __m512i half = _mm512_set1_epi8(15);
    __m512 total[R] = {};
    for (int64_t g = 0; g < in / group; g++) {
        Ints dots[R] = {}, others[R] = {};  // of the low and of the high halves
        for (int64_t t = 0; t < group / 8; t++, w += 64) {
            fetch(w + 8192);
            const __m512i both = _mm512_loadu_si512(w);
            const __m512i low = in_register(_mm512_and_si512(both, half));
            const __m512i high = in_register(_mm512_and_si512(_mm512_srli_epi16(both, 4), half));
            for (int r = 0; r < R; r++) {
                const int32_t *fours = (const int32_t *)(x[r].q + g * group) + t;
                dots[r] = dot(dots[r], low, _mm512_set1_epi32(fours[0]));
                others[r] = dot(others[r], high, _mm512_set1_epi32(fours[group / 8]));
            }
        }
        const __m512 s = load(scale + 16 * g);
        const __m512 z = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(zero + 16 * g))));
        for (int r = 0; r < R; r++) {
            const __m512 dot = _mm512_cvtepi32_ps((__m512i)(dots[r] + others[r]));
            const __m512 part = _mm512_fnmadd_ps(z, _mm512_set1_ps(x[r].sum[g]), dot);
            total[r] = _mm512_fmadd_ps(_mm512_mul_ps(s, _mm512_set1_ps(x[r].scale[g])), part, total[r]);
        }
    }
    for (int r = 0; r < R; r++) _mm512_storeu_ps(y + r * out, total[r]);
}

static void int4_product(const Matrix &w, const float *x, float *y, int64_t rows, int64_t out, int64_t in) {
    const int64_t groups = w[0].size(1);
    const Rows all(x, rows, in, in / groups);
    const uint8_t *weight = w[0].const_data_ptr<uint8_t>(), *zero = w[2].const_data_ptr<uint8_t>();
    const at::BFloat16 *scale = w[1].const_data_ptr<at::BFloat16>();
    for (int64_t begin = 0; begin < rows; begin += 128) {  // as many as a core's cache holds
        const int64_t stop = std::min(rows, begin + 128);
        parallel_parts(out / 16, 1, [&](int64_t tile, int64_t end) {
            for (int64_t n = tile * 16; n < end * 16; n += 16) {
                int64_t r = begin;
                const auto by = [&](int64_t R, auto part) {
                    for (; r + R <= stop; r += R)
                        part(weight + n * in / 2, scale + n * groups, zero + n * groups, &all.row[r], y + r * out + n,
                             out, in, in / groups);
                };
                by(8, int4_part<8>), by(4, int4_part<4>), by(2, int4_part<2>), by(1, int4_part<1>);
            }
        });
    }
}

static int64_t outputs(const Matrix &w) {
    if (w[0].scalar_type() == at::kChar) return w[0].size(0) * 64;
    if (w[0].scalar_type() == at::kByte) return w[0].size(0) * 16;
    int64_t out = 0;
    for (const Tensor &some : w) out += some.size(0);
    return out;
}

// y (rows, out) = x (rows, in) wᵀ
static void multiply(const Matrix &w, const float *x, float *y, int64_t rows, int64_t in) {
    const int64_t out = outputs(w);
    if (w[0].scalar_type() == at::kChar) int8_product(w, x, y, rows, out, in);
    if (w[0].scalar_type() == at::kByte) int4_product(w, x, y, rows, out, in);
    by_type(w[0].scalar_type(), [&](auto number) {
        for (const Tensor &some : w) {
            float_product(some.const_data_ptr<decltype(number)>(), some.size(0), x, y, rows, out, in);
            y += some.size(0);
        }
    });
}

static Tensor product(const Tensor &x, Matrix w) {
    Tensor y = x.new_empty({x.size(0), outputs(w)});
    multiply(w, x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), x.size(0), x.size(1));
    return y;
}

// Q sums, V vectors long, of values (S, D), of which each makes a share.
template <int Q, int V, typename T>
static void mix(const T *v, const float *weights, const float *sums, float *y, int64_t S, int64_t D) {
    __m512 total[Q][V] = {};
    for (int64_t s = 0; s < S; s++)
        for (int part = 0; part < V; part++) {
            const __m512 value = load(v + s * D + 16 * part);
            for (int i = 0; i < Q; i++)
                total[i][part] = _mm512_fmadd_ps(_mm512_set1_ps(weights[i * S + s]), value, total[i][part]);
        }
    for (int i = 0; i < Q; i++)
        for (int j = 0; j < 16 * V; j++) y[i * D + j] = total[i][j / 16][j % 16] / sums[i];
}

// Q queries (D,) attend to keys and values (S, D); `weights` holds Q S numbers.
template <int Q, typename T>
static void attend_to(const float *q, const T *k, const T *v, float *weights, float *y, int64_t S, int64_t D) {
    const float scale = 1 / std::sqrt((float)D);
    for (int64_t s = 0; s < S; s++, k += D) {
        __m512 dots[Q] = {};
        for (int64_t d = 0; d < D; d += 16) {
            fetch(k + d + 1024), fetch(v + s * D + d);
            const __m512 key = load(k + d);
            for (int i = 0; i < Q; i++) dots[i] = _mm512_fmadd_ps(load(q + i * D + d), key, dots[i]);
        }
        for (int i = 0; i < Q; i++) weights[i * S + s] = scale * _mm512_reduce_add_ps(dots[i]);
    }
    float sums[Q];
    for (int i = 0; i < Q; i++) {
        float *share = weights + i * S;
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
    for (; d + 64 <= D; d += 64) mix<Q, 4>(v + d, weights, sums, y + d, S, D);
    for (; d < D; d += 16) mix<Q, 1>(v + d, weights, sums, y + d, S, D);
}

// y = pairs of neighbours in x (D,) times complex numbers: rotary embedding.
template <typename T>
static void apply_rope(const float *x, const float *cos_sin, T *y, int64_t D) {
    for (int64_t d = 0; d < D; d += 16) {
        const __m512 some = load(x + d), other = _mm512_permute_ps(some, 0xB1), by = load(cos_sin + d);  // other of a pair
        store(y + d, _mm512_fmaddsub_ps(some, _mm512_moveldup_ps(by), other * _mm512_movehdup_ps(by)));
    }
}

// Tokens of one row of the cache, from a position on: those from `first` on of a pass.
struct Span {
    int64_t row, start, T, first;
};

// Of N tokens, by the row, the position and the number of each.
static std::vector<Span> spans(const std::vector<int64_t> &places, int64_t N) {
    std::vector<Span> found;
    int64_t n = 0;
    for (size_t i = 0; i + 2 < places.size(); n += places[i + 2], i += 3)
        found.push_back({places[i], places[i + 1], places[i + 2], n});
    TORCH_CHECK_VALUE(n == N, N, " tokens for ", n, " places");
    return found;
}

constexpr int64_t MANY = 16;  // queries for which it is worth transposing all that they attend to

// Heads (N, H + 2K, D): keys and values, the last 2K, are stored in the cache (rows, 2K, length, D), and queries attend to
// those up to their own position: y (N, H, D). cos_sin (length, D). Here for spans of few tokens.
template <typename T>
static void attend_few(const float *heads, const float *cos_sin, T *kept, const std::vector<Span> &spans, float *y,
                       int64_t H, int64_t K, int64_t length, int64_t D) {
    const int64_t G = H / K, width = (H + 2 * K) * D;
    parallel_parts(spans.size() * K, 1, [&](int64_t i, int64_t stop) {
        std::vector<float> weights, q(G * D);
        for (; i < stop; i++) {
            const Span &span = spans[i / K];
            T *k = kept + (span.row * 2 * K + i % K) * length * D, *v = k + K * length * D;
            for (int64_t t = 0; t < span.T; t++) {
                const int64_t S = span.start + t + 1, here = (S - 1) * D;
                const float *query = heads + (span.first + t) * width + i % K * G * D;
                const float *key = heads + (span.first + t) * width + (H + i % K) * D;
                float *result = y + ((span.first + t) * H + i % K * G) * D;
                apply_rope(key, cos_sin + here, k + here, D);
                for (int64_t d = 0; d < D; d += 16) store(v + here + d, load(key + K * D + d));
                for (int64_t g = 0; g < G; g++) apply_rope(query + g * D, cos_sin + here, &q[g * D], D);
                weights.resize(4 * S);
                int64_t g = 0;
                const auto by = [&](int64_t Q, auto attend) {
                    for (; g + Q <= G; g += Q) attend(&q[g * D], k, v, weights.data(), result + g * D, S, D);
                };
                by(4, attend_to<4, T>), by(2, attend_to<2, T>), by(1, attend_to<1, T>);
            }
        }
    });
}

// n numbers, where they are or copied.
template <typename T>
static const float *as_floats(const T *from, float *to, int64_t n) {
    if constexpr (std::is_same_v<T, float>) return from;
    for (int64_t k = 0; k < n; k += 16) store(to + k, load(from + k));
    return to;
}

// The same for a span of many tokens, whose queries are rotated in place. For 48 of a head at a time: what they attend to,
// transposed, is columns of a product.
template <typename T>
static void attend_many(float *heads, const float *cos_sin, T *kept, const Span &span, float *y, int64_t H, int64_t K,
                        int64_t length, int64_t D) {
    const int64_t start = span.start, many = span.T, S = start + many;
    const int64_t width = (H + 2 * K) * D, panels = (many + 47) / 48;
    heads += span.first * width, y += span.first * H * D, kept += span.row * 2 * K * length * D;
    each(many, [&](int64_t t) {
        float *row = heads + t * width;
        const float *by = cos_sin + (start + t) * D;
        for (int64_t h = 0; h < H; h++) apply_rope(row + h * D, by, row + h * D, D);
        for (int64_t h = 0; h < K; h++) apply_rope(row + (H + h) * D, by, kept + (h * length + start + t) * D, D);
        for (int64_t h = K; h < 2 * K; h++)
            for (int64_t d = 0; d < D; d += 16) store(kept + (h * length + start + t) * D + d, load(row + (H + h) * D + d));
    });
    const int64_t size = S * D;
    float *turned = scratch(3 * K * size), *copies = turned + K * size;  // values (K, D, S); keys and values (2K, S, D)
    std::vector<const float *> keys(K);
    parallel_parts(K, 1, [&](int64_t h, int64_t end) {
        for (; h < end; h++) {
            keys[h] = as_floats(kept + h * length * D, copies + h * size, size);
            const float *values = as_floats(kept + (K + h) * length * D, copies + (K + h) * size, size);
            at::vec::transpose_mxn<float>(values, D, turned + h * size, S, S, D);
        }
    });
    const ThreadScratch scratches((2 * D + S) * 48);
    const auto work = [&](int64_t i, int64_t) {
        const int64_t h = i / panels, head = h / (H / K), t = i % panels * 48, here = std::min<int64_t>(48, many - t);
        const int64_t V = (here + 15) / 16, wide = 16 * V, seen = start + t, end = seen + here;
        float *query = scratches.mine(), *sums = query + D * wide, *weights = sums + D * wide;
        std::fill_n(query, D * wide, 0);
        at::vec::transpose_mxn<float>(heads + t * width + h * D, width, query, wide, here, D);
        wide_block(keys[head], query, weights, end, D, D, 1, V, wide, false, false);
        __m512 whole[3];
        for (int64_t v = 0; v < V; v++) {
            // Query n of this vector does not attend to key seen + j for j > n.
            const auto visible = [&](int64_t s) {
                const int64_t j = s - seen - 16 * v;
                return (__mmask16)(j < 0 ? 0xFFFF : j < 16 ? 0xFFFF << j : 0);
            };
            __m512 largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
            for (int64_t s = 0; s < end; s++)
                largest = _mm512_mask_max_ps(largest, visible(s), largest, load(weights + s * wide + 16 * v));
            for (int64_t s = 0; s < end; s++) {
                float *share = weights + s * wide + 16 * v;
                const at::vec::Vectorized<float> under = (load(share) - largest) * _mm512_set1_ps(1 / std::sqrt((float)D));
                const __m512 e = _mm512_maskz_mov_ps(visible(s), under.exp_u20());
                sum += e;
                store(share, e);
            }
            whole[v] = sum;
        }
        wide_block(turned + head * size, weights, sums, D, S, end, 1, V, wide, false, false);
        for (int64_t d = 0; d < D; d++)
            for (int64_t v = 0; v < V; v++)
                store(sums + d * wide + 16 * v, load(sums + d * wide + 16 * v) / whole[v]);
        at::vec::transpose_mxn<float>(sums, wide, y + (t * H + h) * D, H * D, D, here);
    };
    parallel_parts(H * panels, 1, work, 1);
}

static void attend(float *heads, const Tensor &cos_sin, const Tensor &cache, const std::vector<Span> &spans, float *y,
                   int64_t H) {
    const int64_t K = cache.size(1) / 2, length = cache.size(2), D = cache.size(3);
    std::vector<Span> few, many;
    for (const Span &span : spans) {
        const int64_t last = span.start + span.T - 1, end = std::min(cos_sin.size(0), length);
        TORCH_CHECK_INDEX(0 <= span.row && span.row < cache.size(0), "row ", span.row, " of ", cache.size(0));
        TORCH_CHECK_INDEX(0 <= span.start && last < end, "position ", span.start < 0 ? span.start : last, " of ", end);
        (span.T < MANY ? few : many).push_back(span);
    }
    const float *by = cos_sin.const_data_ptr<float>();
    by_type(cache.scalar_type(), [&](auto number) {
        auto *kept = cache.mutable_data_ptr<decltype(number)>();
        attend_few(heads, by, kept, few, y, H, K, length, D);
        for (const Span &span : many) attend_many(heads, by, kept, span, y, H, K, length, D);
    });
}

static Tensor attention(const Tensor &heads, const Tensor &cos_sin, const Tensor &cache, const std::vector<int64_t> &places) {
    const int64_t N = heads.size(0), D = cache.size(3), H = heads.size(1) / D - cache.size(1);
    Tensor y = heads.new_empty({N, H * D});
    attend(heads.mutable_data_ptr<float>(), cos_sin, cache, spans(places, N), y.mutable_data_ptr<float>(), H);
    return y;
}

// x += y, if there is any; h = the RMSNorm of x, where floor is the size of a row times epsilon
static void add_norm(float *x, const float *y, const Tensor &weight, double floor, float *h, int64_t rows, int64_t dim) {
    const float *w = weight.const_data_ptr<float>();
    each(rows, [&](int64_t r) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t k = r * dim; k < (r + 1) * dim; k += 16) {
            __m512 sum = load(x + k);
            if (y) store(x + k, sum += load(y + k));
            squares = _mm512_fmadd_ps(sum, sum, squares);
        }
        const __m512 scale = _mm512_set1_ps(std::sqrt(dim / (_mm512_reduce_add_ps(squares) + floor)));
        for (int64_t k = 0; k < dim; k += 16) store(h + r * dim + k, load(x + r * dim + k) * scale * load(w + k));
    });
}

// y (rows, size) = silu(gate) * up of rows with both (rows, 2 size)
static void swiglu(const float *both, float *y, int64_t rows, int64_t size) {
    each(rows, [&](int64_t r) {
        const float *gate = both + 2 * r * size, *up = gate + size;
        for (int64_t k = 0; k < size; k += 16) {
            const at::vec::Vectorized<float> minus = _mm512_setzero_ps() - load(gate + k);
            const __m512 e = minus.exp_u20();
            store(y + r * size + k, load(gate + k) / (_mm512_set1_ps(1) + e) * load(up + k));
        }
    });
}

// A model.
struct Model : torch::CustomClassHolder {
    struct Layer {
        Tensor attention_norm;
        Matrix qkv, wo;
        Tensor ffn_norm;
        Matrix w13, w2;
        Tensor cache;
    };

    Tensor embeddings, cos_sin, norm;
    Matrix output;
    double floor;
    std::vector<Layer> layers;

    Model(Tensor embeddings, Tensor cos_sin, Tensor norm, Matrix output, double floor)
        : embeddings(embeddings), cos_sin(cos_sin), norm(norm), output(output), floor(floor) {}

    void add(Tensor attention_norm, Matrix qkv, Matrix wo, Tensor ffn_norm, Matrix w13, Matrix w2, Tensor cache) {
        layers.push_back({attention_norm, qkv, wo, ffn_norm, w13, w2, cache});
    }

    // The last layer's output (N, dim) of a packed batch of N tokens. `places` has three numbers for each sequence: its
    // slot, the position of its first token, and how many tokens it has.
    Tensor hidden(const Tensor &tokens, const std::vector<int64_t> &places) const {
        const int64_t N = tokens.numel(), dim = embeddings.size(1);
        const std::vector<Span> where = spans(places, N);
        Tensor result = norm.new_empty({N, dim});
        float *x = result.mutable_data_ptr<float>(), *added = nullptr;
        const Tensor contiguous = tokens.contiguous();
        const int64_t *ids = contiguous.const_data_ptr<int64_t>();
        for (int64_t n = 0; n < N; n++)
            TORCH_CHECK_INDEX(0 <= ids[n] && ids[n] < embeddings.size(0), "token ", ids[n], " of ", embeddings.size(0));
        by_type(embeddings.scalar_type(), [&](auto number) {
            const auto *from = embeddings.const_data_ptr<decltype(number)>();
            for (int64_t n = 0; n < N; n++)
                for (int64_t k = 0; k < dim; k += 16) store(x + n * dim + k, load(from + ids[n] * dim + k));
        });
        const Layer &one = layers.at(0);  // others are like it
        const int64_t all = outputs(one.qkv), D = one.cache.size(3), H = all / D - one.cache.size(1);
        const int64_t size = outputs(one.w13) / 2;
        // This number of rows at a time, so that the activations of the feed-forward layer stay in the L3 cache.
        const int64_t parts = (3 * N * size >> 20) / 5 + 1, some = (N + parts - 1) / parts;
        const Floats y(N * dim), h(N * dim), heads(N * all), seen(N * H * D), both(2 * some * size), gated(some * size);
        for (const Layer &layer : layers) {
            add_norm(x, added, layer.attention_norm, floor, h, N, dim);
            multiply(layer.qkv, h, heads, N, dim);
            attend(heads, cos_sin, layer.cache, where, seen, H);
            multiply(layer.wo, seen, y, N, H * D);
            add_norm(x, y, layer.ffn_norm, floor, h, N, dim);
            for (int64_t r = 0; r < N; r += some) {
                const int64_t rows = std::min(some, N - r);
                multiply(layer.w13, h + r * dim, both, rows, dim);
                swiglu(both, gated, rows, size);
                multiply(layer.w2, gated, y + r * dim, rows, size);
            }
            added = y;
        }
        for (int64_t k = 0; k < N * dim; k += 16) store(x + k, load(x + k) + load(y + k));
        return result;
    }

    // Of hidden states (N, dim), (N, V).
    Tensor logits(const Tensor &hidden) const {
        const int64_t N = hidden.size(0), dim = hidden.size(1);
        const Tensor result = norm.new_empty({N, outputs(output)});
        const Floats h(N * dim);
        add_norm(hidden.mutable_data_ptr<float>(), nullptr, norm, floor, h, N, dim);
        multiply(output, h, result.mutable_data_ptr<float>(), N, dim);
        return result;
    }
};

TORCH_LIBRARY(llama, m) {
    m.def("product(Tensor x, Tensor[] w) -> Tensor", [](const Tensor &x, Matrix w) { return product(x, w); });
    m.def("attend(Tensor(a!) heads, Tensor cos_sin, Tensor(b!) cache, int[] places) -> Tensor",
          [](const Tensor &heads, const Tensor &cos_sin, const Tensor &cache, std::vector<int64_t> places) {
              return attention(heads, cos_sin, cache, places);
          });
    m.class_<Model>("Model")
        .def(torch::init<Tensor, Tensor, Tensor, Matrix, double>())
        .def("add", &Model::add)
        .def("hidden", [](const c10::intrusive_ptr<Model> &model, Tensor tokens, std::vector<int64_t> places) {
            return model->hidden(tokens, places);
        })
        .def("logits", [](const c10::intrusive_ptr<Model> &model, Tensor hidden) { return model->logits(hidden); });
}
