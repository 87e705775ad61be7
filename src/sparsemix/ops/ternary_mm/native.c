// int8 rows times ternary weights of two bits: out[n, f] = sum_d row[n, d] weight[f, d], summed in int32.
// Byte j of a weight row holds the weights j, j + P, j + 2P, j + 3P at bits 0-1, 2-3, 4-5, 6-7 as weight + 1, where
// P = ceil(D / 4). The kernels sum row * (weight + 1) over unsigned codes and take the sum of the row off at the end.
#include "native.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// One step takes STEP bytes of a weight row. `fold` adds products of codes to `lanes`, which hold the sums of RUN steps:
// a step adds at most 4 * 2 * 2 * 127 to a lane of 16 bits where products are added in pairs, else half of that.
#if defined(__AVX512VNNI__)
#define STEP 64
#define RUN (1 << 20)
typedef __m512i bytes, lanes;
static inline lanes fold(lanes sums, bytes codes, bytes row) { return _mm512_dpbusd_epi32(sums, codes, row); }
static inline uint32_t total(lanes sums) { return (uint32_t)_mm512_reduce_add_epi32(sums); }
#elif defined(__AVX2__)
#define STEP 32
#define RUN 16
typedef __m256i bytes, lanes;
static inline lanes fold(lanes sums, bytes codes, bytes row) {
    sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, row));
    // Sums in the order written: a compiler that adds in pairs first needs more registers than there are.
    __asm__("" : "+x"(sums));
    return sums;
}
static inline uint32_t total(lanes sums) {
    __m256i pairs = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
#else
#define STEP 16
#define RUN 32
typedef int8_t bytes __attribute__((vector_size(STEP)));
typedef int16_t lanes __attribute__((vector_size(2 * STEP)));
static inline lanes fold(lanes sums, bytes codes, bytes row) {
    return sums + __builtin_convertvector(codes, lanes) * __builtin_convertvector(row, lanes);
}
static inline uint32_t total(lanes sums) {
    int32_t sum = 0;
    for (int i = 0; i < STEP; i++) sum += sums[i];
    return (uint32_t)sum;
}
#endif
typedef uint64_t words __attribute__((vector_size(STEP)));

static inline bytes load(const void *p) {
    bytes x;
    memcpy(&x, p, STEP);
    return x;
}
// Bits 2q and 2q + 1 of every byte; the mask drops what the shift brings over from the next byte.
static inline bytes quarter(bytes packed, int q) { return (bytes)((words)packed >> 2 * q & 0x0303030303030303u); }

// A row as the kernels read it: for every step four times STEP codes, zeros where the row has ended.
#define ROOM 64
typedef struct {
    int32_t sum;
    float scale;
    char unused[ROOM - 8];
    int8_t codes[];
} Row;

typedef struct {
    int64_t N, D, F, E;
    int64_t matrices;       // those of an expert lie one after the other in F
    const uint8_t *packed;  // (E, F, P)
    const float *scale;     // (E, matrices), NULL where the sums themselves are wanted
    const int64_t *counts;  // (E,) rows of every expert, NULL where all are the only one's
    char *rows;             // (N,) of Row
    void *out;              // (N, F) of int32, or of what the scaled sums are stored as
    int is_bf16;
} Product;

static inline int64_t packed_bytes(int64_t D) { return (D + 3) / 4; }
static inline Row *row_of(const Product *p, int64_t n) {
    int64_t room = 4 * ((packed_bytes(p->D) + ROOM - 1) / ROOM * ROOM);
    return (Row *)(p->rows + n * (sizeof(Row) + room));
}

// codes = round(x 127 / m), scale = m / 127, m = max(max |x|, 1e-5), in the operations of int8_row_values. Magnitudes
// of floats are ordered like their bits, then infinity, then NaN: a row that holds one gets codes 0 and the scale NaN.
#define QUANTISE(T, type)                                                                       \
    static float factor_##type(const T *x, int64_t D, float *scale) {                           \
        int32_t most = 0x3727c5ac; /* 1e-5 */                                                   \
        for (int64_t d = 0; d < D; d++) {                                                       \
            float value = one_##type(x + d);                                                    \
            int32_t bits;                                                                       \
            memcpy(&bits, &value, 4);                                                           \
            bits &= 0x7fffffff;                                                                 \
            most = bits > most ? bits : most;                                                   \
        }                                                                                       \
        float largest;                                                                          \
        memcpy(&largest, &most, 4);                                                             \
        *scale = most < 0x7f800000 ? largest / 127.0f : NAN;                                    \
        return most < 0x7f800000 ? 1.0f / largest * 127.0f : 0;                                 \
    }                                                                                           \
    static int32_t codes_##type(const T *x, float factor, int64_t count, int8_t *codes) {       \
        int32_t sum = 0;                                                                        \
        if (!factor) {                                                                          \
            memset(codes, 0, count);                                                            \
            return 0;                                                                           \
        }                                                                                       \
        for (int64_t d = 0; d < count; d++) {                                                   \
            float code = rintf(one_##type(x + d) * factor);                                     \
            codes[d] = (int8_t)(int32_t)(code > 127 ? 127 : code < -127 ? -127 : code);         \
            sum += codes[d];                                                                    \
        }                                                                                       \
        return sum;                                                                             \
    }
