// Matrix products of few rows by many matrices. Operands are fp32 or bf16 (`low`), sums are fp32.
//
// With few rows per matrix the matrices are what moves, so they are never packed: rows are. Where the matrix is
// read along the sum (w[f, k]), rows are packed in panels that lie side by side, x[k, t], and the product comes out
// turned: out[f, t] = sum_k w[f, k] x[k, t]. Where it is read across the sum (w[k, f]), rows are taken as they are.
#pragma once
#include "native.h"

#define NR (2 * W)  // columns of a panel, two vectors
#define MR 6        // rows of a tile of two vectors: 12 sums, 2 columns and a broadcast fill 16 registers
#define BLOCK 64    // rows of one expert that a task takes, so that its share of the rows stays in the second cache
#define DEPTH 128   // products that are summed before they are added to the result

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static inline float *floats(int64_t n) { return aligned_alloc(64, (size_t)whole(n * 4 + 1, 64)); }
static inline char *at(const void *x, int64_t i, int low) { return (char *)x + i * (low ? 2 : 4); }

static void widen(float *out, const void *x, int64_t n, int low) {
    if (!low) {
        memcpy(out, x, n * 4);
        return;
    }
    int64_t i = 0;
    for (; i + W <= n; i += W) store_f32(out + i, load_bf16((const bf16 *)x + i));
    for (; i < n; i++) out[i] = one_bf16((const bf16 *)x + i);
}

static void narrow(void *out, const float *x, int64_t n, int low) {
    if (!low) {
        memcpy(out, x, n * 4);
        return;
    }
    int64_t i = 0;
    for (; i + W <= n; i += W) store_bf16((bf16 *)out + i, load_f32(x + i));
    for (; i < n; i++) put_bf16((bf16 *)out + i, x[i]);
}

// c[i, j] (+)= sum_k a[i ar + k ak] b[k bk + j] for m rows and v vectors of columns, both constants: the sums stay in
// registers. For every k the line at `next`, `step` bytes further each time, is asked for: what comes after this tile.
static inline __attribute__((always_inline)) void tile_of(const int m, const int v, int64_t K, const float *a,
                                                          int64_t ar, int64_t ak, const float *b, int64_t bk, float *c,
                                                          int64_t cr, int add, const char *next, int64_t step) {
    vf sum[2 * MR][2];
#pragma GCC unroll 12
    for (int i = 0; i < m; i++)
#pragma GCC unroll 2
        for (int j = 0; j < v; j++) sum[i][j] = splat(0);
    for (int64_t k = 0; k < K; k++) {
        vf b0 = load_f32(b), b1 = v > 1 ? load_f32(b + W) : b0;
#pragma GCC unroll 12
        for (int i = 0; i < m; i++) {
            vf x = splat(a[i * ar]);
            sum[i][0] += x * b0;
            if (v > 1) sum[i][1] += x * b1;
        }
        __builtin_prefetch(next);
        a += ak, b += bk, next += step;
    }
#pragma GCC unroll 12
    for (int i = 0; i < m; i++)
#pragma GCC unroll 2
        for (int j = 0; j < v; j++) {
            float *to = c + i * cr + j * W;
            if (add) sum[i][j] += load_f32(to);
            store_f32(to, sum[i][j]);
        }
}

#define TILE(m, v) \
    case m * 2 + v: \
        tile_of(m, v, min_of(DEPTH, K - k), a + k * ak, ar, ak, b + k * bk, bk, c, cr, add || k, \
                next + k * step, step); \
        break;

// What a strip asks for while it computes: the lines from `at` on, for every k `step` bytes further and `row` bytes for
// each row of a tile; with `row` 0 the first tile asks for all. Nothing if `at` is NULL.
typedef struct {
    const char *at;
    int64_t step, row;
} Ahead;

