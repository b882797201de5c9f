/* Arithmetic of all data types and reductions. */

#include "stub.h"

#include <math.h>
#include <string.h>

typedef uint16_t half;
typedef uint16_t bfloat;

static float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float half_load(half value) {
    uint32_t sign = (uint32_t)(value & 0x8000) << 16, exponent = value >> 10 & 31,
             fraction = value & 1023;
    if (exponent == 31) /* infinity or NaN */
        return bits_to_float(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) /* zero or subnormal: fraction * 2^-24, exact in a float */
        return bits_to_float(sign | float_to_bits((float)fraction * 0x1p-24f));
    return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}

static half half_store(float value) {
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000)
        return (half)(sign | 0x7e00);
    if (rest >= 0x477ff000) /* 65520 and more round to infinity */
        return (half)(sign | 0x7c00);
    if (rest <
        0x38800000) /* subnormal: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits */
        return (half)(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000));
    rest += 0xfff + (rest >> 13 & 1); /* to nearest, ties to even */
    return (half)(sign | (rest - 0x38000000) >> 13);
}

static float bfloat_load(bfloat value) { return bits_to_float((uint32_t)value << 16); }

static bfloat bfloat_store(float value) {
    uint32_t bits = float_to_bits(value);
    if (isnan(value))
        return (bfloat)(bits >> 16 | 0x40);
    return (bfloat)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#define EACH(statement)                  \
    for (size_t i = 0; i < count; i++) { \
        statement;                       \
    }                                    \
    break

/* Halves are rounded after each operation, as on a GPU; integers wrap, which in C only unsigned
 * ones may. */
#define COMBINE(NAME, T, WIDE, LOAD, STORE, LOWER, HIGHER)                                \
    static void NAME##_combine(void *to, const void *from, size_t count, int reduction) { \
        T *a = to;                                                                        \
        const T *b = from;                                                                \
        switch (reduction) {                                                              \
        case ncclProd:                                                                    \
            EACH(a[i] = (T)STORE((WIDE)LOAD(a[i]) * (WIDE)LOAD(b[i])));                   \
        case ncclMax:                                                                     \
            EACH(a[i] = (T)STORE(HIGHER(LOAD(a[i]), LOAD(b[i]))));                        \
        case ncclMin:                                                                     \
            EACH(a[i] = (T)STORE(LOWER(LOAD(a[i]), LOAD(b[i]))));                         \
        default:                                                                          \
            EACH(a[i] = (T)STORE((WIDE)LOAD(a[i]) + (WIDE)LOAD(b[i])));                   \
        }                                                                                 \
    }

#define SCALE(NAME, T, WIDE, LOAD, STORE)                                                  \
    static void NAME##_scale(void *to, const void *from, size_t count, int ranks) {        \
        T *a = to;                                                                         \
        const T *b = from;                                                                 \
        WIDE factor = LOAD(STORE((WIDE)(1.0 / ranks))); /* NCCL's, a number of the type */ \
        for (size_t i = 0; i < count; i++)                                                 \
            a[i] = STORE(LOAD(b[i]) * factor);                                             \
    }

#define DIVIDE(NAME, T)                                            \
    static void NAME##_divide(void *to, size_t count, int ranks) { \
        T *a = to;                                                 \
        for (size_t i = 0; i < count; i++)                         \
            a[i] = (T)(a[i] / (T)ranks);                           \
    }

#define SAME(x) (x)
#define LOWER_OF(x, y) ((x) < (y) ? (x) : (y))
#define HIGHER_OF(x, y) ((x) > (y) ? (x) : (y))
#define INTEGER(NAME, T)                                        \
    COMBINE(NAME, T, uint64_t, SAME, SAME, LOWER_OF, HIGHER_OF) \
    DIVIDE(NAME, T)
#define FLOATING(NAME, T, WIDE, LOAD, STORE, LOWER, HIGHER) \
    COMBINE(NAME, T, WIDE, LOAD, STORE, LOWER, HIGHER)      \
    SCALE(NAME, T, WIDE, LOAD, STORE)

INTEGER(int8, int8_t)
INTEGER(uint8, uint8_t)
INTEGER(int32, int32_t)
INTEGER(uint32, uint32_t)
INTEGER(int64, int64_t)
INTEGER(uint64, uint64_t)
FLOATING(float16, half, float, half_load, half_store, fminf, fmaxf)
FLOATING(float32, float, float, SAME, SAME, fminf, fmaxf)
FLOATING(float64, double, double, SAME, SAME, fmin, fmax)
FLOATING(bfloat16, bfloat, float, bfloat_load, bfloat_store, fminf, fmaxf)

static const struct {
    const char *name;
    size_t bytes;
    void (*combine)(void *, const void *, size_t, int);
    void (*scale)(void *, const void *, size_t, int);
    void (*divide)(void *, size_t, int);
} DTYPES[] = {
    {"int8", 1, int8_combine, NULL, int8_divide},
    {"uint8", 1, uint8_combine, NULL, uint8_divide},
    {"int32", 4, int32_combine, NULL, int32_divide},
    {"uint32", 4, uint32_combine, NULL, uint32_divide},
    {"int64", 8, int64_combine, NULL, int64_divide},
    {"uint64", 8, uint64_combine, NULL, uint64_divide},
    {"float16", 2, float16_combine, float16_scale, NULL},
    {"float32", 4, float32_combine, float32_scale, NULL},
    {"float64", 8, float64_combine, float64_scale, NULL},
    {"bfloat16", 2, bfloat16_combine, bfloat16_scale, NULL},
};

static bool known(int dtype) { return dtype >= 0 && dtype < (int)(sizeof DTYPES / sizeof *DTYPES); }

size_t dtype_bytes(int dtype) { return known(dtype) ? DTYPES[dtype].bytes : 0; }

const char *dtype_name(int dtype) { return known(dtype) ? DTYPES[dtype].name : "unknown"; }

const char *reduction_name(int reduction) {
    static const char *const NAMES[] = {"sum", "prod", "max", "min", "avg"};
    return reduction >= 0 && reduction < REDUCTIONS ? NAMES[reduction] : "unknown";
}

void reduce_prepare(void *to, const void *from, size_t count, int dtype, int reduction, int ranks) {
    if (reduction == ncclAvg && DTYPES[dtype].scale)
        DTYPES[dtype].scale(to, from, count, ranks);
    else
        memcpy(to, from, count * DTYPES[dtype].bytes);
}

void reduce_combine(void *to, const void *from, size_t count, int dtype, int reduction) {
    DTYPES[dtype].combine(to, from, count, reduction);
}

void reduce_finish(void *to, size_t count, int dtype, int reduction, int ranks) {
    if (reduction == ncclAvg && DTYPES[dtype].divide)
        DTYPES[dtype].divide(to, count, ranks);
}
