"""Adapters through which other evaluation harnesses ask models of this package."""
