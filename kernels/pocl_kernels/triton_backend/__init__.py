"""The Triton backend, for CUDA and ROCm: one file a kernel; imported only when a tensor lies on such a device."""
