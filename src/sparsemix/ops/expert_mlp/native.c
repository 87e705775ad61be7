// Feed-forward experts on picked tokens, y_n = sum over picks r of n of gate_r down_e act(first_e x_n), and backward
// from the pre-activations alone. The products are in gemm.h and gemm_grads.h, those of bf16 by pairs in pairs.h;
// `kind` 0 relu, 1 silu, 2 gelu, 3 gelu by tanh; `gated`: act(gate) up.
#include "activations.h"
#include "gemm_grads.h"
#include "pairs.h"

// rows[r] = down_e act(first_e token of r); pre[r] = first_e token of r, unless pre is NULL.
static void wide_forward(float *rows, void *pre, const void *tokens, const int64_t *ids, Experts m, int64_t threads) {
    int64_t found, low = m.low, D = m.D, F = m.F, both = (1 + m.gated) * F;
    Block *blocks = blocks_of(m.counts, m.E, BLOCK, &found);
#pragma omp parallel num_threads(threads)
    {
        float *x = floats(BLOCK * D), *h = floats(BLOCK * both), *wide = floats(2 * MR * (D > F ? D : F));
        float *hidden = floats(BLOCK * F);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < found; task++) {
            Block b = blocks[task];
            panels_of(x, tokens, ids, b.start, b.rows, D, D, low);
            turned_product(h, NR * both, at(m.first, b.expert * both * D, low), D, both, D, x, b.rows, wide, low);
            if (pre) rows_of(at(pre, b.start * both, low), both, h, NR * both, b.rows, both, low);
            for (int64_t t = 0; t < b.rows; t += NR) {
                int64_t width = vectors_of(b.rows - t) * W;
                const float *gate = h + t * both;
                hide(m.kind, hidden + t * F, gate, m.gated ? gate + F * width : NULL, F * width);
            }
            // The tokens were read for the last time: their panels take the result.
            turned_product(x, NR * D, at(m.down, b.expert * D * F, low), F, D, F, hidden, b.rows, wide, low);
            rows_of(rows + b.start * D, D, x, NR * D, b.rows, D, 0);
        }
        free(x), free(h), free(wide), free(hidden);
    }
    free(blocks);
}

// From dy and pre: d_pre (padded rows of (1 + gated) wide), hidden times gate (padded rows of wide), d_gates, and unless
// rows is NULL rows[r] = the gradient of r's token; `wide` is F filled up to whole vectors.
static void wide_backward(float *rows, float *d_pre, float *hidden, float *d_gates, const void *dy, const void *pre,
                          const int64_t *ids, const float *gates, Experts m, int64_t threads) {
    int64_t found, low = m.low, gated = m.gated, D = m.D, F = m.F, both = (1 + gated) * F;
    int64_t wide_F = whole(F, W), wide_both = (1 + gated) * wide_F;
    Block *blocks = blocks_of(m.counts, m.E, BLOCK, &found);
#pragma omp parallel num_threads(threads)
    {
        float *g = floats(BLOCK * D), *grad = floats(BLOCK * wide_F), *wide = floats(NR * (D > both ? D : both));
        float *edge = floats(BLOCK * NR);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < found; task++) {
            Block b = blocks[task];
            const char *first = at(m.first, b.expert * both * D, low), *down = at(m.down, b.expert * D * F, low);
            for (int64_t t = 0; t < b.rows; t++) widen(g + t * D, row_of(dy, ids, b.start + t, D, low), D, low);
            memset(grad, 0, b.rows * wide_F * 4);
            straight_product(grad, wide_F, 0, g, D, b.rows, down, F, D, F, wide, edge, low);
            float *d = d_pre + b.start * wide_both;
            for (int64_t t = 0; t < b.rows; t++) {
                int64_t r = b.start + t;
                float *row = d + t * wide_both;
                for (int64_t part = 0; part <= gated; part++) {
                    widen(row + part * wide_F, at(pre, r * both + part * F, low), F, low);
                    memset(row + part * wide_F + F, 0, (wide_F - F) * 4);
                }
                d_gates[r] = unhide(m.kind, row, hidden + r * wide_F, grad + t * wide_F, gates[r], gated, wide_F);
                // Close the gap between gate and up.
                if (gated && wide_F != F) memmove(row + F, row + wide_F, F * 4);
            }
            float *to = rows + b.start * D;
            if (rows) straight_product(to, D, 0, d, wide_both, b.rows, first, D, both, D, wide, edge, low);
        }
        free(g), free(grad), free(wide), free(edge);
    }
    free(blocks);
}

#define NEXT 8  // picks by which a row is asked for ahead of its turn

