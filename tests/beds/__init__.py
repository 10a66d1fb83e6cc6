"""Test beds: models that were trained for the tests and the demo, and what made them. Not part of the package."""
