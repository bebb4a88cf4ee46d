"""The parts of the documentation that are made by code."""