// y[n] = sum over the first `used` picks r of token n, in order, of gates[r] rows[r]; without gates of rows[r].
// Rows are bf16 or not (`low_rows`), y is bf16 or not.
static void combine(void *y, const void *rows, int low_rows, const float *gates, const int64_t *ids, int64_t used,
                    int64_t N, int64_t D, int low, int64_t threads) {
    int64_t *ends = calloc(N + 1, 8), *picks = malloc(used * 8 + 8);
    for (int64_t r = 0; r < used; r++) ends[ids[r] + 1]++;
    for (int64_t n = 0; n < N; n++) ends[n + 1] += ends[n];
    for (int64_t r = 0; r < used; r++) picks[ends[ids[r]]++] = r;  // ends[n] moves from the first pick to past the last
#pragma omp parallel num_threads(threads)
    {
        float *sum = floats(D);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            memset(sum, 0, D * 4);
            for (int64_t i = n ? ends[n - 1] : 0; i < ends[n]; i++) {
                if (i + NEXT < used) prefetch(at(rows, picks[i + NEXT] * D, low_rows), D * (low_rows ? 2 : 4));
                const float *row = (const float *)at(rows, picks[i] * D, low_rows), g = gates ? gates[picks[i]] : 1;
                const bf16 *low_row = (const bf16 *)row;
                int64_t j = 0;
                for (; j + W <= D; j += W) {
                    vf x = low_rows ? load_bf16(low_row + j) : load_f32(row + j);
                    store_f32(sum + j, load_f32(sum + j) + splat(g) * x);
                }
                for (; j < D; j++) sum[j] += g * (low_rows ? one_bf16(low_row + j) : row[j]);
            }
            narrow(at(y, n * D, low), sum, D, low);
        }
        free(sum);
    }
    free(ends), free(picks);
}

static int64_t rows_used(const int64_t *counts, int64_t E) {
    int64_t used = 0;
    for (int64_t e = 0; e < E; e++) used += counts[e];
    return used;
}

// y [N, D] from tokens [N, D] and picks that are sorted by expert; pre [picks, (1 + gated) F] unless it is NULL.
void forward(void *y, void *pre, const void *tokens, const int64_t *ids, const float *gates, const int64_t *counts,
             const void *first, const void *down, int64_t N, int64_t E, int64_t D, int64_t F, int64_t kind,
             int64_t gated, int64_t low, int64_t threads) {
    Experts m = {first, down, counts, E, D, F, gated, kind, low};
    int64_t used = rows_used(counts, E), low_rows = low && HAS_PAIRS;
    void *rows = scratch(used * D * (low_rows ? 2 : 4));
    if (pre) huge_pages(pre, used * (1 + gated) * F * (low ? 2 : 4));
#if HAS_PAIRS
    if (low) pair_forward(rows, pre, tokens, ids, m, threads);
#endif
    if (!low_rows) wide_forward(rows, pre, tokens, ids, m, threads);
    combine(y, rows, low_rows, gates, ids, used, N, D, low, threads);
    free(rows);
}

// d_first[e, f, d] = sum_r d_pre[r, f] x[r, d] and d_down[e, d, f] = sum_r dy[r, d] hidden[r, f], unless they are NULL.
static void weights(void *d_first, void *d_down, const void *d_pre, const void *hidden, const void *tokens,
                    const void *dy, const int64_t *ids, Experts m, int64_t threads) {
    int64_t D = m.D, F = m.F, both = (1 + m.gated) * F, wide_F = whole(F, W), low = m.low;
    Rows x = {tokens, ids, D, low}, g = {dy, ids, D, low};
#if HAS_PAIRS
    if (low) {
        Rows d = {d_pre, NULL, 2 * pair_pitch(both), 1}, h = {hidden, NULL, 2 * pair_pitch(F), 1};
        if (d_first) pair_weight_grads(d_first, d, both, x, D, m.counts, m.E, threads);
        if (d_down) pair_weight_grads(d_down, g, D, h, F, m.counts, m.E, threads);
        return;
    }
#endif
    Rows d = {d_pre, NULL, (1 + m.gated) * wide_F, 0}, h = {hidden, NULL, wide_F, 0};
    if (d_first) weight_grads(d_first, low, d, both, x, D, m.counts, m.E, threads);
    if (d_down) weight_grads(d_down, low, g, D, h, F, m.counts, m.E, threads);
}

// The gradients of all but the last picks, which no expert runs; of tokens, first and down unless they are NULL.
void backward(void *d_tokens, float *d_gates, void *d_first, void *d_down, const void *dy, const void *pre,
              const void *tokens, const int64_t *ids, const float *gates, const int64_t *counts, const void *first,
              const void *down, int64_t N, int64_t E, int64_t D, int64_t F, int64_t kind, int64_t gated, int64_t low,
              int64_t threads) {
    Experts m = {first, down, counts, E, D, F, gated, kind, low};
    int64_t used = rows_used(counts, E), low_rows = low && HAS_PAIRS;
    int64_t wide_F = whole(F, W), wide_both = (1 + gated) * wide_F;
#if HAS_PAIRS
    if (low) wide_F = pair_pitch(F), wide_both = pair_pitch((1 + gated) * F);
#endif
    void *rows = d_tokens ? scratch(used * D * (low_rows ? 2 : 4)) : NULL;
    void *hidden = scratch(used * wide_F * 4), *d_pre = scratch(used * wide_both * 4);
#if HAS_PAIRS
    if (low) pair_backward(rows, d_pre, hidden, d_gates, dy, pre, ids, gates, m, threads);
#endif
    if (!low_rows) wide_backward(rows, d_pre, hidden, d_gates, dy, pre, ids, gates, m, threads);
    if (d_tokens) combine(d_tokens, rows, low_rows, NULL, ids, used, N, D, low, threads);
    weights(d_first, d_down, d_pre, hidden, tokens, dy, ids, m, threads);
    free(rows), free(hidden), free(d_pre);
}
