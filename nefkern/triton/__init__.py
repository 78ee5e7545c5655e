"""Triton kernels, one module an operator; imported when a call first needs one."""
