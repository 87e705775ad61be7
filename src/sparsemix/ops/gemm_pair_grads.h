// Weight gradients of every expert in bf16, on the tile of gemm_pairs.h: pairs are neighbouring rows.
#pragma once
#include "gemm_grads.h"
#include "gemm_pairs.h"

#if HAS_PAIRS
#define PAIR_DEPTH 512  // rows that are packed at a time
#define PAIR_SLAB 256   // most columns of g of a task: all columns of x are packed anew in each
#define PAIR_REACH 256  // columns of x at a time, so that sums stay in the second cache

// As weight_grad_slab, rows of bf16. `left` holds DEPTH / 2 SLAB words, `right` DEPTH / 2 32, `sums` SLAB REACH floats.
static void pair_grad_slab(char *dw, Rows g, int64_t f0, int64_t f, Rows x, int64_t D, int64_t start, int64_t n,
                           pair *left, pair *right, float *sums) {
    for (int64_t d0 = 0; d0 < D; d0 += PAIR_REACH) {
        int64_t d = min_of(PAIR_REACH, D - d0);
        if (!n) memset(sums, 0, f * PAIR_REACH * 4);
        for (int64_t r0 = 0; r0 < n; r0 += PAIR_DEPTH) {
            int64_t rows = min_of(PAIR_DEPTH, n - r0), P = (rows + 1) / 2;
            for (int64_t i = 0; i < f; i += 32)
                weave(left + i, PAIR_SLAB, g.x, g.ids, start + r0, rows, g.stride, f0 + i, min_of(32, f - i), 64);
            for (int64_t j = 0; j < d; j += 32) {
                int64_t columns = min_of(32, d - j);
                Into to = {(char *)(sums + j), PAIR_REACH, 0, r0 > 0};
                weave(right, vectors_of(columns) * W, x.x, x.ids, start + r0, rows, x.stride, d0 + j, columns, 64);
                pair_strip(f, columns, P, left, 1, PAIR_SLAB, right, to);
            }
        }
        for (int64_t i = 0; i < f; i++)
            for (int64_t j = 0; j < d; j += W)
                put_low(at(dw, (f0 + i) * D + d0 + j, 1), load_f32(sums + i * PAIR_REACH + j), first_lanes(d - j));
    }
}

static void pair_weight_grads(void *dw, Rows g, int64_t F, Rows x, int64_t D, const int64_t *counts, int64_t E,
                              int64_t threads) {
    int64_t *starts = malloc((E + 1) * 8), slab = PAIR_SLAB, slabs = (F + slab - 1) / slab;
    // Few experts: smaller tasks, so that no thread is without one.
    for (; slab > 32 && E * slabs < 4 * threads; slabs = (F + slab - 1) / slab) slab /= 2;
    starts[0] = 0;
    for (int64_t e = 0; e < E; e++) starts[e + 1] = starts[e] + counts[e];
    huge_pages(dw, E * F * D * 2);
#pragma omp parallel num_threads(threads)
    {
        pair *left = pairs(PAIR_DEPTH / 2 * PAIR_SLAB), *right = pairs(PAIR_DEPTH / 2 * 32);
        float *sums = floats(PAIR_SLAB * PAIR_REACH);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < E * slabs; task++) {
            int64_t e = task / slabs, f0 = task % slabs * slab;
            pair_grad_slab(at(dw, e * F * D, 1), g, f0, min_of(slab, F - f0), x, D, starts[e], counts[e], left,
                           right, sums);
        }
        free(left), free(right), free(sums);
    }
    free(starts);
}
#endif
