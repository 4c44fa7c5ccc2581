"""Measuring: benches with known right answers, their records and their pages."""
