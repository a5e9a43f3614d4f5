"""Ratios against the plain way, each measured in one run. See README.md."""
