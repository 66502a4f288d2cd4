// Compares native.cpp, compiled for any instruction set, with plain loops in double precision. Prints the differences, and
// exits with their number.
#include "../llama/backends/native.cpp"

#include <cstdio>
#include <vector>

#ifdef __SANITIZE_THREAD__  // ten times as slow
static const std::vector<int64_t> ROWS = {7};
#else
static const std::vector<int64_t> ROWS = {1, 2, 3, 5, 7, 8, 12, 35};  // of integer matmuls
#endif

static uint32_t seed = 1;
static int failures = 0;

static uint32_t bits() { return seed = seed * 1664525 + 1013904223; }
static float uniform() { return (int32_t)bits() / 2147483648.0f; }
static std::vector<float> uniforms(int64_t n, float scale = 1) {
    std::vector<float> x(n);
    for (float &value : x) value = uniform() * scale;
    return x;
}
static void expect(bool right, const char *what, int64_t a = 0, int64_t b = 0, double value = 0) {
    if (right) return;
    failures++;
    printf("%s %lld %lld: %g\n", what, (long long)a, (long long)b, value);
}
static void expect_equal(const std::vector<float> &got, const std::vector<double> &right, double limit, const char *what,
                         int64_t a = 0, int64_t b = 0) {
    double error = 0, all = 1e-30;
    for (size_t i = 0; i < got.size(); i++) error += std::pow(got[i] - right[i], 2), all += right[i] * right[i];
    expect(std::sqrt(error / all) < limit, what, a, b, std::sqrt(error / all));
}

template <typename T>
static std::vector<T> narrowed(std::vector<float> &x) {  // x as T; rounds x itself as well
    std::vector<T> to(x.size());
    for (size_t i = 0; i < x.size(); i += L) {
        store(&to[i], load(&x[i]));
        store(&x[i], load(&to[i]));
    }
    return to;
}

static float as(const float *, double x) { return x; }
template <typename T>
static float as(const T *, double x) {  // x rounded to T
    std::vector<float> y(L, x);
    narrowed<T>(y);
    return y[0];
}

static void test_conversions_and_reductions() {
    const float values[] = {0, 1, -1, 1.0009765625f, 65504, 1e6f, -1e6f, 6.1e-5f, 6e-8f, 1e-9f, INFINITY, NAN};
    for (float value : values) {
        std::vector<float> x(L, value);
        narrowed<Half>(x);
        const double size = std::abs((double)value), step = std::max(size * 0x1p-11, 0x1p-25);
        if (value != value) expect(x[0] != x[0], "NaN in half precision");
        else if (size > 65519) expect(std::isinf(x[0]) && (x[0] > 0) == (value > 0), "overflow of half precision", 0, 0, value);
        else expect(std::abs(x[0] - (double)value) <= step, "half precision", 0, 0, value);
        std::vector<float> y(L, value);
        narrowed<BFloat16>(y);
        if (value != value) expect(y[0] != y[0], "NaN in bfloat16");
        else expect(y[0] == value || std::abs(y[0] - value) <= size * 0x1p-8, "bfloat16", 0, 0, value);
    }
    for (float value = -87; value < 88; value += 0.37f) {
        const F e = exp(splat(value));
        expect(std::abs(e[0] / std::exp((double)value) - 1) < 1e-6, "exp", 0, 0, value);
    }
    expect(exp(splat(NAN))[0] != exp(splat(NAN))[0], "exp of NaN");
    F x[L];
    for (int i = 0; i < L; i++)
        for (int j = 0; j < L; j++) x[i][j] = 100 * i + j;
    F y[L];
    std::copy_n(x, L, y);
    const F total = sum_each(y);
    transpose(x);
    for (int i = 0; i < L; i++) {
        expect(std::abs(total[i] - (100.0f * i * L + L * (L - 1) / 2)) < 0.5f, "sums", i);
        for (int j = 0; j < L; j++) expect(x[i][j] == 100 * j + i, "transpose", i, j);
    }
}

static void test_floats(Kind kind, int64_t rows, int64_t out, int64_t in) {
    auto w = uniforms(out * in), x = uniforms(rows * in);
    std::vector<BFloat16> bfloat;
    std::vector<Half> narrow;
    const void *weight = w.data();
    if (kind == FLOAT16) narrow = narrowed<Half>(w), weight = narrow.data();
    if (kind == BFLOAT16) bfloat = narrowed<BFloat16>(w), weight = bfloat.data();
    std::vector<float> y(rows * out, NAN);
    const Matrix m{kind, out, in, 0, 0, weight, nullptr, nullptr};
    llama_matmul(&m, x.data(), y.data(), rows);
    if (kind == BFLOAT16 && HAS_DOT2 && in % (2 * L) == 0) narrowed<BFloat16>(x);
    std::vector<double> right(rows * out);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < out; o++)
            for (int64_t k = 0; k < in; k++) right[r * out + o] += (double)x[r * in + k] * w[o * in + k];
    expect_equal(y, right, 1e-5, "float matmul", kind, rows);
}

