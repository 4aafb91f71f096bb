// The tests' main(); every other file of this folder adds test cases. Run from the top folder: build/tests --help
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#ifndef __CUDACC__
TEST_CASE("cuda: skipped") { MESSAGE("this program was built without nvcc: the CUDA tests are skipped"); }
#endif
