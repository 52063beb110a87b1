"""Measures of made pictures: editability, instance-consistency, identification, leakage and box adherence."""
