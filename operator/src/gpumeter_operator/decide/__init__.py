"""Decisions: pure functions from frozen data and a clock to data with reasons. No outside library is known here."""
