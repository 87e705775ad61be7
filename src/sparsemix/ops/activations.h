// The activations of experts, forward and backward: `kind` 0 relu, 1 silu, 2 gelu, 3 gelu by tanh.
#pragma once
#include "native.h"

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
