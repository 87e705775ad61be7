// The k best of n * n product keys. A thread takes COLS queries of one set of keys at a time, scores them against one
// side (queries in the lanes of vectors, keys down the rows: keys need no packing), keeps that side's best and forgets
// the scores, which stay in the caches; then it merges the two lists of best scores.
//
// A selection first finds a bar that at least as many scores reach as are wanted, then looks at those that reach it.
// Equal scores come in order of their index.
#include "ranking.h"
#include "gradients.h"

#define COLS (2 * W)  // queries of a block
#define KEYS 6        // KEYS * COLS sums fill the registers of a tile
#define WORD (64 / COLS)  // rows of COLS comparisons that fill 64 bits
#define HALVINGS 7    // of the distance between peaks: a finer bar saves less than its search costs

// What a thread works in; made anew in each call.
typedef struct {
    int64_t n, side, k, P;
    const int64_t *a, *b;      // [P] the pairs of ranks that can win, in order
    int64_t groups;            // of rows that have one peak each; 0 where everything is looked at
    float *panel;              // [2][C][COLS] the queries of a block, both halves
    float *scores;             // [n, filled up][COLS]
    float *peaks;              // [groups][COLS]
    int32_t *corner;           // [side] every pair of ranks up to (x, corner_x) is as good as that one: k pairs or more
    int64_t first_corner;      // the smallest x that has one
    int32_t *hits;             // [n * COLS] places in `scores` that reach the bar
    int32_t *key, *index;      // [COLS][pitch] or [P] candidates as integers, and which they are
    int32_t *order, *place, *spare;  // [the longest list of candidates]
    float *best[2];            // [COLS][side] the best scores of both sides, falling
    int32_t *ids[2];
    int64_t pitch;
} Scratch;

static void *part(char **at, int64_t count) {  // the next `count` numbers of 4 bytes
    void *here = *at;
    *at += (count * 4 + 63) / 64 * 64;
    return here;
}

static void carve(Scratch *s, char **at, int64_t C) {
    // Longer than n, so that the lists of a block do not meet in one set of a cache.
    int64_t n = s->n, pitch = s->pitch = n + COLS, longest = pitch > s->P + COLS ? pitch : s->P + COLS;
    int64_t lists = COLS * pitch > longest ? COLS * pitch : longest;
    s->panel = part(at, 2 * C * COLS);
    s->scores = part(at, (n + KEYS + WORD) * COLS);
    s->peaks = part(at, s->groups * COLS);
    s->corner = part(at, s->side);
    s->hits = part(at, (n + WORD) * COLS);
    s->key = part(at, lists), s->index = part(at, lists);
    s->order = part(at, longest), s->place = part(at, longest), s->spare = part(at, longest);
    for (int x = 0; x < 2; x++) s->best[x] = part(at, COLS * s->side), s->ids[x] = part(at, COLS * s->side);
}

static Scratch new_scratch(char **memory, int64_t n, int64_t C, int64_t k, const int64_t *a, const int64_t *b,
                           int64_t P) {
    int64_t side = k < n ? k : n, groups = (2 * side + KEYS - 1) / KEYS * KEYS;
    Scratch s = {.n = n, .side = side, .k = k, .P = P, .a = a, .b = b, .groups = groups < n ? groups : 0};
    char *at = NULL;
    carve(&s, &at, C);
    at = *memory = aligned_alloc(64, (size_t)at);
    carve(&s, &at, C);
    for (int64_t x = 0; x < side; x++) {
        s.corner[x] = (k + x) / (x + 1) - 1;
        s.first_corner += s.corner[x] >= side;
    }
    return s;
}

