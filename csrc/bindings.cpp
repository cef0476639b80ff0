// The only file that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu_features.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
    m.doc() = "Duetto's native kernels.";
    m.def("cpu_features", &duetto::cpu_features, nb::call_guard<nb::gil_scoped_release>(),
          "Instruction-set names that kernels may use here, most basic first.");
}
