// AVX-512 and AMX for machines without them, so that the kernels written for them run everywhere:
// included before everything else, by `setup.py build_ext --emulate`.
//
// Every intrinsic that the kernels use has a stand-in here, by its definition in Intel's Software
// Developer's Manual; vectors of 64 bytes the compiler itself makes of smaller ones. What this
// cannot show: that the compiler's code for the real instructions is right, and how fast it is.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <cpuid.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

// Every instruction set is there, and the system grants tiles.
#define __builtin_cpu_supports(name) true
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(a) = *(b) = *(c) = *(d) = ~0u)
#define syscall(...) 0L

#if defined(EMULATED_ISA)  // 3 AVX-512, 5 with BF16 and VNNI, 6 with AMX
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#if EMULATED_ISA >= 5
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#endif
#if EMULATED_ISA >= 6
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
#endif

namespace emulated {

#define EMULATED static inline __attribute__((always_inline))

typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef int16_t i16x32 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

template <class To, class From>
EMULATED To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// A 256-bit instruction on both halves.
template <class Half, class Whole>
struct Halves {
  Half half[2];
  EMULATED Halves of(Whole whole) { return bits_of<Halves>(whole); }
  Whole whole() const { return bits_of<Whole>(*this); }
};
typedef Halves<__m256, __m512> Floats;
typedef Halves<__m256i, __m512i> Integers;

// ---- fp32 --------------------------------------------------------------------------------------

EMULATED __m512 set1_ps(float x) { return x - __m512{}; }
EMULATED __m512 max_ps(__m512 a, __m512 b) { return a > b ? a : b; }  // b where either is NaN
EMULATED __m512 min_ps(__m512 a, __m512 b) { return a < b ? a : b; }
EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Floats x = Floats::of(a), y = Floats::of(b), z = Floats::of(c);
  Floats to;
  for (int i = 0; i < 2; ++i) to.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  return to.whole();
}
EMULATED float reduce_add_ps(__m512 a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
}
EMULATED __m512 scalef_ps(__m512 a, __m512 n) {  // n finite and small
  for (int i = 0; i < 16; ++i) a[i] = ldexpf(a[i], int(floorf(n[i])));
  return a;
}
EMULATED __m512 roundscale_ps(__m512 a, int) {  // to nearest even
  for (int i = 0; i < 16; ++i) a[i] = nearbyintf(a[i]);
  return a;
}
EMULATED __m512 maskz_loadu_ps(__mmask16 mask, const void* p) {
  __m512 a{};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) a[i] = static_cast<const float*>(p)[i];
  return a;
}

// ---- 16 bits -----------------------------------------------------------------------------------

EMULATED __m512 cvtph_ps(__m256i a) {
  const Halves<__m128i, __m256i> x = Halves<__m128i, __m256i>::of(a);
  return Floats{_mm256_cvtph_ps(x.half[0]), _mm256_cvtph_ps(x.half[1])}.whole();
}
EMULATED __m256i cvtps_ph(__m512 a, int) {  // to nearest even
  const Floats x = Floats::of(a);
  return Halves<__m128i, __m256i>{_mm256_cvtps_ph(x.half[0], 0), _mm256_cvtps_ph(x.half[1], 0)}
      .whole();
}
EMULATED __m512i cvtepu16_epi32(__m256i a) {
  return (__m512i)__builtin_convertvector((u16x16)a, u32x16);
}
EMULATED __m256i cvtepi32_epi16(__m512i a) {
  return (__m256i)__builtin_convertvector((u32x16)a, u16x16);
}
EMULATED __m256i maskz_loadu_epi16(__mmask16 mask, const void* p) {
  u16x16 a{};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) memcpy((uint16_t*)&a + i, (const uint16_t*)p + i, 2);
  return (__m256i)a;
}
// Subnormal numbers count as zero, as they do in every instruction on bf16.
EMULATED uint32_t flushed(uint32_t bits) { return bits & 0x7f800000 ? bits : bits & 0x80000000; }
EMULATED uint16_t to_bf16(float x) {
  const uint32_t bits = flushed(bits_of<uint32_t>(x));
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
EMULATED float from_bf16(uint16_t bits) { return bits_of<float>(flushed(uint32_t(bits) << 16)); }
EMULATED __m256bh cvtneps_pbh(__m512 a) {
  u16x16 to;
  for (int i = 0; i < 16; ++i) to[i] = to_bf16(a[i]);
  return (__m256bh)to;
}
EMULATED __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  return Halves<__m256bh, __m512bh>{cvtneps_pbh(low), cvtneps_pbh(high)}.whole();
}
EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const u32x16 x = bits_of<u32x16>(a), y = bits_of<u32x16>(b);
  for (int i = 0; i < 16; ++i)
    for (int shift = 16; shift >= 0; shift -= 16)
      sum[i] += from_bf16(uint16_t(x[i] >> shift)) * from_bf16(uint16_t(y[i] >> shift));
  return sum;
}
EMULATED __m512i permutexvar_epi16(__m512i index, __m512i a) {
  i16x32 to;
  for (int i = 0; i < 32; ++i) to[i] = ((i16x32)a)[((i16x32)index)[i] & 31];
  return (__m512i)to;
}

// ---- integers ----------------------------------------------------------------------------------

