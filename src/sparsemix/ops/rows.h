// Products with rows of a table that are looked up. Included once per element type: ROW is the type, OF(name) the name
// for it.
//
// Rows lie anywhere in a table that is larger than the caches. SIDE of them are read side by side, so that their misses
// are under way together, and with each of their lines the same line of the SIDE rows after them is asked for. Asking
// for whole rows at once is slower than not asking: all their lines wait for one page to be found.
// Sums are fp32, in the same order whatever the number of threads.
#ifndef SIDE
#define SIDE 8
#define STRIP 1024  // columns that are summed at a time
#define INLINE static inline __attribute__((always_inline))

// Part t of T nearly equal parts of `total`, in whole grains, begins here.
static inline int64_t part(int64_t total, int64_t grain, int64_t t, int64_t T) {
    int64_t at = (total + grain - 1) / grain * t / T * grain;
    return at < total ? at : total;
}
#endif

// Rows ids[0], ..., ids[count - 1] of a table.
typedef struct {
    const ROW *table;
    const int64_t *ids;
    int64_t count;
} OF(picks);

// The first SIDE rows that are read after pick p and its group: picks of `a`, then of `then`, then nothing new.
INLINE void OF(ahead)(const ROW **next, OF(picks) a, OF(picks) then, int64_t p, int64_t D, const int count) {
    for (int q = 0; q < count; q++) {
        int64_t i = p + SIDE + q;
        if (i < a.count)
            next[q] = a.table + a.ids[i] * D;
        else if (i - a.count < then.count)
            next[q] = then.table + then.ids[i - a.count] * D;
        else
            next[q] = a.table + a.ids[p] * D;
    }
}

// The lines of the next rows that begin at columns d to d + 2 W.
INLINE void OF(ask)(const ROW **next, int64_t d, const int count) {
    const int64_t LINE = 64 / sizeof(ROW);
    for (int64_t c = d; c < d + 2 * W; c += LINE)
        for (int q = 0; q < count && c % LINE == 0; q++) __builtin_prefetch(next[q] + c);
}

INLINE void OF(dots)(const ROW *x, OF(picks) a, OF(picks) then, int64_t p, int64_t D, float *z, const int count) {
    const ROW *row[SIDE], *next[SIDE];
    vf sum[SIDE];
    OF(ahead)(next, a, then, p, D, count);
    for (int q = 0; q < count; q++) row[q] = a.table + a.ids[p + q] * D, sum[q] = splat(0);
    int64_t d = 0;
    for (; d + 2 * W <= D; d += 2 * W) {
        OF(ask)(next, d, count);
        vf x_a, x_b, a, b;
        OF(load_pair)(x + d, &x_a, &x_b);
        for (int q = 0; q < count; q++) {
            OF(load_pair)(row[q] + d, &a, &b);
            sum[q] += x_a * a, sum[q] += x_b * b;
        }
    }
    for (; d + W <= D; d += W) {
        OF(ask)(next, d, count);
        for (int q = 0; q < count; q++) sum[q] += OF(load)(x + d) * OF(load)(row[q] + d);
    }
    for (int q = 0; q < count; q++) {
        z[q] = lane_sum(sum[q]);
        for (int64_t e = d; e < D; e++) z[q] += OF(one)(x + e) * OF(one)(row[q] + e);
    }
}

// z_p = <x, row p> for the picks from `p` to `stop`.
static inline void OF(dot_picks)(const ROW *x, OF(picks) a, OF(picks) then, int64_t p, int64_t stop, int64_t D, float *z) {
    for (int64_t left; (left = stop - p) > 0; p += left >= SIDE ? SIDE : left >= 4 ? 4 : 1) {
        if (left >= SIDE)
            OF(dots)(x, a, then, p, D, z + p, SIDE);
        else if (left >= 4)
            OF(dots)(x, a, then, p, D, z + p, 4);
        else
            OF(dots)(x, a, then, p, D, z + p, 1);
    }
}

