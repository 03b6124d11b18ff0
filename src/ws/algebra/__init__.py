"""Exact weight updates and their arithmetic: the delta of one matrix, its spectrum, and a Direction of many deltas."""
