// CUDA's own name of the header for bfloat16.
#pragma once
#include "bfloat16.h"