#ifdef __AVX2__
static inline void transpose_8x8(const float *const *row, int64_t column, float *to, int64_t stride) {
    __m256 x[8], y[8];
    for (int r = 0; r < 8; r++) x[r] = _mm256_loadu_ps(row[r] + column);
    for (int r = 0; r < 8; r += 2) {
        y[r] = _mm256_unpacklo_ps(x[r], x[r + 1]);
        y[r + 1] = _mm256_unpackhi_ps(x[r], x[r + 1]);
    }
    for (int r = 0; r < 8; r += 4)
        for (int c = 0; c < 2; c++) {
            x[r + 2 * c] = _mm256_shuffle_ps(y[r + c], y[r + c + 2], 0x44);
            x[r + 2 * c + 1] = _mm256_shuffle_ps(y[r + c], y[r + c + 2], 0xee);
        }
    for (int c = 0; c < 4; c++) {
        _mm256_storeu_ps(to + c * stride, _mm256_permute2f128_ps(x[c], x[c + 4], 0x20));
        _mm256_storeu_ps(to + (c + 4) * stride, _mm256_permute2f128_ps(x[c], x[c + 4], 0x31));
    }
}
#endif

// to[c][q] = number c of row q, for c < n; where there are fewer rows than lanes, the last one is repeated.
static void turn(const float *from, int64_t stride, int64_t rows, int64_t n, float *to) {
    const float *row[COLS];
    int64_t c = 0;
    for (int64_t q = 0; q < COLS; q++) row[q] = from + (q < rows ? q : rows - 1) * stride;
#ifdef __AVX2__
    for (; c + 16 <= n; c += 16)  // a cache line of every row
        for (int64_t q = 0; q < COLS; q += 8)
            for (int64_t x = c; x < c + 16; x += 8) transpose_8x8(row + q, x, to + x * COLS + q, COLS);
#endif
    for (; c < n; c++)
        for (int64_t q = 0; q < COLS; q++) to[c * COLS + q] = row[q][c];
}

static inline void raise_peaks(float *peaks, vf first, vf second) {
    store_f32(peaks, larger(load_f32(peaks), first));
    store_f32(peaks + W, larger(load_f32(peaks + W), second));
}

// scores[j][q] = <query q, key j>, and the peaks of their groups; sums run over the channels in order.
static void score(const Scratch *s, const float *panel, const float *keys, int64_t C) {
    int64_t group = 0;
    for (int64_t i = 0; i < s->groups * COLS; i++) s->peaks[i] = -INFINITY;
    for (int64_t j = 0; j < s->n; j += KEYS) {
        int64_t rows = s->n - j < KEYS ? s->n - j : KEYS;
        const float *row[KEYS];
        for (int r = 0; r < KEYS; r++) row[r] = keys + (j + (r < rows ? r : rows - 1)) * C;
        vf sum[KEYS][2] = {0};
        for (int64_t c = 0; c < C; c++) {
            vf first = load_f32(panel + c * COLS), second = load_f32(panel + c * COLS + W);
            for (int r = 0; r < KEYS; r++) {
                vf x = splat(row[r][c]);
                sum[r][0] += x * first;
                sum[r][1] += x * second;
            }
        }
        for (int r = 0; r < KEYS; r++) {
            store_f32(s->scores + (j + r) * COLS, sum[r][0]);
            store_f32(s->scores + (j + r) * COLS + W, sum[r][1]);
            if (s->groups && r < rows) raise_peaks(s->peaks + (group + r) * COLS, sum[r][0], sum[r][1]);
        }
        group += KEYS;
        if (group >= s->groups) group = 0;
    }
}

