// y_n = sum_r g_nr act(<x_n, w_in[ids_nr]>) w_out[ids_nr], token by token, and the gradients towards x, g and the
// products z. Both passes have one form: products with the rows of one table, something per pick, a sum of the rows of
// the other table. While a token's rows of one table are read, its first rows of the other are asked for.
#ifndef ROW
#include "native.h"

enum { GELU, RELU, SILU };  // as in __init__.py
#define FEW 4  // tokens per thread below which threads share the picks of a token

static inline vf choose(vi where, vf yes, vf no) { return (vf)(((vi)yes & where) | ((vi)no & ~where)); }

// e^x for x <= 0; 0 below the smallest normal number.
static inline vf exp_down(vf x) {
    const vf shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
    vf shifted = x * 1.44269504f + shift, k = shifted - shift;
    vf r = x - k * 0.693145752f - k * 1.42860677e-6f;  // ln 2 in two parts; |r| <= ln(2) / 2
    vf p = ((((r * (1 / 720.0f) + 1 / 120.0f) * r + 1 / 24.0f) * r + 1 / 6.0f) * r + 0.5f) * r * r + r + 1;
    return choose(x < -87.0f, splat(0), (vf)((vi)p + (((vi)shifted - (vi)shift) << 23)));
}

// Phi(z), the normal distribution, and its density. Phi(-a) = e^(-a^2/2) t P(t), t = 1 / (1 + 0.35 a), where P was
// fitted to a relative error of 3e-8.
static inline vf normal(vf z, vf *density) {
    vf a = choose(z < 0, -z, z), e = exp_down(a * a * -0.5f), t = 1 / (1 + 0.35f * a);
    vf p = t * -0.0291459803f + 0.143971696f;
    p = p * t - 0.255713701f;
    p = p * t + 0.159172863f;
    p = p * t - 0.0231084507f;
    p = p * t + 0.105507202f;
    p = p * t + 0.119833127f;
    p = p * t + 0.139861822f;
    p = (p * t + 0.139621407f) * t * e;
    *density = e * 0.398942280f;
    return choose(z < 0, p, 1 - p);
}

// act(z), and its derivative.
static inline vf act(vf z, int64_t kind, vf *slope) {
    if (kind == RELU) {
        *slope = choose(z <= 0, splat(0), splat(1));
        return choose(z < 0, splat(0), z);
    }
    if (kind == GELU) {
        vf density, share = normal(z, &density);
        *slope = share + z * density;
        return z * share;
    }
    vf e = exp_down(choose(z < 0, z, -z)), share = choose(z < 0, e, splat(1)) / (1 + e);
    *slope = share * (1 + z * (1 - share));
    return z * share;
}

// What happens per pick, W of them at a time. Forward: the coefficient g act(z) of a row of w_out. Backward, from
// dot = d(g act(z)): the coefficient d_z of a row of w_in, d_g (in place of dot), and g act(z) again.
typedef struct {
    const float *gates, *z;  // z: backward only
    float *dot, *coef, *hidden;
    int64_t kind;
} per_pick;

static inline void some_picks(per_pick a, int64_t p) {
    vf slope, g = load_f32(a.gates + p), dot = load_f32(a.dot + p);
    vf h = act(a.z ? load_f32(a.z + p) : dot, a.kind, &slope);
    store_f32(a.coef + p, a.z ? dot * g * slope : g * h);
    if (!a.z) return;
    store_f32(a.dot + p, dot * h);
    store_f32(a.hidden + p, g * h);
}

static void picks_between(per_pick a, int64_t p, int64_t stop) {
    for (; p + W <= stop; p += W) some_picks(a, p);
    if (p == stop) return;
    float gates[W] = {0}, z[W] = {0}, dot[W] = {0}, coef[W], hidden[W];
    size_t bytes = sizeof *gates * (stop - p);
    memcpy(gates, a.gates + p, bytes);
    memcpy(dot, a.dot + p, bytes);
    if (a.z) memcpy(z, a.z + p, bytes);
    some_picks((per_pick){gates, a.z ? z : NULL, dot, coef, hidden, a.kind}, 0);
    memcpy(a.coef + p, coef, bytes);
    if (!a.z) return;
    memcpy(a.dot + p, dot, bytes);
    memcpy(a.hidden + p, hidden, bytes);
}

#define ROW float
#define OF(name) name##_f32
#include "native.c"
#undef ROW
#undef OF
#define ROW bf16
#define OF(name) name##_bf16
#include "native.c"
#else
#include "rows.h"

// out_n = sum_r coef_nr second[ids_nr], where coef comes per pick from dot_nr = <x_n, first[ids_nr]>.
static void OF(both)(const ROW *x, const int64_t *ids, const ROW *first, const ROW *second, per_pick each, ROW *out,
                     int64_t N, int64_t R, int64_t D, int64_t threads) {
    if (N < FEW * threads) {
#pragma omp parallel for num_threads(threads)
        for (int64_t t = 0; t < threads; t++) {
            int64_t p = part(N * R, SIDE, t, threads), stop = part(N * R, SIDE, t + 1, threads);
            OF(dot_range)(x, ids, first, R, D, p, stop, each.dot);
            picks_between(each, p, stop);
        }
#pragma omp parallel for num_threads(threads)
        for (int64_t t = 0; t < threads; t++)
            OF(mix_range)(each.coef, ids, second, R, D, part(N * D, 64, t, threads), part(N * D, 64, t + 1, threads),
                          out);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, FEW)
    for (int64_t n = 0; n < N; n++) {
        OF(picks) one = {first, ids + n * R, R}, other = {second, ids + n * R, R};
        OF(picks) later = {first, ids + (n + 1) * R, n + 1 < N ? R : 0};
        OF(dot_picks)(x + n * D, one, other, 0, R, D, each.dot + n * R);
        picks_between(each, n * R, (n + 1) * R);
        OF(mix_picks)(each.coef + n * R, other, later, R, 0, D, D, out + n * D);
    }
}

void OF(forward)(const ROW *x, const int64_t *ids, const float *gates, const ROW *w_in, const ROW *w_out, ROW *y,
                 float *z, float *coef, int64_t N, int64_t R, int64_t D, int64_t kind, int64_t threads) {
    OF(both)(x, ids, w_in, w_out, (per_pick){gates, NULL, z, coef, NULL, kind}, y, N, R, D, threads);
}

void OF(backward)(const ROW *d_y, const int64_t *ids, const float *gates, const float *z, const ROW *w_in,
                  const ROW *w_out, ROW *d_x, float *d_gates, float *d_z, float *hidden, int64_t N, int64_t R,
                  int64_t D, int64_t kind, int64_t threads) {
    OF(both)(d_y, ids, w_out, w_in, (per_pick){gates, z, d_gates, d_z, hidden, kind}, d_x, N, R, D, threads);
}
#endif
