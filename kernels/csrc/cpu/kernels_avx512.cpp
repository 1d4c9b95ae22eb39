#if defined(__x86_64__)
#include "cpu/table.inc.h"

namespace bert_fast::cpu {
const Kernels kernels_avx512 = avx512::kernels;
const Kernels kernels_avx512_vnni = avx512::kernels_with<true>;
}
#endif
