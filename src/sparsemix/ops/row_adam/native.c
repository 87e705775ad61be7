// AdamW on the rows of a table that have a gradient, which is summed from its factors row by row and never stored.
#ifndef T
#include "row_factors.h"

struct adam {
    float rate, beta1, beta2, root, eps;  // rate: lr / (1 - beta1^t); root: (1 - beta2^t)^-1/2
};

// Rows that are fetched before they are needed, one block of columns at a time.
#define AHEAD 1
#define BLOCK 16

#define T float
#define ONE one_f32
#define PUT put_f32
#define NAME(name) name##_f32
#include "native.c"
#undef T
#undef ONE
#undef PUT
#undef NAME
#define T bf16
#define ONE one_bf16
#define PUT put_bf16
#define NAME(name) name##_bf16
#include "native.c"
#else

static inline void NAME(full)(
    T *restrict w, float *restrict m, float *restrict v, const float *restrict g, int64_t n, float keep,
    struct adam a) {
    for (int64_t d = 0; d < n; d++) {
        m[d] += (g[d] - m[d]) * (1 - a.beta1);
        v[d] = v[d] * a.beta2 + g[d] * g[d] * (1 - a.beta2);
        PUT(w + d, ONE(w + d) * keep - a.rate * m[d] / (sqrtf(v[d]) * a.root + a.eps));
    }
}

static inline void NAME(row)(
    T *restrict w, float *restrict m, const float *restrict g, int64_t n, float keep, float rate,
    struct adam a) {
    for (int64_t d = 0; d < n; d++) {
        m[d] += (g[d] - m[d]) * (1 - a.beta1);
        PUT(w + d, ONE(w + d) * keep - rate * m[d]);
    }
}

// One row; `next` is the row whose w, m and v are fetched meanwhile.
static inline void NAME(update)(
    T *w, float *m, float *v, const float *g, int64_t r, int64_t next, int64_t D, int64_t by_row, float keep,
    struct adam a) {
    T *w_r = w + r * D, *w_next = w + next * D;
    float *m_r = m + r * D, *m_next = m + next * D, rate = 0;
    if (by_row) {
        __builtin_prefetch(v + next, 1, 3);
        v[r] = v[r] * a.beta2 + sum_of_squares(g, D) / D * (1 - a.beta2);
        rate = a.rate / (sqrtf(v[r]) * a.root + a.eps);
    }
    for (int64_t d = 0; d < D; d += BLOCK) {
        const int64_t n = D - d < BLOCK ? D - d : BLOCK;
        __builtin_prefetch(w_next + d, 1, 3);
        __builtin_prefetch(m_next + d, 1, 3);
        if (by_row) {
            n == BLOCK ? NAME(row)(w_r + d, m_r + d, g + d, BLOCK, keep, rate, a)
                       : NAME(row)(w_r + d, m_r + d, g + d, n, keep, rate, a);
        } else {
            __builtin_prefetch(v + next * D + d, 1, 3);
            n == BLOCK ? NAME(full)(w_r + d, m_r + d, v + r * D + d, g + d, BLOCK, keep, a)
                       : NAME(full)(w_r + d, m_r + d, v + r * D + d, g + d, n, keep, a);
        }
    }
}

// The U rows that have a gradient. `decayed` holds, for every row, the logarithm of the decay it has had; NULL: none.
void NAME(some_rows)(
    T *w, float *m, float *v, double *decayed, const int64_t *row, const int64_t *start, const int64_t *pick,
    const float *coef, const float *vec, int64_t U, int64_t R, int64_t D, int64_t by_row, double rate, double beta1,
    double beta2, double root, double eps, double decay, int64_t threads) {
    struct factors f = {row, start, pick, coef, vec, U, R, D};
    const struct adam a = {rate, beta1, beta2, root, eps};
    sum_pieces(&f, threads);
#pragma omp parallel num_threads(threads)
    {
        float *g = malloc(D * sizeof(float));
#pragma omp for schedule(dynamic, 256)
        for (int64_t u = 0; u < U; u++) {
            float keep = decayed ? exp(decay - decayed[row[u]]) : 1;
            if (decayed) decayed[row[u]] = decay;
            row_gradient(&f, u, g);
            NAME(update)(w, m, v, g, row[u], row[u + AHEAD < U ? u + AHEAD : U - 1], D, by_row, keep, a);
        }
        free(g);
    }
    free(f.pieces);
}

// All M rows, most of them without a gradient. Where `seen` is given, rows that never had one are passed over.
void NAME(all_rows)(
    T *w, float *m, float *v, const uint8_t *seen, const int64_t *row, const int64_t *start, const int64_t *pick,
    const float *coef, const float *vec, int64_t U, int64_t M, int64_t R, int64_t D, int64_t by_row, double rate,
    double beta1, double beta2, double root, double eps, double keep, int64_t threads) {
    struct factors f = {row, start, pick, coef, vec, U, R, D};
    const struct adam a = {rate, beta1, beta2, root, eps};
    const int64_t STRIP = 256;
    sum_pieces(&f, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t first = 0; first < M; first += STRIP) {
        float *g = malloc(D * sizeof(float)), *zero = calloc(D, sizeof(float));
        int64_t low = 0, high = U;  // the first of the sorted rows in this strip
        while (low < high) {
            int64_t middle = (low + high) / 2;
            if (row[middle] < first) low = middle + 1;
            else high = middle;
        }
        for (int64_t r = first, u = low; r < M && r < first + STRIP; r++) {
            const int has = u < U && row[u] == r;
            if (seen && !seen[r]) continue;
            if (has) row_gradient(&f, u++, g);
            NAME(update)(w, m, v, has ? g : zero, r, r + AHEAD < M ? r + AHEAD : r, D, by_row, keep, a);
        }
        free(g);
        free(zero);
    }
    free(f.pieces);
}
#endif