EMULATED __m512i set1_epi32(int x) { return (__m512i)(u32x16{} + uint32_t(x)); }
EMULATED __m512i set1_epi16(short x) { return (__m512i)(i16x32{} + x); }
EMULATED __m512i add_epi16(__m512i a, __m512i b) { return (__m512i)((i16x32)a + (i16x32)b); }
EMULATED __m512i mul_epu32(__m512i a, __m512i b) {
  return (__m512i)(((u64x8)a & 0xffffffff) * ((u64x8)b & 0xffffffff));
}
EMULATED __m512i maddubs_epi16(__m512i a, __m512i b) {
  const Integers x = Integers::of(a), y = Integers::of(b);
  return Integers{
      _mm256_maddubs_epi16(x.half[0], y.half[0]), _mm256_maddubs_epi16(x.half[1], y.half[1])}
      .whole();
}
EMULATED __m512i madd_epi16(__m512i a, __m512i b) {
  const Integers x = Integers::of(a), y = Integers::of(b);
  return Integers{_mm256_madd_epi16(x.half[0], y.half[0]), _mm256_madd_epi16(x.half[1], y.half[1])}
      .whole();
}
EMULATED __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  i32x16 to = (i32x16)sum;
  uint8_t x[64];
  int8_t y[64];
  memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y);
  for (int i = 0; i < 64; ++i) to[i / 4] += x[i] * y[i];
  return (__m512i)to;
}

// ---- tiles -------------------------------------------------------------------------------------

struct Tile {
  uint8_t row[16][64];
};

// A thread's tiles. What real ones answer with a fault ends the process.
struct Tiles {
  uint8_t config[64] = {};
  Tile of[8];
  int height(int tile) const { return config[48 + tile]; }
  int width(int tile) const { return config[16 + 2 * tile] | config[17 + 2 * tile] << 8; }
  Tile& use(int tile) {
    const bool fits = height(tile) >= 1 && height(tile) <= 16 && width(tile) >= 1 &&
        width(tile) <= 64 && width(tile) % 4 == 0;
    if (config[0] != 1 || !fits) abort();
    return of[tile];
  }
};
inline thread_local Tiles tiles;

EMULATED void tile_loadconfig(const void* config) {
  memcpy(tiles.config, config, sizeof tiles.config);
  memset(tiles.of, 0, sizeof tiles.of);
}
EMULATED void tile_release() { memset(tiles.config, 0, sizeof tiles.config); }
EMULATED void tile_zero(int tile) { memset(&tiles.use(tile), 0, sizeof(Tile)); }
EMULATED void tile_loadd(int tile, const void* from, long stride) {
  Tile& to = tiles.use(tile);
  memset(&to, 0, sizeof to);
  for (int i = 0; i < tiles.height(tile); ++i)
    memcpy(to.row[i], (const char*)from + i * stride, tiles.width(tile));
}
EMULATED void tile_stored(int tile, void* to, long stride) {
  const Tile& from = tiles.use(tile);
  for (int i = 0; i < tiles.height(tile); ++i)
    memcpy((char*)to + i * stride, from.row[i], tiles.width(tile));
}

// The shapes of a product must agree.
EMULATED void check_product(int sum, int a, int b) {
  tiles.use(sum), tiles.use(a), tiles.use(b);
  if (tiles.height(sum) != tiles.height(a) || tiles.width(sum) != tiles.width(b) ||
      tiles.width(a) / 4 != tiles.height(b))
    abort();
}
EMULATED void tile_dpbf16ps(int sum, int a, int b) {
  check_product(sum, a, b);
  const int columns = tiles.width(sum) / 4, pairs = tiles.height(b);
  float right[2][16][16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < pairs; ++k)
      for (int n = 0; n < columns; ++n) {
        uint16_t bits;
        memcpy(&bits, tiles.of[b].row[k] + 4 * n + 2 * half, 2);
        right[half][k][n] = from_bf16(bits);
      }
  for (int m = 0; m < tiles.height(sum); ++m) {
    float to[16], found[2][16] = {};
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < pairs; ++k) {
        uint16_t bits;
        memcpy(&bits, tiles.of[a].row[m] + 4 * k + 2 * half, 2);
        const float left = from_bf16(bits);
        for (int n = 0; n < columns; ++n) found[half][n] += left * right[half][k][n];
      }
    memcpy(to, tiles.of[sum].row[m], sizeof to);
    for (int n = 0; n < columns; ++n) to[n] += found[0][n] + found[1][n];
    memcpy(tiles.of[sum].row[m], to, sizeof to);
  }
}
EMULATED void tile_dpbusd(int sum, int a, int b) {
  check_product(sum, a, b);
  for (int m = 0; m < tiles.height(sum); ++m) {
    int32_t to[16];
    memcpy(to, tiles.of[sum].row[m], sizeof to);
    for (int k = 0; k < tiles.width(a); ++k)
      for (int n = 0; n < tiles.width(sum) / 4; ++n)
        to[n] += tiles.of[a].row[m][k] * int8_t(tiles.of[b].row[k / 4][4 * n + k % 4]);
    memcpy(tiles.of[sum].row[m], to, sizeof to);
  }
}

#undef EMULATED
}  // namespace emulated

#define _mm512_set1_ps emulated::set1_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_roundscale_ps emulated::roundscale_ps
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph emulated::cvtps_ph
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_epi16 emulated::set1_epi16
#define _mm512_add_epi16 emulated::add_epi16
#define _mm512_mul_epu32 emulated::mul_epu32
#define _mm512_maddubs_epi16 emulated::maddubs_epi16
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release emulated::tile_release
#define _tile_loadd emulated::tile_loadd
#define _tile_stored emulated::tile_stored
#define _tile_zero emulated::tile_zero
#define _tile_dpbf16ps emulated::tile_dpbf16ps
#define _tile_dpbusd emulated::tile_dpbusd
#endif
#endif
