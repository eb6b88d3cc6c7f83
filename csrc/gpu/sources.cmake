# The portable kernels, for the folders that compile them: each in its own language.
set(HALFBYTE_GPU_KERNELS
  runtime.cu quantize4.cu dequantize4.cu linear4.cu quantize8.cu dequantize8.cu int8.cu linear8.cu
  scale8.cu
  optimizer.cu update8.cu update32.cu trust.cu)
list(TRANSFORM HALFBYTE_GPU_KERNELS PREPEND ${HALFBYTE_CSRC}/gpu/)
# Their binding, which the host's compiler makes.
set(HALFBYTE_GPU_BINDING ${HALFBYTE_CSRC}/gpu/module.cpp ${HALFBYTE_CSRC}/gpu/optimizer_binding.cpp)
