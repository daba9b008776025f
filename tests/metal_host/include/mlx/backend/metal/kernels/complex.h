// Stand-in for MLX's header of this name, whose constructors for each address space clang's OpenCL
// mode does not choose between. Enough for MLX's utils.h; kernels on complex numbers do not run.
#pragma once
#include "mlx/backend/metal/kernels/bf16.h"

template <typename T> struct complex_t {
  T real, imag;
  constexpr complex_t(T r, T i) : real(r), imag(i) {}
};
typedef complex_t<float> complex64_t;