QUANTISE(float, f32)
QUANTISE(bf16, bf16)

// Codes are codes already.
static float factor_int8(const int8_t *x, int64_t D, float *scale) {
    (void)x, (void)D;
    return *scale = 1;
}
static int32_t codes_int8(const int8_t *x, float factor, int64_t count, int8_t *codes) {
    int32_t sum = 0;
    (void)factor;
    memcpy(codes, x, count);
    for (int64_t d = 0; d < count; d++) sum += x[d];
    return sum;
}

#define ARRANGE(T, type)                                                                        \
    static void arrange_##type(const Product *p, int64_t n, const T *x) {                       \
        int64_t D = p->D, P = packed_bytes(D);                                                  \
        Row *row = row_of(p, n);                                                                \
        float factor = factor_##type(x, D, &row->scale);                                        \
        row->sum = 0;                                                                           \
        for (int64_t j = 0; j < P; j += STEP)                                                   \
            for (int64_t q = 0; q < 4; q++) {                                                   \
                int8_t *into = row->codes + 4 * j + q * STEP;                                   \
                int64_t d = q * P + j, left = P - j < D - d ? P - j : D - d;                    \
                if (left < STEP) memset(into, 0, STEP);                                         \
                if (left > 0) row->sum += codes_##type(x + d, factor, left < STEP ? left : STEP, into); \
            }                                                                                   \
    }
ARRANGE(float, f32)
ARRANGE(bf16, bf16)
ARRANGE(int8_t, int8)

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")
// Weights are asked for so many bytes before they are read; the rows that follow lie behind this one.
#define AHEAD 4096

// sums[f][m] += num_steps (at most RUN) steps of FR weight rows times MR rows. FR and MR are constants where this is
// inlined, so that all FR * MR lanes stay in registers.
INLINE void run(const int FR, const int MR, const uint8_t *const *weight, const int8_t *const *row, int64_t num_steps,
                uint32_t sums[4][4]) {
    lanes part[4][4] = {{{0}}};
    for (int64_t step = 0; step < num_steps; step++) {
        bytes packed[4], codes[4];
        UNROLL for (int f = 0; f < FR; f++) {
            packed[f] = load(weight[f] + step * STEP);
            __builtin_prefetch(weight[f] + step * STEP + AHEAD);
        }
        UNROLL for (int q = 0; q < 4; q++) {
            UNROLL for (int f = 0; f < FR; f++) codes[f] = quarter(packed[f], q);
            UNROLL for (int m = 0; m < MR; m++) {
                bytes x = load(row[m] + (4 * step + q) * STEP);
                UNROLL for (int f = 0; f < FR; f++) part[f][m] = fold(part[f][m], codes[f], x);
            }
        }
    }
    UNROLL for (int f = 0; f < FR; f++) {
        UNROLL for (int m = 0; m < MR; m++) sums[f][m] += total(part[f][m]);
    }
}

INLINE void tile(const int FR, const int MR, const uint8_t *const *weight, const Row *const *row, int64_t P,
                 uint32_t sums[4][4]) {
    int64_t whole = P / STEP;
    const uint8_t *w[4];
    const int8_t *x[4];
    for (int64_t step = 0; step < whole; step += RUN) {
        UNROLL for (int f = 0; f < FR; f++) w[f] = weight[f] + step * STEP;
        UNROLL for (int m = 0; m < MR; m++) x[m] = row[m]->codes + step * 4 * STEP;
        run(FR, MR, w, x, whole - step < RUN ? whole - step : RUN, sums);
    }
    if (whole * STEP == P) return;
    // The last bytes are copied: a whole step would read past the end of the matrix.
    uint8_t last[4][STEP] = {{0}};
    UNROLL for (int f = 0; f < FR; f++) w[f] = memcpy(last[f], weight[f] + whole * STEP, P - whole * STEP);
    UNROLL for (int m = 0; m < MR; m++) x[m] = row[m]->codes + whole * 4 * STEP;
    run(FR, MR, w, x, 1, sums);
}