// The same for any number of rows, in tiles of nearly equal height. Sums of DEPTH products are added up: one long sum
// in fp32 would err twice as much.
static __attribute__((noinline)) void strip(int64_t rows, int v, int64_t K, const float *a, int64_t ar, int64_t ak,
                                            const float *b, int64_t bk, float *c, int64_t cr, int add,
                                            Ahead ahead) {
    for (int64_t tiles = (rows + (v > 1 ? MR : 2 * MR) - 1) / (v > 1 ? MR : 2 * MR), m; tiles > 0; tiles--) {
        m = (rows + tiles - 1) / tiles;
        const char *next = ahead.at ? ahead.at : (const char *)b;
        int64_t step = ahead.at ? ahead.step + m * ahead.row : bk * 4;
        for (int64_t k = 0; k < K || !k; k += DEPTH) switch (m * 2 + v) {
                TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1)
                TILE(7, 1) TILE(8, 1) TILE(9, 1) TILE(10, 1) TILE(11, 1) TILE(12, 1)
                TILE(1, 2) TILE(2, 2) TILE(3, 2) TILE(4, 2) TILE(5, 2) TILE(6, 2)
            }
        rows -= m, a += m * ar, c += m * cr;
        ahead.at = ahead.at && ahead.row ? ahead.at + m * ahead.row * K : NULL;
    }
}

// Rows [start, start + rows) belong to one expert: the part of the work that one task takes.
typedef struct {
    int64_t expert, start, rows;
} Block;

// The rows of every expert in parts of nearly equal size, at most `most` each.
static Block *blocks_of(const int64_t *counts, int64_t E, int64_t most, int64_t *found) {
    int64_t n = 0, start = 0;
    for (int64_t e = 0; e < E; e++) n += (counts[e] + most - 1) / most;
    Block *blocks = malloc((n + 1) * sizeof(Block)), *next = blocks;
    for (int64_t e = 0; e < E; start += counts[e++]) {
        int64_t parts = (counts[e] + most - 1) / most;
        int64_t each = parts ? whole((counts[e] + parts - 1) / parts, NR) : 0;
        for (int64_t done = 0; done < counts[e]; done += each)
            *next++ = (Block){e, start + done, min_of(each, counts[e] - done)};
    }
    *found = next - blocks;
    return blocks;
}

// Row `i` of a matrix whose rows may be picked by `ids`.
static inline const char *row_of(const void *x, const int64_t *ids, int64_t i, int64_t stride, int low) {
    return at(x, (ids ? ids[i] : i) * stride, low);
}

// Four floats: the unit in which rows are turned into columns and back.
typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t i4 __attribute__((vector_size(16)));

static inline v4 load4(const char *p, int low) {
    if (!low) return *(const v4 *)p;
    typedef uint16_t h4 __attribute__((vector_size(8), aligned(2), may_alias));
    typedef uint32_t u4 __attribute__((vector_size(16)));
    return (v4)(__builtin_convertvector(*(const h4 *)p, u4) << 16);
}

static inline void turn4(v4 r[4]) {
    v4 a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    v4 c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5), r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

static inline int vectors_of(int64_t n) { return n > W ? 2 : 1; }

// panel[k, t] = row t of n, entry k; 0 for the columns that fill up the last vector.
static inline __attribute__((always_inline)) void panel_of(float *panel, const void *x, const int64_t *ids,
                                                           int64_t start, int64_t n, int64_t stride, int64_t K,
                                                           const int low) {
    static const float nothing[4] = {0};
    int64_t width = vectors_of(n) * W;
    for (int64_t t = 0; t < width; t += 4) {
        const char *row[4];
        for (int i = 0; i < 4; i++) row[i] = t + i < n ? row_of(x, ids, start + t + i, stride, low) : NULL;
        for (int64_t k = 0; k < K; k += 4) {
            v4 r[4];
            if (k + 4 <= K) {
                for (int i = 0; i < 4; i++) r[i] = row[i] ? load4(row[i] + k * (low ? 2 : 4), low) : load4((const char *)nothing, 0);
                turn4(r);
                for (int i = 0; i < 4; i++) *(v4 *)(panel + (k + i) * width + t) = r[i];
            } else
                for (int64_t j = k; j < K; j++)
                    for (int i = 0; i < 4; i++) {
                        const char *p = row[i] ? row[i] + j * (low ? 2 : 4) : (const char *)nothing;
                        panel[j * width + t + i] = low ? one_bf16((const bf16 *)p) : *(const float *)p;
                    }
        }
    }
}

