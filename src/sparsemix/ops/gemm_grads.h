// Weight gradients of every expert, on the tiles of gemm.h.
#pragma once
#include "gemm.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

// Large results are written once, just after they were allocated: ask for huge pages, which fault 512 times less.
static inline void huge_pages(void *x, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const int64_t page = 2 << 20;
    char *from = (char *)whole((int64_t)(intptr_t)x, page), *to = (char *)((intptr_t)((char *)x + bytes) / page * page);
    if (to - from >= 4 * page) madvise(from, to - from, MADV_HUGEPAGE);
#endif
}

// Memory that is written before it is read, free() ends it.
static inline void *scratch(int64_t bytes) {
    const int64_t page = 2 << 20, unit = bytes < 4 * page ? 64 : page;
    void *x = aligned_alloc(unit, whole(bytes + 1, unit));
    huge_pages(x, whole(bytes + 1, unit));
    return x;
}

// Weight gradients of every expert, dw[e, f, d] = sum over its rows r of g[r, f] x[r, d], 0 without rows. Rows of g
// and x may be picked by ids. Tasks are (expert, SLAB of F); sums run over rows in order, DEPTH at a time.
#define SLAB 96
#define REACH 512  // columns of x at a time, so that what is packed stays in the second cache

typedef struct {
    const void *x;
    const int64_t *ids;
    int64_t stride;
    int low;
} Rows;

// The part of one task: f columns of g from f0 on, all D columns of x. The buffers hold DEPTH SLAB, DEPTH REACH and
// SLAB REACH floats.
static void weight_grad_slab(char *dw, int low, Rows g, int64_t f0, int64_t f, Rows x, int64_t D, int64_t start,
                             int64_t n, float *left, float *right, float *sums) {
    for (int64_t d0 = 0; d0 < D; d0 += REACH) {
        int64_t d = min_of(REACH, D - d0), wide = whole(d, W);
        int direct = !low && d == wide;
        float *c = direct ? (float *)dw + f0 * D + d0 : sums;
        int64_t cr = direct ? D : wide;
        if (!n)
            for (int64_t i = 0; i < f; i++) memset(c + i * cr, 0, wide * 4);
        for (int64_t r0 = 0; r0 < n; r0 += DEPTH) {
            int64_t rows = min_of(DEPTH, n - r0);
            for (int64_t r = 0; r < rows; r++) {
                widen(left + r * SLAB, row_of(g.x, g.ids, start + r0 + r, g.stride, g.low) + f0 * (g.low ? 2 : 4), f, g.low);
                const char *row = row_of(x.x, x.ids, start + r0 + r, x.stride, x.low);
                for (int64_t j = 0; j < d; j += NR) {
                    int64_t m = min_of(NR, d - j), v = vectors_of(m);
                    float *to = right + j * rows + r * v * W;
                    if (!x.low && m == NR) {  // in two vectors, not by a call for 64 bytes
                        const float *from = (const float *)row + d0 + j;
                        store_f32(to, load_f32(from)), store_f32(to + W, load_f32(from + W));
                        continue;
                    }
                    widen(to, row + (d0 + j) * (x.low ? 2 : 4), m, x.low);
                    for (int64_t i = m; i < v * W; i++) to[i] = 0;
                }
            }
            for (int64_t j = 0; j < d; j += NR) {
                int v = vectors_of(d - j);
                strip(f, v, rows, left, 1, SLAB, right + j * rows, v * W, c + j, cr, r0 > 0, (Ahead){0});
            }
        }
        if (!direct)
            for (int64_t i = 0; i < f; i++) narrow(at(dw, (f0 + i) * D + d0, low), sums + i * cr, d, low);
    }
}

static void weight_grads(void *dw, int low, Rows g, int64_t F, Rows x, int64_t D, const int64_t *counts, int64_t E,
                         int64_t threads) {
    int64_t *starts = malloc((E + 1) * 8), slabs = (F + SLAB - 1) / SLAB;
    starts[0] = 0;
    for (int64_t e = 0; e < E; e++) starts[e + 1] = starts[e] + counts[e];
    huge_pages(dw, E * F * D * (low ? 2 : 4));
#pragma omp parallel num_threads(threads)
    {
        float *left = floats(DEPTH * SLAB), *right = floats(DEPTH * REACH), *sums = floats(SLAB * REACH);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < E * slabs; task++) {
            int64_t e = task / slabs, f0 = task % slabs * SLAB;
            weight_grad_slab(at(dw, e * F * D, low), low, g, f0, min_of(SLAB, F - f0), x, D, starts[e], counts[e], left,
                             right, sums);
        }
        free(left), free(right), free(sums);
    }
    free(starts);
}
