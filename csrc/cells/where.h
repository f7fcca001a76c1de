// Where the functions of this folder run: on the processor that the compiler compiles for, or on a GPU.

#pragma once

#if defined(__CUDACC__)
#define RNNKIT_VALUE __device__
#else
#define RNNKIT_VALUE
#endif
