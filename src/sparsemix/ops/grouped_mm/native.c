// The grouped product and its weight gradient. The products themselves are in gemm.h and gemm_grads.h,
// those of bf16 by pairs in gemm_pairs.h and gemm_pair_grads.h.
#include "gemm_pair_grads.h"

#define SPAN 256  // columns of a task's result

#if HAS_PAIRS
static void pair_products(char *out, const void *x, const char *w, const int64_t *counts, int64_t E, int64_t F, int64_t K,
                          int turned, int64_t threads) {
    int64_t found, spans = (F + SPAN - 1) / SPAN;
    Block *blocks = pair_blocks(counts, E, threads, &found);
#pragma omp parallel num_threads(threads)
    {
        pair *rows = pairs(PAIR_BLOCK * pair_pitch(K)), *panel = pairs((K + 1) * 16);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < found * spans; task++) {
            Block b = blocks[task / spans];
            int64_t f = task % spans * SPAN;
            Matrix part = {at(w, b.expert * F * K + (turned ? f * K : f), 1), turned ? K : F, turned};
            pair_rows(rows, x, NULL, b.start, b.rows, K, K);
            Into to = {at(out, b.start * F + f, 1), F, 1, 0};
            pair_product(to, rows, pair_pitch(K), b.rows, part, K, min_of(SPAN, F - f), panel);
        }
        free(rows), free(panel);
    }
    free(blocks);
}
#endif

// out[r, f] = sum_k w[e(r), f, k] x[r, k], or with `turned` 0 sum_k w[e(r), k, f] x[r, k]; 0 for rows of no expert.
void product(void *out, const void *x, const void *w, const int64_t *counts, int64_t R, int64_t E, int64_t F, int64_t K,
             int64_t turned, int64_t low, int64_t threads) {
    int64_t found, spans = (F + SPAN - 1) / SPAN, used = 0;
    for (int64_t e = 0; e < E; e++) used += counts[e];
    memset(at(out, used * F, low), 0, (R - used) * F * (low ? 2 : 4));
#if HAS_PAIRS
    if (low) {
        pair_products(out, x, w, counts, E, F, K, turned, threads);
        return;
    }
#endif
    Block *blocks = blocks_of(counts, E, BLOCK, &found);
#pragma omp parallel num_threads(threads)
    {
        float *rows = floats(BLOCK * K), *to = floats(BLOCK * SPAN), *wide = floats((turned ? 2 * MR : NR) * K);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < found * spans; task++) {
            Block b = blocks[task / spans];
            int64_t f = task % spans * SPAN, columns = min_of(SPAN, F - f);
            const char *matrix = at(w, b.expert * F * K, low);
            char *result = at(out, b.start * F + f, low);
            if (turned) {
                panels_of(rows, x, NULL, b.start, b.rows, K, K, low);
                turned_product(to, NR * columns, at(matrix, f * K, low), K, columns, K, rows, b.rows, wide, low);
                rows_of(result, F, to, NR * columns, b.rows, columns, low);
            } else {
                widen(rows, at(x, b.start * K, low), b.rows * K, low);
                straight_product(result, F, low, rows, K, b.rows, at(matrix, f, low), F, K, columns, wide, to, low);
            }
        }
        free(rows), free(to), free(wide);
    }
    free(blocks);
}

// dw[e, f, d] = sum over the rows r of expert e of grad[r, f] x[r, d].
void weight_grad(void *dw, const void *grad, const void *x, const int64_t *counts, int64_t E, int64_t F, int64_t D,
                 int64_t low, int64_t threads) {
    Rows g = {grad, NULL, F, low}, rows = {x, NULL, D, low};
#if HAS_PAIRS
    if (low) {
        pair_weight_grads(dw, g, F, rows, D, counts, E, threads);
        return;
    }
#endif
    weight_grads(dw, low, g, F, rows, D, counts, E, threads);
}
