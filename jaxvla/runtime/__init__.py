"""Placement and life cycle of programs."""
