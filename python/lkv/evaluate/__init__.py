"""Evaluation: methods, physical eviction, metrics, statistics and reports."""
