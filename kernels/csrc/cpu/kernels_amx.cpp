#if defined(__x86_64__)
#include "cpu/table.inc.h"

namespace bert_fast::cpu {
const Kernels kernels_amx = amx::kernels;
}
#endif