INLINE void OF(adds)(float *y, OF(picks) a, OF(picks) then, int64_t p, int64_t D, int64_t width, const float *coef,
                     const int count) {
    const ROW *row[SIDE], *next[SIDE];
    OF(ahead)(next, a, then, p, D, count);
    for (int q = 0; q < count; q++) row[q] = a.table + a.ids[p + q] * D;
    int64_t d = 0;
    for (; d + 2 * W <= width; d += 2 * W) {
        OF(ask)(next, d, count);
        vf sum = load_f32(y + d), other = load_f32(y + d + W), a, b;
        for (int q = 0; q < count; q++) {
            OF(load_pair)(row[q] + d, &a, &b);
            sum += splat(coef[q]) * a, other += splat(coef[q]) * b;
        }
        store_f32(y + d, sum), store_f32(y + d + W, other);
    }
    for (; d + W <= width; d += W) {
        OF(ask)(next, d, count);
        vf sum = load_f32(y + d);
        for (int q = 0; q < count; q++) sum += splat(coef[q]) * OF(load)(row[q] + d);
        store_f32(y + d, sum);
    }
    for (; d < width; d++)
        for (int q = 0; q < count; q++) y[d] += coef[q] * OF(one)(row[q] + d);
}

// y = sum over the first R picks of coef_r row r, columns `from` to `stop`.
static inline void OF(mix_picks)(const float *coef, OF(picks) a, OF(picks) then, int64_t R, int64_t from, int64_t stop,
                          int64_t D, ROW *y) {
    float sum[STRIP];
    for (int64_t width; from < stop; from += width) {
        width = stop - from < STRIP ? stop - from : STRIP;
        OF(picks) here = {a.table + from, a.ids, a.count};
        memset(sum, 0, sizeof *sum * width);
        int64_t r = 0;
        for (int64_t left; (left = R - r) > 0; r += left >= SIDE ? SIDE : left >= 4 ? 4 : 1) {
            if (left >= SIDE)
                OF(adds)(sum, here, then, r, D, width, coef + r, SIDE);
            else if (left >= 4)
                OF(adds)(sum, here, then, r, D, width, coef + r, 4);
            else
                OF(adds)(sum, here, then, r, D, width, coef + r, 1);
        }
        int64_t d = 0;
        for (; d + 2 * W <= width; d += 2 * W) OF(store_pair)(y + from + d, load_f32(sum + d), load_f32(sum + d + W));
        for (; d + W <= width; d += W) OF(store)(y + from + d, load_f32(sum + d));
        for (; d < width; d++) OF(put)(y + from + d, sum[d]);
    }
}

// z_nr = <x_n, table[ids_nr]> for the picks from `p` to `stop`, counted over tokens.
static inline void OF(dot_range)(const ROW *x, const int64_t *ids, const ROW *table, int64_t R, int64_t D, int64_t p,
                          int64_t stop, float *z) {
    OF(picks) all = {table, ids, stop}, none = {table, ids, 0};
    for (int64_t end; p < stop; p = end) {
        end = (p / R + 1) * R < stop ? (p / R + 1) * R : stop;
        OF(dot_picks)(x + p / R * D, all, none, p, end, D, z);
    }
}

// y_n = sum_r coef_nr table[ids_nr] for the elements of y from `at` to `stop`, counted over tokens.
static inline void OF(mix_range)(const float *coef, const int64_t *ids, const ROW *table, int64_t R, int64_t D, int64_t at,
                          int64_t stop, ROW *y) {
    OF(picks) none = {table, ids, 0};
    for (int64_t width; at < stop; at += width) {
        int64_t n = at / D, d = at % D, tokens = (stop - 1) / D + 1 - n;
        width = D - d < stop - at ? D - d : stop - at;
        OF(picks) mine = {table, ids + n * R, tokens * R};
        OF(mix_picks)(coef + n * R, mine, none, R, d, d + width, D, y + n * D);
    }
}
