// nanobind itself, so that setuptools can build us without CMake.

#include <nb_combined.cpp>
