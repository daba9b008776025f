// Stand-in for MLX's header of this name: msl.h has the functions of bfloat.
#pragma once
