"""Ops of the models: one op, one file, each with a torch reference, a Triton kernel and a dispatch.

Import an op from its own file (`from ..kernels.rms_norm import rms_norm`); `dispatch` says which backend serves it.
"""
