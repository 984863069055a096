"""Configurations of the bilevel experiments in examples/ssigd_bilevel.py."""
