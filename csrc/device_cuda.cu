#include <cuda_runtime.h>

#include "operations.h"

namespace tcm_fast {

int cuda_runtime_version() { return CUDART_VERSION; }

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace tcm_fast
