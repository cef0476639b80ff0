// Compiled once per instruction set, with DUETTO_ISA its name and the compiler's flags to match
// (CMakeLists.txt). No standard library beyond C's memory and mathematics functions: a template that
// two sets both instantiate could be linked from the wrong one.
#include "kernels/attention.h"
#include "kernels/linear.h"
#include "kernels/look.h"
#include "kernels/move_kv.h"
#include "kernels/rows.h"
#include "kernels/sampling.h"

#define DUETTO_STRING_(x) #x
#define DUETTO_STRING(x) DUETTO_STRING_(x)
#define DUETTO_PASTE_(a, b) a##b
#define DUETTO_PASTE(a, b) DUETTO_PASTE_(a, b)

namespace duetto {

const Kernels* DUETTO_PASTE(DUETTO_ISA, _kernels)() {
    namespace isa = DUETTO_ISA;
    static const Kernels table = {
        DUETTO_STRING(DUETTO_ISA),
        isa::prepared_row_bytes,
        isa::prepare_rows,
        isa::linear,
        isa::unpack_row,
        isa::rms_norm,
        isa::gated_act,
        isa::add,
        isa::scale,
        isa::soft_cap,
        isa::rope,
        isa::all_finite,
        isa::finite_argmax,
        isa::first_to_score,
        isa::weigh,
        isa::block_maxima,
        isa::kv_block_bytes,
        isa::write_kv,
        isa::move_kv,
        isa::read_kv,
        isa::attention_scratch_bytes,
        isa::attention_partial_floats,
        isa::attention,
        isa::attention_merge,
        isa::look,
    };
    return &table;
}

}  // namespace duetto
