// Vectors of 16 for kernels_body.h.

// Of 32 registers a tile takes 24 for sums, 4 for weights, 1 for an activation.
constexpr int kLanes = 16, kTileRows = 6, kTileVectors = 4;
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

// a > b ? a : b, and a < b ? a : b.
inline Floats larger(Floats a, Floats b) { return _mm512_maskz_max_ps(0xffff, a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_maskz_min_ps(0xffff, a, b); }

inline Floats times_power_of_two(Floats y, Floats n) {
  return _mm512_maskz_scalef_ps(0xffff, y, n);
}

typedef double HalfDoubles __attribute__((vector_size(kLanes * 4)));
inline HalfDoubles low_doubles(Floats v) {
  return _mm512_maskz_cvtps_pd(0xff, __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7));
}
inline HalfDoubles high_doubles(Floats v) {
  return _mm512_maskz_cvtps_pd(0xff, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}

inline void stream(float* p, Floats v) { _mm512_stream_ps(p, v); }
inline void drain() { _mm_sfence(); }  // others see what was streamed

inline Floats widen(const bf16* p) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  // (GCC 12 warns of its own unmasked form.)
  return (Floats)((Words)_mm512_maskz_cvtepu16_epi32(0xffff, v) << 16);
}

// Bytes, each in 32 or in 16 bits.
inline Words quads(const uint8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Words)_mm512_maskz_cvtepu8_epi32(0xffff, v);
}

inline Words pairs(const uint8_t* p) {
  return (Words)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

struct DotInt8Wide {
  using Scalar = int32_t;
  typedef int32_t Sums __attribute__((vector_size(kLanes * 4)));
  using Weight = int8_t;
  static constexpr int kInputs = 2;
  static __m512i word(const int32_t* p) { return _mm512_set1_epi32(*p); }
  static __m512i load(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Sums dot(__m512i x, __m512i w, Sums sum) { return sum + (Sums)_mm512_madd_epi16(x, w); }
};
