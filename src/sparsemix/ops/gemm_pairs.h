// Products of bf16 by pairs: on processors with AVX-512 bf16 one instruction adds a[2p] b[2p] + a[2p + 1] b[2p + 1] to
// every fp32 sum, twice the products of an fp32 tile. A word holds a pair of neighbours along the sum; an odd sum ends
// with a zero.
//
// The instruction takes and gives subnormal numbers as zero, and rounds after each of its two products, to nearest
// whatever the mode: sums differ from those of fp32 tiles in the last bits, and below 1.2e-38 altogether.
#pragma once
#include "gemm.h"

#ifndef __AVX512BF16__
#define HAS_PAIRS 0
#else
#define HAS_PAIRS 1
#include <immintrin.h>

#define PAIR_ROWS 14    // rows of a tile: 28 sums, two vectors of pairs and a broadcast fill 31 of 32 registers
#define PAIR_BLOCK 384  // rows of one expert in a task: its matrices are packed anew in each, rows stay in the second cache

typedef uint32_t pair __attribute__((may_alias));  // two bf16, the earlier one in the low half

// Words from one row of pairs to the next: whole lines, and one more so that rows do not meet in one set of the cache.
static inline int64_t pair_pitch(int64_t K) { return whole(K, 32) / 2 + 16; }
static inline pair *pairs(int64_t n) { return (pair *)floats(n); }
static inline __mmask32 first_lanes(int64_t n) { return n <= 0 ? 0 : n >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << n) - 1; }

// Some lanes of a vector of bf16; those that are not read are 0.
static inline vf some_low(const void *p, __mmask16 lanes) {
    return (vf)_mm512_cvtpbh_ps((__m256bh)_mm256_maskz_loadu_epi16(lanes, p));
}
static inline void put_low(void *p, vf x, __mmask16 lanes) {
    __m256i low = (__m256i)_mm512_cvtneps_pbh((__m512)x);
    if (lanes == 0xffff)
        _mm256_storeu_si256(p, low);
    else
        _mm256_mask_storeu_epi16(p, lanes, low);
}

// Where a product goes: rows of fp32, to which it may be added, or of bf16.
typedef struct {
    char *at;
    int64_t stride;
    int low, add;
} Into;

static inline __attribute__((always_inline)) void put_sums(Into to, int64_t i, int64_t j, __m512 sum, __mmask16 lanes) {
    char *p = at(to.at, i * to.stride + j, to.low);
    if (to.low) {
        put_low(p, (vf)sum, lanes);
        return;
    }
    if (to.add) sum += _mm512_maskz_loadu_ps(lanes, p);
    _mm512_mask_storeu_ps(p, lanes, sum);
}

// to[i, j] (+)= sum over P pairs p of <a[i ar + p ap], b[p, j]> for m rows and v vectors of columns, both constants, of
// which `last` lanes of the last vector are wanted.
static inline __attribute__((always_inline)) void pair_tile(const int m, const int v, int64_t P, const pair *a,
                                                            int64_t ar, int64_t ap, const pair *b, Into to,
                                                            __mmask16 last) {
    __m512 sum[PAIR_ROWS][2];
#pragma GCC unroll 14
    for (int i = 0; i < m; i++)
#pragma GCC unroll 2
        for (int j = 0; j < v; j++) sum[i][j] = _mm512_setzero_ps();
    for (int64_t p = 0; p < P; p++, a += ap, b += v * W) {
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = v > 1 ? (__m512bh)_mm512_loadu_si512(b + W) : b0;
#pragma GCC unroll 14
        for (int i = 0; i < m; i++) {
            __m512bh x = (__m512bh)_mm512_set1_epi32(a[i * ar]);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, b0);
            if (v > 1) sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, b1);
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < m; i++) {
        put_sums(to, i, 0, sum[i][0], v > 1 ? 0xffff : last);
        if (v > 1) put_sums(to, i, W, sum[i][1], last);
    }
}

#define PAIR_TILE(m) \
    case 2 * m + 1: pair_tile(m, 1, P, a, ar, ap, b, to, last); break; \
    case 2 * m + 2: pair_tile(m, 2, P, a, ar, ap, b, to, last); break;

// The same for any number of rows and up to 32 columns, in tiles of nearly equal height.
static __attribute__((noinline)) void pair_strip(int64_t rows, int64_t columns, int64_t P, const pair *a, int64_t ar,
                                                 int64_t ap, const pair *b, Into to) {
    int v = vectors_of(columns);
    __mmask16 last = first_lanes(columns - (v - 1) * W);
    for (int64_t tiles = (rows + PAIR_ROWS - 1) / PAIR_ROWS, m; tiles > 0; tiles--) {
        m = (rows + tiles - 1) / tiles;
        switch (2 * m + v) {
            PAIR_TILE(1) PAIR_TILE(2) PAIR_TILE(3) PAIR_TILE(4) PAIR_TILE(5) PAIR_TILE(6) PAIR_TILE(7)
            PAIR_TILE(8) PAIR_TILE(9) PAIR_TILE(10) PAIR_TILE(11) PAIR_TILE(12) PAIR_TILE(13) PAIR_TILE(14)
        }
        rows -= m, a += m * ar, to.at = at(to.at, m * to.stride, to.low);
    }
}

