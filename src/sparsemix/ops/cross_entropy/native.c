// nats = log sum exp(row) - row[target], and the row replaced by its gradient share * (softmax(row) - onehot(target)).
#ifndef T
#include "native.h"

// e^x for x <= 0, to 2 units in the last place; 1.6e-38 instead of less. Cephes' polynomial.
static inline vf exp_negative(vf x) {
    vi low = x < -87.0f;
    x = (vf)(((vi)x & ~low) | ((vi)splat(-87.0f) & low));
    vf shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
    vi power = (vi)shifted - (vi)splat(12582912.0f);
    vf n = shifted - 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * (vf)((power + 127) << 23);
}

static inline vf larger(vf a, vf b) {
    vi first = a > b;
    return (vf)(((vi)a & first) | ((vi)b & ~first));
}

// The last vector of a row, filled with -inf; and its first `count` lanes back.
#define PART(T, load)                                         \
    static inline vf part_##T(const T *p, int64_t count) {    \
        vf x = splat(-INFINITY);                              \
        for (int64_t i = 0; i < count; i++) x[i] = load(p + i); \
        return x;                                             \
    }
PART(float, one_f32)
PART(bf16, one_bf16)

#define T float
#define NAME nats_f32
#define LOAD load_f32
#define STORE store_f32
#define PART_OF part_float
#define ONE one_f32
#define PUT put_f32
#include "native.c"
#define T bf16
#define NAME nats_bf16
#define LOAD load_bf16
#define STORE store_bf16
#define PART_OF part_bf16
#define ONE one_bf16
#define PUT put_bf16
#include "native.c"
#else

void NAME(T *logits, const int64_t *targets, const float *share, float *nats, int64_t N, int64_t V, int64_t threads) {
    int64_t whole = V / W * W;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; n++) {
        T *row = logits + n * V;
        int64_t target = targets[n];
        if (target < 0) {
            nats[n] = 0;
            if (share) memset(row, 0, V * sizeof(T));
            continue;
        }
        vf most = PART_OF(row + whole, V - whole);
        for (int64_t v = 0; v < whole; v += W) most = larger(LOAD(row + v), most);
        float top = most[0];
        for (int i = 1; i < W; i++) top = most[i] > top ? most[i] : top;
        // A lane of filling is e^-inf: cut out, since exp_negative gives no zero.
        vf last = exp_negative(PART_OF(row + whole, V - whole) - top), sum = splat(0), more = splat(0);
        for (int64_t i = 0; i < V - whole; i++) sum[i] = last[i];
        int64_t v = 0;
        for (; v + 2 * W <= whole; v += 2 * W) {
            sum += exp_negative(LOAD(row + v) - top);
            more += exp_negative(LOAD(row + v + W) - top);
        }
        if (v < whole) sum += exp_negative(LOAD(row + v) - top);
        float total = lane_sum(sum + more), at_target = ONE(row + target);
        nats[n] = logf(total) - (at_target - top);
        if (!share) continue;
        float factor = *share / total;
        for (v = 0; v < whole; v += W) STORE(row + v, exp_negative(LOAD(row + v) - top) * factor);
        for (; v < V; v++) PUT(row + v, last[v - whole] * factor);
        float p = expf(at_target - top) / total;
        PUT(row + target, *share * (p - 1.0f));
    }
}
#undef T
#undef NAME
#undef LOAD
#undef STORE
#undef PART_OF
#undef ONE
#undef PUT
#endif
