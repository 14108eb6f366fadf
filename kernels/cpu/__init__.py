"""Loops for the processor, compiled by numba; numpy arrays in, numpy arrays out, one thread each."""
