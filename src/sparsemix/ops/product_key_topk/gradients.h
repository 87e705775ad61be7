// The gradients of queries and keys from those of the picked scores. Included by native.c.
//
// Tokens are cut into pieces, each with sums of its own for the keys, which are added in order: the result does not
// depend on the number of threads.

#define MOST_PIECES 16

// What every task reads, and where it writes.
typedef struct {
    const float *query, *keys, *d_score[2];
    const int64_t *id[2];
    int64_t N, H, groups, n, C, k;
    float *d_query;
} Gradients;

// One side of the queries of one set of keys, tokens `from` to `stop`; d_keys [n][C] are added to.
static inline __attribute__((always_inline)) void add_side(const Gradients *f, int64_t g, int side, int64_t from,
                                                           int64_t stop, float *restrict d_keys, const int64_t C,
                                                           const int fits) {
    float near[32];  // registers, where the number of channels is known
    const int64_t heads = f->H / f->groups;
    const float *restrict keys = f->keys + (g * 2 + side) * f->n * C;
    for (int64_t t = from; t < stop; t++)
        for (int64_t h = g * heads; h < (g + 1) * heads; h++) {
            const int64_t at = t * f->H + h;
            const float *restrict q = f->query + (at * 2 + side) * C, *d_score = f->d_score[side] + at * f->k;
            const int64_t *id = f->id[side] + at * f->k;
            float *d_query = f->d_query + (at * 2 + side) * C, *d_q = fits ? near : d_query;
            for (int64_t c = 0; c < C; c++) d_q[c] = 0;
            for (int64_t x = 0; x < f->k; x++) {
                const float d = d_score[x], *restrict key = keys + id[x] * C;
                float *restrict d_key = d_keys + id[x] * C;
                for (int64_t c = 0; c < C; c++) d_q[c] += d * key[c];
                for (int64_t c = 0; c < C; c++) d_key[c] += d * q[c];
            }
            if (fits) memcpy(d_query, d_q, C * sizeof(float));
        }
}

// Narrow sub-keys are read as whole vectors, their number of channels being known.
static void add_piece(const Gradients *f, int64_t g, int side, int64_t from, int64_t stop, float *d_keys) {
    if (f->C == 8) add_side(f, g, side, from, stop, d_keys, 8, 1);
    else if (f->C == 16) add_side(f, g, side, from, stop, d_keys, 16, 1);
    else if (f->C == 32) add_side(f, g, side, from, stop, d_keys, 32, 1);
    else add_side(f, g, side, from, stop, d_keys, f->C, 0);
}

// query [N][H][2][C], keys [groups][2][n][C] (groups: H, or 1 for all heads), d_left, d_right, i, j [N][H][k].
void product_key_topk_backward(const float *query, const float *keys, const float *d_left, const float *d_right,
                               const int64_t *i, const int64_t *j, int64_t N, int64_t H, int64_t groups, int64_t n,
                               int64_t C, int64_t k, float *d_query, float *d_keys, int64_t threads) {
    const Gradients f = {query, keys, {d_left, d_right}, {i, j}, N, H, groups, n, C, k, d_query};
    const int64_t size = groups * 2 * n * C;
    // Clearing and adding up a piece's sums must cost less than filling them.
    int64_t pieces = N * H * k / (4 * groups * n);
    pieces = pieces < 1 ? 1 : pieces > MOST_PIECES ? MOST_PIECES : pieces;
    float *sums = malloc((pieces - 1) * size * sizeof(float) + 1);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < pieces * groups * 2; task++) {
        const int64_t piece = task / (groups * 2), part = task % (groups * 2);
        float *to = (piece ? sums + (piece - 1) * size : d_keys) + part * n * C;
        memset(to, 0, n * C * sizeof(float));
        add_piece(&f, part / 2, part % 2, N * piece / pieces, N * (piece + 1) / pieces, to);
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < groups * 2 * n; row++)
        for (int64_t piece = 1; piece < pieces; piece++)
            for (int64_t c = row * C; c < (row + 1) * C; c++) d_keys[c] += sums[(piece - 1) * size + c];
    free(sums);
}
