"""What the chapters measure, with intervals."""
