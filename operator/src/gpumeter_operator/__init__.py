"""Operator, collector, gateway and command line of gpumeter."""
