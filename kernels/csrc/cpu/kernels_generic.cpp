#include "cpu/table.inc.h"

namespace bert_fast::cpu {
const Kernels kernels_generic = generic::kernels;
}
