"""Evaluation of a policy on fixed seeds."""
