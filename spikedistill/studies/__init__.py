"""Studies: comparisons over seeds that test published claims."""
