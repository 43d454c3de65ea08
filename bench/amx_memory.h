// For compiling llama.cpp where GCC's AMX intrinsics do not say what they read (seen with GCC 12:
// of a tile configuration only its first 8 bytes, of a tile nothing), so that stores before them
// are dropped and ldtilecfg faults: CXXFLAGS="-include .../amx_memory.h".
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg (%0)" ::"r"(config) : "memory")
#undef _tile_loadd_internal
#define _tile_loadd_internal(tile, base, stride)                   \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile              \
                   :                                               \
                   : "r"((const void*)(base)), "r"((long)(stride)) \
                   : "memory")
#endif
