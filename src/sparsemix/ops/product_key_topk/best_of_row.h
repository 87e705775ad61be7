// The best scores of one row as it lies, on processors with AVX-512: it reads what memory sends, nothing is turned.
// Included by native.c, whose Scratch it takes.

#define PEAKS 4  // vectors of peaks that stay in registers

// A bar that at least `side` of the n scores are not below. Every lane of the `vectors` peaks is the largest of some
// scores, no score is in two; the bar is searched among them.
static inline __attribute__((always_inline)) float bar_of(const float *x, int64_t n, int64_t side, __m512 *peak,
                                                          const int64_t vectors) {
    const __m512 least = _mm512_set1_ps(-INFINITY);
    for (int64_t g = 0; g < vectors; g++) peak[g] = least;
    int64_t i = 0;
    for (; i + vectors * W <= n; i += vectors * W)
#pragma GCC unroll 4
        for (int64_t g = 0; g < vectors; g++) peak[g] = _mm512_max_ps(peak[g], _mm512_loadu_ps(x + i + g * W));
    for (int64_t g = 0; i < n; i += W, g++) {
        __mmask16 lanes = n - i < W ? (1 << (n - i)) - 1 : 0xffff;
        peak[g] = _mm512_max_ps(peak[g], _mm512_mask_loadu_ps(least, lanes, x + i));
    }
    __m512 lowest = peak[0], highest = peak[0];
    for (int64_t g = 1; g < vectors; g++)
        lowest = _mm512_min_ps(lowest, peak[g]), highest = _mm512_max_ps(highest, peak[g]);
    float low = _mm512_reduce_min_ps(lowest), high = _mm512_reduce_max_ps(highest);
    for (int step = 0; step < HALVINGS; step++) {
        float middle = low + (high - low) * 0.5f;
        int64_t below = 0;
        for (int64_t g = 0; g < vectors; g++)
            below += __builtin_popcount(_mm512_cmp_ps_mask(peak[g], _mm512_set1_ps(middle), _CMP_LT_OQ));
        int enough = vectors * W - below >= side;
        low = enough ? middle : low, high = enough ? high : middle;
    }
    return low;
}

// Which of the n scores are not below the bar -> index; returns how many. A vector beyond them is written. The n scores
// that follow are asked for: rows of a page each are no stream that the processor would see.
static int64_t hits_of(const float *x, int64_t n, float bar, int32_t *index) {
    __m512i ids = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t m = 0;
    for (int64_t i = 0; i < n; i += W, ids = _mm512_add_epi32(ids, _mm512_set1_epi32(W))) {
        __mmask16 lanes = n - i < W ? (1 << (n - i)) - 1 : 0xffff;
        __m512 scores = _mm512_maskz_loadu_ps(lanes, x + i);
        __mmask16 reach = lanes & ~_mm512_cmp_ps_mask(scores, _mm512_set1_ps(bar), _CMP_LT_OQ);
        __builtin_prefetch(x + n + i);
        // To a register first: storing the lanes alone is many times slower on Zen 4.
        _mm512_storeu_si512(index + m, _mm512_maskz_compress_epi32(reach, ids));
        m += __builtin_popcount(reach);
    }
    return m;
}

// The best of the n scores x, which are row q of a block -> best[half], ids[half].
static void select_row(const Scratch *s, const float *x, int64_t q, int half) {
    int64_t n = s->n, side = s->side, vectors = (2 * side + W - 1) / W;
    __m512 peak[PEAKS];
    float bar = -INFINITY;
    if (s->groups && vectors * W < n)
        bar = vectors <= PEAKS ? bar_of(x, n, side, peak, PEAKS) : bar_of(x, n, side, (__m512 *)s->peaks, vectors);
    int64_t m = hits_of(x, n, bar, s->index);
    for (int64_t h = 0; h < m; h++) s->key[h] = as_order(x[s->index[h]]);
    arrange(s->key, m, s->order, s->place, s->spare);
    for (int64_t r = q * side, e = 0; e < side; r++, e++) {
        int32_t i = s->ids[half][r] = s->index[s->order[e]];
        s->best[half][r] = x[i];
    }
}

// The best of rows of scores [rows][n] -> best[x], ids[x].
static void select_given(const Scratch *s, const float *from, int64_t rows, int64_t more, int x) {
    (void)more;
    for (int64_t q = 0; q < rows; q++) select_row(s, from + q * s->n, q, x);
}