// bar[q] that at least `side` peaks, so at least `side` scores of q, are not below: searched between the extremes.
static void find_bar(const Scratch *s, vf bar[2]) {
    vf *low = bar, high[2];
    low[0] = low[1] = high[0] = high[1] = splat(-INFINITY);
    for (int64_t i = 0; i < s->groups * COLS; i += W) {
        vf x = load_f32(s->peaks + i), *l = low + i / W % 2, *h = high + i / W % 2;
        *h = larger(*h, x);
        *l = i < COLS ? x : -larger(-*l, -x);
    }
    for (int step = 0; step < HALVINGS; step++) {
        vf middle[2];
        vi reach[2] = {0};
        for (int half = 0; half < 2; half++) middle[half] = low[half] + (high[half] - low[half]) * 0.5f;
        for (int64_t g = 0; g < s->groups; g++)
            for (int half = 0; half < 2; half++)
                reach[half] += (vi)(load_f32(s->peaks + g * COLS + half * W) < middle[half]) + 1;
        for (int half = 0; half < 2; half++) {
            vi enough = reach[half] >= (int32_t)s->side;
            low[half] = (vf)(((vi)middle[half] & enough) | ((vi)low[half] & ~enough));
            high[half] = (vf)(((vi)high[half] & enough) | ((vi)middle[half] & ~enough));
        }
    }
}

// The highest bit of a word; with it the count of zeros below the first one is defined.
#define END ((uint64_t)1 << 63)

// Places in `scores` of what is not below its query's bar -> hits; returns how many.
static int64_t find_hits(const Scratch *s, const vf bar[2]) {
    int32_t *to = s->hits;
    for (int64_t at = 0; at < s->n; at += WORD) {
        uint64_t bits = 0;
        for (int r = 0; r < WORD; r++) {
            const float *x = s->scores + (at + r) * COLS;
            bits |= (lane_bits(load_f32(x) < bar[0]) | lane_bits(load_f32(x + W) < bar[1]) << W) << (r * COLS);
        }
        bits = ~bits;
        if (s->n - at < WORD) bits &= ((uint64_t)1 << ((s->n - at) * COLS)) - 1;
        // Four at a time whether there are or not: few words have more, and a loop would be mispredicted. END gives what
        // is thrown away a place, and no other.
        int32_t *end = to + __builtin_popcountll(bits);
        for (; to < end; to += 4)
            for (int i = 0; i < 4; i++, bits &= bits - 1) to[i] = at * COLS + __builtin_ctzll(bits | END);
        to = end;
    }
    return to - s->hits;
}

// The best of every query's scores -> best[x], ids[x].
static void select_side(const Scratch *s, int x) {
    vf bar[2];
    int32_t count[COLS] = {0};
    find_bar(s, bar);
    int64_t hits = find_hits(s, bar);
    for (int64_t h = 0; h < hits; h++) {
        int32_t place = s->hits[h], q = place % COLS;
        int64_t to = q * s->pitch + count[q]++;
        s->key[to] = as_order(s->scores[place]);
        s->index[to] = place / COLS;
    }
    for (int64_t q = 0; q < COLS; q++) {
        const int32_t *index = s->index + q * s->pitch;
        arrange(s->key + q * s->pitch, count[q], s->order, s->place, s->spare);
        for (int64_t r = q * s->side, e = 0; e < s->side; r++, e++) {
            s->ids[x][r] = index[s->order[e]];
            s->best[x][r] = s->scores[(int64_t)index[s->order[e]] * COLS + q];
        }
    }
}

// Which of the pairs of ranks have the k largest sums left_a + right_b -> order [k].
static void select_pairs(const Scratch *s, const float *left, const float *right) {
    float bar = -INFINITY;
    for (int64_t x = s->first_corner; x < s->side; x++) {
        float sum = left[x] + right[s->corner[x]];
        bar = sum > bar ? sum : bar;
    }
    int64_t m = 0;
    for (int retry = 0; m < s->k; retry++) {  // the sum of inf and -inf may leave too few: then all are taken
        m = 0;
        for (int64_t p = 0; p < s->P; p++) {
            float sum = left[s->a[p]] + right[s->b[p]];
            s->key[m] = as_order(sum);
            s->index[m] = p;
            m += retry | !(sum < bar);
        }
    }
    arrange(s->key, m, s->order, s->place, s->spare);
    for (int64_t r = 0; r < s->k; r++) s->order[r] = s->index[s->order[r]];
}

