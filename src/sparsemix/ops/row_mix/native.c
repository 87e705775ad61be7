// y_n = sum_r coef_nr table[ids_nr]. Threads share the outputs evenly, so that one token is enough for all of them.
#ifndef ROW
#include "native.h"
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

void OF(row_mix)(const float *coef, const int64_t *ids, const ROW *table, ROW *y, int64_t N, int64_t R, int64_t D,
                 int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < threads; t++)
        OF(mix_range)(coef, ids, table, R, D, part(N * D, 64, t, threads), part(N * D, 64, t + 1, threads), y);
}
#endif
