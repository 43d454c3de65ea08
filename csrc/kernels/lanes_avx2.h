// Vectors of 8 for kernels_body.h.

// Of 16 registers a tile takes 12 for sums, 2 for weights, 1 for an activation.
constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

// a > b ? a : b, and a < b ? a : b.
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }

typedef double HalfDoubles __attribute__((vector_size(kLanes * 4)));
inline HalfDoubles low_doubles(Floats v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
inline HalfDoubles high_doubles(Floats v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }

inline void stream(float* p, Floats v) { _mm256_stream_ps(p, v); }
inline void drain() { _mm_sfence(); }  // others see what was streamed

inline Floats widen(const bf16* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Floats)((Words)_mm256_cvtepu16_epi32(v) << 16);
}

// Bytes, each in 32 or in 16 bits.
inline Words quads(const uint8_t* p) {
  return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

inline Words pairs(const uint8_t* p) {
  return (Words)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

struct DotInt8Wide {
  using Scalar = int32_t;
  typedef int32_t Sums __attribute__((vector_size(kLanes * 4)));
  using Weight = int8_t;
  static constexpr int kInputs = 2;
  static __m256i word(const int32_t* p) { return _mm256_set1_epi32(*p); }
  static __m256i load(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Sums dot(__m256i x, __m256i w, Sums sum) { return sum + (Sums)_mm256_madd_epi16(x, w); }
};