// Panels of NR rows each, one after the other, K * NR floats apart.
static void panels_of(float *panels, const void *x, const int64_t *ids, int64_t start, int64_t n, int64_t stride,
                      int64_t K, int low) {
    for (int64_t t = 0; t < n; t += NR)
        if (low)
            panel_of(panels + t * K, x, ids, start + t, min_of(NR, n - t), stride, K, 1);
        else
            panel_of(panels + t * K, x, ids, start + t, min_of(NR, n - t), stride, K, 0);
}

// out[t, f] = panel[f, t]: panels, `apart` floats from one to the next, back to rows.
static void rows_of(void *out, int64_t stride, const float *panels, int64_t apart, int64_t n, int64_t F, int low) {
    for (int64_t t0 = 0; t0 < n; t0 += NR, panels += apart) {
        int64_t m = min_of(NR, n - t0), width = vectors_of(m) * W;
        for (int64_t t = 0; t < m; t += 4)
            for (int64_t f = 0; f < F; f += 4) {
                int64_t rows = min_of(4, m - t), columns = min_of(4, F - f);
                v4 r[4];
                for (int i = 0; i < 4; i++) r[i] = i < columns ? *(const v4 *)(panels + (f + i) * width + t) : (v4){0};
                turn4(r);
                for (int i = 0; i < rows; i++) {
                    char *to = at(out, (t0 + t + i) * stride + f, low);
                    if (!low && columns == 4)
                        *(v4 *)to = r[i];
                    else
                        narrow(to, (const float *)&r[i], columns, low);
                }
            }
    }
}

// out[f, t] = sum_k w[f, k] x[k, t]: n rows in panels give F rows in panels, `apart` floats from one to the next.
// `wide` holds 2 MR rows of a bf16 matrix.
static void turned_product(float *out, int64_t apart, const void *w, int64_t stride, int64_t F, int64_t K,
                           const float *panels, int64_t n, float *wide, int low) {
    for (int64_t f = 0; f < F; f += 2 * MR) {
        int64_t m = min_of(2 * MR, F - f);
        const float *a = low ? wide : (const float *)w + f * stride;
        if (low)
            for (int64_t i = 0; i < m; i++) widen(wide + i * K, at(w, (f + i) * stride, low), K, low);
        for (int64_t t = 0; t < n; t += NR) {
            int v = vectors_of(n - t);
            Ahead ahead = {t ? NULL : at(w, (f + 2 * MR) * stride, low), 0, low ? 2 : 4};
            float *c = out + t / NR * apart + f * v * W;
            strip(m, v, K, a, low ? K : stride, 1, panels + t * K, v * W, c, v * W, 0, ahead);
        }
    }
}

// out[t, j] = sum_k a[t, k] w[k, j] for n rows; `wide` holds K NR floats, `edge` n NR.
static void straight_product(void *out, int64_t out_stride, int out_low, const float *a, int64_t a_stride, int64_t n,
                             const void *w, int64_t stride, int64_t K, int64_t F, float *wide, float *edge, int low) {
    for (int64_t j = 0; j < F; j += NR) {
        int64_t columns = min_of(NR, F - j);
        int v = vectors_of(columns), packed = low || columns < v * W, aside = out_low || columns < v * W;
        if (packed)
            for (int64_t k = 0; k < K; k++) {
                widen(wide + k * v * W, at(w, k * stride + j, low), columns, low);
                for (int64_t i = columns; i < v * W; i++) wide[k * v * W + i] = 0;
            }
        const float *b = packed ? wide : (const float *)w + j;
        float *c = aside ? edge : (float *)out + j;
        Ahead ahead = {at(w, j + NR, low), stride * (low ? 2 : 4), 0};
        strip(n, v, K, a, a_stride, 1, b, packed ? v * W : stride, c, aside ? v * W : out_stride, 0, ahead);
        if (aside)
            for (int64_t t = 0; t < n; t++) narrow(at(out, t * out_stride + j, out_low), edge + t * v * W, columns, out_low);
    }
}
