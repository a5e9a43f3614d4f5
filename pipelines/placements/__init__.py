"""Placements that ship with the package, as YAML; see `pipelines.placement`."""
