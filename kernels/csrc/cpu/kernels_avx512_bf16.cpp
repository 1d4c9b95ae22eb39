#if defined(__x86_64__)
#include "cpu/table.inc.h"

namespace bert_fast::cpu {
const Kernels kernels_avx512_bf16 = avx512_bf16::kernels;
}
#endif