INLINE void put(const Product *p, int64_t e, int64_t n, int64_t f, uint32_t sum) {
    const Row *row = row_of(p, n);
    int64_t at = n * p->F + f;
    int32_t exact = (int32_t)(sum - (uint32_t)row->sum);
    if (!p->scale) {
        ((int32_t *)p->out)[at] = exact;
        return;
    }
    float value = (float)exact * (row->scale * p->scale[e * p->matrices + f / (p->F / p->matrices)]);
    if (p->is_bf16) put_bf16((bf16 *)p->out + at, value);
    else put_f32((float *)p->out + at, value);
}

// The outputs from (n, f) on, FR x MR at a time along f. Where fewer are left the last row stands in for the others.
INLINE void stripe(const int FR, const int MR, const Product *p, int64_t e, int64_t n, int64_t n_end, int64_t f,
                   int64_t f_end) {
    int64_t P = packed_bytes(p->D);
    const uint8_t *weight[4];
    const Row *row[4];
    UNROLL for (int m = 0; m < MR; m++) row[m] = row_of(p, n + m < n_end ? n + m : n_end - 1);
    for (; f < f_end; f += FR) {
        uint32_t sums[4][4] = {{0}};
        UNROLL for (int i = 0; i < FR; i++) weight[i] = p->packed + (e * p->F + (f + i < f_end ? f + i : f_end - 1)) * P;
        tile(FR, MR, weight, row, P, sums);
        for (int i = 0; i < FR && f + i < f_end; i++)
            for (int m = 0; m < MR && n + m < n_end; m++) put(p, e, n + m, f + i, sums[i][m]);
    }
}

// Rows n to n_end of expert e times its weight rows f to f_end, a block of which stays in the caches for all rows.
#define BLOCK 64
static void rectangle(const Product *p, int64_t e, int64_t n, int64_t n_end, int64_t f, int64_t f_end) {
    for (; f < f_end; f += BLOCK) {
        int64_t stop = f + BLOCK < f_end ? f + BLOCK : f_end;
        for (int64_t m = n; m < n_end; m += 4) {
            if (n_end - m == 1) stripe(1, 1, p, e, m, n_end, f, stop);
            else if (n_end - m == 2) stripe(2, 2, p, e, m, n_end, f, stop);
            else stripe(2, 4, p, e, m, n_end, f, stop);
        }
    }
}

// Threads share out the weight rows of every expert, so that a single token keeps all of them busy.
static void multiply(const Product *p, int64_t threads) {
    int64_t N = p->N, F = p->F, size = p->scale ? p->is_bf16 ? 2 : 4 : 4;
    int wide = N * F * packed_bytes(p->D) > 1 << 15;
    #pragma omp parallel for num_threads(threads) if (wide)
    for (int64_t t = 0; t < threads; t++) {
        int64_t f = F * t / threads / 4 * 4, f_end = t + 1 < threads ? F * (t + 1) / threads / 4 * 4 : F, n = 0;
        for (int64_t e = 0; e < p->E && n < N; e++) {
            int64_t count = p->counts ? p->counts[e] : N, n_end = count < N - n ? n + count : N;
            rectangle(p, e, n, n_end, f, f_end);
            n = n_end;
        }
        for (; n < N; n++) memset((char *)p->out + (n * F + f) * size, 0, (f_end - f) * size);
    }
}

void ternary_sums(const int8_t *codes, const uint8_t *packed, const int64_t *counts, char *rows, int32_t *out,
                  int64_t N, int64_t D, int64_t F, int64_t E, int64_t threads) {
    Product p = {N, D, F, E, 1, packed, NULL, counts, rows, out, 0};
    #pragma omp parallel for num_threads(threads) if (N > 4)
    for (int64_t n = 0; n < N; n++) arrange_int8(&p, n, codes + n * D);
    multiply(&p, threads);
}

#define VALUES(T, type)                                                                                       \
    void ternary_values_##type(const T *x, const uint8_t *packed, const float *scale, const int64_t *counts,  \
                               char *rows, T *out, int64_t N, int64_t D, int64_t F, int64_t E,                \
                               int64_t matrices, int64_t threads) {                                           \
        Product p = {N, D, F, E, matrices, packed, scale, counts, rows, out, sizeof(T) == 2};                 \
        _Pragma("omp parallel for num_threads(threads) if (N > 4)")                                           \
        for (int64_t n = 0; n < N; n++) arrange_##type(&p, n, x + n * D);                                     \
        multiply(&p, threads);                                                                                \
    }
VALUES(float, f32)
VALUES(bf16, bf16)
