// What CUDA and CuPy offer to the body of an elementwise kernel, for a loop of the host.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __device__
#define __forceinline__ inline
using std::isfinite;
using std::isinf;
using std::isnan;

static inline uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
static inline float float_of(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

// Halves are kept as bits and calculated with as float, rounded to even.
struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  bfloat16(float x) {
    uint32_t u = bits_of(x);
    bits = isnan(x) ? 0x7FC0 : (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  }
  operator float() const { return float_of((uint32_t)bits << 16); }
};

struct float16 {
  uint16_t bits;
  float16() = default;
  float16(float x) {
    uint32_t sign = (bits_of(x) >> 16) & 0x8000;
    float a = std::fabs(x);
    if (isnan(x)) bits = 0x7E00;
    else if (a >= 65520.0f) bits = sign | 0x7C00;
    else if (a < 6.103515625e-05f) bits = sign | (uint32_t)std::nearbyint(a * 16777216.0f);
    else {
      uint32_t u = bits_of(a) - (112u << 23);
      bits = sign | ((u + 0xFFF + ((u >> 13) & 1)) >> 13);
    }
  }
  operator float() const {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = (bits >> 10) & 31;
    uint32_t fraction = bits & 0x3FF;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * fraction / 16777216.0f;
    return float_of(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13);
  }
};

template <typename A, typename B> std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <typename A, typename B> std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
template <typename T> T rsqrt(T x) { return T(1) / std::sqrt(x); }
template <typename T> T __ldg(const T *p) { return *p; }

// One thread runs all elements, so what is atomic on a device is simple here.
template <typename T> T atomicAdd(T *p, T x) { T old = *p; *p = old + x; return old; }
template <typename T> T atomicMax(T *p, T x) { T old = *p; *p = max(old, x); return old; }
template <typename T> T atomicMin(T *p, T x) { T old = *p; *p = min(old, x); return old; }
template <typename T> T atomicOr(T *p, T x) { T old = *p; *p = old | x; return old; }
template <typename T> T atomicAnd(T *p, T x) { T old = *p; *p = old & x; return old; }
template <typename T> T atomicExch(T *p, T x) { T old = *p; *p = x; return old; }

template <typename T> struct raw_array {
  T *data;
  ptrdiff_t count;
  raw_array(void *pointer, ptrdiff_t n) : data((T *)pointer), count(n) {}
  T &operator[](ptrdiff_t i) const { return data[i]; }
  ptrdiff_t size() const { return count; }
};

struct indexer {
  long long count;
  long long size() const { return count; }
};
