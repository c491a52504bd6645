"""Demonstrations and statistics of data sets."""
