// What every C kernel shares: vectors of the widest width that this build allows, bf16, prefetching, tiny reductions.
// One source serves every instruction set: the build's flags decide W, the number of floats in a vector.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX2__)
#define W 8
#else
#define W 4
#endif

// aligned(...) of one element: loads and stores through these types need no alignment.
typedef float vf __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef uint32_t vw __attribute__((vector_size(4 * W), aligned(2), may_alias));
typedef uint16_t bf16;

static inline vf splat(float x) { return x - (vf){0}; }

static inline vf load_f32(const float *p) { return *(const vf *)p; }
static inline void store_f32(float *p, vf x) { *(vf *)p = x; }
static inline vf load_bf16(const bf16 *p) { return (vf)(__builtin_convertvector(*(const vh *)p, vu) << 16); }

// The bits of x rounded to bf16, ties to even, in the upper half of each word; what is in the lower half has no meaning.
static inline vu rounded_bits(vf x) {
    vu bits = (vu)x, nan = (vu)(x != x);
    bits += 0x7fff + ((bits >> 16) & 1);
    return (bits & ~nan) | (nan & 0x7fc00000);
}

static inline void store_bf16(bf16 *p, vf x) { *(vh *)p = __builtin_convertvector(rounded_bits(x) >> 16, vh); }

// 2 W numbers as two vectors, in an order that only `store_pair` of the same type undoes: of bf16 the even ones and the
// odd ones, as words hold them, which costs less than widening.
static inline void load_pair_f32(const float *p, vf *a, vf *b) { *a = load_f32(p), *b = load_f32(p + W); }
static inline void store_pair_f32(float *p, vf a, vf b) { store_f32(p, a), store_f32(p + W, b); }
static inline void load_pair_bf16(const bf16 *p, vf *a, vf *b) {
    vu words = *(const vw *)p;
    *a = (vf)(words << 16), *b = (vf)(words & 0xffff0000);
}
static inline void store_pair_bf16(bf16 *p, vf a, vf b) {
    *(vw *)p = (rounded_bits(a) >> 16) | (rounded_bits(b) & 0xffff0000);
}

static inline float one_f32(const float *p) { return *p; }
static inline float one_bf16(const bf16 *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline void put_f32(float *p, float x) { *p = x; }
static inline void put_bf16(bf16 *p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *p = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Sum of the lanes, pairwise.
static inline float lane_sum(vf x) {
    float lane[W];
    memcpy(lane, &x, sizeof lane);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

// Ask for the first bytes of a row that is read some iterations later.
static inline void prefetch(const void *p, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)p + at, 0, 3);
}
