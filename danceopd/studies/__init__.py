"""Studies: a matrix of methods, windows and seeds at one budget, as one table with intervals and one plot."""
