# The portable kernels, for the folders that compile them: each in its own language.
set(HALFBYTE_GPU_KERNELS
  runtime.cu quantize4.cu dequantize4.cu linear4.cu quantize8.cu dequantize8.cu int8.cu linear8.cu)
list(TRANSFORM HALFBYTE_GPU_KERNELS PREPEND ${HALFBYTE_CSRC}/gpu/)
