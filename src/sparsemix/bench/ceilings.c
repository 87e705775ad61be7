// Reading memory and nothing else: what no kernel that reads the same bytes can beat.
#include "native.h"

// Rows read side by side, so that their misses are under way together. Asking for whole rows ahead is slower: all their
// lines wait for one page to be found.
#define SIDE 8

// out[thread] = sum of a share of p, so that no read can be left out.
void read_sequential(const float *p, float *out, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < threads; t++) {
        int64_t from = n * t / threads, to = n * (t + 1) / threads, i = from;
        vf a = {0}, b = {0}, c = {0}, d = {0};
        for (; i + 4 * W <= to; i += 4 * W) {
            a += load_f32(p + i);
            b += load_f32(p + i + W);
            c += load_f32(p + i + 2 * W);
            d += load_f32(p + i + 3 * W);
        }
        float rest = 0;
        for (; i < to; i++) rest += p[i];
        out[t] = lane_sum((a + b) + (c + d)) + rest;
    }
}

static inline __attribute__((always_inline)) void read_some(const float **row, const float **next, float *out, int64_t D,
                                                            const int count) {
    vf sum[SIDE];
    for (int q = 0; q < count; q++) sum[q] = splat(0);
    int64_t d = 0;
    for (; d + W <= D; d += W) {
        if (d % 16 == 0)
            for (int q = 0; q < count; q++) __builtin_prefetch(next[q] + d);
        for (int q = 0; q < count; q++) sum[q] += load_f32(row[q] + d);
    }
    for (int q = 0; q < count; q++) {
        out[q] = lane_sum(sum[q]);
        for (int64_t e = d; e < D; e++) out[q] += row[q][e];
    }
}

// out[r] = sum of the row ids[r] of a table of D columns.
void read_rows(const float *table, const int64_t *ids, float *out, int64_t R, int64_t D, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < R; r += SIDE) {
        const float *row[SIDE], *next[SIDE];
        for (int q = 0; q < SIDE && r + q < R; q++) {
            row[q] = table + ids[r + q] * D;
            next[q] = r + SIDE + q < R ? table + ids[r + SIDE + q] * D : row[q];
        }
        if (r + SIDE <= R)
            read_some(row, next, out + r, D, SIDE);
        else
            for (int q = 0; r + q < R; q++) read_some(row + q, next + q, out + r + q, D, 1);
    }
}
