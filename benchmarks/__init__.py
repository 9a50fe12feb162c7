"""Benchmarks: the baseline and what is measured against it; installed as tcm_fast.benchmarks."""