// `outliers`: the number of activations of a row that are large. `worst`: all weights are the largest, and all activations,
// or the outliers, are equal; the accumulators must not overflow.
static void test_integers(int64_t bits_, int64_t rows, int64_t out, int64_t in, int64_t group, bool with_min,
                          int64_t outliers, bool worst) {
    const int64_t N = llama_tile(), groups = in / group, tiles = (out + N - 1) / N, zero = bits_ == 4 && !with_min ? 8 : 0;
    std::vector<uint8_t> q(out * in), packed(tiles * N * in * bits_ / 8);
    for (auto &value : q) value = bits_ == 4 ? (worst ? 15 : bits() >> 28) : (uint8_t)(worst ? -127 : (int)(bits() >> 24) % 128);
    auto x = uniforms(rows * in);
    if (worst) std::fill(x.begin(), x.end(), outliers ? 1e-3f : 1.0f);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < outliers; i++) {
            float &value = x[r * in + (worst ? i : bits() % in)];
            value = worst ? 1e3f : value * std::exp2(12 * std::abs(uniform()));
        }
    std::vector<float> scales(tiles * N * groups), mins(tiles * N * groups), y(rows * out, NAN);
    for (auto &value : scales) value = 0.01f + 0.005f * uniform();
    for (auto &value : mins) value = 0.1f * uniform();
    const auto scale = narrowed<Half>(scales), min = narrowed<Half>(mins);
    std::vector<uint8_t> stored = q;
    if (bits_ == 4)
        for (int64_t i = 0; i < out * in; i += 2) stored[i / 2] = q[i] | q[i + 1] << 4;
    llama_pack(bits_, stored.data(), packed.data(), out, in, group);
    const Matrix m{bits_ == 4 ? INT4 : INT8, out, in, group, zero, packed.data(), scale.data(), with_min ? min.data() : nullptr};
    std::vector<double> right(rows * out), rounded(rows * in);
    const int64_t chunk = chunk_columns(m);
    const bool amx = uses_amx(m, rows);
    if (amx) narrowed<BFloat16>(x), rounded.assign(x.begin(), x.end());
    for (bool ties = !amx; ties;) {
        ties = false;
        for (int64_t begin = 0; begin < rows * in; begin += chunk) {
            double mean = 0, most = 1e-30;
            for (int64_t k = 0; k < in; k++) mean += std::abs((double)x[begin / in * in + k]) / in;
            for (int64_t k = begin; k < begin + chunk; k++) most = std::max<double>(most, std::abs(x[k]));
            const double s = std::max(std::min(most, OUTLIER * mean) / MAX_LOW, most / MAX_HIGH);
            for (int64_t k = begin; k < begin + chunk; k++) {
                const double number = std::nearbyint(x[k] / s);
                rounded[k] = number * s;
                if (std::abs(x[k] / s - number) < 0.48) continue;
                x[k] = rounded[k], ties = true;  // a tie may be rounded up or down
            }
        }
    }
    llama_matmul(&m, x.data(), y.data(), rows);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < out; o++)
            for (int64_t k = 0; k < in; k++) {
                const int64_t at = (o / N * groups + k / group) * N + o % N;
                const double number = bits_ == 4 ? (double)q[o * in + k] - zero : (double)(int8_t)q[o * in + k];
                const double weight = number * scales[at] + (with_min ? mins[at] : 0);
                right[r * out + o] += rounded[r * in + k] * (amx ? as((BFloat16 *)nullptr, weight) : weight);
            }
    // In the worst case up to 1,024 equal sums of chunks are added.
    expect_equal(y, right, worst ? 1e-5 : 2e-6, worst ? "largest integers" : "integer matmul", bits_ * 1000 + group, rows);
}

