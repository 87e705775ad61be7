// Feed-forward experts on picked tokens, y_n = sum over picks r of n of gate_r down_e act(first_e x_n), and backward
// from the pre-activations alone. The products are in gemm.h and gemm_grads.h; `kind` 0 relu, 1 silu, 2 gelu,
// 3 gelu by tanh; `gated`: act(gate) up.
#include "gemm_grads.h"

static inline vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

// e^x, clamped where fp32 ends: 2^n times a Taylor series of the rest, |rest| <= log(2) / 2.
static inline vf exp_of(vf x) {
    x = choose(x > splat(88.0f), splat(88.0f), choose(x < splat(-87.0f), splat(-87.0f), x));
    vf shifted = x * splat(1.44269504f) + splat(12582912.0f);  // 1.5 * 2^23: the low bits now hold round(x / log 2)
    vf n = shifted - splat(12582912.0f), r = x - n * splat(0.693145752f) - n * splat(1.42860677e-6f);
    vf p = splat(1.0f / 5040);
    p = p * r + splat(1.0f / 720), p = p * r + splat(1.0f / 120), p = p * r + splat(1.0f / 24);
    p = p * r + splat(1.0f / 6), p = p * r + splat(0.5f), p = p * r + splat(1.0f), p = p * r + splat(1.0f);
    return (vf)((vi)p + ((vi)shifted << 23));
}

// The normal distribution's share below x: e^(-x^2/2) times a polynomial in 1 / (1 + 0.3 |x|), fitted here to a relative
// error of 1.2e-7; `bell` becomes e^(-x^2/2).
static inline vf share_below(vf x, vf *bell) {
    static const float c[] = {0.036194872f, -0.15937838f, 0.21011852f, -0.05716747f,
                              0.13041651f,  0.09934711f,  0.12084553f, 0.11962327f};
    vf z = choose(x < splat(0), splat(0) - x, x), t = splat(1) / (splat(1) + splat(0.3f) * z), p = splat(c[0]);
    for (int i = 1; i < 8; i++) p = p * t + splat(c[i]);
    *bell = exp_of(splat(-0.5f) * z * z);
    vf below = *bell * p * t;
    return choose(x < splat(0), below, splat(1) - below);
}

// act(x), and its slope.
static inline __attribute__((always_inline)) vf act(const int kind, vf x, vf *slope) {
    if (kind == 0) {
        *slope = choose(x > splat(0), splat(1), splat(0));
        return choose(x < splat(0), splat(0), x);
    }
    if (kind == 1) {
        vf s = splat(1) / (splat(1) + exp_of(splat(0) - x));
        *slope = s * (splat(1) + x * (splat(1) - s));
        return x * s;
    }
    if (kind == 3) {  // x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3): (1 + tanh z) / 2 = sigmoid(2 z)
        // From 15 on the sigmoid is 0 or 1 in fp32; the cube of what is larger would not be finite.
        vf c = choose(x > splat(15), splat(15), choose(x < splat(-15), splat(-15), x)), square = c * c;
        vf two_z = splat(1.59576912f) * c * (splat(1) + splat(0.044715f) * square);
        vf s = choose(x > splat(-15), splat(1) / (splat(1) + exp_of(splat(0) - two_z)), splat(0));
        *slope = s + c * s * (splat(1) - s) * splat(1.59576912f) * (splat(1) + splat(0.134145f) * square);
        return x * s;
    }
    vf bell, below = share_below(x, &bell);
    *slope = below + x * bell * splat(0.398942280f);
    return x * below;
}

#define EACH_KIND(call) \
    if (kind == 0) call(0); \
    else if (kind == 1) call(1); \
    else if (kind == 2) call(2); \
    else call(3);

// n entries, n a multiple of W: hidden = act(gate) up, or act(gate) if `up` is NULL.
static inline __attribute__((always_inline)) void hide_of(const int kind, float *hidden, const float *gate,
                                                          const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += W) {
        vf slope, a = act(kind, load_f32(gate + i), &slope);
        if (up) a *= load_f32(up + i);
        store_f32(hidden + i, a);
    }
}

static void hide(int kind, float *hidden, const float *gate, const float *up, int64_t n) {
#define HIDE(k) hide_of(k, hidden, gate, up, n)
    EACH_KIND(HIDE)
}

// One row backward, n a multiple of W. `pre` holds gate and up, `grad` dL/d(hidden) before the router's gate g:
// pre becomes dL/d(pre), hidden g times the hidden row; out comes <grad, hidden>, the gradient of g.
static inline __attribute__((always_inline)) float unhide_of(const int kind, float *pre, float *hidden,
                                                             const float *grad, float g, int gated, int64_t n) {
    vf dot = splat(0);
    for (int64_t i = 0; i < n; i += W) {
        vf slope, a = act(kind, load_f32(pre + i), &slope), d = load_f32(grad + i);
        vf up = gated ? load_f32(pre + n + i) : splat(1), h = a * up;
        dot += d * h;
        store_f32(hidden + i, splat(g) * h);
        d = splat(g) * d;
        store_f32(pre + i, d * up * slope);
        if (gated) store_f32(pre + n + i, d * a);
    }
    return lane_sum(dot);
}

static float unhide(int kind, float *pre, float *hidden, const float *grad, float g, int gated, int64_t n) {
    float dot = 0;
#define UNHIDE(k) dot = unhide_of(k, pre, hidden, grad, g, gated, n)
    EACH_KIND(UNHIDE)
    return dot;
}

