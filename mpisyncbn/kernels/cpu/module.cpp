// The native code of mpisyncbn: kernels for arrays in host memory at the speed of memory, and the
// exchange.
//
// It takes NumPy arrays and torch tensors by address, shape and strides, so one build serves every
// version of torch. This file defines what Python sees; _cpu.pyi documents it.
//
//     kernels.h        the four kernels
//     arrays.h         how arrays lie in memory; dlpack.h tells it of tensors
//     tiles.h          the work cut into tiles, and handed to threads
//     masks.h          a mask, copied for the loops
//     coefficients.h   numbers per channel for the loops
//     levels.h         the choice of loops. Each loops_*.cpp has those for an instruction set: lanes.h
//                          (vectors) and loops.h (loops over a tile), which includes the headers not
//                          listed here
//     link.h           an exchange; merging.h its arithmetic, collectives.h its calls of MPI
//     stream.cpp       exchanges in the order of a device's streams: worker.h, cuda_driver.h, pinned.h
//     running_stats.h  running statistics
//     leave.h          the end of a rank, in MPI_Finalize
//
// For each channel, the tiles depend only on the shape, and their sums are added in a fixed order. So
// results have the same bits at any number of threads.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cfenv>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <unistd.h>
#include <utility>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace nb = nanobind;

#include "dlpack.h"
#include "levels.h"

namespace mpisyncbn::baseline {
#define LANES 4
#include "lanes.h"
#undef LANES
}  // namespace mpisyncbn::baseline

namespace {

using namespace mpisyncbn;

#include "arrays.h"
#include "tiles.h"
#include "coefficients.h"
#include "kernels.h"
#include "link.h"
#include "running_stats.h"
#include "leave.h"

}  // namespace

void bind_stream(nb::module_ &m);  // stream.cpp

NB_MODULE(_cpu, m) {
    // A communicator lives as long as MPI, longer than the interpreter, so nanobind would complain
    // at exit.
    nb::set_leak_warnings(false);
    const auto given = nb::arg();
    const auto maybe = nb::arg().none();  // None if there is no such array
    nb::class_<Link>(m, "Link")
        .def("__init__",
             [](Link *link, uintptr_t function, uintptr_t comm, uintptr_t datatype, uintptr_t op,
                intptr_t in_place, bool int_handles, int size) {
                 new (link) Link{{function, 0, comm, datatype, op, (uintptr_t)in_place, int_handles, size, 0}, {}};
             })
        .def("sum_moments", &Link::sum_moments)
        .def("sum_vectors", &Link::sum_vectors);
    bind_stream(m);
    m.def("install_finalize_hook", [](const std::vector<uintptr_t> &functions, uintptr_t self,
                                      uintptr_t world, uintptr_t byte, int any_source, bool int_handles) {
        mpi = {functions.at(2), functions.at(3), functions.at(4), functions.at(5),
               functions.at(6), functions.at(7), world,           byte,
               any_source,      int_handles};
        const auto attach = int_handles ? install_finalize_hook<int> : install_finalize_hook<void *>;
        return attach(functions[0], functions[1], self);
    });
    m.def("add_departing_group", [](uintptr_t comm, int rank, long exchanges, double timeout,
                                    const std::vector<std::string> &hostnames) {
        departing_groups.push_back({comm, rank, exchanges, timeout, hostnames});
    });
    m.def("update_running_stats", &update_running_stats, given, given, maybe, maybe, given, given, given,
          given);
    m.def("invstd", &invstd);
    m.def("passes_fast_check", &passes_fast_check, given, maybe, maybe, maybe, maybe);
    m.def("local_moments", &local_moments, given, maybe, given, given);
    m.def("normalize", &normalize, given, given, given, maybe, maybe, maybe, maybe, given, given, given,
          given);
    m.def("backward_reduce", &backward_reduce, given, given, given, given, maybe, maybe, maybe, maybe, maybe,
          maybe, given, given, given, given, given);
    m.def("backward_elementwise", &backward_elementwise, given, given, given, given, maybe, maybe, given,
          given, maybe, given, given, given, given, given);
    m.def("instruction_set", [] {
        const char *const names[] = {"baseline", "avx2", "avx512", "avx512 with bfloat16"};
        return names[(int)level()];
    });
    m.def("threads", &default_threads);
    m.attr("most_dimensions") = NDIM;
    m.def("set_highest_level", [](int highest) { highest_level = (Level)highest; });
    m.def("stream_from", [](long bytes) { stream_from = bytes; });
    m.def("streamed_values", [] { return streamed_values.exchange(0); });
}
