#include "kernels/blas.h"

#include <algorithm>
#include <limits>
#include <mutex>

#include "base/check.h"
#include "kernels/gemm.h"

// Declared here, because the two sources of OpenBLAS name their functions, and their headers'
// types, differently: the wheel prefixes its symbols, so that they cannot meet those of another
// OpenBLAS.
#if BICACHE_BLAS_PREFIXED
#define BICACHE_BLAS(name) scipy_##name
#else
#define BICACHE_BLAS(name) name
#endif

extern "C" {
void BICACHE_BLAS(cblas_sgemm)(int order, int trans_a, int trans_b, int m, int n, int k,
                               float alpha, const float* a, int lda, const float* b, int ldb,
                               float beta, float* c, int ldc);
void BICACHE_BLAS(openblas_set_num_threads)(int threads);
char* BICACHE_BLAS(openblas_get_config)();
}

namespace bicache {
namespace {

constexpr auto sgemm = &BICACHE_BLAS(cblas_sgemm);
constexpr int kRowMajor = 101, kNoTrans = 111, kTrans = 112;  // cblas.h

int to_int(int64_t n) {
  require(n <= std::numeric_limits<int>::max(),
          "[gemm] blas: expected sizes that fit 31 bits, got ", n);
  return static_cast<int>(n);
}

}  // namespace

void blas_gemm(View<const float> a, View<const float> w, View<float> c, bool add, int threads) {
  static std::mutex mutex;  // OpenBLAS has one thread count per process
  const std::lock_guard lock(mutex);
  BICACHE_BLAS(openblas_set_num_threads)(std::max(threads, 1));
  sgemm(kRowMajor, kNoTrans, kTrans, to_int(a.rows), to_int(w.rows), to_int(a.cols), 1, a.data,
        to_int(a.stride), w.data, to_int(w.stride), add ? 1.0f : 0.0f, c.data, to_int(c.stride));
}

std::string blas_config() { return BICACHE_BLAS(openblas_get_config)(); }

}  // namespace bicache