// Two equal sequences in a batch: in one pass, in chunks, and token by token. With a 16-bit cache a few keys may be rounded
// the other way, as RoPE sums in another order; attention by Pairs rounds queries and scores too.
template <typename T>
static void test_attention(int64_t H, int64_t K, int64_t D) {
    const int64_t length = 70, tokens = 60, width = (H + 2 * K) * D;
    const T *type = nullptr;
    const Heads heads{H, K, D, length};
    const auto cos_sin = uniforms(length * D), start = uniforms(tokens * width);
    std::vector<double> rotated(tokens * width), right(tokens * H * D);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t j = 0; j < width; j++) {
            const float *row = &start[t * width], *by = &cos_sin[t * D];
            const double here = row[j], other = row[j ^ 1];
            const double x = j >= (H + K) * D ? here : here * by[(j % D) & ~1] + (j % 2 ? other : -other) * by[(j % D) | 1];
            rotated[t * width + j] = j < H * D ? x : as(type, x);
        }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < H; h++) {
            std::vector<double> scores(t + 1);
            const double *q = &rotated[t * width + h * D];
            double total = 0;
            for (int64_t s = 0; s <= t; s++) {
                for (int64_t d = 0; d < D; d++) scores[s] += q[d] * rotated[s * width + (H + h / (H / K)) * D + d];
                total += scores[s] = std::exp(scores[s] / std::sqrt((double)D));
            }
            for (int64_t s = 0; s <= t; s++)
                for (int64_t d = 0; d < D; d++)
                    right[(t * H + h) * D + d] += scores[s] / total * rotated[s * width + (H + K + h / (H / K)) * D + d];
        }
    for (int64_t chunk : {tokens, (int64_t)20, (int64_t)7, (int64_t)1}) {
        std::vector<float> y(tokens * H * D);
        std::vector<T> cache(2 * 2 * K * length * D);
        memset(cache.data(), 0xFF, cache.size() * sizeof(T));  // NaN
        for (int64_t t = 0; t < tokens; t += chunk) {
            const int64_t n = std::min(chunk, tokens - t);
            std::vector<float> qkv(start.begin() + t * width, start.begin() + (t + n) * width), twice(2 * n * H * D);
            qkv.insert(qkv.end(), start.begin() + t * width, start.begin() + (t + n) * width);
            const Sequence sequences[] = {{1, t, n, n}, {0, t, n, n}};
            attention(heads, qkv.data(), cos_sin.data(), cache.data(), sequences, 2, twice.data());
            std::copy_n(twice.begin(), n * H * D, y.begin() + t * H * D);
            expect(std::equal(twice.begin(), twice.begin() + n * H * D, twice.begin() + n * H * D), "two sequences", chunk, t);
        }
        const bool pairs = HAS_DOT2 && std::is_same_v<T, BFloat16> && chunk >= MIN_PREFILL && D % (2 * L) == 0;
        expect_equal(y, right, pairs ? 3e-3 : sizeof(T) == 4 ? 1e-5 : 1e-4, "attention", sizeof(T) * 1000 + D, chunk);
    }
}

// Every item of a job is computed once, whatever the number of threads.
static void test_threads() {
    for (int threads : {1, 2, 5, 70}) {
        llama_threads(threads);
        for (int64_t size : {0, 1, 2, 3, 7, 64, 1000}) {
            std::vector<std::atomic<int>> times(size);
            for (int jobs = 1; jobs <= 20; jobs++) {
                parallel_for(size, [&](int64_t i, int64_t end) {
                    for (; i < end; i++) times[i]++;
                });
                expect(std::all_of(times.begin(), times.end(), [&](int n) { return n == jobs; }), "threads", threads, size);
            }
        }
    }
}

int main(int count, char **arguments) {
    llama_threads(count > 1 ? atoi(arguments[1]) : 2);
    test_conversions_and_reductions();
    for (int64_t rows : {1, 2, 3, 5, 6, 8, 11, 16, 17, 31, 63, 65, 100})
        for (Kind kind : {FLOAT32, FLOAT16, BFLOAT16})
            for (int64_t out : {7, 64, 100}) test_floats(kind, rows, out, out == 7 ? 304 : 320);
    for (int64_t bits : {4, 8})
        for (int64_t group : {16, 32, 64, 128, 256})
            for (int64_t rows : ROWS)
                for (int64_t out : {64, 100})
                    for (bool with_min : {false, true})
                        for (int64_t outliers : {0, 9}) test_integers(bits, rows, out, 256, group, with_min, outliers, false);
    for (int64_t bits : {4, 8}) {
        test_integers(bits, 2, 64, 32768, 32768, false, 0, true), test_integers(bits, 3, 64, 256, 32, true, 0, true);
        test_integers(bits, 2, 64, 32768, 32768, false, 128, true), test_integers(bits, 100, 300, 256, 64, true, 3, false);
    }
    for (int64_t D : {16, 48, 64, 128}) {
        test_attention<float>(4, 2, D), test_attention<float>(6, 1, D), test_attention<float>(3, 3, D);
        test_attention<BFloat16>(6, 1, D), test_attention<Half>(4, 2, D);
    }
    test_threads();
    printf("%s: %d differences\n", llama_instructions(), failures);
    return failures;
}
