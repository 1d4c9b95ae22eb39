#include "cpu/table.inc.h"

namespace bert_fast {
const Kernels kernels_generic = generic::kernels;
}
