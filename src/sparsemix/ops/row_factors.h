// A table's gradient as factors sorted by row: the sum of a row's picks, hot rows cut into pieces of a fixed size.
#pragma once
#include "native.h"

// Row u has the picks pick[start[u] .. start[u + 1]); pick p stands for coef[p] * vec[p / R], a vector of D numbers.
struct factors {
    const int64_t *row, *start, *pick;
    const float *coef, *vec;
    int64_t U, R, D;
    float *pieces;  // sums of the pieces of hot rows, NULL if there is none
};

#define PIECE 256

// out = sum of the picks at from .. to, in their order; there is at least one.
static inline void sum_picks(const struct factors *f, int64_t from, int64_t to, float *restrict out) {
    const int64_t D = f->D;
    const float c = f->coef[f->pick[from]], *x = f->vec + f->pick[from] / f->R * D;
    for (int64_t d = 0; d < D; d++) out[d] = c * x[d];
    int64_t i = from + 1;
    for (; i + 4 <= to; i += 4) {
        const int64_t *p = f->pick + i;
        const float c0 = f->coef[p[0]], c1 = f->coef[p[1]], c2 = f->coef[p[2]], c3 = f->coef[p[3]];
        const float *x0 = f->vec + p[0] / f->R * D, *x1 = f->vec + p[1] / f->R * D;
        const float *x2 = f->vec + p[2] / f->R * D, *x3 = f->vec + p[3] / f->R * D;
        for (int64_t d = 0; d < D; d++) out[d] += (c0 * x0[d] + c1 * x1[d]) + (c2 * x2[d] + c3 * x3[d]);
    }
    for (; i < to; i++) {
        const float c0 = f->coef[f->pick[i]], *x0 = f->vec + f->pick[i] / f->R * D;
        for (int64_t d = 0; d < D; d++) out[d] += c0 * x0[d];
    }
}

static inline int is_hot(const struct factors *f, int64_t u) { return f->start[u + 1] - f->start[u] > PIECE; }

// Where the pieces of hot row u lie. A hot row has at most 2 * floor(picks / PIECE) pieces, so rows do not overlap.
static inline float *pieces_of(const struct factors *f, int64_t u) {
    return f->pieces + 2 * (f->start[u] / PIECE) * f->D;
}

// Sums the pieces of hot rows, so that threads share the picks of one row; their size does not depend on the threads.
static inline void sum_pieces(struct factors *f, int64_t threads) {
    int64_t num_hot = 0, total = f->start[f->U];
    for (int64_t u = 0; u < f->U; u++) num_hot += is_hot(f, u);
    f->pieces = NULL;
    if (!num_hot) return;
    f->pieces = malloc((2 * (total / PIECE) + 2) * f->D * sizeof(float));
    struct piece {
        int64_t from, to;
        float *sum;
    } *piece = malloc((total / PIECE + num_hot) * sizeof *piece);
    int64_t n = 0;
    for (int64_t u = 0; u < f->U; u++) {
        const int64_t end = f->start[u + 1];
        for (int64_t at = f->start[u], j = 0; is_hot(f, u) && at < end; at += PIECE, j++)
            piece[n++] = (struct piece){at, at + PIECE < end ? at + PIECE : end, pieces_of(f, u) + j * f->D};
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t k = 0; k < n; k++) sum_picks(f, piece[k].from, piece[k].to, piece[k].sum);
    free(piece);
}

// out = the gradient of row u.
static inline void row_gradient(const struct factors *f, int64_t u, float *restrict out) {
    if (!is_hot(f, u)) {
        sum_picks(f, f->start[u], f->start[u + 1], out);
        return;
    }
    const float *piece = pieces_of(f, u);
    memcpy(out, piece, f->D * sizeof(float));
    for (int64_t at = f->start[u] + PIECE; at < f->start[u + 1]; at += PIECE) {
        piece += f->D;
        for (int64_t d = 0; d < f->D; d++) out[d] += piece[d];
    }
}

static inline float sum_of_squares(const float *x, int64_t D) {
    vf sum = {0};
    int64_t d = 0;
    for (; d + W <= D; d += W) sum += load_f32(x + d) * load_f32(x + d);
    float total = lane_sum(sum);
    for (; d < D; d++) total += x[d] * x[d];
    return total;
}
