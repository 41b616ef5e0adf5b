"""Simulated word problems of one to three steps, with solvers of any skill and an exact checker."""
