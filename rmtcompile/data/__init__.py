"""Texts for the demo and the tests."""
