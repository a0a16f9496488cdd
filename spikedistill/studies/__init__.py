"""Comparisons over seeds: published claims, measured here."""
