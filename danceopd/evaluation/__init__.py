"""How good fields are on held-out records: metrics, the cross-matrix, retention and gates, grids and the report."""
