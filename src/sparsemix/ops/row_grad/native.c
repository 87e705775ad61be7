// Picks sorted by row; the norm and the dense form of a gradient whose factors are sorted so.
#include "row_factors.h"

typedef uint64_t key;  // the row, then the pick

// One pass of a stable radix sort. Threads own equal parts of the input; the result does not depend on their number.
static void sort_digit(const key *from, key *to, int64_t P, int shift, int bits, int64_t *counts, int64_t threads) {
    const int64_t size = (int64_t)1 << bits;
    const key mask = size - 1;
    memset(counts, 0, threads * size * sizeof(int64_t));
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < threads; t++)
        for (int64_t i = P * t / threads; i < P * (t + 1) / threads; i++)
            counts[t * size + (from[i] >> shift & mask)]++;
    for (int64_t digit = 0, before = 0; digit < size; digit++)
        for (int64_t t = 0; t < threads; t++) {
            int64_t n = counts[t * size + digit];
            counts[t * size + digit] = before;
            before += n;
        }
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < threads; t++)
        for (int64_t i = P * t / threads; i < P * (t + 1) / threads; i++)
            to[counts[t * size + (from[i] >> shift & mask)]++] = from[i];
}

// found = number of different rows, -1 if an id is none of the M rows. row and start have room for P + 1.
void sort_rows(
    const int64_t *id, int64_t P, int64_t M, int64_t *row, int64_t *start, int64_t *pick, int64_t *found,
    int64_t threads) {
    // Few picks do not pay for a second thread.
    if (threads > P / 8192 + 1) threads = P / 8192 + 1;
    int digits = 1, bits = 1;
    while (((int64_t)1 << bits) < M) bits++;
    while (bits > 11 * digits) digits++;
    const int each = (bits + digits - 1) / digits;
    key *a = malloc((2 * P + 1) * sizeof(key)), *b = a + P;
    int64_t *counts = malloc((threads << each) * sizeof(int64_t));
    int bad = 0;
#pragma omp parallel for num_threads(threads) reduction(| : bad)
    for (int64_t p = 0; p < P; p++) {
        bad |= id[p] < 0 || id[p] >= M;
        a[p] = (key)id[p] << 32 | (key)p;
    }
    for (int digit = 0; digit < digits && !bad; digit++) {
        sort_digit(a, b, P, 32 + digit * each, each, counts, threads);
        key *done = b;
        b = a;
        a = done;
    }
    int64_t U = 0;
    for (int64_t i = 0; i < P && !bad; i++) {
        pick[i] = a[i] & 0xffffffff;
        if (i == 0 || a[i] >> 32 != a[i - 1] >> 32) {
            row[U] = a[i] >> 32;
            start[U++] = i;
        }
    }
    start[U] = P;
    *found = bad ? -1 : U;
    free(a < b ? a : b);
    free(counts);
}

// The sum of squares of the whole gradient. Rows are added up in blocks, so that it does not depend on the threads.
void row_norm_sq(
    const int64_t *row, const int64_t *start, const int64_t *pick, const float *coef, const float *vec, int64_t U,
    int64_t N, int64_t R, int64_t D, double *out, int64_t threads) {
    struct factors f = {row, start, pick, coef, vec, U, R, D};
    sum_pieces(&f, threads);
    const int64_t BLOCK = 512, blocks = (U + BLOCK - 1) / BLOCK;
    double *sums = calloc(blocks + 1, sizeof(double));
    float *squares = malloc((N + 1) * sizeof(float));
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++) squares[n] = sum_of_squares(vec + n * D, D);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++) {
        float *g = malloc(D * sizeof(float));
        for (int64_t u = k * BLOCK; u < U && u < (k + 1) * BLOCK; u++) {
            if (start[u + 1] - start[u] == 1) {
                double c = coef[pick[start[u]]];
                sums[k] += c * c * squares[pick[start[u]] / R];
            } else {
                row_gradient(&f, u, g);
                sums[k] += sum_of_squares(g, D);
            }
        }
        free(g);
    }
    *out = 0;
    for (int64_t k = 0; k < blocks; k++) *out += sums[k];
    free(squares);
    free(sums);
    free(f.pieces);
}

// Writes the rows that have a gradient; the others must be zero already.
#define TABLE_GRAD(T, PUT)                                                                                            \
    void table_grad_##T(                                                                                              \
        const int64_t *row, const int64_t *start, const int64_t *pick, const float *coef, const float *vec, int64_t U, \
        int64_t R, int64_t D, T *out, int64_t threads) {                                                              \
        struct factors f = {row, start, pick, coef, vec, U, R, D};                                                    \
        sum_pieces(&f, threads);                                                                                      \
        _Pragma("omp parallel num_threads(threads)") {                                                                \
            float *g = malloc(D * sizeof(float));                                                                     \
            _Pragma("omp for schedule(dynamic, 256)") for (int64_t u = 0; u < U; u++) {                               \
                row_gradient(&f, u, g);                                                                               \
                for (int64_t d = 0; d < D; d++) PUT(out + row[u] * D + d, g[d]);                                      \
            }                                                                                                         \
            free(g);                                                                                                  \
        }                                                                                                             \
        free(f.pieces);                                                                                               \
    }

TABLE_GRAD(float, put_f32)
TABLE_GRAD(bf16, put_bf16)
