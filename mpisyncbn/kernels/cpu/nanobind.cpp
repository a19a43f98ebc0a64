// nanobind itself, so that setuptools can build the extension without CMake.

#include <nb_combined.cpp>