// Both sides' lists of `rows` queries -> the outputs' rows first, first + stride, ...
static void write_pairs(const Scratch *s, int64_t rows, int64_t first, int64_t stride, float *left, float *right,
                        int64_t *i, int64_t *j) {
    int64_t side = s->side;
    for (int64_t q = 0; q < rows; q++) {
        const float *l = s->best[0] + q * side, *r = s->best[1] + q * side;
        int64_t at = (first + q * stride) * s->k;
        select_pairs(s, l, r);
        for (int64_t x = 0; x < s->k; x++, at++) {
            int64_t from_left = s->a[s->order[x]], from_right = s->b[s->order[x]];
            if (left) left[at] = l[from_left], right[at] = r[from_right];
            i[at] = s->ids[0][q * side + from_left];
            j[at] = s->ids[1][q * side + from_right];
        }
    }
}

// query [N][groups][2][C], keys [groups][2][n][C], pairs of ranks a, b [P] -> left, right, i, j [N][groups][k].
void product_key_topk(const float *query, const float *keys, int64_t N, int64_t groups, int64_t n, int64_t C, int64_t k,
                      const int64_t *a, const int64_t *b, int64_t P, float *left, float *right, int64_t *i, int64_t *j,
                      int64_t threads) {
    int64_t blocks = (N + COLS - 1) / COLS;
#pragma omp parallel num_threads(threads)
    {
        char *memory;
        Scratch s = new_scratch(&memory, n, C, k, a, b, P);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < groups * blocks; task++) {
            int64_t g = task / blocks, start = task % blocks * COLS, rows = N - start < COLS ? N - start : COLS;
            int64_t first = start * groups + g;
            turn(query + first * 2 * C, groups * 2 * C, rows, 2 * C, s.panel);
            for (int x = 0; x < 2; x++) {
                score(&s, s.panel + x * C * COLS, keys + (g * 2 + x) * n * C, C);
                select_side(&s, x);
            }
            write_pairs(&s, rows, first, groups, left, right, i, j);
        }
        free(memory);
    }
}

#ifdef __AVX512F__
#include "best_of_row.h"
#else
// The best of rows of scores [rows][n] -> best[x], ids[x]: turned, with their peaks. `more` rows follow.
static void select_given(const Scratch *s, const float *from, int64_t rows, int64_t more, int x) {
    int64_t n = s->n, group = 0;
    for (int64_t i = 0; i < s->groups * COLS; i++) s->peaks[i] = -INFINITY;
    for (int64_t start = 0; start < n; start += 64) {
        int64_t stop = start + 64 < n ? start + 64 : n;
        for (int64_t q = 0; q < COLS && q < more; q++) prefetch(from + (q + COLS) * n + start, 256);
        turn(from + start, n, rows, stop - start, s->scores + start * COLS);
        for (int64_t c = start; c < stop && s->groups; c++, group = group + 1 < s->groups ? group + 1 : 0)
            raise_peaks(s->peaks + group * COLS, load_f32(s->scores + c * COLS), load_f32(s->scores + c * COLS + W));
    }
    select_side(s, x);
}
#endif

// The same from given scores left, right [N][n] -> i, j [N][k].
void best_pairs(const float *left, const float *right, int64_t N, int64_t n, int64_t k, const int64_t *a,
                const int64_t *b, int64_t P, int64_t *i, int64_t *j, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        char *memory;
        Scratch s = new_scratch(&memory, n, 0, k, a, b, P);
#pragma omp for schedule(dynamic, 8)
        for (int64_t start = 0; start < N; start += COLS) {
            int64_t rows = N - start < COLS ? N - start : COLS;
            for (int x = 0; x < 2; x++)
                select_given(&s, (x ? right : left) + start * n, rows, N - start - COLS, x);
            write_pairs(&s, rows, start, 1, NULL, NULL, i, j);
        }
        free(memory);
    }
}
