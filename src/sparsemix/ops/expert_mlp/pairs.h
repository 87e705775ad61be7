// The experts in bf16 where the processor multiplies it: rows in between are bf16, as PyTorch's products leave them, and
// the activation reads what `pre` keeps, so that forward and backward see the same numbers.
#pragma once
#include "activations.h"
#include "gemm_pair_grads.h"

// The experts of a layer: first [E, (1 + gated) F, D], down [E, D, F], and how many rows each has.
typedef struct {
    const void *first, *down;
    const int64_t *counts;
    int64_t E, D, F, gated;
    int kind, low;
} Experts;

#if HAS_PAIRS
// hidden = act(gate) up, or act(gate) if `up` is NULL, for one row; 0 up to a whole vector.
static inline __attribute__((always_inline)) void hide_low_of(const int kind, bf16 *hidden, const bf16 *gate,
                                                              const bf16 *up, int64_t n) {
    for (int64_t i = 0; i < n; i += W) {
        __mmask16 lanes = first_lanes(n - i);
        vf slope, a = act(kind, some_low(gate + i, lanes), &slope);
        if (up) a *= some_low(up + i, lanes);
        put_low(hidden + i, a, 0xffff);
    }
}

static void hide_low(int kind, bf16 *hidden, const bf16 *gate, const bf16 *up, int64_t n) {
#define HIDE_LOW(k) hide_low_of(k, hidden, gate, up, n)
    EACH_KIND(HIDE_LOW)
}

// One row backward. `hidden` holds dL/d(hidden) before the router's gate g and becomes g times the hidden row; d_pre
// becomes dL/d(pre); out comes the gradient of g.
static inline __attribute__((always_inline)) float unhide_low_of(const int kind, bf16 *d_pre, bf16 *hidden,
                                                                 const bf16 *pre, float g, int gated, int64_t n) {
    vf dot = splat(0);
    for (int64_t i = 0; i < n; i += W) {
        __mmask16 lanes = first_lanes(n - i);
        vf slope, a = act(kind, some_low(pre + i, lanes), &slope), d = some_low(hidden + i, lanes);
        vf up = gated ? some_low(pre + n + i, lanes) : splat(1), h = a * up;
        dot += d * h;
        put_low(hidden + i, splat(g) * h, lanes);
        d = splat(g) * d;
        put_low(d_pre + i, d * up * slope, lanes);
        if (gated) put_low(d_pre + n + i, d * a, lanes);
    }
    return lane_sum(dot);
}

static float unhide_low(int kind, bf16 *d_pre, bf16 *hidden, const bf16 *pre, float g, int gated, int64_t n) {
    float dot = 0;
#define UNHIDE_LOW(k) dot = unhide_low_of(k, d_pre, hidden, pre, g, gated, n)
    EACH_KIND(UNHIDE_LOW)
    if (!gated && n % 2) d_pre[n] = 0;  // the other half of the last pair
    return dot;
}

// As wide_forward, rows in bf16.
static void pair_forward(bf16 *rows, bf16 *pre, const void *tokens, const int64_t *ids, Experts m, int64_t threads) {
    int64_t found, D = m.D, F = m.F, both = (1 + m.gated) * F;
    Block *blocks = pair_blocks(m.counts, m.E, threads, &found);
#pragma omp parallel num_threads(threads)
    {
        pair *x = pairs(PAIR_BLOCK * pair_pitch(D)), *hidden = pairs(PAIR_BLOCK * pair_pitch(F));
        pair *panel = pairs(((D > F ? D : F) + 1) * 16);
        bf16 *aside = pre ? NULL : (bf16 *)pairs(PAIR_BLOCK * (both + 1) / 2);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < found; task++) {
            Block b = blocks[task];
            bf16 *h = pre ? pre + b.start * both : aside;
            Matrix first = {at(m.first, b.expert * both * D, 1), D, 1}, down = {at(m.down, b.expert * D * F, 1), F, 1};
            pair_rows(x, tokens, ids, b.start, b.rows, D, D);
            pair_product((Into){(char *)h, both, 1, 0}, x, pair_pitch(D), b.rows, first, D, both, panel);
            for (int64_t t = 0; t < b.rows; t++) {
                const bf16 *gate = h + t * both;
                hide_low(m.kind, (bf16 *)(hidden + t * pair_pitch(F)), gate, m.gated ? gate + F : NULL, F);
            }
            Into to = {(char *)(rows + b.start * D), D, 1, 0};
            pair_product(to, hidden, pair_pitch(F), b.rows, down, F, D, panel);
        }
        free(x), free(hidden), free(panel), free(aside);
    }
    free(blocks);
}

// As wide_backward, rows in bf16, of d_pre and hidden pair_pitch apart.
static void pair_backward(bf16 *rows, pair *d_pre, pair *hidden, float *d_gates, const void *dy, const bf16 *pre,
                          const int64_t *ids, const float *gates, Experts m, int64_t threads) {
    int64_t found, D = m.D, F = m.F, both = (1 + m.gated) * F, wide_F = pair_pitch(F), wide_both = pair_pitch(both);
    Block *blocks = pair_blocks(m.counts, m.E, threads, &found);
#pragma omp parallel num_threads(threads)
    {
        pair *g = pairs(PAIR_BLOCK * pair_pitch(D)), *panel = pairs(((D > both ? D : both) + 1) * 16);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < found; task++) {
            Block b = blocks[task];
            Matrix first = {at(m.first, b.expert * both * D, 1), D, 0}, down = {at(m.down, b.expert * D * F, 1), F, 0};
            pair *h = hidden + b.start * wide_F, *d = d_pre + b.start * wide_both;
            pair_rows(g, dy, ids, b.start, b.rows, D, D);
            pair_product((Into){(char *)h, 2 * wide_F, 1, 0}, g, pair_pitch(D), b.rows, down, D, F, panel);
            for (int64_t t = 0; t < b.rows; t++) {
                int64_t r = b.start + t;
                d_gates[r] = unhide_low(m.kind, (bf16 *)(d + t * wide_both), (bf16 *)(h + t * wide_F), pre + r * both,
                                        gates[r], m.gated, F);
            }
            Into to = {(char *)(rows + b.start * D), D, 1, 0};
            if (rows) pair_product(to, d, wide_both, b.rows, first, both, D, panel);
        }
        free(g), free(panel);
    }
    free(blocks);
}
#endif
