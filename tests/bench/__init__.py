"""Figures: programs that measure and print a table, run as `make bench-NAME`. None of them is a test."""
