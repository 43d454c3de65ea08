// The kernels, written once. kernels_<isa>.cc includes this inside its namespace, after defining
// kIsa, kLanes, kTileRows, kTileVectors, Floats, Words, fma(a, b, c), stream(p, v),
// widen(const bf16*), quads(p), pairs(p) and DotInt8Wide.
//
// Everything here has internal linkage and uses no std:: template and no inline function of other
// headers: the linker would keep one copy of those, perhaps one that this CPU cannot run. For the
// same reason there is no #pragma once: every instruction set has its own.

#include "kernels/body_vector.h"
//
#include "kernels/body_gemm.h"
//
#include "kernels/body_rows.h"
//
#include "kernels/body_softmax.h"
//
#include "kernels/body_attention.h"

extern const Kernels kKernels;
const Kernels kKernels = {
    .isa = kIsa,
    .panel = kPanel,
    .vector_bytes = kLanes * 4,
    .f32 = {Form::f32, product<DotF32>},
    .bf16 = {Form::f32, product<DotBf16Wide>},
    .int8 = {.form = Form::s16_pairs, .run = product<DotInt8Wide>, .expand = expand<2>},
    .round_to_floats = round_to_floats,
    .round_to_halves = round_to_halves,
    .quantize_s16 = quantize_s16,
    .quantize_u8 = quantize_u8,
    .dequantize = dequantize,
    .rms_norm = rms_norm,
    .rope = rope,
    .silu_mul = silu_mul,
    .add = add,
    .dot = dot<float>,
    .dot_bf16 = dot<bf16>,
    .divide = divide,
    .attention_f32 = {.form = Form::f32, .pack = pack_attention<float>, .attend = attend<false>},
    .attention_bf16 = {.form = Form::f32, .pack = pack_attention<bf16>, .attend = attend<true>},
    .row_stats = row_stats,
};