// Rows [start, start + n) of K numbers, picked by ids or not, one behind the other as pairs.
static void pair_rows(pair *to, const void *x, const int64_t *ids, int64_t start, int64_t n, int64_t stride, int64_t K) {
    for (int64_t t = 0; t < n; t++, to += pair_pitch(K)) {
        const char *row = row_of(x, ids, start + t, stride, 1);
        for (int64_t k = 0; k < K; k += 32)
            _mm512_storeu_si512(to + k / 2, _mm512_maskz_loadu_epi16(first_lanes(K - k), row + 2 * k));
    }
}

// to[p, j] = entries j of rows 2p and 2p + 1, for up to 32 columns of n rows from `start` on: pairs across rows.
// The line `ahead` bytes further in every row is asked for.
static void weave(pair *to, int64_t pitch, const void *x, const int64_t *ids, int64_t start, int64_t n, int64_t stride,
                  int64_t column, int64_t columns, int64_t ahead) {
    static const uint16_t order[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                       8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                       16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    __m512i low = _mm512_loadu_si512(order), high = _mm512_loadu_si512(order + 32), none = _mm512_setzero_si512();
    __mmask32 lanes = first_lanes(columns);
    for (int64_t t = 0; t < n; t += 2, to += pitch) {
        const char *first = row_of(x, ids, start + t, stride, 1) + 2 * column;
        __m512i a = _mm512_maskz_loadu_epi16(lanes, first), b = none;
        __builtin_prefetch(first + ahead);
        if (t + 1 < n) {
            const char *second = row_of(x, ids, start + t + 1, stride, 1) + 2 * column;
            b = _mm512_maskz_loadu_epi16(lanes, second);
            __builtin_prefetch(second + ahead);
        }
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
        if (columns > W) _mm512_storeu_si512(to + W, _mm512_permutex2var_epi16(a, high, b));
    }
}

// 16 rows of 16 words become columns. Rows i and i + 8 side by side rotate the 8 bits of (row, column) by one; four
// times exchanges row and column.
static inline __attribute__((always_inline)) void turn_words(__m512i r[W]) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 4
    for (int turn = 0; turn < 4; turn++) {
        __m512i s[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; i++) {
            s[2 * i] = _mm512_permutex2var_epi32(r[i], low, r[i + 8]);
            s[2 * i + 1] = _mm512_permutex2var_epi32(r[i], high, r[i + 8]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) r[i] = s[i];
    }
}

// to[p, f] = the p-th pair of row f, for up to 32 rows of K numbers: pairs along rows. The next 32 rows are asked for.
static void turn_pairs(pair *to, const char *x, int64_t stride, int64_t rows, int64_t K) {
    int64_t P = (K + 1) / 2, pitch = vectors_of(rows) * W, ahead = 32 * stride * 2;
    for (int64_t f = 0; f < rows; f += W) {
        // In place of a row that is not there the first: nobody reads its column.
        const char *row[W];
        for (int i = 0; i < W; i++) row[i] = x + (f + i < rows ? f + i : 0) * stride * 2;
        for (int64_t p = 0; p < P; p += W) {
            __mmask32 lanes = first_lanes(K - 2 * p);
            __m512i r[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) {
                r[i] = _mm512_maskz_loadu_epi16(lanes, row[i] + 4 * p);
                __builtin_prefetch(row[i] + 4 * p + ahead, 0, 2);
            }
            turn_words(r);
            pair *out = to + p * pitch + f;
            for (int i = 0; i < W && p + i < P; i++) _mm512_storeu_si512(out + i * pitch, r[i]);
        }
    }
}

// A matrix of bf16 that rows are multiplied by: `turned` w[F, K], else w[K, F].
typedef struct {
    const char *at;
    int64_t stride;
    int turned;
} Matrix;

// to[t, f] (+)= sum_k a[t, k] w[f, k] or w[k, f] for n rows of pairs; `panel` holds (K + 1) 16 words.
static void pair_product(Into to, const pair *a, int64_t ar, int64_t n, Matrix w, int64_t K, int64_t F, pair *panel) {
    for (int64_t f = 0; f < F; f += 32) {
        int64_t columns = min_of(32, F - f);
        if (w.turned)
            turn_pairs(panel, at(w.at, f * w.stride, 1), w.stride, columns, K);
        else
            weave(panel, vectors_of(columns) * W, w.at, NULL, 0, K, w.stride, f, columns, 64);
        Into here = {at(to.at, f, to.low), to.stride, to.low, to.add};
        pair_strip(n, columns, (K + 1) / 2, a, ar, 1, panel, here);
    }
}

// Blocks of rows for so many threads: whole ones, or smaller ones where some threads would have none.
static Block *pair_blocks(const int64_t *counts, int64_t E, int64_t threads, int64_t *found) {
    int64_t used = 0;
    for (int64_t e = 0; e < E; e++) used += counts[e];
    int64_t fair = whole(used / (4 * threads), 32);
    return blocks_of(counts, E, fair < 32 ? 32 : min_of(fair, PAIR_BLOCK), found);
}
#endif