// rows[r] = down_e act(first_e token of r), fp32; pre[r] = first_e token of r, unless pre is NULL.
void forward(float *rows, void *pre, const void *tokens, const int64_t *ids, const int64_t *counts, const void *first,
             const void *down, int64_t E, int64_t D, int64_t F, int64_t kind, int64_t gated, int64_t low,
             int64_t threads) {
    int64_t found, both = (1 + gated) * F;
    Block *blocks = blocks_of(counts, E, BLOCK, &found);
#pragma omp parallel num_threads(threads)
    {
        float *x = floats(BLOCK * D), *h = floats(BLOCK * both), *wide = floats(2 * MR * (D > F ? D : F));
        float *hidden = floats(BLOCK * F);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < found; task++) {
            Block b = blocks[task];
            panels_of(x, tokens, ids, b.start, b.rows, D, D, low);
            turned_product(h, NR * both, at(first, b.expert * both * D, low), D, both, D, x, b.rows, wide, low);
            if (pre) rows_of(at(pre, b.start * both, low), both, h, NR * both, b.rows, both, low);
            for (int64_t t = 0; t < b.rows; t += NR) {
                int64_t width = vectors_of(b.rows - t) * W;
                const float *gate = h + t * both;
                hide(kind, hidden + t * F, gate, gated ? gate + F * width : NULL, F * width);
            }
            // The tokens were read for the last time: their panels take the result.
            turned_product(x, NR * D, at(down, b.expert * D * F, low), F, D, F, hidden, b.rows, wide, low);
            rows_of(rows + b.start * D, D, x, NR * D, b.rows, D, 0);
        }
        free(x), free(h), free(wide), free(hidden);
    }
    free(blocks);
}

// From dy and pre: d_pre (padded rows of (1 + gated) wide), hidden times gate (padded rows of wide), d_gates, and
// rows[r] = the gradient of r's token, fp32; `wide` is F filled up to whole vectors.
void backward(float *rows, float *d_pre, float *hidden, float *d_gates, const void *dy, const void *pre,
              const int64_t *ids, const float *gates, const int64_t *counts, const void *first, const void *down,
              int64_t E, int64_t D, int64_t F, int64_t kind, int64_t gated, int64_t low, int64_t threads) {
    int64_t found, both = (1 + gated) * F, wide_F = whole(F, W), wide_both = (1 + gated) * wide_F;
    Block *blocks = blocks_of(counts, E, BLOCK, &found);
#pragma omp parallel num_threads(threads)
    {
        float *g = floats(BLOCK * D), *grad = floats(BLOCK * wide_F), *wide = floats(NR * (D > both ? D : both));
        float *edge = floats(BLOCK * NR);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < found; task++) {
            Block b = blocks[task];
            for (int64_t t = 0; t < b.rows; t++) widen(g + t * D, row_of(dy, ids, b.start + t, D, low), D, low);
            memset(grad, 0, b.rows * wide_F * 4);
            straight_product(grad, wide_F, 0, g, D, b.rows, at(down, b.expert * D * F, low), F, D, F, wide, edge, low);
            float *d = d_pre + b.start * wide_both;
            for (int64_t t = 0; t < b.rows; t++) {
                int64_t r = b.start + t;
                float *row = d + t * wide_both;
                for (int64_t part = 0; part <= gated; part++) {
                    widen(row + part * wide_F, at(pre, r * both + part * F, low), F, low);
                    memset(row + part * wide_F + F, 0, (wide_F - F) * 4);
                }
                d_gates[r] = unhide(kind, row, hidden + r * wide_F, grad + t * wide_F, gates[r], gated, wide_F);
                // Close the gap between gate and up.
                if (gated && wide_F != F) memmove(row + F, row + wide_F, F * 4);
            }
            straight_product(rows + b.start * D, D, 0, d, wide_both, b.rows, at(first, b.expert * both * D, low), D, both,
                             D, wide, edge, low);
        }
        free(g), free(grad), free(wide), free(edge);
    }
    free(blocks);
}

// d_first[e, f, d] = sum_r d_pre[r, f] x[r, d] and d_down[e, d, f] = sum_r dy[r, d] hidden[r, f].
void weights(void *d_first, void *d_down, const float *d_pre, const float *hidden, const void *tokens, const void *dy,
             const int64_t *ids, const int64_t *counts, int64_t E, int64_t D, int64_t F, int64_t gated, int64_t low,
             int64_t threads) {
    int64_t both = (1 + gated) * F, wide_F = whole(F, W);
    Rows x = {tokens, ids, D, low}, g = {dy, ids, D, low};
    Rows d = {d_pre, NULL, (1 + gated) * wide_F, 0}, h = {hidden, NULL, wide_F, 0};
    if (d_first) weight_grads(d_first, low, d, both, x, D, counts, E, threads);
    if (d_down) weight_grads(d_down, low, g, D, h, F, counts, E, threads);
}

// y[n] = sum over the first `used` picks r of token n, in order, of gates[r] rows[r]; without gates of rows[r].
void combine(void *y, const float *rows, const float *gates, const int64_t *ids, int64_t used, int64_t N, int64_t D,
             int64_t low, int64_t threads) {
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
                const float *row = rows + picks[i] * D, g = gates ? gates[picks[i]] : 1;
                int64_t j = 0;
                for (; j + W <= D; j += W) store_f32(sum + j, load_f32(sum + j) + splat(g) * load_f32(row + j));
                for (; j < D; j++) sum[j] += g * row[j];
            }
            narrow(at(y, n * D, low), sum, D, low);
        }
        free(sum);
    }
    free(ends), free(picks);
}
